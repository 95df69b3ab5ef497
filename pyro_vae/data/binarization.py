"""Pixels, and what a likelihood sees of them; from nats to bits.

A grey level v in 0..255 becomes data in one of four ways, and log p(x) of different ways must never share a table:

    dynamic     x ~ Bernoulli(v / 255), drawn afresh each time it is looked at
    static      the same draw, made once
    threshold   x = 1 where v >= 128
    none        x = v / 255, or (v + u) / 256 with u ~ U(0, 1) when dequantized

The draws come from 64-bit random integers viewed as four 16-bit lanes, which is about ten times as fast as
`torch.bernoulli`.
"""

import math
from typing import Literal, TypeVar, get_args

import torch
from torch import Tensor

Binarization = Literal["dynamic", "static", "threshold", "none"]
BINARIZATIONS: tuple[Binarization, ...] = get_args(Binarization)
Nats = TypeVar("Nats", float, Tensor)


def binarize(pixels: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """One fresh Bernoulli draw per pixel.

        P(x = 1) = v / 255,   exact at v = 0 and v = 255, elsewhere within 2e-5

    Args:
        pixels: Grey levels 0..255 as uint8, or probabilities in [0, 1] as floats; any shape.
        generator: Source of randomness on the device of the pixels; torch's global one if omitted.
    Returns:
        Zeros and ones of the same shape, float32 (the dtype of the pixels if they are floats).
    Example:
        >>> binarize(torch.tensor([[0, 255, 0, 255]], dtype=torch.uint8))
        tensor([[0., 1., 0., 1.]])
    """
    if pixels.is_floating_point():
        _check_probabilities(pixels)
        uniform = torch.rand(pixels.shape, dtype=pixels.dtype, device=pixels.device, generator=generator)
        return (uniform < pixels).to(pixels.dtype)
    _check_uint8(pixels, "binarize")
    # Even lanes -32768..32766 against 257 v - 32768: v = 0 is never, v = 255 always above them.
    lanes = _random_lanes(pixels, generator).bitwise_and_(-2)
    levels = pixels.to(torch.int16).mul_(257).bitwise_xor_(-32768)
    return torch.lt(lanes, levels, out=torch.empty(pixels.shape, device=pixels.device, dtype=torch.float32))


def dequantize(pixels: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Spread each grey level evenly over its bin of width 1/256.

        x = (v + u) / 256,   u ~ U(0, 1)

    A density of such x, averaged over u, is a lower bound on the probability of the levels.
    u lies on the midpoints of a grid of 2^15, so that every x is an exact float32 strictly
    inside (0, 1): rounding never moves one into its neighbour's bin, and logit(x) is finite.

    Args:
        pixels: Grey levels 0..255 as uint8, any shape.
        generator: Source of randomness on the device of the pixels; torch's global one if omitted.
    Returns:
        float32 in (0, 1), same shape.
    Example:
        >>> v = torch.tensor([0, 7, 255], dtype=torch.uint8)
        >>> (dequantize(v) * 256).floor()
        tensor([  0.,   7., 255.])

    Reference: Theis et al., A note on the evaluation of generative models, 2016. arXiv:1511.01844
    """
    _check_uint8(pixels, "dequantize")
    lanes = _random_lanes(pixels, generator).bitwise_or_(1)
    return torch.add(pixels.to(torch.float32).mul_(2**-8).add_(2**-9), lanes, alpha=2**-24)


def threshold(pixels: Tensor) -> Tensor:
    """One where the pixel is at least half bright, zero elsewhere.

    Args:
        pixels: Grey levels 0..255 as uint8 (one where v >= 128), or floats in [0, 1] (v >= 1/2).
    Returns:
        Zeros and ones of the same shape, float32 (the dtype of the pixels if they are floats).
    Example:
        >>> threshold(torch.tensor([0, 127, 128, 255], dtype=torch.uint8))
        tensor([0., 0., 1., 1.])
    """
    if pixels.is_floating_point():
        _check_probabilities(pixels)
        return (pixels >= 0.5).to(pixels.dtype)
    _check_uint8(pixels, "threshold")
    return (pixels >= 128).to(torch.float32)


def bits_per_dimension(log_prob: Nats, num_dims: int, levels: int = 256) -> Nats:
    """Bits needed per dimension, the usual score of image densities. Lower is better.

        bits/dim = -log p(x) / (D ln 2) + log2(levels)

    The second term is the change of variables v = levels * x, back from the unit-scaled x
    that a density was given (see `dequantize`) to bins of width one. For data that are
    discrete already (binarised pixels) there is nothing to change: `levels=1`.

    Args:
        log_prob: log p(x) in nats, a float or a tensor of any shape.
        num_dims: Number of dimensions D of one datum (for images channels * height * width).
        levels: Bins per unit of x: 256 for 8-bit pixels scaled to [0, 1], 1 for discrete data.
    Returns:
        Bits per dimension, like log_prob.
    Example:
        >>> bits_per_dimension(0.0, num_dims=784)       # the uniform density on [0, 1]^784
        8.0
    """
    if num_dims < 1 or levels < 1:
        raise ValueError(
            f"got num_dims={num_dims} and levels={levels}, wanted both >= 1. "
            "num_dims is the size of one datum, e.g. 784; levels is 256 or, for discrete data, 1."
        )
    return -log_prob / (num_dims * math.log(2.0)) + math.log2(levels)


def _random_lanes(like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Uniform int16 of the shape and device of `like`."""
    count = (like.numel() + 3) // 4
    # Without bounds random_() never sets the top bit, which would be the sign of every fourth lane.
    words = torch.randint(-(2**63), 2**63 - 1, (count,), dtype=torch.int64, device=like.device, generator=generator)
    return words.bitwise_xor_(-(2**63)).view(torch.int16)[: like.numel()].view(like.shape)


def _check_uint8(pixels: Tensor, what: str) -> None:
    if pixels.dtype != torch.uint8:
        raise ValueError(
            f"{what} got pixels of dtype {pixels.dtype}, wanted torch.uint8. "
            "For levels 0..255 call .to(torch.uint8) first."
        )


def _check_probabilities(pixels: Tensor) -> None:
    if pixels.numel() and not (pixels.min() >= 0 and pixels.max() <= 1):
        raise ValueError(
            f"float pixels to binarise lie in [{pixels.min():.4g}, {pixels.max():.4g}], wanted [0, 1]. "
            "Divide by 255 or give uint8; data that are no images take binarization='none'."
        )
