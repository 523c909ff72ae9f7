"""How noisy a gradient is: its signal, and its noise within and between edits, from inner products of single groups.

Each of several edits has gradients of several groups, from other noise each. Only their inner products are needed, so
nothing here depends on how many parameters there are, and parts (a region's tokens, a kind of layer) that add up to the
whole have inner products that do so too, where they are parts of the parameters.

    g_er = μ + a_e + b_er       E|a|² = between, E|b|² = within, and |μ|² is the signal

Gotcha: all three are unbiased, so a signal of nothing is as often below 0 as above.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Noise(NamedTuple):
    """`signal`: the unbiased |mean|²; `within`, `between`: variances, the sum over parameters, of a single group."""

    signal: float
    within: float
    between: float

    @property
    def variance(self) -> float:
        """Of a single group's gradient."""
        return self.within + self.between

    @property
    def groups(self) -> float:
        """Groups for one standard deviation of signal; infinite where none was found."""
        return self.variance / self.signal if self.signal > 0 else float("inf")


def gram_of(gradients: Tensor) -> Tensor:
    """Inner products `[edits, draws, edits, draws]`, fp64, of gradients `[edits, draws, parameters]`."""
    flat, shape = gradients.flatten(0, 1), gradients.shape[:2]
    return (flat @ flat.T).double().unflatten(0, shape).unflatten(-1, shape)


def noise_of(gram: Tensor) -> Noise:
    """Signal and noise of gradients from their inner products.

    Args:
        gram: `[edits, draws, edits, draws]`, of at least two edits and two draws each.

    Raises:
        ValueError: there are fewer.
    """
    edits, draws = gram.shape[:2]
    if edits < 2 or draws < 2:
        raise ValueError(f"gram: got {edits} edits × {draws} draws, expected at least 2 of each to tell them apart")
    own = torch.einsum("erer->er", gram).sum(1)
    same = torch.einsum("eres->e", gram)  # |Σ_r g|² of each edit
    within = float(((own - same / draws) / (draws - 1)).mean())
    means, grand = same / draws**2, float(gram.sum()) / (edits * draws) ** 2
    spread = float((means.sum() - edits * grand) / (edits - 1))  # of the edits' means
    return Noise(grand - spread / edits, within, spread - within / draws)


def interval(gram: Tensor, resamples: int = 2000) -> tuple[float, float]:
    """95 % of |mean|² over a group's variance, by bootstrap over edits; a pair of copies is no pair of edits."""
    generator, edits = torch.Generator().manual_seed(0), len(gram)
    draws, variance, found = gram.shape[1], noise_of(gram).variance, []
    if not variance:
        return 0.0, 0.0
    off = gram.sum((1, 3))
    off.fill_diagonal_(0)  # products of different edits alone
    for _ in range(resamples):
        count = torch.bincount(torch.randint(edits, (edits,), generator=generator), minlength=edits).double()
        pairs = count.outer(count)
        pairs.fill_diagonal_(0)
        found.append(float((pairs * off).sum() / pairs.sum() / draws**2 / variance))
    low, high = torch.tensor(found).nanquantile(torch.tensor([0.025, 0.975])).tolist()  # NaN: one edit, over and over
    return low, high
