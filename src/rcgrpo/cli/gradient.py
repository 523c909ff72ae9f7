"""`rcgrpo diagnose --gradient`: the signal-to-noise ratio of a training configuration's gradient, in minutes."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.resources import files
from pathlib import Path

from .. import __version__
from .parsing import TINY, UsageError, check_folder, free_folder, given, parse, use_embedded_model

PROGRAM = "rcgrpo diagnose --gradient"


@dataclass
class GradientArguments:
    """How much of a gradient to look at; everything else is as for `rcgrpo train`."""

    num_samples: int = field(
        default=24, metadata={"help": "Training edits, at least 2; about 100 groups tell a ratio of .01 from 0."}
    )
    num_draws: int = field(default=3, metadata={"help": "Groups of each edit, from other noise, at least 2."})


def run(arguments: Sequence[str]) -> None:
    """Measure what one group teaches, on the model that `rcgrpo train` with these arguments would begin with."""
    from .train import ScriptArguments, fill_in, make_trainer

    own_job = not any(a.split("=")[0] in ("--model", "--dataset", "--config") for a in arguments)
    recipe = str(files("rcgrpo") / "recipes" / "tiny.yaml") if own_job else None
    if not any(a.split("=")[0] in ("--output_dir", "--config") for a in arguments):
        arguments = [*arguments, "--output_dir", free_folder("rcgrpo-gradient")]
    from ..training.config import RCGRPOConfig

    size, script, config = parse((GradientArguments, ScriptArguments, RCGRPOConfig), arguments, recipe, PROGRAM)
    for name in ("num_samples", "num_draws"):
        if getattr(size, name) < 2:
            raise UsageError(f"--{name}: got {getattr(size, name)}, expected at least 2, to tell noise apart")
    if config.world_size > 1:
        raise UsageError(f"WORLD_SIZE: got {config.world_size} processes, expected one for {PROGRAM}")
    check_folder("output_dir", config.output_dir)
    if script.model == TINY:
        use_embedded_model([] if script.init_lora is None else [script.init_lora])
        fill_in(config, given(arguments, recipe))
    script.eval_split, config.report_to = "", []
    config.eval_strategy, config.load_best_model_at_end = "no", False
    config.push_to_hub, config.log_completions_hub_repo = False, None
    least = config.per_device_train_batch_size * config.gradient_accumulation_steps  # what the trainer asks for
    script.num_train_samples = max(size.num_samples, least)
    from ..evaluation.gradient_noise import measure_gradients, write_gradients

    trainer = make_trainer(script, config, given(arguments, recipe))
    count = min(size.num_samples, len(trainer.train_dataset))
    print(
        f"rcgrpo {__version__}: {script.init_lora or script.model} on {count} edits of {script.dataset} × "
        f"{size.num_draws} groups of {config.num_generations} candidates"
    )
    edits = [trainer.train_dataset.edit(row) for row in range(count)]
    measured = measure_gradients(trainer, edits, size.num_draws)
    settings = {"rcgrpo": __version__, **asdict(size), "script": asdict(script), **trainer.card_settings()}
    text = write_gradients(Path(config.output_dir), measured, settings)
    print(f"\n{text}\nWritten to {config.output_dir}: gradient.json, gradient.md")
