"""Guides that finish what the encoder began, by gradient steps for each datum.

An encoder has to give good parameters lambda(x) for every x at once, and what it misses
is the amortization gap. A few steps on each datum's own ELBO close most of it:

    lambda_0 = encoder(x),   lambda_{t+1} = lambda_t + e * grad ELBO(x; lambda_t)

The parameters are those of the distributions at the guide's sites, without constraints
(log sigma, the Cholesky factor with the logarithm of its diagonal, ...), or, for a
family that is not made of its parameters alone, such as a flow, all that its posterior's
head returns. The result is again a member of the base guide's family, so whatever the
base guide can do (score samples, an analytic KL), it can.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pyro
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

from pyro_vae.options import checked
from pyro_vae.programs.refined import Plates, Refined, Sites, hidden
from pyro_vae.reach import modules_of
from pyro_vae.sites import kind
from pyro_vae.traces import Program, draw
from pyro_vae.unconstrained import Build, Free, free_parameters


class SemiAmortized(Refined):
    """q(z | x): the base guide after a few gradient steps on its parameters, per datum.

    The steps climb the model's ELBO, with the gradient along reparameterised samples.
    Their noise is fresh at every step; its sequence is fixed by the seed, so that the
    guide is a function of the batch: it scores samples by the distribution that it
    draws them from. It is unaffected by scales, tempering and losses outside.

    What trains the encoder: with ``differentiate`` the loss is differentiated through
    the steps (at the price of second derivatives), so that the encoder learns to give
    parameters from which the steps go far, as in the paper. Without, the change is
    taken as a constant, and the encoder receives the gradient of the loss at the
    refined parameters: cheaper, and it pulls the encoder to where the steps end.

    One run costs the base guide once (twice for guides of several sites and for
    families known by their heads only, which also run it in every step) and per step
    the model and its gradient. The steps seed torch's generator, so a compiler that
    captures the program has to leave it as it is.

    Args:
        guide: The base guide, reparameterised.
        model: The model.
        steps: How many; at 0 the guide is its base guide.
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
        >>> from pyro_vae.programs.guide import Guide
        >>> from pyro_vae.programs.model import Model
        >>> model = Model(lambda: dist.Normal(torch.zeros(2), 1.0).to_event(1),
        ...               lambda z: dist.Normal(z, 1.0).to_event(1))
        >>> base = Guide(lambda x: dist.Normal(torch.zeros_like(x), 1.0).to_event(1))
        >>> SemiAmortized(base, model, steps=3)(torch.zeros(5, 2)).shape
        torch.Size([5, 2])

    Reference: Kim et al., Semi-Amortized Variational Autoencoders, 2018. arXiv:1802.02550
    """

    @checked
    def __init__(
        self,
        guide: Program,
        model: Program,
        steps: int = 10,
        step_size: float = 0.02,
        momentum: float = 0.5,
        max_change: float | None = 1.0,
        num_samples: int = 1,
        differentiate: bool = True,
        seed: int | None = 0,
    ) -> None:
        super().__init__(guide, model, steps)
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
    def rescoring(self) -> str:
        """As of the base guide; "impossible" where every run draws its own noise."""
        return "impossible" if self.steps and self.seed is None else super().rescoring

    def _refine(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        through = self.differentiate and torch.is_grad_enabled()
        with _Heads(self.guide) as heads:
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
                if not getattr(_innermost(site["fn"]), "twice_differentiable", True):
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
        like = {f"{name} {key}": value for name, (free, _) in parts.items() for key, value in free.items()}
        changes = self._changes(lambda changes: _Moved(changes)(self.guide), like, args, kwargs, through)
        return _Moved(changes)(self.guide)(*args, **kwargs)

    def _by_heads(self, heads: _Heads, args: Any, kwargs: Any, through: bool) -> Any:
        """Families known by their heads: what the heads return is moved."""

        def moved(changes: Free) -> Program:
            def program(*args: Any, **kwargs: Any) -> Any:
                with _Heads(self.guide, changes):
                    return self.guide(*args, **kwargs)

            return program

        changes = self._changes(moved, heads.returned, args, kwargs, through)
        return moved(changes)(*args, **kwargs)

    def _changes(
        self, guide: Callable[[Free], Program], like: Free, args: Any, kwargs: Any, through: bool
    ) -> Free:
        """What the steps add to the parameters."""
        with torch.enable_grad(), hidden(), self._noise():
            changes = {key: torch.zeros_like(value, requires_grad=True) for key, value in like.items()}
            speeds = {key: torch.zeros_like(value) for key, value in like.items()}
            for _ in range(self.steps):
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


class _Moved(Messenger):
    """Adds changes to the parameters of the distributions at a guide's sites."""

    def __init__(self, changes: Free) -> None:
        super().__init__()
        self.changes = changes

    def _pyro_sample(self, msg: Any) -> None:
        keys = [key for key in self.changes if key.split(" ")[0] == msg["name"]]
        if keys:
            free, build = free_parameters(msg["fn"])
            msg["fn"] = build({key: value + self.changes[f"{msg['name']} {key}"] for key, value in free.items()})


class _Heads:
    """What the heads of a guide's posteriors return, recorded, and changed where changes are given."""

    def __init__(self, guide: Program, changes: Free | None = None) -> None:
        # In every step: a module need not be searched for modules.
        owners = [guide] if isinstance(guide, nn.Module) else modules_of(guide)
        parts = {id(part): part for owner in owners for part in owner.modules()}
        self._heads: dict[str, Any] = {
            str(number): module.head
            for number, module in enumerate(parts.values())
            if isinstance(getattr(module, "head", None), nn.Module) and callable(getattr(module, "family", None))
        }
        self._changes = changes
        self._runs = 0
        self.returned: Free = {}

    def cover(self, sites: Sites) -> bool:
        """Whether as many heads ran as there are sites, once each."""
        return self._runs == len(self.returned) == len(sites)

    def __enter__(self) -> _Heads:
        self._hooks = [head.register_forward_hook(self._hook(name)) for name, head in self._heads.items()]
        return self

    def __exit__(self, *_: Any) -> None:
        for hook in self._hooks:
            hook.remove()

    def _hook(self, name: str) -> Callable[[nn.Module, Any, Tensor], Tensor | None]:
        def hook(_: nn.Module, __: Any, out: Tensor) -> Tensor | None:
            self._runs += 1
            self.returned[name] = out
            return None if self._changes is None else out + self._changes[name]

        return hook


def _innermost(distribution: Any) -> Any:
    while hasattr(distribution, "base_dist"):
        distribution = distribution.base_dist
    return distribution


def _list(sites: Sites) -> str:
    return ", ".join(f"{name!r} ({kind(site['fn'])})" for name, site in sites.items())
