"""`.ci/run` ends as its stages do: run with stand-ins for Python, pip and the tools, which record that they were called."""

import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TOOLS = ("pip", "ruff", "mypy", "pytest", "chromium")
TOOL = '#!/bin/sh\necho "$(basename "$0") $*" >> "$CALLS"\ncase "$(basename "$0") $*" in $FAILS) exit 3;; esac\n'
PYTHON = '#!/bin/sh\nmkdir -p "$3/bin" && touch "$3/bin/activate"\n'
VERSIONS = '#!/bin/sh\necho "versions $1" >> "$CALLS"\ncase "versions $1" in $FAILS) exit 4;; esac\n'


def program(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
@pytest.mark.parametrize(
    ("fails", "status", "last"),
    [
        ("nothing", 0, "versions test"),
        ("pytest -m slow", 3, "pytest -m slow"),
        ("mypy*", 3, "mypy "),
        ("versions install", 0, "pytest -m slow"),
        ("versions test", 4, "versions test"),
    ],
)
def test_ci_ends_as_its_stages_do_and_leaves_nothing(tmp_path, fails, status, last):
    tools, checkout, scratch = (tmp_path / name for name in ("tools", "checkout", "scratch"))
    for folder in (tools, checkout / ".ci", scratch):
        folder.mkdir(parents=True)
    for name in TOOLS:
        program(tools / name, TOOL)
    program(tools / "python", PYTHON)
    shutil.copy(ROOT / ".ci" / "run", checkout / ".ci" / "run")
    shutil.copy(ROOT / "README.md", checkout / "README.md")
    program(checkout / ".ci" / "versions", VERSIONS)
    calls = tmp_path / "calls"
    ended = subprocess.run(
        ["bash", str(checkout / ".ci" / "run")],
        env={
            "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}",
            "PYTHON": str(tools / "python"),
            "CALLS": str(calls),
            "FAILS": fails,
            "TMPDIR": str(scratch),
            "HOME": str(tmp_path),
        },
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ended.returncode == status, ended.stdout + ended.stderr
    called = [line for line in calls.read_text().splitlines() if line != "versions install"]
    assert called[-1] == last
    assert not list(scratch.iterdir())
