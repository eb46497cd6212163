'''Tasks: the prompts that the model gets, the answers that count as right, and the scores of its outputs.

Four are the paper's: `vqa`, `ocr`, `caption`, `retrieval` (see `TASKS`). A user's own task needs no code
if a JSONL file holds its prompts and targets (`JsonlTask`). Otherwise it is one small class:

    class Color(Task):
        """Name the color of a thing; each example's prompt is the thing's name."""

        name = "color"
        metric = "accuracy"
        max_new_tokens = 4

        def prompt(self, example: Example) -> str:
            return f"What color is the {example.prompt}? Answer with one word."

        def score(self, example: Example, output: str) -> float:
            return float(output.strip().lower().startswith(example.targets[0]))

A task with several prompts or answers per example, or with a metric that is no mean over examples, overrides
`prompts`, `answers`, `drawn_answers`, `statistics` or `aggregate`; see `Retrieval`, `Caption` and `_TextTask`, and
docs/tasks.md.
'''

import re
import zlib
from collections import Counter
from collections.abc import Mapping
from copy import copy
from types import MappingProxyType
from typing import Literal, get_args

import numpy as np

from hones_offline.data.examples import Example
from hones_offline.data.metrics import METRICS, FloatArray, exact_match, mean_of_rows, ndcg_at_k
from hones_steer.errors import DataError
from hones_steer.profile import is_task_name

Output = str | FloatArray
"""A model's output for one example: generated text, or the candidates' Yes-No margins [num_candidates]."""

Protocol = Literal["default", "paper"]
"""How the paper's tasks are run where its released code differs from this package; docs/methods.md lists where."""

Answers = tuple[tuple[int, str], ...]
"""(prompt index, right answer) pairs of one example."""

LEARNED_NEGATIVES = 4
"""How many of an example's negatives retrieval learns to answer with "No"."""


class Task:
    """Base of every task; its defaults are a generated answer scored by exact match.

    `name` is the task's name in profiles and reports, `metric` the metric's display name. `kind` is "generate" if the
    model writes up to `max_new_tokens` tokens, "rank" if each prompt gets the margin logit(Yes) - logit(No) of its next
    token. With `idf_weighted` the target's tokens are weighted by IDF in the write-in direction. With `first_line` only
    the `first_line` of a generated text is scored. `protocol` is what `get_task` was asked for.
    A task holds no state, so that one instance serves any number of runs.
    """

    name: str
    metric: str = "exact match"
    kind: Literal["generate", "rank"] = "generate"
    max_new_tokens: int = 32
    idf_weighted: bool = False
    first_line: bool = False
    protocol: Protocol = "default"

    def prompt(self, example: Example) -> str:
        """The text beside the example's image; by default the example's prompt."""
        return example.prompt

    def opening(self, example: Example) -> str:  # noqa: ARG002
        """Text that every answer is made to begin with, after the chat template; by default none.

        It is part of the prompt, so neither generated nor scored: the answers of `answers` and `drawn_answers` go on
        where it ends, with a space before the first word. lm-eval calls it gen_prefix.
        """
        return ""

    def answer(self, example: Example) -> str:
        """The right answer; by default the first target."""
        return example.targets[0]

    def score(self, example: Example, output: str) -> float:
        """The score of one generated text, in [0, 1]."""
        return exact_match(output, example.targets)

    def prompts(self, example: Example) -> tuple[str, ...]:
        """All prompts of an example: one to generate from, or one per candidate to rank."""
        return (self.prompt(example),)

    def answers(self, example: Example) -> Answers:
        """The (prompt index, answer) pairs that attribution takes the log-probabilities and gradients of."""
        return ((0, self.answer(example)),)

    def drawn_answers(self, example: Example, random: np.random.Generator) -> Answers:  # noqa: ARG002
        """The pairs whose cross-entropy learning minimizes in one epoch, drawn anew for each; by default `answers`.

        Learning averages over an example's pairs, then over examples. `random` is seeded by the epoch.
        """
        return self.answers(example)

    def clean(self, text: str) -> str:
        """A generated text as it is scored: without white space around it, or its `first_line`."""
        return first_line(text) if self.first_line else text.strip()

    def target_texts(self, example: Example) -> tuple[str, ...]:
        """Texts whose tokens together give the direction u_y of the write-in at the first prompt."""
        return (self.answer(example),)

    def statistics(self, example: Example, output: Output) -> FloatArray:
        """One example's row [k] for `aggregate`; here the score alone, [1]."""
        return np.array([self.score(example, _text(output))])

    def aggregate(self, total: FloatArray, n: int) -> float:
        """The metric over n examples, in [0, 1], from the sum [k] of their rows."""
        return mean_of_rows(total, n)


def _text(output: Output) -> str:
    if not isinstance(output, str):
        raise TypeError(f"a generating task scores text, not {type(output).__name__}")
    return output


class _TextTask(Task):
    """A generating task scored by one of `METRICS`."""

    metric_name: str

    def statistics(self, example: Example, output: Output) -> FloatArray:
        return METRICS[self.metric_name].statistics(_text(output), example.targets)

    def aggregate(self, total: FloatArray, n: int) -> float:
        return METRICS[self.metric_name].aggregate(total, n)


class VQA(_TextTask):
    """Answer a question about an image: the prompt is the question, the targets are people's answers."""

    name = "vqa"
    metric_name = "vqa"
    metric = METRICS["vqa"].title
    max_new_tokens = 16

    def prompt(self, example: Example) -> str:
        return f"Question: {example.prompt}\nAnswer the question with a short phrase."

    def answer(self, example: Example) -> str:
        return most_frequent(example.targets)


class OCR(_TextTask):
    """Transcribe the text in the blue box, which is part of the image (`FileImage.box` draws it)."""

    name = "ocr"
    metric_name = "anls"
    metric = METRICS["anls"].title

    def prompt(self, example: Example) -> str:  # noqa: ARG002 (the same words for every example)
        return "Transcribe the text inside the blue box.\nOutput text only."


class Caption(_TextTask):
    """Describe an image in one sentence; the targets are up to five references."""

    name = "caption"
    metric_name = "bleu4"
    metric = METRICS["bleu4"].title
    idf_weighted = True

    def prompt(self, example: Example) -> str:  # noqa: ARG002 (the same words for every example)
        return "Describe the image in one sentence."

    def drawn_answers(self, example: Example, random: np.random.Generator) -> Answers:
        """One of the references."""
        return _one_reference(example, random)

    def target_texts(self, example: Example) -> tuple[str, ...]:
        return example.targets


class Retrieval(Task):
    """Find the image's caption: `example.candidates[0]` is right, the others are hard negatives."""

    name = "retrieval"
    metric = "NDCG@5"
    kind = "rank"
    max_new_tokens = 1

    def prompts(self, example: Example) -> tuple[str, ...]:
        if len(example.candidates) < 2:
            raise DataError(f"Example '{example.id}' has no candidates to rank; give the positive and a negative.")
        question = "Does the candidate correctly describe the image?\nAnswer exactly Yes or No."
        return tuple(f"Candidate: {candidate}\n{question}" for candidate in example.candidates)

    def answers(self, example: Example) -> Answers:
        """A "Yes" after the positive and a "No" after each of four negatives, or of all where there are fewer.

        The four follow each other among the negatives, and after the last comes the first; the example's id decides
        where they begin, so that over the examples every kind of negative takes part.
        """
        count = len(example.candidates) - 1
        begin = zlib.crc32(example.id.encode()) % count
        return ((0, "Yes"), *((1 + (begin + i) % count, "No") for i in range(min(LEARNED_NEGATIVES, count))))

    def drawn_answers(self, example: Example, random: np.random.Generator) -> Answers:
        """The same pairs for every epoch; with the paper's protocol the negatives are drawn."""
        if self.protocol == "default":
            return self.answers(example)
        negatives = random.permutation(range(1, len(example.candidates)))[:LEARNED_NEGATIVES]
        return ((0, "Yes"), *((negative, "No") for negative in negatives.tolist()))

    def target_texts(self, example: Example) -> tuple[str, ...]:  # noqa: ARG002
        return ("Yes",)

    def statistics(self, example: Example, output: Output) -> FloatArray:
        if isinstance(output, str) or output.shape != (len(example.candidates),):
            raise TypeError(f"retrieval scores {len(example.candidates)} margins, got {np.shape(output)}")
        return np.array([ndcg_at_k(output, relevant=0, k=5)])


class JsonlTask(_TextTask):
    """A user's own task: the prompts of a JSONL file as they are (`load_jsonl`), scored by one of `METRICS`.

    With the metric "vqa" the most frequent target is the answer, else the first. With "bleu4" the targets are
    references, of which learning draws one for each epoch, as in `Caption`.

    Raises:
        DataError: the metric is unknown, the name is not allowed for a profile, or `max_new_tokens` is below 1.
    """

    def __init__(
        self, name: str, metric: str = "exact_match", max_new_tokens: int = 32, *, first_line: bool = False
    ) -> None:
        if not is_task_name(name):
            raise DataError(
                f"'{name}' can't name a task; use up to 64 letters, digits, '_', '.' and '-', but not 'none'."
            )
        if metric not in METRICS:
            raise DataError(f"Unknown metric '{metric}'; choose one of {', '.join(METRICS)}.")
        if max_new_tokens < 1:
            raise DataError(f"Task '{name}' can't answer in {max_new_tokens} tokens; give at least 1.")
        self.name = name
        self.metric_name = metric
        self.metric = METRICS[metric].title
        self.max_new_tokens = max_new_tokens
        self.first_line = first_line
        self.idf_weighted = metric == "bleu4"

    def answer(self, example: Example) -> str:
        return most_frequent(example.targets) if self.metric_name == "vqa" else example.targets[0]

    def drawn_answers(self, example: Example, random: np.random.Generator) -> Answers:
        return _one_reference(example, random) if self.metric_name == "bleu4" else self.answers(example)

    def target_texts(self, example: Example) -> tuple[str, ...]:
        return example.targets if self.metric_name == "bleu4" else (self.answer(example),)


def _one_reference(example: Example, random: np.random.Generator) -> Answers:
    return ((0, example.targets[random.integers(len(example.targets))]),)


def first_line(text: str) -> str:
    """The first line that is not blank, without "Answer:" before it and straight quotation marks around it.

    Models that chat write more than was asked for; the paper's released code scores what this leaves.
    """
    line = text.strip().partition("\n")[0]
    return re.sub(r"^answer\s*:", "", line, flags=re.IGNORECASE).strip().strip("\"'").strip()


def most_frequent(texts: tuple[str, ...]) -> str:
    """The text that occurs most often; on a tie the one that comes first."""
    return Counter(texts).most_common(1)[0][0]


TASKS: Mapping[str, Task] = MappingProxyType({task.name: task for task in (VQA(), OCR(), Caption(), Retrieval())})
"""The paper's tasks by name. To add one: write its class above and list it here."""


def get_task(name: str, protocol: Protocol = "default") -> Task:
    """One of the paper's tasks; with the protocol "paper" as its released code runs it (docs/methods.md lists how).

    Raises:
        DataError: the name or the protocol is unknown; the message names the known ones.
    """
    if name not in TASKS:
        raise DataError(f"Unknown task '{name}'; the known ones are {', '.join(TASKS)}.")
    if protocol not in get_args(Protocol):
        raise DataError(f"Unknown protocol '{protocol}'; the known ones are {', '.join(get_args(Protocol))}.")
    return TASKS[name] if protocol == "default" else _as_released(TASKS[name])


def _as_released(task: Task) -> Task:
    """A copy of a task that follows the paper's released code."""
    released = copy(task)
    released.protocol = "paper"
    if released.kind == "generate":
        released.first_line, released.max_new_tokens = True, 24
    return released
