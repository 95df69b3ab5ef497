"""Estimates and diagnostics that several processes share: the numbers of one process, in its order, on all of them."""

import dataclasses
import sys
import tempfile
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.distributed as group
import torch.multiprocessing as processes
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import pyro_vae as pv
from pyro_vae.inference import replays
from pyro_vae.inference.ranks import alone
from pyro_vae.judging import sharing
from pyro_vae.judging.latents import posterior_means
from pyro_vae.judging.sweeps import sweep

ROWS = torch.randn(23, 3, generator=torch.Generator().manual_seed(3))
QUICK = {"progress": False}


def pair(dtype=torch.float32, latent=2):
    """A small pair on three numbers."""
    torch.manual_seed(0)
    decoder = nn.Sequential(nn.Linear(latent, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)
    encoder = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, latent)).to(dtype)

    def model(x):
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(latent), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), 1.0).to_event(1), obs=x)

    def guide(x):
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(encoder(x), 0.8).to_event(1))

    return model, guide


def batches(count, dtype=torch.float32):
    """So many batches of which the last is smaller; of one, a tensor."""
    found = [rows.to(dtype) for rows in ROWS[: 5 * count - 2].split(5)]
    return found if count > 1 else found[0]


def wide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x[:, :2] / 2, 1.2).to_event(1))


def distances(model, guide, data):
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # chains this short have not converged
        found = pv.reference(model, guide, data, num_samples=8, num_chains=4, num_warmup=20, **QUICK)
    return found, pv.guide_distances(model, guide, data, reference=found, num_directions=5, **QUICK)


def captured(model, guide, data):
    """In graphs, of which each process has its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(replays, "_CAPTURE_PAYS", 0)
        return pv.elbo_terms(model, guide, data, num_samples=10, **QUICK)


def unseeded(model, guide, data):
    torch.manual_seed(7)
    values = [pv.elbo_terms(model, guide, data, num_samples=10, seed=None, **QUICK).value for _ in range(2)]
    return *values, torch.rand(3).tolist()


ANNEAL = {"num_samples": 3, "num_steps": 3, "num_leapfrog": 1, **QUICK}
CALLS = {
    "elbo_terms": lambda m, g, x: pv.elbo_terms(m, g, x, num_samples=10, **QUICK),
    "captured": captured,
    "rate_distortion": lambda m, g, x: pv.rate_distortion(m, g, x, num_samples=10, **QUICK),
    "log_likelihood": lambda m, g, x: pv.log_likelihood(m, g, x, num_samples=100, method="importance", **QUICK),
    "quadrature": lambda m, g, x: pv.quadrature(m, g, x, **QUICK),
    "by quadrature": lambda m, g, x: pv.log_likelihood(m, g, x, method="quadrature", **QUICK),
    "lower bound": lambda m, g, x: pv.log_likelihood(m, lambda x: wide(10 * x), x, num_samples=300, **QUICK),
    "ais": lambda m, g, x: pv.ais(m, g, x, **ANNEAL),
    "bdmc": lambda m, g, x: pv.bdmc(m, g, x, num_data=30, **ANNEAL),
    "gaps": lambda m, g, x: pv.gaps(m, g, x, families={"full": pv.posteriors.FullNormal}, num_samples=50, num_steps=8,
                                    window=3, **QUICK),
    "compare_guides": lambda m, g, x: pv.compare_guides(m, {"own": g, "wide": wide}, x, bounds={"iwae": (2, 5)},
                                                        num_samples=50, **QUICK),
    "sbc": lambda m, g, x: pv.sbc(m, g, x, num_samples=9, num_data=30, **QUICK),
    "mutual_information": lambda m, g, x: pv.mutual_information(m, g, x, num_samples=2, **QUICK),
    "kl_per_dimension": lambda m, g, x: pv.kl_per_dimension(m, g, x, **QUICK),
    "collapse": lambda m, g, x: pv.collapse(m, g, x, num_samples=8, **QUICK),
    "active_units": lambda m, g, x: pv.active_units(g, x, **QUICK),
    "posterior_means": lambda m, g, x: posterior_means(g, x, **QUICK),
    "distances": distances,
    "regret": lambda m, g, x: pv.anomaly_scores(m, g, x, score="regret", num_steps=4, num_samples=5, **QUICK),
    "reconstruction": lambda m, g, x: pv.anomaly_scores(m, g, x, score="reconstruction", num_samples=5, **QUICK),
    "identity": lambda m, g, x: pv.identity(m, g, x, num_samples=20, **QUICK),
}  # fmt: skip


def flat(found):
    """All numbers of a result."""
    if isinstance(found, torch.Tensor):
        return [found.double().flatten()]
    if isinstance(found, bool | int | float):
        return [torch.tensor([float(found)], dtype=torch.float64)]
    if dataclasses.is_dataclass(found):
        return flat([getattr(found, field.name) for field in dataclasses.fields(found)])
    if isinstance(found, dict):
        return flat(list(found.values()))
    return [part for each in found for part in flat(each)] if isinstance(found, list | tuple) else []


def computed(count, dtype, names=CALLS):
    model, guide = pair(dtype)
    return {name: torch.cat(flat(CALLS[name](model, guide, batches(count, dtype)))) for name in names}


CASES = {5: torch.float32, 1: torch.float64}


def message(function):
    try:
        function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def share(rank, size, folder):
    """One of several processes in a group, which ends whatever comes."""
    torch.set_num_threads(1)
    group.init_process_group("gloo", init_method=f"file://{folder}/meet-{size}", rank=rank, world_size=size)
    try:
        found = asked(rank, size)
    finally:
        group.destroy_process_group()
    torch.save(found, f"{folder}/{size}-{rank}.pt")


def asked(rank, size):
    """All that several processes are asked for."""
    found = {count: computed(count, dtype) for count, dtype in CASES.items()}
    model, guide = pair()
    data = batches(5)

    # Each process runs its own batches only.
    seen = []

    def watched(x):
        seen.append(x[0, 0].item())
        return guide(x)

    def ran():
        with sweep(watched, data=data, seed=0, progress=False) as run:
            seen.clear()
            return run.each(lambda batch: (run.number, watched(*batch), len(seen)))

    numbers = [number for number, _, _ in ran()]
    found["shares"] = numbers, list(seen), [data[i][0, 0].item() for i in range(rank, 5, size)]

    # Tensors, of which a batch is read by its rows; a loader that is the same everywhere; data that come once.
    many = torch.randn(450, 3, generator=torch.Generator().manual_seed(5))
    options = {"num_samples": 5, **QUICK}
    found["tensor"] = pv.elbo_terms(model, guide, many, **options).pointwise
    torch.manual_seed(rank)
    loader = DataLoader(TensorDataset(ROWS), 5, shuffle=True)
    found["shuffled"] = pv.elbo_terms(model, guide, loader, **options).value
    with alone():
        found["alone"] = pv.elbo_terms(model, guide, many[rank:], **options).value

    # A failure in one of them ends all, and the next call works.
    def failing(x):
        if bool((x[0] == ROWS[5 * size - 5]).all()):  # its own first batch
            raise RuntimeError("the last process cannot go on")
        return guide(x)

    found["unseeded"] = unseeded(model, guide, data)
    found["failed"] = message(lambda: pv.elbo_terms(model, failing, data, **options))
    found["all failed"] = message(lambda: pv.elbo_terms(model, lambda x: wide(x * torch.nan), data, **options))

    def after():
        with sweep(guide, data=data, seed=0, progress=False) as run:
            run.each(len)
            if rank == 0:
                raise KeyError("of what is done with it")

    found["after"] = message(after)

    # What is not the same everywhere is refused in all of them.
    found["seeds"] = message(lambda: pv.elbo_terms(model, guide, data, **options | {"seed": rank}))
    found["data"] = message(lambda: pv.elbo_terms(model, guide, many[rank:], **options))
    sampler = DistributedSampler(TensorDataset(ROWS), shuffle=False)
    own = DataLoader(TensorDataset(ROWS), 5, sampler=sampler)
    found["sampler"] = message(lambda: pv.elbo_terms(model, guide, own, **options))
    longer = data[: 5 - rank]
    found["longer"] = message(lambda: pv.elbo_terms(model, guide, longer, **options))
    net = nn.Linear(3, 2)
    with torch.no_grad():
        net.weight.fill_(rank)

    def of_net(x):
        pyro.module("net", net)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(net(x), 1.0).to_event(1))

    found["weights"] = message(lambda: pv.elbo_terms(model, of_net, data, **options))
    calls = [lambda: pv.elbo_terms(model, guide, data, **options), lambda: pv.active_units(guide, data, **QUICK)]
    found["calls"] = message(calls[min(rank, 1)])
    found["works again"] = pv.elbo_terms(model, guide, data, num_samples=10, **QUICK).value
    return found


@pytest.fixture(scope="module")
def once():
    """What one process finds."""
    return {count: computed(count, dtype) for count, dtype in CASES.items()}


@pytest.fixture(scope="module", params=[2, pytest.param(3, marks=pytest.mark.slow)])
def together(request):
    """What each of several processes found."""
    size = request.param
    with tempfile.TemporaryDirectory() as folder:
        processes.spawn(share, (size, folder), nprocs=size)
        # Our own file, of our own process.
        yield size, [torch.load(f"{folder}/{size}-{rank}.pt", weights_only=False) for rank in range(size)]


@pytest.mark.parametrize("count", CASES)
@pytest.mark.parametrize("name", CALLS)
def test_several_processes_find_the_numbers_of_one(together, once, name, count):
    _, found = together
    limit = 1e-10 if CASES[count] == torch.float64 else 1e-6
    wanted = once[count][name]
    assert len(wanted) and bool(wanted.isfinite().any())
    for one in found:
        torch.testing.assert_close(one[count][name], wanted, rtol=limit, atol=limit, equal_nan=True)


def test_each_process_runs_its_own_batches(together):
    size, found = together
    for numbers, seen, own in (one["shares"] for one in found):
        assert numbers == list(range(5))
        assert seen == own
    assert sum(len(one["shares"][1]) for one in found) == 5


def test_all_kinds_of_data_are_shared(together):
    _, found = together
    model, guide = pair()
    many = torch.randn(450, 3, generator=torch.Generator().manual_seed(5))
    options = {"num_samples": 5, **QUICK}
    alone_ = pv.elbo_terms(model, guide, many, **options).pointwise
    torch.manual_seed(4)
    loader = DataLoader(TensorDataset(ROWS), 5, shuffle=True)
    shuffled = pv.elbo_terms(model, guide, loader, **options).value
    for rank, one in enumerate(found):
        torch.testing.assert_close(one["tensor"], alone_)
        assert one["shuffled"] == pytest.approx(shuffled, rel=1e-6)
        assert one["alone"] == pytest.approx(pv.elbo_terms(model, guide, many[rank:], **options).value, rel=1e-6)


def test_a_failure_in_one_process_ends_all(together):
    size, found = together
    assert found[-1]["failed"].startswith("RuntimeError: the last process cannot go on")
    for one in found[:-1]:
        assert f"process {size - 1} of {size} failed, so all stop: the last process cannot go on" in one["failed"]
    assert "of what is done with it" in found[0]["after"] and found[0]["after"].startswith("KeyError")
    assert all("process 0 of" in one["after"] for one in found[1:])
    assert all(one["all failed"] == found[0]["all failed"] != "no error" for one in found)
    model, guide = pair()
    value = pv.elbo_terms(model, guide, batches(5), num_samples=10, **QUICK).value
    assert all(one["works again"] == pytest.approx(value, rel=1e-6) for one in found)


def test_without_a_seed_the_first_process_draws_one_for_all(together):
    _, found = together
    assert all(one["unseeded"] == found[0]["unseeded"] for one in found)
    first, second, _ = found[0]["unseeded"]
    assert first != second and first == pytest.approx(second, abs=0.5)


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("seeds", "seed is 0 in process 0 and 1 in process 1"),
        ("data", "number of data is 450 in process 0 and 449 in process 1"),
        ("sampler", "first batch is"),
        ("longer", "got 5 of 23 data in process 0 and 4 of 20 data in process 1 as batches"),
        ("weights", "of the pair is float32 (2, 3)"),
        ("calls", "call is ELBO in process 0 and active units in process 1"),
    ],
)
def test_what_is_not_the_same_everywhere_is_refused(together, what, words):
    for one in together[1]:
        assert words in one[what]


# Of one process.


def test_the_noise_of_a_batch_is_that_of_its_number():
    """Whatever the batches before it are, and however much noise they take."""
    model, guide = pair()
    data = batches(4)
    whole = pv.log_likelihood(model, guide, data, num_samples=30, method="importance", **QUICK).pointwise
    others = [torch.zeros(2, 3), torch.ones(7, 3), data[2], data[3]]
    again = pv.log_likelihood(model, guide, others, num_samples=30, method="importance", **QUICK).pointwise
    assert torch.equal(whole[10:], again[9:])
    first = pv.log_likelihood(model, guide, data[0], num_samples=30, method="importance", **QUICK).pointwise
    assert torch.equal(whole[:5], first)


def noise(seed, passes=1, **options):
    with sweep(lambda x: None, data=batches(4), seed=seed, progress=False, **options) as run:
        return [torch.stack(run.each(lambda batch: torch.rand(3))) for _ in range(passes)]


def test_batches_have_noise_of_their_own():
    found = torch.cat([noise(seed)[0] for seed in range(50)])
    assert len(found.unique(dim=0)) == len(found) == 200  # of any two seeds
    starts = torch.tensor([(number * sharing.STEP) % 2**32 for number in range(200_000)])
    assert starts.sort().values.diff().min() > 10_000  # so many seeds are apart


def test_a_seed_is_a_seed():
    assert torch.equal(*noise(0, passes=2))
    torch.manual_seed(0)
    assert not torch.equal(*noise(None, passes=2))
    before = torch.get_rng_state()
    noise(0)
    assert torch.equal(before, torch.get_rng_state())


def test_simulated_batches_are_others_in_each_pass():
    model, guide = pair()
    with sweep(model, guide, data=batches(2), seed=0, progress=False) as run:
        found = run.simulated(lambda batch, latents: batch[0], 21, None, again=True)
    rows = torch.cat(found)
    assert len(found) == 5 and len(rows) == 21 and len(rows.unique(dim=0)) == 21


def test_what_is_drawn_after_the_batches_does_not_depend_on_them():
    after = []
    for count in (2, 5):
        with sweep(lambda x: None, data=batches(count), seed=0, progress=False) as run:
            run.each(lambda batch: torch.rand(len(batch[0])))
            after.append(torch.rand(4))
    assert torch.equal(*after)


def test_a_group_ends_where_what_it_was_asked_for_fails(monkeypatch, tmp_path):
    def failing(rank, size):
        assert group.is_initialized()
        raise KeyError("of what it was asked for")

    monkeypatch.setattr(sys.modules[__name__], "asked", failing)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    with pytest.raises(KeyError, match="of what it was asked for"):
        share(0, 1, tmp_path)
    assert not group.is_initialized() and not list(tmp_path.glob("*.pt"))
