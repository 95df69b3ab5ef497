"""The sleep phase of wake-sleep: the guide learns from data that the model made up.

At (z, x) ~ p(z, x) the guide climbs log q(z | x), which lowers the divergence
E_{p(x)} KL(p(z | x) || q(z | x)) without any importance weight. It asks no derivative of the
model or of the samples, so both may be discrete.
"""

from __future__ import annotations

from typing import Any

from pyro.distributions import Unit
from torch import Tensor
from torch.utils import _pytree as pytree

from pyro_vae.traces import Program, log_q, simulate, sites


def dream(model: Program, guide: Program, *args: Any, **kwargs: Any) -> Tensor:
    """log q(z | x) at a draw (z, x) ~ p(z, x), per datum, with a gradient for the guide.

    The batch serves for its shape, and for what the model conditions on: all that the model
    observes is replaced by the draws, wherever it stands in the arguments (also in a dict or a
    tuple, as a column of a tensor, in another shape or type); what it does not observe is kept.

    Args:
        model: A Pyro program for p(x, z).
        guide: A Pyro program for q(z | x).
        args: What both take, usually the batch.
        kwargs: Keyword arguments that both take.
    Returns:
        Log densities in nats, (B,).
    Raises:
        ValueError: An observed site is none of the arguments, or may be several, so that the guide would see
            it as it was; it cannot be drawn (``pyro.factor``); or nothing is observed.
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
    observed = {name: site for name, site in sites(model, *args, **kwargs).items() if site["is_observed"]}
    leaves, structure = pytree.tree_flatten((args, kwargs))
    if not observed:
        raise ValueError(
            f"the sleep phase replaces the data by draws from the model, but none of the {len(leaves)} arguments is "
            "what the model observes (nothing). Pass the data by position, or leave sleep at 0."
        )
    for name, site in observed.items():
        if isinstance(site["fn"], Unit):
            raise ValueError(
                f"the sleep phase draws from the model, but its site {name!r} is a pyro.factor, which cannot be drawn. "
                "Leave sleep at 0."
            )
    drawn = simulate(model, *args, **kwargs)
    replaced = list(leaves)
    for name, site in observed.items():
        _put(name, site["value"], drawn.observations[name], leaves, replaced)
    latents = {name: value.unsqueeze(0) for name, value in drawn.latents.items()}
    args, kwargs = pytree.tree_unflatten(replaced, structure)
    return log_q(guide, latents, *args, **kwargs).squeeze(0)


def _put(name: str, value: Tensor, drawn: Tensor, leaves: list[Any], replaced: list[Any]) -> None:
    """Write what was drawn for a site to where its data were in the arguments."""
    parts = [(i, leaf) for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf is value]
    parts = parts or [(i, leaf) for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and _part(leaf, value)]
    for i, leaf in parts:  # the same data, however often they are passed
        part = _part(leaf, value)
        if leaf is value or part is None:
            replaced[i] = drawn.to(leaf.dtype)
            continue
        if replaced[i] is leaf:
            replaced[i] = leaf.detach().clone()
        offset, size, stride = part
        replaced[i].as_strided(size, stride, offset).copy_(drawn)
    if parts:
        return
    found = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and _equal(leaf, value)]
    if len(found) != 1:
        which = "none of the" if not found else "more than one of the"
        raise ValueError(
            f"the sleep phase replaces the data by draws from the model, but {which} {len(leaves)} arguments is what "
            f"the model observes ({name}), so that the guide would see it as it was. Pass the data of {name!r} as an "
            "argument of its own, as the model observes them, or leave sleep at 0."
        )
    replaced[found[0]] = drawn.reshape(leaves[found[0]].shape).to(leaves[found[0]].dtype)


def _part(whole: Tensor, value: Tensor) -> tuple[int, tuple[int, ...], tuple[int, ...]] | None:
    """Where a view lies in a contiguous tensor: offset, size and stride; None where it is no view of it."""
    if not whole.is_contiguous() or whole.dtype != value.dtype or not whole.numel() or not value.numel():
        return None
    if whole.device != value.device or whole.untyped_storage().data_ptr() != value.untyped_storage().data_ptr():
        return None
    offset = value.storage_offset() - whole.storage_offset()
    last = offset + sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True))
    inside = offset >= 0 and last < whole.numel()
    return (int(offset), tuple(value.shape), value.stride()) if inside else None


def _equal(leaf: Tensor, value: Tensor) -> bool:
    """Whether an argument has the values of a site, in another shape or type."""
    if leaf.numel() != value.numel() or leaf.device != value.device:
        return False
    return bool((leaf.reshape(-1).to(value.dtype) == value.reshape(-1)).all())
