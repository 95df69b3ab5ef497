"""A run as one HTML file that needs nothing else: summary, pictures inside, options; no script, every text escaped."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from pyro_vae.app import html, report
from pyro_vae.app.defaults import FitOptions, changed
from pyro_vae.app.following import next_commands
from pyro_vae.app.runs import FIGURES, REPORT
from pyro_vae.atomic import write_text

PICTURES = {
    "reconstructions.png": "What the pair makes of test data: the originals, and E[x | z] at z, the mean of q(z | x).",
    "samples.png": "What the model makes of nothing but noise: E[x | z] for z drawn from p(z); a row for each class or "
    "cluster, if the model has them.",
    "latent_space.png": "Where the guide puts test data: the mean of q(z | x), coloured by label if there are labels.",
    "training_curve.png": "The bound by epoch.",
    "interpolations.png": "Straight lines in latent space between the codes of two test data, decoded.",
}
_SHRINK = {"reconstructions.png", "samples.png", "interpolations.png"}


def write_page(run: Path, options: FitOptions, summary: Mapping[str, Any]) -> Path:
    """Write report.html of a run folder from what lies in it; where it is."""
    path = run / REPORT
    pictures = {name: (run / FIGURES / name).read_bytes() for name in PICTURES if (run / FIGURES / name).is_file()}
    write_text(path, page(f"Run {run}", summary, pictures, changed(options), next_commands(run, summary)))
    return path


def page(
    title: str, summary: Mapping[str, Any], pictures: Mapping[str, bytes], options: Mapping[str, str],
    commands: list[str],
) -> str:  # fmt: skip
    """The page, from the summary of a run, its pictures as PNG by name, and words for the rest."""
    captions = {name: PICTURES.get(name, name) for name in pictures}
    figures = "".join(
        html.image(data, captions[name], captions[name], "shrinks" * (name in _SHRINK))
        for name, data in pictures.items()
    )
    table = "<p>All options are the defaults of the dataset.</p>"
    if options:
        table = f"<table>{html.rows(options.items())}</table>"
    return html.document(
        title,
        f"<h2>Summary</h2><table>{html.rows(report.lines(summary))}</table>"
        '<p class="small">Nats per datum, with Monte Carlo standard errors given these data; data ± is the error for '
        f"other data of the kind.</p><h2>Pictures</h2>{figures}<h2>Options that differ from the defaults</h2>{table}"
        f"<h2>Next</h2><pre>{escape(chr(10).join(commands))}</pre>",
    )


def files(run: Path, summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What lies in a run to look at, and what else can be done with it, as (what, text) pairs."""
    names = [name for name in PICTURES if (run / FIGURES / name).is_file()]
    pairs = [("pictures", str(run / FIGURES / name)) if not i else ("", name) for i, name in enumerate(names)]
    if (run / REPORT).is_file():
        pairs.append(("report", str(run / REPORT)))
    others = next_commands(run, summary)[1:]  # the first of them is the line at the end: see `following`
    return [*pairs, *(("also" if not i else "", command) for i, command in enumerate(others))]
