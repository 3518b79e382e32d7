"""GPTQ: weights rounded one after the other, each error made good by the weights of its channel that are still to come."""

import torch
from torch import Tensor

from .linear_quantizers import LinearWQ

BLOCK = 128  # columns whose errors are handed on together


@torch.no_grad()
def gptq(weight: Tensor, hessian: Tensor, quantizer: LinearWQ, groups: int = 1, damp: float = 0.01) -> Tensor:
    """The weight rounded to the grid of a quantizer so that the layer's output, not the weight, keeps near its own.

    Minimises `sum over channels of (q - w) H (q - w)^T`, greedily: column j is rounded to `q_j`, and the columns behind it move
    to where the sum is least for the columns that are fixed, `w_r += (q_j - w_j) U_jr / U_jj` with the upper triangle U of
    `H^-1 = U^T U` (Frantar et al., GPTQ, arXiv 2210.17323, section 3 and algorithm 1). For a diagonal H it is rounding to
    nearest.

    Args:
        weight: `[out, in]`, rows of a layer; with groups the outputs of the first group come first.
        hessian: `sum x x^T` over inputs x of the layer, up to a factor; float64 `[in, in]`, or `[groups, in, in]`.
        quantizer: its steps are set already (`fit`), and stay.
        groups: of a convolution.
        damp: share of the mean of H's diagonal that is added to it, so that H has an inverse.
    Returns: `[out, in]` in the type of the weight, values `s_c (W - m)` whose codes are W.
    Raises: ValueError for a Hessian that is not finite, or not one.
    """
    outputs, inputs = weight.shape
    upper = _inverse_root(hessian.double().view(groups, inputs, inputs), damp)
    # Rows of inputs, so that a column of the weight lies together: [groups, in, out / groups].
    w = weight.double().reshape(groups, -1, inputs).transpose(1, 2).clone(memory_format=torch.contiguous_format)
    step, m = quantizer.scale.double().view(groups, -1), quantizer.largest
    for start in range(0, inputs, BLOCK):
        block, triangle = w[:, start:start + BLOCK], upper[:, start:start + BLOCK, start:start + BLOCK]
        errors = torch.empty_like(block)
        for j in range(block.shape[1]):
            rounded = (block[:, j] / step).round_().clamp_(-m, m) * step
            errors[:, j] = (rounded - block[:, j]) / triangle[:, j, j, None]
            block[:, j + 1:] += triangle[:, j, j + 1:, None] * errors[:, j, None]
            block[:, j] = rounded
        w[:, start + BLOCK:] += upper[:, start:start + BLOCK, start + BLOCK:].transpose(1, 2) @ errors
    return w.transpose(1, 2).reshape(outputs, inputs).to(weight.dtype)


def _inverse_root(hessian, damp):
    """The upper triangle U with `H^-1 = U^T U` of each damped H, `[groups, in, in]`.

    `H = R R^T` with an upper triangle R gives `U = R^-1`; R is the Cholesky factor of H read from its end. No inverse of H is
    formed, which would cost digits.
    """
    diagonal = hessian.diagonal(dim1=1, dim2=2)
    mean = diagonal.mean(1, keepdim=True)
    # An input that was always zero tells nothing of its weights: they are rounded to nearest.
    added = torch.where(mean > 0, damp * mean, 1.0) + torch.where(diagonal == 0, mean, 0.0)
    factor, failed = torch.linalg.cholesky_ex((hessian + torch.diag_embed(added)).flip(1, 2))
    if not bool(hessian.isfinite().all()) or bool(failed.any()):
        raise ValueError("the Hessian holds NaN or infinite numbers, or is no sum of x x^T even when damped; look at the calibration "
                         "images, or take a larger damp")
    identity = torch.eye(hessian.shape[1], dtype=hessian.dtype, device=hessian.device)
    return torch.linalg.solve_triangular(factor.flip(1, 2), identity, upper=True)
