"""The notebook: all cells but those of its last part run, and it is committed as it ran."""

import nbformat
from conftest import ROOT
from nbclient import NotebookClient

NOTEBOOK = ROOT / "docs" / "prdp.ipynb"


def said(cell) -> str:
    return "".join(output.get("text", "") for output in cell.get("outputs", ()))


def pictures(cell) -> int:
    return sum("image/png" in output.get("data", {}) for output in cell.get("outputs", ()))


def test_its_cells_run(tmp_path, monkeypatch):
    for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "jupyter"))
    notebook = nbformat.read(NOTEBOOK, 4)
    notebook.cells = [cell for cell in notebook.cells if "gpu" not in cell.metadata.get("tags", ())]
    (settings,) = [cell for cell in notebook.cells if cell.source.startswith("EPOCHS, RUNS = ")]
    settings.source = f"EPOCHS, RUNS = 1, {str(tmp_path)!r}"
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": NOTEBOOK.parent}}).execute()
    assert "epoch 1 of 1: reward" in "".join(map(said, notebook.cells))
    committed = [cell for cell in nbformat.read(NOTEBOOK, 4).cells if "gpu" not in cell.metadata.get("tags", ())]
    assert sum(map(pictures, notebook.cells)) == sum(map(pictures, committed)) == 6
    assert {path.name for path in tmp_path.iterdir()} >= {"notebook", "drawn.png", "scored.png"}


def test_it_is_committed_with_what_it_printed_and_of_no_machine():
    notebook = nbformat.read(NOTEBOOK, 4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert not [output for cell in code for output in cell.outputs if output.output_type == "error"]
    epochs = [line for cell in code for line in said(cell).splitlines() if line.startswith("epoch ")]
    assert len(epochs) == 40 and epochs[-1].startswith("epoch 40 of 40: reward 0.")
    assert all(f"/{place}/" not in said(cell) for cell in code for place in ("home", "tmp", "root", "work", "site-packages"))
