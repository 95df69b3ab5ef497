"""What a run shows while it trains: how long it will take, and its pictures from the first epoch on."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pyro_vae.app import evaluation, report
from pyro_vae.app.defaults import FitOptions
from pyro_vae.app.runs import FIGURES, METRICS, WEIGHTS, write_lines
from pyro_vae.data import Dataset
from pyro_vae.inference.loop import EARLY
from pyro_vae.programs.vae import Answers

SHARE = 0.02  # of the time, for weights and pictures during the training
LONG = 60.0  # seconds from which on a fit says in lines how far it is, where no bar does


class Progress:
    """A callback of `fit`: after the first epoch, and then as often as 2 % of the time allow, the weights, the metrics
    and three pictures of the run as it stands are written. After ten steps it is said how long it will take, and,
    `in_lines`, at every tenth of the way of a fit of more than a minute how far it is.

    `plan` says how much is to be evaluated, for which `ahead` seconds are needed after the training.
    """

    def __init__(
        self, vae: Answers, dataset: Dataset, options: FitOptions, folder: Path, say: Callable[[str], None],
        going_on: bool = False, in_lines: bool = False,
    ) -> None:  # fmt: skip
        self.vae, self.dataset, self.options, self.folder, self.say = vae, dataset, options, folder, say
        self.plan = evaluation.plan(vae, dataset, options)
        self.ahead = self.plan.seconds
        self.records: list[dict[str, Any]] = []
        self.going_on, self.in_lines = going_on, in_lines
        self._started = time.perf_counter()
        self._spent = self._cost = 0.0
        self._drawn = -math.inf  # when the latest pictures were done
        self._resumed = 0  # epochs
        self._told = self._failed = self._long = False
        self._since: tuple[float, int | None] = (self._started, None)  # a moment, and the steps then to come

    def early(self, seconds: float, steps: int) -> None:
        """Say how long it will take, from the time of a step and the number of those to come."""
        now = time.perf_counter()
        self._since, measured = (now, steps), EARLY - EARLY // 2
        if self._drawn > now - seconds * measured:  # pictures fell into these steps, and come but rarely
            seconds -= self._cost / measured
        self._long = seconds * steps + self.ahead > LONG
        if not self._told:
            self._told = True
            self.say(f"{report.about(seconds * steps)} to train, {report.about(self.plan.seconds)} to evaluate")

    def tenth(self, steps: int, total: int, bound: float | None) -> None:
        """Say how far it is, after so many steps of all; the time left has the evaluation in it.

        By the time of the steps since the first ten, with all that was done between them.
        """
        if not self.in_lines:
            return
        epochs = self.options.epochs
        now = time.perf_counter()
        since, to_come = self._since
        before = steps if to_come is None else total - to_come
        if before == steps:  # in the first ten steps there is no other time than from the start
            since, before = self._started, total * self._resumed // epochs
        each = (now - since) / (steps - before)
        left = each * (total - steps) + self.ahead
        self._long = self._long or now - self._started + left > LONG
        if self._long:
            images = len(self.dataset.train) * epochs / total / max(each, 1e-9)
            told = "" if bound is None else f"bound {bound:.2f}, "
            epoch = -(-steps * epochs // total)
            self.say(f"epoch {epoch}/{epochs}: {told}{images:,.0f} images/s, {report.about(left)} left")

    def resumed(self, records: list[dict[str, Any]]) -> None:
        """Take up the records of a fit that goes on."""
        self.records = list(records)
        self._resumed = len(records)
        if records:
            self.say(f"going on after epoch {len(records)} of {self.options.epochs}")

    def __call__(self, record: Mapping[str, Any]) -> None:
        self.records.append(dict(record))
        now = time.perf_counter()
        if self._cost and self._spent + self._cost > SHARE * (now - self._started):
            return
        write_lines(self.folder / METRICS, self.records)
        self.vae.save(self.folder / WEIGHTS)
        if not self._failed:
            try:
                report.draw_progress(self.vae, self.dataset, self.records, self.options, self.folder / FIGURES)
            except Exception as error:  # a fit is worth more than its pictures, which are drawn again at its end
                self._failed = True
                self.say(f"no pictures during the training: {error}")
            else:
                if not self._cost and len(self.records) < self.options.epochs:
                    self.say(f"first pictures in {self.folder / FIGURES}")
        self._drawn = time.perf_counter()
        self._cost = self._drawn - now
        self._spent += self._cost
