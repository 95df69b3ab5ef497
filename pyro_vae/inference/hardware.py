"""What of the machine a computation uses: the precision of matrix products, memory, and constants of libraries.

"highest", "high" and "medium" are torch's own (``torch.set_float32_matmul_precision``). "bfloat16" rounds what goes
into the linear and convolutional layers to 8 significant bits, in the forward and in the backward pass, and is two to
four times as fast where the hardware multiplies them. All else, every log-probability included, stays in float32, so
that no loss scaling is needed.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
import os
import platform
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from pyro_vae.precision import current, kept

PRECISIONS = ("highest", "high", "medium", "bfloat16")

_CONVOLUTIONS = {
    F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d
}  # fmt: skip
_active = 0


@contextlib.contextmanager
def matmul_precision(name: str | None) -> Iterator[None]:
    """Run what is inside with matrix products of this precision; None leaves it as it is.

    Raises:
        ValueError: An unknown name; bfloat16 where there are no instructions for it.
    Example:
        >>> with matmul_precision("medium"):
        ...     torch.get_float32_matmul_precision()
        'medium'
    """
    check_precision(name)
    layers = _BFloat16Layers() if name == "bfloat16" else contextlib.nullcontext()
    with kept(None if name == "bfloat16" else name), layers:
        yield


def check_precision(name: str | None) -> None:
    """Refuse an unknown precision of matrix products, or one that this machine has no instructions for."""
    if name is not None and name not in PRECISIONS:
        raise ValueError(f"unknown matmul_precision {name!r}, wanted one of {', '.join(PRECISIONS)}.")
    if name == "bfloat16" and not multiplies_bfloat16():
        raise ValueError(
            'got matmul_precision="bfloat16" on a CPU that has no instructions for it (on x86 AVX512-BF16 or AMX), or '
            "whose libraries may not use them (ONEDNN_MAX_CPU_ISA): products are done piece by piece, about ten times "
            'slower than in float32. Pass "medium", which is fast on any CPU.'
        )


def multiplies_bfloat16() -> bool:
    """Whether bfloat16 is worth it here: on a GPU, or on a CPU that has instructions for it (AVX512-BF16, AMX, SVE).

    A CPU is not asked by its flags alone: a library may have been told to leave instructions out (ONEDNN_MAX_CPU_ISA).
    """
    if torch.cuda.is_available() or torch.backends.mps.is_available():
        return True
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    if x86 and not (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()):
        return False
    return _products_in_bfloat16_are_fast()


@functools.cache
def _products_in_bfloat16_are_fast() -> bool:
    """Whether they take about the time of float32 at most: half of it by instructions, six to eighty times without.

    On one thread and by its own time, the fastest of many in turn: others may be at work on the machine.
    """
    times: dict[torch.dtype, list[float]] = {torch.float32: [], torch.bfloat16: []}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad():
            for kind, taken in [*times.items()] * 6:
                a = torch.ones(256, 256, dtype=kind)
                start = time.thread_time()
                torch.mm(a, a)
                taken.append(time.thread_time() - start)
    finally:
        torch.set_num_threads(threads)
    return min(times[torch.bfloat16]) < 1.5 * min(times[torch.float32])


def bfloat16_active() -> bool:
    """Whether layers are being rounded here."""
    return _active > 0


class _BFloat16Layers(TorchFunctionMode):
    """Layers of float32 networks multiply in bfloat16."""

    def __enter__(self) -> Any:
        global _active
        _active += 1
        return super().__enter__()

    def __exit__(self, *args: Any) -> None:
        global _active
        _active -= 1
        super().__exit__(*args)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear or func in _CONVOLUTIONS:
            return _rounded(func, func in _CONVOLUTIONS, *args, **kwargs or {})
        return func(*args, **kwargs or {})


def _rounded(
    func: Callable[..., Tensor], channels: bool, input: Tensor, weight: Tensor, bias: Tensor | None = None, *args: Any,
    **kwargs: Any,
) -> Tensor:  # fmt: skip
    if input.dtype != torch.float32 or weight.dtype != torch.float32:
        return func(input, weight, bias, *args, **kwargs)
    out = func(input.bfloat16(), weight.bfloat16(), None, *args, **kwargs).float()
    if bias is None:
        return out
    return out + (bias.view(-1, *(1,) * (weight.dim() - 2)) if channels else bias)


DEFAULT, ONEDNN = "torch's default", "oneDNN"  # libraries for products on a CPU


@contextlib.contextmanager
def multiplied_by(library: str | None) -> Iterator[None]:
    """Products of float32 on a CPU by a library, where both are as exact; None leaves them as they are."""
    free = library is not None and current().name in ("highest", "medium") and medium_is_exact()
    with kept(None if not free else "medium" if library == ONEDNN else "highest"):
        yield


@functools.cache
def medium_is_exact() -> bool:
    """Whether "medium" keeps float32 on this CPU: it does where there is no matrix unit for bfloat16."""
    a, b = (torch.arange(256.0 * 256).add(shift).sin().view(256, 256) for shift in (0, 1))
    with kept("medium"):
        error = (a @ b - (a.double() @ b.double())).abs().max().item()
    return error < 1e-4  # bfloat16 is off by more than 1e-2 here


# From malloc.h, and what glibc arrives at by itself in a process that frees large blocks.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
_USUAL = {_MMAP_MAX: 65536, _MMAP_THRESHOLD: 32 * 2**20, _TRIM_THRESHOLD: 64 * 2**20}
_depth = 0


@contextlib.contextmanager
def reused_memory() -> Iterator[None]:
    """Keep freed memory for the next step; give it back to the system at the end.

    By default glibc gives each large tensor back to the kernel, which hands it out again zeroed, page by page: with 50
    particles of MNIST a good part of the step. The price is that the process stays at its peak until the end.

    Example:
        >>> import torch
        >>> with reused_memory():
        ...     total = sum(torch.ones(1000, 1000).sum().item() for _ in range(3))
        >>> total
        3000000.0
    """
    global _depth
    library = _glibc()
    _depth += 1
    if library is not None and _depth == 1:
        library.mallopt(_MMAP_MAX, 0)
        library.mallopt(_TRIM_THRESHOLD, 2**31 - 1)
    try:
        yield
    finally:
        _depth -= 1
        if library is not None and _depth == 0:
            for name, value in _USUAL.items():
                library.mallopt(name, value)
            library.malloc_trim(0)


_SPECIAL = (0.0, -0.0, 1.0, -1.0, math.inf, -math.inf, math.nan, 89.0, -110.0, 1e-40)


def read_constants() -> None:
    """Read, once in a process, what torch's log1p and expm1 hold for special arguments (0, -1, inf, ...).

    With AVX-512 these constants are loaded under a mask, which leaves all of them out where no argument is special, and
    their page of the library is not in memory until somebody has read it. Until then the processor looks for it in
    vain in each call, and suppresses the fault: that takes six times as long as the function, and softplus, ELU,
    log-sigmoid and the Bernoulli of logits are made of these two. A call with special arguments brings the page in.
    """
    _read_constants(os.getpid())


@functools.cache
def _read_constants(process: int) -> None:
    special = torch.tensor(_SPECIAL, dtype=torch.float32, device="cpu").repeat(16)  # whole vectors of any processor
    for function in (torch.log1p, torch.expm1):
        function(special)


@functools.cache
def _glibc() -> Any:
    if platform.libc_ver()[0] != "glibc":
        return None
    try:
        library = ctypes.CDLL(None)
        return library if hasattr(library, "mallopt") and hasattr(library, "malloc_trim") else None
    except OSError:
        return None
