"""The picture of one update: four rows that are read from above, without any documentation beside them."""

import math
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from ..groups.diagnostics import spearman
from ..inputs.extras import require
from ..inputs.masks import mask_picture
from ..maths.regions import to_places
from ..reporting.curves import BLUE, FAINT, HAIR, INK, ORANGE
from ..reporting.sheets import heatmap, outline

if TYPE_CHECKING:
    from .one_update import OneUpdate

ALL = "all"
"""The one row of advantages where regions have none of their own."""
COLUMNS, CELL, GAP, MARGIN = 6, 1.75, 0.2, 0.35
"""Pictures in a row, and inches of a picture, between two, and around all."""
HEAD, BARS, LINE = 0.74, 0.62, 0.19
"""Inches of a heading, of the bars below a candidate, of a line of text."""
COLOURS = (BLUE, ORANGE, "#16a34a", "#9333ea", "#57606a")
SHOWN = 12
"""Candidates in the picture at most: the best and the worst."""
DIFFERS, ASKED, MOVED = "where noise differs", "what the loss asks", "what one step moves"
REGION = "the region, in tokens"
BEFORE, AFTER, ATTENTION = "prediction", "after the step", "attention"


def draw_update(update: "OneUpdate") -> Image.Image:
    """Edit and noise, candidates with their advantages, and where the step went, RGB, about 1,300 pixels wide.

    Raises:
        ModuleNotFoundError: the extra `report` is missing.
    """
    require("report", "the picture of an update")
    group, shown, pictures = update.group, _shown(update.best_first), update_pictures(update)
    of_candidates = CELL + BARS + LINE * (len(update.rewards) + len(update.rows) + 2)
    page = _Page(MARGIN + 3 * HEAD + 2 * (CELL + 3 * LINE) + math.ceil(len(shown) / COLUMNS) * of_candidates)
    page.head("1  The edit", f"“{group.edit.prompt}”", width=2)
    page.head("2  The noise", _of_noise(*map(float, update.noise)), 2, 4)
    noise = [name for name in pictures if name.startswith("noise of")][:3]
    below = {REGION: f"{float(update.region.mean()):.0%} of the picture"}
    below[DIFFERS] = f"inside {update.noise.inside:.2f} σ, outside {update.noise.outside:.2f} σ"
    for column, name in enumerate(["source", REGION, *noise, DIFFERS]):
        page.picture(column, pictures[name], name, below.get(name, ""))
    page.down(CELL + 3 * LINE)

    page.head(
        "3  The candidates, best first",
        "Rewards score them. The bar is the advantage: how much better than the group. “step”: whether the update goes "
        "towards (+) or away (-).",
    )
    largest = max(1e-9, float(update.advantages.abs().max()))
    for number, i in enumerate(shown):
        column = number % COLUMNS
        page.picture(column, outline(group.images[i], group.mask), f"#{i}")
        page.bars(column, update.advantages[:, i].tolist(), largest)
        scores = zip(update.rewards, group.rewards[i].tolist(), strict=True)  # type: ignore[index]
        lines = [(f"{name} {_or_none(value, '.3f')}", INK) for name, value in scores]
        for row, name in enumerate(update.rows):
            title = "advantage" if name == ALL else name
            advantage, pull = (float(values[row, i]) for values in (update.advantages, update.pulls))
            lines.append((f"{title} {advantage:+.2f}, step {_or_none(pull, '+.2f')}", COLOURS[row % len(COLOURS)]))
        page.lines(column, lines)
        if column == COLUMNS - 1 or number == len(shown) - 1:
            page.down(of_candidates)

    if not update.advantages.any():
        nothing = "All candidates score alike: there is nothing to learn from them, and training drops such a group."
        page.head("4  The update", nothing)
        return page.image()
    page.head(
        "4  The update",
        "The loss asks the model for another prediction; one step of the optimizer moves it. Bright: much.",
    )
    _, anchor, step = update.where[0]
    below = {
        ASKED: f"{update.inside(update.asked):.0%} of it inside",
        MOVED: f"{update.inside(update.moved):.0%} of it inside",
        BEFORE: f"from #{anchor}, step {step}",
        AFTER: f"change × {update.exaggeration:g}",
        ATTENTION: ""
        if group.attention is None
        else f"{float(group.attention.density.mean()):.1f} × an even share inside",
    }
    for column, name in enumerate(name for name in below if name in pictures):
        page.picture(column, pictures[name], name, below[name])
    page.scatter(COLUMNS - 1, update)
    return page.image()


def update_pictures(update: "OneUpdate") -> dict[str, Image.Image]:
    """Each picture of the page by its name there, at the size of the edit; candidates are "#0", "#1", ..."""
    group, size = update.group, update.group.images[0].size
    rows, columns = (side // 2 for side in update.region.shape)
    region = mask_picture(update.region).resize(size, Image.Resampling.NEAREST)
    pictures = {"source": outline(group.source, group.mask), REGION: region}
    noise = to_places(group.trajectory[0].cpu(), (rows, columns))
    for i in range(len(noise)):
        name, values = ("noise of #0", noise[0]) if not i else (f"noise of #{i} less #0", noise[i] - noise[0])
        colours = (values[:3] / 6 + 0.5).clamp(0, 1).permute(1, 2, 0).numpy()
        squares = Image.fromarray(np.round(255 * colours).astype(np.uint8)).resize(size, Image.Resampling.NEAREST)
        pictures[name] = outline(squares, group.mask)
    pictures |= {f"#{i}": image for i, image in enumerate(group.images)}
    maps = {DIFFERS: update.spread, ASKED: update.asked, MOVED: update.moved}
    if group.attention_maps is not None:
        maps[ATTENTION] = group.attention_maps.mean(0).cpu()
    for name, values in maps.items():
        pictures[name] = outline(heatmap(values.numpy(), group.source), group.mask, "#ffffff")
    pictures[BEFORE] = outline(update.prediction, group.mask)
    pictures[AFTER] = outline(update.exaggerated, group.mask)
    return pictures


def _of_noise(inside: float, outside: float) -> str:
    if math.isnan(outside):
        return "The region is the whole picture: every candidate starts from noise of its own."
    if outside > 0.9 * inside:
        return "Every candidate starts from noise of its own, inside the line and outside."
    nearly = "nearly " if outside > 0 else ""
    return f"Outside the line all candidates start from {nearly}the same noise: grey. Inside, each from its own."


def _or_none(value: float, form: str) -> str:
    return "-" if math.isnan(value) else format(value, form)


def _shown(order: Sequence[int]) -> list[int]:
    """At most `SHOWN` of them, from both ends."""
    if len(order) <= SHOWN:
        return list(order)
    return [*order[: SHOWN // 2], *order[-(SHOWN // 2) :]]


class _Page:
    """A figure that is filled from above, in inches."""

    def __init__(self, height: float) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        self.width, self.height = 2 * MARGIN + COLUMNS * (CELL + GAP) - GAP, height
        self.figure = Figure(figsize=(self.width, height), dpi=110)
        self.canvas = FigureCanvasAgg(self.figure)
        self.top, self.left_to_right = MARGIN / 2, 0.0

    def down(self, inches: float) -> None:
        self.top += inches

    def text(
        self, column: int, below: float, text: str, colour: str, size: float, centre: bool = True, **style: Any
    ) -> None:
        x = MARGIN + column * (CELL + GAP) + (CELL / 2 if centre else 0)
        y = 1 - (self.top + below) / self.height
        place = {"ha": "center" if centre else "left", "va": "top", "color": colour, "fontsize": size}
        self.figure.text(x / self.width, y, text, **place, **style)  # type: ignore[arg-type]

    def head(self, title: str, text: str, column: int = 0, width: int = COLUMNS) -> None:
        """A heading; one that does not begin on the left stands beside the last."""
        if column:
            self.top -= HEAD
        self.text(column, 0, title, INK, 12, centre=False, weight="bold")
        fits = round(width * (CELL + GAP) * 15)  # characters
        self.text(column, 0.24, textwrap.shorten(text, fits, placeholder=" ..."), FAINT, 9, centre=False)
        self.top += HEAD

    def axes(self, column: int, below: float, height: float) -> Any:
        x = MARGIN + column * (CELL + GAP)
        y = self.height - self.top - below - height
        box = (x / self.width, y / self.height, CELL / self.width, height / self.height)
        return self.figure.add_axes(box)

    def picture(self, column: int, picture: Image.Image, title: str, text: str = "") -> None:
        self.text(column, -LINE, title, INK, 9)
        axes = self.axes(column, 0, CELL)
        axes.imshow(
            np.asarray(picture.convert("RGB")), interpolation="nearest" if picture.width < 200 else "antialiased"
        )
        axes.set(xticks=[], yticks=[])
        for spine in axes.spines.values():
            spine.set_color(HAIR)
        if text:
            self.text(column, CELL + 0.04, text, INK, 9)

    def bars(self, column: int, values: Sequence[float], largest: float) -> None:
        axes = self.axes(column, CELL + 0.06, BARS - 0.12)
        axes.barh(range(len(values)), values, 0.7, color=[COLOURS[i % len(COLOURS)] for i in range(len(values))])
        axes.axvline(0, color=INK, linewidth=0.8)
        axes.set(xlim=(-1.05 * largest, 1.05 * largest), ylim=(len(values) - 0.4, -0.6), xticks=[], yticks=[])
        for spine in axes.spines.values():
            spine.set_color(HAIR)

    def scatter(self, column: int, update: "OneUpdate") -> None:
        """Of each candidate, its advantage and how far the step goes its way."""
        self.text(column, -LINE, "step against advantage", INK, 9)
        axes = self.axes(column, 0, CELL)
        axes.axhline(0, color=HAIR, linewidth=0.8)
        axes.axvline(0, color=HAIR, linewidth=0.8)
        said = []
        for row, name in enumerate(update.rows):
            first, second = update.advantages[row], update.pulls[row]
            axes.plot(first, second, ".", color=COLOURS[row % len(COLOURS)])
            said.append(f"{'' if name == ALL else f'{name} '}{_or_none(spearman(first, second), '+.2f')}")
        axes.set(xticks=[], yticks=[])
        axes.margins(0.12)
        for spine in axes.spines.values():
            spine.set_color(HAIR)
        self.text(column, CELL + 0.04, f"ranks: {', '.join(said)}", INK, 9)

    def lines(self, column: int, lines: Sequence[tuple[str, str]]) -> None:
        for number, (text, colour) in enumerate(lines):
            self.text(column, CELL + BARS + number * LINE, text, colour, 8)

    def image(self) -> Image.Image:
        self.figure.set_facecolor("white")
        self.canvas.draw()
        return Image.fromarray(np.asarray(self.canvas.buffer_rgba())[..., :3].copy())
