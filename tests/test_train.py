"""train.py: killed and interrupted runs, bad input, other starts, the schedule, the penalty, what a checkpoint may say.

A VGG7 with few channels stands in for the real one, so that a step takes milliseconds; the training code is the same.
"""

import copy
import dataclasses
import functools
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import models
import train
from experiment.inputs import data as datasets
from experiment.train import optimizing, training
from experiment.start import starting
from experiment.settings import train_settings
from experiment.inputs.checkpoint import load_checkpoint, save_checkpoint
from experiment.program.cli import UserError, run_main
from experiment.train.training import Run, schedule_factor
from models import quant

ROOT = Path(__file__).resolve().parent.parent
SMALL = ([8, "M", 8, "M", 8, 8, "M", 8, 8], 16)  # instead of VGG7's widths, and most of it on few pixels
# 180 training images: 9 steps an epoch. Smaller batches make 27 of 108, so that a signal arrives inside an epoch.
FLAGS = ["--epochs", "3", "--limit_train", "200", "--batch_size", "20", "--lr", "0.05", "--ngpu", "0"]
FLOAT = ["--w_bits", "32", "--a_bits", "32"]
MANY_STEPS = ["--batch_size", "4", "--lr", "0.02", "--limit_train", "120"]


@pytest.fixture(autouse=True)
def small_network(monkeypatch):
    monkeypatch.setitem(models.vgg.CONFIGS, "vgg7", SMALL)
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the network is too small to share, and waiting threads are slow on a busy machine
    yield
    torch.set_num_threads(threads)


def quick(folder, *flags):
    """Train in this process; (exit code, final checkpoint)."""
    code = train.main(["--save_path", str(folder), *FLAGS, *flags])
    return code, load_checkpoint(Path(folder, "checkpoint.pth.tar"))


def kill_inside_first_epoch(folder, *flags):
    """Train in a process of its own, and kill it once its checkpoint stands inside the first epoch."""
    def program():
        save = Run.save
        Run.save = lambda self: (save(self), time.sleep(0.02))  # so that who watches the checkpoint sees it inside an epoch
        train.main(["--save_path", str(folder), *flags])

    process = multiprocessing.get_context("fork").Process(target=program)
    process.start()
    path = Path(folder, "checkpoint.pth.tar")
    deadline = time.monotonic() + 300  # far more than it takes; the machine may be busy
    while not (path.exists() and 1 <= load_checkpoint(path)["step"] <= 22):
        assert process.is_alive() and time.monotonic() < deadline, "the run never came there"
        time.sleep(0.05)
    process.kill()
    process.join(300)
    assert process.exitcode == -signal.SIGKILL


def assert_same(a, b, where="checkpoint"):
    """Equal in every bit, through nested dicts and lists."""
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert list(a) == list(b), where
        for key in a:
            assert_same(a[key], b[key], f"{where}[{key!r}]")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}[{i}]")
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), where
    else:
        assert a == b, where


# -- killed, interrupted, resumed


def test_killed_and_interrupted_run_ends_with_the_same_bits(tmp_path, monkeypatch, capsys):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    flags = [*FLAGS, *MANY_STEPS, "--epochs", "2", "--clp", "--cutout", "6", "--trivial_augment"]
    kill_inside_first_epoch(broken, "--save_minutes", "0", *flags)
    killed = load_checkpoint(broken / "checkpoint.pth.tar")
    assert killed["epoch"] == 0 and 0 < killed["step"] < 27 and not (broken / "model_best.pth.tar").exists()

    save = Run.save

    def save_and_interrupt(self):
        save(self)
        if (self.epoch, self.step) == (1, 8):
            monkeypatch.setattr(Run, "save", save)
            signal.raise_signal(signal.SIGINT)  # Ctrl-C

    monkeypatch.setattr(Run, "save", save_and_interrupt)
    assert train.main(["--resume", "--save_path", str(broken)]) == 130  # all other flags come from the checkpoint
    stopped = load_checkpoint(broken / "checkpoint.pth.tar")
    assert (stopped["epoch"], stopped["step"]) == (1, 8)
    command = capsys.readouterr().out.splitlines()[-1].split("continue with: python train.py ")[1]  # one line says how to go on

    assert train.main(command.split()) == quick(whole, *flags)[0] == 0
    for file in ("checkpoint.pth.tar", "model_best.pth.tar"):
        expected, result = load_checkpoint(whole / file), load_checkpoint(broken / file)
        for checkpoint in (expected, result):
            del checkpoint["config"]["save_minutes"]
            assert checkpoint.pop("seconds") > 0
        # the best epoch may be the first, which the first two of the three runs ended
        assert len(expected.pop("commands")) == 1 and len(result.pop("commands")) == (3 if result["epoch"] == 2 else 2), file
        assert_same(expected, result)
    trained = expected["state_dict"]
    for name in (name for name in trained if name.endswith(".weight")):  # all moved after the kill, so equality says something
        assert not torch.equal(trained[name], killed["state_dict"][name]), name


def test_interrupted_validation_is_repeated(tmp_path, monkeypatch):
    """The checkpoint of a run that stops between the last step of an epoch and its end."""
    _, expected = quick(tmp_path / "whole")
    evaluate = training.evaluate

    def interrupted(net, x, *args, tick, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(net, x, *args, tick=tick, **kwargs)

    monkeypatch.setattr(training, "evaluate", interrupted)
    code, stopped = quick(tmp_path / "broken")
    assert code == 128 + signal.SIGTERM and (stopped["epoch"], stopped["step"]) == (0, 9)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL  # as before
    monkeypatch.undo()
    monkeypatch.setitem(models.vgg.CONFIGS, "vgg7", SMALL)
    assert train.main(["--resume", "--save_path", str(tmp_path / "broken")]) == 0
    result = load_checkpoint(tmp_path / "broken" / "checkpoint.pth.tar")
    for name in ("state_dict", "optimizer", "history", "best_acc", "test_acc", "rng"):
        assert_same(expected[name], result[name], name)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A complete run that tests may read."""
    folder = tmp_path_factory.mktemp("run") / "finished"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models.vgg.CONFIGS, "vgg7", SMALL)
        assert quick(folder)[0] == 0
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """trained(flags): `model_best.pth.tar` of a run of one epoch with these flags, made once, which tests may read."""
    @functools.cache
    def trained(*flags):
        folder = tmp_path_factory.mktemp("run") / "trained"
        assert quick(folder, "--epochs", "1", *flags)[0] == 0
        return folder / "model_best.pth.tar"

    return trained


@pytest.fixture
def few_test_images(monkeypatch):
    load = datasets.load

    def small(*args):
        data = load(*args)
        return dataclasses.replace(data, test_x=data.test_x[:20], test_y=data.test_y[:20])

    monkeypatch.setattr(datasets, "load", small)


def test_resuming_a_finished_run_says_so(finished, capsys, monkeypatch):
    monkeypatch.setattr(datasets, "load", lambda *_: pytest.fail("loaded data"))
    before = (finished / "checkpoint.pth.tar").read_bytes()
    assert train.main(["--resume", "--save_path", str(finished)]) == 0
    assert "is finished after 3 epochs: test accuracy" in capsys.readouterr().out
    assert (finished / "checkpoint.pth.tar").read_bytes() == before


def test_files_of_a_run(finished):
    assert {"checkpoint.pth.tar", "model_best.pth.tar", "train.log"} < {path.name for path in finished.iterdir()}
    assert not list(finished.glob("*.tmp")) and not list(finished.glob(".*"))
    log = (finished / "train.log").read_text()
    assert "seed 0" in log and log.count("validation") >= 3 and "test accuracy" in log
    best, last = (load_checkpoint(finished / f) for f in ("model_best.pth.tar", "checkpoint.pth.tar"))
    assert best["config"]["w_bits"] == 4 and best["data"]["classes"] == [str(i) for i in range(10)]
    lowest = min(row["val_loss"] for row in last["history"])
    chosen = [row for row in last["history"] if row["val_loss"] == lowest][-1]
    assert (best["epoch"], best["best_acc"]) == (chosen["epoch"], chosen["val_acc"]) and last["best_acc"] == chosen["val_acc"]


def test_the_epoch_of_lowest_validation_loss_is_kept(tmp_path, monkeypatch):
    """Whatever its accuracy; of equal ones the later."""
    losses = iter([(0.5, 90.0), (0.3, 80.0), (0.3, 70.0), (0.4, 95.0), (9.9, 1.0)])
    monkeypatch.setattr(training, "evaluate", lambda *args, **options: next(losses))
    quick(tmp_path, "--epochs", "4")
    best = load_checkpoint(tmp_path / train_settings.BEST)
    assert (best["epoch"], best["best_acc"]) == (3, 70.0)


def test_tensorboard_events(finished):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(finished)).Reload()
    tags = events.Tags()
    assert {"train/loss", "train/acc", "val/loss", "val/acc", "lr", "alpha/features.4"} <= set(tags["scalars"])
    assert {"alpha", "weight/features.4", "activation/features.4", "activation/classifier.0"} <= set(tags["histograms"])
    assert "alpha/features.0" not in tags["scalars"]  # it does not quantize the image
    assert [event.step for event in events.Scalars("val/acc")] == [8, 17, 26]  # those of a run that goes on at step 9 stay


def test_the_test_images_are_used_once_after_the_last_epoch(tmp_path, monkeypatch):
    calls, evaluate = [], training.evaluate

    def counted(net, x, *args, **kwargs):
        calls.append(len(x))
        return evaluate(net, x, *args, **kwargs)

    monkeypatch.setattr(training, "evaluate", counted)
    _, checkpoint = quick(tmp_path / "run")
    val = 200 - checkpoint["data"]["train_images"]
    assert calls == [val, val, val, 359]


def test_few_test_images(tmp_path, monkeypatch, capsys):
    """Every 89th of 359, under a bar of their own; a checkpoint of them is measured on all, unless these are asked for again."""
    seen, evaluate = [], training.evaluate

    def kept(net, x, y, *args, **more):
        if more.get("title") == "test images":
            seen.append(y.tolist())
        return evaluate(net, x, y, *args, **more)

    monkeypatch.setattr(training, "evaluate", kept)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    quick(tmp_path, "--epochs", "1", "--limit_test", "4")
    shown = capsys.readouterr().err
    assert "test images:" in shown and "validation images:" in shown
    for more in ([], ["--limit_test", "4"], ["--limit_test", "400"]):
        train.main(["--evaluate", "--save_path", str(tmp_path), "--ngpu", "0", *more])
    captured = capsys.readouterr()
    assert captured.err.count("test images:") >= 3 and [f"on {n} images" in captured.out for n in (4, 359, 400)] == [True, True, False]
    labels = datasets.load("digits").test_y.tolist()
    some = [labels[i] for i in (0, 89, 179, 269)]
    assert seen == [some, labels, some, labels]


def test_without_a_validation_split_the_last_epoch_counts(tmp_path):
    code, checkpoint = quick(tmp_path, "--val_split", "0", "--epochs", "2")
    best = load_checkpoint(tmp_path / "model_best.pth.tar")
    assert code == 0 and checkpoint["data"]["train_images"] == 200 and best["epoch"] == 2
    assert_same(best["state_dict"], checkpoint["state_dict"])


def test_a_loss_that_is_not_finite_stops_and_keeps_the_checkpoint(tmp_path):
    with pytest.raises(UserError, match="in epoch 2, step [0-9]+ .* (no longer a finite number|must be finite)"):
        quick(tmp_path, "--schedule", "1", "--gammas", "1e35")
    checkpoint = load_checkpoint(tmp_path / "checkpoint.pth.tar")
    assert (checkpoint["epoch"], checkpoint["step"]) == (1, 0)
    assert all(value.isfinite().all() for value in checkpoint["state_dict"].values())


def test_a_clipping_level_that_falls_to_0_stops_and_keeps_the_checkpoint(tmp_path):
    """All that is behind a level below 0 is clipped to it: the loss stays finite, and no checkpoint with such a level is read."""
    with pytest.raises(UserError, match="in epoch 2, step [0-9]+ .*act_alpha holds -.*; it must be finite and above 0; try a lower --lr"):
        quick(tmp_path, "--clp", "--a_lambda", "5", "--alpha_lr", "1e-4", "--lr", "1e-5", "--schedule", "1", "--gammas", "1000")
    assert load_checkpoint(tmp_path / "checkpoint.pth.tar")["epoch"] == 1


# -- other starts


def test_evaluate_repeats_the_test_accuracy(finished, capsys):
    assert train.main(["--evaluate", "--resume", str(finished / "model_best.pth.tar"), "--ngpu", "0"]) == 0
    accuracy = load_checkpoint(finished / "checkpoint.pth.tar")["test_acc"]
    assert f"test accuracy {accuracy:.2f} % on 359" in capsys.readouterr().out
    assert train.main(["--evaluate", "--save_path", str(finished), "--ngpu", "0"]) == 0  # finds model_best itself


def test_fine_tune_from_a_32_bit_network(trained, tmp_path, capsys):
    best = trained(*FLOAT)
    code, tuned = quick(tmp_path / "a", "--fine_tune", str(best), "--alpha_init", "3", "--epochs", "1", "--lr", "1e-12",
                        "--wd", "0")
    assert code == 0 and "; clipping levels start at 3, 3, 3, 3, 3, 3," in capsys.readouterr().out
    start = load_checkpoint(best)["state_dict"]
    for key, value in tuned["state_dict"].items():
        if key.startswith("classifier.1.") or key == "classifier.3.act_quant.act_alpha":
            continue  # they scale the logits
        if key.endswith("act_alpha"):
            assert value == pytest.approx(3)
        elif key.endswith("weight"):
            torch.testing.assert_close(value, start[key], atol=1e-6, rtol=1e-6)
    # As users of the original scripts write it.
    quick(tmp_path / "b", "--resume", str(best), "--fine_tune", "--alpha_init", "3", "--epochs", "1", "--lr", "1e-12",
          "--wd", "0")
    assert_same(load_checkpoint(tmp_path / "b" / "checkpoint.pth.tar")["state_dict"], tuned["state_dict"])


@pytest.mark.parametrize("before, after", [
    (["--wq", "dorefa"], ["--wq", "sawb"]), (["--wq", "sawb"], ["--wq", "dorefa"]), (["--wq", "dorefa"], FLOAT),
    (FLOAT, ["--wq", "dorefa"]), (FLOAT, ["--wq", "sawb", "--alpha_init", "3"]), (["--a_bits", "8"], ["--a_bits", "1"]),
    (["--w_bits", "4"], ["--w_bits", "2", "--wq", "sawb", "--alpha_init", "3"])])
def test_logits_are_much_the_same_under_other_quantizers(before, after, trained, tmp_path):
    """Their deviation on the images that they were fitted to, and with biases that are far from zero their means."""
    start, tuned = tmp_path / "start.pth.tar", ["--epochs", "1", "--lr", "1e-12", "--wd", "0", *after]
    checkpoint = load_checkpoint(trained(*before))
    for name in ("classifier.1.bias", "classifier.3.bias"):
        checkpoint["state_dict"][name] += torch.linspace(-1, 1, len(checkpoint["state_dict"][name]))
    save_checkpoint(start, checkpoint)
    expected = logits(checkpoint)
    found = logits(quick(tmp_path / "tuned", "--fine_tune", str(start), *tuned)[1])
    assert (found - found.mean(0)).std() == pytest.approx((expected - expected.mean(0)).std(), rel=1e-3)
    # Other weights move the means of the classes somewhat; a bias of the wrong worth, by a factor of 4 here, moves them far more.
    assert abs(found.mean(0) - expected.mean(0)).max() < 0.3 * (expected.mean(0).max() - expected.mean(0).min())


def logits(checkpoint):
    """Those of the training images as numpy array, with the statistics of the batch."""
    net = starting.build_network(stored_settings(checkpoint), 10, torch.device("cpu"))
    net.load_state_dict(checkpoint["state_dict"])
    data = datasets.load("digits")
    kept, _ = datasets.training_split(data.train_y, 0.1, seed=0, limit=200)
    with torch.no_grad():
        return net.train()(datasets.normalize(data.train_x[kept], data.mean, data.std)).numpy()


def stored_settings(checkpoint):
    """The settings of the run that a checkpoint is of."""
    return train_settings.settings_of(train_settings.defaults() | checkpoint["config"])


def started(path, *flags):
    """(network, text for the log) of a run that starts from a checkpoint, before its first step."""
    settings, _, checkpoint = train_settings.parse(["--fine_tune", str(path), "--save_path", "none", *flags])
    net, data = starting.build_network(settings, 10, torch.device("cpu")), datasets.load("digits")
    starting.load(net, settings, checkpoint["state_dict"])
    images = datasets.normalize(data.train_x[::20], data.mean, data.std)
    return net, starting.fit_quantizers(net, settings, checkpoint, 10, images)


def test_nothing_is_fitted_under_the_same_quantizers(finished):
    for flags in ([], ["--adc_aware"], ["--alpha_init", "7"]):
        net, text = started(finished / "model_best.pth.tar", *flags)
        before = load_checkpoint(finished / "model_best.pth.tar")["state_dict"]
        assert all(torch.equal(net.state_dict()[key], value) for key, value in before.items())
        assert text == ("; they have clipping levels, so --alpha_init has no effect" if "--alpha_init" in flags else "")


def test_the_input_of_the_last_layer_is_scaled_as_a_whole(finished):
    before = load_checkpoint(finished / "model_best.pth.tar")["state_dict"]
    for flags in (["--wq", "sawb"], ["--a_bits", "2"]):
        net, _ = started(finished / "model_best.pth.tar", *flags)
        after = net.state_dict()
        factor = (after["classifier.1.weight"] / before["classifier.1.weight"]).mean()
        assert abs(factor - 1) > 0.02
        torch.testing.assert_close(after["classifier.1.weight"], factor * before["classifier.1.weight"])
        torch.testing.assert_close(after["classifier.1.bias"], factor * before["classifier.1.bias"])
        if "--wq" in flags:
            alpha = "classifier.3.act_quant.act_alpha"
            torch.testing.assert_close(after[alpha], factor * before[alpha])


def test_weights_that_do_not_say_their_quantizers(finished, trained, tmp_path):
    """Of the original code: DoReFa, or no quantizers at all where there are no clipping levels. They are fitted as those are
    that say so."""
    quantized, in_float = finished / "model_best.pth.tar", trained(*FLOAT)
    for source, flags in ((quantized, ["--wq", "sawb"]), (in_float, []), (in_float, ["--a_bits", "32"])):
        state = load_checkpoint(source)["state_dict"]
        torch.save({f"module.{key}": value for key, value in state.items()}, tmp_path / "bare.pth")
        known, text = started(source, *flags)
        bare, same_text = started(tmp_path / "bare.pth", *flags)
        assert text == same_text and text.endswith("; the logits keep their scale under other quantizers")
        assert_same(bare.state_dict(), known.state_dict())


def test_the_images_clipping_level_is_fitted_where_it_was_not_in_use(finished):
    net, text = started(finished / "model_best.pth.tar", "--quantize_image")
    assert text.startswith("; clipping levels start at ") and text.count(",") == 0
    data = datasets.load("digits")
    largest = datasets.normalize(data.train_x, data.mean, data.std).max().item()
    assert 0.5 * largest < net.features[0].act_quant.act_alpha.item() <= largest != 6


def test_a_network_that_tells_nothing_apart_is_not_scaled(finished, tmp_path):
    checkpoint = load_checkpoint(finished / "model_best.pth.tar")
    checkpoint["state_dict"]["classifier.3.weight"].zero_()
    save_checkpoint(tmp_path / "dead.pth.tar", checkpoint)
    net, _ = started(tmp_path / "dead.pth.tar", "--wq", "sawb")
    assert torch.equal(net.classifier[1].weight, checkpoint["state_dict"]["classifier.1.weight"])


@pytest.mark.parametrize("wq", ["dorefa", "sawb"])
def test_fine_tune_without_quantizers_from_a_quantized_network(trained, tmp_path, wq):
    best = trained("--wq", wq)
    code, tuned = quick(tmp_path, "--fine_tune", str(best), *FLOAT, "--wq", wq, "--epochs", "1", "--lr", "1e-12", "--wd", "0")
    start = load_checkpoint(best)["state_dict"]
    assert code == 0 and tuned["state_dict"].keys() == {
        key for key in start if not key.endswith(("act_alpha", "weight_quant.clip"))}
    for key, value in tuned["state_dict"].items():
        if key.endswith("weight") and key != "classifier.1.weight":  # which scales the logits
            torch.testing.assert_close(value, start[key], atol=1e-6, rtol=1e-6)


def test_fine_tune_fits_the_clipping_levels_to_the_activations(trained, tmp_path, capsys):
    start = str(trained(*FLOAT))
    _, tuned = quick(tmp_path / "a", "--fine_tune", start, "--epochs", "1", "--lr", "1e-12", "--wd", "0", "--wq", "sawb")
    alphas = [value.item() for key, value in tuned["state_dict"].items() if key.endswith("act_alpha")][1:]
    assert len(set(alphas)) == 7 and all(0.1 < alpha < 20 for alpha in alphas)
    out = capsys.readouterr().out
    assert "; clipping levels start at " + ", ".join(f"{alpha:.3g}" for alpha in alphas) in out
    assert tuned["config"]["wq"] == "sawb" and all(
        value > 0 for key, value in tuned["state_dict"].items() if key.endswith("weight_quant.clip"))
    assert [command.split()[:2] for command in tuned["commands"]] == [["python", "train.py"]] * 2
    assert start in tuned["commands"][1] and tuned["seconds"] > 0


def test_fine_tune_fits_only_what_is_missing(tmp_path):
    """Levels of a network with 32-bit weights stay, and the logits keep their scale; one level that is missing is fitted."""
    quick(tmp_path / "start", "--w_bits", "32", "--a_bits", "4", "--epochs", "2")
    start = load_checkpoint(tmp_path / "start" / "model_best.pth.tar")
    flags = "--epochs", "1", "--lr", "1e-12", "--wd", "0"
    alphas = [key for key in start["state_dict"] if key.endswith("act_alpha")][1:]
    _, tuned = quick(tmp_path / "a", "--fine_tune", str(tmp_path / "start" / "model_best.pth.tar"), *flags)
    for key in alphas[:-1]:
        torch.testing.assert_close(tuned["state_dict"][key], start["state_dict"][key])
    assert tuned["state_dict"][alphas[-1]] > 1.2 * start["state_dict"][alphas[-1]]  # else the logits were smaller
    del start["state_dict"][alphas[2]]
    save_checkpoint(tmp_path / "less.pth.tar", start)
    _, tuned = quick(tmp_path / "b", "--fine_tune", str(tmp_path / "less.pth.tar"), *flags)
    for key in alphas[:2] + alphas[3:-1]:
        torch.testing.assert_close(tuned["state_dict"][key], start["state_dict"][key])


def test_validation_on_images_that_the_weights_were_trained_on_is_said(trained, tmp_path, capsys):
    labels = datasets.load("digits").train_y
    (seen, _), (_, other) = (datasets.training_split(labels, 0.1, seed, 200) for seed in (0, 1))
    known = len({*seen.tolist()} & {*other.tolist()})
    for seed, said in ((0, False), (1, True)):
        quick(tmp_path / f"seed{seed}", "--fine_tune", str(trained()), "--seed", str(seed), "--epochs", "1")
        assert (f"{known} of {len(other)} validation images are among those" in capsys.readouterr().out) is said
    assert known > 0


def test_images_that_weights_were_trained_on_are_known_where_their_split_is(trained):
    checkpoint, labels = load_checkpoint(trained()), datasets.load("digits").train_y
    settings = train_settings.TrainSettings(dataset="digits", val_split=0.1, seed=1, limit_train=200)
    assert starting.known_in_validation(settings, checkpoint, labels) > 0
    assert starting.known_in_validation(dataclasses.replace(settings, dataset="cifar10"), checkpoint, labels) == 0
    for name in ("val_split", "seed", "limit_train"):  # older ones do not say it
        less = {key: value for key, value in checkpoint["config"].items() if key != name}
        assert starting.known_in_validation(settings, checkpoint | {"config": less}, labels) == 0
    other = checkpoint["data"] | {"train_images": 7}  # of other images than those at hand
    assert starting.known_in_validation(settings, checkpoint | {"data": other}, labels) == 0


def test_quantizers_that_are_off_are_alike():
    plain = train_settings.TrainSettings(w_bits=train_settings.OFF, wq="dorefa")
    assert starting._quantizers(dataclasses.replace(plain, wq="sawb")) == starting._quantizers(plain)
    quantized = dataclasses.replace(plain, w_bits=4)
    assert starting._quantizers(dataclasses.replace(quantized, wq="sawb")) != starting._quantizers(quantized)


def test_weight_clip_leaves_no_weight_beyond_its_bound(tmp_path):
    _, checkpoint = quick(tmp_path, "--weight_clip", "1.5", "--epochs", "1")
    for key, weight in checkpoint["state_dict"].items():
        if key.endswith("weight") and weight.dim() > 1:  # clipping lowers the root mean square itself
            assert 1.2 < weight.abs().max() / weight.square().mean().sqrt() < 1.8


@pytest.mark.parametrize("wq", ["dorefa", "sawb"])
@pytest.mark.usefixtures("few_test_images")
def test_training_through_the_adc_resumes_to_the_same_bits(wq, trained, tmp_path, capsys, monkeypatch):
    flags = ["--fine_tune", str(trained()), "--adc_aware", "--adc_bits", "3", "--cell_bits", "2", "--rows", "16", "--calib_steps",
             "5", "--limit_train", "35", "--batch_size", "5", "--epochs", "2", "--wq", wq, "--save_minutes", "0"]
    _, whole = quick(tmp_path / "whole", *flags)
    state = whole["state_dict"]
    ranges = [key for key in state if key.endswith("adc_delta")]
    assert len(ranges) == 7 and all((state[key] > 0).all() and len(state[key]) == 2 for key in ranges)
    gains = [key for key in state if key.endswith("adc_gain")]
    assert len(gains) == 7 and all((state[key] != 1).any() for key in gains)
    if wq == "dorefa":
        _, plain = quick(tmp_path / "plain", *flags, "--epochs", "1", "--adc_correct", "none")
        assert all((plain["state_dict"][key] == 1).all() for key in gains)

    stopped = tmp_path / "stopped"
    save = Run.save
    for position in ((0, 0), (0, 6), (1, 1)):  # before the first calibration; between two; after an evaluation that is none either
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

    def stop_in_validation(*args, tick, **kwargs):
        signal.raise_signal(signal.SIGTERM)
        tick()

    evaluate = training.evaluate
    monkeypatch.setattr(training, "evaluate", stop_in_validation)
    assert train.main(["--resume", str(stopped / "checkpoint.pth.tar"), "--ngpu", "0"]) == 128 + signal.SIGTERM
    monkeypatch.setattr(training, "evaluate", evaluate)
    assert train.main(["--resume", str(stopped / "checkpoint.pth.tar"), "--ngpu", "0"]) == 0
    assert_same(load_checkpoint(stopped / "checkpoint.pth.tar")["state_dict"], state)

    capsys.readouterr()
    assert train.main(["--evaluate", "--resume", str(tmp_path / "whole" / "model_best.pth.tar"), "--ngpu", "0"]) == 0
    assert f"test accuracy {whole['test_acc']:.2f} %" in capsys.readouterr().out
    flags = ["--wq", "dorefa", "--fine_tune", str(tmp_path / "whole" / "model_best.pth.tar"), "--epochs", "1"]
    plain, _ = quick(tmp_path / "back", *flags)
    assert plain == 0  # ranges, and levels of another quantizer, are of no use to this network


@pytest.mark.usefixtures("few_test_images")
def test_training_through_the_adc_from_a_32_bit_network(trained, tmp_path, monkeypatch):
    """Its first ranges fit the activations that the first steps have, with batch norm of the statistics of a batch."""
    first = []

    def spy(self, calibrate=Run.calibrate):
        if not first:
            images = self.some_images(256)
            for training in (False, True):
                net, inputs = copy.deepcopy(self.net), []
                with quant.without_adc(net, training), torch.no_grad():
                    net.classifier[0].register_forward_pre_hook(lambda layer, x: inputs.append(layer.a_codes(x[0])))
                    net(images)
                first.append(inputs[0].float().mean().item())
        calibrate(self)

    monkeypatch.setattr(Run, "calibrate", spy)
    code, checkpoint = quick(tmp_path, "--fine_tune", str(trained(*FLOAT)), "--adc_aware", "--epochs", "1")
    assert code == 0 and checkpoint["state_dict"]["classifier.0.act_quant.act_alpha"] != 6
    assert first[0] == pytest.approx(first[1], rel=0.05)


@pytest.mark.usefixtures("few_test_images")
def test_ranges_are_calibrated_every_so_many_steps_and_after_an_epoch(trained, tmp_path, monkeypatch):
    seen, start = [], trained()  # whose run is not looked at

    def spy(self, calibrate=Run.calibrate):
        seen.append((self.epoch, self.step))
        calibrate(self)

    monkeypatch.setattr(Run, "calibrate", spy)
    _, checkpoint = quick(tmp_path, "--fine_tune", str(start), "--adc_aware", "--adc_bits", "3", "--rows", "16",
                          "--epochs", "2", "--calib_steps", "7")
    steps = datasets.steps_per_epoch(checkpoint["data"]["train_images"], checkpoint["config"]["batch_size"])
    assert steps > 7 and steps % 7
    expected = [divmod(position, steps) for position in range(0, 2 * steps, 7)] + [(0, steps), (1, steps)]
    assert seen == sorted(expected)

    # Those that are kept are those of the weights that are kept.
    settings = stored_settings(checkpoint)
    net = starting.build_network(settings, 10, torch.device("cpu"))
    net.load_state_dict(checkpoint["state_dict"])
    run = Run(settings, net.eval(), datasets.load("digits"), torch.device("cpu"), None)
    run.calibrate()
    for key, value in net.state_dict().items():
        assert torch.equal(value, checkpoint["state_dict"][key]), key


def test_weights_that_are_no_numbers_are_said_before_a_calibration(tmp_path):
    with pytest.raises(UserError, match="in epoch 1, step [1-9] .* (no longer a finite number|must be finite)"):
        quick(tmp_path, "--adc_aware", "--lr", "1e20", "--calib_steps", "1", "--rows", "16")


def test_weights_of_the_original_code(finished, tmp_path, capsys):
    """{"state_dict": ...} with the prefix of DataParallel and nothing else."""
    state = load_checkpoint(finished / "model_best.pth.tar")["state_dict"]
    state = {f"module.{key}": value for key, value in state.items()}
    torch.save({"state_dict": state, "acc": 1.0, "config": 1}, tmp_path / "old.pth")
    assert train.main(["--evaluate", "--fine_tune", "--resume", str(tmp_path / "old.pth"), "--ngpu", "0"]) == 0
    accuracy = load_checkpoint(finished / "checkpoint.pth.tar")["test_acc"]
    assert f"test accuracy {accuracy:.2f} %" in capsys.readouterr().out


@pytest.mark.parametrize("flag, name", [("--evaluate", "model_best.pth.tar"), ("--resume", "checkpoint.pth.tar")])
def test_a_config_file_of_a_fine_tuned_run_is_of_what_came_out(flag, name, finished, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"fine_tune": "what/it/began/from", "save_path": str(finished)}))
    path = [str(finished / name)] if flag == "--resume" else []
    _, actions, _ = train_settings.parse(["--config", str(tmp_path / "config.json"), flag, *path])
    assert (actions.resume, actions.fine_tune) == (str(finished / name), None)


def test_quantize_image_uses_the_first_clipping_level(trained):
    used, unused = (load_checkpoint(trained(*flags).with_name("checkpoint.pth.tar")) for flags in (["--quantize_image"], []))
    assert used["state_dict"]["features.0.act_quant.act_alpha"] != 6
    assert unused["state_dict"]["features.0.act_quant.act_alpha"] == 6  # neither trained nor decayed
    assert len(used["optimizer"]["param_groups"][1]["params"]) == len(unused["optimizer"]["param_groups"][1]["params"]) + 1


# -- optimizer and schedule


def network(a_bits=4, quantize_image=False, **others):
    settings = train_settings.settings_of(train_settings.defaults() | others | {
        "a_bits": a_bits, "alpha_init": 5.0, "quantize_image": quantize_image})
    return settings, starting.build_network(settings, 10, torch.device("cpu"))


@pytest.mark.parametrize("no_flip", [False, True])
def test_images_are_mirrored_unless_that_is_unwanted(no_flip):
    settings, net = network(no_flip=no_flip, batch_size=20, limit_train=200)
    data = dataclasses.replace(datasets.load("digits"), flip=True, pad=0)
    run = Run(settings, net, data, torch.device("cpu"), None)
    seen = torch.cat([x for _, x, _ in run.batches(0)])
    as_they_are = {x.numpy().tobytes() for x in run.train_x}
    share = sum(x.numpy().tobytes() in as_they_are for x in seen) / len(seen)
    assert share == 1 if no_flip else 0.3 < share < 0.7


def test_penalty_has_the_gradient_of_a_squared_clipping_level():
    _, net = network()
    alphas = starting.used_alphas(net)
    assert list(alphas) == [*(f"features.{i}" for i in (4, 8, 11, 15, 18)), "classifier.0", "classifier.3"]
    for i, alpha in enumerate(alphas.values()):
        alpha.data.fill_(i + 1.0)
    penalty = training.alpha_penalty(net, 0.1)
    assert penalty.item() == pytest.approx(0.1 * (1 + 4 + 9 + 16 + 25 + 36 + 49))
    penalty.backward()
    assert [alpha.grad.item() for alpha in alphas.values()] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.2, 1.4])
    assert net.features[0].act_quant.act_alpha.grad is None
    assert list(starting.used_alphas(network(quantize_image=True)[1]))[0] == "features.0"
    assert starting.used_alphas(network(a_bits=32)[1]) == {}


def test_clp_pulls_the_clipping_levels_down(tmp_path):
    alpha = "classifier.0.act_quant.act_alpha"
    levels = [
        quick(tmp_path / str(i), "--epochs", "1", *flags)[1]["state_dict"][alpha].item()
        for i, flags in enumerate([[], ["--clp", "--a_lambda", "0.1"], ["--alpha_wd", "0.2"]])
    ]
    # a_lambda alpha^2 in the loss and a decay of 2 a_lambda have the same gradient.
    assert levels[1] < levels[0] - 0.5 and levels[2] == pytest.approx(levels[1], rel=1e-2)


def test_clipping_levels_have_a_group_of_their_own():
    settings, net = network(alpha_lr=0.003, alpha_wd=0.7, lr=0.2, wd=0.01)
    weights, alphas = training.build_optimizer(net, settings).param_groups
    assert (weights["initial_lr"], weights["weight_decay"]) == (0.2, 0.01)
    assert (alphas["initial_lr"], alphas["weight_decay"], len(alphas["params"])) == (0.003, 0.7, 7)
    assert len(weights["params"]) + len(alphas["params"]) + 1 == len(list(net.parameters()))  # 1: features.0, unused
    assert weights["nesterov"]
    net.act_alpha = torch.nn.Parameter(torch.ones(()))  # a network of others may have one that is none of ours
    assert any(p is net.act_alpha for p in training.build_optimizer(net, settings).param_groups[0]["params"])


@pytest.mark.parametrize("kind, step, expected", [
    # 40 steps, 10 an epoch
    ("step", 0, 1), ("step", 9, 1), ("step", 10, 0.5), ("step", 29, 0.5), ("step", 30, 0.05), ("step", 39, 0.05),
    ("cosine", 0, 1), ("cosine", 20, 0.5), ("cosine", 10, 0.8535533905932737), ("cosine", 39, 0.0015413331334360182),
    ("triangular", 0, 0.1), ("triangular", 4, 0.5), ("triangular", 9, 1), ("triangular", 10, 1), ("triangular", 25, 0.5),
    ("triangular", 39, 1 / 30),
])
def test_schedule(kind, step, expected):
    assert schedule_factor(kind, step, 40, 10, [1, 3], [0.5, 0.1]) == pytest.approx(expected)


def test_schedule_of_a_single_step():
    assert schedule_factor("triangular", 0, 1, 1) == 1


def test_the_schedule_is_applied_to_both_groups(tmp_path):
    _, checkpoint = quick(tmp_path, "--schedule", "1", "2", "--gammas", "0.5", "0.1", "--alpha_lr", "0.01")
    assert [group["lr"] for group in checkpoint["optimizer"]["param_groups"]] == pytest.approx([0.05 * 0.05, 0.01 * 0.05])


# -- bad input


@pytest.mark.parametrize("flags, words", [
    (["--w_bits", "9"], "--w_bits: 9 is not 1 to 8, or 32"),
    (["--a_bits", "0"], "--a_bits: 0 is not 1 to 8, or 32"),
    (["--lr", "nan"], "--lr: nan is not a number above 0"),
    (["--lr", "-1"], "--lr: -1 is not a number above 0"),
    (["--epochs", "0"], "--epochs: 0 is not"),
    (["--epochs", "many"], "--epochs: many is not"),
    (["--batch_size", "1"], "--batch_size: 1 is not 2 or more"),
    (["--val_split", "1"], "--val_split: 1 is not"),
    (["--model", "resnet20"], "choose from resnet18_quant, resnet20_quant, vgg16_quant, vgg7_quant"),
    (["--model", "vgg7_quant_eval"], "choose from"),
    (["--dataset", "mnist"], "--dataset: invalid choice"),
    (["--bogus"], "there is no flag --bogus (see"),
    (["--epoch", "2"], "there is no flag --epoch; the nearest is --epochs (see"),  # not short for --epochs: the scripts would not see it
    (["--ngpu", "2"], "PyTorch finds 0 CUDA GPUs here; processes on CPUs are started by torchrun --nproc_per_node 2"),
    (["--schedule", "3", "5", "--gammas", "0.1"], "--schedule has 2 epochs, --gammas 1"),
    (["--schedule_type", "step"], "needs --schedule and --gammas"),
    (["--dataset", "imagefolder", "--data_path", "no/such/folder"], "no/such/folder"),
    (["--save_path", "{file}/run"], "cannot write to {file}/run"),
    (["--resume", "no/such/file"], "no/such/file: no such file"),
    (["--resume", "{folder}"], "is a folder"),
    (["--resume", "{file}"], "not a readable PyTorch file"),
    (["--resume", "{run}/model_best.pth.tar"], "start from them with --fine_tune"),
    (["--resume", "{run}/checkpoint.pth.tar", "--w_bits", "2", "--lr", "0.5"], "--lr 0.5 (the checkpoint has 0.05), --w_bits 2"),
    (["--resume", "{run}/checkpoint.pth.tar", "--model", "vgg16_quant"], "--model vgg16_quant (the checkpoint has vgg7_quant"),
    (["--resume", "{run}/checkpoint.pth.tar", "--overwrite"], "--overwrite starts anew, and --resume goes on"),
    (["--resume", "{run}/checkpoint.pth.tar", "--save_path", "{folder}"], "continued in its own folder"),
    (["--evaluate", "--resume", "{run}/model_best.pth.tar", "--a_bits", "8"], "--a_bits 8 (the checkpoint has 4)"),
    (["--fine_tune"], "it needs the PATH of a checkpoint"),
    (["--fine_tune", "{run}/model_best.pth.tar", "--resume", "{run}/model_best.pth.tar"], "both name a checkpoint"),
    (["--seed", "99999999999999999999"], "--seed: 99999999999999999999 is not a whole number from 0 up"),
    (["--evaluate", "--resume", "{run}/model_best.pth.tar", "--export", "{folder}"], "is a folder: give the name of a file"),
    (["--fine_tune", "{run}/model_best.pth.tar", "--model", "vgg16_quant"], "is of the model vgg7_quant, not vgg16_quant"),
    (["--save_path", "{run}"], "holds a run: continue it with --resume"),
    (["--wq", "lsq"], "--wq: invalid choice: 'lsq'"),
    (["--wq", "sawb", "--w_bits", "1"], "--wq sawb has codes around an exact zero: it needs --w_bits 2 to 8"),
    (["--alpha_init", "fit"], "--alpha_init fit needs the trained network of --fine_tune"),
    (["--distill", "0.5"], "--distill learns from the network that a run starts from: add --fine_tune PATH"),
    (["--distill", "1.5"], "--distill: 1.5 is not from 0 to 1"),
    (["--alpha_init", "0"], "--alpha_init: 0 is not fit or a number above 0"),
    (["--adc_bits", "4"], "--adc_bits is for training through the ADC: add --adc_aware"),
    (["--a_lambda", "4"], "--a_lambda is the factor of the penalty that --clp adds: add --clp"),
    (["--adc_aware", "--adc_share", "layer"], "--adc_share is for plans: add --adc_plan significance"),
    (["--adc_aware", "--adc_plan", "significance", "--adc_calib", "minmax"], "--adc_calib is for uniform bits"),
    (["--adc_aware", "--w_bits", "32"], "--adc_aware needs quantized weights and activations"),
    (["--adc_aware", "--cell_bits", "5"], "--cell_bits is 5; allowed are whole numbers from 1 to 4 (--w_bits)"),
    (["--adc_aware", "--adc_bits", "13"], "--adc_bits is 13; allowed are whole numbers from 1 to 12"),
    (["--export", "file.pt"], "--export writes a trained network: add --evaluate"),
    (["--evaluate", "--resume", "{run}/model_best.pth.tar", "--export", "x.json"], "give the network another ending"),
    (["--about", "digits"], "--about is for the .json of --export"),
    (["--evaluate", "--resume", "{run}/model_best.pth.tar", "--export", "{run}/model_best.pth.tar"], "would replace a file of the run"),
    (["--evaluate", "--resume", "{run}/model_best.pth.tar", "--export", "{run}/config.pt"], "would replace a file of the run itself"),
    (["--evaluate", "--resume", "{run}/model_best.pth.tar", "--export", "{file}/x.pt"], "cannot write to {file}"),
])
def test_bad_input_is_one_line_before_any_work(flags, words, finished, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("text")
    names = {"file": tmp_path / "file", "folder": tmp_path, "run": finished}
    flags = [flag.format(**names) for flag in flags]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load", lambda *_: pytest.fail("loaded data"))
    with pytest.raises(SystemExit) as ended:
        run_main(lambda: train.main(flags))
    out, err = capsys.readouterr()
    assert ended.value.code == 2 and out == ""
    assert err.startswith("error: ") and err.count("\n") == 1
    assert words.format(**names) in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]  # nothing was made


def test_bad_input_in_a_real_process(tmp_path):
    process = subprocess.run([sys.executable, str(ROOT / "train.py"), "--w_bits", "33"], cwd=tmp_path, capture_output=True, text=True)
    assert process.returncode == 2 and process.stdout == "" and process.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_images_of_other_classes_are_not_evaluated(finished, monkeypatch):
    load = datasets.load

    def renamed(*args):
        data = load(*args)
        return dataclasses.replace(data, classes=("zero", *data.classes[1:]))

    monkeypatch.setattr(datasets, "load", renamed)
    with pytest.raises(UserError, match="was trained on other classes: the images have zero instead of 0$"):
        train.main(["--evaluate", "--save_path", str(finished), "--ngpu", "0"])


def test_a_run_is_not_continued_on_other_images(tmp_path, monkeypatch):
    quick(tmp_path, "--epochs", "1")
    checkpoint = load_checkpoint(tmp_path / "checkpoint.pth.tar")
    save_checkpoint(tmp_path / "checkpoint.pth.tar", checkpoint | {"test_acc": None})
    load = datasets.load

    def other(*args):
        data = load(*args)
        images = data.train_x.clone()
        images[0, 0, 0, 0] ^= 255
        return datasets.Dataset(**{**vars(data), "train_x": images, "mean": datasets.pixel_stats(images)[0]})

    monkeypatch.setattr(datasets, "load", other)
    with pytest.raises(UserError, match="the images are not those"):
        train.main(["--resume", "--save_path", str(tmp_path)])


def test_overwrite_leaves_nothing_of_the_old_run(tmp_path, monkeypatch):
    quick(tmp_path, "--epochs", "1")
    monkeypatch.setattr(Run, "fit", lambda self: 0)  # as if killed before the first checkpoint
    train.main(["--save_path", str(tmp_path), "--overwrite"])
    assert not list(tmp_path.glob("*.pth.tar"))


def test_run_killed_beside_its_first_checkpoint_goes_on(tmp_path, monkeypatch):
    """Between model_best.pth.tar and the checkpoint of the first epoch."""
    def save(self):
        if self.epoch:
            raise KeyboardInterrupt
        keep(self)
    keep = Run.save
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Run, "save", save)
        quick(tmp_path / "a", "--epochs", "1")
    assert (tmp_path / "a" / train_settings.BEST).exists()
    assert train.main(["--resume", "--save_path", str(tmp_path / "a")]) == 0
    quick(tmp_path / "b", "--epochs", "1")
    found, wanted = (load_checkpoint(tmp_path / name / train_settings.BEST)["state_dict"] for name in "ab")
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


# -- vgg_cifar_quant.sh


@pytest.fixture
def script(tmp_path, monkeypatch):
    """script(flags..., variables) calls vgg_cifar_quant.sh in a folder of its own: the settings of each call of train.py."""
    shutil.copy(ROOT / "vgg_cifar_quant.sh", tmp_path)
    monkeypatch.chdir(tmp_path)
    stub = tmp_path / "python stub"
    stub.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\necho\n')
    stub.chmod(0o755)

    def script(*flags, **variables):
        done = subprocess.run(["bash", str(tmp_path / "vgg_cifar_quant.sh"), *flags], capture_output=True, text=True, check=True,
                              env=os.environ | {"PYTHON": str(stub)} | variables)
        calls = [call.splitlines() for call in done.stdout.strip().split("\n\n")]
        assert {call[0] for call in calls} == {"train.py"}
        parsed = []
        for call in calls:
            settings, actions, _ = train_settings.parse(call[1:])
            parsed.append((settings, actions))
            path = Path(settings.save_path, train_settings.BEST)  # from which the next one starts
            path.parent.mkdir(parents=True, exist_ok=True)
            save_checkpoint(path, {"state_dict": {}, "config": {}})
        return parsed

    return script


@pytest.mark.parametrize("recipe, variables, epochs", [
    ([], {}, [100, 100]), (["full"], {}, [100, 100]), (["fast"], {}, [12, 20]), (["fast"], {"float_epochs": "3", "epochs": "5"}, [3, 5])])
def test_script_trains_without_and_then_with_quantizers(recipe, variables, epochs, script):
    calls = script(*recipe, "--seed", "3", "--data_path", "a folder", **variables)
    settings = [call for call, _ in calls]
    assert [call.epochs for call in settings] == epochs
    assert [(call.w_bits, call.a_bits, call.lr) for call in settings] == [(32, 32, 0.1), (4, 4, 0.05)]
    common = {(call.wd, call.label_smoothing, call.batch_size, call.cutout, call.val_split) for call in settings}
    assert common == {(5e-4, 0.1, 128, 8, 0.02)}
    assert [(call.weight_clip, call.alpha_init, call.distill) for call in settings] == [(None, 6, 0), (3, "fit", 0.5)]
    assert [call.schedule_type for call in settings] == ["triangular", "cosine"] and settings[1].alpha_lr == 0.01
    assert calls[0][1].fine_tune is None
    for (before, _), (call, actions) in zip(calls, calls[1:]):  # each starts from the one before it
        assert call.wq == "dorefa" and actions.fine_tune == f"{before.save_path}/{train_settings.BEST}"
    assert len({call.save_path for call in settings}) == len(calls)
    assert {(call.seed, call.data_path, call.dataset) for call in settings} == {(3, "a folder", "cifar10")}
    assert all(actions.go_on for _, actions in calls)


# -- go_on, config.json, what a checkpoint may say


def test_go_on_starts_a_run_goes_on_with_it_and_says_that_it_is_finished(tmp_path, monkeypatch, capsys):
    folder = str(tmp_path / "{dataset}_w{wbit}")
    save = Run.save

    def save_and_die(self):
        save(self)
        if self.epoch == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(Run, "save", save_and_die)
    flags = ["--go_on", "--save_path", folder, *FLAGS]
    with pytest.raises(KeyboardInterrupt):
        train.main(flags)
    monkeypatch.setattr(Run, "save", save)
    capsys.readouterr()
    assert train.main(flags) == 0
    assert "continuing" in capsys.readouterr().out
    assert train.main(flags) == 0
    assert "is finished after 3 epochs" in capsys.readouterr().out
    assert (tmp_path / "digits_w4" / "checkpoint.pth.tar").exists()
    with pytest.raises(UserError, match="--go_on continues or starts a run: leave out --resume"):
        train_settings.parse([*flags, "--resume"])


def test_settings_stand_in_config_json_and_in_tensorboard(finished):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = json.loads((finished / "config.json").read_text())
    assert (config["epochs"], config["save_path"], config["cell_bits"]) == (3, str(finished), 1)
    tags = EventAccumulator(str(finished)).Reload().Tags()["scalars"]
    assert "test/acc" in tags


def test_the_images_of_a_run_that_goes_on_are_those_of_its_config_json(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "copy")
    config = json.loads((tmp_path / "copy" / "config.json").read_text())
    (tmp_path / "copy" / "config.json").write_text(json.dumps(config | {"data_path": "elsewhere", "log_file": "/x/y"}))
    resume = ["--resume", str(tmp_path / "copy" / "checkpoint.pth.tar")]
    settings, *_ = train_settings.parse(resume)
    assert (settings.data_path, settings.log_file) == ("elsewhere", "train.log")
    assert train_settings.parse([*resume, "--data_path", "here"])[0].data_path == "here"


def test_a_checkpoint_names_no_files_and_no_actions(finished, tmp_path, monkeypatch):
    """Else a foreign one would have a file overwritten."""
    monkeypatch.chdir(tmp_path)
    foreign = load_checkpoint(finished / "model_best.pth.tar")
    names = {"export": "victim.txt", "about": "x", "overwrite": True, "save_path": "victim", "log_file": "victim.txt",
             "data_path": "victim", "fine_tune": "victim", "resume": "victim", "evaluate": True, "go_on": True}
    save_checkpoint("foreign.pth.tar", foreign | {"config": foreign["config"] | names})
    (tmp_path / "victim.txt").write_text("precious")
    assert train.main(["--evaluate", "--resume", "foreign.pth.tar", "--ngpu", "0"]) == 0
    assert (tmp_path / "victim.txt").read_text() == "precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["foreign.pth.tar", "victim.txt"]
    settings, actions, _ = train_settings.parse(["--evaluate", "--resume", "foreign.pth.tar"])
    assert (settings.data_path, settings.log_file, actions.export) == ("./data", "train.log", None)


@pytest.mark.parametrize("change, words", [
    ({"seed": "abc"}, "has --seed 'abc', which is not a whole number from 0 up"),
    ({"dataset": 7}, "has --dataset 7, which is not one of digits, cifar10"),
    ({"wbit": 9}, "has --w_bits 9, which is not 1 to 8, or 32"), ({"wbit": True}, "has --w_bits True"),
    ({"lr": float("nan")}, "has --lr nan"), ({"schedule": ["x"]}, "has --schedule"), ({"clp": 1}, "has --clp 1"),
    ({"adc_calib": "best"}, "has --adc_calib 'best', which is not one of minmax"), ({"cell_bits": 0}, "has --cell_bits 0"),
    ({"val_split": None}, "has --val_split None"), ({"model": 3}, "has --model 3"),
])
def test_settings_of_a_checkpoint_are_checked_like_flags(change, words, finished, tmp_path):
    for file, flags in (("checkpoint.pth.tar", ["--resume"]), ("model_best.pth.tar", ["--evaluate", "--resume"])):
        checkpoint = load_checkpoint(finished / file)
        save_checkpoint(tmp_path / "a.pth.tar", checkpoint | {"config": checkpoint["config"] | change})
        with pytest.raises(UserError, match=words.replace("[", "\\[")):
            train_settings.parse([*flags, str(tmp_path / "a.pth.tar")])


def test_checkpoints_of_before_keep_their_settings(finished, tmp_path):
    """Names of earlier versions: map, ranges shared per "reference", and the folders, which are not taken."""
    checkpoint = load_checkpoint(finished / "checkpoint.pth.tar")
    old = checkpoint["config"] | {"map": "conv", "adc_per": "reference", "adc_aware": True, "save_path": "x", "ngpu": None}
    del old["crossbar_layers"]
    save_checkpoint(tmp_path / "checkpoint.pth.tar", checkpoint | {"config": old})
    settings, *_ = train_settings.parse(["--resume", str(tmp_path / "checkpoint.pth.tar")])
    assert (settings.crossbar_layers, settings.calibration.per) == ("conv", "alike")
    assert settings.save_path == str(tmp_path)


def test_events_of_steps_that_are_repeated_are_dropped(tmp_path, monkeypatch):
    """A run that dies behind a checkpoint has logged steps that its continuation logs again."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    end = Run.end_epoch

    def die_in_the_second(self):
        end(self)
        if self.epoch == 2:  # its events are written, its checkpoint is lost
            self.writer.flush()
            shutil.copy(tmp_path / "first.pth.tar", tmp_path / "run" / "checkpoint.pth.tar")
            raise KeyboardInterrupt
        shutil.copy(tmp_path / "run" / "checkpoint.pth.tar", tmp_path / "first.pth.tar")

    monkeypatch.setattr(Run, "end_epoch", die_in_the_second)
    with pytest.raises(KeyboardInterrupt):
        quick(tmp_path / "run")
    monkeypatch.setattr(Run, "end_epoch", end)
    assert train.main(["--resume", "--save_path", str(tmp_path / "run")]) == 0
    events = EventAccumulator(str(tmp_path / "run")).Reload()
    assert [event.step for event in events.Scalars("val/acc")] == [8, 17, 26]  # each once


@pytest.mark.parametrize("change", [{"optimizer": 7}, {"step": "x"}, {"step": -5}, {"step": 10**6}, {"epoch": 10**6}, {"history": 7},
                                    {"history": []}, {"meter": {}}, {"rng": 3}])
def test_a_checkpoint_that_somebody_edited_is_one_line(change, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    checkpoint = load_checkpoint(finished / "checkpoint.pth.tar") | {"test_acc": None}
    save_checkpoint(tmp_path / "run" / "checkpoint.pth.tar", checkpoint | change)
    with pytest.raises(UserError, match=r"checkpoint.pth.tar(:| cannot be continued)") as error:
        train.main(["--resume", "--save_path", str(tmp_path / "run")])
    assert "\n" not in str(error.value)


def test_settings_of_other_code_that_no_flag_takes_are_left_out(finished, tmp_path):
    """They may mean something else there."""
    state = load_checkpoint(finished / "model_best.pth.tar")["state_dict"]
    torch.save({"state_dict": state, "config": {"lr": 0, "dataset": "digits", "wbit": 4, "seed": "x"}}, tmp_path / "other.pth")
    settings, *_ = train_settings.parse(["--evaluate", "--resume", str(tmp_path / "other.pth")])
    assert (settings.lr, settings.seed, settings.dataset) == (0.05, 0, "digits")


def test_an_empty_folder_name_is_refused():
    with pytest.raises(UserError, match="--save_path is empty"):
        train_settings.parse(["--save_path", ""])


# -- flags that nothing else would miss


def test_the_best_weights_are_tested_not_the_last(tmp_path, monkeypatch):
    losses, seen = iter([(0.1, 90.0), (0.5, 80.0), (9.9, 1.0)]), []
    monkeypatch.setattr(training, "evaluate", lambda net, *args, **options: (
        seen.append(net.features[4].weight.detach().clone()), next(losses))[1])
    quick(tmp_path, "--epochs", "2")
    best = load_checkpoint(tmp_path / "model_best.pth.tar")["state_dict"]["features.4.weight"]
    assert torch.equal(seen[-1], best) and not torch.equal(seen[-1], seen[1])


def test_a_run_without_its_best_weights_says_so(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    save_checkpoint(tmp_path / "run" / "checkpoint.pth.tar", load_checkpoint(finished / "checkpoint.pth.tar") | {"test_acc": None})
    (tmp_path / "run" / "model_best.pth.tar").unlink()
    with pytest.raises(UserError, match="model_best.pth.tar is missing"):
        train.main(["--resume", "--save_path", str(tmp_path / "run")])


def test_exports_say_how_long_and_how_well_it_was_trained(finished, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    start = load_checkpoint(finished / "model_best.pth.tar")
    save_checkpoint("a.pth.tar", start | {"seconds": 7200.0, "epoch": 7})
    train.main(["--evaluate", "--resume", "a.pth.tar", "--export", "a.pt", "--ngpu", "0"])
    facts = json.loads(Path("a.json").read_text())
    assert facts["hours"] == 2 and facts["validation_accuracy"] == start["best_acc"] and load_checkpoint("a.pt")["epoch"] == 7
    assert quick(tmp_path / "b", "--fine_tune", "a.pth.tar", "--epochs", "1")[1]["seconds"] > 7200


@pytest.mark.parametrize("amp", ["bf16", "off"])
def test_training_computes_in_the_type_of_amp(amp, monkeypatch, tmp_path):
    seen, forward = [], models.vgg.VGG.forward
    monkeypatch.setattr(models.vgg.VGG, "forward", lambda self, x: (
        seen.append((self.training, torch.is_autocast_enabled("cpu"))), forward(self, x))[1])
    quick(tmp_path, "--epochs", "1", "--amp", amp, "--limit_train", "60")
    assert {enabled for training_, enabled in seen if training_} == {amp == "bf16"}


def test_images_are_normalised_as_in_training(finished, tmp_path, capsys):
    checkpoint, mean, std = load_checkpoint(finished / "model_best.pth.tar"), [0.6] * 3, [2.0] * 3
    save_checkpoint(tmp_path / "a.pth.tar", checkpoint | {"data": checkpoint["data"] | {"mean": mean, "std": std}})
    train.main(["--evaluate", "--resume", str(tmp_path / "a.pth.tar"), "--ngpu", "0"])
    data, net = datasets.load("digits"), starting.build_network(stored_settings(checkpoint), 10, torch.device("cpu"))
    net.load_state_dict(checkpoint["state_dict"])
    with torch.no_grad():
        right = (net.eval()(datasets.normalize(data.test_x, mean, std)).argmax(1) == data.test_y).double().mean()
    assert f"test accuracy {100 * right:.2f} %" in capsys.readouterr().out


def test_weights_begin_from_the_seed(tmp_path):
    nothing = ["--epochs", "1", "--lr", "1e-12", "--wd", "0", "--limit_train", "60"]
    one, other = (quick(tmp_path / seed, "--seed", seed, *nothing)[1]["state_dict"]["features.4.weight"] for seed in "01")
    assert (one - other).abs().mean() > 1e-3


def test_weights_are_clipped_before_the_first_step(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(Run, "fit", lambda self: seen.append(self.net.features[4].weight.detach().clone()) or 0)
    train.main(["--save_path", str(tmp_path), *FLAGS, "--weight_clip", "1.2"])
    assert seen[0].abs().max() / seen[0].square().mean().sqrt() < 1.4


def test_momentum_is_that_of_the_flag():
    settings, _, _ = train_settings.parse(["--momentum", "0.5", "--save_path", "none"])
    net = starting.build_network(settings, 10, torch.device("cpu"))
    assert {group["momentum"] for group in optimizing.build_optimizer(net, settings).param_groups} == {0.5}


def test_networks_of_others_have_a_learning_rate_of_their_own():
    assert train_settings.settings_of(train_settings.defaults() | {"model": "net.py:small", "qat": True}).lr == 0.005


def test_cutout_paints_squares_of_the_mean_colour():
    settings, _, _ = train_settings.parse(["--cutout", "9", "--batch_size", "20", "--save_path", "none", "--limit_train", "200"])
    images = dataclasses.replace(datasets.load("digits"), pad=0, flip=False, mean=(0.2, 0.4, 0.6))
    run = Run(settings, starting.build_network(settings, 10, torch.device("cpu")), images, torch.device("cpu"), None)
    _, x, _ = next(run.batches(0))
    painted = (x == torch.tensor([51, 102, 153], dtype=torch.uint8)[:, None, None]).all(1).sum((1, 2))
    assert (painted >= 16).all()  # squares may reach over an edge


def test_trivial_augment_leaves_inputs_of_a_transform_alone():
    settings, _, _ = train_settings.parse(["--trivial_augment", "--save_path", "none"])
    images = datasets.load("digits", transform=lambda image: torch.zeros(3, 32, 32))
    with pytest.raises(UserError, match="--trivial_augment changes the images of a data set"):
        Run(settings, torch.nn.Flatten(), images, torch.device("cpu"), None)
