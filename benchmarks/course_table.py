"""The table of notebook 5: how good two posteriors are on MNIST at full size, in a bounded time on one core.

    python benchmarks/course_table.py --data-dir ../shared/data/mnist     # about 20 CPU minutes on one core
    python benchmarks/course_table.py --print                             # the table of what is there

The default network for MNIST, 784-500-500-50, with its diagonal posterior and with an inverse autoregressive flow, each
fitted together with its own model for the same few epochs: a tenth of the default's, so these are not the best
numbers that it reaches (docs/results.md has those). Then, for each pair,

* on all 10,000 test images: ELBO, importance-weighted bounds, log p(x) with k-hat, and their difference, the gap;
* on the first test images: log p(x) by annealed importance sampling, and the gap split into the family's and the
  encoder's part beside it;
* on images that the model has drawn: the bracket, which says how far annealing is from log p(x).

Nothing is selected on the test set. It writes FOLDER/course_table.json and .md after each posterior, and goes on where
it was broken off. The seconds are CPU seconds, with those of the compiler's processes; a seed makes the numbers
repeatable on one processor.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]

from summary import cpu_name  # noqa: E402

from pyro_vae import VAE, ais, bdmc, elbo_terms, fit, gaps, load, log_likelihood  # noqa: E402
from pyro_vae.app.defaults import DATASETS  # noqa: E402
from pyro_vae.app.evaluation import versions  # noqa: E402
from pyro_vae.atomic import replace_file  # noqa: E402
from pyro_vae.inference.batches import seeded  # noqa: E402
from pyro_vae.judging.quotes import lower_bound  # noqa: E402

FOLDER = Path(__file__).resolve().parent / "results"
POSTERIORS = ("diagonal", "iaf")
SHOWN = (1, 10, 100)  # values of K with a column of their own


def cpu_seconds() -> float:
    """User and system time of this process and of those that it has waited for."""
    return sum(os.times()[:4])


def numbers(part: Any) -> list[float]:
    """A value with its two errors."""
    return [part.value, part.mc_stderr, part.data_stderr]


def whole(vae: VAE, test: Any, arguments: argparse.Namespace) -> dict[str, Any]:
    """What is computed on all test images."""
    terms = elbo_terms(vae, test, num_samples=50, progress=False)
    found = log_likelihood(vae, test, num_samples=arguments.num_samples, progress=False)
    assert found.curve is not None
    lost = found.pointwise - terms.pointwise
    gap = [lost.mean().item(), math.hypot(found.mc_stderr, terms.mc_stderr), lost.std().item() / len(lost) ** 0.5]
    return {
        "images": len(lost), "elbo": numbers(terms), "kl": terms.kl, "log_p": numbers(found), "gap": gap,
        "num_samples": found.num_samples, "kind": found.kind, "khat_ok": found.khat_ok, "bias": found.bias,
        "curve": found.curve.rows(),
    }  # fmt: skip


def annealed(vae: VAE, test: Any, arguments: argparse.Namespace) -> dict[str, Any]:
    """log p(x) of the first test images by annealing, and beside it the split of the gap."""
    few = test.subset(slice(arguments.images))
    chains = {"start": "prior", "num_samples": arguments.chains, "num_steps": arguments.steps, "progress": False}
    log_p = ais(vae, few, **chains)
    split = gaps(vae, few, log_likelihood=log_p, progress=False)
    own = split.families["guide"]
    sampled = log_likelihood(vae, few, num_samples=arguments.num_samples, progress=False)
    names = ("optimum", "amortized", "approximation", "amortization", "inference")
    parts = {name: getattr(own, name) for name in names}
    return {
        "images": len(few), "said": [str(log_p), str(split)], "log_p": numbers(log_p), "reason": log_p.reason,
        "sampled": numbers(sampled), "sampled_khat_ok": sampled.khat_ok, "chains": arguments.chains,
        "steps": arguments.steps,
    } | {name: None if part is None else numbers(part) for name, part in parts.items()}  # fmt: skip


def bracketed(vae: VAE, test: Any, arguments: argparse.Namespace) -> dict[str, Any]:
    """The bracket on images that the model has drawn."""
    found = bdmc(
        vae, test, num_data=arguments.simulated, start="prior", num_samples=arguments.chains,
        num_steps=arguments.steps, progress=False,
    )  # fmt: skip
    return {
        "images": arguments.simulated, "said": str(found), "lower": numbers(found.lower), "upper": numbers(found.upper),
        "width": numbers(found.width), "reason": found.reason,
    }  # fmt: skip


PARTS: dict[str, Callable[[VAE, Any, argparse.Namespace], dict[str, Any]]] = {
    "whole": whole, "annealed": annealed, "bracket": bracketed,
}  # fmt: skip


def measure(posterior: str, dataset: Any, arguments: argparse.Namespace) -> dict[str, Any]:
    """All of one posterior."""
    options, seconds, before = DATASETS["mnist"], {}, cpu_seconds()

    def timed(name: str) -> None:
        nonlocal before
        seconds[name], before = cpu_seconds() - before, cpu_seconds()
        print(f"{posterior} {name}: {seconds[name]:.0f} CPU seconds", file=sys.stderr, flush=True)

    with seeded(arguments.seed):
        vae = VAE.build(dataset.x_shape, latent_dim=options.latent_dim, hidden=options.hidden, posterior=posterior)
    history = fit(
        vae, dataset.train, epochs=arguments.epochs, batch_size=options.batch_size,
        learning_rate=options.learning_rate, schedule=options.schedule, seed=arguments.seed, progress=False,
    )  # fmt: skip
    timed("fit")
    test, row = dataset.test.frozen(seed=0), {"train_bound": history["bound"][-1]}
    for name, part in PARTS.items():
        row[name] = part(vae, test, arguments)
        timed(name)
    return row | {"seconds": seconds}


def table(results: dict[str, Any]) -> str:
    """What the notebook shows, as Markdown."""
    rows, settings = results["rows"], results["settings"]
    first = next(iter(rows.values()))
    of = first["whole"]
    lines = [
        f"MNIST, dynamic binarisation, 784-{'-'.join(map(str, settings['hidden']))}-{settings['latent_dim']} and back, "
        f"{settings['epochs']} epochs. Nats per image; ± Monte Carlo error (data ± error for other images).",
        "",
        f"All {of['images']:,} test images:",
        "",
        f"| posterior | ELBO | {' | '.join(f'IWAE, K = {k}' for k in SHOWN[1:])} | log p(x), K = {of['num_samples']} | "
        "k̂ ok | gap |",
        "|---" * (5 + len(SHOWN[1:])) + "|",
    ]
    for name, row in rows.items():
        found, curve = row["whole"], {point["num_samples"]: point for point in row["whole"]["curve"]}
        below = found["kind"] == "lower bound"
        bounds = " | ".join(f"{curve[k]['value']:.2f} ± {curve[k]['mc_stderr']:.2f}" for k in SHOWN[1:])
        lines.append(
            f"| {name} | {_both(found['elbo'])} | {bounds} | {_quoted(found['log_p'], below)} | "
            f"{found['khat_ok']:.0%} | {_quoted(found['gap'], below)} |"
        )
    near = first["annealed"]
    lines += [
        "",
        f"The first {near['images']} test images, log p(x) by annealing from the prior ({near['chains']} chains of "
        f"{near['steps']} steps):",
        "",
        f"| posterior | log p(x), K = {of['num_samples']} | log p(x), annealed | L[q*] | L[q] | approximation + "
        "amortization = inference gap |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        found = row["annealed"]
        split = [_one(found[part]) for part in ("approximation", "amortization", "inference")]
        lines.append(
            f"| {name} | {_one(found['sampled'])} | {_both(found['log_p'])} | {_one(found['optimum'])} | "
            f"{_one(found['amortized'])} | {split[0]} + {split[1]} = **{split[2]}** |"
        )
    lines += [
        "",
        f"The bracket of log p(x), on {first['bracket']['images']} images that each model has drawn:",
        "",
        "| posterior | lower bound | upper bound | width |",
        "|---|---|---|---|",
    ]
    for name, row in rows.items():
        found = row["bracket"]
        width = f"{found['width'][0]:.3f} (data ± {found['width'][2]:.3f})"
        lines.append(f"| {name} | {_one(found['lower'])} | {_one(found['upper'])} | {width} |")
    took = {name: sum(row["seconds"].values()) for name, row in rows.items()}
    each = [f"{name} {took[name]:.0f}, of it the fit {row['seconds']['fit']:.0f}" for name, row in rows.items()]
    lines += [
        "",
        f"`{results['command']}`: {sum(took.values()):.0f} CPU seconds ({'; '.join(each)}), one thread of "
        f"{results['processor']}, torch {results['versions']['torch']}.",
    ]
    return "\n".join(lines)


def _one(part: list[float] | None) -> str:
    return "-" if part is None else f"{part[0]:.2f} ± {part[1]:.2f}"


def _both(part: list[float]) -> str:
    return f"{part[0]:.2f} ± {part[1]:.2f} (data ± {part[2]:.2f})"


def _quoted(part: list[float], below: bool) -> str:
    """A log p(x) as it may be quoted."""
    return f"{lower_bound(part[0])} (data ± {part[2]:.2f})" if below else _both(part)


def command(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> str:
    """What to type for the same numbers, wherever data and results lie."""
    given = [(name, value) for name, value in vars(arguments).items() if value != parser.get_default(name)]
    options = [f"--{name.replace('_', '-')} {value}" for name, value in given if name not in ("data_dir", "folder")]
    return " ".join(["python benchmarks/course_table.py --data-dir path/to/mnist", *options])


def _there(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Rows of an earlier run with the same settings, which was broken off."""
    kept = json.loads(path.read_text()) if path.exists() else {}
    return kept["rows"] if kept.get("settings") == settings else {}


def main() -> None:
    """Fit, judge, write and print; or only print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, help="where MNIST lies")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="of the results [benchmarks/results]")
    parser.add_argument("--epochs", type=int, default=26)
    parser.add_argument("--num-samples", type=int, default=500, help="K, on all test images [500]")
    parser.add_argument("--images", type=int, default=100, help="for annealing and the split [100]")
    parser.add_argument("--simulated", type=int, default=50, help="for the bracket [50]")
    parser.add_argument("--chains", type=int, default=8)
    parser.add_argument("--steps", type=int, default=500, help="of a chain [500]")
    parser.add_argument("--limit", type=int, help="of the data, to see whether it runs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--print", action="store_true", help="only print what is there")
    arguments = parser.parse_args()
    path = arguments.folder / "course_table.json"
    if not arguments.print:
        torch.set_num_threads(1)
        dataset = load("mnist", arguments.data_dir, limit=arguments.limit)
        options = DATASETS["mnist"]
        settings = {"hidden": list(options.hidden), "latent_dim": options.latent_dim, "batch_size": options.batch_size}
        elsewhere = ("data_dir", "folder", "print")
        settings |= {name: value for name, value in vars(arguments).items() if name not in elsewhere}
        rows = _there(path, settings)
        for name in [name for name in POSTERIORS if name not in rows]:
            rows[name] = measure(name, dataset, arguments)
            results = {
                "command": command(parser, arguments), "processor": cpu_name(), "versions": versions(), "rows": rows,
                "settings": settings,
            }  # fmt: skip
            text, markdown = json.dumps(results, indent=1), table(results) + "\n"
            replace_file(path, lambda partial, text=text: partial.write_text(text))
            replace_file(path.with_suffix(".md"), lambda partial, text=markdown: partial.write_text(text))
    print(table(json.loads(path.read_text())))


if __name__ == "__main__":
    main()
