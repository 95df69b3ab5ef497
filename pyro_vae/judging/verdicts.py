"""What the stages of a judgement mean, in plain words: typed results in, sentences out.

Something is said to be at fault only where its share is above twice its standard error and of a size that matters:
`RELEVANT` nats, and for a part of the gap a tenth of the whole. A fault is one of the pair and not of the few data that
were looked at, so that the error of a part of the gap has both kinds in it. Where the larger part of a gap is too
uncertain to say, that is said, and no smaller one is blamed for being known better. What to do is said of what was
tried (`advice`): a fault is no advice.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from pyro_vae.judging.advice import MORE_TIME, Finding, remedies, training
from pyro_vae.judging.quotes import listed
from pyro_vae.judging.results import RELEVANT, Nats
from pyro_vae.judging.stages import Bounds, Bracketed, Calibrated, Stages

_TIME, _DATA_OR_TIME = MORE_TIME, "Judge more data (num_data), or give more time (budget)."


def verdict(stages: Stages) -> tuple[Finding, ...]:
    """The findings of a judgement, of stages any of which may be left out, the most important first.

    Example:
        >>> from pyro_vae.judging.stages import GapSplit
        >>> gaps = GapSplit(status="done", num_data=50, inference=Nats(0.61, 0.02),
        ...                 approximation=Nats(0.6, 0.02), amortization=Nats(0.01, 0.02))
        >>> [finding.culprit for finding in verdict(Stages(gaps=gaps)) if finding.culprit]
        ['family']
    """
    dead = dead_encoder(stages)
    found = [*training(stages.training), *_posterior(stages, dead), *remedies(stages), *_latents(stages, dead)]
    found += [*_estimate(stages, dead), *_calibration(stages)]
    found.sort(key=lambda finding: finding.culprit not in ("dead encoder", "collapse", "overfitting"))
    found = [finding.typed() for finding in found]
    if not found:
        advice = _TIME if any(stage.late for stage in stages) else ""
        found = [Finding("protocol", "Nothing could be judged: see the stages for the reasons.", None, advice)]
    return tuple(found)


def dead_encoder(stages: Stages) -> Nats | None:
    """What a q fitted to each datum would gain where the encoder ignores x and should not; else None."""
    if not stages.latents.done or not stages.latents.none_active:
        return None
    # A part of the gap too small to blame an encoder for still tells that the posterior is not q.
    gain = stages.gaps.amortization if stages.gaps.split else stages.bounds.better.minus(stages.bounds.elbo)
    return gain if gain.material() else None


def _posterior(stages: Stages, dead: Nats | None) -> Iterator[Finding]:
    """Whose fault it is that the ELBO is below log p(x)."""
    gaps = stages.gaps
    if not gaps.done or not gaps.split:
        total = gaps.inference if gaps.inference.known else stages.bounds.better.minus(stages.bounds.elbo)
        text = f"The ELBO is {total} nats below the best estimate of log p(x)."
        if total.known and gaps.done:
            yield Finding("posterior", text)
        elif total.known:
            yield Finding("posterior", f"{text} Whose fault that is was not found out.", None, _TIME)
        if gaps.done:
            reason = gaps.unsplit or "the guide has no local form"
            yield Finding("posterior", f"Family and encoder cannot be told apart: {reason}.")
    elif not gaps.inference.material():
        text = f"The ELBO is {gaps.inference} nats below log p(x) {_over(stages)}"
        if 2 * gaps.inference.mc_stderr <= RELEVANT:
            yield Finding("posterior", f"{text}: the posterior approximation costs nothing that matters.")
        else:
            yield Finding("posterior", f"{text}: too uncertain to be split.", None, _DATA_OR_TIME)
    else:
        yield from _parts(stages, dead)
    if dead is not None:
        rate = stages.latents.rate
        paid = f" (and pays a KL of {rate:.2f} nats)" if rate > RELEVANT else " (KL about 0)"
        yield Finding(
            "posterior",
            f"The encoder is dead: q(z | x) does not depend on x{paid}, though the posterior does, since a q fitted to "
            f"each datum would gain {dead} nats.",
            "dead encoder",
            "That is a failed training, not a collapsed optimum: check that gradients reach the encoder, lower the "
            "learning rate or warm up the KL, and fit the guide again (fit_guide).",
        )


def _parts(stages: Stages, dead: Nats | None) -> Iterator[Finding]:
    """Family or encoder, where both parts of a gap that matters are known."""
    gaps = stages.gaps
    parts = {"family": gaps.approximation, "encoder": gaps.amortization}
    family, encoder = (f"{part} ({100 * part.value / gaps.inference.value:.0f} %)" for part in parts.values())
    text = f"Of the {gaps.inference} nats between ELBO and log p(x) {_over(stages)}, {family} are the family's"
    yield Finding("posterior", f"{text} and {encoder} the encoder's.")
    size = max(RELEVANT, 0.1 * abs(gaps.inference.value))
    faults = {name: part for name, part in parts.items() if part.of_population().material(size)}
    largest = max(parts, key=lambda name: parts[name].value)
    other = min(parts, key=lambda name: parts[name].value)
    ahead = parts[largest].value - parts[other].value
    clear = ahead > 2 * math.hypot(parts[largest].mc_stderr, parts[other].mc_stderr)  # of these data
    if (faults or clear) and largest not in faults and parts[largest].value > size:
        part, faults = parts[largest], {}
        few = f"on {gaps.num_data} data only: ± {part.of_population().mc_stderr:.2g} nats, which is too few to say."
        text = f"The {largest}'s share is the larger, {part.value:.3g} of {gaps.inference.value:.3g} nats, {few}"
        yield Finding("posterior", text, None, _DATA_OR_TIME, "data", max(100, 4 * gaps.num_data))
    elif not faults:
        yield Finding("posterior", "Which of the two it is, is within the errors.", None, _DATA_OR_TIME, "data")
    if "encoder" in faults and dead is None:
        yield Finding("posterior", "The encoder does not find the best member of its family.", "encoder")
    if "family" in faults:
        yield Finding("posterior", "The family cannot take the posterior's shape.", "family")
    if gaps.remaining > 0.5 * size:
        yield Finding(
            "posterior",
            f"The search for the best members may still have risen by {gaps.remaining:.2g} nats (it ended by "
            f"itself for {100 * gaps.stopped:.0f} % of the data), which is in the errors.",
            None,
            "More time makes the split sharper.",
        )


def _latents(stages: Stages, dead: Nats | None) -> Iterator[Finding]:
    """What the latents are used for: collapse, and latents that carry nothing."""
    latents, gaps = stages.latents, stages.gaps
    if not latents.done or not latents.latent_dim or latents.active is None:
        return
    carried = f" (rate {latents.rate:.2f} nats)" if math.isfinite(latents.rate) else ""
    if latents.active:
        text = f"{latents.active} of {latents.latent_dim} latents move with the data{carried}"
        if not latents.unused:
            yield Finding("latents", f"{text}.")
        else:
            advice = "That costs nothing but time: a smaller latent_dim would do, or free bits to use them."
            yield Finding("latents", f"{text}; unused: {listed(latents.unused, 6)}.", None, advice)
    if latents.active or dead is not None:
        return
    text, untried = f"No latent moves with the data{carried}", "(not tried here: that takes a fit of the pair)."
    if not gaps.split:
        text += ": the latents are not used. Whether the encoder failed or the decoder makes no use of z could not be "
        text += "told, for want of the gaps."
        advice = f"Train anew with a KL warm-up or free bits {untried}"
        yield Finding("latents", text, "collapse", advice, "warm-up")
    elif 2 * gaps.amortization.mc_stderr <= 5 * RELEVANT:
        text += ", and no member of the family does better for any: it is not the encoder that failed, this decoder "
        text += "makes no use of z (posterior collapse)."
        if "scale" in dict(stages.remedy.ranked):
            yield Finding("latents", f"{text} Its noise is set so large that z has nothing to say.", "collapse")
            return
        advice = f"Train anew with a KL warm-up or free bits, or weaken the decoder {untried}"
        yield Finding("latents", text, "collapse", advice, "warm-up")
    else:
        yield Finding("latents", f"{text}; whether the posterior does is within the errors.", None, _DATA_OR_TIME)


def _estimate(stages: Stages, dead: Nats | None) -> Iterator[Finding]:
    """Whether the estimate of log p(x) at the K that was asked for can be relied upon."""
    bounds = stages.bounds
    if not bounds.done:
        return
    missing, error = bounds.missing, bounds.missing.mc_stderr
    value = f"log p(x) {bounds.log_p.signed} nats at K = {bounds.num_samples}"
    heavy = bounds.better_khat_ok < 0.9
    share = f"k̂ is too large for {100 * (1 - bounds.better_khat_ok):.0f} % of the data"
    if missing.material():
        yield _too_low(bounds, f"{value} falls {missing} short of {bounds.comparison}", share if heavy else "", dead)
    elif heavy:
        yield Finding(
            "estimate",
            f"{value}: {share}, whose estimates may be too low though nothing better was found here.",
            None,
            "Anneal (ais) where the last tenth of a nat matters.",
        )
    elif not missing.known:
        yield Finding("estimate", f"{value}: how much it lacks is not known.", None, _DATA_OR_TIME)
    elif missing.value + 2 * error > 3 * RELEVANT:
        text = f"{value}: what it lacks, {missing} nats, is within the errors."
        yield Finding("estimate", text, None, "Increase K (num_samples), or judge more data (num_data).")
    else:
        yield Finding("estimate", f"{value} can be relied upon: it lacks {missing} nats.")
    if stages.bracket.done:
        yield _bracketed(stages.bracket)


def _too_low(bounds: Bounds, text: str, heavy: str, dead: Nats | None) -> Finding:
    """Why an estimate is too low."""
    if dead is not None:
        return Finding("estimate", f"{text}: a consequence of the dead encoder.")
    if heavy and bounds.enough is None:
        more = f"{text}, and {heavy}: the guide misses mass of the posterior, so a larger K helps slowly."
        return Finding("estimate", more, "estimator", "Anneal (ais), or mend the guide first.")
    advice = f"Increase it to K = {bounds.enough}." if bounds.enough else "Increase it tenfold, or anneal (ais)."
    more, count = f"{text}: K = {bounds.num_samples} is too small.", bounds.enough or 10 * bounds.num_samples
    return Finding("estimate", more, "estimator", advice, "samples", count)


def _bracketed(bracket: Bracketed) -> Finding:
    """How sure log p(x) is on data whose log p(x) is bounded from both sides."""
    width, low, high = bracket.width, bracket.below_lower, bracket.below_upper
    text = f"On {bracket.num_data} data simulated from the model annealing brackets log p(x) to {width} nats"
    if low.material():
        text += f", and the importance-sampling estimate is at least {low} nats too low there."
        return Finding("estimate", text)
    if not width.value + 2 * width.mc_stderr <= 0.2:
        advice = "Anneal longer (bdmc), or give more time (budget)."
        return Finding("estimate", f"{text}, too wide to certify a tenth of a nat.", None, advice)
    near = f"; the importance-sampling estimate is within {abs(high.value):.2f} of its upper end" if high.known else ""
    return Finding("estimate", f"{text}{near}.")


def _calibration(stages: Stages) -> Iterator[Finding]:
    """What simulation-based calibration says of the guide's uncertainty."""
    found = stages.calibration
    if not found.done:
        return
    over = f"on {found.num_data} data simulated from the model"
    text = f"The guide's uncertainty is calibrated {over}, as far as these can show."
    if not found.calibrated:
        text = f"The guide's uncertainty is not calibrated {over}: {_failing(found)}."
    elif stages.latents.none_active:
        text = f"The guide passes calibration {over}, which says nothing here: a guide that is the prior always does."
    yield Finding("calibration", text)


def _failing(found: Calibrated) -> str:
    """What the guide is, and for which components."""
    by_kind: dict[str, list[str]] = {}
    for name, kind in zip(found.names, found.verdicts, strict=True):
        if kind != "calibrated":
            by_kind.setdefault(kind, []).append(name)
    text = "; ".join(f"{kind} in {listed(names, 4)}" for kind, names in by_kind.items())
    if "too narrow" in by_kind and found.coverage_90:
        text += f" (90 % intervals cover down to {100 * min(found.coverage_90):.0f} %)"
    return text


def _over(stages: Stages) -> str:
    spread = stages.gaps.inference.data_stderr
    others = f"; ± {spread:.2f} for others" if math.isfinite(spread) else ""
    return f"({stages.gaps.num_data} data{others})"
