"""eval.py: the table and the files it writes, what the results may depend on, edited planes, bad input, Ctrl-C.

A VGG7 with few layers and channels and random weights stands in for the real one; its arrays are short, so that they are
several and the ADC matters.
"""

import csv
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

import eval as evaluation
from experiment.sweep import bench
from experiment.report import drawing
from experiment.settings import eval_settings, train_settings
from experiment.measure import ranges
from experiment.train import training
from experiment.inputs import data as datasets
from experiment.start import images as eval_images
from experiment.inputs.checkpoint import save_checkpoint
from experiment.program.cli import UserError, run_main
from models import quant, vgg
from models.quant import decompose, engines
from models.quant.measuring.setting import Setting
from models.quant.storage.files import locked

ROOT = Path(__file__).resolve().parent.parent
SMALL = {"vgg7": ([16, "M", 24, "M", 40, "M"], 32), "vgg16": ([4, "M", "M", 4, 4, "M"], 8)}
CROSSBARS = ["features.4", "features.8", "classifier.0", "classifier.3"]
CONFIG = {"model": "vgg7_quant", "wbit": 4, "abit": 4, "dataset": "digits", "data_path": "./data", "quantize_image": False}
FAST = ["--ngpu", "0", "--limit", "40", "--rows", "16"]
CALIBRATION = ["--calib_images", "20"]
load_digits = datasets._digits
FORK = multiprocessing.get_context("fork")  # processes that need not import anything

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def scene(monkeypatch, tmp_path):
    """Small networks, and an empty folder to work in."""
    for name, config in SMALL.items():
        monkeypatch.setitem(vgg.CONFIGS, name, config)
    engines.announce.cache_clear()
    monkeypatch.chdir(tmp_path)


def network(config="vgg7", seed=0, **kwargs):
    """A training network with random weights whose activations use their range."""
    torch.manual_seed(seed)
    net = vgg.VGG(config, alpha_init=2.0, **kwargs)
    for module in net.modules():
        if isinstance(module, (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d)):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 4)
    return net.eval()


def save(path, net, more=(), **config):
    save_checkpoint(path, {"state_dict": net.state_dict(), "config": CONFIG | config, **dict(more)})
    return str(path)


@pytest.fixture
def checkpoint(tmp_path):
    """A checkpoint in a folder of its own, where the results go."""
    (tmp_path / "save").mkdir()
    return save(tmp_path / "save" / "model_best.pth.tar", network())


def without_pictures(patch):
    patch.setattr(drawing, "atomic_write", lambda path, write: Path(path).touch())


@pytest.fixture
def run(monkeypatch, capsys):
    """run(checkpoint, flags...) evaluates in this process: (records, predictions of each, printed text). Pictures are empty files
    unless they are to be `drawn`, which takes longer than all else."""

    def run(checkpoint, *flags, drawn=False):
        predictions, measure, folder = [], bench.measure, Path(checkpoint).parent
        shutil.rmtree(folder / "points", ignore_errors=True)  # what was measured before is measured again
        before = len(results(folder))

        def spy(*args, **options):
            there = [json.loads(path.read_bytes())["row"] for path in folder.glob("points/**/*.json")]
            assert sum(row["chips"] in (None, 1) for row in there) == len(predictions)  # the others are on the disk already
            assert len(results(folder)) == before + len(list(folder.glob("points/*.json")))
            record = measure(*args, **options)
            predictions.append(record.predictions)
            return record

        capsys.readouterr()
        calibrated = "--adc_range" not in flags or "calibrated" in flags or "--also" in flags
        calibration = CALIBRATION if calibrated and "--adc_ranges" not in flags else []
        with monkeypatch.context() as patch:
            patch.setattr(bench, "measure", spy)
            if not drawn:
                without_pictures(patch)
            assert evaluation.main(["--resume", checkpoint, *FAST, *calibration, *flags]) == 0
        return results(folder)[before:], predictions, capsys.readouterr().out

    return run


def results(folder):
    path = Path(folder, "results.jsonl")
    text = path.read_text() if path.exists() else ""
    assert text == "" or text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


def shown_images(count, stats=None):
    """The images that --limit chooses, ready for a network, and their labels."""
    data = load_digits()
    pick = [i * len(data.test_y) // count for i in range(count)]
    return datasets.normalize(data.test_x[pick], *(stats or (data.mean, data.std))), data.test_y[pick]


@torch.no_grad()
def classes(net, images):
    return net(images).argmax(1)


# ---- table, files ----------------------------------------------------------------------------------------------------


def test_table_and_results_of_several_settings(run, checkpoint, tmp_path):
    records, predictions, text = run(checkpoint, "--cell_bits", "1", "3", "--adc_bits", "6", "2")
    titles = [f"{cell}-bit cells, {bits}-bit ADC, calibrated, rows 16" for cell in (1, 3) for bits in (6, 2)]
    above, *table = text[text.index("all settings"):].splitlines()
    assert above == "all settings: calibrated, rows 16"
    assert table[0].split() == ["setting", "accuracy", "%", "to", "software", "changed", "images/s"]
    assert set(table[1]) == {"-"} and len(set(map(len, table[:7]))) == 1
    images, labels = shown_images(40)
    software = 100 * int((predictions[0] == labels).sum()) / len(labels)
    names = ["software", *(title.removesuffix(", calibrated, rows 16") for title in titles)]
    for line, title, record, predicted in zip(table[2:7], names, records, predictions, strict=True):
        accuracy, changed = 100 * int((predicted == labels).sum()) / len(labels), int((predicted != predictions[0]).sum())
        assert line.startswith(title + " ")
        assert line.removeprefix(title).split() == [
            f"{accuracy:.2f}", f"{accuracy - software:+.2f}", str(changed), f"{record['images_per_s']:.0f}"]
        assert record["accuracy"] == pytest.approx(accuracy) and record["changed_predictions"] == changed
        assert record["software_accuracy"] == pytest.approx(software)
    assert torch.equal(predictions[0], classes(network(), images))  # the network that was trained, computed elsewhere
    assert len(predictions[0].unique()) > 2 and records[2]["changed_predictions"] > 0  # so this says something
    assert table[7:10] == ["only 40 of 359 test images (--limit)", "software: the same quantized network, without ADCs",
                           "changed: images that are classified differently than by software"]
    assert f"results: {tmp_path / 'save' / 'results.jsonl'}" in text

    lines = text.splitlines()
    assert lines[0] == f"{checkpoint}: vgg7_quant, 4-bit weights, 4-bit activations; 40 of 359 test images of digits; CPU"
    stats = load_digits()
    assert lines[1] == "normalization of the images' channels: " + ", ".join(
        f"{name} {' '.join(f'{value:.3g}' for value in values)}" for name, values in (("mean", stats.mean), ("deviation", stats.std)))
    # 16 rows: 9 + 18 + 40 + 2 row blocks for nine taps of 16 and of 24 channels, and 640 and 32 inputs: 1032 of 1104 rows
    assert lines[2] == "tap: 93 % of the rows in use; im2col would need 65 row blocks in place of 69"
    said = [line for line in lines if line.startswith("engine ")]
    assert said[0] == "engine numba: fastest for this device"  # once, not for every layer and setting
    assert len(set(said)) == len(said) <= 2
    assert len([line for line in lines if not line.startswith("compiling ")]) < 28
    log = (tmp_path / "save" / "eval.log").read_text()
    assert titles[3] in log and log.count("engine numba") == len(said)


def test_without_limit_all_images_are_evaluated(run, checkpoint):
    records, predictions, text = run(checkpoint, "--limit", "100000", "--adc_range", "ideal")
    assert "\n359 test images\n" in text and "only" not in text
    assert [record["n_images"] for record in records] == [359, 359] == [len(predicted) for predicted in predictions]
    data = load_digits()
    assert torch.equal(predictions[0], classes(network(), datasets.normalize(data.test_x, data.mean, data.std)))


def test_results_have_all_keys_with_their_types_and_are_appended(run, checkpoint, tmp_path):
    assert len(run(checkpoint, "--adc_bits", "5")[0]) == 2
    text = run(checkpoint, "--adc_range", "dynamic", "ideal", "full", "--cell_bits", "2", "--map", "conv", "--mapping",
               "im2col", "--engine", "reference", "--limit", "4")[2]
    assert "engine reference: asked for\n" in text and "numba" not in text
    records = results(tmp_path / "save")
    assert len(records) == 2 + 4
    number = (int, float)
    types = {"model": str, "dataset": str, "wbit": int, "abit": int, "accuracy": number, "software_accuracy": number,
             "n_images": int, "changed_predictions": int, "images_per_s": number, "seconds": number, "python": str,
             "torch": str, "cpu": str, "threads": int, "command": str, "checkpoint": str}
    for record in records:
        for key, kind in types.items():
            assert isinstance(record[key], kind) and not isinstance(record[key], bool), key
        assert record["images_per_s"] == pytest.approx(record["n_images"] / record["seconds"]) and record["seconds"] > 0
        assert record["checkpoint"] == checkpoint and 0 <= record["accuracy"] <= 100
    keys = ["cell_bits", "adc_bits", "adc_range", "rows", "mapping", "map", "engine", "calib_images"]
    assert [[record[key] for key in keys] for record in records] == [
        [None] * 8,
        [1, 5, "calibrated", 16, "tap", "all", "numba", 20],
        [None] * 8,
        [2, 6, "dynamic", 16, "im2col", "conv", "reference", None],
        [2, None, "ideal", 16, "im2col", "conv", "reference", None],
        [2, 6, "full", 16, "im2col", "conv", "reference", None],
    ]


def test_equal_settings_are_evaluated_once(run, checkpoint):
    records, _, text = run(checkpoint, "--adc_range", "ideal", "calibrated", "--adc_bits", "6", "5", "6")
    assert [(r["adc_range"], r["adc_bits"]) for r in records[1:]] == [("ideal", None), ("calibrated", 6), ("calibrated", 5)]


def test_also_adds_settings_with_the_other_flags_at_their_defaults(run, checkpoint):
    records, _, _ = run(checkpoint, "--cell_bits", "2", "--adc_bits", "4", "--also", "--map conv --rows 16",
                        "--cell_bits 2 3 --adc_bits 4 --adc_range full dynamic", "--also",
                        "--cell_bits 2 --adc_bits 4 --rows 16")
    assert [tuple(r[name] for name in ("map", "cell_bits", "adc_bits", "adc_range", "rows")) for r in records[1:]] == [
        ("all", 2, 4, "calibrated", 16), ("conv", 1, 6, "calibrated", 16), ("all", 2, 4, "full", 128),
        ("all", 2, 4, "dynamic", 128), ("all", 3, 4, "full", 128), ("all", 3, 4, "dynamic", 128)]  # the last is the first


# ---- calibrated ranges, report -----------------------------------------------------------------------------------------


def test_ranges_can_be_used_again(run, checkpoint, tmp_path):
    flags = ["--cell_bits", "1", "2", "--adc_bits", "3", "4"]
    first, expected, _ = run(checkpoint, *flags)
    content = json.loads(Path("save/adc_ranges.json").read_text())
    for entry in content["ranges"][:2]:  # as in older files
        for layer in entry["layers"].values():
            layer.pop("input_step")
    Path("ranges.json").write_text(json.dumps(content))
    os.remove("save/adc_ranges.json")
    second, found, _ = run(checkpoint, *flags, "--adc_ranges", "ranges.json")
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    assert not Path("save/adc_ranges.json").exists()
    assert [r["calib_images"] for r in first] == [None, 20, 20, 20, 20] and not any(r["calib_images"] for r in second)
    assert [r["adc_ranges"] for r in second] == [None, *["ranges.json"] * 4]


def test_ranges_that_were_read_are_those_that_run(run, checkpoint):
    """A step so large that every code is zero: nothing is left of the network."""
    _, good, _ = run(checkpoint)
    content = json.loads(Path("save/adc_ranges.json").read_text())
    for layer in content["ranges"][0]["layers"].values():
        layer["ranges"] = [[1e6, 0]] * len(layer["ranges"])
    Path("ranges.json").write_text(json.dumps(content))
    _, bad, _ = run(checkpoint, "--adc_ranges", "ranges.json")
    assert len(bad[1].unique()) == 1 < len(good[1].unique())


@pytest.mark.parametrize("change, words", [
    (lambda c: c["ranges"][0].update(cell_bits=2), "has no ranges of features.4 with these weights and input codes for 1-bit cells"),
    (lambda c: c["ranges"][0]["layers"].pop("classifier.0"), "has no ranges of classifier.0"),
    (lambda c: c["ranges"][0]["layers"]["features.8"].update(ranges=[[0.5, -99]] * 4), "features.8, 1-bit cells"),
    (lambda c: c["ranges"][0]["layers"]["features.8"].update(ranges=[[0.5, -9]] * 3), "ranges.json, features.8, 1-bit cells"),
    (lambda c: c["ranges"][0]["layers"]["features.8"].update(sha256="0"), "has no ranges of features.8 with these weights"),
    (lambda c: c["ranges"][0]["layers"]["features.8"].update(input_step=0.5), "has no ranges of features.8 with these weights and input"),
    (lambda c: c.pop("ranges"), "ranges.json is not an adc_ranges.json"),
    (lambda c: c["ranges"][0]["layers"]["features.8"].update(ranges=[["x", 1]]), "ranges.json is not an adc_ranges.json"),
    (lambda c: c["ranges"][0]["layers"]["features.8"].update(ranges=[[0.5, -1.5]] * 4), "(-1.5 stands where a whole number is expected)"),
    *[(lambda c, step=step: c["ranges"][0]["layers"]["features.8"].update(ranges=[[step, -1]] * 4), words)
      for step, words in ((float("nan"), "ADC ranges (steps [nan"), (-0.5, "ADC ranges (steps [-0.5"), (0, "is not calibrated"))],
    (lambda c: c["ranges"][0]["layers"]["features.8"].pop("sha256"), "not an adc_ranges.json (sha256 is absent)"),
    (lambda c: c["ranges"][0]["layers"]["features.8"].pop("offset"), "not an adc_ranges.json (offset is absent)"),
    (lambda c: c["ranges"][0]["layers"]["features.8"]["gain"].pop(), "ranges.json, features.8, 1-bit cells"),
])
def test_ranges_of_something_else_are_refused(change, words, run, refused, checkpoint):
    run(checkpoint)
    content = json.loads(Path("save/adc_ranges.json").read_text())
    change(content)
    Path("ranges.json").write_text(json.dumps(content))
    refused(["--resume", checkpoint, "--adc_ranges", "ranges.json"], words)


def test_ranges_nested_without_end_are_refused(refused, checkpoint):
    Path("ranges.json").write_text("[" * 100_000)
    refused(["--resume", checkpoint, "--adc_ranges", "ranges.json"], "ranges.json is not an adc_ranges.json")


def test_ranges_of_other_settings_stay_in_the_file(run, checkpoint):
    run(checkpoint, "--adc_bits", "3")
    run(checkpoint, "--adc_bits", "4")
    entries = json.loads(Path("save/adc_ranges.json").read_text())["ranges"]
    assert [entry["adc_bits"] for entry in entries] == [3, 4]
    _, _, _ = run(checkpoint, "--adc_bits", "3", "4", "--adc_ranges", "save/adc_ranges.json")


def test_ranges_of_another_network_are_refused(run, refused, checkpoint, tmp_path):
    run(checkpoint)
    other = save(tmp_path / "other.pth.tar", network(seed=1))
    refused(["--resume", other, "--adc_ranges", "save/adc_ranges.json"], "has no ranges of features.4 with these weights")


def test_validation_images_are_those_that_training_held_out(run, refused, tmp_path, monkeypatch):
    monkeypatch.setattr(eval_images, "Batches", lambda x, *args, real=eval_images.Batches: (seen.append(x), real(x, *args))[1])
    seen = []
    split = dict(val_split=0.2, seed=3, limit_train=300)
    flags = ["--save_path", str(tmp_path / "run"), "--batch_size", "20", "--epochs", "1", "--lr", "0.1", "--val_split", "0.2",
             "--seed", "3", "--limit_train", "300"]
    trained = training.Run(train_settings.parse(flags)[0], network(), load_digits(), torch.device("cpu"), None)
    held, facts = trained.val_x, trained.data_facts()
    path = save(tmp_path / "a.pth.tar", network(), {"data": facts}, **split)
    records, _, text = run(path, "--validation", "--adc_range", "full", "--limit", "1000")
    assert "60 validation images\n" in text and [r["n_images"] for r in records] == [60, 60]
    assert all(r["validation"] for r in records) and torch.equal(seen[0], held)
    refused(["--resume", save(tmp_path / "b.pth.tar", network()), "--validation"], "was trained without validation images")
    refused(["--resume", path, "--validation", "--dataset", "cifar10"], "was trained on digits, not cifar10")
    other = save(tmp_path / "c.pth.tar", network(), {"data": facts | {"train_images": 241}}, **split)
    with pytest.raises(UserError, match="was trained on other images than those in ./data"):
        evaluation.main(["--resume", other, *FAST, "--validation"])


def test_images_of_other_classes_are_refused(run, tmp_path):
    data = load_digits()
    facts = {"classes": ["a", *data.classes[1:]], "mean": list(data.mean), "std": list(data.std), "train_images": 9}
    path = save(tmp_path / "a.pth.tar", network(), {"data": facts})
    with pytest.raises(UserError, match="a.pth.tar was trained on other classes: the images have 0 instead of a$"):
        evaluation.main(["--resume", path, *FAST])


def test_an_adc_aware_checkpoint_says_what_it_was_trained_for(run, tmp_path):
    (tmp_path / "save").mkdir()
    path = save(tmp_path / "save" / "aware.pth.tar", network(), adc_aware=True, cell_bits=2, adc_bits=3, rows=64)
    _, _, text = run(path)
    assert "trained through the ADC of --cell_bits 2, --adc_bits 3, --rows 64" in text


def test_an_adc_aware_checkpoint_keeps_its_ranges_on_its_hardware(tmp_path, capsys):
    (tmp_path / "save").mkdir()
    spec = quant.CrossbarSpec(cell_bits=2, adc_bits=3, rows=16)
    net = network(spec=spec)
    few, _ = shown_images(8)  # other images than eval.py would take
    quant.calibrate(net, [few])
    quant.correct(net, few)
    flags = dict(adc_aware=True, cell_bits=2, adc_bits=3, rows=16, mapping="tap", reference="analog", dac_bits=1, map="all")
    path = save(tmp_path / "save" / "aware.pth.tar", net, **flags)
    flags = ["--resume", path, *FAST, "--cell_bits", "2", "--adc_bits", "3", "4"]
    assert evaluation.main(flags) == 0
    assert evaluation.main([*flags, "--calib_images", "8"]) == 0
    kept, other, anew, _ = (record for record in results("save") if record["cell_bits"])
    assert [r["adc_ranges"] for r in (kept, other, anew)] == ["checkpoint", None, None]
    assert [r["calib_images"] for r in (kept, other, anew)] == [None, 256, 8]
    assert "whose ranges it holds and keeps" in capsys.readouterr().out
    images, labels = shown_images(40)
    with torch.no_grad():
        predictions = net(images).argmax(1)
    assert kept["accuracy"] == 100 * (predictions == labels).sum().item() / 40
    with torch.no_grad():
        quant.set_spec(net, quant.CrossbarSpec(cell_bits=2, adc_range="ideal"))
        assert kept["changed_predictions"] == int((predictions != net(images).argmax(1)).sum()) > 0


def test_rules_of_calibration_give_different_ranges(run, checkpoint):
    found = {}
    for rule in ("minmax", "percentile", "mse"):
        for per in ("layer", "slice"):
            records, _, _ = run(checkpoint, "--adc_bits", "3", "--cell_bits", "2", "--adc_calib", rule, "--adc_per", per)
            assert (records[1]["adc_calib"], records[1]["adc_per"]) == (rule, per)
            entry = json.loads(Path("save/adc_ranges.json").read_text())["ranges"][0]
            ranges = {name: layer["ranges"] for name, layer in entry["layers"].items()}
            assert list(ranges) == CROSSBARS
            assert (entry["adc_calib"], entry["adc_per"], entry["calib_images"]) == (rule, per, 20)
            if per == "layer":
                assert all(a == b for a, b in ranges.values())
            found[rule, per] = json.dumps(ranges)
    assert len(set(found.values())) == 6


def test_outputs_are_corrected_unless_that_is_switched_off(run, checkpoint):
    found = {}
    for flags in ([], ["--adc_correct", "none"]):
        records, predictions, _ = run(checkpoint, "--adc_bits", "2", *flags)
        layers = json.loads(Path("save/adc_ranges.json").read_text())["ranges"][0]["layers"]
        found[records[1]["adc_correct"]] = layers, predictions[1]
    assert found.keys() == {"channel", "none"} and not torch.equal(found["channel"][1], found["none"][1])
    assert [layer.keys() for layer in found["none"][0].values()] == [{"sha256", "input_step", "ranges"}] * len(CROSSBARS)
    for name, layer in found["channel"][0].items():
        assert layer["ranges"] == found["none"][0][name]["ranges"]
        assert len(layer["gain"]) == len(layer["offset"]) and any(gain != 1 for gain in layer["gain"])


def test_report_is_a_table_a_file_and_a_picture(run, checkpoint):
    _, _, text = run(checkpoint, "--report", "--cell_bits", "2", "--adc_bits", "3", "--adc_range", "calibrated", "dynamic", drawn=True)
    [path] = Path("save").glob("report_c2_b3_*.json")
    name = str(path.with_suffix(""))
    layers = json.loads(Path(name + ".json").read_text())["layers"]
    assert [entry["layer"] for entry in layers] == CROSSBARS and f"/{name}.png" in text
    assert [len(entry["slices"]) for entry in layers] == [2] * 4
    for entry in layers:
        line = next(line for line in text.splitlines() if line.startswith(entry["layer"] + " "))
        assert f" {entry['output_sqnr_db']:.1f}" in line and f" {entry['row_blocks']} " in line
    with Image.open(name + ".png") as picture:
        assert picture.format == "PNG" and min(picture.size) > 300
    run(checkpoint, "--report", "--adc_range", "full")
    with open("save/reports.csv", newline="") as file:
        index = {row["file"]: row["of"] for row in csv.DictReader(file)}  # of dynamic ranges there is none
    assert sorted(index.values()) == [*["1-bit cells, 6-bit ADC, full, rows 16"] * 2, *["2-bit cells, 3-bit ADC, calibrated, rows 16"] * 2]
    assert {path.name for path in Path("save").glob("report_*")} == index.keys() and index[path.name].startswith("2-bit cells")


def test_plot_only_of_several_adc_precisions(run, checkpoint, tmp_path):
    path = tmp_path / "save" / "accuracy_over_adc_bits.png"
    text = run(checkpoint, "--adc_range", "full", "ideal", "--cell_bits", "1", "2")[2]
    assert not path.exists() and "plot: " not in text
    text = run(checkpoint, "--adc_range", "full", "--adc_bits", "2", "4", drawn=True)[2]
    with Image.open(path) as image:
        image.load()
        assert image.format == "PNG" and min(image.size) > 400
    assert f"plot: {path}" in text and not list(path.parent.glob(".*"))


def test_folders_of_its_own(run, checkpoint, tmp_path, capsys):
    evaluation.main(["--resume", checkpoint, *FAST, "--adc_range", "full", "--save_path", "out/a", "--prob_path", "planes",
                     "--log_file", "b.log"])
    assert {*os.listdir("out/a")} - {"results.parquet"} == {
        "b.log", "eval_config.json", "points", "results.csv", "results.jsonl", "table.json"}
    assert os.listdir("planes") == ["vgg7_quant_eval_w4_c1"] and os.listdir("save") == ["model_best.pth.tar"]


# ---- what results depend on ------------------------------------------------------------------------------------------


def test_results_depend_neither_on_the_batch_size_nor_on_the_engine(run, checkpoint):
    flags = ["--limit", "9", "--calib_images", "9", "--cell_bits", "1", "3", "--adc_bits", "3", "--reference", "analog",
             "digital"]
    keys = ["cell_bits", "reference", "accuracy", "software_accuracy", "changed_predictions"]
    expected = None
    for engine, batch_size in (("reference", 7), ("numba", 1), ("numba", 7), ("numba", 64)):
        records, predictions, _ = run(checkpoint, *flags, "--engine", engine, "--batch_size", str(batch_size))
        assert {record["engine"] for record in records} == {None, engine}
        result = [[record[key] for key in keys] for record in records], [p.tolist() for p in predictions]
        expected = expected or result
        assert result == expected, (engine, batch_size)
    assert sum(row[-1] > 0 for row in expected[0]) >= 2  # such an ADC changes predictions, so equality says something


@pytest.mark.parametrize("flags, size", [([], 256), (["--batch_size", "7"], 7), (["--adc_range", "dynamic"], 64),
                                         (["--adc_range", "full", "dynamic"], 64)])
def test_small_images_pass_many_at_a_time(flags, size, run, checkpoint):
    records, *_ = run(checkpoint, "--limit", "9", "--adc_bits", "3", *flags)
    assert {record["batch_size"] for record in records} == {size}


def test_dynamic_ranges_do_depend_on_the_batch_size(run, checkpoint):
    """As the help says; and so the test above would see it."""
    flags = ["--adc_range", "dynamic", "--adc_bits", "3"]
    small, large = (run(checkpoint, *flags, "--batch_size", size)[1] for size in ("1", "64"))
    assert torch.equal(small[0], large[0]) and not torch.equal(small[1], large[1])


@pytest.mark.parametrize("flags", [
    ["--adc_range", "ideal", "--cell_bits", "1", "4", "--map", "conv", "all"],
    ["--adc_range", "full", "--adc_bits", "12", "--cell_bits", "1", "2", "3", "--mapping", "tap", "im2col"],
    ["--adc_range", "full", "--adc_bits", "12", "--reference", "digital", "--dac_bits", "1", "2"],
    ["--adc_range", "full", "--adc_bits", "5", "--reference", "digital"],  # 16 rows of 1-bit cells: 0 to 16
])
def test_without_loss_no_prediction_changes(flags, run, checkpoint):
    records, predictions, _ = run(checkpoint, *flags)
    assert [record["changed_predictions"] for record in records] == [0] * len(records) and len(records) >= 2
    assert all(torch.equal(predicted, predictions[0]) for predicted in predictions)


def test_too_few_adc_codes_change_predictions(run, checkpoint):
    records, _, _ = run(checkpoint, "--adc_range", "full", "--adc_bits", "2", "--reference", "digital")
    assert records[1]["changed_predictions"] > 0


def test_map_conv_keeps_linear_layers_off_the_crossbars(run, checkpoint):
    """With the cells of the linear layers away from their weights only the one that uses them differs."""
    run(checkpoint, "--adc_range", "ideal")
    shutil.copytree("prob/vgg7_quant_eval_w4_c1", "planes")
    path = Path("planes/bit_levels2_ideal.pt")
    torch.save(1 - torch.load(path, weights_only=True), path)
    records, (software, conv, everything), _ = run(checkpoint, "--adc_range", "ideal", "--map", "conv", "all", "--planes",
                                                   "planes")
    assert torch.equal(conv, software) and not torch.equal(everything, software)
    assert [record["map"] for record in records] == [None, "conv", "all"]


def test_ranges_in_the_checkpoint_are_not_used(run, checkpoint):
    """They are of the hardware that the network was on then: other cells, more layers."""
    flags = ["--adc_bits", "3", "--cell_bits", "2", "--map", "conv", "all"]
    expected = run(checkpoint, *flags)[1]
    net = network()
    ranges = {f"{name}.{key}": value for name in CROSSBARS
              for key, value in (("adc_delta", torch.full((4,), 9.0).double()), ("adc_q_min", torch.zeros(4).long()))}
    save_checkpoint(checkpoint, {"state_dict": net.state_dict() | ranges, "config": CONFIG})
    predictions = run(checkpoint, *flags)[1]
    assert [p.tolist() for p in predictions] == [p.tolist() for p in expected]


def test_images_are_scaled_as_in_training(run, tmp_path):
    stats = (0.4, 0.1, 0.2), (0.3, 0.2, 0.1)
    facts = {"mean": stats[0], "std": stats[1], "classes": load_digits().classes, "train_images": 40}
    path = save(tmp_path / "c.pth.tar", network(), {"data": facts})
    _, predictions, _ = run(path, "--adc_range", "ideal")
    expected = classes(network(), shown_images(40, stats)[0])
    assert torch.equal(predictions[0], expected) and not torch.equal(expected, classes(network(), shown_images(40)[0]))


def test_checkpoint_of_the_original_code(run, checkpoint, tmp_path):
    """{"state_dict": ...} with the prefix of DataParallel, and no settings."""
    expected = run(checkpoint, "--adc_bits", "3")[1]
    state = {f"module.{key}": value for key, value in network().state_dict().items()}
    torch.save({"state_dict": state, "epoch": 3, "best_acc": 0.9}, tmp_path / "old.pth.tar")
    _, predictions, text = run(str(tmp_path / "old.pth.tar"), "--adc_bits", "3")
    assert "vgg7_quant, 4-bit weights, 4-bit activations; 40 of 359 test images of digits" in text
    assert [p.tolist() for p in predictions] == [p.tolist() for p in expected]
    # It rounded the image to the activation grid.
    _, predictions, _ = run(str(tmp_path / "old.pth.tar"), "--adc_range", "ideal", "--quantize_image")
    rounded = classes(network(quantize_image=True), shown_images(40)[0])
    assert torch.equal(predictions[0], rounded) and not torch.equal(rounded, expected[0])


def test_other_bits_and_another_network(run, tmp_path):
    path = save(tmp_path / "c.pth.tar", network("vgg16", wbit=3, abit=2), model="vgg16_quant", wbit=3, abit=2)
    records, predictions, _ = run(path, "--cell_bits", "2", "--adc_bits", "12", "--adc_range", "full")
    assert torch.equal(predictions[0], classes(network("vgg16", wbit=3, abit=2), shown_images(40)[0]))
    assert (records[1]["model"], records[1]["wbit"], records[1]["abit"]) == ("vgg16_quant_eval", 3, 2)
    assert records[1]["changed_predictions"] == 0


# ---- several programs in one folder, files that somebody damaged -------------------------------------------------------


def test_two_evaluations_in_one_folder_keep_the_ranges_of_both(run, checkpoint, monkeypatch):
    """The second begins before the first has written its ranges, and ends after it."""
    give = ranges.RangesOfRun.keep

    def other_first(self, *args):
        monkeypatch.setattr(ranges.RangesOfRun, "keep", give)
        evaluation.main(["--resume", checkpoint, *FAST, *CALIBRATION, "--adc_bits", "3"])
        give(self, *args)

    monkeypatch.setattr(ranges.RangesOfRun, "keep", other_first)
    assert evaluation.main(["--resume", checkpoint, *FAST, *CALIBRATION, "--adc_bits", "4", "5"]) == 0
    entries = json.loads(Path("save/adc_ranges.json").read_text())["ranges"]
    assert sorted(entry["adc_bits"] for entry in entries) == [3, 4, 5]
    run(checkpoint, "--adc_bits", "3", "4", "5", "--adc_ranges", "save/adc_ranges.json")


def test_only_one_process_at_a_time_writes_to_a_folder(tmp_path):
    def hold(inside, leave):
        with locked("x"):
            inside.set()
            leave.wait(60)

    (first_in, leave), (second_in, _) = pairs = [(FORK.Event(), FORK.Event()) for _ in range(2)]
    first, second = (FORK.Process(target=hold, args=pair) for pair in pairs)
    first.start()
    assert first_in.wait(60)
    second.start()
    assert not second_in.wait(1)  # it waits, however long
    leave.set()
    assert second_in.wait(60)
    pairs[1][1].set()
    for process in (first, second):
        process.join(60)
        assert process.exitcode == 0
    assert list(tmp_path.iterdir()) == []  # nothing is left behind


def test_a_torn_line_does_not_swallow_the_next_record(run, checkpoint):
    Path("save/results.jsonl").write_text('{"model": "vgg7_quant", "acc')
    assert evaluation.main(["--resume", checkpoint, *FAST, "--adc_range", "full"]) == 0
    torn, *lines = Path("save/results.jsonl").read_text().splitlines()
    assert torn == '{"model": "vgg7_quant", "acc' and [json.loads(line)["adc_range"] for line in lines] == [None, "full"]


def test_a_damaged_file_of_ranges_is_not_replaced(run, refused, checkpoint):
    for text in ("", '{"ranges": [{"w_bi', "[]"):
        Path("save/adc_ranges.json").write_text(text)
        refused(["--resume", checkpoint], "save/adc_ranges.json is not an adc_ranges.json")
    run(checkpoint, "--adc_range", "full")  # which needs none


def test_ranges_and_planes_of_before_are_read(run, checkpoint):
    """As an earlier version wrote them: ranges shared per "reference"."""
    expected = run(checkpoint, "--adc_bits", "3")[1]
    content = json.loads(Path("save/adc_ranges.json").read_text())
    content["ranges"][0]["adc_per"] = "reference"
    Path("old.json").write_text(json.dumps(content))
    found = run(checkpoint, "--adc_bits", "3", "--adc_ranges", "old.json")[1]
    assert [p.tolist() for p in found] == [p.tolist() for p in expected]


def test_older_names_of_flags_and_their_values(run, checkpoint):
    for flags in (["--map", "conv"], ["--crossbar_layers", "conv"]):
        assert run(checkpoint, "--adc_range", "full", *flags)[0][1]["map"] == "conv"
    records, _, _ = run(checkpoint, "--adc_bits", "3", "--adc_per", "reference")
    assert records[1]["adc_per"] == "alike"


# ---- bit-planes ------------------------------------------------------------------------------------------------------


def folder_state(folder):
    return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in Path(folder).iterdir()}


def test_planes_are_written_reused_and_rebuilt(run, checkpoint, tmp_path):
    folder = Path("prob/vgg7_quant_eval_w4_c3")
    text = run(checkpoint, "--cell_bits", "3", "--adc_bits", "2", "4", "--map", "conv")[2]
    assert text.count(f"bit-planes of the weights written to {folder}") == 1
    manifest = json.loads((folder / "manifest.json").read_text())
    assert [entry["layer"] for entry in manifest.values()] == CROSSBARS
    assert sorted(os.listdir(folder)) == sorted([*(f"bit_levels{i}_ideal.pt" for i in range(4)), "manifest.json"])
    layers = dict(network().named_modules())
    for i, name in enumerate(CROSSBARS):
        weight = layers[name].weight.detach()
        codes = layers[name].weight_quant.codes(weight if weight.dim() == 4 else weight[:, :, None, None])
        assert torch.equal(torch.load(folder / f"bit_levels{i}_ideal.pt", weights_only=True), decompose(codes, 4, 3))

    before = folder_state(folder)
    text = run(checkpoint, "--cell_bits", "3", "--adc_bits", "2")[2]
    assert folder_state(folder) == before and "bit-planes" not in text and "rebuilt" not in text

    other = save(tmp_path / "other.pth.tar", network(seed=1))
    text = run(other, "--cell_bits", "3", "--adc_bits", "2")[2]
    assert text.count(f"{folder}/bit_levels0_ideal.pt and 3 more: belongs to other weights; rebuilt") == 1
    assert text.count("bit-planes of the weights written") == text.count("rebuilt") == 1
    assert folder_state(folder)["bit_levels0_ideal.pt"][1] != before["bit_levels0_ideal.pt"][1]


@pytest.fixture
def planes(run, checkpoint):
    """A copy of the folder that a run wrote, for 2-bit cells."""
    run(checkpoint, "--cell_bits", "2", "--adc_range", "ideal")
    shutil.copytree("prob/vgg7_quant_eval_w4_c2", "planes")
    return Path("planes")


def test_edited_planes(run, refused, checkpoint, planes):
    flags = ["--cell_bits", "2", "--adc_bits", "4", "3", "--map", "conv", "all"]
    expected = run(checkpoint, *flags)[1]
    stored = folder_state("prob/vgg7_quant_eval_w4_c2")
    records, predictions, text = run(checkpoint, *flags, "--planes", "planes")
    assert [p.tolist() for p in predictions] == [p.tolist() for p in expected]
    assert "40 of 359 test images (--limit); cells from planes" in text
    assert [record["planes"] for record in records] == [None] + ["planes"] * 4

    path = planes / "bit_levels1_ideal.pt"
    cells = torch.load(path, weights_only=True)
    torch.save(3 - cells, path)
    records, predictions, _ = run(checkpoint, *flags, "--planes", "planes")
    assert torch.equal(predictions[0], expected[0])  # the software keeps the weights of the checkpoint
    for edited, plain in zip(predictions[1:], expected[1:], strict=True):
        assert not torch.equal(edited, plain)
    assert folder_state("prob/vgg7_quant_eval_w4_c2") == stored  # edited cells are not stored as those of the weights

    # Their ranges can be used again; those of other cells are refused before anything is evaluated.
    os.replace("save/adc_ranges.json", "ranges.json")
    again = run(checkpoint, *flags, "--planes", "planes", "--adc_ranges", "ranges.json")[1]
    assert [p.tolist() for p in again] == [p.tolist() for p in predictions]
    before = results("save")
    refused(["--resume", checkpoint, *FAST, *flags, "--adc_ranges", "ranges.json"], "has no ranges of features.8 with these")
    assert results("save") == before

    # Nor is a folder repaired whose planes are to be evaluated as they are.
    stored = Path("prob/vgg7_quant_eval_w4_c2")
    shutil.copy(path, stored)
    before = folder_state(stored)
    again = run(checkpoint, *flags, "--planes", str(stored))[1]
    assert folder_state(stored) == before and [p.tolist() for p in again] == [p.tolist() for p in predictions]

    # The cells of the last layer on crossbars decide: all at their lowest, all classes are equal without the bias.
    torch.save(cells, path)
    last = planes / "bit_levels3_ideal.pt"
    torch.save(torch.zeros_like(torch.load(last, weights_only=True)), last)
    _, predictions, _ = run(checkpoint, "--cell_bits", "2", "--adc_range", "ideal", "--planes", "planes")
    assert set(predictions[1].tolist()) == {int(network().classifier[-1].bias.argmax())}


def test_planes_that_are_no_planes_of_this_network(refused, checkpoint, planes):
    path = planes / "bit_levels1_ideal.pt"
    good = torch.load(path, weights_only=True)
    flags = ["--resume", checkpoint, "--cell_bits", "2", "--planes", "planes"]
    for bad, words in (
        (good[:1], f"{path} has shape [1, 40, 24, 3, 3]; layer features.8 needs [2, 40, 24, 3, 3]"),
        (good[:, :, :5], f"{path} has shape"),
        (good + 1, f"{path}: plane 0 holds cell values from 1 to 4; its cells hold 0 to 3"),
        (good.float(), f"{path}: cell values are torch.float32"),
        ([good], f"{path} holds a list, not a tensor"),
    ):
        torch.save(bad, path)
        refused(flags, words)
    path.write_bytes(path.read_bytes()[:1000])
    refused(flags, f"{path} cannot be read")
    path.unlink()
    refused(flags, f"{path} does not exist")
    refused(["--resume", checkpoint, "--cell_bits", "2", "--planes", "nowhere"], "nowhere/bit_levels0_ideal.pt does not exist")
    refused(["--resume", checkpoint, "--cell_bits", "1", "--planes", "planes"], "needs [4, 24, 16, 3, 3]")


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.fixture
def refused(monkeypatch, capsys):
    """refused(flags, words...): one line with these words, exit code 2, and nothing was read, evaluated or written."""

    def listing():
        return sorted((str(path), path.stat().st_mtime_ns) for path in Path().rglob("*"))

    def refused(flags, *words):
        before = listing()
        capsys.readouterr()
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as ended:
            patch.setattr(datasets, "load", lambda *_: pytest.fail("loaded data"))
            patch.setattr(bench, "measure", lambda *_, **__: pytest.fail("evaluated"))
            run_main(lambda: evaluation.main([*FAST, *flags]))
        out, err = capsys.readouterr()
        assert ended.value.code == 2 and out == ""
        assert err.startswith("error: ") and err.count("\n") == 1 and len(err) < 1000
        for word in words:
            assert word in err
        assert listing() == before
        return err

    return refused


@pytest.mark.parametrize("flags, words", [
    (["--cell_bits", "0"], "--cell_bits: 0 is not a whole number from 1 up"),
    (["--cell_bits", "1", "9"], "--cell_bits is 9; allowed are whole numbers from 1 to 4 (--w_bits)"),
    (["--cell_bits", "5"], "--cell_bits is 5; allowed are whole numbers from 1 to 4 (--w_bits)"),
    (["--cell_bits", "two"], "--cell_bits: two is not"),
    (["--adc_bits", "0"], "--adc_bits is 0; allowed are whole numbers from 1 to 12"),
    (["--adc_bits", "6", "13"], "--adc_bits is 13; allowed are whole numbers from 1 to 12"),
    (["--rows", "1025"], "--rows is 1025; allowed are whole numbers from 1 to 1024"),
    (["--dac_bits", "5"], "--dac_bits is 5; allowed are whole numbers from 1 to 4 (--a_bits)"),
    (["--w_bits", "9"], "--w_bits: 9 is not 1 to 8"),
    (["--w_bits", "2"], "was trained with --w_bits 4, not 2"),
    (["--a_bits", "8"], "was trained with --a_bits 4, not 8"),
    (["--quantize_image"], "was trained with --quantize_image False, not True"),
    (["--adc_range", "max"], "--adc_range: invalid choice: 'max'"),
    (["--adc_calib", "best"], "--adc_calib: invalid choice"),
    (["--limit", "0"], "--limit: 0 is not"),
    (["--batch_size", "-1"], "--batch_size: -1 is not"),
    (["--engine", "cuda"], "no engine is named 'cuda'; known are auto, reference, numba, triton"),
    (["--ngpu", "2"], "PyTorch finds 0 CUDA GPUs here; processes on CPUs are started by torchrun --nproc_per_node 2"),
    (["--model", "vgg16_quant_eval"], "is of the model vgg7_quant, not vgg16_quant"),
    (["--model", "resnet9_quant_eval"], "unknown, choose from resnet18_quant_eval, resnet20_quant_eval, vgg16"),
    (["--dataset", "mnist"], "--dataset: invalid choice"),
    (["--dataset", "cifar100"], "classifier.3.weight [10, 32] instead of [100, 32]"),
    (["--dataset", "imagefolder", "--data_path", "nowhere"], "--data_path nowhere: imagefolder needs"),
    (["--save_path", "{checkpoint}/run"], "cannot write to {checkpoint}/run"),
    (["--prob_path", "{checkpoint}/prob"], "cannot write to {checkpoint}/prob"),
    (["--planes", "prob", "--cell_bits", "1", "2"], "--planes holds cells of one precision: give one --cell_bits"),
    (["--planes", "prob", "--also", "--cell_bits 2"], "--planes holds cells of one precision: give one --cell_bits"),
    (["--also", "--cell_bits 5"], "--cell_bits is 5; allowed are whole numbers from 1 to 4 (--w_bits)"),
    (["--also", "--cell_bits two"], "--also '--cell_bits two': argument --cell_bits: two is not"),
    (["--also", "--resume x"], "--also '--resume x': there is no hardware flag --resume (see"),
    (["--also", "--map 'conv"], "--also \"--map 'conv\": No closing quotation"),
    (["--report", "--adc_range", "ideal", "dynamic"], "--report describes frozen ranges"),
    (["--adc_ranges", "nowhere.json"], "cannot read nowhere.json: No such file"),
    (["--adc_ranges", "nowhere.json", "--report", "--adc_correct", "none"], "--adc_correct is for calibration"),
    (["--adc_ranges", "nowhere.json", "--adc_calib", "mse"], "--adc_calib is for calibration, and --adc_ranges takes its"),
    (["--adc_range", "full", "--adc_calib", "mse"], "--adc_calib is for calibrated ranges: add --adc_range calibrated"),
    (["--adc_range", "dynamic", "--calib_images", "8"], "--calib_images is for calibrated ranges"),
    (["--adc_share", "layer"], "--adc_share is for plans: add --adc_plan significance"),
    (["--adc_plan", "significance", "--adc_per", "slice"], "--adc_per is for uniform bits, and with a plan"),
    (["--adc_range", "ideal", "--adc_ranges", "nowhere.json"], "--adc_ranges is for calibrated ranges"),
    (["--bogus"], "there is no flag --bogus (see"),
    (["--device", "techA", "--weights", "pair", "--reference_cells", "ideal"], "--reference_cells is 'ideal' and weights 'pair'"),
])
def test_bad_flags(flags, words, refused, checkpoint):
    refused(["--resume", checkpoint, *(flag.format(checkpoint=checkpoint) for flag in flags)],
            words.format(checkpoint=checkpoint))


def test_no_checkpoint(refused, tmp_path):
    refused([], "needs the network: --resume PATH")
    refused(["--resume", ""], "--resume is followed by an empty name")
    refused(["--resume", "no/such/file"], "no/such/file: no such file")
    refused(["--resume", "."], ".: is a folder")


class Mischief:
    def __reduce__(self):
        return os.mkdir, ("mischief",)


def test_damaged_and_malicious_checkpoints(refused, checkpoint):
    path = Path(checkpoint)
    whole = path.read_bytes()
    for damaged in (whole[:100], whole[:len(whole) // 2], whole[:-10], b"", b"text", b"epoch 1\n"):
        path.write_bytes(damaged)
        refused(["--resume", checkpoint], f"{checkpoint}: not a readable PyTorch file, refused")
    with open(path, "wb") as file:
        pickle.dump({"state_dict": Mischief()}, file)
    refused(["--resume", checkpoint], "refused")
    torch.save({"state_dict": Mischief()}, path)
    refused(["--resume", checkpoint], "it holds more than tensors")
    assert not Path("mischief").exists()
    for other in ({"weights": 3}, [torch.zeros(2)], {"state_dict": {"a": 1}}):
        torch.save(other, path)
        refused(["--resume", checkpoint], "not a checkpoint of a model")


def test_keys_that_do_not_fit_are_named(refused, checkpoint):
    state = network().state_dict()
    del state["features.8.weight"], state["classifier.3.act_quant.act_alpha"]
    torch.save({"state_dict": state | {"features.99.weight": torch.zeros(1)}}, checkpoint)
    refused(["--resume", checkpoint], f"{checkpoint} does not fit the model: missing: features.8.weight, "
            "classifier.3.act_quant.act_alpha; unexpected: features.99.weight. For your own network: --model FILE.py:FUNCTION --state "
            f"{checkpoint}")
    torch.save({"state_dict": network("vgg16").state_dict()}, checkpoint)  # of another model that does not say so
    refused(["--resume", checkpoint], "missing: features.4.", "unexpected: features.", "and 12 more",
            "of another shape: features.0.weight [4, 3, 3, 3] instead of [16, 3, 3, 3]")


@pytest.mark.parametrize("config, words", [
    ({"model": "resnet9_quant"}, "resnet9_quant_eval: unknown, choose from resnet18_quant_eval, resnet20_quant_eval"),
    ({"wbit": 32}, "has --w_bits 32: crossbars hold quantized weights and inputs, 1 to 8 bits"),
    ({"abit": 32}, "has --a_bits 32"),
    ({"wbit": 99}, "has --w_bits 99, which is not 1 to 8"),
    ({"dataset": "mnist"}, "has --dataset 'mnist', which is not one of digits, cifar10, cifar100, imagefolder"),
])
def test_checkpoints_that_crossbars_cannot_run(config, words, refused, checkpoint):
    save(checkpoint, network(), **config)
    refused(["--resume", checkpoint], words)


def test_a_checkpoint_without_clipping_levels_cannot_run(refused, checkpoint):
    torch.save({"state_dict": network(wbit=32, abit=32).state_dict()}, checkpoint)
    refused(["--resume", checkpoint], "missing: features.4.act_quant.act_alpha")


def test_reads_of_millions_of_values_are_calibrated_on(run, tmp_path):
    """8-bit ADCs that cover all that was seen, of reads up to 216 x 255 x 127.5: little is lost."""
    path = save(tmp_path / "c.pth.tar", network(wbit=8, abit=8), wbit=8, abit=8)
    flags = ["--map", "all", "--mapping", "im2col", "--rows", "1024", "--dac_bits", "8", "--cell_bits", "8", "--adc_bits", "8"]
    records, predictions, _ = run(path, *flags, "--adc_calib", "minmax")
    assert records[1]["changed_predictions"] == int((predictions[0] != predictions[1]).sum()) <= 8


def test_results_that_cannot_be_written(checkpoint, tmp_path, monkeypatch, capsys):
    (tmp_path / "save" / "results.jsonl").mkdir()
    monkeypatch.setattr(bench, "measure", lambda *_, **__: pytest.fail("evaluated"))
    with pytest.raises(UserError, match="cannot write to .*results.jsonl: Is a directory"):
        evaluation.main(["--resume", checkpoint, *FAST])


# ---- in a process of its own -----------------------------------------------------------------------------------------


def test_triton_without_a_gpu(checkpoint):
    code = ("import models.vgg, eval; from experiment.program.cli import run_main; "
            f"models.vgg.CONFIGS.update({SMALL!r}); run_main(eval.main)")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code, "--resume", checkpoint, *FAST, "--engine", "triton"], capture_output=True,
                          env=environment | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, text=True, timeout=60)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: engine triton cannot run") and done.stderr.count("\n") == 1
    assert os.listdir("save") == ["model_best.pth.tar"] and not Path("prob").exists()


def test_ctrl_c_leaves_complete_lines(checkpoint, capfd):
    def program():
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores Ctrl-C, and hands that on
        run_main(lambda: evaluation.main(["--resume", checkpoint, "--ngpu", "0", "--engine", "reference", "--adc_range", "full", "--limit",
                                          "40", "--adc_bits", *map(str, range(1, 13)), "--cell_bits", "1", "2", "3"]))

    process = FORK.Process(target=program)
    process.start()
    path, deadline = Path("save/results.jsonl"), time.monotonic() + 60
    while not (path.exists() and path.read_bytes().count(b"\n") >= 2):
        assert process.is_alive() and time.monotonic() < deadline, capfd.readouterr()
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGINT)
    process.join(100)
    out, err = capfd.readouterr()
    assert process.exitcode == 130 and err == "interrupted\n", err
    records = results("save")
    assert 2 <= len(records) < 37 and "accuracy %" not in out
    assert [record["adc_bits"] for record in records[:2]] == [None, 1]
    assert not list(Path().rglob("*.tmp"))


# ---- vgg_cifar_eval.sh -----------------------------------------------------------------------------------------------


@pytest.fixture
def script_flags(tmp_path):
    """script_flags(script, flags...): what a script calls: the program, and the arguments."""
    return lambda name, *flags: _script_flags(tmp_path / "python stub", name, *flags)


def _script_flags(stub, name, *flags):
    stub.write_text('#!/bin/sh\npwd\nprintf "%s\\n" "$@"\n')
    stub.chmod(0o755)
    done = subprocess.run(["bash", str(ROOT / name), *flags], capture_output=True, text=True, check=True,
                          env=os.environ | {"PYTHON": str(stub.resolve())})
    folder, program, *arguments = done.stdout.splitlines()
    assert Path(folder) == ROOT and done.stderr == ""
    return program, arguments


@pytest.fixture
def settings_of_script(script_flags):
    """settings_of_script(flags...): the arguments of the script's call, and what eval.py makes of them."""
    def settings_of_script(*flags):
        program, arguments = script_flags("vgg_cifar_eval.sh", *flags)
        assert program == "eval.py"
        return arguments, eval_settings.parse(arguments)[0]
    return settings_of_script


def test_script_makes_the_whole_table_of_the_network_in_the_box(monkeypatch, settings_of_script):
    monkeypatch.chdir(ROOT)
    _, settings = settings_of_script("--limit", "5")
    assert settings.resume.startswith("pretrained/") and settings.limit == 5
    assert (settings.dataset, settings.data_path) == ("cifar10", "./data")
    assert settings.save_path == "save/vgg7_w4a4_cifar10"  # not beside the network in the box
    planned = {(s.spec.adc_plan, s.spec.adc_idle, s.spec.cell_bits, s.spec.adc_bits) for s in settings.settings if s.spec.planned}
    both = {(1, 3), (1, 2), (1, 1.5), (1, 1), (2, 3), (2, 2)}
    by_ones = {(1, 3), (1, 2), (1, 1.4), (1, 1), (1, 0.75), (1, 0.5), (2, 2), (2, 1)}
    assert planned == {*(("significance", "convert", *each) for each in both), *(("ones", "convert", *each) for each in by_ones),
                       *(("significance", "skip", *each) for each in both | {(1, 1.4), (2, 1)})}
    found = {(s.spec.cell_bits, s.spec.adc_bits, s.spec.adc_range, s.spec.mapping, s.spec.rows, s.crossbar_layers)
             for s in settings.settings if not s.spec.planned}
    assert len(settings.settings) - len(planned) == len(found) == 30
    for cell_bits in (1, 2, 4):
        assert (cell_bits, 6, "dynamic", "tap", 128, "all") in found
        for adc_bits in range(3, 9):
            assert (cell_bits, adc_bits, "calibrated", "tap", 128, "all") in found
    assert {(1, 4, "calibrated", "tap", 128, "conv"), (1, 4, "calibrated", "im2col", 128, "all"),
            (2, 5, "calibrated", "im2col", 256, "all")} < found


def test_flags_given_to_the_script_win(checkpoint, settings_of_script):
    given = ["--cell_bits", "3", "4", "--resume", checkpoint, "--limit", "5", "--engine", "numba"]
    arguments, settings = settings_of_script(*given)
    assert arguments[-len(given):] == given
    assert (settings.resume, settings.limit, settings.engine) == (checkpoint, 5, "numba")
    assert (settings.save_path, settings.dataset) == (str(Path(checkpoint).parent), "digits")  # a network of one's own
    assert [s.spec.cell_bits for s in settings.settings] == [3, 4]  # hardware that is given replaces the table
    assert len(settings_of_script("--resume", checkpoint, "--adc_bits=2")[1].settings) == 1
    assert len(settings_of_script("--resume", checkpoint, "--also", "--adc_bits 2")[1].settings) == 2
    assert len(settings_of_script("--resume", checkpoint)[1].settings) == 52


# ---- all rows --------------------------------------------------------------------------------------------------------


def test_later_rows_are_checked_before_any_work(run, refused, checkpoint):
    refused(["--resume", checkpoint, "--adc_range", "full", "--adc_bits", "4", "12", "--cost", "isaac_32nm"], "12-bit ADC")
    refused(["--resume", checkpoint, "--cell_bits", "2", "--device", "techA", "winbond_asu_1bit"], "has 2 levels")
    run(checkpoint, "--adc_bits", "3")
    refused(["--resume", checkpoint, *FAST, "--adc_bits", "3", "4", "--adc_ranges", "save/adc_ranges.json"], "has no ranges of features.4")


def test_a_report_of_given_ranges_is_of_them(run, checkpoint):
    flags = ["--adc_bits", "3", "5", "--cell_bits", "2", "--limit", "4"]
    run(checkpoint, *flags)
    shutil.copy("save/adc_ranges.json", "own.json")
    run(checkpoint, *flags, "--adc_ranges", "own.json", "--report")
    for bits, entry in zip((3, 5), json.loads(Path("own.json").read_text())["ranges"]):
        [path] = Path("save").glob(f"report_c2_b{bits}_*.json")
        layer = json.loads(path.read_text())["layers"][0]
        assert [each["delta"] for each in layer["slices"]] == [delta for delta, _ in entry["layers"]["features.4"]["ranges"]]


def test_ranges_of_other_hardware_are_other_entries(run, checkpoint):
    run(checkpoint, "--adc_bits", "3", "--weights", "offset", "pair", "--limit", "4")
    run(checkpoint, "--adc_bits", "3", "--per_layer", "features.4:adc_bits=5", "--limit", "4")
    entries = json.loads(Path("save/adc_ranges.json").read_text())["ranges"]
    assert sorted((entry["weights"], "per_layer" in entry) for entry in entries) == [("offset", False), ("offset", True), ("pair", False)]


@pytest.mark.parametrize("flags, config, used", [([], {}, True), (["--planes", "x"], {}, False), ([], {"device": "techA"}, False)])
def test_whose_ranges_a_checkpoint_holds(flags, config, used):
    """Those of ideal cells with its weights."""
    path = save("aware.pth.tar", network(), adc_aware=True, cell_bits=2, adc_bits=3, **config)
    assert (eval_settings.parse(["--resume", path, *flags])[0].trained_for is not None) is used


def test_images_are_found_where_the_training_found_them(checkpoint):
    Path("save/config.json").write_text(json.dumps({"data_path": "there"}))
    assert eval_settings.parse(["--resume", checkpoint])[0].data_path == "there"


@pytest.mark.parametrize("name, value", [("weights", "pair"), ("rows", 64), ("mapping", "im2col"), ("reference", "digital"),
                                         ("dac_bits", 2), ("adc_max_bits", 7)])
def test_rows_say_what_is_unusual(name, value):
    assert f"{name} {value}" in str(Setting(quant.CrossbarSpec(**{name: value})))
