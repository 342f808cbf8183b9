"""What several processes refuse to train, or to train together."""

import argparse
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from deep_components.distributed.processes import Processes
from deep_components.errors import InputError

# What each process may have as it likes: where its files and tables lie, on which device.
_ITS_OWN = ("data_dir", "cache_dir", "device", "cuda", "table_memory", "init_from", "timeout")
_SHOWN = 3  # of what differs


def check_arguments(args: argparse.Namespace, count: int) -> None:
    """InputError for arguments that ``count`` processes cannot train with."""
    if args.batch_size < count:
        raise InputError(
            f"--batch_size={args.batch_size}: {count} processes cannot share a batch of fewer requests; give at least "
            f"{count}, or fewer processes"
        )
    if args.day_on_device:
        raise InputError(f"--day_on_device: {count} processes exchange rows ahead, which it leaves no time for; leave "
                         "it out")  # fmt: skip


def check_models(models: Mapping[str, nn.Module]) -> None:
    """InputError for a layer with statistics over the batch, of which each process sees a part."""
    for stage, model in models.items():
        for name, layer in model.named_modules():
            if isinstance(layer, _NormBase) and (layer.track_running_stats or "Batch" in type(layer).__name__):
                raise InputError(
                    f"stage {stage}: layer {name or type(model).__name__} is a {type(layer).__name__}, whose "
                    "statistics would be of each process's part of the batch; use LayerNorm, or train with one process"
                )


def check_alike(config: Mapping[str, Any], processes: Processes) -> None:
    """InputError, in all processes, unless they have the same arguments, data, code and packages. ``config``: what
    config.json will say."""
    told = [dict(of_one) for of_one in processes.gather(list(_facts(config)))]
    different = {
        rank: [name for name in sorted(told[0].keys() | own.keys()) if own.get(name) != told[0].get(name)]
        for rank, own in enumerate(told)
    }
    ranks = [rank for rank, names in different.items() if names]
    if not ranks:
        return
    names = list(dict.fromkeys(name for rank in ranks for name in different[rank]))
    shown = ", ".join(_shown(name, told[ranks[0]].get(name), told[0].get(name)) for name in names[:_SHOWN])
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    who = "process" if len(ranks) == 1 else "processes"
    raise InputError(
        f"{who} {_listed(ranks)} of {processes.count} and process 0 differ in {shown}{more}; start all with the same "
        "arguments, data, code and packages"
    )


def _facts(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Name -> value of all that processes must have in common."""
    for name, value in config["arguments"].items():
        if name not in _ITS_OWN:
            yield f"--{name}", value
    for day, checksum in config["data_checksums"].items():
        yield f"the data of day {day}", checksum
    for name in ("train_days", "validation_day", "cascade", "schema_checksum", "encoding_checksum", "loss"):
        yield f"the {name.replace('_', ' ')}", config.get(name)
    yield "the models of --init_from", config["init_from_checksums"]
    for file, digest in {**config["code"]["files"], **config["code"]["method"]}.items():
        yield f"the code of {file}", digest
    for package, version in config["versions"].items():
        yield f"the version of {package}", version
    yield "the device's kind", config["device"].partition(":")[0]
    yield "the kernels", config["kernels"]


def _shown(name: str, found: Any, wanted: Any) -> str:
    """With the values where they are the user's words."""
    said = name.startswith(("--", "the version", "the device", "the kernels"))
    return f"{name} ({found}, not {wanted})" if said else name


def _listed(ranks: Iterable[int]) -> str:
    return ", ".join(map(str, ranks))
