"""One judgement of a pair within a budget of time: stages in order of importance, and a verdict.

A stage works in pieces (see `budget`); one that a pair does not allow (discrete latents cannot be annealed) says why,
and the others go on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyro
import torch

from pyro_vae import __version__, plots
from pyro_vae.inference.batches import seeded
from pyro_vae.inference.fingerprints import fingerprint, program_fingerprint, program_values
from pyro_vae.inference.ranks import alone
from pyro_vae.inference.records import History
from pyro_vae.inference.trees import rows
from pyro_vae.judging.advice import Culprit, Finding
from pyro_vae.judging.budget import Budget, Examination, OutOfTime
from pyro_vae.judging.curves import examine_training, records_of, trend
from pyro_vae.judging.estimates import log_likelihood
from pyro_vae.judging.examinations import (
    examine_bounds,
    examine_bracket,
    examine_calibration,
    examine_gaps,
    examine_latents,
    with_missing,
)
from pyro_vae.judging.kept import Kept
from pyro_vae.judging.remedies import examine_remedy
from pyro_vae.judging.results import Result, at_least, gap_bar, plain
from pyro_vae.judging.stages import Stages
from pyro_vae.judging.sweeps import Sweep, sweep
from pyro_vae.judging.trials import Stage, Training
from pyro_vae.judging.verdicts import verdict
from pyro_vae.options import of_pair
from pyro_vae.reach import modules_of
from pyro_vae.traces import Program

VERSION = 3  # of the JSON
_TRAINING = 5000  # training data that are looked at, at most
_EXAMINE: dict[str, Callable[[Examination, Stages], Stage]] = {
    "bounds": examine_bounds, "latents": examine_latents, "gaps": examine_gaps, "training": examine_training,
    "remedy": examine_remedy, "bracket": examine_bracket, "calibration": examine_calibration,
}  # fmt: skip


@dataclass(frozen=True)
class Judgement(Result):
    """What was found out about a pair, with its protocol and verdict.

    Attributes:
        stages: What each stage found, or why it did not: ``stages.gaps.approximation``, say. Nats per datum.
        findings: The verdict, sentence by sentence.
        protocol: What the numbers depend on.
    """

    stages: Stages
    findings: tuple[Finding, ...]
    protocol: dict[str, Any] = field(default_factory=dict)

    @property
    def culprits(self) -> tuple[Culprit, ...]:
        """Who is at fault: of "family", "encoder", "dead encoder", "collapse", "estimator", "overfitting", "unfinished
        training"; none if empty."""
        return tuple(dict.fromkeys(f.culprit for f in self.findings if f.culprit is not None))

    @property
    def verdict(self) -> tuple[str, ...]:
        """The findings as sentences."""
        return tuple(str(finding) for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """Plain data; numbers that are not finite are None. Tensors are left out."""
        return {
            "version": VERSION,
            "protocol": plain(self.protocol, finite=True),
            "stages": {name: stage.to_dict() for name, stage in self.stages._asdict().items()},
            "findings": plain(self.findings, finite=True),
            "culprits": list(self.culprits),
        }

    def rows(self) -> list[dict[str, Any]]:
        return [{"stage": stage.title, "status": stage.status, "num_data": stage.num_data, "seconds": stage.seconds,
                 "found": str(stage)} for stage in self.stages]  # fmt: skip

    def plot(self, ax: Any = None) -> Any:
        """What the guide loses, split where that is known; else the estimate of log p(x) against K, as a figure."""
        gaps, bounds = self.stages.gaps, self.stages.bounds
        if gaps.inference.known:
            parts = (gaps.approximation, gaps.amortization) if gaps.split else (None, None)
            return plots.gap_bars([gap_bar("guide", parts, gaps.inference)], ax)
        if bounds.done:
            name, errors = "importance-weighted bound", bounds.curve_mc_stderr
            return plots.bounds_by_samples(bounds.curve_samples, {name: bounds.curve}, {name: errors}, ax=ax)
        raise ValueError("neither gaps nor bounds were done, so there is nothing to draw. See their reasons.")

    def to_json(self) -> str:
        """As JSON."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Judgement:
        """From what `to_json` gave.

        Raises:
            ValueError: Another version wrote it, or something else.
        """
        values = json.loads(text)
        version = values.get("version") if isinstance(values, dict) else None
        if version != VERSION:
            raise ValueError(f"got a judgement of version {version}, wanted {VERSION}. Judge the pair again.")
        kinds = Stages._field_defaults
        stages = {name: type(kinds[name]).from_dict(stage) for name, stage in values["stages"].items()}
        findings = tuple(Finding(**finding) for finding in values["findings"])
        return cls(Stages(**stages), findings, values["protocol"])

    @property
    def advice(self) -> tuple[Finding, ...]:
        """The findings with something to type, the first thing to try first."""
        return tuple(finding for finding in self.findings if finding.command)

    def of_run(self, run: str, options: Mapping[str, Any]) -> Judgement:
        """The same, with commands made from a run folder and its configuration."""
        return dataclasses.replace(self, findings=tuple(finding.typed(run, options) for finding in self.findings))

    def lines(self) -> list[tuple[str, str]]:
        """The report as (what, text) pairs; the verdict comes first."""
        found: list[tuple[str, str]] = []
        for finding in self.findings:
            found.append(("" if found else "verdict", str(finding)))
            if finding.command:
                found += [("  type", finding.command), ("  or", finding.python)]
        return found + [(stage.title, str(stage)) for stage in self.stages]

    def __str__(self) -> str:
        width = max(len(name) for name, _ in self.lines())
        return "\n".join(f"{name:{width}}  {text}" for name, text in self.lines())


@of_pair
def judge(
    model: Program,
    guide: Program,
    data: Any,
    *,
    history: History | Sequence[Mapping[str, Any]] | None = None,
    training: Any = None,
    budget: float = 120.0,
    num_samples: int = 1000,
    num_data: int = 100,
    observed: Mapping[str, int] | None = None,
    seed: int = 0,
    device: str | torch.device | None = None,
    progress: bool | None = None,
    clock: Callable[[], float] = time.monotonic,
    checkpoint: str | os.PathLike[str] | Kept | None = None,
) -> Judgement:
    """Judge a pair: how far its ELBO is from log p(x), whose fault that is, and what to try next.

    Args:
        model: A Pyro program for p(x, z), with any sites.
        guide: A Pyro program for q(z | x).
        data: As for `fit`: a tensor, a tuple of tensors, a `Split`, batches. Held out, if the verdict is to hold for
            data that were not trained on.
        history: What `fit` returned, or a run's metrics: for overfitting, and a training that had not ended.
        training: Data that the pair was fitted to, on which remedies are fitted (without, on half of `data`).
        budget: Seconds; what does not fit is left out.
        num_samples: K of the estimate of log p(x) that is judged.
        num_data: How many data are looked at, at most: the first.
        observed: Which argument each observed site is, by position, as {"x": 0}, where simulated data need it.
        seed: Of everything. The same pieces give the same numbers.
        device: Where it is computed: data and modules go there for that time. Where the modules are when not given.
        progress: Show which stage is at work; None shows it on a terminal only.
        clock: Gives seconds.
        checkpoint: A .safetensors file that gets what each stage and remedy found. Of one that is there, of the same
            pair, data and options, only what is missing is done, in what is left of the budget.
    Returns:
        What each stage found, verdict and protocol.
    Raises:
        ValueError: No data, or an option out of range.
    Example:
        >>> import pyro.distributions as dist
        >>> from pyro_vae import Guide, Model
        >>> model = Model(lambda: dist.Normal(0.0, 1.0), lambda z: dist.Normal(z, 1.0))
        >>> guide = Guide(lambda x: dist.Normal(x / 2, 3 * 0.5**0.5))  # the scale is three times what it should be
        >>> judge(model, guide, torch.linspace(-1, 1, 8), num_data=4, budget=60).culprits  # doctest: +SKIP
        ('encoder',)
    """
    at_least(2, num_data=num_data, num_samples=num_samples)
    if not budget > 0:
        raise ValueError(f"got budget={budget}, wanted a positive number of seconds.")
    # What its clock leaves time for is each process's own affair.
    with alone(), sweep(model, guide, data=data, batch_size=num_data, num_data=num_data, seed=seed, device=device,
                        progress=progress, title="judge") as run:  # fmt: skip
        with seeded(seed):
            first = run.whole()  # drawn once for all stages
        options: dict[str, Any] = {"device": device, "seed": seed, "progress": False}
        kept = checkpoint if isinstance(checkpoint, Kept) else Kept(checkpoint, {"budget": budget})
        timer = Budget(budget, clock)
        pair = Examination(model, guide, first, num_samples, observed, options, timer, history=records_of(history))
        if training is not None:  # the first of them, drawn once
            with sweep(model, guide, data=training, num_data=_TRAINING, **options) as seen:
                pair.training, pair.training_source = seen.whole(), training
        if kept.path is not None:
            kept = kept.also(_depends_on(pair))
            kept.clock = clock
            pair.piece, pair.budget = kept.piece, Budget(budget, clock, spent=kept.seconds)
        stages = _examined(pair, run)
    protocol = {
        "num_data": pair.num_data,
        "num_samples": num_samples,
        "num_training": 0 if pair.training is None else rows(pair.training),
        "seed": seed,
        "budget_seconds": budget,
        "seconds": round(clock() - pair.budget.started, 3),
    }
    return Judgement(stages, verdict(stages), protocol)


def _examined(pair: Examination, run: Sweep) -> Stages:
    """All stages, one after the other."""
    # Imports, and first runs, are slow on a busy machine, and no fault of the first stage.
    with contextlib.suppress(OutOfTime, Exception), pair.budget.piece():
        log_likelihood(pair.model, pair.guide, pair.part(0, 2), num_samples=25, method="importance", **pair.options)
    stages = Stages()
    run.expect(len(stages))
    for name in Stages._fields:
        run.tick(stage=getattr(stages, name).title)
        found, *known = pair.piece(name, functools.partial(_with_what_is_known, pair, name, stages))
        pair.per_draw, pair.judged, pair.better, pair.best = known
        stages = Stages(**stages._asdict() | {name: found})
        run.tick()
    return stages._replace(bounds=with_missing(pair, stages.bounds)) if stages.bounds.done else stages


def _with_what_is_known(pair: Examination, name: str, stages: Stages) -> tuple[Any, ...]:
    """What a stage found, and what later ones take from it and those before."""
    return _one_stage(pair, name, stages), pair.per_draw, pair.judged, pair.better, pair.best


def _depends_on(pair: Examination) -> dict[str, Any]:
    """All that the numbers of a judgement depend on but the clock, as plain data."""
    programs = (pair.model, pair.guide)
    weights = [module.state_dict() for module in modules_of(*programs)]
    store = {name: value.detach() for name, value in pyro.get_param_store().items()}
    return {
        "package": __version__, "torch": torch.__version__, "threads": torch.get_num_threads(),
        "programs": [program_fingerprint(program) for program in programs],
        "values": program_values(*programs), "weights": [fingerprint(each) for each in (*weights, store)],
        "data": fingerprint(pair.data), "training": fingerprint(pair.training), "history": fingerprint(pair.history),
        "num_samples": pair.num_samples, "observed": fingerprint(pair.observed), "seed": pair.options["seed"],
        "device": str(pair.options["device"]),
    }  # fmt: skip


def _one_stage(pair: Examination, name: str, stages: Stages) -> Stage:
    """One stage within its share of the time that is left: what the later ones are owed is theirs."""
    budget, kind = pair.budget, type(getattr(stages, name))
    coming = Stages._fields[Stages._fields.index(name) :]
    began = budget.clock()
    try:
        budget.begin_stage(kind.share / sum(getattr(stages, each).share for each in coming))
        found = _EXAMINE[name](pair, stages)
    except OutOfTime:
        allowed = max(budget.stage_end - began, 0.0)
        found = kind(late=True, reason=f"it did not fit into the {allowed:.1f} s that were left for it")
        if name == "training" and pair.history is not None:  # its curve is there, and takes no time to be read
            found = Training(status="done", **trend(*pair.history))
    except (ValueError, NotImplementedError, RuntimeError, TypeError, KeyError, IndexError, AttributeError) as error:
        # A user's pair may break anywhere: the other stages are not to suffer.
        line, name = " ".join(str(error).split()), type(error).__name__
        reason = line or name if isinstance(error, ValueError | NotImplementedError) else f"{name}: {line}"
        found = kind(status="not possible", reason=reason)
    return dataclasses.replace(found, seconds=round(budget.clock() - began, 3))
