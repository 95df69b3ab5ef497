"""Data simulated from a model, put in the place of the data that it was given.

A model observes sites, and takes arguments; which argument is which site is told by their
values. So a user's own program needs no convention: a site replaces the argument that it
equals up to shape, as ``obs=x.reshape(-1, 784)`` does, and where none or several do, the
caller says which.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from pyro_vae.traces import Program, simulate, sites


def simulated_batch(
    model: Program, args: tuple[Any, ...], observed: Mapping[str, int] | None = None
) -> tuple[tuple[Any, ...], dict[str, Tensor]]:
    """Draw (z, x) ~ p(z) p(x | z) in the shape of a batch.

    Args:
        model: A Pyro program for p(x, z).
        args: A batch, which serves for its shape, and for what the model conditions on.
        observed: Position of the argument that an observed site is, as {"x": 0}, where the
            values do not tell.
    Returns:
        The arguments with simulated data in them, and the latents that the data were drawn from.
    Raises:
        ValueError: A site equals no argument, or several; or the model observes nothing.
    Example:
        >>> import torch, pyro, pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, 0])
        >>> (x,), latents = simulated_batch(model, (torch.zeros(5, 1),))
        >>> x.shape, latents["z"].shape
        (torch.Size([5, 1]), torch.Size([5]))
    """
    given = {name: site["value"] for name, site in sites(model, *args).items() if site["is_observed"]}
    if not given:
        raise ValueError(
            "the model observes no site with these arguments, so there are no data to simulate. "
            "Write the data site as pyro.sample(name, distribution, obs=x)."
        )
    named = dict(observed or {})
    unknown = [name for name in named if name not in given]
    if unknown:
        raise ValueError(f"got observed={{{unknown[0]!r}: ...}}, wanted one of the model's data sites, {list(given)}.")
    places = {name: _place(name, value, args, named.get(name)) for name, value in given.items()}
    if len(set(places.values())) < len(places):
        raise ValueError(
            f"two observed sites are one and the same argument, {places}, so simulated data have no place. Make them "
            "one site, or two arguments."
        )
    drawn = simulate(model, *args)
    replaced = list(args)
    for name, place in places.items():
        replaced[place] = drawn.observations[name].reshape(args[place].shape).to(args[place].dtype)
    return tuple(replaced), drawn.latents


def _place(site: str, value: Tensor, args: tuple[Any, ...], named: int | None) -> int:
    if named is not None:
        if not -len(args) <= named < len(args) or not isinstance(args[named], Tensor):
            raise ValueError(
                f"got observed={{{site!r}: {named}}}, wanted the position of a tensor among {len(args)} arguments."
            )
        if args[named].numel() != value.numel():
            raise ValueError(
                f"argument {named} has {args[named].numel()} values, and site {site!r} {value.numel()}: wanted as many."
            )
        return named % len(args)
    same = [
        i
        for i, x in enumerate(args)
        if isinstance(x, Tensor) and x.numel() == value.numel() and bool((x.flatten() == value.flatten()).all())
    ]
    if len(same) != 1:
        found = "none" if not same else f"those at {same}"
        raise ValueError(
            f"simulated data of site {site!r} replace the argument that it equals up to shape, and of {len(args)} "
            f"arguments {found} did. Say which it is by its position: observed={{{site!r}: 0}}."
        )
    return same[0]
