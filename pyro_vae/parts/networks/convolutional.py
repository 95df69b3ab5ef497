"""Convolutional networks for images of any size: strided convolutions, and residual blocks.

A residual block is h = skip(x) + conv(act(norm(conv(act(norm(x)))))). The norm is over groups of channels of one image,
never over the batch: particles and data must not see each other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from pyro_vae.parts.networks.dense import Networks, as_image, halvings, leading_shape, make_activation


class _ImageEncoder(nn.Module):
    """Layers, then a linear one to the features: what both encoders have in common."""

    layers: nn.Sequential

    def __init__(self, in_shape: Sequence[int], features: int) -> None:
        super().__init__()
        self.in_shape, self.out_features = as_image(in_shape), features

    def _finish(self, layers: list[nn.Module], channels: Sequence[int], activation: str) -> None:
        height, width = halvings(self.in_shape[1:], len(channels))[-1]
        last = nn.Linear(channels[-1] * height * width, self.out_features)
        self.layers = nn.Sequential(*layers, nn.Flatten(), last, make_activation(activation))

    def forward(self, x: Tensor) -> Tensor:
        leading = leading_shape(x, self.in_shape, type(self).__name__)
        return self.layers(x.reshape(-1, *self.in_shape)).reshape(*leading, self.out_features)


class _ImageDecoder(nn.Module):
    """Two linear layers to the smallest feature map, then others: what both decoders have in common."""

    layers: nn.Sequential

    def __init__(self, latent_dim: int, out_shape: Sequence[int]) -> None:
        super().__init__()
        self.latent_dim, self.out_shape = latent_dim, as_image(out_shape)

    def _start(
        self, channels: Sequence[int], features: int, activation: str
    ) -> tuple[list[nn.Module], list[tuple[int, int]]]:
        """The first layers, and the sizes of the feature maps from the smallest on."""
        sizes = halvings(self.out_shape[1:], len(channels))[::-1]
        smallest = (channels[0], *sizes[0])
        enter = [nn.Linear(self.latent_dim, features), make_activation(activation)]
        return [*enter, nn.Linear(features, math.prod(smallest)), nn.Unflatten(-1, smallest)], sizes

    def forward(self, z: Tensor) -> Tensor:
        leading = leading_shape(z, (self.latent_dim,), type(self).__name__)
        return self.layers(z.reshape(-1, self.latent_dim)).reshape(*leading, *self.out_shape)


class ConvEncoder(_ImageEncoder):
    """Strided convolutions, then one linear layer: images to features.

    Args:
        in_shape: (C, H, W) of one image; any H and W.
        channels: Channels after each convolution, each halving H and W (rounded up).
        features: Number of outputs, its `out_features`.
        activation: Name of the activation.
    Example:
        >>> import torch
        >>> ConvEncoder((1, 28, 20), channels=[8, 16])(torch.zeros(4, 2, 1, 28, 20)).shape
        torch.Size([4, 2, 256])
    """

    def __init__(
        self, in_shape: Sequence[int], channels: Sequence[int] = (32, 64), features: int = 256, activation: str = "silu"
    ) -> None:
        super().__init__(in_shape, features)
        layers: list[nn.Module] = []
        for before, after in zip([self.in_shape[0], *channels[:-1]], channels, strict=True):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), make_activation(activation)]
        self._finish(layers, channels, activation)


class ConvDecoder(_ImageDecoder):
    """Two linear layers, then transposed convolutions: latents to images.

    Args:
        latent_dim: D.
        out_shape: (C, H, W) of one image; any H and W.
        channels: Channels before each transposed convolution, each doubling H and W.
        features: Width of the layer between latents and the first feature map.
        activation: Name of the activation.
    Example:
        >>> import torch
        >>> ConvDecoder(2, (3, 28, 20), channels=[16, 8])(torch.zeros(4, 2, 2)).shape
        torch.Size([4, 2, 3, 28, 20])
    """

    def __init__(
        self, latent_dim: int, out_shape: Sequence[int], channels: Sequence[int] = (64, 32), features: int = 256,
        activation: str = "silu",
    ) -> None:  # fmt: skip
        super().__init__(latent_dim, out_shape)
        layers, sizes = self._start(channels, features, activation)
        for i, (before, after) in enumerate(zip(channels, [*channels[1:], self.out_shape[0]], strict=True)):
            # Halving rounds up, so each doubling may have to give one row or column back.
            (height, width), (taller, wider) = sizes[i], sizes[i + 1]
            extra = (taller - (2 * height - 1), wider - (2 * width - 1))
            convolution = nn.ConvTranspose2d(before, after, 3, stride=2, padding=1, output_padding=extra)
            layers += [make_activation(activation), convolution]
        self.layers = nn.Sequential(*layers)


def group_norm(channels: int) -> nn.GroupNorm:
    """At most eight groups, of at least four channels: a group of one is nothing but its sign at 1x1 pixels."""
    return nn.GroupNorm(max(g for g in range(1, 9) if channels % g == 0 and (g == 1 or channels // g >= 4)), channels)


class ResidualBlock(nn.Module):
    """Two pre-activated 3x3 convolutions beside a shortcut, of so many channels before and after.

    A stride of 2 halves height and width, rounded up; a size, (H, W), is what the input is brought to first, by the
    nearest pixel.
    """

    def __init__(
        self, before: int, after: int, activation: str, stride: int = 1, size: tuple[int, int] | None = None
    ) -> None:
        super().__init__()
        self.size = size
        self.enter = nn.Sequential(group_norm(before), make_activation(activation))
        self.first = nn.Conv2d(before, after, 3, stride=stride, padding=1)
        second = group_norm(after), make_activation(activation), nn.Conv2d(after, after, 3, padding=1)
        self.second = nn.Sequential(*second)
        same = before == after and stride == 1
        self.skip = nn.Identity() if same else nn.Conv2d(before, after, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.enter(x)
        if self.size is not None:
            # The 1x1 shortcut commutes with copying pixels and is cheaper before it.
            x, h = (F.interpolate(each, size=self.size, mode="nearest") for each in (self.skip(x), h))
            return x + self.second(self.first(h))
        return self.skip(x) + self.second(self.first(h))


class ResidualEncoder(_ImageEncoder):
    """A convolution, stages of residual blocks, then one linear layer: images to features.

    For 28x28 images the default; for 32 and 64 pixels in colour three or four stages, channels=(64, 128, 256, 256).

    Args:
        in_shape, features, activation: As of `ConvEncoder`.
        channels: Channels of each stage, each halving H and W (rounded up).
        blocks: Residual blocks in each stage, of which the first halves.
    Raises:
        ValueError: A shape that is not (C, H, W), no stage, no block.
    Example:
        >>> import torch
        >>> ResidualEncoder((1, 28, 20), channels=[8, 16])(torch.zeros(4, 2, 1, 28, 20)).shape
        torch.Size([4, 2, 256])

    Reference: He et al., Identity mappings in deep residual networks, 2016. arXiv:1603.05027; Wu and He, Group
        normalization, 2018. arXiv:1803.08494
    """

    def __init__(
        self, in_shape: Sequence[int], channels: Sequence[int] = (32, 64), features: int = 256,
        activation: str = "silu", blocks: int = 1,
    ) -> None:  # fmt: skip
        super().__init__(in_shape, features)
        _check_stages(channels, blocks)
        layers: list[nn.Module] = [nn.Conv2d(self.in_shape[0], channels[0], 3, padding=1)]
        for before, after in zip([channels[0], *channels[:-1]], channels, strict=True):
            layers.append(ResidualBlock(before, after, activation, stride=2))
            layers += [ResidualBlock(after, after, activation) for _ in range(blocks - 1)]
        layers += [group_norm(channels[-1]), make_activation(activation)]
        self._finish(layers, channels, activation)


class ResidualDecoder(_ImageDecoder):
    """Two linear layers, stages of residual blocks, then a convolution: latents to images.

    Args:
        latent_dim, out_shape, features, activation: As of `ConvDecoder`.
        channels: Channels of each stage, each doubling H and W.
        blocks: Residual blocks in each stage, of which the last doubles.
    Raises:
        ValueError: A shape that is not (C, H, W), no stage, no block.
    Example:
        >>> import torch
        >>> ResidualDecoder(2, (3, 28, 20), channels=[16, 8])(torch.zeros(4, 2, 2)).shape
        torch.Size([4, 2, 3, 28, 20])

    Reference: He et al., Identity mappings in deep residual networks, 2016. arXiv:1603.05027
    """

    def __init__(
        self, latent_dim: int, out_shape: Sequence[int], channels: Sequence[int] = (64, 32), features: int = 256,
        activation: str = "silu", blocks: int = 1,
    ) -> None:  # fmt: skip
        _check_stages(channels, blocks)
        super().__init__(latent_dim, out_shape)
        layers, sizes = self._start(channels, features, activation)
        for before, after, size in zip(channels, [*channels[1:], channels[-1]], sizes[1:], strict=True):
            layers += [ResidualBlock(before, before, activation) for _ in range(blocks - 1)]
            layers.append(ResidualBlock(before, after, activation, size=size))
        layers += [group_norm(channels[-1]), make_activation(activation)]
        layers.append(nn.Conv2d(channels[-1], self.out_shape[0], 3, padding=1))
        self.layers = nn.Sequential(*layers)


def _check_stages(channels: Sequence[int], blocks: int) -> None:
    if not channels or min(channels) < 1 or blocks < 1:
        raise ValueError(
            f"got channels={tuple(channels)} and blocks={blocks}, wanted one or more positive channels "
            "and at least one block."
        )


def _named(network: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """A network of sizes, widths and an activation, which comes last."""
    return lambda *sizes: network(*sizes[:-1], activation=sizes[-1])


CONVOLUTIONAL = Networks(_named(ConvEncoder), _named(ConvDecoder))
RESIDUAL = Networks(_named(ResidualEncoder), _named(ResidualDecoder))
