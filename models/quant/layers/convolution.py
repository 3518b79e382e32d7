"""The convolution that any product of a layer is, and its gradients, of plain numbers; shapes are those of PyTorch.

A 1x1 convolution of an image that lies channels last is a product of matrices, and runs as one: linear layers are such.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from ..arrays.spec import Geometry


def convolution(x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """`[N, out, H', W']` of x, `[N, in, H, W]`, and the weight, `[out, in / groups, kh, kw]`; channels last where x is."""
    if _is_matrix(x, weight, geometry):
        return _unflat(_flat(x) @ weight.flatten(1).t(), x)
    x, padding = _padded(x, geometry)
    return F.conv2d(x, weight, None, geometry.stride, padding, geometry.dilation, geometry.groups)


def gradients(grad: Tensor, x: Tensor, weight: Tensor, geometry: Geometry,
              wanted: tuple[bool, bool]) -> tuple[Tensor | None, Tensor | None]:
    """Those of x and of the weight, as far as they are wanted, for the gradient of `convolution(x, weight, geometry)`."""
    if _is_matrix(x, weight, geometry):
        rows = _flat(grad)
        return (_unflat(rows @ weight.flatten(1), x) if wanted[0] else None,
                (rows.t() @ _flat(x)).view(weight.shape) if wanted[1] else None)
    size, (x, padding) = x.shape[2:], _padded(x, geometry)
    of_x, of_weight, _ = torch.ops.aten.convolution_backward(grad, x, weight, None, geometry.stride, padding, geometry.dilation, False,
                                                             (0, 0), geometry.groups, (*wanted, False))
    if of_x is not None and x.shape[2:] != size:
        top, _, left, _ = geometry.padding
        of_x = of_x[:, :, top:top + size[0], left:left + size[1]]
    return of_x, of_weight


def _padded(x, geometry):
    """(x, padding that PyTorch's convolution puts around it), whose sides are alike."""
    top, bottom, left, right = geometry.padding
    if (top, left) == (bottom, right):
        return x, (top, left)
    return F.pad(x, (left, right, top, bottom)), (0, 0)


def _is_matrix(x, weight, geometry):
    return (weight.shape[2:] == (1, 1) and geometry.stride == (1, 1) and not any(geometry.padding) and geometry.groups == 1
            and x.is_contiguous(memory_format=torch.channels_last))


def _flat(x):
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def _unflat(rows, x):
    return rows.view(len(x), *x.shape[2:], rows.shape[1]).permute(0, 3, 1, 2)
