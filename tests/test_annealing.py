"""Annealed importance sampling and its bracket: closed forms, quadrature, frozen kernels, refusals."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor, nn

from pyro_vae.judging import annealing
from pyro_vae.judging.annealing import ais, bdmc
from pyro_vae.judging.components import simulated_batch
from pyro_vae.judging.grids import quadrature
from pyro_vae.judging.hamiltonian import schedule
from tests.pairs import LinearPair, linear_pair, small_pair


class GammaPair:
    """z1 ~ Gamma, z2 | z1 ~ Normal(0, z1), with a site of two dimensions beside: constrained, layered, plain."""

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            rate = pyro.sample("rate", dist.Gamma(x.new_tensor(2.0), 1.0))
            shift = pyro.sample("shift", dist.Normal(0.0, rate))
            pyro.sample("x", dist.Normal(shift, 0.5), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            rate = pyro.sample("rate", dist.LogNormal(0.4 * torch.ones_like(x), 0.6))
            pyro.sample("shift", dist.Normal(x * rate.square() / (rate.square() + 0.25), 0.5))

    def evidence(self, x: Tensor) -> Tensor:
        """log int Gamma(r; 2, 1) N(x; 0, r^2 + 1/4) dr by Simpson on a fine grid in log r."""
        t = torch.linspace(-12, 5, 20001, dtype=torch.float64)
        rate = t.exp()[:, None]
        log_f = dist.Gamma(2.0, 1.0).log_prob(rate) + dist.Normal(0.0, (rate**2 + 0.25).sqrt()).log_prob(x) + t[:, None]
        return torch.trapezoid(log_f.exp(), t, dim=0).log()


def within(value: Tensor, truth: Tensor, stderr: Tensor) -> bool:
    return bool(((value - truth).abs() < 4 * stderr + 1e-9).all())


def mean_weight(log_weight: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """Mean of w / p(x) over chains with its standard error, per datum."""
    ratio = (log_weight - truth).exp()
    return ratio.mean(0), ratio.std(0) / math.sqrt(len(ratio))


@pytest.mark.parametrize("start", ["guide", "prior"])
def test_weights_are_unbiased_on_a_path_of_three_steps(start):
    pair, x = linear_pair(stretch=1.3)
    x = x[:4]
    settings = {"num_steps": 3, "num_samples": 20_000, "num_leapfrog": 2, "schedule": "sigmoid", "start": start}
    result = ais(pair.model, pair.guide, x, **settings)
    mean, stderr = mean_weight(result.log_weight, pair.bed.log_evidence(x))
    assert within(mean, torch.ones(4), stderr)
    assert stderr.max() < (0.02 if start == "guide" else 0.3)


@pytest.mark.parametrize("kind", ["linear", "sigmoid", "adaptive"])
@pytest.mark.parametrize("start", ["guide", "prior"])
def test_it_gives_the_evidence_of_the_linear_model(start, kind):
    pair, x = linear_pair(exact=False)
    result = ais(pair.model, pair.guide, x, start=start, schedule=kind, num_steps=60, num_samples=30)
    truth = pair.bed.log_evidence(x)
    assert abs(result.value - result.bias - truth.mean().item()) < 4 * result.mc_stderr
    assert result.mc_stderr < 0.05
    assert result.value == pytest.approx(result.pointwise.mean().item())
    assert 0.6 < result.acceptance.mean() < 0.9
    assert (result.ess > 1).all() and (result.ess <= 30 + 1e-9).all()


def test_from_the_exact_posterior_every_weight_is_the_evidence():
    pair, x = linear_pair()
    result = ais(pair.model, pair.guide, x, num_steps=7, num_samples=5)
    assert (result.log_weight - pair.bed.log_evidence(x)).abs().max() < 1e-8
    assert result.mc_stderr < 1e-6 and abs(result.bias) < 1e-8
    bracket = bdmc(pair.model, pair.guide, x, num_steps=7, num_samples=5)
    assert abs(bracket.width.value) < 1e-8


def test_one_step_is_importance_sampling():
    pair, x = linear_pair(stretch=1.3)
    result = ais(pair.model, pair.guide, x, num_steps=1, num_samples=4000)
    mean, stderr = mean_weight(result.log_weight, pair.bed.log_evidence(x))
    assert within(mean, torch.ones(len(x)), stderr)
    assert result.acceptance.isnan().all()


@pytest.mark.parametrize("start", ["guide", "prior"])
def test_the_bracket_contains_the_evidence(start):
    pair, x = linear_pair(stretch=0.8)
    x = x.repeat(4, 1)
    bracket = bdmc(pair.model, pair.guide, x, num_data=120, start=start, num_steps=30, num_samples=8, num_leapfrog=2)
    truth = pair.bed.log_evidence(bracket.data[0])
    below, above = truth - bracket.lower.pointwise, bracket.upper.pointwise - truth
    for gap in (below, above, bracket.upper.pointwise - bracket.lower.pointwise):
        assert gap.mean() > -4 * gap.std() / math.sqrt(120)
    assert abs(bracket.lower.value - bracket.lower.bias - truth.mean()) < 4 * bracket.lower.mc_stderr
    assert bracket.width.value < 0.2
    assert str(bracket).startswith(f"[{bracket.lower.value:.2f}, ") and "nats (width" in str(bracket)


@pytest.mark.parametrize(
    "start, num_steps", [("guide", 6), pytest.param("prior", 40, marks=pytest.mark.slow)]
)  # from the prior fewer are too heavy-tailed
def test_backward_weights_are_unbiased_for_the_inverse(start, num_steps):
    """E[1 / w_r] = 1 / p(x), over draws of (z, x): the mean of p(x) / w_r is one."""
    pair, x = linear_pair(stretch=0.8)
    x = x.repeat(100, 1)
    settings = {"num_steps": num_steps, "num_samples": 2, "num_leapfrog": 2, "start": start}
    bracket = bdmc(pair.model, pair.guide, x, num_data=3000, **settings)
    ratio = (pair.bed.log_evidence(bracket.data[0]) - bracket.backward_log_weight).exp().mean(0)
    stderr = ratio.std() / math.sqrt(3000)
    assert abs(ratio.mean() - 1) < 4 * stderr < 0.3
    above = bracket.upper.pointwise - pair.bed.log_evidence(bracket.data[0])
    assert above.mean() > 4 * above.std() / math.sqrt(3000)  # strictly above on so short a path


def test_the_width_closes_with_the_number_of_steps():
    pair, x = linear_pair(exact=False)
    widths = [bdmc(pair.model, None, x, start="prior", num_steps=n, num_samples=8).width for n in (5, 80)]
    assert widths[0].value > widths[1].value + 4 * math.hypot(widths[0].data_stderr, widths[1].data_stderr)
    assert widths[1].value < 0.15


def test_kernels_do_not_depend_on_the_scored_chains():
    pair, x = linear_pair(exact=False)
    settings = {"num_steps": 12, "num_samples": 4}
    first, second = (ais(pair.model, pair.guide, x, seed=s, **settings) for s in (0, 1))
    many = ais(pair.model, pair.guide, x, seed=2, num_steps=12, num_samples=9)
    assert not torch.equal(first.log_weight, second.log_weight)
    for other in (second, many):
        for a, b in zip(first.kernels[0], other.kernels[0], strict=True):
            assert torch.equal(torch.as_tensor(a), torch.as_tensor(b))
    again = ais(pair.model, pair.guide, x, seed=0, **settings)
    assert torch.equal(first.log_weight, again.log_weight)
    tuned = ais(pair.model, pair.guide, x, seed=0, pilot_seed=5, **settings)
    assert not torch.equal(tuned.kernels[0].step_size, first.kernels[0].step_size)


def test_the_moves_get_the_frozen_kernels_forward_and_backward(monkeypatch):
    pair, x = linear_pair(exact=False)
    used = []

    def spy(self, state, mixture, step_size, scale):
        used.append((mixture.clone(), step_size.clone(), scale.clone()))
        return original(self, state, mixture, step_size, scale)

    original = annealing.Moves.__call__
    monkeypatch.setattr(annealing.Moves, "__call__", spy)
    bracket = bdmc(pair.model, pair.guide, x, num_steps=9, num_samples=4)
    (kernels,) = bracket.lower.kernels
    assert len(used) == 18 + 16  # those of the pilot come first
    forward, backward = used[18:26], used[26:]
    for there, back in zip(forward, reversed(backward), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(there, back, strict=True))
    assert torch.equal(torch.stack([step for _, step, _ in forward]), kernels.step_size)


@pytest.mark.parametrize("start", ["guide", "prior"])
def test_constrained_and_layered_sites_against_quadrature(start):
    pair = GammaPair()
    x = torch.tensor([-1.0, 0.3, 4.0], dtype=torch.float64)
    short = ais(pair.model, pair.guide, x, start=start, num_steps=3, num_samples=20_000, num_leapfrog=2)
    mean, stderr = mean_weight(short.log_weight, pair.evidence(x))
    assert within(mean, torch.ones(3), stderr)
    assert stderr.max() < 0.1
    long = ais(pair.model, pair.guide, x, start=start, num_steps=60, num_samples=50)
    assert within(long.pointwise, pair.evidence(x), long.pointwise_stderr)
    # So long that where the chains go, and with it the Jacobian, decides.
    assert long.pointwise_stderr.max() < 0.15


def test_inner_plates_and_sites_called_anything():
    """Two local latents per datum in a plate of their own, and one shared: again linear-Gaussian."""

    def model(x):
        with pyro.plate("rows", len(x), dim=-2):
            common = pyro.sample("what ever", dist.Normal(x.new_zeros(1), 1.0))
            with pyro.plate("pixels", 2, dim=-1):
                local = pyro.sample("local", dist.Normal(0.5 * common, 1.0))
                pyro.sample("seen", dist.Normal(local, 0.5), obs=x)

    def guide(x):
        with pyro.plate("rows", len(x), dim=-2):
            common = pyro.sample("what ever", dist.Normal(0.3 * x.sum(-1, keepdim=True), 0.9))
            with pyro.plate("pixels", 2, dim=-1):
                pyro.sample("local", dist.Normal(0.7 * x + 0.1 * common, 0.6))

    x = torch.tensor([[0.4, -1.0], [2.0, 1.0], [0.0, 0.0]], dtype=torch.float64)
    covariance = torch.full((2, 2), 0.25, dtype=torch.float64) + 1.25 * torch.eye(2, dtype=torch.float64)
    truth = dist.MultivariateNormal(torch.zeros(2, dtype=torch.float64), covariance).log_prob(x)
    for start in ("guide", "prior"):
        result = ais(model, guide, x, start=start, num_steps=4, num_samples=10_000, num_leapfrog=2)
        mean, stderr = mean_weight(result.log_weight, truth)
        assert within(mean, torch.ones(3), stderr) and stderr.max() < 0.1
    bracket = bdmc(model, guide, x, num_steps=20)
    truth = dist.MultivariateNormal(torch.zeros(2, dtype=torch.float64), covariance).log_prob(bracket.data[0])
    assert (truth - bracket.lower.pointwise).abs().max() < 0.2


def test_batches_do_not_matter(monkeypatch):
    """The same datum beside others, and in chunks: the same number within errors."""
    pair, x = linear_pair(exact=False)
    settings = {"num_steps": 20, "num_samples": 200}
    alone = ais(pair.model, pair.guide, x[:1], **settings)
    together = ais(pair.model, pair.guide, x, **settings)
    error = math.hypot(alone.pointwise_stderr[0], together.pointwise_stderr[0])
    assert abs(alone.pointwise[0] - together.pointwise[0]) < 4 * error
    monkeypatch.setattr("pyro_vae.judging.sweeps._CHUNK", 7 * 512 * 200)
    chunked = ais(pair.model, pair.guide, x, **settings)
    assert len(chunked.kernels) == 5 and chunked.pointwise.shape == (30,)
    assert abs(chunked.value - together.value) < 4 * math.hypot(chunked.mc_stderr, together.mc_stderr)


def test_a_vae_in_single_precision_from_both_ends():
    model, guide = small_pair()
    x = (torch.rand(24, 1, 4, 4, generator=torch.Generator().manual_seed(0)) < 0.5).float()
    from_guide = bdmc(model, guide, x, num_steps=20)
    from_prior = bdmc(model, None, x, start="prior", num_steps=60)
    assert torch.equal(from_guide.data[0], from_prior.data[0])  # one seed, one simulation
    assert from_guide.data[0].unique().tolist() == [0.0, 1.0]
    for bracket in (from_guide, from_prior):
        assert -4 * bracket.width.data_stderr < bracket.width.value < 0.1
    assert (
        from_guide.lower.value < from_prior.upper.value + 0.02
        and from_prior.lower.value < from_guide.upper.value + 0.02
    )
    few = bdmc(model, guide, x, num_data=10, num_steps=20)
    assert len(few.upper.pointwise) == len(few.lower.pointwise) == len(few.data[0]) == 10
    assert all(p.grad is None for p in model.parameters())


class PyrosExample(nn.Module):
    """The shape of the VAE that Pyro's documentation publishes: two methods, pyro.module, grey pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(16, 8), nn.Softplus(), nn.Linear(8, 4))
        self.decoder = nn.Sequential(nn.Linear(2, 8), nn.Softplus(), nn.Linear(8, 16), nn.Sigmoid())

    def model(self, x):
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", x.shape[0]):
            loc = torch.zeros(x.shape[0], 2, dtype=x.dtype, device=x.device)
            z = pyro.sample("latent", dist.Normal(loc, torch.ones_like(loc)).to_event(1))
            image = self.decoder(z)
            pyro.sample("obs", dist.Bernoulli(image, validate_args=False).to_event(1), obs=x.reshape(-1, 16))

    def guide(self, x):
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", x.shape[0]):
            loc, log_scale = self.encoder(x.reshape(-1, 16)).chunk(2, -1)
            pyro.sample("latent", dist.Normal(loc, log_scale.exp()).to_event(1))


@pytest.mark.filterwarnings(
    "ignore:site 'obs' is Bernoulli but its data have grey values"
)  # Pyro's example does not binarise
def test_pyros_own_example_unmodified():
    torch.manual_seed(0)
    vae = PyrosExample()
    grey = torch.rand(10, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    result = ais(vae.model, vae.guide, grey, num_steps=20)
    grid = quadrature(vae.model, vae.guide, grey)
    assert within(result.pointwise, grid.log_evidence, result.pointwise_stderr + 1e-4)
    bracket = bdmc(vae.model, vae.guide, grey, num_steps=20)
    assert bracket.data[0].shape == grey.shape and set(bracket.data[0].unique().tolist()) == {0.0, 1.0}
    exact = quadrature(vae.model, vae.guide, bracket.data[0])
    assert within(bracket.lower.pointwise, exact.log_evidence, bracket.lower.pointwise_stderr + 1e-4)
    assert abs(bracket.upper.value - exact.log_evidence.mean()) < 0.05
    assert len(pyro.get_param_store()) == 0


def test_schedules():
    for name in ("linear", "sigmoid"):
        beta = schedule(name, 10)
        assert beta[0] == 0 and beta[-1] == 1 and (beta.diff() > 0).all()
        assert torch.allclose(beta + beta.flip(0), torch.ones(11, dtype=torch.float64))
    pair, x = linear_pair(exact=False)
    (kernels,) = ais(pair.model, pair.guide, x, start="prior", num_steps=40, num_samples=2).kernels
    assert kernels.beta.shape == (41, 30) and (kernels.beta.diff(dim=0) > 0).all()
    # Equal thermodynamic length: from the prior nearly all of it lies near b = 0.
    assert (kernels.beta[20] < 0.4).all()


def test_a_foreign_model_says_which_argument_is_the_data():
    def flattening(image):
        with pyro.plate("data", len(image)):
            z = pyro.sample("latent", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            logits = z.sum(-1, keepdim=True).expand(*z.shape[:-1], 4)
            pyro.sample("obs", dist.Bernoulli(logits=logits, validate_args=False).to_event(1), obs=image.reshape(-1, 4))

    grey = torch.full((6, 2, 2), 0.3)
    (image,), latents = simulated_batch(flattening, (grey,))
    assert (
        image.shape == grey.shape and set(image.unique().tolist()) <= {0.0, 1.0} and latents["latent"].shape == (6, 2)
    )

    def binarizing(image, label):
        with pyro.plate("data", len(image)):
            z = pyro.sample("z", dist.Normal(label, 1.0))
            pyro.sample("pixel", dist.Bernoulli(logits=z), obs=(image > 0.5).float())

    image, label = torch.full((5,), 0.7), torch.zeros(5)
    with pytest.raises(ValueError, match=r"site 'pixel' .* none did. Say which .*observed=\{'pixel': 0\}"):
        bdmc(binarizing, None, (image, label), start="prior", num_steps=3)
    bracket = bdmc(binarizing, None, (image, label), start="prior", num_steps=30, observed={"pixel": 0})
    truth = torch.full((5,), math.log(0.5))
    assert (bracket.lower.pointwise - truth).abs().max() < 0.1
    assert torch.equal(bracket.data[1], label)
    with pytest.raises(ValueError, match=r"those at \[0, 1\] did"):
        simulated_batch(lambda x, y: binarizing(x, y), (torch.ones(5), torch.ones(5)))
    with pytest.raises(ValueError, match="wanted one of the model's data sites"):
        simulated_batch(binarizing, (image, label), {"x": 0})


def test_refusals_name_the_site_and_the_remedy():
    pair, x = linear_pair()

    def discrete(x):
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Bernoulli(0.5).expand([len(x)]))
            pyro.sample("x", dist.Normal(k, 1.0), obs=x[:, 0])

    with pytest.raises(ValueError, match="latent site 'k' .* Sum it out"):
        ais(discrete, None, x, start="prior")

    def point(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Delta(pair.bed.posterior(x).mean).to_event(1))

    with pytest.raises(ValueError, match="guide site 'z' is a point .* start=\"prior\""):
        ais(pair.model, point, x)

    def auxiliary(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x[:, :3], 1.0).to_event(1))
            pyro.sample("noise", dist.Normal(x[:, 0], 1.0), infer={"is_auxiliary": True})

    with pytest.raises(ValueError, match="guide site 'noise' is none of the model's latent sites"):
        ais(pair.model, auxiliary, x)

    transform = dist.transforms.Planar(3).double()

    def planar(x):
        start = dist.Normal(x.new_zeros(len(x), 3), 1.0).to_event(1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.TransformedDistribution(start, [transform]))

    with pytest.raises(ValueError, match="rescoring is impossible.*Anneal from the prior"):
        ais(pair.model, planar, x)

    class Dropout(nn.Module):
        def forward(self, x):
            noise = torch.randn_like(x[:, :3])
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(noise, 0.1).to_event(1))

    with pytest.raises(
        ValueError, match="differently a second time, though the guide.s networks are in evaluation mode"
    ):
        ais(pair.model, Dropout(), x)

    def noisy(x):
        with poutine.block():
            shift = torch.randn(())
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(3), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1) + shift, 0.1), obs=x[:, 0])

    with pytest.raises(ValueError, match="site .x. of the model .*noise that no site knows of.*latent site"):
        ais(noisy, None, x, start="prior")
    for setting, text in (
        ({"num_samples": 0}, "num_samples must be a positive integer, got 0"),
        ({"schedule": "cosine"}, "schedule='cosine', wanted one of"),
        ({"start": "posterior"}, "start='posterior', wanted 'guide' or 'prior'"),
        ({"pilot_chains": 1}, "wanted at least 2"),
        ({"target_acceptance": 1.5}, "wanted a probability"),
    ):
        with pytest.raises(ValueError, match=text):
            ais(pair.model, pair.guide, x, **setting)
    with pytest.raises(ValueError, match="start='guide' without a guide"):
        ais(pair.model, None, x)


def test_a_pair_that_does_not_broadcast_runs_chain_by_chain():
    pair = LinearPair(linear_pair()[0].bed, exact=False)

    def stubborn(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(3), 1.0).to_event(1))
            if z.dim() != 2:
                raise ValueError("wanted (B, D)")
            pyro.sample("x", dist.Normal(z @ pair.bed.weight.T + pair.bed.loc, pair.bed.scale).to_event(1), obs=x)

    x = linear_pair()[1][:5]
    with pytest.warns(UserWarning, match="one by one"):
        result = ais(stubborn, pair.guide, x, num_steps=8, num_samples=6)
    assert within(result.pointwise, pair.bed.log_evidence(x), result.pointwise_stderr.clamp(min=0.02))
