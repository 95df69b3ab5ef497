"""Programs that are copied, unpickled or sent to another process have names, and tensors, of their own."""

import copy
import io
import pickle
import subprocess
import sys

import pyro
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.nn import PyroModule
from torch import nn

import pyro_vae as pv
from pyro_vae.programs.pair import Named
from pyro_vae.programs.semi_amortized import SemiAmortized
from pyro_vae.programs.zoo.hierarchical import Hierarchical
from tests.pairs import binary, small_pair


def through_torch(thing):
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


WAYS = {"pickle": lambda thing: pickle.loads(pickle.dumps(thing)), "torch": through_torch, "deepcopy": copy.deepcopy}


@pytest.fixture(params=WAYS)
def again(request):
    return WAYS[request.param]


@pytest.fixture(autouse=True)
def fresh_store():
    pyro.clear_param_store()
    yield
    pyro.clear_param_store()


def values(*programs):
    return [p.detach().clone() for program in programs for p in program.parameters()]


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("wrap", [lambda pair: pair, lambda pair: {"runs": [pair]}], ids=["alone", "in containers"])
def test_pyros_svi_trains_the_second_and_leaves_the_first(again, wrap):
    pair = small_pair()
    SVI(*pair, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO()).step(binary())
    second = again(wrap(pair))
    second = second if isinstance(second, tuple) else second["runs"][0]
    assert same(values(*pair), values(*second))
    before = values(*pair)
    SVI(*second, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO()).step(binary())
    assert same(before, values(*pair)) and not any(torch.equal(a, b) for a, b in zip(before, values(*second)))  # noqa: B905


ZOO = {
    "vae": lambda: pv.VAE.build((4,), latent_dim=2, hidden=(4,)),
    "vampprior": lambda: pv.VAE.build((4,), latent_dim=2, hidden=(4,), prior="vamp"),
    "hierarchical": lambda: Hierarchical.build((1, 4, 4), latent_dims=(3, 2), hidden=((4,), (4,))),
}


@pytest.mark.parametrize("kind", ZOO)
def test_every_program_has_a_name_that_no_other_has(again, kind):
    torch.manual_seed(0)
    first = ZOO[kind]()
    second, third = again([first, first])[0], again(first)
    names = [program._pyro_name for vae in (first, second, third) for program in (vae.model, vae.guide)]
    assert len(set(names)) == 6 and all(names)


def test_tensors_that_a_pair_shares_stay_shared(again):
    torch.manual_seed(0)
    vae = again(pv.VAE.build((4,), latent_dim=2, hidden=(4,), prior="vamp"))
    assert vae.model.prior.posterior is vae.guide.posterior
    model, guide = small_pair()
    refined = again((model, SemiAmortized(model, guide, num_steps=1)))
    assert refined[1].model is refined[0]
    assert refined[1].guide._pyro_name == f"{refined[1]._pyro_name}.guide"


class Layered(Named):
    """PyroModules three deep, which Pyro names after their parents."""

    def __init__(self):
        super().__init__()
        self.outer = PyroModule()
        self.outer.inner = PyroModule[nn.Linear](2, 2)

    def forward(self, x):
        return self.outer.inner(x)


def test_pyromodules_inside_are_named_after_the_copy(again):
    layered = Layered()
    layered(torch.zeros(1, 2))  # used, so that Pyro would not name its insides again
    other = again(layered)
    assert other.outer.inner._pyro_name == f"{other._pyro_name}.outer.inner" != layered.outer.inner._pyro_name
    before = layered.outer.inner.weight.detach().clone()
    other(torch.zeros(1, 2))
    assert not {id(p) for p in layered.parameters()} & {id(p) for p in other.parameters()}
    assert torch.equal(before, layered.outer.inner.weight)


def test_a_shallow_copy_shares_and_keeps_its_name():
    model, _ = small_pair()
    twin = copy.copy(model)
    assert twin._pyro_name == model._pyro_name and next(twin.parameters()) is next(model.parameters())


def test_a_pair_that_pyro_has_used_can_be_pickled(again):
    pair = small_pair()
    SVI(*pair, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO()).step(binary())
    _ = dict(pyro.get_param_store().items())  # hangs weakrefs on the parameters
    assert same(values(*again(pair)), values(*pair))


def test_a_file_in_a_process_that_has_built_another(tmp_path):
    torch.save(pv.VAE.build((4,), latent_dim=1, hidden=(4,)), tmp_path / "vae.pt")
    code = (
        "import sys, torch, pyro_vae as pv; old = torch.load(sys.argv[1], weights_only=False); "
        "new = pv.VAE.build((4,), latent_dim=1, hidden=(4,)); "
        "print(len({p._pyro_name for v in (old, new) for p in (v.model, v.guide)}))"
    )
    ran = subprocess.run([sys.executable, "-c", code, tmp_path / "vae.pt"], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "4"
