"""What known data sets call their columns and how they encode their masks: one small record each.

The canonical columns are CompBench's, which the trainer and the rewards read, and two more: `id`, the row's name, and
`group`, what a split keeps together. A preset says where they are found; `load_edit_dataset` does the rest. Everything
else a data set holds stays under its own name.

`caption` is the *local* text of the region's content that region scores compare with. Captions of whole pictures
(PIE-Bench's prompts, MagicBrush's global descriptions) are something else and are left under their own names.
"""

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

PICTURES = ("input_image", "edited_image", "mask")
CANONICAL = ("input_image", "instruction", "mask", "edited_image", "caption", "task", "image_path", "id", "group")
KEYS = ("id", "group")
REQUIRED = ("input_image", "instruction")


@dataclass(frozen=True)
class Preset:
    """How one data set becomes canonical.

    Attributes:
        name: what users type.
        repo: its Hub id, by which it is recognised.
        columns: canonical name to the data set's own; one that a copy of the set lacks is left out.
        mask: the mask's encoding, one of `masks.ENCODINGS`.
        id: columns whose values together name a row; the row's number where empty.
        group: columns whose values together name what a split keeps together; `id` where empty.
        group_pattern: if given, the group is the part of that text which the pattern finds, or the `id` if nothing.
        note: what its users should know before they train.
    """

    name: str
    repo: str | None = None
    columns: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    mask: str = "luma"
    id: tuple[str, ...] = ()
    group: tuple[str, ...] = ()
    group_pattern: str | None = None
    note: str = ""


VIDEO_ID = r"(?<![0-9a-f])[0-9a-f]{8}(?![0-9a-f])"
"""The eight hex digits of the MOSE video in CompBench's `image_path`."""

PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset(
            "compbench",
            "BohanJia/CompBench",
            {name: name for name in CANONICAL if name not in KEYS},
            id=("task", "image_path"),
            group=("image_path",),
            group_pattern=VIDEO_ID,
            note="a benchmark whose large split is called train: hold out videos before you train and report on it",
        ),
        Preset(
            "magicbrush",
            "osunlp/MagicBrush",
            {
                "input_image": "source_img",
                "edited_image": "target_img",
                "instruction": "instruction",
                "mask": "mask_img",
            },
            mask="paint",
            id=("img_id", "turn_index"),
            group=("img_id",),
        ),
        Preset(
            "ultraedit",
            "BleachNick/UltraEdit_Region_Based_100k",
            {
                "input_image": "source_image",
                "edited_image": "edited_image",
                "instruction": "edit_prompt",
                "mask": "mask_image",
            },
        ),
        Preset(
            "humanedit",
            "BryanW/HumanEdit",
            {
                "input_image": "INPUT_IMG",
                "edited_image": "OUTPUT_IMG",
                "instruction": "EDITING_INSTRUCTION",
                "mask": "MASK_IMG",
                "task": "EDITING_TYPE",
            },
            mask="alpha",
            id=("IMAGE_ID", "EDITING_TYPE"),
            group=("IMAGE_ID",),
        ),
        Preset(
            "piebench",
            None,
            {
                "input_image": "image_path",
                "instruction": "editing_instruction",
                "mask": "mask",
                "task": "editing_type_id",
            },
            mask="runs",
            id=("key",),
            note="for its published protocol read the masks as 'runs-border', which also sets the border lines",
        ),
        Preset(
            "omniedit",
            "TIGER-Lab/OmniEdit-Filtered-1.2M",
            {
                "input_image": "src_img",
                "edited_image": "edited_img",
                "instruction": "edited_prompt_list",
                "task": "task",
            },
            id=("omni_edit_id",),
        ),
        Preset(
            "anyedit",
            "Bin1117/AnyEdit",
            {
                "input_image": "image_file",
                "edited_image": "edited_file",
                "instruction": "edit_instruction",
                "task": "edit_type",
            },
            id=("image_id", "edit_type"),
            group=("image_id",),
        ),
        Preset(
            "gedit",
            "stepfun-ai/GEdit-Bench",
            {"input_image": "input_image", "instruction": "instruction", "task": "task_type"},
            id=("key", "instruction_language"),
            group=("key",),
            note="each picture comes with an English and a Chinese instruction; filter by instruction_language",
        ),
        Preset(
            "editscore-rl",
            "EditScore/EditScore-RL-Data",
            {"input_image": "input_images", "instruction": "instruction", "task": "task_type"},
        ),
        Preset(
            "edit-r1",
            "PKU-YuanGroup/Edit-R1",
            {"input_image": "image", "instruction": "prompt"},
        ),
    )
}
CUSTOM = Preset("custom", note="columns under their canonical names, or as `columns` says")


def find_preset(preset: str | Preset | None, name: str | None = None) -> Preset:
    """The preset of that name; without a name the one of that Hub id, else `CUSTOM`.

    Raises:
        ValueError: an unknown name, with the nearest known one.
    """
    if isinstance(preset, Preset):
        return preset
    if preset is None:
        return next((known for known in PRESETS.values() if known.repo is not None and known.repo == name), CUSTOM)
    if preset not in PRESETS:
        nearest = difflib.get_close_matches(preset, PRESETS, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"preset: got {preset!r}, expected one of {', '.join(PRESETS)} (nearest: {nearest}), or None with `columns`"
        )
    return PRESETS[preset]


def has_column(available: Sequence[str], name: str) -> bool:
    """Whether a column is there, or the column that `name` reaches into, as `json.instruction` does into `json`."""
    return name in available or ("." in name and name.split(".")[0] in available)


def read(row: Mapping[str, Any], name: str) -> Any:
    """The value of a column, or of a field inside one that holds mappings, or null: `json.instruction`.

    Raises:
        ValueError: there is no such field.
    """
    if name in row:
        return row[name]
    first, dot, rest = name.partition(".")
    inner = row.get(first)
    if not dot or first not in row or not isinstance(inner, Mapping | None):
        raise ValueError(f"columns: got {name!r}, expected one of {', '.join(row) or 'no fields'}")
    return None if inner is None else read(inner, rest)


@dataclass(frozen=True)
class ColumnMap:
    """Where each canonical column is found in one data set, settled against the columns that it really has.

    `fields` maps canonical names other than `id` and `group` to the data set's own; `id` and `group` are columns whose
    values make the two keys.
    """

    fields: Mapping[str, str]
    id: tuple[str, ...]
    group: tuple[str, ...]
    group_pattern: str | None

    def keys(self, row: Mapping[str, Any], number: str) -> tuple[str, str]:
        """`id` and `group` of a row; `number` names it where the data set does not."""
        name = "/".join(str(read(row, column)) for column in self.id) or number
        parts = [read(row, column) for column in self.group]
        if not parts or any(part is None for part in parts):
            return name, name
        group = "/".join(map(str, parts))
        if self.group_pattern is None:
            return name, group
        found = re.search(self.group_pattern, group)
        return name, found.group() if found else name


def map_columns(
    preset: Preset,
    available: Sequence[str],
    columns: Mapping[str, str | Sequence[str]] | None = None,
    name: str = "data set",
) -> ColumnMap:
    """Settle a preset against a data set.

    Args:
        preset: what to start from.
        available: the data set's columns. A dot reaches into a column that holds mappings, as WebDataset's `json`.
        columns: canonical name to the data set's own, over the preset's; several for `id` and `group`.
        name: what messages call the data set.

    Raises:
        ValueError: a name in `columns` that is not canonical, one of the user's columns that is not there, one that is
            used twice, or no source picture or instruction.
    """
    given = dict(columns or {})
    for key in given:
        if key not in CANONICAL:
            nearest = difflib.get_close_matches(key, CANONICAL, n=1, cutoff=0.0)[0]
            raise ValueError(
                f"columns: got the key {key!r}, expected one of {', '.join(CANONICAL)} (nearest: {nearest}); write "
                "canonical name = the data set's own"
            )
    own = {key: (value,) if isinstance(value, str) else tuple(value) for key, value in given.items()}
    for key, names in own.items():
        missing = [column for column in names if not has_column(available, column)]
        if missing or not names or (len(names) > 1 and key not in KEYS):
            raise ValueError(
                f"columns[{key!r}]: got {given[key]!r}, expected {'columns' if key in KEYS else 'one column'} of "
                f"{name}: {', '.join(available)}"
            )
    fields = {key: column for key, column in preset.columns.items() if key not in own and has_column(available, column)}
    fields |= {key: names[0] for key, names in own.items() if key not in KEYS}
    for key in CANONICAL:
        if key not in KEYS and key in available and key not in fields and key not in fields.values():
            fields[key] = key
    twice = sorted({column for column in fields.values() if list(fields.values()).count(column) > 1})
    if twice:
        raise ValueError(f"columns: {', '.join(twice)} of {name} is used more than once, expected one use each")
    for key in REQUIRED:
        if key not in fields:
            raise ValueError(
                f"{name}: got columns {', '.join(available)}, expected one for {key!r}"
                + (f" (preset {preset.name!r} looks for {preset.columns[key]!r})" if key in preset.columns else "")
                + f"; say which with columns={{{key!r}: ...}}, or name a preset: {', '.join(PRESETS)}"
            )

    def settle(key: str, of_preset: tuple[str, ...]) -> tuple[str, ...]:
        if key in own:
            return own[key]
        if of_preset and all(has_column(available, column) for column in of_preset):
            return of_preset
        return (key,) if key in available else ()

    pattern = preset.group_pattern if "group" not in own else None
    return ColumnMap(fields, settle("id", preset.id), settle("group", preset.group), pattern)
