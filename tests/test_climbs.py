"""The climbs of `gaps`, captured: the same steps, nothing frozen that should live, and data that have ended."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pyro_vae.inference.replays import Replayed
from pyro_vae.judging import climbs
from pyro_vae.judging._gaps import gaps
from pyro_vae.judging.anomalies import anomaly_scores
from pyro_vae.judging.climbs import optimise
from pyro_vae.judging.local import family_form, local_form
from pyro_vae.parts.networks import MLP
from pyro_vae.parts.posteriors import Coupling, FullNormal
from pyro_vae.programs.pair import Guide
from pyro_vae.traces import draw
from tests.pairs import binary, linear_pair, small_pair


@pytest.fixture(autouse=True)
def made(monkeypatch):
    """What was replayed, in short climbs and of few data too; Inductor is not called, as seconds ahead are few."""
    monkeypatch.setattr(climbs, "_ENOUGH", 1)
    monkeypatch.setattr(climbs, "_FEW", 0)
    found: list[Replayed] = []
    start = Replayed.__init__

    def recorded(self, *args, **kwargs):
        start(self, *args, **kwargs)
        found.append(self)

    monkeypatch.setattr(Replayed, "__init__", recorded)
    return found


def bernoulli():
    model, guide = small_pair()
    return model.double(), guide.double(), (binary(7).double(),)


def flow():
    model, _ = small_pair()
    guide = Guide(Coupling(MLP((1, 4, 4), [16], None), 3, transforms=2, hidden_features=(8,), context=2))
    return model.double(), guide.double(), (binary(5).double(),)


def functions():
    """A plate at -2, and one in it."""
    weight = torch.randn(2, 16, generator=torch.Generator().manual_seed(3)).double()

    def model(x):
        with pyro.plate("data", len(x), dim=-2):
            z = pyro.sample("latent", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
            with pyro.plate("pixels", 16, dim=-1):
                pyro.sample("obs", dist.Bernoulli(logits=(z @ weight).squeeze(-2)), obs=x.flatten(1))

    def guide(x):
        with pyro.plate("data", len(x), dim=-2):
            pyro.sample("latent", dist.Normal(x.flatten(1)[:, None, :2], 0.9).to_event(1))

    return model, guide, (binary(6).double(),)


def dependent():
    """A later site that depends on the draw of an earlier one, and is positive; noise with parameters in the graph."""

    def model(x, y):
        with pyro.plate("rows", len(x)):
            a = pyro.sample("a", dist.Normal(torch.zeros(()).double(), 1.0))
            rate = pyro.sample("rate", dist.Gamma(torch.full((), 2.0).double(), 1.0))
            pyro.sample("seen", dist.Normal(a, 1.0), obs=x)
            pyro.sample("time", dist.Exponential(rate), obs=y)

    def guide(x, y):
        with pyro.plate("rows", len(x)):
            a = pyro.sample("a", dist.Normal(0.3 * x, 1.0))
            pyro.sample("rate", dist.Gamma((0.3 * a).exp(), 2.0 + y))

    return model, guide, (torch.tensor([-1.0, 0.5, 2.0]).double(), torch.tensor([0.2, 1.0, 3.0]).double())


class TwoLayers(nn.Module):
    """A later site by a head that sees the draw of an earlier one: the guide's networks stay."""

    def __init__(self):
        super().__init__()
        self.first = FullNormal(MLP((1, 4, 4), [8], None), 2)
        self.second = FullNormal(nn.Linear(2, 4), 2)
        self.decoder = nn.Linear(2, 16)

    def model(self, x):
        with pyro.plate("data", len(x)):
            top = pyro.sample("z2", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
            z = pyro.sample("z1", dist.Normal(top, 0.8).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=x.flatten(1))

    def guide(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z1", self.first(x))
            pyro.sample("z2", self.second(z))


def layers():
    torch.manual_seed(0)
    pair = TwoLayers().double()
    return pair.model, pair.guide, (binary(5).double(),)


PAIRS = {f.__name__: f for f in (bernoulli, flow, functions, dependent, layers)}


def climb(model, form, args, **options):
    torch.manual_seed(1)
    return optimise(model, form, args, **{"window": 20, "num_steps": 160, "learning_rate": 0.1} | options)


def assert_same(found, wanted, tolerance=1e-8):
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", PAIRS)
def test_captured_climbs_are_the_programs_own(name, made):
    model, guide, args = PAIRS[name]()
    form = local_form(guide, args)
    plain = climb(model, form, args, compile=False)
    after = torch.rand(())
    assert not made[-1].captures and plain.steps.min() >= 80
    captured = climb(model, form, args)
    assert made[-1].captures >= 1 and made[-1].reason is None
    assert_same(captured, plain)
    assert torch.rand(()) == after  # as much noise as well


def test_gaps_and_regret_are_the_same_captured(made):
    model, guide, (x,) = bernoulli()
    options = {"num_samples": 300, "window": 20, "num_steps": 200, "progress": False}
    plain = gaps(model, guide, x, families={"full": FullNormal}, compile=False, **options)
    assert not any(r.captures for r in made)
    captured = gaps(model, guide, x, families={"full": FullNormal}, **options)
    assert sum(r.captures > 0 for r in made) == 2
    for name, row in plain.families.items():
        found = captured.families[name]
        torch.testing.assert_close(found.optimum.pointwise, row.optimum.pointwise, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(found.remaining, row.remaining, rtol=1e-6, atol=1e-8)
        assert torch.equal(found.steps, row.steps) and torch.equal(found.stopped, row.stopped)
    made.clear()
    scores = [
        anomaly_scores(model, guide, x, score="regret", num_samples=50, num_steps=160, progress=False, compile=compile)
        for compile in (False, "auto")
    ]
    assert [bool(r.captures) for r in made] == [False, True]
    torch.testing.assert_close(scores[1], scores[0], rtol=1e-8, atol=1e-8)


def test_a_family_without_an_encoder_is_captured(made):
    pair, x = linear_pair()
    posterior = FullNormal(MLP((6,), [4], None), 3).double()
    loc = torch.zeros(len(x), 3).double()
    form = family_form(posterior, pair.model, (x,), loc, loc + 1)
    plain, captured = (climb(pair.model, form, (x,), compile=compile) for compile in (False, "auto"))
    assert made[-1].captures >= 1, made[-1].reason
    assert_same(captured, plain)


class Switched(nn.Module):
    """A model with a number in Python, a guide with another, and a weight."""

    def __init__(self):
        super().__init__()
        self.factor, self.pull, self.weight = 1.0, 0.3, nn.Parameter(torch.ones(2).double())

    def model(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.factor * self.weight * z, 0.5).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("z", dist.Normal(self.pull * x, 1.0).to_event(1))
            return a


@pytest.mark.parametrize("what", ["a number of the model", "a weight", "the data"])
def test_what_changes_between_the_steps_is_noticed(what, made, monkeypatch):
    monkeypatch.setattr(climbs, "_FEW", 2**17)  # one number of data, so that a second capture is for one reason
    found = []
    for compile in (False, "auto"):
        pair, x = Switched(), torch.tensor([[1.0, -1.0], [0.5, 2.0], [3.0, 0.0]]).double()
        windows = []

        def change(_, pair=pair, x=x, windows=windows):
            windows.append(1)
            if len(windows) == 3 and what == "a number of the model":
                pair.factor = 2.0
            elif len(windows) == 3 and what == "a weight":
                pair.weight.data.mul_(2.0)
            elif len(windows) == 3:
                x.add_(1.0)

        form = local_form(pair.guide, (x,))
        untouched = climb(pair.model, form, (x.clone(),), compile=False)
        found.append(climb(pair.model, form, (x,), compile=compile, progress=change))
        assert not torch.allclose(found[-1].path, untouched.path, atol=1e-3)
    assert made[-1].captures == (2 if what == "a number of the model" else 1)
    assert_same(*found)


def test_a_number_of_the_guide_is_noticed_where_its_programs_run(made, monkeypatch):
    monkeypatch.setattr(climbs, "_FEW", 2**17)
    model, guide, args = dependent()
    pull = {"a": 0.3}

    def other(x, y):
        with pyro.plate("rows", len(x)):
            a = pyro.sample("a", dist.Normal(0.3 * x, 1.0))
            pyro.sample("rate", dist.Gamma((pull["a"] * a).exp(), 2.0 + y))

    found = []
    for compile in (False, "auto"):
        pull["a"] = 0.3
        form, windows = local_form(other, args), []

        def change(_, windows=windows):
            windows.append(1)
            pull["a"] = 0.3 if len(windows) < 3 else 0.9

        found.append(climb(model, form, args, compile=compile, progress=change))
    assert made[-1].captures == 2
    assert_same(found[1], found[0])
    assert not torch.allclose(found[0].rows, climb(model, local_form(guide, args), args, compile=False).rows, atol=1e-3)


class Doubtful(nn.Module):
    """A model that branches on the values of a sample."""

    def model(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            loc = z if z.max() < 1e9 else z / 2
            pyro.sample("x", dist.Normal(loc, 0.5).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.3 * x, 1.0).to_event(1))


def test_what_cannot_be_captured_climbs_as_it_is(made, recwarn):
    pair, x = Doubtful(), torch.tensor([[1.0, -1.0], [0.5, 2.0]])
    form = local_form(pair.guide, (x,))
    plain, fallen = (climb(pair.model, form, (x,), compile=compile) for compile in (False, "auto"))
    assert "read out of a tensor" in made[-1].reason and not made[-1].captures
    assert all(torch.equal(a, b) for a, b in zip(plain, fallen, strict=True))
    assert not [w for w in recwarn if "compiled" in str(w.message)]


def test_samples_that_are_drawn_one_by_one_are_not_captured(made):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.reshape(len(x), 2), 0.5).to_event(1), obs=x)

    pair, x = Doubtful(), torch.tensor([[1.0, -1.0], [0.5, 2.0]])
    form = local_form(pair.guide, (x,))
    with pytest.warns(UserWarning, match="one by one"):
        plain, fallen = (climb(model, form, (x,), compile=c, num_steps=100) for c in (False, "auto"))
    assert not made[-1].captures and "shape" in made[-1].reason
    assert all(torch.equal(a, b) for a, b in zip(plain, fallen, strict=True))


def test_what_a_program_could_change_in_its_arguments_is_not_captured(made):
    """An array is no tensor, and nobody watches it."""
    pair = Switched()
    x, factor = torch.tensor([[1.0, -1.0], [0.5, 2.0]]).double(), np.ones(1)

    def model(x, factor):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(float(factor[0]) * z, 0.5).to_event(1), obs=x)

    def guide(x, factor):
        return pair.guide(x)

    found = []
    for compile in (False, "auto"):
        factor[:], windows = 1.0, []

        def change(_, windows=windows):
            windows.append(1)
            factor[:] = 1.0 if len(windows) < 3 else 2.0

        form = local_form(guide, (x, factor))
        found.append(climb(model, form, (x, factor), compile=compile, progress=change))
    assert not made[-1].captures
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_batches_that_are_trees_are_captured_with_what_is_no_tensor(made):
    x = torch.tensor([[1.0, -1.0], [0.5, 2.0]]).double()
    batch = ({"x": x, "name": "two", "weights": [torch.ones(2).double(), 3]},)

    def model(b):
        with pyro.plate("data", len(b["x"])):
            z = pyro.sample("z", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
            scale = b["weights"][0].sum() / b["weights"][1]
            pyro.sample("x", dist.Normal(scale * z, 0.5).to_event(1), obs=b["x"])

    def guide(b):
        with pyro.plate("data", len(b["x"])):
            pyro.sample("z", dist.Normal(0.3 * b["x"], 1.0).to_event(1))

    form = local_form(guide, batch)
    plain, captured = (climb(model, form, batch, compile=compile) for compile in (False, "auto"))
    assert made[-1].captures >= 1
    assert_same(captured, plain)


@pytest.mark.parametrize("few", [0, 2**17])
@pytest.mark.parametrize("compile", [False, "auto"])
def test_data_that_have_ended_stay_as_they_are_until_half_have(compile, few, monkeypatch):
    """One of three starts at its optimum and ends first; nothing that is computed on with it changes its result."""
    pair, x = linear_pair()
    x = x[:3]
    far = torch.tensor([0.0, 3.0, 3.0]).double()

    def guide(x):
        posterior = pair.bed.posterior(x)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.MultivariateNormal(posterior.mean + far[:, None], scale_tril=posterior.scale_tril))

    monkeypatch.setattr(climbs, "_worth_dropping", lambda ended, held, *_: few == 0 and 2 * ended >= held)
    sizes = []
    run = Replayed.__call__

    def counted(self, theta, *rest):
        sizes.append(len(theta))
        return run(self, theta, *rest)

    monkeypatch.setattr(Replayed, "__call__", counted)
    form = local_form(guide, (x,))
    found = climb(pair.model, form, (x,), compile=compile, num_steps=1000, window=25, learning_rate=0.03)
    assert found.stopped.all() and found.steps[0] < found.steps[1:].min()
    assert sizes[int(found.steps[0])] == 3  # it stays, as one of three is no half
    assert found.steps[1] != found.steps[2]
    assert sizes[int(found.steps[1:].min()) :].count(1 if few == 0 else 3) > 0 and min(sizes) == (1 if few == 0 else 3)
    bound = draw(pair.model, form.guide(found.rows), (x,), {}, 200).log_weight.mean(0)
    assert (bound - pair.bed.log_evidence(x)).abs().max() < 0.01
