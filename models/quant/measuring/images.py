"""Images that pass a network, in batches; of several processes each has some of these."""

import contextlib
import sys
import time
from collections.abc import Iterable, Iterator, Sized

import torch
from torch import nn
from tqdm import tqdm

from ..arrays.readout import image_numbers
from ..layers.prepared import unchanged
from .processes import ALONE, Processes

Images = torch.Tensor | Iterable[torch.Tensor]  # network inputs [N, ...], or batches of them that can be gone through again


def batches_of(images: Images, batch_size: int) -> Iterable[torch.Tensor]:
    """Batches of network inputs, which can be gone through more than once."""
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; allowed are whole numbers from 1")
    if isinstance(images, torch.Tensor):
        return images.split(batch_size)
    if iter(images) is images:
        raise ValueError("the images are gone through more than once: give a tensor or a list of batches, not a generator")
    return images


def first_image(batches: Iterable[torch.Tensor]) -> torch.Tensor:
    """A batch of the first image alone. Raises: ValueError for none."""
    image = next((batch[:1] for batch in batches if len(batch)), None)
    if image is None:
        raise ValueError("there are no images to measure on")
    return image


@torch.no_grad()
def predict(network: nn.Module, batches: Iterable[torch.Tensor], title: str = "", progress: bool = False,
            passing: contextlib.AbstractContextManager | None = None, processes: Processes = ALONE, whole: bool = False
            ) -> tuple[torch.Tensor, float]:
    """(predicted class of each image, seconds in the network); of several processes, each of which has whole batches, those of the
    slowest. Args: passing, processes, see `measure`; whole, give the outputs `[N, ...]` in place of the classes."""
    found, seconds, watched = [], 0.0, sys.stderr.isatty()
    network(first_image(batches))  # prepares the weights, and the first time compiles
    shown = tqdm(_own(batches, processes), desc=title, unit="batch", dynamic_ncols=True, leave=False, disable=not progress,
                 total=-(-len(batches) // processes.world()) if isinstance(batches, Sized) else None,
                 mininterval=0.5 if watched else 60, delay=0 if watched else 60)
    with passing or contextlib.nullcontext(), unchanged():
        for first, batch in shown:
            started = time.perf_counter()
            with image_numbers(first, len(batch)):  # noise of reads does not depend on the batches
                outputs = network(batch)
                found.append((outputs if whole else outputs.argmax(1)).cpu())
            seconds += time.perf_counter() - started
    return torch.cat(processes.in_order(found)), max(processes.gathered(seconds))


def _own(batches: Iterable[torch.Tensor], processes: Processes) -> Iterator[tuple[int, torch.Tensor]]:
    """(number of its first image, batch) of the batches that are this process's. Where they have a `batch_size` and are made when they are
    asked for by their number, the others are not made."""
    if hasattr(batches, "batch_size") and hasattr(batches, "__getitem__"):
        yield from ((number * batches.batch_size, batches[number]) for number in range(len(batches)) if processes.mine(number))
        return
    first = 0
    for number, batch in enumerate(batches):
        if processes.mine(number):
            yield first, batch
        first += len(batch)
