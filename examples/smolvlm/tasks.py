"""The four tasks as this model is asked for them: in words, or after worked examples whose pictures are told in words.

The tower was trained so that an image's tokens stand for a description; so a description stands for another image.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

from hones_offline.data.examples import Example, scene_examples
from hones_offline.data.scenes import Scene, scenes
from hones_offline.data.tasks import OCR, TASKS, VQA, Caption, Retrieval, Task

from examples.smolvlm.descriptions import sentences

NEGATIVES = 7
_UNSEEN = ("nickname", "taste", "sound")  # questions about facts that no picture shows
_SHOWN = (0, 1)  # which scenes of the train split are worked examples


def task_scenes(task: str, split: str, count: int) -> list[Scene]:
    """The first `count` scenes of a split; for vqa those whose question can be answered from the picture."""
    drawn = count
    while True:
        found = [s for s in scenes(split, drawn) if task != "vqa" or not any(word in s.question for word in _UNSEEN)]
        if len(found) >= count:
            return found[:count]
        drawn *= 2


def task_examples(task: str, split: str, count: int) -> list[Example]:
    """Examples of a task; retrieval ranks a caption among `NEGATIVES` wrong ones."""
    return scene_examples(task, task_scenes(task, split, count), negatives=NEGATIVES)


@cache
def worked_examples(task: str) -> str:
    """Two scenes of the train split, told in words, with what the task asks and the right answer."""
    parts = ["Here are examples about other images."]
    for number in _SHOWN:
        scene = task_scenes(task, "train", max(_SHOWN) + 1)[number]
        candidate = scene.candidates(1)[number]  # the first is right, the second wrong
        answer = {
            "vqa": scene.answer,
            "ocr": scene.text,
            "caption": scene.captions[0],
            "retrieval": ("Yes", "No")[number],
        }[task]
        parts.append(f"Image: {sentences(scene)}\n{scene.prompt(task, candidate)}\n{answer}")
    return "\n\n".join([*parts, "Now the image above."])


class _AfterExamples(Task):
    """Puts the worked examples before each of a task's prompts."""

    def prompts(self, example: Example) -> tuple[str, ...]:
        return tuple(f"{worked_examples(self.name)}\n{prompt}" for prompt in super().prompts(example))


class _VQA(_AfterExamples, VQA):
    pass


class _OCR(_AfterExamples, OCR):
    pass


class _Caption(_AfterExamples, Caption):
    pass


class _Retrieval(_AfterExamples, Retrieval):
    pass


WAYS: Mapping[str, Mapping[str, Task]] = {
    "words": TASKS,
    "few-shot": {task.name: task for task in (_VQA(), _OCR(), _Caption(), _Retrieval())},
}
"""The tasks by name, for each way of asking."""
