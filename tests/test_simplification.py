"""A simplified graph gives the numbers of the graph, to the bit, and notices what is written to."""

import pyro
import pytest
import torch
from pyro.infer import RenyiELBO, Trace_ELBO, TraceMeanField_ELBO
from torch import fx

import pyro_vae as pv
from pyro_vae.inference.capture import Capture
from pyro_vae.inference.compiled import Compiled
from pyro_vae.inference.optimizers import Fused
from pyro_vae.inference.rewrites import quick_tanh, tanh_by_exp
from pyro_vae.inference.simplification import simplified
from pyro_vae.inference.updates import Update
from pyro_vae.parameters import own_parameters


def calls(graph):
    return [node for node in graph.nodes if node.op.startswith("call")]


def compared(function, *args, again=()):
    """The results of the graph as it is and simplified, on these and on other arguments; and the two graphs."""
    capture = Capture(lambda *tensors: list(function(*tensors)), [a.clone() for a in args])
    short = simplified(capture.module.graph)
    plain = fx.GraphModule({}, capture.module.graph)
    noise = [draw() for draw in capture.draws]
    for given in (args, *again):
        written = [(c, c.clone()) for c in capture.constants]
        with torch.no_grad():
            wanted = plain(*[a.clone() for a in given], *capture.constants, *noise)
            after = [c.clone() for c in capture.constants]
            for constant, before in written:
                constant.copy_(before)
            found = short(*[a.clone() for a in given], *capture.constants, *noise)
        assert len(found) == len(wanted)
        for one, two in zip(found, wanted, strict=True):
            assert one.dtype == two.dtype and one.shape == two.shape
            assert one.numpy().tobytes() == two.numpy().tobytes()
        for constant, other in zip(capture.constants, after, strict=True):
            assert constant.numpy().tobytes() == other.numpy().tobytes()
        storages = [t.untyped_storage().data_ptr() for t in found]
        assert len(set(storages)) == len(storages)
    return calls(plain.graph), calls(short.graph)


X = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
ODD = torch.tensor([[0.0, -0.0, float("inf"), float("nan")]]).expand(5, 4).clone()


@pytest.mark.parametrize(
    "function, left",
    [
        (lambda x: [x.view(5, 4).mul(1).div(1).sub(0).pow(1.0).exp()], 1),
        (lambda x: [x.neg().neg().t().t().exp()], 1),
        (lambda x: [x.split(4, 1)[0].exp() + torch.cat([x], 1)], 2),
        (lambda x: [x.exp() / x.sin() + x.exp() / x.sin()], 4),
        (lambda x: [x * (torch.ones_like(x).log() - torch.full((4,), 2.0).square()).sum()], 1),
        (lambda x: [x.detach().exp(), x.exp()], 2),  # each result has its own memory
        (lambda x: [torch.ones_like(x) * 3, torch.ones_like(x) * 3], 2),
    ],
)
def test_calls_that_change_nothing_go(function, left):
    plain, short = compared(function, X, again=[(ODD,), (-X,)])
    assert len(short) == left < len(plain)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: [x + 0],  # of -0.0 it is 0.0
        lambda x: [1 / (x * 0.0), 1 / (x * -0.0)],
        lambda x: [x.abs() + 1, x.abs() + True],
        lambda x: [(x * 3).to(torch.int64) / 1],
        lambda x: [x.t().view(-1) if x.t().is_contiguous() else x.t().reshape(-1)],
        lambda x: [x.sum(0, True).expand(5, 4) / 1],
    ],
)
def test_what_only_looks_alike_stays(function):
    compared(function, X, again=[(ODD,)])


def _written_between(x):
    y = x * 1
    first = y + 1
    y.add_(x)
    return [first, y + 1, y]


def _alias_written(x):
    ones = torch.ones_like(x)
    view = ones.detach().view(20)
    view.mul_(x.reshape(-1))
    return [ones, torch.ones_like(x), x - 0]


def _argument_written(x):
    once = x.exp()
    x.mul_(2)
    return [once, x.exp(), x * 1]


def _buffer_written(x, buffer=torch.zeros(4)):  # noqa: B008
    before = buffer + 1
    buffer.add_(x.mean(0).detach())
    return [before, buffer + 1, buffer * 1]


def _row_written(x):
    table = x.clone()
    before = table.sum()
    table[0].fill_(7.0)
    return [before, table.sum(), table]


@pytest.mark.parametrize(
    "function", [_written_between, _alias_written, _argument_written, _buffer_written, _row_written],
    ids=lambda f: f.__name__.strip("_"),
)  # fmt: skip
def test_what_is_written_to_is_left_alone(function):
    compared(function, X, again=[(ODD,), (-X,)])


def test_two_draws_are_two():
    def function(x):
        rate = x.exp()
        return [torch.poisson(rate), torch.poisson(rate)]  # whose rates the graph computes

    capture = Capture(function, [X])
    assert capture.live_noise
    short = simplified(capture.module.graph)
    one, two = short(X, *capture.constants)
    assert not torch.equal(one, two)


PAIRS = {
    "digits": lambda: pv.VAE.build((1, 8, 8), latent_dim=3, hidden=(16,)),
    "convolutions": lambda: pv.VAE.build((1, 8, 8), latent_dim=3, network="conv", hidden=(4, 8)),
    "iaf": lambda: pv.VAE.build((1, 8, 8), latent_dim=3, hidden=(16,), posterior="iaf"),
    "vamp": lambda: pv.VAE.build((1, 8, 8), latent_dim=3, hidden=(16,), prior="vamp"),
    "full": lambda: pv.VAE.build((1, 8, 8), latent_dim=3, hidden=(16,), posterior="full", likelihood="normal"),
}
LOSSES = {
    "trace": Trace_ELBO, "mean field": TraceMeanField_ELBO, "renyi": lambda: RenyiELBO(0.5, num_particles=3, vectorize_particles=True),
    "iwae": lambda: pv.Objective(pv.iwae, num_samples=3), "dreg": lambda: pv.Objective(pv.iwae, 3, estimator="doubly-reparameterized"),
}  # fmt: skip


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("pair", PAIRS)
def test_losses_and_gradients_of_pairs_are_the_same_to_the_bit(pair, loss):
    if loss == "mean field" and pair in ("iaf", "vamp"):
        pytest.skip("no divergence in closed form")
    torch.manual_seed(0)
    vae, objective = PAIRS[pair](), LOSSES[loss]()
    x = torch.rand(6, 1, 8, 8).round()
    model, guide = vae.model, vae.guide
    with torch.no_grad():
        guide(x)

    def function(*tensors):
        with own_parameters(model, guide):
            return [objective.loss_and_grads(model, guide, *tensors).detach()]

    with pyro.validation_enabled(False):
        capture = Capture(function, [x])
    plain, short = fx.GraphModule({}, capture.module.graph), simplified(capture.module.graph)
    for seed in range(2):
        torch.manual_seed(seed)
        noise = [draw() for draw in capture.draws]
        batch = torch.rand(6, 1, 8, 8).round()
        states = []
        for run in (plain, short):
            torch.manual_seed(seed)
            with torch.no_grad():
                states.append(run(batch, *capture.constants, *noise))
        assert len(states[0]) == len(capture.leaves) + 1
        for one, two in zip(*states, strict=True):
            assert one.numpy().tobytes() == two.numpy().tobytes()
    if pair == "digits":
        assert len(calls(short.graph)) < 0.7 * len(calls(plain.graph))


@pytest.mark.parametrize(
    "algorithm, options, clip",
    [
        (torch.optim.Adam, {}, None),
        (torch.optim.Adam, {"weight_decay": 0.1, "betas": (0.8, 0.9), "eps": 1e-3}, None),
        (torch.optim.AdamW, {"weight_decay": 0.1}, None),
        (torch.optim.Adam, {}, 0.5),
        (torch.optim.Adam, {"fused": False}, None),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_kernel_takes_the_step_that_the_graph_has(algorithm, options, clip, dtype):
    generator = torch.Generator().manual_seed(3)

    def made():
        torch.manual_seed(0)
        weights = [
            torch.randn(3, 4, dtype=dtype, requires_grad=True),
            torch.randn(4, 3, dtype=dtype).t().requires_grad_(),
        ]
        optimizer = Fused(algorithm, {"lr": 0.05, **options}, clip_norm=clip)
        for w in weights:
            w.grad = torch.ones_like(w)
        optimizer(weights)
        return weights, optimizer.inside()

    (written, update), (stepped, other) = made(), made()
    kernel = other.kernel(stepped)
    assert isinstance(update, Update) and kernel is not None
    for _ in range(5):
        gradients = [torch.randn(w.shape, generator=generator, dtype=dtype) for w in written]
        laid_out = [torch.empty_like(w).copy_(g) for w, g in zip(stepped, gradients, strict=True)]
        with torch.no_grad():
            update.advance()
            update(written, gradients)
            other.advance()
            kernel(laid_out)
        for one, two in zip(written, stepped, strict=True):
            torch.testing.assert_close(one, two, rtol=2e-6, atol=2e-7)


def test_a_captured_fit_steps_by_the_kernel(monkeypatch):
    count, original = [], torch._fused_adam_
    monkeypatch.setattr(torch, "_fused_adam_", lambda *a, **k: (count.append(1), original(*a, **k)))
    data = torch.rand(64, 1, 8, 8, generator=torch.Generator().manual_seed(0)).round()

    def fitted(compile):
        torch.manual_seed(1)
        vae = PAIRS["digits"]()
        objective = Compiled(Trace_ELBO(), compile_after=None) if compile else Trace_ELBO()
        pv.fit(vae.model, vae.guide, data, loss=objective, epochs=10, batch_size=16, seed=0, progress=False,
               compile=bool(compile))  # fmt: skip
        return [p.detach().clone() for p in vae.parameters()]

    captured = fitted(True)
    assert len(count) > 30  # 40 steps, of which the first are not replays
    for one, two in zip(captured, fitted(False), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


def test_the_quick_tanh_is_tanh_to_two_in_ten_million():
    """Over all of float32: near zero, where the two forms meet, where it is 1, and what is no number."""
    sizes = torch.cat(
        [torch.logspace(-38, 38, 40_001), torch.linspace(0.499, 0.501, 4_001), torch.linspace(0, 12, 9_001)]
    )
    x = torch.cat([sizes, -sizes])
    wanted, found = x.double().tanh(), tanh_by_exp(x)
    assert ((found.double() - wanted).abs() <= 2e-7 * wanted.abs()).all() and found.abs().max() == 1
    ends = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan])
    torch.testing.assert_close(tanh_by_exp(ends), ends.tanh(), rtol=0, atol=0, equal_nan=True)
    assert tanh_by_exp(ends)[:2].signbit().tolist() == [False, True]


def test_a_compiler_gets_the_quick_tanh_where_it_is_of_float32():
    weight = torch.linspace(-2, 2, 15).reshape(3, 5).requires_grad_()

    def function(x):
        loss = (weight @ x).tanh().square().sum() + (weight.double() @ x.double()).tanh().sum().float()
        loss.backward()
        return [loss.detach()]

    capture = Capture(function, [X])
    graph = fx.GraphModule({}, fx.Graph())
    graph.graph.output(graph.graph.graph_copy(capture.module.graph, {}))
    quick_tanh(graph.graph)
    graph.recompile()
    left = [n.meta["val"].dtype for n in graph.graph.nodes if n.target is torch.ops.aten.tanh.default]
    assert left == [torch.float64]
    before = capture([X])
    capture.compile([X])
    for one, two, three in zip(before, graph(X, *capture.constants), capture([X]), strict=True):
        torch.testing.assert_close(two, one, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(three, one, rtol=1e-5, atol=1e-6)


def test_two_calls_of_a_recurrent_cell_do_not_share_what_they_write_to():
    torch.manual_seed(0)
    cell, x = torch.nn.GRUCell(6, 5).requires_grad_(False), torch.randn(4, 6)
    capture = Capture(lambda x: [cell(x), cell(x) * 2], [x])
    for _ in range(2):
        one, two = capture([x])
        torch.testing.assert_close(one, cell(x))
        torch.testing.assert_close(two, 2 * cell(x))
