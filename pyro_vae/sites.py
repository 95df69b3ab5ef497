"""What one sample site of a Pyro trace says: its plates, of which that of particles lies left of all others, its log
density with its masks, and apart from it its scale."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from pyro.distributions import Delta, MaskedDistribution
from pyro.distributions.torch_distribution import ExpandedDistribution
from pyro.distributions.util import scale_and_mask
from pyro.poutine.subsample_messenger import _Subsample
from pyro.poutine.trace_struct import Trace
from torch import Tensor
from torch.distributions import Independent
from torch.utils import _pytree as pytree

PARTICLES = "_pyro_vae_particles"


class Frame(NamedTuple):
    """Where the samples and the data lie among the batch dimensions."""

    num_samples: int
    particle_dim: int | None  # None: one sample, no particle plate
    data_dim: int
    data_size: int
    joint: bool = False  # the guide has one density for all data together

    @property
    def columns(self) -> int:
        """Densities that can be told apart: one for each datum, or one for all of them."""
        return 1 if self.joint else self.data_size


def sample_sites(trace: Trace) -> list[Any]:
    """Random sites and observations; not plates, nor ``pyro.deterministic``."""
    return [
        site
        for site in trace.nodes.values()
        if site["type"] == "sample"
        and not is_subsample(site["fn"])
        and not (site["infer"] or {}).get("_deterministic", False)
    ]


def plates(site: Any) -> dict[int, Any]:
    return {f.dim: f for f in site["cond_indep_stack"] if f.vectorized and f.name != PARTICLES}


def depth(trace: Trace) -> int:
    return max((-dim for site in sample_sites(trace) for dim in plates(site)), default=0)


def is_subsample(fn: Any) -> bool:
    """Whether a site is a plate's choice of rows, and no random variable of the program."""
    return isinstance(fn, _Subsample)


def wrappers(fn: Any) -> list[Any]:
    """What declares, expands or masks the dimensions of a distribution, from outside."""
    found = []
    while isinstance(fn, Independent | ExpandedDistribution | MaskedDistribution):
        found.append(fn)
        fn = fn.base_dist
    return found


def unwrapped(fn: Any) -> Any:
    """A distribution without its `wrappers`."""
    around = wrappers(fn)
    return around[-1].base_dist if around else fn


def kind(fn: Any) -> str:
    """What a distribution is called in a message."""
    return type(unwrapped(fn)).__name__


def factors(fn: Any) -> Any:
    """The distribution of the single numbers of a factorised one; None where it is not."""
    if not fn.event_shape:
        return fn
    return fn.base_dist if isinstance(fn, Independent) and not fn.base_dist.event_shape else None


def delta(fn: Any) -> Delta | None:
    """The ``Delta`` inside a distribution, None where there is none."""
    while not isinstance(fn, Delta) and hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return fn if isinstance(fn, Delta) else None


def is_point(fn: Any) -> bool:
    """Whether a distribution is a ``Delta`` without a density of its own.

    One that an auxiliary site feeds can have its density there: `pyro_vae.auxiliary` knows.
    """
    inner = delta(fn)
    if inner is None or inner.log_density.requires_grad:
        return False
    return not bool((inner.log_density != 0).any())


def deterministic(site: Any) -> bool:
    """Whether a model's site is a ``Delta``: a function of others that is recorded, and no latent."""
    return not site["is_observed"] and delta(site["fn"]) is not None


def _records_only(site: Any) -> bool:
    """Whether a site outside all plates says nothing but what a value is."""
    return deterministic(site) and not plates(site) and is_point(site["fn"])


def lengths(batch: Any) -> tuple[int, ...]:
    """The lengths of a batch's tensors, however it holds them.

    Example:
        >>> import torch
        >>> lengths(({"x": torch.zeros(5, 2)}, [torch.zeros(3)], 1))
        (5, 3)
    """
    if type(batch) is tuple and all(type(x) is Tensor for x in batch):  # spares pytree's code, the usual case
        leaves: Sequence[Any] = batch
    else:
        leaves = pytree.tree_leaves(batch)
    return tuple(len(x) for x in leaves if isinstance(x, Tensor | np.ndarray) and x.ndim)


def data_plate(common: Collection[tuple[int, int]], rows: Collection[int]) -> tuple[int, int]:
    """Of the plates (dim, size) that all sites share that of the data: as long as they are, else the outermost."""
    fitting = [plate for plate in common if plate[1] in rows]
    return fitting[0] if len(fitting) == 1 else min(common)


def data_frame(
    traces: list[Trace], num_samples: int, nesting: int, joint: Collection[str] = (), args: tuple[Any, ...] = ()
) -> Frame:
    """The plate of the data: of those that all sites share the one that is as long as the data, else the outermost.

    Sites that may hold one density for all data (`joint`) need not share it, nor do those that are no random variables.
    """
    found = [site for t in traces for site in sample_sites(t)]
    bound = {site["name"] for site in found if not _records_only(site)}
    free = {site["name"] for site in found} - bound | set(joint)
    every = {site["name"]: {(d, f.size) for d, f in plates(site).items()} for site in found}
    stacks = {name: stack for name, stack in every.items() if name not in free}
    if not stacks:
        raise ValueError("the program has no sample site, so there is nothing to score.")
    common = set.intersection(*stacks.values())
    if not common:
        if not any(stacks.values()):
            raise ValueError(
                "no site lies in a plate, so the data cannot be told apart. Wrap model and guide in "
                'with pyro.plate("data", len(x)): and declare event dimensions with .to_event(n).'
            )
        widest = max(set().union(*stacks.values()), key=lambda plate: sum(plate in s for s in stacks.values()))
        outside = [name for name, stack in stacks.items() if widest not in stack]
        raise ValueError(
            f"site {outside[0]!r} lies outside the data plate (dim {widest[0]}, size {widest[1]}) that the other "
            "sites share, so bounds per datum do not exist. Move it inside, or train it as a parameter."
        )
    dim, size = data_plate(common, lengths(args))
    whole = any((dim, size) not in every[name] for name in joint)
    return Frame(num_samples, -1 - nesting if num_samples > 1 else None, dim, size, whole)


def site_log_prob(site: Any, frame: Frame) -> Tensor:
    """Unscaled, masked log density of one site, (K, B), or (K, 1) for all data together."""
    value = site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"])
    value = scale_and_mask(value, mask=site["mask"])
    keep = {frame.particle_dim} if frame.joint else {frame.data_dim, frame.particle_dim}
    known = keep | set(plates(site))
    drop = []
    for dim in range(-value.dim(), 0):
        if dim not in known and value.shape[dim] != 1:
            wanted = (frame.num_samples, frame.data_size) if frame.particle_dim else (frame.data_size,)
            raise ValueError(
                f"site {site['name']!r} has batch_shape {tuple(value.shape)}, wanted {wanted}: dimension {dim} "
                "belongs to no plate. Did you forget .to_event(1)?"
            )
        if dim not in keep:
            drop.append(dim)
    value = value.sum(drop) if drop else value
    if frame.joint:
        value = value.unsqueeze(-1)
    if frame.particle_dim is None:
        value = value.unsqueeze(0)
    if _records_only(site):
        value = value.expand(frame.num_samples, frame.columns)
    if value.shape != (frame.num_samples, frame.columns):
        raise ValueError(
            f"site {site['name']!r} gives log densities of shape {tuple(value.shape)}, wanted "
            f"{(frame.num_samples, frame.columns)} (samples, data)."
        )
    return value


def common_scale(traces: list[Trace]) -> float:
    """The one scale of all sites."""
    found: list[tuple[str, float]] = []
    for site in sorted((s for t in traces for s in sample_sites(t)), key=lambda s: not s["is_observed"]):
        scale = site["scale"]
        if isinstance(scale, Tensor) and scale.numel() > 1:
            raise ValueError(
                f"site {site['name']!r} carries a scale of shape {tuple(scale.shape)}; only one constant common "
                "to all sites (subsampling) has a meaning per datum. Weight the data outside the bound."
            )
        found.append((site["name"], float(scale)))
    wanted = found[0][1]  # that of an observed site
    for name, value in found:
        if value != wanted:
            raise ValueError(
                f"site {name!r} carries the scale {value:g} and {found[0][0]!r} the scale {wanted:g}, so the result "
                "would not be a bound. For a tempered ELBO use Objective(elbo, beta=...) instead of poutine.scale."
            )
    return wanted


def mask_of(site: Any) -> Tensor | None:
    """What of a site's density counts, broadcastable to its value; None where all of it does.

    The handlers' masks and those of the distribution itself together, also those inside of an event.
    """
    found: list[tuple[Any, int]] = [(site["mask"], site["fn"].event_dim)]
    found += [(layer._mask, layer.event_dim) for layer in wrappers(site["fn"]) if isinstance(layer, MaskedDistribution)]
    whole: Tensor | None = None
    for mask, dims in found:
        if mask is None or mask is True:
            continue
        mask = torch.as_tensor(mask)
        mask = mask.reshape((*mask.shape, *[1] * dims))
        whole = mask if whole is None else whole & mask
    return None if whole is None or bool(whole.all()) else whole


def is_masked(site: Any) -> bool:
    """Whether a site has a mask of any kind, without a look at its values."""
    inner = any(isinstance(layer, MaskedDistribution) for layer in wrappers(site["fn"]))
    return inner or not (site["mask"] is None or site["mask"] is True)


def masked_apart(prior: Any, parts: Sequence[Any]) -> bool:
    """Whether the masks of a latent's prior and of the guide's sites that hold its density differ by value."""
    theirs = mask_of(prior)
    for site in parts:
        ours = mask_of(site)
        if ours is None and theirs is None:
            continue
        if ours is None or theirs is None:
            return True
        try:
            one, two = torch.broadcast_tensors(ours, theirs.to(ours.device))
        except RuntimeError:  # of events of other shapes, which are refused as such
            continue
        if not torch.equal(one, two):
            return True
    return False


def site_value(site: Any, frame: Frame) -> Tensor:
    """A site's value as (K, *plates, *event), without the filler dimensions of deeper plates."""
    value, event = site["value"], site["fn"].event_dim
    if frame.particle_dim is None:
        return value.unsqueeze(0)
    deepest = max((-dim for dim in plates(site)), default=0)
    shape = value.shape
    batch = shape[: len(shape) - event]
    return value.reshape((frame.num_samples, *batch[len(batch) - deepest :], *shape[len(shape) - event :]))
