"""Gaussian posteriors: factorised, of full covariance, and between the two.

All three have scales s(x) = exp(.) in common, and start with what the factorised one is:

    diagonal    S = diag(s^2)
    full        S = diag(s) T T' diag(s),           T lower triangular with ones on its diagonal
    low rank    S = diag(s) (I + V V') diag(s),     V of R columns

The scales stand outside, so that T and V are free of units: correlations, not covariances.
The KL to a factorised prior is known in closed form for each of them.
"""

from __future__ import annotations

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from pyro_vae.parts.distributions import normal
from pyro_vae.parts.posteriors.amortized import Amortized


class DiagonalNormal(Amortized):
    """q(z | x) = N(z; mu(x), diag sigma(x)^2).

    The head gives mu and log sigma, so sigma is positive and the entropy linear in it.

    Args:
        encoder: x, (..., *x_shape), to features, (..., F).
        latent_dim: D.
        features: F; read from ``encoder.out_features`` when not given.
    Raises:
        ValueError: The number of features is unknown.
    Example:
        >>> import torch
        >>> DiagonalNormal(nn.Linear(3, 4), latent_dim=2)(torch.zeros(5, 3)).event_shape
        torch.Size([2])

    Reference: Kingma and Welling, Auto-Encoding Variational Bayes, 2014. arXiv:1312.6114
    """

    def __init__(self, encoder: nn.Module, latent_dim: int, features: int | None = None) -> None:
        super().__init__(encoder, latent_dim, 2 * latent_dim, features)

    def family(self, parameters: Tensor) -> TorchDistribution:
        loc, log_scale = parameters.chunk(2, -1)
        return dist.Normal(loc, log_scale.exp(), validate_args=False).to_event(1)


class FullNormal(Amortized):
    """q(z | x) = N(z; mu(x), L L') with L = diag(s(x)) T(x), T = I + B(x) / sqrt(D), B strictly lower triangular.

    A density costs one triangular solve, O(D^2). T starts as the identity for every x:
    the fit begins as `DiagonalNormal`, the special case, and learns correlations from there.

    Adam moves every output of the head by about as much in a step, be its gradient signal or
    noise, and a row of T holds up to D of them. The factor 1 / sqrt(D) makes the step of a whole
    row, which is what counts for z, that of one number at any D. Without it D = 50 latents of
    MNIST are 3 to 4 nats behind `DiagonalNormal` after 15 epochs on 20,000 images; with it, level.

    Args:
        encoder: x, (..., *x_shape), to features, (..., F).
        latent_dim: D; the head returns 2 D + D (D - 1) / 2 numbers.
        features: F; read from ``encoder.out_features`` when not given.
    Raises:
        ValueError: The number of features is unknown.
    Example:
        >>> FullNormal(nn.Linear(3, 4), latent_dim=2)(torch.zeros(5, 3)).scale_tril.shape
        torch.Size([5, 2, 2])

    Reference: Kingma and Welling, An Introduction to Variational Autoencoders, 2019, section 2.5.1.
        arXiv:1906.02691
    """

    below: Tensor

    def __init__(self, encoder: nn.Module, latent_dim: int, features: int | None = None) -> None:
        super().__init__(encoder, latent_dim, 2 * latent_dim + latent_dim * (latent_dim - 1) // 2, features)
        rows, columns = torch.tril_indices(latent_dim, latent_dim, -1)
        self.register_buffer("below", rows * latent_dim + columns, persistent=False)
        with torch.no_grad():
            self.head.weight[2 * latent_dim :] = 0
            self.head.bias[2 * latent_dim :] = 0

    def family(self, parameters: Tensor) -> TorchDistribution:
        D = self.latent_dim
        loc, scale = parameters[..., :D], parameters[..., D : 2 * D].exp()
        below = parameters[..., 2 * D :] * D**-0.5
        one = torch.eye(D, dtype=parameters.dtype, device=parameters.device).flatten()
        unit = one.expand(parameters.shape[:-1] + (D * D,)).index_copy(-1, self.below, below).unflatten(-1, (D, D))
        return normal.CholeskyNormal(loc, scale.unsqueeze(-1) * unit)


class LowRankNormal(Amortized):
    """q(z | x) = N(z; mu(x), S) with S = diag(s) (I + V V') diag(s), V(x) of R columns.

    The covariance is diag(s^2) + W W' for W = diag(s) V. A density costs O(D R), by Woodbury's
    identity. V starts small but not at zero, where its gradient would vanish for ever.

    Args:
        encoder: x, (..., *x_shape), to features, (..., F).
        latent_dim: D; the head returns (2 + R) D numbers.
        rank: R, from 1 to D. R = D - 1 can already be any covariance.
        features: F; read from ``encoder.out_features`` when not given.
    Raises:
        ValueError: The rank is not in 1, ..., D, or the number of features is unknown.
    Example:
        >>> LowRankNormal(nn.Linear(3, 4), latent_dim=5, rank=2)(torch.zeros(7, 3)).factor.shape
        torch.Size([7, 5, 2])

    Reference: Ong, Nott and Smith, Gaussian Variational Approximation with a Factor Covariance
        Structure, 2018. arXiv:1701.03208
    """

    def __init__(self, encoder: nn.Module, latent_dim: int, rank: int = 2, features: int | None = None) -> None:
        if not 1 <= rank <= latent_dim:
            raise ValueError(
                f"got rank={rank}, wanted 1 to latent_dim={latent_dim}: rank 0 is DiagonalNormal, "
                "and for every covariance there is FullNormal."
            )
        super().__init__(encoder, latent_dim, (2 + rank) * latent_dim, features)
        self.rank = rank
        with torch.no_grad():
            self.head.weight[2 * latent_dim :] *= 0.1
            self.head.bias[2 * latent_dim :].normal_(0, 0.1)

    def family(self, parameters: Tensor) -> TorchDistribution:
        D = self.latent_dim
        loc, scale, factor = parameters[..., :D], parameters[..., D : 2 * D].exp(), parameters[..., 2 * D :]
        return normal.LowRankNormal(loc, scale, factor.unflatten(-1, (D, self.rank)))
