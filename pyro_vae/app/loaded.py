"""A run as the commands load it: its configuration, its pair, its seed, and its data."""

from __future__ import annotations

from pathlib import Path

from pyro_vae.app.building import the_device
from pyro_vae.app.defaults import FitOptions, resolve
from pyro_vae.app.reading import read
from pyro_vae.app.runs import Run, options_of
from pyro_vae.data import Dataset
from pyro_vae.programs.vae import Answers


def opened(
    run: Path, trust: tuple[str, ...], seed: int | None, device: str | None = None
) -> tuple[FitOptions, Answers, int]:
    """A run's configuration, its pair, and the seed: the run's own where none is given."""
    loaded = Run.load(run)
    options, vae = options_of(loaded), loaded.pair(trust)
    return options, vae if device is None else vae.to(the_device(device)), options.seed if seed is None else seed


def data_of(options: FitOptions, vae: Answers, data_dir: str | None, images: int | None) -> tuple[FitOptions, Dataset]:
    """The data that a run was fitted to, where they lie now, with as many images as are asked for."""
    changed = {} if data_dir is None else {"data_dir": data_dir}
    options, dataset = read(resolve(vars(options) | {"evaluation_images": images} | changed))
    if dataset.x_shape != x_shape(vae):
        raise ValueError(
            f"{options.data} now has data of shape {dataset.x_shape}, but the run was fitted to {x_shape(vae)}. "
            "Give the data that it was fitted to."
        )
    return options, dataset


def x_shape(vae: Answers) -> tuple[int, ...]:
    assert vae.architecture is not None
    return vae.architecture.x_shape
