"""The images of a conversion: batches of inputs as the network takes them, and what it says where it does not."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from ..layers.batches import Batch, batches_of, each, first_of, inputs_of_forward, length, tensors_of
from ..layers.loaders import TARGETS, Take, inputs_of


def batches_of_images(images: Batch | Iterable[Any], net: nn.Module, dim: int, take: Take | None) -> list[Batch]:
    """The images as a list of batches, on the network's device, in its type."""
    if images is None or isinstance(images, Tensor) and not images.dim():
        raise ValueError("there are no images to convert with; give a tensor [N, ...] of some of the training set, or batches of them")
    whole = isinstance(images, (Tensor, Mapping, PackedSequence))
    given = list(inputs_of([images] if whole else images, net, take))
    for batch in given:
        _check(batch, dim)
    batches = [part for batch in given for part in (batches_of(batch, dim) if whole else [batch]) if length(part, dim)]
    if not batches:
        raise ValueError("there are no images to convert with; give some of the training set")
    shapes = dict.fromkeys(_shapes(each(first_of(batch, 1, dim), lambda x: x.squeeze(dim) if x.dim() > dim else x)) for batch in batches)
    if len(shapes) > 1:
        raise ValueError(f"the images have several sizes ({', '.join(shapes)}); give those of one size, cut or padded as the network takes "
                         "them, such as texts padded to one length")
    parameter = next((parameter for parameter in net.parameters() if parameter.is_floating_point()), None)
    if parameter is None:
        raise ValueError("this network has no weights")
    return [each(batch, lambda x: x.to(parameter.device, parameter.dtype if x.is_floating_point() else x.dtype)) for batch in batches]


def _check(batch, dim):
    tensors = tensors_of(batch)
    if not tensors:
        raise ValueError(f"a batch of the images is a {type(batch).__name__}; give a tensor, or a tuple or a dict with tensors, as the "
                         "network takes them")
    if tensors[0].is_floating_point() and not bool(tensors[0].isfinite().all()):  # others may be masks of -inf
        raise ValueError("the images hold numbers that are not finite")
    if type(dim) is not int or not 0 <= dim < tensors[0].dim():
        raise ValueError(f"batch_dim is {dim!r}; allowed are whole numbers from 0 to {tensors[0].dim() - 1}, a dimension of the images")


def _shapes(batch):
    """The shapes of a batch's tensors, as text."""
    return ", ".join(str(list(x.shape)) for x in tensors_of(batch))


@contextlib.contextmanager
def said_of(net: nn.Module, images: Batch) -> Iterator[None]:
    """What a network raises that does not run on the images, as one line."""
    try:
        yield
    except (RuntimeError, ValueError, LookupError, TypeError) as error:
        line = next(iter(str(error).strip().splitlines()), type(error).__name__)
        if isinstance(error, KeyError):
            of_target = f" (it was taken as the target: give take=lambda batch: (batch, batch[{line}]))" if error.args[0] in TARGETS else ""
            line = f"it asks for {line}, which is not there{of_target}"
        elif isinstance(error, TypeError) and isinstance(images, Mapping):
            line += (f" (forward takes {', '.join(inputs_of_forward(net))}, the dict has {', '.join(map(str, images))}: give it the same "
                     "names; or a forward that takes the dict as one input of another name)")
        else:
            line += " (if the batch is not the first dimension, give batch_dim)"
        raise ValueError(f"the network does not run on the images, of shape {_shapes(images)}: {line}") from error
