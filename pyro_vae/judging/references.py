"""Reference posteriors: many short Hamiltonian chains per datum, and whether they have converged; or a grid (`grids`).

C chains of B data start at draws of the guide and move together (see `hamiltonian`). R-hat compares the spread between
chains with that within them, and the bulk ESS says how many independent draws they are worth. A mode that the guide
misses altogether stays missed, with a good R-hat.

Reference: Vehtari et al., Rank-normalization, folding, and localization: an improved R-hat, 2021. arXiv:1903.08008
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from pyro.ops.stats import gelman_rubin
from torch import Tensor

from pyro_vae.judging.densities import Pair
from pyro_vae.judging.hamiltonian import Adaptation, State, transition
from pyro_vae.judging.results import Result, at_least, table
from pyro_vae.judging.sweeps import Sweep, sweep
from pyro_vae.options import of_pair
from pyro_vae.traces import Program


@dataclass(frozen=True)
class Reference(Result):
    """Draws from the posteriors of N data, with their diagnostics.

    Attributes:
        draws: Per latent site, (C, S, *plates, *event): (C, S, N, D) in a plain VAE.
        unconstrained: The same side by side in unconstrained coordinates, (C, S, N, U).
        rhat: Rank-normalised split R-hat, (N, U).
        ess: Bulk effective sample size, (N, U).
        acceptance: Mean probability of acceptance, (N,).
        step_size: Frozen after the warm-up, (N,).
    """

    draws: dict[str, Tensor]
    unconstrained: Tensor
    rhat: Tensor
    ess: Tensor
    acceptance: Tensor
    step_size: Tensor

    @property
    def converged(self) -> Tensor:
        """Whether, in every dimension, R-hat is below 1.05 and the bulk ESS above 100, (N,); the 1.01 that is advised
        for one number would, at the best of fifty dimensions, often be missed by chance."""
        return (self.rhat.amax(1) < 1.05) & (self.ess.amin(1) > 100)

    def rows(self) -> list[dict[str, Any]]:
        worst = {"rhat": self.rhat.amax(1), "ess": self.ess.amin(1)}
        return table(**worst, acceptance=self.acceptance, step_size=self.step_size, converged=self.converged)

    def __str__(self) -> str:
        chains, samples, count, _ = self.unconstrained.shape
        return (
            f"{chains} chains of {samples} draws for {count} data: R-hat at most {self.rhat.max():.3f}, ESS at least "
            f"{self.ess.min():.0f}, acceptance {self.acceptance.mean():.2f}, "
            f"{100 * self.converged.double().mean():.0f} % converged"
        )


@of_pair
def reference(
    model: Program,
    guide: Program,
    data: Any,
    *,
    num_samples: int = 500,
    num_chains: int = 8,
    num_warmup: int = 200,
    num_leapfrog: int = 5,
    target_acceptance: float = 0.8,
    seed: int | None = 0,
    device: str | torch.device | None = None,
    progress: bool | None = None,
) -> Reference:
    """Draw from the exact posterior of each datum, by Hamiltonian Monte Carlo from the guide.

    Its scale is the guide's in the first half of the warm-up, and the chains' own in the second; then all is frozen.

    Args:
        guide: A Pyro program for q(z | x), where the chains start.
        num_samples: S, draws kept of each chain.
        num_chains: C, at least 2.
        num_warmup: Moves that tune and are thrown away.
        num_leapfrog: Leapfrog steps a move.
        target_acceptance: Wanted probability of acceptance.
        model, data, seed, device, progress: As for `log_likelihood`.
    Returns:
        The draws, on the CPU, with R-hat and ESS; a warning says where they have not converged.
    Raises:
        ValueError: A setting out of range; a discrete, enumerated, point or auxiliary latent.
    Example:
        >>> import pyro.distributions as dist
        >>> from pyro_vae import Guide, Model
        >>> model = Model(lambda: dist.Normal(0.0, 1.0), lambda z: dist.Normal(z, 1.0))
        >>> guide = Guide(lambda x: dist.Normal(x, 1.0))
        >>> found = reference(model, guide, torch.full((3,), 2.0), num_chains=4, num_samples=500)
        >>> found.draws["z"].shape, bool(((found.draws["z"].mean((0, 1)) - 1).abs() < 0.15).all())
        (torch.Size([4, 500, 3]), True)
    """
    at_least(2, num_chains=num_chains)
    at_least(20, num_warmup=num_warmup)
    at_least(4, num_samples=num_samples)
    at_least(1, num_leapfrog=num_leapfrog)
    settings = num_chains, num_samples, num_warmup, num_leapfrog, target_acceptance
    with sweep(model, guide, data=data, batch_size=500, copies=num_chains, validate=False, seed=seed, device=device,
               progress=progress, title="HMC") as run:  # fmt: skip
        run.expect(len(run) * (num_warmup + num_samples))
        parts = run.each(lambda batch: _drawn(run, batch, *settings))
    us, sites, axes, accepted_all, steps = zip(*parts, strict=True)
    u = torch.cat(us, 2)
    draws = {name: torch.cat([part[name] for part in sites], axis) for name, axis in axes[0].items()}
    result = Reference(draws, u, *diagnostics(u), acceptance=torch.cat(accepted_all), step_size=torch.cat(steps))
    stuck = (~result.converged).nonzero().flatten().tolist()
    if stuck:
        warnings.warn(
            f"the chains of {len(stuck)} of {u.shape[2]} data have not converged (first: {stuck[:5]}; R-hat up to "
            f"{result.rhat.max():.2f}, ESS down to {result.ess.min():.0f}). Raise num_samples, num_warmup or "
            "num_leapfrog.",
            stacklevel=3,
        )
    return result


def _drawn(
    run: Sweep, batch: tuple[Any, ...], num_chains: int, num_samples: int, num_warmup: int, num_leapfrog: int,
    target_acceptance: float,
) -> tuple[Any, ...]:  # fmt: skip
    """The chains of one batch: u, (C, S, B, U), values by site with the axis of their data, acceptance and step."""
    pair = Pair(run.programs[0], run.programs[1], batch)
    density = pair.posterior_density()
    state = State.at(density, pair.from_guide(num_chains))
    state, step, scale = _warm_up(pair, density, state, num_warmup, num_leapfrog, target_acceptance, run)
    kept, accepted = [], torch.zeros_like(step)
    for _ in range(num_samples):
        state, acceptance = transition(state, density, step.new_ones(1), step, scale, num_leapfrog)
        kept.append(state.position.cpu())
        accepted += acceptance.mean(0)
        run.tick()
    u = torch.stack(kept, 1)  # (C, S, B, U)
    latents, _ = pair.latents.unpack(u.flatten(0, 1))
    draws = {name: z.unflatten(0, u.shape[:2]) for name, z in latents.items()}
    axes = {site.name: site.data_axis + 1 for site in pair.latents.sites}
    return u, draws, axes, accepted / num_samples, step


def diagnostics(draws: Tensor) -> tuple[Tensor, Tensor]:
    """Rank-normalised split R-hat and bulk effective sample size, of draws (C, S, *rest), S >= 4, (*rest) each.

    Example:
        >>> rhat, ess = diagnostics(torch.randn(4, 500, 3, generator=torch.Generator().manual_seed(0)))
        >>> bool((rhat < 1.01).all()), bool((ess > 1500).all())
        (True, True)
    """
    rest = draws.shape[2:]
    flat = draws.detach().cpu().double().reshape(*draws.shape[:2], -1)
    half = flat.shape[1] // 2  # each chain's two halves are chains of their own, without the middle of an odd number
    split = torch.cat([flat[:, :half], flat[:, -half:]])
    folded = (split - split.flatten(0, 1).quantile(0.5, dim=0)).abs()
    scores = _normal_scores(split)
    rhat = torch.maximum(*(gelman_rubin(s, chain_dim=0, sample_dim=1) for s in (scores, _normal_scores(folded))))
    return rhat.reshape(rest), _ess(scores).reshape(rest)


def _warm_up(
    pair: Pair, density: Any, state: State, num_warmup: int, num_leapfrog: int, target: float, run: Sweep
) -> tuple[State, Tensor, Tensor]:
    """Chains near the posterior, and the step size and scale to be frozen."""
    scale = pair.from_guide(64).std(0).clamp(min=1e-6)
    one = scale.new_ones(1)
    adaptation = Adaptation.start(torch.full_like(scale[:, 0], 0.5 / scale.shape[1] ** 0.25))
    total, squares, seen = torch.zeros_like(scale), torch.zeros_like(scale), 0
    half = num_warmup // 2
    for move in range(num_warmup):
        state, acceptance = transition(state, density, one, adaptation.log_step.exp(), scale, num_leapfrog)
        adaptation = adaptation.update(acceptance.mean(0), target)
        if half // 2 <= move < half:
            total, squares = total + state.position.mean(0), squares + state.position.square().mean(0)
            seen += 1
        if move + 1 == half:
            count = seen * len(state.position)
            variance = (squares / seen - (total / seen).square()).clamp(min=0) * count / (count - 1)
            # Few correlated draws: shrink towards what the guide says, with the weight of twenty.
            scale = ((count * variance + 20 * scale.square()) / (count + 20)).sqrt()
            adaptation = Adaptation.start(adaptation.averaged.exp())
        run.tick()
    return state, adaptation.averaged.exp(), scale


def _normal_scores(split: Tensor) -> Tensor:
    """Normal quantiles of the ranks (ties share their mean rank) over chains and draws."""
    flat = split.flatten(0, 1)
    ordered = flat.sort(0).values
    columns, values = ordered.T.contiguous(), flat.T.contiguous()
    low = torch.searchsorted(columns, values)
    high = torch.searchsorted(columns, values, right=True)
    rank = (low + high + 1).double().T / 2
    return torch.special.ndtri((rank - 0.375) / (len(flat) + 0.25)).reshape(split.shape)


def _ess(split: Tensor) -> Tensor:
    """Geyer's initial monotone sequence on the autocorrelation of all chains together."""
    chains, count, size = split.shape
    centred = split - split.mean(1, keepdim=True)
    length = 2 ** math.ceil(math.log2(2 * count))
    spectrum = torch.fft.rfft(centred, n=length, dim=1)
    covariance = torch.fft.irfft(spectrum.abs().square(), n=length, dim=1)[:, :count] / count
    covariance = covariance.mean(0)
    within = covariance[0] * count / (count - 1)
    variance = covariance[0] + (split.mean(1).var(0) if chains > 1 else 0)
    rho = 1 - (within - covariance) / variance
    rho[0] = 1.0
    # Sums of neighbouring pairs decrease for a reversible chain, up to the first that is not positive.
    last = max(-(-(count - 2) // 2) - 1, 0)
    pairs = rho[: 2 * last + 2].reshape(last + 1, 2, size).sum(1)
    positive = (pairs > 0).long().cumprod(0)
    ended = positive.sum(0).clamp(max=last)
    before = torch.arange(last + 1)[:, None] < ended
    even, pair = rho[2 * ended, torch.arange(size)], pairs[ended, torch.arange(size)]
    tau = -1 + 2 * torch.where(before, pairs.cummin(0).values, 0.0).sum(0)
    tau = tau + torch.where((even > 0) | (pair >= 0), even, 0.0)
    total = chains * count
    return total / tau.clamp(min=1 / math.log10(total))
