"""`pyro-vae runs`, and the line at the end of every command that says what to type next."""

import json
import re
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from pyro_vae.app import following, listing
from pyro_vae.app.cli import commands, main
from pyro_vae.app.runs import run_folder

TINY = ["--epochs", "1", "--limit", "100", "--hidden", "8", "--latent-dim", "2", "--evaluation-samples", "20",
        "--evaluation-images", "20"]  # fmt: skip
NUMBERED = re.compile(r"^next: (.*)$", re.M)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Three runs: a default, one that goes on from it, and an autoencoder in a folder below."""
    folder = tmp_path_factory.mktemp("made") / "runs"
    assert main(["fit", *TINY, "--out", str(folder / "a"), "--quiet"]) == 0
    assert main(["fit", "--from", str(folder / "a"), "--out", str(folder / "b"), "--epochs", "3", "--quiet"]) == 0
    assert main(["fit", *TINY, "--posterior", "point", "--out", str(folder / "deep" / "c"), "--quiet"]) == 0
    return folder


@pytest.fixture
def here(made, tmp_path, monkeypatch):
    """The current folder, with a copy of them in `runs`, and a damaged and two unfinished ones."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(made, "runs")
    (tmp_path / "runs" / "bad").mkdir()
    (tmp_path / "runs" / "bad" / "config.json").write_text('{"data": "digits", "epochs": "many"}')
    for name in ("summary.json", "weights.safetensors"):
        (tmp_path / "runs" / "bad" / name).write_text("{}")
    config = json.loads((tmp_path / "runs" / "a" / "config.json").read_text())
    for name, epochs in (("begun", 0), ("half", 2)):
        with pytest.raises(KeyError), run_folder(tmp_path / "runs" / name, config | {"seed": 7}) as path:
            (path / "weights.safetensors").touch()
            if epochs:
                (path / "config.json").write_text(json.dumps(config | {"epochs": 9}))
                (path / "metrics.jsonl").write_text("{}\n" * epochs)
            raise KeyError
    (tmp_path / "runs" / "begun" / "weights.safetensors").unlink()
    return tmp_path


def test_the_records_are_what_the_folders_hold(here, capsys):
    assert main(["runs", "--json", "--sort", "name"]) == 0
    said = capsys.readouterr()
    assert said.err == "", "a program reads this"
    found = {record["run"]: record for record in json.loads(said.out)}
    assert list(found) == [f"runs/{name}" for name in ("a", "b", "bad", "begun", "deep/c", "half")]
    for name in ("a", "b"):
        summary = json.loads((here / "runs" / name / "summary.json").read_text())
        record = found[f"runs/{name}"]
        assert record["elbo"] == summary["test_elbo"] and record["log_p"] == summary["test_log_likelihood"]
        assert record["log_p_stderr"] == summary["test_log_likelihood_stderr"] and record["state"] == "finished"
        assert record["seconds"] == pytest.approx(summary["train_seconds"] + summary["evaluation_seconds"])
    assert found["runs/a"]["options"] == {"limit": "100", "hidden": "8", "latent-dim": "2"}
    assert found["runs/b"]["from"].endswith("runs/a") and found["runs/b"]["epochs"] == 3
    assert found["runs/deep/c"]["options"]["posterior"] == "point" and found["runs/deep/c"]["elbo"] is None
    assert found["runs/deep/c"]["reconstruction"] < 0
    states = {name: (record["state"], record["epochs"], record["of"]) for name, record in found.items()}
    assert states["runs/begun"] == ("unfinished", 0, 1) and states["runs/half"] == ("unfinished", 2, 9)
    assert states["runs/bad"][0] == "damaged" and "epochs = 'many', wanted a whole number" in found["runs/bad"]["why"]
    assert found["runs/begun"]["options"]["seed"] == "7"


@pytest.mark.parametrize(
    "wrong", ["not json", "[]", '{"data": 3}', '{"data": "digits", "epochs": 2, "epoch": 1}', "{}"]
)
@pytest.mark.parametrize("name", ["config.json", "summary.json", "unfinished.json"])
def test_whatever_is_wrong_with_a_run_it_is_a_row(wrong, name, here, capsys):
    (here / "runs" / "a" / name).write_text(wrong)
    assert main(["runs"]) == 0
    said = capsys.readouterr()
    assert "6 runs" in said.out and "Traceback" not in said.err


@pytest.mark.parametrize(
    "sort, first, last",
    [("elbo", None, None), ("log-p", None, None), ("name", "a", "half"), ("epochs", "b", "bad"), ("data", "a", "bad")],
)
def test_the_order_is_the_one_that_was_asked_for(sort, first, last, here, capsys):
    assert main(["runs", "--json", "--sort", sort]) == 0
    records = json.loads(capsys.readouterr().out)
    found = [record["run"] for record in records]
    if first is not None:
        assert found[0] == f"runs/{first}" and found[-1] == f"runs/{last}"
        return
    numbers = [record[sort.replace("-", "_")] for record in records]
    assert numbers[0] > numbers[1] and set(found[:2]) == {"runs/a", "runs/b"}
    assert set(numbers[2:]) == {None} and sorted(found[2:]) == found[2:], "what has no number comes last"


def test_the_table_fits_eighty_columns(here, capsys):
    (here / "runs" / ("a-rather-long-name-" * 4)).mkdir()
    for file in (here / "runs" / "a").iterdir():
        if file.is_file():
            shutil.copy(file, here / "runs" / ("a-rather-long-name-" * 4) / file.name)
    assert main(["runs"]) == 0
    said = capsys.readouterr()
    assert max(map(len, said.out.splitlines())) <= 80
    for word in ("log p(x)", "unfinished", "damaged:", "= 'many'", "2/9", "reconstruction", "7 runs, the latest first"):
        assert word in said.out
    assert "next: pyro-vae" in said.err and "next:" not in said.out


def test_it_looks_where_it_is_told_and_takes_no_torch(here, capsys):
    assert main(["runs", "runs/deep", "runs/a", "runs", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 6, "each run once"
    assert main(["runs", "--data", "mnist", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == []
    assert main(["runs", "nowhere"]) == 2
    assert "got nowhere, wanted a folder with runs in it." in capsys.readouterr().err
    (here / "empty").mkdir()
    assert main(["runs", "empty"]) == 0
    assert capsys.readouterr().err == "no runs in empty\nnext: pyro-vae fit\n"
    code = "import sys; from pyro_vae.app.cli import main; main(['runs']); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def following_line(capsys):
    said = capsys.readouterr()
    assert "next:" not in said.out
    (line,) = NUMBERED.findall(said.err)
    assert said.err.splitlines()[-1] == f"next: {line}"
    return line


def test_every_command_says_the_next_one_in_a_line(here, capsys, monkeypatch):
    (here / "runs" / "a").rename(here / "my run")
    Image.fromarray(np.zeros((8, 8), dtype=np.uint8)).save("one.png")
    for argv, wanted in {
        ("evaluate", "my run", "-K", "20"): "judge 'my run'",
        ("draw", "my run"): "judge 'my run'",
        ("sample", "my run", "-n", "4"): "anomalies 'my run'",
        ("reconstruct", "my run", "one.png", "-K", "20"): "anomalies 'my run'",
        ("anomalies", "my run", "-K", "5"): "encode 'my run' test --out codes.csv",
        ("encode", "my run", "test", "--out", "codes.csv"): "export 'my run'",
        ("sample", "runs/deep/c", "-n", "4"): "anomalies runs/deep/c",
        ("draw", "runs/deep/c"): "sample runs/deep/c",
    }.items():
        assert main(list(argv)) == 0
        line = following_line(capsys)
        assert line == f"pyro-vae {wanted}"
        words = shlex.split(line)
        commands.commands[words[1]].make_context(words[1], words[2:])  # it can be typed
    assert main(["evaluate", "my run", "-K", "20", "--json"]) == 0
    assert "next:" not in capsys.readouterr().err
    assert main(["fit", *TINY, "--posterior", "point", "--out", "p"]) == 0
    assert following_line(capsys) == "pyro-vae sample p"


def test_the_next_command_is_one_that_there_is(here):
    run = here / "runs" / "a"
    assert following.after("export", run, {}) == f"pyro-vae explore {run}"
    records = listing.list_runs([here / "runs"], as_json=True)
    assert following.after_listing(records).startswith("pyro-vae compare ")
    assert {"explore", "compare"} <= set(commands.commands)
    alone = [record for record in records if record["run"].endswith("/a")]
    assert following.after_listing(alone) == f"pyro-vae judge {run}"
    for other in ({"model": "conditional"}, {"likelihood": "normal"}):  # compare refuses these
        latest = alone[0] | {"run": "runs/c", "time": alone[0]["time"] + 1, "options": other}
        assert following.after_listing([latest, *alone]) == "pyro-vae judge runs/c"
    latest = alone[0] | {"run": "runs/c", "time": alone[0]["time"] + 1, "options": {"model": "mixture", "beta": "2"}}
    assert following.after_listing([latest, *alone]) == f"pyro-vae compare {run} runs/c"


def test_advice_that_was_followed_is_compared(here, capsys):
    """The first advice, until there is a finished run of its options, or one that goes on from this one."""
    from pathlib import Path

    shutil.rmtree("runs/b")
    run = Path("runs/a")
    advice = ["pyro-vae fit --config runs/a/config.json --hidden 16", "pyro-vae evaluate runs/a --refine hamiltonian"]
    assert following.after_judging(run, advice) == advice[0]
    assert following.after_judging(run, []) == "pyro-vae sample runs/a -n 100"
    assert following.after_judging(run, [], 600.0) == "pyro-vae judge runs/a --budget 600"
    assert following.after_judging(run, advice, 600.0) == advice[0], "what was found in time goes first"
    assert main([*shlex.split(advice[0])[1:], "--out", "my answer", "--quiet"]) == 0
    assert following.after_judging(run, advice) == advice[0], "it lies elsewhere"
    Path("my answer").rename("runs/my answer")
    assert following.after_judging(run, advice) == "pyro-vae compare runs/a 'runs/my answer'"
    other = ["pyro-vae fit --config runs/a/config.json --hidden 17"]
    assert following.after_judging(run, other) == other[0]
    assert main(["fit", "--from", "runs/a", "--out", "runs/on", "--quiet"]) == 0
    assert following.after_judging(run, other) == "pyro-vae compare runs/a runs/on"


def test_judge_ends_with_its_first_advice_and_json_does_not(here, capsys, monkeypatch):
    from pyro_vae.judging import judgement

    found = []

    def quick(*arguments, **options):
        found.append(original(*arguments, **options))
        return found[-1]

    original = judgement.judge
    monkeypatch.setattr(judgement, "judge", quick)
    assert main(["judge", "runs/a", "--budget", "3", "--num-data", "4"]) == 0
    line = following_line(capsys)
    typed = [
        finding.command
        for finding in found[-1].of_run("runs/a", json.loads((here / "runs/a/config.json").read_text())).advice
    ]
    late = any(finding.advice == "Give more time (budget)." for finding in found[-1].findings)
    without = "pyro-vae judge runs/a --budget 600" if late else "pyro-vae sample runs/a -n 100"
    assert line == (typed[0] if typed else without)
    assert main(["judge", "runs/a", "--budget", "1", "--json"]) == 0
    assert "next:" not in capsys.readouterr().err
