"""Random states are put back on all devices, and without a warning where there are several."""

import re
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_vae as pv
from pyro_vae.inference import capture
from pyro_vae.inference.batches import seeded
from pyro_vae.randomness import forked, noise_kept

PACKAGE = Path(pv.__file__).parent


@pytest.fixture
def two_gpus(monkeypatch):
    """The random states of two GPUs that are not there, which `torch.manual_seed` does not reach."""
    states = [torch.tensor([1]), torch.tensor([2])]
    monkeypatch.setattr(torch.random, "_fork_rng_warned_already", False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: states[device].clone())
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: states[device].copy_(state))
    return states


def model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def guide(x):
    loc = pyro.param("loc", torch.zeros(()))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(loc, 0.7))


def test_torch_itself_warns_of_several_gpus(two_gpus):
    with pytest.warns(UserWarning, match="2 available devices"), torch.random.fork_rng():
        pass


@pytest.mark.parametrize("keep", [forked, noise_kept, lambda: seeded(3)])
def test_the_states_of_all_gpus_are_put_back_without_a_warning(two_gpus, keep):
    cpu = torch.get_rng_state()
    with keep():
        torch.manual_seed(7)
        for state in two_gpus:
            state.add_(5)
    assert torch.equal(torch.get_rng_state(), cpu)
    assert [state.item() for state in two_gpus] == [1, 2]


def test_of_named_gpus_those_alone_are_put_back(two_gpus):
    with forked([1]):
        for state in two_gpus:
            state.add_(5)
    assert [state.item() for state in two_gpus] == [6, 2]


def test_fits_and_estimates_do_not_warn_of_several_gpus(two_gpus, tmp_path):
    x = torch.linspace(-1, 1, 8)
    pv.fit(model, guide, x, epochs=6, batch_size=8, seed=0, compile=True, progress=False,
           checkpoint=tmp_path / "fit.safetensors")  # fmt: skip
    pv.log_likelihood(model, guide, x, num_samples=60, progress=False)
    pv.elbo_terms(model, guide, x, num_samples=5, progress=False)


def test_draws_inside_a_fork_are_noted_in_a_capture():
    """What is drawn in a fork does not move the stream of noise, in a replay as in the program."""

    def function(x):
        with forked():
            torch.rand(3)
        return [x + torch.rand(3)]

    torch.manual_seed(0)
    graph = capture.Capture(function, [torch.zeros(3)])
    assert len(graph.draws) == 1
    torch.manual_seed(0)
    (wanted,) = function(torch.zeros(3))
    torch.manual_seed(0)
    (found,) = graph([torch.zeros(3)])
    assert torch.equal(found, wanted)


def test_nobody_else_forks():
    """One place knows which devices there are; a capture replaces torch's function to note what is inside."""
    calls = [
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        if re.search(r"(?<!`)fork_rng\(", path.read_text(encoding="utf-8"))
    ]
    assert calls == ["randomness.py"]
