"""The report on a network's ADCs, against the same numbers computed read by read with the oracle."""

import numpy as np
import oracle
import pytest
import torch
from torch import nn

from experiment.report import report as files
from models.quant import CrossbarSpec, Device, Qconv2dDoreFa, QLinearDoreFa, calibrate, collect_histograms, convert, program, set_engine
from models.quant.arrays import adc, mapping, plans
from models.quant.network import diagnostics
from models.quant import without_adc as without_adc_of

pytestmark = pytest.mark.usefixtures("one_thread")


def network(spec, wq="dorefa", groups=1):
    torch.manual_seed(0)
    return nn.Sequential(
        Qconv2dDoreFa(6, 8, 3, stride=2, padding=1, groups=groups, spec=spec, alpha_init=1.5, wq=wq), nn.ReLU(), nn.Flatten(),
        QLinearDoreFa(72, 5, spec=spec, alpha_init=4.0, wq=wq)).eval()


def images(count=2):
    x = torch.rand(count, 6, 5, 5, generator=torch.Generator().manual_seed(1)) * 2
    x[:, :, :2] = 0  # so that some reads have no active row
    return x


def expected(layer, x):
    """{slice: (v, q, whether clipped, error) of all its reads}."""
    spec, mapped = layer.spec, layer.mapped()
    a_codes, w_codes = layer.a_codes(x).numpy(), layer.w_codes().numpy()
    slices = {}
    for *_, k, u in oracle.reads(a_codes, w_codes, spec, mapped.geometry, mapped.reference_twice):
        v = u.flatten() * (0.5 if spec.reference == "analog" else 1.0)
        delta, q_min = float(layer.adc_delta[k]), int(layer.adc_q_min[k])
        unclipped = np.rint(v / delta)
        q = np.clip(unclipped, q_min, q_min + 2**spec.adc_bits - 1)
        slices.setdefault(k, []).append((v, q, unclipped != q, delta * q - v))
    return {k: [np.concatenate(part) for part in zip(*parts)] for k, parts in slices.items()}


@pytest.mark.parametrize("options, wq, groups", [
    (dict(cell_bits=1, rows=4), "dorefa", 1), (dict(cell_bits=2, rows=128, mapping="im2col"), "dorefa", 2),
    (dict(cell_bits=3, rows=16, reference="digital"), "dorefa", 1), (dict(cell_bits=2, rows=4), "sawb", 2),
    (dict(cell_bits=1, rows=5, dac_bits=2), "sawb", 1)])
def test_numbers_of_every_layer_and_slice(options, wq, groups):
    spec = CrossbarSpec(adc_bits=2, **options)
    model, x = network(spec, wq, groups), images()
    histograms = calibrate(model, [x], correct=None)
    found = diagnostics.report(model, x, histograms)
    assert [entry["layer"] for entry in found] == ["0", "3"]
    for entry, layer, inputs in zip(found, (model[0], model[3]), (x, model[1:3](without_adc(model[0], x))), strict=True):
        slices = expected(layer, inputs)
        for part in entry["slices"]:
            v, q, clipped, error = slices[part["slice"]]
            assert part["seen"] == [v.min(), v.max()]
            assert part["reachable"] == reachable(layer, part["slice"])
            assert part["codes_used"] == len(np.unique(q)) / 4 and part["clipped"] == pytest.approx(clipped.mean())
            assert (part["delta"], part["q_min"]) == (layer.adc_delta[part["slice"]].item(), layer.adc_q_min[part["slice"]].item())
            assert part["values"] == [part["delta"] * (part["q_min"] + i) for i in range(4)]
            if (error == 0).all():
                assert part["sqnr_db"] is None
            else:
                assert part["sqnr_db"] == pytest.approx(10 * np.log10((v**2).sum() / (error**2).sum()))
            counts = np.array(part["histogram"])
            values = entry["unit"] * (np.arange(len(counts)) + entry["u_min"])
            np.testing.assert_array_equal(np.repeat(values, counts), np.sort(v))

        mapped = layer.mapped()
        lines = oracle.arrays(spec.mapping, mapped.kernel, mapped.group_channels, spec.rows)
        assert entry["row_blocks"] == len(lines) * mapped.geometry.groups
        assert entry["fill"] == pytest.approx(np.mean([len(array) for array in lines]) / spec.rows)
        assert entry["all_zero_reads"] == pytest.approx(all_zero(layer, inputs))
        with torch.no_grad():
            got = layer(inputs).double()
            ideal = without_adc(layer, inputs).double()
        loss = (got - ideal).square().sum()
        assert loss > 0 and entry["output_sqnr_db"] == pytest.approx(
            10 * torch.log10(ideal.square().sum() / loss).item(), rel=1e-6)
    assert found[0]["all_zero_reads"] > 0.2


@pytest.mark.parametrize("reference", ["analog", "digital"])
def test_bins_of_several_values_in_a_report(monkeypatch, reference):
    """`v` is the middle of a bin; what is said of the ADC is of these."""
    monkeypatch.setattr(mapping, "MAX_BINS", 60)
    model, x = network(CrossbarSpec(adc_bits=3, cell_bits=2, reference=reference, rows=64, mapping="im2col")), images()
    found = diagnostics.report(model, x, calibrate(model, [x], correct=None))
    for entry, layer, inputs in zip(found, (model[0], model[3]), (x, model[1:3](without_adc(model[0], x))), strict=True):
        low, high = layer.mapped("ideal").u_span
        size = min(2**s for s in range(9) if (high + 2**s // 2) // 2**s - (low + 2**s // 2) // 2**s < 60)
        assert size > 1 and entry["unit"] == size * (0.5 if reference == "analog" else 1.0)
        for part, (v, *_) in zip(entry["slices"], expected(layer, inputs).values(), strict=True):
            counts, middles = np.array(part["histogram"]), entry["unit"] * np.floor(v / entry["unit"] + 0.5)
            values = entry["unit"] * (np.arange(len(counts)) + entry["u_min"])
            np.testing.assert_array_equal(np.repeat(values, counts), np.sort(middles))
            assert part["seen"] == [middles.min(), middles.max()]
            q = np.clip(np.rint(middles / part["delta"]), part["q_min"], part["q_min"] + 7)
            error = ((part["delta"] * q - middles) ** 2).sum()
            assert part["sqnr_db"] == (pytest.approx(10 * np.log10((middles**2).sum() / error)) if error else None)


def reachable(layer, k):
    """Extremes of a read of slice k: all rows of the tallest array driven, all cells of the column full or empty."""
    spec, mapped = layer.spec, layer.mapped()
    tallest = max(map(len, oracle.arrays(spec.mapping, mapped.kernel, mapped.group_channels, spec.rows)))
    drive = tallest * (2**spec.dac_bits - 1)
    full = 2 ** oracle.split(spec.w_bits, spec.cell_bits)[k][1] - 1
    reference = mapped.reference_twice[k] / 2 if spec.reference == "analog" else 0
    return [min(0, -drive * reference), drive * (full - reference)]


def without_adc(layer, x):
    spec, ranges = layer.spec, list(zip(layer.adc_delta.tolist(), layer.adc_q_min.tolist()))
    layer.set_spec(CrossbarSpec(**{**vars(spec), "adc_range": "ideal"}))
    with torch.no_grad():
        y = layer(x)
    layer.set_spec(spec)
    layer.set_ranges(ranges)
    return y


def all_zero(layer, x):
    """Share of reads without an active row: with every cell at its largest value P is zero only there."""
    spec = CrossbarSpec(**{**vars(layer.spec), "reference": "digital"})
    ones = np.full(layer.w_codes().shape, 2**spec.w_bits - 1, np.uint8)
    mapped = layer.mapped()
    parts = [u.flatten() for _, _, _, k, u in oracle.reads(layer.a_codes(x).numpy(), ones, spec, mapped.geometry,
                                                         mapped.reference_twice) if k == 0]
    return (np.concatenate(parts) == 0).mean()


def test_curve_over_adc_bits_weighs_reads_as_the_shift_add_does():
    spec = CrossbarSpec(cell_bits=2, adc_bits=4, rows=16)
    model, x = network(spec), images()
    found = diagnostics.report(model, x, calibrate(model, [x], correct=None))[0]["sqnr_over_adc_bits"]
    layer = model[0]
    mapped = layer.mapped()
    histogram = collect_histograms(model, [x])["0"]
    for bits, db in found.items():
        other = CrossbarSpec(cell_bits=2, adc_bits=bits, rows=16)
        layer.set_spec(other)
        ranges = adc.calibrated_ranges(histogram.sum(axis=2), layer.mapped("ideal"), "mse", "alike")
        signal = error = 0.0
        for _, _, z, k, u in oracle.reads(layer.a_codes(x).numpy(), layer.w_codes().numpy(), spec, mapped.geometry,
                                          mapped.reference_twice):
            delta, q_min = ranges[k]
            v = u / 2
            q = np.clip(np.rint(v / delta), q_min, q_min + 2**bits - 1)
            signal += 4.0 ** (z + 2 * k) * (v**2).sum()
            error += 4.0 ** (z + 2 * k) * ((delta * q - v) ** 2).sum()
        assert db == (pytest.approx(10 * np.log10(signal / error)) if error else None)
    values = [db for db in found.values() if db is not None]
    assert values == sorted(values) and len(values) == 3
    assert list(found.values())[-1] is None  # 8 bits hold every read


def test_a_lossless_layer_is_exact():
    model, x = network(CrossbarSpec(adc_bits=8, rows=8)), images()
    found = diagnostics.report(model, x, calibrate(model, [x], correct=None))
    assert [entry["output_sqnr_db"] for entry in found] == [None, None]
    assert all(part["sqnr_db"] is None and part["clipped"] == 0 for entry in found for part in entry["slices"])
    assert "exact" in files.layers_table(found)


def test_model_is_left_as_it_was():
    model, x = network(CrossbarSpec(adc_bits=3, rows=8)), images()
    histograms = calibrate(model, [x], correct=None)
    model.train()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    diagnostics.report(model, x, histograms)
    assert model.training and model[0].spec.adc_range == "calibrated" and not model[0]._forward_hooks
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("reference", ["analog", "digital"])
def test_reads_of_ternary_inputs_are_in_levels_of_a_cell(reference):
    """Their cells lie on a grid of half levels, whatever the reference."""
    torch.manual_seed(3)
    x, spec = torch.randn(9, 6), CrossbarSpec(4, 4, cell_bits=2, adc_bits=3, reference=reference)
    net = convert(nn.Linear(6, 5), spec, x, inputs="ternary", first_last_bits=None)
    layer = net.crossbar
    [entry] = diagnostics.report(net, x, collect_histograms(net, x))
    a, w = layer.act_quant.codes(x).numpy().astype(int), layer.w_codes().numpy()[:, :, 0, 0].astype(int)
    for k, part in enumerate(entry["slices"]):
        cells = w // 4**k % 4 - (layer.weight_quant.reference_twice((2, 2))[k] / 2 if reference == "analog" else 0)
        v = np.stack([(np.sign(a) * (abs(a) >> z & 1)) @ cells.T for z in range(len(layer.spec.digit_bits))])
        assert part["seen"] == [v.min(), v.max()]
        q = np.clip(np.rint(v / part["delta"]), part["q_min"], part["q_min"] + 7)
        assert part["clipped"] == pytest.approx((np.rint(v / part["delta"]) != q).mean())
        assert part["codes_used"] == len(np.unique(q)) / 8


def test_kinds_of_reads_without_bits_clip_nothing():
    """A curve over ADC bits is there whatever the most bits of the plan."""
    spec = CrossbarSpec(2, 2, adc_plan="significance", adc_max_bits=4, adc_bits=1, rows=16)
    layer, x = QLinearDoreFa(20, 6, spec=spec, alpha_init=1.0).eval(), torch.rand(8, 20)
    net, nothing = nn.Sequential(layer), np.zeros((2, 2), np.int64)
    histograms = collect_histograms(net, x)
    layer.set_plan(plans.Plan(nothing, np.full((2, 2), 0.5), nothing))
    [entry] = diagnostics.report(net, x, histograms)
    assert [part["clipped"] for part in entry["slices"]] == [0, 0] and set(entry["sqnr_over_adc_bits"]) == set(range(2, 9))


@pytest.mark.parametrize("options", [dict(adc_plan="ones"), dict(adc_plan="significance", adc_idle="skip"),
                                     dict(adc_plan="ones", dac_bits=2, mapping="im2col"), dict(adc_plan="uniform", adc_idle="skip")])
def test_reads_of_each_class_are_told_by_its_converter(options):
    """Codes used, reads clipped, errors and mean bits of every read, whose n says how it is converted."""
    spec, x = CrossbarSpec(2, 4, adc_bits=1, rows=8, **options), images()
    with set_engine("reference"):
        model = network(spec)
        histograms = calibrate(model, [x], correct=None, share="layer")
        found = diagnostics.report(model, x, histograms)
    entry, layer, mapped = found[0], model[0], model[0].mapped()
    codes, planned = layer.a_codes(x).numpy(), spec.adc_plan != "uniform"
    lines = {(group, t): on for group, t, _, on in oracle.word_lines(codes, (3, 3), spec, mapped.geometry)}
    bits_of_all, shares = [], np.zeros((len(spec.digit_bits), mapped.classes))
    for part in entry["slices"]:
        k, clipped, square, error, used = part["slice"], [], 0.0, 0.0, {}
        for group, t, z, of_slice, u in oracle.reads(codes, layer.w_codes().numpy(), spec, mapped.geometry, mapped.reference_twice):
            if of_slice != k:
                continue
            n = (lines[group, t] // 2 ** (spec.dac_bits * z) % 2**spec.dac_bits).sum(-1)
            for place, value in np.ndenumerate(u):
                j = min(len(f"{n[place[:-1]]:b}") if n[place[:-1]] else 0, mapped.classes - 1)
                kind = (z, k, j) if spec.adc_plan == "ones" else (z, k) if planned else k
                delta, q_min, bits = (np.array(part[name])[kind[0]][kind[2:]] if planned else part.get(name, 1)
                                      for name in ("delta", "q_min", "bits"))
                bits = 0 if n[place[:-1]] == 0 else int(bits)
                q = np.clip(np.rint(value / 2 / delta), q_min, q_min + 2**bits - 1) if bits else 0
                clipped.append(bits > 0 and q != np.rint(value / 2 / delta))
                square, error = square + value**2 / 4, error + (delta * q - value / 2) ** 2
                bits_of_all.append(bits)
                shares[z, j] += 1
                if bits:
                    used.setdefault((kind if planned else 0, bits), set()).add(q)
        assert part["clipped"] == pytest.approx(np.mean(clipped))
        assert part["sqnr_db"] == (pytest.approx(10 * np.log10(square / error), abs=1e-9) if error else None)
        assert part["codes_used"] == pytest.approx(np.mean([len(codes) / 2**bits for (_, bits), codes in used.items()] or [0]))
    assert sum(part["clipped"] for part in entry["slices"]) and entry["mean_bits"] == pytest.approx(np.mean(bits_of_all))
    assert np.shape(entry["slices"][0].get("bits")) == {"ones": shares.shape, "significance": (4,), "uniform": ()}[spec.adc_plan]
    assert ("shares" in entry) == (spec.adc_plan == "ones")
    if "shares" in entry:
        np.testing.assert_allclose(entry["shares"], shares / shares.sum(1, keepdims=True))
    assert files.layers_table(found)


def test_what_a_chip_loses_is_what_its_output_lacks():
    """With ranges that cover all, which are those of nominal cells."""
    torch.manual_seed(0)
    layer = QLinearDoreFa(40, 30, bias=False, spec=CrossbarSpec(adc_range="full", adc_bits=4, rows=16), alpha_init=1.0).eval()
    net, x = nn.Sequential(layer), torch.rand(30, 40)
    with without_adc_of(net):
        wanted = net(x).double()
    program(net, Device("wide", "invented", 5.0, 50.0, sigma_us=20.0))
    [entry] = diagnostics.losses(net, x, corrected=False)
    error = (layer.simulate(x).double() - wanted).square().sum()
    assert entry["chip"] == pytest.approx(10 * float(torch.log10(wanted.square().sum() / error)))


def test_an_adc_that_rounds_scatter_away_has_a_negative_share():
    """Reads that lie less than half a step from those of ideal cells come out as these: what scatter adds the ADC takes away, and
    the quantization is the whole error in the end."""
    torch.manual_seed(0)
    layer = QLinearDoreFa(40, 30, bias=False, spec=CrossbarSpec(adc_range="full", adc_bits=6, rows=8), alpha_init=1.0).eval()
    net, x = nn.Sequential(layer), torch.rand(30, 40)
    program(net, Device("quiet", "invented", 5.0, 50.0, sigma_us=0.4))  # reads by 0.04 levels, which lie half a level apart
    [entry] = diagnostics.losses(net, x, corrected=False)
    assert entry["cells"] < 60 and entry["both"] is None
    assert entry["shares"]["quantization"] == pytest.approx(1) and entry["shares"]["scatter"] > 1e-4
    assert entry["shares"]["adc"] == pytest.approx(-entry["shares"]["scatter"])


def test_shares_are_what_each_step_adds_to_the_error():
    """Squares of the errors 1, 3, 3, 3, 2: of 4 in the end 1, 8, nothing, nothing and -5. Changes of rounding are none."""
    steps = [torch.tensor([[10.0, value]], dtype=torch.float64) for value in (0, 1, 3, 3 + 1e-8, 3, 2)]
    assert diagnostics._shares(steps) == {"quantization": 0.25, "scatter": 2.0, "wires": 0.0, "noise": 0.0, "adc": -1.25}
    assert set(diagnostics._shares(steps[:1] * 6).values()) == {0.0}
