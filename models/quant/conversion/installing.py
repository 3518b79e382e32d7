"""Layers in a network: where they stand in its modules, how its weights come to be bound to them, and what a file says of that."""

import copy
import functools
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.spectral_norm import SpectralNorm, remove_spectral_norm
from torch.nn.utils.weight_norm import WeightNorm, remove_weight_norm

from ..arrays.spec import CrossbarSpec
from ..layers.crossbar import crossbar_layers
from ..layers.eager import refuse_export
from .attention import open_attention
from .binding import Bound, plain
from .layer import ConvertedLayer
from .options import NAME
from .products import Form
from .tracing import Product
from .training import Passes


def prepared_copy(model: nn.Module, inplace: bool) -> nn.Module:
    """The network in evaluation mode, with plain parameters and attention whose products can be seen."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"the model is a {type(model).__name__}; a torch.nn.Module is expected")
    model = getattr(model, "_orig_mod", model)  # under torch.compile
    if isinstance(model, torch.jit.ScriptModule):
        raise ValueError("the network is compiled by torch.jit, so that its products cannot be seen; convert the one that it was made from")
    if any(isinstance(parameter, Bound) for parameter in model.parameters()):
        raise ValueError("this network is on crossbars already; convert the one that it was made from")
    for module in model.modules():  # what hooks have computed, of a norm of weights or a mask, has a gradient, which cannot be copied
        for name, value in list(vars(module).items()):
            if isinstance(value, Tensor) and value.grad_fn is not None:
                setattr(module, name, value.detach())
    net = model if inplace else copy.deepcopy(model)
    net.eval()
    for module in net.modules():
        for hook in list(module._forward_pre_hooks.values()):
            if isinstance(hook, WeightNorm):
                remove_weight_norm(module, hook.name)
            elif isinstance(hook, SpectralNorm):
                remove_spectral_norm(module, hook.name)
        if parametrize.is_parametrized(module):
            _bake(module)
    open_attention(net)
    return net


def _bake(module):
    """Put what its parametrizations compute in their place. PyTorch's own removal would change the class that copies share."""
    made = {name: (getattr(module, name).detach().clone(), each) for name, each in module.parametrizations.items()}
    del module.parametrizations
    module.__class__ = module.__class__.__bases__[0]
    for name, (value, each) in made.items():
        parameter = any(isinstance(original, nn.Parameter) for original in each.parameters(recurse=False))
        (module.register_parameter if parameter else module.register_buffer)(name, nn.Parameter(value) if parameter else value)


def bind(net: nn.Module, layers: Mapping[Any, tuple[Product, CrossbarSpec | None]], known: Mapping[str, Iterable[str]],
         digital: Collection[tuple[str, str]], inputs: str) -> dict[Any, tuple[ConvertedLayer, Product]]:
    """Put layers into the network: `{name: (layer, product)}`. Args: layers, `{name: (product, spec, or None where nothing is quantized)}`;
    known, digital, see `Trace`; inputs, an encoding."""
    parameters, bound, roots, owners = dict(net.named_parameters()), {}, {}, {}
    for module in net.modules():
        for key, parameter in module._parameters.items():
            owners.setdefault(id(parameter), []).append((module, key))
    for name, (product, spec) in layers.items():
        parameter = parameters[product.parameter]
        if product.parameter not in roots:
            root = roots[product.parameter] = Bound.of(parameter, {}, frozenset(known.get(product.parameter, ())), frozenset(
                path for name, path in digital if name == product.parameter), product.parameter)
            for module, key in owners[id(parameter)]:
                module._parameters[key] = root
                module.register_load_state_dict_pre_hook(functools.partial(_forget_cells, key, root))
                module.register_load_state_dict_post_hook(functools.partial(_bind_again, key, root))
                module.register_state_dict_post_hook(functools.partial(_plain_again, key))
        root = roots[product.parameter]
        layer = ConvertedLayer(product.form, root, product.path, product.weight, product.sources,
                               spec or CrossbarSpec(8, 8, adc_range="ideal"), inputs, quantized=spec is not None)
        layer.to(parameter.device)
        layer.shared = product.calls > 1
        owner, key = owners[id(parameter)][0]
        if isinstance(owner, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
            raise ValueError(f"{product.parameter} cannot be put on crossbars: it is a parameter of a {type(owner).__name__}, "
                             f"which should hold layers only; move it into a module of its own, or give skip=[{product.parameter!r}]")
        place = NAME if key == "weight" and not product.path else f"{NAME}_{key}" + (f"_{len(root.layers)}" if product.path else "")
        while hasattr(owner, place):  # a name that the network has itself
            place += "_"
        owner.add_module(place, layer.eval())
        root.layers[product.path] = layer
        bound[name] = layer, product
    return bound


def hooked(net: nn.Module) -> nn.Module:
    """The network, which has layers now: not to be exported, counting its passes, and loading states."""
    net.register_forward_pre_hook(refuse_export)
    net.crossbar_passes = Passes()
    net.register_forward_pre_hook(net.crossbar_passes.before, with_kwargs=True)
    net.register_forward_hook(net.crossbar_passes.after, always_call=True)
    net.register_load_state_dict_post_hook(_settle)
    return net


def _forget_cells(key, root, _, state_dict, prefix, *__):
    """Cells that were programmed, and codes in place of the weight's, hold until weights are loaded; see `OnArrays.set_cells`."""
    if prefix + key in state_dict:  # of the network's own weights, perhaps without anything of the layers that they are bound to
        for layer in root.layers.values():
            layer.set_codes(None)
            layer.set_cells(None)


def _settle(net, _):
    """After all of a state was loaded."""
    for _, layer in crossbar_layers(net):
        if isinstance(layer, ConvertedLayer):
            layer.settle()


def _bind_again(key, root, module, _):
    """After a state was loaded that put other tensors in place of the parameters (`assign=True`)."""
    loaded = module._parameters[key]
    if loaded is not root:
        root.data = loaded.detach()
        setattr(module, key, root)  # recurrent layers of PyTorch keep a list of their weights beside


def _plain_again(key, _, state_dict, prefix, *__):
    """Let a state hold plain tensors, also of a network that uses `weight.detach()` as a weight."""
    if prefix + key in state_dict:
        state_dict[prefix + key] = plain(state_dict[prefix + key])


def facts_of(net: nn.Module) -> list[dict[str, Any]]:
    """What `bound_again` needs of each layer of a converted network: plain values."""
    names, roots = {module: name for name, module in net.named_modules()}, {}
    for _, layer in crossbar_layers(net):
        roots.setdefault(layer.root.label, layer.root)
    return [{**layer.facts(names), "parameter": name, "shape": [*root.shape], "known": sorted(root.known), "digital": sorted(root.digital)}
            for name, root in roots.items() for layer in root.layers.values()]


def bound_again(model: nn.Module, facts: Sequence[Mapping[str, Any]]) -> nn.Module:
    """A copy of the network that was converted, with the layers that it had, which want their state. Args: facts, see `facts_of`.

    Raises: ValueError for another network.
    """
    net = prepared_copy(model, inplace=False)
    parameters, modules, layers, known, digital = dict(net.named_parameters()), dict(net.named_modules()), {}, {}, set()
    for each in facts:
        name, path = each["parameter"], each["path"]
        parameter = parameters.get(name)
        if parameter is None or [*parameter.shape] != each["shape"]:
            raise ValueError(f"it is of another network: here is no parameter {name} of shape {each['shape']}")
        weight, sources = parameter.detach(), None
        if each["view"]:
            shape, stride, start, _ = each["view"]
            weight = weight.as_strided(shape, stride, weight.storage_offset() + start)
        elif each["sources"]:
            if missing := next((module for module, _ in each["sources"] if module not in modules), None):
                raise ValueError(f"it is of another network: here is no module {missing}")
            shape, dtype = each["made"]
            weight = weight.new_empty(shape, dtype=getattr(torch, dtype.removeprefix("torch.")))
            sources = tuple((modules[module], key) for module, key in each["sources"])
        spec = CrossbarSpec(*each["bits"], adc_range="ideal") if each["bits"] else None
        layers[name, path] = Product(name, path, Form(**each["form"]), weight, sources, calls=1 + each["shared"]), spec
        known[name] = each["known"]
        digital |= {(name, other) for other in each["digital"]}
    for (layer, _), each in zip(bind(net, layers, known, digital, facts[0]["encoding"]).values(), facts):
        layer.contiguous, layer.view = each["contiguous"], each["view"]
        if each["bits"]:
            layer.weight_quant.set_scale(1.0, len(layer.weight))  # of this shape, as the state has it
    return hooked(net).eval()
