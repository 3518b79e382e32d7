"""Reads of cells that 16 bits hold: codes by a division by whole steps against exact fractions; which layers take which of the CPU
engine's kernels for fixed ranges, each against the oracle or the reference engine."""

from dataclasses import replace
from fractions import Fraction

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import by_ones
from test_cells import assert_same, layer_case

from models.quant import CrossbarSpec
from models.quant.arrays.converter import Converter
from models.quant.engines import reference
from models.quant.engines.cpu import cells, engine
from models.quant.engines.cpu.grid import cells_kernel, cells_narrow
from models.quant.engines.cpu.common.buffers import STATIC
from models.quant.engines.cpu.grid.cells_kernel import STATIC_BROAD
from models.quant.engines.cpu.grid.cells_reads import NARROW, PLAIN, SHORT
from models.quant.arrays.readout import Readout

pytestmark = pytest.mark.usefixtures("one_thread")

GRID = 1 / 256  # cells of `layer_case` have eight bits behind the point


@pytest.fixture
def kernels(monkeypatch):
    """Which kernels have run."""
    ran = []
    monkeypatch.setattr(cells, "can_multiply", lambda: False)
    monkeypatch.setattr(cells_kernel, "_kernels", {op: lambda *a, op=op, kernel=kernel: (ran.append(op), kernel(*a))
                                                   for op, kernel in cells_kernel._kernels.items()})
    return ran


def code(u, step, q_min, bits):
    return min(max(round(Fraction(u, step)), q_min), q_min + 2**bits - 1)  # Python rounds ties to even, and fractions exactly


@given(step=st.one_of(st.integers(2, 700), st.integers(2, 2**15 - 1)), bits=st.integers(1, 8), at=st.floats(-1.2, 0.3),
       plain=st.booleans(), data=st.data())
@settings(max_examples=400)
def test_codes_of_whole_steps(step, bits, at, plain, data):
    q_min, most = round(at * 2**bits), 2**16 if plain else 2**15
    low, high = sorted(data.draw(st.tuples(st.integers(-most, 0), st.integers(0, most - 1))))
    form = cells_narrow._form(low, high, GRID, Converter(step * GRID, q_min, bits), plain)
    lowest, highest = max(low, q_min * step), min(high, (q_min + 2**bits - 1) * step)
    if form is None:  # no read is converted, or 16 bits do not hold the way from a step below the first code to the last
        assert lowest > highest or highest - min(lowest, low) + 2.5 * step + 2**7 >= 2**16 or high - low + 2**7 >= 2**16 or (
            not plain and lowest - 2.5 * step < -2**15)
        return
    u = np.unique(np.concatenate([np.linspace(low, high, 300).astype(int), np.arange(lowest, min(highest, lowest + 3 * step) + 1),
                                  [(2 * q + 1) * step // 2 + i for q in range(q_min, q_min + 2**bits) for i in (-1, 0, 1)]]))
    u = u[(u >= low) & (u <= high)]
    bias, *fields = form
    assert all(0 <= field < 2**16 for field in fields[:-1])
    assert bias == 2**15 or plain and bias % 2**7 == 0
    assert 0 <= low + bias and high + bias < 2**16
    assert cells_narrow._codes(u + bias, *fields).tolist() == [code(int(value), step, q_min, bits) for value in u]


@pytest.mark.parametrize("low, high, delta, plain", [
    (-900, 900, 100.5, True), (-900, 900, 1.0, True), (-900, 900, 2.0**15, True), (-2**15 - 1, 900, 64.0, False),
    (-900, 2**15, 64.0, False), (-32767, 32767, 2000.0, False), (-30000, 2**16 - 30000, 64.0, True), (-2**16 + 900, 900, 64.0, True)])
def test_what_16_bits_do_not_hold(low, high, delta, plain):
    assert cells_narrow._form(low, high, GRID, Converter(delta * GRID, -32, 6), plain) is None


STEPS = {"a level": 1.0, "odd": 117 * GRID, "even, no power of two": 180 * GRID, "less than a level": 0.25, "three": 3 * GRID}


@pytest.mark.parametrize("delta", STEPS.values(), ids=STEPS)
@pytest.mark.parametrize("dac_bits, cell_bits, analog", [(1, 1, True), (2, 2, True), (3, 1, False), (4, 2, False)])
def test_narrow_layers(kernels, delta, dac_bits, cell_bits, analog):
    spec = CrossbarSpec(4, 4, cell_bits, 4, 64, dac_bits=dac_bits, reference="analog" if analog else "digital")
    case = layer_case(spec, channels=70, out=130, size=(3, 3), padding=(1, 1, 1, 1))
    slices = len(spec.slice_bits)
    case.delta, case.q_min = [delta * 2.0 ** (k % 2) for k in range(slices)], [(-8, -3, 0, -15)[k % 4] for k in range(slices)]
    case.cells = *(part // 2 ** (dac_bits + cell_bits) for part in case.cells[:2]), 8
    check(case)
    assert kernels == [NARROW]


def check(case):
    found = engine.accumulate(engine.prepare(case.layer()), case.input())
    assert_same(engine, found.numpy(), oracle.accumulate(
        case.a_codes, case.w_codes, case.spec, case.geometry, case.reference_twice, case.delta, case.q_min, case.bits, case.cells))


def test_a_plan_of_many_steps(kernels):
    """Codes of all kinds of reads are brought to one unit, and kinds without bits are left out."""
    spec = CrossbarSpec(4, 4, 1, 3, 128, adc_plan="significance")
    case = layer_case(spec, channels=130, out=130, kernel=(1, 1))
    rng = np.random.default_rng(0)
    case.bits = rng.integers(0, 5, (4, 4))
    case.delta = (2.0 ** rng.integers(-1, 2, (4, 4)) * np.where(rng.random((4, 4)) < 0.5, 1, 0.75)).tolist()
    case.q_min = (-2 ** np.maximum(case.bits - 1, 0)).tolist()
    case.bits = case.bits.tolist()
    case.cells = *(part // 8 for part in case.cells[:2]), 8
    check(case)
    assert kernels == [NARROW]


@pytest.mark.parametrize("dac_bits, cell_bits, analog, mapping", [(1, 1, True, "tap"), (2, 2, True, "im2col"), (3, 1, False, "tap")])
def test_plans_by_ones(kernels, dac_bits, cell_bits, analog, mapping):
    """Reads of each class have a form of their own, all classes of a slice one unit; reads of 0 bits are left out."""
    spec = CrossbarSpec(4, 4, cell_bits, 4, 64, mapping, "analog" if analog else "digital", dac_bits)
    case = layer_case(spec, channels=70, out=130, size=(3, 3), padding=(1, 1, 1, 1))
    case.cells = *(part // 2 ** (dac_bits + cell_bits) for part in case.cells[:2]), 8
    check(by_ones(case, most=4, steps=(16, 24, 32, 48, 64, 67, 128)))
    assert kernels == [NARROW]


@pytest.mark.parametrize("steps, kernel", [([4096, 4160], NARROW), ([4096, 4097], PLAIN)])
def test_what_codes_of_all_classes_are_worth(kernels, steps, kernel):
    """Steps of two classes of one slice, in 1/64, have 64 in common, or nothing, and codes of 4 bits are up to 15."""
    case = full_case(CrossbarSpec(1, 2, 1, 1, 40, reference="digital"), 40, 300, 1.0)
    case = by_ones(case)
    case.a_codes[0, 0, 0, 3:] = 2  # the lower digit has three ones, the higher one 40
    case.bits, case.delta = [[[4] * 7]] * 2, [[[steps[0] / 64] * 4 + [steps[1] / 64] * 3]] * 2
    case.q_min = [[[0] * 7]] * 2
    check(case)
    assert kernels == [kernel]


@pytest.mark.parametrize("large, kernel", [(17, STATIC_BROAD), (15, PLAIN)])
def test_sums_that_float32_does_not_hold_of_one_class(kernels, large, kernel):
    """Codes of 12 bits on eight digits pass 2^24 in the last class alone."""
    case = by_ones(full_case(CrossbarSpec(1, 8, 1, 9, 40, reference="digital"), 40, 8000, 1.0))
    case.bits, case.delta = [[[1] * 6 + [12]]] * 8, [[[1 / 64] * 6 + [large / 64]]] * 8
    case.q_min = [[[0] * 7]] * 8
    check(case)
    assert kernels == [kernel]


def test_reads_at_the_ends_of_16_bits(kernels):
    """Sums pass beyond 16 bits on the way and come back; the ends, -2^15 and 2^15 - 1, are read."""
    spec = CrossbarSpec(1, 1, 1, 4, 8, reference="digital")
    weights = np.zeros((1, 1, 8, 70), np.int32)
    weights[0, 0, :, 0] = [20000, 12767, 0, 0, 0, 0, 0, 0]
    weights[0, 0, :, 1] = [-20000, -12768, 0, 0, 0, 0, 0, 0]
    weights[0, 0, :, 2] = [20000, 12000, -20000, -12000, 0, 0, 0, 0]
    case = layer_case(spec, channels=8, out=70, kernel=(1, 1), size=(4, 8))
    case.a_codes[:], case.cells = 1, (weights, np.zeros((1, 1, 8), np.int32), 8)
    case.delta, case.q_min = [1000 * GRID], [-8]
    assert case.layer().u_span == (-2**15, 2**15 - 1)
    check(case)
    assert kernels == [NARROW]


@pytest.mark.parametrize("cell, kernel", [(510, NARROW), (512, PLAIN)])
def test_reads_of_one_sign(kernels, cell, kernel):
    """Those of 128 rows reach to 65,280, half a step below the end of 16 bits, or to 2^16: sums of 16 bits begin where the smallest of
    them has no sign."""
    for sign in (1, -1):
        kernels.clear()
        case = full_case(CrossbarSpec(1, 2, 1, 8, 128, reference="digital"), 128, sign * cell, 1.0)
        case.q_min = [0 if sign > 0 else -255]
        check(case)
        assert kernels == [kernel]


def full_case(spec, channels, cell, delta, bits=None):
    """All inputs and all cells at their largest; with these bits for each kind of read, a plan."""
    case = layer_case(spec, channels=channels, out=2, kernel=(1, 1), size=(1, 1), images=1)
    shape = len(spec.digit_bits), len(spec.slice_bits)
    case.cells = np.full((shape[1], 1, channels, 2), cell, np.int32), np.zeros((shape[1], 1, channels), np.int32), 8
    case.a_codes[:], case.delta, case.q_min = 2**spec.a_bits - 1, [delta] * shape[1], [0] * shape[1]
    if bits is not None:
        case.delta, case.q_min, case.bits = (np.full(shape, number).tolist() for number in (delta, 0, bits))
    return case


@pytest.mark.parametrize("a_bits, kernel", [(3, NARROW), (4, NARROW), (5, PLAIN)])
def test_sums_of_the_codes_of_all_digits(kernels, a_bits, kernel):
    """Codes of 12 bits on all digits: 7 times 4095 fits in 16 bits, 15 times in two parts, and 16 times, of the fifth digit, does not."""
    check(full_case(CrossbarSpec(1, a_bits, 1, 12, 64, reference="digital"), 40, 256, 2 * GRID))
    assert kernels == [kernel]


@pytest.mark.parametrize("delta, kernel", [(32.0, NARROW), (64.0, PLAIN)])
def test_what_codes_are_worth(kernels, delta, kernel):
    """A plan's steps of 32 or 64 levels are 2^11 or 2^12 of its units; codes of the fourth slice are worth 2^14, or 2^15, which 16 bits do
    not hold."""
    spec = CrossbarSpec(4, 1, 1, 1, 64, reference="digital", adc_plan="significance")
    check(full_case(spec, 40, 256, delta, bits=1))
    assert kernels == [kernel]


def test_slices_whose_reads_reach_further_than_those_of_others(kernels):
    case = layer_case(CrossbarSpec(4, 4, 2, 7, 64), channels=60, out=70, kernel=(1, 1))
    values, line, fraction = case.cells
    scale = np.array([32, 4], np.int32)
    case.cells = values // scale.reshape(2, 1, 1, 1), line // scale.reshape(2, 1, 1), fraction
    case.delta, case.q_min = [0.5, 0.5], [-64, -64]
    check(case)
    assert kernels == [NARROW]


@pytest.mark.parametrize("case, kernel", [
    (full_case(CrossbarSpec(8, 8, 1, 9, 1, reference="digital"), 65, 511, GRID), STATIC_BROAD),
    (full_case(CrossbarSpec(1, 8, 1, 9, 40, reference="digital", adc_plan="significance", adc_max_bits=12), 40, 8000, 17 / 64, 12),
     STATIC_BROAD),
    (full_case(CrossbarSpec(1, 8, 1, 9, 40, reference="digital", adc_plan="significance", adc_max_bits=12), 40, 8000, 15 / 64, 12), PLAIN),
    (full_case(CrossbarSpec(8, 8, 1, 7, 128, reference="digital", adc_plan="significance"), 640, 255, 1.0, 7), STATIC_BROAD),
], ids=["65 arrays pass 2^31", "codes of all digits pass 2^24", "just do not", "both, of which codes of each slice need not"])
def test_sums_of_codes_that_32_bits_or_float32_do_not_hold(kernels, case, kernel):
    check(case)
    assert kernels == [kernel]


@pytest.mark.parametrize("offset, kernel", [(12766, SHORT), (12767, STATIC), (-12766, SHORT), (-12767, SHORT), (-12768, STATIC)])
def test_converters_that_move_reads_to_the_ends_of_16_bits(kernels, offset, kernel):
    """A read of 20,000 or -20,000, one more where a gain might round it, and these offsets."""
    case = layer_case(CrossbarSpec(1, 1, 1, 4, 8, reference="digital"), channels=4, out=2, kernel=(1, 1), size=(1, 1))
    case.cells = np.full((1, 1, 4, 2), [5000 * np.sign(offset), 0], np.int32), np.zeros((1, 1, 4), np.int32), 8
    case.a_codes[:], case.delta, case.q_min = 1, [1024 * GRID], [15 if offset > 0 else -31]
    layer = replace(case.layer(), readout=Readout(offset=torch.tensor([offset, 0]).view(1, 1, 1, 2)))
    check_besides(layer, case)
    assert kernels == [kernel]


def check_besides(layer, case):
    found = engine.accumulate(engine.prepare(layer), case.input())
    assert_same(engine, found.numpy(), reference.accumulate(layer, case.input()).numpy())


def test_parts_of_sums_of_rows_that_16_bits_hold(kernels):
    """Eight rows of this cell are 2^15; of 2^13, no four rows fit in 16 bits."""
    case = layer_case(CrossbarSpec(1, 1, 1, 6, 32, reference="digital"), channels=20, out=2, kernel=(1, 1), size=(1, 1))
    case.cells = np.full((1, 1, 20, 2), [4096, -4096], np.int32), np.zeros((1, 1, 20), np.int32), 8
    case.a_codes[:], case.delta, case.q_min = 1, [10.0], [-32]
    check(case)
    assert kernels == [PLAIN]
    for cell in (8191, -8191, 8192, -8192):
        case.cells[0][0, 0, 0, 0] = cell
        assert cells.fits(case.layer()) == (abs(cell) == 8191)


def test_pairs_whose_lines_together_hold_more_than_their_difference(kernels):
    case = layer_case(CrossbarSpec(4, 4, 2, 6, 64, weights="pair"), 60, 70, kernel=(1, 1))
    values = np.random.default_rng(0).integers(-40, 41, case.cells[0].shape)
    case.cells = values.astype(np.int32), np.zeros_like(case.cells[1]), 8
    both = torch.from_numpy(np.abs(values)).int() + 4000
    for readout, kernel in ((Readout(cell_noise=((40.0, 0.1, 0.5),) * 2, both=both), STATIC),
                            (Readout(curve=((0.98, -1e-6, 2e-12, 20.0),) * 2, both=both), STATIC)):
        check_besides(replace(case.layer(), readout=readout), case)
        assert kernels.pop() == kernel and not kernels


READOUTS = {
    "noise": Readout(base=900.0, cell_noise=((40.0, 0.0, 0.5),) * 4, seed=5), "curve": Readout(curve=((0.98, -1e-6, 2e-12, 20.0),) * 4),
    "converters": Readout(gain=torch.linspace(0.9, 1.1, 4 * 2 * 130, dtype=torch.float64).view(4, 1, 2, 130),
                          offset=torch.arange(4 * 2 * 130).view(4, 1, 2, 130) % 97 - 48)}


@pytest.mark.parametrize("readout", READOUTS.values(), ids=READOUTS)
def test_what_reads_have_besides(kernels, readout):
    case = layer_case(CrossbarSpec(4, 4, 1, 6, 128), 140, 130, kernel=(1, 1), size=(5, 6))
    case.cells = *(part // 8 for part in case.cells[:2]), 8
    case.delta, case.q_min = [1.0, 179 * GRID, 0.5, 180 * GRID], [-32, -31, -33, -31]
    check_besides(replace(case.layer(), readout=readout), case)
    assert kernels == [SHORT]


@pytest.mark.parametrize("readout", READOUTS.values(), ids=READOUTS)
def test_steps_of_powers_of_two_of_what_reads_have_besides(kernels, readout):
    """Every second read of steps of two is a tie; few bits clip at both ends, of steps of 64 levels at none."""
    case = layer_case(CrossbarSpec(4, 4, 1, 3, 128), 140, 130, kernel=(1, 1), size=(5, 6))
    case.cells = *(part // 8 for part in case.cells[:2]), 8
    case.delta, case.q_min = [2 * GRID, 16 * GRID, 1.0, 64.0], [-4, -7, 0, -1]
    check_besides(replace(case.layer(), readout=readout), case)
    assert kernels == [SHORT]


LEVELS = Readout(cell_noise=((40.0, 0.1, 0.5),) * 4, seed=3)


@pytest.mark.parametrize("larger, kernel", [(1, SHORT), (40, STATIC)])
@pytest.mark.parametrize("readout", [*READOUTS.values(), LEVELS], ids=[*READOUTS, "levels"])
def test_what_reads_by_ones_have_besides(kernels, readout, larger, kernel):
    """Classes are those of the digits, whatever noise and converters make of their reads; larger: how many times cells are."""
    case = layer_case(CrossbarSpec(4, 4, 1, 6, 128), 140, 130, kernel=(1, 1), size=(5, 6))
    case.cells = *(part // 8 * larger for part in case.cells[:2]), 8
    check_besides(replace(by_ones(case, most=4, steps=(16, 24, 32, 48, 64, 67, 128)).layer(), readout=readout), case)
    assert kernels == [STATIC if readout is LEVELS else kernel]


@pytest.mark.parametrize("change, kernel", [
    ({}, NARROW), ({"delta": [0.7] * 4}, PLAIN), ({"cells": 40}, PLAIN), ({"cells": 40, "readout": Readout(base=900.0)}, STATIC),
    ({"readout": Readout(base=900.0)}, SHORT), ({"readout": Readout(base=900.0), "delta": [0.7] * 4}, STATIC),
    ({"readout": Readout(base=900.0, cell_noise=((40.0, 0.1, 0.5),) * 4)}, STATIC),
    ({"cells": 200, "bits": 8}, STATIC_BROAD)], ids=str)
def test_each_layer_takes_the_fastest_that_can(kernels, change, kernel):
    """cells: how many times larger; bits: of an input and its one digit."""
    spec = CrossbarSpec(4, change.get("bits", 4), 1, 6, 128, dac_bits=change.get("bits", 1))
    case = layer_case(spec, 140, 130, kernel=(1, 1))
    case.cells = *(part // 8 * change.get("cells", 1) for part in case.cells[:2]), 8
    case.delta = change.get("delta", case.delta)
    check_besides(replace(case.layer(), readout=change.get("readout")), case)
    assert kernels == [kernel]
