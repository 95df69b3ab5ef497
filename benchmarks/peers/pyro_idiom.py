"""Pyro, as its VAE example trains: nn.Modules registered by `pyro.module`, SVI, Trace_ELBO.

As there, pixels are cached as floats and a DataLoader collates them item by item, the
decoder ends in a sigmoid, and `pyro.optim.Adam` keeps one torch optimiser per tensor.
Unlike there, the batch is binarised (the example scores grey pixels) and has the size that
all share. `in_memory=True` is the same Pyro without what the example need not have: batches
are indexed in memory and the decoder gives logits.
"""

from collections.abc import Callable

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor, nn

from peers import HIDDEN, LATENT, LEARNING_RATE
from peers.batches import Cached, binarized, in_memory_batches, loader


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(784, HIDDEN)
        self.loc = nn.Linear(HIDDEN, LATENT)
        self.log_scale = nn.Linear(HIDDEN, LATENT)
        self.softplus = nn.Softplus()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.softplus(self.hidden(x))
        return self.loc(h), self.log_scale(h).exp()


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(LATENT, HIDDEN)
        self.out = nn.Linear(HIDDEN, 784)
        self.softplus = nn.Softplus()

    def forward(self, z: Tensor) -> Tensor:
        return self.out(self.softplus(self.hidden(z)))


class VAE(nn.Module):
    def __init__(self, logits: bool) -> None:
        super().__init__()
        self.encoder = Encoder()
        self.decoder = Decoder()
        self.logits = logits

    def pixels(self, z: Tensor) -> dist.TorchDistribution:
        out = self.decoder(z)
        if self.logits:
            return dist.Bernoulli(logits=out, validate_args=False).to_event(1)
        return dist.Bernoulli(torch.sigmoid(out), validate_args=False).to_event(1)

    def model(self, x: Tensor) -> None:
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x)):
            prior = dist.Normal(x.new_zeros(len(x), LATENT), x.new_ones(len(x), LATENT))
            z = pyro.sample("z", prior.to_event(1))
            pyro.sample("x", self.pixels(z), obs=x)

    def guide(self, x: Tensor) -> None:
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", len(x)):
            loc, scale = self.encoder(x)
            pyro.sample("z", dist.Normal(loc, scale).to_event(1))


def build(
    pixels: np.ndarray, batch_size: int, seed: int, workers: int = 0, in_memory: bool = False
) -> Callable[[], tuple[int, float]]:
    torch.manual_seed(seed)
    pyro.clear_param_store()
    vae = VAE(logits=in_memory)
    svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": LEARNING_RATE}), loss=Trace_ELBO())
    items = None if in_memory else loader(Cached(pixels), batch_size, workers)
    floats = torch.from_numpy(pixels).float().div_(255) if in_memory else None

    def epoch() -> tuple[int, float]:
        total = 0.0
        for x in in_memory_batches(floats, batch_size) if items is None else items:
            total += svi.step(binarized(x))
        return len(pixels), -total / len(pixels)

    return epoch
