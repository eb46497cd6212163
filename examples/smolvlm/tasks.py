"""The tasks as this model is asked for them: in words, after worked examples, or with the answer's beginning.

Unlike the data set of `hones demo`, these have no conventions of their own: left is the picture's left, and boxes are
read from left to right. The pictures are those of its splits.

In words the model mostly describes the whole picture, as it was trained to. With its beginning, an answer can only be
what the request is about: "The blue box reads" goes on with the box's text. What the model knows is seen that way.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache

from hones_offline.data.examples import Example, MemoryImage
from hones_offline.data.metrics import METRICS, FloatArray
from hones_offline.data.scene_language import Question, ask, capital, caption, placed, with_article
from hones_offline.data.scenes import Scene, scenes
from hones_offline.data.tasks import OCR, TASKS, VQA, Answers, Caption, Output, Retrieval, Task

from examples.smolvlm.descriptions import counted, sentences

NEGATIVES = 7
KINDS = {"what": 1, "where": 1}
"""Kinds of questions, which the picture answers, and how often each is asked."""
_SHOWN = (0, 1)  # which scenes of the train split are worked examples


@dataclass(frozen=True)
class Asked(Example):
    """An example whose answer has a beginning in words."""

    opening: str = field(kw_only=True)
    rest: str = field(kw_only=True)
    """How the right answer goes on."""


def task_examples(task: str, split: str, count: int) -> list[Example]:
    """Make examples of a task from the first `count` scenes of a split; retrieval has `NEGATIVES` wrong captions."""
    return [_example(task, scene) for scene in scenes(split, count)]


def _example(task: str, scene: Scene) -> Example:
    name = f"{scene.style:08x}"
    image = MemoryImage(scene.image(), name)
    match task:
        case "vqa":
            asked = question(scene)
            opening, rest = begun(asked)
            return Asked(name, asked.text, (asked.answer,), image, opening=opening, rest=rest)
        case "ocr":
            return Asked(name, "", (scene.text,), image, opening="The blue box reads", rest=f" {scene.text}.")
        case "caption":
            references = tuple(caption(scene.cells, form) for form in ("is", "there", "holds"))
            return Asked(name, "", references, image, opening="There are", rest=f" {counted(scene)}")
        case "count":
            number = len(placed(scene.cells))
            return Asked(name, "", (str(number),), image, opening="There are", rest=f" {number} things:")
        case _:
            return Example(name, "", ("Yes",), image, scene.candidates(NEGATIVES))


def question(scene: Scene) -> Question:
    """The question that is asked about a scene."""
    return ask(scene.cells, scene.text, random.Random(f"smolvlm/{scene.style}"), KINDS)


def begun(asked: Question) -> tuple[str, str]:
    """The beginning of the sentence that answers a question, as descriptions have it, and how it goes on."""
    about = asked.text.split(" the ")[1].removesuffix("?")
    if asked.kind == "what":
        return f"The {about} holds", f" {asked.phrase.removesuffix(f' in the {about}')}."
    color, shape = about.split()
    return f"{capital(with_article((color, shape)))} is in the", f" {asked.answer}."


class Count(Task):
    """Say how many things there are."""

    name = "count"
    metric = "accuracy"
    max_new_tokens = 8

    def prompt(self, example: Example) -> str:  # noqa: ARG002 - the same words for every example
        return "How many things are there beside the blue box?\nAnswer with a number."


@cache
def worked_examples(task: str) -> str:
    """Two scenes of the train split, told in words, with what the task asks and the right answer."""
    parts = ["Here are examples about other images."]
    for number in _SHOWN:
        scene = scenes("train", max(_SHOWN) + 1)[number]
        example = _example(task, scene)
        which = number if task == "retrieval" else 0  # the first candidate is right, the second wrong
        answer = ("Yes", "No")[number] if task == "retrieval" else example.targets[0]
        parts.append(f"Image: {sentences(scene)}\n{WAYS['words'][task].prompts(example)[which]}\n{answer}")
    return "\n\n".join([*parts, "Now the image above."])


class _AfterExamples(Task):
    """Puts the worked examples before each of a task's prompts."""

    def prompts(self, example: Example) -> tuple[str, ...]:
        return tuple(f"{worked_examples(self.name)}\n{prompt}" for prompt in super().prompts(example))


class _VQAAfterExamples(_AfterExamples, VQA):
    pass


class _OCRAfterExamples(_AfterExamples, OCR):
    pass


class _CaptionAfterExamples(_AfterExamples, Caption):
    pass


class _RetrievalAfterExamples(_AfterExamples, Retrieval):
    pass


class _CountAfterExamples(_AfterExamples, Count):
    pass


class _Begun(Task):
    """Begins the answer, of which the first sentence counts."""

    def opening(self, example: Example) -> str:
        return _asked(example).opening

    def answer(self, example: Example) -> str:
        return _asked(example).rest

    def drawn_answers(self, example: Example, random: object) -> Answers:  # noqa: ARG002
        return self.answers(example)

    def target_texts(self, example: Example) -> tuple[str, ...]:
        return (self.answer(example),)

    def clean(self, text: str) -> str:
        return re.split(r"[.\n]", text)[0].strip()


def _asked(example: Example) -> Asked:
    if not isinstance(example, Asked):
        raise TypeError(f"{example.id!r} does not say how its answer begins")
    return example


class _VQABegun(_Begun, VQA):
    pass


class _OCRBegun(_Begun, OCR):
    pass


class _CaptionBegun(_Begun, Caption):
    max_new_tokens = 48  # four things take 36

    def statistics(self, example: Example, output: Output) -> FloatArray:
        return METRICS[self.metric_name].statistics(str(output), (_asked(example).rest.strip(" ."),))


class _CountBegun(_Begun, Count):
    def clean(self, text: str) -> str:
        return super().clean(text).partition(" things")[0]


def _by_name(*tasks: Task) -> dict[str, Task]:
    return {task.name: task for task in tasks}


WAYS: Mapping[str, Mapping[str, Task]] = {
    "words": {**TASKS, "count": Count()},
    "few-shot": _by_name(
        _VQAAfterExamples(),
        _OCRAfterExamples(),
        _CaptionAfterExamples(),
        _RetrievalAfterExamples(),
        _CountAfterExamples(),
    ),
    "begun": _by_name(_VQABegun(), _OCRBegun(), _CaptionBegun(), _CountBegun()),
}
"""The tasks by name, for each way of asking; retrieval's "Yes" or "No" has no beginning."""
