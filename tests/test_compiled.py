"""A compiled loss is the loss: the same numbers, gradients and draws, whatever changes between steps."""

import contextlib
import copy
import re
import time
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, RenyiELBO, Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from torch import nn
from torch.distributions import constraints

from pyro_vae.inference import captured, epochs, loop, preparation
from pyro_vae.inference.bounds import elbo, iwae
from pyro_vae.inference.capture import Capture
from pyro_vae.inference.checkpoints import Checkpoint, Sparing
from pyro_vae.inference.compiled import Compiled
from pyro_vae.inference.objectives import Objective
from pyro_vae.inference.training import fit
from pyro_vae.parts.likelihoods import Bernoulli, Normal
from pyro_vae.parts.networks import MLP, ConvDecoder, ConvEncoder
from pyro_vae.parts.posteriors import DiagonalNormal
from pyro_vae.parts.priors import StandardNormal
from pyro_vae.programs.pair import Guide, Model
from tests.pairs import binary, small_pair


@pytest.fixture(autouse=True)
def fresh_store():
    pyro.clear_param_store()
    yield
    pyro.clear_param_store()


def replayed(loss, **options):
    """Captured, and never handed to Inductor, which costs seconds."""
    return Compiled(loss, compile_after=None, **options)


def normal_pair(scale="learned"):
    torch.manual_seed(0)
    likelihood = Normal(MLP(3, [8], (2 if scale == "network" else 1, 4, 4)), scale, (1, 4, 4))
    return Model(StandardNormal(3), likelihood), Guide(DiagonalNormal(MLP((1, 4, 4), [8], None), 3))


def convolutional_pair():
    torch.manual_seed(0)
    decoder, encoder = ConvDecoder(3, (1, 8, 8), (4,)), ConvEncoder((1, 8, 8), (4,))
    return Model(StandardNormal(3), Bernoulli(decoder)), Guide(DiagonalNormal(encoder, 3))


def functions_pair():
    """Plain functions, with a constrained parameter in the store."""

    def model(x):
        b = pyro.param("b", torch.zeros(()))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(b, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        scale = pyro.param("scale", torch.tensor(1.5), constraint=constraints.positive)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x * pyro.param("slope", torch.tensor(0.1)), scale))

    return model, guide


def dropout_pair():
    model, guide = small_pair()
    model.likelihood.decoder.layers.append(nn.Dropout(0.5))
    return model, guide


def gamma_pair():
    """Noise whose parameters the guide computes."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Gamma(2.0, 1.0))
            pyro.sample("x", dist.Normal(z * pyro.param("w", torch.ones(())), 1.0), obs=x)

    def guide(x):
        shape = pyro.param("shape", torch.tensor(2.0), constraint=constraints.positive)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Gamma(shape + x.exp(), 1.0))

    return model, guide


images = binary(12)
numbers = torch.randn(12, generator=torch.Generator().manual_seed(3))
# Name: (pair, data, loss). Add a line for every new part, bound or estimator.
CASES = {
    "trace": (small_pair, images, Trace_ELBO),
    "trace-particles": (small_pair, images, lambda: Trace_ELBO(num_particles=2, vectorize_particles=True)),
    "trace-sequential": (small_pair, images, lambda: Trace_ELBO(num_particles=2)),
    "mean-field": (small_pair, images, TraceMeanField_ELBO),
    "renyi": (small_pair, images, lambda: RenyiELBO(0.5, num_particles=2)),
    "graph": (small_pair, images, TraceGraph_ELBO),
    "elbo": (small_pair, images, lambda: Objective(elbo)),
    "iwae": (small_pair, images, lambda: Objective(iwae, 4)),
    "iwae-stl": (small_pair, images, lambda: Objective(iwae, 4, estimator="sticking-the-landing")),
    "iwae-dreg": (small_pair, images, lambda: Objective(iwae, 4, estimator="doubly-reparameterized")),
    "beta": (small_pair, images, lambda: Objective(elbo, beta=0.3)),
    "normal": (normal_pair, images, Trace_ELBO),
    "normal-network": (lambda: normal_pair("network"), images, Trace_ELBO),
    "normal-per-pixel": (lambda: normal_pair("per-pixel"), images, Objective),
    "convolutional": (convolutional_pair, binary(12).repeat(1, 1, 2, 2), Trace_ELBO),
    "functions": (functions_pair, numbers, Trace_ELBO),
    "functions-objective": (functions_pair, numbers, Objective),
    "dropout": (dropout_pair, images, Trace_ELBO),
    "gamma": (gamma_pair, numbers, Trace_ELBO),
}


def steps(pair, data, loss, count=14, seed=1):
    """Losses, gradients of every step, and weights at the end, of plain SVI."""
    pyro.clear_param_store()
    model, guide = pair()
    gradients = []
    owned = [p for program in (model, guide) if isinstance(program, nn.Module) for p in program.parameters()]
    order = {id(p): number for number, p in enumerate(owned)}  # of plain functions at most three scalars remain

    class Watching(pyro.optim.PyroOptim):
        def __call__(self, params, *args, **kwargs):
            found = sorted(params, key=lambda p: (order.get(id(p), -1), p.detach().sum().item()))
            gradients.append([p.grad.clone() for p in found if p.grad is not None])
            super().__call__(params, *args, **kwargs)

    svi = SVI(model, guide, Watching(torch.optim.Adam, {"lr": 1e-2}), loss)
    torch.manual_seed(seed)
    losses = [torch.as_tensor(svi.step(data)).sum().item() for _ in range(count)]  # some give two losses
    return losses, gradients, torch.randn(())


def assert_same(ours, theirs, rel=1e-5):
    assert ours[0] == pytest.approx(theirs[0], rel=rel)
    for one, other in zip(ours[1], theirs[1], strict=True):
        for a, b in zip(one, other, strict=True):
            assert (a - b).abs().max() <= rel * b.abs().max().clamp(min=1e-3)
    assert torch.equal(ours[2], theirs[2])  # as many random numbers were used up


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", CASES)
def test_a_captured_step_is_the_step(name):
    pair, data, make = CASES[name]
    loss = replayed(make())
    ours, theirs = steps(pair, data, loss), steps(pair, data, make())
    assert (loss.captures, loss.reason) == (1, None)
    assert_same(ours, theirs)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", CASES)
def test_a_compiled_step_is_the_step(name):
    pair, data, make = CASES[name]
    loss = Compiled(make(), compile_after=2)
    ours, theirs = steps(pair, data, loss), steps(pair, data, make())
    (entry,) = loss._graphs.values()
    assert entry.capture.compiled is not entry.capture.live_noise
    assert_same(ours, theirs)


def test_inductor_gives_the_same_numbers_and_fresh_noise():
    loss = Compiled(Objective(elbo), compile_after=2)
    ours, theirs = steps(small_pair, images, loss), steps(small_pair, images, Objective(elbo))
    assert [entry.capture.compiled for entry in loss._graphs.values()] == [True]
    assert_same(ours, theirs)
    other = steps(small_pair, images, Compiled(Objective(elbo), compile_after=None), seed=2)
    assert not any(a == b for a, b in zip(ours[0], other[0], strict=True))


@pytest.mark.parametrize("slower", ["compiled", "replayed"])
@pytest.mark.parametrize("chooses", [True, False])
def test_a_compiled_graph_that_is_slower_is_taken_back_where_the_choice_is_ours(monkeypatch, slower, chooses):
    import torch._inductor.compile_fx

    def slowly(function):
        def run(*tensors):
            time.sleep(0.02)
            return function(*tensors)

        return run

    plain = Capture._shortly
    if slower == "compiled":
        monkeypatch.setattr(torch._inductor.compile_fx, "compile_fx", lambda graph, _: slowly(graph.forward))
    else:
        monkeypatch.setattr(torch._inductor.compile_fx, "compile_fx", lambda graph, _: graph.forward)
        monkeypatch.setattr(Capture, "_shortly", lambda self, *given: slowly(plain(self, *given)))
    monkeypatch.setattr(captured, "_TRIED", 5)
    loss = Compiled(Objective(elbo), compile_after=3)
    loss.chooses = chooses
    ours, theirs = (steps(small_pair, images, each, count=15) for each in (loss, Objective(elbo)))
    (entry,) = loss._graphs.values()
    assert entry.capture.compiled is (slower == "replayed" or not chooses) and entry.compiled_at == 3
    assert (entry.seconds < 0.02) is (slower == "replayed" or chooses)
    assert_same(ours, theirs)


@pytest.mark.parametrize("slower, optional", [(True, True), (True, False), (False, True)])
def test_a_graph_that_is_slower_than_the_programs_is_given_up_where_the_choice_is_ours(monkeypatch, slower, optional):
    plain = Capture._shortly

    def slowly(self, *given):
        function = plain(self, *given)
        return lambda *tensors: (time.sleep(0.1), function(*tensors))[1]

    if slower:
        monkeypatch.setattr(Capture, "_shortly", slowly)
    monkeypatch.setattr(captured, "_KNOWN", 10)
    loss = Compiled(Objective(elbo), compile_after=None, quiet=True)
    loss.optional = optional
    ours, theirs = (steps(small_pair, images, each, count=15) for each in (loss, Objective(elbo)))
    assert len(loss._graphs) == (0 if slower and optional else 1)
    said = loss.reason or ""
    assert ("a replay is slower here than the programs (1e+02 ms and " in said) is (slower and optional)
    assert_same(ours, theirs)


def test_a_compiled_graph_on_trial_is_not_given_up_for_the_programs(monkeypatch):
    """The compiler's is slow, and the graph that it was made of is not: that one is taken back, and stays."""
    import torch._inductor.compile_fx

    def compile_fx(graph, _):
        return lambda *tensors: (time.sleep(0.1), graph.forward(*tensors))[1]

    monkeypatch.setattr(torch._inductor.compile_fx, "compile_fx", compile_fx)
    monkeypatch.setattr(captured, "_TRIED", 5)
    monkeypatch.setattr(captured, "_KNOWN", 10)
    loss = Compiled(Objective(elbo), compile_after=8, quiet=True)  # on trial at the tenth replay, which is compared
    loss.chooses = loss.optional = True
    steps(small_pair, images, loss, count=20)
    (entry,) = loss._graphs.values()
    assert not entry.capture.compiled and entry.seconds < 0.1 and entry.compiled_at == 8


@pytest.mark.parametrize("slow", [True, False])
def test_a_graph_that_was_taken_back_stays_so_when_the_fit_is_gone_on_with(monkeypatch, tmp_path, slow):
    import torch._inductor.compile_fx

    compiled = []

    def compile_fx(graph, _):
        def run(*tensors):
            time.sleep(0.02 * slow)
            return graph.forward(*tensors)

        compiled.append(run)
        return run

    class Stop(Exception):
        pass

    def begun(stop):
        def callback(record):
            if record["epoch"] == stop:
                raise Stop

        with contextlib.suppress(Stop):
            fit(*small_pair(), binary(48), epochs=12, batch_size=12, seed=0, progress=False, callback=callback,
                checkpoint=Sparing(tmp_path / "a.safetensors"))  # fmt: skip
        return len(compiled)

    monkeypatch.setattr(torch._inductor.compile_fx, "compile_fx", compile_fx)
    monkeypatch.setattr(Checkpoint, "due", lambda self: True)
    monkeypatch.setattr(captured, "_TRIED", 5)
    monkeypatch.setattr(preparation, "_CAPTURE_PAYS", 1)
    monkeypatch.setattr(loop, "_COMPILER_SECONDS", 0.0)
    monkeypatch.setattr(loop, "TIMED", 4)
    monkeypatch.setattr(epochs, "TIMED", 4)
    if not slow:  # a compiled graph is slower by a call, but for this
        plain = Capture._shortly

        def slowly(function):
            return lambda *tensors: (time.sleep(0.01), function(*tensors))[1]

        monkeypatch.setattr(Capture, "_shortly", lambda self, *given: slowly(plain(self, *given)))
    assert begun(8) == 1
    assert begun(99) == (1 if slow else 2)


def test_two_hundred_steps_give_the_same_curve():
    options = {"epochs": 50, "batch_size": 12, "learning_rate": 1e-2, "seed": 3}
    ours, theirs = small_pair(), small_pair()
    loss = replayed(Trace_ELBO())
    compiled = fit(*ours, binary(44), loss=loss, **options)
    plain = fit(*theirs, binary(44), compile=False, **options)
    assert compiled["loss"] == pytest.approx(plain["loss"], rel=1e-4)
    assert loss.captures == 2  # one for the last batch of 8, and no more in 50 epochs


# Changes between steps


def manual(model, guide, data, loss):
    """One seeded step; the loss and the gradients, which are cleared."""
    torch.manual_seed(0)
    value = loss.loss_and_grads(model, guide, data)
    parameters = [*model.parameters(), *guide.parameters()]
    gradients = [None if p.grad is None else p.grad.clone() for p in parameters]
    for p in parameters:
        p.grad = None
    return value, gradients


def assert_agree(model, guide, data, loss, plain):
    ours, theirs = manual(model, guide, data, loss), manual(model, guide, data, plain)
    assert ours[0] == pytest.approx(theirs[0], rel=1e-5)
    for a, b in zip(ours[1], theirs[1], strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.allclose(a, b, rtol=1e-4, atol=1e-5)
    return ours[0]


def smaller_batch(model, guide, data, losses):
    return data[:5]


def freeze(model, guide, data, losses):
    guide.posterior.head.weight.requires_grad_(False)


def more_beta(model, guide, data, losses):
    for loss in losses:
        loss.beta = 0.2


def double(model, guide, data, losses):
    model.double(), guide.double()
    return data.double()


def new_weights(model, guide, data, losses):
    guide.posterior.head.weight = nn.Parameter(torch.ones_like(guide.posterior.head.weight))


def in_place(model, guide, data, losses):
    with torch.no_grad():
        guide.posterior.head.weight.fill_(0.3)


def new_layer(model, guide, data, losses):
    guide.posterior.encoder.layers[1] = nn.Tanh()


def evaluation(model, guide, data, losses):
    model.eval(), guide.eval()


def more_samples(model, guide, data, losses):
    for loss in losses:
        loss = getattr(loss, "inner", loss)
        loss.num_samples = 3


def slope(model, guide, data, losses):
    model.likelihood.decoder.layers[1].negative_slope = 0.5


def leaky_pair():
    model, guide = dropout_pair()
    model.likelihood.decoder.layers[1] = nn.LeakyReLU(0.1)
    return model, guide


CHANGES = (
    smaller_batch, freeze, more_beta, double, new_weights, in_place, new_layer, evaluation, more_samples, slope,
)  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*was not registered in the param store because requires_grad")
@pytest.mark.parametrize("change", CHANGES, ids=lambda c: c.__name__)
def test_what_changes_between_steps_counts_from_the_next_step(change):
    (model, guide), data, plain = leaky_pair(), images, Objective()
    loss = replayed(Objective())
    before = [assert_agree(model, guide, data, loss, plain) for _ in range(4)]
    assert loss.captures == 1 and loss.reason is None
    changed = change(model, guide, data, [loss, plain])
    data = data if changed is None else changed
    after = [assert_agree(model, guide, data, loss, plain) for _ in range(4)]
    assert loss.reason is None and (loss.captures == 1) == (change is in_place)
    if change not in (freeze, more_beta):  # beta is in the gradient alone: what is reported stays
        assert after[0] != pytest.approx(before[0], rel=1e-6)


def test_beta_may_rise_in_every_step_without_another_capture():
    (model, guide), plain, loss = small_pair(), Objective(beta=0.1), replayed(Objective(beta=0.1))
    for step in range(12):
        plain.beta = loss.beta = 0.1 * (step + 1)
        assert_agree(model, guide, images, loss, plain)
    assert loss.captures == 1


@pytest.mark.parametrize("make", [Trace_ELBO, TraceMeanField_ELBO, Objective, TraceGraph_ELBO])
def test_kl_warmup_is_the_same_compiled(make):
    options = {"epochs": 6, "batch_size": 12, "kl_warmup": 4, "learning_rate": 1e-2, "seed": 3}
    ours, theirs = small_pair(), small_pair()
    compiled = fit(*ours, binary(36), loss=replayed(make()), **options)
    plain = fit(*theirs, binary(36), loss=make(), compile=False, **options)
    assert compiled["loss"] == pytest.approx(plain["loss"], rel=1e-5)
    assert compiled["beta"] == plain["beta"]


def test_two_pairs_and_a_deepcopy_learn_for_themselves():
    loss, plain = replayed(Trace_ELBO()), Trace_ELBO()
    one, other = small_pair(0), small_pair(1)
    for _ in range(3):
        assert_agree(*one, images, loss, plain)
    for _ in range(3):
        assert_agree(*other, images, loss, plain)
    assert assert_agree(*one, images, loss, plain) != assert_agree(*other, images, loss, plain)
    assert loss.captures == 2
    copied, copied_loss = copy.deepcopy(one), copy.deepcopy(loss)
    with torch.no_grad():
        copied[1].posterior.head.weight.add_(1.0)
    for _ in range(3):
        assert_agree(*copied, images, copied_loss, plain)
        assert_agree(*copied, images, loss, plain)
    assert copied_loss.captures == 1 and loss.captures == 3


def test_gradients_are_added_up_and_do_not_share_memory():
    model, guide = small_pair()
    loss = replayed(Trace_ELBO())
    for _ in range(3):
        manual(model, guide, images, loss)
    parameters = [*model.parameters(), *guide.parameters()]
    for _ in range(2):
        torch.manual_seed(0)
        loss.loss_and_grads(model, guide, images)
        twice = [p.grad.clone() for p in parameters]
    once = manual(model, guide, images, loss)[1] if [setattr(p, "grad", None) for p in parameters] else None
    assert all(torch.allclose(a, 2 * b, rtol=1e-4, atol=1e-6) for a, b in zip(twice, once, strict=True))
    torch.manual_seed(0)
    loss.loss_and_grads(model, guide, images)
    assert len({p.grad.untyped_storage().data_ptr() for p in parameters}) == len(parameters)


def test_gradients_that_share_a_tensor_or_are_expanded_become_tensors_of_their_own():
    pair = nn.ParameterDict({"a": nn.Parameter(torch.ones(3)), "b": nn.Parameter(torch.ones(3))})

    def model(x):
        pyro.module("pair", pair)
        pyro.factor("sum", (pair["a"] + pair["b"]).sum() * x.sum())

    def guide(x):
        pass

    loss = replayed(Trace_ELBO())
    for _ in range(3):
        for p in pair.values():
            p.grad = None
        loss.loss_and_grads(model, guide, torch.ones(2))
    assert loss.reason is None
    pair["a"].grad[0] = 7.0
    assert pair["a"].grad.tolist() == [7.0, -2.0, -2.0] and pair["b"].grad.tolist() == [-2.0] * 3


# Where it cannot


def branching(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(pyro.param("a", torch.zeros(())), 1.0))
        pyro.sample("x", dist.Normal(z if x.sum() > 0 else -z, 1.0), obs=x)


def reading(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(pyro.param("a", torch.zeros(())), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0 + x.abs().max().item()), obs=x)


count = [0]


def counting(x):
    count[0] += 1
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(pyro.param("a", torch.zeros(())) + count[0], 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


class Annealed(nn.Module):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(pyro.param("a", torch.zeros(())) + self.calls, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def plain_guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x * pyro.param("slope", torch.tensor(0.1)), 1.0))


REFUSED = {
    "branch": (branching, "a number is read out of a tensor at test_compiled.py"),
    "item": (reading, "a number is read out of a tensor at test_compiled.py"),
    "counter": (counting, r"count\[0\] changes while the programs run"),
    "attribute": (Annealed(), "Annealed.calls changes while the programs run"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_captured_runs_as_it_did_and_says_why_once(name):
    model, reason = REFUSED[name]
    with pytest.warns(UserWarning, match=f"the steps are not compiled, since {reason}") as said:
        loss = replayed(Trace_ELBO())
        count[0] = 0
        for _ in range(4):
            torch.manual_seed(0)
            loss.loss_and_grads(model, plain_guide, numbers)
    assert re.match(reason, loss.reason)
    assert len([w for w in said if "not compiled" in str(w.message)]) == 1
    start = count[0] = getattr(model, "calls", count[0])
    torch.manual_seed(0)
    ours = loss.loss_and_grads(model, plain_guide, numbers)
    count[0] = start
    model.calls = start
    torch.manual_seed(0)
    assert ours == Trace_ELBO().loss_and_grads(model, plain_guide, numbers)


def test_a_failed_capture_leaves_noise_and_gradients_as_an_ordinary_step_does():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours = steps(lambda: (branching, plain_guide), numbers, replayed(Trace_ELBO()), 4)
    assert_same(ours, steps(lambda: (branching, plain_guide), numbers, Trace_ELBO(), 4), rel=0)


def test_without_a_compiler_the_graph_is_replayed(monkeypatch):
    def broken(*_):
        raise RuntimeError("No working C++ compiler found")

    monkeypatch.setattr("pyro_vae.inference.capture.Capture.compile", broken)
    with pytest.warns(UserWarning, match="replayed uncompiled, since Inductor failed .*No working C"):
        ours = steps(small_pair, images, Compiled(Trace_ELBO(), compile_after=1))
    assert_same(ours, steps(small_pair, images, Trace_ELBO()))


def test_handlers_around_the_loss_are_obeyed():
    (model, guide), loss = small_pair(), replayed(Trace_ELBO())
    plain = [manual(model, guide, images, loss)[0] for _ in range(3)][-1]
    with pyro.poutine.scale(scale=2.0):
        assert manual(model, guide, images, loss)[0] == pytest.approx(2 * plain, rel=1e-5)
    assert loss.reason is None or "handlers" in loss.reason or "first" in loss.reason


def test_only_a_pyro_elbo_can_be_compiled():
    with pytest.raises(ValueError, match="to compile, wanted a Pyro ELBO such as Trace_ELBO"):
        Compiled(elbo)
    with pytest.raises(ValueError, match="compile_after must be None or at least 0, got -1"):
        Compiled(Trace_ELBO(), compile_after=-1)
    with pytest.raises(ValueError, match="got compile='yes', wanted True, False or \"auto\""):
        fit(*small_pair(), images, compile="yes")


def test_fit_captures_where_that_pays_and_keeps_its_promises():
    pairs = small_pair(), small_pair()
    options = {"epochs": 250, "batch_size": 12, "seed": 0, "learning_rate": 1e-3}
    histories = [
        fit(*pair, binary(24), compile=flag, **options) for pair, flag in zip(pairs, ("auto", False), strict=True)
    ]
    assert histories[0]["loss"] == pytest.approx(histories[1]["loss"], rel=1e-3)
    assert histories[0]["bound"] == pytest.approx(histories[1]["bound"], rel=1e-3)


@pytest.mark.parametrize("seconds, wanted", [(0.0, True), (1e9, False)])
def test_auto_calls_the_compiler_where_the_time_ahead_pays_for_it(seconds, wanted, monkeypatch):
    called = []
    monkeypatch.setattr("pyro_vae.inference.loop._COMPILER_SECONDS", seconds)
    monkeypatch.setattr(Compiled, "_compile", lambda self, entry, step: called.append(entry.replays))
    fit(*small_pair(), binary(12), epochs=500, batch_size=12)
    assert bool(called) == wanted and (not called or called[0] >= 40)
    if not wanted:
        return
    fit(*small_pair(), binary(12), epochs=499, batch_size=12)
    fit(*small_pair(), binary(12), epochs=500, batch_size=12, compile=False)
    assert len([n for n in called if n == called[0]]) <= 1


def test_a_loss_that_is_not_finite_is_named_in_a_compiled_fit_too():
    model, guide = normal_pair()
    data = binary(24)

    def broken(record):
        with torch.no_grad():
            guide.posterior.head.weight.fill_(float("nan"))

    with pytest.raises(ValueError, match="the loss became nan at step 6. Lower learning_rate"):
        fit(model, guide, data, loss=replayed(Trace_ELBO()), batch_size=4, epochs=3, callback=broken)
