"""The sleep phase of wake-sleep: the guide learns from data that the model made up.

At (z, x) ~ p(z, x) the guide climbs log q(z | x), which lowers the divergence
E_{p(x)} KL(p(z | x) || q(z | x)) without any importance weight. It asks no derivative of the
model or of the samples, so both may be discrete.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pyro_vae.traces import Program, log_q, simulate, sites


def dream(model: Program, guide: Program, *args: Any, **kwargs: Any) -> Tensor:
    """log q(z | x) at a draw (z, x) ~ p(z, x), per datum, with a gradient for the guide.

    The batch serves for its shape, and for what the model conditions on: arguments that
    it observes are replaced by the draws, others are kept.

    Args:
        model: A Pyro program for p(x, z).
        guide: A Pyro program for q(z | x).
        args: What both take, usually the batch.
        kwargs: Keyword arguments that both take.
    Returns:
        Log densities in nats, (B,).
    Raises:
        ValueError: None of the arguments is what the model observes.
    Example:
        >>> import torch, pyro, pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))
        >>> dream(model, guide, torch.zeros(5)).shape
        torch.Size([5])

    Reference: Hinton et al., The wake-sleep algorithm for unsupervised neural networks, 1995.
    """
    observed = {name: site["value"] for name, site in sites(model, *args, **kwargs).items() if site["is_observed"]}
    drawn = simulate(model, *args, **kwargs)
    replaced: list[Any] = list(args)
    for name, value in observed.items():
        found = [i for i, argument in enumerate(args) if argument is value]
        found = found or [i for i, argument in enumerate(args) if getattr(argument, "shape", None) == value.shape]
        if len(found) == 1 and name in drawn.observations:
            replaced[found[0]] = drawn.observations[name].to(args[found[0]].dtype)
    if all(new is old for new, old in zip(replaced, args, strict=True)):
        raise ValueError(
            f"the sleep phase replaces the data by draws from the model, but none of the {len(args)} arguments is what "
            f"the model observes ({', '.join(observed) or 'nothing'}). Pass the data by position, or leave sleep at 0."
        )
    latents = {name: value.unsqueeze(0) for name, value in drawn.latents.items()}
    return log_q(guide, latents, *replaced, **kwargs).squeeze(0)
