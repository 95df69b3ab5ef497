"""What a run shows: the printed summary, and its pictures."""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from pyro_vae import plots
from pyro_vae.app import evaluation, serving
from pyro_vae.app.defaults import FitOptions
from pyro_vae.app.remarks import remarks
from pyro_vae.app.starting import shown
from pyro_vae.atomic import write_file
from pyro_vae.data import Dataset, Split
from pyro_vae.evaluation import evaluating
from pyro_vae.inference.batches import seeded
from pyro_vae.judging.latents import posterior_means
from pyro_vae.judging.quotes import about_weights, kind_of, lower_bound
from pyro_vae.programs.vae import Answers


def lines(summary: Mapping[str, Any], run: Path | None = None) -> list[tuple[str, str]]:
    """The summary as (what, text) pairs."""
    found: list[tuple[str, str]] = []
    if summary.get("interrupted"):
        found.append(("interrupted", "the weights are those of that moment; nothing was evaluated"))
    if summary.get("from"):
        found.append(("from", _origin(summary["from"])))
    if "test_elbo" in summary:
        found += [
            (
                "test ELBO",
                f"{_nats(summary, 'test_elbo')} nats = reconstruction {summary['test_reconstruction']:.2f} - "
                f"KL {summary['test_kl']:.2f}",
            ),
            (f"test {summary.get('log_likelihood_of', 'log p(x)')}", _log_likelihood(summary)),
        ]
    elif "test_reconstruction" in summary:
        text = f"{summary['test_reconstruction']:.2f} nats = log p(x | z(x)); a point has no ELBO and no log p(x)"
        found.append(("reconstruction", text))
    if "test_bits_per_dimension" in summary:
        sign = "<= " if _is_bound(summary) else ""
        text = f"{sign}{summary['test_bits_per_dimension']:.4f}, for 8-bit levels (dequantized)"
        found.append(("bits per dim.", text))
    if "fitted_log_evidence" in summary:
        evidence, gap = summary["fitted_log_evidence"], summary["fitted_log_evidence_minus_elbo"]
        found.append(("closed form", f"log p(x) {evidence:.4f} of the fitted model, {gap:.4f} above its ELBO"))
    if "true_log_evidence" in summary:
        short = summary["true_minus_fitted_log_evidence"]
        text = (
            f"log p(x) {summary['true_log_evidence']:.4f}; fitted is short by {short:.4f} ± "
            f"{summary['true_minus_fitted_stderr']:.4f}, expected {summary['true_minus_fitted_expected']:.4f}"
        )
        found.append(("true model", text))
    if "active_units" in summary:
        of = f" of {summary['active_units_of']}" if "active_units_of" in summary else ""
        found.append(("active units", f"{summary['active_units']} of {summary['latent_dim']}{of}"))
    if "test_accuracy" in summary:
        error = summary.get("test_accuracy_stderr")
        share = f"{summary['test_accuracy']:.3f} ± {'?' if error is None else f'{error:.3f}'}"
        found.append(("accuracy", f"{share}, {summary['accuracy_is']}"))
    if "sample_energy_distance" in summary:
        distance, null = summary["sample_energy_distance"], summary["sample_energy_distance_null"]
        found.append(("samples", f"energy distance {distance:.4f} to the test data (their own halves: {null:.4f})"))
    found += [("note", line) for line in remarks(summary)]
    if summary.get("left_out"):
        found.append(("left out", "; ".join(summary["left_out"])))
    if "protocol" in summary:
        found.append(("protocol", protocol_line(summary["protocol"])))
    if "train_seconds" in summary:
        found.append(("time", _time(summary)))
    if run is not None:
        found.append(("run", str(run)))
    return found


def _origin(origin: Mapping[str, Any]) -> str:
    where = shown(origin["run"])
    if origin["weights"]:
        return f"{where}: its weights, {origin['epochs']} epochs old, and its options"
    return f"{where}: its options; new weights, since {origin['why']}"


def protocol_line(protocol: Mapping[str, Any]) -> str:
    """The protocol in a line."""
    noise = "dequantized" if protocol.get("dequantize") else f"{protocol.get('binarization')} binarization"
    noise += ", columns standardized (log p is of x itself)" if protocol.get("standardized") else ""
    parts = [f"{protocol.get('dataset')}", noise, f"{protocol.get('test_images', '?')} test data"]
    if "log_likelihood_samples" in protocol:
        parts.append(f"K = {protocol['log_likelihood_samples']}")
    versions = protocol.get("versions", {})
    parts += [f"seed {protocol.get('evaluation_seed')}", f"pyro_vae {versions.get('pyro_vae')}"]
    return ", ".join(parts) + f"; {protocol.get('selection')}"


def show(summary: Mapping[str, Any], run: Path | None = None) -> None:
    """Print what summary.json holds of a run."""
    show_lines(lines(summary, run))


def show_lines(pairs: Sequence[tuple[str, str]], console: Console | None = None) -> None:
    """Print (what, text) pairs as a table of two columns; whole lines where there is no terminal."""
    console = console or Console(highlight=False)
    width = max(len(name) for name, _ in pairs) + 2
    if not console.is_terminal:
        for name, text in pairs:
            console.print(f"{name:{width}}{text}", soft_wrap=True, markup=False)
        return
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0), pad_edge=False)
    narrow = width > console.width // 3  # then the words on the left are broken, rather than all that is said
    table.add_column(style="bold", no_wrap=not narrow, max_width=console.width // 4 if narrow else None)
    table.add_column(overflow="fold")
    taken = max(1, console.width - (console.width // 4 if narrow else width - 2) - 2)
    for name, text in pairs:
        table.add_row(name, Text(wrapped(text, taken)))
    console.print(table)


def wrapped(text: str, width: int) -> str:
    """Text in lines, in which a number stays with its sign, its error and its unit.

    Example:
        >>> wrapped("k-hat ok for 95.3 % of -23.41 ± 0.02 nats", 20)
        'k-hat ok for 95.3 %\\nof\\n-23.41 ± 0.02 nats'
    """
    glued = re.sub(r"(?<=[±<>=]) (?=\S)|(?<=\d) (?=[±%=]|(?:nats|s|min|h|data)\b)", "\N{NO-BREAK SPACE}", text)
    return "\n".join(textwrap.wrap(glued, width, break_on_hyphens=False)).replace("\N{NO-BREAK SPACE}", " ")


def _khat_ok(summary: Mapping[str, Any]) -> float:
    ok = summary.get("test_khat_ok")
    return math.nan if ok is None else ok


def _is_bound(summary: Mapping[str, Any]) -> bool:
    """Of summaries that are older than `log_likelihood_is` too, as the rule is one of the share that they hold."""
    return kind_of(_khat_ok(summary), summary.get("log_likelihood_by", "importance")) == "lower bound"


def _log_likelihood(summary: Mapping[str, Any]) -> str:
    ok = _khat_ok(summary)
    over_data = _over_data(summary["test_log_likelihood_data_stderr"])
    method = summary.get("log_likelihood_by", "importance")
    if method == "quadrature":
        value = f"{summary['test_log_likelihood']:.2f} nats ({over_data})"
    elif _is_bound(summary):
        value = f"{lower_bound(summary['test_log_likelihood'])} nats ({over_data})"
    else:
        value = f"{_nats(summary, 'test_log_likelihood')} (Monte Carlo; {over_data}) nats"
    samples = summary.get("protocol", {}).get("log_likelihood_samples", "so few samples")
    return value + about_weights(ok, samples, "k-hat", method)


def _nats(summary: Mapping[str, Any], key: str) -> str:
    return f"{summary[key]:.2f} ± {_number(summary[f'{key}_stderr'])}"


def _number(value: float | None) -> str:
    if value is None:
        return "?"
    return f"{value:.2f}" if value >= 0.01 or value == 0 else f"{value:.1g}"


def _over_data(value: float | None) -> str:
    return "one datum" if value is None or math.isnan(value) else f"data ± {_number(value)}"


def _time(summary: Mapping[str, Any]) -> str:
    text = f"{_seconds(summary['train_seconds'])} to train ({summary['epochs']} epochs"
    if summary.get("images_per_second"):
        text += f", {summary['images_per_second']:,.0f} images/s"
    if "evaluation_seconds" in summary:
        return f"{text}), {_seconds(summary['evaluation_seconds'])} to evaluate"
    return text + ")"


def _seconds(value: float) -> str:
    return f"{value:.0f} s" if value < 600 else f"{value / 60:.1f} min"


def about(seconds: float) -> str:
    """A measured time, rounded as it deserves.

    Example:
        >>> about(3.2), about(48), about(1502), about(9000)
        ('a few seconds', 'about 50 s', 'about 25 min', 'about 2.5 h')
    """
    if seconds < 5:
        return "a few seconds"
    if seconds < 90:
        return f"about {max(1, round(seconds / 10)) * 10} s"
    return f"about {seconds / 60:.0f} min" if seconds < 5400 else f"about {seconds / 3600:.1f} h"


_LATENT_POINTS = 5000
_SHOWN = 20  # originals and reconstructions
CURVE = (
    "Higher is better. Both still rising: train longer. Validation falling below training: overfitting.\n"
    "Training is the mean over an epoch in which the weights still move; validation is scored at its end."
)


def draw(
    vae: Answers, dataset: Dataset, records: Sequence[Mapping[str, Any]], numbers: Mapping[str, Any],
    options: FitOptions, folder: Path, views: Mapping[str, Tensor] | None = None,
) -> None:  # fmt: skip
    """Draw the five pictures of a run into a folder, with what `evaluate` found, if anything.

    `views` are latents of `latent_data` by other guides, by their titles, shown beside those of the pair.
    """
    point = evaluation.is_autoencoder(vae)
    test = evaluation.test_data(dataset, options.seed, options.evaluation_images)
    device = next(vae.parameters()).device
    face = serving.face(vae)
    draw_curve(vae, records, numbers, options, folder)
    with seeded(options.seed), torch.no_grad():
        _draw_data(vae, dataset, options, folder)
        known, labels = test[torch.arange(min(200, len(test)))], test.labels
        if len(test) < 2:  # nothing lies between one datum and itself
            known = torch.cat([dataset.validation[:1], known])
            both = (dataset.validation.labels, labels)
            labels = torch.cat([y[:1] for y in both if y is not None]) if face.within else None
        starts, ends = pairs(known, labels, alike=face.within)
        if starts:  # there may be no two of a class
            given = None if labels is None else labels[starts]
            lines = face.lines(vae, known[starts].to(device), known[ends].to(device), given, 10)
            title = f"Interpolations between test data{' of a class' if face.within else ''}"
            title += "" if point or not _binary(dataset) else ", as probabilities"
            save(plots.interpolations(lines, title), folder / "interpolations.png")
        shown = latent_data(dataset, options)
        means = posterior_means(vae.guide, face.given(shown), site=face.site, seed=options.seed)
        title = f"this run: {means.flatten(1).shape[1]} latents, principal components" if views else ""
        figure = plots.latent_spaces({title: means} | dict(views or {}), shown.labels, dataset.label_names)
        save(figure, folder / "latent_space.png")


def latent_data(dataset: Dataset, options: FitOptions) -> Split:
    """The test data whose latents are shown."""
    return evaluation.test_data(dataset, options.seed, min(options.evaluation_images or _LATENT_POINTS, _LATENT_POINTS))


def draw_progress(
    vae: Answers, dataset: Dataset, records: Sequence[Mapping[str, Any]], options: FitOptions, folder: Path
) -> None:
    """Draw three of them while the pair is trained: nothing of it is changed, random state included."""
    draw_curve(vae, records, {}, options, folder)
    with seeded(options.seed), evaluating(vae, seed=options.seed):
        _draw_data(vae, dataset, options, folder, f", after epoch {records[-1]['epoch']} of {options.epochs}")


def draw_curve(
    vae: Answers, records: Sequence[Mapping[str, Any]], numbers: Mapping[str, Any], options: FitOptions, folder: Path
) -> None:
    """Draw the training curve, with what `evaluate` found, if anything."""
    log_p = f"test {numbers.get('log_likelihood_of', 'log p(x)')}"
    log_p = f"lower bound of {log_p}" if _is_bound(numbers) else log_p
    finals = {
        label: numbers[key]
        for label, key in ((log_p, "test_log_likelihood"), ("test ELBO", "test_elbo"),
                           ("test reconstruction", "test_reconstruction"))
        if key in numbers and (key != "test_reconstruction" or "test_elbo" not in numbers)
    }  # fmt: skip
    name = "reconstruction" if evaluation.is_autoencoder(vae) else "IWAE / ELBO" if options.bound == "iwae" else "ELBO"
    save(plots.training_curve(records, finals, name, note=CURVE), folder / "training_curve.png")


def _draw_data(vae: Answers, dataset: Dataset, options: FitOptions, folder: Path, when: str = "") -> None:
    """Test data beside their reconstructions, and samples."""
    device = next(vae.parameters()).device
    few = dataset.test.subset(slice(0, _SHOWN))
    x = few.frozen(options.seed)[:].to(device)
    probabilities = ", as probabilities" if _binary(dataset) else ""
    title = f"Test data and reconstructions{probabilities}{when}"
    grey = None
    if _binary(dataset) and few.binarization == "dynamic" and not few.fixed:
        grey = few.held(slice(None))
        grey = grey / 255 if grey.dtype == torch.uint8 else grey
    face = serving.face(vae)
    again = vae.reconstruct(x, *face.beside(vae, x, few.labels))
    save(plots.reconstructions(x, again, title, grey=grey), folder / "reconstructions.png")
    title = f"Samples {'from' if face.rows == 'the prior' else 'of'} {face.rows}{probabilities}{when}"
    if evaluation.is_autoencoder(vae):
        title = f"Decoded from N(0, I), which this autoencoder knows nothing of{when}"
    new, rows = face.grid(vae, dataset.label_names)
    save(plots.samples(new, title, rows=rows), folder / "samples.png")


def _binary(dataset: Dataset) -> bool:
    return dataset.train.binarization != "none"


def pairs(x: Tensor, labels: Tensor | None, alike: bool = False) -> tuple[list[int], list[int]]:
    """Rows to interpolate between, from and to, six pairs at most: of different labels where there are labels, or of
    `alike` ones."""
    starts, ends = [], []
    for i in range(0, len(x) - 1, 2):
        fitting = (j for j in range(i + 1, len(x)) if labels is None or bool(labels[j] == labels[i]) is alike)
        j = next(fitting, None if alike else i + 1)
        if j is not None:
            starts.append(i)
            ends.append(j)
        if len(starts) == 6:
            break
    return starts, ends


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, whole or not at all; its folder is made."""
    options: dict[str, Any] = {"dpi": 150, "format": "png", "bbox_inches": "tight", "pad_inches": 0.1}
    write_file(path, lambda partial: figure.savefig(partial, **options))


def print_table(rows: list[tuple[str, ...]]) -> None:
    """Print rows of words in columns, the first to the left and the others to the right."""
    widths = [max(len(row[c]) for row in rows) for c in range(len(rows[0]))]
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        click.echo("  ".join(cells))
