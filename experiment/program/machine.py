"""The machine: what it is, which device computes, what its memory and its random numbers are told to do."""

import contextlib
import ctypes
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from models import quant

from . import distributed
from .cli import UserError


def machine_info() -> dict[str, str | int | None]:
    """Versions and hardware, as plain values, to stand beside every measured number; None for what is not there."""
    return {
        "torchrram": quant.__version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),  # a str subclass otherwise, which weights_only refuses
        "numba": _version("numba"),
        "triton": _version("triton"),
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "processes": distributed.world(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    """With family and model, where Linux says them: virtual machines call all generations of a maker by one name."""
    with contextlib.suppress(OSError):
        lines = (line.partition(":") for line in Path("/proc/cpuinfo").read_text().partition("\n\n")[0].splitlines())
        said = {name.strip(): value.strip() for name, _, value in lines}
        if "model name" in said:
            return said["model name"] + "".join(f", {name} {said[name]}" for name in ("cpu family", "model") if name in said)
    return platform.processor() or platform.machine()


def keep_freed_memory() -> None:
    """Let the C library keep what tensors free, where it is glibc: training and evaluation take a quarter less time.

    By default every large tensor is mapped anew, and the system fills each of its pages with zeros when it is first
    written. Call this before tensors are made.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    mallopt = ctypes.CDLL(None).mallopt
    M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX, M_ARENA_MAX = -1, -2, -4, -8  # malloc.h
    mallopt(M_MMAP_MAX, 0)
    mallopt(M_ARENA_MAX, 1)  # an arena of a thread has no room for large tensors: they would be mapped anew again
    mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    mallopt(M_TOP_PAD, 2**26)


def give_back_memory() -> None:
    """Give what the C library keeps back to the system, where it is glibc and has twice as much as after the last time.

    Chips of many settings leave gaps between what stays: a sheet of VGG7 has 8 GB after an hour, of which it needs 1.5.
    """
    global _needed
    if platform.libc_ver()[0] == "glibc" and _memory() > 2 * _needed:
        ctypes.CDLL(None).malloc_trim(0)
        _needed = max(_memory(), LITTLE)


LITTLE = 2**30  # bytes, which may be doubled
_needed = LITTLE  # after the last time


def _memory() -> int:
    """Bytes of memory that this process has, on Linux."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def pick_device(ngpu: int | None = None) -> torch.device:
    """The device of this process for --ngpu: 0 the CPU, else a GPU; None a GPU if there is one. Each process of a machine has its own.

    Raises: UserError for another number of GPUs than that of the processes, or GPUs that are not there.
    """
    number, processes = distributed.on_this_machine()
    if ngpu is None:
        ngpu = processes if torch.cuda.is_available() else 0
    if ngpu not in (0, processes):
        raise UserError(f"--ngpu {ngpu}: give 0 for the CPU, or {processes}, a GPU for each process of this machine")
    if ngpu > torch.cuda.device_count():
        raise UserError(f"--ngpu {ngpu}: PyTorch finds {torch.cuda.device_count() or 'no'} CUDA GPU here; use --ngpu 0")
    if not ngpu:
        return torch.device("cpu")
    if number:
        torch.cuda.set_device(number)
    return torch.device("cuda")


def has_fast_bf16(device: torch.device) -> bool:
    """Whether bfloat16 arithmetic is done in hardware: there autocast is faster, elsewhere several times slower."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def rng_state() -> dict[str, Any]:
    """The state of torch's global generators, as a dict that goes into a checkpoint."""
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []}


def set_rng_state(state: dict[str, Any]) -> None:
    """Go back to a `rng_state()`. That of GPUs is left out where their number is another."""
    torch.set_rng_state(state["cpu"])
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
