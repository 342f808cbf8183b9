"""The estimate against a count of what training really holds; what a system and its control groups leave."""

import subprocess
import sys
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from deep_components.arguments import DTYPES
from deep_components.cascade import TWO_STAGE
from deep_components.dataset.log import open_log
from deep_components.dataset.simulate import SimulationSettings, simulate
from deep_components.errors import InputError
from deep_components.loss.lcron import LCRON
from deep_components.models import build_models
from deep_components.schema import RECFLOW_IDS, recflow_schema
from deep_components.tables.store import build_stores
from deep_components.training import memory
from deep_components.training.memory import available, check_memory, step_bytes, table_bytes
from deep_components.training.step import Trainer, pulled_tables
from tests.helpers import DAYS, training_arguments
from tests.schemas import random_batch

pytestmark = pytest.mark.usefixtures("short_rules")
CPU, GIB = torch.device("cpu"), 1 << 30


# ---- tables ----------------------------------------------------------------------------------------------------------


def held_bytes(trainer: Trainer, stage: str, pulled: bool) -> int:
    """Bytes of a stage's tables, their dense gradients and Adam's state; of the pulled tables or the others."""
    total = 0
    for name, parameter in trainer.stores[stage].tables.items():
        if (name in trainer.pulled) != pulled:
            continue
        state = trainer.stores[stage].optimizers[name].state() if pulled else trainer.dense_optimizer.state[parameter]
        tensors = [parameter, *(value for key, value in state.items() if key != "step")]
        tensors += [] if parameter.grad is None else [parameter.grad]
        total += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    return total


def test_a_validation_takes_the_day_s_rows_and_a_copy_of_a_stage() -> None:
    """8 bytes a number: of two stages 3 rows of 4 numbers, and of one the whole table."""
    assert memory.validation_bytes({"video": 10}, {"video": 3}, dim=4, stages=2, itemsize=8) == (
        2 * 3 * 4 * 8,
        10 * 4 * 8,
    )


@settings(max_examples=12, deadline=None, derandomize=True, database=None)
@given(
    dim=st.sampled_from([1, 3, 8]),
    large_table=st.sampled_from([0, 40, 1000]),
    dtype=st.sampled_from(list(DTYPES.values())),
    counts=st.lists(st.integers(8, 90), min_size=len(RECFLOW_IDS), max_size=len(RECFLOW_IDS)),
)
def test_tables_take_what_a_training_holds(dim: int, large_table: int, dtype: torch.dtype, counts: list[int]) -> None:
    schema = recflow_schema(dict(zip(RECFLOW_IDS, counts, strict=True)))
    models, stores = build_models(TWO_STAGE, schema, dim, 8, seed=0), build_stores(TWO_STAGE, schema, dim, seed=0)
    loss = LCRON(TWO_STAGE.stage_names, TWO_STAGE.num_relevant)
    for module in (*models.values(), loss):
        module.to(dtype)
    for store in stores.values():
        store.to(CPU, dtype)
    trainer = Trainer(models, stores, loss, lr=0.01, large_table=large_table)
    trainer.step(trainer.prepare(random_batch(schema, 2, TWO_STAGE.num_items, 3, limit=8)))
    rows = {name: table.size for name, table in schema.tables.items()}
    held = tuple(held_bytes(trainer, "rank", pulled) for pulled in (True, False))
    assert table_bytes(rows, dim, trainer.pulled, dtype.itemsize) == held


def test_the_paper_s_tables_take_what_the_specification_says() -> None:
    """Dense tables of 82.2 and 33.5 million rows: 14.8 GB a stage. Nothing of it is allocated."""
    schema = recflow_schema(dict.fromkeys(RECFLOW_IDS, 50) | {"video": 82_200_000, "author": 33_500_000})
    rows = {name: table.size for name, table in schema.tables.items()}
    assert table_bytes(rows, 8, (), 4)[1] == pytest.approx(14.8e9, rel=0.01)
    pulled = pulled_tables(rows, "deferred_adam")
    assert pulled == ("author", "video")
    assert table_bytes(rows, 8, pulled, 4)[0] == (82_200_002 + 33_500_002) * (3 * 8 + 1) * 4


def test_a_step_takes_more_with_everything_that_makes_it_larger() -> None:
    small = (1024, 40, 50, 128, 2, 4)
    for index in range(len(small)):
        larger = tuple(2 * value if k == index else value for k, value in enumerate(small))
        assert step_bytes(*small) < step_bytes(*larger) <= 2 * step_bytes(*small)


# ---- enough ----------------------------------------------------------------------------------------------------------


def test_exactly_enough_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available", lambda device: 5 * GIB)
    check_memory({CPU: 5 * GIB})
    with pytest.raises(InputError, match=r"needs about 5\.4 GB of memory on cpu, where 5\.4 GB are free: train on few"):
        check_memory({CPU: 5 * GIB + 1})


def test_advice_for_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available", lambda device: GIB)
    with pytest.raises(InputError, match=r"cuda:0.*--table_memory=host"):
        check_memory({torch.device("cuda:0"): 2 * GIB})
    with pytest.raises(InputError) as caught:
        check_memory({CPU: 2 * GIB})
    assert "--table_memory" not in str(caught.value)


def test_much_memory_is_said(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(memory, "available", lambda device: 5 * GIB)
    with caplog.at_level("INFO"):
        check_memory({CPU: GIB - 1})
        assert not caplog.records
        check_memory({CPU: GIB})
    assert "1.1 GB needed, 5.4 GB free" in caplog.text


# ---- the system and its control groups -------------------------------------------------------------------------------


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A system with 64 GiB to give, and no groups."""
    monkeypatch.setattr(memory, "ROOT", tmp_path)
    write(tmp_path / "proc/meminfo", f"MemTotal: {90 << 20} kB\nMemAvailable:   {64 << 20} kB\n")
    write(tmp_path / "proc/self/cgroup", "0::/\n")
    return tmp_path


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def group_2(folder: Path, limit: str, used: int, cache: int = 0) -> None:
    write(folder / "memory.max", f"{limit}\n")
    write(folder / "memory.current", f"{used}\n")
    write(
        folder / "memory.stat", f"anon {used - cache}\nactive_file {cache - cache // 3}\ninactive_file {cache // 3}\n"
    )


def group_1(folder: Path, limit: int, used: int, cache: int = 0) -> None:
    write(folder / "memory.limit_in_bytes", f"{limit}\n")
    write(folder / "memory.usage_in_bytes", f"{used}\n")
    write(folder / "memory.stat", f"total_active_file {cache}\ntotal_inactive_file 0\nactive_file 12345\n")


def test_without_groups_the_system_s(root: Path) -> None:
    assert available(CPU) == 64 * GIB
    (root / "proc/self/cgroup").unlink()
    assert available(CPU) == 64 * GIB


def test_the_group_of_a_container(root: Path) -> None:
    group_2(root / "sys/fs/cgroup", str(8 * GIB), 3 * GIB)
    assert available(CPU) == 5 * GIB
    write(root / "proc/self/cgroup", "0::/docker/0123\n")  # its name outside, where no such folder is inside
    assert available(CPU) == 5 * GIB


def test_the_tightest_of_the_groups_counts(root: Path) -> None:
    write(root / "proc/self/cgroup", "0::/user.slice/job.scope\n")
    top = root / "sys/fs/cgroup"
    group_2(top / "user.slice", str(20 * GIB), 2 * GIB)
    group_2(top / "user.slice/job.scope", "max", GIB)
    group_2(top / "other.slice", str(GIB), GIB)
    assert available(CPU) == 18 * GIB
    group_2(top / "user.slice/job.scope", str(6 * GIB), GIB)
    assert available(CPU) == 5 * GIB


def test_groups_of_version_1(root: Path) -> None:
    write(root / "proc/self/cgroup", "5:cpu,cpuacct:/a\n4:memory:/jobs/7\n1:name=systemd:/b\n0::/\n")
    top = root / "sys/fs/cgroup/memory"
    group_1(top, 0x7FFFFFFFFFFFF000, 9 * GIB)
    assert available(CPU) == 64 * GIB
    group_1(top / "jobs/7", 4 * GIB, 3 * GIB, cache=2 * GIB)
    assert available(CPU) == 3 * GIB


def test_the_file_cache_counts_as_free(root: Path) -> None:
    """A group that has just written a columnar cache is full of it; memory is there all the same."""
    group_2(root / "sys/fs/cgroup", str(8 * GIB), 8 * GIB, cache=6 * GIB)
    assert available(CPU) == 6 * GIB


def test_nothing_left_is_not_less_than_nothing(root: Path) -> None:
    group_2(root / "sys/fs/cgroup", str(GIB), 2 * GIB)
    assert available(CPU) == 0


def test_this_system_has_some() -> None:
    assert 1 << 20 < available(CPU) < 1 << 50


# ---- training on a large day -----------------------------------------------------------------------------------------

_TRAINS = """
import sys
from pathlib import Path
import torch
from deep_components import run_train2
from deep_components.training.step import Trainer

torch.set_num_threads(1)
step, made, highest = Trainer.step, 0, 0

def measured(self, batch):
    global made, highest
    made += 1
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    highest = max(highest, int(status["RssAnon"].split()[0]) * 1024)
    if made == 40:
        print(highest)
        sys.exit()
    return step(self, batch)

Trainer.step = measured
run_train2.main(sys.argv[1:])
"""


def test_a_day_of_ten_times_the_requests_does_not_take_more_memory(tmp_path: Path) -> None:
    """Columns stay on disk and are mapped: pages that are read can be dropped again, and no others are held."""
    peaks, sizes = [], []
    for requests in (2000, 20000):
        log = tmp_path / str(requests)
        simulate(log, SimulationSettings(days=DAYS[:1], requests_per_day=requests, users=50, videos=200, authors=20))
        day = open_log(log).open_day(DAYS[0], TWO_STAGE)
        sizes.append(sum(column.nbytes for column in day.columns.values()))
        arguments = training_arguments(log, tmp_path / f"run{requests}", f"--train_days={DAYS[0]}", "--batch_size=32")
        command = [sys.executable, "-c", _TRAINS, *arguments]
        done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout))
    assert sizes[1] == 10 * sizes[0] > 5e6
    assert peaks[1] - peaks[0] < (sizes[1] - sizes[0]) / 4, (peaks, sizes)
