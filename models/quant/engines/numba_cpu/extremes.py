"""Smallest and largest u of each group, array, digit and slice, the ranges of the dynamic ADC, kept lane by lane."""

from numba import njit

from ..simd import LANES, int64_at, load, splat, store, vmax, vmin
from .codes import cells
from .layout import PAIR, PAIR_END, RUN, SLICE


@njit
def spread_extremes(extremes, lows, highs, window):
    """What one thread knows of a group, [array, digit, slice, 2], to each lane; the window of each array and digit."""
    arrays, digits, slices, _ = extremes.shape
    for t in range(arrays):
        for z in range(digits):
            window[t, z] = extremes[t, z, :, 0].max(), extremes[t, z, :, 1].min()
            for k in range(slices):
                lane = ((t * digits + z) * slices + k) * LANES
                lows[lane:lane + LANES] = min(extremes[t, z, k, 0], 2**15 - 1)
                highs[lane:lane + LANES] = max(extremes[t, z, k, 1], -2**15)


@njit(forceinline=True)
def keep_extremes(shape, at, used, n, slot, run):
    """Smallest and largest `u` of one run, lane by lane."""
    k = int64_at(at.runs, RUN * run + SLICE)
    low, high = splat(32767), splat(0)
    for pair in range(int64_at(at.runs, RUN * run + PAIR), int64_at(at.runs, RUN * run + PAIR_END)):
        even, odd = cells(shape, at, pair, used)
        low, high = vmin(low, vmin(even, odd)), vmax(high, vmax(even, odd))
    scale, zero = splat(shape.read_scale - 1), splat(int64_at(at.reference, k) * n)
    lane = (slot + k) * LANES
    store(at.lows, lane, vmin(load(at.lows, lane), (low << scale) - zero))
    store(at.highs, lane, vmax(load(at.highs, lane), (high << scale) - zero))


@njit
def narrowest(lows, highs, slot, slices):
    """The range of `u` that every slice of one array and digit has seen."""
    low, high = -2**62, 2**62
    for k in range(slices):
        lane = (slot + k) * LANES
        low, high = max(low, lows[lane:lane + LANES].min()), min(high, highs[lane:lane + LANES].max())
    return low, high


@njit
def join_extremes(extremes, lows, highs):
    """The extremes of all lanes back to what the thread knows of the group."""
    arrays, digits, slices, _ = extremes.shape
    for t in range(arrays):
        for z in range(digits):
            for k in range(slices):
                lane = ((t * digits + z) * slices + k) * LANES
                extremes[t, z, k, 0] = lows[lane:lane + LANES].min()
                extremes[t, z, k, 1] = highs[lane:lane + LANES].max()
