"""Nothing of the process is changed for good: not by importing, not by calling, not by what breaks inside."""

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import warnings

import matplotlib
import matplotlib.pyplot
import numpy as np
import pyro
import pytest
import torch
import torch._dynamo  # any optimiser of torch's does at its first step, and sets a variable of the environment
from torch import nn

import pyro_vae as pv
from pyro_vae.inference.training import fit
from tests.pairs import binary, small_pair
from tests.test_kept import shorten, still


def state():
    """What a call could leave changed, by name."""
    return {
        "store": sorted(pyro.get_param_store().keys()),
        "torch's random state": torch.get_rng_state().tolist(),
        "numpy's random state": np.random.get_state()[1].tolist(),  # noqa: NPY002
        "matmul precision": torch.get_float32_matmul_precision(),
        "default dtype": str(torch.get_default_dtype()),
        "Pyro's validation": pyro.settings.get("validate_poutine"),
        "validation of distributions": torch.distributions.Distribution._validate_args,
        "Pyro's distributions": pyro.settings.get("validate_distributions_pyro"),
        "warning filters": [str(f) for f in warnings.filters],
        "backend": matplotlib.get_backend(),
        "rcParams": {k: str(v) for k, v in matplotlib.rcParams.items()},
        "environment": dict(os.environ),
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "signals": {s.name: str(signal.getsignal(s)) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)},
        "gradients": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_anomaly_enabled()),
        "autocast": (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "hooks": len(nn.modules.module._global_forward_hooks) + len(nn.modules.module._global_forward_pre_hooks),
        "handlers": len(pyro.poutine.runtime._PYRO_STACK),
        "default device": str(torch.get_default_device()),
        "bf16": (torch.backends.mkldnn.enabled, torch.backends.mkldnn.matmul.fp32_precision),
        "folder": os.getcwd(),
        "logging": (logging.getLogger().level, len(logging.getLogger().handlers)),
        "hook": (sys.excepthook.__name__, str(threading.excepthook)),
        "display": sys.displayhook.__name__,
    }


def changed(before):
    now = state()
    return [name for name in before if before[name] != now[name]]


OPTIONS = {"epochs": 2, "batch_size": 4, "seed": 0, "progress": False}


def judged(model, guide):
    """In all its stages, which are short ones."""
    with pytest.MonkeyPatch.context() as patch:
        shorten(patch)
        return pv.judge(model, guide, binary(12), num_data=4, num_samples=50, budget=1000.0, seed=0, progress=False,
                        clock=still)  # fmt: skip


CALLS = {
    "fit": lambda m, g: fit(m, g, binary(), **OPTIONS),
    "captured fit": lambda m, g: fit(m, g, binary(), compile=True, **OPTIONS),
    "bfloat16": lambda m, g: fit(m, g, binary(), matmul_precision="bfloat16", **OPTIONS),
    "medium": lambda m, g: fit(m, g, binary(), matmul_precision="medium", **OPTIONS),
    "log_likelihood": lambda m, g: pv.log_likelihood(m, g, binary(), num_samples=50, seed=0, progress=False),
    "elbo_terms": lambda m, g: pv.elbo_terms(m, g, binary(), seed=0, progress=False),
    "ais": lambda m, g: pv.ais(m, g, binary(3), num_steps=5, num_samples=2, seed=0, progress=False),
    "gaps": lambda m, g: pv.gaps(m, g, binary(3), num_samples=20, num_steps=5, seed=0, progress=False),
    "judge": lambda m, g: judged(m, g),
    "plot": lambda m, g: judged(m, g).plot(),
    "long judge": lambda m, g: pv.judge(m, g, binary(12), budget=10, seed=0, progress=False),
}
SLOW = ("long judge",)  # with all that it tries


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if n in SLOW else ()) for n in CALLS])
def test_a_call_leaves_the_process_as_it_was(name):
    pair = small_pair()
    pyro.clear_param_store()
    matplotlib.pyplot.close("all")
    before = state()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        CALLS[name](*pair)
    # As SVI leaves them, the parameters of a fit are in the store: this pair's, and no others.
    fits = name in ("fit", "captured fit", "bfloat16", "medium")
    assert changed(before) == (["store"] if fits else [])
    new = len(state()["store"]) - len(before["store"])
    assert new == (sum(len(list(program.parameters())) for program in pair) if fits else 0)


class Broken(Exception):
    pass


def of_callback(m, g):
    def callback(record):
        raise Broken

    fit(m, g, binary(), callback=callback, **OPTIONS)


def of_loader(m, g):
    def batches():
        yield binary(4)
        yield binary(4)
        raise Broken

    class Loader:
        def __iter__(self):
            return batches()

        def __len__(self):
            return 3

    try:
        fit(m, g, Loader(), **OPTIONS)
    except Exception as error:  # noqa: BLE001 - the loader's own, wrapped with its place
        raise Broken from error


def of_model(m, g, after=4, **options):
    left = [after]

    def model(x):
        left[0] -= 1
        if left[0] < 0:
            torch.set_num_threads(torch.get_num_threads())
            raise Broken
        return m(x)

    try:
        fit(model, g, binary(), **OPTIONS | options)
    except Broken:
        raise
    except Exception as error:  # noqa: BLE001 - Pyro's, with the shapes of the trace
        raise Broken from error


def of_evaluation(m, g):
    def model(x):
        m(x)
        raise Broken

    try:
        pv.log_likelihood(model, g, binary(), num_samples=10, seed=0, progress=False)
    except Exception as error:  # noqa: BLE001
        raise Broken from error


@pytest.mark.parametrize("broken", [of_callback, of_loader, of_model, of_evaluation])
def test_what_breaks_inside_leaves_all_as_it_was_and_the_pair_usable(broken):
    pair = small_pair()
    pyro.clear_param_store()
    before = state()
    with pytest.raises(Broken):
        broken(*pair)
    assert changed(before) == []
    other = small_pair()
    for mine, theirs in zip(pair, other, strict=True):
        mine.load_state_dict(theirs.state_dict())
    ours, fresh = fit(*pair, binary(), **OPTIONS), fit(*other, binary(), **OPTIONS)
    assert ours["loss"] == fresh["loss"]
    assert not any(module.training for program in pair for module in program.modules())


def test_importing_changes_nothing():
    code = (
        "import json, os, signal, sys, warnings, torch, matplotlib, pyro\n"
        "import scipy.special, scipy.sparse\n"  # which add filters of their own
        "def now(): return [torch.get_num_threads(), torch.get_float32_matmul_precision(), str(torch.get_default_dtype()),"
        " dict(os.environ), [str(f) for f in warnings.filters], str(signal.getsignal(2)), str(signal.getsignal(15)),"
        " torch.get_rng_state().sum().item(), torch.distributions.Distribution._validate_args,"
        " pyro.settings.get('validate_poutine'), {k: str(v) for k, v in matplotlib.rcParams.items() if k != 'backend'},"
        " sys.path, os.getcwd(), torch.is_grad_enabled()]\n"
        "before = now()\n"
        "import pyro_vae as pv\n"
        "for name in dir(pv): getattr(pv, name)\n"
        "import pyro_vae.app.fitting, pyro_vae.app.commands, pyro_vae.app.compare_command\n"
        "print(json.dumps([i for i, (a, b) in enumerate(zip(before, now())) if a != b]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == []


def test_a_process_that_is_forked_or_spawned_after_a_fit_can_fit(tmp_path):
    """A child of a fit: by fork with one thread, by spawn always."""
    code = (
        "import os, sys, multiprocessing as mp, torch; torch.set_num_threads(1)\n"
        "from tests.pairs import binary, small_pair\n"
        "from pyro_vae.inference.training import fit\n"
        "def one(q):\n"
        "    q.put(fit(*small_pair(), binary(), epochs=2, seed=0, progress=False)['loss'])\n"
        "if __name__ == '__main__':\n"
        "    here = fit(*small_pair(), binary(), epochs=2, seed=0, progress=False)['loss']\n"
        "    for method in ('fork', 'spawn'):\n"
        "        context = mp.get_context(method); q = context.Queue()\n"
        "        child = context.Process(target=one, args=(q,)); child.start()\n"
        "        there = q.get(timeout=120); child.join()\n"
        "        assert here == there, (method, here, there)\n"
    )
    path = tmp_path / "child.py"
    path.write_text(code)
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    environment = os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, path], capture_output=True, text=True, env=environment, timeout=180)
    assert done.returncode == 0, done.stderr


def test_a_precision_by_torchs_newer_settings_is_used_and_kept():
    """They make the older function raise, which a fit asks first."""
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = "bf16"
        with pytest.raises(RuntimeError):
            torch.get_float32_matmul_precision()
        for compile in (False, True):
            history = fit(*small_pair(), binary(), **OPTIONS, compile=compile)
            assert np.isfinite(history["loss"]).all() and matmul.fp32_precision == "bf16"
        pv.log_likelihood(*small_pair(), binary(), num_samples=50, seed=0, progress=False)
        fit(*small_pair(), binary(), **OPTIONS, matmul_precision="medium")
        assert matmul.fp32_precision == "bf16"
    finally:
        matmul.fp32_precision = before
    assert torch.get_float32_matmul_precision() == "highest"
