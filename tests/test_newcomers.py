"""What one gets wrong in the first hour: each message says what to do, and none is a dump of a library's."""

import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_vae as pv
from pyro_vae.app.cli import main


def vae(shape=(1, 8, 8), **options):
    return pv.VAE.build(shape, latent_dim=2, hidden=(8,), **options)


def binary(*shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0)).round()


@pytest.mark.parametrize(
    "shape, data, remedy",
    [
        ((1, 8, 8), binary(20, 8, 8), r"Reshape the data: x\.reshape\(-1, 1, 8, 8\)\."),
        ((1, 8, 8), binary(20, 64).numpy(), r"Reshape the data: x\.reshape\(-1, 1, 8, 8\)\."),
        ((3, 8, 8), np.asarray(binary(20, 8, 8, 3)), r"Put the channels first: x\.permute\(0, 3, 1, 2\)"),
        ((1, 8, 8), binary(20, 1, 9, 9), r"Build the network for such data, of shape \(1, 9, 9\) each"),
        ((4,), binary(20, 5), r"Build the network for such data, of shape \(5,\) each"),
    ],
)
@pytest.mark.parametrize("what", [pv.fit, pv.elbo_terms])
def test_data_of_another_shape_are_told_how_to_be_reshaped(what, shape, data, remedy):
    more = {"epochs": 1} if what is pv.fit else {}
    with pytest.raises(ValueError, match=rf"got shape .*, wanted \(\.\.\., .*\)\. {remedy}") as met:
        what(vae(shape, likelihood="normal", standardize=False) if len(shape) == 1 else vae(shape), data, **more)
    assert "Trace Shapes" not in str(met.value)


def test_what_is_advised_works():
    pv.fit(vae((3, 8, 8)), np.asarray(binary(20, 8, 8, 3)).transpose(0, 3, 1, 2), epochs=1)
    pv.fit(vae(), binary(20, 8, 8).reshape(-1, 1, 8, 8), epochs=1)


def test_a_dataset_and_its_name_are_no_data():
    digits = pv.load("digits")
    with pytest.raises(ValueError, match=r"got data of type Dataset, .*data\.train to fit, data\.test to judge"):
        pv.fit(vae(), digits, epochs=1)
    with pytest.raises(ValueError, match=r"got data of type str, .*pv\.load\('digits'\), whose part \.train"):
        pv.fit(vae(), "digits", epochs=1)


@pytest.mark.parametrize("given", [lambda x: (x, vae()), lambda x: (vae().model, x), lambda x: (pv.VAE, x)])
def test_the_order_of_arguments_is_said(given):
    with pytest.raises(ValueError, match=r"The order is \(model, guide, data\), or \(vae, data\)"):
        pv.fit(*given(binary(20, 1, 8, 8)), epochs=1)


@pytest.mark.parametrize("got, meant", [("lr", "learning_rate"), ("num_epochs", "epochs"), ("optim", "optimizer")])
def test_what_other_packages_call_an_option_is_understood(got, meant):
    with pytest.raises(TypeError, match=rf"unexpected keyword argument '{got}'\. Did you mean '{meant}'"):
        pv.fit(vae(), binary(20, 1, 8, 8), **{got: 1})
    with pytest.raises(ValueError, match="unknown option 'z_dim'.* Did you mean 'latent_dim'"):
        pv.VAE.build((1, 8, 8), z_dim=2)


class Own(nn.Module):
    """A pair as one writes the first one; `registered` are the networks that Pyro is told of."""

    def __init__(self, *registered, event=1, positive=True):
        super().__init__()
        torch.manual_seed(0)
        self.encoder, self.decoder = nn.Linear(8, 4), nn.Linear(2, 8)
        self.registered, self.event, self.positive = registered, event, positive

    def model(self, x):
        if "decoder" in self.registered:
            pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(z)).to_event(self.event), obs=x)

    def guide(self, x):
        if "encoder" in self.registered:
            pyro.module("encoder", self.encoder)
        loc, scale = self.encoder(x).chunk(2, -1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, scale.exp() if self.positive else scale).to_event(1))


@pytest.mark.parametrize("registered, stray", [("encoder", "decoder"), ("decoder", "encoder")])
@pytest.mark.parametrize("times", [1, 2])
def test_a_network_that_is_not_registered_is_said_to_stand_still(registered, stray, times):
    own, x = Own(registered), binary(50, 8)
    before = {name: value.clone() for name, value in own.state_dict().items()}
    for _ in range(times):  # a gradient of the fit before is not taken for one of this
        with pytest.warns(UserWarning, match=r"a Linear with parameters .* is not trained.*pyro\.module") as said:
            pv.fit(own.model, own.guide, x, epochs=2, batch_size=10)
        assert len(said) == 1
    moved = {name.split(".")[0] for name, value in own.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {registered} and stray not in moved


def test_what_is_trained_or_was_said_to_stay_is_not_spoken_of():
    x = binary(50, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        own = Own("encoder", "decoder")
        pv.fit(own.model, own.guide, x, epochs=2)
        own = Own("encoder")
        own.decoder.requires_grad_(False)
        pv.fit(own.model, own.guide, x, epochs=2)
        own = Own("encoder")
        pv.fit_guide(own.model, own.guide, x, epochs=2)
        small = vae()
        pv.fit(small, binary(50, 1, 8, 8), epochs=1)
        pv.fit(small.model, pv.SemiAmortized(small.model, small.guide), binary(50, 1, 8, 8), epochs=1)


def test_a_forgotten_event_and_a_scale_below_zero():
    with pytest.raises(ValueError, match=r"at site x .*Did you forget \.to_event\(1\)\?"):
        pv.fit(Own("encoder", "decoder", event=0).model, Own("encoder", "decoder").guide, binary(50, 8), epochs=1)
    own = Own("encoder", "decoder", positive=False)
    with pytest.raises(ValueError, match=r"site 'z' \(Normal\) has scale = -.*take exp\(\) of it, or softplus\(\)"):
        pv.fit(own.model, own.guide, binary(50, 8), epochs=1)


@pytest.mark.parametrize(
    "argv, said",
    [
        (["fit", "--lr", "0.1"], "no such option '--lr'. Did you mean '--learning-rate'? Try 'pyro-vae fit --help'."),
        (["fit", "--epoch", "3"], "no such option '--epoch'. Did you mean '--epochs'? Try 'pyro-vae fit --help'."),
        (["fit", "-e", "3"], "no such option '-e'. Try 'pyro-vae fit --help'."),
        (["fit", "digits"], "got unexpected extra argument (digits): each option has its name. Data are named by "
                            "--data, the run's folder by --out. Try 'pyro-vae fit --help'."),
        (["judge"], "missing argument 'RUN', a run folder: 'pyro-vae runs' lists those in runs. Try 'pyro-vae judge "
                    "--help'."),
    ],
)  # fmt: skip
def test_the_command_says_what_to_type_instead(argv, said, capsys):
    assert main(argv) == 2
    assert capsys.readouterr().err == f"pyro-vae: error: {said}\n"


def test_the_folder_of_runs_is_no_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "config.json").write_text("{}")
    assert main(["judge", "runs"]) == 2
    assert "It holds runs: name one of them, such as runs/a." in capsys.readouterr().err
    assert main(["judge", "runs/a"]) == 2
    assert "It holds runs" not in capsys.readouterr().err
