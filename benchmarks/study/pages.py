"""Tables as text and plots: a page for each table, and the documentation's page of all of them.

All numbers come from what `summary.summarise` says; nothing is measured or run here.
"""

import json
import math
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rcgrpo.reporting.files import write_atomically
from rcgrpo.reporting.statistics import pad_table

from .harness import finite
from .tables import BASE, COSTS, RATES, Table

COLOURS = (
    *("#2563eb", "#ea580c", "#059669", "#9333ea", "#57606a", "#f59e0b", "#0891b2", "#be123c"),
    *("#a16207", "#65a30d", "#db2777", "#1e3a8a"),
)
INK, FAINT, HAIR = "#1f2328", "#57606a", "#c9ced6"
LEGEND = (
    "Means ± half of the 95 % interval over seeds (Student's t); one or two have none. Differences are paired, over "
    "the seeds that both rows have and over held-out edits: ± is over seeds, brackets (of one or two) over edits. `*` "
    "marks those whose intervals over seeds and over edits (bootstrap) both exclude zero, without a correction for the "
    "number of comparisons. ↓: lower is better."
)


BRIEF = 8
"""Rows of a table on the study's first page."""


@dataclass(frozen=True)
class Section:
    """A table with what was found.

    Args:
        key: letter of the table.
        table: what was asked.
        summary: from `summarise`.
        command: what ran it.
        notes: sentences on sizes and costs.
    """

    key: str
    table: Table
    summary: Mapping[str, Any]
    command: str
    notes: Sequence[str] = ()

    def brief(self, picture: str | None, conclusions: str = "") -> str:
        """Markdown of the study's first page: the answer, at most eight rows, and where the rest is."""
        table = self.table
        named = {label(row): row for row in self.summary["rows"]}
        rows = [named[name] for name in table.brief or named if name in named and named[name]["variant"] != BASE.name]
        columns = [name for name in table.brief_metrics or table.plotted or table.metrics if name in table.metrics]
        changes = any(row["gains"] for row in rows)
        lines = [
            [
                label(row),
                *(difference(row["gains"].get(m)) if changes else shown(row["means"][m]) for m in columns),
            ]
            for row in rows[:BRIEF]
        ]
        parts = [f"## {self.key}. {table.title}", f"**{table.question}**", conclusions.partition("\n\n")[0]]
        if lines:
            parts.append("Changes from the base:" if changes else "Means:")
            parts.append(pad_table([["", *self.titles(columns)], *lines]))
        if picture:
            parts.append(f"![{table.title}]({picture})")
        parts.append(f"All rows, all columns, and what they say: [{self.key}](study/{self.key}.md).")
        return "\n\n".join(part for part in parts if part) + "\n"

    def titles(self, metrics: Iterable[str]) -> list[str]:
        """Heads of columns; an arrow where lower is better."""
        table = self.table
        return [
            f"{table.metrics[name]} ↓" if name in table.lower_is_better else table.metrics[name] for name in metrics
        ]

    def text(self, picture: str | None, conclusions: str = "") -> str:
        """Markdown of all of it, from the heading to the command."""
        table, rows = self.table, self.summary["rows"]
        lines = [[label(row), str(len(row["seeds"])), *(shown(row["means"][m]) for m in table.metrics)] for row in rows]
        parts = [f"# {self.key}. {table.title}", f"**{table.question}**", conclusions]
        parts.append(pad_table([["", "seeds", *self.titles(table.metrics)], *lines]))
        if picture:
            parts.append(f"![{table.title}]({picture})")
        compared = {name: title for name, title in table.metrics.items() if name not in COSTS}
        gained = {name: title for name, title in compared.items() if name not in RATES}
        gains = [[label(row), *(difference(row["gains"].get(m)) for m in gained)] for row in rows if row["gains"]]
        if gains:
            parts += ["Paired changes from the base:", pad_table([["", *gained.values()], *gains])]
        tested = [
            [label(row), other, *(difference(tests.get(m)) for m in compared)]
            for row in rows
            for other, tests in zip(row["against"], row["tests"], strict=True)
            if tests and row["variant"] != BASE.name
        ]
        if tested:
            parts += ["Paired differences:", pad_table([["", "to", *compared.values()], *tested], left=(0, 1))]
        if fronts := self.summary.get("fronts"):
            parts += [self.fronts_said(), self.fronts_table(fronts)]
        notes = " ".join([f"Seeds: {', '.join(map(str, self.seeds))}.", *self.notes])
        parts += [wrap(notes), f"Reproduce: `{self.command}`"]
        return "\n\n".join(part for part in parts if part) + "\n"

    def fronts_said(self) -> str:
        """What the table of fronts shows, and from which floors on."""
        floors = "; ".join(
            " and ".join(f"{self.table.metrics[name]} {value:+g}" for name, value in pair.items())
            for pair in self.table.floors
        )
        return wrap(
            "Fronts: the area that a method's points and the base dominate, of changes from the base, above a floor "
            f"({floors}). Intervals are paired, over edits, for all comparisons of this table together "
            "(Bonferroni, 95 % in all)."
        )

    def fronts_table(self, fronts: Sequence[Mapping[str, Any]]) -> str:
        """Markdown: the first method's area beside each other one's."""
        lines = [
            [
                " × ".join(self.table.metrics[name] for name in test["metrics"]),
                f"{test['method']}: {test['area']:.3g}",
                f"{test['other']}: {test['other_area']:.3g}",
                f"{test['difference']:+.2g} [{test['low']:+.2g}, {test['high']:+.2g}]",
            ]
            for test in fronts
        ]
        return pad_table([["metrics", "area", "area", "difference"], *lines], left=(0, 1, 2))

    @property
    def seeds(self) -> list[int]:
        return sorted({seed for row in self.summary["rows"] for seed in row["seeds"]})

    def save(self, data: Path, picture: Path) -> bool:
        """Write the numbers as JSON and the plot; whether there is anything to plot."""
        content = finite({**self.summary, "command": self.command, "notes": list(self.notes)})
        with write_atomically(data) as path:
            path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
        return plot(picture, self.table, self.summary)


def write_page(folder: Path, section: Section) -> str:
    """Write `summary.json`, `plot.png` and `page.md`, each whole or not at all; the page's text is returned."""
    plotted = section.save(folder / "summary.json", folder / "plot.png")
    page = f"{section.text('plot.png' if plotted else None)}\n{LEGEND}\n"
    with write_atomically(folder / "page.md") as path:
        path.write_text(page)
    return page


def write_study(
    docs: Path, sections: Sequence[Section], machine: str, conclusions: Mapping[str, str], total: str = ""
) -> Path:
    """Write `study.md` with the answers, and all of each table in `study/KEY.md`, `.json` and `.png`.

    Args:
        docs: the documentation's folder.
        machine: what it ran on, in words.
        conclusions: markdown by the table's letter, the answer in its first paragraph; `summary` stands before all
            tables, `variants` after them.
        total: what all of it took, a sentence.
    """
    texts = []
    for section in sections:
        key, said = section.key, conclusions.get(section.key, "")
        plotted = section.save(docs / "study" / f"{key}.json", docs / "study" / f"{key}.png")
        texts.append(section.brief(f"study/{key}.png" if plotted else None, said))
        with write_atomically(docs / "study" / f"{key}.md") as part:
            part.write_text(f"{section.text(f'{key}.png' if plotted else None, said)}\n{wrap(LEGEND)}\n")
    intro = (
        "What a reviewer of RC-GRPO-Editing would ask, measured with [the study's harness]"
        "(../benchmarks/study/README.md) on Kontext-tiny and CompBench-mini's held-out edits. "
        f"Machine: {machine}. Every trained row spends the same compute; a *unit* is one sample through the "
        "transformer, a backward counts as two. The numbers of every seed are in [`study/`](study), those of single "
        f"edits in `docs/study/record/` of the repository. {total}\n\n"
        "Edit score: the reward `region_edit`, the region against the wanted object and the ground truth; LP-T and "
        "LP-I are its two parts; reward: `compbench_mini`, the root of edit times background ([definitions](data.md)). "
        "PSNR and SSIM as CompBench has them: the region black in both pictures, over the whole frame. Held-out "
        "reward: how near the region is to the ground truth, which no training sees."
    )
    opening = ["## In short", "", conclusions["summary"], ""] if "summary" in conclusions else []
    closing = ["## How to read it", "", *map(wrap, intro.splitlines()), "", wrap(LEGEND)]
    if "variants" in conclusions:
        closing += ["", "## The variants", "", conclusions["variants"]]
    path = docs / "study.md"
    with write_atomically(path) as part:
        part.write_text("\n".join(["# The study", "", *opening, *texts, *closing, ""]))
    return path


def wrap(text: str) -> str:
    return textwrap.fill(text, 128, break_long_words=False, break_on_hyphens=False)


def read_conclusions(path: Path) -> dict[str, str]:
    """What a person wrote below headings such as `## a`, by letter; nothing where there is no file."""
    if not path.exists():
        return {}
    _, *parts = re.split(r"^## +(\w+).*$", path.read_text(), flags=re.MULTILINE)
    return {key: text.strip() for key, text in zip(parts[::2], parts[1::2], strict=True)}


def label(row: Mapping[str, Any]) -> str:
    return ": ".join(part for part in (row["variant"], row["arm"]) if part)


def shown(mean: Mapping[str, Any]) -> str:
    """`mean ± half`, with the decimals that the interval deserves."""
    if not mean["seeds"]:
        return "–"
    if math.isnan(mean["half"]) or mean["half"] < 1e-9:
        return f"{mean['mean']:.4g}" if abs(mean["mean"]) < 1000 else f"{mean['mean']:.0f}"
    places = decimals(mean["half"])
    if places > 5:
        return f"{mean['mean']:.3g} ± {mean['half']:.1g}"
    return f"{mean['mean']:.{places}f} ± {mean['half']:.{places}f}"


def difference(test: Mapping[str, Any] | None) -> str:
    """`difference ± half` over seeds, with a star where it is clear; of one or two the interval over edits."""
    if test is None or math.isnan(test["difference"]):
        return "–"
    half = (test["seeds_high"] - test["seeds_low"]) / 2
    if math.isnan(half):
        ends = "" if math.isnan(test["edits_low"]) else f" [{test['edits_low']:+.2g}, {test['edits_high']:+.2g}]"
        return f"{test['difference']:+.2g}{ends}"
    places = decimals(half)
    star = "*" if test["clear"] else ""
    if places > 5:
        return f"{test['difference']:+.3g} ± {half:.1g}{star}"
    return f"{test['difference']:+.{places}f} ± {half:.{places}f}{star}"


def decimals(half: float) -> int:
    """So many that an interval's half width shows two digits."""
    return 2 if half < 1e-9 else max(0, 1 - math.floor(math.log10(half)))


# Plots ----------------------------------------------------------------------------------------------------------------


def plot(path: Path, table: Table, summary: Mapping[str, Any]) -> bool:
    """Dots with intervals for each plotted metric, or curves for each plotted curve; false where there is nothing."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows, panels = summary["rows"], [*table.curves, *table.plotted]
    if table.plane is not None:
        return draw_plane(path, table, rows)
    if table.baseline is not None:
        rows = [row for row in rows if row["variant"] != table.baseline]
    if not rows or not panels:
        return False
    height = 3.6 if table.curves else 0.26 * len(rows) + 1.1
    figure = Figure(figsize=(3.4 * len(panels) + 1.6, height + 0.3), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    for place, name in enumerate(panels):
        axes = quiet(figure.add_subplot(1, len(panels), place + 1))
        axes.grid(color="#eaeef2", linewidth=0.8, axis="both" if name in table.curves else "x")
        axes.set_axisbelow(True)
        if name in table.curves:
            draw_curves(axes, table, rows, arms, name)
        else:
            draw_dots(axes, table, rows, arms, name)
            axes.set_yticks(range(len(rows)), [paired(row, table) if place == 0 else "" for row in rows])
    if table.curves:
        handles, names = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    elif table.baseline is not None:
        tests = [row["tests"][0].get(name) for row in rows if row["tests"] for name in table.plotted]
        few = any(test is not None and math.isnan(test["seeds_low"]) for test in tests)
        hollow = "; hollow: one or two seeds, interval over edits" if few else ""
        title = f"Paired difference to {table.baseline}{hollow}"
        figure.suptitle(title, x=0.01, ha="left", fontsize=9, color=FAINT)
    with write_atomically(path) as part:
        figure.savefig(part, facecolor="white")
    return True


def paired(row: Mapping[str, Any], table: Table) -> str:
    """A row's label, with what its difference is to where that is not the table's baseline."""
    other = row["against"][0] if row["against"] else table.baseline
    return label(row) if table.baseline is None or other == table.baseline else f"{label(row)}\nto {other}"


def quiet(axes: Any) -> Any:
    """The same axes without a frame, so that only data are dark."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(HAIR)
    axes.tick_params(labelsize=8, colors=FAINT, length=0)
    return axes


def draw_dots(axes: Any, table: Table, rows: Sequence[Mapping[str, Any]], arms: Sequence[str], name: str) -> None:
    """A metric of every row with its interval or, with a baseline, its paired difference to that.

    Means over the same seeds share much of their noise: overlapping intervals of theirs would hide clear differences.
    A dot is hollow of one or two seeds; its interval is then over edits. A difference far beyond the others is a
    number at the edge, as they would shrink to points beside it.
    """
    if table.baseline is not None:
        axes.axvline(0, color=FAINT, linewidth=1, zorder=0)
    far = far_out([row["tests"][0].get(name) if row["tests"] else None for row in rows])
    for i, row in enumerate(rows):
        colour = COLOURS[arms.index(row["arm"]) % len(COLOURS)]
        if table.baseline is None:
            mean = row["means"][name]
            centre, few = mean["mean"], False
            spread = None if math.isnan(mean["half"]) else [[mean["half"]], [mean["half"]]]
        elif not row["tests"] or (test := row["tests"][0].get(name)) is None:
            continue
        else:
            centre, spread, few = test["difference"], reach(test), math.isnan(test["seeds_low"])
            if i in far:
                edge, side, mark = (0, "left", "◂ {}") if centre < 0 else (1, "right", "{} ▸")
                place = {"transform": axes.get_yaxis_transform(), "ha": side, "va": "center", "fontsize": 8}
                axes.text(edge, i, f" {mark.format(format(centre, '+.2g'))} ", color=colour, **place)
                continue
        fill = "white" if few or spread is None else colour
        axes.errorbar(centre, i, xerr=spread, fmt="o", ms=4.5, color=colour, mfc=fill, capsize=2.5, lw=1.4)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.locator_params(axis="x", nbins=5)
    axes.set_title(table.metrics[name], fontsize=9, color=INK, loc="left")


def far_out(tests: Sequence[Mapping[str, Any] | None]) -> set[int]:
    """Which differences, at most half of all, are more than three times as far from zero as other intervals reach."""
    sizes = {i: abs(test["difference"]) for i, test in enumerate(tests) if test is not None}
    ranked, ends = sorted(sizes, key=lambda i: sizes[i]), list[float]()
    for place, i in enumerate(ranked):
        if 2 * place >= len(ranked) > 1 and sizes[i] > 3 * max(ends):
            return set(ranked[place:])
        ends.append(sizes[i] + max(side for (side,) in reach(tests[i]) or [[0.0]]))  # type: ignore[arg-type]
    return set()


def draw_plane(path: Path, table: Table, rows: Sequence[Mapping[str, Any]]) -> bool:
    """Every variant's changes from the base, one metric against the other: the mean large, its seeds small around it.

    An arrow goes from a variant without region noise to its twin with it, both in one colour. Seeds differ in the edits
    they see, hence together: variants are told apart by the paired differences, not here.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    start = next((row for row in rows if row["variant"] == BASE.name), None)
    shown_rows = [row for row in rows if row["gains"]]
    if table.plane is None or start is None or not shown_rows:
        return False

    def changes(row: Mapping[str, Any], metric: str) -> list[float]:
        before = dict(zip(start["seeds"], start["by_seed"][metric], strict=True))
        after = zip(row["seeds"], row["by_seed"][metric], strict=True)
        return [value - before[seed] for seed, value in after if seed in before]

    variants = {variant.name: variant for variant in table.variants}
    everywhere = {name for name, variant in variants.items() if variant.config.get("exploration") == "global"}
    family = {name: variant.twin or variant.front or name for name, variant in variants.items()}
    families = list(dict.fromkeys(family[row["variant"]] for row in shown_rows))
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(families)}
    centres: dict[str, tuple[float, float]] = {}
    figure = Figure(figsize=(9.6, 5.4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = quiet(figure.add_subplot())
    axes.axhline(0, color=HAIR, linewidth=1, zorder=0)
    axes.axvline(0, color=HAIR, linewidth=1, zorder=0)
    for row in shown_rows:
        variant = variants[row["variant"]]
        across, up = (changes(row, metric) for metric in table.plane)
        centre = centres[row["variant"]] = sum(across) / len(across), sum(up) / len(up)
        colour = colours[family[variant.name]]
        fill = "white" if row["variant"] in everywhere else colour
        for point in zip(across, up, strict=True):
            axes.plot(*zip(centre, point, strict=True), color=colour, linewidth=0.5, alpha=0.25, zorder=1)
        axes.plot(across, up, "o", color=colour, markerfacecolor=fill, markersize=2.5, alpha=0.4, zorder=2)
        name, marker = f"{row['variant']} ({len(across)})", "s" if "num_inference_steps" in variant.config else "o"
        axes.plot(*centre, marker, color=colour, markerfacecolor=fill, markersize=9, zorder=4, label=name)
    for name, centre in centres.items():
        if (twin := variants[name].twin) in centres:
            arrow = {"arrowstyle": "-|>", "color": colours[family[name]], "shrinkA": 5, "shrinkB": 6, "lw": 1.6}
            axes.annotate("", centre, centres[twin], arrowprops=arrow, zorder=3)
    for method in dict.fromkeys(variant.front for variant in table.variants if variant.front):
        points = sorted(centre for name, centre in centres.items() if variants[name].front == method)
        if points:
            axes.plot(*zip(*points, strict=True), "--", color=colours[method], linewidth=1, zorder=2)
    titles = [f"{table.metrics[metric]}: change from the base" for metric in table.plane]
    axes.set_xlabel(titles[0], fontsize=9, color=INK)
    axes.set_ylabel(titles[1], fontsize=9, color=INK)
    joined = "dashes: one method's front" if table.floors else "arrow: what region noise does"
    title = f"variant (seeds); hollow: without region noise,\n{joined}; squares: 3 steps"
    figure.legend(loc="outside right upper", frameon=False, fontsize=8, title=title, title_fontsize=8)
    with write_atomically(path) as part:
        figure.savefig(part, facecolor="white")
    return True


def reach(test: Mapping[str, Any]) -> list[list[float]] | None:
    """How far a test's interval goes to both sides of its difference: over seeds, of one or two over edits."""
    parts = ("seeds_low", "seeds_high") if not math.isnan(test["seeds_low"]) else ("edits_low", "edits_high")
    low, high = (test[part] for part in parts)
    centre = test["difference"]
    return None if math.isnan(low) else [[max(0.0, centre - low)], [max(0.0, high - centre)]]


def draw_curves(axes: Any, table: Table, rows: Sequence[Mapping[str, Any]], arms: Sequence[str], name: str) -> None:
    """Each row's mean over seeds with its band, a colour for each variant, a line style for each arm."""
    variants = list(dict.fromkeys(row["variant"] for row in rows))
    for row in rows:
        points = row["curves"].get(name, [])
        colour = COLOURS[variants.index(row["variant"]) % len(COLOURS)]
        means = [point["mean"] for point in points]
        halves = [0.0 if math.isnan(point["half"]) else point["half"] for point in points]
        # What is exactly zero has no place on a logarithmic axis.
        means = [mean if mean > 0 else math.nan for mean in means]
        style = ("-", "--", ":")[arms.index(row["arm"]) % 3]
        axes.plot(means, style, color=colour, label=label(row), linewidth=1.5)
        low = [max(mean - half, mean / 10) for mean, half in zip(means, halves, strict=True)]
        high = [mean + half for mean, half in zip(means, halves, strict=True)]
        axes.fill_between(range(len(means)), low, high, color=colour, alpha=0.15, linewidth=0)
    axes.set_yscale("log")
    axes.set_title(CURVES.get(name, name.replace("_", " ")), fontsize=9, color=INK, loc="left")
    axes.set_xlabel("block (0: embedding)" if "block" in name else "step", fontsize=8, color=FAINT)


CURVES = {
    "inside_by_step": "latent variance inside",
    "outside_by_step": "latent variance outside",
    "leakage_by_step": "outside / inside",
    "leakage_by_block_first": "outside / inside, first step",
    "leakage_by_block_middle": "outside / inside, half-way",
}
