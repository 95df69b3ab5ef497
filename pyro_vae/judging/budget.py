"""A pair under examination, and a budget of time that is kept: work in pieces of a fixed schedule, so that a seed gives
the same numbers, begun where they fit, and broken off where they did not."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from pyro.poutine.messenger import Messenger

from pyro_vae.inference.trees import at, rows
from pyro_vae.judging.evidence import Estimate
from pyro_vae.judging.results import Mean
from pyro_vae.traces import Program

R = TypeVar("R")


class OutOfTime(BaseException):
    """A piece of work ran past its end. No Exception, which a user's program may catch and go on."""


class Deadline(Messenger):
    """Breaks off whatever runs inside once its time is up: the clock is looked at at every sample statement."""

    def __init__(self, clock: Callable[[], float], end: float) -> None:
        super().__init__()
        self.clock, self.end = clock, end

    def _pyro_sample(self, msg: Any) -> None:
        if self.clock() > self.end:
            raise OutOfTime


class Budget:
    """Seconds, by a clock, for several stages, each of which has its share of what is left; some may be `spent`."""

    def __init__(self, seconds: float, clock: Callable[[], float], spent: float = 0.0) -> None:
        self.clock = clock
        self.started = clock() - spent
        self.end = self.stage_end = self.started + seconds

    @property
    def left(self) -> float:
        """Seconds left for this stage."""
        return self.stage_end - self.clock()

    def begin_stage(self, share: float) -> None:
        """Give a stage its share of the seconds that are left for it and those after it."""
        now = self.clock()
        self.stage_end = now + share * (self.end - now)
        if now >= self.end:
            raise OutOfTime

    def piece(self) -> Deadline:
        """What a piece of work of this stage runs under."""
        return Deadline(self.clock, self.stage_end)

    def fits(self, seconds: float) -> bool:
        """Whether work of so many seconds fits: half as much again, since a machine has other things to do."""
        return self.clock() + 1.5 * seconds <= self.stage_end


@dataclass
class Examination:
    """A pair under examination, what may be spent on it, and what later stages take from earlier ones."""

    model: Program
    guide: Program
    data: tuple[Any, ...]  # one batch, the arguments of both
    num_samples: int  # K that was asked for
    observed: Mapping[str, int] | None  # which argument each observed site is
    options: dict[str, Any]  # device, seed and progress of each estimate
    budget: Budget  # of time
    per_draw: float = 0.0  # seconds for one sample of one datum, in bulk
    judged: Estimate | None = None  # log p(x) at K
    better: Estimate | None = None  # log p(x) at more samples
    best: Mean | None = None  # one that uses the best q of each datum too, where it can be relied upon
    training: tuple[Any, ...] | None = None  # one batch of data that the pair was fitted to
    training_source: Any = None  # what they were taken from
    history: tuple[list[Mapping[str, Any]], bool] | None = None  # records, one per epoch; whether patience ended it
    piece: Callable[[str, Callable[[], Any]], Any] = lambda _, make: make()  # keeps what it makes under a name

    @property
    def num_data(self) -> int:
        """How many data there are."""
        return rows(self.data)

    def part(self, start: int, stop: int) -> tuple[Any, ...]:
        """Some of the data."""
        return at(self.data, slice(start, stop))

    def of(self, start: int, stop: int) -> tuple[Any, ...]:
        """The pair with some of the data, as every diagnostic takes them."""
        return self.model, self.guide, self.part(start, stop)

    def seeded(self, add: int) -> dict[str, Any]:
        """The options with another seed."""
        return self.options | {"seed": self.options["seed"] + add}

    def pieces(self, factor: int, work: Callable[[int, int], R], cost: Callable[[float, int, int], float]) -> list[R]:
        """What `work` made of the first 4 data, then of factor times as many, and so on, as long as there is time.

        `cost` gives seconds for a piece, by those of the one before, its size and that of the piece. OutOfTime where
        not even the first one could be done.
        """
        stops = [min(4, self.num_data)]
        while stops[-1] < self.num_data:
            stops.append(min(self.num_data, stops[-1] * factor))
        if len(stops) > 2 and stops[-1] - stops[-2] < 4:
            stops.pop(-2)
        found: list[R] = []
        took, size = 0.0, 0
        for start, stop in zip([0, *stops], stops, strict=False):
            if found and not self.budget.fits(cost(took, size, stop - start)):
                break
            began = self.budget.clock()
            try:
                with self.budget.piece():
                    found.append(work(start, stop))
            except OutOfTime:
                if not found:
                    raise
                break
            took, size = self.budget.clock() - began, stop - start
        return found
