"""What a step takes beside the model calls in it: `python benchmarks/step_cost.py [--wide]`.

A run of the trainer, unchanged, whose calls of transformer, backward pass, VAE, text encoders and the wait for rewards
are timed where they happen; a step's time over their sum is what everything else costs: noise, solver, losses,
diagnostics, the loop. The first step warms up. `--wide` takes one double and one single block of FLUX.1-Kontext's true
width with random weights and its true VAE at 128 pixels in place of the embedded editor and its recipe. On a CPU calls
end when they return, so the sum is exact; on a GPU use `gpu.py`. `torchrun --nproc_per_node 2 benchmarks/step_cost.py`
spreads a step's edits over two processes: its seconds against those of one say what they gain.
"""

import argparse
import os
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import nullcontext
from importlib.resources import files
from pathlib import Path
from statistics import median
from typing import Any

import torch
import yaml
from peft import LoraConfig
from transformers import TrainerCallback

from rcgrpo import RCGRPOConfig, RCGRPOTrainer, compbench_mini
from rcgrpo.cli.parsing import use_embedded_model
from rcgrpo.reporting.statistics import pad_table
from rcgrpo.tiny import WEIGHTS

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.random_editors import KONTEXT, parts_of, random_pipeline, without_text_encoders

WIDE = {"resolution": 128, "num_inference_steps": 2, "num_generations": 2, "num_anchors": 1, "num_policy_steps": 1}
WIDE |= {"policy_steps_range": [0.0, 1.0], "per_device_train_batch_size": 1, "max_sequence_length": 64}


class Clock(TrainerCallback):
    """Seconds of each step by call, and `step` itself."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self._now: dict[str, float] = {}

    def watch(self, owner: Any, method: str, name: str) -> None:
        """Time an object's method under a name."""
        call = getattr(owner, method)

        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                self._now[name] = self._now.get(name, 0.0) + time.perf_counter() - began

        setattr(owner, method, timed)

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self._now, self._began = defaultdict(float), time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.steps.append({**self._now, "step": time.perf_counter() - self._began})


def measure(wide: bool, steps: int) -> list[dict[str, float]]:
    """Of each step after the first."""
    recipe = yaml.safe_load((files("rcgrpo") / "recipes" / "tiny-groups.yaml").read_text())
    lora = {"r": recipe.pop("lora_r"), "lora_alpha": recipe.pop("lora_alpha")}
    options = {key: value for key, value in recipe.items() if key in RCGRPOConfig.__dataclass_fields__}
    options |= {"max_steps": steps + 1, "save_strategy": "no", "disable_tqdm": True, "use_cpu": True}
    options["per_device_train_batch_size"] //= int(os.environ.get("WORLD_SIZE", "1"))
    use_embedded_model()
    clock = Clock()
    parts = parts_of(KONTEXT, tiny=False) if wide else None
    pipeline: Any = str(WEIGHTS)
    if parts is not None:
        options |= WIDE
        pipeline = random_pipeline(parts, torch.device("cpu"), {"num_layers": 1, "num_single_layers": 1}).to(
            torch.float32
        )
    with (
        tempfile.TemporaryDirectory() as folder,
        without_text_encoders(parts, torch.float32) if parts else nullcontext(),
    ):
        rows = compbench_mini("train", recipe["per_device_train_batch_size"] * (steps + 1), options["resolution"])
        config = LoraConfig(**lora, target_modules=["attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "proj_mlp"])
        args = RCGRPOConfig(folder, **options)
        trainer = RCGRPOTrainer(pipeline, recipe["reward_funcs"], args, rows, peft_config=config, callbacks=[clock])
        pipe = trainer.pipeline
        clock.watch(pipe.transformer, "forward", "transformer")
        for name in trainer.editor.encoders:
            clock.watch(getattr(pipe, name), "forward", "text encoders")
        clock.watch(pipe.vae, "encode", "VAE")
        clock.watch(pipe.vae, "decode", "VAE")
        clock.watch(trainer.accelerator, "backward", "backward")
        clock.watch(trainer.scoring, "receive", "rewards")
        trainer.train()
        trainer.close()
    return clock.steps[1:]


def main(argv: Sequence[str] | None = None) -> float:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wide", action="store_true")
    parser.add_argument("--steps", type=int, default=5, help="after the first")
    options = parser.parse_args(argv)
    steps = measure(options.wide, options.steps)
    if int(os.environ.get("RANK", "0")):
        return 0.0
    calls = [name for name in steps[0] if name != "step"]
    ratios = [step["step"] / sum(step[name] for name in calls) for step in steps]
    head = [*calls, "step", "step over calls", "most", "steps"]
    row = [f"{median(step[name] for step in steps):.2f}" for name in (*calls, "step")]
    row += [f"{median(ratios):.3f}", f"{max(ratios):.3f}", str(len(steps))]
    wide = "one double and one single block of FLUX.1-Kontext's width"
    what = wide if options.wide else "kontext-tiny, tiny-groups.yaml"
    print(f"{what}; {torch.get_num_threads()} threads; medians in seconds\n\n{pad_table([head, row], left=())}")
    return median(ratios)


if __name__ == "__main__":
    main()
