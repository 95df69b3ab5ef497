"""Likelihoods with independent pixels: what they have in common, and those of binary and continuous data.

A learned standard deviation is a minimum plus `bounded_exp` of an unconstrained number: it never overflows, whatever
the network returns, and has a gradient everywhere.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, TypeVar

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from pyro_vae.parts.distributions.bernoulli import BernoulliLogits, ContinuousBernoulliLogits
from pyro_vae.parts.standardize import Standardize

_Self = TypeVar("_Self", bound="StandardizedNormal")


class Likelihood(nn.Module, ABC):
    """p(x | z) = prod_i family(x_i; parameters_i(z)): a decoder, and a distribution of each pixel.

    The decoder gives `parameters_per_pixel` times the channels (the first dimension of
    a datum); `family` is handed that many tensors of the shape of the data.

    Args:
        decoder: z, (..., D), to parameters, (..., n * C, *rest) for data (C, *rest).
    Attributes:
        parameters_per_pixel, values, standardize: As of `pyro_vae.protocols.Likelihood`; n is the first.
    Raises:
        ValueError: The decoder drops the leading dimensions of z, or its channels are no multiple of n.
    """

    parameters_per_pixel: int = 1
    values: ClassVar[str | None] = None

    def __init__(self, decoder: nn.Module, standardize: Standardize | None = None) -> None:
        super().__init__()
        self.decoder, self.standardize = decoder, standardize

    def forward(self, z: Tensor) -> TorchDistribution:
        """p(x | z): latents (..., D) to a distribution of batch_shape (...), event_shape x_shape."""
        output = self.decoder(z)
        event_dim = output.dim() - (z.dim() - 1)
        if event_dim < 1 or output.shape[: output.dim() - event_dim] != z.shape[:-1]:
            raise ValueError(
                f"the decoder turned latents of shape {tuple(z.shape)} into {tuple(output.shape)}, wanted "
                f"{tuple(z.shape[:-1])} followed by the shape of a datum. Keep the leading dimensions: "
                "reshape with (*z.shape[:-1], ...)."
            )
        n = self.parameters_per_pixel
        if output.shape[-event_dim] % n:
            raise ValueError(
                f"the decoder turned a latent into {tuple(output.shape[-event_dim:])}, but {type(self).__name__} takes "
                f"{n} parameters for each pixel. Build the decoder for {n} times the channels of a datum."
            )
        return self.family(*output.chunk(n, -event_dim)).to_event(event_dim)

    @abstractmethod
    def family(self, *parameters: Tensor) -> TorchDistribution:
        """The distribution of each pixel, from n tensors of the shape of the data, (..., *x_shape)."""

    def _own(self, what: str, value: float | str, x_shape: tuple[int, ...] | None, start: float) -> None:
        """A parameter log_`what` where `value` is "learned" or "per-pixel"; refuse what is no such choice."""
        if isinstance(value, int | float):
            if not value > 0:
                raise ValueError(f"{what} must be positive, got {value}.")
        elif value in ("learned", "per-pixel"):
            if value == "per-pixel" and x_shape is None:
                raise ValueError(f'{what}="per-pixel" needs x_shape, the shape of one datum.')
            shape = tuple(x_shape or ()) if value == "per-pixel" else ()
            setattr(self, f"log_{what}", nn.Parameter(torch.full(shape, start)))
        elif value == "network":
            self.parameters_per_pixel = 2
        else:
            raise ValueError(f'got {what}={value!r}, wanted a number, "learned", "per-pixel" or "network".')

    def _owned(self, what: str, parameters: Sequence[Tensor]) -> Tensor:
        """log_`what` of the network, or the parameter; refuse data of another shape than it was built for."""
        if self.parameters_per_pixel == 2:
            return parameters[1]
        parameter: Tensor = getattr(self, f"log_{what}")
        like = parameters[0]
        built, given = tuple(parameter.shape), tuple(like.shape[like.dim() - parameter.dim() :])
        if built and built != given:
            raise ValueError(
                f'{what}="per-pixel" was built for x_shape {built}, but the decoder returned data of shape {given}. '
                "Give both the shape of one datum."
            )
        return parameter


class Bernoulli(Likelihood):
    """p(x | z) = prod_i Bernoulli(x_i; sigmoid(l_i(z))): binary pixels.

    Args:
        decoder: z, (..., D), to logits, (..., *x_shape).
    Example:
        >>> Bernoulli(torch.nn.Linear(2, 6))(torch.zeros(5, 2)).event_shape
        torch.Size([6])
    """

    values = "binary"

    def family(self, *parameters: Tensor) -> TorchDistribution:
        (logits,) = parameters
        return BernoulliLogits(logits)


class ContinuousBernoulli(Likelihood):
    """p(x | z) = prod_i ContinuousBernoulli(x_i; l_i(z)): grey values in [0, 1].

    What the cross-entropy of grey pixels lacks to be the log of a density. A density of x in [0, 1]: bits per
    dimension are those of `bits_per_dimension(..., levels=256)`, and a bound only for dequantised data.

    Args:
        decoder: z, (..., D), to logits, (..., *x_shape).
    Example:
        >>> ContinuousBernoulli(torch.nn.Linear(2, 6))(torch.zeros(5, 2)).event_shape
        torch.Size([6])

    Reference: Loaiza-Ganem and Cunningham, The continuous Bernoulli, 2019. arXiv:1907.06845
    """

    values = "continuous"

    def family(self, *parameters: Tensor) -> TorchDistribution:
        (logits,) = parameters
        return ContinuousBernoulliLogits(logits)


_LIMIT = 15.0


def bounded_exp(l: Tensor) -> Tensor:  # noqa: E741 (as in the formula)
    """exp(l) for |l| <= 15; e^15 (1 + l - 15) above, and its reciprocal at -l below: once differentiable, never inf.

    Example:
        >>> bounded_exp(torch.tensor([0.0, 1.0, 1000.0])).log()
        tensor([ 0.0000,  1.0000, 21.8937])
    """
    above = (l - (_LIMIT - 1)).clamp(min=1)
    below = (-l - (_LIMIT - 1)).clamp(min=1)
    return l.clamp(-_LIMIT, _LIMIT).exp() * above / below


class Normal(Likelihood):
    """p(x | z) = prod_i N(x_i; mu_i(z), sigma_i^2): continuous data.

    With `standardize` that is p(u | z) of u = (x - m) / s, and what it returns is the density of x by the change of
    variables, prod_i N(x_i; m_i + s_i mu_i(z), (s_i sigma_i)^2): every scale here is then in units of s.

    Args:
        decoder: z, (..., D), to mu, (..., *x_shape); with scale="network" to mu and l, twice the channels.
        scale: A number (fixed), "learned" (one for all pixels), "per-pixel" (one for each, shared by all data) or
            "network" (a function of z). Unless fixed it is minimum_scale + bounded_exp(l).
        x_shape: Shape of one datum; needed for "per-pixel".
        initial_scale: Where a learned scale starts.
        minimum_scale: Lower limit of a learned scale, without which a constant pixel has an unbounded density.
        standardize: Has `loc` m and `scale` s, (*x_shape); None for u = x.
    Raises:
        ValueError: An unknown or non-positive scale, or "per-pixel" without x_shape.
    Example:
        >>> Normal(nn.Linear(2, 6), scale=0.1)(torch.zeros(5, 2)).event_shape
        torch.Size([6])
    """

    values = "continuous"
    log_scale: nn.Parameter  # where the scale is "learned" or "per-pixel"

    def __init__(
        self, decoder: nn.Module, scale: float | str = "learned", x_shape: tuple[int, ...] | None = None,
        initial_scale: float = 1.0, minimum_scale: float = 1e-3, standardize: Standardize | None = None,
    ) -> None:  # fmt: skip
        super().__init__(decoder, standardize)
        self.scale, self.minimum_scale = scale, minimum_scale
        self._own("scale", scale, x_shape, math.log(max(initial_scale - minimum_scale, 1e-6)))

    @classmethod
    def default_options(
        cls, x_shape: tuple[int, ...], scale: float | str, standardize: bool | None, given: Mapping[str, Any]
    ) -> dict[str, Any]:
        """See `pyro_vae.protocols.OfArchitecture`."""
        # Images have one scale for all pixels, which their range says; columns have each its own.
        wanted = standardize or (standardize is None and len(x_shape) == 1)
        columns = Standardize(x_shape, automatic=not standardize) if wanted else None
        return {"scale": scale, "x_shape": x_shape, "standardize": columns}

    def learned_scale(self, l: Tensor) -> Tensor:  # noqa: E741
        """sigma at l, of the same shape."""
        return self.minimum_scale + bounded_exp(l)

    def family(self, *parameters: Tensor) -> TorchDistribution:
        loc = parameters[0]
        if isinstance(self.scale, str):
            scale = self.learned_scale(self._owned("scale", parameters)).expand_as(loc)
        else:
            scale = loc.new_full((), self.scale).expand_as(loc)
        if self.standardize is None:
            return dist.Normal(loc, scale, validate_args=False)
        return StandardizedNormal(loc, scale, self.standardize.loc, self.standardize.scale)


class StandardizedNormal(dist.Normal):
    """N(x; m + s mu, (s sigma)^2), scored in the units of u = (x - m) / s.

        log p(x) = log N(u; mu, sigma^2) - log s

    The same number as that of the Normal with these moments, but for rounding: where m is large, x - (m + s mu) has
    lost the digits that u - mu still has. Made of mu, sigma, (...), m and s, which broadcast to them.

    Example:
        >>> StandardizedNormal(torch.zeros(()), torch.ones(()), torch.tensor(5.0), torch.tensor(2.0)).mean
        tensor(5.)
    """

    def __init__(self, loc: Tensor, scale: Tensor, shift: Tensor, stretch: Tensor) -> None:
        self._unit, self._moved = (loc, scale), (shift, stretch)
        super().__init__(shift + stretch * loc, stretch * scale, validate_args=False)

    def expand(self: _Self, batch_shape: Any, _instance: Any = None) -> _Self:
        new = super().expand(batch_shape, copy.copy(self) if _instance is None else _instance)  # of its own class
        loc, scale = self._unit
        new._unit, new._moved = (loc.expand(batch_shape), scale.expand(batch_shape)), self._moved
        return new

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        (loc, scale), (shift, stretch) = self._unit, self._moved
        white = ((value - shift) / stretch - loc) / scale
        return -0.5 * white.square() - scale.log() - stretch.log() - 0.5 * math.log(2 * math.pi)
