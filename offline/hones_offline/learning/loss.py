"""The loss that factors are learned by (docs/methods.md, "Learning"), of any of a task's examples."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from itertools import chain

import torch
from torch import Tensor

from hones_offline.data.tasks import Answers
from hones_offline.running.batching import batches
from hones_offline.running.evaluation import answer_columns
from hones_offline.running.prompts import Pair, Prepared

ORIGINAL_BYTES = 2**30
"""Most bytes of the original model's log-probabilities that are kept; more are computed anew for each batch."""


class Losses:
    """The loss of each epoch: what learning with β, a batch size and checkpointing or not minimizes there."""

    def __init__(self, prepared: Prepared, *, beta_kl: float, batch_size: int, whole: bool = False) -> None:
        """Prepare to learn from a task's examples.

        `whole` runs every row from its beginning with nothing left out, as gradient checkpointing needs: otherwise a
        prefix that a batch shares runs once, and the last FFN only where an answer's token is predicted.
        """
        self.prepared, self.beta_kl, self.batch_size, self.whole = prepared, beta_kl, batch_size, whole
        self._latest: EpochLoss | None = None

    def of_epoch(self, seed: int) -> "EpochLoss":
        """The loss of the pairs that the task draws with this seed; the same as before where it draws the same."""
        answers = self.prepared.drawn_answers(seed)
        if self._latest is None or self._latest.answers != answers:
            self._latest = EpochLoss(self, answers)
        return self._latest


class EpochLoss:
    """Cross-entropy + β·KL(original ‖ model) on answer tokens: a mean over examples, over their pairs, and over tokens.

    The original's log-probabilities of all pairs are computed once, when they are first asked for, if they are at most
    `ORIGINAL_BYTES`: so they have the same bytes whichever examples are asked for, and in whichever order.
    """

    def __init__(self, losses: Losses, answers: Sequence[Answers]) -> None:
        """Prepare the pairs of all examples; `answers` has those of each."""
        self.losses, self.prepared, self.answers = losses, losses.prepared, answers
        lengths = [len(self.prepared.answer_ids(answer)) for own in answers for _, answer in own]
        vocabulary = self.prepared.decoder.vocabulary
        self.keeps_original = sum(lengths) * vocabulary * torch.float32.itemsize <= ORIGINAL_BYTES

    @torch.no_grad()
    def original(self, examples: Sequence[int]) -> Tensor | None:
        """The original's log-probabilities at the answer tokens of these examples, float32 [tokens, vocabulary].

        None where β is 0. To be called while nothing scales the model.
        """
        if not self.losses.beta_kl:
            return None
        if self.keeps_original:
            return torch.cat([self._original_of_all[i] for i in examples])
        return self._log_probabilities(self._pairs(examples))

    def __call__(self, examples: Sequence[int], original: Tensor | None) -> Tensor:
        """The loss of these examples on the model as it now is: a scalar that gradients flow through."""
        pairs = self._pairs(examples)
        answers = [answer for _, answer in chain.from_iterable(pairs)]
        scaled = self._log_probabilities(pairs)
        per_token = -scaled.gather(-1, torch.cat(answers).to(scaled.device)[:, None])[:, 0]
        if original is not None:
            original = original.to(scaled.device)
            per_token = per_token + self.losses.beta_kl * (original.exp() * (original - scaled)).sum(-1)
        weights = [1 / len(answer) / len(own) / len(pairs) for own in pairs for _, answer in own for _ in answer]
        return (per_token * torch.tensor(weights).to(per_token)).sum()

    def _pairs(self, examples: Sequence[int]) -> list[list[Pair]]:
        """Those of each example."""
        return [self.prepared.pairs_of(i, self.answers[i]) for i in examples]

    def _log_probabilities(self, pairs: Sequence[Sequence[Pair]]) -> Tensor:
        """[tokens, vocabulary] at the answers' tokens, answer after answer."""
        decoder = self.prepared.decoder
        prompts, answers = zip(*chain.from_iterable(pairs), strict=True)
        segments = [decoder.answered(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
        tail = [len(answer) for answer in answers]
        batch = decoder.prefix_batch(segments, tail, shared=0 if self.losses.whole else None)
        if self.losses.whole:
            batch.rest = replace(batch.rest, wanted=None)
        hidden, _ = batch.run(decoder.run)
        return decoder.logits(hidden[answer_columns(batch.ends, answers)]).log_softmax(-1)

    @cached_property
    def _original_of_all(self) -> list[Tensor]:
        """Each example's [tokens, vocabulary]."""
        kept: dict[int, Tensor] = {}
        sizes = [len(encoded.shared) for encoded in self.prepared.encoded]
        for examples in batches(sizes, self.losses.batch_size):
            pairs = self._pairs(examples)
            lengths = [sum(len(answer) for _, answer in own) for own in pairs]
            kept.update(zip(examples, self._log_probabilities(pairs).cpu().split(lengths), strict=True))
        return [kept[i] for i in range(len(self.prepared))]
