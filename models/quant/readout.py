"""What a chip does to its reads beside its cells (`Readout`): noise of every read, converters that are not alike.

All of it is arithmetic on integers, or float64 that is rounded once, so that engines agree bit for bit.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

_first_image = contextvars.ContextVar("first_image", default=0)


@dataclass(frozen=True, eq=False)
class Readout:
    """A read's `u` becomes `rint(u gain) + offset + e` before the ADC, e its noise.

    Noise: `e ~ N(0, s^2)`, fresh for each read (image, pixel, array, digit, slice, column), with
    `s^2 = base + c_0 sum a^2 + c_1 sum a^2 x` in units of u, the sums over the rows and cells of the read, those of its reference
    column among them. Variances of independent cells add, so it is drawn once for the read.

    Attributes:
        base: variance that every read has, that of the ADC: `(2^F adc_noise)^2`; 0 for none.
        cell_noise: `(c_0, c_1)` of each slice in units of levels squared (`Device.cell_noise`); None where cells have none.
        seed: 64 bits that name seed and layer: the key of the noise.
        gain: float64 `[slices, groups, arrays, out / groups]`, of the converter of each column, about 1; None: all 1.
        offset: int32 of the same shape, in units of u; None: all 0.
    """

    base: float = 0.0
    cell_noise: tuple[tuple[float, float], ...] | None = None
    seed: int = 0
    gain: Tensor | None = None
    offset: Tensor | None = None

    @property
    def noisy(self) -> bool:
        """Whether two reads of the same cells and inputs may differ."""
        return self.base > 0 or self.cell_noise is not None


@contextlib.contextmanager
def image_numbers(first: int) -> Iterator[None]:
    """Within the block, batches hold the images of the set from number `first` on: they are part of the key of read noise, so that
    an image sees the same noise in any batch."""
    token = _first_image.set(first)
    try:
        yield
    finally:
        _first_image.reset(token)


def first_image() -> int:
    """Number in its set of the first image of the batch at hand."""
    return _first_image.get()
