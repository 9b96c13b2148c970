"""Keys and values of a batch that is sampled from, with room for the tokens to come."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer

ROOM = 64
"""Further tokens that there is room for before keys and values have to be copied."""


class RoomyLayer(DynamicLayer):
    """One layer's keys and values, which most further tokens are written into without a copy.

    They are as narrow as autocast would make them in each step.
    """

    def __init__(self, rows: int, length: int) -> None:
        """Of so many rows: `length` tokens, which `put` fills in, and room for more."""
        super().__init__()
        self.rows = rows
        self.length = length

    def put(self, layer: DynamicLayer, tokens: Tensor, rows: Tensor, columns: Tensor) -> None:
        """Take states from packed sequences: those of token i of them to rows[i], columns[i].

        Args:
            layer: of a cache that saw the packed sequences, [1, heads, N, head].
            tokens, rows, columns: int64 [M].
        """
        if not self.is_initialized:
            self.lazy_initialization(layer.keys, layer.values)
        for room, states in ((self._all_keys, layer.keys), (self._all_values, layer.values)):
            moved = states[0].transpose(0, 1)[tokens].to(room.dtype)
            room.transpose(1, 2)[rows, columns] = moved
        self._show()

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make room for states like these."""
        self.dtype, self.device = key_states.dtype, key_states.device
        # Zeros, for what stands on padding has no weight, and 0 * NaN is NaN.
        self._all_keys, self._all_values = (
            states.new_zeros(
                self.rows, states.shape[1], self.length + ROOM, states.shape[3],
                dtype=_width(states),
            )
            for states in (key_states, value_states)
        )  # fmt: skip
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Add tokens, [B, heads, T, head], and return all there are."""
        place = slice(self.length, self.length + key_states.shape[2])
        if place.stop > self._all_keys.shape[2]:
            self._all_keys, self._all_values = map(_with_room, (self.keys, self.values))
        self._all_keys[:, :, place] = key_states
        self._all_values[:, :, place] = value_states
        self.length = place.stop
        self._show()
        return self.keys, self.values

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep these rows, int64 [B]."""
        self._all_keys = _with_room(self.keys.index_select(0, beam_idx))
        self._all_values = _with_room(self.values.index_select(0, beam_idx))
        self._show()

    def _show(self) -> None:
        self.keys = self._all_keys[:, :, : self.length]
        self.values = self._all_values[:, :, : self.length]


def _with_room(states: Tensor) -> Tensor:
    """The same [B, heads, T, head] with zeros for more tokens."""
    return nn.functional.pad(states, (0, 0, 0, ROOM))


def _width(states: Tensor) -> torch.dtype:
    device = states.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else states.dtype
