"""Samples cut off from the network that drew them, so that a gradient can be taken along them alone."""

from __future__ import annotations

from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_vae.sites import is_subsample


class Cut(Messenger):
    """Cuts the graph at every latent that a guide draws, and keeps both of its ends, per run of the guide (`passes`).

    The draw z, live in the guide's parameters, is kept aside; the rest of the guide and the model see a detached copy
    of it that asks for a gradient: log densities become functions of (z, parameters) as two independent things.
    """

    def __init__(self) -> None:
        super().__init__()
        self.passes: list[list[tuple[Tensor, Tensor]]] = []

    def __enter__(self) -> Cut:
        self.passes.append([])
        return super().__enter__()

    def _pyro_sample(self, msg: Any) -> None:
        drawn_already = msg["done"] or msg["is_observed"] or msg["value"] is not None
        if drawn_already or is_subsample(msg["fn"]):
            return
        live = msg["fn"](*msg["args"], **msg["kwargs"])
        msg["value"] = live.detach()
        if live.requires_grad:
            msg["value"].requires_grad_()
            self.passes[-1].append((live, msg["value"]))

    def pathwise(self, target: Tensor) -> Tensor:
        """A scalar whose gradient is that of the target, a function of the copies, along the samples, and nowhere else.

        With G the gradient of the target at the copies, sum <G, z> over the live z; zero where none has a gradient. A
        later site of a layered guide was drawn given the copies of earlier ones, so what reaches it is carried on to
        them, from the last site to the first.
        """
        copies = [copy for drawn in self.passes for _, copy in drawn]
        total = target.new_zeros(())
        if not copies or not target.requires_grad:
            return total
        found = iter(torch.autograd.grad(target, copies, retain_graph=True, allow_unused=True))
        for drawn in self.passes:
            gradients = [next(found) for _ in drawn]
            for last in reversed(range(len(drawn))):
                if gradients[last] is None:
                    continue
                term = (gradients[last] * drawn[last][0]).sum()
                total = total + term
                earlier = [copy for _, copy in drawn[:last]]
                if earlier:
                    for i, extra in enumerate(torch.autograd.grad(term, earlier, retain_graph=True, allow_unused=True)):
                        if extra is not None:
                            gradients[i] = extra if gradients[i] is None else gradients[i] + extra
        return total
