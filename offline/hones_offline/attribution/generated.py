"""Statistics of generated text with heads ablated, without generating it again from the start.

1. Each example's answer is generated once with every head in place: its *draft*.
2. With a head replaced, prompt and draft are run in one forward. Up to the first position where this model would have
   chosen another token, the draft is its answer, too.
3. Rows that diverge there wait, with their KV caches, and are decoded together, those of many heads at once. Their
   lower layers' keys and values, which no replaced head has changed, come from the undisturbed forward.
4. The answers are scored by the task; most heads leave most answers as they are, and each text is scored once.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from hones_offline.attribution.ablation import HeadAblation, Resumption
from hones_offline.data.metrics import FloatArray
from hones_offline.running.batching import PrefixBatch, Run, Segment, gib
from hones_offline.running.cache import KVCache, right_aligned
from hones_offline.running.decoder import TextDecoder
from hones_offline.running.decoding import CachedRows, DecodeState, WholeRows
from hones_offline.running.evaluation import decoded_texts
from hones_offline.running.execution import Execution
from hones_offline.running.hooks import Head
from hones_offline.running.length_buckets import LengthBuckets
from hones_offline.running.prompts import Prepared

Tokens = list[int]
"""Token ids of an answer, up to, not including, the end token."""


class GeneratedText:
    """The task's statistics of the text generated for some examples, with every head in place and with one replaced."""

    def __init__(self, prepared: Prepared, items: Sequence[int], execution: Execution) -> None:
        self._prepared, self._items = prepared, items
        self._queue = DecodeQueue(prepared.decoder, execution)
        self._answers = DraftedAnswers(prepared, items, execution, self._queue)
        self._ablation = HeadAblation(prepared.decoder, self._answers, execution)
        self._scored: dict[tuple[int, tuple[int, ...]], FloatArray] = {}

    def undisturbed(self) -> FloatArray:
        """The statistics with every head in place, [items, k]."""
        return self._statistics(self._answers.drafts)

    def ablated(self, heads: Sequence[Head]) -> list[FloatArray]:
        """The statistics with each of `heads` replaced, [items, k]."""
        answers = self._ablation.ablated(heads)
        self._queue.decode()
        return [self._statistics(of_head) for of_head in answers]

    def _statistics(self, answers: Sequence[Tokens]) -> FloatArray:
        keys = [(item, tuple(tokens)) for item, tokens in zip(self._items, answers, strict=True)]
        for item, tokens in keys:
            if (item, tokens) not in self._scored:
                (text,) = decoded_texts(self._prepared, [tokens])
                statistics = self._prepared.task.statistics(self._prepared.examples[item], text)
                self._scored[item, tokens] = statistics
        return np.stack([self._scored[key] for key in keys])


def batches_at_once(prepared: Prepared, execution: Execution) -> int:
    """How many batches of items are worth taking together: as many as fill a batch of rows to decode, or memory."""
    prompts = [encoded.prompt(0) for encoded in prepared.encoded]
    row_bytes = prepared.decoder.cache_token_bytes(prompts[0]) * (max(map(len, prompts)) + prepared.task.max_new_tokens)
    fitting = gib(execution.memory_gb) // (execution.batch_size * row_bytes)
    return min(max(fitting, 1), _BATCHES_AT_ONCE)


_BATCHES_AT_ONCE = 8  # more hardly makes decoding cheaper, and makes the steps of a run long


@dataclass
class DecodeQueue:
    """Rows that wait to be decoded together, which costs little more than decoding one; at most `memory_gb` of caches.

    An answer that waits ends in the first token of its own; decoding puts the other tokens after it, in place.
    """

    decoder: TextDecoder
    execution: Execution
    _waiting: list[tuple[DecodeState, list[Tokens]]] = field(default_factory=list)

    def add(self, state: DecodeState, answers: Sequence[Tokens]) -> None:
        """Let rows wait, with the answer of each; if memory does not suffice, those that wait are decoded first."""
        waiting_bytes = sum(waiting.rows.nbytes for waiting, _ in self._waiting)
        if gib(self.execution.memory_gb) < state.rows.nbytes + waiting_bytes:
            self.decode()
        self._waiting.append((state, list(answers)))

    def decode(self) -> None:
        """Decode all rows that wait to their ends."""
        waiting, self._waiting = self._waiting, []
        if waiting:
            unfinished = [answer for _, answers in waiting for answer in answers]
            endings = self.decoder.continue_greedy(DecodeState.joined([state for state, _ in waiting]))
            for answer, ending in zip(unfinished, endings, strict=True):
                answer[-1:] = ending


class DraftedAnswers:
    """Measures which tokens are written for some examples, given their drafts.

    The result for a head holds each item's tokens; those of rows that diverge are whole once `queue` is decoded. Kept
    from the undisturbed forwards are their KV caches, one for each bucket.
    """

    def __init__(self, prepared: Prepared, items: Sequence[int], execution: Execution, queue: DecodeQueue) -> None:
        self.decoder, self.queue = prepared.decoder, queue
        self.budget = prepared.task.max_new_tokens
        prompts = [prepared.encoded[i].prompt(0) for i in items]
        self.drafts = self.decoder.greedy(prompts, self.budget)
        fed = [torch.tensor(draft[: self.budget - 1], dtype=torch.long) for draft in self.drafts]
        segments = [prompt + self.decoder.continuation(prompt, ids) for prompt, ids in zip(prompts, fed, strict=True)]
        self.buckets = LengthBuckets(self.decoder, segments, [1 + len(ids) for ids in fed], execution)
        self.copies, self.token_count = self.buckets.copies, self.buckets.token_count
        self.drafted = [
            DraftBatch(
                batch,
                bucket,
                [prompts[i] for i in bucket],
                [segments[i] for i in bucket],
                [self.drafts[i] for i in bucket],
            )
            for bucket, batch in self.buckets
        ]

    def undisturbed(self, run: Run) -> list[KVCache | None]:
        """Run prompts and drafts with every head in place: each bucket's KV cache, if the decoder has one."""
        prefix_cache, keep = self.buckets.run_prefix(run), self.decoder.has_kv_cache
        return [drafted.batch.run_rest(run, prefix_cache, keep=keep)[1] for drafted in self.drafted]

    def ablated(self, resumption: Resumption, caches: Sequence[KVCache | None]) -> list[list[Tokens]]:
        """Run them with heads replaced: for each head the tokens of every item."""
        answers: list[list[Tokens]] = [[[]] * len(self.drafts) for _ in resumption.heads]
        prefix_cache = self.buckets.run_prefix(resumption.run)
        for drafted, undisturbed in zip(self.drafted, caches, strict=True):
            of_bucket = self._bucket_answers(drafted, undisturbed, resumption, prefix_cache)
            for of_head, bucket_answers in zip(answers, of_bucket, strict=True):
                for item, tokens in zip(drafted.items, bucket_answers, strict=True):
                    of_head[item] = tokens
        return answers

    def _bucket_answers(
        self, drafted: "DraftBatch", undisturbed: KVCache | None, resumption: Resumption, prefix_cache: KVCache | None
    ) -> list[list[Tokens]]:
        """For each head the tokens of the bucket's items; `undisturbed` is the KV cache with every head in place."""
        heads = resumption.heads
        hidden, cache = drafted.batch.run_rest(resumption.run, prefix_cache, keep=self.decoder.has_kv_cache)
        chosen, expected = self._chosen(drafted, hidden, len(heads)), drafted.expected.repeat(len(heads), 1)
        end = torch.isin(chosen, torch.tensor(self.decoder.end_tokens))
        agrees = (chosen == expected) | (expected == _ANY) | (end & (expected == _END))
        answers = [list(draft) for _ in heads for draft in drafted.drafts]
        diverged: list[tuple[int, int]] = []  # row, and how many tokens it shares with the draft
        for row in (~agrees).any(1).nonzero().flatten().tolist():
            at = int(agrees[row].int().argmin())
            answers[row][at:] = [] if end[row, at] else [int(chosen[row, at])]
            if not end[row, at] and at + 1 < self.budget:
                diverged.append((row, at))
        if diverged:
            rows, kept = torch.tensor(diverged).T
            layers = None
            if cache is not None and undisturbed is not None:
                layers = [(layer, rows % len(drafted.drafts)) for layer in undisturbed.layers[: resumption.unchanged]]
                layers += [(layer, rows) for layer in cache.layers[resumption.unchanged :]]
            state = drafted.diverged(rows, kept, chosen, layers, budget=self.budget, heads=heads)
            self.queue.add(state, [answers[row] for row, _ in diverged])
        count = len(drafted.drafts)
        return [answers[start : start + count] for start in range(0, len(answers), count)]

    def _chosen(self, drafted: "DraftBatch", hidden: Tensor, copies: int) -> Tensor:
        """The token chosen at each position of the answers, [copies·prompts, longest]; `_ANY` where none is asked."""
        expected = drafted.expected.repeat(copies, 1)
        asked = (expected != _ANY).nonzero(as_tuple=True)
        columns = drafted.columns.repeat(copies, 1)[asked]
        logits = self.decoder.logits(hidden[asked[0], columns])
        chosen = torch.full_like(expected, _ANY)
        chosen[asked] = logits.max(-1).indices.cpu()  # argmax takes 1.6 times as long on a CPU
        return chosen


class DraftBatch:
    """A bucket whose rows are prompts followed by their drafts."""

    def __init__(
        self,
        batch: PrefixBatch,
        items: Sequence[int],
        prompts: Sequence[Segment],
        segments: Sequence[Segment],
        drafts: Sequence[Tokens],
    ) -> None:
        """Prepare the bucket of the items with these numbers; `segments` are prompts with their drafts."""
        self.batch, self.items, self.drafts = batch, items, drafts
        self.segments = segments
        self.prompts = torch.tensor([len(prompt) for prompt in prompts])
        """Length of each prompt."""
        firsts = self.prompts - batch.shared - 1
        longest = int((batch.ends - firsts).max())
        self.expected = _expected_tokens(drafts, longest)
        self.columns = torch.minimum(firsts[:, None] + torch.arange(longest), batch.ends[:, None] - 1)
        """The column where each token of the answer is predicted, [prompts, longest]."""
        self.last = torch.stack([prompt.positions[:, -1] for prompt in prompts], dim=1)
        """Position ids of the prompts' last tokens, [axes, prompts]."""

    def diverged(
        self,
        rows: Tensor,
        kept: Tensor,
        chosen: Tensor,
        layers: Sequence[tuple[KVCache, Tensor]] | None,
        *,
        budget: int,
        heads: Sequence[Head],
    ) -> DecodeState:
        """The state from which greedy decoding goes on with rows that diverge from their drafts.

        `rows` [n] count through the copies of the bucket, one for each of `heads`; of its draft a row keeps `kept` [n]
        tokens, then comes the `chosen` one. `layers` holds each layer of the cache and which of its rows to take; None
        without a cache.
        """
        prompts = rows % len(self.drafts)
        lengths = self.prompts[prompts] + kept
        running: CachedRows | WholeRows
        if layers is None:
            pairs = zip(prompts.tolist(), lengths.tolist(), strict=True)
            running = WholeRows([self.segments[prompt].split(length)[0] for prompt, length in pairs])
        else:
            cache, mask = right_aligned(layers, lengths)
            device = self.batch.rest.mask.device
            running = CachedRows(cache, mask.to(device), (self.last[:, prompts] + kept)[..., None].to(device))
        return DecodeState(
            running,
            chosen[rows, kept],
            [budget - at for at in kept.tolist()],
            [heads[row // len(self.drafts)] for row in rows.tolist()],
        )


_END, _ANY = -1, -2


def _expected_tokens(drafts: Sequence[Tokens], width: int) -> Tensor:
    """The tokens of each draft, `_END` after them where there is room, then `_ANY`: [drafts, width]."""
    rows = [[*draft, _END, *[_ANY] * width][:width] for draft in drafts]
    return torch.tensor(rows)
