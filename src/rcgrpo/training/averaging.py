"""Weights averaged over a run (EMA): what is evaluated and handed out, while the raw weights train and make rollouts.

Where it fits: between stopping and saving. Updates of a noise-limited run wander around where they are going; their
average is nearer. Rollouts, ratios and the optimizer never see it, so training itself does not change by a bit.

Gotchas: the average is kept in fp32, as its small steps would vanish in half precision; it stands in the model only
inside `averaged`, and for good when a run has ended. A checkpoint has the raw weights where a resume looks for them,
the average beside them in `AVERAGE_FILE`, and the average in what is for people (`pytorch_lora_weights.safetensors`).
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diffusers.training_utils import EMAModel
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import TrainerCallback

from .resuming import ResumingTrainer

logger = logging.getLogger(__name__)

AVERAGE_FILE = "averaged.safetensors"


class WeightAverage:
    """Exponential moving average of a model's trained weights, by diffusers' `EMAModel`.

    Its decay is min(decay, n / (9 + n)) at the n-th update but 0 at the first: a young average forgets its start.

    Args:
        model: whose parameters with `requires_grad` are averaged, from their values now.
        decay: in [0, 1); 0.99 averages over about the last 100 updates.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model = model
        self.ema = EMAModel([weight.detach().float() for weight in self.weights.values()], decay=decay)

    @property
    def weights(self) -> dict[str, nn.Parameter]:
        """The model's own, by name."""
        return {name: weight for name, weight in self.model.named_parameters() if weight.requires_grad}

    def update(self) -> None:
        """After an update."""
        self.ema.step(self.weights.values())

    def put(self) -> None:
        """Into the model, for good."""
        self.ema.copy_to(self.weights.values())

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Into the model, for a while; the raw weights come back to the last bit."""
        raw = {name: weight.detach().to("cpu", copy=True) for name, weight in self.weights.items()}
        self.put()
        try:
            yield
        finally:
            for name, weight in self.weights.items():
                weight.data.copy_(raw[name])

    def save(self, file: Path) -> None:
        """Write the average and its age."""
        averages = dict(zip(self.weights, self.ema.shadow_params, strict=True))
        age = {"updates": str(self.ema.optimization_step)}
        save_file({name: average.contiguous() for name, average in averages.items()}, file, age)

    def load(self, file: Path) -> None:
        """Go on from what `save` wrote."""
        with safe_open(file, "pt") as opened:
            for name, average in zip(self.weights, self.ema.shadow_params, strict=True):
                average.copy_(opened.get_tensor(name))
            self.ema.optimization_step = int(opened.metadata()["updates"])


class _AverageWeights(TrainerCallback):
    def __init__(self, trainer: "AveragingTrainer") -> None:
        self.trainer = trainer

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer._average is not None:
            self.trainer._average.update()


class AveragingTrainer(ResumingTrainer):
    """With `ema_decay`, keeps an average of the trained weights, evaluates it, and ends with it in the model."""

    _average: WeightAverage | None = None

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        if self.args.ema_decay is not None:
            self.add_callback(_AverageWeights(self))

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The average in the model while a run with `ema_decay` goes on; before and after it nothing changes."""
        if self._average is None:
            yield
        else:
            with self._average.in_place():
                yield

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:  # type: ignore[override]
        if self.args.ema_decay is not None:
            model = self.accelerator.unwrap_model(self.model)
            self._average = WeightAverage(model, self.args.ema_decay)
        result = super().train(resume_from_checkpoint, **kwargs)
        if self._average is not None:
            self._average.put()
            self._average = None
        return result

    def evaluate(self, *given: Any, **named: Any) -> dict[str, float]:
        with self.averaged():
            return super().evaluate(*given, **named)

    def _load_average(self, checkpoint: str) -> None:
        """The average that goes with the weights of a checkpoint; these themselves if it has none."""
        if self._average is None:
            return
        file = Path(checkpoint, AVERAGE_FILE)
        if file.exists():
            self._average.load(file)
            return
        self._average = WeightAverage(self._average.model, self.args.ema_decay)
        if self.is_world_process_zero():
            logger.warning("ema_decay: %s was written without it, so the average begins at its weights", checkpoint)
