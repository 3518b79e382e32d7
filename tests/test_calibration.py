"""One call that calibrates a network: ranges and correction, from any source of images, and what it leaves as it was."""

import contextvars
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_crossbar import images, network, outputs
from torch import nn

from models.quant import (ADC_BUFFERS, CORRECTION_IMAGES, Calibration, CrossbarSpec, Device, Qconv2dDoreFa, QLinearDoreFa, calibrate,
                          collect_histograms, correct, crossbar_layers, engines, image_numbers, program, set_engine, set_spec, without_adc)
from models.quant.layers import channels
from models.quant.network import diagnostics
from models.quant.network.calibration import CORRECTION_NUMBERS, output_moments

pytestmark = pytest.mark.usefixtures("one_thread")
SPEC = CrossbarSpec(adc_bits=2, rows=32)
RANGES = [name for name in ADC_BUFFERS if name != "adc_bits_plan"]  # which is None without a plan


def state(model):
    """Ranges and correction of every layer."""
    return {(name, buffer): getattr(layer, buffer).clone() for name, layer in crossbar_layers(model) for buffer in RANGES}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def by_two_calls(spec, x, first, **options):
    model = network(spec)
    histograms = calibrate(model, [x], correct=None, **options)
    correct(model, first)
    return state(model), histograms


SOURCES = {
    "a tensor": lambda x: x, "a list": lambda x: list(x.split(70)), "a generator": lambda x: (batch for batch in x.split(100)),
    "one batch": lambda x: [x], "small batches": lambda x: iter(x.split(3)),
}


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
def test_one_call_is_both_calls(source):
    """All images choose the ranges, the first of them, as one batch, the correction."""
    x = images(CORRECTION_IMAGES + 20)
    wanted, counts = by_two_calls(SPEC, x, x[:CORRECTION_IMAGES])
    model = network(SPEC)
    histograms = calibrate(model, source(x))
    assert same(state(model), wanted) and all(np.array_equal(histograms[name], counts[name]) for name in counts)
    assert not same(wanted, by_two_calls(SPEC, x, x)[0])  # more images would have given another correction
    other = network(SPEC)
    calibrate(other, x, correct=None)
    correct(other, source(x) if not isinstance(source(x), torch.Tensor) else x[:CORRECTION_IMAGES])
    assert same(state(other), wanted)


@pytest.mark.parametrize("shape, order, channel_dim", [
    ((7, 5, 6, 33), (0, 3, 1, 2), 1), ((3000, 40), (0, 1), 1), ((40, 6, 50), (0, 1, 2), -1), ((4, 9, 5, 5), (0, 1, 2, 3), 1),
    ((1, 70000), (0, 1), 1)])
def test_moments_of_channels_are_those_of_numpy(shape, order, channel_dim):
    """Far from zero and of small deviation too; of a channel whose values are all alike the deviation is exactly 0."""
    numbers = torch.Generator().manual_seed(0)
    y = torch.randn(shape, generator=numbers).permute(order)
    along = y.movedim(channel_dim, -1)
    along *= torch.linspace(1e-3, 3, along.shape[-1])
    along += torch.linspace(-900, 900, along.shape[-1])
    along[..., 2] = 0.1
    values = along.double().numpy().reshape(-1, along.shape[-1])
    std, mean = channels.std_mean(y, channel_dim)
    assert std.dtype == mean.dtype == torch.float64 and std[2] == 0 and mean[2] == float(np.float32(0.1))
    np.testing.assert_allclose(mean, values.mean(0), rtol=1e-12)
    np.testing.assert_allclose(std, values.std(0), rtol=1e-9, atol=0 if len(values) > 1 else 1e-12)
    for found, wanted in zip(channels.std_mean(y.double(), channel_dim), (values.std(0), values.mean(0))):  # not by the kernel
        np.testing.assert_allclose(found, wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_channels_are_scaled_in_no_less_than_float32(dtype):
    y = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    gain, offset = torch.tensor([1.001, 0.7, 1.3, 1.9]), torch.tensor([-0.3, 1e-3, 200.0, 0.1])
    wanted = gain.double().numpy()[:, None] * y.double().numpy() + offset.double().numpy()[:, None]
    for found in (channels.scaled(y, gain, offset, 1), channels.scaled(y.movedim(1, -1), gain, offset, -1).movedim(-1, 1)):
        assert found.dtype == dtype
        torch.testing.assert_close(found, torch.from_numpy(wanted).to(dtype), rtol=0 if dtype == torch.bfloat16 else 1e-12, atol=0)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = QLinearDoreFa(16, 5, spec=CrossbarSpec(adc_range="ideal"), alpha_init=1.0)

    def forward(self, x):
        return torch.cat([self.layer(x), self.layer(0.2 * x[:10])])


def test_moments_of_a_layer_that_is_called_twice_are_those_of_all_its_outputs():
    torch.manual_seed(0)
    model = Twice().eval()
    with torch.no_grad():
        moments, y = output_moments(model, crossbar_layers(model), torch.rand(30, 16))
    for found, wanted in zip(moments["layer"], channels.std_mean(y, 1), strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("none", [None, "none"])
def test_the_correction_can_be_left_out(none):
    model, x = network(SPEC), images(20)
    calibrate(model, x, correct=none)
    found = state(model)
    assert all((values == 1).all() for (_, buffer), values in found.items() if buffer == "adc_gain")
    assert all((values == 0).all() for (_, buffer), values in found.items() if buffer == "adc_offset")
    calibrate(model, x)
    assert not same(state(model), found)


def test_histograms_give_ranges_and_images_the_correction():
    x = images(20)
    wanted, histograms = by_two_calls(SPEC, x, x)
    model = network(SPEC)
    calibrate(model, None, histograms=histograms)
    ranges = state(model)
    assert all((values == 1).all() for (_, buffer), values in ranges.items() if buffer == "adc_gain")
    assert all(torch.equal(values, wanted[key]) for key, values in ranges.items() if key[1] in ("adc_delta", "adc_q_min"))
    for source in (x, iter(x.split(7))):
        calibrate(model, source, histograms=histograms)
        assert same(state(model), wanted)


def test_no_more_images_are_read_than_the_correction_takes():
    x = images(CORRECTION_IMAGES)
    model = network(SPEC)
    histograms = calibrate(model, x)
    wanted = state(model)

    def source():
        yield x[:100]
        yield torch.cat([x[100:], x])
        raise AssertionError("a batch too many")

    correct(model, source())
    assert same(state(model), wanted)
    calibrate(model, source(), histograms=histograms)
    assert same(state(model), wanted)


def test_a_layer_that_the_network_does_not_call_is_named():
    model = network(SPEC)
    model[0].unused = QLinearDoreFa(4, 2, spec=SPEC)
    with pytest.raises(ValueError, match="^the network does not call its layer 0.unused, so these images give no range for it"):
        calibrate(model, images(4))


def test_where_there_are_no_images():
    for nothing in (None, [], iter(())):
        with pytest.raises(ValueError, match="^no images to calibrate on$"):
            calibrate(network(SPEC), nothing)
    for nothing in (images(0), [images(0)]):
        with pytest.raises(ValueError, match="^no images to calibrate on$"):
            calibrate(network(SPEC), nothing, correct=None)
    for nothing in ([], images(0)):
        with pytest.raises(ValueError, match="^no images to correct with$"):
            correct(network(SPEC), nothing)


# ---- the rule ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong, message", [
    (dict(rule="best"), "rule is 'best'; allowed are minmax, percentile, mse"), (dict(rule=None), "rule is None; allowed"),
    (dict(per="array"), "per is 'array'; allowed are alike, layer, slice"), (dict(per=[]), r"per is \[\]; allowed"),
    (dict(correct="layer"), "correct is 'layer'; allowed are channel, none"), (dict(correct=1), "correct is 1; allowed")])
def test_a_calibration_says_what_is_allowed(wrong, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        Calibration(**wrong)
    with pytest.raises(ValueError, match=f"^{message}"):
        calibrate(network(SPEC), images(), **wrong)


def test_defaults_and_older_words():
    assert Calibration() == Calibration("mse", "alike", "channel")
    assert Calibration(per="reference") == Calibration(per="alike")
    assert Calibration(correct=None) == Calibration(correct="none")
    model, x = network(SPEC), images(20)
    histograms = calibrate(model, x, per="reference")
    found = state(model)
    calibrate(model, x, per="alike")
    assert same(state(model), found)
    assert diagnostics.report(model, x, histograms, per="reference") == diagnostics.report(model, x, histograms)


def test_outputs_that_never_change_are_not_scaled():
    """Neither with the ADC nor without: their deviation is 0 in both."""
    model, x = network(SPEC), torch.zeros(3, 6, 4, 4)
    calibrate(model, x)
    layer = crossbar_layers(model)[0][1]
    assert (layer.adc_gain == 1).all() and layer.adc_offset.isfinite().all()


# ---- layers without an ADC ---------------------------------------------------------------------------------------------


def mixed(adc_range="ideal", linear="calibrated"):
    """Convolutions of one ADC range, linear layers of another."""
    model = network(SPEC)
    for _, layer in crossbar_layers(model):
        layer.set_spec(replace(SPEC, adc_range=linear if isinstance(layer, QLinearDoreFa) else adc_range))
    return model


def test_layers_without_an_adc_are_left_as_they_are():
    """Convolutions on ADCs, linear layers without, and the other way round."""
    for ranges, name, other in ((("calibrated", "ideal"), "0", "4"), (("ideal", "calibrated"), "4", "0")):
        model, x = mixed(*ranges), images(20)
        layers = dict(crossbar_layers(model))
        before = [getattr(layers[other], buffer).clone() for buffer in RANGES]
        assert list(collect_histograms(model, x)) == [name]
        histograms = calibrate(model, x)
        assert list(histograms) == [name] and list(correct(model, x)) == [name]
        assert all(torch.equal(getattr(layers[other], buffer), values) for buffer, values in zip(RANGES, before))
        assert (layers[name].adc_delta > 0).all() and (layers[name].adc_gain != 1).any()
        assert [entry["layer"] for entry in diagnostics.report(model, x, histograms)] == [name]
        found = outputs(model, x)[name]
        with without_adc(model):
            wanted = outputs(model, x)[name]
        np.testing.assert_allclose(found.mean(1), wanted.mean(1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("call", [calibrate, correct, collect_histograms, lambda model, x: diagnostics.report(model, x, {})])
@pytest.mark.parametrize("model", [nn.Linear(3, 3), nn.Sequential(QLinearDoreFa(3, 3, spec=CrossbarSpec(adc_range="ideal")))])
def test_a_network_without_any_adc_is_refused(model, call):
    with pytest.raises(ValueError, match="^no layer of this network has an ADC"):
        call(model, torch.rand(2, 3))


@pytest.mark.parametrize("adc_range", ["full", "dynamic"])
def test_only_calibrated_ranges_have_a_correction(adc_range):
    """Layers that have another range do without, in a network where others have one; asked for alone it is refused."""
    model, x = mixed(adc_range), images(20)
    calibrate(model, x)
    first, last = (layer for _, layer in crossbar_layers(model))
    assert (first.adc_gain == 1).all() and (last.adc_gain != 1).any()
    with pytest.raises(ValueError, match=f"^a correction belongs to calibrated ranges, not to adc_range '{adc_range}'$"):
        correct(model, x)
    set_spec(model, replace(SPEC, adc_range=adc_range))
    calibrate(model, x)
    assert all((layer.adc_gain == 1).all() for _, layer in crossbar_layers(model))


@pytest.mark.parametrize("other", [{"rows": 16}, {"cell_bits": 2}, {"dac_bits": 2}, {"reference": "digital"}], ids=str)
def test_histograms_of_other_hardware_are_refused(other):
    """Their first bin would be taken for another read value."""
    model = network(SPEC)
    histograms = collect_histograms(model, images(6))
    set_spec(model, replace(SPEC, **other))
    with pytest.raises(ValueError, match="^the histograms of layer .* have shape .* they are of other hardware"):
        calibrate(model, None, histograms=histograms)


def test_histograms_of_other_layers_are_refused():
    model, x = mixed(), images(2)
    histograms = collect_histograms(model, x)
    set_spec(model, SPEC)
    with pytest.raises(ValueError, match="^the histograms have no reads of layer 0$"):
        calibrate(model, None, histograms=histograms)


@pytest.mark.parametrize("shape", [(2, 3, 2, 8), (2, 5, 4, 8), (3, 8, 8)], ids=str)
def test_images_that_a_layer_does_not_take_are_refused_as_by_the_layer(shape):
    layer, x = Qconv2dDoreFa(3, 8, 3).eval(), torch.rand(shape)
    with set_engine("reference"):
        with pytest.raises(ValueError) as by_calibration:
            calibrate(layer, x)
        layer.set_ranges([(1.0, 0)] * 4)
        with pytest.raises(ValueError) as by_layer:
            layer(x)
    assert str(by_calibration.value) == str(by_layer.value)


# ---- the mode of each module -------------------------------------------------------------------------------------------


def frozen(spec=SPEC):
    """In training, but for a batch norm that keeps its statistics."""
    model = network(spec).train()
    model[1].eval()
    return model


def use_without_adc(model, x):
    with without_adc(model, training=True):
        assert all(module.training for module in model.modules())


def fail_in_a_pass(model, x):
    calibrate(model, x)
    model[3].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        correct(model, x)
    with pytest.raises(ZeroDivisionError):
        calibrate(model, x)


@pytest.mark.parametrize("call", [
    calibrate, collect_histograms, use_without_adc, fail_in_a_pass, lambda model, x: correct(model, x, correct_anew(model, x)),
    lambda model, x: diagnostics.report(model, x, calibrate(model, x, correct=None))])
def test_every_module_is_in_the_mode_that_it_was_in(call):
    model = frozen()
    modes = {name: module.training for name, module in model.named_modules()}
    call(model, images(20))
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert not modes["1"] and modes["0"] and modes[""]


def correct_anew(model, x):
    calibrate(model, x)
    return correct(model, x)


# ---- the engine --------------------------------------------------------------------------------------------------------


def test_a_whole_calibration_runs_on_the_chosen_engine():
    """Ranges and correction are the same bits from each."""
    found = []
    for name in ("reference", "numba"):
        model = network(replace(SPEC, reference="digital"))
        with set_engine(name):
            calibrate(model, images(20))
        found.append(state(model))
    assert same(*found)


def test_an_engine_is_chosen_for_the_running_context_alone():
    """Not for all threads and all callers of the process."""
    with set_engine("numba"):
        contextvars.copy_context().run(set_engine, "reference")
        assert engines.selected() == "numba"
        with set_engine("reference"):
            set_engine("auto")
        assert engines.selected() == "numba"
    assert engines.selected() == "auto"


def test_a_layer_alone_can_be_calibrated():
    layer = Qconv2dDoreFa(6, 5, 3, spec=SPEC)
    assert list(calibrate(layer, images(3))) == [""] and (layer.adc_gain != 1).any()


def test_a_correction_known_from_before_serves_another_object_of_the_network():
    """Also where a layer is called several times, which the new object has not seen yet."""
    class Thrice(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.layer = QLinearDoreFa(16, 16, spec=CrossbarSpec(4, 4, adc_bits=3), alpha_init=1.0)

        def forward(self, x):
            return self.layer(self.layer(self.layer(x) + x) + x)

    first, second, x = Thrice(), Thrice(), torch.rand(40, 16, generator=torch.Generator().manual_seed(1))
    calibrate(first, x, correct=None)
    second.load_state_dict(first.state_dict())
    wanted = correct(first, x)
    correct(second, x, wanted)
    assert torch.equal(first.layer.adc_gain, second.layer.adc_gain) and torch.equal(first.layer.adc_offset, second.layer.adc_offset)


def test_a_correction_does_not_see_the_noise_of_the_images_that_are_measured():
    layer = QLinearDoreFa(16, 400, spec=CrossbarSpec(4, 4, adc_bits=8), alpha_init=1.0)
    model, x = nn.Sequential(layer).eval(), torch.full((1, 16), 0.4)
    calibrate(model, x.repeat(3, 1), correct=None)
    program(model, Device("own", "here", 1.0, 10.0), adc_noise=2.0)
    correct(model, x)
    with without_adc(model):
        wanted = model(x)
    off = []
    for first in (0, CORRECTION_NUMBERS):  # the correction by one image takes out all noise of its own reads
        with image_numbers(first):
            off.append(float((model(x) - wanted).std()))
    assert off[1] < 1e-3 * off[0]
