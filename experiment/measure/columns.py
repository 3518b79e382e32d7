"""The columns of results: what each is called, where it comes from, what it may hold, and how a table shows it.

A line of results.jsonl has all of `COLUMNS`, in this order; the record of a point is read back from those that are fields of `Record`;
tables show those that have a head, in the order of `SHOWN`. Where another metric stands for the accuracy, the keys of a line have its name
in place of that word (`named`).
"""

import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

from models.quant import CrossbarSpec, WeightNoise
from models.quant.cost import Band
from models.quant.layers.quantizers import OFF
from models.quant.measuring import metrics
from models.quant.measuring.chips import Chips
from models.quant.measuring.measure import Record
from models.quant.measuring.metrics import Scale
from models.quant.measuring.setting import LAYER_FIELDS
from models.quant.measuring.task import Task

from ..inputs import foreign
from ..program import machine
from ..program.cli import UserError, user_error
from ..program.plain import is_count, is_dict, is_number, is_percent, is_text, several
from ..settings.chips import CHIPS_OR_NOISE
from ..settings.conversion_settings import OPTIONS
from ..settings.costs import FIGURES, figure
from ..settings.eval_flags import EvalSettings


@dataclass
class Measured:
    """What a line is made from. Attributes: calib_images, how many images chose the ranges of this setting, None where none did; source,
    where calibrated ranges come from that were not chosen here: a file's path or "checkpoint"."""

    record: Record
    settings: EvalSettings | None = None
    calib_images: int | None = None
    source: str | None = None

    @cached_property
    def spec(self) -> CrossbarSpec | None:
        """The hardware; None for the software, and for weights without cells."""
        return self.record.setting.spec if self.record.setting and not self.record.setting.without_cells else None

    @cached_property
    def chips(self) -> Chips | WeightNoise | None:
        """None for ideal cells."""
        return self.record.setting and self.record.setting.chips

    def rule(self, name: str, *planned: bool) -> Any:
        """A field of how ranges were chosen; None where none were. Args: planned, of layers with a plan, without, or both."""
        setting = self.record.setting
        return getattr(setting.calibration, name) if self.calib_images and setting and setting.plans & {*planned} else None


@dataclass(frozen=True)
class Column:
    """One column.

    Attributes:
        name: the key of a line.
        of: its value, plain; None where it does not apply.
        fits: whether it may hold a value, if it has one; None: any.
        empty: whether it may be None.
        field: what it is of `Record`.
        older: whether older lines lack it.
        head: what a table has above it, or what makes that of its records; None where it has no such column.
        text: what that shows of a record.
    """

    name: str
    of: Callable[[Measured], Any]
    fits: Callable[[Any], bool] | None = None
    empty: bool = True
    field: str | None = None
    older: bool = False
    head: str | Callable[[Sequence[Record]], str | None] | None = None
    text: Callable[[Record], str] = str


def has_a_mean(record: Record) -> bool:
    """Whether the bits of a setting's reads are not all those of its ADC: it has a plan, skips idle reads, or layers have their own."""
    spec = record.setting and record.setting.spec
    return bool(spec) and (spec.planned or record.mean_bits is not None and abs(record.mean_bits - spec.adc_bits) > 1e-9)


def rounded(value: float) -> str:
    """A number as tables show it, with three digits, or as a whole one."""
    return f"{value:.0f}" if 999.5 <= value < 1e6 else f"{value:.3g}"


def band_text(band: Band) -> str:
    """A band as tables show it: 12.3 (4.51-23.5). All three are rounded alike: with fewer digits an end may lie within its value."""
    low, typical, high = map(rounded, band)
    return typical if low == high else f"{typical} ({low}-{high})"


def named(name: str, metric: str) -> str:
    """The key of a column in lines of a metric: of perplexity software_perplexity, chip_perplexity, perplexity_worst."""
    if metric == Scale().name or name.startswith("metric"):
        return name
    return re.sub("accuracy_lowest|accuracies|accuracy", lambda found: metric + "_worst" * found[0].endswith("lowest"), name)


def metric_of(row: Mapping[str, Any]) -> str:
    """The name of a line's metric; older lines do not say it."""
    return row.get("metric", Scale().name)


def value_of(row: Mapping[str, Any], name: str) -> Any:
    """A column of a line, whatever its metric."""
    return row[named(name, metric_of(row))]


PERCENTS = several(is_percent)
IS_REAL = partial(is_number, low=-sys.float_info.max)
OTHERS = {is_percent: IS_REAL, PERCENTS: several(IS_REAL)}  # what takes the place of percent where another metric stands for it
EXAMPLES = "{examples}"  # in a head: what the examples are called


def _of_metric(name: str, head: str | Callable | None = None, sign: str = "", of: Callable[[Record], Any] | None = None,
               **more: Any) -> Column:
    """A column that is a value of the metric, or with `of` a difference of two that tables show."""
    def text(record: Record) -> str:
        value = of(record) if of else getattr(record, name)
        return "" if value is None else record.metric.text(value, sign)

    return _measured(name, is_percent, head=head, text=text, **more)


def _measured(name: str, fits: Callable | None = None, form: str = "", head: str | Callable | None = None, **more: Any) -> Column:
    """A column that is an attribute of the record. Args: form, a format of its value in tables, which is empty for None; more, see
    `Column`; `field`, if it has another name there."""
    field = more.setdefault("field", name)
    more.setdefault("text", lambda record: "" if getattr(record, field) is None else format(getattr(record, field), form))
    return Column(name, lambda of: getattr(of.record, field), fits, head=head, **more)


def _given(name: str, key: str | None = None) -> Column:
    """A column that is a setting of the evaluation."""
    return Column(key or name, lambda of: getattr(of.settings, name))


def _of_spec(name: str) -> Column:
    def value(of: Measured) -> Any:
        without = of.spec is None or name == "adc_bits" and of.spec.adc_range == "ideal"
        return None if without else getattr(of.spec, name)

    return Column(name, value)


def _of_chips(name: str, value: Callable[[Chips | WeightNoise], Any]) -> Column:
    return Column(name, lambda of: of.chips and value(of.chips))


def _of_costs(name: str) -> list[Column]:
    """The typical value, and both ends."""
    def shown(record: Record) -> str:
        return band_text(figure(record.cost, name)) if record.cost else ""

    def column(key: str, end: int, **more: Any) -> Column:
        return Column(key, lambda of: of.record.cost and figure(of.record.cost, name)[end], **more)

    return [column(name, 1, head=FIGURES[name].head, text=shown), column(f"{name}_low", 0), column(f"{name}_high", 2)]


def _if(holds: Callable[[Sequence[Record]], Any], head: str | None, otherwise: str | None = None
        ) -> Callable[[Sequence[Record]], str | None]:
    return lambda records: head if holds(records) else otherwise


def _several_chips(records: Sequence[Record]) -> bool:
    return max(len(record.chip_accuracies or ()) for record in records) > 1


def _converted(records: Sequence[Record]) -> bool:
    return records[0].is_float


def of_classes(records: Sequence[Record]) -> bool:
    """Whether there are predictions that change."""
    return any(record.changed_predictions is not None for record in records)


def worst(records: Sequence[Record]) -> str:
    """What the worst chip's value is called."""
    return "lowest" if records[0].metric.higher else "highest"


def _left_out(records: Sequence[Record]) -> bool:
    """Whether any reads are not converted."""
    return any(record.conversions is not None and record.conversions < 1 for record in records)


OF_COSTS = (
    Column("cost", lambda of: of.record.cost and of.record.cost.technology), *(each for name in FIGURES for each in _of_costs(name)),
    Column("utilisation", lambda of: of.record.cost and of.record.cost.utilisation))
COLUMNS = (
    _given("model"), _given("dataset"),
    *(Column(name, lambda of, flag=flag: OFF if of.record.is_float else getattr(of.settings, flag))
      for name, flag in (("wbit", "w_bits"), ("abit", "a_bits"))),
    Column("wq", lambda of: None if of.record.is_float else of.settings.wq),
    *(Column(name, lambda of, name=name: getattr(of.settings, name) if foreign.is_foreign(of.settings.model) else None)
      for name in OPTIONS),
    _of_metric("float_accuracy", _if(_converted, "to float"), "+", lambda record: record.accuracy - record.float_accuracy, older=True),
    _measured("float_changed_predictions", is_count, field="float_changes", older=True,
              head=_if(lambda records: _converted(records) and of_classes(records), "changed")),
    *(_of_spec(name) for name in LAYER_FIELDS),
    Column("map", lambda of: of.record.setting and of.record.setting.crossbar_layers),
    _measured("engine", is_text),
    Column("metric", lambda of: of.record.metric.name, is_text, older=True, field="metric"),
    Column("metric_unit", lambda of: of.record.metric.unit, is_text, older=True),
    Column("metric_higher", lambda of: of.record.metric.higher, older=True),
    _of_metric("accuracy", lambda records: records[0].metric.head, empty=False),
    _of_metric("software_accuracy", _if(_converted, "to quantized", "to software"), "+",
               lambda record: None if record.is_float else record.accuracy - record.software_accuracy, empty=False),
    _measured("chance", is_number, older=True),
    Column("n_images", lambda of: of.record.n_images, is_count, empty=False, field="examples"),
    _measured("changed_predictions", is_count, head=_if(of_classes, "changed"),
              text=lambda record: "" if record.is_float else str(record.changed_predictions)),
    _measured("images_per_s", head=f"{EXAMPLES}/s",
              text=lambda record: f"{record.images_per_s:{'.0f' if record.images_per_s >= 10 else '.2g'}}"),
    _measured("seconds", lambda value: is_number(value) and value > 0, empty=False),
    _given("batch_size"),
    Column("planes", lambda of: of.settings.planes if of.record.setting else None),
    _given("resume", "checkpoint"), _given("validation"),
    Column("calib_images", lambda of: of.calib_images),
    Column("adc_calib", lambda of: of.rule("rule", False)), Column("adc_per", lambda of: of.rule("per", False)),
    Column("adc_correct", lambda of: of.rule("correct", False, True)), Column("adc_ranges", lambda of: of.source),
    Column("adc_share", lambda of: of.rule("share", True)),
    _measured("mean_bits", is_number, ".2f", _if(lambda records: any(map(has_a_mean, records)), "mean bits")),
    _measured("conversions", is_number, ".1%", _if(_left_out, "converted")),
    _measured("bits_made", is_number, ".2f", _if(_left_out, "bits made"), older=True),
    _measured("layer_bits", lambda value: is_dict(value) and all(map(is_number, value.values())), older=True),
    _of_chips("device", lambda chips: chips.name), _of_chips("device_time_s", lambda chips: chips.value("device_time")),
    _of_chips("device_temp_C", lambda chips: chips.value("device_temp")),
    *(_of_chips(name, lambda chips, name=name: chips.value(name)) for name in ("stuck_on", "stuck_off", *CHIPS_OR_NOISE)),
    Column("per_layer", lambda of: {pattern: dict(values) for pattern, values in of.record.setting.per_layer} or None
           if of.record.setting else None),
    Column("calib_on", lambda of: of.rule("on", False, True) if of.chips else None),
    _of_metric("accuracy_std", _if(_several_chips, "deviation")),
    _of_metric("accuracy_lowest", lambda records: worst(records) if _several_chips(records) else None),
    _measured("chip_accuracies", PERCENTS),
    _measured("chip_changed_predictions", several(is_count), field="chip_changes", older=True),
    *OF_COSTS,
)
OF_RECORD = tuple(column for column in COLUMNS if column.field in Record.__dataclass_fields__)  # which make a record again
SHOWN = ("mean_bits", "conversions", "bits_made", "accuracy", "accuracy_std", "accuracy_lowest", "float_accuracy",
         "float_changed_predictions", "software_accuracy", "changed_predictions", "images_per_s")  # in tables; costs have one of their own


def line(measured: Measured) -> dict[str, Any]:
    """The keys of one line, plain values; what does not apply to a setting is None."""
    return {named(column.name, measured.record.metric.name): column.of(measured) for column in COLUMNS}


def is_line(values: Any) -> bool:
    """Whether plain values are a line, as far as they go: older ones have fewer keys."""
    if not is_dict(values) or "key" in values and not is_text(values["key"]) or not is_text(values.get("metric", "")):
        return False
    metric = values.get("metric", Scale().name)
    of = {column: values[key] for column in COLUMNS if (key := named(column.name, metric)) in values}
    return all((column.fits if metric == Scale().name else OTHERS.get(column.fits, column.fits))(value) for column, value in of.items()
               if column.fits and not (column.empty and value is None))


def fields_of(values: dict[str, Any]) -> dict[str, Any]:
    """`{field of Record: value}` of a line. Raises: KeyError for what it lacks."""
    metric = Scale(*(values.get(name, usual) for name, usual in zip(("metric", "metric_unit", "metric_higher"), Scale())))
    keys = {column: named(column.name, metric.name) for column in OF_RECORD}
    found = {column.field: values.get(key) if column.older else values[key] for column, key in keys.items()}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in found.items()} | {"metric": metric}


def shown(records: Sequence[Record], names: Iterable[str] | None = None, examples: str = "examples"
          ) -> list[tuple[str, Callable[[Record], str]]]:
    """(head, text of a record) of the columns that a table of some records has. Args: names, of columns that it may have; None: `SHOWN`;
    examples, what these are called."""
    by_name = {column.name: column for column in COLUMNS}
    heads = {name: head(records) if callable(head := by_name[name].head) else head for name in (SHOWN if names is None else names)}
    return [(head.replace(EXAMPLES, examples), by_name[name].text) for name, head in heads.items() if head is not None]


def metric_for(task: Task | None) -> Any:
    """The metric of a task, or that of images. Raises: UserError for one that is none, or whose name another key of a line has."""
    with user_error(str):
        found = metrics.metric_of(task and task.metric)
    name = found.scale.name
    keys_of_line = [*(named(column.name, name) for column in COLUMNS), *machine.machine_info(), "command", "key"]
    if Counter(keys_of_line).most_common(1)[0][1] > 1:
        raise UserError(f"the metric is called {name}, and so is another key of results.jsonl: give it another name")
    return found
