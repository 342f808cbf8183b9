"""Where a training's processes are started: here, where torchrun may have started several, or on a Ray cluster."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from deep_components.arguments import non_negative_int, positive_int
from deep_components.cli import Parser
from deep_components.distributed.processes import launched
from deep_components.distributed.ray_train import train_on_ray
from deep_components.errors import InputError


def launch_options(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """How the processes are started, and the training's own arguments: a run is the same wherever it is made, so that
    its config.json does not know."""
    parser = Parser(add_help=False)
    parser.add_argument("--engine", choices=["local", "ray"], default="local")
    parser.add_argument("--processes", type=positive_int, default=1)
    parser.add_argument("--max_restarts", type=non_negative_int, default=0)
    return parser.parse_known_args(argv)


def launch(
    options: argparse.Namespace, module: str, argv: Sequence[str], args: argparse.Namespace, train: Callable[[], None]
) -> None:
    """Call ``train`` here, or ``main(argv)`` of ``module`` in each process on a Ray cluster; ``args`` are of argv.
    InputError when there are to be several processes and nothing has started them."""
    if options.engine == "ray":
        train_on_ray(
            argv, module, Path(args.output_dir), options.processes, options.max_restarts, args.timeout,
            gpus=args.device != "cpu",
        )  # fmt: skip
    elif (options.processes > 1 or options.max_restarts) and not launched():
        raise InputError(
            f"--processes={options.processes} --max_restarts={options.max_restarts}: start them with torchrun "
            f"--nproc_per_node={options.processes} --max_restarts={options.max_restarts} -m {module}, or give "
            "--engine=ray (docs/cluster.md)"
        )
    else:
        train()
