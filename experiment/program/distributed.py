"""Several processes that run one program together, on the GPUs of a machine or on many machines: who they are, what they tell each
other, and how all of them end when one does.

    torchrun --nproc_per_node 2 eval.py ...      # starts process 0 and process 1 (`rank()`), 2 in all (`world()`)
    python eval.py --ngpu 2 ...                  # the same, one process a GPU

A program that was started alone is process 0 of 1: everything here then does nothing. Process 0 alone writes files and speaks.
Numbers on GPUs travel by NCCL, all else by gloo.
"""

import atexit
import contextlib
import functools
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from models import quant

from .cli import UserError, one_line, run_main, user_error

T = TypeVar("T")

# How long processes wait for one that calibrates or solves wires. One that dies is noticed at once, since its connections close.
PATIENCE = timedelta(days=1)
SHUTDOWN_SECONDS = 600  # that torchrun leaves to a process which was told to end: to come to a check, and write its checkpoint
LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exiting")  # what gloo and NCCL say then

_store: dist.Store | None = None  # what all processes can read and write; None: there is one process
_helpers: Sequence[Any] = ()  # of process 0 while it leads
_alone = False  # whether process 0 leads and does something by itself


def world() -> int:
    """How many processes do together what this one does now."""
    return dist.get_world_size() if _store and not _alone else 1


def rank() -> int:
    """The number of this process, from 0 up."""
    return dist.get_rank() if _store else 0


def is_first() -> bool:
    """Whether this is process 0."""
    return rank() == 0


def on_this_machine() -> tuple[int, int]:
    """(the number of this process among those of its machine, how many these are)."""
    return int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))


# ---- start and end ------------------------------------------------------------------------------------------------------


def must_start(ngpu: int | None) -> bool:
    """Whether `--ngpu` asks for processes that nobody has started yet."""
    return ngpu is not None and ngpu > 1 and "RANK" not in os.environ


def start(count: int, argv: Sequence[str] | None = None) -> int:
    """Run this program on `count` GPUs of this machine, a process each, by PyTorch's elastic launcher. Args: argv, its flags, None:
    those of this process.

    Returns: the exit code.
    Raises: UserError where there are not so many GPUs.
    """
    found = torch.cuda.device_count()
    if found < count:
        raise UserError(f"--ngpu {count}: PyTorch finds {found} CUDA GPUs here; processes on CPUs are started by "
                        f"torchrun --nproc_per_node {count} {os.path.basename(sys.argv[0])} ...")
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # the process has said what was wrong
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores() // count)))
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(SHUTDOWN_SECONDS))
    command = [sys.argv[0], *(sys.argv[1:] if argv is None else argv)]
    try:
        torchrun.run(torchrun.parse_args(["--standalone", "--nproc_per_node", str(count), *command]))
    except ChildFailedError as error:
        codes = {failure.exitcode for failure in error.failures.values()}
        code = min(codes - {-signal.SIGTERM} or codes)  # of one that was killed before those that noticed, or that the launcher ended
        return code if code >= 0 else 128 - code  # as a shell reports it
    except SignalException as error:
        return 128 + error.sigval
    return 0


def cores() -> int:
    """Cores that this process may use: on a cluster those of its job, not all of the machine's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run(main: Callable[[], int]) -> NoReturn:
    """`cli.run_main` for a program of several processes: an error ends them all, and the process that had it says so."""

    def joined() -> int:
        if "RANK" not in os.environ or int(os.environ.get("WORLD_SIZE", 1)) == 1:
            return main()
        with group():
            return main()

    try:
        run_main(joined)
    except SystemExit as end:
        if dist.is_initialized():
            _leave(end.code)
        raise


def _leave(code: int) -> NoReturn:
    """Exit from a group that an error has left as it was, with all that an exit does but taking the interpreter apart: gloo's threads
    give back their tensors for some time after a collective operation, and one that finds no interpreter any more aborts the process.
    To dissolve the group instead would wait for processes that may be gone.
    """
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # a console that has gone away
            stream.flush()
    os._exit(code)


@contextlib.contextmanager
def group() -> Iterator[None]:
    """Within the block this process is one of those that `RANK`, `WORLD_SIZE`, `MASTER_ADDR` and `MASTER_PORT` name; at its end they
    wait for one another. Only the first prints.

    Raises: what this process was the first to raise; UserError where they do not meet, or another one has died; SystemExit, without a
        word, where another one was the first to raise something.
    """
    global _store
    with user_error(lambda error: f"the processes that torchrun has started do not find each other: {one_line(error)[:200]}",
                    (RuntimeError, ValueError)):
        store, number, count = next(dist.rendezvous("env://"))
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", store=store, rank=number,
                                world_size=count, timeout=PATIENCE)
    _store = dist.PrefixStore("program", store)
    before = signal.signal(signal.SIGTERM, _told_to_end)
    try:
        with open(os.devnull, "w") as nobody, contextlib.nullcontext() if number == 0 else contextlib.redirect_stdout(nobody):
            yield
            _wait()
    except BaseException as error:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the launcher's, while the error is being said
        _end(error)
        raise
    finally:
        _store = None
    signal.signal(signal.SIGTERM, before)
    dist.destroy_process_group()


class _ToldToEnd(BaseException):
    """SIGTERM has come."""


def _told_to_end(*_: object) -> NoReturn:
    raise _ToldToEnd


def _end(error: BaseException) -> None:
    """Raise what is to be said of an error in place of it; return where that is the error itself."""
    if isinstance(error, SystemExit) and not error.code:  # of --help, in all processes
        return
    try:
        first = _store.add("failed", 1) == 1
    except RuntimeError:  # the process that kept the store has ended
        first = True
    if not first:
        raise SystemExit(130 if isinstance(error, KeyboardInterrupt) else 2) from None
    if isinstance(error, _ToldToEnd):
        raise UserError(f"ended by SIGTERM; all {world()} processes get it when one of them has died. What they have "
                        "written stays") from None
    if isinstance(error, RuntimeError) and any(text in str(error) for text in LOST):
        raise UserError(f"another of the {world()} processes has ended, and this run with it; what it has written stays") from None


class Stopped(Exception):
    """A signal asked to stop, and the program has come to a point where its state is complete."""


class StopRequest:
    """Within `with`, Ctrl-C and SIGTERM raise Stopped at the next check() instead of breaking into a step; a signal to one process stops
    all of them at the same check, which all must make. A second Ctrl-C does not wait; a second SIGTERM, which a process may get from its
    launcher and from a batch system, does.

    Attributes: signal, the number of the signal that came, or None.
    """

    def __init__(self) -> None:
        self.signal: int | None = None

    def __enter__(self) -> "StopRequest":
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: object) -> None:
        self.signal = number
        if number == signal.SIGINT:
            signal.signal(number, signal.default_int_handler)

    def check(self) -> None:
        """Raises: Stopped, when a signal has come."""
        found = _largest(self.signal or 0)
        if found:  # one that came while the others were waited for is for the next check, of which all hear
            self.signal = found
            raise Stopped


# ---- what they tell each other ------------------------------------------------------------------------------------------


def _largest(number: int) -> int:
    if world() == 1:
        return number
    found = torch.tensor(number)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return int(found)


def _wait() -> None:
    _largest(0)


def broadcast(value: T) -> T:
    """The value that process 0 has, plain or of tensors in main memory."""
    box = [value]
    if world() > 1:
        dist.broadcast_object_list(box, 0)
    return box[0]


def gathered(value: T) -> list[T]:
    """The values of all processes, in their order; plain, or of tensors in main memory."""
    values = [value]
    if world() > 1:
        values = [None] * world()
        dist.all_gather_object(values, value)
    return values


def summed(values: torch.Tensor) -> torch.Tensor:
    """The sum over the processes of these tensors, which it takes the place of."""
    if world() > 1:
        dist.all_reduce(values)
    return values


@contextlib.contextmanager
def one_first() -> Iterator[None]:
    """Within the block the first process of each machine goes ahead: what it downloads or puts into a cache the others find there."""
    ahead = on_this_machine()[0] == 0
    if not ahead:
        _wait()
    yield
    if ahead:
        _wait()


# ---- sharing work out ---------------------------------------------------------------------------------------------------


def mine(number: int) -> bool:
    """Whether item `number` of some work is this process's: i is that of process i mod world."""
    return number % world() == rank()


def in_order(own: Sequence[T]) -> list[T]:
    """What all processes have of their items, `mine`, in the order of the items; plain, or of tensors in main memory."""
    parts = gathered(list(own))
    return [parts[i % len(parts)][i // len(parts)] for i in range(sum(map(len, parts)))]


def part(count: int) -> slice:
    """This process's share of `count` items that are cut into pieces of the same size, or nearly so."""
    return slice(rank() * count // world(), (rank() + 1) * count // world())


@contextlib.contextmanager
def led(helpers: Sequence[Any]) -> Iterator[bool]:
    """`with led(...) as leads:` True in process 0, which goes on alone: only what it calls of `helpers` by a method that is `together`,
    the other processes, which have such helpers too, call as well. They come to the block, with False, when its own is over.
    """
    global _helpers, _alone
    if not is_first():
        while (order := broadcast(None)) is not None:
            number, name, args = order
            getattr(helpers[number], name)(*args)
        yield False
        return
    _helpers, _alone = helpers, True
    try:
        yield True
    finally:
        _helpers, _alone = (), False
    broadcast(None)


def together(method: Callable[..., T]) -> Callable[..., T]:
    """Decorates a method that all processes call where process 0 does, within `led`. Positional arguments go to all of them, named
    ones, such as whether to show progress, are of process 0 alone. It must not call another such method."""

    @functools.wraps(method)
    def call(self: Any, *args: Any, **own: Any) -> T:
        global _alone
        if not _alone:  # another process, that was told to, or a program of one
            return method(self, *args, **own)
        _alone = False
        try:
            broadcast((_helpers.index(self), method.__name__, args))
            return method(self, *args, **own)
        finally:
            _alone = True

    return call


def same_ranges(network: nn.Module) -> None:
    """Give a network, which all processes have on the same hardware, the ADC ranges, plans and corrections that it has in process 0."""
    if world() > 1:
        own = [[None if value is None else value.cpu() for value in values] for values in quant.ranges_of(network)]
        quant.give_ranges(network, broadcast(own))


def same_tensors(tensors: Iterable[torch.Tensor]) -> None:
    """Give tensors, of the same shapes in all processes, the values that they have in process 0."""
    if world() > 1:
        own = [tensor.detach() for tensor in tensors]
        for tensor, value in zip(own, broadcast([tensor.cpu() for tensor in own])):
            tensor.copy_(value)


def same_weights(network: nn.Module) -> None:
    """Give a network the parameters and buffers that it has in process 0."""
    same_tensors([*network.parameters(), *network.buffers()])


def own_random_numbers(seed: int) -> None:
    """Let PyTorch's generators go on from what a seed and the process tell: masks of dropout, which each process draws for its images,
    would else be the same in all."""
    if world() > 1:
        torch.manual_seed(seed + rank())
