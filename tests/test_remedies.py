"""`eval.py --remedy`: which settings remedies make, that their numbers are those of the settings by hand, their order, and a training."""

import csv
import json
import os
import signal
import sys
import threading
import time
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_eval import FAST, refused, results, scene, without_pictures  # noqa: F401
from test_limits import trained  # noqa: F401

import eval as evaluation
import train
from experiment.inputs import foreign
from experiment.inputs.checkpoint import load_checkpoint, save_checkpoint
from experiment.program import cli
from experiment.program.cli import UserError
from experiment.report.remedy_report import Found, Tried, table
from experiment.settings import train_settings
from experiment.settings.eval_settings import all_settings, parse
from experiment.settings.remedies import remedies_for
from experiment.sweep import bench, remedies, retraining
from models.quant import Calibration, CrossbarSpec
from models.quant.measuring.measure import Record
from models.quant.measuring.setting import Setting

pytestmark = pytest.mark.usefixtures("one_thread")

BY_HAND = {"pairs": "--weights pair", "ranges of the chip": "--calib_on chip", "8 rows": "--rows 8", "4 rows": "--rows 4",
           "4-bit ADC": "--adc_bits 4", "5-bit ADC": "--adc_bits 5", "planned bits": "--adc_plan significance",
           "planned bits by ones": "--adc_plan ones", "1-bit cells": "--cell_bits 1"}
USUAL = ["--cell_bits", "2", "--adc_bits", "3", "--rows", "16", "--sigma", "2", "--chips", "3"]


def one(*flags, **rows):
    """The setting that flags mean."""
    [(settings, _)] = [parse(["--resume", *flags])] if flags else [(None, None)]
    [found] = settings.settings if flags else all_settings(rows, 4, 4)
    return found


def remedied(setting):
    """`{remedy: its setting, or why there is none}`."""
    found = {}
    for remedy in remedies_for(setting):
        try:
            found[remedy.name] = remedy.of(setting)
        except ValueError as error:
            found[remedy.name] = str(error)
    return found


# ---- which there are ---------------------------------------------------------------------------------------------------


def test_remedies_are_the_settings_of_their_flags(trained):  # noqa: F811
    found = remedied(one(trained, *USUAL))
    assert found.pop("correction on the chip") == "it has that"
    assert found == {name: one(trained, *USUAL, *flags.split()) for name, flags in BY_HAND.items()}


def test_what_makes_no_difference_to_a_remedied_setting_is_in_it_no_more(trained):  # noqa: F811
    """A plan knows no rule, and one by ones always skips idle reads: else by hand it would be another setting."""
    flags = ["--adc_bits", "3", "--adc_idle", "skip"]
    found = remedied(one(trained, *flags, "--adc_calib", "percentile", "--adc_correct", "none"))
    correct = ["--adc_correct", "none"]
    assert found["planned bits"] == one(trained, *flags, *correct, "--adc_plan", "significance")
    assert found["planned bits by ones"] == one(trained, *flags, *correct, "--adc_plan", "ones")
    assert found["correction on the chip"] == one(trained, *flags, "--adc_calib", "percentile")


@pytest.mark.parametrize("rows, name, why", [
    ({"weights": ["pair"]}, "pairs", "it has that"), ({}, "ranges of the chip", "its cells are ideal"),
    ({"adc_range": ["full"]}, "planned bits", "--adc_plan is 'significance' with adc_range 'full'"),
    ({"adc_range": ["full"]}, "ranges of the chip", "its ranges are full, not calibrated"),
    ({"adc_range": ["ideal"]}, "2-bit ADC", "it has no ADC"), ({"adc_bits": [12]}, "13-bit ADC", "--adc_bits is 13"),
    ({"adc_plan": ["ones"]}, "planned bits by ones", "it has that"), ({"cell_bits": [1]}, "1-bit cells", "it has that"),
    ({"adc_plan": ["ones"], "adc_bits": [7.5]}, "8.5-bit ADC", "--adc_bits is 8.5"), ({"rows": [1]}, "0 rows", "--rows is 0"),
    ({"rows": [64], "adc_range": ["ideal"]}, "pairs", None)])
def test_what_is_left_out_says_why(rows, name, why):
    found = remedied(one(**{"rows": [64], **rows}))[name]
    assert found.startswith(why) if why else isinstance(found, Setting)


def test_two_remedies_together():
    setting = one(cell_bits=[2], rows=[64], reference=["digital"])
    pairs, _, _, rows, *_ = remedies_for(setting)
    assert (pairs + rows).of(setting) == one(cell_bits=[2], rows=[32], weights=["pair"])
    assert (str(pairs + rows), pairs.kind, rows.kind) == ("pairs, 32 rows", "weights", "rows")


def test_noise_on_weights_has_no_remedies():
    assert remedies_for(one(weight_noise=[0.1])) == []


# ---- their order ---------------------------------------------------------------------------------------------------------


def record(accuracy, chips=None):
    return Record(Setting(CrossbarSpec()), None, accuracy, 90.0, 0, 1.0, "numba", examples=100, chip_accuracies=chips)


def tried(name, won, energy=None, error=0.0):
    return Tried(name, record(80 + won), won, error, {} if energy is None else {"energy": energy, "area": -energy}, won >= 5)


def test_what_costs_nothing_is_first_then_points_for_a_joule():
    found = Found(record(80.0), 85.0, [tried("dear", 6, 3.0), tried("lost", -1, -1.0), tried("cheap", 1, 0.1), tried("nothing", 0, 0.0),
                                       tried("saves", 2, -1.0), tried("same", 4, 0.0), tried("chance", 3, -1.0, error=1.6)])
    found.sort("energy")
    assert [each.name for each in found.tried] == ["same", "saves", "cheap", "dear", "chance", "nothing", "lost"]
    assert [each.worth("energy") for each in found.tried[2:4]] == [10.0, 2.0]
    found.sort("area")  # which is less where the energy is more
    assert [each.name for each in found.tried[:4]] == ["dear", "same", "cheap", "saves"]
    found.sort("points")
    assert [each.name for each in found.tried[:4]] == ["dear", "same", "saves", "cheap"]


def test_few_chips_must_win_more():
    """Student's t of 2.5 %: 12.7 standard errors of two chips, 4.3 of three, 2.0 of a hundred."""
    for chips, least in ((2, 12.71), (3, 4.303), (100, 1.984)):
        for won, clear in ((1.01 * least, True), (0.99 * least, False)):
            assert Tried("a", record(80, (80.0,) * chips), won, 1.0, {}, False).clear == clear


def test_a_win_of_which_no_error_is_known_is_not_clear():
    assert not tried("a", 50, error=None).clear


def test_a_table_without_costs():
    found = Found(record(80.0, (79.0, 81.0)), 85.0, [tried("pairs", 6, error=0.5), tried("rows", 0.5, error=0.5)], {"ADC": "it has that"})
    lines = table(found).splitlines()
    assert lines[0] == "remedies of 1-bit cells, 6-bit ADC, calibrated: 80.00 %, software 90.00 %, asked for 85.00 %"
    assert [line.split() for line in lines[1:]][:1] == [["remedy", "accuracy", "%", "won", "kept"]]
    assert [" ".join(line.split()) for line in lines[3:7]] == [
        "as it is 80.00 no", "1 pairs 86.00 +6.00 ± 0.50 yes", "2 rows 80.50 +0.50 ± 0.50 no", "left out: ADC (it has that)"]


# ---- the whole command ---------------------------------------------------------------------------------------------------


@pytest.fixture
def evaluate(trained, monkeypatch):  # noqa: F811
    """evaluate(flags..., stop=n): the settings that were measured, of which the n-th is interrupted."""

    def evaluate(*flags, stop=None):
        measured, real = [], bench.measure

        def spy(*args, **options):
            if args[3]:  # the software is passed anew where its reads are counted for costs
                measured.append((str(args[3]), args[3].chips and args[3].chips.chip_seed))
            if len(measured) == stop:
                raise KeyboardInterrupt
            return real(*args, **options)

        with monkeypatch.context() as patch:
            patch.setattr(bench, "measure", spy)
            without_pictures(patch)
            evaluation.main(["--resume", trained, "--ngpu", "0", "--limit", "30", "--calib_images", "8", *flags])
        return measured

    return evaluate


REMEDY = [*USUAL, "--cost", "rram_32nm", "--remedy", "--at_least", "accuracy=software-0.5"]
MORE = ["--limit", "110", "--chips", "4"]  # of which some wins are clear


def test_numbers_are_those_of_the_settings_by_hand(evaluate, capsys):
    evaluate(*REMEDY, *MORE, "--html")
    text = capsys.readouterr().out
    rows = {row["remedy"]: row for row in json.loads(Path("save/remedies.json").read_text())}
    own = rows.pop(None)
    assert rows.pop("correction on the chip")["left_out"] == "it has that"
    both = next(name for name in rows if ", " in name)
    assert rows.keys() == {*BY_HAND, both} and own["software"] == 100 and own["bound"] == 99.5 and own["accuracy"] < 99.5
    by_hand = BY_HAND | {both: " ".join(BY_HAND[name] for name in both.split(", "))}
    on_chip = {name for name, flags in by_hand.items() if "--calib_on" in flags}  # of all rows of a table
    also = [" ".join([*USUAL[:-2], flags]) for name, flags in by_hand.items() if name not in on_chip]
    evaluate(*USUAL, "--also", *also, "--cost", "rram_32nm", *MORE, "--save_path", "hand")
    _, first, *lines = json.loads(Path("hand/table.json").read_text())
    lines = dict(zip((name for name in by_hand if name not in on_chip), lines, strict=True))
    for name in on_chip:
        evaluate(*USUAL, *by_hand[name].split(), "--cost", "rram_32nm", *MORE, "--save_path", "hand")
        lines[name] = json.loads(Path("hand/table.json").read_text())[1]
    for name, line in (None, first), *lines.items():
        row = rows[name] if name else own
        assert [row[key] for key in ("accuracy", "energy_uJ", "area_mm2")] == [line[key] for key in ("accuracy", "energy_uJ", "area_mm2")]
        if name:
            chips = [b - a for a, b in zip(first["chip_accuracies"], line["chip_accuracies"])]
            assert row["won"] == pytest.approx(np.mean(chips))
            assert row["won_standard_error"] == pytest.approx(np.std(chips, ddof=1) / 4**0.5)
            assert row["more_energy_uJ"] == line["energy_uJ"] - first["energy_uJ"] and row["kept"] == (line["accuracy"] >= 99.5)
            assert row["more_area_mm2"] == line["area_mm2"] - first["area_mm2"]
    assert [row["remedy"] or None for row in csv.DictReader(open("save/remedies.csv"))] == [
        None, *rows, "correction on the chip"]
    assert Path("save/remedies.png").exists() and "remedies" in Path("save/results.html").read_text()
    assert "\nremedies of 2-bit cells, 3-bit ADC, calibrated" in text and "left out: correction on the chip (it has that)" in text
    wins = [name for name, row in rows.items() if row["clear"]]
    assert set(both.split(", ")) <= {*wins} and wins == list(rows)[:len(wins)]
    alone = sorted((name for name in wins if name != both), key=lambda name: -rows[name]["won"])
    assert alone[0] in both.split(", ")


def test_remedies_go_on_after_a_kill_and_are_there_the_second_time(evaluate):
    with pytest.raises(KeyboardInterrupt):
        evaluate(*REMEDY, stop=9)
    rest = evaluate(*REMEDY)
    found = Path("save/remedies.json").read_text()
    assert rest and evaluate(*REMEDY) == [] and Path("save/remedies.json").read_text() == found
    beside = evaluate(*REMEDY, "--save_path", "other")
    assert len(beside) == len(rest) + 8 and len({*beside}) == len(beside) and Path("other/remedies.json").read_text() == found


def test_chips_that_agree_are_still_of_few_examples(evaluate):
    evaluate(*REMEDY, "--limit", "12", "--chips", "2")
    rows = json.loads(Path("save/remedies.json").read_text())
    errors = [row["won_standard_error"] for row in rows if row["remedy"] and row["left_out"] is None]
    assert errors and min(errors) >= 100 / 12 / 2**0.5 * (1 - 1e-9)


def test_settings_within_the_bound_need_none(evaluate, capsys):
    Path("save").mkdir(exist_ok=True)
    Path("save/remedies.json").write_text("of an earlier command")
    evaluate("--rows", "16", "--adc_bits", "8", "--remedy", "--at_least", "accuracy=50")
    assert "1-bit cells, 8-bit ADC, calibrated, rows 16: 100.00 % keeps 50.00 %, and needs no remedy" in capsys.readouterr().out
    assert not Path("save/remedies.json").exists()


@pytest.mark.parametrize("flags, words", [
    (["--remedy"], "--remedy needs one bound, and 0 are given: --at_least accuracy=software-0.5"),
    (["--remedy", "--at_least", "accuracy=90", "accuracy=95"], "needs one bound, and 2 are given"),
    (["--remedy", "--at_most", "accuracy=90"], "more is better: give a bound such as --at_least"),
    (["--remedy", "--at_least", "speed=1"], "--at_least speed=1: give NAME=VALUE with one of accuracy"),
    (["--remedy_epochs", "1"], "--remedy_epochs is for remedies: add --remedy"),
    (["--remedy_by", "area", "--remedy", "--at_least", "accuracy=90"], "--remedy_by area needs costs: add --cost"),
    (["--remedy", "--at_least", "accuracy=90", "--remedy_epochs", "1", "--validation"], "trains with validation images of its own"),
    (["--remedy", "--at_least", "accuracy=90", "--dry_run"], "--dry_run does not go with --remedy")])
def test_bad_input_is_one_line(flags, words, refused, trained):  # noqa: F811
    refused(["--resume", trained, *flags], words)


# ---- training --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [
    ["--device", "techC", "--device_time", "1d", "--stuck_on", "0.01", "--read_noise", "1", "--chips", "3", "--chip_seed", "5"],
    ["--sigma", "4", "--adc_plan", "significance", "--adc_share", "layer"], ["--weights", "pair", "--rows", "32", "--calib_on", "chip",
                                                                          "--device", "mine.csv"]])
def test_a_training_is_on_chips_of_the_setting(flags, trained):  # noqa: F811
    Path("mine.csv").write_text("level,conductance_uS,std_uS\n0,1,0.2\n1,10,1\n2,20,1\n3,30,2\n")
    settings, _ = parse(["--resume", trained, "--cell_bits", "2", "--adc_bits", "4", *flags])
    [setting] = settings.settings
    made, actions, _ = train_settings.parse([*retraining.flags_of(settings, setting, 2), "--save_path", "new"])
    assert (made.epochs, actions.fine_tune, made.adc_aware, made.dataset) == (2, trained, True, "digits")
    plan = {"adc_max_bits"} if not setting.spec.planned else set()
    assert all(getattr(made.spec, item.name) == getattr(setting.spec, item.name) for item in fields(CrossbarSpec) if item.name not in plan)
    assert all(getattr(made.calibration, item.name) == getattr(setting.calibration, item.name) for item in fields(Calibration))
    ours, theirs = setting.chips, made.chips
    assert theirs.drawn.sigma_percent == ours.drawn.sigma_percent and theirs.device.time == ours.device.time
    assert all(theirs.value(name) == ours.value(name) for name in ("stuck_on", "stuck_off", "read_noise", "sigma"))
    assert theirs.chip_seed == ours.chip_seed + ours.chips  # training sees chips above it, none of which is measured


def test_what_train_does_not_train(trained):  # noqa: F811
    for flags, words in ((["--per_layer", "classifier.3:rows=8"], "train.py knows no hardware of single layers"),
                         (["--adc_range", "full"], "train.py trains through calibrated ranges, and these are full")):
        settings, _ = parse(["--resume", trained, *flags])
        with pytest.raises(UserError, match=words):
            retraining.flags_of(settings, settings.settings[0], 1)
    with pytest.raises(UserError, match="networks that classify the images of a data set, and .* is measured on texts"):
        retraining.flags_of(replace(settings, dataset="texts"), settings.settings[0], 1)


def test_an_epoch_of_training_is_a_remedy(evaluate, monkeypatch):
    """The number is that of the trained checkpoint by hand; what was trained is not trained again."""
    trainings = []

    def run_here(command, **options):
        trainings.append(command)
        return SimpleNamespace(returncode=train.main(command[2:]) or 0, stderr=""), False

    monkeypatch.setattr(retraining, "run_program", run_here)
    evaluate(*REMEDY, "--remedy_epochs", "1")
    row = next(row for row in json.loads(Path("save/remedies.json").read_text()) if row["remedy"] == "1 epoch on chips")
    [checkpoint] = Path("save/remedies").glob("*/model_best.pth.tar")
    evaluation.main(["--resume", str(checkpoint), "--ngpu", "0", "--limit", "30", "--calib_images", "8", *USUAL, "--save_path", "hand"])
    line = json.loads(Path("hand/table.json").read_text())[1]
    assert row["accuracy"] == line["accuracy"] and row["energy_uJ"] > 0 and row["setting"] == row["of"]
    assert str(checkpoint.resolve()) in {each["checkpoint"] for each in results("save")}
    assert evaluate(*REMEDY, "--remedy_epochs", "1") == [] and "--go_on" in trainings[1] and trainings[0] == trainings[1]


OTHERS = """
from torch import nn

def small():
    return nn.Sequential(nn.Conv2d(3, 4, 5, stride=3), nn.ReLU(), nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Linear(36, 10))
"""


@pytest.fixture
def others(trained):  # noqa: F811
    """Flags of eval.py for a network of others, whose weights are those of a file."""
    Path("net.py").write_text(OTHERS)
    torch.save(foreign.load("net.py:small").network.state_dict(), "small.pt")
    return ["--model", "net.py:small", "--state", "small.pt", "--dataset", "digits", "--w_bits", "4", "--a_bits", "3"]


def test_a_network_of_others_is_trained_on_chips_of_the_setting(others):
    more = ["--skip", "0", "--inputs", "offset", "--first_last_bits", "4", "--device", "techA", "--chips", "3", "--chip_seed", "5"]
    settings, _ = parse([*others, *more, "--cell_bits", "2", "--adc_bits", "4"])
    [setting] = settings.settings
    made, actions, _ = train_settings.parse([*retraining.flags_of(settings, setting, 2), "--save_path", "new"])
    assert (made.model, made.state, made.w_bits, made.a_bits, made.skip) == ("net.py:small", "small.pt", 4, 3, ["0"])
    assert (made.inputs, made.first_last_bits, made.dataset, made.epochs, made.adc_aware) == ("offset", 4, "digits", 2, True)
    assert actions.fine_tune is None and made.spec.cell_bits == 2 and made.chips.chip_seed == setting.chips.chip_seed + 3
    assert made.chips.drawn.name == setting.chips.drawn.name

    save_checkpoint("own.pt", {"state_dict": {}, "config": made.of_computation()})
    settings, _ = parse(["--resume", "own.pt", "--model", "net.py:small", "--cell_bits", "2"])
    made, actions, _ = train_settings.parse([*retraining.flags_of(settings, settings.settings[0], 1), "--save_path", "new"])
    assert (actions.fine_tune, made.state, made.skip, made.inputs) == ("own.pt", None, ["0"], "offset")


def test_an_epoch_of_training_is_a_remedy_for_a_network_of_others(others, monkeypatch):
    """The number is that of the trained checkpoint by hand, from weights of a file and from those of a checkpoint."""
    monkeypatch.setattr(retraining, "run_program", lambda command, **_: (
        SimpleNamespace(returncode=train.main(command[2:]) or 0, stderr=""), False))
    monkeypatch.setattr(remedies, "remedies_for", lambda setting: [])
    without_pictures(monkeypatch)
    few = ["--ngpu", "0", "--limit", "60", "--cell_bits", "2", "--adc_bits", "3", "--rows", "16"]
    asked = ["--remedy", "--remedy_epochs", "1", "--at_least", "accuracy=99.99", "--save_path"]
    begin = others
    for number in range(2):
        evaluation.main([*begin, *few, *asked, f"save{number}"])
        _, row = json.loads(Path(f"save{number}/remedies.json").read_text())
        [checkpoint] = Path(f"save{number}/remedies").glob("*/model_best.pth.tar")
        begin = ["--resume", str(checkpoint), "--model", "net.py:small"]
        evaluation.main([*begin, *few, "--save_path", f"hand{number}"])
        assert row["remedy"] == "1 epoch on chips" and row["left_out"] is None
        assert row["accuracy"] == json.loads(Path(f"hand{number}/table.json").read_text())[-1]["accuracy"]
        commands = load_checkpoint(checkpoint)["commands"]
        assert ("--fine_tune" in commands[-1]) == bool(number) and len(commands) == 1 + number
    assert row["won"] is not None


@pytest.mark.parametrize("code, stderr, words", [(2, "x\nerror: no such thing\n", "no such thing"), (-9, "epoch 1", "ended with -9")])
def test_a_training_that_fails_is_left_out(code, stderr, words, evaluate, monkeypatch):
    monkeypatch.setattr(retraining, "run_program", lambda *_, **__: (SimpleNamespace(returncode=code, stderr=stderr), False))
    evaluate(*REMEDY[:-1], "accuracy=99.99", "--remedy_epochs", "1", "--chips", "1", "--limit", "8")
    rows = json.loads(Path("save/remedies.json").read_text())
    assert words in {row["remedy"]: row["left_out"] for row in rows}["1 epoch on chips"]


def test_a_training_that_was_stopped_stops_all(evaluate, monkeypatch):
    monkeypatch.setattr(retraining, "run_program", lambda *_, **__: (SimpleNamespace(returncode=130, stderr=""), True))
    with pytest.raises(KeyboardInterrupt):
        evaluate(*REMEDY[:-1], "accuracy=99.99", "--remedy_epochs", "1", "--chips", "1", "--limit", "8")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("ready", [True, False])
def test_a_signal_to_the_parent_alone_ends_the_program_that_runs(number, ready, tmp_path, monkeypatch):
    """Whether it handles it, as train.py does, or is not that far yet."""
    code = f"import signal, sys, time, pathlib; {'signal.signal(15, lambda *_: sys.exit(143));' * ready}"
    code += f"pathlib.Path({str(tmp_path / 'up')!r}).touch(); time.sleep(60)"
    monkeypatch.setattr(cli, "PATIENCE", 0)

    def tell():
        while not (tmp_path / "up").exists():
            time.sleep(0.05)
        os.kill(os.getpid(), number)

    threading.Thread(target=tell).start()
    done, stopped = cli.run_program([sys.executable, "-c", code])
    assert stopped and done.returncode == (143 if ready else -15)
    assert cli.run_program([sys.executable, "-c", "pass"])[1] is False
