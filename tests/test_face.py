"""What `import pyro_vae as pv` gives: every name, documented, found by completion, and no name that means two things."""

import ast
import importlib
import inspect
import os
import pkgutil
import pydoc
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest

import pyro_vae as pv

ROOT = Path(__file__).parents[1]
FUNCTIONS = """fit judge log_likelihood elbo_terms ais bdmc gaps fit_guide compare_guides reference sbc impute ex_post
    to_arviz quadrature gradient_lab collapse active_units anomaly_scores roc_auc mutual_information rate_distortion
    kl_per_dimension guide_distances energy_distance probe load binarize dequantize particles log_joint log_q simulate
    autoencoder open identity compare study alone""".split()
BOUNDS = "elbo iwae renyi vr_max miwae ciwae piwae cubo wake_sleep reconstruction map_estimate".split()
REGULARIZERS = "mmd total_correlation free_bits".split()
CLASSES = """SemiAmortized Hamiltonian VAE Model Guide Objective Compiled History Split Dataset LinearGaussian Estimate
    Particles""".split()
SPACES = {
    "posteriors": "IAF", "priors": "VampPrior", "likelihoods": "Normal", "networks": "MLP", "bounds": "renyi", "data": "load",
    "distributions": "Pushforward", "zoo": "Hierarchical", "plots": "gap_bars", "testing": "PosteriorLaws",
    "callbacks": "tensorboard",
}  # fmt: skip
PACKAGES = ["pyro_vae"] + [
    f"pyro_vae.{name}"
    for name in ("judging", "inference", "programs", "parts", "data", "parts.distributions", "inference.bounds")
]


def test_the_face_is_this_list():
    assert set(pv.__all__) == {*FUNCTIONS, *BOUNDS, *REGULARIZERS, *CLASSES, *SPACES, "__version__"}


@pytest.mark.parametrize("name", FUNCTIONS + BOUNDS + REGULARIZERS + CLASSES)
def test_each_name_is_what_it_says_and_documented(name):
    thing = getattr(pv, name)
    assert not isinstance(thing, types.ModuleType) and thing.__name__ == name and name in pv.__doc__
    assert inspect.isclass(thing) == (name in CLASSES)
    text = inspect.getdoc(thing)
    if inspect.isclass(thing):
        assert "Args:" in text or "Attributes:" in text
    else:
        assert ("Args:" in text) == bool(inspect.signature(thing).parameters) and "Returns:" in text


def test_the_names_of_the_namespaces_work_after_one_import():
    names = ", ".join(f"pv.{space}.{name}.__name__" for space, name in SPACES.items())
    run = [sys.executable, "-c", f"import pyro_vae as pv; print({names})"]
    assert subprocess.run(run, capture_output=True, text=True, check=True).stdout.split() == list(SPACES.values())


@pytest.mark.parametrize("name", SPACES)
def test_a_namespace_is_documented(name):
    space = getattr(pv, name)
    assert isinstance(space, types.ModuleType) and space.__doc__ and f"pv.{name}" in pv.__doc__
    for each in getattr(space, "__all__", [SPACES[name]]):
        thing = getattr(space, each)
        if inspect.isclass(thing) or inspect.isfunction(thing):
            assert thing.__doc__, each


def test_every_bound_is_among_the_bounds():
    assert set(pv.bounds.__all__) == set(BOUNDS)
    assert all(getattr(pv.bounds, name) is getattr(pv, name) for name in BOUNDS)


@pytest.mark.parametrize("package", PACKAGES)
def test_names_resolve_complete_and_go_by_star(package):
    module = importlib.import_module(package)
    names = module.__all__
    assert names == sorted(set(names)) and set(names) <= set(dir(module)) and "__doc__" in dir(module)
    assert "TYPE_CHECKING" not in dir(module) and "attach" not in dir(module)
    scope: dict[str, object] = {}
    exec(f"from {package} import *", scope)
    assert all(scope[name] is getattr(module, name) for name in names)
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        module.nonsense  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'nonsense'"):
        exec(f"from {package} import nonsense")


@pytest.mark.parametrize("package", ["pyro_vae.judging", "pyro_vae.programs"])
def test_functions_of_the_packages_are_documented(package):
    module = importlib.import_module(package)
    for name in module.__all__:
        thing = getattr(module, name)
        if inspect.isfunction(thing):
            assert "Args:" in thing.__doc__ and "Returns:" in thing.__doc__, name


def test_a_name_is_found_in_whatever_order_things_are_imported():
    # Modules import each other: whichever comes first, a name stays the function and never becomes a module.
    first = "import pyro_vae.inference.split_bounds, pyro_vae.judging._gaps, pyro_vae.programs._ex_post"
    last = "from pyro_vae.judging import gaps, ais; from pyro_vae.inference import cubo; from pyro_vae.programs import Model, ex_post"
    same = "pv.gaps is gaps, pv.ais is ais, pv.bounds.cubo is cubo, pv.Model is Model, pv.ex_post is ex_post, callable(ex_post)"
    run = [sys.executable, "-c", f"{first}; {last}; import pyro_vae as pv; print({same})"]
    assert subprocess.run(run, capture_output=True, text=True, check=True).stdout.split() == ["True"] * 6


def test_a_function_and_a_module_never_share_a_name():
    shared = []
    for path in (ROOT / "pyro_vae").rglob("__init__.py"):
        package = ".".join(path.parent.relative_to(ROOT).parts)
        module = importlib.import_module(package)
        files = {info.name for info in pkgutil.iter_modules([str(path.parent)])}
        for name in getattr(module, "__all__", ()):
            if name in files and not isinstance(getattr(module, name), types.ModuleType):
                shared.append(f"{package}.{name}")
        for file in path.parent.glob("*.py"):  # nor a file and a function in it, which the package may hand on tomorrow
            if path.parent.name != "app":
                held = {
                    node.name
                    for node in ast.parse(file.read_text()).body
                    if isinstance(node, ast.FunctionDef | ast.ClassDef)
                }
                shared += [str(file)] if file.stem in held else []
    assert shared == []


def test_a_misspelt_name_is_met_with_the_right_one():
    run = subprocess.run(
        [sys.executable, "-c", "import pyro_vae as pv; pv.log_likelihod"], capture_output=True, text=True
    )
    assert "module 'pyro_vae' has no attribute 'log_likelihod'" in run.stderr and run.returncode == 1
    if sys.version_info >= (3, 12):
        assert "Did you mean: 'log_likelihood'?" in run.stderr


def test_help_is_a_map_of_the_package():
    text = pydoc.render_doc(pv, renderer=pydoc.plaintext)
    start = text[: text.index("PACKAGE CONTENTS")]
    names = FUNCTIONS + BOUNDS + REGULARIZERS + CLASSES + [f"pv.{name}" for name in SPACES]
    assert all(re.search(rf"(?<!\w){re.escape(name)}\b", start) for name in names)
    assert len(start.splitlines()) < 40 and max(map(len, start.splitlines())) <= 130
    assert "log_likelihood(model" in text[text.index("FUNCTIONS") :]


# A user's program, with the type of each line as mypy reveals it; `!` marks what it must refuse.
TYPED = """
pv.fit(vae, data)                                        -> inference.records.History
pv.fit(model, guide, data, epochs=3)                     -> inference.records.History
pv.fit(model=model, guide=guide, data=data)              -> inference.records.History
pv.log_likelihood(vae, data)                             -> judging.evidence.Estimate
pv.log_likelihood(run, data).value                       -> builtins.float
pv.judge(model, guide, data)                             -> judging.judgement.Judgement
pv.ais(model, None, data)                                -> judging.evidence.Annealed
pv.ais(vae, data)                                        -> judging.evidence.Annealed
pv.gaps(vae, data)                                       -> judging._gaps.Gaps
pv.particles(vae, data, num_samples=3)                   -> traces._particles.Particles
pv.particles(model, guide, data).log_weight              -> torch._tensor.Tensor
pv.fit_guide(vae, data)                                  -> inference.records.History
pv.active_units(run, data)                               -> judging.latents.ActiveUnits
pv.active_units(guide=guide, data=data)                  -> judging.latents.ActiveUnits
pv.simulate(vae, data)                                   -> traces.simulation.Simulation
pv.log_joint(model, {"z": data}, data)                   -> torch._tensor.Tensor
pv.ex_post(vae, data)                                    -> programs.pair.Model
pv.open("runs/vae")                                      -> app.opening.Opened
pv.load("digits")                                        -> data.splits.Dataset
pv.posteriors.IAF(nn.Linear(6, 4), 2)                    -> parts.posteriors.flow.IAF
pv.bounds.renyi(0.5)                                     -> inference.bounds.WeightBound
vae.encode(data)                                         -> torch._tensor.Tensor
pv.VAE.load("vae.safetensors")                           -> programs.vae.VAE
gaps(vae, data)                                          -> judging._gaps.Gaps
pv.fit(vae, data, epoch=3)                               ! did you mean "epochs"
pv.fit(vae)                                              ! No overload variant
pv.judge(model, data)                                    ! No overload variant
pv.ais()                                                 ! require at least one argument
pv.open(3)                                               ! incompatible type "int"
pv.nonsense                                              ! has no attribute "nonsense"
"""


@pytest.mark.slow
def test_a_users_program_has_its_types(tmp_path):
    rows = [re.split(r"\s+(->|!)\s", line) for line in TYPED.strip().splitlines()]
    before = [
        "import torch",
        "from torch import Tensor, nn",
        "import pyro_vae as pv",
        "from pyro_vae.judging import gaps",
        "def model(x: Tensor) -> None: ...",
        "def guide(x: Tensor) -> None: ...",
        "data, vae, run = torch.rand(64, 6), pv.autoencoder((6,)), pv.open('runs/vae')",
    ]
    program = tmp_path / "program.py"
    program.write_text("\n".join([*before, *(f"reveal_type({call})" for call, *_ in rows)]))
    # As for an installed package: its own files are read and not judged.
    settings = tmp_path / "mypy.ini"
    settings.write_text("[mypy]\nstrict = True\n[mypy-pyro_vae.*]\nfollow_imports = silent\n")
    run = [sys.executable, "-m", "mypy", "--config-file", str(settings), "--cache-dir", str(tmp_path), str(program)]
    out = subprocess.run(
        run, capture_output=True, text=True, cwd=tmp_path, env=os.environ | {"MYPYPATH": str(ROOT)}
    ).stdout
    for number, (call, sign, wanted) in enumerate(rows, len(before) + 1):
        said = "\n".join(re.findall(rf"^program\.py:{number}: (.*)", out, re.MULTILINE))
        if sign == "->":
            kind = wanted if wanted.startswith(("torch.", "builtins.")) else f"pyro_vae.{wanted}"
            kind = kind.removeprefix("builtins.")
            shown = re.fullmatch(rf'note: Revealed type is "(?:{kind}|tuple\[.*, fallback={kind}\])"', said)
            assert shown, (call, said)
        else:
            assert wanted in said and "error:" in said, (call, said)
    errors = {int(line) for line in re.findall(r"^program\.py:(\d+): error", out, re.MULTILINE)}
    assert len(errors) == sum(sign == "!" for _, sign, _ in rows), out


def test_amortization_is_spelled_one_way():
    # In American English: 180 places against 33 before this was settled. Results that are kept are left as they were printed.
    british = re.compile("amorti" + "s", re.IGNORECASE)
    others = {
        config.parent for config in ROOT.rglob("pyvenv.cfg")
    }  # environments in the checkout, whatever their names
    files = [
        path for kind in ("*.py", "*.md", "*.ipynb", "*.toml") for path in ROOT.rglob(kind)
        if others.isdisjoint(path.parents)
    ]  # fmt: skip
    assert len(files) > 300
    assert [str(path) for path in files if british.search(path.read_text(errors="ignore"))] == []
