"""Chips: the cells of a device, programmed some times over, and what reads have besides.

    chips = Chips(device=Device.load("techA", time="1h"), chips=10, adc_noise=0.3)
    for seed in chips.seeds:
        chips.program(network, seed)
"""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

from torch import nn

from ..arrays.spec import COUNT, COUNT_OR_0, FROM_0, Numbers, check, choice, number
from ..devices import ROW_OHM, WIRE_OHM, Device, Wires
from ..devices.device import check_is_device
from ..devices.times import show_time
from ..network.program import MOST_LEVELS, MOST_MISMATCH, check_chip, check_circuits, program

LEVELS = Numbers(float, f"a number from 0 to {MOST_LEVELS:g}", lambda value: 0 <= value <= MOST_LEVELS)
MISMATCH = Numbers(float, f"a share from 0 to {MOST_MISMATCH:g}", lambda value: 0 <= value <= MOST_MISMATCH)
ABOVE_1 = Numbers(float, "a number above 1", lambda value: 1 < value < math.inf)
NOISE = Numbers(float, "device, or a number of uS from 0 up", lambda value: 0 <= value < float("inf"), {"device": "device"})


def _of_wires(name: str, of_node: Mapping[str, float] | None = None) -> Any:
    """A field that is one of `Wires`. Args: of_node, ohms of technology nodes, whose names stand for them on a command line."""
    text = Wires.__dataclass_fields__[name].metadata["help"]
    if of_node is None:
        return number(0.0, text, FROM_0, of="cells", unit=" ohm")
    names = f"a number from 0 up, or one of {', '.join(of_node)}, which stands for the wires of that node"
    return number(0.0, f"{text} Or a node, such as 32nm.", replace(FROM_0, text=names, words=of_node), of="cells",
                  unit=" ohm")


@dataclass(frozen=True, kw_only=True)
class Reads:
    """Noise, converters and wires of the reads of chips (docs of each field: its `metadata["help"]`). The metadata also has "unit", and
    "of": whether a field decides what cells hold as they are read ("cells"), only the reads ("reads"), or all rows of a run ("run")."""

    sigma: float = number(0.0, "standard deviation of every cell, per cent of the range from its lowest to its highest level: "
                          "Gaussian, drawn once for a chip, in addition to the device's own scatter", FROM_0, of="cells", unit=" %",
                          younger=True)
    on_off: float | None = number(
        None, "on/off ratio: the lowest level has G_min = G_max / ratio, where the device's data reach so far. An analog reference and "
        "pairs take the off-current out. Default: that of the device", ABOVE_1, of="cells", younger=True)
    read_noise: float | str | None = number(
        None, "standard deviation s of a cell at each read, uS. A read gets the noise N(0, s^2 sum a^2), and that of its reference "
        "cells. device: the law of the device's data. Default: none", NOISE, of="reads", unit=" uS")
    adc_noise: float = number(0.0, "standard deviation s of the noise N(0, s^2) that each conversion adds to v, in levels of a cell",
                              LEVELS, of="reads")
    adc_offset: float = number(0.0, "standard deviation of the offset o of each column's converter, v + o, in levels of a cell. It is "
                               "drawn once for a chip", LEVELS, of="reads")
    adc_gain: float = number(0.0, "standard deviation of the relative gain g of each column's converter, v (1 + g). It is drawn once "
                             "for a chip", LEVELS, of="reads")
    adc_inl: float = number(0.0, "standard deviation of the INL of each converter, a smooth bend, in steps (LSB). It is drawn once for a "
                            "chip", LEVELS, of="reads", unit=" LSB", younger=True)
    adc_dnl: float = number(0.0, "standard deviation of the DNL of each code of each converter, in steps (LSB). It is drawn once for a "
                            "chip", LEVELS, of="reads", unit=" LSB", younger=True)
    adc_mismatch: float = number(0.0, "relative standard deviation of a unit capacitor of each converter, which then is a SAR with an "
                                 "array of binary weights. It is drawn once for a chip", MISMATCH, of="reads", younger=True)
    comparator_noise: float = number(0.0, "standard deviation of the noise that each conversion adds to v, as adc_noise, but in steps "
                                     "(LSB) of that conversion", LEVELS, of="reads", unit=" LSB", younger=True)
    access: str = choice(Wires.access, *(Wires.__dataclass_fields__["access"].metadata[key] for key in ("allowed", "help")), of="cells")
    wire_ohm: float = _of_wires("wire_ohm", WIRE_OHM)
    row_ohm: float = _of_wires("row_ohm", ROW_OHM)
    driver_ohm: float = _of_wires("driver_ohm")
    reference_cells: str = choice("device", ("device", "ideal"), "device: cells of reference columns scatter like all others. ideal: "
                                  "they do not scatter", of="cells")
    noise_seed: int = number(0, "seed of what is drawn again at each read. Each chip has draws of its own", COUNT_OR_0, of="run")


OF_READS = tuple(item.name for item in fields(Reads) if item.metadata["of"] == "reads")


@dataclass(frozen=True, kw_only=True)
class Draws:
    """How many chips a setting has. Attributes: chips; chip_seed, the seed of the first one."""

    chips: int = number(1, "how many chips are measured. Each is a new draw of all cells. The table has the mean, the standard "
                        "deviation (of n - 1) and the lowest of their accuracies", COUNT, of="run")
    chip_seed: int = number(0, "seed S of the first chip. The next ones have S + 1, S + 2 and so on", COUNT_OR_0, of="run")

    @property
    def seeds(self) -> range:
        """The seeds of the chips."""
        return range(self.chip_seed, self.chip_seed + self.chips)


@dataclass(frozen=True, kw_only=True)
class Chips(Draws, Reads):
    """The chips of one setting. Noise, converters, wires and faults of their reads are the fields of `Reads`.

    Attributes: chips, how many; each is one draw of all cells. chip_seed, the seed of the first one. device, what the cells are; two
        Chips are equal if they have the same numbers on the same data. name, what the device is called in tables.
    Raises: ValueError for impossible values.
    """

    device: Device
    name: str | None = None
    weight_noise: ClassVar[None] = None

    def __post_init__(self) -> None:
        check_is_device(self.device)
        check(self)
        object.__setattr__(self, "name", self.name or self.device.name)
        self.wires, self.drawn  # noqa: B018 - refuse what cannot be

    @functools.cached_property
    def drawn(self) -> Device:
        """The device with the on/off ratio, the scatter and the noise of these chips."""
        device = self.device if self.on_off is None else self.device.with_on_off(self.on_off)
        noise = {"read_noise": "device"} if self.read_noise == "device" else {}  # that which its data give
        scatter = math.hypot(device.sigma_percent, self.sigma)  # the variances of both add
        return replace(device, **noise, **({"sigma_percent": scatter} if self.sigma else {}))

    def _key(self) -> tuple:
        values = (getattr(self.device, field.name) for field in fields(Device))
        return (*(value if isinstance(value, (str, int, float, tuple, type(None))) else id(value) for value in values),
                *(getattr(self, field.name) for field in fields(self) if field.name != "device"))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Chips) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    @property
    def wires(self) -> Wires | None:
        """The resistances of an array's wires; None where there are none."""
        wires = Wires(self.access, self.wire_ohm, self.row_ohm, self.driver_ohm)
        return None if wires == Wires(self.access) else wires

    def check(self, layer: nn.Module) -> None:
        """Refuse a layer on crossbars whose cells these cannot be, without drawing any. Raises: ValueError."""
        noise = {} if self.read_noise in (None, "device") else {"read_noise": self.read_noise}
        check_chip(layer, replace(self.drawn, **noise), self.wires, self.reference_cells)
        check_circuits(layer, adc_inl=self.adc_inl, adc_dnl=self.adc_dnl, adc_mismatch=self.adc_mismatch,
                       comparator_noise=self.comparator_noise)

    def program(self, network: nn.Module, seed: int, progress: bool = False) -> None:
        """Program all layers of a network on crossbars: the chip of this seed. Args: progress, see `program`.

        Raises: ValueError for a device of fewer levels than a cell has, see `program`.
        """
        reads = {name: getattr(self, name) for name in OF_READS}
        if self.read_noise == "device":
            reads["read_noise"] = None  # it has its own already
        program(network, self.drawn, seed, self.reference_cells, **reads, wires=self.wires, noise_seed=self.noise_seed, progress=progress)

    def __str__(self) -> str:
        return self.text()

    def text(self, without: str | None = None) -> str:
        """As rows of a table name it, without how many there are. Args: without, a flag that the text leaves out."""
        device = self.device
        own_temp = device.temp in (None, *list(device.law.times)[:1])
        # Each bake has a time of its own: no time was given, and the temperature alone says which.
        untimed = without == "device_time" or without == "device_temp" and device.time == device.law.moment(None, device.temp)[0]
        parts = [self.name + ("" if device.time is None or untimed else f" at {show_time(device.time)}")
                 + ("" if own_temp or without == "device_temp" else f" and {device.temp:g} C")]
        own = [item for item in fields(Chips) if item.metadata.get("of") in ("cells", "reads")]
        units = {"stuck_on": "", "stuck_off": ""} | {item.name: item.metadata.get("unit", "") for item in own if "numbers" in item.metadata}
        parts += [f"{name} {value:g}{unit}" if isinstance(value, (int, float)) else f"{name} {value}"
                  for name, unit in units.items() if (value := self.value(name)) and name != without]
        parts += [f"{item.name} {value}" for item in own
                  if "allowed" in item.metadata and (value := getattr(self, item.name)) != item.default]
        return ", ".join(parts)

    def label(self) -> str:
        """What the cells are called in names of files: the device, and what is not at its first or its default."""
        first = self.device.law.moment(None, self.device.temp)[0]
        text = self.text("device_time" if self.device.time == first else None)
        parts = [part for part in text.split(", ") if part.split(" ")[0] not in OF_READS]
        return "_".join(part.replace(" at ", "_").replace(" and ", "_").replace(" ", "") for part in parts)

    def value(self, name: str) -> Any:
        """What a flag means for these chips, also where it was not given."""
        of_device = name.startswith("device_") or name in ("stuck_on", "stuck_off")
        return getattr(self.device if of_device else self, name.removeprefix("device_"))
