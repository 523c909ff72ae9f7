"""GPUs: how much they hold, and how fast they can be at most."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Card:
    """A GPU: its name, bytes of memory, FLOP a second in bf16 (dense, with tensor cores) if known."""

    name: str
    bytes: float
    flops: float | None


CARDS = {
    "24gb": Card("RTX 4090, 24 GB", 24e9, 165e12),
    "48gb": Card("L40S, 48 GB", 48e9, 362e12),
    "80gb": Card("H100 SXM, 80 GB", 80e9, 989e12),
    "141gb": Card("H200, 141 GB", 141e9, 989e12),
}
"""By size, with the makers' figures. Cards hold a few per cent more; that is left to CUDA and fragmentation."""

_OTHERS = {"A100": 312e12, "A10G": 70e12, "A6000": 155e12, "B200": 2250e12, "H800": 989e12}


def card_here() -> Card | None:
    """The GPU of this machine, if there is one."""
    import torch

    if not torch.cuda.is_available():
        return None
    found = torch.cuda.get_device_properties(0)
    known = {
        card.name.partition(",")[0].split()[-1 if "RTX" in card.name else 0]: card.flops for card in CARDS.values()
    }
    flops = next((value for name, value in {**known, **_OTHERS}.items() if name in found.name), None)
    return Card(f"{found.name}, {found.total_memory / 1e9:.0f} GB", float(found.total_memory), flops)
