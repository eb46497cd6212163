"""The finding study: what the banks of each method cost their own task, the other tasks and the bystanders.

A bystander is a measured task that took no part in the contrast and is not the bank's own (docs/methods.md). Here the
drops of every bank are made into rows per task, means over tasks, differences to a reference method, and the harm to
bystanders at equal own drop. Drops are quantities of `CrossedBootstrap`, [1 + R]: the measured value, then resamples.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from hones_offline.comparison.estimates import estimate, mean_beside, weighted
from hones_offline.data.metrics import CrossedBootstrap, FloatArray

CurvePoint = tuple[FloatArray, FloatArray]
"""The mean own drop and bystander drop of banks of one size, over the tasks that have bystanders."""
MEASURES = ("own_drop", "bystander_drop", "selectivity")


class Cell(NamedTuple):
    """Banks of one method and size, under one ablation."""

    method: str
    fraction: float
    ablation: str


class Masked(NamedTuple):
    """Drops under a task's banks of one cell, one for each seed."""

    neurons: float
    """The banks' mean size."""
    drops: FloatArray
    """The drop of every measured task, [seeds, tasks, 1 + R]."""


@dataclass(frozen=True)
class MeasuredTask:
    """A task that has banks and is measured."""

    base: float
    """The untouched model's metric on its n test examples."""
    n: int
    bystanders: Sequence[str]


def bystanders(tasks: Sequence[str], contrast_tasks: Sequence[str] | None) -> dict[str, list[str]]:
    """The bystanders of each task's banks; none where all other tasks enter the contrast (None)."""
    outside = [] if contrast_tasks is None else [task for task in tasks if task not in contrast_tasks]
    return {task: [other for other in outside if other != task] for task in tasks}


def bank_row(
    bootstrap: CrossedBootstrap, tasks: Mapping[str, MeasuredTask], task: str, masked: Masked
) -> dict[str, Any]:
    """The drops of a task and of the others under its banks, with intervals over seeds and test examples.

    The relative drop is the own drop as a share of the untouched model's metric, None where that is 0.
    """
    of = dict(zip(tasks, masked.drops.swapaxes(0, 1), strict=True))  # task -> [seeds, 1 + R]
    own, facts = of.pop(task), tasks[task]
    selectivity = own - np.mean(list(of.values()), axis=0)
    row: dict[str, Any] = {"task": task, "neurons": masked.neurons, "seeds": len(own), "n": facts.n}
    row |= estimate("own_drop", bootstrap.over_seeds(list(own)))
    row |= estimate("selectivity", bootstrap.over_seeds(list(selectivity)))
    row["relative_drop"] = row["own_drop"] / facts.base if facts.base else None
    row["other_drops"] = {other: float(bootstrap.over_seeds(list(drops))[0]) for other, drops in of.items()}
    row["by_seed"] = {"own_drop": own[:, 0].tolist(), "selectivity": selectivity[:, 0].tolist()}
    return row


@dataclass(frozen=True)
class Means:
    """Means over tasks of the drops under the banks of a cell."""

    neurons: float
    relative_drop: float | None
    measures: Mapping[str, FloatArray]
    """Those of `MEASURES` that there are, as quantities: without bystanders no "bystander_drop"."""
    curve_point: CurvePoint | None
    """None if no task has bystanders."""


class Finding:
    """Section "finding" of a summary, from the drops under every bank.

    `mask` gives what masking a task's banks of a cell does to every task, in the order of `tasks`.
    """

    def __init__(
        self,
        tasks: Mapping[str, MeasuredTask],
        mask: Callable[[str, Cell], Masked],
        bootstrap: CrossedBootstrap,
    ) -> None:
        self.tasks, self.mask, self.bootstrap = tasks, mask, bootstrap
        self._other = ~np.eye(len(tasks), dtype=bool)
        self._bystanding = np.array([[other in facts.bystanders for other in tasks] for facts in tasks.values()])
        self.has_bystanders = bool(self._bystanding.any())
        self._draws = bootstrap.tasks(self._bystanding if self.has_bystanders else self._other)

    def section(self, cells: Sequence[Cell], levels: Sequence[float], reference: str | None) -> dict[str, Any]:
        """The whole section; a mean has a difference where the reference method has banks of the same size."""
        rows: list[dict[str, Any]] = []
        means: dict[Cell, Means] = {}
        for cell in cells:
            masked = {task: self.mask(task, cell) for task in self.tasks}
            of_cell = [self._row(task, cell, masked[task]) for task in self.tasks]
            means[cell] = self._means([masked[task].drops for task in self.tasks], of_cell)
            rows += of_cell
        order = list(self.tasks)
        return {
            "bystanders": {task: list(facts.bystanders) for task, facts in self.tasks.items()},
            "reference": reference,
            "rows": sorted(rows, key=lambda row: order.index(row["task"])),
            "means": [self._mean_row(cell, means, reference) for cell in cells],
            "matched": self._matched_rows(means, levels, reference),
        }

    def _row(self, task: str, cell: Cell, masked: Masked) -> dict[str, Any]:
        """`bank_row` of one task's banks, with what they cost the bystanders and each other task seed by seed."""
        row = {**cell._asdict(), **bank_row(self.bootstrap, self.tasks, task, masked)}
        of = dict(zip(self.tasks, masked.drops.swapaxes(0, 1), strict=True))  # task -> [seeds, 1 + R]
        row["by_seed"]["other_drops"] = {other: of[other][:, 0].tolist() for other in row["other_drops"]}
        bystander_drop = None
        if beside := [of[other] for other in self.tasks[task].bystanders]:
            per_seed = np.mean(beside, axis=0)
            bystander_drop = self.bootstrap.over_seeds(list(per_seed))
            row["by_seed"]["bystander_drop"] = per_seed[:, 0].tolist()
        return row | estimate("bystander_drop", bystander_drop)

    def _means(self, drops: Sequence[FloatArray], rows: Sequence[Mapping[str, Any]]) -> Means:
        """The means over tasks, with resamples of tasks, seeds and test examples."""
        over_seeds = self.bootstrap.over_seeds
        matrix = np.stack(  # [1 + R, own task, measured task]
            [np.stack([over_seeds(list(of)) for of in own.swapaxes(0, 1)], axis=1) for own in drops], axis=1
        )
        own = np.diagonal(matrix, axis1=1, axis2=2)
        other, owners = mean_beside(matrix, self._other, self._draws)
        measures = {"own_drop": weighted(own, self._draws), "selectivity": weighted(own - other, owners)}
        curve_point = None
        if self.has_bystanders:
            beside, owners = mean_beside(matrix, self._bystanding, self._draws)
            measures["bystander_drop"] = weighted(beside, owners)
            curve_point = weighted(own, owners), measures["bystander_drop"]
        shares = [row["relative_drop"] for row in rows if row["relative_drop"] is not None]
        neurons = float(np.mean([row["neurons"] for row in rows]))
        return Means(neurons, float(np.mean(shares)) if shares else None, measures, curve_point)

    def _mean_row(self, cell: Cell, means: Mapping[Cell, Means], reference: str | None) -> dict[str, Any]:
        """Means over tasks, and the differences to the reference method."""
        here, there = means[cell], means.get(cell._replace(method=reference)) if reference else None
        row: dict[str, Any] = {**cell._asdict(), "neurons": here.neurons, "relative_drop": here.relative_drop}
        for name in MEASURES:
            row |= estimate(name, here.measures.get(name))
        if there is not None:
            row["difference"] = {}
            for name, measure in here.measures.items():
                row["difference"] |= estimate(name, measure - there.measures[name])
        return row

    def _matched_rows(
        self, means: Mapping[Cell, Means], levels: Sequence[float], reference: str | None
    ) -> list[dict[str, Any]]:
        """The bystanders' drop of each method at each level of own drop, and the difference to the reference's."""
        curves: dict[tuple[str, str], list[CurvePoint]] = {}
        for cell, mean in sorted(means.items(), key=lambda item: item[0].fraction):
            if mean.curve_point:
                curves.setdefault((cell.method, cell.ablation), []).append(mean.curve_point)
        rows = []
        for method, ablation in curves:
            for level in levels:
                beside = interpolated(curves[method, ablation], level)
                row = {"method": method, "ablation": ablation, "level": level, **_reached("bystander_drop", beside)}
                row["reached"] = float(np.isfinite(beside[1:]).mean())
                if reference is not None:
                    row |= _reached("difference", beside - interpolated(curves[reference, ablation], level))
                rows.append(row)
        return rows


def interpolated(curve: Sequence[CurvePoint], level: float) -> FloatArray:
    """The bystanders' drop at an own drop (`level`, above 0), [1 + R], on straight lines through (0, 0) and the curve.

    The curve has a point for each size of bank, the smallest first. Taken is the first line that reaches the level; NaN
    where none does.
    """
    own, beside = (np.stack([np.zeros_like(curve[0][0]), *of]) for of in zip(*curve, strict=True))
    reaches = own >= level
    end = np.maximum(reaches.argmax(0), 1)  # where nothing reaches it, any
    at = np.arange(own.shape[1])
    rise = np.where(reaches.any(0), own[end, at] - own[end - 1, at], 1)
    share = (level - own[end - 1, at]) / rise
    drop = beside[end - 1, at] + share * (beside[end, at] - beside[end - 1, at])
    return np.where(reaches.any(0), drop, np.nan)


def _reached(name: str, quantity: FloatArray) -> dict[str, Any]:
    """`estimate` of a quantity that may be NaN: nulls if the measured value is, an interval over the others."""
    if np.isnan(quantity[0]):
        return estimate(name, None)
    return estimate(name, quantity[np.isfinite(quantity)])
