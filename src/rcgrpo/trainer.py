"""`RCGRPOTrainer`: moves data between the rooms, on TRL's base trainer.

The way of one edit: sampler → rows (undecoded) → `Edit` → `editor.encode` → region-decoupled noise → `rollout` →
pictures → `score` → advantages → transitions → `compute_loss`. Whole groups live on one process, because candidates
are compared with each other in latent space; what is drawn at random comes from keys, so a resume, another GPU count or
another order sees the same noise.

Gotchas: rollout and update call the same wrapped module through `editor.velocity`, else the policy ratio is not 1. One
generation cycle is one gradient-accumulation window, repeated `num_iterations` times; what is kept between repetitions
is not in checkpoints, hence `save_steps` must be a multiple of it.
"""

import dataclasses
import json
import logging
import os
import re
import shutil
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate.utils import gather_object
from peft import PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedConfig, TrainerCallback, set_seed
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl.trainer.base_trainer import _BaseTrainer
from trl.trainer.utils import RepeatSampler

from .attention import Concentration
from .config import RCGRPOConfig
from .data.edits import Edit, EditRows
from .editors import FluxKontextEditor
from .hub import LORA_FILE, check_lora_config, model_card, save_lora
from .metrics import masked_psnr
from .objective import (
    aggregate_rewards,
    euler_step,
    policy_loss,
    predict_clean,
    quasi_norm,
    spread,
    surrogate_log_probs,
    velocity_kl,
)
from .pipeline import RegionDecoupledFluxKontextPipeline
from .regions import region_weights
from .rewards import FailureWatch, Reward, ScoredBatch, resolve_rewards, score
from .rollout import Exploration, Group, make_groups
from .transitions import Transitions, Where, choose, gather, micro_batches

logger = logging.getLogger(__name__)


class CycleSampler(RepeatSampler):
    """TRL's sampler, with a new permutation each epoch that does not depend on how often it was iterated before."""

    def set_epoch(self, epoch: int) -> None:
        if self.shuffle:
            self.generator.manual_seed(self.seed + epoch)


class RCGRPOTrainer(_BaseTrainer):
    """
    Trainer for region-constrained GRPO on flow-matching image editors (RC-GRPO-Editing, arXiv 2604.09386).

    Args:
        model: a `FluxKontextPipeline` (any subclass), a Hub id or a local folder of one. The pipeline is trained in
            place: `trainer.pipeline` edits with the trained weights at any time.
        reward_funcs: a reward, or a list of them: callables `f(prompts, images, source_images, masks, **columns) ->
            list[float | None]` (sync or async), names of registered rewards, or dotted paths. See `rcgrpo.rewards`.
        args: the configuration.
        train_dataset: rows with a source picture, an instruction, a mask (1 = edit) and the columns that the rewards
            read; a `datasets.Dataset` or a sequence of dictionaries.
        eval_dataset: held-out rows of the same kind.
        peft_config: LoRA on the transformer. Without it the whole transformer is trained.
        callbacks, optimizers: as in `transformers.Trainer`.

    Raises:
        ValueError, TypeError: anything that cannot work, before the first step, naming field, value, what was expected
            and what to do.
    """

    loss_is_scaled_for_ga = False
    _tag_names: ClassVar[list[str]] = ["trl", "rcgrpo"]
    _name = "RC-GRPO"
    _paper: ClassVar[dict[str, str]] = {"title": "RC-GRPO-Editing", "id": "2604.09386"}

    def __init__(
        self,
        model: Any,
        reward_funcs: Callable | str | Sequence[Callable | str],
        args: RCGRPOConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        peft_config: PeftConfig | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
    ) -> None:
        args = args if args is not None else RCGRPOConfig("rcgrpo-output")
        self.rewards, self.reward_weights = self._resolve_rewards(reward_funcs, args)
        required = sorted({column for reward in self.rewards for column in reward.columns})
        train_rows, eval_rows = (
            self._make_rows(dataset, name, args, required)
            for dataset, name in ((train_dataset, "train"), (eval_dataset, "eval"))
        )
        if train_rows is None:
            raise ValueError("train_dataset: got None, expected rows with a source, an instruction and a mask")
        if peft_config is not None:
            check_lora_config(peft_config)
            if peft_config.lora_dropout:
                raise ValueError(
                    f"peft_config.lora_dropout: got {peft_config.lora_dropout}, expected 0: dropout makes the "
                    "update see another policy than the rollout"
                )
        elif args.beta:
            raise ValueError(f"beta: got {args.beta} without peft_config, expected LoRA, whose base is the reference")

        self.pipeline = self._load_pipeline(model, args)
        self.editor = FluxKontextEditor(
            self.pipeline, args.resolution, args.num_inference_steps, args.guidance_scale, args.max_sequence_length
        )
        self.exploration = Exploration(args.edit_strength, args.keep_strength, args.antithetic, args.mask_growth)
        super().__init__(
            model=self._prepare_model(peft_config, args),
            args=args,
            data_collator=list,
            train_dataset=train_rows,
            eval_dataset=eval_rows,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        if self.args.n_gpu > 1:
            raise ValueError("Several GPUs in one process: got DataParallel, expected one GPU; use `accelerate launch`")
        cycle = self._cycle_size()
        if len(train_rows) < cycle:
            raise ValueError(
                f"train_dataset: got {len(train_rows)} rows, expected at least one update's {cycle} edits "
                "(per_device_train_batch_size · gradient_accumulation_steps · processes); lower one of these"
            )
        self.pipeline.to(self.accelerator.device)
        self.failures = FailureWatch(self.rewards, args.max_reward_failures)
        self._metrics: dict[str, dict[str, list[float]]] = {"train": defaultdict(list), "eval": defaultdict(list)}
        self._step = 0
        self._buffer: list[list[Group]] = []
        self._old_log_probs: list[dict[Where, Tensor]] = []
        self._extra_columns: dict[str, list[Any]] = {}
        self._probe_rewards(train_rows)

    # ------------------------------------------------------------------------------------------ start-up

    @staticmethod
    def _resolve_rewards(reward_funcs: Any, args: RCGRPOConfig) -> tuple[list[Reward], Tensor]:
        rewards = resolve_rewards(reward_funcs)
        weights = args.reward_weights if args.reward_weights is not None else [1.0] * len(rewards)
        if len(weights) != len(rewards):
            raise ValueError(
                f"reward_weights: got {len(weights)} weights, expected {len(rewards)}, one for each reward"
            )
        if args.attention_reward_weight:
            rewards += resolve_rewards("attention_concentration")
            weights = [*weights, args.attention_reward_weight]
        names = [reward.name for reward in rewards]
        if len(set(names)) < len(names):
            raise ValueError(
                f"reward_funcs: got {names}, expected different names; attention_reward_weight adds its own"
            )
        return rewards, torch.tensor(weights, dtype=torch.float32)

    @staticmethod
    def _make_rows(dataset: Any, name: str, args: RCGRPOConfig, required: list[str]) -> EditRows | None:
        if dataset is None:
            return None
        if isinstance(dataset, Mapping):
            raise TypeError(
                f"{name}_dataset: got a dictionary of {sorted(map(str, dataset))}, expected one set of rows; pick one, "
                "or call `trainer.evaluate(rows)` for each after training"
            )
        rows = EditRows(dataset, name, args.image_column, args.prompt_column, args.mask_column, required)
        full = rows.check(args.check_rows)
        if full:
            logger.warning(
                "%s_dataset: %d of the checked rows have a mask that covers the whole picture; for them nothing is "
                "kept and the region constraint is off",
                name,
                full,
            )
        return rows

    @staticmethod
    def _load_pipeline(model: Any, args: RCGRPOConfig) -> RegionDecoupledFluxKontextPipeline:
        if isinstance(model, str | os.PathLike):
            kwargs = dict(args.model_init_kwargs or {})  # type: ignore[arg-type]
            for key in {"dtype", "torch_dtype"} & kwargs.keys():
                kwargs[key] = getattr(torch, kwargs[key]) if isinstance(kwargs[key], str) else kwargs[key]
            return RegionDecoupledFluxKontextPipeline.from_pretrained(model, **kwargs)
        if isinstance(model, RegionDecoupledFluxKontextPipeline):
            return model
        if not all(hasattr(model, part) for part in ("transformer", "vae", "scheduler", "tokenizer_2")):
            raise TypeError(f"model: got {type(model).__name__}, expected a FluxKontextPipeline, a Hub id or a folder")
        pipe = RegionDecoupledFluxKontextPipeline(**model.components)  # `from_pipe` would cast everything to fp32
        pipe.register_to_config(_name_or_path=model.config.get("_name_or_path"))
        return pipe

    def _prepare_model(self, peft_config: PeftConfig | None, args: RCGRPOConfig) -> nn.Module:
        pipe = self.pipeline
        for part in (pipe.vae, pipe.text_encoder, pipe.text_encoder_2):
            if part is not None:
                part.requires_grad_(False).eval()
        transformer = pipe.transformer
        if getattr(transformer, "is_cache_enabled", False):
            raise ValueError(
                "model: the transformer has a step cache enabled; call `transformer.disable_cache()` first"
            )

        # The Trainer asks a transformers model for these; a diffusers model has another name for them.
        def enable(*_: Any, **__: Any) -> None:
            transformer.enable_gradient_checkpointing()

        transformer.activation_checkpointing_enable = transformer.gradient_checkpointing_enable = enable
        transformer.gradient_checkpointing_disable = transformer.disable_gradient_checkpointing
        if peft_config is None:
            return transformer.requires_grad_(True)
        if isinstance(transformer, PeftModel):
            raise ValueError("model: the pipeline's transformer is wrapped by PEFT already, expected the bare one")
        set_seed(args.seed)  # the LoRA's initial weights belong to the run, not to what ran before it
        try:
            wrapped = get_peft_model(transformer, peft_config)
        except ValueError as error:
            names = (name for name, layer in transformer.named_modules() if isinstance(layer, nn.Linear))
            endings = sorted({re.sub(r".*?([^.]+(\.\d+)?)$", r"\1", name) for name in names})
            raise ValueError(
                f"peft_config.target_modules: got {peft_config.target_modules!r}, expected names of layers in "
                f"{type(transformer).__name__}, ending in {', '.join(endings)} ({error})"
            ) from error
        public = {key: value for key, value in transformer.config.items() if not key.startswith("_")}
        wrapped.config = PreTrainedConfig(**public)
        wrapped.config._name_or_path = str(pipe.config.get("_name_or_path") or "")
        return wrapped

    def _probe_rewards(self, rows: EditRows) -> None:
        """Call each reward once on unedited sources, so that a wrong length is known before hours are spent."""
        edit = rows.edit(0)
        group = self._fake_group(edit)
        scored = self._call_rewards([group, group], ["start-up probe 0", "start-up probe 1"])
        for failure in scored.failures:
            logger.warning(
                "reward %r failed on %s (%s); training goes on, candidates that it fails on are left out",
                failure.reward,
                failure.sample_label,
                failure.reason,
            )
        self.forget_metrics()

    def _fake_group(self, edit: Edit) -> Group:
        height, width = self.editor.size_for(edit.source)
        image, one, unused = edit.source.resize((width, height)), torch.ones(1), None
        attention = Concentration(one, one, one)
        return Group(edit, unused, unused, one, one, [image], attention, None)  # type: ignore[arg-type]

    def _send_telemetry(self) -> None:
        """TRL's telemetry is not for other packages to send."""

    # ------------------------------------------------------------------------------------------ data

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns: list[str] = []

    def _cycle_size(self) -> int:
        args = self.args
        return args.per_device_train_batch_size * args.gradient_accumulation_steps * self.accelerator.num_processes

    def _get_train_sampler(self, train_dataset: Any = None) -> CycleSampler:
        return CycleSampler(
            data_source=self.train_dataset if train_dataset is None else train_dataset,
            mini_repeat_count=1,
            batch_size=self._cycle_size(),
            repeat_count=self.args.num_iterations,
            shuffle=self.args.shuffle_dataset,
            seed=self.args.data_seed if self.args.data_seed is not None else self.args.seed,
        )

    # ------------------------------------------------------------------------------------------ rollout

    def make_groups(
        self, edits: Sequence[Edit], num_generations: int, key: tuple[Any, ...], maps: bool = False
    ) -> list[Group]:
        """Roll out candidates of each edit with the current weights; see `rollout.make_groups`."""
        args = self.args
        recorded = args.log_attention or any(reward.name == "attention_concentration" for reward in self.rewards)
        training = self.model.training
        self.model.eval()
        groups = make_groups(
            self.editor,
            self.model_wrapped,
            edits,
            num_generations,
            self.exploration,
            key,
            "maps" if maps else "mass" if recorded else "none",
            args.rollout_batch_size,
        )
        self.model.train(training)
        return groups

    # ------------------------------------------------------------------------------------------ rewards

    def _call_rewards(self, groups: Sequence[Group], labels: list[str]) -> ScoredBatch:
        """Score every candidate of the groups in one call of each reward."""
        per_candidate = [(group, i) for group in groups for i in range(len(group.images))]
        sources, masks = {id(g): g.source for g in groups}, {id(g): g.mask for g in groups}
        names = set.intersection(*(set(g.edit.columns) for g in groups))
        columns = {name: [g.edit.columns[name] for g, _ in per_candidate] for name in sorted(names)}
        if all(g.attention is not None for g in groups):
            for measure in ("mass", "density", "contrast"):
                columns[f"attention_{measure}"] = [float(getattr(g.attention, measure)[i]) for g, i in per_candidate]
        return score(
            self.rewards,
            [g.edit.prompt for g, _ in per_candidate],
            [g.images[i] for g, i in per_candidate],
            [sources[id(g)] for g, _ in per_candidate],
            [masks[id(g)] for g, _ in per_candidate],
            columns,
            labels,
            {"trainer_state": self.state, "log_extra": self._log_extra, "log_metric": self._log_metric},
        )

    def _mode(self) -> str:
        return "train" if self.model.training else "eval"

    def _log_extra(self, column: str, values: list[Any]) -> None:
        """For rewards: keep a column beside the candidates, in `trainer.extra_columns` until the next batch."""
        self._extra_columns[column] = list(values)

    def _log_metric(self, name: str, value: float) -> None:
        """For rewards: average a number into the log."""
        self._metrics[self._mode()][name].append(float(value))

    @property
    def extra_columns(self) -> dict[str, list[Any]]:
        """What rewards logged with `log_extra` on the latest batch, one entry per candidate."""
        return dict(self._extra_columns)

    def forget_metrics(self) -> None:
        """Drop what was measured since the last log, for scores that belong to no step of the run."""
        self._extra_columns = {}
        for metrics in self._metrics.values():
            metrics.clear()

    def score_groups(self, groups: Sequence[Group]) -> ScoredBatch:
        """Fill in rewards, scores and advantages of freshly rolled-out groups; warn of candidates without a score."""
        args = self.args
        self._extra_columns = {}
        labels = [f"{g.edit.label}, candidate {i}" for g in groups for i in range(len(g.images))]
        scored = self._call_rewards(groups, labels)
        for failure in scored.failures[:5]:
            logger.warning("reward %r failed on %s: %s", failure.reward, failure.sample_label, failure.reason)
        if len(scored.failures) > 5:
            logger.warning("... and %d more reward failures in this batch", len(scored.failures) - 5)
        for group, rewards in zip(groups, scored.values.split([len(g.images) for g in groups]), strict=True):
            group.rewards = rewards
            group.scores, advantages = aggregate_rewards(
                rewards,
                self.reward_weights,
                args.multi_objective_aggregation,  # type: ignore[arg-type]
                args.advantage_std_floor,
            )
            flat = not spread(group.scores) >= args.min_reward_std  # NaN, where nobody was scored, is flat too
            group.advantages = torch.zeros_like(advantages) if flat else quasi_norm(advantages, args.advantage_power)
        return scored

    def _log_groups(self, groups: Sequence[Group], scored: ScoredBatch) -> None:
        metrics = self._metrics[self._mode()]
        metrics["rewards/failures"].append(float(len(scored.failures)))
        for group in groups:
            count, scores, rewards = len(group.images), group.scores, group.rewards
            metrics["reward"].append(float(scores.nanmean()))  # type: ignore[union-attr]
            metrics["background/psnr"] += masked_psnr(group.images, [group.source] * count, [group.mask] * count)
            for i, reward in enumerate(self.rewards):
                metrics[f"rewards/{reward.name}/mean"].append(float(rewards[:, i].nanmean()))  # type: ignore[index]
                if count > 1:
                    metrics[f"rewards/{reward.name}/std"].append(spread(rewards[:, i]))  # type: ignore[index]
            if count > 1:
                metrics["reward_std"].append(spread(scores))  # type: ignore[arg-type]
                metrics["frac_reward_zero_std"].append(float(not group.advantages.any()))  # type: ignore[union-attr]
                metrics["groups/scored_candidates"].append(float((~scores.isnan()).sum()))  # type: ignore[union-attr]
            if group.attention is not None:
                for measure in ("mass", "density", "contrast"):
                    metrics[f"attention/{measure}"].append(float(getattr(group.attention, measure).mean()))

    # ------------------------------------------------------------------------------------------ update

    def _prepare_inputs(self, inputs: list[tuple[int, dict[str, Any]]]) -> list[Group]:  # type: ignore[override]
        """Roll out and score a micro-batch of edits the first time, hand it back in later iterations."""
        position = self._step % self.args.gradient_accumulation_steps
        cycle, iteration = divmod(self.state.global_step, self.args.num_iterations)
        if position == iteration == 0:
            self._buffer, self._old_log_probs = [], []
        if position == len(self._buffer):  # a new cycle, or one that a resume entered in its middle
            edits = [self.train_dataset.edit(index, row) for index, row in inputs]
            groups = self.make_groups(edits, self.args.num_generations, (self.args.seed, cycle))
            scored = self.score_groups(groups)
            self._log_groups(groups, scored)
            self.failures.update(scored)
            self._buffer.append(groups)
            self._old_log_probs.append({})
        return self._buffer[position]

    def compute_loss(  # type: ignore[override]
        self, model: nn.Module, inputs: Transitions, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """The clipped surrogate loss, the mean over a micro-batch of transitions; fills in `old_log_probs`."""
        velocity = self.editor.velocity(model, inputs.latents, inputs.timestep, inputs.conditions)
        if self.args.distance_space == "clean":
            predicted = predict_clean(inputs.latents, velocity, inputs.sigma)
        else:
            predicted = euler_step(inputs.latents, velocity, inputs.sigma, inputs.next_sigma)
        weights = region_weights(inputs.region, self.args.keep_weight)
        log_probs = surrogate_log_probs(inputs.candidates, predicted, weights, self.args.temperature)
        if inputs.old_log_probs is None:
            # The policy has not moved since the rollout: it is its own old policy, without another forward.
            inputs.old_log_probs = log_probs.detach()
        result = policy_loss(log_probs, inputs.old_log_probs, inputs.advantages, self.args.epsilon)
        loss = result.loss
        metrics = self._metrics["train"]
        if self.args.beta:
            with torch.no_grad(), self.accelerator.unwrap_model(model).disable_adapter():
                reference = self.editor.velocity(model, inputs.latents, inputs.timestep, inputs.conditions)
            kl = velocity_kl(velocity, reference, region_weights(inputs.region, self.args.beta_keep))
            metrics["kl"].append(float(kl.detach().mean()))
            loss = loss + self.args.beta * kl * inputs.advantages.ne(0).any(-1)
        metrics["clip_ratio/low_mean"].append(float(result.clipped_low.float().mean()))
        metrics["clip_ratio/high_mean"].append(float(result.clipped_high.float().mean()))
        metrics["policy/log_ratio_max"].append(float((log_probs.detach() - inputs.old_log_probs).abs().max()))
        return loss.mean()

    def training_step(  # type: ignore[override]
        self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None
    ) -> Tensor:
        """One micro-step: rollout (or buffer), then backward through the transitions in micro-batches."""
        began = time.perf_counter()
        model.train()
        groups = self._prepare_inputs(inputs)
        args, known = self.args, self._old_log_probs[self._step % self.args.gradient_accumulation_steps]
        key = (args.seed, self.state.global_step // args.num_iterations)
        chosen = choose(groups, args.num_anchors, args.num_policy_steps, args.policy_step_indices, key)
        batches = micro_batches(groups, chosen, args.train_micro_batch_size)
        # Dropped groups count in the mean, so that it is the same however groups are spread over micro-steps and ranks.
        size = len(groups) * args.num_anchors * args.num_policy_steps
        total = torch.zeros((), device=self.accelerator.device)
        for i, where in enumerate(batches):
            transitions = gather(groups, where, args.distance_space, known)
            # Gradients travel between processes once, with the last micro-batch.
            syncing = nullcontext() if i + 1 == len(batches) else self.accelerator.no_sync(model)
            with syncing:
                with self.compute_loss_context_manager():
                    loss = self.compute_loss(model, transitions) * len(where) / size
                self._refuse_non_finite(loss, groups)
                self.accelerator.backward(loss / self.current_gradient_accumulation_steps)
            known.update(zip(where, transitions.old_log_probs, strict=True))  # type: ignore[arg-type]
            total += loss.detach()
        self._step += 1
        self._metrics["train"]["step_time"].append(time.perf_counter() - began)
        return total / self.current_gradient_accumulation_steps

    def _refuse_non_finite(self, loss: Tensor, groups: Sequence[Group]) -> None:
        if not bool(torch.isfinite(loss.detach())):
            rows = ", ".join(group.edit.label for group in groups)
            raise FloatingPointError(
                f"loss: got {float(loss.detach())} at step {self.state.global_step} on {rows}, expected a finite "
                "number; lower learning_rate, or train in bf16 instead of fp16"
            )

    # ------------------------------------------------------------------------------------------ evaluation, log

    @torch.no_grad()
    def prediction_step(  # type: ignore[override]
        self, model: nn.Module, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[None, None, None]:
        """Roll out and score held-out edits, always from the same noise."""
        edits = [self._eval_rows().edit(index, row) for index, row in inputs]
        groups = self.make_groups(edits, self.args.num_generations_eval, (self.args.seed, "eval"))
        scored = self.score_groups(groups)
        self._log_groups(groups, scored)
        self.failures.update(scored)
        return None, None, None

    def _eval_rows(self) -> EditRows:
        rows: Any = self.callback_handler.eval_dataloader.dataset
        return rows

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:  # type: ignore[override]
        """As `Trainer.evaluate`, on rows like the trainer's."""
        if eval_dataset is not None and not isinstance(eval_dataset, EditRows | str):
            required = sorted({column for reward in self.rewards for column in reward.columns})
            eval_dataset = self._make_rows(eval_dataset, "eval", self.args, required)
        metrics = super().evaluate(eval_dataset, *args, **kwargs)
        return {**metrics, **self._last_eval_metrics}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        mode = "eval" if any(key.startswith("eval_") for key in logs) else "train"
        prefix = "eval_" if mode == "eval" else ""
        # Processes may have logged other names, or another number of values, than this one.
        gathered: dict[str, list[float]] = defaultdict(list)
        for metrics in gather_object([dict(self._metrics[mode])]):
            for name, values in metrics.items():
                gathered[name] += [value for value in values if value == value]
        averaged = {prefix + name: sum(values) / len(values) for name, values in gathered.items() if values}
        if mode == "eval":
            self._last_eval_metrics = averaged
        logs.update(averaged)
        self._metrics[mode].clear()
        super().log(logs, start_time)

    # ------------------------------------------------------------------------------------------ checkpoints, Hub

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:  # type: ignore[override]
        """As `Trainer.train`; whatever stops it after the first update, what was trained so far is saved first."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = self._last_complete_checkpoint()
        self._last_saved = -1
        try:
            return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        except BaseException as error:
            if self.state.global_step > 0 and self._last_saved != self.state.global_step:
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

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        self._step, self._buffer, self._old_log_probs = 0, [], []
        return super()._inner_training_loop(*args, **kwargs)

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

    def _write_card(self, folder: Path, model_name: str | None = None, dataset_name: str | None = None) -> None:
        table, report = folder / "metrics.md", folder / "metrics.json"
        if report.exists():  # written by `evaluation.write_report`
            metrics = {row["metric"]: row["after"] for row in json.loads(report.read_text())["held_out"]}
        else:
            logged = [row for row in self.state.log_history if "eval_reward" in row] or [{}]
            chosen = ("eval_reward", "eval_background")
            metrics = {k.removeprefix("eval_"): v for k, v in logged[-1].items() if k.startswith(chosen)}
        card = model_card(
            model_name=model_name or Path(self.args.hub_model_id or self.args.output_dir).name,
            hub_model_id=self.args.hub_model_id,
            base_model=str(self.pipeline.config.get("_name_or_path") or ""),
            datasets=[dataset_name] if dataset_name else (),
            metrics=metrics,
            metric_table=table.read_text() if table.exists() else None,
            settings=self.card_settings(),
            folder=folder,
        )
        card.save(folder / "README.md")

    def card_settings(self) -> dict[str, Any]:
        """The settings of this run that differ from a fresh `RCGRPOConfig`, for the model card."""
        left_out = ("output_dir", "hub_token", "hub_model_id", "run_name", "report_to", "disable_tqdm")
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
            self._write_card(Path(self.args.output_dir), model_name, dataset_name)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        source = Path(checkpoint_folder, LORA_FILE)
        if source.exists():
            shutil.copy(source, Path(self.args.output_dir, LORA_FILE))
        super()._push_from_checkpoint(checkpoint_folder)
