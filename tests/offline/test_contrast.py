"""Contrast over tasks: equal to its plain twin, and what it chooses, refuses and does at the edges."""

from typing import Any

import numpy as np
import pytest
import reference
from hones_offline import attribute
from hones_offline.attribution.contrast import FLOOR, POOL_FACTOR, Contrast, contrasted, unit
from hones_offline.data.neurons import Bank, Importance, NeuronIndex
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from problems import problem

from hones_steer.errors import DataError

EIGHTHS = st.sampled_from([-1.0, 0.0, 0.125, 0.25, 0.5, 0.75, 1.0])  # few, so that ties are common; sums are exact
TASKS = hnp.arrays(np.float32, st.tuples(st.integers(2, 4), st.integers(1, 40)), elements=EIGHTHS)  # [tasks, N]


def importance(values: Any) -> Importance:
    """The importance of the neurons of one layer."""
    return Importance(NeuronIndex.dense((len(values),)), np.asarray(values, dtype=np.float32))


def chosen(
    own: Any, others: Any, contrast: Contrast, fraction: float, factor: float = POOL_FACTOR, floor: float = FLOOR
) -> list[int]:
    """The numbers of the contrasted bank's neurons."""
    tasks = [importance(values) for values in others]
    found = contrasted(importance(own), tasks, contrast, fraction, pool_factor=factor, floor=floor)
    return numbers(found.bank(fraction))


def numbers(bank: Bank) -> list[int]:
    return [neuron for _, neuron in bank.pairs()]


@given(TASKS, st.floats(0.01, 1), st.sampled_from(["max", "ratio"]), st.sampled_from([1, 1.5, 4]), st.floats(0.01, 2))
def test_a_contrasted_bank_equals_its_plain_twin(
    tasks: Any, fraction: float, contrast: Any, factor: float, floor: float
) -> None:
    if (tasks <= 0).all(axis=1).any():
        return
    own, *others = tasks
    expected = reference.contrasted_bank(own.tolist(), [o.tolist() for o in others], contrast, fraction, factor, floor)
    if not expected:
        with pytest.raises(DataError, match="no neuron is more important to this task than to the others"):
            chosen(own, others, contrast, fraction, factor, floor)
        return
    assert chosen(own, others, contrast, fraction, factor, floor) == expected


@pytest.mark.parametrize("contrast", ["max", "ratio"])
def test_importances_of_many_neurons_in_several_layers_are_contrasted_as_the_twin_does(contrast: Contrast) -> None:
    rng = np.random.default_rng(0)
    index = NeuronIndex.dense((700, 500, 800))
    tasks = [Importance(index, rng.standard_t(2, index.size).astype(np.float32)) for _ in range(4)]
    own, *others = tasks
    expected = reference.contrasted_bank(own.values.tolist(), [o.values.tolist() for o in others], contrast, 0.02)
    found = contrasted(own, others, contrast, 0.02).bank(0.02)
    assert found.digest == index.bank(np.array(expected)).digest
    assert (found.size, len(found)) == (40, 3)
    assert found.digest != own.bank(0.02).digest  # or the test says nothing


@given(TASKS, st.floats(0.01, 1))
def test_a_ratio_bank_is_as_large_as_the_plain_one_and_lies_in_its_pool(tasks: Any, fraction: float) -> None:
    if (tasks <= 0).all(axis=1).any():
        return
    own, *others = tasks
    found = chosen(own, others, "ratio", fraction)
    count = max(1, round(fraction * len(own)))
    assert len(found) == min(count, (own > 0).sum())
    assert set(found) <= set(importance(own).top(4 * count).tolist())


@given(TASKS, st.floats(0.01, 1), st.sampled_from(["max", "ratio"]), st.integers(-10, 10))
def test_neither_the_scale_of_a_task_nor_the_order_of_the_others_matters(
    tasks: Any, fraction: float, contrast: Any, power: int
) -> None:
    if (tasks <= 0).all(axis=1).any():
        return
    own, *others = tasks
    scaled = [others[-1] * np.float32(2.0**power), *others[:-1]]
    try:
        expected = chosen(own, others, contrast, fraction)
    except DataError:
        return
    assert chosen(own, scaled, contrast, fraction) == expected


def test_unit_importance_is_the_positive_part_over_the_mean_of_the_top_hundredth() -> None:
    values = [-3.0, *[0.5] * 197, 3.0, 5.0]
    found = unit(importance(values))
    np.testing.assert_array_equal(found, [0.0, *[0.125] * 197, 0.75, 1.25])


def test_a_neuron_that_all_tasks_need_is_passed_over() -> None:
    own, other = [8.0, 4.0, 2.0, 1.0], [8.0, 0.0, 2.0, 0.5]
    for contrast in ("max", "ratio"):
        assert chosen(own, [other], contrast, 0.25) == [1]  # neuron 0 is the first without contrast


def test_a_neuron_outside_the_pool_is_never_chosen_by_ratio() -> None:
    own, other = [8.0, 7.0, 6.0, 1.0], [8.0, 8.0, 8.0, 0.0]
    assert chosen(own, [other], "ratio", 0.25, factor=3) == [0]
    assert chosen(own, [other], "ratio", 0.25, factor=4) == [3]


def test_the_floor_is_a_share_of_the_importance_of_the_pools_last() -> None:
    """The second neuron is nobody else's: 8 / (4 + f) against 4 / (0 + f) with f = floor · 4, in units of 1/8."""
    own, other = [8.0, 4.0, 0.0, 0.0], [4.0, 0.0, 8.0, 0.0]
    assert chosen(own, [other], "ratio", 0.25, factor=2, floor=0.9) == [1]
    assert chosen(own, [other], "ratio", 0.25, factor=2, floor=1.1) == [0]


def test_every_other_task_counts() -> None:
    own, one, two = [4.0, 4.0, 4.0, 0.0], [4.0, 0.0, 0.0, 0.0], [0.0, 4.0, 0.0, 0.0]
    for contrast in ("max", "ratio"):
        assert chosen(own, [one, two], contrast, 0.25) == [2]
        assert chosen(own, [one], contrast, 0.25) == [1]  # ties go to the lower neuron


def test_fewer_important_neurons_than_the_pool_and_than_the_bank_are_taken_as_they_are() -> None:
    own, other = [0.0, 3.0, 1.0, -1.0], [0.0, 3.0, 0.0, 3.0]
    assert chosen(own, [other], "ratio", 0.25) == [2]
    assert chosen(own, [other], "ratio", 1) == [1, 2]


def test_a_quotient_beyond_float32_is_the_largest_number_it_has() -> None:
    own, other = [1.0, 1e-39], [0.0, 1.0]
    found = contrasted(importance(own), [importance(other)], "ratio", 0.5)
    assert found.values[0] == np.finfo(np.float32).max
    assert numbers(found.bank(0.5)) == [0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"others": []}, "a contrast compares tasks; give the importance of at least one other task"),
        ({"others": [importance([1, 2, 3])]}, "other neurons; find it on the same model"),
        (
            {"others": [importance([1, 2]), importance([0, -1])]},
            "task 2 to contrast with: no neuron has a positive importance",
        ),
        ({"own": importance([0, 0])}, "^no neuron has a positive importance; use more examples or more heads"),
        (
            {"others": [importance([2, 4])], "contrast": "max"},
            "no neuron is more important to this task than to the others; choose contrast 'ratio'",
        ),
        ({"contrast": "min"}, "contrast must be one of max, ratio, not 'min'"),
        ({"top_fraction": 0}, r"top_fraction must lie in \(0, 1\], not 0"),
        ({"pool_factor": 0.5}, "pool_factor must be 1 or more, not 0.5"),
        ({"pool_factor": float("nan")}, "pool_factor must be 1 or more, not nan"),
        ({"floor": 0}, "floor must be positive, not 0"),
    ],
)
def test_what_cannot_be_contrasted_is_refused(change: dict[str, Any], message: str) -> None:
    arguments = {"own": importance([1, 2]), "others": [importance([2, 1])], "contrast": "ratio", "top_fraction": 0.5}
    with pytest.raises(DataError, match=message):
        contrasted(**{**arguments, **change})


@pytest.mark.parametrize("method", ["hones", "grad_act"])
def test_an_attribution_against_others_keeps_its_importance_and_takes_the_contrasted_bank(
    tmp_path: Any, method: str
) -> None:
    p = problem("llama", "text")
    options = {"top_fraction": 0.1, "head_metric": "logprob", "method": method}
    own, other = (
        attribute(p.model, p.processor, p.task, examples, **options, run_dir=tmp_path / name)
        for name, examples in {"own": p.examples[:3], "other": p.examples[3:]}.items()
    )
    for contrast in ("ratio", "max"):
        found = attribute(
            p.model,
            p.processor,
            p.task,
            p.examples[:3],
            **options,
            run_dir=tmp_path / "own",
            against=[other.importance],
            contrast=contrast,
        )
        np.testing.assert_array_equal(found.importance, own.importance)
        expected = contrasted(own.importance, [other.importance], contrast, 0.1).bank(0.1)
        assert found.bank.digest == expected.digest != own.bank.digest


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"against": [importance(np.ones(288))]}, "in `against` has other neurons than the model; find it on the same"),
        ({"contrast": "mean"}, "contrast must be one of max, ratio, not 'mean'"),
    ],
)
def test_an_attribution_against_what_cannot_be_compared_is_refused_before_any_work(
    tmp_path: Any, change: dict[str, Any], message: str
) -> None:
    p = problem("llama", "text", count=2)
    with pytest.raises(DataError, match=message):
        attribute(p.model, p.processor, p.task, p.examples, run_dir=tmp_path / "run", **change)
    assert list(tmp_path.iterdir()) == []
