"""Attribution methods compared on the embedded model, over seeds of the data; or adapters beside the demo's profiles.

    python -m examples.tiny_vlm.compare --out runs/tiny-vlm
    python -m examples.tiny_vlm.compare --adapters --out runs/adapters

Run it from the repository root; killed, it goes on where it stopped.

The first draws 128 of 384 discovery scenes for each seed; every method's banks are masked while all four tasks are
measured on test scenes; the main method's are also divided into groups and, with --stages, steered. `hones report
runs/tiny-vlm` shows it. Half an hour on one core, with all stages more than an hour.

The second trains IA3 and LoRA on the demo's scenes, chosen on dev as the demo's profiles are, and writes the table that
`hones demo` shows beside them (offline/hones_offline/demo/adapters.json). It needs `hones-steer[peft]`.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from hones_offline.comparison import compare
from hones_offline.comparison.settings import STAGES, CompareSettings
from hones_offline.comparison.splits import Splits
from hones_offline.data.scenes import TASKS
from hones_offline.demo.adapters import TABLE, write_table
from hones_offline.demo.command import prepared_for
from hones_offline.demo.data_set import SCENE_TASKS, SPLITS, data_set, scene_splits
from hones_offline.demo.measured import Measured, Row, ask_in_words
from hones_offline.demo.settings import COMPARED, SCENES
from hones_offline.running.embedded import load_tiny_vlm
from hones_offline.running.models import keep_freed_memory
from hones_offline.running.prompts import prepare

METHODS = (
    *("random", "ape", "ap", "ma", "grad_act", "dvp", "fisher", "hones_logprob", "hones_task"),
    *("hones_task:ratio", "dvp:ratio", "grad_act:ratio", "hones_task:leave_out"),
)
"""Those compared by default, fewer than there are."""
KINDS = ("ia3", "lora")


def main() -> None:
    """Run one of the two."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="run folder")
    parser.add_argument("--adapters", action="store_true", help="train adapters, and write the demo's table of them")
    parser.add_argument("--methods", nargs="+", default=METHODS, metavar="METHOD", help="docs/methods.md")
    parser.add_argument("--fractions", type=float, nargs="+", default=[0.1], metavar="F", help="sizes, 0.1 among them")
    parser.add_argument("--seeds", type=int, default=5, metavar="N")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=["masking", "groups"], help="(%(default)s)")
    parser.add_argument("--test", type=int, metavar="N", help="scenes to measure on (128; with --adapters the demo's)")
    args = parser.parse_args()
    keep_freed_memory()
    if args.adapters:
        compare_adapters(args.out, SCENES if args.test is None else {**SCENES, "test": args.test}, TABLE)
    else:
        compare_methods(args)


def compare_methods(args: argparse.Namespace) -> None:
    """Compare methods and write summary.json into --out after every stage."""
    settings = CompareSettings(
        methods=args.methods,
        main="hones_task",
        fractions=args.fractions,
        fraction=0.1,
        seeds=args.seeds,
        attribution_examples=128,
        pool=384,
        top_heads=8,
        stages=args.stages,
        fit=COMPARED.fit,
    )
    model, processor = load_tiny_vlm()
    counts = {"discovery": 385, "dev": 64, "test": args.test or 128}
    tasks = {}
    for name in TASKS:
        parts = scene_splits(name, counts)
        encoded = {split: prepare(model, processor, SCENE_TASKS[name], parts[split], progress=True) for split in SPLITS}
        tasks[name] = Splits(**encoded, run_path=args.out / "work" / name, batch_size=64)
    title = "Four tasks in the embedded vision-language model"
    compare(tasks, settings, args.out, title=title, report=partial(print, flush=True), progress=True)


def compare_adapters(
    out: Path, counts: Mapping[str, int], table: Path, tasks: Sequence[str] = TASKS
) -> dict[str, Splits]:
    """Train the adapters, measure them as the demo measures profiles, and write and print the rows; the splits."""
    model, processor = load_tiny_vlm()
    examples = {name: data_set(name, counts) for name in tasks}
    settings = replace(COMPARED, comparators=KINDS)
    splits, comparison = prepared_for(model, processor, examples, out / "work", settings)
    rows: list[Row] = []
    for name, of_task in splits.items():
        measured = Measured(comparison.bootstrap, of_task, ask_in_words(model, processor, of_task, examples[name]))
        for kind in KINDS:
            adapter = comparison.steering.selected(name, kind, 0)
            rows.append(measured.steered_row(kind, adapter) | comparison.steering.elsewhere(name, [adapter]))
            low, high = rows[-1]["gain_ci95"]
            print(f"{name:10} {kind:5} gain {rows[-1]['gain']:+.3f} [{low:+.3f}, {high:+.3f}]", flush=True)
    write_table(splits, rows, table)
    return splits


if __name__ == "__main__":
    main()
