"""What kill -9 leaves: nothing lost, nothing changed, nothing half-written.

    python benchmarks/kills.py --data-dir ~/mnist                # 60 kills, about ten minutes
    python benchmarks/kills.py --kills fit=3 evaluate=1          # fewer; swap alone reads MNIST

`fit` is killed at random moments of the whole command (training, pictures, evaluation, while it writes) and gone on
with by `--resume`, again and again until it is done. Then weights, metrics and summary are compared with those of a run
that nobody killed: to the bit, but for what a clock says. `evaluate` and `judge` are killed over a finished run, of
which no byte may change and no half of an output may be left; the next one goes on after the parts that are kept,
leaves nothing of them, and `evaluate` writes what an undisturbed one wrote.
`compare` is killed over a study and typed again until it is done; its scores are those of an undisturbed one. So
are the rows of `benchmarks/swap.py` (two posteriors, and one under the frozen model of the first).

Every command is a process of its own, forked from one that has imported all, so that the kills fall into the work.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

RESULTS = Path(__file__).parent / "results"
SMALL = ["--hidden", "32", "--latent-dim", "2", "--evaluation-samples", "50", "--quiet"]
WAYS = {
    "captured": ["--epochs", "60", "--compile", "auto"],
    "eager": ["--epochs", "12", "--compile", "off"],
}
CLOCK = ("seconds", "images_per_second", "date")
PLANNED = {"fit": 30, "evaluate": 8, "judge": 8, "compare": 10, "swap": 4}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", nargs="*", metavar="COMMAND=N", help="how often each is killed")
    parser.add_argument("--data-dir", type=Path, default=Path("data/mnist"), help="where MNIST lies, for swap")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    data_dir = given.data_dir.absolute()

    def of_rows(name: str, kills: int, folder: Path, rng: random.Random) -> str:
        return of_swap(data_dir, kills, folder, rng)

    number = PLANNED if given.kills is None else {name: int(n) for name, n in (each.split("=") for each in given.kills)}
    if number.get("swap") and not data_dir.is_dir():
        parser.error(f"got --data-dir {data_dir}, which is not there, wanted the folder of MNIST, for swap.")
    rng, began = random.Random(given.seed), time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        os.chdir(folder)
        lines = [
            tried(name, kills, folder, rng)
            for name, tried in zip(PLANNED, (of_fit, of_reader, of_reader, of_compare, of_rows), strict=True)
            if (kills := number.get(name, 0))
        ]
    lines.append(f"{sum(number.values())} kills in {time.perf_counter() - began:.0f} s, none lost or changed anything")
    print("\n".join(lines))
    if given.kills is None:
        (RESULTS / "kills.md").write_text("\n".join(f"- {line}" for line in lines) + "\n", encoding="utf-8")


def typed(arguments: list[str], after: float | None = None) -> bool:
    """Run a command in a process of its own, killed after some seconds; whether it was killed."""
    process = os.fork()
    if process == 0:
        os.setsid()
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        errors = os.open("errors.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(errors, 2)
        code = 1
        try:
            code = PROGRAMS.get(arguments[0], cli.main)(arguments)
        finally:
            sys.stdout.flush()
            os._exit(code)
    end = None if after is None else time.perf_counter() + after
    while True:
        done, status = os.waitpid(process, 0 if end is None else os.WNOHANG)
        if done:
            if os.waitstatus_to_exitcode(status) != 0:
                raise SystemExit(f"pyro-vae {' '.join(arguments)}: {Path('errors.txt').read_text()}")
            return False
        if end is not None and time.perf_counter() > end:
            os.killpg(process, signal.SIGKILL)
            os.waitpid(process, 0)
            return True
        time.sleep(0.002)


def timed(arguments: list[str]) -> float:
    began = time.perf_counter()
    typed(arguments)
    return time.perf_counter() - began


def without_clock(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: without_clock(v) for k, v in value.items() if not any(word in k for word in CLOCK)}
    return [without_clock(v) for v in value] if isinstance(value, list) else value


def content(run: Path) -> dict[str, Any]:
    """What a run is, but for what a clock says."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return {
        "weights": hashlib.sha256((run / "weights.safetensors").read_bytes()).hexdigest(),
        "metrics": [without_clock(json.loads(line)) for line in lines],
        "summary": without_clock(json.loads((run / "summary.json").read_text())),
        "files": sorted(str(path.relative_to(run)) for path in run.rglob("*")),
    }


def same(what: str, ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    if ours != theirs:
        found = {k: (ours.get(k), theirs.get(k)) for k in {**ours, **theirs} if ours.get(k) != theirs.get(k)}
        raise SystemExit(f"{what} is not what it would have been: {str(found)[:2000]}")


def of_fit(name: str, kills: int, folder: Path, rng: random.Random) -> str:
    whole, lasted, done, runs = {}, {}, 0, 0
    for way, options in WAYS.items():
        lasted[way] = timed(["fit", "--out", f"whole-{way}", *SMALL, *options])
        whole[way] = content(folder / f"whole-{way}")
    while done < kills:
        way = list(WAYS)[runs % len(WAYS)]
        run = folder / f"run-{runs}"
        command = ["fit", "--out", str(run), *SMALL, *WAYS[way]]
        while True:
            resumed = ["fit", "--resume", str(run), "--quiet"] if (run / "unfinished.json").is_file() else command
            if not typed(resumed, rng.uniform(0, lasted[way]) if done < kills else None):
                break
            done += 1
        same(f"a fit ({way})", content(run), whole[way])
        runs += 1
        shutil.rmtree(run)
    return f"fit: {done} kills over {runs} runs, {', '.join(WAYS)}: weights, metrics and summary to the bit"


def of_reader(name: str, kills: int, folder: Path, rng: random.Random) -> str:
    run = folder / "finished"
    if not run.is_dir():
        typed(["fit", "--out", str(run), *SMALL, *WAYS["captured"]])

    def hashes() -> dict[str, str]:
        written = ("judgement", "evaluation.partial")
        paths = [path for path in run.rglob("*") if path.is_file() and not path.name.startswith(written)]
        return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}

    out = run / "judgement.json" if name == "judge" else folder / "numbers.json"
    command = [name, str(run), *(["--out", str(out), "-K", "500"] if name == "evaluate" else ["--budget", "20"])]
    read: Callable[[], Any] = lambda: without_clock(json.loads(out.read_text()))  # noqa: E731
    before, lasted = hashes(), timed(command)
    whole, done = read(), 0
    while done < kills:
        out.unlink()
        while typed(command, rng.uniform(0, lasted) if done < kills else None):
            done += 1
            same("the run", hashes(), before)
            if out.is_file():
                read()
        if name == "evaluate":  # what judge looks at depends on its budget of seconds
            same("evaluate", read(), whole)
    same("the run", hashes(), before)
    if left := list(run.rglob("*.partial.safetensors")):
        raise SystemExit(f"{name} is done and left {left}")
    return f"{name}: {done} kills: no byte of the run changed, no half of an output was left"


def of_compare(name: str, kills: int, folder: Path, rng: random.Random) -> str:
    base = ["compare", "--vary", "posterior=diagonal,full", "--seeds", "2", "--jobs", "1", "--epochs", "8"]
    base += [*SMALL[:-1]]

    def scores(study: Path) -> dict[str, str]:
        found = [*study.glob("trials/*/scores.safetensors"), *study.glob("trials/*/weights.safetensors")]
        return {str(p.relative_to(study)): hashlib.sha256(p.read_bytes()).hexdigest() for p in found}

    lasted = timed([*base, "--out", "whole-study"])
    whole, done, studies = scores(folder / "whole-study"), 0, 0
    while done < kills:
        study = folder / f"study-{studies}"
        while typed([*base, "--out", str(study)], rng.uniform(0, lasted) if done < kills else None):
            done += 1
        same("a study", scores(study), whole)
        studies += 1
    return f"compare: {done} kills over {studies} studies: scores and weights to the bit"


def of_swap(data_dir: Path, kills: int, folder: Path, rng: random.Random) -> str:
    base = ["swap", "--data-dir", str(data_dir), "--rows", "diagonal,planar,frozen-full", "--limit", "4000", "--epochs",
            "3", "--images", "100", "--num-samples", "50", "--folder"]  # fmt: skip

    def rows(there: Path) -> dict[str, Any]:
        kept = hashlib.sha256((there / "diagonal.vae.safetensors").read_bytes()).hexdigest()
        return {path.name: without_clock(json.loads(path.read_text())) for path in there.glob("*.json")} | {"vae": kept}

    lasted = timed([*base, "whole-swap"])
    whole, done, tables = rows(folder / "whole-swap"), 0, 0
    assert len(whole) == 4
    while done < kills:
        there = f"swap-{tables}"
        while typed([*base, there], rng.uniform(0, lasted) if done < kills else None):
            done += 1
        same("a table", rows(folder / there), whole)
        tables += 1
    return f"swap: {done} kills over {tables} tables: rows and weights to the bit"


def swap_rows(arguments: list[str]) -> int:
    sys.argv = arguments
    swap.main()
    return 0


PROGRAMS: dict[str, Callable[[list[str]], int]] = {"swap": swap_rows}

if __name__ == "__main__":
    import swap  # beside this file

    import pyro_vae.app.compare_command
    import pyro_vae.app.fitting
    import pyro_vae.plots  # noqa: F401
    from pyro_vae.app import cli

    main()
