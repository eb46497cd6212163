"""summary.json: what a comparison measured, in the one shape that `hones report` reads.

`CONTRACT` is that shape. In it a type stands for a value (`int`: a count, from 0; `float`: any finite number; `Any`:
anything), a set of words for one of them, `[x]` for a list of x, `(x, y)` for a list of exactly these, `{EACH: x}` for
an object with keys of its own, any other dict for an object with these keys, those with a question mark left out or
null if there is nothing to say. Other keys than these are allowed; `unknown` names them.

Drops are metric(base) - metric(masked), gains metric(steered) - metric(base), intervals 95% [low, high]; `by_seed` has
one number per seed of data, `n` counts test examples.
"""

import math
import reprlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hones_offline.running.run_folder import read_json
from hones_steer.errors import DataError

SUMMARY = "summary.json"
EACH = "*"
INTERVAL = (float, float)
DROPS = {EACH: {"drop": float, "ci95?": INTERVAL}}

CONTRACT = {
    "title": str,
    "created?": str,
    "hones_steer?": str,
    "seconds?": {EACH: float},
    "model": {
        "name": str,
        "model_type": str,
        "num_layers": int,
        "intermediate_size": int,
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
    "fraction?": float,  # bank size of whatever does not say its own
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
            "other_drops": {EACH: float},
            "selectivity?": float,  # nothing where there is one task only
            "selectivity_ci95?": INTERVAL,
            "by_seed?": {"own_drop": [float], "selectivity?": [float]},
        }
    ],
    "cross?": {"method": str, "fraction": float, "seeds?": int, "drops": {EACH: DROPS}},  # bank of -> measured on
    "groups?": [
        {
            "group": str,
            "kind": {"one", "pair", "triple", "all"},
            "neurons": float,
            "seeds?": int,
            "drops": DROPS,
            "gains?": {EACH: {"gain": float, "ci95?": INTERVAL}},
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
        }
    ],
    "strength?": [{"task": str, "strength": float, "value": float, "ci95": INTERVAL, "n": int}],
}

_WORDS: Mapping[Any, str] = {str: "text", int: "a whole number from 0", float: "a finite number"}
_REMEDY = "`hones demo` and hones_offline.comparison write what `hones report` reads"


def read_summary(folder: Path) -> dict[str, Any]:
    """The summary of a run folder, checked against `CONTRACT` and against itself; absent optional keys stay absent.

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


def unknown(summary: Mapping[str, Any]) -> list[str]:
    """Keys of a checked summary that are not in `CONTRACT`, as `masking[].note`."""
    return sorted(set(_unknown(summary, CONTRACT, "")))


def _mistakes(value: Any, wanted: Any, where: str) -> Iterator[str]:
    """What breaks the contract, in the order of the file."""
    if isinstance(wanted, dict):
        yield from _object_mistakes(value, wanted, where)
    elif isinstance(wanted, list | tuple):
        exact = isinstance(wanted, tuple)
        if not isinstance(value, list) or (exact and len(value) != len(wanted)):
            yield f"{where} is {_short(value)}, no list{f' of {len(wanted)}' if exact else ''}"
            return
        for i, item in enumerate(value):
            yield from _mistakes(item, wanted[i if exact else 0], f"{where}[{i}]")
        if wanted is INTERVAL and value[0] > value[1]:
            yield f"{where} is {_short(value)}, whose lower end is the higher"
    elif isinstance(wanted, set):
        if value not in [*wanted]:
            yield f"{where} is {_short(value)}, none of {', '.join(sorted(wanted))}"
    elif wanted is Any:
        if not all(map(math.isfinite, _floats(value))):
            yield f"{where} is or holds a number that is not finite"
    elif not _is_a(value, wanted):
        yield f"{where} is {_short(value)}, not {_WORDS[wanted]}"


def _object_mistakes(value: Any, wanted: Mapping[str, Any], where: str) -> Iterator[str]:
    if not isinstance(value, dict):
        yield f"{where or 'the file'} is {_short(value)}, no JSON object"
    elif EACH in wanted:
        for key, item in value.items():
            yield from _mistakes(item, wanted[EACH], f"{where}[{_short(key)}]")
    else:
        for key, inner in wanted.items():
            name, dot = key.removesuffix("?"), "." if where else ""
            item = value.get(name)
            if item is not None or (name in value and name == key):
                yield from _mistakes(item, inner, f"{where}{dot}{name}")
            elif name == key:
                yield f"{where}{dot}{name} is missing"


def _is_a(value: Any, wanted: Any) -> bool:
    if isinstance(value, bool):
        return False
    if wanted is int:
        return isinstance(value, int) and value >= 0
    if wanted is float:
        return isinstance(value, int | float) and abs(value) <= 1e300  # an integer can be too large for a float
    return isinstance(value, str)


def _floats(value: Any) -> Iterator[float]:
    if isinstance(value, float):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _floats(item)


def _short(value: Any) -> str:
    return reprlib.repr(value)


def _contradictions(summary: Mapping[str, Any]) -> Iterator[str]:
    """Sound values that do not fit each other; the page would be wrong or could not be drawn."""
    layers, heads = summary["model"]["num_layers"], summary["model"]["num_heads"]
    if not summary["tasks"]:
        yield "tasks is empty"
    for where, task in _tasks_named(summary):
        if task not in summary["tasks"]:
            yield f"{where} names {_short(task)}, which is not in tasks"
    for task, found in (summary.get("heads") or {}).items():
        where = f"heads[{_short(task)}]"
        if [len(row) for row in found["scores"]] != [heads] * layers or not layers * heads:
            yield f"{where}.scores is not {layers} layers x {heads} heads, as model says"
        if any(layer >= layers or head >= heads for layer, head, _ in found["chosen"]):
            yield f"{where}.chosen names a head that the model does not have"
    for task, methods in (summary.get("neurons_per_layer") or {}).items():
        for method, counts in methods.items():
            if len(counts) != layers or any(count < 0 for count in counts):
                yield f"neurons_per_layer[{_short(task)}][{_short(method)}] is not {layers} counts, one per layer"
    for method, found in (summary.get("overlap") or {}).items():
        if [len(row) for row in found["jaccard"]] != [len(found["tasks"])] * len(found["tasks"]):
            yield f"overlap[{_short(method)}].jaccard is not as wide and high as its tasks"
    yield from _impossible_rows(summary)


def _impossible_rows(summary: Mapping[str, Any]) -> Iterator[str]:
    sizes = [row["fraction"] for row in (*(summary.get("masking") or ()), *filter(None, [summary.get("cross")]))]
    if summary.get("fraction") is not None:
        sizes.append(summary["fraction"])
    for size in sizes:
        if not 0 < size <= 1:
            yield f"a fraction is {size}, not above 0 and at most 1"
    keys = {"masking": ("task", "method", "fraction"), "steering": ("task", "method"), "strength": ("task", "strength")}
    for section, names in keys.items():
        rows = Counter(tuple(row[name] for name in names) for row in summary.get(section) or ())
        for key, count in rows.items():
            if count > 1:
                yield f"{section} has {count} rows of {', '.join(map(_short, key))}"


def _tasks_named(summary: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    def each(where: str, tasks: Iterable[str]) -> Iterator[tuple[str, str]]:
        yield from ((where, task) for task in tasks)

    for section in ("heads", "neurons_per_layer", "stability"):
        yield from each(section, summary.get(section) or ())
    for method, found in (summary.get("overlap") or {}).items():
        yield from each(f"overlap[{_short(method)}]", found["tasks"])
    for section in ("masking", "steering", "strength"):
        yield from each(section, (row["task"] for row in summary.get(section) or ()))
    for row in summary.get("masking") or ():
        yield from each("masking.other_drops", row["other_drops"])
    for bank, drops in ((summary.get("cross") or {}).get("drops") or {}).items():
        yield from each("cross.drops", [bank, *drops])
    for row in summary.get("groups") or ():
        yield from each("groups", [*row["drops"], *(row.get("gains") or ())])


def _without_nulls(value: Any, wanted: Any) -> Any:
    """The same value without the optional keys that are null, so that readers ask for presence only."""
    if isinstance(wanted, list):
        return [_without_nulls(item, wanted[0]) for item in value]
    if not isinstance(wanted, dict):
        return value
    if EACH in wanted:
        return {key: _without_nulls(item, wanted[EACH]) for key, item in value.items()}
    inner = {key.removesuffix("?"): spec for key, spec in wanted.items()}
    return {
        key: _without_nulls(item, inner.get(key, Any))
        for key, item in value.items()
        if item is not None or key not in inner
    }


def _unknown(value: Any, wanted: Any, where: str) -> Iterator[str]:
    if isinstance(wanted, list):
        for item in value:
            yield from _unknown(item, wanted[0], f"{where}[]")
    elif isinstance(wanted, dict) and EACH in wanted:
        for item in value.values():
            yield from _unknown(item, wanted[EACH], f"{where}[]")
    elif isinstance(wanted, dict):
        inner = {key.removesuffix("?"): spec for key, spec in wanted.items()}
        for key, item in value.items():
            name = f"{where}.{key}" if where else key
            yield from _unknown(item, inner[key], name) if key in inner else [name]


def seeds_of(rows: Iterable[Mapping[str, Any]]) -> Sequence[int]:
    """The distinct numbers of seeds that rows say they have."""
    return sorted({row["seeds"] for row in rows if "seeds" in row})
