"""Chips: which device the cells of a network are, and what its reads have besides.

    device = DeviceSettings(device="techA", device_time=3600.0).made()
    chips = Chips(device=device, chips=10, adc_noise=0.3)
    for seed in chips.seeds:
        chips.program(network, seed)

The flags of eval.py are the fields of `DeviceSettings` and `ChipSettings`, those of train.py the fields of `TrainingChips`.
"""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from torch import nn

from models import quant
from models.quant import Device, Wires
from models.quant.devices import ROW_OHM, WIRE_OHM, describe, parse_time, presets, raw_folder

from . import flags
from .cli import UserError
from .flags import COUNT, COUNT_OR_0, POSITIVE_OR_0, Number, option

LIST = "list"  # --device list: say which there are
TIME = Number(parse_time, "seconds, or a number with ms, s, min, h, d or w, such as 1h", lambda value: True)
TEMP = Number(float, "a number of degrees Celsius", lambda value: -274 < value < float("inf"))
PROBABILITY = Number(float, "a probability from 0 to 1", lambda value: 0 <= value <= 1)
LEVELS = Number(float, f"a number from 0 to {quant.MOST_LEVELS:g}", lambda value: 0 <= value <= quant.MOST_LEVELS)
NOISE = Number(lambda text: text if text == "device" else float(text), "device, or a number of uS from 0 up",
               lambda value: value == "device" or 0 <= value < float("inf"))
WIRES = {name: field.metadata for name, field in Wires.__dataclass_fields__.items()}
OR_NODE = " Or a node, such as 32nm."


def _ohms(of_node: Mapping[str, float]) -> Number:
    return Number(lambda text: of_node[text] if text in of_node else float(text), f"a number from 0 up, or one of {', '.join(of_node)}, "
                  "which stands for the wires of that node", lambda value: 0 <= value < float("inf"))


@dataclass(frozen=True, kw_only=True)
class DeviceSettings:
    """what a cell is"""

    device: str | None = option(
        None, f"what the cells are: one of the presets, or a file or folder of your own measurements (docs/devices.md); {LIST} "
        "describes the presets and ends. Default: ideal cells", metavar="NAME|FILE")
    device_time: float | None = option(
        None, "time t at which the cells are read, in seconds or as 10s, 1h, 1d: mean and sigma of the data at t; of tables linear in "
        f"log t between measured times. --device {LIST} says which times there are. Default: the first that the device has", TIME)
    device_temp: float | None = option(None, "temperature, C. Default: the lowest that the device has", TEMP)
    stuck_on: float | None = option(
        None, "probability that a cell always has the conductance of the highest level; default that of the device", PROBABILITY)
    stuck_off: float | None = option(None, "the same for the lowest level; default that of the device", PROBABILITY)

    def made(self, known: dict[str, Device] | None = None) -> Device:
        """The device. Args: known, devices that were read already, which saves reading a file again for each of its times.

        Raises: UserError for an unknown name, a file that cannot be right, and times and temperatures outside the data.
        """
        known, name = {} if known is None else known, self.device
        changes = {"time": self.device_time, "temp": self.device_temp} | {
            key: value for key in ("stuck_on", "stuck_off") if (value := getattr(self, key)) is not None}
        try:
            if name not in known:
                known[name] = _first(name)
            return replace(known[name], **changes)
        except (ValueError, OSError) as error:
            text = f"cannot be read: {error.strerror or error}" if isinstance(error, OSError) else error
            raise UserError(f"--device {name}: {text}") from None


def _first(name: str) -> Device:
    """The preset or the file, at its first time and lowest temperature."""
    if name in presets():
        return Device.preset(name)
    if not name or not (raw_folder(name) or Path(name)).exists():
        raise ValueError(f"no preset and no file is called so; presets are {', '.join(presets())}")
    return Device.read(name)


@dataclass(frozen=True, kw_only=True)
class ReadSettings:
    """what reads have besides"""

    read_noise: float | str | None = option(
        None, "standard deviation s of a cell's conductance, uS, drawn anew at each read: a read gets N(0, s^2 sum a^2), and that of its "
        "reference cells. device: the law of the device's data. Default: none", NOISE)
    adc_noise: float = option(0.0, "standard deviation of N(0, s^2) that each conversion adds to v, in units of a cell's level",
                              LEVELS)
    adc_offset: float = option(0.0, "standard deviation of the offset of each column's converter, the same in all reads of a chip, in "
                               "units of a cell's level: v + o", LEVELS)
    adc_gain: float = option(0.0, "relative standard deviation of the gain of each column's converter, the same in all reads of a "
                             "chip: v (1 + g)", LEVELS)
    access: str = option(Wires.access, WIRES["access"]["help"], WIRES["access"]["allowed"])
    wire_ohm: float = option(0.0, WIRES["wire_ohm"]["help"] + OR_NODE, _ohms(WIRE_OHM))
    row_ohm: float = option(0.0, WIRES["row_ohm"]["help"] + OR_NODE, _ohms(ROW_OHM))
    driver_ohm: float = option(0.0, WIRES["driver_ohm"]["help"], POSITIVE_OR_0)
    reference_cells: str = option("device", "device: the cells of reference columns are like all others. ideal: they do not scatter",
                                  ("device", "ideal"))
    noise_seed: int = option(0, "seed of what is drawn anew at each read, for each chip by itself", COUNT_OR_0)


@dataclass(frozen=True, kw_only=True)
class ChipSettings(ReadSettings):
    """what reads have besides, and which chips are measured"""

    chips: int = option(1, "chips that are measured, each a draw of all cells, with the seeds S, S + 1, ...: mean, deviation (of "
                        "n - 1) and lowest of their accuracies", COUNT)
    chip_seed: int = option(0, "seed S of the first chip", COUNT_OR_0)


@dataclass(frozen=True, kw_only=True)
class TrainingChips(DeviceSettings, ReadSettings):
    """training on chips of a device"""

    chip_steps: int = option(1, "steps K that have the same chip: step i of the run is made on chip S + 1 + floor(i / K), programmed "
                             "from the weights as they are", COUNT)
    chip_seed: int = option(0, "seed S of the chip on which each epoch is measured; training sees those above", COUNT_OR_0)


OF_DEVICE = tuple(flags.defaults(DeviceSettings))
CHIP_FIELDS = tuple(flags.defaults(ChipSettings))
OF_RUN = ("chips", "chip_seed", "noise_seed")  # the same for all rows of a table
OF_ROW = tuple(name for name in (*OF_DEVICE, *CHIP_FIELDS) if name not in OF_RUN)
OF_TRAINING = tuple(flags.defaults(TrainingChips))
NOT_OF_CELLS = ("read_noise ", "adc_noise ", "adc_offset ", "adc_gain ")
UNITS = {"device_temp": " C", "read_noise": " uS", "wire_ohm": " ohm", "row_ohm": " ohm", "driver_ohm": " ohm"}
WITHOUT = "--{} is for the cells of a device: add --device NAME, or see --device " + LIST


@dataclass(frozen=True, kw_only=True)
class Chips(ChipSettings):
    """The chips of one setting; its other fields are `ChipSettings`'.

    Attributes: device, of all cells; two Chips are equal if they have the same numbers on the same data. name, what the device is
        called in tables.
    Raises: ValueError for values that cannot be.
    """

    device: Device
    name: str | None = None

    def __post_init__(self) -> None:
        for field in flags.flag_fields(ChipSettings):
            if wrong := flags.problem(field, value := getattr(self, field.name)):
                raise ValueError(f"{field.name} is {value!r}, which {wrong}")
        object.__setattr__(self, "device", _with_noise(self.device, self.read_noise))
        object.__setattr__(self, "name", self.name or self.device.name)
        self.wires  # noqa: B018 - refuses what cannot be

    def _key(self) -> tuple:
        values = (getattr(self.device, field.name) for field in fields(Device))
        return (*(value if isinstance(value, (str, int, float, tuple, type(None))) else id(value) for value in values),
                *(getattr(self, field.name) for field in fields(self) if field.name != "device"))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Chips) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    @property
    def seeds(self) -> range:
        """The seeds of the chips."""
        return range(self.chip_seed, self.chip_seed + self.chips)

    @property
    def wires(self) -> Wires | None:
        """The resistances of an array's wires; None where there are none."""
        wires = Wires(self.access, self.wire_ohm, self.row_ohm, self.driver_ohm)
        return None if wires == Wires(self.access) else wires

    def check(self, layer: nn.Module) -> None:
        """Refuse a layer on crossbars whose cells these cannot be, without drawing any. Raises: ValueError."""
        noise = {} if self.read_noise in (None, "device") else {"read_noise": self.read_noise}
        quant.check_chip(layer, replace(self.device, **noise), self.wires, self.reference_cells)

    def program(self, network: nn.Module, seed: int, progress: bool = False) -> None:
        """Program all layers of a network on crossbars: the chip of this seed. Args: progress, see `quant.program`.

        Raises: ValueError for a device of fewer levels than a cell has, see `quant.program`.
        """
        noise = None if self.read_noise == "device" else self.read_noise  # the device has its own already
        quant.program(network, self.device, seed, self.reference_cells, read_noise=noise, adc_noise=self.adc_noise,
                      adc_offset=self.adc_offset, adc_gain=self.adc_gain, wires=self.wires, noise_seed=self.noise_seed,
                      progress=progress)

    def __str__(self) -> str:
        return self.text()

    def text(self, without: str | None = None) -> str:
        """As rows of a table name it, without how many there are. Args: without, a flag that the text leaves out."""
        device, usual = self.device, ChipSettings
        own_temp = device.temp in (None, *list(device.law.times)[:1])
        # Each bake has a time of its own: no time was given, and the temperature alone says which.
        untimed = without == "device_time" or without == "device_temp" and device.time == device.law.moment(None, device.temp)[0]
        parts = [self.name + ("" if device.time is None or untimed else f" at {show_time(device.time)}")
                 + ("" if own_temp or without == "device_temp" else f" and {device.temp:g} C")]
        shown = {name: self.value(name) for name in ("stuck_on", "stuck_off", "read_noise", "adc_noise", "adc_offset", "adc_gain",
                                                     "wire_ohm", "row_ohm", "driver_ohm")}
        parts += [f"{name} {value:g}{UNITS.get(name, '')}" if isinstance(value, (int, float)) else f"{name} {value}"
                  for name, value in shown.items() if value and name != without]
        parts += [f"{name} {getattr(self, name)}" for name in ("access", "reference_cells") if getattr(self, name) != getattr(usual, name)]
        return ", ".join(parts)

    def label(self) -> str:
        """What the cells are called in names of files: the device, and what is not at its first or its default."""
        first = self.device.law.moment(None, self.device.temp)[0]
        text = self.text("device_time" if self.device.time == first else None)
        parts = [part for part in text.split(", ") if not part.startswith(NOT_OF_CELLS)]
        return "_".join(part.replace(" at ", "_").replace(" and ", "_").replace(" ", "") for part in parts)

    def value(self, name: str) -> Any:
        """What a flag means for these chips, also where it was not given."""
        return getattr(self.device if name in OF_DEVICE else self, name.removeprefix("device_"))


def _with_noise(device: Device, read_noise: float | str | None) -> Device:
    """The device with the read noise that its data give, where it is asked for."""
    return replace(device, read_noise="device") if read_noise == "device" else device


def names_of(devices: Iterable[str]) -> dict[str, str]:
    """What `--device` values are called in tables and files: a preset as it is, a folder by its name, a file by that without its ending, or
    where another one has that too, by as much of the end of its path as tells them apart."""
    def short(path):
        return path.name if path.is_dir() else path.stem

    found, files = {}, {device: (raw_folder(device) or Path(device)).resolve() for device in devices if device not in presets()}
    for device in dict.fromkeys(devices):
        path = files.get(device)
        others = {other for other in files.values() if other != path}
        if path is None:
            found[device] = device
        elif short(path) not in {*devices, *map(short, others)}:
            found[device] = short(path)
        else:
            length = next(n for n in range(2, len(path.parts) + 1) if all(other.parts[-n:] != path.parts[-n:] for other in others))
            found[device] = "/".join(path.parts[-length:])
    return found


def chips_of(values: Mapping[str, Any], known: dict[str, Device] | None = None, names: Mapping[str, str] | None = None) -> Chips | None:
    """The chips that flags mean, `{flag: value}` of some or all of them; None without a device. Args: known, see `made`; names, of
    several devices.

    Raises: UserError for flags of chips without a device, and as `made`.
    """
    if values.get("device") is None:
        for name, usual in (flags.defaults(TrainingChips) | flags.defaults(ChipSettings)).items():
            if values.get(name, usual) != usual:
                raise UserError(WITHOUT.format(name))
        return None
    device = DeviceSettings(**{name: values[name] for name in OF_DEVICE if name in values}).made(known)
    name = (names or names_of([values["device"]]))[values["device"]]
    try:
        return Chips(device=device, name=name, **{name: values[name] for name in CHIP_FIELDS if name in values})
    except ValueError as error:
        text = str(error)
        raise UserError(f"--{text}" if text.startswith(CHIP_FIELDS) else f"--device {values['device']}: {text}") from None


def devices_of(rows: Mapping[str, Sequence]) -> dict[str, Device]:
    """The devices among the values of flags, of which combinations are taken: as `known` in `chips_of`.

    Raises: UserError for a device, a time or a temperature that goes with none of the others.
    """
    names, known, refused, held = ("device", "device_time", "device_temp"), {}, {}, set()
    for values in itertools.product(*(rows.get(name, [None]) for name in names)):
        each = dict(zip(names, values))
        try:
            chips_of({name: value for name, value in each.items() if value is not None}, known)
            held |= each.items()
        except UserError as error:
            refused |= dict.fromkeys(each.items(), error)
    for value, error in refused.items():
        if value not in held:
            raise error
    return known


def say_devices() -> None:
    """Print a paragraph for each preset: what `--device list` does."""
    print("\n".join(describe()))


def show_time(seconds: float) -> str:
    """A time in the largest unit of which it is a whole number: 1h, 90min, 100000s."""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size and seconds % size == 0:
            return f"{seconds / size:g}{unit}"
    return f"{seconds:g}s"
