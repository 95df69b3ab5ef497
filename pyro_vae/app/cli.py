"""The command `pyro-vae`.

Nothing heavy is imported before a command runs, so that ``--help`` is quick. Every
error that the user can mend is one line on stderr and exit code 2.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from pyro_vae.app.defaults import CHOICES, DATASETS, OTHER
from pyro_vae.app.groups import GroupedCommand, GroupedOption
from pyro_vae.parts import names
from pyro_vae.version import __version__

PROGRAM = "pyro-vae"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: Arguments; those of the process if omitted.
    Returns:
        The exit code: 0, 2 after an error that the user can mend, 130 after Ctrl-C.
    """
    if argv is None:
        # A cluster's time limit is a Ctrl-C: what was trained is kept, and nothing half-written.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with _warnings_as_lines():
            code = commands.main(args=None if argv is None else list(argv), prog_name=PROGRAM, standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except (click.exceptions.Abort, KeyboardInterrupt):
        click.echo(f"{PROGRAM}: interrupted", err=True)
        return 130
    except BrokenPipeError:
        # The reader has gone (| head): nothing is left to say, and nowhere to say it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except click.ClickException as error:
        return _failed(_message(error))
    except (ValueError, OSError, MemoryError) as error:
        if os.environ.get("PYRO_VAE_DEBUG") == "1":
            raise
        return _failed(str(error) or type(error).__name__)


def _failed(message: str) -> int:
    click.echo(f"{PROGRAM}: error: {' '.join(message.split())}", err=True)
    return 2


def _message(error: click.ClickException) -> str:
    text = error.format_message()
    text = text[:1].lower() + text[1:]
    context = getattr(error, "ctx", None)
    if context is not None:
        text = f"{text.rstrip('.?') + ('?' if text.endswith('?') else '.')} Try '{context.command_path} --help'."
    return text


@contextmanager
def _warnings_as_lines() -> Iterator[None]:
    def show(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
        if issubclass(category, UserWarning):
            click.echo(f"{PROGRAM}: warning: {' '.join(str(message).split())}", err=True)

    # Torch's compiler looks for a GPU's tools, and logs that there is no GPU: on a CPU that is no news.
    logger = logging.getLogger("torch.utils.cpp_extension")
    logger.addFilter(_is_news)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = show
            yield
    finally:
        logger.removeFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith("No CUDA runtime is found")


@click.group(
    invoke_without_command=True,
    epilog="Start with 'pyro-vae fit': the digits, in under a minute. PYRO_VAE_DEBUG=1 shows tracebacks.",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, prog_name=PROGRAM, message="%(prog)s %(version)s")
@click.pass_context
def commands(context: click.Context) -> None:
    """Fit, look at and judge variational autoencoders written as Pyro programs."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


def _epilog() -> str:
    rows = [f"{'data':16} {'network':19} {'D':>3} {'likelihood':10} {'epochs':>6} {'batch':>5} {'rate':>6}"]
    for row in [*DATASETS.values(), OTHER]:
        network = " ".join([row.network, ",".join(map(str, row.hidden))]).strip()
        rows.append(
            f"{row.data[:16]:16} {network:19} {row.latent_dim:3} {row.likelihood or 'by data':10} {row.epochs:6} "
            f"{row.batch_size:5} {row.learning_rate:6g}"
        )
    return "\b\nDefaults by dataset:\n" + "\n".join("  " + row for row in rows)


def _parts(kind: str) -> str:
    return ", ".join(names.PARTS[kind])


def _choice(name: str) -> str:
    return "[" + "|".join(CHOICES[name]) + "]"


Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def _option(group: str, name: str, metavar: str, text: str, kind: Any = str, **more: Any) -> Decorator:
    return click.option(name, cls=GroupedOption, group=group, metavar=metavar, help=text, type=kind, **more)


def _options(*decorators: Decorator) -> Decorator:
    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return decorate


_FIT = _options(
    _option("Data", "--data", "NAME|PATH", f"{', '.join(DATASETS)}, a folder of images, or a file of arrays (.npy, "
            ".npz, .mat, .amat, IDX). [default: digits]"),
    _option("Data", "--data-dir", "DIR", "Where the files of a named dataset lie. [default: $PYRO_VAE_DATA or "
            "~/.cache/pyro_vae]"),
    _option("Data", "--binarization", _choice("binarization"), "How grey levels become zeros and ones: drawn afresh "
            "each time, once, cut at one half, or not at all. [default: by dataset]"),
    click.option("--dequantize/--no-dequantize", cls=GroupedOption, group="Data", default=None,
                 help="Spread 8-bit levels by uniform noise, for a normal likelihood. [default: by dataset]"),
    _option("Data", "--image-size", "N", "Scale images to N x N.", int),
    _option("Data", "--crop", "N", "Cut out the centred N x N square first.", int),
    _option("Data", "--channels", "[1|3]", "Make images grey or colour.", int),
    _option("Data", "--background", "white|black|0..255", "What transparent pixels lie on. [default: white]"),
    _option("Data", "--images", "KEY", "Which array of a file is the data. [default: by name, then by shape]"),
    _option("Data", "--labels", "KEY", "Which array of a file is the labels. [default: by name]"),
    _option("Data", "--limit", "N", "Train on the first N images only.", int),
    _option("Model", "--network", _choice("network"), "Fully connected, plain or gated, convolutional, plain or "
            "residual, or no hidden layer."),
    _option("Model", "--hidden", "N,N,...", "Widths (mlp, gated) or channels (conv, residual) from the data to the "
            "latent."),
    _option("Model", "--activation", _choice("activation"), "[default: silu]"),
    _option("Model", "--latent-dim", "D", "Number of latent dimensions.", int),
    _option("Model", "--posterior", "NAME", f"q(z|x): {_parts('posterior')}, or module:Class. point is a plain "
            "autoencoder, which has no ELBO and no log p(x). [default: diagonal]"),
    _option("Model", "--posterior-options", "A=1,B=2", "Its options, such as transforms=2,bins=8 of nsf."),
    _option("Model", "--prior", "NAME", f"p(z): {_parts('prior')}, or module:Class. [default: normal; with "
            "von-mises-fisher hyperspherical]"),
    _option("Model", "--prior-options", "A=1,B=2", "Its options, such as num_components of vamp. "
            "[default: 500; of flows 1 for 100 training images]"),
    _option("Model", "--likelihood", "NAME", f"p(x|z): {_parts('likelihood')}, or module:Class. [default: by data]"),
    _option("Model", "--likelihood-options", "A=1,B=2", "Its options, such as num_components=5 of logistic-mixture."),
    _option("Model", "--scale", "S|learned|per-pixel|network", "Of the normal likelihood: a number, one learned, "
            "one for each pixel, or a function of z. [default: learned]"),
    click.option("--standardize/--no-standardize", cls=GroupedOption, group="Model", default=None,
                 help="Whether the networks of a normal likelihood work on (x - mean) / standard deviation of each "
                 "column of the training part; log p(x) stays that of x. [default: for vectors of floats]"),
    _option("Training", "--bound", _choice("bound"), "What is maximised. [default: elbo]"),
    _option("Training", "--bound-options", "A=1,B=2", "Options of a bound, such as alpha=0.5 of renyi."),
    _option("Training", "--num-samples", "K", "Samples in the bound. [default: 1 for the elbo, else 50]", int),
    _option("Training", "--estimator", _choice("estimator"), "Of the bound's gradient. [default: reparameterized]"),
    _option("Training", "--regularizers", "A=1,B=2", "Added to the training loss, by weight: mmd, total-correlation, "
            "free-bits (in nats)."),
    _option("Training", "--epochs", "N", "Passes through the data.", int),
    _option("Training", "--batch-size", "B", "Images in a step.", int),
    _option("Training", "--learning-rate", "RATE", "Peak learning rate of Adam.", float),
    _option("Training", "--schedule", _choice("schedule"), "Of the learning rate. [default: one-cycle]"),
    _option("Training", "--clip-norm", "X", "Upper limit of the gradient norm; 0 for none.", float),
    _option("Training", "--kl-warmup", "N", "Epochs over which the weight of the KL rises to 1. [default: 0]", int),
    _option("Training", "--kl-warmup-steps", "N", "The same in steps, instead.", int),
    _option("Training", "--patience", "N", "Stop after N epochs without a better validation bound, and keep the best "
            "weights; 0 for never. [default: 0]", int),
    _option("Training", "--seed", "N", "Same seed, same machine: the same weights to the bit. [default: 0]", int),
    _option("Training", "--device", "NAME", "cpu, cuda, cuda:1, mps; auto takes a GPU, if any. [default: auto]"),
    _option("Training", "--threads", "N", "CPU threads while training; small networks are faster on one. "
            "[default: torch's; for digits and linear-gaussian 1]", int),
    _option("Training", "--compile", _choice("compile"), "Capture and compile the training steps; auto does where it "
            "pays. [default: auto]"),
    _option("Training", "--matmul-precision", _choice("matmul_precision"), "medium is faster on AMD CPUs, bfloat16 "
            "where the hardware multiplies it. "
            "[default: highest]"),
    _option("Evaluation", "--evaluation-samples", "K", "Importance samples per image. [default: 5000]", int),
    _option("Evaluation", "--evaluation-images", "N", "Evaluate on the first N test images. [default: all]", int),
    _option("Run", "--out", "RUN", "Run folder to make. [default: runs/<data>-<n>]"),
    _option("Run", "--checkpoint", "FILE", "A .safetensors file for the state after each epoch: the same command goes "
            "on from it, to the bit. It is removed when the run is written."),
    _option("Run", "--config", "FILE", "Read options from YAML or JSON, such as a run's config.json; the command line "
            "wins.", click.Path(path_type=Path)),
    click.option("--quiet", cls=GroupedOption, group="Run", is_flag=True, default=None, help="Print errors only."),
)  # fmt: skip


@commands.command(cls=GroupedCommand, epilog=_epilog())
@_FIT
def fit(config: Path | None, **given: Any) -> int:
    """Fit a VAE to images, judge it on test data, and write a run folder.

    The folder holds config.json, summary.json, metrics.jsonl, weights.safetensors and
    figures. It appears when all is written; Ctrl-C keeps what was trained so far.

    \b
    Examples:
      pyro-vae fit
      pyro-vae fit --data mnist --data-dir ~/mnist --out runs/mnist
      pyro-vae fit --data photos/ --image-size 32 --latent-dim 64
      pyro-vae fit --config runs/mnist/config.json --seed 1
    """
    from pyro_vae.app.configuration import convert, read_config
    from pyro_vae.app.defaults import option, resolve
    from pyro_vae.app.runs import free_path, refuse_existing

    options_given = {name: convert(name, value, option(name)) for name, value in given.items() if value is not None}
    values = (read_config(config) if config is not None else {}) | options_given
    out, quiet = values.pop("out", None), values.pop("quiet", False)
    checkpoint = values.pop("checkpoint", None)
    options = resolve(values)
    path = Path(out).expanduser() if out is not None else free_path(options.data)
    refuse_existing(path)

    from pyro_vae.app.fitting import fit_run
    from pyro_vae.app.report import show

    saved = None if checkpoint is None else Path(checkpoint).expanduser()
    summary = fit_run(options, path, checkpoint=saved, progress=False if quiet else None, say=_say(quiet))
    if not quiet:
        show(summary, path)
    if summary["interrupted"]:
        click.echo(f"{PROGRAM}: interrupted: what was trained so far is in {path}", err=True)
        return 130
    return 0


_run = click.argument("run", type=click.Path(path_type=Path))
_data_dir = click.option("--data-dir", metavar="DIR", help="Where the data lie now. [default: where they were]")
_device = click.option("--device", metavar="NAME", default="auto", help="[default: auto]")
_trust = click.option("--trust", metavar="MODULE:CLASS", multiple=True, help="Import this part of a run, code of your "
                      "own.")  # fmt: skip
_seed = click.option("--seed", metavar="N", type=click.IntRange(0), help="[default: the run's own]")


@commands.command()
@_run
@_trust
@click.option("--evaluation-samples", "-K", metavar="K", type=click.IntRange(2), help="[default: the run's own]")
@click.option("--evaluation-images", metavar="N", type=click.IntRange(2), help="[default: the run's own]")
@_seed
@_data_dir
@_device
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
@click.option("--out", metavar="FILE", type=click.Path(path_type=Path), help="Write the JSON to a file too.")
def evaluate(**options: Any) -> None:
    """Judge a run again: other samples, images or seed. The run folder stays as it is."""
    from pyro_vae.app.commands import evaluate_run

    evaluate_run(**options)


@commands.command()
@_run
@_trust
@click.option("--num-data", metavar="N", type=click.IntRange(2), default=100, help="Test data looked at, at most. "
              "[default: 100]")  # fmt: skip
@click.option("--budget", metavar="SECONDS", type=click.FloatRange(1), default=110.0, help="From the start of the "
              "command; it takes no more. What does not fit is left out, with the reason. [default: 110]")  # fmt: skip
@click.option("--num-samples", "-K", metavar="K", type=click.IntRange(2), help="Of the estimate of log p(x) that is "
              "judged. [default: the run's own evaluation samples]")  # fmt: skip
@_seed
@_data_dir
@_device
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
@click.option("--out", metavar="DIR", type=click.Path(path_type=Path), help="Where judgement.json and judgement.html "
              "go. [default: RUN]")  # fmt: skip
def judge(**options: Any) -> None:
    """Say whose fault a run's gap is: the family's, the encoder's or the estimator's, and what to try next.

    Writes judgement.json and judgement.html, and leaves the rest of the run as it is.
    """
    started = time.monotonic()  # the imports, too, are time that the budget is spent on
    from pyro_vae.app.commands import judge_run

    judge_run(**options, started=started)


@commands.command()
@_run
@_trust
@click.option("-n", "--number", metavar="N", type=click.IntRange(1, 10_000), default=64, help="[default: 64]")
@click.option("--pixels", type=click.Choice(["mean", "draw"]), default="mean", help="E[x | z], or a draw of p(x | z). "
              "[default: mean]")  # fmt: skip
@click.option("--out", metavar="FILE|DIR", type=click.Path(path_type=Path), help="A .png of all, a .npy array, or a "
              "folder for one PNG each. [default: RUN/figures/samples-<n>-seed<seed>.png]")  # fmt: skip
@_seed
def sample(**options: Any) -> None:
    """Draw new data from a run's model."""
    from pyro_vae.app.commands import sample_run

    sample_run(**options)


@commands.command()
@_run
@_trust
@click.argument("images", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--out", metavar="FILE", type=click.Path(path_type=Path), help="[default: reconstructions.png]")
@click.option("--num-samples", "-K", metavar="K", type=click.IntRange(2), default=1000, help="Importance samples per "
              "image. [default: 1000]")  # fmt: skip
@_seed
def reconstruct(**options: Any) -> None:
    """Reconstruct image files, scaled and coloured as the run's data, and score them."""
    from pyro_vae.app.commands import reconstruct_images

    reconstruct_images(**options)


@commands.command()
@_run
@_trust
@click.option("--score", type=click.Choice(["log-likelihood", "reconstruction"]), help="[default: log-likelihood; "
              "reconstruction for an autoencoder]")  # fmt: skip
@click.option("--num-samples", "-K", metavar="K", type=click.IntRange(1), default=100, help="Samples. [default: 100]")
@click.option("--top", metavar="N", type=click.IntRange(1, 1000), default=16, help="How many to show. [default: 16]")
@click.option("--outliers", metavar="NAME|PATH", help="Data that should score higher; gives the ROC-AUC.")
@click.option("--outliers-dir", metavar="DIR", help="Where the files of a named outlier set lie.")
@click.option("--fit-outliers", is_flag=True, help="Crop and scale outlier images to the run's shape.")
@click.option("--out", metavar="FILE", type=click.Path(path_type=Path), help="Write all scores as CSV.")
@click.option("--picture", metavar="FILE", type=click.Path(path_type=Path), help="[default: RUN/figures/anomalies.png]")
@_data_dir
@_seed
@_device
def anomalies(**options: Any) -> None:
    """Rank a run's test data from strange to ordinary, by log p(x) or by reconstruction error."""
    from pyro_vae.app.commands import rank_anomalies

    rank_anomalies(**options)


@commands.command()
@click.option("--posterior", "posteriors", metavar="NAME", multiple=True, help="Only these. [default: all]")
@click.option("--bound", "bounds", metavar="NAME", multiple=True, help="Only these. [default: all]")
@click.option("--estimator", "estimators", metavar="NAME", multiple=True, help="Only these. [default: all]")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def combinations(
    posteriors: tuple[str, ...], bounds: tuple[str, ...], estimators: tuple[str, ...], as_json: bool
) -> int:
    """Try every posterior with every bound and gradient estimator: what trains, what is refused, and why."""
    import json

    from pyro_vae.app import studies

    for kind, given in (("bound", bounds), ("estimator", estimators)):
        for name in given:
            if name not in CHOICES[kind]:
                raise ValueError(f"got --{kind} {name!r}, wanted one of {', '.join(CHOICES[kind])}.")
    for name in posteriors:
        names.check("posterior", name)
    outcomes = studies.combinations(posteriors or None, bounds or None, estimators or None)
    click.echo(json.dumps(studies.as_records(outcomes), indent=2) if as_json else studies.table(outcomes))
    return 1 if any(outcome.result == "fails" for outcome in outcomes) else 0


def _say(quiet: bool) -> Callable[[str], None]:
    return (lambda _: None) if quiet else lambda text: click.echo(text, err=True)


if __name__ == "__main__":
    sys.exit(main())
