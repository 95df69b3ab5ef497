"""A captured graph in two: what depends on inputs that stand still is computed once, the rest at each replay."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence

from torch import Tensor, fx
from torch._ops import OpOverload

from pyro_vae.inference.graphs import PRODUCTS, changed_by, drop_dead, is_random
from pyro_vae.inference.simplification import roots_of


def parted(graph: fx.Graph, inputs: Sequence[fx.Node]) -> fx.Graph | None:
    """Take out of a graph what it makes of some of its inputs alone, up to the last products among it.

    The graph takes the results as further inputs from then on. What is no product, nor lies between two, stays where it
    is: a compiler has it for nothing beside what reads it.

    Returns:
        A graph of those inputs that gives these results; None, with nothing done, where there are none, and where a
        result of the graph itself would be among them.
    """
    output = next(node for node in reversed(graph.nodes) if node.op == "output")
    still = _still(graph, inputs)
    found = _handed_on(graph, still)
    roots = roots_of(graph)
    if not found or any(roots[node] in still and roots[node].op != "placeholder" for node in output.args[0]):
        return None
    before = fx.Graph()
    copies = {node: before.placeholder(node.name) for node in inputs}
    for node, copy in copies.items():
        copy.meta = dict(node.meta)
    for node in graph.nodes:
        if node in still and node not in copies:
            copies[node] = before.node_copy(node, copies.__getitem__)
    before.output([copies[node] for node in found])
    drop_dead(before)
    last = [node for node in graph.nodes if node.op == "placeholder"][-1]
    for number, node in enumerate(found):
        with graph.inserting_after(last):
            last = graph.placeholder(f"held_{number}")
        last.meta = dict(node.meta)
        node.replace_all_uses_with(last)
    drop_dead(graph)
    return before


class Held:
    """The results of a function of inputs that stand still, until they are told to be others (`renew`).

    They are computed anew, too, where something has been written to them.
    """

    def __init__(self, function: Callable[..., Sequence[Tensor]]) -> None:
        self.function = function
        self._results: Sequence[Tensor] | None = None
        self._versions: list[int] = []

    def __call__(self, *inputs: Tensor) -> Sequence[Tensor]:
        if self._results is None or self._versions != _versions(self._results):
            self._results = self.function(*inputs)
            self._versions = _versions(self._results)
        return self._results

    def renew(self) -> None:
        """Forget them."""
        self._results = None


def _versions(tensors: Sequence[Tensor]) -> list[int]:
    return [0 if tensor.is_inference() else tensor._version for tensor in tensors]


def _still(graph: fx.Graph, inputs: Sequence[fx.Node]) -> set[fx.Node]:
    """These inputs and what is made of them alone, without noise, and is written to by nothing."""
    still, changed = set(inputs), changed_by(graph)
    for node in graph.nodes:
        known = isinstance(node.target, OpOverload) and node.target.namespace in ("aten", "prims")
        if not known and node.target is not operator.getitem:
            continue
        if is_random(node) or node in changed or not still.issuperset(node.all_input_nodes):
            continue
        if not known or not node.target._schema.is_mutable:
            still.add(node)
    return still


def _handed_on(graph: fx.Graph, still: set[fx.Node]) -> list[fx.Node]:
    """Of nodes that stand still the products, and what lies between two of them, that the rest of a graph reads."""
    behind: set[fx.Node] = set()  # products and what is made of them
    for node in graph.nodes:
        if node in still and (_is_product(node) or not behind.isdisjoint(node.all_input_nodes)):
            behind.add(node)
    between: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if node in behind and (_is_product(node) or not between.isdisjoint(node.users)):
            # Of an operation with several results it is these that can be handed on.
            between.update((node,) if isinstance(node.meta.get("val"), Tensor) else (node, *node.users))
    tensors = (node for node in graph.nodes if node in between and isinstance(node.meta.get("val"), Tensor))
    return [node for node in tensors if not between.issuperset(node.users)]


def _is_product(node: fx.Node) -> bool:
    return getattr(node.target, "overloadpacket", None) in PRODUCTS
