"""The guard: tells when training makes held-out edits worse again, and can stop it there.

Where it fits: a callback on the Trainer's own evaluations (`eval_strategy`), always there as it costs nothing beside
them; `stop_on_regression` lets it end the run, the Trainer's `load_best_model_at_end` takes the best weights back.

Gotcha: it keeps nothing of its own. All it looks at is in `log_history`, so a resumed run judges as the whole one, and
every process of several comes to the same verdict.
"""

import logging
from math import copysign, inf, log, sqrt
from statistics import NormalDist
from typing import Any

import numpy as np
from transformers import TrainerCallback

from ..groups.outcomes import MEASURES
from ..reporting.learning_curve import EDITS, Curve
from ..reporting.statistics import FEWEST_PAIRS

logger = logging.getLogger(__name__)

ERROR_RATE = 0.05
"""The chance of an alarm, at any time of a run, where nothing has changed."""


class RegressionGuard(TrainerCallback):
    """After each evaluation, an alarm if the held-out metric is clearly below its best so far.

    Clearly: by a one-sided paired t-test over the same edits from the same noise. The best of many evaluations looks
    better than it is, and many looks find something by chance; so the threshold is `ERROR_RATE` over the number of all
    pairs of evaluations so far (Bonferroni).

    Args:
        stop: end training at an alarm.
    """

    def __init__(self, stop: bool = False) -> None:
        self.stop = stop

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        prefix, measure = watched(args.metric_for_best_model)
        if prefix + EDITS not in state.log_history[-1]:  # another of several held-out sets
            return
        alarm = regression(Curve.of(state.log_history, prefix), measure)
        if alarm is None:
            return
        if state.is_world_process_zero:
            logger.warning("held-out edits: step %d, %s%s", state.global_step, alarm, "; stopping" * self.stop)
        control.should_training_stop |= self.stop


def watched(metric: str | None) -> tuple[str, str]:
    """The prefix of an evaluation and the measure that a metric's name speaks of; else the reward of the only set."""
    name = f"eval_{(metric or 'reward').removeprefix('eval_')}"
    for measure in MEASURES:
        if name.endswith(f"_{measure}"):
            return name.removesuffix(measure), measure
    return "eval_", "reward"


def regression(curve: Curve, measure: str) -> str | None:
    """What the latest evaluation has lost against the best one before it, in words; None where that is not clear."""
    latest = len(curve.steps) - 1
    if latest < 1:
        return None
    best = max(range(latest), key=lambda i: curve.mean(measure, i))
    pairs = np.array([curve.values(measure, i) for i in (best, latest)], dtype=np.float64)  # None becomes NaN
    before, after = pairs[:, ~np.isnan(pairs).any(axis=0)]
    if len(after) < FEWEST_PAIRS or bool((after == before).all()):
        return None
    chance = chance_of_fall(after - before)
    if not chance < ERROR_RATE / (latest * (latest + 1) / 2):
        return None
    return (
        f"{measure} {after.mean():.4g} is clearly below the {before.mean():.4g} of step {curve.steps[best]} "
        f"({(after - before).mean():+.3g} on {len(after)} edits; by chance {chance:.1g}): lower learning_rate, stop "
        "there, or set ema_decay"
    )


def chance_of_fall(differences: np.ndarray) -> float:
    """One-sided p-value of a paired t-test: how likely so low a mean is where differences are 0 on average.

    Student's distribution goes through Wallace's normal approximation (Ann. Math. Stat. 30, 1959), which is within a
    few per cent of p from 5 degrees of freedom on and needs no scipy.
    """
    mean, error, freedom = differences.mean(), differences.std(ddof=1) / sqrt(len(differences)), len(differences) - 1
    t = mean / error if error > 0 else copysign(inf, mean)
    size = sqrt(freedom * log(1 + t * t / freedom)) * (8 * freedom + 1) / (8 * freedom + 3)
    return NormalDist().cdf(copysign(size, t))
