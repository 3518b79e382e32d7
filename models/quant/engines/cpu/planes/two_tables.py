"""Converters by a table on ideal cells, in two passes over the bit planes: a value of 16 bits is a byte and 256 times another, and a
table of bytes gives the codes of 64 columns by one instruction (`codes`).

Values are taken less that of a read of 0, which is added at the end, so that reads which no row is on for need no work.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from ....arrays.mapping import MappedLayer
from ....kernels.simd import aligned, has_byte_tables
from ... import accumulator_dtype
from ..whole.choice import TABLES, may
from .converter import ALL, Adc, fits, most_ones_of_table, no_adc, reads_of_table


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
    scale = max(int(np.gcd.reduce(np.concatenate([values.ravel() for values, _, _ in found]))), 1)
    low, high, quiet = [], [], []
    for values, _, silent in found:
        values = values // scale
        low.append((values + 128) % 256 - 128)
        high.append((values - low[-1]) // 256)
        quiet.append(silent)
    if np.abs(2 * np.array(high) + 1).max() > 255 or 128 * len(layer.arrays) >= 2**15:
        return None
    constant = np.zeros(len(layer.delta_groups), np.int64)
    place = sum(1 << spec.dac_bits * z for z in range(len(spec.digit_bits))) * len(layer.arrays)
    for step, (_, ks) in enumerate(layer.delta_groups):
        constant[step] = sum((found[k][1] << spec.cell_bits * k) * place for k in ks)
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
    silent = u[value(u) == zero]
    return table, zero, (ALL[0] if silent[0] == first else silent[0], ALL[1] if silent[-1] == last else silent[-1])


def _adc(layer, tables, quiet):
    adc, digits = no_adc(layer), len(layer.spec.digit_bits)
    codes = aligned(digits * len(tables) * 256, np.empty(0, np.int8)).reshape(digits, len(tables), 2, 128)
    codes[:] = np.array(tables)
    both = np.broadcast_to([quiet[:, 0].max(), quiet[:, 1].min()], (digits, 2))
    return adc._replace(codes=codes.reshape(-1, 2, 128), table_ones=np.full(digits, 2**31), quiet=both.astype(np.int64))
