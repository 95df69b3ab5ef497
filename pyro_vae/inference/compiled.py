"""A loss that compiles: any Pyro ELBO, captured once and replayed without Pyro.

`Compiled` is a ``pyro.infer.ELBO`` around another. Its first step of a kind is the
other's own. From the second on it replays a graph of tensor operations (see
`pyro_vae.inference.capture`), which Inductor compiles once that has proved worth it.
Where a pair cannot be captured the steps go on as they were, with one line that says why.

A graph is used as long as what it rests on is as it was: the programs; shapes, types and
devices of arguments and of the tensors that are read; which of them train; and every
place in Python that programs and loss can read (see `pyro_vae.reach`): attributes, items of
containers, cells of closures, globals. Programs that can read more than can be compared
in each step, such as the clock or Python's random numbers, are *unproven*. They are captured
only where that is asked for, and then checked: once in every `check_every` replays the loss
is computed both ways from the same noise, and a difference raises.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import ELBO
from pyro.poutine.runtime import _PYRO_STACK
from pyro.poutine.trace_messenger import TraceMessenger
from torch import Tensor

from pyro_vae.inference.calls import LossGraph, Step, TrainingStep, _Site
from pyro_vae.inference.capture import Capture, Uncapturable
from pyro_vae.inference.cuda_graphs import CudaGraph
from pyro_vae.inference.watching import (
    Watched,
    first_line,
    forked,
    python_noise,
    random_state,
    set_random_state,
    unproven,
    why,
)
from pyro_vae.options import checked
from pyro_vae.parameters import _OwnParameters, own_parameters
from pyro_vae.traces import Program

_MEMORY = 64  # kinds of step that are remembered
_UNSTABLE = 3  # steps of a kind between which something may change before the kind is given up
_RECORD_AFTER = 3  # replays on a GPU after which the launches of a graph that is not compiled are recorded
_LIMIT = 8  # captures of one kind of step, and kinds of step, before giving up


class Compiled(ELBO):
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
        >>> import pyro.distributions as dist
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

    @checked
    def __init__(
        self, loss: ELBO, *, compile_after: int | None = 10, quiet: bool = False, unproven: bool = True,
        check_every: int = 100,
    ) -> None:  # fmt: skip
        if isinstance(loss, Compiled) or not hasattr(loss, "loss_and_grads"):
            raise ValueError(f"got {loss!r} to compile, wanted a Pyro ELBO such as Trace_ELBO(), or an Objective.")
        if compile_after is not None and compile_after < 0:
            raise ValueError(f"compile_after must be None or at least 0, got {compile_after}.")
        super().__init__(num_particles=loss.num_particles)
        self.inner: Any = loss
        if check_every < 1:
            raise ValueError(f"check_every must be a positive integer, got {check_every}.")
        self.compile_after = compile_after
        self.quiet, self.unproven, self.check_every = quiet, unproven, check_every
        self._forget()

    def _forget(self) -> None:
        self.reason: str | None = None
        self.captures = 0
        self._graphs: dict[Any, LossGraph] = {}
        self._refused: dict[Any, str] = {}
        self._tries: dict[Any, int] = {}
        self._seen: dict[Any, tuple[Watched, int]] = {}
        self._said: set[str] = set()
        self._replays = 0
        self._leaves: list[Tensor] = []

    def __repr__(self) -> str:
        own = type(self.inner).__repr__ is not object.__repr__
        return f"Compiled({self.inner!r})" if own else f"Compiled({type(self.inner).__name__}())"

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
        graph = self._ready(step)
        if graph is not None:
            value = self._replay(graph, step)
            if value is not None:
                graph.announce()
                return value.item()
        return self._slowly(step)

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
        graph = self._ready(step)
        if graph is not None:
            value = self._replay(graph, step)
        elif self._capturable(step):
            value = self._capture(step)
            graph = self._graphs.get(step.key)
        else:
            value = None
        if value is None:
            return None
        return value, [] if training.update is not None else self._leaves

    def refused(self, model: Program, guide: Program, tensors: Sequence[Tensor], training: TrainingStep) -> bool:
        """Whether such a training step was tried as one graph, and cannot be."""
        step = Step.of(model, guide, tuple(tensors), {}, training)
        return step.key is None or step.key in self._refused

    def _get_trace(self, *_: Any, **__: Any) -> Any:
        raise NotImplementedError("Compiled replays graphs; the traces are those of the loss inside.")

    def _ready(self, step: Step) -> LossGraph | None:
        if step.key is None:
            return None
        graph = self._graphs.get(step.key)
        if graph is None or not _neutral_handlers():
            return None
        beta = self._beta()
        if graph.fresh() and (beta == 1 or graph.beta is not None):
            if graph.beta is not None:
                graph.beta.fill_(beta)
            return graph
        del self._graphs[step.key]
        self._seen.pop(step.key, None)  # one step of the programs' own first: it may find out about plates anew
        return None

    def _replay(self, graph: LossGraph, step: Step) -> Tensor | None:
        graph.replays += 1
        self._replays += 1
        # A kind of step that is rare, such as the last batch of an epoch, is not worth a compiler's seconds.
        often = graph.replays * 10 >= self._replays
        if self.compile_after is not None and graph.replays >= max(self.compile_after, 1) and often:
            self._compile(graph, step)
        elif graph.replays == _RECORD_AFTER and not graph.recorded:
            self._record(graph, step.tensors)
        expected, written, state = None, [], None
        if graph.due(self.check_every):
            written = [(tensor, tensor.clone()) for tensor in graph.capture.mutated]
            expected = self._expected(step, graph, written)
            state, graph.unchecked = random_state(step.tensors), False
        if step.training is not None:
            step.training.advance(1)
        try:
            results = graph.capture(step.tensors)
        except Exception as error:
            if state is None:
                raise
            # An operation need not take what it gave: the step is still to be taken, by the programs themselves.
            _put_back(written)
            set_random_state(state)
            if step.training is not None:
                step.training.advance(-1)
            del self._graphs[step.key]
            self._refuse(step, f"its graph cannot be replayed ({first_line(error)})")
            return None
        loss, offset = results[0], 1
        if expected is not None and abs(loss.item() - expected) > 1e-3 * max(abs(expected), 1.0):
            _put_back(written)
            if step.training is not None:
                step.training.advance(-1)
            self._differs(step, graph, loss.item(), expected)
            return None
        if graph.with_bound:
            self.inner.last_bound, offset = results[1], 2
        if len(results) > offset:
            self._leaves = graph.trained
            _add_gradients(graph.capture.leaves, results[offset:])
        self.reason = None
        return loss

    def _differs(self, step: Step, graph: LossGraph, replayed: float, expected: float) -> None:
        """What to do where a replay is not what the programs do: the steps since the last check may be wrong."""
        numbers = f"{replayed:.6g} replayed, {expected:.6g} by the programs, after {graph.replays} replays"
        del self._graphs[step.key]
        if graph.watched.unproven:
            raise ValueError(
                f"the captured loss is not that of the programs ({numbers}), which can read {unproven(graph.watched)}. "
                "The steps since the last comparison are of a loss that is not theirs: take compile=False (or "
                '"auto", which does not capture such programs), or keep what changes in a tensor.'
            )
        self._refuse(step, f"the loss depends on something outside the graph ({numbers})")
        self._say(f"a captured loss was not that of the programs ({numbers}) although nothing that they read had "
                  "changed. The steps since are not captured; compile=False avoids it from the start", always=True)

    def _expected(self, step: Step, graph: LossGraph, written: list[tuple[Tensor, Tensor]]) -> float | None:
        """The loss of the programs themselves, from the noise that the replay will draw."""
        bound = getattr(self.inner, "last_bound", None)
        gradients = [(leaf, leaf.grad) for leaf in graph.capture.leaves]
        for leaf, _ in gradients:
            leaf.grad = None
        try:
            with forked(step.tensors), pyro.validation_enabled(False), own_parameters(step.model, step.guide):
                args, kwargs = step.rebuilt(step.tensors)
                # Not by `loss`, which an ELBO of the user's need not have made its own.
                value = self.inner.loss_and_grads(step.model, step.guide, *args, **kwargs)
        finally:
            for leaf, gradient in gradients:
                leaf.grad = gradient
        if bound is not None:
            self.inner.last_bound = bound
        _put_back(written)
        return float(value) if torch.isfinite(torch.as_tensor(value)).all() else None

    def _compile(self, graph: LossGraph, step: Step) -> None:
        if graph.tried:
            return
        graph.tried = True
        if graph.capture.live_noise:
            return  # Inductor may draw in another order
        try:
            graph.capture.compile(step.tensors)
            graph.unchecked = True
            self._record(graph, step.tensors)
        except Exception as error:  # whatever the compiler lacks, the graph is there already
            self._say(f"the captured graph is replayed uncompiled, since Inductor failed ({first_line(error)})")

    def _record(self, graph: LossGraph, tensors: Sequence[Tensor]) -> None:
        """Play the graph's launches back as one CUDA graph, where all of it is on one GPU."""
        capture = graph.capture
        if capture.on_cpu or capture.live_noise:
            return
        graph.recorded = graph.unchecked = True
        with torch.no_grad(), forked([*tensors, *capture.constants]):
            noise = [draw() for draw in capture.draws]
            inputs = [*tensors, *capture.constants, *noise]
            fixed = [False] * len(tensors) + [True] * len(capture.constants) + [False] * len(noise)
            try:
                capture._run = CudaGraph(capture._run, inputs, fixed, capture.mutated)
            except Exception as error:
                self._say(f"the steps are launched one kernel at a time, since CUDA did not record them "
                          f"({first_line(error)})")

    def _capturable(self, step: Step) -> bool:
        """Whether to capture a step that has no graph: from the second of its kind on, if the first changed nothing.

        What programs write down at their own run is found out while they run as they are: a capture that fails
        would run them a second time.
        """
        if step.key is None:
            self.reason = step.reason
            self._say(f"the steps are not compiled, since {step.reason}")
            return False
        refused = self._refused.get(step.key)
        if refused is not None or not _neutral_handlers():
            self.reason = refused or "Pyro handlers are active around the loss"
            return False
        before = self._seen.pop(step.key, None)
        changed = None if before is None else before[0].changed()
        times = 1 if before is None else before[1] + 1
        if changed is not None and times > _UNSTABLE:
            self._refuse(step, f"{changed} changes while the programs run")
            return False
        if before is not None and changed is None:
            return True
        while len(self._seen) >= _MEMORY:
            del self._seen[next(iter(self._seen))]
        self._seen[step.key] = Watched((step.model, step.guide)), times
        self.reason = "the first step of its kind" if changed is None else f"{changed} has changed"
        return False

    def _slowly(self, step: Step) -> Any:
        value = self._capture(step) if self._capturable(step) else None
        return self._eagerly(step) if value is None else value.item()

    def _eagerly(self, step: Step) -> Any:
        with own_parameters(step.model, step.guide):
            return self.inner.loss_and_grads(step.model, step.guide, *step.args, **step.kwargs)

    def _refuse(self, step: Step, reason: str) -> None:
        self._refused[step.key] = self.reason = reason
        if step.training is None or step.training.last:
            self._say(f"the steps are not compiled, since {reason}")

    def _say(self, sentence: str, always: bool = False) -> None:
        if (always or not self.quiet) and sentence not in self._said:
            warnings.warn(f"{self!r}: {sentence}.", stacklevel=4)
        self._said.add(sentence)

    def _capture(self, step: Step) -> Tensor | None:
        """Run a step and write it down; the loss, or None, with nothing done, where that cannot be."""
        self._tries[step.key] = self._tries.get(step.key, 0) + 1
        if self._tries[step.key] > _LIMIT:
            self._refuse(step, f"what the programs read outside their arguments has changed {_LIMIT} times")
            return None
        while len(self._graphs) >= _LIMIT:
            del self._graphs[next(iter(self._graphs))]
        watched = Watched((step.model, step.guide), self.inner)
        if watched.unproven and not self._accepted(step, watched):
            return None
        beta, state, drawn = self._beta(), random_state(step.tensors), python_noise()
        live = None if beta == 1 else torch.tensor(float(beta), dtype=torch.float64)
        sites: dict[str, Any] = {}
        with_bound = False

        def function(*tensors: Tensor) -> list[Tensor]:
            nonlocal with_bound
            args, kwargs = step.rebuilt(tensors)
            with poutine.trace(param_only=True) as params, own_parameters(step.model, step.guide):
                loss = self.inner.loss_and_grads(step.model, step.guide, *args, **kwargs)
            sites.update(params.trace.nodes)
            if not isinstance(loss, Tensor):
                raise Uncapturable(f"{type(self.inner).__name__} returns {type(loss).__name__} made of Python numbers")
            bound = getattr(self.inner, "last_bound", None)
            with_bound = isinstance(bound, Tensor)
            return [loss.detach(), bound] if isinstance(bound, Tensor) else [loss.detach()]

        # The sites are announced by the handler around, once it is known that the capture is good.
        outer, _PYRO_STACK[:] = list(_PYRO_STACK), []
        try:
            if live is not None:
                self.inner.beta = live
            if step.training is not None:
                step.training.advance(1)
            with pyro.validation_enabled(False):
                capture = Capture(function, step.tensors, None if step.training is None else step.training.update)
        except Exception as error:
            set_random_state(state)  # the capture itself has put the tensors back
            if step.training is not None:
                step.training.advance(-1)
            failure: Exception | None = error
        else:
            failure = None
        finally:
            _PYRO_STACK[:] = outer
            if live is not None:
                self.inner.beta = beta
        if failure is not None:
            self._refuse(step, why(failure))
            return None
        graph = LossGraph(capture, watched, [_Site.of(site) for site in sites.values()], live, with_bound)
        if watched.changed():
            self._refuse(step, f"{watched.changed()} changes while the programs run")
        elif drawn != python_noise():
            self._refuse(step, "the programs draw random numbers of Python or NumPy")
        else:
            self.captures += 1
            self._graphs[step.key] = graph
            graph.training = step.training  # what its key names by identity must live
        results = capture.results
        if with_bound:
            self.inner.last_bound = results[1]
        self._leaves = graph.trained
        if len(results) > 1 + with_bound:
            _add_gradients(capture.leaves, results[1 + with_bound :])
        self.reason = "it was being captured"
        if step.training is None:
            graph.announce()
        return results[0]

    def _accepted(self, step: Step, watched: Watched) -> bool:
        """Whether to capture programs that can read what cannot be watched; either way one line says so."""
        found = unproven(watched)
        if self.unproven:
            self._say(
                f"the programs can read what a captured step cannot watch: {found}. If that changes, so must the loss: "
                f"it is compared with the programs' own every {self.check_every} steps, and a difference raises",
                always=True,
            )
            return True
        self._refused[step.key] = self.reason = f"the programs can read {found}"
        self._say(
            f"the steps run uncaptured, since the programs can read what a captured step cannot watch: {found}. Keep "
            "what changes in a tensor or a plain attribute, or pass compile=True to capture them all the same",
            always=True,
        )
        return False


def _put_back(written: list[tuple[Tensor, Tensor]]) -> None:
    with torch.no_grad():
        for tensor, before in written:
            tensor.copy_(before)


def _add_gradients(leaves: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
    for leaf, gradient in zip(leaves, gradients, strict=True):
        if leaf.grad is None:
            leaf.grad = gradient
        else:
            with torch.no_grad():
                leaf.grad.add_(gradient)


def _neutral_handlers() -> bool:
    """Whether the handlers around the loss change nothing in it."""
    return all(
        isinstance(handler, _OwnParameters) or (isinstance(handler, TraceMessenger) and handler.param_only)
        for handler in _PYRO_STACK
    )


