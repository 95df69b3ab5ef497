"""What the sites of a pair allow of their data: supports, what a mask leaves out, and what to do about the rest."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pyro.distributions import Delta
from torch import Tensor
from torch.distributions import Bernoulli, constraints

from pyro_vae.inference.rehearsal import Rehearsal, lenient
from pyro_vae.inference.trees import Path, leaves
from pyro_vae.randomness import forked
from pyro_vae.sites import is_masked, kind, mask_of, plates, unwrapped


@dataclass(frozen=True)
class Rule:
    """What one column must be, since a site of this kind observes it: its support, if the site leaves none of it out
    (`masked`).
    """

    site: str
    kind: str
    support: Any
    masked: bool

    @property
    def binary(self) -> bool:
        """Whether it is a Bernoulli that scores grey values, which have no density."""
        return self.kind in ("Bernoulli", "BernoulliLogits") and self.support is constraints.unit_interval

    def outside(self, value: Tensor) -> Tensor:
        """Where a value lies outside, of its shape; of vectors whole ones."""
        try:
            ok = self.support.check(value)
        except Exception:  # noqa: BLE001 - a support for other shapes says nothing of this value
            return torch.zeros_like(value, dtype=torch.bool)
        return ~ok.reshape((*ok.shape, *[1] * (value.dim() - ok.dim()))).expand_as(value)

    def within(self, low: float, high: float) -> bool:
        """Whether all between two numbers is inside, as far as can be told from them."""
        support = self.support
        if support is constraints.real or support is constraints.real_vector:
            return True
        if isinstance(support, type(constraints.unit_interval)):
            return low >= float(support.lower_bound) and high <= float(support.upper_bound)
        if isinstance(support, type(constraints.positive)):
            return low > float(support.lower_bound)
        return False  # as far as can be told: all values are compared


def rules(shown: Rehearsal, batch: tuple[Any, ...]) -> dict[Path, Rule]:
    """Which leaves of a batch are observed, and what their sites allow.

    A leaf is a site's value where it is that tensor, or the only one that equals it up to shape.
    """
    found: dict[Path, Rule] = {}
    tensors = [(path, leaf) for path, leaf in leaves(batch) if isinstance(leaf, Tensor) and leaf.dim()]
    for name, site in shown.sites.items():
        value = site["value"]
        if not site["is_observed"] or not isinstance(value, Tensor) or not value.numel():
            continue
        same = [path for path, leaf in tensors if leaf is value]
        fn = unwrapped(site["fn"])
        masked = is_masked(site)
        if not same:
            # What a mask leaves out may have been replaced, and a constant equals much.
            shares = {path: _share(leaf, value) for path, leaf in tensors if leaf.dtype != torch.bool}
            least = max([*shares.values(), 0.25]) if masked else 1.0
            same = [path for path, share in shares.items() if share >= least]
        event = tuple(site["fn"].event_shape)
        if same and event and value.dim() < len(event) + max((-dim for dim in plates(site)), default=0):
            # Broadcast over the plate, one datum would be scored as so many data.
            raise ValueError(
                f"site {name!r} observes data of shape {tuple(value.shape)}, and one datum has the shape {event}; "
                f"wanted (number of data, {', '.join(map(str, event))}). For a single datum pass x[None]."
            )
        support = _support(fn)
        if len(same) == 1 and support is not None:
            leaf = dict(tensors)[same[0]]
            exact = leaf is value or leaf.shape == value.shape
            if exact or not support.event_dim:
                found[same[0]] = Rule(name, kind(fn), support, masked)
    return found


def _share(leaf: Tensor, value: Tensor) -> float:
    """The share of a site's value that is a leaf's."""
    if leaf.numel() != value.numel() or leaf.device != value.device:
        return 0.0
    leaf, value = leaf.flatten(), value.flatten()
    return float(((leaf == value) | (leaf.isnan() & value.isnan())).double().mean())


def _support(fn: Any) -> Any:
    """The support of an element, as far as it is the same for all data."""
    if isinstance(fn, Bernoulli) and lenient(fn):
        return constraints.unit_interval  # grey values are scored, with a warning
    try:
        support = fn.support
    except (NotImplementedError, AttributeError):
        return None
    while isinstance(support, constraints.independent | constraints.MixtureSameFamilyConstraint):
        support = support.base_constraint
    if support is None or type(support).__name__.strip("_").lower() in ("dependent", "dependentproperty"):
        return None
    bounds = [getattr(support, name, None) for name in ("lower_bound", "upper_bound")]
    varying = [isinstance(b, Tensor) and b.numel() > 1 and bool((b != b.flatten()[0]).any()) for b in bounds]
    if not any(isinstance(bound, Tensor) and bound.numel() > 1 for bound in bounds):
        return support
    # Those bounds that all data share.
    shared = [None if v else _number(b) for v, b in zip(varying, bounds, strict=True)]
    lower, upper = (end if b is None else b for b, end in zip(shared, (-math.inf, math.inf), strict=True))
    if support.is_discrete:
        return constraints.integer_interval(lower, upper)
    return constraints.real if shared == [None, None] else constraints.interval(lower, upper)


def _number(bound: Any) -> float | None:
    if bound is None:
        return None
    return float(bound.flatten()[0]) if isinstance(bound, Tensor) else float(bound)


def measured(sites: Mapping[str, Any]) -> Iterator[tuple[Any, Rule, Tensor, Tensor]]:
    """Sites that observe numbers: the site, its rule, its value, and where that is outside and counts."""
    for name, site in sites.items():
        value, fn = site["value"], unwrapped(site["fn"])
        support = _support(fn) if site["is_observed"] and isinstance(value, Tensor) and value.numel() else None
        if support is not None:
            rule = Rule(name, kind(fn), support, True)
            yield site, rule, value, (rule.outside(value) | ~torch.isfinite(value)) & scored(site, value)


def scored(site: Any, value: Tensor) -> Tensor:
    """Where a site's value counts, of the value's shape."""
    mask = mask_of(site)
    return torch.ones_like(value, dtype=torch.bool) & (True if mask is None else mask)


def wanted(support: Any) -> str:
    """A support in words."""
    if support is constraints.boolean:
        return "0 or 1"
    return "[0, 1]" if support is constraints.unit_interval else str(support)


def not_finite(value: float) -> str:
    """What to do about NaN or an infinity."""
    if math.isnan(value):
        return (
            "If NaN stands for a missing value, pass (x, mask) with mask = ~x.isnan() to a pair that takes a mask (a "
            "VAE does), or drop or impute it."
        )
    return "Clip or drop it, or, where a number was too large for the model's floats, scale the data or take float64."


def remedy(rule: Rule, value: float, low: float, high: float, finite: Tensor) -> str:
    """What to do about a value outside, of data that lie between two numbers."""
    another = "Or take another likelihood, such as normal."
    missing = "If it stands for a missing value, pass a mask beside the data."
    support = rule.support
    counts = "count" in str(support).lower() or support.is_discrete and getattr(support, "lower_bound", None) == 0
    levels = getattr(support, "levels", None)
    top = getattr(support, "upper_bound", None)
    binary = support is constraints.boolean
    grey = levels is not None or binary or (not support.is_discrete and _number(top) == 1)
    if binary and 0 < value < 1:
        return (
            f"Binarize grey values (pyro_vae.data.binarize, or x > 0.5), which have no Bernoulli density; with "
            f"validate_args=False the distribution scores them by the same formula all the same. {missing} {another}"
        )
    if grey:
        if value < 0:
            scaled = " Images normalised to [-1, 1] are brought back by (x + 1) / 2." if -1 <= low and high <= 1 else ""
            return f"The data here lie in [{low:.4g}, {high:.4g}].{scaled} {missing} {another}"
        scale = 255 if high > 16 and high <= 255 else high
        if value > 1:
            return (
                f"The data here lie in [{low:.4g}, {high:.4g}]: divide them by {scale:.6g} (x / {scale:.6g})"
                f"{', then binarize grey values' if rule.binary or binary else ''}. {another}"
            )
        return f"Pass the grey levels v / 255 as they are, without dequantisation. {another}"
    if counts:
        if value < 0:
            return f"{missing} {another}"
        if high <= 1 and bool(((255 * finite - (255 * finite).round()).abs() < 0.01).all()):
            return (
                "All are v / 255 of whole v, as 8-bit images are given: to count the v, as the command does, build the "
                "likelihood with levels=256: VAE.build(..., likelihood_options={'levels': 256})."
            )
        return "Pass raw counts, neither normalised nor log-transformed, or take another likelihood, such as normal."
    return f"{missing} Or rescale the data, or take another likelihood."


def look_at_supports(shown: Rehearsal) -> None:
    """Refuse a guide that draws where the prior has no mass; warn of one that cannot draw where the prior has some."""
    for name, site in shown.latents.items():
        prior = shown.sites.get(name)
        if prior is None or prior["is_observed"] or site["is_observed"] or isinstance(unwrapped(site["fn"]), Delta):
            continue
        q, p = site["fn"], prior["fn"]
        try:
            with forked(), torch.no_grad():
                inside = bool(p.support.check(site["value"]).all()) or not bool(torch.isfinite(site["value"]).all())
                reaches = bool(q.support.check(p.sample((64,))).all())
        except Exception:  # noqa: BLE001 - a support that is not said is not compared
            continue
        if not inside:
            raise ValueError(
                f"guide site {name!r} ({kind(q)}) draws values outside of the support of the prior ({kind(p)}), where "
                "log p(z) is not defined. Give both the same support."
            )
        if not reaches:
            warnings.warn(
                f"guide site {name!r} ({kind(q)}) cannot draw all that the prior ({kind(p)}) can: what lies outside of "
                "its support is missing from log p(x), and neither errors nor k-hat see that. Read it as a lower "
                "bound, or give both the same support.",
                stacklevel=4,
            )
