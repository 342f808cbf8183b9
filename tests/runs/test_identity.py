"""What makes a run another one, and what only continues it."""

from typing import Any

import pytest

from deep_components.runs.identity import Difference, fingerprint, first_difference, method_arguments, run_arguments

ARGUMENTS = {"seed": 30, "epochs": 1, "lr": 0.01, "emb_dim": 8, "loss_type": "lcron", "tau": None, "compact_from": 9}
CONFIG: dict[str, Any] = {"setting": "two_stage", "data": "simulated", "cascade": {"stages": []}}
CONFIG |= {"schema_checksum": "abc", "data_checksums": {"1": "x", "2": "y"}, "train_days": ["1", "2"]}
CONFIG |= {"loss": {"tau": 50}, "arguments": ARGUMENTS, "init_from_checksums": {"retrieval": "r", "rank": "s"}}
CONFIG |= {"code": {"total": "t", "files": {"a.py": "1", "b.py": "2"}, "method": {"loss.py": "5"}}}


def changed(**arguments: Any) -> dict[str, Any]:
    return CONFIG | {"arguments": ARGUMENTS | arguments}


def test_the_same_run() -> None:
    assert first_difference(CONFIG, CONFIG) is None
    for name in ("device", "cache_dir", "print_freq", "compile", "resume", "on_nonfinite", "train_days"):
        assert first_difference(CONFIG, changed(**{name: "other"})) is None


@pytest.mark.parametrize("name", ["lr", "seed", "emb_dim", "tau", "compact_from", "loss_type", "margin"])
def test_another_argument(name: str) -> None:
    """Also one that the found run does not know, or the wanted one."""
    found = first_difference(CONFIG, changed(**{name: 77}))
    assert found == Difference(name, ARGUMENTS.get(name), 77)
    assert str(found) == f"{name}={ARGUMENTS.get(name)}, not 77"
    assert first_difference(changed(**{name: 77}), CONFIG) == Difference(name, 77, ARGUMENTS.get(name))


def test_other_data_and_another_cascade() -> None:
    assert str(first_difference(CONFIG, CONFIG | {"setting": "mine"})) == "setting=two_stage, not mine"
    assert str(first_difference(CONFIG, CONFIG | {"data": "recflow"})) == "data=simulated, not recflow"
    assert str(first_difference(CONFIG, CONFIG | {"cascade": {}})) == "another cascade"
    assert str(first_difference(CONFIG, CONFIG | {"schema_checksum": "d"})) == "another schema"
    assert str(first_difference(CONFIG, CONFIG | {"loss": {"tau": 20}})) == "another loss"
    assert str(first_difference(CONFIG, CONFIG | {"data_checksums": {"2": "z", "3": "a"}})) == "another day 2"
    assert str(first_difference(CONFIG, CONFIG | {"train_days": ["2"]})) == "train_days=1,2, not 2"


def test_what_an_earlier_version_did_not_write() -> None:
    optional = ("cascade", "schema_checksum", "loss", "init_from_checksums", "code")
    old = {name: value for name, value in CONFIG.items() if name not in optional}
    assert first_difference(old, CONFIG) is None


def test_other_code() -> None:
    """Files have changed, or are gone, or are new."""
    files, method = {"a.py": "1", "b.py": "3", "c.py": "5"}, {"loss.py": "6"}
    wanted = CONFIG | {"code": {"total": "u", "files": files, "method": method}}
    found = first_difference(CONFIG, wanted)
    assert found is not None and found.is_code
    assert str(found) == "other code: b.py, c.py, loss.py"
    assert first_difference(CONFIG, wanted, any_code=True) is None
    assert str(first_difference(CONFIG, wanted | {"train_days": ["2"]})) == "train_days=1,2, not 2"  # that says more
    untrained = changed(epochs=0)
    assert str(first_difference(untrained, untrained | {"code": wanted["code"]})) == "other code: b.py, c.py"


def test_other_models_to_start_from() -> None:
    wanted = CONFIG | {"init_from_checksums": {"retrieval": "r", "rank": "other"}}
    for run in (wanted, wanted | {"arguments": ARGUMENTS | {"epochs": 0}}):
        before = run | {"init_from_checksums": CONFIG["init_from_checksums"]}
        assert str(first_difference(before, run)) == "other models in --init_from: rank"


def test_more_days() -> None:
    more = CONFIG | {"train_days": ["1", "2", "3"]}
    assert first_difference(CONFIG, more) is not None
    assert first_difference(CONFIG, more, more_days=True) is None
    for days in (["1"], ["2", "1"], ["1", "3", "2"]):
        assert first_difference(CONFIG, CONFIG | {"train_days": days}, more_days=True) is not None
    two = changed(epochs=2)
    assert first_difference(two, two | {"train_days": ["1", "2", "3"]}, more_days=True) is not None


def test_more_epochs() -> None:
    assert first_difference(CONFIG, changed(epochs=2)) == Difference("epochs", 1, 2)
    assert first_difference(CONFIG, changed(epochs=2), more_epochs=True) is None
    assert first_difference(changed(epochs=2), CONFIG, more_epochs=True) == Difference("epochs", 2, 1)


def test_an_untrained_cascade_depends_on_little() -> None:
    untrained = changed(epochs=0)
    other = changed(epochs=0, lr=0.5, tau=20, loss_type="bce") | {"train_days": [], "loss": {}}
    assert first_difference(untrained, other) is None
    assert first_difference(untrained, changed(epochs=0, emb_dim=4)) == Difference("emb_dim", 8, 4)
    assert first_difference(untrained, CONFIG) == Difference("epochs", 0, 1)


def test_the_runs_of_a_method() -> None:
    seeds = [method_arguments(ARGUMENTS | {"seed": seed, "device": "cpu"}) for seed in (30, 31)]
    assert seeds[0] == seeds[1] == {"epochs": 1, "lr": 0.01, "emb_dim": 8, "tau": None}
    assert method_arguments(ARGUMENTS | {"epochs": 0, "lr": 3}) == method_arguments(ARGUMENTS | {"epochs": 0})
    assert run_arguments(ARGUMENTS).keys() == ARGUMENTS.keys()


def test_the_fingerprint_of_a_run_s_files() -> None:
    """The same as long as the training may go on, another where it may not."""
    own = fingerprint(CONFIG)
    longer = {"train_days": ["1", "2", "3"], "data_checksums": {"1": "x", "2": "y", "3": "z"}, "code": None}
    assert fingerprint(changed(epochs=5, device="cuda", on_nonfinite="skip") | longer) == own
    for other in (changed(seed=31), changed(lr=0.5), CONFIG | {"data_checksums": {"1": "z"}}, CONFIG | {"loss": {}}):
        assert fingerprint(other) != own
    assert [fingerprint({}), fingerprint({"setting": None, "train_days": []})] == [{}, {}]
