"""Where the pictures that rows name by path may lie: in the data set's own folder, unless the user says otherwise.

Rows come from others. One that names `../../.ssh/id_rsa` must not be opened, drawn on a sheet or sent to a judge.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import datasets
from huggingface_hub import constants

from ..inputs.pictures import short

REMEDY = "move the file there, or say that this data set may name files anywhere: allow_outside=True, --allow_outside"


def caches(cache_dir: str | Path | None = None) -> list[str]:
    """Folders to which `datasets` and the Hub's client bring what they download and unpack."""
    own = [cache_dir] if cache_dir is not None else []
    known = (datasets.config.HF_DATASETS_CACHE, datasets.config.DOWNLOADED_DATASETS_PATH)
    return [str(folder) for folder in (*own, *known, datasets.config.EXTRACTED_DATASETS_PATH, constants.HF_HUB_CACHE)]


def check_inside(path: str, folders: Sequence[str] | None, where: str) -> None:
    """Refuse a path that leads out of all folders, also by way of a symbolic link; `None` allows every place.

    A snapshot of the Hub's cache is links to the files of its repository, which count as inside.

    Raises:
        ValueError: naming `where`, the path, the folder and how to allow it.
    """
    if folders is None:
        return
    try:
        real = os.path.realpath(path)
    except ValueError as error:  # a zero byte
        raise ValueError(f"{where}: got {short(path)}, expected a path of a file ({error})") from error
    for folder in map(os.path.realpath, folders):
        repository, snapshots, _ = folder.partition(f"{os.sep}snapshots{os.sep}")
        places = [folder, os.path.join(repository, "blobs")] if snapshots else [folder]
        if any(real == place or real.startswith(place.rstrip(os.sep) + os.sep) for place in places):
            return
    raise ValueError(f"{where}: got {short(path)}, which leads out of {folders[0]}, expected a file in it; {REMEDY}")


def local_part(path: str) -> str | None:
    """Which local file a path leads to: itself, or the archive of `zip://a.png::/folder/a.zip`; `None` for others."""
    last = path.rpartition("::")[2]
    if last.startswith("file://"):
        return last.removeprefix("file://")
    return None if "://" in last else last
