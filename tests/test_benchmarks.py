"""The benchmark's peers compute the same numbers, and its tables the right ratios."""

import dataclasses
import importlib.util
import math
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyro
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import cores  # noqa: E402
import sections  # noqa: E402
import summary  # noqa: E402
from peers import Problem, by_hand, ours, pieces, pyro_idiom, weights  # noqa: E402
from peers.networks import take  # noqa: E402
from rounds import Group, Peer, Row, Timing, run_group  # noqa: E402

SMALL = Problem(hidden=(12, 9), latent=3, activation="tanh", batch_size=6)
IWAE_7 = dataclasses.replace(SMALL, num_samples=7)
CONVOLUTIONAL = Problem(network="convolutional", latent=3, batch_size=6)
FAKE = """
import os

def build(pixels, problem, calls=10, die=False):
    def epoch():
        nonlocal calls
        calls -= 1
        if calls < 0 and die:
            os._exit(1)
        if calls < 0:
            raise RuntimeError("it | broke\\nand more")
        return len(pixels), -1.5 - ("SOME_CACHE" in os.environ)
    return epoch
"""


def pixels_of(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 784), dtype=np.uint8)


def batch_of(problem: Problem) -> torch.Tensor:
    return torch.from_numpy(pixels_of(problem.batch_size) >= 128).float()


def give_ours(by: torch.nn.Module, problem: Problem) -> tuple:
    """Our pair, and its weights put into a peer of torch."""
    model, guide = ours.pair(problem)
    with torch.no_grad():  # from small weights images are all alike, and so are networks
        for parameter in (*model.parameters(), *guide.parameters()):
            parameter *= 2
    linear = [m for m in guide.modules() if hasattr(m, "weight")]
    loc, log_scale = (half for half in zip(linear[-1].weight.chunk(2), linear[-1].bias.chunk(2), strict=True))
    found = [(m.weight, m.bias) for m in linear[:-1]] + [loc, log_scale]
    found += [(m.weight, m.bias) for m in model.modules() if hasattr(m, "weight")]
    theirs = [m for part in (by.encoder, by.decoder) for m in part.modules() if hasattr(m, "weight")]
    with torch.no_grad():
        for layer, (weight, bias) in zip(theirs, found, strict=True):
            layer.weight.copy_(weight)
            layer.bias.copy_(bias)
    return model, guide


def our_loss(problem: Problem, loss, model, guide, x: torch.Tensor) -> float:
    torch.manual_seed(3)
    shaped = x.view(-1, 1, 28, 28) if problem.network == "convolutional" else x
    return loss.loss(model, guide, shaped)


@pytest.mark.parametrize("problem", [SMALL, CONVOLUTIONAL], ids=str)
def test_torch_by_hand_has_our_elbo_at_the_same_weights_and_noise(problem):
    peer, x = by_hand.VAE(problem), batch_of(problem)
    model, guide = give_ours(peer, problem)
    torch.manual_seed(3)
    theirs = peer.loss(x).item()
    # By hand the KL is in closed form, and so it is in Pyro's TraceMeanField_ELBO.
    assert theirs == pytest.approx(our_loss(problem, TraceMeanField_ELBO(), model, guide, x), rel=1e-6)
    assert abs(theirs - our_loss(problem, Trace_ELBO(), model, guide, x)) > 1e-3


@pytest.mark.parametrize("problem", [SMALL, CONVOLUTIONAL], ids=str)
@pytest.mark.parametrize("logits", [True, False])
def test_the_pyro_idiom_has_our_elbo_at_the_same_weights_and_noise(problem, logits):
    pyro.clear_param_store()
    peer, x = pyro_idiom.VAE(problem, logits=logits), batch_of(problem)
    model, guide = give_ours(peer, problem)
    torch.manual_seed(3)
    theirs = pyro_idiom.bound(problem).loss(peer.model, peer.guide, x)
    assert theirs == pytest.approx(our_loss(problem, Trace_ELBO(), model, guide, x), rel=1e-5)


def test_all_of_torch_have_our_importance_weighted_bound_and_its_gradient():
    problem = IWAE_7
    pyro.clear_param_store()
    by, idiom, x = by_hand.VAE(problem), pyro_idiom.VAE(problem, logits=True), batch_of(problem)
    model, guide = give_ours(by, problem)
    idiom.load_state_dict(by.state_dict())
    torch.manual_seed(3)
    loss = by.loss(x)
    loss.backward()
    torch.manual_seed(3)
    pyros = pyro_idiom.bound(problem).loss_and_grads(idiom.model, idiom.guide, x)
    torch.manual_seed(3)
    value = ours.loss_of(problem).loss_and_grads(model, guide, x)
    assert loss.item() == pytest.approx(value, rel=1e-6) and pyros == pytest.approx(value, rel=1e-6)
    last = [m for m in model.modules() if hasattr(m, "weight")][-1].weight.grad
    for peer in (by, idiom):
        # float32 knows a log weight of -540 to 6e-5, and with it w_k / sum w.
        assert (peer.decoder[-1].weight.grad - last).norm() < 2e-4 * last.norm()


@pytest.mark.filterwarnings("ignore")
def test_jit_has_the_elbo_of_the_plain_loss_for_a_shorter_batch_too():
    # In expectation: a traced function draws in another order.
    pyro.clear_param_store()
    peer, x = pyro_idiom.VAE(SMALL, logits=True), batch_of(SMALL)
    jit, plain = pyro_idiom.bound(SMALL, jit=True), Trace_ELBO()
    torch.manual_seed(0)
    for part in (x, x[:4]):
        pairs = [[loss.loss_and_grads(peer.model, peer.guide, part) for loss in (jit, plain)] for _ in range(40)]
        theirs, ours_ = torch.tensor(pairs, dtype=torch.float64).T
        assert abs(theirs.mean() - ours_.mean()) < 4 * ((theirs.var() + ours_.var()) / len(pairs)) ** 0.5


def log_weights(problem: Problem, x: torch.Tensor, repeats: int) -> torch.Tensor:
    """log 1/K sum_k w_k of a batch, summed over its data, again and again."""
    peer = by_hand.VAE(problem)
    for name, layers in weights(problem).items():
        take(getattr(peer, name), layers)
    torch.manual_seed(0)
    with torch.no_grad():
        weight = peer.log_weight(x, repeats * problem.num_samples).double()
    groups = weight.view(repeats, problem.num_samples, -1)
    return (groups.logsumexp(1) - math.log(problem.num_samples)).sum(-1)


def test_all_evaluations_estimate_the_same_log_likelihood():
    problem = dataclasses.replace(SMALL, batch_size=1, num_samples=50)
    pixels = pixels_of(5)
    draws = log_weights(problem, torch.from_numpy(pixels >= 128).float(), 200) / len(pixels)
    names = [by_hand, pyro_idiom, ours]
    if importlib.util.find_spec("numpyro"):
        from peers import numpyro_idiom

        names.append(numpyro_idiom)
    for module in names:
        call = module.evaluation(pixels, problem)
        values = torch.tensor([call()[1] for _ in range(8)], dtype=torch.float64)
        error = draws.std() * (1 / 8 + 1 / len(draws)) ** 0.5
        assert abs(values.mean() - draws.mean()) < 4 * error, module.__name__
        # Fresh noise in every call, and as much of it as K samples make.
        assert 0.25 < values.std() / draws.std() < 2.5, module.__name__


def test_numpyros_convolutions_have_our_shapes():
    pytest.importorskip("numpyro")
    import jax
    from peers import numpyro_idiom

    def shape_of(network, *shape):
        init, apply = network
        params = jax.eval_shape(lambda key: init(key, shape)[1], jax.random.PRNGKey(0))
        sizes = sorted(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
        out = jax.eval_shape(apply, params, jax.ShapeDtypeStruct(shape, np.float32))
        return sizes, jax.tree.map(lambda leaf: leaf.shape, out)

    hand = by_hand.VAE(CONVOLUTIONAL)
    sizes, (loc, scale) = shape_of(numpyro_idiom._encoder(CONVOLUTIONAL), 6, 784)
    assert loc == scale == (6, 3) and sizes == sorted(p.numel() for p in hand.encoder.parameters())
    sizes, logits = shape_of(numpyro_idiom._decoder(CONVOLUTIONAL), 6, 3)
    assert logits == (6, 784) and sizes == sorted(p.numel() for p in hand.decoder.parameters())


def test_the_matmul_floor_has_the_flops_of_forward_and_backward():
    from torch.utils.flop_counter import FlopCounterMode

    for problem in (Problem(), IWAE_7):
        with FlopCounterMode(display=False) as counter:
            x = torch.zeros(problem.batch_size, 784)
            by_hand.VAE(problem).loss(x).backward()  # its two heads of the encoder are one of ours, of both widths
        assert sum(2 * m * k * n for _, m, k, n in pieces.products(problem)) == counter.get_total_flops()


def timings(*rates: float, rounds=None) -> list[Timing]:
    rounds = range(len(rates)) if rounds is None else rounds
    return [Timing(n, 100, 100 / rate, -90.0 - n, 500.0 + n) for n, rate in zip(rounds, rates, strict=True)]


def test_the_distance_of_the_cores_stands_above_the_table():
    apart = [
        dataclasses.replace(timing, cores=cores) for timing, cores in zip(timings(1.0, 2.0), (1.0, 2.5), strict=True)
    ]
    assert summary.apart(apart) == ", cores 1.8 (1.0-2.5) apart" and summary.apart(timings(1.0)) == ""
    row = summary.summarise(Row("a", "a", "m"), apart, {})
    assert row["cores_apart"] == [1.0, 2.5]


@pytest.mark.skipif(len(getattr(os, "sched_getaffinity", lambda _: {0})(0)) < 2, reason="one core")
def test_cores_have_a_distance_and_the_threads_go_where_they_may():
    before = os.sched_getaffinity(0)
    assert 0.1 < cores.distance() < 100 and os.sched_getaffinity(0) == before


def test_ratios_are_formed_within_rounds():
    # A machine that became three times as slow: medians over rounds would give 20 / 10 = 2 and 20 / 30.
    mine, theirs = timings(60, 20, 20), timings(30, 10, 10)
    assert summary.ratio(mine, theirs) == pytest.approx({"median": 2, "min": 2, "max": 2})
    # Rounds that only one of them has do not count.
    assert summary.ratio(timings(8, 9, rounds=[1, 2]), timings(1, 2, 4, rounds=[0, 1, 3]))["median"] == pytest.approx(4)
    assert summary.ratio(timings(8, rounds=[0]), timings(8, rounds=[1])) is None
    result = summary.summarise(Row("a", "A", "m"), mine, {"pyro": theirs})
    assert result["median"] == pytest.approx(20) and result["value"] == -92.0 and result["memory_mb"] == 502.0
    assert result["ratios"]["pyro"]["median"] == pytest.approx(2)


def test_what_pieces_do_not_explain_is_formed_within_rounds():
    times = {"whole": {0: 100.0, 1: 300.0, 2: 7.0}, "a": {0: 60.0, 1: 180.0}, "b": {0: 30.0, 1: 90.0, 3: 1.0}}
    assert sections.differences(times, "whole", ["a", "b"]) == pytest.approx([10, 30])
    assert sections.differences(times, "whole", ["a", "missing"]) == []
    peer = type("P", (), {"row": Row("a", "A", "m"), "error": None, "timings": timings(1e6)})
    assert sections.step_times([peer], 128) == {"a": {0: pytest.approx(128)}}


def test_a_table_shows_reasons_and_rates():
    rows = [
        summary.summarise(Row("pyro", "Pyro", "m"), timings(10, 20), {"pyro": timings(10, 20)}, None, 2),
        summary.summarise(Row("b", "B", "m"), timings(30), {"pyro": timings(10, 20)}, "ValueError: a | b"),
        summary.summarise(Row("c", "C", "m"), [], {}),
    ]
    text = summary.rates_table(rows, "ELBO").splitlines()
    assert text[0] == "|  | images/s | min-max | × Pyro (min-max) | ELBO | peak MB |"
    assert text[2] == "| Pyro, num_workers=2 | 15 | 10-20 | 1.00 (1.00-1.00) | -91.00 | 501 |"
    assert text[3] == "| B | failed: ValueError: a \\| b |  |  |  |  |" and "no round finished" in text[4]
    assert len({line.replace("\\|", "").count("|") for line in text}) == 1


@pytest.fixture(scope="module")
def fake_rows(tmp_path_factory):
    """Rows that need no torch, so that their processes start at once; one breaks, one dies, one is not there."""
    folder = tmp_path_factory.mktemp("fake")
    (folder / "fake_peer.py").write_text(FAKE)
    sys.path.insert(0, str(folder))
    yield (
        Row("pyro", "Good", "fake_peer"),
        Row("breaks", "Breaks", "fake_peer", {"calls": 2}),
        Row("dies", "Dies", "fake_peer", {"calls": 2, "die": True}),
        Row("absent", "Absent", "no_such_module"),
        Row("optional", "Optional", "fake_peer", needs="no_such_module"),
        Row("option", "Wrong option", "fake_peer", {"nonsense": 1}),
    )
    sys.path.remove(str(folder))


def test_a_row_that_fails_says_why_and_does_not_stop_the_others(fake_rows):
    group = Group("g", Problem(batch_size=10), fake_rows, images=300, rounds=3)
    assert group.warm_up == 1
    said = []
    peers = run_group(group, pixels_of(400), threads=1, say=said.append)
    results = {r["row"]: r for r in summary.summarise_all(peers)}
    assert len(results["pyro"]["images_per_second"]) == 3 and results["pyro"]["value"] == -1.5
    assert [t.images for t in peers[0].timings] == [300] * 3
    assert results["breaks"]["error"] == "RuntimeError: it | broke"
    assert len(peers[1].timings) == 1  # and a warm-up
    assert results["dies"]["error"] == "its process died"
    assert "no_such_module" in results["absent"]["error"] and "not installed" in results["optional"]["error"]
    assert "nonsense" in results["option"]["error"]
    assert said[-1].startswith("round 3")


def test_a_spent_budget_leaves_the_first_round(fake_rows):
    group = Group("g", Problem(batch_size=10), fake_rows[:1], images=100, rounds=5)
    (peer,) = run_group(group, pixels_of(100), threads=1, deadline=0.0)
    assert len(peer.timings) == 1 and group.warm_up == 3


def test_a_process_starts_with_its_own_environment_and_memory(fake_rows, tmp_path):
    ballast = np.ones(2**27 // 8)  # which the parent holds
    peer = Peer(fake_rows[0], pixels_of(10), Problem(), 1, environment={"SOME_CACHE": str(tmp_path)})
    peer.call(0)
    peer.stop()
    assert peer.error is None and peer.build_seconds > 0 and peer.timings[0].value == -2.5
    if sys.platform == "linux":
        assert 10 < peer.timings[0].memory < 128 + 0 * ballast.size  # not what this process has held


def test_time_to_a_quality_counts_the_warm_up_as_an_epoch():
    timings = [Timing(n, 100, s, v, 1.0) for n, (s, v) in enumerate([(2.0, -120.0), (3.0, -104.0), (2.5, -100.0)])]
    assert sections.until(timings, -105.0) == (3, 2.0 + 3.0 + 2.5)
    assert sections.until(timings, -99.0) is None and sections.until([], -105.0) is None


def test_sections_name_their_rows_once_and_measure_on_whole_batches():
    for section in sections.sections("cpu"):
        for group in section.groups:
            keys = [row.key for row in group.rows]
            assert len(set(keys)) == len(keys) and group.images >= group.problem.batch_size
            for row in group.rows:
                assert row.module.startswith("peers.") and importlib.util.find_spec(row.module)
    on_gpu = [row for s in sections.sections("cuda") for g in s.groups for row in g.rows if row.module == "peers.ours"]
    assert {row.options.get("precision") for row in on_gpu if row.function == "build"} == {"high", "bfloat16"}


def finished(row: Row, *rates: float, error: str | None = None) -> SimpleNamespace:
    return SimpleNamespace(row=row, timings=timings(*rates), error=error, workers=None)


def test_the_profile_explains_a_step_by_its_pieces():
    (section,) = [s for s in sections.sections("cpu") if s.name == "profile"]
    (group,) = section.groups
    micros = {"matmul-highest": 900, "matmul-medium": 400, "matmul-bfloat16": 200, "batch": 100, "noise": 20,
              "graph": 1_500, "adam": 250, "ours-compiled": 2_000, "numpyro": 2_200}  # fmt: skip
    peers = [
        finished(row, *[128e6 / micros[row.key]] * 2) if row.key in micros else finished(row, error="E: no | bf16")
        for row in group.rows
    ]
    text = section.render(section.groups, [peers])
    cells = {line.split(" | ")[0]: line.split(" | ")[1:] for line in text.splitlines()}
    assert cells["| gather and binarise"] == ["100", "100-100", "5 % |"]
    assert cells["| of the graph, beyond its matmuls (medium)"][0] == "1,100"
    assert cells["| of the whole step, beyond its matmuls (medium)"][0] == "1,600"
    assert cells["| of the whole step, beyond batch, graph, adam"][:2] == ["150", "150-150"]
    assert "failed: E: no \\| bf16" in text
    # Nothing to subtract from where `fit` failed: dashes, not an error.
    broken = [finished(p.row, error="E") if p.row.key.startswith("ours") else p for p in peers]
    assert "beyond batch, graph, adam |  |  |  |" in section.render(section.groups, [broken])


def test_the_scaling_table_has_a_line_for_each_point():
    (section,) = [s for s in sections.sections("cpu") if s.name == "scaling"]
    rates = {"pyro": (10, 5), "numpyro": (40, 20), "ours-compiled": (50, 25)}
    peers = [[finished(row, *rates[row.key]) for row in group.rows] for group in section.groups]
    peers[1][1].error = "ValueError: no"
    lines = section.render(section.groups, peers).splitlines()[4:]
    assert lines[0] == "| batch 32, latent 50, K = 1 | 38 | 8 | 30 | 5.00 (5.00-5.00) | 1.25 (1.25-1.25) |"
    assert lines[1] == "| batch 128, latent 50, K = 1 | 38 | 8 | failed: ValueError: no | 5.00 (5.00-5.00) |  |"
    assert [line.split(" | ")[0][2:] for line in lines] == [group.title for group in section.groups]


@pytest.mark.parametrize(
    ("family", "model", "name"), [(25, 17, "zen4"), (25, 1, "zen3"), (25, 0x21, "zen3"), (26, 2, "zen5"), (23, 49, "zen2")]
)  # fmt: skip
def test_a_processor_has_a_class(family, model, name):
    info = {"vendor_id": "AuthenticAMD", "cpu family": str(family), "model": str(model), "model name": "AMD EPYC"}
    assert summary.class_of(info) == name
    assert (
        summary.class_of({"model name": "Intel(R) Xeon(R) 8481C CPU @ 2.70GHz"}) == "intel-r-xeon-r-8481c-cpu-2-70ghz"
    )


def test_the_speed_of_a_product_is_that_of_one():
    before = torch.get_num_threads()
    assert 1 < summary.product_speed(1, size=256) < 10_000 and torch.get_num_threads() == before


def test_a_row_stands_beside_the_floor():
    rows = [Row("floor", "floor", "m"), Row("ours", "ours", "m")]
    peers = [finished(rows[0], 100.0, 200.0), finished(rows[1], 60.0, 100.0)]
    text = summary.rates_table(summary.summarise_all(peers), "ELBO").splitlines()
    assert text[0] == "|  | images/s | min-max | of the floor (min-max) | ELBO | peak MB |"
    assert "0.55 (0.50-0.60)" in text[3]
