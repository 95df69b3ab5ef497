"""Objectives agree with Pyro, with each other, and with closed forms."""

import copy
import math

import pyro
import pytest
import torch
from pyro.infer import RenyiELBO, Trace_ELBO
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_vae.inference.bounds import elbo, iwae, map_estimate, miwae, reconstruction
from pyro_vae.inference.objectives import Objective, mean_bound
from pyro_vae.inference.regularizers import mmd
from pyro_vae.inference.split_bounds import cubo, sleep_phase, wake_sleep
from pyro_vae.parameters import own_parameters
from pyro_vae.traces import particles
from tests.pairs import binary, linear_pair, small_pair


def value_and_gradients(loss, model, guide, x, seed=3):
    for p in [*model.parameters(), *guide.parameters()]:
        p.grad = None
    pyro.set_rng_seed(seed)
    value = loss.loss_and_grads(model, guide, x)
    return value, {name: p.grad.clone() for m in (model, guide) for name, p in m.named_parameters()}


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize(
    "ours, theirs",
    [
        (Objective(elbo), Trace_ELBO(max_plate_nesting=1)),
        (Objective(elbo, 7), Trace_ELBO(num_particles=7, vectorize_particles=True, max_plate_nesting=1)),
        (Objective(iwae, 1), RenyiELBO(alpha=0, num_particles=1, vectorize_particles=True, max_plate_nesting=1)),
        (Objective(iwae, 7), RenyiELBO(alpha=0, num_particles=7, vectorize_particles=True, max_plate_nesting=1)),
    ],
    ids=["elbo-1", "elbo-7", "iwae-1", "iwae-7"],
)
def test_agrees_with_pyro_in_value_and_every_gradient(ours, theirs, dtype, tolerance):
    model, guide = (m.to(dtype) for m in small_pair())
    x = binary().to(dtype)
    value, gradients = value_and_gradients(copy.copy(ours), model, guide, x)
    other, other_gradients = value_and_gradients(copy.copy(theirs), model, guide, x)
    assert value == pytest.approx(other, rel=tolerance)
    assert gradients.keys() == other_gradients.keys()
    for name, gradient in gradients.items():
        scale = other_gradients[name].abs().max()
        assert (gradient - other_gradients[name]).abs().max() <= tolerance * scale, name
        assert scale > 0, name


def test_guessing_the_plates_leaves_the_random_state_alone():
    model, guide = small_pair()
    x = binary()
    torch.manual_seed(5)
    guessed = Objective(iwae, 6).loss(model, guide, x)
    torch.manual_seed(5)
    given = Objective(iwae, 6, max_plate_nesting=1).loss(model, guide, x)
    assert guessed == given


def test_bounds_are_ordered_and_end_at_the_evidence():
    pair, x = linear_pair(exact=False)
    evidence = pair.bed.log_evidence(x).mean().item()
    torch.manual_seed(0)
    drawn = [particles(pair.model, pair.guide, x, num_samples=4096) for _ in range(8)]
    means, errors = [], []
    for k in (1, 4, 16, 64):
        values = torch.stack([elbo(p) if k == 1 else _in_groups(p, k) for p in drawn]).mean(1)
        means.append(values.mean().item())
        errors.append(values.std().item() / math.sqrt(len(values)))
    gap = pair.bed.mean_field_gap().item()
    assert abs(means[0] - (evidence - gap)) < 4 * errors[0]
    for (low, low_error), (high, high_error) in zip(
        list(zip(means, errors, strict=True))[:-1], list(zip(means, errors, strict=True))[1:], strict=True
    ):
        assert high - low > 4 * math.hypot(low_error, high_error)
    assert means[-1] < evidence + 4 * errors[-1]


def _in_groups(p, k):
    """The mean over groups of k particles of the k-sample bound."""
    weights = p.log_weight.reshape(-1, k, p.log_weight.shape[1])
    return (torch.logsumexp(weights, 1) - math.log(k)).mean(0)


def test_at_the_exact_posterior_every_weight_is_the_evidence():
    pair, x = linear_pair()
    weights = particles(pair.model, pair.guide, x, num_samples=5).log_weight
    assert (weights - pair.bed.log_evidence(x)).abs().max() < 1e-10


def test_beta_changes_the_gradient_and_not_the_report():
    model, guide = small_pair()
    model, guide, x = model.double(), guide.double(), binary().double()
    plain, tempered = Objective(elbo), Objective(elbo, beta=0.3)
    _, gradients = value_and_gradients(plain, model, guide, x)
    _, other = value_and_gradients(tempered, model, guide, x)
    assert tempered.last_bound == plain.last_bound
    # The tempered gradient is the mixture of those of the reconstruction and of the ELBO.
    _, only = value_and_gradients(Objective(reconstruction), model, guide, x)
    for name in gradients:
        assert torch.allclose(other[name], 0.3 * gradients[name] + 0.7 * only[name], rtol=1e-10, atol=1e-12)


def test_beta_is_for_the_elbo():
    with pytest.raises(ValueError, match="beta=0.5 tempers the elbo only, got the bound iwae"):
        Objective(iwae, 2, beta=0.5)
    later = Objective(iwae, 2)
    later.beta = 0.5
    with pytest.raises(ValueError, match="tempers the elbo only"):
        later.loss(*small_pair(), binary())


@pytest.mark.parametrize(
    "options, text",
    [
        ({"beta": -1}, "beta must be a finite number that is not negative, got -1"),
        ({"beta": torch.tensor(-0.5)}, "not negative, got -0.5"),
        ({"beta": math.inf}, "not negative, got inf|beta must be a finite number"),
        ({"beta": math.nan}, "beta must be a finite number"),
        ({"bound": cubo(2), "num_samples": 4, "beta": 2.0}, "tempers the elbo only"),
        ({"bound": miwae(4), "num_samples": 6}, "6"),
        ({"bound": wake_sleep(), "num_samples": 1}, "wanted at least 2"),
        ({"regularizers": (mmd,)}, "got mmd among the regularizers, wanted functions"),
        ({"regularizers": (3.0,)}, "got 3.0 among the regularizers"),
        ({"max_plate_nesting": -1}, "max_plate_nesting"),
    ],
)
def test_what_cannot_be_trained_is_refused_when_it_is_made(options, text):
    with pytest.raises(ValueError, match=text):
        Objective(**options)
    assert Objective(beta=0.0).beta == 0.0


def test_map_estimate_is_the_log_joint():
    pair, x = linear_pair()
    p = particles(pair.model, pair.guide, x, num_samples=3)
    assert torch.equal(map_estimate(p), p.log_joint.mean(0))


def test_a_sampler_without_gradient_is_refused():
    import pyro.distributions as dist

    logits = torch.nn.Parameter(torch.zeros(()))

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(0.5))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(logits=logits))

    with pytest.raises(ValueError, match="'z' has no reparameterised sampler.*TraceEnum_ELBO"):
        Objective(elbo).loss_and_grads(model, guide, torch.zeros(3))
    assert math.isfinite(Objective(elbo).loss(model, guide, torch.zeros(3)))


def test_a_cut_objective_runs_under_plain_svi_and_traces_with_make_fx():
    """Nothing in a step branches on the value of a tensor, so that it can be captured."""
    model, guide = small_pair()
    x = binary()
    objective = Objective(iwae, 3, estimator="doubly-reparameterized", max_plate_nesting=1)
    svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), objective)
    losses = [svi.step(x) for _ in range(60)]
    assert sum(losses[-10:]) < sum(losses[:10])

    names = [(m, n) for m in (model, guide) for n, _ in m.named_parameters()]
    parameters = [dict(m.named_parameters())[n] for m, n in names]

    def step(x):
        return torch.autograd.grad(objective.differentiable_loss(model, guide, x), parameters)

    with own_parameters(model, guide), pyro.validation_enabled(False):
        captured = make_fx(step)(x)
        torch.manual_seed(0)
        eager = step(x)
    torch.manual_seed(0)
    for a, b in zip(captured(x), eager, strict=True):
        assert (a - b).abs().max() <= 1e-5 * b.abs().max()


def test_the_sleep_phase_fits_the_guide_to_the_models_own_draws():
    """The optimum of E_p log q(z | x) over q = N(a x + c, exp(r)^2) is the exact posterior."""
    import pyro.distributions as dist

    a, c, r = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (0.0, 0.5, -1.0))
    slope = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=torch.float64), 1.0))
            pyro.sample("x", dist.Normal(slope * z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(a * x + c, r.exp()))

    pyro.set_rng_seed(0)
    x = torch.full((2000,), 9.0, dtype=torch.float64)  # the guide must learn nothing from these
    objective = Objective(wake_sleep(sleep=1.0), 1)
    optimizer = torch.optim.Adam([a, c, r], lr=0.03)
    for _ in range(300):
        optimizer.zero_grad()
        loss = objective.loss_and_grads(model, guide, x)
        optimizer.step()
    assert loss == pytest.approx(-float(objective.last_bound), rel=1e-12)
    # p(z | x) = N(x / 2, 1 / 2); the errors are those of 2000 draws.
    assert abs(a.item() - 0.5) < 0.03 and abs(c.item()) < 0.03 and abs(r.item() - math.log(0.5) / 2) < 0.03
    slope.grad = None
    objective.loss_and_grads(model, guide, x)
    assert slope.grad.abs() > 0  # of the wake phase; the dream gives the model none
    log_q = sleep_phase(model, guide, x)
    assert log_q.shape == (2000,) and torch.autograd.grad(log_q.sum(), slope, allow_unused=True) == (None,)


def test_the_share_of_the_sleep_phase():
    model, guide = (m.double() for m in small_pair())
    x = binary().double()
    found = {}
    for share in (0.0, 0.25, 1.0):
        _, found[share] = value_and_gradients(Objective(wake_sleep(share), 4), model, guide, x)
    for name in found[0.0]:
        # The wake phase draws first, so that one seed gives all three the same draws.
        mixed = 0.75 * found[0.0][name] + 0.25 * found[1.0][name]
        assert torch.allclose(found[0.25][name], mixed, rtol=1e-9, atol=1e-11), name
    # All of it is the dream and nothing else, for the guide.
    pyro.set_rng_seed(3)
    Objective(iwae, 4).particles(model, guide, x)
    named = dict(guide.named_parameters())
    dreamt = torch.autograd.grad(sleep_phase(model, guide, x).sum(), list(named.values()))
    _, wake = value_and_gradients(Objective(wake_sleep(1.0), 4), model, guide, x)
    for name, gradient in zip(named, dreamt, strict=True):
        assert torch.allclose(wake[name], -gradient, rtol=1e-9, atol=1e-11), name


def test_a_dream_needs_to_know_which_argument_is_the_data():
    def model(size, x=None):
        import pyro.distributions as dist

        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=torch.zeros(3))

    def guide(size):
        import pyro.distributions as dist

        with pyro.plate("data", 3):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match=r"none of the 1 arguments is what the model observes \(x\)"):
        sleep_phase(model, guide, 3)


def test_mean_bound_repeats_and_matches_a_direct_average():
    pair, x = linear_pair()
    evidence = pair.bed.log_evidence(x).mean().item()
    assert mean_bound(pair.model, pair.guide, x, batch_size=7) == pytest.approx(evidence, abs=1e-10)
    wide, x = linear_pair(stretch=1.5)
    assert mean_bound(wide.model, wide.guide, x) == mean_bound(wide.model, wide.guide, x)
