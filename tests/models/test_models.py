"""The models against slow, obvious re-statements of their formulas, and what they promise about shapes and seeds."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deep_components.batch import EmbeddedFeatures
from deep_components.cascade import THREE_STAGE, TWO_STAGE, Cascade, Stage
from deep_components.errors import InputError
from deep_components.kernels import load_kernels
from deep_components.models import MODELS, build_models, din
from deep_components.models.din import DIN, PADDING_LOGIT, attention_logits
from deep_components.models.dssm import DSSM
from deep_components.models.mlp import MLP
from deep_components.schema import Schema
from tests.schemas import RECFLOW, SCHEMAS

DIM, UNITS = 4, 16
every_schema = pytest.mark.parametrize("schema", SCHEMAS.values(), ids=list(SCHEMAS))
every_model = pytest.mark.parametrize("kind", MODELS.values(), ids=list(MODELS))


def embedded(schema: Schema, batch: int = 3, num_items: int = 5, length: int = 6) -> EmbeddedFeatures:
    """Random embeddings; histories of 0 to ``length`` events, the padding positions too hold numbers."""
    generator = torch.Generator().manual_seed(0)

    def normal(side: str, *shape: int) -> Tensor:
        return torch.randn(*shape, schema.width(side, DIM), generator=generator, dtype=torch.float64)

    events = torch.tensor([[length], [length // 2], [0]]).repeat(batch, 1)[:batch]
    return EmbeddedFeatures(
        normal("request", batch),
        normal("history", batch, length),
        normal("item", batch, num_items),
        torch.arange(length) >= length - events,
    )


def made(kind: Callable[[Schema, int, int], nn.Module], schema: Schema) -> Any:
    torch.manual_seed(0)
    return kind(schema, DIM, UNITS).double()


def written_out(model: nn.Module, schema: Schema, features: EmbeddedFeatures, request: int, item: int) -> Tensor:
    """The formula of the model's docstring, for one request and item."""
    mask, history = features.history_mask[request], features.history[request]
    user, one_item = features.request[request], features.item[request, item]
    mean = history.sum(dim=0) / max(int(mask.sum()), 1)
    if isinstance(model, DSSM):
        score: Tensor = model.user_tower(torch.cat([user, mean])) @ model.item_tower(one_item)
        return score
    if isinstance(model, MLP):
        return model.tower(torch.cat([user, mean, one_item])).squeeze()
    assert isinstance(model, DIN)
    columns = schema.slices("item", DIM)
    matched = torch.cat([one_item[columns[f.name]] for f in schema.side("history") if f.name in columns])
    logits = model.attention(torch.cat([history, matched.expand(len(history), -1)], dim=-1)).squeeze(-1)
    interest = logits.masked_fill(~mask, PADDING_LOGIT).softmax(dim=0) @ history
    return model.tower(torch.cat([user, interest, one_item])).squeeze()


@every_schema
@every_model
@pytest.mark.parametrize("compiled", [False, True], ids=["pytorch", "compiled"])
def test_scores_equal_the_formula_written_out(
    kind: Callable[[Schema, int, int], nn.Module], schema: Schema, compiled: bool
) -> None:
    model, features = made(kind, schema), embedded(schema)
    model.kernels = load_kernels(torch.float64) if compiled else None
    scores = model(features)
    assert scores.shape == (3, 5)
    for request in range(3):
        for item in range(5):
            expected = written_out(model, schema, features, request, item)
            torch.testing.assert_close(scores[request, item], expected)


@pytest.mark.parametrize("chunk", [1, 1000, 1 << 20])
def test_attention_logits_have_the_gradients_of_the_plain_form(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deep_components.models.din._CHUNK_NUMBERS", {"cpu": chunk})
    torch.manual_seed(0)
    parts = [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((5, 4, 7), (5, 3, 7), (7,))]
    history_part, item_part, weight = parts
    plain = (history_part.unsqueeze(1) + item_part.unsqueeze(2)).relu() @ weight
    torch.testing.assert_close(attention_logits(*parts), plain)
    upstream = torch.randn_like(plain)
    expected = torch.autograd.grad(plain, parts, upstream)
    torch.testing.assert_close(torch.autograd.grad(attention_logits(*parts), parts, upstream), expected)


@pytest.mark.parametrize("compiled", [False, True])
def test_long_lists_in_blocks_have_the_same_scores_and_gradients_and_keep_little(
    compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, features = made(DIN, RECFLOW), embedded(RECFLOW, batch=5)
    model.kernels = load_kernels(torch.float64) if compiled else None
    leaves = {name: values for name, values in vars(features).items() if name != "history_mask"}
    inputs = [*(values.requires_grad_() for values in leaves.values()), *model.parameters()]

    def step() -> tuple[list[Tensor], int]:
        sizes = list[int]()

        def pack(tensor: Tensor) -> Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            scores = model(features)
        return [scores.detach(), *torch.autograd.grad((scores * torch.arange(5.0)).sum(), inputs)], max(sizes)

    whole, most = step()
    monkeypatch.setattr(din, "MOST_ITEMS", 24)
    monkeypatch.setattr(din, "ITEMS_PER_BLOCK", 11)  # two of five requests of five items
    blocks, kept = step()
    torch.testing.assert_close(blocks, whole, rtol=1e-10, atol=1e-12)
    assert kept <= features.item.numel() < most


@every_schema
def test_padding_positions_of_the_history_do_not_attract_attention(schema: Schema) -> None:
    model, features = made(DIN, schema), embedded(schema)
    changed = features.history.masked_fill(~features.history_mask.unsqueeze(-1), 123.0)
    with_history = features.history_mask.any(dim=-1)
    interest, again = (model.interest(h, features.history_mask, features.item) for h in (features.history, changed))
    torch.testing.assert_close(interest[with_history], again[with_history])


def test_the_towers_have_the_widths_of_the_specification() -> None:
    """13d = 8d + 5d, 8d, 21d = 8d + 5d + 8d and 10d = 5d + 5d for RecFlow."""
    models = build_models(THREE_STAGE, RECFLOW, emb_dim=8, nn_units=128, seed=0)
    widths = {name: tuple(p.shape)[::-1] for m in models.values() for name, p in m.named_parameters() if p.ndim == 2}
    assert widths["user_tower.0.weight"] == (13 * 8, 128) and widths["item_tower.0.weight"] == (8 * 8, 128)
    assert widths["tower.0.weight"] == (21 * 8, 128) and widths["attention.0.weight"] == (10 * 8, 80)


def test_building_models_is_a_function_of_the_seed_and_leaves_the_generator_alone() -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = build_models(TWO_STAGE, RECFLOW, DIM, UNITS, seed=30)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    again = build_models(THREE_STAGE, RECFLOW, DIM, UNITS, seed=30)
    other = build_models(TWO_STAGE, RECFLOW, DIM, UNITS, seed=31)
    assert list(again) == ["retrieval", "prerank", "rank"]
    for stage, model in first.items():
        for one, same, different in zip(
            model.parameters(), again[stage].parameters(), other[stage].parameters(), strict=True
        ):
            assert torch.equal(one, same) and not torch.equal(one, different)


def test_a_model_that_does_not_exist() -> None:
    stages = (Stage("retrieval", 3, "dsm"), Stage("rank", 2, "din"))
    cascade = Cascade(stages=stages, groups=TWO_STAGE.groups)
    with pytest.raises(InputError, match=r"stage retrieval: model 'dsm' is none of dssm, mlp, din"):
        build_models(cascade, RECFLOW, DIM, UNITS, seed=0)


def test_a_stage_has_a_width_of_its_own() -> None:
    narrow = replace(TWO_STAGE, stages=(replace(TWO_STAGE.stages[0], nn_units=8), TWO_STAGE.stages[1]))
    models, usual = (build_models(cascade, RECFLOW, DIM, UNITS, seed=0) for cascade in (narrow, TWO_STAGE))
    shapes = {name: values.shape for name, values in DSSM(RECFLOW, DIM, 8).state_dict().items()}
    assert {name: values.shape for name, values in models["retrieval"].state_dict().items()} == shapes
    assert all(map(torch.equal, models["rank"].parameters(), usual["rank"].parameters()))


@every_schema
@every_model
def test_a_model_scores_requests_and_items_independently(
    kind: Callable[[Schema, int, int], nn.Module], schema: Schema
) -> None:
    model, features = made(kind, schema), embedded(schema)
    scores = model(features)
    order = torch.tensor([3, 1, 0, 2, 4])
    torch.testing.assert_close(model(replace(features, item=features.item[:, order])), scores[:, order])
    half = EmbeddedFeatures(**{name: value[1:] for name, value in vars(features).items()})
    torch.testing.assert_close(model(half), scores[1:])
