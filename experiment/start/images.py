"""The images of an evaluation: those that are measured, and the training images that calibrate."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from models.quant.layers.batches import Batch
from models.quant.measuring.metrics import Metric, OfTorchmetrics
from models.quant.measuring.passes import Run
from models.quant.measuring.task import Task

from ..inputs import data, foreign
from ..inputs.data import Batches, training_split
from ..inputs.streamed import Streamed
from ..inputs.tasks import Examples
from ..program import distributed
from ..program.cli import UserError, one_line, user_error
from ..settings import train_settings
from ..settings.eval_flags import EvalSettings

OF_IMAGES = "dataset", "data_path", "class_index", "image_size", "batch_size", "calib_images", "validation"  # flags
SMALL, MANY = 32 * 32, 256  # pixels of small images, and how many pass at a time
REPORT_IMAGES = 64  # calibration images whose layer outputs --report compares


@dataclass(frozen=True)
class EvalImages:
    """What an evaluation looks at.

    Attributes: batches, network inputs that are measured; labels, int64 `[N]`, None where they come with the batches; kind, such as "test
        images"; of_all, how many there are without --limit; calibration, training inputs; report, a few of them as one batch.
    """

    batches: Batches | Examples
    labels: torch.Tensor | None
    kind: str
    of_all: int
    calibration: Batches | Examples
    report: Batch


def word_of(kind: str) -> str:
    """What is printed of examples of a kind, such as "test images" or "windows of text"."""
    return "images" if kind.endswith("images") else "examples"


def check_flags_of_task(settings: EvalSettings, task: Task) -> None:
    """Refuse flags of images for a network that brings a task, and a search without examples that choose. Raises: UserError."""
    ours = {"batch_size"} if foreign.is_language_model(settings.model) else set()  # whose batches are made here
    given = [name for name in OF_IMAGES if name in settings.given and name not in ours]
    if settings.search and task.validation is None:
        raise UserError(f"{settings.model} brings no validation examples, which choose in a search: Task(..., validation=batches)")
    if given:
        raise UserError(f"--{given[0]} is for data sets of images, and {settings.model} brings what it is measured on: leave it out")


def of_task(task: Task, metric: Metric | OfTorchmetrics, settings: EvalSettings, digest: Callable[[Any], str]) -> EvalImages:
    """The examples that a task brings, and its network, tried on one of them. Args: metric, the task's; digest, of plain values and
    tensors.

    Raises: UserError for examples that are none, a network that does not take them, or a metric that gives no number of them.
    """
    measured, kind = (task.validation, f"validation {task.kind}") if settings.validation else (task.data, task.kind)
    shown = Examples(measured, task, "validation" if settings.validation else "data", digest, settings.limit)
    calibration = Examples(task.calibration, task, "calibration", digest)
    with user_error(lambda error: f"{settings.model}: {one_line(error)}", Exception):  # code of others raises nearly anything
        Run(task.network, shown, None, metric, task.take).check()
    return EvalImages(shown, None, kind, shown.of_all, calibration, calibration.first(REPORT_IMAGES))


def choose(found: data.Dataset, settings: EvalSettings, checkpoint: Mapping[str, Any], device: torch.device) -> EvalImages:
    """Those of a data set that the settings ask for, scaled as in the training of the checkpoint. The validation images of a network that
    was not trained here are those of the data set or, if it has none, the last tenth of the training images in the order that gives the
    first ones to calibration.

    Raises: UserError for images of other classes, or other ones than the training split.
    """
    trained_on = checkpoint.get("data")
    found = data.as_trained(found, trained_on, settings.resume)
    stats = found.mean, found.std
    order = data.for_calibration(found)
    images, labels, kind = found.test_x, found.test_y, "validation images" if settings.validation else "test images"
    if settings.validation and not found.validation:
        held = _held_out(found, settings, checkpoint) if trained_on else order[-max(1, len(order) // 10):].sort().values
        images, labels = found.train_x[held], found.train_y[held]
        order = order[~torch.isin(order, held)]
    shown = data.evenly(len(images), settings.limit or len(images))
    calibration = found.train_x[order[:settings.calib_images]].to(device)
    return EvalImages(
        batches=Batches(images[shown].to(device), *stats, _at_a_time(settings, images)), labels=labels[shown], kind=kind,
        of_all=len(images), calibration=Batches(calibration, *stats, settings.batch_size),
        report=data.normalize(calibration[:REPORT_IMAGES], *stats))


def _at_a_time(settings: EvalSettings, images: torch.Tensor | Streamed) -> int:
    """Images of a batch: unless --batch_size is given more of small ones, as each call of a layer takes a while. Dynamic ranges would be
    others, and of several processes each needs a batch."""
    ranges = {setting.spec.adc_range for setting in settings.settings} or settings.hardware.get("adc_range", ())
    small = isinstance(images, torch.Tensor) and math.prod(images.shape[2:]) <= SMALL
    more = small and "batch_size" not in settings.given and "dynamic" not in ranges and distributed.world() == 1
    return MANY if more else settings.batch_size


def _held_out(found: data.Dataset, settings: EvalSettings, checkpoint: Mapping[str, Any]) -> torch.Tensor:
    """Those of the training images that the training of the checkpoint held out. Raises: UserError for other images than it had."""
    config = train_settings.defaults() | train_settings.from_checkpoint(checkpoint, settings.resume)
    train, held = training_split(found.train_y, config["val_split"], config["seed"], config["limit_train"])
    if len(train) != checkpoint["data"]["train_images"]:
        raise UserError(f"--validation: {settings.resume} was trained on other images than those in {settings.data_path}")
    return held
