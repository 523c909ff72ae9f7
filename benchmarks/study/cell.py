"""One cell of the study: `python -m benchmarks.study.cell FOLDER` reads `cell.json` and writes `result.json`.

A result holds arms (one, or several kinds of exploration); an arm holds `per_edit` lists, one number for each held-out
edit in the same order everywhere, `values` of the whole cell, and `curves`.
"""

import json
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from PIL import Image
from torch import Tensor, nn

from rcgrpo import RCGRPOConfig, RCGRPOTrainer
from rcgrpo.cli.parsing import use_embedded_model
from rcgrpo.data.edits import Edit, EditRows
from rcgrpo.data.mini import render
from rcgrpo.editors import Editor, FluxKontextEditor, open_editor
from rcgrpo.evaluation.held_out import MINI_METRICS, Result, Scorer
from rcgrpo.evaluation.survey import Finding, depth_variance, judge, match_strength, survey
from rcgrpo.groups.diagnostics import (
    InsideOutside,
    colour_entropy,
    edge_density,
    gradient_snr,
    mean_curve,
    target_closeness,
    variance_split,
)
from rcgrpo.groups.rollout import Exploration, Group, make_groups
from rcgrpo.groups.transitions import choose, gather
from rcgrpo.maths.regions import corrupt
from rcgrpo.reporting.files import write_atomically
from rcgrpo.rewards import resolve_rewards
from rcgrpo.rewards.pictures import image_tensor
from rcgrpo.tiny import WEIGHTS

from .harness import EVALUATION_STEPS, Compute, Sizes, finite, updates_for

SCRIPT_KEYS = ("reward_funcs", "lora_r", "lora_alpha", "lora_target_modules")
EDITS_AT_ONCE = 16


class MiniRows(Sequence[dict[str, Any]]):
    """CompBench-mini's rows, each drawn when it is first asked for: a short run reads few of them.

    Args:
        split: "train" or "test".
        count: number of rows.
        corruption: kind and severity of a fault in every mask, as `corrupt_dataset` has it.
        seed: of the fault.
    """

    def __init__(self, split: str, count: int, corruption: tuple[Any, float] | None = None, seed: int = 0) -> None:
        self.split, self.length, self.corruption, self.seed = split, count, corruption, seed
        self._drawn: dict[int, dict[str, Any]] = {}

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < self.length:
            raise IndexError(f"row: got {index}, expected one of 0..{self.length - 1}")
        if index not in self._drawn:
            row = render(self.split, index)
            if self.corruption is not None:
                spoilt = corrupt(row["mask"], *self.corruption, key=(self.seed, index))
                row["mask"] = Image.fromarray((spoilt * 255).round().byte().numpy())
            self._drawn[index] = row
        return self._drawn[index]


def make_trainer(spec: Mapping[str, Any], folder: Path) -> RCGRPOTrainer:
    """The trainer of a cell, its rows with the cell's fault in their masks."""
    sizes, config = Sizes(**spec["sizes"]), dict(spec["config"])
    script = {key: config.pop(key) for key in SCRIPT_KEYS if key in config}
    steps = updates_for(spec["config"], spec["budget"], sizes.edits_per_update)
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
        train_dataset=MiniRows("train", sizes.train_edits, spec["corruption"], spec["seed"]),
        peft_config=LoraConfig(
            r=script.get("lora_r", 16),
            lora_alpha=script.get("lora_alpha", 16),
            target_modules=list(script.get("lora_target_modules", FluxKontextEditor.lora_targets)),
        ),
    )


def held_out(count: int, first: int = 0) -> list[Edit]:
    rows = EditRows(MiniRows("test", first + count), "test")
    return [rows.edit(i) for i in range(first, first + count)]


def judges(*names: str) -> dict[str, Any]:
    """Rewards of these names in `JUDGED`, the same for every variant, whatever it was trained on."""
    return {name: resolve_rewards(JUDGED[name])[0] for name in names}


JUDGED: dict[str, Any] = {
    "reward": "compbench_mini",
    "edit": "region_edit",
    "keep": "background_keep",
    "held_out": target_closeness,
}


# Trained cells --------------------------------------------------------------------------------------------------------


def train_cell(spec: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Train within the budget, then measure held-out edits from plain noise with the embedded editor's own settings."""
    trainer, sizes, compute = make_trainer(spec, folder), Sizes(**spec["sizes"]), Compute()
    began, used = time.perf_counter(), time.process_time()
    if spec["trained"]:
        with compute.counting(trainer.pipeline.transformer):
            trainer.train()
        trainer.save_model()
    seconds, used = time.perf_counter() - began, time.process_time() - used
    trainer.model.eval()
    config, spent = trainer.args, compute.report()
    editor = open_editor(
        trainer.pipeline, config.resolution, EVALUATION_STEPS, max_sequence_length=config.max_sequence_length
    )
    per_edit = measure(editor, trainer.model, held_out(sizes.eval_edits, sizes.eval_from), spec["seed"])
    if spec["survey"]:  # of groups that all variants explore alike
        edits, explored, key = held_out(sizes.survey_edits), Exploration(0.7), ("study", spec["seed"])
        found = survey(editor, trainer.model, edits, sizes.survey_generations, explored, key, {})
        for name in ("diversity_inside", "leakage"):
            per_edit[name] = [finding.numbers[name] for finding in found]
    # The base has no updates: it is what the others gain over.
    values = {"units": spent["units"], "updates": trainer.state.global_step, "cpu_minutes": used / 60}
    history = [row for row in trainer.state.log_history if "reward" in row]
    return {
        "arms": {"": {"per_edit": per_edit, "values": values}},
        "compute": spent,
        "train_seconds": seconds,
        "log_history": history,
    }


def measure(editor: Editor, model: nn.Module, edits: Sequence[Edit], seed: int) -> dict[str, list[Any]]:
    """Every metric of one candidate for each edit, from noise that depends on seed and edit alone."""
    scorer, asked = Scorer(MINI_METRICS, size=None), judges("reward", "keep", "held_out")
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

REGION, GLOBAL, MATCHED = "region", "global", "global, matched"


def groups_cell(spec: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Region noise, global noise of the same strength, and global noise matched to the same diversity inside."""
    trainer, sizes, compute = make_trainer(spec, folder), Sizes(**spec["sizes"]), Compute()
    edits, asked, config = held_out(sizes.survey_edits), judges("reward", "edit", "keep"), trainer.args
    key, strength = ("study", spec["seed"]), config.edit_strength
    depths = {"first": 0, "middle": config.num_inference_steps // 2}

    def explore(kind: Any, strength: float, rewards: Mapping[str, Any], visit: Any = None) -> list[Finding]:
        explored = Exploration(strength, config.keep_strength, config.antithetic, config.mask_growth, kind)
        arguments = (edits, sizes.survey_generations, explored, key, rewards)
        return survey(trainer.editor, trainer.model, *arguments, visit=visit)

    def look(kind: Any, strength: float) -> tuple[dict[str, Any], float]:
        """An arm, and its mean latent variance inside."""
        gradients: list[Tensor] = []
        seen: dict[str, list[InsideOutside]] = {name: [] for name in depths}

        def visit(group: Group, scores: Mapping[str, Tensor]) -> None:
            gradients.extend(group_gradient(trainer, group, key))
            for name, step in depths.items():
                seen[name].append(depth_variance(trainer.editor, trainer.model, group, step))

        found = explore(kind, strength, asked, visit)
        return arm_of(found, gradients, seen, strength), inside(found)

    def inside(findings: Sequence[Finding]) -> float:
        return float(torch.tensor([finding.numbers["latent_var_inside"] for finding in findings]).nanmean())

    with compute.counting(trainer.pipeline.transformer):
        trainer.model.eval()
        arms = {}
        arms[REGION], target = look("region", strength)
        arms[GLOBAL], reached = look("global", strength)
        match = match_strength(lambda s: inside(explore("global", s, {})), target, known={strength: reached})
        arms[MATCHED] = arms[GLOBAL] if match.strength == strength else look("global", match.strength)[0]
    return {"arms": arms, "match": {**match._asdict(), "target": target}, "compute": compute.report()}


def arm_of(
    findings: Sequence[Finding],
    gradients: Sequence[Tensor],
    depths: Mapping[str, Sequence[InsideOutside]],
    strength: float,
) -> dict[str, Any]:
    """An arm of groups: numbers by edit, of the whole cell, and curves by step and by block."""
    split = variance_split(*(torch.stack([f.scores[part] for f in findings]) for part in ("reward", "edit", "keep")))
    snr, unbiased = gradient_snr(torch.stack(list(gradients))) if len(gradients) > 1 else (math.nan, math.nan)
    steps = mean_curve([finding.steps for finding in findings])
    curves = {"inside_by_step": steps.inside, "outside_by_step": steps.outside, "leakage_by_step": steps.leakage}
    for name, seen in depths.items():
        curves[f"leakage_by_block_{name}"] = mean_curve(seen).leakage
    return {
        "per_edit": {name: [finding.numbers[name] for finding in findings] for name in findings[0].numbers},
        "values": {
            "strength": strength,
            "split_edit": split.edit,
            "split_keep": split.keep,
            "split_rest": split.rest,
            "gradient_snr": snr,
            "gradient_snr_unbiased": unbiased,
        },
        "curves": {name: curve.tolist() for name, curve in curves.items()},
    }


def group_gradient(trainer: RCGRPOTrainer, group: Group, key: tuple[Any, ...]) -> list[Tensor]:
    """The loss's gradient from one group alone, `[parameters]`; none from a group without spread."""
    args = trainer.args
    trainer.score_groups([group])
    if not bool(group.advantages.any()):  # type: ignore[union-attr]
        return []
    parameters = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    where = choose([group], trainer.policy, args.num_anchors, args.num_policy_steps, args.policy_step_indices, key)
    loss = trainer.compute_loss(trainer.model, gather([group], where, trainer.policy, {}))
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    trainer.forget_metrics()
    flat = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]
    return [torch.cat([tensor.flatten().float().cpu() for tensor in flat])]


def main(folder: Path) -> None:
    """Run the cell whose `cell.json` is in the folder."""
    use_embedded_model()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    spec = json.loads((folder / "cell.json").read_text())
    began, used = time.perf_counter(), time.process_time()
    result = {"train": train_cell, "groups": groups_cell}[spec["kind"]](spec, folder)
    result["seconds"] = {
        "total": time.perf_counter() - began,
        "train": result.pop("train_seconds", 0.0),
        "cpu": time.process_time() - used,
    }
    with write_atomically(folder / "result.json") as path:
        path.write_text(json.dumps(finite({"spec": spec, **result}), indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
