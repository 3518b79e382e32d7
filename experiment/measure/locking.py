"""Several programs in one folder: one worker for one piece of work."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from models.quant.storage.files import fcntl


class Claims:
    """Pieces of work that processes claim, on one machine or on several that share a drive: each is one byte of a file, and a claim
    is a lock on it, which ends with its process. Two claims of one process do not exclude each other.

    Args: path, the file, made with the first claim and then left open: to close it would end all claims of the process.
    """

    _open: dict[tuple[int, int], int] = {}  # by device and inode

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @contextlib.contextmanager
    def claim(self, key: str, wait: bool = False) -> Iterator[bool]:
        """`with` a claim on a key, a text of hexadecimal digits: True, or False where another process has it.

        Args: wait, until the other process is done. Where the system has no locks every claim succeeds.
        """
        place = int(key[-15:], 16)
        mine = self._lock(place, wait)
        try:
            yield mine
        finally:
            if mine and fcntl is not None:
                with contextlib.suppress(OSError):
                    fcntl.lockf(self._file(), fcntl.LOCK_UN, 1, place)

    def _lock(self, place: int, wait: bool) -> bool:
        if fcntl is None:
            return True
        try:
            fcntl.lockf(self._file(), fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB), 1, place)
        except (BlockingIOError, PermissionError):
            return False
        except OSError:
            pass  # a drive without locks: a point may be measured twice, to the same result
        return True

    def _file(self) -> int:
        with contextlib.suppress(FileNotFoundError):
            status = os.stat(self.path)
            if (status.st_dev, status.st_ino) in self._open:
                return self._open[status.st_dev, status.st_ino]
        number = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        status = os.fstat(number)
        self._open[status.st_dev, status.st_ino] = number
        return number
