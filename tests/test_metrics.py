"""models/quant/measuring/metrics.py: numbers of outputs and targets, against those of PyTorch, of torchmetrics and of plain loops."""

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from models.quant import CrossbarSpec, Metric, Setting, convert, cross_entropy, measure, measure_float, perplexity, signal_to_error, top5
from models.quant.measuring.metrics import Scale, accuracy, chance_of_changes, metric_of

pytestmark = pytest.mark.usefixtures("one_thread")
torchmetrics = pytest.importorskip("torchmetrics")


def seeded(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Given(nn.Module):
    """Answers with what it is asked."""

    def forward(self, x):
        return x


class Tokens(nn.Module):
    """Scores of the next token, from the one before."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.embedding, self.head = nn.Embedding(11, 24), nn.Linear(24, 11)

    def forward(self, tokens):
        return self.head(self.embedding(tokens))


TOKENS = torch.randint(0, 11, (30, 8), generator=torch.Generator().manual_seed(2))
NEXT = TOKENS.roll(-1, 1).masked_fill(torch.arange(8) == 7, -100)
LABELS = torch.arange(60) % 9


def test_classes():
    scores = seeded(60, 9)
    found = measure(Given(), scores, LABELS, None, batch_size=7)
    assert found.accuracy == 100 * (scores.argmax(1) == LABELS).sum().item() / 60 and found.numbers is None
    best = measure(Given(), scores, LABELS, None, metric=top5, batch_size=7)
    hits = sum(label in row for label, row in zip(LABELS.tolist(), scores.argsort(1, descending=True)[:, :5].tolist()))
    assert best.accuracy == pytest.approx(100 * hits / 60) and torch.equal(best.predictions, scores.argmax(1))
    assert best.metric == Scale("top5", "%", True) and measure(Given(), scores[:, :3], LABELS % 3, None, metric=top5).accuracy == 100


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int32])
def test_classes_in_few_bits(dtype):
    scores, labels = seeded(40, 200), torch.arange(120, 160)
    for metric, wanted in ((None, 100 * (scores.argmax(1) == labels).double().mean()), (cross_entropy, F.cross_entropy(scores, labels))):
        assert measure(Given(), scores, labels.numpy().astype(dtype), None, metric=metric).accuracy == pytest.approx(wanted.item())


def test_pixels():
    scores, labels = seeded(10, 4, 5, 6), torch.randint(0, 4, (10, 5, 6))
    found = measure(Given(), scores, labels, None, batch_size=3)
    assert found.accuracy == pytest.approx(100 * (scores.argmax(1) == labels).double().mean().item())
    assert found.predictions.shape == (10, 5, 6)
    other_order = labels.mT.contiguous().mT
    assert all(map(torch.equal, accuracy.numbers(scores, other_order), accuracy.numbers(scores, labels)))
    assert measure(Given(), scores, labels, None, metric=cross_entropy).accuracy == pytest.approx(F.cross_entropy(scores, labels).item())


@pytest.mark.parametrize("batch_size", [30, 7])
def test_tokens(batch_size):
    net, total, count = Tokens(), 0.0, 0
    with torch.no_grad():
        for row, wanted in zip(TOKENS, NEXT.tolist()):
            for scores, target in zip(net(row).double().log_softmax(-1), wanted):
                if target >= 0:
                    total, count = total - scores[target].item(), count + 1
    assert count == 30 * 7
    entropy = measure(net, TOKENS, NEXT, None, metric=cross_entropy, batch_size=batch_size)
    assert entropy.accuracy == pytest.approx(total / count, rel=1e-6) and entropy.metric == ("cross_entropy", "nat", False)
    found = measure(net, TOKENS, NEXT, None, metric=perplexity, batch_size=batch_size)
    assert found.accuracy == pytest.approx(math.exp(total / count), rel=1e-6)
    assert found.predictions is None and found.numbers.shape == (30, 2) and found.numbers[:, 1].tolist() == [7] * 30


def test_signal_to_error_needs_no_targets():
    net = Tokens()
    spec = CrossbarSpec(4, 4, adc_bits=2, rows=16)
    crossbars, setting = convert(net, spec, TOKENS, first_last_bits=None), Setting(spec)
    found = measure(crossbars, TOKENS, None, setting, calibration=TOKENS, metric=signal_to_error(net), batch_size=7)
    with torch.no_grad():
        wanted, y = net(TOKENS).double(), crossbars(TOKENS).double()
    assert found.accuracy == pytest.approx(10 * math.log10(wanted.square().sum() / (y - wanted).square().sum()), rel=1e-6)
    assert 5 < found.accuracy < found.software_accuracy < 60 and found.metric == ("signal_to_error", "dB", True)
    assert measure_float(net, TOKENS, None, metric=signal_to_error(net)).accuracy == 200


def test_any_of_torchmetrics():
    scores, labels = seeded(40, 3, 5, 6), torch.randint(0, 3, (40, 5, 6))
    metric = torchmetrics.JaccardIndex(task="multiclass", num_classes=3)
    metric.update(seeded(2, 3, 5, 6), labels[:2])  # of before, which does not count
    found = measure(Given(), scores, labels, None, metric=metric, batch_size=7)
    best, shares = scores.argmax(1), []
    for name in range(3):
        both, either = ((best == name) & (labels == name)).sum(), ((best == name) | (labels == name)).sum()
        shares.append((both / either).item())
    assert found.accuracy == pytest.approx(sum(shares) / 3) and found.metric == ("multiclass_jaccard_index", "", True)
    assert found.predictions is found.numbers is found.chance is None
    error = measure(Given(), seeded(40, 1), seeded(40, 1, seed=1), None, metric=torchmetrics.MeanSquaredError(), batch_size=7)
    assert error.accuracy == pytest.approx((seeded(40, 1) - seeded(40, 1, seed=1)).square().mean().item())
    assert error.metric == ("mean_squared_error", "", False)


def test_functions_of_ones_own():
    x, labels = seeded(40, 2), seeded(40, 2, seed=1)

    def distance(output, target):
        return (output - target).norm(dim=1)

    wanted = (x - labels).norm(dim=1).mean().item()
    found = measure(Given(), x, labels, None, metric=distance, batch_size=7)
    assert found.accuracy == pytest.approx(wanted) and found.metric == ("distance", "", True) and found.numbers.shape == (40, 2)
    mean = measure(Given(), x, labels, None, metric=lambda output, target: distance(output, target).mean().item(), batch_size=7)
    assert mean.accuracy == pytest.approx(wanted) and mean.numbers is None and mean.metric.name == "value"
    weighed = Metric("weighed", lambda output, target: (distance(output, target), target[:, 0].abs()))
    assert measure(Given(), x, labels, None, metric=weighed).accuracy == pytest.approx(40 * wanted / labels[:, 0].abs().sum().item())
    own = Metric("error", distance, "mm", higher=False, value=lambda mean: 1000 * mean)
    assert measure(Given(), x, labels, None, metric=own).accuracy == pytest.approx(1000 * wanted)


def test_what_chance_alone_gives():
    """Against 4,000 samples of the examples: their deviation has one of 1.1 %, and the step is straight within some."""
    net, other = Tokens(), Tokens()
    with torch.no_grad():
        other.head.weight += 0.2 * seeded(11, 24)
    tokens = torch.randint(0, 11, (400, 8), generator=torch.Generator().manual_seed(2))
    targets = tokens.roll(-1, 1)
    a, b = (measure(each, tokens, targets, None, metric=perplexity).numbers for each in (net, other))
    drawn = np.random.default_rng(0).integers(0, 400, (4000, 400))
    values = [np.exp(each[:, 0].numpy()[drawn].sum(1) / each[:, 1].numpy()[drawn].sum(1)) for each in (a, b)]
    # The reference's own value is fixed in `chance`, which counts the differences alone, as a step from the value itself.
    logs = np.log(values[0]) - np.log(values[1])
    base = math.exp(a[:, 0].sum().item() / a[:, 1].sum().item())
    assert perplexity.chance(a, b) == pytest.approx(base * logs.std(), rel=0.06)
    assert perplexity.chance(a, a) == 0


def test_chance_of_right_and_wrong_is_at_least_one_answer():
    """Among a few examples that none changes does not say that none does. 20 images of 5 pixels."""
    same = torch.tensor([[80.0, 5.0]] * 20, dtype=torch.float64)
    assert accuracy.chance(same, same) == top5.chance(same, same) == pytest.approx(1.0)
    assert [chance_of_changes(k, 200) for k in (0, 1, 16)] == [0.5, 0.5, 2.0]


def test_what_chance_gives_to_examples_of_unequal_weights():
    """What weights explain is no chance. Against a bootstrap of the difference of two means."""
    drawn = np.random.default_rng(0)
    weights = drawn.integers(1, 60, 300).astype(float)
    a, b = (torch.from_numpy(np.stack([weights * size + drawn.normal(0, 0.3, 300), weights], 1)) for size in (2.0, 1.0))
    places = drawn.integers(0, 300, (4000, 300))
    first, other = (each[:, 0].numpy()[places].sum(1) / weights[places].sum(1) for each in (a, b))
    assert Metric("m", len).chance(a, b) == pytest.approx((first - other).std(), rel=0.06)
    a[:, 1] = b[:, 1] = 3.0
    apart = a[:, 0] - b[:, 0]
    assert Metric("m", float).chance(a, b) == pytest.approx((300 * apart.var()).sqrt().item() / 900, rel=1e-12)


def test_chance_where_the_value_ends_just_above_the_mean():
    drawn, weights = np.random.default_rng(1), np.ones(100)
    a, b = (torch.from_numpy(np.stack([1 - drawn.exponential(0.01, 100), weights], 1)) for _ in range(2))
    mean, step = a[:, 0].mean().item(), ((a - b)[:, 0].var() / 100).sqrt().item()
    above = Metric("m", float, value=lambda mean: math.log(1 - mean))
    assert above.chance(a, b) == pytest.approx(-math.log1p(-step / (1 - mean)), rel=1e-9)
    ends = Metric("m", float, value=lambda x: math.sqrt(mean + step / 2 - x))
    assert ends.chance(a, b) == pytest.approx((1.5**0.5 - 0.5**0.5) * step**0.5, rel=1e-9)
    with pytest.raises(ValueError, match="the metric m does not take the mean"):
        Metric("m", float, value=lambda x: math.sqrt(-abs(x - mean))).chance(a, b)


def test_records_of_a_setting_say_how_far_chance_goes():
    net = Tokens()
    spec = CrossbarSpec(8, 8, adc_bits=3, rows=16)
    crossbars = convert(net, spec, TOKENS)
    software = measure(crossbars, TOKENS, NEXT, None, metric=perplexity)
    found = measure(crossbars, TOKENS, NEXT, Setting(spec), calibration=TOKENS, metric=perplexity, software=software)
    assert software.chance is None and found.chance == perplexity.chance(found.numbers, software.numbers) > 0
    assert found.software_accuracy == software.accuracy and found.changed_predictions is None


@pytest.mark.parametrize("metric, labels, message", [
    (perplexity, None, "^the metric perplexity needs targets: give labels, or batches with targets$"),
    (lambda output, target: "good", LABELS, "^the metric value gives a str for a batch of 2: a number, or one for each example"),
    (lambda output, target: output.sum() * float("nan"), LABELS, "^the metric value gives NaN for a batch of 2$"),
    (lambda output, target: output.sum() / 0, LABELS, "^the metric value gives -?inf for a batch of 2$"),
    (Metric("root", lambda output, target: 4.0, value=lambda mean: mean.sqrt()), LABELS, "^the metric root does not take the mean 4: .*sq"),
    (Metric("far", lambda output, target: 4.0, value=lambda mean: mean * 1e999), LABELS, "^the metric far gives inf for the mean 4$"),
    (lambda output, target: output, LABELS, r"^the metric value gives a tensor \[2, 9\] for a batch of 2: a number, or one for each "),
    (lambda output, target: output[:, :2], LABELS, r"^the metric value gives a tensor \[2, 2\] for a batch of 2: a number, or one for "),
    (lambda output, target: output[0].oops, LABELS, "^the metric value does not take the output, .* target, a tensor .*'oops'$"),
    (cross_entropy, LABELS[:, None, None].expand(60, 2, 2), r"outputs \[2, 9\] have targets \[2, 2, 2\]: a class for each of them"),
    (torchmetrics.ConfusionMatrix(task="multiclass", num_classes=9), LABELS, r"gives a tensor \[9, 9\], and one number is expected"),
    (torchmetrics.MeanSquaredError, LABELS, r"^the metric is a ABCMeta; give a name, a function \(output, target\) -> numbers, a Metric, "),
    ("top-6", LABELS, r"^the metric is 'top-6'; names are accuracy, top5, cross_entropy, perplexity \(signal_to_error needs the floa")],
    ids=["no target", "text", "nan", "inf", "value", "value inf", "matrix", "pairs", "error", "shapes", "torchmetrics", "a class",
         "no name"])
def test_what_is_no_metric_is_one_line_before_any_work(metric, labels, message):
    passed = []

    class Counting(Given):
        def forward(self, x):
            passed.append(len(x))
            return x

    with pytest.raises(ValueError, match=message) as caught:
        measure(Counting(), seeded(60, 9), labels, None, metric=metric)
    assert "\n" not in str(caught.value) and sum(passed) <= 2


@pytest.mark.parametrize("metric, names", [
    (accuracy, ["accuracy", " Accuracy"]), (top5, ["top5", "top-5", "Top_5", "top 5"]), (perplexity, ["perplexity", "PERPLEXITY"]),
    (cross_entropy, ["cross_entropy", "cross-entropy", "Cross Entropy", "crossentropy"])], ids=lambda value: getattr(value, "name", None))
def test_metrics_by_name(metric, names):
    wanted = measure(Given(), seeded(60, 9), LABELS, None, metric=metric)
    for name in names:
        found = measure(Given(), seeded(60, 9), LABELS, None, metric=name)
        assert (found.metric, found.accuracy) == (metric.scale, wanted.accuracy)


def test_metrics_that_the_docs_name_have_names():
    rows = re.findall(r"^\| `(\w+)`(?:, `(\w+)`)* \|", Path(__file__).parents[1].joinpath("docs/tasks.md").read_text(), re.MULTILINE)
    found = {name for row in rows for name in row if name}
    assert found == {"top5", "cross_entropy", "perplexity"} and {metric_of(name).name for name in found} == found


def test_names_that_no_column_can_have():
    for name, unit, message in ((3, "", "^the metric is called 3; a name"), ("a/b", "", "'a/b'; a name of letters and digits"),
                                ("", "", "''; a name"), ("accuracy", "dB", "is in %")):
        with pytest.raises(ValueError, match=message):
            Metric(name, len, unit)


def test_metrics_that_fail_later_are_one_line():
    x, labels = seeded(8, 2), seeded(8, 2, seed=1)

    def fails(output, target):
        return (output if torch.equal(target, labels[:2]) or len(target) > 2 else output[:, :1].expand(2, 9)) - target

    with pytest.raises(ValueError, match=r"^the metric fails does not take the output, a tensor \[2, 2\], and the target, .* must match"):
        measure(Given(), x, labels, None, metric=Metric("fails", lambda *given: fails(*given).sum(1)), batch_size=2)

    class Fails(torchmetrics.MeanSquaredError):
        def update(self, preds, target):
            super().update(fails(preds, target), target)

    with pytest.raises(ValueError, match=r"^the metric fails does not take the output, a tensor \[2, 2\], and the target, .* must match"):
        measure(Given(), x, labels, None, metric=Fails(), batch_size=2)
    with pytest.raises(ValueError, match="^the metric pearson_corr_coef gives NaN for all examples$"):
        measure(Given(), torch.ones(8), torch.ones(8), None, metric=torchmetrics.PearsonCorrCoef())


def test_torchmetrics_of_outputs_with_names():
    class Named(Given):
        def forward(self, x):
            return {"logits": x, "scale": torch.full((1,), 2.0)}

    class Scaled(torchmetrics.MeanSquaredError):
        def update(self, preds, target):
            logits, scale = preds.values()
            super().update(logits * scale, target)

    x, labels = seeded(12, 1), seeded(12, 1, seed=1)
    for metric, factor in ((torchmetrics.MeanSquaredError(), 1), (Scaled(), 2)):
        found = measure(Named(), x, labels, None, metric=metric, batch_size=5)
        assert found.accuracy == pytest.approx((factor * x - labels).square().mean().item())
    with pytest.raises(ValueError, match=r"the output, a dict, and the target, a tensor \[2, 3\]: Predictions and targets"):
        measure(Named(), x, labels.expand(12, 3), None, metric=torchmetrics.MeanSquaredError())
    two = type("Two", (torchmetrics.MeanSquaredError,), {"compute": lambda self: (1, 2)})()
    with pytest.raises(ValueError, match="gives a tuple, and one number is expected: make a subclass whose compute returns one of its"):
        measure(Given(), x, labels, None, metric=two)


def test_numbers_of_any_kind():
    x, labels = seeded(12, 2), seeded(12, 2, seed=1)
    wanted = (x - labels).norm(dim=1).mean().item()
    for make in (lambda d: d.numpy(), lambda d: d.tolist(), lambda d: d[:, None].numpy()[:, 0], lambda d: np.float32(d.mean())):
        found = measure(Given(), x, labels, None, batch_size=6, metric=lambda output, target: make((output - target).norm(dim=1)))
        assert found.accuracy == pytest.approx(wanted, rel=1e-6)


def test_targets_of_several_tensors():
    x, a, b = seeded(20, 3), seeded(20), seeded(20, seed=1)
    for target in (lambda i: (a[i], b[i]), lambda i: [a[i], b[i]], lambda i: {"a": a[i], "b": b[i]},
                   lambda i: [{"a": a[j], "b": b[j]} for j in range(i.start, i.stop)]):
        def error(output, target):
            if isinstance(target, list) and isinstance(target[0], dict):
                target = {name: torch.stack([each[name] for each in target]) for name in "ab"}
            first, second = target.values() if isinstance(target, dict) else target
            return (output[:, 0] - first).abs() + second

        data = [(x[slice(i, i + 5)], target(slice(i, i + 5))) for i in range(0, 20, 5)]
        assert measure(Given(), data, None, None, metric=error).accuracy == pytest.approx(((x[:, 0] - a).abs() + b).mean().item(), rel=1e-6)


def test_pixels_have_a_band_of_their_own():
    scores, labels = seeded(40, 3, 6, 6), torch.randint(0, 3, (40, 6, 6), generator=torch.Generator().manual_seed(1))
    net = nn.Conv2d(3, 3, 1)
    found = measure(net, scores, labels, None)
    wanted = [(net(image[None]).argmax(1)[0] == label).double().mean().item() for image, label in zip(scores, labels)]
    assert found.numbers[:, 0].div(36).tolist() == pytest.approx([100 * each for each in wanted])
    line = measure(nn.Conv1d(3, 3, 1), scores[..., 0], labels[..., 0], None)  # [N, C, T]
    assert line.predictions.shape == (40, 6)


def test_a_reference_is_in_evaluation_mode():
    model = nn.Sequential(nn.Linear(9, 9), nn.Dropout(0.5), nn.BatchNorm1d(9)).train()
    assert measure_float(model, seeded(12, 9), None, metric=signal_to_error(model)).accuracy == 200 and model.training


def test_what_is_no_network_and_no_labels():
    with pytest.raises(ValueError, match="^signal_to_error is against the outputs of a network, .*; given is a int$"):
        signal_to_error(3)
    with pytest.raises(ValueError, match="^the labels are a dict; give one for each example, or batches with targets$"):
        measure(Given(), seeded(20, 9), {"labels": LABELS[:20]}, None)


def test_what_cannot_be_compared_is_refused():
    software = measure(Given(), seeded(20, 9), LABELS[:20], None)
    with pytest.raises(ValueError, match="^software is measured by accuracy, and the metric is cross_entropy: measure both by one$"):
        measure(Given(), seeded(20, 9), LABELS[:20], None, metric=cross_entropy, software=software)
    with pytest.raises(ValueError, match="^the DataLoader shuffles, and examples are compared between passes: give one with shuffle="):
        measure(Given(), DataLoader(TensorDataset(seeded(20, 9), LABELS[:20]), shuffle=True), None, None)
    with pytest.raises(ValueError, match="^the metric cross_entropy has nothing to count: no target counts$"):
        measure(Given(), seeded(20, 9), torch.full((20,), -100), None, metric=cross_entropy)


def test_data_of_unknown_length():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(zip(seeded(20, 9), LABELS[:20]))

    found = measure(Given(), DataLoader(Stream(), batch_size=6), None, None, progress=True)
    assert found.accuracy == measure(Given(), seeded(20, 9), LABELS[:20], None).accuracy and found.n_images == 20


def test_batches_without_examples_are_refused():
    with pytest.raises(ValueError, match="^a batch has no examples; leave it out$"):
        measure(Given(), [seeded(3, 9), seeded(0, 9)], LABELS[:3], None)
    with pytest.raises(ValueError, match="^there are no examples to measure on$"):
        measure(Given(), [], LABELS[:0], None)
    with pytest.raises(ValueError, match="^targets are given twice, as labels and in the batches; leave the labels out$"):
        measure(Given(), [(seeded(3, 9), LABELS[:3])], LABELS[:3], None)
