"""What it is worth to read the constants of torch's log1p and expm1 once (`hardware.read_constants`).

    python benchmarks/activations.py                # a minute

Each operation is timed in a process of its own, which has called nothing else, before the constants have been read and
after. Prints nanoseconds a number, forwards and backwards, on one thread: the median over processes, and the ratio
within a process, median (min-max).
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from summary import cpu_name, processor_class
from torch import Tensor
from torch.nn import functional as F

from pyro_vae.inference.hardware import read_constants

OPERATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "softplus": F.softplus,
    "logsigmoid": F.logsigmoid,
    "elu": F.elu,
    "Bernoulli(logits=).log_prob": lambda x: torch.distributions.Bernoulli(logits=x, validate_args=False).log_prob(
        torch.ones_like(x)
    ),
    "log1p": lambda x: torch.log1p(x.abs()),
    "expm1": torch.expm1,
    "tanh": torch.tanh,
}
NUMBERS = 2**16  # which stay in the caches
CALLS = 40


def seconds(operation: Callable[[Tensor], Tensor], x: Tensor) -> float:
    """Of one call, forwards and backwards: the fastest."""
    taken = []
    for _ in range(CALLS):
        start = time.perf_counter()
        operation(x).sum().backward()
        taken.append(time.perf_counter() - start)
    return min(taken)


def one(name: str) -> None:
    """Time an operation before and after."""
    torch.set_num_threads(1)
    x = torch.randn(NUMBERS, generator=torch.Generator().manual_seed(0)).requires_grad_()
    before = seconds(OPERATIONS[name], x)
    read_constants()
    print(1e9 * before / NUMBERS, 1e9 * seconds(OPERATIONS[name], x) / NUMBERS)


def main() -> None:
    """A few processes for each operation."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=5)
    parser.add_argument("--one", choices=OPERATIONS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one is not None:
        one(arguments.one)
        return
    print(f"{cpu_name()} ({processor_class()}), one thread, torch {torch.__version__}\n")
    print("| operation | before, ns | after, ns | ratio (min-max) |\n| --- | ---: | ---: | ---: |")
    for name in OPERATIONS:
        run = [sys.executable, __file__, "--one", name]
        took = [
            tuple(map(float, subprocess.run(run, check=True, capture_output=True, text=True).stdout.split()))
            for _ in range(arguments.processes)
        ]
        ratios = [before / after for before, after in took]
        before, after = (statistics.median(times) for times in zip(*took, strict=True))
        spread = f"{statistics.median(ratios):.1f} ({min(ratios):.1f}-{max(ratios):.1f})"
        print(f"| {name} | {before:.1f} | {after:.1f} | {spread} |", flush=True)


if __name__ == "__main__":
    main()
