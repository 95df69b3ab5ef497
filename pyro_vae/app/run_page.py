"""A run as one HTML file that needs nothing else: summary, pictures inside, options; no script, every text escaped."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from pyro_vae.app import report
from pyro_vae.app.defaults import FitOptions, changed
from pyro_vae.app.following import next_commands
from pyro_vae.app.runs import FIGURES, REPORT
from pyro_vae.atomic import write_file

PICTURES = {
    "reconstructions.png": "What the pair makes of test data: the originals, and E[x | z] for a z drawn from q(z | x).",
    "samples.png": "What the model makes of nothing but noise: E[x | z] for z drawn from p(z); a row for each class or "
    "cluster, if the model has them.",
    "latent_space.png": "Where the guide puts test data: the mean of q(z | x), coloured by label if there are labels.",
    "training_curve.png": "The bound by epoch.",
    "interpolations.png": "Straight lines in latent space between the codes of two test data, decoded.",
}
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1a202c; max-width: 62rem; margin: 2rem auto; padding: 0 1rem;
       overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; padding: .2rem .9rem .2rem 0; vertical-align: top; }
th { white-space: nowrap; font-weight: 600; } tr { border-bottom: 1px solid #e2e8f0; }
figure { margin: 1.2rem 0; overflow-x: auto; } img { max-width: 100%; height: auto; }
figcaption, .small { color: #4a5568; font-size: .9rem; }
pre { background: #f7fafc; padding: .6rem .8rem; white-space: pre-wrap; }
@media (max-width: 30rem) { th, td { display: block; padding-bottom: 0; } tr { display: block; padding: .3rem 0; }
       .latent_space img, .training_curve img { max-width: none; width: 36rem; }
       figcaption { position: sticky; left: 0; } }
"""


def write_page(run: Path, options: FitOptions, summary: Mapping[str, Any]) -> Path:
    """Write report.html of a run folder from what lies in it; where it is.

    Args:
        run: The folder.
        options: The configuration.
        summary: Its numbers.
    """
    path = run / REPORT
    pictures = {name: (run / FIGURES / name).read_bytes() for name in PICTURES if (run / FIGURES / name).is_file()}
    text = page(f"Run {run}", summary, pictures, changed(options), next_commands(run, summary))
    write_file(path, lambda partial: partial.write_text(text, encoding="utf-8"))
    return path


def page(
    title: str, summary: Mapping[str, Any], pictures: Mapping[str, bytes], options: Mapping[str, str],
    commands: list[str],
) -> str:  # fmt: skip
    """The page, from the summary of a run, its pictures as PNG by name, and words for the rest."""
    rows = "".join(f"<tr><th>{escape(name)}</th><td>{escape(text)}</td></tr>" for name, text in report.lines(summary))
    captions = {name: escape(PICTURES.get(name, name)) for name in pictures}
    figures = "".join(
        f'<figure class="{escape(Path(name).stem)}"><img alt="{captions[name]}" '
        f'src="data:image/png;base64,{base64.b64encode(data).decode("ascii")}">'
        f"<figcaption>{captions[name]}</figcaption></figure>"
        for name, data in pictures.items()
    )
    differing = "".join(f"<tr><th>{escape(key)}</th><td>{escape(value)}</td></tr>" for key, value in options.items())
    table = f"<table>{differing}</table>" if differing else "<p>All options are the defaults of the dataset.</p>"
    lines = escape("\n".join(commands))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>"
        f"<h1>{escape(title)}</h1><h2>Summary</h2><table>{rows}</table>"
        '<p class="small">Nats per datum, with Monte Carlo standard errors given these data; data ± is the error for '
        "other data of the kind.</p>"
        f"<h2>Pictures</h2>{figures}<h2>Options that differ from the defaults</h2>{table}"
        f"<h2>Next</h2><pre>{lines}</pre></body></html>\n"
    )


def files(run: Path, summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What lies in a run to look at, and what else can be done with it, as (what, text) pairs."""
    names = [name for name in PICTURES if (run / FIGURES / name).is_file()]
    pairs = [("pictures", str(run / FIGURES / name)) if not i else ("", name) for i, name in enumerate(names)]
    if (run / REPORT).is_file():
        pairs.append(("report", str(run / REPORT)))
    others = next_commands(run, summary)[1:]  # the first of them is the line at the end: see `following`
    return [*pairs, *(("also" if not i else "", command) for i, command in enumerate(others))]
