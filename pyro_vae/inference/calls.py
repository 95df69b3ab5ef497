"""One call of a loss as a captured graph sees it: its kind, its conditions, its graph."""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from pyro.poutine.runtime import _PYRO_STACK, apply_stack
from torch import Tensor
from torch.distributions import constraints, transform_to
from torch.utils import _pytree as pytree

from pyro_vae.inference.capture import Capture
from pyro_vae.inference.optimizers import Update
from pyro_vae.inference.precision import bfloat16_active
from pyro_vae.inference.watching import SCALARS, Watched
from pyro_vae.traces import Program


class Whole:
    """What belongs to a training step beside the loss.

    Args:
        prepare: From the step's tensors, such as an index, to the arguments of the programs.
        update: The optimiser's step, to be part of the graph; None to leave it out.
        key: What tells such steps apart, as far as they need different graphs.
        last: Whether nothing less is tried where this cannot be captured, so that a word is due.
    """

    def __init__(
        self, prepare: Callable[..., tuple[Any, ...]], update: Update | None, key: Any, last: bool = False
    ) -> None:
        self.prepare, self.update, self.key, self.last = prepare, update, key, last

    def advance(self, steps: int) -> None:
        if self.update is not None:
            self.update.advance(steps)


class Step(NamedTuple):
    """One call: its tensors, and all else that it rests on as a key."""

    model: Program
    guide: Program
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    tensors: list[Tensor]
    key: Any
    reason: str | None
    whole: Whole | None

    @classmethod
    def of(
        cls, model: Program, guide: Program, args: tuple[Any, ...], kwargs: dict[str, Any], whole: Whole | None = None
    ) -> Step:
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
            shapes = tuple((t.shape, t.stride(), t.dtype, t.device) for t in tensors)
            device = tensors[0].device.type if tensors else "cpu"
            key = (model, guide, structure and str(structure), rest, shapes, torch.is_autocast_enabled(device),
                   torch.get_autocast_dtype(device), torch.get_default_dtype(), bfloat16_active(),
                   None if whole is None else whole.key)  # fmt: skip
        return cls(model, guide, args, kwargs, tensors, key, reason, whole)

    def rebuilt(self, tensors: Sequence[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The programs' arguments, made of these tensors."""
        if self.whole is not None:
            return self.whole.prepare(*tensors), {}
        leaves, structure = pytree.tree_flatten((self.args, self.kwargs))
        new = iter(tensors)
        return pytree.tree_unflatten([next(new) if isinstance(leaf, Tensor) else leaf for leaf in leaves], structure)


class _Site(NamedTuple):
    """A param statement of the programs, to be told to the handlers around a replay."""

    name: str
    unconstrained: Tensor
    constraint: Any

    @classmethod
    def of(cls, site: Any) -> _Site:
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


# A hook that appears changes gradients; those that are there are among what the programs can read.
_conditions = operator.attrgetter(
    "requires_grad", "dtype", "device", "shape", "_backward_hooks", "_post_accumulate_grad_hooks"
)


def _known(*_: Any, **__: Any) -> None:
    """What a param statement would call, had it no value yet."""


class Entry:
    """A capture and the conditions under which it holds."""

    def __init__(
        self, capture: Capture, watched: Watched, sites: list[_Site], beta: Tensor | None, with_bound: bool
    ) -> None:
        self.capture, self.watched, self.sites, self.beta, self.with_bound = capture, watched, sites, beta, with_bound
        self.replays, self.unchecked, self.tried, self.recorded = 0, False, False, False
        self.whole: Whole | None = None
        self.trained: list[Tensor] = []
        self._tensors = self._now()

    def _now(self) -> list[Any]:
        return [_conditions(c) for c in self.capture.constants]

    def fresh(self) -> bool:
        return self._tensors == self._now() and self.watched.fresh() and self.capture.holds()

    def announce(self) -> None:
        if _PYRO_STACK:
            for site in self.sites:
                site.announce()
