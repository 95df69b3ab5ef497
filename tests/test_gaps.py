"""The inference gap and its two parts, against closed forms and quadrature; guides under a frozen model."""

import functools
import math
from types import SimpleNamespace

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.distributions import kl_divergence

from pyro_vae.data.testbeds import LinearGaussian
from pyro_vae.inference.bounds import iwae
from pyro_vae.inference.objectives import Objective
from pyro_vae.inference.training import fit
from pyro_vae.judging._gaps import gap_table, gaps
from pyro_vae.judging.climbs import optimise, remaining
from pyro_vae.judging.estimates import log_likelihood
from pyro_vae.judging.guides import compare_guides, fit_guide
from pyro_vae.judging.local import local_form
from pyro_vae.judging.weights import given_estimate, pool, rescores, score
from pyro_vae.parts.posteriors.amortized import Amortized, DiagonalNormal, FullNormal, NormalMixture
from pyro_vae.parts.posteriors.flow import IAF, NSF, Coupling
from pyro_vae.parts.posteriors.planar import Planar, Sylvester
from pyro_vae.programs.hamiltonian import Hamiltonian
from pyro_vae.programs.pair import Guide
from pyro_vae.traces import draw
from tests.pairs import LinearPair, binary, linear_pair, small_pair

QUICK = {"window": 30, "num_steps": 600, "learning_rate": 0.05, "progress": False}


def correlated(size=6):
    """A two-dimensional posterior of correlation 0.8 or so."""
    bed = LinearGaussian(torch.tensor([[1.5, 1.2], [0.2, 0.5], [1.0, 0.3]]).double(), torch.zeros(3).double(), 0.7)
    _, x = bed.sample(size, generator=torch.Generator().manual_seed(1))
    return LinearPair(bed), x


def within(part, truth, times=4.0):
    """The mean and every datum within so many of their own errors (and a rounding)."""
    truth = torch.as_tensor(truth, dtype=torch.float64).expand_as(part.pointwise)
    pointwise = ((part.pointwise - truth).abs() <= times * part.pointwise_stderr + 1e-9).all()
    return bool(pointwise) and abs(part.value - truth.mean().item()) <= times * part.mc_stderr + 1e-9


def gaussian_guide(bed, shift=0.0, stretch=1.0, full=True):
    def guide(x):
        posterior, best = bed.posterior(x), bed.best_mean_field(x)
        with pyro.plate("data", len(x)):
            if full:
                tril = posterior.scale_tril * stretch
                pyro.sample("z", dist.MultivariateNormal(posterior.mean + shift, scale_tril=tril))
            else:
                pyro.sample("z", dist.Normal(best.mean + shift, best.stddev * stretch).to_event(1))

    return guide


def test_a_mean_field_guide_at_its_best_has_an_approximation_gap_only():
    pair, x = correlated()
    found = gaps(pair.model, gaussian_guide(pair.bed, full=False), x, num_samples=1500, **QUICK)
    row = found.families["guide"]
    gap = pair.bed.mean_field_gap().item()
    assert gap > 0.3
    assert within(row.approximation, gap) and within(row.inference, gap) and within(row.amortization, 0.0)
    assert row.approximation.mc_stderr < 0.05
    # The mean field is narrower than the posterior: its weights have heavy tails, and their errors are too small.
    assert within(found.log_likelihood, pair.bed.log_evidence(x), times=8.0)
    assert "guide (local)" in found.source and row.stopped.all()


def test_a_bad_encoder_of_the_right_family_has_an_amortization_gap_only():
    pair, x = correlated()
    posterior = pair.bed.posterior(x)
    shift = torch.tensor([0.4, -0.3]).double()
    bad = dist.MultivariateNormal(posterior.mean + shift, scale_tril=posterior.scale_tril * 0.7)
    truth = kl_divergence(bad, posterior)
    found = gaps(pair.model, gaussian_guide(pair.bed, shift, 0.7), x, num_samples=1500, **QUICK)
    row = found.families["guide"]
    assert truth.min() > 0.4
    assert within(row.amortization, truth) and within(row.approximation, 0.0) and within(row.inference, truth)
    # The pooled weights rest on the local optimum: the bad encoder costs them samples and no more.
    assert within(found.log_likelihood, pair.bed.log_evidence(x)) and found.log_likelihood.mc_stderr < 0.01
    assert (row.optimum.pointwise - pair.bed.log_evidence(x)).abs().max() < 5e-3


def test_both_at_once_add_up():
    pair, x = correlated()
    shift = torch.tensor([0.3, 0.2]).double()
    truth = pair.bed.mean_field_gap()
    best = pair.bed.best_mean_field(x)
    tril = torch.diag_embed(best.stddev * 1.5)
    total = pair.bed.log_evidence(x) - pair.bed.elbo(x, best.mean + shift, tril)
    found = gaps(pair.model, gaussian_guide(pair.bed, shift, 1.5, full=False), x, num_samples=1500, **QUICK)
    row = found.families["guide"]
    assert within(row.approximation, truth) and within(row.amortization, total - truth) and within(row.inference, total)
    both = row.approximation.pointwise + row.amortization.pointwise
    assert torch.allclose(both, row.inference.pointwise, atol=1e-12)
    assert row.inference.value == pytest.approx(row.approximation.value + row.amortization.value, abs=1e-12)
    assert torch.allclose(found.log_likelihood.pointwise - row.amortized.pointwise, row.inference.pointwise)


@pytest.mark.parametrize("start", ["guide", "fresh"])
def test_other_families_start_at_the_guide_or_afresh(start):
    pair, x = correlated(4)
    families = {"diagonal": DiagonalNormal, "full": FullNormal}
    options = QUICK | {"start": start}
    guide = gaussian_guide(pair.bed, 0.2, full=False)
    found = gaps(pair.model, guide, x, families=families, num_samples=1500, **options)
    gap = pair.bed.mean_field_gap()
    assert list(found.families) == ["guide", "diagonal", "full"]
    assert within(found.families["diagonal"].approximation, gap) and within(found.families["full"].approximation, 0.0)
    assert found.families["full"].amortized is None and "without an encoder" in found.families["full"].reason
    assert (found.families["full"].optimum.pointwise - pair.bed.log_evidence(x)).abs().max() < 1e-2


def test_a_linear_model_by_modules_and_fitted_guides_under_it():
    pair, x = linear_pair()
    torch.manual_seed(0)
    encoder = nn.Linear(6, 8)
    diagonal, full = (Guide(family(encoder, 3)).double() for family in (DiagonalNormal, FullNormal))
    _, many = pair.bed.sample(512, generator=torch.Generator().manual_seed(3))
    for guide in (diagonal, full):
        fit_guide(pair.model, guide, many, epochs=30, learning_rate=0.03, seed=0, progress=False)
    found = gaps(pair.model, diagonal, x[:5], families={"full": full, "diagonal": diagonal}, num_samples=2000, **QUICK)
    assert list(found.families) == ["diagonal", "full"]
    rows = found.families
    assert within(rows["diagonal"].approximation, pair.bed.mean_field_gap())
    assert within(rows["full"].approximation, 0.0)
    for name, guide in {"diagonal": diagonal, "full": full}.items():
        q = guide.posterior(x[:5])
        tril = torch.diag_embed(q.stddev) if name == "diagonal" else q.scale_tril
        bound = pair.bed.elbo(x[:5], q.mean, tril).detach()
        assert within(rows[name].amortized, bound)
        assert within(rows[name].inference, pair.bed.log_evidence(x[:5]) - bound)


BEND = torch.linspace(-7, 7, 701).double()


def banana():
    """x ~ N(z_2 + z_1^2 / 2, 0.3^2) with a standard normal prior: a bent posterior, and its log p(x) on a grid."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z[..., 1] + z[..., 0] ** 2 / 2, 0.3), obs=x)

    x = torch.tensor([0.5, 1.5]).double()
    z1, z2 = torch.meshgrid(BEND, BEND, indexing="ij")
    prior = dist.Normal(0.0, 1.0).log_prob(z1) + dist.Normal(0.0, 1.0).log_prob(z2)
    joint = prior + dist.Normal(z2 + z1**2 / 2, 0.3).log_prob(x[:, None, None])
    step = math.log(BEND[1] - BEND[0]) * 2
    return model, x, joint.flatten(1).logsumexp(1) + step


@pytest.mark.slow
def test_a_flow_of_its_own_weights_bends_where_a_normal_cannot():
    model, x, evidence = banana()

    class Encoder(nn.Linear):
        def forward(self, x):
            return super().forward(x[:, None])

    torch.manual_seed(0)
    flow = Guide(Coupling(Encoder(1, 4), 2, transforms=3, hidden_features=(16, 16), context=2)).double()
    options = {"num_samples": 2000, "num_steps": 1500, "window": 150, "learning_rate": 0.05, "progress": False}
    found = gaps(model, flow, x, families={"full": FullNormal}, **options)
    assert within(found.log_likelihood, evidence)
    bent, normal = found.families["guide"], found.families["full"]
    assert normal.approximation.value > 0.3
    assert bent.approximation.value < 0.4 * normal.approximation.value
    for row in (bent, normal):  # no bound is above the evidence
        assert (row.optimum.pointwise <= evidence + 4 * row.optimum.pointwise_stderr).all()
    assert within(bent.inference, evidence - bent.amortized.pointwise)


def families(encoder):
    yield DiagonalNormal(encoder, 3)
    yield FullNormal(encoder, 3)
    yield NormalMixture(encoder, 3, 2)
    yield Planar(encoder, 3, 2)
    yield Sylvester(encoder, 3, 2, kind="householder")
    yield Coupling(encoder, 3, transforms=2, hidden_features=(8,), context=2)
    yield NSF(encoder, 3, transforms=1, hidden_features=(8,), context=2)
    yield IAF(encoder, 3, transforms=2, hidden_features=(8,), context=2)


@pytest.mark.parametrize("number", range(8))
def test_local_forms_start_as_the_guide_and_keep_data_apart(number):
    torch.manual_seed(0)
    model, _ = small_pair()
    posterior = list(families(nn.Sequential(nn.Flatten(-3), nn.Linear(16, 4))))[number]
    guide, x = Guide(posterior), binary(5)
    form = local_form(guide, (x,))
    tables = []
    moved = form.start.clone()
    moved[2] += 0.1
    for program in (guide, form.guide(form.start), form.guide(moved)):
        torch.manual_seed(1)
        tables.append(draw(model, program, (x,), {}, 3).log_weight)
    assert torch.allclose(tables[0], tables[1], atol=1e-5)
    changed = (tables[2] - tables[1]).abs().amax(0) > 1e-4
    assert changed.tolist() == [False, False, True, False, False]
    rows = form.start.clone().requires_grad_()
    draw(model, form.guide(rows), (x,), {}, 4).log_weight[:, 2].sum().backward()
    assert rows.grad[[0, 1, 3, 4]].abs().max() == 0 and (rows.grad[2] != 0).double().mean() > 0.5
    near = posterior.parameters_near(torch.full((5, 3), 2.0), torch.full((5, 3), 0.5))
    draws = posterior.family(near).rsample((4000,))
    assert (draws.mean(0) - 2).abs().max() < 0.5 and (draws.std(0) - 0.5).abs().max() < 0.3


def two_sites(dependent):
    """Two latents, one of them positive: x ~ N(a, 1), a ~ N(0, 1); y ~ Exponential(rate), rate ~ Gamma(2, 1)."""

    def model(x, y):
        with pyro.plate("rows", len(x)):
            a = pyro.sample("a", dist.Normal(torch.zeros(()).double(), 1.0))
            rate = pyro.sample("rate", dist.Gamma(torch.full((), 2.0).double(), 1.0))
            pyro.sample("seen", dist.Normal(a, 1.0), obs=x)
            pyro.sample("time", dist.Exponential(rate), obs=y)

    def guide(x, y):
        with pyro.plate("rows", len(x)):
            a = pyro.sample("a", dist.Normal(0.3 * x, 1.0))
            pull = 0.3 * a if dependent else 0.0
            pyro.sample("rate", dist.Gamma((pull + torch.ones_like(y)).exp(), 2.0 + y))

    return model, guide


@pytest.mark.parametrize("dependent", [False, True])
def test_a_plain_guide_of_two_sites_one_of_them_positive(dependent):
    model, guide = two_sites(dependent)
    x, y = torch.tensor([-1.0, 0.5, 2.0]).double(), torch.tensor([0.2, 1.0, 3.0]).double()
    evidence = dist.Normal(0.0, 2**0.5).log_prob(x) + (2 / (1 + y) ** 3).log()  # of a Gamma(2, 1) mixture
    found = gaps(model, guide, (x, y), num_samples=1500, **QUICK)
    row = found.families["guide"]
    assert within(found.log_likelihood, evidence)
    assert row.inference.value > 0.15
    if dependent:  # what makes the later site depend on the earlier one is part of the family
        assert 0 < row.approximation.value < 0.5 * row.inference.value
    else:
        assert within(row.approximation, 0.0) and row.approximation.value < 0.01
    assert within(row.inference, evidence - row.amortized.pointwise)


def test_inner_plates_and_a_plate_of_the_whole_set():
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).double()

    def model(x):
        with pyro.plate("data", 1000, subsample_size=len(x), dim=-2), pyro.plate("pixels", 3, dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(()).double(), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", 1000, subsample_size=len(x), dim=-2), pyro.plate("pixels", 3, dim=-1):
            pyro.sample("z", dist.Normal(x / 2 + 0.3, 0.5**0.5))

    found = gaps(model, guide, x, num_samples=2000, **QUICK)
    row = found.families["guide"]
    truth = 3 * 0.3**2 / (2 * 0.5)
    assert within(row.amortization, truth) and within(row.approximation, 0.0)
    assert within(found.log_likelihood, dist.Normal(0.0, 2**0.5).log_prob(x).sum(1))


def test_what_has_no_local_form_has_its_total_gap_and_the_reason():
    pair, x = correlated(4)
    base = gaussian_guide(pair.bed, 0.3, full=False)
    found = gaps(pair.model, Hamiltonian(pair.model, base, num_steps=2, step_size=0.1), x, num_samples=500, **QUICK)
    row = found.families["guide"]
    assert row.approximation is None and row.amortization is None and row.optimum is None
    assert "Delta" in row.reason and row.reason in str(found)
    assert row.inference.value > 0 and "higher mean over the data" in found.source

    def discrete_model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(0.5))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def discrete_guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(torch.full_like(x, 0.4)))

    x = torch.tensor([0.2, 0.8])
    found = gaps(discrete_model, discrete_guide, x, num_samples=1500, **QUICK)
    evidence = torch.stack([dist.Normal(float(z), 1.0).log_prob(x) + math.log(0.5) for z in (0, 1)]).logsumexp(0)
    assert within(found.log_likelihood, evidence)
    assert "not reparameterised" in found.families["guide"].reason and found.families["guide"].approximation is None


def test_too_few_steps_are_owned_up_to():
    pair, x = correlated()
    guide = gaussian_guide(pair.bed, 2.0)
    truth = pair.bed.log_evidence(x)
    for steps in (40, 120):
        options = {"num_samples": 1000, "num_steps": steps, "window": 20, "progress": False, "learning_rate": 0.02}
        row = gaps(pair.model, guide, x, log_likelihood=exactly(truth), **options).families["guide"]
        short = truth - row.optimum.pointwise
        assert short.min() > 0.05 and not row.stopped.any()
        assert (short <= row.optimum.pointwise_stderr + 0.05).all()
        assert abs(row.approximation.value) <= row.approximation.mc_stderr
        assert (row.slope > 0).all() and (row.steps <= steps).all()
    assert "nats may remain" in str(gaps(pair.model, guide, x, **QUICK))


def exactly(pointwise):
    return SimpleNamespace(pointwise=pointwise, pointwise_stderr=torch.zeros_like(pointwise))


def test_what_remains_of_a_geometric_climb_is_its_sum():
    noise = torch.randn(400, 1, generator=torch.Generator().manual_seed(0)).double()
    climb = [noise - 0.5**t for t in (6, 5, 4)]  # at one noise, as a common seed gives
    left, slope = remaining(*climb)
    assert left.item() == pytest.approx(0.5**6, rel=1e-6) and slope.item() == pytest.approx(0.5**6)
    flat = [torch.randn(400, 1, generator=torch.Generator().manual_seed(s)).double() for s in (1, 2, 3)]
    left, _ = remaining(*flat)
    assert 0 < left.item() < 0.3  # nothing but noise remains, and is counted as that


def test_an_estimate_from_elsewhere_is_taken_with_its_errors():
    pair, x = correlated(5)
    guide = gaussian_guide(pair.bed, 0.2)
    estimate = log_likelihood(pair.model, guide, x, num_samples=500)
    pointwise, stderr = given_estimate(estimate, 5)
    assert torch.equal(pointwise, estimate.pointwise)
    assert stderr.square().sum().sqrt().item() / 5 == pytest.approx(estimate.mc_stderr)
    found = gaps(pair.model, guide, x, log_likelihood=estimate, num_samples=500, **QUICK)
    assert found.source == "given" and math.isnan(found.khat_ok)
    assert torch.equal(found.log_likelihood.pointwise, estimate.pointwise)
    assert found.log_likelihood.mc_stderr == pytest.approx(estimate.mc_stderr)
    with pytest.raises(ValueError, match="log_likelihood of 5 data, wanted the same 3 data"):
        gaps(pair.model, guide, x[:3], log_likelihood=estimate, **QUICK)
    with pytest.raises(ValueError, match="log_likelihood=float, wanted values and errors per datum"):
        compare_guides(pair.model, {"q": guide}, x, log_likelihood=-3.0, progress=False)


def test_chunks_seeds_and_the_model_left_as_it_was(monkeypatch):
    import pyro_vae.judging.sweeps as module

    model, guide = small_pair()
    x = binary(7)
    model.train()
    before = [p.clone() for m in (model, guide) for p in m.parameters()]
    state = torch.random.get_rng_state()
    options = {"num_samples": 200, "window": 20, "num_steps": 100, "progress": False}
    once, again = (gaps(model, guide, x, families={"full": FullNormal}, **options) for _ in range(2))
    assert str(once) == str(again) and torch.equal(torch.random.get_rng_state(), state)
    assert all(
        torch.equal(a, b) for a, b in zip(before, [p for m in (model, guide) for p in m.parameters()], strict=True)
    )
    assert model.training and all(p.requires_grad and p.grad is None for p in model.parameters())
    monkeypatch.setattr(module, "_CHUNK", 3 * 512 * 8)
    pieces = gaps(model, guide, x, families={"full": FullNormal}, **options)
    assert len(pieces.log_likelihood.pointwise) == 7 and str(pieces) != str(once)
    for name, row in once.families.items():
        a, b = row.optimum, pieces.families[name].optimum
        assert (
            (a.pointwise - b.pointwise).abs() < 4 * torch.hypot(a.pointwise_stderr, b.pointwise_stderr) + 0.05
        ).all()


def test_data_that_have_stopped_are_left_alone():
    pair, x = correlated(6)
    start = gaussian_guide(pair.bed)

    def guide(x):  # the first three are at the optimum already
        off = torch.where(x == near, 0.0, 1.0).amax(1, keepdim=True) * 3
        posterior = pair.bed.posterior(x)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.MultivariateNormal(posterior.mean + off, scale_tril=posterior.scale_tril))

    near = x.clone()
    near[3:] += 1
    form = local_form(guide, (x,))
    found = optimise(pair.model, form, (x,), window=25, num_steps=2000)
    assert found.steps[:3].max() < found.steps[3:].min() and found.stopped.all()
    weight = draw(pair.model, form.guide(found.rows), (x,), {}, 200).log_weight
    assert (weight.mean(0) - pair.bed.log_evidence(x)).abs().max() < 0.01
    assert local_form(start, (x,)).start.shape == (6, 2 + 4)


def test_tables_and_refusals():
    pair, x = correlated(3)
    guide = gaussian_guide(pair.bed)
    options = {"num_samples": 50, "window": 5, "num_steps": 20, "progress": False}
    found = gaps(pair.model, guide, x, families={"full": FullNormal}, **options)
    lines = gap_table({"train": found, "test": found})
    assert [line.split()[:2] for line in lines[1:]] == [
        ["train", "guide"], ["train", "full"], ["test", "guide"], ["test", "full"]]  # fmt: skip
    assert "approximation  amortization  inference gap" in lines[0] and len({len(line) for line in lines}) == 1
    for wrong, text in [
        ({"start": "zero"}, "start='zero', wanted 'guide' or 'fresh'"),
        ({"num_samples": 1}, "num_samples=1, wanted at least 2"),
        ({"learning_rate": 0.0}, "learning_rate=0.0"),
        ({"families": {"a": 3}}, r"families\['a'\] of type int, wanted a fitted guide"),
        ({"families": {"a": functools.partial(LinearPair, exact=False)}}, "makes a LinearPair, which has no local"),
    ]:
        with pytest.raises(ValueError, match=text):
            gaps(pair.model, guide, x, **(options | wrong))
    model, plain = two_sites(False)
    with pytest.raises(ValueError, match=r"latent sites \['a', 'rate'\], wanted one site"):
        gaps(model, plain, (x[:, 0].abs(), x[:, 1].abs()), families={"full": FullNormal}, **options)

    def point(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Delta(torch.zeros(len(x), 2).double()).to_event(1))

    with pytest.raises(ValueError, match="'z' is a point"):
        gaps(pair.model, point, x, **options)


class Shared(nn.Module):
    """Model and guide as methods of one module, with dropout and batch statistics in both."""

    def __init__(self):
        super().__init__()
        self.decoder = nn.Sequential(nn.Linear(2, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Linear(5, 4))
        self.encoder = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 4))

    def model(self, x):
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), 1.0).to_event(1), obs=x)

    def guide(self, x):
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", len(x)):
            loc, log_scale = self.encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


def test_a_guide_is_fitted_and_no_bit_of_the_model_changes():
    x = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    pair = Shared()
    pair.decoder[0].bias.requires_grad_(False)
    before = {name: value.clone() for name, value in pair.state_dict().items()}
    history = fit_guide(pair.model, pair.guide, x, epochs=5, learning_rate=0.01, seed=0, progress=False)
    assert not pair.decoder.training
    changed = {name.split(".")[0] for name, value in pair.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"encoder"} and history["loss"][-1] < history["loss"][0]
    flags = {name: p.requires_grad for name, p in pair.named_parameters()}
    assert not flags.pop("decoder.0.bias") and all(flags.values())

    model, guide = small_pair()
    model.train()
    old = [p.clone() for p in model.parameters()]
    seen = []
    with pytest.raises(RuntimeError, match="enough"):

        def stop(record):
            seen.append((model.training, [p.requires_grad for p in model.parameters()]))
            raise RuntimeError("enough")

        fit_guide(model, guide, binary(), loss=Objective(iwae, num_samples=3), epochs=2, callback=stop, progress=False)
    assert seen == [(False, [False] * len(old))]
    assert model.training and all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(old, model.parameters(), strict=True))


def test_parameters_of_plain_functions_are_frozen_too():
    pyro.clear_param_store()
    x = torch.randn(100, generator=torch.Generator().manual_seed(0)) + 2

    def model(x):
        loc = pyro.param("loc", torch.tensor(0.5))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(loc, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        slope = pyro.param("slope", torch.tensor(0.0))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.25 + slope * x, 0.5**0.5))

    fit_guide(model, guide, x, epochs=60, learning_rate=0.05, seed=0, progress=False)
    assert pyro.param("loc").item() == 0.5
    assert abs(pyro.param("slope").item() - 0.5) < 0.05  # the posterior's mean is (loc + x) / 2
    fit(model, guide, x, epochs=3, seed=0, progress=False)
    assert pyro.param("loc").item() != 0.5
    pyro.clear_param_store()


def test_guides_are_compared_on_one_posterior():
    pair, x = correlated(40)
    bed = pair.bed
    guides = {
        "exact": gaussian_guide(bed),
        "mean field": gaussian_guide(bed, full=False),
        "shifted": gaussian_guide(bed, torch.tensor([0.5, 0.5]).double()),
    }
    found = compare_guides(pair.model, guides, x, num_samples=2000, progress=False)
    scores, posterior = found.scores, bed.posterior(x)
    moved = dist.MultivariateNormal(posterior.mean + 0.5, scale_tril=posterior.scale_tril)
    truths = {
        "exact": 0.0,
        "mean field": bed.mean_field_gap().item(),
        "shifted": kl_divergence(moved, posterior).mean().item(),
    }
    for name, truth in truths.items():
        assert abs(scores[name].gap.value - truth) < 4 * scores[name].gap.mc_stderr + 1e-9
        assert scores[name].gap.mc_stderr < 0.05
    assert (
        abs(found.log_likelihood.value - bed.log_evidence(x).mean().item()) < 4 * found.log_likelihood.mc_stderr + 1e-9
    )
    difference = found.difference("mean field", "shifted")
    wanted = truths["shifted"] - truths["mean field"]
    assert abs(difference.value - wanted) < 4 * difference.mc_stderr
    # Paired: the spread of log p(x) over the data, of several nats, is not in it.
    assert difference.data_stderr < 0.1 * bed.log_evidence(x).std().item() / math.sqrt(40)
    assert "one mixture of exact, mean field, shifted" in str(found) and str(found).count("±") == 10
    assert str(found).count(">=") == 2  # what two of them say alone, of weights that miss mass
    with pytest.raises(ValueError, match="no guide 'flat', wanted one of 'exact'"):
        found.difference("flat", "exact")


def test_the_log_p_of_a_datum_is_no_maximum():
    """Over many copies of a datum the pooled p(x) is unbiased, where the higher of two is too high."""
    pair, x = correlated(1)
    x = x.expand(400, -1)
    guides = {str(s): gaussian_guide(pair.bed, stretch=s) for s in (1.5, 1.6)}
    torch.manual_seed(0)
    own, both = score(pair.model, guides, list(guides), (x,), 4, dict.fromkeys(guides, 1))
    truth = pair.bed.log_evidence(x)
    for log_p in (own["1.5"].log_p, own["1.6"].log_p, both.log_p):
        ratio = (log_p - truth).exp()
        assert abs(ratio.mean().item() - 1) < 4 * ratio.std().item() / 20
    highest = (torch.maximum(own["1.5"].log_p, own["1.6"].log_p) - truth).exp()
    assert highest.mean().item() - 1 > 4 * highest.std().item() / 20
    # The mixture is at least as good as the halves of one: its variance is that of 8 draws.
    assert both.log_p_variance.mean() < 0.75 * own["1.6"].log_p_variance.mean()
    best, rule = pool(own, None, [])
    assert best is max(own.values(), key=lambda s: s.log_p.mean()) and "higher mean over the data" in rule


def test_who_may_be_pooled():
    torch.manual_seed(0)
    model, guide = small_pair()
    assert rescores(model, guide, (binary(3),))
    encoder = nn.Sequential(nn.Flatten(-3), nn.Linear(16, 4))
    assert not rescores(model, Guide(IAF(encoder, 3)), (binary(3),))  # D passes
    assert rescores(model, Guide(Coupling(encoder, 3)), (binary(3),))
    assert issubclass(IAF, Amortized)
