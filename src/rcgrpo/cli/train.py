"""`rcgrpo train`: the main job. Train, then report before and after on held-out edits."""

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..inputs.extras import require
from .parsing import (
    MINI,
    TINY,
    UsageError,
    check_folder,
    free_folder,
    given,
    one_of,
    parse,
    use_embedded_model,
)

if TYPE_CHECKING:
    from ..training.config import RCGRPOConfig
    from ..training.trainer import RCGRPOTrainer

COLUMNS = {"input_image": "image_column", "instruction": "prompt_column", "mask": "mask_column"}
"""Fields of the configuration that name the columns of a data set that is not canonical."""


@dataclass
class ScriptArguments:
    """What to train on what, for `rcgrpo train`."""

    model: str = field(default=TINY, metadata={"help": f"{TINY} (embedded), or a Hub id or folder of an editor."})
    dataset: str = field(default=MINI, metadata={"help": f"{MINI} (embedded), or a Hub id, folder or file."})
    preset: str | None = field(
        default=None,
        metadata={"help": "The data set's columns and masks, e.g. compbench; a known Hub id has its own."},
    )
    masks: str | None = field(
        default=None, metadata={"help": "Folder of `rcgrpo data masks`, for rows without a mask; others are left out."}
    )
    allow_outside: bool = field(
        default=False,
        metadata={"help": "Let rows name files outside the data set's own folder; if you trust it."},
    )
    held_out: float = field(
        default=0.0, metadata={"help": "Share of the groups (videos) kept from training, for the report on them."}
    )
    train_split: str = field(default="train", metadata={"help": "Split to train on."})
    eval_split: str | None = field(
        default=None,
        metadata={"help": "Held-out split: test, or what --held_out keeps from training; an empty string for none."},
    )
    num_train_samples: int | None = field(default=None, metadata={"help": "Use this many training rows."})
    num_eval_samples: int | None = field(default=None, metadata={"help": "Use this many held-out rows."})
    train_tasks: list[str] | None = field(
        default=None,
        metadata={
            "help": f"Tasks of {MINI} that take turns in training; one that is named twice comes twice as often."
        },
    )
    reward_funcs: list[str] = field(
        default_factory=lambda: ["compbench_mini"],
        metadata={"help": "Registered rewards or dotted paths to callables; see `rcgrpo rewards`."},
    )
    judge_on_server: bool = field(
        default=False,
        metadata={"help": "Insist on a judge at RCGRPO_JUDGE_URL, where otherwise one is loaded in this process."},
    )
    init_lora: str | None = field(
        default=None,
        metadata={
            "help": "A LoRA to go on training: folder, file or Hub id. Its rank, alpha and layers are kept, and "
            "'before' in the report is the model with it."
        },
    )
    use_peft: bool = field(default=True, metadata={"help": "Train a LoRA; false trains the whole transformer."})
    dtype: str | None = field(
        default=None, metadata={"help": "Open the model in it, e.g. bfloat16; torch_dtype of model_init_kwargs."}
    )
    load_in_4bit: bool = field(
        default=False, metadata={"help": "Quantize the transformer to NF4, which takes bitsandbytes and a GPU."}
    )
    load_in_8bit: bool = field(default=False, metadata={"help": "Quantize it to 8 bits, likewise."})
    lora_r: int = field(default=32, metadata={"help": "Rank of the LoRA."})
    lora_alpha: int = field(default=64, metadata={"help": "Scale of the LoRA."})
    lora_target_modules: list[str] | None = field(
        default=None,
        metadata={"help": "Layers that get a LoRA; by default attention and feed-forward of every block."},
    )


def fold_in(script: ScriptArguments, config: "RCGRPOConfig") -> None:
    """TRL's short flags of a model, as `model_init_kwargs` has them.

    Raises:
        UsageError: two ways to say one thing, or a quantized base that is to be trained itself.
    """
    quantized = [name for name in ("load_in_4bit", "load_in_8bit") if getattr(script, name)]
    if quantized and not script.use_peft:
        raise UsageError(f"--use_peft: got false with --{quantized[0]}, expected true: what is quantized stays frozen")
    if len(quantized) > 1:
        raise UsageError("--load_in_8bit: got true with --load_in_4bit, expected one of them")
    if script.init_lora is not None and not script.use_peft:
        raise UsageError("--use_peft: got false with --init_lora, expected true to go on training that LoRA")
    short: dict[str, Any] = {}
    if script.dtype is not None:
        short["torch_dtype"] = script.dtype
    for name in quantized:
        bits = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "bfloat16"} if "4" in name else {}
        short["quantization_config"] = {
            "quant_backend": f"bitsandbytes_{name.removeprefix('load_in_')}",
            "quant_kwargs": {name: True, **bits},
            "components_to_quantize": ["transformer"],
        }
    given: Any = config.model_init_kwargs or {}
    for key in short.keys() & {*given, *(["torch_dtype"] if "dtype" in given else [])}:
        raise UsageError(f"model_init_kwargs: got {key} beside --dtype or --load_in_..., expected it in one place")
    if short:
        config.model_init_kwargs = {**given, **short}


def settle_splits(script: ScriptArguments) -> None:
    """Fill in the held-out split; refuse one whose rows would be trained on, and what the embedded data do not take.

    Raises:
        UsageError: naming the flag, and how to hold rows out.
    """
    from ..data.loading import HELD_OUT, parse_split
    from ..data.opening import is_one_table

    ways = '--held_out 0.1 to keep a tenth of the groups for the report, or --eval_split "" for no report'
    if script.dataset == MINI:
        if script.held_out:
            raise UsageError(
                f"--held_out: got {script.held_out}, expected 0 on {MINI}, whose test split is held out already"
            )
        if script.masks is not None:
            raise UsageError(f"--masks: got {script.masks}, expected none on {MINI}, whose rows have masks")
        if script.preset is not None:
            raise UsageError(f"--preset: got {script.preset!r}, expected none on {MINI}, whose columns are canonical")
        for flag in ("train_split", "eval_split"):
            one_of(script, flag, ("train", "test", "") if flag == "eval_split" else ("train", "test"))
    elif script.eval_split is None and not script.held_out and is_one_table(script.dataset):
        raise UsageError(f"--eval_split: got none for {script.dataset}, a table without a test split; pass {ways}")
    if script.eval_split is None:
        script.eval_split = f"{script.train_split}:{HELD_OUT}" if script.held_out else "test"
    if not script.eval_split:
        return
    (train, of_train), (held, of_held) = (
        parse_split(split, script.held_out) for split in (script.train_split, script.eval_split)
    )
    apart = "[" in train and "[" in held and train != held  # two slices are taken at their word
    if train.partition("[")[0] == held.partition("[")[0] and of_train == of_held and not apart:
        raise UsageError(
            f"--eval_split: got {script.eval_split!r}, expected other rows than --train_split {script.train_split} "
            f"trains on; pass {ways}"
        )


def load_model(script: ScriptArguments, config: "RCGRPOConfig", named: Collection[str]) -> Any:
    """What to train: the model's name, or its pipeline with the LoRA to go on with; `script` then has the layers.

    Args:
        named: the flags and keys that somebody set.

    Raises:
        UsageError: the LoRA does not fit the model, or has another rank, alpha or layers than were asked for.
    """
    from ..tiny import WEIGHTS
    from .opening import editor_of

    model = str(WEIGHTS) if script.model == TINY else script.model
    if script.lora_target_modules is None:
        script.lora_target_modules = list(editor_of(model)[0].lora_targets)
    if script.init_lora is None:
        return model
    from ..editors.lora import load_lora
    from ..training.adapters import describe
    from ..training.model import load_pipeline

    pipeline = load_pipeline(model, config.model_init_kwargs)  # type: ignore[arg-type]
    config.model_init_kwargs = None  # they have had their effect
    try:
        load_lora(pipeline, script.init_lora, "default", "--init_lora")
    except ValueError as error:
        raise UsageError(str(error)) from error
    own = describe(pipeline.transformer, script.lora_target_modules)
    for name, value in own.items():
        asked = getattr(script, name)
        if name in named and value != asked:
            raise UsageError(
                f"--{name}: got {asked}, expected {value}, which --init_lora {script.init_lora} has; leave it out, or "
                "set it to that"
            )
        setattr(script, name, value)
    return pipeline


def load_rows(script: ScriptArguments, config: "RCGRPOConfig") -> tuple[Any, Any]:
    """Training and held-out rows. Columns that the configuration names have their canonical names afterwards."""
    if script.dataset == MINI:
        from ..data import compbench_mini
        from ..data.scenes import TASKS

        try:
            tasks = TASKS if script.train_tasks is None else script.train_tasks
            train = compbench_mini(script.train_split, script.num_train_samples or 2048, tasks=tasks)
        except ValueError as error:
            raise UsageError(f"--train_{error}") from error
        return train, compbench_mini(script.eval_split, script.num_eval_samples or 192) if script.eval_split else None
    if script.train_tasks is not None:
        raise UsageError(f"--train_tasks: got {script.train_tasks}, expected none with --dataset {script.dataset}")
    from ..data import load_edit_dataset

    columns = {}
    for canonical, name in COLUMNS.items():
        if getattr(config, name) != canonical:
            columns[canonical] = getattr(config, name)
            setattr(config, name, canonical)

    def load(split: str | None, count: int | None) -> Any:
        if not split:
            return None
        # A row without a mask has no region to constrain to.
        rows = load_edit_dataset(
            script.dataset,
            script.preset,
            split,
            columns=columns,
            held_out=script.held_out,
            on_missing="drop",
            masks=script.masks,
            allow_outside=script.allow_outside,
        )
        if count is None or count >= len(rows):
            return rows
        return rows.select([i * len(rows) // count for i in range(count)])  # evenly, as rows are often sorted by task

    return load(script.train_split, script.num_train_samples), load(script.eval_split, script.num_eval_samples)


def fill_in(config: "RCGRPOConfig", named: Collection[str]) -> None:
    """The embedded model's own size and text length where nobody named another."""
    from .opening import call_defaults

    for name in ("resolution", "max_sequence_length"):
        if name not in named:
            setattr(config, name, call_defaults(TINY)[name])


def settle_resume(config: "RCGRPOConfig") -> str | bool | None:
    """What `Trainer.train` takes: a checkpoint's folder, True for the newest whole one, or None to start anew.

    Raises:
        UsageError: there is no such checkpoint, or there are checkpoints and nobody said to go on from them.
    """
    from ..training.checkpoints import newest_whole, require_whole

    folder, asked = Path(config.output_dir), str(config.resume_from_checkpoint)
    if asked.lower() == "true":
        return True  # where there is none yet, the first call of a job script begins
    if asked.lower() not in ("none", "false", ""):
        try:
            require_whole(asked)
        except ValueError as error:
            raise UsageError(f"--{error}") from error
        return asked
    config.resume_from_checkpoint = None
    newest, broken = newest_whole(folder)
    if newest is not None:
        raise UsageError(
            f"--output_dir: {folder} holds {newest.name} of an earlier run, expected a new folder; name another, or "
            "pass --resume_from_checkpoint true to go on"
        )
    for name, wrong in broken.items():
        print(f"{folder} holds {name} of an earlier run, which cannot be gone on from ({wrong}): starting anew")
    return None


def make_trainer(script: ScriptArguments, config: "RCGRPOConfig", named: Collection[str]) -> "RCGRPOTrainer":
    """The trainer of a job whose splits are settled.

    Args:
        named: the flags and keys that somebody set.
    """
    from peft import LoraConfig

    from ..training.trainer import RCGRPOTrainer
    from .opening import check_loras, check_ready

    check_ready(script.model, script.reward_funcs, script.judge_on_server)
    check_loras(script.model, [] if script.init_lora is None else [script.init_lora], "--init_lora")
    train_rows, eval_rows = load_rows(script, config)
    model = load_model(script, config, named)
    new_lora = LoraConfig(r=script.lora_r, lora_alpha=script.lora_alpha, target_modules=script.lora_target_modules)
    return RCGRPOTrainer(
        model=model,
        reward_funcs=list(script.reward_funcs),
        args=config,
        train_dataset=train_rows,
        eval_dataset=eval_rows,
        peft_config=None if script.init_lora is not None or not script.use_peft else new_lora,
    )


def run(arguments: Sequence[str]) -> None:
    """`rcgrpo train`: train, then report before and after on held-out edits."""
    own_job = not any(a.split("=")[0] in ("--model", "--dataset", "--config") for a in arguments)
    recipe = str(files("rcgrpo") / "recipes" / "tiny.yaml") if own_job else None
    if not any(a.split("=")[0] in ("--output_dir", "--config") for a in arguments):
        arguments = [*arguments, "--output_dir", free_folder("rcgrpo-output")]
    from ..training.config import RCGRPOConfig

    script, config = parse((ScriptArguments, RCGRPOConfig), arguments, recipe, "rcgrpo train")
    fold_in(script, config)
    folder = Path(config.output_dir)
    check_folder("output_dir", folder)
    resume = settle_resume(config)
    settle_splits(script)
    if script.eval_split:
        require("tiny" if script.dataset == MINI else "report", "the report on held-out edits")
    loras = [] if script.init_lora is None else [script.init_lora]
    if script.model == TINY:
        use_embedded_model(loras)
        fill_in(config, given(arguments, recipe))
    from ..data.edits import EditRows
    from ..editors.opening import stock_name
    from ..evaluation.held_out import judge_held_out, write_report
    from ..reporting.statistics import markdown_table

    trainer = make_trainer(script, config, given(arguments))
    _announce(trainer, script)
    held_out = trainer.eval_dataset if isinstance(trainer.eval_dataset, EditRows) else None
    main_process = trainer.is_world_process_zero()
    # The model as the run starts from it, with --init_lora if given, also when it goes on from a checkpoint.
    before = judge_held_out(trainer, held_out, "held-out edits before") if held_out else []
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model()  # before anything that may still fail, such as a judge
    if held_out:
        after = judge_held_out(trainer, held_out, "held-out edits after")
        if main_process:
            settings = {"script": asdict(script), **trainer.card_settings()}
            rows = write_report(folder, before, after, trainer.state.log_history, settings)
            print(
                f"\nHeld-out edits, {len(after)} of them, the same noise before and after:\n\n{markdown_table(rows)}\n"
            )
    trainer.create_model_card(dataset_name=script.dataset)  # with the report, if there is one
    if config.push_to_hub:
        trainer.push_to_hub(dataset_name=script.dataset)
    elif main_process:
        pictures = ("reward_curves.png", "learning_curve.png", "samples/contact_sheet.png")
        report = ("metrics.json", *pictures) if held_out else ()
        trained = "LoRA" if script.use_peft else "transformer"
        print(
            f"Written to {folder}: {', '.join([trained, 'model card', *(f for f in report if (folder / f).exists())])}"
        )
        if script.use_peft:
            name = stock_name(trainer.pipeline)
            print(f'Use it: pipe = {name}.from_pretrained(...); pipe.load_lora_weights("{folder}")')
    trainer.close()


def _announce(trainer: "RCGRPOTrainer", script: ScriptArguments) -> None:
    if not trainer.is_world_process_zero():
        return
    args = trainer.args
    start = "" if script.init_lora is None else f" with {script.init_lora}"
    trainable = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    print(
        f"rcgrpo {__version__}: {script.model}{start} on {script.dataset}, "
        f"{trainable / 1e6:.2f} M trainable parameters, "
        f"{trainer.accelerator.device}\n"
        f"each step: {args.per_device_train_batch_size * args.gradient_accumulation_steps} edits × "
        f"{args.num_generations} candidates × {args.num_inference_steps} ODE steps, rewards "
        f"{', '.join(reward.name for reward in trainer.rewards)}\n"
        f"results go to {args.output_dir}"
    )
