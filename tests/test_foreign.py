"""Networks of others: found by name, images of any size, the rows of their table, training that goes on. The networks are small, and
made by functions in files, as users bring theirs; what leaves the machine is replaced by what raises as it does without a network."""

import copy
import csv
import importlib
import inspect
import json
import pickle
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image
from test_train import assert_same
from torch import nn

import eval as evaluation
import train
from experiment.sweep import bench, search
from experiment.inputs import data, folders, foreign
from experiment.start import conversion, images
from experiment.settings import conversion_settings, eval_settings
from experiment.report import cost_report
from experiment.measure import keys
from experiment.train import training
from experiment.inputs.checkpoint import load_checkpoint, save_checkpoint
from experiment.program.cli import UserError
from experiment.inputs.streamed import Streamed
from models import quant, vgg
from models.quant import CrossbarSpec
from models.quant.measuring.measure import measure, measure_float
from models.quant.measuring.setting import Setting

pytestmark = pytest.mark.usefixtures("one_thread")

NET = """
import torch
from torch import nn

def small():
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(2),
                         nn.Flatten(), nn.Linear(32, 10))

def three():
    return nn.Sequential(small()[:-1], nn.Linear(32, 3))

def own_transform():
    return small(), lambda image: torch.full((3, 12, 12), float(image.size[0]))

def broken():
    raise KeyError("weights")

def number():
    return 5

def pairs():
    return nn.Sequential(small(), nn.Unflatten(1, (2, 5)))

not_a_function = 3
"""


@pytest.fixture
def net(tmp_path, monkeypatch):
    """The file of the networks; the test works in its folder."""
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text(NET)
    return "net.py"


@pytest.fixture
def photographs(tmp_path):
    """An imagefolder of three classes, two and three images each, no two of one size."""
    random, root = np.random.default_rng(0), tmp_path / "photographs"
    for split, count in (("train", 3), ("test", 2)):
        for label, name in enumerate(("cat", "dog", "emu")):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                size = 20 + 7 * i + label, 26 + 5 * label, 3
                Image.fromarray(random.integers(0, 256, size, dtype=np.uint8)).save(folder / f"{i}.png")
    return root


def by_hand(path, size):
    """The usual transform, written down again: the shorter side to 256/224 of the size, the middle, mean and deviation of ImageNet."""
    image = Image.open(path).convert("RGB")
    shorter = round(size * 256 / 224)
    width, height = image.size
    scaled = (shorter, int(shorter * height / width)) if width <= height else (int(shorter * width / height), shorter)
    pixels = np.asarray(image.resize(scaled, Image.Resampling.BILINEAR), dtype=np.float64) / 255
    top, left = (round((length - size) / 2) for length in pixels.shape[:2])
    pixels = (pixels[top:top + size, left:left + size] - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    return torch.from_numpy(pixels).permute(2, 0, 1).float()


# ---- names -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model, flags, says", [
    ("torchvision/resnet81", {}, "did you mean resnet18"),
    ("net.py:smal", {}, "no function 'smal'; it has small, three, own_transform, broken, number, pairs"),
    ("net.py:not_a_function", {}, "no function 'not_a_function'"),
    ("missing.py:f", {}, "no file missing.py"),
    ("net.py:broken", {}, "fails when it is called without arguments (KeyError: 'weights')"),
    ("net.py:number", {}, "returns int; a torch.nn.Module, (module, transform), or a Task is expected"),
    ("wrong.py:f", {}, "cannot be imported (ZeroDivisionError"),
    ("net.py:own_transform", {"image_size": 20}, "brings its own transform"),
    ("net.py:small", {"state": "other.pt"}, "does not fit the model: missing: 2.weight"),
    ("net.py:small", {"state": "nowhere.pt"}, "nowhere.pt: no such file"),
])
def test_a_network_that_cannot_be_had_is_one_line(net, model, flags, says):
    Path("wrong.py").write_text("1 / 0")
    torch.save(nn.Sequential(nn.Conv2d(3, 8, 3)).state_dict(), "other.pt")
    with pytest.raises(UserError) as error:
        foreign.load(model, **flags)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_without_a_network_or_timm_it_says_what_to_do(monkeypatch):
    from torchvision.models import _api

    def offline(*_, **__):
        raise URLError("Name or service not known")

    monkeypatch.setattr(_api, "load_state_dict_from_url", offline)
    with pytest.raises(UserError, match=r"squeezenet1_1 cannot be had .*Name or service.*--state FILE with the weights of https.*pth"):
        foreign.load("torchvision/squeezenet1_1")
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match="timm/resnet18 needs the package timm: pip install timm"):
        foreign.load("timm/resnet18")


def test_published_weights_come_from_a_file_and_their_transform_with_them(tmp_path):
    from torchvision import models

    source = models.squeezenet1_1(weights=None)
    torch.save(source.state_dict(), tmp_path / "weights.pt")
    found = foreign.load("torchvision/squeezenet1_1", str(tmp_path / "weights.pt"), image_size=64)
    x = torch.rand(1, 3, 64, 64)
    assert torch.equal(found.network(x), source.eval()(x))
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (100, 80, 3), dtype=np.uint8))
    published = models.SqueezeNet1_1_Weights.DEFAULT.transforms
    assert torch.equal(found.transform(picture), published(crop_size=64, resize_size=round(64 * 256 / 224))(picture))
    own_size = foreign.load("torchvision/squeezenet1_1", weights=False).transform
    assert torch.equal(own_size(picture), published()(picture))


def test_weights_from_a_file_see_the_inputs_that_they_were_published_for(tmp_path):
    """Those of GoogLeNet take inputs scaled otherwise, as torchvision does where it loads them itself."""
    from torchvision import models

    source = models.googlenet(weights=None, transform_input=True, init_weights=False)
    torch.save(source.state_dict(), tmp_path / "weights.pt")
    found = foreign.load("torchvision/googlenet", str(tmp_path / "weights.pt")).network
    x = torch.rand(1, 3, 64, 64)
    assert torch.equal(found(x), source.eval()(x))


def test_a_file_may_import_its_neighbours_and_its_classes_can_be_pickled(net):
    Path("sub").mkdir()
    Path("sub/neighbour_of_own.py").write_text("WIDTH = 3")
    Path("sub/own.py").write_text("import neighbour_of_own\nfrom torch import nn\nclass Own(nn.Linear): pass\n"
                                  "def make(): return Own(neighbour_of_own.WIDTH, 2)")
    before = list(sys.path)
    found = foreign.load("sub/own.py:make")
    assert pickle.loads(pickle.dumps(found.network)).in_features == 3 and sys.path == before


def test_what_tells_networks_apart(net):
    small = foreign.identity("net.py:small")
    assert foreign.identity("net.py:three") != small != foreign.identity("torchvision/resnet18") == ["torchvision/resnet18"]
    Path("copy.py").write_bytes(Path("net.py").read_bytes())
    assert foreign.identity("copy.py:small") == small  # it is the same code
    Path("copy.py").write_text(NET + "#")
    assert foreign.identity("copy.py:small") != small


def test_code_that_a_file_imports_from_its_folder_tells_networks_apart(net):
    Path("net.py").write_text("import torch, blocks\ndef small():\n    from parts.deep import act\n    return act()\n")
    Path("blocks.py").write_text("from more import number\n")
    Path("more.py").write_text("number = 1\n")
    Path("parts").mkdir()
    for name in ("__init__", "deep", "other"):
        Path("parts", f"{name}.py").write_text("from . import other\n" if name == "deep" else "")
    Path("unused.py").write_text("")
    seen = [foreign.identity("net.py:small")]
    assert foreign.identity(f"{Path.cwd()}/net.py:small") == seen[0]  # wherever it lies
    for changed in ("blocks.py", "more.py", "parts/other.py"):
        with Path(changed).open("a") as file:
            file.write("# another\n")
        seen.append(foreign.identity("net.py:small"))
        assert seen[-1] not in seen[:-1]
    Path("unused.py").write_text("1 / 0")
    assert foreign.identity("net.py:small") == seen[-1]


@pytest.mark.parametrize("loaded", [False, True])
@pytest.mark.parametrize("marked", [False, True])
def test_a_folder_that_is_no_package_comes_behind_what_is_installed(net, monkeypatch, marked, loaded):
    """As in any program of Python. What the file has found in its folder is not what others find."""
    monkeypatch.delitem(sys.modules, "timeit", raising=False)
    before = importlib.import_module("timeit") if loaded else None
    Path("timeit").mkdir()
    Path("timeit", "own.py").write_text("")
    if marked:
        Path("timeit", "__init__.py").write_text("number = 3")
    Path("own.py").write_text("import torch, timeit\ndef small():\n    return torch.nn.Linear(2, getattr(timeit, 'number', 2))\n")
    assert foreign.load("own.py:small", image_size=16).network.out_features == (3 if marked else 2)
    assert sys.modules.get("timeit") is before or not marked and hasattr(sys.modules["timeit"], "Timer")


@pytest.mark.parametrize("inside", [False, True], ids=["at its head", "in its function"])
def test_a_file_finds_its_neighbours_first(net, inside):
    """Of this project's `models` it sees nothing where its folder has one, and this project sees nothing of that."""
    Path("models").mkdir()
    Path("models", "vgg.py").write_text("import torch\nclass Net(torch.nn.Linear):\n    pass\n")
    Path("blocks.py").write_text("from models.vgg import Net\n")
    imports, indent = "from blocks import Net\n", " " * 4 * inside
    Path("own.py").write_text(inside * "def small():\n" + indent + imports + (not inside) * "def small():\n" + "    return Net(2, 2)\n")
    before = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "models"}
    network = foreign.load("own.py:small", image_size=16).network
    assert type(network).__name__ == "Net" and isinstance(copy.deepcopy(network), type(network))
    assert {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "models"} == before
    assert str(Path.cwd()) not in sys.path
    Path("models", "vgg.py").unlink()
    Path("own.py").write_text("from models.vgg import VGG as small\n")
    assert isinstance(foreign.load("own.py:small", image_size=32).network, vgg.VGG)  # where its folder has none, it is what Python finds


def test_neighbours_are_loaded_once_for_several_networks(net):
    Path("own").mkdir()
    Path("own", "deep.py").write_text("import torch\ndef small():\n    return torch.nn.Linear(2, 2)\n")
    for name in ("a", "b"):
        Path(f"{name}.py").write_text("from own.deep import small\n")
        assert foreign.load(f"{name}.py:small", image_size=16)


def test_names_of_folders():
    assert foreign.short_name("torchvision/resnet18") == "torchvision_resnet18"
    assert foreign.short_name("some/where/net.py:small") == "net_small"


# ---- images ------------------------------------------------------------------------------------------------------------


def test_images_of_any_size_become_inputs_when_they_are_looked_at(net, photographs, monkeypatch):
    found = foreign.load("net.py:three", image_size=16)
    opened, really = [], Image.open
    monkeypatch.setattr(Image, "open", lambda path: opened.append(Path(path).name) or really(path))
    images = data.load("imagefolder", photographs, transform=found.transform)
    part = images.train_x[torch.tensor([7, 0])].split(1)[1]
    assert not opened
    expected = by_hand(photographs / "train" / "cat" / "0.png", 16)
    assert torch.allclose(part.read()[0], expected, atol=0.03)  # 8 bits of a pixel are 0.02 of these units
    assert opened[0] == "0.png" and images.classes == ("cat", "dog", "emu")
    assert images.train_y.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2] and images.test_y.tolist() == [0, 0, 1, 1, 2, 2]
    whole = data.Batches(images.test_x, images.mean, images.std, 4)
    assert [len(batch) for batch in whole] == [4, 2] and torch.equal(torch.cat(list(whole)), images.test_x.read())  # any number of times


def test_pictures_in_memory_go_through_a_transform_too(net):
    found = foreign.load("net.py:own_transform")
    images = data.load("digits", transform=found.transform)
    assert torch.equal(images.test_x[:2].read(), torch.full((2, 3, 12, 12), 32.0))
    assert len(images.train_x) == 1438


def test_pictures_and_their_transform_tell_images_apart():
    pictures = [np.full((4, 4, 3), i, np.uint8) for i in range(20)]
    one = Streamed(pictures, lambda image: torch.zeros(3, 2, 2) + np.asarray(image).mean().item())
    other = Streamed(pictures, lambda image: torch.zeros(3, 2, 2) + 2 * np.asarray(image).mean().item())
    changed = Streamed([*pictures[:9], pictures[0], *pictures[10:]], one.transform)
    assert len({keys.digest(each.identity()) for each in (one, other, changed)}) == 3


def test_networks_of_others_are_calibrated_on_fewer_images():
    flags = ["--model", "torchvision/resnet18"]
    assert [eval_settings.parse([*flags, *more])[0].calib_images for more in ([], ["--calib_images", "9"])] == [64, 9]


@pytest.mark.parametrize("text", ['{"cat": 7, "emu": 2, "dog": 0}', '{"7": ["n1", "cat"], "2": ["n2", "emu"], "0": "dog"}',
                                  "cat 7\n\nemu  2\ndog 0\n"])
def test_a_file_says_which_class_a_folder_holds(net, photographs, text):
    Path("index").write_text(text)
    images = data.load("imagefolder", photographs, transform=foreign.load("net.py:small", image_size=16).transform, class_index="index")
    assert images.test_y.tolist() == [7, 7, 0, 0, 2, 2] and len(images.classes) == 8


@pytest.mark.parametrize("text, says", [("cat seven", "does not name classes"), ("", "does not name classes"), ("cat -1", "from 0 up"),
                                        ("[1]", "does not name classes"), ('{"a":' * 10**5, "does not name classes"),
                                        ("cat 1\ndog 0", "must name one class for the folder"),
                                        ('{"0": ["n1", "cat"], "1": ["n2", "cat"], "2": "dog", "3": "emu"}', "it names none, or several"),
                                        ("cat 1\ncat 2\ndog 3\nemu 4", "train/cat; it names none, or several")])
def test_bad_class_files_are_one_line(net, photographs, text, says):
    Path("index").write_text(text)
    with pytest.raises(UserError, match=says):
        data.load("imagefolder", photographs, transform=lambda image: None, class_index="index")
    with pytest.raises(UserError, match="cannot read nowhere"):
        folders.read_class_index("nowhere")


@pytest.mark.parametrize("transform, says", [
    (lambda image: image, "the transform gives a Image"),
    (lambda image: torch.zeros(3, 2, 2, dtype=torch.uint8), "the transform gives a tensor of torch.uint8"),
    (lambda image: torch.zeros(3, *image.size), "a batch needs one shape"), (lambda image: 1 / 0, "division by zero")])
def test_transforms_that_make_no_batch_are_one_line(photographs, transform, says):
    with pytest.raises(UserError, match=says):
        Streamed(sorted((photographs / "test").rglob("*.png")), transform).read()


# ---- evaluation ----------------------------------------------------------------------------------------------------------


def results(folder):
    return [json.loads(line) for line in Path(folder, "results.jsonl").read_text().splitlines()]


EVAL = ["--ngpu", "0", "--engine", "reference", "--save_path", "out"]


def test_table_of_a_network_of_others(net, photographs, capsys, monkeypatch):
    """Float, quantized, hardware; changes are counted against both. Expected numbers are counted here from the classes of each."""
    seen, measured = [], bench.measure

    def spy(network, images, labels, setting, **options):
        record = measured(network, images, labels, setting, **options)
        seen.append(record.predictions)
        return record

    monkeypatch.setattr(bench, "measure", spy)
    flags = ["--model", "net.py:three", "--image_size", "24", "--data_path", str(photographs), "--w_bits", "3", "--a_bits", "3",
             "--first_last_bits", "4", "--adc_bits", "2", "--rows", "16", "--batch_size", "4"]
    assert evaluation.main([*EVAL, *flags, "--dry_run"]) == 0
    hardware_row = "1-bit cells, 2-bit ADC, calibrated, rows 16"
    assert capsys.readouterr().out.splitlines()[-4:] == [
        "to measure  float", "to measure  quantized", f"to measure  {hardware_row}", "3 points: 3 to measure"]
    assert evaluation.main([*EVAL, *flags]) == 0
    of_float, quantized, hardware = results("out")
    labels = torch.tensor([0, 0, 1, 1, 2, 2])
    inputs = torch.stack([by_hand(path, 24) for path in sorted((photographs / "test").rglob("*.png"))])
    with torch.no_grad():
        classes = [foreign.load("net.py:three").network(inputs).argmax(1), *seen]

    def right(found):
        return pytest.approx(100 * (found == labels).double().mean().item())

    for row, found in zip((of_float, quantized, hardware), classes):
        assert (row["accuracy"], row["float_accuracy"]) == (right(found), right(classes[0]))
        assert row["float_changed_predictions"] == (found != classes[0]).sum()
    assert hardware["software_accuracy"] == right(classes[1])
    assert hardware["changed_predictions"] == (classes[2] != classes[1]).sum()
    assert [row["wbit"] for row in (of_float, quantized, hardware)] == [32, 3, 3] and hardware["adc_bits"] == 2
    assert (quantized["inputs"], quantized["first_last_bits"], quantized["wq"]) == ("phases", 4, "linear")
    out = capsys.readouterr().out
    table = out[out.index("setting  "):].splitlines()
    assert [line.split("  ")[0] for line in table[2:5]] == ["float", "quantized", hardware_row]
    said = [line for line in out.splitlines() if line.startswith(("normalization", "tap: ", "conversion chose: "))]
    assert said[:2] == ["normalization of the images' channels: mean 0.485 0.456 0.406, deviation 0.229 0.224 0.225",
                        "tap: 41 % of the rows in use; im2col would need 9 row blocks in place of 20"]  # 27, 72, 32 rows: 131 of 320
    assert said[2].startswith("conversion chose: bits of weights and inputs 4 and 4 in 2 of 3 layers, 3 and 3 in 1 of 3 layers; inputs "
                              "unsigned in 2 of 3 layers, phases in 1 of 3 layers; ranges of inputs from ") and len(said) == 3
    assert "numbered as the sorted names of the folders" in out
    assert " row blocks, " not in out  # how many there are is said of the settings' own mapping, above
    assert "quantized, worst" not in out and "with ADCs" not in out and "with its ADC" not in out  # it was converted without
    assert evaluation.main([*EVAL, *flags, "--dry_run"]) == 0
    assert capsys.readouterr().out.splitlines()[-4:] == [
        "measured    float", "measured    quantized", f"measured    {hardware_row}", "3 points: all are measured already"]
    assert evaluation.main([*EVAL, *flags]) == 0
    assert len(results("out")) == 3  # all measured already
    assert evaluation.main([*EVAL, *flags, "--inputs", "ternary"]) == 0
    assert [(row["wbit"], row["inputs"]) for row in results("out")[3:]] == [(3, "ternary")] * 2  # the float network is the same
    assert evaluation.main([*EVAL, *flags, "--inputs", "twos"]) == 0
    before, other = len(results("out")), keys.digests() | {"conversion": "of other code"}
    monkeypatch.setattr(keys, "digests", lambda: other)
    assert evaluation.main([*EVAL, *flags]) == 0
    assert [row["wbit"] for row in results("out")[before:]] == [3] * 2  # the float network is not of it


def test_costs_are_beside_the_bits_that_a_layer_has(net, photographs, monkeypatch):
    """First and last layer have others than the setting says."""
    for picture in ("by_layer", "accuracy_over_energy"):
        monkeypatch.setattr(cost_report, picture, lambda *_: None)
    assert evaluation.main([*EVAL, "--model", "net.py:three", "--image_size", "24", "--data_path", str(photographs), "--w_bits", "3",
                            "--a_bits", "3", "--first_last_bits", "4", "--adc_range", "full", "--adc_bits", "4",
                            "--cost", "rram_65nm"]) == 0
    with open("out/cost.csv", newline="") as file:
        found = {line["layer"]: (line["w_bits"], line["a_bits"]) for line in csv.DictReader(file)}
    assert list(found.values()) == [("4", "4"), ("3", "3"), ("4", "4")]


def test_options_of_the_conversion_are_those_of_the_flags(net, photographs, monkeypatch):
    def convert(network, spec, images, **options):
        if "weight_scale" not in options:  # as a draft has
            asked.append(((spec.w_bits, spec.a_bits), options))
        raise ValueError("enough")

    asked = []
    monkeypatch.setattr(quant, "convert", convert)
    flags = [*EVAL, "--model", "net.py:three", "--image_size", "24", "--data_path", str(photographs)]
    own = ["--adc_correct", "none", "--first_last_bits", "6", "--inputs", "twos", "--rounding", "gptq", "--skip", "0.2", "--w_bits", "4"]
    for more in ([], own):
        with pytest.raises(UserError, match="^net.py:three: enough$"):
            evaluation.main([*flags, *more])
    usual = dict(first_last_bits=8, inputs="phases", rounding="nearest", skip=[], correct="channel")
    other = dict(first_last_bits=6, inputs="twos", rounding="gptq", skip=["0.2"], correct="none")
    assert asked == [((8, 8), usual), ((4, 8), other)]


def test_what_cannot_be_is_said_before_the_network_is_converted(net, monkeypatch):
    """A device with too few levels, a layer that is not there: a look at a few images is enough."""
    Path("two.csv").write_text("level,conductance_uS\n0,1\n1,9\n")
    monkeypatch.setattr(conversion, "for_evaluation", lambda *_: pytest.fail("converted"))
    flags = [*EVAL, "--model", "net.py:small", "--dataset", "digits", "--limit", "20", "--cell_bits", "2"]
    for more, words in ((["--device", "two.csv"], "levels"), (["--per_layer", "nothing:adc_bits=3"], "no layer on crossbars is called so")):
        for dry in ([], ["--dry_run"]):
            with pytest.raises(UserError, match=words):
                evaluation.main([*flags, *more, *dry])


def test_images_and_correction_of_the_conversion_whatever_the_ranges(net):
    """They decide the network that is measured where ranges are not calibrated too, or are those of a file."""
    flags = [*EVAL, "--model", "net.py:small", "--dataset", "digits", "--limit", "20", "--a_bits", "3", "--adc_bits", "3"]
    own = ["--calib_images", "8", "--adc_correct", "none"]
    assert evaluation.main([*flags, *own]) == 0
    *_, calibrated = results("out")
    assert evaluation.main([*flags, *own, "--adc_ranges", "out/adc_ranges.json", "--save_path", "again"]) == 0
    *_, restored = results("again")
    assert (restored["accuracy"], restored["changed_predictions"]) == (calibrated["accuracy"], calibrated["changed_predictions"])
    with pytest.raises(UserError, match="no ranges of .* with these weights and input codes"):  # another conversion
        evaluation.main([*flags, "--adc_ranges", "out/adc_ranges.json", "--save_path", "again"])
    ranges = json.loads(Path("out/adc_ranges.json").read_text())
    for layer in ranges["ranges"][0]["layers"].values():
        assert layer["inputs"] == "phases"
        layer["inputs"] = "ternary"  # of the same codes and steps, but not of the same reads
    Path("ternary.json").write_text(json.dumps(ranges))
    with pytest.raises(UserError, match="no ranges of .* with these weights and input codes"):
        evaluation.main([*flags, *own, "--adc_ranges", "ternary.json", "--save_path", "again"])
    assert evaluation.main([*flags, *own, "--adc_range", "full", "--save_path", "again"]) == 0
    with pytest.raises(UserError, match="--adc_calib is for calibrated ranges"):
        evaluation.main([*flags, "--adc_calib", "minmax", "--adc_range", "full", "--save_path", "again"])


def test_the_batch_size_decides_nothing(net, monkeypatch):
    """Scales are fitted to samples of what a layer sees at a time, which is more than a sample here."""
    monkeypatch.setattr(quant.conversion.tracing, "SAMPLE", 2**10)
    flags = [*EVAL, "--model", "net.py:small", "--dataset", "digits", "--limit", "20", "--a_bits", "4", "--adc_bits", "3"]
    assert evaluation.main(flags) == 0
    first = results("out")
    assert evaluation.main([*flags, "--batch_size", "7"]) == 0 and results("out") == first


def test_an_edited_file_is_measured_anew(net, photographs):
    flags = [*EVAL, "--model", "net.py:three", "--image_size", "24", "--data_path", str(photographs), "--adc_bits", "5", "6",
             "--per_layer", "*:adc_range=ideal"]
    assert evaluation.main(flags) == 0
    first = results("out")
    assert evaluation.main(flags) == 0 and len(results("out")) == len(first)
    Path("net.py").write_text(Path("net.py").read_text() + "\n# as if another forward were there\n")
    assert evaluation.main(flags) == 0
    assert len(results("out")) == 2 * len(first) and not Path("out", "accuracy_over_adc_bits.png").exists()


READS = """
import json, torch
from torch import nn
from torch.nn import functional as F

def shift():
    return json.load(open("shift.json"))

class Rolls(nn.Module):
    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(1)
        self.conv, self.last, self.kind = nn.Conv2d(3, 4, 4, stride=4), nn.Linear(4 * 64, 10), kind
        if kind == "attribute":
            self.shift = shift()
        elif kind == "buffer":
            self.register_buffer("shift", torch.tensor(shift()), persistent=False)

    def forward(self, x):
        how = shift() if self.kind == "hidden" else int(self.shift)
        return self.last(F.relu(self.conv(x)).roll(how, 2).flatten(1))

def attribute(): return Rolls("attribute")
def buffer(): return Rolls("buffer")
def hidden(): return Rolls("hidden")
"""
DIGITS = [*EVAL[:-1], "shared", "--dataset", "digits", "--limit", "40", "--calib_images", "16", "--a_bits", "4", "--adc_bits", "3"]


def accuracies(folder, *flags):
    assert evaluation.main([*DIGITS, *flags, "--save_path", folder]) == 0
    return [row["accuracy"] for row in results(folder)]


@pytest.mark.parametrize("kind, named", [("attribute", 0), ("buffer", 0), ("hidden", 3)])
def test_a_network_with_another_number_that_no_state_holds_is_measured_anew(net, kind, named, capsys):
    """What the key does not say, as code reads it whenever it likes, the answers to the first images do: such points are named."""
    Path("reads.py").write_text(READS)
    flags = ["--model", f"reads.py:{kind}"]
    Path("shift.json").write_text("0")
    first = accuracies("shared", *flags)
    Path("shift.json").write_text("3")
    fresh = accuracies("fresh", *flags)
    assert first != fresh and "is not used" not in capsys.readouterr().out
    assert accuracies("shared", *flags) == first + fresh
    assert capsys.readouterr().out.count("is not used: the network that was measured has the same key") == named
    assert accuracies("shared", *flags) == first + fresh  # all are measured already


def test_the_key_of_a_converted_network_is_that_of_what_it_was_made_of(net, monkeypatch):
    """The float network, the options and the images that it was converted with; not what that found, to the last bits of a machine."""
    flags = ["--model", "net.py:small"]
    accuracies("out", *flags)
    made = conversion.for_evaluation

    def elsewhere(*args):
        found = made(*args)
        for _, layer in quant.crossbar_layers(found):
            layer.weight_quant.scale.mul_(1 + 2**-22)
            layer.quant_gain.mul_(1 - 2**-22)
        return found

    monkeypatch.setattr(conversion, "for_evaluation", elsewhere)
    assert len(accuracies("out", *flags)) == 3
    for number, other in enumerate((["--calib_images", "15"], ["--adc_correct", "none"], ["--skip", "2"], ["--w_bits", "7"]), start=1):
        assert len(accuracies("out", *flags, *other)) == 3 + 2 * number, other  # the float network is the same


ODD = """
import torch
from torch import nn
from torch.nn import functional as F

class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.conv, self.last, self.names = nn.Conv2d(3, 4, 4, stride=4), nn.Linear(4 * 64, 10), {"a", "b", "c"}
        self.register_buffer("turned", torch.eye(10).flip(0).to_sparse())
        self.bfloat16()

    def get_extra_state(self):
        return {"names": self.names}

    def set_extra_state(self, state):
        self.names = state["names"]

    def forward(self, x):
        x = F.relu(self.conv(torch._neg_view(x.bfloat16())))
        return torch.sparse.mm(self.turned.float(), self.last(x.flatten(1)).float().t()).t()

def odd(): return Odd()
"""


def test_a_network_of_16_bits_with_a_sparse_buffer_and_a_set_in_its_state(net):
    Path("odd.py").write_text(ODD)
    assert len(accuracies("out", "--model", "odd.py:odd")) == 3
    assert len(accuracies("out", "--model", "odd.py:odd")) == 3  # all measured already


@pytest.mark.parametrize("flags, says", [
    (["--model", "net.py:small", "--image_size", "24"], "has 10 classes, the images of imagefolder have 3: say which ones"),
    (["--model", "net.py:three", "--dataset", "digits"], "net.py:three has 3 classes, the images of digits have 10$"),
    (["--model", "net.py:three", "--a_bits", "32"], "--a_bits 32: a converted network has 1 to 8 bits"),
    (["--model", "net.py:pairs", "--image_size", "24"], r"gives \[1, 2, 5\] for one image"),
    (["--model", "net.py:three", "--image_size", "4"], r"does not take inputs \[1, 3, 4, 4\]"),
    (["--model", "net.py:three", "--wq", "sawb"], "--wq is for the networks of this project"),
    (["--model", "net.py:three", "--w_bits", "1"], "--w_bits 1: a converted network has 2 to 8 bits"),
    (["--model", "net.py:three", "--also", "--crossbar_layers conv"], "name the layers that stay digital by --skip"),
    (["--model", "net.py:three", "--dataset", "digits", "--class_index", "x"], "--class_index names the classes of folders"),
    (["--resume", "pretrained/vgg7_w4a4_cifar10.pt", "--skip", "a"], "--skip is for your own network"),
])
def test_what_does_not_go_together_is_one_line(net, photographs, flags, says, monkeypatch):
    flags = [str(Path(__file__).parents[1] / flag) if flag.startswith("pretrained") else flag for flag in flags]
    with pytest.raises(UserError, match=says):
        evaluation.main([*EVAL, "--data_path", str(photographs), *flags])


def test_a_tenth_of_the_training_images_chooses_and_calibrates_nothing():
    """Of a network that was not trained here; the others calibrate in the order that they always do."""
    pictures = torch.arange(45, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 2, 2)
    labels, names = torch.arange(45), tuple(map(str, range(45)))
    found = data.Dataset("digits", pictures, labels, pictures[:7], labels[:7], names, *data.AS_THEY_ARE)

    def numbers(batches):
        return [int(x) for x in batches.images[:, 0, 0, 0]]

    for calib_images in (12, 60):
        settings = eval_settings.EvalSettings(calib_images=calib_images, validation=True)
        chosen, usual = (images.choose(found, each, {}, torch.device("cpu")) for each in (settings, replace(settings, validation=False)))
        assert numbers(chosen.batches) == chosen.labels.tolist() and chosen.of_all == 4 and chosen.kind == "validation images"
        assert numbers(usual.batches) == [*range(7)] and usual.kind == "test images"
        assert numbers(chosen.calibration) == numbers(usual.calibration)[:41]
    assert sorted(numbers(chosen.batches) + numbers(chosen.calibration)) == [*range(45)]


@pytest.mark.parametrize("val, chosen_on", [(True, 3), (False, 1)])
def test_a_search_of_a_network_of_others(net, photographs, monkeypatch, val, chosen_on):
    """On the images of val/, or a tenth of nine training images; the front on the test images."""
    drawn = []
    monkeypatch.setattr(search, "save", lambda figure, *_, **__: drawn.append(figure.get_suptitle()))
    if val:
        shutil.copytree(photographs / "test", photographs / "val", ignore=shutil.ignore_patterns("1.png"))
    flags = [*EVAL, "--model", "net.py:three", "--image_size", "24", "--data_path", str(photographs), "--adc_bits", "2", "3"]
    assert evaluation.main([*flags, "--search", "2"]) == 0
    rows = [row for row in results("out") if row["adc_bits"]]
    assert [row["n_images"] for row in rows if row["validation"]] == [chosen_on] * 2
    assert {row["n_images"] for row in rows if not row["validation"]} == {6} and drawn == ["net.py:three: 2 settings"]
    if not val:
        assert evaluation.main([*flags, "--validation"]) == 0
        assert [row for row in results("out") if row["adc_bits"]] == rows  # measured already


class Fixed(nn.Module):
    """Gives the logits that it is made with, whatever the images."""

    def __init__(self, classes):
        super().__init__()
        self.logits = nn.functional.one_hot(torch.tensor(classes), 4).float()

    def forward(self, x):
        return self.logits[:len(x)]


def test_changes_against_the_float_network_are_counted():
    labels, images = torch.tensor([0, 1, 2, 3, 0]), torch.zeros(5, 1)
    of_float = measure_float(Fixed([0, 1, 2, 2, 1]), images, labels)
    assert (of_float.accuracy, of_float.float_accuracy, of_float.float_changes, str(of_float)) == (60, 60, 0, "float")
    quantized = measure(Fixed([0, 1, 1, 3, 1]), images, labels, None, original=of_float)
    assert (quantized.accuracy, quantized.float_accuracy, quantized.float_changes, str(quantized)) == (60, 60, 2, "quantized")
    assert (quantized.changed_predictions, quantized.is_float) == (0, False)
    assert str(measure(Fixed([0] * 5), images, labels, None)) == "software"


# ---- training ------------------------------------------------------------------------------------------------------------


class Crash(Exception):
    pass


def test_training_goes_on_from_a_converted_network(net, monkeypatch, capsys):
    """A run that crashes after its first epoch and goes on ends with the bits of one that did not; eval.py measures what it did."""
    flags = ["--model", "net.py:small", "--qat", "--w_bits", "3", "--a_bits", "3", "--limit_train", "64", "--epochs", "2", "--lr", "0.02",
             "--skip", "0", "--ngpu", "0", "--distill", "0.5"]
    assert train.main([*flags, "--save_path", "run"]) == 0
    end_epoch = training.Run.end_epoch

    def crash(run):
        end_epoch(run)
        raise Crash

    with monkeypatch.context() as patch, pytest.raises(Crash):
        patch.setattr(training.Run, "end_epoch", crash)
        train.main([*flags, "--save_path", "crashed"])
    assert train.main(["--model", "net.py:small", "--ngpu", "0", "--resume", "crashed/checkpoint.pth.tar"]) == 0
    best, other = (load_checkpoint(f"{folder}/model_best.pth.tar") for folder in ("run", "crashed"))
    assert best["epoch"] == other["epoch"] and best["state_dict"].keys() == other["state_dict"].keys()
    assert all(torch.equal(value, other["state_dict"][key]) for key, value in best["state_dict"].items())
    assert (best["config"]["model"], best["config"]["skip"]) == ("net.py:small", ["0"]) and "state" not in best["config"]
    before = foreign.load("net.py:small").network[2].weight
    [weight] = [value for value in best["state_dict"].values() if value.shape == before.shape]
    assert not torch.equal(weight, before)

    with pytest.raises(UserError, match="is of net.py:small, whose code is run only if you name it: add --model net.py:small"):
        evaluation.main(["--resume", "run/model_best.pth.tar"])
    capsys.readouterr()
    for flag, trained, other in (("w_bits", "3", "4"), ("inputs", "phases", "twos"), ("rounding", "nearest", "gptq")):
        with pytest.raises(UserError, match=f"was trained with --{flag} {trained}, not {other}"):
            evaluation.main(["--resume", "run/model_best.pth.tar", "--model", "net.py:small", f"--{flag}", other])
    with pytest.raises(UserError, match="run/model_best.pth.tar has weights, and --state other.pt has others: give one of them"):
        evaluation.main(["--resume", "run/model_best.pth.tar", "--model", "net.py:small", "--state", "other.pt"])
    config = json.loads(Path("run/config.json").read_text())
    Path("run/config.json").write_text(json.dumps(config | {"class_index": "of the run"}))
    found, _ = eval_settings.parse(["--resume", "run/model_best.pth.tar", "--model", "net.py:small"])
    assert found.class_index == "of the run"  # where its images are, and which classes their folders hold, it need not be told again
    Path("run/config.json").write_text("[" * 10**5)
    assert eval_settings.parse(["--resume", "run/model_best.pth.tar", "--model", "net.py:small"])[0].class_index is None
    Path("run/config.json").write_text(json.dumps(config))
    evaluation.main([*EVAL, "--resume", "run/model_best.pth.tar", "--model", "net.py:small", "--adc_range", "ideal"])
    software, ideal = results("out")
    said = capsys.readouterr().out
    assert "weights on crossbars: " in said and "SQNR" not in said  # there is no float network
    measured = load_checkpoint("run/checkpoint.pth.tar")["test_acc"]
    assert software["accuracy"] == pytest.approx(measured) == ideal["accuracy"]
    assert software["float_accuracy"] is None and software["wbit"] == 3


ARRAYS = """

class Both(nn.Module):
    def __init__(self):
        super().__init__()
        self.sign = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return torch.cat([x.relu(), self.sign * x.relu()], 1)

def normed():
    return nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.GELU(), nn.Conv2d(8, 4, 3, stride=2), Both(),
                         nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 10))
"""
THROUGH = ["--adc_aware", "--w_bits", "3", "--a_bits", "3", "--cell_bits", "2", "--adc_bits", "3", "--rows", "16", "--limit_train", "70",
           "--limit_test", "100", "--epochs", "2", "--batch_size", "21", "--lr", "0.02", "--ngpu", "0"]


@pytest.fixture
def normed(net):
    """A network with batch norm whose weights are others at each call, and a file with weights: with them the inputs of layer 7 have
    both signs, and a phase has a digit less than inputs of one sign."""
    Path(net).write_text(NET + ARRAYS)
    torch.manual_seed(3)
    state = foreign.load("net.py:normed").network.state_dict()
    state["4.sign"] *= -1
    torch.save(state, "normed.pt")
    return ["--model", "net.py:normed"]


def stopped_behind(steps, folder, flags, monkeypatch):
    """Train until the checkpoint behind each of these (epochs, steps of the next one), as if killed there, and go on."""
    save, model = training.Run.save, flags[:2]
    for position in steps:
        def save_and_die(run, position=position):
            save(run)
            if (run.epoch, run.step) == position:
                raise Crash

        with monkeypatch.context() as patch, pytest.raises(Crash):
            patch.setattr(training.Run, "save", save_and_die)
            train.main(["--resume", f"{folder}/checkpoint.pth.tar", "--ngpu", "0", *model] if Path(folder).exists() else
                       [*flags, "--save_path", folder])
    assert train.main(["--resume", f"{folder}/checkpoint.pth.tar", "--ngpu", "0", *model]) == 0
    return load_checkpoint(f"{folder}/checkpoint.pth.tar")


@pytest.mark.parametrize("more", [
    ["--adc_plan", "ones", "--learn_scales", "--clip_share", "0.02", "--weight_clip", "1.5"],
    ["--device", "techA", "--device_time", "1h", "--chip_steps", "2", "--read_noise", "0.3", "--distill", "0.5"]])
def test_a_training_through_arrays_goes_on_to_the_same_bits(more, normed, monkeypatch):
    flags = [*normed, "--state", "normed.pt", *THROUGH, "--calib_steps", "2", "--save_minutes", "0", *more]
    assert train.main([*flags, "--save_path", "whole"]) == 0
    whole = load_checkpoint("whole/checkpoint.pth.tar")
    found = stopped_behind([(0, 1), (1, 2)], "stopped", flags, monkeypatch)
    for name in ("commands", "seconds", "machine"):
        whole.pop(name), found.pop(name)
    assert_same(found, whole)
    assert any(key.endswith("adc_delta") and bool(value.all()) for key, value in found["state_dict"].items())
    before = torch.load("normed.pt")["3.weight"]
    assert not torch.equal(found["state_dict"]["3.weight"], before)


def test_eval_measures_what_training_through_arrays_did(normed, capsys):
    """On the ranges of the checkpoint, and, as they stand beside its weights, without them."""
    assert train.main([*normed, "--state", "normed.pt", *THROUGH, "--learn_scales", "--save_path", "run"]) == 0
    capsys.readouterr()
    hardware = ["--cell_bits", "2", "--adc_bits", "3", "4", "--rows", "16"]
    assert evaluation.main([*EVAL, *normed, "--resume", "run/model_best.pth.tar", "--limit", "100", *hardware]) == 0
    _, trained, other = results("out")
    assert trained["accuracy"] == pytest.approx(load_checkpoint("run/checkpoint.pth.tar")["test_acc"])
    assert trained["adc_bits"] == 3 and other["adc_bits"] == 4
    said = capsys.readouterr().out
    assert "trained through the ADC of --cell_bits 2, --adc_bits 3" in said


@pytest.mark.parametrize("more", [{}, {"weight_clip": 1.5}, {"learn_scales": True}])
def test_a_run_through_arrays_is_the_loop_in_python(more, normed, monkeypatch):
    """The steps of train.py, written down again with `convert(..., train="adc")`: weights, and ranges of the last calibration."""
    seen, step = [], training.Run.train_step
    monkeypatch.setattr(training.Run, "train_step", lambda run, x, y, at: (seen.append((x.clone(), y.clone())), step(run, x, y, at))[1])
    monkeypatch.setattr(conversion, "CALIBRATION_IMAGES", 32)
    monkeypatch.setattr(training, "CALIBRATION_IMAGES", 32)
    given = [part for name, value in more.items() for part in [f"--{name}", *([] if value is True else [str(value)])]]
    train.main([*normed, "--state", "normed.pt", *THROUGH, *given, "--epochs", "1", "--val_split", "0", "--momentum", "0", "--wd", "0",
                "--schedule_type", "step", "--schedule", "9", "--gammas", "1", "--calib_steps", "2", "--save_path", "run"])
    images = data.load("digits")
    inputs = [data.normalize(x, images.mean, images.std) for x, _ in seen]
    chosen, _ = data.training_split(images.train_y, 0, 0, 70)
    few = [data.normalize(some[data.evenly(len(some), 32)], images.mean, images.std) for some in (images.train_x, images.train_x[chosen])]
    model = foreign.load("net.py:normed", "normed.pt").network
    through = quant.Training("adc", learn_scales=more.get("learn_scales", False))
    q = quant.convert(model, CrossbarSpec(3, 3, cell_bits=2, adc_bits=3, rows=16), few[0].split(21), train=through)
    assert len(seen) == 3

    @torch.no_grad()
    def clip():
        for weight in (q[0].weight, q[3].weight, q[7].weight) if "weight_clip" in more else ():
            most = 1.5 * weight.std(correction=0)
            weight.clamp_(-most, most)

    clip()
    for number, (x, (_, y)) in enumerate(zip(inputs, seen)):
        if number % 2 == 0:
            quant.recalibrate(q, few[1])
        nn.functional.cross_entropy(q(x), y).backward()
        with torch.no_grad():
            for parameter in q.parameters():
                parameter -= 0.02 * parameter.grad
                parameter.grad = None
        clip()
    quant.recalibrate(q.eval(), few[1])
    found = load_checkpoint("run/model_best.pth.tar")["state_dict"]
    for key, value in q.state_dict().items():
        assert torch.allclose(found[key].double(), value.double(), rtol=1e-4, atol=1e-6), key


def test_learned_scales_have_no_weight_decay_and_stand_in_tensorboard(normed):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    flags = [*normed, "--state", "normed.pt", *THROUGH, "--epochs", "1", "--save_path"]
    groups = []
    build = training.build_optimizer
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "build_optimizer", lambda *args: groups.append(build(*args)) or groups[-1])
        train.main([*flags, "run", "--learn_scales", "--wd", "0.1"])
        train.main([*flags, "other"])
    weights, scales = groups[0].param_groups
    assert (weights["weight_decay"], scales["weight_decay"]) == (0.1, 0.0) and scales["lr"] == weights["lr"]
    assert [scale.numel() for scale in scales["params"]] == [1, 8, 1, 4, 1, 10] and len(weights["params"]) == 9
    assert len(groups[1].param_groups) == 1 and len(groups[1].param_groups[0]["params"]) == 9
    tags = EventAccumulator("run").Reload().Tags()
    assert {"scale/0/act", "scale/3/weight", "val/loss"} <= {*tags["scalars"]}
    assert {"weight/7.crossbar", "activation/7.crossbar"} <= {*tags["histograms"]}
    tags = EventAccumulator("other").Reload().Tags()["scalars"]
    assert not any(tag.startswith("scale/") for tag in tags)
    one, other = (load_checkpoint(f"{run}/model_best.pth.tar")["state_dict"]["3.crossbar.act_quant.scale"] for run in ("run", "other"))
    assert not torch.equal(one, other)


def test_chips_and_arrays_start_from_a_training_through_quantizers(normed, monkeypatch):
    """--fine_tune has the weights, the scales and the bits of the checkpoint, and refuses others."""
    bits = ["--w_bits", "3", "--a_bits", "5", "--skip", "7", "--epochs", "1", "--limit_train", "40", "--ngpu", "0"]
    assert train.main([*normed, "--state", "normed.pt", *bits, "--qat", "--save_path", "first"]) == 0
    first = load_checkpoint("first/model_best.pth.tar")["state_dict"]
    started = []
    monkeypatch.setattr(training.Run, "fit", lambda run: started.append(run) or 0)
    more = ["--fine_tune", "first/model_best.pth.tar", "--adc_aware", "--adc_bits", "3", "--ngpu", "0", "--limit_train", "40"]
    assert train.main([*normed, *more, "--save_path", "second"]) == 0
    [run] = started
    assert (run.settings.w_bits, run.settings.a_bits, run.settings.skip, run.settings.spec.adc_bits) == (3, 5, ["7"], 3)
    state = run.net.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in first.items())
    assert all(layer.through == "adc" and layer.spec.adc_bits == 3 for _, layer in quant.crossbar_layers(run.net))
    for flags, says in ((["--w_bits", "4"], "was trained with --w_bits 3, not 4"), (["--inputs", "twos"], "trained with --inputs phases"),
                        (["--state", "normed.pt"], "has weights, and --state normed.pt has others"),
                        (["--distill", "1"], "--distill learns from the float network, and --fine_tune starts from weights")):
        with pytest.raises(UserError, match=says):
            train.main([*normed, *more, *flags, "--save_path", "third"])
    save_checkpoint("vgg.pt", {"state_dict": {}, "config": {"model": "vgg7_quant"}})
    with pytest.raises(UserError, match="vgg.pt is of the model vgg7_quant, not net.py:normed"):
        train.main([*normed, *more, "--fine_tune", "vgg.pt", "--save_path", "third"])


def test_hardware_that_layers_cannot_have_is_one_line(normed):
    with pytest.raises(UserError, match="^inputs 'twos' needs dac_bits 1, because"):
        train.main([*normed, *THROUGH, "--inputs", "twos", "--dac_bits", "2", "--save_path", "run"])
    assert not Path("run/checkpoint.pth.tar").exists()


@pytest.mark.parametrize("flags, says", [
    (["--model", "net.py:small"], "^--model net.py:small is converted: add --adc_aware to train it through its arrays, or --qat to "),
    (["--qat"], "--qat trains a converted network"),
    *((["--model", "net.py:small", *flags.split()], f"^{named} is for the networks of this project, and net.py:small is converted: leave "
       "it out$") for flags, named in (("--qat --clp", "--clp"), ("--adc_aware --alpha_lr 0.1", "--alpha_lr"),
                                    ("--adc_aware --crossbar_layers conv", "--crossbar_layers"))),
    *((["--model", "net.py:small", *flags.split()], f"^{named} is for training through the ADC: add --adc_aware$") for flags, named in (
        ("--qat --adc_bits 3", "--adc_bits"), ("--calib_steps 5", "--calib_steps"), ("--qat --device techA --adc_bits 3", "--device"))),
    (["--learn_scales"], "--learn_scales is for your own network"),
    (["--model", "net.py:small", "--qat", "--clip_share", "0.1"], "--clip_share is for scales that are trained: add --learn_scales"),
    (["--model", "net.py:small", "--qat", "--learn_scales", "--scale_decay", "1"], "scales that are trained: add --clip_share"),
    (["--inputs", "twos"], "--inputs is for your own network"),
    (["--model", "net.py:small", "--qat", "--evaluate", "--resume", "own.pt"], "--evaluate is for the networks of this project")])
def test_training_refuses_what_does_not_go_together(net, flags, says):
    save_checkpoint("own.pt", {"state_dict": {}, "config": {"model": "net.py:small", "qat": True}})
    with pytest.raises(UserError, match=says):
        train.main(flags)


def test_flags_are_the_options_of_convert():
    """One default and one set of words: those of `convert`."""
    options = inspect.signature(quant.convert).parameters
    defaults = {field.name: field.default for field in conversion_settings.Conversion.__dataclass_fields__.values()}
    for name in ("first_last_bits", "inputs", "rounding"):
        assert options[name].default == defaults[name]
    network, x = nn.Sequential(nn.Linear(4, 3)), torch.randn(8, 4)
    spec = CrossbarSpec(4, 4, adc_range="ideal")
    for name in ("inputs", "rounding"):
        for word in conversion_settings.Conversion.__dataclass_fields__[name].metadata["kind"]:
            assert quant.convert(network, spec, x, **{name: word})(x).shape == (8, 3)
    assert Setting(spec).spec.w_bits == 4


def test_older_states_without_counters_of_batch_norm(tmp_path, monkeypatch):
    """PyTorch loads them, and so they are loaded here; what else is missing is not."""
    monkeypatch.chdir(tmp_path)
    Path("normed.py").write_text("from torch import nn\n\n\ndef net():\n    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))\n")
    state = foreign.load("normed.py:net", weights=False).network.state_dict()
    state["1.running_mean"] += 3
    del state["1.num_batches_tracked"]
    torch.save(state, "old.pt")
    assert torch.equal(foreign.load("normed.py:net", "old.pt").network[1].running_mean, state["1.running_mean"])
    del state["1.bias"]
    torch.save(state, "old.pt")
    with pytest.raises(UserError, match="old.pt does not fit the model: missing: 1.bias"):
        foreign.load("normed.py:net", "old.pt")
