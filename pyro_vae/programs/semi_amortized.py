"""Guides that finish what the encoder began, by gradient steps for each datum.

An encoder has to give good parameters lambda(x) for every x at once, and what it misses
is the amortization gap. A few steps on each datum's own ELBO close most of it:

    lambda_0 = encoder(x),   lambda_{t+1} = lambda_t + e * grad ELBO(x; lambda_t)

The parameters are those of the distributions at the guide's sites, without constraints (log sigma, the Cholesky factor
with the logarithm of its diagonal, ...), or, for a family that is not made of its parameters alone, such as a flow, all
that its posterior's head returns. The result is again a member of the base guide's family, so whatever the base guide
can do (score samples, an analytic KL), it can.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import pyro
import torch
from torch import Tensor

from pyro_vae.options import checked
from pyro_vae.programs.refined import Plates, Refined, Sites, hidden
from pyro_vae.protocols import Build, Free, Rescoring, twice_differentiable
from pyro_vae.sites import kind
from pyro_vae.traces import Program, draw
from pyro_vae.unconstrained import Heads, Moved, free_parameters, heads_of

_Key = TypeVar("_Key", str, tuple[str, str])


class SemiAmortized(Refined):
    """q(z | x): the base guide after a few gradient steps on its parameters, per datum.

    The steps climb the model's ELBO, with the gradient along reparameterised samples. Their noise is fresh at every
    step; its sequence is fixed by the seed, so that the guide is a function of the batch: it scores samples by the
    distribution that it draws them from. It is unaffected by scales, tempering and losses outside.

    What trains the encoder: with ``differentiate`` the loss is differentiated through the steps (at the price of second
    derivatives), so that the encoder learns to give parameters from which the steps go far, as in the paper. Without,
    the change is taken as a constant, and the encoder receives the gradient of the loss at the refined parameters:
    cheaper, and it pulls the encoder to where the steps end.

    One run costs the base guide once (twice for guides of several sites and for families known by their heads only,
    which also run it in every step) and per step the model and its gradient. The steps seed torch's generator, so a
    compiler that captures the program has to leave it as it is.

    Args:
        model: The model.
        guide: The base guide, reparameterised.
        num_steps: How many; at 0 the guide is its base guide.
        step_size: e.
        momentum: Share of the last change that is added to the next, in [0, 1).
        max_change: No parameter moves further in one step; None for no limit.
        num_samples: Samples per step behind the gradient.
        differentiate: Differentiate the loss through the steps.
        seed: Of the steps' noise. None draws it anew in every run: the guide is then
            another one in every run, and cannot score samples that it did not draw.
    Raises:
        ValueError: An option out of range; a site that is a point, is not
            reparameterised, or whose distribution cannot be rebuilt from parameters.
    Example:
        >>> import pyro.distributions as dist
        >>> from pyro_vae.programs.pair import Guide
        >>> from pyro_vae.programs.pair import Model
        >>> model = Model(lambda: dist.Normal(torch.zeros(2), 1.0).to_event(1),
        ...               lambda z: dist.Normal(z, 1.0).to_event(1))
        >>> base = Guide(lambda x: dist.Normal(torch.zeros_like(x), 1.0).to_event(1))
        >>> SemiAmortized(model, base, num_steps=3)(torch.zeros(5, 2)).shape
        torch.Size([5, 2])

    Reference: Kim et al., Semi-Amortized Variational Autoencoders, 2018. arXiv:1802.02550
    """

    @checked
    def __init__(
        self,
        model: Program,
        guide: Program,
        num_steps: int = 10,
        step_size: float = 0.02,
        momentum: float = 0.5,
        max_change: float | None = 1.0,
        num_samples: int = 1,
        differentiate: bool = True,
        seed: int | None = 0,
    ) -> None:
        super().__init__(model, guide, num_steps)
        limited = max_change is None or max_change > 0
        if not step_size > 0 or not 0 <= momentum < 1 or num_samples < 1 or not limited:
            raise ValueError(
                f"got step_size={step_size}, momentum={momentum}, max_change={max_change}, num_samples={num_samples}, "
                "wanted a positive step_size, a momentum in [0, 1), a positive max_change or None, and at least one "
                "sample."
            )
        self.step_size = step_size
        self.momentum = momentum
        self.max_change = max_change
        self.num_samples = num_samples
        self.differentiate = differentiate
        self.seed = seed

    @property
    def rescoring(self) -> Rescoring:
        """As of the base guide; "impossible" where every run draws its own noise."""
        return "impossible" if self.num_steps and self.seed is None else super().rescoring

    def _refine(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        through = self.differentiate and torch.is_grad_enabled()
        with Heads(heads_of(self.guide)) as heads:
            start = self._run_guide(args, kwargs)
        refusal = None
        try:
            parts = {name: free_parameters(site["fn"]) for name, site in start.items()}
        except ValueError as error:
            parts, refusal = {}, error
        if refusal is not None and not heads.cover(start):
            raise ValueError(
                f"SemiAmortized cannot rebuild the guide's sites, {_list(start)}, from their parameters: {refusal}, "
                "and the guide has no posterior with a head and a family for each site. Take an Amortized posterior."
            ) from refusal
        if through:
            for name, site in start.items():
                if not twice_differentiable(site["fn"]):
                    raise ValueError(
                        f"guide site {name!r} ({kind(site['fn'])}) has samples with first derivatives only, so the "
                        "steps cannot be differentiated. Pass differentiate=False."
                    )
        if refusal is not None:
            return self._by_heads(heads, args, kwargs, through)
        if len(start) == 1:
            return self._by_parameters(start, parts, args, kwargs, through)
        return self._by_sites(parts, args, kwargs, through)

    def _by_parameters(
        self, start: Sites, parts: dict[str, tuple[Free, Build]], args: Any, kwargs: Any, through: bool
    ) -> Tensor:
        """One site: its parameters are known, and the encoder need not run again."""
        ((name, site),) = start.items()
        free, build = parts[name]

        def at(free: Free, changes: Free) -> Tensor:
            plates = Plates()
            with plates.of(site):
                moved = build({key: value + changes[key] for key, value in free.items()})
                return pyro.sample(name, moved, infer=site["infer"])

        still = free if through else {key: value.detach() for key, value in free.items()}
        changes = self._changes(lambda changes: lambda *_, **__: at(still, changes), free, args, kwargs, through)
        return at(free, changes)

    def _by_sites(self, parts: dict[str, tuple[Free, Build]], args: Any, kwargs: Any, through: bool) -> Any:
        """Several sites: later ones may depend on draws of earlier ones, so the guide runs again in every step."""
        like = {(name, key): value for name, (free, _) in parts.items() for key, value in free.items()}

        def moved(changes: Mapping[tuple[str, str], Tensor]) -> Program:
            by_site: dict[str, Free] = {name: {} for name in parts}
            for (name, key), change in changes.items():
                by_site[name][key] = change
            return Moved(by_site)(self.guide)

        changes = self._changes(moved, like, args, kwargs, through)
        return moved(changes)(*args, **kwargs)

    def _by_heads(self, heads: Heads, args: Any, kwargs: Any, through: bool) -> Any:
        """Families known by their heads: what the heads return is moved."""

        def moved(changes: Free) -> Program:
            def program(*args: Any, **kwargs: Any) -> Any:
                with Heads(heads.posteriors, changes):
                    return self.guide(*args, **kwargs)

            return program

        changes = self._changes(moved, heads.returned, args, kwargs, through)
        return moved(changes)(*args, **kwargs)

    def _changes(
        self,
        guide: Callable[[dict[_Key, Tensor]], Program],
        like: Mapping[_Key, Tensor],
        args: Any,
        kwargs: Any,
        through: bool,
    ) -> dict[_Key, Tensor]:
        """What the steps add to the parameters."""
        with torch.enable_grad(), hidden(), self._noise():
            changes = {key: torch.zeros_like(value, requires_grad=True) for key, value in like.items()}
            speeds = {key: torch.zeros_like(value) for key, value in like.items()}
            for _ in range(self.num_steps):
                table = draw(self.model, guide(changes), args, kwargs, self.num_samples, vectorize=False)
                target = table.log_weight.mean(0).sum()
                slopes = torch.autograd.grad(
                    target, list(changes.values()), create_graph=through, materialize_grads=True
                )
                for key, slope in zip(changes, slopes, strict=True):
                    speeds[key] = self.momentum * speeds[key] + self.step_size * slope
                    if self.max_change is not None:
                        speeds[key] = speeds[key].clamp(-self.max_change, self.max_change)
                    moved = changes[key] + speeds[key]
                    changes[key] = moved if through else moved.detach().requires_grad_()
        return changes if through else {key: change.detach() for key, change in changes.items()}

    @contextlib.contextmanager
    def _noise(self) -> Iterator[None]:
        if self.seed is None:
            yield
        else:
            with torch.random.fork_rng():
                torch.manual_seed(self.seed)
                yield


def _list(sites: Sites) -> str:
    return ", ".join(f"{name!r} ({kind(site['fn'])})" for name, site in sites.items())
