"""From log weights to numbers: the one place that does it.

With w_k = p(x, z_k) / q(z_k | x), z_k ~ q, the mean weight is an unbiased estimate of p(x). How the estimate grows with
K needs no further samples: K weights are K / K' blocks, each of which would have given the estimate at K' (`at_fewer`).

Several proposals for one log p(x) are pooled by a rule that is stated beforehand. With K draws of each of S densities,

    p^(x) = 1/(S K) sum_s sum_k p(x, z_sk) / (1/S sum_t q_t(z_sk | x)),   z_sk ~ q_s

is unbiased, and no weight is more than S times what the best of them gives it: the balance heuristic. Of those that
cannot score each other's draws the one with the highest mean *over the data* counts; a maximum per datum is biased.

Reference: Veach and Guibas, Optimally combining sampling techniques, 1995. doi:10.1145/218380.218498
"""

from __future__ import annotations

import importlib
import math
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyro_vae.judging.quotes import Kind, kind_of
from pyro_vae.judging.sweeps import in_chunks
from pyro_vae.options import checked
from pyro_vae.protocols import rescoring
from pyro_vae.randomness import forked
from pyro_vae.reach import parts_of
from pyro_vae.traces import Program, draw, log_q

# Fewer weights have no tail to speak of.
_LEAST = 25


class Scored(NamedTuple):
    """What the weights of B data say, each (B,), in nats."""

    elbo: Tensor  # mean log weight
    elbo_variance: Tensor  # its Monte Carlo variance; nan for K = 1, as of all that follow
    log_p: Tensor  # log 1/K sum_k w_k
    log_p_variance: Tensor  # its Monte Carlo variance, to first order
    bias: Tensor  # its bias by the jackknife
    ess: Tensor  # effective number of samples, (sum w)^2 / sum w^2
    pareto_k: Tensor  # k-hat
    smoothed: Tensor  # log 1/K sum_k w_k after Pareto smoothing of the largest weights
    smoothed_variance: Tensor  # its Monte Carlo variance

    @classmethod
    def of(cls, log_weight: Tensor, joint: int = 1) -> Scored:
        """From log p(x, z_k) - log q(z_k | x), (K, B), of which each column stands for so many data."""
        smooth, k = pareto_smoothed(log_weight)
        weight = log_weight.double().cpu()
        count = len(weight)
        total = weight.logsumexp(0)
        share = (weight - total).exp()
        bias = elbo_variance = torch.full_like(total, math.nan)
        if count > 1:
            # Leaving out one weight of K changes the log of their mean by this much.
            change = torch.log1p(-share.clamp(max=1 - 1e-12)) + math.log(count / (count - 1))
            bias, elbo_variance = (count - 1) * change.mean(0), weight.var(0) / count
        return cls(
            elbo=weight.mean(0) / joint,
            elbo_variance=elbo_variance / joint**2,
            log_p=(total - math.log(count)) / joint,
            log_p_variance=variance(weight) / joint**2,
            bias=bias / joint,
            ess=1 / share.square().sum(0),
            pareto_k=k,
            smoothed=(smooth.logsumexp(0) - math.log(count)) / joint,
            smoothed_variance=variance(smooth) / joint**2,
        )

    def kind(self, num_samples: int) -> Kind:
        """What the mean of log p(x) over these data is, of K weights each."""
        return kind_of(khat_ok(self.pareto_k, num_samples))


def variance(log_weight: Tensor) -> Tensor:
    """Variance of log 1/K sum w to first order, per column of (K, ...); nan for K = 1."""
    count = len(log_weight)
    if count == 1:
        return torch.full_like(log_weight[0], math.nan)
    share = torch.softmax(log_weight, 0)
    return (count * share.square().sum(0) - 1).clamp(min=0) / (count - 1)


def fewer(num_samples: int) -> list[int]:
    """1, 2, 5, 10, ... below K, and K."""
    decades = [m * 10**e for e in range(len(str(num_samples))) for m in (1, 2, 5)]
    return [k for k in decades if k < num_samples] + [num_samples]


def at_fewer(log_weight: Tensor, steps: list[int]) -> Tensor:
    """Sums over the data of the estimate at each K', and of its variance, (2, steps)."""
    found = []
    for size in steps:
        blocks = len(log_weight) // size
        grouped = log_weight[: blocks * size].reshape(blocks, size, -1).transpose(0, 1)
        values = torch.logsumexp(grouped, 0) - math.log(size)
        # Few blocks know their own variance badly; each of many weights knows it by itself.
        spread = values.var(0) if blocks >= 10 or (size == 1 and blocks > 1) else variance(grouped).mean(0)
        found.append(torch.stack([values.mean(0).sum(), (spread / blocks).sum()]))
    return torch.stack(found, 1)


@checked
def khat_limit(num_samples: int) -> float:
    """min(1 - 1 / log10 K, 0.7): above it, K weights are too few for their tail.

    Args:
        num_samples: K.
    Returns:
        The limit of k-hat.
    Example:
        >>> khat_limit(100)
        0.5
    """
    return min(1 - 1 / math.log10(max(num_samples, 2)), 0.7)


def khat_ok(pareto_k: Tensor, num_samples: int) -> float:
    """Share of the data whose k-hat is below `khat_limit`; nan where K is too small to say, or it is not known."""
    if pareto_k.isnan().all():
        return math.nan
    return (pareto_k < khat_limit(num_samples)).double().mean().item()


def pareto_k(log_weight: Tensor) -> Tensor:
    """Shape k of the generalised Pareto tail of each datum's weights.

    The weights have finite moments up to order 1/k: below 0.5 their variance is finite; up to `khat_limit` the estimate
    is usable; above it the guide misses mass of the posterior, and the error estimate itself is too small.

    Args:
        log_weight: log p(x, z_k) - log q(z_k | x), (K, B).
    Returns:
        k-hat, (B,): -inf for constant weights (an exact posterior) and where all of the tail is one
        value (a few discrete latents: weights that have reached their maximum), nan for fewer than 25
        samples, which have no tail to speak of.
    Example:
        >>> pareto_k(torch.zeros(100, 2))
        tensor([-inf, -inf], dtype=torch.float64)

    Reference: Vehtari et al., Pareto Smoothed Importance Sampling, 2024. arXiv:1507.02646
    """
    return pareto_smoothed(log_weight)[1]


def pareto_smoothed(log_weight: Tensor) -> tuple[Tensor, Tensor]:
    """Log weights whose largest are replaced by the quantiles of their fitted Pareto tail, and k-hat.

    The smoothed weights keep the scale of the raw ones, and none exceeds the largest of them.

    Args:
        log_weight: log p(x, z_k) - log q(z_k | x), (K, B).
    Returns:
        The smoothed log weights, (K, B), and k-hat, (B,), as in `pareto_k`, both in float64. Constant weights or tails,
        and fewer than 25 weights, stay as they are.
    Example:
        >>> smooth, k = pareto_smoothed(torch.zeros(100, 2))
        >>> bool((smooth == 0).all())
        True

    Reference: Vehtari et al., Pareto Smoothed Importance Sampling, 2024. arXiv:1507.02646
    """
    smooth = log_weight.detach().cpu().double()
    k = torch.full((smooth.shape[1],), float("nan"), dtype=torch.float64)
    if len(smooth) < _LEAST:
        return smooth, k
    spread = log_weight.amax(0) - log_weight.amin(0)
    rounding = 100 * torch.finfo(log_weight.dtype).eps * log_weight.abs().amax(0).clamp(min=1)
    # A tail of equal weights is bounded, and has no shape: ArviZ 0.x calls it inf, and 1.x raises.
    tail = log_weight.topk(math.ceil(min(0.2 * len(smooth), 3 * len(smooth) ** 0.5)), 0).values
    constant = ((spread <= rounding) | (tail[0] - tail[-1] <= rounding / 25)).cpu()
    k[constant] = float("-inf")
    varying = smooth[:, ~constant]
    if varying.shape[1]:
        found, shape = (torch.as_tensor(a, dtype=torch.float64) for a in _psis(varying.T.contiguous().numpy()))
        found = found.T
        # ArviZ normalises the weights; the tail is less than half of them, so the median's was not smoothed.
        middle = varying.kthvalue(len(varying) // 2 + 1, 0, keepdim=True).indices
        found = found + (varying.gather(0, middle) - found.gather(0, middle))
        smooth = smooth.clone()
        smooth[:, ~constant] = torch.where(found.isnan(), varying, found)
        k[~constant] = shape
    return smooth, k


def _psis(log_weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Smoothed log weights up to a constant, (B, K), and k-hat over the last axis, (B,)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # announcements at import; k-hat itself is the warning
        try:
            array_stats = importlib.import_module("arviz_stats.base").array_stats  # which it has, and does not list
        except (ImportError, AttributeError):
            import arviz

            smooth, k = arviz.psislw(log_weight)
        else:
            # Unlike ArviZ 0.x it takes log likelihoods, the negatives of its log weights, if that is still so.
            smooth, k = array_stats.psislw(-log_weight, axis=-1)
            if smooth[0, log_weight[0].argmax()] < smooth[0, log_weight[0].argmin()]:
                smooth, k = array_stats.psislw(log_weight, axis=-1)
    return np.asarray(smooth), np.asarray(k)


def score(
    model: Program, proposals: Mapping[str, Program], pooled: list[str], args: tuple[Any, ...], num_samples: int,
    nesting: Mapping[str, int],
) -> tuple[dict[str, Scored], Scored | None]:  # fmt: skip
    """Score one batch by every proposal alone, and by the mixture of those to be pooled; None without any.

    The depth of the plates is that of each proposal; those that are pooled score each other's draws.
    """
    own: dict[str, list[Tensor]] = {name: [] for name in proposals}
    mixed: list[Tensor] = []
    with torch.no_grad():
        for name, proposal in proposals.items():
            for table in in_chunks(model, proposal, args, num_samples, nesting[name]):
                own[name].append(table.log_weight)
                if name not in pooled:
                    continue
                mine = table.log_joint - table.log_weight
                # As copies: a flow knows its own latest draw, but not under another's name.
                latents = {site: z.clone() for site, z in table.latents.items()}
                others = [log_q(proposals[other], latents, *args) for other in pooled if other != name]
                total = torch.stack([mine, *others]).logsumexp(0) - math.log(len(pooled))
                mixed.append(table.log_joint - total)
    scores = {name: Scored.of(torch.cat(weights)) for name, weights in own.items()}
    return scores, Scored.of(torch.cat(mixed)) if mixed else None


def rescores(model: Program, proposal: Program, args: tuple[Any, ...]) -> bool:
    """Whether a guide scores, in one pass, draws that it did not make."""
    if rescoring(proposal, *parts_of(proposal)) != "one pass":
        return False
    try:
        with torch.no_grad(), forked():
            table = draw(model, proposal, args, {}, 2)
            again = log_q(proposal, {name: z.clone() for name, z in table.latents.items()}, *args)
            return torch.allclose(again, table.log_joint - table.log_weight, rtol=1e-3, atol=1e-2)
    except (ValueError, NotImplementedError, KeyError, RuntimeError):
        return False


def given_estimate(estimate: Any, num_data: int) -> tuple[Tensor, Tensor]:
    """log p(x) per datum and its standard errors, of an estimate that was made elsewhere; refused if of other data."""
    pointwise = getattr(estimate, "pointwise", None)
    stderr = getattr(estimate, "pointwise_stderr", None)
    if stderr is None and hasattr(estimate, "ess"):
        count = estimate.num_samples  # ess = K / (1 + var w / (mean w)^2)
        stderr = ((count / estimate.ess - 1).clamp(min=0) / max(count - 1, 1)).sqrt()
    if not isinstance(pointwise, Tensor) or not isinstance(stderr, Tensor):
        raise ValueError(
            f"got log_likelihood={type(estimate).__name__}, wanted values and errors per datum: the result of "
            "log_likelihood(...) or ais(...), or an object with pointwise and pointwise_stderr."
        )
    if len(pointwise) != num_data:
        raise ValueError(f"got log_likelihood of {len(pointwise)} data, wanted the same {num_data} data, in order.")
    return pointwise.double().cpu(), stderr.double().cpu()


def pool(own: Mapping[str, Scored], mixed: Scored | None, pooled: list[str], given: Any = None) -> tuple[Scored, str]:
    """The estimate of log p(x) by the rule above, or a given one (see `given_estimate`), and the rule in words."""
    if mixed is not None:
        many = "one mixture of " if len(pooled) > 1 else ""
        found, source = mixed, f"importance sampling from {many}{', '.join(pooled)}"
    else:
        best = max(own, key=lambda name: own[name].log_p.mean().item())
        found, source = own[best], f"importance sampling from {best}, the higher mean over the data"
    if given is None:
        return found, source
    log_p, stderr = given_estimate(given, len(found.log_p))
    unknown = torch.full_like(log_p, math.nan)
    return found._replace(log_p=log_p, log_p_variance=stderr.square(), bias=unknown, pareto_k=unknown), "given"
