"""What the benchmarks share: flags, the clock, the plain network, and how a result is written down."""

import argparse
import datetime
import json
import math
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the project's modules, from any folder

import torch  # noqa: E402

import models  # noqa: E402
from experiment.inputs import data  # noqa: E402
from experiment.program.machine import machine_info  # noqa: E402
from models.quant.storage.files import write_text  # noqa: E402
from tqdm import tqdm  # noqa: E402

RESULTS = Path(__file__).resolve().parent / "results"
PRETRAINED = RESULTS.parents[1] / "pretrained"


def parser_of(about: str, repeats: int | None = None) -> argparse.ArgumentParser:
    """The parser of a benchmark's flags. Args: about, its docstring; repeats, the default of --repeats, which it has then."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    if repeats:
        parser.add_argument("--repeats", type=int, default=repeats, help="timed runs after one warm-up; the median counts")
    return parser


def build(name: str, wbit: int, abit: int) -> torch.nn.Module:
    """A network of `models`, channels last, with the weights of one seed."""
    torch.manual_seed(0)
    net = models.create(name, num_classes=10, wbit=wbit, abit=abit, alpha_init=6.0)
    return net.to(memory_format=torch.channels_last)


def sample_images(count: int, data_path: str | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """`count` normalised test images, channels last, and their labels: from all over those of a folder, as for `eval.py --dataset
    imagefolder`, or the first of the embedded data set, and again from the first on if it has fewer."""
    found = data.load("imagefolder", data_path) if data_path else data.load("digits")
    apart = max(1, len(found.test_y) // count) if data_path else 1  # neighbours in a folder are of one class
    chosen = torch.arange(count) * apart % len(found.test_y)
    return data.normalize(found.test_x[chosen], found.mean, found.std), found.test_y[chosen]


def processor() -> str:
    """The name of this machine's processor in names of files: times of others are kept beside its own."""
    words = re.findall("[a-z0-9]+", machine_info()["cpu"].lower())
    return "_".join(word for word in words if word not in ("r", "tm", "cpu", "family", "model", "processor"))


def ratios_of_all(kind: str) -> dict[str, dict]:
    """{processor: the "ratios" of its results/<kind>_<processor>.json}."""
    return {file.stem.removeprefix(f"{kind}_"): json.loads(file.read_text())["ratios"] for file in sorted(RESULTS.glob(f"{kind}_*.json"))}


def median_seconds(*runs: Callable[[], object], repeats: int, most_seconds: float = math.inf) -> list[float]:
    """Median wall time of each of `runs` in seconds, after one call that does not count. They are called in turns, so that
    what else the machine does slows all of them alike; fewer times where `most_seconds` are over. A bar shows how far they are."""
    for run in runs:
        run()
    seconds, begun = [[] for _ in runs], time.perf_counter()
    for number in tqdm(range(repeats), desc="timing", unit="run", leave=False, delay=2, disable=None):
        if number and time.perf_counter() - begun > most_seconds:
            break
        for run, times in zip(runs, seconds):
            started = time.perf_counter()
            run()
            times.append(time.perf_counter() - started)
    return [sorted(times)[len(times) // 2] for times in seconds]


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table in Markdown."""
    cells = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in row) + " |" for row in cells)


def write_results(name: str, title: str, sections: list[str], numbers: dict[str, object]) -> None:
    """Write results/<name>.md and .json with machine, versions and date, and print the former."""
    facts = machine_info() | {"date": datetime.date.today().isoformat(), "command": " ".join(sys.argv)}
    text = "\n\n".join([f"# {title}", ", ".join(f"{key} {value}" for key, value in facts.items() if value is not None),
                        *sections]) + "\n"
    RESULTS.mkdir(exist_ok=True)
    write_text(RESULTS / f"{name}.md", text)
    write_text(RESULTS / f"{name}.json", json.dumps({"facts": facts, **numbers}, indent=1))
    print(text)
