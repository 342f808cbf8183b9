"""Plans: the methods of a command line, batch sizes, the days of each protocol, what makes a run another one."""

from pathlib import Path

import pytest

from deep_components.errors import InputError
from deep_components.experiments.plan import (
    Method,
    Part,
    divide_batch,
    identity,
    methods_of,
    parse_training,
    schedule,
    untrained_name,
)
from tests.helpers import DAYS


def test_methods_of_a_command_line() -> None:
    argv = ["--method=lcron", "--loss_type=lcron", "--tau", "50", "--method=bce", "--loss_type=bce"]
    assert methods_of(argv) == [
        Method("lcron", ("--loss_type=lcron", "--tau", "50")), Method("bce", ("--loss_type=bce",))
    ]  # fmt: skip


@pytest.mark.parametrize(("batch_size", "divided"), [("1024", 128), ("512", 64), ("2048", 256), ("4", 1)])
def test_divided_batch_sizes(batch_size: str, divided: int) -> None:
    words = divide_batch(["--lr=0.01", f"--batch_size={batch_size}"], 8)
    assert parse_training(words, "")["batch_size"] == divided
    assert parse_training([*words, "--batch_size=7"], "")["batch_size"] == 7
    assert divide_batch(["--lr=0.01"], 1) == ["--lr=0.01"]


def test_arguments_that_only_a_methods_command_knows() -> None:
    assert parse_training(["--margin", "3", "--lr=0.5"], "")["others"] == ["--margin", "3"]


def test_what_makes_a_run_another_one() -> None:
    def of(*words: str) -> dict[str, object]:
        return identity(parse_training(words, ""), streaming=False)

    assert of("--device=cpu", "--cache_dir=C", "--print_freq=3") == of()
    assert of("--on_nonfinite=skip", "--no-compile") == of()
    assert of("--compact_from=9") != of()  # a training does not go on with tables of other rows
    for word in ("--lr=0.5", "--seed=31", "--tau=2", "--init_from=R", "--no-shuffle", "--mine=1", "--optimizer=adam"):
        assert of(word) != of()
    assert of("--epochs=0", "--tau=2", "--lr=1", "--batch_size=2") == of("--epochs=0")
    assert of("--epochs=0", "--emb_dim=4") != of("--epochs=0")


def test_the_folder_of_an_untrained_cascade() -> None:
    assert untrained_name(parse_training(["--lr=0.5", "--loss_type=icc", "--seed=7"], "")) == "untrained"
    assert untrained_name(parse_training(["--emb_dim=4", "--seq_len=5"], "")) == "untrained_emb_dim4_seq_len5"
    assert "/" not in untrained_name(parse_training(["--init_from=a/b"], ""))


# ---- days ------------------------------------------------------------------------------------------------------------


def test_the_main_protocol(log: Path) -> None:
    assert schedule(log, None, None) == (Part(DAYS[:2], DAYS[2]),)
    assert schedule(log, [DAYS[1]], DAYS[0]) == (Part((DAYS[1],), DAYS[0]),)


def test_the_validation_day_is_the_last_training_day(log: Path) -> None:
    assert schedule(log, None, None, validation=True) == (Part(DAYS[:1], DAYS[1]),)
    with pytest.raises(InputError, match="--validation tests on the last training day"):
        schedule(log, None, DAYS[2], validation=True)
    with pytest.raises(InputError, match="two training days or more"):
        schedule(log, [DAYS[0]], None, validation=True)


def test_validation_on_recflow(tmp_path: Path) -> None:
    """Train .. 2024-02-02, validate 2024-02-03: only names of files count here."""
    for offset in range(23):
        day = f"2024-01-{13 + offset:02}" if offset < 19 else f"2024-02-{offset - 18:02}"
        for folder, ending in (("all_stage", "feather"), ("request_id_dict", "pkl"), ("seq_effective_50_dict", "pkl")):
            (tmp_path / folder).mkdir(exist_ok=True)
            (tmp_path / folder / f"{day}.{ending}").touch()
    (part,) = schedule(tmp_path, None, None, validation=True)
    assert (part.train_days[0], part.train_days[-1], part.test_day) == ("2024-01-13", "2024-02-02", "2024-02-03")
    assert len(schedule(tmp_path, None, None, streaming=True)) == 22


def test_a_stream_tests_every_day_from_the_second(log: Path) -> None:
    assert schedule(log, None, None, streaming=True) == (Part(DAYS[:1], DAYS[1]), Part(DAYS[:2], DAYS[2]))
    assert schedule(log, None, None, validation=True, streaming=True) == (Part(DAYS[:1], DAYS[1]),)
    with pytest.raises(InputError, match="is a training day"):
        schedule(log, None, DAYS[0], streaming=True)
