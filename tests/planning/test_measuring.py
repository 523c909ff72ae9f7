"""`measuring.py`: two blocks say what three take, and real sizes are those that are known."""

from functools import cache, partial

import pytest
import torch
from diffusers.models.attention_dispatch import attention_backend

from rcgrpo import compbench_mini
from rcgrpo.planning.counting import Counter, storages, without_contents
from rcgrpo.planning.known import KNOWN
from rcgrpo.planning.measuring import Update, measure_vae, measure_velocity, whole
from rcgrpo.planning.model import Shape, block_counts, read_parts, text_encoders
from rcgrpo.training.averaging import WeightAverage
from tiny_kontext import build_tiny_kontext
from tiny_training import LAYERS, make

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


@pytest.mark.parametrize("options", [{"reference": True}, {"gradient_steps": 3, "gradient_checkpointing": False}])
def test_what_an_update_may_do_besides_is_predicted_too(options):
    """The base's own answer; the rewards' gradient, through three calls and the decoder."""
    update, blocks = Update(loss, **options), {"num_layers": 2, "num_single_layers": 3}
    predicted, counted = whole(KNOWN[KONTEXT], partial(measure, KONTEXT, update, True), blocks), None
    counted = measure(KONTEXT, update, True, blocks)
    assert predicted.peak == pytest.approx(counted.peak, rel=0.01)
    assert predicted.flop == pytest.approx(counted.flop, rel=1e-9)
    plain = measure(KONTEXT, Update(loss, gradient_checkpointing=update.gradient_checkpointing), True, blocks)
    assert counted.peak > plain.peak and counted.flop > plain.flop


def redness(images, **columns):
    return [i % 4 / 4 for i, _ in enumerate(images)]


redness.differentiable = lambda pictures, **columns: pictures[:, 0].mean((1, 2))


@pytest.mark.parametrize(
    ("options", "again", "update"),
    [
        ({"beta": 0.1}, True, {"reference": True}),
        ({"reward_gradient_weight": 1.0}, True, {"gradient_steps": 1}),
        ({"reward_gradient_weight": 1.0, "reward_gradient_steps": 3}, False, {"gradient_steps": 3}),
    ],
)
def test_a_trainer_s_update_takes_what_is_planned(tmp_path, monkeypatch, options, again, update):
    """Within a tenth of the bytes that the trainer's own update allocates, on real tensors."""
    pipe = build_tiny_kontext()
    pipe.save_pretrained(tmp_path / "model")
    sizes = {"resolution": 128, "num_anchors": 4, "num_policy_steps": 1, "policy_steps_range": [0, 0.4], "max_steps": 1}
    more = sizes | {"train_micro_batch_size": 4, "gradient_checkpointing": again} | options
    trainer = make(tmp_path, compbench_mini("train", 2, 128), redness, pipe=pipe, **more)
    compute, backward, peaks, counters = trainer.compute_loss, trainer.accelerator.backward, [], []

    def counted(model, inputs, *given, **named):
        groups = [tensor for group in inputs.groups for tensor in vars(group).values()]
        conditions = [*vars(inputs.conditions).values(), *inputs.conditions.text.values()]
        there = [value for value in (*vars(inputs).values(), *groups, *conditions) if isinstance(value, torch.Tensor)]
        counters.append(Counter([*storages(trainer.model, pipe.vae), *there]).__enter__())
        return compute(model, inputs, *given, **named)

    def ended(loss):
        backward(loss)
        counters[-1].__exit__(None, None, None)
        peaks.append(max(counters[-1].peaks.values()))

    monkeypatch.setattr(trainer, "compute_loss", counted)
    monkeypatch.setattr(trainer.accelerator, "backward", ended)
    trainer.train()
    assert len(peaks) == 2  # the second one finds gradients
    parts = read_parts(str(tmp_path / "model"))
    dtypes = dict.fromkeys(("dtype", "text_dtype", "vae_dtype"), torch.float32)
    shape = Shape(128, batch=4, max_sequence_length=16, autocast=False, **dtypes)
    asked = Update(trainer.policy.loss, 4, tuple(LAYERS), 4, gradient_checkpointing=again, **update)
    planned = measure_velocity(parts, shape, asked, True, block_counts(parts))
    assert planned.peak == pytest.approx(peaks[1], rel=0.1)


def test_an_average_takes_four_bytes_a_weight():
    """What `plan` says of `ema_decay`; an update of it makes a weight's difference at a time."""
    with without_contents():
        model = torch.nn.Sequential(*(torch.nn.Linear(256, 256, bias=False, dtype=torch.bfloat16) for _ in range(20)))
        with Counter(storages(model)) as counter:
            average = WeightAverage(model, 0.9)
            kept = counter.live
            counter.label = "update"
            average.update()
    weights = 20 * 256**2
    assert kept == pytest.approx(4 * weights, rel=0.01)
    assert kept == counter.live and counter.peaks["update"] == pytest.approx(kept, rel=0.15)
