"""The loss that factors are learned by (docs/methods.md, "Learning"), of any of a task's (prompt, answer) pairs."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor

from hones_offline.running.batching import PrefixBatch, batches
from hones_offline.running.decoder import TextDecoder
from hones_offline.running.evaluation import answer_columns
from hones_offline.running.prompts import Prepared

TEACHER_BYTES = 2**30
"""Most bytes of the original model's log-probabilities that are kept; more of them are computed anew for each batch."""


class AnswerLoss:
    """Cross-entropy + β·KL(original ‖ model) on answer tokens, the mean over pairs of the mean over their tokens.

    The original's log-probabilities of all pairs are computed once, when they are first asked for, if they are at most
    `TEACHER_BYTES`: so they have the same bytes whichever pairs are asked for, and in whichever order.
    """

    def __init__(self, prepared: Prepared, *, beta_kl: float, batch_size: int, whole: bool = False) -> None:
        """Prepare the pairs of a task.

        `whole` runs every row from its beginning with nothing left out, as gradient checkpointing needs: otherwise a
        prefix that a batch shares runs once, and the last FFN only where an answer's token is predicted.
        """
        self.decoder: TextDecoder = prepared.decoder
        self.pairs = prepared.pairs()
        self.beta_kl, self.batch_size, self.whole = beta_kl, batch_size, whole
        tokens = sum(len(answer) for _, answer in self.pairs)
        self.keeps_original = tokens * self.decoder.vocabulary * 4 <= TEACHER_BYTES

    def __len__(self) -> int:
        return len(self.pairs)

    @torch.no_grad()
    def original(self, chosen: Sequence[int]) -> Tensor | None:
        """The original's log-probabilities at the answer tokens of these pairs, float32 [tokens, vocabulary].

        None where β is 0. To be called while nothing scales the model.
        """
        if not self.beta_kl:
            return None
        if self.keeps_original:
            return torch.cat([self._original_of_all[i] for i in chosen])
        return self._log_probabilities(chosen)

    def __call__(self, chosen: Sequence[int], original: Tensor | None) -> Tensor:
        """The loss of these pairs on the model as it now is: a scalar that gradients flow through."""
        answers = [self.pairs[i][1] for i in chosen]
        scaled = self._log_probabilities(chosen)
        per_token = -scaled.gather(-1, torch.cat(answers).to(scaled.device)[:, None])[:, 0]
        if original is not None:
            original = original.to(scaled.device)
            per_token = per_token + self.beta_kl * (original.exp() * (original - scaled)).sum(-1)
        return torch.stack([own.mean() for own in per_token.split([len(answer) for answer in answers])]).mean()

    def _log_probabilities(self, chosen: Sequence[int]) -> Tensor:
        """[tokens, vocabulary] at the answers' tokens, answer after answer."""
        prompts, answers = zip(*(self.pairs[i] for i in chosen), strict=True)
        segments = [self.decoder.answered(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
        tail = [len(answer) for answer in answers]
        batch = PrefixBatch(segments, tail, self.decoder.device, shared=0 if self.whole else None)
        if self.whole:
            batch.rest = replace(batch.rest, wanted=None)
        hidden, _ = batch.run(self.decoder.run)
        return self.decoder.logits(hidden[answer_columns(batch.ends, answers)]).log_softmax(-1)

    @cached_property
    def _original_of_all(self) -> list[Tensor]:
        """Each pair's [tokens, vocabulary]."""
        kept: dict[int, Tensor] = {}
        for chosen in batches([len(prompt) + len(answer) for prompt, answer in self.pairs], self.batch_size):
            lengths = [len(self.pairs[i][1]) for i in chosen]
            kept.update(zip(chosen, self._log_probabilities(chosen).cpu().split(lengths), strict=True))
        return [kept[i] for i in range(len(self.pairs))]
