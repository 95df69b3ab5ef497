"""Guides that move their samples along the gradient of the model's log density.

Hamiltonian dynamics with log p(x, z) as (minus) the potential moves a sample of a simple
guide to where the posterior is, and the leapfrog integrator keeps volumes, so that the
density of what comes out is known without a Jacobian matrix. One step k = 1, ..., T is

    rho <- rho + e/2 * grad log p(x, z)
    z   <- z + e * rho
    rho <- a_k (rho + e/2 * grad log p(x, z))        a_k = sqrt(beta_{k-1} / beta_k)

The momentum starts hot, rho_0 ~ N(0, I / beta_0), and is cooled by a_k <= 1 down to beta_T = 1, so that samples travel
first and settle then. Only the cooling changes volumes: log |det| = D sum_k log a_k, which telescopes to D/2 log
beta_0. In the space of position and momentum the pair (z_T, rho_T) has the density

    log q(z_T, rho_T | x) = log q0(z_0 | x) + log N(rho_0; 0, I / beta_0) - D sum_k log a_k

and the model extends to p(x, z) N(rho; 0, I). Their ratio is an unbiased estimate of p(x), which makes its logarithm a
valid bound. But the guide's density of z_T alone is an integral over momenta that nobody knows: a sample that was not
just drawn cannot be scored.

How far to go depends on the datum. Steps in units of the base guide's standard deviations fit all scales of a
posterior; but where the base guide is close to the posterior already, heat only blurs it. The bound holds for any step
size that does not depend on the sample, so that it may be a function of the datum: a few are tried on draws of their
own, none at all among them, and the best that is above its error is taken.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask, sum_rightmost
from pyro.poutine.runtime import get_plates
from torch import Tensor, nn
from torch.distributions import constraints

from pyro_vae.options import checked
from pyro_vae.programs.refined import Plates, Refined, Sites, hidden
from pyro_vae.protocols import Rescoring, support
from pyro_vae.randomness import forked
from pyro_vae.sites import data_plate, kind, lengths, plates, sample_sites
from pyro_vae.traces import Program, draw

Phase = dict[str, Tensor]
# The step size of the default in standard deviations, the shares of it that are tried, and the draws that they are.
_UNITS, _SHARES, _DRAWS = 0.2, (1.0, 0.5, 0.25), 16


def tempered_leapfrog(
    gradient: Callable[[Phase], Phase],
    position: Phase,
    momentum: Phase,
    step_size: Tensor | Phase,
    cooling: Tensor,
) -> tuple[Phase, Phase]:
    """T leapfrog steps, after each of which the momentum is multiplied by a_k: from z_0 and rho_0, by name, to z_T and
    rho_T. The Jacobian's determinant is (prod_k a_k)^D; e is a number, one per dimension, or by name.

    Example:
        >>> at, one = {"z": torch.zeros(1)}, torch.tensor(1.0)
        >>> tempered_leapfrog(lambda z: {"z": -z["z"]}, at, {"z": torch.ones(1)}, one, torch.ones(2))
        ({'z': tensor([1.])}, {'z': tensor([-0.5000])})
    """
    e = dict.fromkeys(position, step_size) if isinstance(step_size, Tensor) else step_size
    slope = gradient(position)
    for factor in cooling:
        momentum = {name: rho + 0.5 * e[name] * slope[name] for name, rho in momentum.items()}
        position = {name: z + e[name] * momentum[name] for name, z in position.items()}
        slope = gradient(position)
        momentum = {name: factor * (rho + 0.5 * e[name] * slope[name]) for name, rho in momentum.items()}
    return position, momentum


class Hamiltonian(Refined):
    """q(z | x) whose samples go T leapfrog steps from a base guide's towards p(z | x).

    Every step costs a gradient of the model, and training differentiates through all of them, the model's second
    derivatives included. Step size and tempering are learned. With the default step size, outside of training, a datum
    takes it, a half or a quarter of it, or does not move, whichever gives the highest bound on 16 draws of their own
    (see above): its bound is then not below the base guide's. In training mode it is taken as it is, to be learned.
    A bound, but not a density of z: `log_q` and all that
    must score given samples refuse it, and so do estimators that do. Momenta are drawn outside of Pyro's sites, one for
    each sample and datum.

    Args:
        model: The model.
        guide: The base guide: one latent site or more, each over R^D and reparameterised.
        num_steps: T; at 0 the guide is its base guide.
        step_size: e at the start: one number, or a tensor (D,) for one per dimension. None starts at a fifth of the
            base guide's standard deviation (where that is unknown, of 1), and measures what helps each datum.
        tempering: "none" (beta = 1), "fixed" (1 / sqrt(beta_k) falls with k^2 from
            1 / sqrt(beta_0) to 1, beta_0 learned), or "free" (every a_k learned).
        beta: beta_0 at the start, between 0 and 1.
        seed: Of the draws on which step sizes are measured; None draws them anew in every run.
    Raises:
        ValueError: An option out of range; a base guide whose sites are points, not
            reparameterised, auxiliary, or not over R^D; a scale.
    Example:
        >>> from pyro_vae import Guide, Model
        >>> model = Model(lambda: dist.Normal(torch.zeros(2), 1.0).to_event(1),
        ...               lambda z: dist.Normal(z, 1.0).to_event(1))
        >>> base = Guide(lambda x: dist.Normal(torch.zeros_like(x), 1.0).to_event(1))
        >>> Hamiltonian(model, base, num_steps=3)(torch.zeros(5, 2)).shape
        torch.Size([5, 2])

    Reference: Caterini et al., Hamiltonian Variational Auto-Encoder, 2018. arXiv:1805.11328
    """

    @checked
    def __init__(
        self,
        model: Program,
        guide: Program,
        num_steps: int = 5,
        step_size: float | Tensor | None = None,
        tempering: str = "fixed",
        beta: float = 0.9,
        seed: int | None = 0,
    ) -> None:
        super().__init__(model, guide, num_steps)
        self.measured, self.seed = step_size is None, seed
        step_size = _UNITS if step_size is None else step_size
        start = torch.as_tensor(step_size, dtype=None if isinstance(step_size, Tensor) else torch.get_default_dtype())
        if not bool((start > 0).all()):
            raise ValueError(f"got step_size={step_size}, wanted positive numbers.")
        if tempering not in ("none", "fixed", "free"):
            raise ValueError(f'got tempering={tempering!r}, wanted "none", "fixed" or "free".')
        if not 0 < beta < 1:
            raise ValueError(f'got beta={beta}, wanted a number between 0 and 1. For beta = 1 use tempering="none".')
        self.tempering = tempering
        self.log_step_size = nn.Parameter(start.detach().clone().log())
        if tempering == "fixed":
            self.free_beta = nn.Parameter(start.new_tensor(beta).logit())
        elif tempering == "free":
            self.free_cooling = nn.Parameter(start.new_full((num_steps,), beta ** (0.5 / max(num_steps, 1))).logit())

    @property
    def rescoring(self) -> Rescoring:
        """ "impossible", except at 0 steps."""
        return "impossible" if self.num_steps else super().rescoring

    @property
    def cooling(self) -> Tensor:
        """a_k = sqrt(beta_{k-1} / beta_k), (T,); their product is sqrt(beta_0)."""
        if self.tempering == "free":
            return self.free_cooling.sigmoid()
        step_size = self.log_step_size
        if self.tempering == "none":
            return step_size.new_ones(self.num_steps)
        hottest = self.free_beta.sigmoid().rsqrt()  # 1 / sqrt(beta_0)
        done = torch.arange(self.num_steps + 1, dtype=step_size.dtype, device=step_size.device) / self.num_steps
        temperature = hottest + (1 - hottest) * done.square()
        return temperature[1:] / temperature[:-1]

    def _refine(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        # Particle plates outside: the samples, and so the trajectories, are as many.
        measures = self.measured and not self.training
        share = self._once(args, kwargs, lambda: self._best_share(args, kwargs)) if measures else None
        return self._run(share, args, kwargs, get_plates())

    def _run(self, share: Tensor | None, args: Any, kwargs: Mapping[str, Any], outer: tuple[Any, ...]) -> Any:
        """Draw z, by a share of the step size, one for all data or one each, (B,)."""
        start = self._run_guide(args, kwargs, outer)
        for name, site in start.items():
            _check(name, site)
        position, log_density = self._moved(start, share, args, kwargs, outer)
        opened, drawn = Plates(), {}
        for name, site in start.items():
            point = dist.Delta(position[name], log_density[name], site["fn"].event_dim, validate_args=False)
            with opened.of(site):
                drawn[name] = pyro.sample(name, point, infer=site["infer"])
        return drawn if len(drawn) > 1 else drawn[name]

    def _moved(
        self, start: Sites, share: Tensor | None, args: tuple[Any, ...], kwargs: Mapping[str, Any],
        outer: tuple[Any, ...],
    ) -> tuple[Phase, Phase]:  # fmt: skip
        """Where a draw of the base guide goes, and its log density there; by a step size for each datum, if given."""
        cooling = self.cooling
        log_cooling = cooling.log().sum()  # per dimension; log beta_0 / 2 in all
        position = {name: site["value"] for name, site in start.items()}
        noise = {name: torch.randn_like(z) for name, z in position.items()}
        momentum = {name: rho * (-log_cooling).exp() for name, rho in noise.items()}
        step_size = {name: self._step_size(site, share, args) for name, site in start.items()}
        gradient = functools.partial(
            self._gradient, args=args, kwargs=kwargs, outer=outer, through=torch.is_grad_enabled()
        )
        position, momentum = tempered_leapfrog(gradient, position, momentum, step_size, cooling)
        log_density = {}
        for name, site in start.items():
            event_dim, dimensions = site["fn"].event_dim, math.prod(site["fn"].event_shape)
            log_start = scale_and_mask(site["fn"].log_prob(site["value"]), mask=site["mask"])
            log_momentum = sum_rightmost(_log_normal(noise[name]), event_dim) + dimensions * log_cooling
            log_end = sum_rightmost(_log_normal(momentum[name]), event_dim)
            log_density[name] = log_start + log_momentum - log_end - dimensions * log_cooling  # of the volume
        return position, log_density

    def _step_size(self, site: Any, share: Tensor | None, args: tuple[Any, ...]) -> Tensor:
        """e of one site: a number, one per dimension, or one per datum and dimension."""
        step_size = self.log_step_size.exp()
        if not self.measured:
            return step_size
        with contextlib.suppress(NotImplementedError, AttributeError):
            step_size = step_size * site["fn"].stddev
        if share is None or share.dim() == 0:
            return step_size if share is None else step_size * share
        dim, _ = data_plate({(dim, frame.size) for dim, frame in plates(site).items()}, lengths(args))
        return step_size * share.reshape(-1, *[1] * (site["fn"].event_dim - dim - 1))

    def _best_share(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        """The share of the step size that raises each datum's bound most, above twice its error; else 0. (B,)."""
        seed = int(torch.randint(2**31, ()).item()) if self.seed is None else self.seed
        bounds = []
        with forked(), torch.no_grad(), hidden():
            for share in (0.0, *_SHARES):
                torch.manual_seed(seed)  # the same draws for all
                step_share = self.log_step_size.new_tensor(share)
                moves = functools.partial(lambda of, *args, **kwargs: self._run(of, args, kwargs, ()), step_share)
                bounds.append(draw(self.model, moves, args, kwargs, _DRAWS, vectorize=False).log_weight)
        gains = torch.stack([bound - bounds[0] for bound in bounds[1:]])  # (shares, K, B)
        gain, best = gains.mean(1).nan_to_num(-math.inf).max(0)
        error = gains.std(1).gather(0, best[None])[0] / _DRAWS**0.5
        return torch.where(gain > 2 * error, gain.new_tensor(_SHARES)[best], 0.0)

    def _gradient(
        self, position: Phase, args: tuple[Any, ...], kwargs: Mapping[str, Any], outer: tuple[Any, ...], through: bool
    ) -> Phase:
        """The gradient of log p(x, z) in z, at every sample and datum."""
        with torch.enable_grad():
            ready = {n: z if through and z.requires_grad else z.detach().requires_grad_() for n, z in position.items()}
            with hidden(outer):
                trace = poutine.trace(poutine.condition(self.model, data=ready)).get_trace(*args, **kwargs)
            total = torch.zeros((), device=next(iter(ready.values())).device)
            for site in sample_sites(trace):
                if not site["is_observed"]:
                    raise ValueError(
                        f"latent site {site['name']!r} of the model has no counterpart in the guide, which has "
                        f"{list(ready)}."
                    )
                total = total + scale_and_mask(site["fn"].log_prob(site["value"]), mask=site["mask"]).sum()
            found = torch.autograd.grad(total, list(ready.values()), create_graph=through)
        return dict(zip(ready, found, strict=True))


def _log_normal(value: Tensor) -> Tensor:
    return -0.5 * (value.square() + math.log(2 * math.pi))


def _check(name: str, site: Any) -> None:
    if site["infer"].get("is_auxiliary"):
        raise ValueError(f"Hamiltonian cannot move auxiliary guide site {name!r}, which is not the model's.")
    lies = support(site["fn"])
    if lies is not None and lies is not constraints.real:
        raise ValueError(
            f"Hamiltonian moves guide site {name!r} ({kind(site['fn'])}) out of its support, {lies}, wanted a site "
            "over all of R^D. Transform the latent inside of the model instead."
        )
