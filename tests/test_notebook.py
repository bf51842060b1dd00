"""The notebook runs from its start to its end, and its pictures are small."""

from pathlib import Path

import pytest

PATH = Path(__file__).parent.parent / "examples" / "inside.ipynb"


def kinds(notebook):
    """By code cell: the kinds of what it shows."""
    return [
        sorted({kind for output in cell.outputs for kind in output.get("data", [output.get("name")])})
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]


@pytest.mark.slow
def test_notebook_runs(tmp_path):
    import nbformat  # not everywhere where the tests for a GPU run
    from nbclient import NotebookClient

    kept = nbformat.read(PATH, 4)
    fresh = nbformat.read(PATH, 4)
    NotebookClient(fresh, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert kinds(fresh) == kinds(kept)  # what is kept is what it shows
    assert sum("image/png" in shown for shown in kinds(fresh)) == 4
    assert [cell.execution_count for cell in kept.cells if cell.cell_type == "code"] == list(range(1, 1 + len(kinds(kept))))
    assert PATH.stat().st_size < 450_000
    text = PATH.read_text()
    assert "Traceback" not in text and "/tmp/" not in text
