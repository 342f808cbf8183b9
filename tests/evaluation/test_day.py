"""Evaluation: every request once, the tables' names, and nothing half-written when something is wrong."""

import csv
import dataclasses
import json
import os
import shutil
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from deep_components import run_test, run_test2, run_train, run_train2
from deep_components.arguments import evaluation_parser
from deep_components.cascade import THREE_STAGE, TWO_STAGE
from deep_components.checkpoint import load_trained
from deep_components.cli import run_command
from deep_components.dataset.columnar import DayCache
from deep_components.dataset.log import open_log
from deep_components.errors import InputError
from deep_components.evaluation import day as evaluation
from deep_components.files import write_json
from deep_components.models import build_models
from deep_components.reporting.paper import TABLES
from deep_components.runs import state
from deep_components.tables.store import EmbeddingStore, build_stores
from tests.evaluation.test_bound import KEYS as BOUND_KEYS
from tests.helpers import (
    DAYS,
    REQUESTS_PER_DAY,
    STAGES,
    config,
    contents,
    evaluate,
    evaluation_arguments,
    leftovers,
    small_log,
    train,
    training_arguments,
)
from tests.test_own_cascade import write_log as write_shop

METRICS = [
    "joint_recall@10@20",
    *("retrieval_recall@10@30", "retrieval_ndcg@10", "retrieval_kendall_tau"),
    *("rank_recall@10@20", "rank_ndcg@10", "rank_kendall_tau"),
    *("survival_after_retrieval", "survival_after_rank"),
]


@pytest.fixture(scope="session")
def trained(log: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(log, tmp_path_factory.mktemp("trained"), "--epochs=3")


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A trained run that the test may change."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def forget_run(run: Path) -> None:
    """Let the models note no run, as those of earlier versions; a test may then edit config.json."""
    for path in run.glob("[!.]*.safetensors"):
        arrays, metadata = state.load(path)
        state.save(path, arrays, {name: value for name, value in metadata.items() if name != "of_run"})


def per_request_of(run: Path) -> dict[str, np.ndarray]:
    with np.load(run / "per_request.npz", allow_pickle=False) as arrays:
        return dict(arrays)


def scores_of(run: Path) -> dict[str, np.ndarray]:
    with np.load(run / "scores.npz") as arrays:
        return dict(arrays)


def refused(log: Path, run: Path, capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    """Evaluates, expects a refusal that leaves nothing behind, and returns its sentence."""
    assert run_command(run_test2.main, evaluation_arguments(log, run, "--save_scores", *flags)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert not (run / "metrics.json").exists()
    assert not (run / "scores.npz").exists()
    assert not (run / "per_request.npz").exists()
    assert leftovers(run) == []
    return error


# ---- what is written -------------------------------------------------------------------------------------------------


def test_the_keys_are_those_of_the_papers_tables(log: Path, run: Path) -> None:
    with TABLES.open() as file:
        tables = {row["metric"] for row in csv.DictReader(file) if row["setting"] == TWO_STAGE.name}
    results = evaluate(log, run)
    assert tables == {name for name in results if "@" in name}


def test_metrics_json(log: Path, run: Path) -> None:
    results = evaluate(log, run)
    assert [name for name in results if name in METRICS] == METRICS
    assert all(-1 <= results[name] <= 1 for name in METRICS)
    about = {"num_requests": REQUESTS_PER_DAY, "num_requests_without_ground_truth": 0, "test_day": DAYS[-1]}
    about |= {"setting": "two_stage", "loss_type": "lcron", "seed": 30, "epochs": 3, "data": "simulated"}
    about |= {"commit": config(run)["commit"], "time_zone": "Asia/Shanghai", "skipped_steps": 0}
    assert {name: results[name] for name in about} == about
    assert set(results) == {*METRICS, *BOUND_KEYS, *about, "warning", "test_day_checksum", "code"}


def test_scores_npz(log: Path, run: Path) -> None:
    evaluate(log, run, "--save_scores")
    scores = scores_of(run)
    per_item = ("labels", "mask", "group", *STAGES)
    assert set(scores) == {"request_id", "data", *per_item}
    assert scores["request_id"].shape == (REQUESTS_PER_DAY,)
    assert {scores[name].shape for name in per_item} == {(REQUESTS_PER_DAY, TWO_STAGE.num_items)}
    day = open_log(log).open_day(DAYS[-1], TWO_STAGE).batch(np.arange(REQUESTS_PER_DAY))  # in file order
    assert np.array_equal(scores["request_id"], day.request_id.numpy())
    assert np.array_equal(scores["labels"], day.targets.labels.numpy())
    assert np.array_equal(scores["mask"], day.targets.mask.numpy())


def test_per_request_npz(log: Path, run: Path) -> None:
    """Every metric of metrics.json per request, in file order; its mean over the requests is the metric."""
    results = evaluate(log, run, "--save_scores")
    arrays = per_request_of(run)
    assert list(arrays) == ["request_id", *METRICS]
    assert arrays["request_id"].dtype == np.int64
    assert np.array_equal(arrays["request_id"], scores_of(run)["request_id"])
    for name in METRICS:
        assert arrays[name].shape == (REQUESTS_PER_DAY,) and arrays[name].dtype == np.float64
        assert results[name] == pytest.approx(np.nanmean(arrays[name]), abs=1e-12)


def test_scores_of_an_earlier_evaluation_do_not_stay(log: Path, run: Path) -> None:
    evaluate(log, run, "--save_scores", f"--test_day={DAYS[0]}")
    evaluate(log, run)
    assert not (run / "scores.npz").exists()


def test_the_metrics_are_those_of_the_scores(log: Path, run: Path) -> None:
    """The cascade served once more, request by request, from scores.npz."""
    results = evaluate(log, run, "--save_scores")
    scores = scores_of(run)
    joint, single = [], []
    for retrieval, rank in zip(scores["retrieval"], scores["rank"], strict=True):
        recalled = np.argsort(-retrieval)[:30]
        exposed = recalled[np.argsort(-rank[recalled])[:20]]
        joint.append((exposed < 10).sum() / 10)  # the first group, ten items, is the ground truth
        single.append((recalled < 10).sum() / 10)
    assert results["joint_recall@10@20"] == pytest.approx(np.mean(joint), abs=1e-12)
    assert results["retrieval_recall@10@30"] == pytest.approx(np.mean(single), abs=1e-12)


def test_a_trained_cascade_is_better_than_an_untrained_one(log: Path, tmp_path: Path) -> None:
    """On the day it was trained on."""
    day, name = f"--test_day={DAYS[0]}", "rank_ndcg@10"
    flags = ("--epochs=8", "--lr=0.05", f"--train_days={DAYS[0]}")
    before = evaluate(log, train(log, tmp_path / "before", "--epochs=0"), day)[name]
    after = evaluate(log, train(log, tmp_path / "after", *flags), day)[name]
    assert after > before + 0.02


def test_long_lists_are_scored_a_few_requests_at_a_time_whatever_the_batch_size(
    log: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, sizes = evaluate(log, run), list[int]()
    batches = evaluation.batches

    def counted(day: DayCache, order: np.ndarray, batch_size: int, *more: Any, **named: Any) -> Any:
        sizes.append(batch_size)
        return batches(day, order, batch_size, *more, **named)

    monkeypatch.setattr(evaluation, "batches", counted)
    for items, at_a_time in ((3 * TWO_STAGE.num_items, 3), (TWO_STAGE.num_items - 1, 1)):
        monkeypatch.setattr(evaluation, "_ITEMS_AT_A_TIME", items)
        for name, value in evaluate(log, run).items():
            assert expected[name] == (pytest.approx(value, abs=1e-6) if isinstance(value, float) else value)
        assert sizes.pop() == at_a_time


def test_a_summary_holds_the_scores_of_one_batch_at_a_time(log: Path, run: Path) -> None:
    """So that the day's length does not matter to the memory, as long as the lists may be."""
    held: list[weakref.ref[torch.Tensor]] = []

    def watched() -> Iterator[dict[str, torch.Tensor]]:
        for batch in evaluation.score_day(*models_of(log, run), last_day(log), 4, torch.device("cpu")):
            copied = {name: values.clone() for name, values in batch.items()}
            held.extend(weakref.ref(values) for values in copied.values() if values.dim() == 2)
            yield copied
            del copied
            assert sum(values() is not None for values in held) <= len(batch) - 1

    _, results = evaluation.summary(TWO_STAGE, watched())
    assert results["num_requests"] == REQUESTS_PER_DAY
    assert len(held) == 5 * REQUESTS_PER_DAY / 4


@pytest.mark.parametrize("batch_size", [1, 7, 39, 1024])
def test_the_batch_size_does_not_matter(batch_size: int, log: Path, run: Path) -> None:
    whole = evaluate(log, run, "--save_scores", f"--batch_size={REQUESTS_PER_DAY}")
    expected = scores_of(run)
    parts = evaluate(log, run, "--save_scores", f"--batch_size={batch_size}")
    for stage in STAGES:
        np.testing.assert_allclose(scores_of(run)[stage], expected[stage], rtol=1e-4, atol=1e-5)
    assert parts["num_requests"] == whole["num_requests"] == REQUESTS_PER_DAY
    assert {name: parts[name] for name in METRICS} == pytest.approx({name: whole[name] for name in METRICS}, abs=1e-2)


def test_evaluating_twice_gives_the_same_bytes_and_changes_nothing_else(log: Path, run: Path) -> None:
    before = contents(run, *(path.name for path in run.iterdir()))
    evaluate(log, run, "--save_scores")
    first = contents(run, *(path.name for path in run.iterdir()))
    evaluate(log, run, "--save_scores")
    assert contents(run, *(path.name for path in run.iterdir())) == first
    assert first.keys() - before.keys() == {"metrics.json", "scores.npz", "per_request.npz"}
    assert before.items() <= first.items()


def test_a_day_that_was_trained_on(log: Path, run: Path) -> None:
    results = evaluate(log, run, f"--test_day={DAYS[0]}")
    assert results["test_day"] == DAYS[0]
    assert DAYS[0] in results["warning_test_day"]


def test_an_untrained_cascade_knows_no_day(log: Path, tmp_path: Path) -> None:
    results = evaluate(log, train(log, tmp_path, "--epochs=0"), f"--test_day={DAYS[0]}")
    assert results["epochs"] == 0
    assert "warning_test_day" not in results


def test_the_seq_len_is_that_of_the_training(log: Path, tmp_path: Path) -> None:
    short = train(log, tmp_path, "--epochs=0", "--seq_len=1")
    evaluate(log, short, "--save_scores")
    one = scores_of(short)["rank"]
    forget_run(short)
    content = config(short)
    content["arguments"]["seq_len"] = 50
    (short / "config.json").write_text(json.dumps(content))
    evaluate(log, short, "--save_scores")
    assert not np.allclose(scores_of(short)["rank"], one)


def test_the_time_zone_is_that_of_the_training(log: Path, tmp_path: Path) -> None:
    run = train(log, tmp_path, "--epochs=0", "--time_zone=UTC")
    evaluate(log, run, "--save_scores")
    by_default = scores_of(run)["rank"]
    evaluate(log, run, "--save_scores", "--time_zone=UTC")
    assert np.array_equal(scores_of(run)["rank"], by_default)


def test_missing_items(golden: Path, tmp_path: Path) -> None:
    data, cache = golden / "recflow_mini", f"--cache_dir={tmp_path / 'cache'}"
    run = train(data, tmp_path / "run", cache, "--epochs=0")
    results = evaluate(data, run, cache, "--test_day=2024-01-15", "--save_scores", "--batch_size=5")
    scores = scores_of(run)
    present = scores["mask"].astype(bool)
    assert not present.all()
    recalls = []
    for row, rank in zip(present, scores["rank"], strict=True):
        items = np.flatnonzero(row)
        best = items[np.argsort(-rank[items])[:20]]
        recalls.append((best < 10).sum() / row[:10].sum())
    assert results["rank_recall@10@20"] == pytest.approx(np.mean(recalls), abs=1e-12)
    assert results["num_requests"] == len(present)
    assert results["data"] == "unlabelled"
    assert "warning" not in results


@pytest.mark.parametrize("without", [[3], [0, 17, 39], list(range(REQUESTS_PER_DAY))])
def test_requests_without_ground_truth(
    without: list[int], log: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are left out of recall, and counted."""
    (scores,) = evaluation.score_day(*models_of(log, run), last_day(log), REQUESTS_PER_DAY, torch.device("cpu"))
    scored = {name: values.clone() for name, values in scores.items()}
    scored["mask"][without, :10] = False
    monkeypatch.setattr(evaluation, "score_day", lambda *_: [scored])
    results = evaluate(log, run)
    assert results["num_requests"] == REQUESTS_PER_DAY
    assert results["num_requests_without_ground_truth"] == len(without)
    kept = [row for row in range(REQUESTS_PER_DAY) if row not in without]
    best = scored["rank"].argsort(dim=-1, descending=True)[kept, :20]
    expected = pytest.approx((best < 10).sum(dim=-1).double().mean().item() / 10, abs=1e-12) if kept else None
    assert results["rank_recall@10@20"] == expected
    assert np.flatnonzero(np.isnan(per_request_of(run)["joint_recall@10@20"])).tolist() == without


def models_of(log: Path, run: Path) -> tuple[dict[str, nn.Module], dict[str, EmbeddingStore]]:
    schema = open_log(log).schema
    models, stores = build_models(TWO_STAGE, schema, 4, 16, None), build_stores(TWO_STAGE, schema, 4, None)
    load_trained(run, models, stores)
    return models, stores


def last_day(log: Path) -> DayCache:
    return open_log(log).open_day(DAYS[-1], TWO_STAGE, history_length=5)


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flag", ["--test_day=2023-01-01", "--device=gpu"])
def test_an_unknown_value(flag: str, log: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert flag in refused(log, run, capsys, flag)


def test_a_folder_that_is_no_run(log: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "is not the folder of a training run" in refused(log, tmp_path, capsys)


def test_another_log(run: Path, tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]) -> None:
    assert "id counts differ" in refused(small_log(tmp_path_factory, users=31), run, capsys)


def test_another_log_of_the_same_counts(
    log: Path, run: Path, tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where no day of it has been encoded, so that its cache says nothing."""
    other = small_log(tmp_path_factory, seed=1)
    assert open_log(other).schema == open_log(log).schema
    cold = f"--cache_dir={tmp_path_factory.mktemp('cold')}"
    sentence = f"its day {DAYS[1]} is not the one that"
    assert sentence in refused(other, run, capsys, cold)
    open_log(other).open_day(DAYS[0], TWO_STAGE)
    assert f"its day {DAYS[0]} is not the one that" in refused(other, run, capsys)


def copied_log(log: Path, folder: Path, **days: str) -> Path:
    """The log with other days, each a copy of one of its own: new -> old."""
    copied = shutil.copytree(log, folder, ignore=shutil.ignore_patterns("cache", "manifest.json"))
    contents = {path: path.read_bytes() for path in copied.rglob("*2024-01-*")}
    for path in contents:
        path.unlink()
    for new, old in days.items():
        for path, content in contents.items():
            if old in path.name:
                path.with_name(path.name.replace(old, new.replace("_", "-"))).write_bytes(content)
    return copied


def test_a_log_that_lies_elsewhere_and_has_a_new_day(
    log: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One training day tells that it is the same log; without any nothing does."""
    moved = copied_log(log, tmp_path / "moved", **{DAYS[1]: DAYS[1], "2024-02-20": DAYS[2]})
    results = evaluate(moved, run)
    assert results["test_day"] == "2024-02-20"
    assert results["test_day_checksum"] == evaluate(log, run)["test_day_checksum"]
    for name in ("metrics.json", "per_request.npz"):
        (run / name).unlink()
    alone = copied_log(log, tmp_path / "alone", **{"2024-02-20": DAYS[2]})
    assert "so nothing tells that it is the same log" in refused(alone, run, capsys)


def test_a_test_day_that_is_a_copy_of_a_training_day(
    log: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copied = copied_log(log, tmp_path / "log", **{DAYS[0]: DAYS[0], DAYS[1]: DAYS[1], "2024-02-20": DAYS[0]})
    assert f"--test_day=2024-02-20: has the same requests as {DAYS[0]}" in refused(copied, run, capsys)


def test_another_time_zone(log: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert f"--time_zone=UTC: {run} was trained with Asia/Shanghai" in refused(log, run, capsys, "--time_zone=UTC")
    assert evaluate(log, run, "--time_zone=Asia/Shanghai")["time_zone"] == "Asia/Shanghai"


@pytest.mark.parametrize("name", ["models/din.py", "tables/store.py", "a_file_that_is_gone.py"])
def test_models_of_other_code(name: str, log: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = config(run)["code"]
    changed = own | {"files": own["files"] | {f"deep_components/{name}": "other"}}
    change_config(run, code=changed)
    assert f"was trained by other code: deep_components/{name}; train it again" in refused(log, run, capsys)
    assert f"deep_components/{name}" in evaluate(log, run, "--any_code")["code"]["files"]


@pytest.mark.parametrize("name", ["training/step.py", "loss/functional.py"])
def test_code_that_only_trains_may_have_changed(name: str, log: Path, run: Path) -> None:
    own = config(run)["code"]
    changed = own | {"files": own["files"] | {f"deep_components/{name}": "other"}, "method": {}}
    change_config(run, code=changed)
    assert "joint_recall@10@20" in evaluate(log, run)


def test_a_run_of_an_earlier_version_is_evaluated(log: Path, run: Path) -> None:
    """It notes neither its code nor its days' checksums."""
    known = {name: value for name, value in config(run).items() if name not in ("code", "data_checksums")}
    (run / "config.json").write_text(json.dumps(known))
    assert "joint_recall@10@20" in evaluate(log, run)


def change_config(run: Path, **changes: object) -> None:
    (run / "config.json").write_text(json.dumps(config(run) | changes))


def test_another_setting(log: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change_config(run, setting="three_stage", cascade=THREE_STAGE.to_json())
    assert "a run of three_stage" in refused(log, run, capsys)


def test_another_cascade(log: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its command is run_test, which takes the run's own."""
    change_config(run, cascade=dataclasses.replace(TWO_STAGE, num_relevant=5).to_json())
    assert "another cascade than two_stage" in refused(log, run, capsys)
    forget_run(run)
    args = evaluation_parser("").parse_args(evaluation_arguments(log, run))
    assert "joint_recall@5@20" in evaluation.evaluate_cascade(args)


@pytest.mark.parametrize("content", ['{"setting": "two_stage"}', "{"])
def test_a_damaged_config(content: str, log: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "config.json").write_text(content)
    assert "config.json" in refused(log, run, capsys)


def _other_shape(path: Path) -> None:
    tensors = load_file(path)
    tensors["embedding.user"] = tensors["embedding.user"][:, :2].contiguous()
    save_file(tensors, path)


def _not_finite(path: Path) -> None:
    save_file({name: torch.full_like(value, torch.nan) for name, value in load_file(path).items()}, path)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "removed": Path.unlink,
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-4]),
    "empty": lambda path: path.write_bytes(b""),
    "another shape": _other_shape,
    "not finite": _not_finite,
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("stage", STAGES)
def test_a_damaged_checkpoint(
    stage: str, damage: str, log: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    DAMAGES[damage](run / f"{stage}.safetensors")
    assert f"{stage}.safetensors" in refused(log, run, capsys)


def _interrupted(*_: object) -> None:
    raise KeyboardInterrupt


def test_an_interrupted_run_has_nothing_to_evaluate(
    log: Path, run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr("deep_components.training.loop.Trainer.step", _interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(log, run)
    assert "no such file; train first" in refused(log, run, capsys)


def drop(arrays: dict[str, np.ndarray]) -> None:
    del arrays["embedding.user"]


def drop_of_the_model(arrays: dict[str, np.ndarray]) -> None:
    del arrays[max(arrays)]


def cut(arrays: dict[str, np.ndarray]) -> None:
    arrays[max(arrays)] = arrays[max(arrays)][..., :-1]


def add(arrays: dict[str, np.ndarray]) -> None:
    arrays["more.weight"] = np.zeros(3, np.float32)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (drop, "rank.safetensors: lacks parameter embedding.user of the model"),
        (drop_of_the_model, "rank.safetensors: lacks parameter "),
        (cut, "but the model wants ("),
        (add, "rank.safetensors: has a parameter more.weight that the model has not"),
    ],
)
def test_a_checkpoint_of_another_model(
    change: Callable[[dict[str, np.ndarray]], None],
    text: str,
    log: Path,
    run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arrays, metadata = state.load(run / "rank.safetensors")
    change(arrays)
    state.save(run / "rank.safetensors", arrays, {name: metadata[name] for name in metadata if "sha256" not in name})
    for command, arguments in (
        (run_test2.main, evaluation_arguments(log, run)),
        (run_train2.main, training_arguments(log, tmp_path / "next", f"--init_from={run}")),
    ):
        assert run_command(command, arguments) == 2
        (message,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert text in message and "rank.safetensors" in message
    assert not (run / "metrics.json").exists() and not (tmp_path / "next").exists()


def test_a_cascade_of_other_group_sizes_than_the_data_s(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A log of 10 items a request; the paper's two stages have 40, as has a run that is to be tested on it."""
    shop = write_shop(tmp_path / "shop")
    assert run_command(run_train2.main, training_arguments(shop, tmp_path / "run")) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert "its requests have 10 items, the cascade two_stage has 40; give the groups of --cascade" in message
    assert not (tmp_path / "run").exists()

    other = (shop / "shop.toml").read_text().replace("size = 5", "size = 6")
    (shop / "other.toml").write_text(other)
    sizes = ("--emb_dim=4", "--nn_units=8", "--batch_size=20", "--device=cpu", "--loss_type=bce", f"--data_dir={shop}")
    run = tmp_path / "run"
    assert run_command(run_train.main, [*sizes, f"--output_dir={run}", f"--cascade={shop / 'other.toml'}"]) == 2
    assert "its requests have 10 items, the cascade other has 11" in capsys.readouterr().err.splitlines()[-1]
    run_train.main([*sizes, f"--output_dir={run}", f"--cascade={shop / 'shop.toml'}"])
    capsys.readouterr()
    (longer := tmp_path / "longer").mkdir()
    write_shop(longer, sizes=(2, 3, 6))
    assert run_command(run_test.main, evaluation_arguments(longer, run)) == 2
    assert "is not the one that" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("changed", [{"emb_dim": 65536}, {"nn_units": 1048576}, {"emb_dim": 8}])
def test_sizes_that_are_not_the_models(changed: dict[str, int], log: Path, run: Path) -> None:
    """Said before models of such sizes are made."""
    made = config(run)
    write_json(run / "config.json", made | {"arguments": made["arguments"] | changed})
    with pytest.raises(InputError, match=r"retrieval.safetensors: .* but the model wants .* emb_dim="):
        evaluate(log, run)


def test_pipes_in_a_run_s_folder(log: Path, run: Path) -> None:
    for name in ("rank.safetensors", "config.json"):
        (run / name).unlink()
        os.mkfifo(run / name)
        with pytest.raises(InputError, match=f"{name}: not .*readable.*not a regular file"):
            evaluate(log, run)


def test_days_that_the_log_lacks_are_said(log: Path, tmp_path: Path) -> None:
    """A log without an origin that has some days of RecFlow's Period 1, the test day among them."""
    folder = Path(shutil.copytree(log, tmp_path / "log", ignore=shutil.ignore_patterns("cache")))
    (folder / "others/origin.json").unlink()
    (folder / "all_stage" / f"{DAYS[0]}.feather").unlink()
    days = [f"--train_days={DAYS[1]}"]
    trained = train(folder, tmp_path / "run", *days)
    said = evaluate(folder, trained, f"--test_day={DAYS[2]}")["warning_days"]
    assert f"the log lacks {DAYS[0]}, 2024-01-16" in said and DAYS[1] not in said
