"""The loop of a fit: steps of SVI with their schedules, by graphs where there are some, and what an epoch comes to."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from pyro.optim import PyroOptim
from torch import Tensor, nn
from tqdm import tqdm

from pyro_vae.evaluation import undisturbed, unmoved
from pyro_vae.inference.batches import Batches
from pyro_vae.inference.choices import rate_of
from pyro_vae.inference.compatibility import rows_held
from pyro_vae.inference.compiled import Compiled
from pyro_vae.inference.objectives import ClosedForm, Objective
from pyro_vae.inference.optimizers import Fused
from pyro_vae.inference.per_datum import Counting, Unit
from pyro_vae.inference.ranks import Ranks
from pyro_vae.inference.rehearsal import diagnosis
from pyro_vae.inference.schedules import SCHEDULES, Schedule
from pyro_vae.inference.steps import GraphSteps
from pyro_vae.inference.strays import gradients, say_strays, untrained
from pyro_vae.inference.tempering import Number, Tempered, Tempering
from pyro_vae.randomness import noise_kept
from pyro_vae.reach import modules_of
from pyro_vae.refusals import reworded
from pyro_vae.sites import lengths
from pyro_vae.traces import Program, traced

EARLY = 10  # steps after which it is known how long a step takes
TIMED = 40  # steps by whose time it is decided whether to compile
_LOOK = 20  # steps between two looks at the loss
_SIZES = 10_000  # sizes of batches whose unit is remembered
_WARM = 6  # steps of a kind, at most, until it is captured
# Inductor costs up to half a minute and saves a tenth to a quarter of the time of a replay.
_COMPILER_SECONDS, _SAVED = 20.0, 0.15


class _Sum:
    """The sum of values, each divided by a scale; what lies on a GPU is added up where it is read, many at a time."""

    def __init__(self) -> None:
        self._known = 0.0
        self._waiting: list[tuple[Tensor, float]] = []

    def add(self, value: float | Tensor, scale: float) -> None:
        if isinstance(value, Tensor) and value.device.type != "cpu":
            self._waiting.append((value, scale))
        else:
            self._known += float(value) / scale

    def __float__(self) -> float:
        if self._waiting:
            values, scales = zip(*self._waiting, strict=True)
            read = torch.stack(values).cpu().double() / torch.tensor(scales, dtype=torch.float64)
            self._known, self._waiting = sum(read.tolist(), self._known), []
        return self._known


class Stepper:
    """The inner loop: SVI steps with the schedules of learning rate and beta."""

    def __init__(
        self, model: Program, guide: Program, loss: Any, optimizer: PyroOptim, rate: Schedule, tempering: Tempering,
        batches: Batches, compiled: Compiled | None = None,
    ) -> None:  # fmt: skip
        self.loss, self.optimizer, self.rate = loss, optimizer, rate
        self.tempering, self.total, self.warmup = tempering, tempering.total, tempering.warmup
        held = rows_held(guide)
        self.steps = 0
        self.own_beta = loss.beta if isinstance(loss, Objective) else None
        self.pair = (model, guide)
        self.choice: tuple[Any, ...] | None = None  # of the latest step
        # As a tensor, the weight is read anew by a captured step; losses that compare scales want a number.
        self.weight: Tensor | Number | None = None
        if tempering.active and not isinstance(loss, Objective):
            if type(loss) in (Trace_ELBO, TraceMeanField_ELBO, ClosedForm):
                on_gpu = torch.device(batches.device or "cpu").type == "cuda"
                self.weight = torch.ones((), dtype=torch.float64, device=batches.device if on_gpu else "cpu")
            else:
                self.weight, compiled = Number(1.0), None
            model, guide = Tempered(self.weight)(model), Tempered(self.weight)(guide)
        self.considers, self._timed = False, 0.0
        self.early: Callable[[float, int], None] | None = None
        self.tenth: Callable[[int, int, float | None], None] | None = None
        self._taken, self._clock, self._telling = 0, 0.0, math.inf
        self.batches = batches
        if held is not None and len(batches) > 1:
            raise ValueError(
                f"the guide holds parameters for each of the {held[1]} rows of latent site {held[0]!r}, whatever data "
                f"they are, and got the data in {len(batches)} batches. Pass all data in one batch to a new guide "
                "(batch_size=N), or a guide that is a function of the data."
            )
        self.counting = Counting()
        self.unit = Unit(1)  # what the loss of the step that is taken is a multiple of
        self._units: dict[tuple[int, ...], Unit] = {}
        self._sizes: tuple[int, ...] = ()
        self._tempered = False
        self.svi = SVI(model, guide, optimizer, loss)
        self.svi.loss_and_grads = self._counted
        if batches.shuffle and batches.num_data is not None and len(batches) == 1:
            self._keep_rows(guide)
        self.ranks: Ranks | None = None
        self.noise = 0
        self._strays_said = False
        self._asks = (
            rate not in SCHEDULES.values() or tempering.function is not None
        )  # functions of the user's, at each step
        self.graph = None if compiled is None else GraphSteps(compiled, model, guide, optimizer, batches)

    def listen(self, callback: Any) -> None:
        """Call what a callback has for early and for every tenth of the steps."""
        self.early, self.tenth = getattr(callback, "early", None), getattr(callback, "tenth", None)
        self._telling = math.inf if self.tenth is None else self._next_tenth()

    def link(self, ranks: Ranks, noise: int, settle: Callable[[], None]) -> None:
        """Take the steps together with other processes, whose noise has this seed; `settle` brings buffers home."""
        assert isinstance(self.optimizer, Fused)
        self.ranks, self.optimizer.exchange = ranks, self._exchange
        self.noise, self._settle = noise, settle

    def _meet(self, ranks: Ranks) -> None:
        """Have the buffers of all processes in all of them."""
        self._settle()
        ranks.settle()

    def _exchange(self, params: list[Tensor]) -> list[Tensor]:
        """The gradients of the whole batch, in place of those of this process's rows."""
        assert self.ranks is not None and isinstance(self.optimizer, Fused)
        if self.ranks.paused:
            return params
        self.ranks.known(params)
        unit = self.unit
        rows = unit.rows if self.batches.own_rows else 0
        params, self.optimizer.scale = self.ranks.step(rows, unit.scale, unit.share)
        return params

    def _next_tenth(self) -> float:
        """The steps at which another tenth of them is done."""
        return math.ceil((10 * self.steps // self.total + 1) * self.total / 10)

    def release(self) -> None:
        """Give what was lent for the fit its own numbers back."""
        if isinstance(self.optimizer, Fused):
            self.optimizer.release()
            self.optimizer.exchange = None
        if self.own_beta is not None:
            self.loss.beta = self.own_beta

    def parameters(self) -> list[Tensor]:
        """What was trained so far, whoever owns it."""
        return list(self.optimizer.parameters if isinstance(self.optimizer, Fused) else self.optimizer.optim_objs)

    def warm_up(self, tensors: Sequence[Tensor]) -> None:
        """Have the graphs of all kinds of steps, and nothing else, so that every step to come is a replay: steps that
        graphs are made from differ by rounding, and a fit that goes on would take them anew, in the middle."""
        if self.graph is None:
            return
        if self.batches.columns is None or not isinstance(self.optimizer, Fused) or not self.optimizer.can_start_afresh:
            self.graph = None
            return
        kept, considers, self.considers = [(t, t.detach().clone()) for t in tensors], self.considers, False
        with noise_kept(), contextlib.nullcontext() if self.ranks is None else self.ranks.pause():
            kinds = {lengths(choice): choice for choice in self.batches.choices()}
            for choice in kinds.values():
                before = self.graph.compiled.captures
                for _ in range(_WARM):
                    self.steps = 0  # of which weight the graphs are
                    self._step(choice)
                    if self.graph.compiled.captures > before:
                        break
        self.steps, self.considers = 0, considers
        self.optimizer.start_afresh()
        with torch.no_grad():
            for tensor, copied in kept:
                tensor.copy_(copied)

    def epoch(self, bar: tqdm[Any]) -> dict[str, Any]:
        """One pass; its averages."""
        started, count, even = time.perf_counter(), 0, True
        self._lapse()
        summed, bound = _Sum(), _Sum()
        tempered = False
        for choice in self.batches.choices():
            value = self._step(choice)
            tempered = tempered or self._beta != 1
            rows, scale = self.unit.rows, self.unit.scale
            if self.batches.own_rows:
                summed.add(value, scale)
                count, even = count + rows, even and self.unit.even
                if isinstance(self.loss, Objective):
                    assert self.loss.last_bound is not None
                    bound.add(self.loss.last_bound, scale)
            if self.ranks is not None and self.ranks.stopping:
                self._meet(self.ranks)
                raise KeyboardInterrupt
            if bar.update(1):  # it was shown, by a stream that may be anybody's
                self._lapse()
            if self.steps % _LOOK == 0:
                self._check_finite(float(summed))
                float(bound)  # nor are more of them kept than that
                if self.steps < len(self.batches):  # later the bar shows what the last epoch came to
                    bar.set_postfix_str(f"loss of a batch {float(value) / self.unit.whole:.2f}", refresh=False)
            self._taken += 1
            if self._taken == EARLY // 2:
                self._clock = time.perf_counter()
            elif self._taken == EARLY and self.early is not None:
                self._lapse()
                self.early((time.perf_counter() - self._clock) / (EARLY - EARLY // 2), self.total - self.steps)
            if self.steps >= self._telling and self.tenth is not None:
                self._lapse()
                own = isinstance(self.loss, Objective)
                so_far = float(bound) if own else -float(summed) if even and not tempered else math.nan
                self.tenth(self.steps, self.total, None if math.isnan(so_far) else so_far / count)
                self._telling = self._next_tenth()
        loss, bounds = float(summed), float(bound)
        self._check_finite(loss)
        if self.ranks is not None:
            self._meet(self.ranks)
            table = self.ranks.totals(loss, float(count), bounds, float(even))
            loss, bounds = (math.fsum(row[i] for row in table) for i in (0, 2))
            count, even = sum(int(row[1]) for row in table), all(row[3] for row in table)
        record: dict[str, Any] = {"loss": loss / count}
        if isinstance(self.loss, Objective):
            record["bound"] = bounds / count
        elif even and not tempered:
            record["bound"] = -loss / count
        rate = rate_of(self.optimizer)
        if rate is not None:
            record["learning_rate"] = rate
        seconds = time.perf_counter() - started
        return record | {"beta": self._beta, "images_per_second": count / seconds}

    def _lapse(self) -> None:
        """Have the next step compared with what it rests on, as code that is not ours runs before it."""
        if self.graph is not None:
            self.graph.lapse()

    def _step(self, choice: tuple[Any, ...]) -> float | Tensor:
        if self._asks:
            self._lapse()
        if isinstance(self.optimizer, Fused):
            self.optimizer.set_learning_rate(self.rate(self.steps / self.total))
        self._beta = beta = self.tempering(self.steps)
        if self.tempering.active:
            if isinstance(self.weight, Tensor):
                self.weight.fill_(beta)
            elif self.weight is not None:
                self.weight.value = beta
            else:
                self.loss.beta = beta
            if (beta != 1) is not self._tempered:
                self._tempered = not self._tempered
                self._units.clear()  # whether all sites carry one scale was said of another weight
        value: float | Tensor
        self.choice = choice
        self._sizes = lengths(choice)
        if self.graph is not None:
            # A replay does not run the programs: it is measured as the step was that it replays.
            if self._sizes not in self._units and self.graph.compiled.captures:
                self._measure(choice)
            self._use(self._units.get(self._sizes, self.unit))
        before = gradients(self.batches) if self.steps == 0 and not self._strays_said else None
        replayed, batch = (None, None) if self.graph is None else self.graph(choice)
        if replayed is None:
            # Pyro's checks of shapes and supports cost a good part of a step: once is enough. They come before masks.
            batch = batch or self.batches.take(*choice)
            with pyro.validation_enabled(self.steps == 0 and not self.batches.tolerated):
                try:
                    result = self.svi.step(*batch)
                except ValueError as error:
                    said = reworded(error, self.pair[::-1], batch, {})
                    if said is None:
                        raise
                    raise said from error
            value = float(sum(result) if isinstance(result, tuple | list) else result)
        elif replayed.device.type == "cpu":
            value = replayed.item()
        else:
            value = replayed  # read every now and then, since each look waits for the GPU
        if isinstance(value, float):
            self._check_finite(value)
        if self.considers:
            self._consider()
        if self.steps == 0 and not self.parameters():
            raise ValueError(untrained([] if self.batches.shown is None else self.batches.shown.parameters))
        if before is not None and replayed is None:
            self._strays_said = True
            say_strays(before, self.parameters())
        self.steps += 1
        return value

    def _counted(self, *args: Any, **kwargs: Any) -> Any:
        """The loss with its gradients, and the unit of its value."""
        with self.counting:
            value = self.loss.loss_and_grads(*args, **kwargs)
        self._note()
        if self.ranks is not None and not self.ranks.paused:
            self._check_shared()
        # Refused before the optimiser carries what is wrong with it into all parameters.
        self._check_finite(float(sum(value) if isinstance(value, tuple | list) else value))
        return value

    def _check_shared(self) -> None:
        """Refuse latents that each process would count once."""
        outside = self.counting.outside(self._sizes) if self.unit.share == 1 else []
        if outside:
            raise ValueError(
                f"site {outside[0]!r} is outside the plate of the data, or there is none, or it does not say how many "
                "data there are: every process would count the site once. Put what is of each datum into a plate that "
                'knows the number of all data: pyro.plate("data", N, subsample=x).'
            )

    def _note(self) -> None:
        unit = self.counting.unit(self._sizes)
        if len(self._units) < _SIZES:
            self._units[self._sizes] = unit
        self._use(unit)

    def _use(self, unit: Unit) -> None:
        self.unit = unit
        if isinstance(self.optimizer, Fused):
            self.optimizer.scale = unit.scale

    def _measure(self, choice: tuple[Any, ...]) -> None:
        """Run the pair for its plates, where a graph of an earlier fit takes the first step of its kind."""
        self._lapse()
        with undisturbed(), unmoved(modules_of(*self.pair)), self.counting:
            traced(self.svi.model, self.svi.guide, self.batches.take(*choice), {})
        self._note()

    def _keep_rows(self, guide: Program) -> None:
        """Leave rows where they are if a guide has parameters for each: in one batch their order is of no use."""
        with undisturbed(), unmoved(modules_of(*self.pair)), poutine.trace(param_only=True) as declared:
            guide(*self.batches.first())
        for site in declared.trace.nodes.values():
            declared_value: Any = site["value"]
            value = declared_value.unconstrained() if site["type"] == "param" else None
            if isinstance(value, Tensor) and self.batches.num_data in value.shape:
                network = isinstance(value, nn.Parameter) and not hasattr(guide, "prototype_trace")
                self.batches.shuffle = self.batches.shuffle and network

    def _consider(self) -> None:
        """Hand the steps to Inductor if, by the time they take, that will pay."""
        if self.steps == TIMED:
            self._timed = time.perf_counter()
        elif self.steps == 2 * TIMED:
            self.considers = False
            each = (time.perf_counter() - self._timed) / TIMED
            if self.graph is not None and each * (self.total - self.steps) * _SAVED > _COMPILER_SECONDS:
                self.compile()

    def compile(self) -> None:
        """Have Inductor compile graphs that were replayed often enough to tell whether that made them faster."""
        if self.graph is not None:
            self.graph.compiled.compile_after, self.graph.compiled.chooses = TIMED, True

    def _check_finite(self, value: float | Tensor) -> None:
        if not math.isfinite(value):
            assert self.choice is not None
            batch, index = self.batches.take(*self.choice), None if self.batches.columns is None else self.choice[0]
            said = diagnosis(float(value), self.steps, self.pair, batch, index)
            if self.batches.tolerated:
                said += (
                    " A mask leaves out values of the data that are NaN or have no density: their gradient is NaN all "
                    "the same where the model computes with them. Put a number in their place, x.where(mask, 0)."
                )
            raise ValueError(said)
