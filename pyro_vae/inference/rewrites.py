"""What is done to a captured graph for a compiler alone: the same numbers to rounding, in fewer passes."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

_aten = torch.ops.aten


def split_biases(graph: fx.Graph) -> None:
    """A product plus a bias as two operations, the second of which fuses with what follows it.

    On a CPU ``addmm`` spreads the bias over the result first, and reads it back to add the product. Written
    as an addition Inductor would make it an ``addmm`` again; x - (-b) is x + b to the bit.
    """
    for node in graph.find_nodes(op="call_function", target=_aten.addmm.default):
        if node.kwargs or node.args[0].meta["val"].dim() != 1:
            continue
        bias, left, right = node.args
        with graph.inserting_before(node):
            product = graph.call_function(_aten.mm.default, (left, right))
            minus = graph.call_function(_aten.neg.default, (bias,))
            total = graph.call_function(_aten.sub.Tensor, (product, minus))
        product.meta, minus.meta, total.meta = dict(node.meta), dict(bias.meta), dict(node.meta)
        node.replace_all_uses_with(total)
        graph.erase_node(node)


_NEAR, _TERMS = 0.5, 4  # where tanh is a polynomial, and how many terms of it float32 can tell


@functools.cache
def _series() -> tuple[float, ...]:
    """Coefficients of (tanh(x) / x - 1) / x^2 in x^2, by interpolation at Chebyshev's points."""

    def smooth(square: Any) -> Any:
        x = np.sqrt(square)
        return (np.tanh(x) / x - 1) / square

    found = np.polynomial.Chebyshev.interpolate(smooth, _TERMS - 1, domain=[1e-6, _NEAR**2])
    return tuple(found.convert(kind=np.polynomial.Polynomial).coef.tolist())


def tanh_by_exp(x: Tensor) -> Tensor:
    """tanh(x) in float32, to 2e-7 of it: 1 - 2 / (e^2|x| + 1) with the sign of x, and a polynomial near 0.

    On a CPU a compiler's own costs three times as much.
    """
    square, terms = x * x, _series()
    total = torch.full_like(x, terms[-1])
    for c in terms[-2::-1]:
        total = total * square + c
    far = torch.copysign(1 - 2 / ((2 * x.abs()).exp() + 1), x)
    return torch.where(x.abs() < _NEAR, x * (1 + square * total), far)


def quick_tanh(graph: fx.Graph) -> None:
    """`tanh_by_exp` in place of each tanh of float32."""
    for node in graph.find_nodes(op="call_function", target=_aten.tanh.default):
        value = node.meta["val"]
        if value.dtype != torch.float32:
            continue
        body = make_fx(tanh_by_exp)(torch.empty(value.shape)).graph
        (given,) = body.find_nodes(op="placeholder")
        with graph.inserting_before(node):
            node.replace_all_uses_with(graph.graph_copy(body, {given: node.args[0]}))
        graph.erase_node(node)
