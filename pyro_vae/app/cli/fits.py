"""The commands that fit: fit and combinations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from pyro_vae.app import configuration
from pyro_vae.app.cli.group import JSON, PROGRAM, commands, say
from pyro_vae.app.configuration import GroupedCommand, convert, read_config
from pyro_vae.app.defaults import CHOICES, option, resolve
from pyro_vae.parts import names
from pyro_vae.words import did_you_mean, spelled


@commands.command(
    cls=GroupedCommand,
    short_help="Fit a VAE, judge it on test data, write a run folder.",
    epilog=configuration.epilog(),
)
@configuration.FIT
def fit(config: Path | None, resume: Path | None, trust: tuple[str, ...], **given: Any) -> int:
    """Fit a VAE to images, judge it on test data, and write a run folder.

    The folder holds config.json, summary.json, metrics.jsonl, weights.safetensors,
    figures and report.html. First pictures appear after the first epoch. Ctrl-C keeps
    what was trained so far, and the same command goes on in the same folder, as
    --resume RUN does after whatever ended it.

    \b
    Examples:
      pyro-vae fit
      pyro-vae fit --data mnist --data-dir ~/mnist --out runs/mnist
      pyro-vae fit --data photos/ --image-size 32 --latent-dim 64
      pyro-vae fit --model semi-supervised --model-options num_labelled=100
      pyro-vae fit --config runs/mnist --seed 1
      pyro-vae fit --from runs/mnist --epochs 50
      pyro-vae fit --resume runs/mnist-2
      torchrun --nproc-per-node 2 -m pyro_vae fit --data mnist --data-dir ~/mnist
    """
    from pyro_vae.app import processes

    with processes.group():
        return _fit(config, resume, trust, given)


def _fit(config: Path | None, resume: Path | None, trust: tuple[str, ...], given: dict[str, Any]) -> int:
    from pyro_vae.app import following, starting
    from pyro_vae.app.processes import of_first
    from pyro_vae.app.runs import asked_of, check_place, default_path, is_unfinished

    options_given = {name: convert(name, value, option(name)) for name, value in given.items() if value is not None}
    values = (read_config(config) if config is not None else {}) | options_given
    out, quiet = values.pop("out", None), values.pop("quiet", False)
    checkpoint = values.pop("checkpoint", None)
    if resume is not None:
        other = [*values, *(["out"] if out is not None else []), *(["config"] if config is not None else [])]
        if other:
            raise ValueError(
                f"got --resume {resume} with {option(other[0])}, wanted no other option: a run goes on with those that "
                "it was begun with. Begin another one with --out, or go on from a finished one with --from."
            )
        values, began = asked_of(resume.expanduser())
        out, checkpoint = resume, began if checkpoint is None else checkpoint
    options = resolve(starting.merged(values) if values.get("from_run") and resume is None else values)
    asked = options.to_json()

    def place() -> Path:
        found = Path(out).expanduser() if out is not None else default_path(options.data, asked)
        check_place(found, asked)
        return found

    path = of_first(place)
    here = path is not None  # in the process that has the folder
    quiet, path = quiet or not here, path or Path(out or "runs")
    if here and is_unfinished(path) and not quiet:
        click.echo(f"going on with {path} (--out another folder to start afresh)", err=True)

    from pyro_vae.app.fitting import fit_run
    from pyro_vae.app.report import lines, show_lines
    from pyro_vae.app.run_page import files

    saved = None if checkpoint is None else Path(checkpoint).expanduser()
    summary = fit_run(options, path, checkpoint=saved, progress=False if quiet else None, say=say(quiet), trust=trust)
    if not quiet:
        show_lines([*lines(summary, path), *files(path, summary)])
    if summary["interrupted"]:
        if here:
            click.echo(
                f"{PROGRAM}: interrupted: what was trained so far is in {path}, and the same command goes on with it, "
                f"as '{PROGRAM} fit --resume {path}' does",
                err=True,
            )
        return 130
    if not quiet:
        following.say(following.after("fit", path, summary))
    return 0


@commands.command(short_help="Try every posterior with every bound and estimator.")
@click.option("--posterior", "posteriors", metavar="NAME", multiple=True, help="Only these. [default: all]")
@click.option("--bound", "bounds", metavar="NAME", multiple=True, help="Only these. [default: all]")
@click.option("--estimator", "estimators", metavar="NAME", multiple=True, help="Only these. [default: all]")
@JSON
def combinations(
    posteriors: tuple[str, ...], bounds: tuple[str, ...], estimators: tuple[str, ...], as_json: bool
) -> int:
    """Try every posterior with every bound and gradient estimator: what trains, what is refused, and why."""
    import json

    from pyro_vae.app import losses

    bounds = tuple(_choice("bound", name) for name in bounds)
    estimators = tuple(_choice("estimator", name) for name in estimators)
    posteriors = tuple(names.check("posterior", name) for name in posteriors)
    outcomes = losses.combinations(posteriors or None, bounds or None, estimators or None)
    click.echo(json.dumps([outcome._asdict() for outcome in outcomes], indent=2) if as_json else losses.table(outcomes))
    return 1 if any(outcome.result == "fails" for outcome in outcomes) else 0


def _choice(kind: str, name: str) -> str:
    found = spelled(name, CHOICES[kind])
    if found is None:
        hint = did_you_mean(name, CHOICES[kind])
        raise ValueError(f"got --{kind} {name!r}, wanted one of {', '.join(CHOICES[kind])}.{hint}")
    return found
