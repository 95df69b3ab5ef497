"""What one waits for before the first step: imports and compilers, each in new processes."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from peers import Problem
from rounds import WARM_UP_STEPS, Peer, Row
from sections import epoch_rows
from summary import cell, spread, table

NAME, TITLE, MINUTES = "startup", "Start-up and compile time", 4.0
# `import pyro_vae` alone may leave the work to the first name that is asked for.
IMPORTS = ("import torch", "import pyro", "import pyro_vae", "from pyro_vae import VAE, fit", "import numpyro")
ROWS = ("pyro-memory", "pyro-jit", "torch-medium", "torch-compile", "numpyro", "ours", "ours-replayed", "ours-compiled")
_CACHES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "JAX_COMPILATION_CACHE_DIR")
_ROOT = Path(__file__).resolve().parent.parent


def import_seconds(statement: str) -> float | str:
    """Seconds of an import in a new interpreter, or why there are none."""
    program = f"import time; t = time.perf_counter(); {statement}; print(time.perf_counter() - t)"
    path = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True
    )
    if done.returncode:
        return (done.stderr.strip().splitlines() or ["no reason given"])[-1]
    return float(done.stdout.split()[-1])


def first_steps(row: Row, pixels: np.ndarray, problem: Problem, threads: int) -> dict[str, Any]:
    """The first steps of a row in two new processes: with empty caches on disk, and with those of the first."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        # jax keeps nothing on disk unless told to; it gets what torch has by default.
        environment = dict.fromkeys(_CACHES, folder) | {
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1"
        }  # fmt: skip
        for name in ("cold", "cached"):
            peer = Peer(row, pixels, problem, threads, [0], environment)
            try:
                for number in range(2):
                    peer.call(number)
            finally:
                peer.stop()
            if peer.error is not None:
                return {"error": peer.error}
            first, second = (timing.seconds for timing in peer.timings)
            found |= {name: first, f"{name}_build": peer.build_seconds, "warm": second}
    return found


def run(
    pixels: np.ndarray,
    device: str,
    threads: int,
    rounds: int,
    deadline: float,
    only: Sequence[str] | None,
    say: Callable[[str], None],
) -> tuple[str, dict[str, Any]]:
    """Measure all of it; the Markdown and what is kept of it."""
    problem = Problem(device=device)
    rows = [row for row in epoch_rows(device) if row.key in (only or ROWS) and row.key in ROWS]
    few = pixels[: WARM_UP_STEPS * problem.batch_size]
    imports: dict[str, list[float]] = {statement: [] for statement in IMPORTS}
    steps: dict[str, list[dict[str, Any]]] = {row.key: [] for row in rows}
    errors: dict[str, str] = {}
    for statement in IMPORTS:  # once for the disk's sake
        if isinstance(reason := import_seconds(statement), str):
            errors[statement] = reason
    for number in range(rounds):
        if number and time.monotonic() > deadline:
            break
        for statement in IMPORTS:
            if statement not in errors and isinstance(seconds := import_seconds(statement), float):
                imports[statement].append(seconds)
        for row in rows:
            if row.key not in errors:
                found = first_steps(row, few, problem, threads)
                if "error" in found:
                    errors[row.key] = found["error"]
                else:
                    steps[row.key].append(found)
        say(f"round {number + 1}")
    count = len(few) // problem.batch_size
    text = "\n\n".join([_imports_table(imports, errors), _steps_table(rows, steps, errors, problem, count)])
    kept = {"imports": imports, "first_steps": steps, "errors": errors, "problem": dataclasses.asdict(problem)}
    return text, kept


def _imports_table(imports: dict[str, list[float]], errors: dict[str, str]) -> str:
    rows = []
    for statement, seconds in imports.items():
        if not seconds:
            rows.append([f"`{statement}`", cell(f"failed: {errors.get(statement)}"), ""])
            continue
        s = spread(seconds)
        rows.append([f"`{statement}`", f"{s['median']:.2f}", f"{s['min']:.2f}-{s['max']:.2f}"])
    return table(["seconds, in a new process", "median", "min-max"], rows)


def _steps_table(
    rows: Sequence[Row], steps: dict[str, list[dict[str, Any]]], errors: dict[str, str], problem: Problem, count: int
) -> str:
    columns = ("cold_build", "cold", "cached", "warm")
    lines = []
    for row in rows:
        found = steps[row.key]
        if row.key in errors or not found:
            lines.append([cell(row.title), cell(f"failed: {errors.get(row.key)}"), *[""] * (len(columns) - 1)])
        else:
            lines.append([cell(row.title), *(f"{spread([f[c] for f in found])['median']:.2f}" for c in columns)])
    header = ["seconds, medians", "imports and set-up", f"first {count} steps, no cache",
              f"first {count} steps, cached on disk", f"next {count} steps"]  # fmt: skip
    return f"{problem}, batch {problem.batch_size}\n\n" + table(header, lines)
