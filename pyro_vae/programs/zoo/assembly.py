"""What the pairs of the zoo are assembled with: likelihoods by class, pictures by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from pyro_vae.options import integer
from pyro_vae.parts import names
from pyro_vae.parts.networks import MLP
from pyro_vae.protocols import parameters_per_pixel

Conditional: TypeAlias = Callable[..., TorchDistribution]


def pixel_likelihood(
    family: str | Callable[[nn.Module], Any],
    in_shape: int,
    hidden: Sequence[int],
    x_shape: Sequence[int],
    activation: str,
) -> Any:
    """A likelihood on a dense decoder, with as many outputs for each pixel as its family takes.

    Args:
        family: A class of `pyro_vae.parts.likelihoods`, its name, or a function of the decoder.
        in_shape: Dimensions that the decoder gets.
        hidden: Widths of its hidden layers.
        x_shape: Shape of one datum.
        activation: Name of the activation.
    """
    likelihood = names.made("likelihood", family, nn.Identity())  # how many outputs a pixel has is the family's to say
    n = integer("parameters_per_pixel", parameters_per_pixel(likelihood))
    likelihood.decoder = MLP(in_shape, hidden, (n * x_shape[0], *x_shape[1:]), activation)
    return likelihood


def pixels_of(given_z: TorchDistribution, pixels: str) -> Tensor:
    """The picture that people show, "mean" for E[x | z], or what the model claims, "draw" for a sample of p(x | z)."""
    if pixels not in ("mean", "draw"):
        raise ValueError(f'got pixels={pixels!r}, wanted "mean" or "draw".')
    return given_z.mean if pixels == "mean" else given_z.sample()
