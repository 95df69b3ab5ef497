"""Files that are damaged in every way: a clear error or a right answer, in bounded memory, and nothing is executed.

Each reader is given a good file, and thousands of it with bytes flipped, cut out, doubled or replaced by huge numbers.
The memory of the process is limited while they are read.
"""

import contextlib
import gzip
import io
import json
import random
import re
import resource
import struct
import warnings
import zipfile

import numpy as np
import pytest
import scipy.io
import torch
from PIL import Image

import pyro_vae as pv
from pyro_vae import seals
from pyro_vae.app.configuration import read_config
from pyro_vae.app.runs import Run
from pyro_vae.data import load
from pyro_vae.data.mnist import read_idx
from pyro_vae.data.photographs import read_image
from pyro_vae.inference.checkpoints import Checkpoint

ROOM = 2 * 2**30  # bytes beyond what the process has
HUGE = (0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**64 - 1)
NUMBERS = np.random.default_rng(0).integers(0, 255, (30, 6, 6), dtype=np.uint8)


@contextlib.contextmanager
def limited():
    """No more memory than so much beyond what there is."""
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + ROOM, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def idx(values):
    header = bytes([0, 0, 8, values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape)
    return header + values.tobytes()


def saved(write):
    buffer = io.BytesIO()
    write(buffer)
    return buffer.getvalue()


def weights(folder):
    vae = pv.VAE.build((1, 3, 3), latent_dim=2, hidden=(4,))
    vae.save(folder / "w.safetensors")
    return (folder / "w.safetensors").read_bytes()


def checkpoint(folder):
    seals.save(folder / "c.safetensors", {"tensor/a": torch.ones(3), "random": torch.get_rng_state()}, {
        "pyro_vae.fit": json.dumps({"settings": {}, "values": {"first": {}, "last": {}}, "progress": {"steps": 1}})
    })  # fmt: skip
    return (folder / "c.safetensors").read_bytes()


def run_folder(path):
    """Read the configuration, summary and metrics of a run, of which one file is this one."""
    folder = path.parent / "run"
    folder.mkdir(exist_ok=True)
    (folder / "weights.safetensors").write_bytes(b"")
    names = ("config.json", "summary.json", "metrics.jsonl")
    for damaged_one in names:
        for name in names:
            (folder / name).write_bytes(path.read_bytes() if name == damaged_one else b"{}")
        Run.load(folder).metrics()


def data_of(path):
    found = load(str(path), seed=0)
    assert bool(torch.isfinite(found.train[torch.arange(len(found.train))].float()).all())
    return found


OPTIONS = b"epochs: 3\nhidden: [400, 200]\nposterior: full\nlearning_rate: 1e-3\nprior_options: {num_components: 5}\n"
READERS = {
    "idx": ("train-images-idx3-ubyte", lambda _: idx(NUMBERS), lambda path: read_idx(path, 3)),
    "idx.gz": ("train-images-idx3-ubyte.gz", lambda _: gzip.compress(idx(NUMBERS)), lambda path: read_idx(path, 3)),
    "npy": ("a.npy", lambda _: saved(lambda f: np.save(f, NUMBERS)), data_of),
    "npz": ("a.npz", lambda _: saved(lambda f: np.savez_compressed(f, x=NUMBERS, y=np.arange(30))), data_of),
    "mat": ("a.mat", lambda _: saved(lambda f: scipy.io.savemat(f, {"x": NUMBERS.reshape(30, 36)}, do_compression=True)),
            data_of),
    "png": ("a.png", lambda _: saved(lambda f: Image.fromarray(NUMBERS[0]).save(f, "png")), read_image),
    "jpeg": ("a.jpg", lambda _: saved(lambda f: Image.fromarray(NUMBERS[0]).save(f, "jpeg")), read_image),
    "gif": ("a.gif", lambda _: saved(lambda f: Image.fromarray(NUMBERS[0]).save(f, "gif")), read_image),
    "tiff": ("a.tif", lambda _: saved(lambda f: Image.fromarray(NUMBERS[0]).save(f, "tiff")), read_image),
    "weights": ("w.safetensors", weights, pv.VAE.load),
    "checkpoint": ("c.safetensors", checkpoint, lambda path: Checkpoint(path, {"a": torch.zeros(3)}, {}).read()),
    "yaml": ("o.yaml", lambda _: OPTIONS, read_config),
    "json": ("o.json", lambda _: b'{"epochs": 3, "hidden": [400], "posterior": "full"}', read_config),
    "run": ("r.json", lambda _: b'{"epochs": 3, "hidden": [400], "test_elbo": -3.5}', run_folder),
    "idx of text": ("train-images-idx3-ubyte", lambda _: b"<html>404 not found</html>" * 9, lambda path: read_idx(path, 3)),
}  # fmt: skip


def damaged(content, rng):
    """One of many damages to the bytes of a file."""
    content, kind = bytearray(content), rng.randrange(7)
    at = rng.randrange(max(len(content), 1)) if rng.random() < 0.5 else rng.randrange(min(len(content), 64) or 1)
    if kind == 0:
        content[at] ^= 1 << rng.randrange(8)
    elif kind == 1:
        del content[at:]
    elif kind == 2:
        del content[at : at + rng.randrange(1, 20)]
    elif kind == 3:
        content[at:at] = rng.randbytes(rng.randrange(1, 20))
    elif kind == 4:
        size = rng.choice((1, 2, 4, 8))
        number = rng.choice(HUGE) % 2 ** (8 * size)
        content[at : at + size] = number.to_bytes(size, rng.choice(("big", "little")))
    elif kind == 5:
        content += rng.randbytes(rng.randrange(1, 200))
    else:
        content[at : at + 4] = rng.choice(
            (b"9999", b"-1  ", b"1e99", b"null", b"[[[[", b"{{{{", b"nan ", b"\xff\xfe\0\0")
        )
    return bytes(content)


def tried(name, number, folder, seed=0):
    """How many damages were refused; whatever else than a ValueError comes out is a failure."""
    file, make, read = READERS[name]
    good, rng, refused = make(folder), random.Random(f"{name} {seed}"), 0
    path = folder / file
    for _ in range(number):
        content = damaged(good, rng)
        path.write_bytes(content)
        with limited(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                read(path)
            except ValueError as error:
                assert str(error) and "\n" not in str(error).strip()[:1], error
                refused += 1
            except Exception as error:  # noqa: BLE001
                (folder / "bad").write_bytes(content)
                raise AssertionError(f"{name}: {type(error).__name__}: {error}, of {content[:200]!r}") from error
    return refused


@pytest.mark.parametrize("name", READERS)
@pytest.mark.filterwarnings("ignore::UserWarning")  # what can be read may have become remarkable
def test_a_damaged_file_is_refused_or_read(name, tmp_path):
    file, make, read = READERS[name]
    (tmp_path / file).write_bytes(make(tmp_path))
    if name != "idx of text":
        read(tmp_path / file)
    assert tried(name, 40, tmp_path) > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
@pytest.mark.filterwarnings("ignore::UserWarning")  # what can be read may have become remarkable
def test_a_thousand_damages_of_each_kind(name, tmp_path):
    tried(name, 1000, tmp_path, seed=1)


def test_sealed_files_are_refused_whatever_bit_is_flipped(tmp_path):
    good, path, refused = weights(tmp_path), tmp_path / "w.safetensors", 0
    whole = pv.VAE.load(path).state_dict()
    for at in range(0, len(good), 7):
        path.write_bytes(good[:at] + bytes([good[at] ^ 16]) + good[at + 1 :])
        try:
            read = pv.VAE.load(path).state_dict()
        except ValueError:
            refused += 1
        else:  # the name of the digest itself, or a space
            assert all(torch.equal(value, whole[key]) for key, value in read.items())
    assert refused > 0.97 * len(range(0, len(good), 7))


def test_bombs_are_refused_before_memory_is_asked_for(tmp_path, monkeypatch):
    zeros = np.zeros((1, 2**14, 2**14), np.uint8)  # a quarter of a gigabyte in 260 kB
    bombs = {
        "train-images-idx3-ubyte.gz": gzip.compress(idx(zeros), 1),
        "a.npz": saved(lambda f: np.savez_compressed(f, x=zeros)),
        "a.mat": saved(lambda f: scipy.io.savemat(f, {"x": zeros[0]}, do_compression=True)),
    }
    monkeypatch.setenv("PYRO_VAE_MOST_GB", "0.2")
    for name, content in bombs.items():
        (tmp_path / name).write_bytes(content)
        assert len(content) < 2**21
        read = (lambda path: read_idx(path, 3)) if "idx" in name else (lambda path: load(str(path)))
        with pytest.raises(ValueError, match=r"would unpack to 0\.3 GB, wanted at most 0\.2.*PYRO_VAE_MOST_GB"):
            read(tmp_path / name)
    monkeypatch.setenv("PYRO_VAE_MOST_GB", "1")
    assert read_idx(tmp_path / "train-images-idx3-ubyte.gz", 3).shape == zeros.shape
    # A header that says more than there is, of a file that says less.
    lying = bytearray(idx(NUMBERS))
    lying[4:8] = b"\xff\xff\xff\xff"
    (tmp_path / "b.gz").write_bytes(gzip.compress(bytes(lying)))
    with pytest.raises(ValueError, match="would unpack"):
        read_idx(tmp_path / "b.gz", 3)
    with pytest.raises(ValueError, match="would unpack"):
        huge = io.BytesIO()
        with zipfile.ZipFile(huge, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("x.npy", "w") as member:
            for _ in range(20):
                member.write(bytes(2**26))
        (tmp_path / "c.npz").write_bytes(huge.getvalue())
        load(str(tmp_path / "c.npz"))


CODE = b"cos\nsystem\n(S'touch executed'\ntR."


@pytest.mark.parametrize("name", ["a.npy", "a.npz", "w.safetensors", "o.yaml", "a.pt", "a.pkl", "a.pickle"])
def test_nothing_that_is_read_is_executed(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content = {
        "a.npz": saved(lambda f: np.savez(f, x=np.array([Runs()], dtype=object))),
        "a.npy": saved(lambda f: np.save(f, np.array([Runs()], dtype=object), allow_pickle=True)),
        "o.yaml": b"epochs: !!python/object/apply:os.system ['touch executed']\n",
    }.get(name, CODE)
    (tmp_path / name).write_bytes(content)
    read = {"w.safetensors": pv.VAE.load, "o.yaml": read_config}.get(name, lambda path: load(str(path)))
    with pytest.raises(ValueError, match=r"."):
        read(tmp_path / name)
    assert not (tmp_path / "executed").exists()


class Runs:
    def __reduce__(self):
        import os

        return os.system, ("touch executed",)


def test_pages_may_load_and_run_nothing():
    from pyro_vae.app.html import document

    nasty = "</title><script>alert(1)</script>"
    text = document(nasty, "<p>body</p>")
    assert "<script" not in text and text.count("&lt;script&gt;") == 2
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', text)
    assert "default-src &#x27;none&#x27;" in policy and "script-src" not in policy and "http" not in policy


def test_numbers_that_are_none_are_refused(tmp_path, monkeypatch):
    for text in ("epochs: .inf", "epochs: -.inf", "epochs: .nan", "hidden: [.inf]", "num_samples: 1e999"):
        (tmp_path / "o.yaml").write_text(text)
        with pytest.raises(ValueError, match="wanted"):
            read_config(tmp_path / "o.yaml")
    (tmp_path / "a.gz").write_bytes(gzip.compress(idx(NUMBERS)))
    for most in ("nan", "-1", "0", "many"):
        monkeypatch.setenv("PYRO_VAE_MOST_GB", most)
        with pytest.raises(ValueError, match=f"PYRO_VAE_MOST_GB='{most}', wanted"):
            read_idx(tmp_path / "a.gz", 3)
