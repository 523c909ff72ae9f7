"""How far the policy ratio moves in later updates on one rollout, and what share of it each clip range takes.

    python benchmarks/clip_fractions.py
    python benchmarks/clip_fractions.py --only "neighbor, clean" -- --learning_rate 1e-4

Each row is a short run of the main job (`recipes/tiny.yaml`) at its peak learning rate, with several updates on each
rollout (`num_iterations`). The first update of a rollout has a ratio of 1; what the second one meets does not depend on
the clip range, so one run tells the share that any range would take there. Later ones depend on it a little.
`policy/rollout_mismatch` comes from the log of the same run. What follows `--` goes to `rcgrpo train`.
"""

import argparse
import sys
import tempfile
from collections import defaultdict
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig

from rcgrpo import policies
from rcgrpo.cli.parsing import parse, use_embedded_model
from rcgrpo.cli.train import ScriptArguments, load_rows
from rcgrpo.config import RCGRPOConfig
from rcgrpo.tiny import WEIGHTS
from rcgrpo.trainer import RCGRPOTrainer

POLICIES = {
    "neighbor, latents": ["--distance_space", "latents"],
    "neighbor, clean": ["--distance_space", "clean"],
    "flow_grpo": ["--policy", "flow_grpo", "--distance_space", "latents"],
}
STEPS = {
    3: [],
    8: ["--num_inference_steps", "8", "--num_policy_steps", "2", "--policy_steps_range", "0.0", "0.5"],
}
MISMATCH = "policy/rollout_mismatch"
SKIPPED = 2
"""Cycles at the beginning that are not counted: the learning rate warms up, Adam's moments fill."""


def measure(arguments: list[str], cycles: int) -> tuple[RCGRPOTrainer, dict[int, torch.Tensor]]:
    """`[numbers, 2]` for each update on a rollout, from the second: log-ratios and the advantages that they carry."""
    script, config = parse(
        (ScriptArguments, RCGRPOConfig), arguments, str(files("rcgrpo") / "recipes" / "tiny.yaml"), "clip_fractions"
    )
    use_embedded_model()
    trainer = RCGRPOTrainer(
        model=str(WEIGHTS),
        reward_funcs=list(script.reward_funcs),
        args=config,
        train_dataset=load_rows(script, config)[0],
        peft_config=LoraConfig(
            r=script.lora_r, lora_alpha=script.lora_alpha, target_modules=script.lora_target_modules
        ),
    )
    seen: dict[int, list[torch.Tensor]] = defaultdict(list)
    original = policies.policy_loss

    def record(log_probs: torch.Tensor, old: torch.Tensor, advantages: torch.Tensor, *clip: Any) -> Any:
        cycle, iteration = divmod(trainer.state.global_step, config.num_iterations)
        if cycle >= SKIPPED and iteration:
            seen[iteration + 1].append(torch.stack([(log_probs - old).detach(), advantages], -1).flatten(0, 1))
        return original(log_probs, old, advantages, *clip)

    policies.policy_loss = record
    try:
        trainer.train()
    finally:
        policies.policy_loss = original
    return trainer, {iteration: torch.cat(parts) for iteration, parts in seen.items()}


def config_epsilon(trainer: RCGRPOTrainer) -> float:
    """The clip range that the run used."""
    policy = trainer.policy
    assert isinstance(policy, policies.RatioPolicy)
    return policy.default_epsilon if policy.epsilon is None else policy.epsilon


def clipped(numbers: torch.Tensor, epsilon: float) -> float:
    """Share of log-ratios whose gradient the clip takes away."""
    ratio, advantages = numbers[:, 0].exp(), numbers[:, 1]
    outside = ((ratio < 1 - epsilon) & (advantages < 0)) | ((ratio > 1 + epsilon) & (advantages > 0))
    return float(outside.float().mean())


def epsilon_for(numbers: torch.Tensor, share: float) -> float:
    """The clip range that takes so large a share."""
    low, high = 1e-12, 1.0
    for _ in range(60):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if clipped(numbers, middle) > share else (low, middle)
    return high


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=None, help="folder for the runs; a temporary one by default")
    parser.add_argument("--cycles", type=int, default=8, help=f"rollouts of each run; the first {SKIPPED} do not count")
    parser.add_argument("--num_iterations", type=int, default=4, help="updates on each rollout")
    parser.add_argument("--only", nargs="*", default=list(POLICIES), help="names of policies")
    given, extra = parser.parse_known_args()
    extra = [argument for argument in extra if argument != "--"]
    rows = [
        "| policy | steps | median log-ratio | clipped by ε → 0 | ε that clips 0.3 to 0.05 | default ε | "
        "clipped, 2nd | clipped, last | rollout_mismatch |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as temporary:
        for name in given.only:
            for steps, options in STEPS.items():
                folder = (given.work or Path(temporary)) / f"{name.replace(', ', '-')}-{steps}"
                arguments = ["--output_dir", str(folder), "--max_steps", str(given.cycles * given.num_iterations)]
                arguments += ["--num_iterations", str(given.num_iterations), "--save_strategy", "no"]
                arguments += [
                    "--lr_scheduler_type",
                    "constant_with_warmup",
                    "--num_train_samples",
                    "96",
                    "--eval_split",
                    "",
                ]
                trainer, seen = measure([*arguments, *POLICIES[name], *options, *extra], given.cycles)
                second, last = seen[2], seen[given.num_iterations]
                epsilon = config_epsilon(trainer)
                mismatch = [row[MISMATCH] for row in trainer.state.log_history if MISMATCH in row]
                cells = [
                    name,
                    steps,
                    f"{second[:, 0].abs().median():.1e}",
                    f"{clipped(second, 0.0):.2f}",
                    f"{epsilon_for(second, 0.3):.1e} to {epsilon_for(second, 0.05):.1e}",
                    f"{epsilon:.0e}",
                    f"{clipped(second, epsilon):.2f}",
                    f"{clipped(last, epsilon):.2f}",
                    f"{max(mismatch):.0e}",
                ]
                rows.append("| " + " | ".join(map(str, cells)) + " |")
                print(rows[-1], file=sys.stderr, flush=True)
                trainer.close()
    print("\n".join(rows))


if __name__ == "__main__":
    main()
