"""Gated and residual networks: any leading dimensions, any image size, every item by itself."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_vae.parts.networks.convolutional import ResidualBlock, ResidualDecoder, ResidualEncoder, group_norm
from pyro_vae.parts.networks.dense import GatedLinear, GatedMLP, set_output_mean

SHAPES = [(1, 28, 28), (1, 7, 5), (3, 32, 32), (3, 64, 64), (2, 1, 1)]
LEADING = [(), (1,), (3,), (2, 2), (0,), (3, 0)]


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def small(kind, shape=(1, 7, 5)):
    """A small network of each kind, and the shapes of its input and output."""
    torch.manual_seed(0)
    if kind == "gated encoder":
        return GatedMLP(shape, [8, 6], None), shape, (6,)
    if kind == "gated decoder":
        return GatedMLP(2, [8], shape, activation="relu"), (2,), shape
    if kind == "residual encoder":
        return ResidualEncoder(shape, [8, 12], features=10, blocks=2), shape, (10,)
    return ResidualDecoder(2, shape, [12, 8], features=10, blocks=2), (2,), shape


KINDS = ["gated encoder", "gated decoder", "residual encoder", "residual decoder"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("leading", LEADING)
def test_leading_dimensions_are_free_and_each_item_is_by_itself(kind, leading):
    network, wanted, given = small(kind)
    network = network.double()
    x = random(*leading, *wanted, dtype=torch.float64)
    out = network(x)
    assert out.shape == (*leading, *given) and out.dtype == torch.float64
    flat = x.reshape(-1, *wanted)
    if len(flat):
        each = torch.stack([network(item) for item in flat]).reshape(out.shape)
        assert torch.allclose(out, each, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_no_item_sees_another(kind):
    """The gradient of one output in another item's input is zero, in training mode too: no BatchNorm."""
    network, wanted, _ = small(kind)
    x = random(3, 2, *wanted).requires_grad_()
    (gradient,) = torch.autograd.grad(network.train()(x)[1, 0].sum(), x)
    assert gradient[1, 0].abs().sum() > 0
    gradient[1, 0] = 0
    assert (gradient == 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_has_a_gradient(kind):
    network, wanted, given = small(kind)
    (network(random(5, *wanted)) * random(5, *given, seed=1)).sum().backward()
    idle = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert idle == []


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_images_of_any_size_go_through(kind, shape):
    network, wanted, given = small(kind, shape)
    out = network(random(2, *wanted))
    assert out.shape == (2, *given) and torch.isfinite(out).all()


def test_encoders_say_how_many_features_they_have():
    assert GatedMLP(5, [7], None).out_features == 7 and GatedMLP(5, [7], (2, 3)).out_features == 6
    assert ResidualEncoder((1, 8, 8), [4], features=9).out_features == 9


@pytest.mark.parametrize("kind", ["gated decoder", "residual decoder"])
def test_decoders_start_at_the_mean_of_the_data(kind):
    network, _, shape = small(kind, (3, 7, 5))
    mean = torch.linspace(0.1, 0.9, 3).view(3, 1, 1).expand(shape)
    set_output_mean(network, mean)
    last = [m for m in network.modules() if isinstance(m, nn.Linear | nn.Conv2d)][-1]
    with torch.no_grad():
        last.weight.zero_()
    assert torch.allclose(network(random(4, 2)).sigmoid(), mean.expand(4, *shape), atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_wrong_shape_is_named(kind):
    network, wanted, _ = small(kind)
    with pytest.raises(ValueError, match=rf"got shape \(3, 4, 4\), wanted \(\.\.\., {wanted[0]}"):
        network(torch.zeros(3, 4, 4))


@pytest.mark.parametrize("kind", KINDS)
def test_networks_can_be_captured_whole(kind):
    network, wanted, _ = small(kind)
    x = random(4, *wanted)
    captured = make_fx(lambda x: torch.autograd.grad(network(x).sum(), list(network.parameters())))(x)
    for a, b in zip(
        captured(2 * x), torch.autograd.grad(network(2 * x).sum(), list(network.parameters())), strict=True
    ):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)


# Gates


@pytest.mark.parametrize("activation, function", [(None, lambda h: h), ("tanh", torch.tanh)])
def test_a_gated_layer_is_its_formula(activation, function):
    torch.manual_seed(0)
    layer = GatedLinear(3, 4, activation)
    (w1, w2), (b, c) = layer.linear.weight.chunk(2), layer.linear.bias.chunk(2)
    x = random(5, 2, 3)
    wanted = function(x @ w1.T + b) * torch.sigmoid(x @ w2.T + c)
    assert torch.allclose(layer(x), wanted, atol=1e-6)


def test_a_gated_network_is_layer_after_layer():
    network, _, _ = small("gated decoder")
    x = random(3, 2)
    wanted = network.layers[1](network.layers[0](x)).view(3, 1, 7, 5)
    assert len(network.layers) == 2 and torch.equal(network(x), wanted)


# Residual blocks


@pytest.mark.parametrize("stride, size", [(1, None), (2, None), (1, (7, 9))])
@pytest.mark.parametrize("channels", [(8, 8), (8, 12)])
def test_a_residual_block_is_its_formula(channels, stride, size):
    torch.manual_seed(0)
    block = ResidualBlock(*channels, "silu", stride, size).double()
    for norm in (block.enter[0], block.second[0]):
        with torch.no_grad():
            norm.weight.copy_(torch.randn_like(norm.weight))
            norm.bias.copy_(torch.randn_like(norm.bias))
    x = random(2, channels[0], 4, 5, dtype=torch.float64)

    def normalised(h, norm):
        groups = h.unflatten(1, (norm.num_groups, -1))
        mean = groups.mean((2, 3, 4), keepdim=True)
        sd = (groups.var((2, 3, 4), unbiased=False, keepdim=True) + norm.eps).sqrt()
        return ((groups - mean) / sd).flatten(1, 2) * norm.weight.view(-1, 1, 1) + norm.bias.view(-1, 1, 1)

    def grown(h):
        if size is None:
            return h
        rows = torch.arange(size[0]) * 4 // size[0]  # the nearest pixel
        columns = torch.arange(size[1]) * 5 // size[1]
        return h[:, :, rows][:, :, :, columns]

    first, second = block.first, block.second[2]
    h = F.conv2d(grown(F.silu(normalised(x, block.enter[0]))), first.weight, first.bias, stride, 1)
    h = F.conv2d(F.silu(normalised(h, block.second[0])), second.weight, second.bias, 1, 1)
    shortcut = grown(x)
    if channels[0] != channels[1] or stride != 1:
        shortcut = F.conv2d(shortcut, block.skip.weight, None, stride)
    assert torch.allclose(block(x), shortcut + h, atol=1e-12)


@pytest.mark.parametrize("channels, groups", [(1, 1), (3, 1), (8, 2), (12, 3), (30, 6), (32, 8), (64, 8), (256, 8)])
def test_norms_have_groups_of_at_least_four_channels(channels, groups):
    assert group_norm(channels).num_groups == groups


def test_a_residual_autoencoder_learns_to_reconstruct():
    """Bars at one of four places in each direction: through two latents, far below the best constant image."""
    torch.manual_seed(0)
    x = torch.zeros(16, 1, 8, 8)
    for i in range(4):
        x[4 * i : 4 * i + 4, 0, 2 * i : 2 * i + 2] = 1.0
        x[i::4, 0, :, 2 * i : 2 * i + 2] += 1.0
    encoder, decoder = (
        ResidualEncoder((1, 8, 8), [8, 16], features=32),
        ResidualDecoder(2, (1, 8, 8), [16, 8], features=32),
    )
    head = nn.Linear(encoder.out_features, 2)
    parameters = [*encoder.parameters(), *head.parameters(), *decoder.parameters()]
    optimizer = torch.optim.Adam(parameters, 5e-3)
    for _ in range(120):
        loss = F.mse_loss(decoder(head(encoder(x))), x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.2 * x.var(0, unbiased=False).mean()


def test_a_gated_network_learns_a_product_that_no_sum_of_single_inputs_is():
    torch.manual_seed(0)
    network = GatedMLP(2, [32], 1)
    x = random(512, 2)
    y = x[:, :1] * x[:, 1:]
    optimizer = torch.optim.Adam(network.parameters(), 1e-2)
    for _ in range(300):
        loss = F.mse_loss(network(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.05 * y.var()


@pytest.mark.parametrize("make, match", [
    (lambda: ResidualEncoder((1, 8, 8), []), r"channels=\(\).*one or more positive"),
    (lambda: ResidualDecoder(2, (1, 8, 8), [8], blocks=0), "blocks=0.*at least one block"),
    (lambda: ResidualEncoder((64,)), r"got shape \(64,\), wanted \(channels, height, width\)"),
    (lambda: GatedMLP(2, [3], 1, activation="sine"), "unknown activation 'sine'"),
])  # fmt: skip
def test_what_cannot_be_built_is_refused(make, match):
    with pytest.raises(ValueError, match=match):
        make()
