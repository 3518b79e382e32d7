"""What `eval.py --cost` shows and writes: a table of each setting's layers, cost.json, cost.csv, pictures."""

import csv
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from models import quant
from models.quant.cost import Band, CostReport, LayerCost, Origin, Technology
from models.quant.cost.estimate import AREA, ENERGY
from models.quant.files import atomic_write

from .costs import figures
from .drawing import add_legend, colormap, height_of_names, label_decades, new_figure, save, width_of_names, wrapped
from .evaluation import Record
from .report import band_text, band_words, bands, text_table

MICRO = 1e6
COLUMNS = 3  # panels beside one another


def write(records: Sequence[Record], technology: Technology, title: str, folder: Path, network: nn.Module) -> list[Path]:
    """Write cost.json, cost.csv and the pictures of the records that have costs. Args: network, what they are of: of converted ones
    layers have bits of their own. Returns: the paths."""
    costed = [record for record in records if record.cost]
    if not costed:
        return []
    paths = [folder / name for name in ("cost.json", "cost.csv", "cost_by_layer.png", "accuracy_over_energy.png")]
    content = {"technology": _content(technology), "settings": [_setting(record) for record in costed]}
    atomic_write(paths[0], lambda file: file.write(json.dumps(content).encode()))
    atomic_write(paths[1], lambda file: file.write(_csv(costed, network).encode()))
    title = f"{title}\n{technology.name}, typical sources; from the cheapest to the dearest ones:"
    by_layer(paths[2], costed, f"{title} whiskers")
    accuracy_over_energy(paths[3], costed, f"{title} bars; whiskers: {band_words(costed)}")
    return paths


def _content(technology: Technology) -> dict[str, Any]:
    lines = [{"component": component, "value": source.value, "law": source.law, "bits": source.bits, "node_nm": source.node,
              "source": source.text} for component, sources in technology.sources.items() for source in sources]
    return {"name": technology.name, "note": technology.note, "si_units": True,
            **{name: value for name, value in asdict(technology).items() if name not in ("name", "note", "sources")}, "sources": lines}


def _setting(record: Record) -> dict[str, Any]:
    cost = record.cost
    return {
        "setting": str(record.setting), "spec": asdict(record.setting.spec), "per_layer": record.setting.per_layer,
        "crossbar_layers": record.setting.crossbar_layers,
        "device": record.setting.chips and record.setting.chips.name, "accuracy": record.accuracy, "n_images": record.n_images,
        **figures(cost), "digital": cost.digital, "leakage_W": cost.leakage, "interval_s": cost.interval,
        **{key: {part: [getattr(origin, name) for origin in origins] for part, origins in cost.sources.items()}
           for key, name in (("sources_of_ends", "text"), ("values_of_ends", "value"))},
        "layers": [{"layer": layer.name, "energy_J": layer.energy, "area_m2": layer.area, "latency_s": layer.latency,
                    "utilisation": layer.utilisation, "events": asdict(layer.events)} for layer in cost.layers]}


def _csv(records: Sequence[Record], network: nn.Module) -> str:
    """A line for each setting, layer, quantity and component."""
    text, on_crossbars = io.StringIO(), dict(quant.crossbar_layers(network))
    spec = list(asdict(records[0].setting.spec))
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["setting", "technology", *spec, "accuracy", "layer", "quantity", "component", "low", "typical", "high"])
    for record in records:
        for layer in record.cost.layers:
            hardware = asdict(on_crossbars[layer.name].fitted(record.setting.spec_of(layer.name))).values()
            for line in _lines(layer):
                writer.writerow([str(record.setting), record.cost.technology, *hardware, record.accuracy, layer.name, *line])
    return text.getvalue()


def _lines(layer: LayerCost) -> Iterator[tuple]:
    for quantity, values in (("energy_uJ", layer.energy), ("area_mm2", layer.area), ("latency_us", {"all": layer.latency})):
        for component, band in values.items():
            yield quantity, component, *band.scaled(MICRO)


def layers_table(cost: CostReport) -> str:
    """One line a layer, then the components of the energy, and what is not in it."""
    rows = []
    for layer in cost.layers:
        done = layer.events
        conversions = sum(done.made.values())
        bits = sum(b * n for b, n in done.made.items()) / conversions if conversions else 0
        rows.append([layer.name, str(done.arrays), f"{layer.utilisation:.0%}", f"{done.idle_reads / done.reads:.1%}",
                     f"{conversions / cost.images:.3g}", f"{bits:.3g}", *_texts(sum(layer.energy.values(), Band(0, 0, 0)), layer.latency,
                                                                               sum(layer.area.values(), Band(0, 0, 0)))])
    rows.append(["all", str(sum(layer.events.arrays for layer in cost.layers)), f"{cost.utilisation:.0%}", "", "", "",
                 *_texts(cost.energy, cost.latency, cost.area)])
    header = ["layer", "arrays", "used", "idle reads", "conversions", "bits", "energy uJ", "latency us", "area mm2"]
    parts = [f"{part} {band_text(band.scaled(MICRO))}" for part, band in cost.energy_by_component.items()]
    digital = [f"not in it, computed without an ADC: {', '.join(cost.digital)}"] if cost.digital else []
    return "\n".join([text_table(header, rows), f"energy of an image, uJ: {', '.join(parts)}", *digital])


def sources_table(records: Sequence[Record]) -> str:
    """Which sources make the typical values and the ends of the records' costs: a line for each part and source, and for each precision
    of the ADC where others make the ends with it."""
    found: dict[str, dict[tuple[Origin, ...], set[float]]] = {}
    for record in records:
        for part, origins in record.cost.sources.items():
            found.setdefault(part, {}).setdefault(origins, set()).add(record.setting.spec.adc_bits)
    rows = []
    for part, ways in found.items():
        for (low, typical, high), bits in ways.items():
            name = part if len(ways) == 1 else f"{part}, {' '.join(f'{b:g}' for b in sorted(bits))}-bit ADC"
            roles: dict[Origin, list[str]] = {}
            for origin, role in ((typical, "typical"), (low, "cheapest"), (high, "dearest")):
                roles.setdefault(origin, []).append(role)
            for i, (origin, its) in enumerate(roles.items()):
                rows.append(["" if i else name, " and ".join(its) if len(roles) > 1 else "one source", short(origin.text), origin.value])
    return "\n".join([text_table(["part", "", "source", "value"], rows), "a value for one number of bits is taken to others as it says, "
                      "/bit or /level, else in proportion to bits"])


def short(source: str) -> str:
    """The name of a source, without what it says."""
    return source.split(":")[0].split(" (")[0]


def _texts(energy: Band, latency: Band, area: Band) -> list[str]:
    return [band_text(band.scaled(MICRO)) for band in (energy, latency, area)]


def by_layer(path: Path, records: Sequence[Record], title: str) -> None:
    """A row of two panels for each setting: energy and area of its layers, a color for each component."""
    rows, names = len(records), [layer.name for layer in max((record.cost.layers for record in records), key=len)]
    width = max(5.5, width_of_names(names) + 0.8)  # of a panel
    turned = height_of_names(names, width - 0.8)
    figure = new_figure(2 * width, 0.6 + (2.6 + turned) * rows)
    panels = figure.subplots(rows, 2, squeeze=False)
    for (left, right), record in zip(panels, records):
        _stacked(left, record.cost.layers, "energy", ENERGY, "energy of an image (uJ)")
        _stacked(right, record.cost.layers, "area", AREA, "area (mm2)")
        left.set_title(wrapped(str(record.setting), figure.get_figwidth()), fontsize="small", loc="left")
        for axes in (left, right) if turned else ():
            axes.tick_params("x", rotation=90)
    for axes in panels[0]:
        axes.set_ylim(top=1.25 * axes.get_ylim()[1])  # room for the legend
        axes.legend(fontsize="x-small", ncols=4, loc="upper right")
    figure.suptitle(wrapped(title, figure.get_figwidth()), fontsize="small")
    save(figure, path, dpi=100)


def _stacked(axes: Any, layers: Sequence[LayerCost], name: str, parts: Sequence[str], label: str) -> None:
    names = [layer.name for layer in layers]
    bottom, ends = np.zeros(len(layers)), np.zeros((3, len(layers)))
    for i, part in enumerate(parts):
        values = MICRO * np.array([getattr(layer, name)[part] for layer in layers]).T
        axes.bar(names, values[1], bottom=bottom, label=part, color=colormap("tab10")(i))
        bottom, ends = bottom + values[1], ends + values
    axes.errorbar(names, ends[1], [np.maximum(ends[1] - ends[0], 0), np.maximum(ends[2] - ends[1], 0)], fmt="none", color="black",
                  linewidth=0.8, capsize=2)
    axes.set_ylabel(label, fontsize="small")
    axes.tick_params(labelsize="x-small")


def accuracy_over_energy(path: Path, records: Sequence[Record], title: str) -> None:
    """Accuracy over the energy of an image, a line for all settings that differ in the ADC's precision only."""
    figure = new_figure(7.5, 4.8)
    axes = figure.subplots()
    curves: dict[str, list[Record]] = {}
    for record in records:
        bits = f"{record.setting.spec.adc_bits:g}-bit ADC, "
        curves.setdefault(str(record.setting).replace(bits, ""), []).append(record)
    for i, (curve, points) in enumerate(curves.items()):
        points = sorted(points, key=lambda record: record.setting.spec.adc_bits)
        low, typical, high = MICRO * np.array([record.cost.energy for record in points]).T
        accuracy, lower, upper = bands(points)
        color = colormap("tab10" if len(curves) <= 10 else "tab20")(i % 20)
        axes.errorbar(typical, accuracy, [accuracy - lower, upper - accuracy], color=color, marker="o", markersize=4, linewidth=1.2,
                      elinewidth=0.6, capsize=2, label=curve)
        axes.hlines(accuracy, low, high, color=color, alpha=0.25, linewidth=2.5)
        for x, y, record in zip(typical, accuracy, points):
            text = f"{record.setting.spec.adc_bits:g}"
            axes.annotate(text, (x, y), (3, -9), textcoords="offset points", fontsize="xx-small", color=color)
    axes.axhline(records[0].software_accuracy, color="black", linestyle="--", linewidth=1, label="software")
    axes.set(xscale="log", xlabel="energy of an image (uJ); beside each point the ADC's bits", ylabel="accuracy (%)")
    label_decades(axes)
    axes.set_title(wrapped(title, figure.get_figwidth()), fontsize="small")
    axes.grid(alpha=0.3, which="both")
    add_legend(figure, axes, "lower right")
    save(figure, path, dpi=150)
