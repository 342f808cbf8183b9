"""Arguments shared by the training commands, and those shared by the evaluation commands."""

import argparse
import os
import pkgutil
import reprlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from deep_components import loss as methods
from deep_components.cascade import Cascade
from deep_components.cli import Parser, nearest
from deep_components.dataset.clock import DEFAULT_TIME_ZONE
from deep_components.errors import InputError
from deep_components.loss.selection import PERMUTATION_OPERATORS, SELECTION_OPERATORS, TEMPERATURES
from deep_components.runs.folder import MAX_EMB_DIM, MAX_NN_UNITS

T = TypeVar("T")

DTYPES = {"float32": torch.float32, "float64": torch.float64}
AUTOCAST = {"off": None, "bfloat16": torch.bfloat16}
MOST_SAMPLES = 1 << 12  # of the bound: memory grows with them
PULL_FROM = 1 << 20  # about where the two ways cost the same at a batch of 1,024
COMPACT_FROM = 1 << 20  # a smaller table costs less than knowing which of its ids occur
LOGGED_ITEMS = ""  # what --corpus alone says
INDEXES = ("flat", "ivf", "hnsw")
# The scripts' own options (run_experiments.py): whoever misspells one is told so by the training, which gets the rest.
SCRIPT_OPTIONS = (
    *("--data_dir", "--output_dir", "--seeds", "--seed", "--methods", "--test_day", "--validation", "--streaming"),
    *("--batch_divisor", "--save_scores", "--resume", "--force", "--discard_state", "--jobs", "--threads", "--engine"),
    *("--any_code", "--cascade", "--test_random_items"),
)


def number(kind: Callable[[str], T], holds: Callable[[T], bool], wanted: str) -> Callable[[str], T]:
    """A converter for argparse that refuses in a sentence what is not ``wanted``."""

    def convert(text: str) -> T:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not holds(value):
            raise argparse.ArgumentTypeError(f"{reprlib.repr(text)} is not {wanted}")
        return value

    return convert


positive_int = number(int, lambda value: value > 0, "a whole number above 0")
_non_negative_int = number(int, lambda value: value >= 0, "a whole number from 0")
_samples = number(int, lambda value: 0 <= value <= MOST_SAMPLES, f"a whole number from 0 to {MOST_SAMPLES}")
seed_number = number(int, lambda value: 0 <= value < 1 << 63, "a whole number from 0 to 2^63 - 1")
_non_negative_float = number(float, lambda value: 0 <= value < float("inf"), "a number from 0")
_positive_float = number(float, lambda value: 0 < value < float("inf"), "a number above 0")
_emb_dim = number(int, lambda value: 0 < value <= MAX_EMB_DIM, f"a whole number from 1 to {MAX_EMB_DIM}")
_tower_width = number(
    int, lambda value: 0 < value <= MAX_NN_UNITS and value % 4 == 0, f"a multiple of 4 up to {MAX_NN_UNITS}"
)


def folder(text: str) -> Path:
    """A folder's path. An empty one, as of a variable that is not set, would be the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("the path is empty; name a folder")
    return Path(text)


def _quotas(text: str) -> list[int]:
    return [positive_int(part) for part in text.split(",")]


def _indexes(text: str) -> list[str]:
    kinds = text.split(",")
    for kind in kinds:
        if kind not in INDEXES:
            raise argparse.ArgumentTypeError(f"{reprlib.repr(kind)} is none of {', '.join(INDEXES)}")
    return kinds


def random_items(text: str) -> int | None:
    """A number of random items a request; None for 0, as for the option that is not given."""
    return _non_negative_int(text) or None


def _days(text: str) -> list[str]:
    return [day.strip() for day in text.split(",") if day.strip()]


def add_process_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of commands that several processes may carry out together."""
    parser.add_argument("--processes", type=positive_int, metavar="W",
                        help="W processes on this machine, each with its share of the work and of large tables "
                        "(default 1; docs/cluster.md)")  # fmt: skip
    parser.add_argument("--max_restarts", type=_non_negative_int, default=0, metavar="N", help="with --processes: "
                        "when one fails, start all again, up to N times (default 0)")  # fmt: skip
    parser.add_argument("--timeout", type=_positive_float, default=600.0, metavar="SECONDS",
                        help="several processes: how long one waits for another at most (default 600)")  # fmt: skip


def training_parser(description: str) -> argparse.ArgumentParser:
    """The arguments of every training command; methods add their own hyper-parameters to it."""
    parser = Parser(description=description, others=SCRIPT_OPTIONS)
    parser.add_argument("--loss_type", required=True, help="the method; a file of deep_components/loss has its name")
    _add_data_arguments(parser)
    parser.add_argument(
        "--time_zone", default=DEFAULT_TIME_ZONE, help=f"of a log in RecFlow's layout (default {DEFAULT_TIME_ZONE})"
    )
    parser.add_argument("--train_days", type=_days, help="day,day,... (default: all days but the test days; on RecFlow "
                        "2024-01-13 .. 2024-02-03)")  # fmt: skip
    parser.add_argument("--seed", type=seed_number, default=30, help="fixes everything on a CPU (default 30)")
    parser.add_argument("--lr", type=_positive_float, default=0.01, help="Adam's learning rate (default 0.01)")
    parser.add_argument("--batch_size", type=positive_int, default=1024, help="requests a step (default 1024)")
    parser.add_argument("--epochs", type=_non_negative_int, default=1,
                        help="passes over the training days (default 1; 0 writes the untrained cascade)")  # fmt: skip
    parser.add_argument("--emb_dim", type=_emb_dim, default=8, help="embedding dimension (default 8)")
    parser.add_argument("--nn_units", type=_tower_width, default=128, help="width of the towers (default 128)")
    parser.add_argument("--seq_len", type=positive_int, help="last history positions used (default: all; RecFlow: 50)")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="float32")
    parser.add_argument("--optimizer", choices=["deferred_adam", "adam", "sparse_adam"], default="deferred_adam",
                        help="of the ID tables: dense Adam at sparse cost (default), dense, or SparseAdam")  # fmt: skip
    parser.add_argument("--print_freq", type=positive_int, default=50, help="steps between reports (default 50)")
    parser.add_argument("--tensorboard", action="store_true",
                        help="write scalars for TensorBoard to OUTPUT_DIR/tensorboard, gradient norms too")  # fmt: skip
    parser.add_argument("--shuffle", action=argparse.BooleanOptionalAction, default=True,
                        help="shuffle the requests of a day (default) or keep file order")  # fmt: skip
    parser.add_argument("--num_random_items", type=random_items, metavar="N", help="up to N items of a batch's other "
                        "requests join each request's own, as the worst of them (default 0)")  # fmt: skip
    parser.add_argument("--init_from", type=folder, metavar="RUN", help="start from the models of another run's folder")
    add_process_arguments(parser)
    parser.add_argument("--engine", choices=["local", "ray"], default="local",
                        help="where --processes are started: here (default), or on a Ray cluster")  # fmt: skip
    parser.add_argument("--resume", action="store_true", help="go on from the state that --output_dir holds")
    parser.add_argument("--any_code", action="store_true", help="let --resume go on with a run of other code")
    parser.add_argument("--save_minutes", type=_non_negative_float, default=10.0,
                        help="save the state every so many minutes too (default 10; 0: after each day)")  # fmt: skip
    parser.add_argument("--on_nonfinite", choices=["stop", "skip"], default="stop",
                        help="what a step with a loss or gradient that is not finite does (default stop)")  # fmt: skip
    parser.add_argument("--validate_every", type=_non_negative_int, default=0, metavar="STEPS",
                        help="hold the last training day out, and measure the metrics on it every so many steps and "
                        "after each pass (default 0: never)")  # fmt: skip
    parser.add_argument("--keep", choices=["best", "last"], default="last",
                        help="save the models of the best joint recall on that day, or the last (default)")  # fmt: skip
    parser.add_argument("--patience", type=_non_negative_int, default=0, metavar="K",
                        help="stop after K validations in a row without a better one (default 0: never)")  # fmt: skip
    parser.add_argument("--compact_from", type=positive_int, default=COMPACT_FROM, metavar="ROWS",
                        help=f"tables this large hold only ids that occur (default {COMPACT_FROM})")  # fmt: skip
    parser.add_argument("--pull_from", type=positive_int, default=PULL_FROM, metavar="ROWS",
                        help="tables this large cost what a step touches of them, and are shared out among several "
                        f"processes (default {PULL_FROM})")  # fmt: skip
    parser.add_argument("--table_memory", choices=["device", "host"], default="device",
                        help="where the large ID tables lie; from host memory only a batch's rows travel")  # fmt: skip
    parser.add_argument("--day_on_device", action="store_true", help="keep the whole day in the device's memory")
    parser.add_argument("--autocast", choices=sorted(AUTOCAST), default="off",
                        help="compute the models' layers in bfloat16 (default off)")  # fmt: skip
    return parser


def evaluation_parser(description: str) -> argparse.ArgumentParser:
    """The arguments of every evaluation command."""
    parser = Parser(description=description)
    _add_data_arguments(parser)
    parser.add_argument("--time_zone", help="of the log (default: the training's)")
    parser.add_argument("--test_day", help="default: the last day; on RecFlow 2024-02-04")
    add_process_arguments(parser)
    parser.add_argument("--batch_size", type=positive_int, default=1024, help="requests scored at a time")
    parser.add_argument("--test_random_items", type=random_items, metavar="N", help="up to N items of the day's other "
                        "requests join each request's own, as the worst of them (default 0)")  # fmt: skip
    parser.add_argument("--save_scores", action="store_true", help="also write scores.npz")
    parser.add_argument("--any_code", action="store_true", help="evaluate a run that was trained by other code")
    parser.add_argument("--bound_samples", type=_samples, default=64, metavar="M",
                        help="samples of a cascade with noise, for the bound (default 64; 0: no bound)")  # fmt: skip
    parser.add_argument("--bound_noise", type=_positive_float, metavar="T",
                        help="the noise's scale, in the scores' unit (default: the run's --tau)")  # fmt: skip
    corpus = parser.add_argument_group("over a whole corpus (docs/serving.md)")
    corpus.add_argument("--corpus", nargs="?", const=LOGGED_ITEMS, metavar="ITEMS",
                        help="also evaluate on all items of this file or folder; alone: of the log")  # fmt: skip
    corpus.add_argument("--item", metavar="COLUMN", help="what names an item (default: as the log was imported)")
    corpus.add_argument(
        "--quotas", type=_quotas, metavar="Q1,Q2", help="items that the stages keep (default: the run's)"
    )
    corpus.add_argument("--filter_seen", action="store_true", help="leave out the items of a request's own history")
    corpus.add_argument("--index", type=_indexes, default=[], metavar="ivf,hnsw",
                        help=f"also measure what these indexes lose: {', '.join(INDEXES)}")  # fmt: skip
    return parser


def _add_data_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data_dir", type=folder, required=True, help="a log: RecFlow's layout, or docs/format.md")
    parser.add_argument("--output_dir", type=folder, required=True, help="the run's folder")
    parser.add_argument("--cache_dir", type=folder, help="where the columnar cache lies (default: DATA_DIR/cache)")
    device = parser.add_mutually_exclusive_group()
    device.add_argument("--cuda", type=_non_negative_int, metavar="K", help="use the K-th CUDA device")
    device.add_argument("--device", help="cpu, cuda or cuda:K (default: CUDA when there is one)")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True,
                        help="use kernels compiled by the C compiler, on a CPU (default)")  # fmt: skip


def add_method_options(parser: argparse.ArgumentParser) -> None:
    """The methods' own options. None stands for "not given"; :func:`method_options` fills in the method's default."""
    group = parser.add_argument_group("options of some methods")
    group.add_argument("--topk_op", "--sort", choices=sorted(SELECTION_OPERATORS), help="selection operator")
    group.add_argument("--tau", type=_positive_float, help="its temperature (default: the operator's own)")
    group.add_argument("--terms", choices=["both", "end_to_end", "single"], help="which terms the loss has")
    group.add_argument("--single_weight", type=_positive_float, help="fixed weight of the single-stage terms")
    group.add_argument("--weighting", choices=["original", "paper"],
                       help="of the terms: the code's, or the paper's Eq. 13")  # fmt: skip
    group.add_argument("--label_ties", choices=["shared", "repeated"], help="how tied labels count")
    group.add_argument("--end_to_end_quotas", type=_quotas, metavar="Q1,Q2", help="quotas inside the end-to-end term")
    group.add_argument("--single_quotas", type=_quotas, metavar="Q1,Q2", help="quotas inside the single-stage terms")


METHOD_OPTIONS = (
    *("tau", "topk_op", "terms", "single_weight", "weighting", "label_ties", "end_to_end_quotas", "single_quotas"),
)


def method_options(args: argparse.Namespace, **defaults: Any) -> dict[str, Any]:
    """The options a method takes: what the user gave, else the defaults. InputError for an option it does not take."""
    for name in METHOD_OPTIONS:
        if getattr(args, name) is not None and name not in defaults:
            taken = ", ".join(f"--{option}" for option in defaults) or "none"
            raise InputError(
                f"--{name} is not an option of {args.loss_type}; it takes of the methods' options: {taken}"
            )
    return {name: default if getattr(args, name) is None else getattr(args, name) for name, default in defaults.items()}


def hyper_parameters(loss: nn.Module) -> dict[str, Any]:
    """The plain public attributes of a loss, name -> a value that JSON can hold: what the method was built with."""
    plain = (bool, int, float, str, dict, list, tuple, type(None))
    named = {name: value for name, value in vars(loss).items() if not name.startswith("_") and name != "training"}
    return {name: value for name, value in named.items() if isinstance(value, plain)}


def check_validation(args: argparse.Namespace) -> None:
    """InputError for --keep=best or --patience without validations."""
    if not args.validate_every and (args.keep == "best" or args.patience):
        option = "--keep=best" if args.keep == "best" else f"--patience={args.patience}"
        raise InputError(f"{option} goes by validations; give --validate_every=STEPS too")


def recorded_arguments(args: argparse.Namespace, loss: nn.Module) -> dict[str, Any]:
    """All arguments by name; those of the method's options that were not given are as the method chose them, and those
    of validations None without any."""
    given = vars(args) | ({} if args.validate_every else dict.fromkeys(("validate_every", "keep", "patience")))
    return given | {n: v for n, v in hyper_parameters(loss).items() if n in METHOD_OPTIONS and given[n] is None}


def lcron_options(args: argparse.Namespace, cascade: Cascade, label_ties: str) -> dict[str, Any]:
    """LCRON's options as its constructor takes them. InputError when they contradict each other or the cascade."""
    options = operator_options(
        args, tau=50.0, topk_op="neural_sort", terms="both", single_weight=None, weighting="original",
        label_ties=label_ties, end_to_end_quotas=None, single_quotas=None,
    )  # fmt: skip
    if options["single_weight"] is not None and (options["terms"] != "both" or options["weighting"] == "paper"):
        raise InputError("--single_weight fixes the single-stage weights of --terms=both --weighting=original; leave "
                         "it out, or the other two")  # fmt: skip
    for name, term, without in (
        ("end_to_end_quotas", "end-to-end term", "single"),
        ("single_quotas", "single-stage terms", "end_to_end"),
    ):
        if options[name] is not None and options["terms"] == without:
            raise InputError(f"--{name} belongs to the {term}, which --terms={without} leaves out")
        options[name] = _quotas_by_stage(name, options[name], cascade)
    return options


def _quotas_by_stage(name: str, quotas: list[int] | None, cascade: Cascade) -> dict[str, int] | None:
    """Stage -> its quota, as --name gives them. InputError unless they fit the cascade."""
    if quotas is None:
        return None
    most = cascade.num_items if cascade.has_sizes else max(1, *quotas)
    if len(quotas) != len(cascade.stages) or not all(0 < quota <= most for quota in quotas):
        raise InputError(
            f"--{name}={','.join(map(str, quotas))}: give one number from 1 to {most} for "
            f"each stage of {', '.join(cascade.stage_names)}, e.g. {','.join(map(str, cascade.quotas.values()))}"
        )
    return dict(zip(cascade.stage_names, quotas, strict=True))


def operator_options(args: argparse.Namespace, tau: float, **defaults: Any) -> dict[str, Any]:
    """:func:`method_options` of a method with --topk_op. ``tau`` is its default with an operator that sorts; the others
    have one of their own."""
    operator = args.topk_op or defaults["topk_op"]
    return method_options(args, tau=TEMPERATURES.get(operator, tau), **defaults)


def sorting_options(args: argparse.Namespace) -> dict[str, Any]:
    """The options of the method "sorting". InputError for an operator that gives no permutation."""
    options = method_options(args, tau=50.0, topk_op="neural_sort")
    if options["topk_op"] not in PERMUTATION_OPERATORS:
        raise InputError(f"--topk_op={options['topk_op']}: sorting takes one of {', '.join(PERMUTATION_OPERATORS)}")
    return options


def choose_device(args: argparse.Namespace) -> torch.device:
    """The device the arguments ask for; CUDA when they ask for none and there is one.

    Raises InputError when the device is unknown or not there.
    """
    name = args.device or (f"cuda:{args.cuda}" if args.cuda is not None else None)
    launched = "LOCAL_RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1
    count = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if launched else getattr(args, "processes", None) or 1
    if count > 1 and (name == "cuda" or (name is None and torch.cuda.is_available())):
        if count > torch.cuda.device_count():
            raise InputError(
                f"{count} processes, but there are {torch.cuda.device_count()} CUDA devices here; start at most one "
                "for each, or use --device=cpu"
            )
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]) if launched else 0)
    if count > 1 and name is not None and name.startswith("cuda"):
        raise InputError(f"{name}: {count} processes cannot share a CUDA device; leave it out: each takes its own")
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"--device={name}: unknown device; use cpu, cuda or cuda:K") from error
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"--device={name}: unknown device; use cpu, cuda or cuda:K")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"{name}: there are {torch.cuda.device_count()} CUDA devices here; use --device=cpu")
    return device


def method_names() -> list[str]:
    """The methods: the files of the loss package."""
    return sorted({module.name for module in pkgutil.iter_modules(methods.__path__)} - {"functional", "selection"})


def unknown_method(loss_type: str, command: str = "run_train2.py") -> InputError:
    """The error for a --loss_type without a branch in ``build_loss`` of a command's file: names the nearest of the
    methods, which are the files of the loss package, or the branch that is missing."""
    if loss_type in method_names():
        name = Path(command).name
        return InputError(f"no branch for {loss_type!r} in {name}: add `elif args.loss_type == {loss_type!r}` to its "
                          "build_loss, as README says under Adding a method")  # fmt: skip
    near = nearest(loss_type, method_names())
    return InputError(f"--loss_type={loss_type}: no such method{near}; choose one of: {', '.join(method_names())}")
