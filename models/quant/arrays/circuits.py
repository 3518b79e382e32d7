"""Converters as circuits (`Circuits`): the thresholds of each physical converter, drawn once for a chip, and noise of its comparator.

An ideal threshold lies in the middle between two codes, or where a table has it (`transfer`). Threshold i = 1 .. N, N = 2^B - 1, of a
converter of B bits lies off by three parts, in steps (LSB):

    a_1 sin(pi x) + a_2 sin(2 pi x)      x = (i - 1) / (N - 1), a ~ N(0, inl^2). The INL, smooth: a bow, which makes a second harmonic,
                                         and an S, which makes a third. Over codes and converters its mean square is inl^2.
    sum_(j < i) e_j - x sum_j e_j        e_j ~ N(0, dnl^2), j = 1 .. N - 1. The DNL: code j is wider than a step by e_j, independent
                                         of the others, as of a ladder of resistors. Their sum is an INL too.
    2^B sum_b i_b C_b / C - i            C_b ~ N(2^b, 2^b mismatch^2). The capacitors of a SAR, 2^b units each, that the bits i_b of i
                                         switch. C is the sum of all, with one unit more.

The first two leave the first and the last threshold in place: else they would be offset and gain. INL and DNL by end points: IEEE Std
1241-2010. Capacitors of units that are not alike: Fredenburg and Flynn, IEEE TCAS I 59 (7), 2012.

Where thresholds do not rise, a conversion finds its code as a SAR does, by the middle one first. Some codes are missing then. A planned
conversion of fewer bits than `adc_max_bits` stops early: it has every `2^s`-th threshold of the converter.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .converter import Converter


@dataclass(frozen=True, eq=False)
class Circuits:
    """What the converters of a layer on a chip are.

    Attributes:
        inl, dnl: standard deviations, in steps, see above.
        mismatch: relative standard deviation of a unit capacitor.
        noise: standard deviation, in steps, of what each conversion adds to its read: the input-referred noise of the comparator. It is
            `Readout.base` for a step of one level.
        shape: how many there are, (groups, arrays, of one slice of an array).
        columns: neighbouring ones that share a converter.
        draws: the generator of what is drawn of slice k and converters of so many bits.
    """

    inl: float
    dnl: float
    mismatch: float
    noise: float
    shape: tuple[int, int, int]
    columns: int
    draws: Callable[[int, int], np.random.Generator]

    @property
    def moved(self) -> bool:
        """Whether thresholds are not where they should be."""
        return bool(self.inl or self.dnl or self.mismatch)

    def deviations(self, k: int, bits: int) -> np.ndarray:
        """How far the thresholds of slice k lie from where they should, of converters of so many bits, in steps: float64
        `[*shape, 2^bits - 1]`."""
        draws, n = self.draws(k, bits), 2**bits - 1
        x = np.linspace(0, 1, n)
        bend, units = draws.standard_normal((*self.shape, 2)), draws.standard_normal((*self.shape, bits + 1))
        shapes = np.sin(np.pi * np.outer([1, 2], x))
        shapes[:, [0, -1]] = 0  # where a sine of pi, which is no whole multiple of it, is not
        moved = self.inl * bend @ shapes
        if self.mismatch:
            capacitors = 2.0 ** np.append(np.arange(bits), 0)
            capacitors = capacitors + self.mismatch * np.sqrt(capacitors) * units
            on = np.arange(1, n + 1) >> np.arange(bits)[:, None] & 1
            moved += 2**bits * (capacitors[..., :-1] @ on) / capacitors.sum(-1, keepdims=True) - np.arange(1, n + 1)
        if self.dnl and n > 1:
            walk = np.cumsum(draws.normal(0, self.dnl, (*self.shape, n - 1)), axis=-1)
            moved[..., 1:] += walk - x[1:] * walk[..., -1:]
        return moved


def first_reached(converter: Converter, unit: float, moved: np.ndarray | None = None, bits: int = 0) -> np.ndarray:
    """The smallest read u that reaches each threshold of a converter, whole numbers in float64 `[..., thresholds]` that do not fall.

    Args: unit, value of u = 1; moved, `Circuits.deviations` of converters of so many bits. One that lies at a threshold reaches it if that
        begins an even code.
    """
    steps, apart = converter.thresholds, 2 ** (bits - converter.bits)
    if moved is not None:
        steps = _searched(steps + moved[..., apart - 1::apart][..., :len(steps)] / apart, converter.bits)
    u = steps * (converter.delta / unit)
    begins_odd = (converter.q_min + 1 + np.arange(u.shape[-1])) % 2 == 1
    u = np.ceil(u) + (begins_odd & (u == np.ceil(u)))
    return np.minimum.accumulate(u[..., ::-1], axis=-1)[..., ::-1]


def _searched(thresholds: np.ndarray, bits: int) -> np.ndarray:
    """Where thresholds lie for a search that compares with the middle one of 2^bits - 1 first, then with that of the half that is left."""
    beyond = 2**bits - 1 - thresholds.shape[-1]
    found = np.pad(thresholds, [(0, 0)] * (thresholds.ndim - 1) + [(1, 1 + beyond)], constant_values=np.inf)
    found[..., 0] = -np.inf
    for apart in 2 ** np.arange(bits)[::-1]:
        ends = found[..., ::2 * apart]
        found[..., apart::2 * apart] = found[..., apart::2 * apart].clip(ends[..., :-1], ends[..., 1:])
    return found[..., 1:thresholds.shape[-1] + 1]
