"""Reads of arrays without a word line that is on (`adc_idle`): counted, skipped by the hardware, and planned for."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cost import linear, random_layer
from test_eval import FAST, checkpoint, refused, results, run, scene  # noqa: F401
from test_models import images
from test_plans import best_bits, lengths_of_reads, stored
from test_readout_engines import CURVE, NOISE, check, in_interpreter, on_chip  # noqa: F401
from test_triton import layer_case, planned_case

from experiment.settings import eval_settings
from models import quant
from models.quant import CrossbarSpec, Qconv2dDoreFa, QLinearDoreFa, calibrate, convert, crossbar_layers
from models.quant.arrays import adc, plans
from models.quant.cost import Technology, count, estimate
from models.quant.network.counts import counting
from models.quant.engines import reference
from models.quant.measuring.measure import conversions_of, measure
from models.quant.measuring.setting import Setting

pytestmark = pytest.mark.usefixtures("one_thread")
PLANNED = CrossbarSpec(cell_bits=2, adc_bits=2.0, rows=8, adc_plan="significance")
SKIPS = replace(PLANNED, adc_idle="skip")


def busy_reads(layer, codes):
    """Reads of each digit with a word line that is on, and all reads of a digit."""
    found = lengths_of_reads(layer, codes)
    return found[:, 1:].sum(1), int(found[0].sum())


def test_counts_are_those_of_every_read():
    """By the length of n, for several layouts at once; a layer's inputs may have fewer bits than digits have."""
    rng, seen = np.random.default_rng(1), set()
    for _ in range(30):
        layer, x, _ = random_layer(rng)
        with torch.no_grad(), counting(layer, [("tap", 3), ("im2col", 16, 1), ("im2col", 16, 8), ("tap", 50, 3)]) as counts:
            layer(x)
            codes = layer.a_codes(x)
        [found], dac_bits = counts.layers.values(), layer.spec.dac_bits
        for mapping, rows, bits in (("tap", 3, dac_bits), ("im2col", 16, 1), ("im2col", 16, 8), ("tap", 50, 3)):
            hardware = replace(layer.spec, mapping=mapping, rows=rows, dac_bits=min(bits, layer.spec.a_bits), adc_range="ideal")
            layer.set_spec(hardware)
            expected = lengths_of_reads(layer, codes)
            assert found.reads_of(hardware).tolist() == expected.tolist()
            expected = expected / expected.sum(1, keepdims=True)
            for plan in ("ones", "uniform"):
                layer.set_spec(replace(hardware, adc_plan=plan))
                classes = layer.mapped().classes
                assert classes == 1 or not expected[:, classes:].any()
                assert layer.classes == classes
                wanted = expected[:, :classes] if plan == "ones" else np.ones((len(expected), 1))
                np.testing.assert_allclose(found.shares(layer.spec, layer.classes), wanted, rtol=1e-12)
                seen.add(classes)
            skips = replace(hardware, adc_plan="uniform", adc_idle="skip")
            np.testing.assert_allclose(found.shares(skips, 2), np.stack([expected[:, 0], expected[:, 1:].sum(1)], 1), rtol=1e-12)
    assert len(seen) > 5


@pytest.mark.parametrize("channels", [1, 7, 8, 13, 64])
def test_counts_of_full_word_lines_and_of_arrays_that_straddle_words(channels):
    """n up to all rows at their largest code, of arrays that begin and end anywhere in a word."""
    rng = np.random.default_rng(channels)
    for dac_bits, rows, mapping in itertools.product((1, 3, 8), (5, 64, 300), ("tap", "im2col")):
        layer = QLinearDoreFa(channels, 2, spec=CrossbarSpec(4, 8, 1, dac_bits=dac_bits, rows=rows, mapping=mapping), alpha_init=1.0)
        for x in (np.ones((3, channels)), rng.random((5, channels))):
            codes = layer.a_codes(torch.tensor(x, dtype=torch.float32))
            with counting(layer) as counts, torch.no_grad(), quant.without_adc(layer):
                layer(torch.tensor(x, dtype=torch.float32))
            [found] = counts.layers.values()
            assert found.reads_of(layer.spec).tolist() == lengths_of_reads(layer, codes).tolist()


def test_what_was_not_counted_is_said():
    layer, x = linear(32, 4, CrossbarSpec(adc_range="full", rows=16))
    [found] = count(layer, x).layers.values()
    with pytest.raises(ValueError, match="counted for tap mapping, 16 rows, dac_bits 1, not for tap mapping, 16 rows, dac_bits 2: give"):
        found.shares(replace(layer.spec, dac_bits=2), 1)


def test_counts_within_counts_are_whole(tiny):
    """A calibration that counts idle reads may stand in a block that counts."""
    model, x = tiny(spec=SKIPS), images(4)
    calibrate(model, x)
    with torch.no_grad(), counting(model) as alone:
        model(x)
    with torch.no_grad(), counting(model) as outer:
        calibrate(model, x)
        with counting(model) as inner:
            model(x)
        model(x)
    assert inner.images == 4 < outer.images
    for name, layer in alone.layers.items():
        assert inner.layers[name].pixels == layer.pixels
        assert outer.layers[name].pixels * alone.images == layer.pixels * outer.images
    assert all(layer.watch is None for _, layer in crossbar_layers(model))


# ---- skipped reads are 0 -----------------------------------------------------------------------------------------------


CONVERTERS = replace(NOISE, curve=CURVE.curve)  # `on_chip` adds gains and offsets


@pytest.mark.parametrize("adc_idle", ["convert", "skip"])
@pytest.mark.parametrize("plan, dac_bits, reference_column", [
    (False, 1, "analog"), (True, 1, "analog"), (False, 2, "analog"), (True, 4, "digital")])
def test_all_engines_skip_the_same_reads(adc_idle, plan, dac_bits, reference_column):
    """Noise and offsets of the converters reach idle reads where they are converted, and only there."""
    case = layer_case(CrossbarSpec(4, 4, 2, 6, 16, "im2col", reference_column, dac_bits), 20, 40, kernel=(1, 2), size=(3, 2),
                      padding=(1, 0, 2, 1))
    case.delta, case.q_min = [1.0, 2.0], [0, 0] if reference_column == "digital" else [-32, -32]
    if plan:
        digits = len(case.spec.digit_bits)
        case = planned_case(case, [[2, 5], [4, 6], [3, 0], [1, 8]][:digits], [[0.75, 3.5]] * digits,
                            case.q_min if reference_column == "digital" else None)
    layer = on_chip(case, CONVERTERS)
    layer = replace(layer, spec=replace(layer.spec, adc_idle=adc_idle))
    codes = case.input().clone()
    codes[:, :, 1:] = codes[:, :, 1:] & 1  # the higher digits of most reads are idle
    codes[:, 2] = 0
    check(layer, codes)


def test_broad_codes_are_skipped_too():
    case = layer_case(CrossbarSpec(4, 4, 2, 5, 32, adc_idle="skip"), 40, 9, kernel=(1, 1), size=(2, 2))
    case.delta = [0.7, 2.3]  # in steps in which 64-bit floats are needed
    codes = case.input() & 1
    codes[:, 1] = 0
    check(on_chip(case, CONVERTERS), codes, "exact")


def test_an_idle_read_is_zero_and_the_others_are_as_they_were():
    case = layer_case(CrossbarSpec(4, 4, 2, 6, 16), 16, 20, kernel=(1, 1), size=(1, 3))
    case.delta = [1.0, 2.0]
    converts = on_chip(case, CONVERTERS)
    skips = replace(converts, spec=replace(converts.spec, adc_idle="skip"))
    codes = torch.full_like(case.input(), 15)
    codes[:, :, 1] = 0
    one, other = (reference.accumulate(layer, codes) for layer in (converts, skips))
    assert torch.equal(one[:, :, :, [0, 2]], other[:, :, :, [0, 2]])
    assert one[:, :, :, 1].any() and not other[:, :, :, 1].any()


@pytest.mark.parametrize("weights", ["offset", "pair"])
@pytest.mark.parametrize("adc_idle", ["convert", "skip"])
def test_a_converter_that_holds_all_reads_is_lossless_whether_idle_ones_are_skipped_or_not(weights, adc_idle):
    """Of cells too, as those of pairs: without a word line that is on they add nothing."""
    for bits, lossless in ((8, True), (2, False)):
        spec = CrossbarSpec(adc_bits=bits, rows=8, adc_range="full", adc_idle=adc_idle, weights=weights)
        assert adc.is_lossless(Qconv2dDoreFa(8, 5, 3, spec=spec, alpha_init=1.0).mapped()) == lossless


# ---- plans ---------------------------------------------------------------------------------------------------------------


@given(seed=st.integers(0, 2**32 - 1), kinds=st.integers(1, 4), most=st.integers(1, 3))
@settings(max_examples=100)
def test_bits_of_kinds_that_cost_different_are_the_best_of_all(seed, kinds, most):
    rng = np.random.default_rng(seed)
    error, costs = -np.sort(-rng.random((kinds, most + 1)), axis=1), rng.integers(0, 5, kinds)
    error[costs == 0] = 0  # what costs nothing has no reads that are not idle
    expected = np.full(most * costs.sum() + 1, np.inf)
    for bits in itertools.product(range(most + 1), repeat=kinds):
        spent = int(costs @ bits)
        expected[spent] = min(expected[spent], error[np.arange(kinds), bits].sum())
    least, bits = best_bits(error, costs)
    np.testing.assert_allclose(least, np.minimum.accumulate(expected), rtol=1e-12)
    assert (bits @ costs <= np.arange(len(least))).all()
    np.testing.assert_allclose(error[np.arange(kinds), bits].sum(axis=1), least, rtol=1e-12, atol=1e-15)


def spent_by(model, bits, x):
    """(bits of all conversions, reads) of each layer, one read after another, with these bits of each digit and slice."""
    found, seen = [], {}
    layers = crossbar_layers(model)
    hooks = [layer.register_forward_pre_hook(lambda layer, inputs: seen.update({layer: layer.a_codes(inputs[0])})) for _, layer in layers]
    with torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    for (_, layer), plan in zip(layers, bits):
        busy, total = busy_reads(layer, seen[layer])
        plan, out = plan.numpy(), len(layer.weight)
        found.append((out * int(busy @ plan.sum(1)), out * total * plan.size))
    return np.array(found)


@pytest.mark.parametrize("share", ["layer", "network"])
def test_a_mean_is_that_of_all_reads_with_none_for_idle_ones(tiny, share):
    """It is met but for what is left over, less than a bit of one kind of read, and what costs are rounded up to. Of a layer alone the
    error that the planner counts is never larger than that of a plan that converts all reads."""
    x, errors = images(4), []
    for spec in (PLANNED, SKIPS):
        model = tiny(spec=spec)
        histograms = calibrate(model, x, share=share)
        errors.append([plans.choices(histograms[name], layer.mapped("ideal")).error[:, :, -1].reshape(-1, 9)[
            np.arange(8), layer.adc_bits_plan.flatten()].sum() for name, layer in crossbar_layers(model)])
    bits = [layer.adc_bits_plan for _, layer in crossbar_layers(model)]
    with quant.without_adc(model):
        found = spent_by(model, bits, x)
    for spent, reads in found if share == "layer" else [found.sum(0)]:
        kinds = 8 if share == "layer" else reads / found[:, 1].max() * 8
        assert SKIPS.adc_bits * reads * (1 - 1 / 16) - reads / kinds < spent <= SKIPS.adc_bits * reads
    if share == "layer":
        assert all(skip <= convert for convert, skip in zip(*errors)) and errors[1][2] < 0.7 * errors[0][2]


def by_ones(layer, seed=0):
    """Give a layer a plan by ones of random bits, none of n = 0. Returns: bits of each digit, slice and class."""
    digits, slices = len(layer.spec.digit_bits), len(layer.slice_bits)
    bits = np.random.default_rng(seed).integers(0, 7, (digits, slices, layer.classes))
    bits[:, :, 0] = 0
    layer.set_plan(plans.Plan(bits, np.ones(bits.shape), np.zeros(bits.shape)))
    return bits


@pytest.mark.parametrize("layer, x", [
    (QLinearDoreFa(20, 5, spec=CrossbarSpec(4, 4, 2, 3, 16, adc_plan="ones", dac_bits=3), alpha_init=1.0), torch.rand(7, 20) ** 3),
    (Qconv2dDoreFa(6, 4, 3, 2, 1, groups=2, spec=CrossbarSpec(2, 4, 1, 3, 7, "im2col", adc_plan="ones"), alpha_init=1.0),
     torch.rand(2, 6, 5, 5) - 0.4)])
def test_bits_of_reads_by_ones_are_those_of_their_classes(layer, x):
    """Mean bits of all reads, share of conversions, and bits of a conversion that is made, of each read's n."""
    with quant.set_engine("reference"), torch.no_grad():
        bits, out = by_ones(layer.eval()), len(layer.weight) // layer.geometry.groups
        lengths = lengths_of_reads(layer, layer.a_codes(x))
        most, reads = bits.shape[2] - 1, out * lengths.sum() * bits.shape[1]
        spent = out * sum(n * bits[z, :, min(j, most)].sum() for (z, j), n in np.ndenumerate(lengths))
        made = out * sum(n * (bits[z, :, min(j, most)] > 0).sum() for (z, j), n in np.ndenumerate(lengths))
        found = measure(torch.nn.Sequential(layer, torch.nn.Flatten()), x, torch.zeros(len(x), dtype=torch.int64), Setting(layer.spec),
                        calibration=None, engine="reference")
    assert len({*lengths.nonzero()[1]}) > 2
    assert found.mean_bits == pytest.approx(spent / reads, rel=1e-12) == found.layer_bits["0"]
    assert found.conversions == pytest.approx(made / reads, rel=1e-12) and found.bits_made == pytest.approx(spent / made, rel=1e-12)


def test_ternary_inputs_are_counted_by_the_lines_of_either_sign():
    """Two rows of cells stand for a word line, so that there may be one class more, which no read is of."""
    torch.manual_seed(0)
    x = torch.randn(40, 16)
    network = convert(torch.nn.Sequential(torch.nn.Linear(16, 6)), CrossbarSpec(4, 4, adc_plan="ones", adc_bits=2, rows=8), x,
                      first_last_bits=None, inputs="ternary")
    [(name, layer)] = crossbar_layers(network)
    bits = by_ones(layer)
    with quant.set_engine("reference"):
        counts, mapped = count(network, x).layers[name], layer.mapped()
        classes = torch.cat([j.flatten() for z, k, _, j in reference.reads(mapped, layer.parts(x)[0]) if z == k == 0])
        found = conversions_of(network, x, [count(network, x)])
    shares = counts.shares(layer.spec, layer.classes)
    assert bits.shape[2] == mapped.classes == shares.shape[1]
    np.testing.assert_allclose(shares[0], np.bincount(classes, minlength=mapped.classes) / len(classes))
    assert found["mean_bits"] == pytest.approx((shares[:, None] * bits).sum() / bits[..., 0].size)


def test_without_a_conversion_there_are_no_bits_of_one(tiny):
    layer, x = linear(20, 4, CrossbarSpec(adc_plan="ones", adc_bits=1, rows=16))
    nothing = np.zeros((4, 4, layer.classes))
    layer.set_plan(plans.Plan(nothing, nothing + 1, nothing))
    found = measure(torch.nn.Sequential(layer), x, torch.zeros(1, dtype=torch.int64), Setting(layer.spec), engine="reference")
    assert (found.mean_bits, found.conversions, found.bits_made) == (0, 0, None)


def test_both_phases_of_signed_inputs_are_read():
    """A layer with signed inputs has twice the reads of one without, one of its phases idle where inputs are of one sign."""
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(16, 6), torch.nn.ReLU(), torch.nn.Linear(6, 6))
    x = torch.randn(40, 16)
    spec = CrossbarSpec(4, 4, 2, 5, 16, adc_idle="skip")
    on_arrays = convert(network, spec, x, first_last_bits=None, inputs="phases")
    counts = count(on_arrays, x)
    layers = crossbar_layers(on_arrays)
    reads = np.array([counts.layers[name].reads_of(spec).sum() * 6 for name, _ in layers])
    busy = np.array([counts.layers[name].shares(spec, 2)[:, 1].mean() for name, _ in layers])
    found = measure(on_arrays, x, torch.zeros(40, dtype=torch.int64), Setting(spec), calibration=x)
    assert reads[0] == 2 * reads[1]
    assert found.conversions == pytest.approx(reads @ busy / reads.sum(), rel=0.02)  # counted behind the ADCs of the first layer
    assert found.layer_bits[layers[0][0]] == pytest.approx(5 * busy[0], rel=1e-12)


def test_reads_of_both_phases_count_in_the_mean():
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.ReLU(), torch.nn.Linear(6, 6))
    x = torch.randn(40, 8)
    network = convert(network, CrossbarSpec(4, 4, adc_bits=4, rows=16, adc_range="full"), x, first_last_bits=None, inputs="phases")
    (_, first), (_, second) = crossbar_layers(network)
    second.set_spec(replace(second.spec, adc_bits=7))
    reads = [phases * len(layer.slice_bits) * len(layer.spec.digit_bits) for phases, layer in ((2, first), (1, second))]
    assert conversions_of(network, x[:1], ())["mean_bits"] == pytest.approx((4 * reads[0] + 7 * reads[1]) / sum(reads))


def test_what_is_measured_says_what_was_converted(tiny):
    """Uniform converters: the mean is that of the reads that are not idle, of the images that are shown, as the network has them."""
    x, labels = images(6), torch.zeros(6, dtype=torch.int64)
    spec = CrossbarSpec(cell_bits=2, rows=8, adc_bits=5)
    found = [measure(tiny(spec=each), x, labels, Setting(each), calibration=x) for each in (spec, replace(spec, adc_idle="skip"))]
    assert torch.equal(found[0].predictions, found[1].predictions) and (found[0].mean_bits, found[0].conversions) == (5, 1)
    model = tiny(spec=spec)
    calibrate(model, x)
    spent, reads = spent_by(model, [torch.full((4, 2), 5)] * 5, x).sum(0)
    assert found[1].mean_bits == pytest.approx(spent / reads, rel=1e-12)
    assert found[1].conversions == pytest.approx(spent / reads / 5, rel=1e-12) and 0 < found[1].conversions < 1


# ---- costs, files, flags -------------------------------------------------------------------------------------------------


def test_costs_are_those_of_a_technology_that_skips_them():
    layer, _ = linear(32, 4, CrossbarSpec(a_bits=2, adc_range="full", rows=16))
    x = torch.cat([torch.full((1, 16), 1 / 3), torch.zeros(1, 16)], 1)
    counts, found = count(layer, x), []
    for spec, skip_idle in ((layer.spec, False), (layer.spec, True), (replace(layer.spec, adc_idle="skip"), False)):
        layer.set_spec(spec)
        found.append(estimate(counts, layer, replace(Technology.load("rram_32nm"), skip_idle=skip_idle)).energy)
    assert found[0].typical > found[1].typical and found[1] == found[2]


def test_rows_of_a_table(run, checkpoint):  # noqa: F811
    """Plans with and without idle reads stand side by side, each with its own ranges, and ranges are found again."""
    flags = ["--cell_bits", "2", "--adc_plan", "significance", "--adc_bits", "2", "--adc_idle", "convert", "skip"]
    first, predictions, text = run(checkpoint, *flags)
    assert [row["adc_idle"] for row in first[1:]] == ["convert", "skip"] and text.count("idle reads skipped") >= 1
    assert all(1.5 < row["mean_bits"] <= 2.05 for row in first[1:])
    plans = [sum(np.sum(layer["bits"]) for layer in entry["layers"].values()) for entry in stored()]
    assert plans[1] > plans[0]
    again, repeated, _ = run(checkpoint, *flags, "--adc_ranges", "save/adc_ranges.json")
    assert [row["mean_bits"] for row in again] == [row["mean_bits"] for row in first]
    assert all(torch.equal(a, b) for a, b in zip(predictions, repeated, strict=True))


def test_layers_without_a_plan_by_ones_skip_idle_reads_where_they_are_asked_to(checkpoint):  # noqa: F811
    """A plan by ones skips them in any case, other plans in the same network do where the flag says so."""
    flags = ["--adc_plan", "ones", "--adc_bits", "4", "--per_layer", "features.4:adc_plan=uniform"]
    for idle in ("convert", "skip"):
        [setting] = eval_settings.parse(["--resume", checkpoint, *flags, "--adc_idle", idle])[0].settings
        assert setting.spec_of("features.4").adc_idle == idle
    assert len(eval_settings.parse(["--resume", checkpoint, *flags[:-2], "--adc_idle", "convert", "skip"])[0].settings) == 1


def test_rows_of_plans_by_ones(run, checkpoint):  # noqa: F811
    """They have more bits of a conversion that is made, and their ranges, of each class, are found again."""
    flags = ["--cell_bits", "2", "--adc_plan", "significance", "ones", "--adc_bits", "2"]
    first, predictions, text = run(checkpoint, *flags)
    assert text.count("planned by ones") >= 1 and all(row["bits_made"] >= row["mean_bits"] for row in first[1:])
    assert [{np.ndim(layer["bits"]) for layer in entry["layers"].values()} for entry in stored()] == [{2}, {3}]
    again, repeated, _ = run(checkpoint, *flags, "--adc_ranges", "save/adc_ranges.json")
    assert all(torch.equal(a, b) for a, b in zip(predictions, repeated, strict=True))


def test_without_a_plan_ranges_are_those_of_all_reads(run, checkpoint):  # noqa: F811
    first, predictions, _ = run(checkpoint, "--adc_bits", "4")
    [entry] = stored()
    again, repeated, _ = run(checkpoint, "--adc_bits", "4", "--adc_idle", "skip", "--adc_ranges", "save/adc_ranges.json")
    assert torch.equal(predictions[1], repeated[1]) and again[1]["adc_idle"] == "skip" and again[1]["conversions"] < 1
    assert stored() == [entry]


def test_published_ranges_have_no_code_that_is_zero(refused, checkpoint):  # noqa: F811
    with pytest.raises(ValueError, match="adc_idle is 'skip' with adc_range 'dynamic'"):
        CrossbarSpec(adc_range="dynamic", adc_idle="skip")
    refused(["--resume", checkpoint, "--adc_range", "dynamic", "--adc_idle", "skip"], "--adc_idle", "dynamic")
