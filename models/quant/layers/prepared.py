"""What an engine prepared of a layer, and whether it still holds: the one place that decides it.

Weights change in ways that leave no trace in a tensor's version (`weight.data.add_(noise)`, a NumPy view of them, a fused
optimizer), so what was prepared is kept with a checksum of all memory that it was made from, which is taken anew at each use.
For the 13 million weights of VGG7 that is 4 ms, and more where the memory is cold. Who makes many calls and changes nothing in between
says so (`unchanged`).
"""

import contextlib
import contextvars
import ctypes
import functools
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..kernels import checksum

SMALL = 4096  # bytes that are compared as they are

# The weights that were seen in the block of `unchanged` in which the program is.
_block: contextvars.ContextVar[dict["Prepared", Tensor] | None] = contextvars.ContextVar("block", default=None)


@contextlib.contextmanager
def unchanged() -> Iterator[None]:
    """Within the block what was found to hold is not looked at again: nobody changes numbers of a network in place. A block within a
    block is part of it."""
    if _block.get() is not None:
        yield
        return
    token = _block.set({})
    try:
        yield
    finally:
        _block.get().clear()
        _block.reset(token)


class Prepared:
    """Keeps one value with what it was made from. It is not copied or saved with the layer: a copy makes its own."""

    def __init__(self) -> None:
        # (settings, fingerprint, value, block of `unchanged` that saw it), replaced as a whole: replicas in other threads may share it
        self._entry = None

    def __reduce__(self) -> tuple:
        return Prepared, ()

    def get(self, settings: Hashable, numbers: Sequence[Tensor], weight: Tensor, make: Callable[[], Any],
            any_weight: bool = False) -> Any:
        """What `make()` returns, or returned when `settings`, the `numbers` and the `weight` were what they are now.

        Args: any_weight, what was made of another weight will do as well.
        """
        entry, block = self._entry, _block.get()
        if entry is not None and entry[0] == settings and block is not None and entry[3] is block and _is_same(block.get(self), weight):
            return entry[2]
        seen = fingerprint(numbers if any_weight else [*numbers, weight])
        if entry is None or entry[0] != settings or entry[1][:len(seen)] != seen:
            self._entry = None  # what is to be replaced makes room first
            seen = fingerprint([*numbers, weight])
            self._entry = entry = settings, seen, make(), block
        elif not any_weight:
            self._entry = entry = *entry[:3], block
        if block is not None and entry[3] is block:
            block[self] = weight
        return entry[2]


def _is_same(one: Tensor | None, other: Tensor) -> bool:
    """Whether two tensors are one, or the same view of one memory, as of a part of a weight. (One is alive, so its memory is its own.)"""
    if one is other or one is None:
        return one is other
    if one.layout != torch.strided or other.layout != torch.strided or not one.data_ptr():
        return False
    return _view(one) == _view(other)


def _view(tensor):
    return tensor.data_ptr(), tensor.device, tensor.dtype, tensor.shape, tensor.stride(), tensor.is_neg(), tensor.is_conj()


def fingerprint(tensors: Sequence[Tensor]) -> list[tuple]:
    """For each tensor its type, shape and strides, and a checksum of its memory, or the memory itself where it is small.

    Every change of one number changes it, and any other change but for a chance of 2^-32 (`kernels.checksum`).
    Works with tensors of any type, in inference mode too. On a GPU all sums are under way before the first is waited for.
    """
    tensors = [resolved(tensor) for tensor in tensors]
    sums = [_content(tensor) for tensor in tensors]
    return [(tensor.dtype, tensor.shape, tensor.stride(), part if isinstance(part, bytes) else part.cpu().numpy().tobytes())
            for tensor, part in zip(tensors, sums)]


def resolved(tensor: Tensor) -> Tensor:
    """The tensor with all its numbers in memory: zeros that a sparse one leaves out, signs that a view only says to turn."""
    return (tensor if tensor.layout == torch.strided else tensor.to_dense()).resolve_conj().resolve_neg()


def _content(tensor: Tensor) -> bytes | Tensor:
    """What tells the numbers of a tensor: its bytes, or checksums. A layer has some ten tensors of a few bytes, of which PyTorch would
    take longer to make arrays than to run the layer."""
    size = tensor.numel() * tensor.element_size()
    if size > SMALL:
        return _sums(_memory(tensor.detach()))
    if tensor.device.type == "cpu" and tensor.is_contiguous():
        return ctypes.string_at(tensor.data_ptr(), size)
    return _memory(tensor.detach())


def _memory(tensor: Tensor) -> Tensor:
    """The bytes of a tensor, uint8 `[bytes]`, in the order of memory where it has no gaps; aligned to 8 bytes."""
    if not (tensor.is_contiguous() or tensor.is_contiguous(memory_format=torch.channels_last)):
        tensor = tensor.contiguous()
    flat = tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)
    return flat.clone() if flat.data_ptr() % 8 else flat


def _sums(memory: Tensor) -> Tensor:
    """Checksums of the blocks of some memory, and the last bytes that fill no word: uint8, on its device."""
    whole = len(memory) // 8 * 8
    words = memory[:whole]
    if memory.device.type == "cpu":
        sums = torch.from_numpy(checksum.block_sums(words.numpy().view(np.uint64)).view(np.uint8))
    else:
        sums = block_sums(words.view(torch.int64)).view(torch.uint8)
    return torch.cat([sums, memory[whole:]]) if whole < len(memory) else sums


def block_sums(words: Tensor) -> Tensor:
    """`kernels.checksum.block_sums` on any device: words, int64; the sums are int64 of the same bits."""
    blocks = len(words) // checksum.BLOCK
    full = words[:blocks * checksum.BLOCK].view(blocks, checksum.BLOCK)
    rest = words[blocks * checksum.BLOCK:][None]
    return torch.cat([_row_sums(part) for part in (full, rest) if part.numel()])


def _row_sums(words: Tensor) -> Tensor:
    mixed = words ^ _keys(words.device)[:words.shape[1]]
    high, low = (mixed >> 32) & 0xFFFFFFFF, mixed & 0xFFFFFFFF
    return (high * low + (high + low << 32)).sum(1)


@functools.cache
def _keys(device: torch.device) -> Tensor:
    return torch.from_numpy(checksum.KEYS.view(np.int64)).to(device)
