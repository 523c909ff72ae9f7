"""What recording attention costs a rollout: the same candidates with and without, in alternation, in one process.

    python benchmarks/attention_cost.py                 # kontext-tiny with its recipe's LoRA and settings
    python benchmarks/attention_cost.py --model random  # FLUX's width and heads, few blocks, random weights
    python benchmarks/attention_cost.py --model random --double 4 --single 8 --tokens 4096 --dtype bfloat16   # on a GPU

A round is a rollout without the record and one with it, the order alternating, so that both meet the same load on the
machine; the first round warms up and does not count. Times are the process's own on a CPU, of all its threads, and the
clock's on a GPU. The table holds medians over rounds, the median of the ratios within rounds with the ends of their
middle half, and the ratio of the fastest rollouts, which other work on the machine disturbed least. Decoding and
rewards are no part of it.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from statistics import median, quantiles
from typing import Any

import torch

from rcgrpo.editors.attention import AttentionOptions, AttentionRecorder
from rcgrpo.reporting.statistics import pad_table

Rollout = Callable[[bool], Any]


def tiny(args: argparse.Namespace, device: torch.device) -> tuple[Rollout, str]:
    """One update's rollout of the recipe: its edits, candidates, steps and LoRA."""
    from importlib.resources import files

    import yaml
    from peft import LoraConfig, get_peft_model

    from rcgrpo import RegionDecoupledFluxKontextPipeline, compbench_mini
    from rcgrpo.cli.parsing import use_embedded_model
    from rcgrpo.data.edits import EditRows
    from rcgrpo.editors import FluxKontextEditor, open_editor
    from rcgrpo.groups.rollout import rollout
    from rcgrpo.maths.regions import to_tokens
    from rcgrpo.tiny import WEIGHTS

    use_embedded_model()
    recipe = yaml.safe_load((files("rcgrpo") / "recipes" / "tiny-groups.yaml").read_text())
    count = args.edits or recipe["per_device_train_batch_size"]
    pipeline = RegionDecoupledFluxKontextPipeline.from_pretrained(str(WEIGHTS)).to(device)
    lora = LoraConfig(
        r=recipe["lora_r"], lora_alpha=recipe["lora_alpha"], target_modules=list(FluxKontextEditor.lora_targets)
    )
    model = get_peft_model(pipeline.transformer, lora).eval()
    editor = open_editor(
        pipeline,
        recipe["resolution"],
        recipe["num_inference_steps"],
        max_sequence_length=recipe["max_sequence_length"],
    )
    rows = EditRows(compbench_mini("train", count), "train")
    edits = [rows.edit(i) for i in range(count)]
    size = recipe["num_generations"]
    conditions = editor.encode([e.source for e in edits], [e.prompt for e in edits]).repeat(size)
    grid = editor.grid_for(conditions.height, conditions.width)
    region = torch.stack([to_tokens(e.mask, grid, "mean") for e in edits]).repeat_interleave(size, 0)
    noise = torch.randn(len(region), region.shape[1], editor.channels)
    told = f"kontext-tiny: {count} edits × {size} candidates, {recipe['num_inference_steps']} steps"
    options = AttentionOptions(direction=args.direction)
    return lambda recorded: rollout(
        editor, model, noise, conditions, region if recorded else None, options=options
    ), told


def random_flux(args: argparse.Namespace, device: torch.device) -> tuple[Rollout, str]:
    """Some forwards of a transformer with FLUX's own width and heads and random weights."""
    from diffusers import FluxTransformer2DModel

    dtype = getattr(torch, args.dtype)
    torch.manual_seed(0)
    with torch.device(device):
        model = FluxTransformer2DModel(num_layers=args.double, num_single_layers=args.single, guidance_embeds=True)
    model = model.to(dtype).eval()
    batch, tokens, text = args.batch, args.tokens, args.text
    side = int(tokens**0.5)
    tokens = side * side
    grid = torch.cartesian_prod(torch.zeros(1), torch.arange(float(side)), torch.arange(float(side))).to(device, dtype)
    inputs = {
        "hidden_states": torch.randn(batch, 2 * tokens, 64, device=device, dtype=dtype),
        "encoder_hidden_states": torch.randn(batch, text, 4096, device=device, dtype=dtype),
        "pooled_projections": torch.randn(batch, 768, device=device, dtype=dtype),
        "timestep": torch.full([batch], 0.5, device=device, dtype=dtype),
        "guidance": torch.full([batch], 3.5, device=device),
        "img_ids": torch.cat([grid, grid + torch.tensor([1, 0, 0], device=device, dtype=dtype)]),
        "txt_ids": torch.zeros(text, 3, device=device, dtype=dtype),
    }
    region = (torch.arange(tokens) < tokens // 4).float().expand(batch, -1).to(device)
    weights = (torch.arange(text) < args.words).float().expand(batch, -1).to(device)
    recorder = AttentionRecorder(model, direction=args.direction)

    @torch.no_grad()
    def run(recorded: bool) -> None:
        with recorder.record(region, weights) if recorded else nullcontext():
            for _ in range(args.steps):
                model(**inputs, return_dict=False)
        if recorded:
            recorder.concentration()

    told = (
        f"random FLUX: {args.double} double and {args.single} single blocks, {tokens} + {tokens} image and {text} text "
        f"tokens ({args.words} of the instruction), batch {batch}, {args.dtype}"
    )
    return run, told


def measure(rollout: Rollout, rounds: int, device: torch.device) -> tuple[list[float], list[float]]:
    """Seconds of each round's rollout without and with the record."""
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    times: dict[bool, list[float]] = {False: [], True: []}
    for index in range(rounds + 1):
        for recorded in (False, True) if index % 2 else (True, False):
            began = clock()
            rollout(recorded)
            if device.type == "cuda":
                torch.cuda.synchronize()
            times[recorded].append(clock() - began)
    return times[False][1:], times[True][1:]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["tiny", "random"], default="tiny")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--direction", choices=["text_to_image", "image_to_text"], default="text_to_image")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--edits", type=int, default=None, help="of tiny: edits at a time; the recipe's by default")
    parser.add_argument("--double", type=int, default=1, help="of random: double blocks")
    parser.add_argument("--single", type=int, default=2, help="of random: single blocks")
    parser.add_argument("--tokens", type=int, default=256, help="of random: noisy tokens; as many of the reference")
    parser.add_argument("--text", type=int, default=128, help="of random: text tokens")
    parser.add_argument("--words", type=int, default=16, help="of random: text tokens that are not padding")
    parser.add_argument("--batch", type=int, default=1, help="of random: samples")
    parser.add_argument("--steps", type=int, default=1, help="of random: forwards in a rollout")
    parser.add_argument("--dtype", default="float32", help="of random: float32 or bfloat16")
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    rollout, told = {"tiny": tiny, "random": random_flux}[args.model](args, device)
    without, recorded = measure(rollout, args.rounds, device)
    ratios = [b / a for a, b in zip(without, recorded, strict=True)]
    low, _, high = quantiles(ratios, n=4) if len(ratios) > 1 else (ratios[0],) * 3
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    head = ["without (s)", "recorded (s)", "ratio", "middle half", "ratio of the fastest", "rounds"]
    row = [f"{median(without):.3f}", f"{median(recorded):.3f}", f"{median(ratios):.3f}", f"{low:.3f} – {high:.3f}"]
    row += [f"{min(recorded) / min(without):.3f}", str(len(ratios))]
    print(f"{told}; {where}\n\n{pad_table([head, row], left=())}")


if __name__ == "__main__":
    main()
