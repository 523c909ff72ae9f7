"""Run the notebooks and write what comes out into them.

    python examples/notebooks/execute.py [one_edit.ipynb ...]

Progress bars and warnings (all of stderr) are left out, so that a page on GitHub shows results alone, and pictures keep
256 colours, so that it loads. Needs nbclient and ipykernel, which come with the extra `dev`.
"""

import base64
import io
import sys
import tempfile
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from PIL import Image

HERE = Path(__file__).resolve().parent
SECONDS = 600
"""Of one cell at most, on a machine that has other things to do."""


def execute(path: Path) -> Any:
    """The notebook with fresh outputs, from top to bottom, in an empty folder; the file stays as it is.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed.
    """
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        NotebookClient(
            notebook, timeout=SECONDS, kernel_name="python3", resources={"metadata": {"path": folder}}
        ).execute()
    for cell in notebook.cells:
        cell.metadata = {}
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
            for data in (output.data for output in cell.outputs if "data" in output):
                data.pop("image/jpeg", None)  # Pillow offers the same picture twice
                if "image/png" in data:
                    data["image/png"] = fewer_colours(data["image/png"])
    notebook.metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    return notebook


def fewer_colours(png: str) -> str:
    """A picture in base64, as one of a palette."""
    out = io.BytesIO()
    picture = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
    # Rare colours, such as an object's own, would be merged away by the usual method.
    few = picture.quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=3, dither=Image.Dither.NONE)
    few.save(out, "PNG", optimize=True)
    return base64.b64encode(out.getvalue()).decode()


if __name__ == "__main__":
    for path in [HERE / name for name in sys.argv[1:]] or sorted(HERE.glob("*.ipynb")):
        nbformat.write(execute(path), path)
        print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB")
