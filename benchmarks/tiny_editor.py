"""Measure Kontext-tiny and CompBench-mini on held-out edits; write the table, the figures' JSON and the pictures.

    python benchmarks/tiny_editor.py --out runs/tiny-editor

Needs no network and no GPU; about six minutes on two cores. `docs/kontext-tiny.md` shows what it writes.
"""

import argparse
import json
import random
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import FluxKontextPipeline
from diffusers.utils import logging
from PIL import Image
from tqdm.auto import tqdm

from rcgrpo import RegionDecoupledFluxKontextPipeline
from rcgrpo.data.mini import PHOTOS, render
from rcgrpo.data.scenes import TASKS
from rcgrpo.reporting.files import write_atomically
from rcgrpo.reporting.sheets import contact_sheet, outline
from rcgrpo.reporting.statistics import macro_bootstrap
from rcgrpo.rewards.builtin import ADDS, background_psnr, compbench_mini, region_edit
from rcgrpo.rewards.region_scorer import get_region_scorer, split_mask
from rcgrpo.tiny import CALL, WEIGHTS

TEXTURES = ("brick",)
BATCH = 32


def estimate(values: Sequence[float], digits: int, factor: float = 1) -> dict:
    """Mean and 95 % bootstrap interval over the rows, as numbers and as a table's cell."""
    (found,) = macro_bootstrap(np.array(values, dtype=float)[:, None] * factor, ["all"] * len(values))
    text = f"{found.mean:.{digits}f} [{found.low:.{digits}f}, {found.high:.{digits}f}]"
    return {"mean": found.mean, "low": found.low, "high": found.high, "n": found.n, "text": text}


def columns(rows: Sequence[dict], images: Sequence[Image.Image]) -> dict:
    """What a reward is called with."""
    names = ("task", "caption", "edited_image")
    shared = {"source_images": [r["input_image"] for r in rows], "masks": [r["mask"] for r in rows]}
    return {"images": list(images), **shared, **{name: [r[name] for r in rows] for name in names}}


def edit_all(pipe: FluxKontextPipeline, rows: Sequence[dict], seed: int) -> list[Image.Image]:
    images = []
    for i in tqdm(range(0, len(rows), BATCH), desc="editing", mininterval=5):
        part = rows[i : i + BATCH]
        images += pipe(
            image=[row["input_image"] for row in part],
            prompt=[row["instruction"] for row in part],
            generator=[torch.Generator().manual_seed(seed + i + k) for k in range(len(part))],
            **CALL,
        ).images
    return images


def is_correct(rows: Sequence[dict], images: Sequence[Image.Image]) -> list[bool]:
    """Whether the edit shows what was asked for, all of it.

    New objects: the nearest of the 24 prototypes is the captioned one, in every part of the mask. Removals: every part
    looks more like the ground truth than like the source, by cosine of the scorer's features.
    """
    scorer = get_region_scorer()
    masks, captions = [r["mask"] for r in rows], [r["caption"] for r in rows]
    names = scorer.classify(images, masks, captions)
    parts = [(row, image, part) for row, image in zip(rows, images, strict=True) for part in part_masks(row)]
    near_target, near_source = (
        scorer.lp_i([image for _, image, _ in parts], [part for *_, part in parts], [row[name] for row, *_ in parts])
        for name in ("edited_image", "input_image")
    )
    gone: dict[int, bool] = {}
    for (row, *_), target, source in zip(parts, near_target, near_source, strict=True):
        gone[id(row)] = gone.get(id(row), True) and target is not None and source is not None and target > source
    wanted = [sorted(name.partition(" ")[2] for name in caption.split("|")) for caption in captions]
    return [
        sorted((name or "").split("|")) == want if row["task"] in ADDS else gone[id(row)]
        for row, name, want in zip(rows, names, wanted, strict=True)
    ]


def part_masks(row: dict) -> list[Image.Image]:
    return split_mask(row["mask"], row["caption"].count("|") + 1)


def photo_of(row: dict) -> str:
    return next(photo.name for photo in PHOTOS if photo.video_id == row["image_path"][:8])


@torch.no_grad()
def round_trips(pipe: FluxKontextPipeline, rows: Sequence[dict]) -> list[float]:
    """PSNR in dB of encoding and decoding each ground truth."""
    values = []
    for i in range(0, len(rows), BATCH):
        x = pipe.image_processor.preprocess([row["edited_image"] for row in rows[i : i + BATCH]])
        y = pipe.vae.decode(pipe.vae.encode(x).latent_dist.mode()).sample.clamp(-1, 1)
        values += (-10 * (((x - y) / 2) ** 2).flatten(1).mean(1).log10()).tolist()
    return values


def reward_spread(weights: str, rows: Sequence[dict], candidates: int) -> dict[str, dict]:
    """Standard deviation of the reward within groups that start from neighbouring noises, by global strength."""
    pipe = RegionDecoupledFluxKontextPipeline.from_pretrained(weights)
    pipe.set_progress_bar_config(disable=True)
    everywhere = Image.new("L", rows[0]["mask"].size, 255)
    found = {}
    for strength in (0.3, 0.5, 1.0):
        spreads = []
        for i, row in enumerate(tqdm(rows, desc=f"strength {strength}", mininterval=5)):
            images = pipe(
                image=row["input_image"],
                prompt=row["instruction"],
                mask_image=everywhere,
                edit_strength=strength,
                num_images_per_prompt=candidates,
                generator=torch.Generator().manual_seed(i),
                **CALL,
            ).images
            rewards = compbench_mini(**columns([row] * candidates, images))
            spreads.append(float(np.std([reward for reward in rewards if reward is not None])))
        found[f"{strength}"] = estimate(spreads, 4)
    return found


@torch.no_grad()
def speed(pipe: FluxKontextPipeline, rows: Sequence[dict], repeats: int) -> dict[str, float]:
    """Pictures per second at 8 steps, whole pipeline and transformer calls alone, taking turns in one run."""
    part = rows[:BATCH]
    given: dict = {}

    def keep(module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        given.update(kwargs)

    hook = pipe.transformer.register_forward_pre_hook(keep, with_kwargs=True)
    edit_all(pipe, part, 0)
    hook.remove()
    whole, bare = [], []
    for _ in range(repeats):
        began = time.perf_counter()
        edit_all(pipe, part, 0)
        whole.append(time.perf_counter() - began)
        began = time.perf_counter()
        for _ in range(CALL["num_inference_steps"]):
            pipe.transformer(**given)
        bare.append(time.perf_counter() - began)
    ratios = [b / w for b, w in zip(bare, whole, strict=True)]
    return {
        "images_per_second": len(part) / min(whole),
        "transformer_alone_per_second": len(part) / min(bare),
        "ratio": float(np.median(ratios)),
        "threads": torch.get_num_threads(),
    }


def table(lines: Sequence[Sequence[str]]) -> str:
    lines = [lines[0], ["---"] * len(lines[0]), *lines[1:]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", default=str(WEIGHTS), help="the pipeline's folder")
    parser.add_argument("--out", type=Path, default=Path("runs/tiny-editor"))
    parser.add_argument("--rows", type=int, default=960, help="held-out edits, all tasks in turn; at least 60")
    parser.add_argument("--groups", type=int, default=48, help="groups for the reward's spread")
    parser.add_argument("--candidates", type=int, default=8, help="size of such a group")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    logging.set_verbosity_error()
    pipe = FluxKontextPipeline.from_pretrained(arguments.weights)
    pipe.set_progress_bar_config(disable=True)
    loading = time.perf_counter() - began
    rows = [render("test", i) for i in range(arguments.rows)]

    vae = round_trips(pipe, rows)
    textured = [photo_of(row) in TEXTURES for row in rows]
    result: dict = {
        "loading_seconds": loading,
        "autoencoder": {
            "all": estimate(vae, 2),
            **{
                name: estimate([v for v, r in zip(vae, rows, strict=True) if photo_of(r) == name], 2)
                for name in sorted({photo_of(row) for row in rows})
            },
            "without textures": estimate([v for v, t in zip(vae, textured, strict=True) if not t], 2),
        },
    }

    images = edit_all(pipe, rows, seed=1000)
    keep, edit = background_psnr(**columns(rows, images)), region_edit(**columns(rows, images))
    right, truth = is_correct(rows, images), is_correct(rows, [row["edited_image"] for row in rows])
    result["tasks"] = {}
    for task in (*TASKS, "all"):
        mine = [i for i, row in enumerate(rows) if task in (row["task"], "all")]
        pick = {
            "PSNR of the background's pixels (dB)": (keep, 2, 1),
            "correct (%)": (right, 1, 100),
            "edit score": (edit, 3, 1),
        }
        result["tasks"][task] = {
            name: estimate([values[i] for i in mine], digits, factor) for name, (values, digits, factor) in pick.items()
        } | {"ground truth correct (%)": estimate([truth[i] for i in mine], 1, 100)}

    adding = [row for row in rows if row["task"] in ADDS]
    names = get_region_scorer().classify(
        [row["edited_image"] for row in adding], [row["mask"] for row in adding], [row["caption"] for row in adding]
    )
    confused: Counter[str] = Counter()
    seen = hits = 0
    for row, name in zip(adding, names, strict=True):
        want = Counter(caption.partition(" ")[2] for caption in row["caption"].split("|"))
        got = Counter((name or "nothing").split("|"))
        seen, hits = seen + want.total(), hits + (want & got).total()
        confused.update(f"{a} → {b}" for a, b in zip((want - got).elements(), (got - want).elements(), strict=False))
    result["scorer"] = {"top_1": hits / seen, "crops": seen, "confusions": dict(confused.most_common())}

    result["reward_spread"] = reward_spread(arguments.weights, rows[: arguments.groups], arguments.candidates)
    result["speed"] = speed(pipe, rows, repeats=5)

    rng = random.Random(0)
    for task in TASKS:
        chosen = rng.sample([i for i, row in enumerate(rows) if row["task"] == task], 10)
        contact_sheet(
            {
                "source": [outline(rows[i]["input_image"], rows[i]["mask"]) for i in chosen],
                "edited": [images[i] for i in chosen],
                "ground truth": [rows[i]["edited_image"] for i in chosen],
            },
            [rows[i]["instruction"] for i in chosen],
            path=arguments.out / f"random_{task}.png",
        )
    shown = [rows[6 * k + k] for k in range(6)] + [render("train", 6 * k + k) for k in range(6)]
    contact_sheet(
        {
            "source": [row["input_image"] for row in shown],
            "mask": [row["mask"].convert("RGB") for row in shown],
            "ground truth": [row["edited_image"] for row in shown],
        },
        [row["instruction"] for row in shown],
        path=arguments.out / "compbench_mini.png",
    )

    header = ["task", *next(iter(result["tasks"].values()))]
    lines = [[task, *(cell["text"] for cell in cells.values())] for task, cells in result["tasks"].items()]
    text = table([header, *lines])
    text += "\n" + table(
        [["autoencoder, held out", "PSNR (dB)"], *([k, v["text"]] for k, v in result["autoencoder"].items())]
    )
    text += "\n" + table(
        [["global strength", "reward's standard deviation within a group"]]
        + [[k, v["text"]] for k, v in result["reward_spread"].items()]
    )
    figures = result["speed"]
    text += (
        f"\n{arguments.rows} held-out edits, 8 Euler steps, 95 % bootstrap intervals over edits. Scorer: top-1 "
        f"{100 * hits / seen:.1f} % of {seen} ground-truth crops. Speed: {figures['images_per_second']:.1f} pictures/s "
        f"on {figures['threads']} threads, {figures['ratio']:.2f} of the bare transformer calls. Opens in "
        f"{loading:.2f} s.\n"
    )
    for name, content in (("table.md", text), ("results.json", json.dumps(result, indent=2) + "\n")):
        with write_atomically(arguments.out / name) as part:
            part.write_text(content)
    print(text)


if __name__ == "__main__":
    main()
