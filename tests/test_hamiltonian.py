"""Batched Hamiltonian moves: stationarity, reversibility, a law per chain and datum."""

import math

import torch
from torch import Tensor

from pyro_vae.judging.hamiltonian import Adaptation, State, transition

PRECISION = torch.tensor([[2.0, 0.9], [0.9, 1.0]], dtype=torch.float64)
CENTRES = torch.tensor([[0.0, 0.0], [3.0, -2.0], [10.0, 0.5]], dtype=torch.float64)
WIDTHS = torch.tensor([1.0, 0.1, 5.0], dtype=torch.float64)


def normal(u: Tensor) -> tuple[Tensor, Tensor]:
    """Three data, each a correlated normal of its own centre and width."""
    z = (u - CENTRES) / WIDTHS[:, None]
    pull = z @ PRECISION
    return -0.5 * (pull * z).sum(-1)[None], -(pull / WIDTHS[:, None])[None]


def quartic(u: Tensor) -> tuple[Tensor, Tensor]:
    """exp(-u^4 / 4): far enough from normal that an uncorrected leapfrog is visibly wrong."""
    return -0.25 * u.pow(4).sum(-1)[None], -u.pow(3)[None]


def run(density, start, step, scale, num_moves, num_leapfrog=3, seed=0):
    torch.manual_seed(seed)
    state, rates, kept = State.at(density, start), [], []
    for _ in range(num_moves):
        state, rate = transition(state, density, step.new_ones(1), step, scale, num_leapfrog)
        rates.append(rate)
        kept.append(state.position)
    return state, torch.stack(rates), torch.stack(kept, 1)


def test_an_exact_draw_stays_an_exact_draw():
    """2 moves of 20,000 exact draws: mean, variance and covariance are those of the target."""
    chains = 20_000
    tril = torch.linalg.cholesky(torch.linalg.inv(PRECISION))
    z = torch.randn(chains, 3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) @ tril.T
    start = CENTRES + WIDTHS[:, None] * z
    state, rate, _ = run(normal, start, 1.1 * torch.ones(3).double(), WIDTHS[:, None].expand(3, 2), 2)
    z = (state.position - CENTRES) / WIDTHS[:, None]
    covariance = torch.linalg.inv(PRECISION)
    outer = z.unsqueeze(-1) * z.unsqueeze(-2)
    assert ((z.mean(0)).abs() < 4 * z.std(0) / math.sqrt(chains)).all()
    assert ((outer.mean(0) - covariance).abs() < 4 * outer.std(0) / math.sqrt(chains)).all()
    assert (rate.mean((0, 1)) < 0.95).all()  # steps so long that without a correction the variance is wrong
    assert (state.position != start).any()


def test_the_stationary_distribution_of_a_quartic():
    """E u^2 = 2 Gamma(3/4) / Gamma(1/4) and E u^4 = 1, from one point."""
    _, rate, kept = run(quartic, torch.full((4000, 1, 1), 1.5, dtype=torch.float64), torch.full((1,), 0.8).double(),
                        torch.ones(1, 1).double(), 150, num_leapfrog=2)  # fmt: skip
    u = kept[:, 20:, 0, 0]
    for power, truth in ((2, 2 * math.gamma(0.75) / math.gamma(0.25)), (4, 1.0)):
        per_chain = u.pow(power).mean(1)
        assert abs(per_chain.mean() - truth) < 4 * per_chain.std() / math.sqrt(4000)
        assert per_chain.std() / math.sqrt(4000) < 0.02
    assert 0.5 < rate.mean() < 0.95


def test_chains_and_data_accept_by_themselves():
    start = CENTRES.expand(64, 3, 2).clone()
    step = torch.tensor([0.01, 30.0, 1.2], dtype=torch.float64)
    state, rate, _ = run(normal, start, step, WIDTHS[:, None].expand(3, 2), 1)
    moved = (state.position != start).any(-1)
    assert rate[0, :, 0].min() > 0.99 and moved[:, 0].all()
    assert rate[0, :, 1].max() < 1e-6 and not moved[:, 1].any()
    assert 0 < moved[:, 2].sum() < 64
    # What a state says of itself is true, moved or not.
    values, gradients = normal(state.position)
    assert torch.equal(values, state.values) and torch.equal(gradients, state.gradients)


def test_a_trajectory_that_leaves_the_numbers_is_rejected():
    def cliff(u: Tensor) -> tuple[Tensor, Tensor]:
        value = torch.where(u[..., 0] > 0, -u[..., 0], math.nan)
        return value[None], torch.where(u > 0, -1.0, math.nan)[None]

    state, rate, kept = run(cliff, torch.full((500, 1, 1), 0.5).double(), torch.full((1,), 0.7).double(),
                            torch.ones(1, 1).double(), 300, num_leapfrog=2)  # fmt: skip
    u = kept[:, 50:, 0, 0]
    assert (u > 0).all() and rate.isfinite().all()
    mean = u.mean(1)
    assert abs(mean.mean() - 1) < 4 * mean.std() / math.sqrt(500)  # an exponential


def test_a_mixture_of_rows_is_the_tempered_density():
    def two(u: Tensor) -> tuple[Tensor, Tensor]:
        return torch.stack([-0.5 * (u**2).sum(-1), -2.0 * ((u - 3) ** 2).sum(-1)]), torch.stack([-u, -4.0 * (u - 3)])

    torch.manual_seed(0)
    beta = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)  # each datum at its own temperature
    state = State.at(two, torch.ones(300, 3, 1).double())
    kept = []
    for _ in range(150):
        state, _ = transition(state, two, torch.stack([1 - beta, beta]), torch.ones(3).double(),
                              torch.tensor([[1.0], [0.6], [0.5]]).double(), 2)  # fmt: skip
        kept.append(state.position[..., 0])
    u = torch.stack(kept[20:], 1)
    precision = (1 - beta) + 4 * beta
    mean, second = u.mean(1), (u - 12 * beta / precision).square().mean(1)
    assert ((mean.mean(0) - 12 * beta / precision).abs() < 4 * mean.std(0) / math.sqrt(300)).all()
    assert ((second.mean(0) - 1 / precision).abs() < 4 * second.std(0) / math.sqrt(300)).all()


def test_dual_averaging_finds_a_step_per_datum():
    torch.manual_seed(0)
    adaptation = Adaptation.start(torch.tensor([1e-3, 1.0, 50.0], dtype=torch.float64))
    state = State.at(normal, CENTRES.expand(16, 3, 2).clone())
    scale, one = torch.ones(3, 2).double(), torch.ones(1).double()
    for _ in range(400):
        state, rate = transition(state, normal, one, adaptation.log_step.exp(), scale, 3)
        adaptation = adaptation.update(rate.mean(0), 0.8)
    step = adaptation.averaged.exp()
    state, rate, _ = run(normal, state.position, step, scale, 200)
    assert ((rate.mean((0, 1)) - 0.8).abs() < 0.08).all()
    assert torch.allclose(step / WIDTHS, (step / WIDTHS).mean(), rtol=0.25)  # proportional to the width
