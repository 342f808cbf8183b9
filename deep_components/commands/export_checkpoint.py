"""A run's models -> state_dict files with the parameter names of the paper's original code."""

import argparse
import logging
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from deep_components.arguments import DTYPES
from deep_components.cascade import Stage
from deep_components.checkpoint import check_sizes, load_trained
from deep_components.cli import Parser
from deep_components.errors import InputError
from deep_components.files import write_atomically
from deep_components.models import MODELS
from deep_components.models.original_names import to_original
from deep_components.runs.folder import CONFIG_FILE, cascade_of, model_file, read_training
from deep_components.runs.state import check_same_run
from deep_components.schema import Schema
from deep_components.tables.store import EmbeddingStore
from deep_components.training.memory import available

logger = logging.getLogger(__name__)


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = Parser(description="Write models for the original code.")
    parser.add_argument("--run", type=Path, required=True, help="a run's folder")
    parser.add_argument("--output_dir", type=Path, required=True, help="gets <stage>.pt for every stage")
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    """Read <stage>.safetensors of the run, write <stage>.pt with whole tables, as the original code has them."""
    args = parse_args(argv)
    config = read_training(args.run)
    schema = Schema.from_json(config.get("schema"), str(args.run / CONFIG_FILE))
    sizes = argparse.Namespace(**config["arguments"])
    cascade = cascade_of(args.run, config)
    check_sizes(args.run, cascade, schema, sizes.emb_dim, sizes.nn_units)
    for stage in cascade.stages:
        check_same_run(args.run / model_file(stage.name), config)
    for stage in cascade.stages:
        path = args.run / model_file(stage.name)
        try:
            state = to_original(stage.model, _whole(args.run, stage, schema, sizes))
        except KeyError as error:
            raise InputError(f"{path}: {error} of the {stage.model} is unknown to the original code") from error
        write_atomically(args.output_dir / f"{stage.name}.pt", partial(torch.save, state))
    logger.info("exported %s -> %s", args.run, args.output_dir)


def _whole(run: Path, stage: Stage, schema: Schema, sizes: argparse.Namespace) -> dict[str, Tensor]:
    """A stage's parameters with every table whole: an id that a compacted table lacks has its initial value, which is
    where dense Adam leaves what no request names. InputError when they do not fit into memory."""
    dtype, cpu = DTYPES[sizes.dtype], torch.device("cpu")
    needed = sum(table.size for table in schema.tables.values()) * sizes.emb_dim * dtype.itemsize
    if needed > available(cpu):
        raise InputError(
            f"{run / model_file(stage.name)}: its whole tables take {needed / 1e9:.1f} GB of memory, where "
            f"{available(cpu) / 1e9:.1f} GB are free; free some, or use a machine with more"
        )
    model = MODELS[stage.model](schema, sizes.emb_dim, stage.nn_units or sizes.nn_units).to(dtype)
    store = EmbeddingStore(stage.name, schema, sizes.emb_dim).to(cpu, dtype)
    load_trained(run, {stage.name: model}, {stage.name: store})
    return {f"embedding.{name}": table.detach() for name, table in store.tables.items()} | model.state_dict()
