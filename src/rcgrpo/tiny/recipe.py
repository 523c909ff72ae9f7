"""The recipe that made Kontext-tiny: data, autoencoder, editor, folder. Resumable at every stage.

    python -m rcgrpo.tiny.recipe --work runs/tiny --out src/rcgrpo/tiny/weights

Stages, each skipped when its result is there: `pool` draws CompBench-mini's training pictures; `vae` trains the
autoencoder on them; `latents` encodes them once; `quarters`, then `editor` train transformer and text encoders together
with the flow-matching loss, the region weighted; `guided` distils classifier-free guidance inside the region into the
editor, as FLUX.1-Kontext-dev's guidance is distilled; `export` writes a plain diffusers folder in half precision.
"""

import argparse
import copy
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FluxKontextPipeline
from diffusers.training_utils import EMAModel
from tqdm.auto import tqdm

from rcgrpo.data.mini import render

from .parts import SIZE, TEXT_LENGTH, build_editor, build_vae

REGION_WEIGHT = 12.0
DRAWING_SHARE = 3.0
"""How much more often an edit that draws an object is trained on than one that only removes."""
TEXT_DROPOUT = 0.1
"""Share of the edits that are trained on without their instruction, for guidance."""
GUIDANCE = 3.0
"""Scale of the classifier-free guidance that the last stage distils."""
GUIDED_SHARE = 1 / 3
"""Weight of the guided weights in the average with those before: a fully guided editor leaves little to learn."""
KL_WEIGHT = 3e-3
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BF16 = DEVICE == "cuda" or torch.cpu._is_amx_tile_supported()  # without matrix units bf16 is slower than fp32


# ---------------------------------------------------------------- the parts, untrained


# ---------------------------------------------------------------- one training loop for both networks


def as_matrix(kernel: torch.Tensor) -> torch.Tensor:
    """`[out, in]`, or `[out, height · width · in]` of a kernel in channels-last memory, without a copy."""
    return kernel.permute(0, 2, 3, 1).flatten(1) if kernel.ndim == 4 else kernel


def fit(
    name: str,
    modules: torch.nn.ModuleDict,
    loss_function: Callable[[torch.Generator], torch.Tensor],
    work: Path,
    steps: int,
    learning_rate: float,
    report: Callable[[], dict[str, float]],
    muon_learning_rate: float | None = None,
    save_every: int = 250,
) -> None:
    """AdamW, warm-up, a linear decay over the last three quarters, EMA; a stopped run goes on with the same batches.

    With a rate for it, Muon takes the matrices and convolution kernels, and AdamW the rest. `modules` holds the
    averaged weights at the end.
    """
    parameters = [p for p in modules.parameters() if p.requires_grad]
    tables = {m.weight for m in modules.modules() if isinstance(m, torch.nn.Embedding)}
    kernels = [p for p in parameters if p.ndim >= 2 and p not in tables] if muon_learning_rate else []
    others = [p for p in parameters if all(p is not kernel for kernel in kernels)]
    # Muon wants matrices: one row for an output channel, in the kernel's own memory.
    matrices = [torch.nn.Parameter(as_matrix(p.detach())) for p in kernels]
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=1e-3)]
    peaks = [learning_rate]
    if muon_learning_rate:
        optimizers.append(torch.optim.Muon(matrices, weight_decay=0.0))
        peaks.append(muon_learning_rate)
    ema = EMAModel(parameters, decay=0.999, use_ema_warmup=True, power=0.75)
    checkpoint, log = work / f"{name}.pt", work / f"{name}.jsonl"
    start, seconds = 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)
        modules.load_state_dict(state["modules"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        ema.load_state_dict(state["ema"])
        ema.to(parameters[0].device)
        start, seconds = state["step"], state["seconds"]
    began = time.perf_counter()
    running = 0.0
    progress = tqdm(range(start, steps), initial=start, total=steps, desc=name, mininterval=5)
    for step in progress:
        rate = min(1.0, (step + 1) / 200, (steps - step) / (0.75 * steps))
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            optimizer.param_groups[0]["lr"] = peak * rate
        loss = loss_function(torch.Generator().manual_seed(step))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for kernel, matrix in zip(kernels, matrices, strict=True):
            matrix.grad, kernel.grad = as_matrix(kernel.grad), None
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        ema.step(parameters)
        running = 0.98 * running + 0.02 * loss.item() if step > start else loss.item()
        if (step + 1) % save_every == 0 or step + 1 == steps:
            elapsed = seconds + time.perf_counter() - began
            ema.store(parameters)
            ema.copy_to(parameters)
            row = {"step": step + 1, "seconds": round(elapsed, 1), "loss": running, **report()}
            ema.restore(parameters)
            with log.open("a") as file:
                file.write(json.dumps(row) + "\n")
            progress.set_postfix({k: f"{v:.4g}" for k, v in row.items() if k != "step"})
            state = {
                "modules": modules.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                "ema": ema.state_dict(),
                "step": step + 1,
                "seconds": elapsed,
            }
            torch.save(state, checkpoint.with_suffix(".tmp"))
            checkpoint.with_suffix(".tmp").replace(checkpoint)
    ema.copy_to(parameters)


# ---------------------------------------------------------------- stages


def make_pool(work: Path, split: str, rows: int) -> dict[str, Any]:
    """Pictures as uint8 `[rows, 2, 3, H, W]` (source, target), masks `[rows, H, W]` in {0, 1}, instructions."""
    folder = work / f"pool-{split}-{rows}"
    if not (folder / "instructions.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        shape = (rows, 2, 3, SIZE, SIZE)
        pictures = np.lib.format.open_memmap(folder / "pictures.npy", "w+", np.uint8, shape)
        masks = np.lib.format.open_memmap(folder / "masks.npy", "w+", np.uint8, (rows, SIZE, SIZE))
        instructions = []
        for i in tqdm(range(rows), desc=f"drawing {split}", mininterval=5):
            row = render(split, i, SIZE, seed=1)
            pictures[i] = np.stack([np.asarray(row[k]).transpose(2, 0, 1) for k in ("input_image", "edited_image")])
            masks[i] = np.asarray(row["mask"]) > 127
            instructions.append(row["instruction"])
        (folder / "instructions.json").write_text(json.dumps(instructions))
    return {
        "pictures": torch.from_numpy(np.load(folder / "pictures.npy")),
        "masks": torch.from_numpy(np.load(folder / "masks.npy")),
        "instructions": json.loads((folder / "instructions.json").read_text()),
    }


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    """Mean over the batch of the PSNR in dB, pictures in [-1, 1]."""
    return float((-10 * (((a.clamp(-1, 1) - b) / 2) ** 2).flatten(1).mean(1).log10()).mean())


def train_vae(work: Path, steps: int, pool: dict[str, Any], held_out: dict[str, Any], batch: int = 16) -> AutoencoderKL:
    torch.manual_seed(0)
    vae = build_vae().to(DEVICE, memory_format=torch.channels_last)
    for name, module in vae.named_modules():
        if name.endswith("conv2"):
            torch.nn.init.zeros_(module.weight)  # residual blocks start as the identity: a shallow network learns first
    encoder, decoder = torch.compile(vae.encoder), torch.compile(vae.decoder)
    pictures = pool["pictures"].flatten(0, 1)
    test = held_out["pictures"][:64].flatten(0, 1).to(DEVICE).float() / 127.5 - 1

    def loss_function(generator: torch.Generator) -> torch.Tensor:
        x = (
            pictures[torch.randint(len(pictures), (batch,), generator=generator)]
            .to(DEVICE)
            .contiguous(memory_format=torch.channels_last)
            / 127.5
            - 1
        )
        with torch.autocast(DEVICE, torch.bfloat16, enabled=BF16):
            mean, logvar = encoder(x).chunk(2, dim=1)
            logvar = logvar.clamp(-30, 20)
            noise = torch.randn(mean.shape, generator=generator).to(DEVICE)
            decoded = decoder(mean + torch.exp(0.5 * logvar) * noise)
        rmse = ((decoded.float() - x) ** 2).flatten(1).mean(1).sqrt()
        kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).float().mean()
        return rmse.mean() + KL_WEIGHT * kl

    @torch.no_grad()
    def report() -> dict[str, float]:
        return {"held_out_psnr": psnr(vae.decode(vae.encode(test).latent_dist.mode()).sample, test)}

    fit("vae", torch.nn.ModuleDict({"vae": vae}), loss_function, work, steps, 2e-3, report, muon_learning_rate=0.02)
    with torch.no_grad():
        z = vae.encode(pictures[:2048].to(DEVICE).float() / 127.5 - 1).latent_dist.mode()
    vae.register_to_config(shift_factor=round(float(z.mean()), 6), scaling_factor=round(1 / float(z.std()), 6))
    return vae.eval().requires_grad_(False)


@torch.no_grad()
def encode_pool(work: Path, name: str, vae: AutoencoderKL, pool: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Packed latents `[rows, 2, tokens, 64]` (source, target) in fp16 and token weights `[rows, tokens, 1]`."""
    path = work / f"latents-{name}.npy"
    rows, side = len(pool["pictures"]), SIZE // 4
    if not path.exists():
        partial = path.with_suffix(".tmp.npy")
        latents = np.lib.format.open_memmap(partial, "w+", np.float16, (rows, 2, (side // 2) ** 2, 64))
        for i in tqdm(range(0, rows, 128), desc=f"encoding {name}", mininterval=5):
            pictures = pool["pictures"][i : i + 128].flatten(0, 1).to(DEVICE).float() / 127.5 - 1
            z = (vae.encode(pictures).latent_dist.mode() - vae.config.shift_factor) * vae.config.scaling_factor
            packed = FluxKontextPipeline._pack_latents(z, len(z), 16, side, side)
            latents[i : i + 128] = packed.unflatten(0, (-1, 2)).cpu().numpy()
        latents.flush()
        partial.replace(path)
    masks = F.max_pool2d(pool["masks"].float()[:, None], 8).flatten(2).transpose(1, 2)
    return torch.from_numpy(np.load(path)), 1 + (REGION_WEIGHT - 1) * masks


def train_editor(
    work: Path,
    steps: int,
    quarter_steps: int,
    guided_steps: int,
    data: tuple[torch.Tensor, torch.Tensor, list[str]],
    held_out: tuple[torch.Tensor, torch.Tensor, list[str]],
    batch: int = 32,
) -> dict[str, Any]:
    """First on single quarters of the pictures, three times as many for the same time, then on whole ones, then guided.

    A quarter keeps its place in the position ids, so "in the top left" means what it says in both.
    """
    torch.manual_seed(0)
    parts = build_editor()
    transformer, clip, t5 = (parts[name].to(DEVICE) for name in ("transformer", "text_encoder", "text_encoder_2"))
    side = SIZE // 8
    ids = FluxKontextPipeline._prepare_latent_image_ids(1, side, side, DEVICE, torch.float32)
    everything = torch.arange(side**2)
    quarters = everything.view(2, side // 2, 2, side // 2).transpose(1, 2).reshape(4, -1)
    txt_ids = torch.zeros(TEXT_LENGTH, 3, device=DEVICE)
    modules = torch.nn.ModuleDict({"transformer": transformer, "clip": clip, "t5": t5})
    forward = torch.compile(transformer, dynamic=False)

    def tokenize(tokenizer: Any, texts: list[str]) -> torch.Tensor:
        return tokenizer(
            texts, padding="max_length", max_length=TEXT_LENGTH, truncation=True, return_tensors="pt"
        ).input_ids

    def prepare(arrays: tuple[torch.Tensor, torch.Tensor, list[str]]) -> tuple[torch.Tensor, ...]:
        latents, weights, texts = arrays
        return latents, weights, tokenize(parts["tokenizer"], texts), tokenize(parts["tokenizer_2"], texts)

    train, test = prepare(data), prepare(held_out)
    empty = tokenize(parts["tokenizer"], [""]).to(DEVICE), tokenize(parts["tokenizer_2"], [""]).to(DEVICE)
    odds = torch.tensor([1.0 if text.startswith("remove") else DRAWING_SHARE for text in data[2]])

    def flow_matching_loss(
        arrays: tuple[torch.Tensor, ...],
        rows: torch.Tensor,
        tokens: torch.Tensor,
        generator: torch.Generator,
        dropout: float = 0.0,
        teacher: dict[str, Any] | None = None,
    ) -> torch.Tensor:
        latents, weights, clip_ids, t5_ids = (array[rows].to(DEVICE) for array in arrays)
        weights = weights[:, tokens]
        source, target = latents[:, :, tokens].float().unbind(1)
        noise = torch.randn(target.shape, generator=generator).to(DEVICE)
        u = torch.rand(len(rows), generator=generator).to(DEVICE)
        sigma = 2.0 * u / (1 + u)
        x = torch.lerp(target, noise, sigma[:, None, None])
        reference_ids = ids[tokens] + torch.tensor([1.0, 0.0, 0.0], device=DEVICE)

        def velocity(parts: Any, clip_ids: torch.Tensor, t5_ids: torch.Tensor) -> torch.Tensor:
            with torch.autocast(DEVICE, torch.bfloat16, enabled=BF16):
                return parts["transformer"](
                    hidden_states=torch.cat([x, source], dim=1),
                    encoder_hidden_states=parts["t5"](t5_ids)[0],
                    pooled_projections=parts["clip"](clip_ids).pooler_output,
                    timestep=sigma,
                    img_ids=torch.cat([ids[tokens], reference_ids]),
                    txt_ids=txt_ids,
                    return_dict=False,
                )[0][:, : target.shape[1]].float()

        aim = noise - target
        if teacher is not None:
            with torch.no_grad():
                told = velocity(teacher, clip_ids, t5_ids)
                untold = velocity(teacher, *(silence.expand(len(rows), -1) for silence in empty))
            # Outside the region guidance only drives the background away from the source.
            aim = told + (GUIDANCE - 1) * (weights > 1) * (told - untold)
        if dropout:
            silent = torch.rand(len(rows), 1, generator=generator).to(DEVICE) < dropout
            clip_ids, t5_ids = torch.where(silent, empty[0], clip_ids), torch.where(silent, empty[1], t5_ids)
        error = velocity({**modules, "transformer": forward}, clip_ids, t5_ids) - aim
        return (weights * error**2).sum() / (weights.sum() * target.shape[-1])

    # A quarter is trained on mostly where the edit is, and now and then where nothing happens.
    edited = (train[1][:, quarters, 0] > 1).any(-1)  # [rows, 4]
    quarter_odds = odds[:, None] * torch.where(edited, 1.0, 0.05)

    def quarters_loss(generator: torch.Generator) -> torch.Tensor:
        place = int(torch.randint(4, (), generator=generator))
        rows = torch.multinomial(quarter_odds[:, place], 3 * batch, generator=generator)
        return flow_matching_loss(train, rows, quarters[place], generator, TEXT_DROPOUT)

    def whole_loss(generator: torch.Generator) -> torch.Tensor:
        return flow_matching_loss(
            train, torch.multinomial(odds, batch, generator=generator), everything, generator, TEXT_DROPOUT
        )

    @torch.no_grad()
    def report() -> dict[str, float]:
        generator = torch.Generator().manual_seed(7)
        parts = [torch.arange(i, i + batch) for i in range(0, 4 * batch, batch)]
        losses = [flow_matching_loss(test, rows, everything, generator) for rows in parts]
        return {"held_out_loss": float(torch.stack(losses).mean())}

    fit("quarters", modules, quarters_loss, work, quarter_steps, 1.5e-3, report)
    fit("editor", modules, whole_loss, work, steps, 1.5e-3, report)
    teacher = copy.deepcopy(modules).requires_grad_(False)
    compiled = {**teacher, "transformer": torch.compile(teacher["transformer"], dynamic=False)}

    def guided_loss(generator: torch.Generator) -> torch.Tensor:
        rows = torch.multinomial(odds, batch, generator=generator)
        return flow_matching_loss(train, rows, everything, generator, teacher=compiled)

    fit("guided", modules, guided_loss, work, guided_steps, 5e-4, report)
    with torch.no_grad():
        for before, guided in zip(teacher.parameters(), modules.parameters(), strict=True):
            guided.copy_(before.lerp(guided, GUIDED_SHARE))
    return parts


def export(parts: dict[str, Any], vae: AutoencoderKL, out: Path) -> None:
    """A plain `FluxKontextPipeline` folder, the large weights in fp16.

    The text encoders stay in fp32: transformers opens weights in the dtype they were saved in, diffusers in fp32, and a
    pipeline needs one dtype.
    """
    parts = {name: copy.deepcopy(part) for name, part in parts.items()}
    for name in ("text_encoder", "text_encoder_2"):
        parts[name].cpu()
    parts["transformer"].to("cpu", torch.float16)
    FluxKontextPipeline(vae=copy.deepcopy(vae).to("cpu", torch.float16), **parts).save_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/tiny"), help="checkpoints, logs, drawn pictures")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "weights", help="the folder to write")
    parser.add_argument("--pool", type=int, default=48_000, help="rows of CompBench-mini to draw")
    parser.add_argument("--vae-steps", type=int, default=4_250)
    parser.add_argument("--quarter-steps", type=int, default=5_750)
    parser.add_argument("--editor-steps", type=int, default=2_200)
    parser.add_argument("--guided-steps", type=int, default=600)
    arguments = parser.parse_args()
    work = arguments.work
    work.mkdir(parents=True, exist_ok=True)
    pool, held_out = make_pool(work, "train", arguments.pool), make_pool(work, "test", 512)
    vae = train_vae(work, arguments.vae_steps, pool, held_out)
    data = (*encode_pool(work, "train", vae, pool), pool["instructions"])
    test = (*encode_pool(work, "test", vae, held_out), held_out["instructions"])
    steps = arguments.editor_steps, arguments.quarter_steps, arguments.guided_steps
    export(train_editor(work, *steps, data, test), vae, arguments.out)


if __name__ == "__main__":
    main()
