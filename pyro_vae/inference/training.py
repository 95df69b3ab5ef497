"""Fit any model/guide pair by stochastic variational inference."""

from __future__ import annotations

import contextlib
import copy
import functools
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pyro
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO, TraceTailAdaptive_ELBO
from pyro.optim import PyroOptim
from torch import Tensor, nn
from tqdm import tqdm

from pyro_vae.evaluation import evaluating, noise_kept, others_kept, rests, undisturbed, unmoved
from pyro_vae.inference import explanation
from pyro_vae.inference.batches import Batches, Stream, apart, seeded
from pyro_vae.inference.bounds import Bound, elbo
from pyro_vae.inference.checkpoints import Checkpoint, Sparing, named_tensors, previous
from pyro_vae.inference.choices import chosen, end_epoch, optimizer_settings, rate_of
from pyro_vae.inference.compatibility import check, rows_held
from pyro_vae.inference.compiled import Compiled
from pyro_vae.inference.fingerprints import fingerprint, program_fingerprint, program_values
from pyro_vae.inference.hardware import matmul_precision as precision
from pyro_vae.inference.hardware import reused_memory
from pyro_vae.inference.objectives import ClosedForm, Objective, default_loss, mean_bound
from pyro_vae.inference.optimizers import SCHEDULES, Fused, Schedule
from pyro_vae.inference.per_datum import Counting, Unit
from pyro_vae.inference.ranks import Ranks, Setup, alone, common_seed, mapped, most_steps, world
from pyro_vae.inference.rehearsal import diagnosis
from pyro_vae.inference.split_bounds import SplitBound
from pyro_vae.inference.starts import before_fit, check_data
from pyro_vae.inference.steps import GraphSteps
from pyro_vae.inference.tempering import Beta, Number, Tempered, Tempering, check_tempering, value_of
from pyro_vae.options import of_pair
from pyro_vae.parameters import device_of, holds_loaded, loaded_values, own_parameters
from pyro_vae.precision import current as current_precision
from pyro_vae.reach import modules_of
from pyro_vae.refusals import reworded
from pyro_vae.sites import lengths
from pyro_vae.traces import Program
from pyro_vae.turns import callback as in_callback
from pyro_vae.words import did_you_mean

_LOOK = 20  # steps between two looks at the loss
EARLY = 10  # steps after which it is known how long a step takes
_BAR = "{desc} {percentage:3.0f}%|{bar}| {left} left{postfix}"  # within 80 columns
_SIZES = 10_000  # sizes of batches whose unit is remembered
_WARM = 6  # steps of a kind, at most, until it is captured
_CAPTURE_PAYS = 500  # steps: a capture costs about a second
# Inductor costs up to half a minute and saves at least a quarter of the time of a replay.
_COMPILER_SECONDS, _SAVED, _TIMED = 20.0, 0.25, 40


# What a record may hold.
COLUMNS = ("epoch", "loss", "bound", "validation", "learning_rate", "beta", "seconds", "images_per_second")


@dataclass
class History:
    """What a fit did, one record per epoch.

    Attributes:
        records: Per epoch: ``epoch``, ``loss`` (what was minimised, nats per datum),
            ``bound`` (the untempered bound on the training batches where it is known, per
            datum too: see `pyro_vae.inference.per_datum`),
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
        """One column over the epochs, such as history["loss"]; None where a record has no such number.

        Raises:
            ValueError: No such column.
        """
        known = [*COLUMNS, *(key for record in self.records for key in record if key not in COLUMNS)]
        if column not in known:
            there = [name for name in dict.fromkeys(known) if any(name in record for record in self.records)] or COLUMNS
            raise ValueError(
                f"got the column {column!r}, wanted one of {', '.join(there)}.{did_you_mean(column, there)}"
            )
        return [record.get(column) for record in self.records]

    def to_frame(self) -> Any:
        """The records as a pandas frame, one row per epoch.

        Raises:
            ValueError: pandas is missing.
        """
        try:
            import pandas
        except ImportError as error:
            raise ValueError("to_frame needs pandas, which is not installed. Run: pip install pandas") from error
        return pandas.DataFrame(self.records)

    def plot(self, ax: Any = None) -> Any:
        """Training and validation bound by epoch, as a figure, or drawn into `ax`."""
        from pyro_vae.plots import training_curve

        return training_curve(self.records, ax=ax)

    def __len__(self) -> int:
        return len(self.records)


@of_pair
def fit(
    model: Program,
    guide: Program,
    data: Any,
    *,
    loss: Any = None,
    epochs: int = 20,
    batch_size: int = 128,
    optimizer: PyroOptim | torch.optim.Optimizer | type[torch.optim.Optimizer] | None = None,
    learning_rate: float | None = None,
    schedule: str | Schedule = "constant",
    clip_norm: float | None = None,
    kl_warmup: float = 0,
    kl_warmup_steps: int | None = None,
    beta: Beta | None = None,
    validation: Any = None,
    validation_bound: Bound | None = None,
    patience: int | None = None,
    device: str | torch.device | None = None,
    seed: int | None = None,
    data_seed: int | None = None,
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
        data: A tensor or array (N, ...), a frame, a sparse matrix, a list of images; a
            tuple of them (the programs' positional arguments); a dict of columns; a
            dataset; anything with ``len`` that an index tensor turns into a batch, such
            as a `Split`; or an iterable of batches, such as a ``DataLoader``. How numbers
            are cast, and what is refused, is said in `pyro_vae.inference.batches`.
        loss: A Pyro ELBO or an `Objective`; ``Trace_ELBO()`` when not given (for a guide that says at
            which sites the divergence may be in closed form, as the zoo's `Hierarchical`, `ClosedForm`). A `Compiled`
            keeps its graphs for the next fit of the same pair.
        epochs: Passes through the data.
        batch_size: B; an iterable of batches has its own.
        optimizer: A torch optimiser class (Adam when not given); an instance, which is taken
            over with its options, parameter groups, rates and state, and must hold all of the
            pair's parameters; or a ``PyroOptim``, which then owns learning rate, schedule and
            clipping. A Pyro scheduler is stepped once an epoch, ``ReduceLROnPlateau`` by the
            validation bound or else the loss.
        learning_rate: Peak learning rate of a class, 1e-3 when not given.
        schedule: "constant", "cosine", "one-cycle", or a function of the fraction of
            steps done that multiplies the learning rate (every rate of an instance, which
            gets its own back at the end).
        clip_norm: Upper limit of the joint gradient norm of the loss summed over a batch, without
            the scale of a plate (N / B under subsampling), which multiplies loss and limit alike.
        kl_warmup: Epochs, or fractions of one, over which the weight of log q - log p(z) rises
            linearly to 1, or to the beta of the `Objective`.
        kl_warmup_steps: The same in steps; one of the two.
        beta: That weight itself: a number, or a function of the fraction of steps done, for
            the elbo and Pyro's ELBOs. Patience waits until it has come to rest.
        validation: Data of the same kind, scored after every epoch at fixed noise.
        validation_bound: The bound to score them by (the `elbo`; `reconstruction` for
            a point guide).
        patience: Stop after this many epochs without a better validation bound, and
            go back to the best weights.
        device: Move modules and batches there; where the modules are when not given.
        seed: Seed torch for the fit and restore its random state afterwards.
        data_seed: Draw the order of the data, and what they draw on the way (a binarisation, an augmentation), from a
            stream of their own: two pairs fitted with the same one see the same batches. None draws them from the
            stream of everything else, in which they depend on what the programs draw.
        matmul_precision: During the fit: "highest", "high", "medium" as for
            ``torch.set_float32_matmul_precision``, or "bfloat16", which rounds what goes into
            linear and convolutional layers (see `pyro_vae.inference.hardware`).
        progress: Show a bar; None shows it on a terminal only.
        callback: Called with each epoch's record. If it has a method ``early``, that is called once after ten steps,
            with the seconds that a step takes and the number of steps to come; a method ``tenth`` is called at every
            tenth of the way, with the steps done, those of the whole fit and the bound of the epoch so far, if it is
            known; a method ``resumed`` gets the records of a fit that goes on from a checkpoint; and an attribute
            ``ahead`` is the seconds that will be needed after the fit, which the bar adds to its time left.
        checkpoint: A .safetensors file that gets the state of the fit after each epoch.
            If it is there already, the fit goes on from it, to the bit; and does not if
            anything that shapes the result is another: the data, the loss, the optimiser, ... A
            `pyro_vae.inference.checkpoints.Sparing` is written less often, and leaves ``compile`` as it is.
        compile: Capture the steps (see `pyro_vae.inference.compiled`) and hand them to
            Inductor; "auto" captures them in fits of 500 steps or more and compiles them where,
            by the clock, a minute or more of them lies ahead, unless there is a checkpoint: a
            compiled fit goes on from one to rounding, not to the bit. Programs that can read what
            cannot be watched in each step (the clock, Python's random numbers, a generator) are
            run as they are by "auto", which one line says; True captures them with a warning, compares
            them with their own steps at least once an epoch, and raises at the first difference.
    Returns:
        The history. The pair is trained in place, in training mode (networks that are frozen whole, with
        ``requires_grad=False``, stay in evaluation mode), and all of its networks, wherever the programs hold
        them, are left in evaluation mode, also after Ctrl-C or an error.
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
        loss = copy.copy(default_loss(guide) if loss is None else loss)  # an ELBO remembers the plates of its pair
    if not torch.is_grad_enabled():
        raise ValueError(
            "gradients are switched off here (torch.no_grad or inference_mode), so there is nothing to train. Call fit "
            "outside of it."
        )
    _check_options(loss, patience, validation, schedule)
    check_tempering(loss, epochs, kl_warmup, kl_warmup_steps, beta)
    if isinstance(validation_bound, SplitBound) and validation_bound.upper:
        raise ValueError(f"validation_bound={validation_bound!r} is an upper bound: higher is not better. Take iwae.")
    modules = modules_of(model, guide)
    for module in modules if device is not None else []:
        module.to(device)
    _refuse_inference(t for module in modules for t in (*module.parameters(), *module.buffers()))
    place = device if device is not None else device_of(model, guide)
    optimizer = chosen(optimizer, learning_rate, clip_norm, schedule, epochs)
    rank, size = world()
    if size > 1:
        if not isinstance(optimizer, Fused):
            raise ValueError(
                f"got a PyroOptim in a fit of {size} processes, which steps each tensor by itself. Pass a torch "
                "optimiser class, such as torch.optim.Adam."
            )
        progress, callback = (progress, callback) if rank == 0 else (False, None)
    rate = SCHEDULES[schedule] if isinstance(schedule, str) else functools.partial(value_of, "schedule", schedule)
    history = History()
    with (
        own_parameters(model, guide, keep=True), seeded(seed), precision(matmul_precision), reused_memory(),
        _learning(modules), Setup() as setup,
    ):  # fmt: skip
        noise = common_seed(seed) if size > 1 else 0
        check_data(modules, data)
        with others_kept(modules):
            batches = Batches(data, batch_size, place, programs=(model, guide))
            batches.keep_together()
            if data_seed is not None or size > 1:
                of_data = apart(noise) if data_seed is None else data_seed
                batches.stream = Stream(of_data, torch.device(place or "cpu"))
        if batches.shown is not None:  # also networks that plain functions use
            _refuse_inference({id(p): p for p in batches.shown.parameters if isinstance(p, nn.Parameter)}.values())
        before_fit(modules, batches)
        _take_up_loaded(model, guide, batches)
        with others_kept(modules):
            with unmoved(modules) as met:  # statistics of batches are of the steps alone
                point = check(model, guide, batches.first(), loss)
            modules += [found for reference in met if (found := reference()) is not None]
            validation_bound = validation_bound or (loss.bound if point else elbo)
            if validation is not None:  # what cannot be scored is refused now, not after an epoch
                validation = Batches(validation, 500, place, shuffle=False, programs=(model, guide))
                with evaluating(model, guide, seed=0):
                    Objective().particles(model, guide, *validation.first())
            best = _Best(modules)
            if size > 1:
                probe = _share_out(batches, model, guide)
            steps = epochs * len(batches)
            tempering = Tempering(
                loss, epochs, len(batches), kl_warmup=kl_warmup, kl_warmup_steps=kl_warmup_steps, beta=beta
            )
            given = compiled is not None
            if compiled is None:
                kept = checkpoint is not None and not isinstance(checkpoint, Sparing)
                compiled = _compiled(loss, compile, steps, kept, len(batches))
            stepper = _Stepper(model, guide, loss, optimizer, rate, tempering, batches, compiled)
        stepper.considers = compile == "auto" and not given
        started = time.perf_counter()
        if checkpoint is not None or size > 1:
            with unmoved(modules):
                tensors = named_tensors(modules, model, guide, batches.first())
        if size > 1:
            same: dict[str, Any] = {"loss": loss, "schedule": schedule, **optimizer_settings(optimizer)}
            same = {key: fingerprint(value) for key, value in same.items()}
            same |= {"epochs": epochs, "batch_size": batch_size, "steps": stepper.total, "patience": patience}
            same |= {"number of data": batches.num_data, "a sample of the data": probe, "seed": seed}
            same |= {"checkpoint": checkpoint is not None, "data_seed": data_seed, "matmul_precision": matmul_precision}
            same |= {"kl_warmup": kl_warmup, "kl_warmup_steps": kl_warmup_steps, "beta": fingerprint(beta)}
            same |= {"validation": None if validation is None else validation.num_data}
            same |= {"validation_bound": fingerprint(validation_bound)}
            same |= {"model": program_fingerprint(model), "guide": program_fingerprint(guide)}
            stepper.link(Ranks(tensors, same), noise, best.settle)
        if checkpoint is not None:
            warm: dict[str, Any] = {"kl_warmup": kl_warmup, "kl_warmup_steps": kl_warmup_steps, "beta": beta}
            settings: dict[str, Any] = {
                "epochs": epochs, "batch_size": batch_size, "loss": loss, **warm, "schedule": schedule, "seed": seed,
                "data_seed": data_seed, **optimizer_settings(optimizer), "patience": patience,
                "validation_bound": validation_bound,
                "matmul_precision": str(current_precision()) if matmul_precision is None
                else matmul_precision, "device": torch.device(place or "cpu").type, "data": data,
                "validation": None if validation is None else validation.origin,
            }  # fmt: skip
            settings = {key: fingerprint(value) for key, value in settings.items()}
            settings["dtype"] = ", ".join(sorted({str(t.dtype) for t in tensors.values()}))
            frozen = [name for name, t in tensors.items() if isinstance(t, nn.Parameter) and not t.requires_grad]
            settings["list of frozen parameters"] = fingerprint(sorted(frozen))
            settings |= {"model": program_fingerprint(model), "guide": program_fingerprint(guide)}
            shaping = filter(callable, (beta, schedule, validation_bound, getattr(loss, "bound", None)))
            values = functools.partial(program_values, model, guide, *shaping, but=list(tensors.values()))
            saved = Checkpoint(checkpoint, tensors, settings, values, read_only=rank > 0)
            if isinstance(checkpoint, Sparing) and not given:
                stepper.warm_up(list(tensors.values()))
            started -= _resumed(saved, history, best, stepper, size, kl_warmup_steps is not None)
            noise = stepper.noise
            if size > 1 and data_seed is None:
                batches.stream = Stream(apart(noise), torch.device(place or "cpu"))
            resumed = getattr(callback, "resumed", None)
            if resumed is not None:
                resumed(history.records)
        setup.done()
        stepper.listen(callback)
        quiet = None if progress is None else not progress
        with stepper.together(), _Bar(
            total=stepper.total, initial=stepper.steps, disable=quiet, bar_format=_BAR, dynamic_ncols=True,
            desc=f"epoch {len(history) + 1}/{epochs}",
        ) as bar:  # fmt: skip
            bar.ahead = float(getattr(callback, "ahead", 0.0))
            try:
                for epoch in range(len(history) + 1, epochs + 1 if not history.stopped_early else 0):
                    _train(modules)  # a callback may have looked at pictures in evaluation mode
                    bar.set_description(f"epoch {epoch}/{epochs}", refresh=False)
                    batches.begin(epoch)
                    if size > 1:  # the noise of each process is its own, and that of the epoch
                        torch.manual_seed(apart(noise, epoch, rank))
                    record: dict[str, Any] = {"epoch": epoch} | stepper.epoch(bar)
                    best.settle()
                    if validation is not None:
                        scored = mean_bound(model, guide, validation, validation_bound, device=place)
                        record["validation"] = scored if stepper.ranks is None else stepper.ranks.totals(scored)[0][0]
                    record["seconds"] = time.perf_counter() - started
                    history.records.append(record)
                    keys = [key for key in ("bound" if "bound" in record else "loss", "validation") if key in record]
                    shown = ", ".join(f"{key} {record[key]:.2f}" for key in keys)
                    bar.set_postfix_str(shown, refresh=False)
                    if callback is not None:
                        with in_callback(), alone():
                            callback(record)
                    # While the weight of the divergence rises, a validation bound says nothing about the end.
                    settled = stepper.steps >= stepper.warmup
                    end_epoch(optimizer, record, settled)
                    if patience is not None and settled:
                        best.offer(record["validation"], epoch, stepper.parameters())
                        history.stopped_early = epoch - best.epoch >= patience
                    if (
                        checkpoint is not None
                        and rank == 0
                        and (epoch == epochs or history.stopped_early or saved.due())
                    ):
                        _saved(saved, history, best, stepper)
                        if saved.share is None and (epoch == epochs or history.stopped_early):
                            previous(saved.path).unlink(missing_ok=True)  # the fit is whole, and so is its file
                    if history.stopped_early:
                        break
            except KeyboardInterrupt:
                if stepper.ranks is not None and not stepper.ranks.stopping:
                    raise  # the others have not stopped at this step
                history.interrupted = True
            finally:
                stepper.release()
        if stepper.ranks is not None and stepper.ranks.stopping:  # also where it came after the last step
            history.interrupted = True
        if explanation.wanted() and rank == 0:
            print(explanation.explained(compiled, stepper.steps), file=sys.stderr)
        history.best_epoch = len(history)
        if best.epoch and not history.interrupted:
            best.restore()
            history.best_epoch = best.epoch
    return history


def _take_up_loaded(model: Program, guide: Program, batches: Batches) -> None:
    """Start from what was loaded into the param store, where the programs ask for it."""
    if not holds_loaded():
        return
    with loaded_values() as found, evaluating(model, guide, seed=0):
        batch = batches.first()
        guide_trace = poutine.trace(guide).get_trace(*batch)
        poutine.replay(model, trace=guide_trace)(*batch)
    with torch.no_grad():
        for own, value in found:
            own.copy_(value)


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
        "best_value": best.value if best.epoch else None, "compiled": stepper.compiles, "size": stepper.batches.size,
        "noise": stepper.noise,
    }  # fmt: skip
    assert isinstance(stepper.optimizer, Fused)
    moments = stepper.optimizer.moments(checkpoint.tensors)
    checkpoint.write(progress, moments, {names[id(t)]: copied for t, copied in best.copies})


def _share_out(batches: Batches, model: Program, guide: Program) -> str | None:
    """Make the batches those of one process of several, and as many in a pass as any of them has; what tells the data
    from others, where every process is to have all of them.
    """
    rank, size = world()
    if (held := rows_held(guide)) is not None:
        raise ValueError(
            f"the guide holds parameters for each of the {held[1]} rows of latent site {held[0]!r}, and got the data "
            f"in shares of {size} processes. Fit it in one process, or take a guide that is a function of the data."
        )
    with undisturbed(), unmoved(modules_of(model, guide)), Counting() as counting:
        batch = batches.first()
        poutine.replay(model, trace=poutine.trace(guide).get_trace(*batch))(*batch)
    if counting.picks is not None:
        raise ValueError(
            f"plate {counting.picks!r} picks its rows at random in each run, so that {size} processes cannot share "
            'them out. Give the rows as arguments: pyro.plate("data", N, subsample=x).'
        )
    count = batches.num_data
    if batches.together and count is not None and count < 2 * size:
        raise ValueError(
            f"got {count} data in {size} processes and a network with batch normalisation, which learns nothing from "
            "one datum: wanted at least two for each process."
        )
    batches.shard(rank, size)
    if count is None:
        batches.steps = most_steps(len(batches))
        return None
    with seeded(0):
        return fingerprint(batches.take(torch.linspace(0, count - 1, min(count, 64)).long().to(batches.home)))


def _resumed(
    checkpoint: Checkpoint, history: History, best: _Best, stepper: _Stepper, size: int, warms_by_steps: bool
) -> float:
    """Go on where a checkpoint ends; the seconds that went into it."""
    if not isinstance(stepper.optimizer, Fused):
        raise ValueError("checkpoint needs fit's own optimiser: pass a torch optimiser class, not a PyroOptim.")
    ranks = stepper.ranks
    found = checkpoint.read() if ranks is None or ranks.rank == 0 else None
    if ranks is not None:
        found = ranks.resumed(found)
    if found is None:
        return 0.0
    progress, moments, copies = found
    if ranks is not None and ranks.rank > 0:
        place = next(iter(checkpoint.tensors.values())).device
        moments = {
            name: {k: t.to(place) if t.dim() else t for k, t in state.items()} for name, state in moments.items()
        }
        copies = mapped(copies, place)
    stepper.noise = progress.get("noise") or stepper.noise
    if progress.get("size", 1) != size and warms_by_steps:
        raise ValueError(
            f"{checkpoint.path} is of a fit of {progress.get('size', 1)} processes, whose kl_warmup_steps are other "
            f"steps than those of {size}. Go on in as many, or begin with kl_warmup, which is in epochs."
        )
    history.records, history.stopped_early = progress["records"], progress["stopped"]
    stepper.steps = progress["steps"]
    if progress.get("size", 1) != size:  # so many epochs are other steps there
        stepper.steps = len(history) * len(stepper.batches)
    if stepper.considers and progress.get("compiled") and stepper.graph is not None:
        stepper.graph.compiled.compile_after = 0
    stepper.considers = stepper.considers and stepper.steps < _TIMED
    stepper.optimizer.restore(checkpoint.tensors, moments)
    best.epoch = progress["best_epoch"]
    best.value = -math.inf if progress["best_value"] is None else progress["best_value"]
    best.copies = [(checkpoint.tensors[name], copied) for name, copied in copies.items()]
    return history.records[-1]["seconds"]


@contextlib.contextmanager
def _learning(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Modules in training mode, and all in evaluation mode at the end, whatever ends it."""
    try:
        _train(modules)
        yield
    finally:
        for module in modules:
            module.eval()


def _train(modules: Sequence[nn.Module]) -> None:
    """Put modules into training mode, except for what is frozen whole, or held at rest by who calls `fit`."""
    for module in modules:
        module.train()
        _rest_frozen(module)
        for part in module.modules():
            if part.training and rests(part):
                part.training = False


def _rest_frozen(module: nn.Module) -> None:
    """Put what has parameters and none that learns into evaluation mode, its dropout and statistics too."""
    parameters = list(module.parameters())
    if parameters and not any(p.requires_grad for p in parameters):
        module.eval()
        return
    for child in module.children():
        _rest_frozen(child)


def _refuse_inference(tensors: Iterable[Tensor]) -> None:
    """Tensors made in inference mode can never have a gradient, nor be changed in place."""
    made = sum(t.is_inference() for t in tensors)
    if made:
        raise ValueError(
            f"{made} parameters or buffers of model and guide were made under torch.inference_mode(), and cannot be "
            "trained. Make the networks outside torch.inference_mode()."
        )


def _untrained(parameters: Iterable[Tensor]) -> str:
    """Why no parameter had a gradient."""
    known = {id(p): p for p in parameters}.values()
    if known and all(isinstance(p, nn.Parameter) and not p.requires_grad for p in known):
        return (
            f"all {len(known)} parameters of model and guide have requires_grad=False, so there is nothing to train. "
            "Call requires_grad_(True) on what shall learn."
        )
    return (
        "no parameter of model or guide had a gradient, so there is nothing to train. Register networks with "
        'pyro.module("decoder", net) inside the programs, or write the programs as PyroModules.'
    )


class _Stepper:
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

    def _meet(self) -> None:
        """Have the buffers of all processes in all of them."""
        if self.ranks is not None:
            self._settle()
            self.ranks.settle()

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

    def together(self) -> contextlib.AbstractContextManager[None]:
        """Steps inside are taken by all processes, or end in all."""
        return contextlib.nullcontext() if self.ranks is None else self.ranks.together()

    def _next_tenth(self) -> float:
        """The steps at which another tenth of them is done."""
        return math.ceil((10 * self.steps // self.total + 1) * self.total / 10)

    def beta(self) -> float:
        """The weight of log q - log p(z) in the step to come."""
        return self.tempering(self.steps)

    def release(self) -> None:
        """Give what was lent for the fit its own numbers back."""
        if isinstance(self.optimizer, Fused):
            self.optimizer.release()
            self.optimizer.exchange = None
        if self.own_beta is not None:
            self.loss.beta = self.own_beta

    def factor(self) -> float:
        """What multiplies the learning rate in the step to come."""
        return self.rate(self.steps / self.total)

    def parameters(self) -> list[Tensor]:
        """What was trained so far, whoever owns it."""
        return list(self.optimizer.parameters if isinstance(self.optimizer, Fused) else self.optimizer.optim_objs)

    @property
    def compiles(self) -> bool:
        """Whether Inductor compiles the steps."""
        return self.graph is not None and self.graph.compiled.compile_after is not None

    def warm_up(self, tensors: Sequence[Tensor]) -> None:
        """Have the graphs of all kinds of steps, and nothing else, so that every step to come is a replay.

        The steps that graphs are made from differ from replays by rounding. A fit that goes on would take such steps
        anew, in the middle, where the whole fit replayed.
        """
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
        summed: float | Tensor = 0.0
        bound: float | Tensor = 0.0
        tempered = False
        for choice in self.batches.choices():
            beta = self.beta()
            tempered = tempered or beta != 1
            value = self._step(choice)
            rows, scale = self.unit.rows, self.unit.scale
            if self.batches.own_rows:
                summed, count, even = summed + value / scale, count + rows, even and self.unit.even
                if isinstance(self.loss, Objective):
                    assert self.loss.last_bound is not None
                    bound = bound + self.loss.last_bound.double() / scale
            if self.ranks is not None and self.ranks.stopping:
                self._meet()
                raise KeyboardInterrupt
            bar.update(1)
            if self.steps % _LOOK == 0:
                self._check_finite(summed)
                if self.steps < len(self.batches):  # later the bar shows what the last epoch came to
                    bar.set_postfix_str(f"loss of a batch {float(value) / self.unit.whole:.2f}", refresh=False)
            self._taken += 1
            if self._taken == EARLY // 2:
                self._clock = time.perf_counter()
            elif self._taken == EARLY and self.early is not None:
                self.early((time.perf_counter() - self._clock) / (EARLY - EARLY // 2), self.total - self.steps)
            if self.steps >= self._telling and self.tenth is not None:
                so_far = bound if isinstance(self.loss, Objective) else -summed if even and not tempered else math.nan
                self.tenth(self.steps, self.total, None if math.isnan(so_far) else float(so_far) / count)
                self._telling = self._next_tenth()
        self._check_finite(summed)
        if self.ranks is not None:
            self._meet()
            table = self.ranks.totals(float(summed), float(count), float(bound), float(even))
            summed, bound = (math.fsum(row[i] for row in table) for i in (0, 2))
            count, even = sum(int(row[1]) for row in table), all(row[3] for row in table)
        record: dict[str, Any] = {"loss": float(summed) / count}
        if isinstance(self.loss, Objective):
            record["bound"] = float(bound) / count
        elif even and not tempered:
            record["bound"] = -float(summed) / count
        rate = rate_of(self.optimizer)
        if rate is not None:
            record["learning_rate"] = rate
        seconds = time.perf_counter() - started
        return record | {"beta": beta, "images_per_second": count / seconds}

    def _step(self, choice: tuple[Any, ...]) -> float | Tensor:
        if isinstance(self.optimizer, Fused):
            self.optimizer.set_learning_rate(self.factor())
        if self.tempering.active and isinstance(self.loss, Objective):
            self.loss.beta = self.beta()
        if isinstance(self.weight, Tensor):
            self.weight.fill_(self.beta())
        elif self.weight is not None:
            self.weight.value = self.beta()
        value: float | Tensor
        self.choice = choice
        self._sizes = lengths(choice)
        if self.tempering.active and (self.beta() != 1) is not self._tempered:
            self._tempered = not self._tempered
            self._units.clear()  # whether all sites carry one scale was said of another weight
        if self.graph is not None:
            # A replay does not run the programs: it is measured as the step was that it replays.
            if self._sizes not in self._units and self.graph.compiled.captures:
                self._measure(choice)
            self._use(self._units.get(self._sizes, self.unit))
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
            value = replayed.double()  # read every now and then, since each look waits for the GPU
        if isinstance(value, float):
            self._check_finite(value)
        if self.considers:
            self._consider()
        if self.steps == 0 and not self.parameters():
            raise ValueError(_untrained([] if self.batches.shown is None else self.batches.shown.parameters))
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
        with self._aside(), self.counting:
            batch = self.batches.take(*choice)
            trace = poutine.trace(self.svi.guide).get_trace(*batch)
            poutine.replay(self.svi.model, trace=trace)(*batch)
        self._note()

    def _keep_rows(self, guide: Program) -> None:
        """Leave rows where they are if a guide has parameters for each: in one batch their order is of no use."""
        with self._aside(), poutine.trace(param_only=True) as declared:
            guide(*self.batches.first())
        for site in declared.trace.nodes.values():
            declared_value: Any = site["value"]
            value = declared_value.unconstrained() if site["type"] == "param" else None
            if isinstance(value, Tensor) and self.batches.num_data in value.shape:
                network = isinstance(value, nn.Parameter) and not hasattr(guide, "prototype_trace")
                self.batches.shuffle = self.batches.shuffle and network

    @contextlib.contextmanager
    def _aside(self) -> Iterator[None]:
        """A run that leaves random state and buffers as they are."""
        with undisturbed(), unmoved(modules_of(self.svi.model, self.svi.guide)):
            yield

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
            assert self.choice is not None
            batch, index = self.batches.take(*self.choice), None if self.batches.columns is None else self.choice[0]
            said = diagnosis(float(value), self.steps, self.pair, batch, index)
            if self.batches.tolerated:
                said += (
                    " A mask leaves out values of the data that are NaN or have no density: their gradient is NaN all "
                    "the same where the model computes with them. Put a number in their place, x.where(mask, 0)."
                )
            raise ValueError(said)


if TYPE_CHECKING:
    _Tqdm = tqdm[Any]  # generic for type checkers only
else:
    _Tqdm = tqdm


class _Bar(_Tqdm):
    """A bar whose time left has what comes after the fit in it."""

    ahead = 0.0

    @property
    def format_dict(self) -> dict[str, Any]:
        found = super().format_dict
        done, elapsed = found["n"] - found["initial"], found["elapsed"]
        rate = found["rate"] or (done / elapsed if elapsed else 0)
        left = tqdm.format_interval((found["total"] - found["n"]) / rate + self.ahead) if rate else "?"
        return {**found, "left": left}


class _Best:
    """The best tensors so far: those of all modules, with their buffers, and all others that were trained."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self.modules = modules
        self.epoch = 0
        self.value = -math.inf
        self.copies: list[tuple[Tensor, Tensor]] = []
        self._homes: dict[tuple[int, str], Tensor] = {}
        self.settle()

    def settle(self) -> None:
        """Bring home what a program put in a buffer's place, so that the buffer is the one that is kept and written."""
        for part in (part for module in self.modules for part in module.modules()):
            for name, now in part._buffers.items():
                home = now if now is None else self._homes.setdefault((id(part), name), now)
                if home is None or now is None or home is now or home.shape != now.shape or home.dtype != now.dtype:
                    continue
                with torch.no_grad():
                    home.copy_(now)
                part._buffers[name] = home

    def offer(self, value: float, epoch: int, trained: Sequence[Tensor]) -> None:
        value = -math.inf if math.isnan(value) else value
        if value > self.value or not self.epoch:
            self.value, self.epoch = value, epoch
            tensors = [t for m in self.modules for t in (*m.parameters(), *m.buffers())]
            tensors += trained  # those of plain functions: in the param store, or networks given to pyro.module
            self.copies = [(t, t.detach().clone()) for t in {id(t): t for t in tensors}.values()]

    def restore(self) -> None:
        with torch.no_grad():
            for tensor, copied in self.copies:
                tensor.copy_(copied)


def _check_options(loss: Any, patience: int | None, validation: Any, schedule: Any) -> None:
    """What the types of the options (see `pyro_vae.options`) do not say."""
    if not callable(schedule) and not (isinstance(schedule, str) and schedule in SCHEDULES):
        hint = did_you_mean(schedule, SCHEDULES)
        raise ValueError(f"unknown schedule {schedule!r}, wanted one of {', '.join(SCHEDULES)} or a function.{hint}")
    if callable(schedule):
        value_of("schedule", schedule, 0.0)
    if patience is not None and (patience < 1 or validation is None):
        raise ValueError(f"patience (got {patience}) needs validation data, and must be a positive integer.")
    if not hasattr(loss, "loss_and_grads") or isinstance(loss, type):
        raise ValueError(
            f"got loss {loss!r}, wanted a Pyro ELBO such as Trace_ELBO(), or Objective(iwae, num_samples=50)."
        )
    if isinstance(loss, TraceTailAdaptive_ELBO):
        raise ValueError(
            "TraceTailAdaptive_ELBO gives infinity as its loss, by design, so that no fit can be followed, and ranks "
            "one weight for the whole batch. Take Objective(renyi(0.5), num_samples=10), which has one for each datum."
        )
