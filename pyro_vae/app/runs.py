"""Run folders: what a fit leaves on disk, written whole or not at all.

    config.json           the complete configuration; give it back by --config
    summary.json          the numbers, with their errors and protocol
    metrics.jsonl         one line per epoch
    weights.safetensors   the weights, and the architecture that they fit
    figures/*.png

A run is written into a hidden folder beside its place and renamed at the end, so that
a folder that is there is complete. Loading one reads JSON and tensors, never code.
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

from pyro_vae.atomic import reason_of, write_file

if TYPE_CHECKING:
    from pyro_vae.programs.vae import VAE

CONFIG, SUMMARY, METRICS, WEIGHTS, FIGURES = (
    "config.json", "summary.json", "metrics.jsonl", "weights.safetensors", "figures",
)  # fmt: skip


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
        for name in (CONFIG, SUMMARY, WEIGHTS):
            if not (path / name).is_file():
                raise ValueError(f"{path} has no {name}, wanted a run folder, as 'pyro-vae fit' writes one.")
        return cls(path, _read_object(path / CONFIG), _read_object(path / SUMMARY))

    def vae(self, trust: Sequence[str] = ()) -> VAE:
        """The fitted pair; parts of the user's own are imported only where `trust` names them, ``module:Class``.

        Raises:
            ValueError: The weights are corrupt, not those of their architecture, or of parts that are not trusted.
        """
        from pyro_vae.programs.vae import VAE

        path = self.path / WEIGHTS
        try:
            vae = VAE.load(path, trust=trust)
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


BUILT = (
    "latent_dim", "network", "hidden", "activation", "posterior", "posterior_options", "prior", "prior_options",
    "likelihood", "likelihood_options", "scale", "standardize",
)  # fmt: skip


@contextlib.contextmanager
def new_run(path: Path) -> Iterator[Path]:
    """A folder to write a run into, which gets the name `path` only when all is written.

    Raises:
        ValueError: There is something already, or nothing can be written there.
    """
    refuse_existing(path)
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    made = [folder for folder in (path.parent, *path.parent.parents) if not folder.exists()]
    try:
        try:
            (partial / FIGURES).mkdir(parents=True)
        except OSError as error:
            raise ValueError(f"got --out {path}, wanted a place to write to: {reason_of(error)}.") from error
        yield partial
        refuse_existing(path)
        partial.rename(path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        for folder in made:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise


def refuse_existing(path: Path) -> None:
    """Raise a ValueError where there is something already."""
    if os.path.lexists(path):
        raise ValueError(f"got --out {path}, which exists, wanted a new folder. Name another one, or remove it.")


def free_path(data: str) -> Path:
    """runs/<data>-<n> with the first n that nobody uses."""
    stem = Path(data).stem or "data"
    for n in range(1, 10**6):
        path = Path("runs", f"{stem}-{n}")
        if not os.path.lexists(path) and not list(path.parent.glob(f".{path.name}.partial-*")):
            return path
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
