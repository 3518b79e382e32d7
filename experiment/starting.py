"""How `train.py --fine_tune` starts from the weights of a network with other quantizers, or none."""

import argparse

import torch

import utils
from models import quant
from networks import build_network, quantized_layers, used_alphas


def load(net, args, state_dict):
    """Copy the part of a checkpoint's weights that a run with the settings `args` can use into its network: not the ranges of
    hardware, nor levels of quantizers that it does not have.

    Returns: the keys that the weights lack; their parameters keep their values.
    """
    optional = "act_alpha", "weight_quant.clip", *quant.ADC_BUFFERS
    useless = quant.ADC_BUFFERS + (() if args.wq == "sawb" and args.wbit < 32 else ("weight_quant.clip",)) + (
        ("act_alpha",) if args.abit == 32 else ())
    usable = {key: value for key, value in state_dict.items() if not key.endswith(useless)}
    return utils.load_weights(net, usable, optional, source=args.fine_tune)


@torch.no_grad()
def fit_alphas(net, images, names):
    """Set the clipping levels of the layers `names` to those of least squared error on their inputs, layer by layer.

    Batch norm uses the statistics of these images: those that it has belong to weights under other quantizers.
    """
    hooks = [layer.register_forward_pre_hook(lambda layer, inputs: layer.act_quant.fit(inputs[0]))
             for name, layer in quantized_layers(net).items() if name in names]
    with quant.without_adc(net, training=True):
        net(images)
    for hook in hooks:
        hook.remove()


@torch.no_grad()
def fit_logits(net, source, images):
    """Give the logits the deviation that they have in `source`, the network with the same weights but other quantizers, by
    the scale of the last layer's input.

    No batch norm follows it, and what its weights are worth depends on their quantizer (DoReFa's levels reach +-1 whatever
    the weights): without this the first epoch goes into logits that are ten times too small or too large.
    """
    spread = []
    for network in (source, net):
        with quant.without_adc(network, training=True):
            logits = network(images)
        spread.append((logits - logits.mean(0)).std().item())
    norm, _, last = net.classifier[-3:]
    last.bias.mul_(source.classifier[-1].out_scale / last.out_scale)
    if min(spread) > 1e-4 * max(spread):  # else one of them gives all images the same logits, to rounding
        for parameter in (norm.weight, norm.bias, *([last.act_quant.act_alpha] if last.act_quant.on else [])):
            parameter.mul_(spread[0] / spread[1])


def quantizers(args):
    """What decides how a network of these settings quantizes."""
    return args.wbit, args.abit, args.wq if args.wbit < 32 else None, args.quantize_image and args.abit < 32


def quantizers_of(checkpoint, args):
    """The settings `args` with the quantizers of a checkpoint. Where it does not say them, it is of the original code, with
    DoReFa and the bits of `args`, or, without clipping levels, of 32 bits."""
    levels = any(key.endswith("act_alpha") for key in checkpoint["state_dict"])
    known = {"wq": "dorefa"} | ({} if levels else {"wbit": 32, "abit": 32}) | checkpoint["config"]
    names = "wbit", "abit", "wq", "quantize_image"
    return argparse.Namespace(**vars(args) | {name: known[name] for name in names if name in known} | {"adc_aware": False})


@torch.no_grad()
def fit_quantizers(net, args, checkpoint, num_classes, images):
    """Make a network with the weights of `checkpoint` ready to be trained with quantizers that those had not, so that it
    does, as far as it can, what it did with its own.

    Clipping levels that the weights lack, or have for other bits, start at --alpha_init; logits keep their scale; batch norm,
    which the first calibration of --adc_aware relies on, gets the statistics of these images.

    Returns: what was done, as text for the log.
    """
    before = quantizers_of(checkpoint, args)
    source = build_network(before, num_classes, images.device)
    absent = load(source, before, checkpoint["state_dict"])
    own = {name for name in used_alphas(source) if f"{name}.act_quant.act_alpha" not in absent and args.abit == before.abit}
    new = [name for name in used_alphas(net) if name not in own]
    text = ""
    if new:
        if args.alpha_init == "fit":
            fit_alphas(net, images, new)
        else:
            for name in new:
                used_alphas(net)[name].fill_(args.alpha_init)
        text = "; clipping levels start at " + ", ".join(f"{used_alphas(net)[name].item():.3g}" for name in new)
    elif args.alpha_init != "fit":
        text = "; they have clipping levels, so --alpha_init has no effect"
    if quantizers(before) != quantizers(args):
        fit_logits(net, source, images)
        with quant.without_adc(net):
            torch.optim.swa_utils.update_bn([images], net)
        text += "; the logits keep their scale under other quantizers"
    return text
