"""How far a long fit is: a line at every tenth of the way, and the time that is left, the evaluation's with it."""

import io
import re
import time

import pytest

from pyro_vae.app import fitting, progress
from pyro_vae.app.building import build
from pyro_vae.app.cli import main
from pyro_vae.app.defaults import resolve
from pyro_vae.app.reading import read
from pyro_vae.app.runs import Run
from pyro_vae.inference import loop, records
from pyro_vae.inference.objectives import Objective
from pyro_vae.inference.training import fit

TINY = ["--limit", "200", "--hidden", "16", "--latent-dim", "3", "--evaluation-samples", "20", "--evaluation-images",
        "20"]  # fmt: skip
LINE = re.compile(r"^epoch (\d+)/(\d+): bound (-\d+\.\d\d), ([\d,]+) images/s, (.*) left$", re.M)


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fitting, "second_view", lambda *_: {})
    return tmp_path


@pytest.mark.parametrize("epochs", [20, 7, 1])
def test_a_line_at_every_tenth_of_a_long_fit_without_a_terminal(epochs, here, monkeypatch, capsys):
    monkeypatch.setattr(progress, "LONG", 0.0)
    assert main(["fit", *TINY, "--epochs", str(epochs), "--batch-size", "10", "--out", "run"]) == 0
    found = LINE.findall(capsys.readouterr().err)
    assert len(found) == 10
    bounds = {record["epoch"]: record["bound"] for record in Run.load("run").metrics()}
    for tenth, (epoch, of, bound, rate, _) in enumerate(found, 1):
        assert (int(epoch), int(of)) == (-(-tenth * epochs // 10), epochs) and int(rate.replace(",", "")) > 0
        if tenth * epochs % 10 == 0:  # the end of an epoch: its bound is the record's
            assert float(bound) == pytest.approx(bounds[int(epoch)], abs=0.006)


def test_a_short_fit_and_one_that_is_told_to_be_quiet_say_none(here, monkeypatch, capsys):
    assert main(["fit", *TINY, "--epochs", "10", "--out", "short"]) == 0
    assert not LINE.findall(capsys.readouterr().err)
    monkeypatch.setattr(progress, "LONG", 0.0)
    assert main(["fit", *TINY, "--epochs", "10", "--out", "quiet", "--quiet"]) == 0
    said = capsys.readouterr()
    assert said.out == said.err == ""


def test_what_was_broken_off_says_the_tenths_that_are_left(here, monkeypatch, capsys):
    monkeypatch.setattr(progress, "LONG", 0.0)
    argv, original, calls = ["fit", *TINY, "--epochs", "20", "--out", "run"], loop.Stepper.epoch, []

    def killed(*arguments):
        calls.append(0)
        if len(calls) == 14:
            raise MemoryError("killed")
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Stepper, "epoch", killed)
        patch.setattr("pyro_vae.inference.checkpoints.Checkpoint.due", lambda _: True)
        assert main(argv) == 2
    assert [int(epoch) for epoch, *_ in LINE.findall(capsys.readouterr().err)] == [2, 4, 6, 8, 10, 12]
    assert main(argv) == 0
    assert [int(epoch) for epoch, *_ in LINE.findall(capsys.readouterr().err)] == [14, 16, 18, 20]


def test_the_time_left_is_true(here, monkeypatch):
    """Steps of ten milliseconds, and validation, pictures and the rest as they come."""
    options, dataset = read(resolve({"limit": 200, "hidden": (16,), "latent_dim": 3, "epochs": 40}))
    vae, said = build(options, dataset), []
    (here / "figures").mkdir()
    monkeypatch.setattr(progress, "LONG", 0.0)
    monkeypatch.setattr(progress.report, "about", lambda seconds: f"{seconds:.3f} s")
    seen = progress.Progress(vae, dataset, options, here, lambda text: said.append((time.perf_counter(), text)),
                             in_lines=True)  # fmt: skip
    seen.ahead, step = 7.0, loop.Stepper._step

    def slow(self, choice):
        time.sleep(0.01)
        return step(self, choice)

    monkeypatch.setattr(loop.Stepper, "_step", slow)
    fit(vae.model, vae.guide, dataset.train, epochs=40, batch_size=64, callback=seen, progress=False, compile=False)
    ended = time.perf_counter()
    (early,) = [(at, float(text.split()[0])) for at, text in said if "to train" in text]
    assert 0.4 * (ended - early[0]) < early[1] < 2.5 * (ended - early[0])
    lines = [(at, float(text.split()[-3])) for at, text in said if text.startswith("epoch")]
    assert len(lines) == 10
    for at, left in lines[:8]:
        assert 0.5 * (ended - at) < left - 7.0 < 2.0 * (ended - at)
    assert lines[-1][1] == pytest.approx(7.0, abs=1e-3), "the evaluation"


@pytest.mark.parametrize("batch", [25, 100])
def test_pictures_do_not_count_as_steps(batch, here, monkeypatch):
    """They are drawn within the first ten steps, and then ever more rarely."""
    options, dataset = read(resolve({"limit": 200, "hidden": (16,), "latent_dim": 3, "epochs": 30}))
    vae, told = build(options, dataset), []
    (here / "figures").mkdir()
    monkeypatch.setattr(progress.report, "draw_progress", lambda *_: time.sleep(0.5))
    monkeypatch.setattr(progress.report, "about", lambda seconds: told.append(seconds) or "")
    seen = progress.Progress(vae, dataset, options, here, lambda _: None)
    fit(vae.model, vae.guide, dataset.train, epochs=30, batch_size=batch, callback=seen, progress=False, compile=False)
    assert told[0] < 0.25 * 0.5 / 5 * (240 if batch == 25 else 60), "or a fifth of them in every step"


def test_the_bar_counts_what_comes_after_the_fit():
    texts = []
    for ahead in (0.0, 3600.0):
        with records.Bar(total=100, bar_format=records.BAR, file=io.StringIO(), ascii=True) as bar:
            bar.ahead, bar.start_t = ahead, bar.start_t - 50.0
            bar.n = 50
            texts.append(str(bar))
    minutes = re.compile(r"\| (\S+) left")
    assert minutes.search(texts[0])[1] in ("00:49", "00:50") and minutes.search(texts[1])[1] in ("1:00:49", "1:00:50")


@pytest.mark.parametrize("options_of_loss", [{}, {"loss": Objective()}])
def test_a_fit_in_python_tells_any_callback(options_of_loss):
    options, dataset = read(resolve({"limit": 200, "data": "linear-gaussian"}))
    vae, told = build(options, dataset), []

    class Told:
        def tenth(self, steps, total, bound):
            told.append((steps, total, round(bound, 6)))

        def __call__(self, record):
            pass

    history = fit(
        vae.model, vae.guide, dataset.train, epochs=3, batch_size=50, progress=False, callback=Told(), **options_of_loss
    )
    assert [steps for steps, *_ in told] == [2, 3, 4, 5, 6, 8, 9, 10, 11, 12]
    ends = {4 * record["epoch"]: round(record["bound"], 6) for record in history.records}
    assert ends.items() <= {steps: bound for steps, _, bound in told}.items()
