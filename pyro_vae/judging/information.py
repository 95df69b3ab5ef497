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
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from pyro_vae.evaluation import evaluating
from pyro_vae.inference.batches import Batches
from pyro_vae.inference.columns import rows as row_count
from pyro_vae.inference.memory import reused_memory
from pyro_vae.inference.trees import at
from pyro_vae.judging.components import Components
from pyro_vae.judging.densities import FixedScorer, Scorer
from pyro_vae.judging.estimates import particle_batches
from pyro_vae.options import checked
from pyro_vae.parameters import device_of
from pyro_vae.traces import Particles, Program, draw, log_q, plate_nesting

_CHUNK = 2**22


@dataclass(frozen=True)
class RateDistortion:
    """The two parts of minus the ELBO, averaged over data, in nats.

    Attributes:
        rate: R = E KL(q(z | x) || p(z)).
        distortion: D = -E log p(x | z).
        rate_stderr: Monte Carlo standard error of the rate, given these data.
        distortion_stderr: The same of the distortion.
        rate_data_stderr: Standard error of the rate for the population of the data.
        distortion_data_stderr: The same of the distortion.
        num_data: N.
        num_samples: K, per datum.
    """

    rate: float
    distortion: float
    rate_stderr: float
    distortion_stderr: float
    rate_data_stderr: float
    distortion_data_stderr: float
    num_data: int
    num_samples: int

    @property
    def elbo(self) -> float:
        """-(R + D)."""
        return -(self.rate + self.distortion)

    def __str__(self) -> str:
        return (
            f"rate {self.rate:.2f} ± {self.rate_stderr:.2f} (data ± {self.rate_data_stderr:.2f}), distortion "
            f"{self.distortion:.2f} ± {self.distortion_stderr:.2f} (data ± {self.distortion_data_stderr:.2f}) nats, "
            f"over {self.num_data} data with {self.num_samples} samples each"
        )


@dataclass(frozen=True)
class MutualInformation:
    """What the latents say about the data, in nats.

    Attributes:
        value: I_q(x; z) by the leave-in estimate: exact for these N data, a lower bound for their population.
        stderr: Its standard error for the population, by the jackknife over data.
        upper: The leave-one-out estimate: an upper bound for the population, infinite where posteriors hardly overlap.
        upper_stderr: Its standard error.
        limit: log N, which the value cannot exceed.
        rate: R = E log q(z | x) / p(z) from the same samples.
        rate_stderr: Its standard error.
        marginal_kl: KL(q(z) || p(z)) = R - I, from above for the population.
        marginal_kl_stderr: Its standard error.
        num_data: N.
        num_samples: Samples per datum.
    """

    value: float
    stderr: float
    upper: float
    upper_stderr: float
    limit: float
    rate: float
    rate_stderr: float
    marginal_kl: float
    marginal_kl_stderr: float
    num_data: int
    num_samples: int

    @property
    def saturated(self) -> bool:
        """Whether the value is within half a nat of its limit, and so says nothing about the population."""
        return self.value > self.limit - 0.5

    def __str__(self) -> str:
        text = (
            f"I(x; z) = {self.value:.2f} ± {self.stderr:.2f} to {self.upper:.2f} ± {self.upper_stderr:.2f} nats, "
            f"KL(q(z) || p(z)) <= {self.marginal_kl:.2f} ± {self.marginal_kl_stderr:.2f}, of a rate of {self.rate:.2f} "
            f"± {self.rate_stderr:.2f} ({self.num_data} data, {self.num_samples} samples each; limit log N = "
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
    device: str | torch.device | None = None,
    seed: int | None = 0,
    progress: bool | None = None,
) -> RateDistortion:
    """Rate and distortion of a pair.

    Args:
        model: A Pyro program for p(x, z).
        guide: A Pyro program for q(z | x).
        data: As for `fit`.
        num_samples: K, samples averaged per datum.
        device: Where the batches go; where the modules are when not given.
        seed: Seed of the samples; None goes on with torch's random state.
        progress: Show a bar; None shows it on a terminal only.
    Returns:
        Both with their errors.
    Raises:
        ValueError: K < 1, a guide without density, and all that `particles` refuses.

    Reference: Alemi et al., Fixing a broken ELBO, 2018. arXiv:1711.00464
    """
    means, variances = [], []
    with evaluating(model, guide, seed=seed), reused_memory():
        for chunks in particle_batches(model, guide, data, num_samples, device, progress, "rate"):
            tables = [(c.log_likelihood - c.log_weight, -c.log_likelihood) for c in chunks]
            both = torch.stack([torch.cat(column).double().cpu() for column in zip(*tables, strict=True)])  # (2, K, B)
            means.append(both.mean(1))
            variances.append(both.var(1) / num_samples if num_samples > 1 else torch.full_like(both[:, 0], math.nan))
    mean = torch.cat(means, 1)
    count = mean.shape[1]
    mc = (torch.cat(variances, 1).sum(1).sqrt() / count).tolist()
    population = (mean.std(1) / math.sqrt(count)).tolist() if count > 1 else [math.nan, math.nan]
    rate, distortion = mean.mean(1).tolist()
    return RateDistortion(rate, distortion, mc[0], mc[1], population[0], population[1], count, num_samples)


@checked
def mutual_information(
    model: Program,
    guide: Program,
    data: Any,
    *,
    num_data: int = 2000,
    num_samples: int = 1,
    batch_size: int = 200,
    device: str | torch.device | None = None,
    seed: int | None = 0,
    progress: bool | None = None,
) -> MutualInformation:
    """Mutual information of data and latents under the guide, and what is wasted on the prior's mismatch.

    Every sample is scored under the posterior of every datum: N^2 densities.

    Args:
        model: A Pyro program for p(x, z).
        guide: A Pyro program for q(z | x).
        data: As for `fit`.
        num_data: N: the first so many of the data.
        num_samples: Samples per datum.
        batch_size: Data at a time.
        device: Where the batches go; where the modules are when not given.
        seed: Seed of the samples; None goes on with torch's random state.
        progress: Show a bar; None shows it on a terminal only.
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
        >>> found.value, found.upper, found.marginal_kl
        (0.0, 0.0, 0.0)

    Reference: Hoffman and Johnson, ELBO surgery, 2016.
    """
    with evaluating(model, guide, seed=seed):
        place = device_of(model, guide) if device is None else device
        batches = Batches(data, batch_size, place, shuffle=False, programs=(model, guide))
        args, draws, rates = _collected(model, guide, batches, num_data, num_samples)
        components = Components(model, args[0])
        sizes = [len(rate) for rate in rates]
        count = sum(sizes)
        if count < 3:
            raise ValueError(f"got {count} data, wanted at least three, of which latents could tell one. "
                             "Give more data.")
        scorers = [_scorer(guide, batch, drawn) for batch, drawn in zip(args, draws, strict=True)]
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        terms = torch.zeros(2, count, dtype=torch.float64)  # of lower and upper, per datum
        without = torch.zeros(2, count, dtype=torch.float64)  # sum of the log aggregate at others' samples without it
        bar = tqdm(draws, desc="I(x; z)", disable=None if progress is None else not progress, leave=False)
        for start, size, drawn in zip(starts, sizes, bar, strict=True):
            own = torch.arange(start, start + size).repeat(num_samples)
            rows = {name: components.rows(name, drawn.latents[name]) for name in components.sites}
            step = max(1, _CHUNK // (max(sizes) * len(components.names)))
            for first in range(0, len(own), step):
                part = {name: z[first : first + step] for name, z in rows.items()}
                table = torch.cat([_scores(s, components, part, n) for s, n in zip(scorers, sizes, strict=True)], 1)
                _accumulate(table.double().cpu(), own[first : first + step], terms, without)
    terms, without = terms / num_samples, without / num_samples
    rate = torch.cat(rates)
    # Leaving datum j out: its own term is gone, and its posterior from the aggregate at all other samples.
    others = torch.tensor([[count], [count - 1]], dtype=torch.float64)
    left_out = (terms.sum(1, keepdim=True) - terms + without) / (count - 1) + torch.log((others - 1) / others)
    rate_left_out = (rate.sum() - rate) / (count - 1)
    lower, upper = terms.mean(1).tolist()
    return MutualInformation(
        value=lower,
        stderr=_jackknife(left_out[0]),
        upper=upper,
        upper_stderr=_jackknife(left_out[1]),
        limit=math.log(count),
        rate=rate.mean().item(),
        rate_stderr=_jackknife(rate_left_out),
        marginal_kl=rate.mean().item() - lower,
        marginal_kl_stderr=_jackknife(rate_left_out - left_out[0]),
        num_data=count,
        num_samples=num_samples,
    )


def _collected(
    model: Program, guide: Program, batches: Batches, num_data: int, num_samples: int
) -> tuple[list[tuple[Any, ...]], list[Particles], list[Tensor]]:
    """Batches up to N data, their draws, and the rate per datum, (B,) each."""
    args, draws, rates = [], [], []
    nesting = plate_nesting(model, guide, *batches.first()) if num_samples > 1 else 0
    left = num_data
    for batch in batches:
        if left <= 0:
            break
        size = row_count(batch)
        if size > left:
            batch = at(batch, slice(left))
        particles = draw(model, guide, batch, {}, num_samples, max_plate_nesting=nesting)
        rate = particles.log_likelihood - particles.log_weight  # refuses points
        extra = [name for name in particles.log_q if name not in particles.log_prior]
        if extra:
            raise ValueError(
                f"guide site {extra[0]!r} is auxiliary: the density q(z | x) without it is not known, and the "
                "information in z neither. Use rate_distortion, which needs none."
            )
        args.append(batch)
        draws.append(particles)
        rates.append(rate.double().mean(0).cpu())
        left -= size
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


def _accumulate(table: Tensor, own: Tensor, terms: Tensor, without: Tensor) -> None:
    """Add the samples of (rows, N) to the terms of their data, and to what leaving out each other datum changes."""
    count = table.shape[1]
    place = own.unsqueeze(1)
    density = table.gather(1, place).squeeze(1)
    others = table.scatter(1, place, -math.inf)
    for row, (scores, size) in enumerate(((table, count), (others, count - 1))):
        terms[row].index_add_(0, own, density - torch.logsumexp(scores, 1) + math.log(size))
        share = torch.softmax(scores, 1).nan_to_num(0.0).clamp(max=1 - 1e-12).scatter(1, place, 0.0)
        without[row] -= torch.log1p(-share).sum(0)


def _jackknife(left_out: Tensor) -> float:
    """Standard error from the estimates without each datum."""
    count = len(left_out)
    return math.sqrt((count - 1) * left_out.var(correction=0).item())
