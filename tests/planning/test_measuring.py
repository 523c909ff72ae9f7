"""`measuring.py`: two blocks say what three take, and real sizes are those that are known."""

from functools import cache, partial

import pytest
from diffusers.models.attention_dispatch import attention_backend

from rcgrpo.planning.known import KNOWN
from rcgrpo.planning.measuring import Update, measure_vae, measure_velocity, whole
from rcgrpo.planning.model import Shape, block_counts, read_parts, text_encoders

KONTEXT, KLEIN = "black-forest-labs/FLUX.1-Kontext-dev", "black-forest-labs/FLUX.2-klein-base-4B"
QWEN = "Qwen/Qwen-Image-Edit-2511"


def loss(velocity, transitions):
    return velocity.float().square().mean(), {}


@cache
def measured(model, update, train, doubles, singles, **shape):
    blocks = {"num_layers": doubles, "num_single_layers": singles}
    return measure_velocity(KNOWN[model], Shape(512, **shape), update, train, blocks)


def measure(model, update, train, blocks):
    return measured(model, update, train, *blocks.values())


@pytest.mark.parametrize(("model", "again"), [(KONTEXT, True), (KLEIN, False)])
def test_blocks_of_true_width_are_predicted(model, again):
    """Within a percent of what is counted, from one and two blocks to two and three."""
    update = Update(loss, gradient_checkpointing=again)
    blocks = {"num_layers": 2, "num_single_layers": 3}
    predicted = whole(KNOWN[model], partial(measure, model, update, True), blocks)
    counted = measure(model, update, True, blocks)
    assert predicted.peak == pytest.approx(counted.peak, rel=0.01)
    assert predicted.flop == pytest.approx(counted.flop, rel=1e-9)
    assert (predicted.frozen, predicted.trained) == (counted.frozen, counted.trained)


def test_kontext_is_what_was_measured_elsewhere():
    """Parameters, FLOP without a LoRA's share of a hundredth, and gigabytes above the weights."""
    parts = KNOWN[KONTEXT]
    update = whole(parts, partial(measure, KONTEXT, Update(loss), True))
    assert update.frozen == pytest.approx(11.90e9, rel=1e-3)
    assert update.peak == pytest.approx(1.37e9, rel=0.01)  # 1.7e9 elsewhere, with what autocast adds
    forward = whole(parts, partial(measure, KONTEXT, Update(loss), False))
    assert forward.flop == pytest.approx(37.7e12 * 1.012, rel=0.005)
    assert measure_vae(parts, Shape(1024, 4), True).peak == pytest.approx(12.9e9, rel=0.01)


def test_another_attention_in_this_process_changes_nothing():
    """`set_attention_backend` on any model chooses for all that have none of their own."""
    parts, update, blocks = KNOWN[KONTEXT], Update(loss), {"num_layers": 1, "num_single_layers": 1}
    expected = measure_velocity(parts, Shape(256), update, True, blocks)
    with attention_backend("_native_math"):
        assert measure_velocity(parts, Shape(256), update, True, blocks) == expected


@pytest.mark.parametrize(
    ("model", "blocks", "gigabytes"),
    [(KONTEXT, [19, 38], 9.8), (KLEIN, [5, 20], 8.0), (QWEN, [60], 16.6)],
)
def test_known_sizes(model, blocks, gigabytes):
    parts = read_parts(model)
    assert list(block_counts(parts).values()) == blocks
    weights = sum(weight.numel() for encoder in text_encoders(parts).values() for weight in encoder.parameters())
    assert 2 * weights / 1e9 == pytest.approx(gigabytes, rel=0.01)


def test_every_known_model_can_be_asked():
    """Qwen reads references of another size, masks and guidance; a distilled klein has none."""
    blocks = {"num_layers": 1}
    guided = measure_velocity(KNOWN[QWEN], Shape(256, true_cfg_scale=4.0), Update(loss), True, blocks)
    once = measure_velocity(KNOWN[QWEN], Shape(256), Update(loss), True, blocks)
    assert guided.flop == pytest.approx(2 * once.flop, rel=1e-6) and guided.peak > once.peak
    blocks |= {"num_single_layers": 1}
    base, distilled = (
        measure_velocity(KNOWN[name], Shape(256), Update(loss), False, blocks)
        for name in (KLEIN, KLEIN.replace("base-", ""))
    )
    assert base.flop == pytest.approx(2 * distilled.flop, rel=1e-6)
