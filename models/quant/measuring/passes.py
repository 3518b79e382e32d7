"""Passes of the images through a network, and what a metric makes of them (`Run`)."""

import contextlib
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import nn

from ..layers.batches import Batch, called, first_of, length
from ..layers.loaders import Take, apart, first_target
from .images import Inputs, first_image, on_device, passed
from .metrics import Metric, OfTorchmetrics, accuracy
from .processes import ALONE, Processes


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

    @property
    def first(self) -> Batch:
        """A batch of the first image alone."""
        return first_image(Inputs(self.batches, self.network, self.take))

    def through(self, title: str, passing: contextlib.AbstractContextManager | None = None) -> Pass:
        """Let all images pass. Raises: ValueError for a metric that gives no number, or lacks targets, before they do."""
        self.check()
        gauge, found, predict = self.metric.gauge(), [], self.metric.predict

        def see(size: int, target: Any, output: Any) -> None:
            gauge.add(output, target, size)
            if predict:
                found.append(predict(output).cpu())

        count, seconds = passed(self.network, self.batches, see, labels=self.labels, take=self.take, reference=self.metric.reference,
                                title=title, progress=self.progress, passing=passing, processes=self.processes)
        predictions = torch.cat(self.processes.in_order(found)) if predict else None
        value, numbers = gauge.result(self.processes)
        return Pass(predictions, value, seconds, count, None if self.metric is accuracy else numbers)

    @torch.no_grad()
    def check(self) -> None:
        """Let the first image pass, which also prepares the weights, and the first time compiles, and show the metric what comes out.

        Raises: ValueError, see `through`, and for a network that does not take it.
        """
        parts = (apart(batch, self.network, self.take) for batch in self.batches)
        inputs, target = next(((inputs, target) for inputs, target in parts if length(inputs)), (None, None))
        if inputs is None:
            raise ValueError("there are no images to measure on")
        inputs = on_device(first_of(inputs, 1), self.network)
        target = on_device(first_target(target) if self.labels is None else self.labels[:1], self.network)
        output, reference = called(self.network, inputs), self.metric.reference
        self.metric.check(output, target if reference is None else called(reference, inputs))
