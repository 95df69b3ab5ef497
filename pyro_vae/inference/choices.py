"""Which optimiser a fit steps with: what people bring, made into one that Pyro's SVI drives."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from pyro.optim import PyroOptim
from pyro.optim.lr_scheduler import PyroLRScheduler
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR, ReduceLROnPlateau

from pyro_vae.inference.optimizers import Fused

_RATE = 1e-3
_WANTED = (
    "wanted a torch optimiser (the class, torch.optim.Adam, or an instance), or a PyroOptim such as "
    'pyro.optim.ExponentialLR({"optimizer": torch.optim.Adam, "optim_args": {"lr": 1e-3}, "gamma": 0.9})'
)


def chosen(
    optimizer: Any, learning_rate: float | None, clip_norm: float | None, schedule: Any, epochs: int
) -> PyroOptim:
    """The optimiser of a fit, whose other options these are: a `Fused` of a class, or of an instance, which is taken
    over, or a ``PyroOptim`` as it is; what is given beside it and has no effect is said. Anything else, an optimiser
    that evaluates the loss itself (LBFGS), and a scheduler made for fewer epochs are a ValueError.
    """
    unused = {"learning_rate": learning_rate, "clip_norm": clip_norm}
    if isinstance(optimizer, PyroOptim):
        if not isinstance(optimizer, Fused) and schedule != "constant":
            unused["schedule"] = schedule
        _check_one_cycle(optimizer, epochs)
        result = optimizer
    elif optimizer is None or isinstance(optimizer, type) and issubclass(optimizer, torch.optim.Optimizer):
        constructor = optimizer or torch.optim.Adam
        _check_closure(constructor)
        return Fused(constructor, {"lr": _RATE if learning_rate is None else learning_rate}, clip_norm)
    elif isinstance(optimizer, torch.optim.Optimizer):
        _check_closure(type(optimizer))
        del unused["clip_norm"]
        if any("initial_lr" in group for group in optimizer.param_groups):
            warnings.warn(
                "a torch scheduler is attached to the optimiser, and fit does not step it: step it in callback=, or "
                'use schedule="cosine" or a Pyro scheduler.',
                stacklevel=4,
            )
        result = Fused.taking(optimizer, clip_norm)
    elif isinstance(optimizer, LRScheduler | ReduceLROnPlateau):
        raise ValueError(
            f"got optimizer={type(optimizer).__name__}, a torch scheduler, {_WANTED}. For a schedule pass its "
            'optimizer and schedule="cosine", or a function of the fraction of steps done.'
        )
    else:
        name = getattr(optimizer, "__name__", None)
        of_pyro = getattr(optimizer, "__module__", "") == "pyro.optim.pytorch_optimizers"
        call = f" Call it: pyro.optim.{name}({{...}})." if of_pyro else ""
        raise ValueError(f"got optimizer={name or optimizer!r}, {_WANTED}.{call}")
    given = [f"{name}={value}" for name, value in unused.items() if value is not None]
    if given:
        own = "learning rate, clipping and schedule" if isinstance(optimizer, PyroOptim) else "learning rates"
        warnings.warn(f"{', '.join(given)} has no effect, since the optimiser has its own {own}.", stacklevel=4)
    return result


def end_epoch(optimizer: PyroOptim, record: Mapping[str, Any], settled: bool = True) -> None:
    """Step a Pyro scheduler, if it is one, once; of a plateau only where the record says something of the end, by minus
    the validation bound, or the loss; the opposite where its mode is "max"."""
    if not isinstance(optimizer, PyroLRScheduler):
        return
    constructor = optimizer.pt_scheduler_constructor
    if not (isinstance(constructor, type) and issubclass(constructor, ReduceLROnPlateau)):
        optimizer.step()
    elif settled:
        loss = -record["validation"] if "validation" in record else record["loss"]
        optimizer.step(-loss if optimizer.kwargs.get("mode") == "max" else loss)


def rate_of(optimizer: PyroOptim) -> float | None:
    """The learning rate as it stands, None where a ``PyroOptim`` has one for each tensor."""
    if isinstance(optimizer, Fused):
        return float(optimizer.current_rate)
    objects = list(optimizer.optim_objs.values()) if isinstance(optimizer, PyroLRScheduler) else []
    return float(objects[0].optimizer.param_groups[0]["lr"]) if objects else None


def optimizer_settings(optimizer: PyroOptim) -> dict[str, Any]:
    """What of an optimiser shapes a fit, by the names that `fit` has for it."""
    if not isinstance(optimizer, Fused):
        return {"optimizer": type(optimizer)}
    options = {key: value for key, value in optimizer.options.items() if key != "lr"}
    return {
        "optimizer": (optimizer.constructor, optimizer.taken_groups() or options),
        "learning_rate": optimizer.learning_rate,
        "clip_norm": optimizer.clip_norm,
    }


def _check_closure(constructor: type[torch.optim.Optimizer]) -> None:
    if issubclass(constructor, torch.optim.SparseAdam):
        raise ValueError(
            f"got optimizer={constructor.__name__}, which takes sparse gradients only, and the networks of a pair have "
            "dense ones. Take torch.optim.Adam."
        )
    closure = inspect.signature(constructor.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ValueError(
            f"got optimizer={constructor.__name__}, which evaluates the loss several times a step; stochastic "
            "variational inference has one noisy gradient a step. Take torch.optim.Adam."
        )


def _check_one_cycle(optimizer: PyroOptim, epochs: int) -> None:
    if not isinstance(optimizer, PyroLRScheduler) or optimizer.pt_scheduler_constructor is not OneCycleLR:
        return
    given = optimizer.kwargs
    total = given.get("total_steps") or (given.get("epochs") or 0) * (given.get("steps_per_epoch") or 0)
    if total < epochs:
        raise ValueError(
            f"got OneCycleLR for {total} steps, wanted one for at least {epochs}: a scheduler is stepped once an "
            'epoch. Say total_steps=epochs, or schedule="one-cycle", which is stepped with every batch.'
        )
    if total > epochs:
        warnings.warn(
            f"OneCycleLR is made for {total} steps, and is stepped once an epoch, {epochs} times: it will not get to "
            'its end. Say total_steps=epochs, or schedule="one-cycle", which is stepped with every batch.',
            stacklevel=5,
        )
