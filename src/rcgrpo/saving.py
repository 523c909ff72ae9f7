"""What a run leaves on disk: checkpoints to go on from, the LoRA in diffusers' format, the model card, the Hub.

The trainer's base class; it knows nothing of groups and rewards beyond the rewards' names for the card.
"""

import dataclasses
import json
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl.trainer.base_trainer import _BaseTrainer

from .hub import LORA_FILE, model_card, save_lora
from .models import base_model_name
from .pipeline import RegionDecoupledFluxKontextPipeline
from .rewards import Reward, failing_together, is_agreed

logger = logging.getLogger(__name__)


class SavingTrainer(_BaseTrainer):
    """TRL's base trainer that saves a diffusers LoRA (or transformer) and a card, and saves before it stops."""

    pipeline: RegionDecoupledFluxKontextPipeline
    rewards: list[Reward]

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:  # type: ignore[override]
        """As `Trainer.train`; stopping after a new update, on all processes alike, saves what was trained first."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = self._last_complete_checkpoint()
        # Until the first new update there is nothing to save: not while resuming, nor what an earlier call left.
        self._last_saved = self.state.global_step = self._step_of(resume_from_checkpoint)
        if resume_from_checkpoint:
            self._warn_in_mid_cycle(Path(resume_from_checkpoint), self._last_saved)
        try:
            return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        except BaseException as error:
            # Saving takes every process. Where one failed alone, the others wait elsewhere; its end is theirs.
            together = self.accelerator.num_processes == 1 or is_agreed(error)
            if together and self.state.global_step > self._last_saved:
                logger.error("%s: saving checkpoint-%d before stopping", type(error).__name__, self.state.global_step)
                try:
                    self._save_checkpoint(self.model, trial=None)
                except FloatingPointError as refused:
                    logger.error("%s", refused)
            raise

    def close(self) -> None:
        """Take the process group of a launch down, at the end of a script; without one nothing happens.

        A process that leaves with gloo's threads at work may abort on its way out. The wrapped model goes first, as it
        keeps the group and its threads alive.
        """
        self.model_wrapped = self.model
        self.accelerator.free_memory()
        self.accelerator.end_training()

    @staticmethod
    def _step_of(checkpoint: str | bool | None) -> int:
        """The updates that a checkpoint has behind it; 0 without one, or where the Trainer will say what is missing."""
        file = Path(checkpoint, TRAINER_STATE_NAME) if isinstance(checkpoint, str | Path) else None
        return int(json.loads(file.read_text())["global_step"]) if file and file.exists() else 0

    @staticmethod
    def _complete_checkpoints(folder: Path) -> dict[int, Path]:
        """The checkpoints in a folder that were written to their end, by step; the state file is written last."""
        found = {f.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-"): f for f in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*")}
        return {int(n): f for n, f in found.items() if n.isdigit() and (f / TRAINER_STATE_NAME).exists()}

    def _last_complete_checkpoint(self) -> str:
        complete = self._complete_checkpoints(Path(self.args.output_dir))
        if not complete:
            raise ValueError(
                f"resume_from_checkpoint: found no complete checkpoint in {self.args.output_dir!r}, expected a folder "
                f"{PREFIX_CHECKPOINT_DIR}-N with trainer_state.json; give its path, or train from the start"
            )
        return str(complete[max(complete)])

    def _warn_in_mid_cycle(self, checkpoint: Path, step: int) -> None:
        """Say it where a resume from here is not bit-exact: the cycle's rollouts are not in checkpoints."""
        cycle = self.args.num_iterations
        if step % cycle and self.is_world_process_zero():
            whole = [s for s in self._complete_checkpoints(checkpoint.parent) if s < step and s % cycle == 0]
            last = f"{PREFIX_CHECKPOINT_DIR}-{max(whole)} is" if whole else "no earlier checkpoint is"
            logger.warning(
                "%s is in the middle of a cycle (num_iterations=%d): a resume from it rolls out again, which is sound "
                "but not bit-exact; %s at the end of a whole cycle",
                checkpoint,
                cycle,
                last,
            )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if isinstance(self.accelerator.unwrap_model(self.model), PeftModel):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        weights: dict[str, Tensor] = {}
        for file in sorted(Path(resume_from_checkpoint, "transformer").glob("*.safetensors")):
            weights |= load_file(file)
        self.accelerator.unwrap_model(self.model).load_state_dict(weights)

    def _load_best_model(self) -> None:
        if isinstance(self.accelerator.unwrap_model(self.model), PeftModel):
            super()._load_best_model()
        else:
            self._load_from_checkpoint(str(self.state.best_model_checkpoint))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        step = self.state.global_step
        with failing_together(self.accelerator):
            self._refuse_non_finite_weights()
        super()._save_checkpoint(model, trial)
        self._last_saved = step
        self._warn_in_mid_cycle(Path(self._get_output_dir(trial), f"{PREFIX_CHECKPOINT_DIR}-{step}"), step)

    def _refuse_non_finite_weights(self) -> None:
        """Before a checkpoint is written, as a newer one takes the place of a good one."""
        for name, weight in self.accelerator.unwrap_model(self.model).named_parameters():
            if weight.requires_grad and not bool(weight.isfinite().all()):
                raise FloatingPointError(
                    f"{name}: got NaN or infinity in this weight after step {self.state.global_step}, expected finite "
                    "numbers, so no checkpoint is written; lower learning_rate, or train in bf16 instead of fp16, and "
                    "go on from an earlier checkpoint"
                )

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        model = self.accelerator.unwrap_model(self.model)
        if isinstance(model, PeftModel):
            super()._save(str(folder), state_dict)
            save_lora(self.pipeline, model, folder)
        else:
            model.save_pretrained(folder / "transformer")
        self._write_card(folder)

    def _write_card(
        self, folder: Path, model_name: str | None = None, dataset_name: str | None = None, tags: Sequence[str] = ()
    ) -> None:
        table, report = folder / "metrics.md", folder / "metrics.json"
        saved = json.loads(report.read_text()) if report.exists() else {}  # written by `evaluation.write_report`
        if saved:
            metrics = {row["metric"]: row["after"] for row in saved["held_out"]}
        else:
            logged = [row for row in self.state.log_history if "eval_reward" in row] or [{}]
            chosen = ("eval_reward", "eval_background")
            metrics = {k.removeprefix("eval_"): v for k, v in logged[-1].items() if k.startswith(chosen)}
        card = model_card(
            model_name=model_name or Path(self.args.hub_model_id or self.args.output_dir).name,
            hub_model_id=self.args.hub_model_id,
            base_model=base_model_name(self.pipeline),
            datasets=[dataset_name] if dataset_name else (),
            metrics=metrics,
            metric_table=table.read_text() if table.exists() else None,
            examples=saved.get("examples", ()),
            settings=self.card_settings(),
            folder=folder,
            tags=tags,
        )
        card.save(folder / "README.md")

    def card_settings(self) -> dict[str, Any]:
        """The settings of this run that differ from a fresh `RCGRPOConfig`, for the model card."""
        left_out = {"output_dir", "hub_token", "hub_model_id", "run_name", "report_to", "disable_tqdm"}
        left_out |= {"cache_conditions", "conditions_cache_dir", "log_completions"}  # change no result
        changed = {}
        for field in dataclasses.fields(self.args):
            value = getattr(self.args, field.name)
            fresh = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
            if isinstance(value, bool | int | float | str | list) and value != fresh and field.name not in left_out:
                changed[field.name] = value
        return {"rewards": ", ".join(reward.name for reward in self.rewards), **changed}

    def create_model_card(
        self,
        model_name: str | None = None,
        dataset_name: str | None = None,
        tags: str | list[str] | None = None,
    ) -> None:
        """Write the card of the LoRA (`library_name: diffusers`) into the output folder."""
        if self.is_world_process_zero():
            given = [tags] if isinstance(tags, str) else tags or ()
            self._write_card(Path(self.args.output_dir), model_name, dataset_name, given)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        source = Path(checkpoint_folder, LORA_FILE)
        if source.exists():
            shutil.copy(source, Path(self.args.output_dir, LORA_FILE))
        super()._push_from_checkpoint(checkpoint_folder)
