"""Make the embedded photographs and objects from the packages that ship them.

Run once; the results are committed, so that a data set built from them has the same bytes on every machine.

    npm pack @lobehub/fluent-emoji-3d@1.1.0 && tar xzf lobehub-fluent-emoji-3d-1.1.0.tgz
    python benchmarks/make_assets.py package/assets
"""

import argparse
from importlib.util import find_spec
from pathlib import Path

from PIL import Image

from rcgrpo.data.mini import ASSETS, OBJECTS, PHOTOS

PHOTO_SHORT_SIDE = 192
OBJECT_SIDE = 96


def package_folder(name: str) -> Path:
    return Path(find_spec(name).submodule_search_locations[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("emoji_folder", type=Path, help="the `assets` folder of @lobehub/fluent-emoji-3d 1.1.0")
    emoji_folder = parser.parse_args().emoji_folder

    folders = [package_folder("skimage") / "data", package_folder("sklearn") / "datasets" / "images"]
    for photo in PHOTOS:
        source = next(path for folder in folders for path in folder.glob(f"{photo.name}.*"))
        with Image.open(source) as image:
            image = image.convert("RGB")
            scale = PHOTO_SHORT_SIDE / min(image.size)
            image = image.resize([round(side * scale) for side in image.size], Image.Resampling.LANCZOS)
            image.save(ASSETS / "photos" / f"{photo.name}.png", optimize=True)

    for thing in OBJECTS:
        with Image.open(emoji_folder / f"{thing.code_point}.webp") as image:
            image = image.convert("RGBA")
            image = image.crop(image.getchannel("A").point(lambda a: 255 * (a > 8)).getbbox())
            scale = OBJECT_SIDE / max(image.size)
            image = image.resize([round(side * scale) for side in image.size], Image.Resampling.LANCZOS)
            image.save(ASSETS / "objects" / f"{thing.name.replace(' ', '_')}.png", optimize=True)


if __name__ == "__main__":
    main()
