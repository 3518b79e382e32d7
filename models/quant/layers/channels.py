"""Mean and deviation of a layer's output channels, and what brings them to those that are wanted."""

import torch
from torch import Tensor

from ..kernels import moments

LARGEST_GAIN = 2.0  # what an ADC makes of a channel that needs more is mostly noise


def std_mean(y: Tensor, channel_dim: int) -> tuple[Tensor, Tensor]:
    """Deviation and mean of each channel, in float64."""
    rows = y.movedim(channel_dim, -1)
    if y.device.type == "cpu" and y.dtype == torch.float32 and y.numel():
        return moments.std_mean(rows.reshape(-1, rows.shape[-1]).contiguous())
    return torch.std_mean(y.double(), [dim for dim in range(y.dim()) if dim != channel_dim % y.dim()], correction=0)


def towards(wanted: tuple[Tensor, Tensor], found: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """(gain, offset) of each channel that bring deviation and mean from what was found to what is wanted; the gain is at most 2."""
    (std, mean), (own_std, own_mean) = wanted, found
    gain = torch.where(own_std > 0, std / own_std, 1.0).clamp_max(LARGEST_GAIN)
    return gain, mean - gain * own_mean


def scaled(y: Tensor, gain: Tensor, offset: Tensor, channel_dim: int) -> Tensor:
    """`gain y + offset`, gain and offset `[out]`, in the type of y and, but for float64, computed in float32."""
    dtype = torch.promote_types(y.dtype, torch.float32)
    shape = -1, *[1] * (y.dim() - 1 - channel_dim % y.dim())
    gain, offset = gain.to(dtype).view(shape), offset.to(dtype).view(shape)
    y_in = y.to(dtype)
    return torch.addcmul(offset, gain, y_in, out=torch.empty_like(y_in)).to(y.dtype)  # in y's order of memory
