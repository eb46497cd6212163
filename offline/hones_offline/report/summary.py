"""summary.json: everything a comparison measured, in the one shape that `hones report` reads.

`CONTRACT` describes that shape:

- a type stands for a value: `int` a count from 0, `float` any finite number, `Any` anything;
- a set of words stands for one of them;
- `[x]` is a list of any number of x, `(x, y, z)` a list of exactly these;
- `{EACH: x}` is an object whose keys the writer chooses, such as task names;
- any other dict is an object with these keys; a key that ends in a question mark may be left out or null.

Keys that the contract does not have are allowed; `unknown_keys` names them.

Drops are metric(base) - metric(masked), gains metric(steered) - metric(base), intervals 95% [low, high]; `by_seed` has
one number per seed of data, `n` counts test examples.
"""

import math
import reprlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from hones_offline.running.run_folder import read_json
from hones_steer.errors import DataError

SUMMARY = "summary.json"
EACH = "*"
INTERVAL = (float, float)
DROPS = {EACH: {"drop": float, "ci95?": INTERVAL}}
GAINS = {EACH: {"gain": float, "ci95?": INTERVAL}}
ELSEWHERE = {"elsewhere?": GAINS, "elsewhere_mean?": float, "elsewhere_mean_ci95?": INTERVAL}
"""The other tasks' gains, or losses, where they are steered with this task's profile."""
ABLATED = {"method": str, "fraction": float, "ablation": {"zero", "mean"}, "neurons": float}
MEASURES = {
    "own_drop": float,
    "own_drop_ci95": INTERVAL,
    "relative_drop?": float,
    "bystander_drop?": float,  # nothing where there are no bystanders
    "bystander_drop_ci95?": INTERVAL,
    "selectivity": float,
    "selectivity_ci95": INTERVAL,
}

CONTRACT = {
    "title": str,
    "created?": str,
    "hones_steer?": str,
    "seconds?": {EACH: float},
    "model": {
        "name": str,
        "model_type": str,
        "num_layers": int,
        "intermediate_size?": int,  # where all FFNs have one width, else num_neurons, those of all layers
        "num_neurons?": int,
        "num_heads": int,
        "parameters": int,
    },
    "settings?": {EACH: Any},  # everything that decides the numbers
    "tasks": {
        EACH: {
            "metric": str,
            "n": {EACH: int},  # split -> examples
            "base": float,
            "base_ci95": INTERVAL,
            "failures?": {EACH: {EACH: str}},  # split -> example -> why it was left out
        }
    },
    "heads?": {
        EACH: {
            "metric": {"task", "logprob"},
            "scores": [[float]],  # layers x heads, mean over seeds
            "chosen": [(int, int, float)],  # layer, head, weight; of the first seed
            "seeds": int,
            "n": int,
        }
    },
    "neurons_per_layer?": {EACH: {EACH: [float]}},  # task -> method -> mean count of each layer
    "fraction?": float,  # bank size of sections that do not say theirs
    "overlap?": {EACH: {"tasks": [str], "jaccard": [[float]]}},  # method -> mean over seeds
    "stability?": {EACH: {EACH: float}},  # task -> method -> mean pairwise Jaccard of banks over seeds
    "masking?": [
        {
            "task": str,
            "method": str,
            "fraction": float,
            "neurons": float,
            "seeds": int,
            "n": int,
            "own_drop": float,
            "own_drop_ci95": INTERVAL,
            "relative_drop?": float,  # own drop / base; nothing where that is 0
            "other_drops": {EACH: float},
            "selectivity?": float,  # nothing where there is one task only
            "selectivity_ci95?": INTERVAL,
            "by_seed?": {"own_drop": [float], "selectivity?": [float]},
        }
    ],
    "finding?": {
        "bystanders": {EACH: [str]},  # task -> measured tasks that took no part in the contrast
        "reference?": str,  # the method that differences are to
        "rows": [
            {
                **ABLATED,
                **MEASURES,
                "task": str,
                "seeds": int,
                "n": int,
                "other_drops": {EACH: float},
                "by_seed": {
                    "own_drop": [float],
                    "bystander_drop?": [float],
                    "selectivity": [float],
                    "other_drops": {EACH: [float]},
                },
            }
        ],
        "means": [{**ABLATED, **MEASURES, "difference?": MEASURES}],  # over tasks
        "matched": [  # bystanders' drop where the own drop, as banks grow, reaches the level
            {
                "method": str,
                "ablation": {"zero", "mean"},
                "level": float,
                "reached": float,  # share of the resamples
                "bystander_drop?": float,  # nothing where the level is not reached
                "bystander_drop_ci95?": INTERVAL,
                "difference?": float,
                "difference_ci95?": INTERVAL,
            }
        ],
    },
    "cross?": {"method": str, "fraction": float, "seeds?": int, "drops": {EACH: DROPS}},  # bank of -> measured on
    "groups?": [
        {
            "group": str,
            "kind": {"one", "pair", "triple", "all"},
            "neurons": float,
            "seeds?": int,
            "drops": DROPS,
            "gains?": GAINS,
        }
    ],
    "steering?": [
        {
            "task": str,
            "method": str,
            "value": float,
            "ci95": INTERVAL,
            "gain?": float,
            "gain_ci95?": INTERVAL,
            "n": int,
            "seeds": int,
            "by_seed?": [float],
            "words?": str,  # that asked for the task's conventions
            "content?": float,  # of the answers, apart from their form
            "content_ci95?": INTERVAL,
            "content_words?": str,  # that asked where the content was measured
            "content_gain?": float,  # over the better of plain and asked in words
            "content_gain_ci95?": INTERVAL,
            "over?": GAINS,  # method -> what is gained more than with that
            "parameters?": float,  # learned numbers
            "bytes?": float,  # of the file that holds them
            **ELSEWHERE,
        }
    ],
    "strength?": [{"task": str, "strength": float, "value": float, "ci95": INTERVAL, "n": int, **ELSEWHERE}],
    "selections?": {
        "reference": str,  # what "over_reference" is paired with
        "rows": [
            {
                "task": str,
                "method": str,
                "value": float,
                "ci95": INTERVAL,
                "gain": float,
                "gain_ci95": INTERVAL,
                "over_reference?": float,
                "over_reference_ci95?": INTERVAL,
                "n": int,
                "seeds": int,
                "parameters": float,  # learned numbers
                "bytes": float,  # of the file that holds them
                "by_seed": [float],
                "chosen": [{EACH: float}],  # of each seed: learning rate, epoch and strength, or the one factor
                **ELSEWHERE,
            }
        ],
        "means": [
            {
                "method": str,
                "tasks": int,
                "seeds": int,
                "gain": float,
                "gain_ci95": INTERVAL,
                "over_reference?": float,
                "over_reference_ci95?": INTERVAL,
                "ia3_share?": float,
                "ia3_share_ci95?": INTERVAL,
                "elsewhere_mean": float,
                "elsewhere_mean_ci95": INTERVAL,
                "parameters": float,
                "bytes": float,
            }
        ],
    },
}

_TYPE_NAMES: Mapping[Any, str] = {str: "text", int: "a whole number from 0", float: "a finite number"}
_REMEDY = "`hones demo` and hones_offline.comparison write what `hones report` reads"


def read_summary(folder: Path) -> dict[str, Any]:
    """Read the summary of a run folder and check it against `CONTRACT` and against itself.

    Returns:
        The file's object, without the optional keys that are null.

    Raises:
        DataError: there is no summary, it is damaged, or a value in it has the wrong type, is missing, not finite, or
            contradicts another; the message names the value.
    """
    file = folder / SUMMARY
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder; give the run folder that holds {SUMMARY}")
    if not file.exists():
        raise DataError(
            f"{folder} holds no {SUMMARY}; `hones demo --out {folder}` writes one, and so does a comparison of methods "
            "when it is finished (hones_offline.comparison, examples/smollm2/run.py)"
        )
    try:
        summary = read_json(file)
        problem = next(_mistakes(summary, CONTRACT, ""), None) or next(_contradictions(summary), None)
    except RecursionError as error:
        raise DataError(f"{file} is nested too deep; {_REMEDY}") from error
    if problem:
        raise DataError(f"{file}: {problem}; {_REMEDY}")
    checked: dict[str, Any] = _without_nulls(summary, CONTRACT)
    return checked


def unknown_keys(summary: Mapping[str, Any]) -> list[str]:
    """Keys of a checked summary that are not in `CONTRACT`, such as `masking[].note`."""
    return sorted(set(_unknown_keys(summary, CONTRACT, "")))


def _mistakes(value: Any, shape: Any, where: str) -> Iterator[str]:
    """Where a value does not have a shape of the contract, in the order of the file; `where` is the value's path."""
    if isinstance(shape, dict):
        yield from _object_mistakes(value, shape, where)
    elif isinstance(shape, list | tuple):
        exact = isinstance(shape, tuple)
        if not isinstance(value, list) or (exact and len(value) != len(shape)):
            yield f"{where} is {_short(value)}, no list{f' of {len(shape)}' if exact else ''}"
            return
        for i, item in enumerate(value):
            yield from _mistakes(item, shape[i if exact else 0], f"{where}[{i}]")
        if shape is INTERVAL and value[0] > value[1]:
            yield f"{where} is {_short(value)}, whose lower end is the higher"
    elif isinstance(shape, set):
        if value not in [*shape]:  # a list, because a value that cannot be hashed may be compared
            yield f"{where} is {_short(value)}, none of {', '.join(sorted(shape))}"
    elif shape is Any:
        if not all(map(math.isfinite, _floats(value))):
            yield f"{where} is or holds a number that is not finite"
    elif not _has_type(value, shape):
        yield f"{where} is {_short(value)}, not {_TYPE_NAMES[shape]}"


def _object_mistakes(value: Any, shape: Mapping[str, Any], where: str) -> Iterator[str]:
    if not isinstance(value, dict):
        yield f"{where or 'the file'} is {_short(value)}, no JSON object"
    elif EACH in shape:
        for key, item in value.items():
            yield from _mistakes(item, shape[EACH], f"{where}[{_short(key)}]")
    else:
        for key, item_shape in shape.items():
            name, dot = key.removesuffix("?"), "." if where else ""
            item = value.get(name)
            if item is not None or (name in value and name == key):
                yield from _mistakes(item, item_shape, f"{where}{dot}{name}")
            elif name == key:
                yield f"{where}{dot}{name} is missing"


def _has_type(value: Any, kind: Any) -> bool:
    if isinstance(value, bool):
        return False
    if kind is int:
        return isinstance(value, int) and value >= 0
    if kind is float:
        return isinstance(value, int | float) and abs(value) <= 1e300  # an integer can be too large for a float
    return isinstance(value, str)


def _floats(value: Any) -> Iterator[float]:
    """Every float in a JSON value, however deep."""
    if isinstance(value, float):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _floats(item)


def _short(value: Any) -> str:
    """A value as text, cut if it is long."""
    return reprlib.repr(value)


def _contradictions(summary: Mapping[str, Any]) -> Iterator[str]:
    """Values that have the right shape but do not fit each other: the page would be wrong or could not be drawn."""
    if not summary["tasks"]:
        yield "tasks is empty"
    for where, task in _task_mentions(summary):
        if task not in summary["tasks"]:
            yield f"{where} names {_short(task)}, which is not in tasks"
    yield from _wrong_sizes(summary)
    yield from _impossible_rows(summary)


def _wrong_sizes(summary: Mapping[str, Any]) -> Iterator[str]:
    """Matrices and lists that do not have as many entries as the model has layers and heads, or a bank tasks."""
    layers, heads = summary["model"]["num_layers"], summary["model"]["num_heads"]
    for task, row in (summary.get("heads") or {}).items():
        where = f"heads[{_short(task)}]"
        if [len(scores) for scores in row["scores"]] != [heads] * layers or not layers * heads:
            yield f"{where}.scores is not {layers} layers x {heads} heads, as model says"
        if any(layer >= layers or head >= heads for layer, head, _ in row["chosen"]):
            yield f"{where}.chosen names a head that the model does not have"
    for task, methods in (summary.get("neurons_per_layer") or {}).items():
        for method, counts in methods.items():
            if len(counts) != layers or any(count < 0 for count in counts):
                yield f"neurons_per_layer[{_short(task)}][{_short(method)}] is not {layers} counts, one per layer"
    for method, overlap in (summary.get("overlap") or {}).items():
        if [len(row) for row in overlap["jaccard"]] != [len(overlap["tasks"])] * len(overlap["tasks"]):
            yield f"overlap[{_short(method)}].jaccard is not as wide and high as its tasks"


def _impossible_rows(summary: Mapping[str, Any]) -> Iterator[str]:
    """Bank sizes that are no share, and rows that measure the same thing twice."""
    finding = summary.get("finding") or {"rows": (), "means": (), "matched": ()}
    masked = (*(summary.get("masking") or ()), *finding["rows"], *finding["means"])
    sizes = [row["fraction"] for row in (*masked, *filter(None, [summary.get("cross")]))]
    if summary.get("fraction") is not None:
        sizes.append(summary["fraction"])
    for size in sizes:
        if not 0 < size <= 1:
            yield f"a fraction is {size}, not above 0 and at most 1"
    keys = {"masking": ("task", "method", "fraction"), "steering": ("task", "method"), "strength": ("task", "strength")}
    selections = summary.get("selections") or {"rows": (), "means": ()}
    parts = [(section, summary.get(section) or (), names) for section, names in keys.items()]
    parts.append(("finding.rows", finding["rows"], ("task", "method", "fraction", "ablation")))
    parts.append(("finding.means", finding["means"], ("method", "fraction", "ablation")))
    parts.append(("finding.matched", finding["matched"], ("method", "ablation", "level")))
    parts.append(("selections.rows", selections["rows"], ("task", "method")))
    parts.append(("selections.means", selections["means"], ("method",)))
    for section, rows, names in parts:
        for key, count in Counter(tuple(row[name] for name in names) for row in rows).items():
            if count > 1:
                yield f"{section} has {count} rows of {', '.join(map(_short, key))}"


def _task_mentions(summary: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Every place outside `tasks` that names a task, with the name."""

    def mentions(where: str, tasks: Iterable[str]) -> Iterator[tuple[str, str]]:
        yield from ((where, task) for task in tasks)

    for section in ("heads", "neurons_per_layer", "stability"):
        yield from mentions(section, summary.get(section) or ())
    for method, overlap in (summary.get("overlap") or {}).items():
        yield from mentions(f"overlap[{_short(method)}]", overlap["tasks"])
    selections = (summary.get("selections") or {}).get("rows", ())
    for section in ("masking", "steering", "strength"):
        yield from mentions(section, (row["task"] for row in summary.get(section) or ()))
    yield from mentions("selections.rows", (row["task"] for row in selections))
    for row in (*(summary.get("steering") or ()), *selections):
        yield from mentions("elsewhere", row.get("elsewhere") or ())
    for row in summary.get("masking") or ():
        yield from mentions("masking.other_drops", row["other_drops"])
    finding = summary.get("finding") or {"rows": (), "bystanders": {}}
    for row in finding["rows"]:
        yield from mentions("finding.rows", [row["task"], *row["other_drops"], *row["by_seed"]["other_drops"]])
    for task, others in finding["bystanders"].items():
        yield from mentions("finding.bystanders", [task, *others])
    for bank, drops in ((summary.get("cross") or {}).get("drops") or {}).items():
        yield from mentions("cross.drops", [bank, *drops])
    for row in summary.get("groups") or ():
        yield from mentions("groups", [*row["drops"], *(row.get("gains") or ())])


def _without_nulls(value: Any, shape: Any) -> Any:
    """The same value without the optional keys that are null, so that readers need to ask for presence only."""
    if isinstance(shape, list):
        return [_without_nulls(item, shape[0]) for item in value]
    if not isinstance(shape, dict):
        return value
    if EACH in shape:
        return {key: _without_nulls(item, shape[EACH]) for key, item in value.items()}
    shapes = {key.removesuffix("?"): item_shape for key, item_shape in shape.items()}
    return {
        key: _without_nulls(item, shapes.get(key, Any))
        for key, item in value.items()
        if item is not None or key not in shapes
    }


def _unknown_keys(value: Any, shape: Any, where: str) -> Iterator[str]:
    if isinstance(shape, list):
        for item in value:
            yield from _unknown_keys(item, shape[0], f"{where}[]")
    elif isinstance(shape, dict) and EACH in shape:
        for item in value.values():
            yield from _unknown_keys(item, shape[EACH], f"{where}[]")
    elif isinstance(shape, dict):
        shapes = {key.removesuffix("?"): item_shape for key, item_shape in shape.items()}
        for key, item in value.items():
            name = f"{where}.{key}" if where else key
            yield from _unknown_keys(item, shapes[key], name) if key in shapes else [name]
