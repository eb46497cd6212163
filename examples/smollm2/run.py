"""Attribution methods compared, masking and steering of cloze tasks on SmolLM2-135M, over seeds of the data.

    python -m examples.smollm2.run --model runs/smollm2/model --out runs/smollm2/run

Run it from the repository root, after get_model. A seed decides which discovery facts the neurons are found on, in
which order factors are learned on all of them, and which random neurons stand beside. Every method's banks are masked
at every size while all tasks are measured on the test split; the main method's banks at one size are divided into
groups and steered. Killed, it goes on where it stopped; started again with more methods, sizes or seeds, it only does
what is new. The whole takes many hours on one core; --stages and the limits make it smaller. The stage "finding"
compares what the methods cost tasks that took no part in a contrast:

    python -m examples.smollm2.run --model runs/smollm2/model --out runs/smollm2/finding --known --stages finding \
        --contrast-tasks capitals sums --methods dvp ma --main dvp --reference dvp --ablations zero mean
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from hones_offline.comparison import compare
from hones_offline.comparison.settings import ABLATIONS, COMPARATORS, METHODS, STAGES, CompareSettings
from hones_offline.comparison.splits import Splits
from hones_offline.comparison.steering import STEERED
from hones_offline.data.examples import load_jsonl
from hones_offline.data.tasks import JsonlTask
from hones_offline.learning.choosing import FitGrid
from hones_offline.learning.factors import FitSettings
from hones_offline.running.evaluation import score
from hones_offline.running.execution import Execution
from hones_offline.running.models import keep_freed_memory, load_model
from hones_offline.running.prompts import Prepared, prepare
from hones_offline.running.run_folder import RunFolder, run_settings

from examples.smollm2.make_data import DEV_TASKS, SPLITS, TASKS

DATA = Path(__file__).parent / "data"
MAX_NEW_TOKENS = 8  # no answer has more than 6, and the line ends after it


def encode(
    model: Any,
    tokenizer: Any,
    task: str,
    limit: int | None,
    *,
    known: bool,
    batch_size: int = 32,
    work: Path | None = None,
) -> dict[str, Prepared]:
    """Every split of a task, the `known` facts or all; with `limit` dev and test are random draws of that size.

    Which facts are known is kept in a folder of `work`.
    """

    def is_right(name: str, every: Prepared) -> npt.NDArray[np.bool_]:
        folder = None
        if work is not None:
            settings = {"stage": "known", **run_settings(every), "batch_size": batch_size}
            folder = RunFolder(work / "known" / f"{task}-{name}", settings)
        execution = Execution(batch_size, folder=folder)
        step = execution.arrays("base", lambda: {"statistics": score(every, batch_size=batch_size).statistics})
        right: npt.NDArray[np.bool_] = step["statistics"][:, 0] == 1
        return right

    def split(name: str) -> Prepared:
        examples = load_jsonl(DATA / name / f"{task}.jsonl").examples
        order = np.random.default_rng(0).permutation(len(examples))  # the files are in the order of the alphabet
        every = prepare(model, tokenizer, JsonlTask(task, "exact_match", MAX_NEW_TOKENS), [examples[i] for i in order])
        if known:
            every = every.only(np.flatnonzero(is_right(name, every)).tolist())
            if not len(every):
                raise SystemExit(f"the model answers none of the {name} facts of {task} right; leave --known out")
        return every.first(None if name == "discovery" else limit)

    return {name: split(name) for name in SPLITS}


# ------------------------------------------------------------------------------------------------------ tables


def base_table(tasks: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Exact match of the untouched model."""
    lines = ["", "| task | test | n |", "|---|---|---|"]
    for task, row in tasks.items():
        lines.append(f"| {task} | {row['base']:.2f} {_ci(row['base_ci95'])} | {row['n']['test']} |")
    return lines


def masking_table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Own drop and selectivity of each method's banks."""
    lines = [
        "",
        "| task | method | share | neurons | own drop | selectivity | selectivity over seeds | n |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        seeds = row["by_seed"]["selectivity"]
        lines.append(
            f"| {row['task']} | {row['method']} | {row['fraction']:.2%} | {row['neurons']:.0f} "
            f"| {row['own_drop']:.2f} {_ci(row['own_drop_ci95'])} | {row['selectivity']:.2f} "
            f"{_ci(row['selectivity_ci95'])} | {min(seeds):.2f} to {max(seeds):.2f} | {row['n']} |"
        )
    return lines


def finding_tables(section: Mapping[str, Any]) -> list[str]:
    """Means over tasks of what each method's banks cost, and the harm to bystanders at equal own drop."""
    lines = [
        "",
        "| method | set to | share | own drop | bystander drop | selectivity | bystander drop less the reference's |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in section["means"]:
        cells = [cell(row, name) for name in ("own_drop", "bystander_drop", "selectivity")]
        cells.append(cell(row.get("difference", {}), "bystander_drop"))
        lines.append(f"| {row['method']} | {row['ablation']} | {row['fraction']:.2%} | {' | '.join(cells)} |")
    lines += [
        "",
        "| method | set to | own drop | bystander drop | less the reference's | resamples that reach it |",
        "|---|---|---|---|---|---|",
    ]
    for row in section["matched"]:
        cells = [cell(row, name) for name in ("bystander_drop", "difference")]
        start = f"| {row['method']} | {row['ablation']} | {row['level']:g} "
        lines.append(f"{start}| {' | '.join(cells)} | {row['reached']:.0%} |")
    return lines


def cell(row: Mapping[str, Any], name: str) -> str:
    """A number and its interval; a dash where there is none."""
    return "–" if row.get(name) is None else f"{row[name]:.2f} {_ci(row[f'{name}_ci95'])}"


def steering_table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Exact match on test under each way of steering, mean over seeds."""
    lines = ["", f"| task | n | seeds | {' | '.join(STEERED)} |", "|---|---|---|" + "---|" * len(STEERED)]
    for task in dict.fromkeys(row["task"] for row in rows):
        cells = {row["method"]: row for row in rows if row["task"] == task}
        values = " | ".join(f"{cells[name]['value']:.3f}" for name in STEERED)
        lines.append(f"| {task} | {cells['base']['n']} | {cells['base']['seeds']} | {values} |")
    return lines


def selection_table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Mean gain of each selection and comparator over the tasks, its share of IA3's, and the gain on other tasks."""
    lines = ["", "| selection | learned numbers | gain | share of IA3's | on other tasks |", "|---|---|---|---|---|"]
    for row in rows:
        share = f"{row['ia3_share']:.0%}" if "ia3_share" in row else "–"
        lines.append(
            f"| {row['method']} | {row['parameters']:.0f} | {row['gain']:+.3f} {_ci(row['gain_ci95'])} "
            f"| {share} | {row['elsewhere_mean']:+.3f} {_ci(row['elsewhere_mean_ci95'])} |"
        )
    return lines


def _ci(bounds: Sequence[float]) -> str:
    return f"[{bounds[0]:.2f}, {bounds[1]:.2f}]"


# -------------------------------------------------------------------------------------------------------- main


def main() -> None:
    """Run it, write summary.json into --out after every stage, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, metavar="DIR", help="what get_model wrote")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="run folder")
    parser.add_argument("--tasks", nargs="+", choices=tuple(TASKS), default=list(DEV_TASKS), metavar="TASK")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), metavar="METHOD", help="see docs/methods.md")
    parser.add_argument("--main", default="hones_logprob", metavar="METHOD", help="grouped and steered (%(default)s)")
    parser.add_argument("--seeds", type=int, default=5, metavar="N")
    stages = CompareSettings().stages
    parser.add_argument("--stages", nargs="*", choices=STAGES, default=list(stages), help="default: %(default)s")
    parser.add_argument("--attribution-examples", type=int, default=24, metavar="N", help="default: %(default)s")
    parser.add_argument("--pool", type=int, metavar="N", help="which seeds draw them from (default: all for discovery)")
    parser.add_argument("--top-heads", type=int, default=25, metavar="K", help="default: %(default)s")
    parser.add_argument("--fractions", type=float, nargs="+", default=[0.0025, 0.005, 0.01, 0.02, 0.04], metavar="F")
    parser.add_argument("--fraction", type=float, default=0.01, metavar="F", help="what is steered (%(default)s)")
    parser.add_argument("--sweep", nargs="+", metavar="METHOD", help="masked at all sizes (default: all methods)")
    parser.add_argument("--learned-seeds", type=int, metavar="N", help="steer the first N seeds (default: all)")
    parser.add_argument("--lr", type=float, default=0.02, help="learning rate of the factors (default: %(default)s)")
    parser.add_argument("--limit", type=int, metavar="N", help="use N examples of dev and test only")
    parser.add_argument("--known", action="store_true", help="use only facts that the untouched model answers right")
    parser.add_argument("--measured", nargs="+", metavar="TASK", help="tasks that get banks and are measured (all)")
    parser.add_argument("--contrast-tasks", nargs="*", metavar="TASK", help="tasks that enter contrasts (all others)")
    parser.add_argument("--ablations", nargs="+", choices=ABLATIONS, default=["zero"], help="of finding: %(default)s")
    parser.add_argument("--reference", metavar="METHOD", help="which finding takes differences to")
    levels = list(CompareSettings().own_drop_levels)
    parser.add_argument("--levels", type=float, nargs="+", default=levels, metavar="X", help="own drops (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=32, metavar="N", help="sequences at a time (%(default)s)")
    parser.add_argument("--selections", nargs="+", default=[], metavar="METHOD", help="whose banks selections steers")
    comparators = list(COMPARATORS)
    parser.add_argument("--comparators", nargs="*", choices=COMPARATORS, default=comparators, help="default: all")
    parser.add_argument("--selection-reference", metavar="METHOD", help="which gains are paired with (the first)")
    grid = FitGrid()
    parser.add_argument("--lrs", type=float, nargs="+", default=list(grid.lrs), metavar="LR", help="tried on dev")
    lora_lrs = list(CompareSettings().lora_lrs)
    parser.add_argument("--lora-lrs", type=float, nargs="+", default=lora_lrs, metavar="LR", help="as many, for LoRA")
    parser.add_argument("--epochs", type=int, default=grid.epochs, metavar="N", help="on dev, at most (%(default)s)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="default: %(default)s")
    parser.add_argument(
        "--attention",
        choices=("sdpa", "eager"),
        default="sdpa",
        help="how the model computes attention; eager learns faster in bfloat16 on a CPU (default: %(default)s)",
    )
    args = parser.parse_args()
    settings = CompareSettings(
        methods=args.methods,
        main=args.main,
        fractions=args.fractions,
        fraction=args.fraction,
        sweep=args.sweep,
        measured=args.measured,
        contrast_tasks=args.contrast_tasks,
        ablations=args.ablations,
        own_drop_levels=args.levels,
        reference=args.reference,
        seeds=args.seeds,
        learned_seeds=args.learned_seeds,
        pool=args.pool,
        attribution_examples=args.attribution_examples,
        top_heads=args.top_heads,
        stages=args.stages,
        fit=FitSettings(lr=args.lr, batch_size=16, accumulation_steps=1),
        selections=args.selections,
        comparators=args.comparators,
        selection_reference=args.selection_reference,
        grid=FitGrid(lrs=args.lrs, epochs=args.epochs),
        lora_lrs=args.lora_lrs,
    )
    keep_freed_memory()
    model: Any
    model, tokenizer = load_model(args.model, dtype=args.dtype)
    model.set_attn_implementation(args.attention)
    tasks = {}
    for task in args.tasks:
        rows, work = args.batch_size, args.out / "work"
        encoded = encode(model, tokenizer, task, args.limit, known=args.known, batch_size=rows, work=work)
        tasks[task] = Splits(**encoded, run_path=work / task, batch_size=rows)
    title = "Cloze tasks on SmolLM2-135M"
    summary = compare(
        tasks, settings, args.out, title=title, report=lambda stage: print(stage, flush=True), progress=True
    )
    lines = base_table(summary["tasks"])
    if "masking" in summary:
        lines += masking_table(summary["masking"])
    if "finding" in summary:
        lines += finding_tables(summary["finding"])
    if "steering" in summary:
        lines += steering_table(summary["steering"])
    if "selections" in summary:
        lines += selection_table(summary["selections"]["means"])
    print("\n".join(lines))


if __name__ == "__main__":
    main()
