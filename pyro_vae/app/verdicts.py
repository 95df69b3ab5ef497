"""What the numbers of a judgement mean, in plain words: numbers in, sentences out.

Two questions are kept apart. *Is the posterior right?* The ELBO is below log p(x) by the inference gap,
which is the family's (no member of it fits the posterior of a datum) and the encoder's (it does not
find the best member). *Is the estimate of log p(x) right?* What it lacks is the estimator's: too few
samples, or weights whose tail (k-hat) no number of samples would tame.

Something is said to be at fault only where its share is above twice its standard error and of a
size that matters: `RELEVANT` nats, and for a part of the gap a tenth of the whole. A fault is one
of the pair and not of the few data that were looked at, so that the error of a part of the gap has both
kinds in it: the Monte Carlo error, and what other data of the kind would give.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

RELEVANT = 0.05
Numbers = Mapping[str, Any]


@dataclass(frozen=True)
class Finding:
    """One sentence of a verdict.

    Attributes:
        about: "posterior", "latents", "estimate", "calibration" or "protocol".
        text: What was found.
        culprit: Who is at fault, "family", "encoder", "dead encoder", "collapse" or "estimator"; None
            where nobody is.
        advice: What to try next; empty where nothing need be.
    """

    about: str
    text: str
    culprit: str | None = None
    advice: str = ""

    def __str__(self) -> str:
        return f"{self.text} {self.advice}".strip()


def verdict(numbers: Numbers) -> tuple[Finding, ...]:
    """The findings of a judgement, the most important first.

    Args:
        numbers: Those of `judge`, by stage: "bounds", "gaps", "remedy", "latents", "bracket",
            "calibration"; any may be missing.
    Example:
        >>> gaps = {"images": 50, "inference": 0.61, "inference_stderr": 0.02, "approximation": 0.6,
        ...         "approximation_stderr": 0.02, "amortization": 0.01, "amortization_stderr": 0.02}
        >>> [finding.culprit for finding in verdict({"gaps": gaps}) if finding.culprit]
        ['family']
    """
    found = [*posterior(numbers), *latents(numbers), *estimate(numbers), *calibration(numbers)]
    found.sort(key=lambda finding: finding.culprit not in ("dead encoder", "collapse"))
    if not found:
        late = any(stage["status"] == "skipped" for stage in numbers.get("stages") or [])
        advice = "Give more time (budget)." if late else ""
        found = [Finding("protocol", "Nothing could be judged: see the stages for the reasons.", None, advice)]
    return tuple(found)


def material(value: float | None, stderr: float | None, size: float = RELEVANT) -> bool:
    """Whether a number is above twice its error and of a size that matters; an unknown error is none to rely on."""
    if not _known(value) or not _known(stderr):
        return False
    assert value is not None and stderr is not None
    return value > 2 * stderr and value > size


def unused(numbers: Numbers) -> bool:
    """Whether no latent moves with the data."""
    found = numbers.get("latents") or {}
    return found.get("active") == 0 and (found.get("latent_dim") or 0) > 0


def posterior(numbers: Numbers) -> list[Finding]:
    """Whose fault it is that the ELBO is below log p(x)."""
    found = numbers.get("gaps")
    if not found:
        return _total(numbers)
    total, error = found.get("inference"), found.get("inference_stderr")
    spread = found.get("inference_data_stderr")
    over = f"({found.get('images')} data" + (f"; ± {spread:.2f} for others)" if _known(spread) else ")")
    if found.get("approximation") is None:
        reason = found.get("reason") or "the guide has no local form"
        return [*_total(numbers), Finding("posterior", f"Family and encoder cannot be told apart: {reason}.")]
    if not material(total, error):
        text = f"The ELBO is {nats(total, error)} nats below log p(x) {over}"
        if not _known(error) or 2 * error > RELEVANT:
            return [
                Finding("posterior", f"{text}: too uncertain to be split.", None, "Judge more images, or more time.")
            ]
        return [Finding("posterior", f"{text}: the posterior approximation costs nothing that matters.")]
    size = max(RELEVANT, 0.1 * abs(total))
    parts = [(k, found[k], found[f"{k}_stderr"]) for k in ("approximation", "amortization")]
    (_, approximation, e1), (_, amortization, e2) = parts
    text = (
        f"Of the {nats(total, error)} nats between ELBO and log p(x) {over}, {nats(approximation, e1)} are the "
        f"family's and {nats(amortization, e2)} the encoder's."
    )
    findings = [Finding("posterior", text)]
    family = material(approximation, _both_errors(found, "approximation"), size)
    encoder = material(amortization, _both_errors(found, "amortization"), size)
    if encoder and unused(numbers):
        findings.append(_dead(numbers, amortization, e2))
    elif encoder:
        findings.append(
            Finding(
                "posterior",
                "The encoder does not find the best member of its family.",
                "encoder",
                "Train longer, widen the encoder, or refine its posterior datum by datum (SemiAmortized).",
            )
        )
    if family:
        findings.append(_family(numbers, approximation))
    if not family and not encoder:
        findings.append(
            Finding("posterior", "Which of the two it is, is within the errors.", None,
                    "Judge more images, or give more time.")
        )  # fmt: skip
    if _known(found.get("remaining")) and found["remaining"] > 0.5 * size:
        findings.append(
            Finding(
                "posterior",
                f"The search for the best members may still have risen by {found['remaining']:.2g} nats (it ended by "
                f"itself for {100 * found.get('stopped', 0):.0f} % of the data), which is in the errors.",
                None,
                "More time makes the split sharper.",
            )
        )
    return findings


def latents(numbers: Numbers) -> list[Finding]:
    """What the latents are used for: collapse, and latents that carry nothing."""
    found = numbers.get("latents")
    if not found:
        return []
    active, size, rate = found.get("active"), found.get("latent_dim"), found.get("rate")
    carried = f" (rate {rate:.2f} nats)" if _known(rate) else ""
    if active is None or not size:
        return []
    if active == 0:
        gaps = numbers.get("gaps") or {}
        bounds = numbers.get("bounds") or {}
        if material(gaps.get("amortization"), gaps.get("amortization_stderr")):
            # A part of the gap too small to blame an encoder for still tells that the posterior is not q.
            told = [finding for finding in posterior(numbers) if finding.culprit == "dead encoder"]
            return [] if told else [_dead(numbers, gaps["amortization"], gaps["amortization_stderr"])]
        if gaps.get("amortization") is not None:
            if 2 * (gaps.get("amortization_stderr") or math.inf) > 5 * RELEVANT:
                return [Finding("latents", f"No latent moves with the data{carried}; whether the posterior does is "
                                "within the errors.", None, "Judge more images, or give more time.")]  # fmt: skip
            return [
                Finding(
                    "latents",
                    f"No latent moves with the data{carried}, and no member of the family does better for any: it is "
                    "not the encoder that failed, this decoder makes no use of z (posterior collapse).",
                    "collapse",
                    "Train anew with a KL warm-up or free bits, or weaken the decoder.",
                )
            ]
        gap = _minus(bounds.get("reference_log_p"), bounds.get("elbo"))
        error = math.hypot(bounds.get("reference_stderr") or 0.0, bounds.get("elbo_stderr") or 0.0)
        if gap is not None and material(gap, error):
            return [_dead(numbers, gap, error)]
        return [
            Finding(
                "latents",
                f"No latent moves with the data{carried}: the latents are not used. Whether the encoder failed or the "
                "decoder makes no use of z could not be told, for want of the gaps.",
                "collapse",
                "Train anew with a KL warm-up or free bits.",
            )
        ]
    dead = found.get("dead") or []
    text = f"{active} of {size} latents move with the data{carried}"
    if not dead:
        return [Finding("latents", f"{text}.")]
    listed = ", ".join(dead[:6]) + (f" and {len(dead) - 6} more" if len(dead) > 6 else "")
    advice = "That costs nothing but time: a smaller latent_dim would do, or free bits to use them."
    return [Finding("latents", f"{text}; unused: {listed}.", None, advice)]


def estimate(numbers: Numbers) -> list[Finding]:
    """Whether the estimate of log p(x) at the K that was asked for can be relied upon."""
    found = numbers.get("bounds")
    if not found or found.get("log_p") is None:
        return []
    count, short, error = found["num_samples"], found.get("short"), found.get("short_stderr")
    value = f"log p(x) = {nats(found['log_p'], found.get('log_p_stderr'))} nats at K = {count}"
    source = found.get("short_source", "the best estimate")
    ok = found.get("reference_khat_ok")
    tail = _known(ok) and ok < 0.9
    findings = []
    mended = unused(numbers) and any(f.culprit == "dead encoder" for f in [*posterior(numbers), *latents(numbers)])
    if material(short, error):
        lacking = f"{value} falls {nats(short, error)} short of {source}"
        if mended:
            findings.append(Finding("estimate", f"{lacking}: a consequence of the dead encoder."))
        elif tail and not found.get("enough"):
            findings.append(
                Finding(
                    "estimate",
                    f"{lacking}, and k̂ is too large for {100 * (1 - ok):.0f} % of the data: the guide misses mass of "
                    "the posterior, so a larger K helps slowly.",
                    "estimator",
                    "Anneal (ais), or mend the guide first.",
                )
            )
        else:
            enough = found.get("enough")
            advice = f"Increase it to K = {enough}." if enough else "Increase it tenfold, or anneal (ais)."
            findings.append(Finding("estimate", f"{lacking}: K = {count} is too small.", "estimator", advice))
    elif tail:
        findings.append(
            Finding(
                "estimate",
                f"{value}: k̂ is too large for {100 * (1 - ok):.0f} % of the data, whose estimates may be too low "
                "though nothing better was found here.",
                None,
                "Anneal (ais) where the last tenth of a nat matters.",
            )
        )
    elif _known(short) and _known(error) and short + 2 * error > 3 * RELEVANT:
        text = f"{value}: what it lacks, {nats(short, error)} nats, is within the errors."
        findings.append(Finding("estimate", text, None, "Increase K, or judge more images."))
    elif _known(short):
        findings.append(Finding("estimate", f"{value} can be relied upon: it lacks {nats(short, error)} nats."))
    else:
        findings.append(Finding("estimate", f"{value}: how much it lacks is not known.", None,
                                "Give more time, or more images."))  # fmt: skip
    return findings + _bracket(numbers)


def calibration(numbers: Numbers) -> list[Finding]:
    """What simulation-based calibration says of the guide's uncertainty."""
    found = numbers.get("calibration")
    if not found:
        return []
    over = f"on {found['num_data']} data simulated from the model"
    if found["calibrated"] and unused(numbers):
        return [
            Finding("calibration", f"The guide passes calibration {over}, which says nothing here: a guide that is the "
                    "prior always does.")
        ]  # fmt: skip
    if found["calibrated"]:
        return [Finding("calibration", f"The guide's uncertainty is calibrated {over}, as far as these can show.")]
    bad = {n: v for n, v in zip(found["names"], found["verdicts"], strict=True) if v != "calibrated"}
    kinds = {kind: [n for n, v in bad.items() if v == kind] for kind in dict.fromkeys(bad.values())}
    listed = "; ".join(f"{kind} in {_few(names)}" for kind, names in kinds.items())
    worst = found.get("coverage_worst")
    covers = f" (90 % intervals cover down to {100 * worst:.0f} %)" if _known(worst) and "too narrow" in kinds else ""
    return [Finding("calibration", f"The guide's uncertainty is not calibrated {over}: {listed}{covers}.")]


def nats(value: float | None, stderr: float | None = None) -> str:
    """A number with its error, to two decimals or as many as the error needs."""
    if not _known(value):
        return "unknown"
    if not _known(stderr):
        return f"{value:.2f}"
    assert stderr is not None and value is not None
    digits = 2 if stderr >= 0.005 or stderr == 0 else min(4, -math.floor(math.log10(stderr)))
    return f"{value:.{digits}f} ± {stderr:.{digits}f}"


def _total(numbers: Numbers) -> list[Finding]:
    bounds, gaps = numbers.get("bounds") or {}, numbers.get("gaps") or {}
    total, error = gaps.get("inference"), gaps.get("inference_stderr")
    if total is None:
        total = _minus(bounds.get("reference_log_p"), bounds.get("elbo"))
        error = math.hypot(bounds.get("reference_stderr") or math.nan, bounds.get("elbo_stderr") or math.nan)
    if not _known(total):
        return []
    text = f"The ELBO is {nats(total, error)} nats below the best estimate of log p(x)."
    if numbers.get("gaps"):
        return [Finding("posterior", text)]
    return [Finding("posterior", f"{text} Whose fault that is was not found out.", None, "Give more time.")]


def _dead(numbers: Numbers, gain: float, error: float) -> Finding:
    rate = (numbers.get("latents") or {}).get("rate")
    paid = rate is not None and _known(rate) and rate > RELEVANT
    says = f" (and pays a KL of {rate:.2f} nats)" if paid else " (KL about 0)"
    return Finding(
        "posterior",
        f"The encoder is dead: q(z | x) does not depend on x{says}, though the posterior does, since a q fitted to "
        f"each datum would gain {nats(gain, error)} nats.",
        "dead encoder",
        "That is a failed training, not a collapsed optimum: check that gradients reach the encoder, lower the "
        "learning rate or warm up the KL, and fit the guide again (fit_guide).",
    )


def _family(numbers: Numbers, approximation: float) -> Finding:
    text = "The family cannot take the posterior's shape."
    remedy = numbers.get("remedy")
    if remedy and material(remedy.get("gain"), remedy.get("gain_stderr")):
        share = min(1.0, remedy["gain"] / max(remedy["approximation_before"], 1e-12))
        gained = f"A normal of full covariance gains {nats(remedy['gain'], remedy['gain_stderr'])} nats of it"
        if share >= 0.7:
            return Finding("posterior", f"{text} {gained}: the posterior is correlated.", "family", "Try FullNormal.")
        advice = "Try a flow (IAF, NSF), which bends too."
        return Finding("posterior", f"{text} {gained}, {100 * share:.0f} %.", "family", advice)
    if remedy and _known(remedy.get("gain")):
        return Finding("posterior", f"{text} A full covariance gains {nats(remedy['gain'], remedy['gain_stderr'])} "
                       "nats only.", "family", "Try a flow (IAF, NSF), or a mixture.")  # fmt: skip
    return Finding("posterior", text, "family", "Try FullNormal or IAF.")


def _bracket(numbers: Numbers) -> list[Finding]:
    found = numbers.get("bracket")
    if not found:
        return []
    width, error = found["width"], found.get("width_stderr")
    where = f"On {found['num_data']} data simulated from the model"
    known = f"{where} annealing brackets log p(x) to {nats(width, error)} nats"
    low, high, noise = (found.get(k) for k in ("short_of_lower", "short_of_upper", "short_stderr"))
    if material(low, noise):
        said = f", and the importance-sampling estimate is at least {nats(low, noise)} nats too low there"
        return [Finding("estimate", f"{known}{said}.")]
    if not _known(error) or width + 2 * error > 0.2:
        text = f"{known}, too wide to certify a tenth of a nat."
        return [Finding("estimate", text, None, "Anneal longer (bdmc), or give more time.")]
    said = f"; the importance-sampling estimate is within {abs(high):.2f} of its upper end" if _known(high) else ""
    return [Finding("estimate", f"{known}{said}.")]


def _both_errors(found: Numbers, name: str) -> float | None:
    """Of a part of the gap, as an answer for all data of the kind."""
    stderr, spread = found.get(f"{name}_stderr"), found.get(f"{name}_data_stderr")
    return math.hypot(stderr, spread) if stderr is not None and _known(spread) and spread is not None else stderr


def _few(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _known(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _minus(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b
