"""Running a model's text decoder on prompts whose images are already encoded.

A prompt is encoded once (`prompts.py`): its input embeddings and position ids are what the model hands to its text
decoder. From there on the decoder alone is run, batched, with its own KV cache: greedy generation, Yes−No margins of
candidates that share a prefix, log-probabilities of answers, FFN activations. Rows are padded on the left, so that the
last position of every row is its last prompt token.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
    """Padded segments: embeds [B, T, hidden], mask [B, T] (1 = token), positions [axes, B, T]."""

    embeds: Tensor
    mask: Tensor
    positions: Tensor


class TextDecoder:
    """A model's text decoder, its embedding and its unembedding, for batches of encoded prompts."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.layout: Layout = find_layout(model)
        self.layout.require_attribution()
        self.embedding: nn.Module = self.model.get_input_embeddings()
        assert self.layout.unembedding is not None
        self.unembedding: nn.Module = self.layout.unembedding
        text_config = self.model.config.get_text_config()
        self._softcap: float | None = getattr(text_config, "final_logit_softcapping", None)
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

    def run(self, batch: Batch, cache: Any = None, *, use_cache: bool = False) -> tuple[Tensor, Any]:
        """One decoder forward: hidden states after the final norm [B, T, hidden], and the KV cache.

        With a cache, `batch.mask` covers the cached tokens too: [B, cached + T].
        """
        positions = batch.positions[0] if batch.positions.shape[0] == 1 else batch.positions
        out = self.layout.decoder(
            inputs_embeds=batch.embeds,
            attention_mask=batch.mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=use_cache,
        )
        return out.last_hidden_state, out.past_key_values

    @torch.no_grad()
    def greedy(self, prompts: Sequence[Segment], max_new_tokens: int) -> list[list[int]]:
        """Greedy continuations of a batch of prompts: token ids up to, not including, the end token."""
        batch = self.collate(prompts)
        hidden, cache = self.run(batch, use_cache=True)
        end = torch.tensor(self.end_tokens, device=self.device)
        mask, positions = batch.mask, batch.positions[:, :, -1:]
        finished = torch.zeros(len(prompts), dtype=torch.bool, device=self.device)
        steps: list[Tensor] = []
        for step in range(max_new_tokens):
            token = self.logits(hidden[:, -1]).argmax(-1).to(self.device)
            steps.append(token)
            finished = finished | torch.isin(token, end)
            if step + 1 == max_new_tokens or bool(finished.all()):
                break
            mask = F.pad(mask, (0, 1), value=1)
            positions = positions + 1
            hidden, cache = self.run(Batch(self.embed(token[:, None]), mask, positions), cache, use_cache=True)
        return [self._until_end(row) for row in torch.stack(steps, dim=1).tolist()]

    def _until_end(self, tokens: list[int]) -> list[int]:
        ends = [i for i, token in enumerate(tokens) if token in self.end_tokens]
        return tokens[: ends[0]] if ends else tokens

    @torch.no_grad()
    def candidate_logits(
        self, prefixes: Sequence[Segment], suffixes: Sequence[Sequence[Segment]], *, rows: int
    ) -> list[Tensor]:
        """Next-token logits after each candidate: one [candidates, vocabulary] per prefix.

        Each prefix runs once; its candidates' suffixes continue from its KV cache, at most `rows` at a time.
        """
        prefix = self.collate(prefixes)
        _, cache = self.run(prefix, use_cache=True)
        counts = [len(group) for group in suffixes]
        owners = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts)).to(self.device)
        flat = [segment for group in suffixes for segment in group]
        logits = []
        for start in range(0, len(flat), rows):
            owner, chosen = owners[start : start + rows], flat[start : start + rows]
            branch = copy.deepcopy(cache) if start + rows < len(flat) else cache
            branch.batch_select_indices(owner)
            batch = self.collate(chosen, side="right")
            mask = torch.cat([prefix.mask[owner], batch.mask], dim=1)
            hidden, _ = self.run(Batch(batch.embeds, mask, batch.positions), branch, use_cache=True)
            last = torch.tensor([len(segment) - 1 for segment in chosen], device=hidden.device)
            logits.append(self.logits(hidden[torch.arange(len(chosen), device=hidden.device), last]))
        return list(torch.cat(logits).split(counts))

    def answer_logits(self, prompts: Sequence[Segment], answers: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Teacher-forced logits at the answers' tokens: [B, N, vocabulary] and which of them are real, bool [B, N].

        Answers, token ids [n_i], stand at the end of their rows: row i's tokens are the last n_i of the N columns.
        Differentiable: gradients flow to whatever scales the FFNs.
        """
        rows = [prompt + self.continuation(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
        longest = max(len(answer) for answer in answers)
        hidden, _ = self.run(self.collate(rows))
        logits = self.logits(hidden[:, -longest - 1 : -1])
        lengths = torch.tensor([len(answer) for answer in answers], device=logits.device)
        real = torch.arange(longest, device=logits.device) >= (longest - lengths)[:, None]
        return logits, real

    def continuation(self, prompt: Segment, ids: Tensor) -> Segment:
        """Text tokens [n] following `prompt` as a segment: positions go on by one on every axis."""
        steps = torch.arange(1, len(ids) + 1)
        return Segment(self.embed(ids).detach().cpu(), prompt.positions[:, -1:] + steps)


def pad_answers(answers: Sequence[Tensor]) -> Tensor:
    """Answer ids as [B, N], each at the end of its row like `TextDecoder.answer_logits`; zeros before."""
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
