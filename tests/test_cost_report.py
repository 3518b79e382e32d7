"""eval.py --cost: columns, files and keys, settings that have no cost, refusals before any work."""

import csv
import html
import json
import re
from dataclasses import asdict, replace

import numpy as np
import pytest
import test_eval
import torch
from test_cost import costs, linear
from test_eval import checkpoint, run, scene  # noqa: F401 - fixtures

from experiment.report import cost_report, report
from experiment.report.tables import WIDTH, settings_table
from experiment.program.cli import UserError
from experiment.measure.columns import band_text
from experiment.settings.costs import restored
from models.quant import CrossbarSpec
from models.quant.arrays.plans import Plan
from models.quant.cost import Band, Origin, Technology
from models.quant.measuring.measure import Record
from models.quant.measuring.setting import Setting

pytestmark = pytest.mark.usefixtures("one_thread")


def test_costs_of_a_table(run, checkpoint):
    also = ["--adc_range ideal", "--crossbar_layers conv --adc_range full --adc_bits 6"]
    flags = ["--cell_bits", "1", "2", "--adc_bits", "4", "--also", *also, "--cost", "rram_65nm"]
    _, predictions, text = run(checkpoint, *test_eval.FAST, *flags, drawn=True)
    folder = test_eval.Path(checkpoint).parent
    rows = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    assert [row["cost"] for row in rows] == [None, "rram_65nm", "rram_65nm", None, "rram_65nm"]
    assert all(row["energy_uJ_low"] <= row["energy_uJ"] <= row["energy_uJ_high"] for row in rows if row["cost"])
    assert rows[0]["energy_uJ"] is None and rows[2]["energy_uJ"] < rows[1]["energy_uJ"]
    table = text.split("setting   ")[-1]
    assert "typical and dearest" in text and " at 65 nm" in text  # the sources, and what they are at the node
    assert "energy uJ" in table and "TOPS/W" in table and f"{rows[1]['energy_uJ']:.3g} (" in table
    content = json.loads((folder / "cost.json").read_text())
    assert content["technology"]["name"] == "rram_65nm" and len(content["settings"]) == 3
    for found, row in zip(content["settings"], (rows[1], rows[2], rows[4])):
        assert found["energy_uJ"] == row["energy_uJ"] and found["spec"]["cell_bits"] == row["cell_bits"]
        assert found["n_images"] == 40 and found["accuracy"] == row["accuracy"]
    assert [layer["layer"] for layer in content["settings"][0]["layers"]] == test_eval.CROSSBARS
    assert content["settings"][2]["digital"] == test_eval.CROSSBARS[2:] and f"without an ADC: {', '.join(test_eval.CROSSBARS[2:])}" in text
    with open(folder / "cost.csv", newline="") as file:
        lines = [line for line in csv.DictReader(file) if line["quantity"] == "energy_uJ" and line["setting"].startswith("2-bit")]
    assert sum(float(line["typical"]) for line in lines) == pytest.approx(rows[2]["energy_uJ"])
    for name in ("cost_by_layer", "accuracy_over_energy"):
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_the_page_has_the_sources_of_its_costs(checkpoint, monkeypatch):
    """Of all its rows, those of a run before, in another technology, too."""
    folder, wanted = test_eval.Path(checkpoint).parent, {}
    flags_of_all = ["--resume", checkpoint, *test_eval.FAST, *test_eval.CALIBRATION, "--ngpu", "0", "--limit", "3", "--html"]
    test_eval.without_pictures(monkeypatch)
    for name, flags in (("rram_65nm", ["--adc_bits", "3", "6"]),
                        ("isaac_32nm", ["--adc_bits", "4", "--adc_plan", "significance"])):
        assert test_eval.evaluation.main([*flags_of_all, *flags, "--cost", name]) == 0
        settings = json.loads((folder / "cost.json").read_text())["settings"]
        wanted[name] = {(part, text, value) for found in settings for part, texts in found["sources_of_ends"].items()
                        for text, value in zip(texts, found["values_of_ends"][part])}
    (folder / "cost.json").unlink()
    assert test_eval.evaluation.main(flags_of_all) == 0
    page = (folder / "results.html").read_text()
    assert re.findall("<h2>Sources of the costs in (.*?)</h2>", page) == [*wanted]
    for name, sources in wanted.items():
        table = page.split(f"Sources of the costs in {name}</h2>")[1].split("</tbody>")[0].split("<tbody>")[1]
        lines, part = set(), ""
        for cells in (re.findall("<td>(.*?)</td>", row) for row in re.findall("<tr>(.*?)</tr>", table)):
            part = cells[0].split(",")[0] or part
            lines.add((part, html.unescape(cells[2]), html.unescape(cells[3])))
        assert lines == sources and len(lines) > 5
    assert ">typical and dearest<" in page and "its _low is by the cheapest" in page


def test_costs_are_those_of_the_images_that_are_measured(run, checkpoint):
    """The pass of the software counts each image once; a second table with other arrays counts those."""
    seen = {}
    for rows in ("16", "8"):
        flags = ["--limit", "3", "--rows", rows, "--adc_range", "full", "--cost", "rram_65nm"]
        run(checkpoint, "--ngpu", "0", *flags)
        content = json.loads((test_eval.Path(checkpoint).parent / "cost.json").read_text())["settings"][0]
        seen[rows] = {layer["layer"]: layer["events"] for layer in content["layers"]}
    first = test_eval.CROSSBARS[0]
    assert seen["16"][first]["pixels"] == 3 * 16 * 16 and seen["8"][first]["reads"] == 2 * seen["16"][first]["reads"]
    for same in ("level_pulses", "line_ones", "line_bits", "cells_used"):  # rows only lie on other arrays
        assert seen["16"][first][same] == seen["8"][first][same]


def test_conversions_of_a_plan_are_those_of_the_table(run, checkpoint):
    """Against the share of reads and the mean bits that the measurement finds in another way."""
    flags = ["--limit", "3", "--rows", "16", "--adc_bits", "2", "--adc_plan", "uniform", "significance"]
    run(checkpoint, "--ngpu", "0", *flags, "--cost", "rram_65nm")
    folder = test_eval.Path(checkpoint).parent
    row = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()][-1]
    uniform, planned = ([layer["events"]["conversions"] for layer in found["layers"]]
                        for found in json.loads((folder / "cost.json").read_text())["settings"])
    reads = sum(layer["2"] for layer in uniform)
    assert row["adc_plan"] == "significance" and 0 < row["conversions"] < 1
    assert sum(n for layer in planned for n in layer.values()) / reads == pytest.approx(row["conversions"])
    assert sum(int(bits) * n for layer in planned for bits, n in layer.items()) / reads == pytest.approx(row["mean_bits"])


def test_bits_of_a_layer_are_the_mean_of_its_conversions():
    layer, x = linear(20, 6, CrossbarSpec(w_bits=2, a_bits=2, adc_plan="significance", adc_bits=2.0, rows=16))
    layer.set_plan(Plan(bits=np.array([[0, 5], [5, 8]]), delta=np.ones((2, 2)), q_min=np.zeros((2, 2))))
    x[:, 16:] = 0  # the second of two arrays is idle
    line = cost_report.layers_table(costs(layer, x, Technology.load("rram_65nm"))).splitlines()[2]
    assert line.split()[2:5] == ["50.0%", "36", "6"]  # behind arrays and used: idle reads, conversions, bits


def test_one_pass_counts_the_reads_of_all_digits(run, checkpoint):
    """Of digits of one bit, and of two, of which there are half as many, and fewer idle ones."""
    run(checkpoint, "--ngpu", "0", "--limit", "3", "--adc_range", "full", "--dac_bits", "1", "2", "--cost", "rram_65nm")
    one, two = ([layer["events"] for layer in found["layers"]]
                for found in json.loads((test_eval.Path(checkpoint).parent / "cost.json").read_text())["settings"])
    assert [layer["reads"] for layer in one] == [2 * layer["reads"] for layer in two]
    assert sum(layer["idle_reads"] for layer in one) > 2 * sum(layer["idle_reads"] for layer in two) > 0


def test_idle_conversions_that_are_skipped_are_not_in_the_table(run, checkpoint):
    flags = ["--limit", "3", "--rows", "8", "--adc_range", "full", "--adc_bits", "3", "--adc_idle", "skip", "convert", "--cost",
             "rram_65nm"]
    _, _, text = run(checkpoint, "--ngpu", "0", *flags)
    folder = test_eval.Path(checkpoint).parent
    made, every = ([layer["events"]["conversions"]["3"] for layer in found["layers"]]
                   for found in json.loads((folder / "cost.json").read_text())["settings"])
    rows = [line.split() for line in text.split("conversions   bits")[1].splitlines()[2:2 + len(made)]]
    assert [row[4] for row in rows] == [f"{n / 3:.3g}" for n in made] and made < every
    share = sum(made) / sum(every)
    row = next(line for line in text.splitlines() if line.startswith("idle reads skipped ") and "%" in line)
    mean, converted = row.split("skipped")[1].split()[:2]  # of inputs behind coarse ADCs; costs are those of the software's
    assert float(mean) == pytest.approx(3 * share, abs=0.03) and float(converted[:-1]) == pytest.approx(100 * share, abs=1)


@pytest.mark.parametrize("count, named", [(3, 3), (20, 20), (53, 2)])
def test_one_picture_of_many_settings_and_layers(count, named, cost, tmp_path):
    """A bar for each, as high as a line of text, on one scale; names lie on no other, and of very many layers the first and the last
    are named."""
    cost = replace(cost, layers=tuple(replace(cost.layers[0], name=f"stages.{i}.conv1") for i in range(count)))
    records = [replace(costed(cost), setting=Setting(CrossbarSpec(adc_bits=bits))) for bits in range(3, 9)]
    drawn = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cost_report, "save", lambda figure, *_, **__: drawn.append(figure))
        for shown in (records[:1], records):
            cost_report.by_layer(tmp_path / "picture.png", shown, "title")
    drawn[1].savefig(tmp_path / "picture.png")
    assert drawn[1].get_figheight() < 1.5 * drawn[0].get_figheight() and len(drawn[1].axes) == 4
    for axes in drawn[1].axes[::2]:
        boxes = [tick.get_window_extent() for tick in axes.get_yticklabels()]
        assert [tick.get_text() for tick in axes.get_yticklabels()] == [f"{bits}-bit ADC" for bits in range(3, 9)]
        assert all(below.y1 < above.y0 for above, below in zip(boxes, boxes[1:])) and min(box.x0 for box in boxes) >= 0
    names = [text.get_text() for text in drawn[1].axes[3].get_legend().get_texts()]
    assert len(names) == named and (names[0], names[-1]) == ("stages.0.conv1", f"stages.{count - 1}.conv1")
    box = drawn[1].axes[3].get_legend().get_window_extent()
    assert box.x1 <= drawn[1].bbox.x1 and box.y0 >= 0 and box.x0 >= drawn[1].axes[3].get_window_extent().x1


def test_whiskers_are_said_to_be_what_they_are(cost, monkeypatch, tmp_path):
    drawn = []
    monkeypatch.setattr(report, "save", lambda figure, *_, **__: drawn.append(figure))
    one = replace(costed(cost), chance=1.0)
    for record in (one, replace(one, chip_accuracies=(89.0, 91.0))):
        cost_report.accuracy_over_energy(tmp_path, [record], "title")
    said = [[text.get_text() for text in figure.legends[0].get_texts()][-1] for figure in drawn]
    assert said == ["whiskers: standard deviation by the choice of examples",
                    "whiskers: standard deviation over 2 chips and by the choice of examples"]


def test_a_device_gives_its_levels(run, checkpoint):
    flags = ["--limit", "3", "--rows", "16", "--cost", "rram_65nm", "--adc_range", "full"]
    run(checkpoint, "--ngpu", "0", *flags, "--device", "neurosim_tsinghua_130nm", "--also", "")
    rows = [json.loads(line) for line in (test_eval.Path(checkpoint).parent / "results.jsonl").read_text().splitlines()]
    content = json.loads((test_eval.Path(checkpoint).parent / "cost.json").read_text())["settings"]
    cells = [sum(layer["energy_J"]["cells"][1] for layer in found["layers"]) for found in content]
    assert rows[1]["device"] == "neurosim_tsinghua_130nm" and len(cells) == 2
    assert cells[0] < cells[1] * 10 / 100  # 1 to 10 uS, and those of the technology, 1.1 to 167


@pytest.mark.parametrize("flags, message", [
    (["--cost", "rram_3nm"], "--cost rram_3nm: no technology and no file is called 'rram_3nm'; technologies are isaac_32nm,"),
    (["--cost", "mine.csv"], "--cost mine.csv: mine.csv line 2: adc_energy has the unit 'J'"),
    (["--cost", "narrow.csv"], "--cost narrow, 1-bit cells, 6-bit ADC, calibrated, rows 16: arrays of 3 columns do not hold one weight"),
    (["--cost", "isaac_32nm", "--adc_bits", "12"], "--cost isaac_32nm, 1-bit cells, 12-bit ADC, calibrated, rows 16: isaac_32nm has"),
    (["--cost", "isaac_32nm", "--adc_plan", "significance", "--adc_max_bits", "9"], "no adc_energy for converters of 1, 2, 3,"),
])
def test_refused_before_any_work(flags, message, run, checkpoint):
    for name, lines in (("mine", "adc_energy,1,J,,,x"), ("narrow", "include,rram_32nm,,,,\ncolumns,3,lines,,,")):
        test_eval.Path(f"{name}.csv").write_text(f"component,value,unit,bits,node_nm,source\n{lines}\n")
    with pytest.raises(UserError) as error:
        run(checkpoint, *test_eval.FAST, *flags)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not (test_eval.Path(checkpoint).parent / "results.jsonl").exists()


def test_list_says_what_there_is(capsys):
    with pytest.raises(SystemExit) as end:
        test_eval.evaluation.main(["--cost", "list"])
    text = capsys.readouterr().out
    assert end.value.code == 0 and all(f"{name}: " in text for name in Technology.presets())


@pytest.fixture
def cost():
    return costs(*linear(20, 6, CrossbarSpec(adc_range="full")), Technology.load("rram_65nm"))


def costed(cost, **more):
    return Record(Setting(CrossbarSpec(adc_range="full")), torch.zeros(100), 90.0, 95.0, 4, 1.0, None, 6.0, 1.0, cost=replace(cost, **more))


def test_columns_of_costs(cost):
    """Energy, latency, area, each with its band, in the table of settings and in that of layers."""
    bands = [band_text(getattr(cost, name).scaled(factor)) for name, factor in (("energy", 1e6), ("latency", 1e6), ("area", 1e6))]
    head, _, line, below, *_ = settings_table([costed(cost)], 100, "test images").split("\n\n")[1].splitlines()
    assert head.split() == "setting energy uJ latency us area mm2 TOPS/W".split() and len({*bands}) == 3
    places = [line.index(f" {band.split()[0]} ") for band in bands]
    assert places == sorted(places) and all(part in f"{line} {below}".split() for band in bands for part in band.split())
    of_layers = cost_report.layers_table(cost).splitlines()
    assert of_layers[0].split()[-6:] == "energy uJ latency us area mm2".split()
    assert of_layers[3].split()[-3:] == [band.split()[0] for band in bands]  # of all layers, without ends


def test_tables_of_costs_fit_a_terminal(cost):
    """Layers of long names, settings of many words, and wide bands."""
    wide = {part: Band(1234.5e-6, 23456e-6, 3.4567) for part in cost.layers[0].energy}
    layers = tuple(replace(cost.layers[0], name=f"encoder.layers.encoder_layer_{i}.self_attention.out_proj", energy=wide)
                   for i in range(3))
    made = replace(cost, layers=layers)
    setting = Setting(CrossbarSpec(), per_layer={f"features.{i}.block.0": {"adc_bits": 3, "cell_bits": 2} for i in range(4)})
    records = [costed(made), replace(costed(made), setting=setting)]
    text = "\n".join([settings_table(records, 100, "test images"), cost_report.layers_table(made), cost_report.sources_table(records)])
    assert max(map(len, text.splitlines())) <= WIDTH and "out_proj" in text
    assert [band_text(Band(*each)) for each in ((1234.4, 23456, 345670), (4.51, 12.34, 23.45), (0.00123, 0.01234, 116.4), (2, 2, 2))] == [
        "23456 (1234-345670)", "12.3 (4.51-23.4)", "0.0123 (0.00123-116)", "2"]


def test_a_band_as_it_is_printed_contains_its_value():
    """Also where the typical source is the cheapest or the dearest; where only the last digits differ, all three look alike."""
    rng = np.random.default_rng(0)
    for size in 10 ** rng.uniform(-5, 8, 2000):
        for a, b in ((1, rng.uniform(1, 3)), (rng.uniform(0, 1), 1), (1 - 1e-6, 1 + 1e-6), (0, 1)):
            band = Band(size * a, size, size * b)
            shown = [float(number) for number in re.split(r" \(|(?<!e)-|\)", band_text(band)) if number]
            typical, low, high = shown * 3 if len(shown) == 1 else shown
            assert low <= typical <= high and (low, typical, high) == pytest.approx(band, rel=0.005 + 1e-9)
    assert [band_text(Band(*each)) for each in ((0.69, 1.549, 1.549), (16.6, 16.6, 86.2), (999.4, 999.6, 999600))] == [
        "1.55 (0.69-1.55)", "16.6 (16.6-86.2)", "1000 (999-999600)"]


def test_costs_come_back_from_json(cost):
    assert restored(json.loads(json.dumps(asdict(cost)))) == cost


@pytest.mark.parametrize("skips", [True, False, None])
def test_costs_of_before_come_back(skips, cost):
    """When idle conversions stood beside all of them, which were not made where the layer skipped them."""
    stored = json.loads(json.dumps(asdict(cost)))
    for layer in stored["layers"]:
        events = layer["events"]
        events |= {"conversions": {"3": 70, "5": 20}, "idle_conversions": {"3": 10}, "shift_adds": 90, "idle_shift_adds": 10}
        events |= {} if skips is None else {"skips_idle": skips}
        del events["counts_ones"]
    for layer in restored(stored).layers:
        assert (layer.events.conversions, layer.events.shift_adds) == (({3: 60, 5: 20}, 80) if skips else ({3: 70, 5: 20}, 90))
        assert not layer.events.counts_ones


def test_what_files_of_costs_hold(cost):
    layer = linear(20, 6, CrossbarSpec(adc_range="full"))[0]
    origins = [Origin(text, value) for text, value in (("low one: x", "1 pJ"), ("t", "2 pJ"), ("high one: y", "3 pJ"))]
    made = costed(cost, sources={"adc": tuple(origins)})
    lines = list(csv.DictReader(cost_report.csv_text(cost_report._lines([made], layer)).splitlines()))
    assert all(float(line["low"]) <= float(line["typical"]) <= float(line["high"]) for line in lines)
    assert any(float(line["low"]) < float(line["high"]) for line in lines)
    content = cost_report._setting(made)
    assert content["sources_of_ends"] == {"adc": ["low one: x", "t", "high one: y"]}
    assert content["values_of_ends"] == {"adc": ["1 pJ", "2 pJ", "3 pJ"]}
    assert (content["leakage_W"], content["interval_s"]) == (cost.leakage, cost.interval)
    assert content["latency_us"] == pytest.approx(1e6 * cost.latency[1])


def test_sources_of_typical_values_and_ends(cost):
    """Which one makes which of them, and of the ADC with which bits."""
    a, b, c = (Origin(f"{name} (1999): so", f"{name} pJ") for name in "ABC")
    records = [costed(cost, sources={"adc_energy": (a, b, c), "row_on": (a, a, b), "add": (a, a, a)}),
               costed(cost, sources={"adc_energy": (b, b, b), "row_on": (a, a, b), "add": (a, a, a)})]
    records[1] = replace(records[1], setting=Setting(CrossbarSpec(adc_bits=3)))
    lines = [line.split() for line in cost_report.sources_table(records).split("\na value for")[0].splitlines()[2:]]
    assert lines == [line.split() for line in (
        "adc_energy, 6 bits typical B B pJ", "cheapest A A pJ", "dearest C C pJ", "adc_energy, 3 bits one source B B pJ",
        "row_on typical and cheapest A A pJ", "dearest B B pJ", "add one source A A pJ")]
    assert "one source makes both" in " ".join(settings_table(records, 100, "test images").split())


def test_pictures_of_costs(cost, monkeypatch, tmp_path):
    """Components, and layers, of a setting stand side by side and add up to it, whiskers on its band; a setting that has fewer layers on
    crossbars has their bars alone; a setting stands at its typical energy, beside the lines of the quantized and of the float network."""
    drawn = []
    for module in (cost_report, report):
        monkeypatch.setattr(module, "save", lambda figure, *_, **__: drawn.append(figure))
    layers = tuple(replace(cost.layers[0], name=name, energy={part: band.scaled(size) for part, band in cost.layers[0].energy.items()})
                   for name, size in (("a", 1), ("b", 3)))
    records = [costed(cost, layers=layers[1:]), costed(cost, layers=layers)]
    cost_report.by_layer(tmp_path, records, "title")
    wanted = {0: [[3e6 * cost.energy_by_component[part].typical for part in cost.energy_by_component],
                  [4e6 * cost.energy_by_component[part].typical for part in cost.energy_by_component]],
              2: [[0, 3e6 * cost.energy.typical], [1e6 * cost.energy.typical, 3e6 * cost.energy.typical]]}
    for panel, of_settings in wanted.items():
        bars = [container.patches for container in drawn[0].axes[panel].containers if hasattr(container, "patches")]
        for i, widths in enumerate(of_settings):
            assert [bar[i].get_width() for bar in bars] == pytest.approx(widths)
            assert [bar[i].get_x() for bar in bars] == pytest.approx(np.cumsum([0, *widths[:-1]]))
        [whiskers] = [container.lines[2][0].get_segments() for container in drawn[0].axes[panel].containers if hasattr(container, "lines")]
        assert np.ravel([segment[:, 0] for segment in whiskers]) == pytest.approx(
            [1e6 * size * end for size in (3, 4) for end in (cost.energy.low, cost.energy.high)])
    areas = [bar.patches[1].get_width() for bar in drawn[0].axes[3].containers if hasattr(bar, "patches")]
    assert areas == pytest.approx([1e6 * cost.area.typical] * 2)
    cost_report.accuracy_over_energy(tmp_path, [replace(costed(cost), float_accuracy=97.0)], "title")
    axes = drawn[1].axes[0]
    assert axes.containers[0].lines[0].get_xdata()[0] == pytest.approx(1e6 * cost.energy[1])
    assert {line.get_label(): line.get_ydata()[0] for line in axes.lines if len(line.get_ydata()) == 2} == {
        "quantized": 95.0, "float": 97.0}
