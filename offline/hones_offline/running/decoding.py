"""Rows that greedy decoding goes on with: from their KV caches, or run whole again for each token.

A KV cache is cut, moved and shared by its columns, one for each token. Layers that keep a state of all tokens before
(linear attention, state-space mixers, convolutions) have no columns; their rows are run from the start instead.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from hones_offline.running.batching import Batch, Segment
from hones_offline.running.cache import KVCache, cache_bytes, new_cache
from hones_offline.running.hooks import Head

if TYPE_CHECKING:
    from hones_offline.running.decoder import TextDecoder


@dataclass
class CachedRows:
    """Rows with their KV cache, mask [B, cached], and positions [axes, B, 1] of the last cached token."""

    cache: KVCache
    mask: Tensor
    positions: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of the KV cache."""
        return cache_bytes(self.cache)

    def select(self, kept: Tensor) -> None:
        """Keep these rows only."""
        self.cache.batch_select_indices(kept)
        self.mask, self.positions = self.mask[kept], self.positions[:, kept]

    def next_hidden(self, decoder: "TextDecoder", tokens: Tensor) -> Tensor:
        """Run one more token of each row, [B]: hidden states after the final norm at it, [B, hidden]."""
        self.mask, self.positions = F.pad(self.mask, (0, 1), value=1), self.positions + 1
        embeds, more = decoder.of_text(tokens[:, None])
        hidden, self.cache = decoder.run(Batch(embeds, self.mask, self.positions, more=more), self.cache)
        return hidden[:, -1]

    @staticmethod
    def joined(several: Sequence["CachedRows"]) -> "CachedRows":
        """The rows of all in one batch, padded on the left."""
        length = max(rows.mask.shape[1] for rows in several)
        cache = new_cache()
        for index, layers in enumerate(zip(*(rows.cache.layers for rows in several), strict=True)):
            keys, values = (
                torch.cat([F.pad(x, (0, 0, length - x.shape[2], 0)) for x in tensors])  # [rows, kv heads, T, head_dim]
                for tensors in ([layer.keys for layer in layers], [layer.values for layer in layers])
            )
            cache.update(keys, values, index)
        masks = [F.pad(rows.mask, (length - rows.mask.shape[1], 0)) for rows in several]
        return CachedRows(cache, torch.cat(masks), torch.cat([rows.positions for rows in several], dim=1))


@dataclass
class WholeRows:
    """Rows as the segments of all tokens that were run."""

    segments: list[Segment]

    @property
    def nbytes(self) -> int:
        """Bytes of the embeddings, and of what belongs to the tokens besides."""
        tensors = [x for segment in self.segments for x in (segment.embeds, *segment.more.values())]
        return sum(x.nbytes for x in tensors)

    def select(self, kept: Tensor) -> None:
        """Keep these rows only."""
        self.segments = [self.segments[row] for row in kept.tolist()]

    def next_hidden(self, decoder: "TextDecoder", tokens: Tensor) -> Tensor:
        """Run the rows with one more token each, [B]: hidden states after the final norm at it, [B, hidden]."""
        self.segments = [
            segment + decoder.continuation(segment, token[None])
            for segment, token in zip(self.segments, tokens.cpu(), strict=True)
        ]
        return decoder.last_hidden(self.segments)


@dataclass
class DecodeState:
    """The state of a greedy decode after its first token.

    The rows, tokens [B] to be run next, how many tokens each row may get (that one included), and the head that is
    replaced in each row, if any are.
    """

    rows: CachedRows | WholeRows
    tokens: Tensor
    budgets: Sequence[int]
    heads: Sequence[Head] = ()

    @staticmethod
    def joined(states: Sequence["DecodeState"]) -> "DecodeState":
        """The rows of all states in one batch."""
        cached = [state.rows for state in states if isinstance(state.rows, CachedRows)]
        whole = [segment for state in states if isinstance(state.rows, WholeRows) for segment in state.rows.segments]
        return DecodeState(
            WholeRows(whole) if whole else CachedRows.joined(cached),
            torch.cat([state.tokens for state in states]),
            [budget for state in states for budget in state.budgets],
            [head for state in states for head in state.heads],
        )
