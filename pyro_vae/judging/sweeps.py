"""Runs of programs over data: the one place where estimates and diagnostics make them.

`sweep` sees to all that every one of them needs and none should have to think of: evaluation mode, no gradients and a
seed, with everything put back afterwards (`pyro_vae.evaluation`); the device; batches of whatever people hold their
data in, as large as one budget of memory allows; matrix products as fast as they are exact; a bar of progress. What is
left to a diagnostic is what it does with a batch:

    with sweep(model, guide, data=data, copies=num_samples, seed=seed, title="latents") as run:
        found = run.each(lambda batch: run.draw(batch, num_samples).log_weight)

An estimate whose K does not fit into memory takes the samples of a batch in chunks (`Sweep.particles`), captured and
replayed where there are many of them (`Sweep.table`). Data may be simulated on the way (`Sweep.simulated`).

The noise of a batch is that of its number: at batch i the random states start at a seed made of (seed, i), whatever was
drawn before. So it does not matter which process has a batch. Under an initialised process group of
``torch.distributed`` the processes (ranks) share the batches out, i to rank i modulo their number, and each gets what
all have found, in the order of one process. They all make the call, with the same pair and data, which is looked at,
and read all data; a failure in one of them is one in all. What goes over the batches otherwise (``for batch in run``)
does so in each of them, on the same numbers. A call by one process is made inside `pyro_vae.inference.ranks.alone`.
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
from pyro.distributions import Delta
from pyro.infer.autoguide import AutoGuide
from torch import Tensor
from tqdm import tqdm

from pyro_vae.auxiliary import undetermined
from pyro_vae.evaluation import evaluating, start_noise
from pyro_vae.inference.batches import Batches, NoiseOfData, one_draw
from pyro_vae.inference.capture import capturing
from pyro_vae.inference.fingerprints import fingerprint, program_fingerprint
from pyro_vae.inference.hardware import fast_matmul, reused_memory
from pyro_vae.inference.ranks import Setup, alone, check_same, common_seed, gathered, world
from pyro_vae.inference.rehearsal import Rehearsal
from pyro_vae.inference.replays import Replayed
from pyro_vae.inference.trees import at, joined, mapped, rows, values
from pyro_vae.judging.company import seen_by_others
from pyro_vae.judging.components import simulated_batch
from pyro_vae.parameters import device_of
from pyro_vae.reach import modules_of
from pyro_vae.sites import kind, lengths, unwrapped
from pyro_vae.traces import Layout, Particles, Program, draw, layout, plate_nesting

# Floats per tensor of decoder output: large enough to hide Python, small enough for the caches (6 MB).
_CHUNK = 3 * 2**19
# Log weights that are held at once.
_HELD = 2**22
# From the seed of a batch to that of the next: odd, so that none comes twice in the 32 bits that torch's generator
# looks at, and 2**32 over the golden ratio, so that the batches of neighbouring seeds stay apart, too.
_STEP = 0x9E3779B9

T = TypeVar("T")


class _Around(threading.local):
    """The pairs of the sweeps around one, in this thread: a call that makes many says once what it sees."""

    def __init__(self) -> None:
        self.pairs: list[tuple[Program, ...]] = []


_around = _Around()


class Sweep:
    """Programs at work on data; made by `sweep`. Iterating over it gives the batches, as tuples of arguments.

    Attributes:
        number, start: Of the batch at work, and of the first datum in it.
    """

    def __init__(
        self, programs: tuple[Program, ...], batches: Batches, num_data: int | None, title: str, progress: bool | None,
        seed: int | None = None,
    ) -> None:  # fmt: skip
        self.programs, self.batches, self._noise = programs, batches, NoiseOfData(seed)
        self.number = self.start = 0
        self._num_data, self._title, self._progress = num_data, title, progress
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
        if self._num_data is None or self.batches.num_data is None:
            return len(self.batches)
        return -(-min(self._num_data, self.batches.num_data) // self.batches.batch_size)

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        own = self._bar is None
        if own:
            known = self.batches.num_data is not None or hasattr(self.batches.loader, "__len__")
            self.expect(len(self) if known else None, shared=False)
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
        for self.number, item in enumerate(items):
            self._start_noise(self.number)
            yield item
        self._start_noise(-1)

    def _start_noise(self, number: int) -> None:
        if self._noise.seed is not None:
            start_noise((self._noise.seed + number * _STEP) % 2**64)

    def each(self, function: Callable[..., T], over: Iterable[Any] | None = None) -> list[T]:
        """What a function finds for each batch, in their order, with tensors on the CPU; the processes share them.

        Args:
            function: Of a batch. It has no part in what is found but by what it returns: another process may run it.
            over: What it is called with in the place of the batches, the same in all processes.
        Raises:
            Elsewhere: Another process failed.
        """
        rank, size = world()
        found, total = [], 0
        with alone():
            for item in self if over is None else self._begun(over):
                total += 1
                if self.number % size == rank:
                    found.append(_on_cpu(function(item)))
        if size == 1:
            return found
        parts = gathered((f"{total} of {self.start} data", found))
        for other, (seen, _) in enumerate(parts):
            if seen != parts[0][0]:
                raise ValueError(
                    f"got {parts[0][0]} in process 0 and {seen} in process {other} as batches, wanted the same. Pass "
                    "all data in all processes, such as a dataset in the place of a loader of each one's own part."
                )
        return [parts[number % size][1][number // size] for number in range(total)]

    def _upto(self, num_data: int | None) -> Iterator[tuple[Any, ...]]:
        """Batches until so many data have come."""
        left = num_data
        for batch in self._noise.passed(self.batches):
            if left is not None:
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
        """`each` of batches whose data are drawn from the model, and the latents they were drawn from (see
        `simulated_batch`).

        With `again` the data are gone through again where they are fewer.
        """

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
            sizes = chunk_sizes(batch, num_samples)
            tensors = all(isinstance(x, Tensor) for x in batch)
            parts: list[tuple[Tensor, ...]] = []
            for size in sizes:
                function = functools.partial(_chunk, self.programs, size, found.nesting)
                if tensors and size not in chunks:
                    calls = count * sizes.count(size)
                    chunks[size] = Replayed(function, programs=self.programs, calls=calls, compile=compile)
                parts.append(chunks[size](*batch) if tensors else function(*batch))
            weight, likelihood = (torch.cat(column) for column in zip(*parts, strict=True))
            return weight, likelihood, found.joint or 1

        return of

    def _lay_out(self, num_samples: int) -> Layout:
        """The pair's layout; all data go into one batch, where the pair is of just these data."""
        # A batch is encoded anew in every chunk: eighty samples for each datum make that cheap.
        self.at_most(min(_CHUNK // values(self.first) // min(num_samples, 80), _HELD // num_samples))
        model, guide = self.programs
        batches = whole = self.batches
        if batches.num_data is not None and batches.num_data > batches.batch_size:
            whole = Batches(batches.origin, batches.num_data, batches.device, shuffle=False)
        if isinstance(guide, AutoGuide) and guide.prototype_trace is None:  # made for the data that it sees first
            with torch.random.fork_rng():
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

    def expect(self, ticks: int | None, *, shared: bool = True) -> None:
        """Show a bar of so many ticks, of which the processes share the work, and not one of the batches."""
        self.close()
        if ticks is not None and shared:
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
        device: Where the batches go; where the modules are when not given.
        seed: Seed of the noise inside, of each batch by its number (see the module), and of what the data draw
            (`one_draw`, `NoiseOfData`): all sweeps of one seed are over the same numbers. None goes on with the random
            states as they are; of several processes it takes a seed from that of the first.
        progress: Show a bar; None shows it on a terminal only.
        title: Of the bar.
    Raises:
        ValueError: What `Batches` refuses; in several processes, another pair, other data or another call in one of
            them, and what another one failed of.
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
    on_cpu = torch.device(place or "cpu").type == "cpu"
    rank, size = world()
    drawn = seed
    with contextlib.ExitStack() as stack, Setup() as setup:
        if size > 1:
            check_same({"call": title, "seed": seed, "batch size": batch_size, "number of data": num_data})
            seed, progress = common_seed(seed), progress if rank == 0 else False
        for context in (evaluating(*given, *besides, seed=seed), fast_matmul(on_cpu), reused_memory()):
            stack.enter_context(context)
        if not validate:
            stack.enter_context(validation_enabled(False))
        batches = Batches(one_draw(data, drawn), batch_size or sys.maxsize, place, False, given)
        if batches.tolerated:  # Pyro's validation looks before it masks
            stack.enter_context(validation_enabled(False))
        run = Sweep(given, batches, num_data, title, progress, seed)
        if len(given) > 1 and batches.shown is not None and batches.shown.error is None:
            _look_at_supports(batches.shown)
            if len(given) == 2 and (reason := undetermined(given[1], batches.shown.latents.values(), run.first, {})):
                raise ValueError(reason)
            if len(given) == 2 and given not in _around.pairs:
                _around.pairs.append(given)
                stack.callback(_around.pairs.remove, given)
                if mixed := seen_by_others(given, run.first):
                    warnings.warn(mixed, stacklevel=5)
        if batch_size is not None:
            run.at_most(_CHUNK // (values(run.first) * max(copies, 1)))
        if size > 1:
            _look_at_all(run)
        try:
            yield run
        finally:
            run.close()
        setup.done()


def _look_at_all(run: Sweep) -> None:
    """Refuse processes that have not the same pair, data and batches; what a pair counts in is its own affair."""
    tensors = [t for module in modules_of(*run.programs) for t in (*module.parameters(), *module.buffers())]
    real = [tensor.detach() for tensor in tensors if tensor.is_floating_point()]
    told = {f"tensor {number} of the pair": fingerprint(tensor) for number, tensor in enumerate(real)}
    told |= {f"program {number}": program_fingerprint(program) for number, program in enumerate(run.programs)}
    told |= {"number of data": f"{run.batches.num_data}", "first batch": fingerprint(run.first)}
    check_same(told | {"batch size": f"{run.batches.batch_size}"})


def _on_cpu(found: T) -> T:
    moved: T = mapped(lambda _, leaf: leaf.cpu() if isinstance(leaf, Tensor) else leaf, found)
    return moved


def _look_at_supports(shown: Rehearsal) -> None:
    """Refuse a guide that draws where the prior has no mass; warn of one that cannot draw where the prior has some."""
    for name, site in shown.latents.items():
        prior = shown.sites.get(name)
        if prior is None or prior["is_observed"] or site["is_observed"] or isinstance(unwrapped(site["fn"]), Delta):
            continue
        q, p = site["fn"], prior["fn"]
        try:
            with torch.random.fork_rng(), torch.no_grad():
                inside = bool(p.support.check(site["value"]).all()) or not bool(torch.isfinite(site["value"]).all())
                reaches = bool(q.support.check(p.sample((64,))).all())
        except Exception:  # noqa: BLE001 - a support that is not said is not compared
            continue
        if not inside:
            raise ValueError(
                f"guide site {name!r} ({kind(q)}) draws values outside of the support of the prior ({kind(p)}), where "
                "log p(z) is not defined. Give both the same support."
            )
        if not reaches:
            warnings.warn(
                f"guide site {name!r} ({kind(q)}) cannot draw all that the prior ({kind(p)}) can: what lies outside of "
                "its support is missing from log p(x), and neither errors nor k-hat see that. Read it as a lower "
                "bound, or give both the same support.",
                stacklevel=4,
            )


def in_chunks(
    model: Program, guide: Program, batch: tuple[Any, ...], num_samples: int, nesting: int
) -> Iterator[Particles]:
    """K samples of one batch, so many at a time as fit."""
    return (draw(model, guide, batch, {}, k, max_plate_nesting=nesting) for k in chunk_sizes(batch, num_samples))


def refuse_points(drawn: Particles, consequence: str) -> None:
    """Refuse a guide with a point site, of whose density something is asked."""
    if drawn.points:
        raise ValueError(
            f"guide site {drawn.points[0]!r} is a point (Delta) without a density{consequence}. Give the site a "
            "distribution."
        )


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
