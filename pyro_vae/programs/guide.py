"""The amortised variational distribution q(z | x) as a plain Pyro program."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
from pyro.distributions import TorchDistribution
from pyro.nn import PyroModule
from torch import Tensor

from pyro_vae.programs.model import renamed_deepcopy, unique_name


class Guide(PyroModule):
    """q(z | x), over a plate "data" of the site "z".

    Takes what `Model` takes, and no data is an error: a posterior needs something to
    condition on.

    Args:
        posterior: A callable from x, (B, *x_shape), to q(z | x), batch_shape (B,).
    Raises:
        ValueError: Called without data, or the posterior's batch_shape is not (B,).
    Example:
        >>> import torch, pyro.distributions as dist
        >>> Guide(lambda x: dist.Normal(x, 1.0).to_event(1))(torch.zeros(3, 2)).shape
        torch.Size([3, 2])
    """

    def __init__(self, posterior: Callable[[Tensor], TorchDistribution]) -> None:
        super().__init__(unique_name(type(self).__name__))
        self.posterior = posterior

    __deepcopy__ = renamed_deepcopy

    def forward(self, x: Tensor | None = None, **_: Any) -> Tensor:
        """Draw z ~ q(z | x).

        Args:
            x: Data, (B, *x_shape).
        Returns:
            z, (B, D).
        """
        if x is None:
            raise ValueError(
                "the guide q(z | x) was run without data. For prior draws use Predictive(model)(size=n); for "
                "posterior-predictive draws Predictive(poutine.uncondition(model), guide=guide)(x)."
            )
        posterior = self.posterior
        with pyro.plate("data", len(x)):
            given_x = posterior(x)
            if given_x.batch_shape and given_x.batch_shape[-1] != len(x):
                raise ValueError(
                    f"posterior returned batch_shape {tuple(given_x.batch_shape)}, wanted ({len(x)},). "
                    "Did you forget .to_event(1)?"
                )
            return pyro.sample("z", given_x)
