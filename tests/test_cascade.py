"""Cascades: the paper's numbers, TOML files of one's own, and what is refused."""

from pathlib import Path

import pytest

from deep_components.cascade import SETTINGS, THREE_STAGE, TWO_STAGE, Cascade
from deep_components.errors import InputError

FOUR = """
name = "four"
num_relevant = 5
stages = [
    {name = "recall", keep = 30, model = "dssm"},
    {name = "coarse", keep = 20, model = "mlp"},
    {name = "fine", keep = 10, model = "mlp", exposed_groups = 2},
    {name = "final", keep = 4, model = "din", exposed_groups = 1},
]
groups = [
    {name = "bought", size = 5, index_field = "order"},
    {name = "clicked", size = 15, position = 10},
    {name = "shown", size = 20, position = 20},
]
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "mine.toml"
    path.write_text(text)
    return path


def test_the_papers_settings() -> None:
    assert (TWO_STAGE.num_items, THREE_STAGE.num_items) == (40, 50)
    assert TWO_STAGE.quotas == {"retrieval": 30, "rank": 20}
    assert THREE_STAGE.quotas == {"retrieval": 40, "prerank": 30, "rank": 20}
    assert TWO_STAGE.icc_cuts == {"retrieval": 30, "rank": 30}
    assert THREE_STAGE.icc_cuts == {"retrieval": 40, "prerank": 30, "rank": 30}
    assert THREE_STAGE.exposed_groups == {"retrieval": 5, "prerank": 4, "rank": 2}
    assert [group.label() for group in THREE_STAGE.groups[1:]] == [8, 7, 6, 5]
    assert TWO_STAGE.group_of_item.tolist() == [0] * 10 + [1] * 10 + [2] * 10 + [3] * 10


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    cascade = Cascade.from_toml(write(tmp_path, FOUR))
    assert cascade.stage_names == ("recall", "coarse", "fine", "final")
    assert (cascade.name, cascade.num_items, cascade.num_relevant) == ("four", 40, 5)
    assert cascade.group_of_item.tolist() == [0] * 5 + [1] * 15 + [2] * 20
    assert cascade.stages[3].model == "din"


def test_without_a_name_it_has_the_files(tmp_path: Path) -> None:
    assert Cascade.from_toml(write(tmp_path, FOUR.replace('name = "four"', ""))).name == "mine"


@pytest.mark.parametrize("cascade", SETTINGS.values(), ids=list(SETTINGS))
def test_json_and_back(cascade: Cascade) -> None:
    assert Cascade.from_json(cascade.to_json(), "config.json") == cascade


def test_widths(tmp_path: Path) -> None:
    """A width that is not given is not written, so that runs of earlier versions are the same."""
    text = FOUR.replace('model = "dssm"', 'model = "dssm", nn_units = 64').replace('"din"', '"a.b:C", nn_units = 3')
    cascade = Cascade.from_toml(write(tmp_path, text))
    assert [stage.nn_units for stage in cascade.stages] == [64, None, None, 3]
    assert Cascade.from_json(cascade.to_json(), "config.json") == cascade
    assert ["nn_units" in stage for stage in cascade.to_json()["stages"]] == [True, False, False, True]


@pytest.mark.parametrize(
    ("before", "after", "sentence"),
    [
        ("keep = 30", "keep = 50", "recall keeps 50; it is reached by 40 items"),
        ("keep = 10", "keep = 21", "fine keeps 21; it is reached by 20 items"),
        ("keep = 30", 'keep = "30"', "keep of a stage is '30', not a whole number"),
        ("keep = 30", "keep = true", "not a whole number"),
        ("keep = 30", "kep = 30", "a stage has the key 'kep'; it takes name, keep, model"),
        (', model = "dssm"', "", "a stage has no model"),
        ('name = "coarse"', 'name = "recall"', "two of its stages have the same name"),
        ('name = "coarse"', 'name = "../coarse"', "lower-case letters"),
        *[
            ('name = "coarse"', f'name = "{name}"', "not reserved")
            for name in ("loss", "group", "data", "step", "day", "seconds", "skipped")
        ],
        ("exposed_groups = 2", "exposed_groups = 4", "exposed_groups is 1 to 3"),
        ('model = "mlp"', 'model = "mlp", nn_units = 6', "stage coarse: nn_units is a multiple of 4"),
        ('model = "mlp"', 'model = "mlp", nn_units = 0', "stage coarse: nn_units is a multiple of 4"),
        ('model = "mlp"', 'model = "a:B", nn_units = 0', "stage coarse: nn_units is 1 or more"),
        ('model = "mlp"', 'model = "mlp", nn_units = 8.0', "nn_units of a stage is 8.0, not a whole number"),
        ("size = 15", "size = 0", "size is 1 or more"),
        ("position = 10", 'position = 10, index_field = "x"', "give one of them"),
        ("num_relevant = 5", "num_relevant = 0", "num_relevant is 1 or more"),
        ("stages = [", "stages = 3\nx = [", "has the key 'x'"),
        ("num_relevant", "[num_relevant", "not a TOML file"),
    ],
)
def test_what_is_wrong_is_a_sentence(tmp_path: Path, before: str, after: str, sentence: str) -> None:
    path = write(tmp_path, FOUR.replace(before, after, 1))
    with pytest.raises(InputError) as error:
        Cascade.from_toml(path)
    assert sentence in str(error.value) and str(error.value).startswith(str(path))


def test_a_cascade_has_two_to_four_stages(tmp_path: Path) -> None:
    one = "stages = [{name = 'a', keep = 3, model = 'dssm'}]\ngroups = [{name = 'x'}, {name = 'y'}]"
    with pytest.raises(InputError, match="2 to 4 stages, not 1"):
        Cascade.from_toml(write(tmp_path, one))
    with pytest.raises(InputError, match="cannot be read"):
        Cascade.from_toml(tmp_path / "absent.toml")


def test_groups_without_sizes(tmp_path: Path) -> None:
    """N is the log's, so that any quota may be; in RecFlow's layout such a group has ten items."""
    text = FOUR.replace("size = 15, ", "").replace("keep = 30", "keep = 500")
    cascade = Cascade.from_toml(write(tmp_path, text))
    assert not cascade.has_sizes and cascade.quotas["recall"] == 500
    assert [group.slots for group in cascade.groups] == [5, 10, 20] and cascade.num_items == 35
    assert Cascade.from_json(cascade.to_json(), "config.json") == cascade
    assert TWO_STAGE.has_sizes and all(group["size"] == 10 for group in TWO_STAGE.to_json()["groups"])
    with pytest.raises(InputError, match="recall keeps 0; it is reached by all items, so 1 or more"):
        Cascade.from_toml(write(tmp_path, text.replace("keep = 500", "keep = 0")))
    with pytest.raises(InputError, match="coarse keeps 20; it is reached by 19 items, so 1 to 19"):
        Cascade.from_toml(write(tmp_path, text.replace("keep = 500", "keep = 19")))
