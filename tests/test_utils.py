"""utils.py: the door for scripts of one's own in a checkout."""

import re
from pathlib import Path

import pytest
import torch
from test_eval import SMALL, checkpoint, classes, network, run, save, shown_images  # noqa: F401

import utils
from experiment.program.cli import UserError
from models import quant, vgg
from models.quant import CrossbarSpec, Setting, measure

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setitem(vgg.CONFIGS, "vgg7", SMALL["vgg7"])


def test_what_they_give_is_what_eval_measures(run, checkpoint):  # noqa: F811
    rows, predictions, _ = run(checkpoint, "--adc_bits", "3")
    net = utils.load_network(checkpoint)
    images, labels = utils.load_images("digits", limit=40, network=net)
    wanted, their_labels = shown_images(40)
    assert torch.equal(images, wanted) and torch.equal(labels, their_labels)
    software = 100 * (classes(network(), wanted) == labels).float().mean().item()
    assert utils.accuracy(net, images, labels) == pytest.approx(software) == rows[0]["accuracy"]
    assert utils.accuracy(net, list(images.split(7)), labels) == rows[0]["accuracy"]
    calibration, _ = utils.load_images("digits", split="calibration", network=net)
    record = measure(net, images, labels, Setting(CrossbarSpec(adc_bits=3, rows=16)), calibration=calibration[:20])
    assert torch.equal(record.predictions, predictions[1])
    assert utils.accuracy(net, images, labels) == record.accuracy  # as the network stands


def test_images_are_scaled_as_in_the_training_of_the_network(tmp_path):
    classes = [str(digit) for digit in range(10)]
    trained_on = {"data": {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "classes": classes, "train_images": 1438}}
    net = utils.load_network(save(tmp_path / "net.pth.tar", network(), trained_on))
    images, _ = utils.load_images("digits", limit=12, network=net)
    assert torch.equal(images, shown_images(12, (trained_on["data"]["mean"], trained_on["data"]["std"]))[0])
    net.trained_on["classes"][3] = "three"
    with pytest.raises(UserError, match="this network was trained on other classes: the images have 3 instead of three"):
        utils.load_images("digits", network=net)
    assert len(utils.load_images("digits", split="training")[0]) == 1438 and len(utils.load_images("digits", split="calibration")[1]) == 256
    with pytest.raises(ValueError, match="split is 'valid'; allowed are test, training, calibration"):
        utils.load_images("digits", split="valid")


def test_what_a_checkpoint_does_not_say_is_given_as_flags(tmp_path):
    path = tmp_path / "original.pth.tar"
    torch.save({"state_dict": network().state_dict()}, path)
    assert not utils.load_network(path, dataset="digits", quantize_image=False, model=None).features[0].quantize_image
    net = utils.load_network(path, model="vgg7_quant_eval", dataset="digits", quantize_image=True)
    assert net.features[0].quantize_image and {layer.spec.adc_range for _, layer in quant.crossbar_layers(net)} == {"ideal"}


def test_the_example_of_the_documents(checkpoint, monkeypatch, capsys):  # noqa: F811
    text = Path(utils.__file__).with_name("docs").joinpath("python.md").read_text()
    code, without = (re.search(rf"```python\n({begin}.*?)```", text, re.DOTALL)[1] for begin in (
        "from models.quant import CrossbarSpec, Setting", "import torch\nfrom models.quant import without_adc"))
    monkeypatch.setattr(utils, "load_images", lambda *args, real=utils.load_images, **more: [each[:20] for each in real(*args, **more)])
    names: dict = {}
    exec(code.replace("save/quickstart/model_best.pth.tar", checkpoint), names)
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()] == ["software", *(
        f"2-bit cells, {bits}-bit ADC, calibrated" for bits in (2, 3, 4))]
    exec(without, names)
    assert not torch.equal(names["outputs"], names["software"]) and torch.equal(names["network"](names["batch"]), names["outputs"])
