"""The floors of the house: who may import whom."""

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1] / "pyro_vae"
GROUND = {
    "protocols",
    "traces",
    "auxiliary",
    "sites",
    "parameters",
    "reach",
    "evaluation",
    "lending",
    "randomness",
    "unconstrained",
    "__version__",
    "options",
    "tensors",
    "refusals",
    "_lazy",
    "atomic",
    "precision",
    "seals",
    "words",
    "news",
    "turns",
    "_trust",
}
MAY_IMPORT = {
    "traces": {"_lazy", "auxiliary", "sites", "parameters", "randomness", "reach", "options", "refusals"},
    "auxiliary": {"sites", "evaluation", "randomness", "reach"},
    "_lazy": set(),
    "sites": set(),
    "parameters": {"reach"},
    "reach": {"_lazy", "_trust"},
    "_trust": set(),
    "evaluation": {"parameters", "precision", "randomness", "reach"},
    "lending": {"evaluation"},
    "randomness": set(),
    "protocols": set(),
    "unconstrained": {"protocols", "reach"},
    "options": {"words", "turns"},
    "turns": set(),
    "words": set(),
    "news": set(),
    "refusals": {"sites", "randomness"},
    "tensors": set(),
    "atomic": set(),
    "precision": set(),
    "seals": {"atomic"},
    "plots": {"_lazy", "randomness"},
    "parts": GROUND,
    "data": GROUND,
    "inference": GROUND | {"plots"},  # as a history can be drawn
    "programs": GROUND | {"parts"},
    "judging": GROUND | {"inference", "parts", "programs", "plots"},
    "app": GROUND | {"parts", "programs", "data", "inference", "judging", "plots"},
    "testing": GROUND,
    "callbacks": set(),
    "__main__": {"app"},
}
ONLY_THESE_PROGRAMS_KNOW_PARTS = {"architecture.py", "_ex_post.py", "vae.py", "zoo"}


def imported(path: Path) -> set[str]:
    """The floors that a module imports, wherever in the file it does."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names = [node.module or ""]
            if node.module == "pyro_vae":
                names = [f"pyro_vae.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        found |= {name.split(".")[1] for name in names if name.startswith("pyro_vae.")}
    return found


def test_every_module_stands_on_its_floor():
    wrong = []
    for path in ROOT.rglob("*.py"):
        if path == ROOT / "__init__.py":
            continue
        floor = path.relative_to(ROOT).parts[0].removesuffix(".py")
        upward = imported(path) - MAY_IMPORT[floor] - {floor}
        wrong += [f"{path.relative_to(ROOT)} imports {name}" for name in upward]
    assert wrong == []


def test_only_the_conveniences_among_the_programs_know_the_parts():
    programs = ROOT / "programs"
    knowing = {path.relative_to(programs).parts[0] for path in programs.rglob("*.py") if "parts" in imported(path)}
    assert knowing <= ONLY_THESE_PROGRAMS_KNOW_PARTS


def test_no_drawer_for_odds_and_ends():
    names = {path.stem for path in ROOT.rglob("*.py")}
    assert not names & {"utils", "util", "helpers", "base", "common", "misc"}


def test_the_package_and_the_command_wait_for_torch():
    for code in (
        "dir(pyro_vae)",
        "import pyro_vae.app.cli",
        "from pyro_vae import judging, inference, programs, parts, data",
    ):
        code = f"import sys, pyro_vae; {code}; print('torch' in sys.modules)"
        assert (
            subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
        )
    code = "import sys, pyro_vae.app.cli as cli\ntry: cli.main(['--help'])\nexcept SystemExit: pass\nprint('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.endswith(
        "False\n"
    )
