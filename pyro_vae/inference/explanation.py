"""What was captured of a fit, and how far its steps are from what their matrix products alone take.

``PYRO_VAE_EXPLAIN=1`` has `fit` print it to stderr at its end.
"""

from __future__ import annotations

import os

import torch
from torch import fx

from pyro_vae.inference.captured import Graph
from pyro_vae.inference.compiled import Compiled

VARIABLE = "PYRO_VAE_EXPLAIN"


def wanted() -> bool:
    """Whether the environment asks for it."""
    return os.environ.get(VARIABLE, "") not in ("", "0")


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
    choice = capture.choice
    if choice is None or not graph.replays:
        return found
    for product in choice.products:
        each = ", ".join(f"{1e6 * seconds:,.0f} us by {library}" for library, seconds in product.seconds.items())
        found.append(f"    {product.times} x {product.name}: {each}")
    seconds, others = choice.seconds(), set(choice.products[0].seconds) - {choice.library} if choice.products else ()
    rate = choice.operations / max(seconds, 1e-12) / 1e9
    compared = "".join(f", where {other} takes {1e6 * choice.seconds(other):,.0f} us" for other in others)
    found.append(
        f"    {sum(p.times for p in choice.products)} products by {choice.library}: {choice.operations / 1e6:,.1f} "
        f"MFLOP in {1e6 * seconds:,.0f} us by themselves, {rate:.0f} GFLOP/s{compared}"
    )
    found.append(
        f"    the fastest step: {graph.seconds * 1e6:,.0f} us, {seconds / graph.seconds:.0%} of it what the "
        "products alone take"
    )
    return found


def _arguments(graph: fx.Graph) -> list[fx.Node]:
    return [n for n in graph.nodes if n.op == "placeholder" and not n.name.startswith(("constant", "noise", "held"))]
