"""Statistics of answers with heads ablated: log-probabilities of given answers, and Yes−No margins of candidates."""

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from hones_offline.attribution.ablation import Resumption
from hones_offline.data.metrics import FloatArray
from hones_offline.running.batching import Run, Segment
from hones_offline.running.evaluation import mean_log_probabilities, yes_no_margins
from hones_offline.running.execution import Execution
from hones_offline.running.length_buckets import LengthBuckets
from hones_offline.running.prompts import Prepared


class AnswerLogProbability:
    """The mean token log-probability of each (prompt, answer) pair, float64 [pairs, 1]."""

    def __init__(self, prepared: Prepared, pairs: Sequence[tuple[Segment, Tensor]], execution: Execution) -> None:
        self.decoder, self.answers = prepared.decoder, [answer for _, answer in pairs]
        segments = [self.decoder.answered(prompt, answer) for prompt, answer in pairs]
        self.buckets = LengthBuckets(self.decoder, segments, [len(answer) for answer in self.answers], execution)
        self.copies, self.token_count = self.buckets.copies, self.buckets.token_count

    def undisturbed(self, run: Run) -> FloatArray:
        """Run the pairs with every head in place: [pairs, 1]."""
        means: FloatArray = self._means(run, 1)[0]
        return means

    def ablated(self, resumption: Resumption, _base: FloatArray) -> list[FloatArray]:
        """Run them with heads replaced: [pairs, 1] for each head."""
        return list(self._means(resumption.run, len(resumption.heads)))

    def _means(self, run: Run, copies: int) -> FloatArray:
        """[copies, pairs, 1]."""
        means = np.zeros((copies, len(self.answers), 1))
        prefix_cache = self.buckets.run_prefix(run)
        for items, batch in self.buckets:
            hidden, _ = batch.run_rest(run, prefix_cache)
            answers = [self.answers[i] for i in items] * copies
            of_bucket = mean_log_probabilities(self.decoder, hidden, batch.ends.repeat(copies), answers)
            means[:, items, 0] = of_bucket.cpu().double().numpy().reshape(copies, -1)
        return means


class YesNoMargins:
    """The task's statistics of the margins of some examples' candidates, float64 [examples, k]."""

    def __init__(self, prepared: Prepared, items: Sequence[int], execution: Execution) -> None:
        self.prepared, self.batch_size = prepared, execution.batch_size
        self.examples = [prepared.examples[i] for i in items]
        encoded = [prepared.encoded[i] for i in items]
        self.prefixes, self.suffixes = [e.shared for e in encoded], [e.endings for e in encoded]
        lengths = [len(ending) for endings in self.suffixes for ending in endings]
        self.token_count = len(items) * max(map(len, self.prefixes)) + len(lengths) * max(lengths)
        rows = max(len(items), min(len(lengths), execution.batch_size))
        self.copies = execution.batch_size // rows

    def undisturbed(self, run: Run) -> FloatArray:
        """Run the examples with every head in place: [examples, k]."""
        return self._statistics(run)[0]

    def ablated(self, resumption: Resumption, _base: FloatArray) -> list[FloatArray]:
        """Run them with heads replaced: [examples, k] for each head."""
        return self._statistics(resumption.run)

    def _statistics(self, run: Run) -> list[FloatArray]:
        """[examples, k] for each copy of the rows that `run` makes."""
        logits = self.prepared.decoder.candidate_logits(self.prefixes, self.suffixes, rows=self.batch_size, run=run)
        margins = yes_no_margins(self.prepared, logits)
        count, statistics = len(self.examples), self.prepared.task.statistics
        copies = [margins[start : start + count] for start in range(0, len(margins), count)]
        return [np.stack([statistics(*pair) for pair in zip(self.examples, copy, strict=True)]) for copy in copies]
