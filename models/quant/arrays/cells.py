"""What the cells of one layer hold on one chip (`Cells`), as integers on a grid that every engine computes with exactly."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .readout import Readout
from .spec import CrossbarSpec, hardware

MOST_FRACTION_BITS = 12  # of the grid, from 5 bits a cell on together with the cell's own bits
LARGEST_CELL = 2**20  # |value|, so that the sum of a read stays exact in every engine


def fraction_bits(cell_bits: int) -> int:
    """F of the grid `2^-F` levels: 8 up to 4 bits a cell, `12 - b` above. It adds a deviation of `2^-F / sqrt 12` levels."""
    return 8 if cell_bits <= 4 else MOST_FRACTION_BITS - cell_bits


@dataclass(frozen=True, eq=False)
class Cells:
    """The cells of one layer in units of `2^-F` levels.

    Rows are numbered as in `mapping`, (tap, channel), and arrays are ranges of them. A read of array t, digit z and slice k is

        analog reference     v = 2^-F sum over rows of a (values - reference)
        digital reference    v = 2^-F sum over rows of a values, and 2^-F sum over rows of a reference is taken off behind the ADC

    Of pairs of bit lines `values` are the cells of the positive line less those of the negative one, and the reference is 0.

    Attributes:
        values: int32 `[slices, groups, rows, out / groups]`. With a digital reference a cell's off-current is part of its value.
        reference: int32 `[slices, groups, rows]`: the reference column of each array, shared by all its outputs.
        fraction_bits: F.
    Raises: ValueError for other types or shapes, or numbers of 2^20 and more.
    """

    values: Tensor
    reference: Tensor
    fraction_bits: int

    def __post_init__(self) -> None:
        for name, dims in (("values", 4), ("reference", 3)):
            part = getattr(self, name)
            if not isinstance(part, Tensor) or part.dtype != torch.int32 or part.dim() != dims:
                raise ValueError(f"{name} of cells are {_shape(part)}; an int32 tensor of {dims} dimensions is expected")
            if part.numel() and (largest := _largest(part)) >= LARGEST_CELL:
                raise ValueError(f"{name} of cells reach {largest}; below {LARGEST_CELL} is expected")
        if self.reference.shape != self.values.shape[:3]:
            raise ValueError(f"the reference has shape {list(self.reference.shape)}, the cells {list(self.values.shape)}; "
                             f"{list(self.values.shape[:3])} is expected")
        if type(self.fraction_bits) is not int or not 0 <= self.fraction_bits <= MOST_FRACTION_BITS:
            raise ValueError(f"fraction_bits is {self.fraction_bits!r}; allowed are whole numbers from 0 to {MOST_FRACTION_BITS}")

    @property
    def unit(self) -> float:
        """Value of `u = 1` in units of `v`: `2^-F`."""
        return 2.0**-self.fraction_bits

    def weights(self, analog: bool) -> Tensor:
        """What a row adds to `u`: int32 `[slices, groups, rows, out / groups]`."""
        return self.values - self.reference[..., None] if analog else self.values

    def raised(self, off: Sequence[int]) -> "Cells":
        """These with so much more, on their grid, in all cells of each slice and its reference."""
        shift = torch.as_tensor(off, dtype=torch.int32, device=self.values.device)
        return Cells(self.values + shift.view(-1, 1, 1, 1), self.reference + shift.view(-1, 1, 1), self.fraction_bits)

    def u_range(self, analog: bool, arrays: list[tuple[int, int]], drive: int) -> list[tuple[int, int]]:
        """Smallest and largest `u` that any read of each slice can have; `drive`, the largest digit of an input."""
        weights, ends = self.weights(analog), []
        for part in weights:
            low = high = 0
            for start, stop in arrays:
                rows = part[:, start:stop]
                if rows.numel():
                    below = rows.clamp_max(0).sum(1, dtype=torch.int32)  # which holds as many cells as an array may have rows
                    low = min(low, int(below.min()))
                    high = max(high, int((rows.sum(1, dtype=torch.int32) - below).max()))
            ends.append((low * drive, high * drive))
        return ends


@dataclass(frozen=True, eq=False)
class Chip:
    """One layer on one chip.

    Attributes:
        cells: what its cells hold.
        nominal: what they would hold without scatter; ADC ranges are chosen on these. None: ideal cells.
        readout: noise, converters and curve of its reads. None: none of them.
        of_arrays: whether its cells depend on which rows share an array, as with wires and with a map of stuck cells.
        code_sums: `OnArrays.code_sums` of the weight that it was programmed to. None: those of the layer's present weight. Float64 where
            they are no whole numbers.
        of: `OnArrays.version` of the weight that it was programmed to. None: not known.
    """

    cells: Cells
    nominal: Cells | None = None
    readout: Readout | None = None
    of_arrays: bool = False
    code_sums: Tensor | None = None
    of: str | None = None

    def fits(self, old: CrossbarSpec, new: CrossbarSpec) -> bool:
        """Whether the chip that was made for `old` hardware is one of `new`."""
        fixed = hardware("cells")
        own = self.readout is not None and (self.readout.gain is not None or self.readout.circuits is not None)
        if self.of_arrays or own:  # a converter for each array and column, or some
            fixed += (*hardware("arrays"), *["columns_per_adc"] * own)
        if self.readout is not None and self.readout.curve is not None:  # of rows that are on or off
            fixed += hardware("inputs")
        return all(getattr(old, name) == getattr(new, name) for name in fixed)


def _largest(part: Tensor) -> int:
    low, high = part.aminmax()
    return max(int(high), -int(low))


def _shape(part: object) -> str:
    return f"{part.dtype} {list(part.shape)}" if isinstance(part, Tensor) else type(part).__name__
