"""The parameters of a distribution as free tensors: what a guide is optimised in without its encoder.

A family of distributions is a map from free tensors, one row per datum, to distributions.
`Local` holds both: the tensors where they start, and the map. A posterior hands out its
own (`Amortized.local`); of any other distribution `free_parameters` lifts the constraints.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from pyro.distributions import MaskedDistribution, TorchDistribution
from torch import Tensor
from torch.distributions import Independent, MultivariateNormal, transform_to

Free = dict[str, Tensor]
Build = Callable[[Free], TorchDistribution]


class Local(NamedTuple):
    """A family without its encoder: free parameters per datum, and what they mean.

    Attributes:
        free: Unconstrained tensors by name, the batch shape of the distribution in front.
        build: From such tensors to the distribution.
        pace: The learning rate of a tensor relative to the others, where it is not 1
            (weights of a network want smaller steps than a mean).
    """

    free: Free
    build: Build
    pace: Mapping[str, float] = {}


def free_parameters(distribution: TorchDistribution) -> tuple[Free, Build]:
    """A distribution's parameters without constraints, and the way back.

    Args:
        distribution: One that its class and the parameters named in its
            ``arg_constraints`` determine, under ``Independent`` or a mask.
    Returns:
        The parameters by name, and a function from such parameters to the distribution.
    Raises:
        ValueError: It is not determined so.
    Example:
        >>> import torch, pyro.distributions as dist
        >>> free, build = free_parameters(dist.Normal(torch.zeros(3), torch.ones(3)).to_event(1))
        >>> free["scale"], build(free).event_shape
        (tensor([0., 0., 0.]), torch.Size([3]))
    """
    if isinstance(distribution, Independent):
        free, inner = free_parameters(distribution.base_dist)
        return free, lambda given: inner(given).to_event(distribution.reinterpreted_batch_ndims)
    if isinstance(distribution, MaskedDistribution):
        free, inner = free_parameters(distribution.base_dist)
        return free, lambda given: inner(given).mask(distribution._mask)
    family = type(distribution)
    allowed = getattr(distribution, "arg_constraints", {})
    names = ("loc", "scale_tril") if isinstance(distribution, MultivariateNormal) else tuple(allowed)
    takes = set(inspect.signature(family.__init__).parameters) - {"self"}
    if not names or not takes - {"validate_args"} <= set(allowed):
        raise ValueError(f"{family.__name__} is not made of parameters in its arg_constraints alone")
    options: dict[str, Any] = {"validate_args": False} if "validate_args" in takes else {}
    try:
        ways = {name: transform_to(allowed[name]) for name in names}
        free = {name: ways[name].inv(getattr(distribution, name)) for name in names}
    except (NotImplementedError, AttributeError) as error:
        raise ValueError(f"{family.__name__} has parameters whose constraints cannot be lifted ({error})") from error
    return free, lambda given: family(**{name: ways[name](given[name]) for name in names}, **options)
