"""Every benchmark runs, and says what docs/performance.md takes from it: tiny, and in this process."""

import importlib
import json
import os
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext
from functools import partialmethod
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import common, load, operators, step
from deep_components import commands
from deep_components.errors import InputError
from deep_components.models import din

SMALL = ("--requests=48", "--batch_size=16", "--repeats=1", "--videos=200", "--authors=20", "--device=cpu")
MODES = ("compiled", "plain", "torch_compile", "bfloat16")


class _Here:
    """A pool that works in this process."""

    def submit(self, function: Callable[..., Any], *arguments: Any) -> "Future[Any]":
        done: Future[Any] = Future()
        done.set_result(function(*arguments))
        return done


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "ProcessPoolExecutor", lambda *_: nullcontext(_Here()))
    monkeypatch.setattr(common, "SHORTEST_TURN", 0.0)
    monkeypatch.setattr(common, "ceilings", lambda device: {"gflops": 100.0, "gigabytes_per_second": 10.0})


def run(name: str, tmp_path: Path, *flags: str) -> dict[str, Any]:
    """What a benchmark writes."""
    output = tmp_path / "made for it" / "results.json"
    importlib.import_module(f"benchmarks.{name}").main([*SMALL, *flags, f"--output={output}"])
    results: dict[str, Any] = json.loads(output.read_text())
    return results


@pytest.mark.parametrize("setting", ["two_stage", "three_stage"])
def test_a_step(setting: str, tmp_path: Path) -> None:
    """Its first loss is the plain way's, or it would be refused."""
    results = run("step", tmp_path, f"--setting={setting}")
    seconds = results["seconds"]
    assert results["requests_per_second"]["ours"] == pytest.approx(16 / seconds["ours"], rel=1e-3)
    assert results["ratio"] == pytest.approx(seconds["baseline"] / seconds["ours"], rel=1e-3)
    assert results["seconds_per_part"]["ours"].keys() >= {"forward", "loss", "backward", "optimizer"}
    assert results["roofline"]["share_of_the_ceiling"] > 0


def test_a_step_beside_busy_processes(tmp_path: Path) -> None:
    results = run("step", tmp_path, "--busy=0,1", "--spins=0,7")["busy"]
    shares = [min(1.0, len(os.sched_getaffinity(0)) / (torch.get_num_threads() + busy)) for busy in (0, 1)]
    assert [results[busy]["share"] for busy in "01"] == pytest.approx(shares, rel=1e-3)
    for busy in "01":
        assert results[busy]["requests_per_second"].keys() == {"spins_0", "spins_7", "one_thread"}
        assert min(results[busy]["requests_per_second"].values()) > 0


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_modes_of_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced, not compiled by Inductor: that takes a minute."""
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend="eager"))
    monkeypatch.setattr(din, "attention_logits", din.attention_logits)  # put back afterwards
    results = run("step", tmp_path, "--no-baseline", f"--modes={','.join(MODES)}")
    assert tuple(results["seconds"]) == tuple(results["first_loss"]) == tuple(results["seconds_of_first_step"]) == MODES
    with pytest.raises(SystemExit):
        run("step", tmp_path, "--modes=compiled,fast")


def test_the_formula_for_inductor_is_that_of_the_model() -> None:
    torch.manual_seed(0)
    history, items, weight = torch.randn(3, 5, 7), torch.randn(3, 4, 7), torch.randn(7)
    torch.testing.assert_close(
        step.attention_logits(history, items, weight), din.attention_logits(history, items, weight)
    )


def test_an_evaluation(tmp_path: Path) -> None:
    results = run("evaluation", tmp_path)
    assert results["joint_recall"]["ours"] == pytest.approx(results["joint_recall"]["baseline"], rel=1e-3)


@pytest.mark.parametrize("name", ["data", "epoch", "loss"])
def test_beside_the_baseline(name: str, tmp_path: Path) -> None:
    results = run(name, tmp_path)
    assert results["seconds"].keys() >= {"ours", "baseline"} and results["ratio"] > 0


def test_memory(tmp_path: Path) -> None:
    results = run("memory", tmp_path)
    assert results["steps"] == 3 and results["peak_memory_bytes"] > 0
    assert results["distinct_ids"]["video"] <= 202


def test_one_training_on_several_processes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Real ranks, as few as show all figures."""
    sizes = [f"--memory_{name}={size}" for name, size in {"requests": 48, "videos": 200, "authors": 20}.items()]
    results = run("distributed", tmp_path, "--steps=2", "--processes=2", "--memory_processes=1", *sizes)
    speed = results["speed"]["2"]
    assert results["ratio"]["2"] == {"requests_per_second": 1, "cpu_seconds": 1}
    assert min(speed["requests_per_second"], speed["cpu_seconds"], speed["waiting.training"]) > 0
    # The formula leaves out the sums and counts of the loss, which matter in a batch as small as this.
    assert speed["bytes.formula"] == pytest.approx(speed["bytes.rows"] + speed["bytes.sums"], rel=0.2)
    assert speed["bytes.loopback"] > speed["bytes.rows"] and results["memory"]["1"]["peak_bytes"] > 0
    table = capsys.readouterr().out.partition("| processes |")[2]
    assert f"{speed['bytes.formula'] / 1e6:.2f} |" in table and "peak of a rank" in table


def test_long_lists(tmp_path: Path) -> None:
    results = run("long_lists", tmp_path, "--items=40,55", "--methods=arf_v2_lml,fs_ranknet")["results"]
    for method in ("arf_v2_lml", "fs_ranknet"):
        for items in (40, 55):
            measured = results[method][str(items)]
            assert (measured["items"], measured["random_items"]) == (items, items - 40)
            assert measured["process"] > 0 and measured["seconds"] > 0
    with pytest.raises(InputError, match="--methods are of"):
        run("long_lists", tmp_path, "--methods=none")


def test_operators(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The two sorts up to --longest_matrix; other packages where they are installed."""
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    for name in ("diffsort", "difftopk"):
        monkeypatch.setitem(sys.modules, name, None)
    there = ModuleType("torchsort")
    there.soft_rank = lambda scores: scores.sort(dim=-1).values  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torchsort", there)
    flags = ["--requests=4", "--k=3", "--rounds=1", "--longest_matrix=25", "--device=cpu", "--missing=0.3"]
    operators.main(["--items=20,30", *flags])
    results = json.loads(capsys.readouterr().out.splitlines()[-1])["results"]
    everywhere = {"torch.topk", "torch.sort", "dftopk", "lapsum", "lml", "sparse_topk", "torchsort soft_rank"}
    assert results["30"].keys() == everywhere and results["20"].keys() == everywhere | {"neural_sort", "soft_sort"}
    for rows in results.values():
        for row in rows.values():
            assert row["ms"] > 0 and row["of sort"] == pytest.approx(row["ms"] / rows["torch.sort"]["ms"])
    with pytest.raises(InputError, match="--k is from 1"):
        operators.main(["--items=20", "--k=20"])
    with pytest.raises(InputError, match="--missing=1"):
        operators.main(["--items=20", "--missing=1"])


def test_other_losses_are_refused() -> None:
    measured = {
        name: common.Measured(seconds=1.0, first_result=result, first_seconds=1.0, peak_bytes={}, parts={})
        for name, result in {"ours": 1.0, "bfloat16": 1.001, "baseline": 1.00002}.items()
    }
    common.check_same(measured, "first losses", 1e-4, bfloat16=1e-2)
    with pytest.raises(InputError, match="the first losses differ"):
        common.check_same(measured, "first losses", 1e-5, bfloat16=1e-2)
    with pytest.raises(InputError, match="the first losses differ"):
        common.check_same(measured, "first losses", 1e-4)


def test_an_import(capsys: pytest.CaptureFixture[str]) -> None:
    importlib.import_module("benchmarks.import").main(["--requests=80", "--candidates=5", "--items=500", "--jobs=1"])
    results = json.loads(capsys.readouterr().out)
    assert (results["exit_code"], results["rows"]) == (0, 400)
    assert results["peak_memory_bytes"] > 0 and results["log_bytes"] > 0


class _Answers(BaseHTTPRequestHandler):
    """A service that answers every other request, and says that it is full to the others."""

    protocol_version, asked = "HTTP/1.1", 0

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        type(self).asked += 1
        self.send_response(200 if self.asked % 2 else 503)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def _service(folder: Path) -> Iterator[tuple[str, int]]:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Answers) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", os.getpid()
        server.shutdown()


@pytest.mark.usefixtures("short_rules")
def test_serving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bundle, recommender and indexes are real, the commands run in this process; the service is a stub."""
    serving = importlib.import_module("benchmarks.serving")

    def apart(args: Namespace, *words: str, threads: int | None = None) -> Any:
        return json.loads(json.dumps(serving.part(Namespace(**{**vars(args), "part": words}))))

    def command(*words: str) -> dict[str, float]:
        here = ["--jobs=1"] if words[0] == "import" else []
        assert commands.main([*words, *here]) == 0
        return {"seconds": 1.0, "peak_bytes": 1.0}

    for name, stub in {"apart": apart, "lcron": command, "served": _service}.items():
        monkeypatch.setattr(serving, name, stub)
    flags = ["--items=600", "--requests=4", "--log_requests=16", "--batch_size=16", f"--folder={tmp_path}"]
    serving.main([*flags, "--compared=flat,ivf", "--concurrency=1,2", f"--output={tmp_path / 'results.json'}"])
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["commands"].keys() == {"import", "train", "export"}
    inside = results["in_process"]
    assert inside["milliseconds_per_part"].keys() == {"encode", "retrieval", "prerank", "rank", "answer"}
    assert sum(part["mean"] for part in inside["milliseconds_per_part"].values()) <= inside["milliseconds"]["mean"]
    assert results["index"]["flat"]["recall@400"] == 1 and results["index"]["ivf"]["recall@400"] > 0.9
    for concurrency in "12":
        found = results["http"][concurrency]
        assert found["requests_per_second"] > 0 and found["p50"] <= found["p99"] and sum(found["refused"].values()) == 2


def test_percentiles() -> None:
    assert load.summary([i / 1000 for i in range(200, 0, -1)]) == {"mean": 100.5, "p50": 100, "p90": 180, "p99": 198}
    assert load.summary([]) == {}
