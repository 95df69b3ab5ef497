"""The page of a run holds what the pair is, loads nothing from outside, and lets nothing from data become code."""

import base64
import functools
import hashlib
import html
import json
import re
import zlib

import numpy as np
import pytest
import torch
from torch import nn

import pyro_vae as pv
from pyro_vae.app.cli import main
from pyro_vae.app.explore import contents
from pyro_vae.app.explore.contents import DRAWS, payload
from pyro_vae.app.explore.decoder import layers, link, rounding
from pyro_vae.app.explore.document import KINDS, LIMIT, Arrays, page

HOSTILE = '</script><script>window.hacked=1</script><img src="https://evil.example/x.png" onerror="window.hacked=1">\u2028{{script}}'
ABOUT = {"title": "A run", "dataset": "made up"}


def unpacked(packed, table):
    """What the page makes of it: the arrays, floats as float32."""
    block = zlib.decompress(base64.b64decode(packed), -15)
    found = []
    for entry in table:
        count = int(np.prod(entry["shape"], dtype=int))
        flat = np.frombuffer(block, KINDS[entry["kind"]], count, entry["start"]).reshape(entry["shape"])
        found.append(torch.from_numpy(flat.copy() if entry["kind"] == "u1" else flat.astype(np.float32)))
    return found


def split(count=30, shape=(1, 6, 5), labels=3):
    x = (torch.rand(count, *shape, generator=torch.Generator().manual_seed(0)) < 0.4).float()
    return pv.Split(x, labels=None if labels is None else torch.arange(count) % labels)


def built(shape=(1, 6, 5), **options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return pv.VAE.build(shape, **({"latent_dim": 3, "hidden": (8,)} | options)).eval()


def of(text, name):
    return re.search(rf'<script type="[a-z/]+" id="{name}">(.*?)</script>', text, re.S)[1]


def test_weights_and_data_come_back(tmp_path):
    vae, data = built(), split()
    shown, packed = payload(vae, data, about=ABOUT, names=("zero", "one", "two"))
    text = page(shown, packed)
    again = json.loads(of(text, "data"))
    assert again == json.loads(json.dumps(shown))
    arrays = unpacked(of(text, "arrays"), again["arrays"])
    linears = [layer for layer in again["decoder"]["layers"] if layer["op"] == "linear"]
    state = [value for module in vae.model.likelihood.decoder.modules() if isinstance(module, nn.Linear)
             for value in (module.weight, module.bias)]  # fmt: skip
    kept = [arrays[layer[key]] for layer in linears for key in ("weight", "bias")]
    assert again["decoder"]["weights"] == "f2" and len(kept) == len(state) == 4
    for got, wanted in zip(kept, state, strict=True):
        assert torch.equal(got, wanted.detach().half().float())
    assert torch.equal(arrays[again["codes"]], vae.encode(data, seed=0))
    assert torch.equal(arrays[again["images"]].float() / 255, data[:])
    q = vae.posterior(data)
    assert torch.allclose(arrays[again["posterior"]["array"]], q.stddev, rtol=1e-3)
    checked = arrays[again["check"]["z"]]
    assert torch.allclose(arrays[again["check"]["x"]], vae.decode(checked).mean, atol=1e-6)
    assert again["names"] == {"0": "zero", "1": "one", "2": "two"} and again["labels"] == data.labels.tolist()
    wanted = vae.encode(data, seed=0).double().var(0)
    assert again["activity"] == pytest.approx(wanted.tolist(), abs=1e-5)


def test_the_components_are_those_of_the_codes():
    vae, data = built(), split()
    shown, packed = payload(vae, data, about=ABOUT)
    rows = unpacked(packed, shown["arrays"])[shown["components"]].double()
    assert torch.allclose(rows @ rows.T, torch.eye(2).double(), atol=1e-6)
    z = vae.encode(data, seed=0).double()
    variances = torch.linalg.eigvalsh(z.T.cov()).flip(0)
    assert torch.allclose((z @ rows.T).var(0), variances[:2], rtol=1e-4)


@pytest.mark.parametrize("count", [1, 2])
def test_a_datum_or_two_have_a_page(count):
    shown, packed = payload(built(), split(count, labels=None), about=ABOUT)
    rows = unpacked(packed, shown["arrays"])[shown["components"]]
    assert torch.allclose(rows @ rows.T, torch.eye(2), atol=1e-6) and page(shown, packed)


@pytest.mark.parametrize(
    "posterior, name, size",
    [("diagonal", "deviations", (3,)), ("full", "covariances", (3, 3)), ("low-rank", "covariances", (3, 3)),
     ("iaf", "draws", (DRAWS, 3)), ("mixture", "draws", (DRAWS, 3)), ("planar", "draws", (DRAWS, 3))],
)  # fmt: skip
def test_posteriors_are_ellipses_or_clouds(posterior, name, size):
    vae, data = built(posterior=posterior), split()
    shown, packed = payload(vae, data, about=ABOUT)
    kept = unpacked(packed, shown["arrays"])[shown["posterior"]["array"]]
    assert shown["posterior"]["name"] == name and tuple(kept.shape) == (30, *size)
    if name == "covariances":
        assert torch.allclose(kept, vae.posterior(data).covariance_matrix, atol=2e-3)
    if name == "draws":
        many = vae.posterior(data[:]).sample((2000,))
        stderr = many.std(0) / DRAWS**0.5
        assert ((kept.mean(1) - many.mean(0)).abs() < 4.5 * stderr + 1e-2).all()


def test_posteriors_that_are_too_many_are_those_of_the_first(monkeypatch):
    monkeypatch.setattr(contents, "_BUDGET", 7 * 2 * DRAWS * 3)
    shown, packed = payload(built(posterior="iaf"), split(), about=ABOUT)
    assert shown["posterior"]["count"] == 7
    assert unpacked(packed, shown["arrays"])[shown["posterior"]["array"]].shape == (7, DRAWS, 3)


@pytest.mark.filterwarnings("ignore:the chains of")  # few draws, of which all is to come back
def test_references_are_the_packages_own(monkeypatch):
    quick = functools.partial(pv.reference, num_samples=100, num_warmup=40, num_chains=4, num_leapfrog=2)
    monkeypatch.setattr(contents, "reference", quick)
    vae, data = built(latent_dim=2), split()
    shown, packed = payload(vae, data, about=ABOUT, references=2, progress=False)
    kept = unpacked(packed, shown["arrays"])[shown["reference"]["array"]]
    found = quick(vae.model, vae.guide, data[:2], seed=0, progress=False)
    draws = found.draws["z"].flatten(0, 1).transpose(0, 1)  # (N, C S, D), of which every fourth is kept
    assert kept.shape == (2, 100, 2) and shown["reference"]["count"] == 2
    assert (
        torch.allclose(kept, draws[:, ::4], atol=2e-3) and shown["reference"]["converged"] == found.converged.tolist()
    )
    assert payload(vae, data, about=ABOUT)[0]["reference"] is None


@pytest.mark.parametrize(
    "away, weights, posterior", [(0.0, "f2", "diagonal"), (1.0, "f4", "diagonal"), (1.0, "f4", "iaf")]
)
def test_the_default_architecture_of_mnist_fits_five_megabytes(monkeypatch, away, weights, posterior):
    monkeypatch.setattr(contents, "rounding", lambda *_: away)
    vae = built((1, 28, 28), latent_dim=50, hidden=(500, 500), posterior=posterior)
    shown, packed = payload(vae, split(1000, (1, 28, 28), 10), about=ABOUT)
    assert shown["decoder"]["weights"] == weights and len(page(shown, packed).encode()) < LIMIT


def test_weights_that_do_not_bear_rounding_stay_float32():
    vae = built()
    with torch.no_grad():
        vae.model.likelihood.decoder.layers[-1].weight.mul_(200)
    z = torch.randn(200, 3, generator=torch.Generator().manual_seed(0))
    assert rounding(vae.model.likelihood, z) > 1e-3
    shown, packed = payload(vae, split(), about=ABOUT)
    assert shown["decoder"]["weights"] == "f4" and shown["rounding"] > 5e-4
    last = shown["decoder"]["layers"][-2]
    assert torch.equal(
        unpacked(packed, shown["arrays"])[last["weight"]], vae.model.likelihood.decoder.layers[-1].weight
    )


def test_float16_that_overflows_is_no_choice():
    vae = built()
    with torch.no_grad():
        vae.model.likelihood.decoder.layers[0].weight.mul_(1e7)
    assert payload(vae, split(), about=ABOUT)[0]["decoder"]["weights"] == "f4"


def test_nothing_from_data_becomes_code():
    vae, data = built(), split()
    text = page(*payload(vae, data, about={"title": HOSTILE, "dataset": HOSTILE}, names=(HOSTILE, "one", "two")))
    assert text.count("<script") == 3 and text.count("</script>") == 3 and "<img" not in text
    assert html.unescape(re.search(r"<title>(.*?)</title>", text, re.S)[1]) == HOSTILE
    assert "<" not in of(text, "data") and json.loads(of(text, "data"))["names"]["0"] == HOSTILE
    assert text.count('"use strict"') == 1  # {{script}} of the data is not filled in


def test_the_page_loads_nothing_and_runs_its_own_script_only():
    text = page(*payload(built(), split(), about=ABOUT))
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', text)
    script, style = re.findall(r"<script>(.*?)</script>", text, re.S), re.findall(r"<style>(.*?)</style>", text, re.S)
    hashes = [base64.b64encode(hashlib.sha256(part.encode()).digest()).decode() for (part,) in (script, style)]
    assert policy == (
        f"default-src 'none'; script-src 'sha256-{hashes[0]}'; style-src 'sha256-{hashes[1]}'; base-uri 'none'; "
        "form-action 'none'"
    )
    bare = text.replace(of(text, "arrays"), "")
    assert not re.search(
        r"https?:|\bsrc=|\bhref=|url\(|@import|\bimport\(|fetch\(|XMLHttp|WebSocket|innerHTML|eval\(", bare
    )


def test_what_the_page_cannot_compute_is_refused():
    with pytest.raises(ValueError, match="the layer Dropout.*wanted one of MLP.*pv.plots.latent_grid"):
        layers(nn.Sequential(nn.Linear(2, 3), nn.Dropout()), lambda _: 0)
    with pytest.raises(ValueError, match="the layer GELU"):
        layers(nn.GELU(approximate="tanh"), lambda _: 0)
    with pytest.raises(ValueError, match="the layer Conv2d"):
        layers(nn.Conv2d(4, 4, 3, groups=2), lambda _: 0)

    class Own(pv.likelihoods.Bernoulli):
        pass

    with pytest.raises(ValueError, match="got the likelihood Own.*wanted one of this package: Bernoulli"):
        link(Own(nn.Linear(2, 3)), lambda _: 0)
    with pytest.raises(ValueError, match=r"data of shape \(4,\), wanted images"):
        payload(built((4,)), split(shape=(4,)), about=ABOUT)
    with pytest.raises(ValueError, match="latents on 'sphere', wanted some in R\\^D"):
        payload(built(posterior="von-mises-fisher", prior="hyperspherical"), split(), about=ABOUT)


def test_arrays_begin_at_whole_words():
    arrays = Arrays()
    values = [(torch.arange(3), "u1"), (torch.tensor([0.5, -2.0, 65504.0]), "f2"), (torch.tensor([[1e-30]]), "f4")]
    numbers = [arrays.add(*each) for each in values]
    assert [entry["start"] for entry in arrays.table] == [0, 4, 12] and numbers == [0, 1, 2]
    for got, (wanted, _) in zip(unpacked(arrays.packed(), arrays.table), values, strict=True):
        assert torch.equal(got, wanted.to(got.dtype))


TINY = ["--epochs", "1", "--hidden", "8", "--latent-dim", "2", "--evaluation-samples", "20", "--batch-size", "16", "--compile", "off",
        "--quiet"]  # fmt: skip


def test_the_command_writes_a_page_into_the_run(tmp_path, capsys):
    run = tmp_path / "a run"
    np.savez(tmp_path / "a.npz", x=(np.random.default_rng(0).random((60, 4, 4)) < 0.4), kind=np.arange(60) % 3)
    said = ["fit", "--data", str(tmp_path / "a.npz"), "--images", "x", "--labels", "kind", "--out", str(run)]
    assert main([*said, *TINY]) == 0
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert main(["explore", str(run), "--num-data", "4"]) == 0
    told, following = capsys.readouterr()
    assert str(run / "explore.html") in told and f"next: pyro-vae judge '{run}'" in following
    shown = json.loads(of((run / "explore.html").read_text(encoding="utf-8"), "data"))
    found = pv.open(run)
    assert shown["labels"] == found.data.test.labels[:4].tolist() and shown["reference"] is None
    assert all(path.read_bytes() == data for path, data in before.items())
    assert main(["explore", str(run), "--reference", "2", "--out", str(tmp_path / "other.html")]) == 0
    assert json.loads(of((tmp_path / "other.html").read_text(encoding="utf-8"), "data"))["reference"]["count"] == 2
    capsys.readouterr()
    assert main(["explore", str(run), "--out", str(tmp_path / "page.png")]) == 2
    assert "wanted a .html" in capsys.readouterr().err


def test_the_command_refuses_a_table(tmp_path, capsys):
    np.save(tmp_path / "a.npy", np.random.default_rng(0).normal(size=(60, 4)).astype(np.float32))
    assert main(["fit", "--data", str(tmp_path / "a.npy"), "--out", str(tmp_path / "run"), *TINY]) == 0
    capsys.readouterr()
    assert main(["explore", str(tmp_path / "run")]) == 2
    assert "wanted images" in capsys.readouterr().err and not (tmp_path / "run" / "explore.html").exists()
