"""The hardware (`CrossbarSpec`) and the shape of a convolution (`Geometry`).

A settings class is the only place of its defaults, of the values that it allows and of a line of help for each field: they
stand in the fields' metadata, from which `check` validates and command lines make their flags.
"""

import functools
import math
import numbers
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from . import transfer
from .converter import Converter

MAPPINGS = ("tap", "im2col")
REFERENCES = ("analog", "digital")
WEIGHTS = ("offset", "pair")
ADC_RANGES = ("calibrated", "full", "dynamic", "ideal")
ADC_PLANS = ("uniform", "significance", "ones")
ADC_PLAN_TEXT = {"significance": "planned", "ones": "planned by ones"}
ADC_IDLE = ("convert", "skip")
# What a field of the hardware is a choice of: the network has it; what cells hold follows from it, or from which rows share an array; how
# inputs are applied; the converters, which make no other reads; and where their ranges come from.
KINDS = ("network", "cells", "arrays", "inputs", "adc", "range")
MOST_ADC_BITS = 12
MOST_ROWS = 1024
ADC_GRID = 64  # ADC steps are multiples of 1 / ADC_GRID in units of the read value


@dataclass(frozen=True, eq=False)
class Numbers:
    """What a field may be: numbers of a type, int or float, that `holds` is true of. `text` says which those are; `words` stand for
    values where somebody writes them, as on a command line."""

    kind: Callable[[str], Any]
    text: str
    holds: Callable[[Any], bool]
    words: Mapping[str, Any] = field(default_factory=dict)

    def read(self, text: str) -> Any:
        """The value that a text means. Raises: ValueError for no number."""
        return self.words[text] if text in self.words else self.kind(text)

    def has(self, value: Any) -> bool:
        """Whether a value is one of these."""
        if isinstance(value, str):
            return value in self.words.values()
        of_kind = isinstance(value, numbers.Integral if self.kind is int else numbers.Real) and not isinstance(value, bool)
        return of_kind and self.holds(value)  # not a number compares as False everywhere


COUNT = Numbers(int, "a whole number from 1 up", lambda value: 1 <= value < 2**63)
COUNT_OR_0 = Numbers(int, "a whole number from 0 up", lambda value: 0 <= value <= 2**62)  # also a seed, above which others are counted
FROM_0 = Numbers(float, "a number from 0 up", lambda value: 0 <= value < math.inf)


def number(default: Any, text: str, allowed: Numbers, **more: Any) -> Any:
    """A field that is one of some numbers, or None where that is its default: `metadata` has "numbers", "help", and what more is given."""
    return field(default=default, metadata={"numbers": allowed, "help": text, **more})


def choice(default: str, allowed: tuple[str, ...], text: str, **more: Any) -> Any:
    """A field that is one of some words: `metadata` has "allowed", "help", and what more is given."""
    return field(default=default, metadata={"allowed": allowed, "help": text, **more})


def count(default: int, most: int | str, text: str, **more: Any) -> Any:
    """A field that is a whole number from 1 to `most`, or to the field of that name: `metadata` has "most", "help", and what more is
    given."""
    return field(default=default, metadata={"most": most, "help": text, **more})


def check_is_spec(spec: Any) -> None:
    """Refuse what is no `CrossbarSpec`. Raises: ValueError."""
    if not isinstance(spec, CrossbarSpec):
        raise ValueError(f"spec is a {type(spec).__name__}; give a CrossbarSpec, such as CrossbarSpec(w_bits=4, a_bits=4, adc_bits=5)")


def check(settings: Any) -> None:
    """Raise ValueError, "<field> is <value>; allowed are ...", for the first field of a dataclass that breaks its metadata."""
    for item in fields(settings):
        value = getattr(settings, item.name)
        if "most" in item.metadata:
            most, bound = item.metadata["most"], ""
            if isinstance(most, str):
                most, bound = getattr(settings, most), f" ({most})"
            if type(value) is not int or not 1 <= value <= most:
                raise ValueError(f"{item.name} is {value!r}; allowed are whole numbers from 1 to {most}{bound}")
        elif "allowed" in item.metadata and value not in item.metadata["allowed"]:
            raise ValueError(f"{item.name} is {value!r}; allowed are {', '.join(item.metadata['allowed'])}")
        elif "numbers" in item.metadata and not (item.metadata["numbers"].has(value) or value is None and item.default is None):
            raise ValueError(f"{item.name} is {value!r}; allowed is {item.metadata['numbers'].text}")


@dataclass(frozen=True)
class CrossbarSpec:
    """One hardware setting (docs of each field: its `metadata["help"]`, printed by the flags' help).

    The metadata also says how a field is listed (`hardware`). "of": what it is a choice of, one of `KINDS`. "turn": its place in the
    order of a table's rows; the last ones change fastest. "note": place and form of its words in a setting's name, where its value is
    not the usual one and the name's first words do not say it. "before": its value in files that are older than the field.

    Sources: tap mapping and arrays, NeuroSim V1.2 (Peng et al., arXiv 2003.06471, section III).

    Attributes:
        w_bits: bits w of a weight code W, 1..8.
        a_bits: bits a of an activation code A, 1..8.
        cell_bits: bits c of one memory cell, 1..w; a weight takes `ceil(w / c)` cells (slices), `W = sum_k 2^(c k) C_k`.
        adc_bits: bits B of one ADC code, 1..12; `q = clip(rint(v / delta), q_min, q_min + 2^B - 1)`. With a plan it is the mean over
            all reads of a layer or of the network, from 0 to `adc_max_bits`, and may be a fraction.
        rows: word lines of one array that are read together, 1..1024.
        mapping: "tap" or "im2col", how kernel positions share arrays.
        reference: "analog" or "digital", where the reference column is subtracted. With a plan by ones a digital one moves the ADC's
            range (`moves_range`).
        dac_bits: bits d of one input digit, 1..a; inputs take `ceil(a / d)` reads, `A = sum_z 2^(d z) a_z`.
        adc_range: "calibrated", "full", "dynamic" or "ideal", where the ADC's range comes from.
        adc_plan: what has ADC bits and a range of its own. "uniform": nothing, all reads have `adc_bits`. "significance": each digit z
            and slice k, as its reads enter the output with `2^(d z + c k)`. "ones": also each class of n, the sum of the digits on the
            word lines (`classes`). 0 bits mean no conversion. The hardware for "significance" is a successive-approximation converter
            that stops early. For "ones" it also leaves out first steps and needs a count of the ones of an array. (Sources: Nag et al.,
            Newton, IEEE Micro 38 (5), 2018, adapt an ADC to the significance of what it reads, without a loss. ELEX 22 (3), 2025, leaves
            out first steps of sparse inputs, by one threshold.)
        adc_max_bits: most bits of one kind of read in a plan, 1..12.
        adc_idle: "convert" or "skip": whether idle reads are converted. A read is idle where no word line of the array is on. A skipped
            read is exactly 0, whatever the converter's noise and offset, and has 0 bits in the mean of a plan. The hardware is an OR
            gate over the digits on the word lines. A plan by ones always skips idle reads.
        adc_transfer: thresholds and values of the codes: the path of a file, or code or a pair of lists that gives them (`transfer`). The
            field holds their table as a text. None: linear converters.
        columns_per_adc: columns that share a converter; None: what `Chips` and costs take without it.
        weights: "offset": a weight has one cell in each slice, and a reference column holds the code that stands for zero. "pair": it has
            two, on a positive and a negative bit line (`pair`).
    Raises: ValueError for values outside these.
    """

    w_bits: int = count(4, 8, "bits w of a weight code, W = 0 .. 2^w - 1.", of="network")
    a_bits: int = count(4, 8, "bits a of an activation code, A = 0 .. 2^a - 1.", of="network")
    cell_bits: int = count(1, "w_bits", "bits c of a memory cell. A weight is cut into slices of c bits, one for each cell: W = sum_k "
                           "2^(c k) C_k.", of="cells", turn=6)
    adc_bits: float = field(default=6, metadata={
        "fractions": True, "help": "bits B of the ADC: q = clip(rint(v / delta), q_min, q_min + 2^B - 1). With an adc_plan: their mean "
        "over all reads, such as 2.5.", "of": "adc", "turn": 11})
    rows: int = count(128, MOST_ROWS, "word lines of an array. They are read together: v = sum over the rows of a_z C_k - r_k a_z.",
                      of="arrays", turn=5, note=(2, "rows {}"))
    mapping: str = choice(
        "tap", MAPPINGS, "tap: each kernel position has arrays of its own. im2col: kernel positions are laid end to end, then cut into "
        "arrays.",
        of="arrays", turn=2, note=(3, "mapping {}"))
    reference: str = choice(
        "analog", REFERENCES, "analog: the ADC sees the difference to a reference column, v = P - r_k n. digital: the ADC sees v = P, "
        "and r_k n is subtracted behind it; with adc_plan ones its range moves by r_k n.", of="cells", turn=3, note=(4, "reference {}"))
    dac_bits: int = count(1, "a_bits", "bits d of an input digit: A = sum_z 2^(d z) a_z.", of="inputs", turn=4,
                          note=(5, "dac_bits {}"))
    adc_range: str = choice(
        "calibrated", ADC_RANGES, "calibrated: delta and q_min are chosen once, on training images. full: the range covers all that an "
        "array can give. dynamic: from the smallest to the largest v of each batch. ideal: no ADC.", of="range", turn=8)
    adc_plan: str = choice(
        "uniform", ADC_PLANS, "uniform: all reads have adc_bits. significance: each digit z and slice k has a range and bits of its "
        "own, from 0 (no conversion) to adc_max_bits. Their mean is adc_bits, and they go where they lower the error most. ones: the "
        "bits depend also on n, the sum of the digits on the word lines, by its length in bits. Then fewer bits give the same error.",
        of="adc", turn=9, before="uniform")
    adc_max_bits: int = count(8, MOST_ADC_BITS, "most bits of one read in a plan.", of="adc", turn=7, before=8,
                              note=(6, "adc_max_bits {}"))
    adc_idle: str = choice(
        "convert", ADC_IDLE, "what happens to idle reads, which are 0 because no word line of their array is on. convert: they are "
        "converted like the others. skip: they are not converted. In a plan they count as 0 bits in the mean, so the others may have "
        "more.", of="adc", turn=10, before="convert",
        note=(7, "idle reads skipped"))
    weights: str = choice(
        "offset", WEIGHTS, "offset: each slice of W is one cell, and a reference column holds the code of zero. pair: the digits of the "
        "weight's size lie on a positive or on a negative bit line, v = sum a_z (X+ - X-). A pair takes twice the cells, and no "
        "reference.",
        of="cells", turn=1, before="offset", note=(1, "weights {}"))

    adc_transfer: str | None = field(default=None, metadata={
        "kind": str, "metavar": "FILE", "help": "the threshold and value of each code of the converters, in steps delta, from a CSV or "
        "JSON, or path/to/adc.py:NAME, a function or class of your own that gives them, or the value of a read: any nonlinearity, sign and "
        "ternary converters too (docs/devices.md). Default: linear.", "of": "adc", "turn": 13,
        "before": None, "note": (8, "transfer {:.8}")})
    columns_per_adc: int | None = number(
        None, "neighbouring columns of a slice that share a converter, its offset, gain and thresholds. Costs count with it, too. Default: "
        "each column of a chip has its own, and costs take what the technology says.", COUNT, of="adc", turn=12, before=None,
        note=(9, "{} columns to an ADC"))

    def __post_init__(self) -> None:
        check(self)
        object.__setattr__(self, "adc_transfer", transfer.table_of(self.adc_transfer))
        if self.weights == "pair" and self.reference == "digital":
            raise ValueError("weights is 'pair' with reference 'digital'; a pair has no reference column to subtract, so allowed is "
                             "reference analog")
        if self.adc_idle == "skip" and self.adc_range == "dynamic":
            raise ValueError("adc_idle is 'skip' with adc_range 'dynamic', which has no code for 0; allowed is adc_idle convert")
        if self.converter is not Converter and self.adc_range == "dynamic":
            raise ValueError("adc_range is 'dynamic', which works with linear converters only; allowed are calibrated and full")
        self._check_adc_bits()

    def _check_adc_bits(self) -> None:
        bits, planned = self.adc_bits, self.adc_plan != "uniform"
        if planned and self.adc_range not in ("calibrated", "ideal"):
            raise ValueError(f"adc_plan is {self.adc_plan!r} with adc_range {self.adc_range!r}; a plan is made from the reads of "
                             "training images, so allowed is calibrated")
        if planned and not (isinstance(bits, (int, float)) and not isinstance(bits, bool) and 0 <= bits <= self.adc_max_bits):
            raise ValueError(f"adc_bits is {bits!r}; allowed are means from 0 to {self.adc_max_bits} (adc_max_bits)")
        if not planned and (type(bits) is not int or not 1 <= bits <= MOST_ADC_BITS):
            mean = ". With adc_plan significance or ones it is a mean and may be a fraction" if isinstance(bits, float) and bits > 0 else ""
            raise ValueError(f"adc_bits is {bits!r}; allowed are whole numbers from 1 to {MOST_ADC_BITS}{mean}")
        name, most = ("adc_max_bits", self.adc_max_bits) if planned else ("adc_bits", bits)
        if self.adc_transfer is not None and self.adc_range != "ideal" and most > self.converter.most_bits:
            raise ValueError(f"{name} is {most!r} with an adc_transfer of {len(self.converter.full[1])} codes; allowed are whole numbers "
                             f"from 1 to {self.converter.most_bits}")

    @property
    def converter(self) -> type[Converter]:
        """The kind of its ADCs."""
        return Converter if self.adc_transfer is None else transfer.kind(self.adc_transfer)

    @property
    def planned(self) -> bool:
        """Whether each digit and slice has an ADC precision of its own."""
        return self.adc_plan != "uniform" and self.adc_range == "calibrated"

    @property
    def moves_range(self) -> bool:
        """Whether the range of its ADCs moves by `r_k n`: where the reference is digital and converters go by n. Their codes then stand
        for `v = P - r_k n`, as those of an analog reference do, of one without scatter."""
        return self.reference == "digital" and self.adc_plan == "ones"

    @property
    def skips_idle(self) -> bool:
        """Whether reads without a word line that is on are 0 and not converted."""
        return self.adc_idle == "skip" or self.adc_plan == "ones"

    def classes(self, rows: int) -> int:
        """The number of classes of n, the sum of the digits on the word lines, in arrays of so many rows. Class j has the n of j bits:
        0, 1, 2 to 3, 4 to 7, ... The last class has all larger n too. There is one class where n does not matter, and two where
        only reads of n = 0 are apart."""
        return 1 + (rows * (2 ** max(self.digit_bits) - 1)).bit_length() if self.adc_plan == "ones" else 1 + self.skips_idle

    @property
    def adc_text(self) -> str:
        """The ADC as tables name it."""
        if self.adc_range == "ideal":
            return "no ADC"
        return f"{self.adc_bits:g}-bit ADC, {ADC_PLAN_TEXT[self.adc_plan] if self.planned else self.adc_range}"

    @property
    def slice_bits(self) -> tuple[int, ...]:
        """Bits of each slice of a code, LSB first; the last holds what is left: 4-bit weights on 3-bit cells give (3, 1). (Pairs may
        hold a bit less: `pair.on_cells`.)"""
        return _split(self.w_bits, self.cell_bits)

    @property
    def digit_bits(self) -> tuple[int, ...]:
        """Bits of each input digit, LSB first."""
        return _split(self.a_bits, self.dac_bits)

    @property
    def unit(self) -> float:
        """Value of `u = 1` in units of `v`: 1/2 where half a level may be subtracted, else 1."""
        return 0.5 if self.reference == "analog" and self.weights == "offset" else 1.0


def hardware(*kinds: str) -> tuple[str, ...]:
    """The fields of the hardware that are of these `KINDS`."""
    return tuple(item.name for item in fields(CrossbarSpec) if item.metadata.get("of") in kinds)


# What files mean that are older than a field and lack it, whatever its default is now.
BEFORE = {item.name: item.metadata["before"] for item in fields(CrossbarSpec) if "before" in item.metadata}


@functools.cache
def _split(bits: int, size: int) -> tuple[int, ...]:
    return tuple(min(size, bits - start) for start in range(0, bits, size))


@dataclass(frozen=True)
class Geometry:
    """Shape of a convolution; a linear layer is a 1x1 convolution of a 1x1 image.

    Pairs are (vertical, horizontal); `padding` is (top, bottom, left, right), in pixels of code 0. Where a kernel has positions one behind
    the other, of a volume, their channels are those of one image, those of one of the `planes` after those of the other.
    """

    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    planes: int = 1

    def output_size(self, height: int, width: int, kernel: tuple[int, int]) -> tuple[int, int]:
        """Height and width of the output, in pixels: `floor((size + padding - dilation (kernel - 1) - 1) / stride) + 1`.

        Raises: ValueError where the kernel is larger than the padded input.
        """
        top, bottom, left, right = self.padding
        sizes = (height + top + bottom, width + left + right)
        reach = tuple(d * (k - 1) + 1 for d, k in zip(self.dilation, kernel))
        if any(size < taps for size, taps in zip(sizes, reach)):
            raise ValueError(f"the kernel covers {reach[0]} x {reach[1]} pixels, the padded input has {sizes[0]} x {sizes[1]}")
        return tuple((size - taps) // step + 1 for size, taps, step in zip(sizes, reach, self.stride))
