"""The commands on runs that are there already, as they are typed."""

from __future__ import annotations

import time
from typing import Any

import click

from pyro_vae.app.cli.group import DATA_DIR, DEVICE, JSON, PATH, RUN, SEED, TRUST, commands, done_by, word
from pyro_vae.app.configuration import at_least


@commands.command(short_help="Judge a run again: other samples, images or seed.")
@RUN
@TRUST
@click.option("--evaluation-samples", "-K", metavar="K", type=at_least(2), help="[default: the run's own]")
@click.option("--evaluation-images", metavar="N", type=at_least(2), help="[default: the run's own]")
@click.option("--full", is_flag=True, help="All test images, 5000 samples.")
@SEED
@DATA_DIR
@DEVICE
@JSON
@click.option("--refine", type=click.Choice(["semi-amortized", "hamiltonian"]), help="With the guide refined datum by "
              "datum, with the help of the model: gradient or Hamiltonian steps that are taken where they "
              "help.")  # fmt: skip
@click.option("--out", metavar="FILE", type=PATH, help="Write the JSON to a file too.")
@done_by("commands:evaluate_run", shared=True)
def evaluate() -> None:
    """Judge a run again: other samples, images or seed. The run folder stays as it is."""


@commands.command(short_help="Draw a run's pictures and report.html again.")
@RUN
@TRUST
@DATA_DIR
@done_by("commands:draw_run")
def draw() -> None:
    """Draw the pictures and report.html of a run again, of an unfinished one too."""


@commands.command(short_help="Say whose fault a run's gap is, and what to try next.")
@RUN
@TRUST
@click.option("--num-data", metavar="N", type=at_least(2), default=100, help="Test data looked at, at most. "
              "[default: 100]")  # fmt: skip
@click.option("--budget", metavar="SECONDS", type=click.FloatRange(1), default=110.0, help="From the start of the "
              "command; it takes no more. What does not fit is left out, with the reason. [default: 110]")  # fmt: skip
@click.option("--num-samples", "-K", metavar="K", type=at_least(2), help="Of the estimate of log p(x) that is "
              "judged. [default: the run's own evaluation samples]")  # fmt: skip
@SEED
@DATA_DIR
@DEVICE
@JSON
@click.option("--out", metavar="DIR", type=PATH, help="Where judgement.json and judgement.html "
              "go. [default: RUN]")  # fmt: skip
def judge(**options: Any) -> None:
    """Say whose fault a run's gap is: the family's, the encoder's or the estimator's, and what to try next.

    Writes judgement.json and judgement.html, and leaves the rest of the run as it is.
    """
    started = time.monotonic()  # the imports, too, are time that the budget is spent on
    from pyro_vae.app.commands import judge_run

    judge_run(**options, started=started)


@commands.command()
@RUN
@TRUST
@click.option("-n", "--number", metavar="N", type=click.IntRange(1, 10_000), default=64, help="[default: 64]")
@click.option("--pixels", type=word("mean", "draw"), default="mean", help="E[x | z], or a draw of p(x | z). "
              "[default: mean]")  # fmt: skip
@click.option("--out", metavar="FILE|DIR", type=PATH, help="A .png of all, a .npy array, or a "
              "folder for one PNG each. [default: RUN/figures/samples-<n>-seed<seed>.png]")  # fmt: skip
@click.option("--label", metavar="N|NAME", help="Of this class only, of a model that knows classes: conditional, "
              "semi-supervised, or the cluster of a mixture that was matched with it.")  # fmt: skip
@SEED
@done_by("images:sample_run")
def sample() -> None:
    """Draw new data from a run's model."""


@commands.command(short_help="Reconstruct image files, and score them.")
@RUN
@TRUST
@click.argument("images", nargs=-1, required=True, type=PATH)
@click.option("--out", metavar="FILE", type=PATH, help="[default: reconstructions.png]")
@click.option("--num-samples", "-K", metavar="K", type=at_least(2), default=1000, help="Importance samples per "
              "image. [default: 1000]")  # fmt: skip
@click.option("--label", metavar="N|NAME", help="The class of the images, which a conditional model takes.")
@SEED
@done_by("images:reconstruct_images")
def reconstruct() -> None:
    """Reconstruct image files, scaled and coloured as the run's data, and score them."""


@commands.command(short_help="Rank a run's test data from strange to ordinary.")
@RUN
@TRUST
@click.option("--score", type=word("log-likelihood", "reconstruction", "ratio", "regret"),
              help="ratio: log p(x) against the compressed size; regret: what refitting q to each datum gains. "
              "[default: log-likelihood; reconstruction for an autoencoder]")  # fmt: skip
@click.option("--num-samples", "-K", metavar="K", type=at_least(1), default=100, help="Samples. [default: 100]")
@click.option("--top", metavar="N", type=click.IntRange(1, 1000), default=16, help="How many to show. [default: 16]")
@click.option("--outliers", metavar="NAME|PATH", help="Data that should score higher; gives the ROC-AUC.")
@click.option("--outliers-dir", metavar="DIR", help="Where the files of a named outlier set lie.")
@click.option("--fit-outliers", is_flag=True, help="Crop and scale outlier images to the run's shape.")
@click.option("--out", metavar="FILE", type=PATH, help="Write all scores as CSV.")
@click.option("--picture", metavar="FILE", type=PATH, help="[default: RUN/figures/anomalies.png]")
@DATA_DIR
@SEED
@DEVICE
@done_by("ranking:rank_anomalies")
def anomalies() -> None:
    """Rank a run's test data from strange to ordinary, by log p(x) or by reconstruction error."""


@commands.command(short_help="Write mean and scale of q(z | x) for data.")
@RUN
@click.argument("data", metavar="DATA")
@TRUST
@click.option("--out", metavar="FILE", type=PATH, required=True, help="A .csv, a .npz (arrays mean and scale) or a "
              ".parquet (needs pandas and pyarrow).")  # fmt: skip
@DATA_DIR
@SEED
@done_by("encoding:encode_run")
def encode() -> None:
    """Write mean and scale of q(z | x) for data, one row each.

    DATA is a folder of images or an image (rows have their file names), an array in a .npy, any other data that fit
    takes, or train, validation or test, the run's own.
    """


@commands.command(short_help="Write encoder and decoder as .pt2 of torch.export.")
@RUN
@TRUST
@click.option("--out", metavar="DIR", type=PATH, help="[default: RUN/export]")
@done_by("exporting:export_run")
def export() -> None:
    """Write encoder and decoder as .pt2 files of torch.export, which run without this package.

    A file is kept only if it gives what the networks give, to 1e-6.
    """


@commands.command(short_help="Write a page to move through the latent space in.")
@RUN
@TRUST
@click.option("--out", metavar="FILE", type=PATH, help="A .html. [default: RUN/explore.html]")
@click.option("--num-data", metavar="N", type=at_least(1), default=1000, help="Test data on the plane, at most. "
              "[default: 1000]")  # fmt: skip
@click.option("--reference", metavar="N", type=at_least(0), default=0, help="Draw the exact posterior of the "
              "first N of them by Hamiltonian Monte Carlo, too. [default: 0]")  # fmt: skip
@SEED
@DATA_DIR
@done_by("explore.command:explore_run")
def explore() -> None:
    """Write a page to move through a run's latent space in: one HTML file that opens offline.

    The decoder is inside, and the images follow the pointer, the finger or the arrow keys.
    """


@commands.command(short_help="List runs with their numbers.")
@click.argument("folders", nargs=-1, metavar="[FOLDER ...]", type=PATH)
@click.option("--sort", type=word("time", "log-p", "elbo", "name", "data", "epochs", "seconds"), default="time",
              help="time: the latest first; numbers: the largest first; what has none comes last. "
              "[default: time]")  # fmt: skip
@click.option("--data", "only", metavar="NAME|PATH", help="Only runs on these data.")
@JSON
@done_by("listing:list_runs")
def runs() -> None:
    """List the runs in folders, at any depth, with their numbers. [default: runs]

    A damaged run is a row with the reason. Nothing but JSON is read.
    """
