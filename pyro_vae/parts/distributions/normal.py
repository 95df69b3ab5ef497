"""Correlated Gaussians that plates expand for nothing.

Under a plate of K particles torch's multivariate normals expand their (D, D) matrices too, and every triangular solve
works on K copies of them. Here `expand` keeps the B matrices, and the K samples become columns of B solves.

Both families also know KL(q || p) to a factorised Gaussian p, so that Pyro's ``TraceMeanField_ELBO`` integrates it:

    KL(N(m, S) || N(a, diag b^2)) = (sum_d (S_dd + (m_d - a_d)^2) / b_d^2 - D - log det S) / 2 + sum_d log b_d
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import Independent, Normal, constraints, register_kl

LOG_TWO_PI = math.log(2 * math.pi)


_Self = TypeVar("_Self", bound="Kept")


class Kept(TorchDistribution):
    """A distribution whose `expand` keeps the parameters as they are and changes the batch_shape only; abstract.

    Its methods broadcast: what they return has the batch_shape, whatever the parameters have.
    """

    def expand(self: _Self, batch_shape: Any, _instance: Any = None) -> _Self:
        shape = torch.Size(batch_shape)
        if torch.broadcast_shapes(self.batch_shape, shape) != shape:
            raise ValueError(f"cannot expand batch_shape {tuple(self.batch_shape)} to {tuple(shape)}.")
        new = copy.copy(self)
        new._batch_shape = shape
        return new

    def _whole(self, tensor: Tensor, dims: int = 1) -> Tensor:
        """A tensor with that many dimensions of its own, over the whole batch."""
        return tensor.expand(self.batch_shape + tensor.shape[tensor.dim() - dims :])


class Whole:
    """A parameter of a `Kept` distribution, with that many dimensions of its own, over the whole batch."""

    def __init__(self, dims: int) -> None:
        self.dims = dims

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = f"_{name}"

    def __get__(self, distribution: Any, owner: Any = None) -> Any:
        return self if distribution is None else distribution._whole(getattr(distribution, self.name), self.dims)


class _Normal(Kept):
    """N(z; m, S) by a factor of S: what the two below have in common."""

    support = constraints.real_vector
    has_rsample = True
    _loc: Tensor
    loc = Whole(1)  # m, (..., D)

    @property
    def log_det(self) -> Tensor:
        """log det S, (...)."""
        raise NotImplementedError

    @property
    def mean(self) -> Tensor:
        return self.loc

    def entropy(self) -> Tensor:
        """The entropy in nats, (...)."""
        return 0.5 * (self.log_det + self.event_shape[0] * (1 + LOG_TWO_PI))


class CholeskyNormal(_Normal):
    """N(z; m, L L') with a lower-triangular L of positive diagonal.

        log p(z) = -|L^-1 (z - m)|^2 / 2 - sum_d log L_dd - D/2 log 2 pi

    The arguments are trusted: nothing is validated, so nothing branches on values.

    Args:
        loc: m, (..., D).
        scale_tril: L, (..., D, D).
    Example:
        >>> CholeskyNormal(torch.zeros(3, 2), torch.eye(2)).expand([4, 3]).log_prob(torch.zeros(2))[0]
        tensor([-1.8379, -1.8379, -1.8379])
    """

    arg_constraints = {"loc": constraints.real_vector, "scale_tril": constraints.lower_cholesky}
    scale_tril = Whole(2)  # L, (..., D, D)

    def __init__(self, loc: Tensor, scale_tril: Tensor) -> None:
        self._loc, self._scale_tril = loc, scale_tril
        batch_shape = torch.broadcast_shapes(loc.shape[:-1], scale_tril.shape[:-2])
        super().__init__(batch_shape, loc.shape[-1:], validate_args=False)

    @property
    def variance(self) -> Tensor:
        return self._whole(self._scale_tril.square().sum(-1))

    @property
    def covariance_matrix(self) -> Tensor:
        """L L', (..., D, D)."""
        return self._whole(self._scale_tril @ self._scale_tril.mT, 2)

    @property
    def log_det(self) -> Tensor:
        """log det L L', (...)."""
        return (2 * self._scale_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)).expand(self.batch_shape)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        noise = self._loc.new_empty(self._extended_shape(torch.Size(sample_shape))).normal_()
        return self._loc + _columnwise(torch.matmul, self._scale_tril, noise)

    def log_prob(self, value: Tensor) -> Tensor:
        solve = functools.partial(torch.linalg.solve_triangular, upper=False)
        white = _columnwise(solve, self._scale_tril, value - self._loc)
        return -0.5 * (white.square().sum(-1) + self.log_det + self.event_shape[0] * LOG_TWO_PI)


class LowRankNormal(_Normal):
    """N(z; m, S) with S = diag(s) (I + V V') diag(s), V of R columns.

    That is diag(s^2) + W W' with W = diag(s) V: written with V, the family is the same in
    every unit of z, and I + V' V, the only matrix that is factorised, is R x R and never
    singular. By Woodbury's identity and the matrix determinant lemma, y = (z - m) / s:

        log det S    = 2 sum_d log s_d + log det (I + V' V)
        (z-m)'S^-1(z-m) = |y - V a|^2 + |a|^2,   a = (I + V' V)^-1 V' y

    where the usual |y|^2 - y' V a would cancel. The cost of a density is O(D R).

    Args:
        loc: m, (..., D).
        scale: s > 0, (..., D).
        factor: V, (..., D, R).
    Example:
        >>> LowRankNormal(torch.zeros(2), torch.ones(2), torch.ones(2, 1)).covariance_matrix
        tensor([[2., 1.],
                [1., 2.]])
    """

    arg_constraints = {
        "loc": constraints.real_vector,
        "scale": constraints.independent(constraints.positive, 1),
        "factor": constraints.independent(constraints.real, 2),
    }
    scale = Whole(1)  # s, (..., D)
    factor = Whole(2)  # V, (..., D, R)

    def __init__(self, loc: Tensor, scale: Tensor, factor: Tensor) -> None:
        self._loc, self._scale, self._factor = loc, scale, factor
        batch_shape = torch.broadcast_shapes(loc.shape[:-1], scale.shape[:-1], factor.shape[:-2])
        super().__init__(batch_shape, loc.shape[-1:], validate_args=False)

    @property
    def variance(self) -> Tensor:
        return self._whole(self._scale.square() * (1 + self._factor.square().sum(-1)))

    @property
    def covariance_matrix(self) -> Tensor:
        """S, (..., D, D)."""
        wide = self._scale.unsqueeze(-1) * self._factor
        return self._whole(torch.diag_embed(self._scale.square()) + wide @ wide.mT, 2)

    @property
    def log_det(self) -> Tensor:
        """log det S, (...)."""
        small = 2 * self._capacitance_tril().diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return (2 * self._scale.log().sum(-1) + small).expand(self.batch_shape)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        shape = self._extended_shape(torch.Size(sample_shape))
        noise = self._loc.new_empty(shape).normal_()
        few = self._loc.new_empty(shape[:-1] + self._factor.shape[-1:]).normal_()
        return self._loc + self._scale * (noise + _columnwise(torch.matmul, self._factor, few))

    def log_prob(self, value: Tensor) -> Tensor:
        white = (value - self._loc) / self._scale
        seen = _columnwise(torch.matmul, self._factor.mT, white)
        few = _columnwise(lambda tril, columns: torch.cholesky_solve(columns, tril), self._capacitance_tril(), seen)
        rest = white - _columnwise(torch.matmul, self._factor, few)
        quadratic = rest.square().sum(-1) + few.square().sum(-1)
        return -0.5 * (quadratic + self.log_det + self.event_shape[0] * LOG_TWO_PI)

    def _capacitance_tril(self) -> Tensor:
        one = torch.eye(self._factor.shape[-1], dtype=self._factor.dtype, device=self._factor.device)
        return torch.linalg.cholesky(one + self._factor.mT @ self._factor)


def _columnwise(operation: Callable[[Tensor, Tensor], Tensor], matrix: Tensor, vectors: Tensor) -> Tensor:
    """operation(A_b, v_kb), (..., *B, S), with the K vectors (..., *B, R) of one matrix (*B, P, Q) as its columns."""
    shape = torch.broadcast_shapes(matrix.shape[:-2], vectors.shape[:-1])
    batch = shape[len(shape) - matrix.dim() + 2 :]
    lead = shape[: len(shape) - len(batch)]
    vectors = vectors.expand(shape + vectors.shape[-1:]).reshape((math.prod(lead),) + batch + vectors.shape[-1:])
    columns = operation(matrix.expand(batch + matrix.shape[-2:]), vectors.movedim(0, -1)).movedim(-1, 0)
    return columns.reshape(shape + columns.shape[-1:])


@register_kl(CholeskyNormal, Independent)
@register_kl(LowRankNormal, Independent)
def _kl_to_factorised(q: CholeskyNormal | LowRankNormal, p: Independent[Normal]) -> Tensor:
    prior = p.base_dist
    if not isinstance(prior, Normal) or p.reinterpreted_batch_ndims != 1:
        raise NotImplementedError
    quadratic = (q.variance + (q.loc - prior.loc).square()) / prior.scale.square()
    per_dimension = 0.5 * (quadratic - 1) + prior.scale.log()
    return per_dimension.sum(-1) - 0.5 * q.log_det
