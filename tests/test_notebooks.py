"""The notebooks run from top to bottom, and what is committed of their output is what comes out."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

pytest.importorskip("nbclient", reason="nbclient, which runs notebooks, comes with the extra dev")
pytest.importorskip("ipykernel", reason="ipykernel, which they run in, comes with the extra dev")

FOLDER = Path(__file__).parents[1] / "examples" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
pytestmark = pytest.mark.skipif(not NOTEBOOKS, reason="the examples are not beside the tests")


def cells(path):
    return json.loads(path.read_text())["cells"]


def skeleton(outputs):
    """What a run on another machine shares: kinds of output, and of each line the words before its first number."""
    found = []
    for output in outputs:
        data = {"text/plain": output["text"]} if "text" in output else output["data"]
        shown = next(kind for kind in ("image/png", "text/markdown", "text/plain") if kind in data)
        lines = [] if shown == "image/png" else "".join(data[shown]).strip().splitlines()
        found.append((shown, [" ".join(re.findall(r"[^\W\d]+", re.split(r"\d", line)[0])) for line in lines]))
    return found


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_its_outputs_are_not_stale(path):
    spec = importlib.util.spec_from_file_location("execute_notebooks", FOLDER / "execute.py")
    execute = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(execute)
    for kept, made in zip(cells(path), execute.execute(path).cells, strict=True):
        if made.cell_type == "code":
            assert skeleton(made.outputs) == skeleton(kept["outputs"]), "".join(kept["source"])


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_small_and_reads_well(path):
    assert path.stat().st_size < 600_000
    code = [cell for cell in cells(path) if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1)), "run as a whole"
    assert "pip install 'rcgrpo[tiny]'" in "".join(code[0]["source"])
    assert all(len(cell["source"]) < 40 for cell in code)
    outputs = [output for cell in code for output in cell["outputs"]]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not [output for output in outputs if output.get("name") == "stderr" or output["output_type"] == "error"]
    assert not re.search(r"/(tmp|home|root)/|0x[0-9a-f]{8}", json.dumps(outputs)), "nothing of one machine"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_links_lead_somewhere(path):
    text = "".join(line for cell in cells(path) if cell["cell_type"] == "markdown" for line in cell["source"])
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text)
    assert links and [link for link in links if not (FOLDER / link).exists()] == []
