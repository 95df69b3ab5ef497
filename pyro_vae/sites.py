"""What one sample site of a Pyro trace says: its plates, its log density, its scale.

The conventions of Pyro that `traces` relies on are here: plates occupy batch
dimensions counted from the right, the particle plate lies left of all others,
masks apply to log densities, and scales are kept apart from them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from pyro.distributions import Delta
from pyro.distributions.util import scale_and_mask
from pyro.poutine.trace_struct import Trace
from torch import Tensor

PARTICLES = "_pyro_vae_particles"


class Frame(NamedTuple):
    """Where the samples and the data lie among the batch dimensions."""

    num_samples: int
    particle_dim: int | None  # None: one sample, no particle plate
    data_dim: int
    data_size: int




def sample_sites(trace: Trace) -> list[Any]:
    """Random sites and observations; not plates, nor ``pyro.deterministic``."""
    return [
        site
        for site in trace.nodes.values()
        if site["type"] == "sample"
        and type(site["fn"]).__name__ != "_Subsample"
        and not (site["infer"] or {}).get("_deterministic", False)
    ]


def plates(site: Any) -> dict[int, Any]:
    return {f.dim: f for f in site["cond_indep_stack"] if f.vectorized and f.name != PARTICLES}


def depth(trace: Trace) -> int:
    return max((-dim for site in sample_sites(trace) for dim in plates(site)), default=0)


def kind(fn: Any) -> str:
    wrappers = ("Independent", "ExpandedDistribution", "MaskedDistribution")
    while type(fn).__name__ in wrappers:
        fn = fn.base_dist
    return type(fn).__name__


def is_point(fn: Any) -> bool:
    while not isinstance(fn, Delta) and hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return isinstance(fn, Delta) and not bool((fn.log_density != 0).any())


def data_frame(traces: list[Trace], num_samples: int, nesting: int) -> Frame:
    """The outermost plate that all sites share."""
    stacks = {site["name"]: {(d, f.size) for d, f in plates(site).items()} for t in traces for site in sample_sites(t)}
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
    dim, size = min(common)
    return Frame(num_samples, -1 - nesting if num_samples > 1 else None, dim, size)


def site_log_prob(site: Any, frame: Frame) -> Tensor:
    """Unscaled, masked log density of one site, (K, B)."""
    value = site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"])
    value = scale_and_mask(value, mask=site["mask"])
    keep = {frame.data_dim, frame.particle_dim}
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
    if frame.particle_dim is None:
        value = value.unsqueeze(0)
    if value.shape != (frame.num_samples, frame.data_size):
        raise ValueError(
            f"site {site['name']!r} gives log densities of shape {tuple(value.shape)}, wanted "
            f"{(frame.num_samples, frame.data_size)} (samples, data)."
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


def site_value(site: Any, frame: Frame) -> Tensor:
    """A site's value as (K, *plates, *event), without the filler dimensions of deeper plates."""
    value, event = site["value"], site["fn"].event_dim
    if frame.particle_dim is None:
        return value.unsqueeze(0)
    deepest = max((-dim for dim in plates(site)), default=0)
    shape = value.shape
    batch = shape[: len(shape) - event]
    return value.reshape((frame.num_samples, *batch[len(batch) - deepest :], *shape[len(shape) - event :]))


