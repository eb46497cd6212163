"""Profiles for the tests: one written out, and hypothesis strategies for any."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from hypothesis import strategies as st

from hones_steer import ModelIdentity, Profile

LAYERS, WIDTH = 6, 40


def identity(**changes: Any) -> ModelIdentity:
    values: dict[str, Any] = {
        "name": "org/tiny",
        "revision": None,
        "model_type": "llava",
        "num_layers": LAYERS,
        "intermediate_size": WIDTH,
        "hidden_size": 32,
        "sketch": tuple(1.0 + i / 16 for i in range(16)),
    }
    return ModelIdentity(**(values | changes))


def make_layers(scales: Mapping[int, Mapping[int, float]]) -> dict[int, tuple[Any, Any]]:
    """`{layer: {neuron: scale}}` as a profile's layers."""
    return {
        layer: (
            np.array(sorted(row), dtype=np.int32),
            np.array([row[neuron] for neuron in sorted(row)], dtype=np.float32),
        )
        for layer, row in scales.items()
    }


def make(task: str = "vqa", scales: Mapping[int, Mapping[int, float]] | None = None, **fields: Any) -> Profile:
    scales = {1: {0: 0.5, 7: 1.5}, 3: {4: -2.0}} if scales is None else scales
    return Profile(task=task, layers=make_layers(scales), **({"base_model": identity()} | fields))


def scales_of(profile: Profile) -> dict[tuple[int, int], float]:
    """The scale of each listed (layer, neuron)."""
    return {
        (layer, int(neuron)): float(scale)
        for layer, (neurons, scales) in profile.layers.items()
        for neuron, scale in zip(neurons, scales, strict=True)
    }


def rows(limit: float = 100.0) -> st.SearchStrategy[dict[int, dict[int, float]]]:
    scale = st.floats(-limit, limit, width=32)
    row = st.dictionaries(st.integers(0, WIDTH - 1), scale, min_size=1, max_size=5)
    return st.dictionaries(st.integers(0, LAYERS - 1), row, min_size=1, max_size=3)


def task_names() -> st.SearchStrategy[str]:
    return st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}", fullmatch=True).filter(lambda name: name != "none")


def json_objects() -> st.SearchStrategy[dict[str, Any]]:
    text = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
    numbers = st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False, allow_infinity=False)
    leaf = st.none() | st.booleans() | numbers | text
    value = st.recursive(leaf, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3))
    return st.dictionaries(text, value, max_size=3)


@st.composite
def profiles(draw: st.DrawFn, limit: float = 100.0) -> Profile:
    text = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
    sketch = st.lists(st.floats(allow_nan=False, allow_infinity=False, width=32), min_size=16, max_size=16)
    base_model = identity(
        name=draw(text),
        revision=draw(st.none() | text),
        sketch=draw(st.none() | sketch.map(tuple)),
    )
    return make(
        draw(task_names()),
        draw(rows(limit)),
        base_model=base_model,
        description=draw(text),
        license=draw(text),
        method=draw(json_objects()),
        evidence=draw(json_objects()),
    )
