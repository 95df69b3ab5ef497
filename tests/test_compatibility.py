"""What does not go together is refused before training, with a reason and a remedy; all else trains."""

import itertools
import re
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import RenyiELBO, ReweightedWakeSleep, Trace_ELBO, TraceMeanField_ELBO
from torch import nn

from pyro_vae.inference.bounds import ciwae, elbo, iwae, map_estimate, miwae, reconstruction, renyi, vr_max
from pyro_vae.inference.cases import examine
from pyro_vae.inference.compatibility import check
from pyro_vae.inference.estimators import ESTIMATORS
from pyro_vae.inference.objectives import Objective
from pyro_vae.inference.regularizers import total_correlation
from pyro_vae.inference.rules import RULES
from pyro_vae.inference.split_bounds import cubo, piwae, wake_sleep
from pyro_vae.inference.training import fit
from pyro_vae.parts.networks import MLP
from pyro_vae.parts.posteriors import Delta
from pyro_vae.programs.pair import Guide, Model
from pyro_vae.programs.vae import VAE
from tests.pairs import binary, named, small_pair

X = torch.linspace(-1, 1, 6)
CUT = [e for e in ESTIMATORS if e != "reparameterized"]


def reasons(model, guide, batch, loss):
    """What all rules say; the last, which evaluates the loss, where nothing else speaks against it."""
    case = examine(model, guide, batch, loss)
    found = [reason for rule in RULES[:-1] if (reason := rule(case)) is not None]
    last = None if found else RULES[-1](case)
    return found if last is None else [last]


def model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def guide_of(make):
    loc = nn.Parameter(torch.tensor(0.1))

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", make(x + pyro.param("loc", loc)))

    return guide


gaussian = guide_of(lambda loc: dist.Normal(loc, 0.7))


def refused(model, guide, loss, text, x=X):
    """By `reasons`, by `check` and by `fit`."""
    found = reasons(model, guide, (x,), loss)
    assert found and re.search(text, found[0]), found
    with pytest.raises(ValueError, match=text):
        check(model, guide, (x,), loss)
    with pytest.raises(ValueError, match=text):
        fit(model, guide, x, loss=loss, epochs=1)


BOUNDS = [elbo, iwae, renyi(0.5), renyi(-1.0), vr_max, miwae(2), ciwae(0.5), piwae(2), cubo(2), wake_sleep(),
          wake_sleep(0.5), reconstruction, map_estimate]  # fmt: skip


@pytest.mark.parametrize("bound, estimator", list(itertools.product(BOUNDS, ESTIMATORS)), ids=named)
def test_every_bound_and_estimator_trains_a_step_or_says_why_not(bound, estimator):
    impossible = (
        (bound is vr_max and estimator == "doubly-reparameterized")
        or (bound in (reconstruction, map_estimate) and estimator in ("sticking-the-landing", "doubly-reparameterized"))
        or (getattr(bound, "name", "").startswith("wake") and estimator == "sticking-the-landing")
    )
    if impossible:
        with pytest.raises(ValueError, match="Use estimator="):
            Objective(bound, 4, estimator=estimator)
        return
    pair = small_pair()
    before = [[p.detach().clone() for p in m.parameters()] for m in pair]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if repr(bound) == "cubo(2)" else "error")
        fit(*pair, binary(), loss=Objective(bound, 4, estimator=estimator), epochs=1, seed=0)
    for module, old in zip(pair, before, strict=True):
        moved = [not torch.equal(a, b) for a, b in zip(module.parameters(), old, strict=True)]
        left_alone = repr(bound) == "cubo(2)" and module is pair[0]
        assert not any(moved) if left_alone else all(moved)


@pytest.mark.parametrize("bound", [elbo, iwae, vr_max, wake_sleep(), cubo(2)], ids=named)
def test_a_discrete_latent_trains_by_the_score_function_only(bound):
    def coins(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(0.5))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    guide = guide_of(lambda loc: dist.Bernoulli(logits=loc))
    assert reasons(coins, guide, (X,), Objective(bound, 4, estimator="score-function")) == []
    along = "doubly-reparameterized" if bound is not vr_max else "reparameterized"
    found = reasons(coins, guide, (X,), Objective(bound, 4, estimator=along))
    assert "'z' has no reparameterised sampler" in found[0] and "estimator='score-function'" in found[0]
    assert bool(reasons(coins, guide, (X,), Objective(bound, 4))) == (repr(bound) != "wake_sleep")
    text = "'z' has no reparameterised sampler, and a regularizer is differentiated"
    loss = Objective(bound, 4, estimator="score-function", regularizers=[total_correlation(1.0)])
    assert text in reasons(coins, guide, (X,), loss)[0]


def test_pyros_importance_weighted_bound_of_a_discrete_guide():
    def coins(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(0.5))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    guide = guide_of(lambda loc: dist.Bernoulli(logits=loc))
    refused(coins, guide, RenyiELBO(alpha=0, num_particles=4), "gradient of exactly zero.*score-function")
    assert reasons(coins, guide, (X,), Trace_ELBO()) == []


@pytest.mark.parametrize("estimator", CUT)
def test_an_estimator_that_must_rescore_refuses_a_guide_that_cannot(estimator):
    loss = Objective(iwae, 4, estimator=estimator)

    def no_inverse(loc):
        base = dist.Normal(loc.unsqueeze(-1).expand(-1, 2), 1.0).to_event(1)
        torch.manual_seed(0)
        return dist.TransformedDistribution(base, [dist.transforms.planar(2)])

    def plane(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)

    guide = guide_of(no_inverse)
    refused(plane, guide, loss, r"'z' \(TransformedDistribution\) cannot score.*no inverse.*'reparameterized'")
    assert reasons(plane, guide, (X,), Objective(elbo)) == []

    def own_density(loc):
        base = dist.Normal(loc, 0.7)
        z = base.rsample()
        return dist.Delta(z, log_density=base.log_prob(z))

    refused(model, guide_of(own_density), loss, "'z' is a Delta that carries the density of its own draw.*reparam")
    assert reasons(model, guide_of(own_density), (X,), Objective(iwae)) == []


def test_a_posterior_is_believed_when_it_says_what_rescoring_costs():
    model, guide = small_pair()
    guide.posterior.rescoring = "impossible"
    text = "guide site 'z' .*cannot score a sample.*estimator='sticking-the-landing' asks for"
    refused(model, guide, Objective(elbo, estimator="sticking-the-landing"), text, binary())
    refused(model, guide, Objective(piwae(2), 4), r"the objective piwae\(2\) asks for.*iwae or miwae", binary())
    assert reasons(model, guide, (binary(),), Objective(iwae, 4)) == []
    guide.posterior.rescoring = "D passes"
    with pytest.warns(UserWarning, match="in D passes.*coupling flow") as caught:
        fit(model, guide, binary(), loss=Objective(iwae, 4, estimator="doubly-reparameterized"), epochs=2, batch_size=4)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check(model, guide, (binary(),), Objective(iwae, 4))


def test_a_mean_field_objective_on_layers_that_depend_on_each_other():
    def two(x):
        with pyro.plate("data", len(x)):
            z1 = pyro.sample("z1", dist.Normal(0.0, 1.0))
            z2 = pyro.sample("z2", dist.Normal(z1, 1.0))
            pyro.sample("x", dist.Normal(z2, 1.0), obs=x)

    def guide(x, depends=1.0):
        scale = pyro.param("scale", torch.tensor(0.5))
        with pyro.plate("data", len(x)):
            z2 = pyro.sample("z2", dist.Normal(x, scale))
            pyro.sample("z1", dist.Normal(x + depends * z2, scale))

    def in_the_models_order(x):
        scale = pyro.param("scale", torch.tensor(0.5))
        with pyro.plate("data", len(x)):
            z1 = pyro.sample("z1", dist.Normal(x, scale))
            pyro.sample("z2", dist.Normal(x + z1, scale))

    def independent(x):
        guide(x, depends=0.0)

    refused(two, guide, TraceMeanField_ELBO(), r"guide site 'z1' depends on another \(z2\).*Use Trace_ELBO")
    assert reasons(two, in_the_models_order, (X,), TraceMeanField_ELBO()) == []
    assert reasons(two, independent, (X,), TraceMeanField_ELBO()) == []
    assert reasons(two, guide, (X,), Trace_ELBO()) == reasons(two, guide, (X,), Objective(iwae, 3)) == []


@pytest.mark.parametrize("loss", [RenyiELBO(alpha=0, num_particles=3), ReweightedWakeSleep()], ids=["renyi", "rws"])
def test_a_scale_inside_an_importance_weighted_bound(loss):
    scaled = poutine.scale(model, scale=10.0), poutine.scale(gaussian, scale=10.0)
    refused(*scaled, loss, r"carries the scale 10.0.*no bound. Use Objective\(iwae")
    assert reasons(*scaled, (X,), Objective(iwae, 3)) == reasons(*scaled, (X,), Trace_ELBO()) == []
    assert reasons(model, gaussian, (X,), loss) == []

    def subsampled(x):
        with pyro.plate("data", 600, subsample_size=len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    assert "carries the scale 100" in reasons(subsampled, gaussian, (X,), loss)[0]


def test_batch_normalisation_with_several_particles():
    torch.manual_seed(0)
    bare, guide = small_pair()
    decoder = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Linear(8, 16), nn.Unflatten(-1, (1, 4, 4)))
    normed = Model(bare.prior, lambda z: dist.Bernoulli(logits=decoder(z)).to_event(3))  # not even its own module
    refused(
        normed, guide, Objective(iwae, 4), "batch normalisation, which would mix the 4 samples.*LayerNorm", binary()
    )
    vectorized = Trace_ELBO(num_particles=5, vectorize_particles=True, max_plate_nesting=1)
    assert "mix the 5 samples" in reasons(normed, guide, (binary(),), vectorized)[0]
    for fine in (Objective(elbo), Trace_ELBO(), Trace_ELBO(num_particles=5)):
        assert reasons(normed, guide, (binary(),), fine) == []
    encoder = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(16), nn.Linear(16, 4))
    once = Guide(type(guide.posterior)(encoder, 3, features=4))  # the encoder sees each datum once
    assert reasons(bare, once, (binary(),), Objective(iwae, 4)) == []


def test_supports_that_do_not_match():
    def prior(make):
        def model(x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", make())
                pyro.sample("x", dist.Normal(z.reshape(len(x), -1).sum(-1).float(), 1.0), obs=x)

        return model

    def positive():
        return dist.Gamma(2.0, 2.0)

    refused(prior(positive), gaussian, Trace_ELBO(), r"'z' \(Normal\) has the support real, and the prior \(Gamma\)")
    refused(
        prior(lambda: dist.Bernoulli(0.5)), gaussian, Trace_ELBO(), "'z' .Normal. is continuous, and the prior is disc"
    )
    sphere = guide_of(lambda loc: dist.ProjectedNormal(torch.stack([loc, loc, loc], -1)))
    flat = prior(lambda: dist.Normal(torch.zeros(3), 1.0).to_event(1))
    refused(
        flat, sphere, Trace_ELBO(), "has the support sphere, and the prior .Normal. the support real.*Hyperspherical"
    )
    wide = guide_of(lambda loc: dist.Normal(torch.stack([loc, loc], -1), 1.0).to_event(1))
    refused(flat, wide, Trace_ELBO(), r"event_shape \(2,\), and the prior \(3,\).*same latent_dim")
    # Narrower than the prior is allowed.
    assert reasons(prior(lambda: dist.Normal(0.0, 3.0)), guide_of(lambda loc: dist.Gamma(loc.exp(), 1.0)), (X,),
                   Trace_ELBO()) == []  # fmt: skip
    assert reasons(prior(positive), guide_of(lambda loc: dist.LogNormal(loc, 1.0)), (X,), Objective(iwae, 3)) == []


def test_a_point_has_nothing_to_score():
    model, _ = small_pair()
    guide = Guide(Delta(MLP((1, 4, 4), [8], None), 3))
    refused(model, guide, Trace_ELBO(), "'?point site .Delta. without a density.*reconstruction", binary())
    loss = Objective(reconstruction, estimator="score-function")
    assert "score-function" in reasons(model, guide, (binary(),), loss)[0]
    assert reasons(model, guide, (binary(),), Objective(reconstruction)) == []


def test_notes_are_warnings():
    with pytest.warns(UserWarning, match="no leave-one-out baseline"):
        check(model, gaussian, (X,), Objective(elbo, estimator="score-function"))
    with pytest.warns(UserWarning, match="one weight for the whole minibatch.*wake_sleep"):
        check(model, gaussian, (X,), ReweightedWakeSleep())
    with pytest.warns(UserWarning, match=r"Objective\(cubo\(2\), num_samples=4\) trains the guide only"):
        fit(*small_pair(), binary(), loss=Objective(cubo(2), 4), epochs=1)
    with pytest.raises(ValueError, match=r"validation_bound=cubo\(2\) is an upper bound"):
        fit(*small_pair(), binary(), epochs=1, validation=binary(), validation_bound=cubo(2))


def test_a_prior_of_many_flows_is_said_to_be_slow_and_one_of_gaussians_is_not():
    def pair(family, count):
        vae = VAE.build((1, 4, 4), latent_dim=2, hidden=(4,), posterior=family, prior="vamp",
                        prior_options={"num_components": count})  # fmt: skip
        return vae.model, vae.guide

    with pytest.warns(
        UserWarning, match="mixture of 500 flows, so that the 48 samples of a step are scored 24,000 times"
    ):
        check(*pair("nsf", 500), (binary(6),), Objective(iwae, 8))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check(*pair("nsf", 20), (binary(6),), Objective(iwae, 8))
        check(*pair("full", 500), (binary(6),), Objective(iwae, 8))


def test_the_check_leaves_random_state_and_parameters_alone():
    pair, x = small_pair(), binary()
    before = [p.detach().clone() for m in pair for p in m.parameters()]
    state = torch.get_rng_state()
    for loss in (Trace_ELBO(), Objective(iwae, 4, estimator="doubly-reparameterized"), Objective(wake_sleep(0.5), 4)):
        assert check(*pair, (x,), loss) is False
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(before, (p for m in pair for p in m.parameters()), strict=True))
    assert all(p.grad is None for m in pair for p in m.parameters())


@pytest.mark.parametrize("hidden", [False, True])
def test_a_grey_bernoulli_under_a_mask_is_warned_of_unless_the_mask_hides_what_is_grey(hidden):
    vae = VAE.build((6,), latent_dim=2, hidden=(8,))
    x = torch.bernoulli(torch.full((20, 6), 0.5))
    x[3, 2] = 0.4
    mask = torch.ones_like(x, dtype=torch.bool)
    mask[3, 2] = not hidden
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(vae.model, vae.guide, (x, mask), epochs=1, batch_size=20, progress=False, seed=0)
    assert any("site 'x' is Bernoulli but its data have grey values" in str(w.message) for w in caught) is not hidden


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("shape", [(20,), (20, 6)])
def test_a_grey_bernoulli_under_a_mask_of_ones_own_is_warned_of(shape, strict):
    import pyro
    import pyro.distributions as dist

    x, mask = torch.bernoulli(torch.full((20, 6), 0.5)), torch.ones(shape, dtype=torch.bool)
    x[3, 2] = 0.4
    options = {} if strict else {"validate_args": False}

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            given_z = dist.Bernoulli(logits=z.unsqueeze(-1).expand(20, 6), **options)
            given_z = given_z.mask(mask).to_event(1) if mask.dim() == 2 else given_z.to_event(1).mask(mask)
            pyro.sample("x", given_z, obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.mean(-1) * pyro.param("a", torch.tensor(1.0)), 1.0))

    for seen in (True, False):
        mask[3] = seen
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if strict and seen:
                with pytest.raises(ValueError, match="row 3, column 2 of the data is 0.4, outside the support"):
                    fit(model, guide, x, epochs=1, batch_size=20, progress=False, seed=0)
            else:
                fit(model, guide, x, epochs=1, batch_size=20, progress=False, seed=0)
        assert any("grey values" in str(w.message) for w in caught) is (seen and not strict)
