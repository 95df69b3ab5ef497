"""One signature for all that take a pair, and one owner for what all of them need."""

import ast
import importlib
import inspect
import pkgutil
import re
from pathlib import Path

import pytest

import pyro_vae
from pyro_vae import judging

ROOT = Path(pyro_vae.__file__).parent
DEFAULTS = {
    "seed": 0, "device": None, "progress": None, "compile": "auto", "site": None, "start": "guide", "observed": None,
}  # fmt: skip
ORDER = ["num_samples", "num_data", "num_steps", "start", "seed", "device", "progress", "compile"]
NEVER = {
    "x", "args", "images", "proposals", "num_draws", "step_samples", "limit", "size", "num_simulated", "steps",
    "max_steps", "n_samples", "batch_size",
}  # fmt: skip
# The batch is run as it is, once; or a program that is no pair.
INNER = {
    "score",
    "rescores",
    "optimise",
    "climbed",
    "family_form",
    "local_form",
    "frozen",
    "simulated_batch",
    "moments",
    "in_chunks",
}


def taking_pairs():
    """All public functions of judging whose first arguments are a model and its guide, or guides."""
    found = {}
    for module in pkgutil.iter_modules(judging.__path__):
        home = importlib.import_module(f"pyro_vae.judging.{module.name}")
        for name, function in vars(home).items():
            if not inspect.isfunction(function) or function.__module__ != home.__name__ or name.startswith("_"):
                continue
            parameters = list(inspect.signature(function).parameters)
            if name not in INNER and (parameters[:1] == ["model"] or "guide" in parameters):
                found[name] = function
    return found


PAIRS = taking_pairs()
# What a guide's latents are like, whatever the model.
OF_A_GUIDE = ("active_units", "posterior_means", "probe")


def test_all_diagnostics_are_among_them():
    assert set(PAIRS) >= {
        "active_units", "ais", "anomaly_scores", "bdmc", "collapse", "compare_guides", "elbo_terms", "fit_guide", "gaps",
        "gradient_lab", "guide_distances", "judge", "kl_per_dimension", "linear_optimum", "log_likelihood",
        "mutual_information", "posterior_means", "probe", "quadrature", "rate_distortion", "reference", "sbc",
    }  # fmt: skip


@pytest.mark.parametrize("name", sorted(PAIRS))
def test_the_pair_comes_first_and_one_thing_has_one_name(name):
    parameters = inspect.signature(PAIRS[name]).parameters
    kinds = {key: p.kind for key, p in parameters.items()}
    places = [key for key, kind in kinds.items() if kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    programs = {"compare_guides": ["model", "guides"], "linear_optimum": ["model"]} | dict.fromkeys(
        OF_A_GUIDE, ["guide"]
    )
    assert places == [*programs.get(name, ["model", "guide"]), "data"]
    assert all(parameters[key].default is inspect.Parameter.empty for key in places)
    assert not NEVER & set(parameters)
    for key, value in DEFAULTS.items():
        if key in parameters:
            assert parameters[key].default == value, key
    words = [key for key in parameters if key in ORDER]
    assert words == [key for key in ORDER if key in words]
    if name != "fit_guide":  # whose options are those of `fit`
        assert {"device", "progress"} <= set(parameters)
        assert name == "linear_optimum" or "seed" in parameters


PREAMBLE = ("evaluating(", "Batches(", "tqdm(", "device_of(", "validation_enabled(", "reused_memory(", "multiplied_by(")


def test_one_place_runs_pairs_over_data():
    for path in (ROOT / "judging").glob("*.py"):
        if path.name != "sweeps.py":
            text = path.read_text()
            assert not [word for word in PREAMBLE if re.search(rf"\b{re.escape(word)}", text)], path.name


def test_one_place_turns_log_weights_into_numbers():
    for path in (ROOT / "judging").glob("*.py"):
        text = path.read_text()
        if path.name not in ("weights.py", "arviz.py"):
            assert not re.search(r"import arviz|\bpareto_(k|smoothed)\(|count \* share\.square", text), path.name


def test_a_standard_error_says_of_what():
    for module in pkgutil.iter_modules(judging.__path__):
        home = importlib.import_module(f"pyro_vae.judging.{module.name}")
        for found in vars(home).values():
            if inspect.isclass(found) and found.__module__ == home.__name__:
                assert "stderr" not in {*getattr(found, "__annotations__", {}), *vars(found)}, found


def test_modules_are_of_a_size_to_read():
    lines = {path.name: len(path.read_text().splitlines()) for path in (ROOT / "judging").glob("*.py")}
    assert max(lines.values()) <= 350, lines
    functions = {}
    for path in (ROOT / "judging").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                first = node.body[1] if ast.get_docstring(node) and len(node.body) > 1 else node.body[0]
                signature = node.body[0].lineno - node.lineno
                functions[f"{path.name}:{node.name}"] = signature + node.end_lineno - first.lineno + 1
    assert max(functions.values()) <= 50, [name for name, length in functions.items() if length > 50]


@pytest.mark.parametrize("name", ["fit", "impute", "ex_post"])
def test_what_is_done_to_a_pair_takes_it_in_the_same_order(name):
    parameters = inspect.signature(getattr(pyro_vae, name)).parameters
    places = [key for key, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert places == ["model", "guide", "data"]
    assert not (NEVER - {"batch_size"}) & set(parameters)  # of a gradient step


@pytest.mark.parametrize("name", ["SemiAmortized", "Hamiltonian"])
def test_guides_that_look_at_the_model_take_the_pair_in_the_same_order(name):
    assert list(inspect.signature(getattr(pyro_vae, name)).parameters)[:2] == ["model", "guide"]


def test_what_evaluates_a_pair_many_times_can_be_captured():
    captured = {name for name, function in PAIRS.items() if "compile" in inspect.signature(function).parameters}
    assert captured == {
        "ais", "anomaly_scores", "bdmc", "elbo_terms", "gaps", "log_likelihood", "rate_distortion",
    }  # fmt: skip
