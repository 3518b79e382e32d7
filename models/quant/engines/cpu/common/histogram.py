"""How often each value of u occurs; 512 columns at a time where there are few values."""

import math

import numba
import numpy as np

from ....arrays.mapping import Bins, MappedLayer
from ....kernels.inner import inlined, inner
from ....kernels.simd import LANES, add_ones, int64_at, load, set_threads, splat, store
from .layout import RUN, SLICE

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
    stands in one array: leaf i of one level becomes the leaves 2 i and 2 i + 1 of the next.
    """
    most = read.ones * ((1 << shape.cell_bits) - 1)
    store(at.leaves, 0, splat(-1))
    size = 1
    for m in range(read.depth - 1, -1, -1):
        plane = load(at.planes, m * LANES)
        for i in range(size - 1, -1, -1):
            leaf = load(at.leaves, i * LANES)
            one = leaf & plane
            if 2 * i < most >> m:
                store(at.leaves, (2 * i + 1) * LANES, one)
            store(at.leaves, 2 * i * LANES, leaf ^ one)
        size = (most >> m) + 1
    for run in range(int64_at(at.run_start, block), int64_at(at.run_start, block + 1)):
        k = int64_at(at.runs, RUN * run + SLICE)
        columns = load(at.run_columns, run * LANES)
        zero = -int64_at(at.reference, k) * read.ones - at.first_bin
        of_class = read.kind - read.digit * shape.classes
        first = ((read.digit * shape.slices + k) * shape.classes + of_class) * at.bins + zero
        for p in range(min(size, (at.bins - 1 - zero) // shape.read_scale + 1)):  # slices of fewer bits end earlier
            add_ones(at.counts, first + shape.read_scale * p, load(at.leaves, p * LANES) & columns)
