"""The pieces of a training step, each timed by itself, as many times as an epoch has steps.

matmul   the matrix products of forward and backward, into memory that is there already
batch    images gathered from uint8 and binarised
noise    the standard normal numbers of z
graph    loss and gradients of the captured pair, compiled
adam     the fused optimiser step
"""

import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from peers import LEARNING_RATE, Problem
from peers.ours import loss_of, pair, split_of
from pyro_vae.inference.compiled import Compiled
from pyro_vae.inference.optimizers import Fused


def products(problem: Problem) -> list[tuple[str, int, int, int]]:
    """(kind, m, k, n) of all products (m, k) @ (k, n) of one step of a dense pair whose posterior has one head.

    "output" and "weight" (its gradient) for every layer, "input" (its gradient) for all but the first.
    """
    encoder = [784, *problem.hidden, 2 * problem.latent]
    decoder = [problem.latent, *reversed(problem.hidden), 784]
    found = []
    for widths, rows in ((encoder, problem.batch_size), (decoder, problem.batch_size * problem.num_samples)):
        for before, after in zip(widths[:-1], widths[1:], strict=True):
            found += [("output", rows, before, after), ("weight", after, rows, before)]
            if not (widths is encoder and before == encoder[0]):
                found.append(("input", rows, after, before))
    return found


def build(
    pixels: np.ndarray, problem: Problem, piece: str, precision: str | None = None
) -> Callable[[], tuple[int, float]]:
    torch.manual_seed(problem.seed)
    step = {"matmul": _matmul, "batch": _batch, "noise": _noise, "graph": _graph, "adam": _adam}[piece](
        pixels, problem, precision
    )
    steps = len(pixels) // problem.batch_size

    def epoch() -> tuple[int, float]:
        for _ in range(steps):
            step()
        return steps * problem.batch_size, math.nan

    return epoch


def _matmul(pixels: np.ndarray, problem: Problem, precision: str | None) -> Callable[[], None]:
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    if precision not in (None, "bfloat16"):
        torch.set_float32_matmul_precision(precision)

    def random(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, device=problem.device, dtype=dtype)

    operands = []
    for kind, m, k, n in products(problem):
        # Transposed where a step has it so: weights are (out, in), activations and their gradients (rows, features).
        a = random(k, m).T if kind == "weight" else random(m, k)
        b = random(n, k).T if kind == "output" else random(k, n)
        operands.append((a, b, random(m, n)))

    def step() -> None:
        for a, b, out in operands:
            torch.mm(a, b, out=out)

    return step


def _batch(pixels: np.ndarray, problem: Problem, precision: str | None) -> Callable[[], object]:
    split = split_of(pixels, problem, "dynamic")

    def order() -> Iterator[Tensor]:
        while True:
            yield from torch.randperm(len(split))[: len(split) // problem.batch_size * problem.batch_size].split(
                problem.batch_size
            )

    indices = order()
    return lambda: split[next(indices)]


def _noise(pixels: np.ndarray, problem: Problem, precision: str | None) -> Callable[[], Tensor]:
    shape = (problem.num_samples, problem.batch_size, problem.latent)
    return lambda: torch.randn(shape, device=problem.device)


def _graph(pixels: np.ndarray, problem: Problem, precision: str | None) -> Callable[[], None]:
    model, guide = (program.to(problem.device) for program in pair(problem))
    loss = Compiled(loss_of(problem))
    x = split_of(pixels, problem, "dynamic")[: problem.batch_size]
    parameters = [*model.parameters(), *guide.parameters()]

    def step() -> None:
        loss.loss_and_grads(model, guide, x)
        for parameter in parameters:  # as the optimiser leaves them: an addition to old gradients is no part of a step
            parameter.grad = None

    return step


def _adam(pixels: np.ndarray, problem: Problem, precision: str | None) -> Callable[[], None]:
    model, guide = (program.to(problem.device) for program in pair(problem))
    parameters = [*model.parameters(), *guide.parameters()]
    gradients = [torch.randn_like(parameter) for parameter in parameters]
    optimizer = Fused(torch.optim.Adam, {"lr": LEARNING_RATE})

    def step() -> None:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        optimizer(parameters)

    return step
