"""A posterior with more than one mode."""

from __future__ import annotations

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from pyro_vae.parts.distributions.mixture import DiagonalNormalMixture
from pyro_vae.parts.posteriors.amortized import Amortized


class NormalMixture(Amortized):
    """q(z | x) = sum_c w_c(x) N(z; m_c(x), diag s_c(x)^2), c = 1, ..., C.

    What is reparameterised: everything. A sample carries exact derivatives in the means, the
    scales and the weights, so any objective may be used, Pyro's own included, and no score term
    is needed. What is not: the choice of the component itself. Weights learn by moving mass
    through whatever lies between the components, and their gradient has a variance that
    grows as exp(a^2 / 8) with the distance a, in standard deviations, between two of them: while
    they overlap it is small, from about eight on the weights stand almost still. Means
    and scales do not suffer. The derivatives are first derivatives (see `DiagonalNormalMixture`).

    There is no KL in closed form; the mean is one. Components start at different places, since
    equal components have equal gradients and would stay equal.

    Args:
        encoder: x, (..., *x_shape), to features, (..., F).
        latent_dim: D.
        num_components: C; the head returns C (2 D + 1) numbers.
        features: F; read from ``encoder.out_features`` when not given.
    Raises:
        ValueError: num_components < 1, or the number of features is unknown.
    Example:
        >>> NormalMixture(nn.Linear(3, 4), latent_dim=2, num_components=3)(torch.zeros(5, 3)).loc.shape
        torch.Size([5, 3, 2])

    Reference: Figurnov, Mohamed and Mnih, Implicit Reparameterization Gradients, 2018. arXiv:1805.08498
        Morningstar et al., Automatic Differentiation Variational Inference with Mixtures, 2021.
        arXiv:2003.01687
    """

    def __init__(
        self, encoder: nn.Module, latent_dim: int, num_components: int = 5, features: int | None = None
    ) -> None:
        if num_components < 1:
            raise ValueError(f"got num_components={num_components}, wanted 1 or more.")
        super().__init__(encoder, latent_dim, num_components * (2 * latent_dim + 1), features)
        self.num_components = num_components
        size = num_components * latent_dim
        with torch.no_grad():
            self.head.bias[:size].normal_(0, 0.5)

    def family(self, parameters: Tensor) -> TorchDistribution:
        C, D = self.num_components, self.latent_dim
        loc, log_scale, logits = parameters.split([C * D, C * D, C], -1)
        return DiagonalNormalMixture(loc.unflatten(-1, (C, D)), log_scale.unflatten(-1, (C, D)).exp(), logits)

    def around(self, loc: Tensor, scale: Tensor) -> Tensor:
        """Components scattered about loc: see `Amortized.around`."""
        C = self.num_components
        scatter = 0.5 * torch.randn(*loc.shape[:-1], C, loc.shape[-1], dtype=loc.dtype, device=loc.device)
        means = (loc.unsqueeze(-2) + scale.unsqueeze(-2) * scatter).flatten(-2)
        log_scales = scale.log().unsqueeze(-2).expand_as(scatter).flatten(-2)
        weights = loc.new_zeros(*loc.shape[:-1], C)
        return torch.cat([means, log_scales, weights], -1)
