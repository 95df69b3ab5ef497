"""Normalizing flows are changes of variables: exact densities, exact inverses, cheap draws."""

import copy
import math
import pickle
import subprocess
import sys
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.optimize
import torch
import zuko
from pyro import poutine
from pyro.infer import MCMC, NUTS, SVI, Predictive, Trace_ELBO
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

import pyro_vae as pv
from pyro_vae.parts.distributions.flow import Pushforward
from pyro_vae.parts.likelihoods import Normal
from pyro_vae.parts.posteriors.flow import IAF, MAF, NSF, Coupling, Flow
from pyro_vae.parts.posteriors.planar import Planar, Sylvester, invert_tanh_step, orthonormal, reflection_core
from pyro_vae.parts.priors import StandardNormal
from pyro_vae.parts.priors.standard import Flow as FlowPrior
from pyro_vae.programs.pair import Guide, Model
from pyro_vae.traces import log_q, particles

SMALL = {"hidden_features": (8, 8), "context": 5}
POSTERIORS = {
    "planar": lambda d: Planar(nn.Linear(3, 4), d, num_flows=4),
    "orthogonal": lambda d: Sylvester(nn.Linear(3, 4), d, 3, "orthogonal", num_ortho=max(d - 1, 1)),
    "householder": lambda d: Sylvester(nn.Linear(3, 4), d, 3, "householder", num_householder=2),
    "triangular": lambda d: Sylvester(nn.Linear(3, 4), d, 3, "triangular"),
    "iaf": lambda d: IAF(nn.Linear(3, 4), d, **SMALL),
    "maf": lambda d: MAF(nn.Linear(3, 4), d, **SMALL),
    "nsf": lambda d: NSF(nn.Linear(3, 4), d, bins=5, **SMALL),
    "coupling": lambda d: Coupling(nn.Linear(3, 4), d, **SMALL),
}
RESCORING = dict.fromkeys(POSTERIORS, "D passes") | dict.fromkeys(["planar", "maf", "nsf", "coupling"], "one pass")
PRIORS = {
    "maf": lambda d: FlowPrior(d, transforms=2, hidden_features=(8, 8)),
    "nsf": lambda d: FlowPrior(d, zuko.flows.NSF, transforms=2, bins=5, hidden_features=(8, 8)),
    "ready": lambda d: FlowPrior(zuko.flows.MAF(features=d, transforms=2, hidden_features=(8, 8))),
}
every = pytest.mark.parametrize("name", POSTERIORS)


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def moved(module, seed=0, by=0.15):
    """A module in float64, moved away from its start, so that a flow bends."""
    torch.manual_seed(seed)
    module = module.double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(by * torch.randn_like(parameter))
    return module


def posterior_of(name, latent_dim, seed=0, by=0.15):
    torch.manual_seed(seed)
    return moved(POSTERIORS[name](latent_dim), seed, by)


def change_of_variables(q, u):
    """z and log q(z) of one datum from its noise, by the determinant of autograd's Jacobian."""
    z = q.push(u)[0]
    jacobian = torch.autograd.functional.jacobian(lambda u: q.push(u)[0], u)
    return z, q.base.log_prob(u) - torch.linalg.slogdet(jacobian)[1]


# Densities


@every
def test_particles_are_one_by_one_changes_of_variables(name):
    d, k, b = 4, 7, 3
    posterior, x = posterior_of(name, d), random(b, 3, seed=1)
    model = Model(StandardNormal(d), Normal(nn.Linear(d, 3), 0.5)).double()
    guide = Guide(posterior)
    torch.manual_seed(3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        table = particles(model, guide, x, num_samples=k, vectorize=True, max_plate_nesting=1)
    torch.manual_seed(3)
    noise = posterior(x).expand([k, b]).base.rsample()
    for i in range(k):
        for j in range(b):
            z, density = change_of_variables(posterior(x[j]), noise[i, j])
            assert torch.allclose(table.latents["z"][i, j], z, rtol=0, atol=1e-10)
            joint = dist.Normal(0.0, 1.0).log_prob(z).sum()
            joint = joint + dist.Normal(model.likelihood.decoder(z), 0.5).log_prob(x[j]).sum()
            assert abs(table.log_q["z"][i, j] - density) < 1e-8
            assert abs(table.log_weight[i, j] - (joint - density)) < 1e-8
    # Particles and data differ, and so do their determinants: nothing was broadcast that should not be.
    log_det = posterior(x).expand([k, b]).push(noise)[1]
    assert log_det.std(0).min() > 1e-3 and log_det.std(1).min() > 1e-3


@every
def test_the_density_is_one_over_the_plane(name):
    posterior = posterior_of(name, 2, seed=1)
    line = torch.linspace(-12, 12, 201, dtype=torch.float64)
    grid = torch.cartesian_prod(line, line)
    with torch.no_grad():
        q = posterior(random(2, 3, seed=5))
        density = q.log_prob(grid.unsqueeze(1)).exp()
    # Splines have kinks, at which the trapezium rule is of second order.
    assert ((density.sum(0) * (line[1] - line[0]) ** 2) - 1).abs().max() < (1e-3 if name == "nsf" else 1e-7)


@every
def test_the_inverse_is_exact_in_value_and_gradient(name):
    posterior, x = posterior_of(name, 5), random(3, 3, seed=1)
    q = posterior(x)
    u = q.base.expand([6, 3]).rsample().detach()
    z, log_det = q.push(u)
    back, log_det_back = q.pull(z)
    assert torch.allclose(back, u, atol=1e-10) and torch.allclose(log_det_back, -log_det, atol=1e-9)
    # With z held, the gradient on the parameters is that of log q(z), here by finite differences.
    held, parameters = z.detach(), list(posterior.parameters())
    gradient = torch.autograd.grad(posterior(x).log_prob(held).sum(), parameters)
    direction = [random(*p.shape, seed=i) for i, p in enumerate(parameters)]
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            for p, v in zip(parameters, direction, strict=True):
                p.add_(sign * 1e-6 * v)
            values.append(posterior(x).log_prob(held).sum())
            for p, v in zip(parameters, direction, strict=True):
                p.sub_(sign * 1e-6 * v)
    wanted = (values[0] - values[1]) / 2e-6
    slope = sum((g * v).sum() for g, v in zip(gradient, direction, strict=True))
    assert abs(slope - wanted) < 1e-5 * (1 + abs(wanted))


@every
def test_each_says_what_scoring_another_sample_takes(name):
    posterior, x = posterior_of(name, 4), random(3, 3, seed=1)
    assert posterior.rescoring == RESCORING[name]
    guide = Guide(posterior)
    model = Model(StandardNormal(4), Normal(nn.Linear(4, 3), 0.5)).double()
    table = particles(model, guide, x, num_samples=5, vectorize=True)
    foreign = {"z": table.latents["z"].detach().clone()}
    assert torch.allclose(log_q(guide, foreign, x), table.log_q["z"], atol=1e-9)


@every
def test_shapes_dtypes_and_leading_dimensions(name):
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.float64):
        posterior = POSTERIORS[name](3).to(dtype)
        for leading in [(), (5,), (2, 5)]:
            q = posterior(random(*leading, 3, dtype=dtype))
            assert q.batch_shape == leading and q.event_shape == (3,) and q.has_rsample
            assert q.support is dist.constraints.real_vector
            z = q.rsample([4])
            assert z.shape == (4, *leading, 3) and z.dtype == dtype and q.log_prob(z).shape == (4, *leading)
            assert q.log_prob(z).dtype == dtype and not q.sample().requires_grad
            assert q.expand([6, *leading]).rsample().shape == (6, *leading, 3)
            assert torch.allclose(q.log_prob(z.clone()), q.log_prob(z), atol=2e-4)
            with pytest.raises(NotImplementedError):
                q.mean  # noqa: B018
    with pytest.raises(ValueError, match="does not say how many features"):
        type(posterior)(nn.Identity(), 3)


@every
def test_every_parameter_learns(name):
    torch.manual_seed(0)
    posterior = POSTERIORS[name](3)
    q = posterior(random(5, 3, dtype=torch.float32))
    z = q.rsample()
    (q.log_prob(z).sum() + (z * random(5, 3, seed=1, dtype=torch.float32)).sum()).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in posterior.parameters())


@every
def test_flows_start_close_to_their_diagonal_normal(name):
    torch.manual_seed(0)
    posterior, x = POSTERIORS[name](4).double(), random(50, 3, seed=1)
    d = posterior.latent_dim
    loc, log_scale = posterior.head(posterior.encoder(x))[:, : 2 * d].chunk(2, -1)
    with torch.no_grad():
        q = posterior(x)
        z = q.sample([100])
        off = q.log_prob(z) - torch.distributions.Normal(loc, log_scale.exp()).log_prob(z).sum(-1)
    assert off.mean() < 0.01  # nats: it is KL(q || diagonal)
    assert off.abs().max() > 0  # and yet not on it, where earlier layers would not learn


@every
def test_copies_pickles_and_states_carry_the_flow(name):
    posterior, x = posterior_of(name, 3), random(5, 3, seed=1)
    posterior(x).rsample()  # a module that has drawn keeps nothing of it
    other = posterior_of(name, 3, seed=9)
    other.load_state_dict(posterior.state_dict())
    z = random(5, 3, seed=2)
    for twin in (copy.deepcopy(posterior), pickle.loads(pickle.dumps(posterior)), other):
        assert torch.equal(twin(x).log_prob(z), posterior(x).log_prob(z))
        assert not {id(p) for p in twin.parameters()} & {id(p) for p in posterior.parameters()}


@every
def test_drawing_and_scoring_can_be_captured_as_one_graph(name):
    from torch.fx.experimental.proxy_tensor import make_fx

    posterior = posterior_of(name, 3)

    def density(x, u):
        z, log_det = posterior(x).push(u)
        return z, posterior(x).base.log_prob(u) - log_det

    with pyro.validation_enabled(False):  # what checks values reads them out of the graph
        graph = make_fx(density)(random(4, 3), random(4, 3, seed=1))
    x, u = random(4, 3, seed=2), random(4, 3, seed=3)
    for ours, theirs in zip(graph(x, u), density(x, u), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-12, atol=1e-12)


# The distribution's memory of its latest draw


class Counted:
    """z = exp(u) with a count of the inverses asked for."""

    def __init__(self, invertible=True):
        self.pulled = 0
        self.log_scale = torch.zeros(2, dtype=torch.float64, requires_grad=True)
        base = dist.Normal(torch.zeros(3, 2, dtype=torch.float64), 1.0).to_event(1)
        self.q = Pushforward(base, self.push, self.pull if invertible else None)

    def push(self, u):
        return (self.log_scale + u).exp(), (self.log_scale + u).sum(-1)

    def pull(self, z):
        self.pulled += 1
        return z.log() - self.log_scale, -z.log().sum(-1)

    def exact(self, z):
        return torch.distributions.LogNormal(self.log_scale, 1.0).log_prob(z).sum(-1)


def test_only_the_very_latest_draw_is_remembered():
    flow = Counted()
    first = flow.q.rsample()
    assert torch.allclose(flow.q.log_prob(first), flow.exact(first)) and flow.pulled == 0
    assert torch.allclose(flow.q.log_prob(first.clone()), flow.exact(first)) and flow.pulled == 1
    second = flow.q.rsample([4])
    assert torch.allclose(flow.q.log_prob(second), flow.exact(second)) and flow.pulled == 1
    assert torch.allclose(flow.q.log_prob(first), flow.exact(first)) and flow.pulled == 2
    wider = flow.q.expand([5, 3])
    assert wider.rsample().shape == (5, 3, 2)
    assert torch.allclose(flow.q.log_prob(second), flow.exact(second)) and flow.pulled == 2  # the copy drew, not this
    assert torch.allclose(wider.log_prob(second[0]), flow.exact(second[0]).expand(5, 3)) and flow.pulled == 3


def test_a_draw_that_was_written_to_is_scored_anew():
    flow = Counted()
    z = flow.q.sample()
    with torch.no_grad():
        before = flow.q.log_prob(z)
        z.mul_(2)
        after = flow.q.log_prob(z)
        assert torch.allclose(after, flow.exact(z)) and not torch.allclose(after, before)


def test_gradients_are_those_asked_for_whatever_the_draw_was_made_under():
    flow = Counted()
    z = flow.q.sample()
    with torch.no_grad():
        assert flow.pulled == 0 and not flow.q.log_prob(z).requires_grad and flow.pulled == 0
    score = torch.autograd.grad(flow.q.log_prob(z).sum(), flow.log_scale)[0]
    assert torch.allclose(score, torch.autograd.grad(flow.exact(z).sum(), flow.log_scale)[0])
    z.requires_grad_()
    assert torch.allclose(*(torch.autograd.grad(f(z).sum(), z)[0] for f in (flow.q.log_prob, flow.exact)))
    z = flow.q.rsample()
    with torch.no_grad():
        assert not flow.q.log_prob(z).requires_grad
    assert flow.pulled == 2
    total = torch.autograd.grad(flow.q.log_prob(z).sum(), flow.log_scale)[0]
    assert torch.allclose(total, torch.full((2,), -3.0, dtype=torch.float64)) and flow.pulled == 2
    with torch.inference_mode():
        z = flow.q.rsample()
        assert torch.allclose(flow.q.log_prob(z), flow.exact(z)) and flow.pulled == 2


def test_what_has_no_inverse_says_so_and_still_scores_its_own():
    flow = Counted(invertible=False)
    z = flow.q.rsample()
    assert torch.allclose(flow.q.log_prob(z), flow.exact(z))
    for other in (z.clone(), z.detach()):
        with pytest.raises(NotImplementedError, match="no inverse: it can score its latest draw"):
            flow.q.log_prob(other)
    with pytest.raises(NotImplementedError):  # drawn without gradients: none can be had
        flow.q.log_prob(flow.q.sample())

    def guide(x):
        with pyro.plate("data", 3):
            pyro.sample("z", flow.q)

    def model(x):
        with pyro.plate("data", 3):
            pyro.sample("z", dist.Normal(torch.zeros(3, 2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    table = particles(model, guide, torch.zeros(3), num_samples=4, vectorize=True)
    assert torch.allclose(table.log_q["z"], flow.exact(table.latents["z"]))
    with pytest.raises(ValueError, match=r"guide site 'z' \(Pushforward\) cannot score a sample that it did not draw"):
        log_q(guide, table.latents, torch.zeros(3))


def test_replay_scores_the_replayed_sample():
    posterior, x = posterior_of("iaf", 2), random(3, 3, seed=1)
    guide = Guide(posterior)
    first = poutine.trace(guide).get_trace(x)
    again = poutine.trace(poutine.replay(guide, trace=first)).get_trace(x)
    assert again.nodes["z"]["value"] is first.nodes["z"]["value"]
    for trace in (first, again):
        trace.compute_log_prob()
    assert torch.allclose(first.nodes["z"]["log_prob"], again.nodes["z"]["log_prob"], atol=1e-10)


# Planar


def test_the_scalar_equation_is_solved_to_rounding_with_its_derivatives():
    slopes = [-0.999, -0.99, -0.7, -0.1, 0.0, 0.3, 2.0, 30.0, 1000.0]
    values = [0.0, 1e-9, 1e-4, 1e-2, 0.05, 0.3, 1.0, 2.5, 10.0, 300.0, 2000.0]
    for m in slopes:
        for c in values:
            wanted = scipy.optimize.brentq(
                lambda a, m=m, c=c: a + m * np.tanh(a) - c, -1e-9, c + 1 - min(m, 0), xtol=1e-15, rtol=1e-14
            )
            for sign in (1, -1):
                found = invert_tanh_step(*(torch.tensor(v, dtype=torch.float64) for v in (m, sign * c))).item()
                # Conditioned like 1 / (1 + m) at worst.
                assert abs(sign * found - wanted) < 1e-12 * (1 + abs(wanted)) / min(1, 1 + m)
    m = torch.tensor([-0.9, -0.3, 0.5, 8.0], dtype=torch.float64, requires_grad=True)
    c = torch.tensor([0.7, -0.2, 3.0, -5.0], dtype=torch.float64, requires_grad=True)
    assert gradcheck(invert_tanh_step, (m, c)) and gradgradcheck(invert_tanh_step, (m, c))


def test_planar_steps_are_the_papers_with_a_constraint_that_holds():
    posterior, x = posterior_of("planar", 3, by=0.8), random(20, 3, seed=1)
    output = posterior.head(posterior.encoder(x))
    loc, log_scale, w, u, b = output.split([3, 3, 12, 12, 4], -1)
    w, u = w.reshape(20, 4, 3), u.reshape(20, 4, 3)
    noise = random(20, 3, seed=2)
    z = loc + log_scale.exp() * noise
    least = 1.0
    for i in range(4):
        wu = (w[:, i] * u[:, i]).sum(-1, keepdim=True)
        m = torch.log1p(torch.exp(wu) * math.expm1(0.999)) - 0.999
        v = u[:, i] + (m - wu) * w[:, i] / w[:, i].square().sum(-1, keepdim=True)
        least = min(least, (v * w[:, i]).sum(-1).min().item())
        z = z + v * torch.tanh((w[:, i] * z).sum(-1, keepdim=True) + b[:, i : i + 1])
    assert torch.allclose(posterior(x).push(loc + log_scale.exp() * noise)[0], z, rtol=1e-8, atol=1e-8)
    assert -1 < least < -0.3  # the constraint was at work


@pytest.mark.parametrize("name", ["planar", "orthogonal", "householder", "triangular"])
def test_hostile_parameters_keep_determinants_finite_and_steps_invertible(name):
    torch.manual_seed(0)
    posterior = POSTERIORS[name](3)
    parameters = 30 * torch.randn(2000, posterior.head.out_features)
    parameters[:, 3:6] = 0.0
    q = posterior.family(parameters)
    z = q.rsample()
    assert torch.isfinite(z).all() and torch.isfinite(q.log_prob(z)).all()
    # In float64 the inverse holds even here, up to the conditioning of the map (1e3 a step at worst).
    q = posterior.family(0.1 * parameters.double())
    u = q.base.rsample()
    assert torch.allclose(q.pull(q.push(u)[0])[0], u, atol=1e-5)


# Sylvester


def test_orthonormal_is_gram_schmidt_and_smooth():
    a = random(50, 6, 4).requires_grad_()
    q = orthonormal(a)
    assert (q.mT @ q - torch.eye(4)).abs().max() < 1e-12
    first = a[..., 0] / a[..., 0].norm(dim=-1, keepdim=True)
    second = a[..., 1] - (a[..., 1] * first).sum(-1, keepdim=True) * first
    assert torch.allclose(q[..., 0], first, atol=1e-12)
    assert torch.allclose(q[..., 1], second / second.norm(dim=-1, keepdim=True), atol=1e-12)
    assert gradcheck(orthonormal, (random(2, 4, 3).requires_grad_(),))
    assert (orthonormal(a.float()).double() - q).abs().max() < 1e-4
    q = orthonormal(random(500, 50, 16, dtype=torch.float32))
    assert (q.mT @ q - torch.eye(16)).abs().max() < 3e-6


def test_reflections_are_multiplied_without_a_loop():
    v = random(7, 6, 4)
    wanted = torch.eye(6, dtype=torch.float64).expand(7, 6, 6)
    for h in range(4):
        one = v[..., h : h + 1]
        wanted = wanted @ (torch.eye(6) - 2 * one @ one.mT / one.square().sum(-2, keepdim=True))
    product = torch.eye(6) - v @ reflection_core(v) @ v.mT
    assert torch.allclose(product, wanted, atol=1e-12)
    assert (product.mT @ product - torch.eye(6)).abs().max() < 1e-12


@pytest.mark.parametrize("kind", ["orthogonal", "householder", "triangular"])
def test_sylvester_steps_are_the_papers(kind):
    d, n = 4, 2
    posterior, x = posterior_of(kind, d), random(5, 3, seed=1)
    posterior = moved(Sylvester(nn.Linear(3, 4), d, n, kind))
    m, h = (d, posterior.num_vectors)
    output = posterior.head(posterior.encoder(x))
    loc, log_scale, rest = output.split([d, d, output.shape[-1] - 2 * d], -1)
    u = random(5, d, seed=2)
    z = z0 = loc + log_scale.exp() * u
    for step, one in enumerate(rest.reshape(5, n, -1).unbind(1)):
        square, diagonal, b, vectors = one.split([m * m, m, m, h * d], -1)
        square = square.reshape(5, m, m)
        r = square.triu(1) + torch.diag_embed(square.diagonal(dim1=-2, dim2=-1).tanh() * 0.9995)
        r_tilde = square.mT.triu(1) + torch.diag_embed(diagonal.tanh() * 0.9995)
        q = torch.eye(d, dtype=torch.float64).expand(5, d, d)
        if kind == "triangular":
            q = q.flip(-1) if step % 2 else q
        if kind == "orthogonal":
            q = orthonormal(vectors.reshape(5, h, d).mT)
        if kind == "householder":
            for v in vectors.reshape(5, h, d).unbind(1):
                q = q @ (torch.eye(d) - 2 * v.unsqueeze(-1) * v.unsqueeze(-2) / v.square().sum(-1)[:, None, None])
        inside = (r_tilde @ q.mT @ z.unsqueeze(-1)).squeeze(-1) + b
        z = z + (q @ r @ inside.tanh().unsqueeze(-1)).squeeze(-1)
    assert torch.allclose(posterior(x).push(z0)[0], z, rtol=1e-11, atol=1e-11)


# zuko


ZUKO = {
    "MAF": (zuko.flows.MAF, {}, 1e-9),
    "NSF": (zuko.flows.NSF, {}, 1e-9),
    "two passes": (zuko.flows.NSF, {"passes": 2}, 1e-9),
    "RealNVP": (zuko.flows.RealNVP, {}, 1e-9),
    "NAF": (zuko.flows.NAF, {}, 1e-4),
    "UNAF": (zuko.flows.UNAF, {}, 1e-4),
    "SOSPF": (zuko.flows.SOSPF, {}, 1e-4),
    "BPF": (zuko.flows.BPF, {}, 1e-4),
    "GF": (zuko.flows.GF, {}, 1e-4),
    "CNF": (zuko.flows.CNF, {}, 1e-3),
}


@pytest.mark.parametrize("fast", ["sampling", "scoring"])
@pytest.mark.parametrize("name", ZUKO)
def test_any_flow_of_zuko_is_a_posterior_in_either_direction(name, fast):
    flow, options, exact = ZUKO[name]
    torch.manual_seed(0)
    options = options | ({} if name == "CNF" else {"transforms": 2})
    posterior = moved(Flow(nn.Linear(3, 4), 3, flow, context=4, fast=fast, hidden_features=(8, 8), **options), by=0.05)
    x, noise = random(2, 3), 0.5 * random(2, 3, seed=1)
    q = posterior(x)
    for j in range(2):
        z, density = change_of_variables(posterior(x[j]), noise[j])
        assert abs(q.base.log_prob(noise)[j] - q.push(noise)[1][j] - density) < exact
        assert abs(q.log_prob(q.push(noise)[0])[j] - density) < 10 * exact
    z = q.rsample()
    (q.log_prob(z).sum() + z.sum()).backward()
    assert posterior.head.weight.grad.abs().sum() > 0
    if fast == "scoring":
        assert posterior.rescoring == "one pass"
        inside = (random(2, 3, seed=2) - posterior.head(posterior.encoder(x))[:, :3]) * (
            -posterior.head(posterior.encoder(x))[:, 3:6]
        ).exp()
        context = posterior.head(posterior.encoder(x))[:, 6:]
        oracle = posterior.flow(context).log_prob(inside) - posterior.head(posterior.encoder(x))[:, 3:6].sum(-1)
        assert torch.allclose(q.log_prob(random(2, 3, seed=2)), oracle, atol=exact)


def test_iaf_draws_in_one_pass_and_maf_in_as_many_as_latents():
    counts = {}
    for family in (IAF, MAF, Coupling):
        posterior, calls = family(nn.Linear(3, 4), 6, transforms=1), []
        posterior.flow.transform.transforms[0].hyper.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        q = posterior(torch.zeros(2, 3))
        z, drawing = q.rsample(), len(calls)
        q.log_prob(z)
        assert len(calls) == drawing  # what was drawn is scored for nothing
        q.log_prob(z.clone())
        counts[family] = (drawing, len(calls) - drawing)
    # The determinant in the slow direction takes one pass more.
    assert counts == {IAF: (1, 7), MAF: (7, 1), Coupling: (1, 2)}


def test_maf_warns_where_drawing_is_slow_and_names_the_remedy():
    with pytest.warns(UserWarning, match=r"MAF draws in 20 passes .* Use IAF"):
        MAF(nn.Linear(3, 4), 20)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for quick in (
            lambda: MAF(nn.Linear(3, 4), 3),
            lambda: IAF(nn.Linear(3, 4), 20),
            lambda: NSF(nn.Linear(3, 4), 20),
        ):
            quick()


def test_importing_zuko_leaves_the_validation_of_distributions_on():
    code = """
import pyro, torch
from pyro_vae.parts.posteriors.flow import IAF
from pyro_vae.parts.priors.standard import Flow
IAF(torch.nn.Linear(3, 4), 2)(torch.zeros(5, 3)).sample(); Flow(2)().sample()
try:
    torch.distributions.Normal(0.0, -1.0)
except ValueError:
    print("validated")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "validated", done.stderr


@pytest.mark.parametrize(
    "build, text",
    [
        (lambda e: Planar(e, 2, 0), "num_flows must be a positive integer, got 0"),
        (lambda e: Sylvester(e, 2, 0), "num_flows must be a positive integer, got 0"),
        (lambda e: Sylvester(e, 2, kind="qr"), 'got kind=\'qr\', wanted "orthogonal", "householder" or "triangular"'),
        (lambda e: Sylvester(e, 2, num_ortho=3), "got num_ortho=3 with kind='orthogonal' and 2 latents, wanted 1 to 2"),
        (lambda e: Sylvester(e, 2, kind="triangular", num_ortho=1), "the other kinds bend all latents"),
        (lambda e: Sylvester(e, 2, num_householder=2), "num_householder=2 with kind='orthogonal'"),
        (lambda e: Flow(e, 2, zuko.flows.NSF, fast="both"), 'got fast=\'both\', wanted "sampling" or "scoring"'),
        (lambda e: Flow(e, 2, zuko.flows.NSF, context=0), "context must be a positive number of features, got 0"),
        (lambda e: Flow(e, 2, zuko.flows.NCSF), r"got NCSF with a base of event_shape \(2,\) on .* all of R\^2"),
        (lambda e: Flow(e, 2, zuko.flows.GMM), "got GMM, wanted a normalizing flow .* use NormalMixture"),
        (lambda e: Flow(e, 2, lambda **_: zuko.flows.MAF(3, 4)), r"MAF with a base of event_shape \(3,\) .* R\^2"),
        (lambda e: FlowPrior(0), "latent_dim must be a positive integer, got 0"),
        (lambda e: FlowPrior(zuko.flows.NCSF(2)), r"got NCSF with a base .* R\^D"),
        (
            lambda e: FlowPrior(zuko.flows.MAF(2), transforms=2),
            "got a ready MAF and options to build one, wanted either",
        ),
        (
            lambda e: FlowPrior(zuko.flows.MAF(2, 3)),
            r"got a MAF that cannot be drawn from without a context .* context=0",
        ),
    ],
)
def test_what_cannot_be_is_named(build, text):
    with pytest.raises(ValueError, match=text):
        build(nn.Linear(3, 4))


# Priors


@pytest.mark.parametrize("name", PRIORS)
def test_a_flow_prior_scores_as_zuko_does_and_integrates_to_one(name):
    torch.manual_seed(0)
    prior = moved(PRIORS[name](2))
    assert prior.latent_dim == 2 and prior().batch_shape == () and prior().event_shape == (2,)
    line = torch.linspace(-12, 12, 301, dtype=torch.float64)
    z = torch.cartesian_prod(line, line)
    with torch.no_grad():
        log_p = prior().log_prob(z)
        assert torch.allclose(log_p, prior.flow().log_prob(z), rtol=1e-12)
        # Only the flow of SiLUs is smooth; the others have kinks.
        assert abs(log_p.exp().sum() * (line[1] - line[0]) ** 2 - 1) < (1e-7 if name == "maf" else 1e-4)
        wide = prior().expand([3, 5])
        drawn = wide.sample()
        assert drawn.shape == (3, 5, 2) and torch.allclose(wide.log_prob(drawn.clone()), wide.log_prob(drawn))
    twin = copy.deepcopy(prior)
    twin.load_state_dict(prior.state_dict())
    assert torch.equal(twin().log_prob(z[:5]), prior().log_prob(z[:5]))


def test_draws_of_a_flow_prior_follow_its_density():
    torch.manual_seed(0)
    prior = moved(PRIORS["nsf"](2))
    line = torch.linspace(-12, 12, 301, dtype=torch.float64)
    grid = torch.cartesian_prod(line, line)
    with torch.no_grad():
        mass = torch.softmax(prior().log_prob(grid), 0).unsqueeze(-1)
        moments = torch.cat([(mass * grid).sum(0), (mass * grid.square()).sum(0)])
        z = prior().sample([20_000])
    found = torch.cat([z, z.square()], -1)
    assert ((found.mean(0) - moments).abs() < 4 * found.std(0) / 20_000**0.5 + 1e-3).all()


def test_a_flow_prior_starts_close_to_the_standard_normal():
    torch.manual_seed(0)
    for name in ("maf", "nsf"):
        prior, z = PRIORS[name](3), random(500, 3, dtype=torch.float32)
        assert (prior().log_prob(z) - StandardNormal(3)().log_prob(z)).abs().mean() < 0.05


def flow_model():
    torch.manual_seed(0)
    return moved(Model(PRIORS["maf"](2), Normal(nn.Linear(2, 3), 0.5)))


def test_predictive_draws_from_a_flow_prior_and_a_flow_guide():
    model = flow_model()
    guide = Guide(posterior_of("nsf", 2))
    drawn = Predictive(model, num_samples=4)(size=5)
    assert drawn["z"].shape == (4, 5, 2) and drawn["x"].shape == (4, 5, 3)
    replicated = Predictive(poutine.uncondition(model), guide=guide, num_samples=4)(random(5, 3))
    assert replicated["x"].shape == (4, 5, 3) and replicated["z"].std() > 0


def test_nuts_runs_on_one_datum_under_a_flow_prior():
    model, x = flow_model(), random(1, 3, seed=4)
    torch.manual_seed(0)
    chain = MCMC(NUTS(model, max_tree_depth=3), num_samples=10, warmup_steps=10, disable_progbar=True)
    chain.run(x)
    z = chain.get_samples()["z"]
    assert z.shape == (10, 1, 2) and torch.isfinite(z).all() and z.std(0).min() > 0


@pytest.mark.slow
def test_nuts_under_a_flow_prior_has_the_moments_of_quadrature():
    model, x = flow_model(), random(1, 3, seed=4)
    line = torch.linspace(-8, 8, 401, dtype=torch.float64)
    grid = torch.cartesian_prod(line, line)
    with torch.no_grad():
        log_p = model.prior().log_prob(grid) + model.likelihood(grid).log_prob(x)
        mass = torch.softmax(log_p, 0).unsqueeze(-1)
        mean = (mass * grid).sum(0)
    torch.manual_seed(0)
    chain = MCMC(NUTS(model, max_tree_depth=5), num_samples=600, warmup_steps=200, disable_progbar=True)
    chain.run(x)
    z = chain.get_samples()["z"][:, 0]
    effective = chain.diagnostics()["z"]["n_eff"].reshape(-1)
    assert effective.min() > 50
    assert ((z.mean(0) - mean).abs() < 4 * z.std(0) / effective.sqrt()).all()


def test_pyros_own_elbo_trains_a_flow_prior_and_a_flow_guide():
    model = flow_model()
    guide = Guide(posterior_of("iaf", 2))
    before = [p.detach().clone() for m in (model.prior, guide.posterior) for p in m.parameters()]
    with pv.parameters.own_parameters(model, guide):
        torch.manual_seed(1)
        svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO(num_particles=2, vectorize_particles=True))
        svi.step(random(6, 3))
    after = [p for m in (model.prior, guide.posterior) for p in m.parameters()]
    assert all(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
