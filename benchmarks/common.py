"""What both benchmarks share: the clock, the plain network, and how a result is written down."""

import datetime
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the project's modules, from any folder

import torch  # noqa: E402

import datasets  # noqa: E402
import models  # noqa: E402
import utils  # noqa: E402

RESULTS = Path(__file__).resolve().parent / "results"


def build(name, wbit, abit, seed=0, **kwargs):
    """A network of the registry, channels last; the seed fixes its weights."""
    torch.manual_seed(seed)
    config = getattr(models, name)
    config.kwargs.update({"num_classes": 10, "wbit": wbit, "abit": abit, "alpha_init": 6.0, **kwargs})
    return config.base(*config.args, **config.kwargs).to(memory_format=torch.channels_last)


def digit_images(count):
    """`count` normalised test images of the embedded data set, channels last; labels beside them."""
    data = datasets.load("digits")
    repeats = -(-count // len(data.test_x))
    images = data.test_x.repeat(repeats, 1, 1, 1)[:count]
    return datasets.normalize(images, data.mean, data.std), data.test_y.repeat(repeats)[:count]


def median_seconds(*runs, repeats):
    """Median wall time of each of `runs`, after one call that does not count. They are called in turns, so that what else
    the machine does slows all of them alike."""
    for run in runs:
        run()
    seconds = [[] for _ in runs]
    for _ in range(repeats):
        for run, times in zip(runs, seconds):
            started = time.perf_counter()
            run()
            times.append(time.perf_counter() - started)
    return [sorted(times)[repeats // 2] for times in seconds]


def markdown_table(header, rows):
    cells = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in row) + " |" for row in cells)


def write_results(name, title, sections, numbers):
    """Write results/<name>.md and .json with machine, versions and date, and print the former."""
    facts = utils.machine_info() | {"date": datetime.date.today().isoformat(), "command": " ".join(sys.argv)}
    text = "\n\n".join([f"# {title}", ", ".join(f"{key} {value}" for key, value in facts.items() if value is not None),
                        *sections]) + "\n"
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.md").write_text(text)
    (RESULTS / f"{name}.json").write_text(json.dumps({"facts": facts, **numbers}, indent=1))
    print(text)
