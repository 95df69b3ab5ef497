"""Posteriors that read their parameters off an encoder: what they have in common, and all that are no flows.

The scales of the Gaussians stand outside, S = diag(s) (...) diag(s), so that what is inside is free of units. The KL to
a factorised prior is known in closed form for each of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution, constraints
from torch import Tensor, nn
from torch.nn.functional import softplus

from pyro_vae.parts.distributions import normal as normals
from pyro_vae.parts.distributions import spherical
from pyro_vae.parts.distributions.mixture import DiagonalNormalMixture
from pyro_vae.protocols import Local, Rescoring


class Amortized(nn.Module, ABC):
    """q(z | x) = family(h(x)): an encoder, a linear head, and a family of distributions.

    A posterior of your own is a subclass with one method: say in ``__init__`` how many numbers P one distribution
    takes, and in `family` what they mean.

    Args:
        encoder: x, (..., *x_shape), to features, (..., F).
        latent_dim: D.
        num_parameters: P.
        features: F; read from ``encoder.out_features`` when not given.
    Attributes:
        rescoring, support, passes, has_density: As of `pyro_vae.protocols.Posterior`.
    Raises:
        ValueError: The number of features is unknown, or a size is not positive.
    Example:
        >>> class Laplace(Amortized):
        ...     def __init__(self, encoder, latent_dim):
        ...         super().__init__(encoder, latent_dim, 2 * latent_dim)
        ...     def family(self, parameters):
        ...         loc, log_scale = parameters.chunk(2, -1)
        ...         return dist.Laplace(loc, log_scale.exp()).to_event(1)
        >>> Laplace(nn.Linear(3, 4), latent_dim=2)(torch.zeros(5, 3)).event_shape
        torch.Size([2])
    """

    rescoring: Rescoring = "one pass"
    support: ClassVar[Any] = constraints.real_vector
    passes: ClassVar[int] = 0
    has_density: ClassVar[bool] = True

    def __init__(self, encoder: nn.Module, latent_dim: int, num_parameters: int, features: int | None = None) -> None:
        super().__init__()
        if latent_dim < 1 or num_parameters < 1:
            raise ValueError(
                f"latent_dim and num_parameters must be positive integers, got {latent_dim} and {num_parameters}."
            )
        self.encoder, self.latent_dim = encoder, latent_dim
        self.head = nn.Linear(_features(encoder, features), num_parameters)

    def forward(self, x: Tensor) -> TorchDistribution:
        """q(z | x): data (..., *x_shape) to a distribution of batch_shape (...), event_shape (D,)."""
        return self.family(self.head(self.encoder(x)))

    @abstractmethod
    def family(self, parameters: Tensor) -> TorchDistribution:
        """The distribution of batch_shape (...), event_shape (D,), of unconstrained parameters (..., P)."""

    def local(self, parameters: Tensor) -> Local:
        """The same family without the encoder: free parameters for each datum, which start at these, (B, P)."""
        return Local({"parameters": parameters}, lambda free: self.family(free["parameters"]))

    def parameters_near(self, loc: Tensor, scale: Tensor) -> Tensor:
        """Parameters of a member near N(loc, diag scale^2): where a local fit starts that no encoder starts.

        The first numbers are taken for the mean and the next for log sigma, as in all families here; what bends the
        distribution is random and small, since at zero it would often have no gradient. A family of another order of
        its parameters may override it, but works without.

        Args:
            loc: (..., D).
            scale: Positive, (..., D).
        Returns:
            (..., P).
        """
        P, D = self.head.out_features, self.latent_dim
        rest = 0.1 * torch.randn(*loc.shape[:-1], P, dtype=loc.dtype, device=loc.device)
        centre = torch.cat([loc, scale.log()], -1) if 2 * D <= P else loc
        return torch.cat([centre, rest[..., centre.shape[-1] :]], -1)


def _features(encoder: nn.Module, features: int | None) -> int:
    found = features if features is not None else getattr(encoder, "out_features", None)
    if found is None and isinstance(encoder, nn.Sequential):
        found = next((m.out_features for m in reversed(encoder) if hasattr(m, "out_features")), None)
    if not isinstance(found, int):
        raise ValueError(
            f"{type(encoder).__name__} does not say how many features it returns. Give it an attribute "
            "out_features, or pass features=... to the posterior."
        )
    return found


class DiagonalNormal(Amortized):
    """q(z | x) = N(z; mu(x), diag sigma(x)^2).

    The head gives mu and log sigma, so sigma is positive and the entropy linear in it.

    Args:
        encoder, latent_dim, features: As of `Amortized`.
    Example:
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

    Adam moves every output of the head by about as much in a step. The factor 1 / sqrt(D) makes the step of a whole row
    of T that of one number at any D. Without it D = 50 latents of MNIST are 3 to 4 nats behind `DiagonalNormal` after
    15 epochs on 20,000 images; with it, level.

    Args:
        encoder, features: As of `Amortized`.
        latent_dim: D; the head returns 2 D + D (D - 1) / 2 numbers.
    Example:
        >>> FullNormal(nn.Linear(3, 4), latent_dim=2)(torch.zeros(5, 3)).scale_tril.shape
        torch.Size([5, 2, 2])

    Reference: Kingma and Welling, An Introduction to Variational Autoencoders, 2019, section 2.5.1. arXiv:1906.02691
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
        return normals.CholeskyNormal(loc, scale.unsqueeze(-1) * unit)


class LowRankNormal(Amortized):
    """q(z | x) = N(z; mu(x), S) with S = diag(s) (I + V V') diag(s), V(x) of R columns.

    The covariance is diag(s^2) + W W' for W = diag(s) V. A density costs O(D R), by Woodbury's
    identity. V starts small but not at zero, where its gradient would vanish for ever.

    Args:
        encoder, features: As of `Amortized`.
        latent_dim: D; the head returns (2 + R) D numbers.
        rank: R, from 1 to D. R = D - 1 can already be any covariance.
    Raises:
        ValueError: The rank is not in 1, ..., D.
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
        return normals.LowRankNormal(loc, scale, factor.unflatten(-1, (D, self.rank)))


class Delta(Amortized):
    """A point z(x) = mu(x): the encoder of a plain autoencoder, with no density.

    Args:
        encoder, latent_dim, features: As of `Amortized`.
    Example:
        >>> Delta(nn.Linear(3, 4), latent_dim=2)(torch.zeros(5, 3)).event_shape
        torch.Size([2])
    """

    rescoring = "impossible"
    has_density = False

    def __init__(self, encoder: nn.Module, latent_dim: int, features: int | None = None) -> None:
        super().__init__(encoder, latent_dim, latent_dim, features)

    def family(self, parameters: Tensor) -> TorchDistribution:
        return dist.Delta(parameters, event_dim=1, validate_args=False)


def mean(distribution: TorchDistribution) -> Tensor:
    """The mean of q(z | x), or, for families without one in closed form, of 64 samples."""
    try:
        return distribution.mean
    except NotImplementedError:
        return torch.stack([distribution() for _ in range(64)]).mean(0)


class NormalMixture(Amortized):
    """q(z | x) = sum_c w_c(x) N(z; m_c(x), diag s_c(x)^2), c = 1, ..., C.

    A sample carries exact first derivatives in the means, the scales and the weights, so any objective may be used,
    Pyro's own included. Weights learn by moving mass through whatever lies between the components: the variance of
    their gradient grows as exp(a^2 / 8) with the distance a of two of them in standard deviations, and from about
    eight on they stand almost still. Means and scales do not suffer (see `DiagonalNormalMixture`).

    There is no KL in closed form; the mean is one. Components start at different places, since
    equal components have equal gradients and would stay equal.

    Args:
        encoder, latent_dim, features: As of `Amortized`.
        num_components: C; the head returns C (2 D + 1) numbers.
    Raises:
        ValueError: num_components < 1.
    Example:
        >>> NormalMixture(nn.Linear(3, 4), latent_dim=2, num_components=3)(torch.zeros(5, 3)).loc.shape
        torch.Size([5, 3, 2])

    Reference: Figurnov, Mohamed and Mnih, Implicit Reparameterization Gradients, 2018. arXiv:1805.08498
        Morningstar et al., Automatic Differentiation Variational Inference with Mixtures, 2021.
        arXiv:2003.01687
    """

    def __init__(
        self, encoder: nn.Module, latent_dim: int, num_components: int = 5, features: int | None = None
    ) -> None:
        if num_components < 1:
            raise ValueError(f"got num_components={num_components}, wanted 1 or more.")
        super().__init__(encoder, latent_dim, num_components * (2 * latent_dim + 1), features)
        self.num_components = num_components
        size = num_components * latent_dim
        with torch.no_grad():
            self.head.bias[:size].normal_(0, 0.5)

    def family(self, parameters: Tensor) -> TorchDistribution:
        C, D = self.num_components, self.latent_dim
        loc, log_scale, logits = parameters.split([C * D, C * D, C], -1)
        return DiagonalNormalMixture(loc.unflatten(-1, (C, D)), log_scale.unflatten(-1, (C, D)).exp(), logits)

    def parameters_near(self, loc: Tensor, scale: Tensor) -> Tensor:
        """Components scattered about loc: see `Amortized.parameters_near`."""
        C = self.num_components
        scatter = 0.5 * torch.randn(*loc.shape[:-1], C, loc.shape[-1], dtype=loc.dtype, device=loc.device)
        means = (loc.unsqueeze(-2) + scale.unsqueeze(-2) * scatter).flatten(-2)
        log_scales = scale.log().unsqueeze(-2).expand_as(scatter).flatten(-2)
        weights = loc.new_zeros(*loc.shape[:-1], C)
        return torch.cat([means, log_scales, weights], -1)


class VonMisesFisher(Amortized):
    """q(z | x) = C_D(k(x)) exp(k(x) mu(x)'z) on the unit sphere {z in R^D: |z| = 1}.

    It goes with the prior `HypersphericalUniform`, to which its KL is known in closed form, and with no prior on all
    of R^D. The head gives a vector, of which mu is the direction, and one number r for the concentration,

        k = minimum_concentration + D softplus(r):

    in units of D, since the mean A_D(k) mu has a length of about k / D for k < D.
    Samples carry the derivatives in mu and k (see `pyro_vae.parts.distributions.spherical`).

    Args:
        encoder, features: As of `Amortized`.
        latent_dim: D >= 2, the dimension of the space: z has D coordinates, the sphere D - 1 dimensions.
        minimum_concentration: Keeps k where its density and its derivatives are computed to full accuracy.
    Raises:
        ValueError: latent_dim < 2.
    Example:
        >>> q = VonMisesFisher(nn.Linear(3, 4), latent_dim=3)(torch.zeros(5, 3))
        >>> bool((q.sample().norm(dim=-1) - 1).abs().max() < 1e-6)
        True

    Reference: Davidson et al., Hyperspherical Variational Auto-Encoders, 2018. arXiv:1804.00891
    """

    support = constraints.sphere

    def __init__(
        self, encoder: nn.Module, latent_dim: int, features: int | None = None, minimum_concentration: float = 0.01
    ) -> None:
        if latent_dim < 2:
            raise ValueError(f"got latent_dim={latent_dim}, wanted 2 or more: the sphere in R^1 is two points.")
        if not minimum_concentration > 0:
            raise ValueError(f"got minimum_concentration={minimum_concentration}, wanted a number > 0.")
        super().__init__(encoder, latent_dim, latent_dim + 1, features)
        self.minimum_concentration = minimum_concentration

    def family(self, parameters: Tensor) -> TorchDistribution:
        direction, rate = parameters[..., :-1], parameters[..., -1]
        concentration = self.minimum_concentration + self.latent_dim * softplus(rate)
        return spherical.VonMisesFisher(_normalised(direction), concentration)


def _normalised(vector: Tensor) -> Tensor:
    """Unit vectors; the first axis for a vector of zeros, with no gradient."""
    size = vector.detach().abs().amax(-1, keepdim=True)
    some = size > 0
    axis = torch.zeros_like(vector)
    axis[..., 0] = 1
    # Divided by its largest coordinate first, no vector is too short or too long to be squared.
    scaled = torch.where(some, vector, axis) / torch.where(some, size, torch.ones_like(size))
    return scaled / scaled.norm(dim=-1, keepdim=True)
