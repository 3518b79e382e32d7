"""What a chip does to its reads beside its cells (`Readout`): noise of every read, converters that are not alike.

Noise comes from a generator that is a function of the read's place and nothing else, in integers, and each step of what follows is
one IEEE operation, so that all engines draw the same noise bit for bit, whatever the batch, the threads and the order of images.
"""

import contextlib
import contextvars
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .circuits import Circuits

# A normal number is a sum or difference of four entries of this table, the upper half of 128 integers that lie symmetrically about 0:
# the quantiles of a normal distribution in steps of 1/47, the outermost moved so that the sum has its kurtosis (-0.001 in excess). Its
# distribution is nowhere further than 0.0022 from the normal one. Four columns share four entries, with signs that are orthogonal: of
# normal numbers such sums are independent, and of the table's the joint moments are those of normal ones up to that kurtosis.
UPPER_HALF = (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 25, 26, 27, 28, 29, 30, 31,
              32, 33, 35, 36, 37, 38, 40, 41, 42, 44, 45, 47, 48, 50, 51, 53, 55, 57, 59, 61, 63, 65, 68, 71, 74, 77, 81, 85, 90, 97,
              118, 127)
NORMAL = tuple(-v for v in reversed(UPPER_HALF)) + UPPER_HALF
SIGNS = ((1, 1, 1, 1), (1, -1, 1, -1), (1, 1, -1, -1), (1, -1, -1, 1))  # [sum, entry]
SHARING, APART = 64, 16  # columns whose numbers are alike but for a multiple of APART share entries within blocks of SHARING
DEVIATION = math.sqrt(4 * sum(v * v for v in NORMAL) / len(NORMAL))  # of the sum
STEPS = 2**12  # deviations of reads are multiples of DEVIATION / STEPS: then float32 has room for a product with them and for its rounding
COLUMN_KEY, MIX_1, MIX_2 = 0x9E3779B1, 0x85EBCA6B, 0xC2B2AE35  # odd numbers that spread bits, the last two of MurmurHash3
GOLDEN, MIX_3, MIX_4 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB  # of SplitMix64 (Steele et al., OOPSLA 2014)

OTHER_CALL = 2**44  # added to the numbers of images in each further call of a layer, whose noise is another
_images = contextvars.ContextVar("images", default=(0, None, None))  # number of the first, how many there are, calls of each layer


@dataclass(frozen=True, eq=False)
class Readout:
    """A read's `u` becomes `rint((f(u) + e) gain) + offset` before the ADC, e its noise, f the curve of its bit lines.

    Noise: `e ~ N(0, s^2)`, fresh for each read (image, pixel, array, digit, slice, column), with, in units of u,
    `s^2 = base + sum a^2 (c_0 + c_1 X) + m sum a^2 (c_0 + c_1 R)`, the sums over the rows of the read, X its cells' values and R its
    reference. Variances of independent cells add, so it is drawn once for the read. Of pairs, whose lines hold B together,
    `s^2 = base + sum a^2 (2 c_0 + c_1 B)`.

    Attributes:
        base: variance that every read has, that of the ADC; 0 for none.
        cell_noise: `(c_0, c_1, m)` of each slice: a cell of value X has the variance `c_0 + c_1 X`, and the reference m times that
            of a cell of its value (1: it is a cell in each row, or the other line of a pair; 1/2: the mean of two; 0: it has none).
            None where cells have none.
        seed: up to 64 bits that name seed and layer: the key of the noise.
        gain: float64 `[slices, groups, arrays, out / groups]`, of the converter of each column, about 1; None: all 1.
        offset: int32 of the same shape, in units of u; None: all 0.
        curve: `(b_0, b_1, b_2, z)` of each slice, of bit lines that load themselves (`devices.wires.gate_curve`): with
            `c(S) = S (b_0 + S (b_1 + S b_2))`, `f(u) = rint(c(u + S) - c(S))`, `S = sum a (R + z)` the reference column's current
            (analog), or `f(u) = rint(c(u + S) - c(S)) + rint(c(S) - S)` with `S = z' sum a` (digital, where z' is what values lack
            of the current), by `curve_at`. Of pairs `f(u) = rint(c(S+) - c(S-))`, S+ and S- the currents of the two lines: the first
            formula with `S = S- = (sum a B - u) / 2 + z sum a`. None: straight.
        both: int32 `[slices, groups, rows, out / groups]`, B, what both cells of a pair hold together where `Cells.values` are their
            difference: what noise that depends on the level, and curves, need to know of pairs. None: nothing does.
        circuits: thresholds of the converters, and noise in their steps. None: neither.
    """

    base: float = 0.0
    cell_noise: tuple[tuple[float, float, float], ...] | None = None
    seed: int = 0
    gain: Tensor | None = None
    offset: Tensor | None = None
    curve: tuple[tuple[float, float, float, float], ...] | None = None
    both: Tensor | None = None
    circuits: Circuits | None = None

    @property
    def needs_both(self) -> bool:
        """Whether reads of pairs depend on what both lines hold together."""
        return self.both is not None and (self.curve is not None or self.depends_on_level)

    @property
    def depends_on_level(self) -> bool:
        """Whether the noise of a cell depends on its value."""
        return any(c1 for _, c1, _ in self.cell_noise or ())

    @property
    def noisy(self) -> bool:
        """Whether two reads of the same cells and inputs may differ."""
        return self.base > 0 or self.cell_noise is not None or self.circuits is not None and self.circuits.noise > 0


@contextlib.contextmanager
def image_numbers(first: int, count: int | None = None) -> Iterator[None]:
    """Within the block, batches hold the images of the set from number `first` on: they are part of the key of read noise, so that
    an image sees the same noise in any batch, along whose first dimension images lie. A layer that is called again for them has other
    noise. Args: count, how many a batch holds, which layers need to know whose input has several for each image of the network, such as
    the windows of a Swin transformer."""
    with _numbers(first, count, {}):
        yield


@contextlib.contextmanager
def _numbers(*numbers):
    token = _images.set(numbers)
    try:
        yield
    finally:
        _images.reset(token)


@contextlib.contextmanager
def next_call(layer: object) -> Iterator[None]:
    """Within the block, a layer is called once (more) for the images at hand: where `image_numbers` says which they are, calls are told
    apart."""
    first, count, calls = _images.get()
    before = calls.get(id(layer), 0) if calls is not None else 0
    with _numbers(first + before * OTHER_CALL, count, calls):
        yield
    if calls is not None:
        calls[id(layer)] = before + 1


def first_image() -> int:
    """Number in its set of the first image of the batch at hand."""
    return _images.get()[0]


def numbered() -> bool:
    """Whether somebody has given the images at hand their numbers."""
    return _images.get()[2] is not None


def image_count() -> int | None:
    """How many images the batch at hand has, where that is known."""
    return _images.get()[1]


def read_key(seed: int, image: Tensor, counter: Tensor) -> Tensor:
    """64 bits for each read of one column of an array: int64, by SplitMix64. Args: image and counter, int64, of one shape."""
    return _mix(_mix(image * signed(GOLDEN) + signed(seed)) + counter * signed(GOLDEN))


def column_numbers(groups: int, out: int) -> Tensor:
    """What `noise` knows the columns of an array by: int64 `[groups, out]`, each group starting a block of `SHARING`."""
    wide = -(-out // SHARING) * SHARING
    return torch.arange(groups * wide).view(groups, wide)[:, :out]


def noise(variance: Tensor, key: Tensor, column: Tensor) -> Tensor:
    """`rint(N(0, variance))` for reads with these keys and columns: int64.

    Args: variance, float32, of the shape that key (`read_key`) and column (`column_numbers`) have together.
    """
    low, high = key & 0xFFFFFFFF, (key >> 32) & 0xFFFFFFFF
    word = column // SHARING * APART + column % APART
    x = (word * COLUMN_KEY + low) & 0xFFFFFFFF
    x = (x ^ (x >> 16)) * MIX_1 & 0xFFFFFFFF
    x = x ^ high
    x = (x ^ (x >> 13)) * MIX_2 & 0xFFFFFFFF
    x = x ^ (x >> 16)
    table, signs = (torch.tensor(values, dtype=torch.int64, device=x.device) for values in (NORMAL, SIGNS))
    which = column % SHARING // APART
    total = sum(table[(x >> 8 * i) & 127] * signs[which, i] for i in range(4))
    deviation = (variance.clamp_min(0).sqrt() * torch.tensor(STEPS / DEVIATION, dtype=torch.float32)).round() / STEPS
    return (total * deviation.double()).round().long()


def curve_at(curve: tuple[float, ...], start: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`(first, second, third, rise)`, float32, with which `c(u + S) - S = u (first + u (second + u third)) + rise`: one curve for
    each read, the same for all its columns. Args: curve, `Readout.curve` of a slice; start, S, float32."""
    b0, b1, b2 = torch.tensor(curve[:3], dtype=torch.float32, device=start.device)
    bent = start * (3 * b2)
    return b0 + start * (2 * b1 + bent), b1 + bent, b2, start * (b0 + start * (b1 + start * b2)) - start


def fused(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """`x y + z` of float32 tensors, rounded once. Float64 has the product exactly. Where it has not the sum, the one of the two numbers
    beside it that is odd is taken: it lies on the same side of every float32 number and of every middle between two."""
    product, z = x.double() * y.double(), z.double()
    total = product + z
    part = total - product
    error = (product - (total - part)) + (z - part)
    even = total.view(torch.int64) & 1 == 0
    odd = torch.nextafter(total, error.sign() * math.inf)
    return torch.where((error != 0) & even, odd, total).float()


def _mix(x):
    x = x + signed(GOLDEN)
    x = (x ^ ((x >> 30) & (2**34 - 1))) * signed(MIX_3)
    x = (x ^ ((x >> 27) & (2**37 - 1))) * signed(MIX_4)
    return x ^ ((x >> 31) & (2**33 - 1))


def signed(bits: int) -> int:
    """64 bits as the int64 that has them."""
    return (bits & (2**64 - 1)) - (2**64 if bits & 2**63 else 0)
