"""`pyro-vae runs`: the runs that lie in some folders, with their numbers, from their JSON alone, without torch."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from pyro_vae.app import following
from pyro_vae.app.configuration import convert
from pyro_vae.app.defaults import DATASETS, OTHER, field_of, in_words, option
from pyro_vae.app.runs import CONFIG, METRICS, SUMMARY, UNFINISHED, WEIGHTS, Run, is_unfinished
from pyro_vae.app.starting import shown

# What a run can be sorted by, and whether the largest comes first.
ORDERS = {"time": True, "log-p": True, "elbo": True, "name": False, "data": False, "epochs": True, "seconds": True}
# Options that stand in columns of their own, or say how a run was computed, not what it is.
_NOT_TOLD = ("data", "data_dir", "epochs", "device", "threads", "compile", "from_run", "evaluation_samples",
             "evaluation_images", "full")  # fmt: skip
_SETTLED = ("likelihood", "binarization", "dequantize", "standardize")  # by the data, for every run on them
_OWN = "--"


def list_runs(
    folders: Sequence[Path] = (), sort: str = "time", as_json: bool = False, only: str | None = None
) -> list[dict[str, Any]]:
    """The command; prints and returns one record for each run in some folders, at any depth, or in `runs`.

    Of the data of one name `only`; sorted by one of `ORDERS`, what has no such number last.

    Raises:
        ValueError: A folder that is not there.
    """
    where = [Path(folder).expanduser() for folder in folders] or [Path("runs")]
    for folder in where:
        if not folder.is_dir():
            hint = "" if folders else " Start with 'pyro-vae fit', or name the folder that your runs lie in."
            raise ValueError(f"got {folder}, wanted a folder with runs in it.{hint}")
    paths = {path.resolve(): path for folder in where for path in _found(folder)}
    records = [_record(path) for path in paths.values()]
    if only is not None:
        records = [record for record in records if record["data"] == only]
    records = _sorted(records, sort)
    if as_json:
        click.echo(json.dumps(records, indent=2, ensure_ascii=False))
        return records
    if not records:
        click.echo(f"no runs in {', '.join(map(str, where))}", err=True)
        following.say("pyro-vae fit")
        return records
    _show(records, sort)
    following.say(following.after_listing(records))
    return records


def _found(folder: Path) -> Iterable[Path]:
    """Run folders in a folder, at any depth, itself included; hidden ones and what lies in a run are passed over."""
    for path, inner, files in os.walk(folder):
        inner[:] = sorted(name for name in inner if not name.startswith("."))
        if CONFIG in files or SUMMARY in files or UNFINISHED in files or WEIGHTS in files:
            inner.clear()
            yield Path(path)


def _record(path: Path) -> dict[str, Any]:
    """What is known of a run: a damaged one has its reason, and what else could be read."""
    record: dict[str, Any] = {
        "run": str(path), "state": "finished", "why": None, "data": None, "options": {}, "from": None, "epochs": None,
        "of": None, "log_p": None, "log_p_stderr": None, "log_p_is": None, "elbo": None, "elbo_stderr": None,
        "reconstruction": None, "seconds": None, "time": _time(path),
    }  # fmt: skip
    try:
        if is_unfinished(path) and not (path / WEIGHTS).is_file():  # its first epoch is not over
            asked = json.loads((path / UNFINISHED).read_text(encoding="utf-8")).get("asked", {})
            return record | {"state": "unfinished", "epochs": 0} | _options(asked)
        run = Run.load(path)
        record |= _options(run.config)
        record |= _numbers(run.summary)
        if is_unfinished(path):
            epochs = len((path / METRICS).read_bytes().splitlines()) if (path / METRICS).is_file() else 0
            record |= {"state": "unfinished", "epochs": epochs}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        record |= {"state": "damaged", "why": " ".join(str(error).split()) or type(error).__name__}
    return record


def _options(config: Mapping[str, Any]) -> dict[str, Any]:
    for name in ("data", "epochs"):
        if config.get(name) is None:
            raise ValueError(f"{CONFIG} has no {name}")
    options = {field_of(name): convert(name, value, f"{CONFIG}: {name}") for name, value in config.items()}
    origin = options.get("from_run")
    return {
        "data": options["data"], "of": options["epochs"], "options": _told(options),
        "from": None if origin is None else shown(origin),
    }  # fmt: skip


def _told(options: Mapping[str, Any]) -> dict[str, str]:
    """What tells a run from the others of its data: options that are not the defaults, as they are typed.

    `resolve` would bring torch with the parts that it looks at: the table of the dataset is enough to compare with.
    """
    usual = vars(DATASETS.get(options["data"], OTHER))
    found = {}
    for name, value in options.items():
        settled = name in _SETTLED and usual[name] is None or name == "likelihood_options" and "levels" in value
        if name not in _NOT_TOLD and not settled and value != usual[name]:
            found[option(name)[2:]] = in_words(value)
    return found


def _numbers(summary: Mapping[str, Any]) -> dict[str, Any]:
    seconds = [summary.get(name) for name in ("train_seconds", "evaluation_seconds")]
    known = [float(value) for value in seconds if value is not None]
    return {
        "epochs": summary.get("epochs"), "log_p": summary.get("test_log_likelihood"),
        "log_p_stderr": summary.get("test_log_likelihood_stderr"), "log_p_is": summary.get("log_likelihood_is"),
        "elbo": summary.get("test_elbo"), "elbo_stderr": summary.get("test_elbo_stderr"),
        "reconstruction": summary.get("test_reconstruction"), "seconds": sum(known) if known else None,
    }  # fmt: skip


def _time(path: Path) -> float | None:
    times = [file.stat().st_mtime for name in (SUMMARY, METRICS, CONFIG, UNFINISHED) if (file := path / name).is_file()]
    return max(times, default=None)


def _sorted(records: list[dict[str, Any]], sort: str) -> list[dict[str, Any]]:
    key = {"log-p": "log_p", "name": "run"}.get(sort, sort)
    records = sorted(records, key=lambda record: record["run"])
    known = [record for record in records if record[key] is not None]
    known.sort(key=lambda record: record[key], reverse=ORDERS[sort])
    return known + [record for record in records if record[key] is None]


def _show(records: Sequence[Mapping[str, Any]], sort: str) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False, width=None if sys.stdout.isatty() else 80)
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold")
    for name, ratio in (("run", 3), ("data", 2), ("what differs", 4)):
        table.add_column(name, overflow="fold", ratio=ratio)
    for name in ("epochs", "log p(x)", "ELBO", "time"):
        table.add_column(name, justify="right", no_wrap=True)
    for record in records:
        notes = [f"{name} {value}" for name, value in record["options"].items()]
        notes += [f"from {record['from']}"] if record["from"] else []
        if record["state"] == "unfinished":
            notes.insert(0, "unfinished")
        if record["elbo"] is None and record["reconstruction"] is not None:
            notes.insert(0, f"reconstruction {record['reconstruction']:.2f}")
        if record["state"] == "damaged":
            why = record["why"].removeprefix(f"{record['run']} ").partition(", wanted")[0]
            notes = [f"damaged: {why.replace(record['run'] + os.sep, '')}"]
        data = record["data"]
        name = _OWN if data is None else Path(data).name if os.sep in data else data
        table.add_row(
            Text(shown(record["run"])), Text(name), Text(", ".join(notes) or "the defaults"),
            _epochs(record), _log_p(record), _value(record["elbo"]), _seconds(record["seconds"]),
        )  # fmt: skip
    console.print(table)
    order = "the latest first" if sort == "time" else f"the largest {sort} first" if ORDERS[sort] else f"by {sort}"
    text = f"{len(records)} run{'s' if len(records) > 1 else ''}, {order}"
    if len({record["data"] for record in records if record["data"]}) > 1:
        text += "; numbers on different data, or of different protocols, do not compare"
    console.print(text, soft_wrap=True)


def _epochs(record: Mapping[str, Any]) -> str:
    done, of = record["epochs"], record["of"]
    if done is None:
        return _OWN
    return f"{done}/{of}" if of is not None and done != of else str(done)


def _log_p(record: Mapping[str, Any]) -> str:
    value, error = record["log_p"], record["log_p_stderr"]
    if value is None:
        return _OWN
    if record["log_p_is"] == "lower bound":
        return f">= {value:.1f}"
    return f"{value:.2f}" + (f" ± {_error(error)}" if error is not None and math.isfinite(error) else "")


def _error(value: float) -> str:
    return f"{value:.2f}" if value >= 0.01 or value == 0 else f"{value:.1g}"


def _value(value: float | None) -> str:
    return _OWN if value is None else f"{value:.2f}"


def _seconds(value: float | None) -> str:
    if value is None:
        return _OWN
    return f"{value:.0f} s" if value < 600 else f"{value / 60:.0f} min" if value < 36000 else f"{value / 3600:.1f} h"
