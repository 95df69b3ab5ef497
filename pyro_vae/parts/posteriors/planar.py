"""Planar and Sylvester flows, all of whose parameters the encoder gives.

A planar step, z <- z + v tanh(w'z + b), is invertible if and only if w'v > -1. So v is a free vector u whose part along
w is moved there:

    v = u + (m(w'u) - w'u) w / |w|^2,   m(a) = softplus(a + c) - (1 - e)

The constant c gives m(0) = 0 (u = 0 is the identity; the paper's m(0) = log 2 - 1 is
not), and e = 0.001 keeps the determinant away from zero.

A step changes z along v only, so its inverse is one scalar equation, a + (w'v) tanh(a) =
w'z + b for a = w'z_{i-1} + b: any sample can be scored, at a few times the cost of a draw.

A Sylvester step, z <- z + Q R tanh(R~ Q'z + b), bends M directions at once. Q is D x M with orthonormal columns, R and
R~ are upper triangular; by Sylvester's identity only their diagonals enter the determinant, and a step is invertible
where r_mm r~_mm > -1, for which the diagonals go through tanh. Q is one of

    orthogonal   the orthogonal factor of a free D x M matrix
    householder  a product of H reflections I - 2 v v' / |v|^2, M = D
    triangular   the identity and the reversal of the latents in turn, M = D

Its inverse is triangular as well: a + R~ R tanh(a) = R~ Q' z_i + b for a = R~ Q' z_{i-1} + b, M scalar equations, the
last first.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn
from torch.nn.functional import softplus

from pyro_vae.parts.distributions.flow import Pushforward
from pyro_vae.parts.posteriors.amortized import Amortized

# One step: z to a, tanh(a) to what it adds to z, and a + slopes tanh(a) to tanh(a).
Step: TypeAlias = tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]

_STEPS = 16


def invert_tanh_step(slope: Tensor, value: Tensor) -> Tensor:
    """The a that solves a + m tanh(a) = c, exact to rounding and differentiable in m and c.

    The left side is odd, and on a >= 0 convex for -1 < m < 0 and concave for m > 0: Newton's iteration from the better
    of two bounds, c - m and c / (1 + m), is monotone. First and second derivatives are right.

    Example:
        >>> a = invert_tanh_step(torch.tensor(2.0), torch.tensor(-3.0))
        >>> torch.allclose(a + 2 * a.tanh(), torch.tensor(-3.0))
        True
    """
    with torch.no_grad():
        m, c = torch.broadcast_tensors(slope, value.abs())
        chord, shifted = c / (1 + m), c - m
        a = torch.where(m < 0, torch.minimum(chord, shifted), torch.maximum(chord, shifted))
        for _ in range(_STEPS):
            t = a.tanh()
            a = a - (a + m * t - c) / (1 + m * (1 - t * t))
        a = a * value.sign()
    # At the root Newton's correction is zero, and its derivative is that of the root.
    for _ in range(2):
        t = a.tanh()
        a = a - (a + slope * t - value) / (1 + slope * (1 - t * t))
    return a


_FLOOR = 1e-3
_SHIFT = math.log(math.expm1(1 - _FLOOR))


class Planar(Amortized):
    """q(z | x) of N planar steps, all of whose parameters the encoder gives.

        z <- z + v tanh(w'z + b),   log |det| = log(1 + (1 - tanh^2(w'z + b)) w'v)

    Starts close to its diagonal normal.

    Args:
        encoder, latent_dim, features: As of `Amortized`.
        num_flows: N.
    Raises:
        ValueError: num_flows is not positive.
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
        w, u = w.unflatten(-1, (n, d)), u.unflatten(-1, (n, d))
        wu = (w * u).sum(-1)
        wv = softplus(wu + _SHIFT) - (1 - _FLOOR)
        v = u + ((wv - wu) / w.square().sum(-1).clamp(min=1e-12)).unsqueeze(-1) * w

        def step(w: Tensor, v: Tensor, b: Tensor, wv: Tensor) -> Step:
            return (
                lambda z: (z * w).sum(-1, keepdim=True) + b,
                lambda tanh: v * tanh,
                lambda a: invert_tanh_step(wv, a).tanh(),
            )

        parts = w.unbind(-2), v.unbind(-2), b.unsqueeze(-1).unbind(-2), wv.unsqueeze(-1).unbind(-2)
        return _steps(base, [step(*of) for of in zip(*parts, strict=True)], wv.unsqueeze(-1))


def _steps(base: TorchDistribution, steps: list[Step], slopes: Tensor) -> Pushforward:
    """Steps z + out(tanh(into(z))) one after the other, log |det| = sum log(1 + (1 - tanh^2) slopes) over (N, M)."""

    def log_det(tanhs: list[Tensor]) -> Tensor:
        return torch.log1p((1 - torch.stack(tanhs, -2).square()) * slopes).sum((-2, -1))

    def push(z: Tensor) -> tuple[Tensor, Tensor]:
        tanhs = []
        for into, out, _ in steps:
            tanhs.append(into(z).tanh())
            z = z + out(tanhs[-1])
        return z, log_det(tanhs)

    def pull(z: Tensor) -> tuple[Tensor, Tensor]:
        tanhs: list[Tensor] = []
        for into, out, solve in reversed(steps):
            tanhs.insert(0, solve(into(z)))
            z = z - out(tanhs[0])
        return z, -log_det(tanhs)

    return Pushforward(base, push, pull)


Rotation: TypeAlias = tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]  # z -> Q'z, y -> Q y

_LARGEST = 1 - 5e-4  # of a diagonal entry, so that the determinant stays away from zero in float32


class Sylvester(Amortized):
    """q(z | x) of N Sylvester steps, all of whose parameters the encoder gives.

        z <- z + Q R tanh(R~ Q'z + b),   log |det| = sum log(1 + (1 - tanh^2) diag(R) diag(R~))

    Starts close to its diagonal normal. A step takes M^2 + 2 M numbers from the head, and
    its vectors D M or D H more: with 50 latents it is the head that costs, not the flow, and
    "orthogonal" with a small num_ortho is several times quicker than the others.

    Args:
        encoder, latent_dim, features: As of `Amortized`.
        num_flows: N.
        kind: "orthogonal", "householder" or "triangular".
        num_ortho: M of "orthogonal", at most D; None for 16, or D if that is less. Others have M = D.
        num_householder: H of "householder"; None for 8, or D if that is less.
    Raises:
        ValueError: An unknown kind, or a number that it does not take.
    Example:
        >>> Sylvester(nn.Linear(3, 4), latent_dim=2, kind="householder")(torch.zeros(5, 3)).event_shape
        torch.Size([2])

    Reference: van den Berg et al., Sylvester Normalizing Flows for Variational Inference, 2018. arXiv:1803.05649
    """

    rescoring = "D passes"
    passes = 1

    def __init__(
        self,
        encoder: nn.Module,
        latent_dim: int,
        num_flows: int = 4,
        kind: str = "orthogonal",
        num_ortho: int | None = None,
        num_householder: int | None = None,
        features: int | None = None,
    ) -> None:
        _check(latent_dim, num_flows, kind, num_ortho, num_householder)
        m = (num_ortho or min(latent_dim, 16)) if kind == "orthogonal" else latent_dim
        vectors = {"orthogonal": m, "householder": num_householder or min(latent_dim, 8), "triangular": 0}[kind]
        self._widths = [m * m, m, m, vectors * latent_dim]
        super().__init__(encoder, latent_dim, 2 * latent_dim + num_flows * sum(self._widths), features)
        self.num_flows, self.kind, self.num_ortho, self.num_vectors = num_flows, kind, m, vectors
        with torch.no_grad():
            for parameter in self.head.parameters():
                rows = parameter[2 * latent_dim :].unflatten(0, (num_flows, -1))
                rows[:, : m * m] *= 0.01  # of R, and of R~ off its diagonal

    def family(self, parameters: Tensor) -> TorchDistribution:
        n, d, m = self.num_flows, self.latent_dim, self.num_ortho
        loc, log_scale, rest = parameters.split([d, d, parameters.shape[-1] - 2 * d], -1)
        square, diagonal, b, vectors = rest.unflatten(-1, (n, -1)).split(self._widths, -1)
        # One square holds R on and above its diagonal and R~, transposed, below.
        square = square.unflatten(-1, (m, m))
        r = square.triu(1) + torch.diag_embed(_LARGEST * square.diagonal(dim1=-2, dim2=-1).tanh())
        r_tilde = square.tril(-1).mT + torch.diag_embed(_LARGEST * diagonal.tanh())
        base = dist.Normal(loc, log_scale.exp(), validate_args=False).to_event(1)

        def step(rotation: Rotation, r: Tensor, r_tilde: Tensor, b: Tensor) -> Step:
            down, up = rotation
            return (
                lambda z: _times(r_tilde, down(z)) + b,
                lambda tanh: up(_times(r, tanh)),
                lambda a: _solve(r_tilde @ r, a),
            )

        parts = self._rotations(vectors), r.unbind(-3), r_tilde.unbind(-3), b.unbind(-2)
        product = r.diagonal(dim1=-2, dim2=-1) * r_tilde.diagonal(dim1=-2, dim2=-1)
        return _steps(base, [step(*of) for of in zip(*parts, strict=True)], product)

    def _rotations(self, vectors: Tensor) -> list[Rotation]:
        """Q of each step, from free numbers of (..., N, vectors * D)."""
        if self.kind == "triangular":
            turns: list[Callable[[Tensor], Tensor]] = [lambda z: z, lambda z: z.flip(-1)]
            return [(turns[step % 2], turns[step % 2]) for step in range(self.num_flows)]
        columns = vectors.unflatten(-1, (self.num_vectors, self.latent_dim)).mT
        if self.kind == "orthogonal":
            return [_matrix(q) for q in orthonormal(columns).unbind(-3)]
        inner = reflection_core(columns)
        return [_reflections(v, t) for v, t in zip(columns.unbind(-3), inner.unbind(-3), strict=True)]


def orthonormal(a: Tensor) -> Tensor:
    """The Q of A = Q R, (..., D, M), with a positive diagonal of R: Gram and Schmidt's basis, smooth in A, M <= D; in
    place of the paper's iteration Q <- Q (I + (I - Q'Q) / 2)."""
    q, r = torch.linalg.qr(a)
    return q * torch.where(r.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).unsqueeze(-2).to(q)


def reflection_core(v: Tensor) -> Tensor:
    """The T, (..., H, H), of (I - 2 v_1 v_1' / |v_1|^2) ... (I - 2 v_H v_H' / |v_H|^2) = I - V T V', V of (..., D, H).

    T^-1 has half of V'V on its diagonal, all of it above, nothing below: H reflections cost two products with V,
    without a loop. No column of V is zero.
    """
    gram = v.mT @ v
    inverse = gram.triu(1) + torch.diag_embed(gram.diagonal(dim1=-2, dim2=-1) / 2)
    return torch.linalg.solve_triangular(inverse, torch.eye(v.shape[-1]).to(v).expand_as(inverse), upper=True)


def _solve(s: Tensor, c: Tensor) -> Tensor:
    """tanh(a) where a + S tanh(a) = c, for upper triangular S of (..., M, M), by back substitution."""
    known: list[Tensor] = []
    for row in reversed(range(s.shape[-1])):
        value = c[..., row]
        if known:
            value = value - (s[..., row, row + 1 :] * torch.stack(known, -1)).sum(-1)
        known.insert(0, invert_tanh_step(s[..., row, row], value).tanh())
    return torch.stack(known, -1)


def _times(matrix: Tensor, vector: Tensor) -> Tensor:
    # Not matmul, which would copy the matrices for every particle.
    return torch.einsum("...ij,...j->...i", matrix, vector)


def _matrix(q: Tensor) -> Rotation:
    return lambda z: _times(q.mT, z), lambda y: _times(q, y)


def _reflections(v: Tensor, t: Tensor) -> Rotation:
    def turned(z: Tensor, core: Tensor) -> Tensor:
        return z - _times(v, _times(core, _times(v.mT, z)))

    return lambda z: turned(z, t.mT), lambda y: turned(y, t)


def _check(latent_dim: int, num_flows: int, kind: str, num_ortho: int | None, num_householder: int | None) -> None:
    if kind not in ("orthogonal", "householder", "triangular"):
        raise ValueError(f'got kind={kind!r}, wanted "orthogonal", "householder" or "triangular".')
    if num_flows < 1:
        raise ValueError(f"num_flows must be a positive integer, got {num_flows}.")
    if num_ortho is not None and (kind != "orthogonal" or not 1 <= num_ortho <= latent_dim):
        raise ValueError(
            f"got num_ortho={num_ortho} with kind={kind!r} and {latent_dim} latents, wanted 1 to {latent_dim} and "
            'kind="orthogonal"; the other kinds bend all latents.'
        )
    if num_householder is not None and (kind != "householder" or num_householder < 1):
        raise ValueError(
            f"got num_householder={num_householder} with kind={kind!r}, wanted a positive number and "
            'kind="householder".'
        )
