"""`hones fit`: learn a steering profile for the bank that `hones attribute` found."""

import argparse
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
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
    steered,
)
from hones_offline.commands.result import read_bank
from hones_offline.data.examples import check_disjoint
from hones_offline.data.neurons import Bank, NeuronIndex
from hones_offline.learning.choosing import DevScore, FitGrid, choose_fit, dev_log_probabilities, strengthened
from hones_offline.learning.factors import FitSettings, fit_prepared, fit_run_settings
from hones_offline.learning.methods import STEERING_METHODS, SteeringInputs
from hones_offline.running.evaluation import score
from hones_offline.running.execution import Execution
from hones_offline.running.models import keep_freed_memory, load_model
from hones_offline.running.prompts import Prepared, prepare
from hones_offline.running.run_folder import RunFolder, examples_digest, resumable
from hones_steer.errors import DataError
from hones_steer.profile import Profile, save_profile

OPTIMISTIC = "dev chose this profile, so its gain there is optimistic; measure it on data never used, with --test"


def run(argv: Sequence[str]) -> int:
    """Entry point of `hones fit`."""
    parser = _parser()
    args = parser.parse_args(argv)
    check_one_process("fit")
    _check_usage(parser, args)
    settings, grid = _fit_settings(args), _fit_grid(args)
    _check_writable(args.out)
    task, loaded = load_data(args)
    others = {
        name: load_file(args, path, task.name, args.limit)
        for name, path in (("dev", args.dev), ("test", args.test))
        if path is not None
    }
    check_disjoint(data=loaded.examples, **{name: other.examples for name, other in others.items()})
    found = read_bank(args.bank, task)
    keep_freed_memory()
    model, processor = load_model(args.model, dtype=args.dtype, device=args.device)
    bank = found.for_model(model)
    data, *held_out = (
        prepare(model, processor, task, part.examples, max_failures=args.max_failures, progress=True)
        for part in (loaded, *others.values())
    )
    prepared = dict(zip(others, held_out, strict=True))
    fitting = _Fitting(args, settings, grid, data, prepared.get("dev"))
    profile = fitting.profile(bank)
    evidence, warning = {}, None
    if prepared:
        split = list(prepared)[-1]  # test where it is given
        base = score(prepared[split], batch_size=args.batch_size)
        evidence = steered(prepared[split], profile, args.batch_size).evidence(base, split)
        if split == "dev" and (len(fitting.trials) > 1 or STEERING_METHODS[args.method].chosen_on_dev):
            warning = OPTIMISTIC
    profile = replace(profile, description=args.description, license=args.license, evidence=evidence)
    save_profile(profile, args.out)
    result = {
        "profile": str(args.out),
        "digest": profile.digest,
        "task": task.name,
        "method": dict(profile.method),
        "evidence": evidence,
        "trials": fitting.trials,
        "warning": warning,
        "failures": {
            **loaded.skipped,
            **data.failures,
            **{f"{split} {name}": why for split, part in others.items() for name, why in part.skipped.items()},
            **{f"{split} {name}": why for split, part in prepared.items() for name, why in part.failures.items()},
        },
    }
    show(args.json, result, _fit_lines(result, profile))
    return 0


_DESCRIPTION = """Learn factors for the neurons that `hones attribute` found and write them as a steering profile.

Without --dev the factors are learned with the learning rate, epochs and strength given. With --dev these three are
chosen there: factors are learned at each --lr, and the metric on dev is measured after every epoch, until --patience
epochs have brought nothing better; the best epoch is measured at each of --strengths, and the best of all is taken.
One value of --lr or --strengths fixes it.

The profile carries its evidence, the metric with and without steering: on --test where given, else on --dev. What was
chosen on dev looks better there than it is, so give --test, data that is in neither --data nor --dev, for a number to
rely on."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hones fit",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=_DESCRIPTION,
        epilog="example: hones fit MODEL --task vqa --data train.jsonl --bank runs/vqa --dev dev.jsonl \\\n"
        "             --test test.jsonl --out vqa.safetensors",
    )
    add_data_arguments(parser)
    parser.add_argument("--bank", type=Path, required=True, metavar="DIR", help="run folder of `hones attribute`")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="profile to write (.safetensors)")
    parser.add_argument("--dev", type=Path, metavar="FILE", help="held-out data to choose on")
    parser.add_argument("--test", type=Path, metavar="FILE", help="held-out data of neither, for the evidence")
    parser.add_argument(
        "--method",
        choices=tuple(reversed([*STEERING_METHODS])),
        default="hones",
        help="hones, or one of its baselines (default: %(default)s)",
    )
    parser.add_argument(
        "--state",
        type=Path,
        metavar="DIR",
        help="folder for resuming (default: fit-METHOD inside --bank, with --dev fit-METHOD-dev)",
    )
    parser.add_argument("--description", default="", help="text for the profile")
    parser.add_argument("--license", default="", help="license of the profile, e.g. apache-2.0")
    _add_chosen_arguments(parser)
    add_fit_arguments(parser)
    return parser


def _add_chosen_arguments(parser: argparse.ArgumentParser) -> None:
    defaults, grid = FitSettings(), FitGrid()
    lrs, strengths = (" ".join(f"{value:g}" for value in values) for values in (grid.lrs, grid.strengths))
    chosen = parser.add_argument_group("chosen on --dev, or given")
    chosen.add_argument(
        "--lr",
        type=float,
        nargs="+",
        metavar="RATE",
        help=f"AdamW's learning rate, or several to choose from (default: {lrs} with --dev, else {defaults.lr})",
    )
    chosen.add_argument(
        "--epochs",
        type=int,
        metavar="N",
        help=f"passes over the data, with --dev at most (default: {grid.epochs} with --dev, else {defaults.epochs})",
    )
    chosen.add_argument(
        "--patience",
        type=int,
        metavar="N",
        help=f"stop when N epochs have brought nothing better on dev (default: {grid.patience})",
    )
    chosen.add_argument(
        "--strengths",
        type=float,
        nargs="+",
        metavar="X",
        help="factor of the learned offsets (each neuron's factor less 1), or several to choose from "
        f"(default: {strengths} with --dev, else 1)",
    )


def _check_writable(file: Path) -> None:
    """Raise DataError, before hours of work, if the file cannot be written."""
    if file.is_dir() or not (file.parent.is_dir() and os.access(file.parent, os.W_OK)):
        raise DataError(f"--out {file} cannot be written; name a file in an existing folder that you may write to")


def _check_usage(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Leave with the parser's error where an option has no effect, or needs dev data that is not given."""
    if not STEERING_METHODS[args.method].learned:
        for name in ("lr", "epochs", "patience", "strengths"):
            if getattr(args, name) is not None:
                parser.error(f"{args.method} learns nothing, so that --{name} has no effect; leave it out")
    if args.dev is not None:
        return
    if STEERING_METHODS[args.method].chosen_on_dev:
        parser.error(f"{args.method} chooses its factor on --dev data")
    for name in ("lr", "strengths"):
        if len(getattr(args, name) or ()) > 1:
            parser.error(f"--{name} has several values to choose from on --dev data; give that, or one value")
    if args.patience is not None:
        parser.error("--patience counts epochs on --dev data; give that, or leave it out")


def _fit_settings(args: argparse.Namespace) -> FitSettings:
    """How factors are learned; learning rate and epochs count without dev only."""
    defaults = FitSettings()
    return replace(
        fit_settings(args),
        epochs=defaults.epochs if args.epochs is None else args.epochs,
        lr=args.lr[0] if args.lr else defaults.lr,
    )


def _fit_grid(args: argparse.Namespace) -> FitGrid:
    """The values to choose from on dev; without dev the strength given is the only one."""
    given = {"lrs": args.lr, "epochs": args.epochs, "patience": args.patience, "strengths": args.strengths}
    if args.dev is None:
        given = {**given, "strengths": args.strengths or (1.0,)}
    return FitGrid(**{name: value for name, value in given.items() if value is not None})


class _Fitting:
    """The way of steering that was asked for, with its steps in the state folder."""

    def __init__(
        self, args: argparse.Namespace, settings: FitSettings, grid: FitGrid, data: Prepared, dev: Prepared | None
    ) -> None:
        self.args, self.settings, self.grid, self.data, self.dev = args, settings, grid, data, dev
        self.trials: list[dict[str, Any]] = []
        """The table of what was tried on dev."""

    def profile(self, bank: Bank) -> Profile:
        """Learn it, or choose its factor."""
        random_bank = bank.random(NeuronIndex.of(self.data.decoder.layout), self.args.seed)
        inputs = SteeringInputs(self.data, bank, random_bank, self.settings, self._learned, self._dev_metric)
        with resumable():
            return STEERING_METHODS[self.args.method].profile(inputs)

    def _learned(self, name: str, bank: Bank, settings: FitSettings) -> Profile:
        folder: Path = self.args.state or self.args.bank / f"fit-{name}{'-dev' if self.dev else ''}"
        wanted = fit_run_settings(self.data, bank, settings)
        if self.dev is None:
            execution = Execution(folder=RunFolder(folder, wanted), progress=True)
            profile = fit_prepared(self.data, bank, settings, execution, name=name)
            return strengthened(profile, self.grid.strengths[0])
        for of_the_grid in ("lr", "epochs"):
            del wanted[of_the_grid]
        of_dev = {"dev": examples_digest(self.dev.examples), "dev_batch_size": self.args.batch_size}
        run = RunFolder(folder, {**wanted, "stage": "fit on dev", **asdict(self.grid), **of_dev})

        def measure(profile: Profile) -> DevScore:
            return DevScore(**run.json(f"dev-{profile.digest[:16]}", lambda: asdict(self._dev_score(profile))))

        def folder_of(changed: FitSettings) -> RunFolder:
            return RunFolder(folder / f"lr-{changed.lr:g}", fit_run_settings(self.data, bank, changed))

        choice = choose_fit(self.data, bank, settings, self.grid, measure, folder=folder_of, name=name, progress=True)
        self.trials = run.json("trials", choice.table)
        return choice.chosen

    def _dev_score(self, profile: Profile) -> DevScore:
        assert self.dev is not None
        means = dev_log_probabilities(self.dev, profile, self.args.batch_size)
        return DevScore(self._dev_metric(profile), float(means.mean()))

    def _dev_metric(self, profile: Profile) -> float:
        assert self.dev is not None  # checked with the arguments
        return steered(self.dev, profile, self.args.batch_size).value


def _fit_lines(result: Mapping[str, Any], profile: Profile) -> list[str]:
    evidence, chosen = result["evidence"], profile.method.get("chosen_on_dev")
    lines = [f"{result['profile']}: {profile.num_neurons} neurons, digest {profile.short_digest}"]
    if chosen:
        lines.append(
            f"chosen on dev in {chosen['trials']} trials: learning rate {profile.method['lr']:g}, "
            f"epoch {profile.method['epoch']}, strength {chosen['strength']:g}"
        )
    if evidence:
        low, high = evidence["gain_ci95"]
        lines.append(
            f"{evidence['metric']} on {evidence['n']} {evidence['split']} examples: {evidence['base']:.4f} → "
            f"{evidence['steered']:.4f} (gain {evidence['steered'] - evidence['base']:+.4f}, "
            f"95% [{low:+.4f}, {high:+.4f}])"
        )
    if result["warning"]:
        lines.append(f"note: {result['warning']}")
    return [*lines, *failure_lines(result["failures"])]
