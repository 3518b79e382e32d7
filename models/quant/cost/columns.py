"""What lies on the bit lines of a layer: how many of them its slices take, and what their cells add up to (`Columns`).

The one place that knows how weights lie on cells. With an offset, a slice of an output is one bit line, and in every array each slice
has a reference column: one line of cells of level `r_k` where that is a level, else (DoReFa) a line of cells of the highest level and
one of the lowest, whose mean is taken. In pairs a slice of an output is two bit lines, and one of its two cells holds the digit.
"""

from dataclasses import dataclass
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from ..arrays.pair import worth
from ..kernels.ones import Ones
from ..layers.crossbar import CrossbarLayer
from ..layers.prepared import Prepared


@dataclass(frozen=True)
class Columns:
    """Attributes:
        slice_bits: bits of the cells of each slice, LSB first.
        lines: bit lines that a slice of an output takes.
        reference: for each slice `(lines, sum of their levels)` of the reference in one array, in each of its rows.
    """

    slice_bits: tuple[int, ...]
    lines: int
    reference: tuple[tuple[int, int], ...]

    @property
    def of_output(self) -> int:
        """Bit lines that an output takes."""
        return self.lines * len(self.slice_bits)

    @property
    def of_reference(self) -> int:
        """Bit lines that the references of an array take."""
        return sum(lines for lines, _ in self.reference)


def columns(layer: CrossbarLayer) -> Columns:
    """The bit lines of a layer on its hardware."""
    slice_bits, pairs = layer.slice_bits, layer.spec.weights == "pair"
    if pairs or layer.spec.reference == "digital":  # what is taken off is on the other line, or computed: no cells hold it
        return Columns(slice_bits, 1 + pairs, ((0, 0),) * len(slice_bits))
    twice = layer.weight_quant.reference_twice(slice_bits)
    return Columns(slice_bits, 1, tuple((1, r // 2) if r % 2 == 0 else (2, r) for r in twice))


def digit_ones(layer: CrossbarLayer) -> np.ndarray:
    """How many cells of each row hold each bit of the numbers that lie on cells: int64 `[bits, groups, rows]`, from which
    `level_sums` makes those of all cells. Counted once for both ways of placing weights, and anew where the weights are others."""
    quantizer = layer.weight_quant
    settings = type(quantizer), quantizer.levels, layer.geometry.groups
    kept = _ONES.setdefault(layer, Prepared())
    codes, numbers = kept.get(settings, list(quantizer.buffers()), layer.w_source, lambda: _digit_ones(layer))
    return numbers if layer.spec.weights == "pair" else codes


_ONES: WeakKeyDictionary[CrossbarLayer, Prepared] = WeakKeyDictionary()


def _digit_ones(layer: CrossbarLayer) -> tuple[np.ndarray, np.ndarray]:
    """Of the codes, and of the numbers that pairs hold."""
    codes, zero_twice, groups = layer.w_codes().cpu(), layer.weight_quant.zero_twice, layer.geometry.groups
    of_pairs = ((2 * torch.arange(256) - zero_twice).abs() // worth(zero_twice)).to(torch.uint8)
    return tuple(_bits(numbers, groups, layer.spec.w_bits) for numbers in (codes, of_pairs[codes.int()]))


def _bits(numbers: Tensor, groups: int, bits: int) -> np.ndarray:
    """Args: numbers, uint8 `[out, in / groups, kh, kw]`."""
    out, channels, kh, kw = numbers.shape
    found = []
    for group in numbers.reshape(groups, out // groups, channels, kh * kw):
        counter = Ones(channels, kh * kw, bits)
        counter.add(group.contiguous())
        found.append(counter.sums.transpose(0, 2, 1).reshape(bits, -1))
    return np.stack(found, 1)


def level_sums(bits: np.ndarray, slice_bits: tuple[int, ...]) -> np.ndarray:
    """`S_k[r]`, the levels of slice k's cells in row r, added up over the outputs: int64 `[slices, groups, rows]`."""
    sums, first = [], 0
    for size in slice_bits:
        sums.append(sum(bits[first + b] << b for b in range(size)))
        first += size
    return np.stack(sums)
