"""Data for which there is no room in memory: the same numbers, to the bit, as of data in memory."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from pyro_vae import load
from pyro_vae.app import cli
from pyro_vae.app.progress import Progress
from pyro_vae.data import Split, limits, room
from pyro_vae.inference.fingerprints import fingerprint

RANDOM = np.random.default_rng(0)
GREY = RANDOM.integers(0, 256, (101, 6, 5), dtype=np.uint8)
ARRAYS = {
    "grey": GREY,
    "colours last": RANDOM.integers(0, 256, (60, 4, 5, 3), dtype=np.uint8),
    "float images": RANDOM.random((50, 1, 4, 4), dtype=np.float32),
    "doubles": RANDOM.normal(size=(70, 5)),
    "vectors": RANDOM.normal(size=(70, 5)).astype(np.float32),
    "big-endian": RANDOM.normal(size=(70, 5)).astype(">f4"),
    "columns first": np.asfortranarray(RANDOM.normal(size=(70, 5)).astype(np.float32)),
    "truth values": GREY > 99,
    "0 and 255": np.where(GREY > 99, 255, 0).astype(np.uint8),
    "16 bits": GREY.astype(np.uint16) * 200,
    "counts": RANDOM.poisson(99.0, (40, 7)) * 9,
}
WAYS = [
    {},
    {"binarization": "dynamic"},
    {"binarization": "static", "seed": 3},
    {"binarization": "threshold", "limit": 5},
    {"binarization": "none", "dequantize": False, "limit": 7},
    {"image_size": 3, "channels": 1},
]


@pytest.fixture
def nowhere(monkeypatch):
    """A switch after which there is room for nothing in memory."""
    return lambda: monkeypatch.setenv("PYRO_VAE_MEMORY_GB", "1e-9")


def both(read, nowhere):
    """What a function gives, or the words of its ValueError, with room and without."""

    def one():
        try:
            return read()
        except ValueError as error:
            return str(error)

    with_room = one()
    nowhere()
    return with_room, one()


def lies_in_a_file(tensor):
    """Whether the memory of a tensor is a mapped file, by the kernel's own list."""
    spans = (line.split() for line in Path("/proc/self/maps").read_text().splitlines())
    for span, _, _, _, inode, *_ in spans:
        start, end = (int(each, 16) for each in span.split("-"))
        if start <= tensor.data_ptr() < end:
            return inode != "0"
    return False


def same_draws(one, other, index=slice(None)):
    torch.manual_seed(0)
    x = one[index]
    torch.manual_seed(0)
    return torch.equal(x, other[index]) and x.dtype == other[index].dtype


@pytest.mark.parametrize("options", WAYS, ids=str)
@pytest.mark.parametrize("kind", ARRAYS)
def test_a_file_gives_what_it_gives_in_memory(kind, options, tmp_path, nowhere):
    np.save(tmp_path / "x.npy", ARRAYS[kind])
    here, there = both(lambda: load(tmp_path / "x.npy", **options), nowhere)
    if isinstance(here, str):  # in memory the range is that of the first part, which has the name
        plain = [
            re.sub(r"\[.*?\]", "", each.replace(str(tmp_path / "x.npy"), "train"), count=1) for each in (here, there)
        ]
        assert plain[0] == plain[1]
        return
    assert here.protocol == there.protocol
    for part in ("train", "validation", "test"):
        one, other = getattr(here, part), getattr(there, part)
        assert one.rows is None and lies_in_a_file(other.pixels)
        assert (len(one), one.x_shape, one.final) == (len(other), other.x_shape, other.final)
        assert fingerprint(one) == fingerprint(other) and one.same(other)
        assert torch.equal(one.mean(), other.mean())
        few = torch.tensor([2, 0, 0])
        for a, b in ((one, other), (one.frozen(5), other.frozen(5)), (one.to("cpu"), other.to("cpu"))):
            for index in (slice(None), few, 1, -1, [3, 1], np.array([2])):
                assert same_draws(a, b, index)
            assert same_draws(a.subset(few), b.subset(few)) and same_draws(a.subset(slice(1, 3)), b.subset(slice(1, 3)))


def test_what_can_be_used_as_it_is_stays_where_it_is(tmp_path, nowhere):
    nowhere()
    for kind, stays in {"grey": True, "vectors": True, "doubles": False, "truth values": False}.items():
        np.save(tmp_path / "x.npy", ARRAYS[kind])
        train = load(tmp_path / "x.npy").train
        before = train.held(slice(None))
        np.load(tmp_path / "x.npy", mmap_mode="r+")[:] = 1
        assert torch.equal(before, train.held(slice(None))) is not stays, kind


@pytest.mark.parametrize("shape", [(10_000, 3), (9, 2100, 2000)])
@pytest.mark.parametrize("way", ["levels", "floats", "dequantized"])
def test_the_first_data_have_the_draws_that_they_have_alone(shape, way, monkeypatch):
    pixels = torch.from_numpy(np.random.default_rng(1).integers(0, 256, shape, dtype=np.uint8))
    pixels = pixels / 255 if way == "floats" else pixels
    noise = way == "dequantized"
    split = Split(pixels, binarization="none" if noise else "dynamic", dequantize=noise)
    whole = split.frozen(4)
    for count in (1, 3, len(pixels) - 2):
        assert torch.equal(whole[:count], split.subset(slice(0, count)).frozen(4)[:])
    monkeypatch.setattr(room, "_AT_ONCE", 1000)  # nor do draws depend on how many are made at once
    assert torch.equal(whole[:], split.frozen(4)[:])


@pytest.mark.parametrize(
    "array, wanted",
    [
        (np.where(np.arange(500).reshape(100, 5) == 42, np.nan, 1.0), "NaN or infinite values in 1 of 100 rows, first in row 8"),
        (np.full((100, 3, 4, 4), 1.5, np.float32), r"float images in \[1.5, 1.5\], wanted \[0, 1\]"),
        (np.full((100, 5), 1e300), "numbers beyond float32 in 100 of 100 rows, first in row 0"),
        (np.full((100, 5), None), "holds an object array, which would be unpickled"),
        (np.full((100, 4, 4), 300), r"whole numbers in \[300, 300\], wanted levels"),
    ],
)  # fmt: skip
def test_all_values_are_looked_at(array, wanted, tmp_path, nowhere):
    np.save(tmp_path / "x.npy", array)
    here, there = both(lambda: load(tmp_path / "x.npy"), nowhere)
    assert here == there
    with pytest.raises(ValueError, match=wanted):
        load(tmp_path / "x.npy")


def test_floats_that_are_no_probabilities_are_refused_before_the_fit(tmp_path, nowhere):
    np.save(tmp_path / "x.npy", ARRAYS["vectors"])
    nowhere()
    for binarization in ("dynamic", "static", "threshold"):
        with pytest.raises(ValueError, match=r"binarization=.* for float data in \[-.*, wanted \[0, 1\]"):
            load(tmp_path / "x.npy", binarization=binarization)


def test_a_file_that_is_cut_off_is_refused(tmp_path, nowhere):
    np.save(tmp_path / "x.npy", GREY)
    whole = (tmp_path / "x.npy").read_bytes()
    (tmp_path / "x.npy").write_bytes(whole[:-50])
    nowhere()
    with pytest.raises(ValueError, match="truncated or no NumPy file"):
        load(tmp_path / "x.npy")


def test_a_disk_without_room_is_said(tmp_path, nowhere, monkeypatch):
    np.save(tmp_path / "x.npy", ARRAYS["doubles"])
    nowhere()
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(room.shutil, "disk_usage", lambda folder: type("", (), {"free": 10}))
    with pytest.raises(
        ValueError, match=f"too large for memory and for {tmp_path}, .*Set TMPDIR to a folder .* float32 is"
    ):
        load(tmp_path / "x.npy")
    assert not list(tmp_path.glob("tmp*"))


def test_temporary_files_have_no_name(tmp_path, nowhere, monkeypatch):
    nowhere()
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    held = room.empty((3, 4), torch.float32)
    held[:] = 2.0
    assert lies_in_a_file(held) and held.sum() == 24 and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "text, wanted", [("much", "wanted a number"), ("-1", "wanted a positive"), ("nan", "wanted a positive")]
)
def test_the_limit_is_a_number(text, wanted, monkeypatch):
    monkeypatch.setenv("PYRO_VAE_MEMORY_GB", text)
    with pytest.raises(ValueError, match=f"PYRO_VAE_MEMORY_GB='{text}', {wanted}"):
        room.fits(1)


def test_the_limit_is_a_quarter_of_what_a_container_has(tmp_path, monkeypatch):
    monkeypatch.delenv("PYRO_VAE_MEMORY_GB", raising=False)
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    monkeypatch.setattr(limits, "_CONTAINER", (tmp_path / "none", tmp_path / "max"))
    (tmp_path / "max").write_text("max\n")
    assert limits.machine() == whole and room.fits(whole // 4) and not room.fits(whole // 4 + 10**6)
    (tmp_path / "max").write_text("1000000\n")
    assert limits.machine() == 10**6 and room.fits(250_000) and not room.fits(250_001)


def test_an_archive_that_is_more_than_all_memory_is_refused_with_the_remedy(tmp_path, monkeypatch):
    np.savez_compressed(tmp_path / "x.npz", x=np.zeros((1000, 1000), np.uint8))
    monkeypatch.setattr(limits, "machine", lambda: 10**5)
    with pytest.raises(
        ValueError, match=r"unpack to 0.0 GB, wanted at most the 0.0 GB of memory .* Save the data as a \.npy"
    ):
        load(tmp_path / "x.npz")


def folder_of_pictures(folder):
    from PIL import Image

    for i, image in enumerate(RANDOM.integers(0, 256, (24, 8, 8), dtype=np.uint8)):
        (folder / "abc"[i % 3]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / "abc"[i % 3] / f"{i}.png")
    return folder


def test_parts_that_a_file_has_already_stay_one_array_each(tmp_path, nowhere):
    arrays = {"x_train": GREY[:80], "x_test": GREY[80:], "y_train": np.arange(80) % 3, "y_test": np.arange(21) % 3}
    np.savez(tmp_path / "x.npz", **arrays)
    here, there = both(lambda: load(tmp_path / "x.npz", binarization="threshold", limit=15), nowhere)
    for part in ("train", "validation", "test"):
        one, other = getattr(here, part), getattr(there, part)
        assert one.same(other) and torch.equal(one.labels, other.labels) and len(one) == min(15, len(one))
        assert not one.same(getattr(there, "test" if part == "train" else "train"))
    assert here.protocol == there.protocol and there.train.rows is not None


def test_a_folder_of_pictures_is_decoded_into_a_file(tmp_path, nowhere):
    folder_of_pictures(tmp_path / "photos")
    here, there = both(lambda: load(tmp_path / "photos"), nowhere)
    for part in ("train", "validation", "test"):
        one, other = getattr(here, part), getattr(there, part)
        assert one.same(other) and torch.equal(one.labels, other.labels) and lies_in_a_file(other.pixels)
    assert here.protocol == there.protocol and not lies_in_a_file(here.train.pixels)


# The commands

FIT = ["--epochs", "3", "--hidden", "12", "--latent-dim", "2", "--batch-size", "16", "--evaluation-samples", "10",
       "--compile", "off", "--quiet"]  # fmt: skip
TIMES = re.compile(r"seconds|speed|per_second|time|date|^out$|^run$")


def written(folder):
    """What a run folder has, but for clock and names."""

    def plain(value):
        if isinstance(value, dict):
            return {key: plain(each) for key, each in value.items() if not TIMES.search(key)}
        return value

    metrics = [plain(json.loads(line)) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return (
        (folder / "weights.safetensors").read_bytes(),
        metrics,
        plain(json.loads((folder / "summary.json").read_text())),
    )


def said(capsys, *argv):
    assert cli.main(list(argv)) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("kind, more", [("grey", ()), ("grey", ("--binarization", "dynamic", "--limit", "50")),
                                        ("doubles", ()), ("truth values", ("--evaluation-images", "7")),
                                        ("photos", ("--model", "conditional"))])  # fmt: skip
def test_the_commands_find_the_same_in_a_file_as_in_memory(kind, more, tmp_path, nowhere, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    if kind == "photos":
        folder_of_pictures(tmp_path / "photos")
    else:
        np.save("x.npy", ARRAYS[kind])
    run = ["fit", "--data", "photos" if kind == "photos" else "x.npy", *FIT, *more]
    assert cli.main([*run, "--out", "here"]) == 0
    wanted = said(capsys, "evaluate", "here", "-K", "20", "--json")
    nowhere()
    assert cli.main([*run, "--out", "there"]) == 0
    assert written(Path("here")) == written(Path("there"))
    found = said(capsys, "evaluate", "here", "-K", "20", "--json")
    assert {k: v for k, v in found.items() if not TIMES.search(k)} == {
        k: v for k, v in wanted.items() if not TIMES.search(k)
    }
    both = said(capsys, "compare", "here", "there", "--evaluation-samples", "10", "--json")
    assert "not trained on the same data" not in str(both)
    judged = said(capsys, "judge", "there", "--budget", "3", "--json")
    assert judged["protocol"]["num_data"] == found["protocol"]["sizes"]["test"]
    assert cli.main(["encode", "there", "test", "--out", "codes.npz"]) == 0
    assert len(np.load("codes.npz")["mean"]) == found["test_images"]
    if kind != "photos":
        assert cli.main(["encode", "there", "x.npy", "--out", "codes.npz"]) == 0
        assert len(np.load("codes.npz")["mean"]) == len(ARRAYS[kind])


def test_a_run_goes_on_with_as_much_memory_as_there_is_then(tmp_path, nowhere, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    np.save("x.npy", GREY)
    run = ["fit", "--data", "x.npy", "--binarization", "threshold", *FIT]
    assert cli.main([*run, "--out", "whole"]) == 0
    call = Progress.__call__

    def broken(self, record):
        call(self, record)
        if record["epoch"] == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Progress, "__call__", broken)
        assert cli.main([*run, "--out", "here"]) == 130
        nowhere()
        assert cli.main([*run, "--out", "there"]) == 130
    assert cli.main(["fit", "--resume", "here", "--quiet"]) == 0  # begun in memory, ended in a file
    monkeypatch.delenv("PYRO_VAE_MEMORY_GB")
    assert cli.main(["fit", "--resume", "there", "--quiet"]) == 0  # the other way about
    assert written(Path("whole"))[0] == written(Path("here"))[0] == written(Path("there"))[0]


UNDER_A_LIMIT = """
import re, resource, sys
import matplotlib.pyplot, pyro, torch, torchvision
from pyro_vae.app import cli, fitting
from pyro_vae.judging import judgement

limit, *argv = sys.argv[1:]
held = int(re.search(r"VmData:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (held + int(limit),) * 2)
sys.exit(cli.main(argv))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the limit is one of Linux")
@pytest.mark.parametrize("dtype", [np.uint8, bool])
def test_commands_take_data_that_are_more_than_all_memory(dtype, tmp_path):
    """A file of 480 MB under a limit, by the kernel, of 350 MB on all memory that is no page of a file."""
    width = 2000 // np.dtype(dtype).itemsize
    file = np.lib.format.open_memmap(tmp_path / "x.npy", mode="w+", dtype=dtype, shape=(240_000, width))
    random = np.random.default_rng(0)
    for start in range(0, len(file), 20_000):
        levels = random.integers(0, 256, (20_000, width), dtype=np.uint8)
        file[start : start + 20_000] = {np.uint8: levels, np.float32: levels / np.float32(255), bool: levels > 99}[
            dtype
        ]
    file.flush()
    del file

    def run(*argv, room):
        environment = os.environ | {"PYRO_VAE_MEMORY_GB": room, "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)}
        environment["PYTHONPATH"] = str(Path(__file__).parents[1])
        command = [sys.executable, "-c", UNDER_A_LIMIT, "350_000_000", *argv]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)

    fit = ["fit", "--data", "x.npy", "--epochs", "1", "--hidden", "16", "--latent-dim", "2", "--batch-size", "1000",
           "--evaluation-samples", "20", "--evaluation-images", "100", "--compile", "off", "--threads", "1"]  # fmt: skip
    done = run(*fit, "--out", "in-memory", room="100")
    assert done.returncode != 0 and re.search("memory|allocate", done.stderr, re.IGNORECASE), done.stderr
    others = [["evaluate", "a", "-K", "30"], ["judge", "a", "--budget", "10"],
              ["compare", "a", "a", "--evaluation-samples", "10", "--evaluation-images", "50"]]  # fmt: skip
    for argv in ([*fit, "--out", "a"], *(others if dtype is np.uint8 else ())):
        done = run(*argv, room="0.02")
        assert done.returncode == 0, done.stderr
    assert not list(tmp_path.glob("tmp*"))
