"""The command from the outside: what it prints, what it leaves on disk, how it fails."""

import json
import math
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from pyro_vae import __version__
from pyro_vae.app import fitting, reading
from pyro_vae.app.building import build
from pyro_vae.app.cli import commands, main
from pyro_vae.app.defaults import CHOICES, DATASETS, resolve
from pyro_vae.app.reading import read
from pyro_vae.data import BINARIZATIONS
from pyro_vae.data import DATASETS as READABLE
from pyro_vae.inference import loop
from pyro_vae.inference.schedules import SCHEDULES
from pyro_vae.parts.networks import ACTIVATIONS

TINY = ["--epochs", "1", "--limit", "100", "--hidden", "16", "--latent-dim", "3", "--evaluation-samples", "20",
        "--evaluation-images", "20"]  # fmt: skip


def failed(argv, capsys):
    """The one line of an error that the user can mend."""
    code = main([str(part) for part in argv])
    said = capsys.readouterr()
    assert code == 2, said.err
    assert said.out == ""
    assert "Traceback" not in said.err
    line = said.err.strip().splitlines()[-1]
    assert line.startswith("pyro-vae: error: ")
    return line


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_help_shows_groups_examples_and_defaults(capsys):
    assert main(["fit", "--help"]) == 0
    text = capsys.readouterr().out
    for word in ("Data:", "Model:", "Training:", "Evaluation:", "Run:", "Examples:", "Defaults by dataset", "5000]"):
        assert word in text
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    for command in ("fit", "evaluate", "sample", "reconstruct", "anomalies"):
        assert command in text


def test_no_command_shows_what_there_is(capsys):
    assert main([]) == 0
    assert "Commands:" in capsys.readouterr().out


def test_every_command_has_help(capsys):
    for command in ("evaluate", "sample", "reconstruct", "anomalies"):
        assert main([command, "--help"]) == 0
        assert "RUN" in capsys.readouterr().out


@pytest.mark.parametrize("command", [None, *commands.commands])
def test_help_fits_a_terminal_of_eighty_columns_and_is_not_cut(command, capsys, monkeypatch):
    for columns in (80, 160):
        monkeypatch.setattr("shutil.get_terminal_size", lambda *_, columns=columns: os.terminal_size((columns, 24)))
        assert main([*([] if command is None else [command]), "--help"]) == 0
        lines = capsys.readouterr().out.splitlines()
        # A list of choices stands in a line of its own, however long.
        assert [line for line in lines if len(line) > min(columns, 100) and not re.match(r" +--[a-z-]+ \[", line)] == []
        assert not [line for line in lines if re.search(r"[a-z]\.\.\.$", line)]


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"pyro-vae {__version__}\n"


def test_choices_are_those_of_the_library():
    assert set(DATASETS) == set(READABLE)
    assert set(CHOICES["binarization"]) == set(BINARIZATIONS)
    assert set(CHOICES["schedule"]) == set(SCHEDULES)
    assert set(CHOICES["activation"]) == set(ACTIVATIONS)


@pytest.mark.parametrize("name", DATASETS)
def test_a_resolved_configuration_resolves_to_itself(name):
    options = resolve({"data": name})
    assert resolve(vars(options)) == options
    assert resolve(json.loads(json.dumps(options.to_json()))) == options


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--data", "mnits"], "Did you mean 'mnist'?"),
        (["--epoch", "3"], "Try 'pyro-vae fit --help'"),
        (["--epochs", "many"], "'many' is not a valid integer"),
        (["--epochs", "0"], "--epochs 0, wanted a number >= 1"),
        (["--evaluation-samples", str(2**63)], f"--evaluation-samples {2**63}, wanted a number up to 2,147,483,647"),
        (["--batch-size", str(10**23)], f"--batch-size {10**23}, wanted a number up to"),
        (["--learning-rate", "nan"], "--learning-rate nan, wanted a number > 0"),
        (["--data-seed", str(2**64)], f"--data-seed {2**64}, wanted a number below 2^63"),
        (["--split-seed", "-1"], "--split-seed -1, wanted a number >= 0"),
        (["--learning-rate", "-1"], "--learning-rate -1.0, wanted a number > 0"),
        (["--learning-rate", "nan"], "--learning-rate nan"),
        (["--network", "cnn"], "--network 'cnn', wanted one of mlp, gated, conv, residual, linear."),
        (["--hidden", "400,x"], "--hidden = '400,x', wanted whole numbers such as 400,400"),
        (["--hidden", "0"], "wanted positive widths"),
        (["--scale", "-1"], "--scale -1.0, wanted a number > 0 or one of learned"),
        (["--likelihood", "normal", "--binarization", "dynamic"], "a density of zeros and ones has no upper limit"),
        (["--posterior", "point", "--bound", "iwae"], "a plain autoencoder has no bound"),
        (["--posterior", "point", "--kl-warmup", "1", "--epochs", "3"], "kl_warmup tempers an ELBO"),
        (["--kl-warmup", "5", "--epochs", "3"], "kl_warmup"),
        (["--kl-warmup-steps", "5000", "--epochs", "3"], "kl_warmup_steps must lie below the number of steps"),
        (["--device", "cuda:99"], "Use --device cpu"),
        (["--device", "gpu"], "Use --device cpu"),
        (["--data", "linear-gaussian", "--network", "conv"], "wanted images. Use --network mlp"),
        (["--data", "frey", "--data-dir", "nowhere"], "no frey_faces.npz in"),
        (["--config", "nowhere.yaml"], "wanted a readable YAML or JSON file: No such file"),
        (["--threads", "0"], "--threads 0, wanted a number >= 1"),
        (["extra"], "unexpected extra argument"),
    ],
)
def test_a_bad_option_is_one_line_and_leaves_nothing(argv, words, here, capsys):
    assert words in failed(["fit", "--out", "some/run", *argv], capsys)
    assert list(here.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("epoch: 3", "unknown key 'epoch'. Did you mean 'epochs'?"),
        ("epochs: many", "epochs = 'many', wanted a whole number"),
        ("epochs: 1.5", "epochs = 1.5, wanted a whole number"),
        ("epochs: true", "epochs = True, wanted a whole number"),
        ("learning-rate: [1]", "learning-rate = [1], wanted a number"),
        ("dequantize: maybe", "wanted true or false"),
        ("data: 3", "data = 3, wanted text"),
        ("- epochs", "wanted options by name"),
        ("epochs: [1", "not valid YAML"),
        ("!!python/object/apply:os.system ['touch hacked']", "not valid YAML"),
        ("hidden: [400, wide]", "wanted whole numbers"),
    ],
)
def test_a_bad_config_is_one_line_and_leaves_nothing(text, words, here, capsys):
    (here / "bad.yaml").write_text(text)
    assert words in failed(["fit", "--config", "bad.yaml"], capsys)
    assert [path.name for path in here.iterdir()] == ["bad.yaml"]


def test_bad_json_names_the_line(here, capsys):
    (here / "bad.json").write_text('{"epochs": 3,\n "seed" 1}')
    assert "not valid JSON: Expecting ':' delimiter in line 2" in failed(["fit", "--config", "bad.json"], capsys)


def test_the_command_line_wins_over_the_file(here, monkeypatch):
    (here / "some.yaml").write_text("epochs: 7\nbatch-size: 32\nlearning_rate: 2e-3\nhidden: 40,20\nout: there\n")
    seen = {}

    def record(options, path, **_):
        seen.update(options=options, path=path)
        return {"interrupted": False}

    monkeypatch.setattr(fitting, "fit_run", record)
    monkeypatch.setattr("pyro_vae.app.report.show_lines", lambda *_: None)
    assert main(["fit", "--config", "some.yaml", "--epochs", "9"]) == 0
    options = seen["options"]
    assert (options.epochs, options.batch_size, options.learning_rate, options.hidden) == (9, 32, 2e-3, (40, 20))
    assert seen["path"] == Path("there")


def test_an_existing_folder_is_left_alone(here, capsys):
    (here / "run").mkdir()
    (here / "run" / "mine.txt").write_text("mine")
    assert "--out run, which exists, wanted a new folder" in failed(["fit", "--out", "run"], capsys)
    assert [path.name for path in here.rglob("*")] == ["run", "mine.txt"]


def test_an_unwritable_place_fails_before_anything_is_read(here, capsys, monkeypatch):
    monkeypatch.setattr(reading, "load", lambda *_, **__: pytest.fail("data were read"))
    (here / "file").write_text("")
    assert "wanted a place to write to: not a directory" in failed(["fit", "--out", "file/run"], capsys)
    assert [path.name for path in here.iterdir()] == ["file"]


@pytest.mark.parametrize("where", ["vae.save", "write_json"])
def test_a_failure_on_the_way_leaves_nothing(where, here, capsys, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    place = {"vae.save": "pyro_vae.programs.vae.VAE.save", "write_json": "pyro_vae.app.progress.write_lines"}
    monkeypatch.setattr(place[where], full)
    assert "No space left on device" in failed(["fit", "--out", "a/b/run", *TINY], capsys)
    assert list(here.iterdir()) == []


@pytest.mark.parametrize("where", ["report.draw", "evaluation.evaluate"])
def test_a_failure_after_the_training_keeps_what_was_trained(where, here, capsys, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(f"pyro_vae.app.{where}", full)
    said = failed(["fit", "--out", "run", *TINY], capsys)
    assert "lies in run, but judging it failed" in said and "No space left on device" in said
    assert [path.name for path in here.iterdir()] == ["run"]
    assert ("test_elbo" in json.loads((here / "run" / "summary.json").read_text())) == (where == "report.draw")
    monkeypatch.undo()
    monkeypatch.chdir(here)
    assert main(["evaluate", "run", "-K", "20"]) == 0


def test_ctrl_c_while_reading_leaves_nothing(here, capsys, monkeypatch):
    def stopped(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(reading, "load", stopped)
    assert main(["fit", "--out", "run"]) == 130
    assert capsys.readouterr().err.strip() == "pyro-vae: interrupted"
    assert list(here.iterdir()) == []


@pytest.mark.parametrize("when", ["training", "evaluating"])
def test_ctrl_c_keeps_what_was_trained(when, here, capsys, monkeypatch):
    def stopped(*_, **__):
        raise KeyboardInterrupt

    if when == "training":
        epoch, calls = loop.Stepper.epoch, []

        def at_the_third(*arguments):
            calls.append(0)
            return stopped() if len(calls) == 3 else epoch(*arguments)

        monkeypatch.setattr(loop.Stepper, "epoch", at_the_third)
    else:
        monkeypatch.setattr(fitting.evaluation, "evaluate", stopped)
    assert main(["fit", "--out", "run", *TINY, "--epochs", "5"]) == 130
    summary = json.loads((here / "run" / "summary.json").read_text())
    assert summary["interrupted"] is True
    assert summary["epochs"] == (2 if when == "training" else 5)
    assert "test_elbo" not in summary
    assert [path.name for path in here.iterdir()] == ["run"]
    assert "what was trained so far is in run" in capsys.readouterr().err
    monkeypatch.undo()
    monkeypatch.chdir(here)
    assert main(["evaluate", "run", "-K", "20"]) == 0
    assert "test log p(x)" in capsys.readouterr().out


def test_default_folders_are_numbered(here, capsys):
    for _ in range(2):
        assert main(["fit", *TINY, "--quiet"]) == 0
    assert sorted(path.name for path in (here / "runs").iterdir()) == ["digits-1", "digits-2"]
    said = capsys.readouterr()
    assert said.out == said.err == ""


def test_nothing_but_the_summary_where_there_is_no_terminal(here, capfd):
    """Of the process: what is written past Python's own streams counts too."""
    assert main(["fit", "--out", "run", *TINY]) == 0
    out, err = capfd.readouterr()
    assert "\r" not in out + err
    assert "\x1b" not in out + err
    assert len(err.strip().splitlines()) == 3 and err.splitlines()[-1].startswith("next: pyro-vae judge")
    assert out.startswith("test ELBO")


def test_random_state_and_settings_are_left_alone(here):
    torch.manual_seed(3)
    state, precision = torch.get_rng_state(), torch.get_float32_matmul_precision()
    assert main(["fit", "--out", "run", "--quiet", "--matmul-precision", "medium", *TINY]) == 0
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_float32_matmul_precision() == precision


def test_a_run_that_was_broken_off_goes_on_from_its_checkpoint(here, capsys, monkeypatch):
    argv = ["fit", *TINY, "--epochs", "4", "--seed", "3"]
    assert main([*argv, "--out", "whole", "--quiet"]) == 0
    epoch, calls = loop.Stepper.epoch, []

    def killed_in_the_third(*arguments):
        calls.append(0)
        if len(calls) == 3:
            raise MemoryError("killed")
        return epoch(*arguments)

    monkeypatch.setattr(loop.Stepper, "epoch", killed_in_the_third)
    argv += ["--out", "part", "--checkpoint", "state.safetensors"]
    assert "killed" in failed(argv, capsys)
    assert {path.name for path in here.iterdir()} == {
        "whole",
        "part",
        "state.safetensors",
        "state.previous.safetensors",
    }
    monkeypatch.undo()
    monkeypatch.chdir(here)
    assert main(argv) == 0 and not (here / "state.safetensors").exists()
    whole, part = (load_file(here / name / "weights.safetensors") for name in ("whole", "part"))
    assert all(torch.equal(whole[name], part[name]) for name in whole)
    assert len((here / "part" / "metrics.jsonl").read_text().splitlines()) == 4


OWN = """
import pyro.distributions as dist
from pyro_vae.parts.posteriors import Amortized

class Mine(Amortized):
    def __init__(self, encoder, latent_dim, df=5.0):
        super().__init__(encoder, latent_dim, 2 * latent_dim)
        self.df = df

    def family(self, parameters):
        loc, log_scale = parameters.chunk(2, -1)
        return dist.StudentT(self.df, loc, log_scale.exp()).to_event(1)
"""


def test_a_part_of_ones_own_goes_by_its_import_path_and_is_loaded_only_on_trust(here, capsys, monkeypatch):
    (here / "own_parts.py").write_text(OWN)
    monkeypatch.syspath_prepend(here)
    argv = ["fit", *TINY, "--out", "run", "--posterior", "own_parts:Mine", "--posterior-options", "df=4.0"]
    assert main(argv) == 0
    capsys.readouterr()
    monkeypatch.delitem(sys.modules, "own_parts")
    assert "built with own_parts:Mine, code outside pyro_vae" in failed(["evaluate", "run", "-K", "20"], capsys)
    assert "own_parts" not in sys.modules
    assert main(["evaluate", "run", "-K", "20", "--trust", "own_parts:Mine"]) == 0
    assert "test log p(x)" in capsys.readouterr().out
    said = failed(["fit", *TINY, "--out", "other", "--posterior", "own_parts:Nobody"], capsys)
    assert "posterior 'own_parts:Nobody', wanted a class that can be imported" in said


@pytest.mark.parametrize(
    "argv",
    [
        ["--posterior", "planar", "--posterior-options", "num_flows=2", "--prior", "vamp", "--prior-options", "num_components=5"],
        ["--posterior", "von-mises-fisher", "--network", "gated"],
        ["--prior", "flow", "--bound", "iwae", "--num-samples", "3", "--estimator", "doubly-reparameterized"],
        ["--likelihood", "discretized-logistic", "--network", "residual", "--hidden", "4,8"],
        pytest.param(
            ["--likelihood", "categorical", "--likelihood-options", "levels=256", "--bound", "renyi", "--bound-options", "alpha=0.3"],
            marks=pytest.mark.slow,
        ),
        ["--likelihood", "continuous-bernoulli", "--prior", "mixture", "--regularizers", "mmd=10,free-bits=0.1"],
        ["--likelihood", "poisson", "--posterior", "low-rank", "--compile", "off"],
    ],
)  # fmt: skip
def test_every_kind_of_part_goes_through_the_command(argv, here, capsys):
    assert main(["fit", *TINY, "--out", "run", *argv]) == 0
    summary = json.loads((here / "run" / "summary.json").read_text())
    assert math.isfinite(summary["test_log_likelihood"]) and math.isfinite(summary["test_elbo"])
    assert main(["evaluate", "run", "-K", "20"]) == 0 and main(["sample", "run", "-n", "4"]) == 0


@pytest.mark.parametrize(
    "posterior, limit, count",
    [("diagonal", None, 500), ("diagonal", 64, 64), ("nsf", None, 12), ("nsf", 64, 10), ("nsf", 5, 5)],
)
def test_a_vamp_prior_has_as_many_pseudo_inputs_as_data_and_posterior_bear(posterior, limit, count):
    options, dataset = read(resolve({"prior": "vamp", "posterior": posterior, "limit": limit}))
    assert options.prior_options == {"num_components": count} and resolve(options.to_json()) == options
    assert build(options, dataset).model.prior.num_components == count
    given = read(resolve({"prior": "vamp", "prior_options": {"num_components": 3, "learned_weights": True}}))[0]
    assert given.prior_options == {"num_components": 3, "learned_weights": True}


def test_counts_are_whole_numbers_and_those_of_images_their_levels(here, capsys):
    options, dataset = read(resolve({"likelihood": "poisson"}))
    assert options.likelihood_options == {"levels": 256} and resolve(options.to_json()) == options
    x = dataset.train[:4]
    given_z = build(options, dataset).decode(torch.zeros(4, 10))
    rate = 255 * given_z.mean
    wanted = torch.distributions.Poisson(rate).log_prob((255 * x).round()).sum((-1, -2, -3))
    assert torch.allclose(given_z.log_prob(x), wanted, rtol=1e-5)
    np.save("counts.npy", np.random.default_rng(0).poisson(3.0, (200, 16)).astype(np.float32))
    np.save("fractions.npy", np.random.default_rng(0).random((200, 16), dtype=np.float32))
    assert read(resolve({"data": "counts.npy", "likelihood": "poisson"}))[0].likelihood_options == {}
    argv = ["fit", *TINY, "--likelihood", "negative-binomial", "--out", "run"]
    assert main([*argv, "--data", "counts.npy"]) == 0
    assert math.isfinite(json.loads((here / "run" / "summary.json").read_text())["test_log_likelihood"])
    capsys.readouterr()
    argv[-1] = "other"
    assert "counts 0, 1, 2, ...: for grey levels v / 255" in failed([*argv, "--data", "fractions.npy"], capsys)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the prior of site .* is a mixture of 10 flows:UserWarning")
def test_the_command_of_the_issue(here):
    """Word for word, but for less data and fewer epochs: a flow in a mixture prior under 50 samples."""
    argv = "fit --posterior nsf --prior vamp --likelihood bernoulli --bound iwae --num-samples 50"
    argv += " --estimator doubly-reparameterized --epochs 1 --limit 64 --evaluation-samples 20 --evaluation-images 10"
    assert main([*argv.split(), "--out", "run", "--quiet"]) == 0
    config = json.loads((here / "run" / "config.json").read_text())
    assert (config["posterior"], config["prior"], config["num_samples"]) == ("nsf", "vamp", 50)
    assert math.isfinite(json.loads((here / "run" / "summary.json").read_text())["test_log_likelihood"])


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--posterior", "von-mises-fisher", "--prior", "normal"], "Use prior 'hyperspherical'"),
        (["--prior", "hyperspherical"], "Use posterior 'von-mises-fisher'"),
        (
            ["--bound", "vr-max", "--estimator", "doubly-reparameterized"],
            "needs a bound whose derivative is continuous",
        ),
        (["--posterior", "point", "--prior", "vamp"], "a plain autoencoder has neither a prior nor a bound"),
        (
            ["--posterior", "full", "--posterior-options", "rank=3"],
            "posterior 'full' has no option 'rank'; it has none",
        ),
        (["--posterior-options", "rank"], "wanted options such as bins=8,transforms=2"),
        (["--bound", "renyi", "--bound-options", "beta=1"], "the bound renyi, which has alpha"),
        (["--regularizers", "mdd=1"], "Did you mean 'mmd'?"),
        (["--posterior", "plana"], "Did you mean 'planar'?"),
        (["--prior", "vamp", "--prior-options", "num_components=5000"], "Pass --prior-options num_components="),
        (["--likelihood", "categorical", "--binarization", "static"], "a distribution of levels needs levels"),
        (["--checkpoint", "state.bin"], "wanted NAME.safetensors in a folder that exists"),
    ],
)
def test_what_does_not_go_together_is_one_line_and_leaves_nothing(argv, words, here, capsys):
    assert words in failed(["fit", *TINY, "--out", "some/run", *argv], capsys)
    assert list(here.iterdir()) == []
