"""Splits, arrays and images go into all methods of a pair, and plain tensors come out, the same under the same seed."""

import pytest
import torch
from PIL import Image

import pyro_vae as pv
from pyro_vae.programs.zoo.conditional import Conditional
from pyro_vae.programs.zoo.hierarchical import Hierarchical
from pyro_vae.programs.zoo.mixture import Mixture
from pyro_vae.programs.zoo.semi_supervised import SemiSupervised

LEVELS = torch.randint(256, (7, 1, 4, 4), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
X = LEVELS.float() / 255
Y = torch.tensor([0, 1, 2, 0, 1, 2, 0])
SHAPE, SMALL = (1, 4, 4), {"hidden": (8,), "latent_dim": 2}


def made(kind):
    torch.manual_seed(0)
    return {
        "vae": lambda: pv.VAE.build(SHAPE, **SMALL),
        "flow": lambda: pv.VAE.build(SHAPE, posterior="maf", **SMALL),
        "mixture": lambda: Mixture.build(SHAPE, num_clusters=3, **SMALL),
        "hierarchical": lambda: Hierarchical.build(SHAPE, latent_dims=(2, 2), hidden=((8,), (8,))),
        "conditional": lambda: Conditional.build(SHAPE, y_dim=3, **SMALL),
        "semi-supervised": lambda: SemiSupervised.build(SHAPE, num_classes=3, **SMALL),
    }[kind]()


KINDS = ["vae", "flow", "mixture", "hierarchical", "conditional", "semi-supervised"]
WITH_Y = ("conditional", "semi-supervised")
FORMS = {
    "array": lambda: X.numpy(),
    "float64": lambda: X.double().numpy(),
    "list": lambda: list(X.numpy()),
    "split": lambda: pv.Split(LEVELS),
    "images": lambda: [Image.fromarray(datum.numpy()[0]) for datum in LEVELS],
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_data_of_every_form_give_what_the_tensor_gives(kind, form):
    pair, x = made(kind), FORMS[form]()
    y, labels = ((Y,), (Y.numpy(),)) if kind in WITH_Y else ((), ())
    for name in ("encode", "reconstruct"):
        wanted = getattr(pair, name)(X, *y, seed=1)
        got = getattr(pair, name)(x, *labels, seed=1)
        assert type(got) is torch.Tensor and not got.requires_grad and got.numpy().shape[0] == 7
        assert torch.allclose(got, wanted, atol=1e-6), name
    torch.manual_seed(0)
    wanted = pair.posterior(X, *y).sample()
    torch.manual_seed(0)
    assert torch.allclose(pair.posterior(x, *labels).sample(), wanted, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_fixes_what_is_drawn_and_leaves_the_random_state(kind):
    pair = made(kind)
    calls = [lambda seed: pair.sample(Y if kind in WITH_Y else 4, pixels="draw", seed=seed)]
    grey = pv.Split(LEVELS, binarization="dynamic")
    y = (Y,) if kind in WITH_Y else ()
    calls += [lambda seed: pair.encode(grey, *y, seed=seed), lambda seed: pair.reconstruct(grey, *y, seed=seed)]
    if kind in ("vae", "flow"):
        calls.append(lambda seed: pair.interpolate(grey.subset([0, 1]), grey.subset([2, 3]), 3, seed=seed))
    if kind == "hierarchical":
        calls.append(lambda seed: torch.cat(pair.latents(X, seed=seed)))
    if kind == "mixture":
        calls.append(lambda seed: pair.responsibilities(X, 3, seed=seed))
    if kind == "semi-supervised":
        calls.append(lambda seed: pair.classify(grey, seed=seed))
    for call in calls:
        before = torch.get_rng_state()
        one, two, other = call(5), call(5), call(6)
        assert torch.equal(torch.get_rng_state(), before)
        assert torch.equal(one, two) and not torch.equal(one, other) and not one.requires_grad
        assert not torch.equal(call(None), call(None))  # without, the random state goes on


def test_encode_is_the_mean_of_the_posterior_whose_parameters_carry_gradients():
    vae = made("vae")
    assert torch.equal(vae.encode(X), vae.posterior(X).mean)
    assert vae.posterior(X).mean.requires_grad and vae.decode(torch.zeros(1, 2)).mean.requires_grad


def test_more_data_than_fit_at_once_are_the_same_data_with_what_goes_with_them():
    pair, many = made("conditional"), X.repeat(400, 1, 1, 1)
    labels = Y.repeat(400)
    assert torch.allclose(
        pair.encode(many, labels)[1000:1014], pair.encode(many[1000:1014], labels[1000:1014]), atol=1e-6
    )
    vae, mask = made("vae"), torch.rand(2800, 1, 4, 4, generator=torch.Generator().manual_seed(1)) < 0.5
    assert torch.allclose(vae.encode(many, mask)[1500:1507], vae.encode(many[1500:1507], mask[1500:1507]), atol=1e-6)
    assert vae.reconstruct(many, mask[:1]).shape == many.shape  # one mask for all


def test_colour_images_are_of_three_channels_and_odd_ones_are_refused():
    red = Image.new("RGB", (4, 4), (255, 0, 0))
    vae = pv.VAE.build((3, 4, 4), **SMALL)
    x = torch.zeros(1, 3, 4, 4)
    x[:, 0] = 1
    assert torch.equal(vae.encode(red), vae.encode(x)) and torch.equal(
        vae.encode([red, red.convert("RGBA")]), vae.encode(x.repeat(2, 1, 1, 1))
    )
    with pytest.raises(ValueError, match="images of 2 sizes"):
        vae.encode([red, red.resize((5, 5))])
    with pytest.raises(ValueError, match="wanted 8 bits a channel"):
        vae.encode(Image.new("I", (4, 4)))
    with pytest.raises(ValueError, match=r"MLP got shape \(1, 3, 6, 6\), wanted"):
        vae.encode(red.resize((6, 6)))
