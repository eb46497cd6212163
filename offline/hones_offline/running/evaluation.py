"""A task's metric on a model: as it is, with a bank masked, or steered by a profile."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hones_offline.data.examples import Example
from hones_offline.data.metrics import FloatArray, bootstrap_interval, paired_bootstrap_interval
from hones_offline.data.neurons import Bank, NeuronIndex
from hones_offline.data.tasks import Output, Task
from hones_offline.running.batching import batches, in_batches
from hones_offline.running.decoder import TextDecoder
from hones_offline.running.interventions import scaled_ffn, set_ffn
from hones_offline.running.prompts import Encoded, Prepared, prepare
from hones_offline.running.readings import summed_ffn
from hones_steer.errors import DataError
from hones_steer.profile import ModelIdentity, Profile
from hones_steer.slots import scale_row


@dataclass(frozen=True)
class Scores:
    """A metric over n examples: `value`, per-example statistics [n, k] it is made from, the outputs, and failures."""

    task: Task
    value: float
    statistics: FloatArray
    outputs: tuple[Output, ...]
    failures: Mapping[str, str]

    @property
    def n(self) -> int:
        """Number of examples scored."""
        return len(self.statistics)

    def interval(self) -> tuple[float, float]:
        """95% percentile-bootstrap interval of `value` over examples."""
        return bootstrap_interval(self.statistics, self.task.aggregate, seed=0)

    def gain_interval(self, base: "Scores") -> tuple[float, float]:
        """95% paired-bootstrap interval of the difference to `base`, measured on the same examples."""
        return paired_bootstrap_interval(self.statistics, base.statistics, self.task.aggregate, seed=0)

    def evidence(self, base: "Scores", split: str) -> dict[str, Any]:
        """The evidence that a profile carries: the metric without and with it on a split, and the gain's interval.

        It has "protocol" where that is not the default one.
        """
        protocol = {} if self.task.protocol == "default" else {"protocol": self.task.protocol}
        return {
            "split": split,
            "metric": self.task.metric,
            **protocol,
            "n": self.n,
            "base": base.value,
            "steered": self.value,
            "gain_ci95": list(self.gain_interval(base)),
        }


def evaluate(
    model: torch.nn.Module,
    processor: Any,
    task: Task,
    examples: Sequence[Example],
    *,
    steering: Profile | None = None,
    mask: Mapping[Any, npt.NDArray[np.int32]] | None = None,
    batch_size: int = 16,
    max_failures: float = 0.05,
    progress: bool = False,
) -> Scores:
    """Score a model on a task by greedy generation (or Yes−No margins, for a ranking task).

    Args:
        model: a Hugging Face causal LM or VLM, in eval mode.
        processor: its processor; the tokenizer for a text-only model.
        task: what is asked and how it is scored.
        examples: the held-out examples.
        steering: a profile whose scales apply to every position.
        mask: a bank {layer: neurons} whose activations are set to 0; (layer, expert) or (layer, "shared") for experts.
        batch_size: sequences run at a time.
        max_failures: share of examples whose image may be unusable before it is an error.
        progress: show progress bars on a terminal.

    Raises:
        DataError: no usable example, or too many failures.
        MismatchError: the profile belongs to another model.
        LayoutError: the model's structure is not supported.
    """
    if batch_size < 1:
        raise DataError(f"batch_size must be at least 1, not {batch_size}")
    prepared = prepare(model, processor, task, examples, max_failures=max_failures, progress=progress)
    if steering is not None:
        steering.base_model.check(ModelIdentity.from_model(model))
    with intervention(prepared, steering=steering, mask=None if mask is None else Bank(mask)):
        return score(prepared, batch_size=batch_size)


@contextmanager
def intervention(
    prepared: Prepared, *, steering: Profile | None = None, mask: Bank | None = None, fill: FloatArray | None = None
) -> Iterator[None]:
    """Steer by a profile and/or mask a bank while the block runs: set its activations to 0, or to `fill` [N]."""
    layout = prepared.decoder.layout
    with ExitStack() as stack:
        if steering is not None:
            stack.enter_context(scaled_ffn(layout, {ffn: scale_row(steering, ffn) for ffn in steering.ffns.groups}))
        if mask is not None:
            index = NeuronIndex.of(layout)
            mask.check(index)
            values = np.zeros(index.size) if fill is None else fill
            filled = {
                ffn: (torch.from_numpy(neurons), torch.from_numpy(values[index[ffn]][neurons]))
                for ffn, (neurons, _) in mask.positions(index).items()
            }
            stack.enter_context(set_ffn(layout, filled))
        yield


@torch.no_grad()
def position_means(prepared: Prepared, *, batch_size: int) -> FloatArray:
    """The mean of z over all positions of all (prompt, answer) pairs, prompt and answer, of every neuron: [N].

    Every position counts alike, so that long pairs weigh more; of an expert's neurons those count that it is chosen
    for, and without any the mean is 0. An answer's end token is not run, nor does masking act on it.
    """
    decoder, index = prepared.decoder, NeuronIndex.of(prepared.decoder.layout)
    pairs = [decoder.answered(prompt, answer) for prompt, answer in prepared.pairs()]
    total, positions = np.zeros(index.size), np.zeros(index.size, dtype=np.int64)
    for numbers in batches([len(pair) for pair in pairs], batch_size):
        batch = decoder.collate([pairs[i] for i in numbers], side="right")
        with summed_ffn(decoder.layout, batch.mask.bool()) as sums:
            decoder.run(batch)
        for ffn, (of_ffn, counted) in sums.items():
            total[index[ffn]] += of_ffn.cpu().numpy()
            positions[index[ffn]] += counted.cpu().numpy()
    means: FloatArray = total / positions.clip(min=1)
    return means


def score(prepared: Prepared, *, batch_size: int) -> Scores:
    """Run the task on the model as it now is, and score the outputs."""
    task = prepared.task
    outputs: Sequence[Output] = (
        _ranked(prepared, batch_size) if task.kind == "rank" else _generated(prepared, batch_size)
    )
    statistics = np.stack(
        [task.statistics(example, out) for example, out in zip(prepared.examples, outputs, strict=True)]
    )
    value = task.aggregate(statistics.sum(axis=0), len(outputs))
    return Scores(task, value, statistics, tuple(outputs), prepared.failures)


def _generated(prepared: Prepared, batch_size: int) -> list[str]:
    def run(batch: list[Encoded]) -> list[list[int]]:
        return prepared.decoder.greedy([e.prompt(0) for e in batch], prepared.task.max_new_tokens)

    return decoded_texts(prepared, in_batches(prepared.encoded, lambda e: len(e.shared), batch_size, run))


def decoded_texts(prepared: Prepared, tokens: Sequence[Sequence[int]]) -> list[str]:
    """Generated tokens as the texts that are scored, cleaned by the task."""
    texts: list[str] = prepared.tokenizer.batch_decode(tokens, skip_special_tokens=True)
    return [prepared.task.clean(text) for text in texts]


def _ranked(prepared: Prepared, batch_size: int) -> list[FloatArray]:
    def run(batch: list[Encoded]) -> list[FloatArray]:
        logits = prepared.decoder.candidate_logits(
            [e.shared for e in batch], [e.endings for e in batch], rows=batch_size
        )
        return yes_no_margins(prepared, logits)

    at_once = max(1, batch_size // most_candidates(prepared))
    return in_batches(prepared.encoded, lambda e: len(e.shared), at_once, run)


def most_candidates(prepared: Prepared) -> int:
    """The number of candidates of the example that has most."""
    return max(len(e.endings) for e in prepared.encoded)


def yes_no_margins(prepared: Prepared, logits: Sequence[Tensor]) -> list[FloatArray]:
    """logit(Yes) − logit(No), [candidates] for each [candidates, vocabulary]."""
    yes, no = (_first_token(prepared, word) for word in ("Yes", "No"))
    if yes == no:
        raise DataError("the tokenizer starts 'Yes' and 'No' with one token, so their margin is always 0")
    return [(rows[:, yes] - rows[:, no]).double().cpu().numpy() for rows in logits]


def _first_token(prepared: Prepared, word: str) -> int:
    ids: list[int] = prepared.tokenizer(word, add_special_tokens=False)["input_ids"]
    return ids[0]


def mean_log_probabilities(decoder: TextDecoder, hidden: Tensor, ends: Tensor, answers: Sequence[Tensor]) -> Tensor:
    """The mean token log-probability of each answer [n_i]: a tensor [B] that gradients flow through.

    Its tokens are predicted in row i of `hidden` [B, T, ...], in the n_i columns before `ends[i]`.
    """
    logits = decoder.logits(hidden[answer_columns(ends, answers)])
    tokens = logits.log_softmax(-1).gather(-1, torch.cat(list(answers)).to(logits.device)[:, None])[:, 0]
    return torch.stack([own.mean() for own in tokens.split([len(answer) for answer in answers])])


def answer_columns(ends: Tensor, answers: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The (rows, columns) at which the answers' tokens are predicted, answer after answer: each [tokens].

    Those of answer i [n_i] are the n_i columns before `ends[i]` of row i.
    """
    lengths = torch.tensor([len(answer) for answer in answers])
    rows = torch.arange(len(answers)).repeat_interleave(lengths)
    firsts = (lengths.cumsum(0) - lengths).repeat_interleave(lengths)
    return rows, (ends - lengths)[rows] + torch.arange(len(rows)) - firsts
