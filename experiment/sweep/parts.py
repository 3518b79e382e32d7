"""Blocks of a bench's images (`parts_of`): each is a bench of its own, of the same network, with points of its own."""

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from models.quant.layers.loaders import apart
from models.quant.measuring.metrics import Metric, OfTorchmetrics
from models.quant.measuring.setting import Setting

from ..inputs import data
from ..measure import keys
from ..measure.points import Points
from ..program.cli import UserError
from ..settings.costs import Costs
from .bench import Bench
from .sequential import ends_of

FOLDER = "parts"  # in that of the results: where the points of blocks are
MOST_BYTES = 2**29  # of the cells of the last chips, which later blocks see again
ONE_FOR_ALL = ("a limit is found example by example, and the metric {} has one number for all of them: give a function of outputs and "
               "targets, which has one for each")


def parts_of(bench: Bench) -> list[Bench]:
    """A bench for each block of the images, in an order that is drawn and always the same; a task's batches are one block."""
    return [part_of(bench, number) for number in range(len(_ends(bench)))]


def part_of(bench: Bench, number: int) -> Bench:
    """The bench of one block. Args: bench, which is loaded."""
    bench.net  # noqa: B018 - converted once, for all blocks
    found, ends = copy.copy(bench), [0, *_ends(bench)]
    found.settings, found.costs = replace(bench.settings, part=number), Costs(None, ())
    if not bench.task:
        order = torch.randperm(ends[-1], generator=data.generator("blocks"))
        places = order[ends[number]:ends[number + 1]].sort().values
        whole = bench.shown.batches
        batches = data.Batches(whole.images[places.to(bench.device)], whole.mean, whole.std, whole.batch_size, ends[number])
        found.shown = replace(bench.shown, batches=batches, labels=bench.shown.labels[places])
    found.points = Points(Path(bench.settings.save_path, FOLDER))
    found.points.images = found.shown.batches.count
    found.points.expect(bench.points.answers, bench.log)
    found.points.look_for_older(bench.settings.older_points)
    found.decides_all = bench.decides_all | {"images": keys.of_images(found.shown.batches, found.shown.labels)}
    found.keys, found.known = {}, {}
    found.cache.chips.most_bytes = MOST_BYTES
    return found


def _ends(bench: Bench) -> list[int]:
    count = bench.shown.batches.count
    return [count] if bench.task else ends_of(count)


def check_numbers(metric: Metric | OfTorchmetrics) -> None:
    """Refuse, before anything is measured, a metric of a kind that has no number for each example. A function that gives but the mean of
    a batch is known by what was measured: see `numbers_of`. Raises: UserError."""
    if isinstance(metric, OfTorchmetrics):
        raise UserError(ONE_FOR_ALL.format(metric.scale.name))


def numbers_of(parts: Sequence[Bench], setting: Setting | None) -> np.ndarray:
    """What the metric says of each example of some blocks, float64 `[n, 2]` (`Metric.numbers`), on one chip, which was measured.

    Raises: UserError for a metric that says nothing of one example.
    """
    return np.concatenate([_numbers(part, setting) for part in parts])


def _numbers(part: Bench, setting: Setting | None) -> np.ndarray:
    record, shown = part.record_of_chip(setting), part.shown
    if record.numbers is not None:
        return record.numbers.numpy()
    if record.predictions is None:
        raise UserError(ONE_FOR_ALL.format(record.metric.name))
    labels = shown.labels
    if labels is None:
        labels = torch.cat([torch.as_tensor(apart(batch, part.net, part.task.take)[1]) for batch in shown.batches])
    right = 100.0 * (record.predictions == labels.cpu()).numpy()
    return np.stack([right, np.ones_like(right)], 1)
