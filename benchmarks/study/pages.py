"""A table's `summary.json`, its page fragment `page.md` and its plot, from what `summary.summarise` says."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rcgrpo.report import pad_table, write_atomically

from .harness import finite
from .tables import Table

COLOURS = ("#2563eb", "#ea580c", "#059669", "#9333ea", "#57606a", "#f59e0b", "#0891b2", "#be123c")
LEGEND = (
    "Means ± half of the 95 % interval over seeds (Student's t). Differences are paired by seed; `*` marks those whose "
    "intervals over seeds and over held-out edits (paired bootstrap) both exclude zero."
)


def write_page(folder: Path, table: Table, summary: Mapping[str, Any], command: str, notes: Sequence[str] = ()) -> str:
    """Write `summary.json`, `plot.png` and `page.md`, each whole or not at all; the page's text is returned."""
    with write_atomically(folder / "summary.json") as path:
        path.write_text(json.dumps(finite({**summary, "command": command, "notes": list(notes)}), indent=1))
    plotted = plot(folder / "plot.png", table, summary)
    rows = summary["rows"]
    seeds = sorted({seed for row in rows for seed in row["seeds"]})
    text = [f"## {table.title}", f"{table.question} Seeds: {', '.join(map(str, seeds))}. {LEGEND}"]
    titles = [f"{title} ↓" if name in table.lower_is_better else title for name, title in table.metrics.items()]
    head = ["", "seeds", *titles]
    lines = [[label(row), str(len(row["seeds"])), *(shown(row["means"][m]) for m in table.metrics)] for row in rows]
    text.append(pad_table([head, *lines]))
    tested = [row for row in rows if row["tests"]]
    if tested:
        differences = [
            [label(row), row["against"], *(difference(row["tests"].get(m)) for m in table.metrics)] for row in tested
        ]
        text.append("Differences:")
        text.append(pad_table([["", "to", *table.metrics.values()], *differences], left=(0, 1)))
    if plotted:
        text.append(f"![{table.title}](plot.png)")
    text += list(notes)
    text.append(f"Reproduce: `{command}`")
    page = "\n\n".join(text) + "\n"
    with write_atomically(folder / "page.md") as path:
        path.write_text(page)
    return page


def label(row: Mapping[str, Any]) -> str:
    return ": ".join(part for part in (row["variant"], row["arm"]) if part)


def shown(mean: Mapping[str, Any]) -> str:
    """`mean ± half`, with the decimals that the interval deserves."""
    if not mean["seeds"]:
        return "–"
    if math.isnan(mean["half"]):
        return f"{mean['mean']:.4g}"
    places = decimals(mean["half"])
    if places > 5:
        return f"{mean['mean']:.3g} ± {mean['half']:.1g}"
    return f"{mean['mean']:.{places}f} ± {mean['half']:.{places}f}"


def difference(test: Mapping[str, Any] | None) -> str:
    if test is None or math.isnan(test["difference"]):
        return "–"
    half = (test["seeds_high"] - test["seeds_low"]) / 2
    if math.isnan(half):
        return f"{test['difference']:+.3g}"
    places = decimals(half)
    star = "*" if test["clear"] else ""
    if places > 5:
        return f"{test['difference']:+.3g} ± {half:.1g}{star}"
    return f"{test['difference']:+.{places}f} ± {half:.{places}f}{star}"


def decimals(half: float) -> int:
    """So many that an interval's half width shows two digits."""
    return 2 if half < 1e-9 else max(0, 1 - math.floor(math.log10(half)))


def plot(path: Path, table: Table, summary: Mapping[str, Any]) -> bool:
    """Dots with intervals for each plotted metric, or curves for each plotted curve; false where there is nothing."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = summary["rows"]
    panels = [*table.curves, *table.plotted]
    if not rows or not panels:
        return False
    height = max(3.2, 0.26 * len(rows) + 1.2)
    figure = Figure(figsize=(4.6 * len(panels) + 1, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    for place, name in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), place + 1)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
        if name in table.curves:
            for i, row in enumerate(rows):
                draw_curve(axes, row, name, COLOURS[i // 2 % len(COLOURS)], "-" if i % 2 == 0 else "--")
            axes.set_title(name.replace("_", " "), fontsize=10)
            axes.set_yscale("log")
            if place == 0:
                axes.legend(frameon=False, fontsize=7)
            continue
        for i, row in enumerate(rows):
            mean = row["means"][name]
            half = 0.0 if math.isnan(mean["half"]) else mean["half"]
            axes.errorbar(mean["mean"], i, xerr=half, fmt="o", markersize=4, color=COLOURS[0], capsize=2)
        base = next((row for row in rows if row["variant"] == table.baseline), None)
        if base is not None:
            axes.axvline(base["means"][name]["mean"], color="#c9ced6", linewidth=1, zorder=0)
        axes.set_yticks(range(len(rows)), [label(row) for row in rows] if place == 0 else [""] * len(rows))
        axes.invert_yaxis()
        axes.set_title(table.metrics.get(name, name), fontsize=10)
    with write_atomically(path) as part:
        figure.savefig(part, facecolor="white")
    return True


def draw_curve(axes: Any, row: Mapping[str, Any], name: str, colour: str, style: str) -> None:
    """A mean over seeds with its band, against steps or blocks counted from 0."""
    points = row["curves"].get(name, [])
    if not points:
        return
    means, halves = ([point[key] for point in points] for key in ("mean", "half"))
    halves = [0.0 if math.isnan(half) else half for half in halves]
    places = range(len(points))
    axes.plot(places, means, style, color=colour, label=label(row), linewidth=1.4)
    axes.fill_between(
        places,
        [mean - half for mean, half in zip(means, halves, strict=True)],
        [mean + half for mean, half in zip(means, halves, strict=True)],
        color=colour,
        alpha=0.15,
    )
    axes.set_xlabel("block (0: embedding)" if "block" in name else "step")
