"""Passes of the images through a network, and what a metric makes of them (`Run`)."""

import contextlib
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import nn

from ..layers.batches import Batch, called, first_of, length
from ..layers.loaders import Take, apart, first_targets
from ..network.modes import in_mode
from .images import on_device, passed
from .metrics import Metric, OfTorchmetrics, accuracy
from .processes import ALONE, Processes

TRIED = 2  # images that a metric is shown first: of one alone a number for each looks like one for all


class Pass(NamedTuple):
    """What one pass of the images found; see `Record`."""

    predictions: torch.Tensor | None
    accuracy: float
    seconds: float
    examples: int
    numbers: torch.Tensor | None


class Run(NamedTuple):
    """What all passes of the images through a network have in common; see `measure`."""

    network: nn.Module
    batches: Iterable[Any]
    labels: Any
    metric: Metric | OfTorchmetrics
    take: Take | None = None
    progress: bool = False
    processes: Processes = ALONE

    def first(self, count: int = 1) -> tuple[Batch, Any, int]:
        """(inputs, targets) of the first images, as one batch of so many or fewer, and how many they are. Raises: ValueError for none."""
        parts = (apart(batch, self.network, self.take) for batch in self.batches)
        inputs, target = next(((inputs, target) for inputs, target in parts if length(inputs)), (None, None))
        if inputs is None:
            raise ValueError("there are no examples to measure on")
        size, count = length(inputs), min(length(inputs), count)
        target = first_targets(target, size, count) if self.labels is None else self.labels[:count]
        return on_device(first_of(inputs, count), self.network, True), on_device(target, self.network), count

    def through(self, title: str, passing: contextlib.AbstractContextManager | None = None) -> Pass:
        """Let all images pass. Raises: ValueError for a metric that gives no number, or lacks targets, before they do."""
        self.check()
        gauge, found, predict = self.metric.gauge(), [], self.metric.predict

        def see(size: int, target: Any, output: Any) -> None:
            gauge.add(output, target, size)
            if predict:
                found.append(predict(output, target).cpu())

        with self._reference_ready():
            count, seconds = passed(self.network, self.batches, see, labels=self.labels, take=self.take, reference=self.metric.reference,
                                    title=title, progress=self.progress, passing=passing, processes=self.processes)
        predictions = torch.cat(self.processes.in_order(found)) if predict else None
        value, numbers = gauge.result(self.processes)
        told = self.metric is accuracy and predictions.dim() == 1  # by the predictions
        return Pass(predictions, value, seconds, count, None if told else numbers)

    def _reference_ready(self) -> contextlib.AbstractContextManager:
        reference = self.metric.reference
        return contextlib.nullcontext() if reference is None else in_mode(reference, training=False)

    @torch.no_grad()
    def check(self) -> None:
        """Let the first images pass, which also prepares the weights, and the first time compiles, and show the metric what comes out.

        Raises: ValueError, see `through`.
        """
        inputs, target, count = self.first(TRIED)
        output, reference = called(self.network, inputs), self.metric.reference
        with self._reference_ready():
            self.metric.check(output, target if reference is None else called(reference, inputs), count)
