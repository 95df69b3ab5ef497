"""One step of inference as one graph of tensor operations.

A capture runs the loss once, for real, and writes its operations down as they pass, below Pyro's handlers and below
autograd (``torch.fx.experimental.proxy_tensor.make_fx``). Tensors that they read (parameters, buffers, an annealing
weight) become inputs by reference; noise whose shape is known is drawn eagerly before the graph runs, in the order of
the programs. Everything in Python stays fixed: branches taken, numbers, shapes.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing, get_proxy_mode, make_fx
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from pyro_vae.inference import graphs, products, rewrites
from pyro_vae.inference.graphs import Uncapturable
from pyro_vae.inference.hardware import multiplied_by
from pyro_vae.inference.parting import Held, parted
from pyro_vae.inference.simplification import simplified
from pyro_vae.news import no_news_of_a_gpu
from pyro_vae.randomness import forked

_READS = (
    "item", "__bool__", "__float__", "__int__", "__index__", "__complex__", "tolist", "numpy", "__array__",
    "__dlpack__",
    "__repr__", "__format__",
)  # fmt: skip
# Which make a tensor of numbers, and read them out of tensors that stand among these.
_MAKERS = ("tensor", "as_tensor", "asarray", "new_tensor", "scalar_tensor", "sparse_coo_tensor")

_FINISH = "finish"  # the mark of what an optimiser does
# Where a tensor becomes a number that is only reported, and where one is only checked.
_REPORTERS = ("pyro.infer.", "pyro_vae.inference.objectives")
_CHECKERS = ("pyro.util", "pyro_vae.sites", "torch.distributions.distribution")


class Capture:
    """A function of tensors, which returns a list of tensors without gradient, as a graph.

    Args:
        finish: Takes the leaves and their gradients and changes tensors in place, such as an optimiser; it is part of
            the graph, which then returns the results only. Where it has a method ``kernel(leaves)``, a replay on a CPU
            takes the function of the gradients that this gives, until a compiler has its operations.
        fixed: So many of the first arguments, and all else that it reads, stand still until `renew`: products that
            depend on nothing else are computed once. None where nothing is known to.
    Attributes:
        results: What the run returned: the capture is an ordinary step.
        leaves: The tensors whose gradients the replay returns after the results.
        constants: The tensors that it reads beside its arguments, by reference.
        written: Those of them, and of the first arguments, that it writes to.
        choice: The library for its products on a CPU (see `pyro_vae.inference.products`).
        recording: Its launches on a GPU, with those of the noise, as one (see `record`).
    Raises:
        Uncapturable: The function reads numbers out of tensors, or draws in a way that
            cannot be written down. Whatever is raised, every tensor that was there before is as it was.
    Example:
        >>> weight = torch.ones(2, requires_grad=True)
        >>> def function(x):
        ...     loss = (weight * x).sum() + torch.randn(2).sum()
        ...     loss.backward()
        ...     return [loss.detach()]
        >>> capture = Capture(function, [torch.tensor([1.0, 2.0])])
        >>> [tuple(t.shape) for t in capture([torch.tensor([3.0, 4.0])])], capture.leaves[0] is weight
        ([(), (2,)], True)
    """

    def __init__(
        self, function: Callable[..., list[Tensor]], args: Sequence[Tensor],
        finish: Callable[[list[Tensor], list[Tensor]], None] | None = None, fixed: int | None = None,
    ) -> None:  # fmt: skip
        self.results: list[Tensor] = []
        self.leaves: list[Tensor] = []
        self._held: Held | None = None
        self.compiled, self.fixed = False, fixed
        self.recording: graphs.CudaGraph | None = None
        operations = _Operations()
        try:
            self._write_down(function, args, finish, operations, fixed)
        except BaseException:
            operations.take_back()
            raise

    def _write_down(
        self, function: Callable[..., list[Tensor]], args: Sequence[Tensor],
        finish: Callable[[list[Tensor], list[Tensor]], None] | None, operations: _Operations, fixed: int | None,
    ) -> None:  # fmt: skip
        def recorded(*tensors: Tensor) -> list[Tensor]:
            with _noting_forks(), operations, _Recording(operations) as recording:
                results = function(*tensors)
            self.leaves = [leaf for leaf, _ in recording.gradients.values()]
            if any(getattr(leaf, "_post_accumulate_grad_hooks", None) for leaf in self.leaves):
                raise Uncapturable("a hook runs after the gradient of a parameter has been added")
            gradients = [gradient for _, gradient in recording.gradients.values()]
            self.results = _owned([*results, *gradients], [*results, *self.leaves])
            self._returned = len(self.results) if finish is None else len(results)
            if finish is not None:
                with _marking(_FINISH), torch.no_grad(), operations:
                    finish(self.leaves, self.results[self._returned :])
            return list(self.results)

        # One mode for the shapes of all nodes: without it make_fx sets up one, with a stack trace, for each node.
        with tracing(TracingContext(FakeTensorMode(allow_fallback_kernels=True))):
            graph = make_fx(recorded)(*args).graph if args else make_fx(lambda _: recorded())(torch.zeros(())).graph
        self._read = graphs.folded(graph)
        graphs.check_shapes(graph)
        # A graph module returns a flat list and takes flat arguments without pytree's code.
        graph.set_codegen(fx.graph.CodeGen())
        self.constants, self._constant_nodes = graphs.lifted(graph)
        graphs.drop_forked(graph)
        self.draws, self.live_noise = graphs.hoisted(graph)
        graphs.drop_dead(graph)
        self.constants, self._constant_nodes = graphs.drop_unread(graph, self.constants, self._constant_nodes)
        if not args:
            graph.erase_node(next(iter(graph.nodes)))
        graphs.disowned(graph, self.results, [*args, *self.constants])
        del self.results[self._returned :]
        self.on_cpu = all(t.device.type == "cpu" for t in (*args, *self.constants))
        self.mutated = graphs.mutated(graph, self._constant_nodes, self.constants)
        given = [node for node in graph.nodes if node.op == "placeholder"][: len(args)]
        self.written = [*self.mutated, *graphs.mutated(graph, given, args)]
        if fixed is not None and not self.written and not self.leaves:
            before = parted(graph, [*given[:fixed], *self._constant_nodes])
            self._held = None if before is None else Held(simplified(before).forward)
        self.choice = products.chosen(graph) if self.on_cpu else None
        self._run = self._shortly(graph, finish)
        output = next(iter(reversed(graph.nodes)))
        output.args = (list(output.args[0])[: self._returned],)
        self.module = fx.GraphModule({}, graph)

    def renew(self) -> None:
        """What stands still is another now: what was computed of it is forgotten."""
        if self._held is not None:
            self._held.renew()

    def _inputs(self, args: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """All that the graph takes."""
        held = () if self._held is None else self._held(*args[: self.fixed], *self.constants)
        return *args, *self.constants, *(draw() for draw in self.draws), *held

    def _shortly(self, graph: fx.Graph, finish: Any) -> Callable[..., Sequence[Tensor]]:
        """The graph as it is replayed without a compiler: simplified, and finished by a kernel where there is one."""
        kernel = finish.kernel(self.leaves) if self.on_cpu and hasattr(finish, "kernel") else None
        if kernel is None:
            return simplified(graph, outputs=self._returned).forward
        forward, count = simplified(graph, without=_FINISH).forward, self._returned

        def run(*tensors: Tensor) -> Sequence[Tensor]:
            results = forward(*tensors)
            kernel(results[count:])
            return results[:count]

        return run

    def __call__(self, args: Sequence[Tensor]) -> Sequence[Tensor]:
        """Results and gradients for new arguments, new noise, and the tensors as they are now."""
        with torch.no_grad(), multiplied_by(None if self.choice is None else self.choice.library):
            if self.recording is not None:
                return self.recording(*args, *self.constants)
            return self._run(*self._inputs(args))

    def holds(self) -> bool:
        """Whether the tensors whose values gave a shape hold them still."""
        return all(torch.equal(tensor, before) for tensor, before in self._read)

    def compile(self, args: Sequence[Tensor]) -> None:
        """Hand the graph to Inductor; what it raises comes through, and the graph stays replayable."""
        with no_news_of_a_gpu(), torch.no_grad(), forked():
            from torch._inductor.compile_fx import compile_fx
            from torch.fx.experimental.symbolic_shapes import ShapeEnv

            examples = [t.detach() for t in self._inputs(args)]
            graph = fx.GraphModule({}, fx.Graph())
            graph.graph.output(graph.graph.graph_copy(self.module.graph, {}))
            if self.on_cpu:
                rewrites.split_biases(graph.graph)
                rewrites.quick_tanh(graph.graph)
            graph.recompile()
            choice = products.chosen(graph.graph) if self.on_cpu else None
            # Only with an environment for shapes does it look into its cache on disk; what is there has loops for the
            # instructions of the processor that it was made on, of which its key knows nothing.
            shapes = TracingContext(FakeTensorMode(shape_env=ShapeEnv(), static_shapes=True))
            settings: Any = torch.compiler.config
            with tracing(shapes), settings.patch(cache_key_tag=_instructions()):
                run: Any = compile_fx(graph, examples)
            run = getattr(run, "_torchdynamo_orig_callable", run)  # spares Dynamo's guard around it
            scratch = {i: c.clone() for i, c in enumerate(self.constants) if any(c is m for m in self.mutated)}
            count = len(args)
            run(*[scratch.get(i - count, t) for i, t in enumerate(examples)])  # a lazy failure shows here
        self._plain = self._run, self.choice
        self._run, self.choice, self.compiled, self.recording = run, choice, True, None
        self.renew()  # it was made by another library

    def record(self, args: Sequence[Tensor]) -> None:
        """Play the graph's launches back as one CUDA graph; what CUDA raises comes through, and they stay single."""
        if waiting := graphs.waits(self.module.graph):
            raise Uncapturable(f"its graph has {', '.join(waiting)}, for which a GPU is waited for")
        if elsewhere := {str(draw.device) for draw in self.draws if draw.device.type != "cuda"}:
            raise Uncapturable(f"it draws noise on {min(elsewhere)}")

        def run(*tensors: Tensor) -> Sequence[Tensor]:
            return self._run(*tensors, *[draw() for draw in self.draws])

        fixed = [False] * len(args) + [True] * len(self.constants)
        with torch.no_grad():
            self.recording = graphs.CudaGraph(run, [*args, *self.constants], fixed, self.mutated)

    def uncompile(self) -> None:
        """Replay without what the compiler made."""
        (self._run, self.choice), self.compiled = self._plain, False
        self.renew()


def _instructions() -> str:
    """What a compiler may use of this processor."""
    from torch._inductor.cpu_vec_isa import pick_vec_isa

    return f"{pick_vec_isa()}, {torch.backends.cpu.get_cpu_capability()}"


def capturing() -> bool:
    """Whether what runs is being written down."""
    return _Recording.active > 0


class _Recording(TorchFunctionMode):
    """Keeps backward away from ``.grad``, and numbers from being read out of tensors."""

    active = 0

    def __init__(self, operations: _Operations) -> None:
        super().__init__()
        self.operations = operations
        self.gradients: dict[int, tuple[Tensor, Tensor]] = {}

    def __enter__(self) -> _Recording:
        _Recording.active += 1
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        _Recording.active -= 1
        super().__exit__(*exception)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.backward:
            return self._backward(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name in _READS and func == getattr(Tensor, name, None):
            frame = sys._getframe(1)
            module = frame.f_globals.get("__name__", "")
            if name == "item" and module.startswith(_REPORTERS):
                return args[0].detach()  # it stays a tensor, and alive
            if name == "__bool__" and module in _CHECKERS:
                # It is made in the step that is captured, and in no replay.
                with disable_proxy_modes_tracing(), self.operations.allowed():
                    return func(*args, **kwargs)
            where = f"{frame.f_code.co_filename.rsplit('/', 1)[-1]}:{frame.f_lineno}"
            if module.startswith(("torch.", "pyro.")):
                raise Uncapturable(f"{module} depends on the values of tensors (at {where})")
            raise Uncapturable(f"a number is read out of a tensor at {where}")
        if name in _MAKERS and any(_holds_tensor(a) for a in (*args, *kwargs.values())):
            raise Uncapturable(f"torch.{name} reads numbers out of tensors")
        if name == "__set__" and getattr(func, "__self__", None) == Tensor.data:
            raise Uncapturable("a tensor is given other data by an assignment")
        return func(*args, **kwargs)

    def _backward(
        self, loss: Tensor, gradient: Tensor | None = None, retain_graph: bool | None = None,
        create_graph: bool = False, inputs: Any = None,
    ) -> None:  # fmt: skip
        if create_graph:
            raise Uncapturable("its backward keeps a graph of the gradients")
        leaves = list(leaves_of(loss)) if inputs is None else [inputs] if isinstance(inputs, Tensor) else list(inputs)
        found = torch.autograd.grad(loss, leaves, gradient, retain_graph=retain_graph)
        for leaf, value in zip(leaves, found, strict=True):
            before = self.gradients.get(id(leaf))
            self.gradients[id(leaf)] = (leaf, value.detach() if before is None else before[1] + value.detach())


class _Operations(TorchDispatchMode):
    """Sees every operation: also on tensors that are no arguments, and those that C++ makes of a call.

    Refuses those that read a value into Python or C++, and keeps what is written over.
    """

    def __init__(self) -> None:
        super().__init__()
        self._made: set[int] = set()  # storages that the run itself made
        self._before: dict[int, tuple[Tensor, Tensor]] = {}
        self._allowed = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.data_dependent_output in func.tags and not self._allowed:
            raise Uncapturable(f"{func} depends on the values of tensors")
        given = {_storage(t) for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for value in graphs.written(func._schema, args, kwargs):
            self._keep(value)
        results = func(*args, **kwargs)
        self._made |= {_storage(t) for t in pytree.tree_leaves(results) if isinstance(t, Tensor)} - given
        return results

    def _keep(self, values: Any) -> None:
        for tensor in pytree.tree_leaves(values):
            if isinstance(tensor, Tensor) and id(tensor) not in self._before and _storage(tensor) not in self._made:
                with disable_proxy_modes_tracing(), torch.no_grad():
                    self._before[id(tensor)] = tensor, tensor.detach().clone()

    @contextlib.contextmanager
    def allowed(self) -> Iterator[None]:
        self._allowed += 1
        try:
            yield
        finally:
            self._allowed -= 1

    def take_back(self) -> None:
        """Write back what stood in the tensors that were there before; of one seen twice, the earliest."""
        with torch.no_grad():
            for tensor, before in reversed(self._before.values()):
                tensor.copy_(before)


def _storage(tensor: Tensor) -> int:
    try:
        return tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):  # one without a storage, such as a sparse one
        return -1


def _holds_tensor(value: Any) -> bool:
    return isinstance(value, list | tuple) and any(isinstance(v, Tensor) or _holds_tensor(v) for v in value)


@contextlib.contextmanager
def _marking(name: str) -> Iterator[None]:
    """Mark what is recorded inside."""
    mode = get_proxy_mode()
    before = 0 if mode is None else len(mode.tracer.graph.nodes)
    try:
        yield
    finally:
        if mode is not None:
            for node in itertools.islice(mode.tracer.graph.nodes, before, None):
                node.meta[name] = True


@contextlib.contextmanager
def _noting_forks() -> Iterator[None]:
    """Marks what is recorded inside ``torch.random.fork_rng``: its draws do not move the stream of noise."""
    original = torch.random.fork_rng

    @contextlib.contextmanager
    def noted(*args: Any, **kwargs: Any) -> Iterator[None]:
        with _marking("forked"), original(*args, **kwargs):  # torch.utils.checkpoint leaves its fork by an exception
            yield

    torch.random.fork_rng = noted
    try:
        yield
    finally:
        torch.random.fork_rng = original


def leaves_of(loss: Tensor) -> Iterable[Tensor]:
    """The tensors into whose ``.grad`` backward would add."""
    stack: list[Any] = [loss.grad_fn]
    seen: set[Any] = set()
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            yield node.variable
        stack += [following for following, _ in reversed(node.next_functions)]


def _owned(outputs: list[Tensor], shaped_like: list[Tensor]) -> list[Tensor]:
    """Outputs with a storage of their own: an optimiser changes gradients in place."""
    seen: set[int] = set()
    owned = []
    for output, like in zip(outputs, shaped_like, strict=True):
        storage = output.untyped_storage().data_ptr()
        whole = output.numel() * output.element_size() == output.untyped_storage().nbytes()
        if not (storage not in seen and whole and output.stride() == like.stride()):
            output = torch.empty_like(like).copy_(output)
        seen.add(output.untyped_storage().data_ptr())
        owned.append(output.detach())
    return owned
