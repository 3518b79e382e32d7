"""What `eval.py --report` says of a setting with a device: where its cells lie, and where accuracy is lost."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from models import quant
from models.quant.arrays.cells import Cells
from models.quant.measuring.measure import Cache, calibrate
from models.quant.measuring.placing import Stored, on_adcs, place, program
from models.quant.measuring.setting import Setting
from models.quant.network import diagnostics
from models.quant.network.gate_errors import gate_errors
from models.quant.storage.files import write_text

from ..inputs.data import Batches
from .drawing import add_title, colormap, height_of_names, new_figure, save, width_of_names
from .report import db
from .tables import note, text_table

STEPS = {"adc": "ADC alone", "cells": "cells alone", "both": "both", "chip": "whole chip"}
SOURCES = {source: "ADC" if source == "adc" else source for source in diagnostics.SOURCES}


def write(path: Path, network: nn.Module, setting: Setting, title: str, images: Tensor, calibration: Batches, cache: Cache,
          cells: Stored | None = None, engine: str = "auto") -> str:
    """Report on the first chip of a setting that was measured, or on that of `cells`: `path` with .json and .png, and the table as
    text. The network is left with ideal cells. Args: images, a batch whose layer outputs are compared; the others as for `measure`."""
    seed = setting.chips and setting.chips.chip_seed
    place(network, setting, cells)
    with quant.set_engine(engine):
        try:
            if setting.chips:
                program(network, setting, seed)
            calibrate(network, setting, calibration, cache)
            corrected = setting.spec.adc_range == "calibrated" and setting.calibration.correct == "channel"
            resist = setting.chips and setting.chips.wires and setting.chips.wires.resist
            straight, both = _without_wires(network, setting, seed) if resist else ({}, {})
            layers = diagnostics.losses(network, images, corrected, straight)
            if resist and setting.chips.access == "gate":
                _add_gate_errors(layers, gate_errors(network, images, setting.chips.drawn, straight, setting.chips.wire_ohm, both))
            name, layer = max(on_adcs(network), key=lambda pair: pair[1].weight.numel())
            slices = diagnostics.cell_levels(layer)
        finally:
            quant.program(network, None)
    content = {"title": title, "setting": str(setting), "chip_seed": seed, "losses": layers, "cells": {"layer": name, "slices": slices}}
    write_text(path.with_suffix(".json"), json.dumps(content))
    plot(path.with_suffix(".png"), title, name, slices, layers, setting.chips and setting.chips.drawn, layer.spec)
    return losses_table(layers)


def _without_wires(network: nn.Module, setting: Setting, seed: int) -> tuple[dict[str, Cells], dict[str, Tensor]]:
    """What the cells of each layer hold on the chip of this seed if no wire resists, and, with gate access, `Readout.both` of pairs. The
    network stays on the chip that it is on."""
    chips = [(layer, layer.chip) for _, layer in quant.crossbar_layers(network)]
    quant.program(network, setting.chips.drawn, seed, setting.chips.reference_cells, wires=quant.Wires(setting.chips.access))
    on_chip = [(name, layer) for name, layer in quant.crossbar_layers(network) if layer.chip]
    straight = {name: layer.cells() for name, layer in on_chip}
    both = {name: layer.chip.readout.both for name, layer in on_chip if layer.chip.readout and layer.chip.readout.both is not None}
    for layer, chip in chips:
        layer.chip = chip
    return straight, both


def _add_gate_errors(layers: Sequence[dict[str, Any]], found: Mapping[str, tuple[float, float]]) -> None:
    """What the curve of gate access does to the reads of each layer. Args: found, result of `gate_errors`."""
    for entry in layers:
        entry["gate_error"], entry["without_wires_error"] = found.get(entry["layer"], (0.0, 0.0))  # one without conductance has no curve


def _steps(layers: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The errors that are told apart: without the last where a chip has nothing but its cells."""
    return {key: text for key, text in STEPS.items() if key != "chip" or any(e["chip"] != e["both"] for e in layers)}


def _sources(layers: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The sources that any layer has an error of."""
    return {key: text for key, text in SOURCES.items() if any(entry["shares"][key] for entry in layers)}


def losses_table(layers: Sequence[Mapping[str, Any]]) -> str:
    """Two lines a layer: what is left of its output, and the shares of its errors. Args: layers, result of
    `models.quant.network.diagnostics.losses`."""
    steps, sources = _steps(layers), _sources(layers)
    gate = {"gate_error": "curve off by", "without_wires_error": "no wires off by"} if "gate_error" in layers[0] else {}
    rows = [[e["layer"], f"{e['scatter']:.3f}", f"{e['far']:.2%}", *(db(e[key]) for key in steps), *(f"{e[key]:.1%}" for key in gate)]
            for e in layers]
    of_gate = ["curve, no wires off by: root mean square error of the reads v against the exact ladders of gate access, of the curve that "
               "stands for them and of cells without wires, relative to v, on this network's reads by what digits and slices count"
               ] if gate else []
    of_steps = ["scatter: root mean square distance of the cells from nominal ones, in levels; off by > 1/2: share that is further than "
                "half a level away", "dB: signal to error of the layer's output, its inputs those of software", *of_gate]
    of_shares = ("all errors dB: against the output of unquantized inputs and weights; shares: what each adds to the square of that error, "
                 "switched on from left to right, below 0 where it takes some away; scatter: with drift and faults; noise: of reads, and "
                 "offset and gain of converters")
    return "\n".join([
        text_table(["layer", "scatter", "off by > 1/2", *(f"{text} dB" for text in steps.values()), *gate.values()], rows),
        *map(note, of_steps), "",
        text_table(["layer", "all errors dB", *sources.values()],
                   [[e["layer"], db(e["all"]), *(f"{e['shares'][key]:.1%}" for key in sources)] for e in layers]), note(of_shares)])


def plot(path: Path, title: str, name: str, slices: Sequence[Mapping[str, Any]], layers: Sequence[Mapping[str, Any]],
         device: quant.Device | None, spec: quant.CrossbarSpec) -> None:
    """A panel for each slice of one layer, how its cells lie around their levels; below, the losses of all layers and the shares of
    their errors. Args: device, of the cells, where it is known; spec, the hardware of that one layer."""
    columns = min(len(slices), 4)
    rows = -(-len(slices) // columns)
    names = [entry["layer"] for entry in layers]
    width = max(8.0, 4.0 * columns, width_of_names(names) + 0.8)
    turned = height_of_names(names, width - 0.8)
    figure = new_figure(width, 3.1 * rows + 2 * (3.1 + turned))
    above, middle, below = figure.subfigures(3, 1, height_ratios=[3.1 * rows, 3.1 + turned, 3.1 + turned])
    panels = list(above.subplots(rows, columns, squeeze=False).flat)
    for i, (entry, axes) in enumerate(zip(slices, panels)):
        _levels_panel(axes, entry, device, spec)
        axes.set_ylabel("share of cells" if i % columns == 0 else "")
    for axes in panels[len(slices):]:
        axes.set_axis_off()
    add_title(above, f"cells of {name}, by the level that they were programmed to (dashed)")
    _losses_panel(middle.subplots(), layers, bool(turned))
    _shares_panel(below.subplots(), layers, bool(turned))
    add_title(figure, title)
    save(figure, path, dpi=120)


def _levels_panel(axes: Any, entry: Mapping[str, Any], device: quant.Device | None, spec: quant.CrossbarSpec) -> None:
    edges = np.array(entry["edges"])
    colors = colormap("viridis")(np.linspace(0, 0.85, len(entry["levels"])))
    total = sum(each["cells"] for each in entry["levels"])
    for each, color in zip(entry["levels"], colors):
        share = np.array(each["histogram"]) / max(total, 1)
        axes.stairs(share, edges, color=color, fill=True, alpha=0.55)
        axes.stairs(share, edges, color=color, linewidth=0.8)
        axes.axvline(each["level"], color=color, linestyle="--", linewidth=0.9)
    bits = entry["bits"]
    axes.set(yscale="log", xlabel="value of a cell (levels)")
    axes.set_title(f"slice {entry['slice']}, {bits} bit{'s' if bits > 1 else ''}", fontsize="small")
    if device and spec.reference == "analog":
        low, step = 0.0 if spec.weights == "pair" else float(device.levels(bits)[0]), device.step(bits)
        top = axes.secondary_xaxis("top", functions=(lambda x: low + step * x, lambda g: (g - low) / step))
        top.tick_params(labelsize="x-small")
        top.set_xlabel("uS", fontsize="x-small", labelpad=2)


def _losses_panel(axes: Any, layers: Sequence[Mapping[str, Any]], turned: bool) -> None:
    steps, place = _steps(layers), np.arange(len(layers))
    width = 0.8 / len(steps)
    for i, (key, text) in enumerate(steps.items()):
        values = [np.nan if e[key] is None else e[key] for e in layers]
        at = place + (i - (len(steps) - 1) / 2) * width
        bars = axes.bar(at, values, width, label=text)
        for x in at[np.isnan(values)]:
            axes.text(x, 0, " exact", color=bars[0].get_facecolor(), rotation="vertical", ha="center", va="bottom", fontsize="x-small")
    axes.set_xticks(place, [e["layer"] for e in layers], fontsize="x-small", rotation=90 if turned else 0)
    axes.set_ylabel("output SQNR (dB)")
    axes.set_title("what is left of each layer's output, errors switched on one after another", fontsize="small")
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    axes.set_ylim(top=1.15 * axes.get_ylim()[1])  # room for the legend
    axes.legend(fontsize="x-small", ncols=len(steps), loc="upper right")


def _shares_panel(axes: Any, layers: Sequence[Mapping[str, Any]], turned: bool) -> None:
    """What adds to the error stands on top of each other above 0, what takes away from it hangs below."""
    place, ends = np.arange(len(layers)), np.zeros((2, len(layers)))  # of the bars below 0 and above it
    for key, text in _sources(layers).items():
        values = np.array([100 * entry["shares"][key] for entry in layers])
        side = (values > 0).astype(int), place
        axes.bar(place, values, 0.8, ends[side], label=text, color=f"C{list(SOURCES).index(key)}")
        ends[side] += values
    axes.set_xticks(place, [entry["layer"] for entry in layers], fontsize="x-small", rotation=90 if turned else 0)
    axes.set_ylabel("share of the error (%)")
    axes.set_title("what each source adds to a layer's error, or takes away", fontsize="small")
    low, high = ends[0].min(), max(100.0, ends[1].max())
    axes.set_ylim(1.05 * low, high + 0.18 * (high - low))  # room for the legend
    axes.axhline(0, color="black", linewidth=0.8)
    if ends.any():
        axes.legend(fontsize="x-small", ncols=len(SOURCES), loc="upper right")
