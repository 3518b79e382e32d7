"""Effective cells behind word lines that resist, kept on disk: a solve of a large network takes minutes, reading it seconds.

A file's name is made of everything that the cells in it follow from, so what a file holds is never out of date, and it does not matter
who wrote it. `np.load` opens it: float64 `[groups, rows, lines]`, uS.
"""

import contextlib
import contextvars
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from .files import atomic_write, load_array

_folder: contextvars.ContextVar[Path | None] = contextvars.ContextVar("effective_cells", default=None)


@contextlib.contextmanager
def keep_effective_cells(folder: str | Path | None) -> Iterator[None]:
    """Within the block `program` keeps the effective cells of arrays whose word lines resist as files in this folder, and reads those
    that it finds there. None: it solves them each time."""
    token = _folder.set(None if folder is None else Path(folder))
    try:
        yield
    finally:
        _folder.reset(token)


def kept(lines: np.ndarray, facts: object, make: Callable[[], np.ndarray]) -> np.ndarray:
    """What `make()` returns, an array of the shape of `lines`, from its file where there is one that can be read.

    Args: lines, conductances, float64; facts, all else that the result depends on, by its `repr`.
    Raises: OSError where the folder cannot be written to.
    """
    folder = _folder.get()
    if folder is None:
        return make()
    key = hashlib.sha256(repr((lines.shape, facts)).encode())
    key.update(np.ascontiguousarray(lines).data)
    path = folder / f"effective_{key.hexdigest()}.npy"
    with contextlib.suppress(OSError, ValueError):
        found = load_array(path)
        if found.shape == lines.shape and found.dtype == np.float64:
            return found
    found = make()
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write(path, lambda file: np.save(file, found))
    return found
