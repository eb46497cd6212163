"""A KV cache to which tokens are added without copying those before them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

_ROOM = 8  # tokens; more is copied in vain when rows leave, less means copying all more often


class _RoomyLayer(DynamicLayer):
    """A layer's keys and values [rows, kv heads, T, head_dim], with room behind them once a second forward adds some.

    `DynamicLayer` copies all of them for every token.
    """

    _rooms: tuple[Tensor, ...] = ()

    keys: Tensor
    values: Tensor

    def update(self, key_states: Tensor, value_states: Tensor, *_args: Any, **_kwargs: Any) -> tuple[Tensor, Tensor]:
        keys, values = key_states, value_states
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
            self.keys, self.values = keys, values
            return keys, values
        length = self.keys.shape[2]
        total = length + keys.shape[2]
        if not self._rooms or self._rooms[0].shape[2] < total:
            self._rooms = tuple(_roomy(x, total + _ROOM) for x in (self.keys, self.values))
        for room, new in zip(self._rooms, (keys, values), strict=True):
            room[:, :, length:total] = new
        self.keys, self.values = (room[:, :, :total] for room in self._rooms)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        if not self._rooms:
            super().batch_select_indices(indices)
            return
        length = self.keys.shape[2]
        self._rooms = tuple(room[indices] for room in self._rooms)
        self.keys, self.values = (room[:, :, :length] for room in self._rooms)


def _roomy(x: Tensor, length: int) -> Tensor:
    room = x.new_empty(*x.shape[:2], length, x.shape[3])
    room[:, :, : x.shape[2]] = x
    return room


def new_cache() -> Cache:
    """An empty one."""
    return Cache(layer_class_to_replicate=_RoomyLayer)


def nbytes(cache: Any) -> int:
    """What its keys and values take."""
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def ending_together(layers: Sequence[tuple[Any, Tensor]], lengths: Tensor) -> tuple[Cache, Tensor]:
    """Rows of a cache, moved so that all end in the last column, and their mask [rows, T], 0 before they begin.

    `layers` holds each layer and which of its rows are taken; of these count the first `lengths` [rows] columns.
    """
    longest = int(lengths.max())
    columns = torch.arange(longest) - (longest - lengths)[:, None]  # [rows, longest]
    real, columns = columns >= 0, columns.clamp(min=0)

    def moved(x: Tensor, rows: Tensor) -> Tensor:  # keys or values [rows, kv heads, T, head_dim]
        if bool(real.all()):
            return x[rows, :, :longest]
        return x[rows[:, None], :, columns].transpose(1, 2)

    cache = new_cache()
    for index, (layer, rows) in enumerate(layers):
        cache.update(moved(layer.keys, rows), moved(layer.values, rows), index)
    return cache, real.long()
