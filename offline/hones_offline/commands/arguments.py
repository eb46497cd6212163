"""Arguments, data and printed results that `hones learn`, `attribute`, `fit` and `evaluate` have in common."""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from hones_offline.data.datasets import load_dataset
from hones_offline.data.examples import Loaded, load_jsonl
from hones_offline.data.metrics import METRICS
from hones_offline.data.tasks import TASKS, JsonlTask, Protocol, Task, get_task
from hones_offline.learning.factors import FitSettings
from hones_offline.running.distributed import number_of_processes
from hones_offline.running.evaluation import Scores, intervention, score
from hones_offline.running.prompts import Prepared
from hones_steer.errors import DataError, StateError
from hones_steer.profile import Profile


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the model, the task, the data and how they are run."""
    parser.add_argument("model", metavar="MODEL", help="Hugging Face model: folder or hub name")
    parser.add_argument(
        "--task",
        required=True,
        metavar="NAME",
        help=f"{', '.join(TASKS)}, or a name of your own for JSONL data with whole prompts",
    )
    parser.add_argument(
        "--data",
        type=Path,
        required=True,
        metavar="FILE",
        help='JSONL, {"image": ..., "prompt": ..., "targets": [...]} per line, or with --images a published file: '
        "the paper's COCO-format .json, COCO captions, VQA v2 questions, TextVQA, GQA, flickr_annotations_30k.csv:test",
    )
    parser.add_argument("--images", type=Path, metavar="DIR", help="image folder of a published dataset")
    parser.add_argument(
        "--negatives",
        type=int,
        default=49,
        metavar="N",
        help="retrieval: hard negatives per image (default: %(default)s)",
    )
    parser.add_argument(
        "--metric",
        choices=tuple(METRICS),
        default="exact_match",
        help="metric of your own task (default: %(default)s)",
    )
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        default=32,
        metavar="N",
        help="length of your own task's answers (default: %(default)s)",
    )
    parser.add_argument(
        "--first-line",
        action="store_true",
        help="score the first line of your own task's answers only, without 'Answer:' before it and quotes around it",
    )
    parser.add_argument(
        "--protocol",
        choices=get_args(Protocol),
        default="default",
        help="paper: run the paper's four tasks as its released code does (docs/methods.md; default: %(default)s)",
    )
    parser.add_argument("--limit", type=int, metavar="N", help="use the first N examples only")
    parser.add_argument(
        "--batch-size",
        type=int,
        default=16,
        metavar="N",
        help="sequences run at a time (default: %(default)s)",
    )
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="weights' type; auto: as stored on a GPU, float32 on a CPU (default: %(default)s)",
    )
    parser.add_argument(
        "--device",
        default="auto",
        help="cpu, cuda, cuda:1 …; auto spreads the model over what is there (default: %(default)s)",
    )
    parser.add_argument(
        "--max-failures",
        type=float,
        default=0.05,
        metavar="SHARE",
        help="share of examples with unusable images before it is an error (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def add_fit_arguments(parser: argparse.ArgumentParser) -> None:
    """Add how factors are learned, but for what dev may choose."""
    defaults = FitSettings()
    parser.add_argument(
        "--beta-kl",
        type=float,
        default=defaults.beta_kl,
        help="weight of the KL to the original (default: %(default)s)",
    )
    parser.add_argument(
        "--fit-batch-size",
        type=int,
        default=defaults.batch_size,
        metavar="N",
        help="examples per forward and backward (default: %(default)s)",
    )
    parser.add_argument(
        "--accumulation-steps",
        type=int,
        default=defaults.accumulation_steps,
        metavar="N",
        help="(default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=defaults.seed, help="(default: %(default)s)")
    parser.add_argument(
        "--gradient-checkpointing",
        action="store_true",
        help="less memory, more time: recompute layers going back",
    )


def fit_settings(args: argparse.Namespace) -> FitSettings:
    """The settings of `add_fit_arguments`."""
    return FitSettings(
        beta_kl=args.beta_kl,
        batch_size=args.fit_batch_size,
        accumulation_steps=args.accumulation_steps,
        seed=args.seed,
        gradient_checkpointing=args.gradient_checkpointing,
    )


def load_data(args: argparse.Namespace) -> tuple[Task, Loaded]:
    """The task that is named and the examples in --data; raises DataError for a value out of range."""
    task = _task(args)
    if args.batch_size < 1:
        raise DataError(f"--batch-size must be at least 1, not {args.batch_size}")
    if args.limit is not None and args.limit < 1:
        raise DataError(f"--limit must be at least 1, not {args.limit}")
    if not 0 <= args.max_failures <= 1:
        raise DataError(f"--max-failures is a share from 0 to 1, not {args.max_failures}")
    return task, load_file(args, args.data, task.name, args.limit)


def _task(args: argparse.Namespace) -> Task:
    if args.task in TASKS:
        if args.first_line:
            raise DataError(f"--first-line is for tasks of your own; for task {args.task!r} give --protocol paper")
        return get_task(args.task, args.protocol)
    if args.protocol != "default":
        raise DataError(
            f"--protocol {args.protocol} is for {', '.join(TASKS)}; "
            f"for task {args.task!r} give --first-line and --max-new-tokens"
        )
    return JsonlTask(args.task, args.metric, args.max_new_tokens, first_line=args.first_line)


def load_file(args: argparse.Namespace, path: Path, task: str, limit: int | None) -> Loaded:
    """The first `limit` examples in a file, JSONL or a published dataset; raises DataError if there are none."""
    if path.suffix == ".jsonl":
        loaded = load_jsonl(path)
        return Loaded(loaded.examples[:limit], loaded.skipped)
    if args.images is None:
        raise DataError(f"{path} is no .jsonl file; for a published dataset name its image folder with --images")
    if not args.images.is_dir():
        raise DataError(f"--images {args.images} is no folder; name the one that holds the images")
    return load_dataset(path, task, args.images, seed=3407, negatives=args.negatives, limit=limit)


def check_one_process(command: str) -> None:
    """Raise StateError where several processes were started: they would write one file."""
    if number_of_processes() > 1:
        raise StateError(f"`hones {command}` runs in one process; start it without torchrun or accelerate launch")


def steered(prepared: Prepared, profile: Profile, batch_size: int) -> Scores:
    """The task's metric with a profile steering."""
    with intervention(prepared, steering=profile):
        return score(prepared, batch_size=batch_size)


def failure_lines(failures: Mapping[str, str]) -> list[str]:
    """Lines that name the first examples that could not be used, with the reason for each."""
    if not failures:
        return []
    shown = [f"  {name}: {reason}" for name, reason in list(failures.items())[:5]]
    more = [f"  … and {len(failures) - 5} more (all with --json)"] if len(failures) > 5 else []
    return [f"{len(failures)} examples could not be used:", *shown, *more]


def show(as_json: bool, result: Mapping[str, Any], lines: Sequence[str]) -> None:
    """Print a result as JSON or as lines of text."""
    if as_json:
        json.dump(result, sys.stdout, indent=1, sort_keys=True)
        print()
    else:
        print("\n".join(lines))
