"""A log that a person reads: one aligned line a logged step under the progress bar, instead of a dictionary."""

from collections.abc import Iterable
from typing import Any

from transformers import Trainer
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK
from transformers.trainer_callback import PrinterCallback, ProgressCallback

COLUMNS = {
    "reward": "reward {:.4f}",
    "reward_std": "± {:.4f}",
    "correct": "correct {:.1f} %",
    "background/psnr": "background {:.2f} dB",
    "attention/density": "attention {:.3f}",
    "frac_reward_zero_std": "flat groups {:.0%}",
    "kl": "kl {:.2e}",
    "grad_norm": "grad {:.2e}",
    "step_time": "{:.1f} s/micro-step",
}
PROGRESS = (ProgressCallback, PrinterCallback, DEFAULT_PROGRESS_CALLBACK)
"""What transformers shows progress with, in a terminal, without a bar, and in a notebook."""


def readable(logs: dict[str, Any], step: int, total: int) -> str | None:
    """One line for a training or evaluation log; None for what has no reward in it."""
    # Of several held-out sets each has its name in the prefix.
    rewards = (key for key in logs if key.startswith("eval_") and key.endswith("_reward"))
    prefix = next(rewards, "").removesuffix("reward")
    if prefix + "reward" not in logs:
        return None
    shown = [text.format(float(logs[prefix + key])) for key, text in COLUMNS.items() if prefix + key in logs]
    name = prefix.rstrip("_").replace("_", " ", 1) or "step"
    return f"{name} {step:>{len(str(total))}}/{total}  " + "  ".join(shown)


class ReadableLines(PrinterCallback):
    """The lines alone, where `disable_tqdm` takes the bar away."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        line = readable(logs or {}, state.global_step, state.max_steps)
        if line is not None and state.is_world_process_zero:
            print(line, flush=True)


class ReadableLog(ProgressCallback):
    """Transformers' progress bar with readable log lines."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        line = readable(logs or {}, state.global_step, state.max_steps)
        if line is None or not state.is_world_process_zero:
            return
        if self.training_bar is not None:
            self.training_bar.write(line)
        else:
            print(line)


def make_readable(trainer: Trainer, given: Iterable[Any]) -> None:
    """Put the readable log in the place of the callbacks that print dictionaries.

    Args:
        given: the user's own callbacks, classes or instances. If one of them shows progress, all stay as they are.
    """
    kinds = [callback if isinstance(callback, type) else type(callback) for callback in given]
    if any(issubclass(kind, PROGRESS) for kind in kinds):
        return
    for callback in PROGRESS:
        trainer.remove_callback(callback)
    trainer.add_callback(ReadableLines if trainer.args.disable_tqdm else ReadableLog)
