"""Imputation: draws of what is missing, given what is observed.

    p(x_mis | x_obs) = int p(x_mis | z) p(z | x_obs) dz

Of K proposals z_k ~ q(z | x_obs), one is kept with probability proportional to w_k = p(x_obs, z_k) / q(z_k | x_obs),
and decoded: exact as K grows, for any guide that covers the posterior, and for any K where the guide is exact.

Reference: Mattei and Frellsen, MIWAE: deep generative modelling and imputation of incomplete data, 2019.
arXiv:1812.02633; Rubin, sampling importance resampling, 1987.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from pyro import poutine
from torch import Tensor, nn

from pyro_vae.judging.sweeps import in_chunks, sweep
from pyro_vae.options import of_pair
from pyro_vae.programs.pair import filled, full_mask
from pyro_vae.tensors import data_of
from pyro_vae.traces import Program, sites


class Imputation(NamedTuple):
    """Completed data.

    Attributes:
        draws: (S, B, *x_shape): observed pixels as they were, missing ones drawn from p(x_mis | x_obs).
        ess: Effective number of the K samples per datum, (B,). Where it is not well above the number of draws,
            draws repeat the same few latents: raise num_samples, or enrich the guide.
    """

    draws: Tensor
    ess: Tensor


@of_pair
def impute(
    model: Program,
    guide: Program,
    data: Any,
    *,
    num_samples: int = 1000,
    num_imputations: int = 1,
    seed: int | None = 0,
    device: str | torch.device | None = None,
    progress: bool | None = None,
) -> Imputation:
    """Draw the missing pixels given the observed ones, by importance resampling from the guide.

    Args:
        model, guide: Pyro programs for p(x, z) and q(z | x) that take (x, mask), such as `Model` and `Guide`.
        data: (x, mask): x of (B, *x_shape), in which missing pixels may hold anything, NaN too; the mask True where a
            pixel is observed, broadcastable to x.
        num_samples: K, samples of the guide to choose from.
        num_imputations: S, completed copies of each datum.
        seed, device, progress: As for `log_likelihood`.
    Returns:
        The completed data, and how many samples they really had to choose from.
    Raises:
        ValueError: S or K < 1, a guide without density, a model that observes more than one site, and all that
            `particles` refuses.
    Example:
        >>> import pyro.distributions as dist
        >>> from pyro_vae import Guide, Model
        >>> model = Model(lambda: dist.Normal(torch.zeros(1), 1.0).to_event(1),
        ...               lambda z: dist.Normal(z.expand(*z.shape[:-1], 2), 0.1).to_event(1))
        >>> guide = Guide(lambda x: dist.Normal(x[:, :1], 0.2).to_event(1))
        >>> x = torch.tensor([[3.0, float("nan")]])
        >>> draws, ess = impute(model, guide, (x, ~x.isnan()), num_imputations=500)
        >>> draws.shape, abs(draws[:, 0, 1].mean().item() - 3) < 0.1
        (torch.Size([500, 1, 2]), True)
    """
    x, mask = _masked(data, guide)
    with sweep(model, guide, data=(x, mask), batch_size=None, seed=seed, device=device, progress=progress,
               title="imputation") as run:  # fmt: skip
        if len(run.first) != 2:
            raise ValueError("the pair takes no mask, wanted programs model(x, mask), guide(x, mask), as a VAE's are.")
        x, mask = run.whole()
        observed = [name for name, site in sites(model, x, mask).items() if site["is_observed"]]
        if len(observed) != 1:
            raise ValueError(f"the model observes the sites {observed}, wanted one, which holds the data to complete.")
        nesting = run.nesting(guide) if num_samples > 1 else 0
        tables = list(in_chunks(model, guide, (x, mask), num_samples, nesting))
        weight = torch.softmax(torch.cat([table.log_weight for table in tables]).double(), 0)
        if not bool(torch.isfinite(weight).all()):
            row = int((~torch.isfinite(weight)).any(0).nonzero()[0])
            raise ValueError(
                f"row {row} has no density at any of the {num_samples} samples, wanted data that the model can have "
                "drawn. Look at what is observed of it."
            )
        latents = {name: torch.cat([table.latents[name] for table in tables]) for name in tables[0].latents}
        chosen = torch.multinomial(weight.T, num_imputations, replacement=True).T  # (S, B)
        rows = torch.arange(len(x), device=chosen.device)
        draws = []
        for index in chosen:
            kept = {name: value[index, rows] for name, value in latents.items()}
            program = poutine.condition(poutine.uncondition(model), data=kept)
            drawn: Tensor = poutine.trace(program).get_trace(x, mask).nodes[observed[0]]["value"]  # type: ignore[assignment]
            draws.append(torch.where(mask, x, drawn))
    return Imputation(torch.stack(draws), 1 / weight.square().sum(0))


def _masked(data: Any, guide: Program) -> tuple[Tensor, Tensor]:
    """Data, with 0 where they are missing, and a mask of the same shape."""
    if not isinstance(data, tuple | list) or len(data) != 2:
        got = f"{len(data)} columns" if isinstance(data, tuple | list) else f"data of type {type(data).__name__}"
        raise ValueError(f"got {got}, wanted (x, mask), the mask True where x is observed: (x, ~x.isnan()).")
    x = data_of(data[0], guide if isinstance(guide, nn.Module) else None)
    mask = full_mask(data_of(data[1], name="mask").to(x.device), x)
    return filled(x, mask), mask
