"""What train.py and eval.py share: errors, files, checkpoints, logging, devices and random numbers.

Errors       raise UserError("one line that says what is wrong and what to do"); run_main() prints it and exits with 2.
Files        atomic_write() never leaves a half-written file under the final name.
Checkpoints  save_checkpoint() and load_checkpoint() hold tensors, numbers, strings, lists and dicts only, so that
             reading one can never run code. load_weights() names every key that does not fit.
Randomness   generator("augment", seed, epoch, step) depends on its arguments alone. A run resumed in the middle of an
             epoch draws the same numbers without replaying what came before.
"""

import argparse
import math

import torch

from experiment.checkpoint import (  # noqa: F401  (for callers of this file)
    CHECKPOINT_FORMAT, load_checkpoint, load_weights, read_torch_file, save_checkpoint)
from experiment.cli import (  # noqa: F401
    Stopped, StopRequest, UserError, check_writable, get_logger, one_line, run_main)
from experiment.data import generator  # noqa: F401
from experiment.machine import (  # noqa: F401
    has_fast_bf16, keep_freed_memory, machine_info, pick_device, rng_state, set_rng_state)
from models.quant.files import _umask, atomic_write  # noqa: F401  (for callers of this file)


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


def aligned(rows):
    """The lines of a table of texts: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows]


# ---------------------------------------------------------------------------------------------------------------------
# Files


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints


# ---------------------------------------------------------------------------------------------------------------------
# Logging, measuring, stopping


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


def schedule_factor(kind, step, steps, steps_per_epoch, schedule=(), gammas=()):
    """What every parameter group's starting rate is multiplied by at `step`, 0 .. steps - 1."""
    if kind == "step":
        epoch = step // steps_per_epoch
        return math.prod(gamma for start, gamma in zip(schedule, gammas, strict=True) if epoch >= start)
    if kind == "cosine":
        return (1 + math.cos(math.pi * step / steps)) / 2
    peak = max(1, steps // 4)  # triangular: rises over `peak` steps, then falls; never quite 0, so every step counts
    return (step + 1) / peak if step < peak else (steps - step) / (steps - peak)


# ---------------------------------------------------------------------------------------------------------------------
# Devices and random numbers

