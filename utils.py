"""For scripts of your own in a checkout: networks that train.py made, the images of a data set, and how many of them are classified right.

    from utils import accuracy, load_images, load_network

    network = load_network("save/quickstart/model_best.pth.tar")
    images, labels = load_images("digits", network=network)
    print(accuracy(network, images, labels))

What these are on hardware, `models.quant` says (`measure`, `calibrate`): docs/python.md.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from experiment.inputs import data
from experiment.program.flags import arguments_of
from experiment.settings.eval_flags import EvalSettings
from experiment.settings.eval_settings import parse
from experiment.start.starting import crossbar_network
from models.quant import CrossbarSpec, set_spec
from models.quant.measuring.images import batches_of, predict

SPLITS = ("test", "training", "calibration")


def load_network(path: str | Path, **flags: Any) -> nn.Module:
    """The network of a checkpoint, on crossbars, as yet without ADCs, in evaluation mode.

    Args: flags, those of eval.py for what the checkpoint does not say, such as `dataset="cifar10", quantize_image=True`; what is None
        or False is not given.
    Raises: UserError, one line, for a file that is no checkpoint, or flags that do not go with it.
    """
    settings, checkpoint = parse(arguments_of({"resume": path, **flags}))
    network = crossbar_network(settings, checkpoint, torch.device("cpu"))
    set_spec(network, CrossbarSpec(settings.w_bits, settings.a_bits, adc_range="ideal"))
    network.trained_on = checkpoint.get("data")
    return network


def load_images(dataset: str, path: str | Path = "./data", split: str = "test", limit: int | None = None, network: nn.Module | None = None
                ) -> tuple[torch.Tensor, torch.Tensor]:
    """(network inputs `[N, 3, 32, 32]`, classes `[N]`) of a data set with its folder: digits, cifar10, cifar100 or imagefolder.

    Args: split, "test", "training", or "calibration", the 256 training images that eval.py calibrates on; limit, how many of the first
        two, taken evenly; network, of `load_network`: images are then scaled as in its training, and refused where their classes are
        others.
    Raises: UserError for a data set that is unknown or not there; ValueError for another split.
    """
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; allowed are {', '.join(SPLITS)}")
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}; allowed are whole numbers from 1")
    found = data.as_trained(data.load(dataset, path), getattr(network, "trained_on", None), "this network")
    x, y = (found.test_x, found.test_y) if split == "test" else (found.train_x, found.train_y)
    shown = data.for_calibration(found)[:EvalSettings.calib_images] if split == "calibration" else data.evenly(len(x), limit or len(x))
    return data.normalize(x[shown], found.mean, found.std), y[shown]


@torch.no_grad()
def accuracy(network: nn.Module, images: torch.Tensor | Iterable[torch.Tensor], labels: torch.Tensor) -> float:
    """Percent of the images, a tensor or batches of them, that a network, as it stands, gives their classes."""
    images = images.to(next(network.parameters()).device) if isinstance(images, torch.Tensor) else images
    predictions = predict(network.eval(), batches_of(images, 64))
    return 100 * (predictions == torch.as_tensor(labels)).sum().item() / len(labels)
