"""What people bring as an optimiser, and what is kept of one."""

import warnings

import pyro
import pytest
import torch
from pyro.infer import SVI

import pyro_vae as pv
from pyro_vae.inference.objectives import Objective
from pyro_vae.inference.optimizers import Fused
from pyro_vae.inference.training import fit
from tests.pairs import binary, small_pair

OPTIONS = {"epochs": 4, "batch_size": 6, "seed": 1, "progress": False}


@pytest.fixture(autouse=True)
def fresh_store():
    pyro.clear_param_store()
    yield
    pyro.clear_param_store()


def parameters(pair):
    return [p for program in pair for p in program.parameters()]


def values(pair):
    return [p.detach().clone() for p in parameters(pair)]


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# An instance


@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.Adam(p, lr=1e-2, betas=(0.8, 0.95), fused=True),
        lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.3, fused=True),
        lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9, fused=True),
    ],
    ids=["adam", "adamw", "sgd"],
)
def test_an_instance_takes_the_steps_of_its_class_with_its_options(make, compile):
    ours, theirs = small_pair(), small_pair()
    optimizer = make(parameters(ours))
    options = {k: v for k, v in optimizer.defaults.items() if k in ("lr", "betas", "weight_decay", "momentum")}
    fit(*ours, binary(24), optimizer=optimizer, compile=compile, **OPTIONS)
    fit(*theirs, binary(24), optimizer=Fused(type(optimizer), options), compile=False, **OPTIONS)
    close = [torch.allclose(a, b, atol=1e-5) for a, b in zip(values(ours), values(theirs), strict=True)]
    assert all(close) if compile else same(values(ours), values(theirs))
    assert all("step" in state or "momentum_buffer" in state for state in optimizer.state.values())


@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_groups_keep_their_rates(compile):
    ours = small_pair()
    groups = [{"params": ours[0].parameters(), "lr": 0.0}, {"params": ours[1].parameters()}]
    optimizer = torch.optim.SGD(groups, lr=0.05)
    start = values(ours[:1]), values(ours[1:])
    history = fit(*ours, binary(24), optimizer=optimizer, schedule="cosine", compile=compile, **OPTIONS)
    assert same(start[0], values(ours[:1])) and not same(start[1], values(ours[1:]))
    assert [group["lr"] for group in optimizer.param_groups] == [0.0, 0.05] and history["learning_rate"] == [0.0] * 4


def test_a_second_fit_goes_on_with_the_moments():
    ours, theirs = small_pair(), small_pair()
    one, other = torch.optim.Adam(parameters(ours), lr=1e-2), Fused(torch.optim.Adam, {"lr": 1e-2, "fused": False})
    for _ in range(2):
        fit(*ours, binary(24), optimizer=one, **OPTIONS)
        fit(*theirs, binary(24), optimizer=other, **OPTIONS)
    assert same(values(ours), values(theirs)) and {int(state["step"]) for state in one.state.values()} == {32}


def test_a_stale_gradient_of_a_parameter_elsewhere_moves_nothing():
    pair, elsewhere = small_pair(), torch.nn.Parameter(torch.zeros(2))
    elsewhere.grad = torch.ones(2)
    fit(*pair, binary(24), optimizer=torch.optim.SGD([*parameters(pair), elsewhere], lr=1e-3), **OPTIONS)
    assert torch.equal(elsewhere, torch.zeros(2))


def test_parameters_that_an_instance_lacks_are_named():
    model, guide = small_pair()
    start = values((model, guide))
    with pytest.raises(ValueError, match=r"6 of the pair's 8 parameters .*'Guide\d+.post.*optimizer=torch.optim.Adam"):
        fit(model, guide, binary(24), optimizer=torch.optim.Adam(guide.posterior.head.parameters()), **OPTIONS)
    assert same(start, values((model, guide)))
    model.requires_grad_(False)
    fit(model, guide, binary(24), optimizer=torch.optim.Adam(guide.parameters()), **OPTIONS)


def test_a_rate_beside_an_instance_is_said_to_have_no_effect_and_a_schedule_multiplies():
    ours, theirs = small_pair(), small_pair()
    with pytest.warns(UserWarning, match="learning_rate=5.0 has no effect"):
        fit(*ours, binary(24), optimizer=torch.optim.SGD(parameters(ours), lr=0.01), learning_rate=5.0,
            schedule=lambda fraction: 0.5, **OPTIONS)  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit(*theirs, binary(24), optimizer=torch.optim.SGD(parameters(theirs), lr=0.005), **OPTIONS)
    assert same(values(ours), values(theirs))


def test_a_torch_scheduler_is_the_callers_to_step():
    pair = small_pair()
    optimizer = torch.optim.SGD(parameters(pair), lr=0.1)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    with pytest.warns(UserWarning, match="fit does not step it: step it in callback="):
        history = fit(*pair, binary(24), optimizer=optimizer, callback=lambda _: scheduler.step(), **OPTIONS)
    assert history["learning_rate"] == pytest.approx([0.1, 0.05, 0.025, 0.0125])


@pytest.mark.parametrize(
    "optimizer, message",
    [
        (lambda p: torch.optim.LBFGS(p), "LBFGS, which evaluates the loss several times"),
        (lambda p: torch.optim.LBFGS, "LBFGS, which evaluates the loss several times"),
        (lambda p: torch.optim.lr_scheduler.StepLR(torch.optim.SGD(p), 1), "StepLR, a torch scheduler, wanted"),
        (lambda p: pyro.optim.Adam, r"got optimizer='Adam', wanted .*Call it: pyro.optim.Adam\("),
        (lambda p: "adam", "got optimizer='adam', wanted a torch optimiser"),
    ],
)
def test_what_is_no_optimiser_is_refused_in_one_line(optimizer, message):
    pair = small_pair()
    with pytest.raises(ValueError, match=message):
        fit(*pair, binary(24), optimizer=optimizer(parameters(pair)), **OPTIONS)


# Pyro's schedulers


def scheduler(kind, **options):
    return kind({"optimizer": torch.optim.SGD, "optim_args": {"lr": 0.01}, **options})


@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_scheduler_is_stepped_once_an_epoch(compile):
    pair = small_pair()
    steps = scheduler(pyro.optim.ExponentialLR, gamma=0.1)
    history = fit(*pair, binary(24), optimizer=steps, compile=compile, **OPTIONS)
    assert history["learning_rate"] == pytest.approx([1e-2, 1e-3, 1e-4, 1e-5])
    theirs, rates = small_pair(), iter([1e-2, 1e-3, 1e-4, 1e-5])
    fit(*theirs, binary(24), optimizer=torch.optim.SGD, learning_rate=1.0,
        schedule=lambda fraction: 10.0 ** (-2 - int(fraction * 4)), **OPTIONS)  # fmt: skip
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(values(pair), values(theirs), strict=True)) and rates


@pytest.mark.parametrize("mode", ["min", "max"])
def test_a_plateau_is_one_of_the_validation_bound_or_the_loss(mode):
    seen = []

    class Plateau(torch.optim.lr_scheduler.ReduceLROnPlateau):
        def step(self, metrics, epoch=None):
            seen.append(metrics)
            super().step(metrics, epoch)

    sign = -1 if mode == "min" else 1
    for validation in (None, binary(4, seed=1)):
        seen.clear()
        pair = small_pair()
        options = {"optimizer": torch.optim.SGD, "optim_args": {"lr": 0.01}, "patience": 0, "mode": mode}
        steps = pyro.optim.lr_scheduler.PyroLRScheduler(Plateau, options)
        history = fit(*pair, binary(24), optimizer=steps, validation=validation, **OPTIONS)
        wanted = [-loss for loss in history["loss"]] if validation is None else history["validation"]
        assert seen[:: len(parameters(pair))] == [sign * value for value in wanted]


def test_one_cycle_is_made_for_the_epochs():
    with pytest.raises(ValueError, match="OneCycleLR for 3 steps, wanted one for at least 4"):
        fit(*small_pair(), binary(24), optimizer=scheduler(pyro.optim.OneCycleLR, max_lr=0.1, total_steps=3), **OPTIONS)
    with pytest.warns(UserWarning, match="OneCycleLR is made for 16 steps, and is stepped once an epoch, 4 times"):
        fit(
            *small_pair(),
            binary(24),
            optimizer=scheduler(pyro.optim.OneCycleLR, max_lr=1e-3, total_steps=16),
            **OPTIONS,
        )


def test_rates_by_name_reach_the_parameters_of_modules():
    names = []

    def options(name):
        names.append(name)
        return {"lr": 0.0 if "Guide" in name else 0.01}

    pair = small_pair()
    start = values(pair[1:])
    fit(*pair, binary(24), optimizer=pyro.optim.Adam(options), **OPTIONS)
    assert len(names) == len(parameters(pair)) and same(start, values(pair[1:]))


# State


def half(pair, optimizer, loss=None):
    fit(*pair, binary(24), optimizer=optimizer, loss=loss, **OPTIONS)


MAKERS = {
    "adam": lambda: Fused(torch.optim.Adam, {"lr": 1e-2}),
    "adamw clipped": lambda: Fused(torch.optim.AdamW, {"lr": 1e-2, "weight_decay": 0.1}, clip_norm=1.0),
    "sgd": lambda: Fused(torch.optim.SGD, {"lr": 1e-3}),
    "momentum": lambda: Fused(torch.optim.SGD, {"lr": 1e-3, "momentum": 0.9}),
    "rmsprop": lambda: Fused(torch.optim.RMSprop, {"lr": 1e-3}),
}


@pytest.mark.parametrize("through", ["file", "state"])
@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_the_state_of_the_fused_optimiser_goes_on_to_the_bit(tmp_path, make, through):
    whole, part = small_pair(), small_pair()
    one, first, second = make(), make(), make()
    half(whole, one)
    half(whole, one)
    half(part, first)
    if through == "file":
        first.save(tmp_path / "optimizer.save")
        second.load(tmp_path / "optimizer.save")
    else:
        second.set_state(first.get_state())
    again = small_pair()  # as in another process: other tensors, and programs of other numbers
    for p, value in zip(parameters(again), values(part), strict=True):
        p.data.copy_(value)
    half(again, second)
    assert same(values(whole), values(again)) and second.count == 2 * OPTIONS["epochs"] * 4
    # What was loaded is a copy: the first one goes on from where it was.
    half(part, first)
    assert same(values(whole), values(part))


def test_the_state_under_pyros_own_svi(tmp_path):
    pair = small_pair()
    ends = []
    for interrupted in (False, True):
        pyro.clear_param_store()
        torch.manual_seed(0)
        again = small_pair()
        optimizer = Fused(torch.optim.Adam, {"lr": 1e-2})
        for step in range(6):
            if interrupted and step == 3:
                optimizer.save(tmp_path / "o.save")
                optimizer = Fused(torch.optim.Adam, {"lr": 7.0})
                optimizer.load(tmp_path / "o.save")
            SVI(*again, optimizer, Objective(num_samples=2)).step(binary())
        ends.append(values(again))
    assert same(*ends) and not same(ends[0], values(pair))


def test_moments_from_a_file_go_where_the_algorithm_wants_them():
    parameter = torch.nn.Parameter(torch.zeros(3, device="meta"))
    moments = {"step": torch.tensor(3.0), "exp_avg": torch.ones(3), "exp_avg_sq": torch.ones(3)}

    def devices(capturable):
        optimizer = Fused(torch.optim.Adam, {"lr": 1e-3, "capturable": capturable})
        optimizer.restore({"w": parameter}, {"w": moments})
        return {name: value.device.type for name, value in optimizer._optimizer.state[parameter].items()}

    assert devices(False) == {"step": "cpu", "exp_avg": "meta", "exp_avg_sq": "meta"}
    assert devices(True) == dict.fromkeys(moments, "meta")
    assert moments["step"] == 3 and moments["exp_avg"].device.type == "cpu"


def test_a_state_of_something_else_is_refused(tmp_path):
    pair = small_pair()
    optimizer = Fused(torch.optim.Adam, {"lr": 1e-2})
    half(pair, optimizer)
    state = optimizer.get_state()
    with pytest.raises(ValueError, match="the state of torch.optim.adam.Adam, wanted one of torch.optim.sgd.SGD"):
        Fused(torch.optim.SGD).set_state(state)
    theirs = pyro.optim.Adam({"lr": 1e-2})
    half(small_pair(), theirs)
    with pytest.raises(ValueError, match="Fused.get_state.. has not made"):
        Fused().set_state(theirs.get_state())
    fresh = Fused(torch.optim.Adam)
    fresh.set_state(state)
    with pytest.raises(
        ValueError, match=r"is of another pair: its 'Model.*has shape \(16, 3\), this one's \(7, 3\)|has shape"
    ):
        half(small_pair(hidden=7), fresh)
    vae = pv.VAE.build((1, 4, 4), latent_dim=3, hidden=(16, 16))
    fresh = Fused(torch.optim.Adam)
    fresh.set_state(state)
    with pytest.raises(ValueError, match="has nothing for '|is for '|has shape"):
        half((vae.model, vae.guide), fresh)
    path = tmp_path / "o.save"
    path.write_bytes(b"no state")
    with pytest.raises(ValueError, match="does not hold the state of an optimiser"):
        Fused().load(path)


def test_loading_runs_no_code(tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "trapped"), "w"))

    torch.save({"state": Trap()}, tmp_path / "o.save")
    with pytest.raises(ValueError, match="does not hold the state of an optimiser"):
        Fused().load(tmp_path / "o.save")
    assert not (tmp_path / "trapped").exists()


def test_pyros_loss_without_a_value_is_refused_by_name():
    loss = pyro.infer.TraceTailAdaptive_ELBO(num_particles=4, vectorize_particles=True, max_plate_nesting=1)
    vae = pv.VAE.build((4,), latent_dim=1, hidden=(4,))
    with pytest.raises(ValueError, match="TraceTailAdaptive_ELBO.*infinity.*renyi"):
        fit(vae.model, vae.guide, torch.zeros(8, 4), loss=loss, **OPTIONS)
