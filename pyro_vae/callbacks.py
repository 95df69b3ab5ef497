"""Callbacks for `fit` that write its records where others look at them: TensorBoard, MLflow, Weights & Biases.

    pv.fit(model, guide, x, callback=pv.callbacks.tensorboard("logs"))

Each writes every number of an epoch's record under its name, with the epoch as its step.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

Callback = Callable[[Mapping[str, Any]], None]


def tensorboard(directory: str | os.PathLike[str], prefix: str = "") -> Callback:
    """Write event files that ``tensorboard --logdir DIRECTORY`` shows; there after each epoch.

    Args:
        directory: Where they go, made if it is not there.
        prefix: Before each name, such as "vae/".
    Raises:
        ValueError: TensorBoard is not installed.
    """
    _imported("tensorboard", "tensorboard")
    writer = _imported("torch.utils.tensorboard", "tensorboard").SummaryWriter(os.fspath(directory))

    def write(record: Mapping[str, Any]) -> None:
        for name, value in _numbers(record).items():
            writer.add_scalar(prefix + name, value, record["epoch"])
        writer.flush()

    return write


def mlflow(run_id: str | None = None, prefix: str = "") -> Callback:
    """Log metrics to MLflow.

    Args:
        run_id: The run; None for the active one, or a new one, which is then begun by the first record.
        prefix: Before each name.
    Raises:
        ValueError: MLflow is not installed.
    """
    client = _imported("mlflow", "mlflow")

    def write(record: Mapping[str, Any]) -> None:
        values = {prefix + name: value for name, value in _numbers(record).items()}
        client.log_metrics(values, step=record["epoch"], **({} if run_id is None else {"run_id": run_id}))

    return write


def wandb(run: Any = None, prefix: str = "", **options: Any) -> Callback:
    """Log to Weights & Biases.

    Args:
        run: What ``wandb.init`` gave; None for the active run, or a new one, of these `options`.
        prefix: Before each name.
        options: Of ``wandb.init`` for a new run, such as ``project="vaes"``.
    Raises:
        ValueError: wandb is not installed; a run and options for a new one.
    """
    package = _imported("wandb", "wandb")
    active = package.run if run is None else run
    if active is not None and options:
        raise ValueError(
            f"got a run and the options {', '.join(options)} of a new one. Leave out one of them, or end the active "
            "run by wandb.finish()."
        )
    target = package.init(**options) if active is None else active

    def write(record: Mapping[str, Any]) -> None:
        # With the epoch as a number and not as its step, so that a run can take several fits.
        target.log({prefix + name: value for name, value in {**_numbers(record), "epoch": record["epoch"]}.items()})

    return write


def _numbers(record: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in record.items() if name != "epoch" and isinstance(value, int | float)}


def _imported(module: str, extra: str) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        raise ValueError(
            f"the callback {extra} needs the package {extra}, which cannot be imported here ({error}). Run: pip "
            f"install 'pyro-vae[{extra}]', or pip install {extra}."
        ) from error
