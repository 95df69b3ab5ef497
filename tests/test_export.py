"""What ArviZ gets are the library's own numbers, in both of its versions."""

import functools
import importlib.util
import json
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal

from pyro_vae.inference.batches import seeded
from pyro_vae.judging import arviz as export
from pyro_vae.judging.arviz import LOO_IS_INVALID, save_arviz, to_arviz
from pyro_vae.judging.estimates import log_likelihood
from pyro_vae.judging.sweeps import chunk_sizes
from pyro_vae.parts.likelihoods import Bernoulli
from pyro_vae.parts.networks import MLP
from pyro_vae.parts.posteriors import DiagonalNormal
from pyro_vae.parts.priors import StandardNormal
from pyro_vae.programs.pair import Guide, Model
from pyro_vae.traces import log_joint, log_q, particles, predict
from tests.pairs import binary, linear_pair, small_pair

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import arviz as az

OLD = az.__version__.startswith("0.")
NETCDF = any(importlib.util.find_spec(name) for name in ("h5py", "netCDF4"))  # not with every ArviZ 1.x
GROUPS = {
    "posterior", "prior", "posterior_predictive", "prior_predictive", "observed_data", "log_likelihood", "sample_stats",
}  # fmt: skip


def groups(tree):
    return set(tree.groups()) if OLD else {name.strip("/") for name in tree.groups} - {""}


def flat(array):
    """(C, S, ...) as (K, ...)."""
    return torch.as_tensor(np.asarray(array.values)).flatten(0, 1)


def two_sites(x, y, scale=1.0):
    """z1 a vector, w one number for each pixel under an inner plate, two observed sites."""
    data, pixels = pyro.plate("data", len(x), dim=-2), pyro.plate("pixels", 3, dim=-1)
    with data, pixels:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
    with data:
        z = pyro.sample("z1", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(z.sum(-1), scale), obs=y[:, None])
    with data, pixels:
        pyro.sample("x", dist.Normal(w + z.sum(-1), scale), obs=x)


def two_guides(x, y, scale=1.0):
    data = pyro.plate("data", len(x), dim=-2)
    with data, pyro.plate("pixels", 3, dim=-1):
        pyro.sample("w", dist.Normal(x / 2, 0.8))
    with data:
        pyro.sample("z1", dist.Normal(y[:, None, None].expand(-1, 1, 2) / 3, 0.7).to_event(1))


def test_numbers_are_those_of_particles_and_log_likelihood_through_netcdf(tmp_path):
    pair, x = linear_pair(stretch=1.3)
    tree = to_arviz(pair.model, pair.guide, x, num_samples=60, num_chains=3, num_prior=4, seed=5)
    read = tree
    if NETCDF:
        save_arviz(tree, tmp_path / "deep" / "draws.nc")
        assert [path.name for path in (tmp_path / "deep").iterdir()] == ["draws.nc"]
        read = az.from_netcdf(str(tmp_path / "deep" / "draws.nc"))
    with seeded(5):
        table = particles(pair.model, pair.guide, x, num_samples=60)
    estimate = log_likelihood(pair.model, pair.guide, x, num_samples=60, seed=5)
    for found in (tree, read):
        assert groups(found) == GROUPS
        assert_array_equal(flat(found["posterior"]["z"]), table.latents["z"])
        stats = found["sample_stats"]
        assert_allclose(flat(stats["lp"]), table.log_joint)
        assert_allclose(flat(stats["log_q"]), table.log_q["z"])
        assert_allclose(flat(stats["log_weight"]), table.log_weight)
        assert_allclose(flat(found["log_likelihood"]["x"]), table.log_likelihood)
        assert_allclose(stats["log_evidence"], estimate.pointwise, rtol=1e-12)
        assert_allclose(stats["pareto_k"], estimate.pareto_k, rtol=1e-12)
        assert_allclose(stats["ess"], estimate.ess, rtol=1e-12)
        assert_array_equal(found["observed_data"]["x"], x)
    assert read["posterior"]["z"].dims == ("chain", "draw", "datum", "latent")
    assert read["log_likelihood"].attrs["note"] == LOO_IS_INVALID and "az.loo" in LOO_IS_INVALID


def test_chunks_are_those_of_log_likelihood(monkeypatch):
    pair, x = linear_pair(stretch=1.3)
    monkeypatch.setattr("pyro_vae.judging.sweeps._CHUNK", 100 * 30 * 512)
    assert chunk_sizes((x,), 80) == [80]
    monkeypatch.setattr("pyro_vae.judging.sweeps._CHUNK", 30 * 80 * 512)  # of one batch, in two chunks
    assert chunk_sizes((x,), 160) == [80, 80]
    tree = to_arviz(pair.model, pair.guide, x, num_samples=160, num_prior=1)
    estimate = log_likelihood(pair.model, pair.guide, x, num_samples=160)
    assert_allclose(tree["sample_stats"]["log_evidence"], estimate.pointwise, rtol=1e-12)


def test_exact_guide_has_the_evidence_and_constant_weights():
    pair, x = linear_pair()
    stats = to_arviz(pair.model, pair.guide, x, num_samples=40, num_prior=1, resample=True)["sample_stats"]
    assert_allclose(stats["log_evidence"], pair.bed.log_evidence(x), rtol=1e-10)
    assert (stats["pareto_k"].values == -np.inf).all()
    assert_allclose(stats["ess"], 40)


@pytest.mark.parametrize("smooth", [True, False])
def test_resampled_draws_have_the_moments_of_the_posterior(smooth):
    """Of a guide that is moved and too wide."""
    pair, x = linear_pair()
    x = x[:8]

    def guide(x):
        posterior = pair.bed.posterior(x)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.MultivariateNormal(posterior.mean + 0.2, scale_tril=1.5 * posterior.scale_tril))

    options = {"num_samples": 4000, "num_chains": 4, "num_prior": 1, "num_predictive": 4, "seed": 1}
    tree = to_arviz(pair.model, guide, x, resample=True, smooth=smooth, **options)
    exact = pair.bed.posterior(x)
    z = flat(tree["posterior"]["z"])
    ess = torch.as_tensor(tree["sample_stats"]["ess"].values)[:, None]
    # Weighing costs 1/ESS of the variance, drawing from the weights 1/K more.
    stderr = (exact.variance * (1 / ess + 1 / len(z))).sqrt()
    assert ((z.mean(0) - exact.mean).abs() < 4 * stderr).all()
    assert ((z.var(0) / exact.variance - 1).abs() < 4 * (2 * (1 / ess + 1 / len(z))).sqrt() * 1.3).all()
    plain = flat(to_arviz(pair.model, guide, x, **options)["posterior"]["z"])
    assert ((plain.mean(0) - exact.mean).abs() > 10 * stderr).all()  # the guide's own are wrong


def test_resampled_draws_keep_their_densities_and_their_chain():
    pair, x = linear_pair(stretch=1.4)
    options = {"num_samples": 90, "num_chains": 3, "num_prior": 1}
    plain = to_arviz(pair.model, pair.guide, x, **options)
    tree = to_arviz(pair.model, pair.guide, x, resample=True, **options)
    z = {"z": flat(tree["posterior"]["z"])}
    assert_allclose(flat(tree["sample_stats"]["lp"]), log_joint(pair.model, z, x), rtol=1e-10)
    assert_allclose(flat(tree["sample_stats"]["log_q"]), log_q(pair.guide, z, x), rtol=1e-10)
    assert_allclose(tree["sample_stats"]["pareto_k"], plain["sample_stats"]["pareto_k"])
    for chain in range(3):
        own = plain["posterior"]["z"].values[chain]
        for datum in range(3):
            drawn = {tuple(row) for row in tree["posterior"]["z"].values[chain, :, datum]}
            assert drawn < {tuple(row) for row in own[:, datum]}
    assert "resampled" in tree["posterior"].attrs["draws"] and "independent" in plain["posterior"].attrs["draws"]


def test_images_have_channels_rows_and_columns():
    model, guide = small_pair()
    x = binary(5)
    names = list("abcde")
    tree = to_arviz(
        model, guide, x, num_samples=40, num_prior=6, num_predictive=20, coords={"datum": names},
        protocol={"dataset": "patterns", "binarization": "none"},
    )  # fmt: skip
    image = {"datum": 5, "channel": 1, "row": 4, "column": 4}
    assert dict(tree["posterior"]["z"].sizes) == {"chain": 4, "draw": 10, "datum": 5, "latent": 3}
    assert dict(tree["posterior_predictive"]["x"].sizes) == {"chain": 4, "draw": 5, **image}
    assert dict(tree["prior_predictive"]["x"].sizes) == {"chain": 1, "draw": 6, **image}
    assert dict(tree["prior"]["z"].sizes) == {"chain": 1, "draw": 6, "datum": 5, "latent": 3}
    assert dict(tree["observed_data"]["x"].sizes) == image
    assert dict(tree["log_likelihood"]["x"].sizes) == {"chain": 4, "draw": 10, "datum": 5}
    assert tree["sample_stats"]["pareto_k"].dims == ("datum",)
    for group in GROUPS:
        assert tree[group]["datum"].values.tolist() == names, group
    attrs = tree.attrs
    assert json.loads(attrs["protocol"]) == {"dataset": "patterns", "binarization": "none"}
    assert (attrs["seed"], attrs["num_samples"], attrs["units"], attrs["resampled"]) == (0, 40, "nats", 0)
    assert json.loads(attrs["versions"])["arviz"] == az.__version__
    assert tree["sample_stats"]["lp"].attrs["units"] == "nats"


def test_predictive_draws_follow_their_latents_and_the_prior():
    """x given z is z itself to 1e-3, so each datum tells which latent it came from."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1e-3).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, 1.0).to_event(1))

    x = torch.full((3, 2), 5.0)
    for resample in (False, True):
        tree = to_arviz(model, guide, x, num_samples=40, num_prior=200, num_predictive=12, resample=resample)
        assert_allclose(tree["posterior_predictive"]["x"], tree["posterior"]["z"][:, :3], atol=6e-3)
    assert_allclose(tree["prior_predictive"]["x"], tree["prior"]["z"], atol=6e-3)
    prior = tree["prior"]["z"].values
    assert abs(prior.mean()) < 4 / prior.size**0.5 and abs(prior.std() - 1) < 4 / (2 * prior.size) ** 0.5
    assert tree["posterior_predictive"]["x"].dims[-1] == "feature"


def test_two_sites_of_plain_functions_with_an_inner_plate_and_options(tmp_path):
    torch.manual_seed(0)
    x, y = torch.randn(4, 3), torch.randn(4)
    options = {"num_samples": 60, "num_chains": 2, "num_prior": 5, "seed": 3}
    pair = [functools.partial(program, scale=0.5) for program in (two_sites, two_guides)]
    tree = to_arviz(*pair, (x, y), **options)
    with seeded(3):
        table = particles(two_sites, two_guides, x, y, num_samples=60, scale=0.5)
    assert tree["posterior"]["w"].dims == ("chain", "draw", "datum", "pixels")
    assert tree["posterior"]["z1"].sizes["latent"] == 2 and tree["posterior"]["z1"].sizes["datum"] == 4
    assert_array_equal(flat(tree["posterior"]["w"]), table.latents["w"])
    assert_allclose(flat(tree["sample_stats"]["log_weight"]), table.log_weight, rtol=1e-5)
    assert_allclose(flat(tree["sample_stats"]["log_q"]), table.log_q["w"] + table.log_q["z1"], rtol=1e-5)
    per_site = tree["log_likelihood"]
    z = table.latents["z1"].reshape(60, 4, 2).sum(-1)
    assert_allclose(flat(per_site["y"]), dist.Normal(z, 0.5).log_prob(y), rtol=2e-5, atol=1e-5)
    assert_allclose(flat(per_site["x"]) + flat(per_site["y"]), table.log_likelihood, rtol=1e-5, atol=1e-5)
    assert tree["observed_data"]["x"].dims == ("datum", "pixels")
    assert set(tree["prior_predictive"].data_vars) == {"x", "y"}
    resampled = to_arviz(*pair, (x, y), resample=True, **options)
    z = {name: flat(resampled["posterior"][name]) for name in ("w", "z1")}
    assert_allclose(flat(resampled["sample_stats"]["lp"]), log_joint(two_sites, z, x, y, scale=0.5), rtol=1e-5)
    if NETCDF:
        save_arviz(resampled, tmp_path / "two.nc")
        assert_array_equal(az.from_netcdf(str(tmp_path / "two.nc"))["posterior"]["w"], resampled["posterior"]["w"])


def test_sites_called_like_dimensions_and_latents_of_two_sizes():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("latent", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("datum", dist.Normal(z.repeat(1, 1) if z.dim() == 2 else z, 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("latent", dist.Normal(x, 1.0).to_event(1))

    tree = to_arviz(model, guide, torch.zeros(3, 2), num_samples=8, num_prior=2)
    assert tree["posterior"]["latent"].dims == ("chain", "draw", "datum_index", "latent_index")
    assert tree["observed_data"]["datum"].dims == ("datum_index", "feature")

    def layered(x):
        with pyro.plate("data", len(x)):
            z1 = pyro.sample("z1", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            pyro.sample("z2", dist.Normal(z1[..., :2], 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z1.sum(-1), 1.0), obs=x)

    def layers(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z1", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            pyro.sample("z2", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    tree = to_arviz(layered, layers, torch.zeros(5), num_samples=8, num_prior=2)
    assert tree["posterior"]["z1"].dims[2:] == ("datum", "z1_latent")
    assert tree["posterior"]["z2"].dims[2:] == ("datum", "z2_latent")
    assert tree["observed_data"]["x"].dims == ("datum",)


def test_pairs_that_do_not_broadcast_go_one_by_one():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            assert z.dim() == 2
            pyro.sample("x", dist.Normal(z, 0.1).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, 1.0).to_event(1))

    with pytest.warns(UserWarning, match="one by one"):
        tree = to_arviz(model, guide, torch.zeros(3, 2), num_samples=8, num_prior=2)
    assert_allclose(tree["posterior_predictive"]["x"], tree["posterior"]["z"], atol=0.6)


def test_a_seed_decides_everything_and_leaves_the_random_state():
    pair, x = linear_pair(stretch=1.2)
    state = torch.random.get_rng_state()
    trees = [to_arviz(pair.model, pair.guide, x, num_samples=8, num_prior=3, resample=True, seed=s) for s in (1, 1, 2)]
    assert torch.equal(torch.random.get_rng_state(), state)
    for group in GROUPS - {"observed_data"}:
        for name in trees[0][group].data_vars:
            assert_array_equal(trees[0][group][name], trees[1][group][name])
    assert (trees[0]["posterior"]["z"].values != trees[2]["posterior"]["z"].values).all()
    more = to_arviz(pair.model, pair.guide, x, num_samples=8, num_prior=5, resample=True, seed=1)
    assert_array_equal(more["prior"]["z"][:, :3], trees[0]["prior"]["z"])


def test_predict_draws_from_the_likelihood_of_each_latent():
    pair, x = linear_pair()
    torch.manual_seed(0)
    z = torch.randn(4000, 1, 3, dtype=torch.float64).sign().expand(-1, 30, -1)
    drawn = predict(pair.model, {"z": z}, x)["x"]
    noise = (drawn - z @ pair.bed.weight.T - pair.bed.loc) / pair.bed.scale
    assert drawn.shape == (4000, 30, 6)
    assert abs(noise.mean()) < 4 / noise.numel() ** 0.5
    assert abs(noise.var() - 1) < 4 * (2 / noise.numel()) ** 0.5
    with pytest.raises(ValueError, match="no value for latent site 'z'"):
        predict(pair.model, {}, x)


@pytest.mark.parametrize("resample", [False, True])
def test_summary_and_plots_of_arviz_run(resample):
    import matplotlib

    matplotlib.use("Agg")
    pair, x = linear_pair(stretch=1.2)
    tree = to_arviz(pair.model, pair.guide, x[:2], num_samples=200, num_prior=5, resample=resample)
    table = az.summary(tree)
    assert len(table) == 2 * 3
    z = tree["posterior"]["z"].values
    assert_allclose(np.sort(table["mean"].astype(float)), np.sort(z.mean((0, 1)).ravel()), atol=0.006)
    assert (table["r_hat"].astype(float) < 1.1).all()
    if OLD:
        grid = az.plot_trace(tree, var_names=["z"])
        assert grid.shape == (1, 2)
        assert az.plot_pair(tree, coords={"datum": 0}, var_names=["z"]).shape == (2, 2)
    else:
        assert az.plot_trace(tree, var_names=["z"], backend="matplotlib") is not None
        chosen = tree.isel(datum=[0])
        assert az.plot_pair(chosen, var_names=["z"], backend="matplotlib") is not None
    matplotlib.pyplot.close("all")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"num_samples": 10}, r"got num_samples=10 in num_chains=4 chains, wanted a multiple of 4"),
        ({"num_prior": 0}, r"got num_prior=0, wanted a positive integer"),
        ({"coords": {"datum": ["a"]}}, r"got 1 coordinates of 'datum', which has 30 places"),
        ({"coords": {"data": ["a"]}}, r"got coordinates of 'data', wanted one of the dimensions \['datum', "),
    ],
)
def test_what_cannot_be_is_refused(options, text):
    pair, x = linear_pair()
    with pytest.raises(ValueError, match=text):
        to_arviz(pair.model, pair.guide, x, **options)


def test_a_guide_without_density_is_refused():
    model = Model(StandardNormal(2), Bernoulli(MLP(2, [4], (1, 4, 4))))

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Delta(torch.zeros(len(x), 2), event_dim=1))

    with pytest.raises(ValueError, match="is a point"):
        to_arviz(model, guide, binary(3), num_samples=4, num_prior=1)


def test_without_a_netcdf_library_the_remedy_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install h5netcdf h5py"):
        save_arviz(None, tmp_path / "draws.nc")
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: name if name == "h5netcdf" else None)
    with pytest.raises(ValueError, match="neither h5netcdf with h5py"):
        save_arviz(None, tmp_path / "draws.nc")
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: name)

    class Broken:
        def to_netcdf(self, path, engine):
            open(path, "w").close()
            raise OSError("disk full")

    with pytest.raises(ValueError, match="wanted a file to write to"):
        save_arviz(Broken(), tmp_path / "draws.nc")
    assert list(tmp_path.iterdir()) == []


def test_a_fitted_pair_with_parts_and_one_datum():
    model = Model(StandardNormal(2), Bernoulli(MLP(2, [4], (1, 4, 4))))
    guide = Guide(DiagonalNormal(MLP((1, 4, 4), [4], None), 2))
    tree = to_arviz(model, guide, binary(1), num_samples=4, num_chains=1, num_prior=1, num_predictive=1)
    assert dict(tree["posterior_predictive"]["x"].sizes)["draw"] == 1
    assert all(np.isfinite(tree["sample_stats"]["lp"].values).ravel())
    assert all(parameter.grad is None for parameter in model.parameters())
