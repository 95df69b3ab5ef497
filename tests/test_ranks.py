"""A fit of several processes: its steps are those of one process with the whole batch, and no process hangs."""

import math
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.distributed as group
import torch.multiprocessing as processes
from pyro.infer.autoguide import AutoNormal
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import pyro_vae as pv
from pyro_vae.inference.batches import Batches, Stream
from pyro_vae.inference.bounds import map_estimate
from pyro_vae.inference.checkpoints import Sparing
from pyro_vae.inference.compiled import Compiled
from pyro_vae.inference.objectives import Objective
from pyro_vae.inference.training import fit

ROWS = torch.randn(53, 5, generator=torch.Generator().manual_seed(3))
OF_ONE = {None: 53, 53: 53}


def pair(full=None, dtype=torch.float64, norm=False, point=True):
    """A small pair on five numbers, of a deterministic guide or one that draws."""
    torch.manual_seed(0)
    middle = [nn.BatchNorm1d(8)] if norm else []
    net = nn.Sequential(nn.Linear(5, 8), *middle, nn.Tanh(), nn.Linear(8, 2)).to(dtype)
    decoder = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 5)).to(dtype)

    def plate(x):
        return pyro.plate("data", len(x) if full is None else full, subsample=x)

    def model(x):
        pyro.module("decoder", decoder)
        with plate(x):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), 1.0).to_event(1), obs=x)

    def guide(x):
        pyro.module("net", net)
        with plate(x):
            q = dist.Delta(net(x)) if point else dist.Normal(net(x), 0.3)
            pyro.sample("z", q.to_event(1))

    return model, guide, nn.ModuleList([net, decoder])


def flat(modules):
    return torch.cat([p.detach().reshape(-1) for p in modules.parameters()])


CASES = [
    (full, count, dtype, compile)
    for full, count in ((None, 53), (53, 53), (None, 25))
    for dtype, compile in ((torch.float64, False), (torch.float32, True))
]


def fitted(full, count, dtype, compile, size, inductor):
    """A fit whose steps are captured, or compiled too: Inductor takes seconds in each process, so by three of them only."""
    model, guide, modules = pair(full, dtype)
    before = flat(modules)
    loss = Objective(map_estimate)
    if compile and not inductor:
        loss, compile = Compiled(loss, compile_after=None), False
    history = fit(
        model, guide, ROWS[:count].to(dtype), loss=loss, epochs=3, batch_size=12 // size,
        optimizer=torch.optim.SGD, learning_rate=2e-3, clip_norm=20.0, seed=1, data_seed=7, progress=False,
        compile=compile, validation=ROWS.to(dtype),
    )  # fmt: skip
    assert not isinstance(loss, Compiled) or loss.captures
    return {"moved": flat(modules) - before, "now": flat(modules), "records": history.records}


def message(function):
    try:
        function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def steps(rank, size, folder):
    """All that several processes are asked for, in one group, which is left in order whatever happens: a process that ends
    with one is aborted, and what it raised is lost."""
    torch.set_num_threads(1)
    group.init_process_group("gloo", init_method=f"file://{folder}/meet-{size}", rank=rank, world_size=size)
    try:
        found = asked_of_all(rank, size, folder)
        group.barrier()  # none leaves while another still waits for it
    finally:
        group.destroy_process_group()
    torch.save(found, f"{folder}/{size}-{rank}.pt")


def asked_of_all(rank, size, folder):
    found = {"cases": [fitted(*case, size, size > 2) for case in CASES]}
    quick = {"epochs": 4, "batch_size": 6, "seed": 1, "progress": False}
    data = ROWS.double()

    # Statistics of batches are averaged.
    model, guide, modules = pair(norm=True)
    fit(model, guide, data, loss=Objective(map_estimate), **quick)
    found["norm"] = [b.clone() for b in modules.buffers()]

    # The same pair with noise, and one that goes on after an interruption, to the bit.
    model, guide, modules = pair(point=False)
    whole = fit(model, guide, data, **quick)
    found["drawn"] = {"now": flat(modules), "records": whole.records}
    for name, file in (
        ("kept", f"{folder}/{size}.safetensors"),
        ("spared", Sparing(f"{folder}/{size}s.safetensors", 1)),
    ):
        model, guide, modules = pair(point=False)

        def stop(record):
            if record["epoch"] == 2:
                os.kill(os.getpid(), signal.SIGTERM)  # SIGINT is ignored by what a shell has in the background

        handler = signal.getsignal(signal.SIGTERM)
        broken = fit(model, guide, data, checkpoint=file, callback=stop, **quick)
        assert signal.getsignal(signal.SIGTERM) is handler
        found[name] = {"interrupted": broken.interrupted, "epochs": len(broken)}
        model, guide, modules = pair(point=False)
        history = fit(model, guide, data, checkpoint=file, **quick)
        found[name] |= {"now": flat(modules), "records": history.records}

    # A failure in one of them ends all, and the next fit works.
    def failing(x):
        if group.get_rank() == size - 1 and failing.calls > 6:
            raise ValueError("the last process cannot go on")
        failing.calls += 1
        return pair.model(x)

    failing.calls = 0
    pair.model, guide, _ = pair()
    found["failed"] = message(lambda: fit(failing, guide, data, loss=Objective(map_estimate), compile=False, **quick))

    def broken_callback(record):
        raise KeyError("of the callback")

    model, guide, _ = pair()
    found["callback"] = message(
        lambda: fit(model, guide, data, loss=Objective(map_estimate), callback=broken_callback, **quick)
    )

    # What cannot be shared out, or is not the same everywhere, is refused in all of them.
    other = quick | {"batch_size": 6 + rank}
    found["options"] = message(lambda: fit(model, guide, data, loss=Objective(map_estimate), **other))
    found["data"] = message(lambda: fit(model, guide, data[rank:], loss=Objective(map_estimate), **quick))
    loader = DataLoader(TensorDataset(data), 6, shuffle=True)
    found["loader"] = message(lambda: fit(model, guide, loader, loss=Objective(map_estimate), **quick))
    found["pyro optimiser"] = message(lambda: fit(model, guide, data, optimizer=pyro.optim.Adam({"lr": 1e-3}), **quick))

    def weights(x):
        w = pyro.sample("w", dist.Normal(torch.zeros(()), 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(w, 1.0).expand([5]).to_event(1), obs=x)

    def about_weights(x):
        pyro.sample("w", dist.Normal(pyro.param("loc", torch.zeros(())), 0.1))

    # Parameters that lie otherwise in memory, and statistics that a program puts in a buffer's place.
    model, guide, modules = pair()
    modules[0][0].weight = nn.Parameter(modules[0][0].weight.detach().T.contiguous().T)
    fit(model, guide, data, loss=Objective(map_estimate), data_seed=7, optimizer=torch.optim.Adam, **quick)
    found["transposed"] = flat(modules)
    model, guide, modules = pair()
    modules.register_buffer("mean", torch.zeros(5, dtype=torch.float64))

    def averaging(x):
        modules.mean = 0.9 * modules.mean + 0.1 * x.mean(0)
        return model(x)

    fit(averaging, guide, data, loss=Objective(map_estimate), compile=False, **quick)
    found["mean"] = modules.mean.clone()

    model, guide, modules = pair(point=False)
    noise = []

    def noting(x):
        noise.append(torch.rand(()).item())
        return model(x)

    fit(noting, guide, data, compile=False, **quick)
    found["noise"] = noise[-4:]

    # Without a seed, too, an interrupted fit is gone on with to the bit: the first process draws one for all.
    torch.manual_seed(rank)
    model, guide, modules = pair(point=False)
    unseeded = {key: value for key, value in quick.items() if key != "seed"}
    for _ in range(2):
        torch.manual_seed(rank + 5 + _)
        fit(
            model, guide, data, checkpoint=f"{folder}/{size}u.safetensors", callback=stop if not _ else None, **unseeded
        )
    found["unseeded"] = flat(modules)

    # What fails in one process before the first step fails in all, and the next fit works.
    if rank == 0:
        with open(f"{folder}/{size}d.safetensors", "w") as file:
            file.write("damaged")
    group.barrier()
    found["damaged"] = message(lambda: fit(model, guide, data, checkpoint=f"{folder}/{size}d.safetensors", **quick))
    found["seeds"] = message(lambda: fit(model, guide, data, **quick | {"seed": rank}))
    own_part = data[rank * 20 : rank * 20 + 20]
    found["shards"] = message(lambda: fit(model, guide, own_part, **quick))
    found["beta"] = message(lambda: fit(model, guide, data, beta=1.0 - 0.1 * rank, **quick))
    found["validation"] = message(lambda: fit(model, guide, data, validation=data if rank == 0 else None, **quick))

    def penalised(x):
        pyro.factor("penalty", -pyro.param("loc", torch.zeros(())).square())
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(pyro.param("loc"), 1.0).expand([5]).to_event(1), obs=x)

    def nothing(x):
        pass

    found["factor"] = message(lambda: fit(penalised, nothing, ROWS, **quick))

    def plateless(x):
        w = pyro.sample("w", dist.Normal(torch.zeros(()), 1.0))
        pyro.sample("x", dist.Normal(w, 1.0).expand([len(x), 5]).to_event(2), obs=x)

    found["plateless"] = message(lambda: fit(plateless, about_weights, ROWS, **quick))
    found["global"] = message(lambda: fit(weights, about_weights, ROWS, **quick))

    def picking(x):
        with pyro.plate("data", 53, subsample_size=5) as rows:
            z = pyro.sample("z", dist.Normal(torch.zeros(5), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x[rows])

    def picked(x):
        with pyro.plate("data", 53, subsample_size=5) as rows:
            pyro.sample("z", dist.Normal(x[rows] * pyro.param("a", torch.ones(())), 1.0).to_event(1))

    found["picks"] = message(lambda: fit(picking, picked, ROWS, **quick | {"batch_size": 53}))
    plain = pair(dtype=torch.float32)[0]
    automatic = AutoNormal(plain)
    automatic(ROWS)
    found["automatic"] = message(lambda: fit(plain, automatic, ROWS, **quick))

    # Loaders of each process's own share, of which one has more batches than the others.
    model, guide, modules = pair()
    sampler = DistributedSampler(TensorDataset(data), shuffle=False, drop_last=False)
    own = DataLoader(TensorDataset(data), 6, sampler=sampler)
    fit(model, guide, own, loss=Objective(map_estimate), **quick)
    found["sampled"] = flat(modules)
    model, guide, modules = pair()
    history = fit(model, guide, list(data[:40].split(8)), loss=Objective(map_estimate), **quick | {"epochs": 1})
    found["list"] = {"now": flat(modules), "records": history.records}
    return found


@pytest.fixture(scope="module", params=[2, pytest.param(3, marks=pytest.mark.slow)])
def together(request):
    """What each of several processes found."""
    size = request.param
    with tempfile.TemporaryDirectory() as folder:
        processes.spawn(steps, (size, folder), nprocs=size)
        # Our own file, of our own process.
        found = [torch.load(f"{folder}/{size}-{rank}.pt", weights_only=False) for rank in range(size)]
        yield size, found, folder


def test_steps_are_those_of_one_process_with_the_whole_batch(together):
    size, found, _ = together
    for number, case in enumerate(CASES):
        alone = fitted(*case, 1, size > 2)
        limit = 1e-12 if case[2] == torch.float64 else 1e-6
        assert alone["moved"].abs().max() > 1e-3
        for each in (one["cases"][number] for one in found):
            torch.testing.assert_close(each["now"], alone["now"], rtol=0, atol=limit)
            for column in ("loss", "bound", "validation"):
                ours, theirs = ([r[column] for r in records] for records in (each["records"], alone["records"]))
                assert ours == pytest.approx(theirs, rel=limit)


def test_all_processes_hold_the_same_pair(together):
    _, found, _ = together
    for name in ("drawn", "kept", "spared"):
        assert all(torch.equal(one[name]["now"], found[0][name]["now"]) for one in found)
    for buffers in zip(*(one["norm"] for one in found), strict=True):
        assert all(torch.equal(b, buffers[0]) for b in buffers)


def test_statistics_of_batches_are_about_those_of_one_process(together):
    size, found, _ = together
    model, guide, modules = pair(norm=True)
    fit(
        model, guide, ROWS.double(), loss=Objective(map_estimate), epochs=4, batch_size=6 * size, seed=1, progress=False
    )
    for ours, theirs in zip(found[0]["norm"], modules.buffers(), strict=True):
        if ours.is_floating_point():  # of smaller batches, in another order
            torch.testing.assert_close(ours, theirs, rtol=0.3, atol=0.15)


def test_an_interrupted_fit_goes_on_to_the_bit(together):
    _, found, _ = together
    for one in found:
        for name in ("kept", "spared"):
            assert one[name]["interrupted"] and one[name]["epochs"] == 2
            assert len(one[name]["records"]) == 4
        assert torch.equal(one["kept"]["now"], one["drawn"]["now"])
        losses = [[r["loss"] for r in one[name]["records"]] for name in ("drawn", "kept", "spared")]
        assert losses[0] == losses[1]
        assert losses[0] == pytest.approx(losses[2], rel=1e-6)


def test_a_fit_goes_on_in_another_number_of_processes(together):
    size, found, folder = together
    model, guide, modules = pair(point=False)
    quick = {"epochs": 4, "batch_size": 6, "seed": 1, "progress": False}
    history = fit(model, guide, ROWS.double(), checkpoint=f"{folder}/{size}.safetensors", **quick)
    # The file is that of the finished fit: all of it is there, and nothing is left to do.
    assert [r["loss"] for r in history.records] == [r["loss"] for r in found[0]["kept"]["records"]]
    assert torch.equal(flat(modules), found[0]["kept"]["now"])


def test_a_failure_in_one_process_ends_all(together):
    size, found, _ = together
    assert found[-1]["failed"].startswith("ValueError: the last process cannot go on")
    for one in found[:-1]:
        assert f"process {size - 1} of {size} failed, so all stop: the last process cannot go on" in one["failed"]
    assert "of the callback" in found[0]["callback"]
    assert all("process 0 of" in one["callback"] for one in found[1:])


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("options", "batch_size is 6 in process 0 and 7 in process 1"),
        ("data", "number of data is 53 in process 0 and 52 in process 1"),
        ("loader", "DistributedSampler"),
        ("pyro optimiser", "which steps each tensor by itself"),
        ("global", "site 'w' is outside the plate"),
        ("factor", "site 'penalty' is outside the plate"),
        ("plateless", "or there is none"),
        ("damaged", "is not a readable checkpoint"),
        ("seeds", "seed is 0 in process 0 and 1 in process 1"),
        ("shards", "a sample of the data is"),
        ("beta", "beta is 1.0 in process 0 and 0.9 in process 1"),
        ("validation", "validation is 53 in process 0 and None in process 1"),
        ("picks", "picks its rows at random"),
        ("automatic", "parameters for each of the 53 rows"),
    ],
)
def test_what_cannot_be_shared_is_refused_everywhere(together, what, words):
    for one in together[1]:
        assert words in one[what]


def test_parameters_may_lie_otherwise_in_memory(together):
    size, found, _ = together
    model, guide, modules = pair()
    modules[0][0].weight = nn.Parameter(modules[0][0].weight.detach().T.contiguous().T)
    fit(model, guide, ROWS.double(), loss=Objective(map_estimate), data_seed=7, optimizer=torch.optim.Adam, epochs=4,
        batch_size=6 * size, seed=1, progress=False)  # fmt: skip
    for one in found:
        torch.testing.assert_close(one["transposed"], flat(modules), rtol=0, atol=1e-9)
        assert torch.equal(one["mean"], found[0]["mean"]) and one["mean"].abs().max() > 0
        assert torch.equal(one["unseeded"], found[0]["unseeded"])


def test_the_noise_of_each_process_is_its_own(together):
    size, found, _ = together
    assert len({draw for one in found for draw in one["noise"]}) == 4 * size


def test_each_process_has_a_loader_of_its_own(together):
    size, found, _ = together
    assert all(torch.equal(one["sampled"], found[0]["sampled"]) for one in found)
    # Five batches of eight for two or three processes: in the last step some have none.
    model, guide, modules = pair()
    batches = list(ROWS.double()[:40].split(8))
    joined = [torch.cat(batches[start : start + size]) for start in range(0, len(batches), size)]
    history = fit(model, guide, joined, loss=Objective(map_estimate), epochs=1, seed=1, progress=False)
    for one in found:
        torch.testing.assert_close(one["list"]["now"], flat(modules), rtol=0, atol=1e-12)
        assert one["list"]["records"][0]["loss"] == pytest.approx(history["loss"][0], rel=1e-12)


def test_shares_are_one_shuffle_and_their_noise_is_their_own():
    def batches(rank, size, number=103):
        made = Batches(torch.arange(float(number)).reshape(-1, 1), 24 // size)
        made.stream = Stream(5, torch.device("cpu"))
        made.shard(rank, size)
        made.begin(3)
        index, noise = [], []
        for choice in made.choices():
            with made.stream:
                noise.append(torch.rand(()).item())
            index.append((choice[0], made.own_rows))
        return index, noise, len(made)

    whole, _, count = batches(0, 1, 97)
    assert count == 5 and len(whole[-1][0]) == 1
    for size in (2, 3):
        shares = [batches(rank, size, 97) for rank in range(size)]
        for number, (index, _) in enumerate(whole):
            parts = [share[0][number] for share in shares]
            assert torch.equal(torch.cat([rows for rows, own in parts if own]), index)
            assert all(len(rows) >= 1 for rows, _ in parts)
        assert [own for _, own in (share[0][-1] for share in shares)] == [True] + [False] * (size - 1)
        noises = [share[1] for share in shares]
        assert len({n for noise in noises for n in noise}) == size * count
        assert {share[2] for share in shares} == {count}


def test_a_fit_of_one_process_knows_no_group():
    assert pv.inference.ranks.world() == (0, 1) if hasattr(pv, "inference") else True
    model, guide, modules = pair(point=False)
    history = fit(model, guide, ROWS.double(), epochs=1, seed=0, progress=False)
    assert math.isfinite(history["loss"][0])


LATE = """
import os, pathlib, sys, time, warnings
warnings.simplefilter("ignore")
import torch.distributed as group
import pyro_vae as pv
group.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=0, world_size=1)
pv.fit  # is loaded now, and with it all that speaks to other processes
import torch._dynamo
import torch.distributed.nn as functions
assert functions.all_reduce(group.group.WORLD.size() * group.torch.ones(2)).tolist() == [1.0, 1.0]
group.destroy_process_group()
def names():
    return [each.read_text().strip() for each in pathlib.Path("/proc/self/task").glob("*/comm")]
until = time.monotonic() + 5
while time.monotonic() < until and any("gloo" in name for name in names()):
    time.sleep(0.01)
print("LEFT", [name for name in names() if "gloo" in name])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the names of threads in /proc")
def test_a_group_is_gone_when_it_is_destroyed(tmp_path):
    """Its threads have ended: one that outlives the interpreter aborts the process, now and then, after all its work."""
    run = [sys.executable, "-c", LATE, str(tmp_path / "meet")]
    found = subprocess.run(run, capture_output=True, text=True, cwd=Path(__file__).parents[1], timeout=120)
    assert "LEFT []" in found.stdout, found
