"""The likelihood of continuous pixels."""

from __future__ import annotations

import math

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from pyro_vae.parts.likelihoods.likelihood import Likelihood


class Normal(Likelihood):
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
        >>> import torch
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
        super().__init__(decoder)
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

    def family(self, *parameters: Tensor) -> TorchDistribution:
        loc = parameters[0]
        if self.scale == "network":
            scale = self.minimum_scale + parameters[1].exp()
        elif isinstance(self.scale, str):
            shape = self.log_scale.shape
            if shape and shape != loc.shape[loc.dim() - len(shape) :]:
                raise ValueError(
                    f'scale="per-pixel" was built for x_shape {tuple(shape)}, but the decoder returned data of shape '
                    f"{tuple(loc.shape[loc.dim() - len(shape) :])}. Give both the shape of one datum."
                )
            scale = (self.minimum_scale + self.log_scale.exp()).expand_as(loc)
        else:
            scale = loc.new_full((), self.scale).expand_as(loc)
        return dist.Normal(loc, scale, validate_args=False)
