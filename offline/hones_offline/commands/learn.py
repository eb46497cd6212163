"""`hones learn`: from a task's data to a measured profile, in one command."""

import argparse
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from hones_offline.commands.arguments import (
    add_data_arguments,
    add_fit_arguments,
    check_one_process,
    failure_lines,
    fit_settings,
    load_data,
    load_file,
    show,
)
from hones_offline.data.examples import Example
from hones_offline.data.tasks import TASKS, JsonlTask, Task, get_task
from hones_offline.learning.choosing import FitGrid
from hones_offline.report.numbers import change, fixed, percent
from hones_offline.running.execution import Execution
from hones_offline.running.models import keep_freed_memory, load_model
from hones_offline.running.run_folder import json_bytes, resumable
from hones_offline.search.clock import Clock, seconds_of
from hones_offline.search.data import LEAST, SearchData, refuse_merged
from hones_offline.search.pipeline import Learned, check_request, default_settings, learn_from
from hones_offline.search.settings import SearchSettings
from hones_steer.errors import DataError
from hones_steer.files import write_atomically
from hones_steer.profile import Profile, save_profile

_DESCRIPTION = f"""Learn a steering profile for a task from its data, and say what it gains.

Neurons are found and factors are learned for them on --data; epochs and strength are chosen on --dev. This is done for
each of --selections, --sizes and --lr, in a fixed order that begins with the first of each, until all have been tried
or --budget is over. The best on dev is measured on --test, once, and on --others, which should lose nothing. What is
not given of --dev and --test is drawn from --data by image, a quarter each. Both need {LEAST} examples or more.

If the gain's 95% interval on --test is above 0, the profile is written into RUN/profiles and the exit code is 0.
Otherwise the exit code is 1, and no profile is written unless --keep is given. The profile holds all of this as its
evidence. A killed search goes on where it stopped when the same command is given again, and one that --budget has ended
with a larger one."""

_EPILOG = """examples:
  hones learn MODEL --task invoices --data invoices.jsonl --metric anls --out runs/invoices --budget 30m
  hones learn MODEL --task vqa --data train.jsonl --dev dev.jsonl --test test.jsonl --out runs/vqa \\
              --others ocr=ocr.jsonl reports:bleu4=reports.jsonl --against ocr=ocr-train.jsonl"""


def run(argv: Sequence[str]) -> int:
    """Entry point of `hones learn`; the exit code says whether something was gained."""
    args = _parser().parse_args(argv)
    check_one_process("learn")
    settings, budget = _settings(args), None if args.budget is None else seconds_of(args.budget)
    clock, execution = Clock(args.out, budget), Execution(args.batch_size, args.memory_gb, progress=True)
    given, skipped = _data(args, settings.fit.seed)
    check_request(settings, given, args.out)
    refuse_merged(args.model)
    keep_freed_memory()
    with resumable():
        model, processor = load_model(args.model, dtype=args.dtype, device=args.device)
        say = partial(print, file=sys.stderr if args.json else sys.stdout, flush=True)
        learned = learn_from(
            model, processor, given, settings, execution, clock, max_failures=args.max_failures, say=say
        )
    profile = replace(learned.profile, description=args.description, license=args.license)
    file = args.out / "profiles" / f"{profile.task}.safetensors"
    written, left = learned.gained or args.keep, file.exists()
    if written:
        file.parent.mkdir(exist_ok=True)
        save_profile(profile, file)
    result = {
        **_result(given, learned, profile, skipped),
        "profile": str(file) if written else None,
        "left_from_before": str(file) if left and not written else None,
        "serve": shlex.join(["hones", "serve", args.model, "--profiles", str(file.parent)]) if written else None,
    }
    write_atomically(args.out / "result.json", json_bytes(result))
    show(args.json, result, [*_found_lines(result), *_notes(result), *_profile_lines(result, args.out)])
    return 0 if learned.gained else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hones learn",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=_DESCRIPTION,
        epilog=_EPILOG,
    )
    add_data_arguments(parser)
    parser.add_argument("--dev", type=Path, metavar="FILE", help="data to choose on (default: drawn from --data)")
    parser.add_argument("--test", type=Path, metavar="FILE", help="data to measure on (default: drawn from --data)")
    parser.add_argument("--out", type=Path, required=True, metavar="RUN", help="run folder")
    parser.add_argument(
        "--budget", metavar="TIME", help="90s, 20m or 1h30m for everything; no trial is begun that would exceed it"
    )
    for name, use in (
        ("others", "data of another task, on which the profile is measured too"),
        ("against", "data of another task to find neurons on, so that what it needs is passed over (fisher:ratio)"),
    ):
        parser.add_argument(
            f"--{name}",
            nargs="+",
            action="extend",
            default=[],
            metavar="NAME[:METRIC]=FILE",
            help=f"{use}; METRIC is that of a task of your own (default: --metric; repeatable)",
        )
    parser.add_argument("--keep", action="store_true", help="write the profile also if nothing is gained")
    parser.add_argument("--description", default="", help="text for the profile")
    parser.add_argument("--license", default="", help="license of the profile, e.g. apache-2.0")
    _add_tried_arguments(parser)
    add_fit_arguments(parser)
    return parser


def _add_tried_arguments(parser: argparse.ArgumentParser) -> None:
    defaults = SearchSettings()
    tried = parser.add_argument_group("tried, the first of each first")
    shown = {name: " ".join(f"{value:g}" for value in getattr(defaults.grid, name)) for name in ("lrs", "strengths")}
    tried.add_argument(
        "--selections",
        nargs="+",
        metavar="METHOD",
        help="ways of finding neurons: fisher, dvp, hones_logprob, grad_abs … with --against also fisher:ratio "
        f"(docs/methods.md; default: {' '.join(defaults.selections)}, with --against "
        f"{' '.join(default_settings(True).selections)})",
    )
    tried.add_argument(
        "--sizes",
        type=float,
        nargs="+",
        default=defaults.sizes,
        metavar="F",
        help=f"shares of all neurons (default: {' '.join(f'{size:g}' for size in defaults.sizes)})",
    )
    tried.add_argument(
        "--lr",
        type=float,
        nargs="+",
        default=defaults.grid.lrs,
        metavar="RATE",
        help=f"AdamW's learning rates (default: {shown['lrs']})",
    )
    tried.add_argument(
        "--epochs",
        type=int,
        default=defaults.grid.epochs,
        metavar="N",
        help="passes over the data at most; dev is measured after each (default: %(default)s)",
    )
    tried.add_argument(
        "--patience",
        type=int,
        default=defaults.grid.patience,
        metavar="N",
        help="a trial stops when N epochs have brought nothing better on dev (default: %(default)s)",
    )
    tried.add_argument(
        "--strengths",
        type=float,
        nargs="+",
        default=defaults.grid.strengths,
        metavar="X",
        help=f"factors of the learned offsets, tried on dev at each trial's best epoch (default: {shown['strengths']})",
    )
    tried.add_argument(
        "--attribution-examples",
        type=int,
        default=defaults.attribution_examples,
        metavar="N",
        help="find neurons on so many of the data, drawn at random; factors are learned on all (default: %(default)s)",
    )
    tried.add_argument(
        "--memory-gb",
        type=float,
        default=4.0,
        metavar="GIB",
        help="for what finding neurons keeps, as in `hones attribute` (default: %(default)s)",
    )


def _settings(args: argparse.Namespace) -> SearchSettings:
    return SearchSettings(
        selections=args.selections or default_settings(bool(args.against)).selections,
        sizes=args.sizes,
        grid=FitGrid(lrs=args.lr, epochs=args.epochs, patience=args.patience, strengths=args.strengths),
        fit=fit_settings(args),
        attribution_examples=args.attribution_examples,
    )


def _data(args: argparse.Namespace, seed: int) -> tuple[SearchData, dict[str, str]]:
    """All examples, divided and checked, and the records of their files that were left out, with the reason."""
    task, data = load_data(args)
    skipped = dict(data.skipped)

    def read(split: str, file: Path, name: str) -> Sequence[Example]:
        loaded = load_file(args, file, name, args.limit)
        skipped.update({f"{split} {record}": why for record, why in loaded.skipped.items()})
        return loaded.examples

    dev, test = (
        None if file is None else read(split, file, task.name)
        for split, file in (("dev", args.dev), ("test", args.test))
    )
    others, against = (
        [(other, read(f"{kind} {other.name}", file, other.name)) for other, file in _named_files(args, kind)]
        for kind in ("others", "against")
    )
    given = SearchData.divided(task, data.examples, dev, test, others=others, against=against, seed=seed)
    return given, skipped


def _named_files(args: argparse.Namespace, kind: str) -> Iterator[tuple[Task, Path]]:
    """The task and the file of each NAME[:METRIC]=FILE."""
    for text in getattr(args, kind):
        name, equals, file = text.partition("=")
        name, colon, metric = name.partition(":")
        if not (name and equals and file):
            raise DataError(f"--{kind} {text!r} names no task with its file; write NAME=FILE, such as ocr=ocr.jsonl")
        if name in TASKS and colon:
            raise DataError(f"--{kind} {text!r}: task {name!r} has a metric of its own; write {name}={file}")
        if name in TASKS:
            yield get_task(name, args.protocol), Path(file)
        else:
            metric = metric if colon else args.metric
            yield JsonlTask(name, metric, args.max_new_tokens, first_line=args.first_line), Path(file)


def _result(given: SearchData, learned: Learned, profile: Profile, skipped: Mapping[str, str]) -> dict[str, Any]:
    return {
        "task": profile.task,
        "gained": learned.gained,
        "gain": learned.gain,
        "evidence": dict(profile.evidence),
        "method": dict(profile.method),
        "digest": profile.digest,
        "neurons": profile.num_neurons,
        "examples": {split: len(getattr(given, split)) for split in ("data", "dev", "test")},
        "failures": {**skipped, **learned.failures},
        "unscorable": learned.unscorable,
    }


def _found_lines(result: Mapping[str, Any]) -> list[str]:
    """The gain, on the task and on others, and what was chosen among how many trials."""
    evidence, search = result["evidence"], result["method"]["search"]
    winner = search["trials"][search["winner"]]
    gain = f"{_gain(result['gain'], evidence['gain_ci95'])} on {evidence['n']} test examples"
    others = f"; others {_gain(**evidence['others_mean'])}" if "others" in evidence else ""
    ended = f" of {search['planned']}, where the budget ended the search" if search["ended_by"] == "budget" else ""
    lines = [
        f"{result['task']}: {'' if result['gained'] else 'no gain found: '}{gain}{others}",
        f"  {evidence['metric']} {_bare(fixed(evidence['base']))} → {_bare(fixed(evidence['steered']))}",
        *(_other_line(name, other) for name, other in evidence.get("others", {}).items()),
    ]
    return [
        *lines,
        f"chosen on dev among {search['tried']} trials{ended}: {winner['selection']}, {percent(winner['size'])} of the "
        f"neurons, learning rate {winner['lr']:g}, epoch {winner['epoch']}, strength {winner['strength']:g}",
    ]


def _other_line(name: str, other: Mapping[str, Any]) -> str:
    gain = _gain(other["steered"] - other["base"], other["gain_ci95"])
    values = f"{_bare(fixed(other['base']))} → {_bare(fixed(other['steered']))}"
    return f"  {name}: {other['metric']} {values}, {gain} on {other['n']}"


def _notes(result: Mapping[str, Any]) -> list[str]:
    notes = []
    if before := result["evidence"].get("test_used_before"):
        notes.append(
            f"note: these test examples, or some of them, were scored before, with {', '.join(before)}; what is chosen "
            "after a look at test looks better there than it is, so measure on examples never used"
        )
    if wrong := result["unscorable"]:
        name, why = next(iter(wrong.items()))
        notes.append(f"note: {len(wrong)} examples score 0 whatever the model writes, the first being {name}: {why}")
    return [*notes, *failure_lines(result["failures"])]


def _profile_lines(result: Mapping[str, Any], out: Path) -> list[str]:
    if result["profile"] is None:
        left = result["left_from_before"]
        before = f"; {left} is of an earlier search and stays" if left else ""
        return [f"no profile is written (--keep would); results: {out / 'result.json'}{before}"]
    return [
        f"{result['profile']}: {result['neurons']} neurons, digest {result['digest'][:12]}",
        f"requests for {result['task']!r} are steered by it with",
        f"  {result['serve']}",
    ]


def _gain(gain: float, gain_ci95: Sequence[float]) -> str:
    """A gain with its interval: +.120 [.070, .170]."""
    low, high = (_bare(fixed(bound)) for bound in gain_ci95)
    return f"{_bare(change(gain))} [{low}, {high}]"


def _bare(number: str) -> str:
    """A number without the zero before its point."""
    return number.replace("0.", ".", 1) if number.lstrip("+−").startswith("0.") else number
