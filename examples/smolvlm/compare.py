"""Attribution methods compared on four tasks of a real language model that sees, over seeds of the data.

    python -m examples.smolvlm.compare --model runs/smolvlm/model --stages masking finding --out runs/smolvlm/finding
    python -m examples.smolvlm.compare --model runs/smolvlm/model --stages selections --out runs/smolvlm/steering \
        --asked words --methods random hones_logprob fisher

Run it from the repository root; it measures the test split, as docs/results/smolvlm-plan.md says. A seed decides on
which discovery scenes neurons are found. "masking" and "finding" set every method's banks to 0 at every size while all
tasks are measured; in "finding" the tasks outside the contrast are the bystanders. "selections" learns factors for some
banks, beside one factor, IA3 and LoRA, and measures every profile on the other tasks too: the side effects of a wrong
route. With --another-image it also measures them with another scene's picture, the shuffled-image control: what is
gained then was not seen. `hones report` shows what is in --out. Killed, it goes on where it stopped; started again with
more methods, sizes, seeds or stages, it only does what is new.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from hones_offline.comparison import compare
from hones_offline.comparison.comparison import Comparison
from hones_offline.comparison.estimates import estimate, weighted
from hones_offline.comparison.settings import ABLATIONS, COMPARATORS, STAGES, CompareSettings
from hones_offline.comparison.splits import Splits
from hones_offline.data.metrics import FloatArray
from hones_offline.data.tasks import Task
from hones_offline.learning.choosing import FitGrid
from hones_offline.learning.factors import FitSettings
from hones_offline.running.models import keep_freed_memory, load_model
from hones_offline.running.prompts import Prepared, prepare
from hones_offline.running.run_folder import json_bytes

from examples.smollm2.run import base_table, cell, finding_tables, masking_table, selection_table
from examples.smolvlm.evaluate_card import with_another_image
from examples.smolvlm.tasks import WAYS, task_examples
from hones_steer.errors import DataError
from hones_steer.files import write_atomically

METHODS = ("random", "ape", "dvp", "grad_act", "hones_logprob", "fisher", "fisher:ratio")
"""`ape` is LAPE's criterion; `fisher` is the default selection, `fisher:ratio` the one against other tasks."""
TASKS = ("vqa", "ocr", "caption", "count")
CONTRAST_TASKS = ("ocr", "caption")
"""Those that contrasts are taken against; so vqa and count are bystanders of every other task's banks."""
SELECTIONS = ("random", "hones_logprob", "fisher")
COMPARED_WITH = ("grid_search", "ia3", "lora")


def encode(
    model: Any, processor: Any, asked: Mapping[str, Task], counts: Mapping[str, int], work: Path, batch_size: int
) -> dict[str, Splits]:
    """Every task with its splits, of so many scenes, and its run folder below `work`."""
    tasks = {}
    for name, task in asked.items():
        parts = {
            split: prepare(model, processor, task, task_examples(name, split, count), progress=True)
            for split, count in counts.items()
        }
        tasks[name] = Splits(**parts, run_path=work / name, batch_size=batch_size)
    return tasks


def gains_with_another_image(
    tasks: Mapping[str, Splits], others: Mapping[str, Prepared], settings: CompareSettings
) -> list[dict[str, Any]]:
    """A row for every way of steering: what it gains on test, and what with another scene's picture for both models.

    Args:
        tasks: the splits of each task by name.
        others: each task's test examples, with other pictures.
        settings: what was compared; the profiles and adapters are those of its stage "selections".

    Returns:
        For each way the gains "own" and "another" and their difference "seen", as means over tasks with 95% intervals
        over tasks, seeds and scenes, and under "tasks" the same of every task, over seeds and scenes.
    """
    comparison = Comparison(tasks, settings, progress=True)
    steering, bootstrap = comparison.steering, comparison.bootstrap
    draws = bootstrap.tasks(~np.eye(len(tasks), dtype=bool))
    rows = []
    for name in (*settings.selections, *settings.comparators):
        own, another = [], []
        for task, splits in tasks.items():
            steered = [steering.selected(task, name, seed) for seed in steering.seeds]
            base = comparison.values(task, splits.measure_beside(others[task]))
            beside = [comparison.values(task, splits.measure_beside(others[task], one)) - base for one in steered]
            own.append(bootstrap.over_seeds([steering.gain(task, one) for one in steered]))
            another.append(bootstrap.over_seeds(beside))
        means = [weighted(np.stack(gains, axis=1), draws) for gains in (own, another)]
        of_task = {task: _gains(*pair) for task, *pair in zip(tasks, own, another, strict=True)}
        rows.append({"method": name, **_gains(*means), "tasks": of_task})
    return rows


def _gains(own: FloatArray, another: FloatArray) -> dict[str, Any]:
    return {**estimate("own", own), **estimate("another", another), **estimate("seen", own - another)}


def another_image_table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The rows of `gains_with_another_image` in Markdown: the means, then each task's."""
    lines = ["", "| selection | task | gain | with another's picture | difference |", "|---|---|---|---|---|"]
    for row in rows:
        for task, gains in {"mean": row, **row["tasks"]}.items():
            cells = [cell(gains, name) for name in ("own", "another", "seen")]
            lines.append(f"| {row['method']} | {task} | {' | '.join(cells)} |")
    return lines


def settings_of(args: argparse.Namespace) -> CompareSettings:
    """The comparison that the arguments ask for."""
    return CompareSettings(
        methods=args.methods,
        main=args.main,
        fractions=args.fractions,
        fraction=args.fraction,
        ablations=args.ablations,
        contrast_tasks=args.contrast_tasks,
        seeds=args.seeds,
        attribution_examples=args.attribution_examples,
        pool=args.discovery,
        top_heads=args.top_heads,
        stages=args.stages,
        fit=FitSettings(lr=args.lr, batch_size=16, accumulation_steps=1),
        selections=args.selections,
        comparators=args.comparators,
        reference=args.reference or args.main,
        selection_reference=args.selection_reference or (args.main if args.main in args.selections else None),
        grid=FitGrid(lrs=args.lrs, epochs=args.epochs),
        lora_lrs=args.lora_lrs,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, metavar="DIR", help="what examples.smolvlm.get_model wrote")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="run folder")
    parser.add_argument("--asked", choices=tuple(WAYS), default="begun", help="way of asking (default: %(default)s)")
    known = tuple(WAYS["words"])
    parser.add_argument("--tasks", nargs="+", choices=known, default=list(TASKS), metavar="TASK")
    parser.add_argument("--methods", nargs="+", default=METHODS, metavar="METHOD", help="docs/methods.md")
    parser.add_argument("--main", default="hones_logprob", metavar="METHOD", help="the paper's (%(default)s)")
    parser.add_argument("--reference", metavar="METHOD", help="which finding takes differences to (that of --main)")
    parser.add_argument("--selection-reference", metavar="METHOD", help="which gains are paired with (that of --main)")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="default: %(default)s")
    stages = ["masking", "finding", "selections"]
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=stages, help="default: %(default)s")
    parser.add_argument("--fractions", type=float, nargs="+", default=[0.0025, 0.01], metavar="F", help="(%(default)s)")
    parser.add_argument("--fraction", type=float, default=0.01, metavar="F", help="what is steered (%(default)s)")
    parser.add_argument("--ablations", nargs="+", choices=ABLATIONS, default=["zero"], help="default: %(default)s")
    parser.add_argument(
        "--contrast-tasks", nargs="+", choices=tuple(WAYS["words"]), default=CONTRAST_TASKS, metavar="TASK"
    )
    parser.add_argument("--attribution-examples", type=int, default=48, metavar="N", help="of a seed (%(default)s)")
    parser.add_argument("--top-heads", type=int, default=25, metavar="K", help="default: %(default)s")
    for split, count in {"discovery": 64, "dev": 24, "test": 40}.items():
        parser.add_argument(f"--{split}", type=int, default=count, metavar="N", help="scenes (%(default)s)")
    parser.add_argument("--selections", nargs="+", default=SELECTIONS, metavar="METHOD", help="whose banks are steered")
    parser.add_argument("--comparators", nargs="*", choices=COMPARATORS, default=COMPARED_WITH, help="(%(default)s)")
    parser.add_argument(
        "--another-image",
        action="store_true",
        help="measure the selections with each scene's neighbor's picture too, into another_image.json",
    )
    parser.add_argument("--lrs", type=float, nargs="+", default=[0.08, 0.32], metavar="LR", help="(%(default)s)")
    parser.add_argument("--lora-lrs", type=float, nargs="+", default=[0.001, 0.003], metavar="LR")
    parser.add_argument("--lr", type=float, default=FitSettings.lr, help="of steering and strength (%(default)s)")
    parser.add_argument("--epochs", type=int, default=3, metavar="N", help="at most (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=32, metavar="N", help="sequences at a time (%(default)s)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="default: %(default)s")
    parser.add_argument(
        "--attention",
        choices=("sdpa", "eager"),
        default="sdpa",
        help="how the model computes attention; eager learns faster in bfloat16 on a CPU (default: %(default)s)",
    )
    return parser


def main() -> None:
    """Run it, write summary.json into --out after every stage, and print the tables."""
    parser = _parser()
    args = parser.parse_args()
    if args.another_image and "selections" not in args.stages:
        parser.error("--another-image measures selections; add selections to --stages")
    if args.another_image and args.test < 2:
        parser.error(f"--test must be at least 2, so that there is another image, not {args.test}")
    if other := [name for name in args.tasks if name not in WAYS[args.asked]]:
        parser.error(f"{other[0]} is not asked {args.asked!r}; choose another --asked, or leave it out of --tasks")
    keep_freed_memory()
    try:
        settings = settings_of(args)
        model: Any
        model, processor = load_model(args.model, dtype=args.dtype, device="cpu")
        model.set_attn_implementation(args.attention)
        counts = {split: getattr(args, split) for split in ("discovery", "dev", "test")}
        asked = {name: WAYS[args.asked][name] for name in args.tasks}
        work = args.out / "work" / args.asked  # each way of asking has run folders of its own
        tasks = encode(model, processor, asked, counts, work, args.batch_size)
        title = f"Tasks on images in a LLaVA on SmolLM2-135M, asked: {args.asked}"
        summary = compare(tasks, settings, args.out, title=title, report=partial(print, flush=True), progress=True)
        rows = []
        if args.another_image:
            others = {
                name: prepare(model, processor, task, with_another_image(task_examples(name, "test", args.test)))
                for name, task in asked.items()
            }
            rows = gains_with_another_image(tasks, others, settings)
            write_atomically(args.out / "another_image.json", json_bytes(rows))
    except DataError as error:
        parser.error(str(error))
    lines = base_table(summary["tasks"])
    if "masking" in summary:
        lines += masking_table(summary["masking"])
    if "finding" in summary:
        lines += finding_tables(summary["finding"])
    if "selections" in summary:
        lines += selection_table(summary["selections"]["means"])
    if rows:
        lines += another_image_table(rows)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
