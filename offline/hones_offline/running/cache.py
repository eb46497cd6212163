"""A KV cache that grows token by token without copying the tokens before."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

KVCache = Any
"""A `Cache` of transformers, whose type says that its layers' keys and values may be missing. Here they never are."""

_SPARE_TOKENS = 8  # with more, more is copied in vain when rows leave; with fewer, all of it is copied more often


class _PreallocatedLayer(DynamicLayer):
    """A layer's keys and values [rows, kv heads, T, head_dim], views of buffers that hold a few more tokens.

    `DynamicLayer` copies all of them for every token. The buffers are made when a second forward adds tokens.
    """

    _buffers: tuple[Tensor, ...] = ()

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
        if not self._buffers or self._buffers[0].shape[2] < total:
            self._buffers = tuple(_enlarged(x, total + _SPARE_TOKENS) for x in (self.keys, self.values))
        for buffer, new in zip(self._buffers, (keys, values), strict=True):
            buffer[:, :, length:total] = new
        self.keys, self.values = (buffer[:, :, :total] for buffer in self._buffers)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        if not self._buffers:
            super().batch_select_indices(indices)
            return
        length = self.keys.shape[2]
        self._buffers = tuple(buffer[indices] for buffer in self._buffers)
        self.keys, self.values = (buffer[:, :, :length] for buffer in self._buffers)


def _enlarged(x: Tensor, length: int) -> Tensor:
    """A copy of keys or values that has room for `length` tokens."""
    buffer = x.new_empty(*x.shape[:2], length, x.shape[3])
    buffer[:, :, : x.shape[2]] = x
    return buffer


def new_cache() -> Cache:
    """An empty cache."""
    return Cache(layer_class_to_replicate=_PreallocatedLayer)


def cache_bytes(cache: KVCache) -> int:
    """Bytes of all keys and values."""
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def right_aligned(layers: Sequence[tuple[KVCache, Tensor]], lengths: Tensor) -> tuple[Cache, Tensor]:
    """Rows of a cache that begin in its first column, moved so that all end in the last one.

    `layers` holds, for each layer of the new cache, a layer and which of its rows to take; row r of the result has the
    first `lengths[r]` columns of its row. Returns the cache and its mask [rows, T], 0 before a row begins.
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
