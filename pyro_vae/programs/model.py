"""The generative model p(z) p(x | z) as a plain Pyro program."""

from __future__ import annotations

from collections.abc import Callable

import pyro
from pyro.distributions import TorchDistribution
from torch import Tensor

from pyro_vae.programs.missing import observed_part
from pyro_vae.programs.named import Named


def event_check(site: str, distribution: TorchDistribution, x: Tensor) -> None:
    """Refuse a likelihood whose event is not one datum, before Pyro broadcasts it."""
    wanted = tuple(x.shape[1:])
    if tuple(distribution.event_shape) == wanted:
        return
    if tuple(distribution.batch_shape)[-len(wanted) :] == wanted and not distribution.event_shape:
        raise ValueError(
            f"likelihood returned batch_shape {tuple(distribution.batch_shape)}, wanted "
            f"{tuple(distribution.batch_shape)[: -len(wanted)]}. Did you forget .to_event({len(wanted)})?"
        )
    raise ValueError(
        f"likelihood returned event_shape {tuple(distribution.event_shape)} for site {site!r}, but one datum of the "
        f"batch has shape {wanted}. Build the decoder for the shape of the data, or reshape the data."
    )


class Model(Named):
    """p(x, z) = p(z) p(x | z), over a plate "data" of sites "z" and "x".

    A plain Pyro program: with data it observes them, without it draws. With a mask, too,
    it observes only the pixels that are there: log p(x_obs | z), see `programs.missing`.

    Args:
        prior: A callable without arguments that returns p(z), batch_shape ().
        likelihood: A callable from z, (..., D), to p(x | z), batch_shape (...).
    Raises:
        ValueError: The likelihood's event is not of the shape of one datum.
    Example:
        >>> import torch, pyro.distributions as dist
        >>> model = Model(lambda: dist.Normal(torch.zeros(2), 1.0).to_event(1),
        ...               lambda z: dist.Normal(z, 1.0).to_event(1))
        >>> model(size=3).shape
        torch.Size([3, 2])
    """

    def __init__(
        self, prior: Callable[[], TorchDistribution], likelihood: Callable[[Tensor], TorchDistribution]
    ) -> None:
        super().__init__()
        self.prior = prior
        self.likelihood = likelihood

    def forward(self, x: Tensor | None = None, mask: Tensor | None = None, *, size: int = 1) -> Tensor:
        """Run the program.

        Args:
            x: Data, (B, *x_shape), to observe; None draws them.
            mask: True where a pixel is observed, broadcastable to x; None for all. What
                stands at a missing pixel, NaN too, plays no part.
            size: B where x is None.
        Returns:
            x, observed or drawn.
        """
        likelihood = self.likelihood
        with pyro.plate("data", size if x is None else len(x)):
            z = pyro.sample("z", self.prior())
            given_z = likelihood(z)
            if x is not None:
                event_check("x", given_z, x)
                if mask is not None:
                    given_z, x = observed_part(given_z, x, mask)
            return pyro.sample("x", given_z, obs=x)
