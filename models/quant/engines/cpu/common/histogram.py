"""How often each value of u occurs; 512 columns at a time where there are few values."""

import math

import numba
import numpy as np

from ....arrays.mapping import Bins, MappedLayer
from ....kernels.inner import inlined, inner
from ....kernels.simd import LANES, add_ones, by_bit, int64_at, load, set_threads, splat, store
from .layout import COUNTED, COUNTERS, KIND

MOST_COUNTS = 2**27  # of all threads together: a gigabyte


def room_for(layer: MappedLayer, bins: Bins) -> np.ndarray:
    """Counts of a layer's reads, zeros int64 `[thread, digit, slice, class, bin]`, and as many threads as there is room for."""
    set_threads()
    kinds = len(layer.spec.digit_bits), len(layer.spec.slice_bits), layer.classes, bins.count
    numba.set_num_threads(min(numba.get_num_threads(), max(1, MOST_COUNTS // math.prod(kinds))))
    return np.zeros((numba.get_num_threads(), *kinds), np.int64)


@inlined
def bin_of(u, shift):
    """Where u is counted, before the first bin is taken off; see `mapping.Bins`."""
    return u + (1 << shift >> 1) >> shift


@inner
def count_values(shape, at, read, block):
    """Count the reads of one block by value; for those whose P stays below `buffers.MOST_LEAVES`.

    A binary tree over the bit planes of P, highest first: leaf p, a vector, has a one for each column with P = p. The tree
    stands in one array: leaf i of one level becomes the leaves 2 i and 2 i + 1 of the next, which are counted where that is the last.
    """
    most, turned = read.ones * ((1 << shape.cell_bits) - 1), int64_at(at.turned, block) > 0
    store(at.leaves, 0, splat(-1))
    size = 1
    for m in range(read.depth - 1, 0, -1):
        plane = _plane(at, m, turned)
        for i in range(size - 1, -1, -1):
            leaf = load(at.leaves, i * LANES)
            one = leaf & plane
            if 2 * i < most >> m:
                store(at.leaves, (2 * i + 1) * LANES, one)
            store(at.leaves, 2 * i * LANES, leaf ^ one)
        size = (most >> m) + 1
    plane = _plane(at, 0, turned)
    of_class = read.kind - read.digit * shape.classes
    for run in range(int64_at(at.counted_start, block), int64_at(at.counted_start, block + 1)):
        columns = load(at.counted_columns, run * LANES)
        zero = -int64_at(at.reference, int64_at(at.counted, COUNTED * run + KIND)) * read.ones - at.first_bin
        counters = read.digit * shape.counters + int64_at(at.counted, COUNTED * run + COUNTERS)
        first = (counters * shape.classes + of_class) * at.bins + zero
        last = min(most, (at.bins - 1 - zero) // shape.read_scale)  # slices of fewer bits end earlier
        for i in range(last + 1 >> 1):
            leaf = load(at.leaves, i * LANES) & columns
            odd = leaf & plane
            add_ones(at.counts, first + shape.read_scale * 2 * i, leaf ^ odd)
            add_ones(at.counts, first + shape.read_scale * (2 * i + 1), odd)
        if not last & 1:
            leaf = load(at.leaves, (last >> 1) * LANES) & columns
            add_ones(at.counts, first + shape.read_scale * last, leaf ^ (leaf & plane))


@inlined
def _plane(at, m, turned):
    """A bit plane of P, in the order in which its columns are counted."""
    plane = load(at.planes, m * LANES)
    return by_bit(plane) if turned else plane


def of_slices(counts: np.ndarray, counter_slices: np.ndarray, slices: int) -> np.ndarray:
    """`[digit, slice, class, bin]` of counts `[thread, digit, counters, class, bin, 8]`. Args: counter_slices, of `layout.Counted`."""
    total = counts.sum(0)
    found = np.zeros((len(total), slices, *total.shape[2:4]), np.int64)
    for (i, each), k in np.ndenumerate(counter_slices):
        if k >= 0:
            found[:, k] += total[:, i, ..., each]
    return found
