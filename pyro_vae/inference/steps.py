"""Steps as a captured graph sees them: one call of a loss, and the training step around it.

Where some of a step cannot be captured (a batch that is made by Python, an optimiser that is not Adam), the rest still
is. Rows are chosen and binarised inside the graph on a GPU only: on a CPU the compiler would draw each pixel again in
every operation that reads it, which for 50 particles takes three times as long as the rest of the likelihood.
"""

from __future__ import annotations

import math
import time
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from pyro.infer.util import zero_grads
from pyro.optim import PyroOptim
from pyro.poutine.runtime import _PYRO_STACK, apply_stack
from torch import Tensor
from torch.distributions import constraints, transform_to
from torch.utils import _pytree as pytree

from pyro_vae._trust import SCALARS
from pyro_vae.inference.batches import Batches, Stream
from pyro_vae.inference.captured import MOMENT, Graph, settings
from pyro_vae.inference.optimizers import Fused
from pyro_vae.inference.updates import Update
from pyro_vae.traces import Program

if TYPE_CHECKING:
    from pyro_vae.inference.compiled import Compiled


class TrainingStep:
    """What belongs to a training step beside the loss."""

    def __init__(self, prepare: Callable[..., tuple[Any, ...]], update: Update | None, key: Any, last: bool) -> None:
        self.prepare = prepare  # from the step's tensors, such as an index, to the arguments of the programs
        self.update = update  # the optimiser's step, to be part of the graph
        self.key = key  # what tells such steps apart, as far as they need different graphs
        self.last = last  # whether nothing less is tried where this cannot be captured, so that the reason is given


class Step(NamedTuple):
    """One call: its tensors, and all else that it rests on as a key."""

    model: Program
    guide: Program
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    tensors: list[Tensor]
    key: Any
    reason: str | None
    training: TrainingStep | None

    @classmethod
    def of(
        cls, model: Program, guide: Program, args: tuple[Any, ...], kwargs: dict[str, Any],
        training: TrainingStep | None = None,
    ) -> Step:  # fmt: skip
        if not kwargs and all(type(a) is Tensor for a in args):  # spares pytree's code, the usual case
            leaves, structure = list(args), None
        else:
            leaves, structure = pytree.tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        rest = tuple(None if isinstance(leaf, Tensor) else (type(leaf), leaf) for leaf in leaves)
        reason = None
        if any(t.requires_grad for t in tensors):
            reason = "an argument requires a gradient"
        elif any(not isinstance(leaf, (Tensor, *SCALARS)) for leaf in leaves):
            odd = next(leaf for leaf in leaves if not isinstance(leaf, (Tensor, *SCALARS)))
            reason = f"an argument is a {type(odd).__name__}, wanted tensors and numbers"
        elif not torch.is_grad_enabled():
            reason = "gradients are switched off"
        key = None
        if reason is None:
            key = (model, guide, structure and str(structure), rest, settings(tensors), training and training.key)
        return cls(model, guide, args, kwargs, tensors, key, reason, training)

    def advance(self, steps: int) -> None:
        """Count such steps of the optimiser, or take them back."""
        if self.training is not None and self.training.update is not None:
            self.training.update.advance(steps)

    def rebuilt(self, tensors: Sequence[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The programs' arguments, made of these tensors."""
        if self.training is not None:
            return self.training.prepare(*tensors), {}
        leaves, structure = pytree.tree_flatten((self.args, self.kwargs))
        new = iter(tensors)
        return pytree.tree_unflatten([next(new) if isinstance(leaf, Tensor) else leaf for leaf in leaves], structure)


class Site(NamedTuple):
    """A param statement of the programs, to be told to the handlers around a replay."""

    name: str
    unconstrained: Tensor
    constraint: Any

    @classmethod
    def of(cls, site: Any) -> Site:
        value = site["value"]
        return cls(site["name"], value.unconstrained(), site["kwargs"].get("constraint", constraints.real))

    def announce(self) -> None:
        value = self.unconstrained
        if self.constraint is not constraints.real:
            with torch.no_grad():
                value = transform_to(self.constraint)(value)
        value.unconstrained = weakref.ref(self.unconstrained)  # type: ignore[attr-defined]
        apply_stack(
            {
                "type": "param", "name": self.name, "fn": _known, "is_observed": False, "args": (self.name,),
                "kwargs": {"constraint": self.constraint}, "value": value, "scale": 1.0, "mask": None,
                "cond_indep_stack": (), "done": True, "stop": False, "continuation": None, "infer": None,
                "obs": None,
            }
        )  # fmt: skip


def _known(*_: Any, **__: Any) -> None:
    """What a param statement would call, had it no value yet."""


class LossGraph(Graph):
    """A captured loss, or training step; `recorded` says whether it was tried as one CUDA graph."""

    recorded, sealed = False, False

    def describe(self, sites: list[Site], beta: Tensor | None, with_bound: bool, training: TrainingStep | None) -> None:
        """Add what the run showed: the weight of the KL as the tensor that the graph reads, where it was not 1, and
        whether its second result is the bound."""
        self.sites, self.beta, self.with_bound = sites, beta, with_bound
        self.training = training  # what its key names by identity must live
        # A replay changes nothing that is read in Python: no operation of others, no array over what it writes.
        operations = {getattr(node.target, "namespace", "aten") for node in self.capture.module.graph.nodes}
        self.sealed = operations <= {"aten", "prims"} and not self.watched.arrays
        trained = {id(site.unconstrained) for site in sites}
        self.trained: list[Tensor] = [leaf for leaf in self.capture.leaves if id(leaf) in trained]

    def announce(self) -> None:
        if _PYRO_STACK:
            for site in self.sites:
                site.announce()


class GraphSteps:
    """Steps of a pair by a compiled loss, each as much of a step as can be; where it `chooses`, with the batch made
    inside the graph."""

    def __init__(
        self, compiled: Compiled, model: Program, guide: Program, optimizer: PyroOptim, batches: Batches
    ) -> None:
        self.compiled, self.model, self.guide = compiled, model, guide
        self.optimizer, self.batches = optimizer, batches
        # No graph draws from a stream of the data.
        self.chooses = batches.home.type == "cuda" and not isinstance(batches.stream, Stream)
        self._ways: list[tuple[bool, TrainingStep]] = []
        self._made_for: Any = "nothing yet"
        self._ours = batches.ours
        self._compared = -math.inf  # when all that the latest step rests on was last looked at

    def lapse(self) -> None:
        """Look at everything before the next step: code that is not of this package has run."""
        self._compared = -math.inf

    def _again(self, choice: tuple[Any, ...]) -> tuple[Tensor | None, tuple[Any, ...] | None]:
        """The step that was taken last on another batch, where only code of this package ran since then.

        Another thread, a signal handler or a finalizer may change something at any time, and what they change is seen a
        moment later than it could be.
        """
        known = self._ours and bool(self._ways) and time.perf_counter() - self._compared <= MOMENT
        if not known or torch._C._len_torch_function_stack() or torch._C._len_torch_dispatch_stack():
            return None, None
        batch = None if self._ways[0][0] else self.batches.take(*choice)
        return self.compiled.again(choice if batch is None else batch), batch

    def __call__(self, choice: tuple[Any, ...]) -> tuple[Tensor | None, tuple[Any, ...] | None]:
        """Take a step on a batch: its loss, None where there is no graph for it and nothing was done; and the batch, if
        it was made."""
        loss, batch = self._again(choice)
        if loss is not None:
            return loss, batch
        self._update_ways()
        while self._ways and all(isinstance(x, Tensor) for x in choice):
            chosen, training = self._ways[0]
            if not chosen and batch is None:
                batch = self.batches.take(*choice)
            tensors = choice if chosen or batch is None else batch
            if not all(isinstance(x, Tensor) for x in tensors):
                break
            done = self.compiled.train(self.model, self.guide, tensors, training)
            if done is not None:
                loss, leaves = done
                self._compared = time.perf_counter()
                if leaves:
                    self.optimizer(leaves)
                    zero_grads(leaves)
                return loss, batch
            if not self.compiled.refused(self.model, self.guide, tensors, training):
                break
            del self._ways[0]
        return None, batch

    def _update_ways(self) -> None:
        """From the training step down to loss and gradients alone, for the optimiser as it is now."""
        fused = self.optimizer if isinstance(self.optimizer, Fused) else None
        now = None if fused is None else (len(fused.parameters), fused.settings, fused.hooked)
        if now == self._made_for:
            return
        self._made_for = now
        update = None if fused is None else fused.inside()
        columns = self.batches.columns
        source = (id(self.batches.origin), str(self.batches.device))
        self._ways = []
        for chosen in (True, False) if columns is not None and self.chooses else (False,):
            prepare: Callable[..., tuple[Any, ...]] = self.batches.take if chosen else lambda *tensors: tensors
            for step in (update, None) if update is not None else (None,):
                key = (source if chosen else None, None if step is None else id(step))
                self._ways.append((chosen, TrainingStep(prepare, step, key, last=not chosen and step is None)))
