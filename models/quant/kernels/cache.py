"""Where compiled kernels are kept: what every module with an `@njit(cache=True)` imports first.

In the user's cache folder, and there in a folder that is called by the name of this package, its version and what kernels are made of, as
~/.cache/torchrram/models.quant-0.4.0-1f2e3d4c5b6a70. Beside the sources, where Numba would keep them, they outlive an uninstall and are in
the way of the next installation; and what is compiled under one name of this package names its modules, which the other does not have.

Where nothing can be written there (no home, a full disk), they go to a temporary folder, which only this user can read and which goes
with the process.
"""

import atexit
import contextlib
import glob
import hashlib
import logging
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numba
from numba.core import caching

from ..version import __version__

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

log = logging.getLogger(__name__)

PACKAGE = __name__.partition(".kernels.")[0]
FILES = Path(__file__).parents[1]
ROOMS = [FILES / "kernels", FILES / "engines" / "cpu"]  # of kernels
KEPT = 8  # folders of other sources of this package, those that were used last: of other checkouts, or of what an edit is taken back to
MARK = "used"  # a file in each of them, as old as its last use, and locked by the processes that use it

# A function compiled with `cache=True` is kept on disk. Numba compiles it anew when the file that it stands in changes, not for the
# files of the functions that it calls, or of constants. So all of these rooms, the file whose constants they compile in, and what Numba is,
# decide the folder; and as the value of a default argument is part of a function's key, it has `SOURCES` for one, for functions elsewhere
# that call those of these rooms.
COMPILED = [*(file for room in ROOMS for file in sorted(room.rglob("*.py"))), FILES / "arrays" / "readout.py"]
SOURCES = int.from_bytes(hashlib.sha256(b"".join(
    [numba.__version__.encode(), *(part for file in COMPILED for part in (str(file.relative_to(FILES)).encode(), file.read_bytes()))]
)).digest()[:7], "little")


@contextlib.contextmanager
def compiled_once(function, patience: float = 120.0) -> Iterator[None]:
    """Within `with`, no other process that keeps its kernels in the same folder compiles this function. Programs that start together, as
    the jobs of an array do, would all compile it else, and write its list of what is kept over each other's; so, those that wait find it.

    Args: patience, seconds, after which it runs all the same, as it does where the system has no locks: another process may hang.
    """
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            file = stack.enter_context(open(Path(function.stats.cache_path) / f"{function.__qualname__}.lock", "w"))
            end = time.monotonic() + patience
            while fcntl is not None and time.monotonic() < end:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    time.sleep(0.05)
        yield


def _user_folder() -> Path:
    """What the user's system, or the user, has for such things. Raises: RuntimeError where there is no home."""
    for name in ("NUMBA_CACHE_DIR", "XDG_CACHE_HOME", *(["LOCALAPPDATA"] if sys.platform == "win32" else [])):
        if folder := os.environ.get(name):
            return Path(folder).absolute()
    return Path.home() / {"win32": "AppData/Local", "darwin": "Library/Caches"}.get(sys.platform, ".cache")


def _use(folder: Path) -> None:
    """Make a folder, and mark it as used by this process as long as that runs. Raises: OSError where nothing can be written to it."""
    folder.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=folder).close()
    mark = os.open(folder / MARK, os.O_RDWR | os.O_CREAT, 0o666)  # closed, and with that unlocked, when the process ends
    os.utime(folder / MARK)
    if fcntl is not None:
        with contextlib.suppress(OSError):
            fcntl.flock(mark, fcntl.LOCK_SH | fcntl.LOCK_NB)


def _drop_older(own: Path) -> None:
    """Remove the folders of other sources of this package that were used longest ago, but none that a process uses."""
    last_used = {}
    for mark in own.parent.glob(f"{glob.escape(PACKAGE)}-*/{MARK}"):
        with contextlib.suppress(OSError):
            last_used[mark] = mark.stat().st_mtime
    for mark in sorted(last_used.keys() - {own / MARK}, key=last_used.get, reverse=True)[KEPT:]:
        with contextlib.suppress(OSError), open(mark, "r+") as file:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(mark.parent, ignore_errors=True)


def _find_folder() -> Path:
    """A folder to keep compiled functions in, for this process and those that it starts."""
    name = Path("torchrram", f"{PACKAGE}-{__version__}-{SOURCES:014x}")
    try:
        _use(_user_folder() / name)
        _drop_older(_user_folder() / name)
    except (OSError, RuntimeError):
        temporary = tempfile.mkdtemp(prefix="numba-")
        atexit.register(shutil.rmtree, temporary, ignore_errors=True)
        os.environ["NUMBA_CACHE_DIR"] = temporary  # for new processes; Numba too reads its settings again when this changes
        log.warning("no folder here can keep compiled kernels: they are compiled again in every run, which takes up to a "
                    "minute; set NUMBA_CACHE_DIR to a folder that can")
    return _user_folder() / name


class _Locator:
    """What tells Numba where a function of these rooms is kept; see `numba.core.caching`."""

    def __init__(self, function, file: str) -> None:
        self._py_file, self.line = file, function.__code__.co_firstlineno

    @classmethod
    def from_function(cls, function, file: str) -> "_Locator | None":
        return cls(function, file) if {*ROOMS} & {*Path(file).parents} else None

    def get_cache_path(self) -> str:
        return str(FOLDER / Path(self._py_file).parent.relative_to(FILES))  # files of two folders may have one name

    def ensure_cache_path(self) -> None:
        os.makedirs(self.get_cache_path(), exist_ok=True)

    def get_source_stamp(self) -> int:
        return SOURCES

    def get_disambiguator(self) -> str:
        return str(self.line)


FOLDER = _find_folder()
with contextlib.suppress(AttributeError):  # a Numba without this list keeps them where it always did
    caching.CacheImpl._locator_classes.insert(0, _Locator)
