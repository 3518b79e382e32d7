"""Any network on crossbars: `convert(model, spec, images)`.

    net = convert(model, CrossbarSpec(w_bits=8, a_bits=8, adc_bits=6), images)
    logits = net(x)
    print(net.crossbar_report)

The network is run once on the images to see what it multiplies (`tracing`); each weight is then bound to a layer on crossbars
(`binding`, `converted`), its quantizers fitted, its channels brought back to the float network's mean and deviation, and its ADCs
calibrated. What is no product with a weight (norms, activation functions, sums, products of two activations) is digital and stays as it is.
"""

import contextlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..arrays.spec import CrossbarSpec, check_is_spec
from ..layers.batches import Batch, copied, first_of, first_tensor, joined, length, output_of
from ..layers.loaders import Take
from ..network.calibration import CORRECTION_IMAGES, calibrate, match_channels, output_moments
from ..network.modes import without_adc
from .binding import plain
from .encodings import ENCODINGS
from .gptq import gptq
from .images import batches_of_images, said_of
from .installing import bind, hooked, prepared_copy
from .options import fits, labels_of, names_of, scales_of, short, specs_of
from .report import ConversionReport
from .scales import METHODS, WEIGHT_METHODS
from .tracing import Product, Trace, trace
from .training import Training, train_through

REPORT_IMAGES = 4  # of which the report compares every layer's outputs
ROUNDINGS = ("nearest", "gptq")
CORRECTIONS = ("channel", "none")


@torch.inference_mode(False)
@torch.no_grad()
def convert(model: nn.Module, spec: CrossbarSpec | None, images: Batch | Iterable[Any], *, skip: Sequence[str] = (),
            specs: Mapping[str, CrossbarSpec] | None = None, first_last_bits: int | None = 8,
            weight_scale: str | Mapping[str, Tensor | float] = "mse", inputs: str = "phases", activations: str = "mse",
            input_scales: Mapping[str, tuple[float, int, int]] | None = None, rounding: str = "nearest", correct: str = "channel",
            train: Training | str | None = None, qat: bool = False, inplace: bool = False, strict: bool = True, batch_dim: int = 0,
            take: Take | None = None) -> nn.Module:
    """A copy of a network whose products with weights are computed on crossbars.

    `y_c = g_c (s_a s_c sum A (W - m) + bias_c) + o_c` with `W = clip(rint(w / s_c), -m, m) + m`, `m = 2^(w-1) - 1`, and
    `A = clip(rint(x / s_a), lo, hi)`, `lo <= 0 <= hi`; s_c for each output channel, s_a for each layer.

    Args:
        model: any network; in its own type and on its own device.
        spec: the hardware; `w_bits` 2..8 and `a_bits` are those of all layers but the first and the last. None binds the weights and
            quantizes nothing, to check that the network's answers stay what they are.
        images: inputs like those of its training: a tensor `[N, ...]`, a mapping of tensors, which `forward` takes by name or
            as one input, or an iterable of batches, such as a DataLoader, with or without targets (`loaders.apart`). They choose scales
            and ADC ranges.
        skip: patterns (`fnmatch`) of names of layers that stay digital, such as "head*".
        specs: `{pattern: spec}` for layers with other hardware or bits; the first pattern that fits counts (of `--per_layer` the last).
        first_last_bits: weight and input bits of the first and the last layer; None: those of the spec.
        weight_scale, activations: "mse", scales of least squared error, or "max", scales that clip nothing. For weights also "layer", one
            scale of least squared error for all channels of a layer, or the scales s_c of some layers, `{pattern: a number or a tensor
            [out]}`; the other layers then have "mse".
        input_scales: `{pattern: (s_a, lo, hi)}`, scale and codes of the inputs of some layers. The images choose those of the others.
        inputs: how inputs below zero drive word lines, one of `encodings.ENCODINGS`.
        rounding: "nearest", or "gptq" (Frantar et al., arXiv 2210.17323): later weights of a row make up for the errors of earlier ones.
        correct: "channel" gives each channel the float network's mean and deviation on the images, or "none".
        train: return it in training mode, in which a forward pass goes through "quantizers", products of quantized numbers; "adc", what the
            arrays give, ADCs included; or "chips", for which a `Training` says more. Gradients go straight through. None: a network to
            be evaluated; in training mode it says once that it goes through quantizers.
        qat: what train="quantizers" was called before.
        inplace: convert `model` itself, not a copy. An error may then leave it half converted.
        strict: raise an error for a weight that would stay digital and is not skipped. Otherwise it is only named in the report.
        batch_dim: the dimension of the batch: 1 for a network with tokens first, `[length, N, width]`.
        take: a function of a batch that returns (inputs, target), where it is not clear which part of it is what.
    Returns: the network, in evaluation mode unless it is to be trained, with `crossbar_report`, a `ConversionReport`.
    Raises: ValueError for options that are not allowed, images that the network does not take, or, with `strict`, a product with a weight
        that no crossbar does.
    """
    if spec is not None:
        check_is_spec(spec)
    options = dict(activations=(activations, METHODS), inputs=(inputs, ENCODINGS), rounding=(rounding, ROUNDINGS),
                   correct=(correct, CORRECTIONS))
    train = "quantizers" if train is None and qat else train
    training = Training(train) if isinstance(train, str) else train
    if training is not None and spec is None:
        raise ValueError("train is given without a spec: nothing is quantized, and the network trains as it is")
    _check(options if isinstance(weight_scale, Mapping) else {"weight_scale": (weight_scale, WEIGHT_METHODS), **options})
    net, skip = prepared_copy(model, inplace), [skip] if isinstance(skip, str) else list(skip)
    batches = batches_of_images(images, net, batch_dim, take)
    with said_of(net, batches[0]):
        found = trace(net, batches, gram=rounding == "gptq" and spec is not None)
    labels = labels_of(net, found.products)
    chosen, digital = _choose(net, found, labels, skip, strict)
    own = specs_of(found.products, chosen, labels, spec, specs or {}, first_last_bits)
    scales = scales_of(own, labels, weight_scale, activations, input_scales or {}, inputs)
    of_digital = found.digital | {(product.parameter, product.path) for product in found.products if product not in chosen}
    bound = bind(net, {labels[product][0]: (product, own[product]) for product in chosen}, found.known, of_digital, inputs)
    for name, (layer, product) in bound.items() if spec is not None else ():
        _fit(name, layer, product, scales[product])
    _verify(net, bound, batches[0], found.output)
    others = [product for product in found.products if product not in chosen]
    elsewhere = {*found.looked_up, *found.others, *(product.parameter for product in others)}
    notes, unrounded = ([], {}) if spec is None else _quantize(net, bound, batches, batch_dim, rounding, correct, elsewhere)
    net.crossbar_report = ConversionReport(
        digital, found.between, _never_used(net, found), notes, length(batches[0], batch_dim),
        digital_multiplications=found.others_multiplications + sum(product.multiplications for product in others),
        options={"skip": skip, "inputs": inputs, "batch_dim": batch_dim, "correct": correct})
    net.crossbar_report.measure(net, bound, batches[0], found.output, first_of(batches[0], REPORT_IMAGES, batch_dim), unrounded)
    return hooked(net) if training is None else train_through(hooked(net), training).train()


def _check(options: dict[str, tuple[Any, tuple]]) -> None:
    for name, (value, allowed) in options.items():
        if not isinstance(value, str) or value not in allowed:
            raise ValueError(f"{name} is {value!r}; allowed are {', '.join(allowed)}"
                             + (", or the scales of some layers by their names" if name == "weight_scale" else ""))


def _choose(net, found: Trace, labels, skip, strict):
    """(products that go on crossbars, `{name: reason}` of those that stay digital)."""
    chosen, digital, used = [], {}, set()

    def unless_skipped(names, what):
        fitting = [pattern for pattern in skip if fits(names, pattern)]
        used.update(fitting)
        return "skipped" if fitting else what

    for product in found.products:
        reason = unless_skipped(labels[product], _unsupported(product))
        if reason is None:
            chosen.append(product)
        else:
            digital[labels[product][0]] = reason
    compiled = [name for name, module in net.named_modules() if isinstance(module, torch.jit.ScriptModule)]
    for name in compiled:
        if not any(name.startswith(f"{other}.") for other in compiled):
            digital[name] = unless_skipped([name], "a module compiled by torch.jit, whose products cannot be seen")
    digital |= {short(name): unless_skipped(names_of(name), what) for name, what in found.others.items()
                if set(compiled).isdisjoint(names_of(name))}
    buffers = {short(name): unless_skipped(names_of(name), what) for name, what in found.buffers.items()}
    refused = {name: reason for name, reason in digital.items() if reason != "skipped"}
    if strict and refused:
        name, reason = next(iter(refused.items()))
        more = f" (and {len(refused) - 1} more)" if len(refused) > 1 else ""
        raise ValueError(f"{name} cannot be put on crossbars: it is {reason}{more}. To keep it digital, give skip=[{name!r}], or "
                         "strict=False")
    # What is in no product, such as a head that serves in training, is digital anyway, and may be named.
    spared = {pattern for name in (*_never_used(net, found), *(place[0] for place in (*found.constant, *found.alone))) for pattern in skip
              if fits(names_of(name), pattern)}
    if unused := [pattern for pattern in skip if pattern not in used | spared]:
        raise ValueError(f"skip has {unused[0]!r}, which fits no product with a weight")
    if not chosen:
        raise ValueError("nothing of this network can be put on crossbars: no product of an input and a weight was seen"
                         + (" that is not skipped" if digital else ""))
    alone = _without_inputs(net, found.alone, chosen, "a product of parameters alone")
    digital = alone | _without_inputs(net, found.constant, chosen, "a product whose input is the same for every image") | digital
    digital |= {name: what for name, what in buffers.items() if name not in digital}
    return chosen, digital


def _without_inputs(net, places, chosen, what):
    """What the report says of weights that meet no input of the network, and of parts of those whose other parts do. (A whole one that
    does is on arrays besides; its norm, say, is no product of the network.)"""
    mapped, sizes = {}, {name: parameter.numel() for name, parameter in net.named_parameters()}
    for product in chosen:
        mapped.setdefault(product.parameter, set()).add(product.path)
    return {short(name) + " in part" * (name in mapped): what for (name, path), numbers in places.items()
            if name not in mapped or path not in mapped[name] and numbers < sizes[name]}


def _unsupported(product: Product) -> str | None:
    if product.other_form:
        return "a weight of several products that cannot be told apart"
    if product.form.kind == "transposed" and product.form.dims == 3:
        return "a transposed convolution of three dimensions"
    if not product.weight.is_floating_point() or product.weight.is_complex():
        return f"a product with a weight of {product.weight.dtype}"
    return None


def _never_used(net, found):
    """Names of matrices that entered no product."""
    used = {product.parameter for product in found.products} | found.others.keys() | {place[0] for place in (*found.constant, *found.alone)}
    return [name for name, parameter in net.named_parameters() if parameter.dim() > 1 and name not in used]


def _fit(name, layer, product, scales):
    """Choose the steps of a layer's quantizers."""
    if not product.sample:
        raise ValueError(f"no image reaches {name}, so its inputs are not known; give more images, or skip=[{name!r}]")
    if not plain(layer.weight).isfinite().all():
        raise ValueError(f"{name}: its weight holds NaN or infinite numbers; look how it was trained or loaded")
    layer.fit(torch.cat(product.sample), product.lowest, product.largest, *scales)


def _quantize(net, bound, batches, dim, rounding, correct, elsewhere):
    """Round weights, bring the channels of the quantized network, without ADCs, to the mean and deviation of the float network's, choose
    ADC ranges. Args and what it returns: see `_round`."""
    layers = [(name, layer) for name, (layer, _) in bound.items()]
    if correct == "channel":
        first = first_of(joined(batches, dim), CORRECTION_IMAGES, dim)
        for _, layer in layers:
            layer.quantized = False
        with said_of(net, first):
            wanted, _ = output_moments(net, layers, copied(first))
        for _, layer in layers:
            layer.quantized = True
    notes, unrounded = _round(net, bound, rounding, elsewhere)
    if correct == "channel":
        with without_adc(net):
            match_channels(net, layers, copied(first), wanted, _correct)
    if any(layer.spec.adc_range == "calibrated" for layer, _ in bound.values()):
        calibrate(net, (copied(batch) for batch in batches), correct=correct, batch_dim=dim)
    return notes, unrounded


def _round(net, bound, rounding, elsewhere):
    """Round weights.

    Args: elsewhere, parameters that the network looks up, or multiplies without crossbars.
    Returns: what could not be done as it was asked for, as lines for the report; `{layer: its kernel before}`.
    """
    notes, unrounded, places = [], {}, [id(parameter) for _, parameter in net.named_parameters(remove_duplicate=False)]
    for name, (layer, product) in bound.items() if rounding == "gptq" else ():
        root = layer.root
        # Other products, and lookups, want the weight as it is.
        shared = product.parameter in elsewhere or len(root.layers) > 1 or places.count(id(root)) > 1
        if shared or product.sources is not None or product.form.kind == "transposed" or product.form.dims == 3:
            notes.append(f"{name}: rounded to nearest, as GPTQ's result cannot be written into its weight")
            continue
        kernel = unrounded[layer] = layer.weight.clone()
        rounded = gptq(kernel.flatten(1).double(), product.gram, layer.weight_quant, groups=product.form.groups)
        layer.set_weight(rounded.view_as(kernel).to(kernel.dtype))
        product.gram = None
    return notes, unrounded


def _verify(net, bound, images, wanted):
    """With quantizers off, the bound network has to give the float network's answers, through every layer."""
    called = Counter()
    with contextlib.ExitStack() as stack:
        for name, (layer, _) in bound.items():
            stack.callback(layer.register_forward_pre_hook(lambda *_, name=name: called.update([name])).remove)
            stack.callback(setattr, layer, "quantized", layer.quantized)
            layer.quantized = False
        for contiguous in (False, True):  # outputs lie channels last, unless the network depends on the order of memory
            for layer, _ in bound.values():
                layer.contiguous = contiguous
            called.clear()
            try:
                same, failed = _same_answers(output_of(net, copied(images)), first_tensor(wanted)), None
            except Exception as error:  # of the network's own code
                same, failed = False, error
            if same:
                break
    with said_of(net, images):
        if failed is not None:
            raise failed
    for name, (_, product) in bound.items():  # of the calls with this batch
        if called[name] < product.calls:
            seldom = f" in {product.calls - called[name]} of {product.calls} calls" if called[name] else ""
            raise ValueError(f"{name} was put on crossbars, but the network does not use it there{seldom}; give skip=[{name!r}], and "
                             "please report it")
    if not same:
        raise ValueError("with its weights bound to layers on crossbars the network gives other answers than before, although nothing is "
                         "quantized yet; does it give the same answers at each call?")


def _same_answers(y, wanted):
    """Whether they are the same within what sums in their type round."""
    eps = torch.finfo(wanted.dtype).eps if wanted.is_floating_point() else 0.0
    allowed = max(1e-4, (8 * eps) ** 2)
    wanted = wanted.double()
    return y.shape == wanted.shape and bool((y.double() - wanted).square().sum() <= allowed * wanted.square().sum())


def _correct(layer, gain, offset):
    layer.quant_gain, layer.quant_offset = gain.float(), offset.float()
