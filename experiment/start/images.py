"""The images of an evaluation: those that are measured, and the training images that calibrate."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..inputs import data
from ..inputs.data import Batches, training_split
from ..program.cli import UserError
from ..settings import train_settings
from ..settings.eval_flags import EvalSettings

REPORT_IMAGES = 64  # calibration images whose layer outputs --report compares


@dataclass(frozen=True)
class EvalImages:
    """What an evaluation looks at.

    Attributes: batches, network inputs that are measured; labels, int64 `[N]`; kind, such as "test images"; of_all, how many
        there are without --limit; calibration, training inputs; report, a few of them as one batch.
    """

    batches: Batches
    labels: torch.Tensor
    kind: str
    of_all: int
    calibration: Batches
    report: torch.Tensor


def load(settings: EvalSettings, checkpoint: Mapping[str, Any], device: torch.device, log: logging.Logger) -> EvalImages:
    """The images that the settings name, scaled as in the training of the checkpoint.

    Raises: UserError for images that cannot be read, of other classes, or other ones than the training split.
    """
    return choose(data.load(settings.dataset, settings.data_path, log.info), settings, checkpoint, device)


def choose(found: data.Dataset, settings: EvalSettings, checkpoint: Mapping[str, Any], device: torch.device) -> EvalImages:
    """Those of a data set that the settings ask for; see `load`. The validation images of a network that was not trained here are those
    of the data set or, if it has none, the last tenth of the training images in the order that gives the first ones to calibration."""
    trained_on = checkpoint.get("data")
    stats = found.mean, found.std
    if trained_on:
        data.check_classes(found, trained_on, settings.resume)
        stats = tuple(trained_on["mean"]), tuple(trained_on["std"])
    order = data.for_calibration(found)
    images, labels, kind = found.test_x, found.test_y, "validation images" if settings.validation else "test images"
    if settings.validation and not found.validation:
        held = _held_out(found, settings, checkpoint) if trained_on else order[-max(1, len(order) // 10):].sort().values
        images, labels = found.train_x[held], found.train_y[held]
        order = order[~torch.isin(order, held)]
    shown = data.evenly(len(images), settings.limit or len(images))
    calibration = found.train_x[order[:settings.calib_images]].to(device)
    return EvalImages(
        batches=Batches(images[shown].to(device), *stats, settings.batch_size), labels=labels[shown], kind=kind,
        of_all=len(images), calibration=Batches(calibration, *stats, settings.batch_size),
        report=data.normalize(calibration[:REPORT_IMAGES], *stats))


def _held_out(found: data.Dataset, settings: EvalSettings, checkpoint: Mapping[str, Any]) -> torch.Tensor:
    """Those of the training images that the training of the checkpoint held out. Raises: UserError for other images than it had."""
    config = train_settings.defaults() | train_settings.from_checkpoint(checkpoint, settings.resume)
    train, held = training_split(found.train_y, config["val_split"], config["seed"], config["limit_train"])
    if len(train) != checkpoint["data"]["train_images"]:
        raise UserError(f"--validation: {settings.resume} was trained on other images than those in {settings.data_path}")
    return held
