"""Converters as circuits: tables from files, drawn thresholds, noise of comparators, against an oracle of their own."""

import functools
import json
import math
from dataclasses import replace

import interpreter
import numpy as np
import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from strategies import Case, cases, grid_cases, random_cells
from torch import nn

from models.quant import (CrossbarSpec, Device, Qconv2dDoreFa, QLinearDoreFa, Readout, calibrate, engines, image_numbers, load, program,
                          save, set_engine, set_spec)
from models.quant.arrays import adc, transfer
from models.quant.arrays.circuits import Circuits
from models.quant.arrays.mapping import MappedLayer
from models.quant.arrays.plans import _Shares
from models.quant.arrays.spec import Geometry
from models.quant.engines import reference
from models.quant.engines.cpu import cells
from models.quant.engines.cpu import engine as cpu
from models.quant.engines.cpu.grid import cells_thresholds
from models.quant.engines.cpu.grid.cells_reads import COMPARED_TREES, COMPARED_WIDE_TREES
from models.quant.engines.cpu.whole.choice import SHORT_ROWS, without
from models.quant.kernels.simd import has_byte_tables
from models.quant.measuring.chips import Chips
from models.quant.measuring.setting import Setting
from models.quant.network import diagnostics

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
EXACT = Device("exact", "here", g_min=2.0, g_max=42.0)
FIVE = 5  # standard errors: a right program passes but for one in a million of seeds


# ---- the oracle: shares no code with the package --------------------------------------------------------------------------


def reached(u, threshold, code):
    """Whether reads reach a threshold that begins this code: one that lies there has the even one of two codes."""
    return (u > threshold) | (u == threshold) & (code % 2 == 0)


def searched(u, thresholds, first):
    """Codes of reads above the lowest one, `first`, as a SAR finds them, bit after bit. Args: u [.., columns], thresholds [columns, n]."""
    code, n = np.zeros(u.shape, np.int64), thresholds.shape[-1]
    for bit in reversed(range(n.bit_length())):
        trial = code + 2**bit
        there = np.take_along_axis(np.broadcast_to(thresholds, (*u.shape, n)), np.minimum(trial, n)[..., None] - 1, axis=-1)[..., 0]
        code = np.where((trial <= n) & reached(u, there, first + trial), trial, code)
    return code


def codes_of(bits, most, delta, q_min, table, unit):
    """(thresholds in u, values in steps) of a conversion of so many of its converter's bits. Args: table, (thresholds, values) or None."""
    if bits == 0:
        return np.zeros(0), np.zeros(1)
    if table is None:
        levels = q_min + np.arange(2**bits)
        return (levels[:-1] + 0.5) * (delta / unit), levels
    thresholds, values = map(np.array, table)
    apart = 2 ** (most - bits)
    means = [values[i:i + apart].mean() for i in range(0, len(values), apart)]
    return thresholds[apart - 1::apart] * (delta / unit), np.rint(64 * np.array(means)) / 64


def by_hand(case, table=None, deviations=None, columns=1, classes=1):
    """Accumulators of a layer, int64 `[G, N, H', W', out]`. Args: table, (thresholds, values) of its codes; deviations, `f(k, bits)` in
    steps `[groups, arrays, converters, 2^bits - 1]`; columns, of a converter."""
    spec, groups, out = case.spec, case.geometry.groups, len(case.w_codes)
    planned, group_out, kernel = case.bits is not None, out // groups, case.w_codes.shape[2:]
    if case.cells is None:
        every, unit = oracle.reads(case.a_codes, case.w_codes, spec, case.geometry, case.reference_twice), spec.unit
    else:
        every, unit = oracle.cell_reads(case.a_codes, kernel, spec, case.geometry, case.cells), 2.0 ** -case.cells[2]
    of_n = oracle.classes_of(case.a_codes, kernel, spec, case.geometry, classes)
    planes = [0.0] if planned else oracle.steps(case.delta)
    total = np.zeros((len(planes), len(case.a_codes), *oracle.output_size(case.a_codes, kernel, case.geometry), out), np.int64)
    full = spec.adc_max_bits if planned else spec.adc_bits
    most = full if table is None else (len(table[1]) - 1).bit_length()
    for group, t, z, k, u in every:
        for j in range(classes):
            if spec.skips_idle and j == 0:
                continue
            delta, q_min, bits = case.delta, case.q_min, case.bits
            delta, q_min, bits = (np.array(x)[(z, k, j)[:np.ndim(x)] if planned else k] for x in (delta, q_min, bits if planned else delta))
            bits = int(bits) if planned else full
            thresholds, values = codes_of(bits, most, delta, 0 if table else int(q_min), table, unit)
            thresholds = np.broadcast_to(thresholds, (group_out, len(thresholds)))
            if deviations is not None and bits:
                own, apart = deviations(k, full)[group, t], 2 ** (full - bits)
                moved = (own / apart)[:, apart - 1::apart][:, :thresholds.shape[1]] * (delta / unit)
                thresholds = thresholds + np.repeat(moved, columns, axis=0)[:group_out]
            code = searched(u, thresholds, 0 if table else int(q_min))
            level = values[code] * (64 if table else 1) * (int(64 * delta) if planned else 1)
            place = 2 ** (spec.dac_bits * z + spec.cell_bits * k)
            plane = 0 if planned else planes.index(float(delta))
            total[plane, ..., group * group_out:(group + 1) * group_out] += (level * (of_n[group, t, z] == j) * place).astype(np.int64)
    return total


# ---- tables from files ----------------------------------------------------------------------------------------------------


TERNARY = "threshold,value\n,-1\n-0.5,0\n0.5,1\n"


def file_of(tmp_path, text, name="adc.csv"):
    (tmp_path / name).write_text(text)
    return tmp_path / name


def test_a_csv_and_a_json_say_the_same(tmp_path):
    text = json.dumps({"thresholds": [-0.5, 0.5], "values": [-1, 0, 1]})
    csv, same = (CrossbarSpec(adc_bits=2, adc_transfer=str(path))
                 for path in (file_of(tmp_path, "\ufeff" + TERNARY), file_of(tmp_path, text, "adc.json")))
    assert csv == same and csv.converter is same.converter
    assert csv == replace(csv, adc_transfer=csv.adc_transfer)  # which holds what the file said, whatever becomes of it
    assert csv.adc_transfer.split(" ", 1)[1] == "thresholds -0.5 0.5 values -1 0 1"


@pytest.mark.parametrize("text, values", [
    (TERNARY, {-9.0: -1, -0.5: -1, -0.49: 0, 0.0: 0, 0.5: 1, 9.0: 1}),  # at -0.5 begins code 1, which is odd; at 0.5 code 2
    ("threshold,value\n,-1\n0,1\n", {-0.1: -1, 0.0: -1, 0.1: 1}),
    ("threshold,value\n,0\n1,1\n4,10\n9,100\n", {0.9: 0, 1.1: 1, 3.9: 1, 4.0: 10, 9.0: 10, 9.1: 100})],
    ids=["ternary", "sign", "nonlinear"])
def test_what_a_table_makes_of_reads(tmp_path, text, values):
    bits = (text.count("\n") - 2).bit_length()
    spec = CrossbarSpec(adc_bits=bits, adc_transfer=str(file_of(tmp_path, text)))
    for delta in (1.0, 2.5):
        converter = spec.converter(delta, 0, bits)
        u = np.array(list(values)) * delta
        found = converter.decode(converter.encode(u))
        np.testing.assert_array_equal(found, delta * np.array(list(values.values())))
        assert (converter.decode(converter.encode(torch.tensor(u)).numpy()) == found).all()


BAD = {
    "no such column": ("a,b\n1,2\n", "line 1: threshold,value is expected"),
    "empty": ("", "line 1: threshold,value is expected"),
    "a long field": ("threshold,value\n," + "1" * 200_000, "is no CSV: field larger than field limit"),
    "a word": ("threshold,value\n,-1\nx,1\n", "line 3: a threshold and a value are expected, two numbers of steps"),
    "three numbers": ("threshold,value\n,-1\n0,1,2\n", "line 3: a threshold and a value are expected"),
    "a first threshold": ("threshold,value\n-1,-1\n0,1\n", "has 2 values and 2 thresholds; allowed is one threshold less than values"),
    "one code": ("threshold,value\n,1\n", "has 1 codes; allowed are 2 to 4096"),
    "falling thresholds": ("threshold,value\n,-1\n1,0\n0,1\n", "has the threshold 0 behind a larger one; thresholds do not fall"),
    "falling values": ("threshold,value\n,1\n0,-1\n", "has the value -1 behind a larger one; values do not fall"),
    "no number": ("threshold,value\n,-1\nnan,1\n", "has the threshold nan; allowed are steps below 512"),
    "far": ("threshold,value\n,-1\n0,512\n", "has the value 512; allowed are steps below 512"),
    "far when rounded": ("threshold,value\n,-1\n0,511.995\n", "has the value 511.995; allowed are steps below 512"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_gives_one_line(tmp_path, name):
    text, line = BAD[name]
    with pytest.raises(ValueError) as error:
        CrossbarSpec(adc_bits=1, adc_transfer=str(file_of(tmp_path, text)))
    assert str(error.value).startswith(f"adc_transfer is '{tmp_path}/adc.csv': {line}") and "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"thresholds": 1, "values": [0]}', '{"thresholds": ["x"], "values": [0, 1]}',
                                  '{"thresholds": [null], "values": [0, 1]}', '{"thresholds": "12", "values": "123"}', "[" * 100_000,
                                  f'{{"thresholds": [1{"0" * 400}], "values": [0, 1]}}'])
def test_a_bad_json_gives_one_line(tmp_path, text):
    with pytest.raises(ValueError, match='is not a JSON of the form {"thresholds"'):
        CrossbarSpec(adc_bits=1, adc_transfer=str(file_of(tmp_path, text, "adc.json")))


def test_files_that_are_none(tmp_path):
    for path in (tmp_path / "none.csv", tmp_path):
        with pytest.raises(ValueError, match="^adc_transfer is .*: cannot be read: "):
            CrossbarSpec(adc_transfer=str(path))
    (tmp_path / "bytes.csv").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ValueError, match="cannot be read: it is no text"):
        CrossbarSpec(adc_transfer=str(tmp_path / "bytes.csv"))


# ---- tables from code ------------------------------------------------------------------------------------------------------


def logarithmic(x):
    """+-2^k and 0: its codes begin at +-sqrt(1/2) and, geometrically half way between two values, at 2^(k + 1/2)."""
    size = 2.0 ** min(5, round(math.log2(abs(x)))) if abs(x) > 2**-0.5 else 0
    return math.copysign(size, x)


@pytest.mark.parametrize("value, bits", [
    (lambda x: max(-4, min(3, round(x))), 3), (lambda x: max(-4, min(3, math.floor(x + 0.5))), 3), (lambda x: 1 if x >= 0 else -1, 1),
    (lambda x: np.clip(np.rint(2 * x), -9, 22) / 2, 5), (logarithmic, 4), (lambda x: 511 if x > 511.5 else -511 if x < -511.5 else 0, 2)],
    ids=["half to even", "half up", "sign", "half steps", "logarithmic", "far"])
def test_a_function_gives_its_own_values(value, bits):
    """Also of reads that lie between two codes."""
    spec = CrossbarSpec(adc_bits=bits, adc_transfer=value)
    x = np.concatenate([np.arange(-520 * 16, 520 * 16) / 16, np.random.default_rng(0).normal(0, 8, 1000)])
    expected = [value(each) for each in x]
    for delta in (1.0, 0.25):
        converter = spec.converter(delta, 0, bits)
        np.testing.assert_array_equal(converter.decode(converter.encode(delta * x)), delta * np.array(expected))


def test_thresholds_of_a_function():
    """By hand, to 2^-40."""
    text = CrossbarSpec(adc_bits=4, adc_transfer=logarithmic).adc_transfer.split()
    middle = text.index("values")
    rising = [2 ** (k - 0.5) for k in range(6)]
    assert [*map(float, text[2:middle])] == pytest.approx([*(-t for t in reversed(rising)), *rising], abs=2**-39)
    assert [*map(float, text[middle + 1:])] == [-32, -16, -8, -4, -2, -1, 0, 1, 2, 4, 8, 16, 32]


def test_a_function_that_rounds_is_the_linear_converter(tmp_path):
    """The same sums of a layer, bit for bit; with another offset of the code."""
    x, layers = torch.rand(2, 40, 4, 4), [network(adc_bits=3), network(adc_bits=3, adc_transfer=lambda x: max(-4, min(3, round(x))))]
    for [layer] in layers:
        layer.adc_delta.fill_(1.5)
        layer.adc_q_min.fill_(0 if layer.spec.adc_transfer else -4)
    for engine in ("reference", "numba"):
        with set_engine(engine):
            linear, own = (net(x) for net in layers)
        assert torch.equal(linear, own) and linear.std() > 0


class Ternary:
    thresholds, values = np.array([-0.5, 0.5]), (-1, 0, 1)


class Sign:
    def __init__(self, size=2):
        self.size = size

    def __call__(self, x):
        return self.size * (1 if x > 0 else -1)


def test_what_code_may_give(tmp_path):
    of_file = CrossbarSpec(adc_bits=2, adc_transfer=file_of(tmp_path, TERNARY)).adc_transfer
    for code in (([-0.5, 0.5], [-1, 0, 1]), Ternary, Ternary(), lambda: ((-0.5, 0.5), (-1, 0, 1)), lambda: Ternary):
        assert CrossbarSpec(adc_bits=2, adc_transfer=code).adc_transfer == of_file
    for code in (Sign, Sign(), lambda: Sign(2), lambda x: Sign()(x)):
        assert CrossbarSpec(adc_bits=1, adc_transfer=code).adc_transfer.endswith(f" thresholds {0:g} values -2 2")


@pytest.mark.parametrize("code, says", [
    (3, "gives int; thresholds and values are expected, each a list of numbers, or the function of a read"),
    (lambda: None, "gives NoneType; thresholds and values are expected"), ({"a": 1}, "gives dict; thresholds and values are expected"),
    (lambda: ([1], ["a", "b"]), "gives tuple; thresholds and values are expected"), (lambda: ([1], [0, 1], []), "gives tuple; "),
    (lambda x: 1.0, "has 1 codes; allowed are 2 to 4096"), (lambda x: math.tanh(x), "has 4097 codes; allowed are 2 to 4096"),
    (lambda x: -max(-4, min(3, round(x))), "has the value 3 behind a larger one; values do not fall"),
    (lambda x: math.nan, "has the value nan"),
    (lambda x: round(x), "has the value -512; allowed are steps below 512"), (lambda x: math.log(x), "math domain error")])
def test_code_that_is_no_converter_gives_one_line(code, says):
    with pytest.raises(ValueError) as error:
        CrossbarSpec(adc_bits=1, adc_transfer=code)
    assert str(error.value).startswith("adc_transfer is ") and f": {says}" in str(error.value) and "\n" not in str(error.value)


def test_a_table_of_one_layer_is_read_at_once(tmp_path):
    """A setting with another table is another one, and the file is not needed again."""
    def setting(text):
        return Setting(CrossbarSpec(adc_bits=1), per_layer={"a": {"adc_transfer": str(file_of(tmp_path, text))}})

    texts = ["threshold,value\n,-1\n0,1\n", "threshold,value\n,-1\n0.5,1\n"]
    first, other, again = map(setting, [*texts, texts[0]])
    (tmp_path / "adc.csv").unlink()
    assert first == again != other and first.spec_of("a").adc_transfer != other.spec_of("a").adc_transfer
    assert len(str(first)) < 100
    with pytest.raises(ValueError, match="^per_layer a: adc_transfer is .*: cannot be read"):
        Setting(CrossbarSpec(adc_bits=1), per_layer={"a": {"adc_transfer": str(tmp_path / "adc.csv")}})


def test_what_does_not_go_with_a_table(tmp_path):
    path = str(file_of(tmp_path, TERNARY))
    with pytest.raises(ValueError, match="adc_bits is 3 with an adc_transfer of 3 codes; allowed are whole numbers from 1 to 2"):
        CrossbarSpec(adc_bits=3, adc_transfer=path)
    with pytest.raises(ValueError, match="adc_range is 'dynamic', which works with linear converters only"):
        CrossbarSpec(adc_bits=2, adc_transfer=path, adc_range="dynamic")


# ---- what is drawn --------------------------------------------------------------------------------------------------------


MANY = 4000


def circuits(inl=0.0, dnl=0.0, mismatch=0.0, noise=0.0, shape=(1, 1, MANY), columns=1, seed=0):
    return Circuits(inl, dnl, mismatch, noise, shape, columns, lambda k, bits: np.random.default_rng([seed, k, bits]))


def variances_are(found, wanted):
    """Of MANY normal numbers: the deviation of a variance is `sqrt(2 / n)` of it."""
    assert np.abs(found.mean(0)).max() < FIVE * np.sqrt(wanted.max() / MANY) + 1e-12
    np.testing.assert_allclose(found.var(0), wanted, rtol=FIVE * np.sqrt(2 / MANY), atol=1e-12)


@pytest.mark.parametrize("bits", [3, 4, 6])
def test_an_inl_is_a_bow_and_an_s(bits):
    """Of variance `inl^2 (sin^2 pi x + sin^2 2 pi x)` at threshold x, whose mean over codes is inl^2, and with that covariance."""
    moved, x = circuits(inl=0.7).deviations(0, bits)[0, 0], np.arange(2**bits - 1) / (2**bits - 2)
    shapes = np.sin(np.pi * np.outer([1, 2], x))
    variances_are(moved, 0.49 * (shapes**2).sum(0))
    assert np.linalg.matrix_rank(moved, tol=1e-9) == 2
    assert (moved[:, [0, -1]] == 0).all()  # they would be offset and gain
    assert (shapes**2).sum() / (2**bits - 2) == pytest.approx(1)
    covariance = np.cov(moved.T)
    assert np.abs(covariance - 0.49 * shapes.T @ shapes).max() < FIVE * 0.49 * 2 * np.sqrt(2 / MANY)


@pytest.mark.parametrize("bits", [2, 4, 6])
def test_a_dnl_is_that_of_each_code(bits):
    """Codes are wider than a step by independent numbers of variance dnl^2, less their mean: by end points."""
    moved, n = circuits(dnl=0.4).deviations(0, bits)[0, 0], 2**bits - 2
    assert np.abs(moved[:, [0, -1]]).max() < 1e-12
    variances_are(np.diff(moved, axis=1), np.full(n, 0.16 * (1 - 1 / n)))
    covariance = np.cov(np.diff(moved, axis=1).T)
    assert np.abs(covariance - 0.16 * (np.eye(n) - 1 / n)).max() < FIVE * 0.16 * np.sqrt(2 / MANY)


@pytest.mark.parametrize("bits", [3, 6])
def test_a_mismatch_is_that_of_binary_capacitors(bits):
    """Where its capacitors should be, threshold i is `i`. To first order its variance is `2^2B mismatch^2 i / 2^B (1 - i / 2^B)` over 2^B:
    i units of 2^B are switched."""
    sigma, i = 0.002, np.arange(1, 2**bits)
    moved = circuits(mismatch=sigma).deviations(0, bits)[0, 0]
    variances_are(moved, sigma**2 * i * (1 - i / 2**bits))
    at = 2 ** (bits - 1) - 1  # the step in the middle of the range switches all capacitors
    dnl = moved[:, at] - moved[:, at - 1]
    assert dnl.var() == pytest.approx(sigma**2 * (2**bits - 1), rel=0.05 + FIVE * np.sqrt(2 / MANY))


def test_parts_add_up_and_slices_differ():
    alone = [circuits(**part).deviations(1, 4) for part in ({"inl": 0.3}, {"mismatch": 0.05})]
    np.testing.assert_allclose(circuits(inl=0.3, mismatch=0.05).deviations(1, 4), sum(alone), atol=1e-12)
    assert np.abs(np.corrcoef(circuits(dnl=0.3).deviations(0, 4)[0, 0, :, 7], circuits(dnl=0.3).deviations(1, 4)[0, 0, :, 7])[0, 1]) < 0.1


def network(out=70, channels=40, **spec):
    torch.manual_seed(0)
    made = Qconv2dDoreFa(channels, out, 3, padding=1, bias=False, spec=CrossbarSpec(**{"rows": 16, "adc_bits": 4} | spec), alpha_init=1.0)
    made.eval()
    return nn.Sequential(made).eval()


def test_the_same_drawing_on_every_engine_and_batch():
    """And another one for another seed. Thresholds do not depend on which bits were asked for before."""
    net, x = network(cell_bits=2), torch.rand(5, 40, 4, 4)
    calibrate(net, x, correct=None)
    drawing = dict(adc_inl=0.3, adc_dnl=0.3, adc_mismatch=0.02, comparator_noise=0.4)
    program(net, EXACT, 3, **drawing)
    found = {}
    for name in ("reference", "numba"):
        with set_engine(name), image_numbers(0):
            found[name] = net(x)
        with set_engine(name):
            parts = []
            for first, last in ((0, 2), (2, 5)):
                with image_numbers(first):
                    parts.append(net(x[first:last]))
        assert torch.equal(torch.cat(parts), found[name])
    assert torch.equal(found["reference"], found["numba"])
    program(net, EXACT, 3, **drawing)
    with image_numbers(0):
        assert torch.equal(net(x), found["numba"])
    program(net, EXACT, 4, **drawing)
    with image_numbers(0):
        assert not torch.equal(net(x), found["numba"])


@pytest.mark.parametrize("lines, weights, columns", [
    (1, "offset", 1), (3, "offset", 3), (8, "offset", 8), (100, "offset", 100), (1, "pair", 1), (8, "pair", 4)])
def test_columns_that_share_a_converter_have_the_same_one(lines, weights, columns):
    """`lines` bit lines to a converter; a pair of them is one column of sums."""
    net = network(columns_per_adc=lines, weights=weights, cell_bits=2)
    calibrate(net, torch.rand(2, 40, 4, 4), correct=None)
    program(net, EXACT, 1, adc_inl=0.3, adc_dnl=0.3, adc_offset=0.5, adc_gain=0.02)
    mapped = net[0].mapped()
    converters = -(-70 // columns)
    for k in range(2):
        thresholds = mapped.thresholds(0, k)
        assert thresholds.shape == (1, len(mapped.arrays), 70, 15)
        for part in (thresholds, mapped.readout.gain[k].numpy(), mapped.readout.offset[k].numpy()):
            for first in range(0, 70, columns):
                assert (part[:, :, first:first + columns] == part[:, :, first:first + 1]).all()
        assert len(np.unique(thresholds.reshape(-1, 15), axis=0)) == len(mapped.arrays) * converters
        assert len(mapped.readout.gain[k].unique()) == len(mapped.arrays) * converters


def test_a_chip_of_other_sharing_is_dropped():
    """Programmed cells stay where thresholds do, and not where other columns share a converter."""
    net = network()
    for drawing in ({"adc_inl": 0.3}, {"comparator_noise": 0.3}, {"adc_gain": 0.1}, {}):
        program(net, EXACT, 1, **drawing)
        set_spec(net, replace(net[0].spec, adc_bits=net[0].spec.adc_bits % 5 + 1))
        assert net[0].chip is not None
        set_spec(net, replace(net[0].spec, columns_per_adc=(net[0].spec.columns_per_adc or 0) + 1))
        assert (net[0].chip is None) == bool(drawing)


# ---- reads by engines -----------------------------------------------------------------------------------------------------


@st.composite
def tables(draw):
    """(thresholds, values) of a converter of 2 to 40 codes: signs, ternary ones, any."""
    kind = draw(st.sampled_from(["sign", "ternary", "any", "any", "ties"]))
    if kind == "sign":
        return [0.0], [-1.0, 1.0]
    if kind == "ternary":
        return [-0.5, 0.5], [-1.0, 0.0, 1.0]
    n, rng = draw(st.integers(2, 40)), np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    thresholds = rng.integers(-8, 9, n - 1) / 2 if kind == "ties" else rng.uniform(-n / 2, n / 2, n - 1).round(3)
    return sorted(thresholds.tolist()), sorted((rng.integers(-64 * n, 64 * n, n) / 64).tolist())


def text_of(table):
    parts = (" ".join(f"{number:.17g}" for number in numbers) for numbers in table)
    return "00000000 thresholds {} values {}".format(*parts)


def with_table(case, table):
    most = (len(table[1]) - 1).bit_length()
    bits = {name: min(getattr(case.spec, name), most) for name in ("adc_bits", "adc_max_bits")}
    spec = replace(case.spec, **bits, adc_transfer=text_of(table))
    bits = None if case.bits is None else np.minimum(case.bits, most).tolist()
    return replace(case, spec=spec, bits=bits, q_min=(0 * np.array(case.q_min)).tolist())


def with_circuits(case, columns, seed, **deviations):
    """(layer, `f(k, bits)`) of a case whose converters are drawn."""
    spec = replace(case.spec, columns_per_adc=columns)
    layer = replace(case, spec=spec).layer()
    shape = layer.geometry.groups, len(layer.arrays), -(-len(layer.w_codes) // layer.geometry.groups // columns)
    drawn = circuits(**deviations, shape=shape, columns=columns, seed=seed)
    return replace(layer, readout=Readout(circuits=drawn)), drawn.deviations


def assert_engines_give(layer, a_codes, wanted):
    for name in ("reference", "numba"):
        engine = engines.load(name)
        if reason := engine.unsupported(layer, CPU):
            assert name == "numba" and reason == "codes or reads that 32 bits do not hold" and float(layer.adc_delta.max()) > 64
            continue
        prepared = engine.prepare(layer)
        ways = {name: functools.partial(engine.accumulate, prepared)}
        if isinstance(prepared, cells.Prepared) and prepared.tree_kernel:
            ways |= {"trees": functools.partial(prepared.by_columns, op=prepared.tree_kernel)}
        if isinstance(prepared, cells.Prepared) and has_byte_tables() and prepared._side_by_side._may_run:
            pixels = prepared._side_by_side
            ways |= {} if pixels._layout is None else {"side by side": functools.partial(pixels.simulate, dtype=prepared.dtype)}
        for way, run in ways.items():
            found = run(torch.from_numpy(a_codes))
            assert found.dtype == engines.accumulator_dtype(layer)
            np.testing.assert_array_equal(found.numpy(), wanted, err_msg=way)


RANGES = ["calibrated", "full"]
SMALL = dict(adc_ranges=RANGES, rows=[3, 16, 33, 128], bits=(1, 5))


@given(case=cases(**SMALL) | grid_cases(kinds=["near", "levels", "negative"], **SMALL), table=tables(), skip=st.booleans())
@settings(max_examples=60)
def test_tables_on_every_engine(case, table, skip):
    case.spec = replace(case.spec, adc_idle="skip" if skip else "convert")
    case = with_table(case, table)
    layer = case.layer()
    assert_engines_give(layer, case.a_codes, by_hand(case, table, classes=layer.classes))


@given(case=cases(**SMALL) | grid_cases(kinds=["near", "levels", "negative"], **SMALL), table=st.none() | tables(), skip=st.booleans(),
       columns=st.sampled_from([1, 1, 2, 7, 64]), size=st.sampled_from([0.1, 0.5, 3.0]), seed=st.integers(0, 2**31))
@settings(max_examples=60)
def test_drawn_thresholds_on_every_engine(case, table, skip, columns, size, seed):
    """Up to deviations for which codes are missing."""
    case.spec = replace(case.spec, adc_idle="skip" if skip else "convert", adc_bits=min(case.spec.adc_bits, 8))
    case = case if table is None else with_table(case, table)
    layer, deviations = with_circuits(case, columns, seed, inl=size, dnl=size, mismatch=size / 8)
    assert_engines_give(layer, case.a_codes, by_hand(case, table, deviations, columns, layer.classes))


@given(case=cases(planned="significance", **SMALL) | cases(planned="ones", **SMALL), table=st.none() | tables(),
       columns=st.sampled_from([1, 3]), size=st.sampled_from([0.0, 0.5]), seed=st.integers(0, 2**31))
@settings(max_examples=40)
def test_plans_on_every_engine(case, table, columns, size, seed):
    """Conversions that stop early have every 2^s-th threshold, and their means of values."""
    bits, spec = np.minimum(case.bits, 8), replace(case.spec, adc_bits=1, adc_max_bits=8)
    case = replace(case, spec=spec, bits=bits.tolist(), delta=np.minimum(case.delta, 2**9).tolist(),
                   q_min=np.maximum(case.q_min, 1 - 2**bits).tolist())
    case = case if table is None else with_table(case, table)
    layer, deviations = with_circuits(case, columns, seed, inl=size, dnl=size)
    if not size:
        layer = replace(layer, readout=None)
    wanted = by_hand(case, table, deviations if size else None, columns, layer.classes)
    assert_engines_give(layer, case.a_codes, wanted)


@pytest.mark.parametrize("table", [None, ([-0.5, 0.5], [-1.0, 0.0, 1.0])], ids=["linear", "ternary"])
@pytest.mark.parametrize("chip", [None, "all", "offsets"])
@pytest.mark.parametrize("hardware", [dict(), dict(mapping="im2col", cell_bits=4), dict(reference="digital", cell_bits=2),
                                      dict(weights="pair", cell_bits=2), dict(weights="pair", mapping="im2col", adc_idle="skip"),
                                      dict(adc_plan="significance", adc_bits=2, adc_max_bits=4, cell_bits=2), dict(dac_bits=2, adc_bits=8)])
def test_numba_is_the_reference_engine(tmp_path, hardware, chip, table):
    """On all hardware, ideal cells and those of a chip, with all that converters have at once, or offsets alone."""
    spec = dict(hardware)
    if table is not None:
        (tmp_path / "table.json").write_text(json.dumps(dict(zip(("thresholds", "values"), table))))
        spec |= dict(adc_transfer=str(tmp_path / "table.json"))
        spec |= dict(adc_max_bits=2) if "adc_plan" in spec else dict(adc_bits=2)
    net, x = network(20 if chip == "offsets" else 70, columns_per_adc=2, **spec), torch.rand(2, 40, 5, 6)  # 20: pixels side by side
    besides = {"offsets": dict(adc_offset=0.2), "all": dict(adc_inl=0.3, adc_dnl=0.3, adc_mismatch=0.02, comparator_noise=0.3,
                                                            adc_offset=0.2, adc_gain=0.02, read_noise=0.3)}
    if chip:
        program(net, Device.preset("techC") if hardware.get("cell_bits", 1) == 1 else EXACT, 2, **besides[chip])
    calibrate(net, x, correct=None, on="chip" if hardware.get("reference") == "digital" and chip else "nominal")
    mapped, codes = net[0].mapped(), net[0].a_codes(x)
    assert mapped.compares == bool(chip == "all" or table)
    found = [engines.load(name).accumulate(engines.load(name).prepare(mapped), codes) for name in ("reference", "numba")]
    prepared = cpu.prepare(mapped)
    if isinstance(prepared, cells.Prepared) and prepared.tree_kernel:
        assert torch.equal(found[0], prepared.by_columns(codes, op=prepared.tree_kernel))
    assert torch.equal(*found) and len(found[0].unique()) > 20


PLANNED = dict(adc_plan="significance", adc_bits=3, adc_max_bits=6)


@pytest.mark.parametrize("kernel, hardware", [
    (COMPARED_TREES, dict()), (COMPARED_TREES, dict(adc_bits=8, cell_bits=1)), (COMPARED_TREES, PLANNED),
    (COMPARED_TREES, dict(adc_idle="skip")),
    (COMPARED_WIDE_TREES, dict(weights="pair")), (COMPARED_WIDE_TREES, dict(weights="pair", **PLANNED)),
    (COMPARED_WIDE_TREES, dict(weights="pair", mapping="im2col", rows=256, adc_bits=8, cell_bits=1))])
@pytest.mark.parametrize("besides", [dict(), dict(adc_dnl=0.3, comparator_noise=0.3, adc_offset=0.2, adc_gain=0.02, read_noise=0.3)])
@pytest.mark.parametrize("inl", [0.2, 4.0])
def test_trees_of_thresholds(kernel, hardware, besides, inl):
    """Of several tiles of columns, the last of them not full, with more reads than are turned at once, idle ones among them."""
    net = network(150, 128, **{"rows": 128, "cell_bits": 2, "adc_bits": 6, **hardware})
    x = torch.rand(2, 128, 4, 5)
    x[0, :, :2] = x[:, 60:, 3:] = 0
    program(net, Device.preset("ideal"), 2, adc_inl=inl, **besides)
    calibrate(net, x, correct=None)
    prepared, codes = cpu.prepare(net[0].mapped()), net[0].a_codes(x)
    assert prepared.tree_kernel == (kernel if has_byte_tables() else None)
    wanted = reference.accumulate(reference.prepare(net[0].mapped()), codes)
    assert torch.equal(prepared.by_columns(codes, op=prepared.tree_kernel), wanted)
    with without(SHORT_ROWS):
        assert torch.equal(cpu.prepare(net[0].mapped()).by_columns(codes), wanted)


def test_thresholds_that_no_read_reaches():
    """Ranges far beyond the reads, and reads far beyond the range."""
    for delta in (1e-9, 1e9):
        case = replace(usual_case(), delta=[delta] * 2)
        layer, deviations = with_circuits(case, 1, 0, inl=0.5, dnl=0.5)
        assert_engines_give(layer, case.a_codes, by_hand(case, None, deviations))


def test_codes_whose_sums_32_bits_do_not_hold():
    """All inputs and weights at their largest, in five arrays of 64 rows, and a table that makes two steps of each level."""
    a_codes, w_codes = (np.full(shape, 255, np.uint8) for shape in ((64, 1, 1, 320), (3, 320, 1, 1)))
    case = Case(CrossbarSpec(8, 8, 1, 8, 64, reference="digital"), Geometry(), a_codes, w_codes, [1.0] * 8, [0] * 8)
    table = (np.arange(255) + 0.5).tolist(), (2.0 * np.arange(256)).tolist()
    case.cells = random_cells("levels", case, np.random.default_rng(0))
    case = with_table(case, table)
    layer = case.layer()
    wanted = by_hand(case, table)
    assert np.abs(wanted).max() >= 2**31 and cpu.prepare(layer)._side_by_side._layout is None
    assert_engines_give(layer, a_codes, wanted)


def usual_case():
    spec, rng = CrossbarSpec(4, 4, 2, 5, 32), np.random.default_rng(0)
    a_codes, w_codes = (rng.integers(0, 16, shape, dtype=np.uint8) for shape in ((2, 3, 4, 40), (9, 40, 2, 3)))
    return Case(spec, Geometry(), a_codes, w_codes, [1.0, 1.0], [-16, -16])


# ---- noise of comparators -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sigma, steps", [(0.25, 1.0), (1.0, 0.5)])
def test_a_comparators_noise_is_in_steps(sigma, steps):
    """A read that lies in the middle of a code leaves it as often as a normal number of this deviation reaches its threshold."""
    layer = QLinearDoreFa(32, 64, bias=False, spec=CrossbarSpec(4, 4, 4, 6, 32), alpha_init=1.0).eval()
    net = nn.Sequential(layer).eval()
    program(net, EXACT, 0, comparator_noise=sigma)
    layer.set_ranges([(steps, -32)])
    mapped, images = layer.mapped(), 2000
    codes = torch.randint(0, 16, (1, 1, 1, 32), generator=torch.Generator().manual_seed(1), dtype=torch.uint8).repeat(images, 1, 1, 1)
    still = replace(mapped, readout=None)
    for (z, k, u, _), (_, _, noisy, _) in zip(reference.reads(still, codes), reference.reads(mapped, codes)):
        off = (noisy - u).double() * mapped.unit / steps
        n = off.numel()
        assert float(off.var()) == pytest.approx(sigma**2, rel=FIVE * np.sqrt(2 / n) + 1e-3)
        assert abs(float(off.mean())) < FIVE * sigma / n**0.5
        q, base = mapped.converter(z, k).encode(noisy, mapped.unit), mapped.converter(z, k).encode(u, mapped.unit)
        x = u.double() * mapped.unit / steps
        stays = stats.norm.cdf((base + 0.5 - x) / sigma) - stats.norm.cdf((base - 0.5 - x) / sigma)
        inside = (base > -32) & (base < 31)
        share, wanted = float((q == base)[inside].double().mean()), float(stays[inside.numpy()].mean())
        assert share == pytest.approx(wanted, abs=FIVE * 0.5 / n**0.5 + 0.01)


def test_a_comparators_noise_follows_the_step_of_its_conversion():
    case = usual_case()
    case.delta = [1.0, 3.0]
    layer, _ = with_circuits(case, 1, 0, noise=0.5)
    np.testing.assert_allclose(layer.base_noise[0, :, 0].numpy(), [(0.5 * delta / layer.unit) ** 2 for delta in case.delta])


# ---- who cannot -----------------------------------------------------------------------------------------------------------


def test_triton_refuses_thresholds():
    triton_gpu = pytest.importorskip("models.quant.engines.gpu.triton_gpu") if not interpreter.GPU else interpreter.load()
    case, gpu = usual_case(), torch.device("cuda")
    case.cells = random_cells("near", case, np.random.default_rng(0))
    line = "it has linear converters only, and no thresholds"
    layer, _ = with_circuits(case, 1, 0, inl=0.5)
    assert triton_gpu.unsupported(layer, gpu) == line
    assert triton_gpu.unsupported(with_table(usual_case(), ([0.0], [-1.0, 1.0])).layer(), gpu) == line


def test_thresholds_that_memory_does_not_hold_are_refused(monkeypatch):
    layer, _ = with_circuits(usual_case(), 1, 0, inl=0.5)
    assert cpu.unsupported(layer, CPU) is None
    monkeypatch.setattr(cells_thresholds, "MOST_BYTES", 2**10)
    assert "the thresholds of its converters take" in cpu.unsupported(layer, CPU)


@pytest.mark.parametrize("drawing", ["adc_inl", "adc_dnl", "adc_mismatch", "comparator_noise"])
def test_ranges_of_the_batch_have_no_thresholds(drawing):
    net, x = network(adc_range="dynamic"), torch.rand(1, 40, 4, 4)
    with pytest.raises(ValueError, match=f"^{drawing} is 0.3 with adc_range 'dynamic', whose steps are others in each batch; allowed are"):
        program(net, EXACT, 0, **{drawing: 0.3})
    with pytest.raises(ValueError, match=f"^{drawing} is 0.3 with adc_range 'dynamic'"):
        Chips(device=EXACT, **{drawing: 0.3}).check(net[0])
    set_spec(net, replace(net[0].spec, adc_range="full"))
    program(net, EXACT, 0, **{drawing: 0.3})
    net(x)
    set_spec(net, replace(net[0].spec, adc_range="dynamic"))
    with pytest.raises(ValueError, match="^adc_range is 'dynamic' on a chip whose converters have thresholds or noise in steps"):
        net(x)


@pytest.mark.parametrize("seed", range(30))
def test_the_step_of_a_table_is_that_of_least_error(seed):
    """Of all that are tried, with many reads on thresholds: against each read converted by itself."""
    rng = np.random.default_rng(seed)
    codes = int(rng.integers(3, 9))
    table = np.sort(rng.integers(-8, 9, codes - 1)) / 4, np.sort(rng.integers(-16, 17, codes)) / 8
    v = np.unique(rng.integers(-6, 7, 6)).astype(float)
    share, kind, bits = rng.random(len(v)), transfer.kind(text_of(table)), (codes - 1).bit_length()
    error, step, _ = adc.least_of_table(_Shares(v, share, kind), 2.0, bits)

    def by_reads(step):
        level = v[:, None] / step
        reached_ = reached(level, table[0], np.arange(1, codes))
        code = np.where(reached_, np.arange(1, codes), 0).max(1)
        return share @ (step * table[1][code] - v)**2

    assert error == pytest.approx(by_reads(step), abs=1e-9)
    assert error <= min(map(by_reads, np.arange(1, 257) / 64)) + 1e-9


def test_the_report_of_a_table(tmp_path):
    """Its curve over bits ends where the table does."""
    net, x = network(adc_bits=2, adc_transfer=str(file_of(tmp_path, TERNARY))), torch.rand(2, 40, 4, 4)
    histograms = calibrate(net, x)
    [entry] = diagnostics.report(net, x, histograms)
    assert [*entry["sqnr_over_adc_bits"]] == [2]


def test_tables_are_kept_with_a_network(tmp_path):
    net = network(adc_bits=2, adc_transfer=str(file_of(tmp_path, TERNARY)))
    x = torch.rand(2, 40, 4, 4)
    calibrate(net, x, correct=None)
    save(net, tmp_path / "net.pt")
    (tmp_path / "adc.csv").unlink()
    other = load(tmp_path / "net.pt", network(adc_bits=2))
    assert torch.equal(other(x), net(x)) and transfer.table_of(other[0].spec.adc_transfer) is other[0].spec.adc_transfer


def test_counts_of_ideal_cells_behind_a_table_stand_in_the_layers_bins():
    spec = CrossbarSpec(4, 4, 2, 1, rows=16, adc_transfer=text_of(([-0.5, 0.5], [-1, 0, 1])))
    layer = MappedLayer(spec, Geometry(), torch.full((4, 16, 1, 1), 6, dtype=torch.uint8), (3, 3), torch.ones(2, dtype=torch.float64),
                        torch.zeros(2, dtype=torch.int64))
    codes = torch.ones(1, 4, 4, 16, dtype=torch.uint8)
    assert torch.equal(cpu.histogram(cpu.prepare(layer), codes), reference.histogram(layer, codes))
