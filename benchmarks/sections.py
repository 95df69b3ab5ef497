"""What the suite compares: the rows of each section and the problems that they share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from peers import Problem
from rounds import Group, Peer, Row, Timing
from summary import apart, rates_table, ratio_text, spread, summarise_all, table

IWAE = Problem(hidden=(200, 200), activation="tanh", num_samples=50)
QUALITY = -105.0  # nats of the ELBO, as the mean of an epoch of training
PIECES = ("batch", "graph", "adam")  # what a step of `fit` is made of


@dataclasses.dataclass(frozen=True)
class Section:
    """Groups under one name, and the Markdown that is made of them."""

    name: str
    title: str
    minutes: float  # its share of the budget
    groups: tuple[Group, ...]
    render: Callable[[Sequence[Group], Sequence[list[Peer]]], str]


def _ours(key: str, title: str, device: str, function: str = "build", **options: Any) -> Row:
    # On a GPU all libraries get TF32, which is jax's default there; on a CPU replays choose by themselves.
    if device.startswith("cuda") and function == "build":
        options = {"precision": "high"} | options
    return Row(key, f"pyro_vae, {title}", "peers.ours", options, function=function)


def _hand(key: str, title: str, **options: Any) -> Row:
    return Row(key, f"PyTorch by hand, {title}", "peers.by_hand", {"in_memory": True} | options)


def _numpyro(
    key: str = "numpyro", title: str = "NumPyro, epoch jitted", function: str = "build", **options: Any
) -> Row:
    return Row(key, title, "peers.numpyro_idiom", options, needs="numpyro", function=function)


_PYRO_MEMORY = Row("pyro", "Pyro SVI, in memory, logits", "peers.pyro_idiom", {"in_memory": True})
_PYRO = Row("pyro", "Pyro, its VAE example's idiom", "peers.pyro_idiom", loader=True)


def epoch_rows(device: str) -> tuple[Row, ...]:
    """Training by every peer."""
    return (
        _PYRO,
        dataclasses.replace(_PYRO_MEMORY, key="pyro-memory"),
        Row("pyro-jit", "the same, JitTrace_ELBO", "peers.pyro_idiom", {"in_memory": True, "jit": True}),
        Row("torch", "PyTorch by hand, DataLoader", "peers.by_hand", loader=True),
        _hand("torch-memory", "in memory, fused Adam"),
        _hand("torch-medium", "the same, medium matmuls", precision="medium"),
        _hand("torch-compile", "the same, torch.compile", precision="medium", compiled=True),
        _numpyro(),
        _numpyro("numpyro-example", "NumPyro, the same with probabilities, as its example", logits=False),
        _ours("ours", "fit, eager", device),
        _ours("ours-replayed", "fit, captured, no compiler", device, compiled="replay"),
        _ours("ours-compiled", "fit, compiled", device, compiled="inductor"),
        _ours("ours-bf16", "fit, compiled, bf16 matmuls", device, compiled="inductor", precision="bfloat16"),
        Row("floor", "the floor: a step's matrix products alone, medium", "peers.pieces",
            {"piece": "matmul", "precision": "medium"}),
    )  # fmt: skip


def objective_rows(device: str) -> tuple[Row, ...]:
    """The same by the package's own loss, and eager with the faster matmuls."""
    return (
        _ours("ours-medium", "fit, eager, medium matmuls", device, precision="medium"),
        _ours("ours-objective", "fit, eager, Objective(elbo)", device, loss="Objective"),
        _ours("ours-compiled-objective", "fit, compiled, Objective(elbo)", device, loss="Objective",
              compiled="inductor"),
    )  # fmt: skip


def _training_rows(device: str, numpyro: Row) -> tuple[Row, ...]:
    """Fewer rows, in memory, for problems in which the network is most of the work."""
    return (
        _PYRO_MEMORY,
        _hand("torch-medium", "in memory, fused Adam, medium matmuls", precision="medium"),
        _hand("torch-compile", "the same, torch.compile", precision="medium", compiled=True),
        numpyro,
        _ours("ours", "fit, eager", device),
        _ours("ours-compiled", "fit, compiled", device, compiled="inductor"),
        _ours("ours-bf16", "fit, compiled, bf16 matmuls", device, compiled="inductor", precision="bfloat16"),
    )


def _evaluation_rows(device: str) -> tuple[Row, ...]:
    hand = {"title": "PyTorch by hand, chunked, medium matmuls", "module": "peers.by_hand", "function": "evaluation"}
    return (
        Row("pyro", "Pyro, RenyiELBO.loss", "peers.pyro_idiom", function="evaluation"),
        Row("torch-medium", options={"precision": "medium"}, **hand),
        Row("torch-compile", options={"precision": "medium", "compiled": True},
            **hand | {"title": "the same, torch.compile"}),
        _numpyro(title="NumPyro, RenyiELBO.loss, jitted and mapped", function="evaluation"),
        _ours("ours", "log_likelihood, eager", device, "evaluation"),
        _ours("ours-compiled", "log_likelihood, compiled", device, "evaluation", compiled=True),
    )  # fmt: skip


def _scaling_groups(device: str) -> tuple[Group, ...]:
    rows = (_PYRO, _numpyro(), _ours("ours-compiled", "fit, compiled", device, compiled="inductor"))
    base = Problem(device=device)
    points = [
        (dataclasses.replace(base, batch_size=b), n)
        for b, n in ((32, 6_400), (128, 12_800), (512, 20_480), (2_048, 20_480))
    ]
    points += [(dataclasses.replace(base, latent=d), 12_800) for d in (2, 200)]
    points += [(dataclasses.replace(base, num_samples=k), n) for k, n in ((5, 6_400), (50, 1_280))]
    return tuple(
        Group(f"batch {p.batch_size}, latent {p.latent}, K = {p.num_samples}", p, rows, images, rounds=3)
        for p, images in points
    )


def _quality_group(device: str) -> Group:
    rows = {row.key: row for row in epoch_rows(device)}
    keys = ("pyro", "pyro-memory", "torch-memory", "torch-compile", "numpyro", "ours", "ours-compiled")
    return Group(
        f"until an epoch's ELBO passes {QUALITY:g}", Problem(device=device), tuple(rows[key] for key in keys), 48_000,
        rounds=14,
    )  # fmt: skip


def until(timings: Sequence[Timing], target: float) -> tuple[int, float] | None:
    """Epochs and seconds until one of them has this value; None where none has.

    The first epoch is the warm-up, in which compilers run: it counts as one, as long as the others at the median.
    """
    seconds = [timing.seconds for timing in timings]
    for number, timing in enumerate(timings, 1):
        if timing.value >= target:
            return 1 + number, sum(seconds[:number]) + spread(seconds)["median"]
    return None


def _quality_table(groups: Sequence[Group], peers: Sequence[list[Peer]]) -> str:
    (group,), (found,) = groups, peers
    rows = []
    for peer in found:
        passed = None if peer.error is not None else until(peer.timings, QUALITY)
        last = f"{peer.timings[-1].value:.2f} after {len(peer.timings) + 1}" if peer.timings else "no round finished"
        text = [f"{passed[1]:,.1f}", str(passed[0])] if passed else ["", peer.error or f"not reached: {last}"]
        rows.append([peer.row.title.replace("|", "\\|"), *text])
    return f"{group.problem}, {group.title}, {group.images:,} images\n\n" + table(["", "seconds", "epochs"], rows)


def _profile_group(device: str) -> Group:
    def piece(key: str, title: str, **options: Any) -> Row:
        return Row(key, title, "peers.pieces", {"piece": key.split("-")[0]} | options)

    whole = "the whole step as `fit` runs it"
    rows = (
        piece("matmul-highest", "matmuls alone, float32, torch's default", precision="highest"),
        piece("matmul-medium", "matmuls alone, float32, medium", precision="medium"),
        piece("matmul-bfloat16", "matmuls alone, bfloat16, casts not counted", precision="bfloat16"),
        piece("batch", "gather and binarise"),
        piece("noise", "noise of z (drawn for the graph)"),
        piece("graph", "captured loss and gradient, compiled"),
        piece("adam", "fused Adam"),
        dataclasses.replace(_ours("ours-compiled", "", device, compiled="inductor"), title=whole),
        dataclasses.replace(
            _ours("ours-bf16", "", device, compiled="inductor", precision="bfloat16"), title=f"{whole}, bf16 matmuls"
        ),
        _numpyro(title="NumPyro's whole step"),
    )
    return Group("784-400-50, batch 128", Problem(device=device), rows, images=12_800, rounds=5, value="")


def sections(device: str) -> tuple[Section, ...]:
    """All of them, in the order in which they are printed."""
    base, iwae = Problem(device=device), dataclasses.replace(IWAE, device=device)
    # XLA's convolutions on a CPU are several times slower inside a jitted loop.
    convolutional = _numpyro() if device != "cpu" else _numpyro(title="NumPyro, step jitted", looped=False)
    return (
        Section("epochs", "Epochs of NumPyro's example network", 9, (
            Group("batch 128", base, epoch_rows(device), 30_000, rounds=5),
            Group("batch 512", dataclasses.replace(base, batch_size=512), epoch_rows(device), 30_000, rounds=5),
        ), _tables),
        Section("convolutional", "A convolutional VAE", 4, (
            Group("batch 128", dataclasses.replace(base, network="convolutional"),
                  _training_rows(device, convolutional), 6_400, rounds=4),
        ), _tables),
        Section("iwae", "IWAE with 50 samples", 4, (
            Group("batch 128", iwae, _training_rows(device, _numpyro()), 2_560, rounds=4, value="bound"),
        ), _tables),
        Section("evaluation", "Importance-weighted evaluation at K = 5,000", 2, (
            Group("weights drawn once, the same for all rows",
                  dataclasses.replace(iwae, num_samples=5_000, batch_size=1), _evaluation_rows(device), 200, rounds=4,
                  value="log p(x)", steps=False),
        ), _tables),
        Section("quality", "Time to a quality", 8, (_quality_group(device),), _quality_table),
        Section("scaling", "Scaling in batch size, latent size and K", 6, _scaling_groups(device), _scaling_table),
        Section("profile", "Where the milliseconds go", 2, (_profile_group(device),), _profile_table),
    )  # fmt: skip


def _tables(groups: Sequence[Group], peers: Sequence[list[Peer]]) -> str:
    return "\n\n".join(
        f"{g.problem}, {g.title}, {g.images:,} images, {_rounds(found)} rounds{apart(_longest(found))}\n\n"
        + rates_table(summarise_all(found), g.value)
        for g, found in zip(groups, peers, strict=True)
    )


def _rounds(peers: Sequence[Peer]) -> int:
    return len(_longest(peers))


def _longest(peers: Sequence[Peer]) -> Sequence[Timing]:
    return max((peer.timings for peer in peers), key=len, default=[])


def _scaling_table(groups: Sequence[Group], peers: Sequence[list[Peer]]) -> str:
    rows = []
    for group, found in zip(groups, peers, strict=True):
        results = {r["row"]: r for r in summarise_all(found)}
        rates = [
            "" if r is None else f"failed: {r['error']}".replace("|", "\\|") if "error" in r else f"{r['median']:,.0f}"
            for r in (results.get(key) for key in ("ours-compiled", "pyro", "numpyro"))
        ]
        ratios: Mapping[str, Any] = results.get("ours-compiled", {}).get("ratios", {})
        rows.append([group.title, *rates, *(ratio_text(ratios.get(key)) for key in ("pyro", "numpyro"))])
    header = ["images/s", "pyro_vae, compiled", "Pyro's idiom", "NumPyro", "× Pyro (min-max)", "× NumPyro (min-max)"]
    return f"{Problem()} but for what is varied\n\n" + table(header, rows)


def step_times(peers: Sequence[Peer], batch_size: int) -> dict[str, dict[int, float]]:
    """Microseconds of a step, by row and round, of the rows that did not fail."""
    return {
        p.row.key: {t.round: 1e6 * batch_size / t.rate for t in p.timings}
        for p in peers if p.error is None and p.timings
    }  # fmt: skip


def differences(times: Mapping[str, Mapping[int, float]], whole: str, parts: Sequence[str]) -> list[float]:
    """The whole less its parts, within each round that all of them have."""
    if not all(key in times for key in (whole, *parts)):
        return []
    shared = set(times[whole]).intersection(*(times[part] for part in parts))
    return [times[whole][n] - sum(times[part][n] for part in parts) for n in sorted(shared)]


def _profile_table(groups: Sequence[Group], peers: Sequence[list[Peer]]) -> str:
    (group,), (found,) = groups, peers
    times = step_times(found, group.problem.batch_size)
    lines = [
        (p.row.title, list(times[p.row.key].values())) if p.row.key in times else
        (f"{p.row.title}: failed: {p.error or 'no round finished'}", [])
        for p in found
    ]  # fmt: skip
    floors = [key for key in ("matmul-highest", "matmul-medium") if key in times]
    if floors:
        floor = min(floors, key=lambda key: spread(list(times[key].values()))["median"])
        name = floor.split("-")[1]
        lines += [
            (f"of the graph, beyond its matmuls ({name})", differences(times, "graph", [floor])),
            (f"of the whole step, beyond its matmuls ({name})", differences(times, "ours-compiled", [floor])),
        ]
    lines.append((f"of the whole step, beyond {', '.join(PIECES)}", differences(times, "ours-compiled", PIECES)))
    whole = times.get("ours-compiled")
    middle = spread(list(whole.values()))["median"] if whole else float("nan")
    rows = []
    for title, values in lines:
        numbers = ["", "", ""]
        if values:
            s = spread(values)
            numbers = [f"{s['median']:,.0f}", f"{s['min']:,.0f}-{s['max']:,.0f}", f"{100 * s['median'] / middle:.0f} %"]
        rows.append([title.replace("|", "\\|"), *numbers])
    header = ["µs of a step", "median", "min-max", "of the whole step"]
    return f"{group.problem}, batch {group.problem.batch_size}, {_rounds(found)} rounds\n\n" + table(header, rows)
