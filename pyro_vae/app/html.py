"""Pages that need nothing else: pictures inside, no script, every text escaped; and a judgement as one of them."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from pyro_vae import plots
from pyro_vae.judging.advice import Finding
from pyro_vae.judging.judgement import Judgement
from pyro_vae.judging.results import Nats
from pyro_vae.judging.stages import Bounds, Calibrated, GapSplit, Stages
from pyro_vae.judging.weights import khat_limit

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1a202c; max-width: 62rem; margin: 2rem auto; padding: 0 1rem;
       overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
ul.verdict { list-style: none; padding: 0; }
ul.verdict li { border-left: .3rem solid #a0aec0; margin: .5rem 0; padding: .3rem .8rem; background: #f7fafc; }
ul.verdict li.fault { border-color: #dd6b20; background: #fffaf0; }
.advice { font-weight: 600; }
code { font-size: .85rem; }
p.verdict { border-left: .3rem solid #2b6cb0; margin: .5rem 0; padding: .3rem .8rem; background: #f7fafc; }
.wide { overflow-x: auto; } .wide td:first-child, .wide td:last-child { min-width: 8rem; }
th.number { text-align: right; } .stages td:nth-child(2) { white-space: nowrap; }
pre { background: #f7fafc; padding: .6rem .8rem; white-space: pre-wrap; }
table { border-collapse: collapse; } th, td { text-align: left; padding: .2rem .9rem .2rem 0; vertical-align: top; }
td.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
tr { border-bottom: 1px solid #e2e8f0; }
figure { margin: 1rem 0; overflow-x: auto; } img { max-width: 100%; }
figcaption, .small { color: #4a5568; font-size: .9rem; }
@media (max-width: 30rem) { figure:not(.shrinks) img { max-width: none; width: 36rem; }
       figcaption { position: sticky; left: 0; }
       body > table :is(tr, th, td) { display: block; text-align: left; padding-bottom: 0; }
       body > table td.number { text-align: left; } }
"""


class Picture(NamedTuple):
    """A figure of the report: what it is called, and what it shows."""

    name: str
    figure: Figure
    caption: str


def page(
    judgement: Judgement,
    title: str,
    pictures: Iterable[Picture] | None = None,
    late: Callable[[], bool] | None = None,
) -> str:
    """The judgement as HTML, with the pictures of `draw` where none are given.

    `late` is asked before each picture; once it says so, the rest is left out, and the page says that.
    """
    shown = figures(draw(judgement.stages) if pictures is None else pictures, late)
    findings = "".join(_item(finding) for finding in judgement.findings)
    stages = ((s.title, s.status, f"{s.seconds:.1f} s", s.summary() if s.done else s.reason) for s in judgement.stages)
    return document(
        title,
        f'<h2>Verdict</h2><ul class="verdict">{findings}</ul>'
        f'<h2>Numbers</h2><table>{rows(table(judgement.stages), 1)}</table><p class="small">Nats per datum, with Monte '
        f"Carlo standard errors given these data; data ± is the error for other data of the kind. "
        f"{escape(_protocol(judgement.protocol))}.</p>"
        f'<h2>What was done</h2><table class="stages">{rows(stages, 2)}</table>'
        f"<h2>Pictures</h2>{shown}",
    )


def document(title: str, body: str) -> str:
    """A page that loads nothing and runs nothing: a title, which is escaped, and HTML that is taken as it is."""
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta http-equiv="Content-Security-Policy" content="{escape(policy)}">'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head><body>'
        f"<h1>{escape(title)}</h1>{body}</body></html>\n"
    )


def rows(lines: Iterable[Sequence[str]], number: int = 0) -> str:
    """Rows of a table, each a heading and cells; `number` counts to the one cell that holds numbers, if any."""
    return "".join(
        f"<tr><th>{escape(head)}</th>"
        + "".join(f"<td{' class=number' * (i == number)}>{escape(cell)}</td>" for i, cell in enumerate(cells, 1))
        + "</tr>"
        for head, *cells in lines
    )


def image(png: bytes, alt: str, caption: str, kind: str = "") -> str:
    """A picture inside the page; "shrinks" is the kind of those that stay whole on a narrow screen."""
    source = f"data:image/png;base64,{base64.b64encode(png).decode('ascii')}"
    caption = f"<figcaption>{escape(caption)}</figcaption>"
    return f'<figure class="{kind}"><img alt="{escape(alt)}" src="{source}">{caption}</figure>'


def figures(pictures: Iterable[Picture], late: Callable[[], bool] | None = None) -> str:
    """Pictures inside the page; what `late` cuts off is said."""
    found = ""
    for picture in pictures:
        if late is not None and late():
            which = "Further pictures" if found else "Pictures"
            return f'{found}<p class="small">{which} were left out for want of time.</p>'
        data = io.BytesIO()
        picture.figure.savefig(data, dpi=110, format="png", bbox_inches="tight", pad_inches=0.1)
        found += image(data.getvalue(), picture.name, picture.caption)
    return found


def table(stages: Stages) -> Iterator[tuple[str, str, str]]:
    """The main numbers as (name, value, note)."""
    bounds, gaps, latents, bracket = stages.bounds, stages.gaps, stages.latents, stages.bracket
    if bounds.done:
        yield "ELBO", str(bounds.elbo), f"{bounds.num_data} data; {_over_data(bounds.elbo)}"
        yield "reconstruction", f"{bounds.reconstruction:.2f}", "E log p(x | z)"
        yield "KL", f"{bounds.kl:.2f}", "KL(q(z | x) || p(z))"
        yield "log p(x)", str(bounds.log_p), f"K = {bounds.num_samples}; {_over_data(bounds.log_p)}"
        if bounds.missing.known:
            yield "it lacks", str(bounds.missing), f"the estimator's; beside {bounds.comparison}"
    for name, gap, whose in (
        ("inference gap", gaps.inference, "log p(x) - ELBO"),
        ("approximation gap", gaps.approximation, "the family's"),
        ("amortization gap", gaps.amortization, "the encoder's"),
    ):
        if gap.known:
            yield name, str(gap), f"{whose}; {gaps.num_data} data; {_over_data(gap)}"
    if bracket.done:
        yield "bracket width", str(bracket.width), f"{bracket.num_data} simulated data, {bracket.num_steps} steps"
    if latents.done:
        active = "unknown" if latents.active is None else f"{latents.active} of {latents.latent_dim}"
        yield "active latents", active, f"variance of the mean > {latents.threshold:g}"


def draw(stages: Stages) -> Iterator[Picture]:
    """The pictures that the numbers allow, one by one, the most telling first."""
    bounds, gaps, latents = stages.bounds, stages.gaps, stages.latents
    if gaps.inference.known:
        caption = "What the guide loses: its family's part, and its encoder's. Bars of error are two standard errors."
        yield Picture("gaps", plots.gap_bars([_bar(gaps)]), caption)
    if bounds.curve:
        caption = "The estimate of log p(x) at smaller numbers of samples; at K = 1 it is the ELBO."
        yield Picture("samples", _curve(bounds, gaps), caption)
    if bounds.pareto_k is not None and bool(bounds.pareto_k.isfinite().any()):
        limit = khat_limit(bounds.better_samples)
        figure = plots.khat_against_log_p(bounds.pareto_k, bounds.pointwise, limit, _images(bounds.data))
        yield Picture("khat", figure, "Which data have weights that cannot be relied upon.")
    bracket = stages.bracket.found
    if bracket is not None:
        lower = bracket.lower
        figure = plots.bracket(lower.pointwise, bracket.upper.pointwise, lower_stderr=lower.pointwise_stderr)
        caption = "On data simulated from the model log p(x) lies between both bounds, on average."
        yield Picture("bracket", figure, caption)
    yield from _calibration(stages.calibration)
    if latents.kl:
        figure = plots.kl_by_dimension(list(latents.kl.values()), latents.kl_data_stderr, names=list(latents.kl))
        yield Picture("kl", figure, "How many nats each latent carries, on average over the data.")


def _bar(gaps: GapSplit) -> dict[str, Any]:
    """The gaps as a row of `plots.gap_bars`."""
    parts = {"total": gaps.inference}
    if gaps.split:
        parts |= {"approximation": gaps.approximation, "amortization": gaps.amortization}
    row: dict[str, Any] = {"guide": "guide"}
    for name, gap in parts.items():
        row |= {name: gap.value, f"{name}_stderr": gap.mc_stderr}
    return row


def _curve(bounds: Bounds, gaps: GapSplit) -> Figure:
    """The estimate against K, and log p(x) where it is known of the same data."""
    name = "importance-weighted bound"
    same = gaps.log_p.known and gaps.num_data == bounds.num_data
    log_p = (gaps.log_p.value, gaps.log_p.mc_stderr) if same else (None, 0.0)
    return plots.bounds_by_samples(bounds.curve_samples, {name: bounds.curve}, {name: bounds.curve_mc_stderr}, *log_p)


def _calibration(stage: Calibrated) -> Iterator[Picture]:
    """Ranks and coverage of the latents of smallest p-value, which are the ones to look at, in their order."""
    found = stage.found
    if found is None:
        return
    order = sorted(range(len(stage.names)), key=lambda i: stage.p_value[i])
    names = [stage.names[i] for i in order]
    caption = "A valley says that the guide is too narrow there, a hump too wide, a slope biased; the worst come first."
    yield Picture("ranks", plots.rank_histogram(found.ranks[:, order], found.num_samples, names=names), caption)
    bands = found.coverage()
    curves = {stage.names[i]: bands.empirical[:, i] for i in order[:5]}
    figure = plots.coverage_curve(bands.nominal, curves, len(found.ranks), bands.lower, bands.upper, bands.level)
    caption = "How often an interval of each level holds the truth: below the diagonal the guide is too narrow."
    yield Picture("coverage", figure, caption)


def _images(data: Any) -> Any:
    """The data where they are pictures, as grey levels or colours in [0, 1]."""
    pictures = getattr(data, "dim", lambda: 0)() == 4 and data.shape[1] in (1, 3)
    return data.float().clamp(0, 1).cpu() if pictures else None


def _protocol(protocol: Mapping[str, Any]) -> str:
    """What the numbers depend on, in words."""
    words = []
    for name, value in protocol.items():
        own = value.items() if isinstance(value, Mapping) else ((name.replace("_", " "), value),)
        words += [f"{k} {v}" for k, v in own]
    return ", ".join(words)


def _over_data(number: Nats) -> str:
    return f"data ± {number.data_stderr:.2f}" if math.isfinite(number.data_stderr) else "data ± ?"


def _item(finding: Finding) -> str:
    kind = ' class="fault"' if finding.culprit else ""
    advice = f' <span class="advice">{escape(finding.advice)}</span>' if finding.advice else ""
    typed = "".join(f"<br><code>{escape(line)}</code>" for line in (finding.command, finding.python) if line)
    return f"<li{kind}>{escape(finding.text)}{advice}{typed}</li>"
