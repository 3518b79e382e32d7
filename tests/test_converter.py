"""Converters that are not linear: what it takes to have one (all of it stands here), and who runs it."""

from dataclasses import dataclass, replace

import numpy as np
import oracle
import pytest
import torch

from models.quant import CrossbarSpec, Qconv2dDoreFa, calibrate, engines, set_engine
from models.quant.arrays import adc
from models.quant.arrays.converter import Converter

pytestmark = pytest.mark.usefixtures("one_thread")


class Logarithmic(Converter):
    """Values 0, +-delta, +-2 delta, +-4 delta, ..."""

    @staticmethod
    def level(q):
        size = abs(q)
        return (2**size // 2) * ((q > 0) * 1 - (q < 0) * 1)

    @staticmethod
    def nearest(x):
        size = abs(x)
        edges = [0.5, *(1.5 * 2**i for i in range(24))]  # a tie goes to the even code: upwards at the edges of odd ones
        q = sum((size >= edge if i % 2 else size > edge) * 1 for i, edge in enumerate(edges))
        return q * ((x > 0) * 1 - (x < 0) * 1)


@dataclass(frozen=True)
class LogarithmicSpec(CrossbarSpec):
    adc_codes: str = "logarithmic"

    @property
    def converter(self):
        return {"linear": Converter, "logarithmic": Logarithmic}[self.adc_codes]


LEVELS = {q: (q > 0 or -1) * (0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)[abs(q)] for q in range(-15, 16)}


def nearest_level(v, delta, codes):
    """The level of the nearest value, of two the one of the even code, as a person would look for it."""
    return LEVELS[min(codes, key=lambda q: (abs(v - delta * LEVELS[q]), q % 2))]


def by_hand(layer, a_codes):
    """`sum A (2 W - L)` as the arrays give it, float64 `[N, H', W', out]`."""
    mapped, spec = layer.mapped(), layer.spec
    total = 0.0
    for _, _, z, k, u in oracle.reads(a_codes, mapped.w_codes, spec, mapped.geometry, mapped.reference_twice):
        where = (z, k) if spec.planned else k
        delta, q_min = float(layer.adc_delta[where]), int(layer.adc_q_min[where])
        bits = int(layer.adc_bits_plan[where]) if spec.planned else spec.adc_bits
        codes = range(q_min, q_min + 2**bits)
        values = {int(each): delta * nearest_level(each / 2, delta, codes) for each in np.unique(u)}
        total = total + 2 * 2.0 ** (spec.dac_bits * z + spec.cell_bits * k) * np.vectorize(values.get)(u)
    return total


HARDWARE = [dict(adc_bits=3), dict(adc_bits=4, adc_range="full"), dict(adc_bits=1.5, adc_plan="significance", adc_max_bits=3)]


def layer_and_input(**hardware):
    torch.manual_seed(0)
    spec = LogarithmicSpec(w_bits=4, a_bits=2, cell_bits=2, rows=16, **hardware)
    return Qconv2dDoreFa(20, 3, 2, bias=False, spec=spec).eval(), torch.rand(2, 20, 4, 4) * 6


@pytest.mark.parametrize("hardware", HARDWARE)
@pytest.mark.parametrize("rule", adc.RULES)
def test_another_converter_is_its_class_and_its_flag(hardware, rule):
    layer, x = layer_and_input(**hardware)
    if layer.spec.adc_range == "calibrated":
        calibrate(layer, x, rule, correct=None)
    mapped = layer.mapped()
    if layer.spec.adc_range == "full":
        layer.adc_delta, layer.adc_q_min = mapped.adc_delta, mapped.adc_q_min
    codes = layer.a_codes(x)
    acc = engines.load("reference").accumulate(mapped, codes)
    wanted = by_hand(layer, codes.numpy())
    found = sum(value * plane.double() for value, plane in zip(engines.value(mapped), acc))
    np.testing.assert_allclose(found, wanted, rtol=1e-12)
    assert len(np.unique(wanted)) > 20 and np.abs(wanted - of_a_linear_one(layer, mapped, codes)).max() > 1
    np.testing.assert_allclose(layer(x).detach().permute(0, 2, 3, 1).double(), wanted * (layer._scale().item()), rtol=1e-5, atol=1e-5)


def of_a_linear_one(layer, mapped, codes):
    linear = replace(mapped, spec=replace(mapped.spec, adc_codes="linear"))
    acc = engines.load("reference").accumulate(linear, codes)
    return sum(value * plane.double() for value, plane in zip(engines.value(linear), acc)).numpy()


def test_engines_of_linear_converters_refuse_others():
    layer, x = layer_and_input(adc_bits=3)
    calibrate(layer, x, correct=None)  # counts reads without converters, which any engine does
    refusal = "^engine numba cannot run here: it has linear converters only, not Logarithmic$"
    with set_engine("numba"), pytest.raises(engines.EngineError, match=refusal):
        layer(x)
    assert engines.load("numba").unsupported(layer.mapped("ideal"), torch.device("cpu")) is None
    assert layer.way(x) == "reference"
    with pytest.raises(ValueError, match="adc_range is 'dynamic', which works with linear converters only; allowed are calib"):
        replace(layer.spec, adc_range="dynamic")


def test_triton_refuses_others():
    triton_gpu = pytest.importorskip("models.quant.engines.gpu.triton_gpu")
    layer, x = layer_and_input(adc_bits=3)
    calibrate(layer, x, correct=None)
    assert triton_gpu.unsupported(layer.mapped(), torch.device("cuda")) == "it has linear converters only, not Logarithmic"


@pytest.mark.parametrize("adc_bits", [2, 3])
def test_the_best_step_is_that_of_its_own_values(adc_bits):
    """Of all steps and lowest codes, by looking at each read."""
    mapped = layer_and_input(adc_bits=adc_bits)[0].mapped("ideal")
    histogram = np.random.default_rng(adc_bits).geometric(0.01, (2, 2, mapped.bins.count)) * (np.arange(mapped.bins.count) % 7 == 0)
    ranges = adc.calibrated_ranges(histogram, mapped, "mse", "slice")
    for k, (delta, q_min) in enumerate(ranges):
        reads = adc.Reads(histogram, [k], mapped)

        def cost(delta, q_min, reads=reads):
            e = np.array([delta * nearest_level(v, delta, range(q_min, q_min + 2**adc_bits)) - v for v in reads.v])
            return reads.square @ e**2 + reads.arrays * (reads.linear @ e) ** 2

        steps = np.arange(1, int(np.abs(reads.v).max() * 64) + 1, 16) / 64
        assert cost(delta, q_min) <= min(cost(step, -m) for step in steps for m in range(2**adc_bits)) * (1 + 1e-9)


@pytest.mark.parametrize("low, high", [(-40, 3), (-10, 10), (-3, 100), (0, 17), (-9, 0)])
def test_a_range_that_covers_is_that_of_its_own_values(low, high):
    delta, q_min = adc.covering_range(low, high, 0.5, 3, Logarithmic)
    covering = [(step, -m) for m in range(8) for step in np.arange(32, 64 * 100 + 1) / 64
                if step * LEVELS[-m] <= low and high <= step * LEVELS[7 - m]]
    assert (delta, q_min) in covering and delta == min(covering)[0]


def test_accumulators_hold_its_values():
    layer, x = layer_and_input(adc_bits=5)
    layer.set_ranges([(0.5, 0)] * 2)  # the highest level is 2^30, and there are twelve arrays
    assert engines.accumulator_dtype(layer.mapped()) == torch.int64


def test_kinds_of_converters_are_told_apart():
    """Tables are kept by the converter that they are of."""
    assert Converter(1.0, -2, 2) != Logarithmic(1.0, -2, 2) and Logarithmic(1.0, -2, 2) == Logarithmic(1.0, -2, 2)
