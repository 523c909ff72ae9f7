"""A second pack of edits, with photographic objects, built on the user's machine from Tux Paint's pictures.

`stamps` finds and chooses them. They are GPL-2, so they are never part of this package, and what is built from them is
GPL-2 too. Columns and tasks are those of CompBench-mini; objects and photographs are split, so that held-out edits show
neither (`test`), or familiar objects in new places (`validation`). What is left out is listed beside the pack, with its
reason.

Gotcha: the photographs are JPEG, and decoders may differ by a grey level, so the same seed gives the same bytes where
Pillow brings the same decoder.
"""

import csv
import hashlib
import os
import random
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

from datasets import Dataset
from PIL import Image as PILImage
from tqdm.auto import tqdm

from .. import __version__
from .scenes import FEATURES, MASK_GROWTH, TASKS, Photo, compose, draw_square
from .stamps import SIZES, Sources, Stamp, find_sources, read_photographs, read_stamps

ROWS_IN_A_FILE = 500
HELD_OUT = 1 / 5

# Drawing the edits ----------------------------------------------------------------------------------------------------


def split(names: Iterable[str]) -> dict[str, list[str]]:
    """`train` and `test` of photographs or objects, the same for every seed and size: a fifth is held out.

    Raises:
        ValueError: fewer than two.
    """
    ordered = sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())
    if len(ordered) < 2:
        raise ValueError(f"got {len(ordered)} pictures ({', '.join(ordered)}), expected at least 2 to hold one out")
    held_out = max(1, round(HELD_OUT * len(ordered)))
    return {"train": sorted(ordered[held_out:]), "test": sorted(ordered[:held_out])}


def render(
    photographs: Mapping[str, PILImage.Image], stamps: Sequence[Stamp], split: str, index: int, size: int, seed: int
) -> dict[str, Any]:
    """One row with CompBench-mini's columns, drawn from the split's pictures and `(split, size, seed, index)` alone.

    As in CompBench-mini, one to three bystanders stand by the objects that the edit is about. No two objects of a scene
    are called by the same last word, so "remove the apple" can mean one only.

    Raises:
        ValueError: too few differently called objects for a scene.
    """
    rng = random.Random(f"tux-1/{split}/{size}/{seed}/{index}")
    kinds = {stamp.kind for stamp in stamps} - {None}
    tasks = [task for task in TASKS if task != "implicit_reasoning" or len(kinds) > 1]
    task = tasks[index % len(tasks)]
    photo = Photo(rng.choice(sorted(photographs)), split)
    background = draw_square(rng, photographs[photo.name], size)
    return compose(rng, task, photo, background, _cast(rng, stamps, task), seed, index)


def _cast(rng: random.Random, stamps: Sequence[Stamp], task: str) -> list[Stamp]:
    """Up to five objects, no two of one last word, and for *implicit_reasoning* no two of one kind."""
    cast: list[Stamp] = []
    for stamp in rng.sample(stamps, len(stamps)):
        implicit = task == "implicit_reasoning"
        if implicit and (stamp.kind is None or any(stamp.kind == other.kind for other in cast)):
            continue
        if all(stamp.name.split()[-1] != other.name.split()[-1] for other in cast):
            cast.append(stamp)
        if len(cast) == 5:
            break
    if len(cast) < 3 and not (implicit and len(cast) > 1):
        raise ValueError(
            f"stamps_folder: got {len(stamps)} objects in this split, of which a scene can hold {len(cast)}; expected "
            "more of different names"
        )
    return cast


# Writing the pack -----------------------------------------------------------------------------------------------------


def build_tux(
    output: str | os.PathLike[str],
    size: int = 128,
    num_train: int = 2048,
    num_test: int = 256,
    seed: int = 0,
    stamps_folder: str | os.PathLike[str] | None = None,
    backgrounds_folder: str | os.PathLike[str] | None = None,
    download: bool = False,
) -> Path:
    """Build the pack: Parquet files, a data card and a list of every picture with its fate, in a new folder.

    `datasets.load_dataset(output)` opens it, with CompBench-mini's columns. Splits: `train`; `validation`, with
    held-out photographs and the objects of the training; `test`, with the same photographs and held-out objects.

    Args:
        output: folder to make; it appears only when it is complete.
        size: side of the square pictures, 64, 128 or 256 pixels.
        num_train: rows of `train`; tasks take turns.
        num_test: rows of `validation`, and as many of `test`.
        seed: another seed is another data set, over the same split of photographs and objects.
        stamps_folder: Tux Paint's `stamps`, or any folder of PNG cut-outs with a `.txt` beside each; by default the
            downloaded or installed `tuxpaint-stamps-default`.
        backgrounds_folder: JPEG photographs; by default the `templates` of `tuxpaint-data`.
        download: fetch the packages with `apt-get download` where they are missing (169 MB, no root needed).

    Returns:
        The folder.

    Raises:
        FileExistsError: `output` is there already and not an empty folder.
        FileNotFoundError: no source of pictures, with the commands that help.
        ValueError: another size, or too few pictures to split and to fill a scene.
    """
    output = Path(output)
    if size not in SIZES:
        raise ValueError(f"size: got {size}, expected one of {', '.join(map(str, SIZES))} pixels")
    for name, count in (("num_train", num_train), ("num_test", num_test)):
        if count < 1:
            raise ValueError(f"{name}: got {count}, expected at least 1")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(f"output: {output} is there already; choose another folder or remove it")
    sources = find_sources(stamps_folder, backgrounds_folder, download)
    photographs = read_photographs(sources.backgrounds)
    stamps, excluded = read_stamps(sources.stamps)
    for field, folder, found, kind in (
        ("backgrounds_folder", sources.backgrounds, photographs, "JPEG photographs"),
        ("stamps_folder", sources.stamps, stamps, f"PNG cut-outs with captions ({len(excluded)} are left out)"),
    ):
        if len(found) < 2:
            raise ValueError(f"{field}: got {folder} with {len(found)} {kind}, expected at least 2, to hold one out")
    photo_split, stamp_split = split(photographs), split(stamp.id for stamp in stamps)
    with _folder_at_once(output) as part:
        for name, photo_part, stamp_part, count in (
            ("train", "train", "train", num_train),
            ("validation", "test", "train", num_test),
            ("test", "test", "test", num_test),
        ):
            chosen = {key: photographs[key] for key in photo_split[photo_part]}
            objects = [stamp for stamp in stamps if stamp.id in stamp_split[stamp_part]]
            rows = (render(chosen, objects, name, index, size, seed) for index in range(count))
            _write_rows(part, name, tqdm(rows, desc=f"drawing {name}", total=count, leave=False, delay=2), count)
        _write_assets(part / "assets.csv", photo_split, stamps, stamp_split, excluded)
        (part / "README.md").write_text(
            _card(sources, size, num_train, num_test, seed, len(photographs), stamps, excluded), encoding="utf-8"
        )
    return output


@contextmanager
def _folder_at_once(output: Path) -> Iterator[Path]:
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as made:
        part = Path(made) / output.name
        part.mkdir()
        yield part
        os.replace(part, output)


def _write_rows(folder: Path, name: str, rows: Iterable[dict[str, Any]], count: int) -> None:
    """`data/<name>-00000-of-00003.parquet` and so on: few enough rows at a time for any memory."""
    (folder / "data").mkdir(exist_ok=True)
    iterator, files = iter(rows), -(-count // ROWS_IN_A_FILE)
    for number in range(files):
        some = list(islice(iterator, ROWS_IN_A_FILE))
        columns = {column: [row[column] for row in some] for column in FEATURES}
        path = folder / "data" / f"{name}-{number:05d}-of-{files:05d}.parquet"
        Dataset.from_dict(columns, features=FEATURES).to_parquet(path)


def _write_assets(
    path: Path,
    photo_split: Mapping[str, Sequence[str]],
    stamps: Sequence[Stamp],
    stamp_split: Mapping[str, Sequence[str]],
    excluded: Mapping[str, str],
) -> None:
    rows = [("photograph", name, "", part, "") for part, names in photo_split.items() for name in names]
    parts = {id: part for part, ids in stamp_split.items() for id in ids}
    rows += [("object", stamp.id, stamp.phrase, parts[stamp.id], "") for stamp in stamps]
    rows += [("object", id, "", "", reason) for id, reason in excluded.items()]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("kind", "file", "phrase", "split", "left out because"))
        writer.writerows(rows)


def _card(
    sources: Sources,
    size: int,
    num_train: int,
    num_test: int,
    seed: int,
    num_photographs: int,
    stamps: Sequence[Stamp],
    excluded: Mapping[str, str],
) -> str:
    licence = {
        "gpl-2.0": "GPL-2.0, as all of Debian's Tux Paint packages: © 2002-2022 Bill Kendrick and the contributors to "
        "Tux Paint (https://tuxpaint.org). Pass this folder on under the GPL-2.0 only, and name the packages.",
        "other": "that of the pictures in the folders given; GPL-2.0 if they are Tux Paint's. Fill it in before you "
        "pass this folder on.",
    }[sources.licence]
    return f"""---
license: {sources.licence}
task_categories: [image-to-image]
language: [en]
configs:
- config_name: default
  data_files:
  - {{split: train, path: data/train-*.parquet}}
  - {{split: validation, path: data/validation-*.parquet}}
  - {{split: test, path: data/test-*.parquet}}
---
# Edits with photographic objects

{size}×{size} pictures with exact targets and masks, drawn by `rcgrpo data build-tux` ({__version__}) with seed {seed}.
Columns are CompBench's: `task, image_path, input_image, edited_image, instruction, caption, mask` (255 = edit).

| split | rows | photographs | objects |
|---|---|---|---|
| train | {num_train} | training | training |
| validation | {num_test} | held out | training |
| test | {num_test} | held out | held out |

- Origin: {sources.origin}.
- {num_photographs} photographs and {len(stamps)} objects; {len(excluded)} stamps are left out.
  [assets.csv](assets.csv) names every one of them, its split, or the reason why it is left out.
- Licence of every picture, before and after composition: {licence}
- The mask is the object's alpha grown by {MASK_GROWTH:g} of the side; outside it the two pictures are equal.
- Objects are pasted, so lighting, scale and place need not be plausible.
"""
