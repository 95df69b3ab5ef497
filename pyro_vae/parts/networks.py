"""Networks: tensors to tensors, over any leading dimensions.

An encoder turns data (..., *x_shape) into features (..., F); a decoder turns latents
(..., D) into one tensor (..., *x_shape). Leading dimensions are free because K
particles of B data arrive as (K, B, D). Any ``nn.Module`` that does the same drops in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

Shape: TypeAlias = int | Sequence[int]

class _SoftplusFunction(torch.autograd.Function):
    """max(x, 0) + log(1 + exp(-|x|)): torch's softplus goes through ``log1p``, which it
    does not vectorise on the CPU, for a gain below 1e-7."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.abs().neg_().exp_().add_(1).log_().add_(x.clamp(min=0))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grad * torch.sigmoid(x)


class Softplus(nn.Module):
    """log(1 + exp(x)), quicker on a CPU than ``torch.nn.Softplus``.

    Example:
        >>> Softplus()(torch.tensor([0.0, 100.0]))
        tensor([  0.6931, 100.0000])
    """

    def forward(self, x: Tensor) -> Tensor:
        return _SoftplusFunction.apply(x)


_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "silu": nn.SiLU,
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "elu": nn.ELU,
    "tanh": nn.Tanh,
    "softplus": Softplus,
}
ACTIVATIONS = tuple(_ACTIVATIONS)


def _activation(name: str) -> nn.Module:
    """The activation of that name: one of `ACTIVATIONS`."""
    if name not in _ACTIVATIONS:
        raise ValueError(f"unknown activation {name!r}, wanted one of {', '.join(ACTIVATIONS)}.")
    return _ACTIVATIONS[name]()


def _shape(shape: Shape) -> tuple[int, ...]:
    return (shape,) if isinstance(shape, int) else tuple(shape)


def _leading(x: Tensor, shape: tuple[int, ...], name: str) -> tuple[int, ...]:
    """The leading dimensions of x before the event shape, checked."""
    split = x.dim() - len(shape)
    if split < 0 or tuple(x.shape[split:]) != shape:
        raise ValueError(f"{name} got shape {tuple(x.shape)}, wanted (..., {', '.join(map(str, shape))}).")
    return tuple(x.shape[:split])


class MLP(nn.Module):
    """Fully connected network from one shape to another, over any leading dimensions.

    Args:
        in_shape: Shape of one input.
        hidden: Widths of the hidden layers, each followed by the activation.
        out_shape: Shape of one output, by a last linear layer; None ends with the
            last hidden layer (features for a posterior's head).
        activation: Name of the activation.
    Attributes:
        out_features: Number of outputs.
    Example:
        >>> MLP((1, 8, 8), [32], None)(torch.zeros(5, 3, 1, 8, 8)).shape
        torch.Size([5, 3, 32])
        >>> MLP(2, [32], (1, 8, 8))(torch.zeros(5, 3, 2)).shape
        torch.Size([5, 3, 1, 8, 8])
    """

    def __init__(
        self, in_shape: Shape, hidden: Sequence[int], out_shape: Shape | None, activation: str = "silu"
    ) -> None:
        super().__init__()
        self.in_shape = _shape(in_shape)
        widths = [math.prod(self.in_shape), *hidden]
        layers: list[nn.Module] = []
        for before, after in zip(widths[:-1], widths[1:], strict=True):
            layers += [nn.Linear(before, after), _activation(activation)]
        self.out_shape = (widths[-1],) if out_shape is None else _shape(out_shape)
        self.out_features = math.prod(self.out_shape)
        if out_shape is not None:
            layers.append(nn.Linear(widths[-1], self.out_features))
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        leading = _leading(x, self.in_shape, "MLP")
        return self.layers(x.reshape(*leading, math.prod(self.in_shape))).reshape(*leading, *self.out_shape)


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
        self.in_shape = _image(in_shape)
        self.out_features = features
        sizes = _halvings(self.in_shape[1:], len(channels))
        layers: list[nn.Module] = []
        for before, after in zip([self.in_shape[0], *channels[:-1]], channels, strict=True):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), _activation(activation)]
        last = channels[-1] * sizes[-1][0] * sizes[-1][1]
        self.layers = nn.Sequential(*layers, nn.Flatten(), nn.Linear(last, features), _activation(activation))

    def forward(self, x: Tensor) -> Tensor:
        leading = _leading(x, self.in_shape, "ConvEncoder")
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
        self.out_shape = _image(out_shape)
        sizes = _halvings(self.out_shape[1:], len(channels))[::-1]
        smallest = (channels[0], *sizes[0])
        layers: list[nn.Module] = [
            nn.Linear(latent_dim, features),
            _activation(activation),
            nn.Linear(features, math.prod(smallest)),
            nn.Unflatten(-1, smallest),
        ]
        for i, (before, after) in enumerate(zip(channels, [*channels[1:], self.out_shape[0]], strict=True)):
            # Halving rounds up, so each doubling may have to give one row or column back.
            (height, width), (taller, wider) = sizes[i], sizes[i + 1]
            extra = (taller - (2 * height - 1), wider - (2 * width - 1))
            layers += [
                _activation(activation),
                nn.ConvTranspose2d(before, after, 3, stride=2, padding=1, output_padding=extra),
            ]
        self.layers = nn.Sequential(*layers)

    def forward(self, z: Tensor) -> Tensor:
        leading = _leading(z, (self.latent_dim,), "ConvDecoder")
        return self.layers(z.reshape(-1, self.latent_dim)).reshape(*leading, *self.out_shape)


def set_output_mean(decoder: nn.Module, mean: Tensor, floor: float = 1e-3) -> None:
    """Start a decoder of logits at the mean image, as Burda et al. (2016) do.

    The bias of the last layer becomes logit(mean), with the mean clipped to
    [floor, 1 - floor]; a convolutional layer, whose bias is per channel, gets that of
    the channel means.

    Args:
        decoder: A network whose last layer with a bias gives the logits.
        mean: Mean of the training data in [0, 1], of the shape of one datum.
        floor: Distance kept from 0 and 1.
    Raises:
        ValueError: No layer with a bias, or one of another size than the mean.
    """
    biased = [m for m in decoder.modules() if isinstance(getattr(m, "bias", None), nn.Parameter)]
    if not biased:
        raise ValueError("the decoder has no layer with a bias to start at the mean of the data.")
    bias = biased[-1].bias
    assert isinstance(bias, Tensor)
    start = mean.flatten() if bias.numel() == mean.numel() or mean.dim() < 2 else mean.flatten(1).mean(-1)
    if start.shape != bias.shape:
        raise ValueError(f"the decoder's last bias has {bias.numel()} entries, the mean has shape {tuple(mean.shape)}.")
    with torch.no_grad():
        bias.copy_(torch.logit(start.clamp(floor, 1 - floor)))


def _image(shape: Sequence[int]) -> tuple[int, int, int]:
    if len(shape) != 3:
        raise ValueError(f"got shape {tuple(shape)}, wanted (channels, height, width). For vectors use MLP.")
    return (shape[0], shape[1], shape[2])


def _halvings(size: tuple[int, int], times: int) -> list[tuple[int, int]]:
    sizes = [size]
    for _ in range(times):
        sizes.append(((sizes[-1][0] + 1) // 2, (sizes[-1][1] + 1) // 2))
    return sizes
