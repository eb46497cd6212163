"""A model's text decoder, run on prompts whose images are already encoded.

A prompt is encoded once (`prompts.py`): its input embeddings and position ids are what the model hands to its text
decoder. From there on the decoder alone is run, batched, with its own KV cache: greedy generation, Yes−No margins of
candidates that share a prefix, log-probabilities of answers, FFN activations.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hones_offline.running.batching import Batch, PrefixBatch, Run, Segment, collate, selected_rows
from hones_offline.running.cache import KVCache, cache_bytes, new_cache, right_aligned
from hones_offline.running.hooks import Head
from hones_offline.running.interventions import replaced_heads
from hones_offline.running.resumption import LayerInput, last_ffn_at, resumed
from hones_steer._transformers import cache_name, returned_cache
from hones_steer.errors import LayoutError
from hones_steer.layout import Layout, find_layout


@dataclass
class DecodeState:
    """The state of a greedy decode after its first token.

    cache, mask [B, cached], positions [axes, B, 1] of the last cached token, tokens [B] to be run next, how many tokens
    each row may get (that one included), and the head that is replaced in each row, if any are.
    """

    cache: KVCache
    mask: Tensor
    positions: Tensor
    tokens: Tensor
    budgets: Sequence[int]
    heads: Sequence[Head] = ()

    @property
    def cache_bytes(self) -> int:
        """Bytes of the KV cache."""
        return cache_bytes(self.cache)

    @staticmethod
    def joined(states: Sequence["DecodeState"]) -> "DecodeState":
        """The rows of all states in one batch, padded on the left."""
        length = max(state.mask.shape[1] for state in states)
        cache = new_cache()
        for index, layers in enumerate(zip(*(state.cache.layers for state in states), strict=True)):
            keys, values = (
                torch.cat([F.pad(x, (0, 0, length - x.shape[2], 0)) for x in tensors])  # [rows, kv heads, T, head_dim]
                for tensors in ([layer.keys for layer in layers], [layer.values for layer in layers])
            )
            cache.update(keys, values, index)
        return DecodeState(
            cache,
            torch.cat([F.pad(state.mask, (length - state.mask.shape[1], 0)) for state in states]),
            torch.cat([state.positions for state in states], dim=1),
            torch.cat([state.tokens for state in states]),
            [budget for state in states for budget in state.budgets],
            [head for state in states for head in state.heads],
        )


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
        self.logit_factor = 1.0
        """What the model multiplies its logits by, one of `configured_factors`; the check of the decoder finds it."""
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

    @property
    def vocabulary(self) -> int:
        """The number of logits of a position."""
        return int(self.model.config.get_text_config().vocab_size)

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states after the final norm [..., hidden] to float32 logits [..., vocabulary]."""
        logits: Tensor = self.unembedding(hidden.to(next(self.unembedding.parameters()).device)).float()
        logits = logits if self.logit_factor == 1 else logits * self.logit_factor
        return logits if self._softcap is None else torch.tanh(logits / self._softcap) * self._softcap

    def collate(self, segments: Sequence[Segment], side: Literal["left", "right"] = "left") -> Batch:
        """Pad segments to one length on `side`, on the model's device."""
        return collate(segments, self.device, side)

    def run(self, batch: Batch, cache: KVCache | None = None) -> tuple[Tensor, KVCache | None]:
        """One decoder forward: hidden states after the final norm [B, T, hidden], and the KV cache, grown.

        With a cache that is not empty, `batch.mask` covers the cached tokens too: [B, cached + T]. Only the `wanted`
        columns are valid; elsewhere the last FFN was skipped.
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

    def resume(
        self, batch: Batch, layer_input: LayerInput, heads: Sequence[Head], cache: KVCache | None = None
    ) -> tuple[Tensor, KVCache | None]:
        """`run` with each of `heads`, all of one layer, replaced: copy after copy of the batch, [heads·B, T, hidden].

        Only the layers from theirs on are run, from what entered that layer when `batch` ran undisturbed. Of the layers
        whose keys and values this leaves unchanged the cache holds the length alone.
        """
        copies = len(heads)
        layer_input = layer_input.repeat(copies)
        head_of_row = [head for head in heads for _ in range(len(batch.mask))]
        embeds = layer_input.hidden.to(self.device)
        wanted = None if batch.wanted is None else batch.wanted.repeat(copies, 1)
        repeated = Batch(embeds, batch.mask.repeat(copies, 1), batch.positions.repeat(1, copies, 1), wanted)
        with resumed(self.layout, layer_input), replaced_heads(self.layout, head_of_row):
            hidden, cache = self.run(repeated, cache)
        if cache is not None:
            placeholder = embeds.new_zeros(len(embeds), 1, embeds.shape[1], 1)
            for layer in range(layer_input.unchanged):  # the next forward's mask is made from the lowest layer's length
                cache.update(placeholder, placeholder, layer)
        return hidden, cache

    @torch.no_grad()
    def cache_token_bytes(self, prompt: Segment) -> int:
        """Bytes of the KV cache for one token of one row; measured on the first token of the first prompt given."""
        if not self._cache_token_bytes:
            _, cache = self.run(self.collate([prompt.split(1)[0]]), new_cache())
            self._cache_token_bytes = cache_bytes(cache)
        return self._cache_token_bytes

    @torch.no_grad()
    def greedy(self, prompts: Sequence[Segment], max_new_tokens: int) -> list[list[int]]:
        """Greedy continuations of a batch of prompts: token ids up to, not including, the end token."""
        batch = PrefixBatch(prompts, [1] * len(prompts), self.device)
        hidden, cache = batch.run(self.run, keep=True)
        assert cache is not None
        rows = torch.arange(len(batch))
        first = self.logits(hidden[rows, batch.ends - 1]).argmax(-1)
        cache, mask = right_aligned([(layer, rows) for layer in cache.layers], batch.shared + batch.ends)
        last = batch.rest.positions[:, rows, batch.ends - 1]
        mask = mask.to(self.device)
        return self.continue_greedy(DecodeState(cache, mask, last[..., None], first, [max_new_tokens] * len(prompts)))

    @torch.no_grad()
    def continue_greedy(self, state: DecodeState) -> list[list[int]]:
        """Decode on from each row's first new token: token ids from that one up to, not including, the end token."""
        cache, mask, positions, next_tokens = state.cache, state.mask, state.positions, state.tokens
        tokens: list[list[int]] = [[] for _ in state.budgets]
        rows = list(range(len(tokens)))  # of the cache
        unfinished = set(rows)
        while True:
            for row, token in zip(rows, next_tokens.tolist(), strict=True):
                if row in unfinished and token not in self.end_tokens:
                    tokens[row].append(token)
                if token in self.end_tokens or len(tokens[row]) >= state.budgets[row]:
                    unfinished.discard(row)
            if not unfinished:
                return tokens
            if 4 * len(unfinished) <= 3 * len(rows):  # dropping rows copies the cache, so not for each that ends
                kept = torch.tensor([at for at, row in enumerate(rows) if row in unfinished])
                cache.batch_select_indices(kept)
                mask, positions, next_tokens = mask[kept], positions[:, kept], next_tokens[kept]
                rows = [row for row in rows if row in unfinished]
            mask, positions = F.pad(mask, (0, 1), value=1), positions + 1
            with replaced_heads(self.layout, [state.heads[row] for row in rows] if state.heads else []):
                hidden, cache = self.run(Batch(self.embed(next_tokens[:, None]), mask, positions), cache)
            next_tokens = self.logits(hidden[:, -1]).argmax(-1)

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
            hidden, _ = run(Batch(batch.embeds, mask, batch.positions), selected_rows(cache, repeated))
            last = torch.tensor([len(segment) - 1 for segment in chosen], device=hidden.device).repeat(copies)
            logits = self.logits(hidden[torch.arange(len(last), device=hidden.device), last])
            pieces.append(logits.unflatten(0, (copies, -1)))
        counts = [len(group) for group in suffixes]
        return [group for of_copy in torch.cat(pieces, dim=1) for group in of_copy.split(counts)]

    def answer_logits(self, prompts: Sequence[Segment], answers: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Teacher-forced logits at the answers' tokens: [B, N, vocabulary] and which of them are real, bool [B, N].

        Row i's tokens, ids [n_i], are predicted in the last n_i of the N columns.
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

        The answer's last token is not part of the segment: nothing is predicted after it.
        """
        return prompt + self.continuation(prompt, answer[:-1])

    def continuation(self, prompt: Segment, ids: Tensor) -> Segment:
        """Text tokens [n] following `prompt` as a segment: positions go on by one on every axis."""
        steps = torch.arange(1, len(ids) + 1)
        return Segment(self.embed(ids).detach().cpu(), prompt.positions[:, -1:] + steps)


def configured_factors(model: Any) -> list[float]:
    """Numbers by which a model may multiply its logits: 1, and what its configuration names.

    A wrapper around a text model need not do what the text model's configuration says, so that the logits must tell.
    """
    configs = (model.config, model.config.get_text_config())
    found = [getattr(config, name, None) for config in configs for name in _FACTORS]
    divisors = [getattr(config, "logits_scaling", None) for config in configs]
    found += [1 / divisor for divisor in divisors if divisor]
    return list(dict.fromkeys([1.0, *(float(value) for value in found if isinstance(value, int | float))]))


_FACTORS = ("logit_scale", "lm_head_multiplier", "output_multiplier")


def _end_tokens(model: nn.Module) -> tuple[int, ...]:
    generation_config = getattr(model, "generation_config", None)
    end = getattr(generation_config, "eos_token_id", None)
    if end is None:
        raise LayoutError(
            f"{type(model).__name__} names no end token; set model.generation_config.eos_token_id to its id"
        )
    return tuple(np.atleast_1d(end).tolist())
