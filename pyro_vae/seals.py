"""Files of tensors that say whether they are what was written.

A safetensors file has no checksum. What this package writes carries a digest of all its bytes in its header; a file
without one, of another program, is read as it is.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pyro_vae.atomic import replace_file

_NAME = "pyro_vae.digest"
_EMPTY = "0" * 32
_BLOCK = 2**20


def save(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    write: Callable[[Any, str, dict[str, str]], Any] = save_file,
) -> None:
    """Write tensors, or whatever `write` takes, and texts to a safetensors file, atomically and sealed.

    Raises:
        OSError: Nothing can be written there; an older file is then as it was.
    Example:
        >>> import tempfile, torch
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "a.safetensors")
        ...     save(path, {"a": torch.ones(2)}, {"said": "twice one"})
        ...     print(read(path))
        ...     _ = path.write_bytes(path.read_bytes()[:-1] + b"!")  # another number
        ...     try:
        ...         read(path)
        ...     except ValueError as error:
        ...         print(str(error).replace(folder, "")[1:])
        ({'a': tensor([1., 1.])}, {'said': 'twice one'})
        a.safetensors is damaged: its bytes are not those that were written.
    """

    def whole(partial: Path) -> None:
        try:
            write(tensors, str(partial), dict(metadata))
        except SafetensorError as error:  # which says so of a full disk, too
            raise OSError(str(error)) from error
        with partial.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
            numbers = file.read()
        # The library writes texts in an order of its own: the same content is to be the same bytes.
        texts = dict(sorted(({**metadata, _NAME: _EMPTY}).items()))
        header = {"__metadata__": texts} | {name: entry for name, entry in header.items() if name != "__metadata__"}
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        partial.write_bytes(len(text).to_bytes(8, "little") + text + numbers)
        digest = _digest(partial)
        with partial.open("r+b") as file:
            file.seek(8 + text.index(_field(_EMPTY)) + len(_NAME) + 4)
            file.write(digest.encode())

    replace_file(path, whole)


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and texts of a safetensors file; a ValueError for none, or a damaged one."""
    metadata = check(path)
    with safe_open(str(path), framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118 (a file is no dict)


def check(path: str | os.PathLike[str]) -> dict[str, str]:
    """The texts of a safetensors file; a ValueError for none, or a damaged one."""
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata: dict[str, str] = file.metadata() or {}
        said = metadata.pop(_NAME, None)
        if said is not None and said != _digest(Path(path), said):
            raise ValueError(f"{path} is damaged: its bytes are not those that were written.")
    except FileNotFoundError as error:
        raise ValueError(f"no such file: {path}.") from error
    except (SafetensorError, OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not a readable safetensors file: {error}.") from error
    return metadata


def _digest(path: Path, said: str = _EMPTY) -> str:
    """Of all bytes of a file, with zeros where its digest stands."""
    found = hashlib.blake2b(digest_size=len(_EMPTY) // 2)
    with path.open("rb") as file:
        size = file.read(8)
        header = file.read(int.from_bytes(size, "little"))
        found.update(size + header.replace(_field(said), _field(_EMPTY)))
        while block := file.read(_BLOCK):
            found.update(block)
    return found.hexdigest()


def _field(digest: str) -> bytes:
    return f'"{_NAME}":"{digest}"'.encode()
