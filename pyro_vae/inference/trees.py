"""Batches as trees: tuples, lists and dicts, whose leaves are tensors with one row a datum, and whatever else."""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

Path: TypeAlias = tuple[Any, ...]


def mapped(function: Callable[[Path, Any], Any], tree: Any, path: Path = ()) -> Any:
    """A tree with each leaf replaced by a function of (path, leaf); itself where nothing changed.

    Example:
        >>> mapped(lambda path, leaf: (path, leaf), {"x": 1, "y": [2]})
        {'x': (('x',), 1), 'y': [(('y', 0), 2)]}
    """
    if isinstance(tree, Mapping):
        fields = {key: mapped(function, value, (*path, key)) for key, value in tree.items()}
        return tree if all(fields[key] is tree[key] for key in fields) else fields
    if isinstance(tree, list | tuple):
        items = [mapped(function, value, (*path, i)) for i, value in enumerate(tree)]
        if all(new is old for new, old in zip(items, tree, strict=True)):
            return tree
        return type(tree)(*items) if hasattr(tree, "_fields") else type(tree)(items)
    return function(path, tree)


def moved(tree: Any, device: torch.device | str, non_blocking: bool = False) -> Any:
    """A tree with its tensors on a device."""
    return mapped(lambda _, x: x.to(device, non_blocking=non_blocking) if isinstance(x, Tensor) else x, tree)


def leaves(tree: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """The leaves of a tree with their paths."""
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from leaves(value, (*path, key))
    elif isinstance(tree, list | tuple):
        for i, value in enumerate(tree):
            yield from leaves(value, (*path, i))
    else:
        yield path, tree


def rows(batch: Any) -> int:
    """The number of data in a batch: the length that most of its tensors share, the first of those.

    A batch of no tensor with rows is a ValueError.

    Example:
        >>> rows(({"image": torch.zeros(4, 2), "label": torch.zeros(4)}, torch.tensor(100)))
        4
    """
    sizes = [len(x) for _, x in leaves(batch) if isinstance(x, Tensor) and x.dim()]
    if not sizes:
        raise ValueError(f"got a batch without a tensor that has rows ({described(batch)}), wanted at least one.")
    return collections.Counter(sizes).most_common(1)[0][0]


def values(batch: Any) -> int:
    """Numbers in one datum, of all its columns; at least 512, as decoders and hidden layers have more.

    Example:
        >>> values((torch.zeros(2), torch.zeros(2, 1, 28, 28)))
        785
    """
    return max(numbers(batch) // max(rows(batch), 1), 512)


def numbers(batch: Any) -> int:
    """Numbers in a whole batch."""
    return sum(x.numel() for _, x in leaves(batch) if isinstance(x, Tensor) and x.dim())


def at(batch: Any, index: Tensor | slice) -> Any:
    """Some rows of a batch; what has no row a datum stays as it is.

    Example:
        >>> at((torch.arange(3), 7), slice(2))
        (tensor([0, 1]), 7)
    """
    size = rows(batch)

    def one(_: Path, x: Any) -> Any:
        if not isinstance(x, Tensor) or not x.dim() or len(x) != size:
            return x
        return x[index.to(x.device) if isinstance(index, Tensor) else index]

    return mapped(one, batch)


def joined(batches: Sequence[Any]) -> Any:
    """Batches one below the other, as one; what is no tensor with rows, as in the first.

    Example:
        >>> joined([({"x": torch.zeros(2)}, 7), ({"x": torch.zeros(3)}, 7)])
        ({'x': tensor([0., 0., 0., 0., 0.])}, 7)
    """
    flat = [dict(leaves(batch)) for batch in batches]

    def one(path: Path, leaf: Any) -> Any:
        parts = [other[path] for other in flat]
        return torch.cat(parts) if all(isinstance(x, Tensor) and x.dim() for x in parts) else leaf

    return mapped(one, batches[0])


def described(tree: Any) -> str:
    """Types and shapes of a batch's leaves, for messages.

    Example:
        >>> described((torch.zeros(2, 3), {"y": torch.zeros(2, dtype=torch.int64)}))
        "float32 (2, 3), 'y': int64 (2,)"
    """
    shown = []
    for path, leaf in leaves(tree):
        named = "".join(f"{key!r}: " for key in path if isinstance(key, str))
        if isinstance(leaf, Tensor):
            shown.append(f"{named}{str(leaf.dtype).removeprefix('torch.')} {tuple(leaf.shape)}")
        else:
            shown.append(f"{named}{type(leaf).__name__}")
    return ", ".join(shown) or "nothing"
