"""The examples that a search is given: divided and checked before any work, then encoded for the model."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from hones_offline.data.examples import Example, check_disjoint, fingerprint, split_by_image
from hones_offline.data.tasks import Task
from hones_offline.running.prompts import Prepared, prepare, tokenizer_of
from hones_steer.errors import DataError, StateError
from hones_steer.export.sidecar import SIDECAR
from hones_steer.huggingface import is_steered

LEAST = 20
"""The fewest dev examples that a choice is made on, and test examples that a gain is told from."""
DRAWN = 0.25
"""The share of the examples that a split which is not given gets."""

Other = tuple[Task, Sequence[Example]]
"""Another task with examples of it."""


@dataclass(frozen=True)
class SearchData:
    """A task with its splits, and other tasks' examples: `others` are measured, banks are contrasted with `against`.

    Raises:
        DataError: dev or test are too few, two tasks of a kind have one name, or what is measured shares an image (or
            an example without one) with what is found, learned or chosen on.
    """

    task: Task
    data: Sequence[Example]
    dev: Sequence[Example]
    test: Sequence[Example]
    others: Sequence[Other] = ()
    against: Sequence[Other] = ()

    def __post_init__(self) -> None:
        for split in ("dev", "test"):
            _require_enough(split, len(getattr(self, split)))
        for kind in ("others", "against"):
            names = [self.task.name, *(task.name for task, _ in getattr(self, kind))]
            for name in names:
                if names.count(name) > 1:
                    raise DataError(f"{kind} names task {name!r} twice, or the task itself; name each other task once")
        check_disjoint(data=self.data, dev=self.dev, test=self.test)
        for task, examples in self.others:
            check_disjoint(data=self.data, dev=self.dev, **{f"others {task.name}": examples})
        measured = {"test": self.test, **{f"others {task.name}": examples for task, examples in self.others}}
        own = {fingerprint(example) for example in self.data}
        for task, examples in self.against:
            if shared := [example.id for example in examples if fingerprint(example) in own]:
                raise DataError(
                    f"{len(shared)} examples of {task.name!r} to contrast with are the task's own, the first being "
                    f"{shared[0]!r}; give each task examples of its own"
                )
            for name, apart in measured.items():
                check_disjoint(**{f"against {task.name}": examples, name: apart})

    @classmethod
    def divided(
        cls,
        task: Task,
        data: Sequence[Example],
        dev: Sequence[Example] | None,
        test: Sequence[Example] | None,
        *,
        others: Sequence[Other] = (),
        against: Sequence[Other] = (),
        seed: int,
    ) -> "SearchData":
        """Draw dev and test out of the data by image where they are not given, each a quarter of it."""
        given = {"dev": dev, "test": test}
        missing = {split: DRAWN for split, examples in given.items() if examples is None}
        rest, drawn = split_by_image(data, missing, seed) if missing else (list(data), {})
        for split, examples in drawn.items():
            if len(examples) < LEAST:
                raise DataError(
                    f"{len(data)} examples give {len(examples)} for {split}, and {LEAST} are needed; give at least "
                    f"{round(LEAST / DRAWN)}, or {split} examples of its own"
                )
        splits = {**{split: examples for split, examples in given.items() if examples is not None}, **drawn}
        return cls(task, rest, splits["dev"], splits["test"], others, against)


@dataclass(frozen=True)
class EncodedData:
    """The same, encoded for one model."""

    data: Prepared
    dev: Prepared
    test: Prepared
    others: Sequence[Prepared]
    against: Sequence[Prepared]
    unscorable: Mapping[str, str]
    """The examples whose score is 0 whatever the model writes, with the reason."""

    @property
    def failures(self) -> dict[str, str]:
        """The examples that could not be used, with the reason; by split and id."""
        parts = {"": self.data, "dev ": self.dev, "test ": self.test}
        parts |= {f"{other.task.name} ": other for other in self.others}
        parts |= {f"against {other.task.name} ": other for other in self.against}
        return {f"{part}{name}": why for part, prepared in parts.items() for name, why in prepared.failures.items()}


def encode(model: nn.Module, processor: Any, given: SearchData, *, max_failures: float, progress: bool) -> EncodedData:
    """Check that the metrics can score the targets, and encode everything for the model.

    Raises:
        DataError: too many examples cannot be used or scored, or too few dev or test examples are left.
        LayoutError: the model's text decoder cannot be run without the rest of the model.
    """
    scored = {"dev": (given.task, given.dev), "test": (given.task, given.test)}
    scored |= {f"others {task.name}": (task, examples) for task, examples in given.others}
    wrong = {
        f"{split} {name}": why
        for split, (task, examples) in scored.items()
        for name, why in unscorable(split, task, examples, tokenizer_of(processor), max_failures).items()
    }

    def encoded(task: Task, examples: Sequence[Example]) -> Prepared:
        return prepare(model, processor, task, examples, max_failures=max_failures, progress=progress)

    data, dev, test = (encoded(given.task, examples) for examples in (given.data, given.dev, given.test))
    for split, prepared in {"dev": dev, "test": test}.items():
        _require_enough(split, len(prepared))
    others, against = ([encoded(*other) for other in kind] for kind in (given.others, given.against))
    return EncodedData(data, dev, test, others, against, wrong)


def _require_enough(split: str, count: int) -> None:
    if count < LEAST:
        raise DataError(
            f"there are {count} usable {split} examples, and at least {LEAST} are needed "
            f"{'to choose on' if split == 'dev' else 'to measure a gain on'}; give more"
        )


def unscorable(
    split: str, task: Task, examples: Sequence[Example], tokenizer: Any, max_failures: float
) -> dict[str, str]:
    """The examples that a task's metric cannot score, by id, with the reason.

    An example can be scored if a right answer, as far as `max_new_tokens` let the model write it, scores more than an
    empty one. So a reference of three words has no BLEU-4, and the VQA challenge's normalization leaves nothing of the
    answer "A".

    Raises:
        DataError: they are more than the share `max_failures` of the examples.
    """
    if task.kind != "generate":
        return {}
    wrong = {e.id: why for e in examples if (why := _why_unscorable(task, e, tokenizer)) is not None}
    if wrong and len(wrong) > max_failures * len(examples):
        name, why = next(iter(wrong.items()))
        raise DataError(
            f"{task.metric} cannot score {len(wrong)} of the {len(examples)} {split} examples, the first being "
            f"{name!r}: {why}; correct them, or choose another metric"
        )
    return wrong


def _why_unscorable(task: Task, example: Example, tokenizer: Any) -> str | None:
    def scored(texts: Iterable[str]) -> float:
        return max(task.aggregate(task.statistics(example, task.clean(text)), 1) for text in texts)

    answers = list(dict.fromkeys((*(answer for _, answer in task.answers(example)), *example.targets)))
    ids = [tokenizer(answer, add_special_tokens=False)["input_ids"] for answer in answers]
    written = tokenizer.batch_decode([row[: task.max_new_tokens] for row in ids], skip_special_tokens=True)
    empty = scored([""])
    if scored(written) > empty:
        return None
    if scored(answers) <= empty:
        return f"its target {answers[0]!r} scores {scored(answers):g} itself, and an empty answer {empty:g}"
    if all(len(row) > task.max_new_tokens for row in ids):
        return f"its target {answers[0]!r} is longer than the {task.max_new_tokens} tokens that the model may write"
    return f"the model's tokenizer cannot write its target {answers[0]!r}"


def refuse_merged(folder: str) -> None:
    """Raise DataError if a model's folder is one that a profile was merged into."""
    if folder and Path(folder, SIDECAR).is_file():
        raise DataError(f"the model {folder!r} is steered already: a profile is merged into it; learn on the original")


def refuse_steered(model: nn.Module) -> None:
    """Raise if a model is steered already, by a `Steering` that is attached or by a profile merged into its weights.

    Raises:
        StateError, DataError: it is.
    """
    if is_steered(model):
        raise StateError("the model is steered already; detach() its Steering before learning a profile for it")
    refuse_merged(str(getattr(getattr(model, "config", None), "_name_or_path", "")))
