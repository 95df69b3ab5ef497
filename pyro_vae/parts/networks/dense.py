"""Fully connected networks."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn

from pyro_vae.options import integers
from pyro_vae.parts.networks.activations import activation as make_activation
from pyro_vae.parts.networks.shapes import Shape, as_shape, leading_shape


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
        >>> import torch
        >>> MLP((1, 8, 8), [32], None)(torch.zeros(5, 3, 1, 8, 8)).shape
        torch.Size([5, 3, 32])
        >>> MLP(2, [32], (1, 8, 8))(torch.zeros(5, 3, 2)).shape
        torch.Size([5, 3, 1, 8, 8])
    """

    def __init__(
        self, in_shape: Shape, hidden: Sequence[int], out_shape: Shape | None, activation: str = "silu"
    ) -> None:
        super().__init__()
        self.in_shape = as_shape(in_shape)
        widths = [math.prod(self.in_shape), *integers("hidden", hidden)]
        layers: list[nn.Module] = []
        for before, after in zip(widths[:-1], widths[1:], strict=True):
            layers += [nn.Linear(before, after), make_activation(activation)]
        self.out_shape = (widths[-1],) if out_shape is None else as_shape(out_shape)
        self.out_features = math.prod(self.out_shape)
        if out_shape is not None:
            layers.append(nn.Linear(widths[-1], self.out_features))
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        leading = leading_shape(x, self.in_shape, "MLP")
        return self.layers(x.reshape(*leading, math.prod(self.in_shape))).reshape(*leading, *self.out_shape)
