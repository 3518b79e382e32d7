"""Tables and pictures: what stands in which column, on which axis, at which place."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from experiment.report import chip_report, drawing, report
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
    lines = report.settings_table(records, 100, "test images").splitlines()
    assert lines[0].split() == "setting accuracy % to float changed to quantized changed images/s".split()
    assert lines[4].split()[-6:] == ["90.00", "-7.00", "7", "-5.00", "4", "100"]


def entry(**more):
    """Of `--report`: a layer of one slice."""
    of_slice = {"slice": 0, "reachable": (-8, 8), "seen": (-4, 5), "delta": 0.5, "q_min": -4, "codes_used": 0.75, "clipped": 0.0125,
                "values": [-2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5], "sqnr_db": 20.0, "histogram": [1, 2, 3], **more}
    return {"layer": "a", "arrays": 2, "fill": 0.5, "all_zero_reads": 0.1, "output_sqnr_db": 30.0, "unit": 1.0, "u_min": -1,
            "adc_bits": 3, "mean_bits": 2.5, "slices": [of_slice], "sqnr_over_adc_bits": {4: 20.0}}


def test_columns_of_the_report():
    _, _, line = report.layers_table([entry()]).splitlines()
    assert line.split() == ["a", "2", "50%", "10.0%", "0", "-8..8", "-4..5", "0.5", "75%", "1.25%", "20.0", "30.0"]


def test_levels_and_bits_in_the_reports_picture():
    axes = drawing.new_figure(4, 4).subplots()
    report._reads_panel(axes, entry(), legend=True)
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
    head, _, first, second = report.layers_table([by_ones()]).splitlines()
    assert "bits by digit, of n = 1, 2-3, 4-7, ..." in head
    assert first.split()[7:9] == ["012", "344"] and second.split()[3:5] == ["223", "456"]
    wide = by_ones()
    wide["slices"][1]["bits"] = [[0, 2, 2, 3], [0, 9, 10, 12]]
    assert report.layers_table([wide]).splitlines()[3].split()[3:5] == ["2,2,3", "9,10,12"]


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


def test_accuracy_over_bits_is_over_those_of_the_reads(drawn, tmp_path):
    """Beside the software's line."""
    records = [record(Setting(CrossbarSpec(adc_bits=bits)), accuracy, mean_bits=bits / 2) for bits, accuracy in ((4, 80), (6, 90))]
    report.accuracy_plot(records, "title", tmp_path)
    line, software = drawn[0].axes[0].lines
    assert line.get_xydata().tolist() == [[2, 80], [3, 90]] and software.get_ydata()[0] == 95.0
    report.accuracy_plot([replace(each, float_accuracy=97.0) for each in records], "title", tmp_path)
    *_, software, original = drawn[1].axes[0].lines
    assert [(each.get_label(), each.get_ydata()[0]) for each in (software, original)] == [("software", 95.0), ("float network", 97.0)]


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
    assert chip_report.losses_table(losses).splitlines()[8].split() == ["a", "5.0", "25.0%", "200.0%", "-50.0%", "-75.0%"]
    slices = [{"slice": 0, "bits": 1, "edges": [0, 1], "levels": [{"level": 0, "cells": 1, "histogram": [1]}]}]
    chip_report.plot(tmp_path, "title", "a", slices, losses, None, CrossbarSpec())
    axes = drawn[0].axes[-1]
    assert [(bar.get_y(), bar.get_height()) for bar in axes.patches] == [(0, 25), (25, 200), (0, -50), (-50, -75)]
    low, high = axes.get_ylim()
    assert low < -125 and high > 225
