"""Pareto k-hat and smoothing of importance weights, by ArviZ, in the versions that people have."""

from __future__ import annotations

import math
import warnings

import numpy as np
import torch
from torch import Tensor

from pyro_vae.options import checked


def pareto_k(log_weight: Tensor) -> Tensor:
    """Shape k of the generalised Pareto tail of each datum's weights.

    The weights have finite moments up to order 1/k: below 0.5 their variance is
    finite; up to `khat_limit` the estimate is usable; above it the guide misses mass
    of the posterior, and the error estimate itself is too small.

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

    Smoothing trades a little bias for much variance where single weights dominate. The
    smoothed weights keep the scale of the raw ones, and none exceeds the largest of them.

    Args:
        log_weight: log p(x, z_k) - log q(z_k | x), (K, B).
    Returns:
        The smoothed log weights, (K, B), and k-hat, (B,), both in float64. Constant weights or tails,
        and fewer than 25 weights, stay as they are.
    Example:
        >>> smooth, k = pareto_smoothed(torch.zeros(100, 2))
        >>> bool((smooth == 0).all())
        True

    Reference: Vehtari et al., Pareto Smoothed Importance Sampling, 2024. arXiv:1507.02646
    """
    smooth = log_weight.detach().cpu().double()
    k = torch.full((smooth.shape[1],), float("nan"), dtype=torch.float64)
    if len(smooth) < 25:
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
        middle = varying.sort(0).indices[len(varying) // 2].unsqueeze(0)
        found = found + (varying.gather(0, middle) - found.gather(0, middle))
        smooth = smooth.clone()
        smooth[:, ~constant] = torch.where(found.isnan(), varying, found)
        k[~constant] = shape
    return smooth, k


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
    return min(1 - 1 / np.log10(max(num_samples, 2)), 0.7)


def _psis(log_weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Smoothed log weights up to a constant, (B, K), and k-hat over the last axis, (B,)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # announcements at import; k-hat itself is the warning
        try:
            from arviz_stats.base import array_stats
        except ImportError:
            import arviz

            smooth, k = arviz.psislw(log_weight)
        else:
            # Unlike ArviZ 0.x it takes log likelihoods, whose negatives are its log weights. What comes out says
            # whether that is still so.
            smooth, k = array_stats.psislw(-log_weight, axis=-1)
            if smooth[0, log_weight[0].argmax()] < smooth[0, log_weight[0].argmin()]:
                smooth, k = array_stats.psislw(log_weight, axis=-1)
    return np.asarray(smooth), np.asarray(k)
