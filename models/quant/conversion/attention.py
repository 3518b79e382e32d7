"""`nn.MultiheadAttention` whose four weights are used by `F.linear`, so that each can be a layer on crossbars.

PyTorch's own hands all weights to one function, or to a kernel of its own for inference, where nobody sees their products.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def open_attention(model: nn.Module) -> None:
    """Let every `nn.MultiheadAttention` in `model` (that class itself, no subclass) compute query, key, value and output by
    `F.linear` on its own parameters, or on the parts of `in_proj_weight.chunk(3)`.

    Outputs are the same but for float32 rounding, parameters, hooks and `state_dict` the same. `nn.TransformerEncoder` and its
    layers no longer take their fast path: outputs at padded positions, for which that path puts zeros, are those of the
    path for training.
    """
    for module in model.modules():
        if type(module) is nn.MultiheadAttention:
            module.__class__ = OpenAttention
            module._qkv_same_embed_dim = False  # what nn.TransformerEncoderLayer asks before it takes its fast path
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False  # a form of its input for fast paths alone


class OpenAttention(nn.MultiheadAttention):
    """`softmax(Q K^T / sqrt(d) + mask) V` for each head, d channels a head, between four linear layers (Vaswani et al., arXiv
    1706.03762, section 3.2). Made by `open_attention`."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None = None,
                need_weights: bool = True, attn_mask: Tensor | None = None, average_attn_weights: bool = True,
                is_causal: bool = False) -> tuple[Tensor, Tensor | None]:
        """As `nn.MultiheadAttention`: (output, weights of the attention or None).

        Raises: ValueError for nested tensors or masks of another type or shape; RuntimeError, as there, for `is_causal` without a
            mask.
        """
        if query.is_nested or key.is_nested or value.is_nested:
            raise ValueError("attention on crossbars takes no nested tensors; pad the sequences and give a key_padding_mask")
        if is_causal and attn_mask is None:
            raise RuntimeError("is_causal only describes attn_mask; give that mask too")
        batched = query.dim() == 3
        if not batched:
            query, key, value = query[None], key[None], value[None]
            key_padding_mask = None if key_padding_mask is None else key_padding_mask[None]
        images_first = self.batch_first or not batched

        widths_differ = self.in_proj_weight is None  # keys or values have another width, and each its own weight
        matrices = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight) if widths_differ else self.in_proj_weight.chunk(3)
        biases = (None, None, None) if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        q, k, v = (self._to_heads(F.linear(x, weight, bias), images_first)
                   for x, weight, bias in zip((query, key, value), matrices, biases))
        keys = k.shape[2]
        k, v = self._with_own_keys(k, self.bias_k), self._with_own_keys(v, self.bias_v)
        if is_causal and key_padding_mask is None and not need_weights:
            mask = None  # the hint is enough
        else:
            mask, is_causal = self._mask(attn_mask, key_padding_mask, q, keys, k.shape[2]), False

        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = (q * math.sqrt(1 / self.head_dim)) @ k.transpose(2, 3)
            weights = F.dropout(F.softmax(scores if mask is None else scores + mask, dim=-1), dropout)
            y = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            y = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal)
        y = y.permute(*((0, 2, 1, 3) if images_first else (2, 0, 1, 3))).flatten(2)
        y = F.linear(y, self.out_proj.weight, self.out_proj.bias)
        if not batched:
            y, weights = y[0], None if weights is None else weights[0]
        return y, weights

    def _to_heads(self, x, images_first):
        """`[N, heads, T, d]` of `[N, T, embed_dim]`, or of `[T, N, embed_dim]`."""
        x = x.unflatten(2, (self.num_heads, self.head_dim))
        return x.permute(*((0, 2, 1, 3) if images_first else (1, 2, 0, 3)))

    def _with_own_keys(self, x, bias):
        """Keys or values with the learned one of `add_bias_kv` and the zero of `add_zero_attn` behind them."""
        if bias is not None:
            x = torch.cat([x, bias.view(1, self.num_heads, 1, -1).expand(len(x), -1, -1, -1).to(x.dtype)], 2)
        return F.pad(x, (0, 0, 0, 1)) if self.add_zero_attn else x

    def _mask(self, attn_mask, padding_mask, q, keys, all_keys):
        """What is added to the scores, `[N or 1, heads or 1, L or 1, all keys]`, or None; own keys are never masked."""
        images, heads, queries, _ = q.shape
        parts = []
        if attn_mask is not None:
            _check_mask("attn_mask", attn_mask, (queries, keys), (images * heads, queries, keys))
            parts.append(attn_mask.view(images, heads, queries, keys) if attn_mask.dim() == 3 else attn_mask[None, None])
        if padding_mask is not None:
            _check_mask("key_padding_mask", padding_mask, (images, keys))
            parts.append(padding_mask[:, None, None])
        if not parts:
            return None
        numbers = [torch.zeros_like(part, dtype=q.dtype).masked_fill_(part, -math.inf) if part.dtype == torch.bool else part.to(q.dtype)
                   for part in parts]
        return F.pad(sum(numbers[1:], numbers[0]), (0, all_keys - keys))


def _check_mask(name, mask, *shapes):
    if tuple(mask.shape) not in shapes or not (mask.dtype == torch.bool or mask.is_floating_point()):
        raise ValueError(f"{name} is {mask.dtype} of shape {list(mask.shape)}; bool or floating point of shape "
                         f"{' or '.join(str(list(shape)) for shape in shapes)} is expected")
