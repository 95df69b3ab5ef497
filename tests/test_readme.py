"""The front door is true: its code runs, its commands exist, its links lead somewhere."""

import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.strip().splitlines()[-1][:30])
def test_python_blocks_run(block, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        exec(compile(block, "README.md", "exec"), {"__name__": "readme"})
    assert "log p(x) = -" in capsys.readouterr().out


def test_links_and_pictures_exist():
    for target in re.findall(r"\]\(([^)#]+)\)", TEXT):
        if not target.startswith("http"):
            assert (ROOT / target).exists(), target


def test_commands_of_the_shell_blocks_exist():
    shell = "\n".join(re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL))
    named = {name for name in re.findall(r"pyro-vae (\w+)", shell)}
    assert named == {
        "fit",
        "evaluate",
        "sample",
        "reconstruct",
        "anomalies",
        "judge",
        "explore",
        "compare",
        "encode",
        "runs",
    }
    run = [sys.executable, "-m", "pyro_vae", "--help"]
    listed = subprocess.run(run, capture_output=True, text=True, check=True).stdout
    assert all(name in listed for name in named)
    for script in re.findall(r"python (benchmarks/\w+\.py)", TEXT):
        assert (ROOT / script).exists(), script
