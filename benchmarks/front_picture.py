"""Draw the README's picture from a run of images.

python benchmarks/front_picture.py runs/mnist notebooks/images/mnist.png
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

from pyro_vae.app import report
from pyro_vae.app.evaluation import test_data
from pyro_vae.app.reading import read
from pyro_vae.app.runs import Run, options_of
from pyro_vae.inference.batches import seeded


def tiled(images: Tensor, columns: int) -> Tensor:
    """Images (N, C, H, W) as one picture (H', W', C) with a pixel between them."""
    padded = torch.nn.functional.pad(images, (1, 1, 1, 1), value=0.2)
    rows = [torch.cat(list(row), -1) for row in padded.split(columns)]
    return torch.cat(rows, -2).permute(1, 2, 0)


def main(run: str, out: str) -> None:
    """Originals and reconstructions, samples, interpolations, side by side."""
    loaded = Run.load(run)
    vae, options = loaded.vae(), options_of(loaded)
    _, dataset = read(options)
    x = test_data(dataset, options.seed, 32)[:]
    with seeded(options.seed):
        drawn = vae.sample(48)
    seen = zip(x[:24].split(8), vae.reconstruct(x[:24]).split(8), strict=True)
    pairs = torch.cat([part for pair in seen for part in pair])
    walks = vae.interpolate(x[:6], x[6:12], 8).flatten(0, 1)
    panels = {
        "data above E[x | z], z the mean of q(z | x)": pairs,
        "new images: z from p(z)": drawn,
        "between two images, through z": walks,
    }
    figure = Figure(figsize=(10.5, 3.1), layout="constrained")
    for axes, (title, images) in zip(figure.subplots(1, 3), panels.items(), strict=True):
        axes.imshow(1 - tiled(images, 8), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        axes.set_title(title, fontsize=10)
        axes.axis("off")
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    report.save(figure, Path(out))


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit("usage: python benchmarks/front_picture.py RUN OUT.png")
    main(*sys.argv[1:])
