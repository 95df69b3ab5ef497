"""A budget of time that is kept: work in pieces, begun where they fit, and broken off where they did not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pyro.poutine.messenger import Messenger


class OutOfTime(BaseException):
    """A piece of work ran past its end. No Exception, which a user's program may catch and go on."""


class Deadline(Messenger):
    """Breaks off whatever runs inside once its time is up: the clock is looked at at every sample statement.

    Args:
        clock: Gives seconds.
        end: By that clock.
    Raises:
        OutOfTime: The time is up.
    """

    def __init__(self, clock: Callable[[], float], end: float) -> None:
        super().__init__()
        self.clock, self.end = clock, end

    def _pyro_sample(self, msg: Any) -> None:
        if self.clock() > self.end:
            raise OutOfTime


class Budget:
    """Seconds for several stages, each of which has its share of what is left.

    Args:
        seconds: For all.
        clock: Gives seconds.
    """

    def __init__(self, seconds: float, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.started = clock()
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
