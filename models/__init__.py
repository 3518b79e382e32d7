"""The networks: `models.create("vgg7_quant", num_classes=10, wbit=4, abit=4, alpha_init=10.0)` builds one.

Names ending in `_eval` are networks on crossbars, which also take `spec=CrossbarSpec(...)` and `crossbar_layers="all"|"conv"`.
The older way holds too: `model_cfg = getattr(models, name)`, `model_cfg.kwargs.update({...})`, then
`model_cfg.base(*model_cfg.args, **model_cfg.kwargs)`; each `getattr` gives a configuration of its own.
"""

import functools
from collections.abc import Callable
from typing import Any

from torch import nn

from models import resnet, vgg
from models.building import on_crossbars

_NETWORKS = [(network, name) for network, configs in ((vgg.VGG, vgg.CONFIGS), (resnet.ResNet, resnet.CONFIGS)) for name in configs]
_BUILDERS = {f"{name}_quant": (network, name) for network, name in _NETWORKS}
_BUILDERS |= {f"{name}_quant_eval": (functools.partial(on_crossbars, network), name) for network, name in _NETWORKS}


class ModelConfig:
    """How to build one network: `base(*args, **kwargs)`. `args` and `kwargs` may be changed; nobody else sees it."""

    def __init__(self, base: Callable[..., nn.Module], *args: Any, **kwargs: Any) -> None:
        self.base, self.args, self.kwargs = base, list(args), kwargs


def names() -> list[str]:
    """Names of all networks."""
    return sorted(_BUILDERS)


def modules() -> list[str]:
    """Full names of the modules that make them."""
    return [on_crossbars.__module__, *dict.fromkeys(network.__module__ for network, _ in _NETWORKS)]


def create(name: str, **options: Any) -> nn.Module:
    """A new network with weights drawn at random.

    Args: name, one of `names()`; options, `num_classes` and those of `building.Layers`.
    Raises: ValueError for an unknown name or option, or a value that is not allowed.
    """
    if name not in _BUILDERS:
        raise ValueError(_unknown(name))
    base, config = _BUILDERS[name]
    return base(config, **options)


def __getattr__(name: str) -> ModelConfig:
    if name in _BUILDERS:
        return ModelConfig(*_BUILDERS[name])
    raise AttributeError(_unknown(name))


def _unknown(name):
    return f"no network is named {name!r}; known are {', '.join(names())}"
