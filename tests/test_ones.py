"""Plans by ones: bits and ranges that depend on n, the sum of the digits on an array's word lines. Planning against brute force, layers and
networks, their files and training. The engines' arithmetic is in test_engines.py, test_cells.py, test_grouped.py and test_triton.py."""

import itertools
from dataclasses import replace

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_eval import CROSSBARS, FAST, checkpoint, network, refused, results, run, save, scene, shown_images  # noqa: F401
from test_models import images
from test_plans import mapped, square_error

from models.quant import CrossbarSpec, Qconv2dDoreFa, calibrate, crossbar_layers, without_adc
from models.quant.arrays import plans

pytestmark = pytest.mark.usefixtures("one_thread")
BY_ONES = CrossbarSpec(cell_bits=2, adc_bits=2.0, rows=16, adc_plan="ones")


@pytest.mark.parametrize("rows, a_bits, dac_bits, classes", [(1, 4, 1, 2), (2, 4, 1, 3), (127, 1, 1, 8), (128, 8, 1, 9), (128, 4, 2, 10),
                                                             (1024, 4, 4, 15)])
def test_a_class_is_the_length_of_n(rows, a_bits, dac_bits, classes):
    """0; 1; 2 and 3; 4 to 7; ... up to the largest n, whose digits are all at their most."""
    spec = CrossbarSpec(4, a_bits, 1, 2, rows, dac_bits=dac_bits, adc_plan="ones")
    assert spec.classes(rows) == classes
    layer = mapped(rows, a_bits=a_bits, dac_bits=dac_bits, adc_plan="ones", adc_bits=2)
    n = np.arange(rows * (2**dac_bits - 1) + 1)
    assert layer.class_of(torch.from_numpy(n)).tolist() == [len(f"{each:b}") if each else 0 for each in n]
    assert [layer.most_ones(j) for j in range(classes)] == [n[layer.class_of(torch.from_numpy(n)) == j].max() for j in range(classes)]
    one, two = (replace(spec, adc_plan="uniform", adc_idle=idle).classes(rows) for idle in ("convert", "skip"))
    assert (one, two) == (1, 2)


# ---- planning ----------------------------------------------------------------------------------------------------------------


def counted(layer, seed):
    """Counts `[digits, slices, classes, u]` of random reads of each n, none of the highest class of the last digit."""
    rng, (low, high) = np.random.default_rng(seed), layer.u_span
    shape = len(layer.spec.digit_bits), len(layer.spec.slice_bits), layer.classes, high - low + 1
    counts = np.zeros(shape, np.int64)
    share = rng.dirichlet(np.ones(layer.classes), len(layer.spec.digit_bits))
    share[-1, -1] = 0
    for z, k, j in np.ndindex(*shape[:3]):
        most = layer.most_ones(j)
        u = np.rint(rng.normal(0, np.sqrt(most) / 2 + 0.1, int(1000 * share[z, j]))).clip(-most, most).astype(np.int64)
        np.add.at(counts[z, k, j], (0 if j == 0 else 1) * u - low, 1)
        counts[z, k, j, -low] += int(1000 * share[z, j]) * (counts[z, k, j].sum() == 0)
    return counts


@pytest.mark.parametrize("seed", range(4))
def test_choices_are_errors_of_the_output_by_class(seed):
    layer = mapped(9, w_bits=2, a_bits=2, adc_plan="ones", adc_bits=2, adc_max_bits=4)
    counts = counted(layer, seed)
    found = plans.choices(counts, layer)
    assert found.error.shape == (2, 2, 5, 5) and not found.error[:, :, 0].any() and not found.share[:, 0].any()
    of_class = counts[:, 0].sum(2)
    np.testing.assert_allclose(found.share[:, 1:], (of_class / of_class.sum(1, keepdims=True))[:, 1:], rtol=1e-12)
    v = layer.unit * (layer.u_span[0] + np.arange(counts.shape[3]))
    for z, k, j, bits in itertools.product(range(2), range(2), range(1, 5), range(5)):
        share = counts[z, k, j] / counts[z, k].sum()
        wanted = square_error(v, share, found.delta[z, k, j, bits], int(found.q_min[z, k, j, bits]), bits)
        assert found.error[z, k, j, bits] == pytest.approx(len(layer.arrays) * 4.0 ** (z + k) * wanted, rel=1e-9, abs=1e-12)


@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=20)
def test_a_plan_is_the_best_of_all_that_cost_no_more(seed):
    """One digit and slice, five classes and up to three bits: all 256 plans. A bit of a class costs the reads that it has, in 4096ths of
    all, rounded up."""
    layer = mapped(9, w_bits=1, a_bits=1, adc_plan="ones", adc_bits=1, adc_max_bits=3)
    counts = counted(layer, seed)
    found = plans.choices(counts, layer)
    price = np.ceil(4096 * counts[0, 0].sum(1) / counts.sum()).astype(int)
    every = np.array([(0, *bits) for bits in itertools.product(range(4), repeat=4)])
    error = np.array([found.error[0, 0, np.arange(5), bits].sum() for bits in every])
    for mean in np.random.default_rng(seed).uniform(0, 3, 8):
        affordable = every @ price <= 4096 * mean
        bits = found.bits(found.total(mean))[0, 0]
        assert bits @ price <= 4096 * mean and found.error[0, 0, np.arange(5), bits].sum() == pytest.approx(error[affordable].min())
        assert found.mean(bits[None, None]) <= mean


def test_more_bits_never_have_a_larger_error():
    layers = [plans.choices(counted(layer, seed), layer) for seed, layer in enumerate(
        mapped(rows, cell_bits=cells, adc_plan="ones", adc_bits=1) for rows, cells in ((16, 1), (30, 2)))]
    layers[1] = replace(layers[1], reads=7 * layers[0].reads)
    errors = []
    for mean in np.arange(0, 6.01, 0.125):
        of_network = plans.bits_of(layers, [mean, mean], [1.0, 0.3])
        alone = plans.bits_of(layers, [mean, mean])
        reads = [layer.reads * bits[..., 0].size for layer, bits in zip(layers, of_network)]
        assert sum(n * layer.mean(bits) for n, layer, bits in zip(reads, layers, of_network)) <= mean * sum(reads) * (1 + 1e-9)
        errors.append([sum(weight * layer.left(bits) for weight, layer, bits in zip((1.0, 0.3), layers, each))
                       for each in (alone, of_network)])
    errors = np.array(errors)
    assert (np.diff(errors, axis=0) <= 1e-9 * errors[0]).all() and (errors[:, 1] <= 1.02 * errors[:, 0]).all()


def test_classes_are_planned_better_than_all_reads_together():
    """By ones, with idle reads skipped, with all converted: each has what the one behind it has, and more."""
    layer = mapped(64, adc_plan="ones", adc_bits=1)
    counts, left = counted(layer, 1), []
    for plan, idle, parts in (("ones", "convert", [slice(j, j + 1) for j in range(layer.classes)]),
                              ("significance", "skip", [slice(1), slice(1, None)]), ("significance", "convert", [slice(None)])):
        of = replace(layer, spec=replace(layer.spec, adc_plan=plan, adc_idle=idle))
        found = plans.choices(np.stack([counts[:, :, part].sum(2) for part in parts], 2), of)
        left.append([found.left(found.bits(found.total(mean))) for mean in (0.5, 1, 2, 3)])
    assert (np.array(left[0]) < 0.9 * np.array(left[1])).all() and (np.array(left[1]) <= 1.01 * np.array(left[2])).all()


def test_reads_of_a_class_that_no_image_had_are_converted_as_those_of_the_next():
    layer = mapped(9, w_bits=1, a_bits=1, adc_plan="ones", adc_bits=2)
    counts = counted(layer, 1)
    counts[0, 0, [1, 4]] = 0
    assert counts[0, 0, [0, 2, 3]].sum(1).all()
    plan = plans.choices(counts, layer).plan(np.array([[[0, 0, 2, 3, 0]]]))
    assert plan.bits.tolist() == [[[0, 2, 2, 3, 3]]] and plan.bits.dtype == np.int64
    assert plan.delta[0, 0, 1] == plan.delta[0, 0, 2] and plan.q_min[0, 0, 4] == plan.q_min[0, 0, 3]
    nothing = plans.choices(0 * counts, layer).plan(np.zeros((1, 1, 5), np.int64))
    assert not nothing.bits.any() and (nothing.delta > 0).all()


# ---- layers and networks -----------------------------------------------------------------------------------------------------


def a_layer(spec, **changes):
    torch.manual_seed(2)
    return Qconv2dDoreFa(20, 9, 3, padding=1, spec=spec, alpha_init=1.5, **changes).eval()


@pytest.mark.parametrize("engine", ["reference", "numba"])
@pytest.mark.parametrize("changes", [{}, {"mapping": "im2col"}, {"reference": "digital"}, {"dac_bits": 2}, {"weights": "pair"}])
def test_classes_that_are_alike_are_a_plan_by_significance(changes, engine):
    """And class 0 alone apart is one that skips idle reads."""
    from models.quant import set_engine
    x, rng = images(2)[:, :1].expand(2, 20, 32, 32)[..., :6, :6] - 0.5, np.random.default_rng(0)
    other = a_layer(replace(BY_ONES, adc_plan="significance", **changes))
    layer = a_layer(replace(BY_ONES, **changes))
    shape = other._plan_shape
    bits, delta = rng.integers(0, 5, shape), rng.integers(20, 200, shape) / 64
    q_min = np.zeros(shape, np.int64) if changes.get("reference") else -(2**bits // 2)
    other.set_plan(plans.Plan(bits, delta, q_min))
    alike = [np.repeat(part[..., None], layer._plan_shape[2], 2) for part in (bits, delta, q_min)]
    with set_engine(engine), torch.no_grad():
        layer.set_plan(plans.Plan(*alike))
        assert torch.equal(layer(x), other(x)) and layer(x).unique().numel() > 20
        alike[0][..., 0] = alike[2][..., 0] = 0
        layer.set_plan(plans.Plan(*alike))
        other.set_spec(replace(other.spec, adc_idle="skip"))
        other.set_plan(plans.Plan(bits, delta, q_min))
        assert torch.equal(layer(x), other(x))


def classes_seen(layer, codes):
    """Of each read of a layer: (digit, class of n), one array after another, by the oracle's word lines."""
    for _, _, lines, on in oracle.word_lines(codes.numpy(), layer._weight4().shape[2:], layer.spec, layer._geometry()):
        for z, (shift, bits) in enumerate(oracle.split(layer.spec.a_bits, layer.spec.dac_bits)):
            for n in (on.reshape(-1, len(lines)) >> shift & 2**bits - 1).sum(1):
                yield z, len(f"{n:b}") if n else 0


@pytest.mark.parametrize("share", ["layer", "network"])
def test_a_mean_is_that_of_all_reads(tiny, share):
    """It is met but for what is left over: the bits of each read by its class."""
    model, x, seen = tiny(spec=BY_ONES), images(3), {}
    calibrate(model, x, share=share)
    bits = [layer.adc_bits_plan for _, layer in crossbar_layers(model)]
    with without_adc(model), torch.no_grad():
        hooks = [layer.register_forward_pre_hook(lambda layer, inputs: seen.update({layer: layer.a_codes(inputs[0])}))
                 for _, layer in crossbar_layers(model)]
        model(x)
        for hook in hooks:
            hook.remove()
    found = []
    for (_, layer), plan in zip(crossbar_layers(model), bits):
        of_reads = [plan[z, :, j].sum().item() if plan.dim() == 3 else (j > 0) * plan[z].sum().item()
                    for z, j in classes_seen(layer, seen[layer])]
        found.append((sum(of_reads), len(of_reads) * plan.shape[1], len(layer.weight)))
    spent = [(total * out, reads * out) for total, reads, out in found]
    for total, reads in spent if share == "layer" else [np.sum(spent, axis=0)]:
        assert 0.9 * 2.0 * reads < total <= 2.0 * reads
