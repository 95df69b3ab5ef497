"""Which library multiplies the matrices of a graph: measured once, kept, and of no effect on numbers but rounding."""

import json
import math

import pytest
import torch

import pyro_vae as pv
from pyro_vae.inference import products
from pyro_vae.inference.capture import Capture
from pyro_vae.inference.compiled import Compiled
from pyro_vae.inference.hardware import DEFAULT, ONEDNN, medium_is_exact, multiplied_by
from pyro_vae.inference.products import Choice, Product
from tests.pairs import binary, small_pair

both = pytest.mark.skipif(not medium_is_exact(), reason="oneDNN is not as exact as torch's default here")


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A place of its own for choices, and nothing known."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(products, "_known", {})
    monkeypatch.setattr(products, "_wanted", {})
    return tmp_path / "pyro_vae_products"


def timed(seconds, calls=None):
    """In place of the clock: these seconds by each library."""

    def instead(node, kind, times, libraries, share):
        if calls is not None:
            calls.append(kind)
        return Product(kind, times, 1.0, {library: seconds[library] for library in libraries})

    return instead


def graph_of(rows=6):
    weight = torch.ones(5, 4)
    return Capture(lambda x: [(x @ weight).sum(), (x @ weight.exp()).sum()], [torch.ones(rows, 5)])


@both
@pytest.mark.parametrize("faster, slower", [(DEFAULT, ONEDNN), (ONEDNN, DEFAULT)])
def test_the_faster_library_is_taken_and_its_name_kept(place, monkeypatch, faster, slower):
    calls = []
    monkeypatch.setattr(products, "_timed", timed({faster: 1.0, slower: 1.01}, calls))
    choice = graph_of().choice
    assert choice.library == faster and choice.seconds() == 2.0 and choice.seconds(slower) == 2.02
    assert calls == ["mm(6x5 float32, 5x4 float32)"]  # two products of one kind are timed once
    assert [p.times for p in choice.products] == [2]
    (file,) = place.iterdir()
    assert json.loads(file.read_text())["library"] == faster
    # In another process it is read, and no clock is asked.
    monkeypatch.setattr(products, "_known", {})
    monkeypatch.setattr(products, "_timed", None)
    assert graph_of().choice == choice


@both
def test_who_measures_first_decides_for_all(place, monkeypatch):
    first = []

    def slower_than_another(node, kind, times, libraries, share):
        place.mkdir(exist_ok=True)
        seconds = {DEFAULT: 1.0, ONEDNN: 2.0}
        key = first[0]
        other = {"library": DEFAULT, "products": [Product(kind, times, 1.0, seconds)]}
        (place / f"{key}.json").write_text(json.dumps(other))
        return Product(kind, times, 1.0, {DEFAULT: 2.0, ONEDNN: 1.0})

    monkeypatch.setattr(products, "_timed", timed({DEFAULT: 1.0, ONEDNN: 1.0}))
    first.append(graph_of().choice.key)
    (place / f"{first[0]}.json").unlink()
    monkeypatch.setattr(products, "_known", {})
    monkeypatch.setattr(products, "_timed", slower_than_another)
    assert graph_of().choice.library == DEFAULT


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"library": "rm -rf", "products": []}', b'{"library": "oneDNN"}',
     b'{"library": "oneDNN", "products": [[1, 2]]}', b'{"library": ["oneDNN"], "products": "xx"}',
     b'{"library": "oneDNN", "products": [["mm", 1, 1, {"oneDNN": "soon"}]]}', b"9" * 5000, b"[" * 100_000, b" " * 2**21,
     b'{"library": "oneDNN", "products": [["mm", 1e999, 1, {}]]}'],
)  # fmt: skip
def test_a_file_that_cannot_be_read_is_measured_anew_and_replaced(place, monkeypatch, content):
    monkeypatch.setattr(products, "_timed", timed({DEFAULT: 1.0, ONEDNN: 2.0}))
    (choice, key) = (graph_of().choice, graph_of().choice.key)
    file = place / f"{key}.json"
    file.write_bytes(content)
    monkeypatch.setattr(products, "_known", {})
    assert graph_of().choice == choice
    assert json.loads(file.read_text())["library"] == DEFAULT


def test_without_a_disk_it_holds_for_the_process(place, monkeypatch):
    calls = []
    monkeypatch.setattr(products, "_timed", timed({DEFAULT: 1.0, ONEDNN: 2.0}, calls))
    place.parent.joinpath("pyro_vae_products").write_text("a file where the folder would be")
    assert graph_of().choice.library == graph_of().choice.library == DEFAULT
    assert len(calls) == 1


def test_other_shapes_threads_and_instructions_are_other_choices(place, monkeypatch):
    monkeypatch.setattr(products, "_timed", timed({DEFAULT: 1.0, ONEDNN: 2.0}))
    keys = [graph_of().choice.key, graph_of(7).choice.key]
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        keys.append(graph_of().choice.key)
    finally:
        torch.set_num_threads(threads)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    keys.append(graph_of().choice.key)
    assert len(set(keys)) == 4


def test_each_is_called_a_few_times_and_the_random_state_stays(place):
    called = []

    def counted(x):
        called.append(multiplied_by)
        return [x @ x]

    torch.manual_seed(3)
    state = torch.get_rng_state()
    choice = Capture(counted, [torch.ones(64, 64)]).choice
    assert len(called) == 1 and torch.equal(torch.get_rng_state(), state)
    (product,) = choice.products
    assert product.operations == 2 * 64**3
    assert all(0 < seconds < math.inf for seconds in product.seconds.values())


def test_what_is_spread_over_itself_is_timed_and_so_is_nothing(place):
    row = torch.ones(1, 5)

    def function(x):
        return [x @ row.expand(5, 5), torch.bmm(x.expand(3, 6, 5), x.t().expand(3, 5, 6)), x[:0] @ row.t()]

    choice = Capture(function, [torch.ones(6, 5)]).choice
    assert sorted(p.name.split("(")[0] for p in choice.products) == ["bmm", "mm", "mm"]
    assert choice.operations == 2 * 6 * 5 * 5 + 2 * 3 * 6 * 6 * 5


@both
def test_a_library_is_taken_whatever_is_around_and_the_setting_put_back():
    for outer in ("highest", "medium"):
        torch.set_float32_matmul_precision(outer)
        try:
            for library, name in ((DEFAULT, "highest"), (ONEDNN, "medium"), (None, outer)):
                with multiplied_by(library):
                    assert torch.get_float32_matmul_precision() == name
            assert torch.get_float32_matmul_precision() == outer
        finally:
            torch.set_float32_matmul_precision("highest")
    torch.set_float32_matmul_precision("high")  # what the user asked for, and neither library keeps
    try:
        with multiplied_by(ONEDNN):
            assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


def fitted(monkeypatch, library, epochs=6, **options):
    monkeypatch.setattr(products, "_known", {})
    monkeypatch.setattr(products, "_wanted", {})
    other = {DEFAULT: ONEDNN, ONEDNN: DEFAULT}[library]
    monkeypatch.setattr(products, "_timed", timed({library: 1.0, other: 2.0}))
    torch.manual_seed(0)
    model, guide = small_pair()
    loss = Compiled(pv.Objective(pv.elbo), compile_after=None)
    history = pv.fit(
        model, guide, binary(96), loss=loss, epochs=epochs, batch_size=16, seed=0, progress=False, compile=False, **options
    )  # fmt: skip
    return history, [p.detach().clone() for p in (*model.parameters(), *guide.parameters())]


@both
def test_fits_by_either_library_are_the_same_but_for_rounding_and_say_which_it_was(tmp_path, monkeypatch):
    found = {}
    for library in (DEFAULT, ONEDNN):
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / library))
        history, weights = fitted(monkeypatch, library)
        assert history.products == [library]
        found[library] = history["loss"], weights
    assert found[DEFAULT][0] == pytest.approx(found[ONEDNN][0], rel=1e-5)
    for one, two in zip(found[DEFAULT][1], found[ONEDNN][1], strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


def test_steps_of_the_programs_name_no_library():
    history = pv.fit(*small_pair(), binary(20), epochs=1, seed=0, progress=False, compile=False)
    assert history.products == []


@both
@pytest.mark.parametrize("library", [DEFAULT, ONEDNN])
def test_a_fit_goes_on_by_the_library_of_its_checkpoint(tmp_path, monkeypatch, library):
    other = {DEFAULT: ONEDNN, ONEDNN: DEFAULT}[library]
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "one"))
    checkpoint = tmp_path / "fit.safetensors"

    def stop(record):
        if record["epoch"] == 3:
            raise KeyboardInterrupt

    fitted(monkeypatch, library, checkpoint=checkpoint, callback=stop)
    # Another place, where the other library would be found faster.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "two"))
    history, _ = fitted(monkeypatch, other, checkpoint=checkpoint)
    assert len(history) == 6 and history.products == [library]


def test_a_choice_adds_up_its_products():
    rows = (Product("a", 2, 10.0, {DEFAULT: 1.0, ONEDNN: 3.0}), Product("b", 1, 5.0, {DEFAULT: 4.0, ONEDNN: 1.0}))
    choice = Choice("key", ONEDNN, rows)
    assert (choice.seconds(), choice.seconds(DEFAULT), choice.operations) == (7.0, 6.0, 25.0)
