"""Parts that the benchmarks share: intervals that hold what they promise, rounds that take turns."""

import importlib
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def common(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    return importlib.import_module("common")


def probability(n: int, k: int) -> float:
    """Probability of the median to be from the k-th smallest of n values to the k-th largest, through all cases."""
    cases = list(itertools.product((False, True), repeat=n))
    return sum(k <= sum(below) <= n - k for below in cases) / len(cases)


@pytest.mark.parametrize("n", [6, 7, 8, 9, 12, 15])
def test_an_interval_is_the_narrowest_that_holds_the_median_with_95_percent(common: Any, n: int) -> None:
    values = [float(i) for i in range(n)]
    found = common.median_interval("x", values[::-1])
    k = int(found["x_low"]) + 1
    assert found["x_high"] == values[-k]
    assert found["x"] == (n - 1) / 2
    assert probability(n, k) >= 0.95 > probability(n, k + 1)


def test_fewer_rounds_have_no_interval(common: Any) -> None:
    with pytest.raises(ValueError, match="empty"):
        common.median_interval("x", [1.0] * (common.LEAST_ROUNDS - 1))


@pytest.mark.parametrize(
    ("seconds", "options", "repeats"), [(0.0, {}, 6), (0.0, {"least": 2}, 2), (600.0, {"most": 7}, 7)]
)
def test_rounds_take_turns(common: Any, seconds: float, options: dict[str, int], repeats: int) -> None:
    order: list[str] = []

    def run(variant: str) -> int:
        order.append(variant)
        return len(order)

    found: dict[str, Sequence[int]] = common.in_turn(["a", "b", "c"], run, seconds, **options)
    assert order[:9] == (["a", "b", "c", "b", "c", "a", "c", "a", "b"])[: 3 * repeats]
    assert {variant: len(rounds) for variant, rounds in found.items()} == dict.fromkeys("abc", repeats)
    assert found["a"][1] == 6
