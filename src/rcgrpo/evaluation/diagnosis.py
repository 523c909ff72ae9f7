"""What `rcgrpo diagnose` found, as a table, as JSON and as pictures.

The arms of a diagnosis are surveys of the same edits from the same draws of noise: region noise, global noise of the
same strength, global noise matched to the same diversity inside and, for a LoRA, its base. Every difference is paired.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from .. import __version__
from ..groups.diagnostics import mean_curve, variance_split
from ..inputs.extras import require
from ..inputs.masks import mask_picture
from ..reporting.files import write_atomically
from ..reporting.sheets import contact_sheet, heatmap, outline
from ..reporting.statistics import PairedDifference, macro_bootstrap, pad_table, paired_bootstrap
from .survey import Finding, Match

REGION, GLOBAL, MATCHED, BASE = "region", "global", "global, matched", "base model, region"

TABLE = {
    "reward": "reward",
    "reward_var": "reward variance in a group",
    "edit_reward_var": "variance of the edit reward",
    "keep_reward_var": "variance of the keep reward",
    "edit_spearman": "Spearman: advantage, edit reward",
    "keep_spearman": "Spearman: advantage, keep reward",
    "effective_group_size": "effective group size",
    "latent_var_inside": "latent variance inside",
    "latent_var_outside": "latent variance outside",
    "leakage": "leakage (outside / inside)",
    "diversity_inside": "diversity inside",
    "attention_density": "attention density",
    "edge_density": "edge density",
    "colour_entropy": "colour entropy (bits)",
    "held_out": "held-out reward",
}
"""Numbers of `Finding`, as the table calls them."""

WATCHED = ("reward", "edit", "keep", "held_out", "edge_density", "colour_entropy", "diversity_inside", "leakage")
"""What a LoRA is compared with its base in."""

LOWER_IS_BETTER = ("keep_reward_var", "leakage")
NEITHER_IS_BETTER = tuple(TABLE[name] for name in ("reward_var", "edge_density", "colour_entropy"))
"""Whose change is good or bad by where it comes from."""


def write_diagnosis(
    folder: Path, settings: Mapping[str, Any], arms: dict[str, list[Finding]], match: Match, target: float
) -> str:
    """Write `diagnostics.json`, `diagnostics.md` and the pictures; the text of the second is returned.

    Args:
        settings: the command's flags by name.
        arms: findings by arm, of the same edits; `BASE` only beside a LoRA.
        match, target: how the strength of `MATCHED` was found.
    """
    splits, estimates = {}, {}
    for arm, findings in arms.items():
        scores = [torch.stack([f.scores[name] for f in findings]) for name in ("reward", "edit", "keep")]
        splits[arm] = variance_split(*scores)
        table = [[f.numbers.get(name, math.nan) for name in TABLE] for f in findings]
        estimates[arm] = dict(zip(TABLE, macro_bootstrap(table, [0] * len(findings)), strict=True))
    matched = paired(arms[MATCHED], arms[REGION], ("reward_var", "edit_reward_var", "keep_reward_var", "leakage"))
    changes = paired(arms[BASE], arms[REGION], WATCHED) if BASE in arms else []
    warnings = alarms(changes)
    curves = {arm: mean_curve([f.steps for f in findings]) for arm, findings in arms.items()}
    depths = {
        arm: mean_curve([f.depth for f in findings if f.depth is not None])
        for arm, findings in arms.items()
        if findings[0].depth is not None
    }
    sigmas = arms[REGION][0].sigmas
    reached = abs(match.reached - target) <= settings["match_tolerance"] * target
    content = {
        "settings": {"rcgrpo": __version__, **settings},
        "match": {
            **match._asdict(),
            "target": target,
            "within_tolerance": reached,
            "method": "power law and bisection",
        },
        "sigmas": sigmas.tolist(),
        "arms": {
            arm: {
                "numbers": {name: asdict(estimate) for name, estimate in estimates[arm].items()},
                "reward_variance": splits[arm]._asdict(),
                "by_step": {side: getattr(curves[arm], side).tolist() for side in ("inside", "outside")},
                "by_block": {side: getattr(depths[arm], side).tolist() for side in ("inside", "outside")}
                if arm in depths
                else None,
                "edits": [{"label": f.edit.label, **f.numbers} for f in findings],
            }
            for arm, findings in arms.items()
        },
        "region_against_matched_global": [asdict(row) for row in matched],
        "lora_against_base": [asdict(row) for row in changes],
        "alarms": warnings,
    }
    head = ["", *arms]
    lines = [[title, *(interval(estimates[arm][name]) for arm in arms)] for name, title in TABLE.items()]
    shares = [[arm, *(f"{value:.3e}" for value in splits[arm])] for arm in arms]
    close = "" if reached else f" (not within {settings['match_tolerance']:.0%}: strength 1 falls short, or it ended)"
    subject, edits = settings["lora"] or settings["model"], len(arms[REGION])
    blocks = [
        f"# Diagnosis of {subject} on {edits} edits of {settings['dataset']}",
        f"Groups of {settings['num_generations']}, {settings['num_inference_steps']} steps, "
        f"edit strength {settings['edit_strength']:g}, keep strength {settings['keep_strength']:g}. *{MATCHED}*: the "
        "strength of the global noise is such that the latent variance inside the region is the same at the end of the "
        f"ODE: strength {match.strength:.3f} gives {match.reached:.5f} for {target:.5f}{close}. Means with 95 % "
        "bootstrap intervals over edits.",
        pad_table([head, *lines]),
        "## Reward variance in groups, by what it goes with",
        pad_table([["", "total", "edit", "keep", "neither"], *shares]),
        "## From matched global noise to region noise",
        difference_table(matched),
    ]
    if changes:
        blocks += ["## From the base to the LoRA", difference_table(changes)]
        blocks += [f"- **{warning}**" for warning in warnings] or ["No alarm."]
    text = "\n\n".join(blocks) + "\n"
    with write_atomically(folder / "diagnostics.json") as path:
        path.write_text(json.dumps(without_nan(content), indent=1, ensure_ascii=False) + "\n")
    with write_atomically(folder / "diagnostics.md") as path:
        path.write_text(text)
    plot_leakage(folder / "leakage.png", sigmas.tolist(), curves, depths)
    plot_split(folder / "reward_variance.png", splits)
    draw_attention(folder / "attention.png", arms[REGION])
    return text


def paired(before: Sequence[Finding], after: Sequence[Finding], names: Sequence[str]) -> list[PairedDifference]:
    """Paired differences of the numbers that at least two edits have on both sides."""
    rows = []
    for name in names:
        old, new = ([f.numbers.get(name, math.nan) for f in findings] for findings in (before, after))
        if sum(a == a and b == b for a, b in zip(old, new, strict=True)) > 1:
            title = TABLE.get(name, f"{name} reward")
            rows.append(paired_bootstrap(old, new, metric=title, higher_is_better=name not in LOWER_IS_BETTER))
    return rows


def alarms(changes: Sequence[PairedDifference]) -> list[str]:
    """What in a LoRA's differences to its base looks like reward hacking; only clear differences count."""
    clear = {row.metric: row for row in changes if row.significant}
    change = {name: row.difference / abs(row.before) for name, row in clear.items() if row.before}
    found = []
    if "reward" in clear and (rise := clear["reward"].difference) > 0:
        for name in ("held-out reward", "keep reward"):
            if (fall := -change.get(name, 0)) > 0.01:
                found.append(f"The reward rises by {rise:.3g}, but the {name} falls by {fall:.1%}: it is being hacked.")
    for name, less, more in (
        ("edge density", "blur", "grids or grain"),
        ("colour entropy (bits)", "flat colours", "noise"),
    ):
        if abs(change.get(name, 0)) > 0.1:
            fault = more if change[name] > 0 else less
            found.append(f"{name.capitalize()} moved by {change[name]:+.0%}: look for {fault}.")
    if change.get("diversity inside", 0) < -0.2:
        found.append("The candidates of a group grow alike inside the region: little is left to learn from.")
    return found


def difference_table(rows: Sequence[PairedDifference]) -> str:
    """Paired differences with three significant digits, as variances need more decimals than metrics."""
    if not rows:
        return "Nothing to compare."
    head = ["", "n", "from", "to", "difference", "95 % interval", "verdict"]
    lines = [
        [
            row.metric,
            str(row.n),
            *(f"{value:.3g}" for value in (row.before, row.after)),
            f"{row.difference:+.3g}",
            f"[{row.low:+.3g}, {row.high:+.3g}]",
            row.verdict.split()[0] if row.significant and row.metric in NEITHER_IS_BETTER else row.verdict,
        ]
        for row in rows
    ]
    return pad_table([head, *lines], left=(0, len(head) - 1))


def interval(estimate: Any) -> str:
    """`mean [low, high]` with three significant digits."""
    if not estimate.n:
        return "–"
    ends = "" if math.isnan(estimate.low) else f" [{estimate.low:.3g}, {estimate.high:.3g}]"
    return f"{estimate.mean:.3g}{ends}"


def without_nan(value: Any) -> Any:
    """The same with None for NaN and infinities, which JSON does not know."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def mean(values: Sequence[float]) -> float:
    """Of the values that are not NaN; NaN without any."""
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan


# Pictures -------------------------------------------------------------------------------------------------------------

COLOURS = ("#2563eb", "#ea580c", "#f59e0b", "#57606a")


def plot_leakage(path: Path, sigmas: Sequence[float], curves: dict[str, Any], depths: dict[str, Any]) -> None:
    """Variance inside (solid) and outside (dashed) along the ODE, and outside over inside by block."""
    figure, panels = small_multiples(2)
    for colour, (arm, curve) in zip(COLOURS, curves.items(), strict=False):
        panels[0].plot(sigmas, curve.inside, color=colour, label=f"{arm}: inside")
        panels[0].plot(sigmas, curve.outside, color=colour, linestyle="--", label=f"{arm}: outside")
    panels[0].invert_xaxis()
    panels[0].set(title="latent variance in a group", xlabel="σ: from noise to picture")
    panels[0].legend(frameon=False, fontsize=7)
    for colour, (arm, curve) in zip(COLOURS, depths.items(), strict=False):
        panels[1].plot(range(len(curve.inside)), curve.leakage, color=colour, marker=".", label=arm)
    panels[1].set(title="leakage in the model, half-way", xlabel="after block", ylabel="outside / inside")
    for axes in panels:  # what region noise leaks is orders of magnitude below what it explores
        axes.set_yscale("log")
    panels[1].legend(frameon=False, fontsize=7)
    save(figure, path)


def plot_split(path: Path, splits: dict[str, Any]) -> None:
    """Stacked bars of the reward's within-group variance."""
    figure, (axes,) = small_multiples(1)
    names = list(splits)
    bottom = [0.0] * len(names)
    for part, colour in (("edit", COLOURS[0]), ("keep", COLOURS[1]), ("rest", "#c9ced6")):
        heights = [getattr(splits[name], part) for name in names]
        axes.bar(names, heights, 0.6, bottom, color=colour, label={"rest": "neither"}.get(part, part))
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    axes.set(title="reward variance in a group", ylim=(min(0.0, *bottom), None))
    axes.tick_params(axis="x", labelrotation=12)
    axes.legend(frameon=False, fontsize=7)
    save(figure, path)


def small_multiples(number: int) -> tuple[Any, list[Any]]:
    """A figure with panels side by side, without pyplot's global state."""
    require("report", "the figures of a diagnosis")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.8 * number, 3.4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    panels = [figure.add_subplot(1, number, i + 1) for i in range(number)]
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
    return figure, panels


def save(figure: Any, path: Path) -> None:
    """Write a figure as PNG, whole or not at all."""
    with write_atomically(path) as part:
        figure.savefig(part, facecolor="white")


def draw_attention(path: Path, findings: Sequence[Finding]) -> None:
    """Sources with their region, a candidate, and where the instruction's attention fell."""
    shown = [f for f in findings if f.attention_map is not None]
    if not shown:
        return
    sources = [f.edit.source.resize(f.picture.size, Image.Resampling.BICUBIC) for f in shown]
    columns = {
        "source, region": [outline(s, mask_picture(f.edit.mask)) for s, f in zip(sources, shown, strict=True)],
        "candidate": [f.picture for f in shown],
        "attention": [heatmap(f.attention_map.numpy(), s) for s, f in zip(sources, shown, strict=True)],  # type: ignore[union-attr]
    }
    captions = [f"{f.edit.prompt} (density {f.numbers['attention_density']:.2f})" for f in shown]
    contact_sheet(columns, captions, path=path)
