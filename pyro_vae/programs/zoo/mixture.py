"""Clusters in the latent space.

    model   p(c) p(z | c) p(x | z)
    guide   q(z | x)

The cluster c of a datum is never drawn: given z it is independent of x, so its exact posterior is p(c | z), and Pyro's
TraceEnum_ELBO(max_plate_nesting=1) sums it out, p(x, z) = p(x | z) sum_c p(c) p(z | c). The same sum is the prior of
``pair.marginal``, the plain `Model` that `particles` needs, since it draws each latent that a model has.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Self

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from pyro_vae.options import checked
from pyro_vae.parts import names
from pyro_vae.parts.likelihoods import Bernoulli
from pyro_vae.parts.networks import MLP
from pyro_vae.parts.posteriors import DiagonalNormal
from pyro_vae.programs.architecture import Architecture
from pyro_vae.programs.pair import Guide, Model, Named, observe
from pyro_vae.programs.vae import Answers, pixels_of
from pyro_vae.programs.zoo.assembly import Conditional, pixel_likelihood
from pyro_vae.randomness import noise


class Clusters(nn.Module):
    """p(z | c) = N(z; mu_c, diag sigma_c^2), learned.

    Args:
        num_clusters: C.
        latent_dim: D.
        spread: Standard deviation of the means to start from; sigma starts at 1.
    Example:
        >>> Clusters(3, latent_dim=2)(torch.tensor([0, 2])).batch_shape
        torch.Size([2])
    """

    @checked
    def __init__(self, num_clusters: int, latent_dim: int, spread: float = 1.0) -> None:
        super().__init__()
        self.loc = nn.Parameter(spread * torch.randn(num_clusters, latent_dim))
        self.log_scale = nn.Parameter(torch.zeros(num_clusters, latent_dim))

    def forward(self, c: Tensor) -> TorchDistribution:
        """p(z | c), batch_shape that of c."""
        return dist.Normal(self.loc[c], self.log_scale[c].exp(), validate_args=False).to_event(1)


class ClusterPrior(nn.Module):
    """p(z) = sum_c p(c) p(z | c): learned weights, and any components, from c, integers (...), to batch_shape (...)."""

    def __init__(self, num_clusters: int, components: Conditional) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(num_clusters))
        self.components = components

    def clusters(self) -> TorchDistribution:
        """p(c), batch_shape ()."""
        return dist.Categorical(logits=self.logits)

    def forward(self) -> TorchDistribution:
        """p(z), batch_shape ()."""
        return dist.MixtureSameFamily(self.clusters(), self._everyone(), validate_args=False)

    def _everyone(self) -> TorchDistribution:
        """p(z | c) of all c, batch_shape (C,)."""
        return self.components(torch.arange(len(self.logits), device=self.logits.device))

    def responsibilities(self, z: Tensor) -> Tensor:
        """p(c | z), (..., C) for (..., D)."""
        log_joint = self.clusters().logits + self._everyone().log_prob(z.unsqueeze(-2))
        return log_joint.softmax(-1)


class MixtureModel(Named):
    """p(x, z, c), over a plate "data" of the sites "c", "z" and "x"; "c" is to be enumerated."""

    def __init__(self, prior: ClusterPrior, likelihood: Conditional) -> None:
        super().__init__()
        self.prior, self.likelihood = prior, likelihood

    def forward(self, x: Tensor | None = None, *, size: int = 1) -> Tensor:
        """Run the program; arguments and result are those of `Model`."""
        with pyro.plate("data", size if x is None else len(x)):
            c = pyro.sample("c", self.prior.clusters(), infer={"enumerate": "parallel"})
            z = pyro.sample("z", self.prior.components(c))
            return observe(self.likelihood(z), x)


class Mixture(Answers):
    """A VAE with C clusters in its latent space, ``pair.model`` and ``pair.guide``.

    Train it with the cluster summed out by Pyro, or in the prior; the two are equal:

        fit(pair.model, pair.guide, x, loss=TraceEnum_ELBO(max_plate_nesting=1))
        fit(pair.marginal, pair.guide, x)

    The second takes every bound and estimator, and is what to judge: log_likelihood(pair.marginal, pair.guide, x).

    Args:
        num_clusters: C.
        components: c, integers (...), to p(z | c), batch_shape (...): `Clusters`, or your own.
        likelihood: z to p(x | z).
        posterior: x to q(z | x), batch_shape (B,).
    Example:
        >>> pair = Mixture.build((1, 8, 8), 10, latent_dim=2, hidden=(16,))
        >>> pair.responsibilities(torch.zeros(5, 1, 8, 8)).shape
        torch.Size([5, 10])

    Reference: Jiang et al., Variational Deep Embedding, 2017. arXiv:1611.05148. Its
        q(c | x) is a fixed function of samples of z; here c is summed out exactly.
    """

    @checked
    def __init__(
        self, num_clusters: int, components: Conditional, likelihood: Conditional, posterior: Conditional
    ) -> None:
        super().__init__()
        self.model = MixtureModel(ClusterPrior(num_clusters, components), likelihood)
        self.guide = Guide(posterior)

    @classmethod
    @checked
    def build(
        cls,
        x_shape: Sequence[int],
        num_clusters: int,
        latent_dim: int = 10,
        hidden: Sequence[int] = (400, 400),
        *,
        activation: str = "silu",
        likelihood: str | Callable[[nn.Module], Any] = Bernoulli,
        posterior: str | Callable[[nn.Module, int], Any] = DiagonalNormal,
    ) -> Mixture:
        """Dense networks and Gaussian clusters with new weights.

        Args:
            num_clusters: C; all else as of `Conditional.build`.
        """
        decoder = pixel_likelihood(likelihood, latent_dim, hidden[::-1], x_shape, activation)
        encoder = MLP(x_shape, hidden, None, activation)
        clusters = Clusters(num_clusters, latent_dim)
        return cls(num_clusters, clusters, decoder, names.made("posterior", posterior, encoder, latent_dim))

    @classmethod
    def _of(cls, architecture: Architecture) -> Self:
        count = architecture.option("num_components")
        clusters = Clusters(count, architecture.latent_dim)
        return cls(count, clusters, architecture.a_likelihood(), architecture.a_posterior())

    @property
    def marginal(self) -> Model:
        """p(z) p(x | z) with the cluster summed out: a plain program of the same modules."""
        return Model(self.model.prior, self.model.likelihood)

    @torch.no_grad()
    @checked
    def responsibilities(self, x: Any, num_samples: int = 100, *, seed: int | None = None) -> Tensor:
        """p(c | x), (B, C), as the guide sees it: E_q(z|x) p(c | z), from samples."""
        with noise(seed):
            z = self.posterior(x).sample(torch.Size([num_samples]))
            return self.model.prior.responsibilities(z).mean(0)

    @torch.no_grad()
    @checked
    def sample(
        self, size: int = 1, *, cluster: int | None = None, pixels: str = "mean", seed: int | None = None
    ) -> Tensor:
        """New data: c ~ p(c), z ~ p(z | c), then x from p(x | z).

        Args:
            size: How many.
            cluster: c, to draw from one cluster only.
            pixels: "mean" for E[x | z]; "draw" for a sample of p(x).
            seed: As for `VAE.sample`.
        Returns:
            (size, *x_shape).
        Raises:
            ValueError: Another value of pixels, or no such cluster.
        """
        clusters = self.model.prior.clusters()
        if cluster is not None and not 0 <= cluster < clusters.probs.shape[-1]:
            raise ValueError(f"got cluster {cluster}, wanted one of 0 ... {clusters.probs.shape[-1] - 1}, or None.")
        with noise(seed):
            c = clusters.sample(torch.Size([size]))
            z = self.model.prior.components(c if cluster is None else torch.full_like(c, cluster)).sample()
            return pixels_of(self.decode(z), pixels)
