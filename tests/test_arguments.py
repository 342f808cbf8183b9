"""The commands' arguments: defaults of the paper, refused values, the choice of a device."""

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch

from deep_components import loss as methods
from deep_components import run_train2, run_train3
from deep_components.arguments import choose_device, recorded_arguments
from deep_components.errors import InputError

REQUIRED = ["--loss_type=lcron", "--data_dir=D", "--output_dir=O"]


def device_arguments(device: str | None = None, cuda: int | None = None) -> argparse.Namespace:
    return argparse.Namespace(device=device, cuda=cuda)


def test_defaults_are_those_of_the_paper() -> None:
    args = run_train2.parse_args(REQUIRED)
    # Spec, sections 3 to 5.
    expected: dict[str, Any] = {"lr": 0.01, "batch_size": 1024, "epochs": 1, "seed": 30}
    expected |= {"emb_dim": 8, "nn_units": 128, "seq_len": None}  # all of the log's history; RecFlow has 50
    expected |= {"optimizer": "deferred_adam", "dtype": "float32", "shuffle": True}
    expected |= {"time_zone": "Asia/Shanghai", "train_days": None, "init_from": None, "resume": False}
    assert {name: getattr(args, name) for name in expected} == expected
    assert (args.loss_type, args.data_dir, args.output_dir) == ("lcron", Path("D"), Path("O"))
    recorded = recorded_arguments(args, run_train2.build_loss(args))  # with the method's own defaults
    expected = {"tau": 50.0, "topk_op": "neural_sort", "weighting": "original", "label_ties": "shared"}
    assert {name: recorded[name] for name in expected} == expected


def test_given_values_arrive() -> None:
    args = run_train2.parse_args([*REQUIRED, "--train_days=2024-01-13, 2024-01-14,", "--no-shuffle", "--tau", "2.5"])
    assert args.train_days == ["2024-01-13", "2024-01-14"]
    assert args.shuffle is False
    assert args.tau == 2.5


@pytest.mark.parametrize(
    "flag",
    [
        *("--lr=0", "--lr=-1", "--lr=nan", "--lr=inf", "--lr=x"),
        *("--batch_size=0", "--batch_size=-1", "--batch_size=1.5", "--epochs=-1", "--seed=-1", "--cuda=-1"),
        f"--seed={2**63}",
        *("--emb_dim=0", "--nn_units=0", "--nn_units=6", "--seq_len=0", "--print_freq=0"),
        *("--output_dir=", "--data_dir="),
        *("--dtype=float16", "--optimizer=sgd", "--sort=bubble", "--learning=0.1", "stray"),
        "--batch=16",  # no abbreviations: a new flag must not change what an old command means
        *("--tau=0", "--tau=-1", "--tau=nan", "--tau=inf", "--end_to_end_quotas=0,1", "--end_to_end_quotas="),
    ],
)
def test_refused_values_exit_with_2(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_code:
        run_train2.parse_args([*REQUIRED, flag])
    assert exit_code.value.code == 2
    assert flag.split("=")[0] in capsys.readouterr().err


@pytest.mark.parametrize("left_out", REQUIRED)
def test_required_arguments(left_out: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run_train2.parse_args([flag for flag in REQUIRED if flag != left_out])
    assert left_out.split("=")[0] in capsys.readouterr().err


@pytest.mark.parametrize("name", ["cpu", "cpu:0"])
def test_the_named_device(name: str) -> None:
    assert choose_device(device_arguments(device=name)).type == "cpu"


@pytest.mark.parametrize("count", [0, 2])
def test_the_default_device(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    assert choose_device(device_arguments()).type == ("cuda" if count else "cpu")


def test_cuda_devices_by_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device(device_arguments(cuda=1)) == torch.device("cuda:1")
    assert choose_device(device_arguments(device="cuda:1")) == torch.device("cuda:1")
    assert choose_device(device_arguments(device="cuda")).type == "cuda"
    with pytest.raises(InputError, match="there are 2 CUDA devices"):
        choose_device(device_arguments(cuda=2))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    for args in (device_arguments(cuda=0), device_arguments(device="cuda")):
        with pytest.raises(InputError, match="there are 0 CUDA devices here; use --device=cpu"):
            choose_device(args)


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "meta", "mps", "cpu,cuda"])
def test_unknown_devices(name: str) -> None:
    with pytest.raises(InputError, match=r"unknown device; use cpu, cuda or cuda:K"):
        choose_device(device_arguments(device=name))


def test_two_devices_contradict(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run_train2.parse_args([*REQUIRED, "--cuda=0", "--device=cpu"])
    assert "--device: not allowed with argument --cuda" in capsys.readouterr().err


def test_an_unknown_method_names_the_known_ones() -> None:
    args = run_train2.parse_args(["--loss_type=nonsense", *REQUIRED[1:]])
    with pytest.raises(InputError, match=r"--loss_type=nonsense: .* choose one of: .*\blcron\b"):
        run_train2.build_loss(args)


def test_a_misspelt_option_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    for given, meant in {"--taus=3": "--tau", "--batchsize=8": "--batch_size", "--job=2": "--jobs"}.items():
        with pytest.raises(SystemExit):
            run_train2.parse_args([*REQUIRED, given])
        wanted = f"error: {given.partition('=')[0]}: no such option (did you mean {meant}?); --help lists the options"
        assert capsys.readouterr().err == f"{wanted}\n"


def test_a_misspelt_method_names_the_nearest() -> None:
    args = run_train2.parse_args(["--loss_type=lcorn", *REQUIRED[1:]])
    with pytest.raises(InputError, match=r"--loss_type=lcorn: no such method \(did you mean lcron\?\)"):
        run_train2.build_loss(args)


@pytest.mark.parametrize("command", [run_train2, run_train3])
def test_a_method_without_a_branch(command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its file is there: what is missing is the branch."""
    (tmp_path / "mine.py").touch()
    monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(tmp_path)])
    file = Path(command.__file__).name
    with pytest.raises(InputError, match=rf"^no branch for 'mine' in {file}: add `elif args.loss_type == 'mine'`"):
        command.build_loss(command.parse_args(["--loss_type=mine", *REQUIRED[1:]]))


@pytest.mark.parametrize("flag", ["--emb_dim=1000000000", f"--nn_units={4 * 10**9}", "--emb_dim=" + "9" * 5000])
def test_absurd_widths(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run_train2.parse_args([*REQUIRED, flag])
    assert len(capsys.readouterr().err) < 500


def test_every_file_of_the_loss_package_has_a_branch() -> None:
    files = {path.stem for path in Path(methods.__path__[0]).glob("[a-z]*.py")} - {"functional", "selection"}
    for name in sorted(files):
        run_train2.build_loss(run_train2.parse_args([f"--loss_type={name}", *REQUIRED[1:]]))


def test_an_option_of_another_method_is_refused() -> None:
    args = run_train2.parse_args(["--loss_type=bce", *REQUIRED[1:], "--tau=20"])
    with pytest.raises(InputError, match="--tau is not an option of bce"):
        run_train2.build_loss(args)


@pytest.mark.parametrize(
    "flags",
    [
        ["--single_weight=1", "--terms=end_to_end"],
        ["--single_weight=1", "--weighting=paper"],
        ["--end_to_end_quotas=30,20", "--terms=single"],
        ["--end_to_end_quotas=30"],
        ["--end_to_end_quotas=30,41"],
    ],
)
def test_options_that_contradict_each_other(flags: list[str]) -> None:
    with pytest.raises(InputError, match=r"--(single_weight|end_to_end_quotas)"):
        run_train2.build_loss(run_train2.parse_args([*REQUIRED, *flags]))
