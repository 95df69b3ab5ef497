"""Every option of every command with every kind of bad value: taken, or refused in one line that names it, before work.

What is taken is not run: the first step of a fit, an evaluation, a page is where a trial ends.
"""

import contextlib
import random

import click
import pytest

from pyro_vae.app import cli, fitting

BAD = ("", " ", "abc", "-1", "0", "1", "1.5", "nan", "inf", "-inf", "1e400", "9223372036854775808", "7" * 400, "\x00",
       "\u202e", "💥", "a" * 5000, "[", "{}", "a=b=c", ",", "=", "a=", "--", "-", "/no/such/place", "/dev/null", "/",
       ".", "None", "true", "mnist", "%s", "{0}", "${HOME}", "a:b", "os:system", "[1,2", "400,-1", "1;2", "!!python/x")  # fmt: skip
QUICK = ["--data", "digits", "--limit", "50"]


class Reached(BaseException):
    """The work would begin here."""


def options_of(name):
    command = cli.commands.commands[name]
    return [p for p in command.params if isinstance(p, click.Option) and not p.is_flag]


def tried(arguments, capsys):
    """The exit code, None where the work began, and what was printed to standard error."""
    capsys.readouterr()
    try:
        code = cli.main(arguments)
    except Reached:
        code = None
    return code, capsys.readouterr().err


def fault(arguments, name, capsys):
    """What is wrong with how a command took a value, in words; None where nothing is."""
    try:
        code, said = tried(arguments, capsys)
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:200]}"
    if code in (0, None):
        return None
    lines = [line for line in said.splitlines() if not line.startswith("pyro-vae: warning")]
    last = lines[-1] if lines else ""
    if code != 2 or not last.startswith("pyro-vae: error: ") or "Traceback" in said:
        return f"exit code {code}, said {said[-300:]!r}"
    if len(last) > 1500:
        return f"a line of {len(last)} characters"
    words = name.lstrip("-").split("-")
    if not all(word in last.lower() for word in words):
        return f"{last[:300]!r} does not name {name}"
    return None


@pytest.fixture
def no_work(monkeypatch, tmp_path):
    def reached(*_, **__):
        raise Reached

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fitting, "train", reached)
    from pyro_vae.app import compare_command

    monkeypatch.setattr(compare_command, "execute", reached, raising=False)


def cases(command):
    return [(option.opts[0], value) for option in options_of(command) for value in BAD]


@pytest.mark.parametrize("part", range(4))
def test_every_option_of_fit(part, no_work, capsys):
    all_cases = cases("fit")
    random.Random(0).shuffle(all_cases)
    chosen = all_cases[part::4]
    faults = {}
    for name, value in chosen:
        with contextlib.suppress(OSError):
            found = fault(["fit", *QUICK, name, value], name, capsys)
            if found:
                faults[name, value[:20]] = found
    assert not faults, "\n".join(f"{k}: {v}" for k, v in faults.items())
