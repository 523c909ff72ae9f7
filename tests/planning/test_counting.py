"""`counting.py`: bytes that live and FLOP, on tensors whose sizes can be added up by hand."""

import pytest
import torch
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from rcgrpo.planning.counting import Counter, without_contents

KIB = 1024


def test_temporaries_count_while_they_live_and_what_was_there_does_not():
    with without_contents():
        there = torch.zeros(256)  # a KiB
        with (counter := Counter([there])):
            kept = there * 2
            (kept + 1) * 3
            there.view(16, 16).t()
            assert (counter.live, counter.peaks) == (KIB, {"": 3 * KIB})
            counter.label = "then"
            del kept
            assert counter.live == 0
            small = torch.zeros(1)
            assert (counter.live, counter.peaks["then"], small.numel()) == (512, 512, 1)


@pytest.mark.parametrize(("again", "flop"), [(False, 3), (True, 4)])
def test_what_autograd_keeps_and_checkpointing_makes_again(again, flop):
    """Tensors of a KiB, through a trained matrix."""
    with without_contents():
        x, weight = torch.zeros(16, 16), torch.zeros(16, 16, requires_grad=True)
        weight.grad = torch.zeros(16, 16)

        def block(value):
            return (value @ weight).relu().sin().exp()

        with (counter := Counter([x, weight, weight.grad])):
            y = checkpoint(block, x + 0, use_reentrant=False) if again else block(x + 0)
            kept = counter.live
            y.sum().backward()
        assert kept == (2 if again else 3) * KIB  # its input and result, and what relu made, which sin keeps too
        # Forward, once more, and the gradient of the weight; x has none.
        assert counter.flop == (flop - 1) * 2 * 16**3


def test_questions_about_values_are_answered_by_1_and_norms_are_as_on_cuda():
    norm = functional.layer_norm
    with without_contents(), Counter(), torch.autocast("cpu", torch.bfloat16):
        assert bool(torch.ones(3, dtype=torch.bool).all()) is True
        x = torch.zeros(2, 8, dtype=torch.bfloat16)
        assert functional.layer_norm(x, (8,)).dtype == functional.rms_norm(x, (8,)).dtype == torch.float32
    assert functional.layer_norm is norm


def test_attention_counts_its_flop_forward_and_backward():
    """Two matrix products forward; five backward, as flash attention makes one again."""
    with without_contents():
        q, k, v = (torch.zeros(1, 2, 64, 16, requires_grad=True) for _ in range(3))
        with (counter := Counter([q, k, v])):
            out = functional.scaled_dot_product_attention(q, k, v)
            assert counter.flop == 2 * (2 * 2 * 64 * 64 * 16)
            out.sum().backward()
        assert counter.flop == 7 * (2 * 2 * 64 * 64 * 16)
