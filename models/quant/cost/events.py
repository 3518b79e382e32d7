"""How often each part of the hardware is used (`events`): what was counted, on the arrays and the converters of a setting."""

import math
from collections import Counter
from dataclasses import dataclass

import numpy as np

from ..layers.crossbar import CrossbarLayer
from ..network.counts import LayerCounts
from .columns import columns, digit_ones, level_sums


@dataclass(frozen=True)
class Events:
    """What one layer does for all the images that were counted, on arrays of `rows x width` cells.

    A digit of d bits is applied bit by bit, bit b for `2^b` pulses whose currents are integrated before the converter sees them
    (NeuRRAM; with 1-bit digits it is one pulse).

    Attributes:
        arrays: of each row block as many as hold its outputs. rows: word lines of each. reference_lines: bit lines of references in each,
            beside its `width`.
        cells_used, cells_allocated: those that hold weights, and all of the arrays but the references'.
        level_pulses: for each slice, `(bits of its cells, n, m)`: sums of pulses over all cells on word lines that are on, n counting
            each pulse once (what G_min draws), m as often as the level of its cell (what dG draws).
        line_ones, line_bits: word lines that are switched on; word lines times bits applied, on or not.
        column_bits, column_pulses: bit lines times bits applied, and times pulses.
        array_bits: arrays times bits applied.
        reads, idle_reads: a read is one digit on the rows of one array; idle, no row is on.
        conversions: `{bits: how many}` that are made; 0 of bits that no read took.
        shift_adds: one for each conversion. adds: of the sums of arrays, and of what a digital reference takes off.
        buffer_bits: codes that are fetched for each output pixel, and those of the outputs.
        pixels, pulses: output pixels; for each digit its pulses.
        conversions_in_turn: for each digit `{bits: how many}` that one converter makes for an output pixel, one after another; the mean
            over its reads.
        multiplications: products of a weight and an input.
        input_bits: of the codes of the layer's input, of an image, in the call that has most of them.
        counts_ones: whether each array counts the ones on its word lines, on which its conversions depend.
    """

    arrays: int
    rows: int
    reference_lines: int
    cells_used: int
    cells_allocated: int
    level_pulses: tuple[tuple[int, int, int], ...]
    line_ones: int
    line_bits: int
    column_bits: int
    column_pulses: int
    array_bits: int
    reads: int
    idle_reads: int
    conversions: dict[int, int]
    shift_adds: int
    adds: int
    buffer_bits: int
    pixels: int
    pulses: tuple[int, ...]
    conversions_in_turn: tuple[dict[int, float], ...]
    multiplications: int
    input_bits: float
    counts_ones: bool = False  # not in what was stored before there was the choice

    @property
    def most_bits(self) -> int:
        """Bits of the layer's converters: the most that it asks for."""
        return max(self.conversions, default=0)


def check_width(layer: CrossbarLayer, width: int) -> None:
    """Refuse arrays in which one weight has no room. Raises: ValueError."""
    if columns(layer).of_output > width:
        raise ValueError(f"arrays of {width} columns do not hold one weight of {columns(layer).of_output} cells: take more columns, or "
                         "more cell bits")


def events(counts: LayerCounts, layer: CrossbarLayer, width: int, columns_per_adc: int, skip_idle: bool = False) -> Events:
    """The events of one layer on its hardware. Args: width, columns of an array; skip_idle, whether idle reads are not converted whatever
    the layer's hardware says.

    An output is never cut between arrays: each holds `floor(width / columns of an output)` of them.

    Raises: ValueError for arrays too narrow for one weight, a layer whose ADC has no plan yet, and arrays whose idle reads were not
        counted.
    """
    check_width(layer, width)
    spec, lines, groups = layer.spec, columns(layer), counts.groups
    out, taps = counts.w_shape[0] // groups, counts.w_shape[2] * counts.w_shape[3]
    tall, outputs_each = len(layer.arrays), width // lines.of_output
    wide = -(-out // outputs_each)
    arrays, rows = groups * tall * wide, groups * counts.w_shape[1] * taps
    skips = bool(skip_idle or spec.skips_idle)
    classes = max(layer.classes, 1 + skips)
    bits = _bits(layer, classes, skips)
    starts = np.cumsum([0, *spec.digit_bits])
    pulses_of_bit = [1 << (b - first) for first, size in zip(starts, spec.digit_bits) for b in range(first, first + size)]
    pulses = tuple(2**size - 1 for size in spec.digit_bits)

    on = np.tensordot(pulses_of_bit, counts.ones, 1)  # pulses on each row, [groups, rows]
    sums = level_sums(digit_ones(layer), lines.slice_bits)
    level_pulses = tuple(
        (bits, int(on.sum()) * (out * lines.lines + wide * reference), int((on * total).sum()) + int(on.sum()) * wide * level)
        for bits, total, (reference, level) in zip(lines.slice_bits, sums, lines.reference))
    bit_lines = groups * tall * (out * lines.of_output + wide * lines.of_reference)

    of_class, shares, conversions = counts.by_class(spec, classes), counts.shares(spec, classes), Counter()
    for (z, _, j), b in np.ndenumerate(bits):
        conversions[int(b)] += int(of_class[z, j]) * out
    conversions.pop(0, None)  # 0 bits make none
    adcs, reads = -(-width // columns_per_adc), int(of_class[0].sum())  # of one digit
    in_turn = tuple(_in_turn(*each, min(out, outputs_each), adcs) for each in zip(bits, shares))
    adds = counts.pixels * counts.w_shape[0] * tall
    if spec.reference == "digital":  # the rows that are on, counted for each read, and what is taken off each output behind the ADC
        adds += reads * len(spec.digit_bits) + counts.pixels * counts.w_shape[0] * (not spec.moves_range)
    return Events(
        arrays=arrays, rows=spec.rows, reference_lines=lines.of_reference, cells_used=rows * out * lines.of_output,
        cells_allocated=arrays * spec.rows * width, level_pulses=level_pulses, line_ones=int(counts.ones.sum()) * wide,
        line_bits=counts.pixels * rows * spec.a_bits * wide, column_bits=counts.pixels * bit_lines * spec.a_bits,
        column_pulses=counts.pixels * bit_lines * sum(pulses), array_bits=counts.pixels * arrays * spec.a_bits,
        reads=reads * len(spec.digit_bits), idle_reads=int(counts.reads_of(spec)[:, 0].sum()),
        conversions=dict(sorted(conversions.items())), shift_adds=sum(conversions.values()), adds=adds,
        buffer_bits=(counts.pixels * rows + counts.outputs * counts.w_shape[0]) * spec.a_bits, pixels=counts.pixels, pulses=pulses,
        conversions_in_turn=in_turn, multiplications=counts.multiplications, input_bits=counts.inputs * spec.a_bits,
        counts_ones=layer.classes > 2)


def _bits(layer: CrossbarLayer, classes: int, skips: bool) -> np.ndarray:
    """Bits of the converter for the reads of each digit, slice and class of n, int64 `[digits, slices, classes]`."""
    spec = layer.spec
    if not spec.planned:
        bits = np.full((len(spec.digit_bits), len(columns(layer).slice_bits)), int(spec.adc_bits))
    elif bool((layer.adc_delta > 0).all()):
        bits = layer.adc_bits_plan.cpu().numpy()
    else:
        raise ValueError("this layer's ADC has no plan yet, which its cost depends on; call calibrate(model, batches)")
    bits = np.broadcast_to(bits.reshape(*bits.shape[:2], -1), (*bits.shape[:2], classes)).copy()
    if skips:
        bits[:, :, 0] = 0
    return bits


def _in_turn(bits: np.ndarray, shares: np.ndarray, outputs: int, adcs: int) -> dict[int, float]:
    """Conversions that the busiest converter of an array makes for one digit, in the mean over its reads, shared out evenly over its
    kinds. Args: bits, `[slices, classes]`; shares, of the reads of each class."""
    found = Counter()
    for of_slices, share in zip(bits.T, shares):
        made = [int(b) for b in of_slices if b]
        turns = math.ceil(outputs * len(made) / adcs)
        for b in made:
            found[b] += float(share) * turns / len(made)
    return dict(sorted(found.items()))
