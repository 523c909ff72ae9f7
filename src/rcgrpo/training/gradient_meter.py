"""Signal and drift while a run goes on: is the gradient more than noise, and do the weights go somewhere?

Where it fits: a callback beside the optimizer, with no forward or backward pass of its own. Adam keeps a running mean
of earlier gradients, m, and a new update's gradient g comes from other edits and other noise. So their inner product
has no noise in its mean, and

    gradient/signal    <g, m> / (1 - β₁ⁿ)                  estimates |E g|², unbiased while the weights hardly move
    gradient/noise     |g|² - gradient/signal              estimates E|g - E g|², the variance of an update's gradient

One value says next to nothing and may be negative: take means of both over tens of updates. Then
`edits per update · noise / signal` is how many edits make one standard deviation of signal, as in `rcgrpo diagnose
--gradient`. The gradients are those that the optimizer sees, after `max_grad_norm`. And of a LoRA:

    lora/travel        |θ - θ_start|
    lora/drift         √Σ |Δθ_k|² (1 + β₁) / (1 - β₁)      how far the same updates come if every gradient is noise

Of pure noise travel / drift is about 1, whatever the learning rates; of n updates that all go one way it is
√n · √((1 - β₁) / (1 + β₁)). β₁ stands there because momentum spreads a gradient over several updates, which then
resemble each other without any signal; in a run's first 1 / (1 - β₁) updates it has yet to do so, and travel / drift is
smaller.

Gotchas: only torch's Adam and AdamW keep such a mean. Within the `num_iterations` of a rollout gradients share their
noise, so only the first is measured. Weight decay is left out of the drift.
"""

from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import TrainerCallback


def signal_and_noise(optimizer: torch.optim.Optimizer) -> tuple[float, float] | None:
    """`gradient/signal` and `gradient/noise`, before a step of Adam; None without earlier gradients, or without any.

    Args:
        optimizer: with gradients on its parameters, as it will take them.
    """
    products, squares = [], []
    for parameter, group, state in _states(optimizer):
        if parameter.grad is None:
            continue
        if "exp_avg" not in state:
            return None
        gradient, weight = parameter.grad.float(), 1 - group["betas"][0] ** float(state["step"])
        products.append((gradient * state["exp_avg"]).sum() / weight)
        squares.append(gradient.square().sum())
    if not squares:
        return None
    signal, square = torch.stack([torch.stack(products).sum(), torch.stack(squares).sum()]).tolist()
    return signal, square - signal


def noise_drift(optimizer: torch.optim.Optimizer) -> float:
    """`|Δθ|² (1 + β₁) / (1 - β₁)` of the step that Adam has just taken, weight decay left out; 0 where it took none."""
    found = []
    for parameter, group, state in _states(optimizer):
        if parameter.grad is None or "exp_avg" not in state:
            continue
        (beta1, beta2), step = group["betas"], float(state["step"])
        size = state["exp_avg_sq"].sqrt() / (1 - beta2**step) ** 0.5 + group["eps"]
        moved = float(group["lr"]) / (1 - beta1**step) * state["exp_avg"] / size
        found.append(moved.square().sum() * (1 + beta1) / (1 - beta1))
    return float(torch.stack(found).sum()) if found else 0.0


def _states(optimizer: torch.optim.Optimizer) -> list[tuple[Tensor, dict[str, Any], dict[str, Any]]]:
    return [(p, group, optimizer.state.get(p, {})) for group in optimizer.param_groups for p in group["params"]]


class GradientMeter(TrainerCallback):
    """Logs signal, noise, travel and drift.

    Args:
        model: what is trained, where its run starts.
        log: takes a name and a number.
    """

    def __init__(self, model: nn.Module, log: Any) -> None:
        self.model, self.log = model, log
        self.drift = 0.0
        self.start: dict[str, Tensor] = {}
        self._begin()

    def _begin(self) -> None:
        self.drift = 0.0
        if isinstance(self.model, PeftModel):
            self.start = {name: weight.detach().clone() for name, weight in self._weights().items()}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.global_step:  # else the run goes on, from the weights that this object has seen at first
            self._begin()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        optimizer = _adam(kwargs["optimizer"])
        if optimizer is None or state.global_step % args.num_iterations or (args.fp16 and not args.max_grad_norm):
            return  # of fp16 only the clipping takes the scale off the gradients
        if (found := signal_and_noise(optimizer)) is not None:
            self.log("gradient/signal", found[0])
            self.log("gradient/noise", found[1])

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.start:
            return
        moved = [(weight.detach() - self.start[name]).square().sum() for name, weight in self._weights().items()]
        self.log("lora/travel", float(torch.stack(moved).sum().sqrt()))
        if (optimizer := _adam(kwargs["optimizer"])) is not None:
            self.drift += noise_drift(optimizer)
            self.log("lora/drift", self.drift**0.5)

    def _weights(self) -> dict[str, nn.Parameter]:
        return {name: weight for name, weight in self.model.named_parameters() if weight.requires_grad}


def _adam(optimizer: Any) -> torch.optim.Optimizer | None:
    """Out of accelerate's wrapper; None if it is another kind."""
    inner = getattr(optimizer, "optimizer", optimizer)
    return inner if isinstance(inner, torch.optim.Adam | torch.optim.AdamW) else None
