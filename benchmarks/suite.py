"""The benchmark suite: this package beside its peers, all in one run, as Markdown and JSON.

    python benchmarks/suite.py --data-dir ../shared/data/mnist --json suite.json > suite.md

Every row has a process of its own on the same cores; one runs at a time; after a warm-up they
take turns, and ratios are formed within a round. Progress goes to stderr, tables to stdout.
See benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
# The package of this checkout is measured, whatever is installed.
sys.path[:0] = [str(HERE.parent), str(HERE)]

import startup  # noqa: E402
from rounds import Group, run_group  # noqa: E402
from sections import Section, sections  # noqa: E402
from summary import describe, heading, machine, summarise_all  # noqa: E402

NAMES = ("epochs", "convolutional", "iwae", "evaluation", "startup", "quality", "scaling", "profile")


def common_arguments(parser: argparse.ArgumentParser) -> None:
    """What `suite.py` and `epoch.py` have in common."""
    parser.add_argument("--data", default="mnist", help="mnist or fashion-mnist")
    parser.add_argument("--data-dir", default=None, help="where its files lie")
    parser.add_argument("--threads", type=int, default=2, help="cores and threads of each row")
    parser.add_argument("--workers", type=int, nargs="+", help="num_workers to choose from (0 1 2)")
    parser.add_argument("--device", default="cpu", help="cpu, or cuda; jax takes the GPU by itself there")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--before", type=_checkout, metavar="CHECKOUT",
                        help="beside the rows of this package, the same of another checkout of it")  # fmt: skip
    parser.add_argument("--json", type=Path, help="write the results to this file, too")


def _checkout(path: str) -> Path:
    found = Path(path).resolve()
    if not (found / "pyro_vae" / "__init__.py").is_file():
        raise argparse.ArgumentTypeError(f"{found} is no checkout of this package: it has no pyro_vae/__init__.py")
    return found


def load_pixels(args: argparse.Namespace) -> np.ndarray:
    """Training images (N, 784) as uint8: those of the train split, then of validation."""
    import torch

    from pyro_vae.data import load

    dataset = load(args.data, args.data_dir, binarization="dynamic")
    pixels = torch.cat([dataset.train.pixels, dataset.validation.pixels]).flatten(1)
    if pixels.shape[1] != 784 or pixels.dtype != torch.uint8:
        raise SystemExit(f"{args.data}: got data of shape {dataset.train.x_shape}, wanted 8-bit images of 28x28.")
    return pixels.numpy()


def adapted(group: Group, args: argparse.Namespace, available: int) -> Group:
    """A group with the images, rounds, rows and seed of the command line."""
    if args.before is not None:
        there = [row for row in group.rows if row.module == "peers.ours"]
        before = [
            dataclasses.replace(row, key=f"before-{row.key}", title=f"{row.title}, before", checkout=str(args.before))
            for row in there
        ]
        group = dataclasses.replace(group, rows=(*group.rows, *before))
    images = min(group.images, args.images or group.images, available)
    return dataclasses.replace(
        group,
        problem=dataclasses.replace(group.problem, seed=args.seed),
        images=max(images, group.problem.batch_size),
        rounds=args.rounds or group.rounds,
        rows=tuple(row for row in group.rows if not args.rows or row.key in args.rows),
    )


def run_section(section: Section, args: argparse.Namespace, pixels: np.ndarray, deadline: float) -> dict[str, Any]:
    """Its Markdown as `text`, and its numbers."""
    groups = [adapted(group, args, len(pixels)) for group in section.groups]
    groups = [group for group in groups if group.rows]
    peers = []
    for number, group in enumerate(groups):
        now = time.monotonic()
        share = now + (deadline - now) / (len(groups) - number)
        say(f"{section.name}: {group.title}")
        peers.append(run_group(group, pixels, args.threads, args.workers, share, say))
    kept = [describe(g) | {"rows": summarise_all(found)} for g, found in zip(groups, peers, strict=True)]
    return {"text": section.render(groups, peers) if groups else "no such rows", "groups": kept}


def say(text: str) -> None:
    """Progress."""
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common_arguments(parser)
    parser.add_argument("--sections", nargs="+", choices=NAMES, default=list(NAMES), help="only these")
    parser.add_argument("--budget", type=float, default=25.0, metavar="MINUTES",
                        help="begin no further round when a section's share of it is spent")  # fmt: skip
    parser.add_argument("--images", type=int, help="at the most, in every section")
    parser.add_argument("--rounds", type=int, help="timed calls of each row, in every section")
    parser.add_argument("--rows", nargs="+", help="only rows of these names")
    parser.add_argument("--keep", action="store_true", help="also write results/CLASS/suite.json and .md; CLASS is "
                        "that of the processor")  # fmt: skip
    args = parser.parse_args()
    if min(args.rounds or 1, args.images or 1, args.threads) < 1 or args.budget <= 0:
        parser.error("wanted --rounds, --images, --threads >= 1 and --budget > 0.")
    known = {section.name: section for section in sections(args.device)}
    minutes = {name: known[name].minutes if name in known else startup.MINUTES for name in NAMES}
    todo = [name for name in NAMES if name in args.sections]
    pixels = load_pixels(args)
    setup = machine(args.threads, args.device) | {"data": args.data, "seed": args.seed, "command": sys.argv[1:]}
    started = time.monotonic()
    protocol = f"{args.data}, dynamic binarisation, Adam 1e-3; warm-up, then interleaved rounds"
    page = [f"{heading(setup)}\n{protocol}"]
    print(page[0], flush=True)
    results: dict[str, Any] = {"setup": setup, "sections": {}}
    for i, name in enumerate(todo):
        now = time.monotonic()
        left = started + 60 * args.budget - now
        deadline = now + left * minutes[name] / sum(minutes[other] for other in todo[i:])
        if name == startup.NAME:
            say(name)
            title = startup.TITLE
            text, kept = startup.run(pixels, args.device, args.threads, args.rounds or 2, deadline, args.rows, say)
        else:
            title = known[name].title
            kept = run_section(known[name], args, pixels, deadline)
            text = kept.pop("text")
        spent = time.monotonic() - now
        page.append(f"## {title}\n\n{text}")
        print(f"\n{page[-1]}", flush=True)
        results["sections"][name] = {"title": title, "seconds": spent, "load_after": os.getloadavg()[0]} | kept
        numbers = json.dumps(results, indent=1) + "\n"
        if args.json is not None:  # after each section, so that a run which is broken off leaves what it has
            args.json.write_text(numbers)
        if args.keep:
            folder = HERE / "results" / setup["class"]
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "suite.json").write_text(numbers)
            (folder / "suite.md").write_text("\n\n".join(page) + "\n")
    say(f"{(time.monotonic() - started) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
