"""A loss that compiles: any Pyro ELBO, captured once and replayed without Pyro (see `pyro_vae.inference.captured`).

A graph is used as long as what it rests on is as it was: the programs; shapes, types and devices of arguments and of
the tensors that are read; which of them train; and every place in Python that programs and loss can read.
"""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from pyro import poutine
from pyro.infer import ELBO
from pyro.poutine.runtime import _PYRO_STACK
from pyro.poutine.trace_messenger import TraceMessenger
from torch import Tensor

from pyro_vae.inference.captured import Captured, Watched, alike, first_line
from pyro_vae.inference.graphs import Uncapturable
from pyro_vae.inference.steps import LossGraph, Site, Step, TrainingStep
from pyro_vae.options import checked
from pyro_vae.parameters import _OwnParameters, own_parameters
from pyro_vae.traces import Program

_RECORD_AFTER = 3  # replays on a GPU after which the launches of a graph that is not compiled are recorded


class Compiled(Captured, ELBO):
    """A Pyro ELBO as one compiled function of data, parameters and noise.

    Value, gradients and, under one seed, every random number are those of the loss that
    is wrapped, to rounding. Parameters are the modules' own (see `pyro_vae.parameters`);
    beta and everything else that is a tensor may change between steps at no cost.

    Args:
        loss: Any ELBO whose steps are tensor code: ``Trace_ELBO()``, ``RenyiELBO()``,
            `Objective`, ...
        compile_after: Replays after which Inductor compiles the graph (seconds, once, and
            less from its cache on disk); None only replays, for which no C++ compiler is
            needed.
        quiet: Leave out the warning that says why a pair runs uncompiled (never the one that it is unproven).
        unproven: Capture programs too that can read what cannot be watched, with a warning that names it.
        check_every: Replays of unproven programs between two comparisons with the programs themselves.
    Attributes:
        reason: Why the most recent step ran uncaptured, or None.
        captures: Number of captures so far, of those that could be kept.
    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro.infer import SVI, Trace_ELBO
        >>> def model(x):
        ...     loc = pyro.param("loc", torch.zeros(()))
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("x", dist.Normal(loc, 1.0), obs=x)
        >>> svi = SVI(model, lambda x: None, pyro.optim.Adam({"lr": 0.1}), loss=Compiled(Trace_ELBO()))
        >>> for _ in range(200):
        ...     _ = svi.step(torch.full((4,), 3.0))
        >>> round(pyro.param("loc").item(), 1)
        3.0
    """

    unit, result, kind = "step", "loss", LossGraph

    @checked
    def __init__(
        self, loss: ELBO, *, compile_after: int | None = 10, quiet: bool = False, unproven: bool = True,
        check_every: int = 100,
    ) -> None:  # fmt: skip
        if isinstance(loss, Compiled) or not hasattr(loss, "loss_and_grads"):
            raise ValueError(f"got {loss!r} to compile, wanted a Pyro ELBO such as Trace_ELBO(), or an Objective.")
        if compile_after is not None and compile_after < 0:
            raise ValueError(f"compile_after must be None or at least 0, got {compile_after}.")
        ELBO.__init__(self, num_particles=loss.num_particles)
        self.inner: Any = loss
        self.compile_after = compile_after
        Captured.__init__(self, quiet=quiet, unproven=unproven, check_every=check_every)

    def _forget(self) -> None:
        super()._forget()
        self._replays = 0
        self._leaves: list[Tensor] = []
        self._latest: tuple[LossGraph, Step] | None = (
            None  # replayed last, if that was a whole training step and no more
        )

    def __repr__(self) -> str:
        kind: Any = type(self.inner)
        own = kind.__repr__ is not object.__repr__
        return f"Compiled({self.inner!r})" if own else f"Compiled({kind.__name__}())"

    def __getstate__(self) -> dict[str, Any]:
        # A copy is for another pair, and graphs hold tensors of this one.
        keep = ("num_particles", "max_plate_nesting", "inner", "compile_after", "quiet", "unproven", "check_every")
        return {name: value for name, value in vars(self).items() if not name.startswith("_") or name in keep}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.inner = copy.copy(self.inner)
        self._forget()

    @property
    def beta(self) -> Any:
        """That of the `Objective` inside; it may change between steps."""
        return self.inner.beta

    @beta.setter
    def beta(self, value: float) -> None:
        self.inner.beta = value

    def _beta(self) -> float:
        """Its weight, where that is a number: as a tensor, it may change between steps."""
        beta = vars(self.inner).get("beta", 1)
        return beta if isinstance(beta, int | float) else 1

    @property
    def last_bound(self) -> Tensor | None:
        """That of the `Objective` inside."""
        return self.inner.last_bound

    def loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Any:
        """The loss as a number, uncompiled."""
        with own_parameters(model, guide):
            return self.inner.loss(model, guide, *args, **kwargs)

    def loss_and_grads(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Any:
        """The loss as a number; its gradients are added to the parameters' ``.grad``."""
        step = Step.of(model, guide, args, kwargs)
        value = self._by_graph(step)
        if value is not None:
            return value.item()
        with own_parameters(model, guide):
            return self.inner.loss_and_grads(model, guide, *args, **kwargs)

    def train(
        self, model: Program, guide: Program, tensors: Sequence[Tensor], training: TrainingStep
    ) -> tuple[Tensor, list[Tensor]] | None:
        """A training step as one graph, from the choice of the batch to the optimiser's step.

        Says nothing to Pyro's handlers and does not read the loss.

        Returns:
            The loss, and those that train of the parameters whose ``.grad`` it added to (none where the
            optimiser's step was part of the graph; what no param statement names does not train); None, with
            nothing done, where there is no graph for such a step yet: take an ordinary step.
        """
        step = Step.of(model, guide, tuple(tensors), {}, training)
        self._latest = None
        value = self._by_graph(step)
        if value is None:
            return None
        graph = self._graphs.get(step.key)
        if training.update is not None and graph is not None and graph.replays and not graph.checked and graph.sealed:
            self._latest = graph, step
        return value, [] if training.update is not None else self._leaves

    def again(self, tensors: Sequence[Tensor]) -> Tensor | None:
        """The latest training step on other tensors, without a look at what it rests on: for who knows that no code but
        this package's ran since.

        Returns:
            The loss; None, with nothing done, where the latest step was no replay of a whole one, these tensors are of
            another kind, or more than a replay is due: call `train`.
        """
        if self._latest is None:
            return None
        graph, step = self._latest
        graph.replays += 1
        if graph.due(self.check_every) or self._changing(graph) or not alike(tensors, step.tensors):
            graph.replays -= 1
            return None
        beta = self._beta()
        if graph.beta is not None:
            graph.beta.fill_(beta)
        elif beta != 1:
            graph.replays -= 1
            return None
        self._replays += 1
        step.advance(1)
        start = time.perf_counter()
        results = graph.capture(tensors)
        graph.seconds = min(time.perf_counter() - start, graph.seconds)
        return self._taken(graph, results)

    def _changing(self, graph: LossGraph) -> bool:
        """Whether a compiler, a recording or the clock may yet make another graph of this one."""
        capture = graph.capture
        if capture.live_noise:
            return False
        awaits_compiler = self.compile_after is not None and not graph.tried
        return awaits_compiler or (self.chooses and graph.on_trial()) or not (capture.on_cpu or graph.recorded)

    def refused(self, model: Program, guide: Program, tensors: Sequence[Tensor], training: TrainingStep) -> bool:
        """Whether such a training step was tried as one graph, and cannot be."""
        step = Step.of(model, guide, tuple(tensors), {}, training)
        return step.key is None or step.key in self._refused

    def _get_trace(self, *_: Any, **__: Any) -> Any:
        raise NotImplementedError("Compiled replays graphs; the traces are those of the loss inside.")

    def _by_graph(self, step: Step) -> Tensor | None:
        """The loss by a graph, or while one is made; None, with nothing done, where there is none for such a step."""
        graph = self._ready(step)
        if graph is None:
            return self._capture(step) if self._capturable(step) else None
        value = self._replay(graph, step)
        if value is not None and step.training is None:
            graph.announce()
        return value

    def _ready(self, step: Step) -> LossGraph | None:
        graph = None if step.key is None else self._graphs.get(step.key)
        if graph is None or not _neutral_handlers():
            return None
        beta = self._beta()
        if graph.fresh() and (beta == 1 or graph.beta is not None):
            if graph.beta is not None:
                graph.beta.fill_(beta)
            return graph
        self._drop(step)
        return None

    def _replay(self, graph: LossGraph, step: Step) -> Tensor | None:
        graph.replays += 1
        self._replays += 1
        # A kind of step that is rare, such as the last batch of an epoch, is not worth a compiler's seconds.
        often = graph.replays * 10 >= self._replays
        if self.compile_after is not None and graph.replays >= max(self.compile_after, 1) and often:
            self._compile(graph, step)
        elif graph.replays == _RECORD_AFTER and not graph.recorded:
            self._record(graph, step)
        results, _ = self._play(step, graph)
        return None if results is None else self._taken(graph, results)

    def _taken(self, graph: LossGraph, results: Sequence[Tensor]) -> Tensor:
        """The loss of a step's results; the bound and the gradients go where they belong."""
        offset = 1 + graph.with_bound
        if graph.with_bound:
            self.inner.last_bound = results[1]
        if len(results) > offset:
            self._leaves = graph.trained
            for leaf, gradient in zip(graph.capture.leaves, results[offset:], strict=True):
                if leaf.grad is None:
                    leaf.grad = gradient
                else:
                    with torch.no_grad():
                        leaf.grad.add_(gradient)
        return results[0]

    def _agree(self, results: Sequence[Tensor], expected: list[Tensor] | None) -> bool:
        return expected is None or bool((results[0] - expected[0]).abs() <= 1e-3 * expected[0].abs().clamp(min=1.0))

    def _expected(self, step: Step, graph: LossGraph) -> list[Tensor] | None:
        """The loss of the programs themselves, where it is finite."""
        bound = getattr(self.inner, "last_bound", None)
        gradients = [(leaf, leaf.grad) for leaf in graph.capture.leaves]
        for leaf, _ in gradients:
            leaf.grad = None
        try:
            with own_parameters(step.model, step.guide):
                args, kwargs = step.rebuilt(step.tensors)
                # Not by `loss`, which an ELBO of the user's need not have made its own.
                value = torch.as_tensor(self.inner.loss_and_grads(step.model, step.guide, *args, **kwargs))
        finally:
            for leaf, gradient in gradients:
                leaf.grad = gradient
        if bound is not None:
            self.inner.last_bound = bound
        return [value.double().sum()] if torch.isfinite(value).all() else None

    def _compile(self, graph: LossGraph, step: Step) -> bool:
        if done := super()._compile(graph, step):
            self._record(graph, step)
        return done

    def _keep_the_faster(self, graph: LossGraph) -> None:
        super()._keep_the_faster(graph)
        if not graph.capture.compiled:  # nor are other graphs worth it, nor this one when the fit is gone on with
            self.compile_after = None

    def _record(self, graph: LossGraph, step: Step) -> None:
        """Play the graph's launches back as one CUDA graph, where all of it is on one GPU."""
        if graph.capture.on_cpu or graph.capture.live_noise:
            return
        graph.recorded = graph.unchecked = True
        try:
            graph.capture.record(step.tensors)
        except Exception as error:
            reason = first_line(error)
            self._say(f"the steps are launched one kernel at a time, since CUDA did not record them ({reason})")

    def _capturable(self, step: Step) -> bool:
        """Whether to capture a step that has no graph."""
        if step.key is None:
            self.reason = step.reason
            self._say(f"the steps are not compiled, since {step.reason}")
            return False
        if step.key not in self._refused and not _neutral_handlers():
            self.reason = "Pyro handlers are active around the loss"
            return False
        return self._ripe(step, lambda: Watched((step.model, step.guide)))

    def _refuse(self, step: Step, reason: str) -> None:
        if step.training is None or step.training.last:
            super()._refuse(step, reason)
        else:  # less of the step is tried first
            self._refused[step.key] = self.reason = reason

    def _capture(self, step: Step) -> Tensor | None:
        """Run a step and write it down; the loss, or None, with nothing done, where that cannot be."""
        watched = Watched((step.model, step.guide), self.inner)
        if not self._accepted(step, watched):
            return None
        sites: dict[str, Any] = {}

        def function(*tensors: Tensor) -> list[Tensor]:
            args, kwargs = step.rebuilt(tensors)
            with poutine.trace(param_only=True) as params, own_parameters(step.model, step.guide):
                loss = self.inner.loss_and_grads(step.model, step.guide, *args, **kwargs)
            sites.update(params.trace.nodes)
            if not isinstance(loss, Tensor):
                raise Uncapturable(f"{type(self.inner).__name__} returns {type(loss).__name__} made of Python numbers")
            bound = getattr(self.inner, "last_bound", None)
            return [loss.detach(), bound] if isinstance(bound, Tensor) else [loss.detach()]

        beta = self._beta()
        live = None if beta == 1 else torch.tensor(float(beta), dtype=torch.float64)
        with self._alone(beta, live):
            written = self._write_down(step, watched, function, None if step.training is None else step.training.update)
        if written is None:
            return None
        results, graph = written
        found = [Site.of(site) for site in sites.values()]
        graph.describe(found, live, isinstance(getattr(self.inner, "last_bound", None), Tensor), step.training)
        loss = self._taken(graph, results)
        if step.training is None:
            graph.announce()
        return loss

    @contextlib.contextmanager
    def _alone(self, beta: float, live: Tensor | None) -> Iterator[None]:
        """Without the handlers around, which hear of the sites once the capture is good, and the weight a tensor."""
        outer, _PYRO_STACK[:] = list(_PYRO_STACK), []
        try:
            if live is not None:
                self.inner.beta = live
            yield
        finally:
            _PYRO_STACK[:] = outer
            if live is not None:
                self.inner.beta = beta


def _neutral_handlers() -> bool:
    """Whether the handlers around the loss change nothing in it."""
    return all(
        isinstance(handler, _OwnParameters) or (isinstance(handler, TraceMessenger) and handler.param_only)
        for handler in _PYRO_STACK
    )
