"""Tasks that are timed in turn, so that what else the machine does slows all of them alike."""

from __future__ import annotations

import time
from collections.abc import Callable


def take_turns(tasks: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every task in every round, after one round that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for counted in [False] + [True] * rounds:
        for name, task in tasks.items():
            start = time.perf_counter()
            task()
            if counted:
                seconds[name].append(time.perf_counter() - start)
    return seconds
