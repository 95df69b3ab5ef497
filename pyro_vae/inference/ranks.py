"""The processes of a data-parallel fit, or of an evaluation that they share, and all that they say to each other.

Under an initialised process group of ``torch.distributed`` (gloo or nccl; ``torchrun`` makes one for the command), each
process (rank) has the whole pair and takes its own rows of each batch. Between the gradients and the optimiser's step
the ranks add up one flat vector. With s_r the scale of the loss of rank r (N / B_r under a subsampling plate) and g_i
the gradient of datum i, it is

    sum_r G_r / s_r = sum_i g_i,        times the scale that one process would have with all B = sum_r B_r rows,

so that the step is that of one process with the whole batch, however uneven the shares are. What compares the data of a
batch with each other (the regularizers mmd and total_correlation, batch normalisation) sees those of its process.

Every message has the same length and holds, beside the gradients, a table of numbers of each rank: its rows, whether it
was asked to stop, whether it failed. So none of them hangs where one fails or is interrupted.
"""

from __future__ import annotations

import contextlib
import math
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pyro_vae.inference.trees import moved

if dist.is_available():
    # Its functions take the group of the time they are defined at for a default. Dynamo imports it in the midst of a
    # fit, and then no group can be destroyed: a thread of gloo's may outlive the interpreter, which aborts the process.
    _group, dist.GroupMember.WORLD = dist.GroupMember.WORLD, None
    try:
        import torch.distributed.nn.functional  # noqa: F401
    finally:
        dist.GroupMember.WORLD = _group
        del _group

_NUMBERS = 8  # of each rank, in a message
_FAILED, _STOP, _ROWS, _FULL, _FIRST = range(5)
_local = threading.local()
T = TypeVar("T")


def world() -> tuple[int, int]:
    """Rank and number of the processes that work together; (0, 1) without a process group, or `alone`."""
    if getattr(_local, "alone", 0) or not dist.is_available() or not dist.is_initialized():
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """What this process does inside, it does by itself: a fit in a callback, say, or one for a picture.

    Under a process group of ``torch.distributed`` the processes share `fit` and all that judges a pair, and wait for
    each other. A call that only one of them makes is made inside this. In one process it changes nothing.

    Returns:
        A context, for ``with``.
    Example:
        >>> with alone():
        ...     world()
        (0, 1)
    """
    _local.alone = getattr(_local, "alone", 0) + 1
    try:
        yield
    finally:
        _local.alone -= 1


class Elsewhere(ValueError):
    """Another process failed, and this one stops with it."""


class Ranks:
    """The link between this process and the others of a fit.

    Args:
        tensors: All that the fit changes, by a name that is the same in every process (`named_tensors`).
        settings: What must be the same in all processes, as plain data by a name.
    Attributes:
        paused: Whether steps are this process's own for now.
        stopping: Whether the latest message had a rank that was asked to stop.
    Raises:
        ValueError: The processes have different pairs, data or options.
    """

    def __init__(self, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> None:
        self.rank, self.size = world()
        shapes = {f"tensor {name}": f"{tuple(t.shape)} {t.dtype}" for name, t in tensors.items()}
        check_same(dict(settings) | shapes)
        self.tensors = [tensors[name] for name in sorted(tensors)]
        learns = [t.requires_grad or isinstance(t, nn.Parameter) for t in self.tensors]
        self.trained = [t for t, learn in zip(self.tensors, learns, strict=True) if learn]
        self.buffers = [t for t, learn in zip(self.tensors, learns, strict=True) if not learn and t.is_floating_point()]
        self._known = {id(t) for t in self.trained}
        self._as_begun = [t.detach().clone() for t in self.buffers]
        self.paused = self.stopping = self._stop = self._over = False
        kinds = [t.dtype for t in [*self.trained, *self.buffers]]
        self._dtype = torch.float32
        for kind in kinds:
            self._dtype = torch.promote_types(self._dtype, kind)
        self._device = self.trained[0].device if self.trained else torch.device("cpu")
        self._flags = max(len(self.trained), len(self.buffers))
        self._length = max(sum(t.numel() for t in each) for each in (self.trained, self.buffers))
        for tensor in self.tensors:
            _broadcast(tensor)

    def resumed(self, found: Any) -> Any:
        """What the first process read of a checkpoint, in all of them, with the tensors that it put back."""
        told = first_says(None if found is None else moved(found, "cpu"))
        for tensor in self.tensors if told is not None else ():
            _broadcast(tensor)
        return found if self.rank == 0 else told

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Steps inside are this process's own, as those that graphs are made from are."""
        self.paused = True
        try:
            yield
        finally:
            self.paused = False

    def known(self, params: Sequence[Tensor]) -> None:
        """Refuse parameters that were not there before the first step."""
        if any(id(p) not in self._known for p in params):
            raise ValueError(
                "a parameter appeared after the first step of a fit of several processes, which start from the same "
                "parameters. Make all parameters before the fit, or in the first run of the programs."
            )

    def step(self, rows: int, scale: float, share: float) -> tuple[list[Tensor], float]:
        """Put the gradient of the whole batch in the place of that of this process's rows.

        Args:
            rows: B_r, of this process; 0 leaves its gradients out.
            scale: s_r, of its loss.
            share: The part of the scale that is N / B_r.
        Returns:
            The parameters that any process has a gradient for, and the scale of the gradients.
        Raises:
            Elsewhere: Another process failed.
        """
        gradients = [p.grad if p.grad is not None and rows else None for p in self.trained]
        if scale != 1:
            gradients = [None if gradient is None else gradient / scale for gradient in gradients]
        full = share * rows if share != 1 else 0.0
        summed, flags, table = self._say(self.trained, gradients, {_ROWS: rows, _FULL: full})
        whole = sum(numbers[_ROWS] for numbers in table)
        full = max(numbers[_FULL] for numbers in table)
        scale = scale / share * (full / whole if full else 1.0)
        for p, gradient, flag in zip(self.trained, summed, flags, strict=True):
            gradient = gradient if scale == 1 else gradient.mul_(scale)
            # Laid out as the parameter is: fused optimisers walk through both together.
            plain = p.is_contiguous() and p.dtype == gradient.dtype
            p.grad = None if not flag else gradient if plain else torch.empty_like(p).detach().copy_(gradient)
        return [p for p in self.trained if p.grad is not None], scale

    def totals(self, *numbers: float) -> list[list[float]]:
        """These numbers of every process, to the last bits."""
        assert len(numbers) <= _NUMBERS - _FIRST
        table = self._say([], [], {_FIRST + i: number for i, number in enumerate(numbers)})[2]
        return [row[_FIRST : _FIRST + len(numbers)] for row in table]

    def settle(self) -> None:
        """Average the buffers that a process has changed, such as the statistics of a batch normalisation.

        Raises:
            ValueError: The parameters of the processes have come apart.
        """
        changed = [
            b if not torch.equal(b, then) else None for b, then in zip(self.buffers, self._as_begun, strict=True)
        ]
        summed, flags, _ = self._say(self.buffers, changed, {})
        for buffer, total, flag in zip(self.buffers, summed, flags, strict=True):
            if flag:
                with torch.no_grad():
                    buffer.copy_(total / flag)
        sums = [math.fsum(t.detach().double().sum().item() for t in self.trained), float(len(self.trained))]
        rows = self.totals(*sums)
        if any(row != rows[0] for row in rows) and all(map(math.isfinite, sums)):
            raise ValueError(
                "the processes of this fit have different parameters after the same steps, so that their gradients "
                "are of different pairs. Do not change parameters outside of the fit, or change them in all processes."
            )

    def _say(
        self, tensors: Sequence[Tensor], values: Sequence[Tensor | None], numbers: Mapping[int, float]
    ) -> tuple[list[Tensor], list[int], list[list[float]]]:
        """Add up a message of all: the sum for each tensor, how many had a value for it, and the numbers of each."""
        parts = [
            torch.zeros(t.numel(), dtype=self._dtype, device=self._device) if v is None
            else v.detach().reshape(-1).to(self._dtype)
            for t, v in zip(tensors, values, strict=True)
        ]  # fmt: skip
        used = sum(part.numel() for part in parts)
        own = [0.0] * _NUMBERS
        for place, number in {_STOP: float(self._stop), **numbers}.items():
            own[place] = number
        table = torch.zeros(self.size, _NUMBERS, 2, dtype=torch.float64)
        exact = torch.tensor(own, dtype=torch.float64)
        coarse = exact.to(self._dtype).double()  # of a number the first bits and the rest
        table[self.rank] = torch.stack([coarse, torch.where(coarse.isfinite(), exact - coarse, 0.0)], 1)
        flags = torch.zeros(self._flags)
        flags[: len(values)] = torch.tensor([float(v is not None) for v in values])
        message = torch.cat([flags, table.reshape(-1).to(self._dtype)]).to(self._device, self._dtype)
        flat = torch.cat([*parts, message.new_zeros(self._length - used), message])
        self._over = True  # unless all goes well
        try:
            dist.all_reduce(flat)
        except RuntimeError as error:
            raise Elsewhere(f"a process of this fit is gone ({str(error).splitlines()[0]}), so all stop.") from error
        self._over = False
        rest = flat[self._length :].double().cpu()
        found = rest[self._flags :].reshape(self.size, _NUMBERS, 2).sum(-1).tolist()
        self.stopping = any(row[_STOP] for row in found)
        failed = [rank for rank, row in enumerate(found) if row[_FAILED]]
        if failed:
            self._over = True
            messages: list[Any] = [None] * self.size
            dist.all_gather_object(messages, str(numbers.get(_FAILED) and self._message or ""))
            if self.rank not in failed:
                raise Elsewhere(f"process {failed[0]} of {self.size} failed, so all stop: {messages[failed[0]]}")
        pieces = flat[:used].split([t.numel() for t in tensors]) if tensors else ()
        sums = [piece.reshape(t.shape) for piece, t in zip(pieces, tensors, strict=True)]
        return sums, [int(n) for n in rest[: len(values)].tolist()], found

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Inside, a failure of this process ends the fit of all, and a signal to stop does so at the same step."""
        self._message = ""
        with self._signals():
            try:
                yield
                self.totals()  # all have come to the end
            except BaseException as error:
                if not self._over and not (isinstance(error, KeyboardInterrupt) and self.stopping):
                    self._message = str(error) or type(error).__name__
                    with contextlib.suppress(RuntimeError):
                        self._say([], [], {_FAILED: 1.0})
                raise

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Note a first Ctrl-C or SIGTERM, to be told to the others; a second one breaks off at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def note(*_: Any) -> None:
            if self._stop:
                raise KeyboardInterrupt
            self._stop = True

        stops = [signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)]
        heard = [which for which in stops if signal.getsignal(which) not in (None, signal.SIG_IGN)]
        before = {which: signal.signal(which, note) for which in dict.fromkeys(heard)}
        try:
            yield
        finally:
            for which, handler in before.items():
                signal.signal(which, handler)


def _broadcast(tensor: Tensor) -> None:
    """Give a tensor of the first process to all, however it lies in memory."""
    with torch.no_grad():
        plain = tensor.detach().contiguous()
        dist.broadcast(plain, 0)
        tensor.copy_(plain)


class Setup:
    """What comes before the first step, or all of an evaluation: what fails in one process there fails in all. Does
    nothing in one process.

    All that is said there is said by `gathered`, so that whoever fails can say so in its place. One `Setup` may be
    inside another: a failure is said once, by the inner one.
    """

    def __init__(self) -> None:
        self._open = world()[1] > 1

    def __enter__(self) -> Setup:
        return self

    def done(self) -> None:
        """Wait until all processes have come here.

        Raises:
            Elsewhere: Another one has failed.
        """
        if self._open:
            gathered(None)
        self._open = False

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if self._open and error is not None and not isinstance(error, Elsewhere) and not hasattr(error, "_said"):
            with contextlib.suppress(Elsewhere, KeyboardInterrupt):
                gathered(None, str(_said(error)) or type(error).__name__)


def _said(error: Any) -> Any:
    """An error that the other processes know of."""
    with contextlib.suppress(AttributeError):
        error._said = True
    return error


def gathered(value: Any, failed: str = "") -> list[Any]:
    """What each process says.

    Raises:
        Elsewhere: One of them failed, or is gone.
        KeyboardInterrupt: One of them was interrupted.
    """
    rank, size = world()
    if size == 1:
        return [value]
    found: list[Any] = [None] * size
    try:
        dist.all_gather_object(found, (failed, value))
    except RuntimeError as error:
        raise Elsewhere(f"a process is gone ({str(error).splitlines()[0]}), so all stop.") from error
    for other, (reason, _) in enumerate(found):
        if reason and other != rank:
            if reason == KeyboardInterrupt.__name__:
                raise _said(KeyboardInterrupt())
            raise Elsewhere(f"process {other} of {size} failed, so all stop: {reason}")
    return [each for _, each in found]


def common_seed(seed: int | None) -> int:
    """The seed, or where there is none one that the first process draws for all."""
    return seed if seed is not None else int(first_says(int(torch.randint(2**62, ()).item())))


def first_says(word: Any) -> Any:
    """The word of the first process, in all of them."""
    return gathered(word if world()[0] == 0 else None)[0]


def by_first(made: Callable[[], T]) -> T:
    """What the first process makes by itself, in all of them: a time that was measured, say."""
    rank, size = world()
    if size == 1:
        return made()
    with alone():
        value = made() if rank == 0 else None
    found: T = first_says(value)
    return found


def check_same(settings: Mapping[str, Any]) -> None:
    """Refuse, in all processes, what is not the same in all of them."""
    found = gathered(dict(settings))
    for other, theirs in enumerate(found):
        for name in {**found[0], **theirs}:
            ours = found[0].get(name, "missing"), theirs.get(name, "missing")
            if ours[0] != ours[1]:
                raise ValueError(
                    f"processes that work together must have the same pair and the same data, and {name} is {ours[0]} "
                    f"in process 0 and {ours[1]} in process {other}. Pass the same in all of them."
                )
