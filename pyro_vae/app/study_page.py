"""What comes of a study on one page that needs nothing else, and its table as files."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Iterator, Mapping
from html import escape
from pathlib import Path
from typing import Any

from pyro_vae import plots
from pyro_vae.app import evaluation, serving
from pyro_vae.app.defaults import changed
from pyro_vae.app.html import Picture, document, figures
from pyro_vae.app.opening import Opened
from pyro_vae.app.opening import open as open_run
from pyro_vae.app.plans import Plan, Trial
from pyro_vae.app.runs import REPORT, Run
from pyro_vae.app.studies import Study
from pyro_vae.app.trials import own_parts, reason, state
from pyro_vae.atomic import write_file, write_text
from pyro_vae.judging.rankings import Ranking
from pyro_vae.judging.weights import khat_limit
from pyro_vae.randomness import noise

SHOWN = 10  # images of an arm
_TABLES = ("csv", "tex", "md", "parquet")


def write_results(plan: Plan, study: Study, found: Mapping[str, Ranking], folder: Path) -> list[Path]:
    """Write the tables and the page of a study; where they are."""
    paths = []
    stems = [Path(data).stem for data in found]
    for number, (data, ranking) in enumerate(found.items(), 1):
        stem = "table" if len(found) == 1 else f"table-{Path(data).stem}"
        if stems.count(Path(data).stem) > 1:
            stem += f"-{number}"
        paths += [write_table(ranking, folder / f"{stem}.{kind}") for kind in ("csv", "md", "tex")]
    write_text(folder / REPORT, page(plan, study, found, folder))
    return [*paths, folder / REPORT]


def write_table(ranking: Ranking, path: Path) -> Path:
    """Write the table of a ranking as the ending of the file says: .csv, .tex, .md or .parquet; a ValueError else."""
    if (kind := check_table(path)) == "parquet":
        try:
            write_file(path, lambda partial: ranking.to_frame().to_parquet(partial))
        except ImportError as error:
            raise ValueError(f"got {path}, which needs pyarrow. Run: pip install pyarrow, or take .csv.") from error
        return path
    texts = {"csv": lambda: ranking.to_frame().to_csv(index=False), "tex": lambda: ranking.to_latex() + "\n",
             "md": lambda: ranking.to_markdown() + "\n"}  # fmt: skip
    write_text(path, texts[kind]())
    return path


def check_table(path: Path) -> str:
    """The kind of table that the ending of a file names; a ValueError where there is none of that kind."""
    kind = path.suffix.removeprefix(".").lower()
    if kind not in _TABLES:
        raise ValueError(f"got {path}, wanted a file that ends in .{', .'.join(_TABLES)}.")
    return kind


def page(plan: Plan, study: Study, found: Mapping[str, Ranking], folder: Path) -> str:
    """The page: verdict, ranking, pictures, configuration, and the command for each fit."""
    body = []
    for data, ranking in found.items():
        heading = f" of {Path(data).name or data}" if len(found) > 1 else ""
        body.append(f"<h2>Verdict{escape(heading)}</h2><p class='verdict'>{escape(ranking.verdict)}</p>")
        body.append(f"<h2>Ranking{escape(heading)}</h2>{ranking_table(ranking)}{_notes(ranking)}")
    body.append("<h2>Pictures</h2>")
    for data, ranking in found.items():
        trials = [trial for trial in plan.trials if trial.arm in ranking.arms and trial.options.data == data]
        body.append(figures(pictures(ranking, trials)))
    if len(found) >= 5:
        body.append(figures(_over_datasets(found, study.methods())))
    body.append(f"<h2>Configuration</h2><pre>{escape(json.dumps(study.to_json(), indent=2))}</pre>")
    body.append(f"<h2>Fits</h2>{_fits(plan)}")
    body.append(f"<h2>The same again</h2><pre>pyro-vae compare {escape(shlex.quote(str(folder / 'study.json')))} --out "
                f"{escape(shlex.quote(str(folder)))}</pre>")  # fmt: skip
    return document(f"Study {folder}", "".join(body))


def runs_page(ranking: Ranking, runs: Mapping[str, Any], title: str) -> str:
    """The page of a comparison of finished runs, opened, by the name of their arm."""
    judged = {name: f"pyro-vae judge {shlex.quote(str(run.path))}" for name, run in runs.items()}
    commands = "".join(f"<li><b>{escape(n)}</b> <code>{escape(command)}</code></li>" for n, command in judged.items())
    parts = [
        f"<h2>Verdict</h2><p class='verdict'>{escape(ranking.verdict)}</p>",
        f"<h2>Ranking</h2>{ranking_table(ranking)}{_notes(ranking)}<h2>Pictures</h2>",
        figures(_pictures_of(ranking, runs)), f"<h2>Next</h2><ul>{commands}</ul>",
    ]  # fmt: skip
    return document(title, "".join(parts))


def ranking_table(ranking: Ranking) -> str:
    """The rows of a ranking as HTML."""
    head, body = ranking._cells()
    numbers = "".join(f'<th class="number">{escape(cell)}</th>' for cell in head[1:])
    lines = [f"<th>{escape(head[0])}</th>{numbers}<th>flags</th>"]
    for line, flag in zip(body, [str(row["flags"]) for row in ranking.rows()], strict=True):
        cells = "".join(f'<td class="{"" if i == 0 else "number"}">{escape(cell)}</td>' for i, cell in enumerate(line))
        lines.append(f"{cells}<td>{escape(flag)}</td>")
    rows = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="wide"><table>{rows}</table></div>'


def pictures(ranking: Ranking, trials: list[Trial]) -> Iterator[Picture]:
    """What there is to see of a study's fits of one dataset."""
    first = {trial.arm: trial for trial in reversed(trials) if state(trial) == "done"}
    runs = {arm: _opened(first[arm]) for arm in ranking.order if arm in first}
    yield from _numbers(ranking)
    records: dict[str, list[Any]] = {arm: [] for arm in runs}
    for trial in trials:
        if state(trial) == "done":
            records[trial.arm].append(Run.load(trial.folder).metrics())
    yield Picture("curves", plots.curves_by_time(dict(list(records.items())[:5])),
                  "The bound by seconds, each seed a line, of the best five.")  # fmt: skip
    yield from _images(runs)


def _pictures_of(ranking: Ranking, runs: Mapping[str, Any]) -> Iterator[Picture]:
    yield from _numbers(ranking)
    records = {name: [run.history.records] for name, run in runs.items() if run.history.records}
    if records:
        yield Picture("curves", plots.curves_by_time(records), "The bound by seconds of the fit.")
    yield from _images(runs)


def _numbers(ranking: Ranking) -> Iterator[Picture]:
    rows = ranking.rows()
    caption = f"How far each arm is behind the best, with 95 % intervals over {ranking.over}. Filled: it holds."
    yield Picture("differences", plots.differences(rows), caption)
    if any(row["seconds"] == row["seconds"] and row["rank"] is not None for row in rows):
        caption = "Accuracy against the seconds of a fit. Bars are two Monte Carlo errors."
        yield Picture("cost", plots.cost(rows, ranking.criterion), caption)
    gaps = [{"guide": row["arm"], "total": row["gap"], "total_stderr": row["mc_stderr"]}
            for row in rows if row["rank"] is not None]  # fmt: skip
    yield Picture("gaps", plots.gap_bars(gaps), "log p(x) - ELBO: what the guide loses of the evidence.")
    khats = {name: own[0].pareto_k for name, own in ranking.arms.items() if bool(own[0].pareto_k.isfinite().any())}
    if khats:
        limit = khat_limit(next(iter(ranking.arms.values()))[0].num_samples)
        ordered = {name: khats[name] for name in ranking.order if name in khats}
        yield Picture("khat", plots.khat_maps(ordered, limit), "Where importance weights cannot be relied upon.")


def _opened(trial: Trial) -> Opened:
    """A trial with the data as they lie now: a study may be moved."""
    return dataclasses.replace(open_run(trial.folder, trust=own_parts(trial.options)), options=trial.options)


def _images(runs: Mapping[str, Any]) -> Iterator[Picture]:
    """Samples and reconstructions of pairs on images."""
    if not runs:
        return
    dataset = next(iter(runs.values())).read()
    if len(dataset.x_shape) != 3 or dataset.x_shape[0] not in (1, 3):
        return
    test = evaluation.test_data(dataset, 0, SHOWN)
    made, again = {}, {}
    for name, run in list(runs.items())[:8]:
        face = serving.face(run.pair)
        with noise(0):
            made[name] = face.sample(run.pair, SHOWN, y=test.labels)
            again[name] = run.pair.reconstruct(test[:], *face.beside(run.pair, test[:], test.labels))
    originals = ("data", test[:])
    yield Picture("reconstructions", plots.side_by_side(again, first=originals), "The same test data, reconstructed.")
    yield Picture("samples", plots.side_by_side(made), "Decoded draws of the prior.")


def _over_datasets(found: Mapping[str, Ranking], methods: Mapping[str, str]) -> Iterator[Picture]:
    """Mean ranks over datasets, of the arms that are on all of them."""
    orders = [[methods[name] for name in ranking.order] for ranking in found.values()]
    common = [name for name in orders[0] if all(name in order for order in orders)]
    if len(common) >= 2:
        ranks = {name: [1 + [n for n in order if n in common].index(name) for order in orders] for name in common}
        caption = "Mean ranks over the datasets; methods under one bar cannot be told apart (Nemenyi, 5 %)."
        yield Picture("critical-difference", plots.critical_difference(ranks), caption)


def _notes(ranking: Ranking) -> str:
    lines = "".join(f"<li>{escape(note)}</li>" for note in ranking.notes)
    explained = f"Nats per datum. ±: Monte Carlo error given these data; [ , ]: 95 % over {ranking.over}."
    return f'<p class="small">{explained}</p><ul class="small">{lines}</ul>'


def _fits(plan: Plan) -> str:
    lines = []
    for trial in plan.trials:
        where = shlex.quote(str(trial.folder))
        if state(trial) != "done":
            lines.append(f"<li>{escape(trial.arm)}: {state(trial)}: {escape(reason(trial))}</li>")
            continue
        options = "; ".join(f"{name} {value}" for name, value in changed(trial.options).items())
        command = f"pyro-vae fit --config {where} --out again"
        lines.append(f"<li><b>{escape(trial.arm)}</b>, seed {trial.options.seed}<br><code>{escape(command)}</code>"
                     f"<br><span class='small'>{escape(options)}</span></li>")  # fmt: skip
    return f"<ul>{''.join(lines)}</ul>"
