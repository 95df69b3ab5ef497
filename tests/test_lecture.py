"""What a lecture shows is what the pair says: codes, decoded planes, directions, densities; and the identity holds."""

import math

import pyro.distributions as dist
import pytest
import torch
from matplotlib.figure import Figure
from torch import nn

import pyro_vae as pv
from pyro_vae import plots
from pyro_vae.parts.priors import StandardNormal


class Flat(nn.Module):
    """x = z + noise, (1, 1, 2) of two latents: its posterior is N(x / 2, 1/2)."""

    def forward(self, z):
        return dist.Normal(z.unsqueeze(-2).unsqueeze(-2), 1.0).to_event(3)


def pair(scale=0.5**0.5, shift=0.0):
    model = pv.Model(StandardNormal(2), Flat())
    guide = pv.Guide(lambda x: dist.Normal(x.flatten(1) / 2 + shift, scale).to_event(1))
    return pv.VAE(model, guide)


X = torch.randn(30, 1, 1, 2, generator=torch.Generator().manual_seed(0)) * 2**0.5


@pytest.mark.parametrize("scale, shift", [(0.5**0.5, 0.0), (1.0, 0.0), (0.4, 0.3)])
def test_the_identity_is_made_of_three_right_numbers(scale, shift):
    found = pv.identity(pair(scale, shift), X, num_samples=4000, progress=False)
    kl = 2 * (scale**2 - 0.5 - 0.5 * math.log(2 * scale**2)) + 2 * shift**2
    exact = dist.Normal(0.0, 2**0.5).log_prob(X).sum((1, 2, 3))
    assert torch.allclose(found.pointwise, torch.full((30,), kl).double(), atol=1e-4)
    assert found.log_likelihood == pytest.approx(exact.mean().item(), abs=1e-5)
    assert found.elbo == pytest.approx(exact.mean().item() - kl, abs=4 * found.rest_mc_stderr + 1e-5)
    assert abs(found.rest) <= 4 * found.rest_mc_stderr + 1e-4
    assert f"apart by {found.rest:.3f}" in str(found) and found.to_frame().loc[0, "kl"] == found.kl


def test_the_identity_refuses_what_no_grid_serves():
    vae = pv.VAE.build((4,), latent_dim=3, hidden=(4,))
    with pytest.raises(ValueError, match="z of 3 dimensions, wanted one of one or two"):
        pv.identity(vae, torch.zeros(2, 4), progress=False)


def test_the_scatter_is_of_the_codes():
    axes = Figure().subplots()
    split = pv.Split(X.flatten(1), labels=torch.arange(30) % 3)
    plots.latent_scatter(pair_of_vectors(), split, title="mine", ax=axes)
    shown = torch.cat([torch.tensor(c.get_offsets()) for c in axes.collections])
    codes = pair_of_vectors().encode(split)
    wanted = torch.cat([codes[split.labels == label] for label in range(3)])
    assert torch.allclose(shown.float(), wanted.float()) and axes.get_title(loc="left") == "mine"


def pair_of_vectors():
    vae = pair()
    return pv.VAE(vae.model, pv.Guide(lambda x: dist.Normal(x / 2, 0.5).to_event(1)))


def pixels(figure):
    return torch.tensor(figure.axes[0].images[0].get_array())


def test_the_plane_runs_to_the_right_and_upwards():
    class Place(nn.Module):
        def forward(self, z):  # two pixels: how far to the right, how far up
            return dist.Normal(torch.sigmoid(3 * z).unsqueeze(-2).unsqueeze(-2), 1.0).to_event(3)

    vae = pv.VAE(pv.Model(StandardNormal(2), Place()), pair().guide)
    picture = pixels(plots.latent_grid(vae, side=3, reach=0.8))[..., 0]
    quantile = 2**0.5 * torch.erfinv(torch.tensor(0.8)).item()
    high, low = (torch.sigmoid(torch.tensor(3 * v)).item() for v in (quantile, -quantile))
    # Each cell is one row of two pixels: the left one shows z1, the right one z2.
    assert picture[0, 0].item() == pytest.approx(low, abs=1e-3) and picture[-1, 0].item() == pytest.approx(
        low, abs=1e-3
    )
    assert picture[0, -1].item() == pytest.approx(high, abs=1e-3) and picture[-1, -1].item() == pytest.approx(
        low, abs=1e-3
    )
    with pytest.raises(ValueError, match="3 latents, wanted two"):
        plots.latent_grid(pv.VAE.build((1, 4, 4), latent_dim=3, hidden=(4,)))


def test_an_attribute_is_the_difference_of_means():
    vae, has = pair(), torch.arange(30) < 10
    direction = vae.encode(X)[has].mean(0) - vae.encode(X)[~has].mean(0)
    figure = plots.attribute(vae, X[:1], X, has, strengths=(0, 1))
    picture = pixels(figure)[..., 0]
    for t, column in ((0, 0), (1, picture.shape[1] - 1)):
        wanted = (vae.encode(X[:1])[0] + t * direction).clamp(0, 1)
        assert picture[0, column].item() == pytest.approx(wanted[0 if column == 0 else 1].item(), abs=1e-5)
    for wrong in (torch.zeros(30), torch.ones(30)):
        with pytest.raises(ValueError, match="wanted some with and some without"):
            plots.attribute(vae, X[:1], X, wrong)


def test_contours_hold_the_mass_that_they_say():
    one = pair()
    figure = plots.posterior_contours({"exact": one, "wide": pv.VAE(one.model, pair(1.0).guide)}, X[0])
    axes = figure.axes[0]
    middle = X[0].flatten() / 2
    from matplotlib.contour import QuadContourSet

    shades, exact, wide = [c for c in axes.collections if isinstance(c, QuadContourSet)]
    for drawn, scale in ((exact, 0.5**0.5), (wide, 1.0)):
        for path, level in zip(drawn.get_paths(), (0.95, 0.5), strict=True):
            radius = (torch.tensor(path.vertices) - middle).norm(dim=-1).mean().item()
            assert radius == pytest.approx(scale * (-2 * math.log(1 - level)) ** 0.5, rel=0.02)
    outer = torch.tensor(shades.get_paths()[0].vertices)
    assert (outer - middle).norm(dim=-1).max().item() == pytest.approx(
        0.5**0.5 * (-2 * math.log(0.05)) ** 0.5, rel=0.03
    )
    with pytest.raises(ValueError, match="another model"):
        plots.posterior_contours({"a": pair(), "b": pair()}, X[0])


def test_shades_are_whole_where_the_guide_never_goes():
    from matplotlib.contour import QuadContourSet

    figure = plots.posterior_contours(pair(0.05), X[0], title="narrow")
    shades = next(c for c in figure.axes[0].collections if isinstance(c, QuadContourSet))
    away = (torch.tensor(shades.get_paths()[0].vertices) - X[0].flatten() / 2).abs().amax(0)
    wanted = 0.5**0.5 * (-2 * math.log(0.05)) ** 0.5
    assert (
        away.tolist() == pytest.approx([wanted, wanted], rel=0.03) and figure.axes[0].get_title(loc="left") == "narrow"
    )


def test_rate_and_distortion_stand_where_they_are():
    vae = pv.VAE.build((1, 1, 2), latent_dim=2, hidden=(4,))
    found = pv.rate_distortion(vae, (X > 0).float(), num_samples=50, progress=False)
    axes = Figure().subplots()
    plots.rate_distortion({"mine": found}, ax=axes)
    (point,) = [line for line in axes.lines if line.get_label() == "mine" or line.get_marker() == "o"]
    assert point.get_xdata()[0] == found.rate.value and point.get_ydata()[0] == found.distortion.value
    dashed = [line for line in axes.lines if line.get_linestyle() == "--"]
    sums = [line.get_xdata() + line.get_ydata() for line in dashed]
    assert dashed and all(abs(s[0] - s[1]) < 1e-9 for s in map(list, sums))


def test_a_morph_is_a_straight_line_between_codes():
    vae = sigmoid_pair()
    a, b = X[:2], X[5:7]
    picture = pixels(plots.morph(vae, a, b, steps=3))[..., 0]
    za, zb = vae.encode(a), vae.encode(b)
    for row in range(2):
        for column, t in enumerate((0.0, 0.5, 1.0)):
            wanted = torch.sigmoid(za[row] + t * (zb[row] - za[row]))
            assert torch.allclose(cell(picture, row, column), wanted, atol=1e-3)
    with pytest.raises(ValueError, match="got 1 steps between 2 and 2 data, wanted at least 2"):
        plots.morph(vae, a, b, steps=1)
    with pytest.raises(ValueError, match="between 2 and 3 data"):
        plots.morph(vae, a, X[:3])


def test_a_traverse_moves_one_latent_and_no_other():
    vae = sigmoid_pair(stretch=(0.2, 2.0))
    picture = pixels(figure := plots.traverse(vae, X[3], values=(-2, 0, 1)))[..., 0]
    names = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    assert names == ["z2", "z1"]  # the one that changes the picture more comes first
    code = vae.encode(X[3:4])[0]
    for row, d in enumerate((1, 0)):
        for column, value in enumerate((-2.0, 0.0, 1.0)):
            z = code.clone()
            z[d] = value
            assert torch.allclose(cell(picture, row, column), torch.sigmoid(z * torch.tensor([0.2, 2.0])), atol=1e-3)
    origin = pixels(plots.traverse(vae, latents=[0], values=(-1, 1)))[..., 0]
    wanted = torch.sigmoid(torch.tensor([-0.2, 0.0]))
    assert torch.allclose(cell(origin, 0, 0), wanted, atol=1e-3)
    with pytest.raises(ValueError, match=r"got latents \[2\].*wanted some of 0 to 1"):
        plots.traverse(vae, latents=[2])
    with pytest.raises(ValueError, match="got 2 data, wanted one"):
        plots.traverse(vae, X[:2])


def test_histograms_are_of_the_aggregated_posterior_and_the_prior():
    # x ~ N(0, 2) by its margin, q(z | x) = N(x / 2, 1 / 2): z over many data is N(0, 1), the prior.
    many = torch.randn(4000, 1, 1, 2, generator=torch.Generator().manual_seed(1)) * 2**0.5
    many[..., 0] *= 1.5  # now its first latent has the variance 1.125 + 0.5, and comes first
    figure = plots.histograms(pair(), many, num_bins=30)
    assert [axes.get_title() for axes in figure.axes] == ["z1", "z2"]
    for axes, variance in zip(figure.axes, (1.625, 1.0), strict=True):
        bars = axes.patches
        centres = torch.tensor([bar.get_x() + bar.get_width() / 2 for bar in bars])
        mass = torch.tensor([bar.get_height() * bar.get_width() for bar in bars])
        assert mass.sum().item() == pytest.approx(1, abs=1e-6)
        # The standard error of a variance of 4,000 numbers, and what the width of bars adds to it.
        width = bars[0].get_width()
        found = (mass * centres.square()).sum() - (mass * centres).sum().square() - width**2 / 12
        assert found.item() == pytest.approx(variance, abs=4.5 * variance * (2 / 4000) ** 0.5)
        (line,) = axes.lines
        across, height = (torch.tensor(values) for values in line.get_data())
        assert torch.allclose(height, dist.Normal(0.0, 1.0).log_prob(across).exp().double(), atol=1e-6)


def test_a_prior_of_another_form_is_a_histogram_of_its_draws():
    wide = dist.MixtureSameFamily(
        dist.Categorical(torch.ones(2)), dist.Normal(torch.tensor([[-3.0, 0.0], [3.0, 0.0]]), 0.5).to_event(1)
    )
    vae = pv.VAE(pv.Model(lambda: wide, Flat()), pair().guide)
    for axes in plots.histograms(vae, X).axes:
        across, height = (torch.tensor(values) for values in axes.lines[0].get_data())
        assert torch.trapezoid(height, across).item() == pytest.approx(1, abs=1e-6)
        middle = height[across.abs() < 0.5].max() / height.max()
        assert (middle < 0.05) if axes.get_title() == "z1" else (middle > 0.9)


def sigmoid_pair(stretch=(1.0, 1.0)):
    class Place(nn.Module):
        def forward(self, z):
            return dist.Normal(torch.sigmoid(torch.tensor(stretch) * z)[..., None, None, :], 1.0).to_event(3)

    return pv.VAE(pv.Model(StandardNormal(2), Place()), pair().guide)


def cell(picture, row, column):
    """The two pixels of an image of a mosaic: 1 x 2 pixels, enlarged, with lines of two between images."""
    zoom = round(56 / 2)
    line = max(2, round(zoom * 2 / 28))
    top, left = row * (zoom + line), column * (2 * zoom + line)
    return torch.stack([picture[top + zoom // 2, left + zoom // 2], picture[top + zoom // 2, left + zoom + zoom // 2]])


def test_marks_stand_where_they_were_put():
    figure = plots.latent_scatter(pair_of_vectors(), X.flatten(1), marks=torch.tensor([[1.0, -2.0], [0.5, 3.0]]))
    assert torch.tensor(figure.axes[0].collections[-1].get_offsets()).tolist() == [[1.0, -2.0], [0.5, 3.0]]
    with pytest.raises(ValueError, match=r"got marks of shape \(3,\) for a pair of 2 latents"):
        plots.latent_scatter(pair_of_vectors(), X.flatten(1), marks=torch.zeros(3))


def test_a_cloud_is_drawn_from_the_posterior_and_a_point_is_one():
    figure = plots.latent_clouds(pair_of_vectors(), X[:3].flatten(1), X.flatten(1), num_samples=4000)
    others, *clouds = (torch.tensor(c.get_offsets()) for c in figure.axes[0].collections)
    assert torch.allclose(others.float(), X.flatten(1) / 2)
    for cloud, x in zip(clouds, X[:3].flatten(1), strict=True):
        assert ((cloud.mean(0) - x / 2).abs() < 4.5 * 0.5 / 4000**0.5).all()
        assert ((cloud.std(0) - 0.5).abs() < 4.5 * 0.5 / 8000**0.5).all()
    assert [text.get_text() for text in figure.axes[0].texts] == ["1", "2", "3"]
    plain = pv.autoencoder((1, 2, 2), latent_dim=2, hidden=(4,))
    (point,) = plots.latent_clouds(plain, torch.ones(1, 1, 2, 2)).axes[0].collections
    assert torch.allclose(torch.tensor(point.get_offsets()).float(), plain.encode(torch.ones(1, 1, 2, 2)))
    with pytest.raises(ValueError, match="got a pair of 3 latents, wanted two"):
        plots.latent_clouds(pv.VAE.build((4,), latent_dim=3, hidden=(4,)), torch.zeros(2, 4))


def test_the_aggregated_posterior_lies_over_the_prior():
    prior = lambda: dist.Normal(torch.tensor([2.0, -1.0]), 0.3).to_event(1)  # noqa: E731
    vae = pv.VAE(pv.Model(prior, pair().model.likelihood), pair_of_vectors().guide)
    x = torch.randn(4000, 2)
    shades, dots = plots.aggregated(vae, x, side=161).axes[0].collections
    drawn = torch.tensor(dots.get_offsets())  # of N(x / 2, 1/4): their variance is 1/2, x varying by one
    assert drawn.shape == (4000, 2) and (drawn.var(0) - 0.5).abs().max() < 4.5 * 0.5 * (2 / 4000) ** 0.5
    darkest = [path for path in shades.get_paths() if len(path.vertices)][-1].vertices
    assert torch.allclose(torch.tensor(darkest).mean(0).float(), torch.tensor([2.0, -1.0]), atol=0.1)
    with pytest.raises(ValueError, match="got a pair of 3 latents, wanted two"):
        plots.aggregated(pv.VAE.build((4,), latent_dim=3, hidden=(4,)), torch.zeros(2, 4))


def test_the_bars_of_the_identity_end_at_log_p():
    figure = plots.identity_bars({"good": -3.1, "bad": -5.0}, {"good": 0.1, "bad": 2.0}, -3.0)
    axes = figure.axes[0]
    tops = [bar.get_y() + bar.get_height() for bar in axes.patches]
    assert tops == pytest.approx([-3.1, -3.0, -5.0, -3.0])
    assert axes.lines[0].get_ydata()[0] == -3.0
    with pytest.raises(ValueError, match="got an ELBO of a and a KL of b, wanted both of each q"):
        plots.identity_bars({"a": -1.0}, {"b": 1.0}, 0.0)


def test_the_curves_of_the_elbo_are_its_terms_and_their_sum():
    gained, paid = torch.tensor([-4.0, -2.0, -3.0]), torch.tensor([0.0, 0.5, 3.0])
    axes = plots.elbo_curves(torch.tensor([0.1, 1.0, 2.0]), gained, paid, "width", log_p=-2.4).axes[0]
    shown = {line.get_label(): list(line.get_ydata()) for line in axes.lines}
    assert shown["reconstruction"] == gained.tolist() and shown["−KL(q || p(z))"] == (-paid).tolist()
    assert shown["their sum, the ELBO"] == [-4.0, -2.5, -6.0] and axes.get_xscale() == "log"
    assert torch.tensor(axes.collections[0].get_offsets()).tolist() == [[1.0, -2.5]]
    with pytest.raises(ValueError, match="got 2 values, 3 reconstructions and 3 divergences"):
        plots.elbo_curves([1.0, 2.0], gained, paid)
