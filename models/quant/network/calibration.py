"""The ADC ranges of a whole network and their digital correction, chosen on training images."""

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from ..arrays import adc, plans
from ..arrays.cells import Cells
from ..arrays.readout import image_numbers
from ..arrays.spec import check, choice
from ..layers import channels
from ..layers.batches import Batch, First, batches_of, called, first_of, length, output_of, tensors_of
from ..layers.crossbar import CrossbarLayer, crossbar_layers
from .expectation import say_expected
from .modes import converted_layers, hooked, in_mode, without_adc

CORRECTION_IMAGES = 256  # more change nothing that can be measured
CORRECTION_NUMBERS = 2**42  # of the first of them: their reads have other noise than those of the images that are measured
OTHER_WORDS = {"per": {"reference": "alike"}, "correct": {None: "none"}}  # what users may say for a field's value


@dataclass(frozen=True)
class Calibration:
    """How calibrated ranges and their correction follow from training images; see `calibrate`.

    Attributes:
        rule: "minmax", "percentile" or "mse", a key of `adc.RULES`.
        per: "alike", "layer" or "slice", which slices share a range (`adc.range_groups`); "reference" is taken for "alike".
        correct: "channel" or "none", whether outputs are corrected (`correct`); None is taken for "none".
        on: "nominal" or "chip", the cells whose reads choose the ranges.
        share: for a spec with a plan, "network" or "layer": whether the reads of the whole network have `adc_bits` in the mean, or
            those of each layer. With a plan each kind of read has the range of least squared error; `rule` and `per` have no effect.
    Raises: ValueError for values outside these.
    """

    rule: str = choice(
        "mse", tuple(adc.RULES), "how the range of uniform bits is chosen from the reads of training images. Zero is always a code. "
        "minmax: the smallest range that covers all reads. percentile: the smallest range that covers the middle 99.9 % of the reads "
        "that are not zero. mse: the range of least squared error of the layer's output.")
    per: str = choice(
        "alike", adc.PER, "which slices of a layer share a range of uniform bits. alike: those whose reference column is filled alike. "
        "With DoReFa these are all, with SAWB and 1-bit cells all but the highest. layer: all. slice: each has its own.")
    correct: str = choice(
        "channel", ("channel", "none"), "channel: a digital gain and offset give each output channel the mean and the deviation that it "
        "has on training images without ADC. Batch norm takes both in. none: no correction. This loses more, most of all with few bits.")
    share: str = choice("network", ("network", "layer"), "what the mean of a plan is taken over. network: all conversions of the "
                        "network. Each layer's error counts by what it does to the network's output. layer: the conversions of each "
                        "layer.")
    on: str = choice("nominal", ("nominal", "chip"), "nominal: ranges are chosen at design time, on cells without scatter. chip: ranges "
                     "are chosen on the cells of each chip. The correction is always measured on the chip.")

    def __post_init__(self) -> None:
        for name, words in OTHER_WORDS.items():
            with contextlib.suppress(TypeError):  # what cannot be looked up is no word either, which `check` says
                value = getattr(self, name)
                object.__setattr__(self, name, words.get(value, value))
        check(self)


def collect_histograms(model: nn.Module, images: Batch | Iterable[Batch], on: str = "nominal",
                       batch_dim: int = 0) -> dict[str, np.ndarray]:
    """Exact histograms of the read values of every layer that has an ADC. The network runs without ADCs for this.

    Args: images, inputs on the model's device: a tensor `[N, ...]`, or an iterable of batches (`layers/batches.py`); on, the cells that
        are read, see `Calibration`; batch_dim, see `calibrate`.
    Returns: `{layer name: int64 array [digits, slices, classes, bin]}`, see `MappedLayer.classes` and `mapping.Bins`.
    Raises: ValueError for no images, or no layer with an ADC.
    """
    layers, counters, histograms = converted_layers(model), {}, {}
    counted = {name: counted_cells(layer, on) for name, layer in layers}

    def count(name, layer, args, kwargs):
        x = (*args, *kwargs.values())[0]
        if name not in counters:
            counters[name] = layer.counter(x.device, counted[name])
        histograms[name] = counters[name](x).cpu().numpy() + histograms.get(name, 0)

    shown = 0
    with without_adc(model), torch.no_grad(), hooked(layer.register_forward_pre_hook(partial(count, name), with_kwargs=True)
                                                     for name, layer in layers):
        for batch in batches_of(images, batch_dim):
            called(model, batch)
            shown += length(batch, batch_dim)
    if not shown:
        raise ValueError("no images to calibrate on")
    if unseen := [name for name, _ in layers if name not in histograms]:
        raise ValueError(f"the network does not call its layer {unseen[0]}, so these images give no range for it; remove the layer, "
                         "or give it adc_range 'ideal'")
    return histograms


def calibrate(model: nn.Module, images: Batch | Iterable[Batch] | None, rule: str = Calibration.rule,
              per: str = Calibration.per, histograms: dict[str, np.ndarray] | None = None,
              correct: str | None = Calibration.correct, share: str = Calibration.share,
              on: str = Calibration.on, batch_dim: int = 0) -> dict[str, np.ndarray]:
    """Choose and freeze the ADC range of every layer that has one, then correct the outputs for what the ADCs do to them.

    Layers with adc_range "ideal" are left as they are. Only layers with adc_range "calibrated" are corrected.

    Args:
        images: training inputs on the model's device: a tensor `[N, ...]` or any iterable of batches. All of them choose
            the ranges. The first `CORRECTION_IMAGES`, as one batch, choose the correction. With `histograms` images may be None;
            there is then no correction.
        rule, per, correct: see `Calibration`; `correct=None` leaves the correction out.
        histograms: result of `collect_histograms` for the same weights, rows, mapping, cells and reference.
        share, on: see `Calibration`.
        batch_dim: the dimension of the batch: 1 for `[length, N, width]`.
    Returns: the histograms.
    Raises: ValueError for no images, no layer with an ADC, an unknown rule, or histograms of other hardware.
    """
    chosen = Calibration(rule, per, correct, share, on)
    layers, first = converted_layers(model), First(CORRECTION_IMAGES, batch_dim)
    if histograms is None:
        histograms = collect_histograms(model, first.of(() if images is None else images), chosen.on, batch_dim)
    elif images is not None and chosen.correct == "channel":
        first.fill(images)
    if missing := [name for name, _ in layers if name not in histograms]:
        raise ValueError(f"the histograms have no reads of layer {', '.join(missing)}")
    # The layers in whose bins these reads are counted.
    bins = {name: layer.mapped("ideal", layer.binned(counted_cells(layer, chosen.on))) for name, layer in layers}
    for name, layer in bins.items():
        _check_counts(name, layer, histograms[name])
    planned = [(name, layer) for name, layer in layers if layer.spec.planned]
    for name, layer in layers:
        if not layer.spec.planned:
            layer.set_ranges(adc.calibrated_ranges(histograms[name].sum(axis=2), bins[name], chosen.rule, chosen.per))
    if planned:
        if chosen.share == "network":
            if images is None:
                raise ValueError("a plan for the whole network needs images, to measure what the layers' errors do; give some")
            if not first.kept:
                first.fill(images)
        _set_plans(model, planned, histograms, bins, chosen, first)
    if images is not None and chosen.correct == "channel":
        _correct(model, [pair for pair in layers if pair[1].spec.adc_range == "calibrated"], first.batch(), None)
    return histograms


def counted_cells(layer: CrossbarLayer, on: str) -> Cells | None:
    """The cells of a layer whose reads choose its ranges, by `Calibration.on`; None: ideal ones."""
    return layer.chip and (layer.chip.cells if on == "chip" else layer.chip.nominal)


def _check_counts(name, layer, counts):
    """Refuse counts that by their shape are none of these bins: their first bin would be taken for another read value."""
    expected = len(layer.spec.digit_bits), len(layer.spec.slice_bits), layer.classes, layer.bins.count
    if counts.shape != expected:
        raise ValueError(f"the histograms of layer {name} have shape {list(counts.shape)}, its reads {list(expected)} (digits, slices, "
                         "classes of n, values): they are of other hardware, or of another device's cells; collect them anew")


def _set_plans(model, layers, histograms, bins, chosen, first):
    """Plans for layers whose spec has one: one budget for all of the same mean, or one for each. Args: first, images that were kept."""
    choices, share = {name: plans.choices(histograms[name], bins[name]) for name, layer in layers}, chosen.share
    groups = {}
    for name, layer in layers:
        groups.setdefault(layer.spec.adc_bits if share == "network" else name, []).append((name, layer))
    for group in groups.values():
        of_group, weights = {name: choices[name] for name, _ in group}, None
        if share == "network":
            weights = list(error_weights(model, first.kept, of_group, first.dim).values())
        bits = plans.bits_of([*of_group.values()], [layer.spec.adc_bits for _, layer in group], weights)
        for (name, layer), of_layer in zip(group, bits):
            layer.set_plan(choices[name].plan(of_layer))
        if weights:
            say_expected(model, first_of(first.batch(), WEIGHT_IMAGES, first.dim), of_group, bits, weights)


WEIGHT_IMAGES = 64  # errors of every output of each of them, so few are enough


@torch.no_grad()
def error_weights(model: nn.Module, images: Batch | Iterable[Batch], choices: dict[str, plans.Choices],
                  batch_dim: int = 0) -> dict[str, float]:
    """What an error of each layer with a plan does to the network's output: mean square of the output's change over the error that
    `Choices` counts.

    Each layer alone is put on its ADC, with the plan that it would have for itself (`plans.plan_alone`), and corrected. The network
    is run on the images with and without it. The errors are real ones. Noise of their size would change VGG7's output up to eight
    times less, since later layers average out what channels do not have in common. The size of an error matters as well. Activations
    are rounded to codes, so small errors change the output by more than their share; clipping levels cut large ones off. Where the
    output does not change at all, the layer is measured with half the bits.

    Args:
        images: training inputs on the model's device: a tensor or an iterable of batches, of which the first `WEIGHT_IMAGES`
            count.
        choices: `{layer name: plans.choices of it}`; the result has these layers, in this order.
        batch_dim: see `calibrate`.
    Raises: ValueError for no images.
    """
    images = First(WEIGHT_IMAGES, batch_dim).fill(images).batch()
    if images is None or not length(images, batch_dim):
        raise ValueError("no images to measure with what the layers' errors do")
    layers = [(name, layer, layer.spec, layer.chip and layer.binned(layer.chip.nominal)) for name, layer in crossbar_layers(model)
              if name in choices]
    weights = {}
    with without_adc(model):
        wanted, expected = output_moments(model, [(name, layer) for name, layer, *_ in layers], images)
        for name, layer, spec, nominal in layers:
            bits, change = spec.adc_bits, 0.0
            while not change:
                plan, error, mean = plans.plan_alone(choices[name], bits)
                layer.set_spec(spec)
                layer.set_plan(plan)
                layer.set_cells(nominal, nominal, None)  # with the off-current that the ranges of a digital reference are of
                y = match_channels(model, [(name, layer)], images, wanted, CrossbarLayer.set_correction)
                layer.set_cells(None)
                layer.set_spec(replace(spec, adc_range="ideal"))
                change, bits = (y.double() - expected).square().mean().item(), min(bits, mean) / 2
                if not plan.bits.any():
                    break
            weights[name] = change / max(error, 1e-30)
    return {name: weights[name] for name in choices}


@torch.no_grad()
def correct(model: nn.Module, images: Batch | Iterable[Batch],
            wanted: Mapping[str, tuple[Tensor, Tensor]] | None = None, batch_dim: int = 0) -> Mapping[str, tuple[Tensor, Tensor]]:
    """Make up, digitally, for what the calibrated ADCs do to the mean and the size of each layer's outputs.

    An ADC that clips, or rounds to zero, makes all outputs of a channel smaller and shifts them. All outputs share this error, so
    it does not average out in later layers. Each output channel therefore gets `gain = s / s'` and `offset = m - gain m'`. m and s
    are its mean and deviation over images and pixels without ADCs; m' and s' are those behind its ADC, with the layers before it
    corrected already. The gain is at most 2. In hardware the scale and the bias of the batch norm take both in. (The idea is that
    of bias correction, Nagel et al., arXiv 1906.04721, section 4.2, and of batch-norm statistics that are taken anew.)

    Args:
        images: training inputs on the model's device: a tensor, all of it in memory at a time, or an iterable of batches,
            of which the first `CORRECTION_IMAGES` are one.
        wanted: `{layer name: (deviation, mean)}` of each channel without ADCs, float64 `[out]`, such as the result of an earlier call
            for the same weights and images.
        batch_dim: see `calibrate`.
    Returns: that.
    Raises: ValueError for no images, no layer with an ADC, or layers whose ranges are not "calibrated".
    """
    layers = converted_layers(model)
    for _, layer in layers:
        if layer.spec.adc_range != "calibrated":
            raise ValueError(f"a correction belongs to calibrated ranges, not to adc_range {layer.spec.adc_range!r}")
    if not isinstance(images, Tensor | Mapping):
        images = First(CORRECTION_IMAGES, batch_dim).fill(images).batch()
    return _correct(model, layers, images, wanted)


@torch.no_grad()
def _correct(model, layers, images, wanted):
    if images is None or not tensors_of(images)[0].numel():
        raise ValueError("no images to correct with")
    for _, layer in layers:
        layer.set_correction(torch.ones_like(layer.adc_gain), torch.zeros_like(layer.adc_offset))
    if wanted is None:
        with without_adc(model):
            wanted, _ = output_moments(model, layers, images)
    for name, layer in layers if isinstance(wanted, Moments) else ():  # what somebody has written down says nothing of calls
        layer.shared = name in wanted.shared
    with in_mode(model, training=False), image_numbers(CORRECTION_NUMBERS):
        match_channels(model, layers, images, wanted, CrossbarLayer.set_correction)
    return wanted


class Moments(dict):
    """`{layer name: (deviation, mean) of each channel}`. Attributes: shared, names of the layers that the network calls more than once."""

    shared: frozenset[str] = frozenset()


def output_moments(model: nn.Module, layers: Sequence[tuple[str, CrossbarLayer]], images: Batch
                   ) -> tuple[Moments, Tensor]:
    """(`Moments` of layers that see anything, output of the network). Layers learn whether they are called more than once."""
    moments = {}

    def see(name, layer, y):
        if y.numel():
            moments.setdefault(name, []).append(_counted_moments(layer, y))

    y = _watch_outputs(model, layers, images, see)
    found = Moments((name, _together(calls)) for name, calls in moments.items())
    found.shared = frozenset(name for name, calls in moments.items() if len(calls) > 1)
    for name, layer in layers:
        layer.shared = name in found.shared
    return found, y


def match_channels(model: nn.Module, layers: Sequence[tuple[str, CrossbarLayer]], images: Batch,
                   wanted: Mapping[str, tuple[Tensor, Tensor]], give: Callable[[CrossbarLayer, Tensor, Tensor], None]) -> Tensor:
    """Run the network and give each layer's channels the deviation and mean that are wanted, those of the layers before it first.

    A layer that the network calls more than once gets what all its calls together need, when they are over; one that sees nothing, such as
    an expert that no image goes to, stays as it is.

    Args: wanted, `{layer name: (deviation, mean)}`, float64 `[out]`; give, called with (layer, gain, offset), float64 `[out]`.
    Returns: the network's output.
    """
    calls = {}

    def see(name, layer, y):
        if name not in wanted or not y.numel():
            return None
        found = _counted_moments(layer, y)
        if layer.shared:
            calls.setdefault(name, []).append(found)
            return None
        gain, offset = channels.towards(wanted[name], found[:2])
        give(layer, gain, offset)
        return channels.scaled(y, gain, offset, layer.channel_dim)

    y = _watch_outputs(model, layers, images, see)
    for name, layer in layers:
        if name in calls:
            give(layer, *channels.towards(wanted[name], _together(calls[name])))
    return y


def _counted_moments(layer, y):
    """(deviation, mean, values) of each channel."""
    return *channels.std_mean(y, layer.channel_dim), y.numel() // len(layer.adc_gain)


def _together(calls):
    """(deviation, mean) of the values of several calls."""
    if len(calls) == 1:
        return calls[0][:2]
    counts = torch.tensor([count for *_, count in calls], dtype=torch.float64, device=calls[0][0].device)[:, None]
    std, mean = (torch.stack(values) for values in list(zip(*calls))[:2])
    total = (counts * mean).sum(0) / counts.sum()
    return ((counts * (std**2 + (mean - total) ** 2)).sum(0) / counts.sum()).sqrt(), total


def _watch_outputs(model: nn.Module, layers: list[tuple[str, CrossbarLayer]], images: Batch, see: Callable) -> Tensor:
    """Run the network and call `see(name, layer, output)` for each of `layers`; what it returns replaces the output.

    Returns: the network's output.
    """
    with hooked(layer.register_forward_hook(lambda layer, _, y, name=name: see(name, layer, y)) for name, layer in layers):
        return output_of(model, images)
