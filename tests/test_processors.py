"""The choices are right where libraries have fewer instructions, or one core: in a process that has been told so."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

PROGRAM = """
import json
import torch
from pyro.infer import Trace_ELBO
from pyro_vae.inference import hardware
from pyro_vae.inference.compiled import Compiled
from pyro_vae.inference.training import fit
from tests.pairs import binary, small_pair

found = {"bfloat16": hardware.multiplies_bfloat16(), "threads": torch.get_num_threads(),
         "isa": torch.backends.cpu.get_cpu_capability()}
for name, loss in {"eager": Trace_ELBO(), "captured": Compiled(Trace_ELBO(), compile_after=None),
                   "compiled": Compiled(Trace_ELBO(), compile_after=2)}.items():
    model, guide = small_pair()
    found[name] = fit(model, guide, binary(48), loss=loss, epochs=4, batch_size=12, seed=0, compile=False)["loss"]
    found[f"{name} reason"] = getattr(loss, "reason", None)
    found[f"{name} compiled"] = [entry.capture.compiled for entry in getattr(loss, "_graphs", {}).values()]
try:
    with hardware.matmul_precision("bfloat16"):
        found["refused"] = None
except ValueError as error:
    found["refused"] = str(error)
print(json.dumps(found))
"""
OLDER = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
OLDEST = {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2"}


def found_under(environment, cores=None):
    run = [sys.executable, "-c", PROGRAM]
    if cores is not None:
        run = ["taskset", "-c", str(cores), *run]
    root = Path(__file__).parents[1]
    shared = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"} | {
        "PYTHONPATH": str(root)
    }
    done = subprocess.run(run, env=shared | environment, cwd=root, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="how libraries are told is known on Linux only")
@pytest.mark.parametrize("name", ["older", "oldest", "one core"])
def test_losses_agree_and_bfloat16_is_refused_where_it_would_crawl(name):
    found = found_under({"older": OLDER, "oldest": OLDEST}.get(name, {}), cores=0 if name == "one core" else None)
    for way in ("captured", "compiled"):
        assert found[f"{way} reason"] is None
        assert found[way] == pytest.approx(found["eager"], rel=1e-5)
    assert found["compiled compiled"] == [True] and found["captured compiled"] == [False]
    assert (found["refused"] is None) == found["bfloat16"]
    if name == "one core":
        assert found["threads"] == 1
        return
    assert found["isa"] in ("AVX2", "DEFAULT")
    if not torch.cuda.is_available():
        assert not found["bfloat16"] and "ONEDNN_MAX_CPU_ISA" in found["refused"]
