"""The command under torchrun: one run of several processes, which a killed worker does not end."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pyro_vae.app import cli

RUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "2",
       "--master-port", str(20_000 + os.getpid() % 20_000), "-m", "pyro_vae"]  # fmt: skip
SMALL = ["fit", "--data", "digits", "--hidden", "32", "--latent-dim", "2", "--epochs", "40", "--batch-size", "32",
         "--evaluation-samples", "20"]  # fmt: skip


def started(folder, *arguments):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    return subprocess.Popen([*RUN, *arguments], cwd=folder, env=environment, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT)  # fmt: skip


def worker(rank, folder):
    """The process of that rank, once it is there."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if os.readlink(path / "cwd") == str(folder) and f"RANK={rank}".encode() in (
                path / "environ"
            ).read_bytes().split(b"\0"):
                return int(path.name)
        except OSError:
            continue
    return None


@pytest.mark.slow
def test_a_killed_worker_is_started_again_and_ends_in_the_same_weights(tmp_path, monkeypatch, capsys):
    whole = started(tmp_path, *SMALL, "--out", "whole")
    said, _ = whole.communicate(timeout=300)
    assert whole.returncode == 0, said
    summary = json.loads((tmp_path / "whole" / "summary.json").read_text())
    assert summary["processes"] == 2
    assert said.count("test ELBO") == 1  # one of them speaks
    monkeypatch.chdir(tmp_path)
    assert cli.main(["evaluate", "whole", "--json"]) == 0  # in one process
    again = json.loads(capsys.readouterr().out)
    for name in ("test_elbo", "test_log_likelihood", "active_units", "sample_energy_distance"):
        assert summary[name] == pytest.approx(again[name], rel=1e-5), name
    broken = started(tmp_path, *SMALL, "--out", "broken")
    while not (tmp_path / "broken" / "checkpoint.safetensors").is_file():
        assert broken.poll() is None, broken.communicate()[0]
        time.sleep(0.01)
    os.kill(worker(1, tmp_path), signal.SIGKILL)
    said, _ = broken.communicate(timeout=300)
    assert broken.returncode == 0 and "going on after epoch" in said, said
    weights = [(tmp_path / name / "weights.safetensors").read_bytes() for name in ("whole", "broken")]
    assert weights[0] == weights[1]
    metrics = [[json.loads(line)["bound"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
               for name in ("whole", "broken")]  # fmt: skip
    assert metrics[0] == metrics[1] and len(metrics[0]) == 40


@pytest.mark.slow
def test_evaluate_and_compare_are_those_of_one_process(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, seed in {"a": "0", "b": "1"}.items():
        run = [*SMALL, "--epochs", "2", "--seed", seed, "--split-seed", "0", "--out", name, "--quiet"]
        assert cli.main(run) == 0
    capsys.readouterr()
    for command in (["evaluate", "a", "-K", "30", "--full"], ["compare", "a", "b", "--evaluation-samples", "30"]):
        assert cli.main([*command, "--json"]) == 0
        wanted = json.loads(capsys.readouterr().out)
        shared = started(tmp_path, *command, "--json", "--out", f"{command[0]}.out")
        said, _ = shared.communicate(timeout=300)
        assert shared.returncode == 0, said
        found = json.JSONDecoder().raw_decode(said[said.index("\n{" if "\n{" in said else "{") :].lstrip())[0]
        assert said.count('"test_elbo"') == (command[0] == "evaluate")  # one of them speaks
        for each in (found, wanted):
            each.pop("evaluation_seconds", None)
            each.get("protocol", {}).pop("threads", None)
        assert found == approximately(wanted)
        assert (tmp_path / f"{command[0]}.out").exists()
    lost = started(tmp_path, "evaluate", "c")
    said, _ = lost.communicate(timeout=300)
    assert lost.returncode != 0 and "got c, wanted a run folder" in said


def approximately(tree):
    if isinstance(tree, dict):
        return {key: approximately(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [approximately(value) for value in tree]
    return pytest.approx(tree, rel=1e-5, nan_ok=True) if isinstance(tree, float) else tree


def test_what_does_not_share_its_work_is_refused_in_several_processes(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    for command, why in {"judge": "the clock of one process", "sample": "fit, evaluate and compare share"}.items():
        assert cli.main([command, "runs/a"]) == 2
        said = capsys.readouterr().err
        assert f"got {command} in 2 processes" in said and why in said


def test_resume_goes_on_with_an_unfinished_run_only(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    run = [*SMALL[:-4], "--epochs", "1", "--evaluation-samples", "5", "--limit", "40", "--out", "a", "--quiet"]
    assert cli.main(run) == 0
    for arguments, words in {
        ("--resume", "a"): "which is finished",
        ("--resume", "b"): "which is no run folder",
        ("--resume", "a", "--epochs", "3"): "with --epochs, wanted no other option",
        ("--resume", "a", "--out", "c"): "with --out, wanted no other option",
    }.items():
        assert cli.main(["fit", *arguments]) == 2
        assert words in capsys.readouterr().err


def test_a_run_that_is_resumed_is_the_run_that_was_not_broken_off(monkeypatch, capsys, tmp_path):
    """After Ctrl-C between two epochs, by --resume alone; also with the state somewhere else."""
    from pyro_vae.app.progress import Progress

    monkeypatch.chdir(tmp_path)
    base = ["fit", "--data", "digits", "--limit", "200", "--hidden", "16", "--latent-dim", "2", "--epochs", "4",
            "--evaluation-samples", "5", "--evaluation-images", "10", "--quiet"]  # fmt: skip
    assert cli.main([*base, "--out", "whole"]) == 0
    call = Progress.__call__

    def broken(self, record):
        call(self, record)
        if record["epoch"] == 2:
            raise KeyboardInterrupt

    for name, more in {"a": [], "b": ["--checkpoint", str(tmp_path / "state.safetensors")]}.items():
        with monkeypatch.context() as patch:
            patch.setattr(Progress, "__call__", broken)
            assert cli.main([*base, "--out", name, *more]) == 130
        assert f"pyro-vae fit --resume {name}" in capsys.readouterr().err
        assert cli.main(["fit", "--resume", name, "--quiet"]) == 0
        files = sorted(str(p.relative_to(name)) for p in Path(name).rglob("*"))
        assert files == sorted(str(p.relative_to("whole")) for p in Path("whole").rglob("*"))
        assert Path(name, "weights.safetensors").read_bytes() == Path("whole", "weights.safetensors").read_bytes()
    assert not Path("state.safetensors").exists()


@pytest.mark.slow
def test_processes_after_a_restart_do_not_look_for_those_before():
    """The agent's store has the addresses of the group that is gone: whoever comes first must not read them."""
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    code = (
        "import os, sys, time, torch.distributed as dist\n"
        "from pyro_vae.app.processes import group\n"
        "late = os.environ['TORCHELASTIC_RESTART_COUNT'] != '0' and os.environ['RANK'] == '0'\n"
        "time.sleep(1.5 * late)\n"
        "with group():\n"
        "    dist.barrier()\n"
        "    print('met', flush=True)\n"
        "    os._exit(0)\n"
    )
    for attempt in range(4):  # without a store of each attempt's own every second one fails
        shared = os.environ | {
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
            "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": str(attempt), "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        started = [
            subprocess.Popen([sys.executable, "-c", code], env=shared | {"RANK": str(rank)}, text=True,
                             cwd=Path(__file__).parents[1], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            for rank in range(2)
        ]  # fmt: skip
        said = [process.communicate(timeout=120)[0] for process in started]
        assert ["met" in each for each in said] == [True, True], said


TWO = ["fit", "--data", "digits", "--limit", "200", "--hidden", "8", "--latent-dim", "2", "--epochs", "2",
       "--evaluation-samples", "5", "--evaluation-images", "10"]  # fmt: skip


def both(folder, arguments, fault=""):
    """Exit code and words of the command in two processes, as torchrun starts them, with a fault planted in them."""
    import socket

    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    code = f"import os, signal, sys\nrank = int(os.environ['RANK'])\nfrom pyro_vae.app import cli, fitting, report\n{fault}"
    code += f"\nsys.argv = ['pyro-vae', *{arguments!r}]\nsys.exit(cli.main())"  # as typed, for the signals
    shared = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1]), "WORLD_SIZE": "2",
                           "MASTER_ADDR": "localhost", "MASTER_PORT": port}  # fmt: skip
    started = [subprocess.Popen([sys.executable, "-c", code], cwd=folder, text=True, stdout=subprocess.PIPE,
                                env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, stderr=subprocess.STDOUT)
               for rank in range(2)]  # fmt: skip
    try:
        said = [process.communicate(timeout=240)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    return [process.returncode for process in started], said


WRAPPED = "from pyro_vae.app import evaluation\nreal = evaluation.{name}\ndef wrapped(*given, **more):\n    {does}\n"
WRAPPED += "    return real(*given, **more)\nif rank in {ranks}:\n    evaluation.{name} = wrapped"
COUNTED = WRAPPED.format(name="elbo_terms", ranks=(0, 1), does="print('THE ELBO', flush=True)")
# Threads of a group that outlives `destroy_process_group`: one that is not done when the interpreter ends aborts it.
LEFT = """
import atexit, pathlib, time
def names():
    return {each.read_text().strip() for each in pathlib.Path('/proc/self/task').glob('*/comm')}
def left():
    until = time.monotonic() + 2
    while time.monotonic() < until and any('gloo' in name for name in names()):
        time.sleep(0.01)
    print('LEFT', sorted(name for name in names() if 'gloo' in name), 'torch._dynamo' in sys.modules, flush=True)
atexit.register(left)
"""


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of two processes that nothing broke off, and that said in each of them that it looked for the ELBO."""
    folder = tmp_path_factory.mktemp("two")
    codes, said = both(folder, [*TWO, "--out", "whole"], COUNTED + LEFT)
    assert codes == [0, 0] and all("THE ELBO" in each for each in said), said
    if sys.platform == "linux":
        assert all("LEFT [] True" in each for each in said), said
    return folder / "whole"


@pytest.mark.slow
@pytest.mark.parametrize("where", ["report.draw", "fitting.write_page"])
def test_a_signal_after_the_last_step_leaves_a_run_that_is_gone_on_with(tmp_path, whole, where):
    """While the first process draws or writes: it says how to go on, and none hangs."""
    fault = f"real = {where}\ndef stopped(*given, **more):\n    os.kill(os.getpid(), signal.SIGTERM)\n"
    fault += f"    return real(*given, **more)\nif rank == 0:\n    {where} = stopped"
    codes, said = both(tmp_path, [*TWO, "--out", "broken"], fault)
    assert codes == [130, 0], said
    assert "pyro-vae fit --resume broken" in said[0]
    codes, said = both(tmp_path, ["fit", "--resume", "broken"])
    assert codes == [0, 0], said
    weights = [(folder / "weights.safetensors").read_bytes() for folder in (tmp_path / "broken", whole)]
    assert weights[0] == weights[1]
    names = [sorted(str(p.relative_to(folder)) for p in folder.rglob("*")) for folder in (tmp_path / "broken", whole)]
    assert names[0] == names[1]


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_setup_that_fails_in_one_process_ends_all_and_says_whose(tmp_path, rank):
    fault = f"def gone(options):\n    raise ValueError('the disk is gone')\nif rank == {rank}:\n    fitting.read = gone"
    codes, said = both(tmp_path, [*TWO, "--out", "run"], fault)
    assert codes[rank] == 2 and codes[1 - rank] != 0, (codes, said)
    assert "the disk is gone" in said[rank] and len(said[rank].strip().splitlines()) <= 3
    assert "Traceback" not in said[0] + said[1] and not (tmp_path / "run").exists()
    if rank == 1:  # the one that speaks says whose fault it was
        assert "process 1 of 2 failed, so all stop: the disk is gone" in said[0]


def numbers_of(path):
    """The summary of a run but for what the clock says."""
    clock = ("seconds", "images_per_second", "date", "protocol")
    return {k: v for k, v in json.loads(path.read_text()).items() if not any(word in k for word in clock)}


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_an_evaluation_is_shared_and_gone_on_with_after_a_signal_to_one_process(tmp_path, whole, rank):
    stopped = WRAPPED.format(name="log_likelihood", ranks=(rank,), does="os.kill(os.getpid(), signal.SIGTERM)")
    # The clock of the plan asks for log p(x), too: it is given its answer.
    fault = f"fitting.evaluation.seconds_each = lambda *given: 1e-9\n{stopped}"
    codes, said = both(tmp_path, [*TWO, "--out", "broken"], fault)
    assert codes == [130, 0] and "pyro-vae fit --resume broken" in said[0], said
    kept = tmp_path / "broken" / "evaluation.partial.safetensors"
    assert kept.is_file()
    codes, said = both(tmp_path, ["fit", "--resume", "broken"], COUNTED)
    assert codes == [0, 0] and "THE ELBO" not in "".join(said), said
    assert not kept.exists()
    wanted = numbers_of(whole / "summary.json")
    assert numbers_of(tmp_path / "broken" / "summary.json") == wanted and "test_log_likelihood" in wanted


@pytest.mark.slow
def test_a_failure_of_another_process_in_the_evaluation_keeps_what_was_trained(tmp_path):
    fault = WRAPPED.format(name="elbo_terms", ranks=(1,), does="raise ValueError('no memory is left')")
    codes, said = both(tmp_path, [*TWO, "--out", "run"], fault)
    assert codes == [2, 2], said
    assert "judging it failed: process 1 of 2 failed, so all stop: no memory is left" in said[0]
    assert "Traceback" not in said[0] + said[1] and (tmp_path / "run" / "weights.safetensors").is_file()
    codes, said = both(tmp_path, ["fit", "--resume", "run"])
    assert codes == [0, 0] and not (tmp_path / "run" / "unfinished.json").exists(), said
