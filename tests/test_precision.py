"""bfloat16 rounds what goes into layers, and nothing else."""

import contextlib

import pyro
import pytest
import torch
from pyro.infer import Trace_ELBO
from torch import nn

from pyro_vae.app import cli
from pyro_vae.app.defaults import CHOICES
from pyro_vae.inference import hardware
from pyro_vae.inference.bounds import iwae
from pyro_vae.inference.compiled import Compiled
from pyro_vae.inference.hardware import PRECISIONS, bfloat16_active, matmul_precision
from pyro_vae.inference.objectives import Objective
from pyro_vae.inference.training import fit
from pyro_vae.parts.likelihoods import Bernoulli
from pyro_vae.parts.networks import MLP
from pyro_vae.traces import particles
from tests.pairs import binary, small_pair

LAYERS = {
    "linear": (lambda: nn.Linear(40, 30), (7, 40)),
    "no bias": (lambda: nn.Linear(40, 30, bias=False), (2, 7, 40)),
    "convolution": (lambda: nn.Conv2d(3, 5, 3, stride=2, padding=1), (2, 3, 8, 8)),
    "transposed": (lambda: nn.ConvTranspose2d(3, 5, 4, stride=2, padding=1), (2, 3, 8, 8)),
}


@pytest.fixture(autouse=True)
def rounding(monkeypatch):
    """The numbers are the same on a machine that has no instructions for them, where this is refused."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)


def rounded(x):
    return x.bfloat16().double()


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_multiplies_rounded_numbers_and_adds_its_bias_exactly(name):
    make, shape = LAYERS[name]
    torch.manual_seed(0)
    layer, x = make(), torch.randn(shape, requires_grad=True)
    with matmul_precision("bfloat16"):
        y = layer(x)
        (gradient,) = torch.autograd.grad(y.square().sum(), layer.weight)
    exact = make().double()
    state = {"weight": rounded(layer.weight)} | ({} if layer.bias is None else {"bias": layer.bias.double()})
    exact.load_state_dict(state)
    wanted = exact(rounded(x))
    assert y.dtype == gradient.dtype == torch.float32
    bias = 0 if layer.bias is None else layer.bias.detach().view(-1, *(1,) * (layer.weight.dim() - 2))
    # The product is rounded to 8 bits once more when it leaves the layer, the bias is not.
    assert ((y - wanted).abs() <= 2**-8 * (wanted - bias).abs() + 1e-5).all()
    assert not torch.allclose(y, layer(x), rtol=1e-5)
    (slope,) = torch.autograd.grad(wanted.square().sum(), exact.weight)
    assert (gradient - slope).abs().max() <= 0.02 * slope.abs().max()


def test_densities_stay_in_single_precision():
    model, guide = small_pair()
    x = binary(8)
    seen = []
    likelihood = model.likelihood
    decode = likelihood.decoder.forward
    likelihood.decoder.forward = lambda z: seen.append(decode(z)) or seen[-1]
    with matmul_precision("bfloat16"):
        found = particles(model, guide, x, num_samples=3)
    logits = seen[-1]
    assert logits.dtype == torch.float32
    wanted = pyro.distributions.Bernoulli(logits=logits.double()).to_event(3).log_prob(x.double())
    assert (found.log_likelihood - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    z = found.latents["z"]
    assert torch.allclose(found.log_prior["z"], pyro.distributions.Normal(0.0, 1.0).log_prob(z).sum(-1), rtol=1e-6)


def test_other_types_are_left_alone_and_everything_is_put_back():
    layer, x = nn.Linear(3, 2).double(), torch.randn(4, 3, dtype=torch.float64)
    before = torch.get_float32_matmul_precision()
    with matmul_precision("bfloat16"):
        assert bfloat16_active() and torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
        with pytest.raises(ZeroDivisionError), matmul_precision("medium"):
            assert torch.get_float32_matmul_precision() == "medium"
            raise ZeroDivisionError
    assert not bfloat16_active() and torch.get_float32_matmul_precision() == before
    with pytest.raises(ValueError, match="unknown matmul_precision 'half', wanted one of highest"):
        fit(*small_pair(), binary(12), epochs=1, matmul_precision="half")


@pytest.mark.parametrize("make", [Trace_ELBO, lambda: Objective(iwae, 3)])
def test_a_captured_fit_in_bfloat16_is_the_fit(make):
    found = []
    for loss in (Compiled(make(), compile_after=None), make()):
        pair = small_pair()
        history = fit(*pair, binary(24), loss=loss, epochs=6, batch_size=12, learning_rate=1e-2, seed=0,
                      matmul_precision="bfloat16", compile=False)  # fmt: skip
        found.append(history["loss"])
    # Each product is rounded, so that a difference in the last bit of a sum may become one of 2^-8 somewhere.
    assert found[0] == pytest.approx(found[1], rel=1e-3)
    single = fit(*small_pair(), binary(24), loss=make(), epochs=6, batch_size=12, learning_rate=1e-2, seed=0)["loss"]
    assert found[0] == pytest.approx(single, rel=2e-2) and found[0] != pytest.approx(single, rel=1e-6)


def test_a_graph_of_one_precision_is_not_replayed_in_another():
    model, guide = small_pair()
    x, loss = binary(12), Compiled(Trace_ELBO(), compile_after=None)
    values = {}
    for name in ("bfloat16", "highest", "bfloat16", "highest"):
        with matmul_precision(name):
            for _ in range(3):
                torch.manual_seed(0)
                values.setdefault(name, set()).add(round(loss.loss_and_grads(model, guide, x), 3))
    assert loss.captures == 2 and values["bfloat16"].isdisjoint(values["highest"])


def test_a_likelihood_of_a_network_of_its_own_is_rounded_too():
    likelihood = Bernoulli(MLP(2, [8], (1, 2, 2)))
    z = torch.randn(5, 2)
    with matmul_precision("bfloat16"):
        logits = likelihood(z).base_dist.logits
    assert logits.dtype == torch.float32 and not torch.equal(logits, likelihood(z).base_dist.logits)


def test_the_command_knows_the_same_names():
    assert CHOICES["matmul_precision"] == PRECISIONS


def on_a(monkeypatch, machine, instructions):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(hardware.platform, "machine", lambda: machine)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: instructions)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)


@pytest.mark.parametrize(
    ("machine", "instructions", "slow"), [("x86_64", False, True), ("x86_64", True, False), ("arm64", False, False)]
)
def test_a_cpu_without_instructions_for_bfloat16_is_refused(monkeypatch, machine, instructions, slow):
    on_a(monkeypatch, machine, instructions)
    with matmul_precision("medium"):
        pass
    refused = pytest.raises(ValueError, match='about ten times slower than in float32. Pass "medium"')
    with refused if slow else contextlib.nullcontext(), matmul_precision("bfloat16"):
        pass


def test_the_command_refuses_it_before_it_reads_data(monkeypatch, capsys, tmp_path):
    on_a(monkeypatch, "x86_64", False)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["fit", "--matmul-precision", "bfloat16", "--data", "mnist", "--data-dir", "nowhere"]) == 2
    assert "no instructions for it" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
