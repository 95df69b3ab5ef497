"""A fit that was broken off ends in the same weights, to the bit."""

import copy

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pyro_vae.inference.objectives import Objective
from pyro_vae.inference.training import fit
from tests.pairs import binary, small_pair

OPTIONS = {"epochs": 6, "batch_size": 5, "seed": 3, "progress": False, "schedule": "one-cycle", "learning_rate": 1e-2}


class Stop(Exception):
    pass


def broken_off(pair, path, after, **options):
    def callback(record):
        if record["epoch"] == after:
            raise Stop

    with pytest.raises(Stop):
        fit(*pair, binary(), callback=callback, checkpoint=path, **OPTIONS | options)


def weights(pair):
    return [p.detach().clone() for program in pair for p in program.parameters()]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"loss": Objective(num_samples=3), "kl_warmup": 3, "clip_norm": 1.0},
        {"optimizer": torch.optim.RMSprop},
        {"validation": binary(4, seed=1), "patience": 6},
    ],
)
def test_a_broken_fit_goes_on_to_the_bit(tmp_path, options):
    whole, part = small_pair(), small_pair()
    history = fit(*whole, binary(), **OPTIONS | options)
    path = tmp_path / "fit.safetensors"
    broken_off(part, path, 4, **options)  # the fourth epoch was not written
    fresh = small_pair(seed=9)  # another process would have other weights
    resumed = fit(*fresh, binary(), checkpoint=path, **OPTIONS | options)
    assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(fresh), strict=True))
    assert resumed["loss"] == history["loss"] and len(resumed) == 6 and resumed.best_epoch == history.best_epoch
    assert not any(torch.equal(a, b) for a, b in zip(weights(part), weights(fresh), strict=True) if a.dim() > 1)


def test_a_finished_fit_is_not_done_again(tmp_path):
    path, pair = tmp_path / "fit.safetensors", small_pair()
    fit(*pair, binary(), checkpoint=path, **OPTIONS)
    again, called = small_pair(seed=5), []
    history = fit(*again, binary(), checkpoint=path, callback=called.append, **OPTIONS)
    assert called == [] and len(history) == 6
    assert all(torch.equal(a, b) for a, b in zip(weights(pair), weights(again), strict=True))
    assert [file.name for file in tmp_path.iterdir()] == ["fit.safetensors"]


def test_early_stopping_is_remembered(tmp_path):
    path, x = tmp_path / "fit.safetensors", binary(4, seed=1)
    options = OPTIONS | {"validation": x, "patience": 1, "learning_rate": 0.5, "schedule": "constant"}
    pair = small_pair()
    history = fit(*pair, binary(), checkpoint=path, **options)
    assert history.stopped_early and len(history) < 6
    again = small_pair(seed=5)
    resumed = fit(*again, binary(), checkpoint=path, **options)
    assert resumed.stopped_early and len(resumed) == len(history) and resumed.best_epoch == history.best_epoch
    assert all(torch.equal(a, b) for a, b in zip(weights(pair), weights(again), strict=True))


def test_parameters_of_plain_functions_go_on_too(tmp_path):
    net = nn.Linear(2, 2)

    def model(x):
        scale = pyro.param("scale", torch.tensor(1.0), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, scale).to_event(1), obs=x)

    def guide(x):
        pyro.module("net", net)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(net(x), 0.5).to_event(1))

    x = torch.randn(20, 2, generator=torch.Generator().manual_seed(0))
    start, path, ends = copy.deepcopy(net.state_dict()), tmp_path / "fit.safetensors", []
    for stop in (None, 3, None):
        if stop is None and ends or stop:
            where = {"checkpoint": path}
        else:
            where = {}
        pyro.clear_param_store()
        net.load_state_dict(start)

        def callback(record, stop=stop):
            if record["epoch"] == stop:
                raise Stop

        try:
            fit(model, guide, x, callback=callback, **where, **OPTIONS)
            ends.append((net.weight.detach().clone(), pyro.param("scale").item()))
        except Stop:
            pass
    assert len(ends) == 2 and torch.equal(ends[0][0], ends[1][0]) and ends[0][1] == ends[1][1] != 1.0


def test_what_is_no_checkpoint_of_this_fit_is_named(tmp_path):
    path = tmp_path / "fit.safetensors"
    fit(*small_pair(), binary(), checkpoint=path, **OPTIONS)
    with pytest.raises(ValueError, match="another fit: its epochs is 6, this one's 7"):
        fit(*small_pair(), binary(), checkpoint=path, **OPTIONS | {"epochs": 7})
    pair = small_pair(hidden=7)
    before = weights(pair)
    with pytest.raises(ValueError, match="another pair: .* differs"):
        fit(*pair, binary(), checkpoint=path, **OPTIONS)
    assert all(torch.equal(a, b) for a, b in zip(before, weights(pair), strict=True))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="not a readable checkpoint"):
        fit(*small_pair(), binary(), checkpoint=path, **OPTIONS)
    with pytest.raises(ValueError, match="wanted NAME.safetensors in a folder that exists"):
        fit(*small_pair(), binary(), checkpoint=tmp_path / "no" / "a.safetensors", **OPTIONS)
    with pytest.raises(ValueError, match="not a PyroOptim"):
        fit(*small_pair(), binary(), checkpoint=path, **OPTIONS | {"optimizer": pyro.optim.Adam({"lr": 1e-3})})
