"""PyTorch without a probabilistic language: the closed-form KL, and autograd.

With a DataLoader as PyTorch's own VAE example does it: torchvision's per-item path from a
PIL image through ToTensor. `in_memory=True` is the strongest eager peer: the data indexed
in memory, one fused Adam, nothing read back before the end of the epoch.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peers import LEARNING_RATE, Problem, weights
from peers.batches import Images, binarized, floats_of, in_memory_batches, loader
from peers.networks import Decoder, Encoder, take

_CHUNK = 2**22  # floats of one tensor of logits in an evaluation


class VAE(nn.Module):
    def __init__(self, problem: Problem) -> None:
        super().__init__()
        self.num_samples = problem.num_samples
        self.encoder = Encoder(problem)
        self.decoder = Decoder(problem)

    def loss(self, x: Tensor) -> Tensor:
        """Minus the bound, summed over the batch."""
        if self.num_samples > 1:
            return math.log(self.num_samples) * len(x) - self.log_weight(x, self.num_samples).logsumexp(0).sum()
        loc, log_scale = self.encoder(x)
        scale = log_scale.exp()
        z = loc + scale * torch.randn_like(loc)
        logits = self.decoder(z)
        kl = 0.5 * (loc.square() + scale.square() - 1 - 2 * log_scale).sum()
        return F.binary_cross_entropy_with_logits(logits, x, reduction="sum") + kl

    def log_weight(self, x: Tensor, num_samples: int) -> Tensor:
        """log p(x, z_k) - log q(z_k | x), (K, B); the constants of the two normals cancel."""
        loc, log_scale = self.encoder(x)
        noise = torch.randn(num_samples, *loc.shape, device=x.device)
        z = loc + log_scale.exp() * noise
        logits = self.decoder(z)
        log_likelihood = -F.binary_cross_entropy_with_logits(logits, x.expand_as(logits), reduction="none").sum(-1)
        return log_likelihood + (0.5 * (noise.square() - z.square()) + log_scale).sum(-1)


def _start(problem: Problem, precision: str | None) -> VAE:
    torch.manual_seed(problem.seed)
    if precision is not None:
        torch.set_float32_matmul_precision(precision)
    return VAE(problem).to(problem.device)


def _compile(function: Callable[..., Tensor], problem: Problem) -> Any:
    # Dynamic shapes would be slower; the short last batch gets a graph of its own in the warm-up.
    # "reduce-overhead" is what PyTorch's documentation advises on a GPU: CUDA graphs.
    return torch.compile(function, dynamic=False, mode="reduce-overhead" if "cuda" in problem.device else None)


def build(
    pixels: np.ndarray,
    problem: Problem,
    workers: int = 0,
    in_memory: bool = False,
    precision: str | None = None,
    compiled: bool = False,
) -> Callable[[], tuple[int, float]]:
    vae = _start(problem, precision)
    optimizer = torch.optim.Adam(vae.parameters(), lr=LEARNING_RATE, fused=True if in_memory else None)
    items = None if in_memory else loader(Images(pixels), problem.batch_size, workers)
    floats = floats_of(pixels, problem) if in_memory else None
    loss_of = _compile(vae.loss, problem) if compiled else vae.loss

    def epoch() -> tuple[int, float]:
        total: float | Tensor = 0.0
        for x in in_memory_batches(floats, problem.batch_size) if items is None else items:
            optimizer.zero_grad()
            loss = loss_of(binarized(x.to(problem.device).flatten(1)))
            loss.backward()
            optimizer.step()
            total += loss.detach() if in_memory else loss.item()
        return len(pixels), -float(total) / len(pixels)

    return epoch


def evaluation(
    pixels: np.ndarray, problem: Problem, precision: str | None = None, compiled: bool = False
) -> Callable[[], tuple[int, float]]:
    vae = _start(problem, precision).eval()
    for name, layers in weights(problem).items():
        take(getattr(vae, name), layers)
    ones = torch.from_numpy(pixels >= 128).float().to(problem.device)
    log_weight = _compile(vae.log_weight, problem) if compiled else vae.log_weight
    size = max(1, _CHUNK // (784 * problem.num_samples))  # so many images at a time

    @torch.no_grad()
    def epoch() -> tuple[int, float]:
        log_mean = [log_weight(x, problem.num_samples).logsumexp(0) for x in ones.split(size)]
        return len(pixels), (torch.cat(log_mean).mean() - math.log(problem.num_samples)).item()

    return epoch
