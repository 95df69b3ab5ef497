"""A whole training step as one graph is the step: choice of rows, binarisation, gradient and optimiser."""

import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from torch.optim.optimizer import register_optimizer_step_post_hook

from pyro_vae.data.splits import Split
from pyro_vae.inference.batches import Batches
from pyro_vae.inference.bounds import elbo, iwae
from pyro_vae.inference.captured import Watched
from pyro_vae.inference.compiled import Compiled
from pyro_vae.inference.objectives import Objective
from pyro_vae.inference.optimizers import Fused, _hooked
from pyro_vae.inference.steps import GraphSteps
from pyro_vae.inference.training import fit
from tests.pairs import binary, small_pair

grey = torch.randint(256, (44, 1, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
SPLIT = Split(grey, binarization="dynamic")


def fitted(data, loss, compile_after="plain", pair=small_pair, optimizer=None, **options):
    """A fit of 12 steps, two of them on the short last batch; its history, weights, optimiser and next random number."""
    model, guide = pair()
    if compile_after != "plain":
        loss = Compiled(loss, compile_after=compile_after)
    optimizer = optimizer() if optimizer is not None else Fused(torch.optim.Adam, {"lr": 1e-2})
    torch.manual_seed(4)
    history = fit(model, guide, data, loss=loss, epochs=3, batch_size=12, optimizer=optimizer, compile=False, **options)
    weights = [p for program in (model, guide) for p in program.parameters()]
    return history, weights, optimizer, torch.randn(()), loss


def assert_the_same(ours, theirs, rel=1e-5):
    assert ours[0]["loss"] == pytest.approx(theirs[0]["loss"], rel=rel)
    for a, b in zip(ours[1], theirs[1], strict=True):
        assert (a - b).abs().max() <= rel * b.abs().max().clamp(min=1e-2)
    assert torch.equal(ours[3], theirs[3])


OPTIMIZERS = {
    "adam": lambda: Fused(torch.optim.Adam, {"lr": 1e-2}),
    "adam-l2": lambda: Fused(torch.optim.Adam, {"lr": 1e-2, "weight_decay": 0.1, "eps": 1e-4, "betas": (0.8, 0.95)}),
    "adamw": lambda: Fused(torch.optim.AdamW, {"lr": 1e-2, "weight_decay": 0.3}),
    "clipped": lambda: Fused(torch.optim.Adam, {"lr": 1e-2}, clip_norm=0.05),
    "within the limit": lambda: Fused(torch.optim.Adam, {"lr": 1e-2, "eps": 1.0}, clip_norm=1e6),
}


@pytest.fixture
def batches_inside(monkeypatch):
    """As on a GPU: rows are chosen and binarised inside the graph."""
    make = GraphSteps.__init__

    def making(self, *args):
        make(self, *args)
        self.chooses = True

    monkeypatch.setattr(GraphSteps, "__init__", making)


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("name, schedule", [*((name, "constant") for name in OPTIMIZERS), ("adam", "one-cycle")])
def test_a_whole_step_is_the_step(name, schedule, inside, request):
    if inside:
        request.getfixturevalue("batches_inside")
    options = {"optimizer": OPTIMIZERS[name], "schedule": schedule}
    ours, theirs = fitted(SPLIT, Trace_ELBO(), None, **options), fitted(SPLIT, Trace_ELBO(), **options)
    assert_the_same(ours, theirs)
    assert ours[4].captures == 2 and ours[4].reason is None  # batches of 12, and the last of 8
    entries = ours[4]._graphs.values()
    assert all(e.training.update is not None and e.capture.leaves and not e.capture.live_noise for e in entries)
    # On a GPU the graph takes an index, elsewhere the batch.
    found = [
        node.meta["val"].dtype for e in entries for node in e.capture.module.graph.nodes if node.op == "placeholder"
    ]
    assert (torch.int64 in found) == inside


def test_the_optimiser_state_is_that_of_ordinary_steps():
    ours, theirs = fitted(SPLIT, Trace_ELBO(), None), fitted(SPLIT, Trace_ELBO())
    assert ours[2].count == theirs[2].count == 12
    for p, q in zip(ours[1], theirs[1], strict=True):
        one, other = ours[2]._optimizer.state[p], theirs[2]._optimizer.state[q]
        assert one["step"] == other["step"] == 12
        for name in ("exp_avg", "exp_avg_sq"):
            assert (one[name] - other[name]).abs().max() <= 1e-5 * other[name].abs().max()


@pytest.mark.slow
def test_inductor_takes_the_whole_step():
    options = {"optimizer": OPTIMIZERS["clipped"]}
    ours, theirs = fitted(SPLIT, Trace_ELBO(), 1, **options), fitted(SPLIT, Trace_ELBO(), **options)
    assert_the_same(ours, theirs)
    assert [e.capture.compiled for e in ours[4]._graphs.values()].count(True) >= 1


def test_double_precision_equals_the_fused_optimiser_to_rounding():
    def pair():
        model, guide = small_pair()
        return model.double(), guide.double()

    data = binary(44).double()
    assert_the_same(fitted(data, Trace_ELBO(), None, pair), fitted(data, Trace_ELBO(), pair=pair), rel=1e-12)


@pytest.mark.parametrize("loss", [Trace_ELBO, lambda: Objective(elbo), lambda: Objective(elbo, beta=0.5)])
def test_a_weight_that_rises_is_read_in_every_step(loss):
    ours = fitted(SPLIT, loss(), None, kl_warmup=2)
    assert_the_same(ours, fitted(SPLIT, loss(), kl_warmup=2))
    assert ours[4].captures == 2


class Float:
    """Data whose making reads a number out of a tensor, which no graph can hold."""

    def __init__(self, pixels):
        self.pixels = pixels

    def __len__(self):
        return len(self.pixels)

    def __getitem__(self, index):
        x = self.pixels[index]
        return (torch.rand(x.shape) < x).float() if x.max() <= 1 else x


@pytest.mark.parametrize("optimizer", [None, lambda: Fused(torch.optim.SGD, {"lr": 1e-3}),
                                       lambda: pyro.optim.Adam({"lr": 1e-2})])  # fmt: skip
@pytest.mark.parametrize("data", [SPLIT, Float(grey / 255.0), binary(44), [b for b in binary(44).split(12)]])
def test_where_a_part_cannot_be_captured_the_rest_is(data, optimizer, batches_inside):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # that the loss is captured all the same needs no warning
        ours = fitted(data, Objective(iwae, 3), None, optimizer=optimizer)
    assert_the_same(ours, fitted(data, Objective(iwae, 3), optimizer=optimizer))
    assert ours[4].reason is None and ours[4].captures == 2
    wholes = [e.training for e in ours[4]._graphs.values()]
    assert all((w.update is not None) == (optimizer is None) for w in wholes)


def test_a_step_that_turns_out_wrong_is_taken_back(monkeypatch):
    """The loss counts its calls and the watch is made blind to it; the check at a replay finds that out."""
    monkeypatch.setattr(Watched, "changed", lambda self: None)
    monkeypatch.setattr(Watched, "fresh", lambda self: True)
    counter = [0]

    class Counting:
        def __mul__(self, other):
            counter[0] += 1
            return other * float(counter[0])

    factor = Counting()

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(factor * z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x * pyro.param("a", torch.zeros(())), 1.0))

    loss, optimizer = Compiled(Trace_ELBO(), compile_after=None, quiet=True), Fused(torch.optim.Adam, {"lr": 1e-2})
    svi = pyro.infer.SVI(model, guide, optimizer, Trace_ELBO())
    steps = GraphSteps(loss, model, guide, optimizer, Batches(torch.ones(8), 8, shuffle=False))
    after = []
    refuse = loss._refuse

    def refusing(step, reason):
        after.append((step.training.update is not None, svi_state(optimizer)))
        refuse(step, reason)

    monkeypatch.setattr(loss, "_refuse", refusing)
    before = []
    with pytest.warns(UserWarning, match="a captured loss was not that of the programs"):
        for _ in range(8):
            before.append(svi_state(optimizer))
            value, _ = steps((torch.arange(8),))
            if value is None:
                svi.step(torch.ones(8))
    assert any("outside the graph" in reason for reason in loss._refused.values()) and optimizer.count == 8
    # A graph that was found wrong left weight, moments and count as they were before it ran.
    whole = [state for updates, state in after if updates]
    assert whole and all(state in before for state in whole)


def svi_state(optimizer):
    """The weight, its moments and the number of steps."""
    states = optimizer._optimizer.state.values() if optimizer._optimizer else ()
    weight = pyro.param("a").item() if "a" in pyro.get_param_store() else None
    return weight, optimizer.count, [{k: float(v) for k, v in state.items()} for state in states]


def test_the_same_loss_and_optimiser_go_on_in_the_next_fit_without_another_capture():
    model, guide = small_pair()
    loss, optimizer = Compiled(Trace_ELBO(), compile_after=None), Fused(torch.optim.Adam, {"lr": 1e-2})
    for _ in range(3):
        fit(model, guide, SPLIT, loss=loss, epochs=2, batch_size=12, optimizer=optimizer, compile=False)
    assert loss.captures == 2 and optimizer.count == 24


class Level:
    """A number that programs read in Python."""

    value = 0.5


def levelled(level):
    """Plain programs whose prior mean is that number."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(level.value, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(pyro.param("a", torch.zeros(())) + 0.1 * x, 0.7))

    return model, guide


class Rows(torch.utils.data.Dataset):
    """Data of the user's, whose code runs between steps."""

    def __init__(self, level):
        self.level, self.looked = level, 0

    def __len__(self):
        return 40

    def __getitem__(self, index):
        self.looked += 1
        if self.looked == 60:
            self.level.value = 2.0
        return torch.arange(40.0)[index] / 40


def changing(where, level):
    """Options of a fit of 20 steps an epoch, in the middle of which that number is changed."""
    options = {"data": torch.arange(40.0) / 40}

    class Callback:
        def __call__(self, record):
            if where == "epoch" and record["epoch"] == 2:
                level.value = 2.0

        def early(self, seconds, steps):
            if where == "early":
                level.value = 2.0

        def tenth(self, steps, total, bound):
            if where == "tenth" and steps >= 30:
                level.value = 2.0

    def function(done):
        if done > 0.4:
            level.value = 2.0
        return 1.0

    if where == "data":
        options["data"] = Rows(level)
    if where in ("schedule", "beta"):
        options[where] = function
    return options | {"callback": Callback()}


class Looking(torch.overrides.TorchFunctionMode):
    """Code of the user's around a fit, which runs where data are indexed."""

    def __init__(self, level):
        super().__init__()
        self.level, self.looked = level, 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.looked += function is torch.Tensor.__getitem__
        if self.looked == 200:
            self.level.value = 2.0
        return function(*args, **(kwargs or {}))


def test_a_mode_of_torch_around_a_fit_is_code_between_steps():
    levels, found = [], []
    for moment in (1e9, -1.0):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("pyro_vae.inference.steps.MOMENT", moment)
            pyro.clear_param_store()
            level = Level()
            with Looking(level):
                history = fit(
                    *levelled(level), torch.arange(40.0) / 40, loss=Compiled(Trace_ELBO(), compile_after=None, quiet=True),
                    epochs=6, batch_size=2, seed=0, compile=False, progress=False,
                )  # fmt: skip
            levels.append(level.value)
            found.append(history["loss"])
    assert levels == [2.0, 2.0] and found[0] == found[1]


class Counted(torch.nn.Module):
    """A model that reads an array over the memory of a buffer that its own steps write, now and then."""

    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("flag", torch.zeros(1))
        self.seen = self.flag.numpy()

    def forward(self, x):
        mean = float(self.seen[0])
        with torch.no_grad():
            self.count.add_(1)
            self.flag.copy_((self.count > 60).float())
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(mean, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def test_what_a_replay_itself_changes_through_an_array_is_seen():
    found = []
    for loss in (Compiled(Trace_ELBO(), compile_after=None, quiet=True), Trace_ELBO()):
        pyro.clear_param_store()
        _, guide = levelled(Level())
        history = fit(
            Counted(), guide, torch.arange(40.0) / 40, loss=loss, epochs=6, batch_size=2, seed=0, compile=False,
            progress=False,
        )  # fmt: skip
        found.append(history["loss"])
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def clamped(kind, weights):
    """Adam, after each of whose steps a weight is held small by code of the user's."""
    optimizer = torch.optim.Adam(weights, lr=0.05)

    def hold(*_):
        hold.times += 1
        with torch.no_grad():
            weights[0].clamp_(-0.1, 0.1)

    hold.times = 0
    handle = None
    if kind == "hook":
        optimizer.register_step_post_hook(hold)
    elif kind == "hook of all":
        handle = register_optimizer_step_post_hook(hold)
    else:
        original = optimizer.step
        optimizer.step = lambda *args, **kwargs: (original(*args, **kwargs), hold())[0]
    return optimizer, hold, handle


@pytest.mark.parametrize("kind", ["hook", "hook of all", "step"])
def test_what_runs_with_each_step_of_an_optimizer_runs_in_a_captured_fit_too(kind):
    found = []
    for captured in (True, False):
        model, guide = small_pair()
        weights = [p for program in (model, guide) for p in program.parameters()]
        optimizer, hold, handle = clamped(kind, weights)
        try:
            loss = Compiled(Trace_ELBO(), compile_after=None) if captured else Trace_ELBO()
            fit(model, guide, SPLIT, loss=loss, epochs=10, batch_size=11, optimizer=optimizer, seed=0, compile=False)
        finally:
            if handle is not None:
                handle.remove()
        assert hold.times == 40 and weights[0].abs().max() <= 0.1
        found.append(weights[0].detach())
    assert (found[0] - found[1]).abs().max() < 1e-5


def test_a_hook_that_comes_in_the_middle_of_a_captured_fit_runs_from_then_on():
    model, guide = small_pair()
    optimizer = torch.optim.Adam([p for program in (model, guide) for p in program.parameters()])
    times = []

    def callback(record):
        if record["epoch"] == 5:
            optimizer.register_step_post_hook(lambda *_: times.append(1))

    loss = Compiled(Trace_ELBO(), compile_after=None)
    fit(model, guide, SPLIT, loss=loss, epochs=10, batch_size=11, optimizer=optimizer, compile=False, callback=callback)
    assert len(times) == 20 and loss.captures


def test_a_scheduler_of_torch_leaves_the_step_in_the_graph():
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.ones(2))])
    torch.optim.lr_scheduler.StepLR(optimizer, 5)
    assert "step" in vars(optimizer) and not _hooked(optimizer)


@pytest.mark.parametrize("where", ["epoch", "early", "tenth", "schedule", "beta", "data"])
def test_what_code_between_steps_changes_is_seen_in_the_next_step(where):
    found = []
    for captured in (True, False):
        pyro.clear_param_store()
        level = Level()
        options = changing(where, level)
        loss = Compiled(Trace_ELBO(), compile_after=None, quiet=True) if captured else Trace_ELBO()
        history = fit(
            *levelled(level), options.pop("data"), loss=loss, epochs=4, batch_size=2, seed=0, compile=False,
            progress=False, **options,
        )  # fmt: skip
        assert not captured or loss.captures
        found.append((history["loss"], pyro.param("a").item(), level.value))
    assert found[0][2] == 2.0
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"schedule": "one-cycle"},
        {"kl_warmup": 2.5},
        {"loss": Objective(elbo, 3), "kl_warmup_steps": 30},
        {"loss": Objective(iwae, 3), "clip_norm": 0.5, "data_seed": 3},
    ],
)
def test_a_step_that_is_taken_again_is_the_step(options, monkeypatch):
    """What steps rest on is compared once in a while instead of each time, and nothing else is different."""
    looks, found = [], []
    monkeypatch.setattr(Watched, "fresh", lambda self, fresh=Watched.fresh: looks.append(1) or fresh(self))
    for moment in (1e9, -1.0):  # as on a machine where no time passes, and as if each were compared
        monkeypatch.setattr("pyro_vae.inference.steps.MOMENT", moment)
        looks.clear()
        model, guide = small_pair()
        given = {"loss": Trace_ELBO()} | options
        loss = Compiled(given.pop("loss"), compile_after=None)
        history = fit(model, guide, SPLIT, loss=loss, epochs=40, batch_size=12, seed=0, compile=False, **given)
        assert loss.reason is None and loss.captures
        found.append((history["loss"], [p.detach().clone() for p in model.parameters()], len(looks)))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(a, b) for a, b in zip(found[0][1], found[1][1], strict=True))
    assert found[0][2] < 0.75 * found[1][2]  # of the four steps of an epoch the first two and the last are compared
