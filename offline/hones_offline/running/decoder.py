"""A model's text decoder, run on prompts whose images are already encoded.

A prompt is encoded once (`prompts.py`): its input embeddings and position ids are what the model hands to its text
decoder. From there on the decoder alone is run, batched, with its own KV cache: greedy generation, Yes−No margins of
candidates that share a prefix, log-probabilities of answers, FFN activations.
"""

import inspect
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from hones_offline.running.batching import (
    Batch,
    PrefixBatch,
    Run,
    Segment,
    collate,
    selected_rows,
    shared_length,
)
from hones_offline.running.cache import KVCache, cache_bytes, new_cache, right_aligned
from hones_offline.running.decoding import CachedRows, DecodeState, WholeRows
from hones_offline.running.hooks import Head
from hones_offline.running.inputs import DecoderInputs
from hones_offline.running.interventions import replaced_heads
from hones_offline.running.resumption import LayerInput, last_ffn_at, resumed
from hones_steer._transformers import cache_name, returned_cache, takes_cache
from hones_steer.errors import LayoutError
from hones_steer.layout import Layout, find_layout


class TextDecoder:
    """A model's text decoder, its embedding and its unembedding, for batches of encoded prompts."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.layout: Layout = find_layout(model)
        self.layout.require_attribution()
        self._cache_name = cache_name(self.layout.decoder.forward)
        self._takes_cache = takes_cache(self.layout.decoder.forward)
        self.embedding: nn.Module = self.model.get_input_embeddings()
        assert self.layout.unembedding is not None
        self.unembedding: nn.Module = self.layout.unembedding
        text_config = self.model.config.get_text_config()
        self._softcap: float | None = getattr(text_config, "final_logit_softcapping", None)
        self.logit_factor = 1.0
        """Number that the model multiplies its logits by, one of `configured_factors`; the decoder's check finds it."""
        self._cache_token_bytes = 0
        self.end_tokens = _end_tokens(model)
        self.inputs = DecoderInputs(self.layout.model_type, getattr(self.layout.decoder, "config", text_config))
        self.has_kv_cache = self.layout.keeps_only_keys_and_values and self._takes_cache
        """Whether all that layers keep of a token is its keys and values. If not, every row is run from its start."""

    @property
    def device(self) -> torch.device:
        """Where input embeddings live."""
        return next(self.embedding.parameters()).device

    def embed(self, ids: Tensor) -> Tensor:
        """Token ids [...] to input embeddings [..., hidden]."""
        embeds: Tensor = self.embedding(ids.to(self.device))
        return embeds

    def of_text(self, ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Token ids [rows, T] to what the decoder takes of text tokens: embeddings, and what else by name.

        Besides embeddings that is at most a second embedding for each layer.
        """
        embeds, decoder = self.embed(ids), self.layout.decoder
        if not getattr(getattr(decoder, "config", None), "hidden_size_per_layer_input", 0):
            return embeds, {}
        look_up: Any = decoder.get_per_layer_inputs
        takes = len(inspect.signature(look_up).parameters)
        return embeds, {"per_layer_inputs": look_up(*(ids.to(self.device), embeds)[:takes])}

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

    def require_length(self, tokens: int) -> None:
        """Raise LayoutError if rows of so many tokens are more than each layer attends to."""
        if self.layout.most_keys is not None and tokens > self.layout.most_keys:
            raise LayoutError(
                f"layers of model type {self.layout.model_type!r} attend to {self.layout.most_keys} tokens that an "
                f"indexer chooses, in batches of attribution not always to the same, and a prompt, with its answer if "
                f"it is run with one, has {tokens}; leave out examples that are so long"
            )

    def run(self, batch: Batch, cache: KVCache | None = None) -> tuple[Tensor, KVCache | None]:
        """One decoder forward: hidden states after the final norm [B, T, hidden], and the KV cache, grown.

        With a cache that is not empty, `batch.mask` covers the cached tokens too: [B, cached + T]. Only the `wanted`
        columns are valid; elsewhere the last FFN was skipped.
        """
        mask = batch.mask
        self.require_length(mask.shape[1])
        if mask.shape[1] == batch.embeds.shape[1] and not bool((mask[:, 1:] > mask[:, :-1]).any()):
            mask = torch.ones_like(mask)  # no token looks at padding that comes after it, and plain causal is faster
        positions = batch.positions[0] if batch.positions.shape[0] == 1 else batch.positions
        with last_ffn_at(self.layout, batch.wanted):
            out = self.layout.decoder(
                inputs_embeds=batch.embeds.clone(),  # some decoders (GIT, BERT) add positions to what they are given
                position_ids=positions,
                **self.inputs.arguments(batch, mask, cache),
                **({"use_cache": cache is not None, self._cache_name: cache} if self._takes_cache else {}),
            )
        return out.last_hidden_state, None if cache is None else returned_cache(out)

    def last_hidden(self, segments: Sequence[Segment]) -> Tensor:
        """Hidden states after the final norm at the last token of each segment, run from its start: [B, hidden]."""
        ends = torch.tensor([len(segment) for segment in segments])
        hidden, _ = self.run(replace(self.collate(segments, side="right"), wanted=ends[:, None] - 1))
        return hidden[torch.arange(len(ends)), ends - 1]

    def shared_length(self, segments: Sequence[Segment], tail: Sequence[int]) -> int:
        """How many tokens that all segments begin with are run once for all of them; the last `tail[i]` never are."""
        return shared_length(segments, tail) if self.has_kv_cache else 0

    def prefix_batch(self, segments: Sequence[Segment], tail: Sequence[int], shared: int | None = None) -> PrefixBatch:
        """A batch of segments of which the last `tail[i]` hidden states will be read; `shared` as in `PrefixBatch`."""
        return PrefixBatch(
            segments, tail, self.device, self.shared_length(segments, tail) if shared is None else shared
        )

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
        repeated = batch.repeat(copies)
        with resumed(self.layout, layer_input), replaced_heads(self.layout, head_of_row):
            hidden, cache = self.run(repeated, cache)
        if cache is not None:
            rows, length = repeated.embeds.shape[:2]
            placeholder = repeated.embeds.new_zeros(rows, 1, length, 1)
            for layer in range(layer_input.unchanged):  # the next forward's mask is made from the lowest layer's length
                cache.update(placeholder, placeholder, layer)
        return hidden, cache

    @torch.no_grad()
    def cache_token_bytes(self, prompt: Segment) -> int:
        """Bytes that are kept for one token of a row that waits; measured on the first token of the first prompt given.

        They are those of the KV cache, or without one of the embeddings.
        """
        if not self._cache_token_bytes:
            first = prompt.split(1)[0]
            if self.has_kv_cache:
                _, cache = self.run(self.collate([first]), new_cache())
                self._cache_token_bytes = cache_bytes(cache)
            else:
                self._cache_token_bytes = WholeRows([first]).nbytes
        return self._cache_token_bytes

    @torch.no_grad()
    def greedy(self, prompts: Sequence[Segment], max_new_tokens: int) -> list[list[int]]:
        """Greedy continuations of a batch of prompts: token ids up to, not including, the end token."""
        budgets = [max_new_tokens] * len(prompts)
        if not self.has_kv_cache:
            first = self.logits(self.last_hidden(prompts)).argmax(-1)
            return self.continue_greedy(DecodeState(WholeRows(list(prompts)), first, budgets))
        batch = self.prefix_batch(prompts, [1] * len(prompts))
        hidden, cache = batch.run(self.run, keep=True)
        assert cache is not None
        rows = torch.arange(len(batch))
        first = self.logits(hidden[rows, batch.ends - 1]).argmax(-1)
        cache, mask = right_aligned([(layer, rows) for layer in cache.layers], batch.shared + batch.ends)
        last = batch.rest.positions[:, rows, batch.ends - 1]
        return self.continue_greedy(
            DecodeState(CachedRows(cache, mask.to(self.device), last[..., None]), first, budgets)
        )

    @torch.no_grad()
    def continue_greedy(self, state: DecodeState) -> list[list[int]]:
        """Decode on from each row's first new token: token ids from that one up to, not including, the end token."""
        running, next_tokens = state.rows, state.tokens
        tokens: list[list[int]] = [[] for _ in state.budgets]
        rows = list(range(len(tokens)))  # of those that are running
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
                running.select(kept)
                next_tokens = next_tokens[kept]
                rows = [row for row in rows if row in unfinished]
            with replaced_heads(self.layout, [state.heads[row] for row in rows] if state.heads else []):
                hidden = running.next_hidden(self, next_tokens)
            next_tokens = self.logits(hidden).argmax(-1)

    @torch.no_grad()
    def candidate_logits(
        self, prefixes: Sequence[Segment], suffixes: Sequence[Sequence[Segment]], *, rows: int, run: Run | None = None
    ) -> list[Tensor]:
        """Next-token logits after each candidate: one [candidates, vocabulary] per prefix.

        Each prefix runs once; its candidates' suffixes continue from its KV cache, at most `rows` at a time. Without a
        cache, or where a prefix is empty, the candidates run whole. `run` stands in for `TextDecoder.run` and may
        return several copies of its rows, which then come one after another.
        """
        run = run or self.run
        owners = torch.tensor([i for i, group in enumerate(suffixes) for _ in group])
        flat = [segment for group in suffixes for segment in group]
        if whole := not self.has_kv_cache or not all(map(len, prefixes)):
            flat = [prefixes[owner] + segment for owner, segment in zip(owners.tolist(), flat, strict=True)]
        else:
            prefix = self.collate(prefixes)
            hidden, cache = run(prefix, new_cache())
            copies = len(hidden) // len(prefixes)
        pieces = []
        for start in range(0, len(flat), rows):
            owner, chosen = owners[start : start + rows], flat[start : start + rows]
            batch = self.collate(chosen, side="right")
            if whole:
                hidden, _ = run(batch, None)
                copies = len(hidden) // len(chosen)
            else:
                repeated = torch.cat([owner + number * len(prefixes) for number in range(copies)])
                mask = torch.cat([prefix.mask[owner], batch.mask], dim=1)
                hidden, _ = run(replace(batch, mask=mask), selected_rows(cache, repeated))
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
        text = self.text(ids)
        return replace(text, positions=prompt.positions[:, -1:] + steps)

    @torch.no_grad()
    def text(self, ids: Tensor) -> Segment:
        """Text tokens [n] as a segment, at positions from 0 on."""
        embeds, more = self.of_text(ids[None])
        return Segment(embeds[0].cpu(), torch.arange(len(ids))[None], {name: x[0].cpu() for name, x in more.items()})


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
