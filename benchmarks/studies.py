"""The studies of `benchmarks/studies/` in the docs: tables and figure, from the folders that `compare` made.

    PYRO_VAE_DATA=path/to/mnist pyro-vae compare benchmarks/studies/mnist-joint.yaml --out studies/mnist-joint
    PYRO_VAE_DATA=path/to/mnist pyro-vae compare benchmarks/studies/mnist-frozen.yaml --out studies/mnist-frozen
    python benchmarks/studies.py studies/mnist-joint studies/mnist-frozen

Copies each table.csv and table.md into benchmarks/results/studies, draws docs/images/mnist-studies.png, and puts the
tables between the markers of docs/compare.md.
"""

from __future__ import annotations

import csv
import shutil
import sys
from pathlib import Path
from typing import Any

from pyro_vae import plots
from pyro_vae.plots._canvas import canvas

ROOT = Path(__file__).parents[1]
RESULTS, PAGE = ROOT / "benchmarks" / "results" / "studies", ROOT / "docs" / "compare.md"
FIGURE = ROOT / "docs" / "images" / "mnist-studies.png"
BEGIN, END = "<!-- studies: python benchmarks/studies.py -->", "<!-- /studies -->"


def rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a table.csv, typed."""
    with path.open(encoding="utf-8", newline="") as file:
        found = list(csv.DictReader(file))
    words = ("arm", "flags", "holds")
    read: list[dict[str, Any]] = []
    for row in found:
        line: dict[str, Any] = {k: v if k in words else float(v) if v else None for k, v in row.items()}
        read.append(line | {"holds": row["holds"] == "True"})
    return read


def main(folders: list[str]) -> None:
    """Copy, draw, insert; of no folder only what is in the results already."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    for folder in map(Path, folders):
        for kind in ("csv", "md"):
            shutil.copyfile(folder / f"table.{kind}", RESULTS / f"{folder.name}.{kind}")
    names = ("mnist-joint", "mnist-frozen")
    figure = canvas(12, 3.4)
    for axes, name in zip(figure.subplots(1, 2), names, strict=True):
        criterion = "log p(x)" if name.endswith("joint") else "ELBO"
        plots.differences(rows(RESULTS / f"{name}.csv"), f"{name}: behind the best in {criterion}", ax=axes)
    figure.savefig(FIGURE, dpi=90)
    before, found, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    if not found or END not in rest:
        raise SystemExit(f"{PAGE} has no lines {BEGIN} and {END}.")
    tables = {name: (RESULTS / f"{name}.md").read_text(encoding="utf-8").strip() for name in names}
    said = "\n\n".join(f"`{name}.yaml`: {table}" for name, table in tables.items())
    PAGE.write_text(f"{before}{BEGIN}\n\n{said}\n\n{rest[rest.index(END) :]}", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
