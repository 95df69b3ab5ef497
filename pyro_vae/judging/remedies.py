"""Advice is tried before it is given: remedies under the frozen model, fitted on some data and measured on others.

Each candidate is a guide of the same model: the present one trained on, a wider one or one of another family that start
from it, or the present one refined datum by datum. What it gains is the ELBO over that of the present one, paired by
datum, on data that no fit has seen. What helps is trained on together with the model, too, and its log p(x) compared
with that of the present pair trained on for as many steps, since longer training alone may be what helps.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pyro_vae.inference.batches import seeded
from pyro_vae.inference.training import fit
from pyro_vae.inference.trees import at, rows
from pyro_vae.judging.budget import Examination, OutOfTime
from pyro_vae.judging.estimates import elbo_terms, log_likelihood
from pyro_vae.judging.examinations import gaps_of
from pyro_vae.judging.guides import fit_guide
from pyro_vae.judging.results import Nats
from pyro_vae.judging.stages import Stages
from pyro_vae.judging.trials import Remedy
from pyro_vae.parts.likelihoods import Normal
from pyro_vae.parts.networks.dense import MLP
from pyro_vae.parts.posteriors.amortized import FullNormal
from pyro_vae.parts.posteriors.flow import IAF, Flow
from pyro_vae.programs.refined import Refined
from pyro_vae.programs.semi_amortized import SemiAmortized
from pyro_vae.protocols import has_head, support_name
from pyro_vae.traces import Program

_STEPS, _BATCH, _RATE, _SAMPLES = (1000, 500, 250, 100, 50), 64, 1e-3, 100
_FAMILIES: dict[str, Any] = {"full": FullNormal, "iaf": IAF}
_NO_TIME = "not enough time"
_BROKEN = (ValueError, NotImplementedError, RuntimeError, TypeError, KeyError, IndexError, AttributeError)


def examine_remedy(pair: Examination, stages: Stages) -> Remedy:
    """What remedies gain, where there is a gap that matters."""
    gaps, bounds, family = stages.gaps, stages.bounds, getattr(pair.model, "likelihood", None)
    # The scale of a normal likelihood may be a number that nobody learned, as in a mean squared error.
    scaled = isinstance(pair.model, nn.Module) and type(family) is Normal and not isinstance(family.scale, str)
    gap = gaps.inference if gaps.inference.known else bounds.better.minus(bounds.elbo)
    reason = "" if gap.material() else "not needed, since the gap costs nothing that matters"
    reason = reason if gap.known else "the gap is not known"
    if reason and not scaled:
        return Remedy(reason=reason)
    own = pair.training is None
    if own and pair.num_data < 2:
        return Remedy(reason="one datum cannot be fitted on and held out as well (give training data: training=)")
    half = pair.num_data // 2
    training = pair.part(0, half) if pair.training is None else pair.training
    held = pair.part(half, pair.num_data) if own else pair.data
    trial = _Trial(pair, training, held)
    names = [] if reason else _candidates(pair.guide, gaps.approximation.value > gaps.amortization.value)
    tried: dict[str, Nats] = {}
    failed: dict[str, list[str]] = {}  # names by what stood in their way
    fits = sum(name not in ("refine", "local") for name in names) + scaled
    trial.num_steps = pair.piece("remedy/steps", functools.partial(trial.settle, fits))
    for name in names:
        try:
            tried[name] = pair.piece(f"remedy/gain/{name}", functools.partial(trial.gain, name))
        except OutOfTime:
            failed.setdefault(_NO_TIME, []).append(name)
        except _BROKEN as error:
            failed.setdefault(" ".join(str(error).split()) or type(error).__name__, []).append(name)
    joint: dict[str, Nats] = {}
    # "train" always: of a rate that fell to nothing the curve is flat, however much is left to learn.
    helped = [name for name, gain in tried.items() if name in _MADE and (gain.material() or name == "train")]
    for name in ["scale"] * scaled + helped:
        try:
            joint[name] = trial.joint(name)
        except (OutOfTime, *_BROKEN):  # then what is known is that of the frozen model
            break
    tried |= {"scale": Nats()} if "scale" in joint else {}
    missed = tuple(f"{', '.join(names)}: {reason}" for reason, names in failed.items())
    if not tried:
        late = _NO_TIME in failed
        return Remedy(status="left out" if late else "not possible", late=late, reason="; ".join(missed), failed=missed)
    return Remedy(
        status="done", num_data=rows(held), tried=tuple(tried), gains=tuple(tried.values()), failed=missed,
        joint=tuple(joint.get(name, Nats()) for name in tried),
        num_steps=trial.num_steps, num_training=rows(training), own_data=own,
    )  # fmt: skip


def _learn_scale(model: Any, guide: Any, args: tuple[Any, ...]) -> None:
    """A learned scale in the place of the fixed one, started at the spread of x about its reconstruction."""
    old = model.likelihood
    with torch.no_grad():
        decoded = old(guide.posterior(guide.visible(*args)).sample())
        stretch = 1.0 if old.standardize is None else old.standardize.scale
        spread = ((args[0] - decoded.mean) / stretch).square().mean().sqrt().item()
    start = max(spread, 2 * old.minimum_scale)
    model.likelihood = Normal(old.decoder, "learned", initial_scale=start, minimum_scale=old.minimum_scale,
                              standardize=old.standardize).to(args[0])  # fmt: skip


def _candidates(guide: Program, family_first: bool) -> list[str]:
    """What can be tried with a guide, in the order of what is at fault."""
    refine = [] if isinstance(guide, Refined) else ["refine"]
    if not isinstance(guide, nn.Module):
        return ["local", *refine]
    posterior = _posterior(guide)
    if posterior is None:
        return ["train", *refine, "local"]
    bends = isinstance(posterior, Flow) or support_name(posterior) != "real"
    families = [name for name, family in _FAMILIES.items() if not (bends or isinstance(posterior, family))]
    fits = [*families, "train", "wider"] if family_first else ["train", "wider", *families]
    return [*refine, *fits]


def _posterior(guide: Any) -> Any:
    """A posterior of an encoder and a linear head, as `Amortized`; None where the guide has none."""
    found = getattr(guide, "posterior", None)
    able = has_head(found) and isinstance(found.head, nn.Linear)
    return found if able and isinstance(getattr(found, "encoder", None), nn.Module) else None


class _Trial:
    """Remedies of one pair, fitted on some data and measured on others."""

    def __init__(self, pair: Examination, training: tuple[Any, ...], held: tuple[Any, ...]) -> None:
        self.pair, self.training, self.held = pair, training, held
        self.num_steps = 0
        self._base: Tensor | None = None
        self._log_p: dict[str, Tensor] = {}

    def settle(self, fits: int) -> int:
        """How many steps there is time for, by a few that are timed."""
        budget = self.pair.budget
        if not fits:
            return 0
        times = []
        for steps in (2, 2, 12):  # of which the first pays for what comes once
            began = budget.clock()
            try:
                with budget.piece():
                    self._fit(copy.deepcopy(self.pair.guide), steps)
            except (OutOfTime, *_BROKEN):
                return 0
            times.append(budget.clock() - began)
        once, step = times[1], max(times[2] - times[1], 0.1 * times[2]) / 10
        return next((n for n in _STEPS if budget.fits((once + step * n) * (fits + 2))), 0)

    def gain(self, name: str) -> Nats:
        """What one remedy gains over the guide, on the data held out."""
        model, guide, budget = self.pair.model, self.pair.guide, self.pair.budget
        if name in ("local", "refine"):
            return self._local() if name == "local" else self._refined()
        if not self.num_steps:
            raise OutOfTime
        with budget.piece(), torch.enable_grad():
            with seeded(self.pair.options["seed"]):  # the same whatever was tried before
                candidate = _MADE[name](guide, at(self.training, slice(2)))
            self._fit(candidate, self.num_steps)
        with budget.piece():
            return self._over_base(self._elbo(model, candidate, self.held))

    def joint(self, name: str) -> Nats:
        """What log p(x) of held-out data gains where model and guide are then trained on together, as a fit would, over
        the present pair trained on for as many steps; of "train", which is that, over the pair as it is."""
        if not self.num_steps:
            raise OutOfTime
        before = self._after("" if name == "train" else "train")
        return paired(self._after(name) - before)

    def _after(self, name: str) -> Tensor:
        """log p(x) of the data held out, after a joint training with a remedy; of none as the pair is."""
        if name not in self._log_p:
            self._log_p[name] = self.pair.piece(f"remedy/log p/{name}", functools.partial(self._trained, name))
        return self._log_p[name]

    def _trained(self, name: str) -> Tensor:
        budget, model, guide = self.pair.budget, self.pair.model, self.pair.guide
        if name:
            with budget.piece(), torch.enable_grad():
                model, guide = copy.deepcopy((model, guide))
                few = at(self.training, slice(2 if name in _MADE else 256))
                with seeded(self.pair.options["seed"]):
                    if name == "scale":
                        _learn_scale(model, guide, few)
                    else:
                        guide = _MADE[name](guide, few)
                self._fit(guide, self.num_steps, model)
        with budget.piece():
            found = log_likelihood(model, guide, self.held, num_samples=_SAMPLES, **self.pair.options)
        return found.pointwise

    def _fit(self, guide: Any, steps: int, model: Any = None) -> None:
        count = min(rows(self.training), steps * _BATCH)
        # A split draws its noise afresh in every batch, as in the fit; what was drawn for good is overfitted sooner.
        again = getattr(self.pair.training_source, "subset", None)
        data = at(self.training, slice(count)) if again is None else again(slice(count))
        batch = min(_BATCH, count)
        epochs = math.ceil(steps / math.ceil(count / batch))
        run = functools.partial(fit_guide, self.pair.model) if model is None else functools.partial(fit, model)
        with torch.enable_grad():
            run(guide, data, epochs=epochs, batch_size=batch, learning_rate=_RATE,
                schedule="one-cycle", compile=False, **self.pair.options)  # fmt: skip

    def _elbo(self, model: Program, guide: Program, data: tuple[Any, ...]) -> Tensor:
        return elbo_terms(model, guide, data, num_samples=_SAMPLES, **self.pair.options).pointwise

    def _over_base(self, elbo: Tensor) -> Nats:
        if self._base is None:
            with self.pair.budget.piece():
                self._base = self._elbo(self.pair.model, self.pair.guide, self.held)
        return paired(elbo - self._base)

    def _refined(self) -> Nats:
        """No handler sees into the steps, so that they are begun only where they fit."""
        pair, budget = self.pair, self.pair.budget
        began = budget.clock()
        with budget.piece():
            one = SemiAmortized(pair.model, pair.guide, num_steps=1)
            self._elbo(pair.model, one, at(self.held, slice(4)))
        if not budget.fits(5 * (budget.clock() - began)):
            raise OutOfTime
        refined = SemiAmortized(pair.model, pair.guide)
        with budget.piece(), refined.kept():
            return self._over_base(self._elbo(pair.model, refined, self.held))

    def _local(self) -> Nats:
        """A full normal for each datum against the guide's own family for each datum: no encoder on either side."""
        with self.pair.budget.piece():
            both = gaps_of(self.pair, 0, min(16, self.pair.num_data), {"full": FullNormal})
        own, full = both.families["guide"], both.families["full"]
        if own.optimum is None or full.optimum is None:
            raise ValueError(own.reason or full.reason or "one of them has no local form")
        found = paired(full.optimum.pointwise - own.optimum.pointwise)
        return Nats(found.value, math.hypot(found.mc_stderr, own.optimum.mc_stderr, full.optimum.mc_stderr))


def paired(gain: Tensor) -> Nats:
    """A gain per datum, with the error of its mean for other data of the kind."""
    error = gain.std().item() / math.sqrt(len(gain)) if len(gain) > 1 else math.nan
    return Nats(gain.mean().item(), error, error)


class Beside(nn.Module):
    """Two encoders side by side: the features of both."""

    def __init__(self, encoder: nn.Module, other: nn.Module, features: int, more: int) -> None:
        super().__init__()
        self.encoder, self.other, self.out_features = encoder, other, features + more

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.encoder(x), self.other(x)], -1)


def _widened(guide: Any, args: tuple[Any, ...]) -> Any:
    """A copy of a guide with another encoder beside its own, whose features count for nothing yet."""
    result = copy.deepcopy(guide)
    posterior = _posterior(result)
    seen: list[Tensor] = []
    hook = posterior.encoder.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    try:
        with torch.no_grad():
            result(*args)
    finally:
        hook.remove()
    head = posterior.head
    linear = [part for part in posterior.encoder.modules() if isinstance(part, nn.Linear)]
    width = max([part.out_features for part in linear], default=head.in_features)
    other = MLP(tuple(seen[0].shape[1:]), [width, width], None).to(head.weight)
    wide = nn.Linear(head.in_features + width, head.out_features, bias=head.bias is not None).to(head.weight)
    with torch.no_grad():
        wide.weight.zero_()
        wide.weight[:, : head.in_features] = head.weight
        if head.bias is not None:
            wide.bias.copy_(head.bias)
    posterior.encoder, posterior.head = Beside(posterior.encoder, other, head.in_features, width), wide
    return result


def _of_family(family: Any, guide: Any, args: tuple[Any, ...]) -> Any:
    """A copy of a guide of another family, with its encoder, its means and its scales."""
    result = copy.deepcopy(guide)
    old = result.posterior
    new = family(old.encoder, old.latent_dim, features=old.head.in_features).to(old.head.weight)
    with torch.no_grad():
        both = min(2 * old.latent_dim, old.head.out_features)
        new.head.weight[:both] = old.head.weight[:both]
        if old.head.bias is not None:
            new.head.bias[:both] = old.head.bias[:both]
    result.posterior = new
    return result


_MADE: dict[str, Callable[[Any, tuple[Any, ...]], Any]] = {
    "train": lambda guide, _: copy.deepcopy(guide),
    "wider": _widened,
    **{name: functools.partial(_of_family, family) for name, family in _FAMILIES.items()},
}
