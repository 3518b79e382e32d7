"""Names by which the options of `convert` call layers, and what these options say of each."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from ..arrays.spec import CrossbarSpec
from .linear_quantizers import InputQuantizer, LinearWQ
from .scales import WEIGHT_METHODS
from .tracing import Product

NAME = "crossbar"  # of a layer in the module whose weight it holds


def labels_of(net: nn.Module, products: Sequence[Product]) -> dict[Product, list[str]]:
    """`{product: names by which it is called}`, first that of its layer: the module's, or the parameter's where it has others, with
    the number of the part. Then those of the parameter itself, of all its places in the network, and of the modules that hold it."""
    places, parts = {}, {}
    for name, parameter in net.named_parameters(remove_duplicate=False):
        places.setdefault(id(parameter), []).append(name)
    parameters = dict(net.named_parameters())
    for product in products:
        parts.setdefault(product.parameter, []).append(product)
    labels = {}
    for parameter, group in parts.items():
        for number, product in enumerate(group):
            own = short(parameter) if len(group) == 1 else f"{short(parameter)}.{number}"
            others = [each for place in places[id(parameters[parameter])] for each in names_of(place)]
            labels[product] = list(dict.fromkeys([own, f"{own}.{NAME}", *others]))
    return labels


def short(parameter: str) -> str:
    """The name of a parameter as layers have it."""
    return parameter.removesuffix(".weight")


def names_of(parameter: str) -> list[str]:
    """Names by which a parameter is called: its own, and those of the modules that hold it, from the outermost."""
    parts = parameter.split(".")
    return [short(parameter), parameter, *(".".join(parts[:end]) for end in range(1, len(parts)))]


def fits(names: Sequence[str], pattern: str) -> bool:
    """Whether a pattern fits one of a product's names."""
    return any(fnmatchcase(name, pattern) for name in names)


def given(option: str, values: Mapping[str, Any], chosen: Sequence[Product], labels: Mapping[Product, list[str]]) -> dict[Product, Any]:
    """`{product: its value}` of an option `{pattern: value}`, of those that it says something of; the first pattern that fits counts.

    Raises: ValueError for a pattern that fits none, and what is no mapping.
    """
    if not isinstance(values, Mapping) or not all(isinstance(pattern, str) for pattern in values):
        raise ValueError(f"{option} is {values!r}; a mapping from names or patterns of layers to their values is expected")
    for pattern in values:
        if not any(fits(labels[product], pattern) for product in chosen):
            raise ValueError(f"{option} has {pattern!r}, which fits no layer on crossbars")
    found = {product: [value for pattern, value in values.items() if fits(labels[product], pattern)] for product in chosen}
    return {product: own[0] for product, own in found.items() if own}


def specs_of(products: Sequence[Product], chosen: Sequence[Product], labels: Mapping[Product, list[str]], spec: CrossbarSpec | None,
             specs: Mapping[str, CrossbarSpec], first_last_bits: int | None) -> dict[Product, CrossbarSpec | None]:
    """The hardware of those that were chosen. Products of one parameter, such as query, key and value, are first together."""
    own, ends = given("specs", specs, chosen, labels), {products[0].parameter, products[-1].parameter}
    for product in chosen if spec is not None else ():
        of_ends = replace(spec, w_bits=first_last_bits, a_bits=first_last_bits, cell_bits=min(spec.cell_bits, first_last_bits),
                          dac_bits=min(spec.dac_bits, first_last_bits)) if first_last_bits is not None else spec
        own.setdefault(product, of_ends if product.parameter in ends else spec)
    return {product: own.get(product) for product in chosen}


def scales_of(own: Mapping[Product, CrossbarSpec | None], labels: Mapping[Product, list[str]], weight_scale: str | Mapping[str, Any],
              activations: str, input_scales: Mapping[str, Any], inputs: str) -> dict[Product, tuple[Any, Any]]:
    """`{product: (scales of its weight, scale and codes of its inputs)}`, each the numbers that are given or the method that finds them.

    Args: own, `specs_of`; the others, see `convert`.
    Raises: ValueError for numbers that are none of the layer's, and patterns that fit no layer.
    """
    numbers = weight_scale if isinstance(weight_scale, Mapping) else {}
    method = WEIGHT_METHODS[0] if numbers is weight_scale else weight_scale
    weights, windows = (given(*option, list(own), labels) for option in (("weight_scale", numbers), ("input_scales", input_scales)))
    for option, values in (("weight_scale", weights), ("input_scales", windows)):
        for product, value in values.items():
            try:
                if own[product] is None:
                    raise ValueError("without a spec nothing is quantized")
                if values is weights:
                    LinearWQ(own[product].w_bits).set_scale(value, len(product.form.kernel(product.weight)))
                else:
                    InputQuantizer(own[product].a_bits, inputs).set_window(value)
            except ValueError as error:
                raise ValueError(f"{option} of {labels[product][0]}: {error}") from None
    return {product: (weights.get(product, method), windows.get(product, activations)) for product in own}
