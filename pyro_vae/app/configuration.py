"""The options of `pyro-vae fit`: on the command line, in named groups, and in YAML or JSON, checked key by key."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import click

from pyro_vae.app.defaults import CHOICES, DATASETS, MOST, OTHER, FitOptions, field_of
from pyro_vae.atomic import reason_of
from pyro_vae.parts import names
from pyro_vae.words import did_you_mean

# Options of the command that are no part of a run's configuration.
COMMAND_ONLY = {"out": "str", "checkpoint": "str", "quiet": "bool"}
_TYPES = {field.name: str(field.type) for field in fields(FitOptions)} | COMMAND_ONLY
_MOST = 2**512
_WORDS = {
    "int": "a whole number", "float": "a number", "str": "text", "bool": "true or false",
    "tuple[int, ...]": "whole numbers such as 400,400",
    "dict[str, Any]": "options such as bins=8,transforms=2",
}  # fmt: skip


def read_config(path: Path) -> dict[str, Any]:
    """Options by field name, of the right types, from a YAML or (.json) JSON file; None for an option set to nothing.

    Keys are option names, with - or _. A run's own config.json is such a file, and a run folder stands for it. What is
    unreadable or no mapping, an unknown key or a value of a wrong type is a ValueError.
    """
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ValueError(f"got --config {path}, a folder without config.json, wanted a run folder or a file.")
        path = path / "config.json"
    values = parsed(path, f"--config {path}, wanted a readable YAML or JSON file")
    if not isinstance(values, Mapping):
        raise ValueError(f"{path} holds {_shown(values)}, wanted options by name, such as 'epochs: 20'.")
    result: dict[str, Any] = {}
    for key, value in values.items():
        name = field_of(str(key))
        if name not in _TYPES:
            known = [field.replace("_", "-") for field in _TYPES]
            raise ValueError(f"{path} has the unknown key {key!r}." + did_you_mean(name, known))
        result[name] = convert(name, value, f"{path}: {key}")
    return result


def at_least(least: int) -> click.IntRange:
    """A number of data, samples or steps: torch has no more of most."""
    return click.IntRange(least, MOST)


@contextlib.contextmanager
def about(option: str, value: Any) -> Iterator[None]:
    """What goes wrong inside with the value of an option names that option."""
    try:
        yield
    except (ValueError, OSError) as error:
        said = reason_of(error) if isinstance(error, OSError) else str(error)
        if option in said:
            raise
        raise ValueError(f"got {option} {value}{', ' if said.startswith(('wanted', 'an ')) else ': '}{said}") from error


def convert(name: str, value: Any, where: str) -> Any:
    """What was read of one option as its field's type; `where` is for the message of the ValueError, if it is none.

    Example:
        >>> convert("hidden", "400,400", "here"), convert("learning_rate", "2e-3", "here")
        ((400, 400), 0.002)
        >>> convert("posterior_options", "transforms=2, hidden_features=[64, 64]", "here")
        {'transforms': 2, 'hidden_features': [64, 64]}
    """
    kinds = [kind.strip() for kind in _TYPES[field_of(name)].split("|")]
    if value is None and "None" in kinds:
        return None
    for kind in kinds:
        try:
            return _READERS[kind](value)
        except (KeyError, TypeError, ValueError, OverflowError):
            continue
    wanted = " or ".join(_WORDS[kind] for kind in kinds if kind in _WORDS)
    raise ValueError(f"got {where} = {_shown(value)}, wanted {wanted}.")


def parsed(path: Path, wanted: str) -> Any:
    """What a YAML or (.json) JSON file holds, as plain data; else a ValueError with what is `wanted`."""
    import yaml

    try:
        text = path.read_text(encoding="utf-8")
        return json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"got {wanted}: {getattr(error, 'strerror', None) or 'it is not text'}.") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON: {error.msg} in line {error.lineno}.") from error
    except (yaml.YAMLError, RecursionError) as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        line = f" in line {mark.line + 1}" if mark else ""
        raise ValueError(f"{path} is not valid YAML: {problem or 'unreadable'}{line}.") from error


def _integer(value: Any) -> int:
    if isinstance(value, bool) or isinstance(value, float) and value != int(value):
        raise ValueError
    number = int(value)
    if abs(number) > _MOST:  # which no other number is compared with, nor a tensor sized by
        raise ValueError
    return number


def _number(value: Any) -> float:
    if isinstance(value, bool):
        raise ValueError
    return float(value)  # also of text: YAML reads 2e-3 as a word


def _of(kind: type) -> Callable[[Any], Any]:
    def read(value: Any) -> Any:
        if not isinstance(value, kind):
            raise ValueError
        return value

    return read


def _widths(value: Any) -> tuple[int, ...]:
    if isinstance(value, str):
        value = [part for part in value.split(",") if part.strip()]
    return tuple(_integer(width) for width in (value if isinstance(value, list | tuple) else [value]))


def _mapping(value: Any) -> dict[str, Any]:
    import yaml

    if isinstance(value, str):
        try:
            value = yaml.safe_load("{" + re.sub(r"\s*=\s*", ": ", value) + "}")
        except (yaml.YAMLError, RecursionError) as error:
            raise ValueError from error
    if not isinstance(value, Mapping) or not all(isinstance(k, str) and v is not None for k, v in value.items()):
        raise ValueError  # also of a name without "="
    return dict(value)


_READERS: dict[str, Any] = {
    "int": _integer, "float": _number, "str": _of(str), "bool": _of(bool), "tuple[int, ...]": _widths,
    "dict[str, Any]": _mapping,
}  # fmt: skip


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


class GroupedOption(click.Option):
    """An option that knows under which heading, `group`, it stands."""

    def __init__(self, *args: Any, group: str = "Options", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.group = group


class GroupedCommand(click.Command):
    """A command whose help lists its options under their headings, in order of appearance."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        groups: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None and isinstance(parameter, click.Option):  # arguments stand in the usage
                groups.setdefault(getattr(parameter, "group", "Run"), []).append(record)
        for heading, records in groups.items():
            with formatter.section(heading):
                formatter.write_dl(records, col_max=34)


def epilog() -> str:
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


_FIT = (
    _option("Data", "--data", "NAME|PATH", f"{', '.join(DATASETS)}, a folder of images, or a file of arrays (.npy, "
            ".npz, .mat, .amat, IDX). [default: digits]"),
    _option("Data", "--data-dir", "DIR", "Where the files of a named dataset lie. [default: $PYRO_VAE_DATA or "
            "~/.cache/pyro_vae]"),
    _option("Data", "--binarization", _choice("binarization"), "How grey levels become zeros and ones: drawn afresh "
            "each time, once, cut at one half, or not at all. [default: by dataset]"),
    click.option("--dequantize/--no-dequantize", cls=GroupedOption, group="Data", default=None,
                 help="Spread 8-bit levels by uniform noise, for a normal likelihood. [default: by dataset]"),
    _option("Data", "--image-size", "N", "Scale images to N x N. [default: as they are; of several sizes one, 64 at "
            "most]", int),
    _option("Data", "--crop", "N", "Cut out the centred N x N square first.", int),
    _option("Data", "--channels", "[1|3]", "Make images grey or colour.", int),
    _option("Data", "--background", "white|black|0..255", "What transparent pixels lie on. [default: white]"),
    _option("Data", "--images", "KEY", "Which array of a file is the data. [default: by name, then by shape]"),
    _option("Data", "--labels", "KEY", "Which array of a file is the labels; of celeba, which attribute. [default: by "
            "name; Smiling]"),
    _option("Data", "--limit", "N", "Train on the first N images only.", int),
    _option("Model", "--model", _choice("model"), "The plain p(z) p(x|z); given labels y, p(x|z,y), where all are "
            "known or a few; clusters in the latent space; several levels of latents. [default: vae]"),
    _option("Model", "--model-options", "A=1,B=2", "Its own options: num_labelled=100 of semi-supervised, "
            "num_components=10 of mixture, latent_dims=[20,10] of hierarchical, conditional_prior=true of "
            "conditional."),
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
    _option("Training", "--beta", "B", "Weight of the KL in the elbo that is trained: above 1 a simpler latent space, "
            "below 1 sharper pictures; ELBOs are reported at 1. [default: 1]", float),
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
    _option("Training", "--data-seed", "N", "Of the order and draws of the data alone, for fits that are to see the "
            "same batches. [default: the seed's stream]", int),
    _option("Training", "--split-seed", "N", "Of what is drawn of the data once: the split of files without one, a "
            "static binarisation. [default: the seed]", int),
    _option("Training", "--frozen", "RUN", "Fit only a guide, under the frozen model of this run, whose options are "
            "the defaults."),
    _option("Training", "--device", "NAME", "cpu, cuda, cuda:1, mps; auto takes a GPU, if any. [default: auto]"),
    _option("Training", "--threads", "N", "CPU threads while training; small networks are faster on one. "
            "[default: torch's; for digits and linear-gaussian 1]", int),
    _option("Training", "--compile", _choice("compile"), "Capture and compile the training steps; auto does where it "
            "pays. [default: auto]"),
    _option("Training", "--matmul-precision", _choice("matmul_precision"), "medium is faster on AMD CPUs, bfloat16 "
            "where the hardware multiplies it. "
            "[default: highest]"),
    _option("Evaluation", "--evaluation-samples", "K", "Importance samples per image. [default: 1000; with --full "
            "5000]", int),
    _option("Evaluation", "--evaluation-images", "N", "Evaluate on the first N test images. [default: 1000, or fewer "
            "where they take more than about a minute]", int),
    click.option("--full/--no-full", cls=GroupedOption, group="Evaluation", default=None,
                 help="Evaluate on all test images with 5000 samples, however long it takes."),
)  # fmt: skip


def _names(decorator: Decorator) -> list[str]:
    """The options that a decorator makes."""

    def probe() -> None: ...

    decorator(probe)
    return [name for each in probe.__click_params__ for name in each.opts]  # type: ignore[attr-defined]


FIT = _options(
    *_FIT,
    _option("Run", "--out", "RUN", "Run folder to make, or an unfinished one to go on with. "
            "[default: runs/<data>-<n>]"),
    _option("Run", "--checkpoint", "FILE", "Another .safetensors file for the state, written after each epoch; steps "
            "are then never compiled, and the same command goes on from it to the bit. [default: RUN/"
            "checkpoint.safetensors, until the run is finished]"),
    _option("Run", "--config", "FILE|RUN", "Read options from YAML or JSON, or from a run folder; the command line "
            "wins.", click.Path(path_type=Path)),
    _option("Run", "--resume", "RUN", "Go on with an unfinished run, whatever ended it (Ctrl-C, a kill, a power cut), "
            "with the options that it was begun with.", click.Path(path_type=Path)),
    click.option("--from", "from_run", cls=GroupedOption, group="Run", metavar="RUN", type=str,
                 help="Go on from a finished run: its options, but for what is typed here. Its weights too where "
                 "networks and shape of the data stay the same: then --epochs are so many more, without a KL warm-up, "
                 "with the data order and noise of the seed, the learning rate's schedule and Adam's moments from the "
                 "start. Else new weights; a line says which of the two. [default of --epochs: as many as RUN had]"),
    click.option("--trust", cls=GroupedOption, group="Run", metavar="MODULE:CLASS", multiple=True,
                 help="Import this part of the run of --from, code of your own."),
    click.option("--quiet", cls=GroupedOption, group="Run", is_flag=True, default=None, help="Print errors only."),
)  # fmt: skip
_STUDY = {"--seed", "--data-seed", "--frozen", "--checkpoint"}  # which a study sets
COMPARE = _options(
    click.option("--vary", cls=GroupedOption, group="Study", metavar="NAME=A,B,...", multiple=True, help="An axis: an "
                 "option of fit and its values; a value with commas in brackets, --vary hidden=[400],[400,400]. Again "
                 "for more axes: the arms are all combinations."),
    _option("Study", "--seeds", "N", "Fits of each arm. [default: 1]", at_least(1)),
    _option("Study", "--frozen", "RUN", "Fit only guides, under the frozen model of this run."),
    click.option("--freeze", cls=GroupedOption, group="Study", is_flag=True, help="Fit a model first, with the options "
                 "below, and only guides under it."),
    _option("Study", "--budget", "epochs|gradients|SECONDS", "What is equal for all: passes through the data, passes "
            "times samples in the bound, or seconds a fit. [default: epochs]"),
    _option("Study", "--jobs", "N", "Fits at a time. [default: the number of cores]", at_least(1)),
    _option("Study", "--backend", "[local|dask|slurm]", "Where they run. [default: local]", click.Choice(
            ["local", "dask", "slurm"]), default="local"),
    _option("Study", "--address", "URL", "Of dask's scheduler."),
    click.option("--retry", cls=GroupedOption, group="Study", is_flag=True, help="Try again what failed."),
    click.option("--dry-run", cls=GroupedOption, group="Study", is_flag=True, help="Print the plan, what is there, and "
                 "about how long the rest takes."),
    _option("Output", "--out", "DIR", "Folder of the study, or of the page of a comparison of runs. [default: studies/"
            "<axes>-<hash>; none for runs]"),
    _option("Output", "--table", "FILE", "Write the table: .csv, .tex, .md or .parquet."),
    click.option("--json", "as_json", cls=GroupedOption, group="Output", is_flag=True, help="Print JSON instead."),
    click.option("--trust", cls=GroupedOption, group="Output", metavar="MODULE:CLASS", multiple=True,
                 help="Import this part, code of your own, that a run or a study file names."),
    *(decorator for decorator in _FIT if not _STUDY & set(_names(decorator))),
)  # fmt: skip
