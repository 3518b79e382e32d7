"""Which of several exact ways to the same numbers is the fastest: tried once where the program runs, and kept for the process.

`WAYS` are those that a layer can do without; each can be switched off, so that a benchmark finds what it is worth.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Hashable, Iterator, Mapping

import torch
from torch import Tensor

from ....arrays.mapping import MappedLayer

TRIALS = 3  # timed calls of each way that is not far behind; the fastest counts
FAR = 2  # times as long as the fastest, in one call
FEWEST, ENOUGH = 2**14, 2**17  # outputs of a layer's call: of fewer no way takes long, and with so many the ways are tried
READS = 2**24  # that they have at most, unless they are the fewest: of many small arrays the slowest way would take seconds
PRODUCTS, DENSE, SIDE_BY_SIDE, LOUD, GROUPS = ("products of bytes", "dense products", "output pixels side by side",
                                               "integer product, less what clips in loud pixels", "many groups side by side")
RELATIVE, TABLES, SHORT_ROWS, TILES = "integer product and what clips", "look-up of codes", "rows of cells in 16 bits", "tiles of AMX"
TREES = "thresholds as trees"
WAYS = PRODUCTS, DENSE, SIDE_BY_SIDE, LOUD, GROUPS, RELATIVE, TABLES, SHORT_ROWS, TILES, TREES
_off: frozenset[str] = frozenset()
_chosen: dict[Hashable, str] = {}


@contextlib.contextmanager
def without(*ways: str) -> Iterator[None]:
    """Within the block, layers that were not prepared before it go none of these `WAYS`."""
    global _off
    before, _off = _off, _off | set(ways)
    try:
        yield
    finally:
        _off = before


def may(way: str) -> bool:
    """Whether layers may go this way, one of `WAYS`."""
    return way not in _off


def fastest(key: Hashable, ways: Mapping[str, Callable[[], object]]) -> str:
    """The name of the way that takes the least time.

    Args: key, of all that the times depend on; what is known for it is not tried again.
    """
    key = key, _off
    if key not in _chosen:
        _chosen[key] = _tried(ways) if len(ways) > 1 else next(iter(ways))
    return _chosen[key]


def _tried(ways):
    for run in ways.values():
        run()  # may compile something
    seconds = {name: _seconds(run) for name, run in ways.items()}
    near = [name for name in ways if seconds[name] <= FAR * min(seconds.values())]
    if len(near) > 1:
        seconds = {name: min(_seconds(ways[name]) for _ in range(TRIALS)) for name in near}
    return min(seconds, key=seconds.get)


def _seconds(run):
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def fastest_for(layer: MappedLayer, a_codes: Tensor, ways: Mapping[str, Callable[[Tensor], object]],
                facts: Hashable = ()) -> str | None:
    """`fastest` for a layer and an input, tried on some of its images; None where it has so few outputs that it does not matter.
    Args: facts, what the times depend on besides the shapes."""
    outputs = math.prod(layer.geometry.output_size(*a_codes.shape[1:3], layer.kernel)) * len(layer.w_codes)
    if len(a_codes) * outputs < FEWEST:
        return None
    reads = outputs * len(layer.arrays) * len(layer.spec.digit_bits) * len(layer.spec.slice_bits)
    sample = a_codes[:max(1, min(ENOUGH // outputs, max(READS // reads, FEWEST // outputs)))]
    form = None if layer.cells is None else layer.cells.fraction_bits
    key = (*ways, layer.spec, layer.geometry, layer.w_codes.shape, form, layer.reference_twice, sample.shape, facts,
           torch.get_num_threads())
    return fastest(key, {name: lambda run=run: run(sample) for name, run in ways.items()})
