"""Laws of single parts: priors, posteriors and likelihoods."""

from __future__ import annotations

import copy
import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro.distributions import TorchDistribution, constraints
from safetensors.torch import load_model, save_model
from torch import Tensor, nn

from pyro_vae.protocols import rescoring
from pyro_vae.randomness import forked
from pyro_vae.sites import is_point

LEADING: tuple[tuple[int, ...], ...] = ((), (3,), (2, 3))
_DRAWS = 20_000


def check(battery: Any) -> list[str]:
    """Run every law of a battery, without pytest.

    Args:
        battery: An instance of a subclass of one of the batteries.
    Returns:
        The names of the laws that hold.
    Raises:
        AssertionError: The first law that does not.
    Example:
        >>> from pyro_vae.parts.priors.standard import StandardNormal
        >>> class TestNormal(PriorLaws):
        ...     def make(self):
        ...         return StandardNormal(2)
        >>> len(check(TestNormal())) > 5
        True
    """
    laws = [name for name in dir(battery) if name.startswith("test_")]
    for name in laws:
        getattr(battery, name)()
    return laws


class _Laws:
    """What the batteries of single parts share: a part, an input, a distribution, with so many dimensions of events."""

    event_dim: int | None = None

    def make(self) -> nn.Module:
        """A new part with new weights. Small: two or three latents, a few pixels."""
        raise NotImplementedError(f"{type(self).__name__} must say how to make its part: def make(self): return ...")

    def given(self, part: nn.Module, leading: tuple[int, ...], dtype: torch.dtype = torch.float32) -> TorchDistribution:
        """The distribution that a part returns for an input with these leading dimensions."""
        raise NotImplementedError

    def one(self, seed: int = 0) -> tuple[nn.Module, TorchDistribution]:
        """A part in float64, moved away from where it starts, and its distribution for one input."""
        torch.manual_seed(seed)
        part = self.make().double()
        with torch.no_grad():
            for parameter in part.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        return part, self.given(part, (), torch.float64)

    def drawn(self, part: nn.Module, seed: int = 1) -> Tensor:
        """A draw of the distribution for three inputs."""
        with seeded(seed), torch.no_grad():
            return self.given(part, (3,))()

    def test_shapes_follow_the_leading_dimensions(self) -> None:
        with seeded():
            part = self.make()
            event = tuple(self.given(part, ()).event_shape)
            assert self.event_dim in (None, len(event))
            for leading in LEADING:
                distribution = self.given(part, leading)
                assert tuple(distribution.batch_shape) == leading and tuple(distribution.event_shape) == event
                value = distribution()
                assert tuple(value.shape) == (*leading, *event)
                assert tuple(distribution.log_prob(value).shape) == leading

    def test_float64_stays_float64(self) -> None:
        with seeded():
            _, distribution = self.one()
            value = distribution()
            assert value.dtype == torch.float64 and distribution.log_prob(value).dtype == torch.float64

    def test_same_seed_same_draw(self) -> None:
        with seeded():
            part = self.make()
        draws = [self.drawn(part, seed) for seed in (1, 1, 2)]
        assert torch.equal(draws[0], draws[1])
        if not is_point(self.given(part, (3,))):
            assert not torch.equal(draws[0], draws[2])

    def test_draws_lie_in_the_support(self) -> None:
        with seeded():
            distribution = self.given(self.make(), (3,))
            value = distribution.sample(torch.Size([50]))
            assert distribution.support is not None, "the distribution does not say where it lives"
            assert torch.isfinite(value).all() and bool(distribution.support.check(value).all())

    def test_every_parameter_has_a_gradient(self) -> None:
        with seeded():
            part = self.make()
            distribution = self.given(part, (7,))
            value = distribution.rsample() if distribution.has_rsample else distribution.sample()
            loss = distribution.log_prob(value).sum()
            if distribution.has_rsample:
                loss = loss + (value * torch.randn_like(value)).sum()
            parameters = dict(part.named_parameters())
            if not parameters:
                return
            loss.backward()
            idle = [name for name, p in parameters.items() if p.grad is None or not bool(p.grad.abs().sum() > 0)]
            assert idle == [], f"{', '.join(idle)} had no gradient: nothing depends on it"
            assert all(bool(torch.isfinite(p.grad).all()) for p in parameters.values() if p.grad is not None)

    def test_a_copy_has_weights_of_its_own(self) -> None:
        with seeded():
            part = self.make()
            before = self.drawn(part)
            copied = copy.deepcopy(part)
            with torch.no_grad():
                for parameter in copied.parameters():
                    parameter.add_(1.0)
            assert torch.equal(self.drawn(part), before)

    def test_weights_can_be_saved_and_loaded(self) -> None:
        with seeded(), tempfile.TemporaryDirectory() as folder:
            path = str(Path(folder) / "part.safetensors")
            first, second = self.make(), self.make()
            if not first.state_dict():
                return
            save_model(first, path)
            load_model(second, path)
            assert torch.equal(self.drawn(first), self.drawn(second))


class _Densities(_Laws):
    """Laws of parts that return a distribution of the latent."""

    event_dim = 1

    def test_expands_as_a_particle_plate_does(self) -> None:
        with seeded():
            for leading in LEADING:
                distribution = self.given(self.make(), leading).expand(torch.Size([5, *leading]))
                value = distribution()
                assert value.shape[:1] == (5,) and distribution.log_prob(value).shape == distribution.batch_shape
                if value.numel() and not is_point(distribution):
                    assert not torch.equal(value[0], value[1]), "all particles are the same draw"

    def test_the_density_integrates_to_one(self) -> None:
        """E_q[r / q] = 1 for any density r that q covers; needs own draws only."""
        with seeded(), torch.no_grad():
            _, distribution = self.one()
            if is_point(distribution):
                return
            many = distribution.expand(torch.Size([_DRAWS]))
            narrow = _covered(many, many())
            value = many()
            log_q = many.log_prob(value)
            if distribution.support is constraints.sphere:
                d = distribution.event_shape[0]
                log_r = torch.full_like(log_q, math.lgamma(d / 2) - math.log(2) - d / 2 * math.log(math.pi))
            else:
                log_r = narrow.log_prob(value).sum(-1)
            _is_one((log_r - log_q).exp())


class PriorLaws(_Densities):
    """A module that returns p(z), batch_shape ()."""

    def given(self, part: nn.Module, leading: tuple[int, ...], dtype: torch.dtype = torch.float32) -> TorchDistribution:
        prior = part()
        return prior.expand(torch.Size(leading)) if leading else prior

    def test_scores_any_point_over_leading_dimensions(self) -> None:
        with seeded(), torch.no_grad():
            prior = self.one()[0]()
            value = prior.sample(torch.Size([4, 3]))
            each = torch.stack([torch.stack([prior.log_prob(v.clone()) for v in row]) for row in value])
            assert torch.allclose(prior.log_prob(value), each, rtol=1e-9, atol=1e-9)


class PosteriorLaws(_Densities):
    """A module from data to q(z | x).

    Attributes:
        x_shape: Shape of one datum that the part takes.
    """

    x_shape: tuple[int, ...] = (1, 4, 4)

    def given(self, part: nn.Module, leading: tuple[int, ...], dtype: torch.dtype = torch.float32) -> TorchDistribution:
        return part(_data((*leading, *self.x_shape), dtype))

    def test_rescoring_is_as_declared(self) -> None:
        with seeded(), torch.no_grad():
            part, _ = self.one()
            distribution = self.given(part, (3,), torch.float64)
            value = distribution()
            own = distribution.log_prob(value)
            declared = rescoring(part)
            if is_point(distribution):
                return
            try:
                again = self.given(part, (3,), torch.float64).log_prob(value.clone())
            except (KeyError, NotImplementedError):
                assert declared == "impossible", f"declared {declared!r}, but a foreign sample cannot be scored"
                return
            assert declared != "impossible", "declared impossible, but a foreign sample was scored"
            assert torch.allclose(own, again, rtol=1e-5, atol=1e-5)

    def test_data_do_not_mix(self) -> None:
        """q(z | x) of one datum does not depend on the others in its batch."""
        with seeded(), torch.no_grad():
            part, _ = self.one()
            x = _data((4, *self.x_shape), torch.float64)
            other = torch.cat([x[:1], 1 - x[1:]])
            with seeded(1):
                first = part(x)()[0]
            with seeded(1):
                assert torch.allclose(part(other)()[0], first, rtol=1e-9, atol=1e-12)


class LikelihoodLaws(_Laws):
    """A module from latents to p(x | z).

    Attributes:
        latent_dim: D that the part takes.
    """

    latent_dim: int = 2

    def given(self, part: nn.Module, leading: tuple[int, ...], dtype: torch.dtype = torch.float32) -> TorchDistribution:
        with seeded(3):
            return part(torch.randn(*leading, self.latent_dim, dtype=dtype))

    def test_particles_are_scored_one_by_one(self) -> None:
        with seeded(), torch.no_grad():
            part, _ = self.one()
            distribution = self.given(part, (5, 3), torch.float64)
            x = distribution.sample()[0]
            with seeded(3):
                z = torch.randn(5, 3, self.latent_dim, dtype=torch.float64)
            each = torch.stack([torch.stack([part(z[k, b]).log_prob(x[b]) for b in range(3)]) for k in range(5)])
            assert torch.allclose(distribution.log_prob(x), each, rtol=1e-9, atol=1e-9)

    def test_the_mean_is_that_of_the_draws(self) -> None:
        with seeded(), torch.no_grad():
            _, distribution = self.one()
            try:
                mean = distribution.mean
            except NotImplementedError:
                return
            draws = distribution.sample(torch.Size([_DRAWS]))
            stderr = draws.double().std(0) / _DRAWS**0.5
            assert ((draws.double().mean(0) - mean).abs() <= 4.5 * stderr + 1e-9).all()

    def test_draws_follow_the_density(self) -> None:
        """Continuous: E_p[r / p] = 1. Discrete: the frequencies of one pixel's values are its probabilities."""
        with seeded(), torch.no_grad():
            _, distribution = self.one()
            many = distribution.expand(torch.Size([_DRAWS]))
            draws = many.sample()
            if not getattr(distribution.support, "is_discrete", False):
                event = len(distribution.event_shape)
                r = _covered(many, many.sample())
                log_r = r.log_prob(draws).flatten(-event).sum(-1)
                # Of a bounded support, such as [0, 1], p covers only this share of r.
                assert many.support is not None, "the distribution does not say where it lives"
                inside = many.support.check(r.sample(torch.Size([_DRAWS]))).double().mean()
                _is_one((log_r - many.log_prob(draws)).exp() / inside)
                return
            pixel = draws.flatten(1)[:, 0]
            values, counts = pixel.unique(return_counts=True)
            images = draws[:1].expand(len(values), *draws.shape[1:]).clone()
            images.view(len(values), -1)[:, 0] = values
            share = torch.softmax(distribution.expand(torch.Size([len(values)])).log_prob(images), 0)
            stderr = (share * (1 - share) / _DRAWS).sqrt()
            common = counts >= 20
            assert ((counts / _DRAWS - share).abs()[common] <= 4.5 * stderr[common] + 2e-3 * share[common]).all()


@contextmanager
def seeded(seed: int = 0) -> Iterator[None]:
    """Noise of this seed, and no checks by Pyro."""
    with forked(), pyro.validation_enabled(False):
        torch.manual_seed(seed)
        yield


def _data(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64).to(dtype)


def _covered(many: TorchDistribution, pilot: Tensor) -> torch.distributions.Normal:
    """A narrow normal where the draws are dense: of some centres the one whose check is least noisy on a pilot."""
    log_prob, event = many.log_prob(pilot), len(many.event_shape)
    tried = []
    for centre in pilot[:20]:
        normal = torch.distributions.Normal(centre, 0.5 * pilot.std(0))
        ratio = (normal.log_prob(pilot).flatten(-event).sum(-1) - log_prob).exp()
        tried.append((ratio.std().item(), normal))
    return min(tried, key=lambda pair: pair[0])[1]


def _is_one(ratios: Tensor) -> None:
    mean, stderr = ratios.mean().item(), ratios.std().item() / len(ratios) ** 0.5
    assert stderr < 0.1, f"the check is too noisy to say anything: {mean:.3f} +- {stderr:.3f}"
    assert abs(mean - 1) <= 4.5 * stderr + 1e-6, f"the density integrates to {mean:.4f} +- {stderr:.4f}, wanted 1"
