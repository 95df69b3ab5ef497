"""A run folder in Python: the pair, its data as the run had them, and what is known of the fit."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyro_vae.app import evaluation, serving
from pyro_vae.app.defaults import FitOptions, option, resolve
from pyro_vae.app.reading import read
from pyro_vae.app.runs import Run, options_of
from pyro_vae.app.training import VALIDATION_IMAGES
from pyro_vae.data import Dataset, Split
from pyro_vae.inference.records import History
from pyro_vae.options import checked
from pyro_vae.programs.vae import VAE, Answers


@dataclass(frozen=True)
class Opened:
    """A run that was opened; it stands in the place of ``model, guide`` in everything that takes a pair.

    Attributes:
        path: Its folder.
        pair: The fitted pair, in evaluation mode: a `VAE`, or what --model named, a class of `pyro_vae.zoo`.
        options: The complete configuration, one field for each option of the command.
        history: What the fit did, one record per epoch.
        summary: The numbers of summary.json.
        data_dir: Where the files of a named dataset lie now; None where they were.
    """

    path: Path
    pair: Answers
    options: FitOptions
    history: History
    summary: dict[str, Any]
    data_dir: str | None = None

    @property
    def vae(self) -> VAE:
        """The pair of a run of --model vae; a ValueError for a run of another model."""
        if not isinstance(self.pair, VAE):
            raise ValueError(f"{self.path} is a {self.options.model} model and no plain VAE: its pair is run.pair.")
        return self.pair

    @functools.cached_property
    def model(self) -> Any:
        """p(z) p(x | z), as everything that judges takes it: of a mixture with its clusters summed out."""
        return serving.face(self.pair).programs(self.pair)[0]

    @property
    def guide(self) -> Any:
        """q(z | x)."""
        return self.pair.guide

    def arguments(self, split: Split) -> Any:
        """What the programs take of some data, and so what `judge` and all others do: the data as they are, but for a
        conditional model, which is given data and labels. ``pv.judge(run, run.arguments(run.data.test))`` is right for
        whatever model.
        """
        return serving.face(self.pair).given(split)

    def read(self) -> Dataset:
        """The data as they lie there, whole: nothing of them is chosen or drawn. A ValueError where they are gone, or
        of another shape.
        """
        _, found = read(resolve(vars(self.options) | ({} if self.data_dir is None else {"data_dir": self.data_dir})))
        shape = None if self.pair.architecture is None else self.pair.architecture.x_shape
        if found.x_shape != shape:
            raise ValueError(
                f"{self.options.data} now has data of shape {found.x_shape}, but {self.path} was fitted to {shape}. "
                "Give the data that it was fitted to: pv.open(path, data_dir=...)."
            )
        return found

    @functools.cached_property
    def data(self) -> Dataset:
        """The data, read when they are first asked for: to train on as the run drew them, afresh in each batch; to
        validate and to test on the run's own images and draws, so that its numbers come out again. A ValueError as of
        `read`.
        """
        found = self.read()
        seed = self.options.seed
        return dataclasses.replace(
            found,
            validation=found.validation.subset(slice(0, VALIDATION_IMAGES)).frozen(seed),
            test=evaluation.test_data(found, seed, self.options.evaluation_images),
        )

    def __repr__(self) -> str:
        given, usual = self.options.to_json(), resolve({"data": self.options.data}).to_json()
        differ = [f"{option(name)} {value}" for name, value in given.items() if value != usual.get(name)]
        numbers = [
            f"{words} {self.summary[name]:.2f}{_error(self.summary.get(f'{name}_stderr'))}"
            for name, words in (("test_elbo", "ELBO"), ("test_log_likelihood", "log p(x)"),
                                ("test_reconstruction", "reconstruction"))
            if self.summary.get(name) is not None
        ]  # fmt: skip
        model, held = ("", ".vae") if self.options.model == "vae" else (f"{self.options.model}, ", ".pair")
        early = " (stopped early)" if self.history.stopped_early else ""
        ended = " (interrupted)" if self.history.interrupted else early
        lines = [
            f"{self.path}: a run on {self.options.data}, {len(self.history)} epochs{ended}",
            f"  pair     {model}{self.options.network} {'-'.join(map(str, self.options.hidden))}, "
            f"{self.options.latent_dim} latents, q {self.options.posterior}, p(z) {self.options.prior}, "
            f"p(x|z) {self.options.likelihood}, "
            f"{sum(p.numel() for p in self.pair.parameters()):,} parameters",
            f"  test     {', '.join(numbers) or 'not evaluated'}",
            f"  options  {' '.join(differ) or 'the defaults'}",
            f"  has      {held} .model .guide .data .options .history .summary",
        ]
        return "\n".join(lines)


def _error(stderr: Any) -> str:
    return f" ± {stderr:.2f}" if isinstance(stderr, float) else ""


@checked
def open(  # noqa: A001 - as pv.open
    path: str | os.PathLike[str], *, trust: bool | Sequence[str] = False, data_dir: str | os.PathLike[str] | None = None
) -> Opened:
    """Open a run folder that ``pyro-vae fit`` wrote: reads JSON and tensors, and runs no code but this package's.

    Args:
        path: The folder.
        trust: Whether parts of your own that the run was fitted with are imported, which runs their code: True for all
            that it names, or ``module:Class`` of those that are. As --trust of the command.
        data_dir: Where the files of a named dataset lie now; None where they were.
    Returns:
        The run: ``pair``, which is ``vae`` too where it is one (``model``, ``guide``), ``data`` (``train``,
        ``validation``, ``test``), ``options``, ``history``, ``summary``. It may be given wherever a pair is:
        ``pv.judge(run, run.data.test)``.
    Raises:
        ValueError: No run folder, a file missing or damaged, or parts that are not trusted.
    Example:
        >>> open("runs/none")
        Traceback (most recent call last):
        ...
        ValueError: got runs/none, wanted a run folder, as 'pyro-vae fit --out runs/none' writes one.
    """
    run = Run.load(Path(path).expanduser())
    if isinstance(trust, bool):
        named = [run.config.get(name) for name in ("posterior", "prior", "likelihood")]
        trusted: Sequence[str] = [name for name in named if isinstance(name, str)] if trust else ()
    else:
        trusted = [trust] if isinstance(trust, str) else trust
    pair = run.pair(trusted)
    told, known = run.summary, run.metrics()
    history = History(known, told.get("best_epoch"), bool(told.get("stopped_early")), bool(told.get("interrupted")))
    return Opened(run.path, pair, options_of(run), history, run.summary, None if data_dir is None else str(data_dir))
