"""Distributions whose evidence is known, to judge approximations against.

The linear-Gaussian latent-variable model, which is probabilistic PCA:

    p(z) = N(0, I),   p(x | z) = N(W z + b, s^2 I),   W is (X, D)

    log p(x)    = log N(x; b, W W' + s^2 I)
    p(z | x)    = N(m(x), M^-1),   M = W' W / s^2 + I,   m(x) = M^-1 W' (x - b) / s^2

The posterior's precision M does not depend on x, and it is diagonal only if the columns of W are orthogonal. So the
best a factorised Gaussian can do is known, and so is what it loses, without any sampling:

    min over factorised q of KL(q || p(z | x)) = (sum_d log M_dd - log det M) / 2

Reference: Tipping and Bishop, Probabilistic principal component analysis, 1999.
"""

import math

import torch
from torch import Tensor
from torch.distributions import Independent, MultivariateNormal, Normal


class LinearGaussian:
    """p(z) = N(0, I), p(x | z) = N(W z + b, s^2 I), with every answer in closed form.

    All methods work in the dtype and on the device of `weight`.

    Args:
        weight: W, (X, D).
        loc: b, (X,).
        scale: s > 0.
    Example:
        >>> testbed = LinearGaussian(torch.tensor([[3.0], [4.0]]), torch.zeros(2), scale=1.0)
        >>> testbed.log_evidence(torch.zeros(1, 2))          # log N(0; 0, W W' + I), of determinant 26
        tensor([-3.4669])
    """

    def __init__(self, weight: Tensor, loc: Tensor, scale: float) -> None:
        if weight.dim() != 2 or loc.shape != weight.shape[:1]:
            raise ValueError(
                f"got weight of shape {tuple(weight.shape)} and loc of shape {tuple(loc.shape)}, "
                "wanted (X, D) and (X,)."
            )
        if not scale > 0:
            raise ValueError(f"got scale={scale}, wanted a standard deviation > 0.")
        self.weight = weight
        self.loc = loc
        self.scale = float(scale)
        self.precision = weight.mT @ weight / self.scale**2 + torch.eye(self.latent_dim).to(weight)
        cholesky = torch.linalg.cholesky(self.precision)
        self._cholesky = cholesky
        self._scale_tril = torch.linalg.cholesky(torch.cholesky_inverse(cholesky))

    @classmethod
    def random(
        cls, x_dim: int, latent_dim: int, scale: float = 0.5, seed: int = 0, dtype: torch.dtype = torch.float32
    ) -> "LinearGaussian":
        """A test bed with W_xd ~ N(0, 1/D) and b_x ~ N(0, 1), so that W z varies by about 1 per dimension.

        Example:
            >>> LinearGaussian.random(x_dim=5, latent_dim=2).weight.shape
            torch.Size([5, 2])
        """
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(x_dim, latent_dim, generator=generator, dtype=torch.float64) / math.sqrt(latent_dim)
        return cls(weight.to(dtype), torch.randn(x_dim, generator=generator, dtype=torch.float64).to(dtype), scale)

    def __repr__(self) -> str:
        return f"LinearGaussian(x_dim={self.x_dim}, latent_dim={self.latent_dim}, scale={self.scale:g})"

    @property
    def x_dim(self) -> int:
        """Number of data dimensions X."""
        return self.weight.shape[0]

    @property
    def latent_dim(self) -> int:
        """Number of latent dimensions D."""
        return self.weight.shape[1]

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "LinearGaussian":
        """The test bed on another device or in another dtype."""
        return LinearGaussian(
            self.weight.to(device=device, dtype=dtype), self.loc.to(device=device, dtype=dtype), self.scale
        )

    def sample(self, num_samples: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Draws (z, x) ~ p(z) p(x | z), of shapes (B, D) and (B, X)."""
        dtype, device = self.weight.dtype, self.weight.device
        z = torch.randn(num_samples, self.latent_dim, generator=generator, dtype=dtype, device=device)
        noise = torch.randn(num_samples, self.x_dim, generator=generator, dtype=dtype, device=device)
        return z, z @ self.weight.mT + self.loc + self.scale * noise

    def log_evidence(self, x: Tensor) -> Tensor:
        """log p(x) in nats, (B,) for x of (B, X)."""
        # |x - b - W m|^2 / s^2 + |m|^2 equals the quadratic form of the marginal, without its cancellation.
        loc = self._posterior_loc(x)
        quadratic = (x - self.loc - loc @ self.weight.mT).square().sum(-1) / self.scale**2 + loc.square().sum(-1)
        log_det = self._log_det_precision() + 2 * self.x_dim * math.log(self.scale)
        return -0.5 * (quadratic + log_det + self.x_dim * math.log(2 * math.pi))

    def posterior(self, x: Tensor) -> MultivariateNormal:
        """p(z | x), of batch_shape (B,) and event_shape (D,)."""
        return MultivariateNormal(self._posterior_loc(x), scale_tril=self._scale_tril)

    def best_mean_field(self, x: Tensor) -> Independent[Normal]:
        """The factorised Gaussian q that minimises KL(q || p(z | x)): the posterior's mean,
        and the diagonal of its precision, which is narrower than its marginals."""
        loc = self._posterior_loc(x)
        return Independent(Normal(loc, self.precision.diagonal().rsqrt().expand_as(loc)), 1)

    def mean_field_gap(self) -> Tensor:
        """KL(q || p(z | x)) in nats at the best factorised Gaussian q, the same for every x.

        Zero if and only if the columns of W are orthogonal.
        """
        return 0.5 * (self.precision.diagonal().log().sum() - self._log_det_precision())

    def elbo(self, x: Tensor, loc: Tensor, scale_tril: Tensor) -> Tensor:
        """The ELBO of any Gaussian q(z | x) = N(loc, L L'), without sampling.

            E_q log p(x | z) - KL(q || p(z))

        Args:
            x: Data (B, X).
            loc: Means (B, D).
            scale_tril: L, lower triangular with a positive diagonal, (B, D, D) or (D, D).
        Returns:
            The bound in nats, (B,).
        """
        variance = self.scale**2
        residual = x - self.loc - loc @ self.weight.mT
        spread = (self.weight @ scale_tril).square().sum((-2, -1))
        log_likelihood = -0.5 * (
            (residual.square().sum(-1) + spread) / variance + self.x_dim * math.log(2 * math.pi * variance)
        )
        log_det = 2 * scale_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        kl = 0.5 * (scale_tril.square().sum((-2, -1)) + loc.square().sum(-1) - self.latent_dim - log_det)
        return log_likelihood - kl

    @property
    def num_parameters(self) -> int:
        """Free parameters of p(x): W up to rotation of z, the scale, and b.

        X D - D (D - 1) / 2 + 1 + X
        """
        return self.x_dim * self.latent_dim - self.latent_dim * (self.latent_dim - 1) // 2 + 1 + self.x_dim

    def expected_excess(self, num_train: int) -> float:
        """What a perfect fit to n data is expected to lose on new data, per datum, in nats.

            E[log p_true(x) - log p_fitted(x)] = (number of free parameters) / (2 n) + O(1 / n^2)

        at the maximum-likelihood fit. A fitted model that loses more than this has not
        been fitted to the end; one that loses much less was scored on its training data.

        Args:
            num_train: Number n of training data.
        Example:
            >>> LinearGaussian.random(x_dim=20, latent_dim=4).expected_excess(20_000)
            0.002375

        Reference: Akaike, A new look at the statistical model identification, 1974;
            the number of parameters from Tipping and Bishop, 1999.
        """
        if num_train < 1:
            raise ValueError(f"got num_train={num_train}, wanted the number of training data, >= 1.")
        return self.num_parameters / (2 * num_train)

    def _posterior_loc(self, x: Tensor) -> Tensor:
        if x.shape[-1:] != self.loc.shape:
            raise ValueError(f"got x of shape {tuple(x.shape)}, wanted (B, {self.x_dim}).")
        projected = (x - self.loc) @ self.weight / self.scale**2
        return torch.cholesky_solve(projected.unsqueeze(-1), self._cholesky).squeeze(-1)

    def _log_det_precision(self) -> Tensor:
        return 2 * self._cholesky.diagonal().log().sum()
