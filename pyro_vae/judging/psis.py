"""Pareto k-hat of importance weights, by ArviZ, in the versions that people have."""

from __future__ import annotations

import warnings

import numpy as np
import torch
from torch import Tensor


def pareto_k(log_weight: Tensor) -> Tensor:
    """Shape k of the generalised Pareto tail of each datum's weights.

    The weights have finite moments up to order 1/k: below 0.5 their variance is
    finite; up to `khat_limit` the estimate is usable; above it the guide misses mass
    of the posterior, and the error estimate itself is too small.

    Args:
        log_weight: log p(x, z_k) - log q(z_k | x), (K, B).
    Returns:
        k-hat, (B,): -inf for constant weights (an exact posterior), nan for fewer
        than 25 samples, which have no tail to speak of.
    Example:
        >>> pareto_k(torch.zeros(100, 2))
        tensor([-inf, -inf], dtype=torch.float64)

    Reference: Vehtari et al., Pareto Smoothed Importance Sampling, 2024. arXiv:1507.02646
    """
    k = torch.full((log_weight.shape[1],), float("nan"), dtype=torch.float64)
    if len(log_weight) < 25:
        return k
    spread = log_weight.amax(0) - log_weight.amin(0)
    rounding = 100 * torch.finfo(log_weight.dtype).eps * log_weight.abs().amax(0).clamp(min=1)
    constant = (spread <= rounding).cpu()
    k[constant] = float("-inf")
    varying = log_weight.detach().cpu().double()[:, ~constant]
    if varying.shape[1]:
        k[~constant] = torch.as_tensor(_psis(varying.T.contiguous().numpy()), dtype=torch.float64)
    return k


def khat_limit(num_samples: int) -> float:
    """min(1 - 1 / log10 K, 0.7): above it, K weights are too few for their tail."""
    return min(1 - 1 / np.log10(max(num_samples, 2)), 0.7)


def _psis(log_weight: np.ndarray) -> np.ndarray:
    """k-hat over the last axis, (B, K) -> (B,)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # announcements at import; k-hat itself is the warning
        try:
            from arviz_stats.base import array_stats
        except ImportError:
            import arviz

            return np.asarray(arviz.psislw(log_weight)[1])
        # Unlike ArviZ 0.x it takes log likelihoods, whose negatives are its log weights.
        return np.asarray(array_stats.psislw(-log_weight, axis=-1)[1])
