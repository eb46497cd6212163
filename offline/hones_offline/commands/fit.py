"""`hones fit`: learn a steering profile for the bank that `hones attribute` found."""

import argparse
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
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
from hones_offline.data.examples import check_disjoint
from hones_offline.data.neurons import Bank, NeuronIndex
from hones_offline.learning.factors import FitSettings, fit_run_settings, learn
from hones_offline.learning.methods import STEERING_METHODS, SteeringInputs
from hones_offline.running.evaluation import score
from hones_offline.running.execution import Execution
from hones_offline.running.models import keep_freed_memory, load_model
from hones_offline.running.prompts import Prepared, prepare
from hones_offline.running.run_folder import RunFolder, resumable
from hones_steer.errors import DataError
from hones_steer.profile import Profile, save_profile


def run(argv: Sequence[str]) -> int:
    """Entry point of `hones fit`."""
    parser = _parser()
    args = parser.parse_args(argv)
    check_one_process("fit")
    if STEERING_METHODS[args.method].chosen_on_dev and args.dev is None:
        parser.error(f"{args.method} chooses its factor on --dev data")
    settings = _fit_settings(args)
    _check_writable(args.out)
    task, loaded = load_data(args)
    dev_loaded = None if args.dev is None else load_file(args, args.dev, task.name, args.limit)
    if dev_loaded is not None:
        check_disjoint(data=loaded.examples, dev=dev_loaded.examples)
    found = read_bank(args.bank, task)
    keep_freed_memory()
    model, processor = load_model(args.model, dtype=args.dtype, device=args.device)
    bank = found.for_model(model)
    prepared = prepare(model, processor, task, loaded.examples, max_failures=args.max_failures, progress=True)
    dev = None
    if dev_loaded is not None:
        dev = prepare(model, processor, task, dev_loaded.examples, max_failures=args.max_failures, progress=True)
    profile = _fitted(args, settings, prepared, dev, bank)
    evidence = {}
    if dev is not None:
        base = score(dev, batch_size=args.batch_size)
        evidence = steered(dev, profile, args.batch_size).evidence(base, "dev")
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
    show(args.json, result, _fit_lines(result, profile))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hones fit",
        description="Learn factors for the neurons that `hones attribute` found and write them as a steering profile. "
        "With --dev the profile carries its evidence: the metric with and without steering.",
        epilog="example: hones fit MODEL --task vqa --data train.jsonl --bank runs/vqa --dev dev.jsonl "
        "--out vqa.safetensors",
    )
    add_data_arguments(parser)
    parser.add_argument("--bank", type=Path, required=True, metavar="DIR", help="run folder of `hones attribute`")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="profile to write (.safetensors)")
    parser.add_argument("--dev", type=Path, metavar="FILE", help="held-out data for evidence and for grid_search")
    parser.add_argument(
        "--method",
        choices=tuple(reversed([*STEERING_METHODS])),
        default="hones",
        help="hones, or one of its baselines (default: %(default)s)",
    )
    parser.add_argument(
        "--state", type=Path, metavar="DIR", help="folder for resuming (default: fit-METHOD inside --bank)"
    )
    parser.add_argument("--description", default="", help="text for the profile")
    parser.add_argument("--license", default="", help="license of the profile, e.g. apache-2.0")
    _add_fit_arguments(parser)
    return parser


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


def _check_writable(file: Path) -> None:
    """Raise DataError, before hours of work, if the file cannot be written."""
    if file.is_dir() or not (file.parent.is_dir() and os.access(file.parent, os.W_OK)):
        raise DataError(f"--out {file} cannot be written; name a file in an existing folder that you may write to")


def _fit_settings(args: argparse.Namespace) -> FitSettings:
    return FitSettings(
        epochs=args.epochs,
        lr=args.lr,
        beta_kl=args.beta_kl,
        batch_size=args.fit_batch_size,
        accumulation_steps=args.accumulation_steps,
        seed=args.seed,
        gradient_checkpointing=args.gradient_checkpointing,
    )


def _fitted(
    args: argparse.Namespace, settings: FitSettings, prepared: Prepared, dev: Prepared | None, bank: Bank
) -> Profile:
    def learn_resumable(name: str, neurons: Bank, changed: FitSettings) -> Profile:
        run = RunFolder(args.state or args.bank / f"fit-{name}", fit_run_settings(prepared, neurons, changed))
        with resumable():
            return learn(prepared, neurons, changed, Execution(folder=run, progress=True), name=name)

    def dev_metric(profile: Profile) -> float:
        assert dev is not None  # checked with the arguments
        return steered(dev, profile, args.batch_size).value

    random_bank = bank.random(NeuronIndex.of(prepared.decoder.layout), args.seed)
    inputs = SteeringInputs(prepared, bank, random_bank, settings, learn_resumable, dev_metric)
    return STEERING_METHODS[args.method].profile(inputs)


def _fit_lines(result: Mapping[str, Any], profile: Profile) -> list[str]:
    evidence = result["evidence"]
    lines = [f"{result['profile']}: {profile.num_neurons} neurons, digest {profile.short_digest}"]
    if evidence:
        low, high = evidence["gain_ci95"]
        lines.append(
            f"{evidence['metric']} on {evidence['n']} dev examples: {evidence['base']:.4f} → {evidence['steered']:.4f} "
            f"(gain {evidence['steered'] - evidence['base']:+.4f}, 95% [{low:+.4f}, {high:+.4f}])"
        )
    return [*lines, *failure_lines(result["failures"])]
