"""What a compiler gains by this package's formulas of tanh, log1p and expm1 on a CPU: the same captured step compiled
with and without them, in turns.

    python benchmarks/activations.py                # a few minutes

The pair is written with torch's own modules, 784-400-50, Pyro's Bernoulli of logits and batches of 128: loss and
gradients, without batch and optimiser. Prints microseconds of a step, median over rounds, and the ratio within rounds,
median (min-max).
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any
from unittest import mock

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import Trace_ELBO
from summary import cpu_name, processor_class
from torch import Tensor, nn

from pyro_vae.inference import rewrites
from pyro_vae.inference.compiled import Compiled

ACTIVATIONS = {
    "Softplus": nn.Softplus, "ELU": nn.ELU, "Mish": nn.Mish, "GELU, tanh": lambda: nn.GELU("tanh"), "Tanh": nn.Tanh,
    "ReLU": nn.ReLU,
}  # fmt: skip
STEPS = 50  # of a round


def pair(activation: Any) -> tuple[Any, Any]:
    """A model and a guide such as people bring."""
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Linear(784, 400), activation(), nn.Linear(400, 100))
    decoder = nn.Sequential(nn.Linear(50, 400), activation(), nn.Linear(400, 784))

    def model(x: Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x), 50), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=decoder(z)).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            loc, log_scale = encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    return model, guide


def ready(activation: Any, quick: dict[Any, Any], x: Tensor) -> Any:
    """A function that takes `STEPS` steps, and gives the seconds of one."""
    model, guide = pair(activation)
    loss = Compiled(Trace_ELBO(), compile_after=3)
    with mock.patch.dict(rewrites.QUICK, quick, clear=True), torch.compiler.config.patch(force_disable_caches=True):
        for _ in range(6):
            loss.loss_and_grads(model, guide, x)
    assert loss.reason is None, loss.reason

    def steps() -> float:
        start = time.perf_counter()
        for _ in range(STEPS):
            loss.loss_and_grads(model, guide, x)
        return (time.perf_counter() - start) / STEPS

    return steps


def main() -> None:
    """Compile both, and take turns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    x = torch.rand(128, 784, generator=torch.Generator().manual_seed(0)).round()
    print(f"{cpu_name()} ({processor_class()}), {arguments.threads} threads, torch {torch.__version__}\n")
    print("| activation | Inductor's own, µs | with our formulas, µs | ratio (min-max) |\n| --- | ---: | ---: | ---: |")
    for name, activation in ACTIVATIONS.items():
        both = ready(activation, {}, x), ready(activation, dict(rewrites.QUICK), x)
        took: tuple[list[float], list[float]] = ([], [])
        for steps in both:
            steps()
        for _ in range(arguments.rounds):
            for steps, seconds in zip(both, took, strict=True):
                seconds.append(1e6 * steps())
        ratios = [own / ours for own, ours in zip(*took, strict=True)]
        own, ours = map(statistics.median, took)
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
        print(f"| {name} | {own:,.0f} | {ours:,.0f} | {spread} |", flush=True)


if __name__ == "__main__":
    main()
