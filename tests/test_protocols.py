"""What parts say of themselves is believed, of ours and of those that the package has never seen."""

import re
import sys
import types
from pathlib import Path

import pyro.distributions as dist
import pytest
import torch
from pyro.infer import TraceMeanField_ELBO
from torch import nn
from torch.distributions import Independent, Normal, kl_divergence, register_kl

import pyro_vae as pv
from pyro_vae import protocols
from pyro_vae.app.defaults import FitOptions
from pyro_vae.app.losses import the_loss
from pyro_vae.inference.bounds import reconstruction
from pyro_vae.judging.local import local_form
from pyro_vae.parts import likelihoods, names, posteriors, priors
from pyro_vae.parts.distributions import spherical
from pyro_vae.protocols import closed_form_kl, has_head, has_start, rescoring, same_support, twice_differentiable
from pyro_vae.unconstrained import local_of

ROOT = Path(protocols.__file__).parent


class Sphere(posteriors.VonMisesFisher):
    """A subclass inherits what its family says."""


class Bare(nn.Module):
    """A posterior that inherits nothing: on the sphere, known by its head."""

    support = dist.constraints.sphere

    def __init__(self, encoder, latent_dim):
        super().__init__()
        self.encoder, self.latent_dim = encoder, latent_dim
        self.head = nn.Linear(encoder.out_features, latent_dim)

    def family(self, parameters):
        return spherical.VonMisesFisher(
            parameters / parameters.norm(dim=-1, keepdim=True), torch.ones(parameters.shape[:-1])
        )

    def forward(self, x):
        return self.family(self.head(self.encoder(x)))


class Scaled(likelihoods.Normal):
    """A normal likelihood of one's own, whose signature has no scale."""

    def __init__(self, decoder, standardize=None):
        super().__init__(decoder, 0.5, standardize=standardize)


class Shared(nn.Module):
    """A prior that is the posterior at zero."""

    def __init__(self, posterior, x_shape, wide=1.0):
        super().__init__()
        self.posterior, self.x_shape, self.wide = posterior, x_shape, wide

    @classmethod
    def for_posterior(cls, posterior, x_shape, wide=1.0):
        return cls(posterior, x_shape, wide)

    def forward(self):
        return self.posterior(torch.zeros(self.x_shape))


class Wide(dist.Normal):
    """A family of one's own, with a KL of its own."""


@register_kl(Wide, Normal)
def _kl_of_wide(q, p):
    return (q.loc - p.loc).square() + 7.0


class WideNormal(posteriors.Amortized):
    def __init__(self, encoder, latent_dim):
        super().__init__(encoder, latent_dim, latent_dim)

    def family(self, parameters):
        return Wide(parameters, torch.ones_like(parameters), validate_args=False).to_event(1)


@pytest.fixture(autouse=True)
def mine(monkeypatch):
    module = types.ModuleType("mine")
    for part in (Sphere, Bare, Scaled, Shared, WideNormal):
        setattr(module, part.__name__, part)
    monkeypatch.setitem(sys.modules, "mine", module)


def build(shape=(4,), **options):
    return pv.VAE.build(shape, latent_dim=3, hidden=(8,), **options)


@pytest.mark.parametrize("posterior", ["mine:Sphere", "mine:Bare", "von-mises-fisher"])
def test_the_support_of_a_part_of_any_origin_is_checked(posterior):
    with pytest.raises(
        ValueError, match=r"supports are 'sphere' and 'real', and KL.* infinite. Use prior 'hyperspherical'"
    ):
        build(posterior=posterior)
    vae = build(posterior=posterior, prior="hyperspherical")
    assert torch.allclose(vae.posterior(torch.rand(5, 4)).sample().norm(dim=-1), torch.ones(5))
    with pytest.raises(ValueError, match="Use posterior 'von-mises-fisher'"):
        build(prior="hyperspherical")


def test_a_prior_of_the_posterior_lies_where_it_does():
    vae = build(posterior="mine:Bare", prior="mine:Shared", prior_options={"wide": 2.0})
    assert vae.model.prior.posterior is vae.guide.posterior and vae.model.prior.wide == 2.0
    assert vae.model.prior().event_shape == (3,)
    with pytest.raises(ValueError, match="has no option 'narrow'; it has wide"):
        build(prior="mine:Shared", prior_options={"narrow": 1})
    vamp = build(posterior="von-mises-fisher", prior="vamp", prior_options={"num_components": 3})
    x = torch.rand(6, 4)
    assert pv.elbo(pv.particles(vamp.model, vamp.guide, x)).isfinite().all()


def test_a_likelihood_of_ones_own_is_standardized_as_ours():
    with pytest.warns(UserWarning, match="scales of their own"):
        vae = build(likelihood="mine:Scaled")
        x = 100 + 30 * torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
        pv.fit(vae.model, vae.guide, x, epochs=1, seed=0, progress=False)
    assert vae.guide.standardize is vae.model.likelihood.standardize
    assert torch.allclose(vae.guide.standardize.loc, x.mean(0), rtol=1e-5)
    assert build(likelihood="mine:Scaled", standardize=True).guide.standardize.automatic is False
    with pytest.raises(ValueError, match="got standardize=True with the likelihood 'bernoulli'"):
        build(likelihood="bernoulli", standardize=True)


def test_a_registered_divergence_is_found_wherever_one_is_taken():
    vae = build(posterior="mine:WideNormal")
    x = (torch.rand(6, 4, generator=torch.Generator().manual_seed(1)) < 0.5).float()
    q, p = vae.posterior(x), vae.model.prior()
    wanted = q.mean.square().sum(-1) + 21.0
    assert torch.allclose(closed_form_kl(q, p.expand([6])), wanted, rtol=1e-6)
    assert torch.allclose(kl_divergence(q, p.expand([6])), wanted, rtol=1e-6)
    torch.manual_seed(0)
    loss = TraceMeanField_ELBO().loss(vae.model, vae.guide, x)
    torch.manual_seed(0)
    terms = pv.particles(vae.model, vae.guide, x)
    assert abs(loss - (wanted.sum() - terms.log_likelihood.sum()).item()) < 1e-3
    assert closed_form_kl(q, dist.StudentT(torch.full((3,), 5.0)).to_event(1)) is None


def test_what_is_not_said_is_assumed_and_what_is_said_wrong_is_refused():
    nothing = nn.Linear(2, 2)
    assert rescoring(nothing, lambda x: x) == "one pass" and same_support(nothing, priors.StandardNormal(2))
    assert protocols.passes(nothing) == 0 and protocols.parameters_per_pixel(nothing) == 1
    assert protocols.values(nothing) is None and protocols.default_options(nothing, (1,), 1.0, None, {"a": 1}) == {}
    assert not has_head(nothing) and not has_start(nothing) and protocols.closed_form_sites(nothing) == ()
    nothing.rescoring = "imposible"
    with pytest.raises(
        ValueError, match="got rescoring='imposible', wanted one of 'impossible', 'D passes', 'one pass'"
    ):
        rescoring(nothing)


def test_the_dearest_that_one_says_counts():
    one, many = (types.SimpleNamespace(rescoring=said) for said in ("one pass", "D passes"))
    assert (
        rescoring(one, many) == "D passes"
        and rescoring(many, one, types.SimpleNamespace(rescoring="impossible")) == "impossible"
    )


def test_twice_differentiable_is_asked_of_what_lies_inside():
    q = spherical.VonMisesFisher(torch.tensor([1.0, 0.0]), torch.tensor(2.0))
    assert not twice_differentiable(Independent(q.expand([3]), 1)) and twice_differentiable(dist.Normal(0.0, 1.0))


def test_a_posterior_with_a_head_alone_has_a_local_form():
    bare = Bare(nn.Linear(4, 8), 3)
    assert has_head(bare) and not has_start(bare)
    x = torch.randn(5, 4)
    local = local_of(bare, bare.head(bare.encoder(x)))
    assert torch.equal(local.build(local.free).loc, bare(x).loc)
    form = local_form(pv.Guide(bare), (x,))
    assert form.start.shape == (5, 3) and torch.allclose(form.start, bare.head(bare.encoder(x)))


def test_every_name_stands_for_a_part_that_says_what_it_is():
    for kind, table in names.PARTS.items():
        for name in table:
            part = names.find(kind, name)
            if kind == "likelihood":
                assert protocols.values(part) in ("binary", "continuous", "levels", "counts"), name
            elif name != "vamp":  # it lies where its posterior does
                assert protocols.support_name(part) in ("real", "sphere"), name
    for name in names.NETWORKS:
        found = names.networks(name)
        shape = (1, 8, 8)
        encoder = found.encoder(shape, (8, 8), "silu")
        assert encoder(torch.zeros(3, *shape)).shape == (3, encoder.out_features), name
        assert found.decoder(2, shape, (8, 8), "silu")(torch.zeros(3, 2)).shape == (3, *shape), name


def test_a_trait_is_read_by_its_protocol_only_and_no_type_by_its_name():
    """Where a string stands for an attribute or a class, a rename goes unnoticed."""
    traits = r"rescoring|passes|has_density|head|family|local|around|push|twice_differentiable|parameters_per_pixel|before_fit|"
    traits += r"check_data|standardize|support|values|closed_form|knows_its_draw"
    trait = re.compile(rf'(?:getattr|hasattr)\([^()]*, "(?:{traits})"')
    allowed = {  # zuko's own attribute, and distributions that need not have a support
        "parts/posteriors/flow.py": 1, "refusals.py": 1, "programs/hamiltonian.py": 1,
    }  # fmt: skip
    by_name = re.compile(r"__name__ (?:[!=]=|(?:not )?in) ")
    # Types that nobody can import: torch.compile's wrapper (slow to import), the C list of lru_cache.
    types_allowed = {"inference/fingerprints.py": 1, "reach/values.py": 3, "reach/objects.py": 1}
    for path in ROOT.rglob("*.py"):
        where, text = str(path.relative_to(ROOT)), path.read_text()
        if where != "protocols.py":
            assert len(trait.findall(text)) <= allowed.get(where, 0), where
        text = text.replace('__name__ == "__main__"', "")
        assert len(by_name.findall(text)) <= types_allowed.get(where, 0), where


def test_the_loss_follows_from_what_is_known_of_the_pair_and_not_from_a_name():
    """A class of one's own with a registered divergence is trained with it, as ours; a point by its reconstruction."""
    for posterior, prior, closed in [
        ("diagonal", "normal", True),
        ("von-mises-fisher", "hyperspherical", True),
        ("mine:WideNormal", "normal", True),
        ("diagonal", "mixture", False),
        ("nsf", "normal", False),
    ]:
        vae, options = build(posterior=posterior, prior=prior), FitOptions("digits", posterior=posterior, prior=prior)
        assert isinstance(the_loss(options, vae), TraceMeanField_ELBO) is closed, (posterior, prior)
    point = the_loss(FitOptions("digits", posterior="point"), build(posterior="point"))
    assert point.bound is reconstruction
