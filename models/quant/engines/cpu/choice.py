"""Which of several exact ways to the same numbers is the fastest: tried once where the program runs, and kept for the process."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping

TRIALS = 3  # timed calls of each way, after one that may compile something; the fastest counts
_chosen: dict[Hashable, str] = {}


def fastest(key: Hashable, ways: Mapping[str, Callable[[], object]]) -> str:
    """The name of the way that takes the least time.

    Args: key, of all that the times depend on; what is known for it is not tried again.
    """
    if key not in _chosen:
        _chosen[key] = min(ways, key=lambda name: _seconds(ways[name])) if len(ways) > 1 else next(iter(ways))
    return _chosen[key]


def _seconds(run):
    def once():
        started = time.perf_counter()
        run()
        return time.perf_counter() - started
    once()
    return min(once() for _ in range(TRIALS))
