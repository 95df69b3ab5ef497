"""Tables on scales of their own: what the networks see is standardised, what is reported is of the data."""

import math
import warnings

import numpy as np
import pytest
import torch

import pyro_vae as pv
from pyro_vae.app.cli import main
from pyro_vae.app.runs import Run
from pyro_vae.parts.likelihoods.likelihood import Normal, StandardizedNormal, bounded_exp
from pyro_vae.parts.standardize import Standardize
from pyro_vae.traces import particles

SCALES = ("network", "per-pixel", "learned", 0.7)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def people(n: int = 300) -> torch.Tensor:
    """Age, income, a constant, a flag."""
    income = torch.exp(torch.randn(n) * 1.5 + 10)
    return torch.stack([torch.randn(n) * 30 + 45, income, torch.full((n,), 7.0), (torch.rand(n) < 0.3).float()], 1)


def quiet(*args, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return pv.fit(*args, progress=False, seed=0, **options)


def independent_normals(x: torch.Tensor) -> float:
    """The mean log density of x under one normal for each column that varies: what a model without latents reaches."""
    s = x.double().std(0, unbiased=False)
    return -(s[s > 0].log() + 0.5 * math.log(2 * math.pi * math.e)).sum().item()


@pytest.mark.parametrize("scale", SCALES[:3])
def test_a_table_fits_out_of_the_box_and_as_well_as_its_columns_spread(scale):
    x = people()
    vae = pv.VAE.build((4,), latent_dim=2, hidden=(32,), likelihood="normal", scale=scale)
    with pytest.warns(UserWarning, match=r"scales of their own \(x\[:, 1\] has mean .*standardize=False"):
        bounds = pv.fit(vae.model, vae.guide, x, epochs=30, batch_size=64, learning_rate=3e-2, progress=False, seed=0)[
            "bound"
        ]
    assert all(map(math.isfinite, bounds))
    assert bounds[-1] > independent_normals(x) - 1.5  # the constant column costs, or pays, what its scale has learned


def test_wine_fits_out_of_the_box():
    from sklearn.datasets import load_wine

    x = torch.from_numpy(load_wine().data).float()
    vae = pv.VAE.build((13,), latent_dim=2, hidden=(32,), likelihood="normal", scale="per-pixel")
    bounds = quiet(vae.model, vae.guide, x, epochs=80, batch_size=32, learning_rate=1e-2)["bound"]
    assert bounds[-1] > independent_normals(x) + 1  # the latents explain some of it
    assert (vae.sample(500, pixels="draw").mean(0) - x.mean(0)).abs().div(x.std(0)).max() < 0.5


@pytest.mark.parametrize("scale", SCALES)
def test_every_density_is_that_of_the_scaled_data_less_the_log_of_the_scales(scale):
    x = people().double()
    x = x.clamp(max=3e5)
    options = {"latent_dim": 2, "hidden": (8,), "likelihood": "normal", "scale": scale}
    plain = pv.VAE.build((4,), standardize=False, **options).double()
    scaled = pv.VAE.build((4,), standardize=True, **options).double()
    scaled.load_state_dict(plain.state_dict(), strict=False)
    scaled.guide.standardize.measure([x[:100], x[100:]])
    m, s = x.mean(0), x.std(0, unbiased=False)
    s[2] = 1.0  # constant
    u, volume = (x - m) / s, s.log().sum()
    for call in (pv.elbo_terms, pv.log_likelihood):
        found, wanted = (
            call(v.model, v.guide, data, num_samples=20, seed=3, progress=False).pointwise
            for v, data in ((scaled, x), (plain, u))
        )
        assert torch.allclose(found, wanted - volume, rtol=1e-9, atol=1e-9)
    assert torch.allclose(scaled.reconstruct(x), m + s * plain.reconstruct(u), rtol=1e-9)
    torch.manual_seed(5)
    drawn = scaled.sample(50, pixels="draw")
    torch.manual_seed(5)
    assert torch.allclose(drawn, m + s * plain.sample(50, pixels="draw"), rtol=1e-9)


def test_log_p_of_a_standardized_linear_model_is_its_closed_form():
    x = torch.randn(40, 3, dtype=torch.float64) * torch.tensor([100.0, 1e4, 1e-3]) + torch.tensor([5.0, 1e5, 2.0])
    vae = pv.VAE.build(
        (3,), latent_dim=2, network="linear", likelihood="normal", scale=0.6, standardize=True, posterior="full"
    ).double()
    vae.guide.standardize.measure([x])
    layer = next(m for m in vae.model.likelihood.decoder.modules() if isinstance(m, torch.nn.Linear))
    s, m = vae.guide.standardize.scale, vae.guide.standardize.loc
    W, b = s[:, None] * layer.weight.detach(), m + s * layer.bias.detach()
    exact = torch.distributions.MultivariateNormal(b, W @ W.T + torch.diag((0.6 * s) ** 2)).log_prob(x)
    quiet(vae.model, vae.guide, x, epochs=300, batch_size=40, learning_rate=1e-2)
    W, b = s[:, None] * layer.weight.detach(), m + s * layer.bias.detach()
    exact = torch.distributions.MultivariateNormal(b, W @ W.T + torch.diag((0.6 * s) ** 2)).log_prob(x)
    found = pv.log_likelihood(vae.model, vae.guide, x, num_samples=20_000, progress=False)
    assert abs(found.value - exact.mean().item()) < 4 * found.mc_stderr + 1e-4
    assert pv.elbo_terms(vae.model, vae.guide, x, progress=False).value < exact.mean().item() + 1e-3


def test_what_was_measured_is_saved_and_no_later_fit_moves_it(tmp_path):
    x = people()
    vae = pv.VAE.build((4,), latent_dim=2, hidden=(8,), likelihood="normal", standardize=True)
    pv.fit(vae.model, vae.guide, x, epochs=1, progress=False, seed=0)
    s = vae.guide.standardize.scale.clone()
    assert torch.allclose(s[:2], x.std(0, unbiased=False)[:2], rtol=1e-5) and s[2] == 1
    vae.save(tmp_path / "w.safetensors")
    again = pv.VAE.load(tmp_path / "w.safetensors")
    assert again.guide.standardize is again.model.likelihood.standardize
    found = [pv.elbo_terms(v.model, v.guide, x[:9], num_samples=9, progress=False).pointwise for v in (vae, again)]
    assert torch.equal(*found)
    pv.fit(again.model, again.guide, 5 * x, epochs=1, progress=False, seed=0)
    assert torch.equal(again.guide.standardize.scale, s)


def test_weights_from_before_there_was_standardizing_keep_their_meaning(tmp_path):
    import json

    from safetensors import safe_open
    from safetensors.torch import save_file

    old = pv.VAE.build((4,), latent_dim=2, hidden=(8,), likelihood="normal", standardize=False)
    old.save(tmp_path / "new.safetensors")
    with safe_open(str(tmp_path / "new.safetensors"), framework="pt") as file:
        built = json.loads(file.metadata()["pyro_vae.architecture"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    del built["standardize"]
    save_file(tensors, str(tmp_path / "old.safetensors"), metadata={"pyro_vae.architecture": json.dumps(built)})
    loaded, x = pv.VAE.load(tmp_path / "old.safetensors"), torch.randn(5, 4)
    assert loaded.guide.standardize is None
    assert torch.equal(loaded.posterior(x).mean, old.posterior(x).mean)


@pytest.mark.parametrize("x", [torch.randn(50, 4), torch.rand(50, 4), torch.randn(50, 4) * 3.5])
def test_data_of_size_one_are_left_as_they_are(x):
    """To the bit: a pair that standardises nothing is the one that cannot."""
    found = []
    for standardize in (None, False):
        torch.manual_seed(1)
        vae = pv.VAE.build((4,), latent_dim=2, hidden=(8,), likelihood="normal", standardize=standardize)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found.append(pv.fit(vae.model, vae.guide, x, epochs=2, progress=False, seed=0)["bound"])
    assert found[0] == pytest.approx(found[1], rel=1e-6)


def test_images_and_other_likelihoods_have_no_columns():
    assert pv.VAE.build((1, 2, 2), latent_dim=2, hidden=(8,), likelihood="normal").guide.standardize is None
    assert pv.VAE.build((4,), latent_dim=2, hidden=(8,)).guide.standardize is None
    with pytest.raises(ValueError, match="got standardize=True with the likelihood 'poisson', wanted 'normal'"):
        pv.VAE.build((4,), likelihood="poisson", standardize=True)


def test_statistics_are_those_of_what_was_observed_in_one_pass():
    x = torch.randn(1000, 3, dtype=torch.float64) + torch.tensor([1e6, 0.0, -5.0])
    mask = torch.rand(1000, 3) < 0.7
    holes = torch.where(mask, x, torch.nan)
    standardize = Standardize((3,)).double()
    standardize.before_fit([(holes[i : i + 97], mask[i : i + 97]) for i in range(0, 1000, 97)])
    for d in range(3):
        seen = x[mask[:, d], d]
        assert standardize.loc[d].item() == pytest.approx(seen.mean().item(), rel=1e-12)
        assert standardize.scale[d].item() == pytest.approx(seen.std(unbiased=False).item(), rel=1e-9)


def test_a_missing_number_is_shown_as_the_mean_of_its_column():
    x = people(50)
    vae = pv.VAE.build((4,), latent_dim=2, hidden=(8,), likelihood="normal", standardize=True)
    mask = torch.ones_like(x, dtype=torch.bool)
    mask[:, 1] = False
    pv.fit(vae.model, vae.guide, (torch.where(mask, x, torch.nan), mask), epochs=1, progress=False, seed=0)
    known = torch.where(mask, x, vae.guide.standardize.loc)
    assert torch.allclose(vae.posterior(x, mask).mean, vae.posterior(known).mean, atol=1e-6)


def test_one_datum_has_no_spread_and_its_size_has_to_do():
    standardize = Standardize((2,))
    standardize.measure([torch.tensor([[5e4, 0.2]])])
    assert standardize.scale.tolist() == [5e4, 1.0]
    assert standardize(torch.tensor([[1e5, 0.2]])).tolist() == [[1.0, 0.0]]


def test_the_guide_sees_the_far_away_by_its_logarithm():
    far = torch.tensor([[29.0, -31.0, 1e12]])
    standardize = Standardize((3,))
    assert torch.equal(standardize(far), far)  # unless there is nothing that it standardises
    standardize.measure([torch.tensor([[-1.0, -1.0, -1.0], [1.0, 1.0, 1.0]])])
    u = standardize(far)
    assert u.tolist() == [[29.0, pytest.approx(-30 - math.log(2)), pytest.approx(30 + math.log1p(1e12), rel=1e-6)]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_learned_scale_is_the_exponential_in_range_and_has_a_gradient_beyond(dtype):
    l = torch.linspace(-15, 15, 301, dtype=dtype)  # noqa: E741
    assert torch.equal(bounded_exp(l), l.exp())  # so that saved weights mean what they meant
    far = torch.tensor([-1e5, -100.0, -15.01, 15.01, 100.0, 1e5], dtype=dtype, requires_grad=True)
    value = bounded_exp(far)
    (slope,) = torch.autograd.grad(value.log().sum(), far)
    wanted = torch.tensor([-15 - math.log1p(1e5 - 15), 15 + math.log1p(1e5 - 15)], dtype=dtype)
    assert torch.allclose(value[[0, -1]].log(), wanted, rtol=1e-5)
    assert bool((slope > 0).all()) and torch.allclose(slope, 1 / (1 + far.detach().abs() - 15), rtol=1e-3)


@pytest.mark.parametrize("scale", SCALES[:3])
def test_the_density_is_torchs_at_the_scale_that_is_implied(scale):
    likelihood = Normal(torch.nn.Linear(2, 8 if scale == "network" else 4), scale, (4,), minimum_scale=0.01).double()
    z, x = torch.randn(7, 2, dtype=torch.float64) * 40, torch.randn(7, 4, dtype=torch.float64)
    output = likelihood.decoder(z)
    l = output[:, 4:] if scale == "network" else likelihood.log_scale  # noqa: E741
    sigma = 0.01 + torch.where(
        l > 15, math.exp(15) * (l - 14), torch.where(l < -15, math.exp(-15) / (-l - 14), l.exp())
    )
    wanted = torch.distributions.Normal(output[:, :4], sigma).log_prob(x).sum(-1)
    assert torch.allclose(likelihood(z).log_prob(x), wanted, rtol=1e-12)


def test_a_standardized_normal_is_the_normal_of_its_moments_and_keeps_more_digits():
    mu, sigma = torch.randn(5, 3, dtype=torch.float64), torch.rand(5, 3, dtype=torch.float64) + 0.1
    m, s = torch.tensor([0.0, 10.0, -3.0]).double(), torch.tensor([1.0, 5.0, 1e3]).double()
    ours = StandardizedNormal(mu, sigma, m, s)
    theirs = torch.distributions.Normal(m + s * mu, s * sigma)
    x = theirs.sample()
    assert torch.allclose(ours.log_prob(x), theirs.log_prob(x), rtol=1e-10)
    assert torch.allclose(ours.expand((2, 5, 3)).log_prob(x), theirs.log_prob(x).expand(2, 5, 3), rtol=1e-10)
    assert torch.equal(ours.mean, theirs.mean) and torch.equal(ours.stddev, theirs.stddev)
    one = torch.ones(())
    far = StandardizedNormal(0.003 * one, 0.001 * one, 1e6 * one, one)  # in float32 1e6 + 0.003 is 1e6
    wanted = torch.distributions.Normal(0.003 * one.double(), 0.001 * one.double()).log_prob(torch.zeros(()).double())
    assert far.log_prob(1e6 * one).item() == pytest.approx(wanted.item(), rel=1e-4)


def test_a_captured_step_of_a_standardized_pair_is_the_eager_one():
    x, found = people(100), []
    for compile in (False, "auto"):  # 520 steps, of which "auto" captures all but the first
        torch.manual_seed(1)
        vae = pv.VAE.build((4,), latent_dim=2, hidden=(8,), likelihood="normal", scale="network", standardize=True)
        found.append(quiet(vae.model, vae.guide, x, epochs=26, batch_size=5, compile=compile)["bound"])
    assert found[0] == pytest.approx(found[1], rel=1e-3)


def test_the_command_standardizes_tables_and_says_so(tmp_path, capsys):
    np.save(tmp_path / "people.npy", people(200).numpy())
    options = ["--epochs", "5", "--hidden", "16", "--latent-dim", "2", "--evaluation-samples", "50", "--compile", "off"]
    fit = ["fit", "--data", str(tmp_path / "people.npy"), "--out", str(tmp_path / "run"), *options]
    assert main(fit) == 0
    out, err = capsys.readouterr()
    assert "standardized: the networks see each of 4 numbers" in err and "columns standardized" in out
    run = Run.load(tmp_path / "run")
    assert run.config["standardize"] is True and run.summary["protocol"]["standardized"] is True
    assert run.vae().guide.standardize.measured.item()
    x = people(200)
    assert abs(run.summary["test_elbo"] - independent_normals(x)) < 5  # nats of x, where s alone is exp(15)
    assert main(["evaluate", str(tmp_path / "run"), "--json"]) == 0
    import json

    again = json.loads(capsys.readouterr().out)
    assert again["test_log_likelihood"] == pytest.approx(run.summary["test_log_likelihood"], abs=1e-6)
    for command in (["sample", str(tmp_path / "run"), "-n", "2", "--out", str(tmp_path / "drawn.npy")],
                    ["anomalies", str(tmp_path / "run")]):  # fmt: skip
        assert main(command) == 0
    assert np.load(tmp_path / "drawn.npy")[:, 1].min() > 1e3
    assert main([*fit[:3], "--out", str(tmp_path / "r2"), *options, "--standardize", "--likelihood", "poisson"]) == 2
    assert "got --standardize with --likelihood poisson" in capsys.readouterr().err


def test_the_command_leaves_a_table_alone_where_told(tmp_path):
    np.save(tmp_path / "small.npy", torch.randn(60, 4).numpy())
    assert main(["fit", "--data", str(tmp_path / "small.npy"), "--out", str(tmp_path / "run"), "--epochs", "2", "--hidden",
                 "8", "--latent-dim", "2", "--evaluation-samples", "50", "--no-standardize", "--quiet"]) == 0  # fmt: skip
    run = Run.load(tmp_path / "run")
    assert run.config["standardize"] is False and run.summary["protocol"]["standardized"] is False
    assert run.vae().guide.standardize is None


def test_pseudo_inputs_start_at_the_data_as_the_guide_sees_them(tmp_path):
    np.save(tmp_path / "people.npy", people(100).numpy())
    assert main(["fit", "--data", str(tmp_path / "people.npy"), "--out", str(tmp_path / "run"), "--epochs", "2", "--hidden",
                 "8", "--latent-dim", "2", "--evaluation-samples", "50", "--prior", "vamp", "--quiet"]) == 0  # fmt: skip
    vae = Run.load(tmp_path / "run").vae()
    assert vae.model.prior.pseudo_inputs.abs().max() < 35
    assert particles(vae.model, vae.guide, people(5)).log_weight.isfinite().all()


def large_counts() -> torch.Tensor:
    """Transcripts: columns of mean 0.5, 30, 800 and none, at another depth each."""
    generator = torch.Generator().manual_seed(0)
    depth = 0.5 + torch.rand(400, 1, generator=generator)
    return torch.poisson(torch.tensor([0.5, 30.0, 800.0, 0.0]) * depth, generator=generator)


@pytest.mark.parametrize("likelihood", ["poisson", "negative-binomial"])
def test_large_counts_fit_out_of_the_box_and_are_scored_as_they_are(likelihood, tmp_path):
    x = large_counts()
    vae = pv.VAE.build((4,), latent_dim=1, hidden=(32,), likelihood=likelihood)
    with pytest.warns(UserWarning, match=r"the counts are large .*log\(1 \+ x.*standardize=False\) leaves it out"):
        history = pv.fit(vae.model, vae.guide, x, epochs=40, batch_size=100, learning_rate=1e-2, seed=0, progress=False)
    assert torch.allclose(vae.guide.standardize.scale, torch.where(x.mean(0) > 0, x.mean(0), 1.0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it is settled: a second fit neither says nor moves it
        pv.fit(vae.model, vae.guide, x[:50], epochs=1, seed=0, progress=False)
    # Independent columns, each a Poisson of its mean, are what a model without z would come to.
    alone = torch.distributions.Poisson(x.mean(0).clamp(min=1e-6)).log_prob(x).sum(-1).mean()
    assert history["bound"][-1] > alone + 10
    z = torch.zeros(5, 1)
    with torch.no_grad():
        given_z = vae.model.likelihood(z)
        mean = torch.nn.functional.softplus(vae.model.likelihood.decoder(z)) * vae.guide.standardize.scale
        if likelihood == "poisson":
            wanted = torch.distributions.Poisson(mean)
        else:
            r = vae.model.likelihood.log_concentration.exp()
            wanted = torch.distributions.NegativeBinomial(r, logits=(mean / r).log())
        assert torch.allclose(given_z.log_prob(x[:5]), wanted.log_prob(x[:5]).sum(-1), rtol=1e-4)
        assert torch.allclose(given_z.mean, mean, rtol=1e-5)
    vae.save(tmp_path / "w.safetensors")
    again = pv.VAE.load(tmp_path / "w.safetensors")
    assert again.guide.standardize is again.model.likelihood.standardize
    assert torch.equal(again.guide.standardize.scale, vae.guide.standardize.scale)


def test_small_counts_and_levels_are_left_as_they_are():
    x = torch.poisson(torch.full((50, 4), 2.0), generator=torch.Generator().manual_seed(0))
    history = {}
    for standardize in (None, False):
        torch.manual_seed(0)
        vae = pv.VAE.build((4,), latent_dim=2, hidden=(8,), likelihood="poisson", standardize=standardize)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            history[standardize] = pv.fit(vae.model, vae.guide, x, epochs=3, seed=0, progress=False)["loss"]
    assert history[None] == history[False]
    levels = pv.VAE.build((4,), likelihood="poisson", likelihood_options={"levels": 256})
    assert levels.guide.standardize is None and levels.model.likelihood.standardize is None
