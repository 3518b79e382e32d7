"""The thresholds of converters by a table, and of those whose thresholds are their own (`arrays.circuits`), as tables for
`cells_compared`: of whole numbers x, which are reads brought between the smallest and the largest that thresholds tell apart.

Only thresholds between the smallest and the largest x of a block of columns come into question: a table of this block says which, for 2^8
spans of x. One for all blocks would have the most unlike of thousands of converters in it.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections import namedtuple

import numpy as np
import torch

from ....arrays.converter import Converter
from ....arrays.mapping import MappedLayer
from ....kernels.simd import has_byte_tables
from ... import accumulator_dtype
from ...reach import read_range
from ..vectors.picks import LARGE_TREE, SMALL_TREE
from ..vectors.wide import BIAS, WIDE
from ..whole.choice import SHORT_ROWS, may
from .cells_forms import runs_of_digits

NEVER = 2**15 - 1  # in a tree: a threshold that no read reaches
MOST_BYTES = 2**31  # of the thresholds of a layer
SPANS = 8  # bits of the number of one
GRAIN = 2**7  # of what sums of 16 bits begin at, which is doubled for each bit of a digit but one

# Of a kind of read: x is u brought between LOW and HIGH, less LOW; SPAN, bits of x within a span; FIRST, where its thresholds begin in
# `thresholds`, and APART, how far those of one block of columns are from the next; SPANS_AT and SPANS_APART, the same in `spans`; CODES,
# where its numbers begin in `worths` and `rises`; FACTOR, what values are multiplied by; START, what a sum of 16 bits begins at, and FLOOR,
# where it stands for LOW; RISE, what all codes but the lowest are worth more than the one before, 0 where these are not alike; IDLE and
# IDLE_APART, like FIRST and APART, of `idle`.
LOW, HIGH, SPAN, FIRST, APART, CODES, SPANS_AT, SPANS_APART, FACTOR, START, FLOOR, RISE, IDLE, IDLE_APART = range(14)
FIELDS = 14
TOGETHER = 2  # thresholds that sums of 16 bits are compared with in turn: behind the last one stand so many that nothing reaches

# narrow       whether 16 bits hold sums of cells, what reads have besides and sums of codes: blocks are tiles of 128 columns, 64 paired
#              shorts and 64 more, and values hold FACTOR, over `worth`
# short        whether 16 bits hold x
# idle         of each kind `[group, array, block of columns, column]`, int16 where narrow, else int32: what the code of 0 is worth
# silent       whether it is worth 0 everywhere
# kinds        int64 `[digit, slice, class, field]`
# thresholds   of each kind `[group, array, block of columns, threshold, column]`, uint16 or int32, in x
# worths       what the codes of a kind are worth, int64; rises: by how much the next one is worth more
# spans        int32 `[group, array, block of columns, span, 2]` of each kind: thresholds that all x of a span have reached, and that none
#              is beyond
# worth        what values of each slice are worth, int64; parts: see `cells_narrow.Narrow`
# levels       of the trees for `cells_trees`, which stand in the place of thresholds: FIRST, where those of a kind begin, and APART, how
#              far one is from the next, int16 `[group, array, column, 2^levels]` of x - 2^15, paired where narrow; 0: there are none
# tree_values  what codes are worth, int16 `[digit, slice, 2^levels]`, over what all of them are multiples of; scales: that, over `worth`,
#              int64 `[digit, slice]`
# run_of       of each digit: the number of its run, digits that have the same converters and whose sums 16 bits hold
Compared = namedtuple("Compared", "narrow short idle silent kinds thresholds worths rises spans worth parts levels tree_values "
                                  "scales run_of")
NOTHING_COMPARED = Compared(False, True, np.zeros(0, np.uint8), True,
                            *(np.zeros(0, kind) for kind in (np.int64, np.uint8, np.int64, np.int64, np.int32)),
                            np.zeros(0, np.int64), np.zeros(1, np.int64), 0, np.zeros(0, np.int16), *[np.zeros(0, np.int64)] * 2)


def unfit(layer: MappedLayer) -> str | None:
    """Why a layer whose codes follow from thresholds cannot be run so, or None."""
    spec = layer.spec
    kinds = list(np.ndindex(len(spec.digit_bits), len(spec.slice_bits), layer.classes))
    columns = len(layer.arrays) * layer.geometry.groups * _blocks(layer, WIDE) * WIDE
    codes = {(k, layer.converter(z, k, j)): layer.converter(z, k, j).q_max for z, k, j in kinds}
    if (size := 4 * columns * sum(codes.values())) > MOST_BYTES and layer.readout is not None:
        return f"the thresholds of its converters take {size / 2**30:.0f} GB, which are too many"
    largest = sum(layer.converter(z, k, j).largest << (spec.dac_bits * z + spec.cell_bits * k) for z, k, j in kinds)
    if largest >= 2**31 or max(high - low for low, high in map(read_range, itertools.repeat(layer), range(len(spec.slice_bits)))) >= 2**31:
        return "codes or reads that 32 bits do not hold"
    return None


def _blocks(layer, columns):
    return -(-len(layer.w_codes) // layer.geometry.groups // columns)


class ComparedForms:
    """The thresholds of a layer whose ranges are fixed, in the reads that there can be.

    Attributes: narrow, see `Compared`; levels, of the trees that it may have, 0 where it has none: where bits follow n, converters have
    more than 8 bits, trees do not fit in MOST_BYTES, 16 bits do not hold what is compared, or there is no AVX-512 VBMI; spread, by
    about how many thresholds those of columns differ, as a power of two.
    """

    def __init__(self, layer: MappedLayer) -> None:
        spec, self.layer = layer.spec, layer
        self._shape = shape = len(spec.digit_bits), len(spec.slice_bits), layer.classes
        self._values = {}
        for z, k, j in np.ndindex(shape):
            converter = layer.converter(z, k, j)
            added = added_by_codes(converter)
            self._values[z, k, j] = added << spec.dac_bits * z if converter.bits else 0 * added
        self._biases, (self._worth, self._parts) = _biases(layer), _sums_of_codes(self._values, shape, spec.cell_bits)
        self._short = all(high - low < 2**16 - 1 for _, low, high in self._found.values())
        self.narrow = self._short and self._biases is not None and self._worth is not None and may(SHORT_ROWS)
        bits = max((converter.bits for _, converter in self._found), default=0)
        apart = [np.ptp(x, axis=2).mean() * x.shape[-1] / (high - low + 1) for x, low, high in self._found.values()]
        self.spread = int(max(apart, default=0)).bit_length()
        levels = SMALL_TREE if bits <= SMALL_TREE else LARGE_TREE
        columns = len(layer.arrays) * layer.geometry.groups * _blocks(layer, 2 * WIDE) * 2 * WIDE
        held = self._short and self._worth is not None and accumulator_dtype(layer) == torch.int32
        fit = bits <= levels and len(self._found) * columns * 2 ** (levels + 1) <= MOST_BYTES
        self.levels = levels if held and fit and not layer.by_ones and has_byte_tables() else 0

    @functools.cached_property
    def _found(self):
        """`{(slice, converter): thresholds in x, LOW, HIGH}`, kept until there are tables: they are large."""
        found = {}
        for z, k, j in np.ndindex(self._shape):
            converter = self.layer.converter(z, k, j)
            if converter.bits and (k, converter) not in found:
                found[k, converter] = _in_reads(self.layer.thresholds(z, k, j), *read_range(self.layer, k))
        return found

    def tables(self, levels: int = 0) -> Compared:
        """The tables of the kernel. Args: levels, of trees in the place of thresholds: none or those that there may be."""
        layer, spec, shape, found, values = self.layer, self.layer.spec, self._shape, self._found, self._values
        self.__dict__.pop("_found", None)
        biases, worth, parts, short, narrow = self._biases, self._worth, self._parts, self._short, self.narrow
        kinds, tables, spans, places = np.zeros((*shape, FIELDS), np.int64), [], [], {}
        for (k, converter), (x, low, high) in found.items():
            if levels:
                tree, apart = _trees(layer, x, levels, narrow)
                places[k, converter] = low, high, 0, _put(tables, tree), apart, 0, 0
                continue
            span = max(0, (high - low).bit_length() - SPANS)
            table, apart = _table(layer, x, high - low + 1, narrow, np.uint16 if short else np.int32)
            of_spans = _spans(x, span, 2 * WIDE if narrow else WIDE)
            places[k, converter] = low, high, span, _put(tables, table), apart, _put(spans, of_spans), 2**SPANS * (x.size > x.shape[-1])
        codes, of_codes, idle, silent = [], {}, [], True
        for z, k, j in np.ndindex(shape):
            converter = layer.converter(z, k, j)
            own = values[z, k, j] // (worth[k] if narrow else converter.factor << spec.dac_bits * z)
            key = own.tobytes()
            of_codes[key] = of_codes[key] if key in of_codes else _put(codes, np.append(own, [own[-1]] * TOGETHER))
            rise = np.unique(np.diff(own))
            low, high, span, first, apart, *of_spans = places.get((k, converter), (0,) * 7)
            bias = biases[k] if narrow else 0
            factor = converter.factor << (spec.dac_bits * z + spec.cell_bits * k)
            start = bias >> spec.digit_bits[z] - 1
            rise = int(rise[0]) if len(rise) == 1 else 0
            at_rest = 0, 0
            if j == 0 and converter.bits:  # the class of idle reads, and of others where there is one
                of_columns = own[(found[k, converter][0] <= -low).sum(-1)]
                silent = silent and not of_columns.any()
                block = _in_blocks(layer, of_columns[..., None], 0, narrow, np.int64)
                at_rest = _put(idle, block.ravel()), math.prod(block.shape[3:]) * (of_columns.size > 1)
            kinds[z, k, j] = low, high, span, first, apart, of_codes[key], *of_spans, factor, start, low + bias, rise, *at_rest
        of_trees = self._of_trees(levels) if levels else NOTHING_COMPARED[-3:]
        values = _joined(codes, np.int64)
        worth = (worth if narrow or levels else np.zeros(shape[1], np.int64)) << spec.cell_bits * np.arange(shape[1])
        return Compared(narrow, short, _joined(idle, np.int16 if narrow else np.int32).view(np.uint8), silent, kinds,
                        _joined(tables, np.uint16 if short else np.int32).view(np.uint8), values, np.diff(values, append=0),
                        _joined(spans, np.int32).reshape(-1, 2), worth, parts, levels, *of_trees)

    def _of_trees(self, levels):
        """`Compared.tree_values`, `scales` and `run_of`."""
        digits, slices, _ = self._shape
        tree_values, scales = np.zeros((digits, slices, 2**levels), np.int16), np.zeros((digits, slices), np.int64)
        for z, k in np.ndindex(digits, slices):
            own = self._values[z, k, self._shape[2] - 1]
            common = max(1, np.gcd.reduce(own))
            tree_values[z, k, :len(own)], scales[z, k] = own // common, common // self._worth[k]
        converters = [[self.layer.converter(z, k) for k in range(slices)] for z in range(digits)]
        begins = [z in self._parts or converters[z] != converters[z - 1] for z in range(digits)]
        return tree_values, scales, np.cumsum(begins, dtype=np.int64) - 1


def added_by_codes(converter: Converter) -> np.ndarray:
    """What each code adds, from the lowest one on, int64."""
    return np.asarray(converter.added(np.arange(converter.q_min, converter.q_max + 1)), np.int64)


def as_tree(thresholds: np.ndarray, levels: int) -> np.ndarray:
    """Thresholds that do not fall, `[.., threshold]`, as trees, int16: of each entry i the next ones are 2 i and 2 i + 1."""
    rising = np.full((*thresholds.shape[:-1], 2**levels - 1), NEVER, np.int16)
    rising[..., :thresholds.shape[-1]] = thresholds.clip(-NEVER - 1, NEVER)
    tree = np.full((*thresholds.shape[:-1], 2**levels), NEVER, np.int16)
    for level in range(levels):
        apart = 2 ** (levels - level)
        tree[..., 2**level:2 ** (level + 1)] = rising[..., apart // 2 - 1::apart]
    return tree


def _put(parts, part):
    """The place, in entries, of a part that is put behind the others."""
    parts.append(part)
    return sum(map(len, parts[:-1]))


def _joined(parts, dtype):
    return np.concatenate(parts or [np.zeros(0)]).astype(dtype)


def _in_reads(thresholds, low, high):
    """(thresholds in x, LOW, HIGH) of reads from `low` to `high`: one that none reaches is HIGH - LOW + 1."""
    low, high = max(low, int(min(thresholds.min(), high)) - 1), min(high, int(max(thresholds.max(), low)))
    return (thresholds.clip(low, high + 1) - low).astype(np.int64), low, high


def _table(layer, x, beyond, narrow, dtype):
    """(thresholds x `[group, array, column, threshold]` in the order of the kernel, how far those of a block are from the next)."""
    x = np.pad(x, [(0, 0)] * 3 + [(0, TOGETHER)], constant_values=2**16 - 1 if narrow else beyond)
    table = _in_blocks(layer, x, beyond, narrow, dtype)
    return table.ravel(), math.prod(table.shape[3:]) * (x.size > x.shape[-1])


def _trees(layer, x, levels, narrow):
    """(trees of thresholds x `[group, array, column, threshold]` in the order of the kernel, how far one is from the next)."""
    tree = as_tree(x - 2**15, levels)
    if x.size == x.shape[-1]:
        return tree.ravel(), 0
    groups, arrays, columns, entries = tree.shape
    tree = np.pad(tree, ((0, 0), (0, 0), (0, _blocks(layer, 2 * WIDE) * 2 * WIDE - columns), (0, 0)))
    return (tree.reshape(groups, arrays, -1, 2, WIDE // 2, entries).swapaxes(3, 4) if narrow else tree).ravel(), entries


def _in_blocks(layer, x, beyond, narrow, dtype):
    """x `[group, array, column, number]`, of each column or of all, as `[group, array, block, number, column]`; paired shorts where
    narrow."""
    (groups, arrays, columns, n), wide = x.shape, 2 * WIDE if narrow else WIDE
    table = np.full((groups, arrays, (1 if columns == 1 else _blocks(layer, wide)) * wide, n), beyond, dtype)
    table[:, :, :table.shape[2] if x.size == n else columns] = x
    table = table.reshape(groups, arrays, -1, wide, n).swapaxes(-1, -2)
    return table.reshape(*table.shape[:-1], 2, 2, WIDE // 2).swapaxes(-1, -2) if narrow else table


def _spans(x, span, wide):
    """Those of thresholds in x of blocks of so many columns, `[block and span, 2]`."""
    ends = np.arange(2**SPANS + 1) << span
    blocks = [x[:, :, first:first + wide] for first in range(0, x.shape[2], wide)]
    lowest, highest = (np.stack([getattr(block, end)(2) for block in blocks], axis=2).reshape(-1, x.shape[-1]) for end in ("min", "max"))
    return np.concatenate([np.stack([np.searchsorted(high, ends[:-1], "right"), np.searchsorted(low, ends[1:] - 1, "right")], axis=1)
                           for low, high in zip(lowest, highest)])


def _biases(layer):
    """What u of each slice is lifted by, so that 16 bits hold it without a sign; None where they do not, or not all that reads have
    besides."""
    readout = layer.readout
    if accumulator_dtype(layer) != torch.int32 or readout.needs_both or readout.depends_on_level:
        return None
    plain = not (readout.noisy or readout.curve or readout.gain is not None or readout.offset is not None)
    biases = []
    for low, high in (read_range(layer, k) for k in range(len(layer.spec.slice_bits))):
        bias = -(-max(-low, 0) // GRAIN) * GRAIN if plain else BIAS
        if low + bias < 0 or high + bias >= 2 * BIAS or high - low >= 2 * BIAS - 1:  # which no read reaches
            return None
        biases.append(bias)
    return biases


def _sums_of_codes(values, shape, cell_bits):
    """(what all values of a slice are multiples of, `[slice]`; the first digits of the runs whose sums of values 16 bits hold, and their
    end), or (None, no runs)."""
    of_slices = [np.concatenate([added for (_, k, _), added in values.items() if k == each]) for each in range(shape[1])]
    worth, largest = np.maximum([np.gcd.reduce(added) for added in of_slices], 1), np.zeros(shape[:2], np.int64)
    for (z, k, _), added in values.items():
        largest[z, k] = max(largest[z, k], np.abs(added).max())
    parts = runs_of_digits(worth, largest, cell_bits)
    return (None, np.zeros(1, np.int64)) if parts is None else (worth, parts)
