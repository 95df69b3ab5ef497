"""Studies and comparisons of runs: what is equal is equal to the bit, what is broken off is gone on with."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas
import pytest
import torch
from click.testing import CliRunner

import pyro_vae as pv
from pyro_vae.app.backends import execute
from pyro_vae.app.cli import commands
from pyro_vae.app.cli import main as command
from pyro_vae.app.plans import plan
from pyro_vae.app.studies import Study
from pyro_vae.app.trials import rankings, read_scores, state
from tests import pictures

SMALL = {"hidden": (8,), "latent_dim": 2, "epochs": 2, "limit": 200, "evaluation_samples": 20, "evaluation_images": 40}
TWO = {"posterior": ["diagonal", "full"], "bound": ["elbo", "iwae"]}
MEASURED = ["seconds"]  # the one column that a clock fills


def small(**more) -> Study:
    return Study(**({"vary": TWO, "fixed": SMALL, "seeds": 2} | more))


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A study that ran through in one go, in this process."""
    folder = tmp_path_factory.mktemp("whole") / "study"
    return folder, pv.study(small(), folder, jobs=1, progress=False)


@pytest.fixture
def no_pictures(monkeypatch):
    """Most of the time of a small study goes into its pictures, which are drawn and looked at in other tests."""
    monkeypatch.setattr("pyro_vae.app.study_page.pictures", lambda *_: iter(()))


def table(folder: Path) -> pandas.DataFrame:
    return pandas.read_csv(folder / "table.csv").drop(columns=MEASURED)


def test_arms_are_all_combinations_and_see_the_same_data(done):
    folder, found = done
    assert set(found.arms) == {"diagonal, elbo", "diagonal, iwae", "full, elbo", "full, iwae"}
    assert all(len(own) == 2 for own in found.arms.values())
    configs = [json.loads(path.read_text()) for path in sorted(folder.glob("trials/*/config.json"))]
    assert len(configs) == 8
    for seed in (0, 1):
        mine = [config for config in configs if config["seed"] == seed]
        assert {config["data_seed"] for config in mine} == {seed} and {config["split_seed"] for config in mine} == {0}
    assert "same" not in found.verdict and "95 % over 40 data and 2 seeds" in found.verdict


def test_a_trial_is_a_run_and_its_scores_are_those_of_the_functions(done):
    folder, found = done
    place = next(path for path in sorted(folder.glob("trials/diagonal-elbo-s1-*")) if path.is_dir())
    run = pv.open(place)
    test = run.read().test.frozen(0).subset(range(40))
    known = pv.log_likelihood(run, test, num_samples=20, seed=0)
    terms = pv.elbo_terms(run, test, num_samples=100, seed=0)
    own = next(each for each in found.arms["diagonal, elbo"] if each.seed == 1)
    assert torch.allclose(own.log_p, known.pointwise.double(), atol=1e-5)
    assert torch.allclose(own.elbo, terms.pointwise.double(), atol=1e-5)
    assert run.summary["test_elbo"] == pytest.approx(terms.value, abs=1e-5)


def test_what_is_there_is_not_made_again_and_the_table_is_the_same(done, no_pictures):
    folder, _ = done
    before = {path: path.stat().st_mtime_ns for path in folder.glob("trials/*/weights.safetensors")}
    first = (folder / "table.csv").read_text()
    pv.study(small(), folder, jobs=1, progress=False)
    assert {path: path.stat().st_mtime_ns for path in folder.glob("trials/*/weights.safetensors")} == before
    assert (folder / "table.csv").read_text() == first
    more = plan(small(seeds=3), folder)  # one more seed: only its fits are missing
    assert sorted(state(trial) for trial in more.trials) == ["done"] * 8 + ["missing"] * 4
    other = plan(small(fixed=SMALL | {"epochs": 3}), folder)
    assert {state(trial) for trial in other.trials} == {"missing"}


def test_two_processes_give_the_identical_table(done, tmp_path, no_pictures):
    pv.study(small(), tmp_path / "study", jobs=2, progress=False)
    pandas.testing.assert_frame_equal(table(done[0]), table(tmp_path / "study"), check_exact=True)


RUN = [sys.executable, "-m", "pyro_vae", "compare", "--vary", "posterior=diagonal,full", "--vary", "bound=elbo,iwae",
       "--seeds", "2", "--hidden", "8", "--latent-dim", "2", "--epochs", "2", "--limit", "200",
       "--evaluation-samples", "20", "--evaluation-images", "40"]  # fmt: skip


def taken_since(place: Path, moment: float) -> bool:
    """Whether a process has taken a fit since then: what a killed one left is older."""
    try:
        return place.stat().st_mtime > moment
    except OSError:
        return False


@pytest.mark.slow
def test_killed_at_random_ten_times_it_gives_the_identical_table(done, tmp_path):
    """kill -9, of all its processes, at any moment: then the same command, and the same table."""
    folder, rng, kills = tmp_path / "study", random.Random(0), 0
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    call = [*RUN, "--out", str(folder), "--jobs", "2"]
    while kills < 10:
        # Fits that are done are taken away again, so that no kill comes after everything; their folders stay.
        done_already = sorted(folder.glob("trials/*/scores.safetensors"))
        for path in random.Random(kills).sample(done_already, max(0, len(done_already) - 5)):
            path.unlink()
        began = time.time()
        process = subprocess.Popen(call, env=environment, start_new_session=True, stdout=subprocess.DEVNULL,
                                   stderr=subprocess.DEVNULL)  # fmt: skip
        # The clock starts with the first fit: on a machine that is slow to import, the kills are in the work too.
        while process.poll() is None and not any(taken_since(place, began) for place in folder.glob("trials/*.lock")):
            time.sleep(0.01)
        try:
            process.wait(rng.uniform(0, 5))
        except subprocess.TimeoutExpired:
            # All its processes, or the first alone, whose workers go on while the next attempt begins.
            (os.killpg if kills % 2 else os.kill)(process.pid, signal.SIGKILL)
            process.wait()
        kills += 1
    subprocess.run(call, env=environment, check=True, capture_output=True)
    pandas.testing.assert_frame_equal(table(done[0]), table(folder), check_exact=True)


def test_a_fit_that_was_broken_off_is_gone_on_with(done, tmp_path):
    """After its first epoch: the second gives the weights of the whole one, to the bit."""
    folder, study = tmp_path / "study", small(seeds=1)
    trial = plan(study, folder).trials[0]
    code = (
        "import os, sys, json; from pyro_vae.app import trials; from pyro_vae.inference import checkpoints\n"
        "write = checkpoints.Checkpoint.write\n"
        "def once(*args, **kwargs):\n    write(*args, **kwargs); os.kill(os.getpid(), 9)\n"
        "checkpoints.Checkpoint.write = once\n"
        "trials.run_trial(json.loads(sys.argv[1]), sys.argv[2])"
    )
    call = [sys.executable, "-c", code, json.dumps(trial.options.to_json()), str(trial.folder)]
    assert subprocess.run(call, env=os.environ | {"OMP_NUM_THREADS": "1"}).returncode == -signal.SIGKILL
    assert state(trial) == "unfinished" and (trial.folder / "checkpoint.safetensors").is_file()
    execute(plan(study, folder), jobs=1, progress=False)
    assert state(trial) == "done" and not (trial.folder / "unfinished.json").exists()
    whole = done[0] / "trials" / trial.folder.name
    assert (trial.folder / "weights.safetensors").read_bytes() == (whole / "weights.safetensors").read_bytes()


def test_a_trial_that_fails_is_a_row_with_its_reason(tmp_path, capsys):
    groups = {"bound": "miwae", "num_samples": 10}
    sets = {
        "five": groups | {"bound_options": {"num_groups": 5}},
        "seven": groups | {"bound_options": {"num_groups": 7}},
    }
    study = small(vary={"groups": sets}, seeds=1)
    found = pv.study(study, tmp_path / "s", jobs=1, progress=False)
    assert list(found.arms) == ["five"]
    (reason,) = found.failed.values()
    assert "7" in reason and "10" in reason
    frame = found.to_frame()
    assert frame["flags"].iloc[-1].startswith("failed: ") and frame["arm"].iloc[-1] == "seven"
    page = (tmp_path / "s" / "report.html").read_text()
    assert "failed" in page
    again = plan(study, tmp_path / "s")
    assert [state(trial) for trial in again.trials] == ["done", "failed"]


def test_under_a_frozen_model_guides_are_ranked_by_the_elbo(tmp_path, no_pictures):
    study = small(vary={"posterior": ["diagonal", "full"]}, seeds=2, frozen=True, fixed=SMALL | {"epochs": 3})
    found = pv.study(study, tmp_path / "s", jobs=1, progress=False)
    assert found.criterion == "elbo"
    models = [pv.open(path).vae.model.state_dict() for path in sorted((tmp_path / "s/trials").iterdir())]
    assert len(models) == 5 and all(torch.equal(models[0][k], m[k]) for m in models[1:] for k in models[0])
    # A run may be given instead of fitting one: the same guides then.
    base = next(path for path in (tmp_path / "s/trials").iterdir() if path.name.startswith("model-"))
    other = pv.study(small(vary={"posterior": ["diagonal", "full"]}, seeds=2, frozen=str(base),
                           fixed={"epochs": 3, "evaluation_images": 40}), tmp_path / "t", jobs=1, progress=False)  # fmt: skip
    for name in found.arms:
        for mine, theirs in zip(found.arms[name], other.arms[name], strict=True):
            assert torch.equal(mine.elbo, theirs.elbo)
    with pytest.raises(ValueError, match="--latent-dim 3 .there: 2"):
        pv.study(small(vary={"posterior": ["full"]}, frozen=str(base), fixed={"latent_dim": 3}), tmp_path / "u",
                 jobs=1, progress=False)  # fmt: skip


def test_budgets_are_equal_in_what_they_say(tmp_path):
    gradients = plan(small(budget="gradients", fixed=SMALL | {"epochs": 100}), tmp_path)
    assert {t.arm: t.options.epochs for t in gradients.trials} == {
        "diagonal, elbo": 100, "diagonal, iwae": 2, "full, elbo": 100, "full, iwae": 2,
    }  # fmt: skip
    seconds = small(budget="seconds", seconds=10.0)
    timed = plan(
        seconds, tmp_path, {"diagonal, elbo": 0.5, "diagonal, iwae": 4.0, "full, elbo": 1.0, "full, iwae": 20.0}
    )
    assert [t.options.epochs for t in timed.trials[::2]] == [20, 2, 10, 1]
    assert any("equal time, 10.0 s a fit" in note for note in timed.notes)
    for bad in ({"budget": "epochs", "seconds": 3.0}, {"budget": "seconds"}, {"budget": "steps"}):
        with pytest.raises(ValueError, match="got budget="):
            small(**bad)


def test_protocols_never_mix(tmp_path):
    with pytest.raises(ValueError, match="'bernoulli' and 'normal' do not see the same digits.*--likelihood"):
        plan(small(vary={"likelihood": ["bernoulli", "normal"]}), tmp_path)
    with pytest.raises(ValueError, match="do not see the same digits .--limit 200 against 100"):
        plan(small(vary={"limit": [100, 200]}), tmp_path)


@pytest.mark.parametrize("values, said", [
    ({"vary": {"postrior": ["diagonal"]}}, "got the option 'postrior'.*'posterior'"),
    ({"vary": {"posterior": ["diagnal"]}}, "diagnal"),
    ({"vary": {"seed": [1, 2]}}, "the study's to set"),
    ({"vary": {}}, "got vary="),
    ({"vary": TWO, "seeds": 0}, "got seeds=0"),
    ({"vary": TWO, "seeds": [1, 1]}, "got seeds="),
    ({"vary": TWO, "seeds": "two"}, "seeds is 'two'"),
    ({"vary": TWO, "fixed": {"epochs": "many"}}, "wanted a whole number"),
    ({"fixed": {}}, "has no 'vary'"),
    ({"vary": TWO, "varies": 1}, "unknown key 'varies'"),
    ({"vary": {"posterior": ["full", "full"]}}, "twice"),
    ({"vary": TWO, "fixed": {"posterior_options": {"bins": 4}}}, "fixed: posterior_options and vary: posterior"),
])  # fmt: skip
def test_a_bad_study_is_refused_before_time_is_spent(values, said, tmp_path):
    def planned():
        found = plan(Study.of(values), tmp_path)
        reasons = [trial.reason for trial in found.trials if trial.reason]
        if reasons:
            raise ValueError(reasons[0])

    with pytest.raises(ValueError, match=said):
        planned()


def test_what_was_fixed_stays_where_something_else_is_varied(tmp_path):
    found = plan(small(vary={"bound": ["elbo", "iwae"]}, fixed=SMALL | {"num_samples": 5}, seeds=1), tmp_path)
    assert {t.arm: t.options.num_samples for t in found.trials} == {"elbo": 5, "iwae": 5}
    found = plan(small(vary={"network": ["mlp", "gated"]}, seeds=1), tmp_path)
    assert {t.options.hidden for t in found.trials} == {(8,)}


def test_axes_of_ones_own_are_sets_of_options(tmp_path):
    study = small(vary={"encoder": {"narrow": {"hidden": (4,)}, "wide": {"hidden": "16,16", "beta": 2}}}, seeds=1)
    found = plan(study, tmp_path)
    assert {t.arm: (t.options.hidden, t.options.beta) for t in found.trials} == {
        "narrow": ((4,), 1.0), "wide": ((16, 16), 2.0),
    }  # fmt: skip
    again = Study.of(json.loads(json.dumps(study.to_json())))
    assert [t.folder for t in plan(again, tmp_path).trials] == [t.folder for t in found.trials]


def test_the_command_says_who_is_ahead_first_and_finds_its_study_again(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = ["--vary", "posterior=diagonal,full", "--hidden", "8", "--latent-dim", "2", "--epochs", "1", "--limit",
                 "100", "--evaluation-samples", "10", "--evaluation-images", "30"]  # fmt: skip
    assert command(["compare", *arguments, "--dry-run"]) == 0
    planned = capsys.readouterr().out
    assert "2 fits: 0 done, 0 failed, 2 to come, " in planned and not (tmp_path / "studies").exists()
    assert command(["compare", *arguments, "--jobs", "1", "--table", "t.tex"]) == 0
    shown = capsys.readouterr()
    assert shown.out.splitlines()[0].startswith(("nobody is ahead for sure", "full is ahead", "diagonal is ahead"))
    assert r"\toprule" in Path("t.tex").read_text()
    (study,) = Path("studies").iterdir()
    assert command(["compare", *arguments, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [row["rank"] for row in told["rows"]] == [0, 1] and list(Path("studies").iterdir()) == [study]
    assert command(["compare", str(study), "--dry-run"]) == 0 and "2 done" in capsys.readouterr().out
    assert command(["report", str(study)]) == 0 and str(study / "report.html") in capsys.readouterr().out
    text = (study / "report.html").read_text()
    assert "pyro-vae fit --config" in text and "<script" not in text and "http" not in text.split("</style>")[1]
    runs = [str(path) for path in sorted((study / "trials").iterdir())]
    assert command(["compare", *runs, "--out", "page"]) == 0
    first = capsys.readouterr().out.splitlines()[0]
    assert "nats of log p(x)" in first and (tmp_path / "page" / "report.html").is_file()
    for bad, said in ((["compare", runs[0]], "at least two"), (["compare", *runs, "--epochs", "3"], "got --epochs"),
                      (["compare", str(study), *runs], "a study alone"), (["compare", "--vary", "posterior"], "NAME=A,B"),
                      (["compare", "--vary", "posterior=full", *runs], "wanted one of them"),
                      (["report", runs[0]], "the folder of a study"),
                      (["compare", "nowhere.yaml"], "got nowhere.yaml, which is not there"),
                      (["compare", "--vary", "posterior=full", "--budget", "x"], "got --budget x, wanted epochs")):  # fmt: skip
        assert command(bad) == 2
        assert said in capsys.readouterr().err


def test_code_of_ones_own_is_imported_only_if_the_command_says_so(tmp_path, capsys):
    (tmp_path / "study.yaml").write_text("vary: {posterior: [diagonal, 'evil_module:Posterior']}\n")
    assert command(["compare", str(tmp_path / "study.yaml"), "--dry-run"]) == 2
    assert "--trust evil_module:Posterior" in capsys.readouterr().err and "evil_module" not in sys.modules


def test_pairs_in_python():
    torch.manual_seed(0)
    x = torch.bernoulli(torch.full((300, 6), 0.3), generator=torch.Generator().manual_seed(0))
    pairs = {name: [] for name in ("short", "long")}
    for seed in (0, 1):
        for name, epochs in (("short", 1), ("long", 12)):
            torch.manual_seed(seed)
            vae = pv.VAE.build((6,), latent_dim=1, hidden=(8,))
            pv.fit(vae, x, epochs=epochs, batch_size=30, learning_rate=1e-2, seed=seed, progress=False)
            pairs[name].append(vae)
    found = pv.compare(pairs, x, num_samples=50, progress=False)
    assert found.best == "long" and found.difference("long", "short").num_seeds == 2
    one = pv.compare({"a": pairs["long"][0], "b": (pairs["long"][0].model, pairs["short"][0].guide)}, x, num_samples=50,
                     progress=False)  # fmt: skip
    assert one.criterion == "elbo"  # one model, to the bit
    by_hand = [pv.elbo_terms(pairs["long"][0].model, guide, x, num_samples=50, seed=0, progress=False).value
               for guide in (pairs["long"][0].guide, pairs["short"][0].guide)]  # fmt: skip
    assert one.difference("a", "b").value == pytest.approx(by_hand[0] - by_hand[1], abs=1e-6)
    with pytest.raises(ValueError, match="got 1 pairs, wanted at least two"):
        pv.compare([pairs["long"][0]], x)
    with pytest.raises(ValueError, match="got pairs and no data"):
        pv.compare(pairs)
    with pytest.raises(ValueError, match="got int as the pair 'a'"):
        pv.compare({"a": 1, "b": 2}, x)


def test_runs_that_differ_in_their_seeds_alone_are_one_arm(done):
    folder = done[0]
    runs = [path for path in sorted(folder.glob("trials/*-elbo-*")) if path.is_dir()]
    found = pv.compare(runs, num_samples=20, num_data=40, progress=False)
    assert sorted(len(own) for own in found.arms.values()) == [2, 2]
    study = done[1].difference("full, elbo", "diagonal, elbo")
    names = {"full": next(n for n in found.arms if "full" in n), "diagonal": next(n for n in found.arms if "diag" in n)}
    again = found.difference(names["full"], names["diagonal"])
    assert again.value == pytest.approx(study.value, abs=1e-5) and again.num_seeds == 2


def test_runs_of_different_data_are_refused_by_name(done, tmp_path, capsys):
    run = str(next(path for path in sorted(done[0].glob("trials/*")) if path.is_dir()))
    other = tmp_path / "normal"
    options = ["--hidden", "8", "--latent-dim", "2", "--epochs", "1", "--limit", "100", "--evaluation-samples", "10",
               "--evaluation-images", "20", "--quiet"]  # fmt: skip
    assert command(["fit", *options, "--likelihood", "normal", "--out", str(other)]) == 0
    assert command(["compare", run, str(other)]) == 2
    assert "--binarization 'dynamic' against 'none'" in capsys.readouterr().err


def test_on_a_dask_cluster_of_two_workers_with_one_killed_midway(done, tmp_path):
    distributed = pytest.importorskip("distributed", reason="dask is not installed")
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster:
        with distributed.Client(cluster) as client:
            client.run(pictures.leave_out)
        study = small(vary={"posterior": ["diagonal", "full"]})
        planned = plan(study, tmp_path / "study")
        from threading import Thread

        def kill() -> None:
            while not any(state(trial) == "done" for trial in planned.trials):
                time.sleep(0.05)
            os.kill(next(iter(cluster.workers.values())).pid, signal.SIGKILL)

        killer = Thread(target=kill, daemon=True)
        killer.start()
        execute(planned, backend="dask", address=cluster.scheduler_address, progress=False)
        killer.join(1)
        assert not killer.is_alive()
        assert {state(trial) for trial in planned.trials} == {"done"}
    whole = rankings(plan(small(), done[0]), small())["digits"]
    found = rankings(planned, study)["digits"]
    assert set(found.arms) == {"diagonal", "full"}
    for name, own in found.arms.items():
        assert all(torch.equal(a.log_p, b.log_p) for a, b in zip(own, whole.arms[f"{name}, elbo"], strict=True))


def test_help_names_what_a_study_needs():
    text = CliRunner().invoke(commands, ["compare", "--help"]).output
    for word in ("--vary", "--seeds", "--freeze", "--budget", "--dry-run", "--jobs", "--backend", "--posterior"):
        assert word in text


def test_scores_are_read_as_they_were_written(done):
    trial = plan(small(), done[0]).trials[0]
    own = read_scores(trial)
    assert own.log_p.dtype == torch.float64 and own.num_samples == 20 and own.parameters > 0 and own.seconds > 0
