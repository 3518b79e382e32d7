"""What counted work costs in a technology (`estimate`): energy, latency, area, as a band between sources.

With V and t the read's voltage and pulse, S_k[r] the sum of slice k's levels in row r, ones counted as pulses, m columns to an ADC
(`columns_per_adc` of a layer's hardware, or else of the technology):

    E_cells = V^2 t sum over arrays, slices of [ G_min cols sum_r ones_r + dG sum_r ones_r S_k[r] ]       exact for evenly spaced levels
    E_rows  = row_on ones + row_bit rows bits                      word lines
    E_lines = column_bit + column_pulse + array_bit, each times how often      bit lines
    E_adc   = sum over conversions of E(bits)                      those that are made
    E_logic = shift_add conversions + add sums + count rows bits (plans by ones)     E_buffers = buffer bits     E_leak = leakage arrays T
    T_layer = max(1, pixels / copies) sum over digits (setup + pulses t + conversions of one ADC, in turn)
    area    = arrays (rows ((columns + reference) cell_area F^2 + row_area + count_area) + ceil(columns / m) (adc_area + shift_add_area))
              + buffers
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn

from ..devices import Device
from ..layers.crossbar import CrossbarLayer, crossbar_layers
from ..network.counts import Counts
from .events import Events, events
from .technology import OF_ADC, Source, Technology

ENERGY = {"cells": (), "word lines": ("row_on", "row_bit"), "bit lines": ("column_bit", "column_pulse", "array_bit"),
          "ADC": ("adc_energy",), "logic": ("shift_add", "add", "count"), "buffers": ("buffer",), "leakage": ("leakage",)}
AREA = {"cells": (), "drivers": ("row_area",), "ADC": ("adc_area",), "logic": ("shift_add_area", "count_area"), "buffers": ("buffer_area",)}


class Band(NamedTuple):
    """A value by the cheapest sources, the typical ones and the dearest."""

    low: float
    typical: float
    high: float

    def __add__(self, other: Band) -> Band:  # not the longer tuple
        return Band(*(a + b for a, b in zip(self, other)))

    def scaled(self, factor: float) -> Band:
        """Each value times a number from 0."""
        return Band(*(factor * value for value in self))

    def under(self, dividend: float) -> Band:
        """`dividend` divided by each value: the low end is by the high one. Infinite where a value is 0."""
        return Band(*(dividend / value if value else float("inf") for value in reversed(self)))


NOTHING = Band(0.0, 0.0, 0.0)


class Origin(NamedTuple):
    """Where a value comes from. Attributes: text, of its source; value, as that gives it, and at the technology's node."""

    text: str
    value: str


@dataclass(frozen=True)
class LayerCost:
    """One layer. Attributes: events, of all the images counted; energy, J an image, and area, m2, by component; latency, s an image;
    utilisation, share of the cells of its arrays that hold weights."""

    name: str
    events: Events
    energy: dict[str, Band]
    area: dict[str, Band]
    latency: Band
    utilisation: float


@dataclass(frozen=True)
class CostReport:
    """What a network on crossbars costs.

    Attributes:
        technology: its name.
        images: that were counted; energies and latencies are those of one of them, in the mean.
        layers: those on crossbars. digital: names of those that compute their sums without an ADC, whose costs are not in here.
        interval: s between images: the latency, or pipelined that of the slowest layer.
        leakage: W, always.
        sources: for each part that costs something `(cheapest, typical, dearest)`; all the same where it has one source.
    """

    technology: str
    images: int
    layers: tuple[LayerCost, ...]
    digital: tuple[str, ...]
    interval: Band
    leakage: Band
    sources: dict[str, tuple[Origin, Origin, Origin]]

    @property
    def energy_by_component(self) -> dict[str, Band]:
        """J an image."""
        return {part: sum((layer.energy[part] for layer in self.layers), NOTHING) for part in ENERGY}

    @property
    def energy(self) -> Band:
        """J an image."""
        return sum(self.energy_by_component.values(), NOTHING)

    @property
    def area_by_component(self) -> dict[str, Band]:
        """m2."""
        return {part: sum((layer.area[part] for layer in self.layers), NOTHING) for part in AREA}

    @property
    def area(self) -> Band:
        """m2."""
        return sum(self.area_by_component.values(), NOTHING)

    @property
    def latency(self) -> Band:
        """s from an image to its result: of all layers, one after another."""
        return sum((layer.latency for layer in self.layers), NOTHING)

    @property
    def operations(self) -> float:
        """Of an image: a multiplication and an addition for each weight that meets an input."""
        return 2 * sum(layer.events.multiplications for layer in self.layers) / self.images

    @property
    def tops(self) -> Band:
        """10^12 operations a second."""
        return self.interval.under(1e-12 * self.operations)

    @property
    def tops_per_watt(self) -> Band:
        """10^12 operations a joule."""
        return self.energy.under(1e-12 * self.operations)

    @property
    def utilisation(self) -> float:
        """Share of the cells of all arrays that hold weights."""
        return (sum(layer.events.cells_used for layer in self.layers) / sum(layer.events.cells_allocated for layer in self.layers))


def estimate(counts: Counts, network: nn.Module, technology: Technology, device: Device | None = None) -> CostReport:
    """The costs of a network on the hardware that its layers have, for the images that were counted.

    Args:
        counts: by `count`, of this network, whatever its cells and ADCs were.
        network: its layers' specs and ADC plans are those that cost.
        device: whose nominal levels the cells have; None, those of the technology.
    Raises: ValueError for a network without an ADC, converters of bits that a typical source is not for, arrays too narrow for a weight,
        and arrays whose reads were not counted.
    """
    layers = [(name, layer) for name, layer in crossbar_layers(network) if name in counts.layers]
    costed = [(name, layer) for name, layer in layers if layer.spec.adc_range != "ideal"]
    if not costed:
        raise ValueError("no layer has an ADC (adc_range is 'ideal'): arrays without converters have no cost")
    shared = {name: layer.spec.columns_per_adc or technology.columns_per_adc for name, layer in costed}
    done = {name: events(counts.layers[name], layer, technology.columns, shared[name], technology.skip_idle) for name, layer in costed}
    ends = _Ends(technology, done, shared, counts.images)
    interval = ends.interval()
    found = tuple(LayerCost(
        name, done[name], _energy(ends, name, _cells(done[name], technology, device) / counts.images, interval),
        _area(ends, name, layer, technology), ends.time(name), done[name].cells_used / done[name].cells_allocated)
        for name, layer in costed)
    digital = tuple(name for name, layer in layers if layer.spec.adc_range == "ideal")
    leakage = sum((ends.of("leakage", name) for name in done), NOTHING)
    return CostReport(technology.name, counts.images, found, digital, interval, leakage, ends.named())


def _cells(done: Events, technology: Technology, device: Device | None) -> float:
    """E_cells of all images, J."""
    total = 0.0
    for bits, pulses, levels in done.level_pulses:
        if device is None:
            low, step = technology.g_min, (technology.g_max - technology.g_min) / (2**bits - 1)
        else:
            low, step = 1e-6 * float(device.levels(bits)[0]), 1e-6 * device.step(bits)
        total += low * pulses + step * levels
    return technology.read_voltage**2 * technology.read_pulse * total


def _energy(ends: _Ends, name: str, cells: float, interval: Band) -> dict[str, Band]:
    found = {part: sum((ends.of(component, name).scaled(1 / ends.images) for component in components), NOTHING)
             for part, components in ENERGY.items()}
    leakage = Band(*(power * time for power, time in zip(ends.of("leakage", name), interval)))
    return found | {"cells": Band(cells, cells, cells), "leakage": leakage}


def _area(ends: _Ends, name: str, layer: CrossbarLayer, technology: Technology) -> dict[str, Band]:
    done = ends.done[name]
    cells = done.arrays * technology.copies * layer.spec.rows * (technology.columns + done.reference_lines)
    cells *= technology.cell_area * (1e-9 * technology.node) ** 2
    return {"cells": Band(cells, cells, cells)} | {
        part: sum((ends.of(component, name) for component in components), NOTHING) for part, components in AREA.items() if components}


class _Ends:
    """The band of each part: its cheapest, typical and dearest source, by what they make of the whole network, so that the layers add
    up to the ends. Args: shared, columns of a converter of each layer."""

    def __init__(self, technology: Technology, done: Mapping[str, Events], shared: Mapping[str, int], images: int) -> None:
        self.technology, self.done, self.shared, self.images = technology, done, shared, images
        self.bits = {bits for each in done.values() for bits in each.conversions}
        self.chosen: dict[str, tuple[Source, ...]] = {}

    def of(self, component: str, name: str) -> Band:
        """What a part of one layer costs: all images' energy, the area, or the power."""
        sources = self._sources(component)
        return Band(*map(self._cost(component, name), sources)) if sources else NOTHING

    def time(self, name: str) -> Band:
        """Seconds that a layer takes for an image."""
        return Band(*(self._time(name, source) for source in self._sources("adc_time")))

    def interval(self) -> Band:
        """Seconds from one image to the next, by the sources that make them fewest and most: for the slowest layer these may be others
        than for all of them."""
        pooled = max if self.technology.pipelined else sum
        times = [pooled(self._time(name, source) for name in self.done) for source in self.technology.for_bits("adc_time", self.bits)]
        return Band(min(times), times[0], max(times))

    def named(self) -> dict[str, tuple[Origin, Origin, Origin]]:
        """The sources of those parts that cost something."""
        node = self.technology.node
        return {component: tuple(Origin(source.text, source.value_text(node)) for source in chosen)
                for component, chosen in self.chosen.items()
                if any(self._cost(component, name)(source) for name in self.done for source in chosen)}

    def _sources(self, component: str) -> tuple[Source, ...]:
        if component not in self.chosen:
            known = self.technology.for_bits(component, self.bits) if component in OF_ADC else self.technology.of(component)
            totals = [sum(self._cost(component, name)(source) for name in self.done) for source in known]
            order = sorted(range(len(known)), key=totals.__getitem__)
            self.chosen[component] = (known[order[0]], known[0], known[order[-1]]) if known else ()
        return self.chosen[component]

    def _turns(self, done: Events) -> float:
        """Output pixels of an image that a layer reads one after another: copies share them, and a pixel is read by one copy."""
        pixels = done.pixels / self.images
        return max(pixels / self.technology.copies, min(pixels, 1.0))

    def _time(self, name: str, source: Source) -> float:
        done, hardware = self.done[name], self.technology
        fixed = sum(hardware.read_setup + pulses * hardware.read_pulse for pulses in done.pulses)
        return self._turns(done) * fixed + self._cost("adc_time", name)(source)

    def _cost(self, component: str, name: str) -> Callable[[Source], float]:
        """`f(source)`: what a layer's use of a part costs by one source."""
        node, done = self.technology.node, self.done[name]
        arrays = done.arrays * self.technology.copies
        adcs = arrays * -(-self.technology.columns // self.shared[name])
        if component == "adc_time":
            turns = self._turns(done)
            return lambda source: turns * _conversion_time(done, source, node)
        if component == "adc_energy":
            return lambda source: sum(n * source.at(component, node, bits) for bits, n in done.conversions.items())
        if component == "adc_area":
            return lambda source: adcs * source.at(component, node, done.most_bits) if done.most_bits else 0.0
        uses = {
            "row_on": done.line_ones, "row_bit": done.line_bits, "column_bit": done.column_bits, "column_pulse": done.column_pulses,
            "array_bit": done.array_bits, "shift_add": done.shift_adds, "add": done.adds, "count": done.counts_ones * done.line_bits,
            "count_area": done.counts_ones * arrays * done.rows, "buffer": done.buffer_bits, "leakage": arrays, "shift_add_area": adcs,
            "row_area": arrays * done.rows, "buffer_area": done.input_bits}[component]
        return lambda source: uses * source.at(component, node)


def _conversion_time(done: Events, source: Source, node: float) -> float:
    """Seconds of the conversions of one ADC for an output pixel."""
    return sum(n * source.at("adc_time", node, bits) for kinds in done.conversions_in_turn for bits, n in kinds.items())
