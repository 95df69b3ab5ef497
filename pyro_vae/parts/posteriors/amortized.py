"""What every posterior that reads its parameters off an encoder has in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn
from torch.distributions import constraints

from pyro_vae.protocols import Local, Rescoring


class Amortized(nn.Module, ABC):
    """q(z | x) = family(h(x)): an encoder, a linear head, and a family of distributions.

    A posterior of your own is a subclass with one method: say in ``__init__`` how many
    numbers P one distribution takes, and in `family` what they mean.

    Args:
        encoder: x, (..., *x_shape), to features, (..., F).
        latent_dim: D.
        num_parameters: P.
        features: F; read from ``encoder.out_features`` when not given.
    Attributes:
        rescoring: What it takes to score a sample that the distribution did not draw:
            "one pass", "D passes", or "impossible".
        support: Where z lies, a constraint of torch.
        passes: Networks that look at a z to score it.
    Raises:
        ValueError: The number of features is unknown, or a size is not positive.
    Example:
        >>> import pyro.distributions as dist
        >>> class Laplace(Amortized):
        ...     def __init__(self, encoder, latent_dim):
        ...         super().__init__(encoder, latent_dim, 2 * latent_dim)
        ...     def family(self, parameters):
        ...         loc, log_scale = parameters.chunk(2, -1)
        ...         return dist.Laplace(loc, log_scale.exp()).to_event(1)
        >>> import torch
        >>> Laplace(nn.Linear(3, 4), latent_dim=2)(torch.zeros(5, 3)).event_shape
        torch.Size([2])
    """

    rescoring: Rescoring = "one pass"
    support: ClassVar[Any] = constraints.real_vector
    passes: ClassVar[int] = 0

    def __init__(self, encoder: nn.Module, latent_dim: int, num_parameters: int, features: int | None = None) -> None:
        super().__init__()
        if latent_dim < 1 or num_parameters < 1:
            raise ValueError(
                f"latent_dim and num_parameters must be positive integers, got {latent_dim} and {num_parameters}."
            )
        self.encoder = encoder
        self.latent_dim = latent_dim
        self.head = nn.Linear(_features(encoder, features), num_parameters)

    def forward(self, x: Tensor) -> TorchDistribution:
        """q(z | x): data (..., *x_shape) to a distribution of batch_shape (...), event_shape (D,)."""
        return self.family(self.head(self.encoder(x)))

    @abstractmethod
    def family(self, parameters: Tensor) -> TorchDistribution:
        """The distribution with these parameters.

        Args:
            parameters: Unconstrained, (..., P).
        Returns:
            batch_shape (...), event_shape (D,).
        """

    def local(self, parameters: Tensor) -> Local:
        """The same family without the encoder: free parameters for each datum.

        Args:
            parameters: Where they start, (B, P), such as what the head returns.
        Returns:
            Free tensors, and the map from them to the distributions.
        """
        return Local({"parameters": parameters}, lambda free: self.family(free["parameters"]))

    def around(self, loc: Tensor, scale: Tensor) -> Tensor:
        """Parameters of a member near N(loc, diag scale^2): where a local fit starts that no encoder starts.

        The first numbers are taken for the mean and the next for log sigma, as in all
        families here; what bends the distribution is random and small, since at zero it
        would often have no gradient. A start is all that this is: a family of another
        order of its parameters may override it, but works without.

        Args:
            loc: (..., D).
            scale: Positive, (..., D).
        Returns:
            (..., P).
        """
        P, D = self.head.out_features, self.latent_dim
        rest = 0.1 * torch.randn(*loc.shape[:-1], P, dtype=loc.dtype, device=loc.device)
        centre = torch.cat([loc, scale.log()], -1) if 2 * D <= P else loc
        return torch.cat([centre, rest[..., centre.shape[-1] :]], -1)


def _features(encoder: nn.Module, features: int | None) -> int:
    found = features if features is not None else getattr(encoder, "out_features", None)
    if found is None and isinstance(encoder, nn.Sequential):
        found = next((m.out_features for m in reversed(encoder) if hasattr(m, "out_features")), None)
    if not isinstance(found, int):
        raise ValueError(
            f"{type(encoder).__name__} does not say how many features it returns. Give it an attribute "
            "out_features, or pass features=... to the posterior."
        )
    return found
