"""`rcgrpo diagnose`: where a model's candidates differ, where their rewards come from, and whether a LoRA cheats."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__
from .parsing import MINI, TINY, UsageError, free_folder, parse, use_embedded_model

if TYPE_CHECKING:
    from ..diagnostics import Finding, Match
    from ..report import PairedDifference


@dataclass
class DiagnoseArguments:
    """What to diagnose on what, for `rcgrpo diagnose`."""

    model: str = field(default=TINY, metadata={"help": f"{TINY} (embedded), or a Hub id or folder of a Kontext model."})
    lora: str | None = field(
        default=None, metadata={"help": "A LoRA to diagnose and to compare with the model: folder, file or Hub id."}
    )
    dataset: str = field(default=MINI, metadata={"help": f"{MINI} (embedded), or what `load_edit_dataset` opens."})
    split: str = field(default="test", metadata={"help": "Split to take edits from."})
    num_edits: int = field(default=24, metadata={"help": "Edits, evenly spaced over the split."})
    num_generations: int = field(default=8, metadata={"help": "Candidates of each edit, at least 2."})
    edit_strength: float = field(default=0.5, metadata={"help": "Perturbation inside the region, in [0, 1]."})
    keep_strength: float = field(default=0.0, metadata={"help": "Perturbation outside the region, in [0, 1]."})
    antithetic: bool = field(default=False, metadata={"help": "Mirror the second half of a group's noise."})
    mask_growth: float | None = field(
        default=None,
        metadata={"help": f"Grow the region by this share of the short side; 0.02 by default, 0 for {TINY}."},
    )
    solver: str | None = field(default=None, metadata={"help": "euler, heun, dpmpp_2m or unipc; the model's own."})
    match_tolerance: float = field(
        default=0.02, metadata={"help": "How nearly the global noise must match the diversity inside, as a share."}
    )
    reward: str | None = field(
        default=None, metadata={"help": f"The reward to split, a name or dotted path; compbench_mini on {MINI}."}
    )
    edit_reward: str | None = field(
        default=None, metadata={"help": f"A reward that sees the edit alone; region_edit on {MINI}."}
    )
    keep_reward: str = field(default="background_keep", metadata={"help": "A reward that sees the background alone."})
    held_out_reward: str = field(
        default="rcgrpo.diagnostics.target_closeness",
        metadata={"help": "A reward that nothing was trained on; by default closeness to `edited_image`."},
    )
    resolution: int | None = field(
        default=None, metadata={"help": f"Edit at resolution² pixels; 1024 by default, 64 for {TINY}."}
    )
    num_inference_steps: int = field(default=8, metadata={"help": "Steps of the ODE."})
    guidance_scale: float = field(default=3.5, metadata={"help": "Distilled guidance."})
    max_sequence_length: int | None = field(
        default=None, metadata={"help": f"T5 tokens of an instruction; 512 by default, the embedded one's for {TINY}."}
    )
    batch_size: int | None = field(default=None, metadata={"help": "Candidates at a time; all of four edits."})
    num_maps: int = field(default=8, metadata={"help": "Edits shown with their attention; each map costs memory."})
    seed: int = field(default=0, metadata={"help": "Seed of the noise."})
    output: str | None = field(default=None, metadata={"help": "Where results go; a new folder rcgrpo-diagnosis."})


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


def run(arguments: Sequence[str]) -> None:
    """`rcgrpo diagnose`: region-decoupled noise beside global noise, at the same strength and at equal diversity."""
    (args,) = parse((DiagnoseArguments,), arguments, None, "rcgrpo diagnose")
    fill_in(args)
    if args.model == TINY and args.dataset == MINI:
        use_embedded_model()
    import torch
    from diffusers import FluxKontextPipeline

    from ..benchmark import contenders, load_loras, switch_to
    from ..data.edits import EditRows
    from ..diagnostics import JUDGES, match_strength, survey
    from ..editors import FluxKontextEditor
    from ..rewards import resolve_rewards
    from ..rollout import Exploration
    from ..tiny import WEIGHTS

    folder = Path(args.output)
    names = (args.reward, args.edit_reward, args.keep_reward, args.held_out_reward)
    judges = {judge: resolve_rewards(name)[0] for judge, name in zip(JUDGES, names, strict=True)}
    entrants = contenders([] if args.lora is None else [args.lora])
    required = sorted({column for reward in judges.values() for column in reward.columns})
    rows = EditRows(load_rows(args), "diagnosis", required_columns=required)
    count = min(args.num_edits, len(rows))
    edits = [rows.edit(i * len(rows) // count) for i in range(count)]
    dtype = torch.bfloat16 if torch.cuda.is_available() and args.model != TINY else torch.float32
    pipeline = FluxKontextPipeline.from_pretrained(
        str(WEIGHTS) if args.model == TINY else args.model, torch_dtype=dtype
    )
    if torch.cuda.is_available():
        pipeline.to("cuda")
    pipeline.set_progress_bar_config(disable=True)
    load_loras(pipeline, entrants)
    editor = FluxKontextEditor(
        pipeline, args.resolution, args.num_inference_steps, args.guidance_scale, args.max_sequence_length, args.solver
    )

    def explore(kind: Any, strength: float, **options: Any) -> list["Finding"]:
        exploration = Exploration(strength, args.keep_strength, args.antithetic, args.mask_growth, kind)
        return survey(
            editor,
            pipeline.transformer,
            edits,
            args.num_generations,
            exploration,
            ("diagnose", args.seed),
            options.get("judges", judges),
            options.get("depth_step"),
            options.get("num_maps", 0),
            batch_size=args.batch_size,
        )

    def diversity(strength: float) -> float:
        """Mean latent variance inside that global noise of this strength ends with."""
        found = mean([f.numbers["latent_var_inside"] for f in explore("global", strength, judges={})])
        print(f"  global noise of strength {strength:.3f}: latent variance inside {found:.5f}")
        return found

    print(f"rcgrpo {__version__}: {args.lora or args.model} on {count} edits of {args.dataset}")
    switch_to(pipeline, entrants[-1])
    full = {"depth_step": args.num_inference_steps // 2}
    arms = {REGION: explore("region", args.edit_strength, num_maps=args.num_maps, **full)}
    arms[GLOBAL] = explore("global", args.edit_strength, **full)
    target = mean([f.numbers["latent_var_inside"] for f in arms[REGION]])
    print(f"Matching the region's latent variance inside, {target:.5f}:")
    match = match_strength(diversity, target, args.match_tolerance)
    arms[MATCHED] = explore("global", match.strength, **full)
    if args.lora is not None:
        switch_to(pipeline, entrants[0])
        arms[BASE] = explore("region", args.edit_strength)
    text = write_diagnosis(folder, args, arms, match, target)
    print(f"\n{text}\nWritten to {folder}: diagnostics.json, diagnostics.md and their pictures")


def fill_in(args: DiagnoseArguments) -> None:
    """The defaults that depend on model and data; refuses what cannot work.

    Raises:
        UsageError: naming the flag.
    """
    from ..tiny import CALL, RESOLUTION

    tiny, mini = args.model == TINY, args.dataset == MINI
    if args.reward is None or args.edit_reward is None:
        if not mini:
            missing = "reward" if args.reward is None else "edit_reward"
            raise UsageError(
                f"--{missing}: got none, expected one for {args.dataset}; see `rcgrpo rewards`, or name a callable"
            )
        args.reward = args.reward or "compbench_mini"
        args.edit_reward = args.edit_reward or "region_edit"
    for name, least in (("num_generations", 2), ("num_edits", 2), ("num_inference_steps", 1), ("num_maps", 0)):
        if getattr(args, name) < least:
            raise UsageError(f"--{name}: got {getattr(args, name)}, expected at least {least}")
    for name in ("edit_strength", "keep_strength"):
        if not 0 <= getattr(args, name) <= 1:
            raise UsageError(f"--{name}: got {getattr(args, name)}, expected a number in [0, 1]")
    if args.antithetic and args.num_generations % 2:
        raise UsageError(f"--num_generations: got {args.num_generations}, expected an even number with --antithetic")
    args.resolution = args.resolution or (RESOLUTION if tiny else 1024)
    args.max_sequence_length = args.max_sequence_length or (CALL["max_sequence_length"] if tiny else 512)
    args.mask_growth = args.mask_growth if args.mask_growth is not None else (0.0 if tiny else 0.02)
    args.output = args.output or free_folder("rcgrpo-diagnosis")


def load_rows(args: DiagnoseArguments) -> Any:
    """Rows of the split."""
    if args.dataset == MINI:
        from ..data import compbench_mini

        return compbench_mini(args.split, args.num_edits)
    from ..data.loading import load_edit_dataset

    return load_edit_dataset(args.dataset, split=args.split)


def mean(values: Sequence[float]) -> float:
    """Of the values that are not NaN; NaN without any."""
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan


# What is written ------------------------------------------------------------------------------------------------------


def write_diagnosis(
    folder: Path, args: DiagnoseArguments, arms: dict[str, list["Finding"]], match: "Match", target: float
) -> str:
    """Write `diagnostics.json`, `diagnostics.md` and the pictures; the text of the second is returned."""
    import torch

    from ..diagnostics import mean_curve, variance_split
    from ..report import macro_bootstrap, pad_table, write_atomically

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
    reached = abs(match.reached - target) <= args.match_tolerance * target
    content = {
        "settings": {"rcgrpo": __version__, **asdict(args)},
        "match": {**match._asdict(), "target": target, "within_tolerance": reached, "method": "bisection"},
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
    close = "" if reached else f" (not within {args.match_tolerance:.0%}: strength 1 falls short, or the search ended)"
    blocks = [
        f"# Diagnosis of {args.lora or args.model} on {len(arms[REGION])} edits of {args.dataset}",
        f"Groups of {args.num_generations}, {args.num_inference_steps} steps, edit strength {args.edit_strength:g}, "
        f"keep strength {args.keep_strength:g}. *{MATCHED}*: the strength of the global noise was found by bisection, "
        "so that the latent variance inside the region is the same at the end of the ODE: strength "
        f"{match.strength:.3f} gives {match.reached:.5f} for {target:.5f}{close}. Means with 95 % bootstrap intervals "
        "over edits.",
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


def paired(before: Sequence["Finding"], after: Sequence["Finding"], names: Sequence[str]) -> list["PairedDifference"]:
    """Paired differences of the numbers that at least two edits have on both sides."""
    from ..report import paired_bootstrap

    lower = {"reward_var", "edit_reward_var", "keep_reward_var", "leakage"}
    rows = []
    for name in names:
        old, new = ([f.numbers.get(name, math.nan) for f in findings] for findings in (before, after))
        if sum(a == a and b == b for a, b in zip(old, new, strict=True)) > 1:
            title = TABLE.get(name, f"{name} reward")
            rows.append(paired_bootstrap(old, new, metric=title, higher_is_better=name not in lower))
    return rows


def alarms(changes: Sequence["PairedDifference"]) -> list[str]:
    """What in a LoRA's differences to its base looks like reward hacking; only clear differences count."""
    clear = {row.metric: row for row in changes if row.significant}
    reward = clear.get("reward")
    found = []
    if reward is not None and reward.difference > 0:
        for name in ("held-out reward", "keep reward"):
            if name in clear and clear[name].difference < 0:
                found.append(f"The reward rises by {reward.difference:.3g} while the {name} falls: it is being hacked.")
    change = {name: row.difference / row.before for name, row in clear.items() if row.before}
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


def difference_table(rows: Sequence["PairedDifference"]) -> str:
    """Paired differences with three significant digits, as variances need more decimals than metrics."""
    from ..report import pad_table

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
            row.verdict,
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
    from ..report import write_atomically

    with write_atomically(path) as part:
        figure.savefig(part, facecolor="white")


def draw_attention(path: Path, findings: Sequence["Finding"]) -> None:
    """Sources with their region, a candidate, and where the instruction's attention fell."""
    from PIL import Image

    from ..evaluation import mask_picture
    from ..sheets import contact_sheet, heatmap, outline

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
