"""Callbacks that write what `fit` records where others look at it: what they write is the history, number for number."""

import subprocess
import sys
import types

import pytest
import torch

import pyro_vae as pv
from pyro_vae.inference.objectives import Objective


@pytest.fixture(scope="module")
def data():
    return (torch.rand(40, 6, generator=torch.Generator().manual_seed(0)) < 0.4).float()


def fitted(data, callback):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = pv.VAE.build((6,), latent_dim=2, hidden=(8,), likelihood="bernoulli")
    return pv.fit(
        vae.model, vae.guide, data, loss=Objective(), validation=data[:10], epochs=3, batch_size=20, seed=0,
        progress=False, callback=callback,
    )  # fmt: skip


def wanted(history, epoch):
    return {name: value for name, value in history.records[epoch].items() if name != "epoch"}


def test_tensorboard_reads_what_was_recorded(data, tmp_path):
    reading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    history = fitted(data, pv.callbacks.tensorboard(tmp_path / "logs", prefix="vae/"))
    events = reading.EventAccumulator(str(tmp_path / "logs")).Reload()
    assert sorted(events.Tags()["scalars"]) == sorted(f"vae/{name}" for name in wanted(history, 0))
    assert {"vae/bound", "vae/validation", "vae/loss", "vae/learning_rate"} <= set(events.Tags()["scalars"])
    for name in wanted(history, 0):
        found = events.Scalars(f"vae/{name}")
        assert [event.step for event in found] == [1, 2, 3]
        assert [event.value for event in found] == pytest.approx(history[name], rel=1e-6)


def test_mlflow_gets_what_was_recorded(data, monkeypatch):
    logged = []
    fake = types.ModuleType("mlflow")
    fake.log_metrics = lambda metrics, step=None, **more: logged.append((metrics, step, more))
    monkeypatch.setitem(sys.modules, "mlflow", fake)
    history = fitted(data, pv.callbacks.mlflow())
    assert logged == [(wanted(history, epoch), epoch + 1, {}) for epoch in range(3)]
    logged.clear()
    fitted(data, pv.callbacks.mlflow("abc", prefix="x/"))
    assert [(step, more) for _, step, more in logged] == [(epoch, {"run_id": "abc"}) for epoch in (1, 2, 3)]
    assert all(name.startswith("x/") for metrics, *_ in logged for name in metrics)


def test_wandb_gets_what_was_recorded(data, monkeypatch):
    class Run:
        def __init__(self, **options):
            self.options, self.logged = options, []

        def log(self, values):
            self.logged.append(values)

    fake = types.ModuleType("wandb")
    fake.run, fake.init, begun = None, None, []
    fake.init = lambda **options: begun.append(Run(**options)) or begun[-1]
    monkeypatch.setitem(sys.modules, "wandb", fake)
    history = fitted(data, pv.callbacks.wandb(project="vaes"))
    assert [run.options for run in begun] == [{"project": "vaes"}]
    assert begun[0].logged == [{**wanted(history, epoch), "epoch": epoch + 1} for epoch in range(3)]
    fake.run = Run()
    fitted(data, pv.callbacks.wandb())
    own = Run()
    fitted(data, pv.callbacks.wandb(own))
    assert len(begun) == 1 and len(fake.run.logged) == len(own.logged) == 3
    with pytest.raises(ValueError, match="got a run and the options project of a new one"):
        pv.callbacks.wandb(own, project="vaes")


@pytest.mark.parametrize("name", ["tensorboard", "mlflow", "wandb"])
def test_a_missing_package_is_named_with_its_extra(name, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, name, None)
    arguments = (tmp_path,) if name == "tensorboard" else ()
    with pytest.raises(ValueError, match=rf"needs the package {name}.*pip install 'pyro-vae\[{name}\]'"):
        getattr(pv.callbacks, name)(*arguments)


def test_nothing_is_imported_before_one_is_made():
    code = (
        "import sys, pyro_vae as pv; pv.callbacks.wandb; "
        "sys.exit(any(name in sys.modules for name in ('torch', 'tensorboard', 'mlflow', 'wandb')))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
