"""Fully connected networks whose units are gated."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pyro_vae.parts.networks.activations import activation as make_activation
from pyro_vae.parts.networks.shapes import Shape, as_shape, leading_shape


class GatedLinear(nn.Module):
    """h = act(W1 x + b) * sigmoid(W2 x + c), over any leading dimensions.

    Args:
        in_features: Number of inputs.
        out_features: Number of outputs.
        activation: Name of the activation of the ungated half; None for none, as in the paper.
    Example:
        >>> GatedLinear(3, 4)(torch.zeros(5, 2, 3)).shape
        torch.Size([5, 2, 4])

    Reference: Dauphin et al., Language modeling with gated convolutional networks, 2017. arXiv:1612.08083
    """

    def __init__(self, in_features: int, out_features: int, activation: str | None = None) -> None:
        super().__init__()
        self.linear = nn.Linear(in_features, 2 * out_features)  # both halves in one product
        self.activation = nn.Identity() if activation is None else make_activation(activation)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.linear(x).chunk(2, -1)
        return self.activation(value) * torch.sigmoid(gate)


class GatedMLP(nn.Module):
    """Fully connected network of gated layers from one shape to another, over any leading dimensions.

    Args:
        in_shape: Shape of one input.
        hidden: Widths of the hidden layers, each gated.
        out_shape: Shape of one output, by a last linear layer; None ends with the last hidden layer (features for
            a posterior's head).
        activation: Name of the activation of the ungated half of each layer; None for none, as in the paper.
    Attributes:
        out_features: Number of outputs.
    Example:
        >>> GatedMLP((1, 8, 8), [32], None)(torch.zeros(5, 3, 1, 8, 8)).shape
        torch.Size([5, 3, 32])
        >>> GatedMLP(2, [32], (1, 8, 8))(torch.zeros(5, 3, 2)).shape
        torch.Size([5, 3, 1, 8, 8])

    Reference: Tomczak and Welling, VAE with a VampPrior, 2018. arXiv:1705.07120
    """

    def __init__(
        self, in_shape: Shape, hidden: Sequence[int], out_shape: Shape | None, activation: str | None = None
    ) -> None:
        super().__init__()
        self.in_shape = as_shape(in_shape)
        widths = [math.prod(self.in_shape), *hidden]
        layers: list[nn.Module] = [
            GatedLinear(before, after, activation) for before, after in zip(widths[:-1], widths[1:], strict=True)
        ]
        self.out_shape = (widths[-1],) if out_shape is None else as_shape(out_shape)
        self.out_features = math.prod(self.out_shape)
        if out_shape is not None:
            layers.append(nn.Linear(widths[-1], self.out_features))
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        leading = leading_shape(x, self.in_shape, "GatedMLP")
        return self.layers(x.reshape(*leading, math.prod(self.in_shape))).reshape(*leading, *self.out_shape)
