"""Change one argument, keep everything else: the README's table of swapped parts.

    python benchmarks/swap.py --data-dir ../shared/data/mnist        # all rows, two to three hours on two cores
    python benchmarks/swap.py --rows diagonal,iaf                    # some of them
    python benchmarks/swap.py --print                                # the table of what is there

Every row fits one pair to MNIST under one budget: the same networks (784-200-200-50 and
back), dynamic binarisation, the same number of epochs, batch size, optimiser and
learning-rate schedule; nothing is tuned for a row and nothing selected on the test set. Rows that would take more
than ten minutes on two cores run compiled, which changes their time and, up to rounding, nothing else; the two of 50
samples also multiply in bfloat16.
A second table keeps the model of the row "diagonal" frozen and fits a new posterior to
it, so that all guides approximate one and the same p(z | x) and log p(x) is the same
number for all: what differs is the gap.

Each row writes FOLDER/NAME.json when it is done, and FOLDER/NAME.safetensors after each
epoch: run the command again and it goes on where it was broken off.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]

from pyro_vae import VAE, Objective, elbo, elbo_terms, fit, iwae, load, log_likelihood  # noqa: E402
from pyro_vae.app.evaluation import versions  # noqa: E402
from pyro_vae.atomic import replace_file  # noqa: E402
from pyro_vae.inference.batches import seeded  # noqa: E402
from pyro_vae.judging.latents import active_units  # noqa: E402
from pyro_vae.judging.quotes import kind_of, lower_bound  # noqa: E402
from pyro_vae.parts.networks import set_output_mean  # noqa: E402
from pyro_vae.programs.zoo import Hierarchical  # noqa: E402

NETWORK = {"latent_dim": 50, "hidden": (200, 200), "activation": "tanh"}
BUDGET = {"epochs": 30, "batch_size": 256, "learning_rate": 2e-3, "schedule": "one-cycle"}
FROZEN = "frozen-"


@dataclass(frozen=True)
class Row:
    """One line of the table: what is swapped against the row "diagonal"."""

    name: str
    parts: dict[str, Any] = field(default_factory=dict)
    loss: Callable[[], Any] = lambda: Objective(elbo)
    said: str = ""
    compiled: bool = False
    precision: str = "highest"  # of the matrix products in training


DREG = "doubly-reparameterized"
ROWS = [
    Row("diagonal", said="`DiagonalNormal`"),
    Row("full", {"posterior": "full"}, said="`FullNormal`"),
    Row("mixture", {"posterior": "mixture"}, said="`NormalMixture`"),
    Row("planar", {"posterior": "planar"}, said="`Planar`"),
    Row("sylvester", {"posterior": "sylvester"}, said="`Sylvester`", compiled=True),
    Row("iaf", {"posterior": "iaf"}, said="`IAF`"),
    Row("nsf", {"posterior": "nsf"}, said="`NSF` (neural spline)", compiled=True),
    Row("vamp-prior", {"prior": "vamp"}, said="prior `VampPrior`"),
    Row("flow-prior", {"prior": "flow"}, said="prior `Flow`"),
    Row("iwae-50", loss=lambda: Objective(iwae, 50), said="`Objective(iwae, 50)`", compiled=True, precision="bfloat16"),
    Row(
        "dreg-50",
        loss=lambda: Objective(iwae, 50, estimator=DREG),
        said=f"the same, {DREG}",
        compiled=True,
        precision="bfloat16",
    ),
    Row("two-layer", {"hierarchical": True}, said="`Hierarchical`, 100 and 50 latents"),
]
POSTERIORS = ("diagonal", "full", "low-rank", "mixture", "planar", "sylvester", "iaf", "nsf", "coupling")
SLOW = ("sylvester", "nsf")
ROWS += [Row(FROZEN + name, {"posterior": name}, said=name, compiled=name in SLOW) for name in POSTERIORS]


def pair(row: Row, train: Any, folder: Path) -> tuple[nn.Module, nn.Module]:
    """A new pair, or a new guide for the frozen model."""
    if row.parts.get("hierarchical"):
        both = Hierarchical.build((1, 28, 28), latent_dims=(100, 50), hidden=((200, 200), (100, 100)))
        set_output_mean(both.model.likelihood.decoder, train.mean())
        return both.model, both.guide
    vae = VAE.build((1, 28, 28), **NETWORK | row.parts)
    if row.parts.get("prior") == "vamp":
        vae.model.prior.start_at(train[torch.randperm(len(train))[: vae.model.prior.num_components]])
    set_output_mean(vae.model.likelihood.decoder, train.mean())
    if not row.name.startswith(FROZEN):
        return vae.model, vae.guide
    fitted = folder / "diagonal.vae.safetensors"
    if not fitted.exists():
        raise SystemExit(f"the row {row.name} needs the fitted model of the row diagonal: run that first.")
    model = VAE.load(fitted).model
    return model.requires_grad_(False), vae.guide


def run(row: Row, arguments: argparse.Namespace, data: Any) -> dict[str, Any]:
    """Fit and judge one row."""
    with seeded(arguments.seed):
        model, guide = pair(row, data.train, arguments.folder)
    history = fit(
        model, guide, data.train, loss=row.loss(), **BUDGET | {"epochs": arguments.epochs}, seed=arguments.seed,
        matmul_precision=arguments.matmul_precision or row.precision, compile=row.compiled,
        checkpoint=arguments.folder / f"{row.name}.safetensors",
    )  # fmt: skip
    if history.interrupted:
        raise SystemExit(f"{row.name} was interrupted: the same command goes on.")
    if row.name == "diagonal":
        vae = VAE.build((1, 28, 28), **NETWORK)
        vae.model, vae.guide = model, guide
        vae.save(arguments.folder / "diagonal.vae.safetensors")
    started = time.perf_counter()
    test = data.test.frozen(0).subset(slice(arguments.images))
    terms = elbo_terms(model, guide, test, num_samples=100, seed=0)
    estimate = log_likelihood(model, guide, test, num_samples=arguments.num_samples, seed=0)
    try:
        with seeded(0):
            active = active_units(guide, test.subset(slice(2000))).count
    except ValueError:
        active = None
    return {
        "name": row.name, "said": row.said, "epochs": len(history), "train_seconds": history["seconds"][-1],
        "train_bound": history["bound"][-1], "elbo": terms.value, "elbo_stderr": terms.mc_stderr,
        "log_likelihood": estimate.value, "stderr": estimate.mc_stderr, "data_stderr": estimate.data_stderr,
        "bias": estimate.bias, "khat_ok": estimate.khat_ok, "active": active, "num_samples": arguments.num_samples,
        "images": len(test), "evaluation_seconds": time.perf_counter() - started, "seed": arguments.seed,
        "threads": torch.get_num_threads(), "compiled": row.compiled, "versions": versions(),
        "matmul_precision": arguments.matmul_precision or row.precision,
    }  # fmt: skip


def table(results: dict[str, dict[str, Any]]) -> str:
    """Both tables as Markdown."""
    lines = []
    whole = [r for name, r in results.items() if not name.startswith(FROZEN)]
    if whole:
        first = whole[0]
        lines += [
            f"{first['epochs']} epochs, {first['images']:,} test images, K = {first['num_samples']:,}, data s.e. about "
            f"{first['data_stderr']:.2f} for each row and much less for differences:",
            "",
            "| changed | test ELBO | test log p(x) ± Monte Carlo | k̂ ok | active | minutes × threads |",
            "|---|---|---|---|---|---|",
        ]
    for r in whole:
        active = "" if r["active"] is None else r["active"]
        lines.append(
            f"| {r['said']} | {r['elbo']:.2f} | **{_log_p(r)}** | {_share(r['khat_ok'])} | {active} | {_minutes(r)} |"
        )
    frozen = [r for name, r in results.items() if name.startswith(FROZEN)]
    if frozen:
        best = max(frozen, key=lambda r: r["log_likelihood"])
        below = kind_of(best["khat_ok"]) == "lower bound"

        def gap(r: dict[str, Any]) -> str:
            value = best["log_likelihood"] - r["elbo"]
            return lower_bound(value) if below else f"{value:.2f}"

        lines += [
            "",
            f"One frozen model (that of the first row), new posteriors, {best['images']:,} test images, K = "
            f"{best['num_samples']:,}; the gap is to the highest mean log p(x), {_log_p(best)} "
            f"({best['said']}):",
            "",
            "| q(z given x) | test ELBO | log p(x) by its own weights | gap = KL(q to posterior) | minutes × threads |",
            "|---|---|---|---|---|",
        ]
        for r in frozen:
            lines.append(f"| {r['said']} | {r['elbo']:.2f} | {_log_p(r)} | **{gap(r)}** | {_minutes(r)} |")
    return "\n".join(lines)


def _log_p(r: dict[str, Any]) -> str:
    """log p(x) as it may be quoted (see `pyro_vae.judging.quotes`)."""
    if kind_of(r["khat_ok"]) == "lower bound":
        return lower_bound(r["log_likelihood"])
    return f"{r['log_likelihood']:.2f} ± {_one(r['stderr'])}"


def _one(error: float) -> str:
    return f"{error:.{max(0, 1 - math.floor(math.log10(error)) - 1) if error > 0 else 0}f}"


def _minutes(r: dict[str, Any]) -> str:
    how = ["compiled"] * bool(r.get("compiled")) + ["bf16"] * (r.get("matmul_precision") == "bfloat16")
    return f"{r['train_seconds'] / 60:.1f} × {r['threads']}" + (f" ({', '.join(how)})" if how else "")


def _share(share: float | None) -> str:
    return "" if share is None or math.isnan(share) else f"{100 * share:.0f} %"


def main() -> None:
    """Run what is missing, print all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, help="where MNIST lies")
    parser.add_argument("--folder", type=Path, default=Path("runs/swap"), help="results [runs/swap]")
    parser.add_argument("--rows", help="names, with commas [all]")
    parser.add_argument("--epochs", type=int, default=BUDGET["epochs"])
    parser.add_argument("--num-samples", type=int, default=1000, help="K of the evaluation [1000]")
    parser.add_argument("--images", type=int, default=10_000, help="test images [10000]")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--matmul-precision", help="of all rows [bfloat16 for the rows of 50 samples, else highest]")
    parser.add_argument("--limit", type=int, help="train on so many images only, for a look")
    parser.add_argument("--print", action="store_true", help="only print what is there")
    arguments = parser.parse_args()
    known = {row.name: row for row in ROWS}
    wanted = arguments.rows.split(",") if arguments.rows else list(known)
    for name in wanted:
        if name not in known:
            raise SystemExit(f"unknown row {name!r}, wanted some of {', '.join(known)}.")
    arguments.folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(arguments.threads)
    if not arguments.print:
        data = load("mnist", arguments.data_dir)
        if arguments.limit:
            data = dataclasses.replace(data, train=data.train.subset(slice(arguments.limit)))
        for name in wanted:
            path = arguments.folder / f"{name}.json"
            if path.exists():
                continue
            print(f"{name} ...", file=sys.stderr, flush=True)
            result = run(known[name], arguments, data)
            text = json.dumps(result, indent=2)
            replace_file(path, lambda partial, text=text: partial.write_text(text))
            seconds = result["train_seconds"], result["evaluation_seconds"]
            print(f"{name}: {result['log_likelihood']:.2f}, {seconds[0]:.0f} + {seconds[1]:.0f} s", file=sys.stderr)
    paths = {name: arguments.folder / f"{name}.json" for name in known}
    print(table({name: json.loads(path.read_text()) for name, path in paths.items() if path.exists()}))


if __name__ == "__main__":
    main()
