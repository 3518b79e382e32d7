"""What a data loader gives, told apart into what a network is called with and what it should answer (`apart`)."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence

from .batches import Batch, inputs_of_forward, takes

TARGETS = ("labels", "label", "targets", "target")  # keys of a mapping whose value is the target
IGNORED = -100  # a target that does not count, as in `torch.nn.functional.cross_entropy`
WITHOUT_SHIFT = ("XLNet", "CpmAnt")  # of transformers: their labels stand beside the outputs
Take = Callable[[Any], tuple[Any, Any]]


def apart(batch: Any, network: nn.Module, take: Take | None = None) -> tuple[Batch, Any]:
    """(what the network is called with, the target or None) of what a data loader gives.

    A mapping's target is what it has under one of `TARGETS`. Labels of transformers' causal language models, and of classes made from
    these, which are the tokens themselves, become the tokens that follow, as the model itself does with them. The last part of a tuple or
    a list is the target where `forward` takes one input less, and not all of them. Where it may take either, it is the target if it is one
    whole number for each example.

    Args: take, a function of the batch that returns both, where this does not fit.
    Raises: ValueError for a batch whose parts cannot be told apart, or whose target the network cannot do without.
    """
    if take is not None:
        found = take(batch)
        if not isinstance(found, tuple) or len(found) != 2:
            raise ValueError(f"take returns a {type(found).__name__}; a tuple (inputs, target) is expected, with None for no target")
        return _plain(found[0]), found[1]
    if any(isinstance(part, PackedSequence) for part in (batch, *(batch if isinstance(batch, (tuple, list)) else ()))):
        raise ValueError("a batch has packed sequences, which cannot be cut into examples; give padded ones with their lengths, and let "
                         "the network pack them")
    if isinstance(batch, Mapping):
        inputs = {key: value for key, value in batch.items() if key not in TARGETS}
        known = inputs_of_forward(network)
        for key in TARGETS:
            if key in batch and key in known and known[key].default is known[key].empty:
                raise ValueError(f"the network needs {key!r} as an input (its {key!r} was taken as the target: give take, a function of a "
                                 "batch that returns (inputs, target))")
        if isinstance(batch.get("labels"), Tensor) and _is_causal(network):
            return inputs, F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED)
        return inputs, next((batch[key] for key in TARGETS if key in batch), None)
    if not isinstance(batch, (tuple, list)):
        return batch, None
    has_target = len(batch) > 1 and _has_target(batch, network)
    inputs, target = (batch[:-1], batch[-1]) if has_target else (batch, None)
    return _plain(inputs[0] if len(inputs) == 1 else inputs), target


def first_targets(target: Any, size: int, count: int) -> Any:
    """The targets of the first examples of a batch of `size`."""
    if isinstance(target, Mapping):
        return {name: first_targets(value, size, count) for name, value in target.items()}
    if isinstance(target, (list, tuple)) and len(target) != size:
        return type(target)(first_targets(value, size, count) for value in target)
    return target[:count] if hasattr(target, "__getitem__") and hasattr(target, "__len__") and len(target) == size else target


def inputs_of(batches: Iterable[Any], network: nn.Module, take: Take | None = None) -> Iterator[Batch]:
    """What the network is called with, of each batch that a data loader gives; see `apart`."""
    return (apart(batch, network, take)[0] for batch in batches)


def _is_causal(network):
    """Whether it is one of transformers that shifts its labels itself, or made from one."""
    config = getattr(network, "config", None)
    # Labels of an encoder with a decoder are shifted already; that may be one part of a network of images and text.
    of_both = getattr(config, "is_encoder_decoder", True) or getattr(getattr(config, "text_config", None), "is_encoder_decoder", False)
    names = [each.__name__ for each in type(network).__mro__]
    kinds = any(name.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")) for name in names)
    return kinds and not of_both and not any(name.startswith(WITHOUT_SHIFT) for name in names)


def _plain(inputs):
    """Mappings and lists as dicts and tuples."""
    return dict(inputs) if isinstance(inputs, Mapping) else tuple(inputs) if isinstance(inputs, list) else inputs


def _has_target(batch, network):
    *inputs, last = batch
    if len(inputs) == 1 and not isinstance(inputs[0], Tensor):  # which is a mapping or a tuple of all inputs
        return True
    fewest, most = takes(network)
    without, whole = (fewest <= count <= most for count in (len(inputs), len(batch)))
    if without != whole:
        return without
    if without and (last is None or isinstance(last, Tensor) and last.dim() == 1 and not last.is_floating_point()):
        return last is not None
    count = f"{fewest}" if fewest == most else f"{fewest} or more" if most == float("inf") else f"{fewest} to {most}"
    raise ValueError(f"a batch has {len(batch)} parts, and the network takes {count} inputs, so it is not clear which part is the target. "
                     "Give take, a function of a batch that returns (inputs, target), such as take=lambda batch: (batch[0], batch[1])")
