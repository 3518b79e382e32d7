"""Examples that pass a network, in batches; of several processes each has some of these."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from operator import length_hint
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as tree
from torch.utils.data import RandomSampler
from tqdm import tqdm

from ..arrays.readout import image_numbers
from ..layers import batches as cutting
from ..layers.batches import Batch, called, length
from ..layers.loaders import Take, apart, inputs_of
from ..layers.prepared import unchanged
from .processes import ALONE, Processes

Images = Batch | Iterable[Any]  # network inputs [N, ...], or batches of them, perhaps with targets, that can be gone through again


def batches_of(images: Images, batch_size: int) -> Iterable[Any]:
    """Batches, as they are given or cut, which can be gone through more than once."""
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; allowed are whole numbers from 1")
    if images is None or not isinstance(images, (torch.Tensor, dict)) and iter(images) is images:
        raise ValueError("the images are gone through more than once: give a tensor or a list of batches, not a generator")
    return cutting.batches_of(images, 0, batch_size)


def in_order(batches: Iterable[Any]) -> Iterable[Any]:
    """Batches that are measured. Raises: ValueError for those that come in another order each time."""
    if isinstance(getattr(batches, "sampler", None), RandomSampler):
        raise ValueError("the DataLoader shuffles, and examples are compared between passes: give one with shuffle=False")
    return batches


@dataclass
class Inputs:
    """What the network is called with, on its device, of batches that a data loader gives; can be gone through again. Args: see
    `loaders.apart`."""

    batches: Iterable[Any]
    network: nn.Module
    take: Take | None = None

    def __iter__(self) -> Iterator[Batch]:
        return (on_device(inputs, self.network, True) for inputs in inputs_of(self.batches, self.network, self.take))

    def __len__(self) -> int:
        return len(self.batches)


def on_device(part: Any, network: nn.Module, own_type: bool = False) -> Any:
    """Inputs or targets where the network's parameters are. Args: own_type, in the parameters' floating type too, as inputs are."""
    one = next((parameter for parameter in network.parameters() if parameter.is_floating_point()), torch.empty(0))
    return tree.tree_map_only(torch.Tensor, lambda x: x.to(one.device, one.dtype if own_type and x.is_floating_point() else x.dtype), part)


@torch.no_grad()
def passed(network: nn.Module, batches: Iterable[Any], see: Callable[[int, Any, Any], None], *,
           labels: Sequence | torch.Tensor | None = None, take: Take | None = None, reference: nn.Module | None = None,
           title: str = "", progress: bool = False, passing: contextlib.AbstractContextManager | None = None,
           processes: Processes = ALONE) -> tuple[int, float]:
    """Let batches pass a network, and call `see(how many examples, target, output)` for each of this process's. Of batches that have a
    `first_image` that is the number of their first example, from which the noise of its reads follows; else it is 0.

    Args: labels, targets of all examples, which then come without any; take, see `loaders.apart`; reference, a network whose outputs are
        the targets; passing, processes, see `measure`.
    Returns: (how many examples passed in all processes, seconds in the network and in `see`, of the slowest).
    Raises: ValueError for a batch without examples, or labels that are not one for each.
    """
    seconds, count, watched, before = 0.0, 0, sys.stderr.isatty(), getattr(batches, "first_image", 0)
    mine = _own(batches, processes, lambda batch: length(apart(batch, network, take)[0]))
    shown = tqdm(mine, desc=title, unit="batch", dynamic_ncols=True, leave=False, disable=not progress,
                 total=-(-length_hint(batches) // processes.world()) or None,
                 mininterval=0.5 if watched else 60, delay=0 if watched else 60)
    with passing or contextlib.nullcontext(), unchanged():
        for first, batch in shown:
            inputs, target = apart(batch, network, take)
            inputs, size = on_device(inputs, network, True), length(inputs)
            if not size:
                raise ValueError("a batch has no examples; leave it out")
            if labels is not None:
                if target is not None:
                    raise ValueError("targets are given twice, as labels and in the batches; leave the labels out")
                target = labels[first:first + size]
                if len(target) < size:  # which is said below
                    count += size
                    continue
            target = on_device(target, network) if reference is None else called(reference, inputs)
            started = time.perf_counter()
            with image_numbers(before + first, size):  # noise of reads does not depend on the batches
                output = called(network, inputs)
                see(size, target, output)
            seconds, count = seconds + time.perf_counter() - started, count + size
    count = sum(processes.gathered(count))
    if labels is not None and count != len(labels):
        raise ValueError(f"{count} examples have {len(labels)} labels")
    return count, max(processes.gathered(seconds))


def predict(network: nn.Module, batches: Iterable[Any]) -> torch.Tensor:
    """The class of each example: that of the largest output."""
    found: list[torch.Tensor] = []
    passed(network, batches, lambda _, __, output: found.append(output.argmax(1).cpu()))
    return torch.cat(found)


def _own(batches: Iterable[Any], processes: Processes, size: Callable[[Any], int]) -> Iterator[tuple[int, Any]]:
    """(number of its first example, batch) of the batches that are this process's. Where they have a `batch_size` and are made when they
    are asked for by their number, the others are not made."""
    if hasattr(batches, "batch_size") and hasattr(batches, "__getitem__"):
        yield from ((number * batches.batch_size, batches[number]) for number in range(len(batches)) if processes.mine(number))
        return
    first = 0
    for number, batch in enumerate(batches):
        if processes.mine(number):
            yield first, batch
        first += size(batch)
