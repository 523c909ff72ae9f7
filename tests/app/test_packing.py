"""`packing.py`: what is taken home is what was made."""

import json
import zipfile
from io import BytesIO

from PIL import Image

from app_edits import SAMPLING, make_edit, make_pipeline
from rcgrpo.app import compare, pack
from rcgrpo.evaluation.benchmark import contenders


def test_the_zip_holds_the_pictures_and_how_they_were_made(tmp_path):
    source, mask = make_edit((64, 48))
    comparison = compare(make_pipeline(), contenders([]), source, mask, "go", SAMPLING, 2)
    (outcome,) = comparison.outcomes

    def read(path):
        with zipfile.ZipFile(path) as archive:
            return {name: archive.read(name) for name in archive.namelist()}

    files = read(pack(comparison, {"instruction": "go", "seed": 3}, tmp_path / "edit.zip"))
    assert set(files) == {"source.png", "mask.png", "base-1.png", "base-2.png", "edit.json"}
    pictures = {name: Image.open(BytesIO(data)) for name, data in files.items() if name.endswith(".png")}
    assert pictures["base-2.png"].tobytes() == outcome.images[1].tobytes()
    assert pictures["mask.png"].tobytes() == comparison.mask.tobytes()
    told = json.loads(files["edit.json"])
    assert told["instruction"] == "go" and told["numbers"]["base"]["background_psnr"] == outcome.background_psnr

    files = read(pack(comparison, {}, tmp_path / "own.zip", source.size))
    sizes = {Image.open(BytesIO(data)).size for name, data in files.items() if name.endswith(".png")}
    assert sizes == {(64, 48)} and Image.open(BytesIO(files["mask.png"])).getextrema() == (0, 255)
