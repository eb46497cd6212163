"""Running a model's text decoder on prompts whose images are already encoded.

A prompt is encoded once (`prompts.py`): its input embeddings and position ids are what the model hands to its text
decoder. From there on the decoder alone is run, batched, with its own KV cache: greedy generation, Yes−No margins of
candidates that share a prefix, log-probabilities of answers, FFN activations.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache

from hones_offline.running.cache import ending_together, nbytes, new_cache
from hones_offline.running.hooks import Entering, Head, last_ffn_at, replaced_heads, resumed
from hones_steer._transformers import cache_name, returned_cache
from hones_steer.errors import LayoutError
from hones_steer.layout import Layout, find_layout

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Segment:
    """A run of tokens ready for the decoder: embeds [T, hidden], position ids [axes, T] (one axis but for M-RoPE)."""

    embeds: Tensor
    positions: Tensor

    def __len__(self) -> int:
        return self.embeds.shape[0]

    def __add__(self, other: "Segment") -> "Segment":
        return Segment(torch.cat([self.embeds, other.embeds]), torch.cat([self.positions, other.positions], dim=1))

    def split(self, at: int) -> tuple["Segment", "Segment"]:
        """The first `at` tokens and the rest."""
        return (
            Segment(self.embeds[:at], self.positions[:, :at]),
            Segment(self.embeds[at:], self.positions[:, at:]),
        )


@dataclass(frozen=True)
class Batch:
    """Padded segments: embeds [B, T, hidden], mask [B, T] (1 = token), positions [axes, B, T].

    `wanted` [B, n] are the columns whose hidden states will be read, or None for all.
    """

    embeds: Tensor
    mask: Tensor
    positions: Tensor
    wanted: Tensor | None = None


@dataclass
class Started:
    """Rows of which greedy decoding knows the first new token.

    cache, mask [B, cached], positions [axes, B, 1] of the last cached token, tokens [B], how many tokens each row may
    get (that one included), and which head is replaced in each row, if any are.
    """

    cache: Any
    mask: Tensor
    positions: Tensor
    tokens: Tensor
    budgets: Sequence[int]
    heads: Sequence[Head] = ()

    def nbytes(self) -> int:
        """Of the KV cache."""
        return nbytes(self.cache)

    @staticmethod
    def together(parts: Sequence["Started"]) -> "Started":
        """The rows of all parts in one batch, padded on the left."""
        length = max(part.mask.shape[1] for part in parts)
        cache = new_cache()
        for index, layers in enumerate(zip(*(part.cache.layers for part in parts), strict=True)):
            keys, values = (
                torch.cat([F.pad(x, (0, 0, length - x.shape[2], 0)) for x in states])  # [rows, kv heads, T, head_dim]
                for states in ([layer.keys for layer in layers], [layer.values for layer in layers])
            )
            cache.update(keys, values, index)
        return Started(
            cache,
            torch.cat([F.pad(part.mask, (length - part.mask.shape[1], 0)) for part in parts]),
            torch.cat([part.positions for part in parts], dim=1),
            torch.cat([part.tokens for part in parts]),
            [budget for part in parts for budget in part.budgets],
            [head for part in parts for head in part.heads],
        )


Run = Callable[[Batch, Any], tuple[Tensor, Any]]
"""A forward of a batch with a KV cache, None for none; may make several copies of the rows."""


class Rows:
    """Segments to run in one batch, padded on the right; a beginning that they share is run once, as a row of its own.

    `ends` [B] is the number of columns before each segment's end, the `shared` ones not counted; like every index here
    it is on the CPU, because hidden states and caches may be on any device.
    """

    def __init__(
        self, decoder: "TextDecoder", segments: Sequence[Segment], own: Sequence[int], shared: int | None = None
    ) -> None:
        """Of segment i the last `own[i]` tokens' hidden states are wanted, so these at least are not shared.

        `shared` is how many tokens are, where that is known: rows of which more are in other batches, for example.
        """
        self.decoder, self._first = decoder, segments[0]
        self.shared = shared_length(segments, own) if shared is None else shared
        rest = [segment.split(self.shared)[1] for segment in segments]
        self.ends = torch.tensor([len(segment) for segment in rest])
        wanted = (self.ends - max(own)).clamp(min=0)[:, None] + torch.arange(max(own))
        self.rest = replace(decoder.collate(rest, side="right"), wanted=wanted)
        self.prefix: Batch | None = None
        if self.shared:
            prefix = decoder.collate([segments[0].split(self.shared)[0]])
            self.prefix = replace(prefix, wanted=wanted[:1, :0])
            self.rest = replace(self.rest, mask=torch.cat([prefix.mask.expand(len(rest), -1), self.rest.mask], dim=1))

    def __len__(self) -> int:
        return len(self.ends)

    @property
    def length(self) -> int:
        """Tokens of a row, padding included."""
        return self.rest.mask.shape[1]

    @property
    def tokens(self) -> int:
        """How many tokens are run, padding included."""
        return self.shared + self.rest.embeds.shape[0] * self.rest.embeds.shape[1]

    def copies_at_once(self, *, batch_size: int, memory_gb: float) -> int:
        """How many copies of the rows make one forward: as many tokens as `batch_size` of these rows have alone.

        A beginning that they share is one row of a copy, so there may be many; their KV cache is within `memory_gb`.
        """
        copies = batch_size * self.length // self.tokens
        if self.prefix:
            copy_bytes = len(self) * self.length * self.decoder.cache_token_bytes(self._first)
            copies = min(copies, gib(memory_gb) // copy_bytes)
        return max(1, copies)

    def run(self, run: Run, *, keep: bool = False) -> tuple[Tensor, Any]:
        """Hidden states of what is not shared, [copies·B, T, hidden], copy after copy, and if asked the KV cache.

        They are right where they are wanted.
        """
        return self.go_on(run, self.begin(run), keep=keep)

    def begin(self, run: Run) -> Any:
        """Run what is shared: its KV cache, a row for each copy, or None. It serves all rows that share it."""
        # Tokens are added to copies of it once, so it needs no room for more.
        return run(self.prefix, DynamicCache())[1] if self.prefix else None

    def go_on(self, run: Run, begun: Any, *, keep: bool = False) -> tuple[Tensor, Any]:
        """Run the rest, as `run` does."""
        cache = new_cache() if keep else None
        if begun is not None:
            copies = begun.layers[-1].keys.shape[0]
            cache = _selected(begun, torch.arange(copies).repeat_interleave(len(self)))
        return run(self.rest, cache)


def gib(memory_gb: float) -> int:
    """Bytes."""
    return int(memory_gb * 2**30)


def shared_length(segments: Sequence[Segment], own: Sequence[int]) -> int:
    """How many tokens the segments begin with alike; 0 if these are not worth a forward of their own."""
    most = min(len(segment) - tokens for segment, tokens in zip(segments, own, strict=True))
    if len(segments) < 2 or most < _WORTH_SHARING:
        return 0
    first = segments[0]
    same = torch.ones(most, dtype=torch.bool)
    for other in segments[1:]:
        same &= (other.embeds[:most] == first.embeds[:most]).all(-1)
        same &= (other.positions[:, :most] == first.positions[:, :most]).all(0)
    shared = int(same.cumprod(0).sum())
    return shared if shared >= _WORTH_SHARING else 0


_WORTH_SHARING = 16  # tokens; for fewer a forward of their own costs more than it saves


class TextDecoder:
    """A model's text decoder, its embedding and its unembedding, for batches of encoded prompts."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.layout: Layout = find_layout(model)
        self.layout.require_attribution()
        self._cache_name = cache_name(self.layout.decoder.forward)
        self.embedding: nn.Module = self.model.get_input_embeddings()
        assert self.layout.unembedding is not None
        self.unembedding: nn.Module = self.layout.unembedding
        text_config = self.model.config.get_text_config()
        self._softcap: float | None = getattr(text_config, "final_logit_softcapping", None)
        self._cache_token_bytes = 0
        self.end_tokens = _end_tokens(model)

    @property
    def device(self) -> torch.device:
        """Where input embeddings live."""
        return next(self.embedding.parameters()).device

    def embed(self, ids: Tensor) -> Tensor:
        """Token ids [...] to input embeddings [..., hidden]."""
        embeds: Tensor = self.embedding(ids.to(self.device))
        return embeds

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states after the final norm [..., hidden] to float32 logits [..., vocabulary]."""
        logits: Tensor = self.unembedding(hidden.to(next(self.unembedding.parameters()).device)).float()
        return logits if self._softcap is None else torch.tanh(logits / self._softcap) * self._softcap

    def collate(self, segments: Sequence[Segment], side: Literal["left", "right"] = "left") -> Batch:
        """Pad segments to one length, on the model's device."""
        length = max(map(len, segments))

        def pad(x: Tensor) -> Tensor:  # along its first dimension
            missing = length - x.shape[0]
            before, after = (missing, 0) if side == "left" else (0, missing)
            return F.pad(x, (0, 0) * (x.dim() - 1) + (before, after))

        return Batch(
            torch.stack([pad(s.embeds) for s in segments]).to(self.device),
            torch.stack([pad(torch.ones(len(s), dtype=torch.long)) for s in segments]).to(self.device),
            torch.stack([pad(s.positions.T) for s in segments]).permute(2, 0, 1).to(self.device),
        )

    def run(self, batch: Batch, cache: Any = None) -> tuple[Tensor, Any]:
        """One decoder forward: hidden states after the final norm [B, T, hidden], and the KV cache, grown.

        With a cache that is not empty, `batch.mask` covers the cached tokens too: [B, cached + T]. Hidden states that
        are not wanted are not right: the last layer's FFN is left out there.
        """
        mask = batch.mask
        if mask.shape[1] == batch.embeds.shape[1] and not bool((mask[:, 1:] > mask[:, :-1]).any()):
            mask = torch.ones_like(mask)  # no token looks at padding that comes after it, and plain causal is faster
        positions = batch.positions[0] if batch.positions.shape[0] == 1 else batch.positions
        with last_ffn_at(self.layout, batch.wanted):
            out = self.layout.decoder(
                inputs_embeds=batch.embeds,
                attention_mask=mask,
                position_ids=positions,
                use_cache=cache is not None,
                **{self._cache_name: cache},
            )
        return out.last_hidden_state, returned_cache(out)

    def resume(self, batch: Batch, entering: Entering, heads: Sequence[Head], cache: Any = None) -> tuple[Tensor, Any]:
        """`run` with each of `heads`, all of one layer, replaced: copy after copy of the batch, [heads·B, T, hidden].

        Only the layers from theirs on are run, from what is `entering` that layer when `batch` runs undisturbed. Of
        the layers that this leaves unchanged the cache holds the length alone.
        """
        copies = len(heads)
        entering = entering.repeat(copies)
        rows = [head for head in heads for _ in range(len(batch.mask))]
        embeds = entering.hidden.to(self.device)
        wanted = None if batch.wanted is None else batch.wanted.repeat(copies, 1)
        repeated = Batch(embeds, batch.mask.repeat(copies, 1), batch.positions.repeat(1, copies, 1), wanted)
        with resumed(self.layout, entering), replaced_heads(self.layout, rows):
            hidden, cache = self.run(repeated, cache)
        if cache is not None:
            nothing = embeds.new_zeros(len(embeds), 1, embeds.shape[1], 1)
            for layer in range(entering.unchanged):  # the next forward's mask is made from the lowest layer's length
                cache.update(nothing, nothing, layer)
        return hidden, cache

    @torch.no_grad()
    def cache_token_bytes(self, prompt: Segment) -> int:
        """Bytes of the KV cache for one token of one row of any prompt, found out with this one's first."""
        if not self._cache_token_bytes:
            _, cache = self.run(self.collate([prompt.split(1)[0]]), new_cache())
            self._cache_token_bytes = nbytes(cache)
        return self._cache_token_bytes

    @torch.no_grad()
    def greedy(self, prompts: Sequence[Segment], max_new_tokens: int) -> list[list[int]]:
        """Greedy continuations of a batch of prompts: token ids up to, not including, the end token."""
        rows = Rows(self, prompts, [1] * len(prompts))
        hidden, cache = rows.run(self.run, keep=True)
        every = torch.arange(len(rows))
        first = self.logits(hidden[every, rows.ends - 1]).argmax(-1)
        cache, mask = ending_together([(layer, every) for layer in cache.layers], rows.shared + rows.ends)
        last = rows.rest.positions[:, every, rows.ends - 1]
        mask = mask.to(self.device)
        return self.continue_greedy(Started(cache, mask, last[..., None], first, [max_new_tokens] * len(prompts)))

    @torch.no_grad()
    def continue_greedy(self, started: "Started") -> list[list[int]]:
        """Go on after each row's first new token: token ids from that one up to, not including, the end token."""
        cache, mask, positions, tokens = started.cache, started.mask, started.positions, started.tokens
        texts: list[list[int]] = [[] for _ in started.budgets]
        rows = list(range(len(texts)))  # of the cache
        going = set(rows)
        while True:
            for row, token in zip(rows, tokens.tolist(), strict=True):
                if row in going and token not in self.end_tokens:
                    texts[row].append(token)
                if token in self.end_tokens or len(texts[row]) >= started.budgets[row]:
                    going.discard(row)
            if not going:
                return texts
            if 4 * len(going) <= 3 * len(rows):  # dropping rows copies the cache, so not for each that ends
                kept = torch.tensor([at for at, row in enumerate(rows) if row in going])
                cache.batch_select_indices(kept)
                mask, positions, tokens = mask[kept], positions[:, kept], tokens[kept]
                rows = [row for row in rows if row in going]
            mask, positions = F.pad(mask, (0, 1), value=1), positions + 1
            with replaced_heads(self.layout, [started.heads[row] for row in rows] if started.heads else []):
                hidden, cache = self.run(Batch(self.embed(tokens[:, None]), mask, positions), cache)
            tokens = self.logits(hidden[:, -1]).argmax(-1)

    @torch.no_grad()
    def candidate_logits(
        self, prefixes: Sequence[Segment], suffixes: Sequence[Sequence[Segment]], *, rows: int, run: Run | None = None
    ) -> list[Tensor]:
        """Next-token logits after each candidate: one [candidates, vocabulary] per prefix.

        Each prefix runs once; its candidates' suffixes continue from its KV cache, at most `rows` at a time. `run`
        stands in for `TextDecoder.run` and may return several copies of its rows, which then come one after another.
        """
        run = run or self.run
        prefix = self.collate(prefixes)
        hidden, cache = run(prefix, new_cache())
        copies = len(hidden) // len(prefixes)
        owners = torch.tensor([i for i, group in enumerate(suffixes) for _ in group])
        flat = [segment for group in suffixes for segment in group]
        pieces = []
        for start in range(0, len(flat), rows):
            owner, chosen = owners[start : start + rows], flat[start : start + rows]
            repeated = torch.cat([owner + number * len(prefixes) for number in range(copies)])
            batch = self.collate(chosen, side="right")
            mask = torch.cat([prefix.mask[owner], batch.mask], dim=1)
            hidden, _ = run(Batch(batch.embeds, mask, batch.positions), _selected(cache, repeated))
            last = torch.tensor([len(segment) - 1 for segment in chosen], device=hidden.device).repeat(copies)
            logits = self.logits(hidden[torch.arange(len(last), device=hidden.device), last])
            pieces.append(logits.unflatten(0, (copies, -1)))
        counts = [len(group) for group in suffixes]
        return [group for every in torch.cat(pieces, dim=1) for group in every.split(counts)]

    def answer_logits(self, prompts: Sequence[Segment], answers: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Teacher-forced logits at the answers' tokens: [B, N, vocabulary] and which of them are real, bool [B, N].

        Row i's tokens, ids [n_i], are predicted in the last n_i of the N columns. Differentiable: gradients flow to
        whatever scales the FFNs.
        """
        rows = [self.answered(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
        hidden, _ = self.run(self.collate(rows))
        longest = max(len(answer) for answer in answers)
        logits = self.logits(hidden[:, -longest:])
        lengths = torch.tensor([len(answer) for answer in answers], device=logits.device)
        real = torch.arange(longest, device=logits.device) >= (longest - lengths)[:, None]
        return logits, real

    def answered(self, prompt: Segment, answer: Tensor) -> Segment:
        """A prompt with the token ids [n] of an answer, each predicted at one of the last n tokens.

        The answer's own last token is not among these: nothing is predicted after it.
        """
        return prompt + self.continuation(prompt, answer[:-1])

    def continuation(self, prompt: Segment, ids: Tensor) -> Segment:
        """Text tokens [n] following `prompt` as a segment: positions go on by one on every axis."""
        steps = torch.arange(1, len(ids) + 1)
        return Segment(self.embed(ids).detach().cpu(), prompt.positions[:, -1:] + steps)


def _selected(cache: Any, rows: Tensor) -> Any:
    """A KV cache of its own with these rows of another."""
    branch = copy.copy(cache)
    branch.layers = [copy.copy(layer) for layer in cache.layers]
    branch.batch_select_indices(rows)
    return branch


def pad_answers(answers: Sequence[Tensor]) -> Tensor:
    """Answer ids as [B, N], each at the end of its row like `TextDecoder.answer_logits`' columns; zeros before."""
    longest = max(len(answer) for answer in answers)
    return torch.stack([F.pad(answer, (longest - len(answer), 0)) for answer in answers])


def batches(lengths: Sequence[int], rows: int) -> Iterator[list[int]]:
    """Indices in batches of at most `rows`, of similar length (less padding); the same for the same lengths."""
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    for start in range(0, len(order), rows):
        yield order[start : start + rows]


def in_batches(
    items: Sequence[T], length: Callable[[T], int], rows: int, run: Callable[[list[T]], Sequence[R]]
) -> list[R]:
    """`run` on batches of similar length; results in the items' own order."""
    results: dict[int, R] = {}
    for chosen in batches([length(item) for item in items], rows):
        results.update(zip(chosen, run([items[i] for i in chosen]), strict=True))
    return [results[i] for i in range(len(items))]


def _end_tokens(model: nn.Module) -> tuple[int, ...]:
    generation_config = getattr(model, "generation_config", None)
    end = getattr(generation_config, "eos_token_id", None)
    if end is None:
        raise LayoutError(
            f"{type(model).__name__} names no end token; set model.generation_config.eos_token_id to its id"
        )
    return tuple(np.atleast_1d(end).tolist())
