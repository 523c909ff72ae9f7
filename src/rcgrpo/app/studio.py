"""What the page's tabs share: the editor and how it draws, its LoRAs, its examples, and who asked to stop."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image

from ..data import compbench_mini
from ..data.wordings import KINDS, PLACES, THINGS, WORDINGS, known, plain, unknown
from ..editors import RegionDecoupledFluxKontextPipeline
from ..editors.sizes import own_resolution
from ..evaluation.benchmark import Sampling
from .loras import LoraSlot
from .working import Stops

NUM_EXAMPLES, EXAMPLE_SIDE = 6, 256

Explain = Callable[[int, str], Path]
"""Row and LoRA, or none, to a folder with `update.png` and `update.md`."""


@dataclass
class Studio:
    """One editor behind a page.

    Args:
        pipeline: the base, on its device, without LoRAs.
        sampling: how to draw; the page sets the seed.
        loras: offered for choice; others can be typed.
        embedded: it is the embedded editor, whose words are known.
        explain: makes the picture of one update, where that can be had.
    """

    pipeline: RegionDecoupledFluxKontextPipeline
    sampling: Sampling
    loras: Sequence[str] = ()
    embedded: bool = False
    explain: Explain | None = None
    stops: Stops = field(default_factory=Stops)

    @cached_property
    def slot(self) -> LoraSlot:
        """The LoRAs that are loaded now."""
        return LoraSlot(self.pipeline)

    @cached_property
    def examples(self) -> list[dict[str, Any]]:
        """Rows of CompBench-mini's held-out split."""
        return self.rows(NUM_EXAMPLES)

    def rows(self, count: int) -> list[dict[str, Any]]:
        """So many, always the same ones."""
        return list(compbench_mini("test", count, EXAMPLE_SIDE))

    def read(self, instruction: str | None, *loras: str) -> str:
        """An instruction as the editor reads it.

        Raises:
            ValueError: the embedded editor alone does not know it; with what it does know. A LoRA may have learnt
                others, so with one a warning is shown.
        """
        if not self.embedded or not (instruction or "").strip():
            return (instruction or "").strip()
        text = plain(instruction or "")
        if not known(text):
            if not any(loras):
                raise ValueError(unknown(text))
            import gradio as gr

            gr.Warning(f"The base does not know {text!r}; the LoRA may. What it knows stands below the instruction.")
        return text

    def drawing(self, seed: float | None, own_size_of: Image.Image | None = None) -> Sampling:
        """How to draw with this seed, and at a picture's own number of pixels if one is given."""
        sampling = replace(self.sampling, seed=int(seed or 0))
        if own_size_of is None:
            return sampling
        return replace(sampling, resolution=own_resolution(*own_size_of.size))


def vocabulary() -> str:
    """What the embedded editor knows, as Markdown."""
    lines = ["| instruction | such as |", "|---|---|", *(f"| {w} | *{example}* |" for w, example in WORDINGS.items())]
    return "\n".join(
        [
            *lines,
            "",
            'Two things are added or removed when joined by "and".',
            "",
            f"**THING** {', '.join(THINGS)}",
            "",
            f"**PLACE** {', '.join(PLACES)} · **KIND** {', '.join(KINDS)}",
        ]
    )
