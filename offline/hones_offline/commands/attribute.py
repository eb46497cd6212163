"""`hones attribute`: find the neurons of a task on a user's own model and data."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from hones_offline.attribution.contrast import Contrast
from hones_offline.attribution.heads import HeadMetric, HeadSearch, HeadWeights
from hones_offline.attribution.methods import METHODS, SINGLE_TASK_METHODS, AttributionOptions
from hones_offline.attribution.pipeline import attribute
from hones_offline.attribution.write_in import PositivePart, Target
from hones_offline.commands.arguments import add_data_arguments, failure_lines, load_data, show
from hones_offline.commands.result import read_others, write_result
from hones_offline.running.distributed import launched, own_device
from hones_offline.running.models import keep_freed_memory, load_model
from hones_offline.running.run_folder import resumable
from hones_steer.errors import DataError
from hones_steer.profile import ModelIdentity


def run(argv: Sequence[str]) -> int:
    """Entry point of `hones attribute`."""
    args = _parser().parse_args(argv)
    options = AttributionOptions(  # checked before anything is loaded
        method=args.method,
        head_metric=args.head_metric,
        top_heads=args.top_heads,
        top_fraction=args.top_fraction,
        target=args.target,
        positive_part=args.positive_part,
        head_weights=args.head_weights,
        heads=args.heads,
        error=args.error,
        margin=args.margin,
        seed=args.seed,
    )
    if args.contrast and not args.against:
        raise DataError("--contrast says how to compare with other runs; name them with --against, or leave it out")
    if args.against and options.method == "random":
        raise DataError("method 'random' draws its importances, which no contrast changes; leave --against out")
    with resumable(), launched() as processes:
        task, loaded = load_data(args)
        others = read_others(args.against, args.out, task, loaded.examples, options)
        keep_freed_memory()
        model, processor = load_model(args.model, dtype=args.dtype, device=own_device(args.device))
        contrast: Contrast = args.contrast or "ratio"
        attribution = attribute(
            model,
            processor,
            task,
            loaded.examples,
            top_heads=options.top_heads,
            top_fraction=options.top_fraction,
            head_metric=options.head_metric,
            method=options.method,
            target=options.target,
            positive_part=options.positive_part,
            head_weights=options.head_weights,
            heads=options.heads,
            error=options.error,
            margin=options.margin,
            against=[other.for_model(model) for other in others],
            contrast=contrast,
            seed=options.seed,
            batch_size=args.batch_size,
            memory_gb=args.memory_gb,
            run_dir=args.out,
            max_failures=args.max_failures,
            progress=True,
            processes=processes,
        )
        if processes.rank == 0:
            identity = ModelIdentity.from_model(model)
            result = write_result(args.out, task, loaded, options, attribution, identity, others, contrast)
            show(args.json, result, _result_lines(result, args.out))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hones attribute",
        description="Find the FFN neurons a task depends on: those whose scaling moves its answers most, told from one "
        "backward pass of each example. --method hones is the paper's way: it scores every attention head by what "
        "replacing it costs, then the neurons by how much the best heads drive what they write towards the answers. "
        "With --against, the neurons that other tasks need as well are passed over. A killed run goes on where it "
        "stopped when the same command is given again. Several GPUs share the work when torchrun or accelerate launch "
        "starts one process for each (docs/scaling.md).",
        epilog="examples: hones attribute llava-hf/llava-1.5-7b-hf --task vqa --data vqa.jsonl --out runs/vqa   |   "
        "hones attribute MODEL --task ocr --data coco.json --images coco/ --out runs/ocr --method hones "
        "--head-metric logprob   |   "
        "hones attribute MODEL --task vqa --data vqa.jsonl --out runs/vqa --against runs/ocr runs/caption   |   "
        "torchrun --nproc-per-node 8 -m hones_steer attribute MODEL --task vqa --data vqa.jsonl --out runs/vqa",
    )
    add_data_arguments(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="run folder for results")
    parser.add_argument(
        "--top-heads",
        type=int,
        default=30,
        metavar="K",
        help="with --method hones or head_grad: heads that guide the importance; 30 for LLaVA-1.5-7B, 25 for "
        "Qwen2.5-VL-7B (default: %(default)s)",
    )
    parser.add_argument(
        "--top-fraction",
        type=float,
        default=0.01,
        metavar="F",
        help="bank's share of all neurons (default: %(default)s)",
    )
    parser.add_argument(
        "--head-metric",
        choices=get_args(HeadMetric),
        default="task",
        help="score heads, and the untouched model, by the task's metric under greedy generation (the paper's way), or "
        "by the answers' log-probability: one forward per batch, much faster (default: %(default)s)",
    )
    parser.add_argument(
        "--heads",
        choices=get_args(HeadSearch),
        default="exact",
        help="run every head on every example; stop running a head once it has surely lost; or run only those that "
        "attribution patching estimates highest, by log-probability whatever --head-metric (default: %(default)s)",
    )
    parser.add_argument(
        "--error",
        type=float,
        default=0.05,
        metavar="P",
        help="with --heads race: probability of finding other heads than exact does (default: %(default)s)",
    )
    parser.add_argument(
        "--margin",
        type=float,
        default=1.5,
        metavar="SHARE",
        help="with --heads patch: heads to run beyond --top-heads, as a share of them (default: %(default)s)",
    )
    parser.add_argument(
        "--memory-gb",
        type=float,
        default=4.0,
        metavar="GIB",
        help="for what enters the layers and what their heads put out, kept of --batch-size sequences: sequences x "
        "tokens x 2 hidden sizes x bytes of each layer, for as many layers as fit; as much again for each of two KV "
        "caches where answers are generated; for methods that run the model backward, what a forward keeps for that "
        "(default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=3407, help="order of the examples (default: %(default)s)")
    parser.add_argument(
        "--against",
        type=Path,
        nargs="+",
        action="extend",
        default=[],
        metavar="RUN",
        help="choose the neurons that matter to this task and not to the tasks of these runs: folders that `hones "
        "attribute` has finished on the same model by the same method, each with data of its own. Attribute every task "
        "without it first; the same command with --against then computes nothing again (repeatable)",
    )
    parser.add_argument(
        "--contrast",
        choices=get_args(Contrast),
        help="with --against: of the task's most important neurons those whose importance is the largest multiple of "
        "any other task's (ratio), or of all neurons those that exceed it most (max); ratio keeps the bank's size "
        "(default: ratio)",
    )
    _add_method_arguments(parser)
    return parser


def _add_method_arguments(parser: argparse.ArgumentParser) -> None:
    meanings = {name: method.meaning for name, method in METHODS.items()}
    meanings |= {"hones": "the paper's, guided by heads", "random": "importances drawn evenly"}
    parser.add_argument(
        "--method",
        choices=SINGLE_TASK_METHODS,
        default=AttributionOptions.method,
        help=f"{'; '.join(f'{name}, {meanings[name]}' for name in SINGLE_TASK_METHODS)} (default: %(default)s)",
    )
    parser.add_argument(
        "--target",
        choices=get_args(Target),
        default="paper",
        help="direction of the answer: the paper's, less that of the other answers, or of unembedding rows less their "
        "mean (default: %(default)s)",
    )
    parser.add_argument(
        "--positive-part",
        choices=get_args(PositivePart),
        default="mean",
        help="taken of the mean over examples, or of each example before the mean (default: %(default)s)",
    )
    parser.add_argument(
        "--head-weights",
        choices=get_args(HeadWeights),
        default="score",
        help="weights of the heads that guide the importance (default: %(default)s)",
    )


def _result_lines(result: Mapping[str, Any], out: Path) -> list[str]:
    bank = result["bank"]
    heads = ", ".join(f"{layer}.{head} ({weight:.3g})" for layer, head, weight in result["heads"][:8])
    return [
        f"{result['task']}: {sum(map(len, bank.values()))} neurons in {len(bank)} layers, from {result['n']} examples",
        *([f"strongest heads (layer.head): {heads}"] if heads else []),
        *([_contrast_line(result)] if result["against"] else []),
        *([_race_line(result["race"])] if "race" in result else []),
        *([_preselection_line(result["preselection"])] if "preselection" in result else []),
        *failure_lines(result["failures"]),
        f"results: {out}",
    ]


def _contrast_line(result: Mapping[str, Any]) -> str:
    return f"contrast: {result['contrast']} to {', '.join(result['against'])}"


def _race_line(race: Mapping[str, Any]) -> str:
    return (
        f"race: {race['evaluations'] / race['of']:.0%} of {race['of']} evaluations of a head on an example; "
        f"{race['finished']} heads finished; other heads than exact's with probability {race['error']:g} at most"
    )


def _preselection_line(preselection: Mapping[str, Any]) -> str:
    return (
        f"preselection: {preselection['evaluations'] / preselection['of']:.0%} of {preselection['of']} evaluations of "
        f"a head on an example; {preselection['finished']} heads preselected by {preselection['metric']}, from two "
        f"forward and backward passes of each of {preselection['pairs']} answers"
    )
