"""`data/make_masks.py`: makers on random small models, the words of instructions, a folder that survives a crash."""

import json
import logging

import numpy as np
import pytest
import torch
from datasets import load_dataset
from PIL import Image

from rcgrpo.data.loading import read_stored_masks
from rcgrpo.editors import FluxKontextEditor
from rcgrpo.editors.make_masks import (
    SKIPPED,
    FromConcept,
    FromJudge,
    FromText,
    FromVelocity,
    MaskFolder,
    NoMask,
    from_difference,
    object_phrase,
)
from rcgrpo.rewards import RewardError
from rcgrpo.rewards.transport import Fault
from tiny_kontext import build_tiny_kontext


def photo(size=(40, 24), seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(80, 110, (size[1], size[0], 3), dtype=np.uint8))


def row(i=0, **changes):
    target = photo()
    target.paste((255, 0, 0), (8, 6, 20, 16))
    known = {"id": f"train/{i}", "group": f"g{i}", "task": "add", "instruction": "remove the apple"}
    return {**known, "input_image": photo(), "edited_image": target, **changes}


# Difference


def test_the_difference_needs_a_ground_truth_that_differs():
    mask = np.asarray(from_difference(row(), growth=0)) == 255
    assert mask[8:14, 10:18].all() and mask.mean() < 0.2
    with pytest.raises(NoMask, match="no ground truth"):
        from_difference(row(edited_image=None))
    with pytest.raises(NoMask, match="hardly differ"):
        from_difference(row(edited_image=photo()))


# A judge


class Says:
    """A judge with one answer to everything; `asked` are the questions."""

    def __init__(self, answer):
        self.answer, self.asked = answer, []

    async def answers(self, questions, passes):
        self.asked += questions
        return [self.answer if isinstance(self.answer, Fault) else [self.answer] * passes for _ in questions]


def test_a_judges_boxes_are_a_mask():
    region = '{"edit_region": [{"bbox_2d": [100, 250, 490, 500]}, {"bbox_2d": [900, 0, 1000, 1000]}], "score": [9, 9]}'
    judge = Says(region)
    mask = np.asarray(FromJudge(judge)(row())) == 255
    expected = np.zeros((24, 40), dtype=bool)
    expected[6:12, 4:20] = expected[:, 36:] = True  # a pixel that a box touches belongs to it
    assert np.array_equal(mask, expected)
    (question,) = judge.asked
    assert question.images == (row()["input_image"], row()["edited_image"]) and "remove the apple" in question.text
    with pytest.raises(NoMask, match="no ground truth"):
        FromJudge(judge)(row(edited_image=None))
    with pytest.raises(NoMask, match="sees no edit"):
        FromJudge(Says('{"edit_region": []}'))(row())
    with pytest.raises(NoMask, match="named no regions: 'I see'"):
        FromJudge(Says("I see"))(row())
    with pytest.raises(RewardError, match=r"no answer for the row 'train/0' \(connect: gone\)"):
        FromJudge(Says(Fault("connect", "gone")))(row())


# Velocity


@pytest.fixture(scope="module")
def editor():
    return FluxKontextEditor(build_tiny_kontext(), resolution=32, num_inference_steps=1, max_sequence_length=48)


def test_the_velocity_mask_is_the_editors_own_answer(editor, monkeypatch):
    seen = []
    velocity = editor.velocity

    def spy(model, latents, timestep, conditions):
        seen.append((latents, timestep, conditions))
        return velocity(model, latents, timestep, conditions)

    monkeypatch.setattr(editor, "velocity", spy)
    source = photo((48, 32))
    mask = FromVelocity(editor, num_draws=3, sigma=0.25, threshold=0.33)(row(input_image=source))
    assert mask.mode == "L" and mask.size == source.size and set(np.unique(mask)) == {0, 255}
    assert len(seen) == 3
    latents, timestep, conditions = seen[0]
    assert torch.equal(latents[0], latents[1]) and timestep.tolist() == [250.0, 250.0]
    assert not torch.equal(*conditions.text["prompt_embeds"])
    noise = (latents[0] - 0.75 * conditions.source[0]) / 0.25  # x = (1 - σ) x_0 + σ ε
    assert abs(noise.mean()) < 0.3 and 0.8 < noise.std() < 1.2
    assert not torch.equal(seen[0][0], seen[1][0])


def test_the_same_row_gives_the_same_mask_and_an_empty_instruction_none(editor):
    maker = FromVelocity(editor, num_draws=2, threshold=0.33)
    first, second = (np.asarray(maker(row(instruction="remove the apple"))) for _ in range(2))
    assert np.array_equal(first, second)
    assert not np.array_equal(first, np.asarray(maker(row(instruction="add a crown on the left side"))))
    with pytest.raises(NoMask, match="nowhere in particular"):
        maker(row(instruction=""))


def test_a_mask_follows_where_the_velocity_moves(editor, monkeypatch):
    """A model that answers the instruction in the right half alone."""

    def velocity(model, latents, timestep, conditions):
        rows, columns = editor.grid_for(conditions.height, conditions.width)
        out = torch.zeros(2, rows, columns, latents.shape[-1])
        out[0, :, columns // 2 :] = 1.0
        return out.flatten(1, 2)

    monkeypatch.setattr(editor, "velocity", velocity)
    mask = np.asarray(FromVelocity(editor, num_draws=1)(row(input_image=photo((32, 32))))) == 255
    assert mask[:, 18:].all() and not mask[:, :14].any()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"num_draws": 0}, "num_draws: got 0"),
        ({"sigma": 0}, "sigma: got 0"),
        ({"threshold": 1.5}, "threshold: got 1.5"),
    ],
)
def test_settings_out_of_range_are_named(editor, settings, said):
    with pytest.raises(ValueError, match=said):
        FromVelocity(editor, **settings)


# Text


@pytest.mark.parametrize(
    ("instruction", "phrase"),
    [
        ("Remove the red apple from the picture.", "the red apple"),
        ("remove the apple", "the apple"),
        ("please get rid of two dogs", "two dogs"),
        ("Replace the dog on the sofa with a cat", "the dog on the sofa"),
        ("change the sky to a sunset", "the sky"),
        ("turn the car into a boat.", "the car"),
        ("Make the bus yellow", "the bus"),
        ("recolor the door", "the door"),
        ("add a crown to the cat", None),
        ("put a hat on the man", None),
        ("what if it were night", None),
    ],
)
def test_the_object_of_an_instruction(instruction, phrase):
    assert object_phrase(instruction) == phrase


@pytest.fixture(scope="module")
def text_models(tmp_path_factory):
    """GroundingDINO and SAM 2 of a few thousand random weights, saved as their own classes save them."""
    from transformers import (
        BertConfig,
        BertTokenizer,
        GroundingDinoConfig,
        GroundingDinoForObjectDetection,
        GroundingDinoImageProcessor,
        GroundingDinoProcessor,
        Sam2Config,
        Sam2HieraDetConfig,
        Sam2ImageProcessor,
        Sam2MaskDecoderConfig,
        Sam2Model,
        Sam2Processor,
        Sam2PromptEncoderConfig,
        Sam2VisionConfig,
        SwinConfig,
    )

    detector, segmenter = (tmp_path_factory.mktemp(name) for name in ("detector", "segmenter"))
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", "the", "apple", "a", "cat"]
    tokenizer = BertTokenizer(vocab={word: i for i, word in enumerate(words)})
    torch.manual_seed(0)
    config = GroundingDinoConfig(
        backbone_config=SwinConfig(
            image_size=32,
            embed_dim=8,
            depths=[1, 1, 1, 1],
            num_heads=[1, 1, 1, 1],
            window_size=2,
            out_features=["stage2", "stage3", "stage4"],
        ),
        text_config=BertConfig(
            vocab_size=len(words),
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            max_position_embeddings=32,
        ),
        d_model=32,
        num_queries=6,
        encoder_layers=1,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        num_feature_levels=3,
        max_text_len=32,
        disable_custom_kernels=True,
    )
    GroundingDinoForObjectDetection(config).save_pretrained(detector)
    images = GroundingDinoImageProcessor(size={"shortest_edge": 64, "longest_edge": 96})
    GroundingDinoProcessor(images, tokenizer).save_pretrained(detector)

    backbone = Sam2HieraDetConfig(
        hidden_size=8,
        image_size=[64, 64],
        blocks_per_stage=[1, 1, 1, 1],
        embed_dim_per_stage=[8, 16, 32, 64],
        num_attention_heads_per_stage=[1, 1, 1, 1],
        window_size_per_stage=[2, 2, 2, 2],
        global_attention_blocks=[],
    )
    vision = Sam2VisionConfig(
        backbone_config=backbone,
        backbone_channel_list=[64, 32, 16, 8],
        backbone_feature_sizes=[[16, 16], [8, 8], [4, 4]],
        fpn_hidden_size=16,
    )
    config = Sam2Config(
        vision_config=vision,
        prompt_encoder_config=Sam2PromptEncoderConfig(hidden_size=16, image_size=64, patch_size=16),
        mask_decoder_config=Sam2MaskDecoderConfig(
            hidden_size=16, mlp_dim=16, num_attention_heads=2, iou_head_hidden_dim=16
        ),
    )
    Sam2Model(config).save_pretrained(segmenter)
    Sam2Processor(Sam2ImageProcessor(size={"height": 64, "width": 64})).save_pretrained(segmenter)
    return str(detector), str(segmenter)


def test_the_union_of_what_is_outlined_in_all_boxes_is_the_mask(text_models, monkeypatch):
    maker = FromText(*text_models, box_threshold=0.0, text_threshold=0.0)
    boxes, outlined = [], []
    find = maker.detector_processor.post_process_grounded_object_detection

    def spy(*args, **kwargs):
        found = find(*args, **kwargs)
        boxes.append(found[0]["boxes"])
        return found

    def draw(module, args, output):
        """Box 0 is the left half, box 1 the upper half, nothing else is outlined."""
        outlined.append(output.pred_masks.clone())
        output.pred_masks.fill_(-9)
        output.pred_masks[0, 0, 0, :, :8] = 9
        output.pred_masks[0, 1, 0, :8] = 9

    monkeypatch.setattr(maker.detector_processor, "post_process_grounded_object_detection", spy)
    hook = maker.segmenter.register_forward_hook(draw)
    mask = maker(row())
    hook.remove()
    assert boxes[0].shape == (6, 4) and outlined[0].shape == (1, 6, 1, 16, 16) and outlined[0].isfinite().all()
    assert mask.mode == "L" and mask.size == (40, 24)
    inside = np.asarray(mask) == 255
    assert inside[:, :18].all() and inside[:10].all() and not inside[14:, 22:].any()

    def erase(module, args, output):
        output.pred_masks.fill_(-9)

    hook = maker.segmenter.register_forward_hook(erase)
    with pytest.raises(NoMask, match="the outline of 'the apple' is empty"):
        maker(row())
    hook.remove()


def test_what_is_not_found_gets_no_mask(text_models):
    maker = FromText(*text_models, box_threshold=1.0)
    with pytest.raises(NoMask, match="'the apple' was not found in the picture"):
        maker(row())
    with pytest.raises(NoMask, match="no object to look for in 'add a cat'"):
        maker(row(instruction="add a cat"))
    named = FromText(*text_models, phrase_column="caption", box_threshold=1.0)
    with pytest.raises(NoMask, match="'a cat' was not found"):
        named(row(instruction="add a cat", caption="a cat"))
    with pytest.raises(NoMask, match="no object to look for in ''"):
        named(row(caption=None))


# Concepts


@pytest.fixture(scope="module")
def concept_model(tmp_path_factory):
    """SAM 3 of 64,000 random weights, saved as its own classes save it. It reads one letter as one token."""
    from transformers import (
        CLIPTextConfig,
        CLIPTokenizer,
        Sam3Config,
        Sam3ImageProcessor,
        Sam3Model,
        Sam3Processor,
        Sam3VisionConfig,
        Sam3ViTConfig,
    )

    folder = tmp_path_factory.mktemp("sam3")
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    pieces = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[], model_max_length=32)
    torch.manual_seed(0)
    small = {"hidden_size": 16, "num_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    backbone = Sam3ViTConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=56,
        pretrain_image_size=56,
        window_size=2,
        global_attn_indexes=[1],
    )
    config = Sam3Config(
        vision_config=Sam3VisionConfig(
            backbone_config=backbone, fpn_hidden_size=16, backbone_feature_sizes=[[16, 16], [8, 8], [4, 4]]
        ),
        text_config=CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=16,
            projection_dim=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=32,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        ),
        geometry_encoder_config=small,
        detr_encoder_config=small,
        detr_decoder_config={**small, "num_queries": 6},
        mask_decoder_config={"hidden_size": 16, "num_attention_heads": 2},
    )
    Sam3Model(config).save_pretrained(folder)
    Sam3Processor(Sam3ImageProcessor(size={"height": 56, "width": 56}), tokenizer).save_pretrained(folder)
    return str(folder)


def test_the_union_of_all_instances_that_are_sure_enough_is_the_mask(concept_model):
    maker = FromConcept(concept_model)
    seen = []

    def draw(module, args, kwargs, output):
        """Instance 0 is the left half, 1 the upper half, 2 everything but unsure; nothing else is found."""
        seen.append((kwargs, output.pred_masks.clone()))
        output.pred_masks.fill_(-9)
        output.pred_masks[0, 0, :, :8] = 9
        output.pred_masks[0, 1, :8] = 9
        output.pred_masks[0, 2] = 9
        output.pred_logits.fill_(-9)
        output.pred_logits[0, :2], output.pred_logits[0, 2] = 9, 1  # sigmoid(1) · sigmoid(0.5) = 0.46
        output.presence_logits.fill_(0.5)

    hook = maker.segmenter.register_forward_hook(draw, with_kwargs=True)
    mask = maker(row())
    hook.remove()
    given, outlined = seen[0]
    assert outlined.shape == (1, 6, 16, 16) and outlined.isfinite().all()
    words = maker.processor.tokenizer.decode(given["input_ids"][0], skip_special_tokens=True)
    assert words.replace(" ", "") == "theapple" and given["pixel_values"].shape == (1, 3, 56, 56)
    assert mask.mode == "L" and mask.size == (40, 24)
    inside = np.asarray(mask) == 255
    assert inside[:, :18].all() and inside[:10].all() and not inside[14:, 22:].any()

    hook = maker.segmenter.register_forward_hook(draw, with_kwargs=True)
    everything = FromConcept.__call__(with_threshold(maker, 0.4), row())
    with pytest.raises(NoMask, match="'the apple' was not found in the picture"):
        with_threshold(maker, 0.99)(row())
    hook.remove()
    assert (np.asarray(everything) == 255).all()


def with_threshold(maker, threshold):
    maker.score_threshold = threshold
    return maker


def test_the_phrase_decides_what_a_concept_model_looks_for(concept_model):
    maker = FromConcept(concept_model, score_threshold=0.0)
    first = np.asarray(maker(row()))
    assert np.array_equal(first, np.asarray(maker(row(caption="a cat"))))
    named = FromConcept(concept_model, phrase_column="caption", score_threshold=0.0)
    assert not np.array_equal(first, np.asarray(named(row(caption="a zebra with stripes"))))
    with pytest.raises(NoMask, match="no object to look for in 'add a cat'"):
        maker(row(instruction="add a cat"))
    with pytest.raises(NoMask, match="no object to look for in ''"):
        named(row(caption=None))
    with pytest.raises(NoMask, match="has 42 tokens, and SAM 3 reads 32"):
        named(row(caption="a" * 40))


def test_a_model_of_another_kind_or_none_is_refused(concept_model, text_models, tmp_path):
    with pytest.raises(ValueError, match=r"segmenter: got .*, which is a 'sam2', expected a folder .*facebook/sam3"):
        FromConcept(text_models[1])
    with pytest.raises(ValueError, match=r"segmenter: got .*, which is a 'sam3', expected .* a SAM 2 such as"):
        FromText(text_models[0], concept_model)
    with pytest.raises(ValueError, match=r"segmenter: got .*none', expected .*gated, ask for access .*hf auth login"):
        FromConcept(str(tmp_path / "none"))
    with pytest.raises(ValueError, match=r"detector: got .*none', expected a folder or Hub id of a zero-shot detector"):
        FromText(str(tmp_path / "none"), text_models[1])
    with pytest.raises(ValueError, match=r"score_threshold: got 1\.0, expected a number in"):
        FromConcept(concept_model, score_threshold=1.0)


# The folder


def test_a_folder_is_an_imagefolder_and_goes_on_after_a_crash(tmp_path, caplog):
    rows = [row(i) for i in range(4)]
    rows[1]["edited_image"] = None
    folder = MaskFolder(tmp_path / "masks", "difference")
    folder.fill(rows[:2], from_difference)
    assert folder.made == {"train/0"} and folder.skipped == {"train/1": "there is no ground truth to compare with"}
    with (tmp_path / "masks" / "metadata.jsonl").open("a") as file:
        file.write('{"file_name": "torn')

    asked = []
    again = MaskFolder(tmp_path / "masks", "difference")
    again.fill(rows, lambda row: asked.append(row["id"]) or from_difference(row))
    assert asked == ["train/2", "train/3"] and "train/1" in again and "train/9" not in again
    lines = [json.loads(line) for line in (tmp_path / "masks" / "metadata.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == ["train/0", "train/2", "train/3"]
    assert lines[0]["method"] == "difference" and lines[0]["task"] == "add" and 0.1 < lines[0]["share"] < 0.3
    assert len((tmp_path / "masks" / SKIPPED).read_text().splitlines()) == 1

    with caplog.at_level(logging.ERROR):
        opened = load_dataset(str(tmp_path / "masks"), split="train", cache_dir=str(tmp_path / "cache"))
    assert opened["id"][:] == ["train/0", "train/2", "train/3"] and opened[0]["image"].size == (40, 24)
    stored = read_stored_masks(tmp_path / "masks")
    assert stored.keys() == again.made
    assert Image.open(stored["train/2"]).tobytes() == from_difference(rows[2]).tobytes()


def test_a_mask_whose_picture_is_gone_is_made_again(tmp_path):
    MaskFolder(tmp_path, "difference").fill([row(0)], from_difference)
    next(tmp_path.glob("*.png")).unlink()
    folder = MaskFolder(tmp_path, "difference")
    assert "train/0" not in folder
    folder.fill([row(0)], from_difference)
    assert len(list(tmp_path.glob("*.png"))) == 1 and "train/0" in MaskFolder(tmp_path, "difference")


def test_one_folder_holds_one_kind(tmp_path):
    MaskFolder(tmp_path, "difference").fill([row(0)], from_difference)
    with pytest.raises(ValueError, match=r"holds masks made by difference, expected a new folder or one of 'velocity'"):
        MaskFolder(tmp_path, "velocity")
