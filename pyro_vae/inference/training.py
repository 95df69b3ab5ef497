"""Fit any model/guide pair by stochastic variational inference."""

from __future__ import annotations

import copy
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyro
import torch
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from pyro.optim import PyroOptim
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from tqdm import tqdm

from pyro_vae.inference.batches import Batches, seeded
from pyro_vae.inference.bounds import Bound, elbo
from pyro_vae.inference.checkpoints import Checkpoint, named_tensors
from pyro_vae.inference.compatibility import check
from pyro_vae.inference.compiled import Compiled
from pyro_vae.inference.memory import reused_memory
from pyro_vae.inference.objectives import Objective, mean_bound
from pyro_vae.inference.optimizers import SCHEDULES, Fused, Schedule
from pyro_vae.inference.precision import matmul_precision as precision
from pyro_vae.inference.split_bounds import SplitBound
from pyro_vae.inference.steps import GraphSteps
from pyro_vae.parameters import device_of, own_parameters
from pyro_vae.traces import Program

_LOOK = 20  # steps between two looks at the loss
_CAPTURE_PAYS = 500  # steps: a capture costs about a second
# Inductor costs up to half a minute and saves at least a quarter of the time of a replay.
_COMPILER_SECONDS, _SAVED, _TIMED = 20.0, 0.25, 40


@dataclass
class History:
    """What a fit did, one record per epoch.

    Attributes:
        records: Per epoch: ``epoch``, ``loss`` (what was minimised, nats per datum),
            ``bound`` (the untempered bound on the training batches where it is known),
            ``validation`` (where validation data were given), ``learning_rate``,
            ``beta`` (these two of the epoch's last step), ``seconds`` since the start,
            ``images_per_second``.
        best_epoch: The epoch whose weights were kept.
        stopped_early: Patience ran out.
        interrupted: Ctrl-C ended the fit; the weights are those of that moment.
    """

    records: list[dict[str, Any]] = field(default_factory=list)
    best_epoch: int | None = None
    stopped_early: bool = False
    interrupted: bool = False

    def __getitem__(self, column: str) -> list[Any]:
        """One column over the epochs, such as history["loss"]."""
        return [record.get(column) for record in self.records]

    def __len__(self) -> int:
        return len(self.records)


def fit(
    model: Program,
    guide: Program,
    data: Any,
    *,
    loss: Any = None,
    epochs: int = 20,
    batch_size: int = 128,
    optimizer: PyroOptim | type[torch.optim.Optimizer] | None = None,
    learning_rate: float = 1e-3,
    schedule: str | Schedule = "constant",
    clip_norm: float | None = None,
    kl_warmup: int = 0,
    validation: Any = None,
    validation_bound: Bound | None = None,
    patience: int | None = None,
    device: str | torch.device | None = None,
    seed: int | None = None,
    matmul_precision: str | None = None,
    progress: bool | None = None,
    callback: Callable[[dict[str, Any]], None] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    compile: bool | str = "auto",
) -> History:
    """Fit a Pyro model/guide pair by ``pyro.infer.SVI``.

    Minimises the loss over minibatches with one fused optimiser step for all
    parameters. Works on any pair whose arguments are the batch: functions or modules,
    whatever their attributes are called (see `pyro_vae.parameters`).

    Args:
        model: A Pyro program for p(x, z).
        guide: A Pyro program for q(z | x).
        data: A tensor (N, ...); a tuple of them (the programs' positional arguments);
            anything with ``len`` that an index tensor turns into a batch, such as a
            `Split`; or an iterable of batches, such as a ``DataLoader``.
        loss: A Pyro ELBO or an `Objective`; ``Trace_ELBO()`` when not given. A `Compiled`
            keeps its graphs for the next fit of the same pair.
        epochs: Passes through the data.
        batch_size: B; an iterable of batches has its own.
        optimizer: A torch optimiser class (Adam when not given), or a ``PyroOptim``,
            which then owns learning rate, schedule and clipping.
        learning_rate: Peak learning rate.
        schedule: "constant", "cosine", "one-cycle", or a function of the fraction of
            steps done that multiplies the learning rate.
        clip_norm: Upper limit of the joint gradient norm.
        kl_warmup: Epochs over which the weight of log q - log p(z) rises linearly to 1,
            or to the beta of the `Objective`.
        validation: Data of the same kind, scored after every epoch at fixed noise.
        validation_bound: The bound to score them by (the `elbo`; `reconstruction` for
            a point guide).
        patience: Stop after this many epochs without a better validation bound, and
            go back to the best weights.
        device: Move modules and batches there; where the modules are when not given.
        seed: Seed torch for the fit and restore its random state afterwards.
        matmul_precision: During the fit: "highest", "high", "medium" as for
            ``torch.set_float32_matmul_precision``, or "bfloat16", which rounds what goes into
            linear and convolutional layers (see `pyro_vae.inference.precision`).
        progress: Show a bar; None shows it on a terminal only.
        callback: Called with each epoch's record.
        checkpoint: A .safetensors file that gets the state of the fit after each epoch.
            If it is there already, the fit goes on from it, to the bit.
        compile: Capture the steps (see `pyro_vae.inference.compiled`) and hand them to
            Inductor; "auto" captures them in fits of 500 steps or more and compiles them where,
            by the clock, a minute or more of them lies ahead, unless there is a checkpoint: a
            compiled fit goes on from one to rounding, not to the bit. Programs that can read what
            cannot be watched in each step (the clock, Python's random numbers, a generator) are
            run as they are by "auto", which one line says; True captures them with a warning, compares
            them with their own steps at least once an epoch, and raises at the first difference.
    Returns:
        The history. The pair is trained in place and left in evaluation mode.
    Raises:
        ValueError: A bad option; empty data; a point guide under a bound; parameters
            that Pyro cannot tell apart; nothing to train; a loss that is not finite.
    Example:
        >>> import pyro.distributions as dist
        >>> def model(x):
        ...     loc = pyro.param("loc", torch.zeros(()))
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(loc, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal((x + pyro.param("loc", torch.zeros(()))) / 2, 0.5**0.5))
        >>> _ = fit(model, guide, torch.full((64,), 3.0), epochs=150, learning_rate=0.1, seed=0)
        >>> abs(pyro.param("loc").item() - 3.0) < 0.1
        True
    """
    compiled = loss if isinstance(loss, Compiled) else None
    if compiled is not None:
        loss = compiled.inner
    else:
        loss = copy.copy(Trace_ELBO() if loss is None else loss)  # an ELBO remembers the plates of its pair
    _check_options(loss, epochs, batch_size, kl_warmup, patience, validation, schedule)
    if isinstance(validation_bound, SplitBound) and validation_bound.upper:
        raise ValueError(f"validation_bound={validation_bound!r} is an upper bound: higher is not better. Take iwae.")
    modules = _owners(model, guide)
    for module in modules if device is not None else []:
        module.to(device)
    place = device if device is not None else device_of(model, guide)
    batches = Batches(data, batch_size, place)
    if not isinstance(optimizer, PyroOptim):
        optimizer = Fused(optimizer or torch.optim.Adam, {"lr": learning_rate}, clip_norm)
    rate = SCHEDULES[schedule] if isinstance(schedule, str) else schedule
    history, best = History(), _Best(modules)
    with own_parameters(model, guide), seeded(seed), precision(matmul_precision), reused_memory():
        for module in modules:
            module.train(_learns(module))
        point = check(model, guide, batches.first(), loss)
        validation_bound = validation_bound or (loss.bound if point else elbo)
        if validation is not None:  # what cannot be scored is refused now, not after an epoch
            for module in modules:
                module.eval()
            with seeded(0), torch.no_grad():
                Objective().particles(model, guide, *Batches(validation, 500, place, shuffle=False).first())
        steps = epochs * len(batches)
        given = compiled is not None
        if compiled is None:
            compiled = _compiled(loss, compile, steps, checkpoint is not None, len(batches))
        stepper = _Stepper(model, guide, loss, optimizer, rate, steps, kl_warmup * len(batches), batches, compiled)
        stepper.considers = compile == "auto" and not given
        started = time.perf_counter()
        if checkpoint is not None:
            # Pyro's losses have no repr of their own.
            said = repr(loss) if isinstance(loss, Objective) else f"{type(loss).__name__}, {loss.num_particles}"
            settings = {"epochs": epochs, "batch_size": batch_size, "loss": said, "kl_warmup": kl_warmup}
            tensors = named_tensors(modules, model, guide, batches.first())
            saved = Checkpoint(checkpoint, tensors, settings)
            started -= _resumed(saved, history, best, stepper)
        quiet = None if progress is None else not progress
        with tqdm(total=stepper.total, initial=stepper.steps, disable=quiet, unit="batch") as bar:
            try:
                for epoch in range(len(history) + 1, epochs + 1 if not history.stopped_early else 0):
                    for module in modules:
                        module.train(_learns(module))
                    record: dict[str, Any] = {"epoch": epoch} | stepper.epoch(bar)
                    if validation is not None:
                        for module in modules:
                            module.eval()
                        record["validation"] = mean_bound(model, guide, validation, validation_bound, device=place)
                    record["seconds"] = time.perf_counter() - started
                    history.records.append(record)
                    columns = [key for key in ("loss", "bound", "validation") if key in record]
                    shown: dict[str, Any] = {key: f"{record[key]:.2f}" for key in columns}
                    bar.set_postfix(epoch=epoch, **shown, images_per_s=f"{record['images_per_second']:,.0f}")
                    if callback is not None:
                        callback(record)
                    # While the weight of the divergence rises, a validation bound says nothing about the end.
                    if patience is not None and stepper.steps >= stepper.warmup:
                        best.offer(record["validation"], epoch, stepper.parameters())
                        history.stopped_early = epoch - best.epoch >= patience
                    if checkpoint is not None:
                        _saved(saved, history, best, stepper)
                    if history.stopped_early:
                        break
            except KeyboardInterrupt:
                history.interrupted = True
        history.best_epoch = len(history)
        if best.epoch and not history.interrupted:
            best.restore()
            history.best_epoch = best.epoch
    for module in modules:
        module.eval()
    return history


def _compiled(loss: Any, compile: bool | str, steps: int, resumable: bool, per_epoch: int) -> Compiled | None:
    """The loss compiled where that is wanted, or, automatically, where it pays for a fit of so many steps."""
    if compile not in (True, False, "auto"):
        raise ValueError(f'got compile={compile!r}, wanted True, False or "auto".')
    if compile == "auto" and (resumable or steps < _CAPTURE_PAYS) or compile is False:
        return None
    return Compiled(
        loss, compile_after=10 if compile is True else None, quiet=compile == "auto", unproven=compile is True,
        check_every=max(1, min(per_epoch, 100)),
    )  # fmt: skip


def _saved(checkpoint: Checkpoint, history: History, best: _Best, stepper: _Stepper) -> None:
    names = {id(t): name for name, t in checkpoint.tensors.items()}
    progress = {
        "records": history.records, "steps": stepper.steps, "best_epoch": best.epoch, "stopped": history.stopped_early,
        "best_value": best.value if best.epoch else None,
    }  # fmt: skip
    assert isinstance(stepper.optimizer, Fused)
    moments = stepper.optimizer.moments(checkpoint.tensors)
    checkpoint.write(progress, moments, {names[id(t)]: copied for t, copied in best.copies})


def _resumed(checkpoint: Checkpoint, history: History, best: _Best, stepper: _Stepper) -> float:
    """Go on where a checkpoint ends; the seconds that went into it."""
    if not isinstance(stepper.optimizer, Fused):
        raise ValueError("checkpoint needs fit's own optimiser: pass a torch optimiser class, not a PyroOptim.")
    found = checkpoint.read()
    if found is None:
        return 0.0
    progress, moments, copies = found
    history.records, history.stopped_early = progress["records"], progress["stopped"]
    stepper.steps = progress["steps"]
    stepper.optimizer.restore(checkpoint.tensors, moments)
    best.epoch = progress["best_epoch"]
    best.value = -math.inf if progress["best_value"] is None else progress["best_value"]
    best.copies = [(checkpoint.tensors[name], copied) for name, copied in copies.items()]
    return history.records[-1]["seconds"]


def _learns(module: nn.Module) -> bool:
    """Whether a module is not frozen whole; one that is stays in evaluation mode, dropout and statistics too."""
    parameters = list(module.parameters())
    return not parameters or any(p.requires_grad for p in parameters)


def _owners(*programs: Program) -> list[nn.Module]:
    """The modules that the programs are, or are methods of."""
    found = [p if isinstance(p, nn.Module) else getattr(p, "__self__", None) for p in programs]
    return list({id(m): m for m in found if isinstance(m, nn.Module)}.values())


class _Tempered(Messenger):
    """Scales log p(z) and log q(z | x), not the likelihood, by a weight that may change."""

    def __init__(self, weight: Tensor | Callable[[], float]) -> None:
        super().__init__()
        self.weight = weight

    def _pyro_sample(self, msg: Any) -> None:
        if not msg["is_observed"]:
            msg["scale"] = msg["scale"] * (self.weight if isinstance(self.weight, Tensor) else self.weight())


class _Stepper:
    """The inner loop: SVI steps with the schedules of learning rate and beta."""

    def __init__(
        self, model: Program, guide: Program, loss: Any, optimizer: PyroOptim, rate: Schedule, total: int, warmup: int,
        batches: Batches, compiled: Compiled | None = None,
    ) -> None:  # fmt: skip
        self.loss, self.optimizer, self.rate, self.total, self.warmup = loss, optimizer, rate, total, warmup
        self.steps = 0
        self.final_beta = float(loss.beta) if isinstance(loss, Objective) else 1.0
        # As a tensor, the weight is read anew by a captured step; losses that compare scales want a number.
        self.weight: Tensor | None = None
        if warmup and not isinstance(loss, Objective):
            if type(loss) in (Trace_ELBO, TraceMeanField_ELBO):
                self.weight = torch.ones((), dtype=torch.float64)
            else:
                compiled = None
            weight = self.beta if self.weight is None else self.weight
            model, guide = _Tempered(weight)(model), _Tempered(weight)(guide)
        self.considers, self._timed = False, 0.0
        self.batches = batches
        self.svi = SVI(model, guide, optimizer, loss)
        self.graph = None if compiled is None else GraphSteps(compiled, model, guide, optimizer, batches)

    def beta(self) -> float:
        """The weight of log q - log p(z) in the step to come."""
        return self.final_beta * (min(1.0, (self.steps + 1) / self.warmup) if self.warmup else 1.0)

    def factor(self) -> float:
        """What multiplies the learning rate in the step to come."""
        return self.rate(self.steps / self.total)

    def parameters(self) -> list[Tensor]:
        """What was trained so far, whoever owns it."""
        return list(self.optimizer.parameters if isinstance(self.optimizer, Fused) else self.optimizer.optim_objs)

    def epoch(self, bar: tqdm) -> dict[str, Any]:
        """One pass; its averages."""
        started, count = time.perf_counter(), 0
        summed: float | Tensor = 0.0
        bound: float | Tensor = 0.0
        tempered = self.beta() < 1
        for choice in self.batches.choices():
            beta, factor = self.beta(), self.factor()
            value = self._step(choice)
            size = len(choice[0])
            summed, count = summed + value, count + size
            if isinstance(self.loss, Objective):
                assert self.loss.last_bound is not None
                bound = bound + self.loss.last_bound.double()
            bar.update(1)
            if self.steps % _LOOK == 0:
                self._check_finite(summed)
                bar.set_postfix(loss=f"{float(value) / size:.2f}", refresh=False)
        self._check_finite(summed)
        record: dict[str, Any] = {"loss": float(summed) / count}
        if isinstance(self.loss, Objective):
            record["bound"] = float(bound) / count
        elif not tempered:
            record["bound"] = -float(summed) / count
        if isinstance(self.optimizer, Fused):
            record["learning_rate"] = self.optimizer.learning_rate * factor
        seconds = time.perf_counter() - started
        return record | {"beta": beta, "images_per_second": count / seconds}

    def _step(self, choice: tuple[Any, ...]) -> float | Tensor:
        if isinstance(self.optimizer, Fused):
            self.optimizer.set_learning_rate(self.factor())
        if isinstance(self.loss, Objective) and self.warmup:
            self.loss.beta = self.beta()
        if self.weight is not None:
            self.weight.fill_(self.beta())
        value: float | Tensor
        replayed, batch = (None, None) if self.graph is None else self.graph(choice)
        if replayed is None:
            # Pyro's checks of shapes and supports cost a good part of a step: once is enough.
            with pyro.validation_enabled(self.steps == 0):
                result = self.svi.step(*(batch or self.batches.take(*choice)))
            value = float(sum(result) if isinstance(result, tuple | list) else result)
        elif replayed.device.type == "cpu":
            value = replayed.item()
        else:
            value = replayed.double()  # read every now and then, since each look waits for the GPU
        if isinstance(value, float):
            self._check_finite(value)
        if self.considers:
            self._consider()
        if self.steps == 0 and not self.parameters():
            raise ValueError(
                "no parameter of model or guide had a gradient, so there is nothing to train. Register networks with "
                'pyro.module("decoder", net) inside the programs, or write the programs as PyroModules.'
            )
        self.steps += 1
        return value

    def _consider(self) -> None:
        """Hand the steps to Inductor if, by the time they take, that will pay."""
        if self.steps == _TIMED:
            self._timed = time.perf_counter()
        elif self.steps == 2 * _TIMED:
            self.considers = False
            each = (time.perf_counter() - self._timed) / _TIMED
            if self.graph is not None and each * (self.total - self.steps) * _SAVED > _COMPILER_SECONDS:
                self.graph.compiled.compile_after = 0

    def _check_finite(self, value: float | Tensor) -> None:
        if not math.isfinite(value):
            raise ValueError(
                f"the loss became {float(value)} at step {self.steps}. Lower learning_rate, set clip_norm (100 is a "
                "mild value), or look for a scale that collapses to zero."
            )


class _Best:
    """The best tensors so far: the modules', with their buffers, and all others that were trained."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self.modules = modules
        self.epoch = 0
        self.value = -math.inf
        self.copies: list[tuple[Tensor, Tensor]] = []

    def offer(self, value: float, epoch: int, trained: Sequence[Tensor]) -> None:
        value = -math.inf if math.isnan(value) else value
        if value > self.value or not self.epoch:
            self.value, self.epoch = value, epoch
            tensors = [t for m in self.modules for t in m.state_dict(keep_vars=True).values()]
            tensors += trained  # those of plain functions: in the param store, or networks given to pyro.module
            self.copies = [(t, t.detach().clone()) for t in {id(t): t for t in tensors}.values()]

    def restore(self) -> None:
        with torch.no_grad():
            for tensor, copied in self.copies:
                tensor.copy_(copied)


def _check_options(
    loss: Any, epochs: int, batch_size: int, kl_warmup: int, patience: int | None, validation: Any, schedule: Any
) -> None:
    for name, value in {"epochs": epochs, "batch_size": batch_size}.items():
        if value < 1:
            raise ValueError(f"{name} must be a positive integer, got {value}.")
    if kl_warmup < 0 or kl_warmup >= epochs > 0 and kl_warmup:
        raise ValueError(f"kl_warmup must lie in 0 .. epochs - 1 = {epochs - 1}, got {kl_warmup}.")
    if isinstance(schedule, str) and schedule not in SCHEDULES:
        raise ValueError(f"unknown schedule {schedule!r}, wanted one of {', '.join(SCHEDULES)} or a function.")
    if patience is not None and (patience < 1 or validation is None):
        raise ValueError(f"patience (got {patience}) needs validation data, and must be a positive integer.")
    if not hasattr(loss, "loss_and_grads"):
        raise ValueError(
            f"got loss {loss!r}, wanted a Pyro ELBO such as Trace_ELBO(), or Objective(iwae, num_samples=50)."
        )
    temperable = (Trace_ELBO, TraceMeanField_ELBO, TraceGraph_ELBO, TraceEnum_ELBO)
    if kl_warmup and not isinstance(loss, temperable) and getattr(loss, "bound", None) is not elbo:
        raise ValueError(f"kl_warmup tempers an ELBO, got {loss!r}. Leave kl_warmup at 0.")
