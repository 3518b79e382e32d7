"""Codes by thresholds with output pixels side by side: all reads of a vector are of one column, so of one converter. Its thresholds are a
tree in registers, and a read goes down it: each level is one look-up and one comparison, where `cells_compared`, whose columns have
thresholds of their own, compares with one after the other.

    i = 1;  on each level  i = 2 i + (u >= tree[i]);  at the end i - 2^levels thresholds are reached

Reads and thresholds are whole numbers, so that this is exact.
"""

from __future__ import annotations

from collections import namedtuple

import numpy as np

from ....arrays.mapping import MappedLayer
from ....kernels.inner import inlined
from ....kernels.simd import int64_at
from ...reach import read_range
from ..grid.cells_thresholds import NEVER, added_by_codes, as_tree
from ..vectors.picks import LARGE_TREE, SMALL_TREE, worth_by_large_tree, worth_by_small_tree

# levels       of a tree
# trees        int16 `[group, array, out, 2^levels]` of each kind of converters, or `[2^levels]` where all are alike
# tree_of      where those of a kind of reads begin, and how far one is from the next, int64 `[digit, slice, 2]`
# code_values  what codes are worth, over what all of a kind are multiples of, int16 `[digit, slice, 2^levels]`
# factors      that number, int64 `[digit, slice]`; 0 without a conversion
Trees = namedtuple("Trees", "levels trees tree_of code_values factors")
NO_TREES = Trees(0, np.zeros(0, np.int16), np.zeros(0, np.int64), np.zeros(0, np.int16), None)


def trees_of(layer: MappedLayer) -> Trees | None:
    """The converters of a layer whose codes follow from thresholds; None where 16 bits do not hold its reads or what codes are
    worth."""
    spec = layer.spec
    kinds = len(spec.digit_bits), len(spec.slice_bits)
    if any(low < -NEVER or high >= NEVER for low, high in (read_range(layer, k) for k in range(kinds[1]))):
        return None
    bits = max(layer.converter(z, k).bits for z, k in np.ndindex(kinds))
    if bits > LARGE_TREE:
        return None
    levels = SMALL_TREE if bits <= SMALL_TREE else LARGE_TREE
    trees, places, tree_of = [], {}, np.zeros((*kinds, 2), np.int64)
    values, factors = np.zeros((*kinds, 2**levels), np.int64), np.zeros(kinds, np.int64)
    for z, k in np.ndindex(kinds):
        converter = layer.converter(z, k)
        added = added_by_codes(converter)
        if not converter.bits or not added.any():
            continue
        common = np.gcd.reduce(added)
        values[z, k, :len(added)], factors[z, k] = added // common, common << spec.dac_bits * z
        if (k, converter) not in places:
            tree = as_tree(layer.thresholds(z, k), levels)
            places[k, converter] = sum(map(len, trees)), tree.shape[-1] * (tree.size > tree.shape[-1])
            trees.append(tree.ravel())
        tree_of[z, k] = places[k, converter]
    if len(layer.arrays) * np.abs(values).max() >= 2**15:
        return None
    return Trees(levels, np.concatenate(trees or [NO_TREES.trees]), tree_of, values.astype(np.int16), factors)


@inlined
def worth_of_reads(shape, at, x, group, o, t, kind):
    """What the codes of a vector of reads are worth, over its entry of `factors`."""
    converter = (group * shape.arrays + t) * shape.out_channels + o
    tree = at.trees + 2 * (int64_at(at.tree_of, 2 * kind) + converter * int64_at(at.tree_of, 2 * kind + 1))
    values = at.code_values + 2 * (kind << shape.levels)
    return worth_by_small_tree(x, tree, values) if shape.levels == SMALL_TREE else worth_by_large_tree(x, tree, values)
