"""Any read and any ADC, one column at a time in 64 bits: for what 16-bit lanes do not hold."""

import numpy as np
from numba import njit

from .buffers import DYNAMIC, HISTOGRAM, RANGES
from .converter import FORM, LIMITS, LOW, Q_MAX, Q_MIN, SPAN
from .layout import PAIR, PAIR_END, RUN, SLICE
from .simd import LANES, float64_at, int64_at, put_int64, uint16_at


@njit
def add_exact(shape, at, read, block, op):
    """Do `op` with one block of a read."""
    for run in range(int64_at(at.run_start, block), int64_at(at.run_start, block + 1)):
        k = int64_at(at.runs, RUN * run + SLICE)
        for vector in range(2 * int64_at(at.runs, RUN * run + PAIR), 2 * int64_at(at.runs, RUN * run + PAIR_END)):
            _put_reads(shape, at, read, vector)
            first = (block * 16 + vector - k * shape.slice_vectors) * LANES  # channel of the vector's first column
            for lane in range(min(LANES, shape.out_channels - first)):
                u = shape.read_scale * int64_at(at.reads, lane) - int64_at(at.reference, k) * read.ones
                if op == HISTOGRAM:
                    _increase(at.counts, (read.digit * shape.slices + k) * at.bins + u - at.u_min, 1)
                elif op == RANGES:
                    _widen(at, 2 * (read.first + k), u)
                elif op == DYNAMIC:
                    _increase(at.exact_acc, first + lane, _dynamic_value(at, read, k, u) * _factor(shape, at, read, k))
                else:
                    step = int64_at(at.step_of_slice, k) * shape.slice_vectors * LANES
                    _increase(at.exact_acc, step + first + lane, _static_code(shape, at, read, k, u) * _factor(shape, at, read, k))


@njit
def _put_reads(shape, at, read, vector):
    """P of the columns of one vector, from their bit planes to `at.reads`."""
    for lane in range(LANES):
        total = 0
        for s in range(shape.packed):
            w = vector + s * shape.slices * shape.slice_vectors
            bit = w // 2 + 8 * (w % 2)
            for m in range(read.depth):
                total += (np.int64(uint16_at(at.planes, m * LANES + lane)) >> bit & 1) << (m + s)
        put_int64(at.reads, lane, total)


@njit
def _factor(shape, at, read, k):
    """What a code of slice `k` is worth in the accumulators."""
    return int64_at(at.factors, read.digit * shape.slices + k)


@njit
def _static_code(shape, at, read, k, u):
    """`adc.transfer` of one read."""
    kind = read.digit * shape.slices + k
    q = np.rint(u * at.unit / float64_at(at.delta, kind))
    return np.int64(min(max(q, int64_at(at.limits, LIMITS * kind + Q_MIN)), int64_at(at.limits, LIMITS * kind + Q_MAX)))


@njit
def _dynamic_value(at, read, k, u):
    """`q span`, the formula of `engines`; 0 where all reads are the same, as `Adc.constant` has what they are worth."""
    form = at.forms + 8 * FORM * (read.first + k)
    span = int64_at(form, SPAN)
    if span == 0:
        return 0
    step = np.float32(span) / np.float32(at.q_max + 1)
    return min(np.int64(np.rint(np.float32(u - int64_at(form, LOW)) / step)), at.q_max) * span


@njit
def _widen(at, entry, u):
    """Take `u` into the smallest and the largest of one slice."""
    put_int64(at.extremes, entry, min(int64_at(at.extremes, entry), u))
    put_int64(at.extremes, entry + 1, max(int64_at(at.extremes, entry + 1), u))


@njit
def _increase(address, entry, value):
    put_int64(address, entry, int64_at(address, entry) + value)
