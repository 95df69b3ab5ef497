"""Objectives agree with Pyro, with each other, and with closed forms."""

import copy
import math

import pyro
import pytest
import torch
from pyro.infer import RenyiELBO, Trace_ELBO

from pyro_vae.inference.bounds import elbo, iwae, map_estimate, reconstruction
from pyro_vae.inference.objectives import Objective, mean_bound
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
    with pytest.raises(ValueError, match="tempers the elbo only"):
        Objective(iwae, 2, beta=0.5).loss(*small_pair(), binary())


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


def test_mean_bound_repeats_and_matches_a_direct_average():
    pair, x = linear_pair()
    evidence = pair.bed.log_evidence(x).mean().item()
    assert mean_bound(pair.model, pair.guide, x, batch_size=7) == pytest.approx(evidence, abs=1e-10)
    wide, x = linear_pair(stretch=1.5)
    assert mean_bound(wide.model, wide.guide, x) == mean_bound(wide.model, wide.guide, x)
