"""PyTorch without a probabilistic language: the closed-form KL, and autograd.

With a DataLoader as PyTorch's own VAE example does it: torchvision's per-item path from a
PIL image through ToTensor. `in_memory=True` is the strongest eager peer: the data indexed
in memory, one fused Adam, nothing read back before the end of the epoch.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peers import HIDDEN, LATENT, LEARNING_RATE
from peers.batches import Images, binarized, in_memory_batches, loader


class VAE(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Linear(784, HIDDEN)
        self.loc = nn.Linear(HIDDEN, LATENT)
        self.log_scale = nn.Linear(HIDDEN, LATENT)
        self.decode = nn.Linear(LATENT, HIDDEN)
        self.logits = nn.Linear(HIDDEN, 784)

    def loss(self, x: Tensor) -> Tensor:
        """Minus the ELBO, summed over the batch."""
        h = F.softplus(self.encode(x))
        loc, log_scale = self.loc(h), self.log_scale(h)
        scale = log_scale.exp()
        z = loc + scale * torch.randn_like(loc)
        logits = self.logits(F.softplus(self.decode(z)))
        kl = 0.5 * (loc.square() + scale.square() - 1 - 2 * log_scale).sum()
        return F.binary_cross_entropy_with_logits(logits, x, reduction="sum") + kl


def build(
    pixels: np.ndarray, batch_size: int, seed: int, workers: int = 0, in_memory: bool = False,
    precision: str | None = None, compiled: bool = False,
) -> Callable[[], tuple[int, float]]:
    torch.manual_seed(seed)
    if precision is not None:
        torch.set_float32_matmul_precision(precision)
    vae = VAE()
    optimizer = torch.optim.Adam(vae.parameters(), lr=LEARNING_RATE, fused=True if in_memory else None)
    items = None if in_memory else loader(Images(pixels), batch_size, workers)
    floats = torch.from_numpy(pixels).float().div_(255) if in_memory else None
    # Dynamic shapes would be slower; the short last batch gets a graph of its own in the warm-up epoch.
    loss_of = torch.compile(vae.loss, dynamic=False) if compiled else vae.loss

    def epoch() -> tuple[int, float]:
        total: float | Tensor = 0.0
        for x in in_memory_batches(floats, batch_size) if items is None else items:
            optimizer.zero_grad()
            loss = loss_of(binarized(x.flatten(1)))
            loss.backward()
            optimizer.step()
            total += loss.detach() if in_memory else loss.item()
        return len(pixels), -float(total) / len(pixels)

    return epoch
