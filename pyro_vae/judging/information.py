"""How much the latents say about the data: rate, distortion, and mutual information.

The ELBO is a rate and a distortion, in nats per datum,

    ELBO = -(R + D),   R = E_x KL(q(z | x) || p(z)),   D = -E_x E_q log p(x | z),

and the rate is what z tells about x plus what is wasted on a mismatch of the aggregate
posterior q(z) = E_x q(z | x) with the prior,

    R = I_q(x; z) + KL(q(z) || p(z)),   I_q(x; z) = E log q(z | x) / q(z).

For N data and q_N(z) = 1/N sum_m q(z | x_m),

    lower:  E log q(z_n | x_n) / (1/N sum_m q(z_n | x_m))            (leave-in)
    upper:  E log q(z_n | x_n) / (1/(N-1) sum_{m != n} q(z_n | x_m)) (leave-one-out)

The leave-in estimate is the information about *which of these N data* it was, and no
approximation of that. For the population of the data it is a lower bound in expectation,
and the leave-one-out estimate an upper one. The first cannot exceed log N: near this
limit it says only that z tells all N data apart.

References: Hoffman and Johnson, ELBO surgery: yet another way to carve up the variational
evidence lower bound, 2016. Alemi et al., Fixing a broken ELBO, 2018. arXiv:1711.00464.
Poole et al., On variational bounds of mutual information, 2019. arXiv:1905.06922
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pyro_vae.judging.components import Components, FixedScorer, Scorer
from pyro_vae.judging.estimates import moments
from pyro_vae.judging.results import Mean, Measured
from pyro_vae.judging.sweeps import Sweep, sweep
from pyro_vae.options import checked
from pyro_vae.traces import Particles, Program, log_q

_CHUNK = 2**22  # log densities that are held at once


@dataclass(frozen=True)
class RateDistortion(Measured):
    """The ELBO and its two parts with their errors, averaged over data, in nats: value = -(rate + distortion).

    Attributes:
        value: The ELBO.
        mc_stderr: Its Monte Carlo standard error, given these data.
        data_stderr: Its standard error for the population of the data.
        pointwise: It per datum, (N,).
        num_samples: K, per datum.
        rate: R = E KL(q(z | x) || p(z)).
        distortion: D = -E log p(x | z).
    """

    value: float
    mc_stderr: float
    data_stderr: float
    pointwise: Tensor
    num_samples: int
    rate: Mean
    distortion: Mean

    def __str__(self) -> str:
        over = f"{len(self.pointwise)} data, {self.num_samples} samples each"
        return f"rate {self.rate.said}, distortion {self.distortion.said}, {over}"


@dataclass(frozen=True)
class MutualInformation(Measured):
    """What the latents say about the data, in nats. All `data_stderr` are by the jackknife over data.

    Attributes:
        value: I_q(x; z) by the leave-in estimate: exact for these N data, a lower bound for their population.
        mc_stderr: Its Monte Carlo standard error, given these data; nan for one sample per datum, as of all parts.
        data_stderr: Its standard error for the population of the data.
        pointwise: Its terms per datum, (N,).
        num_samples: Samples per datum.
        upper: The leave-one-out estimate: an upper bound for the population, infinite where posteriors hardly overlap.
        rate: R = E log q(z | x) / p(z) from the same samples.
        marginal_kl: KL(q(z) || p(z)) = R - I, from above for the population.
        limit: log N, which the value cannot exceed.
    """

    value: float
    mc_stderr: float
    data_stderr: float
    pointwise: Tensor
    num_samples: int
    upper: Mean
    rate: Mean
    marginal_kl: Mean
    limit: float

    @property
    def saturated(self) -> bool:
        """Whether the value is within half a nat of its limit, and so says nothing about the population."""
        return self.value > self.limit - 0.5

    def __str__(self) -> str:
        def said(part: Any) -> str:
            return f"{part.value:.2f} ± {part.data_stderr:.2f}"

        text = (
            f"I(x; z) = {said(self)} to {said(self.upper)} nats, KL(q(z) || p(z)) <= {said(self.marginal_kl)}, of a "
            f"rate of {said(self.rate)} ({len(self.pointwise)} data, {self.num_samples} samples each; limit log N = "
            f"{self.limit:.2f})"
        )
        if self.saturated:
            text += "; at its limit: z tells these data apart, and how much more it says they are too few to show"
        return text


@checked
def rate_distortion(
    model: Program,
    guide: Program,
    data: Any,
    *,
    num_samples: int = 100,
    seed: int | None = 0,
    device: str | torch.device | None = None,
    progress: bool | None = None,
    compile: bool | str = "auto",
) -> RateDistortion:
    """Rate and distortion of a pair.

    Args:
        num_samples: K, samples averaged per datum.
        model, guide, data, seed, device, progress, compile: As for `log_likelihood`.
    Returns:
        Both with their errors.
    Raises:
        ValueError: K < 1, a guide without density, and all that `particles` refuses.

    Reference: Alemi et al., Fixing a broken ELBO, 2018. arXiv:1711.00464
    """
    with sweep(model, guide, data=data, seed=seed, device=device, progress=progress, title="rate") as run:
        bound, likelihood, rate = moments(run, num_samples, compile)
    distortion = replace(likelihood, value=-likelihood.value, pointwise=-likelihood.pointwise)
    return RateDistortion(
        bound.value, bound.mc_stderr, bound.data_stderr, bound.pointwise, num_samples, rate=rate, distortion=distortion
    )


@checked
def mutual_information(
    model: Program,
    guide: Program,
    data: Any,
    *,
    num_samples: int = 1,
    num_data: int = 2000,
    seed: int | None = 0,
    device: str | torch.device | None = None,
    progress: bool | None = None,
) -> MutualInformation:
    """Mutual information of data and latents under the guide, and what is wasted on the prior's mismatch.

    Every sample is scored under the posterior of every datum: N^2 densities.

    Args:
        num_samples: Samples per datum.
        num_data: N: the first so many of the data.
        model, guide, data, seed, device, progress: As for `log_likelihood`.
    Returns:
        The information from below and above, the rate, and the marginal KL.
    Raises:
        ValueError: Fewer than three data; a guide with a point or auxiliary site, one that cannot score a sample
            that it did not draw, or one that is random beyond its draw.
    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(0 * x, 1.0))
        >>> found = mutual_information(model, guide, torch.zeros(50))
        >>> found.value, found.upper.value, found.marginal_kl.value
        (0.0, 0.0, 0.0)

    Reference: Hoffman and Johnson, ELBO surgery, 2016.
    """
    with sweep(model, guide, data=data, batch_size=200, copies=num_samples, num_data=num_data, seed=seed,
               device=device, progress=progress, title="I(x; z)") as run:  # fmt: skip
        args, draws, rates = _collected(run, num_samples)
        components = Components(model, args[0])
        sizes = [rate.shape[1] for rate in rates]
        count = sum(sizes)
        if count < 3:
            raise ValueError(f"got {count} data, wanted at least three, of which latents could tell one. "
                             "Give more data.")
        scorers = [_scorer(guide, batch, drawn) for batch, drawn in zip(args, draws, strict=True)]
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        # Of lower and upper bound, per sample and datum; and what leaving one datum out adds to others' samples.
        terms = torch.zeros(2, num_samples, count, dtype=torch.float64)
        without = torch.zeros(2, count, dtype=torch.float64)
        run.expect(len(draws))
        for start, size, drawn in zip(starts, sizes, draws, strict=True):
            own = torch.arange(start, start + size).repeat(num_samples)
            rows = {name: components.rows(name, drawn.latents[name]) for name in components.sites}
            step = max(1, _CHUNK // (max(sizes) * len(components.names)))
            scored = []
            for first in range(0, len(own), step):
                part = {name: z[first : first + step] for name, z in rows.items()}
                table = torch.cat([_scores(s, components, part, n) for s, n in zip(scorers, sizes, strict=True)], 1)
                scored.append(_terms(table.double().cpu(), own[first : first + step], without))
            terms[:, :, start : start + size] = torch.cat(scored, 1).reshape(2, num_samples, size)
            run.tick()
    rate = torch.cat(rates, 1)
    values = torch.stack([*terms, rate, rate - terms[0]])  # (4, K, N)
    mean = values.mean(1)
    spread = values.var(1) / num_samples if num_samples > 1 else torch.full_like(mean, math.nan)
    # Leaving datum j out: its own term is gone, and its posterior from the aggregate at all other samples.
    others = torch.tensor([[count], [count - 1]], dtype=torch.float64)
    left_out = mean.sum(1, keepdim=True) - mean
    left_out[:2] += without / num_samples
    left_out /= count - 1
    left_out[:2] += torch.log((others - 1) / others)
    left_out[3] = left_out[2] - left_out[0]
    lower, upper, rated, marginal = (
        replace(Mean.of(m, v, num_samples), data_stderr=_jackknife(out))
        for m, v, out in zip(mean, spread, left_out, strict=True)
    )
    return MutualInformation(
        lower.value, lower.mc_stderr, lower.data_stderr, lower.pointwise, num_samples, upper, rated, marginal,
        math.log(count),
    )  # fmt: skip


def _collected(
    run: Sweep, num_samples: int
) -> tuple[list[tuple[Any, ...]], list[Particles], list[Tensor]]:
    """Batches, their draws, and the terms of the rate, (K, B) each."""
    args, draws, rates = [], [], []
    for batch in run:
        particles = run.draw(batch, num_samples)
        rate = particles.log_likelihood - particles.log_weight  # refuses points
        extra = [name for name in particles.log_q if name not in particles.log_prior]
        if extra:
            raise ValueError(
                f"guide site {extra[0]!r} is auxiliary: the density q(z | x) without it is not known, and the "
                "information in z neither. Use rate_distortion, which needs none."
            )
        args.append(batch)
        draws.append(particles)
        rates.append(rate.double().cpu())
    return args, draws, rates


def _scorer(guide: Program, batch: tuple[Any, ...], drawn: Particles) -> Scorer | FixedScorer:
    """Scores latents under the posteriors of a batch, once it has scored the batch's own draws as it drew them."""
    again = log_q(guide, {name: z[:1] for name, z in drawn.latents.items()}, *batch)
    first = sum(score[:1] for score in drawn.log_q.values())
    if not torch.allclose(again, torch.as_tensor(first), rtol=1e-3, atol=1e-2):
        raise ValueError(
            "the guide scores its own draws differently a second time, though its networks are in evaluation mode: it "
            "draws noise that no site knows of, such as torch.randn or F.dropout(..., training=True) in its code. Make "
            "that noise a sample site, or leave it out."
        )
    scorer = Scorer(guide, batch)
    return FixedScorer(scorer) if len(scorer.sites) == 1 else scorer


def _scores(scorer: Scorer | FixedScorer, components: Components, rows: dict[str, Tensor], size: int) -> Tensor:
    """log q(z_i | x_j) of each row under each of B data, (rows, B)."""
    shared = {name: components.shared(name, z, size) for name, z in rows.items()}
    return torch.stack(list(scorer(shared).values())).sum(0)


def _terms(table: Tensor, own: Tensor, without: Tensor) -> Tensor:
    """Both terms of samples (rows, N), (2, rows); adds what leaving out each other datum changes."""
    count = table.shape[1]
    place = own.unsqueeze(1)
    density = table.gather(1, place).squeeze(1)
    others = table.scatter(1, place, -math.inf)
    found = []
    for row, (scores, size) in enumerate(((table, count), (others, count - 1))):
        found.append(density - torch.logsumexp(scores, 1) + math.log(size))
        share = torch.softmax(scores, 1).nan_to_num(0.0).clamp(max=1 - 1e-12).scatter(1, place, 0.0)
        without[row] -= torch.log1p(-share).sum(0)
    return torch.stack(found)


def _jackknife(left_out: Tensor) -> float:
    """Standard error from the estimates without each datum."""
    count = len(left_out)
    return math.sqrt((count - 1) * left_out.var(correction=0).item())
