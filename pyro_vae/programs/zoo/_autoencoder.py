"""A plain autoencoder, as a pair whose guide is a point."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pyro_vae.programs.vae import VAE


def autoencoder(x_shape: Sequence[int], **options: Any) -> VAE:
    """A plain autoencoder: a point z(x) instead of a distribution, and no prior term.

    The same networks as `VAE.build`, with a guide that is a point. Train it with

        fit(pair.model, pair.guide, data, loss=Objective(reconstruction))

    It maximises log p(x | z(x)) alone, so nothing shapes its latent space: it
    reconstructs better than a VAE, compresses and scores anomalies, and its "prior"
    samples are decoded from places where no datum lies. It has no density over z:
    every bound and every estimate of log p(x) refuses it.

    Args:
        x_shape: Shape of one datum.
        options: The other fields of `Architecture`, except posterior.
    Returns:
        A `VAE` whose guide is a point.
    Example:
        >>> import torch
        >>> autoencoder((1, 8, 8), latent_dim=2, hidden=(32,)).reconstruct(torch.zeros(5, 1, 8, 8)).shape
        torch.Size([5, 1, 8, 8])
    """
    return VAE.build(x_shape, **(options | {"posterior": "point"}))
