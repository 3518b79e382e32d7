"""Hardware settings and how rows are cut into arrays."""

import itertools
from dataclasses import FrozenInstanceError, field, fields, make_dataclass, replace

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import cases

from models.quant import Calibration, CrossbarSpec
from models.quant.arrays.cells import Cells
from models.quant.arrays.converter import Converter
from models.quant.arrays.mapping import MappedLayer, array_bounds
from models.quant.arrays.spec import Geometry, check

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("field, value, allowed", [
    ("w_bits", 0, "1 to 8"), ("w_bits", 9, "1 to 8"), ("w_bits", 32, "1 to 8"), ("w_bits", 4.0, "1 to 8"),
    ("w_bits", True, "1 to 8"), ("w_bits", "4", "1 to 8"), ("w_bits", None, "1 to 8"),
    ("a_bits", 0, "1 to 8"), ("a_bits", 9, "1 to 8"),
    ("cell_bits", 0, r"1 to 4 \(w_bits\)"), ("cell_bits", 5, r"1 to 4 \(w_bits\)"),
    ("dac_bits", 0, r"1 to 4 \(a_bits\)"), ("dac_bits", 5, r"1 to 4 \(a_bits\)"),
    ("adc_bits", 0, "1 to 12"), ("adc_bits", 13, "1 to 12"), ("rows", 0, "1 to 1024"), ("rows", 1025, "1 to 1024"),
    ("rows", 127.5, "1 to 1024"), ("mapping", "taps", "tap, im2col"), ("mapping", None, "tap, im2col"),
    ("reference", "", "analog, digital"), ("adc_range", "auto", "calibrated, full, dynamic, ideal")])
def test_spec_says_what_is_allowed(field, value, allowed):
    with pytest.raises(ValueError, match=f"^{field} is {value!r}; allowed are .*{allowed}$"):
        CrossbarSpec(**{field: value})


def test_spec_is_frozen_and_checked_when_replaced():
    spec = CrossbarSpec()
    with pytest.raises(FrozenInstanceError):
        spec.rows = 4
    with pytest.raises(ValueError, match="cell_bits is 4"):
        replace(replace(spec, cell_bits=4), w_bits=3)
    assert (spec.w_bits, spec.a_bits, spec.cell_bits, spec.adc_bits, spec.rows) == (4, 4, 1, 6, 128)
    assert (spec.mapping, spec.reference, spec.dac_bits, spec.adc_range) == ("tap", "analog", 1, "calibrated")


@pytest.mark.parametrize("settings", [CrossbarSpec, Calibration])
def test_every_field_says_what_it_is_and_what_it_may_be(settings):
    """Flags are made of this: one line of help, and the words or the largest number that are allowed."""
    for item in fields(settings):
        assert item.metadata["help"].endswith(".") and "\n" not in item.metadata["help"], item.name
        assert len({"allowed", "most", "fractions", "numbers", "kind"} & item.metadata.keys()) == 1, item.name
        if "allowed" in item.metadata:
            assert item.default in item.metadata["allowed"]
        elif "most" in item.metadata:
            assert item.metadata["most"] in (8, 12, 1024, "w_bits", "a_bits")


def test_settings_are_checked_by_the_metadata_of_their_fields():
    """Not by a list of names kept elsewhere."""
    kind = make_dataclass("Kind", [("size", int, field(default=1, metadata={"most": 3})),
                                   ("part", int, field(default=1, metadata={"most": "size"})),
                                   ("word", str, field(default="a", metadata={"allowed": ("a", "b")}))])
    check(kind(3, 3, "b"))
    for wrong, message in ((kind(4), "size is 4; allowed are whole numbers from 1 to 3$"), (kind(word="c"), "word is 'c'.*a, b$"),
                           (kind(2, 3), r"part is 3; allowed are whole numbers from 1 to 2 \(size\)$")):
        with pytest.raises(ValueError, match=message):
            check(wrong)


@given(case=cases(planned=True))
@settings(max_examples=50)
def test_planned_layer_facts(case):
    """The ADC of each kind of read, what its codes are worth, and one plane for all of them."""
    layer = case.layer()
    for z, k in np.ndindex(len(case.spec.digit_bits), len(case.spec.slice_bits)):
        assert layer.converter(z, k) == Converter(case.delta[z][k], case.q_min[z][k], case.bits[z][k], int(64 * case.delta[z][k]))
    assert layer.delta_groups == [(1 / 64, list(range(len(case.spec.slice_bits))))]
    ideal = replace(layer, spec=replace(case.spec, adc_range="ideal", adc_bits=1.5))
    assert not ideal.spec.planned and ideal.converter(0, 0).factor == 1


def test_ranges_of_slices_serve_all_digits():
    spec = CrossbarSpec(adc_bits=5)
    layer = MappedLayer(spec, Geometry(), torch.zeros(1, 5, 1, 1, dtype=torch.uint8), (1,) * 4, torch.tensor([1.0, 2.5, 1.0, 0.3]),
                        torch.tensor([-3, -1, 0, -9]))
    assert [layer.converter(z, 1) for z in range(4)] == [Converter(2.5, -1, 5, 1)] * 4


@pytest.mark.parametrize("bits, size, parts", [(4, 3, (3, 1)), (4, 1, (1, 1, 1, 1)), (4, 2, (2, 2)), (4, 4, (4,)),
                                               (8, 3, (3, 3, 2)), (5, 2, (2, 2, 1)), (1, 1, (1,)), (7, 4, (4, 3))])
def test_slices_and_digits(bits, size, parts):
    spec = CrossbarSpec(w_bits=bits, a_bits=bits, cell_bits=size, dac_bits=size)
    assert spec.slice_bits == spec.digit_bits == parts


@pytest.mark.parametrize("mapping, taps, channels, rows, bounds", [
    ("tap", 1, 128, 128, [(0, 128)]), ("tap", 1, 129, 128, [(0, 128), (128, 129)]),
    ("tap", 3, 5, 4, [(0, 4), (4, 5), (5, 9), (9, 10), (10, 14), (14, 15)]),
    ("im2col", 3, 5, 4, [(0, 4), (4, 8), (8, 12), (12, 15)]), ("im2col", 9, 3, 128, [(0, 27)]),
    ("tap", 9, 3, 128, [(3 * tap, 3 * tap + 3) for tap in range(9)])])
def test_arrays(mapping, taps, channels, rows, bounds):
    assert array_bounds(mapping, taps, channels, rows) == bounds


@given(mapping=st.sampled_from(["tap", "im2col"]), kernel=st.tuples(st.integers(1, 5), st.integers(1, 5)),
       channels=st.integers(1, 300), rows=st.integers(1, 400))
def test_arrays_hold_each_row_once(mapping, kernel, channels, rows):
    kh, kw = kernel
    lines = [(ky, kx, c) for ky in range(kh) for kx in range(kw) for c in range(channels)]
    bounds = array_bounds(mapping, kh * kw, channels, rows)
    assert [lines[start:stop] for start, stop in bounds] == oracle.arrays(mapping, kernel, channels, rows)
    assert list(itertools.chain(*(range(*b) for b in bounds))) == list(range(len(lines)))
    assert max(stop - start for start, stop in bounds) <= rows


@given(case=cases())
def test_layer_facts(case):
    """Output size, row order and the range of reads against the oracle."""
    layer = case.layer()
    assert layer.geometry.output_size(*case.a_codes.shape[1:3], layer.kernel) == oracle.output_size(
        case.a_codes, case.w_codes.shape[2:], case.geometry)
    rows = layer.w_rows
    out, channels, kh, kw = case.w_codes.shape
    group_out = out // case.geometry.groups
    for o, c, y, x in [(0, 0, 0, 0), (out - 1, channels - 1, kh - 1, kw - 1), (out // 2, channels // 2, kh // 2, 0)]:
        row = (y * kw + x) * channels + c
        assert rows[o // group_out, row, o % group_out] == case.w_codes[o, c, y, x]
    assert layer.u_span == oracle.u_span(case.w_codes, case.spec, case.reference_twice)
    assert layer.zero_twice == (2**case.spec.w_bits - 1 if case.zero_code is None else 2 * case.zero_code)
    for k in range(len(case.spec.slice_bits)):
        low, high = layer.u_range(k)
        assert not (high - low) % layer.u_spacing(k)


@pytest.mark.parametrize("reference", ["analog", "digital"])
@pytest.mark.parametrize("cell_bits, dac_bits", [(1, 1), (2, 1), (1, 2), (3, 2)])
def test_range_of_reads_is_tight(reference, cell_bits, dac_bits):
    """Every read of every input and weight on two rows, by brute force."""
    spec = CrossbarSpec(cell_bits, dac_bits, cell_bits, rows=2, reference=reference, dac_bits=dac_bits)
    r = 2**cell_bits - 1
    found = set()
    for a in itertools.product(range(2**dac_bits), repeat=2):
        for c in itertools.product(range(2**cell_bits), repeat=2):
            p, n = np.dot(a, c), sum(a)
            found.add(int(2 * p - r * n if reference == "analog" else p))
    layer = MappedLayer(spec, Geometry(), torch.zeros(1, 5, 1, 1, dtype=torch.uint8), (r,), torch.zeros(1),
                        torch.zeros(1))
    assert layer.u_range(0) == layer.u_span == (min(found), max(found))
    assert layer.u_spacing(0) == 1 and np.gcd.reduce(sorted(found)) == 1
    if reference == "analog":  # whole cells in the reference column
        whole = MappedLayer(spec, Geometry(), layer.w_codes, (2 * (r // 2),), torch.zeros(1), torch.zeros(1))
        assert whole.u_spacing(0) == 2


def test_range_of_the_reads_of_cells():
    """Cells of any value, behind the largest digit of an input; their whole references do not make reads even."""
    spec, rng = CrossbarSpec(4, 4, 3, rows=3, dac_bits=3), np.random.default_rng(0)  # digits and slices of 3 bits and of 1
    values, reference = (torch.from_numpy(rng.integers(-9, 10, shape, dtype=np.int32)) for shape in ((2, 1, 5, 2), (2, 1, 5)))
    layer = MappedLayer(spec, Geometry(), torch.zeros(2, 5, 1, 1, dtype=torch.uint8), (2, 2), torch.zeros(2), torch.zeros(2),
                        cells=Cells(values, reference, 0))
    weights, inputs = (values - reference[..., None]).numpy(), np.array(list(itertools.product(range(8), repeat=3)))
    for k in range(2):
        found = np.concatenate([inputs @ weights[k, 0, :3], inputs[:, :2] @ weights[k, 0, 3:]])
        assert layer.u_range(k) == (found.min(), found.max()) and layer.u_spacing(k) == 1
    assert replace(layer, cells=None).largest_sum == 3 * 7 * 7


@pytest.mark.parametrize("size, kernel, stride, padding, dilation", [
    ((7, 9), (3, 3), (1, 1), (1, 1), (1, 1)), ((8, 5), (5, 2), (2, 1), (2, 0), (1, 2)),
    ((6, 6), (1, 3), (3, 2), (0, 1), (2, 2))])
def test_output_size_is_that_of_pytorch(size, kernel, stride, padding, dilation):
    (ph, pw), x = padding, torch.zeros(1, 1, *size)
    wanted = torch.nn.functional.conv2d(x, torch.zeros(1, 1, *kernel), None, stride, padding, dilation).shape[2:]
    assert Geometry(stride, (ph, ph, pw, pw), dilation).output_size(*size, kernel) == tuple(wanted)
