"""``hones diff``: two profiles compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hones_steer.cli.output import command_parser, print_json, shown, table
from hones_steer.ffns import Ffn
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
    scales_a, scales_b = _scales(a), _scales(b)
    neurons = sorted(scales_a.keys() | scales_b.keys(), key=lambda key: (key[0].order, key[1]))
    x = np.array([scales_a.get(key, 1.0) - 1.0 for key in neurons])
    y = np.array([scales_b.get(key, 1.0) - 1.0 for key in neurons])
    norm = float(np.linalg.norm(x) * np.linalg.norm(y))
    return {
        "equal": a.digest == b.digest,
        "digests": [a.digest, b.digest],
        "num_neurons": [a.num_neurons, b.num_neurons],
        "layers": _compare_layers(scales_a, scales_b),
        "offset_cosine": float(x @ y) / norm if norm else None,
        "max_difference": float(np.abs(x - y).max()),
        "metadata": _metadata_differences(_metadata(a), _metadata(b)),
    }


def _scales(profile: Profile) -> dict[tuple[Ffn, int], float]:
    """The scale of each listed (FFN, neuron)."""
    return {
        (ffn, neuron): scale
        for ffn, (neurons, scales) in profile.ffns.items()
        for neuron, scale in zip(neurons.tolist(), scales.tolist(), strict=True)
    }


def _compare_layers(a: Mapping[tuple[Ffn, int], float], b: Mapping[tuple[Ffn, int], float]) -> list[dict[str, int]]:
    rows: dict[int, dict[str, int]] = {}
    for key in a.keys() | b.keys():
        layer = key[0].layer
        row = rows.setdefault(layer, {"layer": layer, "shared": 0, "rescaled": 0, "removed": 0, "added": 0})
        if key in a and key in b:
            row["shared"] += 1
            row["rescaled"] += a[key] != b[key]
        else:
            row["removed" if key in a else "added"] += 1
    return [rows[layer] for layer in sorted(rows)]


def _metadata(profile: Profile) -> dict[str, Any]:
    names = ("task", "description", "license", "method", "evidence", "created_with")
    return {name: getattr(profile, name) for name in names} | {
        f"base_model.{name}": value for name, value in profile.base_model.to_json().items()
    }


def _metadata_differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, list[Any]]:
    return {name: [a.get(name), b.get(name)] for name in {**a, **b} if a.get(name) != b.get(name)}


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
