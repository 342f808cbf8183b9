"""The simulated log: RecFlow's layout, honest histories, repeatable bytes, and something to learn."""

import dataclasses
import json
import pickle
import subprocess
import sys
import tracemalloc
from datetime import datetime
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import numpy as np
import pyarrow.feather
import pytest

from deep_components.cascade import THREE_STAGE, TWO_STAGE
from deep_components.cli import run_command
from deep_components.dataset import simulate
from deep_components.dataset.importers import recflow_files as recflow
from deep_components.dataset.importers.recflow_files import (
    GROUP_NAMES,
    HISTORY_COLUMNS,
    HISTORY_LENGTH,
    ID_COUNT_FIELDS,
    ITEM_COLUMNS,
    REQUEST_COLUMNS,
)
from deep_components.dataset.simulate import SimulationSettings, Stream, parse_days
from deep_components.errors import InputError

DAYS = ("2024-01-13", "2024-01-14", "2024-02-04")
SETTINGS = SimulationSettings(days=DAYS, requests_per_day=500, users=90, videos=600, authors=60, seed=3)
LOGGED = 50  # distinct videos of a request: 20 re-ranked, and 10 from each of three stages that drop some
VIDEO, EFFECTIVE_VIEW = ITEM_COLUMNS.index("video_id"), ITEM_COLUMNS.index("effective_view")


@dataclasses.dataclass(frozen=True)
class Day:
    """A day read back from its files; requests in file order."""

    requests: dict[str, np.ndarray]  # REQUEST_COLUMNS, [R]
    rows: dict[str, np.ndarray]  # the feather file's columns, [R, LOGGED]
    groups: dict[str, np.ndarray]  # [R, 10, 8]
    history: np.ndarray  # [R, 50, 10]


def read_pickle(path: Path) -> Any:
    with path.open("rb") as file:
        return pickle.load(file)


def read_day(root: Path, day: str) -> Day:
    table = pyarrow.feather.read_table(recflow.feather_path(root, day))
    rows = {name: table[name].to_numpy().reshape(-1, LOGGED) for name in table.column_names}
    assert all((rows[name] == rows[name][:, :1]).all() for name in REQUEST_COLUMNS)
    requests = {name: rows[name][:, 0] for name in REQUEST_COLUMNS}
    groups, history = read_pickle(recflow.request_path(root, day)), read_pickle(recflow.history_path(root, day))
    ids = requests["request_id"].tolist()
    assert list(groups) == list(history) == ids
    stacked = {name: np.stack([groups[request][name] for request in ids]) for name in GROUP_NAMES}
    return Day(requests, rows, stacked, np.stack([history[request] for request in ids]))


def together(log: list[Day], field: str) -> np.ndarray:
    """A column of the feather files of all days: [all rows]."""
    return np.concatenate([day.rows[field].ravel() for day in log])


def count_distinct(*columns: np.ndarray) -> int:
    """How many different rows the columns have."""
    return len(np.unique(np.stack(columns, axis=1), axis=0))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("simulated")
    simulate.simulate(folder, SETTINGS)
    return folder


@pytest.fixture(scope="module")
def log(root: Path) -> list[Day]:
    return [read_day(root, day) for day in DAYS]


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


# ---------------------------------------------------------------------------------------------- layout


def test_the_folder_holds_the_days_the_id_counts_and_the_arguments(root: Path) -> None:
    per_day = {path for day in DAYS for path in recflow.day_paths(root, day)}
    expected = per_day | {recflow.id_count_path(root), root / recflow.ORIGIN_FILE}
    assert {path for path in root.rglob("*") if path.is_file()} == expected
    origin = json.loads((root / recflow.ORIGIN_FILE).read_text())
    arguments = dataclasses.asdict(SETTINGS) | {"days": list(DAYS)}
    assert origin == {"data": "simulated", "note": origin["note"]} | arguments
    counts = read_pickle(recflow.id_count_path(root))
    assert set(counts) == set(ID_COUNT_FIELDS)
    assert (counts["user_id"], counts["video_id"], counts["author_id"]) == (90, 600, 60)


def test_feather_has_the_columns_of_recflow_and_agrees_with_the_groups(root: Path, log: list[Day]) -> None:
    names = {*REQUEST_COLUMNS, *ITEM_COLUMNS, *GROUP_NAMES, "rank_index", "rerank_index"}
    for name, day in zip(DAYS, log, strict=True):
        schema = pyarrow.feather.read_table(recflow.feather_path(root, name)).schema
        assert {field.name: str(field.type) for field in schema} == dict.fromkeys(names, "int64")
        assert day.rows["video_id"].shape == (SETTINGS.requests_per_day, LOGGED)
        items = np.stack([day.rows[name] for name in ITEM_COLUMNS], axis=-1)  # [R, LOGGED, 8]
        for group, rows in day.groups.items():
            assert rows.shape == (SETTINGS.requests_per_day, 10, 8) and rows.dtype == np.int64
            assert set(np.unique(day.rows[group])) == {0, 1}
            for number in range(0, SETTINGS.requests_per_day, 10):
                flagged = items[number][day.rows[group][number] == 1]
                assert sorted(flagged.tolist()) == sorted(rows[number].tolist())


def test_groups_share_videos_only_as_the_stages_do(log: list[Day]) -> None:
    for day in log:
        for number in range(0, SETTINGS.requests_per_day, 50):
            videos = {name: set(day.groups[name][number, :, VIDEO]) for name in GROUP_NAMES}
            reranked = videos["rerank_pos"] | videos["rerank_neg"]
            assert len(reranked) == 20
            assert videos["rank_pos"] <= reranked
            assert len(reranked.union(*(videos[group.name] for group in THREE_STAGE.groups))) == THREE_STAGE.num_items
            assert len(set().union(*(videos[group.name] for group in TWO_STAGE.groups))) == TWO_STAGE.num_items


@pytest.mark.parametrize(
    ("field", "names"), [("rank_index", ["rank_pos"]), ("rerank_index", ["rerank_pos", "rerank_neg"])]
)
def test_indices_count_from_one_in_the_order_of_the_groups(log: list[Day], field: str, names: list[str]) -> None:
    for day in log:
        best_first = np.concatenate([day.groups[name] for name in names], axis=1)[..., VIDEO]
        last = best_first.shape[1]
        assert np.array_equal(day.rows[field] > 0, np.max([day.rows[name] for name in names], axis=0) == 1)
        order = np.argsort(day.rows[field], axis=1)[:, -last:]
        assert (np.take_along_axis(day.rows[field], order, axis=1) == np.arange(1, last + 1)).all()
        assert np.array_equal(np.take_along_axis(day.rows["video_id"], order, axis=1), best_first)


def test_requests_lie_in_their_local_day_in_order_with_a_rhythm(log: list[Day]) -> None:
    for name, day in zip(DAYS, log, strict=True):
        times = day.requests["request_timestamp"]
        begin = datetime.fromisoformat(name).replace(tzinfo=ZoneInfo("Asia/Shanghai"))
        hours = (times - begin.timestamp() * 1000) // 3_600_000
        assert 0 <= hours[0] <= hours[-1] < 24
        assert (np.diff(times) > 0).all()
        assert (hours >= 18).sum() > 2 * (hours < 6).sum() > 0
    ids = np.concatenate([day.requests["request_id"] for day in log])
    assert ids.min() > 0 and len(np.unique(ids)) == len(ids) == SETTINGS.requests_per_day * len(DAYS)


@pytest.mark.parametrize(
    ("key", "fields"),
    [
        ("video_id", [field for field in ITEM_COLUMNS if field not in ("video_id", "effective_view")]),
        ("user_id", ["device_id", "age", "gender", "province"]),
        ("category_level_two", ["category_level_one"]),
    ],
)
def test_an_id_always_has_the_same_properties(log: list[Day], key: str, fields: list[str]) -> None:
    keys = together(log, key)
    assert count_distinct(keys, *(together(log, field) for field in fields)) == count_distinct(keys)


def test_uploads_precede_requests_and_only_exposed_videos_are_viewed(log: list[Day]) -> None:
    uploads = together(log, "upload_timestamp")
    assert (uploads > 0).all() and (uploads * 1000 < together(log, "request_timestamp")).all()
    shown, viewed = together(log, "rerank_pos") == 1, together(log, "effective_view")
    assert set(viewed) == {0, 1} and not viewed[~shown].any()
    assert 0.2 < viewed[shown].mean() < 0.8


def test_small_vocabularies_are_used_up_but_for_the_padding_category(log: list[Day]) -> None:
    assert count_distinct(together(log, "video_id")) == SETTINGS.videos
    assert count_distinct(together(log, "user_id")) == SETTINGS.users
    categories = set(simulate.category_one(np.arange(simulate.CATEGORIES_TWO)).tolist())
    assert categories == set(range(simulate.CATEGORIES_ONE)) - {2}
    users = np.bincount(np.concatenate([day.requests["user_id"] for day in log]))
    assert users.max() > 2 * users.mean()  # unequally active


# ---------------------------------------------------------------------------------------------- histories


def test_histories_are_the_last_views_of_earlier_requests(log: list[Day]) -> None:
    """A slow reconstruction: walk the requests in time order and keep what each user was shown and viewed."""
    seen: dict[int, list[list[int]]] = {}
    lengths = set()
    played = HISTORY_COLUMNS.index("playing_time")
    for day in log:
        for number in range(SETTINGS.requests_per_day):
            request = {name: int(values[number]) for name, values in day.requests.items()}
            expected = seen.setdefault(request["user_id"], [])[-HISTORY_LENGTH:]
            lengths.add(len(expected))
            history = day.history[number].copy()
            assert (history[: HISTORY_LENGTH - len(expected)] == 0).all()
            valid = history[HISTORY_LENGTH - len(expected) :]
            duration = valid[:, HISTORY_COLUMNS.index("duration")]
            assert ((valid[:, played] > 0) & (valid[:, played] <= duration)).all()
            valid[:, played] = 0  # the one column that no other file tells
            assert valid.tolist() == expected
            for item in day.groups["rerank_pos"][number]:
                if item[EFFECTIVE_VIEW]:
                    row = request | dict(zip(ITEM_COLUMNS, item.tolist(), strict=True))
                    seen[request["user_id"]].append([row.get(name, 0) for name in HISTORY_COLUMNS])
    assert {0, HISTORY_LENGTH} <= lengths


# ---------------------------------------------------------------------------------------------- determinism


def test_same_arguments_give_the_same_bytes_and_a_rerun_replaces_them(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    other = dataclasses.replace(SETTINGS, seed=4, days=("2024-01-20",), requests_per_day=20)
    simulate.simulate(tmp_path, other)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(recflow, "write_day", interrupt)
        simulate.simulate(tmp_path, SETTINGS)
    assert not (tmp_path / recflow.ORIGIN_FILE).exists()  # so that it is not taken for a whole log
    simulate.simulate(tmp_path, SETTINGS)
    assert contents(tmp_path) == contents(root)  # and the day 2024-01-20 is gone


def test_a_day_does_not_depend_on_the_days_after_it(root: Path, tmp_path: Path) -> None:
    simulate.simulate(tmp_path, dataclasses.replace(SETTINGS, days=DAYS[:2]))
    for day in DAYS[:2]:
        for file, whole in zip(recflow.day_paths(tmp_path, day), recflow.day_paths(root, day), strict=True):
            assert file.read_bytes() == whole.read_bytes()


def test_seeds_and_days_differ(log: list[Day], tmp_path: Path) -> None:
    simulate.simulate(tmp_path, dataclasses.replace(SETTINGS, days=DAYS[:1], seed=4))
    for day in (read_day(tmp_path, DAYS[0]), log[1]):
        assert not np.array_equal(day.requests["user_id"], log[0].requests["user_id"])
        assert not np.array_equal(day.groups["rank_pos"][..., VIDEO], log[0].groups["rank_pos"][..., VIDEO])


# ---------------------------------------------------------------------------------------------- ids


@pytest.mark.parametrize(
    "sizes",
    [
        {"users": 42_000, "videos": 82_200_000, "authors": 33_500_000},  # RecFlow's
        {"users": 2**31, "videos": 2**31, "authors": 2**31},
        {"users": 1, "videos": 200, "authors": 1},
    ],
    ids=["recflow", "largest", "smallest"],
)
def test_ids_stay_within_any_vocabulary_in_bounded_memory(tmp_path: Path, sizes: dict[str, int]) -> None:
    settings = dataclasses.replace(SETTINGS, days=DAYS[:1], requests_per_day=300, **sizes)
    tracemalloc.start()
    simulate.simulate(tmp_path, settings)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 41_100_000  # half a byte per video of RecFlow's vocabulary
    rows, counts = read_day(tmp_path, DAYS[0]).rows, read_pickle(recflow.id_count_path(tmp_path))
    for field in ID_COUNT_FIELDS:
        assert 0 <= rows[field].min() <= rows[field].max() < counts[field], field
    assert (np.diff(np.sort(rows["video_id"], axis=1)) > 0).all()


@pytest.mark.parametrize("count", [1, 2, 7, 600, 997, 82_200_000])
def test_shuffling_is_one_to_one(count: int) -> None:
    ranks = np.unique(np.linspace(0, count - 1, 1000).astype(np.int64))
    ids = simulate.shuffled(ranks, count, simulate.stream_key(5, Stream.VIDEO_IDS))
    assert len(np.unique(ids)) == len(ranks)
    assert 0 <= ids.min() <= ids.max() < count


def test_power_law_inverts_its_integral() -> None:
    law = simulate.PowerLaw(count=5000, exponent=0.7, offset=50)
    uniform = np.linspace(0, 1, 1001)[:-1]
    assert np.abs(law.share(law.rank(uniform)) - uniform).max() < 0.01
    density = (np.arange(5000) + 50.5) ** -0.7  # the law's definition, summed instead of integrated
    assert np.allclose(law.share(np.arange(5000)), (np.cumsum(density) - density / 2) / density.sum(), atol=1e-3)


def test_hash_is_splitmix64() -> None:
    """The first outputs of the reference implementation (Vigna) for the state 1234567."""
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert simulate.splitmix64(np.array([1234567], np.uint64), np.arange(1, 4)).tolist() == expected


def test_hashed_normals_are_standard() -> None:
    drawn = simulate.hashed_normal(np.array([9], np.uint64), np.arange(200_000))
    assert abs(drawn.mean()) < 0.01
    assert abs(drawn.std() - 1) < 0.01
    assert abs((drawn < -1).mean() - 0.1587) < 0.01  # Phi(-1)


def test_distinct_only_shifts_what_collides() -> None:
    values = np.array([[0, 0, 0, 3, 9], [9, 9, 9, 9, 9], [1, 2, 4, 6, 8]])
    assert simulate.distinct(values, 10).tolist() == [[0, 1, 2, 3, 9], [5, 6, 7, 8, 9], [1, 2, 4, 6, 8]]


# ---------------------------------------------------------------------------------------------- something to learn


def two_stage_items(day: Day) -> np.ndarray:
    """[R, 40, 8], the ground truth first."""
    return np.concatenate([day.groups[group.name] for group in TWO_STAGE.groups], axis=1)


def recall_at_20(scores: np.ndarray) -> float:
    """Share of the first 10 of 40 items among the best 20; ties broken at random."""
    noise = np.random.default_rng(0).random(scores.shape)
    best = np.lexsort((noise, -scores), axis=1)[:, :20]
    return float((best < 10).sum(axis=1).mean() / 10)


def positive_share(train: np.ndarray, test: np.ndarray) -> np.ndarray:
    """Share of ground truth among the training items [R, 40] with the test item's key, shrunk towards 1/4."""
    keys, codes = np.unique(np.concatenate([train.ravel(), test.ravel()]), return_inverse=True)
    positive = np.broadcast_to(np.arange(40) < 10, train.shape).ravel()
    shown = np.bincount(codes[: train.size], minlength=len(keys))
    chosen = np.bincount(codes[: train.size], weights=positive, minlength=len(keys))
    return ((chosen + 5 * 0.25) / (shown + 5))[codes[train.size :]].reshape(test.shape)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Day, Day]:
    """A training and a test day of the default world."""
    folder = tmp_path_factory.mktemp("demo")
    days = ("2024-01-13", "2024-02-04")
    simulate.simulate(folder, SimulationSettings(days=days, requests_per_day=2000))
    return read_day(folder, days[0]), read_day(folder, days[1])


def test_video_statistics_predict_a_held_out_day(demo: tuple[Day, Day]) -> None:
    train, test = (two_stage_items(day) for day in demo)
    recalls = {name: recall_at_20(positive_share(train[..., i], test[..., i])) for i, name in enumerate(ITEM_COLUMNS)}
    assert recalls["video_id"] > 0.6
    assert recalls["video_id"] > recalls["author_id"] > recalls["category_level_one"] > 0.55
    assert recalls["video_id"] < 0.85  # popularity must leave room for taste


def test_taste_of_a_user_group_adds_to_the_category(demo: tuple[Day, Day]) -> None:
    column = ITEM_COLUMNS.index("category_level_two")
    train, test = (two_stage_items(day)[..., column] for day in demo)
    cells = [(day.requests["gender"] * simulate.AGES + day.requests["age"])[:, None] for day in demo]
    by_cell = [
        items * simulate.AGES * simulate.GENDERS + cell for items, cell in zip((train, test), cells, strict=True)
    ]
    assert recall_at_20(positive_share(*by_cell)) > recall_at_20(positive_share(train, test)) + 0.03


def test_history_tells_taste(demo: tuple[Day, Day]) -> None:
    day = demo[1]
    items = two_stage_items(day)[..., ITEM_COLUMNS.index("category_level_one")]
    watched = day.history[..., HISTORY_COLUMNS.index("category_level_one")]
    valid = day.history[..., HISTORY_COLUMNS.index("request_timestamp")] > 0
    matches = ((items[:, :, None] == watched[:, None, :]) & valid[:, None, :]).sum(axis=2)
    assert recall_at_20(matches) > 0.6


def test_stages_see_the_utility_ever_more_clearly() -> None:
    world = simulate.World(SimulationSettings())
    request = simulate.requests_of(world, DAYS[0])
    request = {name: values[:1000] for name, values in request.items()}
    rng = np.random.default_rng(0)
    videos, tastes = world.videos(simulate.draw_candidates(rng, world.video_law, 1000)), world.tastes(request)
    views = {}
    for view in (simulate.TRUTH, simulate.PRERANK, simulate.COARSE, simulate.RANK):
        noise = view.noise * rng.standard_normal(videos.popularity.shape)
        views[view] = simulate.seen_by(view, videos, tastes, request["request_timestamp"]) + noise
    likeness = [np.corrcoef(views[simulate.TRUTH].ravel(), view.ravel())[0, 1] for view in views.values()]
    truth, prerank, coarse, rank = likeness
    assert 0.2 < prerank < coarse < rank < truth


# ---------------------------------------------------------------------------------------------- arguments


def test_number_of_days_counts_training_days_and_the_test_day() -> None:
    assert parse_days("1") == ("2024-02-04",)
    assert parse_days("3") == ("2024-01-13", "2024-01-14", "2024-02-04")
    period_one = parse_days("23")
    assert period_one[-2:] == ("2024-02-03", "2024-02-04")
    assert len(set(period_one)) == 23
    assert parse_days("2024-01-15, 2024-01-17") == ("2024-01-15", "2024-01-17")


@pytest.mark.parametrize(
    "argument",
    [
        "--days=24",
        "--days=0",
        "--days=2024-13-01",
        "--days=20240113,2024-01-14",
        "--days=2024-01-14,2024-01-13",
        "--days=2024-01-14,2024-01-14",
        "--days=",
        "--requests_per_day=0",
        "--requests_per_day=86400001",
        "--users=0",
        "--videos=199",
        "--videos=4294967296",
        "--authors=0",
        "--seed=-1",
    ],
)
def test_a_bad_argument_is_one_sentence_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], argument: str
) -> None:
    folder = tmp_path / "log"
    assert run_command(simulate.main, [f"--output_dir={folder}", argument]) == 2
    error = capsys.readouterr().err
    assert argument.partition("=")[0] in error
    assert error.count("\n") == 1
    assert not folder.exists()


@pytest.mark.parametrize("origin", [None, "not json", '{"data": "movielens-1m"}', "[]"])
def test_a_folder_with_other_content_is_refused_untouched(tmp_path: Path, origin: str | None) -> None:
    path = recflow.feather_path(tmp_path, DAYS[0]) if origin is None else tmp_path / recflow.ORIGIN_FILE
    path.parent.mkdir(parents=True)
    path.write_text(origin or "a real log")
    before = contents(tmp_path)
    for output in (tmp_path, path):
        with pytest.raises(InputError, match="--output_dir"):
            simulate.simulate(output, SETTINGS)
    assert contents(tmp_path) == before


def test_the_command_writes_a_log(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "deep_components.dataset.simulate", f"--output_dir={tmp_path}", "--days=2"]
    sizes = ["--requests_per_day=5", "--users=3", "--videos=200", "--authors=2", "--seed=1"]
    root = Path(__file__).parents[2]
    done = subprocess.run([*command, *sizes], capture_output=True, text=True, check=False, cwd=root)
    assert (done.returncode, done.stdout) == (0, "")
    assert len(read_day(tmp_path, "2024-02-04").requests["request_id"]) == 5
