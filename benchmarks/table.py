"""Print run folders as one Markdown table per protocol: the README's results.

    python benchmarks/table.py runs/mnist runs/fashion-mnist runs/digits

Numbers of different protocols never share a row block: each dataset and binarisation
gets a heading of its own. Everything printed is read from the runs' summary.json.
"""

from __future__ import annotations

import json
import math
import sys
from itertools import groupby
from pathlib import Path
from typing import Any

from pyro_vae.judging.quotes import kind_of, lower_bound


def protocol_of(summary: dict[str, Any]) -> str:
    """What makes numbers comparable."""
    p = summary["protocol"]
    return f"{p['dataset']}, {p['binarization']} binarisation, {p['test_images']:,} test images"


def row(path: Path, config: dict[str, Any], summary: dict[str, Any]) -> str:
    """One run."""
    network = "-".join(map(str, config["hidden"])) if config["hidden"] else "linear"
    value, ok = summary["test_log_likelihood"], summary.get("test_khat_ok")
    errors = summary["test_log_likelihood_stderr"], summary["test_log_likelihood_data_stderr"]
    bound = kind_of(math.nan if ok is None else ok) == "lower bound"
    said = lower_bound(value) if bound else f"{value:.2f} ± {errors[0]:.1g}"
    return " | ".join(
        [
            f"| {network}-{config['latent_dim']} {config['network']}",
            f"{summary['epochs']}",
            f"{summary['train_seconds'] / 60:.1f}",
            f"{summary['test_elbo']:.2f} = {summary['test_reconstruction']:.2f} - {summary['test_kl']:.2f}",
            f"**{said}** (data ± {errors[1]:.2f})",
            f"{summary['active_units']} of {summary['latent_dim']}",
            f"{summary['protocol']['log_likelihood_samples']:,} |",
        ]
    )


def main(paths: list[str]) -> None:
    """Print the table of the runs named."""
    if not paths:
        raise SystemExit("usage: python benchmarks/table.py RUN [RUN ...]")
    runs = []
    for path in map(Path, paths):
        try:
            config, summary = (json.loads((path / name).read_text()) for name in ("config.json", "summary.json"))
        except (OSError, ValueError) as error:
            raise SystemExit(f"{path} is not a run folder: {error}") from None
        runs.append((path, config, summary))
    for protocol, group in groupby(sorted(runs, key=lambda run: protocol_of(run[2])), lambda run: protocol_of(run[2])):
        print(f"\n{protocol}\n")
        print("| network | epochs | minutes | test ELBO = reconstruction - KL | test log p(x) | active units | K |")
        print("|---|---|---|---|---|---|---|")
        for run in group:
            print(row(*run))


if __name__ == "__main__":
    main(sys.argv[1:])
