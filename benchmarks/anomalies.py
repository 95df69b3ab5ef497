"""Every score of strangeness on MNIST against Fashion-MNIST, both ways, for binary and for grey images.

    python benchmarks/anomalies.py --mnist path/to/mnist --fashion /usr/share/datasets/fashion-mnist

Small by default: 5 epochs on 10,000 images, 500 test images of either kind. Prints a Markdown table of ROC-AUCs with
their standard errors: the chance that an image of the other kind scores above one of the kind that was fitted.
`ratio, background` fits a second pair to images of which a tenth of the pixels are noise.
"""

from __future__ import annotations

import argparse
import math
import time
from typing import Any

import torch

from pyro_vae import VAE, fit, load
from pyro_vae.data import Split
from pyro_vae.data.mnist import DEBIAN
from pyro_vae.judging.anomalies import anomaly_scores, roc_auc
from pyro_vae.parts.networks import set_output_mean


def pair(split: Split, arguments: argparse.Namespace, likelihood: str) -> VAE:
    """A VAE fitted to a split."""
    torch.manual_seed(arguments.seed)
    vae = VAE.build(split.x_shape, latent_dim=20, hidden=(256, 256), likelihood=likelihood)
    if likelihood == "bernoulli":
        set_output_mean(vae.model.likelihood.decoder, split.mean(), floor=1e-3)
    fit(vae.model, vae.guide, split, epochs=arguments.epochs, batch_size=128, learning_rate=1e-3, seed=arguments.seed,
        progress=False)  # fmt: skip
    return vae


def noised(split: Split, share: float, seed: int) -> Split:
    """A share of the pixels replaced by uniform grey levels, after Ren et al. (2019)."""
    generator = torch.Generator().manual_seed(seed)
    levels = torch.randint(0, 256, split.pixels.shape, generator=generator).to(torch.uint8)
    hit = torch.rand(split.pixels.shape, generator=generator) < share
    return Split(torch.where(hit, levels, split.pixels), binarization=split.binarization, dequantize=split.dequantize)


def error(auc: float, inliers: int, outliers: int) -> float:
    """Standard error of a ROC-AUC, after Hanley and McNeil (1982)."""
    first, second = auc / (2 - auc), 2 * auc**2 / (1 + auc)
    spread = auc * (1 - auc) + (outliers - 1) * (first - auc**2) + (inliers - 1) * (second - auc**2)
    return math.sqrt(max(spread, 0) / (inliers * outliers))


def rows(arguments: argparse.Namespace) -> list[str]:
    """The table."""
    lines = ["| fitted to | outliers | images | log-likelihood | reconstruction | ratio | ratio, background | regret |",
             "|---|---|---|---|---|---|---|---|"]  # fmt: skip
    folders = {"mnist": arguments.mnist, "fashion-mnist": arguments.fashion}
    for kind in ("binary", "grey"):
        options: dict[str, Any] = {"binarization": "dynamic"} if kind == "binary" else {
            "binarization": "none", "dequantize": True}  # fmt: skip
        likelihood = "bernoulli" if kind == "binary" else "normal"
        data = {name: load(name, folder, **options) for name, folder in folders.items()}
        for name, other in (("mnist", "fashion-mnist"), ("fashion-mnist", "mnist")):
            train = data[name].train.subset(slice(arguments.limit))
            vae = pair(train, arguments, likelihood)
            behind = pair(noised(train, 0.1, arguments.seed), arguments, likelihood)
            tests = [data[n].test.frozen(0).subset(slice(arguments.images)) for n in (name, other)]
            cells = []
            for score, more in (
                ("log-likelihood", {}), ("reconstruction", {}), ("ratio", {}),
                ("ratio", {"background": (behind.model, behind.guide)}), ("regret", {}),
            ):  # fmt: skip
                if kind == "grey" and score == "ratio" and not more:
                    cells.append("unsound")
                    continue
                found = [
                    anomaly_scores(vae.model, vae.guide, x, score=score, num_samples=50, progress=False, **more)
                    for x in tests
                ]
                auc = roc_auc(*found)
                cells.append(f"{auc:.3f} ± {error(auc, *map(len, found)):.3f}")
            lines.append(f"| {name} | {other} | {kind} | {' | '.join(cells)} |")
            print(lines[-1], flush=True)
    return lines


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mnist", default="data/mnist", help="folder of MNIST's files")
    parser.add_argument("--fashion", default=str(DEBIAN["fashion-mnist"]), help="folder of Fashion-MNIST's files")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--limit", type=int, default=10_000, help="training images")
    parser.add_argument("--images", type=int, default=500, help="test images of either kind")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    started = time.perf_counter()
    print("\n".join(["", *rows(arguments)]))
    print(f"\n{time.perf_counter() - started:.0f} s, {arguments.epochs} epochs on {arguments.limit:,} images, "
          f"{arguments.images} test images of either kind, seed {arguments.seed}")  # fmt: skip


if __name__ == "__main__":
    main()
