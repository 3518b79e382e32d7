"""The examples run, and show what their texts say: on fewer images and epochs than a user's, and on the reference engine, which
compiles nothing."""

import argparse
import binascii
import csv
import datetime
import functools
import inspect
import json
import math
import re
import statistics
import textwrap
from pathlib import Path
from string import printable

import matplotlib
import numpy as np
import pytest
import torch
from scipy import ndimage

import eval as evaluation
from experiment.inputs import data
from models.quant import CrossbarSpec, Setting, crossbar_layers

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"

pytestmark = pytest.mark.usefixtures("one_thread")


@functools.cache
def trained():
    """The example's network after fewer steps; nothing changes it."""
    import your_network

    x, y, *_ = your_network.digits()
    return your_network.trained(x[:640], y[:640], epochs=4)


@pytest.fixture
def your_network(monkeypatch):
    """The example's module, with less to do."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import your_network

    train_x, train_y, test_x, test_y = your_network.digits()
    network = trained()
    monkeypatch.setattr(your_network, "digits", lambda: (train_x[:24], train_y[:24], test_x[:30], test_y[:30]))
    monkeypatch.setattr(your_network, "trained", lambda *_: network)
    yield your_network


def percents(text):
    """{what stands before it on its line: percent}."""
    return {name.strip(): float(value) for name, value in re.findall(r"^(.*?):? +([\d.]+) %", text, re.MULTILINE)}


def test_your_network(your_network, capsys):
    your_network.main()
    out = capsys.readouterr().out
    found = percents(out)
    assert found["float"] > 70  # chance is 10
    assert found["2-bit cells, 6-bit ADC"] > found["float"] - 10
    assert {f"2-bit cells, {bits}-bit ADC" for bits in (5, 4, 3)} | {"techA, 6-bit ADC, after 1 h"} <= found.keys()


def test_a_task(tmp_path, monkeypatch):
    """Against the same filter by hand: its float error, and what bits of the ADC take from it."""
    monkeypatch.chdir(tmp_path)
    assert evaluation.main(["--model", f"{EXAMPLES / 'task.py'}:denoiser", "--mapping", "im2col", "--cell_bits", "2",
                            "--adc_bits", "3", "5", "--limit", "64", "--save_path", "out", "--ngpu", "0", "--engine", "reference"]) == 0
    rows = [json.loads(line) for line in Path("out/results.jsonl").read_text().splitlines()]
    found = {(row["wbit"], row["adc_bits"]): row["rms_error"] for row in rows}
    clean = data.load("digits").test_x[:64].double() / 255
    noise = torch.randn((359, 3, 32, 32), generator=torch.Generator().manual_seed(1))[:64].double()
    line = np.exp(-(np.arange(5) - 2.0) ** 2 / 2)
    kernel = np.outer(line, line) / line.sum() ** 2
    noisy = (clean + 0.25 * noise).numpy()
    blurred = np.stack([[ndimage.correlate(channel, kernel, mode="constant") for channel in image] for image in noisy])
    assert found[32, None] == pytest.approx(255 * np.sqrt(np.square(blurred - clean.numpy()).mean()), rel=1e-4)
    assert found[32, None] < found[8, 5] < found[8, 3] < 255 * 0.25  # the noise itself


def test_notebook(your_network, capsys, monkeypatch):
    """Its cells one after the other, as Jupyter runs them; the picture goes to no screen."""
    matplotlib.use("Agg")
    cells = json.loads((EXAMPLES / "notebook.ipynb").read_text())["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    names = {"__name__": "__main__"}
    for text in code:
        exec(compile(text.replace("plt.show()", ""), "notebook.ipynb", "exec"), names)
    assert len(names["over_adc_bits"]) == 5 and names["over_adc_bits"][-1] > names["in_float"] - 10
    assert [len(chips) for chips in names["over_time"]] == [3, 3, 3]
    assert all(layer.chip is None for _, layer in crossbar_layers(names["net"]))
    left, right = names["figure"].axes
    assert list(left.lines[0].get_ydata()) == names["over_adc_bits"] and right.get_xlabel() == "time since the first read"


def test_imagenet_on_noise(capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import imagenet

    assert imagenet.main(["squeezenet1_1", "--random", "--image_size", "32", "--bits", "4", "--adc_bits", "5"]) == 0
    out = capsys.readouterr().out
    assert "random weights and noise: what the network sees means nothing" in out
    assert re.search(r"the same class as in float: \d of 4$", out.strip())
    with pytest.raises(imagenet.UserError, match="give a folder of photographs, or --random"):
        imagenet.main(["squeezenet1_1"])
    with pytest.raises(imagenet.UserError, match="adc_bits is 0; allowed are whole numbers"):
        imagenet.main(["squeezenet1_1", "--random", "--adc_bits", "0"])


@pytest.fixture
def language_model(monkeypatch):
    """The example's module, with less to do."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import language_model

    monkeypatch.setattr(language_model, "text_of_library", functools.cache(language_model.text_of_library))
    monkeypatch.setattr(language_model, "adcs", lambda bits, *more: [Setting(CrossbarSpec(*bits, cell_bits=2, adc_bits=4))])
    monkeypatch.setattr(language_model, "CALIBRATION", 4)
    yield language_model


def test_text_of_the_language_model(language_model, tmp_path, capsys):
    """Whole modules, in one part each, as their sources have them."""
    text = {part: "".join(printable[number] for number in found.tolist()) for part, found in language_model.text_of_library().items()}
    assert sum(map(len, text.values())) > 5e6 and all(len(found) > 3e5 for found in text.values())
    for module in (argparse, datetime, csv, json.decoder, json.encoder, statistics, textwrap):
        source = inspect.getsource(module).encode("ascii", "replace").decode()
        name = module.__name__.partition(".")[0]
        part = {0: "test", 1: "validation"}.get(binascii.crc32(name.encode()) % 10, "training")
        assert [found for found in text if source in text[found]] == [part]
    with pytest.raises(SystemExit):
        language_model.main(["--context", "10000000", "--folder", str(tmp_path)])
    assert "--context 10000000: the shortest part of the text has " in capsys.readouterr().err


@torch.no_grad()
def plain_perplexity(language_model, model, windows, context):
    """One character after the other, of windows that do not overlap."""
    text, losses = language_model.text_of_library()["test"].tolist(), []
    for window in range(windows):
        first = context * ((len(text) - 1) // context * window // windows)
        p = model(torch.tensor([text[first:first + context]]))[0].double().softmax(-1)
        losses += [-math.log(p[at, text[first + at + 1]]) for at in range(context)]
    return math.exp(statistics.fmean(losses))


def test_language_model(language_model, capsys, tmp_path):
    language_model.main(["--folder", str(tmp_path), "--steps", "40", "--more_steps", "4", "--width", "16", "--context", "32",
                         "--windows", "8", "--chips", "2"])
    out = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in out.splitlines() if line.startswith("| ")][1:]
    found = {(network, on): float(value.split(" ")[0]) for network, on, value, _ in rows}
    model = language_model.GPT(16, context=32).eval()
    model.load_state_dict(torch.load(tmp_path / "float.pt")["model"])
    assert found["float", ""] == pytest.approx(plain_perplexity(language_model, model, 8, 32), abs=1e-4)
    assert 10 < found["float", ""] < len(printable)  # which is what no training gives
    assert found["W8A8", "no ADC"] == pytest.approx(found["float", ""], rel=1e-3)
    assert all(value == pytest.approx(found["float", ""], rel=0.1) for value in found.values())
    assert len(found) == len(rows) == 16 and out.count(" ± ") == 3  # two draws of noise for each of three networks; of the device one
    for *_, value, more in rows:
        assert float(more.split(" ")[0]) == pytest.approx(100 * (float(value.split(" ")[0]) / found["float", ""] - 1), abs=0.01)
    assert (tmp_path / "language_model.svg").exists()


def test_training_of_the_language_model_goes_on(language_model, monkeypatch, tmp_path):
    """An interrupted training ends with the weights of one that was not, noise and all; another one is refused."""
    text = torch.arange(1000) % 50

    def trained(file, steps=10):
        torch.manual_seed(0)
        model = language_model.GPT(16, context=8)
        language_model.train(model, text, tmp_path / file, steps, 1e-3, 0.02)
        return model.state_dict()

    wanted = trained("whole.pt")
    monkeypatch.setattr(language_model, "SAVED_EVERY", 4)
    original, calls = language_model.loss_of, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(language_model, "loss_of", interrupted)
    with pytest.raises(KeyboardInterrupt):
        trained("parts.pt")
    found = trained("parts.pt")
    assert len(calls) == 7 + 6 and all(found[name].equal(value) for name, value in wanted.items())
    with pytest.raises(SystemExit, match="give another --folder"):
        trained("parts.pt", steps=20)


def test_noise_of_the_language_model(language_model):
    """Gradients are those at weights with noise of its share; the weights are afterwards what they were."""
    text, noise, model = torch.arange(500) % 50, 0.1, language_model.GPT(64, context=16)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    seen = []
    model.head.register_forward_hook(lambda head, *_: seen.append(head.weight.detach().clone()))
    for share in (0.0, noise):
        language_model.loss_of(model, text, share)
        assert all(before[name].equal(value) for name, value in model.state_dict().items())
    assert seen[0].equal(before["head.weight"])
    relative = (seen[1] - seen[0]) / seen[0].abs().amax(1, keepdim=True)
    # 6400 draws: their deviation is known to 1 / sqrt(2 n), their mean to 1 / sqrt(n)
    assert relative.std().item() == pytest.approx(noise, rel=5 / math.sqrt(2 * relative.numel()))
    assert abs(relative.mean().item()) < 5 * noise / math.sqrt(relative.numel())


def test_clipped_weights_of_the_language_model(language_model):
    """Each output channel ends at its 2.5 deviations; what was inside stays, and what is on no crossbar."""
    model = language_model.GPT(64, context=16)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    language_model.clip_weights(model)
    after = model.state_dict()
    for row, wanted in zip(after["blocks.1.up.weight"].numpy(), before["blocks.1.up.weight"].numpy(), strict=True):
        np.testing.assert_allclose(row, wanted.clip(-2.5 * wanted.std(ddof=1), 2.5 * wanted.std(ddof=1)), rtol=1e-6)
    assert not after["blocks.1.up.weight"].equal(before["blocks.1.up.weight"])
    assert all(after[name].equal(before[name]) for name in ("letters.weight", "places.weight", "blocks.1.up.bias", "norm.weight"))
