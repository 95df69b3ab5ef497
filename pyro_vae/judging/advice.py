"""Remedies in a verdict: those that helped where they were tried, by how much, and what to type for them: a command,
made from a run where there is one, and a line of Python."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pyro_vae.judging.quotes import listed
from pyro_vae.judging.results import RELEVANT, Nats
from pyro_vae.judging.stages import Stages
from pyro_vae.judging.trials import Remedy, Training

About = Literal["posterior", "latents", "estimate", "calibration", "protocol", "training", "advice"]
Culprit = Literal[
    "family", "encoder", "dead encoder", "collapse", "estimator", "overfitting", "unfinished training"
]  # fmt: skip


MORE_TIME = "Give more time (budget)."


@dataclass(frozen=True)
class Finding:
    """One sentence of a verdict.

    Attributes:
        about: What it is about.
        text: What was found.
        culprit: Who is at fault; None where nobody is.
        advice: What to try next; empty where nothing need be.
        remedy: The name of what to try (see `commands`); empty where there is none that can be typed.
        value: Its number, such as epochs.
        command: What to type.
        python: The same as a line of Python, with `pv` for pyro_vae.
    """

    about: About
    text: str
    culprit: Culprit | None = None
    advice: str = ""
    remedy: str = ""
    value: int | None = None
    command: str = ""
    python: str = ""

    def __str__(self) -> str:
        return f"{self.text} {self.advice}".strip()

    def typed(self, run: str | None = None, options: Mapping[str, Any] | None = None) -> Finding:
        """With its command and line of Python, for a run and its configuration where there is one."""
        if not self.remedy:
            return self
        command, python = commands(self.remedy, self.value, run, options)
        return dataclasses.replace(self, command=command, python=python)


def commands(
    remedy: str, value: int | None = None, run: str | None = None, options: Mapping[str, Any] | None = None
) -> tuple[str, str]:
    """A remedy as a command and as a line of Python.

    Args:
        remedy: "train", "epochs" (train longer), "wider", "full", "iaf" (another family), "local" (as "full"),
            "scale" (learned), "refine", "patience", "warm-up", "samples", "data" (judge more).
        value: Its number: epochs, K of "samples", how many "data".
        run: The run folder; None for a command of a run that is still to be named.
        options: Its configuration.
    Example:
        >>> commands("wider", None, "runs/frey-1", {"hidden": [400, 200], "epochs": 300})[0]
        'pyro-vae fit --config runs/frey-1/config.json --hidden 800,400 --patience 60'
        >>> commands("refine")
        ('pyro-vae evaluate RUN --refine semi-amortized', 'guide = pv.SemiAmortized(model, guide)')
    """
    given, place = options or {}, "RUN" if run is None else shlex.quote(run)
    start = "pyro-vae fit" if run is None else f"pyro-vae fit --config {place}/config.json"
    epochs, build = int(given.get("epochs", 100)), "vae = pv.VAE.build(x_shape, "
    patient = f" --patience {_patience(epochs)}"
    fitted, fit = "pv.fit(vae.model, vae.guide, data)", "pv.fit(model, guide, data"
    match remedy:
        case "train" | "epochs":
            longer = value or 2 * epochs
            python = f"{fit}, validation=validation, epochs={longer}, patience={_patience(longer)})"
            return f"{start} --epochs {longer} --patience {_patience(longer)}", python
        case "wider":
            hidden = [2 * int(width) for width in given.get("hidden") or (400, 200)]
            change = f"--hidden {','.join(map(str, hidden))}"
            return f"{start} {change}{patient}", f"{build}hidden={tuple(hidden)}); {fitted}"
        case "full" | "local" | "iaf":
            name = "iaf" if remedy == "iaf" else "full"
            # The options of one family are not those of another.
            change = f"--posterior {name}" + (' --posterior-options ""' if given.get("posterior_options") else "")
            return f"{start} {change}{patient}", f'{build}posterior="{name}"); {fitted}'
        case "refine":
            return f"pyro-vae evaluate {place} --refine semi-amortized", "guide = pv.SemiAmortized(model, guide)"
        case "scale":
            python = f'{build}likelihood="normal", scale="learned"); pv.fit(vae, data)'
            return f"{start} --scale learned{patient}", python
        case "patience":
            usual = value or _patience(epochs)
            return f"{start} --patience {usual}", f"{fit}, validation=validation, patience={usual})"
        case "warm-up":
            warm = value or max(1, epochs // 4)
            return f"{start} --kl-warmup {warm}", f"{fit}, kl_warmup={warm})"
        case "samples":
            python = f"pv.log_likelihood(model, guide, data, num_samples={value})"
            return f"pyro-vae evaluate {place} -K {value}", python
        case "data":
            python = f"pv.judge(model, guide, data, num_data={value or 400}, budget=600)"
            return f"pyro-vae judge {place} --num-data {value or 400} --budget 600", python
    raise KeyError(remedy)


def _patience(epochs: int) -> int:
    """What goes back to the best weights where a longer or larger fit goes too far, and ends none of a usual one."""
    return max(20, epochs // 5)


_WORDS = {
    "train": "The encoder alone, trained on,",
    "wider": "A wider encoder, started from the present one,",
    "full": "A normal of full covariance, with the present encoder to start from,",
    "iaf": "An inverse autoregressive flow, with the present encoder to start from,",
    "refine": "A few gradient steps for each datum (SemiAmortized)",
    "local": "A normal of full covariance, fitted to each datum,",
    "scale": "A learned scale of the normal likelihood, in the place of its fixed one,",
}
_WHAT = {
    "train": "Train longer.", "wider": "Widen the networks.", "full": "Try FullNormal.", "local": "Try FullNormal.",
    "iaf": "Try a flow (IAF).", "scale": "Learn the scale.",
    "refine": "Refine its posterior datum by datum (SemiAmortized): nothing is fitted anew.",
}  # fmt: skip


def training(found: Training) -> Iterator[Finding]:
    """Overfitting, and what training data say beside others; a fit that had not ended is among the `remedies`."""
    if not found.done:
        return
    lacks = found.shortfall
    beside = ""
    if lacks.known:
        beside = f" The ELBO is {found.train} nats on training data and {found.held} on these ({lacks} less)."
    if overfitted(found):
        yield Finding(
            "training",
            f"It overfitted: the validation bound was best after {found.best_epoch} of {found.epochs} epochs, and "
            f"ended {found.fallen} nats lower.{beside}",
            "overfitting",
            "Stop there, and keep the best weights: that much is known to be gained, read off the curve of this fit.",
            "patience",
            max(10, found.longest_wait + 1),
        )
    elif lacks.material() and not found.stopped_early:
        fell = "the validation bound had not fallen, so that it is no reason to stop sooner"
        told = fell if found.best_epoch is not None else "whether to stop sooner a validation bound would tell"
        yield Finding("training", f"It fits training data better than others, by {lacks} nats; {told}.")
    elif found.stopped_early:
        yield Finding("training", f"Patience ended the fit, and went back to epoch {found.best_epoch}.{beside}")


def overfitted(found: Training) -> bool:
    """Whether the validation bound ended below its best, by more than its scatter and by what matters."""
    return found.done and found.fallen.material()


def remedies(stages: Stages) -> Iterator[Finding]:
    """What helped, the most helpful first; or that nothing is worth changing."""
    remedy, curve = stages.remedy, stages.training
    over = overfitted(curve)
    helped = [_helped(name, gain, remedy) for name, gain in remedy.ranked if not over or name == "refine"]
    if curve.done and curve.rising.material() and not over:
        which, epochs = "validation" if curve.curve == "validation" else "training", curve.epochs
        text = f"The training had not ended: the {which} bound still rose by {curve.rising} nats over the last fifth of"
        text += f" its {epochs} epochs (read off the curve, not tried)."
        end = Finding("training", text, "unfinished training", "Train longer.", "epochs", 2 * epochs)
        helped.insert(0, end)  # known of a joint training, as the others are not
    yield from helped
    for name, gain in remedy.harmful.items():
        text = f"{_WORDS[name]} helped under the frozen model, but trained on together with it"
        if not remedy.gained[name].known:
            text = f"{_WORDS[name]} was tried: trained on together with it,"
        yield Finding("advice", f"{text} log p(x) of held-out data changed by {gain} nats: not advised.")
    for name, gain in remedy.idle.items():
        text = f"{_WORDS[name]} helped under the frozen model, but trained on together with it log p(x) of held-out"
        beyond = "" if name == "train" else " over the present pair trained on"
        yield Finding("advice", f"{text} data gained {gain} nats{beyond}, which is within the errors: not advised.")
    if remedy.done:
        advised, gains = dict(remedy.ranked), remedy.gained.items()
        idle = [f"{n} {gain}" for n, gain in gains if gain.known and not gain.material() and n not in advised]
        if idle:
            text = f"No gain above twice its error and {RELEVANT} nats, so not advised: {listed(idle, 6)}"
            yield Finding("advice", f"{text} ({_where(remedy)}).")
        if helped and all(finding.remedy == "refine" for finding in helped) and not over:
            yield Finding("advice", "The model is not worth changing, its log p(x) stays what it is: leave it.")
        if not helped and not over:
            yield Finding("advice", "The pair is not worth changing for its gap: leave it as it is.")
    elif remedy.late or (remedy.status == "not possible" and remedy.reason):
        more = MORE_TIME if remedy.late else ""
        yield Finding("advice", f"No remedy could be tried, so that none is advised: {remedy.reason}.", None, more)


def _helped(name: str, gain: Nats, remedy: Remedy) -> Finding:
    known, together = remedy.gained[name], remedy.joint_gain(name)
    over = "the pair as it is" if name == "train" else "the present pair trained on for as many"
    if together.known and name == "train":
        where = f"{remedy.num_data}, held out; {remedy.num_steps} steps on {remedy.num_training} others"
        text = f"Model and guide trained on together, log p(x) of these data gained {together} nats ({where})."
    elif together.known and not known.known:
        where = f"{remedy.num_data} held-out data after {remedy.num_steps} steps with the model"
        text = f"{_WORDS[name]} gained {together} nats of log p(x) over {over} ({where})."
    else:
        text = f"{_WORDS[name]} gained {known} nats of ELBO ({_where(remedy)})."
        if together.known:
            text += " Trained on together with the model for as many steps, log p(x) of these data gained "
            text += f"{together} nats over {over}."
        else:
            text += " log p(x) stays what it is." if name == "refine" else " A joint training may behave otherwise."
    return Finding("advice", text, None, _WHAT[name], name)


def _where(remedy: Remedy) -> str:
    data = "half of the data" if remedy.own_data else f"{remedy.num_training} training data"
    steps = f" after {remedy.num_steps} steps on {data}" if remedy.num_steps else ""
    return f"tried under the frozen model, on {remedy.num_data} held-out data{steps}"
