"""From a task's data to a measured profile: `learn`.

    data → (selection → bank → factors → dev) for each trial → winner → test, once → evidence

`learn` is on a model, a processor and examples; `learn_from` on examples that are divided and checked.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from hones_offline.comparison.splits import Splits
from hones_offline.data.examples import Example
from hones_offline.data.tasks import Task
from hones_offline.running.execution import Execution
from hones_offline.search.clock import WORK, Clock
from hones_offline.search.data import Other, SearchData, encode, refuse_steered
from hones_offline.search.estimate import estimate
from hones_offline.search.evidence import evidence
from hones_offline.search.settings import SearchSettings
from hones_offline.search.trials import Outcome, Say, Search, check_methods
from hones_steer.errors import DataError
from hones_steer.profile import Profile


@dataclass(frozen=True)
class Learned:
    """The best profile on dev, with its evidence from test, and the search that led to it."""

    profile: Profile
    """Its `method` has the trials under "search", its `evidence` what was measured."""
    search: Outcome
    failures: dict[str, str]
    """Examples that could not be used, with the reason, by split and id."""
    unscorable: dict[str, str]
    """Examples whose score is 0 whatever the model writes, likewise."""

    @property
    def gain(self) -> float:
        """The metric on the test examples with the profile less that without it."""
        evidence = self.profile.evidence
        return float(evidence["steered"] - evidence["base"])

    @property
    def gained(self) -> bool:
        """Whether the gain's 95% interval is above 0."""
        return bool(self.profile.evidence["gain_ci95"][0] > 0)


def learn(
    model: nn.Module,
    processor: Any,
    task: Task,
    examples: Sequence[Example],
    *,
    run_dir: str | Path,
    dev: Sequence[Example] | None = None,
    test: Sequence[Example] | None = None,
    others: Sequence[Other] = (),
    against: Sequence[Other] = (),
    budget: float | None = None,
    settings: SearchSettings | None = None,
    batch_size: int = 16,
    memory_gb: float = 4.0,
    max_failures: float = 0.05,
    progress: bool = False,
    say: Say = lambda _text: None,
) -> Learned:
    """Find neurons for a task, learn their factors, choose on dev, and measure the chosen profile on test.

    Selections of neurons, bank sizes and learning rates are tried in a fixed order, of which a budget makes only the
    first ones; docs/methods.md, "The search", has the rule. Whether the profile is worth using is `Learned.gained`.

    Args:
        model: a Hugging Face causal LM or VLM, in eval mode; its weights are not changed.
        processor: its processor; the tokenizer for a text-only model.
        task: the task.
        examples: what neurons are found and factors are learned on.
        run_dir: folder that keeps the results of each step, so that a killed search can be resumed, and one that a
            budget has ended goes on with a larger one.
        dev: examples to choose on, at least 20; None draws a quarter of `examples`, by image.
        test: examples to measure on, at least 20; None as for dev.
        others: other tasks with examples, on which the profile is measured as well.
        against: other tasks with examples of their own to find neurons on, for selections that pass over what those
            tasks need ("fisher:ratio").
        budget: seconds that everything may take, over all runs in the folder; it decides how many trials are begun and
            nothing else. None makes all trials.
        settings: what is tried; None: the defaults, with the selection "fisher:ratio" where `against` is given.
        batch_size: sequences run at a time where nothing is learned.
        memory_gb: GiB for what attribution keeps, as in `attribute`.
        max_failures: share of a split's examples whose image may be unusable, or whose targets the metric cannot score,
            before it is an error.
        progress: show progress bars on a terminal.
        say: called with a line of text after each trial, with the time that is left.

    Raises:
        DataError: a value is out of range, splits share an image, there are too few examples, the metric cannot score
            their targets, the budget has no room for one trial, or the folder holds another run.
        StateError: the model is steered.
        LayoutError: the model's structure is not supported, or not by a selection's method.
    """
    settings = settings or default_settings(bool(against))
    given = SearchData.divided(task, examples, dev, test, others=others, against=against, seed=settings.fit.seed)
    check_request(settings, given, Path(run_dir))
    execution = Execution(batch_size, memory_gb, progress=progress)
    clock = Clock(Path(run_dir), budget)
    return learn_from(model, processor, given, settings, execution, clock, max_failures=max_failures, say=say)


def default_settings(contrasted: bool) -> SearchSettings:
    """The defaults, with a contrast in the second place where there are other tasks to contrast with."""
    settings = SearchSettings()
    if not contrasted:
        return settings
    first, *rest = settings.selections
    return replace(settings, selections=(first, f"{first}:ratio", *rest))


def learn_from(
    model: nn.Module,
    processor: Any,
    given: SearchData,
    settings: SearchSettings,
    execution: Execution,
    clock: Clock,
    *,
    max_failures: float,
    say: Say,
) -> Learned:
    """`learn` on examples that are divided and checked, in the folder of the clock; nothing is written before all is.

    Of the execution batch size, memory and progress count.
    """
    refuse_steered(model)
    encoded = encode(model, processor, given, max_failures=max_failures, progress=execution.progress)
    check_methods(settings, [encoded.data, *encoded.against], execution)
    if not clock.trials:
        clock.expect(*estimate(encoded, settings, execution))
        clock.require_one()
    splits = Splits(encoded.data, encoded.dev, encoded.test, clock.folder / WORK, batch_size=execution.batch_size)
    outcome = Search(splits, encoded.against, settings, execution).run(clock, say)
    profile = replace(
        outcome.profile,
        method={**outcome.profile.method, "search": outcome.to_json()},
        evidence=evidence(splits, encoded.others, outcome.profile),
    )
    return Learned(profile, outcome, encoded.failures, dict(encoded.unscorable))


def check_request(settings: SearchSettings, given: SearchData, folder: Path) -> None:
    """Check that settings and data fit together, and that the folder is free or holds a search.

    Raises:
        DataError: a selection compares tasks and there is none to compare with, or none does and there is; or the
            folder has something else in it.
    """
    if settings.contrasted and not given.against:
        raise DataError(f"selection {settings.contrasted[0]!r} compares tasks; give another task's examples (against)")
    if given.against and not settings.contrasted:
        raise DataError("no selection compares tasks, so that `against` has no effect; leave it out, or add one")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / WORK).is_dir():
        raise DataError(f"{folder} is not empty and holds no search; choose another folder")
