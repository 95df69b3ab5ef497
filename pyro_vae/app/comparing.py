"""`pv.compare`: pairs, runs or whole studies, side by side on the same data with the same noise."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from pyro_vae.app import evaluation, serving
from pyro_vae.app.backends import execute
from pyro_vae.app.opening import Opened
from pyro_vae.app.opening import open as open_run
from pyro_vae.app.plans import EVALUATION_IMAGES, plan, shaping
from pyro_vae.app.runs import is_unfinished
from pyro_vae.app.studies import Study, refuse_strangers, study_file
from pyro_vae.app.trials import held, rankings, reason, speed, state
from pyro_vae.atomic import write_text
from pyro_vae.data import Split
from pyro_vae.inference.ranks import world
from pyro_vae.judging.rankings import Ranking, rank
from pyro_vae.judging.scoring import Scores, scores
from pyro_vae.options import checked, is_pair


@checked
def compare(
    pairs: Any,
    data: Any = None,
    *,
    num_data: int = EVALUATION_IMAGES,
    num_samples: int = 1000,
    criterion: str | None = None,
    seed: int | None = 0,
    device: str | torch.device | None = None,
    progress: bool | None = None,
    trust: bool | Sequence[str] = False,
) -> Ranking:
    """Who is ahead: fitted pairs scored on the same data with the same noise, and their differences paired by datum.

    Args:
        pairs: By name, or in a list: pairs in one piece (a `VAE`, an opened run), tuples ``(model, guide)``, or folders
            of runs. A list of them under one name is one arm fitted from several seeds; so are runs in a list that
            differ in nothing but their seeds.
        data: What they are scored on, as for `log_likelihood`; of runs their own test data if omitted, which must be
            the same for all.
        num_data: Of runs, how many test data at most.
        num_samples: K, of the estimate of log p(x).
        criterion: "log_p", or "elbo" to rank guides of one frozen model; as the models are if omitted: where all of
            them are the same to the bit, by the ELBO.
        seed: Of the noise, and of the draw of the data.
        device, progress: As for `log_likelihood`.
        trust: As for `open`, for folders of runs.
    Returns:
        The ranking: ``verdict``, ``to_frame()``, ``to_latex()``, ``plot()``.
    Raises:
        ValueError: Nothing to compare; runs of different data; pairs without data; a pair without a density.
    Example:
        >>> import pyro_vae as pv
        >>> torch.manual_seed(0) and None
        >>> digits = pv.load("digits")
        >>> pairs = {width: pv.VAE.build((1, 8, 8), latent_dim=2, hidden=(width,)) for width in (2, 64)}
        >>> for vae in pairs.values():
        ...     _ = pv.fit(vae, digits.train, epochs=4, learning_rate=5e-3, seed=0, progress=False)
        >>> found = compare(pairs, digits.test.subset(range(100)), num_samples=100, progress=False)
        >>> found.best, found.difference("64", "2").holds
        ('64', True)
    """
    arms = _arms(pairs, trust)
    everyone = [pair for members in arms.values() for pair in members]
    notes = [f"K = {num_samples}, one draw and one noise for all (seed {seed})", *_of_runs(arms)]
    if data is None:
        data, more = _common_data(arms, num_data, 0 if seed is None else seed)
        notes += more
    _refuse_points(arms)
    if criterion is None:
        criterion = "elbo" if len(everyone) > 1 and _one_model(everyone) else "log_p"
    options: dict[str, Any] = {"num_samples": num_samples, "seed": seed, "device": device, "progress": progress}
    kinds = {serving.face(pair.pair).density: name for name, own in arms.items() for pair in own
             if isinstance(pair, Opened)}  # fmt: skip
    if len(kinds) > 1:
        said = ", ".join(f"{name} has {density}" for density, name in kinds.items())
        raise ValueError(f"{said}: the two are not of the same thing, and cannot be compared.")
    scored = {name: [_scored(pair, data, options) for pair in members] for name, members in arms.items()}
    if criterion == "elbo":
        notes.append("one model for all, to the bit: p(z | x) is the same, and arms are ranked by the ELBO")
    return rank(scored, criterion=criterion, notes=notes)


def study(
    asked: Study | Mapping[str, Any] | str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    jobs: int | None = None,
    backend: str = "local",
    address: str | None = None,
    retry: bool = False,
    progress: bool | None = None,
    say: Any = None,
    trust: bool | Sequence[str] = False,
) -> Ranking | dict[str, Ranking]:
    """Fit all arms of a study that are not there yet, and rank them; broken off, the same call goes on.

    Args:
        asked: A `Study`, its keywords in a mapping, or a file of YAML or JSON: ``vary``, ``fixed``, ``seeds``,
            ``frozen``, ``budget``, ``seconds``.
        folder: Where its fits, its table and its page go.
        jobs: How many fits at a time; as many as there are cores if omitted.
        backend: "local", "dask" or "slurm".
        address: Of dask's scheduler.
        retry: Whether fits that failed are tried again.
        progress: Show a bar; None shows it on a terminal only.
        say: Takes lines about what is going on.
        trust: Parts of your own that a file, or a run whose model is frozen, names and that may be imported,
            ``module:Class``; True for all. Those of a `Study` made in Python are the caller's.
    Returns:
        The ranking; of several datasets one for each, by name.
    Raises:
        ValueError: A bad option or file, arms of different data, nothing that could be fitted.
    """
    if world()[1] > 1:
        raise ValueError(
            f"got a study in a group of {world()[1]} processes, which deals its fits out by itself. Call it in one "
            "process, with jobs=N, or backend='slurm' on several machines."
        )
    wanted = study_of(asked)
    refuse_strangers(wanted, trust, in_file=isinstance(asked, str | os.PathLike))
    place = Path(folder).expanduser()
    planned = plan(wanted, place)
    write_study(wanted, place)
    if wanted.budget == "seconds":
        planned = plan(wanted, place, speeds_of(wanted, place))
    execute(planned, jobs=jobs, backend=backend, address=address, retry=retry, progress=progress,
            say=say or (lambda _: None))  # fmt: skip
    found = rankings(planned, wanted)
    if not found:
        failed = [trial for trial in planned.trials if state(trial) == "failed"]
        first = f"{failed[0].arm}: {reason(failed[0])}" if failed else "none was begun"
        raise ValueError(f"no fit of the study in {place} could be made. The first failed: {first}")
    from pyro_vae.app.study_page import write_results

    write_results(planned, wanted, found, place)
    return next(iter(found.values())) if len(found) == 1 else found


def study_of(asked: Study | Mapping[str, Any] | str | os.PathLike[str]) -> Study:
    """A study from whatever it is asked for by."""
    if isinstance(asked, Study):
        return asked
    return Study.of(asked) if isinstance(asked, Mapping) else study_file(Path(asked).expanduser())


def write_study(asked: Study, folder: Path) -> None:
    """Write what was asked for into the folder of a study; a ValueError where there is another, or something else."""

    place = folder / STUDY
    if folder.is_dir() and any(folder.iterdir()) and not place.is_file():
        raise ValueError(f"got --out {folder}, which is there and holds no study, wanted a new folder, or a study's.")
    write_text(place, json.dumps(asked.to_json(), indent=2) + "\n")


def read_study(folder: Path) -> Study:
    """What was asked for in the folder of a study; a ValueError where there is none."""
    if not (folder / STUDY).is_file():
        raise ValueError(f"got {folder}, wanted the folder of a study, as 'pyro-vae compare --vary ...' writes one.")
    return study_file(folder / STUDY)


def speeds_of(asked: Study, folder: Path, measure: bool = True) -> dict[str, float] | None:
    """Seconds of an epoch of each arm, for a budget of seconds: measured once, and kept by what the arm is, so that a
    study that is gone on with is the same study. None where anything is missing and nothing is to be measured.
    """

    if asked.budget != "seconds":
        return None
    place = folder / "speeds.json"
    trials = {trial.arm: trial for trial in plan(asked, folder).trials if trial.reason is None}
    keys = {arm: _speed_key(trial.options) for arm, trial in trials.items()}

    def kept() -> dict[str, float]:
        return json.loads(place.read_text(encoding="utf-8")) if place.is_file() else {}

    known = kept()
    if not set(keys.values()) <= set(known):
        if not measure:
            return None
        with held(place):
            known = kept()
            for arm, key in keys.items():
                if key not in known:
                    known[key] = speed(trials[arm].options)[0]
            write_text(place, json.dumps(known, indent=2) + "\n")
    return {arm: known[key] for arm, key in keys.items()}


def _speed_key(options: Any) -> str:

    plain = {k: v for k, v in shaping(options).items() if k not in ("epochs", "seed", "data_seed")}
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:12]


STUDY = "study.json"


def _arms(pairs: Any, trust: bool | Sequence[str]) -> dict[str, list[Any]]:
    """Arms by name, each with its fits."""
    if isinstance(pairs, Mapping):
        named = {str(name): each if isinstance(each, list) else [each] for name, each in pairs.items()}
        arms = {name: [_pair(name, each, trust) for each in members] for name, members in named.items()}
    else:
        listed = list(pairs) if isinstance(pairs, list | tuple) else [pairs]
        arms = _grouped([_pair(f"number {i + 1}", each, trust) for i, each in enumerate(listed)])
    if not arms or not all(arms.values()) or sum(map(len, arms.values())) < 2:
        raise ValueError(
            f"got {sum(map(len, arms.values()))} pairs, wanted at least two to compare. Pass {{'name': vae, ...}}, or "
            "the folders of two runs."
        )
    return arms


def _pair(name: str, given: Any, trust: bool | Sequence[str]) -> Any:
    if isinstance(given, str | os.PathLike):
        return open_run(given, trust=trust)
    if is_pair(given) or isinstance(given, tuple) and len(given) == 2 and all(map(callable, given)):
        return given
    raise ValueError(
        f"got {type(given).__name__} as the pair {name!r}, wanted a pair in one piece, (model, guide), or the "
        "folder of a run."
    )


def _grouped(listed: Sequence[Any]) -> dict[str, list[Any]]:
    """Runs that differ in nothing but their seeds are fits of one arm; the others are called by what they are."""
    keys = [_apart_from_seeds(each) if isinstance(each, Opened) else f"{i}" for i, each in enumerate(listed)]
    if len(set(keys)) == 1:  # which were meant to be told from each other
        keys = [f"{i}" for i in range(len(listed))]
    called: dict[str, list[Any]] = {}
    for key in dict.fromkeys(keys):
        members = [each for each, own in zip(listed, keys, strict=True) if own == key]
        first, number = members[0], keys.index(key) + 1
        name = str(first.path) if isinstance(first, Opened) else f"{type(first).__name__} {number}"
        called[name if name not in called else f"{name} ({number})"] = members
    return called


def _of_runs(arms: Mapping[str, Sequence[Any]]) -> list[str]:
    """What a reader should know of runs that are compared."""
    opened = [run for members in arms.values() for run in members if isinstance(run, Opened)]
    notes = [f"{run.path} is not finished: as it stands after {len(run.history)} epochs" for run in opened
             if run.history.interrupted or is_unfinished(run.path)]  # fmt: skip
    if len(arms) > 1 and len(opened) > 1 and len({_apart_from_seeds(run) for run in opened}) == 1:
        notes.append("these runs differ in nothing but their seeds, if at all: fits of one arm, compared as fits")
    return notes


def _apart_from_seeds(run: Opened) -> str:
    plain = run.options.to_json()
    return str(sorted((k, v) for k, v in plain.items() if k not in ("seed", "data_seed", "data_dir", "device")))


def _common_data(arms: Mapping[str, Sequence[Any]], num_data: int, seed: int) -> tuple[Split, list[str]]:
    """The test data of runs of the same data, and what is to be said of their training data; else a ValueError."""
    first: tuple[str, Opened, Split] | None = None
    trained: dict[str, int] = {}
    seen: Split | None = None
    same = True
    for name, run in ((name, run) for name, members in arms.items() for run in members):
        if not isinstance(run, Opened):
            raise ValueError("got pairs and no data, wanted data to score them on: compare(pairs, data).")
        dataset = run.read()
        trained[name] = len(dataset.train)
        same = same and (seen is None or seen.same(dataset.train))
        seen = dataset.train
        first = first or (name, run, dataset.test)
        _refuse_other_data(first, (name, run, dataset.test))
    assert first is not None
    test = first[2].subset(slice(0, min(num_data, len(first[2])))).frozen(seed)
    counts = ", ".join(f"{name}: {count:,}" for name, count in trained.items())
    notes = [] if same else [f"not trained on the same data ({counts}); what they are scored on is the same"]
    return test, notes


def _refuse_other_data(one: tuple[str, Opened, Split], other: tuple[str, Opened, Split]) -> None:
    (first, run, test), (second, another, theirs) = one, other
    said = [
        f"{what} {mine!r} against {their!r}"
        for what, mine, their in (
            ("--data", run.options.data, another.options.data),
            ("shape", test.x_shape, theirs.x_shape),
            ("--binarization", test.binarization, theirs.binarization),
            ("--dequantize", test.dequantize, theirs.dequantize),
            ("test data", len(test), len(theirs)),
        )
        if mine != their
    ]
    same = not said and test.same(theirs)
    if same:
        return
    why = ", ".join(said) or (
        f"the test data were drawn otherwise: seeds {run.options.seed} and {another.options.seed} split the files "
        "(--split-seed keeps a split)"
    )
    raise ValueError(
        f"{first} and {second} were fitted to different data: {why}. Their log p(x) are not of the same thing, and "
        "cannot be compared. Fit both to the same, or give data that are both's: pv.compare([...], data)."
    )


def _refuse_points(arms: Mapping[str, Sequence[Any]]) -> None:
    for name, members in arms.items():
        for each in members:
            vae = each.pair if isinstance(each, Opened) else each
            if hasattr(getattr(vae, "guide", None), "posterior") and evaluation.is_autoencoder(vae):
                raise ValueError(
                    f"{name} is a plain autoencoder: a point has no density over z, hence no log p(x) to be ahead by. "
                    "Compare reconstructions, or fit with another --posterior."
                )


def _one_model(pairs: Sequence[Any]) -> bool:
    """Whether all models are the same, to the bit."""
    models = [_programs(pair)[0] for pair in pairs]
    if all(model is models[0] for model in models):
        return True
    if not all(isinstance(model, torch.nn.Module) for model in models):
        return False
    first = models[0].state_dict()
    return all(
        type(model) is type(models[0])
        and model.state_dict().keys() == first.keys()
        and all(torch.equal(value.cpu(), first[name].cpu()) for name, value in model.state_dict().items())
        and repr(model) == repr(models[0])
        for model in models[1:]
    )


def _programs(pair: Any) -> tuple[Any, Any]:
    return pair if isinstance(pair, tuple) else (pair.model, pair.guide)


def _scored(pair: Any, data: Any, options: Mapping[str, Any]) -> Scores:
    model, guide = _programs(pair)
    about: dict[str, Any] = {}
    if isinstance(pair, Opened):
        if isinstance(data, Split):
            data = pair.arguments(data)
        about = {"seed_of_fit": pair.options.seed, "seconds": pair.summary.get("train_seconds") or float("nan"),
                 "parameters": pair.summary.get("parameters", 0)}  # fmt: skip
    elif isinstance(pair, torch.nn.Module):
        about = {"parameters": sum(p.numel() for p in pair.parameters())}
    return scores(model, guide, data, **options, **about)
