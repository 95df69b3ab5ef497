"""Parts are densities with the right numbers, over any leading dimensions."""

import itertools
import math

import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional

from pyro_vae.parts import posteriors
from pyro_vae.parts.distributions import BernoulliLogits
from pyro_vae.parts.likelihoods import Bernoulli, Normal
from pyro_vae.parts.networks import ACTIVATIONS, MLP, ConvDecoder, ConvEncoder, set_output_mean
from pyro_vae.parts.posteriors import Delta, DiagonalNormal
from pyro_vae.parts.priors import StandardNormal

SHAPES = [(1, 28, 28), (1, 28, 20), (1, 8, 8), (1, 7, 5), (3, 64, 64)]
LEADING = [(), (1,), (5,), (2, 5), (1, 1), (0,), (3, 0)]


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# The Bernoulli log density


def extreme_logits():
    """Logits over [-200, 200], both zeros, the smallest numbers, and their neighbours in float32."""
    tiny = torch.tensor([0.0, -0.0, 1e-300, -1e-300, 1e-40, -1e-40, 1e-8, -1e-8], dtype=torch.float64)
    return torch.cat([torch.linspace(-200, 200, 4001, dtype=torch.float64), tiny, random(500, dtype=torch.float64)])


@pytest.mark.parametrize("x", [0.0, 1.0, 0.3])
def test_bernoulli_log_prob_and_gradient_are_torchs(x):
    values, gradients = [], []
    for family in (BernoulliLogits, torch.distributions.Bernoulli):
        logits = extreme_logits().requires_grad_()
        value = family(logits=logits, validate_args=False).log_prob(torch.full_like(logits, x))
        values.append(value.detach())
        gradients.append(torch.autograd.grad(value.sum(), logits)[0])
    assert ((values[0] - values[1]).abs() <= 1e-12 * values[1].abs().clamp(min=1)).all()
    assert (gradients[0] - gradients[1]).abs().max() <= 1e-12


@pytest.mark.parametrize("x", [0.0, 1.0])
def test_bernoulli_in_float32_is_right_to_a_millionth(x):
    """Relative to log p, with a floor of float32's resolution at 1, for both values of x."""
    logits = extreme_logits().float().requires_grad_()
    oracle = logits.detach().double().requires_grad_()
    value = BernoulliLogits(logits).log_prob(torch.full_like(logits, x))
    exact = torch.distributions.Bernoulli(logits=oracle).log_prob(torch.full_like(oracle, x))
    assert ((value - exact).abs() <= 1e-6 * exact.abs() + torch.finfo(torch.float32).eps).all()
    (gradient,), (wanted,) = torch.autograd.grad(value.sum(), logits), torch.autograd.grad(exact.sum(), oracle)
    assert ((gradient - wanted).abs() <= 1e-6 * wanted.abs() + torch.finfo(torch.float32).eps).all()


def test_bernoulli_has_right_first_and_second_derivatives():
    logits = (5 * random(3, 4, dtype=torch.float64)).requires_grad_()
    x = random(2, 1, 4, seed=1, dtype=torch.float64).sigmoid().requires_grad_()

    def log_prob(logits, x):
        return BernoulliLogits(logits).log_prob(x)

    assert gradcheck(log_prob, (logits, x)) and gradgradcheck(log_prob, (logits, x))
    first = torch.autograd.grad(log_prob(logits, x).sum(), logits, create_graph=True)[0]
    second = torch.autograd.grad(first.sum(), logits)[0]
    sigmoid = logits.detach().sigmoid()
    assert torch.allclose(second, -2 * sigmoid * (1 - sigmoid), rtol=1e-12, atol=1e-15)  # two rows of x share a logit


def test_bernoulli_broadcasts_and_expands_as_torchs_does():
    logits, x = random(3, 1, 4), (random(2, 1, 5, 1, seed=1) > 0).float()
    wanted = torch.distributions.Bernoulli(logits=logits).log_prob(x)
    assert torch.allclose(BernoulliLogits(logits).log_prob(x), wanted, rtol=1e-6, atol=1e-6)
    assert torch.allclose(BernoulliLogits(logits).expand([2, 3, 5, 4]).log_prob(x), wanted, rtol=1e-6, atol=1e-6)
    assert torch.equal(BernoulliLogits(logits).mean, logits.sigmoid())


@pytest.mark.parametrize("shape", [(784,), (1, 28, 28), (785,), (19, 19), (7,), (3, 64), (1,), (0,)])
@pytest.mark.parametrize("masked", [False, True])
def test_bernoulli_pixels_that_are_scored_together_are_torchs_sum(shape, masked):
    logits, x = 6 * random(5, *shape), (random(3, 1, *shape, seed=1) > 0).float()
    if shape != (0,):
        logits[0] = 0.0  # the largest factors under a logarithm, 2
        logits[1, ..., 0] = 200.0
    mask = random(5, *shape, seed=2) > 0 if masked else None
    ours, torchs = BernoulliLogits(logits), torch.distributions.Bernoulli(logits=logits.double())
    ours = ours if mask is None else ours.mask(mask)
    found = ours.to_event(len(shape)).log_prob(x)
    terms = torchs.log_prob(x.double()) * (1 if mask is None else mask)
    wanted = terms.flatten(2).sum(-1)
    assert found.shape == (3, 5) and found.dtype == torch.float32
    learning = BernoulliLogits(logits.clone().requires_grad_())
    learned = (learning if mask is None else learning.mask(mask)).to_event(len(shape)).log_prob(x)
    for each in (found, learned.detach()):
        assert ((each - wanted).abs() <= 2e-7 * terms.abs().flatten(2).sum(-1) + 2e-7 * max(1, math.prod(shape))).all()
    twice = ours.to_event(1).to_event(len(shape) - 1) if len(shape) > 1 else ours.expand([3, 5, *shape]).to_event(1)
    assert torch.equal(twice.log_prob(x), found)


def test_bernoulli_pixels_of_another_score_keep_theirs_and_what_is_masked_has_no_gradient():
    class Half(BernoulliLogits):
        def log_prob(self, value):
            return 0.5 * super().log_prob(value)

    logits, x, mask = random(3, 4), (random(3, 4, seed=1) > 0).float(), random(3, 4, seed=2) > 0
    each = Half(logits).log_prob(x)
    assert torch.allclose(Half(logits).to_event(1).log_prob(x), each.sum(-1))
    assert torch.allclose(Half(logits).mask(mask).to_event(1).log_prob(x), (each * mask).sum(-1))
    learning = logits.clone().requires_grad_()
    BernoulliLogits(learning).mask(mask).to_event(1).log_prob(x).backward(torch.tensor([1.0, torch.inf, torch.nan]))
    assert (learning.grad[~mask] == 0).all() and not learning.grad[1:][mask[1:]].isfinite().any()


@pytest.mark.parametrize("dtype, least", [(torch.float64, 1e-14), (torch.bfloat16, 5e-2)])
def test_bernoulli_pixels_keep_the_digits_of_their_type(dtype, least):
    logits = (3 * random(4, 64)).to(dtype)
    x = (random(4, 64, seed=1) > 0).to(dtype)
    wanted = torch.distributions.Bernoulli(logits=logits.double()).log_prob(x.double()).sum(-1)
    found = BernoulliLogits(logits).to_event(1).log_prob(x)
    assert found.dtype == dtype and ((found.double() - wanted).abs() <= least * wanted.abs()).all()


@pytest.mark.parametrize("masked", [False, True])
def test_bernoulli_pixels_have_right_first_and_second_derivatives(masked):
    logits = (5 * random(2, 3, 4, dtype=torch.float64)).requires_grad_()
    x = random(2, 3, 4, seed=1, dtype=torch.float64).sigmoid().requires_grad_()
    mask = random(3, 4, seed=2) > 0 if masked else torch.tensor(True)

    def log_prob(logits, x):
        return BernoulliLogits(logits).mask(mask).to_event(2).log_prob(x)

    assert gradcheck(log_prob, (logits, x)) and gradgradcheck(log_prob, (logits, x))


def test_bernoulli_draws_have_its_mean():
    torch.manual_seed(0)
    p = torch.tensor([0.01, 0.3, 0.5, 0.97])
    drawn = BernoulliLogits(torch.logit(p)).sample([20_000])
    assert set(drawn.unique().tolist()) == {0.0, 1.0}
    assert ((drawn.mean(0) - p).abs() < 4 * (p * (1 - p) / 20_000).sqrt()).all()


# Likelihoods


def test_bernoulli_likelihood_sums_to_one_over_all_images():
    torch.manual_seed(0)
    likelihood = Bernoulli(MLP(2, [4], (1, 3, 3))).double()
    images = torch.tensor(list(itertools.product([0.0, 1.0], repeat=9)), dtype=torch.float64)
    images = images.reshape(512, 1, 1, 1, 3, 3)
    with torch.no_grad():
        total = likelihood(3 * random(4, 5, 2, dtype=torch.float64)).log_prob(images).exp().sum(0)
    assert total.shape == (4, 5) and (total - 1).abs().max() < 1e-12


def wide_normal(scale, channels=2):
    """A normal likelihood of (channels, 3, 2) data, its decoder, and an oracle for its mean and scale."""
    torch.manual_seed(0)
    shape = (channels, 3, 2)
    decoder = MLP(4, [6], (2 * channels, 3, 2) if scale == "network" else shape)
    likelihood = Normal(decoder, scale, shape, initial_scale=0.7, minimum_scale=0.05)
    if hasattr(likelihood, "log_scale"):
        with torch.no_grad():
            likelihood.log_scale.add_(0.3 * torch.randn_like(likelihood.log_scale))

    def oracle(z):
        output = decoder(z)
        if scale == "network":
            return output[..., :channels, :, :], 0.05 + output[..., channels:, :, :].exp()
        if isinstance(scale, str):
            return output, 0.05 + likelihood.log_scale.exp()
        return output, torch.tensor(float(scale))

    return likelihood, oracle


@pytest.mark.parametrize("scale", [0.3, 2, "learned", "per-pixel", "network"])
def test_normal_likelihood_is_torchs_normal(scale):
    likelihood, oracle = wide_normal(scale)
    z, x = random(4, 5, 4), random(4, 5, 2, 3, 2, seed=1)
    loc, width = oracle(z)
    wanted = torch.distributions.Normal(loc, width).log_prob(x).sum((-3, -2, -1))
    given_z = likelihood(z)
    assert torch.allclose(given_z.log_prob(x), wanted, rtol=1e-6)
    assert torch.equal(given_z.mean, loc) and torch.allclose(given_z.stddev, width.expand_as(loc))
    wanted_gradients = torch.autograd.grad(wanted.sum(), list(likelihood.parameters()), retain_graph=True)
    for ours, theirs in zip(
        torch.autograd.grad(given_z.log_prob(x).sum(), list(likelihood.parameters())), wanted_gradients, strict=True
    ):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5) and theirs.abs().sum() > 0


@pytest.mark.parametrize("scale", [0.3, "learned", "per-pixel", "network"])
def test_normal_likelihood_integrates_to_one(scale):
    torch.manual_seed(1)
    decoder = MLP(2, [4], (2 * 2, 1, 1) if scale == "network" else (2, 1, 1))
    likelihood = Normal(decoder, scale, (2, 1, 1), initial_scale=0.5).double()
    line = torch.linspace(-12, 12, 601, dtype=torch.float64)
    grid = torch.cartesian_prod(line, line).reshape(-1, 1, 2, 1, 1)
    with torch.no_grad():
        density = likelihood(random(2, 2, dtype=torch.float64) / 4).log_prob(grid).exp()
    assert ((density.sum(0) * (line[1] - line[0]) ** 2) - 1).abs().max() < 1e-9


@pytest.mark.parametrize("scale", ["learned", "per-pixel", "network"])
def test_a_scale_that_can_move_starts_where_told_and_stays_above_its_minimum(scale):
    likelihood = Normal(MLP(2, [], (2 if scale == "network" else 1, 2, 2)), scale, (1, 2, 2), 0.4, minimum_scale=0.01)
    if scale != "network":
        assert torch.allclose(likelihood(random(3, 2)).stddev, torch.tensor(0.4))
    with torch.no_grad():
        for p in likelihood.parameters():
            p.fill_(-1e4)
    assert torch.allclose(likelihood(torch.zeros(3, 2)).stddev, torch.tensor(0.01), rtol=1e-6)


@pytest.mark.parametrize(
    "build, text",
    [
        (lambda: Normal(nn.Linear(2, 2), 0.0), "scale must be positive, got 0.0"),
        (lambda: Normal(nn.Linear(2, 2), -1), "scale must be positive, got -1"),
        (lambda: Normal(nn.Linear(2, 2), math.nan), "scale must be positive, got nan"),
        (lambda: Normal(nn.Linear(2, 2), "per-pixel"), 'scale="per-pixel" needs x_shape, the shape of one datum'),
        (lambda: Normal(nn.Linear(2, 2), "wide"), 'got scale=\'wide\', wanted a number, "learned", "per-pixel" or'),
        (
            lambda: Normal(MLP(2, [], (3, 2, 2)), "network")(torch.zeros(5, 2)),
            r"turned a latent into \(3, 2, 2\), but Normal takes 2 parameters.*2 times the channels",
        ),
    ],
)
def test_scales_that_cannot_be_are_named(build, text):
    with pytest.raises(ValueError, match=text):
        build()


class Flattening(nn.Module):
    """The decoder people write first: it knows one leading dimension."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 16)

    def forward(self, z):
        return self.layer(z.reshape(-1, 2)).reshape(-1, 1, 4, 4)


@pytest.mark.parametrize("family", [Bernoulli, Normal])
def test_a_decoder_that_flattens_leading_dimensions_is_refused(family):
    likelihood = family(Flattening())
    assert likelihood(torch.zeros(5, 2)).batch_shape == (5,)
    with pytest.raises(ValueError, match=r"latents of shape \(3, 5, 2\) into \(15, 1, 4, 4\), wanted \(3, 5\) fol"):
        likelihood(torch.zeros(3, 5, 2))
    with pytest.raises(ValueError, match=r"reshape with \(\*z.shape\[:-1\], ...\)"):
        likelihood(torch.zeros(1, 5, 2))
    with pytest.raises(ValueError, match=r"latents of shape \(5, 2\) into \(5,\), wanted \(5,\) followed by the shape"):
        family(nn.Sequential(nn.Linear(2, 1), nn.Flatten(0)))(torch.zeros(5, 2))


# Networks


def networks(shape):
    """Every network for images of a shape, with the shape of its input."""
    torch.manual_seed(0)
    return {
        "mlp-encoder": (MLP(shape, [6, 5], None), shape),
        "mlp-decoder": (MLP(3, [6], shape), (3,)),
        "linear": (MLP(shape, (), 4), shape),
        "conv-encoder": (ConvEncoder(shape, [3, 4], features=5), shape),
        "conv-encoder-3": (ConvEncoder(shape, [2, 3, 4], features=5), shape),
        "conv-decoder": (ConvDecoder(3, shape, [4, 3], features=5), (3,)),
        "conv-decoder-3": (ConvDecoder(3, shape, [4, 3, 2], features=5), (3,)),
    }


@pytest.mark.parametrize("name", networks((1, 4, 4)))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_networks_give_the_same_numbers_over_any_leading_dimensions(shape, name):
    network, in_shape = networks(shape)[name]
    with torch.no_grad():
        for leading in LEADING:
            inputs = random(*leading, *in_shape)
            output = network(inputs)
            wanted = [network(one.unsqueeze(0)) for one in inputs.reshape(-1, *in_shape)]
            assert output.shape[: len(leading)] == leading
            assert tuple(output.shape[len(leading) :]) == (shape if "decoder" in name else (network.out_features,))
            assert not wanted or torch.allclose(output.flatten(), torch.cat(wanted).flatten(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", networks((1, 4, 4)))
@pytest.mark.parametrize("shape", SHAPES[:4], ids=str)
def test_every_parameter_every_input_and_every_output_counts(shape, name):
    network, in_shape = networks(shape)[name]
    inputs = random(8, *in_shape).requires_grad_()
    output = network(inputs)
    output.square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in network.parameters())
    assert (inputs.grad.abs().sum(0) > 0).all()
    assert (output.std(0) > 0).all()


def test_convolutions_halve_and_round_up():
    encoder, decoder = ConvEncoder((1, 7, 5), [2, 3], features=4), ConvDecoder(6, (2, 7, 5), [3, 2], features=4)
    assert encoder.layers[-2].weight.shape == (4, 3 * 2 * 2)  # 7 x 5, 4 x 3, 2 x 2
    assert decoder.layers[2].weight.shape == (3 * 2 * 2, 4)
    # Each layer of the decoder gives the size that the encoder's had.
    sizes = [tuple(decoder.layers[:stop](torch.zeros(1, 6)).shape[1:]) for stop in (4, 6, 8)]
    assert sizes == [(3, 2, 2), (2, 4, 3), (2, 7, 5)]


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_an_mlp_is_layers_and_activations_in_turn(name):
    torch.manual_seed(0)
    network, x = MLP((2, 3), [5, 4], (2, 2), activation=name), random(7, 2, 3)
    (a, b, c) = (m for m in network.modules() if isinstance(m, nn.Linear))
    act = getattr(functional, name) if name != "tanh" else torch.tanh
    wanted = c(act(b(act(a(x.reshape(7, 6)))))).reshape(7, 2, 2)
    assert torch.allclose(network(x), wanted, rtol=1e-6, atol=1e-7)
    features = MLP((2, 3), [5, 4], None, activation=name)
    assert features.out_features == 4 and len(list(features.parameters())) == 4


def test_the_quick_softplus_is_torchs_with_its_derivatives():
    x = torch.cat([torch.linspace(-50, 50, 1001, dtype=torch.float64), torch.tensor([0.0, -0.0])]).requires_grad_()
    quick = MLP(1, [1], None, activation="softplus").layers[1]
    # torch's goes over to the identity at 20, where it is 2e-9 off.
    assert (quick(x) - torch.logaddexp(x, torch.zeros_like(x))).abs().max() < 1e-12
    assert torch.allclose(torch.autograd.grad(quick(x).sum(), x)[0], x.sigmoid(), rtol=1e-12)
    assert gradgradcheck(quick, (random(6, dtype=torch.float64).requires_grad_(),))


@pytest.mark.parametrize(
    "build, text",
    [
        (lambda: MLP(3, [4], 2, activation="swish"), "unknown activation 'swish', wanted one of silu, relu, gelu"),
        (lambda: MLP((1, 4, 4), [4], 2)(torch.zeros(5, 16)), r"MLP got shape \(5, 16\), wanted \(..., 1, 4, 4\)"),
        (lambda: MLP((1, 4, 4), [4], 2)(torch.zeros(4, 4)), r"MLP got shape \(4, 4\), wanted \(..., 1, 4, 4\)"),
        (lambda: ConvEncoder((1, 4, 4))(torch.zeros(2, 3, 4, 4)), r"ConvEncoder got .* wanted \(..., 1, 4, 4\)"),
        (lambda: ConvDecoder(2, (1, 4, 4))(torch.zeros(5, 3)), r"ConvDecoder got shape \(5, 3\), wanted \(..., 2\)"),
        (lambda: ConvEncoder((16,)), r"got shape \(16,\), wanted \(channels, height, width\). For vectors use MLP"),
        (lambda: ConvDecoder(2, (4, 4)), r"got shape \(4, 4\), wanted \(channels, height, width\)"),
    ],
)
def test_wrong_shapes_and_names_say_what_was_wanted(build, text):
    with pytest.raises(ValueError, match=text):
        build()


# The mean of the data in the decoder


@pytest.mark.parametrize("shape", [(1, 4, 4), (3, 5, 4), (6,)], ids=str)
def test_set_output_mean_starts_an_mlp_at_the_mean_image(shape):
    torch.manual_seed(0)
    decoder, mean = MLP(2, [8], shape), torch.rand(shape)
    mean.view(-1)[:2] = torch.tensor([0.0, 1.0])
    kept = decoder.layers[0].bias.detach().clone()
    set_output_mean(decoder, mean, floor=0.01)
    clipped = mean.clamp(0.01, 0.99)
    assert torch.equal(decoder.layers[-1].bias, torch.logit(clipped).flatten())
    assert torch.equal(decoder.layers[0].bias, kept)
    with torch.no_grad():
        decoder.layers[-1].weight.zero_()
        assert torch.allclose(Bernoulli(decoder)(random(5, 2)).mean, clipped, atol=1e-6)


def test_set_output_mean_starts_convolutions_at_the_mean_of_each_channel():
    torch.manual_seed(0)
    decoder = ConvDecoder(2, (3, 8, 6), [4, 4])
    mean = torch.rand(3, 8, 6) < torch.tensor([0.1, 0.5, 0.9]).reshape(3, 1, 1)
    set_output_mean(decoder, mean.float())
    with torch.no_grad():
        decoder.layers[-1].weight.zero_()
        shown = Bernoulli(decoder)(random(5, 2)).mean
    # The constant that fits a channel best is the channel's mean, not its mean logit.
    assert torch.allclose(shown.mean((0, 2, 3)), mean.float().mean((1, 2)), atol=1e-6)


@pytest.mark.parametrize(
    "decoder, mean, text",
    [
        (nn.Linear(2, 6, bias=False), torch.rand(6), "no layer with a bias"),
        (nn.Linear(2, 6), torch.rand(5), r"last bias has 6 entries, the mean has shape \(5,\)"),
        (MLP(2, [4], (1, 4, 4)), torch.rand(1, 5, 5), r"last bias has 16 entries, the mean has shape \(1, 5, 5\)"),
        (ConvDecoder(2, (1, 8, 8), [4]), torch.rand(3, 8, 8), r"last bias has 1 entries, .* shape \(3, 8, 8\)"),
    ],
)
def test_set_output_mean_names_what_does_not_fit(decoder, mean, text):
    with pytest.raises(ValueError, match=text):
        set_output_mean(decoder, mean)


# Posteriors and priors


@pytest.mark.parametrize("leading", LEADING[:4], ids=str)
def test_the_diagonal_posterior_is_location_and_log_scale_of_a_linear_head(leading):
    torch.manual_seed(0)
    posterior = DiagonalNormal(nn.Linear(3, 4), latent_dim=2).double()
    x, z = random(*leading, 3, dtype=torch.float64), random(*leading, 2, seed=1, dtype=torch.float64)
    output = posterior.encoder(x) @ posterior.head.weight.T + posterior.head.bias
    loc, log_scale = output[..., :2], output[..., 2:]
    q = posterior(x)
    assert q.batch_shape == leading and q.event_shape == (2,)
    assert torch.allclose(q.mean, loc, rtol=1e-12) and torch.allclose(q.stddev.log(), log_scale, rtol=1e-12)
    full = torch.distributions.MultivariateNormal(loc, torch.diag_embed((2 * log_scale).exp()))
    assert torch.allclose(q.log_prob(z), full.log_prob(z), rtol=1e-12)
    assert torch.allclose(q.entropy(), log_scale.sum(-1) + math.log(2 * math.pi * math.e), rtol=1e-12)
    (-q.log_prob(q.rsample())).sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in posterior.parameters() if p is not posterior.head.weight)


def test_the_point_posterior_is_the_linear_head_and_has_no_density():
    torch.manual_seed(0)
    posterior, x = Delta(MLP((1, 4, 4), [5], None), latent_dim=3), random(2, 6, 1, 4, 4)
    q = posterior(x)
    assert torch.equal(q.rsample(), posterior.head(posterior.encoder(x))) and torch.equal(q.mean, q.rsample())
    assert q.batch_shape == (2, 6) and q.event_shape == (3,) and torch.equal(q.log_prob(q.mean), torch.zeros(2, 6))
    q.rsample().square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in posterior.parameters())


@pytest.mark.parametrize("family", [DiagonalNormal, Delta])
def test_features_are_read_found_or_given(family):
    widths = 2 if family is DiagonalNormal else 1
    unknown = nn.Sequential(nn.Flatten(), nn.Identity())
    with pytest.raises(ValueError, match="Sequential does not say how many features.*out_features, or pass features="):
        family(unknown, latent_dim=2)
    assert family(unknown, latent_dim=2, features=16).head.weight.shape == (2 * widths, 16)
    found = nn.Sequential(nn.Flatten(), nn.Linear(16, 7), nn.ReLU())
    assert family(found, latent_dim=2).head.weight.shape == (2 * widths, 7)
    assert family(ConvEncoder((1, 8, 8), features=9), latent_dim=3).head.weight.shape == (3 * widths, 9)


def test_a_posterior_without_a_mean_in_closed_form_is_averaged_over_draws():
    class Shifted(dist.Normal):
        mean = property(lambda self: (_ for _ in ()).throw(NotImplementedError()))

    torch.manual_seed(0)
    loc, scale = random(200, 3), torch.tensor(2.0)
    off = (posteriors.mean(Shifted(loc, scale).to_event(1)) - loc) / (scale / 8)
    # 600 standardised errors of means of 64: standard normal if the 64 draws are all used, once each.
    assert off.abs().max() < 4 and abs(off.mean()) < 4 / 600**0.5 and abs(off.var() - 1) < 4 * (2 / 600) ** 0.5
    assert torch.equal(posteriors.mean(dist.Normal(loc, scale).to_event(1)), loc)


def test_the_prior_is_a_standard_normal_that_owns_nothing():
    z = random(4, 5, 3, dtype=torch.float64)
    prior = StandardNormal(3).double()
    assert prior().batch_shape == () and prior().log_prob(z).dtype == torch.float64
    wanted = -0.5 * z.square().sum(-1) - 1.5 * math.log(2 * math.pi)
    assert torch.allclose(prior().log_prob(z), wanted, rtol=1e-14)
    assert list(prior.state_dict()) == [] and list(prior.parameters()) == []
    with pytest.raises(ValueError, match="latent_dim must be a positive integer, got 0"):
        StandardNormal(0)


# Laws for all likelihoods and posteriors

LIKELIHOODS = {
    "bernoulli": lambda decoder: Bernoulli(decoder(1)),
    "fixed": lambda decoder: Normal(decoder(1), 0.3),
    "learned": lambda decoder: Normal(decoder(1), "learned"),
    "per-pixel": lambda decoder: Normal(decoder(1), "per-pixel", (2, 7, 5)),
    "network": lambda decoder: Normal(decoder(2), "network"),
}
DECODERS = {
    "mlp": lambda copies: MLP(3, [6], (copies * 2, 7, 5)),
    "conv": lambda copies: ConvDecoder(3, (copies * 2, 7, 5), [4, 3], features=6),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("name", LIKELIHOODS)
def test_likelihoods_score_each_datum_by_itself(name, decoder, dtype):
    torch.manual_seed(0)
    likelihood = LIKELIHOODS[name](DECODERS[decoder]).to(dtype)
    z, x = random(2, 5, 3, dtype=dtype), (random(5, 2, 7, 5, seed=1, dtype=dtype) > 0).to(dtype)
    together = likelihood(z)
    assert together.batch_shape == (2, 5) and together.event_shape == (2, 7, 5)
    log_prob = together.log_prob(x)
    assert log_prob.dtype == together.mean.dtype == together.sample().dtype == dtype
    alone = torch.stack([torch.stack([likelihood(z[k, b]).log_prob(x[b]) for b in range(5)]) for k in range(2)])
    assert torch.allclose(log_prob, alone, rtol=1e-6 if dtype == torch.float32 else 1e-13)
    log_prob.sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in likelihood.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("encoder", [lambda: MLP((2, 7, 5), [6], None), lambda: ConvEncoder((2, 7, 5), [3, 4], 6)])
@pytest.mark.parametrize("family", [DiagonalNormal, Delta])
def test_posteriors_encode_each_datum_by_itself(family, encoder, dtype):
    torch.manual_seed(0)
    posterior = family(encoder(), 3).to(dtype)
    x = random(2, 5, 2, 7, 5, dtype=dtype)
    q = posterior(x)
    assert q.batch_shape == (2, 5) and q.event_shape == (3,) and q.rsample().dtype == dtype
    alone = torch.stack([torch.stack([posterior(x[k, b]).mean for b in range(5)]) for k in range(2)])
    assert torch.allclose(q.mean, alone, rtol=1e-6, atol=1e-6 if dtype == torch.float32 else 1e-14)
    torch.manual_seed(1)
    one = posterior(x).rsample()
    torch.manual_seed(1)
    assert torch.equal(one, posterior(x).rsample())


def test_a_scale_per_pixel_of_another_shape_is_named():
    likelihood = Normal(MLP(2, [8], (3, 4, 4)), "per-pixel", (1, 4, 5))
    with pytest.raises(ValueError, match=r"x_shape \(1, 4, 5\).*shape \(3, 4, 4\)"):
        likelihood(torch.zeros(3, 2))
