"""How far an ELBO on MNIST is from log p(x), and whose fault that is: the bracket, and the gaps beside Cremer et al.

    pyro-vae fit --data mnist --data-dir ../shared/data/mnist --hidden 200,200 --latent-dim 50 --activation elu \\
        --epochs 200 --compile on --out runs/elu                            # the network of Cremer et al.
    python benchmarks/judging.py runs/elu --data-dir ../shared/data/mnist   # within an hour on two cores
    python benchmarks/judging.py runs/elu --print                           # what is there

Parts, each timed, each written to FOLDER/NAME.json when it is done and skipped when it is there:

* guide, prior: `bdmc` on 100 images simulated from the model, annealed from the guide and from the prior;
* flow: `fit_guide`, an amortized inverse autoregressive flow under the same frozen model;
* train, test: `gaps` of the run's own guide and of that flow, on 1,000 images each.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]

from safetensors.torch import load_file, save_file  # noqa: E402

from pyro_vae import Guide, load  # noqa: E402
from pyro_vae.app.evaluation import versions  # noqa: E402
from pyro_vae.app.runs import Run  # noqa: E402
from pyro_vae.atomic import replace_file  # noqa: E402
from pyro_vae.inference.batches import seeded  # noqa: E402
from pyro_vae.judging._gaps import Gaps, gaps  # noqa: E402
from pyro_vae.judging.annealing import bdmc  # noqa: E402
from pyro_vae.judging.evidence import Bracket  # noqa: E402
from pyro_vae.judging.guides import fit_guide  # noqa: E402
from pyro_vae.judging.quotes import kind_of, lower_bound  # noqa: E402
from pyro_vae.parts.networks import MLP  # noqa: E402
from pyro_vae.parts.posteriors import IAF  # noqa: E402

# Cremer, Li and Duvenaud 2018, Table 2, MNIST: log p(x), L[q*], L[q] of a diagonal normal and of their flow, each
# fitted with a model of its own. Quoted from memory, not checked in the paper.
CREMER = {"diagonal": (-89.80, -91.23, -92.57), "flow": (-89.52, -90.45, -91.79)}
PARTS = ("guide", "prior", "flow", "train", "test")


def bracket(run: tuple[Any, Any], data: Any, arguments: argparse.Namespace, start: str) -> dict[str, Any]:
    """The bracket on simulated images."""
    steps = arguments.guide_steps if start == "guide" else arguments.prior_steps
    found: Bracket = bdmc(
        *run, data.test.frozen(0), num_data=arguments.simulated, start=start, num_steps=steps, seed=arguments.seed
    )
    print(f"{start}: {found}", file=sys.stderr)
    return {
        "said": str(found), "lower": found.lower.value, "lower_stderr": found.lower.mc_stderr,
        "upper": found.upper.value, "upper_stderr": found.upper.mc_stderr, "width": found.width.value,
        "width_stderr": found.width.data_stderr,
        "num_steps": steps, "num_chains": found.lower.num_samples, "images": len(found.upper.pointwise),
        "acceptance": found.lower.acceptance.mean().item(),
    }  # fmt: skip


def flow_guide(run: tuple[Any, Any], data: Any, arguments: argparse.Namespace) -> tuple[Guide, dict[str, Any]]:
    """An amortized flow under the frozen model, from its file where there is one."""
    with seeded(arguments.seed):
        guide = Guide(IAF(MLP(data.x_shape, [200, 200], None, "elu"), arguments.latent_dim))
    path = arguments.folder / "flow.safetensors"
    if path.exists():
        guide.load_state_dict(load_file(path))
        guide.eval()
        return guide, {}
    model, _ = run
    history = fit_guide(
        model,
        guide,
        data.train,
        epochs=arguments.flow_epochs,
        batch_size=128,
        learning_rate=1e-3,
        schedule="one-cycle",
        seed=arguments.seed,
    )
    save_file(guide.state_dict(), path)
    return guide, {"epochs": len(history), "train_bound": history["bound"][-1]}


def split(run: tuple[Any, Any], data: Any, arguments: argparse.Namespace, part: str) -> dict[str, Any]:
    """The gaps of both families on the first images of a part."""
    flow, _ = flow_guide(run, data, arguments)
    images = getattr(data, part).subset(slice(arguments.images)).frozen(0)
    found: Gaps = gaps(*run, images, families={"flow": flow}, seed=arguments.seed)
    print(found, file=sys.stderr)
    rows = {}
    for name, row in found.families.items():
        keys = ("optimum", "amortized", "approximation", "amortization", "inference")
        parts = {key: getattr(row, key) for key in keys}
        rows["diagonal" if name == "guide" else name] = {
            key: [value.value, value.mc_stderr, value.data_stderr] for key, value in parts.items() if value is not None
        } | {"remaining": row.remaining.mean().item(), "steps": row.steps.double().mean().item(),
             "stopped": row.stopped.double().mean().item()}  # fmt: skip
    log_p = found.log_likelihood
    return {
        "said": str(found), "log_likelihood": [log_p.value, log_p.mc_stderr, log_p.data_stderr], "bias": found.bias,
        "khat_ok": found.khat_ok, "source": found.source, "families": rows, "images": len(images),
    }  # fmt: skip


def table(results: dict[str, dict[str, Any]]) -> str:
    """All that is there, as Markdown."""
    lines = []
    if any(part in results for part in ("guide", "prior")):
        lines += [
            "| annealed from | bracket of log p(x), nats | width | T × chains | minutes × threads |",
            "|---|---|---|---|---|",
        ]  # fmt: skip
    for part in ("guide", "prior"):
        if part in results:
            r = results[part]
            width = f"**{r['width']:.3f} ± {r['width_stderr']:.3f}**"
            lines.append(
                f"| the {part} | [{r['lower']:.3f}, {r['upper']:.3f}] | {width} | "
                f"{r['num_steps']} × {r['num_chains']} | {_minutes(r)} |"
            )
    if any(part in results for part in ("train", "test")):
        lines += [
            "", "| images | family | log p(x) | L[q*] | L[q] | approximation + amortization = inference gap |",
            "|---|---|---|---|---|---|",
        ]  # fmt: skip
    for part in ("train", "test"):
        if part not in results:
            continue
        r = results[part]
        below = kind_of(r["khat_ok"]) == "lower bound"
        for name, row in r["families"].items():
            log_p, gap = _value(r["log_likelihood"], below), _value(row["approximation"], below)
            lines.append(
                f"| {r['images']:,} {part} | {name} | {log_p} | {_value(row['optimum'])} | "
                f"{_value(row['amortized'])} | {gap} + {_value(row['amortization'])} = "
                f"**{_value(row['inference'], below)}** |"
            )
    if "train" in results:
        for name, (log_p, best, amortized) in CREMER.items():
            lines.append(
                f"| Cremer et al. | {name} | {log_p:.2f} | {best:.2f} | {amortized:.2f} | {log_p - best:.2f} + "
                f"{best - amortized:.2f} = {log_p - amortized:.2f} |"
            )
        minutes = " and ".join(f"{_minutes(results[part])} ({part})" for part in ("train", "test") if part in results)
        lines += ["", f"Minutes × threads: {minutes}; the flow was fitted in {_minutes(results['flow'])}."]
    return "\n".join(lines)


def _value(part: list[float], below: bool = False) -> str:
    """A number as it may be quoted; `below`: it is, or stands on, a log p(x) that is a lower bound."""
    return lower_bound(part[0]) if below else f"{part[0]:.2f} ± {part[1]:.2f}"


def _minutes(r: dict[str, Any]) -> str:
    return f"{r['seconds'] / 60:.1f} × {r['threads']}"


def main() -> None:
    """Run what is missing, print all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run folder of pyro-vae fit, with a diagonal posterior")
    parser.add_argument("--data-dir", type=Path, help="where MNIST lies")
    parser.add_argument("--folder", type=Path, help="results [RUN-judging]")
    parser.add_argument("--parts", default=",".join(PARTS), help="with commas [all]")
    parser.add_argument("--images", type=int, default=1000, help="for the gaps [1000]")
    parser.add_argument("--simulated", type=int, default=100, help="images for the brackets [100]")
    parser.add_argument("--guide-steps", type=int, default=300, help="T from the guide [300]")
    parser.add_argument("--prior-steps", type=int, default=1000, help="T from the prior [1000]")
    parser.add_argument("--flow-epochs", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--print", action="store_true", help="only print what is there")
    arguments = parser.parse_args()
    wanted = arguments.parts.split(",")
    if unknown := [name for name in wanted if name not in PARTS]:
        raise SystemExit(f"unknown part {unknown[0]!r}, wanted some of {', '.join(PARTS)}.")
    arguments.folder = arguments.folder or arguments.run.with_name(arguments.run.name + "-judging")
    arguments.folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(arguments.threads)
    if not arguments.print:
        vae = Run.load(arguments.run).vae()
        arguments.latent_dim = math.prod(vae.model.prior().event_shape)
        data, run = load("mnist", arguments.data_dir), (vae.model, vae.guide)
        work: dict[str, Callable[[], dict[str, Any]]] = {
            "guide": lambda: bracket(run, data, arguments, "guide"),
            "prior": lambda: bracket(run, data, arguments, "prior"),
            "flow": lambda: flow_guide(run, data, arguments)[1],
            "train": lambda: split(run, data, arguments, "train"),
            "test": lambda: split(run, data, arguments, "test"),
        }
        for name in PARTS:
            path = arguments.folder / f"{name}.json"
            if name not in wanted or path.exists():
                continue
            started = time.perf_counter()
            result = work[name]()
            result |= {
                "seconds": time.perf_counter() - started, "threads": arguments.threads, "seed": arguments.seed,
                "versions": versions(), "run": arguments.run.name,
            }  # fmt: skip
            text = json.dumps(result, indent=2)
            replace_file(path, lambda partial, text=text: partial.write_text(text))
            print(f"{name}: {result['seconds']:.0f} s", file=sys.stderr, flush=True)
    paths = {name: arguments.folder / f"{name}.json" for name in PARTS}
    print(table({name: json.loads(path.read_text()) for name, path in paths.items() if path.exists()}))


if __name__ == "__main__":
    main()
