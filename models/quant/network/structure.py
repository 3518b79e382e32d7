"""What a network computes with beside its tensors: the classes of its modules, and their numbers and words."""

from dataclasses import asdict
from typing import Any

from torch import nn

from ..layers.crossbar import CrossbarLayer

PLAIN = bool, int, float, str, type(None)
NO_MATTER = ("training", "inplace")  # for what a network in evaluation mode computes


def structure(network: nn.Module) -> dict[str, dict[str, Any]]:
    """`{module: {"class": its name, attribute: value}}`: strides, paddings, poolings and the like; of a layer on crossbars the shape of its
    product, whatever hardware it is on."""
    return {name: {"class": type(module).__qualname__, **_facts(module)} for name, module in network.named_modules()}


def _facts(module):
    if isinstance(module, CrossbarLayer):
        of_any_code = getattr(module, "form", None) is not None  # geometries of these follow from their scales too
        return asdict(module.form if of_any_code else module.geometry) | {"out_scale": module.out_scale} | (
            {"encoding": module.encoding, "quantized": module.quantized} if of_any_code else {})
    return {name: value for name, value in vars(module).items()
            if not name.startswith("_") and name not in NO_MATTER and _is_plain(value)}


def _is_plain(value):
    return all(map(_is_plain, value)) if isinstance(value, tuple) else isinstance(value, PLAIN)
