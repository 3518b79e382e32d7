"""Tasks: networks of any inputs and answers, with their own data and metric, through eval.py."""

import csv
import json
from pathlib import Path

import pytest
import torch
from torch import nn

import eval as evaluation
from experiment.program.cli import UserError
from experiment.report import report
from models.quant import Calibration, CrossbarSpec, Setting, convert, measure

pytestmark = pytest.mark.usefixtures("one_thread")

TASK = """
import torch
from torch import nn
from models.quant import Metric, Task, signal_to_error

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(30, 24), nn.Linear(4, 24), nn.Linear(24, 2)

    def forward(self, x, y):
        return {"out": self.c(torch.relu(self.a(x) + self.b(y)))}

def batches(net, n, seed, size=16):
    given = torch.Generator().manual_seed(seed)
    x, y = torch.randn(n, 30, generator=given), torch.randn(n, 4, generator=given)
    with torch.no_grad():
        target = net(x, y)["out"] + 0.1 * torch.randn(n, 2, generator=given)
    return [(x[i : i + size], y[i : i + size], target[i : i + size]) for i in range(0, n, size)]

def distance(output, target):
    return (output["out"] - target).norm(dim=1)

def points(seed=5, **more):
    net = Net()
    given = dict(network=net, data=batches(net, 72, seed), calibration=batches(net, 40, 7), kind="points",
                 metric=Metric("distance", distance, "mm", higher=False))
    return Task(**given | more)

def with_validation():
    return points(validation=batches(Net(), 24, 9))

def others():
    return points(seed=6)

def no_number():
    return points(metric=lambda output, target: "near")

def no_examples():
    return points(data=[])

def of_a_generator():
    return points(data=iter(batches(Net(), 8, 1)))

def shuffled():
    class Shuffled(list):
        def __iter__(self):
            return iter([self[i] for i in torch.randperm(len(self))])
    torch.manual_seed(4)
    return points(data=Shuffled(batches(Net(), 64, 1, 1)))

def an_empty_batch():
    return points(data=[*batches(Net(), 8, 1), tuple(x[:0] for x in batches(Net(), 8, 1)[0])])

def other_inputs():
    return points(data=[(x[:, 1:], y, t) for x, y, t in batches(Net(), 8, 1)])

def negative():
    return points(metric=Metric("r2", lambda output, target: -0.5 * torch.ones(len(target))))

def without_a_name():
    return points(metric=lambda output, target: distance(output, target))

def named(name):
    return points(metric=Metric(name, distance))

def called_seconds():
    return named("seconds")

def called_rows():
    return named("rows")

def called_a_path():
    return named("error/pixel")

def one_point():
    return points(data=[tuple(x[:1] for x in batches(Net(), 8, 1)[0])])

def not_a_number():
    return points(metric=Metric("nan", lambda output, target: distance(output, target) * float("nan")))

def infinite_later():
    return points(metric=Metric("late", lambda output, target: distance(output, target) / (len(target) != 8)))

def of_a_number():
    return points(network=3)

def without_data():
    return points(data=None)

def a_wrong_take():
    return points(take=lambda batch: batch["x"])

def torchmetrics_accuracy():
    import torchmetrics
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    data = [(torch.randn(16, 4, generator=torch.Generator().manual_seed(i)), torch.arange(16) % 3) for i in range(3)]
    return Task(net, data, data, torchmetrics.Accuracy(task="multiclass", num_classes=3))

def sizes(size):
    net = nn.Sequential(nn.Conv1d(2, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(8, 3))
    return [(torch.randn(2, 2, n, generator=torch.Generator().manual_seed(n)), torch.arange(2)) for n in size], net

def several_sizes():
    data, net = sizes(range(6, 12))
    return Task(net, data, sizes([6, 6])[0])

def against_float():
    found = points()
    return points(network=found.network, metric=signal_to_error(found.network))

def unclear():
    return points(data=[(x, y, t, t) for x, y, t in batches(Net(), 8, 1)])
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("task.py").write_text(TASK)


def run(function, *flags, save="out"):
    return evaluation.main(["--model", f"task.py:{function}", "--save_path", save, "--ngpu", "0", *flags])


def rows(save="out"):
    return [json.loads(line) for line in Path(save, "results.jsonl").read_text().splitlines()]


def made(function="points"):
    namespace = {}
    exec(compile(TASK, "task.py", "exec"), namespace)
    return namespace[function](), namespace


def test_a_task_gives_what_measure_gives(folder, capsys):
    assert run("points", "--cell_bits", "2", "--adc_bits", "3", "4", "--html") == 0
    found = {(row["wbit"], row["adc_bits"]): row for row in rows()}
    task, _ = made()
    net = convert(task.network.eval(), CrossbarSpec(8, 8, adc_range="ideal"), task.calibration)
    record = measure(net, task.data, None, Setting(CrossbarSpec(8, 8, cell_bits=2, adc_bits=3)), calibration=task.calibration,
                     metric=task.metric)
    with torch.no_grad():
        float_values = torch.cat([(task.network(x, y)["out"] - t).norm(dim=1) for x, y, t in task.data])
    assert found[32, None]["distance"] == pytest.approx(float_values.double().mean().item(), rel=1e-6)
    row = found[8, 3]
    assert row["distance"] == record.accuracy > row["software_distance"] == record.software_accuracy
    assert row["chance"] == record.chance and row["float_distance"] == found[32, None]["distance"]
    assert (row["n_images"], row["dataset"], row["metric_unit"], row["changed_predictions"]) == (72, "points", "mm", None)
    text = capsys.readouterr().out
    assert "; 72 points; CPU" in text and "distance mm" in text and "2-bit cells, 3-bit ADC, calibrated: distance 0." in text
    assert "changed" not in text and "accuracy" not in text
    assert Path("out/distance_over_adc_bits.png").exists() and "software_distance" in Path("out/results.html").read_text()


def test_points_are_those_of_the_data(folder, capsys):
    flags = "--cell_bits", "2", "--adc_bits", "4"
    run("points", *flags)
    capsys.readouterr()
    run("points", *flags)
    assert "are measured already" in capsys.readouterr().out and len(rows()) == 3
    assert len({*(row["key"] for row in rows())}) == 3
    run("others", *flags)
    assert len({*(row["key"] for row in rows())}) == 6
    run("points", *flags, "--limit", "20", save="few")
    assert [row["n_images"] for row in rows("few")] == [32] * 3  # in whole batches


def test_reports_costs_and_chips_of_a_task(folder, capsys):
    assert run("points", "--cell_bits", "2", "--adc_bits", "4", "--device", "techA", "--chips", "2", "--cost", "rram_32nm", "--report",
               "--adc_plan", "significance") == 0
    last = rows()[-1]
    assert last["chip_distance"] and last["distance_worst"] == max(last["chip_distance"]) and last["energy_uJ"] > 0
    text = capsys.readouterr().out
    assert "of 2 chips" in text and "highest" in text and Path("out/distance_over_energy.png").exists()


def test_a_search_is_for_the_metric(folder):
    flags = "--cell_bits", "2", "--adc_bits", "2:4", "--search", "3"
    assert run("with_validation", *flags, "--objective", "distance", "bits", "--at_most", "distance=0.2") == 0
    with open("out/search.csv") as file:
        found = list(csv.DictReader(file))
    assert all((float(row["distance"]) <= 0.2) == (row["within_bounds"] == "True") for row in found) and len(found) == 3
    best = min(found, key=lambda row: float(row["distance"]))
    assert best["front"] == "True" and float(best["test_distance"]) > 0 and "test_software_distance" in best
    assert run("with_validation", *flags, save="again") == 0  # accuracy and bits are the usual objectives
    with pytest.raises(UserError, match="^task.py:points brings no validation examples, which choose in a search"):
        run("points", *flags, save="none")
    with pytest.raises(UserError, match="^--objective perplexity: unknown, choose from distance, bits"):
        run("with_validation", *flags, "--objective", "perplexity", save="none")
    with pytest.raises(UserError, match="^--objective changed: unknown, choose from distance, bits, conversions"):
        run("with_validation", *flags, "--objective", "changed", save="none")
    assert not Path("none").exists()


@pytest.mark.parametrize("function, flags, message", [
    ("no_number", (), "^task.py:no_number: the metric .* gives a str for a batch of 2"),
    ("no_examples", (), "^the data of the task has no batches$"),
    ("of_a_generator", (), "^the data of the task is a list_iterator; batches that can be gone through again are expected"),
    ("shuffled", (), "^the data of the task comes in another order each time; let the DataLoader not shuffle$"),
    ("an_empty_batch", (), "^the data of the task has a batch of no examples; leave it out$"),
    ("other_inputs", (), "^task.py:other_inputs: mat1 and mat2 shapes cannot be multiplied"),
    ("unclear", (), "^the data of the task: a batch has 4 parts, and the network takes 2 inputs"),
    ("called_seconds", (), "^the metric is called seconds, and so is another key of results.jsonl"),
    ("called_rows", (), "^the metric is called rows, and so is another key of results.jsonl"),
    ("called_a_path", (), "called 'error/pixel'; a name of letters and digits is expected"),
    ("not_a_number", (), "^task.py:not_a_number: the metric nan gives NaN for a batch of 2$"),
    ("of_a_number", (), "returns a Task of a int; its network should be a torch.nn.Module$"),
    ("without_data", (), "^the data of the task is a NoneType; batches that can be gone through again"),
    ("a_wrong_take", (), "^the data of the task: .*indices must be integers"),
    ("points", ("--dataset", "digits"), "^--dataset is for data sets of images, and task.py:points brings what it is meas")])
def test_what_is_no_task_is_one_line_before_any_work(folder, function, flags, message):
    with pytest.raises(UserError, match=message) as caught:
        run(function, *flags, "--cell_bits", "2", "--adc_bits", "4")
    assert "\n" not in str(caught.value) and not Path("out/points").exists()


def test_examples_of_several_sizes(folder):
    assert run("several_sizes", "--cell_bits", "2", "--adc_bits", "4") == 0 and len(rows()) == 3
    assert {row["n_images"] for row in rows()} == {12}


def test_pictures_have_no_line_of_a_float_network_beside_itself(folder, monkeypatch):
    drawn = []
    monkeypatch.setattr(report, "save", lambda figure, *_, **__: drawn.append(figure.axes[0]))
    assert run("against_float", "--cell_bits", "2", "--adc_bits", "4:5") == 0 and rows()[0]["signal_to_error"] == 200
    labels = [line.get_label() for line in drawn[0].lines]
    assert "quantized" in labels and "float" not in labels


def test_a_limit_needs_a_number_for_each_example(folder):
    with pytest.raises(UserError, match="^a limit is found example by example, and the metric multiclass_accuracy has one number for all"):
        run("torchmetrics_accuracy", "--cell_bits", "2", "--adc_bits", "4", "--device", "techA", "--largest", "read_noise=0.1:2:0.1",
            "--at_least", "accuracy=software-5")
    assert not Path("out/points").exists() and not Path("out/parts").exists()


def test_a_metric_that_fails_in_the_float_pass_is_one_line(folder):
    with pytest.raises(UserError, match="^float: the metric late gives inf for a batch of 8$"):
        run("infinite_later", "--cell_bits", "2", "--adc_bits", "4")


@pytest.mark.parametrize("function, name", [("negative", "r2"), ("without_a_name", "value"), ("one_point", "distance"), (
    "torchmetrics_accuracy", "multiclass_accuracy")])
def test_odd_metrics_are_measured_once(folder, capsys, function, name):
    for _ in range(2):
        assert run(function, "--cell_bits", "2", "--adc_bits", "4", "--device", "techA", "--chips", "2") == 0
    found = rows()
    assert len(found) == 3 and "are measured already" in capsys.readouterr().out
    assert isinstance(found[-1][name], float) and found[-1][f"chip_{name}"] and f"{name}_worst" in found[-1]


def test_plans_of_a_task_that_has_answers_with_names(folder):
    task, _ = made()
    spec = CrossbarSpec(8, 8, cell_bits=2, adc_bits=2.5, adc_plan="ones")
    net = convert(task.network.eval(), spec, task.calibration)
    found = measure(net, task.data, None, Setting(spec, calibration=Calibration()), calibration=task.calibration, metric=task.metric)
    assert 0 < found.mean_bits <= 2.5 and isinstance(net, nn.Module) and found.accuracy >= found.software_accuracy - 3 * found.chance
    assert torch.isfinite(torch.tensor(found.accuracy))
