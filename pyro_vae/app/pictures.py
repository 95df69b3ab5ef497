"""Which pictures a run gets, and of which data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from pyro_vae import plots
from pyro_vae.app import evaluation
from pyro_vae.app.defaults import FitOptions
from pyro_vae.atomic import write_file
from pyro_vae.data import Dataset
from pyro_vae.inference.batches import seeded
from pyro_vae.judging.latents import posterior_means
from pyro_vae.programs.vae import VAE

_LATENT_POINTS = 5000


def draw(
    vae: VAE,
    dataset: Dataset,
    records: Sequence[Mapping[str, Any]],
    numbers: Mapping[str, Any],
    options: FitOptions,
    folder: Path,
) -> None:
    """Draw the five pictures of a run.

    Args:
        vae: The fitted pair.
        dataset: Its data.
        records: One per epoch.
        numbers: What `evaluation.evaluate` found.
        options: The configuration.
        folder: Where the pictures go.
    """
    point = evaluation.is_autoencoder(vae)
    test = evaluation.test_data(dataset, options.seed, options.evaluation_images)
    device = next(vae.parameters()).device
    finals = {
        label: numbers[key]
        for label, key in (("test log p(x)", "test_log_likelihood"), ("test ELBO", "test_elbo"))
        if key in numbers
    } or {"test reconstruction": numbers["test_reconstruction"]}
    name = "reconstruction" if point else "IWAE / ELBO" if options.bound == "iwae" else "ELBO"
    save(plots.training_curve(records, finals, name), folder / "training_curve.png")
    with seeded(options.seed), torch.no_grad():
        x = test[torch.arange(min(20, len(test)))].to(device)
        save(plots.reconstructions(x, vae.reconstruct(x)), folder / "reconstructions.png")
        drawn = vae.sample(64)
        title = "Decoded from N(0, I), which this autoencoder knows nothing of" if point else "Samples from the prior"
        save(plots.samples(drawn, title), folder / "samples.png")
        known, labels = test[torch.arange(min(200, len(test)))], test.labels
        if len(test) < 2:  # nothing lies between one datum and itself
            known, labels = torch.cat([dataset.validation[:1], known]), None
        start, end = pairs(known, labels)
        lines = vae.interpolate(start.to(device), end.to(device), steps=10)
        save(plots.interpolations(lines), folder / "interpolations.png")
        shown = test.subset(slice(0, _LATENT_POINTS))
        means = posterior_means(vae.guide, shown, seed=options.seed)
        save(plots.latent_space(means, shown.labels, dataset.label_names), folder / "latent_space.png")


def pairs(x: Tensor, labels: Tensor | None, count: int = 6) -> tuple[Tensor, Tensor]:
    """Data to interpolate between, of different labels where there are labels.

    Args:
        x: Data to choose from, at least two.
        labels: One per datum or None.
        count: How many pairs at most.
    Returns:
        Starts and ends.
    """
    starts, ends = [], []
    for i in range(0, len(x) - 1, 2):
        j = next((j for j in range(i + 1, len(x)) if labels is None or labels[j] != labels[i]), i + 1)
        starts.append(i)
        ends.append(j)
        if len(starts) == count:
            break
    return x[starts], x[ends]


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, whole or not at all; its folder is made."""
    options: dict[str, Any] = {"dpi": 150, "format": "png", "bbox_inches": "tight", "pad_inches": 0.1}
    write_file(path, lambda partial: figure.savefig(partial, **options))
