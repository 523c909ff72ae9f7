"""`rewards/judge_answers.py`: what a judge may say, and the number that it stands for."""

import json
import math

import pytest

from rcgrpo.rewards.judge_answers import edit_score, expected_score, parse_boxes, parse_scores, spatial_score


def said(*numbers):
    return json.dumps({"reasoning": "because", "score": list(numbers)})


def test_edit_score_by_hand():
    assert edit_score([25, 16], [9, 25]) == pytest.approx(math.sqrt(6.4 * 3.6) / 10)
    assert edit_score([25, 25], [25, 25]) == 1 and edit_score([0, 25], [25, 25]) == 0


@pytest.mark.parametrize(
    ("answer", "scores"),
    [
        (said(3, 25), [3, 25]),
        ('```json\n{"reasoning": "a\nb", "score": [0, 12.5]}\n```', [0, 12.5]),
        ('Let me see {not json} {"score": [1, 1]} ... finally {"score": [20, 21], "reasoning": "{"}', [20, 21]),
        ('{"a": {"score": [1, 2]}}', None),
        ("", None),
        ("25, 25", None),
        ('{"reasoning": "cut off", "score": [2', None),
        ('{"score": [20]}', [20]),
        ('{"score": []}', None),
        ('{"score": [20, 20, 20]}', None),
        ('{"score": 20}', [20]),
        ('{"score": ["20", 20.5]}', [20, 20.5]),
        ('{"score": "7"}', [7]),
        ('{"score": ["good", 20]}', None),
        ('{"score": ["20/25", 20]}', None),
        ('{"score": ["nan", 20]}', None),
        ('{"score": [[20], 20]}', None),
        ('{"score": [%s, 20]}' % ("9" * 400), None),
        ("[20, 21]", [20, 21]),
        ("```json\n[20, 21.5]\n```", [20, 21.5]),
        ("Scores: [3, 4].", [3, 4]),
        ('["3", 4]', [3, 4]),
        ("[3, 4] or [5, 6]", None),
        ("[26, 4]", None),
        ("[" * 3000, None),
        (" 17\n", [17]),
        ("26", None),
        ("I'm sorry, but I can't assist with that request.", None),
        ("the score: 5", None),
        ('{"reasoning": "a sign that says "OPEN" now", "score": [20, 21]}', [20, 21]),
        ('{"reasoning": "it is "odd", "score": 3 at most", "score": [20, 21]}', [20, 21]),
        ('{"score": [20, 21], "reasoning": "a "quoted" word"}', [20, 21]),
        ('{"reasoning": "braces {} and "quotes"", "score": [2, 3]}', [2, 3]),
        ('{"reasoning": "a "b" c", "score": ["2", "3"]}', [2, 3]),
        ('{"reasoning": "a "b" c", "score": 12}', [12]),
        ('{"reasoning": "a "b" c", "score": [2, 3, 4]}', None),
        ('{"reasoning": "a "b" c", "score": [26, 3]}', None),
        ('{"reasoning": "a "b" c", "score": [-1, 3]}', None),
        ('{"reasoning": "a "b" c", "score": [2,', None),
        ('{"reasoning": "a "b" c"}', None),
        ("{reasoning: because, score: [2, 3]}", [2, 3]),
        ("{'reasoning': 'because', 'score': [2, 3]}", [2, 3]),
        ("{“reasoning”: “because”, “score”: [2, 3]}", [2, 3]),
        ('||V^=^V||\n{"reasoning": "x", "score": [2, 3]}\n||V^=^V||', [2, 3]),
        ('{"score": [true, 20]}', None),
        ('{"score": [null, 20]}', None),
        ('{"score": [26, 20]}', None),
        ('{"score": [-1, 20]}', None),
        ('{"score": [NaN, 20]}', None),
        ('{"score": [Infinity, 20]}', None),
        ("{" * 3000, None),
    ],
)
def test_parse_scores(answer, scores):
    assert parse_scores(answer) == scores


def test_expected_score_by_hand():
    assert expected_score([0.0] * 6) == pytest.approx(0.5)
    assert expected_score([-math.inf] * 5 + [-3.0]) == 1 and expected_score([7.0] + [-math.inf] * 5) == 0
    # weights 1, e, e^2, … : the softmax does not care for a shift
    weights = [math.exp(k) for k in range(6)]
    by_hand = sum(k * w for k, w in enumerate(weights)) / sum(weights) / 5
    assert expected_score([0, 1, 2, 3, 4, 5]) == pytest.approx(by_hand)
    assert expected_score([1000, 1001, 1002, 1003, 1004, 1005]) == pytest.approx(by_hand)
    assert expected_score([-math.inf] * 6) is None and expected_score([math.nan] + [0.0] * 5) is None


def test_spatial_score_by_hand():
    assert spatial_score([25, 25], [25, 25]) == pytest.approx(1) and spatial_score([0, 0], [25, 25]) == 0
    assert spatial_score([25, 0], [0, 25]) == pytest.approx(6**0.8 * 5**0.2 / 10)
    assert spatial_score([15], [5]) == pytest.approx(6**0.8 * 2**0.2 / 10)


def regions(*boxes):
    return json.dumps({"edit_region": [{"id": 0, "label": "a", "bbox_2d": box} for box in boxes], "score": [1, 2]})


@pytest.mark.parametrize(
    ("answer", "boxes"),
    [
        (regions([0, 250, 500, 1000]), [(0, 0.25, 0.5, 1)]),
        (f"so: ```json\n{regions([10, 10, 20, 20], [0, 0, 1000, 1000])}```", [(0.01, 0.01, 0.02, 0.02), (0, 0, 1, 1)]),
        (regions(), []),
        (regions([-5, 0, 1200, 500]), [(0, 0, 1, 0.5)]),
        (regions([300, 0, 300, 500], [0, 9, 9, 3]), []),
        (regions(["1", "2", "3", "4.5"]), [(0.001, 0.002, 0.003, 0.0045)]),
        (regions([1, 2, 3]), None),
        (regions([1, 2, 3, "x"]), None),
        ('{"edit_region": [{"label": "a"}]}', None),
        ('{"edit_region": [{"bbox_2d": [1, 2', None),
        ('{"edit_region": [3]}', None),
        (said(1, 2), None),
        ("", None),
    ],
)
def test_parse_boxes(answer, boxes):
    assert parse_boxes(answer) == boxes
