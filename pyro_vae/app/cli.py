"""The command `pyro-vae`.

Nothing heavy is imported before a command runs, so that ``--help`` is quick. Every
error that the user can mend is one line on stderr and exit code 2.
"""

from __future__ import annotations

import functools
import os
import re
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from importlib import import_module
from pathlib import Path
from typing import Any

import click

from pyro_vae import __version__
from pyro_vae.app import configuration
from pyro_vae.app.configuration import GroupedCommand, at_least, convert, read_config
from pyro_vae.app.defaults import CHOICES, option, resolve
from pyro_vae.atomic import reason_of
from pyro_vae.news import no_news_of_a_gpu
from pyro_vae.parts import names
from pyro_vae.words import did_you_mean, spelled

PROGRAM = "pyro-vae"
_LONGEST = 4096  # characters of a word that is typed


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns the exit code: 0, 2 after an error that the user can mend, 130 after Ctrl-C."""
    if argv is None:
        # A cluster's time limit is a Ctrl-C: what was trained is kept, and nothing half-written.
        # So is a terminal that is closed, unless nohup says that it is none of ours.
        for which in (signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):
            if signal.getsignal(which) is not signal.SIG_IGN:
                signal.signal(which, signal.default_int_handler)
    try:
        with _warnings_as_lines():
            _check_words(sys.argv[1:] if argv is None else argv)
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
        where = _option_of(getattr(error, "filename", None), sys.argv[1:] if argv is None else argv)
        if where is not None and isinstance(error, OSError):
            return _failed(f"got {where}: {reason_of(error)}")
        return _failed(str(error) or type(error).__name__)


def _failed(message: str) -> int:
    line = re.sub(r"\S{200,}", lambda word: f"{word[0][:80]}...", " ".join(message.split()))
    click.echo(f"{PROGRAM}: error: {line}", err=True)
    return 2


def _option_of(path: Any, argv: Sequence[str]) -> str | None:
    """A word that was typed with a path that the system refused, and the option before it."""
    for before, word in zip(["", *argv], argv, strict=False):
        if isinstance(path, str) and word and Path(word).absolute() == Path(path).absolute():
            return f"{before} {word}" if before.startswith("-") else word
    return None


def _check_words(argv: Sequence[str]) -> None:
    """Refuse what can be no name and no path."""
    for before, word in zip(["", *argv], argv, strict=False):
        if "\0" in word or len(word) > _LONGEST or not word.strip():
            name = next((each.partition("=")[0] for each in (word, before) if each.startswith("-")), "an argument")
            what = (
                "a null character" if "\0" in word else f"{len(word):,} characters" if word.strip() else "nothing in it"
            )
            raise ValueError(f"got {name[:80]} with {what}, wanted text of 1 to {_LONGEST:,} characters.")


def _message(error: click.ClickException) -> str:
    text = error.format_message()
    text = text[:1].lower() + text[1:]
    context = getattr(error, "ctx", None)
    if context is not None:
        text = _hinted(text, error, context)
        text = f"{text.rstrip('.?') + ('?' if text.endswith('?') else '.')} Try '{context.command_path} --help'."
    return text


def _hinted(text: str, error: click.ClickException, context: click.Context) -> str:
    """What click refuses, with a remedy where it has none or a wrong one."""
    if isinstance(error, click.NoSuchOption):
        known = [name for parameter in context.command.params for name in parameter.opts if name.startswith("--")]
        return f"no such option '{error.option_name}'.{did_you_mean(error.option_name, known)}"
    if isinstance(error, click.MissingParameter) and error.param is not None and error.param.name == "run":
        return f"{text.rstrip('.')}, a run folder: '{PROGRAM} runs' lists those in runs."
    if context.command.name == "fit" and "unexpected extra argument" in text:
        return f"{text.rstrip('.')}: each option has its name. Data are named by --data, the run's folder by --out."
    return text


@contextmanager
def _warnings_as_lines() -> Iterator[None]:
    def show(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
        if issubclass(category, UserWarning):
            click.echo(f"{PROGRAM}: warning: {' '.join(str(message).split())}", err=True)

    with no_news_of_a_gpu(), warnings.catch_warnings():
        warnings.showwarning = show
        yield


# Commands that several processes share, and why another is done by one.
_SHARED = ("fit", "evaluate", "compare")
_BY_ITSELF = {"judge": "whose stages are as long as the clock of one process allows"}


class _Commands(click.Group):
    """Commands of which a typo gets a hint, listed in the order in which they are used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in self.commands and not args[0].startswith("-"):
            known = self.list_commands(ctx)
            raise ValueError(
                f"unknown command {args[0]!r}, wanted one of {', '.join(known)}." + did_you_mean(args[0], known)
            )
        return super().resolve_command(ctx, args)


@click.group(
    cls=_Commands,
    invoke_without_command=True,
    epilog="Start with 'pyro-vae fit': the digits, in under a minute. PYRO_VAE_DEBUG=1 shows tracebacks.",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, prog_name=PROGRAM, message="%(prog)s %(version)s")
@click.pass_context
def commands(context: click.Context) -> None:
    """Fit, look at and judge variational autoencoders written as Pyro programs."""
    from pyro_vae.app.processes import number

    command = context.invoked_subcommand
    if command not in (None, *_SHARED) and number() > 1:
        why = _BY_ITSELF.get(command, "which would do it as often: fit, evaluate and compare share their work out")
        raise ValueError(f"got {command} in {number()} processes, {why}. Run {PROGRAM} {command} by itself.")
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


@commands.command(
    cls=GroupedCommand,
    short_help="Fit a VAE, judge it on test data, write a run folder.",
    epilog=configuration.epilog(),
)
@configuration.FIT
def fit(config: Path | None, resume: Path | None, trust: tuple[str, ...], **given: Any) -> int:
    """Fit a VAE to images, judge it on test data, and write a run folder.

    The folder holds config.json, summary.json, metrics.jsonl, weights.safetensors,
    figures and report.html. First pictures appear after the first epoch. Ctrl-C keeps
    what was trained so far, and the same command goes on in the same folder, as
    --resume RUN does after whatever ended it.

    \b
    Examples:
      pyro-vae fit
      pyro-vae fit --data mnist --data-dir ~/mnist --out runs/mnist
      pyro-vae fit --data photos/ --image-size 32 --latent-dim 64
      pyro-vae fit --model semi-supervised --model-options num_labelled=100
      pyro-vae fit --config runs/mnist --seed 1
      pyro-vae fit --from runs/mnist --epochs 50
      pyro-vae fit --resume runs/mnist-2
      torchrun --nproc-per-node 2 -m pyro_vae fit --data mnist --data-dir ~/mnist
    """
    from pyro_vae.app import processes

    with processes.group():
        return _fit(config, resume, trust, given)


def _fit(config: Path | None, resume: Path | None, trust: tuple[str, ...], given: dict[str, Any]) -> int:
    from pyro_vae.app import following, starting
    from pyro_vae.app.processes import of_first
    from pyro_vae.app.runs import asked_of, check_place, default_path, is_unfinished

    options_given = {name: convert(name, value, option(name)) for name, value in given.items() if value is not None}
    values = (read_config(config) if config is not None else {}) | options_given
    out, quiet = values.pop("out", None), values.pop("quiet", False)
    checkpoint = values.pop("checkpoint", None)
    if resume is not None:
        other = [*values, *(["out"] if out is not None else []), *(["config"] if config is not None else [])]
        if other:
            raise ValueError(
                f"got --resume {resume} with {option(other[0])}, wanted no other option: a run goes on with those that "
                "it was begun with. Begin another one with --out, or go on from a finished one with --from."
            )
        values, began = asked_of(resume.expanduser())
        out, checkpoint = resume, began if checkpoint is None else checkpoint
    options = resolve(starting.merged(values) if values.get("from_run") and resume is None else values)
    asked = options.to_json()

    def place() -> Path:
        found = Path(out).expanduser() if out is not None else default_path(options.data, asked)
        check_place(found, asked)
        return found

    path = of_first(place)
    here = path is not None  # in the process that has the folder
    quiet, path = quiet or not here, path or Path(out or "runs")
    if here and is_unfinished(path) and not quiet:
        click.echo(f"going on with {path} (--out another folder to start afresh)", err=True)

    from pyro_vae.app.fitting import fit_run
    from pyro_vae.app.report import lines, show_lines
    from pyro_vae.app.run_page import files

    saved = None if checkpoint is None else Path(checkpoint).expanduser()
    summary = fit_run(options, path, checkpoint=saved, progress=False if quiet else None, say=_say(quiet), trust=trust)
    if not quiet:
        show_lines([*lines(summary, path), *files(path, summary)])
    if summary["interrupted"]:
        if here:
            click.echo(
                f"{PROGRAM}: interrupted: what was trained so far is in {path}, and the same command goes on with it, "
                f"as '{PROGRAM} fit --resume {path}' does",
                err=True,
            )
        return 130
    if not quiet:
        following.say(following.after("fit", path, summary))
    return 0


def _choice(kind: str, name: str) -> str:
    found = spelled(name, CHOICES[kind])
    if found is None:
        hint = did_you_mean(name, CHOICES[kind])
        raise ValueError(f"got --{kind} {name!r}, wanted one of {', '.join(CHOICES[kind])}.{hint}")
    return found


def _done_by(path: str, shared: bool = False) -> Callable[[Callable[[], None]], Callable[..., None]]:
    """A command whose options all go to a function of `pyro_vae.app`, which is imported when it runs; of several
    processes, if they share its work."""
    module, _, name = path.partition(":")

    def decorate(described: Callable[[], None]) -> Callable[..., None]:
        @functools.wraps(described)
        def run(**options: Any) -> None:
            from pyro_vae.app.processes import together

            with together() if shared else nullcontext():
                getattr(import_module(f"pyro_vae.app.{module}"), name)(**options)

        return run

    return decorate


def _word(*words: str) -> click.Choice[str]:
    return click.Choice(words, case_sensitive=False)


_PATH = click.Path(path_type=Path)
_run = click.argument("run", type=_PATH)
_data_dir = click.option("--data-dir", metavar="DIR", help="Where the data lie now. [default: where they were]")
_device = click.option("--device", metavar="NAME", default="auto", help="[default: auto]")
_trust = click.option("--trust", metavar="MODULE:CLASS", multiple=True, help="Import this part of a run, code of your "
                      "own.")  # fmt: skip
_json = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
_seed = click.option("--seed", metavar="N", type=click.IntRange(0, 2**63 - 1), help="[default: the run's own]")


@commands.command(short_help="Judge a run again: other samples, images or seed.")
@_run
@_trust
@click.option("--evaluation-samples", "-K", metavar="K", type=at_least(2), help="[default: the run's own]")
@click.option("--evaluation-images", metavar="N", type=at_least(2), help="[default: the run's own]")
@click.option("--full", is_flag=True, help="All test images, 5000 samples.")
@_seed
@_data_dir
@_device
@_json
@click.option("--refine", type=click.Choice(["semi-amortized", "hamiltonian"]), help="With the guide refined datum by "
              "datum, with the help of the model: gradient or Hamiltonian steps that are taken where they "
              "help.")  # fmt: skip
@click.option("--out", metavar="FILE", type=_PATH, help="Write the JSON to a file too.")
@_done_by("commands:evaluate_run", shared=True)
def evaluate() -> None:
    """Judge a run again: other samples, images or seed. The run folder stays as it is."""


@commands.command(short_help="Draw a run's pictures and report.html again.")
@_run
@_trust
@_data_dir
@_done_by("commands:draw_run")
def draw() -> None:
    """Draw the pictures and report.html of a run again, of an unfinished one too."""


@commands.command(short_help="Say whose fault a run's gap is, and what to try next.")
@_run
@_trust
@click.option("--num-data", metavar="N", type=at_least(2), default=100, help="Test data looked at, at most. "
              "[default: 100]")  # fmt: skip
@click.option("--budget", metavar="SECONDS", type=click.FloatRange(1), default=110.0, help="From the start of the "
              "command; it takes no more. What does not fit is left out, with the reason. [default: 110]")  # fmt: skip
@click.option("--num-samples", "-K", metavar="K", type=at_least(2), help="Of the estimate of log p(x) that is "
              "judged. [default: the run's own evaluation samples]")  # fmt: skip
@_seed
@_data_dir
@_device
@_json
@click.option("--out", metavar="DIR", type=_PATH, help="Where judgement.json and judgement.html "
              "go. [default: RUN]")  # fmt: skip
def judge(**options: Any) -> None:
    """Say whose fault a run's gap is: the family's, the encoder's or the estimator's, and what to try next.

    Writes judgement.json and judgement.html, and leaves the rest of the run as it is.
    """
    started = time.monotonic()  # the imports, too, are time that the budget is spent on
    from pyro_vae.app.commands import judge_run

    judge_run(**options, started=started)


@commands.command(cls=GroupedCommand)
@click.argument("runs", nargs=-1, type=_PATH, metavar="[RUN RUN...|STUDY]")
@configuration.COMPARE
def compare(runs: tuple[Path, ...], **given: Any) -> None:
    """Say who is ahead, by how much, and whether that holds.

    Of finished runs at once, on the same test data with the same noise; or of a study: arms that differ in options of
    fit, times seeds, from --vary or a YAML file. A study that was broken off is gone on with by the same command.

    \b
    Examples:
      pyro-vae compare runs/a runs/b
      pyro-vae compare --vary posterior=diagonal,full,iaf --seeds 2
      pyro-vae compare --vary posterior=full,iaf --vary bound=elbo,iwae
      pyro-vae compare --vary posterior=diagonal,full,iaf --frozen runs/mnist
      pyro-vae compare study.yaml --jobs 4
    """
    from pyro_vae.app.processes import together

    with together():
        _compare(runs, given)


def _compare(runs: tuple[Path, ...], given: dict[str, Any]) -> None:
    from pyro_vae.app.compare_command import compare_runs, compare_study
    from pyro_vae.app.processes import number

    asked = {name: given.pop(name) for name in list(given) if name in OPTIONS_OF_COMPARE}
    fixed = {name: convert(name, value, option(name)) for name, value in given.items() if value is not None}
    files = [path for path in runs if path.is_file() or (path / "study.json").is_file()]
    if files or asked["vary"]:
        if files and (len(runs) > 1 or asked["vary"]):
            raise ValueError(f"got {' '.join(map(str, runs))} with other runs or --vary, wanted a study alone.")
        if runs and not files:
            raise ValueError(f"got --vary and the runs {' '.join(map(str, runs))}, wanted one of them.")
        if number() > 1:
            raise ValueError(
                f"got a study in {number()} processes, which deals its fits out by itself. Run {PROGRAM} compare by "
                "itself, with --jobs N, or --backend slurm on several machines."
            )
        compare_study(files[0] if files else None, fixed, say=_say(asked["as_json"]), **asked)
        return
    gone = [path for path in runs if not path.exists()]
    if gone:
        raise ValueError(
            f"got {gone[0]}, which is not there, wanted run folders, or a study: a YAML file or its folder."
        )
    if len(runs) < 2:
        raise ValueError(f"got {len(runs)} runs, wanted at least two, a study file, or --vary NAME=A,B,...")
    for name in ("seeds", "frozen", "freeze", "budget", "jobs", "address", "retry", "dry_run"):
        if asked[name]:
            raise ValueError(f"got {option(name)} for runs that are fitted, which is for studies. Leave it out.")
    compare_runs(runs, fixed, **{name: asked[name] for name in ("out", "table", "as_json", "trust")})


OPTIONS_OF_COMPARE = ("vary", "seeds", "frozen", "freeze", "budget", "jobs", "backend", "address", "retry", "dry_run",
                      "out", "table", "as_json", "trust")  # fmt: skip


@commands.command("report", short_help="Write a study's tables and page again.")
@click.argument("folder", type=_PATH, metavar="STUDY")
@_trust
@_done_by("compare_command:report_study")
def report_command() -> None:
    """Write the tables and the page of a study again, of an unfinished one as it stands."""


@commands.command()
@_run
@_trust
@click.option("-n", "--number", metavar="N", type=click.IntRange(1, 10_000), default=64, help="[default: 64]")
@click.option("--pixels", type=_word("mean", "draw"), default="mean", help="E[x | z], or a draw of p(x | z). "
              "[default: mean]")  # fmt: skip
@click.option("--out", metavar="FILE|DIR", type=_PATH, help="A .png of all, a .npy array, or a "
              "folder for one PNG each. [default: RUN/figures/samples-<n>-seed<seed>.png]")  # fmt: skip
@click.option("--label", metavar="N|NAME", help="Of this class only, of a model that knows classes: conditional, "
              "semi-supervised, or the cluster of a mixture that was matched with it.")  # fmt: skip
@_seed
@_done_by("commands:sample_run")
def sample() -> None:
    """Draw new data from a run's model."""


@commands.command(short_help="Reconstruct image files, and score them.")
@_run
@_trust
@click.argument("images", nargs=-1, required=True, type=_PATH)
@click.option("--out", metavar="FILE", type=_PATH, help="[default: reconstructions.png]")
@click.option("--num-samples", "-K", metavar="K", type=at_least(2), default=1000, help="Importance samples per "
              "image. [default: 1000]")  # fmt: skip
@click.option("--label", metavar="N|NAME", help="The class of the images, which a conditional model takes.")
@_seed
@_done_by("commands:reconstruct_images")
def reconstruct() -> None:
    """Reconstruct image files, scaled and coloured as the run's data, and score them."""


@commands.command(short_help="Rank a run's test data from strange to ordinary.")
@_run
@_trust
@click.option("--score", type=_word("log-likelihood", "reconstruction", "ratio", "regret"),
              help="ratio: log p(x) against the compressed size; regret: what refitting q to each datum gains. "
              "[default: log-likelihood; reconstruction for an autoencoder]")  # fmt: skip
@click.option("--num-samples", "-K", metavar="K", type=at_least(1), default=100, help="Samples. [default: 100]")
@click.option("--top", metavar="N", type=click.IntRange(1, 1000), default=16, help="How many to show. [default: 16]")
@click.option("--outliers", metavar="NAME|PATH", help="Data that should score higher; gives the ROC-AUC.")
@click.option("--outliers-dir", metavar="DIR", help="Where the files of a named outlier set lie.")
@click.option("--fit-outliers", is_flag=True, help="Crop and scale outlier images to the run's shape.")
@click.option("--out", metavar="FILE", type=_PATH, help="Write all scores as CSV.")
@click.option("--picture", metavar="FILE", type=_PATH, help="[default: RUN/figures/anomalies.png]")
@_data_dir
@_seed
@_device
@_done_by("commands:rank_anomalies")
def anomalies() -> None:
    """Rank a run's test data from strange to ordinary, by log p(x) or by reconstruction error."""


@commands.command(short_help="Write mean and scale of q(z | x) for data.")
@_run
@click.argument("data", metavar="DATA")
@_trust
@click.option("--out", metavar="FILE", type=_PATH, required=True, help="A .csv, a .npz (arrays mean and scale) or a "
              ".parquet (needs pandas and pyarrow).")  # fmt: skip
@_data_dir
@_seed
@_done_by("encoding:encode_run")
def encode() -> None:
    """Write mean and scale of q(z | x) for data, one row each.

    DATA is a folder of images or an image (rows have their file names), an array in a .npy, any other data that fit
    takes, or train, validation or test, the run's own.
    """


@commands.command(short_help="Write encoder and decoder as .pt2 of torch.export.")
@_run
@_trust
@click.option("--out", metavar="DIR", type=_PATH, help="[default: RUN/export]")
@_done_by("exporting:export_run")
def export() -> None:
    """Write encoder and decoder as .pt2 files of torch.export, which run without this package.

    A file is kept only if it gives what the networks give, to 1e-6.
    """


@commands.command(short_help="Write a page to move through the latent space in.")
@_run
@_trust
@click.option("--out", metavar="FILE", type=_PATH, help="A .html. [default: RUN/explore.html]")
@click.option("--num-data", metavar="N", type=at_least(1), default=1000, help="Test data on the plane, at most. "
              "[default: 1000]")  # fmt: skip
@click.option("--reference", metavar="N", type=at_least(0), default=0, help="Draw the exact posterior of the "
              "first N of them by Hamiltonian Monte Carlo, too. [default: 0]")  # fmt: skip
@_seed
@_data_dir
@_done_by("explore.command:explore_run")
def explore() -> None:
    """Write a page to move through a run's latent space in: one HTML file that opens offline.

    The decoder is inside, and the images follow the pointer, the finger or the arrow keys.
    """


@commands.command(short_help="List runs with their numbers.")
@click.argument("folders", nargs=-1, metavar="[FOLDER ...]", type=_PATH)
@click.option("--sort", type=_word("time", "log-p", "elbo", "name", "data", "epochs", "seconds"), default="time",
              help="time: the latest first; numbers: the largest first; what has none comes last. "
              "[default: time]")  # fmt: skip
@click.option("--data", "only", metavar="NAME|PATH", help="Only runs on these data.")
@_json
@_done_by("listing:list_runs")
def runs() -> None:
    """List the runs in folders, at any depth, with their numbers. [default: runs]

    A damaged run is a row with the reason. Nothing but JSON is read.
    """


@commands.command(short_help="Try every posterior with every bound and estimator.")
@click.option("--posterior", "posteriors", metavar="NAME", multiple=True, help="Only these. [default: all]")
@click.option("--bound", "bounds", metavar="NAME", multiple=True, help="Only these. [default: all]")
@click.option("--estimator", "estimators", metavar="NAME", multiple=True, help="Only these. [default: all]")
@_json
def combinations(
    posteriors: tuple[str, ...], bounds: tuple[str, ...], estimators: tuple[str, ...], as_json: bool
) -> int:
    """Try every posterior with every bound and gradient estimator: what trains, what is refused, and why."""
    import json

    from pyro_vae.app import losses

    bounds = tuple(_choice("bound", name) for name in bounds)
    estimators = tuple(_choice("estimator", name) for name in estimators)
    posteriors = tuple(names.check("posterior", name) for name in posteriors)
    outcomes = losses.combinations(posteriors or None, bounds or None, estimators or None)
    click.echo(json.dumps([outcome._asdict() for outcome in outcomes], indent=2) if as_json else losses.table(outcomes))
    return 1 if any(outcome.result == "fails" for outcome in outcomes) else 0


def _say(quiet: bool) -> Callable[[str], None]:
    from tqdm import tqdm

    return (lambda _: None) if quiet else lambda text: tqdm.write(text, file=sys.stderr)  # beside a bar, if any


if __name__ == "__main__":
    sys.exit(main())
