"""experiment/sweep/workers.py: Ray's workers, killed or in error, and a driver that is killed; a real network and a stand-in for one."""

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray
from test_eval import ROOT, SMALL, checkpoint, results, scene  # noqa: F401
from test_sweeps import QUICK, evaluate, table  # noqa: F401

from experiment.sweep import workers
from experiment.program.cli import UserError
from experiment.sweep.worklist import Job, Queue

pytestmark = pytest.mark.usefixtures("one_thread")
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers do not find the folder of the tests


class StandIn:
    """A worker that measures names: those with "once" in them kill the first worker that tries, those with "always" every one. Its process
    imports nothing that takes long, as it would for an error of this project."""

    def __init__(self, settings, command, folder, threads):
        os.chdir(folder)
        self.folder = settings[0]

    def measure(self, bench, name, wait, of_several):
        tried = Path(self.folder, name)
        if "always" in name or "once" in name and not tried.exists():
            tried.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if name == "wrong":
            return OSError("one line")
        with open(Path(self.folder, "measured"), "a") as file:
            file.write(f"{name}\n")
        return True


def test_workers_that_die_are_replaced(tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "Worker", StandIn)
    bench = SimpleNamespace(settings=str(tmp_path), facts={"command": ""}, device=SimpleNamespace(type="cpu"))
    names = [*map(str, range(12)), "once a"]
    done = []
    with workers.Pool([bench], 2) as pool:
        pool.measure([Job(0, name, int(name[-1], 16) % 3) for name in names], lambda job: done.append(job.setting))
        assert sorted(done) == sorted(names)
        assert Counter((tmp_path / "measured").read_text().splitlines()) == dict.fromkeys(names, 1)
        with pytest.raises(UserError, match="^always a: 3 workers died while measuring it, one after the other; often memory is short"):
            pool.measure([Job(0, "always a", 0)], done.append)
        with pytest.raises(OSError, match="^one line$"):
            pool.measure([Job(0, "wrong", 0)], done.append)
    assert not ray.is_initialized() and len(done) == len(names)


def test_a_worker_measures_what_it_is_asked_for(tmp_path, monkeypatch):
    asked, made = [], []

    class Own:
        def __init__(self, settings, command):
            made.append((settings, command))

        def load(self, log):
            pass

        def measure(self, *args, of_several):
            asked.append((*args, of_several))
            return True

    monkeypatch.setattr(workers, "Bench", Own)
    monkeypatch.setattr(workers.machine, "keep_freed_memory", lambda: None)
    monkeypatch.chdir(tmp_path)
    first, second = SimpleNamespace(part=None), SimpleNamespace(part=None)
    worker = workers.Worker([first, second], "command", str(tmp_path), 1)
    for call in ((1, "a", False, True), (1, None, True, False), (0, "b", True, True)):
        assert worker.measure(*call) is True
    assert asked == [("a", False, True), (None, True, False), ("b", True, True)] and made == [(second, "command"), (first, "command")]


def test_what_another_program_is_measuring_is_asked_for_again(monkeypatch):
    asked, done = [], []

    def remote(bench, name, wait, of_several):
        asked.append((name, wait))
        return wait, len(asked)

    monkeypatch.setattr(ray, "wait", lambda running: (running[:1], running[1:]))
    monkeypatch.setattr(ray, "get", lambda ready: ready[0])
    pool = workers.Pool([], 1)
    pool.idle = [(SimpleNamespace(measure=SimpleNamespace(remote=remote)), None)]
    pool._there(Queue([Job(0, "a", 0), Job(0, "b", 1)]), lambda job: done.append(job.setting))
    assert asked == [("a", False), ("b", False), ("a", True), ("b", True)] and done == ["a", "b"]


PROGRAM = """
import models.vgg, eval, experiment.sweep.workers as workers
from experiment.program.cli import run_main
SMALL = {small!r}
models.vgg.CONFIGS.update(SMALL)

class Small(workers.Worker):
    def __init__(self, *args):
        import models.vgg
        models.vgg.CONFIGS.update(SMALL)
        super().__init__(*args)

workers.Worker = Small
run_main(eval.main)
"""


def test_a_driver_with_workers_that_is_killed(evaluate, checkpoint):  # noqa: F811
    flags = ["--cell_bits", "1", "2", "--adc_bits", "2:6", "--also", "--cell_bits 2 --adc_bits 4 --device techC", "--chips", "2"]
    process = subprocess.Popen([sys.executable, "-c", PROGRAM.format(small=SMALL), "--resume", checkpoint, *QUICK, "--calib_images", "4",
                                *flags, "--workers", "2"], env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.DEVNULL,
                               stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 300
    while len(list(Path("save", "points").glob("[0-9a-f]*.json"))) < 6:  # results.jsonl may be in the middle of a line
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    measured, found = evaluate(checkpoint, *flags)
    _, expected = evaluate(checkpoint, *flags, "--save_path", "whole")
    assert table(found) == table(expected) and len(measured) <= 13 - 6
    assert len(results("save")) == 12 == len({row["key"] for row in results("save")})  # both chips are one row
