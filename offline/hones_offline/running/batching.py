"""Encoded prompts as batches for a text decoder: padded to one length, and what they begin with run once.

Segments of similar length share a batch (`batches`, `in_batches`). A `PrefixBatch` holds segments that may begin alike:
the prefix that they share runs once, as a row of its own, and the rests go on from copies of its KV cache.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache

from hones_offline.running.cache import KVCache, new_cache

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Segment:
    """A run of tokens ready for the decoder: embeds [T, hidden], position ids [axes, T] (one axis but for M-RoPE).

    `more` has whatever else the decoder is given for each token, [T, ...] by name (`inputs.py`); what a segment has no
    value of is 0 for its tokens. Names that begin with `AHEAD` say how many tokens farther a token sees, [T].
    """

    embeds: Tensor
    positions: Tensor
    more: Mapping[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return self.embeds.shape[0]

    def __add__(self, following: "Segment") -> "Segment":
        return Segment(
            torch.cat([self.embeds, following.embeds]),
            torch.cat([self.positions, following.positions], dim=1),
            {name: torch.cat(both) for name, both in _filled([self, following]).items()},
        )

    def split(self, at: int) -> tuple["Segment", "Segment"]:
        """The first `at` tokens and the rest."""
        return (
            Segment(self.embeds[:at], self.positions[:, :at], {name: x[:at] for name, x in self.more.items()}),
            Segment(self.embeds[at:], self.positions[:, at:], {name: x[at:] for name, x in self.more.items()}),
        )

    def closed(self, at: int) -> int:
        """The largest number of tokens, at most `at`, of which none sees a token after them."""
        last = torch.arange(len(self))
        for name, ahead in self.more.items():
            if name.startswith(AHEAD):
                last = torch.maximum(last, torch.arange(len(self)) + ahead)
        farthest = last.cummax(0).values if len(self) else last  # that the tokens up to each one see
        ends = (farthest[:at] == torch.arange(at)).nonzero().flatten()
        return int(ends[-1]) + 1 if len(ends) else 0


AHEAD = "ahead in "
"""Beginning of the names of what says how many tokens farther than itself a token sees; a mask's name follows."""


def _filled(segments: Sequence[Segment]) -> dict[str, list[Tensor]]:
    """Collect what the segments have by name, [T, ...] of each: zeros for a segment that has none."""
    examples = {name: x for segment in segments for name, x in segment.more.items()}
    return {
        name: [segment.more.get(name, x.new_zeros(len(segment), *x.shape[1:])) for segment in segments]
        for name, x in examples.items()
    }


@dataclass(frozen=True)
class Batch:
    """Padded segments: embeds [B, T, hidden], mask [B, T] (1 = token), positions [axes, B, T].

    `wanted` [B, n] are the columns whose hidden states will be read, or None for all; `more` is what the segments have
    by name, [B, T, ...].
    """

    embeds: Tensor
    mask: Tensor
    positions: Tensor
    wanted: Tensor | None = None
    more: Mapping[str, Tensor] = field(default_factory=dict)

    def repeat(self, copies: int) -> "Batch":
        """Copies of the rows, copy after copy."""
        return Batch(
            self.embeds.repeat(copies, 1, 1),
            self.mask.repeat(copies, 1),
            self.positions.repeat(1, copies, 1),
            None if self.wanted is None else self.wanted.repeat(copies, 1),
            {name: x.repeat(copies, *[1] * (x.dim() - 1)) for name, x in self.more.items()},
        )


Run = Callable[[Batch, KVCache | None], tuple[Tensor, KVCache | None]]
"""A forward of a batch with a KV cache, or None for none: hidden states [rows, T, hidden], and the cache, grown.

Rows are the batch's, or several copies of them, copy after copy.
"""


def collate(segments: Sequence[Segment], device: torch.device, side: Literal["left", "right"] = "left") -> Batch:
    """Pad segments to one length on `side`."""
    length = max(map(len, segments))

    def pad(x: Tensor) -> Tensor:  # along its first dimension
        missing = length - x.shape[0]
        before, after = (missing, 0) if side == "left" else (0, missing)
        return F.pad(x, (0, 0) * (x.dim() - 1) + (before, after))

    return Batch(
        torch.stack([pad(s.embeds) for s in segments]).to(device),
        torch.stack([pad(torch.ones(len(s), dtype=torch.long)) for s in segments]).to(device),
        torch.stack([pad(s.positions.T) for s in segments]).permute(2, 0, 1).to(device),
        more={name: torch.stack([pad(x) for x in rows]).to(device) for name, rows in _filled(segments).items()},
    )


class PrefixBatch:
    """Segments to run in one batch, padded on the right; the prefix that they share runs once, as a row of its own.

    Columns are counted from the end of the prefix: `ends` [B] holds the number of each segment's tokens after it. Like
    every index here it is on the CPU, because hidden states and caches may be on any device.
    """

    def __init__(
        self, segments: Sequence[Segment], tail: Sequence[int], device: torch.device, shared: int | None = None
    ) -> None:
        """Prepare segments of which the hidden states of the last `tail[i]` tokens will be read.

        These tokens are not part of the prefix. `shared` is the prefix's length where that is known, as for one of
        several batches whose segments all share it.
        """
        self.shared = shared_length(segments, tail) if shared is None else shared
        rest = [segment.split(self.shared)[1] for segment in segments]
        self.ends = torch.tensor([len(segment) for segment in rest])
        wanted = (self.ends - max(tail)).clamp(min=0)[:, None] + torch.arange(max(tail))
        self.rest = replace(collate(rest, device, side="right"), wanted=wanted)
        self.prefix: Batch | None = None
        if self.shared:
            prefix = collate([segments[0].split(self.shared)[0]], device)
            self.prefix = replace(prefix, wanted=wanted[:1, :0])
            self.rest = replace(self.rest, mask=torch.cat([prefix.mask.expand(len(rest), -1), self.rest.mask], dim=1))

    def __len__(self) -> int:
        return len(self.ends)

    @property
    def length(self) -> int:
        """Tokens of a row, prefix and padding included."""
        return self.rest.mask.shape[1]

    @property
    def token_count(self) -> int:
        """Tokens that are run, padding included."""
        return self.shared + self.rest.embeds.shape[0] * self.rest.embeds.shape[1]

    def copies_at_once(self, *, batch_size: int, cache_tokens: int) -> int:
        """How many copies of the rows make one forward: as many tokens as `batch_size` of these rows have alone.

        The prefix is one row of a copy, so there may be many; where there is one, the KV cache of all rows holds at
        most `cache_tokens` tokens.
        """
        copies = batch_size * self.length // self.token_count
        if self.prefix:
            copies = min(copies, cache_tokens // (len(self) * self.length))
        return max(1, copies)

    def run(self, run: Run, *, keep: bool = False) -> tuple[Tensor, KVCache | None]:
        """Hidden states after the prefix, [copies·B, T, hidden], copy after copy, and the KV cache if `keep`.

        Only those of each segment's tail are valid.
        """
        return self.run_rest(run, self.run_prefix(run), keep=keep)

    def run_prefix(self, run: Run) -> KVCache | None:
        """Run the prefix: its KV cache, one row for each copy, for all batches that share it; None without a prefix."""
        # Tokens are added to copies of it once, so it needs no room for more.
        return run(self.prefix, DynamicCache())[1] if self.prefix else None

    def run_rest(self, run: Run, prefix_cache: KVCache | None, *, keep: bool = False) -> tuple[Tensor, KVCache | None]:
        """Run what follows the prefix, from its cache on; the result is that of `run`."""
        cache: KVCache | None = new_cache() if keep else None
        if prefix_cache is not None:
            copies = prefix_cache.layers[-1].keys.shape[0]
            cache = selected_rows(prefix_cache, torch.arange(copies).repeat_interleave(len(self)))
        return run(self.rest, cache)


def selected_rows(cache: KVCache, rows: Tensor) -> KVCache:
    """A new KV cache with these rows of `cache`."""
    branch = copy.copy(cache)
    branch.layers = [copy.copy(layer) for layer in cache.layers]
    branch.batch_select_indices(rows)
    return branch


def shared_length(segments: Sequence[Segment], tail: Sequence[int]) -> int:
    """How many tokens all segments begin with alike, their last `tail[i]` tokens aside; 0 if sharing does not pay."""
    most = min(len(segment) - tokens for segment, tokens in zip(segments, tail, strict=True))
    if len(segments) < 2 or most < _WORTH_SHARING:
        return 0
    first = segments[0]
    same = torch.ones(most, dtype=torch.bool)
    for segment in segments[1:]:
        same &= (segment.embeds[:most] == first.embeds[:most]).all(-1)
        same &= (segment.positions[:, :most] == first.positions[:, :most]).all(0)
        for one, other in _filled([first, segment]).values():
            same &= (one[:most] == other[:most]).flatten(1).all(-1) if one.dim() > 1 else one[:most] == other[:most]
    shared = first.closed(int(same.cumprod(0).sum()))
    return shared if shared >= _WORTH_SHARING else 0


_WORTH_SHARING = 16  # tokens; for fewer a forward of their own costs more than it saves


def batches(lengths: Sequence[int], rows: int) -> Iterator[list[int]]:
    """Indices in batches of at most `rows`, of similar length (less padding); the same for the same lengths."""
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    for start in range(0, len(order), rows):
        yield order[start : start + rows]


def in_batches(
    items: Sequence[T], length: Callable[[T], int], rows: int, run: Callable[[list[T]], Sequence[R]]
) -> list[R]:
    """`run` on batches of similar length; results in the order of `items`."""
    results: dict[int, R] = {}
    for chosen in batches([length(item) for item in items], rows):
        results.update(zip(chosen, run([items[i] for i in chosen]), strict=True))
    return [results[i] for i in range(len(items))]


def gib(memory_gb: float) -> int:
    """Bytes in so many GiB."""
    return int(memory_gb * 2**30)
