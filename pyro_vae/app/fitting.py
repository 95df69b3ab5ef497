"""From a configuration to a run folder: load, build, fit, judge, draw, write."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pyro_vae.app import evaluation, report
from pyro_vae.app.building import start
from pyro_vae.app.defaults import FULL_SAMPLES, FitOptions
from pyro_vae.app.processes import of_first
from pyro_vae.app.progress import Progress
from pyro_vae.app.reading import read
from pyro_vae.app.remarks import remarks
from pyro_vae.app.run_page import write_page
from pyro_vae.app.runs import (
    CHECKPOINT,
    CONFIG,
    EVALUATED,
    FIGURES,
    METRICS,
    SUMMARY,
    WEIGHTS,
    finish,
    run_folder,
    write_json,
    write_lines,
)
from pyro_vae.app.training import second_view, train, training_numbers
from pyro_vae.data import Dataset
from pyro_vae.inference import checkpoints
from pyro_vae.inference.checkpoints import Sparing
from pyro_vae.inference.hardware import check_precision
from pyro_vae.inference.ranks import Elsewhere, Setup, alone, first_says, world
from pyro_vae.inference.records import History
from pyro_vae.judging.kept import Kept
from pyro_vae.programs.vae import Answers


def fit_run(
    options: FitOptions,
    path: Path,
    *,
    checkpoint: Path | None = None,
    progress: bool | None = None,
    say: Callable[[str], None] = lambda _: None,
    trust: Sequence[str] = (),
) -> dict[str, Any]:
    """Do one run, or the rest of an unfinished one, and write its folder.

    The folder is there from the start. Its first pictures appear after the first epoch, and all of them before the
    evaluation. What was broken off is gone on with by the same options and folder.

    Args:
        options: The configuration, from `resolve`.
        path: The run folder to make, or an unfinished one.
        checkpoint: Where the state of the fit is kept after each epoch, in place of the run folder, where it is kept
            as often as costs next to nothing. Removed when the run is finished.
        progress: Show bars; None shows them on a terminal only.
        say: Takes a line about what is going on.
        trust: Parts of the user's own, ``module:Class``, that the run of ``--from`` may import.
    Returns:
        The summary. With ``interrupted`` true where Ctrl-C ended the training, or the evaluation: the
            weights are then those of that moment, and nothing was evaluated.
    Raises:
        ValueError: A bad option, unreadable data, a finished run or an unfinished one of other options, an unwritable
            folder; or a failure after the training, whose weights are then kept all the same.
    """
    check_precision(options.matmul_precision)
    saved = Sparing(path / CHECKPOINT) if checkpoint is None else checkpoint
    with contextlib.ExitStack() as stack, Setup() as setup:
        folder = of_first(lambda: stack.enter_context(run_folder(path, options.to_json(), checkpoint)))
        if folder is None:
            options, dataset = read(options)
            vae = start(options, dataset, trust)[0]
            setup.done()
            history = train(vae, dataset, options, saved, None, False)
            if not history.interrupted:
                _evaluate_with_first(vae, dataset, path)
            return {"interrupted": history.interrupted}
        going_on = (folder / WEIGHTS).is_file()
        asked = options
        options, dataset = read(options)
        _describe(options, dataset, say)
        vae, origin = start(options, dataset, trust, say)
        write_json(folder / CONFIG, options.to_json())
        in_lines = progress is not True and not sys.stderr.isatty()
        with alone():  # it measures the speed of this process
            seen = Progress(vae, dataset, options, folder, say, going_on=going_on, in_lines=in_lines)
        setup.done()
        started = time.perf_counter()
        history = train(vae, dataset, options, saved, seen, progress)
        seconds = time.perf_counter() - started
        vae.save(folder / WEIGHTS)
        write_lines(folder / METRICS, history.records)
        # Of all the time that went into it, before an interruption too.
        seconds = max(seconds, history.records[-1]["seconds"]) if history.records else seconds
        summary = training_numbers(vae, history, seconds, options, world()[1])
        summary = {"interrupted": True} | ({} if origin is None else {"from": origin.to_json()}) | summary
        summary, failure = _judged(folder, vae, dataset, options, history, summary, seen.plan, progress, say)
        try:
            write_page(folder, asked, summary)
        except KeyboardInterrupt:  # what is left to write is written by who goes on
            summary = summary | {"interrupted": True}
        if not summary["interrupted"] and failure is None:
            finish(folder)
            if checkpoint is not None:
                checkpoints.remove(checkpoint)
    if failure is not None:
        raise ValueError(
            f"the pair was fitted and lies in {path}, but judging it failed: {failure}. "
            f"Try 'pyro-vae evaluate {path}', or the same command again."
        ) from failure
    return summary


def _judged(
    folder: Path, vae: Answers, dataset: Dataset, options: FitOptions, history: History, summary: dict[str, Any],
    plan: evaluation.Plan, progress: bool | None, say: Callable[[str], None],
) -> tuple[dict[str, Any], Exception | None]:  # fmt: skip
    """Draw a fitted pair and evaluate it, and write its summary: what was trained is worth more than what goes wrong
    after it.

    Returns:
        The summary, with ``interrupted`` true where the training was, or this is; and what failed.
    """
    failure: Exception | None = None
    records, interrupted = history.records, history.interrupted
    scored: dict[str, Any] = {}
    settings: dict[str, Any] = {"num_samples": plan.num_samples, "images": plan.images, "seed": options.seed}
    summary["protocol"] = evaluation.protocol(vae, dataset, **settings)
    summary["remarks"] = remarks(summary)
    write_json(folder / SUMMARY, summary)
    try:
        with contextlib.nullcontext() if interrupted else Setup() as setup:  # the others wait for the evaluation
            try:
                with alone():
                    if records:
                        views = {} if interrupted else second_view(vae, dataset, options)
                        report.draw(vae, dataset, records, {}, options, folder / FIGURES, views)
            except Exception as error:
                failure = error
            if setup is not None:
                say(_evaluating(plan, is_whole=plan.images == len(dataset.test)))
                first_says(settings)
                kept = evaluation.kept_for(folder / EVALUATED, folder / WEIGHTS, dataset, settings)
                scored = evaluation.evaluate(vae, dataset, **settings, progress=progress, kept=kept)
                setup.done()
    except KeyboardInterrupt:
        interrupted = True
    except Exception as error:
        failure = failure or error
    summary = {"interrupted": interrupted} | scored | {k: v for k, v in summary.items() if k != "interrupted"}
    try:
        summary["remarks"] = remarks(summary)
        write_json(folder / SUMMARY, summary)
        if scored and failure is None:
            report.draw_curve(vae, records, scored, options, folder / FIGURES)
    except KeyboardInterrupt:
        summary["interrupted"] = True
    return summary, failure


def _evaluate_with_first(vae: Answers, dataset: Dataset, path: Path) -> None:
    """Take a share in the evaluation that the first process leads, which has the numbers, and the words if it fails."""
    try:
        with Setup() as setup:
            settings = first_says(None)
            evaluation.evaluate(vae, dataset, **settings, progress=False, kept=Kept(path / EVALUATED))
            setup.done()
    except (Elsewhere, KeyboardInterrupt):
        return
    except Exception:
        time.sleep(1)  # torchrun ends all when one has failed, and the first is to have its say
        raise


def _evaluating(plan: evaluation.Plan, is_whole: bool) -> str:
    """What is evaluated, in a line."""
    text = f"evaluating {plan.images:,} test data, {plan.num_samples:,} samples each: {report.about(plan.seconds)}"
    if is_whole and plan.num_samples >= FULL_SAMPLES:
        return text
    return f"{text} (--full: {report.about(plan.full_seconds)})"


def _describe(options: FitOptions, dataset: Dataset, say: Callable[[str], None]) -> None:
    """Say what the data are, and what the networks see of them."""
    say(f"{dataset.name}: {len(dataset.train):,} to train, {len(dataset.test):,} to test, of {dataset.x_shape}")
    if options.standardize:
        say(
            f"standardized: the networks see each of {dataset.train[:1].numel()} numbers as (x - mean) / standard "
            "deviation of the training part; log p(x), ELBO and samples are of the data as they are "
            "(--no-standardize to leave it out)"
        )
