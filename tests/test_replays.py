"""Functions that are captured once and replayed: the same numbers, nothing frozen that should live."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

from pyro_vae.inference import replays
from pyro_vae.inference.capture import Capture
from pyro_vae.inference.captured import Watched
from pyro_vae.inference.replays import Replayed
from pyro_vae.judging.annealing import ais, bdmc
from pyro_vae.judging.estimates import elbo_terms, log_likelihood
from pyro_vae.parts.networks import MLP
from pyro_vae.parts.posteriors import NSF
from pyro_vae.programs.pair import Guide
from tests.pairs import binary, linear_pair, small_pair


@pytest.fixture(autouse=True)
def capture_early(monkeypatch):
    """Small evaluations are captured too; Inductor is not called, as seconds ahead are few."""
    monkeypatch.setattr(replays, "_CAPTURE_PAYS", 1)
    made: list[Replayed] = []
    start = Replayed.__init__

    def recorded(self, *args, **kwargs):
        start(self, *args, **kwargs)
        made.append(self)

    monkeypatch.setattr(Replayed, "__init__", recorded)
    return made


def flow_pair():
    model, _ = small_pair()
    return model, Guide(NSF(MLP((1, 4, 4), [16], None), 3, transforms=1, hidden_features=(8,)))


def functions():
    weight = torch.randn(2, 16, generator=torch.Generator().manual_seed(3))

    def model(x):
        with pyro.plate("data", len(x), dim=-2):
            z = pyro.sample("latent", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            with pyro.plate("pixels", 16, dim=-1):
                pyro.sample("obs", dist.Bernoulli(logits=(z @ weight).squeeze(-2)), obs=x.flatten(1))

    def guide(x):
        with pyro.plate("data", len(x), dim=-2):
            pyro.sample("latent", dist.Normal(x.flatten(1)[:, None, :2], 0.9).to_event(1))

    return model, guide


def two_layers():
    torch.manual_seed(0)
    up, down = nn.Linear(3, 16), nn.Linear(16, 6)

    def model(x):
        with pyro.plate("data", len(x)):
            top = pyro.sample("z2", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            z = pyro.sample("z1", dist.Normal(top.sum(-1, keepdim=True), torch.full((3,), 0.8)).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=up(z)).to_event(1), obs=x.flatten(1))

    def guide(x):
        loc, log_scale = down(x.flatten(1)).chunk(2, -1)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z1", dist.Normal(loc, log_scale.exp()).to_event(1))
            pyro.sample("z2", dist.Normal(z[..., :2] / 2, 0.7).to_event(1))

    return model, guide


PAIRS = {"plain": small_pair, "flow": flow_pair, "functions": functions, "two layers": two_layers}


@pytest.fixture
def chunks(monkeypatch):
    """Chunks so small that there are dozens of them."""
    monkeypatch.setattr("pyro_vae.judging.sweeps._CHUNK", 512 * 40)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", PAIRS)
def test_log_likelihood_is_the_same_captured(name, dtype, chunks, capture_early):
    torch.set_default_dtype(dtype)
    try:
        model, guide = PAIRS[name]()
        x = binary(7).to(dtype)
        plain = log_likelihood(model, guide, x, num_samples=100, compile=False)
        assert all(r.captures == 0 for r in capture_early)
        captured = log_likelihood(model, guide, x, num_samples=100)
    finally:
        torch.set_default_dtype(torch.float32)
    assert sum(r.captures for r in capture_early) >= 1
    assert capture_early[-1].reason is None
    tolerance = 1e-5 if dtype is torch.float32 else 1e-12
    torch.testing.assert_close(captured.pointwise, plain.pointwise, rtol=tolerance, atol=tolerance)
    assert captured.mc_stderr == pytest.approx(plain.mc_stderr, rel=1e-3)


def test_elbo_terms_are_the_same_captured(chunks, capture_early):
    model, guide = small_pair()
    plain = elbo_terms(model, guide, binary(7), num_samples=100, compile=False)
    captured = elbo_terms(model, guide, binary(7), num_samples=100)
    assert sum(r.captures for r in capture_early) >= 1
    assert captured.value == pytest.approx(plain.value, rel=1e-6)
    assert captured.kl == pytest.approx(plain.kl, rel=1e-6)


def test_parameters_that_change_between_calls_count(chunks):
    model, guide = small_pair()
    before = log_likelihood(model, guide, binary(7), num_samples=100).value
    with torch.no_grad():
        next(iter(model.parameters())).mul_(3.0)
    after = log_likelihood(model, guide, binary(7), num_samples=100).value
    assert after != pytest.approx(before, rel=1e-4)
    assert after == pytest.approx(log_likelihood(model, guide, binary(7), num_samples=100, compile=False).value)


class Doubtful(nn.Module):
    """A pair whose guide branches on the values of a sample."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(16, 4)

    def model(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            logits = z.sum(-1, keepdim=True).expand(*z.shape[:-1], 16)
            if logits.max() > 1e9:
                logits = logits / 2
            pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x.flatten(1))

    def guide(self, x):
        loc, log_scale = self.net(x.flatten(1)).chunk(2, -1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


def test_what_cannot_be_captured_runs_as_it_is(chunks, capture_early, recwarn):
    torch.manual_seed(0)
    pair = Doubtful()
    plain = log_likelihood(pair.model, pair.guide, binary(7), num_samples=100, compile=False)
    fallen = log_likelihood(pair.model, pair.guide, binary(7), num_samples=100)
    assert torch.equal(plain.pointwise, fallen.pointwise)
    assert "read out of a tensor" in capture_early[-1].reason
    assert not [w for w in recwarn if "compiled" in str(w.message)]


@pytest.mark.parametrize("pair", [small_pair, two_layers], ids=["plain", "two layers"])
def test_annealed_chains_are_the_same_captured(pair, capture_early):
    model, guide = pair()
    plain = bdmc(model, guide, binary(5), num_data=5, num_steps=20, num_samples=4, compile=False)
    captured = bdmc(model, guide, binary(5), num_data=5, num_steps=20, num_samples=4)
    assert [r.captures for r in capture_early if r.captures] == [1, 1]  # the pilot's moves and the chains'
    torch.testing.assert_close(captured.lower.log_weight, plain.lower.log_weight, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(captured.backward_log_weight, plain.backward_log_weight, rtol=1e-4, atol=1e-4)


def test_annealing_from_the_prior_in_float64_is_the_same_captured(capture_early):
    pair, x = linear_pair()
    plain = ais(pair.model, None, x, start="prior", num_steps=20, num_samples=4, compile=False)
    captured = ais(pair.model, None, x, start="prior", num_steps=20, num_samples=4)
    assert sum(r.captures for r in capture_early) == 2
    torch.testing.assert_close(captured.log_weight, plain.log_weight, rtol=1e-10, atol=1e-10)


def test_inductor_draws_the_same_noise_and_gives_the_same_weights(chunks, capture_early):
    model, guide = small_pair()
    plain = log_likelihood(model, guide, binary(7), num_samples=100, compile=False)
    compiled = log_likelihood(model, guide, binary(7), num_samples=100, compile=True)
    assert capture_early[-1].compiled
    torch.testing.assert_close(compiled.pointwise, plain.pointwise, rtol=1e-5, atol=1e-5)


def test_a_number_that_changes_is_found_out():
    calls = [0]

    def counting(x: Tensor):
        calls[0] += 1
        return [x * calls[0]]

    replayed = Replayed(counting, calls=1000)
    found = [replayed(torch.ones(2))[0][0].item() for _ in range(5)]
    assert found == [1, 2, 3, 4, 5] and replayed.captures == 0
    assert replayed.reason == "calls[0] changes while the programs run"


def test_what_the_watch_would_miss_the_check_finds(monkeypatch):
    monkeypatch.setattr(Watched, "changed", lambda self: None)
    monkeypatch.setattr(Watched, "fresh", lambda self: True)
    calls = [0]

    def counting(x: Tensor):
        calls[0] += 1
        return [x * calls[0]]

    replayed = Replayed(counting, calls=1000)
    with pytest.warns(UserWarning, match="a captured result was not that of the programs"):
        found = [replayed(torch.ones(2))[0][0].item() for _ in range(5)]
    assert found == [1, 2, 3, 4, 5]  # the third was to be a replay: the check ran the function
    assert "outside the graph" in replayed.reason


def test_a_switch_of_the_module_that_is_watched_leads_to_a_new_capture():
    class Scaled(nn.Module):
        factor = 1.0

        def __init__(self):
            super().__init__()
            self.factor = 2.0

        def forward(self, x):
            return x * self.factor

    module = Scaled()
    replayed = Replayed(lambda x: [module(x)], programs=(module,), calls=1000)
    for _ in range(4):
        assert replayed(torch.ones(1))[0].item() == 2.0
    module.factor = 5.0
    for _ in range(4):
        assert replayed(torch.ones(1))[0].item() == 5.0
    assert replayed.captures == 2


def test_results_share_no_memory_with_inputs_or_each_other():
    held = torch.ones(3)

    def function(x: Tensor):
        y = x + 1
        return [x, x.view(3, 1), y, y[None], held, held.view(3, 1)]

    replayed = Replayed(function, calls=1000)
    x = torch.zeros(3)
    for _ in range(4):
        results = replayed(x)
    places = [t.untyped_storage().data_ptr() for t in (x, held, *results)]
    assert replayed.reason is None and len(set(places)) == len(places)
    first = Capture(function, [x])
    assert len({t.untyped_storage().data_ptr() for t in (x, held, *first.results)}) == 8


def test_shapes_have_graphs_of_their_own_and_few_calls_have_none(monkeypatch):
    replayed = Replayed(lambda x: [x.sum() + torch.randn(())], calls=1000)
    for _ in range(3):
        for size in (2, 3):
            replayed(torch.ones(size))
    assert replayed.captures == 2
    monkeypatch.setattr(replays, "_CAPTURE_PAYS", 300)
    few = Replayed(lambda x: [x.sum()], calls=100)
    for _ in range(3):
        few(torch.ones(2))
    assert few.captures == 0 and "calls lie ahead" in few.reason


def test_gradients_inside_are_part_of_the_graph():
    weight = torch.tensor([2.0, 3.0])

    def slope(x: Tensor):
        with torch.enable_grad():
            live = x.detach().requires_grad_()
            (gradient,) = torch.autograd.grad((weight * live.square()).sum(), live)
        return [gradient]

    replayed = Replayed(slope, calls=1000)
    for _ in range(3):
        (gradient,) = replayed(torch.tensor([1.0, -1.0]))
    assert replayed.reason is None and gradient.tolist() == [4.0, -6.0]
    weight.mul_(2.0)
    assert replayed(torch.tensor([1.0, -1.0]))[0].tolist() == [8.0, -12.0]


def test_unknown_settings_are_refused():
    with pytest.raises(ValueError, match='wanted True, False or "auto"'):
        Replayed(lambda x: [x], compile="yes")
    with pytest.raises(ValueError, match='wanted True, False or "auto"'):
        ais(*small_pair(), binary(2), compile="yes")


def test_chunks_cover_all_samples_in_one_size_where_that_is_near():
    from pyro_vae.judging.sweeps import _sizes

    for count in (1, 2, 7, 97, 100, 1000, 4999, 5000):
        for most in (1, 3, 13, 80, 2000):
            sizes = _sizes(count, most)
            assert sum(sizes) == count and max(sizes) <= most and len(set(sizes)) <= 2
    assert set(_sizes(5000, 80)) == {50} and set(_sizes(1000, 80)) == {50}
    assert math.isclose(len(_sizes(4999, 80)), 63)


def test_a_pair_that_does_not_broadcast_runs_as_it_is(chunks, capture_early):
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            logits = z.reshape(len(x), 2).repeat(1, 8)
            pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x.flatten(1))

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.flatten(1)[:, :2], 0.9).to_event(1))

    with pytest.warns(UserWarning, match="one by one"):
        plain = log_likelihood(model, guide, binary(7), num_samples=20, compile=False)
    with pytest.warns(UserWarning, match="one by one"):
        fallen = log_likelihood(model, guide, binary(7), num_samples=20)
    assert torch.equal(plain.pointwise, fallen.pointwise)
    assert not any(r.captures for r in capture_early)
    with pytest.warns(UserWarning, match="one by one"):
        plain_chains = ais(model, guide, binary(3), num_steps=5, num_samples=3, compile=False)
    with pytest.warns(UserWarning, match="one by one"):
        chains = ais(model, guide, binary(3), num_steps=5, num_samples=3)
    assert torch.equal(plain_chains.log_weight, chains.log_weight)
    assert any("does not broadcast" in r.reason for r in capture_early)
