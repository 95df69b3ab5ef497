"""The command `pyro-vae`.

Nothing heavy is imported before a command runs, so that ``--help`` is quick. Every
error that the user can mend is one line on stderr and exit code 2.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from pyro_vae.app.cli.group import PROGRAM, commands
from pyro_vae.atomic import reason_of
from pyro_vae.news import no_news_of_a_gpu
from pyro_vae.words import did_you_mean


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


_LONGEST = 4096  # characters of a word that is typed
