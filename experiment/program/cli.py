"""What the programs do at their edges: errors in one line, console and log file.

    def main() -> int:                     # the exit code
        ...
        raise UserError("one line that says what is wrong and what to do")

    if __name__ == "__main__":
        run_main(main)
"""

import contextlib
import errno
import importlib
import io
import logging
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn, TextIO


PATIENCE = 10  # seconds


class UserError(Exception):
    """Something the user can put right. The message is one line; no traceback is shown."""


@contextlib.contextmanager
def user_error(text: Callable[[Any], str], kinds: type[Exception] | tuple[type[Exception], ...] = ValueError) -> Iterator[None]:
    """Within `with`, an error of these kinds becomes a UserError with the text that is made of it."""
    try:
        yield
    except kinds as error:
        raise UserError(text(error)) from error


def one_line(error: BaseException) -> str:
    """The text of an exception without its line breaks; for a full disk, words that say so."""
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return "the disk is full" + (f": cannot write {error.filename}" if error.filename else "")
    return " ".join(str(error).split()) or type(error).__name__


def run_main(main: Callable[[], int]) -> NoReturn:
    """Run `main()` and exit with what it returns; with 2 and one line on stderr for a UserError or a file that cannot be read,
    written or named; with 130 for Ctrl-C.

    A console that goes away, as in `eval.py | head -1`, ends nothing: what is printed from then on is lost.
    """
    with _lasting_console():
        try:
            code = main()
            print(end="", flush=True)  # here, where it can still be told that a full disk took not all of it
        except (UserError, OSError) as error:
            print(f"error: {one_line(error)}", file=sys.stderr)
            code = 2
        except UnicodeEncodeError as error:  # Python keeps the bytes of a name that is no text to it as "surrogates"
            if error.reason != "surrogates not allowed":
                raise
            print("error: the name of a file has letters that the locale lacks; set PYTHONUTF8=1", file=sys.stderr)
            code = 2
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            code = 130
    sys.exit(code)


def needed(package: str, missing: str) -> ModuleType:
    """A package that not everybody has, imported. Raises: UserError that says `missing` where it is not installed, and what is wrong with
    it where it cannot be imported, such as a package of its own that is not there."""
    try:
        return importlib.import_module(package)
    except Exception as error:  # what is installed in halves raises nearly anything
        if isinstance(error, ModuleNotFoundError) and error.name == package.partition(".")[0]:
            raise UserError(missing) from None
        raise UserError(f"{package} is installed, but cannot be imported ({type(error).__name__}: {one_line(error)[:160]}): install it "
                        "anew, with all that it needs") from error


def run_program(command: Sequence[str], **options: Any) -> tuple[subprocess.CompletedProcess, bool]:
    """As `subprocess.run`, and whether it was to stop: Ctrl-C and SIGTERM are left to the program that runs, so that a training keeps its
    last step. From a terminal Ctrl-C comes to both; a program that still runs `PATIENCE` seconds later had none of its own."""
    got: list[int] = []
    stops = signal.SIGINT, signal.SIGTERM
    handled = stops if threading.current_thread() is threading.main_thread() else ()
    before = {number: signal.signal(number, lambda number, _: got.append(number)) for number in handled}
    try:
        with subprocess.Popen(command, **options) as child:
            waited, told = 0, False
            while True:
                try:
                    output = child.communicate(timeout=1)
                    break
                except subprocess.TimeoutExpired:
                    waited += bool(got)
                    if not told and got and (signal.SIGTERM in got or waited > PATIENCE):
                        child.terminate()
                        told = True
                except BaseException:
                    child.kill()
                    raise
    finally:
        for number, act in before.items():
            signal.signal(number, act)
    stopped = -child.returncode in stops or child.returncode - 128 in stops
    return subprocess.CompletedProcess(command, child.returncode, *output), bool(got) or stopped


@contextlib.contextmanager
def ended_by_signals() -> Iterator[None]:
    """Within `with`, SIGTERM raises SystemExit, as Ctrl-C raises KeyboardInterrupt, with the code that a shell reports: what is known can
    still be said. Processes of a group have an answer of their own to it."""
    def end(number: int, _: object) -> NoReturn:
        raise SystemExit(128 + number)

    own = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    before = signal.signal(signal.SIGTERM, end) if own else None
    try:
        yield
    finally:
        if own:
            signal.signal(signal.SIGTERM, before)


def check_writable(folder: str | Path) -> None:
    """Make `folder` and prove that a file can be written there, so that a run does not fail after hours of work.

    Raises: UserError where that cannot be done.
    """
    with user_error(lambda error: f"cannot write to {folder}: {error.strerror or error}", OSError):
        Path(folder).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()


# ---------------------------------------------------------------------------------------------------------------------
# Console and log file


class _Console(io.FileIO):
    """An open file descriptor that takes everything, also when nobody reads it any more, and when it is over, whatever the reason."""

    over = False

    def write(self, data) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO) and not self.over:  # a pipe without a reader, a terminal that was closed
                raise
            return memoryview(data).nbytes


def _lasting(stream: TextIO) -> TextIO:
    """A stream to where `stream` writes, which outlives its reader and writes `\\xfc` for what its encoding lacks."""
    try:
        number = stream.fileno()
    except (AttributeError, OSError):  # closed, or replaced by something in memory, as in a notebook
        return stream
    stream.flush()
    return io.TextIOWrapper(io.BufferedWriter(_Console(number, "wb", closefd=False)), stream.encoding, "backslashreplace",
                            line_buffering=stream.line_buffering or stream.write_through)  # Python runs with -u: lines come at once


@contextlib.contextmanager
def _lasting_console() -> Iterator[None]:
    """Within `with`, `sys.stdout` and `sys.stderr` are lasting ones."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = map(_lasting, before)
    try:
        yield
    finally:
        for stream in filter(None, (sys.stdout, sys.stderr)):
            with contextlib.suppress(OSError):
                stream.flush()
            console = getattr(getattr(stream, "buffer", None), "raw", None)
            if isinstance(console, _Console):  # what a full disk did not take, Python would try again when the stream goes
                console.over = True
        sys.stdout, sys.stderr = before


def get_logger(path: str | Path | None = None) -> logging.Logger:
    """The programs' logger, made anew: it prints to stdout and, with the time, appends to the file `path` (UTF-8).

    Where a progress bar is on the screen, log within `tqdm.contrib.logging.logging_redirect_tqdm([log])`.

    Raises: UserError for a file that cannot be written.
    """
    log = logging.getLogger("vgg-quant")
    log.setLevel(logging.INFO)
    log.propagate = False
    for handler in log.handlers[:]:
        log.removeHandler(handler)
        handler.close()
    log.addHandler(logging.StreamHandler(sys.stdout))
    if path is not None:
        with user_error(lambda error: f"cannot write the log file {path}: {error.strerror or error}", OSError):
            to_file = logging.FileHandler(path, encoding="utf-8", errors="backslashreplace")
        to_file.setFormatter(logging.Formatter("%(asctime)s  %(message)s", "%Y-%m-%d %H:%M:%S"))
        log.addHandler(to_file)
    return log
