import pytest
import torch
from PIL import Image
from torch.nn.functional import cosine_similarity
from transformers import CLIPConfig, CLIPImageProcessor, CLIPImageProcessorPil, CLIPModel, CLIPProcessor, CLIPTokenizer

from rcgrpo.rewards import ClipDirectionReward, ClipImageReward, ClipTextReward, resolve_rewards
from rcgrpo.rewards.clip import load_clip, split_caption


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small random CLIP with its processor, in a folder: every letter is a token."""
    path = str(tmp_path_factory.mktemp("clip"))
    letters = [chr(c) for c in range(97, 123)]
    pieces = ["<|startoftext|>", "<|endoftext|>", *letters, *(letter + "</w>" for letter in letters), "|</w>", "|"]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77)
    sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, projection_dim=12)
    text = dict(sizes, vocab_size=len(pieces), bos_token_id=0, eos_token_id=1, pad_token_id=1)
    vision = dict(sizes, image_size=32, patch_size=8)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12))
        for weight in model.parameters():
            torch.nn.init.normal_(weight, std=0.5)
        model.visual_projection.weight.data.neg_()  # with this seed, cosines with words are then above 0
    model.save_pretrained(path)
    pictures = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(pictures, tokenizer).save_pretrained(path)
    return path


def picture(seed):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (20, 20, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


MASK = Image.new("L", (20, 20), 0)
MASK.paste(255, (4, 2, 18, 16))
NOWHERE = Image.new("L", (20, 20), 0)


def embed(folder, picture=None, text=None):
    """By transformers' own joint forward, for comparison."""
    processor = CLIPProcessor(CLIPImageProcessorPil.from_pretrained(folder), CLIPTokenizer.from_pretrained(folder))
    one = picture or Image.new("RGB", (32, 32))
    inputs = processor(text=[text or "x"], images=[one], return_tensors="pt")
    with torch.no_grad():
        output = load_clip(folder, "cpu").model(**inputs)
    return output.text_embeds[0] if text else output.image_embeds[0]


def cosine(one, other):
    return float(cosine_similarity(one, other, dim=-1))


def test_text_reward_is_the_crops_cosine_with_its_captions(folder):
    reward = ClipTextReward(folder, "cpu")
    image, words = picture(0), ["apple", "pear", "dog", "cat", "tree", "boat"]
    shown = embed(folder, image.crop((4, 2, 18, 16)))
    cosines = [cosine(shown, embed(folder, text=word)) for word in words]
    scores = reward(images=[image] * 6, masks=[MASK] * 6, caption=words)
    assert scores == pytest.approx(cosines, abs=1e-5) and max(scores) - min(scores) > 0.05 and min(scores) > 0
    (joined,) = reward(images=[image], masks=[MASK], caption=["|".join(words)])
    assert joined == pytest.approx(sum(scores) / 6, abs=1e-5)
    assert reward(images=[image] * 3, masks=[MASK, MASK, NOWHERE], caption=["", None, "apple"]) == [None] * 3
    mixed = reward(images=[image] * 3, masks=[NOWHERE, MASK, MASK], caption=["apple", "", words[-1]])
    assert mixed == [None, None, pytest.approx(scores[-1], abs=1e-5)]
    assert reward(images=[image], masks=[MASK], caption=["x" * 500])[0] is not None, "long captions are cut"
    projection = reward.encoder.model.visual_projection.weight
    try:
        projection.data.neg_()
        assert reward(images=[image], masks=[MASK], caption=["apple"]) == [0], "below 0 is 0, as in CompBench"
    finally:
        projection.data.neg_()


def test_image_reward_is_the_crops_cosine_with_the_ground_truths(folder):
    reward = ClipImageReward(folder, "cpu")
    image, target = picture(1), picture(2)
    scores = reward(images=[image] * 4, masks=[MASK, MASK, MASK, NOWHERE], edited_image=[target, image, None, target])
    crops = [embed(folder, p.crop((4, 2, 18, 16))) for p in (image, target)]
    assert scores[0] == pytest.approx(cosine(*crops), abs=1e-5) and scores[0] < 0.999
    assert scores[1] == pytest.approx(1) and scores[2:] == [None, None]
    larger = target.resize((40, 40), Image.Resampling.NEAREST)
    (score,) = reward(images=[image], masks=[MASK], edited_image=[larger])
    assert -1 <= score <= 1, "a target of another size is brought to the mask's"
    outside = image.copy()
    outside.paste("red", (0, 0, 20, 2))
    assert reward(images=[outside], masks=[MASK], edited_image=[target])[0] == pytest.approx(scores[0])


def test_direction_reward_compares_two_changes(folder):
    reward = ClipDirectionReward(folder, "cpu", source_caption="before", target_caption="after")
    assert reward.columns == ("before", "after")
    source, image = picture(1), picture(2)
    columns = {"before": ["a cat", "a cat", "a cat", None], "after": ["a dog", "a cat", "a dog", "a dog"]}
    scores = reward(images=[image, image, source, image], source_images=[source] * 4, **columns)

    def unit(vector):
        return vector / vector.norm()

    moved = unit(embed(folder, image)) - unit(embed(folder, source))
    words = unit(embed(folder, text="a dog")) - unit(embed(folder, text="a cat"))
    assert scores[0] == pytest.approx(cosine(moved, words), abs=1e-4)
    assert scores[1:] == [None, None, None]


def test_names_columns_and_ranges_without_loading_anything():
    rewards = {reward.name: reward for reward in resolve_rewards(["clip_text", "clip_image", "clip_direction"])}
    assert rewards["clip_text"].columns == ("caption",) and rewards["clip_text"].value_range == (0, 1)
    assert rewards["clip_image"].columns == ("edited_image",) and rewards["clip_image"].value_range == (-1, 1)
    assert rewards["clip_direction"].columns == ("source_caption", "target_caption")
    assert split_caption(" a |b| ") == ["a", "b"] and split_caption(None) == []
