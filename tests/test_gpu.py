"""What only a GPU shows; each test is skipped where there is none. The logic of recording is tested without one."""

import contextlib

import pyro
import pytest
import torch
from pyro.infer import Trace_ELBO

from pyro_vae.data.splits import Split
from pyro_vae.inference import graphs
from pyro_vae.inference.bounds import iwae
from pyro_vae.inference.capture import Capture
from pyro_vae.inference.compiled import Compiled
from pyro_vae.inference.graphs import CudaGraph, Uncapturable
from pyro_vae.inference.objectives import Objective
from pyro_vae.inference.training import fit
from tests.pairs import binary, small_pair

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
grey = torch.randint(256, (44, 1, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@gpu
@pytest.mark.parametrize("make", [Trace_ELBO, lambda: Objective(iwae, 5)])
@pytest.mark.parametrize("data", [binary(44), Split(grey, binarization="dynamic")])
def test_a_compiled_fit_on_a_gpu_is_the_fit(make, data):
    found = []
    for loss in (Compiled(make(), compile_after=2), make()):
        model, guide = small_pair()
        history = fit(model, guide, data, loss=loss, epochs=4, batch_size=12, device="cuda", seed=0, compile=False)
        found.append(history["loss"])
    assert found[0] == pytest.approx(found[1], rel=1e-4)


@gpu
def test_a_step_is_one_recording_until_a_parameter_moves():
    model, guide = small_pair()
    loss = Compiled(Trace_ELBO(), compile_after=1)
    options = {"loss": loss, "epochs": 3, "batch_size": 12, "seed": 0, "compile": False}
    fit(model, guide, binary(48), device="cuda", **options)
    runs = [entry.capture.recording for entry in loss._graphs.values()]
    assert [type(run) for run in runs] == [CudaGraph] and runs[0].recordings == 1
    fit(model.cpu(), guide.cpu(), binary(48), device="cpu", **options)
    assert loss.reason is None


@gpu
def test_noise_that_is_drawn_in_a_recording_is_that_of_the_steps():
    """Also under a seed that is set anew, and where parameters moved and the launches are recorded again."""
    found = []
    for loss in (Compiled(Trace_ELBO(), compile_after=None), Trace_ELBO()):
        model, guide = small_pair()
        torch.manual_seed(0)
        options = {"loss": loss, "batch_size": 12, "device": "cuda", "compile": False, "progress": False}
        losses = fit(model, guide, Split(grey, binarization="dynamic"), epochs=5, **options)["loss"]
        for p in model.parameters():
            p.data = p.data.clone()
        losses += fit(model, guide, Split(grey, binarization="dynamic"), epochs=3, seed=3, **options)["loss"]
        found.append((losses, torch.rand(3, device="cuda").tolist(), torch.rand(3).tolist()))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-4)
    assert found[0][1:] == found[1][1:]


@gpu
def test_a_recording_that_cuda_refuses_spoils_nothing():
    x = torch.ones(3, device="cuda")
    with pytest.raises(RuntimeError):
        CudaGraph(lambda x: [x + x.sum().item() + torch.rand(3, device="cuda")], [x], [False], [])
    torch.manual_seed(0)
    first = torch.rand(4, device="cuda")
    torch.manual_seed(0)
    assert torch.equal(first, torch.rand(4, device="cuda"))
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    graph = CudaGraph(lambda x: [x + torch.rand(3, device="cuda")], [x], [False], [])
    torch.manual_seed(0)
    (found,) = graph(x)
    torch.manual_seed(0)
    assert torch.equal(found, x + torch.rand(3, device="cuda"))


@gpu
def test_svi_of_pyro_adds_up_gradients_that_outlive_a_replay():
    model, guide = small_pair()
    model.cuda(), guide.cuda()
    x, loss = binary(12).cuda(), Compiled(Trace_ELBO(), compile_after=1)
    found = []
    for one in (loss, Trace_ELBO()):
        torch.manual_seed(0)
        for p in [*model.parameters(), *guide.parameters()]:
            p.grad = None
        for _ in range(5):
            with pyro.validation_enabled(False):
                one.loss_and_grads(model, guide, x)
        found.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*found, strict=True):
        assert (a - b).abs().max() <= 1e-4 * b.abs().max().clamp(min=1e-3)


class FakeCuda:
    """Plays a recording by running the function again on the recorded tensors, as a GPU would."""

    current = None
    set_stream = staticmethod(lambda _: None)

    class Generator:
        """One whose state a recording that failed would make useless."""

        def __init__(self):
            self.state = self.own = object()

        def graphsafe_get_state(self):
            return self.state

        def graphsafe_set_state(self, state):
            self.state = state

        def clone_state(self):
            return object()

    default_generators = (Generator(),)

    class Stream:
        def wait_stream(self, other):
            pass

    class CUDAGraph:
        def replay(self):
            for output, new in zip(self.outputs, self.work(), strict=True):
                output.copy_(new)

    @staticmethod
    def current_stream():
        return FakeCuda.Stream()

    @staticmethod
    def stream(_):
        return contextlib.nullcontext()

    @staticmethod
    @contextlib.contextmanager
    def graph(graph):
        FakeCuda.current = graph
        yield
        FakeCuda.current = None


@pytest.fixture
def recorded(monkeypatch):
    """A counter that grows by x, recorded."""
    monkeypatch.setattr(graphs.torch, "cuda", FakeCuda)
    monkeypatch.setattr(graphs.torch.random, "fork_rng", lambda devices: contextlib.nullcontext())
    monkeypatch.setattr(graphs, "_on_one_gpu", lambda tensors: True)
    calls = []

    def run(x, total):
        calls.append(len(calls))
        if FakeCuda.current is not None:
            FakeCuda.current.work = lambda: run(x, total)
        total.add_(x)
        out = total * 10
        if FakeCuda.current is not None:
            FakeCuda.current.outputs = [out]
        return [out]

    total = torch.zeros(())
    return CudaGraph(run, [torch.ones(()), total], [False, True], [total]), total


def test_a_recording_that_fails_leaves_the_random_state_and_the_stream(recorded, monkeypatch):
    (generator,), streams = FakeCuda.default_generators, []
    monkeypatch.setattr(FakeCuda, "set_stream", staticmethod(streams.append))

    def fails(x):
        if FakeCuda.current is not None:
            assert generator.state is not generator.own  # what is spoilt here is a copy
            raise RuntimeError("operation not permitted when stream is capturing")
        return [x]

    with pytest.raises(RuntimeError, match="not permitted"):
        CudaGraph(fails, [torch.ones(())], [False], [])
    assert generator.state is generator.own and len(streams) == 1


def captured(function, *args):
    return Capture(lambda *tensors: [function(*tensors)], list(args))


def test_what_waits_for_a_gpu_or_draws_elsewhere_is_not_recorded():
    square = torch.eye(3) * 2
    for function, why in (
        (lambda x: torch.linalg.cholesky(x), "linalg_cholesky_ex, for which a GPU is waited for"),
        (lambda x: torch.cholesky_solve(x, x), "cholesky_solve, for which a GPU is waited for"),
        (lambda x: x + torch.rand(3), "it draws noise on cpu"),
    ):
        with pytest.raises(Uncapturable, match=why):
            captured(function, square).record([square])
    for function in (torch.linalg.vector_norm, lambda x: torch.linalg.solve_triangular(x, x, upper=False)):
        with pytest.raises(RuntimeError, match="wanted one GPU"):  # nothing else is in the way
            captured(function, square).record([square])


def test_recording_leaves_what_the_function_changes_as_it_was(recorded):
    graph, total = recorded
    assert total == 0 and graph.recordings == 1


def test_inputs_are_copied_and_results_are_tensors_of_their_own(recorded):
    graph, total = recorded
    (first,) = graph(torch.tensor(2.0), total)
    (second,) = graph(torch.tensor(3.0), total)
    assert (first.item(), second.item(), total.item(), graph.recordings) == (20.0, 50.0, 5.0, 1)


def test_a_tensor_that_moved_is_recorded_anew(recorded):
    graph, total = recorded
    graph(torch.tensor(2.0), total)
    total.data = torch.tensor(7.0)
    (out,) = graph(torch.tensor(1.0), total)
    assert (out.item(), total.item(), graph.recordings) == (80.0, 8.0, 2)


def test_tensors_of_several_devices_are_refused():
    with pytest.raises(RuntimeError, match=r"tensors lie on \['cpu'\], wanted one GPU"):
        CudaGraph(lambda x: [x], [torch.ones(2)], [False], [])


WAITS = (
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "equal",
    "is_nonzero",
    "unique",
)  # a GPU has to be waited for


def on_meta(module):
    """The graph on tensors that have shapes and no numbers: whatever reads a number fails there."""
    graph = torch.fx.Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    for node in graph.nodes:
        if "device" in node.kwargs:
            node.kwargs = node.kwargs | {"device": torch.device("meta")}
    values = [node.meta["val"] for node in module.graph.nodes if node.op == "placeholder"]
    inputs = [torch.empty_strided(v.shape, v.stride(), dtype=v.dtype, device="meta") for v in values]
    return torch.fx.GraphModule({}, graph)(*inputs)


@pytest.mark.parametrize(
    "make", [Trace_ELBO, lambda: Objective(iwae, 5), lambda: Objective(iwae, 5, estimator="doubly-reparameterized")]
)
@pytest.mark.parametrize("data", [binary(44), Split(grey, binarization="dynamic")])
@pytest.mark.parametrize("clip_norm", [None, 1.0])
def test_no_step_reads_a_number_that_a_gpu_would_have_to_be_waited_for(make, data, clip_norm):
    loss, (model, guide) = Compiled(make(), compile_after=None), small_pair()
    fit(model, guide, data, loss=loss, epochs=4, batch_size=11, seed=0, compile=False, clip_norm=clip_norm)
    assert loss.reason is None and loss._graphs
    for entry in loss._graphs.values():
        whole = entry.training is not None and entry.training.update is not None  # with the optimiser's step
        assert whole or isinstance(loss.inner, Objective) and loss.inner.estimator == "doubly-reparameterized"
        names = {
            node.target.__name__.split(".")[0] for node in entry.capture.module.graph.nodes if callable(node.target)
        }
        assert not names & set(WAITS)
        found = on_meta(entry.capture.module)
        assert [f.device.type for f in found] == ["meta"] * len(found) and found


def test_a_step_that_would_wait_is_told_from_one_that_does_not():
    def waits(x):
        return [x.nonzero().sum()]

    graph = torch.fx.experimental.proxy_tensor.make_fx(waits)(torch.ones(3))
    with pytest.raises((RuntimeError, NotImplementedError), match="nonzero"):
        on_meta(graph)
