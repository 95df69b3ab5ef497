"""How the torch peers come by their batches."""

import sys
from collections.abc import Iterator

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import ToTensor

from peers import Problem


class Cached(Dataset):
    """Floats in [0, 1] made once; an item is a row."""

    def __init__(self, pixels: np.ndarray) -> None:
        self.floats = torch.from_numpy(pixels).float().div_(255)

    def __len__(self) -> int:
        return len(self.floats)

    def __getitem__(self, index: int) -> Tensor:
        return self.floats[index]


class Images(Dataset):
    """What torchvision's MNIST does for an item: bytes, a PIL image, ToTensor."""

    def __init__(self, pixels: np.ndarray) -> None:
        self.bytes = pixels.reshape(-1, 28, 28)
        self.transform = ToTensor()

    def __len__(self) -> int:
        return len(self.bytes)

    def __getitem__(self, index: int) -> Tensor:
        return self.transform(Image.fromarray(self.bytes[index]))


def loader(data: Dataset, batch_size: int, workers: int) -> DataLoader:
    """Workers, if any, outlive the epoch, so that no epoch pays for starting them."""
    # A row's process was spawned, and would spawn its workers; fork is what a script on Linux does.
    context = "fork" if workers and sys.platform == "linux" else None
    return DataLoader(
        data,
        batch_size,
        shuffle=True,
        num_workers=workers,
        persistent_workers=workers > 0,
        multiprocessing_context=context,
    )


def floats_of(pixels: np.ndarray, problem: Problem) -> Tensor:
    """All images as floats, where the network is."""
    return torch.from_numpy(pixels).float().div_(255).to(problem.device)


def in_memory_batches(floats: Tensor, batch_size: int) -> Iterator[Tensor]:
    for index in torch.randperm(len(floats), device=floats.device).split(batch_size):
        yield floats[index]


def binarized(x: Tensor) -> Tensor:
    """A fresh draw of a batch, by a comparison: about half the time of torch.bernoulli."""
    return (torch.rand_like(x) < x).float()
