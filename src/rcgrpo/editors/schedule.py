"""The levels of noise that a rollout walks through, and the solver that steps from one to the next."""

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor

Solver = Literal["euler", "heun", "dpmpp_2m", "unipc"]
SOLVERS: tuple[Solver, ...] = get_args(Solver)


@dataclass(frozen=True)
class Schedule:
    """Noise levels: `sigmas` `[steps + 1]` from 1 to 0, and what the model is told, `timesteps` `[steps]`.

    A second-order solver calls the model twice in a step: `order` 2. Its last step is of first order. `solver` is a
    diffusers scheduler that stands at the first step; as it counts its steps, a rollout walks on a copy.
    """

    sigmas: Tensor
    timesteps: Tensor
    order: int = 1
    solver: Any = field(default=None, repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.timesteps)

    @property
    def stages(self) -> Tensor:
        """The timesteps of all model calls of a rollout, in order."""
        if self.order == 1:
            return self.timesteps
        return torch.cat([self.timesteps[:1], self.timesteps[1:].repeat_interleave(2)])

    def completes(self, stage: int) -> bool:
        """Whether a step ends with this model call."""
        return self.order == 1 or stage % 2 == 1 or stage == len(self.stages) - 1


def make_solver(solver: Solver, sigmas: Tensor) -> Any:
    """One of diffusers' schedulers, ready to step through given noise levels of a flow.

    Args:
        solver: `"euler"`; `"heun"`, which calls the model twice a step; `"dpmpp_2m"` (DPM-Solver++ 2M) and `"unipc"`,
            which remember the step before. All but Euler's are of second order.
        sigmas: `[steps + 1]` from 1 to 0.
    """
    steps = len(sigmas) - 1
    flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "solver_order": 2}
    made: Any = {
        "euler": FlowMatchEulerDiscreteScheduler,
        "heun": FlowMatchHeunDiscreteScheduler,
        "dpmpp_2m": lambda: DPMSolverMultistepScheduler(algorithm_type="dpmsolver++", **flow),
        "unipc": lambda: UniPCMultistepScheduler(solver_type="bh2", **flow),
    }[solver]()
    made.set_timesteps(steps)
    # These schedulers take no sigmas, take them only shifted, or round the times that belong to them. Written over
    # theirs, all solvers walk the same levels.
    if solver == "heun":
        levels = torch.cat([sigmas[:1], sigmas[1:-1].repeat_interleave(2), sigmas[-1:]])
    else:
        levels = sigmas.clone()
        if solver in ("dpmpp_2m", "unipc"):  # at 1 the logarithm of the signal's share is infinite
            levels[0] = levels[0].clamp(max=1 - 1e-6)
    made.sigmas = levels.cpu()
    made.timesteps = 1000 * levels[:-1]
    made.set_begin_index(0)
    return made
