"""The models against slow, obvious re-statements of their formulas, and what they promise about shapes and seeds."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from deep_components.batch import HISTORY_FIELDS, ITEM_FIELDS, PADDING_INDEX, REQUEST_FIELDS, Features
from deep_components.cascade import THREE_STAGE, TWO_STAGE
from deep_components.kernels import load_kernels
from deep_components.models import DIN, DSSM, MLP, build_models, use_kernels
from deep_components.models.din import PADDING_LOGIT, attention_logits
from deep_components.tables.embedding import ID_FIELDS, TIME_ROWS, FieldEmbedding, initial_rows

VOCABULARY = dict.fromkeys(ID_FIELDS, 20)
DIM, UNITS = 4, 16


def random_features(batch: int, num_items: int, length: int, seed: int = 0) -> Features:
    generator = torch.Generator().manual_seed(seed)

    def ids(*shape: int, high: int = 8) -> Tensor:
        return torch.randint(1, high, shape, generator=generator)

    history_mask = torch.arange(length) >= length - torch.randint(0, length + 1, (batch, 1), generator=generator)
    return Features(
        **{field: ids(batch) for field in REQUEST_FIELDS},
        history=ids(batch, length, len(HISTORY_FIELDS)) * history_mask.unsqueeze(-1),
        history_mask=history_mask,
        items=ids(batch, num_items, len(ITEM_FIELDS)),
    )


def initialised(kind: type[DSSM] | type[MLP] | type[DIN], seed: int = 0) -> DSSM | MLP | DIN:
    torch.manual_seed(seed)
    model = kind(VOCABULARY, DIM, UNITS).double()
    model.embedding.initialise(seed, "stage")
    return model


def table(model: DSSM | MLP | DIN, field: str, index: Tensor) -> Tensor:
    return model.embedding.get_parameter(field)[index]


def sides(model: DSSM | MLP | DIN, features: Features, request: int, item: int) -> tuple[Tensor, Tensor, Tensor]:
    """User side [8d], history [L, 5d] and item [8d] of one (request, item), field by field."""
    user = torch.cat([table(model, field, getattr(features, field)[request]) for field in REQUEST_FIELDS])
    history = torch.cat(
        [table(model, field, features.history[request, :, place]) for place, field in enumerate(HISTORY_FIELDS)], dim=-1
    )
    one_item = torch.cat(
        [table(model, field, features.items[request, item, place]) for place, field in enumerate(ITEM_FIELDS)]
    )
    return user, history, one_item


@pytest.mark.parametrize("compiled", [False, True], ids=["pytorch", "compiled"])
@pytest.mark.parametrize("kind", [DSSM, MLP, DIN])
def test_scores_equal_the_formula_written_out(kind: type[DSSM] | type[MLP] | type[DIN], compiled: bool) -> None:
    model, features = initialised(kind), random_features(batch=3, num_items=5, length=6)
    use_kernels({"stage": model}, load_kernels(torch.float64) if compiled else None)
    scores = model(features)
    assert scores.shape == (3, 5)
    for request in range(3):
        for item in range(5):
            user, history, one_item = sides(model, features, request, item)
            events = max(int(features.history_mask[request].sum()), 1)
            mean = history.sum(dim=0) / events
            if isinstance(model, DSSM):
                expected = model.user_tower(torch.cat([user, mean])) @ model.item_tower(one_item)
            elif isinstance(model, MLP):
                expected = model.tower(torch.cat([user, mean, one_item])).squeeze()
            else:
                inputs = torch.cat([history, one_item[: 5 * DIM].expand(len(history), -1)], dim=-1)
                logits = model.attention(inputs).squeeze(-1)
                logits[~features.history_mask[request]] = PADDING_LOGIT
                interest = logits.softmax(dim=0) @ history
                expected = model.tower(torch.cat([user, interest, one_item])).squeeze()
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


def test_padding_positions_of_the_history_do_not_attract_attention() -> None:
    model, features = initialised(DIN), random_features(batch=4, num_items=3, length=6)
    assert isinstance(model, DIN)
    embedded = model.embedding(features)
    interest = model.interest(embedded.history, features.history_mask, embedded.items)
    changed = embedded.history.masked_fill(~features.history_mask.unsqueeze(-1), 123.0)
    has_history = features.history_mask.any(dim=-1)
    assert has_history.any()
    again = model.interest(changed, features.history_mask, embedded.items)
    torch.testing.assert_close(interest[has_history], again[has_history])


def test_padding_rows_are_zero_and_stay_without_gradient() -> None:
    model = initialised(DSSM)
    features = random_features(batch=2, num_items=3, length=4)
    items = features.items.clone()
    items[:, 0] = 0
    items[:, 0, ITEM_FIELDS.index("category_one")] = PADDING_INDEX["category_one"]
    padded = Features(**(vars(features) | {"items": items}))
    model(padded).sum().backward()
    for field in model.embedding.rows:
        parameter, padding = model.embedding.get_parameter(field), PADDING_INDEX.get(field, 0)
        assert parameter.grad is not None
        assert not parameter[padding].any() and not parameter.grad[padding].any(), field


def test_history_padding_looks_up_row_0_of_category_one_which_is_trained() -> None:
    model = initialised(DSSM)
    features = random_features(batch=2, num_items=3, length=4)
    blank = Features(
        **(vars(features) | {"history": features.history * 0, "history_mask": torch.zeros(2, 4, dtype=torch.bool)})
    )
    model(blank).sum().backward()
    gradient = model.embedding.get_parameter("category_one").grad
    assert gradient is not None and gradient[0].any()


def test_tables_have_the_rows_of_the_specification() -> None:
    embedding = FieldEmbedding(VOCABULARY, DIM)
    assert {name: tuple(parameter.shape) for name, parameter in embedding.named_parameters()} == {
        **dict.fromkeys(ID_FIELDS, (22, DIM)),
        **{field: (rows, DIM) for field, rows in TIME_ROWS.items()},
    }


def test_initial_rows_are_standard_normal_and_depend_on_their_key_alone() -> None:
    ids = np.arange(20_000)
    rows = initial_rows(30, "rank.video", ids, 8)
    # 160,000 numbers: the mean's standard error is 0.0025, the standard deviation's 0.0018.
    assert abs(rows.mean().item()) < 0.0125 and abs(rows.std().item() - 1) < 0.009
    assert abs(((rows.abs() < 1).double().mean().item()) - math.erf(math.sqrt(0.5))) < 0.006
    assert abs(torch.corrcoef(rows.T).fill_diagonal_(0)).max() < 0.035
    picked = np.array([19_999, 3, 77])
    torch.testing.assert_close(initial_rows(30, "rank.video", picked, 8), rows[picked], rtol=0, atol=0)
    for other in (initial_rows(31, "rank.video", ids, 8), initial_rows(30, "rank.author", ids, 8)):
        assert abs((other * rows).mean().item()) < 0.0125


def test_building_models_is_a_function_of_the_seed_and_leaves_the_generator_alone() -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = build_models(TWO_STAGE, VOCABULARY, DIM, UNITS, seed=30)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    again = build_models(THREE_STAGE, VOCABULARY, DIM, UNITS, seed=30)
    other = build_models(TWO_STAGE, VOCABULARY, DIM, UNITS, seed=31)
    assert list(again) == ["retrieval", "prerank", "rank"]
    for stage, model in first.items():
        assert_same_parameters(model, again[stage], same=True)
        assert_same_parameters(model, other[stage], same=False)


def assert_same_parameters(one: nn.Module, other: nn.Module, same: bool) -> None:
    for (name, left), (_, right) in zip(one.named_parameters(), other.named_parameters(), strict=True):
        assert torch.equal(left, right) == same, name


def test_stages_start_from_different_values() -> None:
    models = build_models(THREE_STAGE, VOCABULARY, DIM, UNITS, seed=30)
    videos = [model.get_parameter("embedding.video") for model in models.values()]
    assert not torch.equal(videos[0], videos[1]) and not torch.equal(videos[1], videos[2])


@pytest.mark.parametrize("kind", [DSSM, MLP, DIN])
def test_a_model_scores_requests_and_items_independently(kind: type[DSSM] | type[MLP] | type[DIN]) -> None:
    model, features = initialised(kind), random_features(batch=4, num_items=6, length=5)
    scores = model(features)
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    shuffled = Features(**(vars(features) | {"items": features.items[:, order]}))
    torch.testing.assert_close(model(shuffled), scores[:, order])
    half = Features(**{name: value[2:] for name, value in vars(features).items()})
    torch.testing.assert_close(model(half), scores[2:])
