"""experiment/program/distributed.py, data_parallel.py: evaluation and training on several processes, by gloo on the CPU.

Processes take seconds to start, so all scenes are played by the same three, in groups of one, two or three, and the tests look at what
came of them. What one process computes is computed here.
"""

import atexit
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from test_eval import load_digits, network, save
from test_train import assert_same
from torch import nn

import eval as evaluation
import models.vgg
import train
from experiment.inputs import data as datasets, foreign
from experiment.report import cost_report, report
from experiment.train import data_parallel, training
from experiment.program import distributed
from experiment.inputs.checkpoint import load_checkpoint
from experiment.program.cli import UserError
from experiment.settings.train_settings import continuing, parse
from models import quant

ROOT = Path(__file__).resolve().parent.parent
ME = Path(__file__).stem
PATH = f"{ROOT}{os.pathsep}{ROOT / 'tests'}"

SMALL = [8, "M", "M", 12, 12, "M"], 16  # instead of VGG7's widths
# 19 images in batches of 4: the last one has 3, and of three processes one has a batch less.
IMAGES = ["--ngpu", "0", "--batch_size", "4", "--calib_images", "12", "--engine", "reference"]
TABLE = ["--cell_bits", "2", "--adc_bits", "4", "--chips", "2", "--also", "--adc_range dynamic --adc_bits 3",
         "--adc_plan significance --adc_bits 2 --cell_bits 2",
         "--cell_bits 2 --adc_bits 3 --device techA --read_noise 0.5 --adc_noise 0.3 --adc_offset 0.2"]
COSTS = ["--cost", "rram_32nm", "--adc_bits", "5"]
FLAGS = ["--ngpu", "0", "--epochs", "3", "--limit_train", "100", "--batch_size", "15", "--lr", "0.05", "--amp", "off", "--cutout", "6",
         "--clp", "--save_minutes", "0"]  # 90 training images: 6 steps an epoch, of 7 and 8 images
ON_CHIPS = ["--ngpu", "0", "--epochs", "1", "--limit_train", "40", "--batch_size", "11", "--lr", "0.01", "--amp", "off", "--adc_aware",
            "--cell_bits", "2", "--adc_bits", "4", "--rows", "32", "--device", "rram_wan", "--device_time", "1d", "--calib_steps", "2"]

OTHERS = """
from torch import nn

def small():
    return nn.Sequential(nn.Conv2d(3, 4, 5, 3), nn.BatchNorm2d(4), nn.GELU(), nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Linear(36, 10))
"""
ONE_STEP = ["--ngpu", "0", "--epochs", "1", "--limit_train", "17", "--val_split", "0", "--batch_size", "15", "--adc_aware", "--adc_bits",
            "4", "--cell_bits", "2", "--device", "techA", "--read_noise", "0.5", "--adc_correct", "none", "--learn_scales",
            "--weight_clip", "2"]


def set_up(folder):
    """A small network and few images."""
    models.vgg.CONFIGS["vgg7"] = SMALL
    torch.set_num_threads(1)
    if not Path(folder, "digits.pt").exists():  # scikit-learn takes long to import
        data = load_digits()
        torch.save(replace(data, test_x=data.test_x[:19].clone(), test_y=data.test_y[:19].clone()), Path(folder, "digits.pt"))
    datasets._digits = lambda: torch.load(Path(folder, "digits.pt"), weights_only=False)


# ---- scenes ------------------------------------------------------------------------------------------------------------


def evaluate(folder):
    """The table, and then one with another setting and costs in the same folder, without pictures, which take long."""
    measured, predict = [], evaluation.Bench._measure
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation.Bench, "_measure", lambda self, setting, *args, **own: (
            measured.append(str(setting)), predict(self, setting, *args, **own))[1])
        for room, picture in ((report, "accuracy_plot"), (cost_report, "by_layer"), (cost_report, "accuracy_over_energy")):
            patch.setattr(room, picture, lambda *_: None)
        flags = ["--resume", f"{folder}/net.pt", "--save_path", f"{folder}/{distributed.world()}", "--prob_path", f"{folder}/prob"]
        assert evaluation.main([*flags, *IMAGES, *TABLE]) == 0
        first, measured[:] = list(measured), []
        assert evaluation.main([*flags, *IMAGES, *COSTS]) == 0
    return {"first": first, "second": measured}


def gradients(folder):
    """(network without quantizers, with them): gradients and buffers after one step on seven images, and a validation."""
    data, found = datasets.load("digits"), {}
    images, labels = data.train_x[:35], data.train_y[:35]
    for name, bits in (("plain", 32), ("quantized", 4)):
        net = network(wbit=bits, abit=bits).double().train()
        settings, *_ = parse(["--ngpu", "0", "--w_bits", str(bits), "--a_bits", str(bits), "--save_path", str(folder / name), "--clp",
                              "--batch_size", "7", "--label_smoothing", "0.1"])
        run = training.Run(settings, net, data, torch.device("cpu"), None)
        run.forward = data_parallel.shared(net)
        x = datasets.normalize(images, (0.5,) * 3, (0.3,) * 3).double()
        [(_, own, own_labels)] = datasets.train_batches(x[:7], labels[:7], 7, 0, 0, part=run.part)
        loss = F.cross_entropy(run.forward(own), own_labels) * (len(own) * distributed.world() / 7)
        loss.backward()
        in_float64 = gradients_of(net)
        run.train_step(own, own_labels, 0)  # its logits are float32
        found[name] = {
            "float64": in_float64, "run": gradients_of(net), "meter": run.meter.read(),
            "buffers": {key: value.clone() for key, value in net.state_dict().items() if "running" in key or "tracked" in key},
            "types": [type(module).__name__ for module in net.modules()],
            "validation": training.evaluate(network(wbit=bits, abit=bits), images, labels, data, batch_size=8)}
    return found


def gradients_of(net):
    return {key: value.grad.clone() for key, value in net.named_parameters() if value.grad is not None}


def watched_run(flags, stop_at=None, signals=True):
    """(exit code, {step: digest of each image that this process saw}) of a training run that gets SIGTERM at a step."""
    seen, step = {}, training.Run.train_step

    def watch(self, x, y, position):
        seen[position] = [hashlib.sha256(image.numpy().tobytes()).hexdigest() for image in x.contiguous()]
        if position == stop_at and signals:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, x, y, position)

    training.Run.train_step = watch
    try:
        return train.main(flags), seen
    finally:
        training.Run.train_step = step


def go_on(folder):
    """The second part of a run that one process began; its second process alone is told to stop."""
    code, seen = watched_run(["--resume", "--save_path", f"{folder}/run"], 10, distributed.rank() == 1)
    return {"code": code, "seen": seen}


def on_chips(folder, name="chips"):
    """A run through ADCs and chips: what each process has in the end."""
    kept, test = {}, training.Run.test

    def look(self):
        test(self)
        kept.update(state={key: value.clone() for key, value in self.net.state_dict().items()}, history=self.history,
                    cells=[layer.chip.cells.values for _, layer in quant.crossbar_layers(self.net)], test_acc=self.test_acc)

    training.Run.test = look
    try:
        with quant.set_engine("reference"):
            code = train.main(["--fine_tune", f"{folder}/trained.pt", "--save_path", f"{folder}/{name}{distributed.world()}", *ON_CHIPS])
    finally:
        training.Run.test = test
    return {"code": code, **kept}


def of_others(folder):
    """A step of a converted network through its ADCs and a chip; its weights."""
    flags = ["--model", f"{folder}/net.py:small", "--state", f"{folder}/small.pt", "--save_path", f"{folder}/others{distributed.world()}",
             *ONE_STEP]
    with quant.set_engine("reference"):
        code = train.main(flags)
    return {"code": code, "state": load_checkpoint(f"{folder}/others{distributed.world()}/checkpoint.pth.tar")["state_dict"]}


def refused(folder):
    """What cannot be, said by an error in all processes alike."""
    errors = []
    for flags in (["--workers", "2"], ["--ngpu", "1"]):
        with pytest.raises(UserError) as error:
            evaluation.main(["--resume", f"{folder}/net.pt", "--save_path", f"{folder}/no", *flags])
        errors.append(str(error.value))
    with pytest.raises(UserError) as error:
        train.main(["--ngpu", "0", "--limit_train", "100", "--batch_size", "2", "--save_path", f"{folder}/no"])
    own = nn.Sequential(type("Own", (nn.BatchNorm2d,), {"forward": lambda self, x: x})(3))
    with pytest.raises(UserError) as other:
        data_parallel.shared(own)
    return [*errors, str(error.value), str(other.value)]


def fail(folder):
    """A file that the second process alone cannot read."""
    step = training.Run.train_step

    def fall(self, x, y, position):
        if position == 2 and distributed.rank() == 1:
            raise OSError(5, "cannot read", "picture.png")
        return step(self, x, y, position)

    class Late:
        def __del__(self):
            print("taken apart", file=sys.stderr)

    training.Run.train_step = fall
    sys.modules["late"] = Late()  # which goes when Python takes the interpreter apart
    atexit.register(print, "at exit", file=sys.stderr)
    return train.main(["--save_path", f"{folder}/failed", *FLAGS])


class Helper:
    def __init__(self):
        self.asked = []

    @distributed.together
    def ask(self, *args, own=None):
        self.asked.append((*args, own))
        return distributed.gathered((distributed.rank(), *args))


def lead(folder):
    """What the first process does by itself and what all do, and the calls that each has seen."""
    helpers, found = [Helper(), Helper()], []
    with distributed.led(helpers) as leads:
        if leads:
            found.append(distributed.gathered("alone") + [distributed.broadcast("alone"), distributed.world()])
            found.append(helpers[1].ask("a", own=1))
            found.append(distributed.in_order(["alone"]))
            found.append(helpers[0].ask())
    return {"found": found, "asked": [helper.asked for helper in helpers], "world": distributed.world()}


# Who waits for processes that play without it looks for them ever less often.
SCENES = [(2, of_others), (3, refused), (3, evaluate), (2, lead), (2, gradients), (2, on_chips), (2, go_on), (1, on_chips)]
LAST = 2, fail  # ends its processes


def play(number, folder, *ports):
    """All scenes, in one of the processes."""
    folder = Path(folder)
    set_up(folder)
    os.environ.update(RANK=str(number), LOCAL_RANK=str(number), MASTER_ADDR="127.0.0.1")
    for (world, scene), port in zip(SCENES, ports):
        if number < world:
            os.environ.update(WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world), MASTER_PORT=port)
            with distributed.group():
                assert (distributed.world(), distributed.rank()) == (world, number)
                found = scene(folder)
            torch.save(found, folder / f"{scene.__name__}_{world}_{number}.pt")
    world, scene = LAST
    if number >= world:
        return
    os.environ.update(WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world), MASTER_PORT=ports[-1])
    distributed.run(lambda: scene(folder))


def play_all(folder, *ports):
    """Three processes, which are forked once all is imported that takes them seconds; prints their exit codes. What each of them prints
    goes to a file of its own."""
    children = []
    for number in range(3):
        child = os.fork()
        if not child:
            for name, descriptor in (("out", 1), ("err", 2)):
                os.dup2(os.open(f"{folder}/{number}.{name}", os.O_WRONLY | os.O_CREAT), descriptor)
            return play(number, folder, *ports)
        children.append(child)
    return print(*(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children))


def free_ports(count):
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@pytest.fixture(scope="module")
def alone():
    """What one process computes, in a place of its own."""
    before = dict(models.vgg.CONFIGS), datasets._digits, torch.get_num_threads()
    yield
    models.vgg.CONFIGS.update(before[0])
    datasets._digits = before[1]
    torch.set_num_threads(before[2])


@pytest.fixture(scope="module")
def played(tmp_path_factory, alone):
    """(folder, exit code and texts of each process) after all scenes."""
    folder = tmp_path_factory.mktemp("scenes")
    set_up(folder)
    save(folder / "net.pt", network())
    save(folder / "trained.pt", network())
    Path(folder, "net.py").write_text(OTHERS)
    torch.save(foreign.load(f"{folder}/net.py:small").network.state_dict(), folder / "small.pt")
    code, seen = watched_run(["--save_path", f"{folder}/run", *FLAGS], 4)
    assert code == 128 + signal.SIGTERM
    torch.save(seen, folder / "began.pt")
    done = subprocess.run([sys.executable, "-c", f"import sys, {ME}; {ME}.play_all(*sys.argv[1:])", folder,
                           *map(str, free_ports(len(SCENES) + 1))], env=os.environ | {"PYTHONPATH": PATH, "OMP_NUM_THREADS": "1"},
                          stdout=subprocess.PIPE, text=True, check=True, timeout=300)
    return folder, [(int(code), *((folder / f"{number}.{name}").read_text() for name in ("out", "err")))
                    for number, code in enumerate(done.stdout.split())]


def result(played, scene, world):
    """What each process found."""
    folder, ends = played
    paths = [folder / f"{scene.__name__}_{world}_{number}.pt" for number in range(world)]
    assert all(path.exists() for path in paths), ends
    return [torch.load(path, weights_only=False) for path in paths]


# ---- evaluation --------------------------------------------------------------------------------------------------------


def points_of(folder):
    """Points by their key, without what depends on time and machine."""
    found = {path.stem: json.loads(path.read_text()) for path in Path(folder, "points").glob("*.json")}
    for point in found.values():
        point.pop("took_s")
        for name in ("seconds", "images_per_s", "command", "processes", "threads"):
            point["row"].pop(name)
    return found


def test_an_evaluation_has_the_same_bits_on_any_number_of_processes(played):
    folder, _ = played
    evaluate(folder)
    expected, found = points_of(folder / "1"), points_of(folder / "3")
    assert len(expected) == 6 and expected.keys() == found.keys()
    for key in expected:
        assert found[key] == expected[key], expected[key]["row"]
    assert len({point["predictions"]["zlib"] for point in found.values()}) > 4  # they differ, so this says something
    assert any(point["cost"] for point in found.values())
    for name in ("results.csv", "adc_ranges.json"):
        rows = [(folder / str(n) / name).read_text() for n in (1, 3)]
        assert len(rows[0].splitlines()) == len(rows[1].splitlines())
    assert len((folder / "3" / "results.jsonl").read_text().splitlines()) == 6


def test_what_is_measured_is_not_measured_again_by_any_process(played):
    results = result(played, evaluate, 3)
    assert all(found == results[0] for found in results)
    assert len(results[0]["first"]) == 6  # two chips one by one; and for costs the software again:
    assert results[0]["second"] == ["None", "1-bit cells, 5-bit ADC, calibrated"]


def test_the_first_process_leads(played):
    first, second = result(played, lead, 2)
    assert first["found"] == [["alone", "alone", 1], [(0, "a"), (1, "a")], ["alone"], [(0,), (1,)]]
    assert first["asked"] == [[(None,)], [("a", 1)]] and second["asked"] == [[(None,)], [("a", None)]]  # named ones are its own
    assert first["world"] == second["world"] == 2


# ---- training ----------------------------------------------------------------------------------------------------------


def test_gradients_are_those_of_the_whole_batch(played, alone):
    expected = gradients(played[0])
    for found in result(played, gradients, 2):
        for name in ("plain", "quantized"):
            for kind, tolerance in (("float64", 1e-12 if name == "plain" else 1e-5), ("run", 1e-5)):
                assert expected[name][kind].keys() == found[name][kind].keys()
                for key, value in expected[name][kind].items():
                    error = (found[name][kind][key] - value).norm() / value.norm().clamp_min(1e-3)  # before a batch norm
                    assert error < tolerance, (name, kind, key, error)                              # that of a bias is 0
            for key, value in expected[name]["buffers"].items():
                assert torch.allclose(found[name]["buffers"][key].double(), value.double(), rtol=1e-6, atol=1e-9), key
            assert found[name]["types"] == expected[name]["types"] and "BatchNorm2d" in found[name]["types"]
            assert found[name]["meter"] == pytest.approx(expected[name]["meter"], rel=1e-6)
            assert found[name]["validation"] == expected[name]["validation"]  # every bit


@pytest.mark.parametrize("options", [dict(), dict(momentum=None), dict(affine=False, eps=0.1), dict(track_running_stats=False)])
def test_batch_norms_are_those_of_pytorch(options):
    """Outputs, gradients and statistics, also in 16 bits, where they are taken of float32; those in evaluation mode stay what they are."""
    torch.manual_seed(0)
    found, wanted = (nn.BatchNorm2d(3, **options) for _ in range(2))
    for x in 5 * torch.randn(4, 4, 3, 5, 5) + 20:
        for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 0.02)):
            results = []
            for norm in (found, wanted):
                own = x.to(dtype, copy=True).requires_grad_()
                with data_parallel.synchronised(found):
                    y = norm(own)
                y.square().flatten(1).cumsum(1).sum().backward()
                results.append((y, own.grad, *(parameter.grad for parameter in norm.parameters())))
                norm.zero_grad()
            for one, other in zip(*results):
                assert one.dtype == other.dtype
                torch.testing.assert_close(one, other, rtol=0, atol=tolerance * other.abs().max().item())
    for name, value in wanted.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], value)
    found.eval()
    with data_parallel.synchronised(found):
        torch.testing.assert_close(found(x), wanted.eval()(x))


def test_a_run_goes_on_with_another_number_of_processes_on_the_same_images(played, alone, tmp_path):
    folder, _ = played
    began, parts = torch.load(folder / "began.pt"), result(played, go_on, 2)
    assert [part["code"] for part in parts] == [128 + signal.SIGTERM] * 2
    assert [sorted(part["seen"]) for part in parts] == [list(range(5, 11))] * 2  # both stop at the same step
    code, ended = watched_run(["--resume", "--save_path", f"{folder}/run"])
    _, whole = watched_run(["--save_path", str(tmp_path), *FLAGS])
    together = {step: parts[0]["seen"][step] + parts[1]["seen"][step] for step in parts[0]["seen"]}
    assert code == 0 and began | together | ended == whole and len(whole) == 18 and len(whole[7]) == 15
    last = load_checkpoint(folder / "run" / "checkpoint.pth.tar")
    assert len(last["history"]) == 3 and last["test_acc"] > 15


def test_a_signal_that_comes_while_others_are_waited_for_is_for_the_next_check(monkeypatch):
    stop = distributed.StopRequest()
    told = iter([(signal.SIGTERM, 0), (None, signal.SIGTERM)])  # what comes meanwhile, what all have had before

    def wait(number):
        came, found = next(told)
        stop.signal = came or stop.signal
        return found

    monkeypatch.setattr(distributed, "_largest", wait)
    stop.check()
    assert stop.signal == signal.SIGTERM
    with pytest.raises(distributed.Stopped):
        stop.check()


def test_a_run_that_was_stopped_says_what_goes_on_with_it():
    settings = parse(["--ngpu", "0", "--log_file", "my log", "--save_path", "s"])[0]
    assert continuing(settings, Path("s/c")) == "python train.py --resume s/c --ngpu 0 --log_file 'my log'"
    assert continuing(parse(["--save_path", "s"])[0], Path("s/c")) == "python train.py --resume s/c"


def test_chips_and_ranges_are_the_same_in_all_processes(played, alone):
    single, [joined] = on_chips(played[0], "alone"), result(played, on_chips, 1)
    assert single["code"] == joined["code"] == 0
    assert_same(single, joined)
    a, b = result(played, on_chips, 2)
    assert_same(a, b)
    assert all(torch.equal(x, y) for x, y in zip(a["cells"], b["cells"], strict=True)) and a["state"].keys() == single["state"].keys()
    assert (a["state"]["classifier.3.adc_delta"] > 0).all()


def test_a_step_of_a_converted_network_through_its_arrays_is_that_of_one_process(played, alone):
    """Each part of a batch has the noise of its images, and gradients are added up."""
    single, (a, b) = of_others(played[0]), result(played, of_others, 2)
    assert single["code"] == a["code"] == 0 and a["state"].keys() == single["state"].keys()
    assert_same(a["state"], b["state"])
    for key, value in single["state"].items():
        assert torch.allclose(value.double(), a["state"][key].double(), rtol=1e-4, atol=1e-6), key
    assert not torch.equal(single["state"]["5.weight"], torch.load(played[0] / "small.pt")["5.weight"])


# ---- ends ----------------------------------------------------------------------------------------------------------------


def test_what_several_processes_cannot_do(played):
    results = result(played, refused, 3)
    assert all(found == results[0] for found in results)
    workers, ngpu, batch, norm = results[0]
    assert "torchrun has started 3" in workers and "--ngpu 1: give 0 for the CPU, or 3" in ngpu and "raise --batch_size" in batch
    assert "0 is a Own, whose statistics" in norm


def test_a_process_that_is_not_the_first_to_end_says_nothing(monkeypatch):
    """Its exit code is that of Ctrl-C where it was interrupted."""
    monkeypatch.setattr(distributed, "_store", SimpleNamespace(add=lambda key, number: 2))
    for error, code in ((KeyboardInterrupt(), 130), (OSError(), 2), (SystemExit(1), 2)):
        with pytest.raises(SystemExit) as end:
            distributed._end(error)
        assert end.value.code == code


def test_processes_that_are_started_and_their_random_numbers(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    assert [distributed.must_start(ngpu) for ngpu in (None, 0, 1, 2)] == [False, False, False, True]
    monkeypatch.setattr(distributed, "world", lambda: 3)
    drawn = set()
    for rank in range(3):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        distributed.own_random_numbers(5)
        drawn.add(torch.rand(()).item())
    assert len(drawn) == 3


def test_an_error_of_one_process_is_one_line_and_ends_all(played):
    _, ends = played
    codes, outs, errors = zip(*ends)
    said = [line for text in errors for line in text.splitlines() if "rror" in line]
    assert codes == (2, 2, 0) and said == ["error: [Errno 5] cannot read: 'picture.png'"]
    assert "epoch" not in outs[1] + outs[2] and "epoch" in outs[0] and not any("Traceback" in text for text in errors)
    # Threads of gloo that give back a tensor while the interpreter is taken apart abort the process, sometimes.
    assert all("at exit" in text and "taken apart" not in text for text in errors[:2])


def die():
    """A training on CPUs of which the second process is killed."""
    set_up(Path(sys.argv[0]).parent)
    step = training.Run.train_step

    def step_or_die(self, x, y, position):
        if position == 2 and distributed.rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self, x, y, position)

    training.Run.train_step = step_or_die
    distributed.run(lambda: train.main([*sys.argv[1:-2], "--ngpu", "0"]))


def test_a_killed_process_ends_those_that_ngpu_started(tmp_path, alone, monkeypatch, capfd):
    set_up(tmp_path)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)}
    program = tmp_path / "again.py"
    program.write_text(f"import {ME}; {ME}.die()")
    monkeypatch.setattr(sys, "argv", [str(program), "--save_path", f"{tmp_path}/run", *FLAGS, "--ngpu", "2"])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("PYTHONPATH", PATH)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    try:
        code = train.main()
    finally:
        for number, handler in handlers.items():  # the launcher's are for a process that does nothing else
            signal.signal(number, handler)
    err = capfd.readouterr().err
    said = [line for line in err.splitlines() if "rror" in line or "another" in line]
    assert code == 128 + signal.SIGKILL, err
    assert said == ["error: another of the 2 processes has ended, and this run with it; what it has written stays"], err
    assert load_checkpoint(tmp_path / "run" / "checkpoint.pth.tar")["step"] == 2


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system binds no process to cores")
def test_cores_are_those_of_the_job():
    """As a cluster's scheduler gives them, in a thread of its own, which they are given to."""
    def cores_of_one():
        os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
        return distributed.cores()

    assert ThreadPoolExecutor(1).submit(cores_of_one).result() == 1
