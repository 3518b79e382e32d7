"""How a whole network runs for a while: in training or evaluation mode, without its ADCs."""

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import replace

from torch import nn
from torch.utils.hooks import RemovableHandle

from ..layers.crossbar import CrossbarLayer, crossbar_layers
from ..layers.on_arrays import ADC_BUFFERS


def converted_layers(model: nn.Module) -> list[tuple[str, CrossbarLayer]]:
    """`[(name, layer), ...]` of the crossbar layers that have an ADC: all but those with adc_range "ideal".

    Raises: ValueError if there is none.
    """
    layers = [(name, layer) for name, layer in crossbar_layers(model) if layer.spec.adc_range != "ideal"]
    if not layers:
        raise ValueError("no layer of this network has an ADC: it has no crossbar layers, or their adc_range is 'ideal'")
    return layers


@contextlib.contextmanager
def hooked(hooks: Iterable[RemovableHandle]) -> Iterator[None]:
    """Within the block modules have these hooks, which are registered as they are asked for."""
    with contextlib.ExitStack() as stack:
        for hook in hooks:
            stack.enter_context(hook)
        yield


@contextlib.contextmanager
def in_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Within the block the network is in training or evaluation mode; then each module is in the mode that it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, mode in modes:  # not `train`, which sets the modules below too
            module.training = mode


@contextlib.contextmanager
def without_adc(model: nn.Module, training: bool = False) -> Iterator[None]:
    """Within the block the crossbar layers of `model` have no ADC and ideal cells, as in software. The model is in evaluation mode, or
    with `training` in training mode. Afterwards everything is as before, the mode of each module too."""
    kept = *ADC_BUFFERS, "ranges_of"
    before = [(layer, layer.spec, [getattr(layer, name) for name in kept], layer.chip) for _, layer in crossbar_layers(model)]
    with in_mode(model, training):
        try:
            for layer, spec, *_ in before:
                layer.chip = None
                layer.set_spec(replace(spec, adc_range="ideal"))
            yield
        finally:
            for layer, spec, values, chip in before:
                layer.set_spec(spec)
                layer.chip = chip
                for name, value in zip(kept, values):
                    setattr(layer, name, value)
