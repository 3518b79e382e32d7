"""Smallest and largest u of each group, array, digit and slice, the ranges of the dynamic ADC, kept lane by lane."""

from numba import njit

from .simd import LANES, any_bit, int64_at, load, splat, store, vmax, vmin
from .codes import cells
from .counts import any_outside, to_bytes
from .layout import PAIR, PAIR_END, RUN, SLICE


@njit
def spread_extremes(extremes, lows, highs, own, window):
    """What one thread knows of a group, [array, digit, slice, 2], to each lane; the window of each array and digit."""
    arrays, digits, slices, _ = extremes.shape
    for t in range(arrays):
        for z in range(digits):
            window[t, z] = extremes[t, z, :, 0].max(), extremes[t, z, :, 1].min()
            for k in range(slices):
                slot = (t * digits + z) * slices + k
                own[slot] = extremes[t, z, k]
                lows[slot * LANES:(slot + 1) * LANES] = min(own[slot, 0], 2**15 - 1)
                highs[slot * LANES:(slot + 1) * LANES] = max(own[slot, 1], -2**15)


@njit(forceinline=True)
def keep_extremes(shape, at, used, n, slot, run, run_end, look):
    """Smallest and largest `u` of the runs of one block, lane by lane. Returns whether any of them is a new one.

    With `look`, runs are left out none of whose columns lies beyond what their slice has seen: the window of all slices,
    which the block has left, may be that of another slice.
    """
    in_bytes = new = False
    for r in range(run, run_end):
        k = int64_at(at.runs, RUN * r + SLICE)
        lane, own = (slot + k) * LANES, 2 * (slot + k)
        if look and not any_outside(shape, at, used, n, int64_at(at.own, own), int64_at(at.own, own + 1),
                                    load(at.run_columns, r * LANES)):
            continue
        if not in_bytes:
            to_bytes(at, used)
            in_bytes = True
        low, high = splat(32767), splat(0)
        for pair in range(int64_at(at.runs, RUN * r + PAIR), int64_at(at.runs, RUN * r + PAIR_END)):
            even, odd = cells(shape, at, pair, used)
            low, high = vmin(low, vmin(even, odd)), vmax(high, vmax(even, odd))
        scale, zero = splat(shape.read_scale - 1), splat(int64_at(at.reference, k) * n)
        before_low, before_high = load(at.lows, lane), load(at.highs, lane)
        low, high = vmin(before_low, (low << scale) - zero), vmax(before_high, (high << scale) - zero)
        store(at.lows, lane, low)
        store(at.highs, lane, high)
        new = new or any_bit((low ^ before_low) | (high ^ before_high))
    return new


@njit
def narrowest(lows, highs, own, slot, slices):
    """The range of `u` that each slice of one array and digit has seen, to `own`; returns the one that all have seen."""
    low, high = -2**62, 2**62
    for k in range(slot, slot + slices):
        own[k] = lows[k * LANES:(k + 1) * LANES].min(), highs[k * LANES:(k + 1) * LANES].max()
        low, high = max(low, own[k, 0]), min(high, own[k, 1])
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
