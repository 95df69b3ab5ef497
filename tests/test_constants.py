"""The constants of torch's log1p and expm1 are read before they are called often (benchmarks/activations.py: why)."""

import math

import pyro
import pyro.distributions as dist
import pyro.infer
import pytest
import torch
from torch import nn

import pyro_vae as pv
from pyro_vae.inference import hardware
from pyro_vae.inference.compiled import Compiled

net = nn.Linear(2, 1)


def model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z + x.new_zeros(2), 1.0).to_event(1), obs=x)


def guide(x):
    pyro.module("net", net)
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(net(x), 1.0).to_event(1))


@pytest.fixture
def called(monkeypatch):
    """The arguments that log1p and expm1 get in a process that has not called them yet."""
    found = []
    for name in ("log1p", "expm1"):
        original = getattr(torch, name)

        def noted(x, name=name, original=original):
            found.append((name, x.clone()))
            return original(x)

        monkeypatch.setattr(torch, name, noted)
    hardware._read_constants.cache_clear()
    yield found
    hardware._read_constants.cache_clear()


X = torch.ones(4, 2)
CALLS = {
    "fit": lambda: pv.fit(model, guide, X, epochs=1, progress=False),
    "evaluation": lambda: pv.elbo_terms(model, guide, X, num_samples=2, progress=False),
    "a loss for Pyro's SVI": lambda: Compiled(pyro.infer.Trace_ELBO()),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_they_are_read_once_with_all_special_arguments_in_each_vector(call, called):
    call()
    call()
    special = [(name, x) for name, x in called if len(x) >= 64 and x.isnan().any()]
    assert [name for name, _ in special] == ["log1p", "expm1"]
    for _, x in special:
        assert x.dtype == torch.float32 and x.device.type == "cpu"
        for lanes in x.split(16):  # the widest vector there is
            assert {-1.0, math.inf} <= set(lanes.tolist()) and lanes.isnan().any()
            assert (lanes[lanes == 0].signbit()).any() and (~lanes[lanes == 0].signbit()).any()


def test_a_process_that_is_forked_reads_them_itself(called, monkeypatch):
    """Pages of a library that a parent has read are not in a child's memory."""
    hardware.read_constants()
    hardware.read_constants()
    assert len(called) == 2
    monkeypatch.setattr(hardware.os, "getpid", lambda: -1)
    hardware.read_constants()
    assert len(called) == 4
