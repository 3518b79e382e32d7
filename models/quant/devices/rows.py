"""All cells of one weight, measured together (`JointRows`)."""

from dataclasses import dataclass, field

import numpy as np

from .lines import check_rise
from .tables import Cells, Samples, drawn


@dataclass(frozen=True, eq=False)
class JointRows:
    """Measured rows of each weight code. What a cell holds of it they do not say: 4-bit weights on two cells may be 2 + 2 bits, or 3 + 1.

    Attributes:
        name: whose, for messages.
        rows: uS; `rows[W]` is `[samples, cells]`, the most significant cell first.
    """

    name: str
    rows: tuple[np.ndarray, ...]
    _laws: dict[int, Samples] = field(default_factory=dict, init=False, repr=False)

    @property
    def splits(self) -> list[tuple[int, ...]]:
        """What the cells of a weight can hold: bits of each, LSB first, all the same but for the last, which has no more. Those in the
        most equal parts come first; no two have cells of the same bits."""
        w_bits, cells = (len(self.rows) - 1).bit_length(), self.rows[0].shape[1]
        parts = (tuple(min(size, w_bits - start) for start in range(0, w_bits, size)) for size in range(1, w_bits + 1))
        return [each for each in parts if len(each) == cells]

    def law(self, bits: int) -> Samples:
        """The cells of so many bits, of all their places in a weight, apart from their weights.

        Raises: ValueError where no cell has so many bits, or the mean of one in some place does not rise with its level.
        """
        if bits not in self._laws:
            places = self._places(bits)
            for cell, levels in places.items():
                check_rise([level.mean() for level in levels], lambda _, cell=cell: f"{self.name}, cell{cell} as one of {bits} bits")
            pools = [np.concatenate(level) for level in zip(*places.values())]
            self._laws[bits] = Samples(self.name, [Cells(None, (), np.array([pool.mean() for pool in pools]), [pools])])
        return self._laws[bits]

    def _places(self, bits):
        """All reads, uS, of cells of so many bits: by their column, the most significant first, and level."""
        split = next((each for each in self.splits if bits in each), None)
        if split is None:
            known = sorted({size for each in self.splits for size in each})
            raise ValueError(f"{self.name} has cells of {' or '.join(map(str, known))} bits, not of {bits}")
        codes, places = np.arange(len(self.rows)), range(0, len(split) * split[0], split[0])[::-1]  # of each column, its lowest bit
        return {column: [np.concatenate([self.rows[w][:, column] for w in np.flatnonzero((codes >> place) % 2**bits == level)])
                         for level in range(2**bits)] for column, place in enumerate(places) if split[-1 - column] == bits}

    def draw(self, w_codes: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """A row, with replacement, for each weight: uS `[slices, *w_codes.shape]`, LSB slice first."""
        return np.ascontiguousarray(np.moveaxis(drawn(self.rows, w_codes, generator)[..., ::-1], -1, 0))
