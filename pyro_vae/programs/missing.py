"""Missing pixels, and draws of what is missing.

Missing pixels: a mask beside the data, True where a pixel was observed.

Where pixels are missing for reasons that do not depend on their values, the evidence is that of the observed part,

    log p(x_obs) = log int p(z) prod_{i observed} p(x_i | z) dz

so the model leaves the other factors out, and the guide must not see what was not observed: q(z | x_obs) is given
zero in its place. All bounds and estimates follow with no change of their own. What stands at a missing pixel (NaN,
or a guess) never enters: it is replaced before anything is computed, as a factor that is dropped afterwards would
still carry NaN into the gradient.

Reference: Nazabal et al., Handling incomplete heterogeneous data using VAEs, 2020. arXiv:1807.03653; Mattei and
Frellsen, MIWAE, 2019. arXiv:1812.02633

Imputation: draws of what is missing, given what is observed.

    p(x_mis | x_obs) = int p(x_mis | z) p(z | x_obs) dz

The guide stands in for p(z | x_obs), and its error is corrected by importance resampling: of K proposals
z_k ~ q(z | x_obs), one is kept with probability proportional to w_k = p(x_obs, z_k) / q(z_k | x_obs), and decoded.
Exact as K grows, for any guide that covers the posterior, and for any K where the guide is exact.

Reference: Mattei and Frellsen, MIWAE: deep generative modelling and imputation of incomplete data, 2019.
arXiv:1812.02633; Rubin, sampling importance resampling, 1987.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from pyro import poutine
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from pyro_vae.evaluation import evaluating
from pyro_vae.options import checked
from pyro_vae.tensors import data_of
from pyro_vae.traces import Program, particles, plate_nesting, sites


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


_CHUNK = 2**22  # floats per tensor of decoder output


class Imputation(NamedTuple):
    """Completed data.

    Attributes:
        draws: (S, B, *x_shape): observed pixels as they were, missing ones drawn from p(x_mis | x_obs).
        ess: Effective number of the K samples per datum, (B,). Where it is not well above the number of draws,
            draws repeat the same few latents: raise num_samples, or enrich the guide.
    """

    draws: Tensor
    ess: Tensor


@checked
def impute(
    model: Program,
    guide: Program,
    data: Any,
    *,
    num_samples: int = 1000,
    num_imputations: int = 1,
    seed: int | None = 0,
) -> Imputation:
    """Draw the missing pixels given the observed ones, by importance resampling from the guide.

    The networks run in evaluation mode.

    Args:
        model: A Pyro program for p(x, z) that takes (x, mask), such as `Model`.
        guide: A Pyro program for q(z | x) that takes (x, mask), such as `Guide`.
        data: (x, mask): x of (B, *x_shape), in which missing pixels may hold anything, NaN too; the mask True where a
            pixel is observed, broadcastable to x.
        num_samples: K, samples of the guide to choose from.
        num_imputations: S, completed copies of each datum.
        seed: Seed of the draws; None goes on with torch's random state.
    Returns:
        The completed data, and how many samples they really had to choose from.
    Raises:
        ValueError: S or K < 1, a guide without density, a model that observes more than one site, and all that
            `particles` refuses.
    Example:
        >>> import pyro.distributions as dist
        >>> from pyro_vae.programs.pair import Guide
        >>> from pyro_vae.programs.pair import Model
        >>> model = Model(lambda: dist.Normal(torch.zeros(1), 1.0).to_event(1),
        ...               lambda z: dist.Normal(z.expand(*z.shape[:-1], 2), 0.1).to_event(1))
        >>> guide = Guide(lambda x: dist.Normal(x[:, :1], 0.2).to_event(1))
        >>> x = torch.tensor([[3.0, float("nan")]])
        >>> draws, ess = impute(model, guide, (x, ~x.isnan()), num_imputations=500)
        >>> draws.shape, abs(draws[:, 0, 1].mean().item() - 3) < 0.1
        (torch.Size([500, 1, 2]), True)
    """
    if not isinstance(data, tuple | list) or len(data) != 2:
        got = f"{len(data)} columns" if isinstance(data, tuple | list) else f"data of type {type(data).__name__}"
        raise ValueError(f"got {got}, wanted (x, mask), the mask True where x is observed: (x, ~x.isnan()).")
    x = data_of(data[0], guide if isinstance(guide, nn.Module) else None)
    mask = full_mask(data_of(data[1], name="mask").to(x.device), x)
    with evaluating(model, guide, seed=seed):
        observed = [name for name, site in sites(model, x, mask).items() if site["is_observed"]]
        if len(observed) != 1:
            raise ValueError(
                f"the model observes the sites {observed}, wanted one, which holds the data to complete."
            )
        log_weight, latents = _proposals(model, guide, x, mask, num_samples)
        weight = torch.softmax(log_weight.double(), 0)
        if not bool(torch.isfinite(weight).all()):
            row = int((~torch.isfinite(weight)).any(0).nonzero()[0])
            raise ValueError(
                f"row {row} has no density at any of the {num_samples} samples, wanted data that the model can have "
                "drawn. Look at what is observed of it."
            )
        chosen = torch.multinomial(weight.T, num_imputations, replacement=True).T  # (S, B)
        rows = torch.arange(len(x), device=chosen.device)
        draws = []
        for index in chosen:
            kept = {name: value[index, rows] for name, value in latents.items()}
            program = poutine.condition(poutine.uncondition(model), data=kept)
            drawn: Tensor = poutine.trace(program).get_trace(x, mask).nodes[observed[0]]["value"]  # type: ignore[assignment]
            draws.append(torch.where(mask, x, drawn))
    return Imputation(torch.stack(draws), 1 / weight.square().sum(0))


def _proposals(
    model: Program, guide: Program, x: Tensor, mask: Tensor, count: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """log w, (K, B), and the latents, (K, B, ...) each, in chunks that fit in memory."""
    nesting = plate_nesting(model, guide, x, mask)
    size = max(1, _CHUNK // max(1, x.numel()))
    tables = [
        particles(model, guide, x, mask, num_samples=min(size, count - start), max_plate_nesting=nesting)
        for start in range(0, count, size)
    ]
    latents = {name: torch.cat([table.latents[name] for table in tables]) for name in tables[0].latents}
    return torch.cat([table.log_weight for table in tables]), latents
