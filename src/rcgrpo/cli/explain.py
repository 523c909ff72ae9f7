"""`rcgrpo explain`: the picture of one update, for one edit of a data set and the settings of a run."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.resources import files
from pathlib import Path

from .. import __version__
from ..inputs.extras import require
from .parsing import MINI, TINY, UsageError, check_folder, free_folder, given, parse, use_embedded_model

PROGRAM = "rcgrpo explain"


@dataclass
class ExplainArguments:
    """Which edit; everything else is as for `rcgrpo train`."""

    edit: int = field(default=0, metadata={"help": "Row of --train_split, from 0."})
    lora: str | None = field(
        default=None, metadata={"help": "Look at an update of this LoRA, as --init_lora: folder, file or Hub id."}
    )


def run(arguments: Sequence[str]) -> None:
    """`rcgrpo explain`: roll out one group as training would, update on it, draw what happened, forget the update."""
    from .train import ScriptArguments, fill_in, fold_in, make_trainer

    own_job = not any(a.split("=")[0] in ("--model", "--dataset", "--config") for a in arguments)
    recipe = str(files("rcgrpo") / "recipes" / "tiny-groups.yaml") if own_job else None
    if not any(a.split("=")[0] in ("--output_dir", "--config") for a in arguments):
        arguments = [*arguments, "--output_dir", free_folder("rcgrpo-update")]
    from ..training.config import RCGRPOConfig

    which, script, config = parse((ExplainArguments, ScriptArguments, RCGRPOConfig), arguments, recipe, PROGRAM)
    fold_in(script, config)
    if which.lora is not None and script.init_lora is not None:
        raise UsageError(f"--lora: got {which.lora} beside --init_lora {script.init_lora}, expected one of them")
    if config.world_size > 1:
        raise UsageError(f"WORLD_SIZE: got {config.world_size} processes, expected one for {PROGRAM}")
    check_folder("output_dir", config.output_dir)
    require("report", PROGRAM)
    script.init_lora = script.init_lora or which.lora
    if script.model == TINY:
        use_embedded_model([] if script.init_lora is None else [script.init_lora])
        fill_in(config, given(arguments, recipe))
    # One edit is all that this looks at: no other is checked, none is evaluated, nothing leaves.
    script.eval_split, config.report_to, config.check_rows = "", [], 0
    config.eval_strategy, config.load_best_model_at_end, config.save_strategy = "no", False, "no"
    config.push_to_hub, config.log_completions_hub_repo = False, None
    config.per_device_train_batch_size = config.gradient_accumulation_steps = 1
    script.num_train_samples = which.edit + 1 if script.dataset == MINI else script.num_train_samples
    from ..evaluation.one_update import explain_update, write_update

    trainer = make_trainer(script, config, given(arguments, recipe))
    rows = len(trainer.train_dataset)
    if which.edit >= rows:
        raise UsageError(f"--edit: got {which.edit}, expected 0 to {rows - 1}, the rows of {script.train_split}")
    model = script.init_lora or script.model
    print(f"rcgrpo {__version__}: one update of {model} on row {which.edit} of {script.dataset}")
    update = explain_update(trainer, trainer.train_dataset.edit(which.edit))
    settings = {**asdict(which), "script": asdict(script), **trainer.card_settings()}
    text = write_update(Path(config.output_dir), update, settings)
    trainer.close()
    print(f"\n{text}\nWritten to {config.output_dir}: update.png, update.md, update.json")
