"""Arrays of any numbers as tensors, and data as the networks of a pair take them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


def tensor_of(array: Any) -> Tensor:
    """A NumPy array of any numbers as a tensor of its own: values kept, of the nearest type that torch computes with.

    16-bit and 32-bit unsigned integers become wider signed ones, long doubles 64-bit floats. What is not numbers
    (strings, dates, records, complex numbers), or beyond 64 bits, is a ValueError.

    Example:
        >>> tensor_of(np.array([1, 65535], dtype=">u2"))
        tensor([    1, 65535], dtype=torch.int32)
    """
    array = np.asarray(array)
    if array.dtype.kind == "O":
        array = numbers_of(array)
    kind, size = array.dtype.kind, array.dtype.itemsize
    if kind not in "biuf":
        raise ValueError(
            f"got data of dtype {array.dtype}, wanted integers, booleans or floats. Convert or leave out what is no "
            "number: array.astype('float32')."
        )
    if kind == "u" and size == 8 and array.size and array.max() > np.iinfo(np.int64).max:
        raise ValueError(
            f"got the integer {array.max()}, wanted at most 2**63 - 1. Convert with array.astype('float32')."
        )
    wider = {"u2": "i4", "u4": "i8", "u8": "i8"}.get(f"{kind}{size}", "f8" if kind == "f" and size > 8 else None)
    target = np.dtype(wider or array.dtype.newbyteorder("="))
    with np.errstate(over="ignore"):  # a long double beyond float64 becomes inf, which the check of the data names
        return torch.from_numpy(np.array(array, dtype=target, order="C"))


def numbers_of(array: np.ndarray) -> np.ndarray:
    """An object array as one of numbers: of numbers, or of arrays of one shape; a ValueError for anything else."""
    try:
        if array.ndim == 1 and array.size and all(isinstance(x, np.ndarray | Tensor) for x in array):
            return np.stack([np.asarray(x) for x in array])
        return array.astype(np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"got an object array that is not of numbers ({error}), wanted integers, booleans or floats. Leave out "
            "what is no number, and make arrays of different shapes one shape."
        ) from error


def data_of(x: Any, network: nn.Module | None = None, name: str = "x") -> Tensor:
    """Data in the hand, as `fit` would hand them to a network: a tensor of its type, where it is.

    Of a tensor, an array or frame, a `Split`, a sparse matrix, images of Pillow, or a list of single data. Floats take
    the type of the network's parameters, integers and booleans stay what they are. No numbers are a ValueError.

    Example:
        >>> data_of(np.zeros((2, 3)), nn.Linear(3, 1)).dtype
        torch.float32
    """
    if isinstance(getattr(x, "pixels", None), Tensor):  # a Split: what it hands out, and not what it holds
        x = x[:]
    elif _is_image(x) or isinstance(x, list | tuple) and x and all(map(_is_image, x)):
        x = _images([x] if _is_image(x) else list(x), name)
    if isinstance(x, Tensor):
        tensor = x if x.layout == torch.strided else x.to_dense()
    else:
        if hasattr(x, "toarray"):
            x = x.toarray()
        kinds = "wanted a tensor or an array of data, the first dimension over them"
        if x is None or isinstance(x, str | bytes | dict | set) or not (hasattr(x, "__array__") or isinstance(x, list)):
            raise ValueError(f"got {name} of type {type(x).__name__}, {kinds}. Pass x, (B, *x_shape).")
        try:
            held = [np.asarray(each) for each in x] if isinstance(x, list) else x
            tensor = tensor_of(np.stack(held) if isinstance(held, list) else held)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"got {name} that holds no numbers of one shape ({error}), {kinds}.") from error
    if not tensor.dim() or tensor.is_complex():
        what = f"a single number, {tensor.item()}" if not tensor.dim() else f"numbers of dtype {tensor.dtype}"
        raise ValueError(f"got {what}, for {name}, wanted real numbers (B, *x_shape). For one datum pass x[None].")
    like = next((p for p in network.parameters() if p.is_floating_point()), None) if network is not None else None
    if like is None:
        return tensor
    # Pixels are float32, whatever the default dtype is; the networks need not be.
    return tensor.to(like.device, like.dtype if tensor.is_floating_point() else None)


def _is_image(x: Any) -> bool:
    """Whether it is an image of Pillow, which need not be imported for that."""
    return type(x).__module__.partition(".")[0] == "PIL" and hasattr(x, "convert")


def _images(images: list[Any], name: str) -> Tensor:
    grey = all(image.mode in ("1", "L", "P", "LA", "I", "I;16", "F") and not _coloured(image) for image in images)
    sizes = {image.size for image in images}
    if len(sizes) > 1:
        shown = ", ".join(f"{width}x{height}" for width, height in sorted(sizes)[:3])
        raise ValueError(f"got {name} of images of {len(sizes)} sizes ({shown}, ...), wanted one. Call image.resize.")
    deep = [image.mode for image in images if image.mode.startswith(("I", "F"))]
    if deep:
        raise ValueError(f"got {name} of images of mode {deep[0]}, wanted 8 bits a channel. Convert to L or RGB.")
    levels = torch.from_numpy(np.stack([np.asarray(image.convert("L" if grey else "RGB")) for image in images]))
    return (levels.unsqueeze(1) if grey else levels.movedim(-1, 1)).float() / 255


def _coloured(image: Any) -> bool:
    return (
        image.mode == "P"
        and image.getpalette() is not None
        and any(len(set(image.getpalette()[i : i + 3])) > 1 for i in range(0, len(image.getpalette()), 3))
    )


def running(function: Any, x: Tensor, *others: Any, network: nn.Module) -> Any:
    """A network's answer to `data_of`: to integers as they are, or, where it runs on floats only, as floats like its
    own.

    A ValueError where it runs on neither.
    """
    like = next((p for p in network.parameters() if p.is_floating_point()), None)
    trials = [x] if x.is_floating_point() or like is None else [x, x.to(like.dtype)]
    for tried in trials:
        try:
            return function(tried, *others)
        except (RuntimeError, TypeError, IndexError) as error:
            if isinstance(error, torch.OutOfMemoryError | NotImplementedError):
                raise
            reason = error
    first = " ".join(str(reason).split())[:200]
    raise ValueError(
        f"got x of shape {tuple(x.shape)} and dtype {x.dtype}, on which the network does not run ({first}); wanted "
        "data as it was built for, (B, *x_shape). Reshape them, or build the pair for such data."
    ) from reason
