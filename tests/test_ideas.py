"""What `benchmarks/ideas.py` rests on: turns that make up their row, and candidates that come again from their keys."""

import sys
from pathlib import Path

import pytest
import torch
from diffusers import FluxKontextPipeline
from PIL import ImageChops

from rcgrpo import compbench_mini
from rcgrpo.groups.rollout import Exploration

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import ideas


@pytest.mark.parametrize("row", compbench_mini("test", 3, 32, tasks=["multi_object_add"]), ids=lambda r: r["caption"])
def test_two_turns_make_up_their_row(row):
    first = ideas.in_turns(row)
    (second,) = first[ideas.TURNS]
    assert ImageChops.lighter(first["mask"], second["mask"]).tobytes() == row["mask"].tobytes()
    assert ImageChops.darker(first["mask"], second["mask"]).getbbox() is None
    assert second["edited_image"].tobytes() == row["edited_image"].tobytes()
    changed = (
        ImageChops.difference(first["input_image"], first["edited_image"]).convert("L").point(lambda v: 255 * (v > 0))
    )
    assert ImageChops.subtract(changed, first["mask"]).getbbox() is None
    assert f"{first['instruction']} and {second['instruction'].removeprefix('add ')}" == row["instruction"]
    assert [first["task"], first["caption"], second["caption"]] == ["add", *row["caption"].split("|")]


def test_extremes_are_the_best_and_the_worst():
    assert ideas.extremes(torch.tensor([3.0, 9.0, 1.0, 5.0, 7.0, 2.0]), 4).tolist() == [1, 2, 4, 5]
    assert ideas.extremes(torch.tensor([3.0, torch.nan, 1.0, 5.0]), 2).tolist() == [1, 3]


def test_picked_candidates_have_the_noise_that_they_explored_with():
    region = torch.tensor([1.0, 1.0, 0.0, 0.0])
    plain = Exploration(edit_strength=0.5, keep_strength=0.1, antithetic=True)
    everyone = plain.noise(region, 3, 8, ("key", 5))
    chosen = torch.tensor([0, 3, 6])
    picked = ideas.Picked(**vars(plain), pool=8, picked={5: chosen})
    assert torch.equal(picked.noise(region, 3, 3, ("key", 5)), everyone[chosen])


def test_block_means_are_a_projection_onto_tokens_of_one_value_a_channel():
    latents = torch.randn(1, 3, 4, 4)
    filtered = ideas.block_means(FluxKontextPipeline._pack_latents(latents, 1, 3, 4, 4))
    means = torch.nn.functional.avg_pool2d(latents, 2).repeat_interleave(2, -1).repeat_interleave(2, -2)
    assert torch.allclose(filtered, FluxKontextPipeline._pack_latents(means, 1, 3, 4, 4))
    assert torch.allclose(ideas.block_means(filtered), filtered)
