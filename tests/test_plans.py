"""ADC bits where they count: planning against brute force, layers and networks with a plan, their files, flags and training.

The engines' arithmetic with a plan is in test_engines.py and test_triton.py.
"""

import copy
import io
import itertools
import json
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_eval import CROSSBARS, FAST, checkpoint, network, refused, results, run, save, scene, shown_images  # noqa: F401
from test_models import images
from test_train import FLAGS, assert_same
from torch import nn

import eval as evaluation
import train
from experiment.settings import eval_settings, train_settings
from experiment.inputs.checkpoint import load_checkpoint
from experiment.program.cli import UserError, run_main
from experiment.measure.ranges import AdcRanges
from experiment.train.training import Run
from models import vgg
from models.quant import (CrossbarSpec, Device, Qconv2dDoreFa, QLinearDoreFa, calibrate, collect_histograms, crossbar_layers, error_weights,
                          program, set_engine, set_spec)
from models.quant.arrays import adc, plans
from models.quant.network import calibration
from models.quant.arrays.converter import Converter
from models.quant.network.counts import LENGTHS, counting
from models.quant.network.expectation import shares_of_ones
from models.quant.arrays.mapping import MappedLayer
from models.quant.arrays.spec import Geometry

pytestmark = pytest.mark.usefixtures("one_thread")
PLAN = dict(adc_plan="significance")
PLANNED = CrossbarSpec(cell_bits=2, adc_bits=2.5, rows=16, adc_plan="significance")


def lengths_of_reads(layer, codes):
    """How many reads of each digit have an n of 0, 1, ... bits, `[digits, lengths]`, one array after another."""
    spec, found = layer.spec, np.zeros((len(layer.spec.digit_bits), LENGTHS), int)
    for *_, on in oracle.word_lines(codes.numpy(), layer._weight4().shape[2:], spec, layer._geometry()):
        for z, (shift, bits) in enumerate(oracle.split(spec.a_bits, spec.dac_bits)):
            for n, times in zip(*np.unique((on >> shift & 2**bits - 1).sum(-1), return_counts=True)):
                found[z, len(f"{n:b}") if n else 0] += times
    return found


# ---- how many bits each kind of read gets ----------------------------------------------------------------------------


def every_total(error):
    """For each total the least error over all ways to give no more bits than that, by trying all of them."""
    kinds, numbers = error.shape
    least = np.full(kinds * (numbers - 1) + 1, np.inf)
    for bits in itertools.product(range(numbers), repeat=kinds):
        least[sum(bits)] = min(least[sum(bits)], sum(error[kind, b] for kind, b in enumerate(bits)))
    return np.minimum.accumulate(least)


def best_bits(error, prices=None):
    """(least error of each total, bits of each kind for each total)."""
    least, bits = plans.best_bits(error, prices)
    return least, np.array([bits(total) for total in range(len(least))])


@given(seed=st.integers(0, 2**32 - 1), kinds=st.integers(1, 4), most=st.integers(1, 4),
       shape=st.sampled_from(["any", "convex", "flat", "whole", "growing"]))
@settings(max_examples=150)
def test_bits_of_a_layer_are_the_best_of_all(seed, kinds, most, shape):
    """Errors of every shape: convex, with bits that help only together, with ties, and an error that a bit makes larger."""
    rng = np.random.default_rng(seed)
    error = rng.random((kinds, most + 1)) if shape != "whole" else rng.integers(0, 4, (kinds, most + 1)).astype(float)
    if shape in ("any", "whole"):
        error = -np.sort(-error, axis=1)
    elif shape == "convex":
        error = 4.0 ** (rng.integers(0, 8, (kinds, 1)) - np.arange(most + 1))
    elif shape == "flat":
        error[:, :2] = error.max()
    least, bits = best_bits(error)
    np.testing.assert_allclose(least, every_total(error), rtol=1e-12)
    assert bits.shape == (kinds * most + 1, kinds) and bits.min() >= 0 and bits.max() <= most
    assert (bits.sum(axis=1) <= np.arange(kinds * most + 1)).all()
    np.testing.assert_allclose(error[np.arange(kinds), bits].sum(axis=1), least, rtol=1e-12)
    again, same = best_bits(error.copy())
    assert np.array_equal(least, again) and np.array_equal(bits, same)


def test_bits_of_a_layer_where_errors_are_the_same():
    """Earlier kinds get more bits; those that lower no error are given to none."""
    assert best_bits(np.array([[1.0, 0.0]] * 3))[1].tolist() == [[0, 0, 0], [1, 0, 0], [1, 1, 0], [1, 1, 1]]
    assert best_bits(np.array([[3.0, 1.0, 1.0], [2.0, 2.0, 2.0]]))[1].tolist() == [[0, 0]] + [[1, 0]] * 4


def test_bits_that_lower_no_error_take_no_memory():
    """40 kinds whose second to eighth bits are of no use: a byte for each price that the kinds until then can spend, 3.4 MB, not 52."""
    tracemalloc.start()
    least, bits = plans.best_bits(np.array([[1.0] + [0.0] * 8] * 40), np.full(40, 4096))
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(least) == 8 * 40 * 4096 + 1 and kept < least.nbytes + 5e6
    assert [int(bits(total).sum()) for total in (4095, 4096, 8192, len(least) - 1)] == [0, 1, 2, 40]


def some_layers(rng):
    """Least errors of some layers over their bits, never rising, and what a bit costs in each."""
    least = []
    for _ in range(rng.integers(1, 4)):
        falls = rng.integers(0, 4, rng.integers(1, 6)) / 3 if rng.random() < 0.5 else rng.random(rng.integers(1, 6))
        least.append(np.append(np.cumsum(falls[::-1])[::-1], 0.0) * rng.choice([0.1, 1.0, 7.0]))
    return least, [int(reads) for reads in rng.choice([1, 3, 7, 10, 49], len(least))]


def cost(reads, totals):
    return sum(each * total for each, total in zip(reads, totals))


@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=200)
def test_bits_of_several_layers(seed):
    """Never over budget; a larger budget never has a larger error; where the bits stand on corners of the hulls, nothing that
    costs as much or less has a smaller error; what is left over is less than a bit of some layer that could use it."""
    least, reads = some_layers(np.random.default_rng(seed))
    ways = [(cost(reads, way), sum(errors[n] for errors, n in zip(least, way)))
            for way in itertools.product(*(range(len(errors)) for errors in least))]
    whole = cost(reads, [len(errors) - 1 for errors in least])
    before = np.inf
    for budget in range(whole + 3):
        totals = plans.share_bits(least, reads, budget)
        assert all(0 <= n < len(errors) for n, errors in zip(totals, least))
        error, spent = sum(errors[n] for errors, n in zip(least, totals)), cost(reads, totals)
        assert spent <= budget and error <= before + 1e-12
        before = error
        useful = [each for each, n, errors in zip(reads, totals, least) if errors[n] > errors.min() + 1e-12]
        assert not useful or budget - spent < max(useful)
        if all(n in corners(errors) for n, errors in zip(totals, least)):
            assert error <= min(other for price, other in ways if price <= spent) + 1e-9
        assert totals == plans.share_bits([errors.copy() for errors in least], list(reads), budget)
    assert before == pytest.approx(sum(errors.min() for errors in least), abs=1e-12)  # all that helps is given


def corners(errors):
    """Totals at which the largest convex curve below the errors meets them."""
    n = len(errors)
    return [i for i in range(n) if all(
        errors[i] <= errors[a] + (errors[b] - errors[a]) * (i - a) / (b - a) + 1e-12 for a in range(i) for b in range(i + 1, n))]


def test_layers_with_steps_of_the_same_slope():
    """Equal falls whose slopes float64 tells apart before they are divided by the reads, or after: bits are never taken back."""
    thirds = np.array([5, 4.5, 3.5, 2, 1.5, 0]) * (14 / 3)
    tenths = np.array([0.6, 0.5, 0.4, 0.30000000000000004, 0.2, 0.1, 0.0])  # its last step falls an ulp faster than those before
    for errors in (thirds, tenths, np.array([1.0, 2 / 3, 1 / 3, 0.0]), np.arange(6)[::-1] * 0.1, np.arange(6)[::-1] / 3):
        for each in range(1, 60):
            totals = [plans.share_bits([errors], [each], each * n)[0] for n in range(len(errors))]
            assert totals == sorted(totals) and totals[-1] == len(errors) - 1
    assert plans.share_bits([np.array([1.0, 0.0])] * 2, [5, 5], 5) == [1, 0]  # ties: the first layer
    assert plans.share_bits([np.zeros(4), np.array([1.0, 0.5])], [5, 5], 100) == [0, 1]  # nothing to gain


def test_a_budget_of_billions_of_reads_is_spent_to_the_last():
    errors = np.arange(64.0)[::-1]
    for each in (10**9, 3 * 10**9 + 1, 10**10 + 19):
        for tenths in range(1, 64):
            assert plans.share_bits([errors], [each], tenths / 10 * (10 * each)) == [tenths]


# ---- ranges ----------------------------------------------------------------------------------------------------------


def mapped(rows, taps=1, **hardware):
    spec = CrossbarSpec(rows=rows, **hardware)
    w_codes = torch.zeros(1, rows, 1, taps, dtype=torch.uint8)
    slices = len(spec.slice_bits)
    return MappedLayer(replace(spec, adc_range="ideal"), Geometry(), w_codes, tuple(2**bits - 1 for bits in spec.slice_bits),
                       torch.zeros(slices), torch.zeros(slices))


def counted(layer, kind, seed):
    """Counts `[digits, slices, 1, u]` of some shape, 0 where no read can be."""
    rng, (low, high) = np.random.default_rng(seed), layer.u_span
    u = np.arange(low, high + 1)
    counts = np.zeros((len(layer.spec.digit_bits), len(layer.spec.slice_bits), 1, len(u)), np.int64)
    for z, k in np.ndindex(*counts.shape[:2]):
        middle, width = rng.uniform(-0.2, 0.2) * high, rng.uniform(0.05, 0.3) * (high - low)
        shape = {"bell": np.exp(-((u - middle) / width)**2 / 2), "sharp": np.exp(-np.abs(u - middle) / width * 3),
                 "flat": np.ones(len(u)), "few": rng.random(len(u)) * (rng.random(len(u)) < 0.15)}[kind]
        counts[z, k, 0] = np.rint(1e5 * shape * rng.uniform(0.8, 1.2, len(u)))
        counts[z, k, 0, (u < layer.u_range(k)[0]) | (u > layer.u_range(k)[1]) | (u % layer.u_spacing(k) != 0)] = 0
        counts[z, k, 0, -low] += 10**6 - counts[z, k].sum() if counts[z, k].sum() < 10**6 else 0
    return counts


def square_error(v, p, delta, q_min, bits):
    """Mean of `(delta q - v)^2`, the formula of the ADC written out."""
    return sum(share * (delta * min(max(round(x / delta), q_min), q_min + 2**bits - 1) - x)**2 for x, share in zip(v, p))


def best_of_all_ranges(v, p, spacing, bits):
    """Least mean of `(delta q - v)^2` over all lowest codes and all multiples of 1/64 up to twice the step that covers all."""
    top = int(np.ceil(2 * adc.covering_range(v[0], v[-1], spacing, bits)[0] * 64))
    q, best = np.rint(v / (np.arange(1, top + 1)[:, None] / 64)), np.inf
    for m in range(2**bits):
        e = np.arange(1, top + 1)[:, None] / 64 * np.clip(q, -m, 2**bits - 1 - m) - v
        best = min(best, (e**2 @ p).min())
    return best


@pytest.mark.parametrize("kind", ["bell", "sharp", "flat", "few"])
@pytest.mark.parametrize("hardware", [
    dict(rows=24), dict(rows=40, reference="digital", cell_bits=2), dict(rows=6, cell_bits=3, dac_bits=2, taps=3),
    dict(rows=64, w_bits=1, a_bits=1)])
def test_choices_are_the_best_ranges(hardware, kind):
    layer = mapped(**hardware, adc_plan="significance", adc_bits=2, adc_max_bits=6)
    counts = counted(layer, kind, seed=len(kind) + hardware["rows"])
    found, spec = plans.choices(counts, layer), layer.spec
    assert found.error.shape == found.delta.shape == found.q_min.shape == (*counts.shape[:3], 7)
    assert found.reads == counts[0, 0].sum()
    assert (found.delta * 64 == (found.delta * 64).round()).all() and (found.delta > 0).all()
    assert ((found.q_min <= 0) & (found.q_min >= 1 - 2**np.arange(7))).all()
    for z, k in np.ndindex(*counts.shape[:2]):
        seen = np.flatnonzero(counts[z, k, 0])
        v, p = spec.unit * (seen + layer.u_span[0]), counts[z, k, 0, seen] / counts[z, k].sum()
        spacing = spec.unit * layer.u_spacing(k)
        scale = len(layer.arrays) * 4.0**(spec.dac_bits * z + spec.cell_bits * k)
        for bits in range(7):
            got = found.error[z, k, 0, bits] / scale
            wanted = square_error(v, p, found.delta[z, k, 0, bits], int(found.q_min[z, k, 0, bits]), bits)
            assert got == pytest.approx(wanted, rel=1e-9, abs=1e-9)
            if bits and (z + k) % 2 == 0:  # half of them, as this takes long
                assert got <= 1.01 * best_of_all_ranges(v, p, spacing, bits) + 1e-9
        assert (np.diff(found.error[z, k, 0]) <= 1e-9 * scale).all()


def test_choices_with_enough_codes_are_exact():
    layer = mapped(4, adc_plan="significance", adc_bits=2, adc_max_bits=5)
    counts = np.zeros((4, 4, 1, 9), np.int64)
    counts[..., 4] = 100
    counts[1, ..., 3:6] = 10, 80, 10
    counts[2, ..., ::4] = 10, 80, 10  # v = -2, 0, 2: a step of 2 needs two bits
    counts[3] = 20
    error = plans.choices(counts, layer).error
    assert [int(np.flatnonzero(error[z, 0, 0] == 0)[0]) for z in range(4)] == [0, 2, 2, 4]
    nothing = plans.choices(0 * counts, layer)
    assert not nothing.error.any() and (nothing.delta > 0).all() and not nothing.q_min.any()


def test_bits_that_are_the_same_everywhere_are_uniform_ranges_of_each_kind():
    """One budget of 3 bits for reads that are distributed alike and count alike: ranges of a uniform ADC for each of them."""
    layer = mapped(24, w_bits=1, a_bits=4, adc_plan="significance", adc_bits=3)
    counts = counted(layer, "bell", 3)
    found = plans.choices(counts, layer)
    bits = np.full((4, 1), 3)
    plan = found.plan(bits[..., None])
    one = mapped(24, w_bits=1, a_bits=1, adc_bits=3)
    for z in range(4):
        delta, q_min = adc.calibrated_ranges(counts[z:z + 1, :, 0], one, "mse", "slice")[0]
        v, p = 0.5 * (np.arange(49) - 24), counts[z, 0, 0] / counts[z, 0].sum()
        # That rule counts the mean error more, as arrays add it up: no range has a smaller squared error.
        assert square_error(v, p, plan.delta[z, 0], plan.q_min[z, 0], 3) <= square_error(v, p, delta, q_min, 3) + 1e-12
        assert plan.delta[z, 0] == pytest.approx(delta, rel=0.1)
        assert plan.delta[z, 0] == plans.choices(counts[z:z + 1], replace(one, spec=replace(
            one.spec, adc_plan="significance"))).delta[0, 0, 0, 3]


def plans_of(layers, *means_and_weights):
    return [layer.plan(bits) for layer, bits in zip(layers, plans.bits_of(layers, *means_and_weights))]


def test_plans_of_layers_and_of_a_network():
    layers = [plans.choices(counted(layer, kind, 1), layer) for layer, kind in (
        (mapped(16, **PLAN, adc_bits=2), "bell"), (mapped(30, cell_bits=2, **PLAN, adc_bits=2), "sharp"))]
    layers[1] = replace(layers[1], reads=7 * layers[0].reads)
    errors = []
    for mean in np.arange(0, 8.01, 0.25):
        alone = plans_of(layers, [mean, mean])
        for plan, layer in zip(alone, layers):
            assert plan.bits.sum() <= mean * plan.bits.size and plan.bits.max() <= 8
            assert plan.bits.dtype == plan.q_min.dtype == np.int64 and plan.delta.dtype == np.float64
            for place in np.ndindex(*plan.bits.shape):
                assert plan.delta[place] == layer.delta[(*place, 0, plan.bits[place])]
                assert plan.q_min[place] == layer.q_min[(*place, 0, plan.bits[place])]
        together = plans_of(layers, [mean, mean], [1.0, 0.3])
        reads = [layer.reads for layer in layers]
        spent = cost(reads, [int(plan.bits.sum()) for plan in together])
        assert spent <= mean * cost(reads, [16, 8]) * (1 + 1e-9)
        errors.append([sum(weight * layer.left(plan.bits[..., None]) for weight, layer, plan in zip((1.0, 0.3), layers, found))
                       for found in (alone, together)])
    errors = np.array(errors)
    assert (np.diff(errors, axis=0) <= 1e-9 * errors[0]).all()
    # One budget does better but for what is left over: less than a bit of the layer that comes next, much in layers this small.
    assert (errors[:, 1] <= errors[:, 0] * 1.1).all() and errors[4, 1] < 0.9 * errors[4, 0]
    zero, = plans_of(layers[:1], [0])
    assert not zero.bits.any() and not zero.q_min.any()


# ---- layers and networks ---------------------------------------------------------------------------------------------


def buffers(model):
    return [[values.tolist() for values in (layer.adc_bits_plan, layer.adc_delta, layer.adc_q_min)]
            for _, layer in crossbar_layers(model)]


@pytest.mark.parametrize("wq, reference, share", [("dorefa", "analog", "network"), ("dorefa", "digital", "layer"),
                                                  ("sawb", "analog", "layer"), ("sawb", "digital", "network")])
def test_a_planned_network_is_the_same_on_all_engines(tiny, wq, reference, share):
    """With codes between the layers where there is a way for them; the plan does not depend on the engine either."""
    x, outputs, plans = images(2), [], []
    for engine in ("reference", "numba"):
        with set_engine(engine), torch.no_grad():
            model = tiny(wq=wq, spec=replace(PLANNED, reference=reference))
            calibrate(model, x, share=share)
            outputs.append(model(x))
            plans.append(buffers(model))
            by_module = x
            for module in (*model.features, nn.Flatten(), *model.classifier):
                by_module = module(by_module)
            assert torch.equal(by_module, outputs[-1])
    assert torch.equal(*outputs) and plans[0] == plans[1] and len(outputs[0].unique()) > 10
    bits = [np.array(plan) for plan, _, _ in plans[0]]
    assert all(plan.shape == (4, 2) for plan in bits) and any((plan == 0).any() for plan in bits)
    if share == "layer":
        assert all(plan.sum() <= 20 for plan in bits) and max(plan.sum() for plan in bits) == 20


@torch.no_grad()
def test_a_budget_of_the_network_is_met(tiny):
    """Over all conversions, which are counted here; linear layers make few and get more bits than the others."""
    model, x = tiny(spec=PLANNED), images(4)
    histograms = collect_histograms(model, x)
    calibrate(model, x, correct=None, histograms=histograms)
    layers = crossbar_layers(model)
    each = [int(histograms[name][0, 0].sum()) for name, _ in layers]
    spent = [n * int(layer.adc_bits_plan.sum()) for n, (_, layer) in zip(each, layers)]
    assert 0 <= 2.5 * 8 * sum(each) - sum(spent) < max(each)
    assert min(layer.adc_bits_plan.float().mean() for _, layer in layers[-2:]) > 2.5
    again = tiny(spec=PLANNED)
    calibrate(again, x, correct=None)  # without histograms of before
    assert buffers(again) == buffers(model)


def choices_of(model, x):
    histograms = collect_histograms(model, x)
    return {name: plans.choices(histograms[name], layer.mapped("ideal")) for name, layer in crossbar_layers(model)}


@torch.no_grad()
def test_weights_of_errors(tiny):
    """What the ADCs of one layer alone change at the output, over the error of its plan; four times as much where outputs are twice
    as large. The network is left as it was."""
    model, x = tiny(spec=PLANNED), images(5)
    choices, state = choices_of(model, x), buffers(model)
    before = error_weights(model, x, choices)
    assert before == error_weights(model, [x[:3], x[3:]], choices) and list(before) == list(choices) and min(before.values()) > 0
    assert buffers(model) == state and all(layer.spec == PLANNED for _, layer in crossbar_layers(model))
    for name, weight in before.items():
        alone = tiny(spec=CrossbarSpec(cell_bits=2, adc_range="ideal"))
        expected, layer = alone(x), dict(crossbar_layers(alone))[name]
        layer.set_spec(PLANNED)
        plan, = plans_of([choices[name]], [2.5])
        calibrate(alone, x, share="layer")
        assert np.array_equal(layer.adc_bits_plan.numpy(), plan.bits)
        error = choices[name].left(plan.bits[..., None])
        assert weight == pytest.approx(float((alone(x) - expected).square().mean()) / error, rel=1e-3)
    assert error_weights(model, x, dict([*choices.items()][2:0:-1])) == {name: before[name] for name in [*choices][2:0:-1]}
    name, last = crossbar_layers(model)[-1]
    last.out_scale *= 2
    after = error_weights(model, x, choices)
    for name in before:
        assert after[name] == pytest.approx(4 * before[name], rel=1e-3)
    for none in ([], x[:0]):
        with pytest.raises(ValueError, match="^no images"):
            error_weights(model, none, choices)


@torch.no_grad()
def test_weights_of_errors_behind_a_digital_reference(tiny):
    """The ADC that is measured sees the off-current of a chip's nominal cells, as the reads did for which it was planned."""
    spec, device, x = replace(PLANNED, reference="digital"), Device("perfect", "", 10.0, 40.0), images(5)
    model = tiny(spec=spec)
    program(model, device)
    histograms = collect_histograms(model, x)
    choices = {name: plans.choices(histograms[name], layer.mapped("ideal", layer.chip.nominal)) for name, layer in crossbar_layers(model)}
    weights = error_weights(model, x, choices)
    assert all(layer.chip for _, layer in crossbar_layers(model))
    for name, weight in weights.items():
        alone = tiny(spec=CrossbarSpec(cell_bits=2, adc_range="ideal"))
        expected, layer = alone(x), dict(crossbar_layers(alone))[name]
        layer.set_spec(spec)
        program(alone, device)
        calibrate(alone, x, share="layer")
        error = choices[name].left(layer.adc_bits_plan.numpy()[..., None])
        assert weight == pytest.approx(float((alone(x) - expected).square().mean()) / error, rel=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("adc_idle", ["convert", "skip"])
def test_a_layer_that_changes_no_output_weighs_nothing(tiny, adc_idle, monkeypatch):
    """Whose batch norm multiplies by 0, as new residual branches do: no number of bits changes that."""
    model, x, made, alone = tiny(spec=replace(PLANNED, adc_idle=adc_idle)), (images(3) - 1).clamp(0), [], plans.plan_alone
    name, layer = crossbar_layers(model)[1]
    modules = list(model.modules())
    norm = next(module for module in modules[modules.index(layer):] if isinstance(module, nn.BatchNorm2d))
    norm.weight.zero_()
    monkeypatch.setattr(plans, "plan_alone", lambda *given: made.append(given) or alone(*given))
    calibrate(model, x)
    assert 0 < len(made) < 200 and all((layer.adc_bits_plan >= 0).all() for _, layer in crossbar_layers(model))


def test_steps_of_reads_finer_than_the_grid_of_steps():
    """Those of a chip's cells behind a digital reference: multiples of 1/256."""
    share = np.exp(-0.5 * np.square((np.arange(-200, 3000) - 900) / 300))
    for bits in (0, 1, 3, 8):
        error, delta, q_min = plans._best_range(share / share.sum(), -200, 2.0**-8, 2.0**-8, bits)
        assert delta * adc.GRID % 1 == 0 and delta > 0
        v = np.arange(-200, 3000) / 256
        assert error == pytest.approx(share @ np.square(delta * Converter(delta, q_min, bits).encode(v) - v) / share.sum())


def test_a_plan_for_a_chip_behind_a_digital_reference(run, checkpoint):  # noqa: F811
    records, _, _ = run(checkpoint, *PLANNED_FLAGS, "--device", "techA", "--reference", "digital")
    assert 2 < records[1]["mean_bits"] <= 2.5 and 0 < records[1]["conversions"] < 1


def test_a_plan_alone_has_an_error_that_can_be_measured():
    layer = mapped(16, **PLAN, adc_bits=2)
    choices = plans.choices(counted(layer, "bell", 3), layer)
    whole = choices.error[..., 0].sum()
    for mean in (0, 0.5, 2, 3.3):
        plan, error, spent = plans.plan_alone(choices, mean)
        assert spent == plan.bits.mean() <= mean
        assert all(np.array_equal(*pair) for pair in zip(plan, *plans_of([choices], [mean])))
        assert error == pytest.approx(choices.left(plan.bits[..., None]))
    plan, error, _ = plans.plan_alone(choices, 8)
    least, _ = plans.best_bits(choices.error.reshape(-1, 9))
    assert error >= 1e-4 * whole > least[plan.bits.sum() + 1]  # with a bit more it were too small
    nothing = np.zeros_like(counted(layer, "bell", 3))
    assert plans.plan_alone(plans.choices(nothing, layer), 2)[1] == 0


@torch.no_grad()
def test_weights_of_a_network_whose_mean_would_be_exact(tiny):
    """A layer that would be without an error at the mean is weighed with fewer bits: it counts where others take them."""
    x = images(3)
    model = tiny(spec=replace(PLANNED, adc_bits=8))
    weights = error_weights(model, x, choices_of(model, x))
    assert min(weights.values()) > 0 and np.isfinite([*weights.values()]).all()


@torch.no_grad()
def test_weights_of_errors_decide_who_gets_the_bits(tiny, monkeypatch):
    x, totals = images(3), []
    for heavy in (0, 1):
        monkeypatch.setattr(calibration, "error_weights", lambda model, images, choices, dim, heavy=heavy: {
            name: 1e6 if i == heavy else 1.0 for i, name in enumerate(choices)})
        model = tiny(spec=PLANNED)
        calibrate(model, x, correct=None)
        totals.append([int(layer.adc_bits_plan.sum()) for _, layer in crossbar_layers(model)])
    assert totals[0][0] > totals[1][0] + 5 and totals[1][1] > totals[0][1] + 5


@torch.no_grad()
def test_what_a_plan_is_expected_to_lose_is_said(tiny, monkeypatch, caplog):
    """The sum of the layers' errors, each times its weight, against the outputs; the mean of the bits that reads have."""
    caplog.set_level("INFO", "models.quant.network.expectation")
    model, x = tiny(spec=PLANNED), images(3)
    monkeypatch.setattr(calibration, "error_weights", lambda model, images, choices, dim: {name: 0.5 + i for i, name in enumerate(choices)})
    calibrate(model, x)
    error, reads, bits = 0.0, 0, 0
    for i, (layer, choices) in enumerate(zip((layer for _, layer in crossbar_layers(model)), choices_of(model, x).values())):
        for place, b in np.ndenumerate(layer.adc_bits_plan.numpy()):
            error += (0.5 + i) * choices.error[(*place, 0, b)]
            reads, bits = reads + choices.reads, bits + choices.reads * b
    outputs = tiny(spec=CrossbarSpec(cell_bits=2, adc_range="ideal"))(x)
    decibels = 10 * np.log10(float(outputs.double().square().mean()) / error)
    [said] = [record.getMessage() for record in caplog.records if "expected" in record.getMessage()]
    assert said.startswith(f"plan of {bits / reads:.2f} bits in the mean: {decibels:.1f} dB expected at the network's output")
    caplog.clear()
    calibrate(model, x, share="layer")
    assert not caplog.records


@torch.no_grad()
def test_what_a_plan_is_expected_to_lose_is_about_what_it_loses(tiny, caplog):
    caplog.set_level("INFO", "models.quant.network.expectation")
    x, said = images(64), []
    exact = tiny(spec=CrossbarSpec(cell_bits=2, adc_range="ideal"))(x)
    for mean in (1.5, 3, 5):
        model = tiny(spec=replace(PLANNED, adc_bits=mean))
        calibrate(model, x)
        lost = 10 * np.log10(float(exact.square().sum() / (model(x) - exact).square().sum()))
        said.append(float(caplog.records[-1].getMessage().split("mean: ")[1].split(" dB")[0]))
        assert said[-1] == pytest.approx(lost, abs=4)
    assert said == sorted(said) and said[2] > said[0] + 10


@torch.no_grad()
def test_ones_on_word_lines_are_said(caplog):
    """Each output pixel of a padded image of 2 x 2 sees 4 of its 9 places: of codes 5 the lowest bit and the third are on in 16 of 36. A
    network of no error loses nothing."""
    caplog.set_level("INFO", "models.quant.network.expectation")
    torch.manual_seed(0)
    spec = CrossbarSpec(w_bits=4, a_bits=4, adc_plan="significance", adc_bits=8, rows=16)
    layer = Qconv2dDoreFa(2, 3, 3, padding=1, spec=spec, alpha_init=1.0).eval()
    calibrate(nn.Sequential(layer), torch.full((1, 2, 2, 2), 5 / 15))
    assert ": no error expected" in caplog.text and "word lines 44, 0, 44, 0 % are one, the lowest first" in caplog.text
    wider = QLinearDoreFa(6, 3, spec=CrossbarSpec(4, 6, adc_range="ideal"), alpha_init=1.0).eval()
    with counting(nn.ModuleList([layer, wider])) as counts:
        layer(torch.full((1, 2, 2, 2), 5 / 15))
        wider(torch.full((1, 6), 33 / 63))
    lines, others = 4 * 9 * 2, 6  # 9 places of 2 channels each, of which bits that the codes of one layer have not are none
    assert shares_of_ones(counts) == [(32 + 6) / (lines + others), 0, 32 / (lines + others), 0, 0, 1]


def test_a_plan_of_the_network_needs_images(tiny):
    model, x = tiny(spec=PLANNED), images(2)
    histograms = collect_histograms(model, x)
    with pytest.raises(ValueError, match="needs images, to measure what the layers' errors do; give some"):
        calibrate(model, None, histograms=histograms)
    calibrate(model, None, histograms=histograms, share="layer")


@pytest.mark.parametrize("reference", ["analog", "digital"])
@torch.no_grad()
def test_without_bits_each_channel_is_its_mean(reference):
    torch.manual_seed(0)
    spec = CrossbarSpec(adc_bits=0, rows=16, adc_plan="significance", reference=reference)
    x = torch.rand(5, 20, 6, 6)
    for layer in (Qconv2dDoreFa(20, 12, 3, stride=2, spec=spec, alpha_init=0.8).eval(), QLinearDoreFa(20, 12, spec=spec).eval()):
        x = x if layer.weight.dim() == 4 else torch.rand(50, 20)
        calibrate(layer, x)
        assert not layer.adc_bits_plan.any()
        y = layer(x)
        layer.set_spec(replace(spec, adc_range="ideal"))
        mean = layer(x).mean([dim for dim in range(y.dim()) if dim != 1])
        if reference == "analog":
            torch.testing.assert_close(y, mean.view(1, -1, *[1] * (y.dim() - 2)).expand_as(y), rtol=1e-5, atol=1e-6)
        else:  # the reference column's share of the input is known without a conversion
            torch.testing.assert_close(y.mean([dim for dim in range(y.dim()) if dim != 1]), mean, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_more_bits_come_closer(tiny):
    x = images(6)
    exact = tiny(spec=CrossbarSpec(cell_bits=2, adc_range="ideal"))(x)
    errors = []
    for mean in (1, 2, 3, 4.5, 8):
        model = tiny(spec=replace(PLANNED, adc_bits=mean))
        calibrate(model, x)
        errors.append(float((model(x) - exact).square().mean()))
    assert errors == sorted(errors, reverse=True) and errors[-1] == pytest.approx(0, abs=1e-9)
    uniform = tiny(spec=CrossbarSpec(cell_bits=2, adc_bits=3, rows=16))
    calibrate(uniform, x)
    assert errors[2] < float((uniform(x) - exact).square().mean())


@torch.no_grad()
def test_a_plan_is_kept_with_the_network(tiny):
    model, x = tiny(spec=PLANNED), images(2)
    calibrate(model, x)
    y, plan = model(x), buffers(model)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    loaded = tiny(spec=PLANNED)
    loaded.load_state_dict(torch.load(file, weights_only=True))
    copied = copy.deepcopy(model)
    for other in (loaded, copied, copied.half().float(), copied.to(torch.device("cpu"))):
        assert buffers(other) == plan
    assert torch.equal(loaded(x), y)
    assert crossbar_layers(loaded)[0][1].state_dict()["adc_bits_plan"].dtype == torch.int64
    crossbar_layers(copied)[0][1].adc_bits_plan[:] = 0
    assert buffers(model) == plan  # a copy has its own

    set_spec(model, replace(PLANNED, adc_plan="uniform", adc_bits=3))
    assert not [key for key in model.state_dict() if key.endswith("adc_bits_plan")]
    for _, layer in crossbar_layers(model):
        assert layer.adc_delta.shape == layer.adc_q_min.shape == (2,) and layer.adc_bits_plan is None
    with pytest.raises(ValueError, match="not calibrated"):
        model(x)
    calibrate(model, x)
    assert not torch.equal(model(x), y)
    with pytest.raises(RuntimeError, match="adc_bits_plan"):
        model.load_state_dict(loaded.state_dict())
    set_spec(model, PLANNED)
    assert buffers(model)[0][0] == [[0, 0]] * 4
    with pytest.raises(ValueError, match="not calibrated"):
        model(x)


@torch.no_grad()
def test_ranges_of_slices_of_before_are_loaded(tiny):
    spec = CrossbarSpec(cell_bits=2, adc_bits=3, rows=16)
    model, x = tiny(spec=spec), images(2)
    calibrate(model, x)
    state = model.state_dict()
    assert {key.split("adc_")[1] for key in state if "adc_" in key} == {"delta", "q_min", "gain", "offset"}
    other = tiny(spec=spec)
    other.load_state_dict(state)
    assert torch.equal(other(x), model(x))


def planned_layer(reference="analog"):
    torch.manual_seed(0)
    layer = QLinearDoreFa(40, 12, spec=replace(PLANNED, reference=reference), alpha_init=0.8).eval()
    x = torch.rand(6, 40)
    calibrate(layer, x)
    return layer, x


@pytest.mark.parametrize("name, value", [("adc_bits_plan", 0), ("adc_bits_plan", 1), ("adc_delta", 1.25), ("adc_q_min", 0)])
@torch.no_grad()
def test_numbers_of_a_plan_that_are_changed_in_place_count(name, value):
    layer, x = planned_layer()
    before = layer(x)
    layer.adc_q_min.clamp_(min=-1)
    layer.adc_bits_plan[layer.adc_q_min < 0] = 3
    between = layer(x)
    if name == "adc_bits_plan" and value == 0:
        layer.adc_q_min.zero_()
    getattr(layer, name).fill_(value)
    if name == "adc_bits_plan" and value == 1:
        layer.adc_q_min.clamp_(min=-1)
    found = layer(x)
    assert not torch.equal(before, between) and not torch.equal(found, between)
    fresh, _ = planned_layer()
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(fresh(x), found)


@pytest.mark.parametrize("name, value, words", [
    ("adc_bits_plan", -1, "bits"), ("adc_bits_plan", 9, "0 to 8 bits"), ("adc_bits_plan", 70, "0 to 8 bits"),
    ("adc_q_min", 1, "a code for zero"), ("adc_q_min", -256, "a code for zero"), ("adc_delta", 0.3, "multiples of 1/64"),
    ("adc_delta", 0.0, "not calibrated"),
    ("adc_delta", -1.0, "steps"), ("adc_delta", float("inf"), "steps"), ("adc_delta", float("nan"), "steps"),
    ("adc_delta", 1e300, "steps")])
@pytest.mark.parametrize("engine", ["reference", "numba"])
@torch.no_grad()
def test_plans_that_are_none_are_refused(name, value, words, engine):
    layer, x = planned_layer()
    getattr(layer, name)[1, 0] = value
    with set_engine(engine), pytest.raises(ValueError, match=words) as error:
        layer(x)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("bits, q_min, message", [
    (2.5, 0, "bits of a plan are whole numbers, and 2.5 is"), (2, -0.5, "q_min of a plan are")])
def test_plans_that_are_not_whole_are_refused(bits, q_min, message):
    layer = QLinearDoreFa(8, 2, spec=CrossbarSpec(adc_plan="significance", cell_bits=1))
    with pytest.raises(ValueError, match=message):
        layer.set_plan(plans.Plan(np.full((4, 4), bits), np.ones((4, 4)), np.full((4, 4), q_min)))


def test_plans_of_another_shape_are_refused():
    layer, _ = planned_layer()
    for shape in ((2, 4), (4,), (4, 3)):
        with pytest.raises(ValueError, match=r"\[4, 2\] is expected"):
            layer.set_plan(plans.Plan(np.ones(shape), np.ones(shape), np.zeros(shape)))
    with pytest.raises(ValueError, match="set_plan"):
        layer.set_ranges([(1.0, 0)] * 2)
    plain = QLinearDoreFa(4, 2, spec=CrossbarSpec(cell_bits=2))
    with pytest.raises(ValueError, match="adc_plan 'significance'"):
        plain.set_plan(plans.Plan(*[np.ones((4, 2))] * 3))


# ---- settings and flags ----------------------------------------------------------------------------------------------

WRONG = [
    (dict(adc_bits=9) | PLAN, "adc_bits is 9; allowed are means from 0 to 8"),
    (dict(adc_bits=4.5, adc_max_bits=4) | PLAN, "adc_bits is 4.5; allowed are means from 0 to 4"),
    (dict(adc_bits=2.5), "adc_bits is 2.5; allowed are whole numbers from 1 to 12. With adc_plan significance"),
    (dict(adc_bits=0), "adc_bits is 0; allowed are whole numbers from 1 to 12"),
    (PLAN | dict(adc_range="dynamic"), "adc_plan is 'significance' with adc_range 'dynamic'"),
    (PLAN | dict(adc_range="full"), "adc_plan is 'significance' with adc_range 'full'"),
    (PLAN | dict(adc_max_bits=13), "adc_max_bits is 13; allowed are whole numbers from 1 to 12"),
]


@pytest.mark.parametrize("settings, words", WRONG + [
    (dict(adc_bits=-1) | PLAN, "adc_bits is -1; allowed are means from 0 to 8"),
    (dict(adc_bits=-0.5), "adc_bits is -0.5; allowed are whole numbers"),
    (dict(adc_bits=True), "adc_bits is True; allowed are whole"),
    (dict(adc_bits=True) | PLAN, "adc_bits is True; allowed are means"), (dict(adc_bits="3"), "adc_bits is '3'; allowed are whole"),
    (dict(adc_bits="3") | PLAN, "adc_bits is '3'; allowed are means"), (dict(adc_bits=None) | PLAN, "adc_bits is None"),
    (dict(adc_bits=float("nan")) | PLAN, "adc_bits is nan"), (dict(adc_bits=float("nan")), "adc_bits is nan"),
    (dict(adc_bits=float("inf")) | PLAN, "adc_bits is inf"),
    (dict(adc_plan="best"), "adc_plan is 'best'; allowed are uniform, significance"),
    (dict(adc_max_bits=0) | PLAN, "adc_max_bits is 0")])
def test_hardware_that_is_none(settings, words):
    with pytest.raises(ValueError) as error:
        CrossbarSpec(**settings)
    assert str(error.value).startswith(words) and "\n" not in str(error.value)


def test_hardware_with_a_plan():
    for bits in (0, 0.0, 1, 2.5, 8, 8.0):
        assert CrossbarSpec(adc_bits=bits, **PLAN).planned
    assert not CrossbarSpec(adc_range="ideal", adc_bits=2.5, **PLAN).planned and not CrossbarSpec().planned
    assert CrossbarSpec(adc_bits=12, adc_max_bits=12, **PLAN).adc_max_bits == 12


FLAG_OF = {"adc_bits": "adc_bits"}


def as_flags(settings):
    return [word for name, value in settings.items() for word in (f"--{FLAG_OF.get(name, name)}", str(value))]


@pytest.mark.parametrize("wrong, words", WRONG)
def test_flags_that_are_wrong_for_eval(wrong, words, checkpoint):
    with pytest.raises(UserError) as error:
        eval_settings.parse(["--resume", checkpoint, *as_flags(wrong)])
    message = str(error.value)
    name, rest = words.split(" is ", 1)
    assert message.startswith(f"--{FLAG_OF.get(name, name)} is {rest[:15]}") and "\n" not in message


@pytest.mark.parametrize("wrong, words", [pair for pair in WRONG if "adc_range" not in pair[0]])
def test_flags_that_are_wrong_for_train(wrong, words):
    with pytest.raises(UserError) as error:
        train_settings.parse(["--adc_aware", *as_flags(wrong)])
    name, rest = words.split(" is ", 1)
    assert str(error.value).startswith(f"--{FLAG_OF.get(name, name)} is {rest[:15]}") and "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["-1", "x", "nan", "inf", "1e999", "True", "\u00b2", ""])
@pytest.mark.parametrize("plan", [[], ["--adc_plan", "significance"]])
def test_numbers_of_bits_that_are_none(text, plan, checkpoint):
    for parse in (lambda: eval_settings.parse(["--resume", checkpoint, f"--adc_bits={text}", *plan]),
                  lambda: train_settings.parse(["--adc_aware", f"--adc_bits={text}", *plan])):
        with pytest.raises(UserError) as error:
            parse()
        assert str(error.value).startswith("argument --adc_bits") or str(error.value).startswith("--adc_bits")
        assert "\n" not in str(error.value)


def specs_of(checkpoint, *flags):
    found, _ = eval_settings.parse(["--resume", checkpoint, *flags])
    return [setting.spec for setting in found.settings]


def test_fractions_are_for_the_plans_of_a_table(checkpoint):
    found = specs_of(checkpoint, "--adc_plan", "uniform", "significance", "--adc_bits", "4", "3", "2.5", "2", "1.5")
    assert [(spec.adc_plan, spec.adc_bits) for spec in found] == [
        *(("uniform", bits) for bits in (4, 3, 2)), *(("significance", bits) for bits in (4, 3, 2.5, 2, 1.5))]
    with pytest.raises(UserError, match="--adc_bits is 2.5; allowed are whole numbers"):
        specs_of(checkpoint, "--adc_bits", "3", "2.5")


def test_without_an_adc_there_is_no_plan(checkpoint):
    plans = ["--adc_plan", "uniform", "significance", "--adc_bits", "3", "2.5"]
    found = specs_of(checkpoint, "--adc_range", "ideal", *plans, "--adc_max_bits", "4", "8")
    assert found == [CrossbarSpec(adc_bits=1, adc_range="ideal")]
    found = specs_of(checkpoint, "--adc_range", "ideal", "calibrated", *plans)
    assert [(spec.adc_range, spec.adc_plan, spec.adc_bits) for spec in found] == [
        ("ideal", "uniform", 1), ("calibrated", "uniform", 3), ("calibrated", "significance", 3),
        ("calibrated", "significance", 2.5)]


def test_most_bits_of_a_plan_make_no_other_uniform_adc(checkpoint):
    found = specs_of(checkpoint, "--adc_plan", "uniform", "significance", "--adc_bits", "3", "--adc_max_bits", "4", "8")
    found = sorted((spec.adc_plan, spec.adc_max_bits) for spec in found)
    assert found == [("significance", 4), ("significance", 8), ("uniform", 8)]


# ---- eval.py ---------------------------------------------------------------------------------------------------------

PLANNED_FLAGS = ["--cell_bits", "2", "--adc_plan", "significance", "--adc_bits", "2.5"]


def stored():
    return json.loads(Path("save/adc_ranges.json").read_text())["ranges"]


def test_plans_in_a_file_can_be_used_again(run, checkpoint):  # noqa: F811
    flags = ["--cell_bits", "2", "--adc_plan", "uniform", "significance", "--adc_bits", "3", "2.5", "0"]
    first, predictions, text = run(checkpoint, *flags)
    hardware = [(r["adc_plan"], r["adc_bits"]) for r in first[1:]]
    assert hardware == [("uniform", 3), ("significance", 3), ("significance", 2.5), ("significance", 0)]
    for record, (plan, bits) in zip(first[1:], hardware):
        assert record["mean_bits"] <= bits and record["mean_bits"] >= (bits if plan == "uniform" else 0.8 * bits)
        assert record["conversions"] == 1 if plan == "uniform" else 0 <= record["conversions"] < 1
    entries = stored()
    assert [(entry["adc_plan"], entry["adc_bits"], entry["adc_max_bits"]) for entry in entries] == [(*each, 8) for each in hardware]
    for entry in entries:
        planned = entry["adc_plan"] == "significance"
        assert ("adc_share" in entry) == planned
        for layer in entry["layers"].values():
            assert np.shape(layer["ranges"]) == ((4, 2, 2) if planned else (2, 2))
            assert np.shape(layer.get("bits", 0)) == ((4, 2) if planned else ())
    again, repeated, _ = run(checkpoint, *flags, "--adc_ranges", "save/adc_ranges.json")
    assert [r["accuracy"] for r in again] == [r["accuracy"] for r in first]
    assert [r["mean_bits"] for r in again] == [r["mean_bits"] for r in first]
    assert all(torch.equal(a, b) for a, b in zip(predictions, repeated, strict=True)) and stored() == entries


def test_what_makes_no_difference_makes_no_other_setting():
    """A rule of ranges to plans, what has the mean to uniform bits; where layers differ, both count."""
    group = {"adc_plan": ["uniform", "significance"], "adc_bits": [3]}
    own = calibration.Calibration(rule="minmax", per="slice", share="layer")
    uniform, planned = eval_settings.all_settings(group, 4, 4, calibration=own)
    assert uniform.calibration == calibration.Calibration(rule="minmax", per="slice")
    assert planned.calibration == calibration.Calibration(share="layer")
    for plan, other in (("uniform", "significance"), ("significance", "uniform")):
        group = {"adc_plan": [plan], "adc_bits": [3], "per_layer": [f"features.*:adc_plan={other}"]}
        [mixed] = eval_settings.all_settings(group, 4, 4, calibration=own)
        assert mixed.calibration == own


def test_what_has_the_mean_is_chosen_by_a_flag(run, checkpoint):  # noqa: F811
    found = {}
    for share in ("network", "layer"):
        records, _, _ = run(checkpoint, *PLANNED_FLAGS, "--adc_share", share)
        assert (records[1]["adc_share"], records[1]["adc_calib"], records[1]["adc_per"]) == (share, None, None)
        [entry] = [each for each in stored() if each["adc_share"] == share]
        found[share] = [np.sum(layer["bits"]) for layer in entry["layers"].values()]
        Path(f"{share}.json").write_text(json.dumps({"ranges": [entry]}))
        flags = ["--resume", checkpoint, *FAST, *PLANNED_FLAGS, "--adc_ranges", f"{share}.json"]
        assert evaluation.main([*flags, "--save_path", share]) == 0  # the file says how they are shared
        assert results(share)[-1]["accuracy"] == records[1]["accuracy"]
    assert max(found["layer"]) == 20 and found["network"] != found["layer"]
    assert len(found["layer"]) == len(CROSSBARS)


@pytest.fixture(scope="module")
def planned_once():
    """What adc_ranges.json holds of PLANNED_FLAGS, once one of the tests has made it."""
    return []


def without(name):
    return lambda entry, layer: layer.pop(name)


def changed(name, *path, value):
    def change(entry, layer):
        inside = layer[name]
        for step in path[:-1]:
            inside = inside[step]
        inside[path[-1]] = value
    return change


@pytest.mark.parametrize("change, words", [
    (without("bits"), "adc_ranges.json"), (without("ranges"), "adc_ranges.json"),
    (changed("bits", 0, 0, value=9), "is not one of 0 to 8 bits"), (changed("bits", 0, 0, value=-1), "is not one of 0 to 8 bits"),
    (changed("bits", 0, 0, value="x"), "is not an adc_ranges.json"),
    (changed("bits", 0, 0, value=None), "is not an adc_ranges.json"),
    (changed("bits", 0, value=[1]), ""), (changed("bits", 0, value=3), "is not an adc_ranges.json"),
    (changed("ranges", 0, value=[[1.0, 0]]), ""), (changed("ranges", 0, 0, value=[1.0]), "is not an adc_ranges.json"),
    (changed("ranges", 0, 0, 0, value=0.3), "multiples of 1/64"), (changed("ranges", 0, 0, 0, value=0), "not calibrated"),
    (changed("ranges", 0, 0, 0, value=float("nan")), "multiples of 1/64"),
    (changed("ranges", 0, 0, 0, value=-1), "multiples of 1/64"), (changed("bits", 0, 0, value=1.5), "1.5 stands where a whole number"),
    (changed("ranges", 0, 0, 0, value=1e300), "multiples of 1/64"),
    (changed("ranges", 0, 0, 1, value=5), "a code for zero"), (changed("ranges", 0, 0, 1, value=-1e300), ""),
    (lambda entry, layer: layer.update(bits=[]), ""), (lambda entry, layer: layer.update(bits=[], ranges=[]), ""),
    (lambda entry, layer: layer.update(bits=5), "is not an adc_ranges.json"),
    (lambda entry, layer: entry.update(adc_plan="uniform", adc_bits=3), "has no ranges of features.4"),
    (lambda entry, layer: entry.pop("adc_plan"), "has no ranges of features.4")])
def test_damaged_plans_in_a_file(change, words, run, refused_later, checkpoint, planned_once):  # noqa: F811
    if not planned_once:
        run(checkpoint, *PLANNED_FLAGS)
        planned_once.append(json.dumps(stored()))
    [entry] = json.loads(planned_once[0])
    change(entry, entry["layers"]["features.4"])
    Path("damaged.json").write_text(json.dumps({"ranges": [entry]}))
    error = refused_later(checkpoint, *PLANNED_FLAGS, "--adc_ranges", "damaged.json")
    assert words in error and "damaged.json" in error


def test_slices_in_the_place_of_a_plan_and_a_plan_in_their_place(run, refused_later, checkpoint):  # noqa: F811
    run(checkpoint, "--cell_bits", "2", "--adc_plan", "uniform", "significance", "--adc_bits", "3")
    plain, planned = stored()
    plain["layers"], planned["layers"] = planned["layers"], plain["layers"]
    Path("damaged.json").write_text(json.dumps({"ranges": [plain, planned]}))
    for plan in ("uniform", "significance"):
        refused_later(checkpoint, "--cell_bits", "2", "--adc_plan", plan, "--adc_bits", "3", "--adc_ranges", "damaged.json")


@pytest.fixture
def refused_later(capsys):
    """refused_later(checkpoint, flags...): evaluation ends with one line, which is returned."""

    def refused_later(checkpoint, *flags):
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            run_main(lambda: evaluation.main(["--resume", checkpoint, *FAST, *flags]))
        error = capsys.readouterr().err.splitlines()[-1]
        assert ended.value.code == 2 and error.startswith("error: ") and len(error) < 1500
        return error

    return refused_later


def test_ranges_of_files_without_plans_mean_what_they_did(run, checkpoint):  # noqa: F811
    first, predictions, _ = run(checkpoint, "--adc_bits", "3")
    text = Path("save/adc_ranges.json").read_text()
    [entry] = json.loads(text)["ranges"]
    assert entry.pop("adc_plan") == "uniform" and entry.pop("adc_max_bits") == 8 and entry.pop("weights") == "offset"
    Path("before.json").write_text(json.dumps({"ranges": [entry]}))
    again, repeated, _ = run(checkpoint, "--adc_bits", "3", "--adc_ranges", "before.json")
    assert torch.equal(predictions[1], repeated[1]) and again[1]["adc_ranges"] == "before.json"


def test_checkpoints_keep_a_plan_on_its_hardware(tmp_path, refused_later):  # noqa: F811
    (tmp_path / "save").mkdir()
    net = network(spec=PLANNED)
    few, _ = shown_images(8)  # other images than eval.py would take
    calibrate(net, few)
    flags = dict(adc_aware=True, cell_bits=2, adc_bits=2.5, rows=16, mapping="tap", reference="analog", dac_bits=1, map="all",
                 adc_plan="significance", adc_max_bits=8)
    path = save(tmp_path / "save" / "aware.pth.tar", net, **flags)
    assert evaluation.main(["--resume", path, *FAST, "--cell_bits", "2", "--adc_plan", "significance", "--adc_bits", "2.5", "2"]) == 0
    kept, other = (record for record in results("save") if record["cell_bits"])
    assert [record["adc_ranges"] for record in (kept, other)] == ["checkpoint", None]
    shown, labels = shown_images(40)
    with torch.no_grad():
        predictions = net(shown).argmax(1)
    assert kept["accuracy"] == 100 * (predictions == labels).sum().item() / 40
    assert kept["mean_bits"] == pytest.approx(2.5, abs=0.1)
    for name, value, words in (("adc_bits_plan", 9, "0 to 8 bits"), ("adc_bits_plan", -1, "adc_bits_plan"),
                               ("adc_delta", 0.3, "multiples")):
        damaged = copy.deepcopy(net)
        getattr(crossbar_layers(damaged)[0][1], name)[0, 0] = value
        path = save(tmp_path / "save" / "damaged.pth.tar", damaged, **flags)
        assert words in refused_later(path, *PLANNED_FLAGS)


# ---- training --------------------------------------------------------------------------------------------------------


def check_resumed(monkeypatch, folder, begin, state):
    """A training that is stopped between two calibrations, and resumed, ends with this state. Args: begin, begins it in a folder."""
    save_whole = Run.save

    def save_and_die(self):
        save_whole(self)
        if self.step == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(Run, "save", save_and_die)
    with pytest.raises(KeyboardInterrupt):
        begin(folder)
    monkeypatch.setattr(Run, "save", save_whole)
    assert train.main(["--resume", str(folder / "checkpoint.pth.tar"), "--ngpu", "0"]) == 0
    assert_same(load_checkpoint(folder / "checkpoint.pth.tar")["state_dict"], state)


def test_training_through_a_plan_resumes_to_the_same_bits(tmp_path, monkeypatch):
    """The network of `scene` with fewer channels, as each calibration plans anew."""
    monkeypatch.setitem(vgg.CONFIGS, "vgg7", ([8, "M", 8, "M", 8, "M"], 16))

    def quick(folder, *flags):
        code = train.main(["--save_path", str(folder), *FLAGS, *flags])
        return code, load_checkpoint(Path(folder, "checkpoint.pth.tar"))

    quick(tmp_path / "start", "--epochs", "1")
    flags = ["--fine_tune", str(tmp_path / "start" / "model_best.pth.tar"), "--adc_aware", *PLANNED_FLAGS, "--rows", "16",
             "--calib_steps", "7", "--epochs", "1", "--save_minutes", "0"]
    _, whole = quick(tmp_path / "whole", *flags)
    state = whole["state_dict"]
    plans = [key for key in state if key.endswith("adc_bits_plan")]
    assert len(plans) == 4 and all(state[key].shape == (4, 2) for key in plans)
    assert len({int(state[key].sum()) for key in plans}) > 1  # one budget for the network
    assert whole["config"]["adc_plan"] == "significance" and whole["config"]["adc_bits"] == 2.5

    _, layer = quick(tmp_path / "layer", *flags, "--adc_share", "layer", "--calib_steps", "50")
    assert max(int(layer["state_dict"][key].sum()) for key in plans) == 20

    check_resumed(monkeypatch, tmp_path / "stopped", lambda folder: quick(folder, *flags), state)

    best = str(tmp_path / "whole" / "model_best.pth.tar")
    assert evaluation.main(["--resume", best, *FAST, *PLANNED_FLAGS]) == 0
    record = results(tmp_path / "whole")[-1]
    assert record["adc_ranges"] == "checkpoint" and record["adc_bits"] == 2.5


def test_ranges_of_layers_that_share_their_bits_are_kept_together():
    """Those of the convolutions alone, and of all layers, are two plans."""
    kept, entry = AdcRanges(), {"adc_share": "network", "adc_calib": "mse"}
    kept.add(("key",), entry | {"layers": {"a": 1, "b": 1}})
    kept.add(("key",), entry | {"layers": {"a": 2}})
    assert kept.entries[("key",)]["layers"] == {"a": 2}
    kept.add(("other",), {"adc_share": "layer", "layers": {"a": 1, "b": 1}})
    kept.add(("other",), {"adc_share": "layer", "layers": {"a": 2}})
    assert kept.entries[("other",)]["layers"] == {"a": 2, "b": 1}


def test_a_plan_is_lossless_where_all_of_it_is():
    layer = QLinearDoreFa(16, 3, bias=False, spec=CrossbarSpec(2, 2, adc_plan="significance", adc_max_bits=12, rows=16), alpha_init=1.0)
    for bits, lossless in (([[8, 8], [8, 8]], True), ([[8, 8], [2, 2]], False)):
        bits = np.array(bits)
        layer.set_plan(plans.Plan(bits, np.full((2, 2), 0.5), -(2 ** (bits - 1))))
        assert adc.is_lossless(layer.mapped()) is lossless


def test_layers_of_another_mean_have_bits_of_their_own(tiny):
    """Each group spends its own and no more."""
    model = tiny(spec=replace(PLANNED, adc_bits=2))
    layers = crossbar_layers(model)
    for _, layer in layers[2:]:
        layer.set_spec(replace(layer.spec, adc_bits=5))
    histograms = calibrate(model, torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(1)), correct=None)
    for mean, group in ((2, layers[:2]), (5, layers[2:])):
        reads = [int(histograms[name][0, 0].sum()) for name, _ in group]
        spent = sum(n * int(layer.adc_bits_plan.sum()) for n, (_, layer) in zip(reads, group))
        assert 0 <= mean * layers[0][1].adc_bits_plan.numel() * sum(reads) - spent < max(reads)


def test_costs_of_reads_that_are_not_idle_are_rounded_up():
    error, share = np.ones((2, 1, 2, 3)) * [4, 2, 1], np.array([[0, 0.5], [0, 0.38]])
    assert plans.Choices(error, error, error, 10, share, share > 0).prices[0].tolist() == [0, 32, 0, 25]
