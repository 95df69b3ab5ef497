"""What a verdict says of the training, and of remedies that were tried: those that helped, by how much they did."""

from __future__ import annotations

from collections.abc import Iterator

from pyro_vae.judging.advice import Finding
from pyro_vae.judging.results import RELEVANT, Nats, listed
from pyro_vae.judging.stages import Stages
from pyro_vae.judging.trials import Remedy, Training

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
        helped.insert(0, _unfinished(curve))  # known of a joint training, as the others are not
    yield from helped
    for name, gain in remedy.harmful.items():
        text = f"{_WORDS[name]} helped under the frozen model, but trained on together with it"
        if not dict(zip(remedy.tried, remedy.gains, strict=True))[name].known:
            text = f"{_WORDS[name]} was tried: trained on together with it,"
        yield Finding("advice", f"{text} log p(x) of held-out data changed by {gain} nats: not advised.")
    for name, gain in remedy.idle.items():
        text = f"{_WORDS[name]} helped under the frozen model, but trained on together with it log p(x) of held-out"
        beyond = "" if name == "train" else " over the present pair trained on"
        yield Finding("advice", f"{text} data gained {gain} nats{beyond}, which is within the errors: not advised.")
    if remedy.done:
        gains = [(name, gain) for name, gain in zip(remedy.tried, remedy.gains, strict=True) if gain.known]
        advised = dict(remedy.ranked)
        idle = [f"{name} {gain}" for name, gain in gains if not gain.material() and name not in advised]
        if idle:
            text = f"No gain above twice its error and {RELEVANT} nats, so not advised: {listed(idle, 6)}"
            yield Finding("advice", f"{text} ({_where(remedy)}).")
        if helped and all(finding.remedy == "refine" for finding in helped) and not over:
            yield Finding("advice", "The model is not worth changing, its log p(x) stays what it is: leave it.")
        if not helped and not over:
            yield Finding("advice", "The pair is not worth changing for its gap: leave it as it is.")
    elif remedy.late or (remedy.status == "not possible" and remedy.reason):
        more = "Give more time (budget)." if remedy.late else ""
        yield Finding("advice", f"No remedy could be tried, so that none is advised: {remedy.reason}.", None, more)


def _helped(name: str, gain: Nats, remedy: Remedy) -> Finding:
    joint = "" if name == "refine" else " A joint training may behave otherwise."
    together = remedy.joint_gain(name)
    over = "the pair as it is" if name == "train" else "the present pair trained on for as many"
    known = dict(zip(remedy.tried, remedy.gains, strict=True))[name]
    if together.known and name == "train":
        where = f"{remedy.num_data}, held out; {remedy.num_steps} steps on {remedy.num_training} others"
        text = f"Model and guide trained on together, log p(x) of these data gained {together} nats ({where})."
        return Finding("advice", text, None, _WHAT[name], name)
    if together.known and not known.known:
        where = f"{remedy.num_data} held-out data after {remedy.num_steps} steps with the model"
        return Finding("advice", f"{_WORDS[name]} gained {together} nats of log p(x) over {over} ({where}).", None,
                       _WHAT[name], name)  # fmt: skip
    if together.known:
        joint = f" Trained on together with the model for as many steps, log p(x) of these data gained {together} nats"
        joint += f" over {over}."
    elif name == "refine":
        joint = " log p(x) stays what it is."
    text = f"{_WORDS[name]} gained {known} nats of ELBO ({_where(remedy)}).{joint}"
    return Finding("advice", text, None, _WHAT[name], name)


def _where(remedy: Remedy) -> str:
    data = "half of the data" if remedy.own_data else f"{remedy.num_training} training data"
    steps = f" after {remedy.num_steps} steps on {data}" if remedy.num_steps else ""
    return f"tried under the frozen model, on {remedy.num_data} held-out data{steps}"


def _unfinished(found: Training) -> Finding:
    curve = "validation" if found.curve == "validation" else "training"
    return Finding(
        "training",
        f"The training had not ended: the {curve} bound still rose by {found.rising} nats over the last fifth of "
        f"its {found.epochs} epochs (read off the curve, not tried).",
        "unfinished training",
        "Train longer.",
        "epochs",
        2 * found.epochs,
    )
