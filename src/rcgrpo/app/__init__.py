"""`rcgrpo app`: paint a region, edit it with and without a LoRA, compare two LoRAs, look at a training run.

Know no page: `comparing` makes the pictures and the numbers, `drawing` turns them into what is shown, `painting` and
`loras` read what a visitor hands in, `packing` packs what is taken home, `runs` reads a run's folder. Are the page:
`page` with a module for each tab, `studio` with what tabs share, `working` with progress, cancelling and errors.
"""

from .comparing import Comparison, OnStep, Outcome, changes_outside, compare
from .drawing import CHANGE_FULL_COLOUR, SHOWN_SIDE, Captioned, Drawing, draw, framed, table
from .loras import LoraSlot
from .packing import pack
from .page import CSS, create_app, serve
from .painting import PAINT, PAINT_OPACITY, brush_radius, painting_of, read_painting
from .runs import Candidates, Run, read_run
from .studio import EXAMPLE_SIDE, NUM_EXAMPLES

__all__ = [
    "CHANGE_FULL_COLOUR",
    "CSS",
    "EXAMPLE_SIDE",
    "NUM_EXAMPLES",
    "PAINT",
    "PAINT_OPACITY",
    "SHOWN_SIDE",
    "Candidates",
    "Captioned",
    "Comparison",
    "Drawing",
    "LoraSlot",
    "OnStep",
    "Outcome",
    "Run",
    "brush_radius",
    "changes_outside",
    "compare",
    "create_app",
    "draw",
    "framed",
    "pack",
    "painting_of",
    "read_painting",
    "read_run",
    "serve",
    "table",
]
