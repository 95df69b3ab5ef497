"""Priors of one piece: normal, uniform on the sphere, a flow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution, constraints
from torch import Tensor, nn

from pyro_vae.options import integer
from pyro_vae.parts.distributions import spherical
from pyro_vae.parts.distributions.flow import check_flow, pushforward, start_near_identity, zuko_flows


class StandardNormal(nn.Module):
    """p(z) = N(z; 0, I) in D dimensions.

    Args:
        latent_dim: D.
    Example:
        >>> StandardNormal(2)().log_prob(torch.zeros(2))
        tensor(-1.8379)
    """

    support = constraints.real_vector
    loc: Tensor

    def __init__(self, latent_dim: int) -> None:
        super().__init__()
        self.latent_dim = integer("latent_dim", latent_dim)
        # Non-persistent: a constant that follows the module's device and dtype.
        self.register_buffer("loc", torch.zeros(self.latent_dim), persistent=False)

    def forward(self) -> TorchDistribution:
        return dist.Normal(self.loc, torch.ones_like(self.loc), validate_args=False).to_event(1)


class HypersphericalUniform(nn.Module):
    """p(z) uniform on the unit sphere {z in R^D: |z| = 1}, for the posterior `VonMisesFisher`.

        log p(z) = log Gamma(D/2) - log 2 - D/2 log pi

    with respect to the sphere's surface, of D - 1 dimensions.

    Args:
        latent_dim: D >= 2, the dimension of the space: z has D coordinates.
    Raises:
        ValueError: latent_dim < 2.
    Example:
        >>> HypersphericalUniform(3)().log_prob(torch.tensor([0.0, 0.0, 1.0]))     # -log 4 pi
        tensor(-2.5310)

    Reference: Davidson et al., Hyperspherical Variational Auto-Encoders, 2018. arXiv:1804.00891
    """

    support = constraints.sphere
    like: Tensor

    def __init__(self, latent_dim: int) -> None:
        super().__init__()
        if latent_dim < 2:
            raise ValueError(f"got latent_dim={latent_dim}, wanted 2 or more: the sphere in R^1 is two points.")
        self.latent_dim = latent_dim
        # Non-persistent: it tells samples the module's device and dtype.
        self.register_buffer("like", torch.zeros(()), persistent=False)

    def forward(self) -> TorchDistribution:
        return spherical.HypersphericalUniform(self.latent_dim, like=self.like)


class Flow(nn.Module):
    """p(z) of a flow of zuko, in the direction that scores any z in one pass.

        log p(z) = log N(f(z); 0, I) + log |det df/dz|

    The prior of a variational autoencoder scores the guide's samples at every step and is drawn from seldom, so the
    quick direction is scoring; an autoregressive flow then draws in D passes. Built from a class it starts close to
    N(0, I); a ready flow is taken as it is.

    Args:
        latent_dim: D, or a ready flow of zuko without context.
        flow: A class of zuko, or any callable that takes ``features`` and returns a flow; None for zuko.flows.MAF.
        options: What the class takes, such as transforms=5, hidden_features=(64, 64).
    Raises:
        ValueError: Not a flow, one that does not live on R^D, or one with a context.
    Example:
        >>> import torch, zuko
        >>> prior = Flow(2, zuko.flows.NSF, transforms=2, bins=4)
        >>> prior().log_prob(torch.zeros(5, 2)).shape
        torch.Size([5])
        >>> Flow(zuko.flows.MAF(features=3))().sample().shape
        torch.Size([3])

    Reference: Chen et al., Variational Lossy Autoencoder, 2017. arXiv:1611.02731
    """

    support = constraints.real_vector

    def __init__(
        self, latent_dim: int | nn.Module, flow: Callable[..., nn.Module] | None = None, **options: Any
    ) -> None:
        super().__init__()
        if isinstance(latent_dim, nn.Module):
            if flow is not None or options:
                raise ValueError(
                    f"got a ready {type(latent_dim).__name__} and options to build one, wanted either: Flow(flow), or "
                    "Flow(latent_dim, flow_class, **options)."
                )
            self.flow = latent_dim
            self.latent_dim = check_flow(self.flow)
            try:
                self().sample()
            except (RuntimeError, AttributeError) as error:
                name = type(self.flow).__name__
                raise ValueError(
                    f"got a {name} that cannot be drawn from without a context ({error}), wanted one for p(z) alone. "
                    f"Build it with context=0: {name}(features={self.latent_dim})."
                ) from error
            return
        size: int = integer("latent_dim", latent_dim)
        if flow is None:
            flow, options = zuko_flows().MAF, {"activation": nn.SiLU, **options}
        self.flow = flow(features=size, **options)
        self.latent_dim = check_flow(self.flow, size)
        start_near_identity(self.flow)

    def forward(self) -> TorchDistribution:
        """p(z), batch_shape (), event_shape (D,)."""
        return pushforward(self.flow)
