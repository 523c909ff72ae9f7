"""One cell of the study: `python -m benchmarks.study.cell FOLDER` reads `cell.json` and writes `result.json`.

A result holds arms (one, or several kinds of exploration); an arm holds `per_edit` lists, one number for each held-out
edit in the same order everywhere, `values` of the whole cell, and `curves`.
"""

import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor, nn

from rcgrpo import RCGRPOConfig, RCGRPOTrainer, compbench_mini
from rcgrpo.cli.parsing import use_embedded_model
from rcgrpo.cli.train import LORA_TARGETS
from rcgrpo.data.corruption import corrupt_dataset
from rcgrpo.data.edits import Edit, EditRows
from rcgrpo.diagnostics import (
    Finding,
    InsideOutside,
    colour_entropy,
    edge_density,
    gradient_snr,
    judge,
    match_strength,
    mean_curve,
    survey,
    target_closeness,
    variance_split,
)
from rcgrpo.editors import FluxKontextEditor
from rcgrpo.evaluation import MINI_METRICS, Result, Scorer
from rcgrpo.report import write_atomically
from rcgrpo.rewards import resolve_rewards
from rcgrpo.rewards.pictures import image_tensor
from rcgrpo.rollout import Exploration, make_groups
from rcgrpo.tiny import WEIGHTS
from rcgrpo.transitions import choose, gather

from .harness import Compute, Sizes, finite, updates_for

SCRIPT_KEYS = ("reward_funcs", "lora_r", "lora_alpha", "lora_target_modules")
EVALUATION_STEPS = 8
EDITS_AT_ONCE = 16


def make_trainer(spec: Mapping[str, Any], folder: Path) -> RCGRPOTrainer:
    """The trainer of a cell, its rows with the cell's fault in their masks."""
    sizes, config = Sizes(**spec["sizes"]), dict(spec["config"])
    script = {key: config.pop(key) for key in SCRIPT_KEYS if key in config}
    steps = updates_for(spec["config"], spec["budget"], sizes.edits_per_update)
    rows = compbench_mini("train", sizes.train_edits)
    if spec["corruption"] is not None:
        kind, severity = spec["corruption"]
        rows = corrupt_dataset(rows, kind, severity, seed=spec["seed"])
    config |= {
        "per_device_train_batch_size": sizes.edits_per_update,
        "max_steps": steps,
        "warmup_steps": min(config.get("warmup_steps", 0), steps // 4),
        "seed": spec["seed"],
        "save_strategy": "no",
        "check_rows": 0,
        "disable_tqdm": True,
        "use_cpu": not torch.cuda.is_available(),
    }
    return RCGRPOTrainer(
        model=str(WEIGHTS),
        reward_funcs=list(script["reward_funcs"]),
        args=RCGRPOConfig(str(folder / "run"), **config),
        train_dataset=rows,
        peft_config=LoraConfig(
            r=script.get("lora_r", 16),
            lora_alpha=script.get("lora_alpha", 16),
            target_modules=list(script.get("lora_target_modules", LORA_TARGETS)),
        ),
    )


def held_out(count: int) -> list[Edit]:
    rows = EditRows(compbench_mini("test", count), "test")
    return [rows.edit(i) for i in range(count)]


JUDGED = {
    "reward": "compbench_mini",
    "edit": "region_edit",
    "keep": "background_keep",
    "held_out": target_closeness,
}
"""The same for every variant, whatever it was trained on."""


def judges() -> dict[str, Any]:
    return {name: resolve_rewards(reward)[0] for name, reward in JUDGED.items()}


# Trained cells --------------------------------------------------------------------------------------------------------


def train_cell(spec: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Train within the budget, then measure held-out edits from plain noise with the embedded editor's own settings."""
    trainer, sizes, compute = make_trainer(spec, folder), Sizes(**spec["sizes"]), Compute()
    began = time.perf_counter()
    if spec["trained"]:
        with compute.counting(trainer.pipeline.transformer):
            trainer.train()
        trainer.save_model()
    seconds = time.perf_counter() - began
    trainer.model.eval()
    config, spent = trainer.args, compute.report()
    editor = FluxKontextEditor(
        trainer.pipeline, config.resolution, EVALUATION_STEPS, max_sequence_length=config.max_sequence_length
    )
    per_edit = measure(editor, trainer.model, held_out(sizes.eval_edits), spec["seed"])
    # Diversity and leakage, of groups that all variants explore alike.
    found = survey(
        editor,
        trainer.model,
        held_out(sizes.survey_edits),
        sizes.survey_generations,
        Exploration(0.7),
        ("study", spec["seed"]),
        {},
    )
    for name in ("diversity_inside", "leakage"):
        per_edit[name] = [finding.numbers[name] for finding in found]
    # The base has no updates: it is what the others gain over.
    values = {"units": spent["units"], "updates": trainer.state.global_step, "minutes": seconds / 60}
    history = [row for row in trainer.state.log_history if "reward" in row]
    return {
        "arms": {"": {"per_edit": per_edit, "values": values}},
        "compute": spent,
        "train_seconds": seconds,
        "log_history": history,
    }


def measure(editor: FluxKontextEditor, model: nn.Module, edits: Sequence[Edit], seed: int) -> dict[str, list[Any]]:
    """Every metric of one candidate for each edit, from noise that depends on seed and edit alone."""
    scorer, asked = Scorer(MINI_METRICS, size=None), judges()
    columns: dict[str, list[Any]] = {}
    for start in range(0, len(edits), EDITS_AT_ONCE):
        part = edits[start : start + EDITS_AT_ONCE]
        plain = Exploration(1.0, kind="global")
        groups = make_groups(editor, model, part, 1, plain, ("study", seed), "mass")
        rows = scorer([Result.of(group.images[0], group.edit) for group in groups])
        for group in groups:
            scores = judge(group, asked)
            picture, mask = image_tensor(group.images[0])[None], image_tensor(group.mask)[0].round()
            numbers = {name: float(values[0]) for name, values in scores.items()}
            numbers["edge_density"] = float(edge_density(picture, mask))
            numbers["colour_entropy"] = float(colour_entropy(picture, mask))
            for name in ("mass", "density", "contrast"):
                numbers[f"attention_{name}"] = float(getattr(group.attention, name)[0])
            for name, value in numbers.items():
                rows.setdefault(name, []).append(value)
        for name, values in rows.items():
            columns.setdefault(name, []).extend(values)
    return columns


# Groups without training ----------------------------------------------------------------------------------------------


def arm_of(findings: Sequence[Finding], **values: float) -> dict[str, Any]:
    """An arm's numbers by edit."""
    names = findings[0].numbers
    return {"per_edit": {name: [finding.numbers[name] for finding in findings] for name in names}, "values": values}


def variance_cell(spec: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Region noise, global noise of the same strength, and global noise matched to the same diversity inside."""
    trainer, sizes, compute = make_trainer(spec, folder), Sizes(**spec["sizes"]), Compute()
    edits, asked, config = held_out(sizes.survey_edits), judges(), trainer.args
    key = ("study", spec["seed"])

    def look(kind: Any, strength: float, rewards: Mapping[str, Any]) -> list[Finding]:
        explored = Exploration(strength, config.keep_strength, config.antithetic, config.mask_growth, kind)
        return survey(trainer.editor, trainer.model, edits, sizes.survey_generations, explored, key, rewards)

    def inside(findings: Sequence[Finding]) -> float:
        return float(torch.tensor([f.numbers["latent_var_inside"] for f in findings]).nanmean())

    with compute.counting(trainer.pipeline.transformer):
        trainer.model.eval()
        strength = config.edit_strength
        found = {"region": look("region", strength, asked), "global": look("global", strength, asked)}
        target = inside(found["region"])
        match = match_strength(lambda value: inside(look("global", value, {})), target)
        found["global, matched"] = look("global", match.strength, asked)
        arms = {}
        for name, findings in found.items():
            used = match.strength if name == "global, matched" else strength
            split = variance_split(
                *(torch.stack([f.scores[part] for f in findings]) for part in ("reward", "edit", "keep"))
            )
            explored = Exploration(
                used,
                config.keep_strength,
                config.antithetic,
                config.mask_growth,
                "region" if name == "region" else "global",
            )
            snr, unbiased = gradient_snr(group_gradients(trainer, edits, explored, key))
            arms[name] = arm_of(
                findings,
                strength=used,
                split_edit=split.edit,
                split_keep=split.keep,
                split_rest=split.rest,
                gradient_snr=snr,
                gradient_snr_unbiased=unbiased,
            )
    return {"arms": arms, "match": {**match._asdict(), "target": target}, "compute": compute.report()}


def group_gradients(
    trainer: RCGRPOTrainer, edits: Sequence[Edit], exploration: Exploration, key: tuple[Any, ...]
) -> Tensor:
    """The loss's gradient from each edit's group alone, `[groups, parameters]`; groups without spread give none."""
    trainer.exploration, args = exploration, trainer.args
    parameters = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    gradients = []
    for edit in edits:
        groups = trainer.make_groups([edit], args.num_generations, key)
        trainer.score_groups(groups)
        if not bool(groups[0].advantages.any()):  # type: ignore[union-attr]
            continue
        where = choose(groups, trainer.policy, args.num_anchors, args.num_policy_steps, args.policy_step_indices, key)
        loss = trainer.compute_loss(trainer.model, gather(groups, where, trainer.policy, {}))
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
        flat = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]
        gradients.append(torch.cat([tensor.flatten().float().cpu() for tensor in flat]))
    trainer.forget_metrics()
    return torch.stack(gradients)


def leakage_cell(spec: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Latent variance by step and hidden variance by block, for region and for global noise of one strength."""
    trainer, sizes, compute = make_trainer(spec, folder), Sizes(**spec["sizes"]), Compute()
    edits, config = held_out(sizes.survey_edits), trainer.args
    arms = {}
    with compute.counting(trainer.pipeline.transformer):
        trainer.model.eval()
        for kind in ("region", "global"):
            explored = Exploration(
                config.edit_strength, config.keep_strength, config.antithetic, config.mask_growth, kind
            )
            arguments = (trainer.editor, trainer.model, edits, sizes.survey_generations, explored)
            seen = {
                name: survey(*arguments, ("study", spec["seed"]), {}, depth_step=step)
                for name, step in (("first", 0), ("middle", config.num_inference_steps // 2))
            }
            arms[kind] = arm_of(seen["first"])
            steps = mean_curve([finding.steps for finding in seen["first"]])
            curves = {
                "inside_by_step": steps.inside,
                "outside_by_step": steps.outside,
                "leakage_by_step": steps.leakage,
            }
            for name, findings in seen.items():
                blocks: list[InsideOutside] = [f.depth for f in findings if f.depth is not None]
                curves[f"leakage_by_block_{name}"] = mean_curve(blocks).leakage
            arms[kind]["curves"] = {name: curve.tolist() for name, curve in curves.items()}
    return {"arms": arms, "sigmas": seen["first"][0].sigmas.tolist(), "compute": compute.report()}


def main(folder: Path) -> None:
    """Run the cell whose `cell.json` is in the folder."""
    use_embedded_model()
    spec = json.loads((folder / "cell.json").read_text())
    began = time.perf_counter()
    result = {"train": train_cell, "variance": variance_cell, "leakage": leakage_cell}[spec["kind"]](spec, folder)
    result["seconds"] = {"total": time.perf_counter() - began, "train": result.pop("train_seconds", 0.0)}
    with write_atomically(folder / "result.json") as path:
        path.write_text(json.dumps(finite({"spec": spec, **result}), indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
