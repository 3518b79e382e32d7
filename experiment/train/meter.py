"""Loss and accuracy, of the batches of a training as they pass and of a whole set of images."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from models import quant

from ..inputs.data import Dataset, normalize
from ..program import distributed
from .teacher import Teacher


class Meter:
    """Sums of loss and correct answers, over all processes. They stay on the device: reading them is what waits for the GPU."""

    def __init__(self, device: torch.device):
        self.sums = torch.zeros(2, dtype=torch.float64, device=device)
        self.images = 0

    def add(self, sums: torch.Tensor, images: int) -> None:
        """sums: those of some `images`, see `loss_and_correct`."""
        self.sums += sums
        self.images += images

    def read(self) -> tuple[float, float]:
        """(mean loss, accuracy in percent) of all images so far."""
        loss, correct = self.sums.tolist()
        return loss / max(1, self.images), 100 * correct / max(1, self.images)

    def state_dict(self) -> dict[str, Any]:
        return {"sums": self.sums.tolist(), "images": self.images}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.sums.copy_(torch.tensor(state["sums"], dtype=torch.float64))
        self.images = state["images"]


def loss_and_correct(loss: torch.Tensor, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Sums over a batch, float64 [2]. loss: mean over the batch (scalar tensor), logits [N, classes], labels [N]."""
    correct = (logits.argmax(1) == labels).sum()
    return torch.stack([loss.detach().double() * len(labels), correct.double()])


@torch.no_grad()
def evaluate(net: nn.Module, x: torch.Tensor, y: torch.Tensor, data: Dataset, amp: str = "off", batch_size: int = 250,
             tick: Callable[[], None] = lambda: None, teacher: Teacher | None = None, title: str = "") -> tuple[float, float]:
    """(mean loss, accuracy in percent) on uint8 images x; each of several processes has whole batches. tick() is called before every
    batch, by all processes before each of them has one, and may raise. With a teacher the loss is that of training with it. title: of a
    progress bar on a terminal."""
    net.eval()
    sums = []
    batches = list(zip(x.split(batch_size), y.split(batch_size), strict=True))
    hidden = None if title and distributed.is_first() else True  # None: but on a terminal
    for number, (images, labels) in enumerate(tqdm(batches, title, unit="batch", dynamic_ncols=True, leave=False, disable=hidden)):
        if number % distributed.world() == 0:
            tick()
        if not distributed.mine(number):
            continue
        with torch.autocast(x.device.type, torch.bfloat16, enabled=amp == "bf16"), quant.image_numbers(number * batch_size):
            inputs = normalize(images, data.mean, data.std)
            logits = net(inputs).float()
            answers = teacher.answers(inputs) if teacher else None
        loss = F.cross_entropy(logits, labels)
        sums.append(loss_and_correct(teacher.loss(loss, logits, answers) if teacher else loss, logits, labels))
    loss, correct = sum(distributed.in_order([each.cpu() for each in sums])).tolist()  # one after the other, as one process adds them
    return loss / len(y), 100 * correct / len(y)
