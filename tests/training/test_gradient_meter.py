"""`gradient_meter.py`: signal and noise of gradients, travel and drift of weights, where both are known."""

import math

import pytest
import torch

from rcgrpo.training.gradient_meter import noise_drift, signal_and_noise
from tiny_training import ADAM, history, last, make

pytestmark = pytest.mark.filterwarnings("ignore")

SIZE = 4000


def walk(signal, noise, updates, **options):
    """Adam on gradients whose mean has this squared norm, and their deviations that variance."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.nn.Parameter(torch.zeros(SIZE))
    optimizer = torch.optim.AdamW([weights], lr=1e-3, **options)
    found, drift = [], 0.0
    for _ in range(updates):
        deviation = torch.randn(SIZE, generator=generator) * (noise / SIZE) ** 0.5
        weights.grad = (signal / SIZE) ** 0.5 + deviation
        found.append(signal_and_noise(optimizer))
        optimizer.step()
        drift += noise_drift(optimizer)
    return found, float(weights.detach().norm()), drift**0.5


@pytest.mark.parametrize("signal", [0.0, 0.5, 4.0])
def test_signal_and_noise_are_found(signal):
    found, _, _ = walk(signal, 9.0, 200, weight_decay=0.1)
    assert found[0] is None
    mean = [sum(values) / 199 for values in zip(*found[1:], strict=True)]
    assert mean[0] == pytest.approx(signal, abs=0.02 + 0.02 * signal)
    assert mean[1] == pytest.approx(9.0, rel=0.02)


def test_by_hand():
    """Gradients (2, 0), then (1, 1): their product is 2, whatever β₁; then m is a mean of both."""
    weights = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.Adam([weights], lr=0.1, betas=(0.5, 0.5), eps=1e-12)
    weights.grad = torch.tensor([2.0, 0.0])
    assert signal_and_noise(optimizer) is None
    optimizer.step()
    weights.grad = torch.tensor([1.0, 1.0])
    assert signal_and_noise(optimizer) == pytest.approx((2.0, 0.0))
    optimizer.step()
    # m = (1, .5) of weights that add up to .75, v = (1.5, .5) likewise: a step of -.1 (4/3, 2/3) / (√2, √(2/3)).
    assert noise_drift(optimizer) == pytest.approx(0.01 * 3 * (16 / 9 / 2 + 4 / 9 / (2 / 3)))
    weights.grad = torch.tensor([3.0, 0.0])
    assert signal_and_noise(optimizer) == pytest.approx((4.0, 5.0))
    weights.grad = None
    assert signal_and_noise(optimizer) is None and noise_drift(optimizer) == 0


@pytest.mark.parametrize("beta", [0.0, 0.9])
def test_noise_travels_as_far_as_it_drifts(beta):
    _, travel, drift = walk(0.0, 1.0, 400, betas=(beta, 0.999), weight_decay=0.0)
    assert travel / drift == pytest.approx(1, rel=0.1)


def test_what_goes_one_way_gets_further():
    _, travel, drift = walk(1.0, 1e-12, 100, betas=(0.9, 0.999), weight_decay=0.0)
    assert travel == pytest.approx(100 * 1e-3 * SIZE**0.5, rel=1e-3)
    assert travel / drift == pytest.approx(math.sqrt(100 * 0.1 / 1.9), rel=1e-3)


def test_the_log_has_them_and_goes_on_with_them(tmp_path, data):
    options = {**ADAM, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = make(tmp_path, data, **options)
    start = {name: p.detach().clone() for name, p in whole.model.named_parameters() if p.requires_grad}
    whole.train()
    signal, noise, travel, drift = (
        last(whole, name) for name in ("gradient/signal", "gradient/noise", "lora/travel", "lora/drift")
    )
    assert len(signal) == len(noise) == 3 and len(travel) == len(drift) == 4
    norms = last(whole, "grad_norm")[1:]
    assert [s + n for s, n in zip(signal, noise, strict=True)] == pytest.approx(
        [min(norm, 1.0) ** 2 for norm in norms], rel=1e-4
    )
    moved = sum((p - start[name]).square().sum() for name, p in whole.model.named_parameters() if name in start)
    assert travel[-1] == pytest.approx(float(moved) ** 0.5, rel=1e-5) and drift == sorted(drift)

    resumed = make(tmp_path / "again", data, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert history(resumed, 2) == history(whole, 2)


def test_what_cannot_be_measured_is_left_out(tmp_path, data):
    """SGD keeps no mean; a second update on a rollout shares its noise; a whole transformer's start is not kept."""
    sgd = make(tmp_path, data, max_steps=2)
    sgd.train()
    assert len(last(sgd, "lora/travel")) == 2 and not any(last(sgd, n) for n in ("gradient/signal", "lora/drift"))
    twice = make(tmp_path, data, peft=None, num_iterations=2, **{**ADAM, "max_steps": 4, "learning_rate": 1e-5})
    twice.train()
    assert [row["step"] for row in twice.state.log_history if "gradient/signal" in row] == [3]
    assert not last(twice, "lora/travel")
