"""Image files: any folder of them, and CelebA.

Files are decoded by a few threads straight into one uint8 tensor, framed on the way, so
that 200,000 photographs never lie in memory at their full size (where there is no `room` for it, in a temporary file).
What is in one file: `decoding`.
"""

import itertools
import os
import re
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from pyro_vae.data.arrays import not_readable, only
from pyro_vae.data.decoding import AS_IT_IS, Framing, frames_of, read_frames, read_image, suffixes
from pyro_vae.data.labels import PART_NAMES
from pyro_vae.data.room import empty
from pyro_vae.data.sources import SPLITS, Source, completed, cut, rows_of, tenths
from pyro_vae.words import one_of

__all__ = ["read_celeba", "read_folder", "read_image", "read_images"]

PART = re.compile(rf"({'|'.join(PART_NAMES)})(?:[-_ ]?(?:sets?|data|images?|imgs?|\d{{4}}))?", re.IGNORECASE)
ATTRIBUTES = "list_attr_celeba.txt"
MOST_BY_DEFAULT = 64  # pixels a side, of images that have to be made one size
ARRAYS_TOO = "or a layout of torchvision, or a .npy or .npz file"


def read_images(paths: Sequence[Path | tuple[Path, Sequence[int]]], framing: Framing = AS_IT_IS) -> Tensor:
    """Image files of one size and colour as uint8 (N, C, H, W); with a tuple, these frames of the file.

    Two files that differ in size or colour after framing are a ValueError that names both.
    """
    jobs = [entry if isinstance(entry, tuple) else (entry, None) for entry in paths]
    starts = [0, *itertools.accumulate(1 if frames is None else len(frames) for _, frames in jobs)]

    def decoded(path: Path, frames: Sequence[int] | None) -> list[Tensor]:
        return [read_image(path, framing)] if frames is None else read_frames(path, frames, framing)

    first_path, first = jobs[0][0], decoded(*jobs[0])[0]
    images = empty((starts[-1], *first.shape), torch.uint8)

    def fill(job: int) -> None:
        path, frames = jobs[job]
        for row, image in enumerate(decoded(path, frames), start=starts[job]):
            if image.shape != first.shape:
                raise ValueError(_unlike(first_path, first, path, image))
            images[row] = image

    # Errors come in the order of the files, so a folder with two bad ones always names the same.
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        try:
            for _ in pool.map(fill, range(len(jobs))):
                pass
        except ValueError:
            pool.shutdown(cancel_futures=True)
            raise
    return images


def read_folder(folder: Path, framing: Framing, limit: int | None = None, seed: int = 0) -> Source:
    """All images below a folder, of any depth, every frame of a stack or an animation; or one such file.

    Subfolders named train and test (and validation) are taken as the split, at whatever depth, and never as labels;
    else it is 80/10/10 in an order fixed by the seed. The frames of one file stay in one part. Where every image lies
    in one of several first-level subfolders, their names are the labels. At most `limit` images of each split are
    decoded.
    """
    paths = _pictures(folder)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        counts, beside, transparent, sizes = zip(*pool.map(frames_of, paths), strict=True)
    if any(beside):
        warnings.warn(
            f"{folder}: {sum(beside)} JPEG files hold more pictures behind the first (MPO); the first was taken.",
            stacklevel=4,
        )
    framing, notes = _one_size(folder, framing, {size for size in sizes if size is not None})
    groups = torch.tensor(counts)
    inner = [path.relative_to(folder).parts[:-1] for path in paths]
    kinds, inner = _kinds(folder, inner)
    rows, how = _split(folder, kinds, groups, seed)
    rows = {name: index[:limit] for name, index in rows.items()}
    names = tuple(sorted({folders[0] for folders in inner if folders}))
    labelled = len(names) > 1 and all(inner)
    pixels = read_images(_jobs(paths, groups, torch.cat([rows[name] for name in SPLITS])), framing)
    owner = torch.arange(len(paths)).repeat_interleave(groups)
    labels = torch.tensor([names.index(folders[0]) for folders in inner])[owner] if labelled else None
    binary = pixels.shape[1] == 1 and only(pixels.numpy(), 0, 255) and bool(pixels.min() < pixels.max())
    return Source(
        pixels=dict(zip(SPLITS, pixels.split([len(rows[name]) for name in SPLITS]), strict=True)),
        labels=None if labels is None else {name: labels[rows[name]] for name in SPLITS},
        label_names=names if labelled else None,
        origin=str(folder),
        split=how,
        dequantize=not binary,
        binarization="threshold" if binary else "none",
        notes=notes | ({"background": framing.background} if any(transparent) else {}),
    )


def _one_size(folder: Path, framing: Framing, sizes: set[tuple[int, int]]) -> tuple[Framing, dict[str, object]]:
    """A framing that makes one size of images of several, where none was asked for; and a note of it."""
    if framing.image_size is not None or framing.crop is not None or len(sizes) < 2:
        return framing, {}
    side = min(MOST_BY_DEFAULT, min(min(size) for size in sizes))
    low, high = (f"{height}x{width}" for height, width in (min(sizes), max(sizes)))
    warnings.warn(
        f"{folder}: images of {len(sizes)} sizes, from {low} to {high} (height x width), were scaled and cut "
        f"to {side}x{side}. For another size pass image_size=, or --image-size.",
        stacklevel=5,
    )
    return replace(framing, image_size=side), {"image_size": side}


def read_celeba(data_dir: Path, framing: Framing, limit: int | None = None, attribute: str | None = None) -> Source:
    """CelebA in torchvision's layout, with its official split: at most `limit` images of each part.

    data_dir holds `celeba/img_align_celeba/*.jpg` and `celeba/list_eval_partition.txt`, or is that `celeba` folder.
    Where `list_attr_celeba.txt` lies beside, an attribute is the labels, 1 for those that have it: `attribute`, or
    "Smiling".
    """
    folder = next((place for place in (data_dir / "celeba", data_dir) if (place / "img_align_celeba").is_dir()), None)
    if folder is None or not (folder / "list_eval_partition.txt").is_file():
        raise ValueError(
            f"no celeba in {data_dir}: wanted the folder img_align_celeba with the images and the file "
            f"list_eval_partition.txt, both in {data_dir / 'celeba'}. Fetch them from "
            "https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html and unpack them there."
        )
    parts: dict[str, list[Path]] = {name: [] for name in SPLITS}
    for number, line in enumerate((folder / "list_eval_partition.txt").read_text().splitlines(), start=1):
        words = line.split()
        if not words:
            continue
        if len(words) != 2 or words[1] not in ("0", "1", "2"):
            raise ValueError(
                f"{folder / 'list_eval_partition.txt'}, line {number}: got {line[:60]!r}, "
                "wanted a file name and 0, 1 or 2. Fetch the list again."
            )
        parts[SPLITS[int(words[1])]].append(folder / "img_align_celeba" / words[0])
    empty = [name for name in SPLITS if not parts[name]]
    if empty:
        raise ValueError(
            f"{folder / 'list_eval_partition.txt'} names no images for {', '.join(empty)}, "
            "wanted some for each of train (0), validation (1) and test (2). Fetch the list again."
        )
    labels, names, notes = _attribute(folder, {name: parts[name][:limit] for name in SPLITS}, attribute)
    pixels = {name: read_images(parts[name][:limit], framing) for name in SPLITS}
    return Source(
        pixels=pixels,
        origin=str(folder),
        dequantize=True,
        split="official list_eval_partition.txt",
        labels=labels,
        label_names=names,
        notes=notes,
    )


def _attribute(
    folder: Path, parts: Mapping[str, Sequence[Path]], name: str | None
) -> tuple[dict[str, Tensor] | None, tuple[str, ...] | None, dict[str, object]]:
    """One attribute of the images in each part, its names for no and yes, and a note of it."""
    path = folder / ATTRIBUTES
    if not path.is_file():
        if name is not None:
            raise ValueError(f"got labels={name!r} for celeba, wanted the attributes in {path}. Fetch the file too.")
        return None, None, {}
    lines = [line.split() for line in path.read_text().splitlines()]
    known = lines[1] if len(lines) > 1 else []
    usual = "Smiling" if "Smiling" in known else known[0] if known else ""
    found = one_of("attribute of celeba", name or usual, known)
    column = known.index(found) + 1
    values: dict[str, int] = {}
    for number, words in enumerate(lines[2:], start=3):
        if words and (len(words) != len(known) + 1 or words[column] not in ("-1", "1")):
            raise ValueError(
                f"{path}, line {number}: got {' '.join(words)[:60]!r}, wanted a file name and -1 or 1 for "
                f"each of {len(known)} attributes. Fetch the list again."
            )
        if words:
            values[words[0]] = int(words[column] == "1")
    missing = next((file.name for files in parts.values() for file in files if file.name not in values), None)
    if missing is not None:
        raise ValueError(f"{path} has no line for {missing}, wanted one for each image. Fetch the list again.")
    labels = {part: torch.tensor([values[file.name] for file in files]) for part, files in parts.items()}
    return labels, (f"not {found}", found), {"labels": found, "attributes": known}


def _pictures(folder: Path) -> list[Path]:
    """The picture files, sorted; what else lies there is said in one line."""
    known = suffixes()
    if folder.is_file():
        return [folder]
    files = sorted(
        path
        for path in folder.rglob("*")
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    paths = [path for path in files if path.suffix.lower() in known]
    if not paths:
        wanted = ", ".join(sorted(known, key=lambda suffix: (len(suffix), suffix)))
        raise ValueError(
            f"{folder} holds no images, wanted files ending in {wanted}, {ARRAYS_TOO}. "
            f"{not_readable(folder) or 'Check the path, or point at the folder above or below.'}"
        )
    others = Counter(path.suffix.lower() or "without a suffix" for path in files if path.suffix.lower() not in known)
    if others:
        ranked = sorted(others.items(), key=lambda item: (-item[1], item))
        named = ", ".join(f"{count} {suffix}" for suffix, count in ranked)
        warnings.warn(
            f"{folder}: passed over {others.total()} files that are not read as images: {named}.", stacklevel=5
        )
    return paths


def _kinds(folder: Path, inner: Sequence[tuple[str, ...]]) -> tuple[list[str | None], list[tuple[str, ...]]]:
    """The part that each file's folders name, and the folders that do not."""
    kinds: list[str | None] = []
    spelled: dict[str, set[tuple[str, ...]]] = {}
    for folders in inner:
        found = [
            (level, PART_NAMES[match[1].lower()])
            for level, name in enumerate(folders)
            if (match := PART.fullmatch(name))
        ]
        kind = found[0][1] if found else None
        if len({part for _, part in found}) > 1:
            raise ValueError(f"{folder / Path(*folders)} names two parts of a split, wanted one. Rename a folder.")
        kinds.append(kind)
        if kind is not None:
            spelled.setdefault(kind, set()).add(tuple(folders[level] for level, _ in found))
    rest = [tuple(name for name in folders if not PART.fullmatch(name)) for folders in inner]
    if not spelled:
        return kinds, rest
    twice = next((names for names in spelled.values() if len(names) > 1), None)
    if twice:
        raise ValueError(
            f"{folder} holds {' and '.join('/'.join(names) for names in sorted(twice))} for one part of "
            "the split, wanted one folder for each of train, validation and test. Merge or rename them."
        )
    if None in kinds:
        outside = folder / Path(*inner[kinds.index(None)])
        names = ", ".join(sorted("/".join(name) for names in spelled.values() for name in names))
        raise ValueError(
            f"{folder} holds folders named {names}, which are parts of a split, and images outside them, "
            f"in {outside}; wanted all images in train, validation or test. Move them, or rename what is "
            "a class."
        )
    if set(spelled) == {"train"}:
        return [None] * len(kinds), rest
    if "train" not in spelled:
        raise ValueError(
            f"{folder} holds images for {' and '.join(spelled)} but none for train, wanted train and "
            "test. Add them, or point at the one folder to have it split."
        )
    return kinds, rest


def _split(folder: Path, kinds: Sequence[str | None], groups: Tensor, seed: int) -> tuple[dict[str, Tensor], str]:
    """Rows of each part among all frames of all files."""
    if None in kinds:
        pieces, whole = cut(groups, lambda count: tenths(count, str(folder)), seed)
        frames = ", the frames of a file together" if len(groups) < groups.sum() else ""
        how = f"80/10/10 of the sorted paths in the order of shuffled({len(groups)}, seed={seed}){frames}"
        if not whole:
            how = f"80/10/10 of the {int(groups.sum())} frames in their order, the last of them tested on"
        return dict(zip(SPLITS, pieces, strict=True)), how
    files = {
        part: torch.tensor([row for row, kind in enumerate(kinds) if kind == part], dtype=torch.long) for part in SPLITS
    }
    given = {part: groups[index] for part, index in files.items() if len(index)}
    rows, how = completed(given, str(folder), seed)
    # Rows of a part are counted from its first frame; here they become rows of all frames.
    everything = {part: rows_of(groups, files[part]) for part in given}
    return (
        {name: everything[part][index] for name, (part, index) in rows.items()},
        f"the subfolders {' and '.join([', '.join(list(given)[:-1]), list(given)[-1]])}{how}",
    )


def _jobs(paths: Sequence[Path], groups: Tensor, rows: Tensor) -> list[Path | tuple[Path, Sequence[int]]]:
    """What to decode for these rows, in their order: a file once for all of its frames that follow each other."""
    starts = groups.cumsum(0) - groups
    owner = torch.arange(len(paths)).repeat_interleave(groups)[rows].tolist()
    jobs: list[Path | tuple[Path, Sequence[int]]] = []
    for file, same in itertools.groupby(zip(owner, rows.tolist(), strict=True), key=lambda pair: pair[0]):
        jobs.append(paths[file] if groups[file] == 1 else (paths[file], [row - int(starts[file]) for _, row in same]))
    return jobs


def _unlike(first_path: Path, first: Tensor, path: Path, image: Tensor) -> str:
    if first.shape[0] != image.shape[0]:
        kind = {1: "grey", 3: "colour"}
        return (
            f"images differ in colour: {first_path} is {kind[first.shape[0]]}, {path} is {kind[image.shape[0]]}; "
            "wanted one kind. Pass channels=1 or channels=3 (--channels)."
        )
    return (
        f"images differ in size: {first_path} is {first.shape[1]}x{first.shape[2]}, {path} is "
        f"{image.shape[1]}x{image.shape[2]} (height x width); wanted one size. "
        "Pass image_size=, e.g. image_size=64 (--image-size)."
    )
