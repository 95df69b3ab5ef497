"""Guides that start from another guide and improve on it with the help of the model.

It runs its base guide and the model inside, hidden from whoever traces it, and ends in sample statements at the base
guide's sites. Parameters stay visible, so that Pyro trains those of the base guide, whichever loss is used.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import pyro
import torch
from pyro import poutine
from pyro.distributions import Delta, Unit
from pyro.poutine.broadcast_messenger import BroadcastMessenger
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import get_plates

from pyro_vae.programs.pair import Named
from pyro_vae.protocols import Rescoring, rescoring
from pyro_vae.sites import kind, sample_sites, unwrapped
from pyro_vae.traces import Program

Sites = dict[str, Any]
T = TypeVar("T")
_Self = TypeVar("_Self", bound="Refined")


class _Inside(Messenger):
    """Puts sites into plates that are already open, but out of reach behind a block."""

    def __init__(self, frames: tuple[Any, ...]) -> None:
        super().__init__()
        self.frames = frames

    def _pyro_sample(self, msg: Any) -> None:
        msg["cond_indep_stack"] = msg["cond_indep_stack"] + self.frames
        BroadcastMessenger._pyro_sample(msg)


@contextlib.contextmanager
def hidden(frames: tuple[Any, ...] = ()) -> Iterator[None]:
    """Hide sample sites from the handlers outside; keep them in the plates given."""
    with poutine.block(hide_fn=lambda msg: msg["type"] == "sample"), _Inside(frames):
        yield


class Refined(Named):
    """A guide that improves on another one; abstract.

    With no steps it is its base guide, reparameterised at every site; a negative number is refused. The model is not a
    submodule: its parameters are its own, and the guide neither lists, moves nor saves them.
    """

    def __init__(self, model: Program, guide: Program, num_steps: int) -> None:
        super().__init__()
        if num_steps < 0:
            raise ValueError(f"got num_steps={num_steps}, wanted 0 (the base guide itself) or more.")
        self.guide, self.num_steps = guide, num_steps
        self._held = (model,)  # in a tuple, where nn.Module does not look
        self._kept: list[Any] | None = None

    @property
    def model(self) -> Program:
        """The model that is refined against."""
        return self._held[0]

    @property
    def rescoring(self) -> Rescoring:
        """What it takes to score a sample that the guide did not draw, as of a posterior."""
        return rescoring(self.guide, getattr(self.guide, "posterior", None))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Draw z; the arguments are those of the base guide and of the model."""
        if self.num_steps == 0:
            return self.guide(*args, **kwargs)
        return self._refine(args, kwargs)

    @contextlib.contextmanager
    def kept(self: _Self) -> Iterator[_Self]:
        """While entered, what was found for a batch is kept for as long as the same batch comes. Model, base guide and
        batch are not to change meanwhile. Runs that gradients go through keep nothing."""
        before, self._kept = self._kept, []
        try:
            yield self
        finally:
            self._kept = before

    def _once(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], find: Callable[[], T]) -> T:
        """What is found for a batch, kept inside of `kept`."""
        if self._kept is None or torch.is_grad_enabled():
            return find()
        given = [*args, *kwargs.values()]
        key = [(value, getattr(value, "_version", 0)) for value in given]
        if self._kept:
            known, found = self._kept
            if len(known) == len(key) and all(a is b and v == w for (a, v), (b, w) in zip(known, key, strict=True)):
                return found
        found = find()
        self._kept[:] = [key, found]
        return found

    def _refine(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """One run of the program."""
        raise NotImplementedError

    def _run_guide(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], frames: tuple[Any, ...] = ()) -> Sites:
        """The sites of one hidden run of the base guide, if they can be refined."""
        with hidden(frames):
            trace = poutine.trace(self.guide).get_trace(*args, **kwargs)
        seen = [s["name"] for s in sample_sites(trace) if s["is_observed"] and not isinstance(s["fn"], Unit)]
        if seen:
            raise ValueError(
                f"{type(self).__name__} got a guide that observes {seen[0]!r}, as models do. The order is "
                f"{type(self).__name__}(model, guide)."
            )
        found = {site["name"]: site for site in sample_sites(trace) if not site["is_observed"]}
        for name, site in found.items():
            got = f"{type(self).__name__} cannot refine guide site {name!r} ({kind(site['fn'])})"
            if isinstance(unwrapped(site["fn"]), Delta):
                raise ValueError(f"{got}: a point has no density. Take a guide such as Guide(DiagonalNormal(...)).")
            if not getattr(site["fn"], "has_rsample", False):
                raise ValueError(f"{got}: its sampler is not reparameterised. Take a guide whose sites all are.")
            if not isinstance(site["scale"], int | float) or site["scale"] != 1:
                raise ValueError(
                    f"{got}: it carries a scale, as of a plate that subsamples, and would see another minibatch "
                    "each time it is run. Hand the minibatch to model and guide, and scale outside."
                )
        return found


class Plates:
    """The plates of recorded sites, opened again."""

    def __init__(self) -> None:
        self._outside = {frame.name for frame in get_plates()}
        self._made: dict[str, Any] = {}

    @contextlib.contextmanager
    def of(self, site: Any) -> Iterator[None]:
        """Open the plates that a site lay in, except those that are open."""
        with contextlib.ExitStack() as stack:
            for frame in site["cond_indep_stack"]:
                if frame.name not in self._outside:
                    if frame.name not in self._made:
                        self._made[frame.name] = pyro.plate(frame.name, frame.size, dim=frame.dim)
                    stack.enter_context(self._made[frame.name])
            yield
