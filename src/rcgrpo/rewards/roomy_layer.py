"""Keys and values that grow in place, for answers of unknown length.

Where it fits: below `generation`, which imports it when it writes, as transformers takes a second to import.
"""

from typing import Any

from torch import Tensor
from torch.nn.functional import pad
from transformers.cache_utils import DynamicLayer

ROOM = 64
"""Tokens that keys and values have room for when they are copied to a larger place."""


class RoomyLayer(DynamicLayer):
    """One layer's keys and values with room ahead: new tokens are written to their place, and nothing else is moved."""

    def __init__(self, layer: DynamicLayer) -> None:
        super().__init__()
        self.lazy_initialization(layer.keys, layer.values)
        self._fill(layer.keys, layer.values)

    def _fill(self, keys: Tensor, values: Tensor) -> None:
        self._places = [pad(tensor, (0, 0, 0, ROOM)) for tensor in (keys, values)]
        self.keys, self.values = (place[..., : keys.shape[-2], :] for place in self._places)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """As `DynamicLayer.update`."""
        start, end = self.keys.shape[-2], self.keys.shape[-2] + key_states.shape[-2]
        while end > self._places[0].shape[-2]:
            self._places = [pad(place, (0, 0, 0, ROOM)) for place in self._places]
        for place, states in zip(self._places, (key_states, value_states), strict=True):
            place[..., start:end, :] = states
        self.keys, self.values = (place[..., :end, :] for place in self._places)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """As `DynamicLayer.batch_select_indices`."""
        self._fill(self.keys[indices], self.values[indices])
