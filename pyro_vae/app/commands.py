"""What the commands on a run do: evaluate, draw, judge, sample, reconstruct, rank anomalies."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import functools
import json
import time
from pathlib import Path
from typing import Any, cast

import click
import torch
from torch import Tensor

from pyro_vae import plots
from pyro_vae.app import evaluation, following, report, serving
from pyro_vae.app.building import the_device
from pyro_vae.app.configuration import about
from pyro_vae.app.defaults import FULL_SAMPLES, FitOptions, resolve
from pyro_vae.app.processes import is_first
from pyro_vae.app.reading import read
from pyro_vae.app.remarks import of_image
from pyro_vae.app.runs import EVALUATED, FIGURES, JUDGED, METRICS, WEIGHTS, Run, is_unfinished, options_of, write_json
from pyro_vae.app.training import second_view
from pyro_vae.atomic import write_file
from pyro_vae.data import Dataset, Split, binarize, dequantize, load, threshold
from pyro_vae.data.decoding import Framing, grey_level
from pyro_vae.data.photographs import read_image
from pyro_vae.inference.batches import seeded
from pyro_vae.inference.records import History
from pyro_vae.judging.anomalies import anomaly_scores, explained, roc_auc
from pyro_vae.judging.estimates import elbo_terms, log_likelihood
from pyro_vae.judging.kept import Kept
from pyro_vae.judging.remedies import paired
from pyro_vae.programs.hamiltonian import Hamiltonian
from pyro_vae.programs.pair import Guide
from pyro_vae.programs.refined import Refined
from pyro_vae.programs.semi_amortized import SemiAmortized
from pyro_vae.programs.vae import VAE, Answers
from pyro_vae.traces import particles

_UNITS = {
    "log-likelihood": "-log p(x)",
    "reconstruction": "-E_q log p(x|z)",
    "ratio": "-log p(x) - compressed size",
    "regret": "ELBO(best q) - ELBO(q)",
}


def _opened(
    run: Path, trust: tuple[str, ...], seed: int | None, device: str | None = None
) -> tuple[FitOptions, Answers, int]:
    """A run's configuration, its pair, and the seed: the run's own where none is given."""
    loaded = Run.load(run)
    options, vae = options_of(loaded), loaded.pair(trust)
    return options, vae if device is None else vae.to(the_device(device)), options.seed if seed is None else seed


def evaluate_run(
    run: Path, evaluation_samples: int | None = None, evaluation_images: int | None = None, seed: int | None = None,
    data_dir: str | None = None, device: str = "auto", as_json: bool = False, out: Path | None = None,
    trust: tuple[str, ...] = (), full: bool = False, refine: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """`pyro-vae evaluate`: the numbers of a run, computed again; prints and returns them."""
    options, vae, seed = _opened(run, trust, seed, device)
    known = Run.load(run).summary
    done = known.get("protocol", {}) if "evaluation_seconds" in known and not full else {}
    images = evaluation_images or (None if full else options.evaluation_images)
    _, dataset = _data(options, vae, data_dir, images)
    asked = {"images": images, "samples": evaluation_samples, "full": full, "refine": refine, "seed": seed,
             "device": str(next(vae.parameters()).device), "done": done.get("log_likelihood_samples")}  # fmt: skip
    kept = evaluation.kept_for(run / EVALUATED, run / WEIGHTS, dataset, asked)
    if full:
        settings: dict[str, Any] = {"num_samples": evaluation_samples or FULL_SAMPLES, "images": images}
    elif done:
        settings = {
            "num_samples": evaluation_samples or done.get("log_likelihood_samples", options.evaluation_samples),
            "images": images or done["test_images"],
        }
    else:
        samples = evaluation_samples or options.evaluation_samples
        planned = dataclasses.replace(options, evaluation_samples=samples, evaluation_images=images)
        # By the clock, and so once.
        settings = kept.piece("plan", lambda: _sizes(evaluation.plan(vae, dataset, planned)))
    settings["seed"] = seed
    progress = False if as_json else None
    refined: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
        judged = vae
        if refine is not None:
            serving.only(vae, "--refine", "vae")
            guide = stack.enter_context(_refined(refine, vae, run).kept())
            judged = VAE(vae.model, cast(Guide, guide), vae.architecture)
            test = evaluation.test_data(dataset, seed, settings["images"])

            def pointwise(each: Any) -> Tensor:
                return elbo_terms(vae.model, each, test, num_samples=evaluation.ELBO_SAMPLES, seed=seed,
                                  progress=progress).pointwise  # fmt: skip

            before = kept.piece("elbo before", lambda: pointwise(vae.guide))
            after = kept.piece("elbo after", lambda: pointwise(guide))
            gain = paired(after - before)
            refined = {"refined_by": refine, "elbo_gain": gain.value, "elbo_gain_stderr": gain.mc_stderr}
        numbers = evaluation.evaluate(judged, dataset, **settings, progress=progress, kept=kept)
    numbers["protocol"] = evaluation.protocol(vae, dataset, **settings) | refined
    if as_json:
        click.echo(json.dumps(numbers | {"run": str(run)}, indent=2))
    else:
        report.show(numbers, run)
    if refined and not as_json:
        click.echo(f"refined by {refine}: the ELBO is {refined['elbo_gain']:.3f} ± {refined['elbo_gain_stderr']:.3f} "
                   "nats above that of the run's own guide (paired by datum)")  # fmt: skip
    if out is not None and is_first():
        write_json(out, numbers | {"run": str(run)})
    kept.remove()
    if not as_json:
        following.say(following.after("evaluate", run, numbers))
    return numbers


def _sizes(plan: evaluation.Plan) -> dict[str, Any]:
    return {"num_samples": plan.num_samples, "images": plan.images}


def draw_run(run: Path, data_dir: str | None = None, trust: tuple[str, ...] = ()) -> list[Path]:
    """`pyro-vae draw`: the pictures and the page of a run, drawn again, of an unfinished one too; returns where."""
    from pyro_vae.app.run_page import PICTURES, write_page

    options, vae, _ = _opened(run, trust, None)
    loaded = Run.load(run)
    _, dataset = _data(options, vae, data_dir, options.evaluation_images)
    records = loaded.metrics()
    if is_unfinished(run) and len(records) < options.epochs:
        click.echo(f"an unfinished run, as it stood after epoch {len(records)} of {options.epochs}", err=True)
    views = {} if loaded.summary.get("interrupted") else second_view(vae, dataset, options)
    report.draw(vae, dataset, records, loaded.summary, options, run / FIGURES, views)
    paths = [run / FIGURES / name for name in PICTURES if (run / FIGURES / name).is_file()]
    paths.append(write_page(run, options, loaded.summary))
    for path in paths:
        click.echo(path)
    following.say(following.after("draw", run, loaded.summary))
    return paths


def _refined(name: str, vae: Answers, run: Path) -> Refined:
    """A run's guide, refined with the help of its model."""
    if _point(vae):
        raise ValueError(f"got --refine {name} for {run}, a plain autoencoder: a point has no ELBO to climb.")
    kind = {"semi-amortized": SemiAmortized, "hamiltonian": Hamiltonian}[name]
    return cast(Refined, kind(vae.model, vae.guide).eval())


def judge_run(
    run: Path, num_data: int = 100, budget: float = 110.0, num_samples: int | None = None, seed: int | None = None,
    data_dir: str | None = None, device: str = "auto", as_json: bool = False, out: Path | None = None,
    trust: tuple[str, ...] = (), started: float | None = None,
) -> Any:  # fmt: skip
    """`pyro-vae judge`: whose fault the gap is, as a table, JSON and HTML; prints and returns the judgement."""
    started = time.monotonic() if started is None else started
    folder = run if out is None else out
    from pyro_vae.app import html
    from pyro_vae.judging.judgement import judge

    loaded = Run.load(run)
    options, vae, seed = _opened(run, trust, seed, device)
    if _point(vae):
        raise ValueError(
            f"{run} is a plain autoencoder: a point has no density over z, hence no ELBO and no posterior to judge. "
            "Fit with another --posterior."
        )
    if out is not None:
        try:  # now, and not when the time has been spent
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"got --out {out}, wanted a folder to write to: {error.strerror}.") from error
    _, dataset = _data(options, vae, data_dir, images=None)
    test = evaluation.test_data(dataset, seed, num_data)
    records = loaded.metrics() if (run / METRICS).is_file() else None
    face = serving.face(vae)
    history = None if records is None else History(records, stopped_early=bool(loaded.summary.get("stopped_early")))
    # Loading has its time already, and the pictures are to have theirs.
    left = budget - (time.monotonic() - started) - min(15.0, 0.15 * budget)
    kept = Kept(folder / JUDGED, {"budget": budget})
    found = judge(
        *face.programs(vae), face.given(test), history=history, training=face.given(dataset.train),
        budget=max(left, 0.01), num_data=num_data,
        seed=seed,
        num_samples=options.evaluation_samples if num_samples is None else num_samples,
        progress=False if as_json else None, checkpoint=kept,
    )  # fmt: skip
    about: dict[str, Any] = {
        "run": str(run), "dataset": options.data, "part": "test", "versions": evaluation.versions(),
        "density": face.density, "budget_seconds": budget, "seconds": round(time.monotonic() - started, 3),
    }  # fmt: skip
    found = dataclasses.replace(found, protocol=found.protocol | about).of_run(str(run), loaded.config)
    findings = (
        dataclasses.replace(f, command="", python="") if f.remedy in face.no_remedies else f for f in found.findings
    )
    found = dataclasses.replace(found, findings=tuple(findings))
    text = found.to_json()
    write_file(folder / "judgement.json", lambda partial: partial.write_text(text + "\n", encoding="utf-8"))
    page = html.page(found, f"Judgement of {run}", late=lambda: time.monotonic() - started > budget)
    write_file(folder / "judgement.html", lambda partial: partial.write_text(page, encoding="utf-8"))
    kept.remove()
    if as_json:
        click.echo(text)
    else:
        files = [("report", str(folder / "judgement.html")), ("", str(folder / "judgement.json"))]
        given = [("given", f"y: each log p(x) above is {face.density}, y the labels of the test data")]
        report.show_lines([*found.lines(), *(given if face.needs_label else []), *files])
        following.say(following.after_judging(run, [finding.command for finding in found.advice]))
    return found


def sample_run(
    run: Path, number: int = 64, pixels: str = "mean", out: Path | None = None, seed: int | None = None,
    trust: tuple[str, ...] = (), label: str | None = None,
) -> Path:  # fmt: skip
    """`pyro-vae sample`: new data as a picture, an array or a folder of pictures; returns where."""
    _, vae, seed = _opened(run, trust, seed)
    summary = Run.load(run).summary
    known = serving.label_names(summary)
    wanted = None if label is None else serving.label_of(label, known)
    with seeded(seed):
        x = serving.face(vae).sample(vae, number, pixels=pixels, label=wanted, clusters=summary.get("cluster_classes"))
    of = "" if label is None else f"-label{label}"
    path = out or run / FIGURES / f"samples-{number}{of}-seed{seed}.png"
    if path.suffix == ".npy":
        import numpy as np

        def write(partial: Path) -> None:
            with partial.open("wb") as file:
                np.save(file, x.numpy())

        write_file(path, write)
    elif path.suffix == ".png":
        what = f"{number} samples from the prior" if label is None else f"{number} samples of label {label}"
        report.save(plots.samples(x, f"{what}, seed {seed}"), path)
    elif path.suffix:
        raise ValueError(f"got --out {path}, wanted a .png, a .npy, or a folder.")
    else:
        _image_folder(x, path)
    click.echo(path)
    following.say(following.after("sample", run, {}))
    return path


def reconstruct_images(
    run: Path, images: tuple[Path, ...], out: Path | None = None, num_samples: int = 1000, seed: int | None = None,
    trust: tuple[str, ...] = (), label: str | None = None,
) -> Path:  # fmt: skip
    """`pyro-vae reconstruct`: image files beside their reconstructions, and their scores; returns the picture."""
    options, vae, seed = _opened(run, trust, seed)
    shape = _x_shape(vae)
    if len(shape) != 3:
        raise ValueError(f"{run} is of vectors of shape {shape}, wanted a run of images.")
    x = torch.cat([_as_data(path, shape, options, seed)[None] for path in images])
    face, labels = serving.face(vae), _label_of_images(vae, label, len(x), run)
    (model, guide), given = face.programs(vae), face.batch(x, labels)
    rows = [("image", *(("E_q log p(x|z)", "KL", "ELBO", face.density) if not _point(vae) else ("log p(x|z)",)))]
    bound: Tensor | None = None
    with seeded(seed), torch.no_grad():
        if _point(vae):
            terms = [particles(model, guide, *given).log_likelihood.mean(0)]
        else:
            drawn = particles(model, guide, *given, num_samples=100)
            likelihood, elbo = drawn.log_likelihood.mean(0), drawn.log_weight.mean(0)
            estimate = log_likelihood(model, guide, given, num_samples=num_samples, seed=seed, progress=False)
            terms = [likelihood, likelihood - elbo, elbo, estimate.pointwise]
            bound = estimate.trusted
        picture = plots.reconstructions(x, vae.reconstruct(x, *face.beside(vae, x, labels)))
    rows += [(path.name, *(f"{float(term[i]):.2f}" for term in terms)) for i, path in enumerate(images)]
    if bound is not None:
        rows = [(*row[:-1], row[-1] if i == 0 or bound[i - 1] else f">= {row[-1]}") for i, row in enumerate(rows)]
    _print_table(rows)
    levels = Run.load(run).summary.get("train_levels")
    for path, image in zip(images, x, strict=True):
        if (line := of_image(image, levels)) is not None:
            click.echo(f"{path.name} {line}")
    path = out or Path("reconstructions.png")
    report.save(picture, path)
    click.echo(path)
    following.say(following.after("reconstruct", run, {}))
    return path


def rank_anomalies(
    run: Path, score: str | None = None, num_samples: int = 100, top: int = 16, outliers: str | None = None,
    outliers_dir: str | None = None, fit_outliers: bool = False, out: Path | None = None, picture: Path | None = None,
    data_dir: str | None = None, seed: int | None = None, device: str = "auto", trust: tuple[str, ...] = (),
) -> dict[str, Any]:  # fmt: skip
    """`pyro-vae anomalies`: test data from strange to ordinary; returns scores (and ROC-AUC)."""
    options, vae, seed = _opened(run, trust, seed, device)
    score = score or ("reconstruction" if _point(vae) else "log-likelihood")
    if score != "reconstruction" and _point(vae):
        raise ValueError(
            f"got --score {score} for {run}, a plain autoencoder: a point has no density over z and no "
            "log p(x). Use --score reconstruction."
        )
    settings: dict[str, Any] = {"score": score, "num_samples": 1 if _point(vae) else num_samples, "seed": seed}
    options, dataset = _data(options, vae, data_dir, images=None)
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
            strange = _outliers(outliers, outliers_dir, fit_outliers, options, _x_shape(vae), seed)
    face = serving.face(vae)
    model, guide = face.programs(vae)
    scores = anomaly_scores(model, guide, face.given(test), **settings)
    order = scores.argsort(descending=True, stable=True)
    shown = order[:top]
    unit = _UNITS[score].replace("log p(x)", face.density)
    name = _label_names(dataset, test)
    rows = [("rank", "test datum", *(("label",) if test.labels is not None else ()), f"{unit} (nats)")]
    rows += [(str(r + 1), str(i), *name(i), f"{scores[i]:.2f}") for r, i in enumerate(shown.tolist())]
    _print_table(rows)
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


def _label_of_images(vae: Answers, label: str | None, count: int, run: Path) -> Tensor | None:
    """The label that images are said to have, for each of them, if the model takes it; else None.

    Raises:
        ValueError: A conditional model, and no label or one that is no class; a label for another model.
    """
    if label is not None:
        serving.only(vae, "--label of an image", "conditional")
    elif serving.face(vae).needs_label:
        raise ValueError(f"{run} is a conditional model of p(x | y), wanted the label of the images: --label N.")
    if label is None:
        return None
    assert vae.architecture is not None
    found = serving.label_of(label, serving.label_names(Run.load(run).summary))
    classes = vae.architecture.option("num_classes")
    if not 0 <= found < classes:
        raise ValueError(f"got --label {label}, wanted one of the classes 0, ..., {classes - 1}.")
    return torch.full((count,), found)


def _data(options: FitOptions, vae: Answers, data_dir: str | None, images: int | None) -> tuple[FitOptions, Dataset]:
    changed = {} if data_dir is None else {"data_dir": data_dir}
    options, dataset = read(resolve(vars(options) | {"evaluation_images": images} | changed))
    if dataset.x_shape != _x_shape(vae):
        raise ValueError(
            f"{options.data} now has data of shape {dataset.x_shape}, but the run was fitted to {_x_shape(vae)}. "
            "Give the data that it was fitted to."
        )
    return options, dataset


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


def _as_data(path: Path, shape: tuple[int, ...], options: FitOptions, seed: int) -> Tensor:
    """An image file as one datum of a run, (C, H, W); what had to be changed is printed."""
    image = read_image(path, Framing(background=grey_level(options.background)))
    fitted = Framing(channels=shape[0])(image[None], name=str(path))
    size = (shape[1], shape[2])
    done = [] if fitted.shape[1] == image.shape[0] else ["made grey" if shape[0] == 1 else "made colour"]
    if tuple(fitted.shape[-2:]) != size:
        ratio = max(size[0] / fitted.shape[-2], size[1] / fitted.shape[-1])
        larger = [max(s, round(ratio * n)) for s, n in zip(size, fitted.shape[-2:], strict=True)]
        fitted = torch.nn.functional.interpolate(fitted, size=larger, mode="bilinear", antialias=True)
        top, left = (larger[0] - size[0]) // 2, (larger[1] - size[1]) // 2
        fitted = fitted[..., top : top + size[0], left : left + size[1]]
        done.append(f"scaled from {image.shape[1]}x{image.shape[2]} to {size[0]}x{size[1]} (height x width)")
    generator = torch.Generator().manual_seed(seed)
    if options.binarization in ("dynamic", "static"):
        x = binarize(fitted, generator)
        done.append("binarized by one draw")
    elif options.binarization == "threshold":
        x = threshold(fitted)
        done.append("binarized at one half")
    else:
        x = dequantize(fitted, generator) if options.dequantize else fitted.float() / 255
    if done:
        click.echo(f"{path.name}: {', '.join(done)}", err=True)
    return x[0]


def _image_folder(x: Tensor, folder: Path) -> None:
    from PIL import Image

    if x.dim() != 4:
        raise ValueError(f"got --out {folder} for data of shape {tuple(x.shape[1:])}, wanted a .npy for vectors.")
    width = len(str(len(x) - 1))
    for i, datum in enumerate(x):
        levels = (datum.clamp(0, 1) * 255).round().to(torch.uint8)
        picture = Image.fromarray(levels[0].numpy() if len(levels) == 1 else levels.permute(1, 2, 0).numpy())
        write_file(folder / f"{i:0{width}}.png", functools.partial(picture.save, format="png"))


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


def _print_table(rows: list[tuple[str, ...]]) -> None:
    widths = [max(len(row[c]) for row in rows) for c in range(len(rows[0]))]
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        click.echo("  ".join(cells))


def _x_shape(vae: Answers) -> tuple[int, ...]:
    assert vae.architecture is not None
    return vae.architecture.x_shape


def _point(vae: Answers) -> bool:
    return evaluation.is_autoencoder(vae)
