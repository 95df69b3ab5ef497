"""Pyro, as its VAE example trains: nn.Modules registered by `pyro.module`, SVI, Trace_ELBO.

As there, pixels are cached as floats and a DataLoader collates them item by item, the
decoder ends in a sigmoid, and `pyro.optim.Adam` keeps one torch optimiser per tensor.
Unlike there, the batch is binarised (the example scores grey pixels) and has the size that
all share. `in_memory=True` is the same Pyro without what the example need not have: batches
are indexed in memory and the decoder gives logits. `jit=True` is the example's `--jit`.
With K > 1 samples the loss is RenyiELBO, which at alpha = 0 is the bound of IWAE.
"""

from collections.abc import Callable

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import ELBO, SVI, JitTrace_ELBO, RenyiELBO, Trace_ELBO
from torch import Tensor, nn

from peers import LEARNING_RATE, Problem, weights
from peers.batches import Cached, binarized, floats_of, in_memory_batches, loader
from peers.networks import Decoder, Encoder, take


class VAE(nn.Module):
    def __init__(self, problem: Problem, logits: bool) -> None:
        super().__init__()
        self.encoder = Encoder(problem)
        self.decoder = Decoder(problem)
        self.latent, self.logits = problem.latent, logits

    def pixels(self, z: Tensor) -> dist.TorchDistribution:
        out = self.decoder(z)
        if self.logits:
            return dist.Bernoulli(logits=out, validate_args=False).to_event(1)
        return dist.Bernoulli(torch.sigmoid(out), validate_args=False).to_event(1)

    # x.shape[0] rather than len(x): under JitTrace_ELBO it is traced, and the last batch may be shorter.
    def model(self, x: Tensor) -> None:
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", x.shape[0]):
            prior = dist.Normal(x.new_zeros(x.shape[0], self.latent), x.new_ones(x.shape[0], self.latent))
            z = pyro.sample("z", prior.to_event(1))
            pyro.sample("x", self.pixels(z), obs=x)

    def guide(self, x: Tensor) -> None:
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", x.shape[0]):
            loc, log_scale = self.encoder(x)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


def bound(problem: Problem, jit: bool = False) -> ELBO:
    """The loss that Pyro has for so many samples, in its fastest form."""
    if problem.num_samples > 1:
        return RenyiELBO(alpha=0, num_particles=problem.num_samples, vectorize_particles=True, max_plate_nesting=1)
    return JitTrace_ELBO(ignore_jit_warnings=True) if jit else Trace_ELBO()


def build(
    pixels: np.ndarray, problem: Problem, workers: int = 0, in_memory: bool = False, jit: bool = False
) -> Callable[[], tuple[int, float]]:
    torch.manual_seed(problem.seed)
    pyro.clear_param_store()
    vae = VAE(problem, logits=in_memory).to(problem.device)
    svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": LEARNING_RATE}), loss=bound(problem, jit))
    items = None if in_memory else loader(Cached(pixels), problem.batch_size, workers)
    floats = floats_of(pixels, problem) if in_memory else None

    def epoch() -> tuple[int, float]:
        total = 0.0
        for x in in_memory_batches(floats, problem.batch_size) if items is None else items:
            total += svi.step(binarized(x.to(problem.device)))
        return len(pixels), -total / len(pixels)

    return epoch


def evaluation(pixels: np.ndarray, problem: Problem) -> Callable[[], tuple[int, float]]:
    """One image at a time, which is as many as memory and caches like at thousands of samples."""
    torch.manual_seed(problem.seed)
    pyro.clear_param_store()
    vae = VAE(problem, logits=True).to(problem.device)
    for name, layers in weights(problem).items():
        take(getattr(vae, name), layers)
    ones = torch.from_numpy(pixels >= 128).float().to(problem.device)
    loss = bound(problem)

    @torch.no_grad()
    def epoch() -> tuple[int, float]:
        with pyro.validation_enabled(False):
            total = sum(loss.loss(vae.model, vae.guide, x) for x in ones.split(1))
        return len(pixels), -total / len(pixels)

    return epoch
