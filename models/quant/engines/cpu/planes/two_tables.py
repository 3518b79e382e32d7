"""Converters by a table on ideal cells, in two passes over the bit planes: a value of 16 bits is a byte and 256 times another, and a
table of bytes gives the codes of 64 columns by one instruction (`codes`).

Values are taken less that of a read of 0, which is added at the end, so that reads which no row is on for need no work.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from ....arrays.mapping import MappedLayer
from ....kernels.simd import has_byte_tables
from ... import accumulator_dtype
from ..whole.choice import TABLES, may
from .converter import Adc, fits, most_ones_of_table, no_adc, or_beyond, reads_of_table


class TwoTables(NamedTuple):
    """Accumulators are `scale (those of low + 256 those of high) + constant`. Attributes: low, high, ADCs of the passes; constant, int64
    `[step]`."""

    low: Adc
    high: Adc
    scale: int
    constant: np.ndarray


def two_tables(layer: MappedLayer) -> TwoTables | None:
    """The tables of a layer of ideal cells whose codes follow from one, or None where bytes do not hold all reads and values."""
    spec, slices = layer.spec, range(len(layer.spec.slice_bits))
    if not (has_byte_tables() and may(TABLES) and fits(layer)) or layer.classes > 1 or spec.planned:
        return None
    if accumulator_dtype(layer) != torch.int32:
        return None
    found = [_values(layer, k) for k in slices]
    if None in found:
        return None
    values, zeros, quiet = zip(*found)
    scale = max(int(np.gcd.reduce(values, axis=None)), 1)
    values = np.array(values) // scale
    low = (values + 128) % 256 - 128
    high = (values - low) // 256
    if np.abs(2 * high + 1).max() > 255 or 128 * len(layer.arrays) >= 2**15:
        return None
    place = sum(1 << spec.dac_bits * z for z in range(len(spec.digit_bits))) * len(layer.arrays)
    constant = np.array([place * sum(zeros[k] << spec.cell_bits * k for k in ks) for _, ks in layer.delta_groups], np.int64)
    return TwoTables(*(_adc(layer, tables, np.array(quiet)) for tables in (low, high)), scale, constant)


def _values(layer, k):
    """(what codes are worth more than that of a read of 0, as a `converter.code_table`, what that is worth, the u around 0 that are worth
    the same), or None where a table does not hold all reads."""
    spec, converter = layer.spec, layer.converter(0, k)
    thresholds, worth = layer.thresholds(0, k)[0, 0, 0], np.asarray(converter.added(np.arange(converter.q_max + 1)), np.int64)

    def value(u):
        return worth[np.searchsorted(thresholds, u, "right")]

    zero, (first, last), analog = int(value(0)), layer.u_range(k), spec.reference == "analog"
    table = value(reads_of_table(analog)) - zero
    beyond = table[:, 0].max() <= value(first) - zero and table[:, -1].min() >= value(last) - zero
    if layer.most_ones(-1) > most_ones_of_table(beyond, layer.reference_twice[k], analog, 2 ** spec.slice_bits[k] - 1):
        return None
    u = np.arange(first, last + 1)
    return table, zero, or_beyond(u[value(u) == zero], first, last)


def _adc(layer, tables, quiet):
    adc = no_adc(layer)
    adc.codes.reshape(-1, *tables.shape)[:] = tables  # for each digit
    adc.table_ones[:] = 2**31
    adc.quiet[:] = quiet[:, 0].max(), quiet[:, 1].min()
    return adc
