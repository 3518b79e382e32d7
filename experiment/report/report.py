"""What people look at: pictures of many settings as PNG, and the report of `eval.py --report` on one."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from models.quant.devices.times import show_time
from models.quant.measuring.measure import Record
from models.quant.measuring.metrics import AGAINST_FLOAT

from ..measure.columns import has_a_mean
from ..settings.chips import IDEAL
from .drawing import add_legend, add_note, add_title, colormap, new_figure, save, show_hidden
from .tables import in_common, text_table

# ---- pictures of many settings -----------------------------------------------------------------------------------------

SWEPT = {"device_time": "time since the first read or programming", "device_temp": "temperature (C)",
         "sigma": "deviation of every cell (% of the range of levels)",
         "on_off": "on/off ratio of the cells",
         "stuck_on": "probability that a cell is stuck on", "stuck_off": "probability that a cell is stuck off",
         "read_noise": "read noise of a cell (uS)", "adc_noise": "noise of the ADC (levels)",
         "adc_offset": "deviation of ADC offsets (levels)", "adc_gain": "relative deviation of ADC gains",
         "adc_inl": "deviation of the INL (LSB)", "adc_dnl": "deviation of the DNL (LSB)",
         "adc_mismatch": "relative deviation of a unit capacitor", "comparator_noise": "noise of the comparator (LSB)",
         "wire_ohm": "bit line from cell to cell (ohm)", "row_ohm": "word line from cell to cell (ohm)",
         "driver_ohm": "source of a word line (ohm)",
         "weight_noise": "noise on the weights (share of the largest of a channel)"}  # flags that have an axis, and its name


def plots(records: Sequence[Record], title: str, folder: str | Path) -> list[Path]:
    """The pictures that the settings of an evaluation make: accuracy, or what stands for it, over each value of chips, and over the ADC's
    precision, of which there are several. Args: records, without the software's. Returns: their paths."""
    made, metric = [], records[0].metric.name if records else ""
    for name in SWEPT:
        curves = _sweep(records, name)
        if curves:
            made.append(Path(folder, f"{metric}_over_{name}.png"))
            sweep_plot(curves, name, title, made[-1])
    points = [record for record in records if record.mean_bits is not None]  # of networks with an ADC
    if len({record.setting.spec.adc_bits for record in points}) > 1:
        made.append(Path(folder, f"{metric}_over_adc_bits.png"))
        accuracy_plot(points, title, made[-1])
    return made


def _sweep(records: Sequence[Record], name: str) -> dict[str, list[tuple[float, Record]]]:
    """`{curve: [(value, record), ...]}` of the settings that differ in this flag alone; empty where there are none. Ideal cells
    are those of the ideal device that has nothing of it."""
    curves: dict[str, list[tuple[float, Record]]] = {}
    for record in records:
        chips, text = record.setting.chips, record.setting.text(without=name)
        value = chips.value(name) if chips else 0.0
        value = 0.0 if value is None and name == "read_noise" else value
        if isinstance(value, (int, float)):
            curves.setdefault(text if chips else f"{text}, {IDEAL}", []).append((value, record))
    return {curve: sorted(points, key=lambda point: point[0]) for curve, points in curves.items() if len({x for x, _ in points}) > 1}


def sweep_plot(curves: Mapping[str, Sequence[tuple[float, Record]]], name: str, title: str, path: str | Path) -> None:
    """Accuracy over a value of chips, such as the device's time: a line a curve, with its band (`bands`)."""
    figure, axes = _axes("tab10" if len(curves) <= 10 else "tab20")
    shared, names = in_common([*curves])
    lines = [_curve(axes, name, [value for value, _ in points], [record for _, record in points])
             for name, points in zip(names, curves.values())]
    values = sorted({value for points in curves.values() for value, _ in points})
    positive = [value for value in values if value > 0]
    if positive and values[-1] > 20 * positive[0] and name != "device_temp":
        if values[0] > 0:
            axes.set_xscale("log")
        else:  # 0 stands beside the smallest
            axes.set_xscale("symlog", linthresh=positive[0], linscale=0.5)
        axes.minorticks_off()
    named = name == "device_time" and len(values) <= 12
    if named:
        _name_times(axes, values)
    axes.set_xlabel(SWEPT[name] + (" (s)" if name == "device_time" and not named else ""))
    finish(figure, axes, lines, [record for points in curves.values() for _, record in points], title, shared, path)


def _name_times(axes: Any, values: Sequence[float]) -> None:
    """A tick at each time, with its name where that does not lie on the one before."""
    turned, end, names = len(values) > 6, -1.0, []
    axes.get_xlim()  # which the places follow from
    places = axes.transAxes.inverted().transform(axes.transData.transform([(value, 0) for value in values]))[:, 0]
    for value, place in zip(values, places):
        half = 0.02 if turned else 0.007 * len(show_time(value)) + 0.005  # of the width that a name takes
        names.append(show_time(value) if place - half > end else "")
        end = place + half if names[-1] else end
    axes.set_xticks(values, names, rotation=45 if turned else 0)


def accuracy_plot(records: Sequence[Record], title: str, path: str | Path) -> None:
    """Accuracy over ADC bits, a line for all settings that differ in the ADC's precision only."""
    figure, axes = _axes()
    curves = curves_over_bits(records)
    shared, names = in_common([*curves])
    lines = [_curve(axes, name, [r.mean_bits for r in points], points) for name, points in zip(names, curves.values())]
    axes.set_xlabel("mean ADC bits of all reads" if any(map(has_a_mean, records)) else "ADC bits")
    axes.locator_params(axis="x", integer=True)
    finish(figure, axes, lines, records, title, shared, path)


def curves_over_bits(records: Sequence[Record]) -> dict[str, list[Record]]:
    """`{curve: records}` of the settings that differ in the ADC's precision only, that of single layers too, by their mean bits."""
    curves: dict[str, list[Record]] = {}
    for record in records:
        setting = record.setting
        others = {layer: {name: value for name, value in values if name != "adc_bits"} for layer, values in setting.per_layer}
        alike = replace(setting, per_layer={layer: values for layer, values in others.items() if values})
        name = str(alike).replace(f"{setting.spec.adc_bits:g}-bit ADC, ", "")
        own = any("adc_bits" in dict(values) for _, values in setting.per_layer)
        curves.setdefault(name + (", layers with bits of their own" if own else ""), []).append(record)
    return {name: sorted(points, key=lambda r: r.mean_bits) for name, points in curves.items()}


def _axes(colors: str = "tab20") -> tuple[Any, Any]:
    figure = new_figure(7, 4.5)
    axes = figure.subplots()
    axes.set_prop_cycle(color=colormap(colors).colors)
    return figure, axes


def _curve(axes: Any, name: str, x: Sequence[float], points: Sequence[Record]) -> Any:
    """Returns: its line."""
    accuracy, low, high = bands(points)
    if len(points) == 1:
        return axes.errorbar(x, accuracy, [accuracy - low, high - accuracy], marker="x", linestyle="", capsize=2, linewidth=1,
                             label=name).lines[0]
    line, = axes.plot(x, accuracy, marker="o", label=name)
    axes.fill_between(x, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    return line


def bands(records: Sequence[Record]) -> np.ndarray:
    """Accuracy, or what stands for it, lower and upper end of the band of each record (`Record.band`), `[3, N]`; no band of percents goes
    below nothing or beyond all."""
    accuracy, band = np.array([(record.accuracy, record.band) for record in records]).T
    low, high = accuracy - band, accuracy + band
    if records[0].metric.unit == "%":
        low, high = np.maximum(low, np.minimum(accuracy, 0)), np.minimum(high, np.maximum(accuracy, 100))
    return np.stack([accuracy, low, high])


def band_words(records: Sequence[Record]) -> list[str]:
    """What the bands of a picture are, as a note; none where they have no width."""
    chips = max(len(record.chip_accuracies or ()) for record in records)
    causes = [*([f"over {chips} chips"] if chips > 1 else []),
              *(["by the choice of examples"] if any(record.chance is not None for record in records) else [])]
    return [f"standard deviation {' and '.join(causes)}"] if causes else []


def draw_software(axes: Any, record: Record) -> None:
    """Lines at the accuracy without ADCs and, of a network that was converted, at that of the float network; one where they are equal. None
    at that of a float network that is compared with itself."""
    found = {record.software_accuracy: ["software" if record.float_accuracy is None else "quantized"]}
    if record.float_accuracy is not None and record.metric != AGAINST_FLOAT:
        found.setdefault(record.float_accuracy, []).append("float")
    for (accuracy, names), look in zip(found.items(), ({"color": "black", "linestyle": "--", "linewidth": 1},
                                                       {"color": "dimgray", "linestyle": ":", "linewidth": 1.2})):
        axes.axhline(accuracy, label=" and ".join(names), **look)


def finish(figure: Any, axes: Any, lines: Sequence[Any], records: Sequence[Record], title: str, shared: str, path: str | Path,
           notes: Sequence[str] = (), below: bool = False) -> None:
    """What pictures of accuracy have in common: the software's, lines that others hide, title and legend. Args: shared, what all settings
    say; notes, what is to be known, by default what the bands are; below, see `add_legend`."""
    draw_software(axes, records[0])
    show_hidden(axes, lines)
    axes.set_ylabel(records[0].metric.axis)
    axes.grid(alpha=0.3, which="both")
    add_title(figure, title)
    add_legend(figure, axes, shared and f"all settings: {shared}", notes or [f"band: {each}" for each in band_words(records)], below)
    save(figure, path, dpi=150)


# ---- the report of one setting ---------------------------------------------------------------------------------------


def db(value: float | None) -> str:
    """Decibels as tables show them."""
    return "exact" if value is None else f"{value:.1f}"


def _is_planned(entry: Mapping[str, Any]) -> bool:
    """Whether a layer of a report has a plan."""
    return "bits" in entry["slices"][0]


def _has_classes(entry: Mapping[str, Any]) -> bool:
    """Whether its bits depend on n."""
    return "shares" in entry


def _bits_text(entry: Mapping[str, Any], bits: Sequence[Any]) -> str:
    """Those of each digit, by ones a number for each of n = 1, 2 to 3, 4 to 7, ..."""
    between = "," if np.max(bits) > 9 else ""
    return " ".join(between.join(map(str, digit[1:])) if _has_classes(entry) else str(digit) for digit in bits)


def layers_table(layers: Sequence[Mapping[str, Any]]) -> str:
    """A line for each layer, and a table with one for each slice. Args: layers, result of `models.quant.network.diagnostics.report`."""
    of_layers = [[entry["layer"], str(entry["row_blocks"]), f"{entry['fill']:.0%}", f"{entry['all_zero_reads']:.1%}",
                  db(entry["output_sqnr_db"])] for entry in layers]
    kinds = dict.fromkeys("bits by digit" if _is_planned(entry) else "step" for entry in layers)
    by_ones = "\nbits by digit, of n = 1, 2-3, 4-7, ..." if any(map(_has_classes, layers)) else ""
    of_slices = [[
        "" if s["slice"] else entry["layer"], str(s["slice"]), f"{s['reachable'][0]:g}..{s['reachable'][1]:g}",
        f"{s['seen'][0]:g}..{s['seen'][1]:g}", _bits_text(entry, s["bits"]) if _is_planned(entry) else f"{s['delta']:.4g}",
        f"{s['codes_used']:.0%}", f"{s['clipped']:.2%}", db(s["sqnr_db"])] for entry in layers for s in entry["slices"]]
    return "\n\n".join([
        text_table(["layer", "row blocks", "fill", "idle reads", "output dB"], of_layers),
        text_table(["layer", "slice", "reachable", "seen", " or ".join(kinds), "codes used", "clipped", "read dB"], of_slices)]) + by_ones


def report_plot(path: str | Path, title: str, layers: Sequence[Mapping[str, Any]], adc_bits: float) -> None:
    """One panel a layer: how often each partial sum occurs, and the ADC's levels, or the bits of a plan; then SQNR over ADC bits."""
    most = max((int(np.max(s["bits"])) for entry in layers if _is_planned(entry) for s in entry["slices"]), default=0)
    columns = 4
    rows = -(-(len(layers) + 1) // columns)
    figure = new_figure(4.2 * columns, 3.2 * rows)
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for entry, axes in zip(layers, panels):
        if _has_classes(entry):
            _classes_panel(axes, entry, most)
        elif _is_planned(entry):
            _plan_panel(axes, entry, most)
        else:
            _reads_panel(axes, entry)
    _sqnr_panel(panels[len(layers)], layers, adc_bits)
    for axes in panels[len(layers) + 1:]:
        axes.set_axis_off()
    add_title(figure, title, "large")
    slices = max((axes.get_legend_handles_labels() for axes in panels[:len(layers)]), key=lambda found: len(found[1]))
    if slices[1]:
        figure.legend(*slices, loc="outside right upper", fontsize="small", title="ticks:\nADC levels", title_fontsize="small")
    if any(map(_has_classes, layers)):
        add_note(figure, OF_CLASSES.format(most=most))
    elif any(map(_is_planned, layers)):
        add_note(figure, OF_PLANS)
    save(figure, path, dpi=120)


def _reads_panel(axes: Any, entry: Mapping[str, Any]) -> None:
    for s in entry["slices"]:
        counts = np.array(s["histogram"], dtype=float)
        v = entry["unit"] * (np.arange(len(counts)) + entry["u_min"])
        line, = axes.plot(v[counts > 0], (counts / counts.sum())[counts > 0], marker=".", markersize=3, linewidth=1,
                          label=f"slice {s['slice']}")
        place = 0.02 + 0.05 * s["slice"]  # of the panel's height: the slices' levels below one another
        axes.vlines(s["values"], place, place + 0.04, transform=axes.get_xaxis_transform(), color=line.get_color(), linewidth=1)
    low, high = min(s["seen"][0] for s in entry["slices"]), max(s["seen"][1] for s in entry["slices"])
    margin = 0.05 * (high - low) + entry["unit"]
    axes.set(title=entry["layer"], yscale="log", xlim=(low - margin, high + margin), xlabel="partial sum v",
             ylabel="share of reads")
    bottom, top = axes.get_ylim()
    axes.set_ylim(bottom / (top / bottom) ** 0.35, top)  # room for the levels


# What is written below pictures of plans by significance.
OF_PLANS = "in each field the bits of the ADC for the reads of this digit and slice; a dash: they are not converted"


def _plan_panel(axes: Any, entry: Mapping[str, Any], most: int) -> None:
    """Bits of each digit and slice of a layer, most significant at the upper right."""
    bits = np.array([s["bits"] for s in entry["slices"]]).T  # [digit, slice]
    axes.imshow(bits, origin="lower", cmap="Blues", vmin=0, vmax=max(most, 1), aspect="auto")
    for z, k in np.ndindex(*bits.shape):
        axes.text(k, z, str(bits[z, k]) if bits[z, k] else "-", ha="center", va="center",
                  color="white" if bits[z, k] > 0.6 * most else "black")
    _name_fields(axes, entry, bits.shape)


# What is written below pictures of plans by ones.
OF_CLASSES = ("in each field a bar for the reads of each class of n, the sum of the digits on their word lines, by its length in bits: "
              "n = 1, 2 to 3, 4 to 7, ... from left to right; the highest bar has {most} bits, a dash is no conversion; gray: no read had "
              "such an n")


def _classes_panel(axes: Any, entry: Mapping[str, Any], most: int) -> None:
    """The same by ones: in the field of each digit and slice a bar for each class of n but that of idle reads."""
    bits = np.array([s["bits"] for s in entry["slices"]]).transpose(1, 0, 2)[:, :, 1:]  # [digit, slice, class]
    digits, slices, classes = bits.shape
    width, colors = 0.88 / classes, colormap("Blues")
    numbered = 72 * 3.3 * width / slices >= 4  # points that a panel has for the number above a bar
    for z, k, j in np.ndindex(*bits.shape):
        b, x, ground = bits[z, k, j], k - 0.44 + width * (j + 0.5), z - 0.44
        color = colors(0.3 + 0.7 * b / max(most, 1)) if entry["shares"][z][j + 1] else "lightgray"
        axes.bar(x, 0.7 * b / max(most, 1) or 0.03, 0.85 * width, ground, color=color)
        if numbered and b:
            axes.text(x, ground + 0.7 * b / most, str(b), ha="center", va="bottom", fontsize=4.5)
    axes.set(xlim=(-0.5, slices - 0.5), ylim=(-0.5, digits - 0.5))
    for line, count in ((axes.axvline, slices), (axes.axhline, digits)):
        for place in range(count - 1):
            line(place + 0.5, color="gray", linewidth=0.5)
    _name_fields(axes, entry, bits.shape)


def _name_fields(axes: Any, entry: Mapping[str, Any], shape: Sequence[int]) -> None:
    """Title and axes of the fields of each digit and slice."""
    axes.set(title=f"{entry['layer']}: {entry['mean_bits']:.2f} bits", xlabel="slice of the weight", ylabel="digit of the input")
    axes.set_xticks(range(shape[1]))
    axes.set_yticks(range(shape[0]))


def _sqnr_panel(axes: Any, layers: Sequence[Mapping[str, Any]], adc_bits: int) -> None:
    many = len(layers) > len(colormap("tab10").colors)  # a legend of all of them would fill the panel
    colors = colormap("viridis")(np.linspace(0, 0.9, len(layers))) if many else colormap("tab10").colors
    lines = []
    for i, (entry, color) in enumerate(zip(layers, colors)):
        points = [(bits, db) for bits, db in entry["sqnr_over_adc_bits"].items() if db is not None]
        if points:
            name = entry["layer"] if not many or i in (0, len(layers) - 1) else None
            lines += axes.plot(*zip(*points), marker="o", markersize=3, color=color, label=name)
    axes.axvline(adc_bits, color="black", linestyle="--", linewidth=1, label="this setting")
    show_hidden(axes, lines, whole=True)
    axes.set(title="signal to quantization noise, uniform bits", xlabel="ADC bits", ylabel="SQNR of the reads (dB)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="x-small", title="from the first layer to the last" if many else None, title_fontsize="x-small")
