"""A fit that was broken off ends in the same weights, to the bit."""

import copy

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pyro_vae.data.splits import Split
from pyro_vae.inference.bounds import elbo, iwae, renyi
from pyro_vae.inference.fingerprints import fingerprint
from pyro_vae.inference.objectives import Objective
from pyro_vae.inference.regularizers import mmd
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


@pytest.mark.filterwarnings("ignore:learning_rate=0.01, schedule=one-cycle has no effect")  # as in the last of the fits
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


def half(done):
    return 0.5 if done < 0.5 else 1.0


CHANGES = {
    "loss": [{"loss": pyro.infer.RenyiELBO(alpha=0.5, num_particles=2)}, {"loss": pyro.infer.Trace_ELBO(2)}],
    "loss ": [{"loss": Objective(iwae, 2)}, {"loss": Objective(iwae, 2, estimator="doubly-reparameterized")}],
    "loss  ": [{"loss": Objective(renyi(0.5), 2)}, {"loss": Objective(renyi(0.3), 2)}],
    "loss   ": [{"loss": Objective(regularizers=[mmd(1.0)])}, {"loss": Objective(regularizers=[mmd(2.0)])}],
    "loss    ": [{"loss": Objective(beta=2.0)}, {"loss": Objective(beta=3.0)}],
    "learning_rate": [{"learning_rate": 0.01}, {"learning_rate": 0.02}],
    "schedule": [{"schedule": "cosine"}, {"schedule": "one-cycle"}],
    "schedule ": [{"schedule": half}, {"schedule": lambda done: 0.5}],
    "seed": [{"seed": 1}, {"seed": None}],
    "clip_norm": [{"clip_norm": 1.0}, {"clip_norm": None}],
    "optimizer": [{"optimizer": torch.optim.SGD}, {"optimizer": torch.optim.Adagrad}],
    "matmul_precision": [{"matmul_precision": "highest"}, {"matmul_precision": "medium"}],
    "kl_warmup": [{"kl_warmup": 1}, {"kl_warmup": 2}],
    "kl_warmup_steps": [{"kl_warmup_steps": 3}, {"kl_warmup_steps": 4}],
    "beta": [{"beta": 0.5}, {"beta": half}],
    "validation": [{"validation": binary(4, seed=1)}, {"validation": binary(4, seed=2)}],
    "validation_bound": [
        {"validation": binary(4), "validation_bound": elbo}, {"validation": binary(4), "validation_bound": renyi(0.5)},
    ],
    "patience": [{"validation": binary(4), "patience": 5}, {"validation": binary(4), "patience": 6}],
    "batch_size": [{"batch_size": 5}, {"batch_size": 6}],
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_what_shapes_the_result_must_be_the_same_and_is_named(tmp_path, name):
    path = tmp_path / "fit.safetensors"
    before, after = CHANGES[name]
    pair = small_pair()
    fit(*pair, binary(), checkpoint=path, **OPTIONS | {"epochs": 3} | before)
    ours = weights(pair)
    fit(*small_pair(seed=5), binary(), checkpoint=path, **OPTIONS | {"epochs": 3} | before)  # the same goes on
    with pytest.raises(ValueError, match=rf"another fit: its {name.strip()} is .+, this one's .+. Remove it"):
        fit(*pair, binary(), checkpoint=path, **OPTIONS | {"epochs": 3} | after)
    assert all(torch.equal(a, b) for a, b in zip(ours, weights(pair), strict=True))


def levels(noise, **options):
    pixels = torch.randint(256, (12, 1, 4, 4), generator=torch.Generator().manual_seed(noise), dtype=torch.uint8)
    return Split(pixels, **options)


@pytest.mark.parametrize(
    "one, other",
    [
        (binary(), binary(seed=1)),
        (binary(), torch.cat([binary()[:-1], 1 - binary()[-1:]])),
        (binary(), binary(24)[:11]),
        (levels(0, binarization="dynamic"), levels(1, binarization="dynamic")),
        (levels(0, binarization="dynamic"), levels(0, binarization="threshold")),
        (levels(0, binarization="static", seed=1), levels(0, binarization="static", seed=2)),
        (list(binary().split(4)), list(binary().split(3))),
        (list(binary().split(4)), list(binary(seed=1).split(4))),
    ],
    ids=["values", "one row", "length", "pixels", "binarisation", "its seed", "batches", "values of batches"],
)
def test_other_data_are_not_gone_on_with(tmp_path, one, other):
    path = tmp_path / "fit.safetensors"
    fit(*small_pair(), one, checkpoint=path, **OPTIONS | {"epochs": 2})
    fit(*small_pair(), copy.deepcopy(one), checkpoint=path, **OPTIONS | {"epochs": 2})
    with pytest.raises(ValueError, match="another fit: its data is .+, this one's .+"):
        fit(*small_pair(), other, checkpoint=path, **OPTIONS | {"epochs": 2})


def test_an_instance_and_another_program_are_told_apart(tmp_path):
    path = tmp_path / "fit.safetensors"

    def run(rate=0.01, second=0.1, pair=None):
        model, guide = pair or small_pair()
        groups = [{"params": model.parameters()}, {"params": guide.parameters(), "lr": second}]
        options = {key: value for key, value in OPTIONS.items() if key != "learning_rate"} | {"epochs": 2}
        fit(model, guide, binary(), checkpoint=path, optimizer=torch.optim.SGD(groups, rate / 100), **options)

    run()
    run()
    with pytest.raises(ValueError, match="its optimizer is"):
        run(second=0.2)
    model, guide = small_pair()
    model.likelihood.decoder.layers = nn.Sequential(*model.likelihood.decoder.layers, nn.Identity())
    with pytest.raises(ValueError, match="its model is"):
        run(pair=(model, guide))


def test_a_fingerprint_is_of_the_content(tmp_path):
    import numpy as np

    big = torch.zeros(30_000_000)
    array = np.arange(12.0).reshape(3, 4)
    np.save(tmp_path / "x.npy", array)
    assert fingerprint(array) == fingerprint(np.asfortranarray(array))
    assert fingerprint(np.load(tmp_path / "x.npy", mmap_mode="r")) == fingerprint(array) != fingerprint(array + 1)
    assert fingerprint(big) == fingerprint(big.clone()) != fingerprint(big + 1)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.arange(6)), 2)
    other = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.arange(1, 7)), 2)
    assert fingerprint(loader) != fingerprint(other)
    subset = torch.utils.data.Subset(loader.dataset, [0, 2])
    assert fingerprint(subset) != fingerprint(torch.utils.data.Subset(loader.dataset, [0, 3]))
    masked = np.ma.masked_array(array, array > 3)
    assert fingerprint(masked) != fingerprint(np.ma.masked_array(array, array > 4))
    assert fingerprint(lambda done: done) != fingerprint(lambda done: 2 * done)
    rates = [(lambda done, top=top: top * done) for top in (1, 2)]
    assert fingerprint(rates[0]) != fingerprint(rates[1])


@pytest.mark.filterwarnings("ignore:Using `torch.compile.module.` when there are global hooks")  # those of fit
def test_a_fit_under_torch_compile_goes_on_without_it(tmp_path):
    path, pair = tmp_path / "fit.safetensors", small_pair()
    pair[0].likelihood.decoder = torch.compile(pair[0].likelihood.decoder, backend="eager")
    broken_off(pair, path, 4)
    whole, resumed = small_pair(), small_pair(seed=9)
    fit(*whole, binary(), **OPTIONS)
    fit(*resumed, binary(), checkpoint=path, **OPTIONS)
    assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(resumed), strict=True))


def test_a_damaged_checkpoint_gives_way_to_the_one_before_it(tmp_path):
    whole = small_pair()
    fit(*whole, binary(), **OPTIONS)

    def at(name):
        path = tmp_path / f"{name}.safetensors"
        broken_off(small_pair(), path, 4)
        return path, path.with_name(f"{name}.previous.safetensors")

    for damage in ("flipped", "cut", "empty", "text"):
        path, _ = at(damage)
        content = path.read_bytes()
        middle = len(content) - 9
        path.write_bytes({
            "flipped": content[:middle] + bytes([content[middle] ^ 4]) + content[middle + 1 :],
            "cut": content[: len(content) // 2], "empty": b"", "text": b"not at all",
        }[damage])  # fmt: skip
        fresh = small_pair(seed=9)
        with pytest.warns(UserWarning, match="goes on from the one before"):
            fit(*fresh, binary(), checkpoint=path, **OPTIONS)
        assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(fresh), strict=True))
    # With both damaged nothing is done and nothing destroyed.
    both = at("both")
    for path in both:
        path.write_bytes(path.read_bytes()[:-1])
    before = [path.read_bytes() for path in both]
    with pytest.raises(ValueError, match="not a readable checkpoint .* Remove it"):
        fit(*small_pair(), binary(), checkpoint=both[0], **OPTIONS)
    assert before == [path.read_bytes() for path in both]
