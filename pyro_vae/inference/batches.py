"""Batches of whatever people hold their data in, on the right device, in a seeded order.

What a batch is made of is said in `columns`, which of it the pair takes in `arguments`, and what it may hold in
`datacheck`. Numbers are cast by one rule:

* Floating data take the type of the pair's parameters: of the first floating one that the programs own or, for
  functions, use when they run. A pair without parameters gets tensors as they are, and what comes from outside torch
  (arrays, frames, sparse matrices) in torch's default type.
* Integers and booleans keep their type where the pair takes them so (tokens, class numbers). They become floats of
  that type, of the same value and not rescaled, where a site with a density of real numbers observes them (counts
  under a Poisson, bytes under a normal: of all but a Categorical), or where the pair runs on floats only.
"""

from __future__ import annotations

import contextlib
import copy
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from pyro.distributions import Unit
from torch import Tensor
from torch.distributions import Categorical
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset, Subset, TensorDataset

from pyro_vae._trust import trusted_module
from pyro_vae.evaluation import evaluating, undisturbed
from pyro_vae.inference.arguments import Arguments, arguments_of
from pyro_vae.inference.columns import (
    AGAIN,
    LARGE,
    Items,
    Unreadable,
    as_torch_gives,
    collated,
    column,
    drawn,
    frame_names,
    held,
    row_on_disk,
    settled,
)
from pyro_vae.inference.datacheck import DataCheck
from pyro_vae.inference.rehearsal import Rehearsal, rehearse
from pyro_vae.inference.supports import rules
from pyro_vae.inference.trees import Path, described, leaves, mapped, moved, rows
from pyro_vae.randomness import forked
from pyro_vae.refusals import without_trace
from pyro_vae.sites import unwrapped
from pyro_vae.tensors import tensor_of
from pyro_vae.traces import Program, draw

_AT_ONCE = 2**22  # numbers that are looked through together
_BLOCK, _WINDOW = 2**20, 256  # bytes that are read one after the other, and how many such blocks are mixed
_EVALUATION, _TRAINING = 1, 2  # streams of the data's noise


@contextlib.contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """Seed torch inside, and leave its random state outside as it was; None does nothing."""
    if seed is None:
        yield
        return
    with forked():
        torch.manual_seed(seed)
        yield


def apart(*numbers: int) -> int:
    """A seed, of 32 bits, all that torch looks at, for a stream that has nothing in common with that of any number.

    Example:
        >>> len({apart(0, 5), apart(5, 0), apart(2**46, 5), apart(5)})
        4
    """
    words = [word for number in (len(numbers), *numbers) for word in divmod(number % 2**64, 2**32)]
    return int(np.random.SeedSequence(words).generate_state(1)[0])


def one_draw(data: Any, seed: int | None, num_data: int | None = None) -> Any:
    """Data whose noise (a binarisation, dequantisation) is drawn for good, so that all who score them score the same,
    whatever their batches or K; those that draw nothing, and all with seed None, as they are.

    What draws says so by ``frozen(seed)``, as a `Split` does; columns in a tuple and subsets are looked into. Where
    only the first `num_data` are asked for, no more of a split are drawn.
    """
    if seed is None:
        return data
    if callable(getattr(data, "frozen", None)):
        few = num_data is not None and num_data < len(data) and callable(getattr(data, "subset", None))
        return (data.subset(slice(0, num_data)) if few else data).frozen(seed)
    if isinstance(data, Subset) and callable(getattr(data.dataset, "frozen", None)):
        part = copy.copy(data)  # of a class that may give its items in its own way
        part.dataset = one_draw(data.dataset, seed)
        return part
    if isinstance(data, tuple) and not hasattr(data, "_fields"):
        cut = num_data if all(callable(getattr(part, "subset", None)) for part in data) else None
        return tuple(one_draw(part, seed, cut) for part in data)
    return data


def in_blocks(count: int, block: int, seed: int) -> Iterator[Tensor]:
    """All N rows in a random order that a disk can follow: blocks of neighbours come in a random order, and the rows of
    256 of them at a time.

    Example:
        >>> [piece.tolist() for piece in in_blocks(5, 2, seed=0)]
        [[2, 0, 4, 3, 1]]
    """
    generator = torch.Generator().manual_seed(seed)
    for blocks in torch.randperm(-(-count // block), generator=generator).split(_WINDOW):
        rows = (blocks[:, None] * block + torch.arange(block)).flatten()
        rows = rows[rows < count]
        yield rows[torch.randperm(len(rows), generator=generator)]


class Stream:
    """Random numbers for the data alone in training: the order, and what is drawn on the way, of each pass.

    Two fits of one ``data_seed`` see the same batches, whatever their programs draw in between.
    """

    def __init__(self, seed: int, device: torch.device) -> None:
        self.seed, self._cuda = seed, device if device.type == "cuda" else None
        self._states: list[Tensor] = []
        self.begin(0)

    def begin(self, number: int) -> None:
        """Start pass `number` anew, wherever the stream is: a fit that goes on needs nothing of the passes before."""
        self._number = number
        self._seed(apart(_TRAINING, self.seed, number))

    def turn_aside(self, rank: int) -> None:
        """Go on, in this pass, as the stream of one process."""
        self._seed(apart(_TRAINING, self.seed, self._number, rank))

    def _seed(self, seed: int) -> None:
        devices: list[Any] = ["cpu"] if self._cuda is None else ["cpu", self._cuda]
        self._states = [torch.Generator(device=each).manual_seed(seed).get_state() for each in devices]

    def __enter__(self) -> None:
        self._swap()

    def __exit__(self, *_: Any) -> None:
        self._swap()

    def _swap(self) -> None:
        outside = [torch.get_rng_state()]
        torch.set_rng_state(self._states[0])
        if self._cuda is not None:
            outside.append(torch.cuda.get_rng_state(self._cuda))
            torch.cuda.set_rng_state(self._states[1], self._cuda)
        self._states = outside


class NoiseOfData:
    """Random numbers for the data alone in an evaluation: what a loader draws on the way (an order, an augmentation)
    does not depend on what is done with its batches."""

    def __init__(self, seed: int | None) -> None:
        self.seed = seed

    def passed(self, batches: Iterable[Any]) -> Iterator[Any]:
        """The batches of one pass, which starts the stream anew; with seed None, as they are."""
        if self.seed is None:
            yield from batches
            return
        iterator, stream = iter(batches), Stream(self.seed, torch.device("cpu"))
        stream._seed(apart(_EVALUATION, self.seed))
        while True:
            with stream:
                batch = next(iterator, stream)
            if batch is stream:
                return
            yield batch


class _Spent(Exception):
    """An iterable of batches does not begin anew."""


class Batches:
    """Minibatches, each a tuple of the programs' positional arguments.

    Args:
        data: A column (see `column`), or a tuple of them; or an iterable of batches, such as a ``DataLoader``.
        device: Where the batches go.
        shuffle: A fresh order in every pass.
        programs: The model and its guides. With them, columns that are no arguments are left out, numbers are cast,
            and every row is looked at (see the module).
    Attributes:
        home: Where the data lie: on a GPU that is the device, where they take little of its memory.
        num_data: N; None of an iterable of batches.
        own_rows: Whether the latest choice holds rows of this process; else it only fills the place (see `shard`).
    Raises:
        ValueError: No data, tensors of different length, nothing that can be batched, or, with programs, what the
            pair does not take: outside its supports, NaN, other shapes.
    Example:
        >>> [len(x) for (x,) in Batches(torch.arange(5.0), 2, shuffle=False)]
        [2, 2, 1]
        >>> next(iter(Batches(np.eye(2, dtype=">i8"), 2, shuffle=False)))
        (tensor([[1, 0],
                [0, 1]]),)
    """

    def __init__(
        self,
        data: Any,
        batch_size: int,
        device: torch.device | str | None = None,
        shuffle: bool = True,
        programs: Sequence[Program] = (),
    ) -> None:
        self.device = device
        self.shuffle = shuffle
        self.batch_size = batch_size
        self.stream: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        self.programs = tuple(program for program in programs if program is not None)
        self.arguments: Arguments = arguments_of(*self.programs)
        self.columns: tuple[Any, ...] | None = None
        self.origin: Any = data  # what two passes over the same data have in common
        self.loader: Any = None  # an iterable of batches, in place of columns
        self.together = False
        self.rank, self.size = 0, 1
        self.own_rows = True
        self.steps: int | None = None  # of a pass, of the process that has most of them
        self.shown: Rehearsal | None = None
        self._names: dict[Path, Sequence[str]] = {}
        self._parts: tuple[Any, ...] = ()
        self._foreign: set[int] = set()
        self._keep: int | None = None
        self._casts: dict[Path, torch.dtype] = {}
        self._check: DataCheck | None = None
        self._plain = False  # whether the columns are tensors that were looked at
        self._each = False  # whether batches are looked at as they come
        self._cached: tuple[Any, ...] | None = None
        self._pass: Iterator[Any] | None = None  # the latest one
        self._gave = False  # whether the loader has ever given a batch
        self._made_together = isinstance(data, tuple) and not isinstance(data, TensorDataset)
        self._take_in(data)
        lengths: list[int] = [] if self.columns is None else [len(one) for one in self.columns]
        if len(set(lengths)) > 1 and batch_size == sys.maxsize:
            # All of it is one batch, and arguments that are not one row each per datum are the pair's own affair.
            self.columns, self.loader, lengths = None, [data], []
        if len(set(lengths)) > 1:
            raise ValueError(f"the data have different lengths, {lengths}; wanted one row each per datum.")
        if self.columns is not None and not any(lengths):
            raise ValueError("the data are empty; wanted at least one datum.")
        self.num_data = lengths[0] if lengths else None
        # Data that lie on a disk and are large are read in blocks of so many rows.
        far = max(map(row_on_disk, self._parts), default=0) if lengths else 0
        self._block = max(1, _BLOCK // far) if far * sum(lengths[:1]) >= LARGE else None
        self.home = torch.device("cpu")
        if device is not None and torch.device(device).type == "cuda":
            self._move_in(torch.device(device))
        if self.programs:
            self._meet_programs()
        self._plain = self.columns is not None and all(held(c) is not None for c in self.columns) and not self._each

    @property
    def ours(self) -> bool:
        """Whether no code but that of known packages makes a batch."""
        return self._plain and all(trusted_module(type(c).__module__) for c in self.columns or ())

    @property
    def tolerated(self) -> bool:
        """Whether some values lie outside a support and are left out by the pair."""
        return self._check is not None and self._check.tolerated

    def of(self, batch_size: int) -> Batches:
        """The same data in batches of another size; an iterable of batches keeps its own."""
        other = copy.copy(self)
        other.batch_size = batch_size
        return other

    def shard(self, rank: int, size: int) -> None:
        """Be the share of one of several processes from now on.

        Each batch is one of ``size * batch_size`` rows in the order that all processes have, of which this one takes
        its even part. An iterable of batches is this process's own, unless it is a loader that gives every process all
        data, a ValueError; of a list of batches it takes every `size`-th. Where others still have rows and this one has
        none left, it gets one that does not count (`own_rows`).
        """
        if isinstance(self.loader, list):
            self.loader = self.loader[rank::size] or self.loader[:1]
        if isinstance(self.loader, DataLoader) and not isinstance(self.loader.dataset, IterableDataset):
            sampler: Any = getattr(self.loader.batch_sampler, "sampler", self.loader.sampler)
            if not isinstance(sampler, DistributedSampler):
                raise ValueError(
                    f"got a DataLoader in a fit of {size} processes, which would give each of them all data; wanted "
                    "each one's own part. Pass sampler=torch.utils.data.DistributedSampler(dataset) to the loader, or "
                    "the dataset itself to fit."
                )
        self.rank, self.size = rank, size

    def begin(self, epoch: int) -> None:
        """Start the pass of an epoch: the order of its data depends on nothing before."""
        if isinstance(self.stream, Stream):
            self.stream.begin(epoch)
            if self.columns is None and self.size > 1:
                self.stream.turn_aside(self.rank)  # its loader is its own
        sampler: Any = getattr(getattr(self.loader, "batch_sampler", None), "sampler", None)
        if isinstance(sampler, DistributedSampler):
            sampler.set_epoch(epoch)

    def __len__(self) -> int:
        if self.steps is not None:
            return self.steps
        if self.num_data is not None:
            whole = self.batch_size * self.size
            count = -(-self.num_data // whole)
            return count - 1 if self.together and count > 1 and 0 < self.num_data % whole < 2 * self.size else count
        try:
            return len(self.loader)
        except TypeError:  # also a DataLoader, over a dataset of unknown length
            return sum(1 for _ in self._loaded())

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        for choice in self.choices():
            yield self.take(*choice)

    def choices(self) -> Iterator[tuple[Any, ...]]:
        """What `take` turns into the batches of a pass: an index each; of an iterable, the batch itself."""
        if self.columns is None:
            seen = 0
            for number, given in enumerate(self._loaded()):
                batch = self._cast(self._arguments(given))
                size = rows(batch)
                self._look(batch, _of_batch(number, seen), size)
                if self.together and size == 1:
                    raise ValueError(_single(f"batch {number} of the loader has one datum"))
                seen += size
                batch = self._placed(batch)
                self.own_rows = True
                yield batch
            if self.steps is not None and number >= self.steps:
                raise ValueError(
                    f"the data gave {number + 1} batches in a pass, and {self.steps} when they were counted; wanted "
                    "as many in each, since the processes of a fit take their steps together."
                )
            self.own_rows = False
            for _ in range(number + 1, self.steps or 0):
                yield batch
            return
        with self.stream:
            pieces = self._order()
        if isinstance(self.stream, Stream) and self.size > 1:
            self.stream.turn_aside(self.rank)  # what is drawn on the way is of each process
        for index in self._cut(pieces):
            own = index if self.size == 1 else index.tensor_split(self.size)[self.rank]
            self.own_rows = len(own) > 0
            yield (own if self.own_rows else index[:1],)

    def _order(self) -> Iterable[Tensor]:
        """The rows of a pass in their order, in pieces; all that is drawn for them is drawn here."""
        assert self.num_data is not None and self.columns is not None
        if self._block is None:
            return [(torch.randperm if self.shuffle else torch.arange)(self.num_data)]
        if not self.shuffle:
            starts = range(0, self.num_data, _WINDOW * self._block)
            return (torch.arange(at, min(at + _WINDOW * self._block, self.num_data)) for at in starts)
        return in_blocks(self.num_data, self._block, int(torch.randint(2**62, ())))

    def _cut(self, pieces: Iterable[Tensor]) -> Iterator[Tensor]:
        """Batches of all processes, from pieces of any length."""
        assert self.num_data is not None
        whole, left = self.batch_size * self.size, self.num_data
        joins = self.together and left > whole and 0 < left % whole < 2 * self.size
        pieces, rest = iter(pieces), torch.empty(0, dtype=torch.int64, device=self.home)
        while left:
            size = left if joins and left < 2 * whole else min(whole, left)
            while len(rest) < size:
                piece = next(pieces).to(self.home)
                rest = piece if not len(rest) else torch.cat((rest, piece))
            yield rest[:size]
            rest, left = rest[size:], left - size

    def _loaded(self) -> Iterator[Any]:
        """What the loader gives; what it raises instead, with the batch and whose it is."""
        source = getattr(self.loader, "dataset", self.loader)
        number, batches = 0, None
        while True:
            try:
                with self.stream:
                    batches = self._begun() if batches is None else batches
                    given = next(batches)
            except StopIteration:
                if not number:
                    raise ValueError(self._no_batches()) from None
                return
            except _Spent as error:
                raise ValueError(str(error)) from None
            except Exception as error:
                raise Unreadable(f"batch {number} of the dataset", source, error) from error
            self._gave = True
            yield given
            number += 1

    def _begun(self) -> Iterator[Any]:
        """A new pass through the loader, and no old one that goes on."""
        batches = iter(self.loader)
        if not isinstance(self.loader, DataLoader):  # whose workers may stay, and begin anew
            if batches is self._pass:
                raise _Spent(f"got data of type {type(self.loader).__name__} that give one iterator only; {AGAIN}")
            self._pass = batches
        return batches

    def _no_batches(self) -> str:
        if not self._gave:
            again = "" if isinstance(self.loader, list) else f" If they have been run through before: {AGAIN}"
            return f"the data are empty; wanted at least one batch.{again}"
        return (
            f"got data of type {type(self.loader).__name__} that gave batches once and none when asked again; {AGAIN}"
        )

    def take(self, *choice: Any) -> tuple[Any, ...]:
        """The batch of a choice."""
        if self.columns is None:
            return choice
        if self._plain:  # nothing to look at or to convert: a step waits for this
            with self.stream:
                batch = self._cast(tuple(one[choice[0]] for one in self.columns[: self._keep]))
            if self.device is None:
                return batch
            return tuple(x.to(self.device, non_blocking=True) if isinstance(x, Tensor) else x for x in batch)
        with self.stream:
            batch = self._cast(self._gathered(choice[0]))
        if self._each:
            self._look(batch, lambda row: f"row {int(choice[0][row])}", len(choice[0]))
        return self._placed(batch)

    def first(self) -> tuple[Any, ...]:
        """One batch, without touching the random state; [] data raise."""
        if self._cached is not None:
            return self._cached
        with undisturbed():
            for batch in self:
                return batch
        raise ValueError("the data are empty; wanted at least one batch.")

    def keep_together(self) -> None:
        """Where the pair has batch normalisation, which learns nothing from one datum: no batch of one, a ValueError
        where the data are one, or a loader makes such batches."""
        modules = [] if self.shown is None else self.shown.modules
        if not any(isinstance(module, _BatchNorm) and module.training for module in modules):
            return
        self.together = True
        if self.num_data is not None:
            if self.num_data == 1 or self.batch_size == 1:
                what = "the data are one datum" if self.num_data == 1 else f"got batch_size={self.batch_size}"
                raise ValueError(_single(what))
            return
        size = getattr(self.loader, "batch_size", None)
        data: Any = getattr(self.loader, "dataset", None)
        if isinstance(self.loader, DataLoader) and size is not None and hasattr(data, "__len__"):
            sampler: Any = self.loader.sampler
            count = len(sampler) if hasattr(sampler, "__len__") else len(data)
            if size == 1 or (count % size == 1 and not self.loader.drop_last):
                raise ValueError(_single(f"the loader makes batches of {size} of {count} data, one of one datum"))
        elif isinstance(self.loader, list) and any(rows(self._arguments(given)) == 1 for given in self.loader):
            raise ValueError(_single("one of the batches has one datum"))

    # How data come in

    def _take_in(self, data: Any) -> None:
        if as_torch_gives(data, TensorDataset):
            data = tuple(data.tensors)
        elif as_torch_gives(data, Subset) and as_torch_gives(data.dataset, TensorDataset):
            data = tuple(Subset(TensorDataset(t), data.indices) for t in data.dataset.tensors)
        if isinstance(data, tuple):
            if any(isinstance(part, DataLoader) for part in data):
                raise ValueError("got a tuple with a DataLoader in it, wanted columns of data, or the loader alone.")
            self._columns(data)
        elif isinstance(data, list):
            self._listed(data)
        elif isinstance(data, DataLoader | IterableDataset) or not (
            hasattr(data, "__getitem__") or isinstance(data, Dataset) or hasattr(data, "X") or hasattr(data, "tocsr")
        ):
            loads = isinstance(data, Iterable) and not isinstance(data, Iterator | set | frozenset | str | bytes)
            if not loads or isinstance(data, Tensor | np.ndarray | np.generic):
                self._columns((data,))  # refuses it by its type
            self.loader = data
        else:
            self._columns((data,))

    def _columns(self, data: tuple[Any, ...]) -> None:
        self.columns = tuple(column(part) for part in data)
        self._foreign = {i for i, part in enumerate(data) if not isinstance(part, Tensor | Dataset)}
        self._parts = data
        self._names = {(i,): names for i, part in enumerate(data) if (names := frame_names(part)) is not None}

    def _listed(self, data: list[Any]) -> None:
        """A list of single data, or of batches, as its shapes and the pair tell; what could be either is refused."""
        if not data:
            self.loader = data
            return
        arrays = all(isinstance(x, Tensor | np.ndarray) or hasattr(x, "__array__") for x in data)
        if arrays and all(np.ndim(x) if not isinstance(x, Tensor) else x.dim() for x in data):
            self._listed_arrays(data)
        elif not arrays and all(isinstance(x, tuple | list | Mapping) and _has_arrays(x) for x in data):
            batch = all(_one_length(x) for x in data)
            if batch and self.programs and self._runs(collated(data[:2])) and not self._runs(data[0]):
                batch = False
            self.loader = data if batch else None
            if not batch:
                self.columns = (Items(data),)
        else:
            self._columns((data,))

    def _listed_arrays(self, data: list[Any]) -> None:
        shapes = [tuple(x.shape) for x in data]
        lengths = {shape[0] for shape in shapes}
        most = max(2, len(self.arguments.names))
        if 2 <= len(data) <= most and len(lengths) == 1:
            raise ValueError(
                f"got a list of {len(data)} tensors of {shapes[0][0]} rows each, which could be columns, batches or "
                f"single data; wanted one of them: a tuple ({'x, y' if len(data) == 2 else 'x, y, ...'}) of columns, "
                "torch.stack(list) of single data, or torch.cat(list) of batches."
            )
        alike = len(set(shapes)) == 1
        if not self.programs:
            if alike and len(data) > 1:
                raise ValueError(
                    f"got a list of {len(data)} tensors of one shape, {shapes[0]}, which could be single data or "
                    "batches; wanted one of them: torch.stack(list) of single data, torch.cat(list) of batches."
                )
            self.loader = data
            return
        single = alike and self._runs(collated([_as_tensor(x) for x in data[:2]]))
        batches = self._runs(_as_tensor(data[0])) and self._runs(_as_tensor(data[-1]))
        if single and batches:
            raise ValueError(
                f"got a list of {len(data)} tensors of shape {shapes[0]}, which the pair takes as single data and as "
                "batches; wanted one of them: torch.stack(list) of single data, torch.cat(list) of batches."
            )
        if batches or (not alike and len({shape[1:] for shape in shapes}) == 1):
            self.loader = data
        else:
            self._columns((data,))  # refuses different shapes

    # How data meet the pair

    def _runs(self, given: Any) -> bool:
        """Whether the pair takes something as a batch, datum by datum."""
        try:
            batch = self._placed(self._arguments(given, warn=False))
            count = rows(batch)
            if self._choose_casts(batch).error is not None:
                return False
            if len(self.programs) < 2:
                return True
            with undisturbed(), evaluating(*self.programs):
                model, guide, *_ = self.programs
                return draw(model, guide, self._cast(batch), {}).log_likelihood.shape[1] == count
        except Exception:  # noqa: BLE001 - a trial: what fails is not what was meant
            return False
        finally:
            self._keep, self._casts = None, {}

    def _meet_programs(self) -> None:
        if self.columns is None:
            with undisturbed():
                given = next(self._loaded())
            batch = self._arguments(given)
        else:
            assert self.num_data is not None
            with undisturbed():
                batch = self._gathered(torch.arange(min(self.batch_size, self.num_data), device=self.home))
        batch = self._placed(batch)
        self.shown = self._choose_casts(batch)
        if len(self.programs) > 1:
            _refuse_swapped(self.shown)
        batch = self._cast(batch)
        masks = self.arguments.masks & set(range(len(batch)))
        self._check = DataCheck(self.programs, self.shown, batch, masks, self._names)
        if self.columns is None:
            self._each = True
            self._look(batch, _of_batch(0, 0), rows(batch))
            self._cached = batch
        else:
            self._look(batch, lambda row: f"row {row}", rows(batch))
            self._each = self._block is not None or not all(settled(c) or drawn(c) for c in self.columns)
            if not self._each and not all(drawn(c) for c in self.columns):
                self._look_through()
        self._refuse_failure(batch)

    def _refuse_failure(self, batch: tuple[Any, ...]) -> None:
        """What the pair raised from inside torch on its first batch, in words; its own refusals come where it runs."""
        error = None if self.shown is None else self.shown.error
        strange = RuntimeError | TypeError | IndexError | AttributeError | KeyError
        if not isinstance(error, strange) or isinstance(error, NotImplementedError | torch.OutOfMemoryError):
            return
        said = " ".join(without_trace(error).split())[:300]
        fields = next((list(x) for x in batch if isinstance(x, Mapping)), None)
        remedy = "reshape the data, or build the pair for them"
        if fields is not None:
            named = ", ".join(map(repr, fields))
            remedy = f"each dict of {named} is one argument; for a pair of tensors pass its fields"
        if "same device" in str(error):
            raise ValueError(
                f"the pair does not run on a batch that lies on {self.device or 'the CPU'}: "
                f"{said}. Wanted all tensors of the programs on one device: move the "
                "networks, module.to(device), and make plain tensors where the data are, as in "
                "torch.zeros(..., device=x.device)."
            ) from error
        raise ValueError(
            f"the pair does not run on a batch of the data, {described(batch)}: "
            f"{said} ({type(error).__name__}). Wanted rows of the shape and type that "
            f"model and guide take: {remedy}."
        ) from error

    def _choose_casts(self, batch: tuple[Any, ...]) -> Rehearsal:
        """Decide what is cast to what, by runs of the pair (the rule is in the module)."""
        shown = self._rehearsed(batch, {})
        dtype = shown.dtype
        self._casts = {}
        for path, leaf in leaves(batch):
            if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
                continue
            wanted = dtype
            if wanted is None and path[0] in self._foreign:
                wanted = torch.get_default_dtype()
            if wanted is not None and leaf.dtype != wanted:
                self._casts[path] = wanted
        if self._casts:
            shown = self._rehearsed(batch, self._casts)
        whole = [path for path, x in leaves(batch) if isinstance(x, Tensor) and not x.is_floating_point()]
        whole = [path for path in whole if path[0] not in self.arguments.masks]
        target = dtype or torch.get_default_dtype()
        if not whole:
            return shown
        if shown.error is None:
            cast = {path: target for path in self._observed_numbers(shown, batch) if path in whole}
            found = self._rehearsed(batch, self._casts | cast) if cast else shown
            if found.error is None:
                self._casts |= cast
                return found
            return shown
        trials = [[path] for path in whole] + [[path for path in whole if path[0] == 0], whole]
        for trial in trials:
            cast = dict.fromkeys(trial, target)
            found = self._rehearsed(batch, self._casts | cast)
            if found.error is None or isinstance(found.error, ValueError) and not isinstance(shown.error, ValueError):
                self._casts |= cast
                return found
        # Truth values that torch cannot subtract say nothing of what else is wrong with them.
        return found if isinstance(shown.error, NotImplementedError) else shown

    def _rehearsed(self, batch: tuple[Any, ...], casts: Mapping[Path, torch.dtype]) -> Rehearsal:
        return rehearse(self.programs, _cast(batch, casts))

    def _observed_numbers(self, shown: Rehearsal, batch: tuple[Any, ...]) -> list[Path]:
        """Leaves that a density of numbers observes, not of classes."""
        found = rules(shown, _cast(batch, self._casts)).items()
        each = [(path, unwrapped(shown.sites[rule.site]["fn"])) for path, rule in found]
        return [path for path, fn in each if not isinstance(fn, Categorical)]

    def _look_through(self) -> None:
        """All rows, a block at a time."""
        assert self.columns is not None and self.num_data is not None
        with undisturbed():
            one = self._gathered(torch.arange(1, device=self.home))
            size = sum(x.numel() for _, x in leaves(one) if isinstance(x, Tensor))
            step = max(self.batch_size, _AT_ONCE // max(size, 1))
            for start in range(0, self.num_data, step):
                index = torch.arange(start, min(start + step, self.num_data), device=self.home)
                batch = self._placed(self._cast(self._gathered(index)))
                self._look(batch, lambda row, start=start: f"row {start + row}", len(index))

    def _look(self, batch: tuple[Any, ...], where: Any, size: int) -> None:
        if self._check is not None and size:
            self._check(batch, where, max(min(self.batch_size, size), 1))

    # How a batch is made

    def _gathered(self, index: Tensor) -> tuple[Any, ...]:
        assert self.columns is not None
        batch: list[Any] = []
        for one in self.columns:
            part = one[index]
            # A dataset's items are tuples of columns.
            batch += part if isinstance(part, list | tuple) else [part]
        return self._arguments(tuple(batch))

    def _arguments(self, given: Any, warn: bool = True) -> tuple[Any, ...]:
        """A batch as whoever made it gives it, as the tuple of the pair's arguments."""
        batch = tuple(given) if isinstance(given, list | tuple) else (given,)
        batch = mapped(_leaf, batch)
        if not self.programs:
            return batch
        if self._keep is None:
            self._keep = self.arguments.kept(batch, warn, self._made_together)
        return batch[: self._keep]

    def _cast(self, batch: tuple[Any, ...]) -> tuple[Any, ...]:
        return _cast(batch, self._casts) if self._casts else batch

    def _placed(self, batch: tuple[Any, ...]) -> tuple[Any, ...]:
        if self.device is None:
            return batch
        return moved(batch, self.device, non_blocking=True)

    def _move_in(self, device: torch.device) -> None:
        """Keep the data on the GPU where they take little of it: batches are then chosen and drawn there."""
        columns = self.columns or ()
        sizes = [t[:1].nbytes * len(c) for c in columns if hasattr(c, "to") and (t := held(c)) is not None]
        if columns and len(sizes) == len(columns) and sum(sizes) < torch.cuda.mem_get_info(device)[0] / 4:
            self.columns = tuple(one.to(device) for one in columns)
            self.home = device


def whole(programs: Sequence[Program], args: tuple[Any, ...], device: torch.device | str | None) -> tuple[Any, ...]:
    """The arguments of programs as one batch that is all data, taken, cast and looked at as the data of a fit are;
    those that are not one row each per datum stay as they are.
    """
    return Batches(args, sys.maxsize, device, shuffle=False, programs=programs).first()


def _refuse_swapped(shown: Rehearsal) -> None:
    """A pair whose guide observes data, or whose model does not, has numbers, and none of log p(x)."""
    if shown.error is not None:
        return
    order = "The order is (model, guide, data)."
    guides = [name for name, site in shown.latents.items() if _holds_data(site) and not isinstance(site["fn"], Unit)]
    if guides:
        raise ValueError(
            f"the guide observes {guides[0]!r}, wanted one that draws latents and observes nothing. {order} A factor "
            "of the guide's own is a pyro.factor."
        )
    if not any(_holds_data(site) for site in shown.sites.values()):
        raise ValueError(
            f"the model observes nothing, only draws {list(shown.sites)}, so there is no p(x): wanted "
            f"pyro.sample(name, distribution, obs=x). {order}"
        )


def _holds_data(site: Any) -> bool:
    return bool(site["is_observed"]) and not (site["infer"] or {}).get("_deterministic")


def _cast(batch: tuple[Any, ...], casts: Mapping[Path, torch.dtype]) -> tuple[Any, ...]:
    return mapped(lambda path, x: x.to(casts[path]) if path in casts and isinstance(x, Tensor) else x, batch)


def _leaf(path: Path, leaf: Any) -> Any:
    """A leaf of a batch as the programs take it: dense tensors of types that torch computes with."""
    if isinstance(leaf, np.ndarray | np.generic) or hasattr(leaf, "tocsr") or hasattr(leaf, "to_numpy"):
        return _as_tensor(leaf)
    if not isinstance(leaf, Tensor):
        return leaf
    if leaf.is_complex() or leaf.is_quantized or leaf.is_nested:
        raise ValueError(f"got batches with a tensor of dtype {leaf.dtype}, wanted real numbers.")
    if leaf.requires_grad:  # of what made the data, which is no part of the pair
        leaf = leaf.detach()
    if leaf.is_inference() and not torch.is_inference_mode_enabled():
        leaf = leaf.clone()  # which can be saved for a gradient
    if leaf.layout != torch.strided:
        return leaf.to_dense()
    return leaf.to(_WIDER[leaf.dtype]) if leaf.dtype in _WIDER else leaf


_WIDER = {torch.uint16: torch.int32, torch.uint32: torch.int64, torch.uint64: torch.int64}


def _as_tensor(x: Any) -> Tensor:
    if isinstance(x, Tensor):
        return x
    if isinstance(x, np.ndarray | np.generic):
        return tensor_of(x).reshape(np.shape(x))
    found = column(x)
    return found if isinstance(found, Tensor) else found[torch.arange(len(found))]


def _has_arrays(item: Any) -> bool:
    return any(isinstance(x, Tensor | np.ndarray) or hasattr(x, "__array__") for _, x in leaves(item))


def _one_length(item: Any) -> bool:
    """Whether all leaves have as many rows as each other, as those of a batch have."""
    sizes = {len(x) if isinstance(x, Tensor | np.ndarray) and x.ndim else None for _, x in leaves(item)}
    return len(sizes) == 1 and None not in sizes


def _of_batch(number: int, seen: int) -> Any:
    return lambda row: f"row {row} of batch {number} (row {seen + row} as they came)"


def _single(what: str) -> str:
    return (
        f"{what}, and a network has batch normalisation, which learns nothing from one: wanted at least two in each "
        "batch. Choose another batch_size, or pass drop_last=True to the loader."
    )
