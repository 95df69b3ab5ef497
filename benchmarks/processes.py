"""How much faster two processes fit than one, each on one thread.

    python benchmarks/processes.py --data-dir ../shared/data/mnist      # two minutes

The default network of `pyro-vae fit --data mnist`, 512 images per process and step, eager and captured. Each round has
one fit of each kind, in turn; a rate is the median of a fit's epochs but the first. Writes
benchmarks/results/processes.md.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

import torch
import torch.distributed as group
import torch.multiprocessing as processes
from summary import machine

from pyro_vae.app.defaults import resolve
from pyro_vae.app.fitting import build, read
from pyro_vae.inference.training import fit

RESULTS = Path(__file__).parent / "results"
BATCH = 512
WAYS = {"eager": False, "captured": True}


def run(rank: int, size: int, folder: str, data_dir: str, epochs: int, compile: bool) -> None:
    torch.set_num_threads(1)
    if size > 1:
        group.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=size)
    options, dataset = read(resolve({"data": "mnist", "data_dir": data_dir}))
    vae = build(options, dataset)
    history = fit(
        vae.model, vae.guide, dataset.train, epochs=epochs, batch_size=BATCH, seed=0, progress=False,
        compile="auto" if compile else False,
    )  # fmt: skip
    if rank == 0:
        rates = history["images_per_second"][1:]
        Path(folder, "rate").write_text(str(statistics.median(rates)))
    if size > 1:
        group.destroy_process_group()


def rate(size: int, data_dir: str, epochs: int, compile: bool) -> float:
    with tempfile.TemporaryDirectory() as folder:
        processes.spawn(run, (size, folder, data_dir, epochs, compile), nprocs=size)
        return float(Path(folder, "rate").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=10, help="of a fit; 500 steps are needed for a capture")
    given = parser.parse_args()
    found: dict[tuple[str, int], list[float]] = {}
    for _ in range(given.rounds):
        for way, compile in WAYS.items():
            for size in (1, 2):
                found.setdefault((way, size), []).append(rate(size, given.data_dir, given.epochs, compile))
                print(way, size, f"{found[way, size][-1]:,.0f} images/s", flush=True)
    cpu = machine(1, "cpu")["cpu"]
    lines = [f"{cpu}, one thread each, {BATCH} images per process and step, medians of {given.rounds} rounds in turn."]
    lines += [
        "",
        "| steps | one process, images/s | two processes, images/s | ratio within rounds |",
        "|---|---|---|---|",
    ]
    for way in WAYS:
        one, two = found[way, 1], found[way, 2]
        ratios = [b / a for a, b in zip(one, two, strict=True)]
        medians = [f"{statistics.median(rates):,.0f}" for rates in (one, two)]
        ratio = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
        lines.append(f"| {' | '.join([way, *medians, ratio])} |")
    text = "\n".join(lines) + "\n"
    print(text)
    (RESULTS / "processes.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
