"""SIGINT and SIGTERM, noted so that a training can save its state before it stops."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_waiting: list[list[int]] = []  # of the blocks of stop_signals under way


def ask_to_stop(number: int) -> None:
    """As if this process had got the signal: for one that runs beside others in a process of Ray."""
    for received in _waiting:
        received.append(number)


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """A list that gets the number of a SIGINT or SIGTERM; a second one ends the process at once. A signal that the
    process was started to ignore stays ignored."""
    received: list[int] = []
    before: dict[int, Any] = {}

    def put_back() -> None:
        for number, handler in before.items():
            if signal.getsignal(number) is note:
                signal.signal(number, handler)

    def note(number: int, frame: FrameType | None) -> None:
        del frame
        received.append(number)
        put_back()

    if threading.current_thread() is threading.main_thread():  # signals are its own
        for number in (int(signal.SIGINT), int(signal.SIGTERM)):
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                before[number] = signal.signal(number, note)
    _waiting.append(received)
    try:
        yield received
    finally:
        _waiting.remove(received)
        put_back()
