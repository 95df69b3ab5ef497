"""Which library multiplies the matrices of a captured graph: found out here by the clock, once, and kept on disk.

On a CPU torch hands a float32 product to its default library (MKL on x86) or, with the precision "medium", to oneDNN,
which is as exact where there is no matrix unit for bfloat16. Which of them is faster depends on the processor, the
shapes and the number of threads: a call of oneDNN costs more, and on AMD its large products take half the time. So each
product of a graph is timed by both, and the graph takes the library that is faster in all.

The choice is kept in a file beside Inductor's cache, under a name made of the products, the processor, what its
libraries may use, the threads and torch's version. The first to write it decides, so that all processes multiply alike;
a fit that goes on takes the library of its checkpoint. Where the file is lost, numbers may differ by rounding.
"""

from __future__ import annotations

import functools
import getpass
import hashlib
import json
import os
import platform
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from pyro_vae.atomic import replace_file
from pyro_vae.inference.graphs import PRODUCTS
from pyro_vae.inference.hardware import DEFAULT, ONEDNN, medium_is_exact, multiplied_by

_TIMES = 20  # calls of a product by each library, of which the fastest counts
_SECONDS = 0.5  # for the products of a graph, where three calls of each take less
_MOST = 2**20  # bytes of a file
# What tells libraries which instructions and threads they may use.
_VARIABLES = (
    "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "ONEDNN_CPU_ISA_HINTS", "MKL_ENABLE_INSTRUCTIONS",
    "MKL_DEBUG_CPU_TYPE", "MKL_CBWR", "OPENBLAS_CORETYPE",
)  # fmt: skip
_known: dict[str, Choice] = {}
_wanted: dict[str, str] = {}


class Product(NamedTuple):
    """A product of a graph, how often it has it, its multiplications and additions, and its time by each library."""

    name: str
    times: int
    operations: float
    seconds: dict[str, float]


class Choice(NamedTuple):
    """The library for a graph, and what it rests on."""

    key: str
    library: str
    products: tuple[Product, ...]

    def seconds(self, library: str | None = None) -> float:
        """Of all products of the graph by themselves, by a library: the chosen one, if none is named."""
        return sum(p.times * p.seconds[library or self.library] for p in self.products)

    @property
    def operations(self) -> float:
        return sum(p.times * p.operations for p in self.products)


def chosen(graph: fx.Graph) -> Choice:
    """The library for a graph on a CPU: as it was found before, or found now, which takes half a second at the most
    (three calls of each product where they take longer)."""
    nodes = [node for node in graph.nodes if getattr(node.target, "overloadpacket", None) in PRODUCTS]
    kinds = Counter(map(_kind, nodes))
    first = {_kind(node): node for node in reversed(nodes)}
    libraries = (DEFAULT, ONEDNN) if medium_is_exact() else (DEFAULT,)
    key = hashlib.sha256(repr((sorted(kinds.items()), libraries, _machine())).encode()).hexdigest()[:32]
    if key not in _known:
        found = _read(key, libraries, len(kinds))
        if found is None:
            new = not _place(key).exists()  # else it is there and cannot be read
            share = _SECONDS / max(1, len(kinds))
            products = tuple(_timed(first[kind], kind, times, libraries, share) for kind, times in kinds.items())
            fastest = min(libraries, key=lambda library: Choice(key, library, products).seconds())
            found = _kept(Choice(key, fastest, products), libraries, new)
        _known[key] = found
    found = _known[key]
    wanted = _wanted.get(key, found.library)
    return found._replace(library=wanted) if wanted in libraries else found


@functools.cache
def usual() -> str:
    """The library for what is not captured: the one that is faster for a layer of usual size."""
    graph = fx.Graph()
    shapes = (1024, 512), (512, 512)
    left, right = (graph.placeholder(f"x{len(shape)}") for shape in shapes)
    for node, shape in zip((left, right), shapes, strict=True):
        node.meta["val"] = torch.empty(shape, dtype=torch.float32)
    graph.output(graph.call_function(torch.ops.aten.mm.default, (left, right)))
    return chosen(graph).library


def want(libraries: Mapping[str, str]) -> None:
    """Take these libraries, by keys of choices: those of a fit that goes on."""
    _wanted.update(libraries)


def directory() -> Path:
    """Where choices are kept: beside what Inductor has compiled."""
    beside = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    if beside is None:
        try:
            user = getpass.getuser()
        except (KeyError, OSError, ImportError):  # a container's user need have no name
            user = str(getattr(os, "getuid", int)())
        beside = os.path.join(
            tempfile.gettempdir(), f"torchinductor_{''.join(c if c.isalnum() else '_' for c in user)}"
        )
    return Path(beside) / "pyro_vae_products"


def _kind(node: fx.Node) -> str:
    """What tells two products apart: the operation, and shapes, strides and types of what it gets."""

    def part(value: Any) -> str:
        if not isinstance(value, fx.Node):
            return repr(value)
        tensor = value.meta["val"]
        kind = str(tensor.dtype).removeprefix("torch.")
        plain = tensor.is_contiguous()
        return f"{'x'.join(map(str, tensor.shape))}{'' if plain else f' by {tuple(tensor.stride())}'} {kind}"

    name = str(node.target).removeprefix("aten.").removesuffix(".default")
    return f"{name}({', '.join(str(pytree.tree_map(part, a)) for a in node.args)})"


def _machine() -> tuple[Any, ...]:
    """The processor, what libraries may use of it, threads and versions."""
    lines = []
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if not line.strip():
                    break
                if line.split(":")[0].strip() in ("vendor_id", "cpu family", "model", "model name", "stepping"):
                    lines.append(line.split(":", 1)[1].strip())
    except OSError:
        lines.append(platform.processor())
    allowed = [os.environ.get(name, "") for name in _VARIABLES]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return (
        platform.machine(), *lines, torch.backends.cpu.get_cpu_capability(), *allowed, torch.get_num_threads(), cores,
        torch.__version__,
    )  # fmt: skip


def _timed(node: fx.Node, kind: str, times: int, libraries: tuple[str, ...], share: float) -> Product:
    """The fastest call of a product by each library, in turn, on tensors of the same shapes and layouts."""
    generator = torch.Generator().manual_seed(0)
    target: Any = node.target
    seconds = dict.fromkeys(libraries, float("inf"))
    with torch.no_grad():
        args = pytree.tree_map(
            lambda a: _tensor(a, generator) if isinstance(a, fx.Node) else a, (tuple(node.args), dict(node.kwargs))
        )
        with FlopCounterMode(display=False) as counter:
            target(*args[0], **args[1])
        begun, calls = time.perf_counter(), 0
        while calls < 3 or (calls <= _TIMES and time.perf_counter() - begun < share):
            for library in libraries:
                with multiplied_by(library):
                    start = time.perf_counter()
                    target(*args[0], **args[1])
                    taken = time.perf_counter() - start
                if calls:  # in the first call a library makes its plan
                    seconds[library] = min(seconds[library], taken)
            calls += 1
    return Product(kind, times, float(counter.get_total_flops()), seconds)


def _tensor(node: fx.Node, generator: torch.Generator) -> Tensor:
    """Numbers in the shape and layout of a node's, which may be spread over itself."""
    value = node.meta["val"]
    length = (
        1 + sum((n - 1) * step for n, step in zip(value.shape, value.stride(), strict=True)) if value.numel() else 0
    )
    made = torch.zeros(length, dtype=value.dtype, device=value.device)
    if made.is_floating_point():
        made.uniform_(-1, 1, generator=generator)
    return made.as_strided(value.shape, value.stride())


def _read(key: str, libraries: tuple[str, ...], count: int) -> Choice | None:
    """What was found before; None where there is nothing, or nothing that can be read."""
    try:
        with _place(key).open(encoding="utf-8") as file:
            found = json.loads(file.read(_MOST))
        products = tuple(
            Product(str(name), int(times), float(operations), {str(k): float(v) for k, v in seconds.items()})
            for name, times, operations, seconds in found["products"]
        )
        whole = len(products) == count and all(set(p.seconds) == set(libraries) for p in products)
        return Choice(key, found["library"], products) if whole and found["library"] in libraries else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        return None


def _place(key: str) -> Path:
    return directory() / f"{key}.json"


def _kept(choice: Choice, libraries: tuple[str, ...], new: bool) -> Choice:
    """Keep a choice on disk, unless another process was first: then that one's. Without a disk it holds for this
    process."""
    path = _place(choice.key)
    text = json.dumps({"library": choice.library, "products": choice.products}, indent=1)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, lambda partial: partial.write_text(text, encoding="utf-8"), new=new)
    except OSError:
        return choice
    return _read(choice.key, libraries, len(choice.products)) or choice
