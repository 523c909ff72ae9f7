"""What a run shows for itself: paired differences with error bars, tables, contact sheets and training curves.

Evaluation, the model card and the command line draw from here. Plain numbers and pictures come in; no model, no metric
and no trainer is known. Every file is written through `write_atomically`, so a reader never meets half of one.

Gotchas:
- The interval of `paired_bootstrap` covers the choice of test samples only, not that of the training seed.
- matplotlib is imported where it is used, and through its object API: no backend or global style of the caller changes.
- Captions use Pillow's built-in font, which knows Latin letters only.
"""

import math
import os
import uuid
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from PIL import Image, ImageChops, ImageColor, ImageDraw, ImageFilter, ImageFont

PathLike = str | os.PathLike[str]

# Statistics -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PairedDifference:
    """The mean of one metric before and after training on the same samples, and an interval of the difference.

    Attributes:
        metric: Its name; a name that contains "psnr" is printed as dB, with two decimals.
        before, after: Means over the `n` pairs.
        difference: `after - before`.
        low, high: Ends of the interval of the difference.
        n: How many pairs took part.
        higher_is_better: False for a metric such as LPIPS.
        confidence: What share of such intervals would hold the true difference, in (0, 1).
    """

    metric: str
    before: float
    after: float
    difference: float
    low: float
    high: float
    n: int
    higher_is_better: bool = True
    confidence: float = 0.95

    @property
    def significant(self) -> bool:
        """Whether the interval excludes zero."""
        return self.low > 0 or self.high < 0

    @property
    def verdict(self) -> str:
        """The direction as an arrow and its worth as a word."""
        if not self.significant:
            return "≈ no clear change"
        word = "better" if (self.difference > 0) == self.higher_is_better else "worse"
        return f"{'↑' if self.difference > 0 else '↓'} {word}"


def paired_bootstrap(
    before: Sequence[float | None],
    after: Sequence[float | None],
    metric: str = "",
    confidence: float = 0.95,
    num_resamples: int = 10_000,
    seed: int = 0,
    higher_is_better: bool = True,
) -> PairedDifference:
    """Percentile bootstrap of the mean paired difference, resampling the samples.

    Args:
        before, after: One value per sample, in the same order. A pair with a `None` or NaN on either side is left out.
        metric: Name for the table and for error messages.
        confidence: In (0, 1).
        num_resamples: How many times the samples are drawn again.
        seed: The same seed and values give the same interval.

    Raises:
        ValueError: Lists of different lengths, or fewer than two complete pairs.
    """
    if len(before) != len(after):
        raise ValueError(
            f"{metric or 'before'}: got {len(before)} values before and {len(after)} after; expected pairs."
        )
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence}; expected a number between 0 and 1, such as 0.95.")
    pairs = np.array([before, after], dtype=np.float64)  # None becomes NaN
    pairs = pairs[:, ~np.isnan(pairs).any(axis=0)]
    differences = pairs[1] - pairs[0]
    n = len(differences)
    if n < 2:
        raise ValueError(
            f"{metric or 'before'}: {n} of {len(before)} pairs are complete; an interval needs at least 2."
        )
    rng = np.random.default_rng(seed)
    chunk = max(1, 2**21 // n)  # 16 MiB of indices at a time
    means = np.concatenate(
        [
            differences[rng.integers(n, size=(min(chunk, num_resamples - start), n))].mean(axis=1)
            for start in range(0, num_resamples, chunk)
        ]
    )
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return PairedDifference(
        metric=metric,
        before=float(pairs[0].mean()),
        after=float(pairs[1].mean()),
        difference=float(differences.mean()),
        low=float(low),
        high=float(high),
        n=n,
        higher_is_better=higher_is_better,
        confidence=confidence,
    )


def compare(
    before: Mapping[str, Sequence[float | None]],
    after: Mapping[str, Sequence[float | None]],
    lower_is_better: Collection[str] = (),
) -> list[PairedDifference]:
    """`paired_bootstrap` of every metric, in the order of `before`.

    Raises:
        ValueError: The two do not hold the same metrics, or what `paired_bootstrap` refuses.
    """
    if before.keys() != after.keys():
        raise ValueError(f"Metrics on one side only: {sorted(before.keys() ^ after.keys())}; measure them on both.")
    return [
        paired_bootstrap(before[metric], after[metric], metric, higher_is_better=metric not in lower_is_better)
        for metric in before
    ]


# Tables ---------------------------------------------------------------------------------------------------------------


def markdown_table(rows: Sequence[PairedDifference]) -> str:
    """A markdown table, padded so that it reads as well in a terminal; no newline at its end.

    Values have three decimals, decibels two, and more where the interval is narrower than that.
    """
    confidence = " / ".join(f"{100 * value:g}" for value in sorted({row.confidence for row in rows}))
    lines = [["metric", "n", "before", "after", "difference", f"{confidence} % interval".strip(), "verdict"]]
    for row in rows:
        places = _decimals(row)
        lines.append(
            [
                row.metric.replace("|", "\\|"),
                str(row.n),
                *(_number(value, places) for value in (row.before, row.after)),
                _number(row.difference, places, "+"),
                f"[{_number(row.low, places, '+')}, {_number(row.high, places, '+')}]",
                row.verdict,
            ]
        )
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    left = {0, len(widths) - 1}  # text to the left, numbers to the right
    rule = ["-" * width if column in left else "-" * (width - 1) + ":" for column, width in enumerate(widths)]
    padded = [
        [
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        for line in lines
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in [padded[0], rule, *padded[1:]])


def _decimals(row: PairedDifference) -> int:
    usual = 2 if "psnr" in row.metric.lower() else 3
    width = row.high - row.low
    return usual if width < 1e-9 else min(6, max(usual, -math.floor(math.log10(width))))


def _number(value: float, places: int, sign: str = "-") -> str:
    return f"{round(value, places) + 0.0:{sign}.{places}f}"  # adding 0.0 turns -0.0 into 0.0


# Pictures -------------------------------------------------------------------------------------------------------------

MARGIN, GAP, BLOCK_GAP = 16, 4, 28
MAX_ROWS_IN_ONE_BLOCK = 8
INK, FAINT, HAIR = "#1f2328", "#57606a", "#c9ced6"


def contact_sheet(
    columns: Mapping[str, Sequence[Image.Image]],
    captions: Sequence[str] | None = None,
    cell: int = 128,
    path: PathLike | None = None,
) -> Image.Image:
    """Pictures in a grid on white: one row per sample with its caption below, one column per entry with a header.

    Args:
        columns: Header to one picture per sample, such as source, before, after. A picture that fits into the cell is
            enlarged by a whole factor without smoothing, a larger one is reduced; both are centred.
        captions: One per sample, such as the instruction; wrapped to the row's width.
        cell: Side of a picture's place in pixels.
        path: Where to save it as well.

    Returns:
        The sheet, RGB. More than eight samples are laid out in two blocks side by side, left block first.

    Raises:
        ValueError: No picture at all, or columns and captions of different lengths.
    """
    lengths = {name: len(pictures) for name, pictures in columns.items()}
    if captions is not None:
        lengths["captions"] = len(captions)
    if not columns or len(set(lengths.values())) != 1 or 0 in lengths.values():
        raise ValueError(f"A contact sheet needs one picture and caption per sample in every column; got {lengths}.")
    num_rows = len(next(iter(columns.values())))
    num_blocks = 2 if num_rows > MAX_ROWS_IN_ONE_BLOCK else 1
    rows_in_block = math.ceil(num_rows / num_blocks)

    head_size, size = max(13, cell // 9), max(12, cell // 10)
    head_font, font = ImageFont.load_default(head_size), ImageFont.load_default(size)
    block_width = len(columns) * (cell + GAP) - GAP
    headers = [_wrap(name, head_font, cell) for name in columns]
    wrapped = [_wrap(caption, font, block_width) for caption in captions or [""] * num_rows]
    head_line, line = round(1.3 * head_size), round(1.3 * size)
    head_height = head_line * max(len(lines) for lines in headers) + GAP
    caption_height = line * max(len(lines) for lines in wrapped) + 3 * GAP if captions is not None else 0
    row_height = cell + GAP + caption_height

    width = 2 * MARGIN + num_blocks * (block_width + BLOCK_GAP) - BLOCK_GAP
    last_gap = GAP if captions is None else 3 * GAP
    sheet = Image.new("RGB", (width, 2 * MARGIN + head_height + rows_in_block * row_height - last_gap), "white")
    draw = ImageDraw.Draw(sheet)
    for block in range(num_blocks):
        for column, lines in enumerate(headers):
            x = MARGIN + block * (block_width + BLOCK_GAP) + column * (cell + GAP) + cell / 2
            for i, text in enumerate(lines):
                draw.text((x, MARGIN + i * head_line), text, INK, head_font, anchor="ma")
    for row in range(num_rows):
        block, place = divmod(row, rows_in_block)
        left, top = MARGIN + block * (block_width + BLOCK_GAP), MARGIN + head_height + place * row_height
        for column, pictures in enumerate(columns.values()):
            picture = _fit(pictures[row], cell)
            corner = left + column * (cell + GAP) + (cell - picture.width) // 2, top + (cell - picture.height) // 2
            sheet.paste(picture, corner)
            draw.rectangle(
                (corner[0] - 1, corner[1] - 1, corner[0] + picture.width, corner[1] + picture.height), None, HAIR
            )
        for i, text in enumerate(wrapped[row]):
            draw.text((left, top + cell + GAP + i * line), text, FAINT, font)
    if path is not None:
        with write_atomically(path) as part:
            sheet.save(part)
    return sheet


def outline(image: Image.Image, mask: Image.Image, color: str = "#ff2d78", width: int | None = None) -> Image.Image:
    """The picture (RGB) with a line drawn just outside the edit region, so that nothing in the region is hidden.

    Args:
        mask: 255 = edit; resized to the picture if need be.
        color: Any colour name or code Pillow knows.
        width: Of the line in the picture's pixels; by default about a hundredth of the side.
    """
    region = mask.convert("L").resize(image.size, Image.Resampling.NEAREST).point(lambda value: 255 * (value > 127))
    width = width or max(1, round(min(image.size) / 100))
    line = ImageChops.subtract(region.filter(ImageFilter.MaxFilter(2 * width + 1)), region)
    drawn = image.convert("RGB")
    drawn.paste(ImageColor.getrgb(color), mask=line)
    return drawn


def heatmap(values: ArrayLike, image: Image.Image, vmax: float | None = None, colormap: str = "inferno") -> Image.Image:
    """A map such as attention, laid in colour over the greyed picture; the higher the value, the more it covers.

    Args:
        values: `height width`, non-negative, on any grid; stretched to the picture.
        image: What lies below.
        vmax: The value of full colour, by default the map's largest. Give before and after the same one.
        colormap: A matplotlib name.

    Raises:
        ValueError: `values` is not two-dimensional.
    """
    from matplotlib import colormaps

    grid = np.asarray(values, dtype=np.float32)
    if grid.ndim != 2:
        raise ValueError(f"heatmap: values have shape {grid.shape}; expected height x width.")
    top = float(grid.max()) if vmax is None else vmax
    level = np.asarray(Image.fromarray(grid).resize(image.size, Image.Resampling.BILINEAR))
    level = np.clip(level / top, 0, 1) if top > 0 else np.zeros_like(level)
    grey = np.asarray(image.convert("L"), dtype=np.float32)[..., None]
    colour = 255 * colormaps[colormap](level)[..., :3]
    cover = 0.15 + 0.7 * level[..., None]
    return Image.fromarray(np.round((1 - cover) * grey + cover * colour).astype(np.uint8))


def _fit(picture: Image.Image, cell: int) -> Image.Image:
    """RGB, within `cell x cell`: enlarged by a whole factor, or reduced keeping its proportions."""
    picture = picture.convert("RGB")
    longest = max(picture.size)
    if longest <= cell:
        factor = cell // longest
        return picture.resize((factor * picture.width, factor * picture.height), Image.Resampling.NEAREST)
    width, height = (max(1, round(side * cell / longest)) for side in picture.size)
    return picture.resize((width, height), Image.Resampling.LANCZOS)


def _wrap(text: str, font: Any, width: float) -> list[str]:
    """Lines no wider than `width` pixels, broken between words, and inside a word only if it fills a line alone."""
    lines = [""]
    for word in text.split():
        if font.getlength(f"{lines[-1]} {word}".strip()) <= width:
            lines[-1] = f"{lines[-1]} {word}".strip()
            continue
        if lines[-1]:
            lines.append("")
        for letter in word:
            if lines[-1] and font.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    return lines


# Curves ---------------------------------------------------------------------------------------------------------------

SINGLE_CURVES = {
    "reward": "reward",
    "reward_std": "reward spread within a group",
    "frac_reward_zero_std": "share of groups without spread",
    "kl": "KL to the reference",
}
MAX_PANELS_IN_ONE_ROW = 3
FEWEST_TO_SMOOTH = 20
BLUE, ORANGE = "#2563eb", "#ea580c"


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


# Files ----------------------------------------------------------------------------------------------------------------


@contextmanager
def write_atomically(path: PathLike) -> Iterator[Path]:
    """Yield a temporary path beside `path`, with its suffix; moved over it on success, removed on failure.

    Folders that are missing are made.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.stem}-{uuid.uuid4().hex[:8]}{path.suffix}")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
