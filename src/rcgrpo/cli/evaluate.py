"""`rcgrpo evaluate`: a model with and without LoRAs on a data set, with CompBench's metrics."""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

from .. import __version__
from .parsing import (
    GUIDANCE,
    MINI,
    STEPS,
    TINY,
    TRUE_CFG,
    UsageError,
    check_folder,
    free_folder,
    one_of,
    parse,
    use_embedded_model,
)

COMPBENCH = "BohanJia/CompBench"

PATIENCE = timedelta(days=7)
"""How long processes wait for the slowest of them; one that fails ends the others through their launcher."""


@dataclass
class EvaluateArguments:
    """What to evaluate on what, for `rcgrpo evaluate`."""

    model: str = field(default=TINY, metadata={"help": f"{TINY} (embedded), or a Hub id or folder of an editor."})
    lora: list[str] = field(
        default_factory=list,
        metadata={"help": "LoRAs to compare with the model as it is: folders, files or Hub ids. May be repeated."},
    )
    dataset: str = field(default=MINI, metadata={"help": f"{MINI} (embedded), or what `load_edit_dataset` opens."})
    splits: list[str] = field(
        default_factory=list,
        metadata={
            "help": f"Splits, one after another; by default 'test', 'train' of a single table, 'train multi_turn' of "
            f"{COMPBENCH}.",
            "aliases": ["--split"],
        },
    )
    allow_outside: bool = field(
        default=False,
        metadata={"help": "Let rows name files outside the data set's own folder; if you trust it."},
    )
    held_out: float = field(
        default=0.0,
        metadata={"help": "Evaluate only this share of the videos, those that training left out with the same share."},
    )
    num_samples: int | None = field(
        default=None,
        metadata={"help": f"So many edits, evenly spaced over the data; by default all, and 192 of {MINI}."},
    )
    metrics: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Some of lc_t lc_i psnr ssim lpips lp_t lp_i edit_score; by default CompBench's, the first five, "
            f"and psnr ssim lp_t lp_i edit_score on {MINI}."
        },
    )
    metric_size: int | None = field(
        default=None,
        metadata={"help": f"Compare at this side in pixels; by default CompBench's 512, on {MINI} the pictures' own."},
    )
    clip_model: str = field(
        default="openai/clip-vit-large-patch14",
        metadata={"help": "CLIP for LC-T and LC-I, Hub id or folder; another one gives other numbers."},
    )
    lpips_weights: str | None = field(
        default=None, metadata={"help": "A local squeezenet1_1 file for LPIPS; by default torchvision fetches it."}
    )
    resolution: int | None = field(
        default=None, metadata={"help": f"Edit at resolution² pixels; 1024 by default, 64 for {TINY}."}
    )
    num_inference_steps: int | None = field(default=None, metadata={"help": STEPS})
    guidance_scale: float | None = field(default=None, metadata={"help": GUIDANCE})
    true_cfg_scale: float | None = field(default=None, metadata={"help": TRUE_CFG})
    max_sequence_length: int | None = field(
        default=None, metadata={"help": f"Tokens of an instruction; 512 by default, 20 for {TINY}."}
    )
    batch_size: int | None = field(
        default=None, metadata={"help": f"Edits at once, and what a crash can cost; 4 by default, 8 for {TINY}."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of the noise."})
    intervals_by: str | None = field(
        default=None,
        metadata={"help": "What intervals resample: 'video' (default, as its frames resemble each other) or 'edit'"},
    )
    num_pictures: int = field(default=200, metadata={"help": "Edits shown in report.html, the worst ones."})
    output_dir: str | None = field(
        default=None, metadata={"help": "Where results go; by default a new folder rcgrpo-evaluation."}
    )
    resume: bool = field(default=False, metadata={"help": "Go on with the evaluation in --output_dir."})
    update_card: bool = field(
        default=False,
        metadata={"help": "Put the numbers as `model-index` into the README.md beside each LoRA that lies here."},
    )


def run(arguments: Sequence[str]) -> None:
    """`rcgrpo evaluate`: sample, measure and report; results are on disk batch by batch."""
    (args,) = parse((EvaluateArguments,), gather_repeated(arguments, "--lora"), None, "rcgrpo evaluate")
    fill_in(args)
    if args.model == TINY and args.dataset == MINI and not {"lc_t", "lc_i"} & {*args.metrics}:
        use_embedded_model(args.lora)
    import torch
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    from ..data.edits import EditRows
    from ..evaluation.benchmark import Sampling, contenders, load_loras, make_plan, open_folder, rows_digest
    from ..evaluation.benchmark import run as run_benchmark
    from ..evaluation.cards import write_cards
    from ..evaluation.held_out import Scorer
    from ..evaluation.results import write_results
    from .opening import check_loras, open_pipeline, sampling_settings

    state = PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE)
    folder = Path(*broadcast_object_list([args.output_dir]))
    check_loras(args.model, args.lora)
    entrants = contenders(args.lora)
    with state.local_main_process_first():
        rows = EditRows(load_rows(args), "evaluation")
    plan = make_plan(rows, args.num_samples)
    sampling = Sampling(**sampling_settings(args), seed=args.seed)
    settings = {
        "rcgrpo": __version__,
        "model": args.model,
        "dtype": "float32" if args.model == TINY else "bfloat16",
        "contenders": {c.name: None if c.lora is None else digest(c.lora) for c in entrants},
        "dataset": args.dataset,
        "splits": args.splits,
        "held_out": args.held_out,
        "rows": rows_digest(rows, plan),
        "metrics": args.metrics,
        "metric_size": args.metric_size,
        "clip_model": args.clip_model,
        "lpips_weights": args.lpips_weights,
        "sampling": asdict(sampling),
    }
    scorer = Scorer(args.metrics, args.metric_size, args.clip_model, args.lpips_weights)
    (earlier,) = broadcast_object_list([open_folder(folder, settings, args.resume) if state.is_main_process else None])
    pipeline = open_pipeline(args.model)
    load_loras(pipeline, entrants)
    names = [contender.name for contender in entrants]
    state.print(f"rcgrpo {__version__}: {', '.join(names)} of {args.model} on {len(plan.rows)} edits of {args.dataset}")
    records = run_benchmark(pipeline, entrants, rows, plan, sampling, scorer, folder, earlier, args.batch_size)
    if state.is_main_process:
        text = write_results(
            folder,
            records,
            rows,
            plan,
            names,
            args.metrics,
            settings,
            by_video=args.intervals_by == "video",
            published="compbench" in args.dataset.lower() and args.metric_size == 512,
            num_pictures=args.num_pictures,
        )
        cards = write_cards(folder, {entrant.name: entrant.lora for entrant in entrants}, args.update_card)
        print(f"\n{text}\nWritten to {folder}: results.json, results.md, report.html, samples.jsonl, images, cards")
        for card in cards:
            print(f"Updated {card}")
    state.destroy_process_group()


def fill_in(args: EvaluateArguments) -> None:
    """The defaults that depend on the model and the data set; checks what is wrong whatever they are."""
    from ..data.opening import is_one_table
    from ..evaluation.benchmark import SETTINGS
    from ..evaluation.held_out import COMPBENCH_METRICS, METRICS, MINI_METRICS

    mini = args.dataset == MINI
    if args.resume and args.output_dir is None:
        raise UsageError("--resume: got no --output_dir, expected the folder of the evaluation to go on with")
    args.output_dir = args.output_dir or free_folder("rcgrpo-evaluation")
    if args.resume and not (Path(args.output_dir) / SETTINGS).exists():
        raise UsageError(
            f"--resume: got --output_dir {args.output_dir}, expected the folder of an earlier evaluation, with "
            f"{SETTINGS} in it; name it, or leave --resume out to start one there"
        )
    check_folder("output_dir", args.output_dir)
    if mini and args.held_out:
        raise UsageError(f"--held_out: got {args.held_out}, expected 0 on {MINI}, whose test split is held out already")
    if not args.splits:
        whole = args.held_out or is_one_table(args.dataset)
        args.splits = ["train", "multi_turn"] if args.dataset == COMPBENCH else ["train" if whole else "test"]
        if args.held_out:
            args.splits = [f"{split}:held_out" for split in args.splits]
    args.metrics = args.metrics or list(MINI_METRICS if mini else COMPBENCH_METRICS)
    for name in args.metrics:
        if name not in METRICS:
            raise UsageError(f"--metrics: got {name!r}, expected some of {' '.join(METRICS)}")
    if args.metric_size is None and not mini:
        args.metric_size = 512
    args.batch_size = args.batch_size or (8 if args.model == TINY else 4)
    args.intervals_by = args.intervals_by or ("edit" if mini else "video")
    one_of(args, "intervals_by", ("video", "edit"))


def load_rows(args: EvaluateArguments) -> Any:
    """The rows of all splits, one after another."""
    if args.dataset == MINI:
        from ..data import compbench_mini

        if args.splits not in (["test"], ["train"]):
            raise UsageError(f"--splits: got {' '.join(args.splits)}, expected test or train, which {MINI} has")
        return compbench_mini(args.splits[0], args.num_samples or 192)
    import datasets

    from ..data.loading import load_edit_dataset

    parts = [
        load_edit_dataset(args.dataset, split=split, held_out=args.held_out, allow_outside=args.allow_outside)
        for split in args.splits
    ]
    if len(parts) == 1:
        return parts[0]
    transform = parts[0].format["format_kwargs"]["transform"]  # the same for all splits, and lost when they are joined
    return datasets.concatenate_datasets([part.with_format(None) for part in parts]).with_transform(transform)


def gather_repeated(arguments: Sequence[str], flag: str) -> list[str]:
    """`--lora a --lora b` as `--lora a b`: argparse would keep the last one only."""
    others: list[str] = []
    values: list[str] = []
    inside = False
    for argument in arguments:
        if argument == flag:
            inside = True
        elif argument.startswith(f"{flag}="):
            inside = False
            values.append(argument.partition("=")[2])
        elif inside and not argument.startswith("--"):
            values.append(argument)
        else:
            inside = False
            others.append(argument)
    return [*others, flag, *values] if values else [*others, *([flag] if flag in arguments else [])]


def digest(file: Path) -> str:
    """A short digest of a file's bytes."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()[:16]
