"""Random crossbar layers for hypothesis: the structure is drawn (and shrinks), the codes come from a drawn seed."""

from dataclasses import dataclass, replace

import numpy as np
import torch
from hypothesis import strategies as st

from models.quant.arrays.cells import Cells
from models.quant.arrays.mapping import MappedLayer, array_bounds
from models.quant.arrays.spec import ADC_RANGES, MAPPINGS, REFERENCES, CrossbarSpec, Geometry

KERNELS = [(1, 1), (3, 3), (1, 3), (5, 5), (2, 2), (3, 1), (4, 3)]
ROWS = [1, 2, 3, 5, 8, 16, 31, 32, 33, 64, 65, 100, 128, 1024]
ACTIVATIONS = ["dense", "sparse", "one", "zeros", "ones", "powers"]
WEIGHTS = ["dense", "zeros", "ones"]
CELLS = ["near", "near", "wide", "negative", "levels", "zeros", "constant"]
STEPS = ["unit", "one", "two", "tiny", "huge", "odd", "mixed"]


@dataclass
class Case:
    """One layer and its input, as the package and as the oracle take them."""

    spec: CrossbarSpec
    geometry: Geometry
    a_codes: np.ndarray
    w_codes: np.ndarray
    delta: list
    q_min: list
    bits: list | None = None  # of a plan, whose delta, q_min and bits are lists of slices for each digit, by ones of classes for each
    zero_code: int | None = None  # that of SAWB, whose digits the reference column holds; None for DoReFa's half-scale cells
    cells: tuple | None = None  # (values, reference, F) of cells on a grid, int32 arrays

    @property
    def reference_twice(self):
        if self.zero_code is None:
            return [2**bits - 1 for bits in self.spec.slice_bits]
        return [2 * (self.zero_code >> self.spec.cell_bits * k & 2**bits - 1) for k, bits in enumerate(self.spec.slice_bits)]

    def layer(self):
        return MappedLayer(self.spec, self.geometry, torch.from_numpy(self.w_codes), tuple(self.reference_twice),
                           torch.tensor(self.delta, dtype=torch.float64), torch.tensor(self.q_min),
                           None if self.bits is None else torch.tensor(self.bits), self.cells and Cells(
                               torch.from_numpy(self.cells[0]), torch.from_numpy(self.cells[1]), self.cells[2]))

    def input(self):
        return torch.from_numpy(self.a_codes)


@st.composite
def specs(draw, adc_ranges=ADC_RANGES, rows=ROWS, adc_plan="uniform", bits=(1, 8)):
    w_bits, a_bits = draw(st.integers(*bits)), draw(st.integers(*bits))
    return CrossbarSpec(
        adc_plan=adc_plan, adc_max_bits=12,
        w_bits=w_bits, a_bits=a_bits, cell_bits=draw(st.integers(1, w_bits)), adc_bits=draw(st.integers(1, 12)),
        rows=draw(st.sampled_from(rows)), mapping=draw(st.sampled_from(MAPPINGS)),
        reference=draw(st.sampled_from(REFERENCES)), dac_bits=draw(st.sampled_from([1, 1, 2, a_bits]).map(
            lambda d: min(d, a_bits))), adc_range=draw(st.sampled_from(adc_ranges)))


def codes(kind, bits, shape, rng):
    """Activation or weight codes of one kind, uint8."""
    top = 2**bits - 1
    if kind == "dense":
        return rng.integers(0, top + 1, shape, dtype=np.uint8)
    if kind == "sparse":
        return (rng.integers(0, top + 1, shape) * (rng.random(shape) < 0.1)).astype(np.uint8)
    if kind == "powers":  # single input bits, some above others only
        return (2 ** rng.integers(0, bits, shape) * (rng.random(shape) < 0.5)).astype(np.uint8)
    found = np.full(shape, top if kind == "ones" else 0, np.uint8)
    if kind == "one":
        found.flat[rng.integers(found.size)] = top
    return found


@st.composite
def ranges(draw, spec):
    """`(delta, q_min)` of each slice, awkward ones on purpose."""
    slices, unit, last = len(spec.slice_bits), spec.unit, 2**spec.adc_bits - 1
    kind = draw(st.sampled_from(STEPS))
    fixed = {"unit": unit, "one": 1.0, "two": 2.0, "tiny": 1e-9, "huge": 1e9}
    odd = st.floats(0.05, 40.0)
    if kind in fixed:
        delta = [fixed[kind]] * slices
    elif kind == "odd":
        delta = [draw(odd)] * slices
    else:
        delta = draw(st.lists(st.one_of(odd, st.sampled_from([unit, 1.0])), min_size=slices, max_size=slices))
    q_min = draw(st.lists(st.sampled_from([0, -last, -(last // 2), -(last // 2) - 1]) | st.integers(-last, 0),
                          min_size=slices, max_size=slices))
    return delta, q_min


@st.composite
def plans(draw, spec, kernel=(1, 1), channels=1):
    """`(delta, q_min, bits)` of each digit and slice, by ones of each class, steps being multiples of 1/64; whole digits and slices without
    bits."""
    tallest = max(stop - start for start, stop in array_bounds(spec.mapping, kernel[0] * kernel[1], channels, spec.rows))
    shape = len(spec.digit_bits), len(spec.slice_bits), *([spec.classes(tallest)] if spec.classes(tallest) > 2 else [])
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    most = draw(st.sampled_from([8, 3, 12, 5, 1, 0]))
    bits = rng.integers(0, most + 1, shape)
    if shape[0] > 1 and draw(st.booleans()):
        bits[rng.integers(shape[0])] = 0
    if shape[1] > 1 and draw(st.integers(0, 3)) == 3:
        bits[:, rng.integers(shape[1])] = 0
    if draw(st.booleans()):
        bits[:] = bits[:, :1]  # neighbours with one range share a run
    kind = draw(st.sampled_from(["unit", "small", "any", "any", "huge", "mixed"]))
    steps = {"unit": np.full(shape, 64 * spec.unit), "small": rng.integers(1, 65, shape), "any": rng.integers(1, 2561, shape),
             "huge": rng.integers(2**16, 2**30, shape)}
    steps["mixed"] = np.where(rng.random(shape) < 0.5, steps["unit"], 64 * rng.integers(1, 9, shape))
    size = steps[kind] if draw(st.booleans()) else np.broadcast_to(steps[kind][:, :1], shape)
    last = 2**bits - 1
    q_min = {"zero": 0 * last, "lowest": -last, "middle": -(2**bits // 2), "any": -rng.integers(0, last + 1)}[
        draw(st.sampled_from(["zero", "lowest", "middle", "middle", "any"]))]
    return (size / 64).tolist(), q_min.tolist(), bits.tolist()


def by_ones(case, seed=0, most=8, steps=range(1, 256)):
    """A case with a plan by ones, drawn at random: 0 to `most` bits, whole classes, digits and slices without, these steps in 1/64."""
    spec = replace(case.spec, adc_plan="ones", adc_bits=1, adc_max_bits=12)
    rng = np.random.default_rng(seed)
    shape = len(spec.digit_bits), len(spec.slice_bits), replace(case, spec=spec).layer().classes
    bits = rng.integers(0, most + 1, shape) * (rng.random(shape) < 0.8) * (rng.random((*shape[:2], 1)) < 0.8)
    q_min = np.zeros(shape, int) if spec.reference == "digital" else -rng.integers(0, 2**bits)
    return replace(case, spec=spec, bits=bits.tolist(), delta=(rng.choice(steps, shape) / 64).tolist(), q_min=q_min.tolist())


@st.composite
def geometries(draw, kernel, groups):
    pair = st.tuples(st.integers(1, 2), st.integers(1, 2))
    dilation = draw(pair)
    reach = [d * (k - 1) for d, k in zip(dilation, kernel)]
    padding = tuple(draw(st.integers(0, min(reach[side // 2], 2))) for side in range(4))
    stride = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    return Geometry(stride, padding, dilation, groups)


@st.composite
def cases(draw, adc_ranges=ADC_RANGES, rows=ROWS, max_channels=40, planned=False, bits=(1, 8)):
    """Any layer: convolutions (grouped, depthwise, strided, dilated, padded on each side) and linear layers. Args: planned, the
    adc_plan, or whether it is "significance"; bits, fewest and most of weights and activations."""
    adc_plan = {False: "uniform", True: "significance"}.get(planned, planned)
    spec = draw(specs(["calibrated"] if planned else adc_ranges, rows, adc_plan, bits))
    if draw(st.integers(0, 3)) == 0:  # a linear layer, wide enough to fill arrays of 1024 rows
        kernel, groups, size, geometry = (1, 1), 1, (1, 1), Geometry()
        channels = draw(st.integers(1, min(64 * max_channels, 10 * spec.rows)))
        out = draw(st.integers(1, 20))
    else:
        kernel = draw(st.sampled_from(KERNELS))
        groups = draw(st.sampled_from([1, 1, 1, 2, 3, 8]))
        channels = draw(st.integers(1, min(max_channels // groups, 3 * spec.rows))) if draw(st.integers(0, 4)) else 1
        out = groups * draw(st.integers(1, 20 // groups))
        geometry = draw(geometries(kernel, groups))
        top, bottom, left, right = geometry.padding
        size = tuple(max(1, d * (k - 1) + 1 - padding + draw(st.integers(0, 4))) for d, k, padding in
                     zip(geometry.dilation, kernel, (top + bottom, left + right)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    images = draw(st.integers(1, 3))
    a_codes = codes(draw(st.sampled_from(ACTIVATIONS)), spec.a_bits, (images, *size, channels * groups), rng)
    w_codes = codes(draw(st.sampled_from(WEIGHTS[:1] * 3 + WEIGHTS)), spec.w_bits, (out, channels, *kernel), rng)
    delta, q_min, bits = draw(plans(spec, kernel, channels)) if planned else (*draw(ranges(spec)), None)
    zero_code = draw(st.sampled_from([None, 2 ** (spec.w_bits - 1) - 1]))
    return Case(spec, geometry, a_codes, w_codes, delta, q_min, bits, zero_code)


def random_cells(kind, case, rng):
    """`(values, reference, F)` for a layer. Kinds: those of a device with scatter (near) or without (levels), anything up to 2^16
    (wide), all below zero (negative), none at all (zeros), all alike (constant)."""
    spec, (out, channels, kh, kw) = case.spec, case.w_codes.shape
    groups, fraction = case.geometry.groups, 8 if spec.cell_bits <= 4 else 12 - spec.cell_bits
    shape = len(spec.slice_bits), groups, kh * kw * channels, out // groups
    if kind in ("near", "levels"):
        rows = case.w_codes.reshape(groups, out // groups, channels, kh * kw).transpose(0, 3, 2, 1).reshape(shape[1:]).astype(int)
        digits = np.stack([rows >> spec.cell_bits * k & 2**bits - 1 for k, bits in enumerate(spec.slice_bits)])
        level = np.array(case.reference_twice).reshape(-1, 1, 1) / 2 + np.zeros(shape[:3])
        if kind == "near":
            spread = rng.choice([0.01, 0.1, 0.5])
            off = rng.choice([0.0, 0.0, 0.3])  # share of an off-current
            digits = digits + spread * rng.standard_normal(shape) + off
            level = level + spread * rng.standard_normal(shape[:3]) + off
        values, reference = np.rint(2.0**fraction * digits), np.rint(2.0**fraction * level)
    elif kind == "wide":
        values, reference = (rng.integers(-2**16, 2**16 + 1, dims) for dims in (shape, shape[:3]))
    elif kind == "negative":
        values, reference = rng.integers(-1000, 0, shape), rng.integers(0, 300, shape[:3])
    else:
        number = 0 if kind == "zeros" else int(rng.integers(-600, 600))
        values, reference = np.full(shape, number), np.full(shape[:3], number // 2)
    return values.astype(np.int32), reference.astype(np.int32), fraction


@st.composite
def grid_cases(draw, kinds=CELLS, **options):
    """Any layer with cells on a grid. Args: kinds of `random_cells`; options of `cases`."""
    case = draw(cases(**options))
    case.cells = random_cells(draw(st.sampled_from(kinds)), case, np.random.default_rng(draw(st.integers(0, 2**32 - 1))))
    return case
