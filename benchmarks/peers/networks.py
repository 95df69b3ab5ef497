"""The network of the torch peers, as one would write it by hand."""

import numpy as np
import torch
from torch import Tensor, nn

from peers import Problem

ACTIVATIONS = {"softplus": nn.Softplus, "tanh": nn.Tanh, "silu": nn.SiLU}


def _dense(widths: list[int], activation: str) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for before, after in zip(widths[:-1], widths[1:], strict=True):
        layers += [nn.Linear(before, after), ACTIVATIONS[activation]()]
    return layers


class Encoder(nn.Module):
    """Images (B, 784) to the location and the logarithm of the scale of q(z | x), (B, D) each."""

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        if problem.network == "convolutional":
            width = 256
            layers = [
                nn.Unflatten(-1, (1, 28, 28)),
                nn.Conv2d(1, 32, 3, stride=2, padding=1), nn.SiLU(),
                nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.SiLU(),
                nn.Flatten(), nn.Linear(64 * 7 * 7, width), nn.SiLU(),
            ]  # fmt: skip
        else:
            width = problem.hidden[-1]
            layers = _dense([784, *problem.hidden], problem.activation)
        self.features = nn.Sequential(*layers)
        self.loc = nn.Linear(width, problem.latent)
        self.log_scale = nn.Linear(width, problem.latent)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.features(x)
        return self.loc(h), self.log_scale(h)


class Decoder(nn.Sequential):
    """Latents (..., D) to logits (..., 784); (B, D) where it is convolutional."""

    def __init__(self, problem: Problem) -> None:
        if problem.network == "convolutional":
            super().__init__(
                nn.Linear(problem.latent, 256), nn.SiLU(),
                nn.Linear(256, 64 * 7 * 7), nn.Unflatten(-1, (64, 7, 7)), nn.SiLU(),
                nn.ConvTranspose2d(64, 32, 3, stride=2, padding=1, output_padding=1), nn.SiLU(),
                nn.ConvTranspose2d(32, 1, 3, stride=2, padding=1, output_padding=1), nn.Flatten(),
            )  # fmt: skip
        else:
            widths = [problem.latent, *reversed(problem.hidden)]
            super().__init__(*_dense(widths, problem.activation), nn.Linear(widths[-1], 784))


def take(module: nn.Module, layers: list[tuple[np.ndarray, np.ndarray]]) -> None:
    """Put weights (in, out) and biases into the linear layers of a module, in their order."""
    linear = [m for m in module.modules() if isinstance(m, nn.Linear)]
    with torch.no_grad():
        for layer, (weight, bias) in zip(linear, layers, strict=True):
            layer.weight.copy_(torch.from_numpy(weight).T)
            layer.bias.copy_(torch.from_numpy(bias))
