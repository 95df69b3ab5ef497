"""A captured graph with fewer calls, for a replay without a compiler: the same numbers, to the bit.

Each call costs a few microseconds, which is most of a small network's step. `simplified` goes through a copy of the
graph once and

* skips what gives its argument back (alias, x * 1, x / 1, x - 0, x ** 1, -(-x), a view of the same shape, t of t, ...),
* takes what was computed before from the same arguments,
* computes at once, and keeps, what depends on shapes only,
* drops what nobody reads, and
* calls what is left by torch's functions and methods, which are the same kernels behind a shorter call.

Nothing of this is done to a tensor that an operation of the graph writes to, or to what reads it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload
from torch.utils import _pytree as pytree

from pyro_vae.inference.graphs import UNSAID_VIEWS, drop_dead, written

_aten = torch.ops.aten
_MOST = 2**20  # numbers of a tensor that is kept instead of being computed

_SHAPED_LIKE = {
    _aten.ones_like.default, _aten.zeros_like.default, _aten.full_like.default, _aten.new_ones.default,
    _aten.new_zeros.default, _aten.new_full.default,
}  # fmt: skip
_MADE_OF_NUMBERS = {
    _aten.ones.default, _aten.zeros.default, _aten.full.default, _aten.scalar_tensor.default, _aten.eye.default,
    _aten.arange.default, _aten.arange.start, _aten.arange.start_step,
}  # fmt: skip
_GIVEN_BACK = {_aten.alias.default, _aten.detach.default}
_VIEWS = {_aten.view.default, _aten.expand.default, _aten._unsafe_view.default}
# Of these, with that number as the second argument, the first is the result.
_NEUTRAL = {
    _aten.mul.Tensor: 1, _aten.mul.Scalar: 1, _aten.div.Tensor: 1, _aten.sub.Tensor: 0, _aten.pow.Tensor_Scalar: 1,
}  # fmt: skip
_INVOLUTIONS = {_aten.neg.default, _aten.t.default}

_FUNCTIONS: dict[Any, Callable[..., Any]] = {
    getattr(getattr(_aten, name), overload): getattr(torch, name)
    for name, overload in {
        "neg": "default", "exp": "default", "log": "default", "abs": "default", "sqrt": "default", "rsqrt": "default",
        "sigmoid": "default", "tanh": "default", "reciprocal": "default", "log1p": "default", "add": "Tensor",
        "sub": "Tensor", "mul": "Tensor", "div": "Tensor", "pow": "Tensor_Scalar", "mm": "default", "bmm": "default",
        "addmm": "default", "unsqueeze": "default", "cat": "default", "clamp": "default", "where": "self",
        "neg_": "default", "exp_": "default",
    }.items()
} | {
    _aten.mul.Scalar: torch.mul, _aten.sum.default: torch.sum, _aten.sum.dim_IntList: torch.sum,
    _aten.silu.default: torch._C._nn.silu, _aten.softplus.default: torch._C._nn.softplus,
}  # fmt: skip
_METHODS = {
    _aten.view.default: "view", _aten.expand.default: "expand", _aten.t.default: "t", _aten.add_.Tensor: "add_",
    _aten.sub_.Tensor: "sub_", _aten.mul_.Tensor: "mul_",
}  # fmt: skip


def simplified(graph: fx.Graph, *, without: str | None = None, outputs: int | None = None) -> fx.GraphModule:
    """A copy of a graph of `Capture`, with fewer calls, whose results are the same to the bit, each with a storage of
    its own: the first few of them (`outputs`), and without the nodes that carry a mark, which they must not need.
    """
    module = fx.GraphModule({}, fx.Graph())
    copy = module.graph
    results: Any = copy.graph_copy(graph, {})
    copy.output(results if outputs is None else results[:outputs])
    if without is not None:
        for node in reversed(list(copy.nodes)):
            if node.op != "placeholder" and node.meta.get(without):
                copy.erase_node(node)
    _Pass(module).run()
    drop_dead(copy)
    _own(copy)
    for node in copy.nodes:
        _call_shortly(node)
    module.recompile()
    return module


class _Pass:
    """One way through a graph, in which each node finds its arguments simplified."""

    def __init__(self, module: fx.GraphModule) -> None:
        self.module, self.graph = module, module.graph
        self.roots = roots_of(self.graph)
        self.changed = _written_roots(self.graph, self.roots)
        self.seen: dict[Any, fx.Node] = {}
        self.known: dict[fx.Node, Tensor] = {}

    def run(self) -> None:
        for node in list(self.graph.nodes):
            if node.op != "call_function" or self._touched(node):
                continue
            same = self._given_back(node)
            if same is None and node.target is not operator.getitem and not _plain(node):
                continue
            if same is None:
                same = self.seen.setdefault(_key(node), node)
            if same is not node:
                node.replace_all_uses_with(same)
                self.graph.erase_node(node)
            else:
                self._compute(node)
        for node, value in self.known.items():
            if any(user not in self.known for user in node.users):
                name = f"_known_{node.name}"
                self.module.register_buffer(name, value, persistent=False)
                with self.graph.inserting_before(node):
                    constant = self.graph.get_attr(name)
                constant.meta = dict(node.meta)
                node.replace_all_uses_with(constant, delete_user_cb=lambda user: user not in self.known)

    def _touched(self, node: fx.Node) -> bool:
        """Whether an operation of the graph writes to a node's tensor, or to one that it reads."""
        return any(self.roots[each] in self.changed for each in (node, *node.all_input_nodes))

    def _given_back(self, node: fx.Node) -> fx.Node | None:
        """The node that has this one's numbers already."""
        first: Any = node.args[0] if node.args else None
        if node.kwargs:
            return None
        if node.target is operator.getitem:
            whole = first.target is _aten.split.Tensor and node.args[1] == 0 and _alike(first.args[0], node)
            return first.args[0] if whole else None
        if node.target is _aten.cat.default:
            single, *more = first
            return single if not more and _alike(single, node) else None
        if not isinstance(first, fx.Node):
            return None
        if node.target in _GIVEN_BACK or (node.target in _VIEWS and _alike(first, node)):
            return first
        if node.target in _NEUTRAL and not isinstance(node.args[1], fx.Node):
            return first if node.args[1] == _NEUTRAL[node.target] and _alike(first, node) else None
        if node.target in _INVOLUTIONS and first.target is node.target and not first.kwargs:
            origin: Any = first.args[0]
            return origin if not self._touched(first) and _alike(origin, node) else None
        return None

    def _compute(self, node: fx.Node) -> None:
        """Compute what depends on shapes only."""
        made = node.meta.get("val")
        if not isinstance(made, Tensor) or node.target is operator.getitem or made.numel() > _MOST:
            return
        inputs = node.all_input_nodes
        if node.target in _SHAPED_LIKE:
            stand_ins = {each: _empty(each) for each in inputs}
        elif node.target in _MADE_OF_NUMBERS or (inputs and all(each in self.known for each in inputs)):
            stand_ins = {each: self.known[each] for each in inputs}
        else:
            return
        if any(each is None for each in stand_ins.values()):
            return
        args, kwargs = pytree.tree_map(
            lambda a: stand_ins[a] if isinstance(a, fx.Node) else a, (tuple(node.args), dict(node.kwargs))
        )
        target: Any = node.target
        with torch.no_grad():
            self.known[node] = target(*args, **kwargs)


def roots_of(graph: fx.Graph) -> dict[fx.Node, fx.Node]:
    """For each node that whose memory it looks at: itself, or the one that it is a view of, or writes to."""
    roots: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        origin = _origin(node)
        roots[node] = node if origin is None else roots[origin]
    return roots


def _origin(node: fx.Node) -> fx.Node | None:
    first = node.args[0] if node.args else None
    if node.target is operator.getitem or node.target in UNSAID_VIEWS:
        return first if isinstance(first, fx.Node) else None
    if not isinstance(node.target, OpOverload):
        return None
    for number, argument in enumerate(node.target._schema.arguments):
        if argument.alias_info is not None:
            value = node.args[number] if number < len(node.args) else node.kwargs.get(argument.name)
            if isinstance(value, fx.Node):
                return value
    return None


def _written_roots(graph: fx.Graph, roots: dict[fx.Node, fx.Node]) -> set[fx.Node]:
    """The memory that is written to; of a call that does not say what it writes to, all that it gets."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op != "call_function" or node.target is operator.getitem:
            continue
        if isinstance(node.target, OpOverload):
            values = pytree.tree_leaves(list(written(node.target._schema, node.args, dict(node.kwargs))))
            found.update(roots[value] for value in values if isinstance(value, fx.Node))
        else:
            found.update(roots[value] for value in (node, *node.all_input_nodes))
    return found


def _plain(node: fx.Node) -> bool:
    """Whether a call is a function of its arguments alone."""
    target = node.target
    if not isinstance(target, OpOverload) or target._schema.is_mutable:
        return False
    noisy = torch.Tag.nondeterministic_seeded in target.tags
    return not noisy and not target.overloadpacket.__name__.startswith(("empty", "new_empty"))


def _key(node: fx.Node) -> Any:
    """What two calls of the same share; 1, 1.0 and True are different, and so are 0.0 and -0.0."""

    def part(value: Any) -> Any:
        if isinstance(value, fx.Node):
            return value
        if isinstance(value, list | tuple):
            return tuple(map(part, value))
        return type(value), repr(value)

    return node.target, part(node.args), tuple((name, part(value)) for name, value in sorted(node.kwargs.items()))


def _alike(node: Any, other: fx.Node) -> bool:
    """Whether two nodes' tensors have one shape, type and layout."""
    one, two = (each.meta.get("val") if isinstance(each, fx.Node) else None for each in (node, other))
    if not isinstance(one, Tensor) or not isinstance(two, Tensor):
        return False
    same = one.shape == two.shape and one.dtype == two.dtype and one.device == two.device
    return same and one.layout == two.layout == torch.strided and one.stride() == two.stride()


def _empty(node: fx.Node) -> Tensor | None:
    """A tensor of a node's shape, type and place."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or value.layout != torch.strided:
        return None
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)


def _own(graph: fx.Graph) -> None:
    """Copy results that have come to share their memory with one another, or with what is kept."""
    output = next(node for node in reversed(graph.nodes) if node.op == "output")
    roots, taken, nodes = roots_of(graph), set(), list(output.args[0])
    for number, node in enumerate(nodes):
        assert isinstance(node, fx.Node)
        root = roots[node]
        if root in taken or root.op != "call_function":
            with graph.inserting_before(output):
                nodes[number] = graph.call_function(_aten.clone.default, (node,))
            nodes[number].meta = dict(node.meta)
        taken.add(root)
    output.args = (nodes,)


def _call_shortly(node: fx.Node) -> None:
    """Call torch's function or method in place of the operation behind it."""
    if node.op != "call_function" or node.kwargs:
        return
    if node.target in _METHODS:
        node.op, node.target = "call_method", _METHODS[node.target]
    elif node.target in _FUNCTIONS:
        node.target = _FUNCTIONS[node.target]
