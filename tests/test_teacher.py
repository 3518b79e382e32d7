"""train.py --distill: the loss that asks for the answers of the network that a run starts from."""

import copy

import numpy as np
import pytest
import torch

import models
import train
from experiment.inputs import data as datasets
from experiment.inputs.checkpoint import load_checkpoint, save_checkpoint
from experiment.program.cli import UserError
from experiment.inputs.data import normalize
from experiment.train.teacher import teacher_of
from experiment.train.training import Run
from test_train import SMALL, assert_same, quick, small_network  # noqa: F401

SHARE, SMOOTHING = 0.3, 0.1


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    folder = tmp_path_factory.mktemp("start")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models.vgg.CONFIGS, "vgg7", SMALL)
        quick(folder, "--epochs", "2")
    return folder / "model_best.pth.tar"


def log_softmax(logits):
    logits = logits.detach().double().numpy()
    shifted = logits - logits.max(1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(1, keepdims=True))


def expected_loss(logits, answers, y, smoothing=SMOOTHING):
    """By the formula: labels, of which a share is spread over all classes, and the teacher's answers."""
    found, wanted = log_softmax(logits), np.exp(log_softmax(answers))
    hard = np.full(found.shape, smoothing / found.shape[1])
    hard[np.arange(len(y)), y] += 1 - smoothing
    return -(((1 - SHARE) * hard + SHARE * wanted) * found).sum(1).mean()


@pytest.mark.parametrize("flags", [("--w_bits", "2"), ("--adc_aware", "--adc_bits", "3", "--cell_bits", "2", "--rows", "16")],
                         ids=["other bits", "ADC"])
def test_the_loss_of_a_step(flags, start, tmp_path, monkeypatch):
    """The teacher has the bits that its weights were trained with and no ADC, and stays as it was while the network learns."""
    teacher = models.create("vgg7_quant")
    teacher.load_state_dict(load_checkpoint(start)["state_dict"], strict=False)  # clipping levels of the first layer are not in use
    teacher.eval()
    step, found = Run.train_step, []

    def watched(self, x, y, position):
        twin, inputs = copy.deepcopy(self.net), normalize(x, self.data.mean, self.data.std)
        with torch.no_grad():
            expected = expected_loss(twin(inputs), teacher(inputs), y)
        loss = step(self, x, y, position)
        found.append((loss.item(), expected))
        return loss

    monkeypatch.setattr(Run, "train_step", watched)
    quick(tmp_path, "--fine_tune", str(start), "--distill", str(SHARE), "--label_smoothing", str(SMOOTHING), "--amp", "off",
          "--epochs", "1", *flags)
    assert len(found) == 9
    np.testing.assert_allclose(*np.array(found).T, rtol=1e-5)


def test_a_run_goes_on_with_its_teacher(start, tmp_path, monkeypatch):
    """Even where the file that it was read from is gone: it is in the checkpoint."""
    given = tmp_path / "given.pth.tar"
    given.write_bytes(start.read_bytes())
    flags = "--fine_tune", str(given), "--distill", "1", "--w_bits", "2", "--epochs", "2", "--save_minutes", "0"
    _, whole = quick(tmp_path / "whole", *flags)
    _, plain = quick(tmp_path / "plain", *flags, "--distill", "0")
    assert plain["teacher"] is None
    assert any(not torch.equal(value, plain["state_dict"][key]) for key, value in whole["state_dict"].items())
    save = Run.save

    def save_and_die(self):
        save(self)
        if (self.epoch, self.step) == (1, 4):
            raise KeyboardInterrupt

    monkeypatch.setattr(Run, "save", save_and_die)
    with pytest.raises(KeyboardInterrupt):
        quick(tmp_path / "stopped", *flags)
    monkeypatch.setattr(Run, "save", save)
    given.unlink()
    path = tmp_path / "stopped" / "checkpoint.pth.tar"
    assert train.main(["--resume", str(path), "--ngpu", "0"]) == 0
    assert_same(load_checkpoint(path)["state_dict"], whole["state_dict"])


def test_answers_come_closer_to_the_teachers(tmp_path, monkeypatch):
    """What two bits of weights take away, epochs of answers alone give back in part; no label is seen."""
    monkeypatch.setitem(models.vgg.CONFIGS, "vgg7", ([8, 8, "M", 8, 8, "M", 8, 8, "M"], 16))  # learns fast
    start = tmp_path / "start" / "model_best.pth.tar"
    quick(start.parent, "--epochs", "2")
    _, taught = quick(tmp_path / "taught", "--fine_tune", str(start), "--distill", "1", "--w_bits", "2", "--epochs", "6")
    losses = [row["train_loss"] for row in taught["history"]]
    assert losses[-1] < 0.9 * losses[0]


def test_who_is_the_teacher(start, tmp_path):
    """Of a new run the network that it starts from, even where that had a teacher; of one that goes on its own, which must be there."""
    _, taught = quick(tmp_path / "taught", "--fine_tune", str(start), "--distill", "1", "--w_bits", "2", "--epochs", "1")
    settings = train.parse(["--fine_tune", str(start), "--distill", "1", "--w_bits", "2", "--save_path", str(tmp_path / "new")])[0]
    for goes_on, expected in ((False, taught["state_dict"]), (True, load_checkpoint(start)["state_dict"])):
        teacher = teacher_of(settings, None, taught, goes_on, 10, torch.device("cpu"), "file")
        assert_same(teacher.made_of["state_dict"], expected)
        weights = teacher.network.state_dict()
        assert all(torch.equal(weights[key], value) for key, value in expected.items() if key.endswith("weight"))
    del taught["teacher"]
    with pytest.raises(UserError, match="^file is of a run without --distill$"):
        teacher_of(settings, None, taught, True, 10, torch.device("cpu"), "file")


@pytest.mark.parametrize("teacher, words", [
    ("x", "its 'teacher' is not a network"), ({"config": {}}, "its 'teacher' is not a network"),
    ({"state_dict": {"a": torch.tensor([float("nan")])}}, "a holds nan; it must be"), ({"state_dict": {"a": 7}}, "which is not a tensor")])
def test_a_teacher_that_somebody_edited_is_one_line(teacher, words, start, tmp_path):
    checkpoint = {name: value for name, value in load_checkpoint(start).items() if name != "format"}
    save_checkpoint(tmp_path / "edited.pt", checkpoint | {"teacher": teacher})
    with pytest.raises(UserError, match=words):
        load_checkpoint(tmp_path / "edited.pt")


def test_validation_has_the_loss_of_training(start, tmp_path):
    """So that the epoch is chosen by what was asked for. Only labels are not smoothed there."""
    _, run = quick(tmp_path, "--fine_tune", str(start), "--distill", str(SHARE), "--w_bits", "2", "--amp", "off", "--epochs", "1")
    images = datasets.load("digits", "", lambda _: None)
    _, chosen = datasets.training_split(images.train_y, 0.1, 0, 200)
    networks = []
    for path, bits in ((tmp_path / "checkpoint.pth.tar", 2), (start, 4)):
        networks.append(models.create("vgg7_quant", wbit=bits))
        networks[-1].load_state_dict(load_checkpoint(path)["state_dict"], strict=False)
    with torch.no_grad():
        logits, answers = (net.eval()(normalize(images.train_x[chosen], images.mean, images.std)) for net in networks)
    assert run["history"][0]["val_loss"] == pytest.approx(expected_loss(logits, answers, images.train_y[chosen], smoothing=0), rel=1e-5)
