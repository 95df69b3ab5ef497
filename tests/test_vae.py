"""A VAE is its two programs, and a file of one is its numbers and nothing else."""

import copy
import dataclasses
import json
import math
import os
import struct

import numpy as np
import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import pyro_vae.programs.vae
from pyro_vae import load
from pyro_vae.inference.training import fit
from pyro_vae.judging.estimates import log_likelihood
from pyro_vae.parts.likelihoods import Bernoulli, Normal
from pyro_vae.parts.networks import MLP, set_output_mean
from pyro_vae.parts.posteriors import DiagonalNormal
from pyro_vae.parts.priors import StandardNormal
from pyro_vae.programs.architecture import Architecture
from pyro_vae.programs.pair import Guide, Model
from pyro_vae.programs.vae import VAE
from tests.pairs import binary


@pytest.fixture(autouse=True)
def fresh_store():
    pyro.clear_param_store()
    yield
    pyro.clear_param_store()


BUILT = {
    "mlp": {},
    "conv": {"network": "conv", "hidden": (3, 4)},
    "linear": {"network": "linear"},
    "point": {"posterior": "point", "activation": "tanh"},
    "fixed": {"likelihood": "normal", "scale": 0.1 + 0.2},
    "learned": {"likelihood": "normal", "scale": "learned"},
    "per-pixel": {"likelihood": "normal", "scale": "per-pixel"},
    "network": {"likelihood": "normal", "scale": "network"},
    "conv-network": {"network": "conv", "hidden": (3,), "likelihood": "normal", "scale": "network"},
}


def built(name="mlp", x_shape=(1, 4, 4), seed=0):
    torch.manual_seed(seed)
    return VAE.build(x_shape, **({"latent_dim": 2, "hidden": (6, 5)} | BUILT[name])).eval()


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def outputs(vae, x):
    """Everything random at one seed, everything else as it is."""
    torch.manual_seed(3)
    with torch.no_grad():
        q = vae.posterior(x)
        p = vae.decode(q.mean)
        return [q.mean, q.sample(), p.log_prob(x), p.mean, p.sample(), vae.reconstruct(x), vae.sample(3, pixels="draw")]


# Files


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", BUILT)
def test_a_file_gives_back_every_bit(tmp_path, name, dtype):
    vae, x, path = built(name).to(dtype), binary(5).to(dtype), tmp_path / "vae.safetensors"
    with torch.no_grad():  # digits that float32 would lose
        for p in vae.parameters():
            p.mul_(1 + math.pi * 1e-3)
    vae.save(path)
    torch.manual_seed(11)
    state = torch.get_rng_state()
    again = VAE.load(path)
    assert torch.equal(state, torch.get_rng_state())
    assert again.architecture == vae.architecture and not again.training
    assert same(vae.state_dict(), again.state_dict())
    assert {p.dtype for p in again.parameters()} == {dtype}
    assert all(torch.equal(a, b) for a, b in zip(outputs(vae, x), outputs(again, x), strict=True))
    fresh = built(name, seed=1).to(dtype)
    assert not same(vae.state_dict(), fresh.state_dict())
    fresh.load_weights(str(path))
    assert same(vae.state_dict(), fresh.state_dict())


def test_the_file_is_a_header_of_json_and_raw_numbers(tmp_path):
    """Read by hand, to the last byte: there is no room for a pickle."""
    vae, path = built("learned"), tmp_path / "vae.safetensors"
    vae.save(path)
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header, numbers = json.loads(content[8 : 8 + length]), content[8 + length :]
    metadata = header.pop("__metadata__")
    wanted = dataclasses.asdict(vae.architecture)
    assert json.loads(metadata.pop("pyro_vae.architecture")) == json.loads(json.dumps(wanted))
    assert metadata.keys() == {"pyro_vae.digest"} and len(metadata["pyro_vae.digest"]) == 32
    assert header.keys() == vae.state_dict().keys()
    assert max(entry["data_offsets"][1] for entry in header.values()) == len(numbers)
    assert sum(np.prod(entry["shape"], dtype=int) * 4 for entry in header.values()) == len(numbers)
    for name, entry in header.items():
        raw = np.frombuffer(numbers[slice(*entry["data_offsets"])], "<f4").reshape(entry["shape"])
        assert np.array_equal(raw, vae.state_dict()[name].numpy())


def foreign(path, metadata):
    save_file({"weight": torch.zeros(2)}, str(path), metadata=metadata)


def architecture(text):
    return lambda path: foreign(path, {"pyro_vae.architecture": text})


@pytest.mark.parametrize(
    "write, text",
    [
        (lambda path: None, "no such file: .*vae.safetensors"),
        (lambda path: path.mkdir(), "is not a readable safetensors file"),
        (lambda path: path.write_bytes(b""), "is not a readable safetensors file"),
        (lambda path: path.write_bytes(b"\x80\x04K\x01." * 100), "is not a readable safetensors file"),
        (lambda path: torch.save(built().state_dict(), path), "is not a readable safetensors file"),
        (lambda path: foreign(path, None), "weights without an architecture.*vae.load_weights"),
        (lambda path: foreign(path, {"format": "pt"}), "weights without an architecture"),
        (architecture("{"), "an architecture that cannot be read"),
        (architecture("[]"), "an architecture that cannot be read"),
        (architecture("{}"), "an architecture that cannot be read .*x_shape"),
        (architecture('{"x_shape": "a"}'), "an architecture that cannot be read"),
        (architecture('{"x_shape": [1, 4, 4], "layers": 3}'), "unknown option 'layers'"),
        (architecture('{"x_shape": [1, 4, 4], "hidden": [5]}'), "do not fit this VAE: Missing key.*posterior"),
    ],
)
def test_what_is_no_vae_is_named(tmp_path, write, text):
    write(tmp_path / "vae.safetensors")
    with pytest.raises(ValueError, match=text):
        VAE.load(tmp_path / "vae.safetensors")


def test_a_truncated_file_is_named(tmp_path):
    path = tmp_path / "vae.safetensors"
    built().save(path)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match="is not a readable safetensors file"):
        VAE.load(path)
    with pytest.raises(ValueError, match="is not a readable safetensors file"):
        built().load_weights(path)


def test_weights_of_another_shape_are_named_and_change_nothing(tmp_path):
    path = tmp_path / "vae.safetensors"
    built().save(path)
    other = VAE.build((1, 4, 4), latent_dim=3, hidden=(6, 5))
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match=r"do not fit this VAE: size mismatch for .*\[5, 2\].*\[5, 3\]"):
        other.load_weights(path)
    assert same(before, other.state_dict())
    with pytest.raises(ValueError, match="do not fit this VAE: .*log_scale"):
        built("learned").load_weights(path)
    deeper = VAE.build((1, 4, 4), latent_dim=2, hidden=(6, 5, 5))
    with pytest.raises(ValueError, match="do not fit this VAE"):
        deeper.load_weights(path)
    with pytest.raises(ValueError, match="no such file"):
        deeper.load_weights(tmp_path / "nothing")


@pytest.mark.parametrize("stage", ["write", "replace"])
@pytest.mark.parametrize("existing", [True, False])
def test_a_save_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, stage, existing):
    path = tmp_path / "vae.safetensors"
    if existing:
        built().save(path)
    before = path.read_bytes() if existing else None

    def half_written(model, filename, metadata):
        with open(filename, "wb") as file:
            file.write(b"half")
        raise OSError("disk full")

    def no_replace(source, target):
        assert os.path.getsize(source) > 1000  # all is written before the old file is touched
        raise OSError("disk full")

    if stage == "write":
        monkeypatch.setattr(pyro_vae.programs.vae, "save_model", half_written)
    else:
        monkeypatch.setattr(os, "replace", no_replace)
    with pytest.raises(OSError, match="disk full"):
        built(seed=1).save(path)
    monkeypatch.undo()
    assert os.listdir(tmp_path) == (["vae.safetensors"] if existing else [])
    assert not existing or path.read_bytes() == before
    built(seed=1).save(path)
    assert os.listdir(tmp_path) == ["vae.safetensors"] and path.read_bytes() != before


def own_parts(seed=0):
    """A VAE whose encoder ends in the layer that its decoder begins with."""
    torch.manual_seed(seed)
    shared = nn.Linear(3, 3)
    decoder = nn.Sequential(shared, nn.Tanh(), MLP(3, [], (1, 4, 4)))
    encoder = nn.Sequential(MLP((1, 4, 4), [3], None), shared)
    return VAE(Model(StandardNormal(3), Bernoulli(decoder)), Guide(DiagonalNormal(encoder, 3)))


def test_own_parts_that_share_a_layer_are_saved_once_and_still_share_it(tmp_path):
    vae, other, path = own_parts(), own_parts(seed=1), tmp_path / "own.safetensors"
    vae.save(path)
    numbers = sum(p.numel() for p in vae.parameters())  # a shared layer counts once
    (length,) = struct.unpack("<Q", path.read_bytes()[:8])
    assert path.stat().st_size == 8 + length + 4 * numbers
    with pytest.raises(ValueError, match="weights without an architecture. Build the VAE from your own parts"):
        VAE.load(path)
    other.load_weights(path)
    assert same(vae.state_dict(), other.state_dict())
    assert other.model.likelihood.decoder[0] is other.guide.posterior.encoder[1]
    x = binary(4)
    assert torch.equal(vae.reconstruct(x), other.reconstruct(x))
    with pytest.raises(ValueError, match="do not fit this VAE"):
        built().load_weights(path)


# What the methods return


@pytest.mark.parametrize("name", [name for name in BUILT if name != "point"])
def test_encode_and_decode_are_the_sites_of_the_programs(name):
    vae, x = built(name), binary(5)
    guide = poutine.trace(vae.guide).get_trace(x)
    z = guide.nodes["z"]["value"]
    model = poutine.trace(poutine.condition(vae.model, {"z": z})).get_trace(x)
    assert torch.equal(vae.posterior(x).mean, guide.nodes["z"]["fn"].mean)
    assert torch.equal(vae.posterior(x).log_prob(z), guide.nodes["z"]["fn"].log_prob(z))
    assert torch.equal(vae.decode(z).mean, model.nodes["x"]["fn"].mean)
    assert torch.equal(vae.decode(z).log_prob(x), model.nodes["x"]["fn"].log_prob(x))
    wanted = vae.model.prior().log_prob(z).sum() + vae.decode(z).log_prob(x).sum()
    assert torch.allclose(model.log_prob_sum(), wanted, rtol=1e-6)
    stacked = torch.stack([z, -z])
    assert torch.allclose(vae.decode(stacked).mean[1], vae.decode(-z).mean, rtol=1e-6, atol=1e-6)
    assert (
        torch.equal(vae.reconstruct(x), vae.decode(vae.posterior(x).mean).mean) and not vae.reconstruct(x).requires_grad
    )


def test_a_point_encodes_to_what_its_guide_returns():
    vae, x = built("point"), binary(5)
    assert torch.equal(vae.posterior(x).mean, vae.guide(x))
    assert torch.equal(vae.reconstruct(x), vae.decode(vae.guide(x)).mean)


@pytest.mark.parametrize("name", BUILT)
def test_interpolation_runs_straight_from_one_reconstruction_to_the_other(name):
    vae = built(name)
    start, end = binary(5), binary(5, seed=1)
    path = vae.interpolate(start, end, steps=5)
    assert path.shape == (5, 5, 1, 4, 4)
    assert torch.allclose(path[:, 0], vae.reconstruct(start), rtol=1e-6, atol=1e-6)
    assert torch.allclose(path[:, -1], vae.reconstruct(end), rtol=1e-6, atol=1e-6)
    with torch.no_grad():
        a, b = vae.posterior(start).mean, vae.posterior(end).mean
        assert torch.allclose(path[:, 1], vae.decode(0.75 * a + 0.25 * b).mean, rtol=1e-5, atol=1e-6)
    assert vae.interpolate(start, end).shape[1] == 10


@pytest.mark.parametrize("steps, other", [(1, (5, 1, 4, 4)), (3, (4, 1, 4, 4))])
def test_interpolation_needs_two_ends_of_equal_shape(steps, other):
    with pytest.raises(ValueError, match=r"steps between data of shapes \(5, 1, 4, 4\) and .* at least 2 steps"):
        built().interpolate(torch.zeros(5, 1, 4, 4), torch.zeros(other), steps)


def test_draws_have_the_mean_of_the_bernoulli():
    vae, mean, size = built(), torch.linspace(0.02, 0.98, 16).reshape(1, 4, 4), 10_000
    set_output_mean(vae.model.likelihood.decoder, mean)
    with torch.no_grad():
        vae.model.likelihood.decoder.layers[-1].weight.zero_()
    torch.manual_seed(0)
    drawn = vae.sample(size, pixels="draw")
    assert set(drawn.unique().tolist()) == {0.0, 1.0}
    assert ((drawn.mean(0) - mean).abs() < 4 * (mean * (1 - mean) / size).sqrt()).all()
    assert torch.allclose(vae.sample(7), mean.expand(7, 1, 4, 4), atol=1e-6)


def test_draws_and_means_agree_where_the_latent_matters():
    vae, size = built(), 10_000
    with torch.no_grad():
        vae.model.likelihood.decoder.layers[-1].weight.mul_(10)
    torch.manual_seed(0)
    drawn, means = vae.sample(size, pixels="draw"), vae.sample(size)
    assert (means.std(0) > 0.01).all() and not drawn.requires_grad
    stderr = ((drawn.var(0) + means.var(0)) / size).sqrt()
    assert ((drawn.mean(0) - means.mean(0)).abs() < 4 * stderr).all()


def test_draws_of_a_linear_vae_have_the_covariance_of_probabilistic_pca():
    torch.manual_seed(0)
    vae = VAE.build((3,), latent_dim=2, network="linear", likelihood="normal", scale=0.4)
    layer = vae.model.likelihood.decoder.layers[-1]
    covariance = (layer.weight @ layer.weight.T + 0.16 * torch.eye(3)).detach()
    size = 40_000
    drawn = vae.sample(size, pixels="draw")
    assert ((drawn.mean(0) - layer.bias).abs() < 4 * (covariance.diagonal() / size).sqrt()).all()
    products = (drawn - layer.bias.detach()).unsqueeze(-1) * (drawn - layer.bias.detach()).unsqueeze(-2)
    assert ((products.mean(0) - covariance).abs() < 4 * products.std(0) / size**0.5).all()


# Options


@pytest.mark.parametrize(
    "options, text",
    [
        ({"z_dim": 3}, "unknown option 'z_dim', wanted some of latent_dim, network, hidden, activation, posterior"),
        ({"network": "resnet"}, "unknown network 'resnet', wanted one of mlp, gated, conv, residual, linear"),
        ({"posterior": "flow"}, "unknown posterior 'flow', wanted one of diagonal, full.*or module:Class"),
        ({"likelihood": "poison"}, "unknown likelihood 'poison', wanted one of bernoulli.*Did you mean 'poisson'"),
        ({"activation": "swish"}, "unknown activation 'swish', wanted one of silu"),
        ({"latent_dim": 0}, "latent_dim must be a positive integer, got 0"),
        ({"hidden": ()}, r"hidden must be one or more positive widths, got \(\)"),
        ({"hidden": (8, 0)}, r"hidden must be one or more positive widths, got \(8, 0\)"),
        ({"likelihood": "normal", "scale": "wide"}, "got scale='wide', wanted a number"),
        ({"likelihood": "normal", "scale": -0.5}, "scale must be positive, got -0.5"),
        ({"x_shape": (16,), "network": "conv"}, r"got shape \(16,\), wanted \(channels, height, width\)"),
    ],
)
def test_unknown_options_and_values_are_named(options, text):
    options = {"x_shape": (1, 4, 4)} | options
    with pytest.raises(ValueError, match=text):
        VAE.build(options.pop("x_shape"), **options)


def test_only_means_and_draws_can_be_shown():
    with pytest.raises(ValueError, match='got pixels=\'median\', wanted "mean" or "draw"'):
        built().sample(2, pixels="median")


def test_an_architecture_is_the_networks_it_says():
    vae = VAE.build([2, 5, 3], latent_dim=3, hidden=[7, 4])
    assert vae.architecture == Architecture((2, 5, 3), 3, "mlp", (7, 4))

    def shapes(program):
        return [tuple(m.weight.shape) for m in program.modules() if isinstance(m, nn.Linear)]

    assert shapes(vae.guide) == [(7, 30), (4, 7), (6, 4)]
    assert shapes(vae.model) == [(4, 3), (7, 4), (30, 7)]
    linear = VAE.build((5,), latent_dim=2, network="linear", likelihood="normal", scale="network", posterior="point")
    assert shapes(linear.guide) == [(2, 5)] and shapes(linear.model) == [(10, 2)]


# Copies


def moved(before, module):
    return [not torch.equal(before[name], value) for name, value in module.state_dict().items()]


def steps(vae, x, count=3, lr=1e-2):
    svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": lr}), Trace_ELBO())
    for _ in range(count):
        svi.step(x)


@pytest.mark.parametrize("make", [built, own_parts], ids=["built", "shared"])
@pytest.mark.parametrize("trained_first", [True, False])
def test_a_copy_and_its_original_train_under_plain_svi_each_for_itself(make, trained_first):
    vae, x = make(), binary(20)
    torch.manual_seed(0)
    if trained_first:
        steps(vae, x)
    twin = copy.deepcopy(vae)
    start = copy.deepcopy(vae.state_dict())
    assert same(start, twin.state_dict()) and vae.model._pyro_name != twin.model._pyro_name
    steps(twin, x)
    assert all(moved(start, twin)) and not any(moved(start, vae))
    halfway = copy.deepcopy(twin.state_dict())
    steps(vae, x)
    assert all(moved(start, vae)) and not any(moved(halfway, twin))
    assert not any(torch.equal(a, b) for a, b in zip(vae.parameters(), twin.parameters(), strict=True))


def test_a_copy_repeats_the_original_step_for_step():
    vae, x = built(), binary(20)
    twin = copy.deepcopy(vae)
    for one in (vae, twin):
        torch.manual_seed(5)
        steps(one, x, count=5)
    assert same(vae.state_dict(), twin.state_dict())


def test_parts_of_a_copy_share_what_the_original_shares():
    twin = copy.deepcopy(own_parts())
    assert twin.model.likelihood.decoder[0] is twin.guide.posterior.encoder[1]
    assert twin.architecture is None and copy.deepcopy(built()).architecture == built().architecture


def test_two_vaes_of_own_normal_parts_do_not_share_a_scale():
    def make():
        torch.manual_seed(0)
        likelihood = Normal(MLP(2, [4], (1, 4, 4)), "per-pixel", (1, 4, 4))
        return VAE(Model(StandardNormal(2), likelihood), Guide(DiagonalNormal(MLP((1, 4, 4), [4], None), 2)))

    one, other = make(), make()
    for vae in (one, other):
        torch.manual_seed(1)
        steps(vae, binary(20), count=4)
    assert same(one.state_dict(), other.state_dict()) and all(moved(make().state_dict(), other))


def test_a_scale_that_does_not_exist_and_a_folder_that_does_not_are_named(tmp_path):
    with pytest.raises(ValueError, match="got scale='foo', wanted a number"):
        VAE.build((1, 4, 4), scale="foo")
    with pytest.raises(ValueError, match="cannot write .*there is no folder"):
        VAE.build((1, 4, 4), hidden=(8,)).save(tmp_path / "no" / "such" / "a.safetensors")


def test_encode_and_reconstruct_see_what_the_guide_sees_of_a_mask():
    from pyro_vae.parts.posteriors import DiagonalNormal

    built = VAE.build((4,), latent_dim=2, hidden=(8,))
    torch.manual_seed(0)
    posterior = DiagonalNormal(nn.Sequential(nn.Linear(8, 8), nn.SiLU()), 2, features=8)
    vae = VAE(built.model, Guide(posterior, show_mask=True))
    x, mask = torch.rand(5, 4), torch.rand(5, 4) < 0.5
    for given, seen in ((mask, torch.where(mask, x, 0.0)), (None, x)):
        shown = torch.cat([seen, torch.ones(5, 4) if given is None else given.float()], 1)
        assert torch.equal(vae.posterior(x, given).mean, posterior(shown).mean)
        assert torch.equal(
            vae.posterior(x, given).mean, pyro.poutine.trace(vae.guide).get_trace(x, given).nodes["z"]["fn"].mean
        )
        assert torch.equal(vae.reconstruct(x, given), vae.decode(posterior(shown).mean).mean)
    holes = torch.where(mask, x, torch.nan)
    assert torch.equal(vae.reconstruct(holes, mask), vae.reconstruct(x, mask))
    assert not torch.equal(vae.posterior(x, mask).mean, vae.posterior(x).mean)


def test_a_poisson_vae_of_8_bit_images_is_the_commands_or_says_how(tmp_path):
    import pyro_vae as pv
    from pyro_vae.app.cli import main
    from pyro_vae.app.runs import Run

    digits = pv.load("digits", binarization="none", dequantize=False)
    plain = VAE.build(digits.x_shape, likelihood="poisson", latent_dim=2, hidden=(8,))
    remedy = r"is 0\.\d+, outside the support.*wanted counts.*v / 255 of whole v.*likelihood_options=\{'levels': 256\}"
    with pytest.raises(ValueError, match=remedy):
        pv.fit(plain.model, plain.guide, digits.train, epochs=1, progress=False)
    options = {"latent_dim": 2, "hidden": (8,), "likelihood": "poisson", "likelihood_options": {"levels": 256}}
    told = VAE.build(digits.x_shape, **options)
    run = ["fit", "--data", "digits", "--likelihood", "poisson", "--latent-dim", "2", "--hidden", "8", "--epochs", "1",
           "--limit", "64", "--evaluation-samples", "10", "--out", str(tmp_path / "run"), "--quiet"]  # fmt: skip
    assert main(run) == 0
    commands = Run.load(tmp_path / "run").vae()
    assert (commands.architecture.likelihood_options, commands.architecture.likelihood) == ({"levels": 256}, "poisson")
    told.load_state_dict(commands.state_dict())
    levels = (255 * digits.test[:5]).round()
    z = torch.zeros(5, 2)
    counts = torch.distributions.Poisson(255 * nn.functional.softplus(told.model.likelihood.decoder(z)))
    for vae in (told, commands):
        found = vae.decode(z).log_prob(digits.test[:5])
        assert torch.allclose(found, counts.log_prob(levels).flatten(1).sum(1), rtol=1e-4)


@pytest.mark.filterwarnings("ignore:Using `torch.compile")
def test_parts_under_torch_compile_save_and_load_under_their_plain_names(tmp_path):
    torch.manual_seed(0)
    vae = VAE.build((6,), latent_dim=2, hidden=(8,), prior="vamp")  # the encoder is shared with the prior
    vae.save(tmp_path / "plain.safetensors")
    with safe_open(str(tmp_path / "plain.safetensors"), framework="pt") as file:
        names = set(file.keys())
    vae.model.likelihood.decoder = torch.compile(vae.model.likelihood.decoder, backend="eager")
    vae.guide.posterior.encoder = torch.compile(vae.guide.posterior.encoder, backend="eager")
    with torch.no_grad():
        for p in vae.parameters():
            p.add_(0.5)
    vae.save(tmp_path / "compiled.safetensors")
    with safe_open(str(tmp_path / "compiled.safetensors"), framework="pt") as file:
        assert set(file.keys()) == names
    plain = VAE.load(tmp_path / "compiled.safetensors")
    x = torch.rand(3, 6)
    assert torch.equal(plain.posterior(x).mean, vae.posterior(x).mean)
    assert torch.equal(plain.model.prior().log_prob(torch.zeros(2)), vae.model.prior().log_prob(torch.zeros(2)))
    before = plain.posterior(x).mean
    vae.load_weights(tmp_path / "plain.safetensors")  # and into one that is compiled
    assert not torch.equal(vae.posterior(x).mean, before)
    vae.load_weights(tmp_path / "compiled.safetensors")
    assert torch.equal(vae.posterior(x).mean, before)


def test_pixels_of_the_usual_type_go_into_a_model_of_doubles():
    torch.manual_seed(0)
    vae = VAE.build((6,), latent_dim=2, hidden=(8,)).double()
    x = torch.rand(3, 6)
    assert torch.equal(vae.posterior(x).mean, vae.posterior(x.double()).mean)
    assert vae.reconstruct(x).dtype == vae.interpolate(x, x, 2).dtype == torch.float64


@pytest.fixture
def doubles():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("prior", ["normal", "mixture", "vamp", pytest.param("flow", marks=pytest.mark.slow)])
def test_under_a_default_of_doubles_all_is_double(doubles, tmp_path, prior):
    torch.manual_seed(0)
    vae, x = VAE.build((6,), latent_dim=2, hidden=(8,), prior=prior), binary(24).reshape(24, 16)[:, :6].double()
    assert {p.dtype for p in vae.parameters()} == {torch.float64}
    history = fit(
        vae.model, vae.guide, x, epochs=4, batch_size=6, kl_warmup_steps=5, seed=0, compile=True, progress=False
    )
    assert all(math.isfinite(loss) for loss in history["loss"])
    vae.save(tmp_path / "vae.safetensors")
    again = VAE.load(tmp_path / "vae.safetensors")
    assert {p.dtype for p in again.parameters()} == {torch.float64}
    ours, theirs = (log_likelihood(v.model, v.guide, x, num_samples=20) for v in (vae, again))
    assert ours.value == theirs.value and ours.pointwise.dtype == torch.float64
    assert vae.sample(2).dtype == vae.reconstruct(x.float()).dtype == torch.float64


def test_pixels_of_a_dataset_meet_doubles_halfway(doubles):
    torch.manual_seed(0)
    digits = load("digits")
    vae = VAE.build(digits.x_shape, latent_dim=2, hidden=(8,))
    train, held_out = digits.train.subset(slice(0, 200)), digits.test.frozen(0).subset(slice(0, 20))
    history = fit(vae.model, vae.guide, train, epochs=2, validation=held_out, seed=0, progress=False)
    assert history["loss"][-1] < history["loss"][0] and history["validation"][-1] < 0
    assert log_likelihood(vae.model, vae.guide, held_out, num_samples=20).pointwise.dtype == torch.float64
