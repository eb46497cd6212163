"""The finding study: means over tasks, harm to bystanders, harm at equal own drop, by numbers that can be checked."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import reference
from hones_offline.comparison.estimates import mean_beside, weighted
from hones_offline.comparison.finding import Cell, Finding, Masked, MeasuredTask, bystanders, interpolated
from hones_offline.data.metrics import CrossedBootstrap, FloatArray, mean_of_rows

from hones_steer.errors import DataError

TASKS = ("a", "b", "c", "d")
BASES = {"a": 1.0, "b": 0.5, "c": 0.8, "d": 0.0}


def finding(drops: Mapping[Cell, Any], contrast: Any, seeds: int = 2) -> Finding:
    """A study of four tasks whose drops [own task][measured task] are exact, but for a seed's shift of ±0.1."""
    bootstrap = CrossedBootstrap(resamples=200)
    beside = bystanders(TASKS, contrast)
    shifts = np.linspace(-0.1, 0.1, seeds) if seeds > 1 else np.zeros(1)

    def mask(task: str, cell: Cell) -> Masked:
        row = np.array(drops[cell])[TASKS.index(task)]
        return Masked(8.0, np.broadcast_to((row + shifts[:, None])[..., None], (seeds, 4, 201)))

    return Finding({task: MeasuredTask(BASES[task], 9, beside[task]) for task in TASKS}, mask, bootstrap)


MATRIX = [[0.8, 0.1, 0.2, 0.3], [0.0, 0.4, 0.2, 0.4], [0.3, 0.1, 0.7, 0.2], [0.1, 0.1, 0.1, 0.5]]
CELL = Cell("dvp", 0.01, "zero")


def test_bystanders_took_no_part_in_the_contrast() -> None:
    assert bystanders(TASKS, ["a", "b"]) == {"a": ["c", "d"], "b": ["c", "d"], "c": ["d"], "d": ["c"]}
    assert bystanders(TASKS, []) == {task: [other for other in TASKS if other != task] for task in TASKS}
    assert bystanders(TASKS, None) == {task: [] for task in TASKS}
    assert bystanders(TASKS, ["elsewhere", "a", "b", "c"]) == {"a": ["d"], "b": ["d"], "c": ["d"], "d": []}


def test_a_row_is_of_one_task() -> None:
    section = finding({CELL: MATRIX}, ["a", "b"]).section([CELL], [], None)
    assert [row["task"] for row in section["rows"]] == list(TASKS)
    row = section["rows"][0]
    assert row["own_drop"] == pytest.approx(0.8)
    assert row["bystander_drop"] == pytest.approx(0.25)
    assert row["selectivity"] == pytest.approx(0.8 - 0.2)
    assert row["relative_drop"] == pytest.approx(0.8)
    assert row["other_drops"] == pytest.approx({"b": 0.1, "c": 0.2, "d": 0.3})
    assert row["by_seed"]["own_drop"] == pytest.approx([0.7, 0.9])
    assert row["by_seed"]["bystander_drop"] == pytest.approx([0.15, 0.35])
    assert row["by_seed"]["selectivity"] == pytest.approx([0.6, 0.6])
    assert row["by_seed"]["other_drops"]["c"] == pytest.approx([0.1, 0.3])
    assert row["own_drop_ci95"] == pytest.approx([0.7, 0.9])  # two seeds, a quarter of the resamples draws one alone
    assert (row["seeds"], row["n"], row["neurons"]) == (2, 9, 8)
    assert section["rows"][1]["relative_drop"] == pytest.approx(0.8)
    assert section["rows"][3]["relative_drop"] is None


def test_means_are_over_tasks_and_differences_are_paired() -> None:
    other = Cell("ma", 0.01, "zero")
    shifted = (np.array(MATRIX) + np.diag([0.1] * 4)).tolist()
    section = finding({CELL: MATRIX, other: shifted}, ["a", "b"]).section([CELL, other], [], "dvp")
    row, compared = section["means"]
    assert row["own_drop"] == pytest.approx((0.8 + 0.4 + 0.7 + 0.5) / 4)
    assert row["bystander_drop"] == pytest.approx((0.25 + 0.3 + 0.2 + 0.1) / 4)
    assert row["relative_drop"] == pytest.approx((0.8 + 0.8 + 0.875) / 3)
    assert row["selectivity"] == pytest.approx(0.6 - (0.2 + 0.2 + 0.2 + 0.1) / 4)
    low, high = row["own_drop_ci95"]
    assert low < 0.5
    assert high > 0.7
    difference = compared["difference"]
    assert difference["own_drop"] == pytest.approx(0.1)
    assert difference["own_drop_ci95"] == pytest.approx([0.1, 0.1])  # the same tasks and seeds on both sides
    assert difference["bystander_drop_ci95"] == pytest.approx([0, 0])
    assert row["difference"]["selectivity"] == 0


def test_without_bystanders_there_is_no_harm_to_them() -> None:
    section = finding({CELL: MATRIX}, None).section([CELL], [0.5], "dvp")
    assert {row["bystander_drop"] for row in (*section["rows"], *section["means"])} == {None}
    assert section["means"][0]["own_drop"] == pytest.approx(0.6)
    assert "bystander_drop" not in section["means"][0]["difference"]
    assert section["matched"] == []


def test_a_difference_needs_the_reference_at_the_same_size() -> None:
    larger = Cell("ma", 0.02, "zero")
    section = finding({CELL: MATRIX, larger: MATRIX}, ["a"]).section([CELL, larger], [0.3], "dvp")
    assert ["difference" in row for row in section["means"]] == [True, False]
    assert [row["difference"] for row in section["matched"]] == pytest.approx([0, 0])  # curves need no equal sizes


def test_harm_is_compared_at_equal_own_drop() -> None:
    """By hand: from (0, 0) through (.4, .1) and (.8, .5), own drop .6 is half-way between them: .3."""

    def costs(own: float, beside: float) -> Any:
        return [[own if t == u else beside for u in TASKS] for t in TASKS]

    sizes = {0.001: costs(0.4, 0.1), 0.01: costs(0.8, 0.5)}
    drops = {Cell("ma", fraction, "mean"): matrix for fraction, matrix in sizes.items()}
    drops |= {Cell("dvp", 0.01, "mean"): costs(0.7, 0.7)}
    study = finding(drops, ["a"], seeds=1)
    rows = study.section(list(reversed(drops)), [0.2, 0.4, 0.6, 0.75, 0.9], "dvp")["matched"]
    found = {(row["method"], row["level"]): row for row in rows}
    assert [found["ma", level]["bystander_drop"] for level in (0.2, 0.4, 0.6, 0.75)] == pytest.approx(
        [0.05, 0.1, 0.3, 0.45]
    )
    assert [found["dvp", level]["bystander_drop"] for level in (0.2, 0.4, 0.6)] == pytest.approx([0.2, 0.4, 0.6])
    assert found["ma", 0.6]["difference"] == pytest.approx(-0.3)
    assert found["ma", 0.6]["difference_ci95"] == pytest.approx([-0.3, -0.3])
    assert found["ma", 0.6]["bystander_drop_ci95"] == pytest.approx([0.3, 0.3])
    assert [found["ma", 0.75][name] for name in ("difference", "difference_ci95")] == [None, None]
    assert [found["ma", 0.9][name] for name in ("bystander_drop", "bystander_drop_ci95", "reached")] == [None, None, 0]
    assert {row["ablation"] for row in rows} == {"mean"}


def test_a_level_that_only_some_resamples_reach_says_how_many() -> None:
    study = finding({CELL: MATRIX}, ["a", "b"])
    (row,) = study.section([CELL], [0.58], None)["matched"]
    assert 0.3 < row["reached"] < 0.8
    assert row["bystander_drop_ci95"][0] <= row["bystander_drop"] <= row["bystander_drop_ci95"][1]


# ------------------------------------------------------------------------------------------ the slow, plain twins


def test_interpolation_equals_walking_along_the_curve() -> None:
    rng = np.random.default_rng(0)
    own, beside = rng.uniform(-0.2, 1, (4, 60)), rng.uniform(-0.2, 1, (4, 60))  # curves that also turn back
    for level in (0.05, 0.5, 0.7, 0.95):
        found = interpolated(list(zip(own, beside, strict=True)), level)
        walked = [
            reference.drop_at(list(zip(*curve, strict=True)), level) for curve in zip(own.T, beside.T, strict=True)
        ]
        expected = [np.nan if drop is None else drop for drop in walked]
        np.testing.assert_allclose(found, expected, rtol=1e-9)
    assert np.isnan(found).any()
    assert not np.isnan(found).all()


def test_weighted_means_equal_means_over_the_drawn_tasks_one_by_one() -> None:
    rng = np.random.default_rng(0)
    matrix = rng.normal(size=(301, 4, 4))
    related = np.array([[other in beside for other in TASKS] for beside in bystanders(TASKS, ["a"]).values()])
    draws = CrossedBootstrap(resamples=300).tasks(related)
    assert (draws[0] == 1).all()
    beside, owners = mean_beside(matrix, related, draws)
    own, others = weighted(np.diagonal(matrix, axis1=1, axis2=2), draws), weighted(beside, owners)
    for at, drawn in enumerate(draws.astype(int)):
        repeated = np.repeat(np.arange(4), drawn).tolist()
        assert (own[at], others[at]) == pytest.approx(reference.means_of_drawn(matrix[at], related, repeated))


def test_tasks_are_drawn_again_until_two_of_them_are_related() -> None:
    bootstrap = CrossedBootstrap(resamples=500)
    draws = bootstrap.tasks(~np.eye(2, dtype=bool))
    assert (draws == 1).all()  # of two tasks every resample needs both
    draws = bootstrap.tasks(~np.eye(5, dtype=bool))
    assert (draws.sum(1) == 5).all()
    assert (draws > 0).sum(1).min() == 2
    assert draws[1:].var() == pytest.approx(0.8, rel=0.1)
    np.testing.assert_array_equal(draws, CrossedBootstrap(resamples=500).tasks(~np.eye(5, dtype=bool)))
    with pytest.raises(DataError, match="no task is related to another"):
        bootstrap.tasks(np.eye(3, dtype=bool))


def test_an_interval_of_a_mean_over_tasks_is_as_wide_as_tasks_seeds_and_examples_make_it() -> None:
    """Independent parts of the drop of each task, each seed and each example: their variances add up."""
    rng = np.random.default_rng(0)
    tasks, seeds, n = 6, 5, 40
    bootstrap = CrossedBootstrap(resamples=4000)
    names = [str(number) for number in range(tasks)]
    of_task, of_seed = np.linspace(-1, 1, tasks), np.linspace(-0.5, 0.5, seeds)
    values = [bootstrap.values(name, rng.normal(size=(n, 1)), mean_of_rows) for name in names]

    def mask(task: str, _cell: Cell) -> Masked:
        own = names.index(task)
        drops: FloatArray = np.zeros((seeds, tasks, 4001))
        drops[:, own] = values[own] + of_task[own] + of_seed[:, None]
        return Masked(1.0, drops)

    study = Finding({name: MeasuredTask(1.0, n, ()) for name in names}, mask, bootstrap)
    (row,) = study.section([CELL], [], None)["means"]
    low, high = row["own_drop_ci95"]
    points = np.array([value[0] for value in values]) + of_task
    variance = points.var() / tasks + of_seed.var() / seeds + np.mean([v[1:].var() for v in values]) / tasks
    assert row["own_drop"] == pytest.approx(points.mean())
    assert high - low == pytest.approx(2 * 1.96 * np.sqrt(variance), rel=0.12)
