"""The command line: `rcgrpo train` (the main job) and `rcgrpo edit` (one picture).

Flags and YAML come from dataclasses through TRL's parser. A key that nobody knows is an error, never a default.
"""

import argparse
import difflib
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import __version__

if TYPE_CHECKING:
    from .trainer import RCGRPOTrainer

TINY = "kontext-tiny"
MINI = "compbench-mini"
LORA_TARGETS = [
    "attn.to_q",
    "attn.to_k",
    "attn.to_v",
    "attn.to_out.0",
    "attn.add_q_proj",
    "attn.add_k_proj",
    "attn.add_v_proj",
    "attn.to_add_out",
    "ff.net.0.proj",
    "ff.net.2",
    "ff_context.net.0.proj",
    "ff_context.net.2",
    "proj_mlp",
    "proj_out",
]
"""Every linear layer of FLUX's blocks, and the model's last layer, which shares a name with theirs."""


@dataclass
class ScriptArguments:
    """What to train on what, for `rcgrpo train`."""

    model: str = field(default=TINY, metadata={"help": f"{TINY} (embedded), or a Hub id or folder of a Kontext model."})
    dataset: str = field(default=MINI, metadata={"help": f"{MINI} (embedded), or what `datasets.load_dataset` opens."})
    train_split: str = field(default="train", metadata={"help": "Split to train on."})
    eval_split: str = field(default="test", metadata={"help": "Held-out split; an empty string for none."})
    num_train_samples: int | None = field(default=None, metadata={"help": "Use this many training rows."})
    num_eval_samples: int | None = field(default=None, metadata={"help": "Use this many held-out rows."})
    reward_funcs: list[str] = field(
        default_factory=lambda: ["compbench_mini"],
        metadata={"help": "Registered rewards or dotted paths to callables; see `rcgrpo rewards`."},
    )
    lora_r: int = field(default=32, metadata={"help": "Rank of the LoRA."})
    lora_alpha: int = field(default=64, metadata={"help": "Scale of the LoRA."})
    lora_target_modules: list[str] = field(
        default_factory=lambda: list(LORA_TARGETS), metadata={"help": "Layers that get a LoRA."}
    )


@dataclass
class EditArguments:
    """One edit, for `rcgrpo edit`."""

    image: str = field(metadata={"help": "The picture to edit."})
    instruction: str = field(metadata={"help": "What to do, e.g. 'remove the apple'."})
    mask: str | None = field(default=None, metadata={"help": "Where: a picture of the same size, white = edit."})
    lora: str | None = field(default=None, metadata={"help": "A LoRA: folder, file or Hub id."})
    model: str = field(default=TINY, metadata={"help": f"{TINY} (embedded), or a Hub id or folder of a Kontext model."})
    output: str = field(default="edited.png", metadata={"help": "Where to write the result."})
    num_candidates: int = field(default=1, metadata={"help": "Candidates, side by side in the result."})
    edit_strength: float = field(default=0.5, metadata={"help": "How much candidates differ inside the mask."})
    resolution: int | None = field(default=None, metadata={"help": "Side of the result; the model's own by default."})
    num_inference_steps: int | None = field(default=None, metadata={"help": "ODE steps; 8 for the tiny model."})
    guidance_scale: float = field(default=3.5, metadata={"help": "Distilled guidance."})
    seed: int = field(default=0, metadata={"help": "Seed of the noise."})


class UsageError(Exception):
    """Something that the user typed; printed without a traceback."""


def parse(
    classes: Sequence[type], arguments: Sequence[str], default_config: str | None, program: str
) -> tuple[Any, ...]:
    """Dataclasses from flags and `--config file.yaml`, strictly.

    Raises:
        UsageError: an unknown key or flag, with the nearest known one; a config file that cannot be read.
    """
    import yaml
    from trl import TrlParser

    # TRL's parser knows `--config file` alone.
    arguments = [part for a in arguments for part in (a.split("=", 1) if a.startswith("--config=") else [a])]
    known = {f.name for cls in classes for f in fields(cls) if f.init}
    if default_config is not None and "--config" not in arguments:
        arguments = ["--config", default_config, *arguments]
    if "--config" in arguments:
        where = arguments.index("--config") + 1
        if where >= len(arguments):
            raise UsageError("--config: got nothing, expected a YAML file")
        path = Path(arguments[where])
        try:
            config = yaml.safe_load(path.read_text())
        except (OSError, yaml.YAMLError) as error:
            raise UsageError(f"--config: got {str(path)!r}, expected a readable YAML file ({error})") from error
        if not isinstance(config, dict):
            raise UsageError(f"--config: {path} holds {type(config).__name__}, expected `key: value` lines")
        for key in config.keys() - known - {"env"}:
            raise UsageError(_unknown(f"{path}: unknown key {key!r}", key, known))
    for argument in arguments:
        flag = argument.split("=", 1)[0]
        name = flag.removeprefix("--").replace("-", "_")
        if flag.startswith("--") and name not in {*known, "config", "help"} and name.removeprefix("no_") not in known:
            raise UsageError(_unknown(f"unknown flag {flag!r}", name, known, "--"))
    parser = TrlParser(classes, prog=program, allow_abbrev=False)
    return parser.parse_args_and_config(arguments)


def _unknown(what: str, name: str, known: set[str], prefix: str = "") -> str:
    nearest = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.0)[0]
    return f"{what}; the nearest known one is {prefix}{nearest!s}"


def _use_embedded_model() -> None:
    """No network, and no warnings about the 16 tokens that the tiny model reads."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import diffusers
    import transformers

    diffusers.utils.logging.set_verbosity_error()
    transformers.utils.logging.set_verbosity_error()


# ---------------------------------------------------------------------------------------------- train


def free_folder(name: str) -> str:
    """`name`, or `name-2`, `name-3`, ... if earlier runs hold it."""
    candidates = (name if i == 1 else f"{name}-{i}" for i in range(1, sys.maxsize))
    return next(folder for folder in candidates if not Path(folder).exists())


def load_rows(script: ScriptArguments) -> tuple[Any, Any]:
    """Training and held-out rows."""
    if script.dataset == MINI:
        from .data import compbench_mini

        train = compbench_mini("train", script.num_train_samples or 2048)
        return train, compbench_mini("test", script.num_eval_samples or 192) if script.eval_split else None
    import datasets

    splits = []
    for split, count in ((script.train_split, script.num_train_samples), (script.eval_split, script.num_eval_samples)):
        rows = datasets.load_dataset(script.dataset, split=split) if split else None
        splits.append(rows if rows is None or count is None else rows.select(range(min(count, len(rows)))))
    return splits[0], splits[1]


def train(arguments: Sequence[str]) -> None:
    """`rcgrpo train`: train, then report before and after on held-out edits."""
    own_job = not any(a.split("=")[0] in ("--model", "--dataset", "--config") for a in arguments)
    recipe = str(files("rcgrpo") / "recipes" / "tiny.yaml") if own_job else None
    if not any(a.split("=")[0] in ("--output_dir", "--config") for a in arguments):
        arguments = [*arguments, "--output_dir", free_folder("rcgrpo-output")]
    from .config import RCGRPOConfig

    script, config = parse((ScriptArguments, RCGRPOConfig), arguments, recipe, "rcgrpo train")
    if script.model == TINY:
        _use_embedded_model()
    from peft import LoraConfig

    from .data.edits import EditRows
    from .evaluation import roll_out_held_out, write_report
    from .report import markdown_table
    from .tiny import WEIGHTS
    from .trainer import RCGRPOTrainer

    folder = Path(config.output_dir)
    earlier = sorted(folder.glob("checkpoint-*"))
    if earlier and not config.resume_from_checkpoint:
        raise UsageError(
            f"--output_dir: {folder} holds {earlier[-1].name} of an earlier run, expected a new folder; name another, "
            "or pass --resume_from_checkpoint true to go on"
        )
    train_rows, eval_rows = load_rows(script)
    trainer = RCGRPOTrainer(
        model=str(WEIGHTS) if script.model == TINY else script.model,
        reward_funcs=list(script.reward_funcs),
        args=config,
        train_dataset=train_rows,
        eval_dataset=eval_rows,
        peft_config=LoraConfig(
            r=script.lora_r, lora_alpha=script.lora_alpha, target_modules=list(script.lora_target_modules)
        ),
    )
    _announce(trainer, script)
    held_out = trainer.eval_dataset if isinstance(trainer.eval_dataset, EditRows) else None
    main_process = trainer.is_world_process_zero()
    edits = [] if held_out is None or not main_process else [held_out.edit(i) for i in range(len(held_out))]
    before = []
    if edits:
        # The reference is the base itself, also when a run goes on from a checkpoint.
        before = roll_out_held_out(trainer, edits, "held-out edits before")
    resume = config.resume_from_checkpoint
    trainer.train(resume_from_checkpoint=True if str(resume).lower() == "true" else resume)
    if edits:
        after = roll_out_held_out(trainer, edits, "held-out edits after")
        names = [reward.name for reward in trainer.rewards]
        settings = {"script": asdict(script), **trainer.card_settings()}
        rows = write_report(folder, before, after, names, trainer.state.log_history, settings)
        print(f"\nHeld-out edits, {len(edits)} of them, the same noise before and after:\n\n{markdown_table(rows)}\n")
    trainer.save_model()
    if config.push_to_hub:
        trainer.push_to_hub(dataset_name=script.dataset)
    elif main_process:
        print(f"Written to {folder}: LoRA, model card, metrics.json, reward_curves.png, samples/contact_sheet.png")
        print(f'Use it: FluxKontextPipeline.from_pretrained(...).load_lora_weights("{folder}")')


def _announce(trainer: "RCGRPOTrainer", script: ScriptArguments) -> None:
    from .log import ReadableLog

    ReadableLog.install(trainer)
    if not trainer.is_world_process_zero():
        return
    args = trainer.args
    trainable = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    print(
        f"rcgrpo {__version__}: {script.model} on {script.dataset}, {trainable / 1e6:.2f} M trainable parameters, "
        f"{trainer.accelerator.device}\n"
        f"each step: {args.per_device_train_batch_size * args.gradient_accumulation_steps} edits × "
        f"{args.num_generations} candidates × {args.num_inference_steps} ODE steps, rewards "
        f"{', '.join(reward.name for reward in trainer.rewards)}\n"
        f"results go to {args.output_dir}"
    )


# ---------------------------------------------------------------------------------------------- edit


def edit(arguments: Sequence[str]) -> None:
    """`rcgrpo edit`: one picture."""
    (args,) = parse((EditArguments,), arguments, None, "rcgrpo edit")
    if args.model == TINY:
        _use_embedded_model()
    import torch
    from PIL import Image

    from .data.edits import decode_picture
    from .pipeline import RegionDecoupledFluxKontextPipeline
    from .report import write_atomically
    from .tiny import CALL, WEIGHTS

    source = decode_picture(Path(args.image), "--image").convert("RGB")
    mask = None if args.mask is None else decode_picture(Path(args.mask), "--mask").convert("L")
    if args.num_candidates < 1:
        raise UsageError(f"--num_candidates: got {args.num_candidates}, expected at least 1")
    tiny = args.model == TINY
    pipe = RegionDecoupledFluxKontextPipeline.from_pretrained(
        str(WEIGHTS) if tiny else args.model, torch_dtype=torch.float32 if tiny else torch.bfloat16
    )
    if torch.cuda.is_available():
        pipe.to("cuda")
    if args.lora is not None:
        pipe.load_lora_weights(args.lora)
    call: dict[str, Any] = dict(CALL) if tiny else {}
    if tiny:
        args.instruction = args.instruction.lower().strip(" .!")  # its vocabulary is the data set's
        source = source.resize((CALL["width"], CALL["height"]), Image.Resampling.LANCZOS)
        mask = None if mask is None else mask.resize(source.size, Image.Resampling.NEAREST)
    if args.resolution is not None:
        side = args.resolution
        call |= {"height": side, "width": side, "max_area": side * side}
    if args.num_inference_steps is not None:
        call["num_inference_steps"] = args.num_inference_steps
    images = pipe(
        image=source,
        prompt=args.instruction,
        mask_image=mask,
        **({} if mask is None else {"edit_strength": args.edit_strength}),
        num_images_per_prompt=args.num_candidates,
        guidance_scale=args.guidance_scale,
        generator=torch.Generator().manual_seed(args.seed),
        **call,
    ).images
    strip = Image.new("RGB", (sum(image.width for image in images), images[0].height))
    for i, image in enumerate(images):
        strip.paste(image, (i * image.width, 0))
    with write_atomically(Path(args.output)) as path:
        strip.save(path)
    print(f"Written: {args.output} ({len(images)} candidate{'s' if len(images) > 1 else ''})")


# ---------------------------------------------------------------------------------------------- main


def rewards(arguments: Sequence[str]) -> None:
    """`rcgrpo rewards`: the registered rewards and the columns that they read."""
    if arguments:
        raise UsageError(f"rcgrpo rewards takes no arguments, got {' '.join(arguments)}")
    from .rewards import available_rewards, resolve_rewards

    for name in available_rewards():
        reward = resolve_rewards(name)[0]
        text = (reward.function.__doc__ or "").strip().splitlines()
        print(f"{name:26} columns: {', '.join(reward.columns) or '-':30} {text[0] if text else ''}")


COMMANDS = {"train": train, "edit": edit, "rewards": rewards}


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the `rcgrpo` command."""
    parser = argparse.ArgumentParser(
        prog="rcgrpo", description="Region-constrained GRPO for instruction-guided image editors."
    )
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument(
        "command",
        choices=COMMANDS,
        help="; ".join(f"{n}: {(f.__doc__ or '').split(': ')[1].strip()}" for n, f in COMMANDS.items()),
    )
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="see `rcgrpo COMMAND --help`")
    given = parser.parse_args(argv)
    try:
        COMMANDS[given.command](given.arguments)
    except (UsageError, ValueError, TypeError, FileNotFoundError) as error:
        if os.environ.get("RCGRPO_TRACEBACK"):
            raise
        # What the user typed needs no trace; anything else may have come from deeper down.
        hint = "" if isinstance(error, UsageError) else "\n(RCGRPO_TRACEBACK=1 shows where this comes from)"
        sys.exit(f"rcgrpo {given.command}: {error}{hint}")


if __name__ == "__main__":
    main()
