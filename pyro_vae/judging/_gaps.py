"""Whose fault the gap is: the family's or the encoder's.

    log p(x) - L[q]   =   (log p(x) - L[q*])   +   (L[q*] - L[q])
    inference gap     =   approximation gap    +   amortization gap

L is the ELBO of a datum, q what the guide says of it, and q* the best member of the same
family *for that datum*, found by gradient steps on its own parameters (`local`). A family
that cannot bend as the posterior does has an approximation gap; an encoder that does not
find the best member has an amortization gap.

Three errors are in such a split, and all are reported per datum. log p(x) is estimated: by
importance sampling from the guide and the local optima together (`mixtures`), or by
whatever estimate is given. Both bounds are estimated, at draws that no step has seen.
And the steps end before the optimum: what the bound might still have risen, judged by how it
rose last, is added to the error of q*, as if it were noise of that size.

Reference: Cremer, Li and Duvenaud, Inference Suboptimality in Variational Autoencoders, 2018.
arXiv:1801.03558
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from pyro import validation_enabled
from torch import Tensor, nn
from tqdm import tqdm

from pyro_vae.evaluation import evaluating
from pyro_vae.inference.batches import Batches, seeded
from pyro_vae.inference.capture import fast_matmul
from pyro_vae.inference.memory import reused_memory
from pyro_vae.inference.trees import numbers, values
from pyro_vae.judging.local import (
    LocalForm,
    Optimum,
    Unscaled,
    family_form,
    local_form,
    optimise,
    remaining,
)
from pyro_vae.judging.mixtures import Scored, given_estimate, pool, score, scores_strangers
from pyro_vae.judging.psis import khat_limit
from pyro_vae.options import checked
from pyro_vae.parameters import device_of
from pyro_vae.protocols import has_start
from pyro_vae.traces import Program, draw, plate_nesting

# Floats of free parameters, and of decoder output per step, that are held at once.
_FREE, _STEP = 2**22, 2**21


@dataclass(frozen=True)
class Part:
    """A bound or a gap, averaged over data, in nats.

    Attributes:
        value: The mean.
        stderr: Its error given these data: Monte Carlo, and what remained to climb.
        data_stderr: Standard error of the mean for the population of the data.
        pointwise: Per datum, (N,).
        pointwise_stderr: Error per datum, (N,).
    """

    value: float
    stderr: float
    data_stderr: float
    pointwise: Tensor
    pointwise_stderr: Tensor

    @classmethod
    def of(cls, pointwise: Tensor, variance: Tensor, left: Tensor | None = None) -> Part:
        """From values and variances per datum, and what remained to climb, which does not average out."""
        count = len(pointwise)
        left = torch.zeros_like(pointwise) if left is None else left
        return cls(
            pointwise.mean().item(),
            math.hypot(variance.sum().sqrt().item() / count, left.mean().item()),
            pointwise.std().item() / math.sqrt(count) if count > 1 else math.nan,
            pointwise,
            (variance + left.square()).sqrt(),
        )

    def __str__(self) -> str:
        return f"{self.value:.2f} ± {self.stderr:.2f}"


@dataclass(frozen=True)
class FamilyGaps:
    """The gaps of one family.

    Attributes:
        amortized: L[q] of the guide of this family; None where only the family was given.
        optimum: L[q*]; None where the guide has no local form.
        approximation: log p(x) - L[q*], or None.
        amortization: L[q*] - L[q], or None.
        inference: log p(x) - L[q], or None.
        remaining: What L[q*] may still have risen, per datum, (N,), counted in the errors.
        slope: How much it rose over the last window, per datum, (N,).
        steps: Steps taken, per datum, (N,).
        stopped: Whether the bound had stopped rising before the steps were used up, (N,).
        reason: Why there is no q*, or no amortized value.
    """

    amortized: Part | None
    optimum: Part | None
    approximation: Part | None
    amortization: Part | None
    inference: Part | None
    remaining: Tensor | None = None
    slope: Tensor | None = None
    steps: Tensor | None = None
    stopped: Tensor | None = None
    reason: str | None = None


@dataclass(frozen=True)
class Gaps:
    """The split of the inference gap, per family, under one model.

    Attributes:
        families: Per family; the guide's own comes first.
        log_likelihood: log p(x), the same for all.
        bias: Jackknife estimate of its bias (negative: all gaps are too small by this); nan
            where it was given.
        pareto_k: k-hat per datum of its weights, (N,), nan where it was given.
        source: Where it is from.
        num_samples: K per bound.
    """

    families: dict[str, FamilyGaps]
    log_likelihood: Part
    bias: float
    pareto_k: Tensor
    source: str
    num_samples: int

    @property
    def khat_ok(self) -> float:
        """Share of the data whose k-hat is below `khat_limit`; nan where that is unknown."""
        if self.pareto_k.isnan().all():
            return math.nan
        return (self.pareto_k < khat_limit(self.num_samples)).double().mean().item()

    def __str__(self) -> str:
        count = len(self.log_likelihood.pointwise)
        ok = "" if math.isnan(self.khat_ok) else f", k̂ ok for {100 * self.khat_ok:.1f} %"
        lines = [f"{count} data: log p(x) = {self.log_likelihood} nats ({self.source}{ok})", *gap_table({"": self})]
        for name, row in self.families.items():
            if row.remaining is not None and row.steps is not None and row.stopped is not None:
                lines.append(
                    f"{name}: {row.steps.mean():.0f} steps on average, the bound stopped rising for "
                    f"{100 * row.stopped.double().mean():.0f} % of the data, {row.remaining.mean():.3f} nats may remain"
                )
            if row.reason:
                lines.append(f"{name}: {row.reason}")
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
    cells = [
        (name, family, result.log_likelihood, r.optimum, r.amortized, r.approximation, r.amortization, r.inference)
        for name, result in results.items()
        for family, r in result.families.items()
    ]
    first = max([len(c[0]) for c in cells] + [3]) if not cells or any(c[0] for c in cells) else 0
    second = max([len(c[1]) for c in cells] + [6])
    titles = ["log p(x)", "L[q*]", "L[q]", "approximation", "amortization", "inference gap"]
    text = [[str(part) if part is not None else "-" for part in c[2:]] for c in cells]
    widths = [max([len(line[i]) for line in text] + [len(title)]) for i, title in enumerate(titles)]

    def line(name: str, family: str, parts: list[str]) -> str:
        start = f"{name:{first}}  " if first else ""
        return start + f"{family:{second}}  " + "  ".join(f"{p:>{w}}" for p, w in zip(parts, widths, strict=True))

    return [line("set", "family", titles)] + [line(c[0], c[1], parts) for c, parts in zip(cells, text, strict=True)]


@checked
def gaps(
    model: Program,
    guide: Program,
    data: Any,
    *,
    families: Mapping[str, Any] | None = None,
    log_likelihood: Any = None,
    start: str = "amortized",
    num_samples: int = 1000,
    step_samples: int = 8,
    learning_rate: float = 0.03,
    max_steps: int = 2000,
    window: int = 100,
    tolerance: float = 0.01,
    device: str | torch.device | None = None,
    seed: int | None = 0,
    progress: bool | None = None,
) -> Gaps:
    """Split the gap between log p(x) and the ELBO into the family's and the encoder's part.

    A family is

    * a guide, fitted under the same model (`fit_guide`): both of its gaps are given;
    * a class of posteriors such as FullNormal, or ``functools.partial(IAF, transforms=2)``: it
      has no encoder, so only its approximation gap is. It is called with an encoder, of
      which only the number of features is ever asked, and the latent dimension;
    * a posterior, of which the family is taken (a flow: and the weights to start from).

    The guide's own family needs no mention. A guide without a local form (a point with a
    density, a sampler that is not reparameterised) has its total gap given, and the reason.
    Data go through in chunks, so that memory is bounded. Training and test data are two calls,
    which `gap_table` lays side by side.

    Args:
        model: A Pyro program for p(x, z), whose arguments are the batch.
        guide: A Pyro program for q(z | x).
        data: As for `fit`.
        families: By name, as above.
        log_likelihood: An estimate of log p(x) of these data in their order, such as that of
            `ais`; None estimates it from the guide and the local optima together.
        start: Where local parameters start: "amortized" at the guide's values (of another
            family: at its mean and scale), "fresh" at mean 0 and variance 1.
        num_samples: K, fresh samples behind each bound.
        step_samples: Samples per step.
        learning_rate: Of Adam, for means and log scales; a flow's weights move at a tenth.
        max_steps: Upper limit of the steps.
        window: Steps over which the bound is averaged.
        tolerance: The steps stop when two windows in a row beat the best one by no more, in nats.
        device: Where the batches go; where the modules are when not given.
        seed: Seed of the samples; None goes on with torch's random state.
        progress: Show a bar; None shows it on a terminal only.
    Returns:
        The gaps, printed as a table.
    Raises:
        ValueError: An option out of range; a family that is none; a guide without density, and
            all that `particles` refuses.
    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):   # the mean is right, the scale twice what it should be
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(x / 2, 2 * 0.5**0.5))
        >>> row = gaps(model, guide, torch.zeros(4), num_samples=4000).families["guide"]
        >>> abs(row.approximation.value) < 0.01, abs(row.amortization.value - (1.5 - math.log(2))) < 0.05
        (True, True)

    Reference: Cremer et al., Inference Suboptimality in Variational Autoencoders, 2018. arXiv:1801.03558
    """
    _check_options(start, num_samples, step_samples, learning_rate, max_steps, window, tolerance)
    named = _named(guide, families or {})
    guides = {name: value for name, value in named.items() if _is_guide(value)}
    steps: dict[str, Any] = {
        "num_samples": step_samples, "learning_rate": learning_rate, "max_steps": max_steps, "window": window,
        "tolerance": tolerance,
    }  # fmt: skip
    programs = (model, *guides.values())
    place = device_of(*programs) if device is None else device
    found: dict[str, list[Scored]] = {}
    mixed: list[Scored] = []
    climbs: dict[str, list[_Climb]] = {name: [] for name in named}
    on_cpu = torch.device(place or "cpu").type == "cpu"
    with (
        evaluating(*programs, *named.values(), seed=seed), validation_enabled(False), fast_matmul(on_cpu),
        reused_memory(),
    ):  # fmt: skip
        batches = Batches(data, 2, place, shuffle=False, programs=programs)
        sample = batches.first()
        _ = draw(model, guide, sample, {}).log_weight  # refused: no density, or a scale of one site
        families = {name: _family(name, value, model, guide, sample) for name, value in named.items()}
        reasons: dict[str, str] = {}
        width = 1
        for name, family in families.items():
            try:
                width = max(width, _form(family, model, guide, sample, start).start.shape[1])
            except ValueError as error:
                if not _is_guide(family):
                    raise
                reasons[name] = f"no local form, since {error}"
        chunk = max(1, min(250, _FREE // width, _STEP // (values(sample) * step_samples)))
        batches = batches.of(chunk)
        nesting = {name: plate_nesting(model, value, *sample) for name, value in guides.items()}
        unscaled = Unscaled()(model)
        pooled: list[str] = []
        hide = None if progress is None else not progress
        with tqdm(total=len(batches) * (len(named) - len(reasons)), desc="gaps", disable=hide, leave=False) as bar:
            for number, batch in enumerate(batches):
                proposals = {name: Unscaled()(value) for name, value in guides.items()}
                forms: dict[str, tuple[LocalForm, Optimum]] = {}
                for name, family in families.items():
                    if name in reasons:
                        continue
                    form = _form(family, model, guide, batch, start)
                    best = optimise(model, form, batch, progress=functools.partial(_tell, bar, name), **steps)
                    forms[name] = form, best
                    proposals[f"{name} (local)"] = form.guide(best.rows)
                    nesting.setdefault(f"{name} (local)", plate_nesting(model, form.guide(best.rows), *batch))
                    climbs[name].append(_climb(unscaled, form, best, batch, num_samples))
                    bar.update()
                if number == 0:
                    pooled = [name for name, value in guides.items() if scores_strangers(model, value, batch)]
                    for name, (form, best) in forms.items():
                        one_pass = form.rescoring == "one pass"
                        if one_pass and scores_strangers(unscaled, form.guide(best.rows), batch):
                            pooled.append(f"{name} (local)")
                own, both = score(unscaled, proposals, pooled, batch, num_samples, nesting)
                for name, scored in own.items():
                    found.setdefault(name, []).append(scored)
                mixed += [both] if both is not None else []
    scores = {name: Scored.joined(parts) for name, parts in found.items()}
    estimate, source = pool(scores, Scored.joined(mixed) if mixed else None, pooled)
    log_p, variance, bias, k = estimate.log_p, estimate.log_p_variance, estimate.bias.mean().item(), estimate.pareto_k
    if log_likelihood is not None:
        log_p, stderr = given_estimate(log_likelihood, len(log_p))
        variance, source, bias, k = stderr.square(), "given", math.nan, torch.full_like(k, math.nan)
    rows = {}
    for name in named:
        why = reasons.get(name)
        if name not in guides:
            why = "a family without an encoder, so without an amortization gap"
        rows[name] = _row(
            log_p, variance, scores.get(name), scores.get(f"{name} (local)"), _Climb.joined(climbs[name]), why
        )
    return Gaps(rows, Part.of(log_p, variance), bias, k, source, num_samples)


class _Climb(NamedTuple):
    """How the steps of some data went, each (B,)."""

    remaining: Tensor
    slope: Tensor
    steps: Tensor
    stopped: Tensor

    @classmethod
    def joined(cls, parts: list[_Climb]) -> _Climb | None:
        return cls(*(torch.cat(column) for column in zip(*parts, strict=True))) if parts else None


def _climb(model: Program, form: LocalForm, best: Optimum, args: tuple[Any, ...], num_samples: int) -> _Climb:
    """What remains of each datum's climb, at one noise for all three places."""
    nesting = plate_nesting(model, form.guide(best.rows), *args)
    size_of_batch = max(numbers(args), 512)
    count = max(2, min(num_samples, 200))
    size = max(1, min(count, 2**21 // size_of_batch))
    seed = int(torch.randint(2**31, ()).item())
    weights = []
    for rows in best.path:
        with seeded(seed):
            parts = [
                draw(model, form.guide(rows), args, {}, min(size, count - at), max_plate_nesting=nesting).log_weight
                for at in range(0, count, size)
            ]
        weights.append(torch.cat(parts).double().cpu())
    left, slope = remaining(*weights)
    return _Climb(left, slope, best.steps.double().cpu(), best.stopped.cpu())


def _row(
    log_p: Tensor, variance: Tensor, own: Scored | None, local: Scored | None, climb: _Climb | None, reason: str | None
) -> FamilyGaps:
    left = None if climb is None else climb.remaining
    return FamilyGaps(
        amortized=None if own is None else Part.of(own.elbo, own.elbo_variance),
        optimum=None if local is None else Part.of(local.elbo, local.elbo_variance, left),
        approximation=None if local is None else Part.of(log_p - local.elbo, variance + local.elbo_variance, left),
        amortization=None
        if local is None or own is None
        else Part.of(local.elbo - own.elbo, local.elbo_variance + own.elbo_variance, left),
        inference=None if own is None else Part.of(log_p - own.elbo, variance + own.elbo_variance),
        reason=reason,
        **({} if climb is None else climb._asdict()),
    )


def _named(guide: Program, families: Mapping[str, Any]) -> dict[str, Any]:
    """The guide first, under its own name where it is among the families."""
    name = next((name for name, value in families.items() if value is guide or value == guide), "guide")
    return {name: guide} | {other: value for other, value in families.items() if other != name}


def _is_guide(value: Any) -> bool:
    return callable(value) and not _is_class(value) and not has_start(value)


def _is_class(value: Any) -> bool:
    return isinstance(value.func if isinstance(value, functools.partial) else value, type)


class _NoEncoder(nn.Module):
    """Stands where an encoder would; it is never run."""

    out_features = 1


def _family(name: str, value: Any, model: Program, guide: Program, args: tuple[Any, ...]) -> Any:
    """A guide or a posterior as it is; of a class, a posterior without an encoder."""
    if not callable(value):
        raise ValueError(
            f"got families[{name!r}] of type {type(value).__name__}, wanted a fitted guide, a class of posteriors such "
            "as FullNormal, functools.partial(IAF, transforms=2), or a posterior."
        )
    if not _is_class(value):
        return value
    z = next(iter(draw(model, guide, args, {}).latents.values()))
    posterior = value(_NoEncoder(), z.shape[-1])
    if not has_start(posterior):
        raise ValueError(
            f"families[{name!r}] makes a {type(posterior).__name__}, which has no local form. Derive it from "
            "Amortized, or give a guide fitted by fit_guide."
        )
    return posterior.to(dtype=z.dtype, device=z.device).eval()


def _form(family: Any, model: Program, guide: Program, args: tuple[Any, ...], start: str) -> LocalForm:
    if _is_guide(family):
        return local_form(Unscaled()(family), args, start)
    draws = next(iter(draw(model, guide, args, {}, 64).latents.values()))
    loc, scale = draws.mean(0), draws.std(0).clamp(min=1e-6)
    if start == "fresh":
        loc, scale = torch.zeros_like(loc), torch.ones_like(scale)
    return family_form(family, model, args, loc, scale)


def _tell(bar: Any, name: str, done: int) -> None:
    bar.set_postfix(family=name, window=done, refresh=False)


def _check_options(
    start: str, num_samples: int, step_samples: int, learning_rate: float, max_steps: int, window: int, tolerance: float
) -> None:
    if start not in ("amortized", "fresh"):
        raise ValueError(f"got start={start!r}, wanted 'amortized' or 'fresh'.")
    least = {"num_samples": (num_samples, 2), "step_samples": (step_samples, 1), "max_steps": (max_steps, 4)}
    for name, (value, wanted) in (least | {"window": (window, 1)}).items():
        if value < wanted:
            raise ValueError(f"got {name}={value}, wanted at least {wanted}.")
    if not learning_rate > 0 or not tolerance >= 0:
        raise ValueError(
            f"got learning_rate={learning_rate} and tolerance={tolerance}, wanted a positive rate and a tolerance "
            "of 0 or more nats."
        )
