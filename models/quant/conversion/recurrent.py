"""Recurrent layers as products and gates: what `torch.lstm`, `gru`, `rnn_tanh`, `rnn_relu` and the functions of their cells compute, with
a call of `F.linear` for each product with a weight, so that each can be a layer on crossbars.

PyTorch's own hand all weights to one function, in which nobody sees products. `nn.LSTM`, `nn.GRU`, `nn.RNN` and cells call these functions,
and do all else themselves: checks, packed sequences, states of zeros.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

State = tuple[Tensor, ...]  # (h,), or (h, c) of an LSTM


# ---- one step: its input's product `[N, gates]`, the state, the state's weight and bias -> the next state -----------------


def _lstm(x: Tensor, state: State, w_hh: Tensor, b_hh: Tensor | None = None, w_hr: Tensor | None = None) -> State:
    """`c' = s(f) c + s(i) tanh(g)`, `h' = s(o) tanh(c')`, s the logistic function; `W_hr h'` with a projection (Sak et al., arXiv
    1402.1128)."""
    h, c = state
    i, f, g, o = (x + F.linear(h, w_hh, b_hh)).chunk(4, -1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    h = torch.sigmoid(o) * torch.tanh(c)
    return h if w_hr is None else F.linear(h, w_hr), c


def _gru(x: Tensor, state: State, w_hh: Tensor, b_hh: Tensor | None = None) -> State:
    """`h' = (1 - z) n + z h`, `n = tanh(x_n + r h_n)`, r and z logistic functions of sums (Cho et al., arXiv 1406.1078, with the reset
    gate behind the product)."""
    h, = state
    (r_x, z_x, n_x), (r_h, z_h, n_h) = x.chunk(3, -1), F.linear(h, w_hh, b_hh).chunk(3, -1)
    n = torch.tanh(n_x + torch.sigmoid(r_x + r_h) * n_h)
    return n + torch.sigmoid(z_x + z_h) * (h - n),


def _rnn(function: Callable, x: Tensor, state: State, w_hh: Tensor, b_hh: Tensor | None = None) -> State:
    return function(x + F.linear(state[0], w_hh, b_hh)),


# ---- functions of PyTorch ------------------------------------------------------------------------------------------------


def _one_step(step: Callable, input: Tensor, hx: Tensor | State, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None = None,  # noqa: A002
              b_hh: Tensor | None = None) -> Tensor | State:
    """As `torch.lstm_cell(input, hx, w_ih, w_hh, b_ih, b_hh)` and the like."""
    state = step(F.linear(input, w_ih, b_ih), _tuple(hx), w_hh, b_hh)
    return state[0] if isinstance(hx, Tensor) else state


def _sequences(step: Callable, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
    """As `torch.lstm` and the like, which take `(input, hx, params, ..., batch_first)`, or packed sequences, `(data, batch_sizes, hx,
    params, ...)`."""
    packed = "batch_sizes" in kwargs or len(args) > 1 and isinstance(args[1], Tensor) and not args[1].is_floating_point()
    return (_packed if packed else _padded)(step, *args, **kwargs)


def _padded(step, input, hx, params, has_biases, num_layers, dropout, train, bidirectional, batch_first):  # noqa: A002
    """Sequences of one length, `[N, T, in]`, or `[T, N, in]`."""
    x = input if batch_first else input.transpose(0, 1)  # images first, for read noise is that of an image
    if not x.shape[1]:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")  # as PyTorch says it
    y, *state = _layers(step, x, lambda x: x.unbind(1), lambda steps: torch.stack(steps, 1), hx, params, has_biases, num_layers,
                        dropout * train, bidirectional)
    return y if batch_first else y.transpose(0, 1).contiguous(), *state


def _packed(step, data, batch_sizes, hx, params, has_biases, num_layers, dropout, train, bidirectional):
    """Packed sequences, `[sum of lengths, in]`, of which step t has the first `batch_sizes[t]`."""
    sizes = batch_sizes.tolist()
    return _layers(step, data, lambda x: x.split(sizes), torch.cat, hx, params, has_biases, num_layers, dropout * train, bidirectional)


def _layers(step: Callable, x: Tensor, apart: Callable[[Tensor], Sequence[Tensor]], together: Callable[[list[Tensor]], Tensor],
            hx: Tensor | State, params: Sequence[Tensor], has_biases: bool, num_layers: int, dropout: float, bidirectional: bool
            ) -> tuple[Tensor, ...]:
    """(output of the last layer, h of all layers and directions, and c of an LSTM).

    Args: apart, cuts what all steps have into the steps; together, its inverse; params, for each layer and direction w_ih, w_hh, with
        biases b_ih and b_hh, and perhaps w_hr; dropout, the share of a layer's outputs that does not reach the next layer.
    """
    each, last = len(params) // (num_layers * (1 + bidirectional)), []
    groups = zip(zip(*_tuple(hx)), (params[first:first + each] for first in range(0, len(params), each)))
    for layer in range(num_layers):
        x, outputs = F.dropout(x, dropout) if layer and dropout else x, []
        for backward, (state, weights) in zip((False, True)[:1 + bidirectional], groups):
            w_ih, w_hh, *others = weights
            (b_ih, b_hh), projection = (others[:2], others[2:]) if has_biases else ((None, None), others)
            steps, state = _through(step, apart(F.linear(x, w_ih, b_ih)), state, backward, w_hh, b_hh, *projection)
            outputs.append(together(steps))
            last.append(state)
        x = torch.cat(outputs, -1) if bidirectional else outputs[0]
    return x, *(torch.stack(parts) for parts in zip(*last))


def _through(step, inputs, state, backward, *weights):
    """(h of each step, the last state). Sequences that have ended, or, backward, not begun, keep their state: those behind the first of
    a step."""
    outputs = [None] * len(inputs)
    for t in reversed(range(len(inputs))) if backward else range(len(inputs)):
        count, whole = len(inputs[t]), len(inputs[t]) == len(state[0])
        new = step(inputs[t], state if whole else tuple(part[:count] for part in state), *weights)
        state = new if whole else tuple(torch.cat([now, before[count:]]) for now, before in zip(new, state))
        outputs[t] = new[0]
    return outputs, state


def _tuple(hx):
    return (hx,) if isinstance(hx, Tensor) else tuple(hx)


_STEPS = {"lstm": _lstm, "gru": _gru, "rnn_tanh": partial(_rnn, torch.tanh), "rnn_relu": partial(_rnn, torch.relu)}
# What computes each function of PyTorch, with its arguments.
RECURRENT: dict[Callable, Callable] = {getattr(torch, name): partial(_sequences, step) for name, step in _STEPS.items()} | {
    getattr(torch, f"{name}_cell"): partial(_one_step, step) for name, step in _STEPS.items()}
