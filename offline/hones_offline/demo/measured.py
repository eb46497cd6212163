"""Results of each way of asking and of steering on a task's test scenes, as rows of the summary's "steering".

A row has the task's metric and, in columns of its own, the content of the answers apart from their form. Gains of the
metric are over the task as it is; gains of content over the better of the task as it is and asked for in words, so that
nothing counts which words could have had.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from hones_offline.comparison.estimates import estimate
from hones_offline.comparison.splits import Splits, Steered
from hones_offline.comparison.steering import size_of, steering_row
from hones_offline.data.metrics import CrossedBootstrap, FloatArray, mean_of_rows
from hones_offline.data.scenes import IN_WORDS
from hones_offline.demo.data_set import SceneExample, contents, in_words
from hones_offline.demo.settings import DEFAULT
from hones_offline.running.evaluation import Scores
from hones_offline.running.prompts import prepare
from hones_steer.profile import Profile

Row = dict[str, Any]


def content_of(scores: Scores) -> float:
    """The mean content of the answers."""
    return float(contents(scores.statistics).mean())


@dataclass(frozen=True)
class Asked:
    """A task asked for in words on test: in those that are best on dev by the metric, and in those by content."""

    words: str
    scores: Scores
    content_words: str
    content_scores: Scores


def ask_in_words(
    model: nn.Module, processor: Any, splits: Splits, examples: Mapping[str, Sequence[SceneExample]]
) -> Asked:
    """Ask for a task in each of the data set's wordings on dev, on test in the best; steps of the splits' folder."""

    def measured(words: str, split: str) -> Scores:
        return splits.measure_beside(prepare(model, processor, in_words(splits.task.name, words), examples[split]))

    dev = {words: measured(words, "dev") for words in IN_WORDS[splits.task.name]}
    words = max(dev, key=lambda words: dev[words].value)
    content_words = max(dev, key=lambda words: content_of(dev[words]))
    test = {words: measured(words, "test") for words in {words, content_words}}
    return Asked(words, test[words], content_words, test[content_words])


class Measured:
    """A task on test: as it is, asked for in words, and steered."""

    def __init__(self, bootstrap: CrossedBootstrap, splits: Splits, asked: Asked) -> None:
        self.bootstrap, self.splits, self.asked = bootstrap, splits, asked
        self.plain = splits.measure("test")
        self._better = max(self.plain, asked.content_scores, key=content_of)

    def unsteered_rows(self) -> list[Row]:
        """The rows "base" and "asked"."""
        base = steering_row(self.bootstrap, "base", self.plain, [self.plain])
        asked = steering_row(self.bootstrap, "asked", self.plain, [self.asked.scores])
        words = {"words": self.asked.words, "content_words": self.asked.content_words}
        return [
            base | estimate("content", self._content(self.plain)),
            asked | estimate("content", self._content(self.asked.content_scores)) | words,
        ]

    def steered_row(self, name: str, steered: Steered) -> Row:
        """The row of a profile or adapter."""
        scores = self.splits.measure("test", steering=steered)
        content = self._content(scores)
        return {
            **steering_row(self.bootstrap, name, self.plain, [scores]),
            **estimate("content", content),
            **estimate("content_gain", content - self._content(self._better)),
            **size_of(steered),
        }

    def over(self, steered: Steered, others: Mapping[str, Steered]) -> Row:
        """A row's key for what a profile gains more than each of others."""
        value = self._value(steered)
        differences = {name: value - self._value(other) for name, other in others.items()}
        return {"over": {name: estimate("gain", more, "ci95") for name, more in differences.items()}}

    def with_evidence(self, profile: Profile) -> Profile:
        """The profile with what was measured of it."""
        scores = self.splits.measure("test", steering=profile)
        content = {"base": content_of(self.plain), "steered": content_of(scores)}
        words = {"asked_in_words": self.asked.scores.value, "content": content}
        evidence = {**scores.evidence(self.plain, "test"), **words}
        return replace(profile, method={**profile.method, "selection": DEFAULT}, evidence=evidence)

    def _value(self, steered: Steered) -> FloatArray:
        scores = self.splits.measure("test", steering=steered)
        return self.bootstrap.values(scores.task.name, scores.statistics, scores.task.aggregate)

    def _content(self, scores: Scores) -> FloatArray:
        return self.bootstrap.values(scores.task.name, contents(scores.statistics), mean_of_rows)


def is_gain(row: Mapping[str, Any], name: str = "gain") -> bool:
    """Whether the interval of a row's gain is above zero."""
    return bool(row[f"{name}_ci95"][0] > 0)


def rows_by_task(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Mapping[str, Any]]]:
    """The rows of a steering section as {task: {method: row}}."""
    found: dict[str, dict[str, Mapping[str, Any]]] = {}
    for row in rows:
        found.setdefault(row["task"], {})[row["method"]] = row
    return found
