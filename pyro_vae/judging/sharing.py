"""Batches shared out to the processes of a group, with the numbers of one.

The noise of a batch is that of its number: at batch i the random states start at a seed made of (seed, i), whatever was
drawn before (`seed_of`). So it does not matter which process has a batch. Under an initialised process group of
``torch.distributed`` the processes (ranks) share the batches out, i to rank i modulo their number, and each gets what
all have found, in the order of one process (`shared`). They all make the call, with the same pair and data, which is
looked at (`look_at_all`), and read all data; a failure in one of them is one in all (`pyro_vae.inference.ranks.Setup`).
What goes over the batches otherwise (``for batch in run``) does so in each of them, on the same numbers. A call by one
process is made inside `pyro_vae.inference.ranks.alone`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

from torch import Tensor

from pyro_vae.inference.batches import Batches
from pyro_vae.inference.fingerprints import fingerprint, program_fingerprint
from pyro_vae.inference.ranks import alone, check_same, gathered, world
from pyro_vae.inference.trees import mapped
from pyro_vae.reach import modules_of
from pyro_vae.traces import Program

# From the seed of a batch to that of the next: odd, so that none comes twice in the 32 bits that torch's generator
# looks at, and 2**32 over the golden ratio, so that the batches of neighbouring seeds stay apart, too.
STEP = 0x9E3779B9

T = TypeVar("T")


def seed_of(seed: int, number: int) -> int:
    """The seed of a batch; of the first one, that of the sweep.

    Example:
        >>> seed_of(5, 0), len({seed_of(seed, number) % 2**32 for seed in range(100) for number in range(100)})
        (5, 10000)
    """
    return (seed + number * STEP) % 2**64


def shared(function: Callable[[Any], T], items: Iterable[Any], data: Callable[[], int]) -> list[T]:
    """What a function finds for each item, in their order, with tensors on the CPU: for its own in each process.

    Args:
        function: Of an item.
        items: The same in all processes, which go through all of them.
        data: How many data have come, once they have.
    Raises:
        Elsewhere: Another process failed.
        ValueError: They had different items.
    """
    rank, size = world()
    found, total = [], 0
    with alone():
        for item in items:
            if total % size == rank:
                found.append(_on_cpu(function(item)))
            total += 1
    if size == 1:
        return found
    parts = gathered((f"{total} of {data()} data", found))
    for other, (seen, _) in enumerate(parts):
        if seen != parts[0][0]:
            raise ValueError(
                f"got {parts[0][0]} in process 0 and {seen} in process {other} as batches, wanted the same. Pass all "
                "data in all processes, such as a dataset in the place of a loader of each one's own part."
            )
    return [parts[number % size][1][number // size] for number in range(total)]


def look_at_all(programs: Sequence[Program], batches: Batches, first: tuple[Any, ...]) -> None:
    """Refuse processes that have not the same pair, data and batches; what a pair counts in is its own affair."""
    tensors = [t for module in modules_of(*programs) for t in (*module.parameters(), *module.buffers())]
    real = [tensor.detach() for tensor in tensors if tensor.is_floating_point()]
    told = {f"tensor {number} of the pair": fingerprint(tensor) for number, tensor in enumerate(real)}
    told |= {f"program {number}": program_fingerprint(program) for number, program in enumerate(programs)}
    told |= {"number of data": f"{batches.num_data}", "first batch": fingerprint(first)}
    check_same(told | {"batch size": f"{batches.batch_size}"})


def _on_cpu(found: T) -> T:
    moved: T = mapped(lambda _, leaf: leaf.cpu() if isinstance(leaf, Tensor) else leaf, found)
    return moved
