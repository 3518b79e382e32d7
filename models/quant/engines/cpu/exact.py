"""Any read and any ADC, one column at a time in 64 bits: for what 16-bit lanes do not hold."""

import numpy as np
from numba import njit

from .simd import LANES
from .codes import HISTOGRAM, RANGES, STATIC
from .converter import LOW, Q_MIN, SPAN
from .layout import PAIR, PAIR_END, SLICE


@njit
def add_exact(shape, plan, table, planes, used, n, g, t, z, block, op, acc, extremes, counts, u_min, thread):
    """Do `op` with the reads of one block: the formulas of `adc.transfer` and of `engines`, extremes, or a count."""
    reads = np.empty(LANES, np.int64)
    for run in range(plan.run_start[block], plan.run_start[block + 1]):
        k = plan.runs[run, SLICE]
        place = shape.dac_bits * z + shape.cell_bits * k
        for v in range(2 * plan.runs[run, PAIR], 2 * plan.runs[run, PAIR_END]):
            reads[:] = 0
            for s in range(shape.packed):
                w = v + s * shape.slices * shape.slice_vectors
                bit = w // 2 + 8 * (w % 2)
                for m in range(used):
                    for lane in range(LANES):
                        reads[lane] += np.int64(planes[m * LANES + lane] >> bit & 1) << (m + s)
            o = (block * 16 + v - k * shape.slice_vectors) * LANES
            for lane in range(min(LANES, shape.out_channels - o)):
                u = shape.read_scale * reads[lane] - plan.reference[k] * n
                if op == HISTOGRAM:
                    counts[thread, z, k, u - u_min, 0] += 1
                elif op == RANGES:
                    extremes[thread, g, t, z, k, 0] = min(extremes[thread, g, t, z, k, 0], u)
                    extremes[thread, g, t, z, k, 1] = max(extremes[thread, g, t, z, k, 1], u)
                elif op == STATIC:
                    q = np.rint(u * table.unit / table.delta[k])
                    q = min(max(q, table.limits[k, Q_MIN]), table.limits[k, Q_MIN] + table.q_max)
                    acc[plan.step_of_slice[k] * shape.slice_vectors * LANES + o + lane] += np.int64(q) << place
                elif table.forms[g, t, z, k, SPAN] > 0:
                    span = table.forms[g, t, z, k, SPAN]
                    step = np.float32(span) / np.float32(table.q_max + 1)
                    q = np.rint(np.float32(u - table.forms[g, t, z, k, LOW]) / step)
                    acc[o + lane] += min(np.int64(q), table.q_max) * span << place
