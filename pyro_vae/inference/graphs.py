"""What is done to a captured ``torch.fx.Graph``, in place, before it is replayed; and its launches played back."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from pyro_vae.randomness import forked

_aten = torch.ops.aten
_FILLS = ("normal_", "uniform_", "exponential_", "log_normal_", "cauchy_", "geometric_", "random_", "bernoulli_")
_LIKES = ("rand_like", "randn_like", "randint_like")
_FACTORIES = ("rand", "randn", "randint", "randperm")
_EMPTY = (_aten.empty, _aten.empty_like, _aten.new_empty, _aten.zeros)
PRODUCTS = (_aten.mm, _aten.addmm, _aten.bmm, _aten.baddbmm, _aten.convolution, _aten.convolution_backward)
# Of linear algebra, what is launched and not waited for, among what is.
_WAITING = ("linalg_", "_linalg_", "cholesky", "ormqr", "geqrf", "lu_", "symeig", "triangular_solve")
_LAUNCHED = ("linalg_vector_norm", "linalg_matrix_norm", "linalg_solve_triangular")
_WARM_UP = 3  # runs before recording, in which kernels are loaded and chosen
# Whose results share the memory of what they are made of, which their schemas do not say.
UNSAID_VIEWS = {_aten._unsafe_view.default, _aten.unsafe_split.Tensor, _aten.unsafe_split_with_sizes.default}
_SMALL = 4096  # numbers of a mask that are compared before each replay


class Uncapturable(Exception):
    """Why a program cannot be captured."""


class Draw(NamedTuple):
    """A random number generator's call whose arguments are known beforehand."""

    target: Callable[..., Tensor]
    like: tuple[Any, Any, torch.dtype, torch.device] | None  # the tensor that it fills or imitates
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def device(self) -> torch.device:
        """Where it draws."""
        return torch.device(self.kwargs.get("device") or "cpu") if self.like is None else self.like[3]

    def __call__(self) -> Tensor:
        if self.like is None:
            return self.target(*self.args, **self.kwargs)
        shape, stride, dtype, device = self.like
        return self.target(torch.empty_strided(shape, stride, dtype=dtype, device=device), *self.args, **self.kwargs)


def drop_forked(graph: fx.Graph) -> None:
    """Leave out what ran in a fork of the random state only to be looked at, such as the depth of plates."""
    for node in reversed(list(graph.nodes)):
        if node.op != "call_function" or not node.meta.get("forked") or node.users:
            continue
        if is_random(node) or not getattr(getattr(node.target, "_schema", None), "is_mutable", False):
            graph.erase_node(node)
    if any(is_random(node) and node.meta.get("forked") for node in graph.nodes):
        raise Uncapturable("noise is drawn in a fork of the random state, such as by a seed of its own")


def folded(graph: fx.Graph) -> list[tuple[Tensor, Tensor]]:
    """Compute beforehand where a mask that is no argument is not zero, as in a coupling; the masks, and as they are."""
    owner: Any = graph.owning_module
    changed = {id(getattr(owner, str(n.target))) for n in changed_by(graph) if n.op == "get_attr"}
    known: dict[fx.Node, Tensor] = {}
    masks: dict[int, tuple[Tensor, Tensor]] = {}
    roots: dict[fx.Node, list[Tensor]] = {}
    for node in list(graph.nodes):
        if node.op == "get_attr":
            tensor = getattr(owner, node.target)
            if isinstance(tensor, Tensor) and tensor.numel() <= _SMALL and id(tensor) not in changed:
                known[node], roots[node] = tensor, [tensor]
            continue
        if node.op != "call_function" or not node.all_input_nodes or not all(n in known for n in node.all_input_nodes):
            continue
        if node.target not in (_aten.nonzero.default, _aten.bitwise_not.default, _aten.logical_not.default):
            continue
        with torch.no_grad():
            known[node] = node.target(*(known.get(a, a) for a in node.args))
        roots[node] = [tensor for n in node.all_input_nodes for tensor in roots[n]]
        if node.target is _aten.nonzero.default:
            masks.update({id(tensor): (tensor, tensor.detach().clone()) for tensor in roots[node]})
            name = f"_folded_{len(known)}"
            setattr(owner, name, known[node])
            with graph.inserting_before(node):
                constant = graph.create_node("get_attr", name)  # `get_attr` itself warns of a tensor that is no buffer
            constant.meta = dict(node.meta)
            node.replace_all_uses_with(constant)
            graph.erase_node(node)
    return list(masks.values())


def check_shapes(graph: fx.Graph) -> None:
    """Refuse what has shapes that depend on values: all that follows would have those of the run written down."""
    for node in graph.nodes:
        tags = getattr(node.target, "tags", ()) if node.op == "call_function" else ()
        if torch.Tag.dynamic_output_shape not in tags and torch.Tag.data_dependent_output not in tags:
            continue
        if node.target in (_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default):
            chosen = [a for a in node.args[1] if isinstance(a, fx.Node) and isinstance(a.meta.get("val"), Tensor)]
            if not any(a.meta["val"].dtype in (torch.bool, torch.uint8) for a in chosen):
                continue
        raise Uncapturable(f"{node.target} gives a shape that depends on the values of tensors")


def disowned(graph: fx.Graph, results: list[Tensor], inputs: Sequence[Tensor]) -> None:
    """Copy results that are inputs, or views of them: who changes the one must not change the other."""
    storages = {tensor.untyped_storage().data_ptr() for tensor in inputs}
    output = next(node for node in reversed(graph.nodes) if node.op == "output")
    nodes = list(output.args[0])
    for number, result in enumerate(results):
        if result.untyped_storage().data_ptr() in storages:
            results[number] = result.clone()
            with graph.inserting_before(output):
                clone = graph.call_function(_aten.clone.default, (nodes[number],))
            clone.meta = dict(nodes[number].meta)
            nodes[number] = clone
    output.args = (nodes,)


def lifted(graph: fx.Graph) -> tuple[list[Tensor], list[fx.Node]]:
    """Turn the tensors that the graph holds into inputs, one for each."""
    owner = graph.owning_module
    found: dict[int, tuple[Tensor, fx.Node]] = {}
    last = [node for node in graph.nodes if node.op == "placeholder"][-1]
    for node in [node for node in graph.nodes if node.op == "get_attr"]:
        tensor = getattr(owner, node.target)
        if not isinstance(tensor, Tensor):
            raise Uncapturable(f"the graph holds a {type(tensor).__name__}")
        if id(tensor) not in found:
            with graph.inserting_after(last):
                last = graph.placeholder(f"constant_{len(found)}")
            last.meta = dict(node.meta)
            found[id(tensor)] = (tensor, last)
        node.replace_all_uses_with(found[id(tensor)][1])
        graph.erase_node(node)
    return [tensor for tensor, _ in found.values()], [node for _, node in found.values()]


def drop_unread(
    graph: fx.Graph, constants: Sequence[Tensor], nodes: Sequence[fx.Node]
) -> tuple[list[Tensor], list[fx.Node]]:
    """Drop inputs that nothing reads any more: one on another device would stand in a GPU's way."""
    read = [bool(node.users) for node in nodes]
    for node, used in zip(nodes, read, strict=True):
        if not used:
            graph.erase_node(node)
    return list(itertools.compress(constants, read)), list(itertools.compress(nodes, read))


def hoisted(graph: fx.Graph) -> tuple[list[Draw], bool]:
    """Turn noise into inputs; whether some remains, whose parameters the graph computes.

    If any remains, all remains: the order of the draws is part of what a seed means.
    """
    random = [node for node in graph.nodes if is_random(node)]
    draws = [_draw(node) for node in random]
    if any(draw is None for draw in draws):
        return [], True
    last = [node for node in graph.nodes if node.op == "placeholder"][-1]
    for number, node in enumerate(random):
        with graph.inserting_after(last):
            last = graph.placeholder(f"noise_{number}")
        last.meta = dict(node.meta)
        node.replace_all_uses_with(last)
        graph.erase_node(node)
    return [draw for draw in draws if draw is not None], False


def is_random(node: fx.Node) -> bool:
    """Whether a node draws; attention without dropout is only said to."""
    if not _said_to_draw(node):
        return False
    schema: Any = node.target._schema  # type: ignore[union-attr]
    asked = any(argument.name == "dropout_p" for argument in schema.arguments)
    return not asked or next(_given(schema, node.args, node.kwargs, lambda a: a.name == "dropout_p"), 0.0) != 0


def _said_to_draw(node: fx.Node) -> bool:
    return node.op == "call_function" and torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def _draw(node: fx.Node) -> Draw | None:
    """The call that a node makes, if nothing in it depends on the graph."""
    target: Any = node.target
    name = target.overloadpacket.__name__
    rest = list(node.args)
    like = None
    if name in _FILLS or name in _LIKES:
        first = rest.pop(0)
        assert isinstance(first, fx.Node)
        value = first.meta.get("val")
        if value is None or (
            name in _FILLS and (len(first.users) > 1 or getattr(first.target, "overloadpacket", None) not in _EMPTY)
        ):
            return None
        like = (tuple(value.shape), tuple(value.stride()), value.dtype, value.device)
    elif name not in _FACTORIES and target is not _aten.normal.float_float:
        return None
    if any(isinstance(a, fx.Node) for a in (*rest, *node.kwargs.values())):
        return None
    return Draw(target, like, tuple(rest), dict(node.kwargs))


def written(schema: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[Any]:
    """The arguments that an operation writes to: those declared, and running averages of batch norm in training."""
    training = next(_given(schema, args, kwargs, lambda a: a.name in ("training", "train")), True)
    return _given(schema, args, kwargs, _is_written if training else _is_declared)


def _given(schema: Any, args: Sequence[Any], kwargs: Mapping[str, Any], wanted: Callable[[Any], bool]) -> Iterator[Any]:
    """Of an operation's arguments those that are wanted and not None."""
    for number, argument in enumerate(schema.arguments):
        value = args[number] if number < len(args) else kwargs.get(argument.name)
        if value is not None and wanted(argument):
            yield value


def _is_aliased(argument: Any) -> bool:
    return argument.alias_info is not None


def _is_declared(argument: Any) -> bool:
    return _is_aliased(argument) and argument.alias_info.is_write


def _is_written(argument: Any) -> bool:
    return _is_declared(argument) or argument.name in ("running_mean", "running_var")


def changed_by(graph: fx.Graph) -> set[fx.Node]:
    """The nodes whose tensors an operation writes to, itself or through a view of them."""
    targets: set[fx.Node] = set()
    for node in reversed(graph.nodes):  # what is written to a view is so after the view is made
        if node.op != "call_function":
            continue
        schema = getattr(node.target, "_schema", None)
        values: list[Any] = [] if schema is None else list(written(schema, node.args, node.kwargs))
        if node in targets:  # a view, or one of several that an operation gives, of what it was made of
            values += (
                node.args[:1]
                if schema is None or node.target in UNSAID_VIEWS
                else _given(schema, node.args, node.kwargs, _is_aliased)
            )
        targets.update(v for v in pytree.tree_leaves(values) if isinstance(v, fx.Node))
    return targets


def drop_dead(graph: fx.Graph) -> None:
    """Drop what nobody reads and that writes nothing: batch norm does, attention does not; torch does not know it."""

    def counts(node: fx.Node) -> bool:
        schema = getattr(node.target, "_schema", None)
        writes = schema is not None and any(True for _ in written(schema, node.args, node.kwargs))
        return writes or (node.is_impure() and (is_random(node) or not _said_to_draw(node)))

    graph.eliminate_dead_code(counts)


def mutated(graph: fx.Graph, nodes: list[fx.Node], constants: Sequence[Tensor]) -> list[Tensor]:
    """The constants that the graph writes to, such as running averages."""
    changed = changed_by(graph)
    return [constant for node, constant in zip(nodes, constants, strict=True) if node in changed]


def waits(graph: fx.Graph) -> list[str]:
    """The operations of linear algebra whose libraries wait for the GPU, by name: CUDA records none of them."""
    packets = (getattr(node.target, "overloadpacket", None) for node in graph.nodes)
    names = {packet.__name__ for packet in packets if packet is not None}
    return sorted(n for n in names if n.startswith(_WAITING) and n not in _LAUNCHED)


class CudaGraph:
    """A function of tensors on one GPU, recorded and played back: a whole step for the price of one launch.

    What varies between steps (the batch or its index) is copied to fixed places first; what is `fixed` (parameters,
    moments, buffers) is read and written where it is, and what is `mutated` is left as it was by the recording. If one
    of them has moved, the launches are recorded anew. Noise that the function draws is, at each call, what it would
    draw then. A tensor on another device, or what CUDA cannot record, is a RuntimeError.

    Reference: docs.pytorch.org/docs/stable/notes/cuda.html, CUDA Graphs.
    """

    def __init__(
        self, run: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor], fixed: Sequence[bool],
        mutated: Sequence[Tensor],
    ) -> None:  # fmt: skip
        if not _on_one_gpu(inputs):
            raise RuntimeError(f"tensors lie on {sorted({str(t.device) for t in inputs})}, wanted one GPU")
        self.run, self.fixed, self.mutated = run, tuple(fixed), tuple(mutated)
        self.recordings = 0
        self._record(inputs)

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        """The results for these inputs, as tensors of their own."""
        if self._addresses(inputs) != self._recorded_at:
            self._record(inputs)
        for place, given, fixed in zip(self._places, inputs, self.fixed, strict=True):
            if not fixed:
                place.copy_(given, non_blocking=True)
        self._graph.replay()
        return [output.clone() for output in self._outputs]

    def _addresses(self, inputs: Sequence[Tensor]) -> list[int]:
        return [t.data_ptr() for t, fixed in zip(inputs, self.fixed, strict=True) if fixed]

    def _record(self, inputs: Sequence[Tensor]) -> None:
        saved = [(t, t.detach().clone()) for t in self.mutated]
        device = inputs[0].device
        self._places = [t if fixed else t.clone() for t, fixed in zip(inputs, self.fixed, strict=True)]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with forked([device.index or 0]):
            with torch.cuda.stream(side):
                for _ in range(_WARM_UP):
                    self.run(*self._places)
            torch.cuda.current_stream().wait_stream(side)
            with _expendable(device):
                self._launches()
            self._graph, self._outputs = self._launches()
        for tensor, before in saved:
            tensor.copy_(before)
        self._recorded_at = self._addresses(inputs)
        self.recordings += 1

    def _launches(self) -> tuple[Any, list[Tensor]]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            return graph, list(self.run(*self._places))


@contextlib.contextmanager
def _expendable(device: torch.device) -> Iterator[None]:
    """Try a recording with a copy of the random state: CUDA gives up one that it cannot finish, and then torch refuses
    to draw from the state that was used ever after, and stays on the stream of the recording."""
    generator = torch.cuda.default_generators[device.index or 0]
    own, stream = generator.graphsafe_get_state(), torch.cuda.current_stream()
    generator.graphsafe_set_state(generator.clone_state())
    try:
        yield
    except BaseException:
        torch.cuda.set_stream(stream)
        with contextlib.suppress(RuntimeError):  # takes up an error that a library has left behind for the next launch
            torch.zeros(1, device=device)
        raise
    finally:
        generator.graphsafe_set_state(own)


def _on_one_gpu(tensors: Sequence[Tensor]) -> bool:
    return {t.device.type for t in tensors} == {"cuda"} and len({t.device for t in tensors}) == 1
