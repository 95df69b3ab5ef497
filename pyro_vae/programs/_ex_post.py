"""A new prior for a fitted model, from where its guide puts the data.

A likelihood has only learned the z that the guide visits, q(z) = E_data q(z | x). Where p(z) differs from it, samples
are decoded from places where no datum lies. A density fitted to draws of q(z) mends that after training.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from pyro_vae.evaluation import evaluating
from pyro_vae.options import of_pair
from pyro_vae.parameters import device_of
from pyro_vae.parts.priors.mixture import NormalMixture
from pyro_vae.programs.pair import Model
from pyro_vae.randomness import noise
from pyro_vae.tensors import data_of
from pyro_vae.traces import Program, particles


@of_pair
def ex_post(
    model: Model,
    guide: Program,
    data: Any,
    *,
    prior: str | nn.Module = "gaussian-mixture",
    num_components: int = 10,
    covariance: str = "full",
    num_steps: int = 2000,
    learning_rate: float = 1e-2,
    batch_size: int = 500,
    seed: int = 0,
) -> Model:
    """The same likelihood under a prior fitted to the aggregated posterior.

        p'(z) = arg max over the family of E_data E_q(z|x) log p'(z)

    For guides that are points (autoencoders) too, for which it matters most.

    Args:
        model: A fitted `Model`. It stays as it is.
        guide: Its guide.
        data: A tensor (N, *x_shape), what an index tensor turns into one (a `Split`), or an iterable of batches.
        prior: "gaussian-mixture", fitted by expectation maximisation (scikit-learn), or a module that returns a density
            over (D,), such as ``Flow(D, zuko.flows.NSF)``: a copy of it is fitted by gradient steps on the latents in
            units of their mean and standard deviation, and the best of them on a held-out tenth is kept.
        num_components: Of the Gaussian mixture.
        covariance: Of its components: "full" or "diagonal".
        num_steps: Gradient steps for a module.
        learning_rate: Of these (Adam).
        batch_size: Data encoded, and latents per gradient step.
        seed: Of the draws and of the fit.
    Returns:
        A model with the likelihood of the old one (the same module) and the new prior, whose parameters are frozen.
    Raises:
        ValueError: A model without a likelihood of its own; an unknown prior; too few
            data; a latent that is not one vector per datum.

    Reference: Ghosh et al., From Variational to Deterministic Autoencoders, 2020. arXiv:1903.12436
    """
    if not hasattr(model, "likelihood"):
        raise ValueError(f"got a model of type {type(model).__name__}, wanted a Model(prior, likelihood).")
    if isinstance(prior, str) and prior != "gaussian-mixture":
        raise ValueError(
            f'unknown prior {prior!r}, wanted "gaussian-mixture" or a module such as Flow(latent_dim, zuko.flows.NSF).'
        )
    with noise(seed):
        z = aggregated_posterior(model, guide, data, batch_size)
        if isinstance(prior, str):
            fitted: nn.Module = NormalMixture.fitted(z, num_components, covariance, seed)
        else:
            fitted = _fit(copy.deepcopy(prior).to(z), z, num_steps, learning_rate, batch_size)
    return Model(fitted.requires_grad_(False).eval(), model.likelihood)


@of_pair
def aggregated_posterior(model: Program, guide: Program, data: Any, batch_size: int = 500) -> Tensor:
    """One draw z ~ q(z | x) for each datum, of the networks in evaluation mode, (N, D).

    Args:
        model: The model; it says which of the guide's sites are latent.
        guide: The guide; a point guide gives its points.
        data: As for `ex_post`.
        batch_size: Data at a time.
    Returns:
        The draws, one row per datum.
    Raises:
        ValueError: No data; several latents, or one that is not a vector per datum.
    """
    place, drawn = device_of(model, guide), []
    with evaluating(model, guide):
        for batch in _batches(data, batch_size):
            latents = particles(model, guide, batch if place is None else batch.to(place)).latents
            if list(latents) != ["z"] or latents["z"].dim() != 3:
                shapes = {name: tuple(value.shape[1:]) for name, value in latents.items()}
                raise ValueError(f"got latents of shapes {shapes}, wanted one site 'z' of shape (B, D).")
            drawn.append(latents["z"][0])
    if not drawn:
        raise ValueError("got no data, wanted a tensor, a split or batches.")
    return torch.cat(drawn)


class Standardized(nn.Module):
    """p(z) of z = loc + scale u, (D,) each, u from another prior: one written for numbers of size 1."""

    loc: Tensor
    scale: Tensor

    def __init__(self, prior: nn.Module, loc: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.prior = prior
        self.register_buffer("loc", loc)
        self.register_buffer("scale", scale)

    def forward(self) -> TorchDistribution:
        """p(z): batch_shape (), event_shape (D,)."""
        move = dist.transforms.AffineTransform(self.loc, self.scale, event_dim=1)
        return dist.TransformedDistribution(self.prior(), [move])


def _batches(data: Any, batch_size: int) -> Iterator[Tensor]:
    if data is None or isinstance(data, str | bytes) or not hasattr(data, "__iter__") and not hasattr(data, "__len__"):
        raise ValueError(f"got data of type {type(data).__name__}, wanted a tensor, a split or batches.")
    if isinstance(data, tuple) and data and not isinstance(data[0], list | tuple | dict):
        data = data[0]
    if hasattr(data, "__array__") and not isinstance(data, Tensor):
        data = data_of(data)
    if hasattr(data, "__len__") and hasattr(data, "__getitem__") and not isinstance(data, list | tuple):
        data = map(data.__getitem__, torch.arange(len(data)).split(batch_size))
    for batch in data:
        yield data_of(batch[0] if isinstance(batch, list | tuple) else batch)


@torch.enable_grad()
def _fit(prior: nn.Module, z: Tensor, steps: int, learning_rate: float, batch_size: int) -> nn.Module:
    """Maximum likelihood on nine tenths, the best by the last tenth."""
    if len(z) < 20:
        raise ValueError(f"got {len(z)} data to fit {type(prior).__name__} to, wanted at least 20.")
    result = Standardized(prior, z.mean(0), z.std(0).clamp(min=1e-6))
    order = torch.randperm(len(z), device=z.device)
    held_out, z = z[order[: len(z) // 10]], z[order[len(z) // 10 :]]
    optimizer = torch.optim.Adam(prior.requires_grad_().parameters(), learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps))
    best, kept = -torch.inf, copy.deepcopy(prior.state_dict())
    for step in range(1, steps + 1):
        batch = z[torch.randint(len(z), (min(batch_size, len(z)),), device=z.device)]
        optimizer.zero_grad()
        (-result().log_prob(batch).mean()).backward()
        torch.nn.utils.clip_grad_norm_(prior.parameters(), 10.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == steps:
            with torch.no_grad():
                score = result().log_prob(held_out).mean().item()
            if score > best:
                best, kept = score, copy.deepcopy(prior.state_dict())
    prior.load_state_dict(kept)
    return result
