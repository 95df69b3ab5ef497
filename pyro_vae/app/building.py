"""The pair that a fit starts from: new, with the model of a frozen run, or a finished run's."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from pyro_vae.app.configuration import about
from pyro_vae.app.defaults import FitOptions, option
from pyro_vae.app.reading import READING, read
from pyro_vae.app.runs import BUILT, WEIGHTS, Run, options_of
from pyro_vae.app.starting import Origin, base, compared, shown
from pyro_vae.data import Dataset
from pyro_vae.inference.batches import seeded
from pyro_vae.parts import names
from pyro_vae.parts.likelihoods import Bernoulli, Normal
from pyro_vae.parts.networks import set_output_mean
from pyro_vae.parts.priors import VampPrior
from pyro_vae.programs.architecture import Architecture
from pyro_vae.protocols import standardize as standardize_of


def build(options: FitOptions, dataset: Dataset) -> Any:
    """The pair of a configuration with new weights, started at the mean or spread of the data."""
    device = the_device(options.device)
    with seeded(options.seed):
        vae = Architecture.of(dataset.x_shape, **{name: getattr(options, name) for name in BUILT}).build()
        if options.frozen is not None:
            return under_frozen(options, vae).to(device)
        likelihood = getattr(vae.model.likelihood, "part", vae.model.likelihood)  # of one of z and y, the part
        standardize = standardize_of(likelihood)
        if standardize is not None and not standardize.automatic:
            standardize.measure(dataset.train[rows] for rows in torch.arange(len(dataset.train)).split(4096))
        if isinstance(prior := vae.model.prior, VampPrior):
            if prior.num_components > len(dataset.train):
                raise ValueError(
                    f"got a vamp prior of {prior.num_components} components for {len(dataset.train)} training data, "
                    f"wanted at most as many. Pass --prior-options num_components={min(100, len(dataset.train))}."
                )
            chosen = dataset.train[torch.randperm(len(dataset.train))[: prior.num_components]]
            prior.start_at(vae.guide.visible(chosen))
    if isinstance(likelihood, Normal):
        if hasattr(likelihood, "log_scale") and standardize is None:  # whose spread is the one it starts at
            few = dataset.train.subset(slice(0, 1000)).frozen(options.seed)  # noise of its own: a run is of its seed
            spread = few[:].std().clamp(min=0.01).item()
            torch.nn.init.constant_(likelihood.log_scale, torch.tensor(spread).log().item())
    elif isinstance(likelihood, Bernoulli):
        set_output_mean(likelihood.decoder, dataset.train.mean(), floor=1e-3)
    return vae.to(device)


def start(
    options: FitOptions, dataset: Dataset, trust: Sequence[str] = (), say: Callable[[str], None] = lambda _: None
) -> tuple[Any, Origin | None]:
    """The pair that a fit starts from: new, or a finished run's where `options` go on from one and can take it.

    Raises:
        ValueError: That run is missing, unfinished or damaged, its parts are not trusted, or its data are not these.
    """
    if options.from_run is None:
        return build(options, dataset), None
    run = base(options.from_run)
    earlier = options_of(run)
    origin = compared(run, earlier, options)
    vae = None
    if origin.weights:
        vae = run.pair(trust)
        assert vae.architecture is not None
        if vae.architecture.x_shape != dataset.x_shape:
            before, now = (" x ".join(map(str, shape)) for shape in (vae.architecture.x_shape, dataset.x_shape))
            if all(getattr(earlier, name) == getattr(options, name) for name in ("data", "data_dir", *READING)):
                raise ValueError(
                    f"{options.data} now has data of shape {now}, but {shown(run.path)}, the run of --from, was fitted "
                    f"to {before}. Give the data that it was fitted to, or the options by --config {shown(run.path)}."
                )
            origin = dataclasses.replace(origin, weights=False, why=f"the data are {now}, there {before}")
            vae = None
        elif (earlier.seed, earlier.split_seed) != (options.seed, options.split_seed) and earlier.data == options.data:
            _same_test(run.path, dataset, read(dataclasses.replace(earlier, data_dir=options.data_dir))[1], options)
    say(origin.line(options))
    return (build(options, dataset) if vae is None else vae.to(the_device(options.device))), origin


def _same_test(path: Path, now: Dataset, then: Dataset, options: FitOptions) -> None:
    """Raise a ValueError where another seed makes test data of what the weights were trained on."""
    if not now.test.same(then.test):
        raise ValueError(
            f"got another seed than --from {shown(path)}: {options.data} is split by it, so that the weights would be "
            "tested on data that they were trained on. Leave --seed and --split-seed out, or keep the split by "
            f"--split-seed, or start anew by --config {shown(path)}."
        )


def under_frozen(options: FitOptions, vae: Any) -> Any:
    """A new pair with the model of the run that the options name.

    Raises:
        ValueError: Options that shape the model are others than that run's.
    """
    assert options.frozen is not None
    with about("--frozen", options.frozen):
        run = Run.load(options.frozen)
    there = options_of(run)
    shared = [name for name in (*BUILT, "data") if not name.startswith("posterior")]
    other = [name for name in shared if getattr(options, name) != getattr(there, name)]
    if other:
        words = ", ".join(f"{option(n)} {getattr(options, n)} (there: {getattr(there, n)})" for n in other)
        raise ValueError(
            f"got --frozen {options.frozen} with {words}, wanted the options that its model was built with. Only the "
            "posterior and the training of the guide can be others."
        )
    if names.is_foreign(there.posterior) and there.posterior != options.posterior:
        vae.load_model(run.path / WEIGHTS)  # without a guide whose code nobody here asked for
        return vae
    trusted = [name for name in (options.posterior, options.prior, options.likelihood) if name is not None]
    vae.model.load_state_dict(run.vae(trusted).model.state_dict())
    return vae


def the_device(name: str) -> torch.device:
    """The device of that name; "auto" is the first GPU, if any.

    Raises:
        ValueError: There is no such device here.
    """
    if name == "auto":
        name = f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros((), device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise ValueError(f"got --device {name}, wanted one that works here ({reason}). Use --device cpu.") from error
    return device
