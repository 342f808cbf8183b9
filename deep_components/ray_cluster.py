"""What processes that do part of this one's work are given, and the Ray cluster on which they may run."""

import os
import socket
import sys
from collections.abc import Iterator
from contextlib import chdir, contextmanager
from pathlib import Path
from typing import Any

from deep_components.errors import InputError
from deep_components.threads import short_waits

RETRIES = 3  # of a task whose worker process, or node, ended

_SECONDS_TO_ANSWER = 10.0
_PROJECT = Path(__file__).parents[1]


def environment(threads: int | None = None) -> dict[str, str]:
    """What a process needs to find the project, and nothing in the current folder; its number of threads, and how they
    wait."""
    inherited = filter(os.path.isabs, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    paths = dict.fromkeys([str(_PROJECT), *inherited])
    changes = {"PYTHONPATH": os.pathsep.join(paths), "PYTHONSAFEPATH": "1"} | short_waits()
    return changes | ({"OMP_NUM_THREADS": str(threads)} if threads else {})


@contextmanager
def ray_cluster(**variables: str) -> Iterator[Any]:
    """Ray, connected to the cluster that RAY_ADDRESS names, else to the one that runs on this machine, else to one that
    is started for the block. Its nodes need the project, its packages and all files under the same paths; workers get
    :func:`environment` and the ``variables``.

    Raises InputError when Ray is not installed, or no cluster answers at RAY_ADDRESS.
    """
    try:
        import ray
    except ImportError as error:
        raise InputError(
            f"--engine=ray: {sys.executable} lacks ray; run: {sys.executable} -m pip install -r requirements-ray.txt"
        ) from error
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would report to its makers
    _check_address(os.environ.get("RAY_ADDRESS", ""))
    known = {"env_vars": environment() | variables}
    with chdir(_PROJECT):  # workers import from the folder in which this is called
        try:
            ray.init(runtime_env=known, include_dashboard=False, log_to_driver=False, logging_level="error")
        except ConnectionError as error:
            refused = "AuthenticationError" in str(error.__cause__)  # Ray has no exception of its own for it
            raise (_other_token() if refused else _no_cluster()) from error
    try:
        yield ray
    finally:
        ray.shutdown()


def _check_address(address: str) -> None:
    """InputError when nothing listens at host:port. Ray itself tries for minutes."""
    host, _, port = address.rpartition("/")[2].rpartition(":")
    if host and port.isdecimal():
        try:
            socket.create_connection((host.strip("[]"), int(port)), _SECONDS_TO_ANSWER).close()
        except (OSError, OverflowError) as error:
            raise _no_cluster() from error


def _no_cluster() -> InputError:
    return InputError(
        f"RAY_ADDRESS={os.environ.get('RAY_ADDRESS')}: no Ray cluster answers there; start one with "
        "`ray start --head`, or unset RAY_ADDRESS"
    )


def _other_token() -> InputError:
    return InputError(
        f"RAY_ADDRESS={os.environ.get('RAY_ADDRESS')}: this Ray cluster asks for a token, which is missing here or "
        "another one; set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH, as where it was started"
    )
