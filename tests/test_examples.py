"""The examples run, and show what their texts say: on fewer images and epochs than a user's, and on the reference engine, which
compiles nothing."""

import functools
import json
import re
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from scipy import ndimage

import eval as evaluation
from experiment.inputs import data
from models.quant import crossbar_layers

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
