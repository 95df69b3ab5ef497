"""What was captured of a fit, and how far its steps are from what their matrix products alone take.

``PYRO_VAE_EXPLAIN=1`` has `fit` print it to stderr at its end.
"""

from __future__ import annotations

import os
import statistics
import time
from typing import NamedTuple

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from pyro_vae.inference.captured import Graph
from pyro_vae.inference.compiled import Compiled
from pyro_vae.inference.graphs import PRODUCTS
from pyro_vae.inference.hardware import fast_matmul
from pyro_vae.randomness import forked

VARIABLE = "PYRO_VAE_EXPLAIN"
_TIMES = 20  # calls of a product, of which the median counts


def wanted() -> bool:
    """Whether the environment asks for it."""
    return os.environ.get(VARIABLE, "") not in ("", "0")


class Floor(NamedTuple):
    """The number of matrix products and convolutions of a graph, their multiplications and additions, and their time,
    each called by itself."""

    products: int
    operations: float
    seconds: float


def floor(graph: fx.Graph, fast: bool) -> Floor:
    """Time the products of a graph on tensors of the same shapes and layouts, by the library that it calls."""
    count, operations, seconds = 0, 0.0, 0.0
    with torch.no_grad(), forked(), fast_matmul(fast):
        for node in graph.nodes:
            if getattr(node.target, "overloadpacket", None) not in PRODUCTS:
                continue
            args = pytree.tree_map(lambda a: _tensor(a) if isinstance(a, fx.Node) else a, tuple(node.args))
            with FlopCounterMode(display=False) as counter:
                node.target(*args)
            times = []
            for _ in range(_TIMES):
                start = time.perf_counter()
                node.target(*args)
                times.append(time.perf_counter() - start)
            count, seconds = count + 1, seconds + statistics.median(times)
            operations += counter.get_total_flops()
    return Floor(count, operations, seconds)


def explained(compiled: Compiled | None, steps: int) -> str:
    """Lines on the graphs of a fit of so many steps, and the loss that made them; None where it ran as it is."""
    if compiled is None:
        return f"explained: {steps:,} steps by the programs themselves; compile=True captures them."
    if not compiled._graphs:
        return f"explained: {steps:,} steps by the programs themselves, since {compiled.reason or 'none was captured'}."
    lines = [f"explained: {steps:,} steps on {torch.get_num_threads()} threads"]
    for graph in compiled._graphs.values():
        lines += _lines(graph)
    return "\n".join(lines)


def _lines(graph: Graph) -> list[str]:
    capture = graph.capture
    how = "compiled by Inductor" if capture.compiled else "replayed without a compiler"
    how += ", whose graph was slower" if graph.compiled_at and not capture.compiled else ""
    shapes = ", ".join(str(tuple(node.meta["val"].shape)) for node in _arguments(capture.module.graph))
    calls = sum(node.op == "call_function" for node in capture.module.graph.nodes)
    found = [f"  a batch of {shapes}: {calls} operations recorded, {graph.replays:,} replays, {how}"]
    if not capture.on_cpu or not graph.replays:
        return found
    lowest = floor(capture.module.graph, capture.fast)
    library = "oneDNN" if capture.fast else "torch's default"
    rate = lowest.operations / max(lowest.seconds, 1e-12) / 1e9
    found.append(
        f"    {lowest.products} products by {library}: {lowest.operations / 1e6:,.1f} MFLOP in "
        f"{lowest.seconds * 1e6:,.0f} us by themselves, {rate:.0f} GFLOP/s"
    )
    found.append(
        f"    the fastest step: {graph.seconds * 1e6:,.0f} us, {lowest.seconds / graph.seconds:.0%} of it what the "
        "products alone take"
    )
    return found


def _arguments(graph: fx.Graph) -> list[fx.Node]:
    return [n for n in graph.nodes if n.op == "placeholder" and not n.name.startswith(("constant", "noise"))]


def _tensor(node: fx.Node) -> Tensor:
    value = node.meta["val"]
    made = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
    return made.uniform_(-1, 1) if made.is_floating_point() else made.zero_()
