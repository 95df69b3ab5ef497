"""The fits of a study made one after another or side by side, here or on a cluster."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from tqdm import tqdm

from pyro_vae.app.defaults import FitOptions
from pyro_vae.app.plans import Plan, Trial
from pyro_vae.app.report import about
from pyro_vae.app.trials import lost, run_trial, state

BACKENDS = ("local", "dask", "slurm")


def execute(
    plan: Plan, *, jobs: int | None = None, backend: str = "local", address: str | None = None, retry: bool = False,
    progress: bool | None = None, say: Callable[[str], None] = lambda _: None,
) -> None:  # fmt: skip
    """Make all fits of a plan that are not there, the frozen model first.

    Args:
        plan: The plan.
        jobs: How many at a time; if omitted as many as there are cores for, with the threads that each takes.
        backend, address: "local" processes, a "dask" cluster at its scheduler's address, or "slurm" jobs by submitit.
        retry: Whether what failed is tried again.
        progress: Show a bar; None shows it on a terminal only, and a line for each fit elsewhere.
        say: Takes a line.
    Raises:
        ValueError: The frozen model could not be fitted; a backend that is not installed.
    """
    if backend not in BACKENDS:
        raise ValueError(f"got backend={backend!r}, wanted one of {', '.join(BACKENDS)}.")
    if plan.base is not None and state(plan.base) != "done":
        say(f"fitting the model that is frozen: {plan.base.folder}")
        failure = run_trial(plan.base.options.to_json(), str(plan.base.folder))
        if failure is not None:
            raise ValueError(f"the model that was to be frozen could not be fitted: {failure}")
    wanted = ("missing", "unfinished", "failed") if retry else ("missing", "unfinished")
    todo = [trial for trial in plan.trials if trial.reason is None and state(trial) in wanted]
    done = sum(state(trial) == "done" for trial in plan.trials)
    counts = {"done": done, "failed": len(plan.trials) - len(todo) - done}
    jobs = min(jobs or jobs_of(plan), max(len(todo), 1))
    started, shown = time.monotonic(), None if progress is None else not progress
    with tqdm(total=len(todo), disable=shown, bar_format="{desc}", dynamic_ncols=True, leave=False) as bar:
        bar.set_description_str(_told(counts, jobs, len(todo), None))
        for number, (trial, failure) in enumerate(_outcomes(todo, jobs, backend, address), 1):
            counts["done" if failure is None else "failed"] += 1
            left = len(todo) - number
            seconds = (time.monotonic() - started) / number * left
            bar.set_description_str(_told(counts, min(jobs, left), left, seconds))
            bar.update(1)
            if bar.disable and progress is not False or failure is not None:
                ended = "done" if failure is None else f"failed: {failure}"
                say(f"{_told(counts, min(jobs, left), left, seconds)}; {trial.arm}, seed {trial.options.seed}: {ended}")


def jobs_of(plan: Plan) -> int:
    """How many fits have a core for each of their threads, of the cores that this process may use."""
    import joblib

    return max(1, joblib.cpu_count() // _threads(trial.options for trial in plan.trials if trial.reason is None))


def _threads(options: Iterable[FitOptions]) -> int:
    return max([1, *(each.threads or 1 for each in options)])


def _told(counts: Mapping[str, int], running: int, left: int, seconds: float | None) -> str:
    waits = f", {about(seconds)} left" if seconds is not None and left else ""
    return f"{counts['done']} done, {running} running, {counts['failed']} failed, {left - running} to come{waits}"


def _outcomes(
    todo: Sequence[Trial], jobs: int, backend: str, address: str | None
) -> Iterator[tuple[Trial, str | None]]:
    """Each trial as it ends, and why it failed."""
    calls = [(trial.options.to_json(), str(trial.folder.absolute())) for trial in todo]
    if backend == "slurm":
        yield from _by_slurm(todo, calls)
        return
    if backend == "local" and jobs == 1:
        for trial, call in zip(todo, calls, strict=True):
            yield trial, run_trial(*call)
        return
    import joblib

    with contextlib.ExitStack() as stack:
        if backend == "dask":
            stack.enter_context(_dask(address))
            stack.enter_context(joblib.parallel_config("dask", n_jobs=-1))
        else:
            inner = _threads(trial.options for trial in todo)
            stack.enter_context(joblib.parallel_config("loky", n_jobs=jobs, inner_max_num_threads=inner))
        parallel = joblib.Parallel(return_as="generator_unordered", batch_size=1)
        done: set[int] = set()
        try:
            ways = list(sys.path)
            for number, failure in parallel(joblib.delayed(_numbered)(i, ways, *call) for i, call in enumerate(calls)):
                done.add(number)
                yield todo[number], failure
        except Exception as error:
            if backend == "dask":
                raise ValueError(
                    f"the cluster gave up: {type(error).__name__}: {' '.join(str(error).split())[:200]}. What is done "
                    "is kept: the same command goes on with the rest."
                ) from error
            if not isinstance(error, BrokenProcessPool):
                raise
        # A process died, for want of memory, say. Which fit it was is seen where each has a process of its own.
        for number, call in enumerate(calls):
            if number not in done:
                yield todo[number], _by_itself(*call)


def _by_itself(config: Mapping[str, Any], folder: str) -> str | None:
    """A fit in a process of its own, whose end is the fit's and not the study's."""
    from joblib.externals.loky import get_reusable_executor

    try:
        return get_reusable_executor(max_workers=1).submit(_numbered, 0, list(sys.path), config, folder).result()[1]
    except BrokenProcessPool:
        return lost(Path(folder), "its process was ended from outside, for want of memory, say")


def _numbered(number: int, ways: Sequence[str], config: Mapping[str, Any], folder: str) -> tuple[int, str | None]:
    """A trial in another process, which may have been begun before this one found the parts of the user's own."""
    sys.path += [way for way in ways if way not in sys.path]
    return number, run_trial(config, folder)


@contextlib.contextmanager
def _dask(address: str | None) -> Iterator[Any]:
    """A client of a cluster that is there, or of one on this machine."""
    try:
        from dask.distributed import Client
    except ImportError as error:
        raise ValueError(
            "got backend='dask', which needs dask. Run: pip install 'pyro-vae[dask]', or take the local backend."
        ) from error
    try:
        client = Client(address) if address else Client(threads_per_worker=1)
    except (OSError, ValueError) as error:
        raise ValueError(f"got address {address!r}, wanted that of a dask scheduler that answers: {error}.") from error
    with client:
        yield client


def _by_slurm(todo: Sequence[Trial], calls: Sequence[tuple[dict[str, Any], str]]) -> Iterator[tuple[Trial, str | None]]:
    try:
        import submitit
    except ImportError as error:
        raise ValueError(
            "got backend='slurm', which needs submitit. Run: pip install 'pyro-vae[slurm]', or take the local backend."
        ) from error
    if not todo:
        return
    executor = submitit.AutoExecutor(folder=todo[0].folder.parent / "slurm")
    for trial, job in zip(todo, [executor.submit(run_trial, *call) for call in calls], strict=True):
        try:
            failure = job.result()
        except Exception as error:  # what the scheduler ended is one fit, and not the study
            failure = lost(trial.folder, f"its job was ended ({type(error).__name__}), for want of time or memory, say")
        yield trial, failure
