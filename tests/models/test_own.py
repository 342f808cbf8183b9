"""Models of one's own: classes that a cascade names by module."""

from pathlib import Path

import pytest
import torch

from deep_components.cascade import TWO_STAGE, Cascade, Stage
from deep_components.errors import InputError
from deep_components.models import build_models, check_models
from tests.models.own_models import Bilinear
from tests.schemas import RECFLOW

OWN = "tests.models.own_models"


def cascade_with(model: str) -> Cascade:
    return Cascade(stages=(Stage("recall", 3, "dssm"), Stage("rank", 2, model, nn_units=5)), groups=TWO_STAGE.groups)


def test_a_class_anywhere_on_the_import_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its parameters depend on (seed, stage) alone; asking for its shape leaves it, and the generator, as they were."""
    (tmp_path / "shop_models.py").write_text("from tests.models.own_models import Bilinear\n")
    monkeypatch.syspath_prepend(tmp_path)
    before = torch.random.get_rng_state()
    model, again = (build_models(cascade_with("shop_models:Bilinear"), RECFLOW, 4, 16, seed=3)["rank"] for _ in "ab")
    assert torch.equal(torch.random.get_rng_state(), before)
    assert isinstance(model, Bilinear) and model.training
    assert model.norm.num_batches_tracked == 0 and not model.norm.state_dict()["running_mean"].any()
    assert model.item.out_features == 5  # the stage's width, of which no multiple is asked
    assert all(map(torch.equal, model.parameters(), again.parameters()))


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        ("dsm", 'is none of dssm, mlp, din; one of your own is named "my_package'),
        (
            "shop_models_nowhere:Mine",
            r"cannot be imported \(No module named 'shop_models_nowhere'\); install .*PYTHONPATH",
        ),
        (f"{OWN}.more:Mine", "cannot be imported .*is not a package"),
        (f"{OWN}:Absent", "there is no Absent in tests.models.own_models"),
        (f"{OWN}:nothing", "nothing is no subclass of torch.nn.Module"),
        (f"{OWN}:function", "function is no subclass of torch.nn.Module"),
        (f"{OWN}:", "write it as"),
        (":Mine", "write it as"),
        (".own_models:Mine", "write it as"),
        ("../own_models.py:Mine", "write it as"),
        (f"{OWN}:Bilinear.forward", "write it as"),
    ],
)
def test_what_is_no_model(model: str, sentence: str) -> None:
    with pytest.raises(InputError, match=f"^mine.toml: stage rank: model '{model}'.*{sentence}"):
        check_models(cascade_with(model), "mine.toml")


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("OtherArguments", r"cannot be called with \(schema, emb_dim, nn_units\): too many positional arguments"),
        ("NoConstructor", "has no __init__ of its own; see docs/cascades.md"),
        ("NoForward", "has no forward of its own; see docs/cascades.md"),
        ("OneScoreTooMuch", r"two requests of three items get scores of shape \(2, 3, 1\); forward gives \[B, N\]"),
        ("TwoOutputs", "get scores of shape None"),
        ("NamedAsTables", "parameter embedding.weight: tables have names that begin so"),
    ],
)
def test_another_interface(name: str, sentence: str) -> None:
    with pytest.raises(InputError, match=f"^stage rank: model '{OWN}:{name}'.*{sentence}"):
        build_models(cascade_with(f"{OWN}:{name}"), RECFLOW, 4, 16, seed=0)


def test_the_word_unknown_stays_a_sentence() -> None:
    with pytest.raises(InputError, match=r"^cascade custom: stage rank: model 'dsm'"):
        build_models(cascade_with("dsm"), RECFLOW, 4, 16, seed=0)
