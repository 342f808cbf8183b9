"""The command that prints the table; what it computes is tested in tests/reporting."""

import csv
import io
import json
import re
from collections import Counter
from functools import partial
from pathlib import Path

import pytest

from deep_components.cli import run_command
from deep_components.commands import table
from deep_components.reporting.frame import read_runs
from deep_components.reporting.results import build_results
from deep_components.reporting.tables import FORMATS, metrics_document
from tests.helpers import evaluate, leftovers, train
from tests.reporting.fake_runs import write_costs, write_run, write_runs, write_streaming


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    for name, recalls in (("lcron", (0.80, 0.81, 0.805)), ("bce", (0.70, 0.71, 0.705))):
        write_runs(tmp_path / "runs" / name, recalls, name=name)
    return tmp_path / "runs"


def expected(folder: Path, form: str) -> str:
    return FORMATS[form](partial(metrics_document, build_results(read_runs([folder]))))


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one sentence of a refusal."""
    assert run_command(table.main, list(arguments)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
    return captured.err


def test_it_prints_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "with blanks", 0.8)
    assert run_command(table.main, [str(tmp_path / "with blanks")]) == 0
    captured = capsys.readouterr()
    assert captured.out == expected(tmp_path, "text")
    assert captured.err == ""


@pytest.mark.parametrize("form", FORMATS)
def test_flag_format(form: str, runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table.main([str(runs), f"--format={form}"])
    assert capsys.readouterr().out == expected(runs, form)


@pytest.mark.parametrize(
    ("name", "form"),
    [("a.txt", "text"), ("a.md", "markdown"), ("a.csv", "csv"), ("a.tex", "latex"), ("deep/a.json", "json")],
)
def test_flag_output(name: str, form: str, runs: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    table.main([str(runs), f"--output={tmp_path / name}"])
    assert capsys.readouterr().out == ""
    assert (tmp_path / name).read_text() == expected(runs, form)
    assert leftovers(tmp_path) == []


def test_flag_kind(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for method in ("lcron", "bce"):
        write_streaming(write_costs(runs / method / "seed30"), {"2024-01-14": 0.5})
    table.main([str(runs), "--kind=costs"])
    assert "requests/s" in capsys.readouterr().out
    table.main([str(runs), "--kind=streaming", "--format=markdown"])
    assert "| 2024-01-14 | 0.5000 | 0.5000 |" in capsys.readouterr().out


def test_format_wins_over_the_ending(runs: Path, tmp_path: Path) -> None:
    table.main([str(runs), f"--output={tmp_path / 'a.dat'}", "--format=json"])
    assert json.loads((tmp_path / "a.dat").read_text())["ours"] == "lcron"


def test_an_unknown_ending(runs: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "--format" in refused(capsys, str(runs), f"--output={tmp_path / 'a.xls'}")
    assert not (tmp_path / "a.xls").exists()


def test_flags_compare_and_test(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table.main([str(runs), "--compare=bce", "--test=paired", "--format=json"])
    content = json.loads(capsys.readouterr().out)
    assert content["ours"] == "bce" and "paired" in content["test"]
    assert "--compare=nothing" in refused(capsys, str(runs), "--compare=nothing")


def test_mixed_runs_are_refused(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    odd = write_run(runs / "odd", results={"data": "simulated"})
    assert str(odd) in refused(capsys, str(runs))


def test_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "evaluate the runs first" in refused(capsys, str(tmp_path / "nothing"))


def test_a_damaged_run_is_named_on_screen_and_in_the_table(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (runs / "bce" / "seed31" / "metrics.json").write_text("{")
    table.main([str(runs)])
    assert "left out: " in capsys.readouterr().out
    table.main([str(runs), "--format=json"])
    assert str(runs / "bce" / "seed31") in json.loads(capsys.readouterr().out)["left_out"]


# Text that a terminal, a spreadsheet, LaTeX or a Markdown viewer would obey, and what is harmless in its stead.
ATTACKS = {
    "terminal": "\x1b]0;owned\x07\x1b[2J\x9b31m\r",
    "lines": "a\nerror: forged\n\n| b |\n% c\n\\end{table}\u2028",
    "order": "a\u202egpj.exe\u2066\u200b",
    "latex": "\\input{/etc/passwd}^^5cwrite18{id}%$&#_~",
    "options of a row": "[1cm]*",
    "markdown": "<img src=x onerror=alert(1)>![x](http://x)[y](javascript:z)|`q`**b** ~~s~~ &lt; https://a www.b.c",
    "formula": '=HYPERLINK("http://x";"y")',
    "formulas later": "a;=1+1,+1|@SUM(1); -2",
    "full width": "\uff1d1\uff0b1",
    "plus": "+1",
    "at": "@A1",
    "minus": "-1",
}
FORMULAS = ("formula", "formulas later", "full width", "plus", "at", "minus")
CASES = [
    *((attack, form, "metrics") for attack in ATTACKS for form in (["csv"] if attack in FORMULAS else FORMATS)),
    *((attack, form, kind) for attack in ("lines", "latex") for form in FORMATS for kind in ("costs", "streaming")),
    *(("formula", "csv", kind) for kind in ("costs", "streaming")),
]


def attacked(folder: Path, word: str) -> Path:
    """Runs all of whose texts that a table shows are ``word``, a metric's and a folder's name too, and one left out."""
    results = dict.fromkeys(("setting", "data", "test_day", "loss_type"), word) | {f"rank_{word}@1": 0.5}
    for seed in (30, 31):
        one = write_run(folder / f"seed{seed}", results=results, name=word, seed=seed, config={"commit": word})
        write_streaming(write_costs(one, device=word), {word: 0.5})
    broken = write_run(folder / word.replace("/", " ")) / "metrics.json"
    broken.write_text("{")
    return folder


@pytest.mark.parametrize(("attack", "form", "kind"), CASES)
def test_text_from_files_is_shown_and_not_obeyed(
    attack: str, form: str, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = {}
    for name, word in (("attack", ATTACKS[attack]), ("plain", "word")):
        attacked(tmp_path / name, word)
        table.main([str(tmp_path / name), f"--format={form}", f"--kind={kind}"])
        shown[name] = capsys.readouterr().out
    text, plain = shown["attack"], shown["plain"]
    assert all(letter.isprintable() for letter in text.replace("\n", ""))
    if form != "json":  # as many lines, and of the same structure
        assert text.count("\n") == plain.count("\n")
    if form == "csv":
        (head, *cells), (_, *like) = (list(csv.reader(io.StringIO(one))) for one in (text, plain))
        assert [len(line) for line in cells] == [len(line) for line in like] == [len(head)] * len(cells)
        for cell in (piece.lstrip(" ") for line in cells for whole in line for piece in re.split("[;,|]", whole)):
            assert is_number(cell) or cell[:1] not in set("=+-@\uff1d\uff0b\uff0d\uff20")
    if form == "latex":
        assert commands(text) <= commands(plain) | {"textbackslash", "textasciitilde", "textasciicircum", "textless",
                                                    "textgreater", "textbar", *"&%$#_{}"}  # fmt: skip
        assert not re.search(r"^\s*[\[*]", text, flags=re.MULTILINE) and "^^" not in text
    if form == "markdown":
        assert special(text) == special(plain)


def is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def commands(latex: str) -> set[str]:
    return set(re.findall(r"\\([a-zA-Z]+|.)", latex, flags=re.DOTALL))


def special(markdown: str) -> Counter[str]:
    """How often each letter that Markdown obeys stands there without a backslash before it."""
    found = re.findall(r"\\.|([`*_\[\]<>|#~&!$])|(://)|(www\.)", markdown)
    return Counter("".join(groups) for groups in found if any(groups))


def test_real_runs(log: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From training to a comparison with an interval over requests."""
    for method in ("lcron", "bce"):
        for seed in (30, 31):
            evaluate(log, train(log, tmp_path / method / str(seed), f"--loss_type={method}", f"--seed={seed}"))
    table.main([str(tmp_path), "--format=json"])
    content = json.loads(capsys.readouterr().out)
    assert content["notes"] == [] and content["left_out"] == {}
    assert len({record["code"] for record in content["results"]}) == 1  # though each method has files of its own
    for record in content["results"]:
        if record["method"] == "bce":
            assert record["interval_low"] <= record["difference"] <= record["interval_high"]
            assert 0 < record["p"] <= record["p_holm"] <= 1
