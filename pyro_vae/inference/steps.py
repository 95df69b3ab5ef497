"""Training steps as one graph each: batch, loss, gradients and optimiser.

What a step does between two batches (choose rows, binarise them, Pyro, autograd, Adam) is
the same in every step. Where all of it can be captured, it is; where some cannot (a batch
that is made by Python, an optimiser that is not Adam), the rest still is, and that part
runs as it did.

Rows are chosen and binarised inside the graph on a GPU only, where every kernel that is
launched from Python costs. On a CPU the compiler would draw each pixel again in every
operation that reads it, without vector instructions: for 50 particles that takes three
times as long as the rest of the likelihood.
"""

from __future__ import annotations

from typing import Any

from pyro.infer.util import zero_grads
from pyro.optim import PyroOptim
from torch import Tensor

from pyro_vae.inference.batches import Batches
from pyro_vae.inference.calls import TrainingStep
from pyro_vae.inference.compiled import Compiled
from pyro_vae.inference.optimizers import Fused
from pyro_vae.traces import Program


class GraphSteps:
    """Steps of a pair by a compiled loss, each as much of a step as can be.

    Args:
        compiled: The loss.
        model: A Pyro program for p(x, z).
        guide: A Pyro program for q(z | x).
        optimizer: Of all parameters.
        batches: Where the data are from.
    Attributes:
        chooses: Whether to try to have the batch made inside the graph.
    """

    def __init__(
        self, compiled: Compiled, model: Program, guide: Program, optimizer: PyroOptim, batches: Batches
    ) -> None:
        self.compiled, self.model, self.guide = compiled, model, guide
        self.optimizer, self.batches = optimizer, batches
        self.chooses = batches.home.type == "cuda"
        self._ways: list[tuple[bool, TrainingStep]] = []
        self._made_for: Any = "nothing yet"

    def __call__(self, choice: tuple[Any, ...]) -> tuple[Tensor | None, tuple[Any, ...] | None]:
        """Take a step on a batch.

        Returns:
            Its loss, None where there is no graph for it and nothing was done; and the batch, if it was made.
        """
        self._update_ways()
        batch: tuple[Any, ...] | None = None
        while self._ways and all(isinstance(x, Tensor) for x in choice):
            chosen, training = self._ways[0]
            if not chosen and batch is None:
                batch = self.batches.take(*choice)
            tensors = choice if chosen or batch is None else batch
            if not all(isinstance(x, Tensor) for x in tensors):
                break
            done = self.compiled.train(self.model, self.guide, tensors, training)
            if done is not None:
                loss, leaves = done
                if leaves:
                    self.optimizer(leaves)
                    zero_grads(leaves)
                return loss, batch
            if not self.compiled.refused(self.model, self.guide, tensors, training):
                break
            del self._ways[0]
        return None, batch

    def _update_ways(self) -> None:
        """From the training step down to loss and gradients alone, for the optimiser as it is now."""
        fused = self.optimizer if isinstance(self.optimizer, Fused) else None
        now = None if fused is None else (len(fused.parameters), fused.settings)
        if now == self._made_for:
            return
        self._made_for = now
        update = None if fused is None else fused.inside()
        columns = self.batches.columns
        source = (id(self.batches.origin), str(self.batches.device))
        self._ways = []
        for chosen in (True, False) if columns is not None and self.chooses else (False,):
            prepare = self.batches.take if chosen else _as_they_are
            for step in (update, None) if update is not None else (None,):
                key = (source if chosen else None, None if step is None else id(step))
                self._ways.append((chosen, TrainingStep(prepare, step, key, last=not chosen and step is None)))


def _as_they_are(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tensors
