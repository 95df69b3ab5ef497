"""Missing pixels: a mask beside the data, True where a pixel was observed.

Where pixels are missing for reasons that do not depend on their values, the evidence is that of the observed part,

    log p(x_obs) = log int p(z) prod_{i observed} p(x_i | z) dz

so the model leaves the other factors out, and the guide must not see what was not observed: q(z | x_obs) is given
zero in its place. All bounds and estimates follow with no change of their own. What stands at a missing pixel (NaN,
or a guess) never enters: it is replaced before anything is computed, as a factor that is dropped afterwards would
still carry NaN into the gradient.

Reference: Nazabal et al., Handling incomplete heterogeneous data using VAEs, 2020. arXiv:1807.03653; Mattei and
Frellsen, MIWAE, 2019. arXiv:1812.02633
"""

from __future__ import annotations

from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor


def full_mask(mask: Tensor, x: Tensor) -> Tensor:
    """The mask in the shape of the data.

    Args:
        mask: True where observed, broadcastable to x.
        x: Data, (B, *x_shape).
    Returns:
        bool, (B, *x_shape).
    Raises:
        ValueError: A mask that is not boolean, or does not broadcast to x.
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
    """The data with a value in place of what is missing, whatever stood there.

    Args:
        x: Data, (B, *x_shape).
        mask: True where observed, broadcastable to x.
        value: What to put elsewhere.
    Returns:
        (B, *x_shape).
    Example:
        >>> filled(torch.tensor([[1.0, float("nan")]]), torch.tensor([[True, False]]))
        tensor([[1., 0.]])
    """
    return torch.where(full_mask(mask, x), x, torch.as_tensor(value, dtype=x.dtype, device=x.device))


def observed_part(likelihood: TorchDistribution, x: Tensor, mask: Tensor) -> tuple[TorchDistribution, Tensor]:
    """p(x_obs | z): the likelihood without the factors of missing pixels, and data that it can score.

    Args:
        likelihood: p(x | z), independent over pixels, batch_shape (..., B) and the event_shape of a datum.
        x: Data, (B, *x_shape).
        mask: True where observed, broadcastable to x.
    Returns:
        The likelihood, masked inside its event; the data with a value of its support where they are missing.
    Raises:
        ValueError: The likelihood does not score pixels one by one.
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
