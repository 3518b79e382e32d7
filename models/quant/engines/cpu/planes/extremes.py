"""Smallest and largest u of each group, array, digit and slice, the ranges of the dynamic ADC, kept lane by lane."""

from ....kernels.inner import inlined, inner
from ....kernels.simd import LANES, any_bit, int16_at, int64_at, load, put_int64, splat, store, vmax, vmin
from ..common.layout import PAIR, PAIR_END, RUN, SLICE
from .codes import cells
from .counts import any_outside, to_bytes


@inner
def spread_extremes(extremes, buffers):
    """What one thread knows of a group, [array, digit, slice, 2], to each lane."""
    lows, highs, seen = buffers.lows, buffers.highs, buffers.seen
    arrays, digits, slices, _ = extremes.shape
    for t in range(arrays):
        for z in range(digits):
            buffers.quiet[t, z, 0], buffers.quiet[t, z, 1] = extremes[t, z, :, 0].max(), extremes[t, z, :, 1].min()
            for k in range(slices):
                slot = (t * digits + z) * slices + k
                seen[slot, 0], seen[slot, 1] = extremes[t, z, k, 0], extremes[t, z, k, 1]
                lows[slot * LANES:(slot + 1) * LANES] = min(seen[slot, 0], 2**15 - 1)
                highs[slot * LANES:(slot + 1) * LANES] = max(seen[slot, 1], -2**15)


@inlined
def keep_extremes(shape, at, read, block):
    """Take the `u` of one block into the smallest and largest ones."""
    in_bytes = new = False
    for run in range(int64_at(at.run_start, block), int64_at(at.run_start, block + 1)):
        k = int64_at(at.runs, RUN * run + SLICE)
        if at.look and not _moves_any(shape, at, read, run, k):
            continue
        if not in_bytes:
            to_bytes(at, read.depth)
            in_bytes = True
        new = _keep_run(shape, at, read, run, k) or new
    if new:
        _narrow(shape, at, read)


@inlined
def _moves_any(shape, at, read, run, k):
    """Whether any column of a run lies beyond what its own slice has seen. That the block is not quiet may be due to
    another slice."""
    seen = 2 * (read.slot + k)
    return any_outside(shape, at, read, int64_at(at.seen, seen), int64_at(at.seen, seen + 1), load(at.run_columns, run * LANES))


@inlined
def _keep_run(shape, at, read, run, k):
    """The extremes of each lane and one run, of slice `k`; returns whether any of them is a new one."""
    low, high = splat(32767), splat(0)
    for pair in range(int64_at(at.runs, RUN * run + PAIR), int64_at(at.runs, RUN * run + PAIR_END)):
        even, odd = cells(shape, at, pair, read.depth)
        low, high = vmin(low, vmin(even, odd)), vmax(high, vmax(even, odd))
    scale, zero = splat(shape.read_scale - 1), splat(int64_at(at.reference, k) * read.ones)
    lane = (read.slot + k) * LANES
    before_low, before_high = load(at.lows, lane), load(at.highs, lane)
    low, high = vmin(before_low, (low << scale) - zero), vmax(before_high, (high << scale) - zero)
    store(at.lows, lane, low)
    store(at.highs, lane, high)
    return any_bit((low ^ before_low) | (high ^ before_high))


@inner
def _narrow(shape, at, read):
    """From the lanes: the range of `u` that each slice has seen, to `at.seen`, and the one that all have seen, to `at.quiet`."""
    quiet_low, quiet_high = -2**62, 2**62
    for slot in range(read.slot, read.slot + shape.slices):
        low, high = int16_at(at.lows, slot * LANES), int16_at(at.highs, slot * LANES)
        for lane in range(slot * LANES + 1, (slot + 1) * LANES):
            low, high = min(low, int16_at(at.lows, lane)), max(high, int16_at(at.highs, lane))
        put_int64(at.seen, 2 * slot, low)
        put_int64(at.seen, 2 * slot + 1, high)
        quiet_low, quiet_high = max(quiet_low, low), min(quiet_high, high)
    quiet = 2 * (read.array * shape.digits * shape.classes + read.kind)
    put_int64(at.quiet, quiet, quiet_low)
    put_int64(at.quiet, quiet + 1, quiet_high)


@inner
def join_extremes(extremes, buffers):
    """The extremes of all lanes back to what the thread knows of the group."""
    ends = extremes.reshape(-1, 2)
    for slot in range(len(ends)):
        ends[slot, 0] = buffers.lows[slot * LANES:(slot + 1) * LANES].min()
        ends[slot, 1] = buffers.highs[slot * LANES:(slot + 1) * LANES].max()
