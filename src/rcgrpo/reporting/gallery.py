"""One HTML page of edits side by side, sorted by any metric: opens from disk, asks nothing of the network.

Thumbnails are embedded, the script is a dozen lines of plain JavaScript, and without it the page still shows its cards
in the order given. A card is about 25 KB with five pictures, so callers decide how many to show.
"""

import base64
import html
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from PIL import Image

from ..inputs.pictures import to_rgb
from .files import PathLike, write_atomically

THUMBNAIL = 192
"""Longest side of a thumbnail in pixels; smaller pictures stay exact and are enlarged by the browser."""

TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class Table:
    """A title and rows of cells, the head first; `text_columns` are set left."""

    title: str
    lines: Sequence[Sequence[str]]
    text_columns: tuple[int, ...] = (0,)


@dataclass(frozen=True)
class Card:
    """One edit: pictures by name, from left to right, and contender to metric to value."""

    pictures: Mapping[str, Image.Image]
    caption: str
    group: str
    label: str
    scores: Mapping[str, Mapping[str, float | None]]


class Described(Protocol):
    """What is known of a metric."""

    @property
    def label(self) -> str:
        """Its name in tables."""

    @property
    def higher_is_better(self) -> bool:
        """Which way is better."""


def write_gallery(
    path: PathLike,
    title: str,
    notes: Sequence[str],
    tables: Sequence[Table],
    cards: Iterable[Card],
    names: Sequence[str],
    metrics: Mapping[str, Described],
    first: str,
) -> None:
    """Write the page, whole or not at all; cards are taken one at a time and never all in memory.

    Args:
        cards: in the order to show, which should be worst first by `first` of the last contender.
        names: the contenders; those after the first can also be sorted by their difference to it.
        metrics: by which cards can be sorted.
        first: the metric that the cards are sorted by already.
    """
    keys = [(name, metric, False) for name in names for metric in metrics]
    keys += [(name, metric, True) for name in names[1:] for metric in metrics]
    options = []
    for index, (name, metric, difference) in enumerate(keys):
        text = f"{name} − {names[0]}: {metrics[metric].label}" if difference else f"{name}: {metrics[metric].label}"
        chosen = " selected" if (name, metric, difference) == (names[-1], first, False) else ""
        sign = 1 if metrics[metric].higher_is_better else -1
        options.append(f'<option value="{index}" data-sign="{sign}"{chosen}>{html.escape(text)}</option>')
    style, script = ((TEMPLATES / name).read_text(encoding="utf-8") for name in ("gallery.css", "gallery.js"))
    groups: dict[str, None] = {}
    with write_atomically(path) as part, part.open("w", encoding="utf-8") as page:
        page.write(
            f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n<title>{html.escape(title)}</title>\n'
            f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<style>\n{style}</style>\n'
            f"<h1>{html.escape(title)}</h1>\n"
        )
        page.writelines(f"<p>{html.escape(note)}</p>\n" for note in notes)
        page.write('<p><a href="#edits">To the edits</a></p>\n')
        page.writelines(map(_table, tables))
        page.write(
            f'<form id="edits">Sort by <select id="key">{"".join(options)}</select> '
            '<select id="order"><option value="1">worst first</option><option value="-1">best first</option></select> '
            'show <select id="group"><option value="">all</option></select></form>\n<main>\n'
        )
        for card in cards:
            groups[card.group] = None
            page.write(_card(card, names, metrics, keys))
        listed = json.dumps(list(groups)).replace("<", r"\u003c")  # or a name could end the script
        page.write(f"</main>\n<script>\nconst groups = {listed};\n{script}</script>\n</html>\n")


def _table(table: Table) -> str:
    def row(cells: Sequence[str], tag: str) -> str:
        return (
            "<tr>"
            + "".join(
                f"<{tag}{' class=text' if i in table.text_columns else ''}>{html.escape(cell)}</{tag}>"
                for i, cell in enumerate(cells)
            )
            + "</tr>\n"
        )

    head, *body = table.lines
    return (
        f"<h2>{html.escape(table.title)}</h2>\n<div class=wide><table>\n<thead>{row(head, 'th')}</thead>\n<tbody>"
        f"{''.join(row(cells, 'td') for cells in body)}</tbody>\n</table></div>\n"
    )


def _card(
    card: Card, names: Sequence[str], metrics: Mapping[str, Described], keys: Sequence[tuple[str, str, bool]]
) -> str:
    values = [_value(card, *key, base=names[0]) for key in keys]
    figures = "".join(
        f'<figure><img src="{_data_uri(picture)}" alt="{html.escape(name)}" width="{picture.width}" '
        f'height="{picture.height}" decoding="async"><figcaption>{html.escape(name)}</figcaption></figure>'
        for name, picture in card.pictures.items()
    )
    head = ["", *(metrics[metric].label for metric in metrics)]
    lines = [[name, *(_shown(card.scores[name].get(metric)) for metric in metrics)] for name in names]
    return (
        f'<article data-group="{html.escape(card.group)}" data-values="{html.escape(json.dumps(values))}">\n'
        f"<h3>{html.escape(card.caption)} <small>{html.escape(f'{card.group} · {card.label}')}</small></h3>\n"
        f"<div class=pictures>{figures}</div>\n{_table(Table('', [head, *lines])).split(chr(10), 1)[1]}</article>\n"
    )


def _value(card: Card, name: str, metric: str, difference: bool, base: str) -> float | None:
    value = card.scores[name].get(metric)
    if not difference or value is None:
        return value
    other = card.scores[base].get(metric)
    return None if other is None else value - other


def _shown(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _data_uri(picture: Image.Image) -> str:
    picture = to_rgb(picture).copy()
    exact = max(picture.size) <= THUMBNAIL
    if not exact:
        picture.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG" if exact else "JPEG", **({} if exact else {"quality": 88}))
    kind = "png" if exact else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
