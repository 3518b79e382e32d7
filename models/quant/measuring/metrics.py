"""Metrics: the number that says how good a network's answers are.

    accuracy, top5                      percent of the examples
    cross_entropy, perplexity           of classes, or of tokens `[N, T, V]` and the targets beside them
    signal_to_error(model)              in dB, against the answers of the float network: no targets are needed

All but the last have names too, such as "cross-entropy" (`NAMED`). Besides these, `measure` takes any `torchmetrics.Metric`, and any
function `(output, target) -> numbers`.
"""

import contextlib
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, is_dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..layers.batches import first_tensor, tensors_of
from ..layers.loaders import IGNORED
from .processes import Processes

EQUAL = 200.0  # dB, of outputs that are the same
MOST_NATS = 700.0  # of which the exponential is a number


class Scale(NamedTuple):
    """What a metric's numbers are. Attributes: name; unit, or ""; higher, whether more is better."""

    name: str = "accuracy"
    unit: str = "%"
    higher: bool = True

    @property
    def head(self) -> str:
        """Name and unit."""
        return f"{self.name} {self.unit}".rstrip()

    @property
    def axis(self) -> str:
        """Name and unit, as at an axis."""
        return f"{self.name} ({self.unit})" if self.unit else self.name

    def said(self, value: float) -> str:
        """A value in a sentence: of accuracy without its name."""
        text = f"{self.text(value)} {self.unit}".rstrip()
        return text if self.name == Scale().name else f"{self.name} {text}"

    def text(self, value: float, sign: str = "") -> str:
        """A value as tables show it: two digits behind the point of per cent, else four in all. Args: sign, "+" for a difference."""
        return format(value, f"{sign}.2f" if self.unit == "%" else f"{sign}.3g" if sign else ".4g")

    def worst(self, values: Sequence[float]) -> float:
        """The worst of some values."""
        return min(values) if self.higher else max(values)


AGAINST_FLOAT = Scale("signal_to_error", "dB")  # of which the float network itself has `EQUAL`


@dataclass(frozen=True, eq=False)
class Metric:
    """`value(sum_i s_i / sum_i w_i)` over the examples i.

    Attributes:
        name: of its column, in letters and digits. unit: behind its name, or "". higher: whether more is better.
        numbers: `numbers(output, target)` of a batch: s `[N]`, with w = 1; or a tuple of two tensors `[N]`, s and w; or one number, the
            batch's mean.
        value: of the mean.
        predict: `predict(output, target)`, the answer of each example, `[N, ...]`, of which those that changed are counted; None for no
            such count.
        reference: a network whose outputs are the targets; None: targets come with the examples.
        needs_target: whether it cannot do without.
        range: the lowest value that it can have, and the highest.
    Raises: ValueError for a name that no column can have.
    """

    name: str
    numbers: Callable[[Any, Any], Any]
    unit: str = ""
    higher: bool = True
    value: Callable[[float], float] = float
    predict: Callable[[Any, Any], Tensor] | None = None
    reference: nn.Module | None = None
    needs_target: bool = True
    range: tuple[float, float] = (-math.inf, math.inf)

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name.isidentifier():
            raise ValueError(f"the metric is called {self.name!r}; a name of letters and digits is expected, as columns and files have it")
        if self.name == Scale().name and self.unit != Scale().unit:
            raise ValueError(f"a metric called {self.name} is in %; give another one another name")

    @property
    def scale(self) -> Scale:
        """What its numbers are."""
        return Scale(self.name, self.unit, self.higher)

    def gauge(self) -> "Gauge":
        """What adds up one pass of the examples."""
        return Gauge(self)

    def check(self, output: Any, target: Any, count: int) -> None:
        """Try some examples. Raises: ValueError for targets that are missing, or where no number comes of them."""
        if target is None and self.needs_target:
            raise ValueError(f"the metric {self.name} needs targets: give labels, or batches with targets")
        gauge = self.gauge()
        gauge.add(output, target, count)
        if gauge.of_batches[0][:, 1].sum():
            self.of_mean(_mean(gauge.of_batches[0]))

    def of_mean(self, mean: float) -> float:
        """The value of a mean. Raises: ValueError where it is no finite number."""
        with _said_of(self.name, f"the mean {mean:.4g}"):
            found = float(self.value(mean))
        return _finite(self.name, found, f"the mean {mean:.4g}")

    def chance(self, numbers: Tensor, others: Tensor) -> float:
        """Deviation of the difference of two values that chance alone gives, from the examples' own differences `d_i = s_i - s'_i`: what
        their weights do not explain, `e_i = d_i - w_i sum d / sum w`, makes `sqrt(n var(e)) / sum w`, as a step of the value up from the
        mean, or down where it has none above. Args: `[N, 2]` each, of the same examples. Raises: ValueError where it has neither."""
        apart, weights = numbers[:, 0] - others[:, 0], numbers[:, 1]
        rest = apart - (weights - weights.mean()) * apart.sum() / weights.sum()  # of equal weights the differences, to the last digit
        step = (len(numbers) * rest.double().var()).sqrt().item() / weights.sum().item()
        if self.predict and self.unit == "%":
            step = max(step, chance_of_changes(0, weights.sum().item()))
        mean = _mean(numbers)
        try:
            beside = self.of_mean(mean + step)
        except ValueError:
            beside = self.of_mean(mean - step)
        return abs(beside - self.of_mean(mean))


@dataclass
class Gauge:
    """Adds up the examples of one pass. Attributes: of_batches, float64 `[N, 2]` of each; apart, whether each example has its own."""

    metric: Metric
    of_batches: list[Tensor] = field(default_factory=list)
    apart: bool = True

    def add(self, output: Any, target: Any, count: int) -> None:
        """Take a batch of so many examples. Raises: ValueError where the metric gives no numbers for it."""
        with _said_of(self.metric.name, _both(output, target)):
            found = self.metric.numbers(output, target)
        if isinstance(found, tuple) and len(found) == 2 and all(isinstance(x, Tensor) and x.shape == (count,) for x in found):
            numbers = torch.stack(found, 1).double().cpu()
        else:
            numbers = self._equal(found, count)
        if numbers is None:
            raise ValueError(f"the metric {self.metric.name} gives {_what(found)} for a batch of {count}: a number, or one for each "
                             "example, is expected")
        for number in numbers[~numbers.isfinite()][:1].tolist():
            _finite(self.metric.name, number, f"a batch of {count}")
        self.of_batches.append(numbers)

    def _equal(self, found, count):
        """`[N, 2]` of numbers without weights, or of the batch's mean; None for anything else."""
        with contextlib.suppress(TypeError, ValueError, RuntimeError):
            numbers = torch.as_tensor(found, dtype=torch.float64).cpu()
            if numbers.numel() == 1:
                self.apart &= count == 1
                return torch.tensor([[count * numbers.item(), count]], dtype=torch.float64)
            if numbers.shape == (count,):
                return torch.stack([numbers, torch.ones_like(numbers)], 1)
        return None

    def result(self, processes: Processes) -> tuple[float, Tensor | None]:
        """(value, numbers of all examples `[N, 2]`, None where batches had but one). Raises: ValueError where nothing counts, or the
        value is no finite number."""
        apart = all(processes.gathered(self.apart))
        numbers = torch.cat(processes.in_order(self.of_batches))
        if not numbers[:, 1].sum():
            raise ValueError(f"the metric {self.metric.name} has nothing to count: no target counts")
        return self.metric.of_mean(_mean(numbers)), numbers if apart else None


@dataclass
class OfTorchmetrics:
    """A `torchmetrics.Metric` in place of a `Metric`, and its own `Gauge`. Attributes: see `Metric`; whole, whether it sees all of an
    output with names."""

    metric: Any
    whole: bool = False
    predict: None = None
    reference: None = None
    range: tuple[float, float] = (-math.inf, math.inf)

    @property
    def scale(self) -> Scale:
        """Named as its class, in small letters; its unit is not known."""
        words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", type(self.metric).__name__).lower()
        return Scale(words, "", getattr(self.metric, "higher_is_better", None) is not False)

    def gauge(self) -> "OfTorchmetrics":
        """Itself, with nothing counted."""
        self.metric.reset()
        return self

    def add(self, output: Any, target: Any, count: int) -> None:
        """Take a batch. Of outputs with names it sees the one that counts, or all of them where it does not take that one alone. Raises:
        ValueError where it takes neither."""
        tensor = next(iter(tensors_of((output, target))), None)
        if tensor is not None:
            self.metric.to(tensor.device)
        with _said_of(self.scale.name, _both(output, target)):
            self.metric.update(output if self.whole or not _has_names(output) else first_tensor(output), target)

    def check(self, output: Any, target: Any, count: int) -> None:
        """Try some examples. Raises: ValueError where it does not take them, or no number comes of them."""
        self.whole = False
        try:
            self.gauge().add(output, target, count)
        except ValueError as error:
            self.whole = _has_names(output)
            try:
                self.gauge().add(output, target, count)
            except ValueError:
                raise error from None
        found = torch.zeros(())
        with contextlib.suppress(Exception):  # so few examples may be too few for it
            found = self.metric.compute()
        _number(self.scale.name, found)

    def result(self, processes: Processes) -> tuple[float, None]:
        """(value, no numbers of examples). Raises: ValueError for several processes, or no finite number."""
        if processes.world() > 1:
            raise ValueError(f"{type(self.metric).__name__} of torchmetrics is measured by one process; this run has {processes.world()}")
        name = self.scale.name
        with _said_of(name, "all examples"):
            found = self.metric.compute()
        return _finite(name, _number(name, found), "all examples"), None


def metric_of(given: Any) -> Metric | OfTorchmetrics:
    """A metric as `measure` takes it. Raises: ValueError for what is none."""
    if given is None:
        return accuracy
    if isinstance(given, str):
        if (name := re.sub(r"[\s_-]", "", given).lower()) in NAMED:
            return NAMED[name]
        raise ValueError(f"the metric is {given!r}; names are {', '.join(each.name for each in NAMED.values())} (signal_to_error needs the "
                         "float network: give signal_to_error(model) of models.quant)")
    if isinstance(given, (Metric, OfTorchmetrics)):
        return given
    if not isinstance(given, type) and all(callable(getattr(given, name, None)) for name in ("update", "compute", "reset")):
        return OfTorchmetrics(given)
    if callable(given) and not isinstance(given, type):
        name = getattr(given, "__name__", "")
        return Metric(name if name.isidentifier() else "value", given, needs_target=False)
    raise ValueError(f"the metric is a {type(given).__name__}; give a name, a function (output, target) -> numbers, a "
                     "Metric, or a torchmetrics.Metric")


@contextlib.contextmanager
def _said_of(name, given):
    """What a metric raises that does not take what it is given, as one line."""
    try:
        yield
    except Exception as error:  # code of others raises nearly anything
        line = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ValueError(f"the metric {name} does not take {given}: {line}") from error


def _both(output, target):
    return f"the output, {_what(output)}, and the target, {_what(target)}"


def _has_names(output):
    return isinstance(output, dict) or is_dataclass(output)


def _number(name, found):
    if not isinstance(found, Tensor) or found.numel() != 1:
        raise ValueError(f"the metric {name} gives {_what(found)}, and one number is expected: make a subclass whose compute returns one "
                         "of its parts")
    return float(found)


def _finite(name, value, of):
    if not math.isfinite(value):
        raise ValueError(f"the metric {name} gives {'NaN' if math.isnan(value) else value} for {of}")
    return value


def chance_of_changes(changed: float, count: float) -> float:
    """`100 sqrt(k) / n` percent, the deviation of the difference of two accuracies that chance alone gives: of k predictions that changed
    as many become right as wrong, give or take sqrt(k). k is at least 1: where none changed, others might. Args: changed, k; count, n."""
    return 100 * max(changed, 1) ** 0.5 / count


def _mean(numbers):
    return numbers[:, 0].sum().item() / numbers[:, 1].sum().item()


def _what(found):
    return f"a tensor {list(found.shape)}" if isinstance(found, Tensor) else f"a {type(found).__name__}"


def classes_last(output: Any, target: Tensor) -> Tensor:
    """Scores with their classes last, float32: of outputs `[N, C]`, of tokens `[N, T, C]`, or of pixels `[N, C, H, W]`. Where both would
    fit the targets, classes are the last.

    Raises: ValueError where they do not stand beside the targets, and for one class.
    """
    scores = first_tensor(output).float()
    if scores.shape[:-1] != target.shape and scores.dim() > 2 and (scores.shape[0], *scores.shape[2:]) == target.shape:
        scores = scores.movedim(1, -1)
    if scores.shape[:-1] == target.shape:
        if scores.shape[-1] == 1:
            raise ValueError(f"outputs {list(first_tensor(output).shape)} have one class, so there is nothing to choose; give a metric, "
                             "such as one that compares the output's sign with the target")
        return scores
    raise ValueError(f"outputs {list(scores.shape)} have targets {list(target.shape)}: a class for each of them is expected, such as [N] "
                     "beside [N, classes]")


def _of_classes(of_each, output, target):
    """(sums over what an example has, how many of them count). Args: of_each, `of_each(scores, target)` of each target."""
    whole = torch.promote_types(target.dtype, torch.int64)  # a byte has no -100, and takes 156 for it
    scores, target = classes_last(output, target), target.to(first_tensor(output).device, whole)
    counts = (target != IGNORED).reshape(len(target), -1).double()
    return (of_each(scores, target).reshape(len(target), -1).double() * counts).sum(1), counts.sum(1)


def _hits(scores, target):
    return 100 * (scores.argmax(-1) == target)


def _hits_of_five(scores, target):
    return 100 * (scores.topk(min(5, scores.shape[-1]), -1).indices == target[..., None]).any(-1)


def _entropies(scores, target):
    return F.cross_entropy(scores.reshape(-1, scores.shape[-1]), target.reshape(-1), reduction="none", ignore_index=IGNORED)


def _predictions(output, target):
    return classes_last(output, target).argmax(-1)


def _perplexity(nats: float) -> float:
    return math.exp(min(nats, MOST_NATS))


def _errors(output, target):
    signal, found = (first_tensor(each).double().reshape(len(first_tensor(each)), -1) for each in (target, output))
    return (found - signal).square().sum(1), signal.square().sum(1)


def _decibels(mean: float) -> float:
    return min(-10 * math.log10(mean), EQUAL) if mean > 0 else EQUAL


accuracy = Metric("accuracy", partial(_of_classes, _hits), "%", predict=_predictions, range=(0, 100))
top5 = Metric("top5", partial(_of_classes, _hits_of_five), "%", predict=_predictions, range=(0, 100))
cross_entropy = Metric("cross_entropy", partial(_of_classes, _entropies), "nat", higher=False, range=(0, math.inf))
perplexity = Metric("perplexity", partial(_of_classes, _entropies), higher=False, value=_perplexity, range=(1, math.inf))

NAMED = {each.name.replace("_", ""): each for each in (accuracy, top5, cross_entropy, perplexity)}  # as `metric_of` compares names


def signal_to_error(model: nn.Module) -> Metric:
    """`10 log10(sum y^2 / sum (y - y')^2)` dB, y the outputs of a model in float, such as the one that was converted, and y' the network's
    own; 200 where they are the same. Raises: ValueError for what is no network."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"signal_to_error is against the outputs of a network, such as that in float; given is a {type(model).__name__}")
    return Metric(AGAINST_FLOAT.name, _errors, AGAINST_FLOAT.unit, value=_decibels, reference=model, needs_target=False,
                  range=(-math.inf, EQUAL))
