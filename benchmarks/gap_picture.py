"""Draw the README's picture: where the nats between the ELBO and log p(x) go, from the kept results of `judging.py`.

python benchmarks/gap_picture.py docs/images/gaps.png
python benchmarks/gap_picture.py out.png --folder runs/elu-judging
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.patches import Patch

from pyro_vae.judging.quotes import kind_of, lower_bound

KEPT = Path(__file__).parent / "results" / "judging"
ENCODER, FAMILY = "#e07b39", "#2c5282"
NAMES = {"diagonal": "diagonal normal", "flow": "autoregressive flow"}


def quoted(value: float, below: bool) -> str:
    """A number as it may be quoted; `below`: it is, or stands on, a log p(x) that is a lower bound."""
    return lower_bound(value).replace(">=", "≥") if below else f"{value:.2f}"


def draw(results: dict[str, dict[str, Any]]) -> Figure:
    """One bar for each guide and split, from its ELBO up to log p(x), in nats per image.

    Args:
        results: Split -> what `judging.py` keeps of it.
    Returns:
        The figure.
    """
    figure = Figure(figsize=(9.0, 3.3), layout="constrained", dpi=140)
    axes = figure.subplots()
    labels: list[str] = []
    for part, kept in results.items():
        top, below = kept["log_likelihood"][0], kind_of(kept["khat_ok"]) == "lower bound"
        for name, row in kept["families"].items():
            at = len(labels)
            (best, best_error, _), (elbo, _, _) = row["optimum"], row["amortized"]
            axes.barh(at, best - elbo, left=elbo, height=0.56, color=ENCODER)
            axes.barh(at, top - best, left=best, height=0.56, color=FAMILY)
            axes.errorbar(best, at + 0.21, xerr=2 * best_error, color="black", capsize=2, lw=1.0)
            for key, centre, bound in (
                ("amortization", (best + elbo) / 2, False),
                ("approximation", (top + best) / 2, below),
            ):
                words = quoted(row[key][0], bound)
                size = 8.5 if row[key][0] > 0.8 else 6.5  # a narrow bar holds small words
                axes.text(centre, at, words, color="white", ha="center", va="center", fontsize=size)
            axes.text(elbo - 0.08, at, f"ELBO {elbo:.2f}", ha="right", va="center", fontsize=9)
            axes.text(top + 0.08, at, f"log p(x) {quoted(top, below)}", ha="left", va="center", fontsize=9)
            labels.append(f"{NAMES.get(name, name)}\n{kept['images']:,} {part} images")
    axes.set_yticks(range(len(labels)), labels, fontsize=9)
    axes.invert_yaxis()
    low, high = axes.dataLim.intervalx
    axes.set_xlim(low - 0.17 * (high - low), high + 0.2 * (high - low))  # room for the words beside the bars
    axes.set_xlabel("nats per image")
    title = "One decoder on MNIST, two guides: how far each ELBO is from log p(x), and whose fault it is"
    axes.set_title(title, fontsize=10)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    lost = {"lost by the encoder (amortization gap)": ENCODER, "lost by the family (approximation gap)": FAMILY}
    handles = [Patch(color=color, label=label) for label, color in lost.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    return figure


def main() -> None:
    """Read what is kept, draw, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="where the picture goes, a .png")
    parser.add_argument("--folder", type=Path, default=KEPT, help="results of judging.py [those kept here]")
    arguments = parser.parse_args()
    paths = {part: arguments.folder / f"{part}.json" for part in ("train", "test")}
    results = {part: json.loads(path.read_text()) for part, path in paths.items() if path.exists()}
    if not results:
        raise SystemExit(f"no train.json or test.json in {arguments.folder}. Run benchmarks/judging.py first.")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    draw(results).savefig(arguments.out, metadata={"Software": None})


if __name__ == "__main__":
    main()
