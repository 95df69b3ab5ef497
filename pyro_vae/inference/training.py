"""Fit any model/guide pair by stochastic variational inference."""

from __future__ import annotations

import copy
import functools
import os
import sys
from collections.abc import Callable
from typing import Any

import torch
from pyro.optim import PyroOptim

from pyro_vae.evaluation import others_kept, unmoved
from pyro_vae.inference import explanation
from pyro_vae.inference.batches import Stream, apart, seeded
from pyro_vae.inference.bounds import Bound, elbo
from pyro_vae.inference.checkpoints import Sparing
from pyro_vae.inference.choices import chosen, optimizer_settings
from pyro_vae.inference.compatibility import check
from pyro_vae.inference.compiled import Compiled
from pyro_vae.inference.epochs import Epochs, learning
from pyro_vae.inference.hardware import matmul_precision as precision
from pyro_vae.inference.hardware import read_constants, reused_memory
from pyro_vae.inference.loop import Stepper
from pyro_vae.inference.objectives import default_loss, mean_bound
from pyro_vae.inference.preparation import (
    Identity,
    captured_where_it_pays,
    check_options,
    check_shared,
    held_out,
    move,
    read,
    share_out,
)
from pyro_vae.inference.ranks import Setup, common_seed, world
from pyro_vae.inference.records import History
from pyro_vae.inference.schedules import SCHEDULES, Schedule
from pyro_vae.inference.tempering import Beta, Tempering, check_tempering, value_of
from pyro_vae.options import of_pair
from pyro_vae.parameters import own_parameters
from pyro_vae.reach import modules_of
from pyro_vae.traces import Program


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
            by the clock, two minutes or more of them lies ahead, unless there is a checkpoint: a
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
        >>> import pyro, pyro.distributions as dist
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
    given = loss if isinstance(loss, Compiled) else None
    # An ELBO remembers the plates of its pair, so it is a copy that learns them.
    loss = copy.copy(default_loss(guide) if loss is None else loss) if given is None else given.inner
    check_options(loss, patience, validation, validation_bound, schedule)
    warm: dict[str, Any] = {"kl_warmup": kl_warmup, "kl_warmup_steps": kl_warmup_steps, "beta": beta}
    check_tempering(loss, epochs, **warm)
    modules = modules_of(model, guide)
    place = move(model, guide, modules, device)
    optimizer = chosen(optimizer, learning_rate, clip_norm, schedule, epochs)
    rank, size = world()
    check_shared(optimizer, size)
    progress, callback = (progress, callback) if rank == 0 else (False, None)
    rate = SCHEDULES[schedule] if isinstance(schedule, str) else functools.partial(value_of, "schedule", schedule)
    read_constants()
    with (
        own_parameters(model, guide, keep=True), seeded(seed), precision(matmul_precision), reused_memory(),
        learning(modules), Setup() as setup,
    ):  # fmt: skip
        noise = common_seed(seed) if size > 1 else 0
        order = apart(noise) if data_seed is None and size > 1 else data_seed
        batches = read(model, guide, modules, data, batch_size, place, order)
        with others_kept(modules):
            with unmoved(modules) as met:  # statistics of batches are of the steps alone
                point = check(model, guide, batches.first(), loss)
            modules += [found for reference in met if (found := reference()) is not None]
            validation_bound = validation_bound or (loss.bound if point else elbo)
            validation = held_out(model, guide, validation, place)
            probe = share_out(batches, model, guide) if size > 1 else None
            tempering = Tempering(loss, epochs, len(batches), **warm)
            kept = checkpoint is not None and not isinstance(checkpoint, Sparing)
            compiled = given or captured_where_it_pays(loss, compile, tempering.total, kept, len(batches))
            stepper = Stepper(model, guide, loss, optimizer, rate, tempering, batches, compiled)
        stepper.considers = compile == "auto" and given is None
        scored = functools.partial(mean_bound, model, guide, validation, validation_bound, device=place)
        run = Epochs(stepper, modules, epochs, patience, None if validation is None else scored, callback)
        if checkpoint is not None or size > 1:
            identity = Identity(
                run, epochs=epochs, batch_size=batch_size, loss=loss, **warm, schedule=schedule, seed=seed,
                data_seed=data_seed, **optimizer_settings(optimizer), patience=patience,
                validation_bound=validation_bound,
            )  # fmt: skip
        if size > 1:
            identity.link(noise, probe, checkpoint is not None, matmul_precision, validation)
        if checkpoint is not None:
            saved = identity.checkpoint(checkpoint, rank > 0, matmul_precision, place, data, validation)
            if isinstance(checkpoint, Sparing) and given is None:
                stepper.warm_up(list(identity.tensors.values()))
            run.resume(saved, kl_warmup_steps is not None)
            if size > 1 and data_seed is None:
                batches.stream = Stream(apart(stepper.noise), torch.device(place or "cpu"))
            if (resumed := getattr(callback, "resumed", None)) is not None:
                resumed(run.history.records)
        setup.done()
        run.go(None if progress is None else not progress)
        run.history.products = sorted(set(run.multiplied().values()))
        if explanation.wanted() and rank == 0:
            print(explanation.explained(compiled, stepper.steps), file=sys.stderr)
    return run.history
