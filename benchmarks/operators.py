"""The selection operators alone: forward and backward, beside torch.topk and torch.sort of the same scores.

    python -m benchmarks.operators [--items=40,200,1000,4000,16384] [--requests=64] [--k=10] [--rounds=9]
        [--missing=0.2]      a share of the items that is missing, for this project's operators

Reported are milliseconds, the median of rounds in which all take turns, a turn being the best of three, and how many
times longer than torch.topk and torch.sort that is. Freed memory is kept, as in a training. The two sorts are left out
beyond --longest_matrix items. Public implementations are measured beside them where they are installed: the bitonic
networks of diffsort and difftopk (pip install diffsort difftopk) up to 200 items, and the soft ranks of torchsort (pip
install --no-build-isolation torchsort, which needs setuptools and a C++ compiler), which has no shares of a top k.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from deep_components.cli import run_command
from deep_components.errors import InputError
from deep_components.kernels import keep_freed_memory
from deep_components.loss.selection import PERMUTATION_OPERATORS, SELECTION_OPERATORS

LONGEST_NETWORK = 200  # a network of 1,000 items takes minutes

Work = Callable[[Tensor], Tensor]  # scores [B, N] -> what the gradient is taken of


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", default="40,200,1000,4000,16384")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--k", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument(
        "--longest_matrix", type=int, default=1000, help="items of the operators that need N x N numbers"
    )
    parser.add_argument("--missing", type=float, default=0.0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    if args.rounds < 1 or args.requests < 1 or not 0 < args.k < min(map(int, args.items.split(","))):
        raise InputError("--rounds and --requests are 1 or more, and --k is from 1 to fewer than every one of --items")
    if not 0 <= args.missing < 1:
        raise InputError(f"--missing={args.missing}: give a share of the items, from 0 to less than 1")
    return args


def contestants(num_items: int, args: argparse.Namespace) -> dict[str, Work]:
    generator = torch.Generator().manual_seed(num_items)
    mask = (torch.rand(args.requests, num_items, generator=generator) >= args.missing).to(args.device)
    k = torch.full((args.requests,), args.k, device=args.device)

    def operator(name: str) -> Work:
        return lambda scores: SELECTION_OPERATORS[name](scores, mask, k, 1.0).top

    named: dict[str, Work] = {
        "torch.topk": lambda scores: scores.topk(args.k, dim=-1).values,
        "torch.sort": lambda scores: scores.sort(dim=-1, descending=True).values,
    }
    short = num_items <= args.longest_matrix
    named |= {name: operator(name) for name in SELECTION_OPERATORS if short or name not in PERMUTATION_OPERATORS}
    if num_items <= LONGEST_NETWORK:
        named |= diffsort(num_items, args) | difftopk(num_items, args)
    return named | torchsort()


def diffsort(num_items: int, args: argparse.Namespace) -> dict[str, Work]:
    try:
        from diffsort import DiffSortNet
    except ImportError:
        return {}
    network = DiffSortNet("bitonic", num_items, device=args.device)
    # It sorts upwards; column j of its permutation says which item is j-th.
    return {"diffsort bitonic": lambda scores: network(scores)[1][:, :, -args.k :].sum(dim=-1)}


def difftopk(num_items: int, args: argparse.Namespace) -> dict[str, Work]:
    try:
        from difftopk import DiffTopkNet
    except ImportError:
        return {}
    network = DiffTopkNet("bitonic", num_items, args.k, device=args.device)
    return {"difftopk bitonic": lambda scores: network(scores)[1].sum(dim=-1)}


def torchsort() -> dict[str, Work]:
    try:
        from torchsort import soft_rank
    except ImportError:
        return {}
    return {"torchsort soft_rank": soft_rank}


def milliseconds(work: Work, scores: Tensor, gradient: Tensor) -> float:
    """Of one forward and backward pass."""
    leaf = scores.clone().requires_grad_()
    started = time.perf_counter()
    result = work(leaf)
    result.backward(gradient[:, : result.shape[-1]])
    if scores.is_cuda:
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - started)


def measure(num_items: int, args: argparse.Namespace) -> dict[str, dict[str, float]]:
    generator = torch.Generator().manual_seed(num_items)
    scores, gradient = (torch.randn(args.requests, num_items, generator=generator).to(args.device) for _ in range(2))
    named = contestants(num_items, args)
    turns: dict[str, list[float]] = {name: [] for name in named}
    for _ in range(1 + args.rounds):
        for name, work in named.items():
            turns[name].append(min(milliseconds(work, scores, gradient) for _ in range(3)))
    medians = {name: statistics.median(times[1:]) for name, times in turns.items()}
    return {
        name: {"ms": time, "of topk": time / medians["torch.topk"], "of sort": time / medians["torch.sort"]}
        for name, time in medians.items()
    }


def main(argv: list[str]) -> None:
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    keep_freed_memory(0)
    results = {num_items: measure(num_items, args) for num_items in map(int, args.items.split(","))}
    for num_items, rows in results.items():
        print(f"{num_items} items, {args.requests} requests, k = {args.k}")
        for name, row in rows.items():
            print(f"  {name:<19} {row['ms']:10.3f} ms  {row['of topk']:8.1f} of topk  {row['of sort']:8.2f} of sort")
    print(json.dumps({"arguments": vars(args), "torch": torch.__version__, "results": results}))


if __name__ == "__main__":
    sys.exit(run_command(main))
