"""Banks: the most important share of all neurons, and random banks of the same shape."""

import numpy as np
import pytest
from hones_offline.data.neurons import Bank, Importance, NeuronIndex
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from tiny_models import llama

from hones_steer.errors import DataError
from hones_steer.layout import find_layout

IMPORTANCE = hnp.arrays(
    np.float32,
    st.tuples(st.integers(1, 4), st.integers(1, 9)),
    elements=st.sampled_from([-1.0, 0.0, 0.25, 0.5, 0.75, 1.0]),  # few values, so that ties are common
)
FRACTIONS = st.floats(0, 1, exclude_min=True)


def select_bank(importance, fraction):
    """The bank of an importance given as [L, I]."""
    index = NeuronIndex.dense((importance.shape[1],) * importance.shape[0])
    return Importance(index, importance.reshape(-1)).bank(fraction)


def as_lists(bank):
    return {layer: neurons.tolist() for layer, neurons in bank.items()}


def test_the_share_is_global_so_one_layer_can_have_all_and_another_none():
    importance = np.array([[1, 2, 3, 4], [10, 30, 40, 20], [5, 6, 7, 8]], dtype=np.float32)
    assert as_lists(select_bank(importance, 4 / 12)) == {1: [0, 1, 2, 3]}
    assert as_lists(select_bank(importance, 6 / 12)) == {1: [0, 1, 2, 3], 2: [2, 3]}
    assert as_lists(select_bank(importance, 1)) == {layer: [0, 1, 2, 3] for layer in range(3)}


def test_ties_go_to_the_lower_layer_then_the_lower_neuron():
    importance = np.ones((2, 3), dtype=np.float32)
    assert as_lists(select_bank(importance, 2 / 6)) == {0: [0, 1]}
    assert as_lists(select_bank(importance, 4 / 6)) == {0: [0, 1, 2], 1: [0]}


def test_neurons_without_positive_importance_are_left_out_though_more_were_asked_for():
    importance = np.array([[0, 2, -3], [0, 0, 1]], dtype=np.float32)
    assert as_lists(select_bank(importance, 1)) == {0: [1], 1: [2]}


def test_a_tiny_share_is_at_least_one_neuron():
    importance = np.array([[1, 2], [4, 3]], dtype=np.float32)
    assert as_lists(select_bank(importance, 1e-9)) == {1: [0]}


@pytest.mark.parametrize("fraction", [0, -0.1, 1.001, float("nan"), float("inf")])
def test_a_share_outside_0_to_1_is_refused(fraction):
    with pytest.raises(DataError, match=r"top_fraction must lie in \(0, 1\], not"):
        select_bank(np.ones((2, 3), dtype=np.float32), fraction)


def test_no_positive_importance_is_an_error_with_its_remedy():
    with pytest.raises(DataError, match="no neuron has a positive importance; use more examples or more heads"):
        select_bank(np.zeros((2, 3), dtype=np.float32), 0.5)


@given(IMPORTANCE, FRACTIONS)
def test_a_bank_holds_the_best_neurons_and_as_many_as_asked_for(importance, fraction):
    if (importance <= 0).all():
        return
    bank = select_bank(importance, fraction)
    inside = np.zeros(importance.shape, dtype=bool)
    for layer, neurons in bank.items():
        assert neurons.dtype == np.int32
        assert (np.diff(neurons) > 0).all()
        inside[layer, neurons] = True
    assert list(bank) == sorted(bank)
    wanted = max(1, round(fraction * importance.size))
    assert bank.size == inside.sum() == min(wanted, (importance > 0).sum())
    assert importance[inside].min() > 0
    assert importance[inside].min() >= importance[~inside].max(initial=-np.inf) or bank.size < wanted


@given(IMPORTANCE, FRACTIONS, FRACTIONS)
def test_a_smaller_bank_lies_inside_a_larger_one(importance, one, other):
    if (importance <= 0).all():
        return
    small, large = (select_bank(importance, fraction) for fraction in sorted((one, other)))
    for layer, neurons in small.items():
        assert set(neurons.tolist()) <= set(large[layer].tolist())


@given(
    st.dictionaries(st.integers(0, 5), st.integers(1, 20), min_size=1),
    st.integers(20, 60),
    st.integers(0, 2**32 - 1),
)
def test_a_random_bank_has_the_same_shape_and_is_the_same_for_a_seed(sizes, width, seed):
    bank = Bank({layer: np.arange(size, dtype=np.int32) for layer, size in sizes.items()})
    index = NeuronIndex.dense((width,) * 6)
    drawn = bank.random(index, seed)
    assert {layer: len(neurons) for layer, neurons in drawn.items()} == sizes
    for neurons in drawn.values():
        assert neurons.dtype == np.int32
        assert neurons[0] >= 0
        assert neurons[-1] < width
        assert (np.diff(neurons) > 0).all()
    assert as_lists(bank.random(index, seed)) == as_lists(drawn)


def test_a_random_bank_is_drawn_from_all_neurons_and_differs_by_seed():
    bank = Bank({0: np.arange(5, dtype=np.int32), 3: np.arange(5, dtype=np.int32)})
    draws = [bank.random(NeuronIndex.dense((20,) * 4), seed) for seed in range(40)]
    for layer in bank:
        counts = np.bincount(np.concatenate([draw[layer] for draw in draws]), minlength=20)
        assert counts.min() > 0  # those of the bank itself too
        assert counts.max() < 25  # of 40; the mean is 10
    assert len({str(as_lists(draw)) for draw in draws}) == 40
    assert any(draw[0].tolist() != draw[3].tolist() for draw in draws)  # layers are drawn apart


@pytest.mark.parametrize(
    ("bank", "message"),
    [
        ({}, "the bank is empty"),
        ({1: []}, "the bank is empty"),
        ({3: [0]}, "names layer 3, but the model has 3"),
        ({-1: [0]}, "names layer -1"),
        ({1: [5, 96]}, r"layer 1 names neurons outside \[0, 96\)"),
        ({1: [-1, 5]}, r"layer 1 names neurons outside \[0, 96\)"),
        ({1: [5, 5]}, "layer 1 does not name its neurons in increasing order, each once"),
        ({1: [6, 5]}, "layer 1 does not name its neurons in increasing order, each once"),
        ({1: [0.5]}, "layer 1 holds float64 0.5; give neuron indices"),
        ({1: [2**31]}, "layer 1 holds int64 2147483648; give neuron indices"),
    ],
)
def test_a_bank_that_is_not_the_models_is_refused(bank, message):
    with pytest.raises(DataError, match=message):
        Bank(bank).check(NeuronIndex.of(find_layout(llama())))


def test_an_importance_is_a_matrix_of_layers_for_numpy():
    matrix = np.arange(6, dtype=np.float32).reshape(2, 3)
    importance = Importance(NeuronIndex.dense((3, 3)), matrix.reshape(-1))
    np.testing.assert_array_equal(importance, matrix)
    assert importance.shape == (2, 3)
    assert np.asarray(importance).dtype == np.float32


def test_layers_of_different_widths_are_numbered_one_after_another():
    index = NeuronIndex.dense((2, 0, 3))
    assert index.size == 5
    assert [index.layer(layer) for layer in range(3)] == [slice(0, 2), slice(2, 2), slice(2, 5)]
    assert as_lists(index.bank(np.array([1, 2, 4]))) == {0: [1], 2: [0, 2]}
    assert as_lists(Importance(index, np.array([1, 5, 4, 0, 3], dtype=np.float32)).bank(0.6)) == {0: [1], 2: [0, 2]}


def test_values_of_a_bank_are_split_in_its_own_order():
    bank = Bank({2: [0, 5], 0: [1]})
    assert {layer: part.tolist() for layer, part in bank.split(np.array([1.0, 2.0, 3.0])).items()} == {
        2: [1, 2],
        0: [3],
    }
    assert (bank.size, bank.pairs(), bank.to_json()) == (3, [(2, 0), (2, 5), (0, 1)], {"2": [0, 5], "0": [1]})
