"""The networks that train.py trains: how one is built from the settings, and which layers of it are quantized."""

import torch

import hardware
import models
from models import quant


def build_network(args, num_classes, device):
    config = getattr(models, f"{args.model}_eval" if args.adc_aware else args.model)
    config.kwargs.update({"num_classes": num_classes, "wbit": args.wbit, "abit": args.abit, "wq": args.wq,
                          "alpha_init": 1.0 if args.alpha_init == "fit" else args.alpha_init,
                          "quantize_image": args.quantize_image})
    if args.adc_aware:
        [(spec, map)] = hardware.combinations(args, args.wbit, args.abit, ["calibrated"])
        config.kwargs.update({"spec": spec, "map": map})
    return config.base(*config.args, **config.kwargs).to(device, memory_format=torch.channels_last)


def quantized_layers(net):
    """Name and module of every convolution and linear layer."""
    return {name: layer for name, layer in net.named_modules() if isinstance(layer, (quant.Qconv2d, quant.QLinear))}


def used_alphas(net):
    """Name and clipping level of the layers that quantize their input: the first does so only on --quantize_image."""
    return {name: layer.act_quant.act_alpha for name, layer in quantized_layers(net).items()
            if layer.act_quant.on and (layer.quantize_image or not layer.image)}
