"""Attribution methods compared on the embedded model, over seeds of the data.

    python -m examples.tiny_vlm.compare --out runs/tiny-vlm

Run it from the repository root. Each seed draws 128 of 384 discovery scenes; every method's banks are masked while all
four tasks are measured on test scenes; the paper's method's are also divided into groups and, with --stages, steered.
Killed, it goes on where it stopped; `hones report runs/tiny-vlm` shows it. Half an hour on one core, with all stages
more than an hour.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

from hones_offline.comparison import compare
from hones_offline.comparison.settings import STAGES, CompareSettings
from hones_offline.comparison.splits import Splits
from hones_offline.data.examples import scene_examples
from hones_offline.data.scenes import scenes
from hones_offline.data.tasks import TASKS
from hones_offline.demo import COMPARED, NEGATIVES
from hones_offline.running.embedded import load_tiny_vlm
from hones_offline.running.models import keep_freed_memory
from hones_offline.running.prompts import prepare

METHODS = (
    *("random", "ape", "ap", "ma", "grad_act", "dvp", "hones_logprob", "hones_task"),
    *("hones_task:ratio", "dvp:ratio", "grad_act:ratio", "hones_task:leave_out"),
)
"""Those compared by default, fewer than there are."""


def main() -> None:
    """Run it and write summary.json into --out after every stage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="run folder")
    parser.add_argument("--methods", nargs="+", default=METHODS, metavar="METHOD", help="docs/methods.md")
    parser.add_argument("--fractions", type=float, nargs="+", default=[0.1], metavar="F", help="sizes, 0.1 among them")
    parser.add_argument("--seeds", type=int, default=5, metavar="N")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=["masking", "groups"], help="(%(default)s)")
    parser.add_argument("--test", type=int, default=128, metavar="N", help="scenes to measure on (%(default)s)")
    args = parser.parse_args()
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
    keep_freed_memory()
    model, processor = load_tiny_vlm()
    counts = {"discovery": 385, "dev": 64, "test": args.test}
    tasks = {}
    for name, task in TASKS.items():
        encoded = {
            split: prepare(
                model, processor, task, scene_examples(name, scenes(split, n), negatives=NEGATIVES), progress=True
            )
            for split, n in counts.items()
        }
        tasks[name] = Splits(**encoded, run_path=args.out / "work" / name, batch_size=64)
    title = "Four tasks in the embedded vision-language model"
    compare(tasks, settings, args.out, title=title, report=partial(print, flush=True), progress=True)


if __name__ == "__main__":
    main()
