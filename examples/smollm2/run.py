"""Attribution, masking and steering of the five cloze tasks on SmolLM2-135M, against controls, over seeds of the data.

    python -m examples.smollm2.run --model runs/smollm2/model --out runs/smollm2/run

Run it from the repository root, after get_model. A seed decides which discovery facts the heads and neurons are found
on, in which order factors are learned on all of them, and which random neurons stand beside. Banks are masked for every
task on the test split at every size; steering uses one size. Killed, it goes on where it stopped. The whole takes hours
on one core; --steps masking stops before steering, and the limits make it smaller.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from hones_offline.banks import bank_size, random_bank, select_bank
from hones_offline.evaluate import Scores
from hones_offline.examples import load_jsonl
from hones_offline.fit import FitSettings
from hones_offline.metrics import FloatArray
from hones_offline.models import load_model
from hones_offline.pipeline import find_bank
from hones_offline.prompts import Prepared, prepare
from hones_offline.runs import json_bytes, write_atomically
from hones_offline.study import Splits, StudySettings, study, summarize
from hones_offline.tasks import JsonlTask

from examples.smollm2.make_data import SPLITS, TASKS

DATA = Path(__file__).parent / "data"
MAX_NEW_TOKENS = 8  # no answer has more than 6, and the line ends after it
STEERED = ("base", "fixed_amp", "grid_search", "random_neurons", "hones_no_kl", "hones")
EncodedTasks = Mapping[str, Mapping[str, Prepared]]  # task -> split -> examples


def encode(model: Any, tokenizer: Any, tasks: Sequence[str], limit: int | None) -> EncodedTasks:
    """Every split of every task; with `limit` dev and test are random draws of that size."""

    def split(task: str, name: str) -> Prepared:
        examples = load_jsonl(DATA / name / f"{task}.jsonl").examples
        order = np.random.default_rng(0).permutation(len(examples))  # the files are in the order of the alphabet
        kept = order if name == "discovery" else order[:limit]
        return prepare(model, tokenizer, JsonlTask(task, "exact_match", MAX_NEW_TOKENS), [examples[i] for i in kept])

    return {task: {name: split(task, name) for name in SPLITS} for task in tasks}


def shuffled(prepared: Prepared, seed: int) -> Prepared:
    """The same examples in the order of a seed."""
    order = np.random.default_rng(seed).permutation(len(prepared))
    return replace(
        prepared,
        examples=tuple(prepared.examples[i] for i in order),
        encoded=tuple(prepared.encoded[i] for i in order),
    )


def with_seed(encoded: EncodedTasks, seed: int, work: Path, settings: StudySettings) -> dict[str, Splits]:
    """Each task's splits for one seed, with a run folder of their own."""
    chosen = replace(settings, fit=replace(settings.fit, seed=seed))
    return {
        task: Splits(
            shuffled(split["discovery"], seed), split["dev"], split["test"], work / f"seed-{seed}" / task, chosen
        )
        for task, split in encoded.items()
    }


# ----------------------------------------------------------------------------------------------------- masking


def mask(splits: Mapping[str, Splits], fractions: Sequence[float]) -> list[dict[str, Any]]:
    """One row per task and bank size: which answers each task loses (per test example) when that bank is at zero."""
    rows = []
    for task, own in splits.items():
        settings = own.settings
        found = find_bank(
            own.discovery.first(settings.attribution_examples or len(own.discovery)),
            count=settings.top_heads,
            top_fraction=max(settings.fractions),
            head_metric=settings.head_metric,
            batch_size=settings.batch_size,
            run=own.run,
            progress=True,
        )
        width = own.discovery.decoder.layout.intermediate_size
        for fraction in fractions:
            bank = select_bank(found.importance, fraction)
            others = [random_bank(bank, width, seed) for seed in range(settings.random_banks)]
            rows.append(
                {
                    "task": task,
                    "fraction": fraction,
                    "neurons": bank_size(bank),
                    "lost": {
                        measured: lost(s, s.measure(f"test-{task}-{fraction:g}-masked", s.test, mask=bank))
                        for measured, s in splits.items()
                    },
                    "lost_random": [
                        lost(own, own.measure(f"test-random-{i}-{fraction:g}-masked", own.test, mask=neurons))
                        for i, neurons in enumerate(others)
                    ],
                }
            )
    return rows


def lost(splits: Splits, scores: Scores) -> FloatArray:
    """Score without the intervention minus score with it, per test example [n]."""
    return (splits.measure("test-base", splits.test).statistics - scores.statistics)[:, 0]


def masking_row(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One task and bank size, from a row per seed: drops as means over seeds and test examples.

    Intervals (95%) resample the test examples; the spread over seeds is given beside them.
    """
    task = rows[0]["task"]
    mean = {measured: np.mean([row["lost"][measured] for row in rows], axis=0) for measured in rows[0]["lost"]}
    own, rest = mean[task], [values for measured, values in mean.items() if measured != task]
    selective = [
        float(np.mean(row["lost"][task]) - np.mean([np.mean(v) for t, v in row["lost"].items() if t != task]))
        for row in rows
    ]
    return {
        "task": task,
        "fraction": rows[0]["fraction"],
        "neurons": float(np.mean([row["neurons"] for row in rows])),
        "seeds": len(rows),
        "n": len(own),
        "own_drop": float(own.mean()),
        "own_drop_ci95": interval([own], lambda means: means[0]),
        "other_drops": {measured: float(values.mean()) for measured, values in mean.items() if measured != task},
        "selectivity": float(np.mean(selective)),
        "selectivity_ci95": interval([own, *rest], lambda means: means[0] - np.mean(means[1:])),
        "selectivity_by_seed": selective,
        "random_drop": float(np.mean([values for row in rows for values in row["lost_random"]])),
    }


def interval(
    samples: Sequence[FloatArray], statistic: Callable[[Sequence[float]], Any], resamples: int = 1000
) -> tuple[float, float]:
    """95% percentile bootstrap of a statistic of the samples' means; each sample's examples are drawn on their own."""
    rng = np.random.default_rng(0)
    values = [
        statistic([float(rng.choice(sample, len(sample)).mean()) for sample in samples]) for _ in range(resamples)
    ]
    low, high = np.quantile(np.asarray(values), [0.025, 0.975])
    return float(low), float(high)


# ------------------------------------------------------------------------------------------------------ tables


def base_table(base: Mapping[str, Mapping[str, Scores]]) -> list[str]:
    """Exact match of the untouched model."""
    lines = ["", "| task | dev | n | test | n |", "|---|---|---|---|---|"]
    for task, scores in base.items():
        dev, test = scores["dev"], scores["test"]
        lines.append(f"| {task} | {dev.value:.2f} {_ci(dev.interval())} | {dev.n} | {test.value:.2f} | {test.n} |")
    return lines


def masking_table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Own drop and selectivity of each bank."""
    lines = [
        "",
        "| task | share | neurons | own drop | mean drop of others | selectivity | over seeds | random, own drop | n |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        seeds = row["selectivity_by_seed"]
        lines.append(
            f"| {row['task']} | {row['fraction']:.2%} | {row['neurons']:.0f} "
            f"| {row['own_drop']:.2f} {_ci(row['own_drop_ci95'])} | {np.mean(list(row['other_drops'].values())):.2f} "
            f"| {row['selectivity']:.2f} {_ci(row['selectivity_ci95'])} | {min(seeds):.2f} to {max(seeds):.2f} "
            f"| {row['random_drop']:.2f} | {row['n']} |"
        )
    return lines


def steering_table(rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
    """Exact match on test under each way of steering, mean over seeds."""
    lines = ["", f"| task | n | seeds | {' | '.join(STEERED)} |", "|---|---|---|" + "---|" * len(STEERED)]
    for task, summaries in rows.items():
        values = " | ".join(f"{np.mean([summary[name] for summary in summaries]):.3f}" for name in STEERED)
        lines.append(f"| {task} | {summaries[0]['n']} | {len(summaries)} | {values} |")
    return lines


def _ci(bounds: Sequence[float]) -> str:
    return f"[{bounds[0]:.2f}, {bounds[1]:.2f}]"


# -------------------------------------------------------------------------------------------------------- main


def main() -> None:
    """Run it, print the tables as they are ready, and write summary.json into --out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, metavar="DIR", help="what get_model wrote")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="run folder")
    parser.add_argument("--tasks", nargs="+", choices=tuple(TASKS), default=list(TASKS), metavar="TASK")
    parser.add_argument("--seeds", type=int, default=5, metavar="N")
    parser.add_argument("--steps", choices=("base", "masking", "all"), default="all", help="how far to go")
    parser.add_argument("--attribution-examples", type=int, default=24, metavar="N", help="default: %(default)s")
    parser.add_argument("--top-heads", type=int, default=25, metavar="K", help="default: %(default)s")
    parser.add_argument("--fractions", type=float, nargs="+", default=[0.0025, 0.005, 0.01, 0.02], metavar="F")
    parser.add_argument("--steered-fraction", type=float, default=0.01, metavar="F", help="default: %(default)s")
    parser.add_argument("--lr", type=float, default=0.02, help="learning rate of the factors (default: %(default)s)")
    parser.add_argument("--random-banks", type=int, default=3, metavar="N", help="default: %(default)s")
    parser.add_argument("--limit", type=int, metavar="N", help="use N examples of dev and test only")
    args = parser.parse_args()
    if len(args.tasks) < 2:
        parser.error("selectivity compares tasks; name at least two")
    settings = StudySettings(
        attribution_examples=args.attribution_examples,
        top_heads=args.top_heads,
        head_metric="logprob",
        fractions=(args.steered_fraction,),
        random_banks=args.random_banks,
        batch_size=32,
        fit=FitSettings(lr=args.lr, batch_size=16, accumulation_steps=1),
    )
    model, tokenizer = load_model(args.model)
    encoded = encode(model, tokenizer, args.tasks, args.limit)
    seeds = [with_seed(encoded, seed, args.out / "work", settings) for seed in range(args.seeds)]
    base = {
        task: {name: splits.measure(f"{name}-base", getattr(splits, name)) for name in ("dev", "test")}
        for task, splits in seeds[0].items()
    }
    summary: dict[str, Any] = {
        "settings": {name: str(value) for name, value in vars(args).items()},
        "base": {
            task: {name: {"value": s.value, "n": s.n, "ci95": s.interval()} for name, s in scores.items()}
            for task, scores in base.items()
        },
    }
    _show(args.out, summary, base_table(base))
    if args.steps == "base":
        return
    per_seed = [mask(splits, args.fractions) for splits in seeds]
    summary["masking"] = [masking_row(rows) for rows in zip(*per_seed, strict=True)]
    _show(args.out, summary, masking_table(summary["masking"]))
    if args.steps == "masking":
        return
    summary["steering"] = {}
    for task in args.tasks:
        summary["steering"][task] = [summarize(splits[task], study(splits[task], progress=True)) for splits in seeds]
        _show(args.out, summary, steering_table({task: summary["steering"][task]}))


def _show(out: Path, summary: Mapping[str, Any], lines: Sequence[str]) -> None:
    write_atomically(out / "summary.json", json_bytes(summary))
    print("\n".join(lines), flush=True)


if __name__ == "__main__":
    main()
