"""What every program needs at its edges: errors in one line, the console and the log, stopping when asked to."""

import logging
import signal
import sys
import tempfile
from pathlib import Path

from tqdm import tqdm


class UserError(Exception):
    """Something the user can put right. The message is one line; no traceback is shown."""


def one_line(error):
    """The text of an exception without its line breaks."""
    return " ".join(str(error).split()) or type(error).__name__


def run_main(main):
    """Run main() and turn its outcome into an exit code: 2 with one line for a UserError or a file that cannot be read or
    written, 130 for Ctrl-C."""
    try:
        code = main()
    except (UserError, OSError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    sys.exit(code)


def check_writable(folder):
    """Make `folder` and prove that a file can be written there, so that a run does not fail after hours of work."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror or error}") from error


class _ProgressBarHandler(logging.Handler):
    """Print above a progress bar instead of through it."""

    def emit(self, record):
        tqdm.write(self.format(record), file=sys.stdout)
        sys.stdout.flush()


def get_logger(path=None):
    """A logger that prints to the console and, with a time, appends to the file `path`."""
    log = logging.getLogger("vgg-quant")
    log.setLevel(logging.INFO)
    log.propagate = False
    for handler in log.handlers[:]:
        log.removeHandler(handler)
        handler.close()
    log.addHandler(_ProgressBarHandler())
    if path is not None:
        try:
            to_file = logging.FileHandler(path)
        except OSError as error:
            raise UserError(f"cannot write the log file {path}: {error.strerror or error}") from error
        to_file.setFormatter(logging.Formatter("%(asctime)s  %(message)s", "%Y-%m-%d %H:%M:%S"))
        log.addHandler(to_file)
    return log


class Stopped(Exception):
    """A signal asked to stop, and the program has come to a point where its state is complete."""


class StopRequest:
    """Within `with`, Ctrl-C and SIGTERM raise Stopped at the next check() instead of breaking into a step."""

    signal = None  # number of the signal that came

    def __enter__(self):
        self.before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number, frame):
        self.signal = number
        signal.signal(number, signal.default_int_handler)  # a second Ctrl-C does not wait

    def check(self):
        if self.signal is not None:
            raise Stopped
