"""The flags of chips: which device the cells of a network are, and what its reads have besides.

    device = DeviceSettings(device="techA", device_time=3600.0).made()
    chips = chips_of({"device": "techA", "device_time": 3600.0, "chips": 10})

The flags of eval.py are the fields of `DeviceSettings`, `Chips` and `WeightNoise`, those of train.py the fields of `TrainingChips`.
"""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from models import quant
from models.quant import Device, WeightNoise
from models.quant.devices import Law, describe, parse_time, presets, raw_folder
from models.quant.measuring.chips import Chips, Reads

from ..program import flags, user_code
from ..program.cli import UserError, user_error
from ..program.flags import COUNT, COUNT_OR_0, Number, option

LIST = "list"  # --device list: say which there are
IDEAL = "ideal"  # the device of cells that have what flags say and nothing else
TIME = Number(parse_time, "seconds, or a number with ms, s, min, h, d or w, such as 1h", lambda value: 0 <= value < float("inf"))
TEMP = Number(float, "a number of degrees Celsius", lambda value: -274 < value < float("inf"))
PROBABILITY = Number(float, "a probability from 0 to 1", lambda value: 0 <= value <= 1)


@dataclass(frozen=True, kw_only=True)
class DeviceSettings:
    """what a cell is"""

    device: str | None = option(
        None, "what the cells are: a preset, a file or folder of your own measurements, or path/to/law.py:NAME, a class or function of "
        f"your own (docs/devices.md). {LIST} describes the presets. Default: ideal cells, and where a number of scatter, faults, noise "
        f"or wires is given, those of the preset {IDEAL}",
        metavar="NAME|FILE")
    device_time: float | None = option(
        None, "when the cells are read: seconds, or 10s, 1h, 1d. Tables are interpolated in log t between measured times. --device "
        f"{LIST} says which times there are. Default: the first time of the device", TIME)
    device_temp: float | None = option(None, "temperature, C. Default: the lowest that the device has", TEMP)
    stuck_on: float | None = option(
        None, "probability that a cell always has the conductance of the highest level. Default: that of the device", PROBABILITY)
    stuck_off: float | None = option(None, "the same for the lowest level. Default: that of the device", PROBABILITY)

    def made(self, known: dict[str, Device] | None = None) -> Device:
        """The device. Args: known, devices that were read already, which saves reading a file again for each of its times.

        Raises: UserError for an unknown name, a file that cannot be right, and times and temperatures outside the data.
        """
        known, name = {} if known is None else known, self.device
        changes = {"time": self.device_time, "temp": self.device_temp} | {
            key: value for key in ("stuck_on", "stuck_off") if (value := getattr(self, key)) is not None}
        with (user_error(lambda error: f"--device {name}: cannot be read: {error.strerror or error}", OSError),
              user_error(lambda error: f"--device {name}: {error}")):
            if name not in known:
                known[name] = _of_code(name) if user_code.is_file(name) else Device.load(name)
            return replace(known[name], **changes)


def _of_code(name: str) -> Device:
    """The device that a class or function of a user's file makes, or that of a law, over all conductances that it covers."""
    made = user_code.made("device", name)
    if isinstance(made, Law) and made.span:
        made = Device(made.name, name, *made.span, made)
    if not isinstance(made, Device):
        raise ValueError(f"makes {type(made).__name__}; a models.quant.Device is expected, or a Law with a span")
    if not type(made.law).__module__.startswith(quant.__name__):
        object.__setattr__(made.law, "code", tuple(user_code.digests(name.rpartition(":")[0])))
    return made


@dataclass(frozen=True, kw_only=True)
class TrainingChips(DeviceSettings, Reads):
    """training on chips of a device"""

    chip_steps: int = option(1, "steps K with the same chip. Step i of the run is made on chip S + 1 + floor(i / K), programmed from "
                             "the weights as they are", COUNT)
    chip_seed: int = option(0, "seed S of the chip on which each epoch is measured. Training sees only chips above S", COUNT_OR_0)


OF_DEVICE = tuple(flags.defaults(DeviceSettings))
CHIP_FIELDS = tuple(flags.defaults(Chips))
OF_RUN = tuple(item.name for item in fields(Chips) if item.metadata.get("of") == "run")  # the same for all rows of a table
OF_NOISE = tuple(flags.defaults(WeightNoise))
CHIPS_OR_NOISE = tuple(dict.fromkeys([*CHIP_FIELDS, *OF_NOISE]))
OF_ROW = tuple(name for name in (*OF_DEVICE, *CHIPS_OR_NOISE) if name not in OF_RUN)
OF_MOMENT = ("device_time", "device_temp")
OF_TRAINING = tuple(flags.defaults(TrainingChips))
OF_IDEAL = ("stuck_on", "stuck_off", *(item.name for item in fields(Chips) if "numbers" in item.metadata and item.name not in OF_RUN))
WITHOUT = "--{} is for the cells of a device: add --device NAME, or see --device " + LIST


def names_of(devices: Iterable[str]) -> dict[str, str]:
    """What `--device` values are called in tables and files: a preset as it is, a folder by its name, a file by that without its ending, or
    where another one has that too, by as much of the end of its path as tells them apart."""
    def short(path):
        return user_code.short_name(path.name) if user_code.is_file(path.name) else path.name if path.is_dir() else path.stem

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


def device_of(values: Mapping[str, Any]) -> str | None:
    """The device that flags mean, `{flag: value}` of some or all of them: where none is given, but what cells or their reads have, ideal
    cells; None without either."""
    device = values.get("device")
    return IDEAL if device is None and any(values.get(name) for name in OF_IDEAL) else device


def chips_of(values: Mapping[str, Any], known: dict[str, Device] | None = None, names: Mapping[str, str] | None = None
             ) -> Chips | WeightNoise | None:
    """The chips that flags mean, `{flag: value}` of some or all of them; None without a device (`device_of`) and noise on the weights.
    Args: known, see `made`; names, of several devices.

    Raises: UserError for flags of chips without a device, and as `made`.
    """
    noisy, device = values.get("weight_noise") is not None, device_of(values)
    if noisy and device:
        name = next(name for name in ("device", *OF_IDEAL) if values.get(name))
        raise UserError(f"--weight_noise {values['weight_noise']} is on weights without cells, and --{name} {values[name]} is of cells: "
                        "give one of them, and the other in --also")
    if values.get("device") is None and (missing := next((name for name in OF_MOMENT if values.get(name) is not None), None)):
        raise UserError(WITHOUT.format(missing))
    if device is None:
        for name, usual in (flags.defaults(TrainingChips) | flags.defaults(Chips)).items():
            if values.get(name, usual) not in (usual, 0) and not (noisy and name in OF_RUN):
                raise UserError(WITHOUT.format(name))
        return WeightNoise(**{name: values[name] for name in OF_NOISE if name in values}) if noisy else None
    made = DeviceSettings(**{name: values[name] for name in OF_DEVICE if name in values} | {"device": device}).made(known)
    name = (names or names_of([device]))[device]
    with user_error(lambda error: f"--{error}" if str(error).startswith(CHIP_FIELDS) else f"--device {device}: {error}"):
        return Chips(device=made, name=name, **{name: values[name] for name in CHIP_FIELDS if name in values})


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
