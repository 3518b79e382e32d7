"""The ADC ranges of a whole network and their digital correction, chosen on training images."""

import contextlib
from dataclasses import replace

import torch

from . import adc
from .crossbar import ADC_BUFFERS, crossbar_layers


@contextlib.contextmanager
def without_adc(model, training=False):
    """Within the block the crossbar layers of `model` have no ADC, and it is in evaluation or training mode; then everything
    is as before."""
    layers = crossbar_layers(model)
    before = [(layer.spec, [getattr(layer, name) for name in ADC_BUFFERS]) for _, layer in layers]
    was_training = model.training
    model.train(training)
    try:
        for _, layer in layers:
            layer.set_spec(replace(layer.spec, adc_range="ideal"))
        yield
    finally:
        for (_, layer), (spec, buffers) in zip(layers, before):
            layer.set_spec(spec)
            for name, buffer in zip(ADC_BUFFERS, buffers):
                setattr(layer, name, buffer)
        model.train(was_training)


def collect_histograms(model, batches):
    """Exact histograms of every crossbar layer's read values, the network running without ADC.

    Args: batches, an iterable of inputs `[N, 3, H, W]` on the model's device.
    Returns: `{layer name: int64 array [digits, slices, u]}`.
    """
    layers, counters, histograms = crossbar_layers(model), {}, {}

    def count(name):
        def hook(layer, inputs):
            if name not in counters:
                counters[name] = layer.counter(inputs[0].device)
            histograms[name] = counters[name](inputs[0]).cpu().numpy() + histograms.get(name, 0)
        return hook

    with contextlib.ExitStack() as stack, torch.no_grad():
        stack.enter_context(without_adc(model))
        for name, layer in layers:
            stack.callback(layer.register_forward_pre_hook(count(name)).remove)
        for batch in batches:
            model(batch)
    if len(histograms) < len(layers):
        raise ValueError("no images to calibrate on")
    return histograms


def calibrate(model, batches, rule="mse", per="reference", histograms=None):
    """Choose and freeze the ADC ranges of every crossbar layer.

    `correct` belongs behind it: ranges that clip, as those of least squared error do, shrink the outputs of every layer.

    Args:
        batches: iterable of training inputs; None where `histograms` are given.
        rule: a key of `adc.RULES`.
        per: one of `adc.PER`, which slices share a range; see `adc.range_groups`.
        histograms: result of `collect_histograms` for the same weights, rows, mapping, cells and reference.
    Returns: the histograms.
    """
    if rule not in adc.RULES:
        raise ValueError(f"no calibration rule is named {rule!r}; known are {', '.join(adc.RULES)}")
    if per not in adc.PER:
        raise ValueError(f"ranges per {per!r} are not known; take {' or '.join(adc.PER)}")
    if histograms is None:
        histograms = collect_histograms(model, batches)
    for name, layer in crossbar_layers(model):
        layer.set_ranges(adc.calibrated_ranges(histograms[name], layer.mapped("ideal"), rule, per))
    return histograms


CORRECTION_IMAGES = 256  # more change nothing that can be measured
LARGEST_GAIN = 2.0  # what an ADC makes of a channel that needs more is mostly noise


@torch.no_grad()
def correct(model, images, wanted=None):
    """Make up, digitally, for what the calibrated ADCs do to the mean and the size of each layer's outputs.

    An ADC that clips or rounds to zero makes all outputs of a channel smaller, and shifts them: errors that they share,
    so that they do not average out in the layers behind. Each output channel gets `gain = s / s'` and
    `offset = m - gain m'`, with m, s the mean and deviation over images and pixels without ADCs, m', s' those of the
    channel behind its ADC, in the network whose layers before it are corrected already; the gain is at most 2.
    In hardware both disappear in the scale and the bias of the batch norm. (The idea is that of bias correction, Nagel et
    al., arXiv 1906.04721, section 4.2, and of batch-norm statistics that are taken anew.)

    Args:
        images: one batch of training inputs, on the model's device; all of them are in memory at a time.
        wanted: result of an earlier call for the same weights and images.
    Returns: `{layer name: (deviation, mean)}` without ADCs.
    Raises: ValueError for no images, or layers whose ranges are not "calibrated".
    """
    layers = crossbar_layers(model)
    if not len(images):
        raise ValueError("no images to correct with")
    for _, layer in layers:
        if layer.spec.adc_range != "calibrated":
            raise ValueError(f"a correction belongs to calibrated ranges, not to adc_range {layer.spec.adc_range!r}")
        layer.set_correction(torch.ones_like(layer.adc_gain), torch.zeros_like(layer.adc_offset))
    if wanted is None:
        wanted = {}
        with without_adc(model):
            _watch_outputs(model, images, lambda name, layer, y: wanted.__setitem__(name, _std_mean(y)))

    def set_correction(name, layer, y):
        (std, mean), (adc_std, adc_mean) = wanted[name], _std_mean(y)
        gain = torch.where(adc_std > 0, std / adc_std, 1.0).clamp_max(LARGEST_GAIN)
        layer.set_correction(gain, mean - gain * adc_mean)
        return torch.addcmul(*(values.view(-1, *[1] * (y.dim() - 2)) for values in (layer.adc_offset, layer.adc_gain)), y)

    was_training = model.training
    model.eval()
    try:
        _watch_outputs(model, images, set_correction)
    finally:
        model.train(was_training)
    return wanted


def _std_mean(y):
    """Deviation and mean of each channel of `[N, out, ...]`, in float64."""
    return torch.std_mean(y.double(), [dim for dim in range(y.dim()) if dim != 1], correction=0)


def _watch_outputs(model, images, see):
    """Run the network and call `see(name, layer, output)` for each crossbar layer; what it returns replaces the output."""
    with contextlib.ExitStack() as stack:
        for name, layer in crossbar_layers(model):
            hook = layer.register_forward_hook(lambda layer, _, y, name=name: see(name, layer, y))
            stack.callback(hook.remove)
        model(images)
