"""Fixtures and settings that several test modules share."""

import signal
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
import torch

from deep_components.tables import deferred_adam
from tests.helpers import small_log

# A shell starts what it puts in the background with SIGINT ignored; processes that tests send one to would inherit it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Matrices in tests are so small that threads only wait for one another: up to thirty times slower on busy cores.
torch.set_num_threads(1)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """What a test printed or logged, as text that can be sent from one process to another: file names may be none."""
    report = yield
    report.sections = [(name, text.encode(errors="replace").decode()) for name, text in report.sections]
    return report


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of golden numbers; its README.md says what they are."""
    return Path(__file__).parent / "golden"


@pytest.fixture(scope="module")
def short_rules() -> Iterator[None]:
    """Deferred Adam's rules for fewer steps at a time: fitting 2,048 of them takes longer than a test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(deferred_adam, "_STEPS_AT_A_TIME", 64)
        yield


@pytest.fixture(scope="session")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small simulated log."""
    return small_log(tmp_path_factory)
