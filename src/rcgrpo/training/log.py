"""A log that a person reads: one aligned line a logged step under the progress bar, instead of a dictionary."""

from typing import Any

from transformers import Trainer
from transformers.trainer_callback import PrinterCallback, ProgressCallback

COLUMNS = {
    "reward": "reward {:.4f}",
    "reward_std": "± {:.4f}",
    "background/psnr": "background {:.2f} dB",
    "attention/density": "attention {:.3f}",
    "frac_reward_zero_std": "flat groups {:.0%}",
    "kl": "kl {:.2e}",
    "grad_norm": "grad {:.2e}",
    "step_time": "{:.1f} s/micro-step",
}


def readable(logs: dict[str, Any], step: int, total: int) -> str | None:
    """One line for a training or evaluation log; None for what has no reward in it."""
    prefix = "eval_" if "eval_reward" in logs else ""
    if prefix + "reward" not in logs:
        return None
    shown = [text.format(float(logs[prefix + key])) for key, text in COLUMNS.items() if prefix + key in logs]
    return f"{'eval' if prefix else 'step'} {step:>{len(str(total))}}/{total}  " + "  ".join(shown)


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

    @classmethod
    def install(cls, trainer: Trainer) -> None:
        """Put it in the place of the callbacks that print dictionaries."""
        for callback in (ProgressCallback, PrinterCallback):
            trainer.remove_callback(callback)
        trainer.add_callback(cls)
