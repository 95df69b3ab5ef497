"""Run folders: what a fit leaves on disk, written whole or not at all.

    config.json           the complete configuration; give it back by --config
    summary.json          the numbers, with their errors and protocol
    metrics.jsonl         one line per epoch
    weights.safetensors   the weights, and the architecture that they fit
    figures/*.png
    report.html           all of it on one page
    unfinished.json       while the run is not finished: the options that it was begun with
    checkpoint.safetensors  the same while: the state of the fit, from which the same command goes on
    evaluation.partial.safetensors, judgement.partial.safetensors
                          while `evaluate` or `judge` are at work: what they have found so far

Each file is there whole or not at all. A folder without unfinished.json is complete, and is not written over. Loading
one reads JSON and tensors, never code.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyro_vae.app.configuration import convert
from pyro_vae.app.defaults import FitOptions, field_of, resolve
from pyro_vae.atomic import reason_of, write_file

if TYPE_CHECKING:
    from pyro_vae.programs.vae import VAE, Answers

CONFIG, SUMMARY, METRICS, WEIGHTS, FIGURES, REPORT, UNFINISHED, CHECKPOINT, EVALUATED, JUDGED = (
    "config.json", "summary.json", "metrics.jsonl", "weights.safetensors", "figures", "report.html", "unfinished.json",
    "checkpoint.safetensors", "evaluation.partial.safetensors", "judgement.partial.safetensors",
)  # fmt: skip


def _runs_below(path: Path) -> str:
    """A hint at the runs that a folder holds, if it is one of runs."""
    runs = sorted(each.parent for each in path.glob(f"*/{CONFIG}"))
    return f" It holds runs: name one of them, such as {runs[0]}." if runs else ""


@dataclass(frozen=True)
class Run:
    """A run folder that was read back: its path, configuration and numbers."""

    path: Path
    config: dict[str, Any]
    summary: dict[str, Any]

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Run:
        """Read a run folder.

        Raises:
            ValueError: No such folder, a file missing or corrupt.
        """
        path = Path(path)
        if not path.is_dir():
            raise ValueError(f"got {path}, wanted a run folder, as 'pyro-vae fit --out {path}' writes one.")
        unfinished = is_unfinished(path)
        if unfinished and not (path / WEIGHTS).is_file():
            raise ValueError(f"{path} is a run whose first epoch is not over: it has no weights yet. Try again later.")
        for name in (CONFIG, WEIGHTS) if unfinished else (CONFIG, SUMMARY, WEIGHTS):
            if not (path / name).is_file():
                raise ValueError(
                    f"{path} has no {name}, wanted a run folder, as 'pyro-vae fit' writes one.{_runs_below(path)}"
                )
        there = (path / SUMMARY).is_file()
        return cls(path, _read_object(path / CONFIG), _read_object(path / SUMMARY) if there else {"interrupted": True})

    def vae(self, trust: Sequence[str] = ()) -> VAE:
        """The fitted pair of a run of ``--model vae``; arguments and errors are those of `pair`."""
        from pyro_vae.programs.vae import VAE

        found = self.pair(trust)
        if not isinstance(found, VAE):
            raise ValueError(
                f"{self.path} is a {self.config.get('model')} model, wanted a plain VAE (--model vae). Its pair is "
                "pv.open(run).pair."
            )
        return found

    def pair(self, trust: Sequence[str] = ()) -> Answers:
        """The fitted pair, of whatever ``--model``: a `VAE`, or a class of the zoo.

        Args:
            trust: Parts of the user's own that may be imported, ``module:Class``.
        Raises:
            ValueError: The weights are corrupt, not those of their architecture, or of parts that are not trusted.
        """
        from pyro_vae.programs.vae import Answers

        path = self.path / WEIGHTS
        try:
            vae = Answers.load(path, trust=trust)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} has a damaged architecture entry ({error}). Fit again.") from error
        assert vae.architecture is not None
        built = {key: getattr(vae.architecture, key) for key in BUILT if key in self.config}
        configured = {key: tuple(v) if isinstance(v := self.config[key], list) else v for key in built}
        if built != configured:
            key = next(key for key in built if built[key] != configured[key])
            raise ValueError(
                f"{path} was built with {key} = {built[key]}, but {self.path / CONFIG} says {configured[key]}: the two "
                "files are of different runs."
            )
        return vae

    def metrics(self) -> list[dict[str, Any]]:
        """The records of `History`, one per epoch.

        Raises:
            ValueError: The file is missing or corrupt.
        """
        path = self.path / METRICS
        try:
            return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} could not be read: {error}.") from error


def options_of(run: Run) -> FitOptions:
    """The configuration of a run; a ValueError where config.json holds a value that it cannot have."""
    where = run.path / CONFIG
    try:
        return resolve({name: convert(name, value, name) for name, value in run.config.items()})
    except (ValueError, KeyError) as error:
        raise ValueError(f"{where} is damaged: {error}") from error


BUILT = (
    "model", "model_options",
    "latent_dim", "network", "hidden", "activation", "posterior", "posterior_options", "prior", "prior_options",
    "likelihood", "likelihood_options", "scale", "standardize",
)  # fmt: skip


@contextlib.contextmanager
def run_folder(path: Path, asked: Mapping[str, Any] | None = None, checkpoint: Path | None = None) -> Iterator[Path]:
    """The folder of a run that is begun, or of an unfinished one of the same options that is gone on with.

    It is marked unfinished until `finish`. What went wrong before the first epoch was over leaves nothing.

    Args:
        path: The folder, made if it is not there.
        asked: The options as they were asked for, as plain data.
        checkpoint: Where the state of the fit is kept, if not in the folder.
    Raises:
        ValueError: There is something else, or a run of other options, or a process that writes it; or nothing can be
            written there.
    """
    asked = json.loads(json.dumps(_finite(asked or {})))
    check_place(path, asked)
    made = [folder for folder in (path.parent, *path.parent.parents) if not folder.exists()]
    begun = not path.exists()
    try:
        try:
            if begun:
                path.mkdir(parents=True)
            (path / FIGURES).mkdir(exist_ok=True)
        except OSError as error:
            begun = begun and not isinstance(error, FileExistsError)
            raise ValueError(f"got --out {path}, wanted a place to write to: {reason_of(error)}.") from error
        if begun:
            state = None if checkpoint is None else str(checkpoint.absolute())
            write_json(path / UNFINISHED, {"asked": asked, "checkpoint": state})
        with _alone(path):
            yield path
    except BaseException:
        if begun and not (path / WEIGHTS).exists():
            shutil.rmtree(path, ignore_errors=True)
            for folder in made:
                with contextlib.suppress(OSError):
                    folder.rmdir()
        raise


def finish(path: Path) -> None:
    """Take what makes a run an unfinished one out of its folder."""
    from pyro_vae.inference import checkpoints

    checkpoints.remove(path / CHECKPOINT)
    (path / EVALUATED).unlink(missing_ok=True)
    for half in path.rglob(".partial-*"):  # of processes that were killed while they wrote
        half.unlink(missing_ok=True)
    (path / UNFINISHED).unlink(missing_ok=True)


def is_unfinished(path: Path) -> bool:
    """Whether there is a run that the same command goes on with."""
    return (path / UNFINISHED).is_file()


def asked_of(path: Path) -> tuple[dict[str, Any], str | None]:
    """The options that an unfinished run was begun with, by field name, and where its state is, if not in the folder.

    Raises:
        ValueError: A finished run, or no run.
    """
    if not is_unfinished(path):
        said = "which is finished" if (path / SUMMARY).is_file() else "which is no run folder"
        raise ValueError(
            f"got --resume {path}, {said}, wanted an unfinished run. More epochs of a finished one are --from {path}."
        )
    began = _read_object(path / UNFINISHED)
    asked, checkpoint = began.get("asked"), began.get("checkpoint")
    if not isinstance(asked, dict):
        raise ValueError(f"{path / UNFINISHED} is damaged: it has no options. Type the command that began the run.")
    where = str(path / UNFINISHED)
    options = {field_of(name): convert(name, value, f"{where}: {name}") for name, value in asked.items()}
    return options, checkpoint if isinstance(checkpoint, str) else None


def check_place(path: Path, asked: Mapping[str, Any]) -> None:
    """Raise a ValueError where a run of these options can be neither begun nor gone on with."""
    if not os.path.lexists(path):
        return
    if not is_unfinished(path):
        look = ""
        if (path / SUMMARY).is_file():
            look = f" It is a finished run: open {path / REPORT}, or try 'pyro-vae evaluate {path}'."
        raise ValueError(f"got --out {path}, which exists, wanted a new folder.{look} Name another one, or remove it.")
    differing = _differing(path, asked)
    if differing:
        words = [f"--{name.replace('_', '-')} {now} (there: {then})" for name, (then, now) in differing.items()]
        raise ValueError(
            f"got --out {path}, an unfinished run of other options: {', '.join(words)}. Give it the options that it "
            "was begun with to go on, name another folder, or remove it."
        )


def _differing(path: Path, asked: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """What an unfinished run was asked for and what is asked for now, where they differ."""
    then = _read_object(path / UNFINISHED).get("asked", {})
    now = json.loads(json.dumps(_finite(asked)))
    return {key: (then.get(key), now.get(key)) for key in {**now, **then} if then.get(key) != now.get(key)}


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Hold the lock of a run folder, which goes with the process that holds it."""
    with (path / UNFINISHED).open("rb") as file:
        if not locked(file):
            raise ValueError(f"got --out {path}, which another process is writing. Wait, or name another folder.")
        yield


def locked(file: Any) -> bool:
    """Whether the lock of a file is ours from now on; always where the system has no locks."""
    try:
        import fcntl
    except ImportError:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return True


def default_path(data: str, asked: Mapping[str, Any]) -> Path:
    """runs/<data>-<n>: the latest unfinished run of these options that no process is writing, or else a free name."""
    stem = Path(data).stem or "data"
    going_on = None
    for n in range(1, 10**6):
        path = Path("runs", f"{stem}-{n}")
        if not os.path.lexists(path):
            return going_on or path
        with contextlib.suppress(ValueError, OSError):
            if is_unfinished(path) and not _differing(path, asked):
                with _alone(path):
                    going_on = path
    raise ValueError(f"got a million runs named {stem}-<n> in runs, wanted a free name. Give one by --out.")


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write plain data as JSON, atomically; numbers that are not finite become null."""
    text = json.dumps(_finite(values), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_file(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def write_lines(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Write one line of JSON for each record, atomically."""
    text = "".join(json.dumps(_finite(record), allow_nan=False) + "\n" for record in records)
    write_file(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def _read_object(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not readable JSON ({error}), wanted what 'pyro-vae fit' wrote.") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}, wanted the object that 'pyro-vae fit' wrote.")
    return values


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
