"""Small pairs with known answers that several tests share."""

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_vae.data.testbeds import LinearGaussian
from pyro_vae.parts.likelihoods import Bernoulli
from pyro_vae.parts.networks import MLP
from pyro_vae.parts.posteriors import DiagonalNormal
from pyro_vae.parts.priors import StandardNormal
from pyro_vae.programs.pair import Guide, Model


def small_pair(seed: int = 0, hidden: int = 16, latent_dim: int = 3) -> tuple[Model, Guide]:
    """A Bernoulli VAE for (1, 4, 4) data."""
    torch.manual_seed(seed)
    model = Model(StandardNormal(latent_dim), Bernoulli(MLP(latent_dim, [hidden], (1, 4, 4))))
    return model, Guide(DiagonalNormal(MLP((1, 4, 4), [hidden], None), latent_dim))


def named(value: object) -> str:
    """A name for pytest that is the same in every process."""
    return getattr(value, "__name__", str(value))


def binary(size: int = 12, seed: int = 0) -> Tensor:
    """Binary (1, 4, 4) data: two patterns with a little noise, so that there is something to learn."""
    generator = torch.Generator().manual_seed(seed)
    pattern = (torch.arange(16).reshape(1, 4, 4) % 2).float()
    flip = torch.randint(2, (size, 1, 1, 1), generator=generator).float()
    noise = (torch.rand(size, 1, 4, 4, generator=generator) < 0.1).float()
    return (pattern - flip).abs().sub(noise).abs()


class LinearPair(nn.Module):
    """The linear-Gaussian test bed as plain Pyro methods, with any Gaussian guide."""

    def __init__(self, bed: LinearGaussian, stretch: float = 1.0, exact: bool = True) -> None:
        super().__init__()
        self.bed, self.stretch, self.exact = bed, stretch, exact

    def model(self, x: Tensor) -> None:
        weight, loc = self.bed.weight, self.bed.loc
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(weight.new_zeros(weight.shape[1]), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ weight.T + loc, self.bed.scale).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        posterior = self.bed.posterior(x)
        with pyro.plate("data", len(x)):
            if self.exact:
                tril = posterior.scale_tril * self.stretch
                pyro.sample("z", dist.MultivariateNormal(posterior.mean, scale_tril=tril))
            else:
                best = self.bed.best_mean_field(x)
                pyro.sample("z", dist.Normal(best.mean, best.stddev * self.stretch).to_event(1))


def linear_pair(**options: object) -> tuple[LinearPair, Tensor]:
    """A pair in float64 and 30 data from it."""
    bed = LinearGaussian.random(6, 3, 0.7, seed=1)
    bed = LinearGaussian(bed.weight.double(), bed.loc.double(), bed.scale)
    _, x = bed.sample(30, generator=torch.Generator().manual_seed(2))
    return LinearPair(bed, **options), x.double()
