"""Stopping and going on: a run that is killed, preempted or finished starts again with the same command.

Where it fits: `saving.SavingTrainer` adds what weights and cards look like on disk; `checkpoints` knows when a
checkpoint is whole, `processes.stopping` what a signal does.

Gotchas: on several processes every decision is one process's, handed to the others, and saving takes them all; what is
kept between the `num_iterations` of a cycle is not in checkpoints, so a run stops at the end of a cycle where it can.
"""

import json
import logging
import math
import os
import shutil
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from peft import PeftModel
from torch import nn
from transformers import TrainerState
from transformers.trainer import OPTIMIZER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput
from trl.trainer.base_trainer import _BaseTrainer

from ..processes.stopping import Interrupted, Stopped, StopSignals, leave_in_time, stopped
from ..rewards import agreed, failing_together, is_agreed
from . import checkpoints
from .checkpoints import UNFINISHED, CheckpointError
from .sharding import local, spread_optimizer_state, whole_state, whole_weights

logger = logging.getLogger(__name__)

ADAPTER_CONFIG = "adapter_config.json"
SHAPING = (
    *("r", "lora_alpha", "target_modules", "exclude_modules", "rank_pattern", "alpha_pattern", "use_rslora"),
    *("use_dora", "layers_to_transform", "layers_pattern"),
)
"""Fields of a LoRA's configuration that its weights go with."""


class ResumingTrainer(_BaseTrainer):
    """TRL's base trainer whose checkpoints are whole or not there, which saves before it stops, and goes on."""

    _writing = _gathered = False

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:  # type: ignore[override]
        """As `Trainer.train`, for job scripts that are stopped and started again.

        SIGTERM and SIGINT let the update end, save a checkpoint and raise `SystemExit(128 + n)`, for SIGINT one that
        `except KeyboardInterrupt` catches; at a second signal, or after ten seconds, the run stops within the update
        and saves what the last one left. Any other stop saves too.

        Args:
            resume_from_checkpoint: True for the newest checkpoint in `output_dir` of which all can be read, with a
                warning about newer ones, and from the start where there is none; or a checkpoint's path. One that has
                `max_steps` behind it is loaded, and nothing is trained.

        Raises:
            ValueError: the checkpoint of that path is not whole, or belongs to another LoRA, model or optimizer.
            CheckpointError: a checkpoint could not be written; earlier ones are as they were.
        """
        checkpoint = self._settle(resume_from_checkpoint)
        # Until the first new update there is nothing to save: not while resuming, nor what an earlier call left.
        self._last_saved = self.state.global_step = 0 if checkpoint is None else checkpoints.step_of(checkpoint)
        if checkpoint is not None:
            self._check_fits(Path(checkpoint))
            self._warn_in_mid_cycle(Path(checkpoint), self._last_saved)
            if self._last_saved >= self._steps_to_take():
                return self._finished(checkpoint)
        with StopSignals() as self._signals:
            try:
                result = super().train(resume_from_checkpoint=checkpoint, **kwargs)
                if self.args.load_best_model_at_end:  # the weights are not those of the last step any more
                    self._last_saved = self.state.global_step
                self._stop_if_asked(at_once=True)
                return result
            except BaseException as error:
                self._signals.reacted()
                told = self._save_before_stopping(error)
                if isinstance(error, Stopped):
                    self._leave(error, told)
                raise

    def close(self) -> None:
        """Take the process group of a launch down, at the end of a script; without one nothing happens.

        A process that leaves with gloo's threads at work may abort on its way out. The wrapped model goes first, as it
        keeps the group and its threads alive.
        """
        self.model_wrapped = self.model
        self.accelerator.free_memory()
        self.accelerator.end_training()

    # ------------------------------------------------------------------------------------------ stopping

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        super()._maybe_log_save_evaluate(*args, **kwargs)
        self._stop_if_asked()

    def _stop_if_asked(self, at_once: bool = False) -> None:
        """After an update, on every process: stop if one of them has had a signal, at the end of a cycle if possible.

        Raises:
            Stopped: the same on all.
        """
        number, overdue = self._signals.number, self._signals.overdue
        if self.accelerator.num_processes > 1:
            asked = torch.tensor([[number, int(overdue)]], device=self.accelerator.device)
            number, overdue = self.accelerator.gather(asked).amax(0).tolist()
        if number and (at_once or overdue or self.state.global_step % self.args.num_iterations == 0):
            raise agreed(stopped(number))

    def _save_before_stopping(self, error: BaseException) -> str:
        """Save what was trained since the last checkpoint; says what became of it."""
        step, folder = self.state.global_step, self.args.output_dir
        # Saving takes every process. Where one failed alone, the others wait elsewhere; its end is theirs.
        together = self.accelerator.num_processes == 1 or is_agreed(error)
        if step > self._last_saved and together and not isinstance(error, CheckpointError):
            if not isinstance(error, Stopped):
                logger.error("%s: saving checkpoint-%d before stopping", type(error).__name__, step)
            try:
                self._save_checkpoint(self.model, trial=None)
            except (FloatingPointError, OSError, RuntimeError) as refused:
                if not isinstance(error, Stopped):
                    logger.error("%s", refused)
                return f"nothing was saved: {refused}"
        if not self._last_saved:
            return "there is no checkpoint yet"
        return (
            f"{PREFIX_CHECKPOINT_DIR}-{self._last_saved} in {folder} has it; go on with resume_from_checkpoint=True "
            "(--resume_from_checkpoint true)"
        )

    def _leave(self, error: Stopped, told: str) -> None:
        """Say it, and see to it that the process ends."""
        if self.is_world_process_zero():
            start = "" if self.args.disable_tqdm else "\n"
            print(f"{start}{error}: stopped after step {self.state.global_step}; {told}", file=sys.stderr, flush=True)
        if hasattr(sys, "ps1"):  # a notebook stays
            if isinstance(error, Interrupted):
                raise KeyboardInterrupt from None
            return
        if self.accelerator.num_processes > 1:
            self.close()
        leave_in_time(int(error.code))  # type: ignore[arg-type]

    # ------------------------------------------------------------------------------------------ going on

    def _settle(self, asked: str | bool | None) -> str | None:
        """The checkpoint to go on from, the same on every process; leftovers of writers that were killed go.

        Raises:
            ValueError: there is no whole checkpoint at the path that was asked for.
        """
        found: list[Any] = [None, ""]
        folder = Path(self.args.output_dir)
        if self.args.should_save:
            checkpoints.clear_leftovers(folder)
        if self.is_world_process_zero():
            try:
                if asked is True:
                    found[0], passed = checkpoints.newest_whole(folder)
                    for name, wrong in passed.items():
                        logger.warning("resume_from_checkpoint: %s in %s is passed over: %s", name, folder, wrong)
                    if found[0] is None:
                        logger.warning("resume_from_checkpoint: no whole checkpoint in %s, so from the start", folder)
                    else:
                        found[0] = str(found[0])
                elif asked:
                    checkpoints.require_whole(asked)
                    found[0] = str(asked)
            except ValueError as error:
                found[1] = str(error)
        checkpoint, wrong = broadcast_object_list(found)
        if wrong:
            raise ValueError(wrong)
        return checkpoint

    def _steps_to_take(self) -> int:
        """The updates of the whole run."""
        args = self.args
        if args.max_steps > 0:
            return args.max_steps
        updates = len(self.get_train_dataloader()) // args.gradient_accumulation_steps
        return math.ceil(args.num_train_epochs * max(updates, 1))

    def _finished(self, checkpoint: str) -> TrainOutput:
        """A run that has all its steps behind it: its weights and its state, and no update."""
        self._load_from_checkpoint(checkpoint)
        self.state = TrainerState.load_from_json(os.path.join(checkpoint, TRAINER_STATE_NAME))
        best = self.state.best_model_checkpoint
        if self.args.load_best_model_at_end and best is not None and os.path.isdir(best):
            self._load_best_model()
        step = self.state.global_step
        if self.is_world_process_zero():
            logger.warning("%s has all %d steps behind it: nothing is left to train", checkpoint, step)
        return TrainOutput(step, 0.0, {"train_loss": 0.0})

    def _check_fits(self, checkpoint: Path) -> None:
        """Refuse a checkpoint of another LoRA.

        Raises:
            ValueError: naming the field, its value now and then, and what to do.
        """
        model, again = self.accelerator.unwrap_model(self.model), "set it back, or train anew in another output_dir"
        adapter = model.active_adapter if isinstance(model, PeftModel) else "default"
        file = checkpoint / ("" if adapter == "default" else adapter) / ADAPTER_CONFIG
        if isinstance(model, PeftModel) != file.exists():
            ours, theirs = ("a LoRA", "a whole transformer") if not file.exists() else ("none", "a LoRA")
            raise ValueError(f"peft_config: got {ours}, expected {theirs} as in {checkpoint}; {again}")
        if not file.exists():
            return
        then, now = json.loads(file.read_text()), model.peft_config[adapter].to_dict()
        for name in SHAPING:
            if name in then and _plain(then[name]) != _plain(now.get(name)):
                got, expected = _plain(now.get(name)), _plain(then[name])
                raise ValueError(f"peft_config.{name}: got {got!r}, expected {expected!r} as in {checkpoint}; {again}")

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        ours, theirs = self._optimizer_name(), checkpoints.read_seal(checkpoint).get("optimizer", "its own optimizer")
        if not Path(checkpoint, OPTIMIZER_NAME).exists():
            if self.is_world_process_zero():
                logger.warning(
                    "%s has no optimizer state (save_only_model): its weights go on with a new %s, at its place in the "
                    "learning-rate schedule; the run is not the same bit by bit",
                    checkpoint,
                    ours,
                )
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the scheduler steps without its optimizer
                for _ in range(self.state.global_step):
                    self.lr_scheduler.step()
            return
        other = ValueError(
            f"optim: got {ours}, expected {theirs}, whose state {checkpoint} has; set it back, or train anew in "
            "another output_dir"
        )
        if theirs not in (ours, "its own optimizer"):
            raise other
        if self.args.shard_model:
            self._bare_optimizer().register_load_state_dict_pre_hook(spread_optimizer_state)
        try:
            super()._load_optimizer_and_scheduler(checkpoint)
        except (ValueError, KeyError) as error:
            raise other from error

    def _optimizer_name(self) -> str:
        """Its class, as several values of `optim` give the same one."""
        kind = type(self._bare_optimizer())
        return f"{kind.__module__.removesuffix('.' + kind.__name__.lower())}.{kind.__qualname__}"

    def _warn_in_mid_cycle(self, checkpoint: Path, step: int) -> None:
        """Say it where a resume from here is not bit-exact: the cycle's rollouts are not in checkpoints."""
        cycle = self.args.num_iterations
        if step % cycle and self.is_world_process_zero():
            whole = [
                s
                for s, path in checkpoints.by_step(checkpoint.parent).items()
                if s < step and s % cycle == 0 and checkpoints.fault(path) is None
            ]
            last = f"{PREFIX_CHECKPOINT_DIR}-{max(whole)} is" if whole else "no earlier checkpoint is"
            logger.warning(
                "%s is in the middle of a cycle (num_iterations=%d): a resume from it rolls out again, which is sound "
                "but not bit-exact; %s at the end of a whole cycle",
                checkpoint,
                cycle,
                last,
            )

    # ------------------------------------------------------------------------------------------ saving

    def _get_output_dir(self, trial: Any) -> str:
        folder = super()._get_output_dir(trial)
        return os.path.join(folder, UNFINISHED) if self._writing else folder

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """As the Trainer's; what it wrote becomes a checkpoint at once, when every process has written its part.

        Raises:
            CheckpointError: it could not be written.
            FloatingPointError: the weights are not finite.
        """
        state, step = self.state, self.state.global_step
        folder, name = Path(self._get_output_dir(trial)), f"{PREFIX_CHECKPOINT_DIR}-{step}"
        unfinished, best = folder / UNFINISHED / name, state.best_global_step
        with failing_together(self.accelerator, can_stop=False):
            self._refuse_non_finite_weights()
            if self.args.should_save:
                shutil.rmtree(folder / UNFINISHED, ignore_errors=True)
        # With a best step the Trainer would look for it in the unfinished folder, and wait for the other processes.
        self._writing, state.best_global_step = True, None
        try:
            with (
                self._whole(with_optimizer=not self.args.save_only_model),
                failing_together(self.accelerator, can_stop=False),
                _writing_to(folder, name),
            ):
                super()._save_checkpoint(model, trial)
        finally:
            self._writing, state.best_global_step = False, best
        of_best = folder / f"{PREFIX_CHECKPOINT_DIR}-{best}"
        if best and (best == step or of_best.exists()):
            state.best_model_checkpoint = str(of_best)
        keep = {name, *([Path(state.best_model_checkpoint).name] if state.best_model_checkpoint else [])}
        with failing_together(self.accelerator, can_stop=False), _writing_to(folder, name):
            if self.args.should_save:
                state.save_to_json(str(unfinished / TRAINER_STATE_NAME))
                checkpoints.seal(unfinished, self._facts())
                checkpoints.publish(unfinished)
                checkpoints.rotate(folder, self.args.save_total_limit, keep)
        self._last_saved = step
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(folder / name))
        self._warn_in_mid_cycle(folder / name, step)

    @contextmanager
    def _whole(self, with_optimizer: bool = False) -> Iterator[None]:
        """For saving, on every process: what is sharded is gathered beforehand, and writing waits for nobody."""
        if not self.args.shard_model or self._gathered:
            yield
            return
        self._gathered = True
        try:
            with whole_weights(self.model), whole_state(self._bare_optimizer()) if with_optimizer else nullcontext():
                yield
        finally:
            self._gathered = False

    def _bare_optimizer(self) -> Any:
        return getattr(self.optimizer, "optimizer", self.optimizer)  # accelerate wraps it

    def _facts(self) -> dict[str, Any]:
        """What a checkpoint's seal says besides its files."""
        return {"optimizer": self._optimizer_name()}

    def _refuse_non_finite_weights(self) -> None:
        """Before a checkpoint is written, as a newer one takes the place of a good one."""
        for name, weight in self.accelerator.unwrap_model(self.model).named_parameters():
            if weight.requires_grad and not bool(local(weight.detach()).isfinite().all()):
                raise FloatingPointError(
                    f"{name}: got NaN or infinity in this weight after step {self.state.global_step}, expected finite "
                    "numbers, so no checkpoint is written; lower learning_rate, or train in bf16 instead of fp16, and "
                    "go on from an earlier checkpoint"
                )


@contextmanager
def _writing_to(folder: Path, name: str) -> Iterator[None]:
    """Whatever fails in here is said as a checkpoint that could not be written; its beginnings go."""
    try:
        yield
    except Exception as error:
        shutil.rmtree(folder / UNFINISHED, ignore_errors=True)  # a full disk has room again
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(
            f"{name}: could not be written in {folder} ({reason}), earlier checkpoints are as they were; make room or "
            "mend the folder, and go on with resume_from_checkpoint=True"
        ) from error


def _plain(value: Any) -> Any:
    """A configuration's value as JSON has it, whatever the order of a set."""
    return sorted(value) if isinstance(value, set | frozenset | list | tuple) else value
