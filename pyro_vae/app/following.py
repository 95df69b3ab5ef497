"""What to type next: the one line at the end of every command, and the commands at the foot of a run's page.

It goes to stderr, so that what a program reads of a command is what it was asked for, and is left out by --quiet and
--json.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from pyro_vae.app.configuration import convert, read_config
from pyro_vae.app.defaults import option, resolve
from pyro_vae.app.runs import CONFIG, SUMMARY, is_unfinished


def say(command: str) -> None:
    """Print the line."""
    click.echo(f"next: {command}", err=True)


def next_commands(run: Path, summary: Mapping[str, Any]) -> list[str]:
    """Three commands that go on from a run, the most sensible one first."""
    if "test_elbo" not in summary:  # a plain autoencoder, or a run that is not evaluated yet
        names = ("sample", "anomalies", "draw") if "test_reconstruction" in summary else ("draw", "sample", "anomalies")
        return [typed(name, run) for name in names]
    return [typed("judge", run), typed("sample", run, "-n 100"), typed("evaluate", run, "--full")]


def after(command: str, run: Path, summary: Mapping[str, Any]) -> str:
    """What to type after a command on a run, of which the path is as it was typed."""
    if command in ("fit", "evaluate", "draw"):
        return next(line for line in next_commands(run, summary) if line.split()[1] != command)
    if command == "anomalies":
        return typed("encode", run, "test --out codes.csv")
    more = {"sample": "anomalies", "reconstruct": "anomalies", "encode": "export"}
    return typed(more.get(command, "explore"), run)


def after_judging(run: Path, advice: Sequence[str], more_time: float | None = None) -> str:
    """The first advice of a judgement; where it was followed, the comparison with what came of it. Where there is none
    for want of time, the same with so many seconds."""
    if not advice:
        return typed("sample", run, "-n 100") if more_time is None else typed("judge", run, f"--budget {more_time:g}")
    other = followed(run, advice)
    return advice[0] if other is None else typed("compare", run, shlex.quote(str(other)))


def after_listing(records: Sequence[Mapping[str, Any]]) -> str:
    """What to type after the records of runs: compare the two latest on the same data, or judge the latest one."""
    latest = sorted(records, key=lambda record: record["time"] or 0.0, reverse=True)
    finished = [record for record in latest if record["state"] == "finished" and record["elbo"] is not None]
    if not finished:
        rest = [record for record in latest if record["reconstruction"] is not None]
        return typed("sample", Path(rest[0]["run"])) if rest else "pyro-vae fit"
    first = Path(finished[0]["run"])
    others = [Path(record["run"]) for record in finished[1:] if _scored(record) == _scored(finished[0])]
    if others:
        return typed("compare", others[0], shlex.quote(str(first)))
    return typed("judge", first)


def _scored(record: Mapping[str, Any]) -> tuple[Any, ...]:
    """What the log p of a run is of, as far as its options say: `compare` refuses two that differ in it."""
    options = record["options"]
    shaping = ("likelihood", "binarization", "dequantize", "image-size", "crop", "channels", "split-seed")
    return (record["data"], options.get("model") == "conditional", *(options.get(name) for name in shaping))


def followed(run: Path, advice: Sequence[str]) -> Path | None:
    """The latest finished run, beside this one or in ``runs``, that has the options of an advice or goes on from it."""
    wanted = [options for line in advice if (options := _options(line)) is not None]
    found: dict[Path, float] = {}
    for folder in {run.parent.resolve(): run.parent, Path("runs").resolve(): Path("runs")}.values():
        for path in folder.glob(f"*/{CONFIG}"):
            other = path.parent
            if other.resolve() == run.resolve() or is_unfinished(other) or not (other / SUMMARY).is_file():
                continue
            try:
                config = json.loads(path.read_text(encoding="utf-8"))
            except (OSError, ValueError):  # what is damaged was not made by following anything
                continue
            if config in wanted or config.get("from") == str(run.absolute()):
                found[other] = path.stat().st_mtime
    return max(found, key=lambda path: found[path]) if found else None


def typed(name: str, run: Path, *more: str) -> str:
    """A command on a run, quoted for the shell.

    Example:
        >>> typed("sample", Path("my runs/a"), "-n 100")
        "pyro-vae sample 'my runs/a' -n 100"
    """
    return " ".join(["pyro-vae", name, shlex.quote(str(run)), *more])


def _options(line: str) -> dict[str, Any] | None:
    """The configuration that a line of `pyro-vae fit` asks for; None where it is of another command."""
    from pyro_vae.app import starting
    from pyro_vae.app.cli.fits import fit

    words = shlex.split(line)
    if words[1:2] != ["fit"]:
        return None
    try:
        given = fit.make_context("fit", words[2:]).params
        config, _ = given.pop("config"), given.pop("trust")
        values = {} if config is None else read_config(config)
        values |= {name: convert(name, value, option(name)) for name, value in given.items() if value is not None}
        values = {name: value for name, value in values.items() if name not in ("out", "quiet", "checkpoint")}
        return json.loads(json.dumps(resolve(starting.merged(values) if values.get("from_run") else values).to_json()))
    except (click.ClickException, ValueError):
        return None
