"""A network that classifies nothing, with its own data and metric:

    python eval.py --model examples/task.py:denoiser --mapping im2col --cell_bits 1 2 --adc_bits 3 4

It takes noise out of the pictures of scikit-learn's digits: one convolution for each channel, whose weights are those of a Gaussian. The
metric is the root of the mean square error of a pixel, in grey levels of 0 to 255.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from experiment.inputs import data
from models.quant import Metric, Task

NOISE = 0.25  # its deviation, of full scale


class Denoiser(nn.Module):
    """Each pixel becomes a weighted mean of 5 x 5 of its channel."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = nn.Conv2d(3, 3, 5, padding=2, groups=3, bias=False)
        line = torch.exp(-torch.arange(-2.0, 3.0) ** 2 / 2)
        self.mean.weight = nn.Parameter((torch.outer(line, line) / line.sum() ** 2).expand(3, 1, 5, 5).clone())

    def forward(self, pictures: Tensor) -> Tensor:
        return self.mean(pictures)


def batches(pictures: Tensor, seed: int) -> Iterable[tuple[Tensor, Tensor]]:
    """(noisy pictures, clean pictures) of full scale 1."""
    clean = pictures.float() / 255
    noisy = clean + NOISE * torch.randn(clean.shape, generator=torch.Generator().manual_seed(seed))
    return list(zip(noisy.split(64), clean.split(64)))


def denoiser() -> Task:
    """What eval.py measures."""
    digits = data.load("digits")
    error = Metric("rms_error", lambda output, clean: (output - clean).square().flatten(1).mean(1), "levels", higher=False,
                   value=lambda mean: 255 * math.sqrt(mean))
    return Task(Denoiser(), batches(digits.test_x, seed=1), batches(digits.train_x[:64], seed=0), error, kind="pictures",
                validation=batches(digits.train_x[64:128], seed=2))
