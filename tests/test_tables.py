"""benchmarks/tables.py: the commands of each table, and the Markdown that comes of their rows."""

import argparse
import json
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from experiment.settings import train_settings
from experiment.inputs.checkpoint import save_checkpoint
from experiment.program.cli import UserError, run_main
from experiment.settings.eval_settings import all_settings

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import common  # noqa: E402
import tables  # noqa: E402

ROW = {"cell_bits": 1, "adc_bits": 6, "weights": "offset", "rows": 128, "mapping": "tap", "reference": "analog", "dac_bits": 1,
       "adc_range": "calibrated", "adc_plan": "uniform", "adc_idle": "convert", "map": "all", "device": None, "device_time_s": None,
       "device_temp_C": None, "chips": None, "accuracy": 90.316, "accuracy_std": None, "accuracy_lowest": None,
       "changed_predictions": 166, "software_accuracy": 90.28, "n_images": 10000, "torch": "2.13", "numba": "0.68", "cpu": "EPYC"}
CHIP = ROW | {"cell_bits": 2, "accuracy_std": 0.104, "accuracy_lowest": 89.4, "chips": 10}


# ---- commands ----------------------------------------------------------------------------------------------------------------


class Noted:
    """In the place of `tables.run`: notes commands, and answers those of evaluations with a row of the software and `rows`."""

    def __init__(self, *rows):
        self.commands, self.rows = [], rows

    def __call__(self, command):
        words = [*map(str, command)]
        self.commands.append(words)
        if "train.py" not in words:
            folder = Path(words[words.index("--save_path") + 1])
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "table.json").write_text(json.dumps([ROW | {"cell_bits": None}, *self.rows]))


@pytest.fixture
def noted(monkeypatch, tmp_path):
    """(commands that are noted, flags of the driver for a network of other bits and decay)."""
    config = {"model": "resnet20_quant", "wbit": 2, "abit": 3, "wq": "sawb", "wd": 2e-4}
    save_checkpoint(tmp_path / "net.pt", {"state_dict": {}, "config": config})
    for module in (tables, common):
        monkeypatch.setattr(module, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(tables, "run", found := Noted(ROW | {"more": "than is kept"}))
    return found, ["--network", str(tmp_path / "net.pt"), "--data_path", str(tmp_path), "--save_path", str(tmp_path / "save")]


def settings(command):
    flags = command[command.index("--table") + 1:]
    return all_settings({}, 4, 4, table=flags, of_chips={"chips": 10})


@pytest.mark.parametrize("name, count, first, last", [
    ("presets_2bit", 25, "2-bit cells, 6-bit ADC, calibrated, techA", "2-bit cells, 6-bit ADC, calibrated, stuck_at_chen"),
    ("presets_1bit", 8, "1-bit cells, 6-bit ADC, calibrated, techA", "1-bit cells, 6-bit ADC, calibrated, pcm at 1d"),
    ("pairs", 12, "2-bit cells, 6-bit ADC, calibrated, techB at 100000s",
     "2-bit cells, 6-bit ADC, calibrated, weights pair, stuck_at_chen")])
def test_tables_of_devices_are_settings_of_eval(noted, name, count, first, last):
    found, flags = noted
    tables.main([*flags, "--tables", name])
    [command] = found.commands
    asked = settings(command)
    assert len(asked) == count and command[command.index("--chips") + 1] == "10"
    assert str(asked[0]).startswith(first) and sorted(str(asked[-1]).split(", ")[:len(last.split(", "))]) == sorted(last.split(", "))


def test_the_settings_are_those_of_the_script(noted, tmp_path):
    found, flags = noted
    tables.main([*flags, "--tables", "settings", "--workers", "2"])
    assert found.commands == [["bash", "vgg_cifar_eval.sh", "--resume", f"{tmp_path}/net.pt", "--dataset", "imagefolder", "--data_path",
                               str(tmp_path), "--workers", "2", "--save_path", f"{tmp_path}/save", "--prob_path", f"{tmp_path}/save/prob"]]


@pytest.mark.parametrize("name, count", [("through_adc", 8), ("through_chips", 2)])
def test_trainings_are_flags_of_train_and_begin_with_the_network_as_it_is(noted, tmp_path, name, count):
    found, flags = noted
    tables.main([*flags, "--tables", name])
    assert len(found.commands) == 3 * count
    folders = set()
    for before, training, after in zip(*[iter(found.commands)] * 3):
        asked, _, _ = train_settings.parse([word for word in training[2:] if word != "--go_on"])
        assert (asked.model, asked.w_bits, asked.a_bits, asked.wq) == ("resnet20_quant", 2, 3, "sawb")
        assert (asked.wd, asked.adc_aware) == (2e-4, True)
        assert (asked.val_split, asked.schedule_type, asked.weight_clip) == (0.02, "cosine", 2.2)
        [measured], [again] = settings(before), settings(after)
        assert measured == again
        asked_for, spec = asked.config(), measured.spec
        assert [asked_for[name] for name in ("cell_bits", "adc_bits", "adc_plan", "adc_idle", "device")] == [
            spec.cell_bits, spec.adc_bits, spec.adc_plan, spec.adc_idle, measured.chips and measured.chips.name]
        assert before[before.index("--resume") + 1] == f"{tmp_path}/net.pt"
        assert after[after.index("--resume") + 1] == f"{asked.save_path}/model_best.pth.tar"
        assert ("--chip_seed" in after) == (name == "through_chips") and "--chip_seed" not in before  # chips that no training saw
        folders.add(asked.save_path)
    assert len(folders) == count


def test_tables_that_are_not_chosen_stay(noted, tmp_path, capsys):
    found, flags = noted
    found.rows = (CHIP | {"device": "techA", "device_time_s": 0.0},)
    tables.main([*flags, "--tables", "pairs"])
    found.rows = (ROW,)
    tables.main([*flags, "--tables", "settings"])
    kept = json.loads((tmp_path / "results" / "tables_net.json").read_text())["tables"]
    assert kept == {"settings": [ROW], "pairs": [CHIP | {"device": "techA", "device_time_s": 0.0}]}
    text = (tmp_path / "results" / "tables_net.md").read_text()
    assert [line for line in text.splitlines() if line.startswith("## ")] == [
        "## Every cell and ADC", "## Offset cells and pairs, 2-bit cells, 6-bit ADC, ten chips"]
    assert "10000 test images; software 90.28 %; EPYC, torch 2.13, numba 0.68\n" in text
    assert "table 1 of 1: Every cell and ADC\n" in capsys.readouterr().out


def test_a_try_has_files_of_its_own(noted, tmp_path):
    found, flags = noted
    programs = tables.Programs(argparse.Namespace(network=flags[1], data_path=flags[3], dataset="imagefolder", save_path=None, workers=None,
                                                  limit=20))
    assert programs.name == "tables_net_20" and programs.folder == ROOT / "save" / "tables_net_20"
    tables.main([*flags, "--limit", "20", "--tables", "through_chips"])
    before, training, _ = found.commands[:3]
    assert before[before.index("--limit") + 1] == training[training.index("--limit_test") + 1] == "20"
    assert training[training.index("--limit_train") + 1] == "200"
    assert (tmp_path / "results" / "tables_net_20.md").exists() and not (tmp_path / "results" / "tables_net.md").exists()


def test_a_command_that_fails_ends_the_tables(capfd):
    tables.run([sys.executable, "-c", "import os; print(os.environ['PYTHON'])"])
    assert capfd.readouterr().out.splitlines()[-1] == sys.executable
    with pytest.raises(UserError, match="ended with 3; started again, the tables go on"):
        tables.run([sys.executable, "-c", "raise SystemExit(3)"])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_left_to_the_program_that_runs(number, tmp_path, capfd):
    """Which writes what it has. Ctrl-C comes to both from the terminal, SIGTERM to the driver alone."""
    inner = (f"import pathlib, signal, sys, time; signal.signal({int(number)}, lambda *_: (time.sleep(0.6), "
             f"pathlib.Path({str(tmp_path / 'kept')!r}).touch(), sys.exit(7)));"
             f"pathlib.Path({str(tmp_path / 'up')!r}).touch(); time.sleep(60)")

    def driver():
        os.setsid()
        run_main(lambda: tables.run([sys.executable, "-c", inner]))

    process = multiprocessing.get_context("fork").Process(target=driver)  # all is imported
    process.start()
    while not (tmp_path / "up").exists():
        assert process.is_alive()
        time.sleep(0.05)
    (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
    process.join(60)
    assert capfd.readouterr().err == "error: the command above ended with 7; started again, the tables go on from there\n"
    assert (tmp_path / "kept").exists() and process.exitcode == 2


# ---- Markdown ----------------------------------------------------------------------------------------------------------------


def test_a_line_for_each_hardware_and_a_table_of_plans():
    rows = [ROW | {"adc_bits": 4, "accuracy": 90.09, "changed_predictions": 375}, ROW,
            ROW | {"adc_range": "dynamic", "map": "conv"}, ROW | {"rows": 256, "mapping": "im2col"},
            ROW | {"adc_range": "ideal", "adc_bits": None, "changed_predictions": 0, "accuracy": 90.28},
            ROW | {"adc_plan": "significance", "adc_bits": 1.5, "adc_idle": "skip"}]
    assert tables.over_bits(rows) == """\
| accuracy % (predictions changed) | 4-bit ADC | 6-bit ADC | no ADC |
| --- | --- | --- | --- |
| 1-bit cells | 90.09 (375) | 90.32 (166) |  |
| 1-bit cells, `--adc_range dynamic`, `--crossbar_layers conv` |  | 90.32 (166) |  |
| 1-bit cells, `--rows 256`, `--mapping im2col` |  | 90.32 (166) |  |
| 1-bit cells, `--adc_range ideal` |  |  | 90.28 (0) |

| the same by mean bits of all reads, planned | 1.5 |
| --- | --- |
| 1-bit cells, `--adc_idle skip` | 90.32 (166) |"""
    assert "planned" not in tables.over_bits(rows[:2])


def test_a_line_for_each_device():
    rows = [CHIP | {"device": "techA", "device_time_s": 0.0, "device_temp_C": 25.0},
            CHIP | {"device": "techA", "device_time_s": 86400.0, "device_temp_C": 85.0, "weights": "pair"},
            CHIP | {"device": "milo_irps21"}]
    assert tables.side_by_side(rows) == """\
| preset | at | accuracy % | changed | at | accuracy % | changed |
| --- | --- | --- | --- | --- | --- | --- |
| `techA` | 0s | 90.32 ± 0.10 (89.40) | 166 | 1d, 85 C, pair | 90.32 ± 0.10 (89.40) | 166 |
| `milo_irps21` |  | 90.32 ± 0.10 (89.40) | 166 |  |  |  |"""


def test_a_line_for_each_training():
    after = CHIP | {"accuracy": 90.0, "software_accuracy": 89.06, "trained": "--device techB --epochs 1", "before": CHIP}
    assert tables.before_and_after([after]) == """\
| trained with | before: accuracy % | changed | after: accuracy % | changed | software after it, % |
| --- | --- | --- | --- | --- | --- |
| `--device techB --epochs 1` | 90.32 ± 0.10 (89.40) | 166 | 90.00 ± 0.10 (89.40) | 166 | 89.06 |"""
    assert "software 90.28 %" in tables.section(tables.TABLES["through_chips"], [after])  # that of the network before


def test_the_files_in_the_repository_are_what_their_rows_make():
    for path in (ROOT / "benchmarks" / "results").glob("tables_*.json"):
        text = path.with_suffix(".md").read_text()
        for name, rows in json.loads(path.read_text())["tables"].items():
            assert tables.section(tables.TABLES[name], rows) in text, (path.name, name)


def test_benchmarks_show_how_far_they_are(monkeypatch, capsys):
    calls, shown = [], common.tqdm
    monkeypatch.setattr(common, "tqdm", lambda of, **more: shown(of, **more | {"disable": False, "delay": 0, "mininterval": 0}))
    assert len(common.median_seconds(lambda: calls.append("a"), lambda: calls.append("b"), repeats=3)) == 2
    assert calls == ["a", "b"] * 4 and "3/3" in capsys.readouterr().err  # the first time of each does not count
