"""The generative model p(z) p(x | z) as a plain Pyro program."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any, TypeVar

import pyro
from pyro.distributions import TorchDistribution
from pyro.nn import PyroModule
from torch import Tensor

from pyro_vae.programs.missing import observed_part

_count = itertools.count(1)
_Self = TypeVar("_Self", bound=PyroModule)


def unique_name(kind: str) -> str:
    """A name that no other program of this process has: Pyro keys parameters by it."""
    return f"{kind}{next(_count)}"


def renamed_deepcopy(module: _Self, memo: dict[int, Any]) -> _Self:
    """A deepcopy under a name of its own, since a copy of the name would share parameters."""
    result = module.__class__.__new__(module.__class__)
    memo[id(module)] = result
    for key, value in module.__dict__.items():
        result.__dict__[key] = copy.deepcopy(value, memo)
    result._pyro_name = unique_name(module.__class__.__name__)
    for child in result.children():
        if isinstance(child, PyroModule):
            child._pyro_name = ""  # named anew, from its parent, when next used
    return result


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


class Model(PyroModule):
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
        super().__init__(unique_name(type(self).__name__))
        self.prior = prior
        self.likelihood = likelihood

    __deepcopy__ = renamed_deepcopy

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


