"""Small files for trained networks: weights as packed codes, everything else as it is.

`pack` and `unpack` turn a checkpoint (see `checkpoint.load_checkpoint`) into one of a few bits a weight and back. The
weights that come back are not those that were trained, but have exactly their codes and scale. Codes are all that inference
uses, and training goes on from them. `load_checkpoint` unpacks by itself.
"""

import math
from typing import Any

import numpy as np
import torch
from torch import nn

from models.quant.layers.quantizers import OFF, WEIGHT_QUANTIZERS

FORMAT = "vgg-quant-packed-1"


def pack(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """The small form of a checkpoint: every weight of a convolution or linear layer as its codes.

    Args: checkpoint, with "state_dict" and "config", which holds "w_bits", and "wq" for other quantizers than DoReFa.
    Returns: a copy with "format" FORMAT, the old one as "unpacked_format", and "codes", `{name of the weight: {"shape": list,
        "bits": uint8 tensor of `w_bits` bits a code, "scale": float}}`; "state_dict" has the other tensors.
    Raises: ValueError for a network whose weights are not quantized, or codes that would not come back.
    """
    config = checkpoint["config"]
    w_bits, wq = config["w_bits"], config.get("wq", "dorefa")
    if w_bits == OFF:
        raise ValueError(f"a network with --w_bits {OFF} has no weight codes to pack")
    state, codes = {}, {}
    for key, value in checkpoint["state_dict"].items():
        if not (key.endswith(".weight") and value.dim() > 1):  # batch norm, clipping levels, biases
            state[key] = value
            continue
        quantizer = _quantizer(wq, w_bits, checkpoint["state_dict"], key)
        w_codes, scale = quantizer.codes(value.float()), quantizer.scale(value.float()).item()
        if not torch.equal(quantizer.codes(quantizer.weights(w_codes, scale)), w_codes):
            raise ValueError(f"the codes of {key} do not come back from its weights")
        codes[key] = {"shape": list(value.shape), "bits": _to_bits(w_codes, w_bits), "scale": scale}
    return checkpoint | {"format": FORMAT, "unpacked_format": checkpoint.get("format"), "state_dict": state, "codes": codes}


def unpack(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """The checkpoint that `pack` was given, but for the weights' distance to their codes.

    Raises: ValueError for another format, or bits that are not those of the shape; for what else is damaged, the errors that
        Python and PyTorch have for it.
    """
    if checkpoint.get("format") != FORMAT:
        raise ValueError(f"its format is {checkpoint.get('format')!r}, not {FORMAT!r}")
    config = checkpoint["config"]
    w_bits, wq = config["w_bits"], config.get("wq", "dorefa")
    state = dict(checkpoint["state_dict"])
    for key, stored in checkpoint["codes"].items():
        w_codes = _from_bits(stored["bits"], stored["shape"], w_bits)
        state[key] = _quantizer(wq, w_bits, state, key).weights(w_codes, stored["scale"])
    rest = {name: value for name, value in checkpoint.items() if name not in ("codes", "unpacked_format")}
    return rest | {"format": checkpoint["unpacked_format"], "state_dict": state}


def _quantizer(wq: str, w_bits: int, state: dict[str, torch.Tensor], key: str) -> nn.Module:
    """The quantizer of the weight `key`, with the levels that `state` holds for it."""
    quantizer = WEIGHT_QUANTIZERS[wq](w_bits).eval()
    prefix = key.removesuffix("weight") + "weight_quant."
    quantizer.load_state_dict({name: state[prefix + name] for name in quantizer.state_dict()})
    return quantizer


def _to_bits(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes one after the other, `bits` bits each, most significant first; the last byte is filled with zeros."""
    each = np.unpackbits(codes.cpu().numpy().reshape(-1, 1), axis=1)[:, 8 - bits:]
    return torch.from_numpy(np.packbits(each))


def _from_bits(packed: torch.Tensor, shape: list[int], bits: int) -> torch.Tensor:
    if len(packed) != -(-math.prod(shape) * bits // 8):
        raise ValueError(f"{len(packed)} bytes do not hold {list(shape)} codes of {bits} bits")
    each = np.unpackbits(packed.numpy(), count=math.prod(shape) * bits).reshape(-1, bits)
    return torch.from_numpy(np.packbits(np.pad(each, ((0, 0), (8 - bits, 0))), axis=1).reshape(shape))
