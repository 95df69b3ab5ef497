"""A fit goes on only under the constants that it had, wherever the programs read them from."""

import contextlib
import io
import os
import subprocess
import sys
import types
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_vae.inference.fingerprints import program_values
from pyro_vae.inference.training import fit

OPTIONS = {"epochs": 4, "batch_size": 5, "seed": 3, "progress": False, "learning_rate": 1e-2}
DATA = torch.randn(10, 2, generator=torch.Generator().manual_seed(0))
GLOBAL = 0.5
TOP = {"beta": 0.5}


class Weight:
    level = 0.5

    def __init__(self, value=0.5):
        self.value = value


class Stop(Exception):
    pass


def pair(weight):
    """A linear-Gaussian pair whose divergence has a weight that Python holds."""
    pyro.clear_param_store()

    def model(x):
        scale = pyro.param("scale", torch.tensor(1.0), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x)):
            with pyro.poutine.scale(scale=float(weight())):
                z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, scale).to_event(1), obs=x)

    def guide(x):
        loc = pyro.param("loc", torch.zeros(()))
        with pyro.plate("data", len(x)), pyro.poutine.scale(scale=float(weight())):
            pyro.sample("z", dist.Normal(x * loc, 0.7).to_event(1))

    return model, guide


def through(a):
    return lambda: a["deep"][1].value


def kinds():
    """Each a function that reads a weight of 0.5, and one that sets it."""
    held, listed, array, plain = {"kl": 0.5}, [0.1, 0.5], np.array([0.5, 1.0]), Weight()
    tensor, nested, slots = torch.tensor(0.5), {"deep": [0, Weight()]}, types.SimpleNamespace(kl=0.5)
    large = np.full(20_000, 0.5)

    def set_global(value):
        globals()["GLOBAL"] = value

    cell = 0.5

    def set_cell(value):
        nonlocal cell
        cell = value

    def default(value=0.5):
        return value

    return {
        "a dict": (lambda: held["kl"], lambda v: held.update(kl=v)),
        "a list": (lambda: listed[1], lambda v: listed.__setitem__(1, v)),
        "an array": (lambda: array[0], lambda v: array.__setitem__(0, v)),
        "a large array": (lambda: large[7], lambda v: large.__setitem__(7, v)),
        "a tensor": (lambda: tensor, lambda v: tensor.fill_(v)),
        "an attribute": (lambda: plain.value, lambda v: setattr(plain, "value", v)),
        "an attribute of a class": (lambda: Weight.level, lambda v: setattr(Weight, "level", v)),
        "a namespace": (lambda: slots.kl, lambda v: setattr(slots, "kl", v)),
        "a closure": (lambda: cell, set_cell),
        "a global": (lambda: GLOBAL, set_global),
        "two functions away": (through(nested), lambda v: setattr(nested["deep"][1], "value", v)),
        "a default": (default, lambda v: setattr(default, "__defaults__", (v,))),
    }


@pytest.mark.parametrize("kind", kinds())
def test_a_fit_does_not_go_on_under_another_constant(tmp_path, kind):
    path = tmp_path / "fit.safetensors"
    weight, put = kinds()[kind]
    try:
        fit(*pair(weight), DATA, checkpoint=path, **OPTIONS)
        end = pyro.param("loc").item()
        model, guide = pair(weight)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            fit(model, guide, DATA, checkpoint=path, **OPTIONS)  # the same goes on
        assert pyro.param("loc").item() == end
        put(0.75)
        with pytest.raises(ValueError, match="another fit: .*, which the programs read, was .* there and is .* now"):
            fit(*pair(weight), DATA, checkpoint=path, **OPTIONS)
        put(0.5)
        fit(*pair(weight), DATA, checkpoint=path, **OPTIONS)
    finally:
        put(0.5)


def test_what_a_schedule_of_ones_own_reads_is_compared_too(tmp_path):
    path, top = tmp_path / "fit.safetensors", {"beta": 0.5}
    for options in ({"beta": lambda done: top["beta"] * (0.5 + done / 2)}, {"beta": lambda done: TOP["beta"]}):
        fit(*pair(lambda: 1.0), DATA, checkpoint=path, **OPTIONS | options)
        top["beta"], TOP["beta"] = 1.0, 1.0
        with pytest.raises(ValueError, match=r"another fit: .*(top=|TOP\['beta'\])"):
            fit(*pair(lambda: 1.0), DATA, checkpoint=path, **OPTIONS | options)
        path.unlink()
        TOP["beta"] = 0.5


def test_code_two_functions_away_is_compared(tmp_path):
    path, space = tmp_path / "fit.safetensors", {}
    exec("def level():\n    return 0.5\ndef weight():\n    return level()", space)
    fit(*pair(space["weight"]), DATA, checkpoint=path, **OPTIONS)
    exec("def level():\n    return 0.25", space)
    with pytest.raises(ValueError, match="another fit: .*level"):
        fit(*pair(space["weight"]), DATA, checkpoint=path, **OPTIONS)


def reader(held):
    return lambda: held["kl"]


def broken_off(held, path):
    def callback(record):
        held["kl"] = (1 + record["epoch"]) / 8
        if record["epoch"] == 3:
            raise Stop

    with pytest.raises(Stop):
        fit(*pair(reader(held)), DATA, callback=callback, checkpoint=path, **OPTIONS)


def test_what_the_fit_moved_must_stand_where_it_stood(tmp_path):
    def advance(held):
        return lambda record: held.update(kl=(1 + record["epoch"]) / 8)

    whole = {"kl": 0.125}
    fit(*pair(reader(whole)), DATA, callback=advance(whole), **OPTIONS)
    end = pyro.param("loc").item(), pyro.param("scale").item()
    for kl, said in ((0.375, False), (0.125, True), (0.75, True)):  # where it stood after the second epoch; elsewhere
        path = tmp_path / f"{kl}.safetensors"
        broken_off({"kl": 0.125}, path)
        fresh = {"kl": kl}
        with warnings.catch_warnings(record=True) as met:
            warnings.simplefilter("always")
            fit(*pair(reader(fresh)), DATA, callback=advance(fresh), checkpoint=path, **OPTIONS)
        found = [str(w.message) for w in met if "does not stand where it stood" in str(w.message)]
        assert len(found) == said and all(f"was 0.375 and is {kl}" in text for text in found)
        assert ((pyro.param("loc").item(), pyro.param("scale").item()) == end) is not said


SCRIPT = """
import torch, pyro_vae as pv
from pyro_vae.inference.fingerprints import program_values
from tests.test_checkpoint_values import kinds, pair
from tests.pairs import small_pair
for read, _ in kinds().values():
    print(sorted(program_values(*pair(read)).items()))
vae = pv.VAE.build((1, 4, 4), latent_dim=2, hidden=(8,), posterior="iaf", prior="mixture")
print(sorted(program_values(vae.model, vae.guide).items()))
print(sorted(program_values(*small_pair()).items()))
"""


def test_the_places_are_called_alike_in_every_process():
    with contextlib.redirect_stdout(io.StringIO()) as here:  # of this process, and of one of another hash
        exec(SCRIPT, {"__name__": "here"})
    other = os.environ | {"PYTHONHASHSEED": "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"}
    run = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, env=other)
    assert run.returncode == 0, run.stderr
    found = [here.getvalue().splitlines(), run.stdout.splitlines()]
    assert len(found[0]) == len(kinds()) + 2 and all("model" in line and "guide" in line for line in found[0][:-2])
    assert all("out_features" in line for line in found[0][-2:])
    # Parameters have other values in another process, and are stored, not compared.
    assert found[0] == found[1]


def test_parameters_are_left_to_what_stores_them():
    loc = torch.nn.Parameter(torch.zeros(2))
    level = torch.ones(2)
    found = program_values(lambda x: x * loc * level, but=[loc])
    assert not any("loc" in name and "float32" in line for name, line in found.items())
    assert any("level" in name and line.startswith("float32 (2,)") for name, line in found.items())


def test_places_of_one_name_are_told_apart_by_a_number():
    spaces = [{}, {}]
    for space in spaces:
        exec("def level():\n    return 0.5", space)
    found = program_values(spaces[0]["level"], spaces[1]["level"])
    assert not any("'" in name for name in found) and any(name.endswith(" (2)") for name in found)


def frozen_pair(frozen):
    torch.manual_seed(0)
    pyro.clear_param_store()
    enc, dec = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    dec.requires_grad_(not frozen)

    def model(x):
        pyro.module("dec", dec)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(dec(z), 1.0).to_event(1), obs=x)

    def guide(x):
        pyro.module("enc", enc)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(enc(x), 0.7).to_event(1))

    return model, guide


@pytest.mark.parametrize("before", [False, True])
def test_a_fit_does_not_go_on_with_other_tensors_frozen(tmp_path, before):
    path = tmp_path / "fit.safetensors"
    fit(*frozen_pair(before), DATA, checkpoint=path, **OPTIONS)
    with pytest.raises(ValueError, match="the checkpoint of another fit: its list of frozen parameters is .*0.weight"):
        fit(*frozen_pair(not before), DATA, checkpoint=path, **OPTIONS)
    fit(*frozen_pair(before), DATA, checkpoint=path, **OPTIONS)
