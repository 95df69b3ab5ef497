"""The training of a configuration, its numbers, and the second small VAE of the pictures."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyro_vae.app import evaluation, report, serving
from pyro_vae.app.building import build
from pyro_vae.app.defaults import FitOptions
from pyro_vae.app.losses import the_loss
from pyro_vae.app.reading import redrawn
from pyro_vae.data import Dataset
from pyro_vae.inference.checkpoints import Sparing
from pyro_vae.inference.records import History
from pyro_vae.inference.training import fit
from pyro_vae.judging.guides import fit_guide
from pyro_vae.judging.latents import posterior_means
from pyro_vae.programs.vae import Answers

VALIDATION_IMAGES = 2000
SMALL = 300_000  # numbers in the training part: a second fit takes seconds
_TRAINING = (
    "epochs", "batch_size", "learning_rate", "schedule", "clip_norm", "kl_warmup", "kl_warmup_steps", "patience",
    "seed", "data_seed", "matmul_precision",
)  # fmt: skip
_COMPILE: dict[str, bool | str] = {"auto": "auto", "on": True, "off": False}


def train(
    vae: Answers, dataset: Dataset, options: FitOptions, checkpoint: Sparing | Path | None,
    seen: Callable[[Any], None] | None, progress: bool | None,
) -> History:  # fmt: skip
    """The training of a configuration: `fit`, or `fit_guide` under a frozen model."""
    face = serving.face(vae)
    # The validation images that each epoch is scored on, their noise drawn for good.
    validation = dataset.validation.subset(slice(0, VALIDATION_IMAGES)).frozen(options.seed)
    with _threads(options.threads):
        return (fit if options.frozen is None else fit_guide)(
            *face.programs(vae),
            face.training(dataset.train, options),
            loss=the_loss(options, vae),
            validation=face.given(validation),
            compile=_COMPILE[options.compile],
            checkpoint=checkpoint,
            progress=progress,
            callback=seen,
            **{name: getattr(options, name) for name in _TRAINING},
        )


def training_numbers(
    vae: Answers, history: History, seconds: float, options: FitOptions, processes: int = 1
) -> dict[str, Any]:
    """What is worth knowing of a fit."""
    rates = history["images_per_second"]
    last = history.records[-1] if history.records else {}
    return {
        "train_seconds": seconds,
        "images_per_second": statistics.median(rates) if rates else None,
        "epochs": len(history),
        "best_epoch": history.best_epoch,
        "stopped_early": history.stopped_early,
        "last_bound": last.get("bound"),
        "last_validation": last.get("validation"),
        "last_beta": last.get("beta"),
        "dropout": any(isinstance(m, torch.nn.modules.dropout._DropoutNd) and m.p > 0 for m in vae.modules()),
        "parameters": sum(p.numel() for p in vae.parameters()),
        "seed": options.seed,
        "processes": processes,
        "training_threads": options.threads or torch.get_num_threads(),
        "products": history.products,
        "objective": "reconstruction" if evaluation.is_autoencoder(vae) else options.bound,
        "objective_samples": options.num_samples,
        "estimator": options.estimator,
    }


def second_view(vae: Answers, dataset: Dataset, options: FitOptions) -> dict[str, Tensor]:
    """Posterior means of the test data in the plane of a second, small VAE of two latents, by a title.

    Nothing where the data are not few, small and labelled, or the pair has no more than two latents itself. Grey levels
    are taken as they are: what is left of a digit of 64 zeros and ones does not tell the classes apart in a plane.
    """
    small = len(dataset.train) * math.prod(dataset.x_shape) <= SMALL
    small = small and options.model == "vae"
    if not small or dataset.test.labels is None or options.latent_dim <= 2 or evaluation.is_autoencoder(vae):
        return {}
    changes: dict[str, Any] = {"latent_dim": 2, "posterior": "diagonal", "posterior_options": {}, "prior": "normal",
                               "prior_options": {}, "bound": "elbo", "bound_options": {}, "num_samples": 1,
                               "regularizers": {}, "estimator": "reparameterized"}  # fmt: skip
    title = "a second, small VAE of two latents"
    if dataset.train.binarization == "dynamic" and dataset.train.pixels.dtype == torch.uint8:
        dataset = redrawn(dataset, "none")
        changes |= {"likelihood": "normal", "likelihood_options": {}, "scale": 0.15, "binarization": "none"}
        title += ", of the grey levels"
    options = dataclasses.replace(options, **changes)
    second = build(options, dataset)
    with _threads(options.threads):
        history = fit(
            second.model, second.guide, dataset.train, loss=the_loss(options, second), epochs=min(options.epochs, 40),
            batch_size=64, learning_rate=5e-3, schedule="one-cycle", seed=options.seed, progress=False,
        )  # fmt: skip
    if history.interrupted:
        raise KeyboardInterrupt
    shown = report.latent_data(dataset, options)
    return {title: posterior_means(second.guide, shown, seed=options.seed)}


@contextlib.contextmanager
def _threads(number: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
