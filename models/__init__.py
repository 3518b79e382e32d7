"""The registry: `model_cfg = getattr(models, name)`, then `model_cfg.base(*model_cfg.args, **model_cfg.kwargs)`.

`model_cfg.kwargs.update({"num_classes": 10, "wbit": 4, "abit": 4, "alpha_init": 10.0})` sets the network's options; the
`_eval` configurations also take `spec=CrossbarSpec(...)` and `map="conv"|"all"`.
"""

from .vgg import CONFIGS, VGG, crossbar_vgg


class ModelConfig:
    """How to build one network: `base(*args, **kwargs)`."""

    def __init__(self, base, *args, **kwargs):
        self.base, self.args, self.kwargs = base, list(args), kwargs


_REGISTRY = {f"{name}_quant": ModelConfig(VGG, name) for name in CONFIGS}
_REGISTRY |= {f"{name}_quant_eval": ModelConfig(crossbar_vgg, name) for name in CONFIGS}


def names():
    """Names of all registered networks."""
    return sorted(_REGISTRY)


def __getattr__(name):
    if name in _REGISTRY:
        return _REGISTRY[name]
    raise AttributeError(f"no network is named {name!r}; known are {', '.join(names())}")
