"""Several stochastic layers.

    model   p(z_L) p(z_{L-1} | z_L) ... p(z_1 | z_2) p(x | z_1)
    guide   q(z_1 | x) q(z_2 | z_1) ... q(z_L | z_{L-1})

At the last layer, and only there, the expectation of log q - log p may be taken in closed form, KL(q(z_L | z_{L-1}) ||
p(z_L)), as `fit` does by default: below it p(z_l | z_{l+1}) depends on what the guide drew from z_l. The exact
posterior has the guide's form: z_2 and x are independent given z_1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any, Self

import pyro
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from pyro_vae.options import checked
from pyro_vae.parts import names
from pyro_vae.parts.likelihoods import Bernoulli
from pyro_vae.parts.networks import MLP
from pyro_vae.parts.posteriors import DiagonalNormal
from pyro_vae.parts.priors import StandardNormal
from pyro_vae.programs.architecture import Architecture
from pyro_vae.programs.pair import Named, batch_check, data_check, observe
from pyro_vae.programs.vae import Answers, pixels_of
from pyro_vae.programs.zoo.assembly import Conditional, pixel_likelihood
from pyro_vae.randomness import noise
from pyro_vae.tensors import data_of, running


class HierarchicalModel(Named):
    """p(x, z_1, ..., z_L), over a plate "data" of the sites "z1", ..., "zL" and "x"; arguments as of `Hierarchical`."""

    def __init__(self, prior: Conditional, conditionals: Sequence[Conditional], likelihood: Conditional) -> None:
        super().__init__()
        self.prior = prior
        self.num_layers = 1 + len(conditionals)
        for layer, conditional in enumerate(conditionals, start=1):  # attributes, since a function is no module
            setattr(self, f"z{layer}_given_z{layer + 1}", conditional)
        self.likelihood = likelihood

    def forward(self, x: Tensor | None = None, *, size: int = 1) -> Tensor:
        """Run the program; arguments and result are those of `Model`."""
        with pyro.plate("data", size if x is None else len(x)):
            z = pyro.sample(f"z{self.num_layers}", self.prior())
            for layer in range(self.num_layers - 1, 0, -1):
                z = pyro.sample(f"z{layer}", getattr(self, f"z{layer}_given_z{layer + 1}")(z))
            return observe(self.likelihood(z), x)


class HierarchicalGuide(Named):
    """q(z_1, ..., z_L | x), over a plate "data" of the sites "z1", ..., "zL"; arguments as of `Hierarchical`."""

    def __init__(self, posteriors: Sequence[Conditional]) -> None:
        super().__init__()
        self.num_layers = len(posteriors)
        # The last layer is drawn from all others and is the first of the model: `fit` may integrate its divergence.
        self.closed_form = (f"z{self.num_layers}",)
        for layer, posterior in enumerate(posteriors, start=1):
            setattr(self, f"z{layer}_given_{f'z{layer - 1}' if layer > 1 else 'x'}", posterior)

    def forward(self, x: Tensor | None = None, **_: Any) -> Tensor:
        """Draw z_1 ~ q(z_1 | x), z_2 ~ q(z_2 | z_1), ...; returns z_L, (B, D_L)."""
        below = data_check(x)
        size, name = len(below), "x"
        with pyro.plate("data", size):
            for layer in range(1, self.num_layers + 1):
                posterior = getattr(self, f"z{layer}_given_{name}")(below)
                batch_check(posterior, size)
                name = f"z{layer}"
                below = pyro.sample(name, posterior)
        return below


class Hierarchical(Answers):
    """A VAE of L >= 2 stochastic layers, ``pair.model`` and ``pair.guide``.

    Any part of any layer is a callable that returns a distribution: a posterior of `pyro_vae.parts.posteriors` serves
    for p(z_l | z_{l+1}) and q(z_{l+1} | z_l) as well, since z is data to it.

    Args:
        prior: () to p(z_L), batch_shape ().
        conditionals: The L - 1 conditionals p(z_l | z_{l+1}), the one next to the data first, each from z_{l+1},
            (..., D_{l+1}), to batch_shape (...).
        likelihood: z_1, (..., D_1), to p(x | z_1), batch_shape (...).
        posteriors: The L conditionals q(z_1 | x), q(z_2 | z_1), ..., the one next to the data first.
    Raises:
        ValueError: Fewer than two layers, or model and guide of different depth.
    Example:
        >>> pair = Hierarchical.build((1, 8, 8), latent_dims=(3, 2), hidden=((16,), (8,)))
        >>> pair.sample(4).shape, [z.shape[-1] for z in pair.latents(torch.zeros(5, 1, 8, 8))]
        (torch.Size([4, 1, 8, 8]), [3, 2])

    Reference: Burda et al., Importance Weighted Autoencoders, 2016. arXiv:1509.00519
    """

    def __init__(
        self, prior: Conditional, conditionals: Sequence[Conditional], likelihood: Conditional,
        posteriors: Sequence[Conditional],
    ) -> None:  # fmt: skip
        super().__init__()
        if not conditionals or len(posteriors) != len(conditionals) + 1:
            raise ValueError(
                f"got {len(conditionals)} conditionals p(z_l | z_l+1) and {len(posteriors)} posteriors, wanted L - 1 "
                "and L of them for L >= 2 layers. For one layer use Model(prior, likelihood) and Guide(posterior)."
            )
        self.model = HierarchicalModel(prior, conditionals, likelihood)
        self.guide = HierarchicalGuide(posteriors)

    @classmethod
    @checked
    def build(
        cls,
        x_shape: Sequence[int],
        latent_dims: Sequence[int] = (100, 50),
        hidden: Sequence[Sequence[int]] = ((200, 200), (100, 100)),
        *,
        activation: str = "tanh",
        likelihood: str | Callable[[nn.Module], Any] = Bernoulli,
        posterior: str | Callable[[nn.Module, int], Any] = DiagonalNormal,
    ) -> Hierarchical:
        """Dense networks with new weights; by default the two-layer model of the reference.

        Args:
            x_shape: Shape of one datum.
            latent_dims: D_1, ..., D_L, the layer next to the data first.
            hidden: Widths of the network between each layer and the one below (the data
                for the first), in the guide; the model has them in reverse.
            activation, likelihood: As of `Conditional.build`.
            posterior: A class of `pyro_vae.parts.posteriors`, or its name, for every q.
        Raises:
            ValueError: Not one network per layer, or fewer than two layers.
        """
        if len(latent_dims) != len(hidden) or len(latent_dims) < 2:
            raise ValueError(
                f"got {len(latent_dims)} latent_dims and {len(hidden)} lists of hidden widths, wanted one each for at "
                "least two layers, as in latent_dims=(100, 50), hidden=((200, 200), (100, 100))."
            )
        shapes = [tuple(x_shape), *((d,) for d in latent_dims)]
        up = [
            names.made("posterior", posterior, MLP(shape, widths, None, activation), dim)
            for shape, widths, dim in zip(shapes, hidden, latent_dims, strict=False)
        ]
        down = [
            DiagonalNormal(MLP(above, widths[::-1], None, activation), below)
            for below, above, widths in zip(latent_dims, latent_dims[1:], hidden[1:], strict=False)
        ]
        decoder = pixel_likelihood(likelihood, latent_dims[0], hidden[0][::-1], x_shape, activation)
        return cls(StandardNormal(latent_dims[-1]), down, decoder, up)

    @classmethod
    def _of(cls, architecture: Architecture) -> Self:
        # latent_dim is that of the level next to the data; the networks of each level are half as wide as below it.
        levels = [
            replace(architecture, x_shape=(below,), latent_dim=dim, model="vae", model_options={},
                    hidden=tuple(max(1, width >> level) for width in architecture.hidden))
            for level, (below, dim) in enumerate(pairwise(architecture.option("latent_dims")), start=1)
        ]  # fmt: skip
        up = [architecture.a_posterior(), *(level.a_posterior() for level in levels)]
        down = [DiagonalNormal(level.decoder_features(), level.x_shape[0]) for level in levels]
        prior = StandardNormal(levels[-1].latent_dim)
        return cls(prior, down, architecture.a_likelihood(), up)

    @property
    def num_layers(self) -> int:
        """L."""
        return self.model.num_layers

    def posterior(self, x: Any, *_: Any) -> TorchDistribution:
        """q(z_1 | x), batch_shape (B,); the layers above have no distribution given x in closed form."""
        return running(self.guide.z1_given_x, data_of(x, self.guide), network=self.guide)

    @torch.no_grad()
    @checked
    def latents(self, x: Any, *, seed: int | None = None) -> list[Tensor]:
        """One draw of z_1, ..., z_L from the guide, (B, D_l) each."""
        with noise(seed):
            drawn = [self.posterior(x).sample()]
            for layer in range(2, self.num_layers + 1):
                drawn.append(getattr(self.guide, f"z{layer}_given_z{layer - 1}")(drawn[-1]).sample())
        return drawn

    @torch.no_grad()
    @checked
    def sample(self, size: int = 1, *, pixels: str = "mean", seed: int | None = None) -> Tensor:
        """New data: z_L ~ p(z_L), and down to p(x | z_1).

        Args:
            size: How many.
            pixels: "mean" for E[x | z_1]; "draw" for a sample of p(x).
            seed: As for `VAE.sample`.
        Returns:
            (size, *x_shape).
        """
        with noise(seed):
            z = self.model.prior().expand([size]).sample()
            for layer in range(self.num_layers - 1, 0, -1):
                z = getattr(self.model, f"z{layer}_given_z{layer + 1}")(z).sample()
            return pixels_of(self.decode(z), pixels)
