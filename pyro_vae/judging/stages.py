"""What each stage of a judgement found, as typed results: numbers with their errors, a status, and a reason.

A stage is "done", "left out" (no time, or no need) or "not possible" (the pair does not allow it, or broke). Numbers
that are not known are nan, which no comparison takes for large. Tensors serve the figures; they are not in the JSON.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from torch import Tensor

from pyro_vae.judging._calibration import Calibration
from pyro_vae.judging.evidence import Bracket
from pyro_vae.judging.quotes import over_data
from pyro_vae.judging.results import Nats
from pyro_vae.judging.trials import Remedy, Stage, Training, tensor

Comparison = Literal["larger K", "best q", "jackknife"]


@dataclass(frozen=True, eq=False, kw_only=True)
class Bounds(Stage):
    """The ELBO and the estimate of log p(x) that is judged, beside a better one.

    Attributes:
        num_samples, num_samples_asked: K of the estimate that is judged, and what was asked for.
        elbo, reconstruction, kl: The ELBO and its two terms.
        log_p, bias, khat_ok: The estimate at K, its bias by the jackknife, and the share of the data of good k-hat.
        better, better_bias, better_khat_ok: The same at `better_samples`: as many as there was time for, K at least.
        curve, curve_mc_stderr: The estimate and its errors at `curve_samples`, K' = 1, 2, 5, ..., `better_samples`.
        missing: What the estimate at K lacks.
        compared_with: What that was measured against (see `comparison`).
        enough: The smallest K' that lacks no more than `RELEVANT`, where k-hat allows an answer.
        pareto_k, pointwise: k-hat and the better estimate per datum.
        data: The data.
    """

    title = "ELBO and log p(x)"
    share = 0.25

    num_samples: int = 0
    num_samples_asked: int = 0
    elbo: Nats = Nats()
    reconstruction: float = math.nan
    kl: float = math.nan
    log_p: Nats = Nats()
    bias: float = math.nan
    khat_ok: float = math.nan
    better: Nats = Nats()
    better_samples: int = 0
    better_bias: float = math.nan
    better_khat_ok: float = math.nan
    curve_samples: tuple[int, ...] = ()
    curve: tuple[float, ...] = ()
    curve_mc_stderr: tuple[float, ...] = ()
    missing: Nats = Nats()
    compared_with: Comparison = "larger K"
    enough: int | None = None
    pareto_k: Tensor | None = tensor()
    pointwise: Tensor | None = tensor()
    data: Any = tensor()

    @property
    def comparison(self) -> str:
        """What the estimate was compared with, in words."""
        words = {"best q": "one that uses the best q of each datum too", "jackknife": "its limit, by the jackknife"}
        return words.get(self.compared_with, f"that at K = {self.better_samples}")

    def summary(self) -> str:
        short = self.num_samples != self.num_samples_asked
        less = f" (asked for {self.num_samples_asked}, which did not fit)" if short else ""
        beside = f", beside K = {self.better_samples}" if self.better_samples != self.num_samples else ""
        return (
            f"ELBO {self.elbo} = {self.reconstruction:.2f} - KL {self.kl:.2f}; log p(x) {self.log_p} "
            f"({over_data(self.log_p.data_stderr)}) nats; {self.num_data} data, K = {self.num_samples}{less}{beside}"
        )


@dataclass(frozen=True, eq=False, kw_only=True)
class Latents(Stage):
    """What the latents are used for.

    Attributes:
        variance: Of the posterior mean over the data, by component; nan for one datum.
        threshold: A component whose variance is no more does not move with the data.
        rate: KL(q(z | x) || p(z)), over all latents.
        kl: By component, or by site where its components are not independent.
        kl_data_stderr: Its errors for the population, in the same order.
    """

    title = "use of the latents"
    share = 0.05

    variance: dict[str, float] = field(default_factory=dict)
    threshold: float = 0.01
    rate: float = math.nan
    kl: dict[str, float] = field(default_factory=dict)
    kl_data_stderr: tuple[float, ...] = ()

    @property
    def latent_dim(self) -> int:
        """How many components there are."""
        return len(self.variance)

    @property
    def unused(self) -> tuple[str, ...]:
        """The components that do not move with the data."""
        return tuple(name for name, value in self.variance.items() if value <= self.threshold)

    @property
    def active(self) -> int | None:
        """How many move with the data; None for one datum, which cannot say."""
        if any(math.isnan(value) for value in self.variance.values()):
            return None
        return self.latent_dim - len(self.unused)

    @property
    def none_active(self) -> bool:
        """Whether no latent moves with the data."""
        return self.latent_dim > 0 and self.active == 0

    def summary(self) -> str:
        if self.active is None:
            return f"rate {self.rate:.2f} nats; of one datum, which cannot say what moves with the data"
        return f"{self.active} of {self.latent_dim} active, rate {self.rate:.2f} nats; {self.num_data} data"


@dataclass(frozen=True, eq=False, kw_only=True)
class GapSplit(Stage):
    """What the guide loses, split into the family's and the encoder's part.

    Attributes:
        num_samples: K of the bounds.
        inference: log p(x) - ELBO.
        approximation, amortization: The family's part, not known where the guide has no local form; the encoder's.
        unsplit: Why there are no parts.
        log_p, source, bias, khat_ok: log p(x), where it is from, its bias, and the share of the data of good k-hat.
        remaining: What the search for the best members may still have risen by.
        stopped: Share of the data for which it ended by itself.
        num_steps: Steps of the search, on average.
    """

    title = "approximation and amortization gap"
    share = 0.35

    num_samples: int = 0
    inference: Nats = Nats()
    approximation: Nats = Nats()
    amortization: Nats = Nats()
    unsplit: str = ""
    log_p: Nats = Nats()
    source: str = ""
    bias: float = math.nan
    khat_ok: float = math.nan
    remaining: float = math.nan
    stopped: float = math.nan
    num_steps: float = math.nan

    @property
    def split(self) -> bool:
        """Whether both parts are known."""
        return self.approximation.known and self.amortization.known

    def summary(self) -> str:
        if not self.split:
            return f"total {self.inference} nats; {self.num_data} data; {self.unsplit}"
        return (
            f"{self.inference} = {self.approximation} (family) + {self.amortization} (encoder) nats; {self.num_data} "
            f"data, K = {self.num_samples}, {self.num_steps:.0f} steps"
        )


@dataclass(frozen=True, eq=False, kw_only=True)
class Bracketed(Stage):
    """log p(x) of simulated data from both sides, by annealing.

    Attributes:
        num_steps, num_chains: T and C.
        start: Where the chains began, "guide" or "prior".
        lower, upper: The bounds.
        width: Between them; its error is over the simulations.
        importance: The importance-sampling estimate of the same data.
        below_lower, below_upper: What it lacks to the bounds.
        found: All of it.
    """

    title = "bracket on simulated data"
    share = 0.15

    num_steps: int = 0
    num_chains: int = 0
    start: str = ""
    lower: Nats = Nats()
    upper: Nats = Nats()
    width: Nats = Nats()
    importance: float = math.nan
    below_lower: Nats = Nats()
    below_upper: Nats = Nats()
    found: Bracket | None = tensor()

    def summary(self) -> str:
        error = self.width.mc_stderr
        width = f"{self.width.value:.2f}" + (" (one datum)" if math.isnan(error) else f" ± {error:.2f}")
        return (
            f"[{self.lower.value:.2f}, {self.upper.value:.2f}] nats (width {width}); {self.num_data} simulated data, "
            f"{self.num_steps} steps, {self.num_chains} chains from the {self.start}"
        )


@dataclass(frozen=True, eq=False, kw_only=True)
class Calibrated(Stage):
    """Simulation-based calibration of the guide.

    Attributes:
        num_draws: Draws of the guide that each true latent was ranked among.
        level: Of the tests.
        calibrated: Whether no component fails.
        names, verdicts, p_value: Of the components; "calibrated", or what the guide is there; after Holm's correction.
        coverage_90: Share of the central intervals of level 0.9 that hold the truth.
        found: All of it.
    """

    title = "simulation-based calibration"
    share = 0.1

    num_draws: int = 0
    level: float = math.nan
    calibrated: bool = False
    names: tuple[str, ...] = ()
    verdicts: tuple[str, ...] = ()
    p_value: tuple[float, ...] = ()
    coverage_90: tuple[float, ...] = ()
    found: Calibration | None = tensor()

    def summary(self) -> str:
        failing = sum(verdict != "calibrated" for verdict in self.verdicts)
        ranks = f"{failing} of {len(self.names)} latents not calibrated" if failing else "uniform ranks"
        return f"{ranks}; {self.num_data} simulated data, {self.num_draws} draws each"


class Stages(NamedTuple):
    """All stages, in the order in which they are done."""

    bounds: Bounds = Bounds()
    latents: Latents = Latents()
    gaps: GapSplit = GapSplit()
    training: Training = Training()
    remedy: Remedy = Remedy()
    bracket: Bracketed = Bracketed()
    calibration: Calibrated = Calibrated()
