"""What stands still is computed once: the same numbers, and networks that do not run again."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pyro_vae.inference import products, replays
from pyro_vae.inference.capture import Capture
from pyro_vae.inference.graphs import PRODUCTS
from pyro_vae.inference.hardware import DEFAULT, ONEDNN
from pyro_vae.inference.products import Product
from pyro_vae.inference.replays import Replayed
from pyro_vae.judging.annealing import bdmc
from pyro_vae.judging.estimates import log_likelihood
from tests.pairs import binary, small_pair

torch.manual_seed(0)
ENCODERS = {
    "layers": nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)),
    "convolutions": nn.Sequential(nn.Unflatten(1, (1, 6)), nn.Conv1d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 4)),
    "batch norm": nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 4)).eval(),
    "attention": nn.Sequential(
        nn.Unflatten(1, (3, 2)), nn.TransformerEncoderLayer(2, 1, 4, dropout=0.0, batch_first=True), nn.Flatten(),
        nn.Linear(6, 4)),
}  # fmt: skip
up = nn.Linear(2, 6)


def noisy(encoder):
    def function(x):
        loc, log_scale = encoder(x).chunk(2, -1)
        z = loc + log_scale.exp() * torch.randn(5, len(x), 2)
        return [(up(z) * x).sum(-1), z.sum(-1)]

    return function


def products_of(graph):
    return [node for node in graph.nodes if getattr(node.target, "overloadpacket", None) in PRODUCTS]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", sorted(ENCODERS))
def test_a_replay_gives_the_same_numbers_with_one_run_of_the_encoder(name, compiled):
    function, x = noisy(ENCODERS[name].requires_grad_(False)), torch.randn(4, 6)
    with torch.no_grad():
        whole, parted = Capture(function, [x]), Capture(function, [x], fixed=1)
        assert len(products_of(whole.module.graph)) > 1
        assert len(products_of(parted.module.graph)) == 1  # the decoder's
        if compiled:
            parted.compile([x])
        runs = []
        inside = parted._held.function
        parted._held.function = lambda *tensors: runs.append(1) or inside(*tensors)
        for other in (x, x, torch.randn(4, 6)):
            parted.renew()
            for _ in range(3):
                torch.manual_seed(1)
                expected = function(other)
                torch.manual_seed(1)
                found = parted([other])
                for one, two in zip(found, expected, strict=True):
                    torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)
        assert len(runs) == 3  # once for each that it was told of


def test_what_changes_without_a_word_is_what_stood_still():
    # The meaning of `fixed`, and why it is for callers who know that nobody changes anything in between.
    function, x = noisy(ENCODERS["layers"]), torch.randn(4, 6)
    with torch.no_grad():
        capture = Capture(function, [x], fixed=1)
        torch.manual_seed(1)
        first = capture([x])[1]
        x.add_(1)
        torch.manual_seed(1)
        assert torch.equal(capture([x])[1], first)
        capture.renew()
        torch.manual_seed(1)
        assert not torch.equal(capture([x])[1], first)


def test_an_argument_that_moves_is_read_at_each_replay():
    first, second = nn.Linear(6, 6), nn.Linear(3, 6)

    def function(x, u):
        return [torch.tanh(first(x)) * second(u) + torch.randn(4, 6)]

    x, u = torch.randn(4, 6), torch.randn(4, 3)
    with torch.no_grad():
        capture = Capture(function, [x, u], fixed=1)
        assert len(products_of(capture.module.graph)) == 1
        for other in (u, torch.randn(4, 3)):
            torch.manual_seed(2)
            expected = function(x, other)[0]
            torch.manual_seed(2)
            torch.testing.assert_close(capture([x, other])[0], expected)


class Averaged(nn.Module):
    """Writes what it has seen into a tensor."""

    def __init__(self):
        super().__init__()
        self.layer, self.mean = nn.Linear(6, 2), torch.zeros(2)

    def forward(self, x):
        found = self.layer(x)
        self.mean.lerp_(found.mean(0), 0.5)
        return found + self.mean + torch.randn(4, 2)


class InPlace(nn.Module):
    """Writes noise into what products gave, through views of several kinds."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.layer, self.cell = kind, nn.Linear(6, 6, bias=kind == "biased"), nn.GRUCell(6, 6)

    def forward(self, x):
        if self.kind == "biased":
            return self.layer(x).add_(torch.randn(4, 6)).exp()
        if self.kind == "without bias":
            found = self.layer(x.view(2, 2, 6))
            found += torch.randn(2, 2, 6)
            return found.exp()
        if self.kind == "attention":
            q = self.layer(x.view(2, 2, 6))
            scores = q @ q.mT
            scores /= 3.0
            return scores.softmax(-1) @ torch.randn(2, 2, 6)
        return self.cell(x, self.cell(x)) * torch.randn(4, 6) + self.cell(x)


WRITERS = {
    "running mean": Averaged, "a product": lambda: InPlace("biased"), "a view of a product": lambda: InPlace("without bias"),
    "scores": lambda: InPlace("attention"), "a recurrent cell": lambda: InPlace("cell"),
}  # fmt: skip


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", sorted(WRITERS))
def test_what_is_written_to_is_not_held(name, compiled):
    torch.manual_seed(2)
    module, x = WRITERS[name]().requires_grad_(False), torch.randn(4, 6)
    kept = getattr(module, "mean", torch.zeros(2))
    with torch.no_grad():
        capture = Capture(lambda x: [module(x)], [x], fixed=1)
        if compiled:
            capture.compile([x])
        for _ in range(4):
            before, state = kept.clone(), torch.get_rng_state()
            expected = module(x)
            kept.copy_(before)
            torch.set_rng_state(state)
            torch.testing.assert_close(capture([x])[0], expected, rtol=1e-5, atol=1e-5)


def test_what_was_written_to_all_the_same_is_made_anew():
    function, x = noisy(ENCODERS["layers"].requires_grad_(False)), torch.randn(4, 6)
    with torch.no_grad():
        capture = Capture(function, [x], fixed=1)
        torch.manual_seed(1)
        first = capture([x])[1]
        capture._held._results[0].add_(1)
        torch.manual_seed(1)
        assert torch.equal(capture([x])[1], first)


def test_a_result_that_would_be_held_is_none_that_could_be_changed():
    layer = nn.Linear(6, 2)
    x = torch.randn(4, 6)
    with torch.no_grad():
        capture = Capture(lambda x: [layer(x), layer(x) @ torch.randn(2, 3)], [x], fixed=1)
        capture([x])[0].zero_()
        torch.testing.assert_close(capture([x])[0], layer(x))


def counted(monkeypatch):
    """How often the part that stands still was run, over all captures."""
    runs, start = [], Capture.__init__

    def made(self, *args, **kwargs):
        start(self, *args, **kwargs)
        if self._held is not None:
            inside = self._held.function
            self._held.function = lambda *tensors: runs.append(len(tensors[0])) or inside(*tensors)

    monkeypatch.setattr(Capture, "__init__", made)
    monkeypatch.setattr(replays, "_CAPTURE_PAYS", 1)
    return runs


def test_an_evaluation_encodes_each_batch_once(monkeypatch):
    runs = counted(monkeypatch)
    monkeypatch.setattr("pyro_vae.judging.sweeps._CHUNK", 16 * 4 * 10)  # 8 chunks of 10 for each batch
    model, guide = small_pair()
    x = binary(12)
    plain = log_likelihood(model, guide, x, num_samples=80, compile=False)
    found = log_likelihood(model, guide, x, num_samples=80)
    torch.testing.assert_close(found.pointwise, plain.pointwise, rtol=1e-5, atol=1e-5)
    assert runs and len(runs) <= len(x) // runs[0]
    assert len(set(runs)) == 1


def test_annealed_chains_compute_once_what_a_prior_makes_of_the_data(monkeypatch):
    runs = counted(monkeypatch)
    torch.manual_seed(1)
    prior, decoder, encoder = nn.Linear(4, 3), nn.Linear(3, 16), nn.Linear(16, 3)

    def model(x, y):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(prior(y).tanh(), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=decoder(z)).to_event(1), obs=x)

    def guide(x, y):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(encoder(x), 0.8).to_event(1))

    data = (binary(5).flatten(1), torch.randn(5, 4))
    plain = bdmc(model, guide, data, num_samples=3, num_steps=40, num_data=5, compile=False)
    assert not runs
    found = bdmc(model, guide, data, num_samples=3, num_steps=40, num_data=5)
    torch.testing.assert_close(found.lower.log_weight, plain.lower.log_weight, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(found.backward_log_weight, plain.backward_log_weight, rtol=1e-4, atol=1e-3)
    # The pilot's moves, and the chains' forward and backward; each also where a second length is run.
    assert 0 < len(runs) <= 6


def test_the_watch_is_asked_again_after_a_comparison_and_a_renewal(monkeypatch):
    class Program:
        scale = 2.0

        def __call__(self, x):
            return x

    program, asked = Program(), []
    replayed = Replayed(lambda x: [x * program.scale], programs=[program], calls=1000, enough=1, fixed=1)
    monkeypatch.setattr(replays, "is_trusted", lambda function: True)
    monkeypatch.setattr(replays, "MOMENT", 1e9)
    x = torch.ones(2)
    for _ in range(2):
        replayed(x)
    (graph,) = replayed._graphs.values()
    monkeypatch.setattr(graph, "fresh", lambda fresh=graph.fresh: asked.append(graph.replays) or fresh())
    for _ in range(12):
        replayed(x)
    # Before the first replay; after the first and the tenth, in which the programs run.
    assert asked == [0, 1, 10]
    program.scale = 3.0
    replayed.renew()
    assert replayed(x)[0].tolist() == [3.0, 3.0]


def test_the_library_is_that_of_the_products_a_compiler_gets(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(products, "_known", {})

    def timed(node, kind, times, libraries, share):
        fast = DEFAULT if kind.startswith("addmm") else ONEDNN
        return Product(kind, times, 1.0, {library: 1.0 if library == fast else 2.0 for library in libraries})

    monkeypatch.setattr(products, "_timed", timed)
    monkeypatch.setattr(products, "medium_is_exact", lambda: True)
    layer, x = nn.Linear(6, 2).requires_grad_(False), torch.randn(4, 6)
    capture = Capture(lambda x: [layer(x).exp()], [x])
    assert capture.choice.library == DEFAULT and capture.choice.products[0].name.startswith("addmm")
    capture.compile([x])
    assert capture.choice.library == ONEDNN and capture.choice.products[0].name.startswith("mm")
    torch.testing.assert_close(capture([x])[0], layer(x).exp())
    capture.uncompile()
    assert capture.choice.library == DEFAULT
