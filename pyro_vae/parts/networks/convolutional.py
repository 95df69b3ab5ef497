"""Convolutional networks for images of any size."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn

from pyro_vae.parts.networks.activations import activation as make_activation
from pyro_vae.parts.networks.shapes import as_image, halvings, leading_shape


class ConvEncoder(nn.Module):
    """Strided convolutions, then one linear layer: images to features.

    Args:
        in_shape: (C, H, W) of one image; any H and W.
        channels: Channels after each convolution, each halving H and W (rounded up).
        features: Number of outputs.
        activation: Name of the activation.
    Attributes:
        out_features: Number of outputs.
    Example:
        >>> import torch
        >>> ConvEncoder((1, 28, 20), channels=[8, 16])(torch.zeros(4, 2, 1, 28, 20)).shape
        torch.Size([4, 2, 256])
    """

    def __init__(
        self,
        in_shape: Sequence[int],
        channels: Sequence[int] = (32, 64),
        features: int = 256,
        activation: str = "silu",
    ) -> None:
        super().__init__()
        self.in_shape = as_image(in_shape)
        self.out_features = features
        sizes = halvings(self.in_shape[1:], len(channels))
        layers: list[nn.Module] = []
        for before, after in zip([self.in_shape[0], *channels[:-1]], channels, strict=True):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), make_activation(activation)]
        last = channels[-1] * sizes[-1][0] * sizes[-1][1]
        self.layers = nn.Sequential(*layers, nn.Flatten(), nn.Linear(last, features), make_activation(activation))

    def forward(self, x: Tensor) -> Tensor:
        leading = leading_shape(x, self.in_shape, "ConvEncoder")
        return self.layers(x.reshape(-1, *self.in_shape)).reshape(*leading, self.out_features)


class ConvDecoder(nn.Module):
    """One linear layer, then transposed convolutions: latents to images.

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
        self,
        latent_dim: int,
        out_shape: Sequence[int],
        channels: Sequence[int] = (64, 32),
        features: int = 256,
        activation: str = "silu",
    ) -> None:
        super().__init__()
        self.latent_dim = latent_dim
        self.out_shape = as_image(out_shape)
        sizes = halvings(self.out_shape[1:], len(channels))[::-1]
        smallest = (channels[0], *sizes[0])
        layers: list[nn.Module] = [
            nn.Linear(latent_dim, features),
            make_activation(activation),
            nn.Linear(features, math.prod(smallest)),
            nn.Unflatten(-1, smallest),
        ]
        for i, (before, after) in enumerate(zip(channels, [*channels[1:], self.out_shape[0]], strict=True)):
            # Halving rounds up, so each doubling may have to give one row or column back.
            (height, width), (taller, wider) = sizes[i], sizes[i + 1]
            extra = (taller - (2 * height - 1), wider - (2 * width - 1))
            layers += [
                make_activation(activation),
                nn.ConvTranspose2d(before, after, 3, stride=2, padding=1, output_padding=extra),
            ]
        self.layers = nn.Sequential(*layers)

    def forward(self, z: Tensor) -> Tensor:
        leading = leading_shape(z, (self.latent_dim,), "ConvDecoder")
        return self.layers(z.reshape(-1, self.latent_dim)).reshape(*leading, *self.out_shape)
