"""What annealing returns: a bound, or bounds from both sides; and when they are none that one could use.

A bracket is one in expectation, whatever the chains did. Where they have not converged, what they give is rather the
tail of a few: a width with an error as large as itself. Then it is said that there is no bracket, and why, and how many
steps it would take, where two lengths of chains tell: the width falls as a power of T, which is taken on to one nat.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_vae.judging.hamiltonian import Kernels
from pyro_vae.judging.quotes import lower_bound
from pyro_vae.judging.results import Mean, Measured, Result, row

# Nats that a bracket may be uncertain by, and that log weights may differ by: a normal log weight of this spread is
# twelve nats too low on average. The share of moves that must be accepted.
_CLOSE = 1.0
_APART = 5.0
_MOVING = 0.1


@dataclass(frozen=True)
class Annealed(Measured):
    """A lower bound on log p(x) by annealed importance sampling, averaged over data, in nats.

    Attributes:
        value, mc_stderr, data_stderr: Of the mean over the data of log 1/C sum_c w_c, as in `Measured`.
        pointwise: log 1/C sum_c w_c per datum, (N,).
        num_samples: C.
        bias: Jackknife estimate of the bias of the value (negative: it is too low).
        pointwise_stderr: Its Monte Carlo standard error, (N,).
        log_weight: log w_c, (C, N).
        ess: Effective number of chains per datum, (sum w)^2 / sum w^2, (N,).
        acceptance: Mean probability of acceptance per datum, (N,); nan for T = 1.
        kernels: What the chains used, frozen before they ran, one for each batch.
        start: "guide" or "prior".
        num_steps: T.
    """

    bias: float
    pointwise_stderr: Tensor
    log_weight: Tensor
    ess: Tensor
    acceptance: Tensor
    kernels: tuple[Kernels, ...]
    start: str
    num_steps: int

    @property
    def reason(self) -> str | None:
        """Why the chains have not converged; None where nothing says so."""
        return unconverged(self.log_weight, self.acceptance)

    def __str__(self) -> str:
        if self.reason is not None:
            return f"log p(x) {lower_bound(self.value)} nats, and no better: {self.reason}, at {self.num_steps} steps"
        return (
            f"log p(x) >= {self.with_errors}, annealed from the {self.start} over {self.num_steps} steps, acceptance "
            f"{self.acceptance.mean():.2f}, chain ESS {self.ess.mean():.1f} of {self.num_samples}"
        )


@dataclass(frozen=True)
class Bracket(Result):
    """Bounds on log p(x) of simulated data from both sides, in nats.

    The Monte Carlo errors are given the simulated data (upper: and their one exact draw each); the `data_stderr` of the
    width is over the simulations, and covers everything.

    Attributes:
        lower: The forward chains' bound, with all that belongs to it.
        upper: The upper bound.
        width: Upper minus lower bound.
        backward_log_weight: log w_r of the chains from the exact draw, (C, N).
        backward_acceptance: (N,).
        data: The simulated arguments of the programs.
        wanted_steps: Where there is no bracket, about how many steps it would take; None where that is not known.
    """

    lower: Annealed
    upper: Mean
    width: Mean
    backward_log_weight: Tensor
    backward_acceptance: Tensor
    data: tuple[Any, ...]
    wanted_steps: int | None = None

    @property
    def reason(self) -> str | None:
        """Why there is no bracket; None where there is one."""
        for weight, acceptance in (
            (self.lower.log_weight, self.lower.acceptance), (self.backward_log_weight, self.backward_acceptance)
        ):  # fmt: skip
            if (found := unconverged(weight, acceptance)) is not None:
                return found
        width = self.width
        error = max(e for e in (width.mc_stderr, width.data_stderr, 0.0) if not math.isnan(e))
        if error > max(_CLOSE, abs(width.value) / 3):
            return f"its width, {width.value:.3g} nats, is known to {error:.3g} only: single chains decide"
        return None

    @property
    def missing(self) -> str:
        """That there is no bracket, why, and what it would take."""
        steps = self.lower.num_steps
        take = "how many it would take is not known" if self.wanted_steps is None else f"about {self.wanted_steps:,}"
        return f"no bracket: {self.reason}, at {steps:,} steps ({take})"

    def rows(self) -> list[dict[str, Any]]:
        parts = {"lower": self.lower, "upper": self.upper, "width": self.width}
        words = {} if self.reason is None else {"is": self.missing}
        return [{"bound": name} | {k: row(part)[k] for k in _NUMBERS} | words for name, part in parts.items()]

    def __str__(self) -> str:
        if self.reason is not None:
            return self.missing
        error = "(one datum)" if math.isnan(self.width.data_stderr) else f"± {self.width.data_stderr:.2f}"
        return f"[{self.lower.value:.2f}, {self.upper.value:.2f}] nats (width {self.width.value:.2f} {error})"

    def plot(self, ax: Any = None) -> Any:
        """The interval of each datum, as a figure."""
        from pyro_vae.plots import bracket

        return bracket(self.lower.pointwise, self.upper.pointwise, lower_stderr=self.lower.pointwise_stderr,
                       upper_stderr=self.upper.pointwise_stderr, ax=ax)  # fmt: skip


_NUMBERS = ("value", "mc_stderr", "data_stderr", "num_samples")


def unconverged(log_weight: Tensor, acceptance: Tensor) -> str | None:
    """Why chains have not converged, None where nothing says so.

    Args:
        log_weight: log w_c, (C, N).
        acceptance: Mean probability of acceptance per datum, (N,).
    """
    lost = int((~torch.isfinite(log_weight)).sum())
    if lost:
        return f"{lost} of {log_weight.numel()} chains have left the numbers"
    moved = acceptance.mean().item()
    if moved < _MOVING:
        return f"only {100 * moved:.0f} % of the moves were accepted"
    apart = 0.0 if len(log_weight) < 2 else log_weight.double().var(0).mean().sqrt().item()
    if apart > _APART:
        return f"the chains of a datum end {apart:.3g} nats apart (standard deviation of their log weights)"
    return None


def steps_wanted(short: Bracket, long: Bracket) -> int | None:
    """T at which the width would be a nat, by the power of T by which it fell between two lengths of chains.

    None where it did not fall, or more slowly than T^(-1/4): then two lengths say nothing of a third.
    """
    narrow, wide = abs(long.width.value), abs(short.width.value)
    first, second = short.lower.num_steps, long.lower.num_steps
    if not (math.isfinite(narrow) and math.isfinite(wide) and second > first and narrow > 0 and wide > 0):
        return None
    power = math.log(wide / narrow) / math.log(second / first)
    if power < 0.25:
        return None
    wanted = second * max(2.0, narrow / _CLOSE) ** (1 / power)
    if wanted > 10**7:
        return None
    unit = 10 ** (len(str(int(wanted))) - 1)
    return math.ceil(wanted / unit) * unit
