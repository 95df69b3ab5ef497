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
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_vae.inference.rehearsal import Rehearsal, rehearse
from pyro_vae.inference.supports import Rule, measured, not_finite, remedy, rules, scored, wanted
from pyro_vae.inference.trees import Path, at, leaves
from pyro_vae.refusals import wrong_site
from pyro_vae.traces import Program

_SCORED = (
    "site {!r} is Bernoulli but its data have grey values between 0 and 1, which have no Bernoulli density: the ELBO "
    "is not comparable with any published one."
)
# From here on a square may leave the floats, so that a row has no density: the pair is asked.
_FAR = 1e15


class _Look(NamedTuple):
    """One leaf of a batch, how to name a row, and how many suspected rows the pair is run on together."""

    batch: tuple[Any, ...]
    path: Path
    leaf: Tensor
    where: Callable[[int], str]
    at_once: int


class DataCheck:
    """Looks at batches, and refuses what the model cannot have drawn, by what one run of the pair on one batch showed.

    `masks` are positions of columns that are masks of the first, and `names` those of the columns of a table, by leaf.
    `tolerated` says whether values outside a support were seen that the pair leaves out, which Pyro's validation
    refuses.
    """

    def __init__(
        self, programs: Sequence[Program], shown: Rehearsal | None, batch: tuple[Any, ...],
        masks: frozenset[int] = frozenset(), names: Mapping[Path, Sequence[str]] | None = None,
    ) -> None:  # fmt: skip
        self.programs = programs
        self.rules = {} if shown is None or shown.error is not None else rules(shown, batch)
        self.masks, self.names = masks, names or {}
        self.tolerated = False
        has_rows = any(isinstance(leaf, Tensor) and leaf.dim() and len(leaf) for _, leaf in leaves(batch))
        self._ran = at(batch, slice(1)) if shown is not None and shown.error is None and has_rows else None
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
        """Look at one batch, as the programs will get it; `where` names a row, and `at_once` suspected rows are run
        together. A value outside its support, NaN or infinite is a ValueError, with its place and a remedy."""
        for path, leaf in leaves(batch):
            if isinstance(leaf, Tensor) and leaf.dim() and leaf.numel() and leaf.dtype != torch.bool:
                self._leaf(_Look(batch, path, leaf, where, at_once))

    def _leaf(self, look: _Look) -> None:
        batch, path, leaf, where, at_once = look
        rule = self.rules.get(path)
        floating = leaf.is_floating_point()
        low, high = (float(end) for end in torch.aminmax(leaf))
        if not floating:
            self._indices(look, (low, high))
            if rule is None:
                return
        if math.isfinite(low) and math.isfinite(high) and (rule is None or rule.within(low, high)):
            if rule is not None and path in self.binary:
                self._grey(look, rule)
            if floating and max(-low, high) > _FAR:
                self._far(look)
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
        suspects = _rows_with(bad).nonzero().flatten()
        # An upper bound may be made of the batch, such as the length of a document: then the pair has the last word.
        fixed = rule is not None and not rule.masked and getattr(rule.support, "upper_bound", None) is None
        fixed = fixed or (rule is not None and rule.support is constraints.unit_interval and not rule.masked)
        certain = bool(shown) or (rule is not None and fixed and bool(rule.outside(leaf)[suspects[0]].any()))
        if certain and not bool(leaf[suspects].isnan().any()):
            self._refuse(look, bad, int(suspects[0]), rule)
        for group in suspects.split(at_once):
            if not self._stands(batch, group):
                worst = next((int(i) for i in group if not self._stands(batch, i[None])), int(group[0]))
                self._refuse(look, bad, worst, rule)
        self.tolerated = True

    def _indices(self, look: _Look, ends: tuple[float, float]) -> None:
        """Whole numbers may be looked up in a table: the pair is run on the least and the largest so far."""
        batch, path, leaf, where, _ = look
        low, high = self._range.get(path, (math.inf, -math.inf))
        self._range[path] = min(low, ends[0]), max(high, ends[1])
        if self._ran is None:
            return
        for end, new in zip(ends, (ends[0] < low, ends[1] > high), strict=True):
            if not new:
                continue
            hit = leaf == end
            row = int(_rows_with(hit).nonzero()[0])
            error = rehearse(self.programs, at(batch, slice(row, row + 1))).error
            tables = isinstance(error, IndexError | RuntimeError) and not isinstance(error, torch.OutOfMemoryError)
            if tables and rehearse(self.programs, self._ran).error is None:
                raise ValueError(
                    f"{where(row)}{self._column(path, _spot(hit, row))} of the data is {int(end)}, on which the pair "
                    f"does not run ({' '.join(str(error).split())[:100]}); wanted whole numbers that it has a place "
                    "for, such as ids below the size of its embedding. Enlarge the table, or map other ids to one for "
                    "unknowns."
                ) from error

    def _far(self, look: _Look) -> None:
        """Refuse rows so far out that a density of the pair leaves the floats there."""
        batch, path, leaf, where, at_once = look
        far = leaf.abs() > _FAR
        suspects = _rows_with(far).nonzero().flatten()
        if len(suspects) == len(leaf):
            return  # no row among others: the first step says that the data are unscaled
        for group in suspects.split(at_once):
            row = next((int(i) for i in group if not rehearse(self.programs, at(batch, i[None])).finite()), None)
            if row is None:
                continue
            spot = _spot(far, row)
            reason = wrong_site(self.programs[::-1], at(batch, torch.tensor([row], device=leaf.device)), {})
            site = "a density of the pair" if reason is None else reason.split(")", 1)[0] + ")"
            raise ValueError(
                f"{where(row)}{self._column(path, spot)} of the data is {float(leaf[row][spot]):.6g}, "
                f"so large that {site} leaves the floats; wanted data near one in size. Standardise them, "
                "(x - x.mean(0)) / x.std(0), or drop the row."
            )

    def _made(self, sites: Mapping[str, Any], covered: Collection[str]) -> None:
        """What a program makes of the data before it observes it: of the first batch, without the row."""
        for site, rule, value, outside in measured({k: s for k, s in sites.items() if k not in covered}):
            wrong = outside & torch.isfinite(value)
            if bool(wrong.any()):
                first, low, high = (float(v) for v in (value[wrong][0], value.min(), value.max()))
                raise ValueError(
                    f"site {rule.site!r} ({rule.kind}) observes {first:.6g}, made of the data, which is outside its "
                    f"support; wanted {wanted(rule.support)}. {remedy(rule, first, low, high, value)}"
                )
            if rule.binary and bool(((value % 1 != 0) & scored(site, value)).any()):
                warnings.warn(f"{_SCORED.format(rule.site)} Binarise the data.", stacklevel=2)

    def _grey(self, look: _Look, rule: Rule) -> None:
        """Say once that values are scored which have no density."""
        batch, path, leaf, where, at_once = look
        grey = leaf % 1 != 0
        if not bool(grey.any()):
            return
        for group in _rows_with(grey).nonzero().flatten().split(at_once):
            # What a mask leaves out may be anything: a stand-in inside the support is no grey value.
            site = self._run(batch, group).sites.get(rule.site)
            among = torch.ones(len(group)) if site is None else (site["value"] % 1 != 0) & scored(site, site["value"])
            among = _rows_with(among)
            if not bool(among.any()):
                continue
            self.binary.discard(path)
            first = int(among.nonzero()[0])
            row = int(group[first]) if len(among) == len(group) else first if len(among) == len(leaf) else int(group[0])
            spot = _spot(grey, row)
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
        return shown.finite() and not any(bool(outside.any()) for *_, outside in measured(shown.sites))

    def _refuse(self, look: _Look, bad: Tensor, row: int, rule: Rule | None) -> None:
        leaf, spot = look.leaf, _spot(bad, row)
        value = float(leaf[row][spot] if spot else leaf[row])
        place = f"{look.where(row)}{self._column(look.path, spot)} of the data is {value:.6g}"
        finite = leaf[torch.isfinite(leaf)] if leaf.is_floating_point() else leaf
        low, high = (float(e) for e in torch.aminmax(finite)) if finite.numel() else (math.nan, math.nan)
        if rule is None or not math.isfinite(value):
            raise ValueError(f"{place}; wanted a finite number. {not_finite(value)}")
        raise ValueError(
            f"{place}, outside the support of the likelihood ({rule.kind}, site "
            f"{rule.site!r}); wanted {wanted(rule.support)}. {remedy(rule, value, low, high, finite)}"
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


def _rows_with(bad: Tensor) -> Tensor:
    """For each row whether anything in it is."""
    return bad.flatten(1).any(1) if bad.dim() > 1 else bad


def _spot(bad: Tensor, row: int) -> tuple[int, ...]:
    """The first place of a row that is."""
    return tuple(int(i) for i in bad[row].nonzero()[0]) if bad.dim() > 1 else ()
