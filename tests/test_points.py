"""experiment/measure/points.py and keys.py: what a point's key says, and points that are measured once whoever is killed."""

import base64
import collections
import gc
import json
import logging
import multiprocessing
import os
import pickle
import random
import signal
import sys
import threading
import time
import tracemalloc
import zlib
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from test_eval import SMALL, network, shown_images

import models
from experiment.measure import columns, keys, points, results
from experiment.inputs import packed
from experiment.measure.answers import alike
from experiment.inputs.data import Batches
from experiment.measure.points import Points
from experiment.settings.eval_flags import EvalSettings
from models import quant, vgg
from models.quant import Calibration, CrossbarSpec, Device
from models.quant.cost import Technology
from models.quant.storage.files import STALE, locked
from models.quant.measuring.chips import Chips
from models.quant.measuring.measure import measure
from models.quant.measuring.metrics import Metric, cross_entropy
from models.quant.measuring.setting import Setting

FORK = multiprocessing.get_context("fork")

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def small_network(monkeypatch):
    monkeypatch.setitem(vgg.CONFIGS, "vgg7", SMALL["vgg7"])


def a_point(**row):
    """What a measurement of two images gives, in short."""
    usual = {"accuracy": 50.0, "software_accuracy": 50.0, "changed_predictions": 0, "n_images": 2, "seconds": 1.0, "engine": None,
             "mean_bits": None, "conversions": None, "chip_accuracies": None}
    return {"decides": {}, "row": usual | row, "predictions": points._packed(torch.tensor([[0, 1]])), "ranges": None, "cost": None}


def started(target, *args):
    process = FORK.Process(target=target, args=args)
    process.start()
    return process


# ---- killed at any moment ----------------------------------------------------------------------------------------------


def driver(folder, names):
    """What a program does that measures many settings; the time of one is that of writing it."""
    found = Points(folder)
    random.seed(os.getpid())
    busy = list(names)
    for wait in (False, True):  # first those that nobody else is measuring
        for name in busy.copy():
            def make(name=name):
                with open(folder / "begun", "a") as file:
                    file.write(name + "\n")
                return a_point(number=int(name, 16)) | {"decides": [random.random()] * 500}
            if found.measure(name, make, wait):
                busy.remove(name)


def test_a_thousand_points_and_twenty_kills(tmp_path):
    """Two programs in one folder, one of them killed 20 times: all points are there, whole, with one line each, and a kill costs no
    more than the one point that it hit."""
    names = [f"{number:064x}" for number in np.random.default_rng(0).permutation(1000).tolist()]
    generator, kills = random.Random(0), 0
    running = [started(driver, tmp_path, names) for _ in range(2)]
    while kills < 20:
        time.sleep(generator.uniform(0, 0.03))  # when it is killed is left to chance
        victim = generator.randrange(2)
        if running[victim].is_alive():
            os.kill(running[victim].pid, signal.SIGKILL)
            kills += 1
        running[victim].join()
        running[victim] = started(driver, tmp_path, names)
    for process in running:
        process.join()
        assert process.exitcode == 0
    found = Points(tmp_path)
    assert sorted(row["number"] for row in found.rows()) == list(range(1000))
    assert [found.read(name)["row"]["number"] for name in names] == [int(name, 16) for name in names]
    assert collections.Counter(row["number"] for row in results.read(found.results)) == dict.fromkeys(range(1000), 1)
    begun = collections.Counter((tmp_path / "begun").read_text().split())
    assert len(begun) == 1000 and begun.total() <= 1000 + kills


def dying(folder, where):
    """A program that is killed at a chosen place of writing a point."""
    def die(*_):
        os.kill(os.getpid(), signal.SIGKILL)
    if where == "in the file":
        os.fsync = die
    elif where == "before its name":
        os.replace = die
    else:
        results.append = die
    Points(folder).measure("ab" * 32, lambda: a_point(a=1))


@pytest.mark.parametrize("where, there", [("in the file", False), ("before its name", False), ("before its line", True)])
def test_killed_while_a_point_is_written(where, there, tmp_path):
    process = started(dying, tmp_path, where)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    found, made = Points(tmp_path), []
    assert found.path("ab" * 32).exists() == there and not results.read(found.results)
    found.measure("ab" * 32, lambda: made.append(1) or a_point(a=1))
    assert bool(made) != there and len(results.read(found.results)) == len(made)
    found.mend()
    found.mend()
    assert [row["a"] for row in results.read(found.results)] == [1] and found.read("ab" * 32)["row"]["a"] == 1
    left = list((tmp_path / "points").glob(".*.tmp"))
    assert len(left) == (not there)  # it may be another program's, until it is old
    for path in left:
        os.utime(path, (0, 0))
    found.mend()
    assert not list((tmp_path / "points").glob(".*.tmp"))


def compressed(content):
    return base64.b64encode(zlib.compress(content)).decode()


DEEP = b"[" * 100_000 + b"]" * 100_000
BOMB = compressed(bytes(2**27))


@pytest.mark.parametrize("damage", [
    *(lambda p, bad=bad: bad for bad in (b"", b"{", b"[1]", b'{"key": "cd"}', DEEP, b'{"key": %b}' % DEEP)),
    lambda p: p.update(key=["a"]), lambda p: p.pop("row"), lambda p: p.update(row=None), lambda p: p.update(took_s="long"),
    lambda p: p.pop("predictions"), lambda p: p.update(predictions=[0, 1]),
    lambda p: p.update(cost="nothing"), lambda p: p.update(cost={"a": 1}),
    lambda p: p.update(ranges=[1]), lambda p: p.update(ranges={"layers": {"a": 1}}),
    *(lambda p, bad=bad: p["predictions"].update(bad) for bad in (
        {"zlib": "AAAA"}, {"zlib": "?"}, {"zlib": compressed(b"\0")}, {"zlib": compressed(b"\0\1\2")}, {"zlib": BOMB},
        {"zlib": base64.b64encode(zlib.compress(b"\0\1")[:-2]).decode()}, {"shape": [1, 3]}, {"shape": [2]}, {"shape": 2}, {"type": "|O8"},
        {"type": "<f4"}, {"type": "nothing"})),
    *(lambda p, bad=bad: p["row"].update(bad) for bad in (
        {"accuracy": "50"}, {"accuracy": float("nan")}, {"accuracy": float("inf")}, {"accuracy": None}, {"software_accuracy": 101},
        {"seconds": 0}, {"changed_predictions": 0.5}, {"n_images": True}, {"mean_bits": "many"}, {"mean_bits": 10**400},
        {"mean_bits": True}, {"seconds": float("inf")}, {"layer_bits": [1]}, {"engine": 1},
        {"chip_accuracies": [50.0, float("nan")]}, {"chip_accuracies": [50.0, 50.0]}, {"n_images": 1}, {"n_images": 3})),
    lambda p: (p["row"].update(n_images=1), p["predictions"].update(shape=[1, 1], zlib=compressed(b"\0"))),  # of fewer images
    lambda p: (p["row"].update(n_images=2**27), p["predictions"].update(shape=[1, 2**27], zlib=BOMB)),
    lambda p: (p["row"].update(chip_accuracies=[50.0] * 2**12, chip_changed_predictions=[0]),
               p["predictions"].update(shape=[2**12, 2], zlib=BOMB)),
])
def test_a_damaged_point_is_measured_again(damage, tmp_path):
    """Without a word, and with no more memory than a point of these images takes."""
    found, key = Points(tmp_path), "ab" * 32
    found.images = 2
    good = a_point() | {"key": key, "took_s": 1.0}
    bad = damage(good)
    found.folder.mkdir()
    found.path(key).write_bytes(bad if isinstance(bad, bytes) else json.dumps(good).encode())
    tracemalloc.start()
    assert found.read(key) is None
    found.look_for_older(use=True)
    found.mend()
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()
    assert found.measure(key, lambda: a_point(a=1)) and found.read(key)["row"]["a"] == 1
    assert [row["a"] for row in found.rows()] == [1]


def test_no_point_has_more_predictions_than_memory_holds(tmp_path):
    """Where nobody says how many images there are."""
    found, key, many = Points(tmp_path), "ab" * 32, points.MOST + 1
    with pytest.raises(ValueError, match="at most"):
        points._unpacked({"type": "|u1", "shape": [1, many], "zlib": BOMB}, (1, many))
    found.measure(key, a_point)
    assert found.images is None and found.read(key)


def test_lines_that_are_no_results_are_left_out(tmp_path):
    """Of whatever kind; a point whose line is none gets another."""
    found, key = Points(tmp_path), "ab" * 32
    found.measure(key, lambda: a_point(a=1))
    bad = [DEEP, b'{"key": ["a"]}', b'{"key": {}}', b"[]", b'{"key": "%b", "accuracy": "high"}' % key.encode(), b"\xff", b'{"a":']
    found.results.write_bytes(b"\n".join(bad) + b"\n")
    assert results.read(found.results) == [] and [row["a"] for row in found.rows()] == [1]


def holder(folder, pipe):
    def make():
        pipe.send("making")
        pipe.recv()
        return a_point(by="holder")
    Points(folder).measure("ab" * 32, make)


def test_what_another_program_is_measuring_is_left_to_it(tmp_path):
    here, there = FORK.Pipe()
    process = started(holder, tmp_path, there)
    assert here.recv() == "making"
    found = Points(tmp_path)
    assert found.measure("ab" * 32, lambda: pytest.fail("measured twice")) is False
    found.path("ab" * 32).write_bytes(b"{")  # was damaged, and is being measured anew
    assert found.measure("ab" * 32, lambda: pytest.fail("measured twice")) is False
    assert found.measure("cd" * 32, lambda: a_point()) is True
    here.send("go on")
    assert found.measure("ab" * 32, lambda: pytest.fail("measured twice"), wait=True) is True
    process.join()
    assert found.read("ab" * 32)["row"]["by"] == "holder"


@pytest.mark.parametrize("metric", [None, cross_entropy, Metric("even", lambda y, labels: (labels % 2 == 0).double().mean())],
                         ids=["classes", "numbers", "a mean"])
def test_a_record_of_any_metric_comes_back_from_its_point(metric):
    net = models.create("vgg7_quant_eval", alpha_init=2.0).eval()
    net.load_state_dict(network().state_dict(), strict=False)
    images, labels = shown_images(8)
    two = Chips(device=Device("noisy", "invented", 1.0, 31.0, sigma_us=4.0), chips=2)
    record = measure(net, images, labels, Setting(CrossbarSpec(adc_range="full"), chips=two), engine="reference", metric=metric)
    settings = EvalSettings(model="vgg7_quant_eval", dataset="digits", w_bits=4, a_bits=4, wq="dorefa", save_path="save")
    row = columns.line(columns.Measured(record, settings))
    again = points.record_of(json.loads(json.dumps(points.of_record(record, row, {}, None))), record.setting)
    for field in fields(record):
        one, other = getattr(record, field.name), getattr(again, field.name)
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other, field.name


def test_a_record_comes_back_from_its_point():
    net = models.create("vgg7_quant_eval", alpha_init=2.0).eval()
    net.load_state_dict(network().state_dict(), strict=False)
    images, labels = shown_images(8)
    noisy = Device("noisy", "invented", 1.0, 31.0, sigma_us=4.0)
    full, two = CrossbarSpec(adc_range="full"), Chips(device=noisy, chips=2)
    for setting in (None, Setting(full), Setting(full, chips=two)):
        record = measure(net, images, labels, setting, engine="reference")
        row = {field.name: getattr(record, field.name) for field in fields(record)
               if field.name not in ("setting", "predictions", "chip_predictions", "chip_changes", "metric")}
        stored = points.of_record(record, row | {"chip_changed_predictions": record.chip_changes, "n_images": 8}, {}, None)
        again = points.record_of(json.loads(json.dumps(stored)), setting)
        for field in fields(record):
            one, other = getattr(record, field.name), getattr(again, field.name)
            assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other, field.name


def test_classes_that_no_byte_counts_come_back():
    predictions = torch.tensor([[0, 255, 256], [999, 70000, 1]])
    assert torch.equal(points._unpacked(points._packed(predictions), (2, 3)), predictions)


def test_a_point_that_was_removed_has_no_row(tmp_path):
    found = Points(tmp_path)
    for name in ("ab" * 32, "cd" * 32):
        found.measure(name, lambda: a_point())
    found.path("ab" * 32).unlink()
    assert [row["key"] for row in found.rows()] == ["cd" * 32]


def test_a_line_waits_for_other_writers(tmp_path):
    path = tmp_path / "results.jsonl"
    writer = threading.Thread(target=results.append, args=(path, {"a": 1}))
    with locked(path):
        writer.start()
        writer.join(0.3)
        assert not results.read(path)
    writer.join()
    assert results.read(path) == [{"a": 1}]


def slow_to_append(folder, pipe):
    def append(*args, real=results.append):
        pipe.send("its file is there")
        pipe.recv()
        real(*args)
    results.append = append
    Points(folder).measure("ab" * 32, a_point)


def test_a_line_that_its_process_is_about_to_append_is_left_to_it(tmp_path):
    here, there = FORK.Pipe()
    process = started(slow_to_append, tmp_path, there)
    here.recv()
    found = Points(tmp_path)
    found.mend()
    there, lines = found.path("ab" * 32).exists(), results.read(found.results)
    here.send("go on")
    process.join()
    assert there and lines == []
    found.mend()
    assert len(results.read(found.results)) == 1


def test_a_folder_that_is_closed_to_us_is_no_other_process(tmp_path, monkeypatch):
    """Who waited for that one would wait for ever."""
    def closed(path, *args):
        raise PermissionError(13, "Permission denied", str(path))

    (tmp_path / "points").mkdir()
    monkeypatch.setattr(points.os, "open", closed)
    with pytest.raises(PermissionError, match="points/.claims"):
        Points(tmp_path).measure("1" * 64, a_point)


def test_tables_of_fewer_points_replace_none_of_more(tmp_path, monkeypatch):
    """A program that has read the rows writes them before another one reads any."""
    folder, seen, write = Points(tmp_path), [], results.write_tables
    folder.measure("1" * 64, lambda: a_point() | {"row": {"accuracy": 1}})

    def look(*args):
        child = os.fork()
        if not child:
            with folder.claims.claim(points.TABLES) as mine:
                os._exit(mine)
        seen.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        return write(*args)

    monkeypatch.setattr(results, "write_tables", look)
    assert folder.write_tables() == results.read(tmp_path / "results.jsonl") == [{"accuracy": 1, "key": "1" * 64}]
    assert seen == [False] and (tmp_path / "results.csv").read_text() == f"accuracy,key\n1,{'1' * 64}\n"


def test_tables_of_the_same_rows_are_left_alone(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert results.write_tables(tmp_path, [{"a": 1}]) == [tmp_path / "results.csv"]
    assert results.write_tables(tmp_path, [{"a": 1}]) == []
    assert results.write_tables(tmp_path, [{"a": 2}]) == [tmp_path / "results.csv"]


def test_what_killed_processes_left_goes_and_what_is_being_written_stays(tmp_path, monkeypatch):
    """Also by the clock of a machine that is two hours ahead of the drive's."""
    found = Points(tmp_path)
    (found.folder / "chips").mkdir(parents=True)
    old, young = ([folder / f".{name}.tmp" for folder in (found.folder, found.folder / "chips")] for name in ("old", "young"))
    for path in (*old, *young):
        path.touch()
    for path in old:
        os.utime(path, (time.time() - STALE - 9,) * 2)
    monkeypatch.setattr(time, "time", lambda now=time.time: now() + 7200)
    found.mend()
    assert [path.exists() for path in (*old, *young)] == [False, False, True, True]


@pytest.mark.parametrize("absent", ["pyarrow", "pyarrow.parquet"])
def test_a_parquet_is_never_of_other_rows_than_the_csv(tmp_path, monkeypatch, absent):
    """Where pyarrow is not installed, or in halves."""
    parquet = pytest.importorskip("pyarrow.parquet")
    results.write_tables(tmp_path, [{"a": 1}])
    with monkeypatch.context() as without:
        without.setitem(sys.modules, absent, None)
        assert results.write_tables(tmp_path, [{"a": 1}, {"a": 2}]) == [tmp_path / "results.csv"]
    assert not (tmp_path / "results.parquet").exists()
    with monkeypatch.context() as ended:  # between the two files
        ended.setattr(results, "write_text", lambda path, text: None)
        results.write_tables(tmp_path, [{"a": 1}, {"a": 2}, {"a": 3}])
    assert len(results.write_tables(tmp_path, [{"a": 1}, {"a": 2}, {"a": 3}])) == 2
    assert parquet.read_table(tmp_path / "results.parquet").to_pydict() == {"a": [1, 2, 3]}


def test_digests_of_laws_go_with_them():
    device = Device.preset("techC_cells")
    before, first = len(keys._laws), keys.digest(device)
    assert keys.digest(pickle.loads(pickle.dumps(device))) == first
    gc.collect()
    assert len(keys._laws) <= before + 1


def test_whole_numbers_and_fractions_are_one_column(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    results.write_tables(tmp_path, [{"a": 3, "b": 1}, {"a": 2.5, "b": "x"}, {"a": None, "b": None}])
    assert parquet.read_table(tmp_path / "results.parquet").to_pydict() == {"a": [3.0, 2.5, None], "b": ["1", "x", None]}


# ---- what a key says ---------------------------------------------------------------------------------------------------


def key(setting):
    return keys.key_of(keys.of_setting(setting))


TECH = Device.preset("techA")
SETTINGS = [
    Setting(), *(Setting(CrossbarSpec(**{name: value})) for name, value in (
        ("cell_bits", 2), ("adc_bits", 5), ("rows", 64), ("mapping", "im2col"), ("reference", "digital"), ("dac_bits", 2),
        ("adc_range", "full"), ("adc_plan", "significance"), ("adc_max_bits", 7), ("w_bits", 5), ("a_bits", 5))),
    Setting(crossbar_layers="conv"), Setting(calibration=Calibration(rule="minmax")), Setting(calibration=Calibration(correct="none")),
    Setting(per_layer={"a": {"adc_bits": 5}}), Setting(per_layer={"a": {"adc_bits": 4}}), Setting(per_layer={"b": {"adc_bits": 5}}),
    *(Setting(chips=Chips(**({"device": TECH} | changes))) for changes in (
        {}, {"chips": 2}, {"chip_seed": 1}, {"noise_seed": 1, "adc_noise": 0.1}, {"adc_noise": 0.1}, {"wire_ohm": 1.0},
        {"reference_cells": "ideal"},
        {"device": Device.preset("techA", time="1h")}, {"device": Device.preset("techB")}, {"device": replace(TECH, stuck_on=0.1)})),
]


def test_every_part_of_a_setting_counts():
    assert len({key(setting) for setting in SETTINGS}) == len(SETTINGS)


BEFORE = """{"arithmetic": 1, "images": "i", "network": "n", "setting": {"arithmetic_of_plans": 2, "spec": {"w_bits": 4, "a_bits": 4,
    "cell_bits": 1, "adc_bits": 1.5, "rows": 128, "mapping": "tap", "reference": "digital", "dac_bits": 1, "adc_range": "calibrated",
    "adc_plan": "significance", "adc_max_bits": 8, "weights": "offset"}, "crossbar_layers": "all", "calibration": {"rule": "mse",
    "per": "alike", "correct": "channel", "share": "network", "on": "nominal"}, "per_layer": [["a", {"adc_bits": 2}]], "chips": {
    "read_noise": null, "adc_noise": 0.1, "adc_offset": 0, "adc_gain": 0, "access": "voltage", "wire_ohm": 0, "row_ohm": 1,
    "driver_ohm": 0, "reference_cells": "device", "noise_seed": 0, "chips": 1, "chip_seed": 0,
    "device": "69bdc5ab41b41f1fb2cf3556a3dd28bda7356383d747f38da948599d4e22f672", "arithmetic_of_readouts": 4,
    "arithmetic_of_word_lines": 2, "arithmetic": 2}}}"""  # what a point said that had no digest of the code


@pytest.mark.parametrize("idle", ["convert", "skip"])
def test_points_of_before_are_those_of_their_settings(idle, tmp_path, monkeypatch):
    """Of a file that lacks a field of the hardware it is known what that was, whatever its default is now."""
    monkeypatch.setattr(CrossbarSpec.__dataclass_fields__["adc_idle"], "default", "skip")
    spec = CrossbarSpec(adc_plan="significance", adc_bits=1.5, reference="digital", adc_idle=idle)
    made = Setting(spec, per_layer={"a": {"adc_bits": 2}}, chips=Chips(device=TECH, adc_noise=0.1, row_ohm=1.0))
    decides = {"images": "i", "network": "n", "setting": keys.of_setting(made), "code": keys.of_code(*keys.parts_of(made))}
    found, of_before = Points(tmp_path), a_point(a=1) | {"decides": json.loads(BEFORE)}
    found.measure("ab" * 32, lambda: of_before)
    found.look_for_older(use=False)
    assert found.key(decides) == keys.key_of(decides) and not found.current("ab" * 32) and not found.rows()
    assert "1 point was measured with other code" in found.says_older()
    found.look_for_older(use=True)
    assert found.key(decides) == ("ab" * 32 if idle == "convert" else keys.key_of(decides)) and found.rows()[0]["a"] == 1
    found.measure(keys.key_of(decides), lambda: a_point(a=2) | {"decides": decides})
    found.look_for_older(use=True)
    assert found.key(decides) == keys.key_of(decides) and [row["a"] for row in found.rows()] == ([2] if idle == "convert" else [1, 2])


def test_names_and_ways_to_say_the_same_do_not_count():
    assert key(Setting(chips=Chips(device=TECH))) == key(Setting(chips=Chips(device=replace(TECH, name="mine", source="x"), name="other")))
    full = CrossbarSpec(adc_range="full")
    assert key(Setting(full)) == key(Setting(full, calibration=Calibration(rule="minmax")))  # nothing is calibrated
    one, other = (Chips(device=TECH, reference_cells=cells) for cells in ("device", "ideal"))
    digital, but_one = CrossbarSpec(reference="digital"), {"a": {"reference": "analog"}}  # whose reference is no column of cells
    assert key(Setting(digital, chips=one)) == key(Setting(digital, chips=other))
    assert key(Setting(digital, chips=one, per_layer=but_one)) != key(Setting(digital, chips=other, per_layer=but_one))
    plan = {"adc_plan": "significance"}
    assert key(Setting(CrossbarSpec(adc_bits=3, **plan))) == key(Setting(CrossbarSpec(adc_bits=3.0, **plan)))


def test_every_number_of_the_network_and_the_images_counts():
    net = network()
    seen = {keys.of_network(net, ["a"]), keys.of_network(net, ["b"])}
    for name, value in network().state_dict().items():
        changed = network()
        state = changed.state_dict()
        state[name] = -value if value.dim() > 1 else value + 1
        changed.load_state_dict(state)
        seen.add(keys.of_network(changed, ["a"]))
    assert len(seen) == 2 + len(net.state_dict())
    x, y = torch.arange(96, dtype=torch.uint8).reshape(2, 3, 4, 4), torch.tensor([1, 2])
    images = [(x, [0.5], [1.0], y), (x + 1, [0.5], [1.0], y), (x, [0.4], [1.0], y), (x, [0.5], [2.0], y), (x, [0.5], [1.0], y + 1)]
    assert len({keys.of_images(Batches(x, mean, std, 4), y) for x, mean, std, y in images}) == len(images)
    assert keys.of_images(Batches(x, [0.5], [1.0], 4), y) == keys.of_images(Batches(x, [0.5], [1.0], 1), y)


def test_every_number_of_a_technology_counts():
    """Whatever its file is called."""
    usual = Technology.load("rram_65nm")
    dearer = {part: tuple(replace(source, value=source.value + 1) for source in sources) for part, sources in usual.sources.items()}
    others = [replace(usual, sources=usual.sources | {part: dearer[part]}) for part in dearer] + [
        replace(usual, **{name: getattr(usual, name) + 1}) for name in (
            "node", "columns", "columns_per_adc", "read_voltage", "read_pulse", "read_setup", "cell_area", "g_max", "copies")]
    assert len({keys.digest(each) for each in (usual, *others)}) == 1 + len(others)
    assert keys.digest(replace(usual, name="mine")) == keys.digest(usual)


def test_no_two_values_have_one_digest():
    x = torch.tensor([[1, 2, 3], [4, 5, 6]])
    values = [x, x.view(3, 2), x.double(), x.double().view(torch.int64), 1, 1.0, True, "1", None, [], {}, [[1], 2], [1, [2]], {"a": 1},
              x.bfloat16(), x.bfloat16().view(3, 2), -x.bfloat16(), x.half(), x.bfloat16().view(torch.int16), x.float().to_sparse(),
              torch.tensor(1.0).bfloat16(), torch.zeros(0).bfloat16(), {1}, {2}, {1, 2}, [1, 2], set(), 1j]
    assert len({keys.digest(value) for value in values}) == len(values)
    assert keys.digest({"a": 1, "b": 2}) == keys.digest({"b": 2, "a": 1})


def test_the_same_value_has_one_digest_however_it_lies_in_memory():
    x = torch.tensor([[1.0, 0, 3], [4, 5, 0]])
    for other in (torch._neg_view(-x), x.to_sparse(), x.t().contiguous().t(), torch.complex(x, x).conj().real):
        assert keys.digest(other) == keys.digest(x)
    assert keys.digest(x.bfloat16().t().contiguous().t()) == keys.digest(x.bfloat16())
    assert keys.digest(torch.complex(x, x).conj()) == keys.digest(torch.complex(x, -x))
    assert [*{0, 8}] != [*{8, 0}] and keys.digest({0, 8}) == keys.digest({8, 0})
    with pytest.raises(TypeError, match="no digest of object"):
        keys.digest([object()])


def test_answers_are_alike_but_for_the_last_digits_and_for_single_images():
    now = [[1.0, 0.0, 2.0], [0.0, -3.0, 4.0], [5.0, 5.0, 5.0], [0.0, 0.0, 1e-3]]

    def times(*factors):
        return [[factor * value for value in image] for factor, image in zip(factors, now)]

    assert alike(now, now) and alike(times(*[1.0009] * 4), now) and alike(times(1, -1, 1, 1), now)
    assert not alike(times(*[1.0011] * 4), now) and not alike(times(1, 1.0011, 0, -1), now)
    for damaged in (None, [], "1", now[:3], [[1.0]] * 4, [["a"] * 3] * 4, [[float("nan")] * 3] * 4, [[10**400] * 3] * 4, {"a": now}):
        assert not alike(damaged, now)


def test_a_point_of_a_network_that_answered_otherwise_is_named_and_measured_again(tmp_path, caplog):
    first, again = Points(tmp_path), Points(tmp_path)
    first.expect(lambda: [[1.0, 2.0]], logging.getLogger("test"))
    again.expect(lambda: [[1.0, 2.1]], logging.getLogger("test"))
    made = iter(range(9))

    def make():
        return a_point(number=next(made))

    def number(points, key):
        return (points.current(key) or {"row": {}})["row"].get("number")

    assert first.measure("a0", make) and Points(tmp_path).measure("b1", make)  # an older one does not say it
    assert (number(first, "a0"), number(again, "a0"), number(again, "b1"), number(Points(tmp_path), "a0")) == (0, None, 1, 0)
    assert [record.message.split(" is not used")[0] for record in caplog.records] == [str(first.path("a0"))]
    assert again.measure("a0", make) and again.measure("b1", make) and first.measure("b1", make)
    assert (number(again, "a0"), number(first, "a0"), number(first, "b1")) == (2, None, 1)
    assert [row["number"] for row in again.rows()] == [2, 1]


def test_an_exported_network_is_the_one_that_it_was_exported_from():
    """Weights of the same codes, ranges of an ADC: nothing of these changes a result."""
    net = network()
    weights = packed.unpack(packed.pack({"state_dict": net.state_dict(), "config": {"w_bits": 4}}))["state_dict"]
    other = network(seed=1)
    other.load_state_dict(weights)
    assert not torch.equal(other.features[4].weight, net.features[4].weight)
    assert keys.of_network(other, []) == keys.of_network(net, [])
    on_arrays = network(spec=CrossbarSpec())
    on_arrays.load_state_dict(net.state_dict(), strict=False)
    expected = keys.of_network(on_arrays, [])
    quant.set_spec(on_arrays, CrossbarSpec(cell_bits=2))
    for _, layer in quant.crossbar_layers(on_arrays):
        layer.set_ranges([(0.5, -1)] * 2)
    assert keys.of_network(on_arrays, []) == expected
