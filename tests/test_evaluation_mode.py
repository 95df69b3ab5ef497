"""Estimates are of the networks in evaluation mode, wherever a program holds them, and leave all as it was."""

import contextlib
import functools
import inspect
import math
import random
import threading
import types
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pyro_vae import evaluation
from pyro_vae.evaluation import at_rest, evaluating, unmoved
from pyro_vae.inference.objectives import Objective, mean_bound
from pyro_vae.inference.training import fit
from pyro_vae.judging._calibration import sbc
from pyro_vae.judging._collapse import collapse, linear_optimum
from pyro_vae.judging._gaps import gaps
from pyro_vae.judging.annealing import ais, bdmc
from pyro_vae.judging.anomalies import anomaly_scores
from pyro_vae.judging.arviz import to_arviz
from pyro_vae.judging.distances import guide_distances
from pyro_vae.judging.estimates import elbo_terms, log_likelihood, rate_distortion
from pyro_vae.judging.gradients import gradient_lab
from pyro_vae.judging.grids import quadrature
from pyro_vae.judging.guides import compare_guides, fit_guide
from pyro_vae.judging.imputation import impute
from pyro_vae.judging.information import mutual_information, probe
from pyro_vae.judging.judgement import judge
from pyro_vae.judging.latents import active_units, kl_per_dimension, posterior_means
from pyro_vae.judging.references import reference
from pyro_vae.lending import lent
from pyro_vae.parameters import device_of, trainable
from pyro_vae.programs._ex_post import aggregated_posterior
from pyro_vae.randomness import noise
from pyro_vae.reach import modules_of

X = torch.randn(24, 3, generator=torch.Generator().manual_seed(0))
Y = torch.arange(24) % 2


class Encoder(nn.Module):
    """Dropout, statistics of batches, a buffer that counts in place and one that is put anew."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)
        self.drop = nn.Dropout(0.5)
        self.codebook = nn.Parameter(torch.zeros(2), requires_grad=False)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(8), persistent=False)

    def forward(self, x):
        hidden = self.norm(self.first(x)).tanh()
        self.calls += 1
        self.mean = 0.9 * self.mean + 0.1 * hidden.detach().mean(0)
        with torch.no_grad():
            self.codebook.mul_(0.9).add_(0.1)
        return self.last(self.drop(hidden))


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.drop, self.last = nn.Linear(2, 8), nn.Dropout(0.3), nn.Linear(8, 3)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, z):
        self.calls += 1
        return self.last(self.drop(self.first(z).tanh()))


def _model(decoder, x, mask=None):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        likelihood = dist.Normal(decoder(z), 0.5)
        if mask is not None:
            x, likelihood = torch.where(mask, x, 0.0), likelihood.mask(mask)
        return pyro.sample("x", likelihood.to_event(1), obs=x)


def _guide(encoder, x, mask=None):
    if mask is not None:
        x = torch.where(mask, x, 0.0)
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(encoder(x), 0.7).to_event(1))


class Both(nn.Module):
    def __init__(self, encoder, decoder):
        super().__init__()
        self.encoder, self.decoder = encoder, decoder

    def model(self, x, mask=None):
        pyro.module("decoder", self.decoder)
        return _model(self.decoder, x, mask)

    def guide(self, x, mask=None):
        pyro.module("encoder", self.encoder)
        _guide(self.encoder, x, mask)


class Program(nn.Module):
    def __init__(self, program, network):
        super().__init__()
        self.program, self.network = program, network

    def forward(self, x, mask=None):
        pyro.module(type(self.network).__name__, self.network)
        return self.program(self.network, x, mask)


GLOBAL = types.SimpleNamespace()
REGISTRY: dict = {}


def global_model(x, mask=None):
    pyro.module("global decoder", GLOBAL.decoder)
    return _model(GLOBAL.decoder, x, mask)


def global_guide(x, mask=None):
    pyro.module("global encoder", GLOBAL.encoder)
    _guide(GLOBAL.encoder, x, mask)


class Hidden:
    """Keeps networks where nobody looks: behind a function that is made of text."""

    def __init__(self, encoder, decoder):
        space = {"nets": (lambda: (encoder, decoder)).__closure__}
        self.find = eval("lambda i: nets[i].cell_contents", space)


def _modules(encoder, decoder):
    return Program(_model, decoder), Program(_guide, encoder)


def _methods(encoder, decoder):
    both = Both(encoder, decoder)
    return both.model, both.guide


def _functions(encoder, decoder):
    def model(x, mask=None):
        pyro.module("decoder", decoder)
        return _model(decoder, x, mask)

    def guide(x, mask=None):
        pyro.module("encoder", encoder)
        _guide(encoder, x, mask)

    return model, guide


def _closures(encoder, decoder):
    return (lambda x, mask=None: _model(decoder, x, mask)), (lambda x, mask=None: _guide(encoder, x, mask))


def _globals(encoder, decoder):
    GLOBAL.encoder, GLOBAL.decoder = encoder, decoder
    return global_model, global_guide


def _partials(encoder, decoder):
    return functools.partial(_model, decoder), functools.partial(_guide, encoder)


def _fetched(encoder, decoder):
    """What no search from the program finds: networks that it reads out of the interpreter itself."""
    REGISTRY.update(e=encoder, d=decoder)
    find = inspect.currentframe
    return (
        lambda x, mask=None: _model(find().f_globals["REG" + "ISTRY"]["d"], x, mask),
        lambda x, mask=None: _guide(find().f_globals["REG" + "ISTRY"]["e"], x, mask),
    )


PAIRS = {"modules": _modules, "methods": _methods, "functions": _functions, "closures": _closures,
         "globals": _globals, "partials": _partials, "fetched": _fetched}  # fmt: skip


def pair(kind, seed=0):
    """Model, guide and networks of one kind, in the modes that training leaves, one layer set apart by hand."""
    pyro.clear_param_store()
    torch.manual_seed(seed)
    encoder, decoder = Encoder(), Decoder()
    encoder.norm.running_mean.normal_()
    encoder.norm.running_var.uniform_(0.5, 2.0)
    model, guide = PAIRS[kind](encoder, decoder)
    return model, guide, encoder, decoder


def _numbers(result):
    """All numbers of a result, however deep."""
    if isinstance(result, torch.Tensor):
        return result.detach().double().flatten().tolist()
    if isinstance(result, bool | int | float):
        return [float(result)]
    if isinstance(result, dict):
        return [n for key in result if key not in ("seconds", "cost", "stages") for n in _numbers(result[key])]
    if isinstance(result, list | tuple):
        names = getattr(result, "_fields", range(len(result)))
        return [n for name, item in zip(names, result, strict=True) if name != "seconds" for n in _numbers(item)]
    if hasattr(result, "__dataclass_fields__"):
        return _numbers({k: v for k, v in vars(result).items() if k not in ("seconds", "cost", "arrays")})
    return []


def _arviz(model, guide):
    tree = to_arviz(model, guide, X, num_samples=8, num_prior=2)
    groups = ("posterior", "posterior_predictive", "log_likelihood", "sample_stats", "prior", "prior_predictive")
    return [torch.as_tensor(v.values) for g in groups for v in tree[g].data_vars.values()]


def _impute(model, guide):
    return impute(model, guide, (X[:4], torch.tensor([True, False, True])), num_imputations=2, num_samples=20)


def _aggregated(model, guide):
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return aggregated_posterior(model, guide, X)


def _judged(model, guide):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ticks = iter(range(10**9))
        found = judge(model, guide, X, num_data=4, num_samples=30, budget=30, clock=lambda: next(ticks) * 0.01)
        return found.to_dict()["stages"]


QUICK = {"num_steps": 5, "num_samples": 4, "num_leapfrog": 2, "progress": False}
ESTIMATES = {
    "log_likelihood": lambda m, g: log_likelihood(m, g, X, num_samples=40),
    "elbo_terms": lambda m, g: elbo_terms(m, g, X, num_samples=20),
    "captured": lambda m, g: elbo_terms(m, g, X[:3], num_samples=20, compile=True),
    "mean_bound": lambda m, g: mean_bound(m, g, X),
    "ais": lambda m, g: ais(m, g, X[:4], **QUICK),
    "ais from the prior": lambda m, g: ais(m, None, X[:4], start="prior", **QUICK),
    "bdmc": lambda m, g: bdmc(m, g, X, num_data=4, **QUICK),
    "gaps": lambda m, g: gaps(m, g, X[:4], num_samples=30, num_steps=8, window=2, progress=False),
    "compare_guides": lambda m, g: compare_guides(m, {"g": g}, X, num_samples=30, progress=False),
    "reference": lambda m, g: reference(m, g, X[:3], num_chains=2, num_warmup=20, num_samples=10, progress=False),
    "quadrature": lambda m, g: quadrature(m, g, X[:3], num_points=11, refinements=1),
    "sbc": lambda m, g: sbc(m, g, X, num_data=20, num_samples=9, progress=False),
    "guide_distances": lambda m, g: guide_distances(m, g, X[:3], reference=REFERENCE, num_directions=5),
    "active_units": lambda m, g: active_units(g, X),
    "posterior_means": lambda m, g: posterior_means(g, X),
    "kl_per_dimension": lambda m, g: kl_per_dimension(m, g, X),
    "mutual_information": lambda m, g: mutual_information(m, g, X, progress=False),
    "rate_distortion": lambda m, g: rate_distortion(m, g, X, num_samples=10),
    "collapse": lambda m, g: collapse(m, g, X, num_samples=8),
    "linear_optimum": lambda m, g: (linear_optimum(m, X) is None,),
    "probe": lambda m, g: probe(g, X, labels=Y, test_data=X, test_labels=Y, num_neighbours=3),
    "anomaly_scores": lambda m, g: anomaly_scores(m, g, X, num_samples=10),
    "reconstruction score": lambda m, g: anomaly_scores(m, g, X, score="reconstruction", num_samples=5),
    "gradient_lab": lambda m, g: gradient_lab(m, g, X, num_samples=(2,), repeats=10, progress=False).measured,
    "impute": _impute,
    "aggregated_posterior": _aggregated,
    "to_arviz": _arviz,
    "judge": _judged,
}  # fmt: skip
SLOW = {name: ("methods", "closures", "fetched") for name in ("bdmc", "captured", "reference", "gradient_lab", "gaps")}
SLOW["judge"] = ("closures",)
REFERENCE = None


@pytest.fixture(scope="module", autouse=True)
def draws_of_a_posterior():
    global REFERENCE
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, guide, encoder, decoder = pair("closures")
        encoder.eval(), decoder.eval()
        REFERENCE = reference(model, guide, X[:3], num_chains=2, num_warmup=20, num_samples=10, progress=False)


def everything(*modules):
    """All that an estimate has to leave as it is, as values and as objects."""
    store = pyro.get_param_store()
    tensors = [(name, id(t), t.detach().clone()) for m in modules for name, t in
               (*m.named_parameters(), *m.named_buffers())]  # fmt: skip
    return {
        "modes": [part.training for m in modules for part in m.modules()],
        "tensors": tensors,
        "torch": torch.get_rng_state(),
        "numpy": [str(part) for part in np.random.get_state()],
        "python": random.getstate(),
        "store": [(name, id(store._params[name]), store._params[name].detach().clone()) for name in store._params],
        "constraints": [(name, id(c)) for name, c in store._constraints.items()],
        "precision": torch.get_float32_matmul_precision(),
        "dtype": torch.get_default_dtype(),
        "grad": torch.is_grad_enabled(),
        "validation": (dist.is_validation_enabled(), pyro.infer.is_validation_enabled(),
                       pyro.poutine.is_validation_enabled()),
        "hooks": len(nn.modules.module._global_forward_pre_hooks),
        "depth": (len(evaluation._here.meeting), len(evaluation._here.resting)),
    }  # fmt: skip


def same(before, after):
    for key, value in before.items():
        if key in ("tensors", "store"):
            assert [v[:2] for v in value] == [v[:2] for v in after[key]], key
            for (name, _, old), (_, _, new) in zip(value, after[key], strict=True):
                assert torch.equal(old, new), f"{key}: {name}"
        elif isinstance(value, torch.Tensor):
            assert torch.equal(value, after[key]), key
        else:
            assert value == after[key], key


def cases():
    for name in ESTIMATES:
        for kind in PAIRS:
            if kind == "fetched" and name == "gradient_lab":
                continue  # whose parameters nobody knows
            if name not in SLOW or kind in SLOW[name]:
                yield pytest.param(name, kind, id=f"{name}-{kind}")


@pytest.mark.parametrize(("name", "kind"), list(cases()))
@pytest.mark.filterwarnings("ignore")
def test_an_estimate_is_of_evaluation_mode_and_changes_nothing(name, kind):
    estimate = ESTIMATES[name]
    model, guide, encoder, decoder = pair(kind)
    encoder.eval(), decoder.eval()
    wanted = _numbers(estimate(model, guide))
    model, guide, encoder, decoder = pair(kind)
    decoder.last.eval()  # modes are each module's own
    pyro.param("mine", torch.ones(2), constraint=dist.constraints.positive)
    torch.manual_seed(5)
    before = everything(encoder, decoder)
    found = _numbers(estimate(model, guide))
    if name == "impute":
        torch.manual_seed(5)
    same(before, everything(encoder, decoder))
    assert len(found) and found == pytest.approx(wanted, rel=1e-6, abs=1e-9, nan_ok=True)


def test_the_pairs_feel_their_mode():
    """Else the test above would say nothing."""
    for kind in PAIRS:
        model, guide, encoder, decoder = pair(kind)
        before = everything(encoder, decoder)
        noisy = [Objective().particles(model, guide, X).log_weight for _ in range(2)]
        assert not torch.equal(encoder.norm.running_mean, before["tensors"][6][2]) or encoder.norm.num_batches_tracked
        encoder.eval(), decoder.eval()
        with noise(0):
            still = [Objective().particles(model, guide, X).log_weight for _ in range(1)]
        assert (noisy[0] - still[0]).abs().mean() > 0.05
        assert encoder.calls == 3 and encoder.codebook[0] > 0.2


def test_what_each_kind_of_pair_owns():
    for kind in PAIRS:
        model, guide, encoder, decoder = pair(kind)
        owned = {id(part) for module in modules_of(model, guide) for part in module.modules()}
        found = id(encoder) in owned and id(decoder) in owned
        assert found == (kind != "fetched")
        if found:
            parts = [p for p in encoder.parameters() if p.requires_grad]
            assert {id(p) for p in parts} <= {id(p) for p in trainable(guide)}
            assert device_of(guide) == torch.device("cpu")
    frozen = nn.Linear(1, 1).requires_grad_(False)
    assert device_of(lambda x: frozen(x)) == torch.device("cpu") and trainable(lambda x: frozen(x)) == []


def test_an_error_and_an_abandoned_estimate_restore_everything():
    model, guide, encoder, decoder = pair("closures")
    before = everything(encoder, decoder)
    runs = 0

    def breaks(x):
        nonlocal runs
        runs += 1
        if runs > 1:
            torch.set_default_dtype(torch.float64)
            torch.set_float32_matmul_precision("medium")
            pyro.enable_validation(False)
            raise OSError("the disk is full")
        model(x)

    for estimate in (log_likelihood, elbo_terms, rate_distortion, mutual_information, collapse):
        runs = 0
        with pytest.raises(OSError, match="the disk is full"):
            estimate(breaks, guide, X, num_samples=30)
        same(before, everything(encoder, decoder))

    def half(values):
        with evaluating(model, guide, seed=0):
            for value in values:
                guide(X)
                yield value

    generator = half(range(3))
    next(generator)
    assert not encoder.training
    generator.close()
    same(before, everything(encoder, decoder))


def test_parameters_that_an_evaluation_declares_are_gone_and_others_are_as_they_were():
    pyro.clear_param_store()
    old = pyro.param("old", torch.tensor(2.0), constraint=dist.constraints.positive)

    def model(x):
        pyro.param("old", torch.tensor(9.0), constraint=dist.constraints.positive)
        pyro.get_param_store()._params["old"].data.add_(1.0)
        scale = pyro.param("new", torch.tensor(1.5), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, scale), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 1.0))

    first = log_likelihood(model, guide, X[:, 0], num_samples=10).value
    assert list(pyro.get_param_store().keys()) == ["old"] and pyro.param("old").item() == old.item()
    assert log_likelihood(model, guide, X[:, 0], num_samples=10).value == first

    def clears(x):
        pyro.clear_param_store()
        model(x)

    log_likelihood(clears, guide, X[:, 0], num_samples=10)
    assert list(pyro.get_param_store().keys()) == ["old"] and pyro.param("old").item() == old.item()


def test_noise_from_python_and_numpy_is_seeded_too_and_none_goes_on():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z + random.gauss(0, 1) + np.random.randn(), 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 1.0))

    found = []
    for seed in (0, 1):
        random.seed(seed), np.random.seed(seed)
        states = random.getstate(), str(np.random.get_state())
        found.append(elbo_terms(model, guide, X[:, 0], num_samples=10).value)
        assert states == (random.getstate(), str(np.random.get_state()))
    assert found[0] == found[1]
    torch.manual_seed(0)
    going_on = [elbo_terms(model, guide, X[:, 0], num_samples=10, seed=None).value for _ in range(2)]
    assert going_on[0] != going_on[1]


def test_contexts_in_contexts_and_modules_made_on_the_way():
    made = []

    def program(x):
        layer = nn.Dropout(0.5)
        made.append(layer.training)
        out = layer(x)
        made.append(layer.training)
        return out

    outer, inner = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    inner.eval()
    with evaluating(lambda x: outer(x)):
        assert not outer.training
        with evaluating(lambda x: inner(outer(x)), seed=0):
            assert torch.equal(program(X), X) and made == [True, False]
            outer.running_mean.add_(1.0)
        assert not outer.training and outer.running_mean.sum() == 0 and outer.num_batches_tracked == 0
    assert outer.training and not inner.training
    assert len(nn.modules.module._global_forward_pre_hooks) == 0


def test_networks_that_train_in_another_thread_are_let_alone():
    net, seen = nn.Dropout(0.5), []
    with evaluating():
        thread = threading.Thread(target=lambda: seen.append((net(torch.ones(100)), net.training)))
        thread.start(), thread.join()
    assert seen[0][1] and (seen[0][0] == 0).any()


def test_layers_that_do_more_than_switch_a_flag():
    class Merged(nn.Linear):
        """Adds a low-rank part to its weight while it is used, as adapters do."""

        def train(self, mode=True):
            if self.training != mode:
                with torch.no_grad():
                    self.weight.add_(torch.ones_like(self.weight), alpha=-1.0 if mode else 1.0)
            return super().train(mode)

    layer = Merged(3, 2)
    plain = layer(X)
    before = layer.weight.clone()
    with evaluating(lambda x: layer(x)):
        assert torch.allclose(layer(X), plain + X.sum(1, keepdim=True), atol=1e-6) and not layer.training
    assert torch.equal(layer.weight, before) and layer.training


def test_what_was_not_moved_is_not_written():
    """A graph that was made before an estimate can still be gone through backwards."""
    model, guide, encoder, decoder = pair("closures")
    decoder.calls = None
    loss = F.mse_loss(nn.Sequential(encoder.first, encoder.last)(X), torch.zeros(24, 2))
    versions = [p._version for p in encoder.parameters()]
    encoder.forward = lambda x: encoder.last(encoder.first(x))
    with evaluating(guide):
        guide(X)
    assert versions == [p._version for p in encoder.parameters()]
    loss.backward()


def test_lazy_layers_and_automatic_guides_stay_set_up():
    net = nn.Sequential(nn.LazyLinear(2), nn.LazyBatchNorm1d())
    with evaluating(lambda x: net(x)):
        net(X)
    assert net[0].weight.shape == (2, 3) and net.training and net[1].num_batches_tracked == 0

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    guide = pyro.infer.autoguide.AutoNormal(model)
    pyro.clear_param_store()
    first = anomaly_scores(model, guide, X[:, 0], score="reconstruction")
    assert len(list(guide.parameters())) == 2 and not list(pyro.get_param_store())
    assert torch.equal(anomaly_scores(model, guide, X[:, 0], score="reconstruction"), first)
    with torch.no_grad():
        guide.locs.z_unconstrained.copy_(X[:, 0])
    assert (anomaly_scores(model, guide, X[:, 0], score="reconstruction") < first).double().mean() > 0.5


@pytest.mark.filterwarnings("ignore:Using `torch.compile.module.` when there are global hooks")  # those of this test
def test_compiled_networks_are_evaluated_without_a_word():
    torch._dynamo.reset()
    net = torch.compile(nn.Sequential(nn.Linear(3, 2), nn.Dropout(0.5)), backend="eager")

    def model(x):
        _model(decoder, x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(net(x), 0.7).to_event(1))

    decoder = Decoder()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "Guards may run slower on Python 3.13.0")  # torch's, once
        first, again = (elbo_terms(model, guide, X, num_samples=30).value for _ in range(2))
    net.eval(), decoder.eval()
    assert first == again == elbo_terms(model, guide, X, num_samples=30).value
    net.train()
    elbo_terms(model, guide, X, num_samples=30)
    assert net.training and net._orig_mod[1].training


# ---------------------------------------------------------------------- fit


def seen_while_running(networks):
    """Which modes networks ran in, as hooks see it."""
    modes: list = []
    handles = [net.register_forward_pre_hook(lambda m, _: modes.append((m.training, torch.is_grad_enabled())))
               for net in networks]  # fmt: skip
    return modes, handles


@pytest.mark.parametrize("kind", PAIRS)
def test_fit_trains_all_networks_in_training_mode_and_leaves_all_in_evaluation_mode(kind):
    model, guide, encoder, decoder = pair(kind)
    if kind in ("closures", "partials", "fetched"):  # whose parameters Pyro is not told of
        inner_model, inner_guide = model, guide

        def model(x):
            pyro.module("decoder", REGISTRY.get("d", decoder) if kind == "fetched" else decoder)
            return inner_model(x)

        def guide(x):
            pyro.module("encoder", encoder)
            return inner_guide(x)

    modes, handles = seen_while_running([encoder, decoder])
    fit(model, guide, X, epochs=2, batch_size=8, seed=0, progress=False, compile=False, validation=X)
    assert not any(part.training for net in (encoder, decoder) for part in net.modules())
    assert all(training for training, grad in modes if grad)
    assert any(not training for training, grad in modes if not grad)
    steps = sum(grad for _, grad in modes)
    assert steps >= 12 and encoder.norm.num_batches_tracked == 6  # of the steps alone: not of checks, nor of validation
    modes.clear()
    fit(model, guide, X, epochs=1, batch_size=8, seed=0, progress=False, compile=False)
    assert all(training for training, grad in modes if grad) and encoder.norm.num_batches_tracked == 9
    assert not encoder.training and not decoder.drop.training
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_fit_leaves_evaluation_mode_after_an_error_and_ctrl_c(error):
    model, guide, encoder, decoder = pair("functions")

    def callback(record):
        encoder.eval()  # as people do to look at pictures: the next epoch trains all the same
        if record["epoch"] == 2:
            assert encoder.norm.num_batches_tracked == 6
            raise error

    options = {"epochs": 5, "batch_size": 8, "seed": 0, "progress": False}
    if error is KeyboardInterrupt:
        assert fit(model, guide, X, callback=callback, **options).interrupted
    else:
        with pytest.raises(error):
            fit(model, guide, X, callback=callback, **options)
    assert not any(part.training for net in (encoder, decoder) for part in net.modules())


def test_what_is_frozen_whole_stays_in_evaluation_mode_inside_of_what_learns_too():
    model, guide, encoder, decoder = pair("functions")
    encoder.norm.requires_grad_(False)
    before = encoder.norm.running_mean.clone()
    modes, handles = seen_while_running([encoder.norm, encoder.drop])
    fit(model, guide, X, epochs=1, batch_size=8, seed=0, progress=False, compile=False)
    assert torch.equal(encoder.norm.running_mean, before) and encoder.norm.num_batches_tracked == 0
    assert {training for training, grad in modes if grad} == {False, True}


@pytest.mark.parametrize("kind", ["closures", "functions", "methods", "globals"])
def test_patience_brings_back_the_buffers_of_the_best_epoch(kind):
    model, guide, encoder, decoder = pair(kind)
    if kind == "closures":
        plain_guide, plain_model = guide, model

        def guide(x):
            pyro.module("head", encoder.last)  # the rest moves without Pyro's knowing of it
            plain_guide(x)

        def model(x):
            plain_model(x)

    kept = {}

    def callback(record):
        kept[record["epoch"]] = {n: b.clone() for n, b in encoder.named_buffers()}, record["validation"]

    partly = pytest.warns(UserWarning, match="is not trained") if kind == "closures" else contextlib.nullcontext()
    with partly:
        history = fit(model, guide, X, epochs=12, batch_size=8, learning_rate=0.5, seed=0, progress=False,
                      compile=False, validation=X + 0.5, patience=2, callback=callback)  # fmt: skip
    best = history.best_epoch
    assert history.stopped_early and best < len(history)
    for name, buffer in encoder.named_buffers():
        assert torch.equal(buffer, kept[best][0][name]), name
        if name != "norm.running_var":
            assert not torch.equal(buffer, kept[len(history)][0][name])
    assert mean_bound(model, guide, X + 0.5) == pytest.approx(kept[best][1], rel=1e-6)


def test_a_checkpoint_holds_buffers_that_are_put_anew_and_those_that_are_not_saved(tmp_path):
    def fitted(epochs, path, pieces):
        model, guide, encoder, _ = pair("functions")
        for last in pieces:
            stop = RuntimeError("broken off")

            def callback(record, last=last, stop=stop):
                if record["epoch"] == last:
                    raise stop

            try:
                fit(model, guide, X, epochs=epochs, batch_size=8, seed=0, progress=False, checkpoint=path,
                    callback=callback)  # fmt: skip
            except RuntimeError:
                model, guide, encoder, _ = pair("functions", seed=1)
        return {name: b.clone() for name, b in encoder.named_buffers()}

    whole = fitted(4, tmp_path / "a.safetensors", [None])
    parts = fitted(4, tmp_path / "b.safetensors", [3, None])
    assert whole["mean"].abs().sum() > 0
    for name, buffer in whole.items():
        assert torch.equal(buffer, parts[name]), name


def test_what_was_lent_to_a_device_is_where_it_was_and_the_same():
    still = nn.BatchNorm1d(2, affine=False)
    other = nn.BatchNorm1d(2, affine=False)
    other.running_mean = still.running_mean
    modules = [nn.Sequential(still, nn.Linear(2, 2)), nn.Sequential(still, other)]

    def seen():
        tensors = [t for m in modules for t in (*m.parameters(), *m.buffers())]
        return [(id(t), t.data_ptr(), t.requires_grad, t.device) for t in tensors]

    before = seen()
    with pytest.raises(KeyError), lent(modules[1:], "meta"):
        assert {t.device.type for t in still.buffers()} == {"meta"} and other.running_mean is still.running_mean
        raise KeyError
    assert seen() == before
    with lent(modules, "cpu"):
        assert seen() == before
    with pytest.raises(ValueError, match=r"got device='meta', and networks on cpu that cannot .* module.to\('meta'\)"):
        with lent(modules, "meta"):
            pass
    assert seen() == before


def test_a_pair_with_tensors_on_another_device_is_told_so():
    def model(x):
        raise RuntimeError("Expected all tensors to be on the same device, but got mat1 is on cuda:0")  # torch's words

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    with pytest.raises(
        ValueError, match=r"(?s)lies on the CPU: Expected .* Wanted all tensors of the programs on one devi"
    ):
        log_likelihood(model, guide, torch.zeros(4), num_samples=3)


def test_a_device_moves_all_networks():
    for kind in ("functions", "closures", "globals", "partials"):
        model, guide, encoder, decoder = pair(kind)
        moved = []
        for net in (encoder, decoder):
            net.to = lambda *args, net=net, moved=moved: moved.append(net) or net
        if kind in ("closures", "partials"):
            with pytest.raises(ValueError, match="nothing to train"):
                fit(model, guide, X, epochs=1, device="cpu", progress=False)
        else:
            fit(model, guide, X, epochs=1, device="cpu", progress=False)
        assert {id(m) for m in moved} == {id(encoder), id(decoder)}


@pytest.mark.parametrize("kind", ["functions", "methods", "globals", "modules"])
def test_fit_guide_keeps_the_model_as_it_is_buffers_and_layers_without_parameters_too(kind):
    class Normed(Decoder):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(3, affine=False)

        def forward(self, z):
            out = super().forward(z)
            return self.norm(out.reshape(-1, 3)).reshape(out.shape)

    pyro.clear_param_store()
    torch.manual_seed(0)
    encoder, decoder = Encoder(), Normed()
    model, guide = PAIRS[kind](encoder, decoder)
    before = {name: value.clone() for name, value in decoder.state_dict().items()}
    modes, _ = seen_while_running([decoder, decoder.norm, decoder.drop])
    weights = encoder.first.weight.clone()
    fit_guide(model, guide, X, epochs=2, batch_size=8, seed=0, progress=False)
    assert not any(training for training, _ in modes)
    for name, value in decoder.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert not torch.equal(encoder.first.weight, weights) and all(p.requires_grad for p in decoder.parameters())
    assert not encoder.training and decoder.training == (kind != "methods")


def test_a_networks_own_elbo_after_fit_is_the_estimate():
    """Pyro's own loss after a fit, in the mode that fit leaves, is the ELBO that is estimated."""
    model, guide, encoder, decoder = pair("functions")
    fit(model, guide, X, epochs=20, batch_size=8, learning_rate=1e-2, seed=0, progress=False)
    terms = elbo_terms(model, guide, X, num_samples=2000)
    loss = pyro.infer.Trace_ELBO(num_particles=50, vectorize_particles=True, max_plate_nesting=1)
    losses = torch.tensor([loss.loss(model, guide, X) for _ in range(40)]) / len(X)
    error = math.hypot(losses.std().item() / 40**0.5, terms.mc_stderr)
    assert abs(terms.value + losses.mean().item()) < 4 * error


def test_unmoved_and_at_rest_alone():
    net = Encoder()
    before = everything(net)
    with unmoved([net.norm]) as met:
        net(X)
        assert net.training and net.calls == 1
    assert [reference() for reference in met] == [net]
    same({key: before[key] for key in ("tensors", "modes")}, everything(net))
    with at_rest([net]):
        net(X)
        assert not net.drop.training and evaluation.rests(net.norm)
    same(before, everything(net) | {"torch": before["torch"]})
    assert not evaluation.rests(net)
