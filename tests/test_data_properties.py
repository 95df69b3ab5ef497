"""Whatever lies in a file, `load` gives the right numbers or one ValueError that says what is wanted.

The oracles are written anew here, in NumPy, from the table in `arrays` and from what a
picture looks like on a page; they share no code with the readers.
"""

import contextlib
import io
import tempfile
import warnings
from pathlib import Path

import numpy as np
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from pyro_vae.data import load
from pyro_vae.data.decoding import Framing, read_frames, read_image

DTYPES = (
    "?",
    "u1",
    "i1",
    "u2",
    "i2",
    ">u2",
    "i4",
    ">i4",
    "u8",
    "i8",
    "f2",
    "f4",
    ">f4",
    "f8",
    ">f8",
    "g",
    "c8",
    "U3",
    "S2",
    "M8[D]",
    "m8[s]",
    "O",
    [("a", "i4"), ("b", "f4")],
)
NUMBERS = {
    "zero-one": [0, 1],
    "bytes": [0, 255],
    "levels": list(range(0, 256, 5)),
    "counts": [0, 1, 2, 300],
    "deep": [0, 300, 40000, 65535],
    "signed": [-1, 0, 7],
    "unit": [0.0, 0.25, 1.0],
    "bad": [0.0, np.nan, np.inf, 1e300],
}
WANTED = ("wanted", "Save", "save", "Fetch", "Add", "Pass", "Remove")


def tried(times):
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
    return settings(max_examples=times, derandomize=True, deadline=None, database=None, suppress_health_check=checks)


@contextlib.contextmanager
def folder():
    with tempfile.TemporaryDirectory() as name, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield Path(name)


def outcome(path, **options):
    """The dataset, or None after a ValueError that helps; anything else fails the test."""
    try:
        return load(path, **options)
    except ValueError as error:
        text = str(error)
        assert any(word in text for word in WANTED) and len(text) > 20, text
        return None


@st.composite
def numeric(draw, shape=None):
    """An array of one of the kinds of values that lie in files."""
    dtype = np.dtype(draw(st.sampled_from([d for d in DTYPES if np.dtype(d).kind in "biuf"])))
    values = np.array(draw(st.sampled_from(list(NUMBERS.values()))))
    if shape is None:
        shape = draw(hnp.array_shapes(min_dims=0, max_dims=5, min_side=0, max_side=6))
    picks = draw(hnp.arrays(np.uint8, shape, elements=st.integers(0, 255)))
    with np.errstate(all="ignore"):
        array = values[picks % len(values)].astype(dtype)
    return np.asfortranarray(array) if draw(st.booleans()) else array


@st.composite
def any_array(draw):
    """An array of any dtype that NumPy can write, numbers most often."""
    if draw(st.integers(0, 3)):
        return draw(numeric())
    shape = draw(hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=6))
    return np.zeros(shape, dtype=np.dtype(draw(st.sampled_from(DTYPES))))


def moved(array):
    """Channels first, by the axes alone; None where they are no data."""
    if array.dtype.kind not in "biuf" or array.ndim not in (2, 3, 4) or array.size == 0:
        return None
    if array.ndim == 3:
        return array.reshape(array.shape[0], 1, *array.shape[1:])
    if array.ndim == 4 and array.shape[1] not in (1, 3):
        return np.moveaxis(array, 3, 1) if array.shape[3] in (1, 3) else None
    return array


def expected(parts):
    """What a reader must make of arrays (channels first), as (kind, parts) or None for a refusal."""
    everything = np.concatenate([np.asarray(a, dtype=object).ravel() for a in parts])
    low, high = min(everything), max(everything)
    if all(value in (0, 1) for value in everything):
        return "binary", [a.astype(np.float32) for a in parts]
    kinds = {a.dtype.kind == "f" for a in parts}
    if len(kinds) == 2:
        return None
    if kinds == {False}:
        if all(value in (0, 255) for value in everything):
            return "binary", [a.astype(np.float32) / 255 for a in parts]
        if 0 <= low and high <= 255:
            return "levels", [a.astype(np.uint8) for a in parts]
        if parts[0].ndim == 4:
            deep = all(a.dtype.kind == "u" and a.dtype.itemsize == 2 for a in parts)
            return ("continuous", [a.astype(np.float32) / np.float32(65535) for a in parts]) if deep else None
        return ("continuous", [a.astype(np.float32) for a in parts]) if max(-low, high) <= 2**24 else None
    with np.errstate(over="ignore"):
        floats = [a.astype(np.float32) for a in parts]
    if not all(np.isfinite(a).all() for a in floats):
        return None
    if parts[0].ndim == 4 and (min(a.min() for a in floats) < 0 or max(a.max() for a in floats) > 1):
        return None
    return "continuous", floats


def numbers(split, kind):
    return split[:] if kind == "binary" else split.pixels


def check_heap(data, array, x):
    """A heap of rows: all are there, once, on the right scale."""
    kind, (wanted,) = expected([x])
    assert data.train.binarization == ("threshold" if kind == "binary" else "none")
    assert data.train.dequantize == (kind == "levels")
    got = torch.cat([numbers(part, kind) for part in (data.train, data.validation, data.test)]).numpy()
    assert got.shape == wanted.shape and min(data.protocol["sizes"].values()) >= 1
    assert sorted(map(bytes, got)) == sorted(map(bytes, np.ascontiguousarray(wanted)))


def one_picture(array):
    """Shapes below eight a side that pass for one picture."""
    return array.ndim == 3 and array.shape[2] in (1, 3)


@tried(450)
@given(any_array(), st.sampled_from(["", "x", "images", "X", "whatever", "train", "y"]))
@example(np.array([[0.0, 1.0]] * 4, dtype=">f8"), "x")
@example(np.full((3, 2), 2**63, dtype="u8"), "")
def test_one_array_of_any_kind(array, key):
    with folder() as place:
        path = place / ("a.npz" if key else "a.npy")
        if key:
            np.savez(path, **{key: array})
        else:
            np.save(path, array)
        data = outcome(path)
        x = moved(array)
        fine = x is not None and len(x) >= 3 and expected([x]) is not None and not one_picture(array)
        assert (data is not None) == fine
        if fine:
            check_heap(data, array, x)


LABELS = (
    "classes",
    "column",
    "one-hot",
    "floats",
    "targets",
    "text",
    "bytes",
    "several",
    "wrong",
    "object",
    "dates",
    "nan",
    "bool",
)


def labels(kind, classes):
    """Labels of one kind, and the class numbers and names that they mean (None: they mean none)."""
    names = np.array(["cat", "dog", "ape"])
    numbers = [str(i) for i in sorted({names[c] for c in classes})]
    by_name = [numbers.index(names[c]) for c in classes]
    return {
        "classes": (classes, classes, None),
        "column": (classes[:, None].astype(np.uint8), classes, None),
        "one-hot": (np.eye(3)[classes], classes, None),
        "floats": (classes.astype(np.float32), classes, None),
        "targets": (classes + 0.5, None, None),
        "text": (names[classes], by_name, tuple(numbers)),
        "bytes": (names[classes].astype("S"), by_name, tuple(numbers)),
        "several": (np.ones((len(classes), 3), int), None, None),
        "wrong": (np.zeros(len(classes) + 1, int), None, None),
        "object": (names[classes].astype(object), None, None),
        "dates": (np.zeros(len(classes), "M8[D]"), None, None),
        "nan": (np.full(len(classes), np.nan), None, None),
        "bool": (classes > 0, (classes > 0).astype(int), None),
    }[kind]


@tried(250)
@given(
    st.data(),
    st.integers(3, 6),
    st.sampled_from(LABELS),
    st.sampled_from([("x", "y"), ("X", "Y"), ("images", "labels"), ("imgs", "target"), ("pixels", "classes")]),
)
def test_labels_of_any_kind_never_refuse_the_data(data, count, kind, keys):
    classes = np.array(data.draw(st.lists(st.integers(0, 2), min_size=count, max_size=count)))
    given_labels, meant, names = labels(kind, classes)
    rows = np.arange(2, 2 + count, dtype=np.uint8)[:, None].repeat(9, 1)
    with folder() as place:
        np.savez(place / "a.npz", **{keys[0]: rows, keys[1]: given_labels, "extra": np.zeros(3)})
        dataset = load(place / "a.npz")
        parts = (dataset.train, dataset.validation, dataset.test)
        assert dataset.label_names == names
        for part in parts:
            assert (part.labels is None) == (meant is None)
            if meant is not None:
                assert part.labels.tolist() == [meant[row - 2] for row in part.pixels[:, 0].tolist()]


SPELLED = (
    ("x_train", "x_val", "x_test"),
    ("train_images", "validation_images", "test_images"),
    ("train", "valid", "test"),
    ("X_train", "X_valid", "X_test"),
    ("Xtrain", "Xval", "Xtest"),
    ("images-training", "images-val", "images-testing"),
    ("data", "valdata", "testdata"),
)


@tried(250)
@given(st.data(), st.sampled_from(SPELLED), st.booleans(), st.booleans())
def test_parts_are_on_one_scale_and_apart(data, spelled, with_validation, with_test):
    tail = data.draw(st.sampled_from([(5,), (2, 4), (2, 4, 3), (1, 2, 2)]))
    sizes = [data.draw(st.integers(2, 5)) for _ in range(3)]
    arrays = [data.draw(numeric((size, *tail))) for size in sizes]
    kept = [True, with_validation, with_test]
    with folder() as place:
        np.savez(place / "a.npz", **{key: a for key, a, keep in zip(spelled, arrays, kept, strict=True) if keep})
        given_parts = [moved(a) for a, keep in zip(arrays, kept, strict=True) if keep]
        dataset = outcome(place / "a.npz")
        if not (with_validation or with_test):
            return
        wanted = expected(given_parts)
        assert (dataset is not None) == (wanted is not None)
        if dataset is None:
            return
        kind, wanted = wanted
        got = [numbers(part, kind).numpy() for part in (dataset.train, dataset.validation, dataset.test)]
        if with_validation and with_test:
            assert all(np.array_equal(a, b) for a, b in zip(got, wanted, strict=True))
        elif with_test:
            assert np.array_equal(got[2], wanted[1])
            assert sorted(map(bytes, np.concatenate(got[:2]))) == sorted(map(bytes, wanted[0])) and len(got[1]) == 1
        else:
            assert np.array_equal(got[0], wanted[0])
            assert sorted(map(bytes, np.concatenate(got[1:]))) == sorted(map(bytes, wanted[1]))


@tried(150)
@given(
    st.sampled_from(
        [".npy", ".npz", ".mat", ".amat", ".bin", ".png", ".gif", "train-images-idx3-ubyte", ".csv", ".pkl"]
    ),
    st.binary(max_size=60),
    st.integers(0, 200),
    st.booleans(),
)
def test_broken_files_are_named(suffix, junk, keep, whole_header):
    with folder() as place:
        path = place / (f"a{suffix}" if suffix.startswith(".") else suffix)
        raw = io.BytesIO()
        if whole_header:
            if suffix == ".npz":
                np.savez(raw, x=np.ones((4, 3)))
            elif suffix == ".png":
                Image.new("L", (4, 4)).save(raw, "png")
            else:
                np.save(raw, np.ones((4, 3)))
        path.write_bytes(raw.getvalue()[:keep] + junk)
        try:
            assert sum(load(path).protocol["sizes"].values()) >= 3
        except ValueError as error:
            assert "a." in str(error) or suffix in str(error)


MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "I", "F")


@st.composite
def picture(draw):
    """A file's bytes, and what it looks like over a grey of 100: (H, W) or (H, W, 3), or None for a refusal."""
    mode, suffix = draw(st.sampled_from(MODES)), draw(st.sampled_from(["png", "tif", "bmp", "gif", "ppm", "webp"]))
    height, width = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    channels = {"LA": 2, "RGB": 3, "RGBA": 4, "CMYK": 4}.get(mode, 1)
    levels = draw(hnp.arrays(np.uint8, (height, width, channels), elements=st.sampled_from([0, 1, 100, 200, 255])))
    if mode == "1":
        image, looks = Image.fromarray(levels[..., 0] > 99), np.where(levels[..., 0] > 99, 255, 0)
    elif mode == "P":
        colours = draw(hnp.arrays(np.uint8, (256, 3), elements=st.sampled_from([0, 90, 255])))
        colours = colours[:, :1].repeat(3, 1) if draw(st.booleans()) else colours
        image = Image.fromarray(levels[..., 0], "P")
        image.putpalette(colours.tobytes())
        looks = colours[levels[..., 0]]
        looks = looks[..., 0] if (looks == looks[..., :1]).all() else looks
    elif mode in ("I;16", "I", "F"):
        deep = {"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode]
        image, looks = Image.fromarray(levels[..., 0].astype(deep) * 200), None
    else:
        image = Image.fromarray(levels[..., 0] if channels == 1 else levels, mode)
        looks = levels[..., 0] if channels == 1 else levels
        if mode in ("LA", "RGBA"):
            alpha = levels[..., -1:] / 255
            looks = np.floor(levels[..., :-1] * alpha + 100 * (1 - alpha) + 0.5)
            looks = looks[..., 0] if mode == "LA" else looks
        elif mode == "CMYK":
            inks = levels / 255
            looks = 255 * (1 - inks[..., :3]) * (1 - inks[..., 3:])  # what paper reflects
    raw = io.BytesIO()
    # Only what the format holds without loss tells whether it is read right.
    holds = {
        "png": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"),
        "tif": MODES,
        "bmp": ("1", "L", "RGB", "P"),
        "gif": ("P", "L", "1"),
        "ppm": ("L", "RGB", "1"),
        "webp": ("RGB",),
    }
    if mode not in holds[suffix]:
        suffix = "tif"
    options = {"webp": {"lossless": True}}.get(suffix, {})
    image.save(raw, {"tif": "tiff"}.get(suffix, suffix), **options)
    return suffix, raw.getvalue(), looks, mode


@tried(250)
@given(picture(), st.integers(0, 8), st.booleans())
def test_a_picture_is_what_it_looks_like(drawn, cut, upper):
    suffix, raw, looks, mode = drawn
    with folder() as place:
        path = place / f"ü ☃.{suffix.upper() if upper else suffix}"
        path.write_bytes(raw[: len(raw) * (8 - cut // 2) // 8] if cut % 2 else raw)
        try:
            got = read_image(path, Framing(background=100))
        except ValueError as error:
            assert path.name in str(error) and "wanted" in str(error)
            assert looks is None or cut % 2
            return
        assert looks is not None, "more than 8 bits were dropped"
        if cut % 2 and cut > 1:
            return  # a decoder may find enough in a shortened file
        channels = got.permute(1, 2, 0).squeeze(-1).numpy().astype(int)
        if looks.ndim == 3 and channels.ndim == 2:
            raise AssertionError(f"colour was lost from {mode} in {suffix}")
        assert channels.shape[:2] == looks.shape[:2] or 1 in looks.shape
        difference = channels.reshape(-1) - np.asarray(looks, dtype=float).reshape(-1)
        assert np.abs(difference).max() <= (2 if mode == "CMYK" else 1 if mode in ("LA", "RGBA") else 0)


@tried(100)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["", "train", "val", "valid", "test", "Testing", "train_set"]),
            st.sampled_from(["", "cat", "dog"]),
            st.sampled_from(["png", "TIF", "jfif", "txt", "gif"]),
            st.integers(1, 3),
        ),
        min_size=1,
        max_size=9,
    )
)
def test_folders_keep_parts_and_files_apart(files):
    """Each file has levels of its own, so that every image tells where it came from."""
    with folder() as place:
        origin = {}
        for number, (part, name, suffix, frames) in enumerate(files):
            where = place / part / name
            where.mkdir(parents=True, exist_ok=True)
            path = where / f"{number}.{suffix}"
            if suffix == "txt":
                path.write_text("no picture")
                continue
            frames = frames if suffix in ("TIF", "gif") else 1
            kept = [Image.new("L", (4, 4), 20 * number + 3 * frame + 5) for frame in range(frames)]
            more = {"save_all": True, "append_images": kept[1:]} if frames > 1 else {}
            kept[0].save(path, {"TIF": "tiff", "jfif": "jpeg"}.get(suffix, suffix), **more)
            origin |= {20 * number + 3 * frame + 5: (part.lower()[:3], number) for frame in range(frames)}
            assert len(read_frames(path, range(frames))) == frames
        dataset = outcome(place)
        if dataset is None:
            return
        found = {
            part: [origin[level] for level in getattr(dataset, part).pixels[:, 0, 0, 0].tolist()]
            for part in ("train", "validation", "test")
        }
        assert sorted(sum(found.values(), [])) == sorted(origin.values())
        given_parts = {part for part, _ in origin.values()}
        if given_parts != {""}:
            assert "" not in given_parts
            assert not {"val", "tes"} & {part for part, _ in found["train"]}
            if "tes" in given_parts:
                assert {part for part, _ in found["test"]} == {"tes"}
            assert given_parts == {"tra"} or found["train"]
        owners = [{number for _, number in rows} for rows in found.values()]
        if len({number for _, number in origin.values()}) >= 3 and given_parts in ({""}, {"tra"}):
            assert not owners[0] & owners[1] and not owners[0] & owners[2] and not owners[1] & owners[2]
        assert dataset.label_names in (None, ("cat", "dog"))
