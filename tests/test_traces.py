"""The ground: log densities read from any pair."""

import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

from pyro_vae.traces import log_joint, log_q, particles, plate_nesting, simulate
from tests.pairs import binary, linear_pair, small_pair

X = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)


def normal(loc, scale=1.0):
    return dist.Normal(torch.as_tensor(loc, dtype=torch.float64), torch.tensor(scale, dtype=torch.float64))


def plain_model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", normal(0.0))
        pyro.sample("x", normal(z), obs=x)


def plain_guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", normal(x / 2, 0.5**0.5))


EVIDENCE = normal(0.0, 2**0.5).log_prob(X)


def test_terms_are_those_of_the_distributions():
    p = particles(plain_model, plain_guide, X, num_samples=4)
    z = p.latents["z"]
    assert z.shape == (4, 3)
    assert torch.equal(p.log_prior["z"], normal(0.0).log_prob(z))
    assert torch.equal(p.log_likelihood, normal(z).log_prob(X))
    assert torch.equal(p.log_q["z"], normal(X / 2, 0.5**0.5).log_prob(z))
    assert (p.log_weight - EVIDENCE).abs().max() < 1e-12


def test_one_pass_and_one_by_one_are_the_same_law():
    model, guide = small_pair()
    x = binary()
    together = particles(model, guide, x, num_samples=5, vectorize=True)
    apart = particles(model, guide, x, num_samples=5, vectorize=False)
    for p in (together, apart):
        assert (log_joint(model, p.latents, x) - p.log_joint).abs().max() < 1e-4
        assert (log_q(guide, p.latents, x) - p.log_q["z"]).abs().max() < 1e-4
    assert together.latents["z"].shape == apart.latents["z"].shape == (5, 12, 3)


def test_a_pair_that_does_not_broadcast_is_drawn_one_by_one_and_says_so_once():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            assert z.dim() == 2, "flat batches only"
            pyro.sample("x", dist.Normal(z.view(len(x), 2), 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, 1.0).to_event(1))

    x = torch.zeros(3, 2)
    with pytest.warns(UserWarning, match="one by one.*flat batches only") as caught:
        p = particles(model, guide, x, num_samples=6)
    assert len(caught) == 1
    assert p.log_weight.shape == (6, 3)
    assert torch.allclose(p.log_joint, log_joint_by_hand(p.latents["z"], x))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        particles(model, guide, x, num_samples=6, vectorize=False)


def log_joint_by_hand(z, x):
    return (dist.Normal(0.0, 1.0).log_prob(z) + dist.Normal(z, 1.0).log_prob(x)).sum(-1)


def test_inner_plates_are_summed_and_two_layers_are_kept_apart():
    x = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def model(x):
        with pyro.plate("data", len(x), dim=-2):
            top = pyro.sample("top", normal(0.0))
            with pyro.plate("pixels", 4, dim=-1):
                z = pyro.sample("z", normal(top))
                pyro.sample("x", normal(z), obs=x)

    def guide(x):
        with pyro.plate("data", len(x), dim=-2):
            pyro.sample("top", normal(x.mean(-1, keepdim=True), 0.5))
            with pyro.plate("pixels", 4, dim=-1):
                pyro.sample("z", normal(x / 2, 0.7))

    for vectorize in (True, False):
        p = particles(model, guide, x, num_samples=5, vectorize=vectorize)
        top, z = p.latents["top"], p.latents["z"]
        assert z.shape == (5, 3, 4) and top.shape == (5, 3, 1)
        assert torch.allclose(p.log_prior["top"], normal(0.0).log_prob(top)[..., 0])
        assert torch.allclose(p.log_prior["z"], normal(top).log_prob(z).sum(-1))
        assert torch.allclose(p.log_likelihood, normal(z).log_prob(x).sum(-1))
        assert torch.allclose(p.log_q["z"], normal(x / 2, 0.7).log_prob(z).sum(-1))
        assert torch.allclose(log_joint(model, p.latents, x), p.log_joint)
        assert torch.allclose(log_q(guide, p.latents, x), p.log_q["z"] + p.log_q["top"])
    assert plate_nesting(model, guide, x) == 2


def test_a_mask_drops_what_it_hides():
    seen = torch.tensor([True, False, True])

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", normal(0.0))
            with poutine.mask(mask=seen):
                pyro.sample("x", normal(z), obs=x)

    p = particles(model, plain_guide, X, num_samples=2)
    assert (p.log_likelihood[:, 1] == 0).all()
    assert torch.equal(p.log_likelihood[:, [0, 2]], normal(p.latents["z"]).log_prob(X)[:, [0, 2]])


def test_a_common_scale_is_handed_on_and_left_out_of_the_weights():
    model = poutine.scale(plain_model, scale=10.0)
    guide = poutine.scale(plain_guide, scale=10.0)
    p = particles(model, guide, X, num_samples=3)
    assert p.scale == 10.0
    assert (p.log_weight - EVIDENCE).abs().max() < 1e-12


def test_subsampling_is_such_a_scale():
    def model(x):
        with pyro.plate("data", 300, subsample_size=len(x)):
            z = pyro.sample("z", normal(0.0))
            pyro.sample("x", normal(z), obs=x)

    def guide(x):
        with pyro.plate("data", 300, subsample_size=len(x)):
            pyro.sample("z", normal(x / 2, 0.5**0.5))

    p = particles(model, guide, X, num_samples=3)
    assert p.scale == 100.0
    assert (p.log_weight - EVIDENCE).abs().max() < 1e-12


@pytest.mark.parametrize("where", ["latent", "vector"])
def test_any_other_scale_is_refused_with_its_site(where):
    def model(x):
        with pyro.plate("data", len(x)):
            with poutine.scale(scale=0.5 if where == "latent" else torch.tensor([1.0, 2.0, 3.0])):
                z = pyro.sample("z", normal(0.0))
            pyro.sample("x", normal(z), obs=x)

    text = "'z' carries the scale 0.5.*beta" if where == "latent" else r"'z' carries a scale of shape \(3,\)"
    with pytest.raises(ValueError, match=text):
        particles(model, plain_guide, X)


def test_a_latent_outside_the_data_plate_is_refused_by_name():
    def model(x):
        shift = pyro.sample("shift", normal(0.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", normal(shift))
            pyro.sample("x", normal(z), obs=x)

    def guide(x):
        pyro.sample("shift", normal(0.0))
        plain_guide(x)

    with pytest.raises(ValueError, match="site 'shift' lies outside the data plate"):
        particles(model, guide, X)


def test_no_plate_at_all_is_refused_with_the_remedy():
    def model(x):
        z = pyro.sample("z", normal(torch.zeros(3)).to_event(1))
        pyro.sample("x", normal(z).to_event(1), obs=x)

    def guide(x):
        pyro.sample("z", normal(x).to_event(1))

    with pytest.raises(ValueError, match=r'pyro.plate\("data", len\(x\)\)'):
        particles(model, guide, X)


def test_a_dimension_that_belongs_to_no_plate_is_refused():
    x = torch.zeros(3, 4)

    def model(x):
        with pyro.plate("data", len(x), dim=-2):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, torch.ones(4)), obs=x)

    def guide(x):
        with pyro.plate("data", len(x), dim=-2):
            pyro.sample("z", dist.Normal(x.mean(-1, keepdim=True), 1.0))

    with pytest.raises(ValueError, match=r"'x' has batch_shape \(3, 4\).*to_event"):
        particles(model, guide, x)


def test_sites_that_do_not_match_are_named():
    def nothing(x, name="data"):
        with pyro.plate(name, len(x)):
            pyro.sample("w", normal(x))

    with pytest.raises(ValueError, match="latent site 'z' of the model has no counterpart"):
        particles(plain_model, nothing, X)

    def too_much(x):
        plain_guide(x)
        nothing(x, "again")

    with pytest.raises(ValueError, match="guide site 'w' has no counterpart.*is_auxiliary"):
        particles(plain_model, too_much, X)


def test_an_auxiliary_guide_site_counts_in_q():
    def guide(x):
        with pyro.plate("data", len(x)):
            e = pyro.sample("e", normal(0.0), infer={"is_auxiliary": True})
            pyro.sample("z", normal(x / 2 + 0 * e, 0.5**0.5))

    p = particles(plain_model, guide, X, num_samples=2)
    assert torch.allclose(p.log_weight, EVIDENCE - normal(0.0).log_prob(p.latents["e"]))


def test_deterministic_sites_do_not_count():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", normal(0.0))
            pyro.deterministic("twice", 2 * z)
            pyro.sample("x", normal(z), obs=x)
        pyro.deterministic("outside", torch.zeros(()))

    assert (particles(model, plain_guide, X).log_weight - EVIDENCE).abs().max() < 1e-12


def test_a_point_guide_is_refused_by_name_where_a_density_is_needed():
    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Delta(x / 2))

    p = particles(plain_model, guide, X)
    assert p.points == ("z",)
    assert torch.equal(p.log_likelihood[0], normal(X / 2).log_prob(X))
    with pytest.raises(ValueError, match=r"'z' is a point \(Delta\).*Objective\(reconstruction\)"):
        _ = p.log_weight
    with pytest.raises(ValueError, match="'z' is a point"):
        log_q(guide, p.latents, X)


def test_a_delta_that_carries_a_density_is_no_point():
    def guide(x):
        with pyro.plate("data", len(x)):
            base = normal(x / 2, 0.5**0.5)
            z = base.sample()
            pyro.sample("z", dist.Delta(z, log_density=base.log_prob(z)))

    p = particles(plain_model, guide, X)
    assert p.points == ()
    assert (p.log_weight - EVIDENCE).abs().max() < 1e-12


def test_a_flow_that_cannot_rescore_says_so():
    def guide(x):
        with pyro.plate("data", len(x)):
            base = dist.Normal(x[:, None].expand(-1, 2).float(), 1.0).to_event(1)
            torch.manual_seed(0)
            pyro.sample("z", dist.TransformedDistribution(base, [dist.transforms.planar(2)]))

    given = {"z": torch.zeros(2, 3, 2)}
    with pytest.raises(ValueError, match="'z'.*cannot score a sample"):
        log_q(guide, given, X)


def test_a_missing_latent_is_named():
    with pytest.raises(ValueError, match="no value for latent site 'z'"):
        log_joint(plain_model, {"w": X}, X)


def test_simulate_draws_data_whether_or_not_the_model_observes():
    model, _ = small_pair()
    free = simulate(model, size=7)
    assert free.latents.keys() == {"z"} and free.observations["x"].shape == (7, 1, 4, 4)
    pair, x = linear_pair()
    pyro.set_rng_seed(0)
    drawn = torch.cat([simulate(pair.model, x).observations["x"] for _ in range(200)])
    covariance = pair.bed.weight @ pair.bed.weight.T + pair.bed.scale**2 * torch.eye(6)
    variance, n = covariance.diagonal(), len(drawn)
    assert ((drawn.mean(0) - pair.bed.loc).abs() < 4 * (variance / n).sqrt()).all()
    assert ((drawn.var(0) / variance - 1).abs() < 4 * (2 / n) ** 0.5).all()


def test_bad_numbers_of_samples():
    with pytest.raises(ValueError, match="num_samples must be a positive integer, got 0"):
        particles(plain_model, plain_guide, X, num_samples=0)
