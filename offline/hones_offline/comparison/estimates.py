"""Quantities of `CrossedBootstrap` as a summary writes them, and their means over tasks."""

from typing import Any

import numpy as np
import numpy.typing as npt

from hones_offline.data.metrics import FloatArray, interval_of


def estimate(name: str, quantity: FloatArray | None, interval: str = "") -> dict[str, Any]:
    """A quantity as {name: measured value, `interval`: its 95% interval}, by default name_ci95; nulls for None."""
    interval = interval or f"{name}_ci95"
    if quantity is None:
        return {name: None, interval: None}
    return {name: float(quantity[0]), interval: interval_of(quantity)}


def mean_beside(matrix: FloatArray, related: npt.NDArray[np.bool_], draws: FloatArray) -> tuple[FloatArray, FloatArray]:
    """The mean over each task's related tasks, as often as each is drawn, and how often that task then counts.

    Args:
        matrix: drops or gains [1 + R, own task, measured task].
        related: which measured tasks (columns) are averaged for each own task (row), [T, T].
        draws: how often each resample draws each task, [1 + R, T].

    Returns:
        The means [1 + R, T], 0 where none of a task's related tasks is drawn, and each own task's weight [1 + R, T]:
        how often it is drawn, but 0 there.
    """
    weights = draws[:, None, :] * related
    total = weights.sum(-1)
    mean = (weights * matrix).sum(-1) / np.where(total > 0, total, 1)
    return mean, draws * (total > 0)


def weighted(values: FloatArray, weights: FloatArray) -> FloatArray:
    """The weighted mean over tasks, [1 + R], of values [1 + R, T]."""
    mean: FloatArray = (values * weights).sum(1) / weights.sum(1)
    return mean
