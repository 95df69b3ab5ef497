"""What cannot be is refused in words, before time is spent, whoever is asked."""

import functools
import importlib
import inspect
import math
import pkgutil
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

import pyro_vae as pv
import pyro_vae.judging
from pyro_vae.inference.bounds import ciwae, miwae, renyi
from pyro_vae.inference.objectives import mean_bound
from pyro_vae.inference.split_bounds import cubo, piwae
from pyro_vae.judging.imputation import impute
from pyro_vae.parts import likelihoods, posteriors
from pyro_vae.programs import zoo
from pyro_vae.programs._ex_post import ex_post
from pyro_vae.programs.semi_amortized import SemiAmortized
from tests.test_compatibility import reasons

NAN = math.nan


def table(rows=20):
    return torch.randn(rows, 4, generator=torch.Generator().manual_seed(0))


def normal_vae():
    torch.manual_seed(0)
    return pv.VAE.build((4,), latent_dim=2, hidden=(8,), likelihood="normal", scale=1.0, standardize=False)


def never(*_, **__):
    raise AssertionError("time was spent")


def inside_package(raised):
    """Whether the error was made here, and not inside torch, NumPy or Pyro."""
    return "pyro_vae" in str(raised.traceback[-1].path)


# --- options ---------------------------------------------------------------------------------------------------------

WRONG = {
    "int": [1.5, "a", True, NAN, [1], torch.ones(2), 2.0],
    "float": ["a", NAN, True, [1.0], torch.ones(2), 1j],
    "bool": ["yes", 2, 0.5],
    "str | torch.device": ["gpu", "cuda:99", 1.5, "meta"],
    "Sequence[int]": [3, "12", (1.5,), None],
}


def wrong_values():
    """(function, option, value) for every option of every public estimate and diagnostic, and of `fit`."""
    modules = [importlib.import_module(f"pyro_vae.judging.{m.name}") for m in pkgutil.iter_modules(pv.judging.__path__)]
    found = {
        f"{module.__name__}.{name}": function
        for module in modules
        for name, function in vars(module).items()
        if hasattr(function, "option_rules") and function.__module__ == module.__name__
    }
    found |= {"fit": pv.fit, "particles": pv.particles, "mean_bound": mean_bound, "ex_post": ex_post, "impute": impute}
    for where, function in found.items():
        for name, parameter in inspect.signature(function).parameters.items():
            text = parameter.annotation.removesuffix(" | None")
            for value in WRONG.get(text, []):
                yield pytest.param(function, name, value, id=f"{where}-{name}={str(value)[:12]}")


@pytest.mark.parametrize("function, name, value", list(wrong_values()))
def test_options_of_every_public_function_are_refused_by_their_names(function, name, value):
    needed = [
        p for p in inspect.signature(function).parameters.values()
        if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD and p.name != name
    ]  # fmt: skip
    sizes = {"int": 3, "float": 0.5}
    with pytest.raises(ValueError, match=f"(^|got ){name}") as raised:
        function(**{p.name: sizes.get(p.annotation, never) for p in needed}, **{name: value})
    assert inside_package(raised)


def test_all_public_estimates_and_diagnostics_are_among_them():
    seen = {case.values[0].__name__ for case in wrong_values()}
    assert seen >= {
        "fit", "log_likelihood", "elbo_terms", "ais", "bdmc", "gaps", "sbc", "reference", "quadrature", "gradient_lab",
        "compare_guides", "rate_distortion", "mutual_information", "kl_per_dimension", "posterior_means", "collapse",
        "active_units", "anomaly_scores", "probe", "energy_distance", "guide_distances", "judge", "to_arviz",
        "particles", "mean_bound", "ex_post", "impute", "linear_optimum",
    }  # fmt: skip


@pytest.mark.parametrize("value", [np.int64(3), np.uint8(3), torch.tensor(3), np.array(3)])
def test_whole_numbers_of_numpy_and_torch_are_whole_numbers(value):
    assert int(pv.Objective(num_samples=value).num_samples) == 3
    assert type(pv.Objective(num_samples=value).num_samples) is int
    vae = normal_vae()
    estimate = pv.elbo_terms(vae.model, vae.guide, table(), num_samples=value, seed=value, progress=False)
    assert estimate.num_samples == 3
    plain = pv.elbo_terms(vae.model, vae.guide, table(), num_samples=3, seed=3, progress=False)
    assert estimate.value == plain.value


@pytest.mark.parametrize("value", [0.01, np.float32(0.01), np.float64(0.01), torch.tensor(0.01)])
def test_floats_of_numpy_and_torch_are_numbers(value):
    vae = normal_vae()
    history = pv.fit(vae.model, vae.guide, table(), epochs=np.int32(1), learning_rate=value, progress=False)
    assert history["learning_rate"][0] == pytest.approx(0.01)


@pytest.mark.parametrize(
    "options, text",
    [
        ({"seed": -1}, "seed must be an integer that is not negative, got -1"),
        ({"epochs": 0}, "epochs must be a positive integer, got 0"),
        ({"learning_rate": -1.0}, "the learning rate must be positive"),
        ({"learning_rate": 0}, "the learning rate must be positive"),
        ({"learning_rate": math.inf}, "learning_rate must be a finite number, got inf"),
        ({"beta": "x"}, "beta must be a finite number that is not negative, or a function, got 'x'"),
        ({"beta": True}, "beta must be a finite number"),
        ({"beta": lambda done: None}, r"beta\(0\) is None, wanted a finite number"),
        ({"beta": lambda done: NAN}, r"beta\(0\) is nan"),
        ({"beta": lambda done: "1"}, r"beta\(0\) is '1'"),
        ({"schedule": 5}, "unknown schedule 5, wanted one of constant, cosine, one-cycle or a function"),
        ({"schedule": lambda done: None}, r"schedule\(0\) is None"),
        ({"kl_warmup": -0.5}, "kl_warmup must lie in"),
        ({"kl_warmup": math.inf}, "kl_warmup must lie in"),
        ({"kl_warmup_steps": 1.5}, "kl_warmup_steps must be a number of steps, got 1.5"),
        ({"patience": -1, "validation": table()}, "patience"),
        ({"callback": 3}, "callback must be a function, got 3"),
        ({"validation": table(), "validation_bound": "iwae"}, "validation_bound must be a function, got 'iwae'"),
        ({"optimizer": torch.optim.SparseAdam}, "SparseAdam, which takes sparse gradients only"),
        ({"optimizer": 3}, "got optimizer=3, wanted a torch optimiser"),
        ({"loss": pyro.infer.Trace_ELBO}, "got loss .*wanted a Pyro ELBO such as"),
        ({"matmul_precision": 3}, "unknown matmul_precision 3"),
        ({"checkpoint": 3}, "checkpoint must be a path, got 3"),
        ({"compile": "yes"}, "got compile='yes'"),
        ({"clip_norm": NAN}, "clip_norm must be a number, got nan"),
    ],
)
def test_options_of_fit_are_refused_before_a_step(options, text, monkeypatch):
    monkeypatch.setattr("pyro.infer.SVI.step", never)
    vae = normal_vae()
    with pytest.raises(ValueError, match=text) as raised:
        pv.fit(vae.model, vae.guide, table(), **options)
    assert inside_package(raised)


def test_a_schedule_that_ends_in_no_number_is_told_in_its_step():
    vae = normal_vae()
    with pytest.raises(ValueError, match=r"schedule\(0.5\) is nan, wanted a finite number"):
        pv.fit(vae.model, vae.guide, table(), epochs=2, schedule=lambda done: NAN if done else 1.0, progress=False)


@pytest.mark.parametrize(
    "make, text",
    [
        (lambda: pv.fit(3, lambda x: None, table()), "model must be a Pyro program.*got 3"),
        (lambda: pv.Objective(num_samples=0), "num_samples must be a positive integer, got 0"),
        (lambda: pv.Objective(num_samples=1.5), "num_samples must be a positive integer, got 1.5"),
        (lambda: pv.Objective(beta=NAN), "beta must be a finite number, got nan"),
        (lambda: pv.Objective(3), "bound must be a function, got 3"),
        (lambda: miwae(1.5), "num_groups must be a positive integer"),
        (lambda: piwae("a"), "num_groups must be a positive integer"),
        (lambda: renyi("a"), "alpha must be a number"),
        (lambda: ciwae("a"), "beta must be a finite number"),
        (lambda: cubo(None), "n must be a number"),
        (lambda: SemiAmortized(never, never, num_steps=1.5), "num_steps must be an integer, got 1.5"),
    ],
)
def test_bounds_objectives_and_guides_check_what_they_are_made_of(make, text):
    with pytest.raises(ValueError, match=text) as raised:
        make()
    assert inside_package(raised)


# --- a VAE in the hand -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["float64", "float32", "int64", "uint8", "bool", ">f4", "list"])
def test_encode_and_reconstruct_take_arrays_as_fit_does(kind):
    vae = normal_vae().eval()
    array = (table() > 0).numpy().astype("f4" if kind == "list" else kind)
    given = [row.tolist() for row in array] if kind == "list" else array
    wanted = torch.tensor(array.astype("f4"))
    assert torch.equal(vae.posterior(given).mean, vae.posterior(wanted).mean)
    assert torch.equal(vae.reconstruct(given), vae.reconstruct(wanted))
    mask = np.arange(4) > 0
    assert torch.equal(vae.reconstruct(given, mask), vae.reconstruct(wanted, torch.tensor(mask)))
    assert vae.interpolate(array.astype("f4")[:2], array.astype("f4")[2:4], 3).shape == (2, 3, 4)


@pytest.mark.parametrize("method", ["encode", "reconstruct", "decode"])
@pytest.mark.parametrize(
    "given, text",
    [
        (3, "of type int, wanted a tensor or an array"),
        ("abc", "of type str, wanted a tensor or an array"),
        (None, "of type NoneType"),
        ({"x": 1}, "of type dict"),
        (np.array(["a"]), "holds no numbers of one shape"),
        ([np.zeros(2), np.zeros(3)], "holds no numbers of one shape"),
        (torch.zeros(5, 7), r"got shape \(5, 7\), wanted \(..., [42]\)"),
        (np.zeros((5, 7)), r"got shape \(5, 7\), wanted \(..., [42]\)"),
        (torch.tensor(1.0), "a single number"),
    ],
)
def test_what_is_no_data_is_refused_by_a_vae(method, given, text):
    with pytest.raises(ValueError, match=text) as raised:
        getattr(normal_vae(), method)(given)
    assert inside_package(raised)


@pytest.mark.parametrize("size", [-1, 1.5, "a", True, None])
def test_a_vae_samples_whole_numbers_of_data(size):
    with pytest.raises(ValueError, match="size must be an integer that is not negative"):
        normal_vae().sample(size)
    assert normal_vae().sample(np.int64(2)).shape == (2, 4)


# --- builders --------------------------------------------------------------------------------------------------------

BUILDERS = {
    "conditional": lambda **o: zoo.Conditional.build((4,), 3, **({"latent_dim": 2, "hidden": (8,)} | o)),
    "mixture": lambda **o: zoo.Mixture.build((4,), 3, **({"latent_dim": 2, "hidden": (8,)} | o)),
    "semi": lambda **o: zoo.SemiSupervised.build((4,), 3, **({"latent_dim": 2, "hidden": (8,)} | o)),
    "hierarchical": lambda **o: zoo.Hierarchical.build((4,), (2, 2), ((8,), (8,)), **o),
}


@pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS)
def test_builders_take_parts_by_class_or_name_and_list_the_names_for_all_else(build):
    named = [p for p in build(likelihood="normal", posterior="full").modules()]
    classes = [p for p in build(likelihood=likelihoods.Normal, posterior=posteriors.FullNormal).modules()]
    assert [type(p) for p in named] == [type(p) for p in classes]
    assert any(isinstance(p, likelihoods.Normal) for p in named)
    for kind, values, name in (
        ("likelihood", (5, None, nn.Identity(), "nrmal"), "poisson"),
        ("posterior", (5, None, nn.Identity(), "ful"), "low-rank"),
    ):
        for value in values:
            with pytest.raises(ValueError, match=f"wanted.*{name}") as raised:
                build(**{kind: value})
            assert inside_package(raised)
    with pytest.raises(ValueError, match="not made like one"):
        build(likelihood=nn.Sigmoid)


@pytest.mark.parametrize(
    "options, text",
    [
        ({"posterior": 5}, "got posterior=5, wanted a name: one of diagonal, full"),
        ({"posterior": posteriors.DiagonalNormal}, "For this class pass 'diagonal'"),
        ({"likelihood": None}, "got likelihood=None, wanted a name: one of bernoulli"),
        ({"prior": 3.0}, "got prior=3.0, wanted a name"),
        ({"latent_dim": 1.5}, "latent_dim must be a positive integer, got 1.5"),
        ({"latent_dim": "a"}, "latent_dim must be a positive integer, got 'a'"),
        ({"hidden": 5}, "hidden must be one or more positive widths, got 5"),
        ({"hidden": (1.5,)}, "hidden must be one or more positive widths"),
        ({"network": 3}, "unknown network 3, wanted one of mlp"),
        ({"activation": ["a"]}, "unknown activation"),
        ({"posterior_options": 3}, "posterior_options must be a dict"),
        ({"standardize": "yes", "likelihood": "normal"}, "got standardize='yes'"),
        ({"prior": "vamp", "prior_options": {"num_components": "a"}}, "num_components must be a positive integer"),
    ],
)
def test_vae_build_says_what_it_wants(options, text):
    with pytest.raises(ValueError, match=text) as raised:
        pv.VAE.build((4,), **options)
    assert inside_package(raised)


@pytest.mark.parametrize("shape", [5, "a", (1.5,), (), (0,), (-1, 8), None, (1, "a")])
def test_a_shape_is_positive_whole_numbers(shape):
    with pytest.raises(ValueError, match="x_shape"):
        pv.VAE.build(shape)
    with pytest.raises(ValueError, match="shape"):
        zoo.Conditional.build(shape, 3)


def test_sizes_of_numpy_build_the_same():
    vae = pv.VAE.build(np.array([1, 8, 8]), latent_dim=np.int64(2), hidden=np.array([8]))
    assert vae.sample(2).shape == (2, 1, 8, 8) and type(vae.architecture.latent_dim) is int


# --- rows that no density holds --------------------------------------------------------------------------------------


def plain_pair():
    """With Pyro's own distributions, which validate."""
    net = nn.Linear(2, 2)
    with torch.no_grad():
        net.weight.fill_(0.5)

    def model(x):
        pyro.module("decoder", net)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(net(z), 1.0).to_event(1), obs=x)

    def guide(x):
        pyro.module("decoder", net)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(net(x), (1 + x.square()).sqrt()).to_event(1))

    return model, guide


@pytest.mark.parametrize("pair", ["vae", "plain"])
@pytest.mark.parametrize("estimate", ["log_likelihood", "elbo_terms", "particles", "fit", "ais", "quadrature", "gaps"])
def test_a_row_that_is_too_far_out_is_named(pair, estimate):
    from pyro_vae.judging._gaps import gaps
    from pyro_vae.judging.annealing import ais
    from pyro_vae.judging.grids import quadrature

    model, guide = plain_pair() if pair == "plain" else (normal_vae().model, normal_vae().guide)
    x = table()[:, :2].clone() if pair == "plain" else table().clone()
    x[7] = 1e30
    functions = {"ais": ais, "quadrature": quadrature, "gaps": gaps}
    with pytest.raises(ValueError, match=r"row 7.*site '[xz]'|site '[xz]'.*row 7") as raised:
        (functions.get(estimate) or getattr(pv, estimate))(model, guide, x)
    assert inside_package(raised)


@pytest.mark.parametrize(
    "damage, text",
    [
        (lambda x: x.index_fill(0, torch.tensor([3]), NAN), "site '[xz]'.*nan.*row 3 of the batch"),
        (lambda x: torch.zeros(5, 3), "do not run on a tensor of shape .5, 3."),
        (lambda x: "abc", "do not run on a str"),
        (lambda x: x.numpy(), "do not run on a ndarray"),
        (lambda x: x.long(), "do not run on a tensor of shape .*int64"),
    ],
)
def test_particles_and_densities_refuse_bad_rows(damage, text):
    model, guide = plain_pair()
    x = damage(table()[:, :2].clone())
    with pytest.raises(ValueError, match=text) as raised:
        pv.particles(model, guide, x, num_samples=3)
    assert inside_package(raised)
    if not isinstance(x, torch.Tensor) or not x.is_floating_point():
        with pytest.raises(ValueError, match="do not run on"):
            pv.log_q(guide, {"z": torch.zeros(3, 20, 2)}, x)


def test_particles_name_rows_outside_the_support():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Poisson(z.exp()), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.log1p(), 1.0))

    with pytest.raises(ValueError, match=r"site 'x' \(Poisson\) observes what lies outside its support in row 1 "):
        pv.particles(model, guide, torch.tensor([1.0, 2.5, 3.0]), num_samples=2)


def test_a_large_row_that_has_a_density_is_no_matter():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.LogNormal(z, 20.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros_like(x), 1.0))

    x = torch.tensor([1.0, 1e20, 2.0])
    assert math.isfinite(pv.elbo_terms(model, guide, x, num_samples=2, progress=False).value)


# --- datasets and tokens ---------------------------------------------------------------------------------------------


class Tokens(PyroModule):
    def __init__(self, size):
        super().__init__()
        self.table, self.head = PyroModule[nn.Embedding](size, 4), PyroModule[nn.Linear](2, 10)

    def model(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Categorical(logits=self.head(z)), obs=x)

    def guide(self, x):
        h = self.table(x)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(h[..., :2], h[..., 2:].exp()).to_event(1))


def fit_tokens(data, size=10):
    tokens = Tokens(size)
    return pv.fit(tokens.model, tokens.guide, data, epochs=1, batch_size=64, progress=False)


@pytest.mark.parametrize("holder", ["tensor", "array", "loader", "dataset"])
def test_a_token_beyond_the_table_in_a_later_batch_is_named(holder):
    x = torch.randint(0, 5, (300,), generator=torch.Generator().manual_seed(0))
    x[250] = 7
    held = {
        "tensor": x, "array": x.numpy(), "loader": DataLoader(TensorDataset(x), batch_size=64),
        "dataset": Items(x),
    }[holder]  # fmt: skip
    with pytest.raises(
        ValueError, match="row (250|.*row 250).* of the data is 7, on which the pair does not run.*embed"
    ):
        fit_tokens(held, size=7)
    assert len(fit_tokens(held, size=8)) == 1


class Items(Dataset):
    def __init__(self, x, error=None):
        self.x, self.error = x, error

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        if i == 77 and self.error is not None:
            raise self.error
        return self.x[i]


@pytest.mark.parametrize("error", [KeyError("foo"), RuntimeError("boom"), OSError(2, "no such", "a.png"), IndexError()])
def test_a_dataset_that_raises_is_named_with_its_item(error):
    items = Items(torch.arange(100) % 5, error)
    said = type(error).__name__
    with pytest.raises(ValueError, match=rf"item 77 of the dataset \(Items\) cannot be read: {said}"):
        fit_tokens(items)
    with pytest.raises(ValueError, match=rf"batch 7 of the dataset \(Items\) cannot be read: {said}"):
        fit_tokens(DataLoader(items, batch_size=10))


@pytest.mark.parametrize("dataset", [TensorDataset(torch.arange(50) % 5), Items(torch.arange(50) % 5)])
def test_a_subset_names_its_wrong_index(dataset):
    with pytest.raises(ValueError, match="got a Subset whose index 2 is 50, of a dataset of 50 items; wanted .* to 49"):
        fit_tokens(Subset(dataset, [0, 1, 50]))
    with pytest.raises(ValueError, match="got a Subset with indices"):
        fit_tokens(Subset(dataset, [0.5, 1.5]))
    assert len(fit_tokens(Subset(dataset, np.array([0, 3, 4])))) == 1


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [0, 5, 50, 0.3, 0.9])
@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_a_broken_file_is_told_without_bad_advice(cut, suffix, tmp_path):
    path = tmp_path / f"a{suffix}"
    array = np.random.default_rng(0).integers(0, 9, (50, 8, 8)).astype(np.uint8)
    np.save(path, array) if suffix == ".npy" else np.savez(path, x=array)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(cut * len(whole)) if isinstance(cut, float) else cut])
    with pytest.raises(ValueError, match="Save it again") as raised:
        pv.load(path)
    assert "pickle" not in str(raised.value)
    path.write_bytes(b"hello, world")
    with pytest.raises(ValueError, match="Save it again") as raised:
        pv.load(path)
    assert "pickle" not in str(raised.value)


@pytest.mark.parametrize("shape", [(8, 9), (8, 9, 3)])
def test_images_along_the_last_axis_are_turned_as_their_labels_say(shape, tmp_path):
    rng = np.random.default_rng(0)
    rows = rng.integers(0, 255, (50, *shape)).astype(np.uint8)
    np.savez(tmp_path / "last.npz", images=np.moveaxis(rows, 0, -1), labels=np.arange(50) % 3)
    np.savez(tmp_path / "first.npz", images=rows, labels=np.arange(50) % 3)
    with pytest.warns(UserWarning, match="50 labels, so its data lie along the last axis; taken as .50, 8, 9"):
        turned = pv.load(tmp_path / "last.npz")
    plain = pv.load(tmp_path / "first.npz")
    assert torch.equal(turned.train.pixels, plain.train.pixels) and torch.equal(turned.train.labels, plain.train.labels)


def test_levels_of_twelve_bits_say_how_they_are_scaled(tmp_path):
    rng = np.random.default_rng(0)
    np.save(tmp_path / "a.npy", rng.integers(0, 4096, (50, 8, 9)).astype(np.uint16))
    with pytest.warns(UserWarning, match=r"scaled by 1 / 65535.*For 12-bit data on \[0, 1\] save \(a / 4095\)"):
        data = pv.load(tmp_path / "a.npy")
    assert "at most 12 are used" in data.protocol["levels"] and data.train[:].max() < 4096 / 65535
    np.save(tmp_path / "b.npy", rng.integers(0, 65536, (50, 8, 9)).astype(np.uint16))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pv.load(tmp_path / "b.npy")


# --- whole batches ---------------------------------------------------------------------------------------------------


def test_those_that_take_one_batch_take_arrays_and_refuse_what_is_none():
    from pyro_vae.judging.arviz import to_arviz
    from pyro_vae.judging.gradients import gradient_lab

    vae = normal_vae()
    x = table()
    lab = gradient_lab(vae.model, vae.guide, x.double().numpy(), num_samples=(1,), repeats=10, progress=False)
    same = gradient_lab(vae.model, vae.guide, x, num_samples=(1,), repeats=10, progress=False)
    assert lab.measured[0].variance == pytest.approx(same.measured[0].variance, rel=1e-4)
    done = impute(vae.model, vae.guide, (x.numpy(), np.ones(4, bool)), num_samples=5)
    assert torch.equal(done.draws[0], x)
    with pytest.raises(ValueError, match="got data of type str"):
        gradient_lab(vae.model, vae.guide, "abc", num_samples=(1,), repeats=10)
    with pytest.raises(ValueError, match="row 3, column 0 of the data is nan"):
        gradient_lab(vae.model, vae.guide, x.index_fill(0, torch.tensor([3]), NAN), num_samples=(1,), repeats=10)
    with pytest.raises(ValueError, match="got data of type str"):
        to_arviz(vae.model, vae.guide, "abc", num_samples=8, num_chains=2)
    for call in (lambda: impute(vae.model, vae.guide, "abc"), lambda: ex_post(vae.model, vae.guide, None)):
        with pytest.raises(ValueError, match="of type"):
            call()


# --- raw errors of a first hour ---------------------------------------------------------------------------------------


class Foreign(nn.Module):
    """A pair with the prior of the README, whose type is torch's default whatever the networks have."""

    def __init__(self, enc=True, dec=True):
        super().__init__()
        torch.manual_seed(3)
        self.enc, self.dec = nn.Linear(4, 4), nn.Linear(2, 4)
        self.enc.requires_grad_(enc)
        self.dec.requires_grad_(dec)

    def model(self, x):
        pyro.module("dec", self.dec)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.dec(z), 1.0).to_event(1), obs=x)

    def guide(self, x):
        pyro.module("enc", self.enc)
        loc, log_scale = self.enc(x).chunk(2, -1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


SHORT = {"epochs": 2, "batch_size": 10, "seed": 0, "progress": False}


def test_a_pair_of_float64_with_a_prior_of_float32_is_fitted_as_pyro_fits_it():
    found = []
    for theirs in (True, False):
        pyro.clear_param_store()
        pair, x = Foreign().double(), table().double()
        if theirs:
            torch.manual_seed(0)
            svi = pyro.infer.SVI(pair.model, pair.guide, pyro.optim.Adam({"lr": 1e-3}), pyro.infer.Trace_ELBO())
            order = torch.randperm(20)
            found.append(svi.step(x[order]) / 20)
        else:
            found += pv.fit(pair.model, pair.guide, x, **SHORT | {"batch_size": 20, "epochs": 1})["loss"]
        assert pair.dec.weight.dtype == torch.float64
    assert found[0] == pytest.approx(found[1], rel=0.5)  # other noise
    assert math.isfinite(pv.elbo_terms(pair.model, pair.guide, x, progress=False).value)


def test_the_rules_still_see_a_pair_whose_model_does_not_run_at_the_guides_draws():
    pair = Foreign()

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))

    found = reasons(pair.model, guide, (table(),), pyro.infer.Trace_ELBO())
    assert "Give posterior and prior the same latent_dim" in found[0]


class Once:
    """The same iterator at every pass."""

    def __init__(self):
        self.batches = iter(table().split(10))

    def __iter__(self):
        return self.batches


class Wrapped(Once):
    def __iter__(self):
        return (batch for batch in self.batches)


class Counted(Once):
    """Batches for so many passes only."""

    def __init__(self, passes):
        self.passes = passes

    def __iter__(self):
        self.passes -= 1
        return iter(table().split(10) if self.passes >= 0 else ())


@pytest.mark.parametrize("make", [Once, Wrapped, *(lambda n=n: Counted(n) for n in range(1, 5))])
@pytest.mark.parametrize("what", ["fit", "elbo_terms", "log_likelihood"])
def test_batches_that_come_only_once_are_refused(make, what):
    pair, data = Foreign(), make()
    with pytest.raises(ValueError, match=r"can be run through again \(not a generator\)"):
        for _ in range(6):
            if what == "fit":
                pv.fit(pair.model, pair.guide, data, **SHORT | {"epochs": 9})
            else:
                getattr(pv, what)(pair.model, pair.guide, data, num_samples=2, progress=False)


def test_no_batches_at_all_are_said_to_be_empty():
    pair = Foreign()
    with pytest.raises(ValueError, match="the data are empty"):
        pv.fit(pair.model, pair.guide, Counted(0), **SHORT)


@pytest.mark.parametrize("kind", ["tensor", "loader", "dataset", "dict", "list"])
def test_gradients_do_not_leave_the_pair_through_the_data(kind):
    outside, pair = nn.Linear(4, 4), Foreign()
    x = outside(table())
    model, guide = pair.model, pair.guide
    data = {
        "tensor": x, "loader": DataLoader(TensorDataset(x), batch_size=10), "dataset": TensorDataset(x),
        "dict": {"x": x}, "list": list(x.split(7)),
    }[kind]  # fmt: skip
    if kind == "dict":
        model, guide = (lambda d: pair.model(d["x"])), (lambda d: pair.guide(d["x"]))
    first = pv.fit(model, guide, data, **SHORT)["loss"]
    assert outside.weight.grad is None and outside.bias.grad is None
    if kind == "tensor":
        pyro.clear_param_store()
        pair = Foreign()
        assert first == pv.fit(pair.model, pair.guide, x.detach(), **SHORT)["loss"]


def test_a_single_number_observed_in_the_plate_scores_as_in_pyro():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("c", dist.Normal(z, 1.0), obs=torch.tensor(0.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 3, 3**-0.5))

    x = torch.tensor([0.0, 1.0, -2.0])
    # z given both is normal of mean x / 3 and variance 1 / 3, so that each sample weighs p(x, c) itself.
    covariance = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
    both = dist.MultivariateNormal(torch.zeros(2), covariance).log_prob(torch.stack([torch.zeros(3), x], -1))
    pyros = -pyro.infer.Trace_ELBO().loss(model, guide, x)
    assert pyros == pytest.approx(both.sum().item(), abs=1e-4)
    found = pv.elbo_terms(model, guide, x, progress=False)
    assert found.value == pytest.approx(both.mean().item(), abs=1e-5)
    assert pv.log_likelihood(model, guide, x, num_samples=3, progress=False).value == pytest.approx(
        found.value, abs=1e-5
    )


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
def test_a_fit_without_gradients_says_so(off):
    pair = Foreign()
    with off(), pytest.raises(ValueError, match=r"gradients are switched off here \(torch.no_grad or inference_mode\)"):
        pv.fit(pair.model, pair.guide, table(), **SHORT)


def test_a_pair_that_is_frozen_whole_says_so():
    pair = Foreign(enc=False, dec=False)
    with pytest.raises(ValueError, match="all 4 parameters of model and guide have requires_grad=False"):
        pv.fit(pair.model, pair.guide, table(), **SHORT)


@pytest.mark.parametrize("as_functions", [False, True])
def test_networks_made_in_inference_mode_cannot_be_trained(as_functions):
    with torch.inference_mode():
        pair, x = Foreign(), table()
    programs = ((lambda x: pair.model(x)), (lambda x: pair.guide(x))) if as_functions else (pair.model, pair.guide)
    with pytest.raises(ValueError, match=r"Make the networks outside torch.inference_mode\(\)"):
        pv.fit(*programs, table(), **SHORT)
    ours = Foreign()
    for data in (x, DataLoader(TensorDataset(x), batch_size=10), [x[:7], x[7:]]):  # data from there are fine
        assert all(map(math.isfinite, pv.fit(ours.model, ours.guide, data, **SHORT)["loss"]))


@pytest.mark.parametrize("estimate", [pv.log_likelihood, pv.elbo_terms])
def test_what_silences_the_loop_over_samples_is_something_that_works(estimate):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            assert z.shape == x.shape
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))

    with pytest.warns(UserWarning, match="one by one") as met:
        estimate(model, guide, torch.zeros(3), num_samples=2, progress=False)
    said = next(str(w.message) for w in met if "one by one" in str(w.message))
    assert "vectorize" not in said and said.endswith("warnings.filterwarnings('ignore', 'drawing .* one by one').")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "drawing .* one by one")
        estimate(model, guide, torch.zeros(3), num_samples=2, progress=False)


def test_keyword_only_arguments_are_named():
    pair = Foreign()

    def model(*, x):
        pair.model(x)

    def guide(*, x):
        pair.guide(x)

    def two(x, *, y):
        pair.model(x + y)

    for data in ({"x": table()}, table()):
        with pytest.raises(ValueError, match=r"takes 'x' as a keyword-only argument.*Drop the \* before 'x'"):
            pv.fit(model, guide, data, **SHORT)
    with pytest.raises(ValueError, match=r"takes 'y' as a keyword-only.*as columns, \(x, y\)\."):
        pv.fit(two, lambda x, *, y: pair.guide(x), (table(), table()), **SHORT)
    bound = functools.partial(two, y=1.0)
    assert math.isfinite(pv.fit(bound, pair.guide, table(), **SHORT)["loss"][-1])


def test_labels_first_as_wide_as_the_data_are_refused():
    pair = Foreign()
    labels = nn.functional.one_hot(torch.arange(20) % 4, 4)
    for data in (TensorDataset(labels, table()), DataLoader(TensorDataset(labels, table()), batch_size=10)):
        with pytest.raises(
            ValueError, match=r"would take column 0 \(int64 .*, 4\)\), and leave out column 1, float32 "
        ):
            pv.fit(pair.model, pair.guide, data, **SHORT)
    with pytest.warns(
        UserWarning, match=r"took column 0 \(float32 \(10, 4\)\); left out int64 \(10, 4\), such as labels"
    ):
        pv.fit(pair.model, pair.guide, TensorDataset(table(), labels), **SHORT)
    with pytest.warns(UserWarning, match=r"took column 0 \(int64 \(10, 4\)\); left out float32 \(10,\)"):
        pv.fit(pair.model, pair.guide, TensorDataset(labels, table()[:, 0]), **SHORT)
