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
import itertools
import logging
import time
from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate.utils import gather_object
from peft import PeftConfig
from PIL import Image
from torch import Tensor, nn
from transformers import TrainerCallback
from trl.trainer.utils import RepeatSampler

from .attention import AttentionOptions, AttentionRecorder, Concentration
from .completions import SHOWN, Completions, record, show, shown_rows, write_completions
from .config import RCGRPOConfig
from .data.edits import Edit, EditRows
from .diagnostics import group_diagnostics, reward_parts, variance_by_step
from .editors import ConditionCache, FluxKontextEditor
from .editors.flux_kontext import instruction_token_weights
from .hub import check_lora_config
from .metrics import masked_psnr
from .models import load_pipeline, trained_model
from .objective import batch_advantages, keep_hinge, predict_clean, spread, total_scores, velocity_kl
from .policies import make_policy, region_mask
from .regions import mask_to_tensor, region_weights
from .rewards import (
    ATTENTION_REWARDS,
    FailureWatch,
    PendingScores,
    Reward,
    ScoredBatch,
    ScoringQueue,
    failing_together,
    fault_counts,
    resolve_rewards,
)
from .rollout import Exploration, Group, make_groups, words_of
from .saving import SavingTrainer
from .transitions import Transitions, Where, choose, gather, micro_batches
from .turns import REGIONS, best_candidate, join_turns, next_edit

logger = logging.getLogger(__name__)


def _candidate_labels(groups: Sequence[Group]) -> list[str]:
    return [f"{group.edit.label}, candidate {i}" for group in groups for i in range(len(group.images))]


class CycleSampler(RepeatSampler):
    """TRL's sampler, with a new permutation each epoch that does not depend on how often it was iterated before."""

    def set_epoch(self, epoch: int) -> None:
        if self.shuffle:
            self.generator.manual_seed(self.seed + epoch)


class RCGRPOTrainer(SavingTrainer):
    """
    Trainer for region-constrained GRPO on flow-matching image editors (RC-GRPO-Editing, arXiv 2604.09386).

    Args:
        model: a `FluxKontextPipeline` (any subclass), a Hub id or a local folder of one. The pipeline is trained in
            place: `trainer.pipeline` edits with the trained weights at any time.
        reward_funcs: a reward, or a list of them: callables `f(prompts, images, source_images, masks, **columns) ->
            list[float | None]` (sync or async), names of registered rewards, or dotted paths. See `rcgrpo.rewards`.
        args: the configuration.
        train_dataset: rows with a source picture, an instruction, a mask (1 = edit; in pictures 255) and the columns
            that the rewards read; a `datasets.Dataset` or a sequence of dictionaries.
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
        self._records_attention = args.log_attention or any(r.name in ATTENTION_REWARDS for r in self.rewards)
        self.reward_regions = self._regions_of_rewards(self.rewards, args)
        if args.reward_gradient_weight and not any(reward.differentiable for reward in self.rewards):
            raise ValueError(
                f"reward_gradient_weight: got {args.reward_gradient_weight} with {[r.name for r in self.rewards]}, "
                "expected a reward that has a gradient, such as region_margin; see docs/rewards.md"
            )
        self.exploration = Exploration(
            args.edit_strength,
            args.keep_strength,
            args.antithetic,
            args.mask_growth,
            args.exploration,  # type: ignore[arg-type]
            args.independent_share,
            REGIONS if args.turns_at_once else args.regions_column,
            args.region_strengths,
            args.sde_noise_level if args.policy == "flow_grpo" else 0.0,
            args.policy_step_indices,
            args.sde_window,
        )
        train_rows, eval_rows = (
            self._make_rows(dataset, name, args) for dataset, name in ((train_dataset, "train"), (eval_dataset, "eval"))
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

        self.pipeline = load_pipeline(model, args.model_init_kwargs)  # type: ignore[arg-type]
        self.editor = FluxKontextEditor(
            self.pipeline,
            args.resolution,
            args.num_inference_steps,
            args.guidance_scale,
            args.max_sequence_length,
            args.solver,  # type: ignore[arg-type]
            args.true_cfg_scale,
            args.negative_prompt,
            ConditionCache(args.conditions_cache_dir) if args.cache_conditions else None,
        )
        if self._records_attention:
            AttentionRecorder(self.pipeline.transformer, args.attention_blocks)  # refuses blocks that are not there
        elif args.attention_options != AttentionOptions():
            raise ValueError(
                f"attention_blocks, attention_...: got {args.attention_options}, expected the defaults, as nothing "
                f"is recorded without log_attention=True or one of the rewards {', '.join(ATTENTION_REWARDS)}"
            )
        self.policy = make_policy(args, args.named_regions)
        super().__init__(
            model=trained_model(self.pipeline, peft_config, args.seed),
            args=args,
            data_collator=list,
            train_dataset=train_rows,
            eval_dataset=eval_rows,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        if self.args.n_gpu > 1:
            raise ValueError("Several GPUs in one process: got DataParallel, expected one GPU; use `accelerate launch`")
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            engine = "FSDP" if self.is_fsdp_enabled else "DeepSpeed"
            raise ValueError(
                f"{engine}: got a sharded engine, expected plain data parallelism, as processes run unequal numbers of "
                "forwards (picture sizes, dropped groups, turns); use `accelerate launch --multi_gpu`, and a quantized "
                "base, cache_conditions or rollout_batch_size where memory is short"
            )
        cycle = self._cycle_size()
        if len(train_rows) < cycle:
            raise ValueError(
                f"train_dataset: got {len(train_rows)} rows, expected at least one update's {cycle} edits "
                "(per_device_train_batch_size · gradient_accumulation_steps · processes); lower one of these"
            )
        for rows in (train_rows, eval_rows):
            self._check_played(rows)
        self.editor.place(self.accelerator.device)
        self._eval_editor = self.editor.with_steps(args.num_inference_steps_eval or args.num_inference_steps)
        self.failures = FailureWatch(self.rewards, args.max_reward_failures)
        self._metrics: dict[str, dict[str, list[float]]] = {"train": defaultdict(list), "eval": defaultdict(list)}
        self._completions: dict[str, list[Completions]] = {"train": [], "eval": []}
        self._eval_prefix = "eval_"
        self._last_eval_metrics: dict[str, float] = {}
        self._step = 0
        self._buffer: list[list[Group]] = []
        self._old: list[dict[Where, Tensor]] = []
        self._extra_columns: dict[str, list[Any]] = {}
        self._scoring = ScoringQueue()
        self._window: list[Any] = []
        self._ahead: deque[tuple[list[Group], PendingScores]] = deque()
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
    def _regions_of_rewards(rewards: Sequence[Reward], args: RCGRPOConfig) -> list[str]:
        if not args.region_advantages:
            return []
        given, automatic = list(args.reward_regions or []), ["edit"] if args.attention_reward_weight else []
        if len(given) + len(automatic) != len(rewards):
            raise ValueError(
                f"reward_regions: got {len(given)}, expected {len(rewards) - len(automatic)}, a region for each reward"
            )
        return given + automatic

    def _make_rows(self, dataset: Any, name: str, args: RCGRPOConfig) -> EditRows | None:
        if dataset is None:
            return None
        if isinstance(dataset, Mapping):
            raise TypeError(
                f"{name}_dataset: got a dictionary of {sorted(map(str, dataset))}, expected one set of rows; pick one, "
                "or call `trainer.evaluate(rows)` for each after training"
            )
        required = sorted({column for reward in self.rewards for column in reward.columns})
        columns = (args.image_column, args.prompt_column, args.mask_column)
        at_once = args.turns_column if args.turns_at_once else None
        join = None if at_once is None else partial(join_turns, column=at_once)
        rows = EditRows(dataset, name, *columns, required, args.regions_column, args.turns_column, join)
        if args.turns_column is not None and args.turns_column not in rows.edit(0).columns:
            raise ValueError(
                f"turns_column: got {args.turns_column!r}, expected a column of {name}_dataset, which has "
                f"{', '.join(rows.edit(0).columns)}; rows without further turns have None there"
            )
        most = 0

        def look(edit: Edit) -> None:
            nonlocal most
            most = max(most, self._check_edit(edit, args))

        full = rows.check(args.check_rows, look)
        missing = [n for n in args.named_regions if n.startswith("region_") and int(n.removeprefix("region_")) > most]
        # Turns that are played one after the other may bring more regions than their row.
        if missing and most and (args.turns_column is None or args.turns_at_once):
            logger.warning(
                "reward_regions: none of the checked rows of %s_dataset has %s, so rewards there teach nothing; the "
                "most regions of one edit are %d",
                name,
                ", ".join(missing),
                most,
            )
        if full:
            logger.warning(
                "%s_dataset: %d of the checked rows have a mask that covers the whole picture; for them nothing is "
                "kept and the region constraint is off",
                name,
                full,
            )
        return rows

    def _next_edit(self, edit: Edit, result: Image.Image, number: int) -> Edit | None:
        """The next turn, or None if there is none or all were one edit from the start."""
        args = self.args
        if args.turns_column is None or args.turns_at_once:
            return None
        return next_edit(edit, result, args.turns_column, number, args.regions_column)

    def _check_edit(self, edit: Edit, args: RCGRPOConfig) -> int:
        """Regions and words that cannot be read are known before the first rollout; the number of regions."""
        if args.attention_words_column is not None:
            words_of(edit, args.attention_words_column)
        return len(self.exploration.masks(edit))

    def _check_played(self, rows: EditRows | None) -> None:
        """Turns and words that cannot be read are known before the first rollout.

        Turns are read at the size at which they will be played, which only the editor knows: there a mask may vanish.
        Words may be cut off by `max_sequence_length`, which takes its tokenizer.
        """
        args = self.args

        def play(edit: Edit, following: int = 2) -> None:
            self._check_edit(edit, args)
            if args.attention_words_column is not None:
                words = words_of(edit, args.attention_words_column)
                instruction_token_weights(self.pipeline, [edit.prompt], args.max_sequence_length, [words])
            height, width = self.editor.size_for(edit.source)
            turn = self._next_edit(edit, Image.new("RGB", (width, height)), following)
            if turn is not None:
                play(turn, following + 1)

        in_turns = args.turns_column is not None and not args.turns_at_once
        if rows is not None and (in_turns or args.attention_words_column is not None):
            rows.check(args.check_rows, play)

    def _probe_rewards(self, rows: EditRows) -> None:
        """Call each reward once on unedited sources, so that a wrong length is known before hours are spent."""
        group = self._fake_group(rows.edit(0))
        scored = self._submit([group, group], ["start-up probe 0", "start-up probe 1"]).result()
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
        attention = Concentration(one, one, one) if self._records_attention else None
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
        self,
        edits: Sequence[Edit],
        num_generations: int,
        key: tuple[Any, ...],
        maps: bool = False,
        cache_sources: bool = True,
    ) -> list[Group]:
        """Roll out candidates of each edit with the current weights; see `rollout.make_groups`."""
        args = self.args
        training = self.model.training
        editor, exploration = self.editor, self.exploration
        if not training:  # along the ODE, whatever noise training injects, and with its own number of steps
            editor, exploration = self._eval_editor, dataclasses.replace(exploration, noise_level=0.0)
        self.model.eval()
        groups = make_groups(
            editor,
            self.model_wrapped,
            edits,
            num_generations,
            exploration,
            key,
            "maps" if maps else "mass" if self._records_attention else "none",
            args.rollout_batch_size,
            cache_sources,
            args.attention_options,
        )
        self.model.train(training)
        return groups

    # ------------------------------------------------------------------------------------------ rewards

    def _submit(self, groups: Sequence[Group], labels: list[str] | None = None) -> PendingScores:
        """Begin to score every candidate of the groups, in one call of each reward, beside whatever comes next."""
        labels = labels or _candidate_labels(groups)
        per_candidate = [(group, i) for group in groups for i in range(len(group.images))]
        sources, masks = {id(g): g.source for g in groups}, {id(g): g.mask for g in groups}
        names = set.intersection(*(set(g.edit.columns) for g in groups))
        columns = {name: [g.edit.columns[name] for g, _ in per_candidate] for name in sorted(names)}
        if all(g.attention is not None for g in groups):
            for measure in ("mass", "density", "contrast"):
                columns[f"attention_{measure}"] = [float(getattr(g.attention, measure)[i]) for g, i in per_candidate]
        return self._scoring.submit(
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
        scored = self._take_scores(groups, self._submit(groups))
        self._compare(groups)
        return scored

    def _rows(self) -> list[list[bool]]:
        """Which rewards belong to each region that has some, with region advantages."""
        return [[region == name for region in self.reward_regions] for name in self.args.named_regions]

    def _take_scores(self, groups: Sequence[Group], pending: PendingScores) -> ScoredBatch:
        """Fill in rewards and scores."""
        metrics = self._metrics[self._mode()]
        self._extra_columns = {}
        asked = time.perf_counter()
        scored = pending.result()
        metrics["step_time/scoring"].append(pending.ended - pending.started)  # type: ignore[operator]
        metrics["step_time/scoring_waited"].append(time.perf_counter() - asked)
        for failure in scored.failures[:5]:
            logger.warning("reward %r failed on %s: %s", failure.reward, failure.sample_label, failure.reason)
        if len(scored.failures) > 5:
            logger.warning("... and %d more reward failures in this batch", len(scored.failures) - 5)
        lost = {(failure.sample_label, failure.reward) for failure in scored.failures}
        labels = _candidate_labels(groups)
        failures = torch.tensor([[(label, name) in lost for name in scored.names] for label in labels])
        sizes, weights, rows = [len(group.images) for group in groups], self.reward_weights, self._rows()
        extra = {name: values for name, values in self._extra_columns.items() if len(values) == len(labels)}
        end = 0
        for group, rewards, failed in zip(groups, scored.values.split(sizes), failures.split(sizes), strict=True):
            start, end = end, end + len(group.images)
            group.logged = {name: values[start:end] for name, values in extra.items()}
            group.rewards, group.scores = rewards, total_scores(rewards, weights, failed)
            if rows:
                each = [total_scores(rewards[:, chosen], weights[chosen], failed[:, chosen]) for chosen in rows]
                group.region_scores = torch.stack(each)
        return scored

    def _compare(self, groups: Sequence[Group], others: Sequence[Tensor] = ()) -> None:
        """Fill in the advantages of scored groups.

        Args:
            others: rewards of the groups that other processes have, which belong to the batch too.
        """
        args, rows = self.args, self._rows()
        # With region advantages each region's rewards are compared among themselves.
        results = [
            batch_advantages(
                [rewards[:, chosen] for rewards in (*(group.rewards for group in groups), *others)],  # type: ignore[index]
                self.reward_weights[chosen],
                how=args.multi_objective_aggregation,  # type: ignore[arg-type]
                scale_rewards=args.scale_rewards,  # type: ignore[arg-type]
                std_floor=args.advantage_std_floor,
                min_std=args.min_reward_std,
                power=args.advantage_power,
            )
            for chosen in rows or [[True] * len(self.rewards)]
        ]
        for i, group in enumerate(groups):
            group.advantages = torch.stack([result[i] for result in results]) if rows else results[0][i]

    def _log_groups(self, groups: Sequence[Group]) -> None:
        metrics = self._metrics[self._mode()]
        names = [reward.name for reward in self.rewards]
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
                parts = reward_parts(group, names, self.reward_weights, self.reward_regions)
                numbers = group_diagnostics(group, group.advantages, parts, self.args.named_regions)  # type: ignore[arg-type]
                for name, value in (numbers | variance_by_step(group)).items():
                    metrics[name].append(value)
            for j, region in enumerate(self.args.named_regions):
                own, advantages = group.region_scores[j], group.advantages[j]  # type: ignore[index]
                metrics[f"regions/{region}/reward"].append(float(own.nanmean()))
                if count > 1:
                    metrics[f"regions/{region}/reward_std"].append(spread(own))
                    taught = bool(advantages.any()) and bool(region_mask(group, region).any())
                    metrics[f"regions/{region}/frac_reward_zero_std"].append(float(not taught))
                    metrics[f"regions/{region}/advantage_std"].append(spread(advantages))
            if group.attention is not None:
                for measure in ("mass", "density", "contrast"):
                    metrics[f"attention/{measure}"].append(float(getattr(group.attention, measure).mean()))
        if self.args.log_completions:
            self._record_completions(groups, names)

    def _record_completions(self, groups: Sequence[Group], names: Sequence[str]) -> None:
        """Keep what the next log shows: of an update the first edits, of an evaluation always the same ones."""
        kept = self._completions[self._mode()]
        chosen = None if self.model.training else shown_rows(len(self._eval_rows()))
        for group in groups:
            draw = len(kept) < SHOWN if chosen is None else group.edit.row in chosen
            kept.append(record(group, names, self.args.named_regions, draw))

    def _log_completions(self, mode: str, prefix: str) -> None:
        """Write and show what was recorded on all processes since the last log."""
        groups = gather_object(self._completions[mode])
        self._completions[mode] = []
        if mode == "eval":  # the last batch is filled up with rows from the beginning
            groups = sorted({group.columns["edit"][0]: group for group in groups}.values(), key=lambda g: g.row)
        with failing_together(self.accelerator):
            if groups and self.is_world_process_zero():
                name, step = f"{prefix}completions", self.state.global_step
                picture = write_completions(Path(self.args.output_dir, "completions"), name, step, groups)
                if picture is not None:
                    show(picture, name, step, self.args.report_to, self.callback_handler.callbacks)

    # ------------------------------------------------------------------------------------------ update

    def _begin(
        self, edits: Sequence[Edit], num_generations: int, key: tuple[Any, ...], **options: Any
    ) -> tuple[list[Group], PendingScores]:
        """Groups of the edits, rolled out, whose scores are on their way."""
        groups = self.make_groups(edits, num_generations, key, **options)
        return groups, self._submit(groups)

    def _finish(
        self, groups: list[Group], pending: PendingScores, num_generations: int, key: tuple[Any, ...]
    ) -> list[Group]:
        """The groups, scored, and then those of the turns that follow on them."""
        played: list[Group] = []
        for turn in itertools.count(2):
            scored = self._take_scores(groups, pending)
            self._metrics[self._mode()]["rewards/failures"].append(float(len(scored.failures)))
            self.failures.update(scored)
            played += groups
            following = [self._next_edit(g.edit, best_candidate(g, self.reward_weights), turn) for g in groups]
            edits = [edit for edit in following if edit is not None]
            if not edits:
                break
            # Their sources are this turn's results, which no other rollout will see again.
            following_key = (*key, "turn", turn)
            groups, pending = self._begin(edits, num_generations, following_key, cache_sources=False)
        return played

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list[Any], Any]:
        """As the Trainer's; remembers the accumulation window, whose rollouts need not wait for each other's scores."""
        self._window, number = super().get_batch_samples(epoch_iterator, num_batches, device)
        return self._window, number

    def _prepare_inputs(self, inputs: list[tuple[int, dict[str, Any]]]) -> list[Group]:  # type: ignore[override]
        """Roll out and score a micro-batch of edits the first time, hand it back in later iterations."""
        args = self.args
        position = self._step % args.gradient_accumulation_steps
        cycle, iteration = divmod(self.state.global_step, args.num_iterations)
        if position == iteration == 0:
            self._buffer, self._old = [], []
            self._completions["train"] = []
        if position == len(self._buffer):  # a new cycle, or one that a resume entered in its middle
            size, key = args.num_generations, (args.seed, cycle)
            # Where the batch's spread counts, all of it is scored first; else an update runs beside the judges' work.
            whole = args.scale_rewards == "batch" or args.multi_objective_aggregation == "normalize_then_sum"
            with failing_together(self.accelerator):
                if not self._ahead:  # the whole window is rolled out while the judges work; weights stay as they are
                    for batch in self._window[position:] or [inputs]:
                        edits = [self.train_dataset.edit(index, row) for index, row in batch]
                        self._ahead.append(self._begin(edits, size, key))
                for _ in range(len(self._ahead) if whole else 1):
                    self._buffer.append(self._finish(*self._ahead.popleft(), size, key))
                    self._old.append({})
            groups = [group for played in self._buffer[position:] for group in played]
            others = self._rewards_elsewhere(groups) if whole else []
            with failing_together(self.accelerator):
                self._compare(groups, others)
                self._log_groups(groups)
        return self._buffer[position]

    def _rewards_elsewhere(self, groups: Sequence[Group]) -> list[Tensor]:
        """Rewards of the groups that the other processes scored, while this one scored these."""
        ranks: list[list[Tensor]] = gather_object([[group.rewards for group in groups]])
        del ranks[self.accelerator.process_index]
        return list(itertools.chain(*ranks))

    def compute_loss(  # type: ignore[override]
        self, model: nn.Module, inputs: Transitions, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """The policy's loss, the mean over a micro-batch of transitions; fills in `old`."""
        velocity = self.editor.velocity(model, inputs.latents, inputs.timestep, inputs.conditions)
        loss, numbers = self.policy.loss(velocity, inputs)
        metrics, args = self._metrics["train"], self.args
        if args.beta:
            with torch.no_grad(), self.accelerator.unwrap_model(model).disable_adapter():
                reference = self.editor.velocity(model, inputs.latents, inputs.timestep, inputs.conditions)
            kl = velocity_kl(velocity, reference, region_weights(inputs.region, args.beta_keep))
            numbers["kl"] = float(kl.detach().mean())
            loss = loss + args.beta * kl * inputs.taught
        if args.reward_gradient_weight:
            clean = predict_clean(inputs.latents, velocity, inputs.sigma)
            values = self._differentiable_rewards(clean, inputs)
            numbers["reward_of_prediction"] = float(values.detach().mean())
            loss = loss - args.reward_gradient_weight * values * inputs.taught
        if args.keep_hinge_weight:
            clean = predict_clean(inputs.latents, velocity, inputs.sigma)
            hinge = keep_hinge(clean, inputs.conditions.image_latents, inputs.region, args.keep_hinge_margin)
            numbers["keep_hinge"] = float(hinge.detach().mean())
            loss = loss + args.keep_hinge_weight * hinge * inputs.taught
        for name, value in numbers.items():
            metrics[name].append(value)
        return loss.mean()

    def _differentiable_rewards(self, clean: Tensor, inputs: Transitions) -> Tensor:
        """The weighted sum of the rewards that have a gradient on clean latents, `[B]`; 0 where none applies.

        With region advantages a reward reaches the pixels of its own region alone: the others are constants to it.
        """
        groups = inputs.groups
        pictures = self.editor.decode_tensor(clean, *groups[0].size)
        masks = [group.mask for group in groups]
        inside = torch.stack([mask_to_tensor(mask) for mask in masks]).unsqueeze(1).to(pictures)
        names = set.intersection(*(set(group.edit.columns) for group in groups))
        columns = {name: [group.edit.columns[name] for group in groups] for name in sorted(names)}
        columns |= {"prompts": [group.edit.prompt for group in groups], "source_images": [g.source for g in groups]}
        total = torch.zeros(len(groups), device=clean.device)
        regions: list[str | None] = [*self.reward_regions] or [None] * len(self.rewards)
        for reward, weight, region in zip(self.rewards, self.reward_weights.tolist(), regions, strict=True):
            if reward.differentiable is None or not weight:
                continue
            shown = pictures
            if region is not None:
                own = 1 - inside if region == "keep" else inside
                shown = pictures.detach().lerp(pictures, own)
            values = reward.differentiable(shown, masks=masks, **columns).to(total)
            total = total + weight * values.nan_to_num(0.0)
        return total

    def training_step(  # type: ignore[override]
        self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None
    ) -> Tensor:
        """One micro-step: rollout (or buffer), then backward through the transitions in micro-batches."""
        began = time.perf_counter()
        model.train()
        if hasattr(self.optimizer, "train") and callable(self.optimizer.train):  # schedule-free ones have modes
            self.optimizer.train()
        groups = self._prepare_inputs(inputs)
        args, known = self.args, self._old[self._step % self.args.gradient_accumulation_steps]
        key = (args.seed, self.state.global_step // args.num_iterations)
        chosen = choose(groups, self.policy, args.num_anchors, args.num_policy_steps, args.policy_step_indices, key)
        batches = micro_batches(groups, chosen, args.train_micro_batch_size)
        # A mean over edits, whether their groups are dropped or further turns follow, so that it is the same however
        # edits are spread over micro-steps and ranks.
        size = len(inputs) * args.num_anchors * args.num_policy_steps
        total = torch.zeros((), device=self.accelerator.device)
        for i, where in enumerate(batches, start=1):
            transitions = gather(groups, where, self.policy, known)
            # Gradients travel between processes once, with the last micro-batch.
            with nullcontext() if i == len(batches) else self.accelerator.no_sync(model):
                with self.compute_loss_context_manager():
                    loss = self.compute_loss(model, transitions) * len(where) / size
                total += loss.detach()
                if i == len(batches):  # the one place that all processes come to, however many micro-batches they have
                    with failing_together(self.accelerator):
                        self._refuse_non_finite(total, groups)
                self.accelerator.backward(loss / self.current_gradient_accumulation_steps)
            known.update(zip(where, transitions.old, strict=True))  # type: ignore[arg-type]
        self._step += 1
        self._metrics["train"]["step_time"].append(time.perf_counter() - began)
        return total / self.current_gradient_accumulation_steps

    def _refuse_non_finite(self, loss: Tensor, groups: Sequence[Group]) -> None:
        if not bool(torch.isfinite(loss)):
            rows = ", ".join(group.edit.label for group in groups)
            raise FloatingPointError(
                f"loss: got {float(loss)} at step {self.state.global_step} on {rows}, expected a finite "
                "number; lower learning_rate, or train in bf16 instead of fp16"
            )

    # ------------------------------------------------------------------------------------------ evaluation, log

    @torch.no_grad()
    def prediction_step(  # type: ignore[override]
        self, model: nn.Module, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[None, None, None]:
        """Roll out and score held-out edits, always from the same noise."""
        size, key = self.args.num_generations_eval, (self.args.seed, "eval")
        with failing_together(self.accelerator):
            edits = [self._eval_rows().edit(index, row) for index, row in inputs]
            groups = self._finish(*self._begin(edits, size, key), size, key)
            self._compare(groups)
            self._log_groups(groups)
        return None, None, None

    def _eval_rows(self) -> EditRows:
        rows: Any = self.callback_handler.eval_dataloader.dataset
        return rows

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """As `Trainer.evaluate`, on rows like the trainer's."""
        self._eval_prefix = f"{metric_key_prefix}_"
        if eval_dataset is not None and not isinstance(eval_dataset, EditRows | str):
            eval_dataset = self._make_rows(eval_dataset, "eval", self.args)
            self._check_played(eval_dataset)
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        return {**metrics, **self._last_eval_metrics}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        mode = "eval" if any(key.startswith(self._eval_prefix) for key in logs) else "train"
        prefix = self._eval_prefix if mode == "eval" else ""
        # Processes may have logged other names, or another number of values, than this one.
        gathered: dict[str, list[float]] = defaultdict(list)
        for metrics in gather_object([dict(self._metrics[mode])]):
            for name, values in metrics.items():
                gathered[name] += [value for value in values if value == value]
        averaged = {prefix + name: sum(values) / len(values) for name, values in gathered.items() if values}
        if mode == "eval":
            self._last_eval_metrics = averaged
        logs.update(averaged)
        for counts in gather_object([fault_counts(self.rewards)]):  # since the start, over all processes
            for name, number in counts.items():
                logs[prefix + name] = logs.get(prefix + name, 0) + number
        self._metrics[mode].clear()
        super().log(logs, start_time)
        if self.args.log_completions:
            self._log_completions(mode, prefix)

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        self._step, self._buffer, self._old = 0, [], []
        self._window, self._ahead = [], deque()
        return super()._inner_training_loop(*args, **kwargs)
