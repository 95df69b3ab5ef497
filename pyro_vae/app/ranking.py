"""What the command anomalies does: test data from strange to ordinary."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import click
from torch import Tensor

from pyro_vae import plots
from pyro_vae.app import evaluation, following, report, serving
from pyro_vae.app.configuration import about
from pyro_vae.app.defaults import FitOptions
from pyro_vae.app.loaded import data_of, opened, x_shape
from pyro_vae.app.runs import FIGURES
from pyro_vae.atomic import write_file
from pyro_vae.data import Dataset, Split, load
from pyro_vae.judging.anomalies import anomaly_scores, explained, roc_auc

_UNITS = {
    "log-likelihood": "-log p(x)",
    "reconstruction": "-E_q log p(x|z)",
    "ratio": "-log p(x) - compressed size",
    "regret": "ELBO(best q) - ELBO(q)",
}


def rank_anomalies(
    run: Path, score: str | None = None, num_samples: int = 100, top: int = 16, outliers: str | None = None,
    outliers_dir: str | None = None, fit_outliers: bool = False, out: Path | None = None, picture: Path | None = None,
    data_dir: str | None = None, seed: int | None = None, device: str = "auto", trust: tuple[str, ...] = (),
) -> dict[str, Any]:  # fmt: skip
    """`pyro-vae anomalies`: test data from strange to ordinary; returns scores (and ROC-AUC)."""
    options, vae, seed = opened(run, trust, seed, device)
    point = evaluation.is_autoencoder(vae)
    score = score or ("reconstruction" if point else "log-likelihood")
    if score != "reconstruction" and point:
        raise ValueError(
            f"got --score {score} for {run}, a plain autoencoder: a point has no density over z and no "
            "log p(x). Use --score reconstruction."
        )
    settings: dict[str, Any] = {"score": score, "num_samples": 1 if point else num_samples, "seed": seed}
    options, dataset = data_of(options, vae, data_dir, images=None)
    test = evaluation.test_data(dataset, seed)
    strange = None
    if score == "regret":
        serving.only(vae, "--score regret, which refits a reparameterised q(z | x),", "vae", "conditional", "mixture",
                     "hierarchical")  # fmt: skip
    if score == "ratio":
        serving.only(vae, "--score ratio, which compares log p(x) with a compressed size,", "vae", "semi-supervised",
                     "mixture", "hierarchical")  # fmt: skip
    if outliers is not None:
        serving.only(vae, "--outliers, which have no labels,", "vae", "semi-supervised", "mixture", "hierarchical")
        with about("--outliers", outliers):
            strange = _outliers(outliers, outliers_dir, fit_outliers, options, x_shape(vae), seed)
    face = serving.face(vae)
    model, guide = face.programs(vae)
    scores = anomaly_scores(model, guide, face.given(test), **settings)
    order = scores.argsort(descending=True, stable=True)
    shown = order[:top]
    unit = _UNITS[score].replace("log p(x)", face.density)
    name = _label_names(dataset, test)
    rows = [("rank", "test datum", *(("label",) if test.labels is not None else ()), f"{unit} (nats)")]
    rows += [(str(r + 1), str(i), *name(i), f"{scores[i]:.2f}") for r, i in enumerate(shown.tolist())]
    report.print_table(rows)
    click.echo(f"test data: mean {scores.mean():.2f}, median {scores.median():.2f}, of {len(scores)}")
    result: dict[str, Any] = {"scores": scores, "order": order}
    if strange is not None:
        outside = anomaly_scores(model, guide, face.given(strange), **settings)
        result |= {"outlier_scores": outside, "roc_auc": roc_auc(scores, outside)}
        click.echo(f"{outliers}: mean {outside.mean():.2f}, median {outside.median():.2f}, of {len(outside)}")
        click.echo(f"ROC-AUC {result['roc_auc']:.4f}: the chance that one of {outliers} scores above a test datum")
        if (why := explained(result["roc_auc"], score, str(outliers))) is not None:
            click.echo(why)
    if out is not None:
        _write_csv(out, test, scores, order, result.get("outlier_scores"))
        click.echo(out)
    path = picture or run / FIGURES / "anomalies.png"
    captions = [" ".join([*name(i), f"{scores[i]:.1f}"]) for i in shown.tolist()]
    report.save(plots.gallery(test[shown], captions, f"Most anomalous test data, {unit} in nats"), path)
    click.echo(path)
    following.say(following.after("anomalies", run, {}))
    return result


def _outliers(
    name: str, folder: str | None, frame: bool, options: FitOptions, shape: tuple[int, ...], seed: int
) -> Split:
    framing: dict[str, Any] = {}
    if frame:
        if len(shape) != 3 or shape[1] != shape[2]:
            raise ValueError(f"got --fit-outliers for a run of shape {shape}, wanted one of square images.")
        framing = {"image_size": shape[1], "channels": shape[0]}
    continuous = options.binarization == "none"
    found = load(
        name, folder, binarization=options.binarization,  # type: ignore[arg-type]
        dequantize=options.dequantize if continuous else None, seed=options.seed, **framing,
    )  # fmt: skip
    if found.x_shape != shape:
        remedy = " Pass --fit-outliers to crop and scale them." if len(shape) == 3 else ""
        raise ValueError(f"got --outliers {name} of shape {found.x_shape}, wanted {shape} as in the run.{remedy}")
    return found.test.frozen(seed)


def _write_csv(path: Path, test: Split, scores: Tensor, order: Tensor, outside: Tensor | None) -> None:
    labels = test.labels

    def write(partial: Path) -> None:
        with partial.open("w", newline="", encoding="utf-8") as file:
            table = csv.writer(file)
            table.writerow(["set", "index", "label", "score"])
            for i in order.tolist():
                table.writerow(["test", i, "" if labels is None else int(labels[i]), f"{scores[i]:.6f}"])
            for i, value in enumerate([] if outside is None else outside.tolist()):
                table.writerow(["outliers", i, "", f"{value:.6f}"])

    write_file(path, write)


def _label_names(dataset: Dataset, test: Split) -> Any:
    """A function from the row of a test datum to its label in words, or to nothing."""
    labels, names = test.labels, dataset.label_names
    if labels is None:
        return lambda i: ()
    return lambda i: (names[labels[i]] if names else str(int(labels[i])),)
