"""What a model makes of examples when an attention head is replaced, for many heads at little cost.

A few examples are taken at a time. They run once undisturbed, and the states entering the layers are kept; each head's
forward then starts at its own layer, for as many heads of a layer at once as fit a batch. Text is not generated again
from the start: the undisturbed answer is fed to the model with the head replaced, in one forward, and only where this
model would have chosen another token does decoding go on from there, for the rows of several heads together.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hones_offline.data.metrics import FloatArray
from hones_offline.running.cache import ending_together
from hones_offline.running.decoder import Batch, Rows, Run, Segment, Started, TextDecoder, gib, shared_length
from hones_offline.running.evaluation import decoded_texts, mean_log_probabilities, yes_no_margins
from hones_offline.running.execution import Execution
from hones_offline.running.hooks import Entering, Head, recorded_states
from hones_offline.running.prompts import Prepared
from hones_steer.layout import linear_shape


class HeadRuns(ABC):
    """A few items (examples, or prompts with an answer) and what the model makes of them with a head replaced.

    Kept is what enters a layer and what its heads put out, `tokens` (padding included) · (hidden size + heads ·
    head_dim) · bytes of the dtype, for as many layers as fit into `memory_gb` GiB, one at least. The undisturbed
    forward is run again for every so many layers. A forward has the rows of `copies` heads.
    """

    def __init__(self, prepared: Prepared, execution: Execution, *, copies: int, tokens: int) -> None:
        self.prepared, self.decoder, self.batch_size = prepared, prepared.decoder, execution.batch_size
        self._heads_at_once, self._memory = max(1, copies), gib(execution.memory_gb)
        layout = self.decoder.layout
        assert layout.layers[0].attn_out is not None  # Layout.require_attribution has been called
        heads_size, _ = linear_shape(layout.layers[0].attn_out) or (layout.hidden_size, 0)
        token_bytes = (layout.hidden_size + heads_size) * next(self.decoder.embedding.parameters()).element_size()
        self._layers_at_once = max(1, self._memory // (tokens * token_bytes))
        self._states: dict[int, list[Entering]] = {}
        self._base: Any = None

    @abstractmethod
    def undisturbed(self) -> Any:
        """Run the items with every head in place; the result."""

    @abstractmethod
    def replaced(self, heads: Sequence[Head], states: Sequence[Entering]) -> Sequence[Any]:
        """One result for each of `heads`, all of one layer; `states` entered it in each undisturbed forward."""

    @torch.no_grad()
    def base(self) -> FloatArray:
        """What comes out with every head in place: for utilities, statistics [items, k]."""
        self._entering(0)
        base: FloatArray = self._base
        return base

    @torch.no_grad()
    def results(self, heads: Sequence[Head]) -> list[FloatArray]:
        """The same with each of `heads` replaced."""
        return self._in_batches(heads)

    def _in_batches(self, heads: Sequence[Head]) -> list[Any]:
        found: dict[Head, Any] = {}
        for layer in sorted({layer for layer, _ in heads}):
            same = [head for head in heads if head[0] == layer]
            for start in range(0, len(same), self._heads_at_once):
                some = same[start : start + self._heads_at_once]
                found.update(zip(some, self.replaced(some, self._entering(layer)), strict=True))
        return [found[head] for head in heads]

    def resuming(self, heads: Sequence[Head], states: Sequence[Entering]) -> Run:
        """The undisturbed forwards once more, one after another, from `states` on and with `heads` replaced."""
        following = iter(states)

        def run(batch: Batch, cache: Any) -> tuple[Tensor, Any]:
            return self.decoder.resume(batch, next(following), heads, cache)

        return run

    def _entering(self, layer: int) -> list[Entering]:
        """What enters `layer` in each undisturbed forward."""
        if layer not in self._states:
            self._states = {}  # first, so that there are never two sets
            layout = self.decoder.layout
            kept = range(layer, min(layer + self._layers_at_once, len(layout.layers)))
            with recorded_states(layout, kept) as states:
                self._base = self.undisturbed()
            self._states = states
        return self._states[layer]


class Parts:
    """Segments in parts of similar length, each the rows of one forward; a beginning that all share runs once for them.

    Iterating gives each part's (numbers of its segments, rows). `copies` of all of them fit a forward (`Rows`);
    `tokens` are run for one, padding included.
    """

    def __init__(
        self, decoder: TextDecoder, segments: Sequence[Segment], own: Sequence[int], execution: Execution
    ) -> None:
        """Of segment i the last `own[i]` tokens' hidden states are wanted; at most `batch_size` are in a part."""
        shared = shared_length(segments, own)
        heads = decoder.layout.layers[0].num_heads or 1
        self.items = in_parts([len(segment) - shared for segment in segments], heads, execution.batch_size)
        self.rows = [
            Rows(decoder, [segments[i] for i in few], [own[i] for i in few], shared=shared) for few in self.items
        ]
        self.tokens = shared + sum(rows.tokens - shared for rows in self.rows)
        self.copies = min(
            rows.copies_at_once(batch_size=execution.batch_size, memory_gb=execution.memory_gb) for rows in self.rows
        )

    def __iter__(self) -> Iterator[tuple[list[int], Rows]]:
        return zip(self.items, self.rows, strict=True)

    def begin(self, run: Run) -> Any:
        """Run what is shared, for `Rows.go_on` of each part."""
        return self.rows[0].begin(run)


def in_parts(lengths: Sequence[int], heads: int, most: int) -> list[list[int]]:
    """Indices in parts of similar length, at most `most` in one, so that `heads` copies of all are run at least cost.

    What is run are the tokens, padding included; each forward costs as much as some tokens more.
    """
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    costs, starts = [0], [0]
    for end in range(1, len(order) + 1):
        widest = lengths[order[end - 1]]
        options = [
            (costs[start] + heads * (end - start) * widest + _FORWARD, start)
            for start in range(max(0, end - most), end)
        ]
        cost, start = min(options)
        costs.append(cost)
        starts.append(start)
    parts: list[list[int]] = []
    end = len(order)
    while end:
        parts.append(order[starts[end] : end])
        end = starts[end]
    return parts[::-1]


_FORWARD = 100  # tokens; SmolLM2-135M on a CPU: about 60


class LogProbabilities(HeadRuns):
    """Items are (prompt, answer) pairs; the statistic is the answer's mean token log-probability."""

    def __init__(self, prepared: Prepared, pairs: Sequence[tuple[Segment, Tensor]], execution: Execution) -> None:
        self.answers = [answer for _, answer in pairs]
        segments = [prepared.decoder.answered(prompt, answer) for prompt, answer in pairs]
        self.parts = Parts(prepared.decoder, segments, [len(answer) for answer in self.answers], execution)
        super().__init__(prepared, execution, copies=self.parts.copies, tokens=self.parts.tokens)

    def undisturbed(self) -> FloatArray:
        means: FloatArray = self._means(self.decoder.run, 1)[0]
        return means

    def replaced(self, heads: Sequence[Head], states: Sequence[Entering]) -> Sequence[FloatArray]:
        return list(self._means(self.resuming(heads, states), len(heads)))

    def _means(self, run: Run, copies: int) -> FloatArray:
        """[copies, items, 1]."""
        means = np.zeros((copies, len(self.answers), 1))
        begun = self.parts.begin(run)
        for items, rows in self.parts:
            hidden, _ = rows.go_on(run, begun)
            answers = [self.answers[i] for i in items] * copies
            found = mean_log_probabilities(self.decoder, hidden, rows.ends.repeat(copies), answers)
            means[:, items, 0] = found.cpu().double().numpy().reshape(copies, -1)
        return means


class Ranking(HeadRuns):
    """Items are examples with candidates."""

    def __init__(self, prepared: Prepared, items: Sequence[int], execution: Execution) -> None:
        self.items = items
        chosen = [prepared.encoded[i] for i in items]
        self.prefixes, self.suffixes = [e.shared for e in chosen], [e.endings for e in chosen]
        flat = [len(ending) for endings in self.suffixes for ending in endings]
        tokens = len(items) * max(map(len, self.prefixes)) + len(flat) * max(flat)
        rows = max(len(items), min(len(flat), execution.batch_size))
        super().__init__(prepared, execution, copies=execution.batch_size // rows, tokens=tokens)

    def undisturbed(self) -> FloatArray:
        return self._statistics(None)[0]

    def replaced(self, heads: Sequence[Head], states: Sequence[Entering]) -> Sequence[FloatArray]:
        return self._statistics(self.resuming(heads, states))

    def _statistics(self, run: Run | None) -> list[FloatArray]:
        """[items, k] for each copy of the rows that `run` makes."""
        logits = self.decoder.candidate_logits(self.prefixes, self.suffixes, rows=self.batch_size, run=run)
        task, examples = self.prepared.task, [self.prepared.examples[i] for i in self.items]
        margins = yes_no_margins(self.prepared, logits)
        copies = [margins[start : start + len(examples)] for start in range(0, len(margins), len(examples))]
        return [np.stack([task.statistics(*pair) for pair in zip(examples, copy, strict=True)]) for copy in copies]


class Generation(HeadRuns):
    """Items are examples to generate for, run in parts of similar length.

    Besides the states, two KV caches are kept: those of the undisturbed forwards, and that of the rows that wait to be
    decoded because they parted from the undisturbed answer; decoding many rows costs little more than decoding one.
    """

    def __init__(self, prepared: Prepared, items: Sequence[int], execution: Execution) -> None:
        decoder, self.items = prepared.decoder, items
        self.budget = prepared.task.max_new_tokens
        prompts = [prepared.encoded[i].prompt(0) for i in items]
        self.drafts = decoder.greedy(prompts, self.budget)
        fed = [torch.tensor(draft[: self.budget - 1], dtype=torch.long) for draft in self.drafts]
        segments = [prompt + decoder.continuation(prompt, ids) for prompt, ids in zip(prompts, fed, strict=True)]
        self.parts = Parts(decoder, segments, [1 + len(ids) for ids in fed], execution)
        self.drafted = [
            _Drafted(rows, few, [prompts[i] for i in few], [self.drafts[i] for i in few]) for few, rows in self.parts
        ]
        self._waiting: list[tuple[Started, list[list[int]]]] = []
        self._scored: dict[tuple[int, tuple[int, ...]], FloatArray] = {}
        super().__init__(prepared, execution, copies=self.parts.copies, tokens=self.parts.tokens)

    @staticmethod
    def batches_at_once(prepared: Prepared, execution: Execution) -> int:
        """How many batches of items are worth taking together: as many as fill a batch of rows to decode, or memory."""
        prompts = [encoded.prompt(0) for encoded in prepared.encoded]
        row_bytes = prepared.decoder.cache_token_bytes(prompts[0]) * (
            max(map(len, prompts)) + prepared.task.max_new_tokens
        )
        fitting = gib(execution.memory_gb) // (execution.batch_size * row_bytes)
        return min(max(fitting, 1), _BATCHES_AT_ONCE)

    def undisturbed(self) -> FloatArray:
        begun = self.parts.begin(self.decoder.run)
        for part in self.drafted:
            _, part.cache = part.rows.go_on(self.decoder.run, begun, keep=True)
        return self._statistics(self.drafts)

    @torch.no_grad()
    def results(self, heads: Sequence[Head]) -> list[FloatArray]:
        texts = self._in_batches(heads)
        self._decode_waiting()
        return [self._statistics(of_head) for of_head in texts]

    def _statistics(self, texts: Sequence[Sequence[int]]) -> FloatArray:
        """[items, k]; most texts are the same for most heads, and scored once."""
        keys = [(item, tuple(text)) for item, text in zip(self.items, texts, strict=True)]
        for item, text in keys:
            if (item, text) not in self._scored:
                (output,) = decoded_texts(self.prepared, [text])
                statistics = self.prepared.task.statistics(self.prepared.examples[item], output)
                self._scored[item, text] = statistics
        return np.stack([self._scored[key] for key in keys])

    def replaced(self, heads: Sequence[Head], states: Sequence[Entering]) -> Sequence[list[list[int]]]:
        """Tokens for each item; of rows that wait, the rest is filled in later."""
        texts: list[list[list[int]]] = [[[]] * len(self.items) for _ in heads]
        run = self.resuming(heads, states)
        begun = self.parts.begin(run)
        for part in self.drafted:
            hidden, cache = part.rows.go_on(run, begun, keep=True)
            for of_head, found in zip(texts, self._texts(part, heads, hidden, cache, states[0].unchanged), strict=True):
                for item, text in zip(part.items, found, strict=True):
                    of_head[item] = text
        return texts

    def _texts(
        self, part: "_Drafted", heads: Sequence[Head], hidden: Tensor, cache: Any, unchanged: int
    ) -> Sequence[list[list[int]]]:
        """What the part's items become, from the forward of its rows with each of `heads` replaced."""
        expected = part.expected.repeat(len(heads), 1)
        asked = (expected != _ANY).nonzero(as_tuple=True)
        tokens = torch.full_like(expected, _ANY)
        chosen = part.columns.repeat(len(heads), 1)[asked]
        logits = self.decoder.logits(hidden[asked[0], chosen])
        tokens[asked] = logits.max(-1).indices.cpu()  # argmax takes 1.6 times as long on a CPU
        end = torch.isin(tokens, torch.tensor(self.decoder.end_tokens))
        agrees = (tokens == expected) | (expected == _ANY) | (end & (expected == _END))
        texts = [list(draft) for _ in heads for draft in part.drafts]
        parted: list[tuple[int, int]] = []  # row, and how many tokens it shares with the undisturbed answer
        for row in (~agrees).any(1).nonzero().flatten().tolist():
            at = int(agrees[row].int().argmin())
            texts[row][at:] = [] if end[row, at] else [int(tokens[row, at])]
            if not end[row, at] and at + 1 < self.budget:
                parted.append((row, at))
        if parted:
            started = part.parted(parted, tokens, heads, cache, unchanged, self.budget)
            if self._memory < started.nbytes() + sum(waiting.nbytes() for waiting, _ in self._waiting):
                self._decode_waiting()
            self._waiting.append((started, [texts[row] for row, _ in parted]))
        count = len(part.drafts)
        return [texts[start : start + count] for start in range(0, len(texts), count)]

    def _decode_waiting(self) -> None:
        """Go on with the rows that wait, after the token that each has last."""
        waiting, self._waiting = self._waiting, []
        if waiting:
            unfinished = [text for _, texts in waiting for text in texts]
            further = self.decoder.continue_greedy(Started.together([started for started, _ in waiting]))
            for text, more in zip(unfinished, further, strict=True):
                text[-1:] = more


class _Drafted:
    """A few items whose rows are prompts followed by the undisturbed answers; `cache` is the undisturbed forward's."""

    def __init__(
        self, rows: Rows, items: Sequence[int], prompts: Sequence[Segment], drafts: Sequence[list[int]]
    ) -> None:
        self.rows, self.items, self.drafts = rows, items, drafts
        self.cache: Any = None
        self.prompts = torch.tensor([len(prompt) for prompt in prompts])
        firsts = self.prompts - rows.shared - 1
        longest = int((rows.ends - firsts).max())
        self.expected = _expected_tokens(drafts, longest)
        self.columns = torch.minimum(firsts[:, None] + torch.arange(longest), rows.ends[:, None] - 1)
        """Where each token of the answer is predicted, [prompts, longest]."""
        self.last = torch.stack([prompt.positions[:, -1] for prompt in prompts], dim=1)
        """Position ids of the prompts' last tokens, [axes, prompts]."""

    def parted(
        self,
        parted: Sequence[tuple[int, int]],
        tokens: Tensor,
        heads: Sequence[Head],
        cache: Any,
        unchanged: int,
        budget: int,
    ) -> Started:
        """What greedy decoding needs to go on with these rows; `unchanged` layers come from the undisturbed cache.

        Rows are (row, how many tokens of its answer it keeps).
        """
        rows, kept = torch.tensor(parted).T
        own = rows % len(self.drafts)
        layers = [(layer, own) for layer in self.cache.layers[:unchanged]] + [
            (layer, rows) for layer in cache.layers[unchanged:]
        ]
        going_on, mask = ending_together(layers, self.prompts[own] + kept)
        device = self.rows.rest.mask.device
        return Started(
            going_on,
            mask.to(device),
            (self.last[:, own] + kept)[..., None].to(device),
            tokens[tuple(torch.tensor(parted).T)],
            [budget - at for _, at in parted],
            [heads[row // len(self.drafts)] for row, _ in parted],
        )


_END, _ANY = -1, -2
_BATCHES_AT_ONCE = 8  # more hardly makes decoding cheaper, and makes the steps of a run long


def _expected_tokens(drafts: Sequence[Sequence[int]], width: int) -> Tensor:
    """[drafts, width]: the tokens of each answer, `_END` after them where there is room, then `_ANY`."""
    rows = [[*draft, _END, *[_ANY] * width][:width] for draft in drafts]
    return torch.tensor(rows)
