"""What is done to a captured graph for a compiler alone: the same numbers to rounding, in fewer passes."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

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


_NEAR = 0.5  # where tanh and expm1 are polynomials


def _of_float32(x: Tensor) -> bool:
    """Whether a tensor is of float32 and on a CPU; what the formulas below say of others is `NotImplemented`."""
    return x.dtype == torch.float32 and x.device.type == "cpu"


@functools.cache
def _series(name: str) -> tuple[float, ...]:
    """Coefficients by interpolation at Chebyshev's points, as many as float32 can tell: of (tanh(x) / x - 1) / x^2 in
    x^2, and of (e^x - 1 - x) / x^2 in x."""

    def smooth_tanh(square: Any) -> Any:
        x = np.sqrt(square)
        return (np.tanh(x) / x - 1) / square

    def smooth_expm1(x: Any) -> Any:
        return (np.expm1(x) - x) / x**2

    function, terms, domain = {
        "tanh": (smooth_tanh, 4, [1e-6, _NEAR**2]), "expm1": (smooth_expm1, 6, [-_NEAR, _NEAR]),
    }[name]  # fmt: skip
    found = np.polynomial.Chebyshev.interpolate(function, terms - 1, domain=domain)
    return tuple(found.convert(kind=np.polynomial.Polynomial).coef.tolist())


def _polynomial(name: str, x: Tensor) -> Tensor:
    coefficients = _series(name)
    total = torch.full_like(x, coefficients[-1])
    for c in coefficients[-2::-1]:
        total = total * x + c
    return total


def tanh_by_exp(x: Tensor) -> Tensor:
    """tanh(x) in float32, to 2e-7 of it: 1 - 2 / (e^2|x| + 1) with the sign of x, and a polynomial near 0."""
    if not _of_float32(x):
        return NotImplemented
    square = x * x
    far = torch.copysign(1 - 2 / ((2 * x.abs()).exp() + 1), x)
    return torch.where(x.abs() < _NEAR, x * (1 + square * _polynomial("tanh", square)), far)


def expm1_by_exp(x: Tensor) -> Tensor:
    """e^x - 1 in float32, to 2e-7 of it: so, and by a polynomial near 0."""
    if not _of_float32(x):
        return NotImplemented
    return torch.where(x.abs() < _NEAR, x * (1 + x * _polynomial("expm1", x)), x.exp() - 1)


def log1p_by_log(x: Tensor) -> Tensor:
    """log(1 + x) in float32, to 2e-7 of it: log u of the rounded u = 1 + x, and (x - (u - 1)) / u for the rest."""
    if not _of_float32(x):
        return NotImplemented
    u = 1 + x
    return u.log() + torch.where((u > 0) & (u < torch.inf), (x - (u - 1)) / u, 0.0)


# For a CPU's compiler, whose own take three to ten times as long; softplus is one of those that are made of them.
QUICK = {
    _aten.tanh.default: tanh_by_exp, _aten.expm1.default: expm1_by_exp, _aten.log1p.default: log1p_by_log,
}  # fmt: skip


def formulas() -> dict[Any, Any]:
    """How a compiler takes operations apart on a CPU: as Inductor does, but for those of `QUICK`."""
    from torch._inductor.decomposition import select_decomp_table

    return {**select_decomp_table(), **QUICK}


@functools.cache
def edition() -> str:
    """Of these formulas, for the name of what was compiled with them."""
    return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16]
