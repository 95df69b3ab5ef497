"""A seed for the data alone: fits that draw differently see the same batches, and go on to the bit."""

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_vae as pv
from pyro_vae.data import Split


class Seen:
    """A pair that keeps the batches that it sees, with so many draws of its own in each step."""

    def __init__(self, draws: int) -> None:
        self.draws, self.batches = draws, []

    def model(self, x: torch.Tensor) -> None:
        loc = pyro.param("loc", torch.zeros(()))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(loc, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0).expand([len(x)]), obs=x.flatten(1).sum(1))

    def guide(self, x: torch.Tensor) -> None:
        self.batches.append(x.clone())
        torch.rand(self.draws)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(pyro.param("m", torch.zeros(())), 1.0))


def seen(draws: int, data, **options) -> torch.Tensor:
    pair = Seen(draws)
    pv.fit(pair.model, pair.guide, data, epochs=2, batch_size=16, compile=False, progress=False, **options)
    return torch.cat([x.flatten(1) for x in pair.batches[-2 * 4 :]])


GREY = torch.randint(0, 256, (64, 1, 2, 2), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
LOADER = torch.utils.data.TensorDataset(torch.arange(64.0)[:, None])


@pytest.mark.parametrize(
    "data", [torch.arange(64.0)[:, None], Split(GREY, binarization="dynamic")], ids=["order", "draws"]
)
def test_one_data_seed_is_the_same_batches_whatever_the_programs_draw(data) -> None:
    one, other = seen(1, data, seed=0, data_seed=5), seen(3, data, seed=1, data_seed=5)
    assert torch.equal(one, other)
    assert not torch.equal(one[:64], one[64:])  # another order and another draw in the second pass
    assert not torch.equal(one, seen(1, data, seed=0, data_seed=6))
    assert not torch.equal(seen(1, data, seed=0), seen(3, data, seed=0))  # which is why it is there


def test_a_loader_draws_from_it_too() -> None:
    def batches(draws: int) -> torch.Tensor:
        loader = torch.utils.data.DataLoader(LOADER, 16, shuffle=True)
        return seen(draws, loader, seed=0, data_seed=1)

    assert torch.equal(batches(1), batches(4))


def test_the_noise_of_the_programs_is_that_of_seed_alone() -> None:
    """The random state outside is where it would be without the data's draws."""

    def noise(data_seed: int) -> float:
        vae = pv.VAE.build((4,), latent_dim=1, hidden=(4,), likelihood="normal")
        torch.manual_seed(0)
        for parameter in vae.parameters():
            torch.nn.init.constant_(parameter, 0.1)
        x = torch.ones(32, 4)  # whose order does not matter
        return pv.fit(vae, x, epochs=1, seed=3, data_seed=data_seed, progress=False).records[0]["loss"]

    assert noise(1) == noise(2)


@pytest.mark.parametrize("compile", [False, True])
def test_captured_and_eager_steps_see_the_same(compile) -> None:
    torch.manual_seed(0)
    vae = pv.VAE.build((1, 2, 2), latent_dim=1, hidden=(4,))
    data = Split(GREY, binarization="dynamic")
    history = pv.fit(vae, data, epochs=3, batch_size=16, seed=0, data_seed=5, compile=compile, progress=False)
    torch.manual_seed(0)
    other = pv.VAE.build((1, 2, 2), latent_dim=1, hidden=(4,))
    again = pv.fit(other, data, epochs=3, batch_size=16, seed=0, data_seed=5, compile=False, progress=False)
    assert history["loss"] == pytest.approx(again["loss"], rel=1e-5)


def test_a_fit_that_goes_on_sees_what_the_whole_one_saw(tmp_path) -> None:
    class Stop(Exception):
        pass

    def fitted(epochs_before: int | None) -> dict:
        torch.manual_seed(0)
        vae = pv.VAE.build((1, 2, 2), latent_dim=1, hidden=(4,))
        place = tmp_path / f"{epochs_before}.safetensors"

        def stop(record: dict) -> None:
            if record["epoch"] == epochs_before:
                raise KeyboardInterrupt

        options = {"epochs": 4, "batch_size": 16, "seed": 0, "data_seed": 5, "checkpoint": place, "progress": False}
        pv.fit(vae, Split(GREY, binarization="dynamic"), callback=stop, **options)
        if epochs_before is not None:
            pv.fit(vae, Split(GREY, binarization="dynamic"), **options)
        return vae.state_dict()

    whole, resumed = fitted(None), fitted(2)
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


def test_another_data_seed_does_not_go_on(tmp_path) -> None:
    vae = pv.VAE.build((1, 2, 2), latent_dim=1, hidden=(4,))
    options = {"batch_size": 16, "checkpoint": tmp_path / "c.safetensors", "progress": False}
    pv.fit(vae, Split(GREY, binarization="dynamic"), epochs=2, data_seed=1, **options)
    with pytest.raises(ValueError, match="data_seed"):
        pv.fit(vae, Split(GREY, binarization="dynamic"), epochs=2, data_seed=2, **options)
    with pytest.raises(ValueError, match="data_seed"):
        pv.fit(vae, Split(GREY, binarization="dynamic"), epochs=2, data_seed=-1, progress=False)
