"""Training curves as small multiples, and the colours that every picture shares.

matplotlib is imported where it is used, and through its object API: no backend or global style of the caller changes.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..inputs.extras import require
from .files import PathLike, write_atomically

SINGLE_CURVES = {
    "reward": "reward",
    "reward_std": "reward spread within a group",
    "frac_reward_zero_std": "share of groups without spread",
    "kl": "KL to the reference",
}
MAX_PANELS_IN_ONE_ROW = 3
FEWEST_TO_SMOOTH = 20
BLUE, ORANGE = "#2563eb", "#ea580c"
INK, FAINT, HAIR = "#1f2328", "#57606a", "#c9ced6"


def plot_curves(log_history: Sequence[Mapping[str, Any]], path: PathLike) -> None:
    """Draw a run's logs as small multiples: what was logged, its moving mean if long, and the evaluations as points.

    There is a panel for the reward, for each reward function, for each `background/…` and `attention/…` value, for the
    spread of rewards and for the KL; a panel without values is left out.

    Args:
        log_history: `trainer.state.log_history`: rows that hold "step" and some of TRL's names (`reward`, `reward_std`,
            `rewards/NAME/mean`, `eval_reward`, …). `None` and NaN are skipped.
        path: Of the picture; the suffix decides the format (PNG at 150 dots an inch).

    Raises:
        ValueError: No row holds anything that can be drawn.
    """
    require("report", "curves")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = _panels(log_history)
    if not panels:
        raise ValueError(f"plot_curves: none of {len(log_history)} rows holds a `step` and a reward or another curve.")
    num_columns = min(MAX_PANELS_IN_ONE_ROW, len(panels))
    num_rows = math.ceil(len(panels) / num_columns)
    figure = Figure(figsize=(4.2 * max(num_columns, 1.4), 2.7 * num_rows + 0.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)  # type: ignore[union-attr,call-arg]
    last_step = max([1, *(row["step"] for row in log_history if "step" in row)])
    handles: dict[str, Any] = {}
    for index, (key, title) in enumerate(panels.items()):
        axes = figure.add_subplot(num_rows, num_columns, index + 1)
        steps, values = _curve(log_history, key)
        if len(steps):
            noisy = len(steps) >= FEWEST_TO_SMOOTH
            raw = axes.plot(
                steps, values, color=BLUE, alpha=0.3 if noisy else 1, linewidth=1, marker="" if noisy else "."
            )
            handles.setdefault("as logged", raw[0])
            if noisy:
                mean = axes.plot(steps, _moving_mean(values), color=BLUE, linewidth=1.8)
                handles.setdefault("moving mean", mean[0])
        steps, values = _curve(log_history, f"eval_{key}")
        if len(steps):
            points = axes.plot(steps, values, "o", color=ORANGE, markersize=5, markeredgecolor="white", clip_on=False)
            handles.setdefault("evaluation", points[0])
        axes.set_title(title, loc="left", fontsize=10, color=INK)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(HAIR)
        axes.tick_params(colors=FAINT, labelsize=8, length=0)
        axes.grid(color="#eaeef2", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.locator_params(axis="y", nbins=5)
        axes.locator_params(axis="x", nbins=6, integer=True)
        axes.set_xlim(0, 1.02 * last_step)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.4g}")
        if index + num_columns >= len(panels):
            axes.set_xlabel("step", fontsize=9, color=FAINT)
    figure.legend(handles.values(), handles.keys(), loc="outside upper right", ncols=3, frameon=False, fontsize=9)
    with write_atomically(path) as part:
        figure.savefig(part, facecolor="white")


def _panels(log_history: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Key to title of every curve that has a value, the reward first."""
    keys = dict.fromkeys(key.removeprefix("eval_") for row in log_history for key in row)
    titles = {"reward": SINGLE_CURVES["reward"]}
    for key in sorted(keys):
        if key.startswith("rewards/") and key.endswith("/mean"):
            titles[key] = f"reward: {key.removeprefix('rewards/').removesuffix('/mean')}"
    for prefix in ("background/", "attention/"):
        for key in sorted(keys):
            if key.startswith(prefix):
                title = key.replace("/", " ").replace("_", " ")
                titles[key] = title.replace("psnr", "PSNR (dB)").replace("ssim", "SSIM")
    titles |= SINGLE_CURVES
    return {k: v for k, v in titles.items() if any(len(_curve(log_history, name)[0]) for name in (k, f"eval_{k}"))}


def _curve(log_history: Sequence[Mapping[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    points = [(row["step"], row[key]) for row in log_history if "step" in row and row.get(key) is not None]
    steps, values = np.array(points, dtype=np.float64).reshape(-1, 2).T
    finite = np.isfinite(values)
    return steps[finite], values[finite]


def _moving_mean(values: np.ndarray) -> np.ndarray:
    """Centred mean over about a tenth of the curve; at the ends over what there is."""
    window = np.ones(2 * (len(values) // 20) + 1)
    return np.convolve(values, window, "same") / np.convolve(np.ones_like(values), window, "same")
