"""Images per second of one training epoch: this package beside its peers, in one run.

    python benchmarks/epoch.py --data mnist --data-dir ../shared/data/mnist

Every row trains the same VAE (784-400-50, softplus, dynamic binarisation, Adam 1e-3) in a
process of its own, so that no library's threads, random state or settings reach another's.
One process runs at a time: after a warm-up epoch each, they take turns, A B C A B C ...,
so that a machine that slows down slows all of them. See benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import importlib.metadata
import importlib.util
import json
import multiprocessing
import os
import platform
import statistics
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
# The package of this checkout is measured, whatever is installed.
sys.path[:0] = [str(HERE.parent)]


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table: a module of `peers` and the options of its `build`."""

    key: str
    title: str
    module: str
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    loader: bool = False  # its batches come from a DataLoader, whose workers are tuned
    needs: str | None = None


BASELINE = "pyro"
ROWS = (
    Row("ours", "pyro_vae, fit (Trace_ELBO)", "ours"),
    Row("ours-objective", "pyro_vae, fit (Objective(elbo))", "ours", {"loss": "Objective"}),
    Row("ours-medium", "pyro_vae, fit, medium matmuls", "ours", {"precision": "medium"}),
    Row("ours-replayed", "pyro_vae, fit, captured, no compiler", "ours", {"compiled": "replay"}),
    Row("ours-compiled", "pyro_vae, fit, compiled", "ours", {"compiled": "inductor"}),
    Row("ours-compiled-objective", "the same, Objective(elbo)", "ours", {"loss": "Objective", "compiled": "inductor"}),
    Row("pyro", "Pyro, its VAE example's idiom", "pyro_idiom", loader=True),
    Row("pyro-memory", "Pyro SVI, data in memory, logits", "pyro_idiom", {"in_memory": True}),
    Row("torch", "PyTorch by hand, DataLoader", "by_hand", loader=True),
    Row("torch-memory", "PyTorch by hand, in memory, fused", "by_hand", {"in_memory": True}),
    Row("torch-medium", "the same, medium matmuls", "by_hand", {"in_memory": True, "precision": "medium"}),
    Row("torch-compile", "the same, torch.compile", "by_hand",
        {"in_memory": True, "precision": "medium", "compiled": True}),
    Row("numpyro", "NumPyro, epoch jitted", "numpyro_idiom", needs="numpyro"),
)


class Peer:
    """A process that builds one row and trains an epoch whenever it is asked to."""

    def __init__(self, row: Row, pixels: np.ndarray, args: argparse.Namespace) -> None:
        self.row, self.workers, self.error = row, None, None
        self.rates: list[float] = []
        self.elbos: list[float] = []
        if row.needs is not None and importlib.util.find_spec(row.needs) is None:
            self.error = "not installed: pip install pyro-vae[benchmarks]"
            return
        context = multiprocessing.get_context("spawn")
        self.pipe, there = context.Pipe()
        candidates = (args.workers if args.workers is not None else [0, 1, 2]) if row.loader else [None]
        self.process = context.Process(
            target=_serve, args=(there, row, pixels, args.batch_size, args.seed, args.threads, candidates)
        )
        self.process.start()
        there.close()
        self._ask()  # built, with the best number of workers

    def epoch(self, warm_up: bool = False) -> None:
        if self.error is None:
            self.pipe.send("epoch")
            self._ask(record=not warm_up)

    def stop(self) -> None:
        if getattr(self, "process", None) is not None:
            self.pipe.close()
            self.process.join()

    def _ask(self, record: bool = True) -> None:
        try:
            answer = self.pipe.recv()
        except EOFError:
            answer = {"error": "its process died"}
        self.error = answer.get("error")
        self.workers = answer.get("workers", self.workers)
        if record and "seconds" in answer:
            self.rates.append(answer["images"] / answer["seconds"])
            self.elbos.append(answer["elbo"])


def _serve(
    pipe: Connection, row: Row, pixels: np.ndarray, batch_size: int, seed: int, threads: int,
    candidates: list[int | None],
) -> None:
    """The peer's side: answer each message with one timed epoch, until the pipe closes."""
    # The same cores for all: torch, OpenMP and XLA all size their pools by this mask.
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    os.environ["OMP_NUM_THREADS"] = str(threads)
    try:
        build = importlib.import_module(f"peers.{row.module}").build

        def fresh(pixels: np.ndarray, workers: int | None) -> Any:
            options = row.options if workers is None else row.options | {"workers": workers}
            return build(pixels, batch_size, seed, **options)

        workers = candidates[0]
        if len(candidates) > 1:
            workers = min(candidates, key=lambda n: _loader_time(fresh(pixels[:6_400], n)))
        epoch = fresh(pixels, workers)
        pipe.send({"workers": workers})
        while pipe.recv() == "epoch":
            started = time.perf_counter()
            images, elbo = epoch()
            pipe.send({"images": images, "elbo": elbo, "seconds": time.perf_counter() - started})
    except EOFError:
        pass
    except Exception as error:
        pipe.send({"error": f"{type(error).__name__}: {error}".splitlines()[0]})


def _loader_time(epoch: Any) -> float:
    """Seconds of the faster of two epochs, after one that starts the workers."""
    times = []
    for _ in range(3):
        started = time.perf_counter()
        epoch()
        times.append(time.perf_counter() - started)
    return min(times[1:])


def load_pixels(args: argparse.Namespace) -> np.ndarray:
    """Training images (N, 784) as uint8: those of the train split, then of validation."""
    import torch

    from pyro_vae.data import load

    dataset = load(args.data, args.data_dir, binarization="dynamic")
    pixels = torch.cat([dataset.train.pixels, dataset.validation.pixels]).flatten(1)
    if pixels.shape[1] != 784 or pixels.dtype != torch.uint8:
        raise SystemExit(f"{args.data}: got data of shape {dataset.train.x_shape}, wanted 8-bit images of 28x28.")
    return pixels[: args.images].numpy()


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("torch", "torchvision", "pyro-ppl", "numpyro", "jax", "jaxlib"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "absent"
    return found | {"pyro-vae": importlib.import_module("pyro_vae.version").__version__}


def summarise(peer: Peer, baseline: Peer | None) -> dict[str, Any]:
    result: dict[str, Any] = {"row": peer.row.key, "title": peer.row.title}
    if peer.error is not None or not peer.rates:
        return result | {"error": peer.error or "no round finished"}
    result |= {
        "images_per_second": peer.rates, "median": statistics.median(peer.rates), "min": min(peer.rates),
        "max": max(peer.rates), "elbo": peer.elbos[-1], "workers": peer.workers,
    }
    if baseline is not None and baseline.error is None and len(baseline.rates) == len(peer.rates):
        ratios = [rate / theirs for rate, theirs in zip(peer.rates, baseline.rates, strict=True)]
        result |= {"ratio": statistics.median(ratios), "ratio_min": min(ratios), "ratio_max": max(ratios)}
    return result


def print_table(results: list[dict[str, Any]]) -> None:
    title = "images per second of one epoch"
    print(f"\n{title:<36}{'median':>8}{'min':>8}{'max':>8}   {'x Pyro (min-max)':<19}{'ELBO':>8}")
    for r in results:
        if "error" in r:
            print(f"{r['title']:<36}{r['error']}")
            continue
        ratio = f"{r['ratio']:5.2f} ({r['ratio_min']:.2f}-{r['ratio_max']:.2f})" if "ratio" in r else ""
        workers = "" if r["workers"] is None else f"   num_workers={r['workers']}"
        rates = "".join(f"{r[key]:>8,.0f}" for key in ("median", "min", "max"))
        print(f"{r['title']:<36}{rates}   {ratio:<19}{r['elbo']:>8.1f}{workers}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="mnist", help="mnist or fashion-mnist")
    parser.add_argument("--data-dir", default=None, help="where its files lie")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5, help="timed epochs of each row")
    parser.add_argument("--images", type=int, default=60_000, help="train on the first ... images")
    parser.add_argument("--threads", type=int, default=2, help="cores and threads of each row")
    parser.add_argument("--workers", type=int, nargs="+", help="num_workers to choose from (0 1 2)")
    parser.add_argument("--rows", nargs="+", choices=[row.key for row in ROWS], help="only these rows")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the results to this file, too")
    args = parser.parse_args()
    if min(args.rounds, args.batch_size, args.threads) < 1 or args.images < args.batch_size:
        parser.error("wanted --rounds, --batch-size, --threads >= 1 and --images >= --batch-size.")
    pixels = load_pixels(args)
    setup = {
        "cpu": cpu_name(), "cores": os.cpu_count(), "threads": args.threads,
        "load_before": round(os.getloadavg()[0], 2), "data": args.data, "images": len(pixels),
        "batch_size": args.batch_size, "rounds": args.rounds, "versions": versions(),
        "network": "784-400-50, softplus", "binarization": "dynamic", "optimizer": "Adam 1e-3",
    }
    print(f"{setup['cpu']}, {setup['threads']} of {setup['cores']} cores, load before {setup['load_before']}")
    print(", ".join(f"{name} {version}" for name, version in setup["versions"].items()))
    print(f"{args.data}, {len(pixels):,} images, batch {args.batch_size}, {setup['network']}, dynamic binarisation, "
          f"{setup['optimizer']}; one warm-up epoch, then {args.rounds} interleaved rounds", flush=True)
    peers: list[Peer] = []
    try:
        for row in ROWS:
            if args.rows and row.key not in args.rows:
                continue
            peers.append(Peer(row, pixels, args))
            peers[-1].epoch(warm_up=True)
        for number in range(1, args.rounds + 1):
            for peer in peers:
                peer.epoch()
            shown = "  ".join(f"{p.row.key} {p.rates[-1]:,.0f}" for p in peers if p.rates and p.error is None)
            print(f"round {number}: {shown}", flush=True)
    finally:
        for peer in peers:
            peer.stop()
    baseline = next((peer for peer in peers if peer.row.key == BASELINE), None)
    results = [summarise(peer, baseline) for peer in peers]
    print_table(results)
    print(
        f"ELBO: mean over training epoch {args.rounds + 1}, the last, in nats; the rows should agree to\n"
        "a few nats (the closed-form KL learns a little faster at first).\n"
        "x Pyro: median over rounds of the ratio to Pyro's idiom in the same round."
    )
    if args.json is not None:
        args.json.write_text(json.dumps({"setup": setup, "rows": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
