"""Plans by ones: bits and ranges that depend on n, the sum of the digits on an array's word lines. Planning against brute force, layers and
networks, their files and training. The engines' arithmetic is in test_engines.py, test_cells.py, test_grouped.py and test_triton.py."""

import contextlib
import copy
import itertools
import json
import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_convert import Small
from test_eval import CROSSBARS, FAST, checkpoint, network, refused, results, run, save, scene, shown_images  # noqa: F401
from test_models import images
from test_plans import check_resumed, lengths_of_reads, mapped, refused_later, specs_of, square_error, stored  # noqa: F401
from test_sweeps import evaluate, trained  # noqa: F401
from test_train import FLAGS as TRAINING
from torch.nn import functional as F

import eval as evaluation
import train
from experiment.inputs.checkpoint import load_checkpoint
from experiment.program.cli import run_main
from experiment.settings import eval_settings
from experiment.sweep import bench
from models import vgg
from models.quant import (CrossbarSpec, Device, Qconv2dDoreFa, calibrate, convert, crossbar_layers, load, program, set_engine,
                          without_adc)
from models.quant import save as save_network
from models.quant.arrays import plans
from models.quant.conversion.encodings import ENCODINGS
from models.quant.layers.crossbar import ranges_of
from models.quant.layers.on_arrays import ADC_BUFFERS
from models.quant.measuring.measure import Cache, measure
from models.quant.measuring.setting import Setting, reads_of
from models.quant.network import calibration

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
    """And class 0 alone apart is one that skips idle reads: with a digital reference, whose range moves, those of the analog one."""
    x, rng = images(2)[:, :1].expand(2, 20, 32, 32)[..., :6, :6] - 0.5, np.random.default_rng(0)
    other = a_layer(replace(BY_ONES, **changes | {"adc_plan": "significance", "reference": "analog"}))
    layer = a_layer(replace(BY_ONES, **changes))
    shape = other._plan_shape
    bits, delta = rng.integers(0, 5, shape), rng.integers(20, 200, shape) / 64
    q_min = -(2**bits // 2)
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


def bits_of_reads(plan, lengths):
    """[bits of all conversions, conversions, reads] of one column of all slices. Args: lengths, see `lengths_of_reads`."""
    plan = plan if plan.ndim == 3 else np.stack([0 * plan, plan], 2)  # of arrays of one row
    of_class = lengths[:, None, :plan.shape[2]]
    return np.array([(of_class * plan).sum(), (of_class * (plan > 0)).sum(), lengths.sum() * plan.shape[1]])


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
        spent, _, reads = bits_of_reads(plan.numpy(), lengths_of_reads(layer, seen[layer]))
        found.append((spent * len(layer.weight), reads * len(layer.weight)))
    for total, reads in found if share == "layer" else [np.sum(found, axis=0)]:
        assert 0.9 * 2.0 * reads < total <= 2.0 * reads


# ---- eval.py -----------------------------------------------------------------------------------------------------------------

FLAGS_BY_ONES = ["--cell_bits", "2", "--adc_plan", "ones", "--adc_bits", "1.5"]
NAME = "2-bit cells, 1.5-bit ADC, planned by ones, rows 16"


def test_a_row_of_a_table(evaluate, checkpoint, capsys):  # noqa: F811
    """Its name, columns and files; it is measured once, and skips idle reads whether or not that is asked for."""
    measured, text = evaluate(checkpoint, *FLAGS_BY_ONES, "--adc_idle", "convert", "skip")
    assert [each and str(each) for each in measured] == [None, NAME]
    header, _, _, line, more, *_ = text.split("setting  ")[-1].splitlines()
    name, shown = line[:len(line) - len(line.split("  ", 1)[1])].strip(), line.split("  ", 1)[1].split()  # behind the first gap
    assert header.split()[:3] == ["bits", "converted", "made"] and f"{name} {more.strip()}" == NAME  # the table is as wide as a terminal
    software, row = results("save")
    assert (row["adc_plan"], row["adc_bits"], row["adc_idle"], row["adc_share"]) == ("ones", 1.5, "convert", "network")
    assert (row["adc_calib"], row["adc_per"], row["adc_correct"], row["adc_ranges"]) == (None, None, "channel", None)
    assert 1.3 < row["mean_bits"] <= 1.55 and 0 < row["conversions"] < 1 and set(row["layer_bits"]) == {*CROSSBARS}
    assert row["bits_made"] == pytest.approx(row["mean_bits"] / row["conversions"])
    assert [float(each.rstrip("%")) for each in shown[:3]] == pytest.approx(
        [row["mean_bits"], 100 * row["conversions"], row["bits_made"]], abs=0.05)
    assert not evaluate(checkpoint, *FLAGS_BY_ONES)[0] and not evaluate(checkpoint, *FLAGS_BY_ONES, "--adc_idle", "skip")[0]
    assert evaluation.main(["--resume", checkpoint, *FAST, *FLAGS_BY_ONES, "--dry_run"]) == 0
    assert capsys.readouterr().out.splitlines()[-2:] == [f"to measure  {NAME}", "2 points: 2 to measure"]  # of more images


def test_ranges_in_a_file_are_used_again(run, checkpoint):  # noqa: F811
    """Beside uniform ones in one table. Classes of n are as many as the fullest array of a layer has."""
    flags = ["--cell_bits", "2", "--adc_plan", "uniform", "ones", "--adc_bits", "3", "1.5"]
    first, predictions, text = run(checkpoint, *flags)
    assert [(row["adc_plan"], row["adc_bits"]) for row in first[1:]] == [("uniform", 3), ("ones", 3), ("ones", 1.5)]
    assert NAME in text and first[1]["conversions"] == 1 and first[1]["bits_made"] == 3
    entries = stored()
    for entry in entries:
        for layer in entry["layers"].values():
            planned = entry["adc_plan"] == "ones"
            assert np.shape(layer["ranges"]) == ((4, 2, 6, 2) if planned else (2, 2))  # n = 0, 1, 2 to 3, ..., 16
            assert np.shape(layer.get("bits", 0)) == ((4, 2, 6) if planned else ())
    assert len({json.dumps(layer["bits"]) for entry in entries[1:] for layer in entry["layers"].values()}) > 4
    again, repeated, _ = run(checkpoint, *flags, "--adc_ranges", "save/adc_ranges.json")
    assert all(torch.equal(a, b) for a, b in zip(predictions, repeated, strict=True)) and stored() == entries
    for name in ("accuracy", "mean_bits", "conversions", "bits_made", "layer_bits"):
        assert [row[name] for row in again] == [row[name] for row in first]


def test_layers_with_a_plan_by_ones_beside_others(run, checkpoint):  # noqa: F811
    """As a network whose layers were put on this hardware by hand; ranges are found again."""
    flags = ["--cell_bits", "2", "--adc_bits", "4", "--per_layer", "features.*:adc_plan=ones,adc_bits=1.5", "classifier.3:adc_plan=ones"]
    records, predictions, text = run(checkpoint, *flags)
    assert "2-bit cells, 4-bit ADC, calibrated, rows 16, features.*: adc_bits 1.5 adc_plan ones, classifier.3: adc_plan ones" in text
    net = network(spec=CrossbarSpec(cell_bits=2, adc_bits=4, rows=16))
    for name, layer in crossbar_layers(net):
        if name.startswith("features"):
            layer.set_spec(replace(layer.spec, adc_plan="ones", adc_bits=1.5))
        elif name == "classifier.3":
            layer.set_spec(replace(layer.spec, adc_plan="ones"))
    shown = bench.Bench(*eval_settings.parse(["--resume", checkpoint, "--calib_images", "20", "--ngpu", "0"]))
    shown.load(logging.getLogger())
    calibrate(net, shown.shown.calibration)
    with torch.no_grad():
        assert torch.equal(net(shown_images(40)[0]).argmax(1), predictions[1])
    [entry] = stored()
    assert ["bits" in entry["layers"][name] for name in CROSSBARS] == [True, True, False, True]
    assert records[1]["layer_bits"]["classifier.0"] == 4 > 1.6 > records[1]["layer_bits"]["features.8"]
    again, repeated, _ = run(checkpoint, *flags, "--adc_ranges", "save/adc_ranges.json")
    assert torch.equal(repeated[1], predictions[1]) and again[1]["layer_bits"] == records[1]["layer_bits"]


def test_plans_of_a_table(checkpoint):  # noqa: F811
    """One setting, whatever is said of idle reads; fractions are for plans; without an ADC there is none."""
    found = specs_of(checkpoint, "--adc_plan", "uniform", "significance", "ones", "--adc_bits", "3", "1.5", "--adc_idle", "convert", "skip",
                     "--adc_range", "calibrated", "ideal")
    found = sorted((spec.adc_range, spec.adc_plan, spec.adc_bits, spec.adc_idle) for spec in found)
    each = [("significance", 1.5), ("significance", 3), ("uniform", 3)]
    assert found == sorted([("ideal", "uniform", 1, "convert"), *(("calibrated", "ones", bits, "convert") for bits in (1.5, 3)),
                            *(("calibrated", *those, idle) for those in each for idle in ("convert", "skip"))])


def test_a_search_report_and_costs(evaluate, trained):  # noqa: F811
    """Plans by ones are values like others: of the table, of its picture, and of single layers, whose bits a search takes from them."""
    flags = ["--adc_plan", "significance", "ones", "--adc_bits", "1", "--per_layer", "*:adc_bits=1:3:0.5"]
    evaluate(trained, *flags, "--search", "10", "--objective", "energy", "changed", "--cost", "rram_32nm")
    rows = [row for row in results("save") if row["validation"]]
    assert len({json.dumps([row["adc_plan"], row["adc_bits"], row["per_layer"]]) for row in rows if row["cell_bits"]}) == 10
    assert {"ones"} < {row["adc_plan"] for row in rows if row["per_layer"]} and {"ones"} <= {
        row["adc_plan"] for row in rows if row["cell_bits"] and not row["per_layer"]}
    assert all(row["energy_uJ"] > 0 for row in rows if row["cell_bits"])
    _, text = evaluate(trained, *FLAGS_BY_ONES, "--report", "--cost", "rram_32nm")
    assert "bits by digit, of n = 1, 2-3, 4-7, ..." in text and NAME in text


@pytest.mark.parametrize("flags, words", [
    (["--adc_range", "full"], "--adc_plan is 'ones' with adc_range 'full'"),
    (["--adc_range", "dynamic"], "--adc_plan is 'ones' with adc_range 'dynamic'"),
    (["--adc_bits", "9"], "--adc_bits is 9; allowed are means from 0 to 8 (--adc_max_bits)"),
    (["--adc_bits", "4.5", "--adc_max_bits", "4"], "--adc_bits is 4.5; allowed are means from 0 to 4 (--adc_max_bits)"),
    (["--adc_calib", "mse"], "with a plan each kind of read"), (["--adc_per", "slice"], "with a plan each kind of read")])
def test_bad_input_is_one_line(flags, words, refused, checkpoint):  # noqa: F811
    refused(["--resume", checkpoint, *FLAGS_BY_ONES, *flags], words)


# What adc_ranges.json holds of FLAGS_BY_ONES, once one of the tests has made it.
ENTRY: list[str] = []


def cut(nested, depth):
    """Without the last class of n."""
    return nested[:-1] if depth == 0 else [cut(part, depth - 1) for part in nested]


@pytest.mark.parametrize("change, words", [
    (lambda layer: layer.update(bits=cut(layer["bits"], 2), ranges=cut(layer["ranges"], 2)), "[4, 2, 5] digits, slices and perhaps"),
    (lambda layer: layer.update(bits=[[each[-1] for each in digit] for digit in layer["bits"]],
                                ranges=[[each[-1] for each in digit] for digit in layer["ranges"]]), "[4, 2, 6] is expected"),
    (lambda layer: layer.update(bits=cut(layer["bits"], 2)), "[4, 2, 6] is expected"),
    (lambda layer: layer["bits"][0].__setitem__(1, 3), "is not an adc_ranges.json"),
    (lambda layer: layer["bits"][0][1].pop(), "damaged.json"), (lambda layer: layer.pop("bits"), "damaged.json"),
    (lambda layer: layer["bits"][0][1].__setitem__(2, 9), "is not one of 0 to 8 bits"),
    (lambda layer: layer["bits"][0][1].__setitem__(2, 0.5), "0.5 stands where a whole number is expected"),
    (lambda layer: layer["ranges"][0][1][2].__setitem__(0, 0.3), "multiples of 1/64"),
    (lambda layer: layer["ranges"][0][1][2].__setitem__(1, 1), "a code for zero")])
def test_damaged_plans_in_a_file(change, words, run, refused_later, checkpoint):  # noqa: F811
    if not ENTRY:
        run(checkpoint, *FLAGS_BY_ONES)
        ENTRY.append(json.dumps(stored()))
    [entry] = json.loads(ENTRY[0])
    change(entry["layers"]["features.4"])
    Path("damaged.json").write_text(json.dumps({"ranges": [entry]}))
    error = refused_later(checkpoint, *FLAGS_BY_ONES, "--adc_ranges", "damaged.json")
    assert words in error and "damaged.json" in error and len(error) < 400


def test_a_file_without_this_plan(run, refused_later, checkpoint):  # noqa: F811
    """Ranges by significance are none by ones, nor are they where a file says so."""
    run(checkpoint, "--cell_bits", "2", "--adc_plan", "significance", "--adc_bits", "1.5")
    error = refused_later(checkpoint, *FLAGS_BY_ONES, "--adc_ranges", "save/adc_ranges.json")
    assert f"save/adc_ranges.json has no ranges of features.4 with these weights and input codes for {NAME}" in error
    [entry] = stored()
    Path("damaged.json").write_text(json.dumps({"ranges": [entry | {"adc_plan": "ones"}]}))
    assert "[4, 2, 6] is expected" in refused_later(checkpoint, *FLAGS_BY_ONES, "--adc_ranges", "damaged.json")


# ---- checkpoints and training --------------------------------------------------------------------------------------------------


def test_checkpoints_keep_a_plan_on_its_hardware(tmp_path, refused_later):  # noqa: F811
    """On other hardware plans are made anew; one that is damaged, or by significance, is one line."""
    (tmp_path / "save").mkdir()
    net = network(spec=replace(BY_ONES, adc_bits=1.5))
    few, _ = shown_images(8)  # other images than eval.py would take
    calibrate(net, few)
    flags = dict(adc_aware=True, cell_bits=2, adc_bits=1.5, rows=16, mapping="tap", reference="analog", dac_bits=1, map="all",
                 adc_plan="ones", adc_max_bits=8)
    path = save(tmp_path / "save" / "aware.pth.tar", net, **flags)
    for idle in ("skip", "convert"):  # which is the same by ones
        assert evaluation.main(["--resume", path, *FAST, *FLAGS_BY_ONES, "--adc_plan", "ones", "significance", "--adc_idle", idle]) == 0
    kept, other, converted = (record for record in results("save") if record["cell_bits"])
    assert [(record["adc_plan"], record["adc_ranges"]) for record in (kept, other, converted)] == [
        ("ones", "checkpoint"), ("significance", None), ("significance", None)]
    shown, labels = shown_images(40)
    with torch.no_grad():
        assert kept["accuracy"] == 100 * (net(shown).argmax(1) == labels).sum().item() / 40
    by_significance = network(spec=replace(BY_ONES, adc_plan="significance"))
    calibrate(by_significance, few)
    damaged = []
    for name, value in (("adc_bits_plan", 9), ("adc_bits_plan", -1), ("adc_delta", 0.3)):
        damaged.append(copy.deepcopy(net))
        getattr(crossbar_layers(damaged[-1])[0][1], name)[0, 0, 2] = value
    for each, words in zip((*damaged, by_significance), (
            "ADC plan (9 bits, lowest code ", "adc_bits_plan",
            "slice and perhaps class [0, 0, 2]) is not one of steps that are multiples of 1/64",
            "features.4.adc_bits_plan: copying a param with shape torch.Size([4, 2]) from checkpoint, the shape in current model is "
            "torch.Size([4, 2, 6])")):
        path = save(tmp_path / "save" / "damaged.pth.tar", each, **flags)
        error = refused_later(path, *FLAGS_BY_ONES)
        assert words in error and len(error) < 400


def test_training_through_a_plan_resumes_to_the_same_bits(tmp_path, monkeypatch):
    """Plans are made anew at each calibration, and the checkpoint is evaluated with its own."""
    monkeypatch.setitem(vgg.CONFIGS, "vgg7", ([8, "M", 8, "M", 8, "M"], 16))

    def quick(folder, *flags):
        assert train.main(["--save_path", str(folder), *TRAINING, *flags]) == 0
        return load_checkpoint(Path(folder, "checkpoint.pth.tar"))

    quick(tmp_path / "start", "--epochs", "1")
    by_ones = ["--cell_bits", "2", "--adc_plan", "ones", "--adc_bits", "1"]
    flags = ["--fine_tune", str(tmp_path / "start" / "model_best.pth.tar"), "--adc_aware", *by_ones, "--rows", "16",
             "--calib_steps", "7", "--epochs", "1", "--save_minutes", "0"]
    whole = quick(tmp_path / "whole", *flags)
    state = whole["state_dict"]
    bits = {key: value for key, value in state.items() if key.endswith("adc_bits_plan")}
    assert len(bits) == 4 and whole["config"]["adc_plan"] == "ones" and whole["config"]["adc_bits"] == 1
    for value in bits.values():  # of arrays of 8 rows, one each tap, or of 16
        assert value.shape in ((4, 2, 5), (4, 2, 6)) and not value[..., 0].any() and value.any()
    once = quick(tmp_path / "once", *flags[:-6], "--calib_steps", "100", *flags[-4:])["state_dict"]
    assert any(not torch.equal(value, once[key]) for key, value in bits.items())  # later calibrations made other plans

    check_resumed(monkeypatch, tmp_path / "stopped", lambda folder: quick(folder, *flags), state)

    best = str(tmp_path / "whole" / "model_best.pth.tar")
    assert evaluation.main(["--resume", best, *FAST, *by_ones]) == 0
    record = results(tmp_path / "whole")[-1]
    assert record["adc_ranges"] == "checkpoint" and (record["adc_plan"], record["adc_bits"]) == ("ones", 1)
    assert 0.7 < record["mean_bits"] < 1.2
    net = vgg.VGG("vgg7", spec=CrossbarSpec(cell_bits=2, rows=16, adc_plan="ones", adc_bits=1.0))
    net.load_state_dict(load_checkpoint(best)["state_dict"])
    shown, labels = shown_images(40)
    with torch.no_grad():
        assert record["accuracy"] == 100 * (net.eval()(shown).argmax(1) == labels).sum().item() / 40


def test_mean_and_rules_are_refused_in_training(refused_training):
    for flags, words in ((["--adc_bits", "9"], "allowed are means from 0 to 8"), (["--adc_calib", "mse"], "with a plan each kind of read"),
                         (["--adc_range", "full"], "--adc_range")):
        assert words in refused_training(*flags)


@pytest.fixture
def refused_training(capsys):
    """refused_training(flags...): training by ones with these ends with one line, which is returned, before any work."""

    def refused_training(*flags):
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            run_main(lambda: train.main(["--adc_aware", "--adc_plan", "ones", "--adc_bits", "1", "--save_path", "run", *TRAINING, *flags]))
        out, err = capsys.readouterr()
        assert ended.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1 and not Path("run").exists()
        return err

    return refused_training


# ---- converted networks, chips -------------------------------------------------------------------------------------------------


def pulses(layer, x):
    """What word lines have of the input of a converted layer, read after read, by the equations of the encodings."""
    lo, hi = layer.act_quant.window
    a = (layer.form.images(x).double() / layer.act_quant.scale.double()).round().clamp(lo, hi).long()
    if lo == 0:
        return [a]
    top, bottom, left, right = layer.form.geometry.padding
    return {"phases": lambda: [a.clamp_min(0), (-a).clamp_min(0)], "ternary": lambda: [a.abs()], "twos": lambda: [a % 2**layer.spec.a_bits],
            "offset": lambda: [F.pad(a - lo, (0, 0, left, right, top, bottom), value=-lo)]}[layer.encoding]()


@torch.no_grad()
def spent_and_reads(net, x, codes, adc=True):
    """(bits of all conversions, conversions, reads) of each layer. Args: codes, of a layer's input: those of each read; adc, whether
    layers see what ADCs make of the outputs before."""
    seen, found = {}, {}
    hooks = [layer.register_forward_pre_hook(lambda layer, inputs: seen.update({layer: inputs[0]})) for _, layer in crossbar_layers(net)]
    with contextlib.nullcontext() if adc else without_adc(net):
        net(x)
    for hook in hooks:
        hook.remove()
    for name, layer in crossbar_layers(net):
        reads = sum(lengths_of_reads(layer, part) for part in codes(layer, seen[layer]))
        found[name] = len(layer.weight) // layer.geometry.groups * bits_of_reads(layer.adc_bits_plan.numpy(), reads)
    return found


@pytest.mark.parametrize("inputs", ENCODINGS)
def test_converted_networks_with_signed_inputs(inputs, tmp_path):
    """The mean is that of all reads, of both phases where there are two; engines agree; files keep the plan."""
    x = torch.randn(6, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    spec = CrossbarSpec(8, 8, cell_bits=2, adc_plan="ones", adc_bits=1.5, rows=16, mapping="im2col")
    net = convert(Small(), spec, x, inputs=inputs).eval()
    layers = crossbar_layers(net)
    assert [layer.act_quant.signed for _, layer in layers] == [True, False, False]
    lines = [32 if inputs == "ternary" else 16, 9, 8]  # rows of cells of the fullest array
    assert [layer.classes for _, layer in layers] == [1 + each.bit_length() for each in lines]
    spent = spent_and_reads(net, x, pulses)
    stem = spent[layers[0][0]]
    outputs, pixels, arrays, slices, phases = 8, 6 * 36, 2, 4, 2 if inputs == "phases" else 1
    assert stem[2] == outputs * pixels * arrays * slices * layers[0][1].spec.a_bits * phases
    found = {}
    for engine in ("reference", "numba"):
        with set_engine(engine), torch.no_grad():
            found[engine] = net(x)
    assert torch.equal(found["reference"], found["numba"]) and found["numba"].unique().numel() > 20
    measured = measure(net, x, torch.zeros(6, dtype=torch.int64), Setting(spec))  # on the ranges that it has
    total = sum(spent.values())
    assert measured.mean_bits == pytest.approx(total[0] / total[2], rel=1e-12)
    assert measured.conversions == pytest.approx(total[1] / total[2], rel=1e-12)
    assert measured.layer_bits == pytest.approx({name: each[0] / each[2] for name, each in spent.items()}, rel=1e-12)
    total = sum(spent_and_reads(net, x, pulses, adc=False).values())
    assert 0.9 * 1.5 * total[2] < total[0] <= 1.5 * total[2]
    save_network(net, tmp_path / "net.pt")
    loaded = load(tmp_path / "net.pt", Small())
    for (_, layer), (_, other) in zip(layers, crossbar_layers(loaded)):
        assert layer.spec == other.spec and all(torch.equal(getattr(layer, name), getattr(other, name)) for name in ADC_BUFFERS)
    with torch.no_grad():
        assert torch.equal(loaded(x), found["numba"])


NOISY = Device("noisy", "invented", 1.0, 31.0, sigma_us=4.0)  # 0.4 levels of 2-bit cells


@pytest.mark.parametrize("on", ["nominal", "chip"])
@pytest.mark.parametrize("changes", [{}, {"reference": "digital"}, {"weights": "pair"}, {"dac_bits": 2, "mapping": "im2col"}])
def test_chips(changes, on):
    """Plans of nominal cells and of the chip's: the mean is that of the reads, engines agree, and reads of no word line are 0."""
    x = torch.rand(4, 20, 6, 6, generator=torch.Generator().manual_seed(0)) ** 3
    net, found = torch.nn.Sequential(a_layer(replace(BY_ONES, **changes))), {}
    program(net, NOISY, 3, adc_noise=0.5, adc_offset=1.0, adc_gain=0.02)
    histograms = calibrate(net, x, on=on)
    assert histograms["0"].shape[2] == net[0].classes == net[0].adc_bits_plan.shape[2]
    [(spent, made, reads)] = spent_and_reads(net, x, lambda layer, x: [layer.a_codes(x)]).values()
    assert 0.9 * 2 * reads < spent <= 2 * reads and made < reads
    for engine in ("reference", "numba"):
        with set_engine(engine), torch.no_grad():
            found[engine] = net(x)
            nothing = net(torch.zeros(1, 20, 6, 6))
            of_bias = net[0].adc_gain * net[0].bias + net[0].adc_offset
            torch.testing.assert_close(nothing, of_bias.view(1, -1, 1, 1).expand_as(nothing), rtol=1e-5, atol=1e-6)
    assert torch.equal(found["reference"], found["numba"])
    ideal = a_layer(replace(BY_ONES, adc_range="ideal", **changes))(x)
    assert 0 < (found["numba"] - ideal).square().mean() < 0.5 * ideal.square().mean()


@pytest.mark.parametrize("on_chip", [False, True])
def test_the_range_of_a_digital_reference_moves_with_n(on_chip):
    """Codes stand for `P - r_k n`, on a chip less the off-current too, whose reads have no other reference: those of NumPy."""
    x = torch.rand(4, 20, 6, 6, generator=torch.Generator().manual_seed(0)) ** 3
    layer, analog = (a_layer(replace(BY_ONES, reference=reference)) for reference in ("digital", "analog"))
    if on_chip:
        program(torch.nn.Sequential(layer), NOISY, 3)
        off = round(2 ** layer.chip.cells.fraction_bits / 10)  # 1 uS, a level being 10
        assert torch.equal(layer.chip.cells.reference, layer.ideal_cells().reference + off)
    for each in (layer, analog):
        calibrate(each, x, correct=None)
    assert all(torch.equal(*values) for values in zip(*ranges_of(torch.nn.ModuleList([layer, analog]))))  # of cells without scatter
    assert int(layer.adc_q_min.min()) < 0  # reads lie on both sides of the range's middle
    cells, plan = layer.cells(), [values.tolist() for values in (layer.adc_delta, layer.adc_q_min, layer.adc_bits_plan)]
    held = cells.values.numpy(), cells.reference.numpy(), cells.fraction_bits
    [total] = oracle.accumulate(layer.a_codes(x).numpy(), layer.w_codes().numpy(), analog.spec, layer.geometry, None, *plan, cells=held)
    scale, offset = layer.scale_and_offset()
    expected = torch.from_numpy(total).permute(0, 3, 1, 2) / 32 * scale.view(1, -1, 1, 1) + offset.view(1, -1, 1, 1)
    for engine in ("reference", "numba"):
        with set_engine(engine), torch.no_grad():
            torch.testing.assert_close(layer(x), expected.float(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("inputs", ENCODINGS)
def test_chips_of_converted_networks(inputs):
    x = torch.randn(6, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    net, found = convert(Small(), replace(BY_ONES, adc_bits=1.5, mapping="im2col"), x, inputs=inputs), {}
    program(net.eval(), NOISY, 3, adc_offset=1.0)
    for on in ("nominal", "chip"):
        calibrate(net, x, on=on)
        spent, _, reads = sum(spent_and_reads(net, x, pulses, adc=False).values())
        assert 0.9 * 1.5 * reads < spent <= 1.5 * reads
        for engine in ("reference", "numba"):
            with set_engine(engine), torch.no_grad():
                found[engine] = net(x)
        assert torch.equal(found["reference"], found["numba"])


# ---- settings of one network -----------------------------------------------------------------------------------------------------


def test_settings_of_one_cache_give_what_they_give_alone(tiny, monkeypatch):
    """Means by ones share counts of the reads, and no other setting has these."""
    x, labels, cache, counted = images(4), torch.zeros(4, dtype=torch.int64), Cache(), []
    collect = calibration.collect_histograms
    monkeypatch.setattr(calibration, "collect_histograms", lambda *args: (counted.append(1), collect(*args))[1])
    spec = CrossbarSpec(cell_bits=2, rows=16, adc_bits=3)
    plans_of = [{}, dict(adc_plan="significance"), dict(adc_idle="skip"), dict(adc_plan="significance", adc_idle="skip"),
                dict(adc_plan="ones"), dict(adc_plan="ones", adc_bits=1.5), dict(adc_plan="ones", adc_max_bits=4), dict(adc_bits=4)]
    settings = [Setting(replace(spec, **changes)) for changes in plans_of]
    settings += [Setting(spec, per_layer={"features.*": {"adc_plan": "ones", "adc_bits": 1.5}}),
                 Setting(replace(spec, adc_plan="ones"), per_layer={"features.*": {"adc_plan": "significance"}}),
                 Setting(replace(spec, adc_plan="ones"), per_layer={"features.*": {"adc_plan": "uniform"}}),
                 Setting(replace(spec, adc_plan="ones"), per_layer={"features.*": {"adc_range": "ideal"}})]
    model, found = tiny(spec=spec), []
    for setting in settings:
        before = len(counted)
        found.append((measure(model, x, labels, setting, calibration=x, cache=cache), ranges_of(model), len(counted) - before))
    assert [times for *_, times in found[:8]] == [1, 0, 1, 0, 1, 0, 0, 1]
    assert len({reads_of(setting) for setting in settings[4:7]}) == 1
    for setting, (record, ranges, _) in zip(settings, found):
        alone = tiny(spec=spec)
        other = measure(alone, x, labels, setting, calibration=x)
        assert torch.equal(record.predictions, other.predictions) and record.layer_bits == other.layer_bits
        for one, two in zip(ranges, ranges_of(alone), strict=True):
            assert all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(one, two, strict=True))
