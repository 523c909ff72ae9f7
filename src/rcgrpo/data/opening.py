"""Rows as they are stored: from the Hub, a folder, a file or memory, whatever their columns are called.

The first half of `load_edit_dataset`. `datasets` opens everything but PIE-Bench; what is decided here is which of its
builders, and where relative paths in the rows start.

Gotcha: a single table says nothing of splits, so it is `train` and no other, or held-out rows would be the training
rows without a word; a folder may name its tables after them.
"""

import glob
import json
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, IterableDataset
from datasets.exceptions import DatasetGenerationError
from huggingface_hub.utils import HFValidationError, validate_repo_id

from ..inputs.pictures import short
from ..inputs.ranges import naming

BUILDERS = {
    ".jsonl": "json",
    ".json": "json",
    ".parquet": "parquet",
    ".csv": "csv",
    ".arrow": "arrow",
    ".tar": "webdataset",
}
"""Which builder of `datasets` opens a file."""


SPLITS = ("train", "test", "validation", "valid", "val", "dev")
"""What tables in a folder are called after their splits."""


def is_one_table(source: Any) -> bool:
    """Whether a source on disk is one set of rows, which has no split but `train`."""
    path = Path(source) if isinstance(source, str | Path) else None
    if path is None or not path.is_dir():
        return path is not None and (path.is_file() or glob.has_magic(str(source)))
    if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
        return (path / "state.json").exists()
    if (path / "mapping_file.json").exists():
        return True
    return not _has_picture_metadata(path) and (any(path.glob("*.tar")) or _only_table(path) is not None)


def _has_picture_metadata(folder: Path) -> bool:
    return any(_names_files(path) for pattern in ("metadata.*", "*/metadata.*") for path in folder.glob(pattern))


def _only_table(folder: Path) -> Path | None:
    """The folder's one table, unless it is called after a split."""
    tables = [path for path in folder.iterdir() if path.suffix in BUILDERS]
    return tables[0] if len(tables) == 1 and tables[0].stem not in SPLITS else None


def _one_split(data: Any, split: str, name: str) -> Any:
    if not isinstance(data, Mapping):
        return data
    if split not in data:
        raise ValueError(f"split: got {split!r}, expected one of {', '.join(data)} of {name}")
    return data[split]


def _pie_bench(path: Path) -> Dataset:
    """PIE-Bench's `mapping_file.json`: one object of rows, keyed by their number."""
    with naming("name_or_path", str(path), "PIE-Bench's object of rows, each with its mask as a list of numbers"):
        rows = [{"key": key, **row} for key, row in json.loads(path.read_text(encoding="utf-8")).items()]
        for row in rows:
            row["mask"] = [int(number) for number in row["mask"]]
        return Dataset.from_list(rows)


def _names_files(metadata: Path) -> bool:
    """Whether a metadata file says which pictures its rows are about, as `imagefolder` wants it."""
    if metadata.suffix == ".parquet":
        columns = pq.read_schema(metadata).names
    elif metadata.suffix in (".jsonl", ".csv"):
        with metadata.open(encoding="utf-8") as file:
            line = file.readline()
        columns = list(json.loads(line or "{}")) if metadata.suffix == ".jsonl" else line.strip().split(",")
    else:
        return False
    return any(column == "file_name" or column.endswith("_file_name") for column in columns)


def _open_folder(folder: Path, split: str, streaming: bool, kwargs: dict[str, Any]) -> tuple[Any, str]:
    if (folder / "state.json").exists() or (folder / "dataset_dict.json").exists():
        return _one_split(datasets.load_from_disk(str(folder)), split, str(folder)), str(folder)
    if (folder / "mapping_file.json").exists():
        return _open_file(folder / "mapping_file.json", split, streaming, kwargs)
    if _has_picture_metadata(folder):
        place = glob.escape(str(folder))
        try:
            data = datasets.load_dataset("imagefolder", data_dir=place, split=split, streaming=streaming, **kwargs)
        except DatasetGenerationError as error:
            reason = error.__cause__ or error
            raise ValueError(
                f"{folder}: got pictures whose metadata cannot be read, expected rows with the same columns and the "
                f"names of files in the folder ({short(reason)})"
            ) from error
        return data, str(folder)
    archives = sorted(map(str, folder.glob("*.tar")))
    if archives:
        return _open_tables(archives, split, streaming, kwargs)
    named = (path for path in sorted(folder.iterdir()) if path.suffix in BUILDERS and path.stem == split.split("[")[0])
    table = next(named, _only_table(folder))
    if table is not None:
        return _open_file(table, split, streaming, kwargs)
    try:
        return datasets.load_dataset(str(folder), split=split, streaming=streaming, **kwargs), str(folder)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"name_or_path: got the folder {str(folder)!r}, expected a table, archives, or pictures with a "
            f"metadata.jsonl in it ({error})"
        ) from error


def _open_file(path: Path, split: str, streaming: bool, kwargs: dict[str, Any]) -> tuple[Any, str]:
    if path.name == "mapping_file.json":
        pictures = path.parent / "annotation_images"
        return _pie_bench(path), str(pictures if pictures.is_dir() else path.parent)
    if path.suffix not in BUILDERS:
        raise ValueError(f"{path}: got a file ending in {path.suffix!r}, expected one of {', '.join(BUILDERS)}")
    return _open_tables([str(path)], split, streaming, kwargs)


def _open_tables(files: list[str], split: str, streaming: bool, kwargs: dict[str, Any]) -> tuple[Any, str]:
    first = Path(files[0])
    # Whatever split is asked for, without a slice of it, is these files; their names are no patterns, but are read as
    # such.
    data_files = {split.split("[")[0]: [glob.escape(file) for file in files]}
    builder = BUILDERS[first.suffix]
    try:
        data = datasets.load_dataset(builder, data_files=data_files, split=split, streaming=streaming, **kwargs)
    except (DatasetGenerationError, pa.ArrowInvalid, tarfile.TarError, StopIteration) as error:  # the last: no rows
        reason = error.__cause__ or error
        raise ValueError(
            f"{first}: got a file that cannot be read as {builder}, expected rows, with the same columns and values of "
            f"the same types in each ({type(reason).__name__}: {reason})"
        ) from error
    return data, str(first.parent)


def _is_hub_id(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def open_rows(source: Any, split: str, streaming: bool, **kwargs: Any) -> tuple[Dataset | IterableDataset, str | None]:
    """The rows as they are stored, and where relative paths in them start.

    Args:
        source: a Hub id; a folder (saved by `datasets`, `imagefolder` with metadata, PIE-Bench, WebDataset archives,
            one table for the split, or whatever `load_dataset` makes of it); a JSONL, JSON, CSV, Parquet or tar file,
            or a pattern of such; or rows that are in memory.
        split: the data set's own; `train` of a single table.
        streaming: open a stream.
        kwargs: for `datasets.load_dataset`.

    Raises:
        FileNotFoundError: neither a file, a folder nor a Hub id.
        ValueError: a file of another kind, or one that cannot be read; a split that is not there.
    """
    root: str | None = None
    if is_one_table(source) and split.split("[")[0] != "train":
        raise ValueError(
            f"split: got {split!r} of {source}, expected 'train', as one table has no other split; hold out a part of "
            "it with held_out=0.1, whose split is 'held_out', or open another file"
        )
    if isinstance(source, Dataset | IterableDataset | Mapping):
        data = _one_split(source, split, "the data set")
    elif not isinstance(source, str | Path):
        data = Dataset.from_list(list(source))
    elif Path(source).is_dir():
        data, root = _open_folder(Path(source), split, streaming, kwargs)
    elif Path(source).is_file():
        data, root = _open_file(Path(source), split, streaming, kwargs)
    elif glob.has_magic(str(source)):
        files = sorted(glob.glob(str(source)))
        suffix = Path(source).suffix
        if not files or suffix not in BUILDERS:
            raise ValueError(
                f"name_or_path: got {str(source)!r}, {len(files)} files, expected some of {', '.join(BUILDERS)}"
            )
        data, root = _open_tables(files, split, streaming, kwargs)
    else:
        wanted = (
            f"name_or_path: got {str(source)!r}, expected a file or folder that is there (seen from {Path.cwd()}), "
        )
        if Path(source).suffix in BUILDERS or not _is_hub_id(str(source)):
            raise FileNotFoundError(wanted + "or a Hub id, owner/name")
        try:
            data = datasets.load_dataset(str(source), split=split, streaming=streaming, **kwargs)
        except (ConnectionError, FileNotFoundError) as error:
            raise FileNotFoundError(f"{wanted}or a data set of the Hub that you can reach ({error})") from error
    if streaming and isinstance(data, Dataset):
        data = data.to_iterable_dataset()
    return data, root
