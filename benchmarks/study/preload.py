"""What all cells need and none changes, done once: the processes of cells are forked from one that imported this."""

import torch

from rcgrpo.rewards import get_region_scorer

from . import cell  # noqa: F401

# Threads do not survive a fork, so none may be started here.
torch.set_num_threads(1)
get_region_scorer()._catalogue  # noqa: B018
