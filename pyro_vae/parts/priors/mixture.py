"""Mixtures as priors: of Gaussians, and of the guide's own posteriors.

The prior that maximises the ELBO of given data is the aggregated posterior, 1/N sum_n q(z | x_n), which costs N passes
and overfits. A mixture over a few hundred learned pseudo-inputs keeps the idea at a price that does not depend on N.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution, constraints
from torch import Tensor, nn

from pyro_vae.options import integer
from pyro_vae.parts.distributions.mixture import SharedMixture, normals
from pyro_vae.protocols import rescoring, support


class NormalMixture(nn.Module):
    """p(z) = sum_c w_c N(z; mu_c, S_c): a learned mixture of C normals in D dimensions.

    S_c is diagonal, or any covariance matrix with ``covariance="full"``. The start is
    spread out, else all components would move as one: mu_c ~ N(0, spread^2 I) and
    S_c = (1 - spread^2) I, so that the whole has about the moments of N(0, I).

    Args:
        latent_dim: D.
        num_components: C.
        covariance: "diagonal" or "full".
        spread: Standard deviation of the means at the start, between 0 and 1.
    Raises:
        ValueError: A size that is not positive, an unknown covariance, or a spread outside of (0, 1).
    Example:
        >>> _ = torch.manual_seed(0)
        >>> NormalMixture(2, num_components=10)().log_prob(torch.zeros(5, 2)).shape
        torch.Size([5])

    Reference: Dilokthanakul et al., Deep Unsupervised Clustering with Gaussian Mixture
        Variational Autoencoders, 2016. arXiv:1611.02648
    """

    support = constraints.real_vector

    def __init__(
        self, latent_dim: int, num_components: int = 10, covariance: str = "diagonal", spread: float = 0.5
    ) -> None:
        super().__init__()
        if latent_dim < 1 or num_components < 1:
            raise ValueError(
                f"latent_dim and num_components must be positive integers, got {latent_dim} and {num_components}."
            )
        if covariance not in ("diagonal", "full"):
            raise ValueError(f'got covariance={covariance!r}, wanted "diagonal" or "full".')
        if not 0 < spread < 1:
            raise ValueError(f"got spread={spread}, wanted a number between 0 and 1: at 0 all components are one.")
        self.latent_dim, self.covariance = latent_dim, covariance
        self.logits = nn.Parameter(torch.zeros(num_components))
        self.locs = nn.Parameter(spread * torch.randn(num_components, latent_dim))
        start = 0.5 * torch.log1p(torch.tensor(-(spread**2)))
        self.log_scales = nn.Parameter(start.repeat(num_components, latent_dim))
        # Below the diagonal of the Cholesky factors.
        lower = torch.zeros(num_components, latent_dim, latent_dim) if covariance == "full" else None
        self.lower = None if lower is None else nn.Parameter(lower)

    def forward(self) -> SharedMixture:
        """p(z): batch_shape (), event_shape (D,)."""
        scales = self.log_scales.exp()
        if self.lower is None:
            return SharedMixture(self.logits, normals(self.locs, scales))
        scale_tril = self.lower.tril(-1) + torch.diag_embed(scales)
        components = dist.MultivariateNormal(self.locs, scale_tril=scale_tril, validate_args=False)
        return SharedMixture(self.logits, components)

    @classmethod
    def fitted(cls, z: Tensor, num_components: int = 10, covariance: str = "full", seed: int = 0) -> NormalMixture:
        """The mixture that expectation maximisation fits to samples (scikit-learn's ``GaussianMixture``).

        Args:
            z: Samples, (N, D).
            num_components: C; at most N.
            covariance: "diagonal" or "full".
            seed: Of the start, which is k-means.
        Returns:
            A prior on the device and in the dtype of the samples.
        Raises:
            ValueError: Fewer samples than components, or samples that are not finite.
        """
        if z.dim() != 2 or len(z) < max(2, num_components) or not bool(z.isfinite().all()):
            raise ValueError(
                f"got samples of shape {tuple(z.shape)} for {num_components} components, wanted finite (N, D) with N "
                "at least 2 and at least the number of components."
            )
        prior = cls(z.shape[1], num_components, covariance)
        from sklearn.mixture import GaussianMixture  # slow to import

        kind = "diag" if covariance == "diagonal" else "full"
        points = z.detach().double().cpu()
        # Expectation maximisation adds a floor to variances in the units of the data.
        unit = points.std(0).clamp(min=1e-12)
        centre = points.mean(0)
        scaled = ((points - centre) / unit).numpy()
        found = GaussianMixture(num_components, covariance_type=kind, random_state=seed, max_iter=500).fit(scaled)
        locs = torch.from_numpy(found.means_) * unit + centre
        covariances = torch.from_numpy(found.covariances_)
        covariances = torch.diag_embed(covariances) if covariance == "diagonal" else covariances
        tril = torch.linalg.cholesky(covariances) * unit.unsqueeze(-1)
        scales = tril.diagonal(dim1=-2, dim2=-1)
        prior.to(device=z.device, dtype=z.dtype)
        with torch.no_grad():
            prior.logits.copy_(torch.from_numpy(found.weights_).log())
            prior.locs.copy_(locs)
            prior.log_scales.copy_(scales.log())
            if prior.lower is not None:
                prior.lower.copy_(tril.tril(-1))
        return prior


PSEUDO_INPUTS = 500


class VampPrior(nn.Module):
    """p(z) = sum_c w_c q(z | u_c): the guide's posterior at C learned pseudo-inputs u_c.

    Hand the same posterior to the guide: ``Model(VampPrior.from_data(posterior, x), ...)``
    and ``Guide(posterior)`` share it, train it once, and save it once. The posteriors of
    the pseudo-inputs are computed once per run of the model, whatever B and K are.

    With bounds = (a, b) pseudo-inputs stay inside: u = a + (b - a) sigmoid(v), v free. At the start they are kept 1 %
    of the range away from the limits, where v would be infinite and could not move.

    Args:
        posterior: x, (..., *x_shape), to a distribution of batch_shape (...) that can
            score samples that it did not draw.
        pseudo_inputs: u at the start, (C, *x_shape).
        bounds: The range of the data, (0, 1) for images; None leaves u free.
        learned_weights: Learn w; else w_c = 1/C.
    Raises:
        ValueError: A posterior that cannot score samples that it did not draw; no
            pseudo-inputs; pseudo-inputs outside of the bounds.
    Example:
        >>> posterior = lambda x: dist.Normal(x, torch.ones_like(x)).to_event(1)
        >>> VampPrior(posterior, torch.tensor([[-1.0], [1.0]]))().log_prob(torch.zeros(1))
        tensor(-1.4189, grad_fn=...)

    Reference: Tomczak and Welling, VAE with a VampPrior, 2018. arXiv:1705.07120
    """

    def __init__(
        self,
        posterior: Callable[[Tensor], TorchDistribution],
        pseudo_inputs: Tensor,
        bounds: tuple[float, float] | None = None,
        learned_weights: bool = False,
    ) -> None:
        super().__init__()
        if rescoring(posterior) == "impossible":
            raise ValueError(
                f"{type(posterior).__name__} cannot score a sample that it did not draw, and a VampPrior is a mixture "
                "of such scores. Take a posterior that can, such as DiagonalNormal, FullNormal or a spline flow."
            )
        if pseudo_inputs.dim() < 2 or not len(pseudo_inputs):
            raise ValueError(
                f"got pseudo_inputs of shape {tuple(pseudo_inputs.shape)}, wanted (C, *x_shape) with C at least 1."
            )
        start = pseudo_inputs.detach().clone()
        start = start if start.is_floating_point() else start.to(torch.get_default_dtype())
        if bounds is not None:
            start = _free(start, *bounds)
        self.support = support(posterior)
        self.posterior, self.bounds = posterior, bounds
        self.free_inputs = nn.Parameter(start)
        logits = start.new_zeros(len(start))
        if learned_weights:
            self.logits = nn.Parameter(logits)
        else:
            self.register_buffer("logits", logits, persistent=False)

    @classmethod
    def for_posterior(
        cls,
        posterior: Callable[[Tensor], TorchDistribution],
        x_shape: Sequence[int],
        num_components: int = PSEUDO_INPUTS,
        bounds: tuple[float, float] | None = None,
        learned_weights: bool = False,
    ) -> VampPrior:
        """C pseudo-inputs that start at uniform noise: how a standard VAE builds it, before it has seen data."""
        count = integer("num_components", num_components)
        return cls(posterior, torch.rand(count, *x_shape), bounds, learned_weights)

    @classmethod
    def from_data(
        cls,
        posterior: Callable[[Tensor], TorchDistribution],
        data: Any,
        num_components: int = 500,
        bounds: tuple[float, float] | None = None,
        learned_weights: bool = False,
        seed: int = 0,
    ) -> VampPrior:
        """Pseudo-inputs that start at random data.

        Args:
            posterior, bounds, learned_weights: As for the class.
            data: A tensor (N, *x_shape), or what an index tensor turns into one.
            num_components: C, at most N.
            seed: Of the choice.
        Raises:
            ValueError: More components than data.
        """
        if not 1 <= num_components <= len(data):
            raise ValueError(f"got num_components={num_components} for {len(data)} data, wanted 1 to {len(data)}.")
        generator = torch.Generator().manual_seed(seed)
        chosen = data[torch.randperm(len(data), generator=generator)[:num_components]]
        return cls(posterior, chosen[0] if isinstance(chosen, tuple | list) else chosen, bounds, learned_weights)

    @property
    def num_components(self) -> int:
        """C."""
        return len(self.free_inputs)

    @torch.no_grad()
    def start_at(self, pseudo_inputs: Tensor) -> None:
        """Put the pseudo-inputs u, (C, *x_shape), somewhere else, such as at random data.

        Raises:
            ValueError: Another shape, or values outside of the bounds.
        """
        if pseudo_inputs.shape != self.free_inputs.shape:
            raise ValueError(
                f"got pseudo_inputs of shape {tuple(pseudo_inputs.shape)}, wanted {tuple(self.free_inputs.shape)}."
            )
        start = pseudo_inputs.to(self.free_inputs.dtype)
        self.free_inputs.copy_(start if self.bounds is None else _free(start, *self.bounds))

    @property
    def pseudo_inputs(self) -> Tensor:
        """u, (C, *x_shape), in the space of the data."""
        if self.bounds is None:
            return self.free_inputs
        low, high = self.bounds
        return low + (high - low) * self.free_inputs.sigmoid()

    def forward(self) -> SharedMixture:
        """p(z): batch_shape (), event_shape (D,)."""
        return SharedMixture(self.logits, self.posterior(self.pseudo_inputs))


def _free(inputs: Tensor, low: float, high: float) -> Tensor:
    """The v of u = low + (high - low) sigmoid(v), away from the limits."""
    if not low < high or bool((inputs < low).any()) or bool((inputs > high).any()):
        raise ValueError(
            f"got pseudo_inputs from {inputs.min():g} to {inputs.max():g} for bounds=({low}, {high}), wanted all "
            "between the bounds. Give the range of the data, or bounds=None."
        )
    return ((inputs - low) / (high - low)).clamp(0.01, 0.99).logit()
