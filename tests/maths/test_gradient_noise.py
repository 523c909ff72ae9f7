"""`gradient_noise.py`: signal and noise of gradients, told apart."""

import pytest
import torch

from rcgrpo.maths.gradient_noise import gram_of, interval, noise_of


def test_signal_and_both_noises_are_told_apart():
    """Known ones: |mean|² 4, 3 of variance between edits, 8 within, over 50 parameters."""
    generator = torch.Generator().manual_seed(0)
    edits, draws, size = 400, 3, 50

    def normal(*shape):
        return torch.randn(*shape, size, generator=generator, dtype=torch.float64)

    mean = torch.full((size,), (4 / size) ** 0.5, dtype=torch.float64)
    found = mean + (3 / size) ** 0.5 * normal(edits, 1) + (8 / size) ** 0.5 * normal(edits, draws)
    noise = noise_of(gram_of(found))
    assert noise.signal == pytest.approx(4, rel=0.05)
    assert noise.between == pytest.approx(3, rel=0.05) and noise.within == pytest.approx(8, rel=0.05)
    assert noise.groups == pytest.approx(11 / 4, rel=0.1)
    low, high = interval(gram_of(found), 200)
    assert low < noise.signal / 11 < high and high - low < 0.1


def test_pure_noise_has_no_signal():
    found = torch.randn(40, 2, 30, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    noise = noise_of(gram_of(found))
    low, high = interval(gram_of(found), 200)
    assert abs(noise.signal) < 0.2 * (noise.within + noise.between) / 4 and low < 0 < high
    with pytest.raises(ValueError, match="got 40 edits × 1 draws"):
        noise_of(gram_of(found[:, :1]))


def test_by_hand():
    """Two edits at (1, 0) ± (0, 1) and (3, 0) ± (0, 1)."""
    found = torch.tensor([[[1.0, 1.0], [1.0, -1.0]], [[3.0, 1.0], [3.0, -1.0]]], dtype=torch.float64)
    noise = noise_of(gram_of(found))
    assert (noise.within, noise.between, noise.signal) == (2.0, 1.0, 3.0)


def test_parts_add_up():
    """Of the parameters: the last two against the first three."""
    found = torch.randn(4, 2, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    parts = [noise_of(gram_of(found[..., some])) for some in (slice(3), slice(3, 5))]
    assert [sum(values) for values in zip(*parts, strict=True)] == pytest.approx(list(noise_of(gram_of(found))))
    assert noise_of(gram_of(torch.zeros(2, 2, 3))).groups == float("inf")
