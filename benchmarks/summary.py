"""From timings to numbers, and from numbers to Markdown."""

from __future__ import annotations

import importlib
import importlib.metadata
import math
import os
import platform
import re
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rounds import Group, Peer, Row, Timing

BASELINES = {"pyro": "× Pyro", "numpyro": "× NumPyro", "floor": "of the floor"}
# Of AMD's family and models, from /proc/cpuinfo: which instructions and how wide their units are.
_ZEN = {23: "zen2", 26: "zen5"}
_ZEN4 = (*range(0x10, 0x20), *range(0x60, 0x80), *range(0xA0, 0xB0))


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and range."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def ratio(ours: Sequence[Timing], theirs: Sequence[Timing]) -> dict[str, float] | None:
    """How many times the rate of another row: formed within each round that both have, then the median."""
    rates = {timing.round: timing.rate for timing in theirs}
    found = [timing.rate / rates[timing.round] for timing in ours if timing.round in rates]
    return spread(found) if found else None


def summarise(
    row: Row,
    timings: Sequence[Timing],
    baselines: Mapping[str, Sequence[Timing]],
    error: str | None = None,
    workers: int | None = None,
) -> dict[str, Any]:
    """What a table says about a row; of one that failed only why."""
    result: dict[str, Any] = {"row": row.key, "title": row.title}
    if error is not None or not timings:
        return result | {"error": error or "no round finished"}
    rates = [timing.rate for timing in timings]
    ratios = {key: ratio(timings, theirs) for key, theirs in baselines.items()}
    return result | {
        "images_per_second": rates, **spread(rates), "ratios": {k: r for k, r in ratios.items() if r is not None},
        "value": timings[-1].value, "memory_mb": max(timing.memory for timing in timings), "workers": workers,
        "cores_apart": [None if math.isnan(timing.cores) else round(timing.cores, 2) for timing in timings],
    }  # fmt: skip


def summarise_all(peers: Sequence[Peer]) -> list[dict[str, Any]]:
    """All rows of a group, beside those of `BASELINES` among them that did not fail."""
    baselines = {p.row.key: p.timings for p in peers if p.row.key in BASELINES and p.error is None}
    return [summarise(p.row, p.timings, baselines, p.error, p.workers) for p in peers]


def describe(group: Group) -> dict[str, Any]:
    """The settings of a group, for the JSON file."""
    problem = group.problem
    return {
        "title": group.title, "network": str(problem), "bound": problem.bound, "batch_size": problem.batch_size,
        "latent": problem.latent, "num_samples": problem.num_samples, "images": group.images, "device": problem.device,
    }  # fmt: skip


def apart(timings: Sequence[Timing]) -> str:
    """How far the cores were from each other in these rounds, in words; nothing where that is not known."""
    found = [timing.cores for timing in timings if not math.isnan(timing.cores)]
    if not found:
        return ""
    return f", cores {statistics.median(found):.1f} ({min(found):.1f}-{max(found):.1f}) apart"


def cell(text: str) -> str:
    """Text that does not end a cell of Markdown."""
    return text.replace("|", "\\|").replace("\n", " ")


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown, its first column to the left."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def rates_table(results: Sequence[Mapping[str, Any]], value: str) -> str:
    """Rates, ratios, the bound and the memory of each row; one line of reason for a row that failed."""
    baselines = [key for key in BASELINES if any(key in r.get("ratios", {}) for r in results)]
    header = ["", "images/s", "min-max", *(f"{BASELINES[key]} (min-max)" for key in baselines), value, "peak MB"]
    rows = []
    for r in results:
        if "error" in r:
            rows.append([cell(r["title"]), cell(f"failed: {r['error']}"), *[""] * (len(header) - 2)])
            continue
        title = r["title"] if r["workers"] is None else f"{r['title']}, num_workers={r['workers']}"
        ratios = [ratio_text(r["ratios"].get(key)) for key in baselines]
        rows.append(
            [cell(title), f"{r['median']:,.0f}", f"{r['min']:,.0f}-{r['max']:,.0f}", *ratios, _value(r["value"]),
             f"{r['memory_mb']:,.0f}"]
        )  # fmt: skip
    return table(header, rows)


def _value(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.2f}"


def ratio_text(found: Mapping[str, float] | None) -> str:
    """A ratio with its range."""
    return "" if found is None else f"{found['median']:.2f} ({found['min']:.2f}-{found['max']:.2f})"


def machine(threads: int, device: str) -> dict[str, Any]:
    """Processor, load and versions: what every table of numbers has above it."""
    setup = {"cpu": cpu_name(), "class": processor_class(), "cores": os.cpu_count(), "threads": threads,
             "device": device, "gflops": round(product_speed(threads))}  # fmt: skip
    if device.startswith("cuda"):
        setup["gpu"] = _gpu_name()
    return setup | {"load_before": round(os.getloadavg()[0], 2), "versions": versions()}


def heading(setup: Mapping[str, Any]) -> str:
    """The same in two lines."""
    gpu = f", {setup['gpu']}" if "gpu" in setup else ""
    cores = f"{setup['threads']} of {setup['cores']} cores{gpu}"
    return (
        f"{setup['cpu']} ({setup['class']}), {setup['gflops']} GFLOP/s in a large product, {cores}, load before "
        f"{setup['load_before']}\n" + ", ".join(f"{name} {version}" for name, version in setup["versions"].items())
    )


def versions() -> dict[str, str]:
    """Of Python and of all that is compared."""
    found = {"python": platform.python_version()}
    for name in ("torch", "torchvision", "pyro-ppl", "numpyro", "jax", "jaxlib"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "absent"
    return found | {"pyro-vae": importlib.import_module("pyro_vae").__version__}


def processor_class() -> str:
    """Which kind of processor this is, as a word that can name a folder: zen5, or what the machine calls itself."""
    try:
        lines = [line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().splitlines() if ":" in line]
    except OSError:
        return platform.machine().lower() or "unknown"
    return class_of({key.strip(): value.strip() for key, value in reversed(lines)})


def class_of(info: Mapping[str, str]) -> str:
    """The same of what /proc/cpuinfo says of one core."""
    family, model = int(info.get("cpu family", 0)), int(info.get("model", 0))
    if info.get("vendor_id") == "AuthenticAMD" and family == 25:
        return "zen4" if model in _ZEN4 else "zen3"
    if info.get("vendor_id") == "AuthenticAMD" and family in _ZEN:
        return _ZEN[family]
    name = info.get("model name") or platform.machine()
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "unknown"


def product_speed(threads: int, size: int = 1024) -> float:
    """GFLOP/s of a large square product of float32, the best of ten."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        a, b = torch.randn(size, size), torch.randn(size, size)
        times = []
        for _ in range(10):
            start = time.perf_counter()
            torch.mm(a, b)
            times.append(time.perf_counter() - start)
    finally:
        torch.set_num_threads(before)
    return 2e-9 * size**3 / min(times)


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _gpu_name() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU found"
