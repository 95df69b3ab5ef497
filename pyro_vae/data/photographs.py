"""Image files: any folder of them, and CelebA.

Files are decoded by a few threads straight into one uint8 tensor, framed on the way, so
that 200,000 photographs never lie in memory at their full size.
"""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pyro_vae.data.framing import Framing
from pyro_vae.data.sources import SPLITS, Source, divide, shuffled, tenths

__all__ = ["read_celeba", "read_folder", "read_image", "read_images"]

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"})
GREY_MODES = frozenset({"1", "L", "LA", "La"})
DEEP_MODES = ("I", "F")
PART_NAMES = {"train": "train", "training": "train", "val": "validation", "valid": "validation",
              "validation": "validation", "test": "test", "testing": "test"}


AS_IT_IS = Framing()


def read_image(path: str | Path, framing: Framing = AS_IT_IS) -> Tensor:
    """One image file as uint8 (C, H, W): one channel if the file is grey, else three.

    Turned as its EXIF tag says; transparency is dropped.

    Args:
        path: PNG, JPEG or whatever else Pillow decodes, 8 bits a channel.
        framing: Crop, size and channels to bring it to.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            mode = image.mode
            if mode.startswith(DEEP_MODES):
                raise ValueError(f"{path} has more than 8 bits a channel (Pillow mode {mode}), wanted 8. "
                                 "Convert it, or save the images as a float .npy array in [0, 1].")
            upright = ImageOps.exif_transpose(image)
            array = np.array(upright.convert("L" if mode in GREY_MODES else "RGB"))
    except FileNotFoundError as error:
        raise ValueError(f"{path} could not be decoded: there is no such file. Check the path.") from error
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        reason = str(error).replace(str(path), "the file")
        raise ValueError(
            f"{path} could not be decoded ({reason}), wanted an image. Remove the file or save it again."
        ) from error
    pixels = torch.from_numpy(array)
    pixels = pixels.unsqueeze(0) if pixels.dim() == 2 else pixels.permute(2, 0, 1)
    return framing(pixels.unsqueeze(0), name=str(path)).squeeze(0)


def read_images(paths: Sequence[Path], framing: Framing = AS_IT_IS) -> Tensor:
    """Image files of one size and colour as uint8 (N, C, H, W).

    Args:
        paths: The files, at least one.
        framing: Crop, size and channels to bring them to.
    Raises:
        ValueError: If two files differ in size or colour after framing; it names both.
    """
    first = read_image(paths[0], framing)
    images = torch.empty((len(paths), *first.shape), dtype=torch.uint8)

    def fill(row: int) -> None:
        image = read_image(paths[row], framing)
        if image.shape != first.shape:
            raise ValueError(_unlike(paths[0], first, paths[row], image))
        images[row] = image

    # Errors come in the order of the files, so a folder with two bad ones always names the same.
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        try:
            for _ in pool.map(fill, range(len(paths))):
                pass
        except ValueError:
            pool.shutdown(cancel_futures=True)
            raise
    return images


def read_folder(folder: Path, framing: Framing, limit: int | None = None, seed: int = 0) -> Source:
    """All images below a folder, of any depth.

    Subfolders named train and test (and validation) are taken as the split; else it is
    80/10/10 in an order fixed by the seed. Where every image lies in one of several
    first-level subfolders, their names are the labels.

    Args:
        folder: Where to look; hidden files and other suffixes are passed over.
        framing: Crop, size and channels.
        limit: Decode at most this many images of each split.
        seed: Of the split.
    """
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file()
                   and not any(part.startswith(".") for part in path.relative_to(folder).parts))
    if not paths:
        raise ValueError(f"{folder} holds no images, wanted files ending in {', '.join(sorted(SUFFIXES))}. "
                         "Check the path, or point at the folder above or below.")
    inner = [path.relative_to(folder).parts for path in paths]
    tops = {parts[0] for parts in inner if len(parts) > 1}
    if all(len(parts) > 1 for parts in inner) and _are_parts(tops):
        parts, how = _given_parts(inner, seed)
        inner = [names[1:] for names in inner]
    else:
        parts = divide(len(paths), tenths(len(paths), str(folder)), seed)
        how = f"80/10/10 of the sorted paths in the order of shuffled({len(paths)}, seed={seed})"
    parts = {name: rows[:limit] for name, rows in parts.items()}
    names = tuple(sorted({parts_of[0] for parts_of in inner if len(parts_of) > 1}))
    labelled = len(names) > 1 and all(len(parts_of) > 1 for parts_of in inner)
    rows = torch.cat([parts[name] for name in SPLITS])
    pixels = read_images([paths[row] for row in rows.tolist()], framing)
    labels = torch.tensor([names.index(parts_of[0]) for parts_of in inner]) if labelled else None
    return Source(
        pixels=dict(zip(SPLITS, pixels.split([len(parts[name]) for name in SPLITS]), strict=True)),
        labels=None if labels is None else {name: labels[parts[name]] for name in SPLITS},
        label_names=names if labelled else None, origin=str(folder), dequantize=True, split=how,
    )


def read_celeba(data_dir: Path, framing: Framing, limit: int | None = None) -> Source:
    """CelebA in torchvision's layout, with its official split.

    Args:
        data_dir: Holds `celeba/img_align_celeba/*.jpg` and `celeba/list_eval_partition.txt`,
            or is that `celeba` folder.
        framing: Crop, size and channels.
        limit: Decode at most this many images of each split.
    """
    folder = next((place for place in (data_dir / "celeba", data_dir) if (place / "img_align_celeba").is_dir()), None)
    if folder is None or not (folder / "list_eval_partition.txt").is_file():
        raise ValueError(f"no celeba in {data_dir}: wanted the folder img_align_celeba with the images and the file "
                         f"list_eval_partition.txt, both in {data_dir / 'celeba'}. Fetch them from "
                         "https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html and unpack them there.")
    parts: dict[str, list[Path]] = {name: [] for name in SPLITS}
    for number, line in enumerate((folder / "list_eval_partition.txt").read_text().splitlines(), start=1):
        words = line.split()
        if not words:
            continue
        if len(words) != 2 or words[1] not in ("0", "1", "2"):
            raise ValueError(f"{folder / 'list_eval_partition.txt'}, line {number}: got {line[:60]!r}, "
                             "wanted a file name and 0, 1 or 2. Fetch the list again.")
        parts[SPLITS[int(words[1])]].append(folder / "img_align_celeba" / words[0])
    empty = [name for name in SPLITS if not parts[name]]
    if empty:
        raise ValueError(f"{folder / 'list_eval_partition.txt'} names no images for {', '.join(empty)}, "
                         "wanted some for each of train (0), validation (1) and test (2). Fetch the list again.")
    pixels = {name: read_images(parts[name][:limit], framing) for name in SPLITS}
    return Source(pixels=pixels, origin=str(folder), dequantize=True, split="official list_eval_partition.txt")


def _are_parts(tops: set[str]) -> bool:
    kinds = [PART_NAMES.get(top.lower()) for top in tops]
    return None not in kinds and len(set(kinds)) == len(kinds) and {"train", "test"} <= set(kinds)


def _given_parts(inner: Sequence[tuple[str, ...]], seed: int) -> tuple[dict[str, Tensor], str]:
    kinds = [PART_NAMES[names[0].lower()] for names in inner]
    parts = {name: torch.tensor([row for row, kind in enumerate(kinds) if kind == name], dtype=torch.long)
             for name in SPLITS}
    if len(parts["validation"]):
        return parts, "the subfolders train, validation and test"
    train = parts["train"][shuffled(len(parts["train"]), seed)]
    held_out = max(1, len(train) // 10)
    if held_out >= len(train):
        raise ValueError(f"got {len(train)} training image, wanted at least 2, one of them to validate. Add images.")
    parts["train"], parts["validation"] = train[:-held_out], train[-held_out:]
    return parts, f"the subfolders train and test; validation: {held_out} of train, chosen with seed {seed}"


def _unlike(first_path: Path, first: Tensor, path: Path, image: Tensor) -> str:
    if first.shape[0] != image.shape[0]:
        kind = {1: "grey", 3: "colour"}
        return (f"images differ in colour: {first_path} is {kind[first.shape[0]]}, {path} is {kind[image.shape[0]]}; "
                "wanted one kind. Pass channels=1 or channels=3.")
    return (f"images differ in size: {first_path} is {first.shape[1]}x{first.shape[2]}, {path} is "
            f"{image.shape[1]}x{image.shape[2]} (height x width); wanted one size. "
            "Pass image_size=, e.g. image_size=64.")
