"""What a run says of itself while it trains: numbers of groups and updates, merged over processes, and candidates.

Where it fits: the trainer's base class above saving; it sees groups when they are scored, and knows nothing of how they
were made. What one group tells is `groups.group_log`'s business.

Gotchas: training and evaluation gather their numbers apart. Processes may have other names, or more values, than this
one, so a mean is taken over all values and not over processes.
"""

import copy
import logging
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from huggingface_hub import CommitScheduler, create_repo
from torch import Tensor
from torch.utils.data import Subset

from ..data.edits import EditRows
from ..groups.group_log import group_log
from ..groups.outcomes import Outcome, by_task, means
from ..groups.policies import CLIPPED_AGAIN
from ..groups.rollout import Group
from ..groups.scoring import GroupScoring
from ..reporting.learning_curve import EDITS
from ..rewards import FailureWatch, Reward, ScoredBatch, failing_together, fault_counts
from .completions import SHOWN, Completions, record, show, shown_rows, write_completions
from .config import RCGRPOConfig
from .saving import SavingTrainer

logger = logging.getLogger(__name__)

NEARLY_ALL = 0.7
"""Share of clipped candidates of which a warning is given: the others mostly moved against their advantage."""


class LoggingTrainer(SavingTrainer):
    """Gathers numbers and candidates, and hands their means to the Trainer's log."""

    args: RCGRPOConfig
    scoring: GroupScoring
    failures: FailureWatch

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self._metrics: dict[str, dict[str, list[float]]] = {"train": defaultdict(list), "eval": defaultdict(list)}
        self._diagnoses: dict[str, list[Future[list[dict[str, Any]]]]] = defaultdict(list)
        self._beside = ThreadPoolExecutor(1, thread_name_prefix="rcgrpo-diagnoses")
        self._completions: dict[str, list[Completions]] = {"train": [], "eval": []}
        self._outcomes: list[Outcome] = []
        self._eval_prefix = "eval_"
        self._last_eval_metrics: dict[str, float] = {}
        self._warned_of_clipping = False
        if self.args.log_completions_hub_repo and self.is_world_process_zero():
            self._mirror = mirrored(Path(self.args.output_dir, "completions"), self.args)

    # ------------------------------------------------------------------------------------------ the rewards

    @property
    def rewards(self) -> list[Reward]:  # type: ignore[override]
        """What scores candidates."""
        return self.scoring.rewards

    @rewards.setter
    def rewards(self, rewards: list[Reward]) -> None:
        self.scoring.rewards = rewards

    @property
    def reward_weights(self) -> Tensor:
        """Of the rewards, `[rewards]`."""
        return self.scoring.weights

    @reward_weights.setter
    def reward_weights(self, weights: Tensor) -> None:
        self.scoring.weights = weights

    @property
    def reward_regions(self) -> list[str]:
        """With region advantages, the region of each reward; else none."""
        return self.scoring.reward_regions

    @reward_regions.setter
    def reward_regions(self, regions: list[str]) -> None:
        self.scoring.reward_regions = regions

    @property
    def extra_columns(self) -> dict[str, list[Any]]:
        """What rewards logged with `log_extra` on the latest batch, one entry per candidate."""
        return dict(self.scoring.extra_columns)

    # ------------------------------------------------------------------------------------------ what is gathered

    def _mode(self) -> str:
        return "train" if self.model.training else "eval"

    def _log_metric(self, name: str, value: float) -> None:
        """For rewards: average a number into the log."""
        self._metrics[self._mode()][name].append(float(value))

    def forget_metrics(self) -> None:
        """Drop what was measured since the last log, for scores that belong to no step of the run."""
        self.scoring.extra_columns = {}
        self._diagnoses.clear()
        self._outcomes = []
        for metrics in self._metrics.values():
            metrics.clear()

    def _watch(self, groups: Sequence[Group], scored: ScoredBatch) -> None:
        """Count what failed; the counts of silence are logged once there has been a failure."""
        metrics = self._metrics[self._mode()]
        metrics["rewards/failures"].append(float(len(scored.failures)))
        self.failures.update(scored)
        if self.model.training:
            self.failures.update_scores(any(not bool(group.scores.isnan().all()) for group in groups))  # type: ignore[union-attr]
        if any(self.failures.counts.values()) or self.failures.unscored:
            metrics["groups/unscored_batches"].append(float(self.failures.unscored))
        for name, number in self.failures.counts.items():
            if number:
                metrics[f"rewards/{name}/silent_batches"].append(float(self.failures.silent[name]))

    def _log_groups(self, groups: Sequence[Group]) -> None:
        """Numbers of the groups: made beside the update, which they would hold up, and taken by the next log."""
        scoring, device = copy.copy(self.scoring), self.accelerator.device

        def told() -> list[dict[str, float | list[float]]]:
            with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
                return [group_log(group, scoring) for group in groups]

        self._diagnoses[self._mode()].append(self._beside.submit(told))
        if self.args.log_completions:
            self._record_completions(groups)

    def _take_diagnoses(self, mode: str) -> None:
        with failing_together(self.accelerator, can_stop=False):
            for diagnosis in self._diagnoses.pop(mode, ()):
                for numbers in diagnosis.result():
                    for name, value in numbers.items():
                        self._metrics[mode][name] += value if isinstance(value, list) else [value]

    def _record_completions(self, groups: Sequence[Group]) -> None:
        """Keep what the next log shows: of an update the first edits, of an evaluation always the same ones."""
        kept, names = self._completions[self._mode()], [reward.name for reward in self.rewards]
        chosen = None
        if not self.model.training:
            seen = self._eval_rows()[1]
            chosen = {seen[i] for i in shown_rows(len(seen))}
        for group in groups:
            drawn = [each.columns["prompt"][0] for each in kept if each.pictures]
            draw = len(drawn) < SHOWN if chosen is None else group.edit.row in chosen
            draw &= not (self.args.log_unique_prompts and group.edit.prompt in drawn)
            kept.append(record(group, names, self.args.named_regions, draw))

    def _eval_rows(self) -> tuple[EditRows, Sequence[int]]:
        """What is being evaluated, and which rows of it."""
        rows: Any = self.callback_handler.eval_dataloader.dataset
        return (rows.dataset, rows.indices) if isinstance(rows, Subset) else (rows, range(len(rows)))

    # ------------------------------------------------------------------------------------------ what is logged

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        mode = "eval" if any(key.startswith(self._eval_prefix) for key in logs) else "train"
        prefix = self._eval_prefix if mode == "eval" else ""
        self._take_diagnoses(mode)
        averaged = {prefix + name: value for name, value in averages(self._metrics[mode]).items()}
        found = self._gathered_outcomes() if mode == "eval" else []
        if mode == "eval":
            for task, some in {"": found, **by_task(found)}.items():
                averaged = means(some, prefix + (f"{task}/" if task else "")) | averaged
            self._last_eval_metrics = averaged
        logs.update(averaged)
        for counts in gather_object([fault_counts(self.rewards)]):  # since the start, over all processes
            for name, number in counts.items():
                logs[prefix + name] = logs.get(prefix + name, 0) + number
        self._metrics[mode].clear()
        if mode == "train":
            self._warn_of_clipping(averaged.get(CLIPPED_AGAIN, 0.0))
        super().log(logs, start_time)
        if found and self.is_in_train:  # in the Trainer's state, hence in checkpoints; trackers got the means alone
            self.state.log_history[-1][prefix + EDITS] = {name: [one[name] for one in found] for name in found[0]}
        if self.args.log_completions:
            self._log_completions(mode, prefix)

    def _gathered_outcomes(self) -> list[Outcome]:
        """Of all processes, by row; the last batch is filled up with rows from the beginning, which count once."""
        found, self._outcomes = gather_object(self._outcomes), []
        return sorted({one["row"]: one for one in found}.values(), key=lambda one: one["row"])

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

    def _warn_of_clipping(self, share: float) -> None:
        if share > NEARLY_ALL and not self._warned_of_clipping and self.is_world_process_zero():
            self._warned_of_clipping = True
            logger.warning(
                "epsilon: the clip took away the gradient of %.0f %% of the candidates in updates after a rollout's "
                "first, which then teach next to nothing (%s); raise epsilon, lower learning_rate, or set "
                "num_iterations to 1",
                100 * share,
                CLIPPED_AGAIN,
            )


def mirrored(folder: Path, args: RCGRPOConfig) -> CommitScheduler:
    """Send a folder to the data set `args.log_completions_hub_repo`, made if it is missing, every two minutes and at
    the end of the process."""
    create_repo(args.log_completions_hub_repo, repo_type="dataset", private=args.hub_private_repo, exist_ok=True)  # type: ignore[arg-type]
    folder.mkdir(parents=True, exist_ok=True)
    return CommitScheduler(
        repo_id=args.log_completions_hub_repo,  # type: ignore[arg-type]
        repo_type="dataset",
        folder_path=folder,
        every=2,
        allow_patterns=["*.parquet", "*.jpg"],
    )


def averages(metrics: dict[str, list[float]]) -> dict[str, float]:
    """Means over the values of all processes that are not NaN; a name without any is left out. Takes every process."""
    gathered: dict[str, list[float]] = defaultdict(list)
    for some in gather_object([dict(metrics)]):
        for name, values in some.items():
            gathered[name] += [value for value in values if value == value]
    return {name: sum(values) / len(values) for name, values in gathered.items() if values}
