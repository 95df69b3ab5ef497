"""Runs of programs over data: the one place where estimates and diagnostics make them.

`sweep` sees to evaluation mode, no gradients and a seed, with everything put back afterwards (`pyro_vae.evaluation`);
the device; batches as large as one budget of memory allows; a bar of progress. What is left to a diagnostic is what it
does with a batch, whose noise is that of its number (see `sharing`):

    with sweep(model, guide, data=data, copies=num_samples, seed=seed, title="latents") as run:
        found = run.each(lambda batch: run.draw(batch, num_samples).log_weight)
"""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from pyro import validation_enabled
from pyro.infer.autoguide import AutoGuide
from torch import Tensor
from tqdm import tqdm

from pyro_vae.auxiliary import undetermined
from pyro_vae.evaluation import evaluating
from pyro_vae.inference.batches import Batches, NoiseOfData, one_draw
from pyro_vae.inference.capture import capturing
from pyro_vae.inference.hardware import multiplied_by, read_constants, reused_memory
from pyro_vae.inference.products import usual
from pyro_vae.inference.ranks import Setup, check_same, common_seed, world
from pyro_vae.inference.replays import Replayed
from pyro_vae.inference.supports import look_at_supports
from pyro_vae.inference.trees import at, joined, rows, values
from pyro_vae.judging.company import seen_by_others
from pyro_vae.judging.components import simulated_batch
from pyro_vae.judging.sharing import look_at_all, seed_of, shared
from pyro_vae.lending import lent
from pyro_vae.parameters import device_of
from pyro_vae.randomness import forked, start_noise
from pyro_vae.reach import modules_of
from pyro_vae.sites import lengths
from pyro_vae.traces import Layout, Particles, Program, draw, layout, plate_nesting

# Floats per tensor of decoder output: large enough to hide Python, small enough for the caches (6 MB).
_CHUNK = 3 * 2**19
_HELD = 2**22  # log weights that are held at once

T = TypeVar("T")


class _Around(threading.local):
    """The pairs of the sweeps around one, in this thread: a call that makes many says once what it sees."""

    pairs: tuple[tuple[Program, ...], ...] = ()


_around = _Around()


class Sweep:
    """Programs at work on data; made by `sweep`. Iterating over it gives the batches, as tuples of arguments; `number`
    and `start` are those of the batch at work and of its first datum."""

    def __init__(
        self, programs: tuple[Program, ...], batches: Batches, num_data: int | None, title: str, progress: bool | None,
        seed: int | None = None,
    ) -> None:  # fmt: skip
        self.programs, self.batches, self._noise = programs, batches, NoiseOfData(seed)
        self.number = self.start = 0
        self._num_data, self._title, self._progress = sys.maxsize if num_data is None else num_data, title, progress
        self._nesting: dict[int, int] = {}
        self._bar: Any = None

    @functools.cached_property
    def first(self) -> tuple[Any, ...]:
        """A batch to learn the programs' structure from."""
        return self.batches.first()

    def at_most(self, batch_size: int) -> None:
        """Make the batches smaller, where they are larger."""
        self.batches = self.batches.of(max(1, min(batch_size, self.batches.batch_size)))

    def __len__(self) -> int:
        """The number of batches."""
        known = self.batches.num_data
        return len(self.batches) if known is None else -(-min(self._num_data, known) // self.batches.batch_size)

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        own = self._bar is None
        if own:
            known = self.batches.num_data is not None or hasattr(self.batches.loader, "__len__")
            self.expect(len(self) if known else None, apart=False)
        self.start = 0
        for batch in self._begun(self._upto(self._num_data)):
            yield batch
            self.start += rows(batch)
            if own:
                self.tick()
        if own:
            self.close()

    def _begun(self, items: Iterable[T]) -> Iterator[T]:
        """Each with the noise of its number, and after them that of none."""
        seed = self._noise.seed
        for self.number, item in enumerate(items):
            if seed is not None:
                start_noise(seed_of(seed, self.number))
            yield item
        if seed is not None:
            start_noise(seed_of(seed, -1))

    def each(self, function: Callable[..., T], over: Iterable[Any] | None = None) -> list[T]:
        """What a function finds for each batch, in their order, with tensors on the CPU; the processes share them.

        The function has a batch, or an item of `over`, which is the same in all processes. Another process may run it:
        only what it returns counts.
        """
        return shared(function, self if over is None else self._begun(over), lambda: self.start)

    def _upto(self, left: int) -> Iterator[tuple[Any, ...]]:
        """Batches until so many data have come."""
        for batch in self._noise.passed(self.batches):
            if left <= 0:
                return
            batch = at(batch, slice(left)) if rows(batch) > left else batch
            left -= rows(batch)
            yield batch

    def whole(self) -> tuple[Any, ...]:
        """All data as one batch."""
        return joined(list(self._upto(self._num_data)))

    def simulated(
        self, function: Callable[[tuple[Any, ...], dict[str, Tensor]], T], num_data: int,
        observed: Mapping[str, int] | None, *, again: bool = False,
    ) -> list[T]:  # fmt: skip
        """`each` of batches whose data are drawn from the model, and the latents they were drawn from, by
        `simulated_batch`; with `again` the data are gone through again where they are fewer."""

        def batches(left: int) -> Iterator[tuple[Any, ...]]:
            while left > 0:
                for batch in self._upto(left):
                    left -= rows(batch)
                    yield batch
                if not again:
                    return

        return self.each(lambda batch: function(*simulated_batch(self.programs[0], batch, observed)), batches(num_data))

    def draw(self, batch: tuple[Any, ...], num_samples: int = 1, guide: Program | None = None) -> Particles:
        """K samples of one batch, all at once."""
        model, guide = self.programs[0], self.programs[1] if guide is None else guide
        nesting = self.nesting(guide) if num_samples > 1 else 0
        return draw(model, guide, batch, {}, num_samples, max_plate_nesting=nesting)

    def nesting(self, guide: Program) -> int:
        """How deep the plates of the model and a guide are."""
        if id(guide) not in self._nesting:
            self._nesting[id(guide)] = plate_nesting(self.programs[0], guide, *self.first)
        return self._nesting[id(guide)]

    def particles(self, num_samples: int) -> Callable[[tuple[Any, ...]], Iterator[Particles]]:
        """From a batch to its K particles in chunks, from the programs as they are."""
        model, guide = self.programs
        found = self._lay_out(num_samples)

        def of(batch: tuple[Any, ...]) -> Iterator[Particles]:
            nesting = plate_nesting(model, guide, *batch) if found.joint else found.nesting  # refuses it
            return in_chunks(model, guide, batch, num_samples, nesting)

        return of

    def table(
        self, num_samples: int, compile: bool | str = "auto"
    ) -> Callable[[tuple[Any, ...]], tuple[Tensor, Tensor, int]]:
        """From a batch to its log weights and log likelihoods, (K, B) each, and the data of each column."""
        found, count = self._lay_out(num_samples), -(-len(self) // world()[1])
        chunks: dict[int, Replayed] = {}

        def of(batch: tuple[Any, ...]) -> tuple[Tensor, Tensor, int]:
            for chunk in chunks.values():
                chunk.renew()
            sizes = chunk_sizes(batch, num_samples)
            tensors = all(isinstance(x, Tensor) for x in batch)
            parts: list[tuple[Tensor, ...]] = []
            for size in sizes:
                function = functools.partial(_chunk, self.programs, size, found.nesting)
                if tensors and size not in chunks:
                    calls = count * sizes.count(size)
                    chunks[size] = Replayed(function, programs=self.programs, calls=calls, compile=compile,
                                            fixed=len(batch))  # fmt: skip
                parts.append(chunks[size](*batch) if tensors else function(*batch))
            weight, likelihood = (torch.cat(column) for column in zip(*parts, strict=True))
            return weight, likelihood, found.joint or 1

        return of

    def _lay_out(self, num_samples: int) -> Layout:
        """The pair's layout; all data go into one batch, where the pair is of just these data."""
        # Uncaptured, a batch is encoded anew in every chunk: eighty samples for each datum make that cheap.
        self.at_most(min(_CHUNK // values(self.first) // min(num_samples, 80), _HELD // num_samples))
        model, guide = self.programs
        batches = whole = self.batches
        if batches.num_data is not None and batches.num_data > batches.batch_size:
            whole = Batches(batches.origin, batches.num_data, batches.device, shuffle=False)
        if isinstance(guide, AutoGuide) and guide.prototype_trace is None:  # made for the data that it sees first
            with forked():
                guide(*whole.first())
        batch = batches.first()
        try:
            found = layout(model, guide, *batch)
        except (RuntimeError, ValueError, IndexError) as error:
            try:
                found, batch, self.batches = layout(model, guide, *whole.first()), whole.first(), whole
            except (RuntimeError, ValueError, IndexError):
                raise error from None
        if found.subsampled and found.subsampled not in lengths(batch):
            raise ValueError(
                f"the data plate picks {found.subsampled} rows at random in each run, so that two runs are of "
                "different data and samples cannot be put together. Give the batches as arguments: "
                'pyro.plate("data", N, subsample=x).'
            )
        return found

    def expect(self, ticks: int | None, *, apart: bool = True) -> None:
        """Show a bar of so many ticks, of which the processes share the work, and not one of the batches."""
        self.close()
        if ticks is not None and apart:
            ticks = -(-ticks // world()[1])
        hide = None if self._progress is None else not self._progress
        self._bar = tqdm(total=ticks, desc=self._title, disable=hide, leave=False)

    def tick(self, count: int = 1, **shown: Any) -> None:
        """Move the bar on, or show something beside it."""
        if shown:
            self._bar.set_postfix(**shown, refresh=False)
        else:
            self._bar.update(count)

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()
        self._bar = None


@contextlib.contextmanager
def sweep(
    *programs: Program | None,
    data: Any,
    batch_size: int | None = 100,
    copies: int = 1,
    num_data: int | None = None,
    besides: Iterable[Any] = (),
    validate: bool = True,
    device: str | torch.device | None = None,
    seed: int | None = None,
    progress: bool | None = None,
    title: str = "",
) -> Iterator[Sweep]:
    """Run programs over data for an estimate or a diagnostic (see the module).

    Args:
        programs: The model, its guide, and what else runs; None among them is passed over.
        data: As for `fit`.
        batch_size: Data at a time, at most; None for all of them.
        copies: Samples of each datum that are held at once: so many fewer data make a batch.
        num_data: Only the first so many of the data.
        besides: Modules that are to be in evaluation mode as well.
        validate: Whether Pyro looks at all values, and raises where a trajectory leaves the numbers.
        device: Where the batches go, and the modules while it lasts; where the modules are when not given.
        seed: Of the noise of each batch by its number, and of what the data draw (`one_draw`, `NoiseOfData`): all
            sweeps of one seed are over the same numbers. None goes on with the random states.
        progress: Show a bar; None shows it on a terminal only.
        title: Of the bar.
    Raises:
        ValueError: What `Batches` refuses; of several processes, what differs, and what another one failed of.
    Example:
        >>> import pyro.distributions as dist
        >>> from pyro_vae import Guide, Model
        >>> model = Model(lambda: dist.Normal(0.0, 1.0), lambda z: dist.Normal(z, 1.0))
        >>> guide = Guide(lambda x: dist.Normal(x / 2, 0.5**0.5))
        >>> with sweep(model, guide, data=torch.zeros(5), batch_size=3, seed=0) as run:
        ...     run.each(lambda batch: run.draw(batch, 7).log_weight.shape)
        [torch.Size([7, 3]), torch.Size([7, 2])]
    """
    given = tuple(program for program in programs if program is not None)
    place = device_of(*given) if device is None else device
    (rank, size), drawn = world(), seed
    with contextlib.ExitStack() as stack, Setup() as setup:
        if size > 1:
            check_same({"call": title, "seed": seed, "batch size": batch_size, "number of data": num_data})
            seed, progress = common_seed(seed), progress if rank == 0 else False
        looks = contextlib.nullcontext() if validate else validation_enabled(False)
        placed = lent(modules_of(*given, *besides), device)
        products = multiplied_by(usual() if torch.device(place or "cpu").type == "cpu" else None)
        read_constants()
        for context in (placed, evaluating(*given, *besides, seed=seed), products, reused_memory(), looks):
            stack.enter_context(context)
        batches = Batches(one_draw(data, drawn, num_data), batch_size or sys.maxsize, place, False, given)
        if batches.tolerated:  # Pyro's validation looks before it masks
            stack.enter_context(validation_enabled(False))
        run = Sweep(given, batches, num_data, title, progress, seed)
        if len(given) > 1 and batches.shown is not None and batches.shown.error is None:
            look_at_supports(batches.shown)
            if len(given) == 2 and (reason := undetermined(given[1], batches.shown.latents.values(), run.first, {})):
                raise ValueError(reason)
            if len(given) == 2 and given not in _around.pairs:
                stack.callback(setattr, _around, "pairs", _around.pairs)
                _around.pairs = (*_around.pairs, given)
                if mixed := seen_by_others(given, run.first):
                    warnings.warn(mixed, stacklevel=5)
        if batch_size is not None:
            run.at_most(_CHUNK // (values(run.first) * max(copies, 1)))
        if size > 1:
            look_at_all(run.programs, run.batches, run.first)
        try:
            yield run
        finally:
            run.close()
        setup.done()


def in_chunks(
    model: Program, guide: Program, batch: tuple[Any, ...], num_samples: int, nesting: int
) -> Iterator[Particles]:
    """K samples of one batch, so many at a time as fit."""
    return (draw(model, guide, batch, {}, k, max_plate_nesting=nesting) for k in chunk_sizes(batch, num_samples))


def chunk_sizes(batch: tuple[Any, ...], num_samples: int) -> list[int]:
    """The sizes of the chunks in which K samples of one batch are drawn: who takes the same gets the same draws."""
    return _sizes(num_samples, max(1, _CHUNK // values(batch) // max(rows(batch), 1)))


def _sizes(num_samples: int, most: int) -> list[int]:
    """Chunks of about the same size, as every size is captured by itself: all the same where that is near."""
    whole = (size for size in range(min(most, num_samples), most // 2, -1) if num_samples % size == 0)
    size = next(whole, -(-num_samples // -(-num_samples // most)))
    return [size] * (num_samples // size) + ([num_samples % size] if num_samples % size else [])


def _chunk(programs: tuple[Program, ...], size: int, nesting: int, *batch: Any) -> tuple[Tensor, Tensor]:
    # Samples drawn one by one would make a graph as long as the chunk: there the programs run on as they are.
    model, guide = programs
    particles = draw(model, guide, batch, {}, size, True if capturing() else None, nesting)
    return particles.log_weight, particles.log_likelihood
