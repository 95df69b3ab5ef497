"""Planar flows: a diagonal normal, bent along one direction at a time.

    z_0 = mu + sigma u,   u ~ N(0, I)
    z_i = z_{i-1} + v_i tanh(w_i' z_{i-1} + b_i),   i = 1, ..., N
    log |det dz_i/dz_{i-1}| = log(1 + (1 - tanh^2) w_i' v_i)

with mu, sigma and every w_i, v_i, b_i functions of x. A step is invertible if and only
if w'v > -1. So v is a free vector u whose part along w is moved there:

    v = u + (m(w'u) - w'u) w / |w|^2,   m(a) = softplus(a + c) - (1 - e)

The constant c gives m(0) = 0 (u = 0 is the identity; the paper's m(0) = log 2 - 1 is
not), and e = 0.001 keeps the determinant away from zero.

A step changes z along v only, so its inverse is one scalar equation, a + (w'v) tanh(a) =
w'z + b for a = w'z_{i-1} + b: any sample can be scored, at a few times the cost of a draw.
"""

from __future__ import annotations

import math

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn
from torch.nn.functional import softplus

from pyro_vae.parts.distributions.flow import Pushforward
from pyro_vae.parts.distributions.roots import invert_tanh_step
from pyro_vae.parts.posteriors.amortized import Amortized

_FLOOR = 1e-3
_SHIFT = math.log(math.expm1(1 - _FLOOR))


class Planar(Amortized):
    """q(z | x) of N planar steps, all of whose parameters the encoder gives.

        z <- z + v tanh(w'z + b),   log |det| = log(1 + (1 - tanh^2(w'z + b)) w'v)

    Starts close to its diagonal normal.

    Args:
        encoder: x, (..., *x_shape), to features, (..., F).
        latent_dim: D.
        num_flows: N.
        features: F; read from ``encoder.out_features`` when not given.
    Raises:
        ValueError: num_flows is not positive, or the number of features is unknown.
    Example:
        >>> Planar(nn.Linear(3, 4), latent_dim=2, num_flows=3)(torch.zeros(5, 3)).event_shape
        torch.Size([2])

    Reference: Rezende and Mohamed, Variational Inference with Normalizing Flows, 2015. arXiv:1505.05770
    """

    passes = 1

    def __init__(self, encoder: nn.Module, latent_dim: int, num_flows: int = 8, features: int | None = None) -> None:
        if num_flows < 1:
            raise ValueError(f"num_flows must be a positive integer, got {num_flows}.")
        super().__init__(encoder, latent_dim, 2 * latent_dim + num_flows * (2 * latent_dim + 1), features)
        self.num_flows = num_flows
        with torch.no_grad():
            # The rows of u: the order is mu, log sigma, all w, all u, all b.
            first = (2 + num_flows) * latent_dim
            for parameter in self.head.parameters():
                parameter[first : first + num_flows * latent_dim] *= 0.01

    def family(self, parameters: Tensor) -> TorchDistribution:
        n, d = self.num_flows, self.latent_dim
        loc, log_scale, w, u, b = parameters.split([d, d, n * d, n * d, n], -1)
        base = dist.Normal(loc, log_scale.exp(), validate_args=False).to_event(1)
        return _planar(base, w.unflatten(-1, (n, d)), u.unflatten(-1, (n, d)), b)


def _planar(base: TorchDistribution, w: Tensor, u: Tensor, b: Tensor) -> Pushforward:
    """Planar steps with w and free u of (..., N, D) and b of (..., N)."""
    wu = (w * u).sum(-1)
    wv = softplus(wu + _SHIFT) - (1 - _FLOOR)
    v = u + ((wv - wu) / w.square().sum(-1).clamp(min=1e-12)).unsqueeze(-1) * w
    steps = list(zip(w.unbind(-2), v.unbind(-2), b.unsqueeze(-1).unbind(-2), wv.unsqueeze(-1).unbind(-2), strict=True))

    def log_det(tanhs: list[Tensor]) -> Tensor:
        return torch.log1p((1 - torch.cat(tanhs, -1).square()) * wv).sum(-1)

    def push(z: Tensor) -> tuple[Tensor, Tensor]:
        tanhs = []
        for w, v, b, _ in steps:
            tanhs.append(((z * w).sum(-1, keepdim=True) + b).tanh())
            z = z + v * tanhs[-1]
        return z, log_det(tanhs)

    def pull(z: Tensor) -> tuple[Tensor, Tensor]:
        tanhs: list[Tensor] = []
        for w, v, b, wv in reversed(steps):
            tanhs.insert(0, invert_tanh_step(wv, (z * w).sum(-1, keepdim=True) + b).tanh())
            z = z - v * tanhs[0]
        return z, -log_det(tanhs)

    return Pushforward(base, push, pull)
