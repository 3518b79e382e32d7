"""What a network in training learns from beside the labels (`--distill`): the answers of the network that it starts from, as it was.

    loss = (1 - share) CE(labels) + share CE(softmax of the teacher's logits)

in training and where validation chooses the epoch.

The teacher sees the images as they are augmented and says which classes are near, where a label names one; so a network whose training
images are known by heart still learns what its ADCs take from it. Hinton, Vinyals and Dean 2015 (arXiv:1503.02531), at temperature 1.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..inputs.checkpoint import load_weights
from ..inputs.foreign import Foreign
from ..program.cli import UserError
from ..settings.train_flags import TrainSettings
from ..start import starting

KEPT = "format", "config", "state_dict"  # of the checkpoint that a teacher is made of


@dataclass(frozen=True, eq=False)
class Teacher:
    """Args: share, of the loss; made_of, what the run's checkpoints hold of it, from which a run that goes on makes it again."""

    network: nn.Module
    share: float
    made_of: Mapping[str, Any]

    @torch.no_grad()
    def answers(self, x: torch.Tensor) -> torch.Tensor:
        """The probability that it gives each class, float32 `[N, classes]`. Args: x, the network's inputs."""
        return self.network(x).float().softmax(1)

    def loss(self, of_labels: torch.Tensor, logits: torch.Tensor, answers: torch.Tensor) -> torch.Tensor:
        """The mean loss of a batch. Args: of_labels, that of the labels alone; logits and answers, float32 `[N, classes]`."""
        return torch.lerp(of_labels, F.cross_entropy(logits, answers), self.share)


def teacher_of(settings: TrainSettings, others: Foreign | None, start: Mapping[str, Any] | None, goes_on: bool, num_classes: int,
               device: torch.device, source: str) -> Teacher | None:
    """The teacher of a run; None without `--distill`.

    Args: others, a network of others that is trained; start, the checkpoint that the run starts from or, `goes_on`, that of its own which
        holds its teacher; source, its path.
    Raises: UserError for a run that had no teacher before.
    """
    if not settings.distill:
        return None
    if goes_on and not start.get("teacher"):
        raise UserError(f"{source} is of a run without --distill")
    if others:
        if goes_on:
            load_weights(others.network, start["teacher"]["state_dict"], source=source)
        return Teacher(others.network.eval(), settings.distill, {"state_dict": others.network.state_dict()})
    made_of = {"config": {}, **start["teacher"]} if goes_on else {name: start[name] for name in KEPT if name in start}
    network, _, _ = starting.original(settings, made_of, num_classes, device, source)
    return Teacher(network.eval(), settings.distill, made_of)
