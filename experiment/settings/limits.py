"""Bounds of a metric, and spans of a flag's values among which a limit is looked for: what --at_least, --at_most, --largest and --smallest
say.

    bound_of("accuracy=software-0.5", 1).at(90.0)            # 89.5
    span_of("read_noise=0:20:0.1").values                    # 0.0, 0.1, ..., 20.0
    span_of("device_time=1s:1w:10log").values                # 1 s, 1.1 s, 1.21 s, ...: steps of 10 %
"""

import argparse
import math
import re
from dataclasses import dataclass

from models.quant.measuring.metrics import Metric, OfTorchmetrics, Scale

from ..program import flags
from ..program.cli import UserError
from ..program.flags import Number
from .eval_flags import OF_SETTINGS, EvalSettings

MOST = 100_000  # values of a span
_VALUE = re.compile(r"(software)?(?:([*+-])?([0-9.]+(?:[eE][+-]?[0-9]+)?|-[0-9.]+))?")


@dataclass(frozen=True)
class Bound:
    """`sign value >= sign (factor s + more)`, s what the software has. Attributes: name, of what; sign, 1 for at least, -1 for at most."""

    name: str
    sign: int
    factor: float
    more: float

    def at(self, software: float) -> float:
        """The number that it means beside this one of the software's."""
        return self.factor * software + self.more

    def beyond(self, value: float, software: float) -> float:
        """By how much a value misses it: 0 or less within it, and 0 where only rounding sets them apart."""
        at = self.at(software)
        return 0.0 if math.isclose(at, value, rel_tol=1e-12) else self.sign * (at - value)

    def holds(self, value: float, software: float) -> bool:
        """Whether a value is within it."""
        return self.beyond(value, software) <= 0


def bound_of(text: str, sign: int) -> Bound | None:
    """The bound that NAME=90, NAME=software, NAME=software-0.5 or NAME=software*1.03 says; None for what says none."""
    name, _, value = text.partition("=")
    found = _VALUE.fullmatch(value)
    try:
        software, operation, number = found.groups() if value and found else (None, None, "")
        if software and not operation:
            return Bound(name, sign, 1.0, 0.0) if number is None else None
        if operation == "*":
            return Bound(name, sign, float(number), 0.0) if software else None
        return Bound(name, sign, float(bool(software)), float(f"{operation or ''}{number}"))
    except ValueError:
        return None


@dataclass(frozen=True)
class Span:
    """Values of a flag, of which the last one that keeps a bound is looked for. Attributes: flag; values, the first those that keep it most
    easily; smallest, whether more is better."""

    flag: str
    values: tuple[float, ...]
    smallest: bool = False


def fields_of_hardware() -> dict:
    """`{flag: field}` of the flags whose values make settings."""
    return {flags.flag_name(field.name): field for _, _, cls, names in OF_SETTINGS for field in flags.flag_fields(cls, names)}


def span_of(text: str, smallest: bool = False) -> Span:
    """The span that FLAG=FIRST:LAST:RESOLUTION says; the resolution may be "5log", steps of 5 %. Args: smallest, more of it is better.

    Raises: UserError for flags that are none or have no order, and for what is no span.
    """
    name, _, ends = text.partition("=")
    flag = f"--{'smallest' if smallest else 'largest'} {text}"
    name, known = flags.ALIASES.get(name, name), fields_of_hardware()
    if name not in known:
        raise UserError(f"{flag}: there is no flag --{name} of the hardware; give FLAG=FIRST:LAST:RESOLUTION, such as adc_noise=0:2:0.1")
    kind = flags.flag_kind(known[name])
    if not isinstance(kind, Number):
        raise UserError(f"{flag}: the values of --{name} have no order")
    first, last, step, of_share = _ends(flag, kind, ends)
    count = int((math.log(last / first) / math.log1p(step / 100) if of_share else (last - first) / step) + 1e-9) + 1
    if count > MOST:
        raise UserError(f"{flag}: has {count} values; a wider resolution is expected, of at most {MOST}")
    values = [first * (1 + step / 100)**i if of_share else first + i * step for i in range(count)]
    whole = all(isinstance(each, int) for each in (first, last, *(() if of_share else (step,))))
    made = dict.fromkeys(round(value) if whole else float(f"{value:{'.4g' if of_share else '.12g'}}") for value in values)
    return Span(name, tuple(made)[::-1 if smallest else 1], smallest)


def _ends(flag: str, kind: Number, text: str) -> tuple[float, float, float, bool]:
    """First, last, step, and whether that is in per cent."""
    parts = text.split(":")
    of_share = parts[-1].endswith("log")
    try:
        first, last = map(kind, parts[:-1])
        step = float(parts[-1].removesuffix("log")) if of_share else kind.read(parts[-1])  # a difference, of any size
        numbers = all(isinstance(each, (int, float)) for each in (first, last, step))
    except (ValueError, argparse.ArgumentTypeError):
        numbers = False
    if not numbers:
        raise UserError(f"{flag}: give FLAG=FIRST:LAST:RESOLUTION, each {kind.text}; or as the resolution 5log, steps of 5 %")
    if not (first < last and 0 < step < math.inf) or of_share and first <= 0:
        raise UserError(f"{flag}: is an empty span; FIRST:LAST:RESOLUTION goes up, in steps of per cent from above 0")
    return first, last, step, of_share


def spans_of(settings: EvalSettings) -> list[Span]:
    """What --largest and --smallest say. Raises: UserError, see `span_of`."""
    return [span_of(text) for text in settings.largest] + [span_of(text, smallest=True) for text in settings.smallest]


def check(settings: EvalSettings) -> None:
    """Refuse spans and bounds that cannot be, but for the metric's name. Raises: UserError."""
    for span in spans_of(settings):
        if span.flag in settings.hardware:
            raise UserError(f"--{span.flag} is given, and its limit is looked for too: leave one of them out")
    bounds = [*settings.at_least, *settings.at_most]
    if settings.limits and len(bounds) != 1:
        raise UserError(f"--largest and --smallest need one bound, and {len(bounds) or 'none'} is given: --at_least "
                        "accuracy=software-0.5, or --at_most of a metric of which less is better")


def example_of(metric: Scale) -> str:
    """A bound of this metric."""
    return f"--at_least {metric.name}=software-0.5" if metric.higher else f"--at_most {metric.name}=software*1.03"


def check_range(text: str, bound: Bound, metric: Metric | OfTorchmetrics, software: float | None = None) -> None:
    """Refuse a bound that the metric cannot have. Args: text, what says it; software, what the software has, None while that is not known.
    Raises: UserError."""
    (low, high), scale = metric.range, metric.scale
    found = [bound.at(each) if bound.factor else bound.more for each in ((low, high) if software is None else (software,))]
    if low <= max(found) and min(found) <= high:
        return
    ends = [f"at least {low:g}"] * (low > -math.inf) + [f"at most {high:g}"] * (high < math.inf)
    loss = f"--at_least {scale.name}=software{bound.more:g}, if {-bound.more:g} may be lost"
    raise UserError(f"{text}: {scale.head} is {' and '.join(ends)}: give a bound within, such as "
                    f"{loss if scale.higher and not bound.factor and bound.more < 0 else example_of(scale)}")


def bounds_of(settings: EvalSettings) -> list[tuple[str, Bound | None]]:
    """Texts and meanings of --at_least and --at_most."""
    return [(f"--at_{end} {text}", bound_of(text, sign)) for end, sign in (("least", 1), ("most", -1))
            for text in getattr(settings, f"at_{end}")]
