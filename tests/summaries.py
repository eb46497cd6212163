"""Summaries of comparisons, as `hones demo` or a comparison writes them: one with every section, one with none."""

from itertools import combinations
from typing import Any

import numpy as np

TASKS = {"antonyms": 100, "capitals": 75, "french": 118, "past_tense": 109, "sums": 90}
LAYERS, HEADS, WIDTH = 30, 9, 1536
METHODS = (
    "hones_task",
    "hones_logprob",
    "hones_logprob:rank",
    "hones_logprob:contrastive",
    "dvp",
    "grad_act",
    "ma",
    "ap",
    "ape",
    "random",
)
FRACTIONS = (0.0025, 0.01, 0.04)
FAILED = {"french-7": "its image cannot be read: truncated", "french-31": "it has no targets"}
SELECTIONS = {"hones_logprob": 461, "dvp": 461, "random": 461, "grid_search": 1, "ia3": 46_080, "lora": 1_520_640}
STEERED = ("base", "asked", "fixed_amp", "grid_search", "random_neurons", "hones_no_kl", "sparse", "hones")


def minimal_summary() -> dict[str, Any]:
    """The keys that every summary must have, and no others."""
    return {
        "title": "One task",
        "model": {
            "name": "tiny",
            "model_type": "llama",
            "num_layers": 2,
            "intermediate_size": 32,
            "num_heads": 4,
            "parameters": 12_345,
        },
        "tasks": {"vqa": {"metric": "accuracy", "n": {"test": 9}, "base": 0.5, "base_ci95": [0.25, 0.75]}},
    }


def full_summary(seed: int = 0) -> dict[str, Any]:
    """A summary with every section, its made-up numbers of the sizes that SmolLM2-135M's five tasks have."""
    rng = np.random.default_rng(seed)
    base = {task: float(rng.uniform(0.25, 0.75)) for task in TASKS}
    return {
        "title": "SmolLM2-135M on five cloze tasks (made-up numbers)",
        "created": "2026-11-22",
        "hones_steer": "0.1.0",
        "seconds": {"attribution": 1834.2, "masking": 5210.0, "steering": 2907.5},
        "model": {
            "name": "SmolLM2-135M-Instruct",
            "model_type": "llama",
            "num_layers": LAYERS,
            "intermediate_size": WIDTH,
            "num_heads": HEADS,
            "parameters": 134_515_008,
        },
        "settings": {"seeds": [0, 1, 2, 3, 4], "top_heads": 25, "fractions": list(FRACTIONS), "head_metric": "task"},
        "tasks": {
            task: {
                "metric": "exact match",
                "n": {"discovery": 106, "attribution": 48, "dev": 54, "test": n},
                "base": base[task],
                "base_ci95": around(base[task], 0.09),
                "failures": {"discovery": {}, "dev": {}, "test": FAILED if task == "french" else {}},
            }
            for task, n in TASKS.items()
        },
        "heads": {task: heads(rng) for task in TASKS},
        "neurons_per_layer": {task: {method: per_layer(rng) for method in METHODS} for task in TASKS},
        "fraction": 0.01,
        "overlap": {method: overlap(rng) for method in METHODS[:5]},
        "stability": {task: {method: float(rng.uniform(0.3, 0.95)) for method in METHODS} for task in TASKS},
        "masking": [
            masked(rng, task, method, fraction, base[task])
            for task in TASKS
            for method in METHODS
            for fraction in FRACTIONS
        ],
        "finding": finding(rng, base),
        "cross": {
            "method": "hones_task",
            "fraction": 0.01,
            "drops": {
                bank: {task: changed("drop", rng, 0.4 if bank == task else 0.08) for task in TASKS} for bank in TASKS
            },
        },
        "groups": groups(rng),
        "steering": [steered(rng, task, method, base[task]) for task in TASKS for method in STEERED],
        "selections": selections(rng, base),
        "strength": [
            {
                "task": task,
                "strength": strength,
                "value": (value := base[task] + 0.03 * strength - 0.02 * strength**2),
                "ci95": around(value, 0.08),
                "n": n,
                "elsewhere_mean": (elsewhere := -0.05 * abs(strength)),
                "elsewhere_mean_ci95": around(elsewhere, 0.06),
            }
            for task, n in TASKS.items()
            for strength in (-0.5, 0.0, 0.5, 1.0, 1.5, 2.0)
        ],
    }


def around(value: float, half: float) -> list[float]:
    return [value - half, value + 0.9 * half]


def heads(rng: np.random.Generator) -> dict[str, Any]:
    """Head scores: a few heads matter much, most not at all, some the wrong way."""
    scores = rng.standard_t(1.6, (LAYERS, HEADS)) * 0.012
    scores[0] += rng.uniform(0, 0.3, HEADS)
    order = np.argsort(-scores, axis=None)[:25]
    chosen = [[int(i // HEADS), int(i % HEADS), float(max(scores.flat[i], 0))] for i in order]
    return {"metric": "task", "scores": scores.tolist(), "chosen": chosen, "seeds": 5, "n": 48}


def per_layer(rng: np.random.Generator) -> list[float]:
    share = rng.dirichlet(np.exp(2.5 * np.sin(np.arange(LAYERS) / rng.uniform(3, 9) + rng.uniform(0, 6))))
    return [float(count) for count in np.round(461 * share, 1)]


def overlap(rng: np.random.Generator) -> dict[str, Any]:
    matrix = rng.uniform(0.02, 0.6, (len(TASKS), len(TASKS)))
    matrix = (matrix + matrix.T) / 2
    np.fill_diagonal(matrix, 1.0)
    return {"tasks": list(TASKS), "jaccard": matrix.tolist()}


def masked(rng: np.random.Generator, task: str, method: str, fraction: float, base: float) -> dict[str, Any]:
    strength = {"random": 0.02, "ap": 0.4, "ape": 0.3, "ma": 0.6}.get(method, 0.85)
    reach = 0.15 if method.startswith("hones") else 0.6
    own = base * strength * (fraction / (fraction + 0.003)) + float(rng.normal(0, 0.01))
    other_drops = {measured: own * reach + float(rng.normal(0, 0.02)) for measured in TASKS if measured != task}
    selectivity = own - float(np.mean([*other_drops.values()]))
    return {
        "task": task,
        "method": method,
        "fraction": fraction,
        "neurons": float(round(LAYERS * WIDTH * fraction)),
        "seeds": 5,
        "n": TASKS[task],
        "own_drop": own,
        "own_drop_ci95": around(own, 0.07),
        "relative_drop": own / base,
        "other_drops": other_drops,
        "selectivity": selectivity,
        "selectivity_ci95": around(selectivity, 0.08),
        "by_seed": {
            "own_drop": (own + rng.normal(0, 0.02, 5)).tolist(),
            "selectivity": (selectivity + rng.normal(0, 0.02, 5)).tolist(),
        },
    }


def finding(rng: np.random.Generator, base: dict[str, float]) -> dict[str, Any]:
    """Two methods under both ablations; antonyms and sums entered the contrast."""
    beside = {task: [other for other in ("capitals", "french", "past_tense") if other != task] for task in TASKS}
    rows, means, matched = [], [], []
    for method in ("dvp", "hones_task"):
        for ablation in ("zero", "mean"):
            for fraction in (0.0025, 0.01):
                cell = {"method": method, "fraction": fraction, "ablation": ablation}
                for task in TASKS:
                    row = {**masked(rng, task, method, fraction, base[task]), **cell}
                    harm = float(np.mean([row["other_drops"][other] for other in beside[task]]))
                    row |= {"bystander_drop": harm, "bystander_drop_ci95": around(harm, 0.05)}
                    row["by_seed"]["bystander_drop"] = (harm + rng.normal(0, 0.02, 5)).tolist()
                    row["by_seed"]["other_drops"] = {
                        other: (drop + rng.normal(0, 0.02, 5)).tolist() for other, drop in row["other_drops"].items()
                    }
                    rows.append(row)
                mean = {**cell, "neurons": float(round(LAYERS * WIDTH * fraction)), **measures(rng, 0.5)}
                mean["relative_drop"] = float(rng.uniform(0.3, 0.9))
                means.append({**mean, "difference": measures(rng, -0.1)})
            for level in (0.5, 0.9):
                row = {"method": method, "ablation": ablation, "level": level, "reached": float(rng.uniform(0, 1))}
                if level < 0.9:
                    harm = float(rng.uniform(0.1, 0.4))
                    row |= {"bystander_drop": harm, "bystander_drop_ci95": around(harm, 0.05)}
                    row |= {"difference": harm - 0.2, "difference_ci95": around(harm - 0.2, 0.03)}
                matched.append(row)
    return {"bystanders": beside, "reference": "dvp", "rows": rows, "means": means, "matched": matched}


def measures(rng: np.random.Generator, size: float) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name in ("own_drop", "bystander_drop", "selectivity"):
        value = float(rng.normal(size, 0.05))
        result |= {name: value, f"{name}_ci95": around(value, 0.06)}
    return result


def changed(name: str, rng: np.random.Generator, size: float) -> dict[str, Any]:
    value = float(rng.normal(size, 0.03))
    return {name: value, "ci95": around(value, 0.06)}


def groups(rng: np.random.Generator) -> list[dict[str, Any]]:
    kinds = {1: "one", 2: "pair", 3: "triple"}
    named = [(names, kinds[size]) for size in kinds for names in [*combinations(TASKS, size)][:6]]
    return [
        {
            "group": "+".join(names),
            "kind": kind,
            "neurons": int(rng.integers(3, 300)),
            "drops": {task: changed("drop", rng, 0.2 if task in names else 0.02) for task in TASKS},
            "gains": {task: changed("gain", rng, 0.004) for task in TASKS},
        }
        for names, kind in [*named, (tuple(TASKS), "all")]
    ]


def steered(rng: np.random.Generator, task: str, method: str, base: float) -> dict[str, Any]:
    gain = 0.0 if method == "base" else float(rng.normal({"fixed_amp": -0.06, "hones": 0.02}.get(method, 0.004), 0.01))
    row = {
        "task": task,
        "method": method,
        "value": base + gain,
        "ci95": around(base + gain, 0.09),
        "n": TASKS[task],
        "seeds": 5,
    }
    if method != "base":
        row |= {
            "gain": gain,
            "gain_ci95": around(gain, 0.03),
            "by_seed": (base + gain + rng.normal(0, 0.01, 5)).tolist(),
        }
    if method in ("base", "asked", "hones"):
        row |= {"content": base + 0.1, "content_ci95": around(base + 0.1, 0.05)}
    if method == "asked":
        row |= {"words": "Just the answer.", "content_words": "In a few words."}
    if method != "hones":
        return row
    row |= {"content_gain": 0.04, "content_gain_ci95": around(0.04, 0.03), "parameters": 461.0, "bytes": 4400.0}
    over = {other: changed("gain", rng, 0.03) for other in ("random_neurons", "grid_search")}
    return {**row, "over": over, **elsewhere(rng, task)}


def elsewhere(rng: np.random.Generator, task: str) -> dict[str, Any]:
    """The other tasks' gains with a task's profile."""
    gains = {other: changed("gain", rng, -0.02) for other in TASKS if other != task}
    mean = float(np.mean([cell["gain"] for cell in gains.values()]))
    return {"elsewhere": gains, "elsewhere_mean": mean, "elsewhere_mean_ci95": around(mean, 0.03)}


def selections(rng: np.random.Generator, base: dict[str, float]) -> dict[str, Any]:
    rows, means = [], []
    for method, parameters in SELECTIONS.items():
        size = {"parameters": float(parameters), "bytes": float(4 * parameters + 700)}
        gains = {task: float(rng.normal(0.05, 0.03)) for task in TASKS}
        for task, gain in gains.items():
            rows.append(
                {
                    "task": task,
                    "method": method,
                    "value": base[task] + gain,
                    "ci95": around(base[task] + gain, 0.09),
                    "gain": gain,
                    "gain_ci95": around(gain, 0.03),
                    "n": TASKS[task],
                    "seeds": 3,
                    "by_seed": (base[task] + gain + rng.normal(0, 0.01, 3)).tolist(),
                    "chosen": [{"factor": 1.25} if parameters == 1 else {"lr": 0.02, "epoch": 5, "strength": 1.5}] * 3,
                    **size,
                    **elsewhere(rng, task),
                }
            )
        mean = float(np.mean(list(gains.values())))
        row = {"method": method, "tasks": len(TASKS), "seeds": 3, "gain": mean, "gain_ci95": around(mean, 0.02), **size}
        row |= {"elsewhere_mean": -0.021, "elsewhere_mean_ci95": around(-0.021, 0.01)}
        if method != "hones_logprob":
            row |= {"over_reference": mean / 3, "over_reference_ci95": around(mean / 3, 0.02)}
        if method != "ia3":
            row |= {"ia3_share": mean / 0.06, "ia3_share_ci95": around(mean / 0.06, 0.3)}
        means.append(row)
    return {"reference": "hones_logprob", "rows": rows, "means": means}
