"""How much faster two processes fit than one, each on one thread.

    python benchmarks/processes.py --data-dir ../shared/data/mnist      # 15 minutes

The default network of `pyro-vae fit --data mnist`, 512 images per process and step, eager and captured. Each round has
one fit of each kind, in turn; a rate is the median of a fit's epochs but the first. Beside the fit of two processes
there are two fits of one process at the same time, which do not talk: what two cores of this machine give, which
share caches and memory. Writes benchmarks/results/processes.md.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

import torch
import torch.distributed as group
import torch.multiprocessing as processes
from pyro.infer import Trace_ELBO
from summary import machine

from pyro_vae.app.building import build
from pyro_vae.app.defaults import resolve
from pyro_vae.app.reading import read
from pyro_vae.inference.compiled import Compiled
from pyro_vae.inference.training import fit

RESULTS = Path(__file__).parent / "results"
BATCH = 512
WAYS = {"eager": False, "captured": True}
KINDS = ("one", "apart", "two")


def run(rank: int, size: int, together: bool, folder: str, data_dir: str, epochs: int, compile: bool) -> None:
    torch.set_num_threads(1)
    if together:
        group.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=size)
    options, dataset = read(resolve({"data": "mnist", "data_dir": data_dir}))
    vae = build(options, dataset)
    history = fit(
        vae.model, vae.guide, dataset.train, epochs=epochs, batch_size=BATCH, seed=0, progress=False,
        compile=False, loss=Compiled(Trace_ELBO(), compile_after=None) if compile else Trace_ELBO(),
    )  # fmt: skip
    if rank == 0 or not together:
        rates = history["images_per_second"][1:]
        Path(folder, f"rate{rank}").write_text(str(statistics.median(rates)))
    if together:
        group.destroy_process_group()


def rate(kind: str, data_dir: str, epochs: int, compile: bool) -> float:
    """Images a second of all processes."""
    size = 1 if kind == "one" else 2
    with tempfile.TemporaryDirectory() as folder:
        processes.spawn(run, (size, kind == "two", folder, data_dir, epochs, compile), nprocs=size)
        return sum(float(file.read_text()) for file in Path(folder).glob("rate*"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=5, help="of a fit; its first is not counted")
    given = parser.parse_args()
    found: dict[tuple[str, str], list[float]] = {}
    for _ in range(given.rounds):
        for way, compile in WAYS.items():
            for kind in KINDS:
                found.setdefault((way, kind), []).append(rate(kind, given.data_dir, given.epochs, compile))
                print(way, kind, f"{found[way, kind][-1]:,.0f} images/s", flush=True)
    cpu = machine(1, "cpu")["cpu"]
    lines = [f"{cpu}, one thread each, {BATCH} images per process and step, medians of {given.rounds} rounds in turn."]
    lines += [
        "",
        "| steps | one process, images/s | two that do not talk | two processes | ratio in a round | of those apart |",
        "|---|---|---|---|---|---|",
    ]
    for way in WAYS:
        rates = [found[way, kind] for kind in KINDS]
        medians = [f"{statistics.median(each):,.0f}" for each in rates]
        shown = []
        for kind in ("two", "apart"):
            ratios = [b / a for a, b in zip(found[way, "one"], found[way, kind], strict=True)]
            shown.append(f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})")
        lines.append(f"| {' | '.join([way, *medians, *shown])} |")
    text = "\n".join(lines) + "\n"
    print(text)
    (RESULTS / "processes.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
