"""Training a converted network through the hardware that it will run on: `Training`, and what happens at each of its passes.

    network = convert(model, spec, images, train="adc")
    recalibrate_every(network, images, steps=100)
    for x, y in batches:                                   # the loop is yours, with any optimizer
        loss(network(x), y).backward(); optimizer.step(); optimizer.zero_grad()
    recalibrate(network, images)
    network.eval()

In training mode a layer gives what the arrays give in evaluation mode, for the same ranges, bit for bit; the gradient goes straight through
(`straight_through`). ADC ranges, plans and corrections are constants between two calls of `recalibrate`, and lag behind the weights.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as tree

from ..arrays import readout
from ..devices import Device
from ..layers.batches import Batch
from ..layers.crossbar import crossbar_layers
from ..layers.eager import outside_graphs
from ..layers.loaders import Take
from ..network.calibration import calibrate
from ..network.program import program
from .images import batches_of_images
from .layer import ConvertedLayer
from .scales import SMALLEST

WAYS = ("quantizers", "adc", "chips")  # what a forward pass in training goes through
EVALUATED = 0  # seed of the chip that is evaluated on; training has those from 1 on


@dataclass(frozen=True)
class Training:
    """How a converted network is trained. `convert(..., train="adc")` is short for `Training("adc")`.

    Attributes:
        through: "quantizers", products of quantized numbers, without arrays; "adc", what the arrays of the spec give, with their ADCs,
            plans and converters; "chips", the same on chips, which are drawn anew.
        chips: of "chips", a `Device`, or a function `(network, seed)` that programs one, such as `functools.partial(program,
            device=device, read_noise=0.5)`, or `functools.partial(add_weight_noise, noise=0.02)`.
        chip_steps: passes in training mode from one chip to the next.
        learn_scales: the scales of inputs and weights are parameters (LSQ, Esser et al., arXiv 1902.08153), `scale` of each quantizer.
        clip_share, scale_decay: of learned scales of inputs, the share of inputs that should lie beyond the window: where fewer do, the
            gradient of a scale s gets `scale_decay s` more, and where more do so much less. None: only the loss decides.
        weight_clip: after each step weights are clipped to so many standard deviations; None: they are not. weight_clip_per: of their
            "layer", or of their output "channel".
    Raises: ValueError for impossible values.
    """

    through: str = "adc"
    chips: Device | Callable[[nn.Module, int], Any] | None = None
    chip_steps: int = 1
    learn_scales: bool = False
    clip_share: float | None = None
    scale_decay: float = 1e-3
    weight_clip: float | None = None
    weight_clip_per: str = "layer"

    def __post_init__(self) -> None:
        if self.through not in WAYS:
            raise ValueError(f"train is {self.through!r}; allowed are {', '.join(WAYS)}, or a Training")
        if (self.through == "chips") != (self.chips is not None):
            raise ValueError("to train on chips say which: train=Training('chips', device)" if self.chips is None else
                             f"chips are given, and the network is trained through {self.through!r}; take Training('chips', device)")
        if type(self.chip_steps) is not int or self.chip_steps < 1:
            raise ValueError(f"chip_steps is {self.chip_steps!r}; a whole number from 1 on is expected")
        if self.clip_share is not None and not (self.learn_scales and 0 <= self.clip_share <= 1):
            raise ValueError(f"clip_share is {self.clip_share!r}; a share from 0 to 1 is expected, with learn_scales=True")
        for name, value in (("scale_decay", self.scale_decay), ("weight_clip", 1.0 if self.weight_clip is None else self.weight_clip)):
            if not (isinstance(value, (int, float)) and 0 < value < float("inf")):
                raise ValueError(f"{name} is {value!r}; a positive number is expected")
        if self.weight_clip_per not in ("layer", "channel"):
            raise ValueError(f"weight_clip_per is {self.weight_clip_per!r}; allowed are layer, channel")

    def program(self, network: nn.Module, seed: int) -> None:
        """Put the network on the chip of this seed."""
        if isinstance(self.chips, Device):
            program(network, self.chips, seed, noise_seed=seed)
        else:
            self.chips(network, seed=seed)


class Passes:
    """The passes of a converted network: hooks around its `forward`.

    Before one in training mode come a new chip and new ranges, where it is time for them, and its images get numbers of their own, so that
    the noise of reads is another in each pass. (Not where `image_numbers` has given them numbers.) Before one in evaluation mode, a network
    that is trained on chips is put on the chip that it is evaluated on, if weights have changed since.
    """

    def __init__(self) -> None:
        self.training: Training | None = None
        self.count = self.images = 0  # passes in training mode so far, and their images
        self.recalibration: tuple[int, Callable[[], None]] | None = None  # every so many passes, what
        self.trained = self.said = False
        self._numbers: contextlib.AbstractContextManager | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Of a copy, which is not the network that is calibrated: it has to be told anew."""
        return {**vars(self), "recalibration": None, "_numbers": None}

    @torch.no_grad()
    def settle(self, network: nn.Module) -> None:
        """What is done to weights and scales after a step."""
        for _, layer in crossbar_layers(network):
            if self.training.learn_scales:
                for quantizer in (layer.act_quant, layer.weight_quant):
                    quantizer.scale.clamp_(min=SMALLEST)
            if self.training.weight_clip is not None:
                layer.clip_weight(self.training.weight_clip, self.training.weight_clip_per == "channel")

    @outside_graphs
    def before(self, network: nn.Module, args: tuple, kwargs: dict) -> None:
        """A hook before `forward`."""
        if not (network.training and torch.is_grad_enabled()):
            if self.trained and not network.training:
                self.evaluated(network)
            return
        if self.trained and self.training is not None:
            self.settle(network)
        self.trained = True
        if self.training is None:
            self._say(network)
        elif self.training.through != "quantizers":
            self._prepare(network, next((leaf for leaf in tree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)), None))

    @outside_graphs
    def after(self, *_: Any) -> None:
        """A hook behind `forward`, whether it returned or not."""
        if self._numbers is not None:
            self._numbers.__exit__(None, None, None)
            self._numbers = None

    def evaluated(self, network: nn.Module) -> None:
        """Before an evaluation: what is due after the last step; of a network that is trained on chips a chip of its present weights."""
        if self.training is not None and self.trained:
            self.settle(network)
        if self.training is not None and self.training.through == "chips" and any(
                layer.chip is None or layer.chip.of != layer.version() for _, layer in crossbar_layers(network)):
            self.training.program(network, EVALUATED)
        self.trained = False

    def _prepare(self, network, inputs):
        training, due = self.training, self.recalibration is not None and self.count % self.recalibration[0] == 0
        if training.through == "chips" and (due or self.count % training.chip_steps == 0):
            training.program(network, EVALUATED + 1 + self.count // training.chip_steps)
        if due:
            self.recalibration[1]()
        batch = 1 if inputs is None or not inputs.dim() else inputs.shape[min(_batch_dim(network), inputs.dim() - 1)]
        if not readout.numbered():
            self._numbers = readout.image_numbers(self.images, batch)
            self._numbers.__enter__()
        self.count, self.images = self.count + 1, self.images + batch

    def _say(self, network):
        if not self.said and any(layer.spec.adc_range != "ideal" or layer.chip for _, layer in crossbar_layers(network)):
            self.said = True
            warnings.warn("this converted network is trained through its quantizers only, without ADCs, chips and noise; "
                          "convert(..., train='adc') trains it through them, and train='quantizers' says that this is meant",
                          RuntimeWarning, 3)


def train_through(network: nn.Module, train: Training | str | None) -> nn.Module:
    """Let a converted network, such as one that was loaded, be trained so. Args: train, as that of `convert`; None: through its quantizers,
    as it says once.

    Returns: the network. Raises: ValueError for a network that was not converted, and what is no way.
    """
    training = Training(train) if isinstance(train, str) else train
    passes = _passes(network)
    if training is not None:
        if not isinstance(training, Training):
            raise ValueError(f"train is {train!r}; allowed are {', '.join(WAYS)}, or a Training")
        _say_what_does_not_train(network)
    passes.training = training
    for _, layer in crossbar_layers(network):
        layer.through = "quantizers" if training is None else training.through
        layer.correct_batches = training is not None and training.through == "chips"
        layer.weight_quant.learn(training is not None and training.learn_scales)
        layer.act_quant.learn(training is not None and training.learn_scales)
        layer.act_quant.decay = None if training is None or training.clip_share is None else (training.clip_share, training.scale_decay)
    if training is not None and training.through == "chips":
        training.program(network, EVALUATED)
    return network


def recalibrate(network: nn.Module, images: Batch | Iterable[Any], take: Take | None = None) -> None:
    """Choose ADC ranges, plans and corrections anew, for the weights as they are now, as `convert` chose them. A network without calibrated
    ranges has none, and stays as it is.

    Args: images, take: see `convert`.
    """
    passes, options = _passes(network), network.crossbar_report.options
    if not network.training:
        passes.evaluated(network)
    if any(layer.spec.adc_range == "calibrated" for _, layer in crossbar_layers(network)):
        dim = _batch_dim(network)
        calibrate(network, batches_of_images(images, network, dim, take), correct=options.get("correct", "channel"), batch_dim=dim)


def recalibrate_every(network: nn.Module, images: Batch | Iterable[Any], steps: int, take: Take | None = None) -> None:
    """Let a network that is trained through its arrays recalibrate itself, before every so many passes in training mode. Args: images, of
    which what is needed is kept; see `recalibrate`. Raises: ValueError for other steps."""
    if type(steps) is not int or steps < 1:
        raise ValueError(f"steps is {steps!r}; a whole number from 1 on is expected")
    batches = batches_of_images(images, network, _batch_dim(network), take)
    _passes(network).recalibration = steps, lambda: recalibrate(network, batches)


def _passes(network):
    network = getattr(network, "_orig_mod", network)  # under torch.compile
    if not isinstance(getattr(network, "crossbar_passes", None), Passes):
        raise ValueError("this network was not converted: convert(model, spec, images, train='adc') makes one that can be trained")
    return network.crossbar_passes


def _batch_dim(network):
    report = getattr(network, "crossbar_report", None)
    return 0 if report is None else report.options.get("batch_dim", 0)


def _say_what_does_not_train(network):
    layers = [layer for _, layer in crossbar_layers(network) if isinstance(layer, ConvertedLayer)]
    report = getattr(network, "crossbar_report", None)
    frozen = {layer.root.label for layer in layers if not layer.root.requires_grad}
    replaced = {layer.root.label for layer in layers if layer._w_codes is not None} - frozen
    for names, text in ((frozen, "do not train, as they are frozen (requires_grad)"),
                        (replaced, "do not train, as codes stand in their place (set_codes)"),
                        (() if report is None else report.digital, "are digital, and train as they are, without arrays")):
        if names:
            shown = ", ".join(sorted(names)[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            warnings.warn(f"{shown} {text}", RuntimeWarning, 3)
