"""eval.py over many settings: measured once whatever happens, spans, shards, several networks, single layers, searches."""

import copy
import csv
import errno
import json
import logging
import os
import re
import shlex
import shutil
import sys
import threading
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_eval import (FORK, checkpoint, load_digits, network, refused, results, run, save, scene, shown_images,  # noqa: F401
                       without_pictures)

import eval as evaluation
from experiment.sweep import bench, search, workers, worklist
from experiment.settings import eval_flags, eval_settings, per_layer
from experiment.settings.limits import Bound
from experiment.program import flags
from experiment.measure import keys, points, ranges
from experiment.report import index, report
from experiment.program.cli import UserError, run_main
from experiment.inputs.data import training_split
from experiment.report.drawing import new_figure
from experiment.sweep.worklist import Job, Queue, Worklist
from models import quant
from models.quant import Calibration, CrossbarSpec, Device, Metric
from models.quant.storage.files import atomic_write, locked, write_text
from models.quant.measuring.chips import Chips
from models.quant.measuring.measure import Cache, Record, measure
from models.quant.measuring.placing import place
from models.quant.measuring.metrics import Scale, accuracy
from models.quant.measuring.setting import Setting, reads_of

pytestmark = pytest.mark.usefixtures("one_thread")

QUICK = ["--ngpu", "0", "--limit", "6", "--rows", "16"]


@pytest.fixture
def evaluate(capsys, monkeypatch):
    """evaluate(checkpoint, flags...): (the settings that were measured, the printed text). Pictures as `run` has them."""

    def evaluate(*flags, drawn=False):
        measured, real = [], bench.measure
        with monkeypatch.context() as patch:
            patch.setattr(bench, "measure", lambda *args, **options: (measured.append(args[3]), real(*args, **options))[1])
            if not drawn:
                without_pictures(patch)
            capsys.readouterr()
            calibration = [] if "--adc_ranges" in flags or "full" in flags and "calibrated" not in flags else ["--calib_images", "4"]
            assert evaluation.main([*QUICK, *calibration, "--resume", *flags]) == 0
        return measured, capsys.readouterr().out

    return evaluate


def table(text):
    """The rows of the first table, without the speed of the engine, and without what is left of a long name."""
    lines = text[text.index("setting   "):].splitlines()
    rows = lines[2:next(i for i, line in enumerate(lines) if not line or "test images" in line)]
    return [line.rsplit(None, 1)[0] for line in rows if not line.startswith("  ")]


# ---- measured once -----------------------------------------------------------------------------------------------------


def test_what_was_measured_is_not_measured_again(evaluate, checkpoint):  # noqa: F811
    measured, first = evaluate(checkpoint, "--adc_bits", "3", "4")
    assert [setting and setting.spec.adc_bits for setting in measured] == [None, 3, 4] and "3 points: 3 to measure\n" in first
    lines, ranges = results("save"), Path("save/adc_ranges.json").read_bytes()
    measured, again = evaluate(checkpoint, "--adc_bits", "3", "4", "--batch_size", "5")
    assert not measured and table(again) == table(first) and "3 points: all are measured already\n" in again
    assert results("save") == lines and Path("save/adc_ranges.json").read_bytes() == ranges
    measured, more = evaluate(checkpoint, "--adc_bits", "3", "5")
    assert [setting.spec.adc_bits for setting in measured] == [5]
    assert re.search(r"\n3 points: 2 are measured already, 1 to measure, about \S+ \w+ \(\S+ \w+ each so far\)\n", more)
    assert [row["adc_bits"] for row in results("save")] == [None, 3, 4, 5]
    of_table = json.loads(Path("save/table.json").read_text())  # the last command's, also what was measured before
    assert [row["adc_bits"] for row in of_table] == [None, 3, 5] and all(row in results("save") for row in of_table)
    table_ = list(csv.DictReader(open("save/results.csv")))
    assert [row["adc_bits"] for row in table_] == ["", "3", "4", "5"]
    assert [float(row["accuracy"]) for row in table_] == [row["accuracy"] for row in results("save")]
    if Path("save/results.parquet").exists():
        import pyarrow.parquet
        columns = pyarrow.parquet.read_table("save/results.parquet").to_pydict()
        assert columns["adc_bits"] == [None, 3, 4, 5] and columns["accuracy"] == [row["accuracy"] for row in results("save")]


def test_other_networks_images_and_ranges_do_not_mix_in(evaluate, checkpoint):  # noqa: F811
    other = save("other.pth.tar", network(seed=1))
    for flags_, count in (([checkpoint], 2), ([other], 2), ([checkpoint, "--limit", "5"], 2), ([checkpoint, "--adc_calib", "minmax"], 1),
                          ([checkpoint, "--calib_images", "9"], 1), ([checkpoint, "--adc_ranges", "ranges.json"], 1),
                          ([checkpoint, "--batch_size", "5"], 0)):
        measured, _ = evaluate(*flags_, "--adc_bits", "3", "--save_path", "save")
        assert len(measured) == count, flags_
        Path("ranges.json").exists() or shutil.copy("save/adc_ranges.json", "ranges.json")
    for size, count in (("5", 1), ("4", 1), ("5", 0)):  # results of dynamic ranges depend on the batch
        flags_ = [*QUICK, "--resume", checkpoint, "--adc_range", "dynamic", "--batch_size", size]
        before = len(results("save"))
        assert evaluation.main(flags_) == 0 and len(results("save")) == before + count


def test_edited_planes_and_ranges_are_measured(evaluate, checkpoint):  # noqa: F811
    planes, ranges_ = ([checkpoint, "--cell_bits", "2", "--adc_bits", "4", *more] for more in (
        ["--adc_range", "full", "--planes", "planes"], ["--adc_ranges", "own.json"]))
    evaluate(checkpoint, "--cell_bits", "2", "--adc_bits", "4", "--also", "--cell_bits 2 --adc_bits 4 --adc_range full")
    shutil.copytree("prob/vgg7_quant_eval_w4_c2", "planes")
    path = Path("planes/bit_levels1_ideal.pt")
    content = json.loads(Path("save/adc_ranges.json").read_text())
    for factor in (1, 3):
        torch.save((torch.load(path) + factor) % 4, path)
        for layer in content["ranges"][0]["layers"].values():
            layer["ranges"] = [[factor * delta, q_min] for delta, q_min in layer["ranges"]]
        Path("own.json").write_text(json.dumps(content))
        assert [len(evaluate(*flags)[0]) for _ in range(2) for flags in (planes, ranges_)] == [1, 1, 0, 0]


@pytest.mark.parametrize("more", [["--quantize_image"], ["--a_bits", "3"]])
def test_what_a_checkpoint_does_not_say_tells_points_apart(evaluate, more):
    torch.save({"state_dict": network().state_dict()}, "old.pth")
    flags_ = ["old.pth", "--adc_range", "full", "--adc_bits", "4", "--save_path", "save"]
    evaluate(*flags_)
    assert len(evaluate(*flags_, *more)[0]) == 2


def test_results_hold_the_whole_command(checkpoint):  # noqa: F811
    flags_ = ["--resume", checkpoint, *QUICK, "--adc_range", "full", "--save_path", "a b"]
    evaluation.main(flags_)
    assert {row["command"] for row in results("a b")} == {shlex.join(["eval.py", *flags_])}


def test_points_of_a_report_need_no_second_measuring(evaluate, checkpoint):  # noqa: F811
    flags_ = [checkpoint, "--cell_bits", "2", "--adc_bits", "3"]
    evaluate(*flags_)
    assert not evaluate(*flags_, "--report")[0]
    [path] = Path("save").glob("report_*.json")
    found = path.read_text()
    shutil.rmtree("save/points")
    evaluate(*flags_, "--report")
    assert path.read_text() == found


def test_costs_come_back_from_points(evaluate, checkpoint):  # noqa: F811
    """And a technology that was not asked for before needs the images again."""
    flags_ = [checkpoint, "--adc_range", "full", "--adc_bits", "3:4"]
    assert len(evaluate(*flags_)[0]) == 3
    measured, text = evaluate(*flags_, "--cost", "rram_65nm", "--per_layer", "features.4:rows=8")
    assert measured == [None, *measured[1:]] and len(measured) == 3  # the software once more, to count
    cost = json.loads(Path("save/cost.json").read_text())
    measured, again = evaluate(*flags_, "--cost", "rram_65nm", "--per_layer", "features.4:rows=8")
    assert not measured and json.loads(Path("save/cost.json").read_text()) == cost and table(again) == table(text)
    assert len(evaluate(*flags_, "--cost", "rram_32nm")[0]) == 3


def test_a_full_disk_is_one_line_and_the_next_run_goes_on(evaluate, checkpoint, capsys, monkeypatch):  # noqa: F811
    written = []

    def full(path, text):
        def fails(file):
            file.write(text.encode())
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(path)
        if len(written) == 3:
            atomic_write(path, fails)
        write_text(path, text)

    flags_ = [*QUICK, "--calib_images", "4", "--adc_bits", "3:5", "--resume", checkpoint]
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(points, "write_text", full)
        run_main(lambda: evaluation.main(flags_))
    assert ended.value.code == 2 and capsys.readouterr().err == "error: the disk is full\n"
    measured, _ = evaluate(checkpoint, "--adc_bits", "3:5")
    assert [setting.spec.adc_bits for setting in measured] == [4, 5] and not list(Path("save/points").glob(".*.tmp"))


def test_a_run_that_is_killed_goes_on_and_ends_as_one_that_was_not(evaluate, checkpoint):  # noqa: F811
    flags_ = ["--cell_bits", "2", "--adc_bits", "2:7", "--adc_range", "calibrated", "full"]
    _, expected = evaluate(checkpoint, "--save_path", "whole", *flags_)
    process = FORK.Process(target=lambda: evaluation.main(["--resume", checkpoint, *QUICK, "--calib_images", "4", *flags_]))
    process.start()
    deadline = time.monotonic() + 120
    while len(list(Path("save").glob("points/*.json"))) < 3:
        assert process.is_alive() and time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.join()
    there = len(list(Path("save").glob("points/*.json")))
    measured, found = evaluate(checkpoint, *flags_)
    assert table(found) == table(expected) and len(measured) == 13 - there
    keys = [row["key"] for row in results("save")]
    assert len(keys) == len({*keys}) == 13 and {*keys} == {row["key"] for row in results("whole")}
    assert json.loads(Path("save/adc_ranges.json").read_text()) == json.loads(Path("whole/adc_ranges.json").read_text())


# ---- chips -------------------------------------------------------------------------------------------------------------

CHIPS = ["--cell_bits", "2", "--device", "techC", "--device_time", "1d"]


@pytest.mark.parametrize("more, calibrations", [(["--adc_plan", "significance"], 1), (["--calib_on", "chip"], 3),
                                                (["--reference", "digital"], 1), (["--adc_range", "full"], 0)])
def test_chips_one_by_one_are_what_they_are_together(evaluate, checkpoint, monkeypatch, more, calibrations):  # noqa: F811
    chosen, real = [], quant.calibrate
    with monkeypatch.context() as patch:
        patch.setattr(quant.network.calibration, "calibrate", lambda *args, **options: (chosen.append(1), real(*args, **options))[1])
        measured, text = evaluate(checkpoint, *CHIPS, *more, "--adc_bits", "3", "--chips", "3", "--chip_seed", "5")
    assert [setting and setting.chips.seeds for setting in measured] == [None, range(5, 6), range(6, 7), range(7, 8)]
    assert len(chosen) == calibrations and "4 points: 4 to measure\n" in text and ", chip 6: " in text
    calibration = ["--calib_images", "4"] if calibrations else []
    settings, _ = eval_settings.parse([*QUICK, *calibration, *CHIPS, *more, "--adc_bits", "3", "--chips", "3", "--chip_seed", "5",
                                       "--resume", checkpoint])
    own = bench.Bench(settings)
    own.load(logging.getLogger())
    record = measure(own.net, own.shown.batches, own.shown.labels, settings.settings[0], calibration=own.shown.calibration)
    found = own.record(settings.settings[0])
    assert torch.equal(found.chip_predictions, record.chip_predictions) and len({*found.chip_accuracies}) > 1
    for name in ("accuracy", "software_accuracy", "changed_predictions", "chip_accuracies", "chip_changes", "engine", "mean_bits",
                 "conversions"):
        assert getattr(found, name) == getattr(record, name), name
    assert [row["chips"] for row in results("save")] == [None, 3]


def test_a_chip_is_measured_once_alone_or_as_one_of_several(evaluate, checkpoint):  # noqa: F811
    flags_ = [checkpoint, *CHIPS, "--adc_range", "full", "--adc_bits", "4", "--cost", "rram_65nm"]

    def seeds(*more):
        measured, text = evaluate(*flags_, *more)
        return [setting.chips.chip_seed for setting in measured if setting], text

    assert seeds("--chips", "2")[0] == [0, 1]
    assert seeds("--chips", "2")[0] == []
    found, text = seeds("--chips", "4")
    assert found == [2, 3] and "5 points: 3 are measured already, 2 to measure" in text
    before = results("save")
    text = seeds("--chip_seed", "3", "--dry_run")[1]
    assert "to measure" not in text and "2 points: all are measured already" in text and results("save") == before
    found, text = seeds("--chip_seed", "3")
    assert found == [] and "2 points: all are measured already" in text and len(table(text)) == 2
    assert seeds("--chip_seed", "9")[0] == [9]
    assert seeds("--chip_seed", "8", "--chips", "3")[0] == [8, 10]
    rows = results("save")
    assert [(row["chips"], row["chip_seed"]) for row in rows[1:]] == [(2, 0), (4, 0), (1, 3), (1, 9), (3, 8)]
    of = {(row["chips"], row["chip_seed"]): row["chip_accuracies"] for row in rows[1:]}
    assert of[2, 0] == of[4, 0][:2] and of[1, 3] == of[4, 0][3:] and of[1, 9] == of[3, 8][1:2]
    costs = [row["energy_uJ"] for row in rows[1:]]
    assert len({*map(str, costs)}) == 1 and costs[0]
    lines = seeds("--chips", "10", "--dry_run")[1].splitlines()
    assert [line.split("1d, ")[-1] for line in lines if ", chip " in line] == ["chip 0 to 3", "chip 4 to 7", "chip 8 to 9"]
    assert [line[:10] for line in lines if ", chip " in line] == ["measured  ", "to measure", "measured  "]


def test_chips_that_are_interrupted_are_not_lost(evaluate, checkpoint, monkeypatch):  # noqa: F811
    flags_ = [checkpoint, *CHIPS, "--adc_bits", "3:4", "--chips", "3"]
    expected = table(evaluate(*flags_, "--save_path", "whole")[1])
    real = bench.measure

    def stop(*args, **options):
        if args[3] and args[3].chips.chip_seed == 2 and args[3].spec.adc_bits == 4:
            raise KeyboardInterrupt
        return real(*args, **options)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(bench, "measure", stop)
        evaluation.main([*QUICK, "--calib_images", "4", "--resume", *flags_])
    assert len(list(Path("save/points/chips").glob("*.json"))) == 5
    measured, text = evaluate(*flags_)
    took = {path: json.loads(path.read_bytes())["took_s"] for path in Path("save/points").glob("**/*.json")}
    alone = sum(seconds for path, seconds in took.items() if path.parent.name == "chips")
    software = min((json.loads(path.read_bytes())["row"]["cell_bits"] is not None, seconds) for path, seconds in took.items())[1]
    assert sum(took.values()) - software == pytest.approx(2 * alone)  # each chip's time is in its setting's too
    assert [(setting.chips.chip_seed, setting.spec.adc_bits) for setting in measured] == [(2, 4)] and table(text) == expected
    shutil.rmtree("save/points/chips")  # they are nothing that a result needs
    assert not evaluate(*flags_)[0] and len(results("save")) == 3


def test_shards_share_chips(evaluate, checkpoint):  # noqa: F811
    flags_ = [checkpoint, *CHIPS, "--adc_range", "full", "--adc_bits", "4", "--chips", "4"]
    first, text = evaluate(*flags_, "--shard", "1/2")
    assert len(first) == 3 and len(table(text)) == 1  # the software, and two chips of a setting that is not there yet
    second, text = evaluate(*flags_, "--shard", "2/2")
    assert len(second) == 2 and len(table(text)) == 2 and [row["chips"] for row in results("save")] == [None, 4]


# ---- what is measured --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text, values", [
    ("3", [3]), ("3:5", [3, 4, 5]), ("3:3", [3]), ("1:2:0.5", [1, 1.5, 2]), ("0:1:0.3", [0, 0.3, 0.6, 0.9]), ("2.5", [2.5]),
    ("0.1:0.3:0.1", [0.1, 0.2, 0.3])])
def test_spans(text, values):
    found = flags.span(flags.NUMBER_FROM_0, text)
    assert found == values and [type(value) for value in found] == [type(value) for value in values]


def test_a_span_may_begin_below_zero():
    found = flags.parse(eval_flags.build_parser(), ["--device_temp", "-40:85:25", "-50", "--adc_bits", "3"])
    assert found == {"device_temp": [-40, -15, 10, 35, 60, 85, -50], "adc_bits": [3]}


def test_a_dry_run_says_what_there_is_and_writes_nothing(checkpoint, capsys):  # noqa: F811
    assert evaluation.main(["--resume", checkpoint, *QUICK, "--adc_bits", "3:4", "--cell_bits", "2", "--dry_run"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[3:] == ["to measure  software", "to measure  2-bit cells, 3-bit ADC, calibrated, rows 16",
                       "to measure  2-bit cells, 4-bit ADC, calibrated, rows 16", "3 points: 3 to measure"]
    assert os.listdir("save") == ["model_best.pth.tar"] and not Path("prob").exists()


def test_a_dry_run_names_the_networks(checkpoint, capsys):  # noqa: F811
    Path("other").mkdir()
    other = save("other/b.pth.tar", network(seed=1))
    evaluation.main(["--resume", checkpoint, other, *QUICK, "--adc_range", "full", "--dry_run"])
    out = capsys.readouterr().out
    assert f"to measure  {checkpoint}: software" in out and f"to measure  {other}: 1-bit" in out


def test_networks_of_one_folder_that_is_written_in_two_ways(checkpoint):  # noqa: F811
    other = save("save/b.pth.tar", network(seed=1))
    networks = eval_settings.parse_all(["--resume", os.path.relpath(checkpoint), str(Path(other).resolve()), *QUICK])
    assert len({made.folder.resolve() for made in bench.benches_of(networks, "")}) == 2


def test_several_networks(evaluate, checkpoint):  # noqa: F811
    Path("other").mkdir()
    other = save("other/b.pth.tar", network(seed=1))
    measured, text = evaluate(checkpoint, other, "--adc_bits", "3:4", "--adc_range", "full", "calibrated")
    assert "10 points: 10 to measure" in text and len(measured) == 10
    assert len(results("save")) == len(results("other")) == 5
    assert {row["checkpoint"] for row in results("other")} == {other} and text.count("setting   ") == 2


def test_reports_pictures_and_costs_of_networks_in_one_folder(evaluate, checkpoint):  # noqa: F811
    Path("other").mkdir()
    other = save("other/b.pth.tar", network(seed=1))
    evaluate(checkpoint, other, "--adc_bits", "3", "5", "--report", "--cost", "rram_32nm", "--html", "--save_path", "both", drawn=True)
    report_ = f"{index.report_name(Setting(CrossbarSpec(adc_bits=3)), '1-bit cells, 3-bit ADC, calibrated, rows 16')}.json"
    names = {"accuracy_over_adc_bits.png", "adc_ranges.json", "cost.json", "reports.csv", report_}
    own = Path("both", "_".join(re.findall("[0-9A-Za-z]+", checkpoint.removesuffix(".tar")))), Path("both", "other_b_pth")
    for folder in own:
        assert names < set(os.listdir(folder))
        assert f'{report_},"1-bit cells, 3-bit ADC, calibrated, rows 16"\n' in Path(folder, "reports.csv").read_text()
        assert "cost.json,costs of 2 settings in rram_32nm\n" in Path(folder, "reports.csv").read_text()
    assert not names & set(os.listdir("both")) and len(results("both")) == 6
    energies = [{round(each["energy_uJ"], 9) for each in json.loads(Path(folder, "cost.json").read_text())["settings"]} for folder in own]
    assert not energies[0] & energies[1]
    page = Path("both", "results.html").read_text()
    assert page.count("data:image/png") >= 6 and "<figcaption>other b pth: accuracy over adc bits<" in page  # those of both


def test_a_point_is_of_the_code_that_it_follows_from(evaluate, checkpoint, monkeypatch):  # noqa: F811
    rows = "--also", "--device techA", "--device techA --access gate --wire_ohm 1", "--adc_range ideal"
    flags = (checkpoint, "--adc_bits", "4", *rows), (checkpoint, "--adc_bits", "4", *rows, "--cost", "rram_32nm")
    for each in flags:
        evaluate(*each)
    usual = keys.digests()
    for part, anew in (("measuring", (5, 5)), ("chips", (2, 2)), ("wires", (1, 1)), ("costs", (0, 3)), ("conversion", (0, 0))):
        monkeypatch.setattr(keys, "digests", lambda part=part: usual | {part: "of other code"})
        assert tuple(evaluate(*each, "--dry_run")[1].count("to measure  ") for each in flags) == anew, part


def test_what_was_measured_with_other_code_is_measured_anew(evaluate, checkpoint, monkeypatch):  # noqa: F811
    """And used with --older_points alone."""
    flags = checkpoint, "--adc_bits", "4", "--device", "techA", "--chips", "2"
    assert len(evaluate(*flags)[0]) == 3
    before = {path: path.read_bytes() for path in Path("save/points").glob("**/*.json")}
    other = keys.digests() | {"chips": "of other code"}
    monkeypatch.setattr(keys, "digests", lambda: other)
    line = f"3 points were measured with other code ({Path('save/points').resolve()}), "  # the setting and its chips
    measured, text = evaluate(*flags, "--older_points")
    assert not measured and {path: path.read_bytes() for path in Path("save/points").glob("**/*.json")} == before
    assert line + "3 of which stand for what this code has not measured\n" in text
    measured, text = evaluate(*flags)
    assert len(measured) == 2 and line + "and what is asked for is measured anew; --older_points takes them as they are\n" in text
    assert len(Path("save/results.csv").read_text().splitlines()) == 1 + 2  # the software and the setting, once
    assert not evaluate(*flags)[0] and not evaluate(*flags, "--older_points")[0] and len(results("save")) == 3


def test_what_is_made_from_points_of_other_code_is_of_none(evaluate, checkpoint, monkeypatch):  # noqa: F811
    """A setting measured beside the software of other code is used with --older_points alone."""
    flags = checkpoint, "--adc_bits", "4", "--device", "techA", "--chips"
    assert len(evaluate(*flags, "2")[0]) == 3
    other = keys.digests() | {"measuring": "of other code"}
    monkeypatch.setattr(keys, "digests", lambda: other)
    assert [chip.chips.chip_seed for chip in evaluate(*flags, "3", "--older_points")[0]] == [2]
    assert not evaluate(*flags, "3", "--older_points")[0]
    assert len(evaluate(*flags, "3")[0]) == 4 and not evaluate(*flags, "3")[0]



class FakeBench:
    settings, baseline = None, "software"

    def point(self, setting):
        return None

    record = chip = point


def all_of(**rows):
    return eval_settings.all_settings(rows, 4, 4)


def test_shards_share_the_settings_and_keep_histograms_together():
    settings = all_of(cell_bits=[1, 2, 4], adc_bits=[3, 4, 5, 6], adc_range=["calibrated", "full"])
    one = FakeBench()
    parts = [Worklist([one], {one: (None, *settings)}, (i, 5)).settings_of(one) for i in range(1, 6)]
    assert all(part[0] is None for part in parts)
    assert sorted(map(str, settings)) == sorted(str(setting) for part in parts for setting in part[1:])
    assert {len(part) for part in parts} == {5, 6}
    assert sum(len({reads_of(setting) for setting in part[1:]}) for part in parts) == 3 + 4  # each of the four cuts lies in a group


def test_workers_take_whole_groups_and_then_share_what_is_left():
    jobs = [Job(0, Setting(CrossbarSpec(cell_bits=cells, adc_bits=bits)), cells) for cells in (1, 2) for bits in range(1, 5)]
    queue, last, taken = Queue(jobs), {}, {0: [], 1: []}
    for worker in (0, 1, 0, 1, 0, 1, 0, 0, 0):  # the second is slow
        job, wait = queue.take(last.get(worker))
        last[worker] = job
        taken[worker].append((job.group, job.setting.spec.adc_bits))
        assert not wait
        if len(taken[1]) + len(taken[0]) == 8:
            break
    assert taken == {0: [(1, 1), (1, 2), (1, 3), (1, 4), (2, 4)], 1: [(2, 1), (2, 2), (2, 3)]}
    assert queue.take(last[0]) is None
    queue.put_back(jobs[3])
    queue.busy.append(jobs[5])
    assert [queue.take(None), queue.take(None), queue.take(None)] == [(jobs[3], False), (jobs[5], True), None]


def test_two_networks_of_one_folder_are_refused(checkpoint, capsys):  # noqa: F811
    for folder in ("a.1", "a_1"):
        Path(folder).mkdir()
        shutil.copy(checkpoint, f"{folder}/m.pt")
    with pytest.raises(SystemExit):
        run_main(lambda: evaluation.main(["--resume", "a.1/m.pt", "a_1/m.pt", *QUICK, "--save_path", "both"]))
    assert "error: a.1/m.pt and a_1/m.pt would share the folder both/a_1_m: evaluate them one by one" in capsys.readouterr().err
    assert not Path("both").exists()


def test_each_setting_is_said_once(evaluate, checkpoint):  # noqa: F811
    """Also where the chips of one are those of another, here a copy of its file."""
    for name in "ab":
        Path(f"{name}.csv").write_text("level,conductance_uS,std_uS\n0,1,0.5\n1,10,0.5\n2,20,0.5\n3,30,0.5\n")
    measured, text = evaluate(checkpoint, "--adc_range", "full", "--cell_bits", "2", "--device", "a.csv", "b.csv", "--chips", "2")
    assert len(measured) == 3 and len(results("save")) == 2
    said = [line for line in text.splitlines() if re.fullmatch(r".*full, rows 16, [ab]: \S+ %", line)]
    assert [line.split(": ")[0][-1] for line in said] == ["a", "b"]


def test_images_have_a_bar_on_a_terminal(monkeypatch):
    """Under that of the settings; elsewhere where there is one setting alone."""
    seen = []

    class Measured(FakeBench):
        def measure(self, setting, wait, progress, of_several):
            seen.append(progress)
            return True

    jobs = [Job(0, setting, 0) for setting in all_of(adc_bits=[3, 4])]
    for terminal in (True, False):
        monkeypatch.setattr(sys.stderr, "isatty", lambda terminal=terminal: terminal)
        for some in (jobs, jobs[:1]):
            workers.Pool([Measured()], None).measure(some, lambda job: None)
    assert seen == [True, True, True, False, False, True]


def test_the_time_to_expect():
    """That of all points that are missing, shared by the workers; the software's own is no measure."""
    class Measured(FakeBench):
        def point(self, setting):
            return {"took_s": 30.0 if setting else 900.0} if setting is None or setting.spec.adc_bits < 5 else None

        chip = point

    one = Measured()
    found = Worklist([one], {one: (None, *all_of(adc_bits=[3, 4, 5, 6, 7, 8]))})
    assert found.text(2) == "7 points: 3 are measured already, 4 to measure, about 60 s (30 s each so far)"
    assert [worklist.show_seconds(s) for s in (0.04, 12.3, 89, 600, 5399, 9000)] == ["0.0 s", "12 s", "89 s", "10 min", "90 min", "2.5 h"]


# ---- single layers -----------------------------------------------------------------------------------------------------


def test_hardware_of_single_layers(checkpoint, run):  # noqa: F811
    """As a network whose layers were put on this hardware by hand."""
    flags_ = ["--cell_bits", "2", "--adc_bits", "4", "--limit", "12", "--per_layer",
              "features.*:adc_bits=3,cell_bits=1", "classifier.0:adc_range=ideal"]
    records, predictions, text = run(checkpoint, *flags_)
    assert "2-bit cells, 4-bit ADC, calibrated, rows 16, features.*: adc_bits 3 cell_bits 1, classifier.0: adc_range ideal" in text
    assert records[1]["per_layer"] == {"features.*": {"adc_bits": 3, "cell_bits": 1}, "classifier.0": {"adc_range": "ideal"}}
    net = network(spec=CrossbarSpec(cell_bits=2, adc_bits=4, rows=16))
    for name, layer in quant.crossbar_layers(net):
        if name.startswith("features"):
            layer.set_spec(CrossbarSpec(cell_bits=1, adc_bits=3, rows=16))
        elif name == "classifier.0":
            layer.set_spec(CrossbarSpec(cell_bits=2, adc_bits=4, rows=16, adc_range="ideal"))
    images, _ = shown_images(12)
    shown = bench.Bench(*eval_settings.parse(["--resume", checkpoint, "--calib_images", "20", "--ngpu", "0"]))
    shown.load(logging.getLogger())
    quant.calibrate(net, shown.shown.calibration)
    with torch.no_grad():
        assert torch.equal(net(images).argmax(1), predictions[1])
    assert records[1]["changed_predictions"] > 0 and sorted(os.listdir("prob")) == [f"vgg7_quant_eval_w4_c{c}" for c in (1, 2)]
    again, repeated, _ = run(checkpoint, *flags_, "--adc_ranges", "save/adc_ranges.json")
    assert torch.equal(repeated[1], predictions[1]) and again[1]["adc_ranges"] == "save/adc_ranges.json"


def test_bits_of_single_layers_are_those_of_the_table_and_of_the_costs(checkpoint, run):  # noqa: F811
    _, _, text = run(checkpoint, "--adc_bits", "4", "--limit", "4", "--cost", "rram_65nm",
                     "--per_layer", "features.4:adc_bits=5,cell_bits=2")
    header, _, _, line, *_ = text.split("\nsetting  ")[1].splitlines()  # the first table; that of costs comes behind it
    assert "bits" in header.split() and " 4.00 " not in line
    with open("save/cost.csv", newline="") as file:
        bits = {line["layer"]: (line["adc_bits"], line["cell_bits"]) for line in csv.DictReader(file)}
    assert bits.pop("features.4") == ("5", "2") and {*bits.values()} == {("4", "1")}


def test_reports_have_short_names():
    """With the bits of cells and ADC, however much a setting says; a mean of bits has no dot, behind which a name would end."""
    layers = {f"features.{i}": {"adc_bits": 3, "cell_bits": 1, "rows": 64} for i in range(20)}
    names = [index.report_name(each, index.report_text(each)) for each in (
        Setting(per_layer=layers), Setting(), Setting(CrossbarSpec(cell_bits=2, adc_bits=1.5, adc_plan="ones")))]
    assert [name[:-8] for name in names] == ["report_c1_b6_", "report_c1_b6_", "report_c2_b1_5_"] and len(set(names)) == 3
    assert all(re.fullmatch("[0-9a-f]{8}", name[-8:]) for name in names)


def test_the_list_of_reports():
    """Keeps those of earlier runs, with the last that is said of each, and drops those that are gone; another file is replaced."""
    for name in "abc":
        Path(name).write_text("")
    Path("reports.csv").write_text('"no list')
    index.add_to_index(Path(), {"b": 'a "text", of two parts', "a": "old"})
    index.add_to_index(Path(), {"a": "new", "c": "third", "d": "never written"})
    assert list(csv.reader(open("reports.csv", newline=""))) == [
        ["file", "of"], ["a", "new"], ["b", 'a "text", of two parts'], ["c", "third"]]
    Path("a").unlink()
    index.add_to_index(Path(), {})
    assert [row[0] for row in csv.reader(open("reports.csv", newline=""))] == ["file", "b", "c"]


def test_reports_of_other_cells_and_ranges_have_files_of_their_own():
    made = [Setting(calibration=Calibration(**{name: value})) for name, value in (
        ("rule", "mse"), ("rule", "minmax"), ("per", "slice"), ("correct", "none"), ("on", "chip"))]
    made += [Setting(chips=Chips(device=Device.preset("techA"), chip_seed=seed)) for seed in (0, 1)]
    names = {index.report_name(each, index.report_text(each, planes)) for each in made for planes in (None, "mine", "mine/a")}
    assert len(names) == 3 * len(made)
    assert index.report_text(made[2], "mine").endswith("calibrated, adc_per slice, cells of mine")
    full = Setting(CrossbarSpec(adc_range="full"), calibration=made[1].calibration)  # which has no calibration
    assert index.report_text(full) == str(full)


def test_ranges_wait_for_other_writers():
    entry = {name: getattr(CrossbarSpec(), name) for name in ranges.HARDWARE} | {"layers": {}}
    new = ranges.AdcRanges()
    new.add_of(Setting(), entry)
    writer = threading.Thread(target=new.merge_into, args=("new.json",))
    with locked("new.json"):
        writer.start()
        writer.join(0.3)
        assert not Path("new.json").exists()
    writer.join()
    assert len(json.loads(Path("new.json").read_text())["ranges"]) == 1


def test_plans_of_other_layers_have_ranges_of_their_own():
    """Where layers share the bits of a plan, it is another one with and without linear layers; files that do not say so serve both."""
    planned, layer = CrossbarSpec(adc_bits=2, adc_plan="significance"), {"sha256": "0", "ranges": [[(1.0, 0)]]}
    both = [Setting(planned, layers) for layers in ("all", "conv")]
    hardware = {name: getattr(planned, name) for name in ranges.HARDWARE}
    new, old = ranges.AdcRanges(), ranges.AdcRanges()
    for bits, setting in enumerate(both):
        entry = hardware | {"adc_share": "network", "crossbar_layers": setting.crossbar_layers}
        new.add_of(setting, entry | {"layers": {"f": layer | {"bits": [[bits]]}}})
    new.merge_into("new.json")
    new.merge_into("new.json")
    Path("old.json").write_text(json.dumps({"ranges": [hardware | {"adc_share": "network", "layers": {"f": layer | {"bits": [[7]]}}}]}))
    for found, name, expected in ((ranges.AdcRanges(), "new.json", [0, 1]), (old, "old.json", [7, 7])):
        found.read(name)
        assert [found.entries[ranges._key(setting)]["layers"]["f"]["bits"] for setting in both] == [[[bits]] for bits in expected]
        assert len(found.entries) == 2


def test_all_layers_without_an_adc_one_by_one(checkpoint, run):  # noqa: F811
    """As `--adc_range ideal`: there is nothing to calibrate."""
    records, _, _ = run(checkpoint, "--adc_bits", "3", "--per_layer", "*:adc_range=ideal")
    assert (records[1]["changed_predictions"], records[1]["mean_bits"]) == (0, None)


def test_a_report_of_layers_that_differ(checkpoint, run):  # noqa: F811
    """Some with a plan and some with bits of their own: each has its own panel, with as many levels as its ADC has."""
    for bits, first, others in (("uniform", "adc_bits=5", "adc_plan=significance,adc_bits=2.5"),
                                ("significance", "adc_plan=uniform,adc_bits=5", "adc_bits=2")):
        _, _, text = run(checkpoint, "--adc_plan", bits, "--adc_bits", "3", "--report", "--per_layer", f"features.4:{first}",
                         f"features.8:{others}", drawn=True)
        assert "bits by digit" in text and "step" in text
        path = max(Path("save").glob("report_*.json"), key=lambda file: file.stat().st_mtime)
        layers = {entry["layer"]: entry for entry in json.loads(path.read_text())["layers"]}
        axes = new_figure(4, 4).subplots()
        report._reads_panel(axes, layers["features.4"])
        assert [len(ticks.get_segments()) for ticks in axes.collections] == [32] * len(layers["features.4"]["slices"])
        assert "bits" in layers["features.8"]["slices"][0] and path.with_suffix(".png").read_bytes()[1:4] == b"PNG"


def test_settings_of_single_layers_in_python():
    setting = Setting(CrossbarSpec(cell_bits=2), per_layer={"a*": {"adc_bits": 5, "cell_bits": 1}, "ab": {"adc_bits": 3}})
    assert [(s.cell_bits, s.adc_bits) for s in map(setting.spec_of, ("a", "ab", "b"))] == [(1, 5), (1, 3), (2, 6)]
    assert setting == Setting(CrossbarSpec(cell_bits=2), per_layer=setting.per_layer) and hash(setting)
    adcs = (Setting(per_layer={"a": {"adc_bits": bits}}) for bits in (3, 4))
    assert reads_of(next(adcs)) == reads_of(next(adcs)) == reads_of(Setting())
    assert reads_of(Setting(per_layer={"a": {"cell_bits": 2}})) != reads_of(Setting())
    net = network(spec=CrossbarSpec())
    place(net, Setting(crossbar_layers="conv", per_layer={"features.8": {"adc_bits": 3}}))
    assert [layer.spec.adc_bits for _, layer in quant.crossbar_layers(net) if layer.spec.adc_range != "ideal"] == [6, 3]
    for wrong, words in (({"a": {"w_bits": 3}}, "per_layer a has w_bits; allowed are cell_bits, "),
                         ({"a": {"adc_range": "full"}}, "per_layer a: adc_range is 'full'; allowed are calibrated, which")):
        with pytest.raises(ValueError, match=words):
            Setting(per_layer=wrong)
    with pytest.raises(ValueError, match="per_layer classifier.3: no layer on crossbars is called so; there are features.4, features.8$"):
        place(net, Setting(crossbar_layers="conv", per_layer={"classifier.3": {"adc_bits": 3}}))
    with pytest.raises(ValueError, match="per_layer features.4: adc_bits is 13; allowed are"):
        place(net, Setting(per_layer={"features.4": {"adc_bits": 13}}))


def test_correction_of_some_layers_and_then_of_all_with_one_cache():
    net, (images, labels) = network(spec=CrossbarSpec()), shown_images(8)
    cache, some = Cache(), Setting(CrossbarSpec(adc_bits=3), per_layer={"features.4": {"adc_range": "ideal"}})
    for setting in (some, Setting(CrossbarSpec(adc_bits=3)), some):
        found = measure(net, images, labels, setting, calibration=images, cache=cache)
        alone = measure(net, images, labels, setting, calibration=images)
        assert torch.equal(found.predictions, alone.predictions)


def test_ranges_come_back_to_the_bit():
    setting, (images, _) = Setting(CrossbarSpec(adc_bits=3)), shown_images(8)
    net, other, kept = network(spec=setting.spec), network(spec=setting.spec), ranges.AdcRanges()
    quant.calibrate(net, images)
    sha256 = {name: quant.sha256(layer.w_codes()) for name, layer in quant.crossbar_layers(net)}
    kept.add_of(setting, json.loads(json.dumps(ranges.entry_of(net, setting, 8, sha256))))
    kept.restore(other, setting, "a file")
    for (_, one), (_, two) in zip(quant.crossbar_layers(net), quant.crossbar_layers(other), strict=True):
        assert all(torch.equal(getattr(one, name), getattr(two, name)) for name in ("adc_delta", "adc_q_min", "adc_gain", "adc_offset"))


@pytest.mark.parametrize("change, fits", [
    (lambda last: None, True),
    (lambda last: last.weight.div_(16), False),  # the same codes: only a step is worth less
    (lambda last: last.weight[1].mul_(0.99), False),
    (lambda last: last.bias[1].add_(0.2), False),
    (lambda last: last.bias[1].add_(0.02), False),  # some units of the sums
    (lambda last: last.bias[1].mul_(1 + 1e-5), True),  # as sums of another order may differ
])
def test_a_correction_is_of_one_scale_and_bias(change, fits):
    """Outputs that are a 16th of what they were get no correction that was made for the others; older files do not say which."""
    x, setting = torch.rand(16, 8, generator=torch.Generator().manual_seed(0)), Setting(CrossbarSpec(4, 4, rows=16, adc_bits=3))
    torch.manual_seed(0)
    model, kept = torch.nn.Sequential(torch.nn.Linear(8, 12), torch.nn.ReLU(), torch.nn.Linear(12, 3)), ranges.AdcRanges()
    nets = []
    for change_it in (lambda last: None, change):
        with torch.no_grad():
            change_it(model[2])
        nets.append(quant.convert(model, CrossbarSpec(4, 4, adc_range="ideal"), x, first_last_bits=None, correct="none"))
        place(nets[-1], setting)
    quant.calibrate(nets[0], x)
    sha256 = {name: quant.sha256(layer.w_codes()) for name, layer in quant.crossbar_layers(nets[0])}
    entry = json.loads(json.dumps(ranges.entry_of(nets[0], setting, 16, sha256)))
    kept.add_of(setting, copy.deepcopy(entry))
    with nullcontext() if fits else pytest.raises(UserError, match="a file, 2.crossbar, .*: the correction is of a layer with another"):
        kept.restore(nets[1], setting, "a file")
    for layer in entry["layers"].values():
        del layer["scale"], layer["bias"]
    kept.add_of(setting, entry)
    kept.restore(nets[1], setting, "a file")


def test_ranges_of_another_rule_take_the_place_of_an_entry():
    kept = ranges.AdcRanges()
    kept.add((), {"adc_calib": "mse", "layers": {"a": 1}})
    kept.add((), {"adc_calib": "mse", "layers": {"b": 2}})
    assert kept.entries[()]["layers"] == {"a": 1, "b": 2}
    kept.add((), {"adc_calib": "minmax", "layers": {"c": 3}})
    assert kept.entries[()] == {"adc_calib": "minmax", "layers": {"c": 3}}


# ---- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags_, words", [
    (["--adc_bits", "8:3"], "argument --adc_bits: 8:3 is an empty span; FIRST:LAST:STEP goes up"),
    *[(["--adc_bits", f"3:8:{step}"], f"3:8:{step} is an empty span") for step in ("0", "nan", "inf")],
    (["--device", "rram_wan", "--device_time", "1h:3h"], "1h:3h has 7201 values with a step of 1; say the step: FIRST:LAST:STEP"),
    (["--adc_bits", "1:2:3:4"], "1:2:3:4 is not a span FIRST:LAST or FIRST:LAST:STEP; each is a number from 0 up"),
    (["--cell_bits", "1:"], "argument --cell_bits: 1: is not a span FIRST:LAST or FIRST:LAST:STEP; each is a whole number from 1 up"),
    (["--workers", "0"], "argument --workers: 0 is not a whole number from 1 up"),
    (["--shard", "3/2"], "argument --shard: 3/2 is not I/N, such as 2/8: I from 1 to N"),
    (["--shard", "2"], "argument --shard: 2 is not I/N"),
    (["--per_layer", "features.4"], "--per_layer features.4: give LAYER:FLAG=VALUE"),
    (["--per_layer", "features.3:adc_bits=3"], "--per_layer features.3: no layer on crossbars is called so; there are features.4, "),
    (["--per_layer", "features.4:speed=3"], "no hardware flag is called speed; there are cell_bits, adc_bits, "),
    (["--per_layer", "features.4:adc_bits=x"], "--per_layer features.4:adc_bits=x: x is not a number from 0 up"),
    (["--per_layer", "features.4:mapping=x"], "x is not one of tap, im2col"),
    (["--per_layer", "features.4:adc_bits=2.5"], "--per_layer features.4: adc_bits is 2.5; allowed are whole numbers"),
    (["--per_layer", "features.4:adc_bits=3:5"], "--per_layer features.4: adc_bits has 3 values; several are for --search"),
    (["--per_layer", "features.4:adc_range=full"], "--per_layer features.4: adc_range is 'full'; allowed are calibrated"),
    (["--planes", "x", "--per_layer", "features.4:cell_bits=2"], "--planes is for cells of one kind: leave cell_bits out of --per_layer"),
    (["--device", "techA", "--save_cells", "--per_layer", "features.4:weights=pair"], "--save_cells is for cells of one kind"),
    (["--device", "techA", "--save_cells", "--per_layer", "features.4:rows=8"], "--save_cells is for cells of one kind"),
    (["--per_layer", "a:adc_bits=5", "b:adc_bits=4", "a:adc_bits=6"], "--per_layer a: is given in several places"),
    (["--objective", "bits"], "--objective is for a search: add --search N"),
    (["--search", "5", "--adc_bits", "3:5"], "--search chooses on validation images: "),
    (["--search", "5", "--report"], "--report does not go with --search"),
    (["--search_seed", f"{2**32}"], "--search_seed: 4294967296 is not a whole number from 0 to 4294967295"),
])
def test_bad_sweeps_are_one_line(flags_, words, refused, checkpoint):  # noqa: F811
    refused(["--resume", checkpoint, *flags_], words)


@pytest.mark.parametrize("package, flags_, words", [
    ("ray", ["--workers", "2"], "--workers needs Ray: pip install -r requirements-cluster.txt. Or start "),
    ("optuna", ["--search", "2", "--adc_bits", "3:5"], "--search needs Optuna: pip install -r requirements-search.txt"),
    ("plotly.graph_objects", ["--search", "2", "--adc_bits", "3:5"], "plotly.graph_objects is installed, but cannot be imported ")])
def test_what_is_not_installed_is_one_line(refused, trained, monkeypatch, package, flags_, words):
    """Before anything is loaded, whatever would be measured."""
    pytest.importorskip(package.partition(".")[0])
    monkeypatch.setitem(sys.modules, package, None)  # as a package that is not there
    refused(["--resume", trained, *flags_], words)


# ---- search ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def trained():
    """A checkpoint that says which images its training held out."""
    data = load_digits()
    facts = {"classes": list(data.classes), "mean": list(data.mean), "std": list(data.std),
             "train_images": len(training_split(data.train_y, 0.02, 3)[0])}
    Path("save").mkdir()
    return save("save/a.pth.tar", network(), {"data": facts}, val_split=0.02, seed=3)


def test_what_optuna_is_asked(evaluate, trained, monkeypatch):
    optuna, asked = pytest.importorskip("optuna"), []
    create, sampler = optuna.create_study, optuna.samplers.TPESampler
    monkeypatch.setattr(optuna, "create_study", lambda **options: (asked.append(options["directions"]), create(**options))[1])
    monkeypatch.setattr(optuna.samplers, "TPESampler", lambda **options: (asked.append(options["seed"]), sampler(**options))[1])
    evaluate(trained, "--adc_range", "full", "--adc_bits", "3:5", "--search", "2", "--search_seed", "7")
    assert asked == [7, ["maximize", "minimize"]]


def test_plans_that_cannot_be_end_no_search(evaluate, trained):
    """The first start has cells of 4 bits, which the device cannot have."""
    evaluate(trained, "--device", "winbond_asu_2bit", "--cell_bits", "2", "4", "--adc_plan", "significance", "--adc_bits", "1", "2",
             "--per_layer", "features.4:adc_bits=1/2", "--chips", "1", "--calib_images", "8", "--search", "2")
    rows = list(csv.DictReader(open("save/search.csv")))
    assert len(rows) == 2 and all("2-bit cells" in row["setting"] for row in rows)


def test_costs_of_a_search_are_counted_for_all_digits_that_it_may_take(evaluate, trained):
    """How long n is depends on them."""
    measured, _ = evaluate(trained, "--adc_range", "full", "--per_layer", "features.4:dac_bits=1/2", "--dac_bits", "1", "2", "4",
                           "--search", "8", "--objective", "energy", "--cost", "rram_65nm")
    assert len({setting.spec.dac_bits for setting in measured if setting}) > 1


def test_a_search_counts_idle_reads_of_all_its_layouts(evaluate, trained):
    evaluate(trained, "--adc_range", "full", "--per_layer", "features.4:rows=8/16", "--search", "2", "--objective", "energy",
             "accuracy", "--cost", "rram_65nm", "--adc_idle", "skip")
    assert len(results("save")) > 2


@pytest.mark.parametrize("more, words", [
    (["--objective", "speed"], "--objective speed: unknown"), (["--objective", "energy"], "there is no energy without --cost"),
    (["--at_least", "x=1"], "--at_least x=1: give NAME=VALUE")])
def test_aims_of_a_search_are_refused_before_any_work(refused, trained, more, words):
    refused(["--resume", trained, *QUICK, "--adc_range", "full", "--adc_bits", "3", "4", "--search", "2", *more], words)


def test_a_search_of_several_networks_begins_when_all_can_be_searched(evaluate, trained):
    Path("other").mkdir()
    data = {"data": torch.load(trained, weights_only=True)["data"]}
    other = save("other/b.pth.tar", network("vgg16"), data, val_split=0.02, seed=3, model="vgg16_quant")
    with pytest.raises(UserError, match="no layer on crossbars is called so"):
        evaluate(trained, other, "--adc_range", "full", "--per_layer", "features.4:adc_bits=2:4", "--search", "3")
    assert not list(Path("save").glob("points/*.json"))


SEARCH = ["--adc_range", "full", "--per_layer", "features.*:adc_bits=1:6", "classifier.*:cell_bits=1/2", "--objective", "bits", "changed"]


def test_a_search(evaluate, trained):
    measured, text = evaluate(trained, *SEARCH, "--search", "10", drawn=True)
    rows = list(csv.DictReader(open("save/search.csv")))
    assert len(rows) == len({row["setting"] for row in rows}) == 10 and "search: 10 of 10 settings, 0 of them proposed" in text
    points = [(float(row["bits"]), float(row["changed"])) for row in rows]
    front = [point for point, row in zip(points, rows) if row["front"] == "True"]
    assert {point for point in points if not any(o != point and o[0] <= point[0] and o[1] <= point[1] for o in points)} == {*front}
    tested = [row for row in results("save") if row["per_layer"] and not row["validation"]]
    assert len(tested) == len(front) and all(row["test_changed"] for row in rows if row["front"] == "True")
    assert all((row["test_changed"] == "") == (row["front"] == "False") for row in rows)
    shares = {100 * row["changed_predictions"] / row["n_images"] for row in tested}  # of sets of different size
    assert {float(row["test_changed"]) for row in rows if row["test_changed"]} == shares
    assert Path("save/search.png").read_bytes().startswith(b"\x89PNG")
    if search.importlib.util.find_spec("plotly"):
        page = Path("save/search.html").read_text()
        assert rows[0]["setting"].split(", ")[0] in page and "plotly" in page.lower()
    before = Path("save/search.csv").read_bytes()
    assert evaluate(trained, *SEARCH, "--search", "10")[0] == [] and Path("save/search.csv").read_bytes() == before
    measured, _ = evaluate(trained, *SEARCH, "--search", "11")  # it goes on where it ended
    assert 1 <= len(measured) <= 1 + 11


def test_bounds_of_a_search(evaluate, trained, capsys):
    evaluate(trained, *SEARCH, "--search", "6", "--at_most", "bits=4", "--at_least", "accuracy=0")
    rows = list(csv.DictReader(open("save/search.csv")))
    assert {row["within_bounds"] for row in rows} == {"True", "False"}
    assert all((float(row["bits"]) <= 4) == (row["within_bounds"] == "True") for row in rows)
    assert all(float(row["bits"]) <= 4 for row in rows if row["front"] == "True")
    for more, words in ((["--at_most", "bits=0"], "none of 6 settings is within the bounds; nearest is 1-bit cells"),
                        (["--at_least", "accuracy=101"], "--at_least accuracy=101: accuracy % is at least 0 and at most 100: give a bound"),
                        (["--at_least", "speed=1"], "--at_least speed=1: give NAME=VALUE with one of accuracy, "),
                        (["--objective", "speed"], "--objective speed: unknown, choose from accuracy, "),
                        (["--objective", "energy"], "--search: there is no energy without --cost")):
        with pytest.raises(UserError, match=re.escape(words)):
            evaluate(trained, *SEARCH, "--search", "6", *more)
    evaluate(trained, *SEARCH, "--search", "6", "--objective", "energy", "accuracy", "--cost", "rram_65nm")
    rows = list(csv.DictReader(open("save/search.csv")))
    assert all(float(row["energy"]) > 0 for row in rows) and len({row["energy"] for row in rows}) > 3
    with pytest.raises(UserError, match="--search chooses among the values of hardware flags: give one of them several"):
        evaluate(trained, "--search", "6")
    with pytest.raises(UserError, match="--per_layer x: no layer on crossbars is called so"):
        evaluate(trained, "--search", "6", "--per_layer", "x:adc_bits=1/2")


def test_what_optuna_is_told_of_bounds(evaluate, trained, monkeypatch):
    """More than 0 is beyond a bound, on either side of it."""
    optuna, told, values = pytest.importorskip("optuna"), [], []
    monkeypatch.setattr(optuna.trial.Trial, "set_constraint", lambda _, name, value: told.append(value))
    values_of = search.Search._values
    monkeypatch.setattr(search.Search, "_values", lambda *args: (values.append(values_of(*args)), values[-1])[1])
    evaluate(trained, "--adc_range", "full", "--adc_bits", "3", "5", "--search", "2", "--objective", "bits", "--at_least", "bits=4",
             "--at_most", "bits=6")
    assert [value["bits"] for value in values] == [5, 3] and told == [-1, -1, 1, -3]


@pytest.mark.parametrize("objectives, labels", [
    (["changed", "bits"], ("mean ADC bits of all reads", "predictions that differ from the software's (%)")),
    (["bits", "accuracy"], ("mean ADC bits of all reads", "accuracy (%)")),  # as all pictures have it
    (["changed", "accuracy"], ("accuracy (%)", "predictions that differ from the software's (%)")),
    (["conversions", "bits"], ("mean ADC bits of all reads", "share of the reads that are converted")),
    (["changed"], ("predictions that differ from the software's (%)",) * 2),  # bits are not known of each
])
def test_axes_of_a_search(objectives, labels, evaluate, trained, monkeypatch):
    drawn = []
    monkeypatch.setattr(search, "save", lambda figure, *_, **__: drawn.append(figure.axes[0]))
    evaluate(trained, "--adc_range", "full", "--adc_bits", "3", "5", "--search", "2", "--objective", *objectives, drawn=True)
    assert [(axes.get_xlabel(), axes.get_ylabel()) for axes in drawn] == [labels]
    rows = list(csv.DictReader(open("save/search.csv")))
    names = {each.axis: name for name, each in search.objectives_for(accuracy).items()}
    for label, values in zip(labels, drawn[0].lines[0].get_data()):
        assert [*values] == [float(row[names[label]]) for row in rows]


OWN = "level,conductance_uS,std_uS\n0,1,0.2\n1,10,1\n"


def test_a_search_among_files_of_devices(evaluate, trained):
    """A file is read once, so a setting is measured once; two of one name are told apart."""
    for folder in ("a", "b"):
        Path(folder).mkdir()
        Path(folder, "mine.csv").write_text(OWN.replace("0.2", "0.2" if folder == "a" else "3"))
    flags = ["--device", "a/mine.csv", "b/mine.csv", "--adc_range", "full", "--adc_bits", "3", "4", "--objective", "bits", "changed"]
    evaluate(trained, *flags, "--search", "4")
    rows = list(csv.DictReader(open("save/search.csv")))
    assert len(rows) == len({row["setting"] for row in rows}) == 4
    assert {row["device"] for row in results("save") if row["device"]} == {"a/mine.csv", "b/mine.csv"}


@pytest.mark.parametrize("values, message", [
    (["--device", "nosuch"], "--device nosuch: there is no preset and no file"),
    (["--device", "techA", "nosuch"], "--device nosuch: there is no preset"),
    (["--device", "techA", "--device_time", "0", "99d"], "--device techA: techA at 25 C has no data at"),
    (["--device_time", "1h"], "--device_time is for the cells of a device")])
def test_devices_of_a_search_that_cannot_be(values, message):
    with pytest.raises(UserError, match=re.escape(message)):
        rows = flags.parse(hardware_parser(), [*values, "--adc_bits", "3", "4"])
        eval_settings._check_search(eval_settings.EvalSettings(search=3, hardware=rows), {})


def hardware_parser():
    parser = eval_settings.ArgumentParser(add_help=False)
    eval_settings.add_hardware(parser)
    return parser


def test_times_that_one_of_the_devices_has_may_be_searched():
    rows = {"device": ["techA", "rram_wan"], "device_time": [3600.0, 172800.0]}  # two days are those of one
    assert {*eval_settings.chips.devices_of(rows)} == {"techA", "rram_wan"}


class Stub:
    """In place of a bench: what it says of a setting follows from its ADC bits and cells by `sign`."""

    shown = None

    def __init__(self, sign):
        self.sign = sign

    def check(self, settings):
        pass

    def point(self, setting):
        bits, cells = setting.spec.adc_bits, setting.spec.cell_bits
        return {"row": {"accuracy": 50 + self.sign * (bits - cells), "mean_bits": bits}}


def searched(count, sign, caplog):
    """The settings that a search of so many measures, in its order, and what it says."""
    rows = {"adc_bits": [*range(1, 9)], "cell_bits": [1, 2, 4], "dac_bits": [1, 2, 4], "weights": ["offset", "pair"]}
    found = search.Search.__new__(search.Search)
    found.of = eval_settings.EvalSettings(hardware=rows, w_bits=4, a_bits=4, search=count)
    found.bench, found.space, found.found = Stub(sign), search.Space(found.of, ["a"]), {}
    found.known, (found.objectives, found.bounds) = search.objectives_for(accuracy), search.aims(found.of, accuracy)
    found.names = found.objectives
    with caplog.at_level(logging.INFO):
        caplog.clear()
        found.run(lambda settings: None, logging.getLogger("searched"))
    return list(found.found), caplog.text


def test_a_search_says_how_many_settings_are_proposed_from_what_is_known(caplog):
    """All but those of the first 16 trials, of which two are alike here: they are the same whatever is found."""
    pytest.importorskip("optuna")
    (one, text), (other, _) = (searched(24, sign, caplog) for sign in (1, -1))
    assert one[:15] == other[:15] and one[15:17] != other[15:17]
    assert "search: 15 of 24 settings, 0 of them proposed" in text and "search: 24 of 24 settings, 9 of them proposed" in text
    assert "perhaps none" not in text
    few, text = searched(10, 1, caplog)
    assert few == one[:10] and "search: 10 of 10 settings, 0 of them proposed" in text
    assert "the first settings, up to 17, are fixed ones and some at random; those behind them are proposed from what is known, " in text
    assert "of --search 10 perhaps none" in text


def test_the_front_and_what_is_nearest_to_bounds():
    """By the first objective, best first; to be far within one bound makes up for nothing that is beyond another."""
    found = search.Search.__new__(search.Search)
    found.bench = SimpleNamespace(point=lambda setting: {"row": {"accuracy": 92}})
    found.known, found.objectives, found.bounds = search.objectives_for(accuracy), ["accuracy", "bits"], []
    found.found = {name: {"accuracy": accuracy, "bits": bits} for name, accuracy, bits in (("a", 80, 2), ("b", 90, 25), ("c", 79, 3),
                                                                                          ("d", 85, 3))}
    assert found._front() == ["b", "d", "a"]
    found.bounds = [Bound("accuracy", 1, 0.0, 95.0), Bound("bits", -1, 0.0, 30.0)]
    assert found._front() == [] and found._nearest() == "b"


def test_more_is_better_of_accuracy_alone():
    assert [name for name, each in search.objectives_for(accuracy).items() if each.sign > 0] == ["accuracy"]
    assert not [name for name, each in search.objectives_for(Metric("error", len, higher=False)).items() if each.sign > 0]
    assert search.OBJECTIVES["changed"].of({"changed_predictions": 3, "n_images": 40}) == 7.5


@pytest.mark.parametrize("texts, variables, chosen", [
    (["a.*:adc_bits=4:6,cell_bits=1/2"], 4, {"a.1": (6, 2), "a.2": (6, 2), "b": (3, 1)}),
    (["a.1:cell_bits=2,adc_bits=4:6", "a.2:cell_bits=2,adc_bits=4/5"], 2, {"a.1": (6, 2), "a.2": (5, 2), "b": (3, 1)}),
    (["a.*:adc_bits=4:6", "a.1:adc_bits=8"], 1, {"a.1": (8, 1), "a.2": (6, 1), "b": (3, 1)}),
    (["a.1:adc_bits=8", "a.*:adc_bits=4:6"], 2, {"a.1": (6, 1), "a.2": (6, 1), "b": (3, 1)}),
    (["*:adc_bits=7", "a.2:adc_bits=4/5"], 1, {"a.1": (7, 1), "a.2": (5, 1), "b": (7, 1)}),
    (["a.1:cell_bits=1", "a.*:cell_bits=2,adc_bits=4/5"], 2, {"a.1": (5, 2), "a.2": (5, 2), "b": (3, 1)}),
    (["a.*:cell_bits=2", "a.1:cell_bits=1,adc_bits=4/5"], 1, {"a.1": (5, 1), "a.2": (3, 2), "b": (3, 1)})])
def test_what_a_search_may_choose_for_single_layers(texts, variables, chosen):
    """The last pattern that fits a layer wins, whether it leaves a choice or not."""
    settings = eval_settings.EvalSettings(hardware={"adc_bits": [3], "per_layer": texts}, w_bits=4, a_bits=4)
    space = search.Space(settings, ["a.1", "a.2", "b"])
    assert len(space.variables) == variables
    setting = space.setting(space.alike(1))
    assert {name: (setting.spec_of(name).adc_bits, setting.spec_of(name).cell_bits) for name in chosen} == chosen


def test_a_search_starts_from_the_planners_share(evaluate, trained):
    """Plans of one budget are measured, and then, among the first, each layer with what is nearest to its bits in them."""
    flags = ["--adc_plan", "significance", "--adc_bits", "1", "--per_layer", "*:adc_bits=1:4:0.25"]
    evaluate(trained, *flags, "--search", "15", "--objective", "bits", "changed")
    rows = [row for row in results("save") if row["validation"] and row["adc_plan"] == "significance"]
    whole = [row for row in rows if not row["per_layer"]]
    own = [{name: of["adc_bits"] for name, of in row["per_layer"].items()} for row in rows if row["per_layer"]]
    assert sorted(row["adc_bits"] for row in whole) == [1, 1.75, 2.5, 3.25, 4] and len(whole) + len(own) == 15
    for row in whole:
        nearest = {name: min(max(round(4 * bits) / 4, 1), 4) for name, bits in row["layer_bits"].items()}
        reads = sum(abs(row["layer_bits"][name] - value) for name, value in nearest.items())
        assert any(sum(abs(row["layer_bits"][name] - value) for name, value in each.items()) <= reads + 1e-9 for each in own)


def test_settings_with_bits_of_single_layers_are_one_curve():
    """Names of single layers would fill the picture."""
    spec = CrossbarSpec(adc_plan="significance", adc_bits=1.5)
    settings = [Setting(spec), Setting(replace(spec, adc_bits=2)), *(Setting(spec, per_layer={"a": {"adc_bits": bits, "rows": 64}})
                                                                   for bits in (3, 1))]
    records = [Record(setting, torch.zeros(1), 0, 0, 0, 0, None, mean_bits=bits) for setting, bits in zip(settings, (1.5, 2, 3, 1))]
    curves = report.curves_over_bits(records)
    assert {name: [r.mean_bits for r in points] for name, points in curves.items()} == {
        "1-bit cells, planned": [1.5, 2], "1-bit cells, planned, a: rows 64, layers with bits of their own": [1, 3]}


def test_bands_of_pictures():
    """Ideal cells or one chip: the chance of the images; several chips: their deviation too, up to all images. Chips of one accuracy have
    a band."""
    one = Record(None, torch.zeros(200), 97.0, 99.0, 16, 1.0, None, chance=2.0)
    several, alike = replace(one, chip_accuracies=(96.0, 98.0)), replace(one, chip_accuracies=(97.0, 97.0, 97.0))
    assert report.bands([one, several, alike]).T.tolist() == [[97, 95, 99], [97, pytest.approx(97 - 6**0.5), pytest.approx(97 + 6**0.5)],
                                                              [97, 95, 99]]
    assert report.bands([replace(one, accuracy=99.0), replace(one, accuracy=1.0)]).T.tolist() == [[99, 97, 100], [1, 0, 3]]
    of_percents = replace(one, accuracy=150.0, metric=Scale("error", "%", False))
    assert report.bands([of_percents]).T.tolist() == [[150, 148, 150]]


def test_bands_are_said_to_be_what_they_are():
    one = Record(None, torch.zeros(200), 99.0, 99.0, 16, 1.0, None, chance=2.0)
    several = replace(one, chip_accuracies=(98.0, 100.0))
    assert report.band_words([one]) == ["standard deviation by the choice of examples"]
    assert report.band_words([several, one]) == ["standard deviation over 2 chips and by the choice of examples"]
    assert report.band_words([replace(several, chance=None)]) == ["standard deviation over 2 chips"]
    assert report.band_words([replace(one, chance=None)]) == []


@pytest.mark.parametrize("curves", [3, 9])
def test_nothing_of_a_picture_is_cut_off_or_hidden(curves, tmp_path, monkeypatch):
    """Titles end within the figure; a legend of many lines stands below the curves."""
    drawn = []
    monkeypatch.setattr(report, "save", lambda figure, *_, **__: drawn.append(figure))
    per_layer = [{f"layer.{i}": {"adc_bits": 4, "rows": 64}, "a_layer_of_a_long_name.*": {"cell_bits": 2}} for i in range(curves)]
    records = [Record(Setting(per_layer=each), torch.zeros(9), 50 + i, 99, 9, 0, None, mean_bits=6) for i, each in enumerate(per_layer)]
    report.accuracy_plot(records, "a title of many words " * 6, tmp_path / "picture.png")
    figure, = drawn
    axes, width = figure.axes[0], figure.bbox.width
    figure.savefig(tmp_path / "picture.png")
    assert "\n" not in figure.get_suptitle()
    for text in (figure._suptitle, axes.xaxis.label, axes.yaxis.label):
        box = text.get_window_extent()
        assert 0 <= box.x0 and box.x1 <= width and 0 <= box.y0 and box.y1 <= figure.bbox.height
    legend = (figure.legends or [axes.get_legend()])[0].get_window_extent()
    assert (legend.y1 <= axes.get_window_extent().y0) == (curves == 9)
    assert 0 <= legend.x0 and legend.x1 <= width and 0 <= legend.y0


def test_values_of_single_layers():
    assert per_layer.parse(["a:adc_bits=1/2:3:0.5,mapping=tap/im2col", "a:rows=64"]) == {
        "a": {"adc_bits": [1, 2, 2.5, 3], "mapping": ["tap", "im2col"], "rows": [64]}}
