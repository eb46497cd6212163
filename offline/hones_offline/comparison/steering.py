"""The steering study: what factors for banks gain on their own task, and cost the others where a route is wrong.

Two parts. The main method's bank with learned factors and their baselines, at several strengths, and for groups of
neurons; and *selections*: banks of several methods, each with factors chosen on dev from one grid, beside comparators
that need no bank of neurons (docs/methods.md). Everything is a step of the splits' run folders.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np

from hones_offline.comparison.estimates import estimate, mean_beside, weighted
from hones_offline.comparison.finder import Finder
from hones_offline.comparison.settings import COMPARATORS, NESTED_CHOICE, CompareSettings
from hones_offline.comparison.splits import Splits, Steered
from hones_offline.data.metrics import CrossedBootstrap, FloatArray, interval_of
from hones_offline.data.neurons import Bank, NeuronIndex
from hones_offline.learning.adapters import ADAPTERS, Adapter, check_adapters
from hones_offline.learning.methods import STEERING_METHODS
from hones_offline.running.evaluation import Scores
from hones_offline.running.progress import with_progress
from hones_steer.profile import Profile, serialize_profile

STEERED = ("base", *STEERING_METHODS)
"""The rows of the steering table."""


class Steering:
    """The sections of a summary that steer: of every task, with what was found or learned for each seed.

    Raises:
        DataError: adapters are among the comparators and peft is not installed, or the model has an adapter.
        LayoutError: PEFT cannot wrap the FFNs' linears.
    """

    def __init__(
        self,
        tasks: Mapping[str, Splits],
        settings: CompareSettings,
        finder: Finder,
        bootstrap: CrossedBootstrap,
        *,
        progress: bool = False,
    ) -> None:
        self.tasks, self.settings, self.finder, self.bootstrap = tasks, settings, finder, bootstrap
        self.progress = progress
        self.seeds = range(settings.learned_seeds or settings.seeds)
        self.index = NeuronIndex.of(next(iter(tasks.values())).discovery.decoder.layout)
        if "selections" in settings.stages:
            decoder = next(iter(tasks.values())).discovery.decoder
            check_adapters(decoder, [kind for kind in settings.comparators if kind in ADAPTERS])
        self.profile, self.selected = cache(self._profile), cache(self._selected)

    def gain(self, task: str, steered: Steered) -> FloatArray:
        """The gain of a task's metric on test, [1 + resamples]."""
        splits = self.tasks[task]
        return self._values(splits.measure("test", steering=steered)) - self._values(splits.measure("test"))

    def _values(self, scores: Scores) -> FloatArray:
        return self.bootstrap.values(scores.task.name, scores.statistics, scores.task.aggregate)

    def _estimate(self, name: str, per_seed: Sequence[FloatArray], interval: str = "") -> dict[str, Any]:
        return estimate(name, self.bootstrap.over_seeds(per_seed), interval)

    # ------------------------------------------------------------------------------------ the main method's bank

    def _profile(self, task: str, name: str, seed: int) -> Profile:
        """The profile of a way of steering the main method's bank."""
        bank = self.finder.bank(task, self.settings.main, self.settings.fraction, seed)
        fit = replace(self.settings.fit, seed=seed)
        random_bank = bank.random(self.index, seed)
        inputs = self.tasks[task].steering_inputs(bank, random_bank, fit, progress=self.progress)
        return STEERING_METHODS[name].profile(inputs)

    def main_bank(self) -> dict[str, Any]:
        """Section "steering": the learned factors beside their baselines, the learned ones on the other tasks too."""
        return {"steering": [self._main_row(task, name) for task in self.tasks for name in STEERED]}

    def _main_row(self, task: str, name: str) -> dict[str, Any]:
        splits = self.tasks[task]
        base = splits.measure("test")
        if name == "base":
            return steering_row(self.bootstrap, name, base, [base for _ in self.seeds])
        profiles = [self.profile(task, name, seed) for seed in self.seeds]
        measured = [splits.measure("test", steering=profile) for profile in profiles]
        row = steering_row(self.bootstrap, name, base, measured)
        return row | self.elsewhere(task, profiles) if name == "hones" else row

    def strength(self) -> dict[str, Any]:
        """Section "strength": the learned profiles' offsets times each strength, on the other tasks too."""
        return {"strength": [self._strength_row(task, x) for task in self.tasks for x in self.settings.strengths]}

    def _strength_row(self, task: str, strength: float) -> dict[str, Any]:
        splits = self.tasks[task]
        profiles = [self.profile(task, "hones", seed) * strength for seed in self.seeds]
        values = [self._values(splits.measure("test", steering=profile)) for profile in profiles]
        value = {**self._estimate("value", values, "ci95"), "n": len(splits.test)}
        return {"task": task, "strength": strength, **value, **self.elsewhere(task, profiles)}

    def group_gain(self, task: str, banks: Mapping[int, Bank]) -> dict[str, Any]:
        """The gain on a task from factors for these neurons, {seed: bank}, that were learned on the task."""
        splits, fit = self.tasks[task], self.settings.fit
        gains = []
        for seed, bank in banks.items():
            profile = splits.learned("hones", bank, replace(fit, seed=seed), progress=self.progress)
            gains.append(self.gain(task, profile))
        return self._estimate("gain", gains, "ci95")

    # ---------------------------------------------------------------------------------------------- wrong routes

    def elsewhere(self, task: str, steered: Sequence[Steered]) -> dict[str, Any]:
        """A row's keys for what every other task gains, or loses, where it is steered with what `task` was to get."""
        return self._wrong_routes(self._gains_elsewhere(task, steered))

    def _gains_elsewhere(self, task: str, steered: Sequence[Steered]) -> dict[str, list[FloatArray]]:
        """The gain of each seed on every other task, from what was learned on `task`."""
        return {other: [self.gain(other, one) for one in steered] for other in self.tasks if other != task}

    def _wrong_routes(self, gains: Mapping[str, Sequence[FloatArray]]) -> dict[str, Any]:
        """A row's keys for what other tasks gain, or lose, where they are steered with this task's."""
        return {
            "elsewhere": {other: self._estimate("gain", of, "ci95") for other, of in gains.items()},
            **self._estimate("elsewhere_mean", [np.mean(of, axis=0) for of in zip(*gains.values(), strict=True)]),
        }

    # ------------------------------------------------------------------------------------------------ selections

    def _selected(self, task: str, name: str, seed: int) -> Steered:
        """The profile or adapter of a selection or comparator for a task, chosen on dev from the settings' grid."""
        settings, splits = self.settings, self.tasks[task]
        if name == NESTED_CHOICE:
            return max((self.selected(task, one, seed) for one in settings.selections), key=splits.dev_score)
        fit = replace(settings.fit, seed=seed)
        if name in ADAPTERS:
            grid = replace(settings.grid, lrs=settings.lora_lrs) if name == "lora" else settings.grid
            return splits.adapter_on_dev(name, fit, grid, progress=self.progress)
        bank = self.finder.bank(task, settings.main if name in COMPARATORS else name, settings.fraction, seed)
        inputs = splits.steering_inputs(bank, bank, fit, grid=settings.grid, progress=self.progress)
        return STEERING_METHODS[name if name in COMPARATORS else "hones"].profile(inputs)

    def selections(self) -> dict[str, Any]:
        """Section "selections": what each selection and comparator gains, task by task and on average."""
        names = [*self.settings.selections, *self.settings.comparators]
        work = [(task, name, seed) for task in self.tasks for name in names for seed in self.seeds]
        for cell in with_progress(work, "selections", show=self.progress):
            self.selected(*cell)
        measured = {name: {task: self._selection(task, name) for task in self.tasks} for name in names}
        first = self.settings.selection_reference or names[0]
        rows = [
            self._selection_row(task, measured[name][task], measured[first][task])
            for task in self.tasks
            for name in names
        ]
        return {"selections": {"reference": first, "rows": rows, "means": self._selection_means(measured, first)}}

    def _selection(self, task: str, name: str) -> "Selection":
        steered = [self.selected(task, name, seed) for seed in self.seeds]
        own = [self.gain(task, one) for one in steered]
        return Selection(name, steered, own, self._gains_elsewhere(task, steered))

    def _selection_row(self, task: str, selection: "Selection", reference: "Selection") -> dict[str, Any]:
        """One task's row, its intervals over seeds and test examples."""
        splits = self.tasks[task]
        base = self._values(splits.measure("test"))
        values = [base + gain for gain in selection.own]
        row = {
            "task": task,
            "method": selection.name,
            **self._estimate("value", values, "ci95"),
            **self._estimate("gain", selection.own),
            "by_seed": [float(of_seed[0]) for of_seed in values],
            "n": len(splits.test),
            "seeds": len(selection.own),
            **selection.size,
            "chosen": [_chosen(one) for one in selection.steered],
            **self._wrong_routes(selection.elsewhere),
        }
        if selection is not reference:
            differences = [mine - its for mine, its in zip(selection.own, reference.own, strict=True)]
            row |= self._estimate("over_reference", differences)
        return row

    def _selection_means(self, measured: Mapping[str, Mapping[str, "Selection"]], first: str) -> list[dict[str, Any]]:
        """A row for each selection: means over tasks, with resamples of tasks, seeds and test examples."""
        other = ~np.eye(len(self.tasks), dtype=bool)
        draws = self.bootstrap.tasks(other)
        own, elsewhere = {}, {}
        for name, of_task in measured.items():
            gains = np.stack([self._gain_of_each(of_task[task], task) for task in self.tasks], axis=1)
            own[name] = weighted(np.diagonal(gains, axis1=1, axis2=2), draws)
            elsewhere[name] = weighted(*mean_beside(gains, other, draws))
        rows = []
        for name, of_task in measured.items():
            row = {"method": name, "tasks": len(of_task), "seeds": len(self.seeds), **estimate("gain", own[name])}
            sizes = [selection.size for selection in of_task.values()]
            row |= {key: float(np.mean([size[key] for size in sizes])) for key in sizes[0]}
            row |= estimate("elsewhere_mean", elsewhere[name])
            if name != first:
                row |= estimate("over_reference", own[name] - own[first])
            if "ia3" in own and name != "ia3":
                row |= share("ia3_share", own[name], own["ia3"])
            rows.append(row)
        return rows

    def _gain_of_each(self, selection: "Selection", task: str) -> FloatArray:
        """The mean over seeds of what each measured task gains, [1 + resamples, tasks]."""
        gains = {**selection.elsewhere, task: selection.own}
        return np.stack([self.bootstrap.over_seeds(gains[measured]) for measured in self.tasks], axis=1)


@dataclass(frozen=True, eq=False)
class Selection:
    """A selection for one task: a profile or adapter for each seed, and the gains on test of each."""

    name: str
    steered: Sequence[Steered]
    own: Sequence[FloatArray]
    elsewhere: Mapping[str, Sequence[FloatArray]]
    """The gains on the other tasks."""

    @property
    def size(self) -> dict[str, float]:
        """Learned numbers ("parameters") and bytes of the file that holds them, means over seeds."""
        sizes = [size_of(steered) for steered in self.steered]
        return {key: float(np.mean([size[key] for size in sizes])) for key in sizes[0]}


def size_of(steered: Steered) -> dict[str, int]:
    """Learned numbers of a profile or adapter ("parameters") and bytes of its file."""
    if isinstance(steered, Adapter):
        return {"parameters": steered.parameters, "bytes": len(steered.serialized)}
    parameters = 1 if "factor" in steered.method else steered.num_neurons
    return {"parameters": parameters, "bytes": len(serialize_profile(steered))}


def _chosen(steered: Steered) -> dict[str, float]:
    """The choice on dev: learning rate, epoch and strength; or the one factor."""
    method = steered.method
    if "factor" in method:
        return {"factor": method["factor"]}
    return {"lr": method["lr"], "epoch": method["epoch"], "strength": method["chosen_on_dev"]["strength"]}


def share(name: str, gain: FloatArray, whole: FloatArray) -> dict[str, Any]:
    """A mean gain as a share of another: the ratio of the two, with the interval of the resamples' ratios.

    Nothing where the other is not positive; no interval where it is not in some resample, as a share of nothing, or of
    a loss, has no meaning.
    """
    if whole[0] <= 0:
        return {}
    row: dict[str, Any] = {name: float(gain[0] / whole[0])}
    return row | ({f"{name}_ci95": interval_of(gain / whole)} if (whole > 0).all() else {})


def steering_row(bootstrap: CrossedBootstrap, name: str, base: Scores, measured: Sequence[Scores]) -> dict[str, Any]:
    """A row of the steering table from one measurement per seed, all on the same examples as `base`."""
    task = base.task
    before = bootstrap.values(task.name, base.statistics, task.aggregate)
    values = [bootstrap.values(task.name, scores.statistics, task.aggregate) for scores in measured]
    value, gain = bootstrap.over_seeds(values), bootstrap.over_seeds([of_seed - before for of_seed in values])
    return {
        "task": task.name,
        "method": name,
        **estimate("value", value, "ci95"),
        **estimate("gain", gain),
        "n": base.n,
        "seeds": len(measured),
        "by_seed": [float(of_seed[0]) for of_seed in values],
    }
