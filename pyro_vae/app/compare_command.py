"""What `pyro-vae compare` and `pyro-vae report` do."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from pyro_vae.app import following
from pyro_vae.app.backends import jobs_of
from pyro_vae.app.comparing import _arms, compare, read_study, speeds_of, study, study_of
from pyro_vae.app.plans import EVALUATION_IMAGES, plan
from pyro_vae.app.processes import is_first
from pyro_vae.app.report import about, wrapped
from pyro_vae.app.runs import REPORT, SUMMARY
from pyro_vae.app.studies import Study, refuse_strangers
from pyro_vae.app.study_page import check_table, runs_page, write_results, write_table
from pyro_vae.app.trials import rankings, reason, state, time_left
from pyro_vae.atomic import write_text
from pyro_vae.judging.rankings import Ranking
from pyro_vae.judging.results import plain


def compare_runs(
    runs: Sequence[Path], given: Mapping[str, Any], *, out: str | None, table: str | None, as_json: bool,
    trust: Sequence[str],
) -> Ranking:  # fmt: skip
    """Finished runs, on the same test data with the same noise; prints the verdict first."""
    if table is not None:
        check_table(Path(table))
    allowed = ("evaluation_samples", "evaluation_images", "full", "device")
    for name in given:
        if name not in allowed:
            raise ValueError(
                f"got --{name.replace('_', '-')} for runs that are fitted, wanted only how they are scored. To fit "
                "anew, give --vary, or a study."
            )
    full = given.get("full")
    found = compare(
        list(runs), num_samples=given.get("evaluation_samples") or (5000 if full else 1000),
        num_data=given.get("evaluation_images") or (10**9 if full else EVALUATION_IMAGES), trust=list(trust),
        device=given.get("device"), progress=False if as_json else None,
    )  # fmt: skip
    if out is not None and is_first():
        opened = {name: members[0] for name, members in _arms(list(runs), list(trust)).items()}
        write_text(Path(out) / REPORT, runs_page(found, opened, "Comparison of " + ", ".join(map(str, runs))))
        write_table(found, Path(out) / "table.csv")
    if table is not None and is_first():
        write_table(found, Path(table))
    _show({"": found}, as_json)
    if not as_json:
        if out is not None:
            click.echo(f"report {Path(out) / REPORT}")
        last = Path(found.order[-1])  # the one that is behind, if its arm is a run
        following.say(following.typed("judge", last) if (last / SUMMARY).is_file() else "pyro-vae runs")
    return found


def compare_study(
    file: Path | None, fixed: Mapping[str, Any], *, say: Callable[[str], None], vary: Sequence[str], seeds: int | None,
    frozen: str | None, freeze: bool, budget: str | None, jobs: int | None, backend: str, address: str | None,
    retry: bool, dry_run: bool, out: str | None, table: str | None, as_json: bool, trust: Sequence[str],
) -> None:  # fmt: skip
    """A study from a file or from the command line; what is there is not made again."""
    if table is not None:
        check_table(Path(table))
    if freeze and frozen is not None:
        raise ValueError(f"got --freeze and --frozen {frozen}, wanted one: a model fitted first, or that of a run.")
    if file is None:
        equal = budget or "epochs"
        number = re.fullmatch(r"(\d+\.?\d*|\.\d+) ?s?", equal)
        seconds = float(number[1]) if number else None
        if seconds is None and equal not in ("epochs", "gradients"):
            raise ValueError(f"got --budget {equal}, wanted epochs, gradients, or seconds of a fit, such as 60.")
        asked = Study.of(
            {"vary": dict(map(_axis, vary)), "fixed": fixed, "seeds": seeds or 1, "frozen": True if freeze else frozen,
             "budget": "seconds" if seconds is not None else equal, "seconds": seconds},
            "the command",
        )  # fmt: skip
    else:
        said = {"seeds": seeds, "frozen": frozen, "freeze": freeze or None, "budget": budget}
        for name, value in {**fixed, **said}.items():
            if value is not None:
                raise ValueError(f"got --{name.replace('_', '-')} and the study {file}, wanted it in the file.")
        asked = read_study(file) if file.is_dir() else study_of(file)
    refuse_strangers(asked, trust, in_file=file is not None)
    folder = (
        Path(out).expanduser() if out is not None else file if file is not None and file.is_dir() else _place(asked)
    )
    if dry_run:
        _show_plan(asked, folder, jobs)
        return
    if not as_json:
        click.echo(f"study {folder}", err=True)
    found = study(asked, folder, jobs=jobs, backend=backend, address=address, retry=retry,
                  progress=False if as_json else None, say=say, trust=trust)  # fmt: skip
    named = {"": found} if isinstance(found, Ranking) else found
    if table is not None:
        if len(named) > 1:
            raise ValueError(f"got --table for {len(named)} datasets, wanted one; the tables are in {folder}.")
        write_table(named[""], Path(table))
    _show(named, as_json)
    if not as_json:
        click.echo(f"report {folder / REPORT}, tables beside it")
        following.say(_after(asked, named, folder))


def report_study(folder: Path, trust: Sequence[str]) -> list[Path]:
    """The tables and the page of a study again, from what is there."""
    asked = read_study(folder)
    refuse_strangers(asked, trust, in_file=True)
    planned = plan(asked, folder, speeds_of(asked, folder, measure=False))
    found = rankings(planned, asked)
    if not found:
        raise ValueError(f"{folder} has no fit that is done yet. Run: pyro-vae compare {folder}")
    missing = [trial for trial in planned.trials if state(trial) not in ("done", "failed")]
    if missing:
        click.echo(f"{len(missing)} of {len(planned.trials)} fits are not there yet: as it stands now", err=True)
    paths = write_results(planned, asked, found, folder)
    for path in paths:
        click.echo(path)
    return paths


def _after(asked: Study, found: Mapping[str, Ranking], folder: Path) -> str:
    """The next command: the first fit of the arm that is ahead, judged."""
    best = next(iter(found.values())).best
    trials = plan(asked, folder, speeds_of(asked, folder, measure=False)).trials
    return following.typed("judge", next(t.folder for t in trials if t.arm == best and state(t) == "done"))


def _axis(text: str) -> tuple[str, Any]:
    """NAME=A,B,... as an axis and its values, which are read as YAML reads a list."""
    import yaml

    name, equals, values = text.partition("=")
    try:
        listed = yaml.load(f"[{values}]", yaml.BaseLoader)  # noqa: S506 - words alone: "on" is no truth value here
    except yaml.YAMLError:
        listed = None
    if not equals or not listed:
        raise ValueError(f"got --vary {text}, wanted NAME=A,B,..., such as --vary posterior=diagonal,full.")
    return name.strip(), listed


def _place(asked: Study) -> Path:
    """The folder that the same command finds again."""
    digest = hashlib.sha256(json.dumps(asked.to_json(), sort_keys=True).encode()).hexdigest()[:8]
    axes = re.sub(r"[^a-z0-9]+", "-", "-".join(asked.vary).lower()).strip("-")
    return Path("studies", f"{axes}-{digest}")


def _show_plan(asked: Study, folder: Path, jobs: int | None) -> None:
    speeds = speeds_of(asked, folder, measure=False)
    is_open = asked.budget == "seconds" and speeds is None  # how many epochs there are, and so which folders
    planned = plan(asked, folder, speeds)
    trials = ([planned.base] if planned.base is not None else []) + list(planned.trials)
    width = max(len(trial.arm) for trial in trials)
    for trial in trials:
        there = state(trial)
        more = f": {reason(trial)}" if there == "failed" else "" if is_open else f"  {trial.folder}"
        click.echo(f"{trial.arm:{width}}  seed {trial.options.seed}  {there:10}{more}")
    for note in planned.notes:
        click.echo(note)
    counts = [state(trial) for trial in trials]
    left = len(counts) - counts.count("done") - counts.count("failed")
    side = min(jobs or jobs_of(planned), max(left, 1))
    seconds = left * (asked.seconds or 0) if is_open else time_left(planned)
    click.echo(f"{len(trials)} fits: {counts.count('done')} done, {counts.count('failed')} failed, {left} to come"
               + (f", {about(seconds / side)} with {side} at a time" if left else ""))  # fmt: skip


def _show(found: Mapping[str, Ranking], as_json: bool) -> None:
    if as_json:
        told = {data: {"verdict": each.verdict, "rows": plain(each.rows(), finite=True), "notes": list(each.notes)}
                for data, each in found.items()}  # fmt: skip
        click.echo(json.dumps(told[""] if list(told) == [""] else told, indent=2))
        return
    for data, each in found.items():
        if data:
            click.echo(f"{data}:")
        if not sys.stdout.isatty():
            click.echo(str(each))
            continue
        width = shutil.get_terminal_size().columns
        click.echo("\n".join(wrapped(line, width) for line in each.text(width).splitlines()))
