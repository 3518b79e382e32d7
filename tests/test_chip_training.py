"""train.py --adc_aware --device: which chips training and validation see, and that a run goes on to the same bits."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from test_train import FLAGS, assert_same, few_test_images, quick, small_network, stored_settings, trained  # noqa: F401
from torch import nn

import eval as evaluation
import train
from experiment.inputs import data as datasets
from experiment.train import batch_norms, training
from experiment.start import starting
from experiment.inputs.checkpoint import load_checkpoint
from experiment.program.cli import run_main
from experiment.train.meter import evaluate
from experiment.train.training import Run
from models import quant
from models.quant import CrossbarSpec, Device, Qconv2dDoreFa, QLinearDoreFa

ON_CHIPS = ["--adc_aware", "--cell_bits", "2", "--adc_bits", "4", "--rows", "32", "--limit_train", "70", "--epochs", "2",
            "--device", "rram_wan", "--device_time", "1d"]


pytestmark = pytest.mark.usefixtures("few_test_images")


@pytest.fixture
def start(trained):
    """A trained network to start from."""
    return str(trained())


def test_each_step_has_a_chip_and_epochs_are_measured_on_one_that_training_does_not_see(start, tmp_path, monkeypatch):
    seeds, program = [], quant.program
    monkeypatch.setattr(quant.measuring.chips, "program", lambda model, device, seed, *args, **more: (
        seeds.append(seed), program(model, device, seed, *args, **more)))
    _, checkpoint = quick(tmp_path / "a", "--fine_tune", start, *ON_CHIPS, "--chip_steps", "2", "--chip_seed", "7")
    steps = datasets.steps_per_epoch(checkpoint["data"]["train_images"], 20)
    assert steps == 3
    assert seeds == [8, 8, 8, 9, 7, 9, 10, 10, 7, 7]  # a trial; three steps and a validation, twice; the test images
    config = checkpoint["config"]
    assert (config["device"], config["device_time"], config["chip_steps"], config["chip_seed"]) == ("rram_wan", 86400.0, 2, 7)

    # Those ranges and that correction are kept which belong to the chip of the validation.
    settings = stored_settings(checkpoint)
    net = starting.build_network(settings, 10, torch.device("cpu"))
    net.load_state_dict(checkpoint["state_dict"])
    run = Run(settings, net.eval(), datasets.load("digits"), torch.device("cpu"), None)
    training.program(net, settings)
    run.calibrate()
    for key, value in net.state_dict().items():
        assert torch.equal(value, checkpoint["state_dict"][key]), key


@pytest.mark.parametrize("more", [["--adc_noise", "1e7"], ["--device", "wide.csv"]])
def test_chips_that_cannot_be_leave_the_folder_as_it_was(more, start, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("wide.csv").write_text("level,conductance_uS,std_uS\n" + "".join(f"{i},{1 + i / 1000},9\n" for i in range(4)))
    folder = tmp_path / "old"
    quick(folder, "--epochs", "1")
    before = {path.name: path.read_bytes() for path in folder.glob("*") if path.name != "train.log"}
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        run_main(lambda: quick(folder, "--fine_tune", start, *ON_CHIPS[:-2], *more, "--overwrite"))
    words = "--adc_noise: 1e7 is not a number from 0 to 1e+06" if "1e7" in more else "--device wide.csv: wide: cells of 2 bits lie up to "
    error = capsys.readouterr().err.splitlines()[-1]
    assert ended.value.code == 2 and error.startswith("error: ") and words in error
    assert {path.name: path.read_bytes() for path in folder.glob("*") if path.name != "train.log"} == before


def test_a_run_on_chips_goes_on_to_the_same_bits(start, tmp_path, monkeypatch):
    flags = ["--fine_tune", start, *ON_CHIPS, "--calib_steps", "2", "--save_minutes", "0", "--chip_steps", "2"]
    _, whole = quick(tmp_path / "whole", *flags)
    save = Run.save
    stopped = tmp_path / "stopped"
    for position in ((0, 1), (1, 2)):
        def save_and_die(self, position=position):
            save(self)
            if (self.epoch, self.step) == position:
                raise KeyboardInterrupt

        monkeypatch.setattr(Run, "save", save_and_die)
        with pytest.raises(KeyboardInterrupt):
            if stopped.exists():
                train.main(["--resume", str(stopped / "checkpoint.pth.tar"), "--ngpu", "0"])
            else:
                quick(stopped, *flags)
    monkeypatch.setattr(Run, "save", save)
    assert train.main(["--resume", str(stopped / "checkpoint.pth.tar"), "--ngpu", "0"]) == 0
    found = load_checkpoint(stopped / "checkpoint.pth.tar")
    for name in ("commands", "seconds", "machine"):
        whole.pop(name), found.pop(name)
    assert_same(found, whole)
    _, other = quick(tmp_path / "other", *flags, "--chip_seed", "9")
    assert any(not torch.equal(a, b) for a, b in zip(other["state_dict"].values(), whole["state_dict"].values()))


def test_noise_is_another_in_every_step(start, tmp_path, monkeypatch):
    firsts, numbers = [], quant.image_numbers
    monkeypatch.setattr(quant, "image_numbers", lambda first, *count: (firsts.append(first), numbers(first, *count))[1])
    quick(tmp_path / "a", "--fine_tune", start, *ON_CHIPS)
    assert firsts == [0, 20, 40, 0, 60, 80, 100, 0, 0]  # three steps and a validation, twice; the test images


def test_noise_of_validation_does_not_depend_on_the_batch():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), QLinearDoreFa(48, 4, spec=CrossbarSpec(adc_range="ideal"), alpha_init=1.0))
    quant.program(net, Device("own", "here", 1.0, 10.0, read_noise=2.0))
    x, y, data = torch.randint(256, (9, 3, 4, 4), dtype=torch.uint8), torch.zeros(9).long(), SimpleNamespace(mean=[0.0] * 3, std=[1.0] * 3)
    assert evaluate(net, x, y, data, batch_size=2) == pytest.approx(evaluate(net, x, y, data), rel=1e-6)


def test_evaluating_a_checkpoint_of_chips(start, tmp_path, capsys):
    _, checkpoint = quick(tmp_path / "a", "--fine_tune", start, *ON_CHIPS)
    best = str(tmp_path / "a" / "model_best.pth.tar")
    capsys.readouterr()
    assert train.main(["--evaluate", "--resume", best, "--ngpu", "0"]) == 0  # on the same chip
    assert f"test accuracy {checkpoint['test_acc']:.2f} % on 20 images" in capsys.readouterr().out
    assert evaluation.main(["--resume", best, "--ngpu", "0", "--limit", "8", "--calib_images", "8", "--cell_bits",
                            "2", "--adc_bits", "4", "--rows", "32", "--prob_path", str(tmp_path / "prob")]) == 0
    text = capsys.readouterr().out
    assert "trained through the ADC of --cell_bits 2, " in text and ", --device rram_wan, --device_time 86400.0" in text
    assert "adc_noise" not in text and "whose ranges" not in text  # ideal cells are calibrated anew


def scattering(share, folder):
    """A device of 16 levels whose weights scatter by `share` of the largest: `2 W - L` goes to 15, and a level is 2 of it."""
    path = folder / f"scatter{share}.csv"
    path.write_text("level,conductance_uS,std_uS\n" + "".join(f"{level},{level + 1},{share * 15 / 2}\n" for level in range(16)))
    return quant.Device.read(path)


def test_who_trains_with_noise_loses_less_to_it(tmp_path):
    """Published for ResNet-20 (Wan et al., Nature 608, 504: networks trained with noise of 0, 10 and 20 % of the largest weight keep
    25.7, 83.8 and 85.6 % at 10 %): the order of what is lost, here of a small network, on 20 chips of a device that it has not seen, at
    the noise of training and beyond; without noise they lose less than half of what they win with the most of it."""
    digits, spec = load_digits(), CrossbarSpec(4, 4, cell_bits=4, adc_range="ideal")
    x, y = torch.tensor(digits.images).float()[:, None] / 16, torch.tensor(digits.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    seen, unseen, tested, clean, lost, errors = order[:1200], order[1200:], (0.1, 0.3), [], [], []
    for share in (0.0, 0.1, 0.2):
        torch.manual_seed(0)
        net = torch.nn.Sequential(
            Qconv2dDoreFa(1, 16, 3, padding=1, bias=False, spec=spec, alpha_init=1.0), torch.nn.BatchNorm2d(16), torch.nn.ReLU(),
            Qconv2dDoreFa(16, 16, 3, padding=1, bias=False, spec=spec, alpha_init=3.0), torch.nn.BatchNorm2d(16), torch.nn.ReLU(),
            torch.nn.AvgPool2d(4), torch.nn.Flatten(), QLinearDoreFa(64, 10, spec=spec, alpha_init=3.0, out_scale=1 / 8))
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10 * 12)
        numbers = torch.Generator().manual_seed(1)
        batches = [batch for _ in range(10) for batch in torch.randperm(len(seen), generator=numbers).split(100)]
        for step, batch in enumerate(batches):
            quant.program(net, scattering(share, tmp_path) if share else None, step)
            loss = torch.nn.functional.cross_entropy(net(x[seen[batch]]), y[seen[batch]])
            optimizer.zero_grad(), loss.backward(), optimizer.step(), schedule.step()
        found = []
        for device, chip in [(None, 0), *((scattering(at, tmp_path), chip) for at in tested for chip in range(1000, 1020))]:
            quant.program(net.eval(), device, chip)
            with torch.no_grad():
                found.append(100 * (net(x[unseen]).argmax(1) == y[unseen]).double().mean().item())
        clean.append(found[0])
        on_chips = np.array(found[1:]).reshape(len(tested), 20)
        lost.append(found[0] - on_chips.mean(1))
        errors.append(on_chips.std(1, ddof=1) / 20**0.5)
    assert min(clean) > 80, clean
    assert all(clean[0] - clean[i] < (lost[0][1] - lost[i][1]) / 2 for i in (1, 2)), (clean, lost)
    for noise, more, less in ((0, 0, 1), (0, 0, 2), (1, 0, 1), (1, 1, 2)):
        assert lost[more][noise] - lost[less][noise] > 2 * np.hypot(errors[more][noise], errors[less][noise]), (lost, errors)


@pytest.mark.parametrize("flags, words", [
    (["--device", "techA"], "--device is for training through the ADC: add --adc_aware"),
    (["--adc_aware", "--chip_steps", "2"], "--chip_steps is for the cells of a device: add --device NAME"),
    (["--sigma", "1"], "--sigma is for training through the ADC: add --adc_aware"),
    (["--adc_aware", "--calib_on", "chip"], "--calib_on is for the cells of a device"),
    (["--adc_aware", "--device", "techX"], "--device techX: there is no preset and no file 'techX'"),
    (["--adc_aware", "--device", "techA", "--device_time", "1w"], "--device techA: techA at 25 C has no data at 604800 s"),
    (["--adc_aware", "--device", "winbond_asu_1bit", "--cell_bits", "2"], "--device winbond_asu_1bit: winbond_asu_1bit has 2 levels"),
    (["--adc_aware", "--device", "techA", "--chip_steps", "0"], "--chip_steps: 0 is not a whole number from 1 up"),
])
def test_bad_input_of_chips_is_one_line(flags, words, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        run_main(lambda: train.main(["--save_path", str(tmp_path / "run"), *FLAGS, *flags]))
    out, err = capsys.readouterr()
    assert ended.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1 and words in err
    assert not Path(tmp_path, "run").exists()


def test_a_list_of_devices(capsys):
    with pytest.raises(SystemExit) as ended:
        train.main(["--device", "list"])
    assert not ended.value.code and capsys.readouterr().out.startswith("cmo_hfox: ")


@pytest.mark.parametrize("flags, corrects", [([], True), (["--adc_correct", "none"], False)])
def test_steps_are_corrected_where_evaluations_are(start, tmp_path, flags, corrects, monkeypatch):
    seen, step = [], Run.train_step
    monkeypatch.setattr(Run, "train_step", lambda self, *args: (
        seen.extend(layer.correct_batches for _, layer in quant.crossbar_layers(self.net)), step(self, *args))[1])
    quick(tmp_path / "a", "--fine_tune", start, *ON_CHIPS, "--epochs", "1", *flags)
    assert len(seen) > 3 and set(seen) == {corrects}


def test_batch_norms_are_taken_of_images_as_training_sees_them(start, tmp_path, monkeypatch):
    """The first batches of an epoch, shifted and all, not images as they are."""
    seen, take_anew = [], batch_norms.take_anew
    monkeypatch.setattr(batch_norms, "take_anew", lambda net, batches: take_anew(net, seen.append(list(batches)) or seen[-1]))
    _, checkpoint = quick(tmp_path / "a", "--fine_tune", start, *ON_CHIPS, "--epochs", "1")
    settings, data = stored_settings(checkpoint), datasets.load("digits")
    run = Run(settings, starting.build_network(settings, 10, torch.device("cpu")), data, torch.device("cpu"), None)
    batches = datasets.train_batches(run.train_x, run.train_y, settings.batch_size, settings.seed, 0, pad=data.pad, flip=data.flip)
    wanted = [datasets.normalize(x, data.mean, data.std) for _, x, _ in batches]
    assert len(seen) >= 2 and data.pad and len(wanted) == 3
    for found in seen:
        assert_same(found, wanted)


def test_batch_norms_know_the_network_without_arrays():
    """Their statistics are those of the software, whatever chips left behind, and everything else is as before."""
    torch.manual_seed(0)
    spec = CrossbarSpec(4, 4, cell_bits=2, adc_bits=3)
    net = torch.nn.Sequential(Qconv2dDoreFa(3, 8, 3, spec=spec, alpha_init=1.0), torch.nn.BatchNorm2d(8), torch.nn.ReLU(),
                              Qconv2dDoreFa(8, 5, 3, spec=spec, alpha_init=2.0), torch.nn.BatchNorm2d(5)).eval()
    batches = torch.rand(12, 3, 8, 8).split(6)
    quant.calibrate(net, batches)
    quant.program(net, quant.Device.preset("techC", time="1d"), 0)
    chips, before = [layer.chip for _, layer in quant.crossbar_layers(net)], {k: v.clone() for k, v in net.state_dict().items()}
    batch_norms.take_anew(net, batches)

    first, second = [], []  # (mean, variance of n - 1) of each batch
    with torch.no_grad(), quant.without_adc(net):
        for batch in batches:
            y = net[0](batch).double()
            first.append((y.mean((0, 2, 3)), y.var((0, 2, 3))))
            y = (y - first[-1][0].view(-1, 1, 1)) / (y.var((0, 2, 3), correction=0).view(-1, 1, 1) + 1e-5).sqrt()
            y = net[3](torch.relu(y).float()).double()
            second.append((y.mean((0, 2, 3)), y.var((0, 2, 3))))
    for norm, found in ((net[1], first), (net[4], second)):
        mean, var = (sum(values) / 2 for values in zip(*found))
        torch.testing.assert_close(norm.running_mean.double(), mean, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(norm.running_var.double(), var, rtol=1e-3, atol=1e-6)
        assert norm.momentum == 0.1 and not norm.training
    assert [layer.chip for _, layer in quant.crossbar_layers(net)] == chips
    for key, value in net.state_dict().items():
        assert "running" in key or torch.equal(value, before[key]), key
