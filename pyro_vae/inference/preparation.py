"""What a fit prepares before its first step, and what it refuses there."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from pyro.infer import TraceTailAdaptive_ELBO
from pyro.optim import PyroOptim
from torch import Tensor, nn

from pyro_vae.evaluation import evaluating, others_kept, undisturbed, unmoved
from pyro_vae.inference.batches import Batches, Stream, seeded
from pyro_vae.inference.bounds import Bound
from pyro_vae.inference.checkpoints import Checkpoint, named_tensors
from pyro_vae.inference.compatibility import rows_held
from pyro_vae.inference.compiled import Compiled
from pyro_vae.inference.epochs import Epochs
from pyro_vae.inference.fingerprints import fingerprint, program_fingerprint, program_values
from pyro_vae.inference.objectives import Objective
from pyro_vae.inference.optimizers import Fused
from pyro_vae.inference.per_datum import Counting
from pyro_vae.inference.ranks import Ranks, gathered, world
from pyro_vae.inference.schedules import SCHEDULES
from pyro_vae.inference.split_bounds import SplitBound
from pyro_vae.inference.starts import before_fit, check_data
from pyro_vae.inference.tempering import value_of
from pyro_vae.parameters import device_of, holds_loaded, loaded_values
from pyro_vae.precision import current as current_precision
from pyro_vae.reach import modules_of
from pyro_vae.traces import Program, traced
from pyro_vae.words import did_you_mean

_CAPTURE_PAYS = 500  # steps: a capture costs about a second

Device: TypeAlias = str | torch.device | None


def check_options(loss: Any, patience: int | None, validation: Any, bound: Bound | None, schedule: Any) -> None:
    """What the types of the options (see `pyro_vae.options`) do not say."""
    if not torch.is_grad_enabled():
        raise ValueError(
            "gradients are switched off here (torch.no_grad or inference_mode), so there is nothing to train. Call fit "
            "outside of it."
        )
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
    if isinstance(bound, SplitBound) and bound.upper:
        raise ValueError(f"validation_bound={bound!r} is an upper bound: higher is not better. Take iwae.")


def move(model: Program, guide: Program, modules: Sequence[nn.Module], device: Device) -> Device:
    """Move the modules of a pair to a device, if one is given; where the pair is. They must be able to learn."""
    for module in modules if device is not None else []:
        module.to(device)
    _refuse_inference(t for module in modules for t in (*module.parameters(), *module.buffers()))
    return device if device is not None else device_of(model, guide)


def check_shared(optimizer: PyroOptim, size: int) -> None:
    """Refuse an optimiser that cannot take its steps together with other processes."""
    if size > 1 and not isinstance(optimizer, Fused):
        raise ValueError(
            f"got a PyroOptim in a fit of {size} processes, which steps each tensor by itself. Pass a torch "
            "optimiser class, such as torch.optim.Adam."
        )


def read(
    model: Program, guide: Program, modules: Sequence[nn.Module], data: Any, batch_size: int, place: Device,
    order: int | None,
) -> Batches:  # fmt: skip
    """The batches of a fit, in an order of a stream of their own if there is a seed for it, once the pair has seen and
    checked the data."""
    check_data(modules, data)
    with others_kept(modules):
        batches = Batches(data, batch_size, place, programs=(model, guide))
        batches.keep_together()
        if order is not None:
            batches.stream = Stream(order, torch.device(place or "cpu"))
    if batches.shown is not None:  # also networks that plain functions use
        _refuse_inference({id(p): p for p in batches.shown.parameters if isinstance(p, nn.Parameter)}.values())
    before_fit(modules, batches)
    _take_up_loaded(model, guide, batches)
    return batches


def held_out(model: Program, guide: Program, data: Any, place: Device) -> Batches | None:
    """The batches of validation data, if there are some; what cannot be scored is refused now, not after an epoch."""
    if data is None:
        return None
    batches = Batches(data, 500, place, shuffle=False, programs=(model, guide))
    with evaluating(model, guide, seed=0):
        Objective().particles(model, guide, *batches.first())
    return batches


def share_out(batches: Batches, model: Program, guide: Program) -> str | None:
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
        traced(model, guide, batches.first(), {})
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
        batches.steps = max(gathered(len(batches)))
        return None
    with seeded(0):
        return fingerprint(batches.take(torch.linspace(0, count - 1, min(count, 64)).long().to(batches.home)))


def captured_where_it_pays(
    loss: Any, compile: bool | str, steps: int, resumable: bool, per_epoch: int
) -> Compiled | None:
    """The loss compiled where that is wanted, or, automatically, where it pays for a fit of so many steps."""
    if compile not in (True, False, "auto"):
        raise ValueError(f'got compile={compile!r}, wanted True, False or "auto".')
    if compile == "auto" and (resumable or steps < _CAPTURE_PAYS) or compile is False:
        return None
    compiled = Compiled(
        loss, compile_after=10 if compile is True else None, quiet=compile == "auto", unproven=compile is True,
        check_every=max(1, min(per_epoch, 100)),
    )  # fmt: skip
    compiled.optional = compile == "auto"
    return compiled


class Identity:
    """What shapes the result of a fit: in each of several processes, and where a fit goes on, it is the same.

    Args:
        run: The fit.
        settings: Its options by name.
    Attributes:
        tensors: All that the fit changes, by name.
    """

    def __init__(self, run: Epochs, **settings: Any) -> None:
        self.run, self.given, self.programs = run, settings, run.stepper.pair
        with unmoved(run.modules):
            self.tensors = named_tensors(run.modules, *self.programs, run.stepper.batches.first())
        self.settings = _fingerprints(settings)
        self.pair = {
            name: program_fingerprint(each) for name, each in zip(("model", "guide"), self.programs, strict=True)
        }

    def link(
        self, noise: int, sample: str | None, kept: bool, precision: str | None, validation: Batches | None
    ) -> None:
        """Take the steps together with other processes that have the same, and whose noise has this seed."""
        stepper = self.run.stepper
        same: dict[str, Any] = {
            "steps": stepper.total, "number of data": stepper.batches.num_data, "a sample of the data": sample,
            "checkpoint": kept, "matmul_precision": precision,
            "validation": None if validation is None else validation.num_data,
        }  # fmt: skip
        stepper.link(Ranks(self.tensors, self.settings | same | self.pair), noise, self.run.best.settle)

    def checkpoint(
        self, path: str | os.PathLike[str], read_only: bool, precision: str | None, place: Device, data: Any,
        validation: Batches | None,
    ) -> Checkpoint:  # fmt: skip
        """The file of a fit that goes on only where all of it is the same."""
        more = {
            "matmul_precision": precision or str(current_precision()), "device": torch.device(place or "cpu").type,
            "data": data, "validation": None if validation is None else validation.origin,
        }  # fmt: skip
        frozen = [name for name, t in self.tensors.items() if isinstance(t, nn.Parameter) and not t.requires_grad]
        settings = self.settings | _fingerprints(more)
        settings["dtype"] = ", ".join(sorted({str(t.dtype) for t in self.tensors.values()}))
        settings["list of frozen parameters"] = fingerprint(sorted(frozen))
        bound = getattr(self.given["loss"], "bound", None)
        functions = filter(callable, (*(self.given[key] for key in ("beta", "schedule", "validation_bound")), bound))
        values = functools.partial(program_values, *self.programs, *functions, but=list(self.tensors.values()))
        return Checkpoint(path, self.tensors, settings | self.pair, values, read_only=read_only)


def _fingerprints(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {key: fingerprint(value) for key, value in settings.items()}


def _take_up_loaded(model: Program, guide: Program, batches: Batches) -> None:
    """Start from what was loaded into the param store, where the programs ask for it."""
    if not holds_loaded():
        return
    with loaded_values() as found, evaluating(model, guide, seed=0):
        traced(model, guide, batches.first(), {})
    with torch.no_grad():
        for own, value in found:
            own.copy_(value)


def _refuse_inference(tensors: Iterable[Tensor]) -> None:
    """Tensors made in inference mode can never have a gradient, nor be changed in place."""
    made = sum(t.is_inference() for t in tensors)
    if made:
        raise ValueError(
            f"{made} parameters or buffers of model and guide were made under torch.inference_mode(), and cannot be "
            "trained. Make the networks outside torch.inference_mode()."
        )
