"""A fit of a study: made, scored, held by one process at a time; and what comes of all of them."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from pyro_vae import seals
from pyro_vae.app import evaluation, serving
from pyro_vae.app.building import build
from pyro_vae.app.defaults import FitOptions, resolve
from pyro_vae.app.plans import PLACES, Plan, Trial, datasets
from pyro_vae.app.reading import read
from pyro_vae.app.run_page import write_page
from pyro_vae.app.runs import (
    CHECKPOINT,
    CONFIG,
    METRICS,
    SUMMARY,
    WEIGHTS,
    Run,
    finish,
    is_unfinished,
    locked,
    run_folder,
    write_json,
    write_lines,
)
from pyro_vae.app.studies import Study
from pyro_vae.app.training import train, training_numbers
from pyro_vae.atomic import reason_of
from pyro_vae.inference.checkpoints import Sparing
from pyro_vae.judging.estimates import elbo_terms, log_likelihood
from pyro_vae.judging.rankings import CRITERIA, Ranking, rank
from pyro_vae.judging.scoring import Scores, scores_of

SCORES = "scores.safetensors"
FAILED = ".failed.json"  # beside the folder of a fit that failed
LOCK = ".lock"  # beside the folder of a fit, while a process makes it
_TRIED = 20  # steps that the speed of an arm is measured on


def run_trial(config: Mapping[str, Any], folder: str) -> str | None:
    """Make one fit and score it, or what is missing of that; why it failed, None where it is done.

    Raises:
        KeyboardInterrupt: It was broken off, and is gone on with the next time.
    """
    options, path = resolve(config), Path(folder)
    threads = torch.get_num_threads()
    torch.set_num_threads(options.threads or threads)
    try:
        with held(path):
            if not (path / SUMMARY).is_file() and not is_unfinished(path):
                shutil.rmtree(path, ignore_errors=True)  # what was killed before it was begun
            if not (path / SUMMARY).is_file() or is_unfinished(path):
                _fit(options, path)
            if not (path / SCORES).is_file():
                _score(options, path)
            _failed(path).unlink(missing_ok=True)
    except KeyboardInterrupt:
        raise
    except Exception as error:  # one fit is not the study
        if os.environ.get("PYRO_VAE_DEBUG") == "1":
            raise
        return lost(path, " ".join(str(error).split()) or type(error).__name__)
    finally:
        torch.set_num_threads(threads)
    return None


def lost(path: Path, reason: str) -> str:
    """Keep why a fit failed, beside its folder."""
    write_json(_failed(path), {"reason": reason})
    return reason


@contextlib.contextmanager
def held(path: Path) -> Iterator[None]:
    """Hold what lies at a path, which another process of the study may be making: waits until that one has ended.

    A process that was killed leaves workers behind, which finish their fit; and a study may be asked for twice.
    """
    place = path.with_name(path.name + LOCK)
    while True:
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            file = place.open("ab")
        except OSError as error:
            raise ValueError(f"got {place.parent}, wanted a place to write to: {reason_of(error)}.") from error
        with file:
            if locked(file) and _is(place, file):
                try:
                    os.utime(place)  # when it was taken
                    yield
                finally:
                    with contextlib.suppress(OSError):
                        place.unlink()
                return
        time.sleep(0.1)


def _is(place: Path, file: Any) -> bool:
    """Whether an open file is still the one of that name: whoever held it before removed it."""
    try:
        return os.path.samestat(place.stat(), os.fstat(file.fileno()))
    except OSError:
        return False


def _fit(options: FitOptions, path: Path) -> None:
    """A run folder without pictures, which `draw` makes when they are wanted."""
    # Where data and model lie now is no part of what an unfinished fit was begun with: a study may be moved.
    asked = {name: value for name, value in options.to_json().items() if name not in (*PLACES, "data")}
    with run_folder(path, asked) as folder:
        settled, dataset = read(options)
        vae = build(settled, dataset)
        write_json(folder / CONFIG, settled.to_json())
        started = time.perf_counter()

        def keep(record: Mapping[str, Any]) -> None:
            if not (folder / WEIGHTS).exists():  # from here on what was broken off is worth to go on with
                vae.save(folder / WEIGHTS)

        history = train(vae, dataset, settled, Sparing(folder / CHECKPOINT), keep, progress=False)
        if history.interrupted:
            raise KeyboardInterrupt
        seconds = max(time.perf_counter() - started, history.records[-1]["seconds"])
        vae.save(folder / WEIGHTS)
        write_lines(folder / METRICS, history.records)
        summary = {"interrupted": False} | training_numbers(vae, history, seconds, settled)
        shown = {"num_samples": settled.evaluation_samples, "images": settled.evaluation_images}
        summary["protocol"] = evaluation.protocol(vae, dataset, **shown, seed=settled.split_seed or 0)  # type: ignore[arg-type]
        write_json(folder / SUMMARY, summary)
        write_page(folder, options, summary)
        finish(folder)


def _score(options: FitOptions, path: Path) -> None:
    """log p(x) and ELBO per datum of the test data that all fits of the study share, with the same noise."""
    settled, dataset = read(options)
    run = Run.load(path)
    pair = run.pair(own_parts(options))
    face = serving.face(pair)
    model, guide = face.programs(pair)
    seed = options.split_seed or 0
    test = face.given(evaluation.test_data(dataset, seed, options.evaluation_images))
    shared: dict[str, Any] = {"seed": seed, "progress": False}
    estimate = log_likelihood(model, guide, test, num_samples=options.evaluation_samples, **shared)
    terms = elbo_terms(model, guide, test, num_samples=evaluation.ELBO_SAMPLES, **shared)
    found = scores_of(estimate, terms, options.evaluation_samples)
    tensors = {name: getattr(found, name).double() for name in ("log_p", "elbo", "pareto_k")}
    told = {"num_samples": found.num_samples, "mc_stderr": found.mc_stderr, "bound": found.bound}
    summary = run.summary | {"test_images": len(found.log_p)} | evaluation.told(terms, estimate)
    write_json(path / SUMMARY, summary)
    write_page(path, options, summary)
    # The last one: a fit with scores is done, and nothing of it is missing.
    seals.save(path / SCORES, tensors, {"scores": json.dumps(told)})


def read_scores(trial: Trial) -> Scores:
    """The scores of a trial that is done."""
    tensors, metadata = seals.read(trial.folder / SCORES)
    summary = Run.load(trial.folder).summary
    told: dict[str, Any] = tensors | json.loads(metadata["scores"])
    return Scores(**told, seed=trial.options.seed, seconds=summary["train_seconds"], parameters=summary["parameters"])


def state(trial: Trial) -> str:
    """What there is of a trial: "done", "failed", "unfinished" or "missing"."""
    if trial.reason is not None:
        return "failed"
    if (trial.folder / SCORES).is_file():
        return "done"
    if _failed(trial.folder).is_file():
        return "failed"
    return "unfinished" if trial.folder.is_dir() else "missing"


def reason(trial: Trial) -> str:
    """Why a trial failed."""
    if trial.reason is not None:
        return trial.reason
    try:
        return str(json.loads(_failed(trial.folder).read_text(encoding="utf-8"))["reason"])
    except (OSError, ValueError, KeyError):
        return "unknown"


def rankings(plan: Plan, study: Study) -> dict[str, Ranking]:
    """What came of a study: of each dataset the ranking of its arms, by the ELBO where they share a frozen model."""
    criterion = "log_p" if study.frozen is None else "elbo"
    found: dict[str, Ranking] = {}
    nowhere: dict[str, str] = {}  # what failed on data of which no arm is there
    for data, names in datasets(plan).items():
        arms: dict[str, list[Scores]] = {}
        lost: dict[str, dict[int, str]] = {}
        for trial in plan.trials:
            if trial.arm not in names:
                continue
            if state(trial) == "failed":
                lost.setdefault(trial.arm, {})[trial.options.seed] = reason(trial)
            elif state(trial) == "done":
                own = read_scores(trial)
                infinite = int((~getattr(own, criterion).isfinite()).sum())
                if infinite:
                    words = f"{CRITERIA[criterion]} is not finite for {infinite} of {len(own.log_p)} data"
                    lost.setdefault(trial.arm, {})[trial.options.seed] = words
                else:
                    arms.setdefault(trial.arm, []).append(own)
        failed = _rows_of_failures(lost, len(study.seed_list))
        if arms:
            found[data] = rank(arms, criterion=criterion, failed=failed, notes=plan.notes)
        else:
            nowhere |= failed
    if found and nowhere:
        first = next(iter(found))
        found[first] = dataclasses.replace(found[first], failed=found[first].failed | nowhere)
    return found


def _rows_of_failures(lost: Mapping[str, Mapping[int, str]], seeds: int) -> dict[str, str]:
    """A row for each fit that failed, or one for an arm of which all did for one reason."""
    rows = {}
    for arm, reasons in lost.items():
        if len(reasons) == seeds and len(set(reasons.values())) == 1:
            rows[arm] = next(iter(reasons.values()))
        else:
            rows |= {f"{arm}, seed {seed}": why for seed, why in reasons.items()}
    return rows


def speed(options: FitOptions) -> tuple[float, float]:
    """Seconds of an epoch, and of the scoring, measured on a few steps and images."""
    settled, dataset = read(dataclasses.replace(options, frozen=None))
    vae = build(dataclasses.replace(settled, frozen=None), dataset)
    few = dataset.train.subset(slice(0, _TRIED * settled.batch_size))
    small = dataclasses.replace(dataset, train=few, validation=dataset.validation.subset(slice(0, 50)))
    short = dataclasses.replace(settled, epochs=2, schedule="constant", patience=None, kl_warmup=0, frozen=None)
    history = train(vae, small, short, None, None, progress=False)
    each = history.records[-1]["seconds"] - history.records[0]["seconds"]
    images = settled.evaluation_images or len(dataset.test)
    per_sample = evaluation.seconds_each(vae, dataset.test, settled.evaluation_samples)
    scoring = per_sample * min(images, len(dataset.test)) * (settled.evaluation_samples + evaluation.ELBO_SAMPLES)
    return each / len(few) * len(dataset.train), scoring


def time_left(plan: Plan) -> float:
    """Seconds of one process that are left: by fits of the same arm that are done, or else measured."""
    todo = [trial for trial in plan.trials if state(trial) in ("missing", "unfinished")]
    if plan.base is not None and state(plan.base) != "done":
        todo.append(plan.base)
    done = [trial for trial in reversed(plan.trials) if state(trial) == "done"]
    known = {trial.arm: Run.load(trial.folder).summary["train_seconds"] for trial in done}
    for trial in todo:
        if trial.arm not in known:
            epoch, scoring = speed(trial.options)
            known[trial.arm] = epoch * trial.options.epochs + scoring
    return sum(known[trial.arm] for trial in todo)


def own_parts(options: FitOptions) -> list[str]:
    """Parts of one's own: in a study they were named by who started it."""
    return [name for name in (options.posterior, options.prior, options.likelihood) if name is not None and ":" in name]


def _failed(path: Path) -> Path:
    return path.with_name(path.name + FAILED)
