"""This package: a pair of its parts, `fit`, and pixels that stay uint8 in memory."""

from collections.abc import Callable

import numpy as np
import torch
from pyro.infer import Trace_ELBO

from peers import HIDDEN, LATENT, LEARNING_RATE
from pyro_vae.data import Split
from pyro_vae.inference.bounds import elbo
from pyro_vae.inference.compiled import Compiled
from pyro_vae.inference.objectives import Objective
from pyro_vae.inference.optimizers import Fused
from pyro_vae.inference.training import fit
from pyro_vae.parts.likelihoods import Bernoulli
from pyro_vae.parts.networks import MLP
from pyro_vae.parts.posteriors import DiagonalNormal
from pyro_vae.parts.priors import StandardNormal
from pyro_vae.programs.guide import Guide
from pyro_vae.programs.model import Model


def build(
    pixels: np.ndarray, batch_size: int, seed: int, loss: str = "Trace_ELBO", precision: str | None = None,
    compiled: str | None = None,
) -> Callable[[], tuple[int, float]]:
    """`fit`, one epoch at a call, with Pyro's Trace_ELBO or the package's Objective(elbo).

    `compiled`: None for the plain loss, "replay" for the captured graph without a compiler,
    "inductor" for what `fit(compile=True)` does.
    """
    torch.manual_seed(seed)
    split = Split(torch.from_numpy(pixels), binarization="dynamic")
    model = Model(StandardNormal(LATENT), Bernoulli(MLP(LATENT, [HIDDEN], split.x_shape, "softplus")))
    guide = Guide(DiagonalNormal(MLP(split.x_shape, [HIDDEN], None, "softplus"), LATENT))
    # One optimiser for all calls: its moments belong to the training, not to the epoch.
    optimizer = Fused(torch.optim.Adam, {"lr": LEARNING_RATE})
    objective = Objective(elbo) if loss == "Objective" else Trace_ELBO()
    # One compiled loss for all calls, too: a fit of many epochs captures once.
    if compiled is not None:
        objective = Compiled(objective, compile_after=None if compiled == "replay" else 10)

    def epoch() -> tuple[int, float]:
        history = fit(
            model, guide, split, loss=objective, epochs=1, batch_size=batch_size, optimizer=optimizer,
            matmul_precision=precision, progress=False, compile=False,
        )
        return len(split), history["bound"][-1]

    return epoch
