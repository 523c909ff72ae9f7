"""Best-of-N distillation, a yardstick for RL at its compute: `python benchmarks/distil.py --output_dir runs/distil`.

Of several candidates for a training edit, plain noise for each, the one that the main job's rewards like best; of all
edits the half where it stands out most from its group. A LoRA of the main job's size then learns them by flow matching,
each from the noise that it came from, or from fresh noise. `fresh_edits.py` measures it.
"""

import argparse
import time
from importlib.resources import files
from pathlib import Path

import numpy as np
import torch
import yaml
from peft import LoraConfig
from torch import Tensor
from tqdm.auto import tqdm
from transformers import get_cosine_schedule_with_warmup

from rcgrpo import RegionDecoupledFluxKontextPipeline, compbench_mini
from rcgrpo.data.edits import Edit, EditRows
from rcgrpo.editors import Conditions, Editor, open_editor
from rcgrpo.groups.rollout import Exploration, Group, make_groups
from rcgrpo.rewards import background_keep, region_margin
from rcgrpo.tiny import CALL, RESOLUTION, WEIGHTS
from rcgrpo.training.hub import save_lora
from rcgrpo.training.model import trained_model

MAIN_JOB = yaml.safe_load((files("rcgrpo") / "recipes" / "tiny.yaml").read_text())
PLAIN = Exploration(kind="global", edit_strength=1.0)


def rewards_of(group: Group) -> np.ndarray:
    """The main job's sum of rewards, by candidate; NaN where one does not apply."""
    count = len(group.images)
    columns = {name: [group.edit.columns[name]] * count for name in ("task", "caption", "edited_image")}
    masks, sources = [group.mask] * count, [group.source] * count
    edit = region_margin(images=group.images, masks=masks, **columns)
    keep = background_keep(images=group.images, masks=masks, source_images=sources)
    return np.array([edit, keep], dtype=float).T @ MAIN_JOB["reward_weights"]


def chosen(editor: Editor, edits: list[Edit], candidates: int, seed: int) -> tuple[Conditions, Tensor, Tensor]:
    """Conditions, noise and clean latents of the best candidates, of the edits where they stand out."""
    found: list[tuple[float, Conditions, Tensor, Tensor]] = []
    for start in tqdm(range(0, len(edits), 6), desc="candidates"):
        model = editor.pipeline.transformer
        for group in make_groups(editor, model, edits[start : start + 6], candidates, PLAIN, (seed, "distil")):
            rewards = rewards_of(group)
            if not np.isnan(rewards).any():
                best = int(rewards.argmax())
                ends = group.trajectory[0, best], group.trajectory[-1, best]
                found.append((rewards[best] - rewards.mean(), group.conditions, *ends))
    found.sort(key=lambda each: -each[0])
    _, conditions, noise, clean = zip(*found[: len(found) // 2], strict=True)
    return Conditions.concatenate(list(conditions)), torch.stack(noise), torch.stack(clean)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--edits", type=int, default=420)
    parser.add_argument("--candidates", type=int, default=12)
    parser.add_argument("--steps", type=int, default=4, help="of the candidates' rollouts")
    parser.add_argument("--updates", type=int, default=280)
    parser.add_argument("--batch_size", type=int, default=24)
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--fresh_noise", action="store_true")
    args = parser.parse_args()
    began = time.process_time()
    pipeline = RegionDecoupledFluxKontextPipeline.from_pretrained(WEIGHTS)
    editor = open_editor(pipeline, RESOLUTION, args.steps, max_sequence_length=CALL["max_sequence_length"])
    rows = EditRows(compbench_mini("train", args.edits, tasks=MAIN_JOB["train_tasks"]), "train")
    conditions, noise, clean = chosen(editor, [rows.edit(i) for i in range(args.edits)], args.candidates, args.seed)
    half = time.process_time()
    size = {"r": MAIN_JOB["lora_r"], "lora_alpha": MAIN_JOB["lora_alpha"]}
    model = trained_model(pipeline, LoraConfig(**size, target_modules=list(editor.lora_targets)), args.seed)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=args.learning_rate, weight_decay=0.0)
    rate = get_cosine_schedule_with_warmup(optimizer, 3, args.updates)
    schedule = editor.with_steps(CALL["num_inference_steps"]).schedule(RESOLUTION, RESOLUTION)
    generator = torch.Generator().manual_seed(args.seed)
    for _ in (progress := tqdm(range(args.updates), desc="updates")):
        rows_of_batch = torch.randint(len(clean), (args.batch_size,), generator=generator)
        steps = torch.randint(len(schedule.timesteps), (args.batch_size,), generator=generator)
        sigma = schedule.sigmas[steps].view(-1, 1, 1)
        start, end = noise[rows_of_batch], clean[rows_of_batch]
        if args.fresh_noise:
            start = torch.randn(start.shape, generator=generator)
        batch = Conditions.concatenate([conditions[i : i + 1] for i in rows_of_batch.tolist()])
        velocity = editor.velocity(model, (1 - sigma) * end + sigma * start, schedule.timesteps[steps], batch)
        loss = (velocity - (start - end)).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, MAIN_JOB["max_grad_norm"])
        optimizer.step()
        rate.step()
        optimizer.zero_grad()
        progress.set_postfix(loss=f"{float(loss.detach()):.4f}")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    save_lora(pipeline, model, args.output_dir)
    took = time.process_time() - began
    print(f"{len(clean)} of {args.edits} edits kept; candidates {half - began:.0f} s of a core, {took:.0f} s in all")


if __name__ == "__main__":
    main()
