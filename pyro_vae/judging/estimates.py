"""Estimates of log p(x) and of the ELBO, which never travel without their errors.

With w_k = p(x, z_k) / q(z_k | x), the mean weight is an unbiased estimate of p(x); its
logarithm is biased downwards by about Var(w) / (2 K p(x)^2), which the jackknife
measures. Two errors are told apart: that of the Monte Carlo sum for these data, and
that of these data for the population they come from.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from pyro_vae.inference.batches import Batches, seeded
from pyro_vae.judging.psis import khat_limit, pareto_k
from pyro_vae.parameters import device_of, own_parameters
from pyro_vae.traces import Particles, Program, draw, plate_nesting

# Floats per tensor of decoder output: large enough to hide Python, small enough for the caches.
_CHUNK = 2**22


@dataclass(frozen=True)
class Estimate:
    """An estimate of log p(x), averaged over data, in nats.

    Attributes:
        value: Mean over the data of log 1/K sum_k w_k.
        mc_stderr: Monte Carlo standard error of the value, given these data.
        data_stderr: Standard error of the value for the population of the data.
        bias: Jackknife estimate of the bias of the value (negative: it is too low).
        pointwise: log 1/K sum_k w_k per datum, (N,).
        ess: Effective number of samples per datum, (sum w)^2 / sum w^2, (N,).
        pareto_k: k-hat per datum, (N,).
        num_samples: K.
    """

    value: float
    mc_stderr: float
    data_stderr: float
    bias: float
    pointwise: Tensor
    ess: Tensor
    pareto_k: Tensor
    num_samples: int

    @property
    def khat_ok(self) -> float:
        """Share of the data whose k-hat is below `khat_limit`; nan where K is too small to say."""
        if self.pareto_k.isnan().all():
            return math.nan
        return (self.pareto_k < khat_limit(self.num_samples)).double().mean().item()

    def __str__(self) -> str:
        text = f"log p(x) = {self.value:.2f} ± {self.mc_stderr:.2f} (Monte Carlo; data ± {self.data_stderr:.2f}) nats"
        if math.isnan(self.khat_ok):
            return f"{text}, k̂ unknown at K = {self.num_samples}"
        text += f", k̂ ok for {100 * self.khat_ok:.1f} %"
        if self.khat_ok < 0.9:
            text += " (unreliable: read it as a lower bound, and raise num_samples or enrich the guide)"
        return text


@dataclass(frozen=True)
class ElboTerms:
    """The ELBO and its two terms, averaged over data, in nats: value = reconstruction - kl.

    Attributes:
        value: E_q[log p(x, z) - log q(z | x)].
        reconstruction: E_q[log p(x | z)].
        kl: KL(q(z | x) || p(z)), as E_q[log q(z | x) - log p(z)].
        mc_stderr: Monte Carlo standard error of the value, given these data.
        data_stderr: Standard error of the value for the population of the data.
        pointwise: The ELBO per datum, (N,).
        num_samples: K.
    """

    value: float
    reconstruction: float
    kl: float
    mc_stderr: float
    data_stderr: float
    pointwise: Tensor
    num_samples: int

    def __str__(self) -> str:
        return (
            f"ELBO = {self.value:.2f} ± {self.mc_stderr:.2f} (Monte Carlo; data ± {self.data_stderr:.2f}) nats "
            f"= reconstruction {self.reconstruction:.2f} - KL {self.kl:.2f}"
        )


def log_likelihood(
    model: Program,
    guide: Program,
    data: Any,
    *,
    num_samples: int = 5000,
    device: str | torch.device | None = None,
    seed: int | None = 0,
    progress: bool | None = None,
) -> Estimate:
    """Estimate log p(x) by importance sampling from the guide.

        log p(x) ~ log 1/K sum_k p(x, z_k) / q(z_k | x),   z_k ~ q(z | x)

    Data and samples go through in chunks, so that memory is bounded whatever their
    numbers: about 4 (K + 10^7) bytes.

    Args:
        model: A Pyro program for p(x, z).
        guide: A Pyro program for q(z | x).
        data: As for `fit`: a tensor, a tuple of tensors, a `Split`, batches.
        num_samples: K.
        device: Where the batches go; where the modules are when not given.
        seed: Seed of the samples (and of a binarisation drawn on the way); None goes
            on with torch's random state.
        progress: Show a bar; None shows it on a terminal only.
    Returns:
        The estimate with its errors and diagnostics.
    Raises:
        ValueError: K < 1, a guide without density, and all that `particles` refuses.
    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))
        >>> print(log_likelihood(model, guide, torch.zeros(3), num_samples=100))
        log p(x) = -1.27 ± 0.00 (Monte Carlo; data ± 0.00) nats, k̂ ok for 100.0 %

    Reference: Burda et al., Importance Weighted Autoencoders, 2016. arXiv:1509.00519
    """
    parts = []
    for chunks in _particles(model, guide, data, num_samples, device, seed, progress, "log p(x)"):
        parts.append(_summary(torch.cat([chunk.log_weight for chunk in chunks])))
    pointwise, variance, bias, ess, k = (torch.cat(column) for column in zip(*parts, strict=True))
    count = len(pointwise)
    return Estimate(
        value=pointwise.mean().item(),
        mc_stderr=variance.sum().sqrt().item() / count,
        data_stderr=pointwise.std().item() / math.sqrt(count) if count > 1 else math.nan,
        bias=bias.mean().item(),
        pointwise=pointwise,
        ess=ess,
        pareto_k=k,
        num_samples=num_samples,
    )


def elbo_terms(
    model: Program,
    guide: Program,
    data: Any,
    *,
    num_samples: int = 100,
    device: str | torch.device | None = None,
    seed: int | None = 0,
    progress: bool | None = None,
) -> ElboTerms:
    """Estimate the ELBO and split it into reconstruction and KL.

        ELBO(x) = E_q[log p(x | z)] - KL(q(z | x) || p(z))

    Args:
        model: A Pyro program for p(x, z).
        guide: A Pyro program for q(z | x).
        data: As for `fit`.
        num_samples: K, samples averaged per datum.
        device: Where the batches go; where the modules are when not given.
        seed: Seed of the samples; None goes on with torch's random state.
        progress: Show a bar; None shows it on a terminal only.
    Returns:
        The terms with their errors.
    Raises:
        ValueError: K < 1, a guide without density, and all that `particles` refuses.
    """
    parts = []
    for chunks in _particles(model, guide, data, num_samples, device, seed, progress, "ELBO"):
        tables = [(chunk.log_weight, chunk.log_likelihood) for chunk in chunks]
        weight, likelihood = (torch.cat(column).double().cpu() for column in zip(*tables, strict=True))
        variance = weight.var(0) / num_samples if num_samples > 1 else torch.full_like(weight[0], math.nan)
        parts.append((weight.mean(0), likelihood.mean(0), variance))
    pointwise, likelihood, variance = (torch.cat(column) for column in zip(*parts, strict=True))
    count = len(pointwise)
    return ElboTerms(
        value=pointwise.mean().item(),
        reconstruction=likelihood.mean().item(),
        kl=(likelihood - pointwise).mean().item(),
        mc_stderr=variance.sum().sqrt().item() / count,
        data_stderr=pointwise.std().item() / math.sqrt(count) if count > 1 else math.nan,
        pointwise=pointwise,
        num_samples=num_samples,
    )


def _summary(log_weight: Tensor) -> tuple[Tensor, ...]:
    """Estimate, its variance and bias, effective sample size and k-hat per datum, from (K, B)."""
    k = pareto_k(log_weight)
    log_weight = log_weight.double().cpu()
    count = len(log_weight)
    total = torch.logsumexp(log_weight, 0)
    share = (log_weight - total).exp()  # w_k / sum w
    squares = share.square().sum(0)
    if count > 1:
        variance = (count * squares - 1).clamp(min=0) / (count - 1)
        # Leaving out one weight of K changes the log of their mean by this much.
        change = torch.log1p(-share.clamp(max=1 - 1e-12)) + math.log(count / (count - 1))
        bias = (count - 1) * change.mean(0)
    else:
        variance = bias = torch.full_like(total, math.nan)
    return total - math.log(count), variance, bias, 1 / squares, k


def _particles(
    model: Program,
    guide: Program,
    data: Any,
    num_samples: int,
    device: str | torch.device | None,
    seed: int | None,
    progress: bool | None,
    title: str,
) -> Iterator[Iterator[Particles]]:
    """For each batch of data, its K particles in chunks."""
    if num_samples < 1:
        raise ValueError(f"num_samples must be a positive integer, got {num_samples}.")
    batch_size = max(1, min(100, _CHUNK // num_samples))
    place = device_of(model, guide) if device is None else device
    batches = Batches(data, batch_size, place, shuffle=False)
    with own_parameters(model, guide), seeded(seed), torch.no_grad():
        nesting = plate_nesting(model, guide, *batches.first()) if num_samples > 1 else 0
        for batch in tqdm(batches, desc=title, disable=None if progress is None else not progress, leave=False):
            values = max(sum(x.numel() for x in batch if isinstance(x, Tensor)), 512 * batch_size)
            yield _chunks(model, guide, batch, num_samples, max(1, _CHUNK // values), nesting)


def _chunks(
    model: Program, guide: Program, batch: tuple[Any, ...], num_samples: int, size: int, nesting: int
) -> Iterator[Particles]:
    for start in range(0, num_samples, size):
        yield draw(model, guide, batch, {}, min(size, num_samples - start), max_plate_nesting=nesting)
