"""What a network is called with, a batch at a time.

A batch is a tensor, `network(x)`, a tuple, `network(*batch)`, or a mapping: `network(**batch)`, or `network(batch)` (`takes_whole`). Its
examples lie along one dimension of its tensors. Whatever is no tensor, and tensors of another length, such as positions that all examples
share, are handed on as they are.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as tree

BATCH = 64  # images that run together: counts do not depend on it, but a conversion fits scales to samples of each batch
Batch = Tensor | tuple | dict


def called(network: nn.Module, batch: Batch) -> Any:
    """What a network returns for a batch."""
    if isinstance(batch, Tensor) or isinstance(batch, Mapping) and takes_whole(network, batch):
        return network(batch)
    return network(**batch) if isinstance(batch, Mapping) else network(*batch)


def inputs_of_forward(network: nn.Module) -> Mapping[str, inspect.Parameter]:
    """The inputs of a network's `forward` by name; none where code that is not Python does not tell them."""
    try:
        return inspect.signature(getattr(network, "_orig_mod", network).forward).parameters  # the former under torch.compile
    except ValueError:
        return {}


def takes(network: nn.Module) -> tuple[int, float]:
    """(fewest, most) inputs by place that `forward` takes."""
    known = inputs_of_forward(network).values()
    places = [each for each in known if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)]
    most = float("inf") if any(each.kind is each.VAR_POSITIONAL for each in known) else len(places)
    return sum(each.default is each.empty for each in places), most


def takes_whole(network: nn.Module, batch: Mapping) -> bool:
    """Whether `forward` takes a mapping as one input: it needs one, and no input is called as a part of the mapping is."""
    return takes(network)[0] == 1 and not batch.keys() & inputs_of_forward(network).keys()


def output_of(network: nn.Module, batch: Batch) -> Tensor:
    """The output that counts, see `first_tensor`, of a network for a batch."""
    return first_tensor(called(network, batch))


def first_tensor(y: Any) -> Tensor:
    """The output that counts where a network returns several: `logits`, or the first."""
    if isinstance(y, Tensor):
        return y
    logits = y.get("logits") if isinstance(y, Mapping) else getattr(y, "logits", None)
    leaves = tree.tree_leaves(vars(y) if is_dataclass(y) and not isinstance(y, Mapping) else y)
    found = logits if logits is not None else next((x for x in leaves if isinstance(x, Tensor) and x.is_floating_point()), None)
    if found is None:
        raise ValueError(f"the network returns a {type(y).__name__}, in which no tensor of real numbers can be found; let it return a "
                         "tensor, or a tuple, list or dict of tensors")
    return found


def each(batch: Batch, change: Callable[[Tensor], Any]) -> Any:
    """A batch with something else in place of each tensor."""
    return tree.tree_map_only(Tensor, change, batch)


def copied(batch: Batch) -> Batch:
    """A batch that a network may write to."""
    return each(batch, Tensor.clone)


def tensors_of(batch: Batch) -> list[Tensor]:
    """Its tensors, in their order."""
    return [leaf for leaf in tree.tree_leaves(batch) if isinstance(leaf, Tensor)]


def length(batch: Batch, dim: int = 0) -> int:
    """How many examples a batch has: the length of its first tensor. Raises: ValueError for one without tensors, or where that has no
    such dimension."""
    first = next(iter(tensors_of(batch)), None)
    if first is not None and first.dim() <= dim:
        raise ValueError(f"the first tensor of a batch has shape {list(first.shape)}, and no dimension {dim} along which its examples lie")
    if first is None:
        raise ValueError(f"a batch is a {type(batch).__name__} without tensors; give a tensor, or a tuple or a dict of tensors")
    return first.shape[dim]


def part_of(batch: Batch, first: int, count: int, dim: int = 0) -> Batch:
    """Some examples of a batch, as views."""
    whole = length(batch, dim)
    count = min(count, whole - first)
    return each(batch, lambda x: x.narrow(dim, first, count) if x.dim() > dim and x.shape[dim] == whole else x)


def first_of(batch: Batch, count: int, dim: int = 0) -> Batch:
    """The first examples of a batch, as views."""
    return part_of(batch, 0, count, dim)


def joined(batches: list[Batch], dim: int) -> Batch:
    """Batches of one form as one. What is no tensor of examples is that of the first."""
    leaves, form = tree.tree_flatten(batches[0])
    of_each = [leaves, *(tree.tree_leaves(batch) for batch in batches[1:])]
    sizes = [length(batch, dim) for batch in batches]

    def whole(parts: tuple) -> Any:
        alike = all(isinstance(x, Tensor) and x.dim() > dim and x.shape[dim] == size for x, size in zip(parts, sizes))
        return torch.cat(parts, dim) if alike else parts[0]

    return tree.tree_unflatten([whole(parts) for parts in zip(*of_each)], form)


def batches_of(images: Batch | Iterable[Batch], dim: int, size: int = BATCH) -> Iterable[Batch]:
    """The batches that are given, or those of so many examples that a tensor, or a mapping of tensors, is cut into. Args: dim, along which
    they lie."""
    if isinstance(images, Tensor):
        return images.split(size, dim)
    if isinstance(images, Mapping):
        return [part_of(dict(images), first, size, dim) for first in range(0, length(dict(images), dim), size)]
    return images


class First:
    """Keeps the first images that pass by, for a source that can be read only once. Args: count, of images; dim, along which they lie."""

    def __init__(self, count: int, dim: int) -> None:
        self.missing, self.dim, self.kept = count, dim, []

    def of(self, images: Batch | Iterable[Batch]) -> Iterator[Batch]:
        """The batches of `images`, the first of which are kept."""
        for batch in batches_of(images, self.dim):
            if self.missing > 0:
                self.kept.append(first_of(batch, self.missing, self.dim))
                self.missing -= length(batch, self.dim)
            yield batch

    def fill(self, images: Batch | Iterable[Batch]) -> "First":
        """Itself, with these `images`, of which no more is read than is kept."""
        for _ in self.of(images):
            if self.missing <= 0:
                break
        return self

    def batch(self) -> Batch | None:
        """What was kept, as one batch; None where there was nothing."""
        return joined(self.kept, self.dim) if self.kept else None
