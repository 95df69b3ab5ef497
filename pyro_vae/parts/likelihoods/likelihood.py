"""Likelihoods with independent pixels: what they have in common, and those of one number a pixel in [0, 1]."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from pyro_vae.parts.distributions.bernoulli import BernoulliLogits, ContinuousBernoulliLogits
from pyro_vae.parts.standardize import Standardize


class Likelihood(nn.Module, ABC):
    """p(x | z) = prod_i family(x_i; parameters_i(z)): a decoder, and a distribution of each pixel.

    The decoder gives `parameters_per_pixel` times the channels (the first dimension of
    a datum); `family` is handed that many tensors of the shape of the data.

    Args:
        decoder: z, (..., D), to parameters, (..., n * C, *rest) for data (C, *rest).
    Attributes:
        parameters_per_pixel: n.
        values: What data it is a distribution of: "binary", "continuous", "levels" or "counts"; None if unsaid.
        standardize: What the guide is shown of the data in their place; None for the data.
    Raises:
        ValueError: The decoder drops the leading dimensions of z, or its channels are
            no multiple of n.
    """

    parameters_per_pixel: int = 1
    values: ClassVar[str | None] = None

    def __init__(self, decoder: nn.Module, standardize: Standardize | None = None) -> None:
        super().__init__()
        self.decoder = decoder
        self.standardize = standardize

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


class Bernoulli(Likelihood):
    """p(x | z) = prod_i Bernoulli(x_i; sigmoid(l_i(z))): binary pixels.

    Args:
        decoder: z, (..., D), to logits, (..., *x_shape).
    Example:
        >>> import torch
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
        >>> import torch
        >>> ContinuousBernoulli(torch.nn.Linear(2, 6))(torch.zeros(5, 2)).event_shape
        torch.Size([6])

    Reference: Loaiza-Ganem and Cunningham, The continuous Bernoulli, 2019. arXiv:1907.06845
    """

    values = "continuous"

    def family(self, *parameters: Tensor) -> TorchDistribution:
        (logits,) = parameters
        return ContinuousBernoulliLogits(logits)
