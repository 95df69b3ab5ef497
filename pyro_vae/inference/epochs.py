"""The epochs of a fit: each a record, validated, offered to patience, and written to the checkpoint."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from pyro_vae.evaluation import rests
from pyro_vae.inference import products
from pyro_vae.inference.batches import apart
from pyro_vae.inference.checkpoints import Checkpoint, previous
from pyro_vae.inference.choices import end_epoch
from pyro_vae.inference.loop import TIMED, Stepper
from pyro_vae.inference.optimizers import Fused
from pyro_vae.inference.ranks import alone
from pyro_vae.inference.records import BAR, Bar, Best, History
from pyro_vae.inference.trees import moved
from pyro_vae.turns import callback as in_callback


class Epochs:
    """The loop over epochs, from where `history` stands; `validate` scores the validation data."""

    def __init__(
        self, stepper: Stepper, modules: Sequence[nn.Module], epochs: int, patience: int | None,
        validate: Callable[[], float] | None, callback: Any,
    ) -> None:  # fmt: skip
        self.stepper, self.modules, self.epochs, self.patience = stepper, modules, epochs, patience
        self.validate, self.callback = validate, callback
        self.best, self.history = Best(modules), History()
        self.saved: Checkpoint | None = None
        self.products: dict[str, str] = {}  # the libraries that captured steps multiply by
        self.started = time.perf_counter()

    def go(self, quiet: bool | None) -> None:
        """Train to the end, or until patience runs out or Ctrl-C, and take up the best weights."""
        stepper, history = self.stepper, self.history
        stepper.listen(self.callback)
        with nullcontext() if stepper.ranks is None else stepper.ranks.together(), Bar(
            total=stepper.total, initial=stepper.steps, disable=quiet, bar_format=BAR, dynamic_ncols=True,
            desc=f"epoch {len(history) + 1}/{self.epochs}",
        ) as bar:  # fmt: skip
            bar.ahead = float(getattr(self.callback, "ahead", 0.0))
            try:
                while len(history) < self.epochs and not history.stopped_early:
                    self._epoch(len(history) + 1, bar)
            except KeyboardInterrupt:
                if stepper.ranks is not None and not stepper.ranks.stopping:
                    raise  # the others have not stopped at this step
                history.interrupted = True
            finally:
                stepper.release()
        if stepper.ranks is not None and stepper.ranks.stopping:  # also where it came after the last step
            history.interrupted = True
        history.best_epoch = len(history)
        if self.best.epoch and not history.interrupted:
            self.best.restore()
            history.best_epoch = self.best.epoch

    def _epoch(self, epoch: int, bar: Bar) -> None:
        stepper, history, ranks = self.stepper, self.history, self.stepper.ranks
        train(self.modules)  # a callback may have looked at pictures in evaluation mode
        bar.set_description(f"epoch {epoch}/{self.epochs}", refresh=False)
        stepper.batches.begin(epoch)
        if ranks is not None:  # the noise of each process is its own, and that of the epoch
            torch.manual_seed(apart(stepper.noise, epoch, ranks.rank))
        record: dict[str, Any] = {"epoch": epoch} | stepper.epoch(bar)
        self.best.settle()
        if self.validate is not None:
            scored = self.validate()
            record["validation"] = scored if ranks is None else ranks.totals(scored)[0][0]
        record["seconds"] = time.perf_counter() - self.started
        history.records.append(record)
        keys = [key for key in ("bound" if "bound" in record else "loss", "validation") if key in record]
        bar.set_postfix_str(", ".join(f"{key} {record[key]:.2f}" for key in keys), refresh=False)
        if self.callback is not None:
            with in_callback(), alone():
                self.callback(record)
        # While the weight of the divergence rises, a validation bound says nothing about the end.
        settled = stepper.steps >= stepper.warmup
        end_epoch(stepper.optimizer, record, settled)
        if self.patience is not None and settled:
            self.best.offer(record["validation"], epoch, stepper.parameters())
            history.stopped_early = epoch - self.best.epoch >= self.patience
        if self.saved is not None and (ranks is None or ranks.rank == 0):
            self._save(self.saved, last=epoch == self.epochs or history.stopped_early)

    def multiplied(self) -> dict[str, str]:
        """By which libraries the captured steps multiply, by the keys of their choices."""
        compiled = None if self.stepper.graph is None else self.stepper.graph.compiled
        choices = [] if compiled is None else [graph.capture.choice for graph in compiled._graphs.values()]
        self.products |= {choice.key: choice.library for choice in choices if choice is not None}
        return self.products

    def _save(self, saved: Checkpoint, last: bool) -> None:
        if not last and not saved.due():
            return
        stepper, best = self.stepper, self.best
        names = {id(t): name for name, t in saved.tensors.items()}
        compiled = None if stepper.graph is None else stepper.graph.compiled
        compiles = compiled is not None and compiled.compile_after is not None
        progress = {
            "records": self.history.records, "steps": stepper.steps, "best_epoch": best.epoch,
            "stopped": self.history.stopped_early, "best_value": best.value if best.epoch else None,
            "compiled": compiles, "size": stepper.batches.size, "noise": stepper.noise, "products": self.multiplied(),
        }  # fmt: skip
        assert isinstance(stepper.optimizer, Fused)
        moments = stepper.optimizer.moments(saved.tensors)
        saved.write(progress, moments, {names[id(t)]: copied for t, copied in best.copies})
        if last and saved.share is None:
            previous(saved.path).unlink(missing_ok=True)  # the fit is whole, and so is its file

    def resume(self, saved: Checkpoint, warms_by_steps: bool) -> None:
        """Write a checkpoint after epochs from now on, and go on where it ends."""
        self.saved = saved
        stepper, best, history, ranks = self.stepper, self.best, self.history, self.stepper.ranks
        if not isinstance(stepper.optimizer, Fused):
            raise ValueError("checkpoint needs fit's own optimiser: pass a torch optimiser class, not a PyroOptim.")
        found = saved.read() if ranks is None or ranks.rank == 0 else None
        if ranks is not None:
            found = ranks.resumed(found)
        if found is None:
            return
        progress, moments, copies = found
        if ranks is not None and ranks.rank > 0:
            copies = moved(copies, next(iter(saved.tensors.values())).device)
        stepper.noise = progress.get("noise") or stepper.noise
        self.products = dict(progress.get("products") or {})
        products.want(self.products)
        size, before = stepper.batches.size, progress.get("size", 1)
        if before != size and warms_by_steps:
            raise ValueError(
                f"{saved.path} is of a fit of {before} processes, whose kl_warmup_steps are other steps than those of "
                f"{size}. Go on in as many, or begin with kl_warmup, which is in epochs."
            )
        history.records, history.stopped_early = progress["records"], progress["stopped"]
        # In another number of processes so many epochs are other steps.
        stepper.steps = progress["steps"] if before == size else len(history) * len(stepper.batches)
        if stepper.considers and progress.get("compiled"):
            stepper.compile()
        stepper.considers = stepper.considers and stepper.steps < TIMED
        stepper.optimizer.restore(saved.tensors, moments)
        best.epoch = progress["best_epoch"]
        best.value = -math.inf if progress["best_value"] is None else progress["best_value"]
        best.copies = [(saved.tensors[name], copied) for name, copied in copies.items()]
        self.started -= history.records[-1]["seconds"]


@contextmanager
def learning(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Modules in training mode, and all in evaluation mode at the end, whatever ends it."""
    try:
        train(modules)
        yield
    finally:
        for module in modules:
            module.eval()


def train(modules: Sequence[nn.Module]) -> None:
    """Put modules into training mode, except for what is frozen whole, or held at rest by who calls `fit`."""
    for module in modules:
        module.train()
        _rest_frozen(module)
        for part in module.modules():
            if part.training and rests(part):
                part.training = False


def _rest_frozen(module: nn.Module) -> None:
    """Put what has parameters and none that learns into evaluation mode, its dropout and statistics too."""
    parameters = list(module.parameters())
    if parameters and not any(p.requires_grad for p in parameters):
        module.eval()
        return
    for child in module.children():
        _rest_frozen(child)
