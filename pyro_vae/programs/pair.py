"""The pair: p(z) p(x | z) and q(z | x) as plain Pyro programs, under names of their own.

Pyro keys parameters by name, so that of two programs of one name only one would be trained: each gets one of its own.

Where pixels are missing for reasons that do not depend on their values, the evidence is that of the observed part,

    log p(x_obs) = log int p(z) prod_{i observed} p(x_i | z) dz

so the model leaves the other factors out, and q(z | x_obs) is given zero in their place. What stands at a missing pixel
is replaced before anything is computed, since NaN would reach the gradient.

Reference: Nazabal et al., Handling incomplete heterogeneous data using VAEs, 2020. arXiv:1807.03653; Mattei and
Frellsen, MIWAE, 2019. arXiv:1812.02633
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any, TypeVar

import pyro
import torch
from pyro.distributions import TorchDistribution
from pyro.nn import PyroModule
from torch import Tensor

from pyro_vae.parameters import leaves_with

_count = itertools.count(1)
_Self = TypeVar("_Self", bound="Named")


class Named(PyroModule):
    """A Pyro program of a name that no other program of this process has; abstract.

    Its PyroModules inside are named after it. A shallow copy shares the parameters of the original, and keeps its name.

    Example:
        >>> one = Named()
        >>> one._pyro_name == copy.deepcopy(one)._pyro_name
        False
    """

    def __init__(self) -> None:
        super().__init__(_unique_name(type(self).__name__))
        leaves_with(self, self._pyro_name)

    def __copy__(self: _Self) -> _Self:
        result = self.__class__.__new__(self.__class__)
        result.__dict__.update(self.__dict__)
        return result

    def __deepcopy__(self: _Self, memo: dict[int, Any]) -> _Self:
        result = self.__class__.__new__(self.__class__)
        memo[id(self)] = result
        for key, value in self.__dict__.items():
            result.__dict__[key] = copy.deepcopy(value, memo)
        _rename(result, _unique_name(type(self).__name__))
        leaves_with(result, result._pyro_name)
        return result

    def __getstate__(self) -> dict[str, Any]:
        for parameter in self.parameters():  # Pyro hangs a weakref on them, which cannot be pickled
            vars(parameter).pop("unconstrained", None)
        return self.__dict__

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        _rename(self, _unique_name(type(self).__name__))
        leaves_with(self, self._pyro_name)


def _unique_name(kind: str) -> str:
    return f"{kind}{next(_count)}"


def _rename(program: PyroModule, name: str) -> None:
    program._pyro_name = name
    for key, child in program._modules.items():
        if isinstance(child, PyroModule):
            _rename(child, f"{name}.{key}")


def event_check(site: str, distribution: TorchDistribution, x: Tensor) -> None:
    """Refuse a likelihood whose event is not one datum, before Pyro broadcasts it."""
    wanted, event, batch = tuple(x.shape[1:]), tuple(distribution.event_shape), tuple(distribution.batch_shape)
    if event == wanted:
        return
    if batch[-len(wanted) :] == wanted and not event:
        raise ValueError(
            f"likelihood returned batch_shape {batch}, wanted {batch[: -len(wanted)]}. Did you forget "
            f".to_event({len(wanted)})?"
        )
    raise ValueError(
        f"likelihood returned event_shape {event} for site {site!r}, but one datum of the "
        f"batch has shape {wanted}. Build the decoder for the shape of the data, or reshape the data."
    )


class Model(Named):
    """p(x, z) = p(z) p(x | z), over a plate "data" of sites "z" and "x".

    A plain Pyro program: with data it observes them, without it draws. With a mask, too,
    it observes only the pixels that are there: log p(x_obs | z), see above.

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
        self.prior, self.likelihood = prior, likelihood

    def forward(self, x: Tensor | None = None, mask: Tensor | None = None, *, size: int = 1) -> Tensor:
        """Run the program, and give x, observed or drawn.

        Args:
            x: Data, (B, *x_shape), to observe; None draws them.
            mask: True where a pixel is observed, broadcastable to x; None for all. What stands elsewhere plays no part.
            size: B where x is None.
        """
        likelihood = self.likelihood
        with pyro.plate("data", size if x is None else len(x)):
            z = pyro.sample("z", self.prior())
            return observe(likelihood(z), x, mask)


def observe(given_z: TorchDistribution, x: Tensor | None, mask: Tensor | None = None) -> Tensor:
    """The site "x": drawn, or observed where there are data of the shape of its event."""
    if x is not None:
        event_check("x", given_z, x)
        if mask is not None:
            given_z, x = observed_part(given_z, x, mask)
    return pyro.sample("x", given_z, obs=x)


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

    Takes what `Model` takes, and no data is an error: a posterior needs something to condition on. With a mask it is
    q(z | x_obs): missing pixels reach the posterior as zeros, so that nothing depends on what stands there.

    Args:
        posterior: A callable from x, (B, *x_shape), to q(z | x), batch_shape (B,).
        show_mask: Whether the posterior also gets the mask (ones where there is none), appended to x along the first
            dimension of a datum: (B, 2 C, *rest). It then tells a missing pixel from a black one.
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
        self.posterior, self.show_mask, self.standardize = posterior, show_mask, standardize

    def forward(self, x: Tensor | None = None, mask: Tensor | None = None, **_: Any) -> Tensor:
        """Draw z ~ q(z | x), (B, D), of data (B, *x_shape), and a mask, True where a pixel is observed."""
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


def full_mask(mask: Tensor, x: Tensor) -> Tensor:
    """The mask in the shape of the data, (B, *x_shape); refused if not boolean, or not to be broadcast to x.

    Example:
        >>> full_mask(torch.tensor([[True], [False]]), torch.zeros(2, 3)).sum(-1)
        tensor([3, 0])
    """
    if mask.dtype != torch.bool:
        raise ValueError(
            f"got a mask of dtype {mask.dtype}, wanted torch.bool, True where a pixel is observed. Call mask.bool()."
        )
    try:
        return mask.expand_as(x)
    except RuntimeError as error:
        raise ValueError(
            f"got a mask of shape {tuple(mask.shape)} for data of shape {tuple(x.shape)}, wanted one that broadcasts "
            "to the data. For one mask a datum add the dimensions of the pixels: mask[:, None, None, None]."
        ) from error


def filled(x: Tensor, mask: Tensor, value: float | Tensor = 0.0) -> Tensor:
    """The data, (B, *x_shape), with a value in place of what is missing, whatever stood there.

    Example:
        >>> filled(torch.tensor([[1.0, float("nan")]]), torch.tensor([[True, False]]))
        tensor([[1., 0.]])
    """
    return torch.where(full_mask(mask, x), x, torch.as_tensor(value, dtype=x.dtype, device=x.device))


def observed_part(likelihood: TorchDistribution, x: Tensor, mask: Tensor) -> tuple[TorchDistribution, Tensor]:
    """p(x_obs | z): the likelihood, masked inside its event; and data with a value of its support where they miss one.
    A likelihood that does not score pixels one by one is a ValueError.

    Example:
        >>> import pyro.distributions as dist
        >>> x, mask = torch.tensor([[0.0, float("nan")]]), torch.tensor([[True, False]])
        >>> likelihood, x = observed_part(dist.Normal(torch.zeros(1, 2), 1.0).to_event(1), x, mask)
        >>> likelihood.log_prob(x)
        tensor([-0.9189])
    """
    pixel, dims = likelihood, 0
    while isinstance(pixel, torch.distributions.Independent):
        pixel, dims = pixel.base_dist, dims + pixel.reinterpreted_batch_ndims
    if pixel.event_dim:
        raise ValueError(
            f"the likelihood ({type(pixel).__name__} of event_shape {tuple(pixel.event_shape)}) scores pixels jointly, "
            "so single ones cannot be left out of it. Mask whole data, or give it independent pixels: a "
            f"distribution of event_shape () with .to_event({x.dim() - 1})."
        )
    mask = full_mask(mask, x)
    return pixel.mask(mask).to_event(dims), filled(x, mask, _placeholder(pixel.support))


def _placeholder(support: Any) -> float | Tensor:
    """A value inside a support, where every density is finite."""
    lower, upper = getattr(support, "lower_bound", None), getattr(support, "upper_bound", None)
    if lower is None:
        return 0.0 if upper is None else upper - 1
    if support.is_discrete:
        return lower
    return lower + 1 if upper is None else (lower + upper) / 2
