"""The heads of a task: those whose replacement costs most, and only if it costs anything."""

import numpy as np
import pytest
from hones_offline.attribution.heads import head_count, top_heads
from tiny_models import llama

from hones_steer.errors import DataError, LayoutError
from hones_steer.layout import find_layout

SCORES = np.array([[0.1, -0.5, 0.3], [0.0, 0.25, 0.2]], dtype=np.float32)


def test_strongest_first_with_their_scores_as_weights():
    assert top_heads(SCORES, 3) == [
        (0, 2, pytest.approx(0.3)),
        (1, 1, pytest.approx(0.25)),
        (1, 2, pytest.approx(0.2)),
    ]


def test_heads_that_do_not_help_are_left_out_though_more_were_asked_for():
    assert [head[:2] for head in top_heads(SCORES, 100)] == [(0, 2), (1, 1), (1, 2), (0, 0)]


def test_of_equal_heads_the_lower_layer_then_the_lower_head_comes_first():
    equal = np.full((3, 2), 0.5, dtype=np.float32)
    assert [head[:2] for head in top_heads(equal, 3)] == [(0, 0), (0, 1), (1, 0)]


def test_weights_are_plain_numbers_that_json_takes():
    (layer, head, weight), *_ = top_heads(SCORES, 1)
    assert [type(value) for value in (layer, head, weight)] == [int, int, float]


def test_no_head_that_helps_is_an_error_with_its_remedy():
    with pytest.raises(DataError, match="never lowers the task's utility; use more examples or head_metric='logprob'"):
        top_heads(np.zeros((2, 3), dtype=np.float32), 3)


def test_a_layer_with_one_head_is_refused():
    (layer, *_) = find_layout(llama(num_attention_heads=1, num_key_value_heads=1)).layers
    with pytest.raises(LayoutError, match="layer 0 has 1 attention"):
        head_count(layer)
    assert head_count(find_layout(llama()).layers[0]) == 4
