"""Where an update's time goes by the recipes' headers: `python benchmarks/where_time_goes.py` draws docs/images.

Each recipe's header holds the table of `rcgrpo plan` (`plan_headers.py` writes it): counted FLOP over an assumed share
of the GPU's peak, not measured seconds.
"""

import re
from importlib.resources import files
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from rcgrpo.reporting.curves import BLUE, FAINT, HAIR, INK, ORANGE

PICTURE = Path(__file__).parents[1] / "docs" / "images" / "where_time_goes.png"
ROW = re.compile(r"^#     (encode|rollout|decode|update) +[\d.]+ +\d+ +([\d.]+)$", re.MULTILINE)
COLOURS = {"encode": HAIR, "rollout": BLUE, "decode": FAINT, "update": ORANGE}
RECIPES = {
    "klein-4b-24gb": "klein 4B, 640², 24 GB",
    "klein-9b-80gb": "klein 9B, 640², 80 GB",
    "flux-24gb": "Kontext NF4, 640², 24 GB",
    "flux-80gb": "Kontext, 640², 80 GB",
    "flux-8x80gb": "Kontext, 640², one of 8 × 80 GB, half the images",
    "qwen-edit-2511-80gb": "Qwen 2511, 640², 80 GB, guided",
}


def seconds_of(recipe: str) -> dict[str, float]:
    """An update's planned seconds, by phase."""
    text = (files("rcgrpo") / "recipes" / f"{recipe}.yaml").read_text()
    return {phase: float(seconds) for phase, seconds in ROW.findall(text)}


def draw() -> None:
    figure = Figure(figsize=(8, 0.55 * len(RECIPES) + 1.1), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for place, recipe in enumerate(RECIPES):
        seconds, left = seconds_of(recipe), 0.0
        total = sum(seconds.values())
        for phase, value in seconds.items():
            axes.barh(place, value / total, left=left, color=COLOURS[phase], height=0.6)
            if value / total > 0.05:
                inside = f"{phase} {value / total:.0%}"
                axes.text(left + value / total / 2, place, inside, ha="center", va="center", color="white", fontsize=9)
            left += value / total
        axes.text(1.01, place, f"{total:.0f} s", va="center", color=INK, fontsize=9)
    axes.set_yticks(range(len(RECIPES)), list(RECIPES.values()), color=INK, fontsize=9)
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.set_xticks([])
    for side in axes.spines.values():
        side.set_visible(False)
    axes.set_xlabel("planned share of an update's seconds, not measured", color=FAINT, fontsize=9)
    figure.savefig(PICTURE, dpi=150)


if __name__ == "__main__":
    draw()
