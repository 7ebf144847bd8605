"""The tutorial: it runs from nothing with fewer steps, and what is said in it is what came out when all of it ran."""

import json
import re
from pathlib import Path

import pytest

PATH = Path(__file__).parents[1] / "docs" / "tutorial.ipynb"
CELLS = json.loads(PATH.read_text(encoding="utf-8"))["cells"]
FEW = "STEPS, PRETRAINING, FINE_TUNING, LAYER_RATES, LANGUAGE_RATES = 20, 2, 14, 1, 1"


def printed(cells):
    """All that cells have printed."""
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    assert not [output for output in outputs if output["output_type"] == "error"]
    return "".join("".join(output.get("text", "")) for output in outputs if output.get("name") != "stderr")


def test_the_figures_in_its_text_are_among_those_that_came_out():
    numbers = [float(number) for number in re.findall(r"\d+\.\d+", printed(CELLS))]
    text = "".join("".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "markdown")
    said = re.findall(r"\b\d\.\d{3}\b", text)
    assert len(said) >= 7
    for number in said:
        assert any(abs(float(number) - one) <= 0.00051 for one in numbers), number


def test_it_is_kept_as_it_ran_from_top_to_bottom():
    code = [cell for cell in CELLS if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    pictures = [output for cell in code for output in cell["outputs"] if "image/png" in output.get("data", {})]
    assert len(pictures) == 3
    assert "stderr" not in {output.get("name") for cell in code for output in cell["outputs"]}


@pytest.mark.slow
def test_it_runs_with_fewer_steps():
    nbformat = pytest.importorskip("nbformat", reason="no nbformat: pip install --group docs")
    nbclient = pytest.importorskip("nbclient", reason="no nbclient: pip install --group docs")
    pytest.importorskip("ipykernel", reason="no ipykernel: pip install --group docs")
    notebook = nbformat.read(PATH, as_version=4)
    (parameters,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    assert {*re.findall(r"[A-Z_]{5,}", parameters.source)} == {*re.findall(r"[A-Z_]{5,}", FEW)}
    parameters.source = FEW
    for cell in notebook.cells:
        cell.pop("outputs", None)
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    # The limit of rank 4, from the tutorial's own problem, and the adapter's equality, which it asserts itself.
    assert "lowest risk of any update of rank 4: 0.4751" in printed(notebook.cells)
    assert "adapter against trained model: " in printed(notebook.cells)
