import numpy as np
import pytest
import torch
from PIL import Image
from torchmetrics.functional.image import lpips
from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

from rcgrpo.rewards import (
    BackgroundDINO,
    BackgroundLPIPS,
    background_keep,
    background_l1,
    preservation,
    resolve_rewards,
)
from rcgrpo.rewards.builtin import background_keep_gradient
from rcgrpo.rewards.pictures import image_tensor

SIZE = (64, 64)


def noise(seed):
    generator = np.random.default_rng(seed)
    return Image.fromarray(generator.integers(0, 256, (*SIZE, 3), dtype=np.uint8))


def mask_of(box):
    mask = Image.new("L", SIZE, 0)
    mask.paste(255, box)
    return mask


HALF, ALL = mask_of((0, 0, 32, 64)), mask_of((0, 0, 64, 64))


def pasted(source, image, box):
    """The source with a part of another picture."""
    edited = source.copy()
    edited.paste(image.crop(box), box)
    return edited


@pytest.fixture(scope="module")
def dino(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("dino"))
    config = Dinov2Config(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=64, patch_size=8)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Dinov2Model(config)
        for weight in model.parameters():
            torch.nn.init.normal_(weight, std=0.3)
    model.save_pretrained(path)
    BitImageProcessor(image_mean=[0.5] * 3, image_std=[0.25] * 3).save_pretrained(path)
    return BackgroundDINO(path, side=64, device="cpu")


@pytest.fixture
def random_lpips(monkeypatch):
    """LPIPS with the real heads on a random trunk: the wiring, not the numbers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = lpips._NoTrainLpips(net="squeeze", spatial=True, pnet_rand=True)
    monkeypatch.setattr(preservation, "lpips_on", lambda device, net: network)
    return BackgroundLPIPS(device="cpu")


def test_l1_by_hand():
    source, image = Image.new("RGB", SIZE, (100, 100, 100)), Image.new("RGB", SIZE, (151, 100, 49))
    scores = background_l1([image, source, image], [source] * 3, [HALF, HALF, ALL])
    assert scores[0] == pytest.approx(1 - (0.2 + 0 + 0.2) / 3) and scores[1:] == [1, None]


@pytest.mark.parametrize("name", ["l1", "lpips", "dino"])
def test_only_what_is_outside_counts(name, request, random_lpips):
    reward = {"l1": background_l1, "lpips": random_lpips}.get(name) or request.getfixturevalue("dino")
    source, other = noise(1), noise(2)
    inside = pasted(source, other, (0, 0, 32, 64))
    little, much = pasted(source, other, (56, 0, 64, 64)), pasted(source, other, (32, 0, 64, 64))
    untouched, a_bit, a_lot, nowhere = reward([inside, little, much, other], [source] * 4, [HALF] * 3 + [ALL])
    assert untouched == pytest.approx(1, abs=1e-5) and nowhere is None
    assert untouched > a_bit > a_lot
    again = reward([pasted(much, noise(3), (0, 0, 32, 64))], [source], [HALF])
    assert again == pytest.approx([a_lot], abs=1e-6), "the edit does not leak into its surroundings"


def test_dino_is_the_mean_cosine_of_the_patches_outside(dino):
    source, image = noise(1), noise(2)
    mask = mask_of((0, 0, 30, 64))  # the fourth column of patches is partly outside
    (score,) = dino([image], [source], [mask])
    model = Dinov2Model.from_pretrained(dino.model)
    shown = pasted(image, source, (0, 0, 30, 64))
    pixels = torch.stack([torch.tensor(np.array(p)).permute(2, 0, 1) / 255 for p in (shown, source)])
    with torch.no_grad():
        patches = model(pixel_values=(pixels - 0.5) / 0.25).last_hidden_state[:, 1:].unflatten(1, (8, 8))
    expected = torch.cosine_similarity(patches[0], patches[1], dim=-1)[:, 3:].mean().item()
    assert score == pytest.approx(expected, abs=1e-4)


def test_lpips_that_cannot_be_loaded_says_what_it_needs(monkeypatch):
    def broken(**options):
        raise OSError("no route to download.pytorch.org")

    monkeypatch.setattr(lpips, "_NoTrainLpips", broken)
    preservation.lpips_on.cache_clear()
    with pytest.raises(ValueError, match=r"LPIPS \(squeeze\): got no file.*no route.*TORCH_HOME"):
        BackgroundLPIPS(device="cpu")([noise(1)], [noise(2)], [HALF])


def test_sizes_must_agree_and_nothing_is_loaded_by_name():
    with pytest.raises(ValueError, match="must share one size"):
        background_l1([noise(1)], [noise(2)], [Image.new("L", (8, 8))])
    names = ["background_l1", "background_lpips", "background_dino"]
    assert [reward.value_range for reward in resolve_rewards(names)] == [(0, 1), (0, 1), (-1, 1)]


def test_background_keeps_gradient_is_its_own():
    """The same numbers on tensors, a small step gives what the gradient promises, and no pixel inside counts."""
    sources, images = [noise(seed) for seed in range(3)], [noise(seed + 9) for seed in range(3)]
    images = [Image.blend(*pair, 0.1) for pair in zip(sources, images, strict=True)]
    given = {"source_images": sources, "masks": [HALF, mask_of((10, 20, 30, 50)), ALL]}
    pictures = torch.stack([image_tensor(image) for image in images]).requires_grad_(True)
    scores = background_keep_gradient(pictures, **given)
    expected = background_keep(images, **given)
    assert scores.tolist()[:2] == pytest.approx(expected[:2]) and expected[2] is None and scores[2].isnan()
    (gradient,) = torch.autograd.grad(scores.nan_to_num(0.0).sum(), pictures)
    for picture, mask in zip(gradient, given["masks"], strict=True):
        keep = torch.from_numpy(np.asarray(mask) < 128)
        assert not picture[:, ~keep].any() and (not keep.any() or bool(picture[:, keep].any(0).float().mean() > 0.99))
    step = 1e-3 * gradient[:2] / gradient[:2].flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    kept = {name: values[:2] for name, values in given.items()}
    with torch.no_grad():
        up, down = (background_keep_gradient(pictures[:2] + sign * step, **kept) for sign in (1, -1))
    assert ((up - down) / (2e-3 * gradient[:2].flatten(1).norm(dim=1))).tolist() == pytest.approx([1, 1], rel=0.02)
