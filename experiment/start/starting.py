"""Networks to begin with: that of a run or an evaluation, and, for `train.py --fine_tune`, one made of the weights of a network
that had other quantizers, or none."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

import models
from models import quant
from models.quant.layers.quantizers import OFF
from models.quant.network.modes import hooked

from ..inputs import data, foreign
from ..inputs.checkpoint import load_weights
from ..program.cli import UserError, user_error
from ..settings import train_settings
from ..settings.eval_flags import EvalSettings
from ..settings.train_flags import TrainSettings


def build_network(settings: TrainSettings, num_classes: int, device: torch.device) -> nn.Module:
    """The network that these settings train, on crossbars with `adc_aware`, with random weights."""
    options = {"num_classes": num_classes, "wbit": settings.w_bits, "abit": settings.a_bits, "wq": settings.wq,
               "alpha_init": 1.0 if settings.alpha_init == "fit" else settings.alpha_init,
               "quantize_image": settings.quantize_image}
    name = settings.model
    if settings.adc_aware:
        name += "_eval"
        options |= {"spec": settings.spec, "crossbar_layers": settings.crossbar_layers}
    return models.create(name, **options).to(device, memory_format=torch.channels_last)


def crossbar_network(settings: EvalSettings, checkpoint: Mapping[str, Any], device: torch.device) -> nn.Module:
    """The network of a checkpoint on crossbars, in evaluation mode, without the ADC ranges that the checkpoint may hold.

    Raises: UserError for weights that do not fit, and a network that is converted.
    """
    if foreign.is_foreign(settings.model):
        raise UserError(f"{settings.resume} is of {settings.model}, which is converted: eval.py does that, and in Python `convert`")
    net = models.create(settings.model, num_classes=data.num_classes(settings.dataset, settings.data_path), wbit=settings.w_bits,
                        abit=settings.a_bits, wq=settings.wq, quantize_image=settings.quantize_image)
    state = {key: value for key, value in checkpoint["state_dict"].items() if not key.endswith(quant.ADC_BUFFERS)}
    # Only --quantize_image uses the clipping level of the first layer.
    unused = [f"{name}.act_quant.act_alpha" for name, layer in quantized_layers(net).items() if layer.image and not layer.quantize_image]
    own = "" if checkpoint["config"] else f". For your own network: --model FILE.py:FUNCTION --state {settings.resume}"
    with user_error(lambda error: f"{error}{own}", UserError):
        load_weights(net, state, allow_missing=(*quant.ADC_BUFFERS, *unused), source=settings.resume)
    return net.to(device, memory_format=torch.channels_last).eval()


def quantized_layers(net: nn.Module) -> dict[str, nn.Module]:
    """Name and module of every convolution and linear layer."""
    return {name: layer for name, layer in net.named_modules() if isinstance(layer, (quant.Qconv2d, quant.QLinear))}


def used_alphas(net: nn.Module) -> dict[str, torch.Tensor]:
    """Name and clipping level of the layers that quantize their input: the first does so only on --quantize_image."""
    return {name: layer.act_quant.act_alpha for name, layer in quantized_layers(net).items()
            if layer.act_quant.on and (layer.quantize_image or not layer.image)}


def learned_scales(net: nn.Module) -> dict[str, nn.Parameter]:
    """Name and scale of the quantizers of a converted network that learn it: of inputs one number, of weights one of each channel."""
    quantizers = {f"{name.removesuffix('.crossbar')}/{part}": getattr(layer, f"{part}_quant") for name, layer in quant.crossbar_layers(net)
                  for part in ("act", "weight")}
    scales = {name: getattr(quantizer, "scale", None) for name, quantizer in quantizers.items()}
    return {name: scale for name, scale in scales.items() if isinstance(scale, nn.Parameter)}


def load(net: nn.Module, settings: TrainSettings, state_dict: Mapping[str, torch.Tensor], source: str = "checkpoint") -> list[str]:
    """Copy the part of a checkpoint's weights that a run with these settings can use into its network: not the ranges of
    hardware, nor levels of quantizers that it does not have.

    Returns: the keys that the weights lack; their parameters keep their values.
    """
    optional = "act_alpha", "weight_quant.clip", *quant.ADC_BUFFERS
    useless = quant.ADC_BUFFERS + (() if settings.wq == "sawb" and settings.w_bits != OFF else ("weight_quant.clip",)) + (
        ("act_alpha",) if settings.a_bits == OFF else ())
    usable = {key: value for key, value in state_dict.items() if not key.endswith(useless)}
    return load_weights(net, usable, optional, source=source)


@torch.no_grad()
def fit_alphas(net: nn.Module, images: torch.Tensor, names: Iterable[str]) -> None:
    """Set the clipping levels of the layers `names` to those of least squared error on their inputs, layer by layer.

    Batch norm uses the statistics of these images: those that it has belong to weights under other quantizers.
    """
    hooks = (layer.register_forward_pre_hook(lambda layer, inputs: layer.act_quant.fit(inputs[0]))
             for name, layer in quantized_layers(net).items() if name in names)
    with quant.without_adc(net, training=True), hooked(hooks):
        net(images)


@torch.no_grad()
def fit_logits(net: nn.Module, source: nn.Module, images: torch.Tensor) -> None:
    """Give the logits the deviation that they have in `source`, the network with the same weights but other quantizers.

    No batch norm follows it, and what its weights are worth depends on their quantizer (DoReFa's levels reach +-1 whatever
    the weights): without this the first epoch goes into logits that are ten times too small or too large.
    """
    spread = []
    for network in (source, net):
        with quant.without_adc(network, training=True):
            logits = network(images)
        spread.append((logits - logits.mean(0)).std().item())
    net.last.bias.mul_(source.last.out_scale / net.last.out_scale)
    if min(spread) > 1e-4 * max(spread):  # else one of them gives all images the same logits, to rounding
        net.scale_logits(spread[0] / spread[1])


def _quantizers(settings: TrainSettings) -> tuple:
    """What decides how a network of these settings quantizes."""
    return (settings.w_bits, settings.a_bits, settings.wq if settings.w_bits != OFF else None,
            settings.quantize_image and settings.a_bits != OFF)


def _trained_with(checkpoint: dict, settings: TrainSettings, source: str) -> TrainSettings:
    """The settings with the quantizers of a checkpoint. Where it does not say them, it is of the original code, with DoReFa and
    the bits of the settings, or, without clipping levels, of 32 bits."""
    levels = any(key.endswith("act_alpha") for key in checkpoint["state_dict"])
    stored = train_settings.from_checkpoint(checkpoint, source)
    known = {"wq": "dorefa"} | ({} if levels else {"w_bits": OFF, "a_bits": OFF}) | stored
    return replace(settings, adc_aware=False, **{name: known[name] for name in ("w_bits", "a_bits", "wq", "quantize_image")
                                                 if name in known})


def original(settings: TrainSettings, checkpoint: Mapping[str, Any], num_classes: int, device: torch.device, source: str = "checkpoint"
             ) -> tuple[nn.Module, TrainSettings, list[str]]:
    """The network of a checkpoint as it was trained, without crossbars: (network, its settings, keys that the weights lack)."""
    before = _trained_with(checkpoint, settings, source)
    net = build_network(before, num_classes, device)
    return net, before, load(net, before, checkpoint["state_dict"], source)


def known_in_validation(settings: TrainSettings, checkpoint: Mapping[str, Any], labels: torch.Tensor, source: str = "checkpoint") -> int:
    """How many images a run validates on that the weights of a checkpoint were trained on, as far as it tells. Args: labels, of the data
    set's training images."""
    stored, facts = train_settings.from_checkpoint(checkpoint, source), checkpoint.get("data") or {}
    if stored.get("dataset") != settings.dataset or not {"val_split", "seed", "limit_train"} <= stored.keys():
        return 0
    trained, _ = data.training_split(labels, stored["val_split"], stored["seed"], stored["limit_train"])
    _, validation = data.training_split(labels, settings.val_split, settings.seed, settings.limit_train)
    return int(torch.isin(validation, trained).sum()) if len(trained) == facts.get("train_images") else 0


@torch.no_grad()
def fit_quantizers(net: nn.Module, settings: TrainSettings, checkpoint: dict, num_classes: int, images: torch.Tensor,
                   source: str = "checkpoint") -> str:
    """Make a network with the weights of `checkpoint` ready to be trained with quantizers that those had not, so that it
    does, as far as it can, what it did with its own.

    Clipping levels that the weights lack, or have for other bits, start at --alpha_init; logits keep their scale; batch norm,
    which the first calibration of --adc_aware relies on, gets the statistics of these images.

    Returns: what was done, as text for the log.
    """
    source_net, before, absent = original(settings, checkpoint, num_classes, images.device, source)
    own = {name for name in used_alphas(source_net) if f"{name}.act_quant.act_alpha" not in absent and settings.a_bits == before.a_bits}
    new = [name for name in used_alphas(net) if name not in own]
    if new and settings.alpha_init == "fit":
        fit_alphas(net, images, new)
    else:
        for name in new:
            used_alphas(net)[name].fill_(settings.alpha_init)
    others = _quantizers(before) != _quantizers(settings)
    if others:
        fit_logits(net, source_net, images)
        with quant.without_adc(net):
            torch.optim.swa_utils.update_bn([images], net)
    text = ""
    if new:  # the last one as the logits' scale has left it
        text = "; clipping levels start at " + ", ".join(f"{used_alphas(net)[name].item():.3g}" for name in new)
    elif settings.alpha_init != "fit":
        text = "; they have clipping levels, so --alpha_init has no effect"
    return text + ("; the logits keep their scale under other quantizers" if others else "")
