"""A judgement as one HTML file that needs nothing else: pictures inside, no script, every text escaped."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable, Iterator, Mapping
from html import escape
from typing import Any

from matplotlib.figure import Figure

from pyro_vae.app import judging_plots
from pyro_vae.app.judge import TITLES, Judgement
from pyro_vae.app.verdicts import nats

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1a202c; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
ul.verdict { list-style: none; padding: 0; }
ul.verdict li { border-left: .3rem solid #a0aec0; margin: .5rem 0; padding: .3rem .8rem; background: #f7fafc; }
ul.verdict li.fault { border-color: #dd6b20; background: #fffaf0; }
.advice { font-weight: 600; }
table { border-collapse: collapse; } th, td { text-align: left; padding: .2rem .9rem .2rem 0; vertical-align: top; }
td.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
tr { border-bottom: 1px solid #e2e8f0; }
figure { margin: 1rem 0; } img { max-width: 100%; } figcaption, .small { color: #4a5568; font-size: .9rem; }
"""


def page(
    judgement: Judgement,
    title: str,
    pictures: Mapping[str, tuple[Figure, str]] | None = None,
    late: Callable[[], bool] | None = None,
) -> str:
    """The judgement as HTML.

    Args:
        judgement: What `judge` found.
        title: What was judged.
        pictures: By name, with a caption each; those of `draw` if omitted.
        late: Asked before each picture; once it is, the rest is left out, and said to be.
    """
    given = _draw(judgement) if pictures is None else ((n, *pair) for n, pair in pictures.items())
    figures = ""
    for name, figure, caption in given:
        if late is not None and late():
            figures += '<p class="small">Further pictures were left out for want of time.</p>'
            break
        figures += (
            f'<figure><img alt="{escape(name)}" src="data:image/png;base64,{_png(figure)}"><figcaption>'
            f"{escape(caption)}</figcaption></figure>"
        )
    found = "".join(_item(f.text, f.advice, f.culprit) for f in judgement.findings)
    stages = "".join(
        f"<tr><th>{escape(TITLES.get(s['name'], s['name']))}</th><td>{escape(s['status'])}</td>"
        f"<td class=\"number\">{s['seconds']:.1f} s</td><td>{escape(s.get('did') or s.get('reason') or '')}</td></tr>"
        for s in judgement.numbers["stages"]
    )
    rows = "".join(
        f'<tr><th>{escape(name)}</th><td class="number">{escape(value)}</td><td>{escape(note)}</td></tr>'
        for name, value, note in table(judgement.numbers)
    )
    protocol = ", ".join(_protocol(judgement.numbers["protocol"]))
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta http-equiv="Content-Security-Policy" content="{escape(policy)}">'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head><body>'
        f'<h1>{escape(title)}</h1><h2>Verdict</h2><ul class="verdict">{found}</ul>'
        f'<h2>Numbers</h2><table>{rows}</table><p class="small">Nats per datum, with Monte Carlo standard errors given '
        f"these data; data ± is the error for other data of the kind. {escape(protocol)}.</p>"
        f"<h2>What was done</h2><table>{stages}</table>"
        f"<h2>Pictures</h2>{figures}</body></html>\n"
    )


def table(numbers: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """The main numbers as (name, value, note)."""
    bounds, gaps = numbers.get("bounds") or {}, numbers.get("gaps") or {}
    latents, bracket = numbers.get("latents") or {}, numbers.get("bracket") or {}
    rows = []
    if bounds:
        rows += [
            ("ELBO", nats(bounds["elbo"], bounds["elbo_stderr"]), f"{bounds['images']} data"),
            ("reconstruction", nats(bounds["reconstruction"]), "E log p(x | z)"),
            ("KL", nats(bounds["kl"]), "KL(q(z | x) || p(z))"),
            ("log p(x)", nats(bounds["log_p"], bounds["log_p_stderr"]),
             f"K = {bounds['num_samples']}; data {_error(bounds.get('log_p_data_stderr'))}"),
        ]  # fmt: skip
        if bounds.get("short") is not None and math.isfinite(bounds["short"]):
            rows.append(("it lacks", nats(bounds["short"], bounds["short_stderr"]),
                         f"the estimator's; beside {bounds['short_source']}"))  # fmt: skip
    whose = {"inference": "log p(x) - ELBO", "approximation": "the family's", "amortization": "the encoder's"}
    for name, said in whose.items():
        if gaps.get(name) is not None:
            rows.append((f"{name} gap", nats(gaps[name], gaps[f"{name}_stderr"]),
                         f"{said}; {gaps['images']} data; data {_error(gaps.get(f'{name}_data_stderr'))}"))  # fmt: skip
    if bracket:
        rows.append(("bracket width", nats(bracket["width"], bracket["width_stderr"]),
                     f"{bracket['num_data']} simulated data, {bracket['num_steps']} steps"))  # fmt: skip
    if latents:
        active = f"{latents['active']} of {latents['latent_dim']}"
        rows.append(("active latents", active, "variance of the mean > 0.01"))
    return rows


def draw(judgement: Judgement) -> dict[str, tuple[Figure, str]]:
    """The pictures that the numbers allow, with their captions, by name."""
    return {name: (figure, caption) for name, figure, caption in _draw(judgement)}


def _draw(judgement: Judgement) -> Iterator[tuple[str, Figure, str]]:
    numbers, arrays = judgement.numbers, judgement.arrays
    bounds, gaps, latents = (numbers.get(name) for name in ("bounds", "gaps", "latents"))
    if gaps and gaps.get("inference") is not None:
        row = {"guide": "guide", "total": gaps["inference"], "total_stderr": gaps["inference_stderr"]}
        row |= {k: gaps.get(k) for part in ("approximation", "amortization") for k in (part, f"{part}_stderr")}
        caption = "What the guide loses: its family's part, and its encoder's. Bars of error are two standard errors."
        yield "gaps", judging_plots.gap_bars([row]), caption
    if bounds and bounds.get("curve"):
        curve = bounds["curve"]
        figure = judging_plots.bounds_by_samples(
            curve["num_samples"], {"importance-weighted bound": curve["value"]},
            {"importance-weighted bound": curve["stderr"]}, *((gaps["log_p"], gaps["log_p_stderr"]) if gaps and
            gaps["images"] == bounds["images"] else (None, 0.0)),
        )  # fmt: skip
        yield "samples", figure, "The estimate of log p(x) at smaller numbers of samples; at K = 1 it is the ELBO."
    if "pareto_k" in arrays and bool(arrays["pareto_k"].isfinite().any()):
        x = arrays["images"]
        images = x.float().clamp(0, 1).cpu() if getattr(x, "dim", lambda: 0)() == 4 and x.shape[1] in (1, 3) else None
        figure = judging_plots.khat_against_log_p(arrays["pareto_k"], arrays["log_p"], arrays["khat_limit"], images)
        yield "khat", figure, "Which data have weights that cannot be relied upon."
    if "bracket_lower" in arrays:
        figure = judging_plots.bracket(
            arrays["bracket_lower"], arrays["bracket_upper"], lower_stderr=arrays.get("bracket_lower_stderr")
        )
        yield "bracket", figure, "On data simulated from the model log p(x) lies between both bounds, on average."
    if "ranks" in arrays:
        yield (
            "ranks", _ranks(arrays, numbers.get("calibration") or {}),
            "A valley says that the guide is too narrow there, a hump too wide, a slope biased; the worst come first.",
        )  # fmt: skip
    if latents and latents.get("kl"):
        figure = judging_plots.kl_by_dimension(
            list(latents["kl"].values()), latents["kl_data_stderr"], names=list(latents["kl"])
        )
        yield "kl", figure, "How many nats each latent carries, on average over the data."


def _ranks(arrays: Mapping[str, Any], calibration: Mapping[str, Any]) -> Figure:
    """The latents of smallest p-value, which are the ones to look at, in their order."""
    ranks, names = arrays["ranks"], calibration.get("names") or []
    order = sorted(range(ranks.shape[1]), key=lambda d: (calibration.get("p_value") or {d: d})[d])
    return judging_plots.rank_histogram(
        ranks[:, order], arrays["num_draws"], names=[names[d] for d in order] if names else []
    )


def _protocol(protocol: Mapping[str, Any]) -> list[str]:
    """What the numbers depend on, in words."""
    said = []
    for name, value in protocol.items():
        if isinstance(value, Mapping):
            said += [f"{k} {v}" for k, v in value.items()]
        else:
            said.append(f"{name.replace('_', ' ')} {value}")
    return said


def _error(value: float | None) -> str:
    return "± ?" if value is None or not math.isfinite(value) else f"± {value:.2f}"


def _item(text: str, advice: str, culprit: str | None) -> str:
    kind = ' class="fault"' if culprit else ""
    more = f' <span class="advice">{escape(advice)}</span>' if advice else ""
    return f"<li{kind}>{escape(text)}{more}</li>"


def _png(figure: Figure) -> str:
    data = io.BytesIO()
    figure.savefig(data, dpi=110, format="png", bbox_inches="tight", pad_inches=0.1)
    return base64.b64encode(data.getvalue()).decode("ascii")
