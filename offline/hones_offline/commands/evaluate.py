"""`hones evaluate`: measure a task with and without steering, and with banks masked."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hones_offline.commands.arguments import (
    add_data_arguments,
    check_one_process,
    failure_lines,
    load_data,
    load_file,
    show,
    steered,
)
from hones_offline.commands.result import read_bank
from hones_offline.data.examples import Loaded, check_disjoint
from hones_offline.data.metrics import FloatArray
from hones_offline.data.neurons import Bank, NeuronIndex
from hones_offline.data.tasks import Task
from hones_offline.running.evaluation import Scores, intervention, position_means, score
from hones_offline.running.models import keep_freed_memory, load_model
from hones_offline.running.prompts import Prepared, prepare
from hones_steer.errors import DataError
from hones_steer.profile import ModelIdentity, load_profile


def run(argv: Sequence[str]) -> int:
    """Entry point of `hones evaluate`."""
    parser = _parser()
    args = parser.parse_args(argv)
    check_one_process("evaluate")
    if args.random_banks < 0:
        raise DataError(f"--random-banks must be zero or more, not {args.random_banks}")
    if args.random_banks and not args.mask:
        parser.error("--random-banks stand beside the bank of a --mask")
    if args.ablation != "zero" and not args.mask:
        parser.error("--ablation is of the banks of a --mask")
    task, loaded = load_data(args)
    _check_apart(args, task, loaded)
    profiles = {str(path): load_profile(path) for path in args.profile}
    masked = {str(path): read_bank(path) for path in args.mask}
    keep_freed_memory()
    model, processor = load_model(args.model, dtype=args.dtype, device=args.device)
    identity = ModelIdentity.from_model(model)
    for profile in profiles.values():
        profile.base_model.check(identity)
    banks = {path: found.for_model(model) for path, found in masked.items()}
    prepared = prepare(model, processor, task, loaded.examples, max_failures=args.max_failures, progress=True)
    base = score(prepared, batch_size=args.batch_size)
    fill = position_means(prepared, batch_size=args.batch_size) if args.ablation == "mean" else None
    rows = {"base": _row(base, base)}
    for name, profile in profiles.items():
        rows[name] = _row(steered(prepared, profile, args.batch_size), base)
    for name, bank in banks.items():
        rows[f"{name} masked"] = _masked_row(prepared, bank, fill, base, args.batch_size)
        for seed in range(args.random_banks):
            random_bank = bank.random(NeuronIndex.of(prepared.decoder.layout), seed)
            rows[f"{name} random bank {seed} masked"] = _masked_row(prepared, random_bank, fill, base, args.batch_size)
    result = {
        "task": task.name,
        "metric": task.metric,
        "protocol": task.protocol,
        "n": base.n,
        "rows": rows,
        "failures": {**loaded.skipped, **prepared.failures},
    }
    show(args.json, result, _evaluation_lines(result))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hones evaluate",
        description="Measure a task on a model: as it is, steered by profiles, and with a bank's neurons masked. "
        "Differences come with 95% intervals (paired bootstrap over examples).",
        epilog="example: hones evaluate MODEL --task vqa --data test.jsonl --profile vqa.safetensors --mask runs/vqa",
    )
    add_data_arguments(parser)
    parser.add_argument(
        "--profile",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="measure steered by it (repeatable)",
    )
    parser.add_argument(
        "--mask",
        type=Path,
        action="append",
        default=[],
        metavar="DIR",
        help="measure with the bank of this `hones attribute` run masked, of this task or another (repeatable)",
    )
    parser.add_argument(
        "--random-banks",
        type=int,
        default=0,
        metavar="N",
        help="with --mask: also mask N random banks of the same size per layer (default: %(default)s)",
    )
    parser.add_argument(
        "--ablation",
        choices=("zero", "mean"),
        default="zero",
        help="with --mask: set neurons to zero, or to their mean over the measured examples, over all positions of "
        "prompt and answer (default: %(default)s)",
    )
    parser.add_argument(
        "--apart-from",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="refuse to measure on an image of this file, the discovery or dev data (repeatable)",
    )
    return parser


def _check_apart(args: argparse.Namespace, task: Task, loaded: Loaded) -> None:
    """Raise DataError if an image of --data is in a file of --apart-from, naming it."""
    name = "caption" if task.name == "retrieval" else task.name  # the same images, without a search for negatives
    for path in args.apart_from:
        other = load_file(args, path, name, limit=None)
        check_disjoint(**{"--data": loaded.examples, f"--apart-from {path}": other.examples})


def _row(measured: Scores, base: Scores) -> dict[str, Any]:
    return {
        "value": measured.value,
        "ci95": measured.interval(),
        "difference": measured.value - base.value,
        "difference_ci95": measured.gain_interval(base),
    }


def _masked_row(
    prepared: Prepared, bank: Bank, fill: FloatArray | None, base: Scores, batch_size: int
) -> dict[str, Any]:
    with intervention(prepared, mask=bank, fill=fill):
        measured = score(prepared, batch_size=batch_size)
    ablation = "zero" if fill is None else "mean"
    return {"neurons": bank.size, "ablation": ablation, **_row(measured, base)}


def _evaluation_lines(result: Mapping[str, Any]) -> list[str]:
    width = max(map(len, result["rows"]))
    lines = [f"{result['task']}: {result['metric']} on {result['n']} examples"]
    for name, row in result["rows"].items():
        low, high = row["difference_ci95"]
        change = "" if name == "base" else f"   {row['difference']:+.4f}  95% [{low:+.4f}, {high:+.4f}]"
        lines.append(f"  {name:{width}}  {row['value']:.4f}{change}")
    return [*lines, *failure_lines(result["failures"])]
