"""Likelihoods p(x | z): modules that turn latents into a distribution over one datum.

A likelihood owns a decoder. Latents (..., D) give a distribution with batch_shape
(...) and the event shape of a datum: all dimensions that the decoder adds are event
dimensions.
"""

from __future__ import annotations

import math

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from pyro_vae.parts.distributions import BernoulliLogits


def _event_dim(output: Tensor, z: Tensor) -> int:
    added = output.dim() - (z.dim() - 1)
    if added < 1 or output.shape[: output.dim() - added] != z.shape[:-1]:
        raise ValueError(
            f"the decoder turned latents of shape {tuple(z.shape)} into {tuple(output.shape)}, wanted "
            f"{tuple(z.shape[:-1])} followed by the shape of a datum. Keep the leading dimensions: "
            "reshape with (*z.shape[:-1], ...)."
        )
    return added


class Bernoulli(nn.Module):
    """p(x | z) = prod_i Bernoulli(x_i; sigmoid(l_i(z))): binary pixels.

    Args:
        decoder: z, (..., D), to logits, (..., *x_shape).
    Example:
        >>> Bernoulli(nn.Linear(2, 6))(torch.zeros(5, 2)).event_shape
        torch.Size([6])
    """

    parameters_per_pixel = 1

    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, z: Tensor) -> TorchDistribution:
        logits = self.decoder(z)
        return BernoulliLogits(logits).to_event(_event_dim(logits, z))


class Normal(nn.Module):
    """p(x | z) = prod_i N(x_i; mu_i(z), sigma_i^2): continuous data.

    Args:
        decoder: z, (..., D), to mu, (..., *x_shape); with scale="network" to mu and
            log sigma, twice as many along the channel dimension (the first of x_shape).
        scale: A number (fixed), "learned" (one for all pixels), "per-pixel" (one for
            each, shared by all data) or "network" (a function of z).
        x_shape: Shape of one datum; needed for "per-pixel".
        initial_scale: Where a learned scale starts.
        minimum_scale: Lower limit of a learned scale, without which a constant pixel
            has an unbounded density.
    Raises:
        ValueError: An unknown or non-positive scale, or "per-pixel" without x_shape.
    Example:
        >>> Normal(nn.Linear(2, 6), scale=0.1)(torch.zeros(5, 2)).event_shape
        torch.Size([6])
    """

    def __init__(
        self,
        decoder: nn.Module,
        scale: float | str = "learned",
        x_shape: tuple[int, ...] | None = None,
        initial_scale: float = 1.0,
        minimum_scale: float = 1e-3,
    ) -> None:
        super().__init__()
        self.decoder = decoder
        self.scale = scale
        self.minimum_scale = minimum_scale
        self.parameters_per_pixel = 2 if scale == "network" else 1
        start = math.log(max(initial_scale - minimum_scale, 1e-6))
        if isinstance(scale, int | float):
            if not scale > 0:
                raise ValueError(f"scale must be positive, got {scale}.")
        elif scale == "learned":
            self.log_scale = nn.Parameter(torch.tensor(start))
        elif scale == "per-pixel":
            if x_shape is None:
                raise ValueError('scale="per-pixel" needs x_shape, the shape of one datum.')
            self.log_scale = nn.Parameter(torch.full(tuple(x_shape), start))
        elif scale != "network":
            raise ValueError(f'got scale={scale!r}, wanted a number, "learned", "per-pixel" or "network".')

    def forward(self, z: Tensor) -> TorchDistribution:
        output = self.decoder(z)
        event_dim = _event_dim(output, z)
        if self.scale == "network":
            if output.shape[-event_dim] % 2:
                raise ValueError(
                    f"the decoder turned a latent into {tuple(output.shape[-event_dim:])}, wanted mu and log sigma "
                    'along its first dimension: scale="network" needs twice the channels of a datum.'
                )
            loc, log_scale = output.chunk(2, -event_dim)
            scale = self.minimum_scale + log_scale.exp()
        elif isinstance(self.scale, str):
            shape = self.log_scale.shape
            if shape and shape != output.shape[-event_dim:]:
                raise ValueError(
                    f'scale="per-pixel" was built for x_shape {tuple(shape)}, but the decoder returned data of shape '
                    f"{tuple(output.shape[-event_dim:])}. Give both the shape of one datum."
                )
            loc, scale = output, (self.minimum_scale + self.log_scale.exp()).expand_as(output)
        else:
            loc, scale = output, output.new_full((), self.scale).expand_as(output)
        return dist.Normal(loc, scale, validate_args=False).to_event(event_dim)
