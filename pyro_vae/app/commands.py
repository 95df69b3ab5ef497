"""What the commands on a run do that look at all of it: evaluate, draw, judge."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from pathlib import Path
from typing import Any, cast

import click
from torch import Tensor

from pyro_vae.app import evaluation, following, report, serving
from pyro_vae.app.defaults import FULL_SAMPLES
from pyro_vae.app.loaded import data_of, opened
from pyro_vae.app.processes import is_first
from pyro_vae.app.runs import EVALUATED, FIGURES, JUDGED, METRICS, WEIGHTS, Run, is_unfinished, write_json
from pyro_vae.app.training import second_view
from pyro_vae.atomic import write_file
from pyro_vae.inference.records import History
from pyro_vae.judging.advice import MORE_TIME
from pyro_vae.judging.estimates import elbo_terms
from pyro_vae.judging.kept import Kept
from pyro_vae.judging.remedies import paired
from pyro_vae.programs.hamiltonian import Hamiltonian
from pyro_vae.programs.pair import Guide
from pyro_vae.programs.refined import Refined
from pyro_vae.programs.semi_amortized import SemiAmortized
from pyro_vae.programs.vae import VAE, Answers


def evaluate_run(
    run: Path, evaluation_samples: int | None = None, evaluation_images: int | None = None, seed: int | None = None,
    data_dir: str | None = None, device: str = "auto", as_json: bool = False, out: Path | None = None,
    trust: tuple[str, ...] = (), full: bool = False, refine: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """`pyro-vae evaluate`: the numbers of a run, computed again; prints and returns them."""
    options, vae, seed = opened(run, trust, seed, device)
    known = Run.load(run).summary
    done = known.get("protocol", {}) if "evaluation_seconds" in known and not full else {}
    images = evaluation_images or (None if full else options.evaluation_images)
    _, dataset = data_of(options, vae, data_dir, images)
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

    options, vae, _ = opened(run, trust, None)
    loaded = Run.load(run)
    _, dataset = data_of(options, vae, data_dir, options.evaluation_images)
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
    if evaluation.is_autoencoder(vae):
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
    options, vae, seed = opened(run, trust, seed, device)
    if evaluation.is_autoencoder(vae):
        raise ValueError(
            f"{run} is a plain autoencoder: a point has no density over z, hence no ELBO and no posterior to judge. "
            "Fit with another --posterior."
        )
    if out is not None:
        try:  # now, and not when the time has been spent
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"got --out {out}, wanted a folder to write to: {error.strerror}.") from error
    _, dataset = data_of(options, vae, data_dir, images=None)
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
        cut_off = any(finding.advice == MORE_TIME for finding in found.findings)
        more_time = max(600.0, 2 * budget) if cut_off else None
        following.say(following.after_judging(run, [finding.command for finding in found.advice], more_time))
    return found
