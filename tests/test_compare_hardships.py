"""Studies that meet trouble: killed, moved, asked for twice, short of memory, or given code that nobody trusts."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch

import pyro_vae as pv
from pyro_vae.app import plans, trials
from pyro_vae.app.backends import execute, jobs_of
from pyro_vae.app.cli import main as command
from pyro_vae.app.compare_command import _axis
from pyro_vae.app.comparing import speeds_of
from pyro_vae.app.plans import plan
from pyro_vae.app.studies import Study
from pyro_vae.app.trials import rankings, run_trial, state

TINY = {"hidden": (4,), "latent_dim": 1, "epochs": 1, "limit": 100, "evaluation_samples": 10, "evaluation_images": 20}
POSTERIORS = {"posterior": ["diagonal", "full"]}
OPTIONS = ["--hidden", "4", "--latent-dim", "1", "--epochs", "1", "--limit", "100", "--evaluation-samples", "10",
           "--evaluation-images", "20"]  # fmt: skip


def tiny(**more) -> Study:
    return Study(**({"vary": POSTERIORS, "fixed": TINY} | more))


@pytest.fixture(scope="module")
def frozen(tmp_path_factory):
    """A study of guides under a model that it fitted itself, without its page."""
    folder = tmp_path_factory.mktemp("frozen") / "a study"
    planned = plan(tiny(frozen=True), folder)
    execute(planned, jobs=1, progress=False)
    return folder, planned


def test_a_study_that_was_moved_is_found_complete_and_gone_on_with(frozen, tmp_path):
    folder, planned = frozen
    place = tmp_path / "else where"
    shutil.copytree(folder, place)
    again = plan(tiny(frozen=True), place)
    assert state(again.base) == "done" and [state(trial) for trial in again.trials] == ["done", "done"]
    trial = again.trials[1]
    # As if it had been killed before it was over, at the old place.
    (trial.folder / "scores.safetensors").unlink()
    asked = {k: v for k, v in planned.trials[1].options.to_json().items() if k not in (*plans.PLACES, "data")}
    (trial.folder / "unfinished.json").write_text(json.dumps({"asked": asked}))
    execute(again, jobs=1, progress=False)
    assert state(trial) == "done"
    one, two = (rankings(each, tiny(frozen=True))["digits"] for each in (planned, again))
    for name in one.arms:
        assert torch.equal(one.arms[name][0].elbo, two.arms[name][0].elbo)


def test_files_of_data_may_be_moved_too(tmp_path):
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        np.save(tmp_path / name / "x.npy", np.random.default_rng(0).normal(size=(60, 3)).astype("float32"))
    names = [[trial.folder.name for trial in plan(tiny(fixed=TINY | {"data": str(tmp_path / name / "x.npy")}),
                                                  tmp_path).trials] for name in ("here", "there")]  # fmt: skip
    assert names[0] == names[1]
    np.save(tmp_path / "there" / "x.npy", np.random.default_rng(1).normal(size=(60, 3)).astype("float32"))
    plans._PRINTS.clear()  # as a new process
    other = plan(tiny(fixed=TINY | {"data": str(tmp_path / "there" / "x.npy")}), tmp_path).trials
    assert {trial.folder.name for trial in other}.isdisjoint(names[0])


def test_what_was_killed_before_it_was_begun_does_not_stand_in_the_way(tmp_path):
    trial = plan(tiny(), tmp_path).trials[0]
    (trial.folder / "figures").mkdir(parents=True)  # mkdir came, and unfinished.json did not
    assert run_trial(trial.options.to_json(), str(trial.folder)) is None
    assert state(trial) == "done" and not list(trial.folder.parent.glob("*.lock"))


def test_a_fit_that_another_process_makes_is_waited_for(tmp_path):
    """A killed study leaves workers behind, and one may be started twice: neither is a failure, nor made twice."""
    trial = plan(tiny(), tmp_path).trials[0]
    with trials.held(trial.folder):
        waits = threading.Thread(target=run_trial, args=(trial.options.to_json(), str(trial.folder)))
        waits.start()
        time.sleep(0.5)
        assert waits.is_alive() and state(trial) == "missing"
        # What the other process ends with.
        done = plan(tiny(), tmp_path / "other").trials[0]
        assert run_trial(done.options.to_json(), str(done.folder)) is None
        shutil.copytree(done.folder, trial.folder)
        before = (trial.folder / "weights.safetensors").stat().st_mtime_ns
    waits.join(60)
    assert state(trial) == "done" and (trial.folder / "weights.safetensors").stat().st_mtime_ns == before


def test_what_was_scored_is_complete(tmp_path, monkeypatch):
    """Scores come last: a fit that is broken off while its numbers are written is not done."""

    def broken(*_):
        raise KeyboardInterrupt

    trial = plan(tiny(), tmp_path).trials[0]
    write = trials.write_page
    calls = []
    monkeypatch.setattr(trials, "write_page", lambda *a: (calls.append(a), broken() if len(calls) == 2 else write(*a)))
    with pytest.raises(KeyboardInterrupt):
        run_trial(trial.options.to_json(), str(trial.folder))
    assert state(trial) == "unfinished"
    monkeypatch.undo()
    assert run_trial(trial.options.to_json(), str(trial.folder)) is None and state(trial) == "done"


OWN = """
import os
from pyro_vae.parts.posteriors.amortized import DiagonalNormal


class Mine(DiagonalNormal):
    pass


class Deadly(DiagonalNormal):
    def forward(self, x):
        os.kill(os.getpid(), 9)  # as the system does where memory is out
"""


def test_a_process_that_dies_is_a_row_and_parts_of_ones_own_reach_the_workers(tmp_path, monkeypatch):
    (tmp_path / "own_parts_here.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    vary = {"posterior": ["own_parts_here:Deadly", "own_parts_here:Mine", "diagonal"]}
    planned = plan(tiny(vary=vary), tmp_path / "study")
    execute(planned, jobs=2, progress=False)
    assert [state(trial) for trial in planned.trials] == ["failed", "done", "done"]
    found = rankings(planned, tiny(vary=vary))["digits"]
    assert "ended from outside" in found.failed["own_parts_here:Deadly"]
    mine, plain = found.arms["own_parts_here:Mine"][0], found.arms["diagonal"][0]
    assert torch.equal(mine.elbo, plain.elbo)


def test_code_of_ones_own_needs_trust_from_python_and_under_a_frozen_run(tmp_path, monkeypatch):
    (tmp_path / "study.yaml").write_text("vary: {posterior: [diagonal, 'evil_modulé:Posterior']}\n", encoding="utf-8")
    with pytest.raises(ValueError, match="--trust evil_modulé:Posterior"):
        pv.study(tmp_path / "study.yaml", tmp_path / "s")
    (tmp_path / "own_parts_there.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    run = tmp_path / "run"
    assert command(["fit", *OPTIONS, "--posterior", "own_parts_there:Mine", "--quiet", "--out", str(run)]) == 0
    with pytest.raises(ValueError, match="--trust own_parts_there:Mine"):
        pv.study(tiny(frozen=str(run), fixed={}), tmp_path / "s")
    assert not (tmp_path / "s").exists()
    sys.modules.pop("own_parts_there")
    # A guide of other parts is put under that model, and nothing of the run's guide is imported.
    options = dataclasses.replace(pv.open(run, trust=["own_parts_there:Mine"]).options, posterior="full",
                                  frozen=str(run))  # fmt: skip
    sys.modules.pop("own_parts_there", None)
    from pyro_vae.app.building import build
    from pyro_vae.app.reading import read

    settled, dataset = read(options)
    pair = build(settled, dataset)
    assert "own_parts_there" not in sys.modules
    model = pv.open(run, trust=True).model
    assert all(torch.equal(value, pair.model.state_dict()[name]) for name, value in model.state_dict().items())


def test_arms_that_fail_are_rows_of_their_dataset(tmp_path):
    vary = {"data": ["digits", "linear-gaussian"], "posterior": ["diagonal", "diagnal", "point"]}
    study = tiny(vary=vary)
    planned = plan(study, tmp_path)
    reasons = {trial.arm: trial.reason for trial in planned.trials if trial.reason}
    assert set(reasons) == {"digits, diagnal", "digits, point", "linear-gaussian, diagnal", "linear-gaussian, point"}
    assert "no density over z" in reasons["digits, point"]
    execute(planned, jobs=1, progress=False)
    found = rankings(planned, study)
    assert {data: set(each.failed) for data, each in found.items()} == {
        data: {f"{data}, diagnal", f"{data}, point"} for data in vary["data"]
    }
    assert set(study.methods().values()) == {"diagonal", "diagnal", "point"}


def test_one_seed_that_fails_is_a_row_of_its_own(tmp_path):
    study = tiny(seeds=2)
    planned = plan(study, tmp_path)
    execute(planned, jobs=1, progress=False)
    last = planned.trials[-1]
    (last.folder / "scores.safetensors").unlink()
    trials.lost(last.folder, "out of memory")
    found = rankings(planned, study)["digits"]
    assert found.failed == {"full, seed 1": "out of memory"}
    assert [len(own) for own in found.arms.values()] == [1, 1] and "full lacks 1" in found.notes[-1]


def test_five_datasets_give_the_critical_difference(tmp_path):
    from pyro_vae.app.study_page import _over_datasets
    from pyro_vae.judging.rankings import rank
    from pyro_vae.judging.scoring import Scores

    files = [str(tmp_path / f"d{i}.npy") for i in range(5)]
    study = tiny(vary={"data": files} | POSTERIORS)
    noise = torch.randn(20)
    found = {file: rank({f"{file}, {name}": Scores(noise + shift, 0.0, noise, noise, 10)
                         for shift, name in enumerate(POSTERIORS["posterior"])}) for file in files}  # fmt: skip
    (picture,) = _over_datasets(found, study.methods())
    assert "Nemenyi" in picture.caption


def test_a_budget_is_what_it_says(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="got --epochs 2 with --budget gradients, wanted at least 50: .*iwae"):
        plan(tiny(vary={"bound": ["elbo", "iwae"]}, budget="gradients", fixed=TINY | {"epochs": 2}), tmp_path)
    from pyro_vae.app import comparing

    measured = []

    def speed(options):
        measured.append(options)
        return 0.5 * options.hidden[0], 0.0

    monkeypatch.setattr(comparing, "speed", speed)
    timed = tiny(budget="seconds", seconds=8.0)
    assert speeds_of(timed, tmp_path, measure=False) is None and not measured
    assert speeds_of(timed, tmp_path) == {"diagonal": 2.0, "full": 2.0} and len(measured) == 2
    assert speeds_of(timed, tmp_path) == {"diagonal": 2.0, "full": 2.0} and len(measured) == 2
    # Other networks are of another speed, under whatever name the arms have.
    wider = tiny(budget="seconds", seconds=8.0, fixed=TINY | {"hidden": (8,)})
    assert speeds_of(wider, tmp_path) == {"diagonal": 4.0, "full": 4.0}


def test_a_job_that_the_scheduler_ends_is_a_row(tmp_path, monkeypatch):
    class Job:
        def __init__(self, call):
            self.call = call

        def result(self):
            if "full" in self.call[1]:
                raise RuntimeError("out of time")
            return run_trial(*self.call)

    class AutoExecutor:
        def __init__(self, folder):
            pass

        def submit(self, _, *call):
            return Job(call)

    monkeypatch.setitem(sys.modules, "submitit", types.SimpleNamespace(AutoExecutor=AutoExecutor))
    planned = plan(tiny(), tmp_path)
    execute(planned, backend="slurm", progress=False)
    found = rankings(planned, tiny())["digits"]
    assert list(found.arms) == ["diagonal"] and "its job was ended" in found.failed["full"]


def test_side_by_side_as_many_as_there_are_cores_for(tmp_path, monkeypatch):
    import joblib

    monkeypatch.setattr(joblib, "cpu_count", lambda: 8)
    assert jobs_of(plan(tiny(), tmp_path)) == 8
    assert jobs_of(plan(tiny(fixed=TINY | {"threads": 3}), tmp_path)) == 2


def test_the_command_refuses_what_it_would_not_do(frozen, tmp_path, monkeypatch, capsys):
    folder, planned = frozen
    (folder / "study.json").write_text(json.dumps(tiny(frozen=True).to_json()))
    runs = [str(trial.folder) for trial in planned.trials]
    monkeypatch.chdir(tmp_path)
    vary = ["--vary", "posterior=diagonal,full", *OPTIONS]
    for bad, said in (
        ([str(folder), "--seeds", "3"], "got --seeds and the study"),
        ([str(folder), "--budget", "gradients"], "got --budget and the study"),
        ([*runs, "--dry-run"], "got --dry-run for runs that are fitted"),
        ([*vary, "--budget", "1.2.3"], "got --budget 1.2.3, wanted epochs"),
        ([*vary, "--freeze", "--frozen", runs[0]], "got --freeze and --frozen"),
        ([*vary, "--table", "t.xyz"], "wanted a file that ends in .csv"),
    ):
        assert command(["compare", *bad]) == 2
        assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())  # refused before time is spent
    assert command(["compare", *vary, "--budget", "10s", "--dry-run"]) == 0
    assert "measured at the start" in capsys.readouterr().out
    assert _axis("compile=on,off") == ("compile", ["on", "off"])
    assert command(["compare", "--vary", "hidden=[4,4],[4]", *OPTIONS[2:], "--dry-run"]) == 0
    assert "hidden=4-4" in capsys.readouterr().out


def test_runs_are_told_from_each_other_and_what_differs_is_said(frozen, tmp_path):
    run = frozen[1].base.folder
    twin = pv.compare([run, run], num_samples=10, num_data=20, progress=False)
    assert len(twin.arms) == 2 and twin.differences[0].value == 0
    assert any("nothing but their seeds" in note for note in twin.notes)
    assert (
        command(["fit", *OPTIONS, "--split-seed", "0", "--limit", "60", "--quiet", "--out", str(tmp_path / "r")]) == 0
    )
    found = pv.compare([run, tmp_path / "r"], num_samples=10, num_data=20, progress=False)
    assert any("not trained on the same data" in note and ": 60)" in note for note in found.notes)


@pytest.mark.slow
def test_orphans_of_a_killed_study_are_no_failures(tmp_path):
    """Only the first process is killed: its workers go on, and the same command at once waits for them."""
    call = [sys.executable, "-m", "pyro_vae", "compare", "--vary", "posterior=diagonal,full", *OPTIONS, "--seeds", "2",
            "--jobs", "2", "--out", str(tmp_path / "s")]  # fmt: skip
    process = subprocess.Popen(call, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not list(tmp_path.glob("s/trials/*.lock")) and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    process.wait()
    again = subprocess.run(call, capture_output=True, text=True, env=os.environ)
    assert again.returncode == 0, again.stderr
    assert "failed:" not in again.stdout and len(list(tmp_path.glob("s/trials/*/scores.safetensors"))) == 4
    assert not list(Path(tmp_path, "s", "trials").glob("*.lock"))
