"""What `eval.py --cost` shows and writes: a table of each setting's layers, cost.json, cost.csv, pictures."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from models import quant
from models.quant.cost import Band, CostReport, Origin, Technology
from models.quant.cost.estimate import AREA, ENERGY, NOTHING
from models.quant.measuring.measure import Record
from models.quant.storage.files import write_text

from ..measure.columns import OF_COSTS, Measured, band_text, rounded
from ..measure.results import csv_text
from .drawing import add_note, add_title, colormap, label_decades, new_figure, save, wrapped
from .report import band_words, bands, finish
from .tables import in_common, note, text_table

MICRO = 1e6
NAMED = 20  # layers that a legend names
SOURCES = "part", "", "source", "value"
OF_OTHER_BITS = "a value for one number of bits is taken to others as it says, /bit or /level, else in proportion to bits"


def write(records: Sequence[Record], technology: Technology, title: str, folder: Path, network: nn.Module) -> list[Path]:
    """Write cost.json, cost.csv and the pictures of the records that have costs. Args: network, what they are of: of converted ones
    layers have bits of their own. Returns: the paths."""
    costed = [record for record in records if record.cost]
    if not costed:
        return []
    paths = [folder / name for name in ("cost.json", "cost.csv", "cost_by_layer.png", f"{costed[0].metric.name}_over_energy.png")]
    content = {"technology": _content(technology), "settings": [_setting(record) for record in costed]}
    write_text(paths[0], json.dumps(content))
    write_text(paths[1], csv_text(_lines(costed, network)))
    by_layer(paths[2], costed, f"{title}; {technology.name}")
    accuracy_over_energy(paths[3], costed, f"{title}; {technology.name}")
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
        "device": record.setting.chips and record.setting.chips.name, record.metric.name: record.accuracy, "n_images": record.n_images,
        **{column.name: column.of(Measured(record)) for column in OF_COSTS},
        "digital": cost.digital, "leakage_W": cost.leakage, "interval_s": cost.interval,
        **{key: {part: [getattr(origin, name) for origin in origins] for part, origins in cost.sources.items()}
           for key, name in (("sources_of_ends", "text"), ("values_of_ends", "value"))},
        "layers": [{"layer": layer.name, "energy_J": layer.energy, "area_m2": layer.area, "latency_s": layer.latency,
                    "utilisation": layer.utilisation, "events": asdict(layer.events)} for layer in cost.layers]}


def _lines(records: Sequence[Record], network: nn.Module) -> Iterator[list]:
    """The names of the columns, and a line for each setting, layer, quantity and component."""
    on_crossbars, spec = dict(quant.crossbar_layers(network)), asdict(records[0].setting.spec)
    yield ["setting", "technology", *spec, records[0].metric.name, "layer", "quantity", "component", "low", "typical", "high"]
    for record in records:
        for layer in record.cost.layers:
            hardware = asdict(on_crossbars[layer.name].fitted(record.setting.spec_of(layer.name))).values()
            for quantity, values in (("energy_uJ", layer.energy), ("area_mm2", layer.area), ("latency_us", {"all": layer.latency})):
                for component, band in values.items():
                    yield [record.setting, record.cost.technology, *hardware, record.accuracy, layer.name, quantity, component,
                           *band.scaled(MICRO)]


def layers_table(cost: CostReport) -> str:
    """One line a layer, by typical sources, then the components of the energy with their bands, and what is not in it."""
    rows = []
    for layer in cost.layers:
        done = layer.events
        conversions = sum(done.conversions.values())
        bits = sum(b * n for b, n in done.conversions.items()) / conversions if conversions else 0
        rows.append([layer.name, str(done.arrays), f"{layer.utilisation:.0%}", f"{done.idle_reads / done.reads:.1%}",
                     f"{conversions / cost.images:.3g}", f"{bits:.3g}", *_typical(sum(layer.energy.values(), NOTHING), layer.latency,
                                                                                 sum(layer.area.values(), NOTHING))])
    rows.append(["all", str(sum(layer.events.arrays for layer in cost.layers)), f"{cost.utilisation:.0%}", "", "", "",
                 *_typical(cost.energy, cost.latency, cost.area)])
    header = ["layer", "arrays", "used", "idle reads", "conversions", "bits", "energy uJ", "latency us", "area mm2"]
    parts = [f"{part} {band_text(band.scaled(MICRO))}" for part, band in cost.energy_by_component.items()]
    digital = [f"not in it, computed without an ADC: {', '.join(cost.digital)}"] if cost.digital else []
    return "\n".join([text_table(header, rows), *map(note, [f"energy of an example, uJ: {', '.join(parts)}", *digital])])


def sources_table(records: Sequence[Record]) -> str:
    """The table of `sources`, their names only."""
    rows = [[part, role, short(origin.text), origin.value.replace(", ", ",\n")]
            for part, role, origin in sources((record.setting.spec.adc_bits, record.cost) for record in records)]
    return "\n".join([text_table(SOURCES, rows), note(OF_OTHER_BITS)])


def sources(costs: Iterable[tuple[float, CostReport]]) -> list[tuple[str, str, Origin]]:
    """Which sources make the typical values and the ends of costs: a line for each part and source, and for each precision of the ADC where
    others make the ends with it. Args: costs, each with the ADC's bits. Returns: part, what the source makes of it, the source."""
    found: dict[str, dict[tuple[Origin, ...], set[float]]] = {}
    for bits, cost in costs:
        for part, origins in cost.sources.items():
            found.setdefault(part, {}).setdefault(origins, set()).add(bits)
    rows = []
    for part, ways in found.items():
        for (low, typical, high), bits in ways.items():
            name = part if len(ways) == 1 else f"{part}, {' and '.join(f'{b:g}' for b in sorted(bits))} bits"
            roles: dict[Origin, list[str]] = {}
            for origin, role in ((typical, "typical"), (low, "cheapest"), (high, "dearest")):
                roles.setdefault(origin, []).append(role)
            for i, (origin, its) in enumerate(roles.items()):
                rows.append(("" if i else name, " and ".join(its) if len(roles) > 1 else "one source", origin))
    return rows


def short(source: str) -> str:
    """The name of a source, without what it says."""
    return source.split(":")[0].split(" (")[0]


def _typical(*bands: Band) -> list[str]:
    return [rounded(MICRO * band.typical) for band in bands]


def by_layer(path: Path, records: Sequence[Record], title: str) -> None:
    """A bar for each setting, energy on the left and area on the right: above made of components, below of layers."""
    shared, settings = in_common([str(record.setting) for record in records])
    settings = [wrapped(name, 4, "x-small") for name in settings]
    layers = [layer.name for layer in max((record.cost.layers for record in records), key=len)]
    named = len(layers) <= NAMED
    colors = dict(zip({**ENERGY, **AREA}, colormap("tab10").colors))
    of_layer = colormap("tab20").colors if named else colormap("viridis")(np.linspace(0, 1, len(layers)))
    height = len(records) * (0.1 + 0.12 * max(len(name.splitlines()) for name in settings))  # inches of the bars
    figure = new_figure(13, 2.2 + 2 * max(height, 0.16 * max(len(colors), named * len(layers))))  # or of the longer legend
    panels, legends = figure.subplots(2, 2, sharex="col", sharey=True), [{}, {}]
    for column, quantity, parts, label in zip(panels.T, ("energy", "area"), (ENERGY, AREA), ("energy of an example (uJ)", "area (mm2)")):
        of_parts = [getattr(record.cost, f"{quantity}_by_component") for record in records]
        of_layers = [{layer.name: sum(getattr(layer, quantity).values(), NOTHING) for layer in record.cost.layers} for record in records]
        _stacked(column[0], of_parts, {part: colors[part] for part in parts})
        _stacked(column[1], of_layers, dict(zip(layers, of_layer)))
        column[1].set_xlabel(label, fontsize="small")
        for legend, axes in zip(legends, column):
            bars, names = axes.get_legend_handles_labels()
            legend |= dict(zip(names, bars))
    if not named:
        legends[1] = {name: legends[1][name] for name in (layers[0], layers[-1])}
    for (left, right), kind, legend in zip(panels, ("components", "layers" if named else "layers, from the first to the last"), legends):
        left.set_title(kind, fontsize="small", loc="left")
        left.set_yticks(range(len(records)), settings)
        right.legend(legend.values(), legend, fontsize="x-small", loc="upper left", bbox_to_anchor=(1, 1))
    panels[0, 0].set_ylim(len(records) - 0.5, -0.5)  # the first one above
    add_title(figure, title)
    add_note(figure, (f"all settings: {shared}; " if shared else "") + "bars: by typical sources; whiskers: by the cheapest to the dearest")
    save(figure, path, dpi=100)


def _stacked(axes: Any, records: Sequence[Mapping[str, Band]], colors: Mapping[str, Any]) -> None:
    """A bar for each record, of its parts side by side, with a whisker over the band of all of them."""
    place, ends = np.arange(len(records)), np.zeros((3, len(records)))
    for part, color in colors.items():
        values = MICRO * np.array([record.get(part, NOTHING) for record in records]).T
        axes.barh(place, values[1], left=ends[1], label=part, color=color)
        ends = ends + values
    axes.errorbar(ends[1], place, xerr=[np.maximum(ends[1] - ends[0], 0), np.maximum(ends[2] - ends[1], 0)], fmt="none", color="black",
                  linewidth=0.8, capsize=2)
    axes.tick_params(labelsize="x-small")
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)


def accuracy_over_energy(path: Path, records: Sequence[Record], title: str) -> None:
    """Accuracy over the energy of an image, a line for all settings that differ in the ADC's precision only."""
    figure, lines = new_figure(7.5, 4.8), []
    axes = figure.subplots()
    curves: dict[str, list[Record]] = {}
    for record in records:
        bits = f"{record.setting.spec.adc_bits:g}-bit ADC, "
        curves.setdefault(str(record.setting).replace(bits, ""), []).append(record)
    shared, names = in_common([*curves])
    for i, (name, points) in enumerate(zip(names, curves.values())):
        points = sorted(points, key=lambda record: record.setting.spec.adc_bits)
        low, typical, high = MICRO * np.array([record.cost.energy for record in points]).T
        accuracy, lower, upper = bands(points)
        color = colormap("tab10" if len(curves) <= 10 else "tab20")(i % 20)
        lines.append(axes.errorbar(typical, accuracy, [accuracy - lower, upper - accuracy], color=color, marker="o", markersize=4,
                                   linewidth=1.2, elinewidth=0.6, capsize=2, label=name).lines[0])
        axes.hlines(accuracy, low, high, color=color, alpha=0.25, linewidth=2.5)
        for x, y, record in zip(typical, accuracy, points):
            text = f"{record.setting.spec.adc_bits:g}"
            axes.annotate(text, (x, y), (3, -9), textcoords="offset points", fontsize="xx-small", color=color)
    axes.set(xscale="log", xlabel="energy of an example (uJ); beside each point the ADC's bits")
    label_decades(axes)
    finish(figure, axes, lines, records, title, shared, path, below=True, notes=[
        "points: by typical sources; bars: by the cheapest to the dearest", *(f"whiskers: {each}" for each in band_words(records))])
