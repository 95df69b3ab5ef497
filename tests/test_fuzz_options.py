"""Every option of every command with every kind of bad value: taken, or refused in one line that names it, before work.

What is taken is not run: the first step of a fit, an evaluation, a page is where a trial ends.
"""

import random
from pathlib import Path

import click
import pytest
from PIL import Image

from pyro_vae.app import cli, fitting

# A value that is taken may be one of which the command warns.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

BAD = ("", " ", "abc", "-1", "0", "1", "1.5", "nan", "inf", "-inf", "1e400", "9223372036854775808", "7" * 400, "\x00",
       "\u202e", "💥", "a" * 5000, "[", "{}", "a=b=c", ",", "=", "a=", "--", "-", "/proc/no/such/place", "/dev/null", "/",
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
    words, value = name.lstrip("-").split("-"), arguments[-1]
    named = value.strip() and (value[:60] in last or str(Path(value).absolute()) in last)
    if not named and not all(word in last.lower() for word in words):
        return f"{last[:300]!r} does not name {name}"
    return None


@pytest.fixture
def no_work(monkeypatch, tmp_path):
    def reached(*_, **__):
        raise Reached

    monkeypatch.chdir(tmp_path)
    Image.new("L", (8, 8)).save("x.png")
    monkeypatch.setattr(fitting, "train", reached)
    from pyro_vae.app import compare_command

    monkeypatch.setattr(compare_command, "execute", reached, raising=False)
    return reached


@pytest.fixture(scope="module")
def a_run(tmp_path_factory):
    path = tmp_path_factory.mktemp("fuzz") / "run"
    tiny = ["--hidden", "8", "--latent-dim", "2", "--epochs", "1", "--evaluation-samples", "5", "--quiet"]
    assert cli.main(["fit", *QUICK, *tiny, "--evaluation-images", "5", "--out", str(path)]) == 0
    return path


def cases(command):
    return [(option.opts[0], value) for option in options_of(command) for value in BAD]


def faults(command, before, chosen, capsys):
    found = {(name, v[:20]): fault([command, *before, name, v], name, capsys) for name, v in chosen}
    return "\n".join(f"{each}: {said}" for each, said in found.items() if said)


PARTS = [0, *(pytest.param(part, marks=pytest.mark.slow) for part in range(1, 16))]
HEAVY = ("pyro_vae.app.evaluation.evaluate", "pyro_vae.app.report.draw", "pyro_vae.app.ranking.anomaly_scores",
         "pyro_vae.judging.judgement.judge")  # fmt: skip


@pytest.mark.parametrize("part", PARTS)
def test_every_option_of_a_fit(part, no_work, capsys):
    chosen = cases("fit")
    random.Random(0).shuffle(chosen)
    said = faults("fit", QUICK, chosen[part::16], capsys)
    assert not said, said


@pytest.mark.slow
def test_every_option_of_a_study(no_work, capsys):
    of_fit = {name for name, _ in cases("fit")}
    before = [*QUICK, "--vary", "posterior=diagonal,full", "--dry-run"]
    said = faults("compare", before, [case for case in cases("compare") if case[0] not in of_fit], capsys)
    assert not said, said


QUICK_ONES = ["evaluate", "judge", "anomalies", "runs", "combinations"]
OTHERS = ["draw", "sample", "reconstruct", "encode", "export", "explore"]  # whose trials that are taken write something


@pytest.mark.parametrize("command", [*QUICK_ONES, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
def test_every_option_of_what_is_done_with_a_run(command, a_run, no_work, capsys, monkeypatch):
    for name in HEAVY:
        monkeypatch.setattr(name, no_work)
    before = {
        "runs": [str(a_run.parent)],
        "combinations": [],
        "encode": [str(a_run), "digits", "--out", "z.csv"],
        "reconstruct": [str(a_run), "x.png"],
    }
    said = faults(command, before.get(command, [str(a_run)]), cases(command), capsys)
    assert not said, said


@pytest.mark.slow
def test_two_bad_values_at_once(no_work, capsys):
    rng = random.Random(1)
    names = [option.opts[0] for option in options_of("fit")]
    for _ in range(5000):
        one, two = rng.sample(names, 2)
        arguments = ["fit", *QUICK, one, rng.choice(BAD), two, rng.choice(BAD)]
        code, said = tried(arguments, capsys)
        assert code in (0, 2, None) and "Traceback" not in said, (arguments, said)
