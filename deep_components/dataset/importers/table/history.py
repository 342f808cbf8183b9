"""Histories derived from the table: a user's ground-truth items of strictly earlier times."""

import numpy as np

from deep_components.dataset.importers.table.clean import ASKING, positive_record
from deep_components.dataset.importers.table.plan import Plan
from deep_components.dataset.importers.table.scratch import append, load, remove


def derive(plan: Plan, bucket: int) -> None:
    """Write the histories of the requests of a bucket of users.

    A request sees the ``length`` latest of the items that were ground truth in requests of the same user with a time
    strictly before its own, whatever their day; of equal times, by request, then from the worst to the best.
    """
    positives = load(plan, bucket, "positives", positive_record(plan))
    asking = load(plan, bucket, "asking", ASKING)
    for name in ("positives", "asking"):
        remove(plan, bucket, name)
    by = [positives[name] for name in ("item", "order", "request", "time", "user")]
    positives = positives[np.lexsort(by)]
    # (user, time) as one number that rises with both.
    users = np.unique(np.concatenate([positives["user"], asking["user"]]))
    times = np.unique(np.concatenate([positives["time"], asking["time"]]))
    keys = _pairs(users, positives["user"], times, positives["time"])
    start = np.searchsorted(keys, np.searchsorted(users, asking["user"]) * len(times))
    stop = np.searchsorted(keys, _pairs(users, asking["user"], times, asking["time"]))
    step = max(1, (1 << 24) // plan.history_record.itemsize)
    asked = plan.bucket_of(asking["request"])
    order = np.lexsort((asked, asking["day"]))
    for first in range(0, len(order), step):
        some = order[first : first + step]
        histories = _histories(plan, positives, asking[some], start[some], stop[some])
        where = np.flatnonzero(np.diff(asked[some], prepend=-1) | np.diff(asking["day"][some].astype(int), prepend=-1))
        for low, high in zip(where, np.append(where[1:], len(some)), strict=True):
            append(plan, int(asked[some[low]]), f"{asking['day'][some[low]]}.history", histories[low:high])


def _pairs(users: np.ndarray, user: np.ndarray, times: np.ndarray, time: np.ndarray) -> np.ndarray:
    return np.searchsorted(users, user) * len(times) + np.searchsorted(times, time)


def _histories(
    plan: Plan, positives: np.ndarray, asking: np.ndarray, start: np.ndarray, stop: np.ndarray
) -> np.ndarray:
    """The records of requests whose users' earlier positives are start .. stop."""
    wanted = stop[:, None] - np.arange(plan.length, 0, -1)
    there = wanted >= start[:, None]
    made = np.empty(len(asking), plan.history_record)
    made["request"] = asking["request"]
    made["events"] = there.sum(axis=1)
    for entry in plan.derived:
        values = np.full(made[f"history.{entry.name}"].shape, entry.nothing, entry.dtype)
        values[there] = positives[plan.stored(entry)][wanted[there]]
        made[f"history.{entry.name}"] = values
    return made
