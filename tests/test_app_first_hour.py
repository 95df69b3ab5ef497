"""A picture at once, and nothing lost: the run folder while it grows, interruptions, and what a run shows."""

import re
import subprocess
import sys
import time
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import pyro_vae.plots as plots
from pyro_vae.app import evaluation, fitting, progress, report, run_page
from pyro_vae.app.building import build
from pyro_vae.app.cli import main
from pyro_vae.app.defaults import resolve
from pyro_vae.app.reading import read
from pyro_vae.app.runs import Run, check_place, default_path, run_folder
from pyro_vae.app.training import second_view
from pyro_vae.inference import loop, preparation
from pyro_vae.inference.checkpoints import Sparing
from pyro_vae.inference.training import fit
from tests import pictures

TINY = ["--limit", "200", "--hidden", "16", "--latent-dim", "3", "--evaluation-samples", "20", "--evaluation-images",
        "20"]  # fmt: skip
PICTURES = {"reconstructions.png", "samples.png", "training_curve.png"}


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty current folder, and no second fit for a picture."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fitting, "second_view", lambda *_: {})
    return tmp_path


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A tiny run on the digits."""
    path = tmp_path_factory.mktemp("runs") / "digits"
    with pictures.drawn():
        assert main(["fit", "--out", str(path), *TINY, "--epochs", "3", "--quiet"]) == 0
    return path


class Killed(BaseException):
    """As by kill -9: nobody catches it."""


def broken_off(monkeypatch, argv, epoch, error=Killed):
    """Run the command until the start of that epoch."""
    original, calls = loop.Stepper.epoch, []

    def patched(*arguments):
        calls.append(0)
        if len(calls) == epoch:
            raise error
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Stepper, "epoch", patched)
        # The state is to be there after each epoch, however short it was.
        patch.setattr("pyro_vae.inference.checkpoints.Checkpoint.due", lambda _: True)
        if error is Killed:
            with pytest.raises(Killed):
                main(argv)
            return None
        return main(argv)


def same(one, two):
    first, second = load_file(one / "weights.safetensors"), load_file(two / "weights.safetensors")
    return all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("error", [Killed, KeyboardInterrupt])
def test_the_same_command_goes_on_in_the_same_folder_to_the_bit(error, here, monkeypatch, capsys):
    argv = ["fit", *TINY, "--epochs", "5"]
    assert main([*argv, "--out", "whole", "--quiet"]) == 0
    broken_off(monkeypatch, argv, 4, error)
    part = here / "runs" / "digits-1"
    assert {"unfinished.json", "checkpoint.safetensors", "config.json", "weights.safetensors"} <= {
        path.name for path in part.iterdir()
    }
    assert {path.name for path in (part / "figures").iterdir()} >= PICTURES
    capsys.readouterr()
    assert main(argv) == 0
    assert "going on with runs/digits-1" in (said := capsys.readouterr().err) and "after epoch 3 of 5" in said
    assert [path.name for path in (here / "runs").iterdir()] == ["digits-1"] and same(here / "whole", part)
    assert not {"unfinished.json", "checkpoint.safetensors"} & {path.name for path in part.iterdir()}
    assert len(Run.load(part).metrics()) == 5 and Run.load(part).summary["interrupted"] is False


def test_other_options_are_refused_by_name_and_a_finished_run_is_not_written_over(run, here, monkeypatch, capsys):
    broken_off(monkeypatch, ["fit", *TINY, "--epochs", "5", "--out", "a"], 3)
    before = (here / "a" / "checkpoint.safetensors").read_bytes()
    capsys.readouterr()
    assert main(["fit", *TINY, "--epochs", "6", "--seed", "1", "--out", "a"]) == 2
    said = capsys.readouterr().err
    assert "--epochs 6 (there: 5), --seed 1 (there: 0)" in said and "--limit" not in said
    assert (here / "a" / "checkpoint.safetensors").read_bytes() == before
    finished = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert main(["fit", *TINY, "--epochs", "3", "--out", str(run)]) == 2
    said = capsys.readouterr().err
    assert "a finished run" in said and f"pyro-vae evaluate {run}" in said and "Name another" in said
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == finished


def test_a_run_of_other_options_gets_a_folder_of_its_own(here):
    with pytest.raises(Killed), run_folder(default_path("digits", {"epochs": 1}), {"epochs": 1}) as folder:
        (folder / "weights.safetensors").write_bytes(b"")
        raise Killed
    assert default_path("digits", {"epochs": 1}).name == "digits-1"
    assert default_path("digits", {"epochs": 2}).name == "digits-2"


def test_two_processes_do_not_write_one_run(here):
    pytest.importorskip("fcntl")
    with run_folder(here / "runs" / "digits-1", {"epochs": 1}):
        with (
            pytest.raises(ValueError, match="another process is writing"),
            run_folder(here / "runs" / "digits-1", {"epochs": 1}),
        ):
            pass
        assert default_path("digits", {"epochs": 1}).name == "digits-2"
        assert (here / "runs" / "digits-1" / "unfinished.json").exists()
    check_place(here / "runs" / "digits-1", {"epochs": 1})


def test_a_failure_at_the_end_loses_nothing(here, monkeypatch, capsys):
    argv = ["fit", *TINY, "--epochs", "2", "--out", "a"]
    with monkeypatch.context() as patch:
        patch.setattr(fitting, "training_numbers", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
        assert main(argv) == 2
    with monkeypatch.context() as patch:
        patch.setattr(loop.Stepper, "epoch", lambda *_: pytest.fail("an epoch was trained anew"))
        assert main(argv) == 0
    assert "test_elbo" in Run.load(here / "a").summary


def test_ctrl_c_while_evaluating_leaves_a_trained_run_with_its_pictures(here, monkeypatch, capsys):
    argv = ["fit", *TINY, "--epochs", "2", "--out", "a"]

    def stopped(*_, **__):
        names = {path.name for path in (here / "a" / "figures").iterdir()}
        assert names == {*PICTURES, "latent_space.png", "interpolations.png"}, "all pictures before the evaluation"
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "evaluate", stopped)
        assert main(argv) == 130
    summary = Run.load(here / "a").summary
    assert summary["interrupted"] is True and summary["epochs"] == 2 and (here / "a" / "report.html").exists()
    with monkeypatch.context() as patch:
        patch.setattr(loop.Stepper, "epoch", lambda *_: pytest.fail("an epoch was trained anew"))
        assert main(argv) == 0
    assert "test_elbo" in Run.load(here / "a").summary


def test_pictures_come_after_the_first_epoch_and_take_two_per_cent(here, monkeypatch):
    options, dataset = read(resolve({"limit": 200, "hidden": (16,), "latent_dim": 3}))
    vae, said, drawn = build(options, dataset), [], []
    (here / "figures").mkdir()
    seen = progress.Progress(vae, dataset, options, here, said.append)
    clock = [0.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: clock[0])
    seen._started = 0.0

    def one_second(_vae, _dataset, records, *_):
        drawn.append(len(records))
        clock[0] += 1.0

    monkeypatch.setattr(report, "draw_progress", one_second)
    for epoch in range(1, 201):
        clock[0] += 1.0
        seen({"epoch": epoch, "bound": -1.0})
    assert drawn[0] == 1 and len(drawn) == pytest.approx(0.02 * clock[0], abs=1.5) and len(drawn) >= 3


def test_drawing_changes_nothing_of_a_captured_fit(here, monkeypatch):
    monkeypatch.setattr(preparation, "_CAPTURE_PAYS", 20)
    options, dataset = read(resolve({"limit": 200, "hidden": (16,), "latent_dim": 3}))
    ends = []
    for draws in (False, True):
        vae = build(options, dataset)
        (here / "figures").mkdir(exist_ok=True)
        seen = progress.Progress(vae, dataset, options, here, lambda _: None)

        def callback(record, seen=seen, draws=draws):
            if draws and record["epoch"] in (1, 12):
                seen._cost = 0.0  # draw, whatever it takes
                seen(record)

        fit(vae.model, vae.guide, dataset.train, epochs=20, batch_size=64, seed=0, progress=False, callback=callback,
            checkpoint=Sparing(here / f"{draws}.safetensors"))  # fmt: skip
        ends.append(vae.state_dict())
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


@pytest.mark.parametrize("options", [{}, {"kl_warmup": 10, "clip_norm": 1.0}])
def test_a_captured_fit_goes_on_from_a_sparing_checkpoint_to_the_bit(options, tmp_path):
    settled, dataset = read(resolve({"limit": 200, "hidden": (16,), "latent_dim": 3}))
    captures = []

    def trained(name, stop=None):
        vae = build(settled, dataset)

        def callback(record):
            if record["epoch"] == stop:
                raise Killed

        try:
            fit(vae.model, vae.guide, dataset.train, epochs=20, batch_size=64, seed=0, progress=False,
                callback=callback, checkpoint=Sparing(tmp_path / name, share=1e9), **options)  # fmt: skip
        except Killed:
            pass
        return vae.state_dict()

    original = loop.Stepper.warm_up

    def counted(self, tensors):
        original(self, tensors)
        captures.append(self.graph.compiled.captures)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Stepper, "warm_up", counted)
        patch.setattr(preparation, "_CAPTURE_PAYS", 20)
        whole = trained("whole.safetensors")
        trained("part.safetensors", stop=7)
        part = trained("part.safetensors")
    assert captures == [2, 2, 2], "the steps were captured, of both sizes of batches"
    assert all(torch.equal(whole[name], part[name]) for name in whole)


def test_a_sparing_checkpoint_takes_its_share_of_the_time(tmp_path, monkeypatch):
    from pyro_vae.inference import checkpoints

    clock = [0.0]
    monkeypatch.setattr(checkpoints.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(checkpoints.seals, "save", lambda *_: clock.__setitem__(0, clock[0] + 1))
    found = checkpoints.Checkpoint(Sparing(tmp_path / "a.safetensors", share=0.01), {"a": torch.zeros(1)}, {})
    written = 0
    for _ in range(1000):
        clock[0] += 1
        if found.due():
            found.write({}, {}, {})
            written += 1
    assert written == pytest.approx(10, abs=1)
    every = checkpoints.Checkpoint(tmp_path / "a.safetensors", {"a": torch.zeros(1)}, {})
    every.write({}, {}, {})
    assert every.due()


@pytest.mark.pictures
def test_draw_draws_again_also_what_is_unfinished(here, run, monkeypatch, capsys):
    broken_off(monkeypatch, ["fit", *TINY, "--epochs", "5", "--out", "a"], 3)
    capsys.readouterr()
    assert main(["draw", "a"]) == 0
    said = capsys.readouterr()
    assert "after epoch 1 of 5" in said.err and (here / "a" / "report.html").exists()
    for line in said.out.splitlines():
        assert (here / line).stat().st_size > 1000
    before = (run / "figures" / "samples.png").read_bytes()
    (run / "figures" / "samples.png").write_bytes(b"")
    assert main(["draw", str(run)]) == 0
    assert (run / "figures" / "samples.png").read_bytes() == before
    with run_folder(here / "empty") as folder, pytest.raises(ValueError, match="it has no weights yet"):
        Run.load(folder)


@pytest.mark.parametrize(
    "each, wanted", [(1e-9, (1000, 1000)), (1e-4, (1000, 500)), (1e-3, (500, 100)), (1.0, (100, 100))]
)
def test_an_evaluation_takes_about_a_minute_unless_told_otherwise(each, wanted, monkeypatch):
    monkeypatch.setattr(evaluation, "seconds_each", lambda *_: each)
    options, dataset = read(resolve({"limit": 200, "data": "linear-gaussian"}))
    vae = build(options, dataset)
    plan = evaluation.plan(vae, dataset, options)
    assert (plan.num_samples, plan.images) == wanted
    assert plan.seconds == pytest.approx(each * plan.images * (plan.num_samples + 100))
    assert plan.seconds <= evaluation.MINUTE or wanted == (100, 100)
    full = evaluation.plan(vae, dataset, resolve({"data": "linear-gaussian", "full": True}))
    assert (full.num_samples, full.images) == (5000, len(dataset.test))
    assert full.seconds == pytest.approx(plan.full_seconds)
    said = evaluation.plan(
        vae, dataset, resolve({"data": "linear-gaussian", "evaluation_samples": 30, "evaluation_images": 40})
    )
    assert (said.num_samples, said.images) == (30, 40), "what was asked for is done, however long it takes"


@pytest.mark.parametrize("overhead", [0.0, 0.3, 1.5])
@pytest.mark.parametrize("each, within", [(1e-2, 0.8), (1e-3, 0.01), (1e-4, 0.01), (1e-7, 110.0)])
def test_the_speed_of_an_evaluation_is_that_of_its_samples_whatever_a_call_costs(each, within, overhead, monkeypatch):
    now = [0.0]

    def scored(model, guide, data, num_samples, progress):
        now[0] += overhead + each * len(data) * num_samples

    monkeypatch.setattr(evaluation, "log_likelihood", scored)
    monkeypatch.setattr(evaluation.time, "perf_counter", lambda: now[0])
    options, dataset = read(resolve({"limit": 200}))
    vae = build(options, dataset)
    found = evaluation.seconds_each(vae, dataset.test, 1000)
    assert each * (1 - 1e-6) <= found <= each * (1 + within)
    assert now[0] < 15 + 5 * overhead  # a call of 20 images at K = 50 takes ten seconds of the slowest of these
    plan = evaluation.plan(vae, dataset, options)
    assert (plan.images == 360) == (each <= 1e-4), "on a loaded machine the same data are tested on"
    assert (plan.seconds < 5) == (each < 1e-5)


def test_it_is_said_how_long_it_takes_and_what_there_is_to_see(here, capsys):
    assert main(["fit", *TINY, "--epochs", "8", "--out", "a run"]) == 0
    said = capsys.readouterr()
    assert re.search(r"^(about .*|a few seconds) to train, (about .*|a few seconds) to evaluate$", said.err, re.M)
    assert "evaluating 20 test data, 20 samples each" in said.err and "--full" in said.err
    for word in ("a run/figures/reconstructions.png", "samples.png", "a run/report.html"):
        assert word in said.out
    for command in ("sample 'a run' -n 100", "evaluate 'a run' --full"):
        assert f"pyro-vae {command}" in said.out
    assert said.err.splitlines()[-1] == "next: pyro-vae judge 'a run'"


def test_early_has_the_time_of_a_step():
    x, told = torch.randn(64, 3), []
    options, dataset = read(resolve({"limit": 200, "data": "linear-gaussian"}))
    vae = build(options, dataset)

    class Slow:
        def early(self, seconds, steps):
            told.append((seconds, steps))

        def __call__(self, record):
            time.sleep(0.01)  # an epoch of one step

    fit(vae.model, vae.guide, dataset.train[: len(x)], epochs=50, batch_size=64, progress=False, callback=Slow())
    ((seconds, steps),) = told
    assert 0.01 < seconds < 0.1 and steps == 40


def test_the_bar_fits_eighty_columns(here):
    pytest.importorskip("pty")
    code = f"""
import fcntl, os, pty, struct, sys, termios
pid, terminal = pty.fork()
if not pid:
    fcntl.ioctl(2, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    from pyro_vae.app.cli import main
    os._exit(main(["fit", "--out", "a", "--epochs", "30", *{TINY!r}]))
try:
    while block := os.read(terminal, 4096):
        sys.stdout.buffer.write(block)
except OSError:
    pass
sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    bars = [part for part in done.stdout.decode().replace("\n", "\r").split("\r") if part.startswith("epoch")]
    assert bars and max(map(len, bars)) <= 80
    last = bars[-1]
    assert re.match(r"epoch \d+/30: +\d+%\|.+\| \S+ left, bound -\d+\.\d\d, validation -\d+\.\d\d$", last.strip()), last


class Loaded(HTMLParser):
    """Tags, and what they load."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.sources = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href", "srcset", "data")]


def test_the_page_is_self_contained(run):
    text = (run / "report.html").read_text()
    page = Loaded(text)
    assert page.tags.count("img") == 5 and all(source.startswith("data:image/png;base64,") for source in page.sources)
    assert not {"script", "link", "iframe"} & set(page.tags) and "url(" not in text and "@import" not in text
    for word in ("test ELBO", "--epochs", "3 (default: 300)", "pyro-vae judge"):
        assert word in text
    assert "--learning-rate" not in text, "only what differs from the defaults"


def test_words_on_the_page_are_escaped():
    nasty = "<script>alert(1)</script>&\"'"
    summary = {"left_out": [nasty], "protocol": {"dataset": nasty}}
    text = run_page.page(nasty, summary, {nasty: b""}, {nasty: nasty}, [nasty])
    assert "<script" not in text and "script" not in Loaded(text).tags and text.count("&lt;script&gt;alert(1)") >= 7


def test_originals_are_shown_as_grey_levels_beside_their_draw(run, monkeypatch, tmp_path):
    shown = {}
    monkeypatch.setattr(
        plots, "reconstructions", lambda x, y, title, grey=None: shown.update(x=x, y=y, title=title, grey=grey)
    )
    monkeypatch.setattr(report, "save", lambda *_: None)
    options, dataset = read(resolve({"limit": 200}))
    vae = Run.load(run).vae()
    report.draw_progress(vae, dataset, [{"epoch": 2}], options, tmp_path)
    assert torch.equal(shown["grey"], dataset.test.pixels[:20] / 255)
    assert torch.equal(shown["x"], dataset.test.subset(slice(0, 20)).frozen(0)[:])
    assert shown["x"].unique().tolist() == [0, 1] and len(shown["y"].unique()) > 100
    assert "as probabilities, after epoch 2" in shown["title"]


def test_small_images_are_enlarged_by_nearest_neighbour(run):
    with Image.open(run / "figures" / "reconstructions.png") as picture:
        assert picture.size[0] >= 1000, "ten of them in a row, at least 80 pixels each"
    x = (torch.rand(10, 1, 8, 8, generator=torch.Generator().manual_seed(0)) < 0.5).float()
    (image,) = plots.reconstructions(x, x, grey=x).axes[0].images
    assert set(np.unique(image.get_array())) <= {0.0, 1.0}, "no level lies between two pixels"


def nearest(z, labels, k=5):
    """How often the majority of the k nearest has the label."""
    distance = torch.cdist(z, z)
    distance.fill_diagonal_(float("inf"))
    near = labels[distance.topk(k, largest=False).indices]
    return (near.mode(1).values == labels).float().mean().item()


def test_the_second_view_separates_the_digits():
    options, dataset = read(resolve({}))
    ((title, z),) = second_view(build(options, dataset), dataset, options).items()
    assert z.shape == (360, 2) and "of the grey levels" in title
    assert nearest(z, dataset.test.labels) > 0.75  # 0.88; of principal components of the codes, 0.5
    options, dataset = read(resolve({"data": "linear-gaussian"}))
    assert second_view(build(options, dataset), dataset, options) == {}, "no labels, no classes"


def test_the_plane_of_many_latents_says_what_it_is():
    labels = torch.arange(30) % 3
    one = plots.latent_space(torch.randn(30, 5), labels).axes[0]
    assert "principal components" in one.get_title(loc="left") and "of 5 latents" in one.get_xlabel()
    two = plots.latent_spaces({"here": torch.randn(30, 5), "there": torch.randn(30, 2)}, labels).axes
    assert [axes.get_title(loc="left") for axes in two] == ["here, principal components", "there"]


@pytest.mark.parametrize("start, said", [(-500.0, ["some of the first 4 epochs lie below"]), (-52.0, [])])
def test_a_steep_start_that_the_axis_leaves_out_is_said(start, said):
    bounds = [start] * 4 + [-50.0 - 4 * (i % 2) for i in range(46)]
    figure = plots.training_curve([{"epoch": e, "bound": b} for e, b in enumerate(bounds, 1)])
    assert [text.get_text() for text in figure.axes[0].texts] == said


def test_the_training_curve_is_explained():
    records = [{"epoch": e, "bound": -1.0 / e, "validation": -1.1 / e} for e in range(1, 9)]
    figure = plots.training_curve(records, note=report.CURVE)
    assert "overfitting" in figure._supxlabel.get_text()
