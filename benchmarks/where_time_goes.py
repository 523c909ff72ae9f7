"""Where an update's time goes: `python benchmarks/where_time_goes.py` draws docs/images/where_time_goes.png.

What `rcgrpo plan` says of the recipes, and of Kontext's at other sizes: counted FLOP over an assumed share of the GPU's
peak, not measured seconds.
"""

import json
import sys
from importlib.resources import files
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.plan_headers import planned

from rcgrpo.reporting.curves import BLUE, FAINT, HAIR, INK, ORANGE

PICTURE = Path(__file__).parents[1] / "docs" / "images" / "where_time_goes.png"
COLOURS = {"encode": HAIR, "rollout": BLUE, "decode": FAINT, "update": ORANGE}
PLANS = {
    "klein 4B, 640², 24 GB": "klein-4b-24gb",
    "klein 9B, 640², 80 GB": "klein-9b-80gb",
    "Kontext NF4, 640², 24 GB": "flux-24gb",
    "Kontext, 512², 80 GB": "flux-80gb --resolution 512",
    "Kontext, 640², 80 GB": "flux-80gb",
    "Kontext, 1024², 80 GB": "flux-80gb --resolution 1024",
    "Qwen 2511, 640², 80 GB, guided": "qwen-edit-2511-80gb",
}
"""Recipes, with flags that change them."""


def seconds_of(plan: str) -> dict[str, float]:
    """An update's planned seconds, by phase."""
    recipe, _, flags = plan.partition(" ")
    path = Path(str(files("rcgrpo") / "recipes" / f"{recipe}.yaml"))
    command = f"plan --config {path.name} --gpu {recipe.rpartition('-')[2]} --judge_gb 0 --json true {flags}"
    return {phase["phase"]: phase["seconds"] for phase in json.loads(planned(path, command))["phases"]}


def draw() -> None:
    figure = Figure(figsize=(8, 0.55 * len(PLANS) + 1.1), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for place, plan in enumerate(PLANS.values()):
        seconds, left = seconds_of(plan), 0.0
        total = sum(seconds.values())
        for phase, value in seconds.items():
            axes.barh(place, value / total, left=left, color=COLOURS[phase], height=0.6)
            if value / total > 0.05:
                inside = f"{phase} {value / total:.0%}"
                axes.text(left + value / total / 2, place, inside, ha="center", va="center", color="white", fontsize=9)
            left += value / total
        axes.text(1.01, place, f"{total:.0f} s", va="center", color=INK, fontsize=9)
    axes.set_yticks(range(len(PLANS)), list(PLANS), color=INK, fontsize=9)
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.set_xticks([])
    for side in axes.spines.values():
        side.set_visible(False)
    axes.set_xlabel("planned share of an update's seconds, not measured", color=FAINT, fontsize=9)
    figure.savefig(PICTURE, dpi=150)


if __name__ == "__main__":
    draw()
