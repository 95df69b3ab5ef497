"""The notebook runs from top to bottom, and what it says about its numbers is so."""

from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "00_quickstart.ipynb"


@pytest.fixture(scope="module")
def stored():
    import nbformat  # seconds, which not every worker needs

    return nbformat.read(NOTEBOOK, as_version=4)


def test_it_is_stored_with_its_outputs(stored):
    assert NOTEBOOK.stat().st_size < 400_000
    code = [cell for cell in stored.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert sum("image/png" in o.get("data", {}) for cell in code for o in cell.outputs) >= 5
    assert not [o for cell in code for o in cell.outputs if o.output_type == "error" or o.get("name") == "stderr"]


@pytest.mark.slow
def test_it_runs(stored, tmp_path):
    import nbformat

    nbclient = pytest.importorskip("nbclient")
    fresh = nbformat.from_dict(stored)
    nbclient.NotebookClient(fresh, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    printed = "".join(o.text for cell in fresh.cells if cell.cell_type == "code" for o in cell.outputs if "text" in o)
    elbo = float(printed.split("ELBO = ")[1].split(" ")[0])
    evidence = float(printed.split("log p(x) = ")[1].split(" ")[0])
    assert -24.5 < elbo < evidence < -22
    at_mean = [float(part.split(" nats")[0]) for part in printed.split("guide's mean: ")[1:]]
    assert at_mean[1] > at_mean[0], "the autoencoder reconstructs better"
    distance = [float(part.split("\n")[0]) for part in printed.split("energy distance ")[1:]]
    assert distance[1] > distance[0] + 0.1, "and generates worse"
    assert list(tmp_path.iterdir()) == []
