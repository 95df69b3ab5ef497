"""Whether data can have been drawn from the model: every row, before it enters a number.

A Bernoulli scores 255 as it scores 1, and the "bound" that comes of it is above zero and means nothing. So each batch
is compared with the support of the site that observes it, and looked through for NaN and infinities. What looks wrong
is only suspected: a model may mask it, or replace it. Where the site itself does not say (a mask, a value that is not
the column), the pair is run on the suspected rows, and its own densities decide.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pyro.distributions import MaskedDistribution
from torch import Tensor
from torch.distributions import Bernoulli, constraints

from pyro_vae.inference.rehearsal import Rehearsal, lenient, rehearse
from pyro_vae.inference.trees import Path, at, leaves
from pyro_vae.refusals import wrong_site
from pyro_vae.sites import kind, plates, unwrapped, wrappers
from pyro_vae.traces import Program

_SCORED = (
    "site {!r} is Bernoulli but its data have grey values between 0 and 1, which have no Bernoulli density: the ELBO "
    "is not comparable with any published one."
)
# From here on a square may leave the floats, so that a row has no density: the pair is asked.
_FAR = 1e15


@dataclass(frozen=True)
class Rule:
    """What one column must be, since a site observes it.

    Attributes:
        site: Name of the site.
        kind: Its distribution.
        support: Where that has a density.
        masked: Whether the site leaves some of it out.
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
        support, depth = self.support, 0
        try:
            ok = support.check(value)
        except Exception:  # noqa: BLE001 - a support for other shapes says nothing of this value
            return torch.zeros_like(value, dtype=torch.bool)
        while ok.dim() + depth < value.dim():
            depth += 1
        return ~ok.reshape(*ok.shape, *[1] * depth).expand_as(value)

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
        masked = any(isinstance(layer, MaskedDistribution) for layer in wrappers(site["fn"]))
        masked = masked or (site["mask"] is not None and site["mask"] is not True)
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
    if not any(varying):
        wide = any(isinstance(b, Tensor) and b.numel() > 1 for b in bounds)
        return _between(support, bounds) if wide else support
    return _between(support, [None if v else b for v, b in zip(varying, bounds, strict=True)])


def _between(support: Any, bounds: Sequence[Any]) -> Any:
    """Those bounds of a support that all data share."""
    lower, upper = (_number(b) for b in bounds)
    if support.is_discrete:
        return constraints.integer_interval(-math.inf if lower is None else lower, math.inf if upper is None else upper)
    if lower is None and upper is None:
        return constraints.real
    return constraints.interval(-math.inf if lower is None else lower, math.inf if upper is None else upper)


def _number(bound: Any) -> float | None:
    if bound is None:
        return None
    return float(bound.flatten()[0]) if isinstance(bound, Tensor) else float(bound)


class DataCheck:
    """Looks at batches, and refuses what the model cannot have drawn.

    Args:
        programs: The pair.
        shown: What one run of it showed.
        batch: The batch of that run.
        masks: Positions of columns that are masks of the first.
        names: Names of the columns of a table, by leaf.
    Attributes:
        tolerated: Whether values outside a support were seen that the pair leaves out, which Pyro's validation refuses.
    """

    def __init__(
        self, programs: Sequence[Program], shown: Rehearsal | None, batch: tuple[Any, ...],
        masks: frozenset[int] = frozenset(), names: Mapping[Path, Sequence[str]] | None = None,
    ) -> None:  # fmt: skip
        self.programs = programs
        self.rules = {} if shown is None or shown.error is not None else rules(shown, batch)
        self.masks, self.names = masks, names or {}
        self.tolerated = False
        self._ran = None if shown is None or shown.error is not None or not _has_rows(batch) else at(batch, slice(1))
        self._range: dict[Path, tuple[float, float]] = {}  # of whole numbers that the pair has run on
        for path, leaf in leaves(batch) if self._ran is not None else ():
            if isinstance(leaf, Tensor) and leaf.numel() and leaf.dtype != torch.bool and not leaf.is_floating_point():
                low, high = torch.aminmax(leaf)
                self._range[path] = float(low), float(high)
        self.binary = {path for path, rule in self.rules.items() if rule.binary}  # so far
        if shown is not None and shown.error is None:
            covered = {rule.site for rule in self.rules.values()}
            self._made({name: site for name, site in shown.sites.items() if site["is_observed"]}, covered)

    def __call__(self, batch: tuple[Any, ...], where: Callable[[int], str], at_once: int = 128) -> None:
        """Look at one batch.

        Args:
            batch: As the programs will get it.
            where: How to name a row.
            at_once: Suspected rows that the pair is run on together.
        Raises:
            ValueError: A value outside its support, NaN or infinite, with row, column, value and remedy.
        """
        for path, leaf in leaves(batch):
            if isinstance(leaf, Tensor) and leaf.dim() and leaf.numel() and leaf.dtype != torch.bool:
                self._leaf(batch, path, leaf, where, at_once)

    def _leaf(
        self, batch: tuple[Any, ...], path: Path, leaf: Tensor, where: Callable[[int], str], at_once: int
    ) -> None:
        rule = self.rules.get(path)
        floating = leaf.is_floating_point()
        low, high = (float(end) for end in torch.aminmax(leaf))
        if not floating:
            self._indices(batch, path, leaf, (low, high), where)
            if rule is None:
                return
        if math.isfinite(low) and math.isfinite(high) and (rule is None or rule.within(low, high)):
            if rule is not None and path in self.binary:
                self._grey(batch, path, leaf, rule, where, at_once)
            if floating and max(-low, high) > _FAR:
                self._far(batch, path, leaf, where, at_once)
            return
        bad = ~torch.isfinite(leaf) if floating else torch.zeros_like(leaf, dtype=torch.bool)
        if rule is not None:
            bad |= rule.outside(leaf)
        shown = [batch[i] for i in self.masks if i < len(batch) and path == (0,)]
        for mask in shown:
            if isinstance(mask, Tensor) and mask.dtype == torch.bool:
                self.tolerated |= bool((bad & ~mask).any())
                bad &= mask.expand_as(leaf)
        if not bool(bad.any()):
            return
        suspects = bad.flatten(1).any(1).nonzero().flatten() if bad.dim() > 1 else bad.nonzero().flatten()
        # An upper bound may be made of the batch, such as the length of a document: then the pair has the last word.
        fixed = rule is not None and not rule.masked and getattr(rule.support, "upper_bound", None) is None
        fixed = fixed or (rule is not None and rule.support is constraints.unit_interval and not rule.masked)
        certain = bool(shown) or (rule is not None and fixed and bool(rule.outside(leaf)[suspects[0]].any()))
        if certain and not bool(leaf[suspects].isnan().any()):
            self._refuse(leaf, bad, int(suspects[0]), path, rule, where)
        for group in suspects.split(at_once):
            if not self._stands(batch, group):
                worst = next((int(i) for i in group if not self._stands(batch, i[None])), int(group[0]))
                self._refuse(leaf, bad, worst, path, rule, where)
        self.tolerated = True

    def _indices(
        self, batch: tuple[Any, ...], path: Path, leaf: Tensor, ends: tuple[float, float], where: Callable[[int], str]
    ) -> None:
        """Whole numbers may be looked up in a table: the pair is run on the least and the largest so far."""
        low, high = self._range.get(path, (math.inf, -math.inf))
        self._range[path] = min(low, ends[0]), max(high, ends[1])
        if self._ran is None:
            return
        for end, new in zip(ends, (ends[0] < low, ends[1] > high), strict=True):
            if not new:
                continue
            hit = leaf == end
            row = int((hit.flatten(1).any(1) if hit.dim() > 1 else hit).nonzero()[0])
            error = rehearse(self.programs, at(batch, slice(row, row + 1))).error
            tables = isinstance(error, IndexError | RuntimeError) and not isinstance(error, torch.OutOfMemoryError)
            if tables and rehearse(self.programs, self._ran).error is None:
                spot = tuple(int(i) for i in hit[row].nonzero()[0]) if hit.dim() > 1 else ()
                raise ValueError(
                    f"{where(row)}{self._column(path, spot)} of the data is {int(end)}, on which the pair does not run "
                    f"({' '.join(str(error).split())[:100]}); wanted whole numbers that it has a place for, such as "
                    "ids below the size of its embedding. Enlarge the table, or map other ids to one for unknowns."
                ) from error

    def _far(
        self, batch: tuple[Any, ...], path: Path, leaf: Tensor, where: Callable[[int], str], at_once: int
    ) -> None:
        """Refuse rows so far out that a density of the pair leaves the floats there."""
        far = leaf.abs() > _FAR
        suspects = far.flatten(1).any(1).nonzero().flatten() if far.dim() > 1 else far.nonzero().flatten()
        if len(suspects) == len(leaf):
            return  # no row among others: the first step says that the data are unscaled
        for group in suspects.split(at_once):
            row = next((int(i) for i in group if self._loses(at(batch, i[None]))), None)
            if row is None:
                continue
            spot: tuple[int, ...] = tuple(int(i) for i in far[row].nonzero()[0]) if far.dim() > 1 else ()
            said = wrong_site(self.programs[::-1], at(batch, torch.tensor([row], device=leaf.device)), {})
            site = "a density of the pair" if said is None else said.split(")", 1)[0] + ")"
            raise ValueError(
                f"{where(row)}{self._column(path, spot)} of the data is {float(leaf[row][spot]):.6g}, "
                f"so large that {site} leaves the floats; wanted data near one in size. Standardise them, "
                "(x - x.mean(0)) / x.std(0), or drop the row."
            )

    def _loses(self, batch: tuple[Any, ...]) -> bool:
        return not rehearse(self.programs, batch).finite()

    def _made(self, sites: Mapping[str, Any], covered: Collection[str]) -> None:
        """What a program makes of the data before it observes it: of the first batch, without the row."""
        for name, site in sites.items():
            fn = unwrapped(site["fn"])
            support = _support(fn) if name not in covered and isinstance(site["value"], Tensor) else None
            if support is None or not site["value"].numel():
                continue
            value, rule = site["value"], Rule(name, kind(fn), support, True)
            wrong = rule.outside(value) & scored(site, value) & torch.isfinite(value)
            if bool(wrong.any()):
                first, low, high = (float(v) for v in (value[wrong][0], value.min(), value.max()))
                raise ValueError(
                    f"site {name!r} ({rule.kind}) observes {first:.6g}, made of the data, which is outside its "
                    f"support; wanted {_wanted(support)}. {_remedy(rule, first, low, high, value)}"
                )
            if rule.binary and bool(((value % 1 != 0) & scored(site, value)).any()):
                warnings.warn(f"{_SCORED.format(name)} Binarise the data.", stacklevel=2)

    def _grey(
        self, batch: tuple[Any, ...], path: Path, leaf: Tensor, rule: Rule, where: Callable[[int], str], at_once: int
    ) -> None:
        """Say once that values are scored which have no density."""
        grey = leaf % 1 != 0
        if not bool(grey.any()):
            return
        for group in (grey.flatten(1).any(1) if grey.dim() > 1 else grey).nonzero().flatten().split(at_once):
            # What a mask leaves out may be anything: a stand-in inside the support is no grey value.
            site = self._run(batch, group).sites.get(rule.site)
            among = torch.ones(len(group)) if site is None else (site["value"] % 1 != 0) & scored(site, site["value"])
            among = among.flatten(1).any(1) if among.dim() > 1 else among
            if not bool(among.any()):
                continue
            self.binary.discard(path)
            first = int(among.nonzero()[0])
            row = int(group[first]) if len(among) == len(group) else first if len(among) == len(leaf) else int(group[0])
            spot: tuple[int, ...] = tuple(int(i) for i in grey[row].nonzero()[0]) if grey.dim() > 1 else ()
            warnings.warn(
                f"{_SCORED.format(rule.site)} Binarise the data ({where(row)}{self._column(path, spot)} of the data is "
                f"{float(leaf[row][spot] if spot else leaf[row]):.4g}).",
                stacklevel=2,
            )
            return

    def _run(self, batch: tuple[Any, ...], index: Tensor) -> Rehearsal:
        """The pair on some rows; on all of the batch, where it has been written for so many."""
        shown = rehearse(self.programs, at(batch, index))
        return shown if shown.error is None else rehearse(self.programs, batch)

    def _stands(self, batch: tuple[Any, ...], index: Tensor) -> bool:
        """Whether the pair itself has finite densities of some rows, inside its supports wherever it scores them."""
        shown = self._run(batch, index)
        if not shown.finite():
            return False
        for site in shown.sites.values():
            fn = unwrapped(site["fn"])
            support = _support(fn) if site["is_observed"] and isinstance(site["value"], Tensor) else None
            if support is None or not site["value"].numel():
                continue
            value = site["value"]
            outside = Rule(site["name"], kind(fn), support, True).outside(value) | ~torch.isfinite(value)
            if bool((outside & scored(site, value)).any()):
                return False
        return True

    def _refuse(
        self, leaf: Tensor, bad: Tensor, row: int, path: Path, rule: Rule | None, where: Callable[[int], str]
    ) -> None:
        spot: tuple[int, ...] = tuple(int(i) for i in bad[row].nonzero()[0]) if bad.dim() > 1 else ()
        value = float(leaf[row][spot] if spot else leaf[row])
        column = self._column(path, spot)
        finite = leaf[torch.isfinite(leaf)] if leaf.is_floating_point() else leaf
        low, high = (float(e) for e in torch.aminmax(finite)) if finite.numel() else (math.nan, math.nan)
        shown = f"{value:.6g}"
        if rule is None or not math.isfinite(value):
            place = f"{where(row)}{column}"
            raise ValueError(f"{place} of the data is {shown}; wanted a finite number. {_not_finite(value)}")
        raise ValueError(
            f"{where(row)}{column} of the data is {shown}, outside the support of the likelihood ({rule.kind}, site "
            f"{rule.site!r}); wanted {_wanted(rule.support)}. {_remedy(rule, value, low, high, finite)}"
        )

    def _column(self, path: Path, spot: tuple[int, ...]) -> str:
        named = "".join(f", field {key!r}" for key in path if isinstance(key, str))
        named += f", argument {path[0]}" if path and path[0] not in (0,) and isinstance(path[0], int) else ""
        if not spot:
            return named
        names = self.names.get(path)
        if names is not None and len(spot) == 1:
            return f"{named}, column {names[spot[0]]!r}"
        return f"{named}, column {spot[0] if len(spot) == 1 else spot}"


def _has_rows(batch: tuple[Any, ...]) -> bool:
    return any(isinstance(leaf, Tensor) and leaf.dim() and len(leaf) for _, leaf in leaves(batch))


def scored(site: Any, value: Tensor) -> Tensor:
    """Where a site's value counts, of the value's shape."""
    counts = torch.ones_like(value, dtype=torch.bool)
    fn, event = site["fn"], 0
    masks = [site["mask"]] if isinstance(site["mask"], Tensor) else []
    depths = [site["fn"].event_dim for _ in masks]
    for layer in wrappers(fn):
        if isinstance(layer, MaskedDistribution) and isinstance(layer._mask, Tensor):
            masks.append(layer._mask)
            depths.append(layer.event_dim)
    for mask, event in zip(masks, depths, strict=True):
        counts = counts & mask.reshape(*mask.shape, *[1] * event)
    return counts


def _wanted(support: Any) -> str:
    if support is constraints.boolean:
        return "0 or 1"
    return "[0, 1]" if support is constraints.unit_interval else str(support)


def _not_finite(value: float) -> str:
    if math.isnan(value):
        return (
            "If NaN stands for a missing value, pass (x, mask) with mask = ~x.isnan() to a pair that takes a mask (a "
            "VAE does), or drop or impute it."
        )
    return "Clip or drop it, or, where a number was too large for the model's floats, scale the data or take float64."


def _remedy(rule: Rule, value: float, low: float, high: float, finite: Tensor) -> str:
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
