"""Does the first advice of `pyro-vae judge` help? Eight cases, three seeds each: fit, judge, do what it says, compare.

    python benchmarks/verdicts.py --data-dir path/to/data            # all that is not there yet; resumable
    python benchmarks/verdicts.py --cases digits,frey --seeds 1
    python benchmarks/verdicts.py --print                            # the table of what is there
    python benchmarks/verdicts.py --print --page docs/judging.md     # and puts it there between its markers

A case is a `pyro-vae fit` of about a minute on two cores. Its first advice is typed as it stands; where it asks to
judge more data, that is done once, and the first advice of that judgement counts. Reported is held-out log p(x) of the
same test data before and after, and their difference, paired by datum, with its error. "leave it" is an advice, too.
Refinement leaves the model and its log p(x) as they are: its gain is one of the ELBO.

Data: digits and linear-gaussian need none. For fashion-mnist `apt install dataset-fashion-mnist`; Frey faces as a file
in DIR/frey (see `pyro_vae.data`); photos are tiles of the two photographs that scikit-learn ships.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import os
import re
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import torch

from pyro_vae.app import evaluation
from pyro_vae.app.cli import main as pyro_vae
from pyro_vae.app.commands import _refined, judge_run
from pyro_vae.app.loaded import data_of
from pyro_vae.app.runs import Run, options_of
from pyro_vae.judging.estimates import elbo_terms, log_likelihood
from pyro_vae.judging.quotes import kind_of, lower_bound

RESULTS = Path(__file__).parent / "results" / "verdicts"
NUM_SAMPLES, NUM_TEST = 1000, 300
DIGITS = "--data digits --hidden 128,64"
CASES = {
    "digits": f"{DIGITS} --epochs 150",
    "fashion-mnist": "--data fashion-mnist --limit 6000 --hidden 200,200 --latent-dim 20 --epochs 30 --batch-size 128",
    "frey": "--data frey --epochs 150",
    "photos": "--data PHOTOS --hidden 200,200 --latent-dim 20 --epochs 60",
    "overfitted": f"{DIGITS} --binarization threshold --limit 300 --hidden 512,512 --epochs 600 --schedule constant",
    "under-trained": f"{DIGITS} --epochs 8 --schedule constant",
    "collapsed": f"{DIGITS} --likelihood normal --scale 2 --epochs 60",
    "good": "--data linear-gaussian",
}
PLACES = {"fashion-mnist": ("fashion-mnist", "/usr/share/datasets/fashion-mnist"), "frey": ("frey",)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--seeds", type=int, default=3, help="0, 1, ...")
    parser.add_argument("--data-dir", type=Path, default=os.environ.get("PYRO_VAE_DATA"))
    parser.add_argument("--work", type=Path, default=Path("runs/verdicts"), help="where the runs go")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--budget", type=float, default=180.0, help="seconds of each judgement")
    parser.add_argument("--quick", action="store_true", help="a tenth of the epochs, and of the budget; no result")
    parser.add_argument("--print", action="store_true", help="only print what is there")
    parser.add_argument("--page", type=Path, help="a page of Markdown, between whose markers the table is put")
    given = parser.parse_args()
    cases = given.cases.split(",")
    if unknown := [case for case in cases if case not in CASES]:
        parser.error(f"unknown cases {', '.join(unknown)}, wanted some of {', '.join(CASES)}")
    results = given.results / "quick" if given.quick else given.results
    results.mkdir(parents=True, exist_ok=True)
    for case in [] if given.print else cases:
        for seed in range(given.seeds):
            place = results / f"{case}-{seed}.json"
            if place.exists():
                continue
            try:
                found = one(case, seed, given)
            except FileNotFoundError as error:
                print(f"{case}: left out, {error}", file=sys.stderr)
                break
            place.write_text(json.dumps(found, indent=2) + "\n")
            print(line(found), flush=True)
    print(said := f"{definitions(results)}\n\n{table(results)}")
    if given.page is not None:
        insert(given.page, said)


def one(case: str, seed: int, given: argparse.Namespace) -> dict[str, Any]:
    """One case with one seed: what was advised, and log p(x) before and after."""
    began = time.perf_counter()
    folder = given.work / f"{case}-{seed}{'-quick' if given.quick else ''}"
    arguments = shlex.split(CASES[case]) + directory(case, given)
    if "PHOTOS" in arguments:
        arguments[arguments.index("PHOTOS")] = str(photos(given.work / "photos"))
    if given.quick and "--epochs" in arguments:
        at = arguments.index("--epochs") + 1
        arguments[at] = str(max(2, int(arguments[at]) // 10))
    evaluated = ["--evaluation-samples", "100", "--evaluation-images", "50", "--quiet"]
    if not folder.exists():
        typed(["fit", *arguments, *evaluated, "--seed", str(seed), "--out", str(folder)])
    before = held_out(folder)
    budget = given.budget / 10 if given.quick else given.budget
    found = judged(folder, budget, 100)
    if found.advice and found.advice[0].remedy == "data":
        found = judged(folder, 2 * budget, 200)
    kept = [finding for finding in found.advice if finding.remedy != "data"]
    result = {
        "case": case, "seed": seed, "fit": " ".join(arguments),
        "log_p": before.value, "log_p_mc_stderr": before.mc_stderr,
        "log_p_data_stderr": before.data_stderr, "khat_ok": before.khat_ok, "culprits": list(found.culprits),
        "verdict": list(found.verdict), "advice": "leave it", "gain": 0.0, "gain_stderr": 0.0,
    }  # fmt: skip
    if kept:
        result["advice"], result["remedy"] = kept[0].command, kept[0].remedy
        if kept[0].remedy == "refine":  # of which log p(x) is the same, and the ELBO what is to gain
            after, gain = before, held_out_elbo(folder, kept[0].command) - held_out_elbo(folder)
            result["of"] = "ELBO"
        else:
            after = followed(kept[0].command, kept[0].remedy, folder, evaluated)
            gain = after.pointwise - before.pointwise
        result |= {"after": after.value, "gain": gain.mean().item(), "after_khat_ok": after.khat_ok,
                   "gain_stderr": gain.std().item() / math.sqrt(len(gain))}  # fmt: skip
    return result | {"num_test": len(before.pointwise), "num_samples": NUM_SAMPLES,
                     "versions": evaluation.versions(), "seconds": round(time.perf_counter() - began, 1)}  # fmt: skip


def followed(command: str, remedy: str, folder: Path, evaluated: list[str]) -> Any:
    """log p(x) after doing as the command says."""
    _, name, *arguments = shlex.split(command)
    if name == "fit":
        other = folder.with_name(f"{folder.name}-{remedy}")
        if not other.exists():
            typed([name, *arguments, *evaluated, "--out", str(other)])
        return held_out(other)
    return held_out(folder, int(arguments[arguments.index("-K") + 1]))


def judged(folder: Path, budget: float, num_data: int) -> Any:
    with contextlib.redirect_stdout(io.StringIO()):
        return judge_run(folder, num_data=num_data, budget=budget, num_samples=NUM_SAMPLES)


def held_out(folder: Path, num_samples: int = NUM_SAMPLES) -> Any:
    """log p(x) of a run's first test data, the same noise in all runs."""
    vae, test = opened(folder)
    return log_likelihood(vae.model, vae.guide, test, num_samples=num_samples, seed=0, progress=False)


def held_out_elbo(folder: Path, command: str | None = None) -> torch.Tensor:
    """The ELBO of the same data, per datum, with the guide refined as a command says."""
    vae, test = opened(folder)
    guide: Any = vae.guide
    with contextlib.ExitStack() as stack:
        if command is not None:
            arguments = shlex.split(command)
            guide = _refined(arguments[arguments.index("--refine") + 1], vae, folder)
            stack.enter_context(guide.kept())
        return elbo_terms(vae.model, guide, test, num_samples=100, seed=0, progress=False).pointwise


def opened(folder: Path) -> tuple[Any, Any]:
    """The pair of a run, and its first test data."""
    run = Run.load(folder)
    vae = run.vae()
    _, dataset = data_of(options_of(run), vae, None, None)
    return vae, evaluation.test_data(dataset, 0, NUM_TEST)


def typed(arguments: list[str]) -> None:
    if code := pyro_vae(arguments):
        raise SystemExit(f"pyro-vae {shlex.join(arguments)} ended with {code}")


def directory(case: str, given: argparse.Namespace) -> list[str]:
    """Where the files of a case lie, as options."""
    if case not in PLACES:
        return []
    roots = [Path(given.data_dir)] if given.data_dir else []
    tried = [root / place for place in PLACES[case] for root in (*roots, Path.cwd())]  # an absolute place stays
    for path in tried:
        if path.is_dir():
            return ["--data-dir", str(path)]
    raise FileNotFoundError(f"no folder {' or '.join(map(str, tried))}; {Path(__file__).name} says where to get it")


def photos(folder: Path, size: int = 16) -> Path:
    """Tiles of the photographs that scikit-learn ships, as PNG files, in the order of a shuffle."""
    from PIL import Image
    from sklearn.datasets import load_sample_images

    if not folder.exists():
        partial = folder.with_name(folder.name + ".partial")
        partial.mkdir(parents=True, exist_ok=True)
        tiles = []
        for image in load_sample_images().images:
            pixels = torch.from_numpy(image.copy())
            rows, columns = (length // size * size for length in pixels.shape[:2])
            cut = pixels[:rows, :columns].unfold(0, size, size).unfold(1, size, size)
            tiles.append(cut.permute(0, 1, 3, 4, 2).reshape(-1, size, size, 3))
        tiles_ = torch.cat(tiles)
        order = torch.randperm(len(tiles_), generator=torch.Generator().manual_seed(0))
        for number, index in enumerate(order.tolist()):
            Image.fromarray(tiles_[index].numpy()).save(partial / f"{number:05}.png")
        partial.rename(folder)
    return folder


def line(found: dict[str, Any]) -> str:
    error = found["gain_stderr"]
    beyond = abs(found["gain"]) > max(2 * error, 0.005)  # what is not printed is none
    came = "within the error" if not beyond else "harm" if found["gain"] < 0 else "gain"
    gain = f"{found['gain']:+.2f} ± {error:.2f}" + (" of ELBO" if found.get("of") == "ELBO" else "")
    known, advice = f"{100 * found['khat_ok']:.0f} %", f"`{placeless(found['advice'])}`"
    if found["advice"] == "leave it":
        advice, gain, came = "leave it", "", ""
    elif found["remedy"] != "refine":  # of which the weights stay
        known += f", then {100 * found['after_khat_ok']:.0f} %"
    before = lower_bound(found["log_p"]) if kind_of(found["khat_ok"]) == "lower bound" else f"{found['log_p']:.2f}"
    blamed = ", ".join(found["culprits"]) or "-"
    return f"| {found['case']} | {found['seed']} | {before} | {known} | {blamed} | {advice} | {gain} | {came} |"


def placeless(command: str) -> str:
    """A command without the places of one machine: the run is RUN."""
    command = re.sub(r" --data-dir \S+", "", command)
    command = re.sub(r"(--data )\S*/", r"\1", command)
    return re.sub(r"(?<!\S)\S*/[\w.-]+-\d(?=[/ ])", "RUN", command)


def definitions(results: Path) -> str:
    """What each case is, as its fit was typed."""
    fits = {row["case"]: row["fit"] for row in rows(results)}
    lines = [f"| {case} | `pyro-vae fit {placeless(command)}` |" for case, command in fits.items()]
    return "\n".join(["| case | is |", "|---|---|", *lines])


def table(results: Path) -> str:
    """Markdown of all that is there."""
    names = ("case", "seed", "log p(x)", "k̂ ok", "at fault", "first advice", "gain in log p(x), nats", "")
    head = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    return "\n".join([*head, *map(line, rows(results))])


def rows(results: Path) -> list[dict[str, Any]]:
    """What is there, in the order of the cases."""
    found = [json.loads(path.read_text()) for path in results.glob("*.json")]
    return sorted(found, key=lambda row: (list(CASES).index(row["case"]), row["seed"]))


def insert(page: Path, said: str) -> None:
    """Put the tables between the markers of a page."""
    begin, end = "<!-- verdicts: python benchmarks/verdicts.py --print --page docs/judging.md -->", "<!-- /verdicts -->"
    before, found, rest = page.read_text(encoding="utf-8").partition(begin)
    if not found or end not in rest:
        raise SystemExit(f"{page} has no lines {begin} and {end}.")
    page.write_text(f"{before}{begin}\n\n{said}\n\n{rest[rest.index(end) :]}", encoding="utf-8")


if __name__ == "__main__":
    main()
