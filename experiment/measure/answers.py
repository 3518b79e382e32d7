"""What a network answers to a few images. A point holds it, so that one of another network is known as such, whatever its key says:
code may read a number from anywhere."""

import contextlib
from typing import Any

import numpy as np
import torch
from torch import nn

from models import quant
from models.quant.layers.batches import first_of, length, output_of
from models.quant.measuring.placing import use_cells
from models.quant.network.modes import in_mode

from ..inputs.data import Batches
from ..inputs.tasks import Examples

IMAGES = 4
NUMBERS = 1000  # of an answer that is no logits
FAR = 1e-3  # of the size of an image's logits: what processors add in another order, and what graphics cards round, is less


@torch.no_grad()
def answers_of(network: nn.Module, shown: Batches | Examples, engine: str = "auto") -> list[list[float]]:
    """Logits of the first images, of a network on crossbars without its ADCs and chips: six digits of each, plain values. Of answers that
    are no logits `[N, classes]` the first numbers. Of a task they are those of its first batch, as others may have examples of another
    size."""
    images = shown.first(IMAGES) if isinstance(shown, Batches) else first_of(next(iter(shown.inputs())), IMAGES)
    use_cells(network, None)
    # TensorFloat-32 has the digits of FAR.
    with in_mode(network, training=False), quant.set_engine(engine), quant.without_adc(network), torch.backends.cudnn.flags(
            enabled=True, allow_tf32=False):
        found = torch.nan_to_num(output_of(network, images).float())
    logits = (found if found.dim() == 2 else found.reshape(length(images), -1)[:, :NUMBERS]).tolist()
    return [[float(f"{value:.6g}") for value in image] for image in logits]


def alike(stored: Any, now: list[list[float]]) -> bool:
    """Whether logits are those of one network: `|stored - now| <= FAR |now|` for at least half of the images, as of few an input may be
    so near to where a quantizer rounds that another processor takes the other side. Args: stored, whatever a file holds."""
    with contextlib.suppress(TypeError, ValueError, OverflowError):
        found, wanted = np.asarray(stored, float), np.asarray(now)
        if found.shape == wanted.shape:
            near = np.linalg.norm(found - wanted, axis=1) <= FAR * np.linalg.norm(wanted, axis=1)
            return 2 * near.sum() >= len(near)
    return False
