"""Data larger than memory: the speed of a fit to a memory map beside that of one to the same images in memory.

    python benchmarks/streaming.py     # a quarter of an hour, 6 GB of disk; writes benchmarks/results/streaming.md

The default network of `pyro-vae fit` (784-400-400-32) at batch 128, captured, one thread, binarised afresh in each
batch, as `Split(numpy.load("x.npy", mmap_mode="r"), binarization="dynamic")`. A fit is broken off after seconds,
and its rate is that of the steps after the first 500. Each row is a process of its own; the rows take turns, round by
round, and ratios are formed within a round.

Images are synthetic: random bytes. The file of 1 GB and that of 5 GB are written whole. That of 20 GB is
SPARSE, since there is no room for it: it consists of holes, which the kernel fills with zeros, page by page, without a
disk. "cold" drops the file from the page cache before the fit (`posix_fadvise`), so that the
rows come from the disk.

Memory is the peak of RssAnon in /proc/self/status, looked at in every batch: what the process holds apart from pages of
files, which the kernel takes back when it needs them. VmHWM has those too.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from summary import machine, table

import pyro_vae as pv
from pyro_vae.data import Split
from pyro_vae.inference.compiled import Compiled
from pyro_vae.inference.objectives import default_loss

RESULTS = Path(__file__).parent / "results"
SHAPE, BATCH, SKIPPED = (1, 28, 28), 128, 500
GB = 10**9
ROWS = {  # title: (GB, in memory, cold)
    "in memory, 1 GB": (1, True, False),
    "memory map, 1 GB": (1, False, False),
    "memory map, 5 GB": (5, False, False),
    "memory map, 5 GB, cold": (5, False, True),
    "memory map, 20 GB (sparse)": (20, False, False),
}


class Watched(Split):
    """A split that looks at clock and memory, and breaks the fit off when its time is up."""

    def watch(self, seconds: float) -> None:
        found: dict[str, Any] = {"times": [], "anonymous": 0.0, "end": None, "seconds": seconds}
        object.__setattr__(self, "seen", found)

    def __getitem__(self, index: Any) -> torch.Tensor:
        seen: dict[str, Any] | None = getattr(self, "seen", None)
        if seen is not None and len(index) == BATCH:
            now = time.perf_counter()
            seen["times"].append((now, time.process_time()))
            seen["anonymous"] = max(seen["anonymous"], status("RssAnon"))
            if len(seen["times"]) == SKIPPED:
                seen["end"] = now + seen["seconds"]
            if seen["end"] is not None and now > seen["end"]:
                raise KeyboardInterrupt
        return super().__getitem__(index)


def status(name: str) -> float:
    """MB, of a line of /proc/self/status."""
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(name)) * 1024 / 1e6


def written(path: Path, size: int, whole: int) -> None:
    """Images of `size` bytes, of which the first `whole` are random and the others holes."""
    count = size // int(np.prod(SHAPE))
    array = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=(count, *SHAPE))
    random = np.random.default_rng(0)
    for start in range(0, whole // int(np.prod(SHAPE)), 100_000):
        part = array[start : min(start + 100_000, whole // int(np.prod(SHAPE)))]
        part[:] = np.frombuffer(random.bytes(part.size), np.uint8).reshape(part.shape)
    array.flush()


def one(path: Path, in_memory: bool, cold: bool, seconds: float) -> dict[str, float]:
    """The rate and the memory of one fit."""
    torch.set_num_threads(1)
    if cold:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    images = np.load(path, mmap_mode=None if in_memory else "r")
    data = Watched(torch.from_numpy(images) if in_memory else images, binarization="dynamic")
    torch.manual_seed(0)
    vae = pv.VAE.build(SHAPE, latent_dim=32, hidden=(400, 400))
    before = status("RssAnon")
    data.watch(seconds)
    with contextlib.suppress(KeyboardInterrupt):
        pv.fit(vae.model, vae.guide, data, loss=Compiled(default_loss(vae.guide)), epochs=1, batch_size=BATCH, seed=0,
               progress=False)  # fmt: skip
    seen = data.seen  # type: ignore[attr-defined]
    times = seen["times"][SKIPPED:]
    took, used = (last - first for first, last in zip(times[0], times[-1], strict=True))
    return {
        "rate": BATCH * (len(times) - 1) / took, "cpu rate": BATCH * (len(times) - 1) / used,
        "grown": seen["anonymous"] - before, "anonymous": seen["anonymous"], "peak": status("VmHWM"),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=15)
    parser.add_argument("--folder", type=Path, help="where the images are written, and removed at the end")
    parser.add_argument("--rows", nargs="*", help="words of which a row must have one")
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one is not None:
        path, in_memory, cold, seconds = given.one
        print(json.dumps(one(Path(path), in_memory == "True", cold == "True", float(seconds))))
        return
    rows = {k: v for k, v in ROWS.items() if given.rows is None or any(word in k for word in given.rows)}
    found: dict[str, list[dict[str, float]]] = {title: [] for title in rows}
    with tempfile.TemporaryDirectory(dir=given.folder) as scratch:
        paths = {size: Path(scratch, f"{size}.npy") for size in {size for size, *_ in rows.values()}}
        for size, path in paths.items():
            written(path, size * GB, 0 if size == 20 else size * GB)
        for turn in range(given.rounds):
            for title, (size, in_memory, cold) in rows.items():
                arguments = ["--one", str(paths[size]), str(in_memory), str(cold), str(given.seconds)]
                command = [sys.executable, __file__, *arguments]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                found[title].append(json.loads(done.stdout.splitlines()[-1]))
                print(turn, title, found[title][-1], flush=True)
    base = next(iter(found))
    lines = []
    for title, each in found.items():
        median = {key: statistics.median(one[key] for one in each) for key in each[0]}
        shown = []
        for key in ("rate", "cpu rate"):
            ratios = [a[key] / b[key] for a, b in zip(each, found[base], strict=True)]
            ratio = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
            shown += [f"{median[key]:,.0f}", "" if title == base else ratio]
        lines.append([title, *shown,
                      f"{median['anonymous']:,.0f}", f"{median['peak']:,.0f}"])  # fmt: skip
    text = (
        f"{machine(1, 'cpu')['cpu']}, one thread, {given.rounds} rounds in turn, medians; 784-400-400-32, batch "
        f"{BATCH}, captured. The files of 1 and 5 GB are random bytes; that of 20 GB is sparse: holes, "
        'which cost a page fault and no disk. "cold" reads from the disk.\n\n'
    )
    header = ["data", "images/s", "ratio within rounds", "images per CPU second", "ratio"]
    header += ["memory without pages of files, MB", "with them, MB"]
    text += table(header, lines) + "\n"
    print(text)
    if given.rows is None:
        (RESULTS / "streaming.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
