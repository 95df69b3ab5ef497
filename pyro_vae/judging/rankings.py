"""Who is ahead, by how much, and whether that holds: fitted pairs compared datum by datum, and over seeds.

"A is ahead of B" is said where the p-value of `scoring` holds after Holm's correction over all pairs of arms, and where
B's number is not a mere lower bound.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from pyro_vae import plots
from pyro_vae.judging.quotes import aligned
from pyro_vae.judging.results import Result, known
from pyro_vae.judging.scoring import LEVEL, Scores, balanced, compared, holm
from pyro_vae.judging.weights import khat_ok

FEW_DATA, FEW_OK = 100, 0.9
CRITERIA = {"log_p": "log p(x)", "elbo": "ELBO"}


@dataclass(frozen=True)
class Difference:
    """By how much the first arm is above the second, in nats per datum.

    Attributes:
        first, second: The arms.
        value: The mean of the paired differences.
        diff_stderr: Its standard error over data and seeds.
        low, high: Its 95 % interval, by itself.
        p: Two-sided p-value of no difference.
        p_corrected: The same after Holm's correction over all pairs that were compared.
        num_seeds: Pairs of fits.
        claimable: Whether the sign can be claimed at all: the lower one of the two is no mere lower bound.
    """

    first: str
    second: str
    value: float
    diff_stderr: float
    low: float
    high: float
    p: float
    p_corrected: float
    num_seeds: int
    claimable: bool = True

    @property
    def holds(self) -> bool:
        """Whether the first (of a negative value: the second) is ahead beyond the noise of data and seeds."""
        return self.claimable and self.p_corrected < 1 - LEVEL

    @property
    def p_worse(self) -> float:
        """The probability, in the sense of the interval, that the second is worse than the first."""
        return 1 - self.p / 2 if self.value > 0 else self.p / 2

    def reversed(self) -> Difference:
        """The second above the first."""
        value, low, high = -self.value, -self.high, -self.low
        return replace(self, first=self.second, second=self.first, value=value, low=low, high=high)


@dataclass(frozen=True)
class Ranking(Result):
    """Arms side by side, best first.

    Attributes:
        arms: The scores of each arm, one for each seed, by name.
        differences: Of each pair of arms.
        criterion: What they are ranked by: "log_p", or "elbo" where all share one frozen model.
        failed: Arms or fits that are not there, with the reason.
        notes: What belongs to the comparison: its budget, its protocol.
    """

    arms: dict[str, tuple[Scores, ...]]
    differences: tuple[Difference, ...]
    criterion: str = "log_p"
    failed: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def order(self) -> list[str]:
        """The arms, best first."""
        return sorted(self.arms, key=lambda name: -self._mean(name, self.criterion))

    @property
    def best(self) -> str:
        """The arm of the highest mean."""
        return self.order[0]

    def difference(self, first: str, second: str) -> Difference:
        """By how much one arm is above another.

        Raises:
            ValueError: There is no such arm.
        """
        for name in (first, second):
            known("arm", name, self.arms)
        for each in self.differences:
            if (each.first, each.second) == (first, second):
                return each
            if (each.first, each.second) == (second, first):
                return each.reversed()
        raise ValueError(f"got {first!r} twice, wanted two arms.")

    @property
    def over(self) -> str:
        """What the intervals are over: other data and seeds, or, of one fit each, other data alone."""
        return "data and seeds" if len(self.arms[self.best]) > 1 else "data, one fit each"

    @property
    def verdict(self) -> str:
        """Who is ahead, by how much, and whether that holds, in a sentence."""
        if len(self.arms) == 1:
            return f"only {self.best} is there: nothing to compare it with."
        first, second, *_ = self.order
        ahead = self.difference(first, second)
        what = CRITERIA[self.criterion]
        by = f"{ahead.value:.3f} nats of {what} [{ahead.low:.3f}, {ahead.high:.3f}]"
        over = f"95 % over {len(self.arms[first][0].log_p):,} data"
        over += f" and {ahead.num_seeds} seeds" if ahead.num_seeds > 1 else ", one fit each"
        many = f" among {len(self.arms)} arms" if len(self.arms) > 2 else ""
        chance = f"p = {ahead.p_corrected:.2g}" + (" after the correction" if len(self.arms) > 2 else "")
        if ahead.holds:
            return f"{first} is ahead of {second} by {by}, {over}; this holds{many} ({chance})."
        why = "within the noise"
        if ahead.p < 1 - LEVEL <= ahead.p_corrected:
            why = f"not beyond what the best of {len(self.arms)} shows by chance"
        elif ahead.p_corrected < 1 - LEVEL:
            why = f"but {second} has only a lower bound, so that it may be higher"
        return f"nobody is ahead for sure: {first} is above {second} by {by}, {over}, {why} ({chance})."

    def flags(self, name: str) -> list[str]:
        """What a reader should know of an arm before its number is believed."""
        own, best = self.arms[name], name == self.best
        found = {
            "few data": len(own[0].log_p) < FEW_DATA,
            "one seed": len(own) == 1,
            "k̂ bad": self._khat_ok(name) < FEW_OK,
            "lower bound": self._bound(name),
            "difference within noise": not best and self.difference(self.best, name).p_corrected >= 1 - LEVEL,
            f"best of {len(self.arms)}": best and len(self.arms) > 2,
        }
        return [flag for flag, holds in found.items() if holds]

    def rows(self) -> list[dict[str, Any]]:
        """One for each arm, in the columns of ArviZ's ``compare``, those that failed last."""
        best, found = self.best, []
        for rank_, name in enumerate(self.order):
            own = self.arms[name]
            by = None if name == best else self.difference(best, name)
            value, error, low, high = (0.0,) * 4 if by is None else (by.value, by.diff_stderr, by.low, by.high)
            worse, corrected, holds = (None,) * 3 if by is None else (by.p_worse, by.p_corrected, by.holds)
            each = torch.stack([one.log_p.double() for one in own]).mean(0)
            found.append({
                "rank": rank_, "arm": name, "log_p": self._mean(name, "log_p"), "diff": value, "diff_stderr": error,
                "diff_low": low, "diff_high": high, "p_worse": worse, "p_corrected": corrected, "holds": holds,
                "mc_stderr": math.hypot(*(one.mc_stderr for one in own)) / len(own),
                "data_stderr": each.std().item() / math.sqrt(len(each)) if len(each) > 1 else math.nan,
                "khat_ok": self._khat_ok(name), "elbo": self._mean(name, "elbo"),
                "gap": self._mean(name, "log_p") - self._mean(name, "elbo"),
                "seconds": float(np.mean([one.seconds for one in own])), "parameters": own[0].parameters,
                "seeds": len(own), "flags": ", ".join(self.flags(name)),
            })  # fmt: skip
        head = list(found[0]) if found else ["rank", "arm", "flags"]
        for name, reason in self.failed.items():
            found.append(dict.fromkeys(head) | {"arm": name, "flags": f"failed: {reason}"})
        return found

    def to_markdown(self) -> str:
        """The table in Markdown, the verdict above it."""
        return self._repr_markdown_()

    def plot(self, ax: Any = None) -> Any:
        """How far each arm is behind the best, with its interval, as a figure, or drawn into `ax`."""
        return plots.differences(self.rows(), ax=ax)

    def __str__(self) -> str:
        return self.text()

    def text(self, width: float = math.inf) -> str:
        """The verdict, the table and the notes; of the table as many columns as lines of `width` characters hold."""
        foot = f"nats per datum; ±: Monte Carlo; [ , ]: 95 % over {self.over}"
        told = [f"  {name}: {', '.join(flags)}" for name in self.order if (flags := self.flags(name))]
        told += [f"  {name}: failed: {reason}" for name, reason in self.failed.items()]
        return "\n".join([self.verdict, "", *aligned(self._lines(), width=width), "", foot, *told, *self.notes])

    def _cells(self) -> tuple[list[str], list[list[str]]]:
        head, *body = self._lines()
        return head, body

    def _lines(self) -> list[list[str]]:
        elbo = self.criterion == "elbo"
        columns = ["arm", "ELBO" if elbo else "log p(x)", "behind the best", "p worse", "gap" if elbo else "ELBO",
                   "k̂ ok", "seconds", "parameters"]  # fmt: skip
        lines = [columns]
        for line in self.rows():
            if line["rank"] is None:
                lines.append([line["arm"], "failed", *[""] * (len(columns) - 2)])
                continue
            own = self.arms[line["arm"]]
            behind = f"{line['diff']:.3f} [{line['diff_low']:.3f}, {line['diff_high']:.3f}]"
            error = line["mc_stderr"]
            shown = f"{line['log_p']:.2f} ± {error:.2f}" if not error < 0.01 else f"{line['log_p']:.2f} ± {error:.1g}"
            if self._bound(line["arm"]):
                shown = f">= {math.floor(10 * line['log_p']) / 10:.1f}"
            if elbo:
                shown = f"{line['elbo']:.2f}"
            okay, seconds = line["khat_ok"], line["seconds"]
            lines.append([
                line["arm"] if len(own) == 1 else f"{line['arm']} (of {len(own)})", shown,
                "" if line["p_worse"] is None else behind,
                "" if line["p_worse"] is None else f"{line['p_worse']:.3f}",
                f"{line['gap']:.2f}" if elbo else f"{line['elbo']:.2f}",
                f"{100 * okay:.0f} %" if okay == okay else "-",
                f"{seconds:.0f}" if seconds == seconds else "-", f"{line['parameters']:,}",
            ])  # fmt: skip
        return lines

    def _mean(self, name: str, what: str) -> float:
        return float(np.mean([getattr(each, what).double().mean().item() for each in self.arms[name]]))

    def _bound(self, name: str) -> bool:
        return any(each.bound for each in self.arms[name])

    def _khat_ok(self, name: str) -> float:
        shares = (khat_ok(each.pareto_k, each.num_samples) for each in self.arms[name])
        known = [share for share in shares if share == share]
        return float(np.mean(known)) if known else math.nan


def rank(
    arms: Mapping[str, Scores | Sequence[Scores]], *, criterion: str = "log_p", failed: Mapping[str, str] | None = None,
    notes: Sequence[str] = (),
) -> Ranking:  # fmt: skip
    """Compare arms that were scored on the same data: paired by datum and by seed, with intervals over both.

    Args:
        arms: By name, the scores of a pair, or those of several fits of it from other seeds.
        criterion: "log_p", or "elbo" where one frozen model is common to all.
        failed: What could not be had, with the reason.
        notes: Lines that belong below the table.
    Returns:
        The ranking.
    Raises:
        ValueError: No arm, scores of other numbers of data or samples, fewer than two data, or not finite numbers.
    Example:
        >>> noise = torch.randn(500, generator=torch.Generator().manual_seed(0))
        >>> one = Scores(noise, 0.0, noise - 1, noise * 0, 100)
        >>> two = Scores(noise - 0.5 + 0.1 * noise.flip(0), 0.0, noise - 2, noise * 0, 100)
        >>> rank({"one": one, "two": two}).difference("one", "two").holds
        True
    """
    groups = {name: (own,) if isinstance(own, Scores) else tuple(own) for name, own in arms.items()}
    if not groups or not all(groups.values()):
        raise ValueError(f"got {len(groups)} arms, wanted at least one, with at least one fit each.")
    if criterion not in CRITERIA:
        raise ValueError(f"got criterion={criterion!r}, wanted one of {', '.join(map(repr, CRITERIA))}.")
    sizes = {(len(each.log_p), each.num_samples) for own in groups.values() for each in own}
    if len(sizes) > 1:
        raise ValueError(
            f"got scores of {' and '.join(f'{n} data with K = {k}' for n, k in sorted(sizes))}, wanted the same data "
            "and K for all: differences are paired by datum, and the bias of log p(x) depends on K."
        )
    for name, own in groups.items():
        given = torch.stack([getattr(each, criterion) for each in own])
        if given.shape[1] < 2 or not bool(given.isfinite().all()):
            lost = int((~given.isfinite()).any(0).sum())
            raise ValueError(
                f"got {name!r} with {given.shape[1]} data, of which {lost} have {CRITERIA[criterion]} that is not "
                "finite, wanted two data or more, and finite numbers: there is no mean to rank it by. Leave it out."
            )
    groups, left_out = balanced(groups)
    names = list(groups)
    pairs = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]
    values = {
        name: np.stack([getattr(each, criterion).double().numpy() for each in own]) for name, own in groups.items()
    }
    tables = [values[a] - values[b] for a, b in pairs]
    most = (len(groups) - 1) * (len(groups[names[0]]) - 1)
    found = compared(tables, most)
    corrected = holm(found["p"])
    differences = []
    for i, (a, b) in enumerate(pairs):
        value, half = float(found["mean"][i]), float(found["half"][i])
        lower = b if value > 0 else a
        sure = criterion == "elbo" or not any(each.bound for each in groups[lower])
        differences.append(
            Difference(a, b, value, float(found["stderr"][i]), value - half, value + half, float(found["p"][i]),
                       float(corrected[i]), len(tables[i]), sure)
        )  # fmt: skip
    return Ranking(groups, tuple(differences), criterion, dict(failed or {}), (*notes, *left_out))
