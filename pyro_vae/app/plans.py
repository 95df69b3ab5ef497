"""The plan of a study: its fits, each with its whole configuration and its folder.

The plan of a study is a pure function of its definition, the data and the versions of the package. A fit that is there
is not made again, an unfinished one is gone on with, and one with anything different (an option, a datum, a version) is
another fit in another folder.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyro_vae.app import evaluation
from pyro_vae.app.defaults import FitOptions, option, resolve
from pyro_vae.app.reading import read
from pyro_vae.app.runs import WEIGHTS, Run, options_of
from pyro_vae.app.studies import OPTIONS, Study
from pyro_vae.data import Dataset

PLACES = ("data_dir", "device", "frozen")  # where things lie says nothing about a result
_READS = (
    "data", "data_dir", "binarization", "dequantize", "image_size", "crop", "channels", "background", "images",
    "labels", "limit", "likelihood", "split_seed",
)  # fmt: skip
EVALUATION_IMAGES = 1000


@dataclass(frozen=True)
class Trial:
    """One fit of a study: its arm, whole configuration and run folder, and why it cannot be made, if so."""

    arm: str
    options: FitOptions
    folder: Path
    reason: str | None = None


@dataclass(frozen=True)
class Plan:
    """All fits of a study, the fit whose model they are frozen on, if it makes one, and notes below its table."""

    trials: tuple[Trial, ...]
    base: Trial | None
    notes: tuple[str, ...]


def plan(study: Study, folder: Path, speeds: Mapping[str, float] | None = None) -> Plan:
    """What a study is made of, in its folder; `speeds` are the seconds of an epoch, for a budget of seconds.

    Raises:
        ValueError: An option that is none; data that cannot be read; arms with different data, which cannot be paired.
    """
    base, shared = None, _base_options(study)
    if study.frozen is True:
        options = _resolved("the model", shared | {"seed": study.seed_list[0]})
        base = Trial("the model", options, folder / "trials" / _name("model", options, _data_print(options)))
    trials, prints = [], {}
    resolved: dict[str, FitOptions | str] = {}
    data: dict[str, str] = {}  # of what cannot be fitted
    for arm, changes in study.settings().items():
        try:
            resolved[arm] = _resolved(arm, _changed(shared, changes, study.fixed))
        except ValueError as error:
            resolved[arm] = str(error)
            data[arm] = str(_changed(shared, changes, {}).get("data", "digits"))
    known = {arm: each for arm, each in resolved.items() if isinstance(each, FitOptions)}
    epochs = _epochs(study, known, speeds)
    for arm, each in resolved.items():
        for seed in study.seed_list:
            if isinstance(each, str):
                trials.append(Trial(arm, resolve({"data": data[arm], "seed": seed}), folder, each))
                continue
            options = dataclasses.replace(each, seed=seed, data_seed=seed, epochs=epochs[arm])
            if study.frozen is not None:
                model = str(base.folder) if base is not None else str(Path(str(study.frozen)).expanduser().absolute())
                options = dataclasses.replace(options, frozen=model)
            prints[arm] = _data_print(options)
            name = _name(f"{arm}-s{seed}", options, prints[arm], _model_print(base, options))
            trials.append(Trial(arm, options, folder / "trials" / name))
    _same_data(prints, known)
    return Plan(tuple(trials), base, tuple(_notes(study, epochs, known, speeds)))


def datasets(plan_: Plan) -> dict[str, list[str]]:
    """The arms of each dataset."""
    found: dict[str, dict[str, None]] = {}
    for trial in plan_.trials:
        found.setdefault(trial.options.data, {})[trial.arm] = None
    return {data: list(arms) for data, arms in found.items()}


def _base_options(study: Study) -> dict[str, Any]:
    """What all arms start from, as it was asked for."""
    shared: dict[str, Any] = {"split_seed": 0, "threads": 1, "compile": "off"}
    if isinstance(study.frozen, str):
        run = Run.load(Path(study.frozen).expanduser())
        shared |= {name: getattr(options_of(run), name) for name in OPTIONS} | {"threads": 1, "compile": "off"}
        if shared["split_seed"] is None:
            shared["split_seed"] = shared["seed"]
        shared["evaluation_images"] = shared["frozen"] = None
    return _changed(shared, study.fixed, {})


def _changed(base: Mapping[str, Any], changes: Mapping[str, Any], fixed: Mapping[str, Any]) -> dict[str, Any]:
    """Options with changes; what belongs to a part that was changed does not outlive it, unless it was asked for."""
    asked = {name: base[name] for name in fixed if name in base}
    found = dict(base)
    own = [(part, f"{part}_options") for part in ("posterior", "prior", "likelihood", "bound")]
    for part, option_ in (*own, ("bound", "num_samples"), ("network", "hidden")):
        if part in changes and changes[part] != base.get(part, "elbo" if part == "bound" else None):
            found.pop(option_, None)
    return found | asked | dict(changes)


def _resolved(arm: str, given: Mapping[str, Any]) -> FitOptions:
    try:
        options = resolve({key: value for key, value in given.items() if key != "frozen"})
    except ValueError as error:
        raise ValueError(f"{arm}: {error}") from error
    if options.posterior == "point":
        raise ValueError(
            f"{arm}: got --posterior point, a plain autoencoder: a point has no density over z, hence no ELBO and no "
            "log p(x) to be ahead by. Compare reconstructions of runs, or take another posterior."
        )
    if options.evaluation_images is None and not options.full:
        options = dataclasses.replace(options, evaluation_images=EVALUATION_IMAGES)
    return options


def _epochs(study: Study, arms: Mapping[str, FitOptions], speeds: Mapping[str, float] | None) -> dict[str, int]:
    if study.budget == "gradients" and arms:
        least = min(each.num_samples for each in arms.values())
        for arm, each in arms.items():
            if 2 * each.epochs * least < each.num_samples:
                raise ValueError(
                    f"got --epochs {each.epochs} with --budget gradients, wanted at least "
                    f"{math.ceil(each.num_samples / least)}: {arm} has {each.num_samples} samples in the bound, and "
                    f"{each.epochs * least / each.num_samples:.2g} of an epoch would be its share."
                )
        return {arm: max(1, round(each.epochs * least / each.num_samples)) for arm, each in arms.items()}
    if study.budget == "seconds" and speeds is not None:
        assert study.seconds is not None
        return {arm: max(1, int(study.seconds / speeds[arm])) for arm in arms}
    return {arm: each.epochs for arm, each in arms.items()}


def _notes(
    study: Study, epochs: Mapping[str, int], arms: Mapping[str, FitOptions], speeds: Mapping[str, float] | None
) -> Iterator[str]:
    counts = sorted(set(epochs.values()))
    if study.budget == "epochs":
        yield f"budget: equal epochs, {', '.join(map(str, counts))}"
    elif study.budget == "gradients":
        spent = ", ".join(f"{arm}: {n} x {arms[arm].num_samples}" for arm, n in epochs.items())
        yield f"budget: equal gradient evaluations (passes x samples), as near as whole epochs are: {spent}"
    elif speeds is None:
        yield f"budget: equal time, {study.seconds} s a fit; the speed of each arm is measured at the start"
    else:
        each = ", ".join(f"{arm}: {n} of {speeds[arm]:.2g} s" for arm, n in epochs.items())
        yield f"budget: equal time, {study.seconds} s a fit, by the speed measured at the start; epochs: {each}"
    if arms:
        first = next(iter(arms.values()))
        data = f"the first {first.evaluation_images} test data (or all)" if first.evaluation_images else "all test data"
        yield (
            f"protocol: K = {first.evaluation_samples}, {data}, one draw and one "
            f"noise for all (seed {first.split_seed}); seeds {', '.join(map(str, study.seed_list))}, each with "
            "one order and one draw of the training data for all arms"
        )
    if study.frozen is not None:
        yield "the model is frozen: one p(z | x) for all, and arms are ranked by the ELBO"


def _same_data(prints: Mapping[str, str], arms: Mapping[str, FitOptions]) -> None:
    """Refuse arms of one dataset that see it otherwise, or the density of something else."""
    given = [arm for arm, each in arms.items() if each.model == "conditional"]
    if given and len(given) < len(arms):
        without = next(arm for arm in arms if arm not in given)
        raise ValueError(
            f"the arm {given[0]!r} has log p(x | y), which knows the label of each datum, and {without!r} log p(x): "
            "they are not of the same thing, and cannot be compared. Give conditional models a study of their own."
        )
    by_data: dict[str, str] = {}
    for arm, each in arms.items():
        first = by_data.setdefault(each.data, arm)
        if prints[arm] != prints[first]:
            other = arms[first]
            names = [n for n in _READS if getattr(each, n) != getattr(other, n)]
            said = ", ".join(f"{option(n)} {getattr(each, n)} against {getattr(other, n)}" for n in names)
            raise ValueError(
                f"the arms {first!r} and {arm!r} do not see the same {each.data} ({said or 'as read'}): their log p(x) "
                "are of different data, zeros and ones or grey levels, say, and cannot be compared. Vary it in a study "
                "of its own, or fix --binarization for all."
            )


_PRINTS: dict[tuple[Any, ...], str] = {}


def _data_print(options: FitOptions) -> str:
    """What the data of a configuration are, as a hash: all that is trained and scored on, and how it is drawn."""
    shaping = (*_READS, "evaluation_images", "standardize", "network", "prior", "model")
    key = tuple(str(getattr(options, name)) for name in shaping)
    if key not in _PRINTS:
        _, dataset = read(options)
        _PRINTS[key] = fingerprint_of(dataset, options)
    return _PRINTS[key]


def fingerprint_of(dataset: Dataset, options: FitOptions) -> str:
    """A hash of a dataset's pixels and of its test data as they are scored."""
    digest = hashlib.sha256()
    test = evaluation.test_data(dataset, options.split_seed or 0, options.evaluation_images)
    for part in (dataset.train, dataset.validation, test):
        digest.update(str(((len(part), *part.x_shape), part.held(slice(0, 1)).dtype)).encode())
        for few in part.pieces():
            digest.update(_raw(few))
    for labels in (dataset.train.labels, test.labels) if options.model != "vae" else ():
        if labels is not None:  # which some models are trained on
            digest.update(_raw(labels))
    digest.update(json.dumps([dataset.train.binarization, dataset.train.dequantize]).encode())
    return digest.hexdigest()


def _raw(tensor: Tensor) -> bytes:
    return tensor.contiguous().cpu().view(torch.uint8).numpy().tobytes()


def _model_print(base: Trial | None, options: FitOptions) -> str:
    """What the frozen model is: the base's folder, which its own name tells, or a hash of the weights of a run."""
    if base is not None:
        return base.folder.name
    if options.frozen is None:
        return ""
    return hashlib.sha256((Path(options.frozen) / WEIGHTS).read_bytes()).hexdigest()


def _name(stem: str, options: FitOptions, data: str, frozen: str = "") -> str:
    """The folder of a trial, found by all that shapes its result."""
    versions = {name: value for name, value in evaluation.versions().items() if name != "python"}
    text = json.dumps([shaping(options), data, frozen, versions], sort_keys=True)
    short = re.sub(r"[^a-zA-Z0-9.]+", "-", stem).strip("-")[:60]
    return f"{short}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def shaping(options: FitOptions) -> dict[str, Any]:
    """What shapes a result of a configuration, as plain data: not where anything lies."""
    plain = {name: value for name, value in options.to_json().items() if name not in PLACES}
    return plain | {"data": Path(options.data).name}
