"""evaluate and judge go on after what they had finished: broken off after any part, they end as if they had not been."""

import functools
import json
from pathlib import Path

import pytest
import torch

import pyro_vae as pv
from pyro_vae import seals
from pyro_vae.app import cli, commands, evaluation
from pyro_vae.judging import judgement, remedies
from pyro_vae.judging.kept import Kept
from pyro_vae.judging.results import Nats
from pyro_vae.judging.stages import Stages
from pyro_vae.programs.semi_amortized import SemiAmortized

SMALL = ["fit", "--data", "digits", "--limit", "100", "--hidden", "8", "--latent-dim", "2", "--epochs", "2", "--quiet",
         "--evaluation-samples", "30", "--evaluation-images", "20"]  # fmt: skip


def still():
    """A clock that stands: all that is to be done fits."""
    return 0.0


def without_clock(value):
    if isinstance(value, dict):
        return {k: without_clock(v) for k, v in value.items() if "seconds" not in k}
    return [without_clock(v) for v in value] if isinstance(value, list) else value


@pytest.fixture(scope="module")
def pair():
    torch.manual_seed(0)
    vae = pv.VAE.build((6,), latent_dim=2, hidden=(8,), likelihood="normal", scale=0.5)
    x = torch.randn(80, 2) @ torch.randn(2, 6)
    pv.fit(vae.model, vae.guide, x[:60], epochs=3, batch_size=20, seed=0, progress=False)
    return vae.model, vae.guide, x[:60], x[60:]


def shorten(patch):
    """Stages that take a fraction of a second."""
    from pyro_vae.judging import examinations

    bdmc, sbc = examinations.bdmc, examinations.sbc
    patch.setattr(remedies, "_STEPS", (3,))
    patch.setattr(remedies, "_SAMPLES", 5)
    patch.setattr(remedies, "_FAMILIES", {"full": remedies.FullNormal})
    patch.setattr(remedies._Trial, "_refined", lambda trial: Nats(0.1, 0.2))
    patch.setattr(examinations, "_GAP_STEPS", 10)
    patch.setattr(examinations, "_NUM_SAMPLES", (100, 50, 25))
    patch.setattr(examinations, "bdmc", lambda *given, num_data, num_steps, **options:
                  bdmc(*given, num_data=min(num_data, 8), num_steps=min(num_steps, 6), **options))  # fmt: skip
    patch.setattr(examinations, "sbc", lambda *given, num_data, **options: sbc(*given, num_data=50, **options))


@pytest.fixture(autouse=True)
def short(monkeypatch):
    shorten(monkeypatch)


def judged(pair, checkpoint=None, **options):
    model, guide, training, x = pair
    options = {"num_data": 8, "num_samples": 50, "budget": 1000.0, "seed": 1, "clock": still} | options
    return pv.judge(model, guide, x, training=training, progress=False, checkpoint=checkpoint, **options)


@pytest.fixture(scope="module")
def whole(pair):
    with pytest.MonkeyPatch.context() as patch:
        shorten(patch)
        return judged(pair)


@pytest.fixture(scope="module")
def finished(pair, tmp_path_factory):
    """A judgement that is kept, and its file when it is done."""
    path = tmp_path_factory.mktemp("kept") / "part.safetensors"
    with pytest.MonkeyPatch.context() as patch:
        shorten(patch)
        return judged(pair, path), path.read_bytes()


def test_a_judgement_that_is_kept_is_the_same(finished, whole):
    found, _ = finished
    assert found.to_dict() == whole.to_dict() and whole.stages.remedy.tried and whole.stages.bracket.done


@pytest.mark.parametrize("stage", ["latents", "bracket", "calibration"])
def test_a_judgement_broken_off_in_a_stage_goes_on_after_those_before_it(pair, whole, tmp_path, monkeypatch, stage):
    path, done = tmp_path / "part.safetensors", []
    for name, examine in judgement._EXAMINE.items():

        def watched(examined, stages, name=name, examine=examine):
            done.append(name)
            if name == stage and done.count(name) == 1:
                raise KeyboardInterrupt
            return examine(examined, stages)

        monkeypatch.setitem(judgement._EXAMINE, name, watched)
    with pytest.raises(KeyboardInterrupt):
        judged(pair, path)
    found = judged(pair, path)
    assert [name for name in done if name != stage] == [name for name in Stages._fields if name != stage]  # once each
    assert found.to_dict() == whole.to_dict()
    # What the pictures are made of is there too.
    ours, theirs = found.stages, whole.stages
    assert torch.equal(ours.bounds.pointwise, theirs.bounds.pointwise)
    assert torch.equal(ours.bracket.found.lower.log_weight, theirs.bracket.found.lower.log_weight)
    assert torch.equal(ours.calibration.found.ranks, theirs.calibration.found.ranks)


@pytest.mark.parametrize("after", [2, 4])
def test_remedies_that_were_tried_are_not_tried_again(pair, whole, tmp_path, monkeypatch, after):
    path, fits, fit = tmp_path / "part.safetensors", [], remedies._Trial._fit

    def watched(self, guide, steps, model=None):
        fits.append(steps)
        if len(fits) == 3 + after:  # three are timed
            raise KeyboardInterrupt
        return fit(self, guide, steps, model)

    monkeypatch.setattr(remedies._Trial, "_fit", watched)
    with pytest.raises(KeyboardInterrupt):
        judged(pair, path)
    assert judged(pair, path).to_dict() == whole.to_dict()
    assert fits.count(2) == 2  # no steps were timed again
    broken, fits[:] = fits.count(3), [None] * 100
    judged(pair, tmp_path / "other.safetensors")
    assert broken == fits.count(3) + 1  # of which one was broken off


@pytest.mark.parametrize("other", [{"num_samples": 40}, {"budget": 900.0}])
def test_other_options_begin_a_judgement_anew(pair, finished, tmp_path, other):
    path, (_, before) = tmp_path / "part.safetensors", finished
    path.write_bytes(before)
    assert judged(pair, path, **other).to_dict() == judged(pair, **other).to_dict()
    assert path.read_bytes() != before


def test_other_weights_begin_anew(pair, finished, tmp_path):
    import copy

    path = tmp_path / "part.safetensors"
    path.write_bytes(finished[1])
    model, guide = copy.deepcopy(pair[:2])
    with torch.no_grad():
        next(guide.parameters()).add_(0.1)
    other = (model, guide, *pair[2:])
    assert judged(other, path).stages.bounds == judged(other).stages.bounds


def test_what_went_into_the_parts_counts_in_the_budget(pair, tmp_path, monkeypatch):
    """Of a hundred seconds of which stages took ninety, ten are left for the others."""
    path, now, left = tmp_path / "part.safetensors", [0.0], []

    def slow(examined, stages):
        now[0] += 90.0
        raise ValueError("nothing found")

    monkeypatch.setitem(judgement._EXAMINE, "bounds", slow)
    latents = judgement._EXAMINE["latents"]

    def broken(examined, stages):
        raise KeyboardInterrupt

    monkeypatch.setitem(judgement._EXAMINE, "latents", broken)
    options = {"budget": 100.0, "clock": lambda: now[0]}
    with pytest.raises(KeyboardInterrupt):
        judged(pair, path, **options)

    def looked(examined, stages):
        left.append(examined.budget.end - now[0])
        return latents(examined, stages)

    monkeypatch.setitem(judgement._EXAMINE, "latents", looked)
    found = judged(pair, path, **options)
    assert left == [10.0] and found.stages.bounds.status == "not possible"


def test_a_file_that_is_damaged_or_something_else_is_not_read(tmp_path):
    path = tmp_path / "part.safetensors"
    for content in (b"", b"\x80\x04.", b"no", None):
        path.write_bytes(content) if content is not None else seals.save(path, {"a": torch.ones(1)}, {})
        assert Kept(path, {"a": 1}).piece("one", lambda: 2.0) == 2.0
        assert Kept(path, {"a": 1}).piece("one", lambda: 3.0) == 2.0  # and written anew
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert Kept(path, {"a": 1}).piece("one", lambda: 3.0) == 3.0


def test_a_file_cannot_name_a_class_of_its_own(tmp_path):
    path = tmp_path / "part.safetensors"
    value = {"kind": "Popen", "fields": {"args": ["touch", "run"]}}
    pieces = {"one": {"seconds": 0.0, "value": value}}
    seals.save(path, {}, {"pyro_vae.kept": json.dumps({"key": {"version": 1}, "pieces": pieces})})
    assert Kept(path).piece("one", lambda: 3.0) == 3.0


def test_what_cannot_be_written_is_done_all_the_same(tmp_path):
    assert Kept(tmp_path / "no folder" / "part.safetensors").piece("one", lambda: 2.0) == 2.0
    assert Kept(tmp_path / "part.safetensors").piece("one", lambda: tmp_path) == tmp_path  # of a kind that is not kept
    assert not (tmp_path / "part.safetensors").exists()


def test_values_come_back_as_they_were(tmp_path):
    value = {"a": (1, 2.5, None, True), 3: [Nats(1.0, float("inf"), 0.5)], "z": torch.arange(3)}
    Kept(tmp_path / "part.safetensors").piece("one", lambda: value)
    found = Kept(tmp_path / "part.safetensors").piece("one", dict)
    assert torch.equal(found.pop("z"), value.pop("z")) and found == value and type(found["a"]) is tuple


def command(*words):
    return cli.main([str(word) for word in words])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    assert command(*SMALL, "--out", folder / "run") == 0
    return folder / "run"


@pytest.fixture(scope="module")
def evaluated(run, tmp_path_factory):
    """What evaluate writes with some options, in one go; it is evaluated when it is first asked for."""
    folder, found = tmp_path_factory.mktemp("whole"), {}

    def of(more):
        path = folder / f"{len(found)}.json"
        if tuple(more) not in found:
            assert command("evaluate", run, *more, "--evaluation-images", 10, "--out", path, "--json") == 0
            assert not list(run.glob("*.partial*"))
            found[tuple(more)] = without_clock(json.loads(path.read_text()))
        return found[tuple(more)]

    return of


PARTS = ["elbo_terms", "log_likelihood", "_latents_and_samples"]
REFINED = [("log_likelihood", ["--refine", "semi-amortized", "--evaluation-samples", "20"])]


@pytest.mark.parametrize(
    ("part", "more"),
    [(part, more) for part in PARTS for more in ([], ["--full", "--evaluation-samples", "40"])] + REFINED,
)
def test_evaluate_goes_on_after_the_parts_that_it_finished(run, evaluated, tmp_path, monkeypatch, part, more):
    # Few steps of refinement: they are the same in both.
    monkeypatch.setattr(commands, "SemiAmortized", functools.partial(SemiAmortized, num_steps=1, num_samples=2))
    whole, again = evaluated(more), tmp_path / "again.json"
    words = ["evaluate", run, *more, "--evaluation-images", 10, "--out", again, "--json"]
    calls = {name: [] for name in PARTS}
    for name, seen in calls.items():
        real = getattr(evaluation, name)

        def watched(*given, name=name, seen=seen, real=real, **options):
            seen.append(0)
            if name == part and len(seen) == 1:
                raise KeyboardInterrupt
            return real(*given, **options)

        monkeypatch.setattr(evaluation, name, watched)
    assert command(*words) == 130 and not again.exists()
    assert command(*words) == 0
    assert without_clock(json.loads(again.read_text())) == whole
    assert [len(seen) for seen in calls.values()] == [2 if name == part else 1 for name in calls]
    assert not list(run.glob("*.partial*"))


def test_other_options_of_evaluate_begin_anew(run, tmp_path, monkeypatch):
    def broken(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "_latents_and_samples", broken)
        assert command("evaluate", run, "--seed", 3, "--json") == 130
    assert (run / "evaluation.partial.safetensors").is_file()
    for name in ("first", "second"):
        assert command("evaluate", run, "--seed", 4, "--out", tmp_path / name) == 0
    first, second = (without_clock(json.loads((tmp_path / name).read_text())) for name in ("first", "second"))
    assert first == second and not (run / "evaluation.partial.safetensors").exists()


def test_the_command_judge_keeps_stages_until_its_pages_are_written(run, tmp_path, monkeypatch):
    real, done = dict(judgement._EXAMINE), []

    def broken(*_):
        raise KeyboardInterrupt

    words = ["judge", run, "--num-data", 6, "--budget", 40, "--out", tmp_path, "--json"]
    with monkeypatch.context() as patch:
        patch.setitem(judgement._EXAMINE, "training", broken)
        assert command(*words) == 130
    kept = tmp_path / "judgement.partial.safetensors"
    assert kept.is_file() and not (tmp_path / "judgement.json").exists()
    for name in ("bounds", "latents", "gaps"):
        monkeypatch.setitem(judgement._EXAMINE, name, lambda *given, name=name: done.append(name) or real[name](*given))
    assert command(*words) == 0 and done == []
    assert not kept.exists() and (tmp_path / "judgement.html").is_file()
    assert json.loads((tmp_path / "judgement.json").read_text())["stages"]["bounds"]["status"] == "done"
    assert command(*words) == 0 and done == ["bounds", "latents", "gaps"]  # a finished one is judged anew


def test_a_fit_that_is_gone_on_with_in_its_evaluation_does_not_evaluate_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert command(*SMALL, "--out", "whole") == 0
    likelihood, calls = evaluation.log_likelihood, []

    def broken(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "_latents_and_samples", broken)
        assert command(*SMALL, "--out", "run") == 130
    assert Path("run", "evaluation.partial.safetensors").is_file()

    def counted(*given, **options):
        calls.append(options.get("num_samples"))
        return likelihood(*given, **options)

    monkeypatch.setattr(evaluation, "log_likelihood", counted)
    monkeypatch.setattr(evaluation, "seconds_each", lambda *_: 1e-6)  # which calls it, too
    assert command("fit", "--resume", "run", "--quiet") == 0
    assert 30 not in calls
    ours, theirs = (json.loads(Path(name, "summary.json").read_text()) for name in ("run", "whole"))
    clock = ("seconds", "images_per_second", "date")
    apart = {k for k in theirs if ours.get(k) != theirs[k] and not any(word in k for word in clock)}
    assert apart <= {"protocol"} and not Path("run", "evaluation.partial.safetensors").exists()
