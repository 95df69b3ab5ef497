"""Annealed importance sampling, and the bracket of log p(x) by running it both ways.

Chains are carried from f_0, the prior or the guide, to the posterior over the path of `hamiltonian`. Their weights

    log w = sum_{t=1}^{T} (b_t - b_{t-1}) (log p(x, u_{t-1}) - log f_0(u_{t-1})),   u_t ~ K_t(u_{t-1})

are unbiased estimates of p(x), so the log of the mean over C chains is, on average, a **lower** bound on log p(x). Run
backwards from an exact draw of the posterior with the same kernels, in reverse order, the weight has E[1 / w] =
1 / p(x). Where x itself was simulated, (z, x) ~ p(z) p(x | z), z is such a draw. One backward chain r beside C forward
ones gives an **upper** bound, and both close as T grows:

    E log (w_r + w_1 + ... + w_C) / (C + 1)  >=  log p(x)

References: Neal, Annealed importance sampling, 2001. arXiv:physics/9803008. Wu et al., On the quantitative analysis of
decoder-based generative models, 2017. arXiv:1611.04273. Brekelmans et al., Improving mutual information estimation with
annealed and energy-based bounds, 2022. arXiv:2303.06992
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_vae.inference.batches import seeded
from pyro_vae.inference.trees import joined
from pyro_vae.judging.densities import Pair
from pyro_vae.judging.evidence import Annealed, Bracket, steps_wanted
from pyro_vae.judging.hamiltonian import SCHEDULES, Moves, anneal, pilot
from pyro_vae.judging.results import Mean, at_least, averaged, one_of
from pyro_vae.judging.sweeps import Sweep, sweep
from pyro_vae.judging.weights import Scored
from pyro_vae.options import of_pair
from pyro_vae.traces import Program


@of_pair
def ais(
    model: Program,
    guide: Program | None,
    data: Any,
    *,
    num_samples: int = 16,
    num_steps: int = 500,
    start: str = "guide",
    num_leapfrog: int = 3,
    schedule: str = "adaptive",
    pilot_steps: int | None = None,
    pilot_chains: int = 8,
    target_acceptance: float = 0.75,
    pilot_seed: int = 1,
    seed: int | None = 0,
    device: str | torch.device | None = None,
    progress: bool | None = None,
    compile: bool | str = "auto",
) -> Annealed:
    """Estimate log p(x) by annealed importance sampling: a lower bound that closes with T.

    Args:
        guide: From the prior it only scales the moves, and may be None.
        num_samples: C, chains for each datum.
        num_steps: T, steps of the path; 1 is plain importance sampling.
        start: Where chains begin: "guide" or "prior".
        num_leapfrog: Leapfrog steps a move.
        schedule: "sigmoid", "linear" or "adaptive" (equal thermodynamic length, per datum).
        pilot_steps: Distributions of the pilot, which tunes step sizes and schedule; None for T / 4, of 50 to T.
        pilot_chains: Chains of the pilot.
        target_acceptance: Probability of acceptance that the pilot aims at.
        pilot_seed: Seed of the pilot.
        model, data, seed, device, progress, compile: As for `log_likelihood`; what is captured are the moves.
    Returns:
        The bound with its errors and diagnostics.
    Raises:
        ValueError: A setting out of range; a discrete, enumerated, point or auxiliary latent; from the guide, one that
            cannot score a sample that it did not draw.
    Example:
        >>> import pyro.distributions as dist
        >>> from pyro_vae import Guide, Model
        >>> model = Model(lambda: dist.Normal(0.0, 1.0), lambda z: dist.Normal(z, 1.0))
        >>> guide = Guide(lambda x: dist.Normal(x / 2, 0.5**0.5))
        >>> result = ais(model, guide, torch.zeros(3), num_samples=4, num_steps=5)
        >>> round(result.value, 4), round(result.mc_stderr, 4)   # the guide is exact: log N(0; 0, 2)
        (-1.2655, 0.0)
    """
    options = _Options(start, num_steps, num_samples, num_leapfrog, schedule, pilot_steps, pilot_chains,
                       target_acceptance, pilot_seed, compile)  # fmt: skip
    options.check(guide)
    with sweep(model, guide, data=data, batch_size=250, copies=num_samples, validate=False, seed=seed, device=device,
               progress=progress, title="AIS") as run:  # fmt: skip
        run.expect(len(run) * (options.moves + options.num_steps - 1))
        found = run.each(lambda batch: _forward(run, guide, batch, options)[:-2])
    return _annealed(found, options)


@of_pair
def bdmc(
    model: Program,
    guide: Program | None,
    data: Any,
    *,
    num_samples: int = 16,
    num_data: int = 100,
    num_steps: int = 500,
    start: str = "guide",
    num_leapfrog: int = 3,
    schedule: str = "adaptive",
    pilot_steps: int | None = None,
    pilot_chains: int = 8,
    target_acceptance: float = 0.75,
    pilot_seed: int = 1,
    observed: Mapping[str, int] | None = None,
    measure: bool = True,
    seed: int | None = 0,
    device: str | torch.device | None = None,
    progress: bool | None = None,
    compile: bool | str = "auto",
) -> Bracket:
    """Bracket log p(x) on data simulated from the model: bidirectional Monte Carlo.

    Data are simulated with their exact latents, in the shape of the given ones.

    Args:
        data: As for `fit`: what is not simulated (labels, masks) stays as it is here.
        model, guide, num_samples: As all other settings in `ais`.
        num_data: How many to simulate, at most as many as there are data.
        observed: Which argument each observed site is, by position, as {"x": 0}, where the values do not tell.
        measure: Where the chains have not converged, run others of a quarter of the steps, to say how many it takes.
    Returns:
        Both bounds with their errors; or, as `Bracket.reason` says, no bracket and why.
    Raises:
        ValueError: As for `ais`; or a site equals no argument, or several.
    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro_vae import Model
        >>> model = Model(lambda: dist.Normal(0.0, 1.0), lambda z: dist.Normal(z, 1.0))
        >>> bracket = bdmc(model, None, torch.zeros(50), start="prior", num_steps=100)
        >>> truth = dist.Normal(0.0, 2**0.5).log_prob(bracket.data[0]).mean()
        >>> bool(bracket.lower.value - 0.01 < truth < bracket.upper.value + 0.01), bracket.width.value < 0.05
        (True, True)

    Reference: Grosse et al., Sandwiching the marginal likelihood, 2015. arXiv:1511.02543
    """
    options = _Options(start, num_steps, num_samples, num_leapfrog, schedule, pilot_steps, pilot_chains,
                       target_acceptance, pilot_seed, compile)  # fmt: skip
    options.check(guide)
    if num_data < 1:
        raise ValueError(f"got num_data={num_data}, wanted at least one datum to simulate.")
    with sweep(model, guide, data=data, batch_size=min(num_data, 250), copies=num_samples, num_data=num_data,
               validate=False, seed=seed, device=device, progress=progress, title="BDMC") as run:  # fmt: skip
        run.expect(len(run) * (options.moves + 2 * options.num_steps - 2))

        def both_ways(batch: tuple[Any, ...], latents: dict[str, Tensor]) -> tuple[Any, ...]:
            *forward, pair, moves = _forward(run, guide, batch, options, passes=2)
            exact = pair.latents.pack({name: z.unsqueeze(0) for name, z in latents.items()})
            position = exact.expand(num_samples, -1, -1).clone()
            backward = anneal(moves, position, forward[0], backward=True, tick=run.tick)
            return tuple(forward), backward, batch

        found, backward, simulated = zip(*run.simulated(both_ways, num_data, observed), strict=True)
    bracket = _bracketed(_annealed(found, options), backward, joined(simulated))
    if bracket.reason is None or num_steps < 16 or not measure:
        return bracket
    # A second length says how fast the chains converge, and so how many steps it would take.
    shorter = bdmc(
        model, guide, data, num_data=num_data, observed=observed, seed=seed, device=device, progress=progress,
        measure=False, **options._asdict() | {"num_steps": num_steps // 4},
    )  # fmt: skip
    return replace(bracket, wanted_steps=steps_wanted(shorter, bracket))


def _bracketed(lower: Annealed, backward: Sequence[tuple[Tensor, Tensor]], data: tuple[Any, ...]) -> Bracket:
    """Both bounds, from the forward chains and those from the exact draws."""
    count = lower.num_samples
    weight = torch.cat([w.double().cpu() for w, _ in backward], 1)
    # One chain from the exact draw beside C from the start; averaged over which one it is.
    ahead, behind = lower.log_weight.logsumexp(0) - math.log(1 + count), weight - math.log(1 + count)
    upper = torch.logaddexp(ahead, behind)
    spread = upper.var(0) / count if count > 1 else torch.full_like(upper[0], math.nan)
    # The forward chains' share of the error, as a log of their mean has it; of the width what it does not cancel.
    share = torch.sigmoid(ahead - behind).mean(0)
    variances = [spread + (lower.pointwise_stderr * s).square() for s in (share, 1 - share)]
    return Bracket(
        lower=lower,
        upper=Mean.of(upper.mean(0), variances[0], count),
        width=Mean.of(upper.mean(0) - lower.pointwise, variances[1], count),
        backward_log_weight=weight,
        backward_acceptance=torch.cat([a.double().cpu() for _, a in backward]),
        data=data,
    )


class _Options(NamedTuple):
    start: str
    num_steps: int
    num_samples: int
    num_leapfrog: int
    schedule: str
    pilot_steps: int | None
    pilot_chains: int
    target_acceptance: float
    pilot_seed: int
    compile: bool | str

    @property
    def coarse(self) -> int:
        """Distributions of the pilot."""
        wanted = max(50, self.num_steps // 4) if self.pilot_steps is None else self.pilot_steps
        return max(2, min(wanted, self.num_steps))

    @property
    def moves(self) -> int:
        """Of the pilot."""
        return self.coarse + 9 if self.num_steps > 1 else 0

    def check(self, guide: Program | None) -> None:
        at_least(1, num_steps=self.num_steps, num_samples=self.num_samples, num_leapfrog=self.num_leapfrog)
        if self.pilot_chains < 2:
            raise ValueError(f"got pilot_chains={self.pilot_chains}, wanted at least 2 to average over.")
        one_of(SCHEDULES, schedule=self.schedule)
        one_of(("guide", "prior"), start=self.start)
        if not 0 < self.target_acceptance < 1:
            raise ValueError(f"got target_acceptance={self.target_acceptance}, wanted a probability such as 0.75.")
        if self.start == "guide" and guide is None:
            raise ValueError("got start='guide' without a guide. Pass one, or anneal from the prior: start='prior'.")


def _forward(
    run: Sweep, guide: Program | None, batch: tuple[Any, ...], options: _Options, passes: int = 1
) -> tuple[Any, ...]:
    """Kernels, log weights, acceptance of the forward chains; the pair and the moves for further ones."""
    programs = run.programs
    # Far from the seeds that people choose: a pilot is independent of the scored chains, and of exact draws.
    with seeded(2**48 + 2**20 * options.pilot_seed + run.number):
        pair = Pair(programs[0], guide, batch)
        density, compile = pair.path_density(options.start), options.compile
        moves = Moves(density, options.num_leapfrog, programs, passes * (options.num_steps - 1), compile)
        # Fewer chains make another graph, for which Inductor would be called a second time.
        first = Moves(density, options.num_leapfrog, programs, options.moves, bool(compile) and "auto")
        draws = pair.from_guide if options.start == "guide" else pair.from_prior
        # 64 draws know a standard deviation to 9 %, which is more than a scale need be.
        own = draws(64).var(0)
        both = torch.stack([own, own if guide is None else pair.from_guide(64).var(0)]).clamp(min=1e-12)
        kernels = pilot(
            first, draws(options.pilot_chains), 1 / both, name=options.schedule, num_steps=options.num_steps,
            pilot_steps=options.coarse, target_acceptance=options.target_acceptance, tick=run.tick,
        )  # fmt: skip
    log_weight, acceptance = anneal(moves, draws(options.num_samples), kernels, tick=run.tick)
    return kernels, log_weight, acceptance, pair, moves


def _annealed(found: Sequence[tuple[Any, ...]], options: _Options) -> Annealed:
    weight = torch.cat([w.cpu() for _, w, _ in found], 1)
    scored = Scored.of(weight)
    return Annealed(
        **averaged(scored.log_p, scored.log_p_variance), bias=scored.bias.mean().item(), ess=scored.ess,
        pointwise_stderr=scored.log_p_variance.sqrt(), log_weight=weight,
        acceptance=torch.cat([a.double().cpu() for _, _, a in found]), kernels=tuple(k for k, _, _ in found),
        start=options.start, num_steps=options.num_steps, num_samples=options.num_samples,
    )  # fmt: skip
