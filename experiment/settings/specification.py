"""What `eval.py --specify` asks of a network: quantities (`quantities_for`), each alone, and for how large a loss (`bounds_for`).

    for quantity in quantities_for(settings):
        print(quantity.name, quantity.span.flag, quantity.flags)
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from models.quant import CrossbarSpec, Device
from models.quant.devices import presets
from models.quant.devices.times import Times
from models.quant.measuring.metrics import Scale

from ..program.cli import UserError
from ..program.flags import ALIASES
from .chips import IDEAL, devices_of
from .eval_flags import EvalSettings
from .limits import Bound, Span, bounds_of, example_of, span_of

GATE = "wires, gate"  # the quantity of wires by fitted curves
ON_OFF = "least on/off, digital"  # that of the on/off ratio, which a digital reference has in its reads
LOSSES = 0.5, 1.0  # points of accuracy, unless bounds are given
STEP = {False: "50log", True: "10log"}  # from value to value, of a sheet and of one that refines it
STEP_OF_TIMES = {False: "100log", True: "20log"}
LONGEST = 10 * 365 * 86400.0  # seconds: where a law of drift has no end


@dataclass(frozen=True, eq=False)
class Quantity:
    """What has a limit. Attributes: name, and its unit; span, of its values; flags, `{flag: [value]}` of other hardware that it needs;
    joint, whether the corner has it."""

    name: str
    unit: str
    span: Span
    flags: Mapping[str, list] = field(default_factory=dict)
    joint: bool = True


def quantities_for(settings: EvalSettings) -> list[Quantity]:
    """Those of --only, or all that there are: with the retention of each preset that has times, or of the device that is given.

    Raises: UserError for what --only names and is none.
    """
    given = settings.hardware.get("device", [None])
    names = [given[0]] if given[0] not in (None, IDEAL) else presets()
    known = devices_of({"device": names})
    [temp] = settings.hardware.get("device_temp", [None])
    spans = {name: _span_of_times(known[name], temp, STEP_OF_TIMES[settings.refine]) for name in names}
    found = [*_quantities(STEP[settings.refine]), *(Quantity(f"{name} holds", "time", span, {"device": [name]}, joint=False)
                                                    for name, span in spans.items() if span)]
    known = dict.fromkeys(each.span.flag for each in found)
    only = [ALIASES.get(name, name) for text in settings.only for name in text.split(",") if name]
    if settings.only and not (only and {*only} <= {*known}):
        wrong = next((name for name in only if name not in known), "")
        raise UserError(f"--only {wrong}: no line of this sheet is of such a flag; there are {', '.join(known)}")
    return [each for each in found if not only or each.span.flag in only]


def _quantities(step: str) -> list[Quantity]:
    """Those of any device, the most asked first. Args: step, from value to value."""
    def largest(text: str) -> Span:
        return span_of(f"{text}:{step}")

    fewest = span_of("adc_bits=0.25:6:0.25", smallest=True)
    return [
        Quantity("fewest ADC bits", "bits", span_of("adc_bits=1:8:1", smallest=True), {"adc_plan": ["uniform"]}, joint=False),
        Quantity("scatter of cells", "%", largest("sigma=0.1:50")),
        Quantity("read noise", "uS", largest("read_noise=0.1:50")),
        Quantity(ON_OFF, "", span_of(f"on_off=1.5:1000:{step}", smallest=True), {"reference": ["digital"]}, joint=False),
        Quantity("cells stuck on", "share", largest("stuck_on=1e-5:0.5")),
        Quantity("cells stuck off", "share", largest("stuck_off=1e-5:0.5")),
        Quantity("fewest bits, planned", "bits", fewest, {"adc_plan": ["significance"]}, joint=False),
        Quantity("fewest bits, by ones", "bits", fewest, {"adc_plan": ["ones"]}, joint=False),
        Quantity("wires, voltage", "ohm", largest("wire_ohm=0.01:100"), {"access": ["voltage"]}),
        Quantity(GATE, "ohm", largest("wire_ohm=0.01:100"), {"access": ["gate"]}, joint=False),
        Quantity("noise of ADC", "levels", largest("adc_noise=0.05:20")),
        Quantity("offset of ADC", "levels", largest("adc_offset=0.05:20")),
        Quantity("gain of ADC", "share", largest("adc_gain=0.001:0.5")),
        Quantity("INL of ADC", "LSB", largest("adc_inl=0.05:20")),
        Quantity("DNL of ADC", "LSB", largest("adc_dnl=0.05:20")),
        Quantity("most rows", "rows", span_of("rows=16:1024:100log"), joint=False)]


def _span_of_times(device: Device, temp: float | None, step: str) -> Span | None:
    """From the first time of its data behind 0 to the last one, or to ten years where a law goes on; None where there are not two. Args:
    temp, its temperature; None: the lowest that it has."""
    times = device.law.times.get(device.temp if temp is None else temp, Times())
    points = [time for time in (*times.points, times.onward) if time]
    last = LONGEST if times.onward is not None else max(points, default=0)
    if not points or last <= points[0] or not (times.between or times.onward):
        return None
    span = span_of(f"device_time={points[0]}:{last}:{step}")
    return replace(span, values=(*(value for value in span.values if value < last), last))


def bounds_for(settings: EvalSettings, metric: Scale) -> list[tuple[str, Bound | None]]:
    """Texts and meanings of the bounds of a sheet. Raises: UserError where none is given and the metric is no accuracy."""
    given = bounds_of(settings)
    if given:
        return given
    if metric.name != Scale().name:
        raise UserError(f"--specify needs to know how much of the {metric.name} may be lost: give a bound, such as {example_of(metric)}")
    return [(f"--at_least accuracy=software-{loss:g}", Bound(metric.name, 1, 1.0, -loss)) for loss in LOSSES]


def weights_for(settings: EvalSettings) -> list[str]:
    """Single cells and pairs, unless one of them is asked for."""
    return settings.hardware.get("weights", list(CrossbarSpec.__dataclass_fields__["weights"].metadata["allowed"]))


def check(settings: EvalSettings) -> None:
    """Refuse hardware of which a sheet has no one value, but for what it looks for. Raises: UserError."""
    for name, values in settings.hardware.items():
        if name in ("weight_noise", "adc_range") and values != ["calibrated"]:
            raise UserError(f"--{name} does not go with --specify, whose limits are of cells behind calibrated ADCs")
        if name != "per_layer" and len(values) != 1:
            raise UserError(f"--{name} has {len(values)} values, and --specify makes the sheet of one hardware: give one of them")
    quantities_for(settings)
