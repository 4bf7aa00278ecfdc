"""The notebook runs, and prints and draws what is stored in it."""

import base64
import copy
import io

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

NOTEBOOK = ROOT / "examples" / "quickstart.ipynb"


def outputs(cell) -> list[dict]:
    """What a cell shows, without warnings."""
    return [output for output in cell.get("outputs", []) if output.get("name") != "stderr"]


def texts(notebook) -> list[str]:
    shown = [output for cell in notebook.cells for output in outputs(cell)]
    return [output.text if output.output_type == "stream" else output.data["text/plain"] for output in shown]


def pictures(notebook) -> list[np.ndarray]:
    datas = [output.get("data", {}) for cell in notebook.cells for output in outputs(cell)]
    files = [io.BytesIO(base64.b64decode(data["image/png"])) for data in datas if "image/png" in data]
    return [np.asarray(Image.open(file)).astype(int) for file in files]


def test_the_notebook_shows_what_is_stored_in_it():
    stored = nbformat.read(NOTEBOOK, as_version=4)
    executed = copy.deepcopy(stored)
    resources = {"metadata": {"path": str(NOTEBOOK.parent)}}
    nbclient.NotebookClient(executed, timeout=600, kernel_name="python3", resources=resources).execute()
    assert texts(executed) == texts(stored) and "'B'" in texts(stored)
    assert len(pictures(stored)) == 2
    for picture, expected in zip(pictures(executed), pictures(stored), strict=True):
        assert picture.shape == expected.shape
        assert (picture != expected).any(-1).mean() < 0.02  # the letters of a label depend on the version of FreeType
