"""What a run shows while it trains: how long it will take, and its pictures from the first epoch on."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pyro_vae.app import evaluation, report
from pyro_vae.app.defaults import FitOptions
from pyro_vae.app.runs import FIGURES, METRICS, WEIGHTS, write_lines
from pyro_vae.data import Dataset
from pyro_vae.programs.vae import Answers

SHARE = 0.02  # of the time, for weights and pictures during the training


class Progress:
    """A callback of `fit`: after the first epoch, and then as often as 2 % of the time allow, the weights, the metrics
    and three pictures of the run as it stands are written.

    Args:
        vae: The pair.
        dataset: Its data.
        options: The configuration of the run.
        folder: The run folder.
        say: Takes a line.
        going_on: Whether an unfinished run is gone on with.
    Attributes:
        plan: How much is to be evaluated.
    """

    def __init__(
        self, vae: Answers, dataset: Dataset, options: FitOptions, folder: Path, say: Callable[[str], None],
        going_on: bool = False,
    ) -> None:  # fmt: skip
        self.vae, self.dataset, self.options, self.folder, self.say = vae, dataset, options, folder, say
        self.plan = evaluation.plan(vae, dataset, options)
        self.records: list[dict[str, Any]] = []
        self.going_on = going_on
        self._started = time.perf_counter()
        self._spent = self._cost = 0.0
        self._told = self._failed = False

    def early(self, seconds: float, steps: int) -> None:
        """Say how long it will take, from the time of a step and the number of those to come."""
        if not self._told:
            self._told = True
            self.say(f"{report.about(seconds * steps)} to train, {report.about(self.plan.seconds)} to evaluate")

    def resumed(self, records: list[dict[str, Any]]) -> None:
        """Take up the records of a fit that goes on."""
        self.records = list(records)
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
        self._cost = time.perf_counter() - now
        self._spent += self._cost
