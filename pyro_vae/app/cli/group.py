"""The group of commands, and what several of them share: options, and how they reach the function that does it."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path
from typing import Any

import click

from pyro_vae import __version__
from pyro_vae.words import did_you_mean

PROGRAM = "pyro-vae"
# In the order in which they are used.
_ORDER = (
    "fit", "evaluate", "draw", "judge", "compare", "report", "sample", "reconstruct", "anomalies", "encode", "export",
    "explore", "runs", "combinations",
)  # fmt: skip
# Commands that several processes share, and why another is done by one.
_SHARED = ("fit", "evaluate", "compare")
_BY_ITSELF = {"judge": "whose stages are as long as the clock of one process allows"}


class _Commands(click.Group):
    """Commands of which a typo gets a hint, listed in the order in which they are used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(self.commands, key=_ORDER.index)

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


def done_by(path: str, shared: bool = False) -> Callable[[Callable[[], None]], Callable[..., None]]:
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


def say(quiet: bool) -> Callable[[str], None]:
    from tqdm import tqdm

    return (lambda _: None) if quiet else lambda text: tqdm.write(text, file=sys.stderr)  # beside a bar, if any


def word(*words: str) -> click.Choice[str]:
    return click.Choice(words, case_sensitive=False)


PATH = click.Path(path_type=Path)
RUN = click.argument("run", type=PATH)
DATA_DIR = click.option("--data-dir", metavar="DIR", help="Where the data lie now. [default: where they were]")
DEVICE = click.option("--device", metavar="NAME", default="auto", help="[default: auto]")
TRUST = click.option("--trust", metavar="MODULE:CLASS", multiple=True, help="Import this part of a run, code of your "
                      "own.")  # fmt: skip
JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
SEED = click.option("--seed", metavar="N", type=click.IntRange(0, 2**63 - 1), help="[default: the run's own]")
