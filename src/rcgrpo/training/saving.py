"""What a run leaves on disk: weights and LoRA in diffusers' format, the model card, the Hub.

The trainer's base class, on the one that stops and resumes; it knows nothing of groups and rewards beyond the rewards'
names for the card.
"""

import dataclasses
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn

from ..editors.lora import LORA_FILE
from ..editors.opening import stock_name
from ..inputs.extras import missing
from ..reporting.curves import plot_curves
from ..rewards import Reward
from .averaging import AVERAGE_FILE, AveragingTrainer
from .hub import CURVES, model_card, save_lora
from .model import base_model_name
from .sharding import plain_copy


class SavingTrainer(AveragingTrainer):
    """Saves a diffusers LoRA (or transformer) and a card."""

    pipeline: Any
    rewards: list[Reward]

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if isinstance(self.accelerator.unwrap_model(self.model), PeftModel):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            self._load_average(resume_from_checkpoint)
            return
        weights: dict[str, Tensor] = {}
        for file in sorted(Path(resume_from_checkpoint, "transformer").glob("*.safetensors")):
            weights |= load_file(file)
        try:
            self.accelerator.unwrap_model(self.model).load_state_dict(weights)
        except RuntimeError as error:
            raise ValueError(
                f"resume_from_checkpoint: {resume_from_checkpoint} holds another model's weights, expected this one's "
                f"({' '.join(str(error).split())[:200]}); set model back, or train from the start"
            ) from error
        self._load_average(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        if isinstance(self.accelerator.unwrap_model(self.model), PeftModel):
            super()._load_best_model()
            self._load_average(str(self.state.best_model_checkpoint))
        else:
            self._load_from_checkpoint(str(self.state.best_model_checkpoint))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As the Trainer's."""
        with self._whole():
            super().save_model(output_dir, _internal_call)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if not self.args.should_save:  # some versions of transformers ask every process
            return
        folder = Path(output_dir or self.args.output_dir)
        model = self.accelerator.unwrap_model(self.model)
        if isinstance(model, PeftModel):
            super()._save(str(folder), state_dict)
            with self.averaged():
                save_lora(self.pipeline, model, folder)
        else:
            (plain_copy(model) if self.args.shard_model else model).save_pretrained(folder / "transformer")
        if self._average is not None:
            self._average.save(folder / AVERAGE_FILE)
        self._write_card(folder)

    def _write_card(
        self, folder: Path, model_name: str | None = None, dataset_name: str | None = None, tags: Sequence[str] = ()
    ) -> None:
        model = self.accelerator.unwrap_model(self.model)
        table, report = folder / "metrics.md", folder / "metrics.json"
        saved = json.loads(report.read_text()) if report.exists() else {}  # written by `held_out.write_report`
        if saved:
            metrics = {row["metric"]: row["after"] for row in saved["held_out"]}
            more = ("before", "difference", "low", "high", "n", "confidence")
            metric_args = {row["metric"]: {key: row[key] for key in more} for row in saved["held_out"]}
        else:
            metrics = {}
            for prefix in self._eval_prefixes():
                logged = [row for row in self.state.log_history if f"{prefix}reward" in row] or [{}]
                chosen = (f"{prefix}reward", f"{prefix}background")
                metrics |= {k.removeprefix("eval_"): v for k, v in logged[-1].items() if k.startswith(chosen)}
            metric_args = {}
        rewarded = sum("reward" in row for row in self.state.log_history)
        if folder == Path(self.args.output_dir) and rewarded > 1 and not missing("report"):
            plot_curves(self.state.log_history, folder / CURVES)
        card = model_card(
            model_name=model_name or Path(self.args.hub_model_id or self.args.output_dir).name,
            hub_model_id=self.args.hub_model_id,
            base_model=base_model_name(self.pipeline),
            datasets=[dataset_name] if dataset_name else (),
            metrics=metrics,
            metric_args=metric_args,
            metric_table=table.read_text() if table.exists() else None,
            examples=saved.get("examples", ()),
            settings={**self._lora_settings(), **self.card_settings()},
            folder=folder,
            pipeline_class=stock_name(self.pipeline),
            transformer=None if isinstance(model, PeftModel) else type(model).__name__,
            tags=tags,
        )
        card.save(folder / "README.md")

    def _eval_prefixes(self) -> list[str]:
        """What the names of held-out metrics begin with; of several data sets, each of them."""
        several = self.eval_dataset if isinstance(self.eval_dataset, Mapping) else None
        return ["eval_"] if several is None else [f"eval_{name}_" for name in several]

    def card_settings(self) -> dict[str, Any]:
        """The settings of this run that differ from a fresh `RCGRPOConfig`, for the model card."""
        left_out = {"output_dir", "hub_token", "hub_model_id", "run_name", "report_to", "disable_tqdm"}
        left_out |= {"cache_conditions", "conditions_cache_dir", "log_completions"}  # change no result
        left_out |= {"log_unique_prompts", "log_completions_hub_repo"}
        changed = {}
        for field in dataclasses.fields(self.args):
            value = getattr(self.args, field.name)
            fresh = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
            if not isinstance(value, bool | int | float | str | list) or value in ("", []) or field.name in left_out:
                continue
            if value != fresh:
                changed[field.name] = value
        return {"rewards": ", ".join(reward.name for reward in self.rewards), **changed}

    def _lora_settings(self) -> dict[str, Any]:
        """Rank, scale and layers of the LoRA, for the model card; none where all weights are trained."""
        model = self.accelerator.unwrap_model(self.model)
        if not isinstance(model, PeftModel):
            return {}
        lora: Any = model.peft_config["default"]
        layers = lora.target_modules if isinstance(lora.target_modules, str) else sorted(lora.target_modules)
        return {"lora_r": lora.r, "lora_alpha": lora.lora_alpha, "lora_target_modules": layers}

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
        if self._writing:
            return  # it is pushed when it has its name
        source = Path(checkpoint_folder, LORA_FILE)
        if source.exists():
            shutil.copy(source, Path(self.args.output_dir, LORA_FILE))
        super()._push_from_checkpoint(checkpoint_folder)
