"""Where compiled kernels are kept: what every module with an `@njit(cache=True)` imports first.

Numba keeps them beside the source or in the user's cache folder, and where it may write to neither (a read-only
installation, a user without a home) it refuses to make the function at all. Then they go to a temporary folder, which only
this user can read and which goes with the process.
"""

import atexit
import contextlib
import hashlib
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numba

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

log = logging.getLogger(__name__)

# A function compiled with `cache=True` is kept on disk. Numba compiles it anew when the file that it stands in changes, not
# for the files of the functions that it calls; but the value of a default argument is part of the key. So it has `SOURCES`
# for one, which stands for all files of this folder, and so has what it calls, where that is kept by itself too.
SOURCES = int.from_bytes(hashlib.sha256(b"".join(
    file.read_bytes() for file in sorted(Path(__file__).parent.rglob("*.py")))).digest()[:7], "little")


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


def _probe() -> None:
    """A function of this folder: Numba looks for a place to write to by the file that a function stands in."""


def _drop_older(folder: Path) -> None:
    """Remove what was kept of other versions of these files. Numba would compile it anew too, but reads its lists before it looks at
    their age, and fails where a type in them has moved to another file since."""
    mark = folder / "sources"
    with contextlib.suppress(OSError):
        if mark.exists() and mark.read_text() == str(SOURCES):
            return
        for index in folder.glob("*.nbi"):
            index.unlink(missing_ok=True)
        mark.write_text(str(SOURCES))


def _find_folder() -> None:
    """See that Numba has a folder to keep compiled functions in, for this process and those that it starts."""
    try:
        kept = numba.njit(cache=True)(_probe)
        if not numba.config.DISABLE_JIT:
            _drop_older(Path(kept.stats.cache_path))
    except RuntimeError:
        folder = tempfile.mkdtemp(prefix="numba-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        os.environ["NUMBA_CACHE_DIR"] = folder  # Numba reads its settings again when this changes, and so does a new process
        numba.config.CACHE_DIR = folder
        log.warning("no folder here can keep compiled kernels: they are compiled again in every run, which takes up to a "
                    "minute; set NUMBA_CACHE_DIR to a folder that can")


_find_folder()
