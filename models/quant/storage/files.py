"""Files that are written whole or not at all, by one program at a time, and arrays that are read whole or not at all."""

import contextlib
import glob
import os
import secrets
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

STALE = 3600  # seconds after which a temporary file belongs to a process that was killed; younger ones may be in use


def atomic_write(path: str | Path, write: Callable[[BinaryIO], object]) -> None:
    """Call `write(file)` on a temporary file in the folder of `path`, flush it to the disk and rename it to `path`.

    Whenever the process or the machine dies, `path` is either the complete old or the complete new file.

    Raises: OSError where the folder cannot be written to; whatever `write` raises. `path` is then as it was.
    """
    path = Path(path)
    remove_stale(path.parent, f".{glob.escape(path.name)}.*.tmp")
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    if os.name == "posix":  # the rename itself is safe only once the folder is on the disk
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def read_torch(path: str | Path) -> Any:
    """What is in a file of PyTorch, on the CPU.

    It may hold tensors, numbers, texts, lists and dicts alone (`weights_only`), so that it runs no code. Every byte is checked against its
    CRC. `torch.load` does not do so, and a flipped bit would become a wrong weight.

    Raises: ValueError for a wrong checksum; nearly anything for what else is damaged.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged:
            raise ValueError(f"checksum of {damaged} is wrong")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about pickle protocols; the outcome says enough
        return torch.load(path, map_location="cpu", weights_only=True)


def write_text(path: str | Path, text: str) -> None:
    """A text, in UTF-8; see `atomic_write`."""
    atomic_write(path, lambda file: file.write(text.encode()))


def remove_stale(folder: Path, pattern: str) -> None:
    """Remove temporary files of a folder that killed processes left. Which are old says the clock that stamps new files there, not this
    machine's: a drive that several share has one of its own."""
    if left := list(folder.glob(pattern)):
        with contextlib.suppress(OSError), tempfile.TemporaryFile(dir=folder) as new:
            for old in left:
                with contextlib.suppress(OSError):
                    if os.fstat(new.fileno()).st_mtime - old.stat().st_mtime > STALE:
                        old.unlink()


@contextlib.contextmanager
def locked(path: str | Path) -> Iterator[None]:
    """Within `with`, no other process on this machine is in such a block for a file of the same folder.

    The lock is on the folder, so that nothing is left behind, and ends with the process that holds it. Where the system has none,
    as on some network drives, the block runs without it.
    """
    folder = None
    if fcntl is not None:
        folder = os.open(Path(path).parent, os.O_RDONLY)
        with contextlib.suppress(OSError):
            fcntl.flock(folder, fcntl.LOCK_EX)
    try:
        yield
    finally:
        if folder is not None:
            os.close(folder)


def load_array(path: str | Path) -> np.ndarray:
    """The array of a .npy file: nothing else is opened, be it a zip or a pickle.

    Raises: OSError where it cannot be read; ValueError for another file, or one that broke off.
    """
    with open(path, "rb") as file:
        return np.lib.format.read_array(file, allow_pickle=False)
