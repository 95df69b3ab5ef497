"""Anomaly scores: which data does a fitted pair find strange?"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyro_vae.evaluation import evaluating
from pyro_vae.inference.batches import Batches
from pyro_vae.judging.estimates import log_likelihood
from pyro_vae.options import checked
from pyro_vae.parameters import device_of
from pyro_vae.traces import Program, draw

SCORES = ("log-likelihood", "reconstruction")


@checked
def anomaly_scores(
    model: Program,
    guide: Program,
    data: Any,
    score: str = "log-likelihood",
    *,
    num_samples: int = 100,
    seed: int = 0,
    progress: bool | None = None,
) -> Tensor:
    """How strange each datum is, in nats: higher is stranger.

        "log-likelihood"    - log 1/K sum_k p(x, z_k) / q(z_k | x)
        "reconstruction"    - 1/K sum_k log p(x | z_k)

    The first needs a density over z; the second is all that a plain autoencoder has.

    Args:
        model: A Pyro program for p(x, z).
        guide: A Pyro program for q(z | x).
        data: As for `fit`.
        score: "log-likelihood" or "reconstruction".
        num_samples: K; a point guide needs only one.
        seed: Seed of the samples.
        progress: Show a bar; None shows it on a terminal only.
    Returns:
        Scores, (N,).
    Raises:
        ValueError: Another score, or "log-likelihood" with a point guide.
    """
    if score == "log-likelihood":
        return -log_likelihood(model, guide, data, num_samples=num_samples, seed=seed, progress=progress).pointwise
    if score != "reconstruction":
        raise ValueError(f"unknown score {score!r}, wanted one of {', '.join(SCORES)}.")
    parts = []
    with evaluating(model, guide, seed=seed):
        for batch in Batches(data, 100, device_of(model, guide), shuffle=False, programs=(model, guide)):
            parts.append(-draw(model, guide, batch, {}, num_samples).log_likelihood.mean(0).double().cpu())
    return torch.cat(parts)


def roc_auc(inliers: Tensor, outliers: Tensor) -> float:
    """Area under the ROC curve: P(outlier scores above inlier), ties counting half.

    Args:
        inliers: Scores of ordinary data.
        outliers: Scores of strange data.
    Returns:
        A share, one half where the scores tell nothing.
    Example:
        >>> roc_auc(torch.tensor([0.0, 1.0]), torch.tensor([1.0, 2.0]))
        0.875
    """
    from sklearn.metrics import roc_auc_score

    labels = torch.cat([torch.zeros(len(inliers)), torch.ones(len(outliers))])
    return float(roc_auc_score(labels.numpy(), torch.cat([inliers, outliers]).cpu().double().numpy()))
