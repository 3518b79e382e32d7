"""What the settings of an evaluation cost: counted on the software's pass, estimated for each setting.

    costs = Costs("rram_32nm", settings)
    software = measure(network, images, labels, None, passing=costs.counting(network))
    record = replace(measure(network, images, labels, setting, ...), cost=costs.of(network, setting))
"""

import contextlib
import functools
import itertools
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from torch import nn

from models import quant
from models.quant.cost import Band, CostReport, Counts, LayerCost, Origin, Technology, counting, estimate
from models.quant.cost.events import Events, check_width
from models.quant.measuring.setting import Setting
from models.quant.network.counts import Layout

from ..program import distributed
from ..program.cli import user_error

LIST = "list"  # --cost list: say which there are


class Figure(NamedTuple):
    """A number of results: what it is of a report, its unit in SI units, and what tables call it, if they have it."""

    of: str
    unit: float
    head: str | None = None


FIGURES = {"energy_uJ": Figure("energy", 1e-6, "energy uJ"), "latency_us": Figure("latency", 1e-6, "latency us"),
           "area_mm2": Figure("area", 1e-6, "area mm2"), "tops": Figure("tops", 1.0),
           "tops_per_w": Figure("tops_per_watt", 1.0, "TOPS/W")}  # by their columns


class Costs:
    """The costs of settings in one technology; without one there are none.

    Args: name, of a technology, or its file, or None; settings, of which there will be costs.
    Raises: UserError for an unknown technology, or a file that cannot be right.
    """

    def __init__(self, name: str | None, settings: Iterable[Setting]) -> None:
        self.technology: Technology | None = None
        self.counts: Counts | None = None
        self._layouts = [layout for setting in settings for layout in _layouts(setting)]
        if name is not None:
            with user_error(lambda error: f"--cost {name}: {error}"):
                self.technology = Technology.load(name)

    def check(self, network: nn.Module, setting: Setting) -> None:
        """Refuse a setting, on which the network is placed, that has no cost in this technology. Raises: ValueError."""
        if not self._has(network):
            return
        bits = set()  # of all layers, as one source is for the converters of a whole chip
        try:
            for _, layer in quant.crossbar_layers(network):
                spec = layer.spec
                if spec.adc_range != "ideal":
                    bits.update(range(1, spec.adc_max_bits + 1) if spec.planned else [int(spec.adc_bits)])
                    check_width(layer, self.technology.columns)
            self.technology.check_adc(bits)
        except ValueError as error:
            raise ValueError(f"--cost {self.technology.name}, {setting}: {error}") from None

    @contextlib.contextmanager
    def counting(self, network: nn.Module) -> Any:
        """Within the block, a pass of all images without ADCs, what the costs follow from is counted, of several processes together."""
        if self.technology is None:
            yield
            return
        with counting(network, self._layouts) as counts:
            yield
        self.counts = functools.reduce(Counts.__add__, distributed.gathered(counts))

    def of(self, network: nn.Module, setting: Setting | None) -> CostReport | None:
        """The costs of a network that is on a setting, calibrated; None for the software and settings without an ADC."""
        if setting is None or not self._has(network):
            return None
        return estimate(self.counts, network, self.technology, setting.chips and setting.chips.drawn)

    def _has(self, network: nn.Module) -> bool:
        return self.technology is not None and any(layer.spec.adc_range != "ideal" for _, layer in quant.crossbar_layers(network))


def _layouts(setting: Setting) -> list[Layout]:
    """Of the layers."""
    others = [dict(values) for _, values in setting.per_layer]
    values = ({getattr(setting.spec, name), *(own[name] for own in others if name in own)} for name in ("mapping", "rows", "dac_bits"))
    return list(itertools.product(*map(sorted, values)))


def restored(values: Mapping[str, Any]) -> CostReport:
    """The costs of `asdict(report)`, from JSON."""
    layers = tuple(LayerCost(**each | {
        "events": _events(each["events"]), "latency": Band(*each["latency"]),
        **{name: {part: Band(*band) for part, band in each[name].items()} for name in ("energy", "area")}}) for each in values["layers"])
    return CostReport(**values | {
        "layers": layers, "digital": tuple(values["digital"]), "interval": Band(*values["interval"]), "leakage": Band(*values["leakage"]),
        "sources": {part: tuple(Origin(*origin) for origin in each) for part, each in values["sources"].items()}})


def _events(values: Mapping[str, Any]) -> Events:
    """JSON has no numbers as keys, and no tuples."""
    def numbers(counts: Mapping[str, Any]) -> dict[int, Any]:
        return {int(bits): count for bits, count in counts.items()}

    made, shift_adds, of_idle = numbers(values["conversions"]), values["shift_adds"], ("skips_idle", "idle_conversions", "idle_shift_adds")
    if values.get("skips_idle"):  # as it was stored when idle conversions stood beside all of them
        made = {bits: count - values["idle_conversions"].get(str(bits), 0) for bits, count in made.items()}
        shift_adds -= values["idle_shift_adds"]
    return Events(**{name: value for name, value in values.items() if name not in of_idle} | {
        "level_pulses": tuple(map(tuple, values["level_pulses"])), "pulses": tuple(values["pulses"]),
        "conversions": made, "shift_adds": shift_adds,
        "conversions_in_turn": tuple(map(numbers, values["conversions_in_turn"]))})


def figure(cost: CostReport, column: str) -> Band:
    """One of `FIGURES`, in its unit."""
    return getattr(cost, FIGURES[column].of).scaled(1 / FIGURES[column].unit)
