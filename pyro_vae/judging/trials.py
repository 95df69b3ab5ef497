"""What all stages of a judgement have in common, and the two that look beyond the pair: its training, and remedies."""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, TypeVar

from pyro_vae.judging._equality import Comparable
from pyro_vae.judging.results import RELEVANT, Nats, plain, typed

Status = Literal["done", "left out", "not possible"]
T = TypeVar("T", bound="Stage")


def tensor() -> Any:
    return field(default=None, compare=False, repr=False, metadata={"json": False})


@dataclass(frozen=True, eq=False, kw_only=True)
class Stage(Comparable):
    """What all stages have: whether they were done and why not, seconds taken, and the number of data looked at.

    `late` says that a stage was left out for want of time.
    """

    title: ClassVar[str]
    share: ClassVar[float]  # of the budget of time

    status: Status = "left out"
    reason: str = ""
    late: bool = False
    seconds: float = field(default=0.0, compare=False)
    num_data: int = 0

    @property
    def done(self) -> bool:
        """Whether it was done."""
        return self.status == "done"

    def summary(self) -> str:
        """What was found, in a sentence."""
        raise NotImplementedError

    def __str__(self) -> str:
        return self.summary() if self.done else f"{self.status}: {self.reason}"

    def to_dict(self) -> dict[str, Any]:
        """Plain data; numbers that are not finite are None."""
        names = [f.name for f in dataclasses.fields(self) if f.metadata.get("json", True)]
        return {name: plain(getattr(self, name), finite=True) for name in names}

    @classmethod
    def from_dict(cls: type[T], values: dict[str, Any]) -> T:
        """From what `to_dict` gave."""
        kinds = typing.get_type_hints(cls)
        return cls(**{name: typed(kinds[name], value) for name, value in values.items()})


@dataclass(frozen=True, eq=False, kw_only=True)
class Training(Stage):
    """What the fit says of itself: whether it had ended, went too far, and fits data that it has not seen.

    Attributes:
        epochs, best_epoch: How many there were, and the one of the best validation bound; None without validation.
        curve: What the trend is read off: "validation", or else the "training" batches.
        rising: Nats that the curve rose by over its last fifth.
        fallen: Nats that the validation bound, averaged over some epochs, lies below its best at the end.
        longest_wait: The most epochs that went by without a better validation bound before the best one came.
        stopped_early: Whether patience ended the fit.
        train, held: The ELBO of training data and of the data that are judged, in evaluation mode, at one protocol.
        shortfall: What the latter lacks, which is of two sets of data: its error is that for their populations.
    """

    title = "training"
    share = 0.05

    epochs: int = 0
    best_epoch: int | None = None
    curve: str = ""
    rising: Nats = Nats()
    fallen: Nats = Nats()
    longest_wait: int = 0
    stopped_early: bool = False
    train: Nats = Nats()
    held: Nats = Nats()
    shortfall: Nats = Nats()

    def summary(self) -> str:
        words = []
        if self.epochs:
            words.append(f"{self.epochs} epochs" + (", stopped early" if self.stopped_early else ""))
        if self.best_epoch is not None:
            words.append(f"best validation after {self.best_epoch}, {self.fallen} nats above the end")
        if self.rising.known:
            words.append(f"the {self.curve} bound rose by {self.rising} nats over the last fifth")
        if self.shortfall.known:
            words.append(f"ELBO {self.train} of training data, {self.held} of others ({self.shortfall} less)")
        return "; ".join(words)


@dataclass(frozen=True, eq=False, kw_only=True)
class Remedy(Stage):
    """What remedies gain that were tried under the frozen model: fitted on some data, measured on others.

    Attributes:
        tried: Their names: "train" (the encoder alone goes on), "wider", "full" and "iaf" (a wider encoder or another
            family, that starts as the present one), "refine" (`SemiAmortized`), "local" (a full normal fitted to each
            datum, where the guide cannot be copied), "scale" (a learned one, which is tried with the model alone).
        gains: ELBO over that of the guide, paired by datum; both errors in one. Not known of "scale".
        joint: What log p(x) gained where model and guide were then trained on together, over the present pair trained
            on for as many steps (of "train" over the pair as it is).
        failed: Which could not be tried, and why; those of one reason together.
        num_steps: Steps of each fit.
        num_training: Data that they were fitted on.
        own_data: Whether those are the other half of the data that are judged, for want of training data.
    """

    title = "remedies tried"
    share = 0.4

    tried: tuple[str, ...] = ()
    gains: tuple[Nats, ...] = ()
    joint: tuple[Nats, ...] = ()
    failed: tuple[str, ...] = ()
    num_steps: int = 0
    num_training: int = 0
    own_data: bool = False

    @property
    def gained(self) -> dict[str, Nats]:
        """What the ELBO gained under the frozen model, by name."""
        return dict(zip(self.tried, self.gains, strict=True))

    @property
    def ranked(self) -> tuple[tuple[str, Nats], ...]:
        """What helped by two standard errors and a size that matters, the most helpful first: what log p(x) is known to
        gain from, what the ELBO gains from under this model, and last what is for its posterior alone."""
        found = []
        for name, gain in self.gained.items():
            together = self.joint_gain(name)
            if together.known:
                if together.value >= 2 * together.mc_stderr and together.value > RELEVANT:
                    found.append((0, name, together))
            elif gain.material():
                found.append((2 if name == "refine" else 1, name, gain))
        return tuple((name, gain) for _, name, gain in sorted(found, key=lambda each: (each[0], -each[2].value)))

    @property
    def idle(self) -> dict[str, Nats]:
        """What helped the ELBO under the frozen model, and log p(x) in a joint training not beyond its error."""
        found = {name: self.joint_gain(name) for name, gain in self.gained.items() if gain.material()}
        settled = {*dict(self.ranked), *self.harmful}
        return {name: joint for name, joint in found.items() if joint.known and name not in settled}

    @property
    def harmful(self) -> dict[str, Nats]:
        """What lowered log p(x) in a joint training, by more than two standard errors."""
        found = {name: self.joint_gain(name) for name, gain in self.gained.items() if gain.material() or not gain.known}
        return {name: joint for name, joint in found.items() if joint.value < -2 * joint.mc_stderr}

    def joint_gain(self, name: str) -> Nats:
        """What log p(x) gained in a joint training."""
        return dict(zip(self.tried, self.joint, strict=False)).get(name, Nats())

    def summary(self) -> str:
        gains = ", ".join(f"{n} {gain}" for n, gain in self.gained.items() if gain.known) or "nothing tried under it"
        where = "half of these data" if self.own_data else f"{self.num_training} training data"
        missed = f"; not tried: {'; '.join(self.failed)}" if self.failed else ""
        fits = f"; {self.num_steps} steps on {where}, model frozen" if self.num_steps else ""
        joint = ", ".join(f"{n} {self.joint_gain(n)}" for n in self.tried if self.joint_gain(n).known)
        together = f"; log p(x) gained in joint training: {joint} nats" if joint else ""
        return f"ELBO gained: {gains} nats{together}; {self.num_data} data{fits}{missed}"
