"""``hones diff``: two profiles compared."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hones_steer.cli.output import command_parser, print_json, shown, table
from hones_steer.profile import Profile, load_profile


def diff(argv: Sequence[str]) -> int:
    """``hones diff A B``: 0 where both steer alike (same digest), 1 where they differ."""
    parser = command_parser(
        "diff",
        "Compare two profiles: neurons and scales per layer, and metadata.\n"
        "Exit code 0: the same neurons and scales; 1: different; 2: bad input.",
        "hones diff profiles/vqa-v1.safetensors profiles/vqa-v2.safetensors",
    )
    parser.add_argument("a", metavar="A", help="a profile (.safetensors)")
    parser.add_argument("b", metavar="B", help="the profile to compare it with")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    options = parser.parse_args(argv)
    comparison = _compare(load_profile(options.a), load_profile(options.b))
    if options.json:
        print_json(comparison)
    else:
        print("\n".join(_diff_lines(comparison)))
    return 0 if comparison["equal"] else 1


def _compare(a: Profile, b: Profile) -> dict[str, Any]:
    offsets_a, offsets_b = _offsets(a), _offsets(b)
    neurons = sorted(offsets_a.keys() | offsets_b.keys())
    x = np.array([offsets_a.get(key, 0.0) for key in neurons])
    y = np.array([offsets_b.get(key, 0.0) for key in neurons])
    norm = float(np.linalg.norm(x) * np.linalg.norm(y))
    return {
        "equal": a.digest == b.digest,
        "digests": [a.digest, b.digest],
        "num_neurons": [a.num_neurons, b.num_neurons],
        "layers": [_compare_layer(a, b, layer) for layer in sorted(a.layers.keys() | b.layers.keys())],
        "offset_cosine": float(x @ y) / norm if norm else None,
        "max_difference": float(np.abs(x - y).max()),
        "metadata": _metadata_differences(_metadata(a), _metadata(b)),
    }


def _offsets(profile: Profile) -> dict[tuple[int, int], float]:
    """Scale − 1 of each listed (layer, neuron)."""
    return {
        (layer, int(neuron)): float(scale) - 1.0
        for layer, (neurons, scales) in profile.layers.items()
        for neuron, scale in zip(neurons, scales, strict=True)
    }


def _compare_layer(a: Profile, b: Profile, layer: int) -> dict[str, int]:
    scales_a, scales_b = (
        dict(zip(*map(np.ndarray.tolist, p.layers[layer]), strict=True)) if layer in p.layers else {} for p in (a, b)
    )
    shared = scales_a.keys() & scales_b.keys()
    return {
        "layer": layer,
        "shared": len(shared),
        "rescaled": sum(scales_a[neuron] != scales_b[neuron] for neuron in shared),
        "removed": len(scales_a) - len(shared),
        "added": len(scales_b) - len(shared),
    }


def _metadata(profile: Profile) -> dict[str, Any]:
    names = ("task", "description", "license", "method", "evidence", "created_with")
    return {name: getattr(profile, name) for name in names} | {
        f"base_model.{name}": value for name, value in dataclasses.asdict(profile.base_model).items()
    }


def _metadata_differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, list[Any]]:
    return {name: [a[name], b[name]] for name in a if a[name] != b[name]}


def _diff_lines(comparison: Mapping[str, Any]) -> list[str]:
    lines = ["the neurons and scales are " + ("the same" if comparison["equal"] else "different")]
    for sign, digest, neurons in zip("-+", comparison["digests"], comparison["num_neurons"], strict=True):
        lines.append(f"{sign} {digest[:12]}, {neurons:,} neurons")
    if not comparison["equal"]:
        cosine = comparison["offset_cosine"]
        lines += ["", *table({f"layer {row['layer']}": _without_layer(row) for row in comparison["layers"]})]
        lines += [
            "",
            f"cosine of the offsets (scale - 1): {'undefined' if cosine is None else f'{cosine:.4f}'}",
        ]
        lines += [f"largest difference of a scale: {comparison['max_difference']:.4g}"]
    for name, (before, after) in comparison["metadata"].items():
        lines += ["", name, f"- {shown(before)}", f"+ {shown(after)}"]
    return lines


def _without_layer(row: Mapping[str, int]) -> dict[str, int]:
    return {key: value for key, value in row.items() if key != "layer"}
