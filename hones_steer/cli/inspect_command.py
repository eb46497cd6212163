"""``hones inspect``: a profile explained."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hones_steer.cli.output import command_parser, facts, print_json, printable, table
from hones_steer.ffns import DENSE, EXPERTS, SHARED
from hones_steer.profile import ModelIdentity, Profile, file_sha256, load_profile

_BAR_WIDTH = 40
_SCALE_BINS = (
    ("below 0 (reversed)", -np.inf, 0.0),
    ("0 to 0.5", 0.0, 0.5),
    ("0.5 to 0.9", 0.5, 0.9),
    ("0.9 to 1.1 (nearly unchanged)", 0.9, 1.1),
    ("1.1 to 1.5", 1.1, 1.5),
    ("1.5 to 2", 1.5, 2.0),
    ("2 and more", 2.0, np.inf),
)


def inspect(argv: Sequence[str]) -> int:
    """``hones inspect FILE``: explain a profile to a person, or to a script with ``--json``."""
    parser = command_parser(
        "inspect",
        "Explain a profile: task, model, neurons per layer, scales, method and evidence.",
        "hones inspect profiles/vqa.safetensors\n  hones inspect profiles/vqa.safetensors --json | jq .digest",
    )
    parser.add_argument("file", metavar="FILE", help="a profile (.safetensors)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    options = parser.parse_args(argv)
    profile = load_profile(options.file)
    if options.json:
        print_json(_described(profile, options.file))
    else:
        print("\n".join(_inspect_lines(profile, options.file)))
    return 0


def _described(profile: Profile, file: str) -> dict[str, Any]:
    values = _scales(profile)
    return {
        "format": profile.format,
        "task": profile.task,
        "description": profile.description,
        "license": profile.license,
        "digest": profile.digest,
        "file": {"path": file, "bytes": Path(file).stat().st_size, "sha256": file_sha256(file)},
        "base_model": profile.base_model.to_json(),
        "num_neurons": profile.num_neurons,
        "layers": {str(layer): count for layer, count in _neurons_by_layer(profile).items()},
        "ffns": _neurons_by_part(profile),
        "scales": {
            "min": float(values.min()),
            "mean": float(values.mean()),
            "max": float(values.max()),
            "histogram": _histogram(values),
        },
        "method": profile.method,
        "evidence": profile.evidence,
        "created_with": profile.created_with,
    }


def _inspect_lines(profile: Profile, file: str) -> list[str]:
    described = _described(profile, file)
    scales, model = described["scales"], profile.base_model
    head = {
        "task": profile.task,
        "description": profile.description or "-",
        "license": profile.license or "-",
        "digest": f"{profile.short_digest}  ({profile.digest})",
        "file": f"{file}, {described['file']['bytes']:,} bytes",
        "file sha256": described["file"]["sha256"],
        "model": _model_text(model),
        "neurons": f"{profile.num_neurons:,} of {model.num_neurons:,} "
        f"({profile.num_neurons / model.num_neurons:.2%}), in {len(described['layers'])} of {model.num_layers} layers",
        **_expert_facts(profile),
        "scales": f"{scales['min']:.4g} to {scales['max']:.4g}, mean {scales['mean']:.4g} (1 = unchanged)",
        "written by": profile.created_with,
    }
    counts = {str(layer): described["layers"].get(str(layer), 0) for layer in range(model.num_layers)}
    lines = facts(head, indent="")
    lines += ["", "neurons per layer", *_bars(counts)]
    lines += ["", "neurons per scale", *_bars(scales["histogram"])]
    lines += ["", "method", *(_tree(profile.method) or ["  not recorded"])]
    lines += ["", "evidence", *(_tree(profile.evidence) or ["  none: nothing was measured for this profile"])]
    return lines


def _model_text(model: ModelIdentity) -> str:
    name = printable(model.name or "(no name)")
    revision = f" at {printable(model.revision)}" if model.revision else ""
    shape = f"{model.describe_ffns()}, hidden {model.hidden_size:,}"
    sketch = "" if model.sketch else ", no sketch (only the shapes can be compared with a model)"
    return f"{name}{revision}, {model.model_type}, {shape}{sketch}"


def _scales(profile: Profile) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.concatenate([scales for _, scales in profile.ffns.values()]).astype(np.float64)


def _neurons_by_layer(profile: Profile) -> Counter[int]:
    """How many neurons are listed in each layer, over all its FFNs; layers without any are absent."""
    counts: Counter[int] = Counter()
    for ffn, (neurons, _) in profile.ffns.items():
        counts[ffn.layer] += len(neurons)
    return counts


def _neurons_by_part(profile: Profile) -> dict[str, int]:
    """How many neurons are listed in dense FFNs, shared experts and routed experts, over all layers."""
    counts = dict.fromkeys((DENSE, SHARED, EXPERTS), 0)
    for ffn, (neurons, _) in profile.ffns.items():
        counts[str(ffn.group.part)] += len(neurons)
    return counts


def _expert_facts(profile: Profile) -> dict[str, str]:
    """Say where the neurons are, for a model with experts."""
    if all(run.is_dense for run in profile.base_model.runs):
        return {}
    counts = _neurons_by_part(profile)
    experts = sum(not isinstance(ffn.part, str) for ffn in profile.ffns)
    return {
        "in experts": f"{counts[EXPERTS]:,} in {experts:,} routed experts, {counts[SHARED]:,} in shared ones, "
        f"{counts[DENSE]:,} in dense FFNs"
    }


def _histogram(values: np.ndarray[Any, np.dtype[np.float64]]) -> dict[str, int]:
    return {name: int(np.sum((low <= values) & (values < high))) for name, low, high in _SCALE_BINS}


def _bars(counts: Mapping[str, int]) -> list[str]:
    width, digits = max(map(len, counts)), len(f"{max(counts.values()):,}")
    unit = _BAR_WIDTH / max(1, *counts.values())
    lines = []
    for name, count in counts.items():
        bar = "#" * (max(1, round(count * unit)) if count else 0)
        lines.append(f"  {name:>{width}} {count:>{digits},} {bar}".rstrip())
    return lines


def _tree(value: Mapping[str, Any], indent: str = "  ") -> list[str]:
    """Free JSON as lines: an object of flat objects becomes a table, anything else ``key: value`` lines."""
    if value and all(_is_flat(item) for item in value.values()):
        return [indent + line for line in table(value)]
    lines = []
    plain = {key: item for key, item in value.items() if not isinstance(item, Mapping) or not item}
    lines += facts(plain, indent)
    for key, item in value.items():
        if key not in plain:
            lines += [f"{indent}{printable(key)}", *_tree(item, indent + "  ")]
    return lines


def _is_flat(value: object) -> bool:
    return (
        isinstance(value, Mapping)
        and len(value) > 0
        and not any(isinstance(item, Mapping | list) for item in value.values())
    )
