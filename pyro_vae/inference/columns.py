"""What people hold their data in, as columns: a length, and rows by an index tensor.

A column has N rows, and ``column[index]`` is a batch of them: a tensor (B, ...), or a dict or tuple of such. Nothing is
converted before its rows are asked for, so a memory map or a sparse matrix is never copied whole.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, Subset, TensorDataset, default_collate

from pyro_vae.evaluation import undisturbed
from pyro_vae.inference.trees import described, mapped, rows
from pyro_vae.tensors import numbers_of, tensor_of

AGAIN = "wanted an iterable of batches that can be run through again (not a generator)."

LARGE = 2**30  # bytes on a disk from which on rows are read in blocks, and looked at as they come

# What numpy and torch both hold; all other numbers are converted to one of these.
_SHARED = {"b1", "u1", "i1", "i2", "i4", "i8", "f2", "f4", "f8"}
_OF_A_DATASET = ("__getitem__", "__getitems__", "__len__", "tensors", "dataset", "indices")


class _Array:
    """Rows of anything indexed like an array: memory maps, foreign byte orders, HDF5 datasets, sparse matrices."""

    settled = True

    def __init__(self, array: Any, shape: tuple[int, ...] | None = None) -> None:
        self.array = array
        self.shape = tuple(array.shape) if shape is None else shape
        self.nbytes = int(np.prod(self.shape)) * 4

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Tensor) -> Tensor:
        # On disk rows are read in their order, and once each.
        order, inverse = np.unique(index.cpu().numpy(), return_inverse=True)
        part = self.array[order]
        part = part.toarray() if hasattr(part, "toarray") else np.asarray(part)
        return tensor_of(part[inverse]).reshape(len(inverse), *self.shape[1:])


def indices_of(indices: Sequence[int], size: int) -> Tensor:
    """The indices of a ``Subset``, as numbers of rows; a ValueError for one of no row."""
    try:
        found = torch.as_tensor(indices)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"got a Subset with indices that are no whole numbers ({error}), wanted numbers of rows."
        ) from error
    if found.dim() != 1 or found.is_floating_point() and len(found) or found.dtype == torch.bool or found.is_complex():
        raise ValueError(
            f"got a Subset with indices of shape {tuple(found.shape)} and dtype {found.dtype}, wanted numbers of rows. "
            "Of a mask take mask.nonzero()[:, 0]."
        )
    found = found.long()
    outside = (found < -size) | (found >= size)
    if bool(outside.any()):
        first = int(outside.nonzero()[0])
        raise ValueError(
            f"got a Subset whose index {first} is {int(found[first])}, of a dataset of {size} items; wanted numbers "
            f"from 0 to {size - 1}. Make it from range(len(dataset))."
        )
    return found


def as_torch_gives(data: Any, kind: type) -> bool:
    """Whether a dataset is of a class of torch whose parts can stand for it: not one with items or a length of its own.

    Example:
        >>> class Noisy(TensorDataset):
        ...     def __getitem__(self, index):
        ...         return tuple(x + torch.randn(()) for x in super().__getitem__(index))
        >>> x = torch.zeros(2, 3)
        >>> as_torch_gives(TensorDataset(x), TensorDataset), as_torch_gives(Noisy(x), TensorDataset)
        (True, False)
    """
    return isinstance(data, kind) and all(getattr(type(data), n, None) is getattr(kind, n, None) for n in _OF_A_DATASET)


class _Taken:
    """Some rows of another column."""

    def __init__(self, inner: Any, indices: Sequence[int]) -> None:
        self.inner, self.indices = inner, indices_of(indices, len(inner))
        self.settled = settled(inner)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: Tensor) -> Any:
        return self.inner[self.indices[index.cpu()]]


class _Fields:
    """A dict of columns: its rows are dicts."""

    def __init__(self, fields: Mapping[Any, Any]) -> None:
        self.fields = {name: column(value) for name, value in fields.items()}
        sizes = {name: len(value) for name, value in self.fields.items()}
        if len(set(sizes.values())) != 1:
            raise ValueError(f"got a dict of columns of different lengths, {sizes}; wanted one row each per datum.")
        self.settled = all(settled(value) for value in self.fields.values())

    def __len__(self) -> int:
        return len(next(iter(self.fields.values())))

    def __getitem__(self, index: Tensor) -> dict[Any, Any]:
        return {name: value[index.cpu()] for name, value in self.fields.items()}


class Items:
    """A map-style dataset, or a list of single data: items by their number, collated as a ``DataLoader`` does."""

    settled = False

    def __init__(self, items: Any) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: Tensor) -> Any:
        numbers = index.tolist()
        fetch = None if _passes_over(self.items) else getattr(self.items, "__getitems__", None)
        try:
            if fetch is not None:
                return collated(fetch(numbers))
            items = []
            for i in numbers:
                items.append(self.items[i])
        except Unreadable:
            raise
        except Exception as error:
            shown = ", ".join(map(str, numbers[:5])) + "..." * (len(numbers) > 5)
            last = f"item {numbers[len(items)]}" if fetch is None else f"an item of {shown}"
            raise Unreadable(f"{last} of the dataset", self.items, error) from error
        return collated(items)


def _passes_over(items: Any) -> bool:
    """Whether `__getitems__`, of a class above, would pass over the items that a class below gives one by one."""
    kind = type(items)
    given = {name: next((i for i, c in enumerate(kind.__mro__) if name in vars(c)), -1) for name in _OF_A_DATASET[:2]}
    one, several = given.values()
    if getattr(kind, "__getitems__", None) is Subset.__getitems__ and _passes_over(items.dataset):
        return True
    return 0 <= one < several


class Unreadable(ValueError):
    """What a dataset or a loader of somebody else's raises, with where it did."""

    def __init__(self, what: str, source: Any, error: Exception) -> None:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        last = lines[-1] if lines else "without a word"  # of a worker's, which is a whole traceback
        name = type(error).__name__
        super().__init__(
            f"{what} ({type(source).__name__}) cannot be read: {last if last.startswith(name) else f'{name}: {last}'}. "
            "Wanted a dataset whose items can all be read; look at that item by itself."
        )


def collated(items: Sequence[Any]) -> Any:
    """Single data as one batch; a ValueError where they cannot be stacked."""
    items = [mapped(lambda _, x: tensor_of(x) if isinstance(x, np.ndarray) else x, item) for item in items]
    try:
        return default_collate(items)
    except (TypeError, RuntimeError, ValueError, KeyError) as error:
        shapes = list(dict.fromkeys(described(item) for item in items))[:2]
        raise ValueError(
            f"the items of the dataset cannot be made one batch: got {' and '.join(shapes)}, wanted tensors, arrays or "
            "numbers of one shape. Convert them in the dataset (of pictures ToTensor() does), or pass "
            "DataLoader(dataset, collate_fn=...)."
        ) from error


def settled(column: Any) -> bool:
    """Whether a column's rows are the same at every look, and cheap to look at all at once."""
    if held(column) is not None:
        return not drawn(column)
    return bool(getattr(column, "settled", False)) and getattr(column, "nbytes", 0) < 2**32


def row_on_disk(data: Any) -> int:
    """The bytes of a row of what is read from a disk: memory maps, HDF5 datasets and the like; 0 of what is in memory.

    Example:
        >>> row_on_disk(np.zeros((5, 3)))
        0
    """
    if isinstance(data, Mapping):
        return max(map(row_on_disk, data.values()), default=0)
    if getattr(data, "mapped", False):  # a split
        data = data.pixels
        return data[:1].numel() * data.element_size()
    if isinstance(data, np.ndarray):
        known: Any = data
        while known is not None and getattr(known, "_mmap", None) is None:
            known = getattr(known, "base", None)
        if known is None or not data.ndim:
            return 0
    elif isinstance(data, Tensor | Dataset) or any(hasattr(data, name) for name in ("tocsr", "to_numpy", "X")):
        return 0
    shape = getattr(data, "shape", None)
    kind: Any = getattr(data, "dtype", None)
    if not isinstance(shape, tuple) or not shape or not hasattr(kind, "itemsize") or not hasattr(data, "__getitem__"):
        return 0
    return int(np.prod(shape[1:])) * int(kind.itemsize)


def drawn(column: Any) -> bool:
    """Whether a column is a split whose zeros and ones are drawn at each look: right by construction."""
    dynamic = getattr(column, "binarization", None) == "dynamic" or getattr(column, "dequantize", False)
    return isinstance(getattr(column, "pixels", None), Tensor) and dynamic and not getattr(column, "fixed", False)


def held(column: Any) -> Tensor | None:
    """The tensor that a column is, or that a split hands out rows of."""
    found = column if isinstance(column, Tensor) else getattr(column, "pixels", None)
    return found if isinstance(found, Tensor) else None


def column(data: Any) -> Any:
    """One column of whatever holds it: a tensor (dense or sparse), array, frame, sparse matrix, AnnData, HDF5 dataset,
    map-style dataset, a dict of columns, or anything with ``len`` that an index tensor turns into a batch.

    Nothing that has rows of numbers is a ValueError.

    Example:
        >>> column(np.arange(3, dtype=">i2")[::-1])[torch.tensor([0, 2])]
        tensor([2, 0], dtype=torch.int16)
    """
    if isinstance(data, Tensor):
        return _tensor_column(data)
    if isinstance(data, np.ndarray):
        return _array_column(data)
    if isinstance(data, np.generic | int | float | complex | bool | str | bytes) or data is None:
        raise _unknown(data)
    if isinstance(data, Dataset):  # whatever its attributes are called
        return _dataset_column(data)
    if hasattr(data, "tocsr") and hasattr(data, "toarray"):
        return _sparse_column(data)
    if isinstance(data, Mapping):
        if not data:
            raise ValueError("the data are empty; wanted at least one column in the dict.")
        return _Fields(data)
    if hasattr(data, "X") and (hasattr(data, "obs") or hasattr(data, "n_obs")):
        if data.X is None:
            raise ValueError("got annotated data whose X is None, wanted numbers. Pass a layer: adata.layers['name'].")
        return column(data.X)
    if hasattr(data, "to_numpy"):
        return _frame_column(data)
    if isinstance(data, list):
        return _listed_column(data)
    if hasattr(data, "shape") and hasattr(data, "dtype") and hasattr(data, "__getitem__"):
        if not tuple(data.shape):
            raise _unknown(data)
        return _Array(data)
    if hasattr(data, "__getitem__") and hasattr(data, "__len__") and not isinstance(data, tuple | set | frozenset):
        return _indexed_column(data)
    if hasattr(data, "__array__"):
        return _array_column(np.asarray(data))
    raise _unknown(data)


def frame_names(data: Any) -> list[str] | None:
    """The names of a frame's columns; None of anything else."""
    names = getattr(data, "columns", None) if hasattr(data, "to_numpy") else None
    return None if names is None else [str(name) for name in names]


def _unknown(data: Any) -> ValueError:
    shape = ", 0-dimensional" if isinstance(data, Tensor | np.ndarray) else ""
    remedy = ""
    if isinstance(data, str):
        remedy = f" A dataset or a file is read by pv.load({data[:80]!r}), whose part .train is such data."
    elif callable(getattr(getattr(data, "train", None), "frozen", None)):
        remedy = " Pass one of its parts: data.train to fit, data.test to judge."
    return ValueError(
        f"got data of type {type(data).__name__}{shape}, wanted a tensor, a tuple of tensors, a dataset indexed "
        f"by tensors, or {AGAIN.removeprefix('wanted ')}{remedy}"
    )


def _tensor_column(data: Tensor) -> Any:
    if not data.is_nested and not data.dim():
        raise _unknown(data)
    kinds = {"nested": data.is_nested, "quantized": data.is_quantized, "meta": data.is_meta}
    kinds["complex"] = data.is_complex()
    what = next((name for name, found in kinds.items() if found), None)
    if what is not None:
        raise ValueError(
            f"got a {what} tensor of dtype {data.dtype}, wanted a dense or sparse one of real numbers. Convert it: "
            "torch.nested.to_padded_tensor, data.dequantize(), torch.view_as_real."
        )
    if data.layout == torch.strided:
        data = data.detach()  # from what made the data, which is no part of the pair
        wider = {torch.uint16: torch.int32, torch.uint32: torch.int64}.get(data.dtype)
        if data.dtype == torch.uint64:
            return _array_column(data.cpu().numpy())
        return data if wider is None else data.to(wider)
    coo = data.detach().cpu().to_sparse() if data.layout != torch.sparse_coo else data.detach().cpu()
    coo = coo.coalesce()
    if coo.dense_dim():
        return coo.to_dense()
    import scipy.sparse

    indices, numbers = coo.indices().numpy(), coo.values()
    numbers = numbers.float() if numbers.dtype == torch.bfloat16 else numbers
    shape = tuple(coo.shape)
    width = int(np.prod(shape[1:]))
    place = np.ravel_multi_index(tuple(indices[1:]), shape[1:]) if len(shape) > 1 else np.zeros(indices.shape[1], int)
    matrix = scipy.sparse.coo_matrix((numbers.numpy(), (indices[0], place)), shape=(shape[0], width)).tocsr()
    return _Array(matrix, shape)


def _array_column(data: np.ndarray) -> Any:
    if not data.ndim:
        raise _unknown(data)
    if isinstance(data, np.ma.MaskedArray):
        if np.ma.getmaskarray(data).any():
            raise ValueError(
                f"got a masked array with {int(np.ma.getmaskarray(data).sum())} masked entries, wanted their mask as a "
                "column of its own, True where a value was observed: pass (x.filled(0), ~x.mask) to a pair that takes "
                "(x, mask), as a VAE does, or fill them with what they may count as."
            )
        data = data.data
    if data.dtype.kind == "O":
        data = numbers_of(data)
    if data.dtype.kind not in "biuf" or not data.size:
        return tensor_of(data)
    shared = f"{data.dtype.kind}{data.dtype.itemsize}" in _SHARED and data.dtype.isnative
    if shared and all(s >= 0 and s % data.itemsize == 0 for s in data.strides):
        with warnings.catch_warnings():  # a read-only array makes a tensor that nobody writes to
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")
            return torch.from_numpy(np.asarray(data))
    return _Array(np.asarray(data))


def _sparse_column(data: Any) -> Any:
    shape = tuple(data.shape)
    if len(shape) == 1:
        return _Array(data.reshape(1, -1).tocsr().T.tocsr(), shape)
    return _Array(data.tocsr() if len(shape) == 2 else data.reshape(shape[0], -1).tocsr(), shape)


def _frame_column(data: Any) -> Any:
    types: Any = getattr(data, "dtypes", None)
    if hasattr(types, "items"):  # a frame of pandas
        wrong = [(str(name), str(kind)) for name, kind in types.items() if not _numeric(kind)]
        if wrong:
            names = ", ".join(repr(name) for name, _ in wrong)
            raise ValueError(
                f"got a {type(data).__name__} whose columns {names} are not numeric "
                f"({', '.join(sorted({kind for _, kind in wrong}))}), wanted numbers. Drop or encode them: "
                "df.select_dtypes('number'), pd.get_dummies(df)."
            )
        if not len(types):
            raise ValueError(f"got a {type(data).__name__} without columns, wanted at least one of numbers.")
        array = _plain(data, all_of=list(types))
    elif hasattr(data, "dtype"):
        if not _numeric(data.dtype) and not hasattr(data, "dims"):
            raise ValueError(
                f"got a {type(data).__name__} of dtype {data.dtype}, wanted numbers. Encode it first: "
                "series.astype('category').cat.codes."
            )
        array = _plain(data, all_of=[data.dtype])
    else:
        array = np.asarray(data.to_numpy())
    return _array_column(array)


def _plain(data: Any, all_of: list[Any]) -> np.ndarray:
    """A frame or series as an array; where it has the nullable types of pandas, what is missing as NaN."""
    if all(isinstance(kind, np.dtype) for kind in all_of):
        return np.asarray(data.to_numpy())
    try:
        if not bool(np.asarray(data.isna()).any()):
            kinds = [getattr(kind, "numpy_dtype", getattr(kind, "subtype", np.dtype("float64"))) for kind in all_of]
            return np.asarray(data.to_numpy(dtype=np.result_type(*kinds)))
        return np.asarray(data.to_numpy(dtype="float64", na_value=np.nan))
    except (TypeError, ValueError, AttributeError):
        return np.asarray(data.to_numpy())


def _numeric(kind: Any) -> bool:
    kind = getattr(kind, "subtype", kind)  # of a sparse column
    numeric = getattr(kind, "_is_numeric", None)
    if isinstance(kind, np.dtype):
        return kind.kind in "biuf"
    if numeric is not None:
        return bool(numeric) or bool(getattr(kind, "_is_boolean", False))
    named = getattr(kind, "is_numeric", None)  # polars
    return bool(named()) if callable(named) else False


def _listed_column(data: list[Any]) -> Any:
    """A list of numbers, of lists of them, or of arrays of one shape, as one column."""
    if data and all(isinstance(x, Tensor | np.ndarray) or hasattr(x, "__array__") for x in data):
        singles = [x if isinstance(x, Tensor) else tensor_of(x) for x in data]
        shapes = {tuple(x.shape): i for i, x in reversed(list(enumerate(singles)))}
        if len(shapes) > 1:
            (one, i), (other, j) = sorted(shapes.items(), key=lambda found: found[1])[:2]
            raise ValueError(
                f"got a list of arrays of different shapes, {one} at {i} and {other} at {j}; wanted one shape. Resize "
                "or pad them, or pass DataLoader(list, collate_fn=...)."
            )
        if len({x.dtype for x in singles}) > 1:
            kind = torch.float64 if any(x.dtype == torch.float64 for x in singles) else torch.get_default_dtype()
            singles = [x.to(kind) for x in singles]
        return _tensor_column(torch.stack([x.to(singles[0].device) for x in singles]))
    try:
        array = np.array(data)
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"got a list that is not of one shape ({error}), wanted numbers, or arrays of one shape."
        ) from error
    if array.dtype.kind not in "biuf":
        raise ValueError(
            f"got a list of {type(data[0]).__name__} that makes an array of dtype {array.dtype}, wanted numbers, or "
            "arrays of one shape. Encode what is no number."
        )
    return _array_column(array)


def _dataset_column(data: Any) -> Any:
    if as_torch_gives(data, Subset):
        inner = data.dataset
        if as_torch_gives(inner, TensorDataset) and len(inner.tensors) == 1:
            return _Taken(column(inner.tensors[0]), data.indices)
        if not isinstance(inner, Dataset) and not isinstance(inner, list | tuple):
            return _Taken(column(inner), data.indices)
        if hasattr(inner, "__len__"):
            indices_of(data.indices, len(inner))
    if isinstance(data, IterableDataset) or not hasattr(data, "__len__"):
        raise ValueError(
            f"got a dataset of type {type(data).__name__} without a length, wanted one whose items have numbers. Pass "
            "DataLoader(dataset, batch_size=...)."
        )
    return Items(data)


def _indexed_column(data: Any) -> Any:
    """Something with a length: rows by an index tensor where it takes one, else items by their number."""
    if not len(data):
        return data
    with undisturbed():
        try:
            if rows(data[torch.tensor([0, 0])]) == 2:
                return data
        except Exception:  # noqa: BLE001 - whatever a stranger raises for an index that it does not take
            pass
    return Items(data)
