"""What train.py and eval.py share: errors, files, checkpoints, logging, devices and random numbers.

Errors       raise UserError("one line that says what is wrong and what to do"); run_main() prints it and exits with 2.
Files        atomic_write() never leaves a half-written file under the final name.
Checkpoints  save_checkpoint() and load_checkpoint() hold tensors, numbers, strings, lists and dicts only, so that
             reading one can never run code. load_weights() names every key that does not fit.
Randomness   generator("augment", seed, epoch, step) depends on its arguments alone. A run resumed in the middle of an
             epoch draws the same numbers without replaying what came before.
"""

import argparse
import contextlib
import ctypes
import hashlib
import logging
import math
import os
import platform
import signal
import sys
import tempfile
import time
import warnings
import zipfile
from pathlib import Path

import torch
from tqdm import tqdm

CHECKPOINT_FORMAT = "vgg-quant-1"


class UserError(Exception):
    """Something the user can put right. The message is one line; no traceback is shown."""


class ArgumentParser(argparse.ArgumentParser):
    """argparse prints its usage in front of every error; here an error is one line like all others. Names of flags are
    not to be shortened: the shell scripts, which look at some of them, would not see those."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, **options)

    def error(self, message):
        raise UserError(f"{message} (see {self.prog} --help)")


def number(kind, text, allowed):
    """An argparse type: a number of this kind (int, float) for which allowed(value) holds; text says which those are."""

    def convert(argument):
        try:
            value = kind(argument)
        except ValueError:
            value = None
        if value is None or not allowed(value):  # not a number compares as False everywhere
            raise argparse.ArgumentTypeError(f"{argument} is not {text}")
        return value

    return convert


BITS = number(int, "1 to 8, or 32 to switch the quantizer off", lambda bits: bits in (*range(1, 9), 32))
COUNT = number(int, "a whole number from 1 up", lambda value: 1 <= value < 2**63)
COUNT_OR_0 = number(int, "a whole number from 0 up", lambda value: 0 <= value < 2**63)
POSITIVE = number(float, "a number above 0", lambda value: 0 < value < math.inf)
POSITIVE_OR_0 = number(float, "a number from 0 up", lambda value: 0 <= value < math.inf)
FIT_OR_POSITIVE = number(lambda text: text if text == "fit" else float(text), "fit or a number above 0",
                         lambda value: value == "fit" or 0 < value < math.inf)
SHARE = number(float, "from 0 up to, but not including, 1", lambda value: 0 <= value < 1)


class Extend(argparse.Action):
    """Values of a flag that is given several times, one after the other; argparse's "extend" takes no `unset` default."""

    def __call__(self, parser, namespace, values, option_string=None):
        before = getattr(namespace, self.dest)
        setattr(namespace, self.dest, [*(before if isinstance(before, list) else []), *values])


def parse_flags(parser, argv=None):
    """(args, given): the parsed arguments, and a dict of those that stand on the command line."""
    args = parser.parse_args(argv)
    unset = object()  # argparse keeps what a namespace has already, so what is not `unset` afterwards was given
    given = vars(parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(vars(args), unset))))
    return args, {name: value for name, value in given.items() if value is not unset}


def adopt_config(args, given, config, fixed, source):
    """Set each setting that was not `given` on the command line to its value in `config`, a dict from `source`.

    A given setting that is named in `fixed` and differs from the one in `config` is an error.
    """
    conflicts = [
        f"--{name} {given[name]} (the checkpoint has {config[name]})"
        for name in sorted(set(fixed) & set(given) & set(config))
        if given[name] != config[name]
    ]
    if conflicts:
        raise UserError(f"{source} was made with other settings: {', '.join(conflicts)}")
    for name, value in config.items():
        if name in vars(args) and name not in given:
            setattr(args, name, value)


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


def aligned(rows):
    """The lines of a table of texts: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows]


def one_line(error):
    """The text of an exception without its line breaks."""
    return " ".join(str(error).split()) or type(error).__name__


# ---------------------------------------------------------------------------------------------------------------------
# Files


def check_writable(folder):
    """Make `folder` and prove that a file can be written there, so that a run does not fail after hours of work."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror or error}") from error


def atomic_write(path, write):
    """Call write(file) on a temporary file in the folder of `path`, flush it to the disk and rename it to `path`.

    Whenever the process or the machine dies, `path` is either the complete old or the complete new file.
    """
    path = Path(path)
    for old in path.parent.glob(f".{path.name}.*.tmp"):  # left behind by a killed process; others may be at work
        with contextlib.suppress(OSError):
            if time.time() - old.stat().st_mtime > 3600:
                old.unlink()
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp makes files that only their owner can read
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    if os.name == "posix":  # the rename itself is safe only once the folder is on the disk
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _umask():
    mask = os.umask(0)  # the only way to read it is to set it
    os.umask(mask)
    return mask


def read_torch_file(path):
    """torch.load for a file that nobody vouches for: weights_only, and every byte checked against its CRC.

    torch.load itself does not verify the checksums that torch.save writes: a flipped bit would become a wrong weight.
    """
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
            if damaged:
                raise ValueError(f"checksum of {damaged} is wrong")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols; the outcome says enough
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder, expected a file") from None
    except Exception as error:  # a damaged file can make zipfile and torch raise nearly anything
        reason = one_line(error)
        if "nsupported" in reason or "WeightsUnpickler" in reason:
            reason = "it holds more than tensors, numbers, strings, lists and dicts, or is damaged"
        raise UserError(f"{path}: not a readable PyTorch file, refused ({reason[:160]})") from error


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints


def save_checkpoint(path, checkpoint):
    """Write `checkpoint`, a dict, to `path` atomically; "format" is added here."""
    try:
        atomic_write(path, lambda file: torch.save({"format": CHECKPOINT_FORMAT, **checkpoint}, file))
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        raise UserError(f"cannot write {path}: {one_line(error)[:160]}") from error


def load_checkpoint(path):
    """The checkpoint dict in `path`, tensors on the CPU. It has at least "state_dict" and "config" (empty if unknown).

    Reads the files of this project ("format" is CHECKPOINT_FORMAT), packed ones too (see packed.py), those of the original
    public code ({"state_dict": ...}) and bare state dicts. Anything else raises UserError.
    """
    checkpoint = read_torch_file(path)
    if isinstance(checkpoint, dict) and checkpoint and all(isinstance(v, torch.Tensor) for v in checkpoint.values()):
        checkpoint = {"state_dict": checkpoint}
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("state_dict"), dict):
        raise UserError(f"{path}: not a checkpoint of a model (it has no state_dict)")
    for key, value in checkpoint["state_dict"].items():
        if not isinstance(key, str) or not isinstance(value, torch.Tensor):
            raise UserError(f"{path}: not a checkpoint of a model (state_dict holds {key!r}, which is not a tensor)")
    if not isinstance(checkpoint.get("config"), dict):
        checkpoint["config"] = {}
    if "codes" in checkpoint:
        from experiment.packed import unpack

        try:
            return unpack(checkpoint)
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise UserError(f"{path}: its weight codes cannot be unpacked ({one_line(error)[:120]})") from error
    return checkpoint


def load_weights(model, state_dict, allow_missing=(), source="checkpoint"):
    """Copy `state_dict` into `model`, or raise a UserError that names what is missing, unexpected or misshapen.

    allow_missing: endings of keys that may be absent, such as ("act_alpha",) for a model trained without activation
    quantizers; these parameters keep their values. Returns the absent keys. Nothing is copied when something is wrong.
    The prefix "module." of checkpoints saved from DataParallel is dropped.
    """
    if state_dict and all(key.startswith("module.") for key in state_dict):
        state_dict = {key.removeprefix("module."): value for key, value in state_dict.items()}
    own = model.state_dict()
    absent = [key for key in own if key not in state_dict]
    wrong = {
        "missing": [key for key in absent if not key.endswith(tuple(allow_missing))],
        "unexpected": [key for key in state_dict if key not in own],
        "of another shape": [
            f"{key} {list(value.shape)} instead of {list(own[key].shape)}"
            for key, value in state_dict.items()
            if key in own and value.shape != own[key].shape
        ],
    }
    if any(wrong.values()):
        text = "; ".join(f"{what}: {_some(keys)}" for what, keys in wrong.items() if keys)
        raise UserError(f"{source} does not fit the model: {text}")
    model.load_state_dict(state_dict, strict=False)
    return absent


def _some(names, limit=6):
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


# ---------------------------------------------------------------------------------------------------------------------
# Logging, measuring, stopping


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


class Meter:
    """Sums of loss and correct answers. They stay on the device: reading them is what waits for the GPU."""

    def __init__(self, device):
        self.sums = torch.zeros(2, dtype=torch.float64, device=device)
        self.images = 0

    def add(self, loss, logits, labels):
        """loss: mean over the batch (scalar tensor), logits [N, classes], labels [N]."""
        correct = (logits.argmax(1) == labels).sum()
        self.sums += torch.stack([loss.detach().double() * len(labels), correct.double()])
        self.images += len(labels)

    def read(self):
        """(mean loss, accuracy in percent) of all images so far."""
        loss, correct = self.sums.tolist()
        return loss / max(1, self.images), 100 * correct / max(1, self.images)

    def state_dict(self):
        return {"sums": self.sums.tolist(), "images": self.images}

    def load_state_dict(self, state):
        self.sums.copy_(torch.tensor(state["sums"], dtype=torch.float64))
        self.images = state["images"]


@torch.no_grad()
def write_histograms(writer, step, net, layers, images):
    """TensorBoard histograms of the weights of `layers` (name: module) and of what flows into them for these images."""

    def add(tag, values):
        values = values.detach().flatten().float()
        writer.add_histogram(tag, values[:: max(1, len(values) // 100_000)], step)  # a sample shows the same shape

    hooks = []
    try:
        for name, layer in layers.items():
            add(f"weight/{name}", layer.weight)
            hooks.append(layer.register_forward_pre_hook(
                lambda _, inputs, name=name: add(f"activation/{name}", inputs[0])))
        net.eval()
        net(images)
    finally:
        for hook in hooks:
            hook.remove()


def machine_info():
    """Versions and hardware, as plain values, to stand beside every measured number."""
    from importlib import metadata

    def version(package):
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return None

    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),  # a str subclass otherwise, which weights_only refuses
        "numba": version("numba"),
        "triton": version("triton"),
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _cpu_name():
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def schedule_factor(kind, step, steps, steps_per_epoch, schedule=(), gammas=()):
    """What every parameter group's starting rate is multiplied by at `step`, 0 .. steps - 1."""
    if kind == "step":
        epoch = step // steps_per_epoch
        return math.prod(gamma for start, gamma in zip(schedule, gammas, strict=True) if epoch >= start)
    if kind == "cosine":
        return (1 + math.cos(math.pi * step / steps)) / 2
    peak = max(1, steps // 4)  # triangular: rises over `peak` steps, then falls; never quite 0, so every step counts
    return (step + 1) / peak if step < peak else (steps - step) / (steps - peak)


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


# ---------------------------------------------------------------------------------------------------------------------
# Devices and random numbers


def keep_freed_memory():
    """Let the C library keep what tensors free, where it is glibc: training and evaluation take a quarter less time.

    By default every large tensor is mapped anew, and the system fills each of its pages with zeros when it is first
    written. Call this before tensors are made.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    mallopt = ctypes.CDLL(None).mallopt
    M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # malloc.h
    mallopt(M_MMAP_MAX, 0)
    mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    mallopt(M_TOP_PAD, 2**26)


def pick_device(ngpu=None):
    """The device for --ngpu: 0 the CPU, 1 the GPU, None the GPU if there is one."""
    if ngpu is None:
        ngpu = int(torch.cuda.is_available())
    if ngpu not in (0, 1):
        raise UserError(f"--ngpu {ngpu}: 0 (CPU) or 1 (one GPU); several GPUs are not supported")
    if ngpu == 1 and not torch.cuda.is_available():
        raise UserError("--ngpu 1: PyTorch finds no CUDA GPU here; use --ngpu 0")
    return torch.device("cuda" if ngpu else "cpu")


def has_fast_bf16(device):
    """Whether bfloat16 arithmetic is done in hardware: there autocast is faster, elsewhere several times slower."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def generator(*key):
    """A CPU random generator whose stream depends only on `key` (numbers and strings)."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


def rng_state():
    """The state of torch's global generators, as a dict that goes into a checkpoint."""
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []}


def set_rng_state(state):
    torch.set_rng_state(state["cpu"])
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
