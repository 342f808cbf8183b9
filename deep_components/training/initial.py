"""The models and tables of a training before its first step."""

import argparse
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from deep_components.arguments import DTYPES
from deep_components.cascade import Cascade
from deep_components.checkpoint import load_trained
from deep_components.dataset.columnar import DayCache
from deep_components.distributed.processes import Processes
from deep_components.distributed.sharding import shard
from deep_components.distributed.spread import share_of
from deep_components.errors import InputError
from deep_components.models import build_models, parameter_shapes
from deep_components.runs.state import saved_ids
from deep_components.schema import Schema
from deep_components.tables.id_set import IdSet
from deep_components.tables.store import EmbeddingStore, build_stores
from deep_components.training import memory
from deep_components.training.step import Shards, pulled_tables
from deep_components.training.validation import own_requests


def initial_cascade(
    cascade: Cascade,
    schema: Schema,
    args: argparse.Namespace,
    days: Sequence[DayCache],
    history_length: int,
    device: torch.device,
    validation_day: DayCache | None = None,
    processes: Processes | None = None,
) -> tuple[dict[str, nn.Module], dict[str, EmbeddingStore], int | None, Shards | None]:
    """Models and tables before the first step, on their devices; the seed of the initial values of ids that the tables
    lack; and with several processes what all their shards are. InputError when the memory does not suffice."""
    ids = compacted_ids(cascade, schema, args, days)
    rows = {name: len(ids[name]) if name in ids else table.size for name, table in schema.tables.items()}
    pulled, shards = pulled_tables(rows, args.optimizer, args.pull_from), None
    if processes is not None:
        shards = Shards(processes, ids, rows)
        ids = ids | {name: shard(ids.get(name), schema.tables[name].size, processes) for name in pulled}
        rows = rows | {name: len(ids[name]) for name in pulled}
    if args.table_memory == "host" and args.optimizer == "adam":
        raise InputError("--table_memory=host: --optimizer=adam moves all rows in each step; use deferred_adam")
    host = pulled if args.table_memory == "host" else ()
    itemsize, stages = DTYPES[args.dtype].itemsize, len(cascade.stages)
    shapes = [parameter_shapes(stage, schema, args.emb_dim, args.nn_units) for stage in cascade.stages]
    parameters = sum(math.prod(shape) for named in shapes for shape in named.values())
    if not args.epochs:
        memory.check_memory({device: itemsize * (parameters + stages * sum(rows.values()) * args.emb_dim)})
    else:
        in_pulled, in_dense = memory.table_bytes(rows, args.emb_dim, pulled, itemsize)
        longest = longest_list(args, days) or cascade.num_items
        units = max(stage.nn_units or args.nn_units for stage in cascade.stages)
        requests = args.batch_size if processes is None else -(-args.batch_size // processes.count)
        step = memory.step_bytes(requests, longest, history_length, units, stages, itemsize)
        needed = {device: stages * in_dense + step + 4 * itemsize * parameters}  # gradients, and Adam's moments
        home = torch.device("cpu") if args.table_memory == "host" else device
        needed[home] = needed.get(home, 0) + stages * in_pulled
        if validation_day is not None:
            copied = {name: rows[name] for name in rows if name in ids or name in pulled}
            requests = own_requests(validation_day, share_of(processes))
            looked_up = {name: len(validation_day.ids(name, requests)) for name in copied}
            of_day, of_best = memory.validation_bytes(copied, looked_up, args.emb_dim, stages, itemsize)
            needed[device] += of_day
            needed[home] += of_best if args.keep == "best" else 0
        memory.check_memory(needed)
    seed: int | None = None if args.init_from is not None else args.seed
    models = build_models(cascade, schema, args.emb_dim, args.nn_units, seed)
    stores = build_stores(cascade, schema, args.emb_dim, seed, ids)
    for stage, model in models.items():
        model.to(device=device, dtype=DTYPES[args.dtype])
        stores[stage].to(device, DTYPES[args.dtype], host)
    if args.init_from is not None:
        seed = load_trained(args.init_from, models, stores)
    return models, stores, seed, shards


def longest_list(args: argparse.Namespace, days: Sequence[DayCache]) -> int:
    """The most items that a request of the training can have, random ones included; 0 without days."""
    longest = max((day.num_items for day in days), default=0)
    return longest + min(args.num_random_items or 0, (args.batch_size - 1) * longest)


def compacted_ids(
    cascade: Cascade, schema: Schema, args: argparse.Namespace, days: Sequence[DayCache]
) -> dict[str, IdSet]:
    """The ids of large tables, and of those with a row for unknown ids, which must be told from others: those that the
    days name, and those that --init_from has rows for."""
    before = saved_ids(args.init_from, cascade.stage_names[0])[0] if args.init_from is not None else {}
    ids = {}
    for name, table in schema.tables.items():
        compacted = table.size >= args.compact_from or table.unknown is not None
        if not compacted or (args.init_from is not None and name not in before):
            continue  # in the latter case the table is whole
        always = {0, table.padding} | ({table.unknown} if table.unknown is not None else set())
        known = before.get(name, np.array(sorted(always)))
        if len(known) and known.max() >= table.size:
            raise InputError(f"--init_from={args.init_from}: its {name} ids are not those of {args.data_dir}")
        ids[name] = IdSet.of([known], table.size)
        for day in days:
            ids[name] = ids[name] | day.ids(name)
    return ids
