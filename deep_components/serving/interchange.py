"""A cascade's stages for other programs: ONNX graphs and torch.export programs, embedding tables included.

A graph takes what an encoding makes of raw values, with a table's rows for indices where the table is compacted, and
gives scores [B, N]; B, N and L are free. Of a stage that scores by vectors there are graphs for those of users and of
items besides. Every file is compared with the models before it is put where a user finds it.
"""

import importlib.util
import io
import logging
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deep_components.batch import EmbeddedFeatures, Features
from deep_components.cascade import Cascade
from deep_components.dataset.log import open_log
from deep_components.errors import InputError
from deep_components.files import make_folder, remove, remove_folder, sha256_of, temporaries, write_json
from deep_components.kernels import use_kernels
from deep_components.schema import SIDES, Field, Schema
from deep_components.serving.bundle import Bundle, only_writer
from deep_components.serving.scorer import Scorer
from deep_components.tables.lookup import padding_row
from deep_components.tables.store import EmbeddingStore

ONNX_FOLDER, MANIFEST_FILE = "onnx", "manifest.json"
TOLERANCE = 1e-5  # times the larger of 1 and the value
_FORMAT = 1
_MASK = "history.mask"
_AXES = {"request": ("B",), "history": ("B", "L"), "item": ("B", "N")}
_LARGE = 1 << 30  # bytes: tables of larger graphs lie in a file beside, as a graph's own file must be below 2 GB
_SAMPLE = (16, 50)  # requests and items that graphs are compared on, twice
_EXAMPLE = {"B": 3, "N": 5, "L": 4}  # sizes that tracing sees; it takes 0 and 1 for fixed

Inputs = dict[str, Tensor]


# ---- what is exported ------------------------------------------------------------------------------------------------


class _Graph(nn.Module):
    """Named inputs -> one output: "scores" [B, N] of a stage, or vectors: of "users" [B, d] or of "items" [N, d].

    The look-ups are those of EmbeddingStore.embed, one a field."""

    def __init__(self, model: nn.Module, store: EmbeddingStore, output: str) -> None:
        super().__init__()
        self.model, self.output, self.dtype, self.dim = model, output, store.dtype, store.dim
        self.sides = {side: store.schema.side(side) for side in _sides(output)}
        self.widths = {side: store.schema.width(side, store.dim) for side in SIDES}
        self.padding = {table: padding_row(store.schema, store.ids, table) for table in store.tables}
        for table in {field.table for fields in self.sides.values() for field in fields if field.table}:
            self.register_parameter(f"table_{table}", store.tables[table])

    def forward(self, inputs: Inputs) -> Tensor:
        embedded = {side: self._side(side, inputs) for side in self.sides}
        model = cast(Any, self.model)
        made: Tensor
        if self.output == "items":
            made = model.item_vectors(embedded["item"].unsqueeze(0)).squeeze(0)
        elif self.output == "users":  # items take no part
            item = embedded["request"].new_empty(inputs[_MASK].shape[0], 0, self.widths["item"])
            made = model.user_vectors(EmbeddedFeatures(**embedded, item=item, history_mask=inputs[_MASK]))
        else:
            made = model(EmbeddedFeatures(**embedded, history_mask=inputs[_MASK]))
        return made

    def _side(self, side: str, inputs: Inputs) -> Tensor:
        if not self.sides[side]:  # of the request or the history
            return torch.zeros(*inputs[_MASK].shape[: len(_AXES[side])], 0, dtype=self.dtype)
        return torch.cat([self._values(field, inputs[f"{side}.{field.name}"]) for field in self.sides[side]], dim=-1)

    def _values(self, field: Field, rows: Tensor) -> Tensor:
        if not field.table:
            return rows.to(self.dtype).unsqueeze(-1)
        values = F.embedding(rows, getattr(self, f"table_{field.table}"))
        if not field.length:
            return values
        there = (rows != self.padding[field.table]).sum(dim=-1, keepdim=True).clamp(min=1)
        return values.sum(dim=-2) / there  # the padding row is zero


def _sides(output: str) -> Sequence[str]:
    return {"scores": SIDES, "users": SIDES[:2], "items": SIDES[2:]}[output]


def _axes(field: Field, output: str) -> tuple[str, ...]:
    """The free axes of an input."""
    return ("N",) if output == "items" else _AXES[field.side]


def _example(schema: Schema, output: str) -> tuple[Inputs, dict[str, dict[int, str]]]:
    """Inputs of row 0, and the names of their free axes."""
    inputs, free = Inputs(), dict[str, dict[int, str]]()
    for side in _sides(output):
        for field in schema.side(side):
            axes, name = _axes(field, output), f"{side}.{field.name}"
            shape = [_EXAMPLE[axis] for axis in axes] + [field.length] * (field.length > 0)
            inputs[name] = torch.zeros(shape, dtype=torch.int64 if field.table else torch.float32)
            free[name] = dict(enumerate(axes))
    if output != "items":
        inputs[_MASK] = torch.ones(_EXAMPLE["B"], _EXAMPLE["L"], dtype=torch.bool)
        free[_MASK] = {0: "B", 1: "L"}
    return inputs, free


# ---- exporting -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Target:
    """One graph: its file's name without the ending, its stage, and its output as of :class:`_Graph`."""

    name: str
    stage: str
    output: str


def export_bundle(
    folder: Path, cascade: Cascade | None = None, data_dir: Path | None = None, cache_dir: Path | None = None
) -> dict[str, Any]:
    """Write the graphs of a bundle's current version to ONNX_FOLDER in it; returns the manifest.

    They are compared with the models on requests of the last day of the log in ``data_dir``, and on random ones with
    items of the corpus. ``cascade`` as of Bundle.load. Errors as of :func:`export_graphs`.
    """
    bundle = Bundle.load(folder, cascade)
    samples = [_random_sample(bundle)]
    if data_dir is not None:
        samples.append(_sample_of_log(bundle, data_dir, cache_dir))
    with only_writer(folder):
        return export_graphs(bundle.scorer, folder / ONNX_FOLDER, samples, _about(bundle))


def export_graphs(
    scorer: Scorer, folder: Path, samples: Sequence[Features], about: Mapping[str, Any]
) -> dict[str, Any]:
    """Write the graphs of all stages and a manifest to ``folder``, which is replaced as a whole; returns the manifest.

    Args:
        scorer: the models, on a CPU.
        samples: requests on which each graph is compared with the models, at several B, N and L.
        about: what else the manifest says.

    Raises:
        InputError: a package is missing, a model cannot be exported, a graph gives other values than the model, or the
            folder cannot be written. What was there before stays then.
    """
    for package in ("onnx", "onnxscript", "onnxruntime"):
        if importlib.util.find_spec(package) is None:
            raise InputError(f"--onnx: the package {package} is missing; pip install -r requirements-serve.txt")
    make_folder(folder.parent)
    new = folder.with_name(f"{folder.name}-new")
    temporary = new.with_name(f".{new.name}.{os.getpid()}.tmp")
    try:
        for leftover in temporaries(new):  # of a killed process
            remove(leftover)
        temporary.mkdir()
        graphs = {}
        for target in _targets(scorer):
            checks = _checks(scorer, target, samples)  # by the models as they serve, with compiled kernels
            with _plain_operators(scorer, target.stage):
                graphs[target.name] = _export(scorer, target, temporary, checks)
        content = {"format": _FORMAT, **about, "tolerance": TOLERANCE, "torch": torch.__version__, "graphs": graphs}
        content |= {"tables": _write_tables(scorer, temporary)}
        files = sorted(temporary.iterdir())
        content["files"] = {f.name: {"size": f.stat().st_size, "sha256": sha256_of(f)} for f in files}
        write_json(temporary / MANIFEST_FILE, content)
        remove_folder(folder)
        temporary.rename(folder)
    except OSError as error:
        raise InputError(
            f"{folder}: cannot be written ({error.strerror or error}); free the space or name another folder"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return content


def _targets(scorer: Scorer) -> Iterator[_Target]:
    for stage, model in scorer.models.items():
        yield _Target(stage, stage, "scores")
        if hasattr(model, "user_vectors") and hasattr(model, "item_vectors"):
            yield _Target(f"{stage}.user", stage, "users")
            yield _Target(f"{stage}.item", stage, "items")


@contextmanager
def _plain_operators(scorer: Scorer, stage: str) -> Iterator[None]:
    """The stage's model without compiled kernels, which no other program has."""
    users = list(scorer.models[stage].modules())
    before = [getattr(user, "kernels", None) for user in users]
    use_kernels(users, None)
    try:
        yield
    finally:
        for user, kernels in zip(users, before, strict=True):
            use_kernels([user], kernels)


def _export(scorer: Scorer, target: _Target, folder: Path, checks: Sequence["_Check"]) -> dict[str, Any]:
    """Write and compare one graph; what the manifest says of it."""
    store = scorer.stores[target.stage]
    inputs, free = _example(store.schema, target.output)
    graph = _Graph(scorer.models[target.stage], store, target.output)
    onnx_file, program_file = folder / f"{target.name}.onnx", folder / f"{target.name}.pt2"
    program = _traced(graph, inputs, free, target)
    _write_onnx(program, free, target, onnx_file)
    found = {onnx_file.name: _difference(target, onnx_file.name, checks, _onnx_function(onnx_file))}
    if target.output == "scores":
        for node in program.graph.nodes:
            node.meta.pop("stack_trace", None)
        torch.export.save(program, program_file)
        found[program_file.name] = _difference(target, program_file.name, checks, program.module())
    axes = {name: [free[name].get(axis, size) for axis, size in enumerate(v.shape)] for name, v in inputs.items()}
    listed = {name: {"dtype": _numpy_name(v.dtype), "shape": axes[name]} for name, v in inputs.items()}
    return {"stage": target.stage, "inputs": listed, "output": target.output, "largest_difference": found}


@contextmanager
def _known_warnings() -> Iterator[None]:
    """Without what torch's own exporter is told by torch's own code, by the absence of torchvision, and because inputs
    share an axis, whose name is one."""
    registry = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = registry.level
    registry.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning)
            warnings.filterwarnings("ignore", r"# The axis name: (\w+) will not be used, .* another axis: \1\.")
            yield
    finally:
        registry.setLevel(level)


@contextmanager
def _sentences(target: _Target) -> Iterator[None]:
    """A model of one's own may do what no graph can."""
    try:
        yield
    except (RuntimeError, TypeError, ValueError) as error:  # of these kinds are torch.export's and torch.onnx's errors
        reason = str(error).strip().partition("\n")[0][:300]
        raise InputError(
            f"stage {target.stage}: its model cannot be exported ({reason}); use operators of torch in its forward, "
            "and no decision on the values of tensors"
        ) from error


def _traced(graph: _Graph, inputs: Inputs, free: Mapping[str, Mapping[int, str]], target: _Target) -> Any:
    """The torch.export program. InputError when it holds anything but PyTorch's own operators, or fixes an axis."""
    sizes = {axis: torch.export.Dim(axis) for axis in _EXAMPLE}
    dynamic = {name: {axis: sizes[called] for axis, called in axes.items()} for name, axes in free.items()}
    with _sentences(target), torch.no_grad(), redirect_stderr(io.StringIO()):  # torch prints unfinished graphs there
        program = torch.export.export(graph.eval(), (inputs,), dynamic_shapes=(dynamic,))
    for node in program.graph.nodes:
        foreign = isinstance(node.target, torch._ops.HigherOrderOperator) or (
            isinstance(node.target, torch._ops.OpOverload) and node.target.namespace != "aten"
        )
        if node.op == "call_function" and foreign:
            raise InputError(f"stage {target.stage}: its model uses {node.target}, which other programs do not have")
    return program


def _write_onnx(program: Any, free: Mapping[str, Mapping[int, str]], target: _Target, path: Path) -> None:
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    with _sentences(target), _known_warnings():
        made = torch.onnx.export(
            program, dynamo=True, input_names=list(free), output_names=[target.output], dynamic_shapes=(free,),
            verbose=False,
        )  # fmt: skip
        assert made is not None
        ClearMetadataAndDocStringPass()(made.model)  # paths of this machine
        large = sum(values.numel() * values.element_size() for values in program.state_dict.values()) > _LARGE
        made.save(path, external_data=large)


def _numpy_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _write_tables(scorer: Scorer, folder: Path) -> dict[str, Any]:
    """What the manifest says of tables, the same for all stages; of a compacted one, ids.<table>.npy has the encoding's
    index of each row, rising."""
    store = next(iter(scorer.stores.values()))
    described = {}
    for name, table in scorer.schema.tables.items():
        known, indices = store.ids.get(name), None
        if known is not None:
            indices = f"ids.{name}.npy"
            np.save(folder / indices, known.ids())
        unknown = table.unknown
        if known is not None and unknown is not None:
            unknown = int(known.rows(np.array([unknown]))[0])
        padding = padding_row(scorer.schema, store.ids, name)
        described[name] = {"rows": store.rows[name], "padding": padding, "unknown": unknown, "indices": indices}
    return described


def _about(bundle: Bundle) -> dict[str, Any]:
    """What the manifest says of the bundle."""
    names = ("run", "cascade", "emb_dim", "nn_units", "seq_len", "dtype")
    return {"version": bundle.version, **{name: bundle.manifest[name] for name in names}}


# ---- comparing -------------------------------------------------------------------------------------------------------


def _sample_of_log(bundle: Bundle, data_dir: Path, cache_dir: Path | None) -> Features:
    """Requests of a log's last day with their candidates. InputError when the log is not of the models' fields."""
    log = open_log(data_dir)
    if log.schema.checksum != bundle.schema.checksum:
        raise InputError(f"{data_dir}: its fields or id counts differ from those of the bundle; name the run's log")
    day = log.open_day(log.days()[-1], bundle.cascade, cache_dir, bundle.manifest["zone"], bundle.manifest["seq_len"])
    return day.batch(np.arange(min(_SAMPLE[0], len(day)))).features


def _random_sample(bundle: Bundle) -> Features:
    """Requests with any ids and numbers, and items of the corpus."""
    rng, length = np.random.default_rng(0), bundle.manifest["seq_len"]
    shapes = {"request": (_SAMPLE[0],), "history": (_SAMPLE[0], length)}

    def values(field: Field) -> np.ndarray:
        shape = (*shapes[field.side], field.length) if field.length else shapes[field.side]
        return rng.integers(0, field.size, shape) if field.table else rng.standard_normal(shape, np.float32)

    sides = {side: {field.name: values(field) for field in bundle.schema.side(side)} for side in shapes}
    mask = np.arange(length, 0, -1) <= rng.integers(0, length + 1, (_SAMPLE[0], 1))
    sides["history"] = {
        name: np.where(mask[..., None] if column.ndim > 2 else mask, column, 0).astype(column.dtype)
        for name, column in sides["history"].items()
    }
    items = bundle.corpus.fields(rng.integers(0, len(bundle.corpus), _SAMPLE))
    return bundle.scorer.features(sides["request"], sides["history"] | {"mask": mask}, items)


@dataclass(frozen=True)
class _Check:
    inputs: Inputs
    expected: np.ndarray


def _checks(scorer: Scorer, target: _Target, samples: Sequence[Features]) -> list[_Check]:
    """Pieces of the samples of several sizes, one request with one item and one event among them, and what the models
    give for them."""
    made = []
    for sample in samples:
        batch, items = next(iter(sample.item.values())).shape[:2]
        length = sample.history_mask.shape[1]
        sizes = [(batch, items, length), (1, items, min(length, 1)), (min(batch, 2), 1, length)]
        for size in sorted(set(sizes)):
            features = _piece(_with_rows(scorer, sample), *size)
            made.append(_Check(_rows(scorer, features, target.output), _expected(scorer, target, features)))
    return made


def _piece(features: Features, batch: int, items: int, length: int) -> Features:
    """The first requests and items, and the latest events."""
    first = features.history_mask.shape[1] - length
    return Features(
        {name: values[:batch] for name, values in features.request.items()},
        {name: values[:batch, first:] for name, values in features.history.items()},
        {name: values[:batch, :items] for name, values in features.item.items()},
        features.history_mask[:batch, first:],
    )


def _with_rows(scorer: Scorer, features: Features) -> Features:
    """Padding for ids that a compacted table has neither a row for nor one of unknown ids: no graph knows them."""
    ids, tables = next(iter(scorer.stores.values())).ids, scorer.schema.tables

    def kept(side: str, name: str, values: Tensor) -> Tensor:
        table = next(field.table for field in scorer.schema.side(side) if field.name == name)
        if table not in ids or tables[table].unknown is not None:
            return values
        return torch.where(torch.from_numpy(ids[table].contains(values.numpy())), values, tables[table].padding)

    sides = {side: {n: kept(side, n, v) for n, v in getattr(features, side).items()} for side in SIDES}
    return Features(**sides, history_mask=features.history_mask)


def _rows(scorer: Scorer, features: Features, output: str) -> Inputs:
    """A graph's inputs."""
    ids, tables = next(iter(scorer.stores.values())).ids, scorer.schema.tables
    inputs = Inputs()
    for side in _sides(output):
        for field in scorer.schema.side(side):
            values = getattr(features, side)[field.name]
            if (known := ids.get(field.table)) is not None:
                indices, unknown = values.numpy(), tables[field.table].unknown
                there = indices if unknown is None else np.where(known.contains(indices), indices, unknown)
                values = torch.from_numpy(known.rows(there))
            inputs[f"{side}.{field.name}"] = values.flatten(0, 1) if output == "items" else values.contiguous()
    return inputs if output == "items" else inputs | {_MASK: features.history_mask.contiguous()}


def _expected(scorer: Scorer, target: _Target, features: Features) -> np.ndarray:
    if target.output == "scores":
        return scorer.scores(target.stage, features)
    if target.output == "users":
        return scorer.user_vectors_of(features)
    return scorer.item_vectors({name: values.flatten(0, 1).numpy() for name, values in features.item.items()})


def _onnx_function(path: Path) -> Any:
    """Inputs -> the output of the graph by onnxruntime."""
    import onnxruntime
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    errors = tuple(kind for kind in vars(state).values() if isinstance(kind, type) and issubclass(kind, Exception))

    def run(inputs: Inputs) -> Tensor:
        try:
            return torch.from_numpy(session.run(None, {name: inputs[name].numpy() for name in names})[0])
        except errors as error:
            raise RuntimeError(f"onnxruntime: {error}") from error

    try:
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    except errors as error:
        raise RuntimeError(f"onnxruntime: {error}") from error
    names = [entry.name for entry in session.get_inputs()]
    return run


def _difference(target: _Target, name: str, checks: Sequence[_Check], function: Any) -> float:
    """The largest difference from the models, relative to the larger of 1 and the value. InputError above TOLERANCE."""
    largest = 0.0
    for check in checks:
        with _sentences(target), torch.no_grad():
            found = function(check.inputs).numpy()
        same = found.shape == check.expected.shape
        differences = np.abs(found - check.expected) / np.maximum(np.abs(check.expected), 1) if same else np.inf
        worst = float(np.max(differences, initial=0))
        if not worst <= TOLERANCE:  # NaN neither
            raise InputError(
                f"stage {target.stage}: {name} differs from the model by {worst:.2g} for requests of sizes "
                f"{tuple(found.shape)}, more than {TOLERANCE}; nothing is exported"
            )
        largest = max(largest, worst)
    return largest
