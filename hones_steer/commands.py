"""The commands that need a profile only (``hones inspect``, ``hones diff``), and ``hones verify``."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hones_steer.errors import HonesError
from hones_steer.profile import FORMAT, ModelIdentity, Profile, file_sha256, load_profile

if TYPE_CHECKING:
    pass

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


def verify(argv: Sequence[str]) -> int:
    """``hones verify FILE MODEL``: load the model, attach the profile, and test that it steers."""
    parser = command_parser(
        "verify",
        "Check that a profile fits a model and steers it: loads the model, attaches the profile and runs\n"
        "the self-test. Exit code 0: yes; 1: no, with the reason; 2: the file or the model cannot be read.",
        "hones verify profiles/vqa.safetensors llava-hf/llava-1.5-7b-hf",
    )
    parser.add_argument("file", metavar="FILE", help="a profile (.safetensors)")
    parser.add_argument("model", metavar="MODEL", help="a model folder or a Hub name")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    options = parser.parse_args(argv)
    profile = load_profile(options.file)
    from hones_steer.huggingface import steer
    from hones_steer.loading import load_model

    model = load_model(options.model)
    reason, report = None, None
    try:
        report = steer(model, {profile.task: profile}).verify()
    except HonesError as error:
        reason = str(error)
    if options.json:
        answer = {"file": options.file, "model": options.model, "fits": report is not None, "reason": reason}
        print_json({**answer, "layers_not_run": report.layers_not_run if report is not None else None})
    elif report is None:
        print(f"no: {reason}")
    else:
        print("\n".join(["yes", *(f"  {line}" for line in report.lines())]))
    return 1 if report is None else 0


def command_parser(name: str, description: str, example: str) -> argparse.ArgumentParser:
    """The parser of one command, whose help ends with an example."""
    return argparse.ArgumentParser(
        prog=f"hones {name}",
        description=description,
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


# Inspect ------------------------------------------------------------------------------------------


def _described(profile: Profile, file: str) -> dict[str, Any]:
    values = _scales(profile)
    return {
        "format": FORMAT,
        "task": profile.task,
        "description": profile.description,
        "license": profile.license,
        "digest": profile.digest,
        "file": {"path": file, "bytes": Path(file).stat().st_size, "sha256": file_sha256(file)},
        "base_model": dataclasses.asdict(profile.base_model),
        "num_neurons": profile.num_neurons,
        "layers": {str(layer): len(neurons) for layer, (neurons, _) in profile.layers.items()},
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
    total = model.num_layers * model.intermediate_size
    head = {
        "task": profile.task,
        "description": profile.description or "-",
        "license": profile.license or "-",
        "digest": f"{profile.short_digest}  ({profile.digest})",
        "file": f"{file}, {described['file']['bytes']:,} bytes",
        "file sha256": described["file"]["sha256"],
        "model": _model_text(model),
        "neurons": f"{profile.num_neurons:,} of {total:,} ({profile.num_neurons / total:.2%}), "
        f"in {len(profile.layers)} of {model.num_layers} layers",
        "scales": f"{scales['min']:.4g} to {scales['max']:.4g}, mean {scales['mean']:.4g} (1 = unchanged)",
        "written by": profile.created_with,
    }
    counts = {str(i): len(profile.layers[i][0]) if i in profile.layers else 0 for i in range(model.num_layers)}
    lines = _facts(head, indent="")
    lines += ["", "neurons per layer", *_bars(counts)]
    lines += ["", "neurons per scale", *_bars(scales["histogram"])]
    lines += ["", "method", *(_tree(profile.method) or ["  not recorded"])]
    lines += ["", "evidence", *(_tree(profile.evidence) or ["  none: nothing was measured for this profile"])]
    return lines


def _model_text(model: ModelIdentity) -> str:
    name = printable(model.name or "(no name)")
    revision = f" at {printable(model.revision)}" if model.revision else ""
    shape = f"{model.num_layers} layers x {model.intermediate_size:,} FFN neurons, hidden {model.hidden_size:,}"
    sketch = "" if model.sketch else ", no sketch (only the shapes can be compared with a model)"
    return f"{name}{revision}, {model.model_type}, {shape}{sketch}"


def _scales(profile: Profile) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.concatenate([scales for _, scales in profile.layers.values()]).astype(np.float64)


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
        return [indent + line for line in _table(value)]
    lines = []
    plain = {key: item for key, item in value.items() if not isinstance(item, Mapping) or not item}
    lines += _facts(plain, indent)
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


def _table(rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    columns = list(dict.fromkeys(key for row in rows.values() for key in row))
    cells = [["", *map(printable, columns)]]
    for name, row in rows.items():
        cells.append([printable(name), *(_shown(row[key]) if key in row else "" for key in columns)])
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns) + 1)]
    return [
        "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))])
        for line in cells
    ]


def _facts(facts: Mapping[str, object], indent: str) -> list[str]:
    width = max((len(printable(key)) for key in facts), default=0)
    return [f"{indent}{printable(key):<{width}}  {_shown(value)}" for key, value in facts.items()]


def _shown(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return printable(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


def printable(text: str) -> str:
    """`text` as a terminal may see it: what comes from a file may carry escape codes."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


def print_json(value: object) -> None:
    """What `--json` prints."""
    print(json.dumps(value, indent=2, sort_keys=True))


# Diff ---------------------------------------------------------------------------------------------


def _compare(a: Profile, b: Profile) -> dict[str, Any]:
    offsets_a, offsets_b = _offsets(a), _offsets(b)
    everywhere = sorted(offsets_a.keys() | offsets_b.keys())
    x = np.array([offsets_a.get(key, 0.0) for key in everywhere])
    y = np.array([offsets_b.get(key, 0.0) for key in everywhere])
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
    return {
        (layer, int(neuron)): float(scale) - 1.0
        for layer, (neurons, scales) in profile.layers.items()
        for neuron, scale in zip(neurons, scales, strict=True)
    }


def _compare_layer(a: Profile, b: Profile, layer: int) -> dict[str, int]:
    mine, theirs = (
        dict(zip(*map(np.ndarray.tolist, p.layers[layer]), strict=True)) if layer in p.layers else {} for p in (a, b)
    )
    shared = mine.keys() & theirs.keys()
    return {
        "layer": layer,
        "shared": len(shared),
        "rescaled": sum(mine[neuron] != theirs[neuron] for neuron in shared),
        "removed": len(mine) - len(shared),
        "added": len(theirs) - len(shared),
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
        lines += ["", *_table({f"layer {row['layer']}": _without_layer(row) for row in comparison["layers"]})]
        lines += [
            "",
            f"cosine of the offsets (scale - 1): {'undefined' if cosine is None else f'{cosine:.4f}'}",
        ]
        lines += [f"largest difference of a scale: {comparison['max_difference']:.4g}"]
    for name, (before, after) in comparison["metadata"].items():
        lines += ["", name, f"- {_shown(before)}", f"+ {_shown(after)}"]
    return lines


def _without_layer(row: Mapping[str, int]) -> dict[str, int]:
    return {key: value for key, value in row.items() if key != "layer"}
