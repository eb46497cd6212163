"""The trials of a search: each finds a bank, learns factors for it and measures them on dev; the best is the winner."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Any

import numpy as np

from hones_offline.attribution.contrast import contrasted
from hones_offline.attribution.heads import HeadScores, require_replaceable_heads
from hones_offline.attribution.methods import AttributionOptions
from hones_offline.attribution.pipeline import attribution_settings, find_bank
from hones_offline.comparison.settings import parse
from hones_offline.comparison.splits import Splits
from hones_offline.data.neurons import Bank, Importance
from hones_offline.data.records import naming
from hones_offline.learning.choosing import DevScore
from hones_offline.running.execution import Execution
from hones_offline.running.prompts import Prepared
from hones_offline.running.run_folder import RunFolder, examples_digest, step_name
from hones_offline.search.clock import Clock, duration
from hones_offline.search.settings import SearchSettings, Trial
from hones_steer.profile import Profile

Row = dict[str, Any]
"""A trial with the epoch and strength that dev chose in it, and how well these do there."""
Say = Callable[[str], object]


@dataclass(frozen=True)
class Outcome:
    """The trials that were made, as rows in their order, and the winner with its profile."""

    rows: Sequence[Row]
    planned: int
    """How many trials there would be without a budget."""
    winner: Row
    profile: Profile

    def to_json(self) -> dict[str, Any]:
        """The search as a profile's metadata have it: numbers with five digits, trials by number."""
        width = len(str(len(self.rows)))
        numbers = [f"{number:0{width}}" for number in range(1, len(self.rows) + 1)]
        return {
            "tried": len(self.rows),
            "planned": self.planned,
            "ended_by": "budget" if len(self.rows) < self.planned else "all tried",
            "winner": numbers[self.rows.index(self.winner)],
            "trials": {
                number: {key: _short(value) for key, value in row.items() if key != "digest"}
                for number, row in zip(numbers, self.rows, strict=True)
            },
        }


def _short(value: object) -> object:
    return float(f"{value:.5g}") if isinstance(value, float) else value


class Search:
    """The trials on one task's splits; results are steps of the splits' run folder, each made once.

    Raises:
        LayoutError: a selection's method cannot be run on the model.
        DataError: an example needs more memory than there is.
    """

    def __init__(
        self, splits: Splits, against: Sequence[Prepared], settings: SearchSettings, execution: Execution
    ) -> None:
        """Prepare to search; `against` are encoded examples of other tasks, for selections with a contrast."""
        self.splits, self.against, self.settings, self.execution = splits, against, settings, execution
        self.importance = cache(self._importance)

    def run(self, clock: Clock, say: Say) -> Outcome:
        """Make the trials in their order until all are made or the clock allows no other; those made before count."""
        plan = self.settings.plan
        base = self.splits.measure("dev")
        rows: list[Row] = []
        for number, trial in enumerate(plan, start=1):
            if not self._is_made(trial):
                if clock.trials and not clock.allows_another():
                    break
                with clock.trial():
                    self._row(trial)
            rows.append(self._row(trial))
            left = sum(not self._is_made(other) for other in plan[number:])
            say(
                f"trial {number} of {'at most ' if clock.budget else ''}{len(plan)}: {described(rows[-1])}: "
                f"{base.task.metric} on dev {base.value:.3f} → {rows[-1]['metric']:.3f}; "
                f"about {duration(clock.left(left))} left"
            )
        if not rows:
            clock.require_one()
        best = max(range(len(rows)), key=lambda i: _rank(rows[i]))
        return Outcome(rows, len(plan), rows[best], self._profile(plan[best]))

    def bank(self, selection: str, size: float) -> Bank:
        """The neurons that a selection chooses."""
        importance = self.importance(selection, None)
        contrast = parse(selection).contrast
        with naming(f"selection {selection!r}"):
            if contrast is not None:
                others = [self.importance(selection, number) for number in range(len(self.against))]
                importance = contrasted(importance, others, contrast, size)
            return importance.bank(size)

    def _profile(self, trial: Trial) -> Profile:
        """The factors that a trial learned, those of the epoch and strength that are best on dev."""
        bank, grid = self.bank(trial.selection, trial.size), replace(self.settings.grid, lrs=(trial.lr,))
        return self.splits.learned_on_dev("hones", bank, self.settings.fit, grid, progress=self.execution.progress)

    def _row(self, trial: Trial) -> Row:
        """The trial's row, one step of the run folder."""

        def make() -> Row:
            profile = self._profile(trial)
            method, on_dev = profile.method, profile.method["chosen_on_dev"]
            return {
                **asdict(trial),
                "neurons": profile.num_neurons,
                "epoch": method["epoch"],
                "strength": on_dev["strength"],
                "metric": on_dev["metric"],
                "log_probability": on_dev["log_probability"],
                "digest": profile.digest,
            }

        row: Row = self.splits.run.json(self._step(trial), make)
        return row

    def _is_made(self, trial: Trial) -> bool:
        return (self.splits.path / f"{self._step(trial)}.json").exists()

    def _step(self, trial: Trial) -> str:
        """The name of the trial's step, by everything that decides its result besides the splits."""
        settings = self.settings
        grid = replace(settings.grid, lrs=(trial.lr,))
        others = [examples_digest(other.examples) for other in self.against] if parse(trial.selection).contrast else []
        execution = [self.execution.batch_size, self.execution.memory_gb]
        decisive = [asdict(trial), asdict(grid), asdict(settings.fit), settings.attribution_examples, others, execution]
        return step_name("trial", decisive)

    def _importance(self, selection: str, other: int | None) -> Importance:
        """The importance by a selection's method for the task, or for one of those to contrast with; resumable."""
        prepared = self.splits.discovery if other is None else self.against[other]
        options = options_of(selection, self.settings)
        drawn = np.random.default_rng(options.seed).permutation(len(prepared))[: self.settings.attribution_examples]
        examples = prepared.only(drawn.tolist())
        wanted = attribution_settings(examples, options, self.execution)
        run = RunFolder(self.splits.path / step_name("attribution", wanted), wanted)
        # Nobody asks for the utility of a method without heads: it need not be measured.
        unscored = None if options.entry.guided else HeadScores.none(np.nan)
        with naming(f"selection {selection!r}, task {prepared.task.name!r}"):
            return find_bank(examples, options, replace(self.execution, folder=run), scores=unscored).importance


def options_of(selection: str, settings: SearchSettings) -> AttributionOptions:
    """The options of attribution that a selection stands for."""
    return replace(parse(selection).options, seed=settings.fit.seed)


def check_methods(settings: SearchSettings, examples: Sequence[Prepared], execution: Execution) -> None:
    """Raise, before any work, if a selection's method cannot be run on these examples' model."""
    for selection in settings.selections:
        options = options_of(selection, settings)
        with naming(f"selection {selection!r}"):
            if options.entry.guided:
                require_replaceable_heads(examples[0].decoder.layout)
            for prepared in examples:
                options.entry.check(prepared, execution)


def described(row: Row) -> str:
    """The trial of a row in a few words."""
    return f"{row['selection']}, {100 * row['size']:.3g}% of the neurons, learning rate {row['lr']:g}"


def _rank(row: Row) -> tuple[DevScore, float, float, int]:
    """The larger the better; of equals the one that changes less, then the one that was learned for fewer epochs."""
    return DevScore(row["metric"], row["log_probability"]), -row["size"], -row["strength"], -row["epoch"]
