"""CompBench's metrics against a second computation, written here from the protocol's text alone."""

import inspect
import math
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter

from rcgrpo.data import compbench_mini
from rcgrpo.evaluation.compbench import (
    Turn,
    categorise,
    foreground_box,
    local_clip_scores,
    parse_turn,
    split_captions,
    sub_task,
    video_id,
)
from rcgrpo.evaluation.held_out import COMPBENCH_METRICS, METRICS, MINI_METRICS, Result, Scorer
from rcgrpo.maths.metrics import load_lpips
from rcgrpo.rewards.clip_model import Clip
from tiny_clip import SIDE, write_random_squeezenet, write_tiny_clip

COUNT = 51


@pytest.fixture(scope="module")
def rows():
    """51 rows, the edit imitated: the target with noise everywhere, so that no metric is trivial."""
    random = np.random.default_rng(0)
    rows = []
    for row in compbench_mini("test", COUNT):
        edited = np.asarray(row["edited_image"]).astype(np.int64)
        edited += random.integers(-30, 31, size=edited.shape)
        row["edited"] = Image.fromarray(edited.clip(0, 255).astype(np.uint8))
        rows.append(row)
    rows[0]["mask"] = rows[0]["mask"].point(lambda value: value // 2)  # a grey mask counts by half
    rows[1]["mask"] = Image.new("L", rows[1]["mask"].size)
    rows[1]["mask"].paste(255, (10, 5, 11, 40))  # degenerate at its own size
    rows[2]["caption"] = ""
    rows[3]["caption"] = "an apple|a guitar"
    return rows


def results(rows):
    return [Result(r["edited"], r["input_image"], r["mask"], r["edited_image"], r["caption"], r["task"]) for r in rows]


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    return write_tiny_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def squeezenet(tmp_path_factory):
    return write_random_squeezenet(tmp_path_factory.mktemp("squeezenet") / "squeezenet1_1.pth")


# The protocol's text, once more --------------------------------------------------------------------------------------


def resized(picture, size, mode):
    how = Image.Resampling.NEAREST if mode == "L" else Image.Resampling.BICUBIC
    return picture.convert(mode).resize((size, size), how)


def backgrounds(row, size):
    """Edited picture and source, `[height, width, 3]` in 0..1, multiplied by 1 - mask/255."""
    keep = 1 - np.asarray(resized(row["mask"], size, "L")).astype(np.float64)[..., None] / 255
    return [np.asarray(resized(row[key], size, "RGB")) / 255 * keep for key in ("edited", "input_image")]


def psnr(row, size):
    edited, source = backgrounds(row, size)
    return 10 * math.log10(1 / ((edited - source) ** 2).mean())


def ssim(row, size):
    """Wang et al. 2004: Gaussian windows of 11 pixels with σ = 1.5, K = (0.01, 0.03), mean over a mirrored frame."""
    x, y = backgrounds(row, size)

    def blur(values):
        return gaussian_filter(values, sigma=(1.5, 1.5, 0), mode="mirror", radius=(5, 5, 0))

    mean_x, mean_y = blur(x), blur(y)
    var_x, var_y, cov = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2, blur(x * y) - mean_x * mean_y
    top = (2 * mean_x * mean_y + 0.01**2) * (2 * cov + 0.03**2)
    return (top / ((mean_x**2 + mean_y**2 + 0.01**2) * (var_x + var_y + 0.03**2))).mean()


@cache
def squeezenet_with_heads(weights):
    import torchvision
    from torchmetrics.functional.image import lpips as module

    network = torchvision.models.squeezenet1_1(weights=None)
    network.load_state_dict(torch.load(weights, weights_only=True))
    file = Path(inspect.getfile(module)).parent / "lpips_models" / "squeeze.pth"
    return network, torch.load(file, map_location="cpu", weights_only=True)


def lpips(row, size, weights):
    """Zhang et al. 2018 on SqueezeNet 1.1: unit features after seven layers, their squared difference weighted."""
    network, heads = squeezenet_with_heads(weights)
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    pair = torch.tensor(np.stack(backgrounds(row, size)), dtype=torch.float32) * 2 - 1
    features = ((pair - shift) / scale).permute(0, 3, 1, 2)
    total = 0.0
    heights = iter(range(7))
    with torch.no_grad():
        for place, layer in enumerate(network.features):
            features = layer(features)
            if place in (1, 4, 7, 9, 10, 11, 12):
                unit = features / (features.square().sum(1, keepdim=True) + 1e-8).sqrt()
                head = heads[f"lin{next(heights)}.model.1.weight"]
                total += float(((unit[0] - unit[1]).square() * head[0]).sum(0).mean())
    return total


@cache
def clip_with_tokenizer(folder):
    from transformers import CLIPModel, CLIPTokenizer

    return CLIPModel.from_pretrained(folder).eval(), CLIPTokenizer.from_pretrained(folder)


def local_scores(row, size, folder):
    """(LC-T, LC-I) of the box (min x, min y, max x, max y), used as a PIL box."""
    y, x = np.where(np.asarray(resized(row["mask"], size, "L")) > 0)
    if not len(x) or x.max() <= x.min() or y.max() <= y.min():
        return 0.0, 0.0
    box = (x.min(), y.min(), x.max(), y.max())
    pixels = []
    for key in ("edited", "edited_image"):
        crop = resized(row[key], size, "RGB").crop(box)
        width, height = crop.size
        short = min(width, height)
        crop = crop.resize((width * SIDE // short, height * SIDE // short), Image.Resampling.BICUBIC)
        left, top = (crop.width - SIDE) // 2, (crop.height - SIDE) // 2
        values = np.asarray(crop.crop((left, top, left + SIDE, top + SIDE))) / 255
        mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
        pixels.append(torch.tensor((values - mean) / std, dtype=torch.float32).permute(2, 0, 1))
    model, tokenizer = clip_with_tokenizer(folder)
    text_scores = []
    for caption in row["caption"].split("|"):
        tokens = tokenizer([caption or " "], return_tensors="pt")
        with torch.no_grad():
            seen = model(input_ids=tokens["input_ids"][:, :20], pixel_values=torch.stack(pixels))
        cosines = torch.cosine_similarity(seen.image_embeds, seen.text_embeds)
        text_scores.append(max(0.0, 100 * float(cosines[0])))
    return np.mean(text_scores), float(torch.cosine_similarity(seen.image_embeds[:1], seen.image_embeds[1:]))


# Against it -----------------------------------------------------------------------------------------------------------


def test_psnr_on_51_samples(rows):
    scores = Scorer(["psnr"])(results(rows))
    assert scores["psnr"] == pytest.approx([psnr(row, 512) for row in rows], abs=1e-4)
    assert len(scores["psnr"]) == COUNT and 10 < min(scores["psnr"]) < max(scores["psnr"]) < 40


@pytest.mark.parametrize(("size", "count"), [(96, COUNT), (512, 3)])
def test_ssim(rows, size, count):
    scores = Scorer(["ssim"], size)(results(rows[:count]))
    assert scores["ssim"] == pytest.approx([ssim(row, size) for row in rows[:count]], abs=1e-4)


@pytest.mark.parametrize(("size", "count"), [(64, COUNT), (512, 1)])
def test_lpips(rows, size, count, squeezenet):
    scores = Scorer(["lpips"], size, lpips_weights=squeezenet)(results(rows[:count]))
    assert scores["lpips"] == pytest.approx([lpips(row, size, squeezenet) for row in rows[:count]], abs=1e-4)
    assert min(scores["lpips"]) > 0 and not METRICS["lpips"].higher_is_better


def test_local_clip_scores(rows, clip_folder):
    scores = Scorer(["lc_i", "lc_t"], clip_model=clip_folder)(results(rows))
    expected = [local_scores(row, 512, clip_folder) for row in rows]
    assert scores["lc_t"] == pytest.approx([float(t) for t, _ in expected], abs=1e-4)
    assert scores["lc_i"] == pytest.approx([i for _, i in expected], abs=1e-4)
    assert np.std(scores["lc_i"][2:]) > 0.01 and np.std(scores["lc_t"][2:]) > 0.1  # the random model tells them apart


def test_torchmetrics_own_clip_score_agrees(rows, clip_folder):
    """CompBench's owners call this class; it does not know what transformers 5 returns, hence the adapter."""
    from torchmetrics.multimodal import CLIPScore

    clip = Clip(clip_folder)

    class Adapter(torch.nn.Module):
        config = clip.model.config

        def get_image_features(self, pixel_values):
            return clip.model.get_image_features(pixel_values=pixel_values).pooler_output

        def get_text_features(self, input_ids, attention_mask):
            return clip.model.get_text_features(input_ids=input_ids, attention_mask=attention_mask).pooler_output

    def process(text=None, images=None, return_tensors="pt", padding=True):
        if text is not None:
            return clip.tokenizer(text, return_tensors=return_tensors, padding=padding)
        return clip.image_processor([i.permute(1, 2, 0).numpy() for i in images], return_tensors=return_tensors)

    metric = CLIPScore(model_name_or_path=lambda: (Adapter(), process))
    for row in rows[4:8]:
        box = foreground_box(resized(row["mask"], 512, "L"))
        crop = torch.tensor(np.array(resized(row["edited"], 512, "RGB").crop(box))).permute(2, 0, 1)
        expected = float(metric(crop, row["caption"].replace("|", " ")))
        caption = row["caption"].replace("|", " ")
        (ours,), _ = local_clip_scores([row["edited"]], [None], [row["mask"]], [caption], clip)
        assert ours == pytest.approx(expected, abs=1e-4)


def test_captions_of_several_objects_are_averaged(rows, clip_folder):
    clip, row = Clip(clip_folder), rows[4]

    def text_score(caption):
        return local_clip_scores([row["edited"]], [row["edited_image"]], [row["mask"]], [caption], clip)[0][0]

    one, other = text_score("a duck"), text_score("xylophones")
    assert one != pytest.approx(other, abs=1e-3)
    assert text_score("a duck|xylophones") == pytest.approx((one + other) / 2, abs=1e-4)
    assert text_score("a duck|") == pytest.approx(one, abs=1e-4)
    assert text_score("") == text_score(None) == text_score(" ")


def mask_of(box, size=(64, 48)):
    mask = Image.new("L", size)
    if box:
        mask.paste(1, box)
    return mask


@pytest.mark.parametrize(
    ("drawn", "box"),
    [
        ((3, 5, 20, 30), (3, 5, 19, 29)),  # the last column and row are dropped
        ((0, 0, 64, 48), (0, 0, 63, 47)),
        ((3, 5, 5, 7), (3, 5, 4, 6)),
        ((3, 5, 4, 30), None),
        ((3, 5, 20, 6), None),
        ((3, 5, 4, 6), None),
        (None, None),
    ],
)
def test_boxes(drawn, box, clip_folder):
    mask = mask_of(drawn)
    assert foreground_box(mask) == box
    picture = Image.effect_noise(mask.size, 60).convert("RGB")
    scores = local_clip_scores([picture], [picture], [mask], ["x"], Clip(clip_folder), size=None)
    if box is None:
        assert scores == ([0.0], [0.0])
    else:
        assert scores[1] == [pytest.approx(1, abs=1e-5)]
        assert local_clip_scores([picture], [None], [mask], ["x"], Clip(clip_folder), size=None)[1] == [None]


def test_rows_of_the_benchmark():
    assert parse_turn("turn2_add/02b72b8d_00002_t1.png") == Turn(2, "turn2_add", "add/02b72b8d_00002_t1.png")
    assert parse_turn("001ca3cb/0/00003.png") is parse_turn("turn1/a.png") is None
    assert sub_task("multi_turn_remove", "turn1_remove/02b72b8d_00002_t2.png") == "turn1_remove"
    assert sub_task("add", "001ca3cb/0/00003.png") == "add"
    paths = ("001ca3cb/0/00003.png", "02b72b8d_2_00016.png", "turn1_add/02b72b8d_00002_t1.png", "00000.png")
    assert [video_id(path) for path in paths] == ["001ca3cb", "02b72b8d", "02b72b8d", "00000.png"]
    assert split_captions("a yellow fish|a white fish") == ["a yellow fish", "a white fish"]
    assert categorise(["turn2_add", "replace", "add", "swap", "add"]) == {
        "Local": ("add", "replace"),
        "Multi-turn, turn 2": ("turn2_add",),
        "Other": ("swap",),
    }


# Scorer --------------------------------------------------------------------------------------------------------------


def test_embedded_metrics(rows):
    scores = Scorer(MINI_METRICS, size=None)(results(rows[3:12]))
    assert list(scores) == list(MINI_METRICS)
    removed = [row["task"] in ("remove", "multi_object_remove", "implicit_reasoning") for row in rows[3:12]]
    assert [value is None for value in scores["lp_t"]] == removed and any(removed) and not all(removed)
    perfect = Scorer(["lp_i", "psnr"], size=None)(
        [Result(r.target, r.source, r.mask, r.target) for r in results(rows[4:6])]
    )
    assert perfect["lp_i"] == pytest.approx([1, 1], abs=1e-5) and perfect["psnr"] == [100.0, 100.0]


def test_what_does_not_apply_is_none(rows):
    shown = results(rows[4:5])[0]
    everything = Image.new("L", shown.mask.size, 255)
    scores = Scorer(["psnr", "ssim", "lp_i"], size=None)([Result(shown.image, shown.source, everything)])
    assert scores == {"psnr": [None], "ssim": [None], "lp_i": [None]}


def test_weights_that_cannot_be_had_are_an_error_at_the_start(tmp_path, squeezenet):
    with pytest.raises(ValueError, match=r"CLIP: got .*nowhere.*Metrics that need neither: psnr ssim"):
        Scorer(["lc_t", "psnr", "ssim"], clip_model=str(tmp_path / "nowhere"))
    (tmp_path / "bad.pth").write_bytes(b"no weights")
    for name in ("bad.pth", "missing.pth"):
        with pytest.raises(ValueError, match=rf"LPIPS \(squeeze\): got .*{name}.*Metrics that need neither: psnr ssim"):
            load_and_score(tmp_path / name)
    torch.save({"features.0.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"expected torchvision's ImageNet weights"):
        load_lpips(tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"metrics: got \['psnr', 'psnr'\], expected some of lc_t"):
        Scorer(["psnr", "psnr"])
    with pytest.raises(ValueError, match="metrics: got"):
        Scorer(["mse"])
    assert set(COMPBENCH_METRICS) | set(MINI_METRICS) == set(METRICS)


def load_and_score(weights):
    Scorer(COMPBENCH_METRICS[-1:], lpips_weights=weights)
