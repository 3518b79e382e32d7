"""One writer at a time in a folder that several programs write to."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


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
