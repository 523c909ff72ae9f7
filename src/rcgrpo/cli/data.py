"""`rcgrpo data`: look at a data set, make masks for it, draw an embedded one. The verb is the first argument."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from itertools import chain, islice
from typing import Any

from .parsing import MINI, TINY, UsageError, check_folder, check_picture, one_of, parse, use_embedded_model

VERBS = {
    "inspect": "draw a contact sheet with the masks, and count",
    "masks": "make masks for rows that have none, once",
    "build-tux": "build a set of edits from photographic cut-outs",
}
SEGMENTERS = {"grounding-sam": "facebook/sam2.1-hiera-small", "sam3": "facebook/sam3"}
METHODS = ("difference", "judge", "velocity", *SEGMENTERS)


@dataclass
class DataArguments:
    """Which rows, for `rcgrpo data`."""

    dataset: str = field(
        metadata={
            "help": f"{MINI} (embedded), Hub id, folder or file; may stand first, without --dataset.",
            "aliases": ["--name"],
        }
    )
    preset: str | None = field(default=None, metadata={"help": "Known data set; recognised by its Hub id."})
    split: str = field(default="train", metadata={"help": "Split; `held_out` for that part of train."})
    held_out: float = field(default=0.0, metadata={"help": "Share of the groups that training must not see."})
    columns: list[str] = field(
        default_factory=list, metadata={"help": "canonical=own pairs, e.g. input_image=src instruction=json.text."}
    )
    mask_encoding: str | None = field(default=None, metadata={"help": "How masks are encoded, over the preset's."})
    root: str | None = field(default=None, metadata={"help": "Where relative paths of pictures start."})
    allow_outside: bool = field(
        default=False,
        metadata={"help": "Let rows name files outside the data set's own folder; if you trust it."},
    )
    revision: str | None = field(default=None, metadata={"help": "Revision of a data set on the Hub."})
    streaming: bool = field(default=False, metadata={"help": "Read as a stream, downloading only what is looked at."})


@dataclass
class InspectArguments(DataArguments):
    """A contact sheet and counts, for `rcgrpo data inspect`."""

    num_samples: int = field(default=16, metadata={"help": "Rows on the sheet, at even spacing; a stream's first."})
    output: str = field(default="sheet.png", metadata={"help": "Where to write the sheet."})
    cell: int = field(default=192, metadata={"help": "Side of a picture on the sheet, in pixels."})
    masks: str | None = field(default=None, metadata={"help": "Folder of masks made by `rcgrpo data masks`."})
    on_missing: list[str] = field(
        default_factory=lambda: ["difference", "full"],
        metadata={"help": "What stands in for a missing mask, in turn: difference, full, drop, error."},
    )


@dataclass
class MaskArguments(DataArguments):
    """Masks made once, for `rcgrpo data masks`."""

    output_dir: str = field(
        default="masks",
        metadata={"help": "Folder of the masks; a second call goes on where it was.", "aliases": ["--output"]},
    )
    method: str = field(default="difference", metadata={"help": f"One of {', '.join(METHODS)}."})
    num_samples: int | None = field(default=None, metadata={"help": "Only this many rows from the start."})
    every_row: bool = field(default=False, metadata={"help": "Also for rows that have a mask."})
    model: str = field(
        default=TINY, metadata={"help": f"velocity: {TINY} (embedded), or Hub id or folder of an editor."}
    )
    resolution: int | None = field(default=None, metadata={"help": "velocity: side at which the editor looks."})
    num_draws: int = field(default=8, metadata={"help": "velocity: draws of noise that are averaged."})
    sigma: float = field(default=0.75, metadata={"help": "velocity: noise level."})
    threshold: float = field(default=0.5, metadata={"help": "velocity: where the map is cut."})
    seed: int = field(default=0, metadata={"help": "velocity: seed of the noise."})
    detector: str = field(
        default="IDEA-Research/grounding-dino-tiny", metadata={"help": "grounding-sam: zero-shot detector."}
    )
    segmenter: str | None = field(
        default=None,
        metadata={"help": "; ".join(f"{method}: {name} if not given" for method, name in SEGMENTERS.items()) + "."},
    )
    phrase_column: str | None = field(
        default=None,
        metadata={"help": "grounding-sam, sam3: column that names the object; else read off the instruction."},
    )
    box_threshold: float = field(default=0.35, metadata={"help": "grounding-sam: least confidence of a box."})
    text_threshold: float = field(default=0.25, metadata={"help": "grounding-sam: least confidence of its words."})
    score_threshold: float = field(default=0.5, metadata={"help": "sam3: least confidence of an instance."})


def run(arguments: Sequence[str]) -> None:
    """`rcgrpo data VERB`."""
    verbs = "; ".join(f"{verb}: {text}" for verb, text in VERBS.items())
    if arguments and arguments[0] in ("-h", "--help"):
        print(f"usage: rcgrpo data VERB ...\n\n{verbs}\n\nsee `rcgrpo data VERB --help`")
        return
    if not arguments or arguments[0] not in VERBS:
        raise UsageError(f"got {arguments[0] if arguments else 'no verb'!r}, expected one of {verbs}")
    verb, rest = arguments[0], list(arguments[1:])
    if verb == "build-tux":
        import_module(f"{__package__}.data_tux").run(rest)
        return
    if rest and not rest[0].startswith("-"):
        rest = ["--dataset", *rest]
    program = f"rcgrpo data {verb}"
    if verb == "inspect":
        inspect(*parse((InspectArguments,), rest, None, program))
    else:
        make(*parse((MaskArguments,), rest, None, program))


def load(args: DataArguments, **settings: Any) -> Any:
    """The rows that the flags name."""
    from ..data.loading import load_edit_dataset, parse_split

    pairs = [pair.partition("=") for pair in args.columns]
    for canonical, equals, own in pairs:
        if not equals or not canonical or not own:
            raise UsageError(f"--columns: got {canonical + equals + own!r}, expected canonical=own")
    columns = {canonical: own.split(",") if "," in own else own for canonical, _, own in pairs}
    source: Any = args.dataset
    if args.dataset == MINI:
        from ..data import compbench_mini

        split = parse_split(args.split, args.held_out)[0]
        if split not in ("train", "test"):
            raise UsageError(f"--split: got {args.split!r}, expected train or test, which {MINI} has")
        source = {split: compbench_mini(split)}
    elif args.revision is not None:
        settings["revision"] = args.revision
    return load_edit_dataset(
        source,
        args.preset or ("compbench" if args.dataset == MINI else None),
        args.split,
        columns=columns,
        held_out=args.held_out,
        streaming=args.streaming,
        mask_encoding=args.mask_encoding,
        root=args.root,
        allow_outside=args.allow_outside,
        **settings,
    )


# inspect --------------------------------------------------------------------------------------------------------------

GIVEN = ("own", "stored")
"""Masks that were not made from the target, or of nothing, when the row was read."""
POOR = 0.5
"""Share of the change in the region below which a mask is pointed out."""


def inspect(args: InspectArguments) -> None:
    """Draw a contact sheet and print counts."""
    from ..data.masks import change_inside, mask_share
    from ..inputs.extras import missing as lacking
    from ..reporting.sheets import contact_sheet

    check_picture("output", args.output)
    rows = load(args, on_missing=tuple(args.on_missing), masks=args.masks)
    stream = not hasattr(rows, "__len__")
    if stream:
        shown = list(islice(rows, args.num_samples))
    else:
        places = range(0, len(rows), max(1, len(rows) // args.num_samples))[: args.num_samples]
        shown = [rows[i] for i in places]
    if not shown:
        raise UsageError(f"{args.dataset}: no rows to show in split {args.split!r}")
    sheet_columns = {"source and region": [tint(row["input_image"], row["mask"]) for row in shown]}
    if any(row.get("edited_image") is not None for row in shown):
        sheet_columns["target"] = [row.get("edited_image") or _blank(row["input_image"]) for row in shown]
    covered = [
        change_inside(row["input_image"], row["edited_image"], row["mask"])
        if row.get("edited_image") is not None and row["mask_source"] in GIVEN and not lacking("masks")
        else None
        for row in shown
    ]
    captions = [_caption(row, inside) for row, inside in zip(shown, covered, strict=True)]
    contact_sheet(sheet_columns, captions, args.cell, args.output)

    shares = [mask_share(row["mask"]) for row in shown]
    sources = Counter(row["mask_source"] for row in shown)
    counted: Mapping[str, Any] = (
        {key: [row.get(key) for row in shown] for key in ("group", "task")} if stream else _cheap_columns(rows)
    )
    of = f"the first {len(shown)} rows of a stream" if stream else f"{len(rows)} rows"
    lines = {"rows": of, "groups": str(len(set(counted["group"])))}
    if counted.get("task") and any(counted["task"]):
        tasks = Counter(str(task) for task in counted["task"])
        lines["tasks"] = ", ".join(f"{task} {count}" for task, count in tasks.most_common())
    if not stream:
        missing = rows.format["format_kwargs"]["transform"].missing
        lines["no mask"] = f"{missing} of {len(rows)} rows ({missing / len(rows):.1%})"
        if empty := _count_empty(rows, places, shown):
            lines["no mask"] += f"; an empty one in {empty} of the {len(shown)} shown"
    lines["masks shown"] = ", ".join(f"{kind} {count}" for kind, count in sources.most_common())
    lines["region"] = (
        f"{sum(shares) / len(shares):.1%} of the picture on average, {min(shares):.1%} to {max(shares):.1%}"
    )
    if known := [inside for inside in covered if inside is not None]:
        poor = sum(inside < POOR for inside in known)
        lines["change"] = f"{sum(known) / len(known):.0%} of it in the region on average"
        if poor:
            why = "their masks miss the edit, or their targets were drawn afresh everywhere"
            lines["change"] += f"; below half in {poor} of {len(known)} rows: {why}"
    elif "target" in sheet_columns and lacking("masks"):
        lines["change"] = "not compared with the region without the extra 'masks'; pip install 'rcgrpo[masks]'"
    print(f"{args.dataset}, {args.split}:")
    for key, value in lines.items():
        print(f"  {key:<12} {value}")
    print(f"Written: {args.output}")


def tint(image: Any, mask: Any) -> Any:
    """The picture with its region under a translucent colour, a line around it."""
    from PIL import Image, ImageChops

    from ..reporting.sheets import outline

    colour = Image.new("RGB", image.size, "#ff2d78")
    cover = ImageChops.multiply(mask.convert("L"), Image.new("L", image.size, 90))
    return outline(Image.composite(colour, image, cover), mask)


def _count_empty(rows: Any, places: Sequence[int], shown: Sequence[Mapping[str, Any]]) -> int:
    """How many of the rows shown hold a mask without an edit pixel, which counts as none."""
    import datasets

    from ..data.canonical import is_missing

    masks = rows.with_format(None).select_columns(["mask"]).select(places)
    if isinstance(masks.features["mask"], datasets.Image):
        masks = masks.cast_column("mask", datasets.Image(decode=False))
    held = (not is_missing(value) for value in masks["mask"])
    return sum(there and row["mask_source"] != "own" for there, row in zip(held, shown, strict=True))


def _blank(image: Any) -> Any:
    from PIL import Image

    return Image.new("RGB", image.size, "#eceef1")


def _caption(row: Mapping[str, Any], inside: float | None) -> str:
    task = f"[{row['task']}] " if row.get("task") not in (None, "") else ""
    note = "" if row["mask_source"] == "own" else f" (mask: {row['mask_source']})"
    if inside is not None and inside < POOR:
        note += f" ({inside:.0%} of the change in the mask)"
    return f"{task}{row['instruction']}{note}"


def _cheap_columns(rows: Any) -> dict[str, Any]:
    names = [name for name in ("group", "task") if name in rows.column_names]
    return dict(rows.with_format(None).select_columns(names)[:])


# masks ----------------------------------------------------------------------------------------------------------------


def make(args: MaskArguments) -> None:
    """Make masks for the rows that have none."""
    one_of(args, "method", METHODS)
    check_folder("output_dir", args.output_dir)
    from tqdm.auto import tqdm

    from ..editors.make_masks import MaskFolder

    rows = load(args, on_missing="full")
    folder = MaskFolder(args.output_dir, args.method)
    before = len(folder.made)
    todo = _todo(rows, folder, args)
    first = next(todo, None)
    if first is not None and args.phrase_column is not None and args.phrase_column not in first:
        raise UsageError(f"--phrase_column: got {args.phrase_column!r}, expected one of {', '.join(first)}")
    if first is not None:  # the models are loaded only if there is something for them to do
        maker = _maker(args)
        folder.fill(tqdm(chain([first], todo), desc="masks", unit=" rows"), maker)
    elif not folder.made and not folder.skipped:
        raise UsageError(
            f"{args.dataset}: no row lacks a mask; --every_row true makes one for each of them all the same"
        )
    new, skipped = len(folder.made) - before, len(folder.skipped)
    print(
        f"{args.output_dir}: {len(folder.made)} masks ({new} new), {skipped} rows without"
        + (", see skipped.log" if skipped else "")
    )
    print(f'Use them: load_edit_dataset("{args.dataset}", masks="{args.output_dir}")')


def _todo(rows: Any, folder: Any, args: MaskArguments) -> Iterator[Mapping[str, Any]]:
    """The rows that still want a mask; those that are done are not even decoded, unless they come as a stream."""
    if hasattr(rows, "__len__"):
        names = rows.with_format(None).select_columns(["id"])[:]["id"]
        if len(set(names)) < len(names):
            raise UsageError("ids repeat, so masks could not be told apart; name the columns of --columns id=a,b")
        candidates = (rows[i] for i, name in enumerate(names[: args.num_samples]) if name not in folder)
    else:
        candidates = (row for row in islice(rows, args.num_samples) if row["id"] not in folder)
    return (row for row in candidates if args.every_row or row["mask_source"] == "full")


def _maker(args: MaskArguments) -> Any:
    from ..editors.make_masks import FromConcept, FromJudge, FromText, FromVelocity, from_difference

    if args.method == "difference":
        return from_difference
    if args.method == "judge":
        return FromJudge()
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.method in SEGMENTERS:
        segmenter = args.segmenter or SEGMENTERS[args.method]
        if args.method == "sam3":
            return FromConcept(segmenter, args.phrase_column, args.score_threshold, device)
        return FromText(args.detector, segmenter, args.phrase_column, args.box_threshold, args.text_threshold, device)
    from ..editors import open_editor
    from .opening import call_defaults, open_pipeline

    if args.model == TINY:
        use_embedded_model()
    pipe = open_pipeline(args.model)
    usual = call_defaults(args.model)
    resolution, length = args.resolution or min(512, usual["resolution"]), usual["max_sequence_length"]
    editor = open_editor(pipe, resolution, num_inference_steps=1, max_sequence_length=length)
    return FromVelocity(editor, args.num_draws, args.sigma, args.threshold, args.seed)
