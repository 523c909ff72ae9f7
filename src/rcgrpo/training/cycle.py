"""The generation cycle: roll out, score, compare, and keep for as many updates as a rollout serves.

Where it fits: the base class between the log and the update. Edits come in as rows, groups with advantages go out; what
an update does with them is the trainer's business.

Gotchas: a cycle is one gradient-accumulation window, all of which is rolled out while the judges work on its beginning,
and it is repeated `num_iterations` times. What is kept between repetitions is not in checkpoints, hence `save_steps`
must be a multiple of it, and a signal stops a run at the end of a cycle. Several processes only wait for each other
outside `failing_together`; for a sharded model's forwards they do inside, in `rolling_out`.
"""

import dataclasses
import itertools
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.utils.data import Subset
from trl.trainer.utils import RepeatSampler

from ..data.edits import Edit, EditRows
from ..editors.base import FlowEditor
from ..groups.outcomes import outcomes
from ..groups.rollout import Exploration, Group, make_groups
from ..groups.transitions import Where
from ..groups.turns import best_candidate
from ..processes.lockstep import Lockstep
from ..rewards import PendingScores, ScoredBatch, failing_together
from .rows import check_played, each_set, following_turn, make_rows, some_rows
from .run_log import LoggingTrainer


class CycleSampler(RepeatSampler):
    """TRL's sampler, with a new permutation each epoch that does not depend on how often it was iterated before."""

    def set_epoch(self, epoch: int) -> None:
        if self.shuffle:
            self.generator.manual_seed(self.seed + epoch)


class GeneratingTrainer(LoggingTrainer):
    """Makes groups of edits, in training with the current weights, in evaluation always from the same noise."""

    editor: FlowEditor
    exploration: Exploration
    _eval_editor: FlowEditor
    _records_attention: bool
    _lockstep: Lockstep | None = None

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self._begin_cycles()

    def _begin_cycles(self) -> None:
        self._step = 0
        self._buffer: list[list[Group]] = []
        self._old: list[dict[Where, Tensor]] = []
        self._window: list[Any] = []
        self._ahead: deque[tuple[list[Group], PendingScores]] = deque()

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        self._begin_cycles()
        return super()._inner_training_loop(*args, **kwargs)

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

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list[Any], Any]:
        """As the Trainer's; remembers the accumulation window, whose rollouts need not wait for each other's scores."""
        self._window, number = super().get_batch_samples(epoch_iterator, num_batches, device)
        return self._window, number

    # ------------------------------------------------------------------------------------------ groups

    @contextmanager
    def rolling_out(self) -> Iterator[None]:
        """For whatever makes groups: as `failing_together`, and of a sharded model in step with the other processes."""
        lockstep = self._lockstep
        with (
            failing_together(self.accelerator, can_stop=lockstep is None),  # else only between two forwards
            nullcontext() if lockstep is None else lockstep.stretch(),
        ):
            yield

    def make_groups(
        self,
        edits: Sequence[Edit],
        num_generations: int,
        key: tuple[Any, ...],
        maps: bool = False,
        cache_sources: bool = True,
    ) -> list[Group]:
        """Roll out candidates of each edit with the current weights; see `groups.rollout.make_groups`."""
        args = self.args
        training = self.model.training
        editor, exploration = self.editor, self.exploration
        if not training:  # along the ODE, whatever noise training injects, and with its own number of steps
            editor, exploration = self._eval_editor, dataclasses.replace(exploration, noise_level=0.0)
        self.model.eval()
        groups = make_groups(
            editor,
            self.model_wrapped if self._lockstep is None else self._lockstep.calling(self.model_wrapped),
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

    def score_groups(self, groups: Sequence[Group]) -> ScoredBatch:
        """Fill in rewards, scores and advantages of freshly rolled-out groups; warn of candidates without a score."""
        scored = self._take_scores(groups, self._submit(groups))
        self.scoring.compare(groups)
        return scored

    def _submit(self, groups: Sequence[Group], labels: list[str] | None = None) -> PendingScores:
        """Begin to score the groups' candidates."""
        return self.scoring.begin(groups, labels, trainer_state=self.state, log_metric=self._log_metric)

    def _take_scores(self, groups: Sequence[Group], pending: PendingScores) -> ScoredBatch:
        """Fill in rewards and scores."""
        metrics, asked = self._metrics[self._mode()], time.perf_counter()
        scored = self.scoring.receive(pending)
        metrics["step_time/scoring"].append(pending.ended - pending.started)  # type: ignore[operator]
        metrics["step_time/scoring_waited"].append(time.perf_counter() - asked)
        self.scoring.fill_in(groups, scored)
        return scored

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
            self._watch(groups, scored)
            played += groups
            following = [
                following_turn(group.edit, best_candidate(group, self.reward_weights), turn, self.args)
                for group in groups
            ]
            edits = [edit for edit in following if edit is not None]
            if not edits:
                break
            # Their sources are this turn's results, which no other rollout will see again.
            following_key = (*key, "turn", turn)
            groups, pending = self._begin(edits, num_generations, following_key, cache_sources=False)
        return played

    # ------------------------------------------------------------------------------------------ training

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
            whole = self.scoring.spans_the_batch
            with self.rolling_out():
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
                self.scoring.compare(groups, others)
                self._log_groups(groups)
        return self._buffer[position]

    def _rewards_elsewhere(self, groups: Sequence[Group]) -> list[Tensor]:
        """What is compared of the groups that the other processes scored, while this one scored these."""
        ranks: list[list[Tensor]] = gather_object([[group.compared for group in groups]])
        del ranks[self.accelerator.process_index]
        return list(itertools.chain(*ranks))

    # ------------------------------------------------------------------------------------------ evaluation

    @torch.no_grad()
    def prediction_step(  # type: ignore[override]
        self, model: nn.Module, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[None, None, None]:
        """Roll out and score held-out edits, always from the same noise."""
        size, key = self.args.num_generations_eval, (self.args.seed, "eval")
        with self.rolling_out():
            edits = [self._eval_rows()[0].edit(index, row) for index, row in inputs]
            groups = self._finish(*self._begin(edits, size, key), size, key)
            self.scoring.compare(groups)
            self._log_groups(groups)
            self._outcomes += outcomes(groups[: len(edits)])  # of the first turn
        return None, None, None

    def _rows(self, dataset: Any, name: str) -> EditRows | None:
        """As far as they can be checked without an editor."""
        return make_rows(dataset, name, self.args, self.rewards, self.exploration)

    def _played_rows(self, dataset: Any, name: str) -> EditRows | None:
        rows = dataset if isinstance(dataset, EditRows) else self._rows(dataset, name)
        check_played(rows, self.args, self.exploration, self.editor)
        return rows

    def _evaluate(self, trial: Any, ignore_keys_for_eval: Any, skip_scheduler: bool = False) -> dict[str, float]:
        if skip_scheduler and self.state.global_step:  # eval_on_start, of a run that went on: its start lies behind it
            return {}
        return super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """As `Trainer.evaluate`, on rows like the trainer's, or several sets of them; in training on some of them."""
        self._eval_prefix = f"{metric_key_prefix}_"
        if eval_dataset is not None and not isinstance(eval_dataset, EditRows | str):
            eval_dataset = each_set(eval_dataset, self._played_rows)
        elif self.is_in_train:  # on the run's own, or one of its own by name
            rows: Any = self.eval_dataset if eval_dataset is None else self.eval_dataset[eval_dataset]
            if isinstance(rows, EditRows):
                eval_dataset = Subset(rows, some_rows(len(rows), self.args.num_eval_edits))
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        return {**metrics, **self._last_eval_metrics}
