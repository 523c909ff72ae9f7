"""How far the policy ratio moves in later updates on one rollout, and what share of it each clip range takes.

    python benchmarks/clip_fractions.py
    python benchmarks/clip_fractions.py --only "neighbor, clean" -- --learning_rate 1e-4 --bf16 true

Each run is a short one of the recipe `tiny-groups.yaml` at its peak learning rate, with several updates on each rollout
(`num_iterations`). The first update of a rollout has a ratio of 1; what the second one meets does not depend on
the clip range, so one run tells the share that any range would take there. Later ones depend on it a little. With
region advantages each region has ratios and a row of its own; without them there is one for all tokens.
`policy/rollout_mismatch` comes from the log of the same run. What follows `--` goes to `rcgrpo train`.
"""

import argparse
import itertools
import sys
import tempfile
from collections import defaultdict
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
import yaml
from peft import LoraConfig

from rcgrpo.cli.parsing import parse, use_embedded_model
from rcgrpo.cli.train import ScriptArguments, load_rows
from rcgrpo.groups.policies import ratio
from rcgrpo.tiny import WEIGHTS
from rcgrpo.training.config import RCGRPOConfig
from rcgrpo.training.trainer import RCGRPOTrainer

POLICIES = {
    "neighbor, latents": ["--distance_space", "latents"],
    "neighbor, clean": ["--distance_space", "clean"],
    "flow_grpo": ["--policy", "flow_grpo", "--distance_space", "latents"],
}
STEPS = {
    3: [],
    8: ["--num_inference_steps", "8", "--num_policy_steps", "2"],
}
REGIONS = ("region_advantages", "reward_regions", "region_advantage_weights")
SKIPPED = 2
"""Rollouts at the beginning that are not counted, while Adam's moments fill."""
MISMATCH = "policy/rollout_mismatch"

Seen = dict[tuple[int, int], torch.Tensor]
"""By update on a rollout and row of advantages, `[numbers, 3]`: log-ratios, the advantages they carry, clip ranges."""


def measure(arguments: list[str], folder: Path, in_regions: bool) -> tuple[RCGRPOTrainer, Seen]:
    """One run, with or without region advantages, and what its updates after a rollout's first met."""
    settings = yaml.safe_load((files("rcgrpo") / "recipes" / "tiny-groups.yaml").read_text())
    recipe = folder / "recipe.yaml"
    recipe.parent.mkdir(parents=True, exist_ok=True)
    recipe.write_text(yaml.safe_dump({k: v for k, v in settings.items() if in_regions or k not in REGIONS}))
    arguments = ["--output_dir", str(folder / "run"), *arguments]
    script, config = parse((ScriptArguments, RCGRPOConfig), arguments, str(recipe), "clip_fractions")
    use_embedded_model()
    targets = list(script.lora_target_modules)
    trainer = RCGRPOTrainer(
        model=str(WEIGHTS),
        reward_funcs=list(script.reward_funcs),
        args=config,
        train_dataset=load_rows(script, config)[0],
        peft_config=LoraConfig(r=script.lora_r, lora_alpha=script.lora_alpha, target_modules=targets),
    )
    seen: dict[tuple[int, int], list[torch.Tensor]] = defaultdict(list)
    original, rows = ratio.policy_loss, itertools.count()

    def record(log_probs: torch.Tensor, old: torch.Tensor, advantages: torch.Tensor, epsilon: Any, *high: Any) -> Any:
        cycle, iteration = divmod(trainer.state.global_step, config.num_iterations)
        row = next(rows) % max(1, len(config.named_regions))
        if cycle >= SKIPPED and iteration:
            ranges = torch.as_tensor(epsilon).expand_as(advantages)
            numbers = torch.stack([(log_probs - old).detach(), advantages, ranges], -1)
            seen[iteration + 1, row].append(numbers.flatten(0, 1))
        return original(log_probs, old, advantages, epsilon, *high)

    ratio.policy_loss = record
    try:
        trainer.train()
    finally:
        ratio.policy_loss = original
    return trainer, {key: torch.cat(parts) for key, parts in seen.items()}


def clipped(numbers: torch.Tensor, epsilon: float | None = None) -> float:
    """Share of log-ratios whose gradient a clip takes away, the run's own by default, of candidates that have a say."""
    ratio, advantages = numbers[:, 0].exp(), numbers[:, 1]
    epsilon = numbers[:, 2] if epsilon is None else epsilon
    outside = ((ratio < 1 - epsilon) & (advantages < 0)) | ((ratio > 1 + epsilon) & (advantages > 0))
    return float(outside.sum() / advantages.ne(0).sum())


def epsilon_for(numbers: torch.Tensor, share: float) -> float:
    """The clip range that takes so large a share."""
    low, high = 1e-12, 1.0
    for _ in range(60):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if clipped(numbers, middle) > share else (low, middle)
    return high


def report(name: str, steps: int, iterations: int, trainer: RCGRPOTrainer, seen: Seen) -> list[str]:
    """A run's lines of the table."""
    mismatch = max(row[MISMATCH] for row in trainer.state.log_history if MISMATCH in row)
    lines = []
    for row, objective in enumerate(trainer.args.named_regions or ["all"]):
        second, last = seen[2, row], seen[iterations, row]
        wide, narrow = (epsilon_for(second, share) for share in (0.05, 0.3))
        numbers = [f"{second[:, 0].abs().median():.1e}", f"{clipped(second, 0.0):.2f}", f"{narrow:.1e} to {wide:.1e}"]
        shares = [f"{second[:, 2].mean():.1e}", f"{clipped(second):.2f}", f"{clipped(last):.2f}"]
        lines.append("| " + " | ".join([name, str(steps), objective, *numbers, *shares, f"{mismatch:.0e}"]) + " |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=None, help="folder for the runs; a temporary one by default")
    parser.add_argument("--rollouts", type=int, default=6, help=f"of each run; the first {SKIPPED} do not count")
    parser.add_argument("--num_iterations", type=int, default=3, help="updates on each rollout")
    parser.add_argument("--only", nargs="*", default=list(POLICIES), help="names of policies")
    parser.add_argument("--steps", nargs="*", type=int, default=list(STEPS), help="of a rollout")
    given, extra = parser.parse_known_args()
    extra = [argument for argument in extra if argument != "--"]
    lines = [
        "| policy | steps | tokens | median log-ratio | clipped by ε → 0 | ε that clips 0.3 to 0.05 | ε | "
        "clipped, 2nd | clipped, last | mismatch |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as temporary:
        for name, steps, in_regions in itertools.product(given.only, given.steps, (True, False)):
            folder = (given.work or Path(temporary)) / f"{name.replace(', ', '-')}-{steps}-{in_regions}"
            shared = ["--max_steps", str(given.rollouts * given.num_iterations), "--save_strategy", "no"]
            shared += ["--num_iterations", str(given.num_iterations), "--eval_split", "", "--num_train_samples", "96"]
            shared += ["--lr_scheduler_type", "constant", "--warmup_steps", "0"]
            trainer, seen = measure([*shared, *POLICIES[name], *STEPS[steps], *extra], folder, in_regions)
            lines += report(name, steps, given.num_iterations, trainer, seen)
            print("\n".join(lines[-len(trainer.args.named_regions or [1]) :]), file=sys.stderr, flush=True)
            trainer.close()
    print("\n".join(lines))


if __name__ == "__main__":
    main()
