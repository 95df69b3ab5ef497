"""From a configuration to a run folder: load, build, fit, judge, draw, write."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyro_vae.app import evaluation, models, report, serving
from pyro_vae.app.configuration import about
from pyro_vae.app.defaults import FULL_SAMPLES, NOT_BINARY, FitOptions, option
from pyro_vae.app.losses import the_loss
from pyro_vae.app.processes import of_first
from pyro_vae.app.progress import Progress
from pyro_vae.app.remarks import remarks
from pyro_vae.app.run_page import write_page
from pyro_vae.app.runs import (
    BUILT,
    CHECKPOINT,
    CONFIG,
    EVALUATED,
    FIGURES,
    METRICS,
    SUMMARY,
    WEIGHTS,
    Run,
    finish,
    options_of,
    run_folder,
    write_json,
    write_lines,
)
from pyro_vae.app.starting import Origin, base, compared, shown
from pyro_vae.atomic import reason_of
from pyro_vae.data import DATASETS, Dataset, load
from pyro_vae.data.splits import Binarization
from pyro_vae.inference import checkpoints
from pyro_vae.inference.batches import seeded
from pyro_vae.inference.checkpoints import Sparing
from pyro_vae.inference.hardware import check_precision
from pyro_vae.inference.ranks import Elsewhere, Setup, alone, first_says, world
from pyro_vae.inference.records import History
from pyro_vae.inference.training import fit
from pyro_vae.judging.guides import fit_guide
from pyro_vae.judging.kept import Kept
from pyro_vae.judging.latents import posterior_means
from pyro_vae.parts import names
from pyro_vae.parts.likelihoods import Bernoulli, Normal
from pyro_vae.parts.networks import set_output_mean
from pyro_vae.parts.priors import VampPrior
from pyro_vae.parts.priors.mixture import PSEUDO_INPUTS
from pyro_vae.programs.architecture import Architecture
from pyro_vae.programs.vae import Answers
from pyro_vae.protocols import default_options, passes, values
from pyro_vae.protocols import standardize as standardize_of

VALIDATION_IMAGES = 2000
SMALL = 300_000  # numbers in the training part: a second fit takes seconds
_READING = ("image_size", "crop", "channels", "background", "images", "labels")
_TRAINING = (
    "epochs", "batch_size", "learning_rate", "schedule", "clip_norm", "kl_warmup", "kl_warmup_steps", "patience",
    "seed", "data_seed", "matmul_precision",
)  # fmt: skip
_COMPILE: dict[str, bool | str] = {"auto": "auto", "on": True, "off": False}


def fit_run(
    options: FitOptions,
    path: Path,
    *,
    checkpoint: Path | None = None,
    progress: bool | None = None,
    say: Callable[[str], None] = lambda _: None,
    trust: Sequence[str] = (),
) -> dict[str, Any]:
    """Do one run, or the rest of an unfinished one, and write its folder.

    The folder is there from the start. Its first pictures appear after the first epoch, and all of them before the
    evaluation. What was broken off is gone on with by the same options and folder.

    Args:
        options: The configuration, from `resolve`.
        path: The run folder to make, or an unfinished one.
        checkpoint: Where the state of the fit is kept after each epoch, in place of the run folder, where it is kept
            as often as costs next to nothing. Removed when the run is finished.
        progress: Show bars; None shows them on a terminal only.
        say: Takes a line about what is going on.
        trust: Parts of the user's own, ``module:Class``, that the run of ``--from`` may import.
    Returns:
        The summary. With ``interrupted`` true where Ctrl-C ended the training, or the evaluation: the
            weights are then those of that moment, and nothing was evaluated.
    Raises:
        ValueError: A bad option, unreadable data, a finished run or an unfinished one of other options, an unwritable
            folder; or a failure after the training, whose weights are then kept all the same.
    """
    check_precision(options.matmul_precision)
    saved = Sparing(path / CHECKPOINT) if checkpoint is None else checkpoint
    with contextlib.ExitStack() as stack, Setup() as setup:
        folder = of_first(lambda: stack.enter_context(run_folder(path, options.to_json(), checkpoint)))
        if folder is None:
            options, dataset = read(options)
            vae = start(options, dataset, trust)[0]
            setup.done()
            history = train(vae, dataset, options, saved, None, False)
            if not history.interrupted:
                _evaluate_with_first(vae, dataset, path)
            return {"interrupted": history.interrupted}
        going_on = (folder / WEIGHTS).is_file()
        asked = options
        options, dataset = read(options)
        _describe(options, dataset, say)
        vae, origin = start(options, dataset, trust, say)
        write_json(folder / CONFIG, options.to_json())
        in_lines = progress is not True and not sys.stderr.isatty()
        with alone():  # it measures the speed of this process
            seen = Progress(vae, dataset, options, folder, say, going_on=going_on, in_lines=in_lines)
        setup.done()
        started = time.perf_counter()
        history = train(vae, dataset, options, saved, seen, progress)
        seconds = time.perf_counter() - started
        vae.save(folder / WEIGHTS)
        write_lines(folder / METRICS, history.records)
        # Of all the time that went into it, before an interruption too.
        seconds = max(seconds, history.records[-1]["seconds"]) if history.records else seconds
        summary = training_numbers(vae, history, seconds, options, world()[1])
        summary = {"interrupted": True} | ({} if origin is None else {"from": origin.to_json()}) | summary
        summary, failure = _judged(folder, vae, dataset, options, history, summary, seen.plan, progress, say)
        try:
            write_page(folder, asked, summary)
        except KeyboardInterrupt:  # what is left to write is written by who goes on
            summary = summary | {"interrupted": True}
        if not summary["interrupted"] and failure is None:
            finish(folder)
            if checkpoint is not None:
                checkpoints.remove(checkpoint)
    if failure is not None:
        raise ValueError(
            f"the pair was fitted and lies in {path}, but judging it failed: {failure}. "
            f"Try 'pyro-vae evaluate {path}', or the same command again."
        ) from failure
    return summary


def _judged(
    folder: Path, vae: Answers, dataset: Dataset, options: FitOptions, history: History, summary: dict[str, Any],
    plan: evaluation.Plan, progress: bool | None, say: Callable[[str], None],
) -> tuple[dict[str, Any], Exception | None]:  # fmt: skip
    """Draw a fitted pair and evaluate it, and write its summary: what was trained is worth more than what goes wrong
    after it.

    Returns:
        The summary, with ``interrupted`` true where the training was, or this is; and what failed.
    """
    failure: Exception | None = None
    records, interrupted = history.records, history.interrupted
    scored: dict[str, Any] = {}
    settings: dict[str, Any] = {"num_samples": plan.num_samples, "images": plan.images, "seed": options.seed}
    summary["protocol"] = evaluation.protocol(vae, dataset, **settings)
    summary["remarks"] = remarks(summary)
    write_json(folder / SUMMARY, summary)
    try:
        with contextlib.nullcontext() if interrupted else Setup() as setup:  # the others wait for the evaluation
            try:
                with alone():
                    if records:
                        views = {} if interrupted else second_view(vae, dataset, options)
                        report.draw(vae, dataset, records, {}, options, folder / FIGURES, views)
            except Exception as error:
                failure = error
            if setup is not None:
                say(_evaluating(plan, is_whole=plan.images == len(dataset.test)))
                first_says(settings)
                kept = evaluation.kept_for(folder / EVALUATED, folder / WEIGHTS, dataset, settings)
                scored = evaluation.evaluate(vae, dataset, **settings, progress=progress, kept=kept)
                setup.done()
    except KeyboardInterrupt:
        interrupted = True
    except Exception as error:
        failure = failure or error
    summary = {"interrupted": interrupted} | scored | {k: v for k, v in summary.items() if k != "interrupted"}
    try:
        summary["remarks"] = remarks(summary)
        write_json(folder / SUMMARY, summary)
        if scored and failure is None:
            report.draw_curve(vae, records, scored, options, folder / FIGURES)
    except KeyboardInterrupt:
        summary["interrupted"] = True
    return summary, failure


def _evaluate_with_first(vae: Answers, dataset: Dataset, path: Path) -> None:
    """Take a share in the evaluation that the first process leads, which has the numbers, and the words if it fails."""
    try:
        with Setup() as setup:
            settings = first_says(None)
            evaluation.evaluate(vae, dataset, **settings, progress=False, kept=Kept(path / EVALUATED))
            setup.done()
    except (Elsewhere, KeyboardInterrupt):
        return
    except Exception:
        time.sleep(1)  # torchrun ends all when one has failed, and the first is to have its say
        raise


def _evaluating(plan: evaluation.Plan, is_whole: bool) -> str:
    """What is evaluated, in a line."""
    text = f"evaluating {plan.images:,} test data, {plan.num_samples:,} samples each: {report.about(plan.seconds)}"
    if is_whole and plan.num_samples >= FULL_SAMPLES:
        return text
    return f"{text} (--full: {report.about(plan.full_seconds)})"


def _describe(options: FitOptions, dataset: Dataset, say: Callable[[str], None]) -> None:
    """Say what the data are, and what the networks see of them."""
    say(f"{dataset.name}: {len(dataset.train):,} to train, {len(dataset.test):,} to test, of {dataset.x_shape}")
    if options.standardize:
        say(
            f"standardized: the networks see each of {dataset.train[:1].numel()} numbers as (x - mean) / standard "
            "deviation of the training part; log p(x), ELBO and samples are of the data as they are "
            "(--no-standardize to leave it out)"
        )


def read(options: FitOptions) -> tuple[FitOptions, Dataset]:
    """The data of a configuration, and the configuration with what only the data can settle.

    Raises:
        ValueError: Unknown or unreadable data, or none that fit the likelihood.
    """
    limits = (options.limit, options.evaluation_images)
    photographs = options.data == "celeba" or Path(options.data).is_dir() and options.data not in DATASETS
    # Decoding takes minutes: no more than will be looked at. Other data are read whole.
    most = max(n for n in limits if n is not None) if photographs and None not in limits else None
    framing = {name: getattr(options, name) for name in _READING}
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
        dataset = _redrawn(dataset, "dynamic")  # binary files are binary by themselves: these are grey
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


def _redrawn(dataset: Dataset, binarization: Binarization) -> Dataset:
    """The same data, binarised otherwise."""
    splits = {name: dataclasses.replace(getattr(dataset, name), binarization=binarization, dequantize=False)
              for name in ("train", "validation", "test")}  # fmt: skip
    protocol = dataset.protocol | {"binarization": binarization, "dequantize": False}
    return dataclasses.replace(dataset, protocol=protocol, **splits)


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
            if all(getattr(earlier, name) == getattr(options, name) for name in ("data", "data_dir", *_READING)):
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
        dataset = _redrawn(dataset, "none")
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
