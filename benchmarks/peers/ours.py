"""This package: a pair of its parts, `fit`, and pixels that stay uint8 in memory."""

import inspect
import queue
import threading
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from pyro.infer import Trace_ELBO

from peers import LEARNING_RATE, Problem, weights
from peers.networks import take
from pyro_vae import Guide, Model
from pyro_vae.data import Split
from pyro_vae.inference.bounds import elbo, iwae
from pyro_vae.inference.compiled import Compiled
from pyro_vae.inference.objectives import Objective
from pyro_vae.inference.optimizers import Fused
from pyro_vae.inference.training import fit
from pyro_vae.judging.estimates import log_likelihood
from pyro_vae.parts.likelihoods import Bernoulli
from pyro_vae.parts.networks import MLP, ConvDecoder, ConvEncoder
from pyro_vae.parts.posteriors import DiagonalNormal
from pyro_vae.parts.priors import StandardNormal


def pair(problem: Problem) -> tuple[Model, Guide]:
    """p(z) p(x | z) and q(z | x)."""
    torch.manual_seed(problem.seed)
    if problem.network == "convolutional":
        encoder, decoder = ConvEncoder((1, 28, 28)), ConvDecoder(problem.latent, (1, 28, 28))
    else:
        encoder = MLP((784,), problem.hidden, None, problem.activation)
        decoder = MLP(problem.latent, problem.hidden[::-1], (784,), problem.activation)
    model = Model(StandardNormal(problem.latent), Bernoulli(decoder))
    return model, Guide(DiagonalNormal(encoder, problem.latent))


def split_of(pixels: np.ndarray, problem: Problem, binarization: Any) -> Split:
    """The images in the shape that the network wants, where it is."""
    tensor = torch.from_numpy(pixels).to(problem.device)
    if problem.network == "convolutional":
        tensor = tensor.view(-1, 1, 28, 28)
    return Split(tensor, binarization=binarization)


def loss_of(problem: Problem, loss: str = "Trace_ELBO") -> Any:
    """Pyro's Trace_ELBO, or the package's Objective; for K > 1 samples the latter's bound of IWAE."""
    if problem.num_samples > 1:
        return Objective(iwae, num_samples=problem.num_samples)
    return Objective(elbo) if loss == "Objective" else Trace_ELBO()


def build(
    pixels: np.ndarray,
    problem: Problem,
    loss: str = "Trace_ELBO",
    precision: str | None = None,
    compiled: str | None = None,
) -> Callable[[], tuple[int, float]]:
    """`fit`, one epoch of an endless one at a call: what a fit does before its first step is in the warm-up.

    `compiled`: None for the plain loss, "replay" for the captured graph without a compiler,
    "inductor" for what `fit(compile=True)` does.
    """
    model, guide = pair(problem)
    split = split_of(pixels, problem, "dynamic")
    objective = loss_of(problem, loss)
    if compiled is not None:
        objective = Compiled(objective, compile_after=None if compiled == "replay" else 10)
    asked, done = queue.SimpleQueue[None](), queue.SimpleQueue[float | BaseException]()

    def wait(record: Mapping[str, Any]) -> None:
        done.put(record["bound"])
        asked.get()

    def run() -> None:
        asked.get()
        try:
            fit(
                model,
                guide,
                split,
                loss=objective,
                epochs=10**6,
                batch_size=problem.batch_size,
                optimizer=Fused(torch.optim.Adam, {"lr": LEARNING_RATE}),
                device=problem.device,
                matmul_precision=precision,
                progress=False,
                compile=compiled is not None,
                callback=wait,
            )
        except BaseException as error:
            done.put(error)

    threading.Thread(target=run, daemon=True).start()

    def epoch() -> tuple[int, float]:
        asked.put(None)
        bound = done.get()
        if isinstance(bound, BaseException):
            raise bound
        return len(split), bound

    return epoch


def evaluation(pixels: np.ndarray, problem: Problem, compiled: bool = False) -> Callable[[], tuple[int, float]]:
    """`log_likelihood`, with its errors, k-hat and curve."""
    options = {"compile": compiled} if "compile" in inspect.signature(log_likelihood).parameters else {}
    if compiled and not options:
        raise NotImplementedError("log_likelihood of this version has no compile=")
    model, guide = pair(problem)
    layers = weights(problem)
    take(model, layers["decoder"])
    encoder, (loc, log_scale) = layers["encoder"][:-2], layers["encoder"][-2:]
    both = tuple(np.concatenate(parts, -1) for parts in zip(loc, log_scale, strict=True))  # one head for the two
    take(guide, [*encoder, both])  # type: ignore[list-item]
    model.to(problem.device), guide.to(problem.device)
    split = split_of(pixels, problem, "threshold")

    def epoch() -> tuple[int, float]:
        estimate = log_likelihood(
            model, guide, split, num_samples=problem.num_samples, seed=None, progress=False, **options
        )
        return len(split), estimate.value

    return epoch
