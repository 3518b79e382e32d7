"""Tables and pictures: what stands in which column, on which axis, at which place."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from experiment.report import chip_report, drawing, report
from experiment.report.tables import WIDTH, in_common, settings_table, text_table
from models.quant import CrossbarSpec, Device
from models.quant.measuring.chips import Chips
from models.quant.measuring.measure import Record
from models.quant.measuring.setting import Setting


USUAL = Setting()


def record(setting=USUAL, accuracy=90.0, **more):
    known = {"predictions": torch.zeros(100), "software_accuracy": 95.0, "changed_predictions": 4, "seconds": 1.0, "engine": None,
             "mean_bits": 6.0, "conversions": 1.0}
    return Record(setting=setting, accuracy=accuracy, **known | more)


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are saved."""
    found = []
    for module in (report, chip_report):
        monkeypatch.setattr(module, "save", lambda figure, *_, **__: found.append(figure))
    return found


def test_columns_of_a_converted_network():
    of_float = {"float_accuracy": 97.0}
    records = [record(None, 97.0, float_changes=0, is_float=True, **of_float),
               record(None, 95.0, float_changes=3, changed_predictions=0, **of_float), record(float_changes=7, **of_float)]
    lines = settings_table(records, 100, "test images").splitlines()
    assert lines[0].split() == "setting accuracy % to float changed to quantized changed images/s".split()
    assert lines[4].split()[-6:] == ["90.00", "-7.00", "7", "-5.00", "4", "100"]
    assert lines[5:] == ["100 test images", "float: the network as it came; quantized: its quantized form, without arrays",
                         "changed: images that are classified differently than by float, and than by quantized"]


def test_a_table_calls_examples_what_they_are():
    records = [record(None), record(Setting(chips=Chips(device=Device.preset("techA"), chips=2)), chip_accuracies=(90.0, 90.0), chance=1.5)]
    for kind, word, other in (("test images", "images", "examples"), ("windows of text", "examples", "images")):
        text = settings_table(records, 100, kind)
        said = " ".join(text.split())
        assert f" {word}/s\n" in text and f"changed: {word} that are classified" in text and f"100 {kind}\n" in text
        assert said.endswith(f"2 chips the choice of {word}, which all chips share, adds a standard deviation of 1.50 to a difference")
        assert other not in text


def test_a_table_says_what_the_deviation_of_chips_leaves_out():
    """The smallest and the largest chance of settings with chips; nothing where none is known."""
    chips = Setting(chips=Chips(device=Device.preset("techA"), chips=2))
    records = [record(None), *(record(chips, chip_accuracies=(90.0, 90.0), chance=chance) for chance in (3.0, 0.5, 1.0)), record(chance=9)]
    assert "a standard deviation of 0.50 to 3.00 to a difference" in " ".join(settings_table(records, 100, "test images").split())
    text = settings_table([record(None), record(chips, chip_accuracies=(90.0, 90.0))], 100, "test images")
    assert text.endswith("\nwith a device: mean, deviation and lowest of 2 chips")


def test_a_table_says_once_what_all_settings_share():
    """A row has what differs; of one setting all is in its row."""
    specs = [CrossbarSpec(cell_bits=cells, rows=64, **more) for cells, more in ((1, {}), (2, {}), (2, {"mapping": "im2col"}))]
    text = settings_table([record(None), *(record(Setting(spec)) for spec in specs)], 100, "test images")
    assert text.splitlines()[0] == "all settings: 6-bit ADC, calibrated, rows 64"
    assert [line.split("   ")[0] for line in text.splitlines()[3:7]] == [
        "software", "1-bit cells", "2-bit cells", "2-bit cells, mapping im2col"]
    text = settings_table([record(None), record(Setting(specs[0]))], 100, "test images")
    assert text.startswith("setting ") and "\n1-bit cells, 6-bit ADC, calibrated, rows 64   " in text
    assert in_common(["a, b, c", "c, b", "b, d, c"]) == ("b, c", ["a", "otherwise default", "d"])
    chips = Chips(device=Device.preset("techA", time="1h"))
    text = settings_table([record(None), record(), record(Setting(chips=chips))], 100, "test images")
    assert "\nideal cells " in text and "\ntechA at 1h " in text


def wide_settings():
    """Devices, times, layers of their own, plans: each with all that a name can say."""
    for device in ("techA", "neurosim_tsinghua_130nm"):
        for time in ("1s", "100000s"):
            layers = {f"features.{i}.block.*": {"adc_bits": 3, "cell_bits": 1, "rows": 64} for i in range(5)}
            spec = CrossbarSpec(cell_bits=2, adc_bits=1.25, adc_plan="ones", rows=256, mapping="im2col", dac_bits=2, weights="pair")
            chips = Chips(device=Device.preset(device, time=time if device == "techA" else None), chips=3, read_noise=0.5, adc_noise=0.25,
                          adc_offset=0.5, adc_gain=0.01, wire_ohm=2.0, row_ohm=1.0, driver_ohm=100.0)
            yield Setting(spec, chips=chips, per_layer=layers if time == "1s" else {})


@pytest.mark.parametrize("converted", [False, True])
def test_tables_fit_a_terminal(converted):
    """However many columns there are: those that do not fit stand below, under the same names; none is lost."""
    of_float = {"float_accuracy": 97.0, "float_changes": 4321} if converted else {}
    records = [record(None, 95.0, **of_float), *(record(each, mean_bits=1.25, conversions=0.4, chip_accuracies=(1.0, 2.0, 99.0), **of_float)
                                                 for each in dict.fromkeys(wide_settings()))]
    if converted:
        records.insert(0, record(None, 97.0, is_float=True, float_accuracy=97.0, float_changes=0))
    text = settings_table(records, 100, "test images")
    assert max(map(len, text.splitlines())) <= WIDTH
    assert all(text.count(word) >= 1 + converted for word in ("setting ", "\n" + str(records[0])))
    assert all(word in text for word in ("converted", "deviation", "lowest", "changed", "images/s", "neurosim_tsinghua_130nm"))
    assert text.count("90.00") == len(records) - 1 - converted


def test_a_table_that_is_too_wide():
    """Headers below one another, then names, then columns in a table below; one that fits stays as it is."""
    head = ["name", "two words", "b"]
    assert text_table(head, [["x", "1", "2"]]) == "name   two words   b\n--------------------\nx              1   2"
    for length, lines in ((84, 3), (86, 3), (90, 4), (91, 5)):  # beside 9 and 1, two gaps of 3; of 2; beside 5 and 1; names of two lines
        name = "all but the last, " + "x" * (length - 18)
        found = text_table(head, [[name, "1", "2"]]).splitlines()
        assert len(found) == lines and max(map(len, found)) <= WIDTH and ("two words" in found[0]) == (lines == 3)
    assert found[1].split() == ["name", "words", "b"] and found[3].split() == ["all", "but", "the", "last,", "1", "2"]
    assert found[4] == "  " + "x" * 73
    first, second = text_table(["name", *"abcdefgh"], [["x", *["0" * 15] * 8]]).split("\n\n")
    assert first.split()[0] == second.split()[0] == "name" and first.count("0" * 15) + second.count("0" * 15) == 8
    assert first.splitlines()[-1][0] == second.splitlines()[-1][0] == "x" and len(first.splitlines()[0]) <= WIDTH


def entry(**more):
    """Of `--report`: a layer of one slice."""
    of_slice = {"slice": 0, "reachable": (-8, 8), "seen": (-4, 5), "delta": 0.5, "q_min": -4, "codes_used": 0.75, "clipped": 0.0125,
                "values": [-2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5], "sqnr_db": 20.0, "histogram": [1, 2, 3], **more}
    return {"layer": "a", "row_blocks": 2, "fill": 0.5, "all_zero_reads": 0.1, "output_sqnr_db": 30.0, "unit": 1.0, "u_min": -1,
            "adc_bits": 3, "mean_bits": 2.5, "slices": [of_slice], "sqnr_over_adc_bits": {4: 20.0}}


def test_columns_of_the_report():
    assert report.layers_table([entry()]).split("\n")[0].split() == "layer row blocks fill idle reads output dB".split()
    of_layer, of_slice = (table.splitlines()[-1].split() for table in report.layers_table([entry()]).split("\n\n"))
    assert of_layer == ["a", "2", "50%", "10.0%", "30.0"]
    assert of_slice == ["a", "0", "-8..8", "-4..5", "0.5", "75%", "1.25%", "20.0"]


def test_levels_and_bits_in_the_reports_picture():
    axes = drawing.new_figure(4, 4).subplots()
    report._reads_panel(axes, entry())
    assert [line[0][0] for line in axes.collections[0].get_segments()] == [0.5 * q for q in range(-4, 4)]
    axes, planned = drawing.new_figure(4, 4).subplots(), entry(bits=[1, 2, 3])
    planned["slices"].append(planned["slices"][0] | {"slice": 1, "bits": [4, 5, 6]})
    report._plan_panel(axes, planned, 6)
    written = {tuple(map(int, text.get_position())): text.get_text() for text in axes.texts}
    assert written == {(k, z): str(1 + z + 3 * k) for k in (0, 1) for z in (0, 1, 2)}


def by_ones():
    """A layer of two slices and digits, whose bits depend on n: 0, 1, 2 to 3, 4 and more, which no read of the first digit has."""
    of_ones = entry(bits=[[0, 0, 1, 2], [0, 3, 4, 4]])
    of_ones["slices"].append(of_ones["slices"][0] | {"slice": 1, "bits": [[0, 2, 2, 3], [0, 4, 5, 6]]})
    return of_ones | {"mean_bits": 1.25, "shares": [[0.5, 0.3, 0.2, 0], [0.1, 0.2, 0.3, 0.4]]}


def test_bits_by_ones_in_the_reports_table():
    head, _, first, second, below = report.layers_table([by_ones()]).split("\n\n")[1].splitlines()
    assert "bits by digit" in head and below == "bits by digit, of n = 1, 2-3, 4-7, ..."
    assert first.split()[4:6] == ["012", "344"] and second.split()[3:5] == ["223", "456"]
    wide = by_ones()
    wide["slices"][1]["bits"] = [[0, 2, 2, 3], [0, 9, 10, 12]]
    assert report.layers_table([wide]).splitlines()[-2].split()[3:5] == ["2,2,3", "9,10,12"]
    many = by_ones() | {"layer": "encoder.layers.encoder_layer_11.self_attention.out_proj.crossbar"}
    many["slices"][0]["bits"] = [[0, *[10] * 8]] * 8
    assert max(map(len, report.layers_table([many]).splitlines())) <= WIDTH


def test_bits_by_ones_in_the_reports_picture(tmp_path, drawn):
    """In each field a bar for each class but that of idle reads, with its number, from left to right, none over another or a border; of a
    class that no read has it is gray."""
    report.report_plot(tmp_path / "a.png", "title", [by_ones(), entry(bits=[6, 2]) | {"mean_bits": 3.0}], 2)
    [figure] = drawn
    axes, plain = figure.axes[:2]
    bits = np.array([[[0, 1, 2], [2, 2, 3]], [[3, 4, 4], [4, 5, 6]]])
    figure.draw_without_rendering()
    bars = np.array([bar.get_window_extent().extents for bar in axes.patches]).reshape(2, 2, 3, 4)  # digit, slice, class; x0 y0 x1 y1
    heights = bars[..., 3] - bars[..., 1]
    np.testing.assert_allclose(heights[bits > 0] / heights[1, 1, 2], bits[bits > 0] / 6, rtol=1e-6)
    assert 0 < heights[0, 0, 0] < heights[bits == 1].min() / 2
    assert (bars[..., :-1, 2] < bars[..., 1:, 0]).all() and (bars[:, 0, -1, 2] < bars[:, 1, 0, 0]).all()
    assert (bars[0, ..., 3].max() < bars[1, ..., 1].min()) and {text.get_text() for text in axes.texts} == set("123456")
    boxes = [text.get_window_extent() for text in axes.texts]
    assert len(boxes) == 11 and not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    assert all(axes.get_window_extent().y1 > box.y1 and not box.overlaps(bar.get_window_extent().padded(-1))
               for box in boxes for bar in axes.patches)
    colors = [bar.get_facecolor() for bar in axes.patches]
    gray = [color[0] == color[1] == color[2] for color in colors]
    assert gray == [False, False, True] * 2 + [False] * 6
    assert axes.get_title() == "a: 1.25 bits" and plain.get_title() == "a: 3.00 bits" and len(plain.texts) == 2
    assert "n = 1, 2 to 3, 4 to 7" in " ".join(figure.get_supxlabel().split()) and "has 6 bits" in figure.get_supxlabel()
    report.report_plot(tmp_path / "b.png", "title", [entry()], 2)
    assert not drawn[1].get_supxlabel()
    report.report_plot(tmp_path / "c.png", "title", [entry(bits=[0, 2])], 2)
    assert [text.get_text() for text in drawn[2].axes[0].texts] == ["-", "2"] and "a dash: they are not converted" in " ".join(
        drawn[2].get_supxlabel().split())


@pytest.mark.parametrize("words", [3, 60, 400])
def test_titles_fit_into_their_figure(words, drawn, tmp_path):
    """In one line, as long as that can be read."""
    report.report_plot(tmp_path / "a.png", "word " * words, [entry()], 2)
    drawn[0].draw_without_rendering()
    title, figure = drawn[0]._suptitle, drawn[0].bbox
    box = title.get_window_extent()
    assert figure.x0 <= box.x0 and box.x1 <= figure.x1 and box.y1 <= figure.y1
    assert ("\n" in title.get_text()) == (words == 400) and title.get_fontsize() >= drawing.SMALLEST


def test_dollars_in_a_title_are_no_mathematics(drawn, tmp_path):
    report.report_plot(tmp_path / "a.png", "runs/$a^^b$/net.pt", [entry()], 2)
    drawn[0].draw_without_rendering()
    assert drawn[0]._suptitle._preprocess_math(drawn[0]._suptitle.get_text()) == ("runs/$a^^b$/net.pt", False)


def test_accuracy_over_bits_is_over_those_of_the_reads(drawn, tmp_path):
    """Beside the software's line."""
    records = [record(Setting(CrossbarSpec(adc_bits=bits)), accuracy, mean_bits=bits / 2) for bits, accuracy in ((4, 80), (6, 90))]
    report.accuracy_plot(records, "title", tmp_path)
    line, software = drawn[0].axes[0].lines
    assert line.get_xydata().tolist() == [[2, 80], [3, 90]] and software.get_ydata()[0] == 95.0
    report.accuracy_plot([replace(each, float_accuracy=97.0) for each in records], "title", tmp_path)
    *_, software, original = drawn[1].axes[0].lines
    assert [(each.get_label(), each.get_ydata()[0]) for each in (software, original)] == [("quantized", 95.0), ("float", 97.0)]
    report.accuracy_plot([replace(each, float_accuracy=95.0) for each in records], "title", tmp_path)
    *_, both = drawn[2].axes[0].lines
    assert both.get_label() == "quantized and float" and len(drawn[2].axes[0].lines) == 2


def test_a_line_under_another_shows_on_both_sides_of_it(drawn, tmp_path):
    """Three curves, the first below the last; the legend says once what they share, and what the bands are."""
    records = [record(Setting(CrossbarSpec(cell_bits=cells, adc_bits=bits)), accuracy + bits, mean_bits=bits, chance=2.0)
               for cells, accuracy in ((1, 80), (2, 70), (4, 80)) for bits in (4, 6)]
    report.accuracy_plot(records, "title", tmp_path)
    first, *others, _, mark, _, part = drawn[0].axes[0].lines  # behind software two marks and what is between them
    assert part.get_xydata().tolist() == first.get_xydata().tolist() and mark.get_xydata().tolist() == [[4, 84]]
    assert part.get_linewidth() > 2 * first.get_linewidth() and mark.get_markersize() > 1.3 * first.get_markersize()
    assert {part.get_color(), mark.get_color()} == {first.get_color()} and len(others) == 2
    assert all(each.get_zorder() < first.get_zorder() and each.get_label().startswith("_") for each in (part, mark))
    legend = drawn[0].axes[0].get_legend()
    assert legend.get_title().get_text() == "all settings: calibrated"
    assert [text.get_text() for text in legend.get_texts()] == [
        "1-bit cells", "2-bit cells", "4-bit cells", "software", "band: standard deviation by the choice of examples"]
    axes = drawing.new_figure(4, 4).subplots()
    lines = [*axes.plot([0, 1, 2], [0, 1, 2]), *axes.plot([1, 2], [1, 0])]  # one mark in common is no part of a line
    drawing.show_hidden(axes, lines, whole=True)
    assert len(axes.lines) == 2
    drawing.show_hidden(axes, lines)
    assert [line.get_xydata().tolist() for line in axes.lines[2:]] == [[[1, 1]]]


def test_no_read_noise_is_read_noise_of_0():
    chips = [Chips(device=Device.preset("techA"), read_noise=noise) for noise in (None, 1.0)]
    [points] = report._sweep([record(Setting(chips=each)) for each in chips], "read_noise").values()
    assert [x for x, _ in points] == [0, 1]


@pytest.mark.parametrize("weights", ["offset", "pair"])
def test_the_report_of_a_chip(drawn, weights, tmp_path):
    """Columns of its table; shares of cells, conductances of pairs, bars beside and on top of each other in its picture."""
    shares, device = {source: 0.1 * (i + 1) for i, source in enumerate(chip_report.SOURCES)}, Device.preset("techA")
    losses = [{"layer": "a", "scatter": 0.25, "far": 0.125, "adc": 10.0, "cells": 20.0, "both": 30.0, "chip": 40.0, "all": 5.0,
               "shares": shares}]
    assert chip_report.losses_table(losses).splitlines()[2].split() == ["a", "0.250", "12.50%", "10.0", "20.0", "30.0", "40.0"]
    slices = [{"slice": 0, "bits": 1, "edges": [-1, 0, 1], "levels": [
        {"level": level, "cells": cells, "histogram": [cells, 0]} for level, cells in ((0, 1), (1, 3))]}]
    chip_report.plot(tmp_path, "title", "a", slices, losses, device, CrossbarSpec(weights=weights))
    cells, bars, stacked = [axes for axes in drawn[0].axes if axes.get_title()]
    assert [max(patch.get_data().values) for patch in cells.patches if patch.get_fill()] == [0.25, 0.75]
    assert cells.child_axes[0]._functions[0](0.0) == (0.0 if weights == "pair" else device.g_min)
    assert [bar.get_height() for bar in bars.patches] == [10, 20, 30, 40]
    np.testing.assert_allclose([bar.get_y() for bar in stacked.patches], np.cumsum([0, *(100 * share for share in shares.values())])[:-1])


def test_what_takes_error_away_hangs_below_0(drawn, tmp_path):
    shares = {"quantization": 0.25, "scatter": 2.0, "wires": 0.0, "noise": -0.5, "adc": -0.75}
    losses = [{"layer": "a", "scatter": 0.2, "far": 0.1, "adc": 10.0, "cells": 2.0, "both": 3.0, "chip": 4.0, "all": 5.0, "shares": shares}]
    assert chip_report.losses_table(losses).split("\n\n")[1].splitlines()[2].split() == [
        "a", "5.0", "25.0%", "200.0%", "-50.0%", "-75.0%"]
    slices = [{"slice": 0, "bits": 1, "edges": [0, 1], "levels": [{"level": 0, "cells": 1, "histogram": [1]}]}]
    chip_report.plot(tmp_path, "title", "a", slices, losses, None, CrossbarSpec())
    axes = drawn[0].axes[-1]
    assert [(bar.get_y(), bar.get_height()) for bar in axes.patches] == [(0, 25), (25, 200), (0, -50), (-50, -75)]
    low, high = axes.get_ylim()
    assert low < -125 and high > 225
