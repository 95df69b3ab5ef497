"""Several proposals for one log p(x): their weights pooled by a rule that is stated beforehand.

With K draws from each of S densities q_s, whatever the data turn out to be,

    p^(x) = 1/(S K) sum_s sum_k p(x, z_sk) / (1/S sum_t q_t(z_sk | x)),   z_sk ~ q_s

is unbiased: the balance heuristic. No weight is more than S times what the best of the
densities gives it, so a poor one among them costs samples and no more. It takes
densities that score each other's draws; where they cannot, the estimate is that of the
one proposal with the highest mean *over the data*. The maximum per datum would be
biased upwards.

Reference: Veach and Guibas, Optimally combining sampling techniques, 1995. doi:10.1145/218380.218498
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_vae.inference.trees import numbers
from pyro_vae.judging.psis import pareto_k
from pyro_vae.protocols import rescoring
from pyro_vae.reach import parts_of
from pyro_vae.traces import Program, draw, log_q

# Floats per tensor of decoder output: large enough to hide Python, small enough for the caches.
_CHUNK = 2**21


class Scored(NamedTuple):
    """What the weights of B data say, each (B,), in nats: the ELBO and log p(x) with variances."""

    elbo: Tensor
    elbo_variance: Tensor
    log_p: Tensor
    log_p_variance: Tensor
    bias: Tensor
    pareto_k: Tensor

    @classmethod
    def of(cls, log_weight: Tensor) -> Scored:
        """From (K, B)."""
        weight = log_weight.double().cpu()
        count = len(weight)
        total = weight.logsumexp(0)
        share = (weight - total).exp()
        variance = (count * share.square().sum(0) - 1).clamp(min=0) / (count - 1)
        # Leaving out one weight changes the log of their mean by this much.
        change = torch.log1p(-share.clamp(max=1 - 1e-12)) + math.log(count / (count - 1))
        bias = (count - 1) * change.mean(0)
        elbo_variance = weight.var(0) / count
        return cls(weight.mean(0), elbo_variance, total - math.log(count), variance, bias, pareto_k(log_weight))

    @classmethod
    def joined(cls, parts: list[Scored]) -> Scored:
        """Over batches."""
        return cls(*(torch.cat(column) for column in zip(*parts, strict=True)))


def score(
    model: Program,
    proposals: Mapping[str, Program],
    pooled: list[str],
    args: tuple[Any, ...],
    num_samples: int,
    nesting: Mapping[str, int],
) -> tuple[dict[str, Scored], Scored | None]:
    """Score one batch by every proposal alone, and by the mixture of those to be pooled.

    Args:
        model: A Pyro program for p(x, z).
        proposals: Guides, by name.
        pooled: Names of those that score each other's draws.
        args: The batch.
        num_samples: K for each proposal.
        nesting: Depth of plates, by proposal.
    Returns:
        Each proposal's own scores; those of the pooled weights, None without any.
    """
    size = min(num_samples, max(1, _CHUNK // max(numbers(args), 512)))
    own: dict[str, list[Tensor]] = {name: [] for name in proposals}
    mixed: list[Tensor] = []
    with torch.no_grad():
        for name, proposal in proposals.items():
            for start in range(0, num_samples, size):
                table = draw(model, proposal, args, {}, min(size, num_samples - start), max_plate_nesting=nesting[name])
                own[name].append(table.log_weight)
                if name not in pooled:
                    continue
                mine = table.log_joint - table.log_weight
                # As copies: a flow knows its own latest draw, but not under another's name.
                latents = {site: z.clone() for site, z in table.latents.items()}
                others = [log_q(proposals[other], latents, *args) for other in pooled if other != name]
                total = torch.stack([mine, *others]).logsumexp(0) - math.log(len(pooled))
                mixed.append(table.log_joint - total)
    return {name: Scored.of(torch.cat(weights)) for name, weights in own.items()}, (
        Scored.of(torch.cat(mixed)) if mixed else None
    )


def scores_strangers(model: Program, proposal: Program, args: tuple[Any, ...]) -> bool:
    """Whether a guide scores, in one pass, draws that it did not make."""
    if rescoring(proposal, *parts_of(proposal)) != "one pass":
        return False
    try:
        with torch.no_grad(), torch.random.fork_rng():
            table = draw(model, proposal, args, {}, 2)
            again = log_q(proposal, {name: z.clone() for name, z in table.latents.items()}, *args)
            return torch.allclose(again, table.log_joint - table.log_weight, rtol=1e-3, atol=1e-2)
    except (ValueError, NotImplementedError, KeyError, RuntimeError):
        return False


def given_estimate(estimate: Any, num_data: int) -> tuple[Tensor, Tensor]:
    """log p(x) per datum and its standard errors, of an estimate that was made elsewhere.

    Raises:
        ValueError: It has no values per datum, no errors, or is of other data.
    """
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


def pool(own: Mapping[str, Scored], mixed: Scored | None, pooled: list[str]) -> tuple[Scored, str]:
    """The estimate of log p(x) by the rule above, and the rule in words."""
    if mixed is not None:
        many = "one mixture of " if len(pooled) > 1 else ""
        return mixed, f"importance sampling from {many}{', '.join(pooled)}"
    best = max(own, key=lambda name: own[name].log_p.mean().item())
    return own[best], f"importance sampling from {best}, the higher mean over the data"
