"""The amortized variational distribution q(z | x) as a plain Pyro program."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor

from pyro_vae.programs.missing import filled, full_mask
from pyro_vae.programs.named import Named


def data_check(x: Tensor | None) -> Tensor:
    """The data; refuse a guide that was run without."""
    if x is None:
        raise ValueError(
            "the guide q(z | x) was run without data. For prior draws use Predictive(model)(size=n); for "
            "posterior-predictive draws Predictive(poutine.uncondition(model), guide=guide)(x)."
        )
    return x


def batch_check(posterior: TorchDistribution, size: int) -> None:
    """Refuse a posterior whose last batch dimension is not the data, before Pyro broadcasts it."""
    if posterior.batch_shape and posterior.batch_shape[-1] != size:
        raise ValueError(
            f"posterior returned batch_shape {tuple(posterior.batch_shape)}, wanted ({size},). "
            "Did you forget .to_event(1)?"
        )


class Guide(Named):
    """q(z | x), over a plate "data" of the site "z".

    Takes what `Model` takes, and no data is an error: a posterior needs something to
    condition on. With a mask it is q(z | x_obs): missing pixels reach the posterior as
    zeros, so that nothing depends on what stands there.

    Args:
        posterior: A callable from x, (B, *x_shape), to q(z | x), batch_shape (B,).
        show_mask: Whether the posterior also gets the mask (ones where there is none),
            appended to x along the first dimension of a datum: (B, 2 C, *rest). It then
            tells a missing pixel from a black one.
        standardize: x, (B, *x_shape), to what the posterior gets in its place, of the same shape, such as a
            `Standardize`. Missing pixels are zeros after it: the mean of their column.
    Raises:
        ValueError: Called without data, or the posterior's batch_shape is not (B,).
    Example:
        >>> import torch, pyro.distributions as dist
        >>> Guide(lambda x: dist.Normal(x, 1.0).to_event(1))(torch.zeros(3, 2)).shape
        torch.Size([3, 2])
    """

    def __init__(
        self,
        posterior: Callable[[Tensor], TorchDistribution],
        show_mask: bool = False,
        standardize: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.posterior = posterior
        self.show_mask = show_mask
        self.standardize = standardize

    def forward(self, x: Tensor | None = None, mask: Tensor | None = None, **_: Any) -> Tensor:
        """Draw z ~ q(z | x).

        Args:
            x: Data, (B, *x_shape).
            mask: True where a pixel is observed, broadcastable to x; None for all.
        Returns:
            z, (B, D).
        """
        x = data_check(x)
        posterior = self.posterior
        with pyro.plate("data", len(x)):
            given_x = posterior(self.visible(x, mask))
            batch_check(given_x, len(x))
            return pyro.sample("z", given_x)

    def visible(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """What the posterior gets to see of the data: (B, *x_shape), or with the mask beside it."""
        if self.standardize is not None:
            x = self.standardize(x)
        if mask is not None:
            x = filled(x, mask)
        if self.show_mask:
            seen = torch.ones_like(x) if mask is None else full_mask(mask, x).to(x.dtype)
            x = torch.cat([x, seen], 1)
        return x
