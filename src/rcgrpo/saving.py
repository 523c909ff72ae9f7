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
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl.trainer.base_trainer import _BaseTrainer

from .hub import LORA_FILE, model_card, save_lora
from .models import base_model_name
from .pipeline import RegionDecoupledFluxKontextPipeline
from .rewards import Reward, is_agreed

logger = logging.getLogger(__name__)


class SavingTrainer(_BaseTrainer):
    """TRL's base trainer that saves a diffusers LoRA (or transformer) and a card, and saves before it stops."""

    pipeline: RegionDecoupledFluxKontextPipeline
    rewards: list[Reward]

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:  # type: ignore[override]
        """As `Trainer.train`; stopping after the first update, on all processes alike, saves what was trained first."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = self._last_complete_checkpoint()
        self._last_saved = -1
        try:
            return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        except BaseException as error:
            # Saving takes every process. Where one failed alone, the others wait elsewhere; its end is theirs.
            together = self.accelerator.num_processes == 1 or is_agreed(error)
            if together and self.state.global_step > 0 and self._last_saved != self.state.global_step:
                logger.error("%s: saving checkpoint-%d before stopping", type(error).__name__, self.state.global_step)
                self._save_checkpoint(self.model, trial=None)
            raise

    def _last_complete_checkpoint(self) -> str:
        """The newest checkpoint that was written to its end; the state file is written last."""
        folders = sorted(
            Path(self.args.output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*"), key=lambda f: int(f.name.rsplit("-", 1)[-1])
        )
        complete = [folder for folder in folders if (folder / "trainer_state.json").exists()]
        if not complete:
            raise ValueError(
                f"resume_from_checkpoint: found no complete checkpoint in {self.args.output_dir!r}, expected a folder "
                f"{PREFIX_CHECKPOINT_DIR}-N with trainer_state.json; give its path, or train from the start"
            )
        return str(complete[-1])

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
        super()._save_checkpoint(model, trial)
        self._last_saved = self.state.global_step

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
        left_out |= {"cache_conditions", "conditions_cache_dir"}  # change no result
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
