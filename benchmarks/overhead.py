"""What the checkpoint of a run costs of its training: CPU seconds and wall, with and without, in turn.

    python benchmarks/overhead.py --data-dir ../shared/data/mnist   # ten minutes; writes benchmarks/results/overhead.md

Two fits that are alike to the bit, in turn: as `pyro-vae fit` does it, with the state in the run folder (`Sparing`,
which is written as often as takes 1 % of the time, and after the first epoch and the last), and with no checkpoint.
Rows: the default network on MNIST and on the digits, captured and eager. What is written outside the training (weights,
pictures) is not counted: it is there without a checkpoint too.

A machine that others use changes its speed by more than 2 % from fit to fit. So the seconds of writing are measured,
each inside its own fit, and their share of that fit is the figure; the ratio of the fits is beside it.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from summary import machine, table

from pyro_vae.app.defaults import resolve
from pyro_vae.app.fitting import build, read
from pyro_vae.inference import training
from pyro_vae.inference.checkpoints import Checkpoint, Sparing

RESULTS = Path(__file__).parent / "results"
ROWS: dict[str, dict[str, Any]] = {  # data, epochs, compile
    "MNIST, captured": {"data": "mnist", "epochs": 4, "compile": "auto"},
    "MNIST, eager": {"data": "mnist", "epochs": 2, "compile": False},
    "digits, captured": {"data": "digits", "epochs": 100, "compile": "auto"},
    "digits, eager": {"data": "digits", "epochs": 25, "compile": False},
}


def one(row: dict[str, Any], data_dir: str, checkpoint: bool, limit: int | None) -> dict[str, float]:
    """CPU seconds and wall of a fit, and of what of it is the writing of checkpoints."""
    where = {"data_dir": data_dir} if row["data"] == "mnist" else {}
    options, dataset = read(resolve({"data": row["data"], "limit": limit, **where}))
    vae = build(options, dataset)
    written = {"cpu": 0.0, "wall": 0.0, "count": 0.0}
    write = Checkpoint.write

    def timed(self: Checkpoint, *given: Any) -> None:
        cpu, wall = time.process_time(), time.perf_counter()
        write(self, *given)
        written["cpu"] += time.process_time() - cpu
        written["wall"] += time.perf_counter() - wall
        written["count"] += 1

    with tempfile.TemporaryDirectory() as folder:
        path = Sparing(Path(folder, "checkpoint.safetensors")) if checkpoint else None
        Checkpoint.write = timed  # type: ignore[method-assign]
        try:
            cpu, wall = time.process_time(), time.perf_counter()
            training.fit(vae.model, vae.guide, dataset.train, epochs=row["epochs"], batch_size=options.batch_size,
                         seed=0, progress=False, compile=row["compile"], checkpoint=path)  # fmt: skip
            used, took = time.process_time() - cpu, time.perf_counter() - wall
        finally:
            Checkpoint.write = write  # type: ignore[method-assign]
    return {"cpu": used, "wall": took} | {f"writing {key}": value for key, value in written.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", nargs="*", choices=ROWS, default=list(ROWS))
    parser.add_argument("--limit", type=int, help="training images of MNIST, for a shorter run")
    given = parser.parse_args()
    torch.set_num_threads(1)
    lines = []
    for name in given.rows:
        found: dict[bool, list[dict[str, float]]] = {True: [], False: []}
        for turn in range(given.rounds):
            for checkpoint in (True, False) if turn % 2 else (False, True):
                limit = given.limit if name.startswith("MNIST") else None
                found[checkpoint].append(one(ROWS[name], given.data_dir, checkpoint, limit))
                print(name, checkpoint, found[checkpoint][-1], flush=True)
        shares = [100 * one["writing cpu"] / one["cpu"] for one in found[True]]
        walls = [100 * one["writing wall"] / one["wall"] for one in found[True]]
        ratios = [100 * (a["cpu"] / b["cpu"] - 1) for a, b in zip(found[True], found[False], strict=True)]
        seconds = [statistics.median(one["cpu"] for one in found[way]) for way in (True, False)]
        count = statistics.median(one["writing count"] for one in found[True])
        lines.append([name, f"{seconds[1]:.1f}", f"{seconds[0]:.1f}", f"{count:.0f}",
                      f"{statistics.median(shares):.2f} % (at most {max(shares):.2f})",
                      f"{statistics.median(walls):.2f} %",
                      f"{statistics.median(ratios):+.1f} % ({min(ratios):+.1f} to {max(ratios):+.1f})"])  # fmt: skip
    limited = "" if given.limit is None else f", the first {given.limit:,} images of MNIST"
    text = (
        f"{machine(1, 'cpu')['cpu']}, one thread, {given.rounds} rounds in turn, medians{limited}; the machine was "
        "shared, so that the last column is mostly noise.\n\n"
    )
    header = ["fit", "CPU s without", "CPU s with", "times written", "writing, of the CPU time", "of the wall time"]
    text += table([*header, "CPU time with against without"], lines) + "\n"
    print(text)
    (RESULTS / "overhead.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
