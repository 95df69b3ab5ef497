"""`pyro-vae fit --model`: the pairs of the zoo through the command, with numbers that hold when computed from Python."""

import dataclasses
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import pyro_vae as pv
from pyro_vae.app import defaults, evaluation, reading, serving
from pyro_vae.app.cli import main
from pyro_vae.app.defaults import resolve
from pyro_vae.app.runs import Run
from pyro_vae.inference import loop
from pyro_vae.inference.batches import Batches, seeded
from pyro_vae.inference.objectives import mean_bound
from pyro_vae.programs import kinds
from pyro_vae.programs.architecture import Architecture
from pyro_vae.programs.vae import VAE, Answers
from tests import pictures

CLASSES = 4
OPTIONS = {
    "conditional": [],
    "semi-supervised": ["--model-options", "num_labelled=12"],
    "mixture": [],
    "hierarchical": ["--model-options", "latent_dims=[3,2]"],
}


def images(count, seed):
    """Bright quadrants, one for each class, in grey levels; and their labels."""
    random = np.random.default_rng(seed)
    labels = random.permutation(np.arange(count) % CLASSES)
    x = random.integers(5, 40, (count, 6, 6))
    for i, label in enumerate(labels):
        top, left = 3 * (label // 2), 3 * (label % 2)
        x[i, top : top + 3, left : left + 3] = random.integers(180, 250, (3, 3))
    return x.astype(np.uint8), labels


def template(label):
    x = torch.zeros(6, 6)
    x[3 * (label // 2) : 3 * (label // 2) + 3, 3 * (label % 2) : 3 * (label % 2) + 3] = 1
    return x


def nearest(x):
    """The class whose quadrant each image is nearest to."""
    return torch.stack([(x[:, 0] - template(c)).square().sum((1, 2)) for c in range(CLASSES)]).argmin(0)


def command(*argv):
    assert main([str(part) for part in argv]) == 0


def refused(capsys, *argv):
    capsys.readouterr()
    assert main([str(part) for part in argv]) == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models")
    parts = {"train": images(160, 0), "val": images(40, 1), "test": images(60, 2)}
    arrays = {f"{kind}_{part}": a for part, both in parts.items() for kind, a in zip("xy", both, strict=True)}
    np.savez(path / "quadrants.npz", **arrays)
    np.savez(path / "unlabelled.npz", **{name: a for name, a in arrays.items() if name[0] == "x"})
    return path


def tiny(folder, *more):
    return ["--data", folder / "quadrants.npz", "--likelihood", "bernoulli", "--binarization", "dynamic", "--hidden", "24",
            "--latent-dim", "3", "--batch-size", "40", "--learning-rate", "1e-2", "--epochs", "80",
            "--evaluation-samples", "40", "--evaluation-images", "30", "--threads", "1", "--quiet", *more]  # fmt: skip


@pytest.fixture(scope="module")
def run(folder):
    """A run of each model, fitted when it is first asked for."""

    def of(model):
        path = folder / model
        if not path.exists():
            with pictures.drawn():
                command("fit", "--out", path, "--model", model, *OPTIONS[model], *tiny(folder))
        return path

    return of


def test_the_tables_know_the_same_models():
    assert tuple(kinds.KINDS) == tuple(kinds.OPTIONS) == defaults.CHOICES["model"] == tuple(serving._FACES)


@pytest.mark.parametrize("model", OPTIONS)
def test_the_numbers_are_those_of_the_pair(run, model):
    path = run(model)
    opened = pv.open(path)
    known, split = opened.summary, opened.data.test
    data = (split, split.labels) if model == "conditional" else split
    found = pv.log_likelihood(opened.model, opened.guide, data, num_samples=40, seed=0, progress=False)
    terms = pv.elbo_terms(opened, opened.arguments(split), num_samples=evaluation.ELBO_SAMPLES, progress=False)
    assert found.value == pytest.approx(known["test_log_likelihood"], abs=1e-5)
    assert terms.value == pytest.approx(known["test_elbo"], abs=1e-5)
    assert known["test_elbo"] == pytest.approx(known["test_reconstruction"] - known["test_kl"], abs=1e-4)
    assert known["test_elbo"] < known["test_log_likelihood"] + 3 * known["test_log_likelihood_stderr"]
    assert known.get("log_likelihood_of", "log p(x)") == ("log p(x | y)" if model == "conditional" else "log p(x)")
    assert known["protocol"]["model"] == model
    # What the last epoch was validated by is the bound on the validation part, and its own labels.
    validation = opened.arguments(opened.data.validation)
    bound = mean_bound(*serving.face(opened.pair).programs(opened.pair), validation, pv.elbo)
    assert bound == pytest.approx(opened.history["validation"][-1], abs=1e-4)


def test_a_conditional_model_is_given_the_label_of_each_datum(run):
    opened = pv.open(run("conditional"))
    split = opened.data.test
    right, wrong = (
        pv.log_likelihood(opened, (split, y), num_samples=40, progress=False).value
        for y in (split.labels, (split.labels + 1) % CLASSES)
    )
    assert right > wrong + 5


@pytest.mark.parametrize("model", ["conditional", "semi-supervised"])
def test_samples_of_a_label_are_of_that_class(run, model, tmp_path):
    for label in range(CLASSES):
        out = tmp_path / f"{label}.npy"
        command("sample", run(model), "--label", label, "-n", 5, "--out", out)
        x = torch.from_numpy(np.load(out))
        assert x.shape == (5, 1, 6, 6)
        assert nearest(x).tolist() == [label] * 5
    command("sample", run(model), "-n", 8, "--out", tmp_path / "all.npy")
    assert nearest(torch.from_numpy(np.load(tmp_path / "all.npy"))).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


def test_the_accuracy_of_the_classifier_is_that_of_the_pair(run):
    path = run("semi-supervised")
    opened = pv.open(path)
    share, error = opened.summary["test_accuracy"], opened.summary["test_accuracy_stderr"]
    assert share > 1 / CLASSES + 5 * error
    _, dataset = reading.read(opened.options)
    test = evaluation.test_data(dataset, opened.options.seed)
    right = opened.pair.classify(test).argmax(-1) == test.labels
    assert len(right) == 60 and share == pytest.approx(right.double().mean().item())
    assert error == pytest.approx((share * (1 - share) / 59) ** 0.5)
    page = (path / "report.html").read_text()
    assert f"{share:.3f} ± {error:.3f}" in page


def test_so_many_labels_are_shown_and_of_each_class_alike():
    y = torch.arange(100) % CLASSES
    shown = serving.shown_labels(y, 12, seed=0)
    assert torch.equal(shown[shown >= 0], y[shown >= 0])
    assert torch.bincount(shown[shown >= 0]).tolist() == [3, 3, 3, 3]
    assert torch.equal(shown, serving.shown_labels(y, 12, seed=0))
    assert not torch.equal(shown, serving.shown_labels(y, 12, seed=1))


def test_the_matching_is_the_best_of_all():
    generator = torch.Generator().manual_seed(0)
    clusters, labels = (torch.randint(4, (200,), generator=generator) for _ in range(2))
    clusters = torch.where(torch.rand(200, generator=generator) < 0.5, (labels + 1) % 4, clusters)
    found = serving.matching(clusters, labels, 4)
    right = {order: int((torch.tensor(order)[clusters] == labels).sum()) for order in itertools.permutations(range(4))}
    assert right[tuple(found)] == max(right.values()) and found == [3, 0, 1, 2]


def test_clusters_are_matched_on_the_training_labels(run):
    """With training labels moved on by one the matching moves with them, and no test datum is right any more."""
    opened = pv.open(run("mixture"))
    _, dataset = reading.read(opened.options)
    test, face = evaluation.test_data(dataset, 0), serving.face(opened.pair)
    honest = face.numbers(opened.pair, dataset, test, 0)
    assert honest["test_accuracy"] == opened.summary["test_accuracy"] > 0.4
    train = dataset.train
    moved = pv.Split(train.pixels, (train.labels + 1) % CLASSES, binarization="dynamic")
    changed = pv.Dataset("moved", moved, dataset.validation, test)
    found = face.numbers(opened.pair, changed, test, 0)
    assert [(c + 1) % CLASSES if c is not None else c for c in honest["cluster_classes"]] == found["cluster_classes"]
    assert found["test_accuracy"] < honest["test_accuracy"] - 0.2


def test_the_labels_change_nothing_of_the_draws_of_the_data():
    x, y = images(50, 3)
    split = pv.Split(torch.from_numpy(x)[:, None], torch.from_numpy(y), binarization="dynamic")
    with seeded(1):
        alone = list(Batches(split, 20))
    with seeded(1):
        both = list(Batches((split, split.labels), 20))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(alone, both, strict=True))
    bright = torch.stack([template(c) for c in range(CLASSES)])
    for x, y in both:
        assert torch.equal(torch.einsum("bhw,chw->bc", x[:, 0], bright).argmax(1), y)


@pytest.mark.parametrize(
    "model", [name if OPTIONS[name] else pytest.param(name, marks=pytest.mark.slow) for name in OPTIONS]
)
def test_a_run_that_was_broken_off_goes_on_to_the_bit(folder, tmp_path, model, monkeypatch):
    argv = ["fit", "--model", model, *OPTIONS[model], *tiny(folder, "--epochs", "4", "--seed", "3")]
    command(*argv, "--out", tmp_path / "whole")
    epoch, calls = loop.Stepper.epoch, []

    def killed_in_the_third(*arguments):
        calls.append(0)
        if len(calls) == 3:
            raise MemoryError("killed")
        return epoch(*arguments)

    monkeypatch.setattr(loop.Stepper, "epoch", killed_in_the_third)
    argv += ["--out", tmp_path / "part", "--checkpoint", tmp_path / "state.safetensors"]
    assert main([str(part) for part in argv]) == 2
    monkeypatch.undo()
    command(*argv)
    whole, part = (load_file(tmp_path / name / "weights.safetensors") for name in ("whole", "part"))
    assert all(torch.equal(whole[name], part[name]) for name in whole)


@pytest.mark.parametrize("model", OPTIONS)
def test_the_folder_is_that_of_any_run(run, model):
    path = run(model)
    assert {file.name for file in path.iterdir()} >= {
        "config.json", "summary.json", "metrics.jsonl", "weights.safetensors", "report.html"
    }  # fmt: skip
    for name in ("reconstructions", "samples", "latent_space", "training_curve", "interpolations"):
        assert (path / "figures" / f"{name}.png").stat().st_size > 1000
    opened = pv.open(path)
    assert opened.pair.architecture.model == model == opened.options.model
    assert resolve(opened.options.to_json()) == opened.options
    with pytest.raises(ValueError, match=f"is a {model} model"):
        opened.vae  # noqa: B018
    with pytest.raises(ValueError, match=f"is a {model} model"):
        Run.load(path).vae()
    with pytest.raises(ValueError, match=f"holds a {model} model"):
        VAE.load(path / "weights.safetensors")


def test_a_plain_run_has_its_vae(folder):
    command("fit", "--out", folder / "plain", *tiny(folder, "--epochs", "1"))
    opened = pv.open(folder / "plain")
    assert opened.vae is opened.pair and "test_accuracy" not in opened.summary
    assert opened.arguments(opened.data.test) is opened.data.test


@pytest.mark.parametrize("model", OPTIONS)
def test_commands_work_or_say_why_not(run, model, capsys, tmp_path):
    path = run(model)
    command("draw", path)
    command("anomalies", path, "-K", 3, "--top", 2)
    assert ("-log p(x | y)" in capsys.readouterr().out) == (model == "conditional")
    for name, works, argv in (
        ("export", model == "mixture", ["export", path, "--out", tmp_path / "export"]),
        ("encode", model != "semi-supervised", ["encode", path, "test", "--out", tmp_path / "codes.csv"]),
        ("label", model != "hierarchical", ["sample", path, "--label", "0", "--out", tmp_path / "x.npy"]),
        ("refine", False, ["evaluate", path, "-K", 5, "--refine", "semi-amortized"]),
    ):
        if works:
            command(*argv)
        else:
            assert model in refused(capsys, *argv), name
    if model != "semi-supervised":
        header, *rows = (tmp_path / "codes.csv").read_text().splitlines()
        assert len(rows) == 30 and header.count("mean_") == 3
    if model == "conditional":
        assert "wanted one of the classes 0, ..., 3" in refused(capsys, "sample", path, "--label", "4")


def test_no_command_is_advised_that_the_model_refuses(run, capsys, monkeypatch):
    from pyro_vae.judging import judgement
    from pyro_vae.judging.advice import Finding

    judge = judgement.judge

    def advising(*args, **options):
        findings = tuple(Finding("training", f"Try {name}.", remedy=name) for name in ("refine", "full", "wider"))
        return dataclasses.replace(judge(*args, **options), findings=findings)

    monkeypatch.setattr(judgement, "judge", advising)
    for model, advised in (("hierarchical", ["wider"]), ("conditional", ["full", "wider"])):
        command("judge", run(model), "--budget", 1, "--num-data", 4, "--out", run(model) / "judged")
        said = capsys.readouterr().out
        assert "--refine" not in said and ("--posterior full" in said) == ("full" in advised) and "--hidden 48" in said
        assert ("each log p(x) above is log p(x | y)" in said) == (model == "conditional")


def test_images_of_a_conditional_run_take_a_label(run, folder, capsys):
    from PIL import Image

    Image.fromarray(images(1, 0)[0][0]).save(folder / "one.png")
    argv = ["reconstruct", run("conditional"), folder / "one.png", "-K", 5, "--out", folder / "again.png"]
    assert "wanted the label of the images: --label N" in refused(capsys, *argv)
    command(*argv, "--label", "0")
    assert "log p(x | y)" in capsys.readouterr().out


def test_the_file_is_read_without_running_anything(run, tmp_path):
    path = run("conditional") / "weights.safetensors"
    with safe_open(path, "pt") as file:
        told = json.loads(file.metadata()["pyro_vae.architecture"])
    assert told["model"] == "conditional" and told["model_options"] == {"num_classes": CLASSES}
    for change, said in (
        ({"model": "os:system"}, "unknown model 'os:system'"),
        ({"model_options": {"num_classes": CLASSES, "callable": "x"}}, "which has num_classes, conditional_prior"),
        ({"likelihood": "antigravity:Mine"}, "built with antigravity:Mine, code outside pyro_vae"),
        ({"model_options": {"num_classes": CLASSES + 1}}, "do not fit"),
    ):
        file = tmp_path / "changed.safetensors"
        save_file(load_file(path), file, metadata={"pyro_vae.architecture": json.dumps(told | change)})
        with pytest.raises(ValueError, match=said):
            Answers.load(file)


@pytest.mark.parametrize("model, options", [
    ("conditional", {"num_classes": 3, "conditional_prior": True}), ("semi-supervised", {"num_classes": 3, "alpha": 2.0}),
    ("mixture", {"num_components": 5}), ("hierarchical", {"latent_dims": [4, 3, 2]}),
])  # fmt: skip
@pytest.mark.parametrize("network", ["mlp", "gated", "linear"])
def test_weights_come_back_as_they_were(model, options, network, tmp_path):
    made = Architecture.of((1, 4, 4), latent_dim=4, network=network, hidden=(8, 6), model=model, model_options=options)
    pair = made.build()
    pair.save(tmp_path / "w.safetensors")
    again = type(pair).load(tmp_path / "w.safetensors")
    assert again.architecture == made
    before, after = pair.state_dict(), again.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


REFUSED = [
    ("conditional", ["--prior", "vamp"], "--prior vamp with --model conditional"),
    ("conditional", ["--network", "conv", "--hidden", "4"], "--network conv with --model conditional"),
    ("conditional", ["--posterior", "point"], "--posterior point with --model conditional"),
    ("conditional", ["--posterior", "von-mises-fisher"], "--prior hyperspherical with --model conditional"),
    ("conditional", ["--standardize"], "--standardize true with --model conditional"),
    ("conditional", ["--model-options", "num_clases=4"], "num_clases for the model conditional"),
    ("conditional", ["--model-options", "num_classes=3"], "num_classes=3 for data of 4 classes"),
    ("semi-supervised", ["--bound", "iwae"], "--bound iwae with --model semi-supervised"),
    ("semi-supervised", ["--num-samples", "5"], "--num-samples 5 with --model semi-supervised"),
    ("semi-supervised", ["--beta", "2"], "--beta 2.0 with --model semi-supervised"),
    ("semi-supervised", ["--estimator", "score-function"], "--estimator score-function with --model semi-supervised"),
    ("semi-supervised", ["--regularizers", "mmd=1"], "--regularizers mmd=1.* with --model semi-supervised"),
    ("semi-supervised", ["--model-options", "num_labelled=3"], "wanted a number from 4 to 160"),
    ("semi-supervised", ["--model-options", "num_labelled=0"], "num_labelled=0, wanted a whole number >= 1"),
    ("mixture", ["--prior", "mixture"], "--prior mixture with --model mixture"),
    ("mixture", ["--prior-options", "num_components=3"], "--prior-options num_components with --model mixture"),
    ("hierarchical", ["--posterior", "iaf"], "--posterior iaf with --model hierarchical"),
    ("hierarchical", ["--regularizers", "mmd=1"], "--regularizers mmd with --model hierarchical"),
    ("hierarchical", ["--model-options", "latent_dims=[4]"], "wanted two or more whole numbers"),
    ("hierarchical", ["--model-options", "latent_dims=[4,2]"], "--latent-dim 3 with --model-options latent_dims"),
    ("vae", ["--model-options", "num_classes=4"], "num_classes for the model vae, which has none"),
    ("condtional", [], "Did you mean 'conditional'"),
]  # fmt: skip


@pytest.mark.parametrize("model, argv, said", REFUSED, ids=[f"{model}{''.join(argv)}" for model, argv, _ in REFUSED])
def test_what_does_not_apply_is_refused_by_name(folder, capsys, tmp_path, model, argv, said):
    import re

    message = refused(capsys, "fit", "--out", tmp_path / "run", *tiny(folder), "--model", model, *argv)
    assert re.search(said, message), message
    assert not (tmp_path / "run").exists()


def test_data_without_labels_are_refused_before_anything_is_trained(folder, capsys, tmp_path):
    argv = tiny(folder)
    argv[1] = folder / "unlabelled.npz"
    for model in ("conditional", "semi-supervised"):
        said = refused(capsys, "fit", "--out", tmp_path / "run", *argv, "--model", model)
        assert "which has no labels, wanted one class for each datum" in said and not (tmp_path / "run").exists()
    command("fit", "--out", tmp_path / "run", *argv, "--model", "mixture", "--epochs", "1")
    run = pv.open(tmp_path / "run")
    assert run.pair.architecture.model_options == {"num_components": 10} and "test_accuracy" not in run.summary
    assert "no cluster was matched" in refused(capsys, "sample", tmp_path / "run", "--label", "0")


def test_a_folder_of_class_folders_has_its_names(tmp_path):
    from PIL import Image

    for label, name in enumerate(("east", "west")):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i, x in enumerate(images(40 * CLASSES, 4)[0][images(40 * CLASSES, 4)[1] == label]):
            Image.fromarray(x).save(tmp_path / "photos" / name / f"{i}.png")
    command("fit", "--out", tmp_path / "run", *tiny(tmp_path, "--data", tmp_path / "photos"), "--model", "conditional")
    for label, name in enumerate(("east", "west")):
        command("sample", tmp_path / "run", "--label", name, "-n", 4, "--out", tmp_path / "x.npy")
        assert nearest(torch.from_numpy(np.load(tmp_path / "x.npy"))).tolist() == [label] * 4


def test_a_class_without_training_data_is_refused(folder, capsys, tmp_path):
    said = refused(capsys, "fit", "--out", tmp_path / "run", *tiny(folder, "--limit", "2"), "--model", "conditional")
    assert "and not among the 2 training data" in said and not Path(tmp_path / "run").exists()


@pytest.mark.parametrize(
    "model, more",
    [
        ("conditional", ["--kl-warmup", "1", "--model-options", "conditional_prior=true"]),
        ("mixture", ["--bound", "iwae", "--num-samples", "3", "--network", "conv", "--hidden", "4"]),
        pytest.param("mixture", ["--posterior", "iaf"], marks=pytest.mark.slow),
        pytest.param("conditional", ["--posterior", "iaf"], marks=pytest.mark.slow),
    ],
)
def test_other_parts_go_with_it(folder, tmp_path, model, more):
    command("fit", "--out", tmp_path / "run", *tiny(folder, "--epochs", "2"), "--model", model, *more)
    assert np.isfinite(pv.open(tmp_path / "run").summary["test_log_likelihood"])


@pytest.mark.slow
def test_the_digits_are_told_apart_by_a_hundred_labels(tmp_path):
    command("fit", "--model", "semi-supervised", "--out", tmp_path / "run", "--epochs", "40", "--evaluation-samples", "10",
            "--evaluation-images", "20", "--quiet")  # fmt: skip
    known = pv.open(tmp_path / "run").summary
    assert known["test_accuracy"] > 0.1 + 10 * known["test_accuracy_stderr"] and known["test_accuracy"] > 0.7
