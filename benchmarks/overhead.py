"""What the checkpoint of a run costs of its training: the share of CPU seconds and of wall that is writing.

    python benchmarks/overhead.py --data-dir ../shared/data/mnist   # ten minutes; writes benchmarks/results/overhead.md

Fits as `pyro-vae fit` does them, with the state in the run folder (`Sparing`, which is written as often as takes 1 % of
the time, and after the first epoch and the last). The seconds of writing are measured inside their own fit: a machine
that others use changes its speed by more than 2 % from fit to fit, so that fits with and without do not show them.
Rows: the default network on MNIST and on the digits, captured and eager. What is written outside the training (weights,
pictures) is not counted: it is there without a checkpoint too.
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

from pyro_vae.app.building import build
from pyro_vae.app.defaults import resolve
from pyro_vae.app.reading import read
from pyro_vae.inference import training
from pyro_vae.inference.checkpoints import Checkpoint, Sparing

RESULTS = Path(__file__).parent / "results"
ROWS: dict[str, dict[str, Any]] = {  # data, epochs, compile
    "MNIST, captured": {"data": "mnist", "epochs": 4, "compile": "auto"},
    "MNIST, eager": {"data": "mnist", "epochs": 2, "compile": False},
    "digits, captured": {"data": "digits", "epochs": 100, "compile": "auto"},
    "digits, eager": {"data": "digits", "epochs": 25, "compile": False},
}


def one(row: dict[str, Any], data_dir: str, limit: int | None) -> dict[str, float]:
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
        path = Sparing(Path(folder, "checkpoint.safetensors"))
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
        limit = given.limit if name.startswith("MNIST") else None
        found = [one(ROWS[name], given.data_dir, limit) for _ in range(given.rounds)]
        print(name, found, flush=True)
        shares, walls = ([100 * fit[f"writing {clock}"] / fit[clock] for fit in found] for clock in ("cpu", "wall"))
        seconds, count = (statistics.median(fit[key] for fit in found) for key in ("cpu", "writing count"))
        each = (f"{statistics.median(part):.2f} % (at most {max(part):.2f})" for part in (shares, walls))
        lines.append([name, f"{seconds:.1f}", f"{count:.0f}", *each])
    limited = "" if given.limit is None else f", the first {given.limit:,} images of MNIST"
    text = f"{machine(1, 'cpu')['cpu']}, one thread, medians of {given.rounds} fits{limited}.\n\n"
    text += table(["fit", "CPU s", "times written", "writing, of the CPU time", "of the wall time"], lines) + "\n"
    print(text)
    (RESULTS / "overhead.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
