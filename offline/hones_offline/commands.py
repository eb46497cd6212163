"""`hones attribute`, `hones fit`, `hones evaluate`: the method on a user's own model and data."""

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch

from hones_offline.attribution.pipeline import METHODS as ATTRIBUTION_METHODS
from hones_offline.attribution.pipeline import Attribution, MethodOptions
from hones_offline.attribution.pipeline import attribute as find_task_bank
from hones_offline.attribution.write_in import HeadWeights, PositivePart, Target
from hones_offline.data.datasets import load_dataset
from hones_offline.data.examples import Loaded, check_disjoint, load_jsonl
from hones_offline.data.metrics import METRICS
from hones_offline.data.neurons import Bank, bank_size, check_bank, random_bank
from hones_offline.data.tasks import TASKS, JsonlTask, Task
from hones_offline.learning.factors import FIXED_AMP, FitSettings, fit_run_settings, grid_search, learn, uniform_profile
from hones_offline.running.distributed import launched, number_of_processes, own_device
from hones_offline.running.evaluation import Scores, intervention, score
from hones_offline.running.models import keep_freed_memory, load_model
from hones_offline.running.prompts import Prepared, prepare
from hones_offline.running.run_folder import RunFolder, json_bytes, read_json, resumable
from hones_steer.errors import DataError, MismatchError, ProfileError, StateError
from hones_steer.files import write_atomically
from hones_steer.layout import find_layout
from hones_steer.profile import ModelIdentity, Profile, load_profile, save_profile

METHODS = ("hones", "hones_no_kl", "random_neurons", "fixed_amp", "grid_search")
RESULT = "result.json"


def attribute(argv: Sequence[str]) -> int:
    """Entry point of `hones attribute`."""
    parser = argparse.ArgumentParser(
        prog="hones attribute",
        description="Find the FFN neurons a task depends on. Scores every attention head by what replacing it costs, "
        "then the neurons by how much the best heads drive what they write towards the answers. A killed run goes on "
        "where it stopped when the same command is given again. Several GPUs share the work when torchrun or "
        "accelerate launch starts one process for each (docs/scaling.md).",
        epilog="examples: hones attribute llava-hf/llava-1.5-7b-hf --task vqa --data vqa.jsonl --out runs/vqa   |   "
        "hones attribute MODEL --task ocr --data coco.json --images coco/ --out runs/ocr --head-metric logprob   |   "
        "torchrun --nproc-per-node 8 -m hones_steer attribute MODEL --task vqa --data vqa.jsonl --out runs/vqa",
    )
    _add_data_arguments(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="run folder for results")
    parser.add_argument(
        "--top-heads",
        type=int,
        default=30,
        metavar="K",
        help="heads that guide the importance; 30 for LLaVA-1.5-7B, 25 for Qwen2.5-VL-7B (default: %(default)s)",
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
        choices=("task", "logprob"),
        default="task",
        help="score heads by the task's metric under greedy generation (the paper's way), or by the answers' "
        "log-probability: one forward per batch, much faster (default: %(default)s)",
    )
    parser.add_argument(
        "--heads",
        choices=("exact", "race"),
        default="exact",
        help="run every head on every example, or stop running a head once it has surely lost (default: %(default)s)",
    )
    parser.add_argument(
        "--error",
        type=float,
        default=0.05,
        metavar="P",
        help="with --heads race: probability of finding other heads than exact does (default: %(default)s)",
    )
    parser.add_argument(
        "--memory-gb",
        type=float,
        default=4.0,
        metavar="GIB",
        help="for what enters the layers and what their heads put out, kept of --batch-size sequences: sequences x "
        "tokens x 2 hidden sizes x bytes of each layer, for as many layers as fit; as much again for each of two KV "
        "caches where answers are generated (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=3407, help="order of the examples (default: %(default)s)")
    parser.add_argument(
        "--without",
        type=Path,
        action="append",
        default=[],
        metavar="DIR",
        help="pass over the neurons in the bank of this run, another task's on the same model; the next ones take "
        "their place (repeatable; what was found before with the same other arguments is not computed again)",
    )
    _add_method_arguments(parser)
    args = parser.parse_args(argv)
    options = MethodOptions(args.method, args.target, args.positive_part, args.head_weights)
    with resumable(), launched() as processes:
        task, loaded = _load_data(args)
        others = [_read_found(path) for path in args.without]
        keep_freed_memory()
        model, processor = load_model(args.model, dtype=args.dtype, device=own_device(args.device))
        found = find_task_bank(
            model,
            processor,
            task,
            loaded.examples,
            top_heads=args.top_heads,
            top_fraction=args.top_fraction,
            head_metric=args.head_metric,
            **asdict(options),
            heads=args.heads,
            error=args.error,
            without=[other.bank_for(model) for other in others],
            seed=args.seed,
            batch_size=args.batch_size,
            memory_gb=args.memory_gb,
            run_dir=args.out,
            max_failures=args.max_failures,
            progress=True,
            processes=processes,
        )
        if processes.rank == 0:
            identity = ModelIdentity.from_model(model)
            result = _attribution_result(task, found, loaded.skipped, args.top_fraction, identity) | asdict(options)
            result["without"] = [str(path) for path in args.without]
            write_atomically(args.out / RESULT, json_bytes(result))
            _show(args.json, result, _attribution_lines(result, args.out))
    return 0


def fit(argv: Sequence[str]) -> int:
    """Entry point of `hones fit`."""
    parser = argparse.ArgumentParser(
        prog="hones fit",
        description="Learn factors for the neurons that `hones attribute` found and write them as a steering profile. "
        "With --dev the profile carries its evidence: the metric with and without steering.",
        epilog="example: hones fit MODEL --task vqa --data train.jsonl --bank runs/vqa --dev dev.jsonl "
        "--out vqa.safetensors",
    )
    _add_data_arguments(parser)
    parser.add_argument("--bank", type=Path, required=True, metavar="DIR", help="run folder of `hones attribute`")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="profile to write (.safetensors)")
    parser.add_argument("--dev", type=Path, metavar="FILE", help="held-out data for evidence and for grid_search")
    parser.add_argument(
        "--method",
        choices=METHODS,
        default="hones",
        help="hones, or one of its baselines (default: %(default)s)",
    )
    parser.add_argument(
        "--state", type=Path, metavar="DIR", help="folder for resuming (default: fit-METHOD inside --bank)"
    )
    parser.add_argument("--description", default="", help="text for the profile")
    parser.add_argument("--license", default="", help="licence of the profile, e.g. apache-2.0")
    _add_fit_arguments(parser)
    args = parser.parse_args(argv)
    _check_one_process("fit")
    if args.method == "grid_search" and args.dev is None:
        parser.error("grid_search chooses its factor on --dev data")
    settings = _fit_settings(args)
    _check_writable(args.out)
    task, loaded = _load_data(args)
    dev_loaded = None if args.dev is None else _load_file(args, args.dev, task.name, args.limit)
    if dev_loaded is not None:
        check_disjoint(data=loaded.examples, dev=dev_loaded.examples)
    found = _read_found(args.bank, task)
    keep_freed_memory()
    model, processor = load_model(args.model, dtype=args.dtype, device=args.device)
    bank = found.bank_for(model)
    prepared = prepare(model, processor, task, loaded.examples, max_failures=args.max_failures, progress=True)
    dev = None
    if dev_loaded is not None:
        dev = prepare(model, processor, task, dev_loaded.examples, max_failures=args.max_failures, progress=True)
    profile = _fitted(args, settings, prepared, dev, bank)
    evidence = {}
    if dev is not None:
        base = score(dev, batch_size=args.batch_size)
        evidence = _steered(dev, profile, args.batch_size).evidence(base, "dev")
    profile = replace(profile, description=args.description, license=args.license, evidence=evidence)
    save_profile(profile, args.out)
    result = {
        "profile": str(args.out),
        "digest": profile.digest,
        "task": task.name,
        "method": dict(profile.method),
        "evidence": evidence,
        "failures": {**loaded.skipped, **prepared.failures},
    }
    _show(args.json, result, _fit_lines(result, profile))
    return 0


def evaluate(argv: Sequence[str]) -> int:
    """Entry point of `hones evaluate`."""
    parser = argparse.ArgumentParser(
        prog="hones evaluate",
        description="Measure a task on a model: as it is, steered by profiles, and with a bank's neurons set to zero. "
        "Differences come with 95%% intervals (paired bootstrap over examples).",
        epilog="example: hones evaluate MODEL --task vqa --data test.jsonl --profile vqa.safetensors --mask runs/vqa",
    )
    _add_data_arguments(parser)
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
        help="measure with the bank of this `hones attribute` run at zero, of this task or another (repeatable)",
    )
    parser.add_argument(
        "--random-banks",
        type=int,
        default=0,
        metavar="N",
        help="with --mask: also mask N random banks of the same size per layer (default: %(default)s)",
    )
    parser.add_argument(
        "--apart-from",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="refuse to measure on an image of this file, the discovery or dev data (repeatable)",
    )
    args = parser.parse_args(argv)
    _check_one_process("evaluate")
    if args.random_banks < 0:
        raise DataError(f"--random-banks must be zero or more, not {args.random_banks}")
    if args.random_banks and not args.mask:
        parser.error("--random-banks stand beside the bank of a --mask")
    task, loaded = _load_data(args)
    _check_apart(args, task, loaded)
    profiles = {str(path): load_profile(path) for path in args.profile}
    masked = {str(path): _read_found(path) for path in args.mask}
    keep_freed_memory()
    model, processor = load_model(args.model, dtype=args.dtype, device=args.device)
    identity = ModelIdentity.from_model(model)
    for profile in profiles.values():
        profile.base_model.check(identity)
    banks = {path: found.bank_for(model) for path, found in masked.items()}
    prepared = prepare(model, processor, task, loaded.examples, max_failures=args.max_failures, progress=True)
    base = score(prepared, batch_size=args.batch_size)
    rows = {"base": _row(base, base)}
    for name, profile in profiles.items():
        rows[name] = _row(_steered(prepared, profile, args.batch_size), base)
    for name, bank in banks.items():
        rows[f"{name} masked"] = _masked_row(prepared, bank, base, args.batch_size)
        for seed in range(args.random_banks):
            other = random_bank(bank, identity.intermediate_size, seed)
            rows[f"{name} random bank {seed} masked"] = _masked_row(prepared, other, base, args.batch_size)
    result = {
        "task": task.name,
        "metric": task.metric,
        "n": base.n,
        "rows": rows,
        "failures": {**loaded.skipped, **prepared.failures},
    }
    _show(args.json, result, _evaluation_lines(result))
    return 0


# ------------------------------------------------------------------------------------------- arguments, data


def _add_data_arguments(parser: argparse.ArgumentParser) -> None:
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


def _add_method_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--method",
        choices=ATTRIBUTION_METHODS,
        default="hones",
        help="hones, or a baseline without heads: dvp (what neurons write towards the answers), ap and ma (how often "
        "and how strongly they are active), grad_act (gradient x activation), random (default: %(default)s)",
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


def _add_fit_arguments(parser: argparse.ArgumentParser) -> None:
    defaults = FitSettings()
    parser.add_argument("--epochs", type=int, default=defaults.epochs, help="(default: %(default)s)")
    parser.add_argument("--lr", type=float, default=defaults.lr, help="AdamW's learning rate (default: %(default)s)")
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


def _load_data(args: argparse.Namespace) -> tuple[Task, Loaded]:
    task = TASKS.get(args.task) or JsonlTask(args.task, args.metric, args.max_new_tokens)
    if args.batch_size < 1:
        raise DataError(f"--batch-size must be at least 1, not {args.batch_size}")
    if args.limit is not None and args.limit < 1:
        raise DataError(f"--limit must be at least 1, not {args.limit}")
    if not 0 <= args.max_failures <= 1:
        raise DataError(f"--max-failures is a share from 0 to 1, not {args.max_failures}")
    return task, _load_file(args, args.data, task.name, args.limit)


def _load_file(args: argparse.Namespace, path: Path, task: str, limit: int | None) -> Loaded:
    if path.suffix == ".jsonl":
        loaded = load_jsonl(path)
        return Loaded(loaded.examples[:limit], loaded.skipped)
    if args.images is None:
        raise DataError(f"{path} is no .jsonl file; for a published dataset name its image folder with --images")
    if not args.images.is_dir():
        raise DataError(f"--images {args.images} is no folder; name the one that holds the images")
    return load_dataset(path, task, args.images, seed=3407, negatives=args.negatives, limit=limit)


def _check_apart(args: argparse.Namespace, task: Task, loaded: Loaded) -> None:
    """Raise DataError if an image of --data is in a file of --apart-from, naming it."""
    name = "caption" if task.name == "retrieval" else task.name  # the same images, without a search for negatives
    for path in args.apart_from:
        other = _load_file(args, path, name, limit=None)
        check_disjoint(**{"--data": loaded.examples, f"--apart-from {path}": other.examples})


def _check_one_process(command: str) -> None:
    """Several would write one file."""
    if number_of_processes() > 1:
        raise StateError(f"`hones {command}` runs in one process; start it without torchrun or accelerate launch")


def _check_writable(file: Path) -> None:
    """Before hours of work, not after them."""
    if file.is_dir() or not (file.parent.is_dir() and os.access(file.parent, os.W_OK)):
        raise DataError(f"--out {file} cannot be written; name a file in an existing folder that you may write to")


@dataclass(frozen=True)
class _Found:
    """The bank of a finished `hones attribute` run, and the model it belongs to."""

    folder: Path
    bank: Bank
    model: ModelIdentity

    def bank_for(self, model: torch.nn.Module) -> Bank:
        """The bank, if it belongs to this model; raises MismatchError naming the folder if not."""
        try:
            self.model.check(ModelIdentity.from_model(model))
        except MismatchError as error:
            raise MismatchError(
                f"{self.folder} holds the bank of another model; run `hones attribute` on the one given"
            ) from error
        check_bank(self.bank, find_layout(model))
        return self.bank


def _read_found(folder: Path, task: Task | None = None) -> _Found:
    """What `hones attribute` wrote into a folder, for the given task if any."""
    result = read_json(folder / RESULT)
    try:
        bank = {int(layer): np.array(neurons, dtype=np.int32) for layer, neurons in result["bank"].items()}
        found = _Found(folder, bank, ModelIdentity(**result["model"]))
        name = result["task"]
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, ProfileError) as error:
        raise DataError(f"{folder / RESULT} is no result of `hones attribute`; run it again") from error
    if task is not None and name != task.name:
        raise DataError(f"{folder} holds the bank of task {name!r}, not {task.name!r}")
    return found


# ------------------------------------------------------------------------------------------- results


def _attribution_result(
    task: Task, found: Attribution, skipped: Mapping[str, str], top_fraction: float, model: ModelIdentity
) -> dict[str, Any]:
    return {
        "task": task.name,
        "model": asdict(model),
        "metric": task.metric,
        "n": found.n,
        "base": found.base,
        "heads": found.heads,
        "top_fraction": top_fraction,
        "bank": {str(layer): neurons.tolist() for layer, neurons in found.bank.items()},
        "failures": {**skipped, **found.failures},
        **({"race": asdict(found.race)} if found.race else {}),
    }


def _attribution_lines(result: Mapping[str, Any], out: Path) -> list[str]:
    bank = result["bank"]
    heads = ", ".join(f"{layer}.{head} ({weight:.3g})" for layer, head, weight in result["heads"][:8])
    raced = result.get("race")
    saved = [] if raced is None else [_race_line(raced)]
    return [
        f"{result['task']}: {sum(map(len, bank.values()))} neurons in {len(bank)} layers, from {result['n']} examples",
        *([f"strongest heads (layer.head): {heads}"] if heads else []),
        *saved,
        *_failure_lines(result["failures"]),
        f"results: {out}",
    ]


def _race_line(race: Mapping[str, Any]) -> str:
    return (
        f"race: {race['evaluations'] / race['of']:.0%} of {race['of']} evaluations of a head on an example; "
        f"{race['finished']} heads finished; other heads than exact's with probability {race['error']:g} at most"
    )


def _fit_settings(args: argparse.Namespace) -> FitSettings:
    return FitSettings(
        epochs=args.epochs,
        lr=args.lr,
        beta_kl=0.0 if args.method == "hones_no_kl" else args.beta_kl,
        batch_size=args.fit_batch_size,
        accumulation_steps=args.accumulation_steps,
        seed=args.seed,
        gradient_checkpointing=args.gradient_checkpointing,
    )


def _fitted(
    args: argparse.Namespace, settings: FitSettings, prepared: Prepared, dev: Prepared | None, bank: Bank
) -> Profile:
    if args.method == "fixed_amp":
        return uniform_profile(prepared, bank, FIXED_AMP, "fixed_amp")
    if args.method == "grid_search":
        assert dev is not None  # checked with the arguments
        return grid_search(dev, bank, lambda profile: _steered(dev, profile, args.batch_size).value)
    if args.method == "random_neurons":
        bank = random_bank(bank, prepared.decoder.layout.intermediate_size, args.seed)
    run = RunFolder(args.state or args.bank / f"fit-{args.method}", fit_run_settings(prepared, bank, settings))
    with resumable():
        return learn(prepared, bank, settings, run=run, name=args.method, progress=True)


def _row(measured: Scores, base: Scores) -> dict[str, Any]:
    return {
        "value": measured.value,
        "ci95": measured.interval(),
        "difference": measured.value - base.value,
        "difference_ci95": measured.gain_interval(base),
    }


def _steered(prepared: Prepared, profile: Profile, batch_size: int) -> Scores:
    with intervention(prepared, steering=profile):
        return score(prepared, batch_size=batch_size)


def _masked_row(prepared: Prepared, bank: Bank, base: Scores, batch_size: int) -> dict[str, Any]:
    with intervention(prepared, mask=bank):
        return {"neurons": bank_size(bank), **_row(score(prepared, batch_size=batch_size), base)}


def _fit_lines(result: Mapping[str, Any], profile: Profile) -> list[str]:
    evidence = result["evidence"]
    lines = [f"{result['profile']}: {profile.num_neurons} neurons, digest {profile.short_digest}"]
    if evidence:
        low, high = evidence["gain_ci95"]
        lines.append(
            f"{evidence['metric']} on {evidence['n']} dev examples: {evidence['base']:.4f} → {evidence['steered']:.4f} "
            f"(gain {evidence['steered'] - evidence['base']:+.4f}, 95% [{low:+.4f}, {high:+.4f}])"
        )
    return [*lines, *_failure_lines(result["failures"])]


def _evaluation_lines(result: Mapping[str, Any]) -> list[str]:
    width = max(map(len, result["rows"]))
    lines = [f"{result['task']}: {result['metric']} on {result['n']} examples"]
    for name, row in result["rows"].items():
        low, high = row["difference_ci95"]
        change = "" if name == "base" else f"   {row['difference']:+.4f}  95% [{low:+.4f}, {high:+.4f}]"
        lines.append(f"  {name:{width}}  {row['value']:.4f}{change}")
    return [*lines, *_failure_lines(result["failures"])]


def _failure_lines(failures: Mapping[str, str]) -> list[str]:
    if not failures:
        return []
    shown = [f"  {name}: {reason}" for name, reason in list(failures.items())[:5]]
    more = [f"  … and {len(failures) - 5} more (all with --json)"] if len(failures) > 5 else []
    return [f"{len(failures)} examples could not be used:", *shown, *more]


def _show(as_json: bool, result: Mapping[str, Any], lines: Sequence[str]) -> None:
    if as_json:
        json.dump(result, sys.stdout, indent=1, sort_keys=True)
        print()
    else:
        print("\n".join(lines))
