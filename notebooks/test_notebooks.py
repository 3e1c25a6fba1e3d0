"""Every notebook runs in its small mode, asserts its own claim, and is committed with its plots. `make notebooks`."""

from pathlib import Path

import nbclient
import nbformat
import pytest

NOTEBOOKS = sorted(Path(__file__).parent.glob("*.ipynb"))


def committed_outputs(notebook: Path) -> list[nbformat.NotebookNode]:
    cells = nbformat.read(notebook, as_version=4).cells
    return [output for cell in cells if cell.cell_type == "code" for output in cell.outputs]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs_small(notebook: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REVSOLVE_SMALL", "1")
    nbclient.execute(nbformat.read(notebook, as_version=4), cwd=notebook.parent, timeout=300)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_is_committed_with_its_plots(notebook: Path) -> None:
    outputs = committed_outputs(notebook)
    assert any("image/png" in output.get("data", {}) for output in outputs), "run `make render` and commit the result"
    assert not [output for output in outputs if output.output_type == "error"]
