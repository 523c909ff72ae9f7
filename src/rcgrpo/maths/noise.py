"""Where a group's candidates start: keyed noise and the region-decoupled perturbation.

First station of a rollout. All randomness of training is drawn here, on the CPU in fp32 from a key, so that it is the
same after a resume, on another GPU and under any sharding. Works on plain tensors of any layout; the strength only has
to broadcast against the noise.
"""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


def keyed_generator(*key: object) -> torch.Generator:
    """A CPU generator that depends on nothing but the key, e.g. `(seed, step, sample id, "anchors")`."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def keyed_noise(shape: tuple[int, ...], *key: object) -> Tensor:
    """Standard normal noise of the given shape, fp32 on the CPU, drawn from the key alone."""
    return torch.randn(shape, generator=keyed_generator(*key))


def region_strength(mask: Tensor, edit_strength: float, keep_strength: float) -> Tensor:
    """Elementwise exploration strength `s = s_edit · m + s_keep · (1 - m)`.

    Args:
        mask: any shape, values in [0, 1], 1 = edit; soft values interpolate.
        edit_strength: strength inside the region, in [0, 1]. 0 repeats the base noise, 1 draws it anew.
        keep_strength: strength outside, in [0, 1]; 0 shares the background's noise bit by bit.

    Raises:
        ValueError: a strength outside [0, 1].
    """
    for name, value in (("edit_strength", edit_strength), ("keep_strength", keep_strength)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name}: got {value}, expected a strength in [0, 1]")
    return edit_strength * mask + keep_strength * (1 - mask)


def regions_strength(masks: Tensor, edit_strengths: Sequence[float], keep_strength: float) -> Tensor:
    """Elementwise strength of several regions, `s = m Σ_k s_k m_k / Σ_k m_k + s_keep (1 - m)` with `m = max_k m_k`.

    Where regions overlap, their strengths are averaged. One region gives `region_strength`.

    Args:
        masks: `[regions, ...]`, values in [0, 1].
        edit_strengths: one for each region, in [0, 1].
        keep_strength: strength outside all of them.
    """
    each = [region_strength(torch.ones(()), strength, keep_strength) for strength in edit_strengths]
    strengths = torch.stack(each).view(-1, *[1] * (masks.ndim - 1))
    inside = (strengths * masks).sum(0) / masks.sum(0).clamp(min=1e-12)
    covered = masks.amax(0)
    return inside * covered + keep_strength * (1 - covered)


def independent_members(num_generations: int, share: float, antithetic: bool = False) -> Tensor:
    """Which candidates of a group start from noise of their own everywhere, boolean `[group]`.

    They are the last ones, or, with mirrored halves, the last of each half, so that pairs stay together.
    """
    drawn = num_generations // 2 if antithetic else num_generations
    chosen = torch.arange(drawn) >= drawn - round(share * drawn)
    return chosen.repeat(num_generations // drawn)


def perturb(base: Tensor, delta: Tensor, strength: Tensor) -> Tensor:
    """Region-decoupled perturbation `ε_i = sqrt(1 - s²) ε* + s δ_i` (RC-GRPO-Editing, arXiv 2604.09386; form ours).

    Every element stays N(0, 1) whatever the strength, so nothing marks the seam; where the strength is 0 the result
    equals `base` exactly. With one strength everywhere this is Neighbor GRPO's neighbourhood (arXiv 2511.16955).

    Args:
        base: shared noise ε*, broadcastable to `delta`.
        delta: independent noise of the candidates.
        strength: s in [0, 1], broadcastable to `delta`.
    """
    return (1 - strength**2).sqrt() * base + strength * delta


def group_deltas(shape: tuple[int, ...], num_generations: int, *key: object, antithetic: bool = False) -> Tensor:
    """Independent noise of a group, `[group, *shape]`, each member from its own key.

    With `antithetic` the second half mirrors the first, `δ_{i+G/2} = -δ_i`, which needs an even group.
    """
    if antithetic and num_generations % 2:
        raise ValueError(
            f"num_generations: got {num_generations}, expected an even number because antithetic=True mirrors half of "
            "the group; change one of the two"
        )
    drawn = num_generations // 2 if antithetic else num_generations
    deltas = torch.stack([keyed_noise(shape, *key, member) for member in range(drawn)])
    return torch.cat([deltas, -deltas]) if antithetic else deltas
