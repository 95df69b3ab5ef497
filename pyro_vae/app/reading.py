"""The data of a configuration, and what of a configuration only the data can settle."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from pyro_vae.app import models
from pyro_vae.app.defaults import NOT_BINARY, FitOptions
from pyro_vae.atomic import reason_of
from pyro_vae.data import DATASETS, Dataset, load
from pyro_vae.data.binarization import Binarization
from pyro_vae.parts import names
from pyro_vae.parts.priors import VampPrior
from pyro_vae.parts.priors.mixture import PSEUDO_INPUTS
from pyro_vae.protocols import default_options, passes, values

READING = ("image_size", "crop", "channels", "background", "images", "labels")


def read(options: FitOptions) -> tuple[FitOptions, Dataset]:
    """The data of a configuration, and the configuration with what only the data can settle.

    Raises:
        ValueError: Unknown or unreadable data, or none that fit the likelihood.
    """
    limits = (options.limit, options.evaluation_images)
    photographs = options.data == "celeba" or Path(options.data).is_dir() and options.data not in DATASETS
    # Decoding takes minutes: no more than will be looked at. Other data are read whole.
    most = max(n for n in limits if n is not None) if photographs and None not in limits else None
    framing = {name: getattr(options, name) for name in READING}
    binarization, dequantize = options.binarization, options.dequantize
    open_ = binarization is None and dequantize is None and options.data not in DATASETS
    kind = None if options.likelihood is None else values(names.find("likelihood", options.likelihood))
    if open_ and kind in ("levels", "counts"):
        binarization, dequantize = "none", False
    seed = options.seed if options.split_seed is None else options.split_seed
    framing |= {"binarization": binarization, "dequantize": dequantize, "limit": most, "seed": seed}
    try:
        dataset = load(options.data, options.data_dir, **framing)
    except OSError as error:
        raise ValueError(f"got --data {options.data}, which cannot be read: {reason_of(error)}.") from error
    if open_ and kind == "binary" and dataset.train.binarization == "none":
        dataset = redrawn(dataset, "dynamic")  # binary files are binary by themselves: these are grey
    if options.limit is not None:
        train = dataset.train.subset(slice(0, options.limit))
        dataset = dataclasses.replace(dataset, train=train, protocol=dataset.protocol | {"limit": options.limit})
    return _settled(options, dataset, kind), dataset


def _settled(options: FitOptions, dataset: Dataset, kind: str | None) -> FitOptions:
    """The options that only the data can settle, for a likelihood of that kind of values.

    Raises:
        ValueError: The data do not fit the likelihood, or the network.
    """
    options = models.settled(options, dataset)
    options = dataclasses.replace(
        options, binarization=dataset.train.binarization, dequantize=dataset.train.dequantize,
        likelihood=options.likelihood or ("normal" if dataset.train.binarization == "none" else "bernoulli"),
    )  # fmt: skip
    if options.standardize is None:
        table = len(dataset.x_shape) == 1 and dataset.train.pixels.is_floating_point() and dataset.testbed is None
        if kind != "counts":  # of which the size is found when they are fitted
            options = dataclasses.replace(options, standardize=table and _standardizes(options, dataset))
    if options.standardize and not _standardizes(options, dataset):
        raise ValueError(
            f"got --standardize with --likelihood {options.likelihood}, wanted normal: the values of the others lie in "
            "sets that (x - mean) / standard deviation leaves. Use --likelihood normal, or --no-standardize."
        )
    if kind == "counts" and not dataset.train.pixels.is_floating_point():
        # Images hold v / 255: the counts are the v. An array of floats holds the counts themselves.
        options = dataclasses.replace(options, likelihood_options={"levels": 256} | options.likelihood_options)
    if _is_vamp(options.prior) and "num_components" not in options.prior_options:
        # The paper has 500 for 50,000 images. Gaussians are scored together, flows one by one at every sample.
        one_by_one = passes(names.find("posterior", options.posterior)) > 0
        most = max(10, len(dataset.train) // 100) if one_by_one else len(dataset.train)
        components = min(PSEUDO_INPUTS, most, len(dataset.train))
        options = dataclasses.replace(options, prior_options={"num_components": components} | options.prior_options)
    if kind not in (None, "binary") and options.binarization != "none":
        raise ValueError(
            f"got --likelihood {options.likelihood} for binary data ({options.binarization} binarization): {NOT_BINARY}"
        )
    if options.network in ("conv", "residual") and len(dataset.x_shape) != 3:
        raise ValueError(
            f"got --network {options.network} for data of shape {dataset.x_shape}, wanted images. Use --network mlp."
        )
    return options


def _standardizes(options: FitOptions, dataset: Dataset) -> bool:
    """Whether the likelihood can be one of columns of mean 0 and standard deviation 1."""
    family = names.find("likelihood", options.likelihood or "normal")
    return default_options(family, dataset.x_shape, options.scale, True, {}).get("standardize") is not None


def _is_vamp(prior: str) -> bool:
    family = names.find("prior", prior)
    return isinstance(family, type) and issubclass(family, VampPrior)


def redrawn(dataset: Dataset, binarization: Binarization) -> Dataset:
    """The same data, binarised otherwise."""
    splits = {name: dataclasses.replace(getattr(dataset, name), binarization=binarization, dequantize=False)
              for name in ("train", "validation", "test")}  # fmt: skip
    protocol = dataset.protocol | {"binarization": binarization, "dequantize": False}
    return dataclasses.replace(dataset, protocol=protocol, **splits)
