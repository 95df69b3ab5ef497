"""One judgement of a pair within a budget of time: stages in order of importance, and a verdict.

Each stage works in pieces of a fixed schedule (4, 16, 64, ... data; 50, 100, 200, ... steps), so that a seed
gives the same numbers wherever the same pieces were done, and what was done is reported. A piece is
begun only where what was measured so far says that it fits, and is broken off, and left out, where that was wrong:
the clock is looked at whenever a sample statement of model or guide runs. So the
budget holds for any pair, also on a machine that is busy with other things.

A stage that a pair does not allow (a discrete latent cannot be annealed, a point has no density) says
why, and the others go on.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_vae.app.verdicts import Finding, material, nats, verdict
from pyro_vae.evaluation import evaluating
from pyro_vae.inference.batches import Batches, seeded
from pyro_vae.inference.trees import at, joined, rows
from pyro_vae.judging.annealing import bdmc
from pyro_vae.judging.calibration import sbc
from pyro_vae.judging.components import Components
from pyro_vae.judging.estimates import Curve, Estimate, elbo_terms, log_likelihood
from pyro_vae.judging.gaps import STEP_SAMPLES, FamilyGaps, Gaps, gaps
from pyro_vae.judging.latents import active_units, kl_per_dimension
from pyro_vae.judging.results import Mean, over_data
from pyro_vae.judging.weights import khat_limit
from pyro_vae.options import checked
from pyro_vae.parts.posteriors.normal import FullNormal
from pyro_vae.traces import Program

SHARES = {"bounds": 0.25, "latents": 0.05, "gaps": 0.35, "remedy": 0.1, "bracket": 0.15, "calibration": 0.1}
TITLES = {
    "bounds": "ELBO and log p(x)", "latents": "use of the latents", "gaps": "approximation and amortisation gap",
    "remedy": "another family", "bracket": "bracket on simulated data", "calibration": "simulation-based calibration",
}  # fmt: skip
_LADDER = (5000, 2000, 1000, 500, 200, 100, 50, 25, 10, 5, 2)
_ELBO_SAMPLES, _GAP_SAMPLES, _WINDOW = 100, 1000, 50
_CHAINS = 8
_UNUSED = 0.01


@dataclass(frozen=True)
class Judgement:
    """What was found out about a pair, with its protocol and verdict.

    Attributes:
        numbers: Plain data: "protocol", "stages" (what was done, what was not, and why), and one entry per
            stage that gave numbers. Nats per datum, errors beside them.
        findings: The verdict, sentence by sentence.
        arrays: Per datum, for pictures; not kept in JSON.
    """

    numbers: dict[str, Any]
    findings: tuple[Finding, ...]
    arrays: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def culprits(self) -> tuple[str, ...]:
        """Who is at fault: of "family", "encoder", "dead encoder", "collapse", "estimator"; none if empty."""
        return tuple(dict.fromkeys(f.culprit for f in self.findings if f.culprit is not None))

    @property
    def verdict(self) -> tuple[str, ...]:
        """The findings as sentences."""
        return tuple(str(finding) for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """Plain data; numbers that are not finite are None."""
        found = [vars(finding) for finding in self.findings]
        result: dict[str, Any] = _plain(self.numbers | {"findings": found, "culprits": self.culprits})
        return result

    def to_json(self) -> str:
        """As JSON."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Judgement:
        """From what `to_json` gave."""
        values = json.loads(text)
        values.pop("culprits", None)
        findings = tuple(Finding(**finding) for finding in values.pop("findings"))
        return cls(values, findings)

    def lines(self) -> list[tuple[str, str]]:
        """The report as (what, text) pairs; the verdict comes last."""
        found = [(TITLES[s["name"]], s["did"] if s["status"] == "done" else f"{s['status']}: {s['reason']}")
                 for s in self.numbers["stages"]]  # fmt: skip
        for index, finding in enumerate(self.findings):
            found.append(("verdict" if index == 0 else "", str(finding)))
        return found

    def __str__(self) -> str:
        width = max(len(name) for name, _ in self.lines())
        return "\n".join(f"{name:{width}}  {text}" for name, text in self.lines())


@checked
def judge(
    model: Program,
    guide: Program,
    x: Any,
    *,
    budget: float = 120.0,
    images: int = 100,
    num_samples: int = 1000,
    observed: Mapping[str, int] | None = None,
    device: str | torch.device | None = None,
    seed: int = 0,
    clock: Callable[[], float] = time.monotonic,
    say: Callable[[str], None] | None = None,
) -> Judgement:
    """Judge a pair: how far its ELBO is from log p(x), whose fault that is, and what to try next.

    Args:
        model: A Pyro program for p(x, z), with any sites.
        guide: A Pyro program for q(z | x).
        x: As the data of `fit`: a tensor, a tuple of tensors, a `Split`, batches.
        budget: Seconds; more than that is not taken, and what does not fit is left out.
        images: How many data are looked at, at most: the first.
        num_samples: K of the estimate of log p(x) that is judged.
        observed: Which argument each observed site is, by position, as {"x": 0}, where simulated data need it.
        device: Where the batches go; where the modules are when not given.
        seed: Of everything. The same pieces give the same numbers.
        clock: Gives seconds.
        say: Told the name of each stage as it starts.
    Returns:
        Numbers, verdict and protocol.
    Raises:
        ValueError: No data, or an option out of range.
    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):   # the mean is right, the scale three times what it should be
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(x / 2, 3 * 0.5**0.5))
        >>> judge(model, guide, torch.linspace(-1, 1, 8), images=4, budget=60).culprits  # doctest: +SKIP
        ('encoder',)
    """
    for name, value, least in (("images", images, 2), ("num_samples", num_samples, 2)):
        if value < least:
            raise ValueError(f"got {name}={value}, wanted at least {least}.")
    if not budget > 0:
        raise ValueError(f"got budget={budget}, wanted a positive number of seconds.")
    with evaluating(model, guide, seed=seed):
        args = _taken(x, images, seed, (model, guide))
        run = _Run(model, guide, args, budget, num_samples, observed, device, seed, clock)
        run.warm_up()
        for name in SHARES:
            if say is not None:
                say(TITLES[name])
            run.stage(name)
    numbers = run.numbers | {
        "protocol": {
            "images": run.count,
            "num_samples": run.asked,
            "seed": seed,
            "budget_seconds": budget,
            "seconds": round(clock() - run.started, 3),
        },
        "stages": run.stages,
    }
    return Judgement(numbers, verdict(numbers), run.arrays)


class _OutOfTime(BaseException):
    """A piece ran past its end. No Exception, which a user's program may catch and go on."""


class _Deadline(Messenger):
    """Breaks off whatever runs inside once its time is up."""

    def __init__(self, clock: Callable[[], float], end: float) -> None:
        super().__init__()
        self.clock, self.end = clock, end

    def _pyro_sample(self, msg: Any) -> None:
        if self.clock() > self.end:
            raise _OutOfTime


class _Run:
    """The stages of one judgement, and what they have found so far."""

    def __init__(
        self, model: Program, guide: Program, args: tuple[Any, ...], budget: float, num_samples: int,
        observed: Mapping[str, int] | None, device: Any, seed: int, clock: Callable[[], float],
    ) -> None:  # fmt: skip
        self.model, self.guide, self.args, self.observed = model, guide, args, observed
        self.asked, self.device, self.seed, self.clock = num_samples, device, seed, clock
        self.count = rows(args)
        self.started = clock()
        self.end = self.started + budget
        self.stage_end = self.end
        self.per_draw = 0.0  # seconds for one sample of one datum, in bulk
        self.numbers: dict[str, Any] = {}
        self.arrays: dict[str, Any] = {}
        self.stages: list[dict[str, Any]] = []
        self.estimates: tuple[Estimate, Estimate] | None = None
        self.found_gaps: Gaps | None = None

    @property
    def options(self) -> dict[str, Any]:
        return {"device": self.device, "seed": self.seed, "progress": False}

    def warm_up(self) -> None:
        """Imports, and first runs, are slow on a busy machine, and no fault of the first stage."""
        # What a pair does not allow, the stages say.
        with contextlib.suppress(_OutOfTime, Exception), _Deadline(self.clock, self.end):
            log_likelihood(self.model, self.guide, self._chunk(0, 2), num_samples=25, **self.options)

    def stage(self, name: str) -> None:
        """Do one stage within its share of the time that is left."""
        began = self.clock()
        left = self.end - began
        names = list(SHARES)
        share = SHARES[name] / sum(SHARES[n] for n in names[names.index(name) :])
        # What the later stages are owed is theirs; a stage that ends early leaves them more.
        self.stage_end = began + share * left
        entry: dict[str, Any] = {"name": name}
        try:
            if left <= 0:
                raise _OutOfTime
            did = getattr(self, f"_{name}")()
            entry |= {"status": "done", "did": did} if did else {"status": "skipped", "reason": "not needed"}
        except _OutOfTime:
            reason = f"it did not fit into the {max(share * left, 0):.1f} s that were left for it"
            entry |= {"status": "skipped", "reason": reason}
        except (ValueError, NotImplementedError) as error:
            entry |= {"status": "impossible", "reason": " ".join(str(error).split()) or type(error).__name__}
        except (RuntimeError, TypeError, KeyError, IndexError, AttributeError) as error:
            # A user's pair may break anywhere: the other stages are not to suffer.
            entry |= {"status": "failed", "reason": f"{type(error).__name__}: {' '.join(str(error).split())}"}
        entry["seconds"] = round(self.clock() - began, 3)
        self.stages.append(entry)

    @contextlib.contextmanager
    def _piece(self) -> Iterator[None]:
        with _Deadline(self.clock, self.stage_end):
            yield

    def _fits(self, seconds: float) -> bool:
        # Half as much again, since a machine has other things to do.
        return self.clock() + 1.5 * seconds <= self.stage_end

    def _chunk(self, start: int, stop: int) -> tuple[Any, ...]:
        return at(self.args, slice(start, stop))

    def _pieces(self, factor: int) -> list[tuple[int, int]]:
        """4 data, then factor times as many, and so on to all."""
        stops = [min(4, self.count)]
        while stops[-1] < self.count:
            stops.append(min(self.count, stops[-1] * factor))
        if len(stops) > 2 and stops[-1] - stops[-2] < 4:
            stops.pop(-2)
        return list(zip([0, *stops], stops, strict=False))

    def _bounds(self) -> str:
        model, guide, pair = self.model, self.guide, self._chunk(0, 2)
        with self._piece():
            for draws in (100, 2000):
                began = self.clock()
                log_likelihood(model, guide, pair, num_samples=draws, **self.options)
                took = self.clock() - began
                self.per_draw = took / (2 * draws)
                # A hundred draws of a small model cost what Python costs, and say little of thousands.
                if 2000 / 100 * took > 0.1 * (self.stage_end - self.clock()):
                    break
        first = 4 * self.per_draw
        allowed = max(2, int(0.2 * (self.stage_end - self.clock()) / max(first, 1e-12)))
        count = self.asked if self.asked <= allowed else next((k for k in _LADDER if k <= allowed), 2)
        wanted = max(count, min(5000, max(1000, 10 * count)))
        reference = wanted if wanted <= allowed else max(count, next((k for k in _LADDER if k <= allowed), 2))
        asked: list[Any] = []
        better: list[Any] = []
        terms: list[Any] = []
        last, size = 0.0, 0
        for start, stop in self._pieces(2):
            if size and not self._fits(last * (stop - start) / size):
                break
            began, part = self.clock(), self._chunk(start, stop)
            options = self.options | {"seed": self.seed + start}
            try:
                with self._piece():
                    bound = elbo_terms(model, guide, part, num_samples=_ELBO_SAMPLES, **options)
                    one = log_likelihood(model, guide, part, num_samples=count, **options)
                    # Of another seed: the shortfall of one is measured against the other.
                    other = options | {"seed": self.seed + start + 2**32}
                    two = one if reference == count else log_likelihood(
                        model, guide, part, num_samples=reference, **other)  # fmt: skip
            except _OutOfTime:
                if not asked:
                    raise
                break
            asked.append(one)
            better.append(two)
            terms.append(bound)
            last, size = self.clock() - began, stop - start
        self.per_draw = min(self.per_draw, last / (size * (_ELBO_SAMPLES + count + (reference > count) * reference)))
        judged, best = _joined(asked), _joined(better)
        self.estimates = judged, best
        sizes = [len(t.pointwise) for t in terms]
        total = sum(sizes)
        split = {k: sum(n * getattr(t, k) for n, t in zip(sizes, terms, strict=True)) / total
                 for k in ("value", "reconstruction", "kl")}  # fmt: skip
        error = math.sqrt(sum((n * t.mc_stderr) ** 2 for n, t in zip(sizes, terms, strict=True))) / total
        assert best.curve is not None
        self.numbers["bounds"] = {
            "images": total,
            "num_samples": count,
            "num_samples_asked": self.asked,
            "elbo": split["value"],
            "elbo_stderr": error,
            "reconstruction": split["reconstruction"],
            "kl": split["kl"],
            "log_p": judged.value,
            "log_p_stderr": judged.mc_stderr,
            "log_p_data_stderr": judged.data_stderr,
            "bias": judged.bias,
            "khat_ok": judged.khat_ok,
            "reference_samples": reference,
            "reference_log_p": best.value,
            "reference_stderr": best.mc_stderr,
            "reference_bias": best.bias,
            "reference_khat_ok": best.khat_ok,
            "curve": {"num_samples": list(best.curve.num_samples), "value": best.curve.value.tolist(),
                      "stderr": best.curve.mc_stderr.tolist()},
        }  # fmt: skip
        self.arrays |= {"pareto_k": best.pareto_k, "log_p": best.pointwise, "images": self._chunk(0, total)[0],
                        "khat_limit": khat_limit(reference)}  # fmt: skip
        self._shortfall()
        less = "" if count == self.asked else f" (asked for {self.asked}, which did not fit)"
        of = "" if reference == count else f", beside K = {reference}"
        return (
            f"ELBO {nats(split['value'], error)} = {split['reconstruction']:.2f} - KL {split['kl']:.2f}; log p(x) "
            f"{nats(judged.value, judged.mc_stderr)} ({over_data(judged.data_stderr)}) nats; {total} data, "
            f"K = {count}{less}{of}"
        )

    def _shortfall(self) -> None:
        """What the estimate at the K that was asked for lacks, by the best that is known."""
        assert self.estimates is not None
        (judged, best), numbers = self.estimates, self.numbers["bounds"]
        pooled = self.found_gaps
        curve = best.curve
        assert curve is not None
        truth, noise, source = best.pointwise, torch.zeros_like(best.pointwise), f"that at K = {best.num_samples}"
        gaps_ok = pooled is not None and (math.isnan(pooled.khat_ok) or pooled.khat_ok >= 0.9)
        if pooled is not None and gaps_ok and best.khat_ok < 0.9:
            part = pooled.log_likelihood
            size = min(len(part.pointwise), len(judged.pointwise))
            truth, noise = part.pointwise[:size], part.pointwise_stderr[:size]
            source = "one that uses the best q of each datum too"
        size = len(truth)
        difference = truth - judged.pointwise[:size]
        if best.num_samples == judged.num_samples and source.startswith("that"):
            short, error = -judged.bias, judged.mc_stderr
            source = "its limit, by the jackknife"
        else:
            short = difference.mean().item() - (best.bias if source.startswith("that") and best.bias < 0 else 0.0)
            spread = difference.std().item() / math.sqrt(size) if size > 1 else math.nan
            error = math.hypot(spread, noise.square().sum().sqrt().item() / size)
        if best.num_samples > judged.num_samples and source.startswith("that"):
            # One draw of few samples is noisy: what they lack on average, the blocks of the larger K know.
            value, noise_there = _at(curve, judged.num_samples)
            short = curve.value[-1].item() - value + abs(best.bias)
            error = math.hypot(noise_there, best.mc_stderr)
        enough = None
        if best.khat_ok >= 0.9:
            # What the curve lacks at K', from its own end, whose bias the jackknife tells.
            lacks = curve.value[-1] - curve.value + abs(best.bias)
            good = [k for k, v in zip(curve.num_samples, lacks.tolist(), strict=True) if v <= 0.05]
            enough = good[0] if good else None
        numbers |= {"short": short, "short_stderr": error, "short_source": source, "enough": enough}

    def _latents(self) -> str:
        size = (self.numbers.get("bounds") or {}).get("images", min(self.count, 16))
        part = self._chunk(0, max(size, min(self.count, 16)))
        found: dict[str, Any] = {"images": len(part[0]) if isinstance(part[0], Tensor) else size}
        with self._piece():
            with seeded(self.seed):
                components = Components(self.model, self._chunk(0, 2))
            units = [
                active_units(self.model, self.guide, part, threshold=_UNUSED, site=name) for name in components.sites
            ]
            kl = kl_per_dimension(self.model, self.guide, part, device=self.device, seed=self.seed)
        variance = torch.cat([u.variance.double() for u in units])
        labels = components.names
        found |= {
            "active": sum(u.count for u in units),
            "latent_dim": len(variance),
            "threshold": _UNUSED,
            "dead": [label for label, v in zip(labels, variance.tolist(), strict=True) if v <= _UNUSED],
            "variance": dict(zip(labels, variance.tolist(), strict=True)),
            "rate": kl.total,
            "kl": dict(zip(kl.names, kl.value.tolist(), strict=True)),
            "kl_data_stderr": kl.data_stderr.tolist(),
        }
        self.numbers["latents"] = found
        if bool(variance.isnan().any()):  # nothing varies over one datum, and that says nothing of the latents
            found |= {"active": None, "dead": []}
            return f"rate {kl.total:.2f} nats; of one datum, which cannot say what moves with the data"
        return f"{found['active']} of {found['latent_dim']} active, rate {kl.total:.2f} nats; {found['images']} data"

    def _gaps(self) -> str:
        each = self.per_draw
        parts: list[Gaps] = []
        last, done = 0.0, 0
        for start, stop in self._pieces(4):
            work = (stop - start - done) * each * (1000 * STEP_SAMPLES * 3 + 2 * _GAP_SAMPLES)
            # Many data at once cost less than one by one: at most in proportion, and at least what they compute.
            if parts and not self._fits(min(last * (stop - start) / done, last + max(work, 0.0))):
                break
            began = self.clock()
            try:
                with self._piece():
                    parts.append(self._gap_piece(self._chunk(start, stop), {}, seed=self.seed + start))
            except _OutOfTime:
                if not parts:
                    raise
                break
            last, done = self.clock() - began, stop - start
        found = _joined_gaps(parts)
        self.found_gaps = found
        row = found.families["guide"]
        size = len(found.log_likelihood.pointwise)
        numbers: dict[str, Any] = {
            "images": size, "num_samples": found.num_samples, "source": found.source, "khat_ok": found.khat_ok,
            "bias": found.bias, "reason": row.reason, "log_p": found.log_likelihood.value,
            "log_p_stderr": found.log_likelihood.mc_stderr,
        }  # fmt: skip
        for name in ("inference", "approximation", "amortization"):
            part = getattr(row, name)
            numbers |= {name: None, f"{name}_stderr": None} if part is None else {
                name: part.value, f"{name}_stderr": part.mc_stderr, f"{name}_data_stderr": part.data_stderr
            }  # fmt: skip
        if row.remaining is not None and row.stopped is not None and row.steps is not None:
            numbers |= {"remaining": row.remaining.mean().item(), "stopped": row.stopped.double().mean().item(),
                        "steps": row.steps.mean().item()}  # fmt: skip
        self.numbers["gaps"] = numbers
        if "bounds" in self.numbers:
            self._shortfall()
        if row.approximation is None or row.amortization is None:
            return f"total {_said(row.inference)} nats; {size} data; {row.reason}"
        return (
            f"{_said(row.inference)} = {_said(row.approximation)} (family) + {_said(row.amortization)} (encoder) nats; "
            f"{size} data, K = {found.num_samples}, {numbers.get('steps', 0):.0f} steps"
        )

    def _gap_piece(self, args: tuple[Any, ...], families: Mapping[str, Any], **more: Any) -> Gaps:
        return gaps(
            self.model, self.guide, args, families=families, num_samples=_GAP_SAMPLES, num_steps=1000,
            window=_WINDOW, **(self.options | more),
        )  # fmt: skip

    def _remedy(self) -> str:
        found = self.numbers.get("gaps") or {}
        if not material(found.get("approximation"), found.get("approximation_stderr")):
            return ""
        assert self.found_gaps is not None
        size, least = min(16, found["images"]), min(4, found["images"])
        both, took = None, 0.0
        for stop in dict.fromkeys((least, size)):
            if both is not None and not self._fits(took * stop / least):
                break
            began = self.clock()
            try:
                with self._piece():
                    both = self._gap_piece(self._chunk(0, stop), {"FullNormal": FullNormal})
            except _OutOfTime:
                if both is None:
                    raise
            took = self.clock() - began
        assert both is not None
        own, full = both.families["guide"], both.families["FullNormal"]
        if own.optimum is None or full.optimum is None or own.approximation is None:
            return ""
        gain = full.optimum.pointwise - own.optimum.pointwise
        size = len(gain)
        error = math.hypot(full.optimum.mc_stderr, own.optimum.mc_stderr)
        self.numbers["remedy"] = {
            "family": "FullNormal", "images": size, "gain": gain.mean().item(), "gain_stderr": error,
            "approximation_before": own.approximation.value, "approximation": full.approximation.value
            if full.approximation else None,
        }  # fmt: skip
        return f"FullNormal, fitted to each datum, is {nats(gain.mean().item(), error)} nats better; {size} data"

    def _bracket(self) -> str:
        settings: dict[str, Any] = {"num_samples": _CHAINS, "observed": self.observed, **self.options}
        size = min(8, self.count)
        began = self.clock()
        start = "guide"
        try:
            with self._piece():
                found = bdmc(self.model, self.guide, self._chunk(0, size), num_data=size, num_steps=20, **settings)
        except ValueError:
            start, began = "prior", self.clock()
            with self._piece():
                found = bdmc(self.model, self.guide, self._chunk(0, size), num_data=size, num_steps=20, start=start,
                             **settings)  # fmt: skip
        took = self.clock() - began
        wanted = min(32, self.count)
        for steps in (500, 200, 100, 50):
            pilot = max(50, steps // 4)
            # In the worst case the time grows with the data as well as with the moves.
            if not self._fits(took * (pilot + 9 + 2 * steps) / 69 * (wanted / size) ** 0.5):
                continue
            try:
                with self._piece():
                    found = bdmc(self.model, self.guide, self._chunk(0, wanted), num_data=wanted, num_steps=steps,
                                 start=start, **settings)  # fmt: skip
            except _OutOfTime:
                pass
            break
        number = len(found.upper.pointwise)
        self.numbers["bracket"] = {
            "num_data": number, "num_steps": found.lower.num_steps, "num_chains": found.lower.num_samples,
            "start": start, "lower": found.lower.value, "lower_stderr": found.lower.mc_stderr,
            "upper": found.upper.value, "upper_stderr": found.upper.mc_stderr, "width": found.width.value,
            "width_stderr": found.width.data_stderr,
        }  # fmt: skip
        self.arrays |= {"bracket_lower": found.lower.pointwise, "bracket_upper": found.upper.pointwise,
                        "bracket_lower_stderr": found.lower.pointwise_stderr}  # fmt: skip
        if self.estimates is not None:
            count = self.estimates[0].num_samples
            with contextlib.suppress(_OutOfTime), self._piece():
                there = log_likelihood(self.model, self.guide, found.data, num_samples=count, **self.options)
                low, high = (b - there.pointwise for b in (found.lower.pointwise, found.upper.pointwise))
                self.numbers["bracket"] |= {
                    "importance": there.value, "short_of_lower": low.mean().item(),
                    "short_of_upper": high.mean().item(),
                    "short_stderr": low.std().item() / math.sqrt(number) if number > 1 else math.nan,
                }  # fmt: skip
        return f"{found}; {number} simulated data, {found.lower.num_steps} steps, {_CHAINS} chains from the {start}"

    def _calibration(self) -> str:
        settings: dict[str, Any] = {"num_samples": 99, "observed": self.observed, **self.options}
        began = self.clock()
        with self._piece():
            found = sbc(self.model, self.guide, self.args, num_data=100, **settings)
        took = self.clock() - began
        for size in (1000, 500, 200):
            if self._fits(took * size / 100):
                with contextlib.suppress(_OutOfTime), self._piece():
                    found = sbc(self.model, self.guide, self.args, num_data=size, **settings)
                break
        covered, _ = found.covered(0.9)
        self.numbers["calibration"] = {
            "num_data": len(found.ranks), "num_draws": found.num_samples, "calibrated": found.calibrated,
            "level": found.level, "names": list(found.names), "verdicts": list(found.verdicts),
            "p_value": found.adjusted.tolist(), "coverage_90": covered.tolist(), "coverage_worst": covered.min().item(),
        }  # fmt: skip
        self.arrays |= {"ranks": found.ranks, "num_draws": found.num_samples}
        bad = int((~found.passed).sum())
        said = "uniform ranks" if not bad else f"{bad} of {len(found.names)} latents not calibrated"
        return f"{said}; {len(found.ranks)} simulated data, {found.num_samples} draws each"


def _taken(data: Any, images: int, seed: int, programs: tuple[Program, ...]) -> tuple[Any, ...]:
    """The first data as one batch, drawn once for all stages."""
    parts: list[tuple[Any, ...]] = []
    size = 0
    with seeded(seed):
        for batch in Batches(data, images, shuffle=False, programs=programs):
            parts.append(batch)
            size += rows(batch)
            if size >= images:
                break
    if size < 1:
        raise ValueError("got no data as tensors, wanted at least one to judge by.")
    return at(joined(parts), slice(images))


def _joined(parts: list[Estimate]) -> Estimate:
    """One estimate of the data of several, of the same K."""
    sizes = [len(p.pointwise) for p in parts]
    total = sum(sizes)
    curves = [p.curve for p in parts if p.curve is not None]

    def mean(values: list[Any]) -> Any:
        return sum(n * v for n, v in zip(sizes, values, strict=True)) / total

    def error(values: list[Any]) -> Any:
        return sum((n * v) ** 2 for n, v in zip(sizes, values, strict=True)) ** 0.5 / total

    pointwise = torch.cat([p.pointwise for p in parts])
    return Estimate(
        value=pointwise.mean().item(),
        mc_stderr=error([p.mc_stderr for p in parts]),
        data_stderr=pointwise.std().item() / math.sqrt(total) if total > 1 else math.nan,
        bias=mean([p.bias for p in parts]),
        pointwise=pointwise,
        ess=torch.cat([p.ess for p in parts]),
        pareto_k=torch.cat([p.pareto_k for p in parts]),
        num_samples=parts[0].num_samples,
        curve=Curve(curves[0].num_samples, mean([c.value for c in curves]), error([c.mc_stderr for c in curves])),
    )


def _joined_gaps(parts: list[Gaps]) -> Gaps:
    """One split of the data of several."""
    rows = [p.families["guide"] for p in parts]
    left = None
    if all(r.remaining is not None for r in rows):
        left = torch.cat([r.remaining for r in rows if r.remaining is not None])

    def column(name: str, climbed: bool) -> Mean | None:
        found = [getattr(r, name) for r in rows]
        if any(f is None for f in found):
            return None
        variance = torch.cat([f.pointwise_stderr.square() for f in found])
        remains = left if climbed else None
        if remains is not None:
            variance = (variance - remains.square()).clamp(min=0)
        return Mean.of(torch.cat([f.pointwise for f in found]), variance, parts[0].num_samples, remains)

    def tensors(name: str) -> Tensor | None:
        found = [getattr(r, name) for r in rows]
        return None if any(f is None for f in found) else torch.cat(found)

    level = [p.log_likelihood for p in parts]
    sizes = [len(part.pointwise) for part in level]
    return Gaps(
        families={
            "guide": FamilyGaps(
                column("amortized", False), column("optimum", True), column("approximation", True),
                column("amortization", True), column("inference", False), left, tensors("slope"), tensors("steps"),
                tensors("stopped"), rows[0].reason,
            )
        },
        log_likelihood=Mean.of(
            torch.cat([p.pointwise for p in level]), torch.cat([p.pointwise_stderr.square() for p in level]),
            parts[0].num_samples,
        ),
        bias=sum(n * p.bias for n, p in zip(sizes, parts, strict=True)) / sum(sizes),
        pareto_k=torch.cat([p.pareto_k for p in parts]),
        source=parts[-1].source,
        num_samples=parts[0].num_samples,
    )  # fmt: skip


def _at(curve: Curve, count: int) -> tuple[float, float]:
    """A curve at any K, linear in log K, and its error: a quarter of the step between two points is added."""
    after = next(i for i, k in enumerate(curve.num_samples) if k >= count)
    if curve.num_samples[after] == count:
        return curve.value[after].item(), curve.mc_stderr[after].item()
    a, b = curve.num_samples[after - 1 : after + 1]
    share = math.log(count / a) / math.log(b / a)
    low, high = curve.value[after - 1 : after + 1].tolist()
    noise = curve.mc_stderr[after - 1 : after + 1].max().item()
    return low + share * (high - low), math.hypot(noise, (high - low) / 4)


def _said(part: Mean | None) -> str:
    return "unknown" if part is None else nats(part.value, part.mc_stderr)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
