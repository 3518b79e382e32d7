"""Technologies: what each part of the hardware costs, from files with a line a part (`Technology.load`).

    component,value,unit,bits,node_nm,source
    include,rram_32nm,,,,
    columns,256,lines,,,
    adc_energy,0.9,pJ,1-6,28,"our macro, measured at 0.8 V"

A part may stand on several lines, from several sources: the first is the typical one, the cheapest and the dearest make a band. Lines
of a file replace those for the same part in the files that it includes. `PARTS` and the other fields of `Technology` say what there is.

A source of converters for one number of bits is one for all: by its own law, else in proportion to bits. The first source is typical
whatever the bits, so that the typical costs of settings that differ in bits lie on one curve; bits that it is not for have no cost.
"""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ..arrays.spec import MOST_ADC_BITS
from . import adc_fit
from .scaling import LARGEST, SMALLEST, area_factor, energy_factor

FOLDER = Path(__file__).parent / "data"
HEADER = ["component", "value", "unit", "bits", "node_nm", "source"]
LAWS: dict[str, Callable[[int], float]] = {"": lambda bits: 1, "/bit": lambda bits: bits, "/level": lambda bits: 2**bits}
UNITS = {"energy": {"fJ": 1e-15, "pJ": 1e-12, "nJ": 1e-9}, "area": {"um2": 1e-12, "mm2": 1e-6},
         "time": {"ps": 1e-12, "ns": 1e-9, "us": 1e-6}, "power": {"nW": 1e-9, "uW": 1e-6, "mW": 1e-3}, "rate": {"MS/s": 1e6, "GS/s": 1e9},
         "voltage": {"mV": 1e-3, "V": 1.0}, "conductance": {"uS": 1e-6}, "node": {"nm": 1.0}, "cell": {"F2": 1.0}, "lines": {"lines": 1},
         "number": {"": 1}, "switch": {"": 1}}
SHOWN = {"energy": "pJ", "area": "um2", "time": "ns", "power": "uW", "rate": "MS/s"}  # the unit in which values are told
OF_ADC = "adc_energy", "adc_area", "adc_time"  # whose values depend on bits

# What a line may be about: (quantity, whether it must be there, what it is).
PARTS = {
    "row_on": ("energy", True, "a word line that is switched on for one bit of an input"),
    "row_bit": ("energy", True, "a word line for one bit of an input, whether it is on or not"),
    "column_bit": ("energy", False, "a bit line for one bit of an input: sample, hold"),
    "column_pulse": ("energy", False, "a bit line for one pulse: integrate"),
    "array_bit": ("energy", False, "an array for one bit of an input: decoders, control"),
    "adc_energy": ("energy", True, "a conversion"),
    "shift_add": ("energy", True, "shift and add of one conversion"),
    "add": ("energy", True, "adding the sums of one array to those of the others"),
    "count": ("energy", False, "counting a word line among the ones for one bit of an input, in plans by ones"),
    "buffer": ("energy", True, "a bit that is read from or written to the buffers of inputs and outputs"),
    "leakage": ("power", True, "an array with its converters and drivers, always"),
    "adc_time": ("time", True, "a conversion"),
    "adc_area": ("area", True, "a converter"),
    "shift_add_area": ("area", True, "shift and add, one for each converter"),
    "count_area": ("area", False, "counting ones, of each word line"),
    "row_area": ("area", True, "the driver of a word line"),
    "buffer_area": ("area", True, "a bit of the buffer, which holds the input of a layer"),
    "adc_fit": ("rate", False, "energy and area of converters by a fit to published ones, at this rate; a source for both; 0: none"),
}


def setting(quantity: str, text: str, default: Any = None) -> Any:
    """A field that a line sets; without a default the line must be there."""
    return field(default=default, metadata={"quantity": quantity, "help": text})


@dataclass(frozen=True)
class Source:
    """One line: what a part costs by one source. `value` in J, W, s, m2 or samples/s.

    Attributes: law, a key of `LAWS`, how the value grows with the converter's bits; bits, the fewest and the most that it is for, None
        for all; node, nm, None for that of the technology; text, where it comes from.
    """

    component: str
    value: float
    law: str = ""
    bits: tuple[int, int] | None = None
    node: float | None = None
    text: str = ""

    @property
    def of_one(self) -> bool:
        """Whether it is for one number of bits, from which it is taken to all others."""
        return self.component in OF_ADC and self.bits is not None and self.bits[0] == self.bits[1]

    def covers(self, bits: Iterable[int]) -> bool:
        """Whether it says what converters of all these bits cost."""
        return self.bits is None or self.of_one or all(self.bits[0] <= b <= self.bits[1] for b in bits)

    def at(self, component: str, node: float, bits: int = 0) -> float:
        """The value at a node, of a converter of these bits. Args: component, whose value is wanted: a fit has two."""
        if self.component == "adc_fit":
            return (adc_fit.energy if component == "adc_energy" else adc_fit.area)(bits, node, self.value)
        law = bits / self.bits[0] if self.of_one and not self.law else LAWS[self.law](bits)
        return self.value * law * self._scaling(node)

    def value_text(self, node: float) -> str:
        """Its value as it was given, and what that is at a node."""
        quantity = PARTS[self.component][0]
        unit = SHOWN[quantity]
        given, scaled = (f"{factor * self.value / UNITS[quantity][unit]:.4g} {unit}{self.law}" for factor in (1, self._scaling(node)))
        given += f" for {self.bits[0]} bits" if self.of_one else ""
        return given if self._scaling(node) == 1 else f"{given} at {self.node:g} nm, {scaled} at {node:g} nm"

    def _scaling(self, node: float) -> float:
        """What its value is multiplied by at a node: times do not change."""
        quantity = PARTS[self.component][0]
        if self.node is None or quantity == "time":
            return 1.0
        return (area_factor if quantity == "area" else energy_factor)(self.node, node)


@dataclass(frozen=True, kw_only=True)
class Technology:
    """Sources of all parts, and how arrays are built and driven: `docs/cost.md`. Made by `load`.

    Attributes: name; note, what its file says of it; sources, by part. The others, in SI units but for `node` (nm) and `cell_area`
        (F2), have their text in `metadata["help"]`.
    """

    name: str
    sources: dict[str, tuple[Source, ...]] = field(repr=False)
    note: str = field(default="", repr=False)
    node: float = setting("node", "node of the whole, nm; values of other nodes are scaled to it")
    columns: int = setting("lines", "bit lines of an array, those of the reference beside them")
    columns_per_adc: int = setting("lines", "bit lines that share a converter, where the hardware does not say it")
    read_voltage: float = setting("voltage", "across a cell on a word line that is on")
    read_pulse: float = setting("time", "how long it is on for one pulse")
    read_setup: float = setting("time", "time of a read beside its pulses and conversions", 0.0)
    cell_area: float = setting("cell", "of a cell with its transistor, in squares of the node")
    g_min: float = setting("conductance", "lowest level of a cell, where the setting has no device")
    g_max: float = setting("conductance", "highest level")
    copies: int = setting("number", "arrays with the same weights that share the pixels of a layer", 1)
    pipelined: bool = setting("switch", "1: layers work at the same time on images that follow each other", False)
    skip_idle: bool = setting("switch", "1: reads without a row that is on are not converted, whatever the layers' adc_idle says", False)

    def __post_init__(self) -> None:
        for part, (_, required, text) in PARTS.items():
            if required and not self.of(part):
                raise ValueError(f"{self.name} has no {part} ({text}): add a line for it, with value 0 where it costs nothing")
        for item in fields(self):
            value, quantity = getattr(self, item.name), item.metadata.get("quantity")
            if quantity is None:
                continue
            if value is None:
                raise ValueError(f"{self.name} has no {item.name} ({item.metadata['help']}): add a line for it")
            if quantity in ("lines", "number") and not (value == int(value) and value >= 1):
                raise ValueError(f"{self.name}: {item.name} is {value:g}; allowed are whole numbers from 1")
            if quantity == "switch" and value not in (0, 1):
                raise ValueError(f"{self.name}: {item.name} is {value:g}; allowed are 0 and 1")
        if not SMALLEST <= self.node <= LARGEST:
            raise ValueError(f"{self.name}: node is {self.node:g} nm; scaling is known from {SMALLEST} to {LARGEST} nm")
        if not self.g_min < self.g_max:
            raise ValueError(f"{self.name}: g_min is {1e6 * self.g_min:g} and g_max {1e6 * self.g_max:g} uS; g_min must be the lower one")

    @classmethod
    def load(cls, name: str | Path) -> Technology:
        """A technology that comes with the package, or a file of one's own.

        Raises: ValueError, one line, for an unknown name, or a file with a wrong line or without a part that is needed.
        """
        path = _find(str(name), Path())
        note, lines = _read(path, ())
        sources, values = {}, {}
        for component, found in lines.items():
            if component in PARTS:
                sources[component] = tuple(source for source, _ in found)
            else:
                (source, _), *others = found
                if others:
                    raise ValueError(f"{others[0][1]}: {component} stands on two lines; it has one value")
                values[component] = source.value
        for key in ("columns", "columns_per_adc", "copies"):
            if key in values and values[key] == int(values[key]):
                values[key] = int(values[key])
        return cls(name=path.stem, note=note, sources=sources, **values)

    @staticmethod
    def presets() -> list[str]:
        """Names of the technologies that come with the package."""
        return sorted(path.stem for path in FOLDER.glob("*.csv"))

    def of(self, component: str) -> tuple[Source, ...]:
        """The sources of a part, the typical one first. A fit of converters is one, the last, for their energy and their area."""
        fits = [each for each in self.sources.get("adc_fit", ()) if each.value] if component in ("adc_energy", "adc_area") else ()
        return (*self.sources.get(component, ()), *fits)

    def for_bits(self, component: str, bits: Iterable[int]) -> tuple[Source, ...]:
        """The sources of a part that cover converters of all these bits, the typical one first.

        Raises: ValueError where that does not, naming those that there are.
        """
        wanted = sorted(set(bits))
        known = self.of(component)
        if not known[0].covers(wanted):
            texts = "; ".join(f"{_span(source)} bits by {source.text or source.component}" for source in known)
            raise ValueError(f"{self.name} has no {component} for converters of {', '.join(map(str, wanted))} bits; it has {texts}: the "
                             "first, which is typical, must cover them")
        return tuple(source for source in known if source.covers(wanted))

    def check_adc(self, bits: Iterable[int]) -> None:
        """Refuse converters of bits that the typical source does not cover. Raises: ValueError."""
        for component in OF_ADC:
            self.for_bits(component, bits)

    def describe(self) -> str:
        """A paragraph: node, arrays and sources."""
        adcs = "; ".join(f"{source.text} ({_span(source)} bits)" for source in self.of("adc_energy"))
        return (f"{self.name}: {self.note} {self.node:g} nm, arrays of {self.columns} columns, {self.columns_per_adc} to an ADC, "
                f"{self.read_voltage:g} V for {1e9 * self.read_pulse:g} ns, cells {1e6 * self.g_min:g} to {1e6 * self.g_max:g} uS. "
                f"ADC energy: {adcs}.")


def _find(name: str, beside: Path) -> Path:
    """The file of a name: a preset, or a path."""
    if name in Technology.presets():
        return FOLDER / f"{name}.csv"
    path = Path(os.path.abspath(beside / name))  # one name for each file, also for one that includes itself by ..
    if not path.is_file():
        raise ValueError(f"no technology and no file is called {name!r}; technologies are {', '.join(Technology.presets())}")
    return path


def _read(path: Path, inside: tuple[Path, ...]) -> tuple[str, dict[str, list[tuple[Source, str]]]]:
    """(note, `{component: [(source, place of the line), ...]}`) of a file and those that it includes."""
    if path in inside:
        raise ValueError(f"{path.name} includes itself")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {getattr(error, 'strerror', None) or 'it is no text'}") from None
    note = " ".join(line.lstrip("# ").rstrip() for line in text.splitlines() if line.startswith("#"))
    lines: dict[str, list[tuple[Source, str]]] = {}
    included: dict[str, list[tuple[Source, str]]] = {}
    reader = csv.reader(text.splitlines())
    try:
        rows = [(f"{path.name} line {reader.line_num}", [cell.strip() for cell in row]) for row in reader
                if any(map(str.strip, row)) and not row[0].startswith("#")]
    except csv.Error as error:
        raise ValueError(f"{path.name} line {reader.line_num}: {error}") from None
    for where, row in rows[:1]:
        if row != HEADER:
            raise ValueError(f"{where}: the columns are {','.join(row)}; {','.join(HEADER)} is expected")
    for where, row in rows[1:]:
        row += [""] * (len(HEADER) - len(row))
        if len(row) > len(HEADER):
            raise ValueError(f"{where} has {len(row)} values, {len(HEADER)} are expected: put a text with commas in quotes")
        if row[0] == "include":
            included |= _read(_find(row[1], path.parent), (*inside, path))[1]
        else:
            source = _source(row, where)
            lines.setdefault(source.component, []).append((source, where))
    return note, included | lines


def _source(row: list[str], where: str) -> Source:
    component, value, unit, bits, node, text = row
    settings = {item.name: item.metadata["quantity"] for item in fields(Technology) if "quantity" in item.metadata}
    quantity = PARTS[component][0] if component in PARTS else settings.get(component)
    if quantity is None:
        raise ValueError(f"{where}: no component is called {component!r}; there are {', '.join([*PARTS, *settings])}")
    laws = [law for law in LAWS if component in OF_ADC or not law]
    law = next((law for law in reversed(laws) if unit.endswith(law) and unit.removesuffix(law) in UNITS[quantity]), None)
    if law is None:
        known = ", ".join(f"{name}{law}" for name in UNITS[quantity] for law in laws)
        raise ValueError(f"{where}: {component} has the unit {unit!r}; {f'known are {known}' if known else 'it has none'}")
    number = _number(value, f"{where}: {component}") * UNITS[quantity][unit.removesuffix(law)]
    scaled = _number(node, f"{where}: node_nm of {component}") if node else None
    if scaled is not None and not SMALLEST <= scaled <= LARGEST:
        raise ValueError(f"{where}: node_nm of {component} is {node}; scaling is known from {SMALLEST} to {LARGEST} nm")
    if component in PARTS and number > 0 and not text:
        raise ValueError(f"{where}: {component} has no source: say where the number comes from")
    return Source(component, number, law, _bits(bits, where), scaled, text)


def _number(text: str, what: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise ValueError(f"{what} is {text!r}, which is no number") from None
    if not 0 <= value < math.inf:
        raise ValueError(f"{what} is {text}; allowed are numbers from 0")
    return value


def _bits(text: str, where: str) -> tuple[int, int] | None:
    if not text:
        return None
    first, _, last = text.partition("-")
    if not (first.isdecimal() and (last or first).isdecimal() and 1 <= int(first) <= int(last or first) <= MOST_ADC_BITS):
        raise ValueError(f"{where}: bits are {text!r}; a number such as 6 or a span such as 4-8, from 1 to {MOST_ADC_BITS}, is expected")
    return int(first), int(last or first)


def _span(source: Source) -> str:
    if source.bits is None or source.of_one:
        return "all" if source.bits is None else f"all, from {source.bits[0]}"
    return f"{source.bits[0]} to {source.bits[1]}"
