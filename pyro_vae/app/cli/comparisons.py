"""The commands that compare: compare and report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from pyro_vae.app import configuration
from pyro_vae.app.cli.group import PATH, PROGRAM, TRUST, commands, done_by, say
from pyro_vae.app.configuration import GroupedCommand, convert
from pyro_vae.app.defaults import option


@commands.command(cls=GroupedCommand)
@click.argument("runs", nargs=-1, type=PATH, metavar="[RUN RUN...|STUDY]")
@configuration.COMPARE
def compare(runs: tuple[Path, ...], **given: Any) -> None:
    """Say who is ahead, by how much, and whether that holds.

    Of finished runs at once, on the same test data with the same noise; or of a study: arms that differ in options of
    fit, times seeds, from --vary or a YAML file. A study that was broken off is gone on with by the same command.

    \b
    Examples:
      pyro-vae compare runs/a runs/b
      pyro-vae compare --vary posterior=diagonal,full,iaf --seeds 2
      pyro-vae compare --vary posterior=full,iaf --vary bound=elbo,iwae
      pyro-vae compare --vary posterior=diagonal,full,iaf --frozen runs/mnist
      pyro-vae compare study.yaml --jobs 4
    """
    from pyro_vae.app.processes import together

    with together():
        _compare(runs, given)


def _compare(runs: tuple[Path, ...], given: dict[str, Any]) -> None:
    from pyro_vae.app.compare_command import compare_runs, compare_study
    from pyro_vae.app.processes import number

    asked = {name: given.pop(name) for name in list(given) if name in OPTIONS_OF_COMPARE}
    fixed = {name: convert(name, value, option(name)) for name, value in given.items() if value is not None}
    files = [path for path in runs if path.is_file() or (path / "study.json").is_file()]
    if files or asked["vary"]:
        if files and (len(runs) > 1 or asked["vary"]):
            raise ValueError(f"got {' '.join(map(str, runs))} with other runs or --vary, wanted a study alone.")
        if runs and not files:
            raise ValueError(f"got --vary and the runs {' '.join(map(str, runs))}, wanted one of them.")
        if number() > 1:
            raise ValueError(
                f"got a study in {number()} processes, which deals its fits out by itself. Run {PROGRAM} compare by "
                "itself, with --jobs N, or --backend slurm on several machines."
            )
        compare_study(files[0] if files else None, fixed, say=say(asked["as_json"]), **asked)
        return
    gone = [path for path in runs if not path.exists()]
    if gone:
        raise ValueError(
            f"got {gone[0]}, which is not there, wanted run folders, or a study: a YAML file or its folder."
        )
    if len(runs) < 2:
        raise ValueError(f"got {len(runs)} runs, wanted at least two, a study file, or --vary NAME=A,B,...")
    for name in ("seeds", "frozen", "freeze", "budget", "jobs", "address", "retry", "dry_run"):
        if asked[name]:
            raise ValueError(f"got {option(name)} for runs that are fitted, which is for studies. Leave it out.")
    compare_runs(runs, fixed, **{name: asked[name] for name in ("out", "table", "as_json", "trust")})


OPTIONS_OF_COMPARE = ("vary", "seeds", "frozen", "freeze", "budget", "jobs", "backend", "address", "retry", "dry_run",
                      "out", "table", "as_json", "trust")  # fmt: skip


@commands.command("report", short_help="Write a study's tables and page again.")
@click.argument("folder", type=PATH, metavar="STUDY")
@TRUST
@done_by("compare_command:report_study")
def report_command() -> None:
    """Write the tables and the page of a study again, of an unfinished one as it stands."""
