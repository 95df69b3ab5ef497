"""A mixture of Gaussians as the prior."""

from __future__ import annotations

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_vae.parts.distributions.shared_mixture import SharedMixture, normals


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
        ValueError: A size that is not positive, an unknown covariance, or a spread
            outside of (0, 1).
    Example:
        >>> _ = torch.manual_seed(0)
        >>> NormalMixture(2, num_components=10)().log_prob(torch.zeros(5, 2)).shape
        torch.Size([5])

    Reference: Dilokthanakul et al., Deep Unsupervised Clustering with Gaussian Mixture
        Variational Autoencoders, 2016. arXiv:1611.02648
    """

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
        self.latent_dim = latent_dim
        self.covariance = covariance
        self.logits = nn.Parameter(torch.zeros(num_components))
        self.locs = nn.Parameter(spread * torch.randn(num_components, latent_dim))
        start = 0.5 * torch.log1p(torch.tensor(-(spread**2)))
        self.log_scales = nn.Parameter(start.repeat(num_components, latent_dim))
        # Below the diagonal of the Cholesky factors.
        shape = (num_components, latent_dim, latent_dim) if covariance == "full" else (0,)
        self.lower = nn.Parameter(torch.zeros(shape)) if covariance == "full" else None

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
        if covariance == "diagonal":
            scales = covariances.sqrt() * unit
        else:
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
