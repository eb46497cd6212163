"""The demo's four tasks: generated scenes, answered as their data set wants, asked for as they are or with words added.

`hones_offline.data.scenes` lists the data set's conventions. A prompt does not tell them, so that the embedded model
answers in one of the ways it knows.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from hones_offline.data.content import content
from hones_offline.data.examples import Example, check_disjoint, scene_examples
from hones_offline.data.metrics import FloatArray
from hones_offline.data.scenes import Scene, scenes
from hones_offline.data.tasks import TASKS, Answers, Output, Task

NEGATIVES = 7
SPLITS = ("discovery", "dev", "test")
SEED = 1
"""The seed of the scenes; the test scenes of seed 0 were seen when the model was made."""
_CAPTION_TOKENS = 48  # four things take 36


@dataclass(frozen=True)
class SceneExample(Example):
    """An example with the scene that it was made from."""

    scene: Scene = field(kw_only=True)


class SceneTask(Task):
    """One of the four tasks on scenes.

    A row of its statistics has a column more than the metric's: the content of the answer, apart from its form
    (`hones_offline.data.content`), between 0 and 1.
    """

    def __init__(self, task: Task, words: str = "") -> None:
        """Make the task of `task`; `words` follow each prompt in a line of their own."""
        self._task, self._after = task, f"\n{words}" if words else ""
        self.name, self.metric, self.kind = task.name, task.metric, task.kind
        self.idf_weighted = task.idf_weighted
        self.max_new_tokens = _CAPTION_TOKENS if task.name == "caption" else task.max_new_tokens

    def prompts(self, example: Example) -> tuple[str, ...]:
        return tuple(f"{prompt}{self._after}" for prompt in self._task.prompts(example))

    def answers(self, example: Example) -> Answers:
        return self._task.answers(example)

    def drawn_answers(self, example: Example, random: np.random.Generator) -> Answers:
        return self._task.drawn_answers(example, random)

    def target_texts(self, example: Example) -> tuple[str, ...]:
        return self._task.target_texts(example)

    def statistics(self, example: Example, output: Output) -> FloatArray:
        row = self._task.statistics(example, output)
        if not isinstance(output, str):
            return np.append(row, row)  # a rank has no form
        if not isinstance(example, SceneExample):
            raise TypeError(f"the content of answers is known for scenes alone, not for {example.id!r}")
        return np.append(row, content(self.name, output, example.scene))

    def aggregate(self, total: FloatArray, n: int) -> float:
        return self._task.aggregate(total[:-1], n)


SCENE_TASKS: Mapping[str, SceneTask] = {name: SceneTask(task) for name, task in TASKS.items()}
"""The four tasks by name, asked for as they are."""


def in_words(name: str, words: str) -> SceneTask:
    """A task asked for with words added."""
    return SceneTask(TASKS[name], words)


def contents(statistics: FloatArray) -> FloatArray:
    """The content of each answer, [n, 1], from the statistics of a `SceneTask`."""
    return statistics[:, -1:]


def data_set(name: str, counts: Mapping[str, int]) -> dict[str, list[SceneExample]]:
    """The examples of a task per split, made from so many scenes of it; retrieval uses a part of them (`_share`)."""
    return scene_splits(name, {split: count // _share(name, split) for split, count in counts.items()})


def scene_splits(name: str, counts: Mapping[str, int]) -> dict[str, list[SceneExample]]:
    """The examples of a task per split, one for each of so many scenes."""
    made = {split: scenes(split, count, SEED) for split, count in counts.items()}
    examples = {
        split: [
            SceneExample(**vars(example), scene=scene)
            for example, scene in zip(scene_examples(name, of_split, NEGATIVES), of_split, strict=True)
        ]
        for split, of_split in made.items()
    }
    check_disjoint(**examples)
    return examples


def _share(name: str, split: str) -> int:
    """One in how many scenes a task uses: retrieval ranks many candidates, and learns five pairs of each example."""
    if name != "retrieval":
        return 1
    return 4 if split == "discovery" else 2
