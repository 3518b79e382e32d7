"""Arrays of a single word line: what all reads of one input code and one weight code add is a number of these two codes alone, and
so is where they are counted. Both stand in tables of at most 2^16 pairs.
"""

from __future__ import annotations

import itertools

import numba
import numpy as np
import torch
from numba import njit, prange

from ....arrays.mapping import MappedLayer
from ....kernels.cache import SOURCES
from ... import accumulator_dtype


def taps(layer: MappedLayer) -> np.ndarray:
    """Where each row of a group stands in the padded input, from its first: (pixels down, pixels right, channel)."""
    (kh, kw), (dy, dx) = layer.kernel, layer.geometry.dilation
    return np.array([(ky * dy, kx * dx, c) for ky in range(kh) for kx in range(kw) for c in range(layer.group_channels)], np.int64)


class Table:
    """The pairs of one layer whose arrays have a single row, of ideal cells."""

    def __init__(self, layer: MappedLayer) -> None:
        self.layer, spec = layer, layer.spec
        self.taps, self.stride = taps(layer), np.array(layer.geometry.stride)
        w_rows = layer.w_rows.cpu().numpy().transpose(2, 1, 0).astype(np.int32)
        self.first = np.ascontiguousarray(w_rows << spec.a_bits)  # pair of input code 0: [output, row, group]
        self._added = None

    def _kinds(self):
        """Yield (z, k, digits, cells, u, classes) of each digit and slice: the digit of each input code, the cell of each weight code, u of
        every `[cell, digit]`, and the class of each digit, which is the n of its reads."""
        spec = self.layer.spec
        for (z, digit_bits), (k, bits) in itertools.product(enumerate(spec.digit_bits), enumerate(spec.slice_bits)):
            a, c = np.arange(2**digit_bits), np.arange(2**bits)[:, None]
            u = (2 * c - self.layer.reference_twice[k]) * a if spec.reference == "analog" else c * a
            classes = self.layer.class_of(torch.from_numpy(a)).numpy()
            digits = np.arange(2**spec.a_bits) >> (spec.dac_bits * z) & (2**digit_bits - 1)
            yield z, k, digits, np.arange(2**spec.w_bits) >> (spec.cell_bits * k) & (2**bits - 1), u, classes

    def _sum_kinds(self):
        """What each pair adds to the accumulators of each ADC step, `[step, pair]`."""
        layer, spec = self.layer, self.layer.spec
        groups = [ks for _, ks in layer.delta_groups]
        total = np.zeros((len(groups), 2**spec.w_bits, 2**spec.a_bits), np.int64)
        for z, k, digits, cells, u, classes in self._kinds():
            converters = [layer.converter(z, k, j) for j in range(layer.classes)]
            added = np.choose(classes, [converter.added(converter.encode(u, spec.unit)) for converter in converters])
            step = next(step for step, ks in enumerate(groups) if k in ks)
            total[step] += added[cells[:, None], digits] << (spec.dac_bits * z + spec.cell_bits * k)
        return total.reshape(len(groups), -1).astype(str(accumulator_dtype(layer)).removeprefix("torch."))

    def sums(self, x: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        """Accumulators `[step, N, H', W', group, output]` of codes x `[N, H, W, channel of a group, group]`, padded; size, (H', W')."""
        if self._added is None:
            self._added = self._sum_kinds()
        outputs, _, groups = self.first.shape
        out = np.empty((len(self._added), len(x), *size, groups, outputs), self._added.dtype)
        _add(x, self.first, self.taps, self.stride, self._added, out)
        return out

    def histogram(self, x: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        """Counts of the reads of such codes, int64 `[digits, slices, classes, bin]`; see `engines`."""
        spec, bins = self.layer.spec, self.layer.bins
        seen = np.zeros((numba.get_num_threads(), 2 ** (spec.w_bits + spec.a_bits)), np.int64)
        _count(x, self.first, self.taps, self.stride, *size, 2**spec.a_bits, seen)
        seen = seen.sum(0).reshape(2**spec.w_bits, 2**spec.a_bits)
        counts = np.zeros((len(spec.digit_bits), len(spec.slice_bits), self.layer.classes, bins.count), np.int64)
        for z, k, digits, cells, u, classes in self._kinds():
            of_digits = np.stack([seen[:, digits == digit].sum(1) for digit in range(u.shape[1])])
            of_reads = np.stack([of_digits[:, cells == cell].sum(1) for cell in range(u.shape[0])])
            np.add.at(counts[z, k], (classes, bins.index(u)), of_reads)
        return counts


@njit(cache=True, parallel=True)
def _add(x, first, taps, stride, table, out, sources=SOURCES):
    """What the pairs of codes and weights add, `table[step, pair]`, into `out`, `[step, N, H', W', group, output]`; x, see `Table.sums`."""
    _, images, height, width, groups, outputs = out.shape
    for item in prange(images * height):
        image, y = item // height, item % height
        total = np.empty(groups, table.dtype)
        for column in range(width):
            for step in range(len(table)):
                added = table[step]
                for output in range(outputs):
                    total[:] = 0
                    for r in range(len(taps)):
                        codes = x[image, y * stride[0] + taps[r, 0], column * stride[1] + taps[r, 1], taps[r, 2]]
                        pair = first[output, r]
                        for g in range(groups):
                            total[g] += added[np.uint32(pair[g] + codes[g])]
                    for g in range(groups):
                        out[step, image, y, column, g, output] = total[g]


GROUPS = 32  # whose codes are counted at a time: the counters of bytes of so many have 32 KB, as a first-level cache


@njit(cache=True, parallel=True)
def _count(x, first, taps, stride, height, width, codes, seen, sources=SOURCES):
    """How often each pair was seen, into `seen`, int64 `[thread, pair]`; x, see `Table.sums`; codes, how many input codes there are.

    A word line sees the codes of a window of pixels, which are counted, whatever its weight is. The next one to its right sees the same
    window less its first columns, and some behind its last.
    """
    outputs, rows, groups = first.shape
    strips, channels = -(-groups // GROUPS), x.shape[3]
    for item in prange(len(x) * strips):
        image, begin, all_seen = x[item // strips], item % strips * GROUPS, seen[numba.get_thread_id()]
        strip = range(min(GROUPS, groups - begin))
        counts = np.empty((GROUPS, codes), np.int32)
        for c in range(channels):
            for r in range(c, rows, channels):
                top, left = taps[r, 0], taps[r, 1]
                before = left - taps[r - channels, 1] if r > c and taps[r - channels, 0] == top else 0
                new = before // stride[1] if before % stride[1] == 0 else 0  # columns that the window before has not
                known = 0 < new < width // 2
                if not known:
                    counts[:], new = 0, width
                for y in range(top, top + stride[0] * height, stride[0]):
                    for column in range(width - new, width):
                        enters = image[y, left + stride[1] * column, c, begin:]
                        for g in strip:
                            counts[g, enters[g]] += 1
                        if known:
                            leaves = image[y, left + stride[1] * (column - width), c, begin:]
                            for g in strip:
                                counts[g, leaves[g]] -= 1
                for output in range(outputs):
                    for g in strip:
                        pair = first[output, r, begin + g]
                        for code in range(codes):
                            all_seen[pair + code] += counts[g, code]
