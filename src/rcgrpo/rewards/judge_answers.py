"""From what a judge answered to numbers.

Where it fits: below the judges' rewards; knows neither judges nor rewards.

Gotchas: nothing is made up. An answer without a usable number gives `None`.
"""

import json
import math
import re
from collections.abc import Sequence
from typing import Any

SCALE = 25
"""Of the scores that EditScore's kind of judge gives, from 0."""
BOX_SCALE = 1000
"""Of Qwen3-VL's coordinates: 0 is left or top, this right or bottom."""

Box = tuple[float, float, float, float]
"""Left, top, right and bottom, as shares of the picture, 0..1."""


def parse_scores(text: str, count: int = 2, maximum: float = SCALE) -> list[float] | None:
    """The scores in a judge's answer, in any of the forms that EditScore's own parser takes.

    The last JSON object with a `score` counts, so that reasoning or a code fence around it does no harm. Where none can
    be read, because of quotes within the reasoning perhaps, what follows the last `score:` outside of other objects
    counts. An answer without any object may be a bare list, whatever stands around it, or one bare number. A number may
    be text, and one score may stand for all. Nothing is made up: EditScore fills a missing score with 0 or a guess.

    Returns:
        `None` unless there are 1 to `count` finite numbers from 0 to `maximum`.
    """
    text = text.translate(PLAIN_QUOTES)
    decoder = json.JSONDecoder(strict=False)  # judges put line breaks into strings
    found, rest, start, end = None, "", text.find("{"), 0
    while start >= 0:
        rest += text[end:start]
        try:
            decoded, end = decoder.raw_decode(text, start)
        except (ValueError, RecursionError):
            rest, end = rest + "{", start + 1
        else:
            if isinstance(decoded, dict) and "score" in decoded:
                found = decoded["score"]
        start = text.find("{", end)
    rest += text[end:]
    if found is None:
        found = _unquoted_score(rest) if "{" in text else _bare_score(text)
    scores = [_number(value) for value in found] if isinstance(found, list) else [_number(found)]
    if not 1 <= len(scores) <= count:
        return None
    return [float(score) for score in scores] if all(0 <= score <= maximum for score in scores) else None


PLAIN_QUOTES = str.maketrans("“”‘’", "\"\"''")


def _unquoted_score(text: str) -> Any:
    """What an object that is no JSON says after its last `score:`."""
    number = r"""["']?\d+(?:\.\d+)?["']?"""
    pattern = rf"""\bscore["']?\s*[:：]\s*(\[\s*{number}(?:\s*,\s*{number})*\s*\]|{number}(?!\s*[\d.]))"""
    values = re.findall(pattern, text, re.IGNORECASE)
    return re.findall(r"\d+(?:\.\d+)?", values[-1]) if values else None


def _bare_score(text: str) -> Any:
    """An answer that is a list, or a number, and no object."""
    try:
        return json.loads(text[text.index("[") : text.rindex("]") + 1] if "[" in text else text)
    except (ValueError, RecursionError):
        return None


def _number(value: Any) -> float:
    """NaN for what is none."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return math.nan
    try:
        return float(value)
    except (ValueError, OverflowError):
        return math.nan


def edit_score(semantics: Sequence[float], quality: Sequence[float]) -> float:
    """One pass's score, `sqrt(SC · PQ) / 10`, in [0, 1]; SC and PQ are the lowest of each's scores, put on 0..10."""
    sc, pq = (10 * min(pair) / SCALE for pair in (semantics, quality))
    return math.sqrt(sc * pq) / 10


def expected_score(log_probs: Sequence[float]) -> float | None:
    """Edit-R1's reward, `Σ s · softmax(logits)_s / 5` over the digits 0..5, in [0, 1] (arXiv 2510.16888).

    Args:
        log_probs: of "0".."5"; logits do as well. -inf counts as probability 0.

    Returns:
        `None` if no digit has a probability, or one is NaN.
    """
    highest = max(log_probs)
    if not math.isfinite(highest) or any(value != value for value in log_probs):
        return None
    weights = [math.exp(value - highest) for value in log_probs]
    return sum(digit * weight for digit, weight in enumerate(weights)) / sum(weights) / (len(weights) - 1)


def spatial_score(semantics: Sequence[float], quality: Sequence[float]) -> float:
    """SpatialReward's score (arXiv 2602.07458), `SC^0.8 · PQ^0.2 / 10`, in [0, 1].

    SC is 0.6 of success and 0.4 of restraint, PQ half of naturalness and half of cleanliness, both put on 0..10: the
    weights of its authors' reward server. One number that stands for both counts as both.
    """
    success, restraint = semantics[0], semantics[-1]
    sc = 10 * (0.6 * success + 0.4 * restraint) / SCALE
    pq = 10 * (quality[0] + quality[-1]) / 2 / SCALE
    return sc**0.8 * pq**0.2 / 10


def parse_boxes(text: str) -> list[Box] | None:
    """The regions in an answer of SpatialReward's form, `{"edit_region": [{"bbox_2d": [x1, y1, x2, y2]}, …], …}`.

    Returns:
        Boxes that are not empty, cut to the picture; none where the judge saw no edit; `None` where the answer names no
        regions, or one that cannot be read.
    """
    start = text.find('"edit_region"')
    opening = text.find("[", start)
    if start < 0 or opening < 0:
        return None
    try:
        found, _ = json.JSONDecoder(strict=False).raw_decode(text, opening)
        corners = [[min(max(_number(v) / BOX_SCALE, 0.0), 1.0) for v in region["bbox_2d"]] for region in found]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    if any(len(four) != 4 or any(v != v for v in four) for four in corners):
        return None
    return [(x1, y1, x2, y2) for x1, y1, x2, y2 in corners if x1 < x2 and y1 < y2]
