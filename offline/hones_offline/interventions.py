"""What a model makes of examples when an attention head is replaced, for many heads at little cost.

A few examples are taken at a time. They run once undisturbed, and the states entering the layers are kept; each head's
forward then starts at its own layer, for as many heads of a layer at once as fit a batch. Text is not generated again
from the start: the undisturbed answer is fed to the model with the head replaced, in one forward, and only where this
model would have chosen another token does decoding go on from there.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from hones_offline.decoding import Batch, Segment, Started
from hones_offline.evaluate import decoded_texts, mean_log_probabilities, yes_no_margins
from hones_offline.metrics import FloatArray
from hones_offline.prompts import Prepared
from hones_offline.recording import Head, recorded_ffn, recorded_states
from hones_offline.tasks import Output
from hones_steer.layout import down_weight


class HeadRuns(ABC):
    """A few items (examples, or prompts with an answer) and what the model makes of them with a head replaced.

    Kept are the states entering a layer, `tokens` (padding included) · hidden size · bytes of the dtype, for as many
    layers as fit into `memory_gb` GiB, one at least. The undisturbed forward is run again for every so many layers.
    """

    def __init__(self, prepared: Prepared, *, rows: int, tokens: int, batch_size: int, memory_gb: float) -> None:
        self.prepared, self.decoder, self.batch_size = prepared, prepared.decoder, batch_size
        self._heads_at_once = max(1, batch_size // rows)
        layer_bytes = (
            tokens * self.decoder.layout.hidden_size * next(self.decoder.embedding.parameters()).element_size()
        )
        self._layers_at_once = max(1, int(memory_gb * 2**30 / layer_bytes))
        self._states: dict[int, list[Tensor]] = {}

    @abstractmethod
    def undisturbed(self) -> None:
        """Run the items with every head in place."""

    @abstractmethod
    def replaced(self, heads: Sequence[Head], states: Sequence[Tensor]) -> Sequence[FloatArray]:
        """One result for each of `heads`, all of one layer; `states` entered it in each undisturbed forward."""

    @torch.no_grad()
    def results(self, heads: Sequence[Head]) -> list[FloatArray]:
        """What comes out with each of `heads` replaced: for the utilities, statistics [items, k]."""
        found: dict[Head, FloatArray] = {}
        for layer in sorted({layer for layer, _ in heads}):
            same = [head for head in heads if head[0] == layer]
            for start in range(0, len(same), self._heads_at_once):
                some = same[start : start + self._heads_at_once]
                found.update(zip(some, self.replaced(some, self._entering(layer)), strict=True))
        return [found[head] for head in heads]

    def _entering(self, layer: int) -> list[Tensor]:
        """The hidden states entering `layer` in each undisturbed forward."""
        if layer not in self._states:
            self._states = {}  # first, so that there are never two sets
            layout = self.decoder.layout
            kept = range(layer, min(layer + self._layers_at_once, len(layout.layers)))
            with recorded_states(layout, kept) as states:
                self.undisturbed()
            self._states = states
        return self._states[layer]


class LogProbabilities(HeadRuns):
    """Items are (prompt, answer) pairs; the statistic is the answer's mean token log-probability."""

    def __init__(self, prepared: Prepared, items: Sequence[int], **options: Any) -> None:
        pairs = [prepared.pairs()[i] for i in items]
        self.answers = [answer for _, answer in pairs]
        rows = [prompt + prepared.decoder.continuation(prompt, answer) for prompt, answer in pairs]
        self.batch = prepared.decoder.collate(rows)
        super().__init__(prepared, rows=len(rows), tokens=self.batch.mask.numel(), **options)

    def undisturbed(self) -> None:
        self.decoder.run(self.batch)

    def replaced(self, heads: Sequence[Head], states: Sequence[Tensor]) -> Sequence[FloatArray]:
        hidden, _ = self.decoder.resume(self.batch, states[0], heads)
        means = mean_log_probabilities(self.decoder, hidden, self.answers * len(heads))
        return list(np.array(means).reshape(len(heads), -1, 1))


class Ranking(HeadRuns):
    """Items are examples with candidates."""

    def __init__(self, prepared: Prepared, items: Sequence[int], **options: Any) -> None:
        self.items = items
        chosen = [prepared.encoded[i] for i in items]
        self.prefixes, self.suffixes = [e.shared for e in chosen], [e.endings for e in chosen]
        flat = [len(ending) for endings in self.suffixes for ending in endings]
        tokens = len(items) * max(map(len, self.prefixes)) + len(flat) * max(flat)
        rows = max(len(items), min(len(flat), options["batch_size"]))
        super().__init__(prepared, rows=rows, tokens=tokens, **options)

    def undisturbed(self) -> None:
        self.decoder.candidate_logits(self.prefixes, self.suffixes, rows=self.batch_size)

    def replaced(self, heads: Sequence[Head], states: Sequence[Tensor]) -> Sequence[FloatArray]:
        following = iter(states)

        def run(batch: Batch, cache: Any) -> tuple[Tensor, Any]:
            return self.decoder.resume(batch, next(following), heads, cache, use_cache=True)

        logits = self.decoder.candidate_logits(self.prefixes, self.suffixes, rows=self.batch_size, run=run)
        return _statistics(self.prepared, self.items, yes_no_margins(self.prepared, logits))


class Generation(HeadRuns):
    """Items are examples to generate for.

    Besides the states, the undisturbed forward's KV cache is kept, for the rows that part from the undisturbed answer.
    """

    def __init__(self, prepared: Prepared, items: Sequence[int], **options: Any) -> None:
        decoder, self.items = prepared.decoder, items
        self.budget = prepared.task.max_new_tokens
        prompts = [prepared.encoded[i].prompt(0) for i in items]
        self.drafts = decoder.greedy(prompts, self.budget)
        fed = [torch.tensor(draft[: self.budget - 1], dtype=torch.long) for draft in self.drafts]
        prompt = decoder.collate(prompts)
        endings = [decoder.continuation(*pair) for pair in zip(prompts, fed, strict=True)]
        self.prompt_length = prompt.mask.shape[1]
        self.batch = prompt + decoder.collate(endings, side="right")
        self.expected = _expected_tokens(self.drafts, self.batch.mask.shape[1] - self.prompt_length + 1)
        self.cache: Any = None
        super().__init__(prepared, rows=len(items), tokens=self.batch.mask.numel(), **options)

    def undisturbed(self) -> None:
        _, self.cache = self.decoder.run(self.batch, DynamicCache(), use_cache=True)

    def replaced(self, heads: Sequence[Head], states: Sequence[Tensor]) -> Sequence[FloatArray]:
        hidden, cache = self.decoder.resume(self.batch, states[0], heads, DynamicCache(), use_cache=True)
        tokens = self.decoder.logits(hidden[:, self.prompt_length - 1 :]).argmax(-1).cpu()
        expected = self.expected.repeat(len(heads), 1)
        end = torch.isin(tokens, torch.tensor(self.decoder.end_tokens))
        agrees = (tokens == expected) | (expected == _ANY) | (end & (expected == _END))
        texts = [list(draft) for _ in heads for draft in self.drafts]
        parted: list[tuple[int, int]] = []  # row, and how many tokens it shares with the undisturbed answer
        for row in (~agrees).any(1).nonzero().flatten().tolist():
            at = int(agrees[row].int().argmin())
            texts[row] = texts[row][:at] + ([] if end[row, at] else [int(tokens[row, at])])
            if not end[row, at] and len(texts[row]) < self.budget:
                parted.append((row, at))
        if parted:
            started = self._parted(parted, tokens, heads, cache)
            for (row, at), text in zip(parted, self.decoder.continue_greedy(started), strict=True):
                texts[row][at:] = text
        return _statistics(self.prepared, self.items, decoded_texts(self.prepared, texts))

    def _parted(self, parted: Sequence[tuple[int, int]], tokens: Tensor, heads: Sequence[Head], cache: Any) -> Started:
        """What greedy decoding needs to go on with these rows; layers below the heads' come from the undisturbed cache.

        Rows share answers of different lengths, so what they keep of the cache is moved to the right, padding left.
        """
        count = len(self.items)
        rows, shared = torch.tensor(parted, device=self.decoder.device).T
        length = self.prompt_length + shared
        longest = int(length.max())
        columns = torch.arange(longest, device=rows.device) - (longest - length)[:, None]  # [rows, longest]
        real, columns = columns >= 0, columns.clamp(min=0)

        def moved(x: Tensor, of: Tensor) -> Tensor:  # keys or values [rows, kv heads, T, head_dim]
            return x[of.to(x.device)[:, None], :, columns.to(x.device)].transpose(1, 2)

        going_on = DynamicCache()
        for index, (before, now) in enumerate(zip(self.cache.layers, cache.layers, strict=True)):
            source, of = (before, rows % count) if index < heads[0][0] else (now, rows)
            going_on.update(moved(source.keys, of), moved(source.values, of), index)
        return Started(
            going_on,
            self.batch.mask[rows % count].gather(1, columns) * real,
            (self.batch.positions[:, rows % count, self.prompt_length - 1] + shared)[..., None],
            tokens[tuple(torch.tensor(parted).T)],
            [self.budget - at for _, at in parted],
            [heads[row // count] for row, _ in parted],
        )


_END, _ANY = -1, -2


def _expected_tokens(drafts: Sequence[Sequence[int]], width: int) -> Tensor:
    """[drafts, width]: the tokens of each answer, `_END` after them where there is room, then `_ANY`."""
    rows = [[*draft, _END, *[_ANY] * width][:width] for draft in drafts]
    return torch.tensor(rows)


def _statistics(prepared: Prepared, items: Sequence[int], outputs: Sequence[Output]) -> list[FloatArray]:
    """[items, k] for every head, from the outputs of all heads, one head after another."""
    rows = [
        prepared.task.statistics(prepared.examples[items[number % len(items)]], output)
        for number, output in enumerate(outputs)
    ]
    return [np.stack(rows[start : start + len(items)]) for start in range(0, len(rows), len(items))]


class WriteIn(HeadRuns):
    """Items are prompts with their target directions [items, hidden]; the result is Σ c_{l,i}, float64 [L, I]."""

    def __init__(self, prepared: Prepared, prompts: Sequence[Segment], directions: Tensor, **options: Any) -> None:
        self.layout = prepared.decoder.layout
        self.batch = prepared.decoder.collate(prompts)
        weights = [down_weight(layer) for layer in self.layout.layers]
        self.alignments = [directions.to(weight.device) @ weight.float() for weight in weights]  # [items, I]
        self.base = torch.zeros(len(weights), self.layout.intermediate_size, dtype=torch.float64)
        super().__init__(prepared, rows=len(prompts), tokens=self.batch.mask.numel(), **options)

    def undisturbed(self) -> None:
        with recorded_ffn(self.layout) as recorded:
            self.decoder.run(self.batch)
        self.base = self._sums(recorded, 1)[0]

    def replaced(self, heads: Sequence[Head], states: Sequence[Tensor]) -> Sequence[FloatArray]:
        with recorded_ffn(self.layout) as recorded:
            self.decoder.resume(self.batch, states[0], heads)
        return list(self._sums(recorded, len(heads)).numpy())

    def _sums(self, recorded: Mapping[int, Tensor], copies: int) -> Tensor:
        """Σ over the items for each copy of the rows; layers that did not run are as they are undisturbed."""
        sums = self.base.repeat(copies, 1, 1)
        for layer, z in recorded.items():  # [copies·items, I]
            written = z.unflatten(0, (copies, -1)) * self.alignments[layer]
            sums[:, layer] = written.sum(1, dtype=torch.float64).cpu()
        return sums
