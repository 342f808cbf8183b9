"""Trainings of several processes that are killed, stopped, hindered or cut off from one another.

Real processes, forked from one that has imported everything (benchmarks/faults.py).
"""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from benchmarks.faults import SHARDED, SURVIVOR, Fault
from benchmarks.soak import results
from deep_components.distributed.processes import Processes
from deep_components.errors import EndedError
from deep_components.runs.folder import STATE_FILE
from tests.helpers import leftovers, wait_for

PROJECT = Path(__file__).parents[2]
SECONDS = 120.0  # after which a training hangs; what is promised is 30
USUAL = ("SIMULATED DATA", "only 8 training steps", "lcron, seed", "--resume: ")


class Server:
    """Starts trainings on the log, in processes of their own."""

    def __init__(self, log: Path, folder: Path) -> None:
        self.log, self.folder, self.started = log, folder, 0
        command = [sys.executable, "-m", "benchmarks.faults", "--serve"]
        self.process = subprocess.Popen(
            command, cwd=PROJECT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"},
        )  # fmt: skip

    def ask(self, **question: Any) -> Any:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(f"{json.dumps(question)}\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def start(
        self, run: Path, *flags: str, fault: Fault | None = None, environment: dict[str, str] | None = None,
        namespace: str = "",
    ) -> "Training":  # fmt: skip
        self.started += 1
        output = self.folder / f"said-{self.started}.txt"
        pid = self.ask(
            argv=[*SHARDED, f"--data_dir={self.log}", f"--output_dir={run}", *flags], output=str(output),
            environment=environment or {}, fault=asdict(fault) if fault is not None else None, namespace=namespace,
        )  # fmt: skip
        return Training(self, pid, output)

    def train(self, run: Path, *flags: str, fault: Fault | None = None) -> "Training":
        """On two processes of an agent, to its end."""
        training = self.start(run, "--processes=2", *flags, fault=fault)
        training.end()
        return training

    def ranks(
        self, count: int, run: Path, *flags: str, fault: Fault | None = None, address: str = "127.0.0.1",
        namespaces: tuple[str, ...] = (), of_last: tuple[str, ...] = (),
    ) -> list["Training"]:  # fmt: skip
        """Processes without an agent, which would end all with the first one. ``of_last``: more flags of the last."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        common = {"GLOO_SOCKET_IFNAME": "cable"} if namespaces else {}
        common |= {"WORLD_SIZE": str(count), "MASTER_ADDR": address, "MASTER_PORT": str(port)}
        return [
            self.start(
                run, *flags, *(of_last if rank == count - 1 else ()), fault=fault,
                environment=common | {"RANK": str(rank)}, namespace=namespaces[rank] if namespaces else "",
            )
            for rank in range(count)
        ]  # fmt: skip


class Training:
    """One process that was started: an agent, or a rank without one."""

    def __init__(self, server: Server, pid: int, output: Path) -> None:
        self.server, self.pid, self.output, self.code = server, pid, output, -1

    def end(self) -> int:
        """Wait for it; its exit code."""
        code = self.server.ask(wait=self.pid, seconds=SECONDS)
        if code is None:
            os.kill(self.pid, signal.SIGKILL)
            raise AssertionError(f"hangs: {self.output.read_text()}")
        self.code = code
        return self.code

    def rank(self, rank: int) -> int:
        """Its process id."""
        return int(self.output.with_suffix(f".{rank}").read_text())

    def said(self) -> list[str]:
        """But warnings about the small log."""
        lines = self.output.read_text().splitlines()
        return [line for line in lines if not line.startswith(USUAL)]


@pytest.fixture(scope="module")
def server(log: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    made = Server(log, tmp_path_factory.mktemp("said"))
    yield made
    assert made.process.stdin is not None and made.process.stdout is not None
    made.process.stdin.close()
    assert made.process.wait(SECONDS) == 0
    made.process.stdout.close()


@pytest.fixture(scope="module")
def undisturbed(server: Server, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a training of two processes that nothing disturbs leaves."""
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    training = server.train(run)
    assert training.code == 0, training.said()
    return results(run)


def resumes_to(expected: dict[str, Any], server: Server, run: Path) -> None:
    """``--resume`` ends in the bytes of a training that was not disturbed."""
    resumed = server.train(run, "--resume")
    assert resumed.code == 0, resumed.said()
    assert results(run) == expected


# ---- SIGKILL ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_ends_all(rank: int, server: Server, tmp_path: Path, undisturbed: dict[str, Any]) -> None:
    run = tmp_path / "run"
    training = server.train(run, fault=Fault(rank, step=3, action="kill"))
    assert training.code == 128 + signal.SIGKILL
    survivor, agent = training.said()
    assert survivor == (
        f"process {1 - rank} of 2: {SURVIVOR}, after step 2; go on with the same command and --resume"
    )  # fmt: skip
    assert agent.startswith(f"error: process {rank} of 2 was ended by SIGKILL (was there enough memory?)")
    resumes_to(undisturbed, server, run)


@pytest.mark.parametrize("point", [5, 20])
def test_a_training_with_restarts_goes_on_by_itself(
    point: int, server: Server, tmp_path: Path, undisturbed: dict[str, Any]
) -> None:
    """Killed while it writes a file, or is about to."""
    run = tmp_path / "run"
    training = server.train(run, "--max_restarts=1", fault=Fault(1, point=point, folder=str(run)))
    assert training.code == 0, training.said()
    assert tmp_path.joinpath("run.killed").exists()
    assert results(run) == undisturbed and leftovers(run) == []


def test_a_restart_does_not_go_on_with_an_earlier_training(
    server: Server, tmp_path: Path, undisturbed: dict[str, Any]
) -> None:
    """It was to begin anew, and died before it had removed the old state."""
    run = tmp_path / "run"
    assert server.train(run, fault=Fault(1, step=5, action="kill")).code == 128 + signal.SIGKILL
    assert (run / STATE_FILE).exists()
    training = server.train(run, "--max_restarts=1", fault=Fault(0, point=1, folder=str(run)))
    assert training.code == 0, training.said()
    assert "8 steps, 8 of them now" in training.output.read_text()
    assert results(run) == undisturbed


# ---- signals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "to"), [(signal.SIGTERM, "agent"), (signal.SIGINT, "agent"), (signal.SIGTERM, 1)])
def test_a_signal_saves_once_and_says_so_once(
    number: signal.Signals, to: str | int, server: Server, tmp_path: Path, undisturbed: dict[str, Any]
) -> None:
    run = tmp_path / "run"
    training = server.start(run, "--processes=2", fault=Fault(1, step=3, action="slow"))
    wait_for(lambda: (run / STATE_FILE).exists())
    os.kill(training.pid if to == "agent" else training.rank(1), number)
    assert training.end() == 128 + number
    (said,) = training.said()
    assert said.startswith("stopped at step ") and "the state is saved" in said and "--resume" in said
    resumes_to(undisturbed, server, run)


def test_a_killed_agent_takes_its_processes_along(server: Server, tmp_path: Path, undisturbed: dict[str, Any]) -> None:
    run = tmp_path / "run"
    training = server.start(run, "--processes=2", fault=Fault(1, step=3, action="slow"))
    wait_for(lambda: (run / STATE_FILE).exists())
    os.kill(training.pid, signal.SIGKILL)
    training.end()
    wait_for(lambda: not any(Path(f"/proc/{training.rank(rank)}").exists() for rank in (0, 1)))
    resumes_to(undisturbed, server, run)


# ---- mistakes of one process -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_loader", [False, True], ids=["in a step", "in the loader's thread"])
@pytest.mark.parametrize("rank", [0, 1])
def test_an_input_that_one_process_refuses(rank: int, in_loader: bool, server: Server, tmp_path: Path) -> None:
    """It says why, the other one that it has ended."""
    training = server.train(tmp_path / "run", fault=Fault(rank, step=2, action="refuse", in_loader=in_loader))
    assert training.code == 2
    refusal, survivor = sorted(training.said())
    assert refusal == f"error: process {rank} of 2: day 2024-01-14: told to be damaged; import it again"
    assert survivor.startswith(f"process {1 - rank} of 2: {SURVIVOR}")


def test_a_refused_input_is_not_tried_again(server: Server, tmp_path: Path) -> None:
    training = server.train(tmp_path / "run", "--max_restarts=2", fault=Fault(1, step=2, action="refuse"))
    assert training.code == 2
    assert len(training.said()) == 2


def test_a_defect_in_one_process(server: Server, tmp_path: Path) -> None:
    training = server.train(tmp_path / "run", fault=Fault(1, step=2, action="defect"))
    assert training.code == 1
    said = training.output.read_text()
    assert said.count("ZeroDivisionError: ") == 1 and said.count(SURVIVOR) == 1


def test_a_full_disk_of_one_process(server: Server, tmp_path: Path, undisturbed: dict[str, Any]) -> None:
    """All end alike, with the state before."""
    run = tmp_path / "run"
    training = server.train(run, fault=Fault(1, step=3, action="full disk"))
    assert training.code == 2
    (said,) = training.said()
    assert said.startswith("error: ") and "training_state" in said and "cannot be written" in said
    assert leftovers(run) == []
    resumes_to(undisturbed, server, run)


def test_processes_that_differ_are_refused(server: Server, tmp_path: Path) -> None:
    """By all, and said by one."""
    ranks = server.ranks(3, tmp_path / "run", of_last=("--lr=0.5", "--timeout=99"))
    assert [rank.end() for rank in ranks] == [2, 2, 2]
    (said,) = [line for rank in ranks for line in rank.said()]
    assert said == (
        "error: process 2 of 3 and process 0 differ in --lr (0.5, not 0.01); start all with the same arguments, data, "
        "code and packages"
    )
    assert not (tmp_path / "run").exists()


# ---- silence ---------------------------------------------------------------------------------------------------------


def test_a_process_that_stands_still(server: Server, tmp_path: Path) -> None:
    ranks = server.ranks(2, tmp_path / "run", "--timeout=3", fault=Fault(1, step=3, action="stop"))
    assert ranks[0].end() == 1
    (said,) = ranks[0].said()
    assert said.startswith("process 0 of 2: another process did not answer for 3 seconds (--timeout)")
    os.kill(ranks[1].pid, signal.SIGKILL)
    ranks[1].end()


@pytest.mark.parametrize(
    ("step", "remedy"),
    [
        (None, "; start again with the same command"),  # an evaluation, or a training before its first step
        (7, ", after step 7; go on with the same command and --resume"),
    ],
)
def test_what_the_others_of_an_ended_process_say(
    step: int | None, remedy: str, caplog: pytest.LogCaptureFixture
) -> None:
    group: Any = None
    processes = Processes(0, 2, group, group, group, step=step)
    with pytest.raises(EndedError), processes._others():
        raise RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1234")
    assert caplog.messages == [f"process 0 of 2: {SURVIVOR}{remedy}"]


def test_a_slow_process_is_waited_for(server: Server, tmp_path: Path, undisturbed: dict[str, Any]) -> None:
    run = tmp_path / "run"
    ranks = server.ranks(2, run, fault=Fault(1, step=3, action="slow"))
    assert [rank.end() for rank in ranks] == [0, 0]
    assert results(run) == undisturbed


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture
def hosts() -> Iterator[tuple[str, str]]:
    """Two network namespaces that a cable connects, as 10.99.7.1 and 10.99.7.2."""
    names = tuple(f"lcron{os.getpid()}{letter}" for letter in "ab")
    try:
        for name in names:
            ip("netns", "add", name)
        ip("-n", names[0], "link", "add", "cable", "type", "veth", "peer", "name", "cable", "netns", names[1])
        for number, name in enumerate(names, start=1):
            ip("-n", name, "address", "add", f"10.99.7.{number}/24", "dev", "cable")
            ip("-n", name, "link", "set", "cable", "up")
            ip("-n", name, "link", "set", "lo", "up")
    except (OSError, subprocess.CalledProcessError):
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)
        pytest.skip("no network namespaces can be made here")
    yield names[0], names[1]
    for name in names:
        ip("netns", "del", name)


def test_a_cut_cable_between_two_hosts(hosts: tuple[str, str], server: Server, tmp_path: Path) -> None:
    run = tmp_path / "run"
    ranks = server.ranks(
        2, run, "--timeout=5", "--epochs=100000", fault=Fault(1, step=3, action="slow"), address="10.99.7.1",
        namespaces=(f"/run/netns/{hosts[0]}", f"/run/netns/{hosts[1]}"),
    )  # fmt: skip
    wait_for(lambda: (run / STATE_FILE).exists())
    ip("-n", hosts[1], "link", "set", "cable", "down")
    assert [rank.end() for rank in ranks] == [1, 1]
    for number, rank in enumerate(ranks):
        (said,) = rank.said()
        assert said.startswith(f"process {number} of 2: another process")
