"""The command in several processes, as ``torchrun --nproc-per-node N -m pyro_vae fit ...`` starts them.

The first one has the run folder, the bar and the words; the others train, or evaluate, with it.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

import click

_T = TypeVar("_T")
_NAMES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def number() -> int:
    """How many processes were started together."""
    return int(os.environ["WORLD_SIZE"]) if all(name in os.environ for name in _NAMES) else 1


@contextlib.contextmanager
def group() -> Iterator[None]:
    """The process group of this command, if it was started in several processes and has none yet."""
    if number() == 1:
        yield
        return
    import torch
    import torch.distributed as dist

    if dist.is_initialized():
        yield
        return
    on_gpu, local = torch.cuda.is_available(), int(os.environ.get("LOCAL_RANK", "0"))
    if on_gpu and local >= torch.cuda.device_count():
        raise ValueError(
            f"got {local + 1} processes on a machine of {torch.cuda.device_count()} GPUs, wanted one for each. Pass "
            "--nproc-per-node as many, or hide the GPUs by CUDA_VISIBLE_DEVICES= to fit on the CPU."
        )
    if on_gpu:
        torch.cuda.set_device(local)
    store, rank, size = next(dist.rendezvous("env://"))
    if os.environ.get("LOCAL_WORLD_SIZE") == str(size):  # all under one agent, which counts its restarts
        # Its store may be the one of the processes before a restart, with the addresses of those that are gone.
        store = dist.PrefixStore(f"restart {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", store=store, rank=rank, world_size=size)
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def together() -> Iterator[None]:
    """A command that does not train and whose work the processes share: the first one speaks, and says what failed."""
    if number() == 1:
        yield
        return
    from pyro_vae.inference.ranks import Setup, world

    with group(), contextlib.ExitStack() as stack:
        rank, _ = world()
        if rank:
            nowhere = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
            stack.enter_context(contextlib.redirect_stderr(nowhere))
        try:
            with Setup() as setup:
                yield
                setup.done()
        except (Exception, KeyboardInterrupt) as error:
            if rank:
                time.sleep(1)  # torchrun ends all when one has ended, and the first is to have its say
                raise click.exceptions.Exit(2 if isinstance(error, Exception) else 130) from error
            raise


def is_first() -> bool:
    """Whether this process has the files and the words."""
    from pyro_vae.inference.ranks import world

    return world()[0] == 0


def of_first(made: Callable[[], _T]) -> _T | None:
    """What the first process makes; None in the others, which leave without a word where it fails."""
    from pyro_vae.inference.ranks import first_says, world

    rank, size = world()
    if size == 1:
        return made()
    if rank:
        if not first_says(None):
            raise click.exceptions.Exit(2)
        return None
    fine = False
    try:
        result = made()
        fine = True
    finally:
        first_says(fine)
    return result
