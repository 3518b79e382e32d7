"""Cells that are stuck, whatever is programmed: by probability, and by a map."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..storage.files import load_array


def check(stuck_on: float, stuck_off: float) -> None:
    """Raises: ValueError for what is no probability, or for two that sum above 1."""
    for key, value in (("stuck_on", stuck_on), ("stuck_off", stuck_off)):
        if not 0 <= value <= 1:  # NaN fails too
            raise ValueError(f"{key} is {value!r}; allowed are probabilities from 0 to 1")
    if stuck_on + stuck_off > 1:
        raise ValueError(f"stuck_on {stuck_on!r} and stuck_off {stuck_off!r} sum above 1")


def load_mask(mask: np.ndarray | str | Path | None) -> np.ndarray | None:
    """A map of stuck cells as int8; a path is a .npy file, or text with commas.

    Raises: ValueError, naming the file, for one that cannot be read or holds anything but -1 (off), 0 and 1 (on).
    """
    if mask is None:
        return None
    where = "stuck_mask"
    if isinstance(mask, (str, Path)):
        where = str(mask)
        try:
            mask = load_array(where) if where.endswith(".npy") else np.loadtxt(where, delimiter=",", ndmin=2)
        except (ValueError, OSError) as error:
            raise ValueError(f"{where}: no mask of cells ({error})") from None
    values = np.asarray(mask)
    if values.size == 0 or values.ndim > 3 or not np.isin(values, (-1, 0, 1)).all():
        raise ValueError(f"{where}: empty, of more than three dimensions, or values other than -1 (stuck off), 0 and 1 (stuck on)")
    return values.astype(np.int8)


def check_mask(mask: np.ndarray, lines: int) -> None:
    """Raises: ValueError for a map that is none of outputs of so many lines, 2 of pairs, else 1."""
    wanted, what = ("[word line, output, 2]", "pairs") if lines == 2 else ("[word line, output]", "cells beside a reference")
    if mask.ndim > 1 and mask.shape[2:] != (2,) * (lines - 1):
        raise ValueError(f"stuck_mask has shape {list(mask.shape)}; of {what} {wanted} is expected")


def on_arrays(mask: np.ndarray, arrays: Sequence[tuple[int, int]], lines: int) -> np.ndarray:
    """A map of an array, see `check_mask`, over the rows (first, last + 1) of each of some arrays of so many bit lines, those of a pair
    side by side: int8 `[rows, lines]`. It begins anew where an array is larger; one of one dimension goes on from row to row."""
    def of_one(rows):
        if mask.ndim < 2:
            return np.resize(mask, (rows, lines))
        flat = mask.reshape(len(mask), -1)
        return flat[np.arange(rows)[:, None] % flat.shape[0], np.arange(lines) % flat.shape[1]]

    return np.concatenate([of_one(stop - start) for start, stop in arrays])


def apply(cells: np.ndarray, off: np.ndarray, on: np.ndarray, stuck_off: float, stuck_on: float, mask: np.ndarray | None,
          generator: np.random.Generator) -> np.ndarray:
    """Cells with faults, uS. One uniform number a cell is drawn where a probability is not zero, else none.

    Args: cells, uS; off, on, what stuck cells have, uS, broadcast; mask, repeated over the cells in row-major order, goes before
        the probabilities.
    """
    if stuck_on > 0 or stuck_off > 0:
        uniform = generator.random(cells.shape)
        cells = np.where(uniform < stuck_on, on, cells)
        cells = np.where((uniform >= stuck_on) & (uniform < stuck_on + stuck_off), off, cells)
    if mask is not None:
        stuck = np.resize(mask, cells.shape)
        cells = np.where(stuck > 0, on, np.where(stuck < 0, off, cells))
    return cells
