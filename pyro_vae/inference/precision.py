"""In which precision the matrix products of networks run.

Three settings are torch's own (``torch.set_float32_matmul_precision``): "highest", "high"
and "medium" take float32 and give float32, by faster kernels where the hardware has them.
"bfloat16" rounds what goes into the linear and convolutional layers to 8 significant bits,
in the forward and in the backward pass, and is two to four times as fast where the
hardware multiplies them; a CPU that has no instructions for it is ten times slower than in
float32, of which one warning is given. Everything else, every log-probability included, stays in
float32: a layer's result is float32 again, its bias is added there, and parameters, moments
and updates are float32 throughout, so that no loss scaling is needed.
"""

from __future__ import annotations

import contextlib
import platform
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

PRECISIONS = ("highest", "high", "medium", "bfloat16")

_LINEAR = {F.linear}
_CONVOLUTIONS = {
    F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d
}  # fmt: skip
_active = 0
_said = False


@contextlib.contextmanager
def matmul_precision(name: str | None) -> Iterator[None]:
    """Run what is inside with matrix products of this precision; None leaves it as it is.

    Raises:
        ValueError: An unknown name.
    Example:
        >>> layer = torch.nn.Linear(1, 1, bias=False)
        >>> with matmul_precision("bfloat16"):
        ...     y = layer(torch.ones(1))
        >>> y.dtype, torch.equal(y, layer.weight[0].bfloat16().float())
        (torch.float32, True)
    """
    if name is not None and name not in PRECISIONS:
        raise ValueError(f"unknown matmul_precision {name!r}, wanted one of {', '.join(PRECISIONS)}.")
    if name == "bfloat16":
        _say_if_slow()
    before = torch.get_float32_matmul_precision()
    if name not in (None, "bfloat16"):
        torch.set_float32_matmul_precision(name)
    try:
        with _BFloat16Layers() if name == "bfloat16" else contextlib.nullcontext():
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def multiplies_bfloat16() -> bool:
    """Whether the products here have instructions for bfloat16: on a GPU, or by this CPU (AVX512-BF16, AMX, SVE)."""
    if torch.cuda.is_available() or torch.backends.mps.is_available():
        return True
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return True  # what others have is not known here, and ARM has had them since 2019
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def _say_if_slow() -> None:
    global _said
    if _said or multiplies_bfloat16():
        return
    _said = True
    warnings.warn(
        'got matmul_precision="bfloat16" on a CPU that has no instructions for it (AVX512-BF16 or AMX): its products '
        'are done piece by piece, about ten times slower than in float32. Use "medium", which is fast on any CPU.',
        stacklevel=4,
    )


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
        kwargs = kwargs or {}
        if func in _LINEAR:
            return _rounded(func, False, *args, **kwargs)
        if func in _CONVOLUTIONS:
            return _rounded(func, True, *args, **kwargs)
        return func(*args, **kwargs)


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
