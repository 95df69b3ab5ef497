"""Does anything grow? 10,000 steps eager and captured, and 100 fits, in one process.

    python benchmarks/longrun.py            # about five minutes; writes benchmarks/results/longrun.md

Memory is the resident set after a garbage collection, from the first tenth of the steps (or fits) to the last.
"""

from __future__ import annotations

import ctypes
import gc
import os
import resource
from collections.abc import Callable
from pathlib import Path

import pyro
import torch
from summary import machine

import pyro_vae as pv
from pyro_vae.data import load

RESULTS = Path(__file__).parent / "results"


def resident() -> float:
    """MB, after what is free was given back."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 1e6


def watched() -> dict[str, float]:
    return {
        "memory, MB": resident(),
        "open files": len(os.listdir("/proc/self/fd")),
        "parameters in the store": len(list(pyro.get_param_store().keys())),
        "tensors": sum(issubclass(type(each), torch.Tensor) for each in gc.get_objects()),
        "handlers": len(pyro.poutine.runtime._PYRO_STACK),
    }


def steps(compile: bool) -> tuple[dict[str, float], dict[str, float]]:
    """One fit of 10,000 steps, looked at after its first tenth and its last."""
    digits = load("digits", seed=0)
    vae = pv.VAE.build((1, 8, 8), latent_dim=10, hidden=(256, 128))
    seen: list[dict[str, float]] = []

    def look(record: dict[str, float]) -> None:
        if record["epoch"] in (50, 500):
            seen.append(watched())

    pv.fit(vae, data=digits.train, epochs=500, batch_size=64, seed=0, progress=False, compile=compile, callback=look)
    return seen[0], seen[1]


def fits(number: int = 100) -> tuple[dict[str, float], dict[str, float]]:
    """So many fits and evaluations of new pairs."""
    digits = load("digits", seed=0)
    seen, some = [], digits.test.subset(slice(0, 50))
    for count in range(number):
        looking = count in (number // 10 - 1, number - 1)
        if looking:
            gc.collect()  # what is gone leaves the store with the next fit
        vae = pv.VAE.build((1, 8, 8), latent_dim=4, hidden=(32,))
        pv.fit(vae, data=digits.train, epochs=1, batch_size=128, seed=count, progress=False, compile=count % 2 == 0)
        pv.log_likelihood(vae.model, vae.guide, some, num_samples=100, seed=0, progress=False)
        del vae
        if looking:
            seen.append(watched())
    return seen[0], seen[1]


def main() -> None:
    torch.set_num_threads(1)
    trials: dict[str, Callable[[], tuple[dict[str, float], dict[str, float]]]] = {
        "10,000 steps, eager": lambda: steps(False),
        "10,000 steps, captured": lambda: steps(True),
        "100 fits": fits,
    }
    lines = [f"{machine(1, 'cpu')['cpu']}, one thread.", ""]
    lines += [f"| what | {' | '.join(watched())} |", "|---" * (1 + len(watched())) + "|"]
    for name, trial in trials.items():
        first, last = trial()
        lines.append(f"| {name} | " + " | ".join(f"{first[key]:,.0f} → {last[key]:,.0f}" for key in first) + " |")
        print(lines[-1], flush=True)
    (RESULTS / "longrun.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
