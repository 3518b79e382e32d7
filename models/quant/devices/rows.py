"""All cells of one weight, measured together (`JointRows`)."""

from dataclasses import dataclass, field

import numpy as np

from .tables import Cells, Samples


def digits(code: np.ndarray, slice_bits: tuple[int, ...]) -> np.ndarray:
    """Cell levels of weight codes, LSB slice first, `[slices, *code.shape]`: `W = sum_k 2^(bits below k) C_k`."""
    places = np.cumsum([0, *slice_bits[:-1]])
    return np.stack([(code >> int(place)) & (2**bits - 1) for place, bits in zip(places, slice_bits)])


def split(w_bits: int, cells: int) -> tuple[int, ...] | None:
    """Bits of each of `cells` cells of a weight, LSB first, all the same but for the last; None where there is no such split."""
    size = -(-w_bits // cells)
    parts = tuple(min(size, w_bits - start) for start in range(0, w_bits, size))
    return parts if len(parts) == cells else None


@dataclass(frozen=True, eq=False)
class JointRows:
    """Measured rows of each weight code.

    Attributes:
        name: whose, for messages.
        rows: uS; `rows[W]` is `[samples, cells]`, the most significant cell first.
        slice_bits: bits of each cell, the least significant first.
    """

    name: str
    rows: tuple[np.ndarray, ...]
    slice_bits: tuple[int, ...]
    _laws: dict[int, Samples] = field(default_factory=dict, init=False, repr=False)

    def pools(self, bits: int) -> list[np.ndarray]:
        """All reads, uS, of cells of so many bits, by their level `[2^bits]`.

        Raises: ValueError where no cell has so many bits.
        """
        if bits not in self.slice_bits:
            raise ValueError(f"{self.name} has cells of {' and '.join(map(str, sorted({*self.slice_bits})))} bits, not of {bits}")
        pools = [[] for _ in range(2**bits)]
        for w, rows in enumerate(self.rows):
            for k, level in enumerate(digits(np.int64(w), self.slice_bits)):
                if self.slice_bits[k] == bits:
                    pools[level].append(rows[:, -1 - k])
        return [np.concatenate(pool) for pool in pools]

    def law(self, bits: int) -> Samples:
        """The cells of so many bits apart from their weights. Raises: as `pools`."""
        if bits not in self._laws:
            pools = self.pools(bits)
            self._laws[bits] = Samples(self.name, [Cells(None, (), np.array([pool.mean() for pool in pools]), [pools])])
        return self._laws[bits]

    def draw(self, w_codes: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """A row, with replacement, for each weight: uS `[slices, *w_codes.shape]`, LSB slice first."""
        uniform = generator.random(w_codes.shape)
        cells = np.empty((*w_codes.shape, len(self.slice_bits)))
        for w in np.unique(w_codes):
            here, rows = w_codes == w, self.rows[w]
            cells[here] = rows[(uniform[here] * len(rows)).astype(np.intp), ::-1]
        return np.ascontiguousarray(np.moveaxis(cells, -1, 0))
