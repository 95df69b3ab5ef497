"""Whose fault the gap is: the family's or the encoder's.

    log p(x) - L[q]   =   (log p(x) - L[q*])   +   (L[q*] - L[q])
    inference gap     =   approximation gap    +   amortization gap

L is the ELBO of a datum, q the guide, and q* the best member of the same family *for that datum*, found by gradient
steps on its own parameters (`local`). log p(x) and both bounds are estimated, at draws that no step has seen; and the
steps end before the optimum: what the bound might still have risen is added to the error of q*, as if it were noise.

Reference: Cremer, Li and Duvenaud, Inference Suboptimality in Variational Autoencoders, 2018. arXiv:1801.03558
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_vae import plots
from pyro_vae.inference.trees import at, joined
from pyro_vae.judging.climbs import Climb, climbed, optimise
from pyro_vae.judging.local import LocalForm, Unscaled, by_name, family_form, family_of, is_guide, local_form
from pyro_vae.judging.quotes import aligned
from pyro_vae.judging.results import Mean, Result, at_least, gap_bar, one_of, row
from pyro_vae.judging.sweeps import sweep
from pyro_vae.judging.weights import Scored, khat_ok, pool, rescores, score
from pyro_vae.options import of_pair
from pyro_vae.traces import Program, draw, plate_nesting

_FREE = 2**22  # free parameters that are held at once
STEP_SAMPLES = 8  # of each step


@dataclass(frozen=True)
class FamilyGaps(Result):
    """The gaps of one family.

    Attributes:
        amortized: L[q] of the guide of this family; None where only the family was given.
        optimum: L[q*]; None where the guide has no local form.
        approximation: log p(x) - L[q*], or None.
        amortization: L[q*] - L[q], or None.
        inference: log p(x) - L[q], or None.
        remaining, slope, steps, stopped: As in `Climb`, per datum, (N,); what remains is counted in the errors.
        reason: Why there is no q*, or no amortized value.
    """

    amortized: Mean | None
    optimum: Mean | None
    approximation: Mean | None
    amortization: Mean | None
    inference: Mean | None
    remaining: Tensor | None = None
    slope: Tensor | None = None
    steps: Tensor | None = None
    stopped: Tensor | None = None
    reason: str | None = None


@dataclass(frozen=True)
class Gaps(Result):
    """The split of the inference gap, per family, under one model.

    Attributes:
        families: Per family; the guide's own comes first.
        log_likelihood: log p(x), the same for all.
        bias: Jackknife estimate of its bias (negative: all gaps are too small by this); nan where it was given.
        pareto_k: k-hat per datum of its weights, (N,), nan where it was given.
        source: Where it is from.
        num_samples: K per bound.
    """

    families: dict[str, FamilyGaps]
    log_likelihood: Mean
    bias: float
    pareto_k: Tensor
    source: str
    num_samples: int

    @property
    def khat_ok(self) -> float:
        """Share of the data whose k-hat is below `khat_limit`; nan where that is unknown."""
        return khat_ok(self.pareto_k, self.num_samples)

    def rows(self) -> list[dict[str, Any]]:
        common = row(self)
        return [{"family": name} | row(family) | common for name, family in self.families.items()]

    def plot(self, ax: Any = None) -> Any:
        """The gaps of each family as stacked bars, a figure."""
        bars = [
            gap_bar(name, (one.approximation, one.amortization), one.inference or one.approximation)
            for name, one in self.families.items()
        ]
        return plots.gap_bars([bar for bar in bars if len(bar) > 1], ax)

    def __str__(self) -> str:
        ok = "" if math.isnan(self.khat_ok) else f", k̂ ok for {100 * self.khat_ok:.1f} %"
        head = f"{len(self.pareto_k)} data: log p(x) {self.log_likelihood.signed} nats ({self.source}{ok})"
        lines = [head, *gap_table({"": self})]
        for name, one in self.families.items():
            if one.remaining is not None and one.steps is not None and one.stopped is not None:
                lines.append(
                    f"{name}: {one.steps.mean():.0f} steps on average, the bound stopped rising for "
                    f"{100 * one.stopped.double().mean():.0f} % of the data, {one.remaining.mean():.3f} nats may remain"
                )
            if one.reason:
                lines.append(f"{name}: {one.reason}")
        return "\n".join(lines)


def gap_table(results: Mapping[str, Gaps]) -> list[str]:
    """Several results as the lines of one table, such as {"train": ..., "test": ...}.

    Each line is one family of one result; the columns are those of Cremer et al., Table 2.

    Args:
        results: Name of a set of data -> its gaps.
    Returns:
        The lines, all of one length.
    Example:
        >>> gap_table({})
        ['set  family  log p(x)  L[q*]  L[q]  approximation  amortization  inference gap']
    """
    lines = [["set", "family", "log p(x)", "L[q*]", "L[q]", "approximation", "amortization", "inference gap"]]
    for name, result in results.items():
        for family, r in result.families.items():
            parts = result.log_likelihood, r.optimum, r.amortized, r.approximation, r.amortization, r.inference
            lines.append([name, family, *("-" if part is None else str(part) for part in parts)])
    if len(lines) > 1 and not any(results):
        lines = [line[1:] for line in lines]
    return aligned(lines, left=len(lines[0]) - 6)


@of_pair
def gaps(
    model: Program,
    guide: Program,
    data: Any,
    *,
    families: Mapping[str, Any] | None = None,
    log_likelihood: Any = None,
    num_samples: int = 1000,
    num_steps: int = 2000,
    start: str = "guide",
    learning_rate: float = 0.03,
    window: int = 100,
    tolerance: float = 0.01,
    seed: int | None = 0,
    device: str | torch.device | None = None,
    progress: bool | None = None,
    compile: bool | str = "auto",
) -> Gaps:
    """Split the gap between log p(x) and the ELBO into the family's and the encoder's part.

    A family is

    * a guide, fitted under the same model (`fit_guide`): both of its gaps are given;
    * a class of posteriors such as FullNormal, or ``functools.partial(IAF, transforms=2)``, called with an encoder that
      is never run and the latent dimension: only its approximation gap is given;
    * a posterior, of which the family is taken (a flow: and the weights to start from).

    The guide's own family needs no mention. A guide without a local form (a point with a density, a sampler that is not
    reparameterised) has its total gap given, and the reason. `gap_table` lays results of several data side by side.

    Args:
        families: By name, as above.
        log_likelihood: An estimate of log p(x) of these data in their order, such as that of `ais`; None for one from
            the guide and the local optima together.
        num_samples: K, fresh samples behind each bound.
        num_steps: Upper limit of the steps.
        start: Where local parameters start: "guide" at the guide's values (of another family: at its mean and scale),
            "fresh" at mean 0 and variance 1.
        learning_rate: Of Adam, for means and log scales; a flow's weights move at a tenth.
        window: Steps over which the bound is averaged.
        tolerance: The steps stop when two windows in a row beat the best one by no more, in nats.
        model, guide, data, seed, device, progress, compile: As for `log_likelihood`; what is captured are the steps.
    Returns:
        The gaps, printed as a table.
    Raises:
        ValueError: An option out of range; a family that is none; a guide without density; what `particles` refuses.
    Example:
        >>> import pyro.distributions as dist
        >>> from pyro_vae import Guide, Model
        >>> model = Model(lambda: dist.Normal(0.0, 1.0), lambda z: dist.Normal(z, 1.0))
        >>> guide = Guide(lambda x: dist.Normal(x / 2, 2 * 0.5**0.5))  # the scale is twice what it should be
        >>> row = gaps(model, guide, torch.zeros(4), num_samples=4000).families["guide"]
        >>> abs(row.approximation.value) < 0.01, abs(row.amortization.value - (1.5 - math.log(2))) < 0.05
        (True, True)
    """
    _check(start, num_samples, learning_rate, num_steps, window, tolerance)
    named, guides = by_name(guide, families or {})
    options: dict[str, Any] = {"num_steps": num_steps, "window": window, "tolerance": tolerance, "compile": compile}
    unscaled = Unscaled()(model)
    with sweep(model, *guides.values(), data=data, batch_size=250, copies=STEP_SAMPLES, besides=named.values(),
               validate=False, seed=seed, device=device, progress=progress, title="gaps") as run:  # fmt: skip
        made, reasons, width = _families(named, model, guide, at(run.first, slice(2)), start)
        run.at_most(_FREE // width)
        able, args = [name for name in named if name not in reasons], at(run.first, slice(run.batches.batch_size))
        alike = _pooled(model, guide, args, made, able, guides, start)
        run.expect(len(run) * len(able))

        def climb(batch: tuple[Any, ...]) -> tuple[Any, dict[str, Climb]]:
            proposals: dict[str, Program] = {name: Unscaled()(value) for name, value in guides.items()}
            nesting, climbs = {name: run.nesting(value) for name, value in guides.items()}, dict[str, Climb]()
            for name in able:
                form = _form(made[name], model, guide, batch, start)
                best = optimise(model, form, batch, learning_rate=learning_rate, **options,
                                progress=functools.partial(run.tick, family=name))  # fmt: skip
                climbs[name] = climbed(unscaled, form, best, batch, num_samples)
                local, which = form.guide(best.rows), f"{name} (local)"
                proposals[which], nesting[which] = local, plate_nesting(model, local, *batch)
                run.tick()
            return score(unscaled, proposals, alike, batch, num_samples, nesting), climbs

        (scores, mixed), ways = joined(run.each(climb))
    level, source = pool(scores, mixed, alike, log_likelihood)
    reasons |= {name: "a family without an encoder, so without an amortization gap" for name in named.keys() - guides}
    rows = {name: _row(name, level, scores, ways.get(name), reasons.get(name), num_samples) for name in named}
    log_p = Mean.of(level.log_p, level.log_p_variance, num_samples, bound=level.kind(num_samples) == "lower bound")
    return Gaps(rows, log_p, level.bias.mean().item(), level.pareto_k, source, num_samples)


def _check(start: str, num_samples: int, learning_rate: float, num_steps: int, window: int, tolerance: float) -> None:
    one_of(("guide", "fresh"), start=start)
    at_least(2, num_samples=num_samples)
    at_least(4, num_steps=num_steps)
    at_least(1, window=window)
    if not learning_rate > 0 or not tolerance >= 0:
        raise ValueError(
            f"got learning_rate={learning_rate} and tolerance={tolerance}, wanted a positive rate and a tolerance "
            "of 0 or more nats."
        )


def _families(
    named: Mapping[str, Any], model: Program, guide: Program, args: tuple[Any, ...], start: str
) -> tuple[dict[str, Any], dict[str, str], int]:
    """What has a local form, which guides have none, and why; and the most free parameters that a datum has."""
    _ = draw(model, guide, args, {}).log_weight  # refused: no density, or a scale of one site

    def latent() -> Tensor:
        return next(iter(draw(model, guide, args, {}).latents.values()))

    made = {name: family_of(name, value, latent) for name, value in named.items()}
    reasons, width = {}, 1
    for name, family in made.items():
        try:
            width = max(width, _form(family, model, guide, args, start).start.shape[1])
        except ValueError as error:
            if not is_guide(family):
                raise
            reasons[name] = f"no local form, since {error}"
    return made, reasons, width


def _pooled(
    model: Program, guide: Program, args: tuple[Any, ...], made: Mapping[str, Any], able: list[str],
    guides: Mapping[str, Program], start: str,
) -> list[str]:  # fmt: skip
    """Which proposals score each other's draws, of guides and of the local members of families."""
    found = [name for name, value in guides.items() if rescores(model, value, args)]
    for name in able:
        form = _form(made[name], model, guide, args, start)
        if form.rescoring == "one pass" and rescores(Unscaled()(model), form.guide(form.start), args):
            found.append(f"{name} (local)")
    return found


def _row(
    name: str, best: Scored, scores: Mapping[str, Scored], climb: Climb | None, reason: str | None, num_samples: int
) -> FamilyGaps:
    left = None if climb is None else climb.remaining

    def difference(upper: Any, lower: Any, remains: Tensor | None = None) -> Mean | None:
        if upper is None or lower is None:
            return None
        return Mean.of(upper[0] - lower[0], upper[1] + lower[1], num_samples, remains, below and upper is level)

    nothing = torch.zeros_like(best.log_p), torch.zeros_like(best.log_p)
    level, below = (best.log_p, best.log_p_variance), best.kind(num_samples) == "lower bound"
    both = scores.get(name), scores.get(f"{name} (local)")
    first, second = (None if s is None else (s.elbo, s.elbo_variance) for s in both)
    return FamilyGaps(
        amortized=difference(first, nothing),
        optimum=difference(second, nothing, left),
        approximation=difference(level, second, left),
        amortization=difference(second, first, left),
        inference=difference(level, first),
        reason=reason,
        **({} if climb is None else climb._asdict()),
    )


def _form(family: Any, model: Program, guide: Program, args: tuple[Any, ...], start: str) -> LocalForm:
    if is_guide(family):
        return local_form(Unscaled()(family), args, start)
    draws = next(iter(draw(model, guide, args, {}, 64).latents.values()))
    loc, scale = draws.mean(0), draws.std(0).clamp(min=1e-6)
    if start == "fresh":
        loc, scale = torch.zeros_like(loc), torch.ones_like(scale)
    return family_form(family, model, args, loc, scale)
