"""Kontext-tiny: a real, small FLUX.1-Kontext editor that ships with the package, and the recipe that made it.

64×64 pixels, 2.9 M parameters in the transformer, trained by `rcgrpo.tiny.recipe` on CompBench-mini. The folder is a
plain diffusers one: `FluxKontextPipeline.from_pretrained(rcgrpo.tiny.WEIGHTS)` opens it. It knows the 24 objects and
the instructions of that set and nothing else.
"""

from pathlib import Path

WEIGHTS = Path(__file__).parent / "weights"
"""The diffusers folder."""

LONG_RUN = Path(__file__).parent / "long_run"
"""A LoRA for it: what 2,800 updates of `recipes/tiny-long.yaml` taught, 0.7 MB."""

LORAS = {"kontext-tiny-long": LONG_RUN}
"""What commands call the LoRAs that ship with the package."""

RESOLUTION = 64
"""Side of the pictures that it was trained on, in pixels."""

CALL = {
    "height": RESOLUTION,
    "width": RESOLUTION,
    "max_area": RESOLUTION**2,
    "_auto_resize": False,
    "max_sequence_length": 20,
    "num_inference_steps": 8,
}
"""Arguments that a call of the stock pipeline needs at this size."""

__all__ = ["CALL", "LONG_RUN", "LORAS", "RESOLUTION", "WEIGHTS"]
