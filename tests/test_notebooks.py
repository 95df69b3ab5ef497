"""The course runs from top to bottom without a warning, and what is stored of it is what it gave."""

import ast
import base64
import copy
import json
import shutil
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "notebooks"
COURSE = sorted([*FOLDER.glob("0[1-9]_*.ipynb"), *FOLDER.glob("ko/0[1-9]_*.ipynb")])
KOREAN = [path for path in COURSE if path.parent.name == "ko"]
SWITCH = 'DATA = os.environ.get("PYRO_VAE_COURSE", "digits")'
IN_MARKDOWN, IN_CODE = "markdown", "code"


def read(path):
    import nbformat  # here, for it takes seconds, which not every worker needs

    return nbformat.read(path, as_version=4)


def output(*kind, **fields):
    import nbformat

    return nbformat.v4.new_output(*kind, **fields)


def name(path):
    return str(path.relative_to(FOLDER))


def cells(notebook, kind):
    return [cell for cell in notebook.cells if cell.cell_type == kind]


def pictures(notebook):
    found = [
        o["data"]["image/png"]
        for cell in cells(notebook, IN_CODE)
        for o in cell.outputs
        if "data" in o and "image/png" in o["data"]
    ]
    return [base64.b64decode(text) for text in found]


def python(cell):
    """The source of a cell without what is IPython's alone."""
    return "\n".join(line for line in cell.source.splitlines() if not line.startswith("%"))


def count_asserts(notebook):
    trees = [ast.parse(python(cell)) for cell in cells(notebook, IN_CODE)]
    return sum(isinstance(node, ast.Assert) for tree in trees for node in ast.walk(tree))


def complaints(notebook):
    """What its outputs must not hold: errors, and all that is written to stderr, as warnings are."""
    outputs = [o for cell in cells(notebook, IN_CODE) for o in cell.outputs]
    return [o.get("text", o.get("evalue")) for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]


def faults(notebook):
    """What a notebook of the course lacks, in words."""
    found = []
    source = "\n".join(cell.source for cell in notebook.cells)
    code = cells(notebook, IN_CODE)
    for number, cell in enumerate(code):
        try:
            compile(python(cell), f"cell {number}", "exec")
        except SyntaxError as error:
            return [f"code cell {number} is no Python: {error}"]
    if notebook.cells[0].cell_type != IN_MARKDOWN or not notebook.cells[0].source.startswith("# "):
        found.append("it does not begin with a title")
    if SWITCH not in code[0].source:
        found.append("its first code cell has no switch for the data")
    if count_asserts(notebook) < 6:
        found.append("it claims more than it checks: fewer than six asserts")
    if source.count("<details>") < 2 or source.count("<details>") != source.count("</details>"):
        found.append("it has no exercises with solutions that are folded away")
    if [cell.execution_count for cell in code] != list(range(1, len(code) + 1)):
        found.append("its outputs are missing, or its cells ran in another order")
    if complaints(notebook):
        found.append(f"a cell printed a warning or an error: {complaints(notebook)[0]}")
    if len(pictures(notebook)) < 3:
        found.append("it has fewer than three pictures")
    if any(len(picture) > 150_000 for picture in pictures(notebook)):
        found.append("a picture is larger than 150 kB")
    if any(len(cell.source.splitlines()) > 25 for cell in code):
        found.append("a code cell is longer than 25 lines")
    return found


def test_the_course_is_there():
    assert [name(path)[:2] for path in COURSE if path.parent == FOLDER][:2] == ["01", "02"]
    readme = (FOLDER / "README.md").read_text()
    assert all(f"({name(path)})" in readme for path in [FOLDER / "00_quickstart.ipynb", *COURSE])


@pytest.mark.parametrize("path", COURSE, ids=name)
def test_what_is_stored(path):
    assert faults(read(path)) == []
    assert path.stat().st_size < 1_000_000


@pytest.mark.parametrize("path", KOREAN, ids=name)
def test_the_korean_edition_has_the_same_cells(path):
    """The same code but for its comments, so the same checks; and as many texts around it."""
    own, english = (read(place) for place in (path, FOLDER / path.name))
    assert [cell.cell_type for cell in own.cells] == [cell.cell_type for cell in english.cells]
    for mine, theirs in zip(cells(own, IN_CODE), cells(english, IN_CODE), strict=True):
        assert ast.dump(ast.parse(python(mine))) == ast.dump(ast.parse(python(theirs)))
    for cell in cells(own, IN_MARKDOWN):
        assert any("가" <= letter <= "힣" for letter in cell.source)


@pytest.mark.parametrize("path", [path for path in COURSE if path.name.startswith("05")], ids=name)
def test_the_table_of_mnist_is_what_was_measured(path, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(FOLDER.parent / "benchmarks"), *sys.path])
    from course_table import FOLDER as KEPT
    from course_table import table

    results = json.loads((KEPT / "course_table.json").read_text())
    kept = (KEPT / "course_table.md").read_text()
    assert kept == table(results) + "\n"
    assert results["settings"]["limit"] is None and "/tmp" not in results["command"]
    notebook = read(path)
    shown = [o["data"].get("text/markdown") for c in cells(notebook, IN_CODE) for o in c.outputs if "data" in o]
    assert kept in shown
    assert all(row["whole"]["images"] == 10_000 for row in results["rows"].values())


def spoilt(change):
    notebook = copy.deepcopy(read(COURSE[0]))
    change(notebook, cells(notebook, IN_CODE))
    return faults(notebook)


@pytest.mark.parametrize(
    "change, fault",
    [
        (lambda n, code: n.cells.pop(0), "title"),
        (lambda n, code: code[0].update(source="import os"), "switch"),
        (lambda n, code: code[1].update(execution_count=9), "another order"),
        (lambda n, code: code[2].update(source="def"), "no Python"),
        (lambda n, code: [c.update(source="print(1)") for c in code[1:]], "fewer than six asserts"),
        (lambda n, code: [c.update(outputs=[]) for c in code], "fewer than three pictures"),
        (lambda n, code: [c.update(source="# text") for c in cells(n, IN_MARKDOWN)], "folded away"),
        (lambda n, code: code[1].outputs.append(output("stream", name="stderr", text="Warning")), "printed a warning"),
        (lambda n, code: code[1].outputs.append(output("display_data", {"image/png": "A" * 300_000})), "150 kB"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_found(change, fault):
    assert any(fault in found for found in spoilt(change))


@pytest.mark.slow
@pytest.mark.parametrize("path", COURSE, ids=name)
def test_it_runs(path, tmp_path, monkeypatch):
    nbclient = pytest.importorskip("nbclient")
    monkeypatch.delenv("PYRO_VAE_COURSE", raising=False)
    stored = read(path)
    fresh = copy.deepcopy(stored)
    for cell in cells(fresh, IN_CODE):
        cell.outputs, cell.execution_count = [], None
    # Run as in the checkout, but where a file that it leaves would be seen: 05 reads a table of the benchmarks.
    kept = tmp_path / "checkout" / "benchmarks"
    shutil.copytree(FOLDER.parent / "benchmarks" / "results", kept / "results")
    beside = tmp_path / "checkout" / "notebooks" / path.parent.relative_to(FOLDER)
    beside.mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    # A failed assert of a cell is an error here; outputs are not compared, for they depend on the processor.
    nbclient.NotebookClient(fresh, timeout=600, resources={"metadata": {"path": str(beside)}}).execute()
    assert faults(fresh) == []
    assert len(pictures(fresh)) == len(pictures(stored))
    assert sorted(tmp_path.rglob("*")) == before, "a notebook leaves no files"
